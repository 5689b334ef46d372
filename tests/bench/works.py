"""The rows of the benchmark, and what is to be reached in them."""

import shutil
from dataclasses import dataclass, replace

import peers


@dataclass(frozen=True)
class Work:
    title: str
    kind: str  # one of those in MEASURES
    n: int = 0  # connections; over HTTP/2: streams
    rate: float = 0  # events a second; of a room: messages under way
    beside: tuple[str, ...] = ()
    tls: bool = False  # between clients and the server; of a relay: to the upstream
    http2: int = 0  # streams in each connection
    redis: bool = False

    @property
    def peers(self):
        """By name: ours first."""
        chosen = peers.OURS | {name: peers.ALL[name] for name in self.beside}
        if not self.tls or self.kind == "relay":
            return chosen
        return {name: replace(peer, tls=True) for name, peer in chosen.items()}

    def missing(self):
        lacking = peers.missing_for_tls() if self.tls else []
        if self.redis and not shutil.which("redis-server"):
            return [*lacking, "redis-server"]
        return lacking


STREAMS = tuple(name for name in peers.STREAMS if name != "Node http2")
ROOMS, RELAYS = tuple(peers.ROOMS), tuple(peers.RELAYS)
LOOPS = ("Node single loop", "Starlette")
BESIDE = ("chatstream over TLS", "Node single loop", "C send() loop")
WORKS = {
    "room": Work("room: 200 members, 256 messages under way", "room", 200, 256, ROOMS),
    "alone": Work("room: 200 members, one message at a time", "room", 200, 1, ROOMS),
    "redis": Work("the same room over Redis, 256 messages under way", "room", 200, 256, redis=True),
    "fan50": Work("one answer, 300 readers, 50 events/s", "sse", 300, 50, STREAMS),
    "fan400": Work("one answer, 300 readers, 400 events/s", "sse", 300, 400, STREAMS),
    "fan2000": Work("one answer, 2,000 readers, 2 events/s", "sse", 2000, 2, STREAMS),
    "fan-tls": Work(
        "one answer over TLS, 300 readers, 50 events/s", "sse", 300, 50, LOOPS, tls=True
    ),
    "fan-h2": Work(
        "one answer over HTTP/2, 3 connections of 100 readers, 50 events/s",
        "sse",
        300,
        50,
        ("Node http2",),
        tls=True,
        http2=100,
    ),
    "relay": Work("relay: 100 answers, 50 tokens/s each", "relay", 100, 50, RELAYS),
    "relay10": Work("relay: 10 answers, 50 tokens/s each", "relay", 10, 50, RELAYS),
    "relay1": Work("relay: 1 answer, 50 tokens/s", "relay", 1, 50, RELAYS),
    "relay-tls": Work(
        "relay from an upstream over TLS: 100 answers, 50 tokens/s each",
        "relay",
        100,
        50,
        RELAYS,
        tls=True,
    ),
    "event": Work("a token of 150 bytes in the log", "event", 1, 10_000),
    "idle-reader": Work("idle SSE readers", "idle-sse", 1000, 0, STREAMS),
    "idle-member": Work("idle room members", "idle-room", 1000, 0, ROOMS),
    "idle-reader-tls": Work("idle SSE readers over TLS", "idle-sse", 1000, 0, LOOPS, tls=True),
    "idle-member-tls": Work(
        "idle room members over TLS", "idle-room", 1000, 0, ROOMS[1:3], tls=True
    ),
    "idle-cpu": Work(
        "10,000 idle readers, a keep-alive every 4 s",
        "keep-alive",
        10_000,
        1 / 4,
        ("Node single loop", "C send() loop"),
    ),
    "accept": Work("SSE connections accepted, 32 at a time", "accept", 32, 0, STREAMS),
    "restart": Work("5,000 readers come back at once, 1 event/s", "restart", 5000, 1, LOOPS),
    "start": Work("start, until it accepts", "start", 0, 0, STREAMS + ROOMS),
    "ceiling": Work("the load's own ceiling: all that comes", "sse", 300, 2000, BESIDE[1:]),
}
GROWTH = {
    "readers": [Work(f"{n} readers", "sse", n, 5, BESIDE) for n in (10, 100, 1000, 10_000)],
    "events": [Work(f"{rate} events/s", "sse", 100, rate, BESIDE) for rate in (1, 10, 100, 1000)],
}
ROWS = [*WORKS, *(f"growth-{axis}" for axis in GROWTH)]

# work, figure, peer, at most (at least, where negative) this many times the peer's;
# a peer of None: an absolute figure; `chatstream @ relay`: our own figure in that row.
GOALS = [
    ("room", "per_s", "picows", -10),
    ("room", "per_s", "ws", -20),
    ("room", "per_s", "websockets", -20),
    ("room", "p50_ms", "picows", 0.1),
    ("room", "p50_ms", "ws", 0.1),
    ("room", "p50_ms", "websockets", 0.1),
    ("alone", "cpu_us", "picows", 1.1),
    ("alone", "p50_ms", "picows", 2),
    ("alone", "p50_ms", "ws", 1),
    ("alone", "p50_ms", "websockets", 1),
    ("redis", "messages_s", None, -20_000),
    ("fan50", "cpu_us", "Node single loop", 1),
    ("fan50", "cpu_us", "Starlette", 0.5),
    ("fan50", "cpu_us", "C send() loop", 2),
    ("fan50", "p50_ms", "Node single loop", 1),
    ("fan50", "p50_ms", "Starlette", 1),
    ("fan400", "per_s", None, -118_800),
    ("fan400", "p99_ms", None, 50),
    ("fan2000", "p50_ms", "Node single loop", 1),
    ("fan2000", "cpu_us", "Node single loop", 1),
    ("fan-tls", "cpu_us", "Node single loop", 1),
    ("relay", "cpu_us", "FastAPI + httpx2", 0.5),
    ("relay", "cpu_us", "Node pipe", 1.2),
    ("relay", "p50_ms", None, 0.6),
    ("relay10", "p50_ms", None, 0.3),
    ("relay1", "p50_ms", None, 0.3),
    ("relay-tls", "cpu_us", "Node pipe", 1),
    ("relay-tls", "cpu_us", "FastAPI + httpx2", 0.6),
    ("relay-tls", "cpu_us", "chatstream @ relay", 1.5),
    ("event", "bytes", None, 250),
    ("idle-reader", "kb", None, 10),
    ("idle-member", "kb", None, 7),
    *(("idle-reader", "kb", name, 1) for name in STREAMS[1:]),
    *(("idle-member", "kb", name, 1) for name in ROOMS),
    ("idle-cpu", "core", None, 0.04),
    ("accept", "per_s", "Starlette", -1),
    ("restart", "until_s", "Starlette", 0.5),
    ("start", "start_s", None, 0.7),
]
