"""chatstream: the working model of a long connection.

One idea carries the whole program:

    Everything that happens is appended to an event log.
    Everyone who listens is a position in one.

    writers               logs                       readers
    tick() ──────────▶  clock   ●●●●●●●●──▶   SSE over HTTP   (h11, Hypercorn)
    Answers.run() ───▶  answer  ●●●●──▶       WebSocket       (trio-websocket)
    Member.tell() ───▶  room    ●●●●●●──▶     one JSON body   (a short connection)

Late join, resume after a cut, several readers of one answer, fan-out, slow readers:
one mechanism, not five. SSE and WebSocket differ only in how an event is framed.

    log      keeps                 a new reader starts    ends
    clock    60 events             with the next tick     with the server
    room     1000 events, 1 MiB    50 messages back (*)   with the server
    answer   all, at most 32 MiB   at the beginning       done, stopped or failed

    (*) a member without our subprotocol cannot tell old from new: it starts now

A request owns its reader; the server owns the writers. That decides every lifetime.

Three things to learn here: the log (EventLog, Reader, Pump), a request that ends with
its client (Reader.run), and who owns whom (Service.serve). The rest is what the open
internet demands of them.

Run `python chatstream.py`, then open http://localhost:4001/.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import fcntl
import functools
import gc
import hashlib
import http.client
import http.cookiejar
import json
import logging
import mimetypes
import os
import random
import re
import resource
import secrets
import selectors
import signal
import socket
import ssl
import struct
import sys
import termios
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from email.utils import formatdate
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, cast
from urllib.parse import parse_qs, unquote, urlsplit

if __name__ == "__main__":  # a signal stops us, also in the midst of the imports
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, lambda *_: os._exit(0))

import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import h11
import trio
import trio_websocket
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Closed, RawData
from hypercorn.protocol.events import Body, Data, StreamClosed
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, LifespanState

if TYPE_CHECKING:
    import coredis
    import httpcore2
    import httpx2

# ─── Settings ────────────────────────────────────────────────────────────────────────
# Times in seconds, sizes in bytes. What an operator may want to change is a flag; the
# rest are promises to clients, so they stand here and not on the command line.

KiB, MiB = 1024, 1024 * 1024

CLOCK_EVENTS = 60
ROOM_EVENTS, ROOM_BYTES, ROOM_HISTORY = 1000, MiB, 50
ANSWER_BYTES, ANSWERS_BYTES, ANSWERS_RUNNING = 32 * MiB, 512 * MiB, 1000
ANSWER_KEPT = 60  # how long an ended answer waits for late readers

HEAD_BYTES, HEAD_TIMEOUT = 16 * KiB, 10
BODY_BYTES, BODY_TIMEOUT = MiB, 30
IDLE_TIMEOUT = 60  # an HTTP connection between two requests
STUCK_TIMEOUT = 10  # a client that takes nothing of what we send
STUCK = "it read nothing any more"
VANISHED_TIMEOUT = 20  # a peer that acknowledges nothing: its network is gone
LINGER_CLOSE = 2  # for the last bytes to arrive before the socket is closed
WRITE_BYTES = 64 * KiB  # of one log, to one reader, at a time
PUMP_REST = 0.0005  # after a short pass
INTAKE_REST = 0.002  # the most, or so, that a token waits for others
TURN = 0.005  # after so long, a busy loop lets the other tasks run
GC_THRESHOLD = 20_000  # new objects; the default of 700 looks for cycles all the time

SSE_KEEP_ALIVE, SSE_RETRY = 15, 2
PING_EVERY, HEARTBEAT_EVERY = 20, 25
MESSAGE_CHARACTERS = 4096
MESSAGE_BYTES = 12 * MESSAGE_CHARACTERS + KiB  # as JSON, all of them escaped emoji
CHATTER_BYTES = 256 * KiB  # pings and empty fragments, with no message among them

CONNECT_TIMEOUT, CONNECT_TRIES = 5, 3
HEAD_WAIT = 10  # for the upstream's status, before the stream starts without it
FIRST_TOKEN_TIMEOUT, NEXT_TOKEN_TIMEOUT = 120, 60
EVENT_BYTES = MiB

logger = logging.getLogger("chatstream")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the flags say. Times in seconds."""

    host: str = "127.0.0.1"
    port: int = 4001
    room_port: int = 8888
    upstream: str = ""
    model: str = ""
    api_key: str = dataclasses.field(default="", repr=False)
    allow_origin: tuple[str, ...] = ()
    redis: str = ""
    workers: int = 1
    linger: float = 10
    grace: float = 5
    room_rate: float = 20
    room_suffix: str = "--返回数据"
    certfile: str = ""
    keyfile: str = ""
    log_level: str = "info"

    @property
    def model_name(self) -> str:
        return self.model or ("default" if self.upstream else "demo")


class Problem(Exception):
    """What went wrong, for whoever asked: an HTTP error, or an `error` event later."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.headers = dict(headers or {})
        self.error: dict[str, Any] = {
            "message": message, "type": type, "param": param, "code": code
        }  # fmt: skip

    def __str__(self) -> str:
        return str(self.error["message"])


def to_json(value: object) -> str:
    """Compact JSON that can be encoded: half a surrogate pair stays an escape."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, separators=(",", ":"))
    return text


def from_json(text: str | bytes | bytearray) -> Any:
    """Parse JSON as RFC 8259 has it. Raises ValueError.

    Python also takes NaN, and reads 1e999 as infinity: passed on, either would be JSON
    that no browser can parse.
    """
    try:
        return DECODER.decode(text if isinstance(text, str) else text.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if abs(number) < inf else _no_constant(text)


DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)


# ─── The log ─────────────────────────────────────────────────────────────────────────
# append() and close() are plain functions: nothing else runs in between, so nobody
# ever sees half a change. Whoever wants news is told by one call, and not waited for.
#
# A reader costs the log nothing but a number, and that is the reader's own. So the log
# never asks how far they are: it forgets by its bounds alone, and who has stood still
# for too long finds on its return that `start` has moved past its place.


NOTHING: Mapping[str, Any] = {}  # one for all events that have nothing to add


class Event(NamedTuple):
    """One thing that happened. `n` is its place in its log.

    `about` is what only some framings show: who said it, and when.
    """

    n: int
    data: str
    type: str = "message"
    about: Mapping[str, Any] = NOTHING


class EventLog:
    """A bounded list of events, and the readers that stand at places in it.

    Places are numbered for ever: `start` is the first event still kept, `end` the place
    of the next one, as in a slice. An event's id is `<name>-<n>`.
    """

    def __init__(
        self,
        name: str,
        max_events: float = inf,
        max_bytes: float = inf,
        on_news: Callable[[EventLog], None] = lambda log: None,
    ) -> None:
        self.name = name
        self.max_events = max_events
        self.max_bytes = max_bytes
        self.on_news = on_news
        self.start = self.end = 0
        self.size = 0  # in characters: nobody encodes a text only to count its bytes
        self.closed = False
        self.readers: dict[Reader, None] = {}  # as a set that keeps its order
        self._events: list[Event] = []  # no deque: readers take slices
        self._joined: dict[tuple[Framing, int], tuple[bytes, int]] = {}

    def append(self, data: str, type: str = "message", **about: Any) -> Event:
        """Add an event at the end; forget the oldest ones beyond the bounds."""
        event = Event(self.end, data, type, about or NOTHING)
        self._events.append(event)
        self.end += 1
        self.size += len(data)
        while len(self) > self.max_events or self.size > self.max_bytes:
            self.size -= len(self._events.pop(0).data)
            self.start += 1
        self._changed()
        return event

    def close(self) -> None:
        """Nothing more will come: readers go on to the end, then they are done."""
        self.closed = True
        self._changed()

    def skip_to(self, n: int) -> None:
        """Start again at place n, with nothing kept: what was before it is missed.

        Readers learn of it by the next append, and who was further back by a gap.
        """
        self._events.clear()
        self.start = self.end = n
        self.size = 0

    def _changed(self) -> None:
        self._joined.clear()
        self.on_news(self)

    def __len__(self) -> int:
        return len(self._events)

    def __bool__(self) -> bool:
        return True  # also when it is empty

    def __getitem__(self, n: int) -> Event:
        return self._events[n - self.start]

    def events(self, start: int, end: int) -> list[Event]:
        return self._events[start - self.start : end - self.start]

    def place_after(self, last_event_id: str | None) -> int | None:
        """The place after the event with this id; None if it is no id of this log.

        That event may be forgotten: the reader then starts before `start`, with a gap.
        """
        name, _, n = (last_event_id or "").rpartition("-")
        if name != self.name or not re.fullmatch("[0-9]{1,15}", n):
            return None
        return int(n) + 1 if int(n) < self.end else None

    def frames(self, framing: Framing, place: int) -> tuple[bytes, int]:
        """The bytes of the events from `place` on, WRITE_BYTES or so; the place after.

        Most readers stand at the same place: what one of them needs is made once and
        kept until the log changes. No more than WRITE_BYTES, because a slow reader
        holds what its socket did not take: its memory is one write, however far back.
        """
        joined = self._joined.get((framing, place))
        if joined is None:
            if len(self._joined) > 8:  # stragglers, each at a place of its own
                self._joined.clear()
            joined = self._joined[framing, place] = self._join(framing, place)
        return joined

    def _join(self, framing: Framing, place: int) -> tuple[bytes, int]:
        frames, size = [], 0
        while place < self.end and size < WRITE_BYTES:
            frames.append(framing.frame(self.name, self[place]))
            size += len(frames[-1])
            place += 1
        # A framing may show nothing of an event; a chunk of nothing would end the body.
        return framing.wrap(b"".join(frames)) if size else b"", place


# ─── On the wire ─────────────────────────────────────────────────────────────────────
# The same event, framed for SSE or for WebSocket: all that differs between the two.
# Pure functions, and one parser that takes bytes however the network cut them.


def frame_sse(name: str, event: Event) -> bytes:
    """An event as a block of an event stream (HTML standard 9.2.5).

    `id:` comes after `data:`: some clients store an id as soon as they have read the
    line, and would skip an event that was cut in half.
    """
    type_line = "" if event.type == "message" else f"event: {event.type}\n"
    data = event.data
    if "\n" in data or "\r" in data:  # not splitlines(): U+2028 ends no line here
        data = "\ndata: ".join(re.split("\r\n|\r|\n", data))
    block = f"{type_line}data: {data}\nid: {name}-{event.n}\n\n"
    return block.encode(errors="replace")


def sse_gap(missed: int) -> bytes:
    """No event of the log, so it has no id: the client's last one stays as it was."""
    return b'event: gap\ndata: {"missed": %d}\n\n' % missed


def chunk(data: bytes) -> bytes:
    """A chunk of an HTTP/1.1 body (RFC 9112, section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA


def frame_ws(payload: bytes, opcode: int = TEXT) -> bytes:
    """One unmasked, unfragmented frame (RFC 6455, section 5.2), text by default."""
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", 0x80 | opcode, size) + payload
    if size < 1 << 16:
        return struct.pack("!BBH", 0x80 | opcode, 126, size) + payload
    return struct.pack("!BBQ", 0x80 | opcode, 127, size) + payload


def frame_close(code: int, reason: str = "") -> bytes:
    """A close frame (RFC 6455, section 5.5.1); the reason has at most 123 bytes."""
    if code == 1005:  # stands for: no code
        return frame_ws(b"", CLOSE)
    return frame_ws(struct.pack("!H", code) + reason.encode()[:123], CLOSE)


def frame_ws_json(name: str, event: Event) -> bytes:
    """The subprotocol chatstream.v1, and the clock: `type` only where it says more."""
    fields: dict[str, Any] = {"id": f"{name}-{event.n}", **event.about}
    if name == "clock":
        fields["data"] = event.data
    else:
        fields["type"] = event.type
        if event.type == "message":
            fields["text"] = event.data
    return frame_ws(to_json(fields).encode())


def ws_gap(missed: int) -> bytes:
    return frame_ws(b'{"type":"gap","missed":%d}' % missed)


def frame_ws_plain(suffix: str, name: str, event: Event) -> bytes:
    """What was said and nothing else, for any WebSocket client."""
    if event.type != "message":
        return b""
    return frame_ws((event.data + suffix).encode(errors="replace"))


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity: a fast dict key
class Framing:
    """How the events of a log look on one kind of wire.

    All that SSE and WebSocket do not share stands in these six fields.
    """

    frame: Callable[[str, Event], bytes]
    gap: Callable[[int], bytes] = lambda missed: b""
    wrap: Callable[[bytes], bytes] = bytes  # around all that goes out in one write
    keep_alive: bytes = b""
    every: float = inf
    steady: bool = False  # keep-alives at fixed times, not after silence


SSE = Framing(frame_sse, sse_gap, bytes, b": keep-alive\n", SSE_KEEP_ALIVE)
SSE_CHUNKED = dataclasses.replace(SSE, wrap=chunk)
HEARTBEAT = frame_ws(b'{"type":"heartbeat"}')
WS_JSON = Framing(frame_ws_json, ws_gap, bytes, HEARTBEAT, HEARTBEAT_EVERY, True)
WS_CLOCK = Framing(frame_ws_json, ws_gap)  # a tick a second is sign of life enough


class ServerSentEvent(NamedTuple):
    data: str
    type: str
    last_event_id: str


class SSEParser:
    """Reads an event stream (HTML standard 9.2.6), however its bytes were split.

    Lines are cut as bytes and decoded one by one, so that a character that arrives in
    two pieces is whole again. An event larger than `max_bytes` raises ValueError.

    An unfinished line is a list of its pieces, joined when its end is there: adding
    each piece to one growing string would take time that grows with its square.
    """

    _LINE_END = re.compile(rb"\r\n|\n|\r")

    def __init__(self, max_bytes: float = inf) -> None:
        self.max_bytes = max_bytes
        self.last_event_id = ""
        self.retry: int | None = None  # milliseconds
        self._type = ""
        self._data: list[str] = []
        self._size = 0  # of the event that is not complete yet
        self._tail: list[bytes] = []
        self._after_cr = False  # a line end already; should a LF come, it is part of it
        self._first_line = True  # which may have a byte order mark

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        """Take the next bytes; return the events that they complete.

        A last event without its blank line is never returned, as the standard wants.
        """
        if self._after_cr and data[:1] == b"\n":  # the second half of a CR LF
            data, self._after_cr = data[1:], False
        if not data:
            return []
        if self._is_one_block(data):
            self._after_cr = self._first_line = False
            text = data[6:-2].decode(errors="replace")
            return [ServerSentEvent(text, "message", self.last_event_id)]
        self._after_cr = data[-1:] == b"\r"
        *lines, tail = self._LINE_END.split(data)
        if lines:
            lines[0] = b"".join(self._tail) + lines[0]
            self._tail.clear()
        self._tail.append(tail)
        self._size += len(data)
        events = [event for line in lines if (event := self._line(line))]
        if self._size > self.max_bytes:
            raise ValueError(f"an event of more than {self.max_bytes} bytes")
        return events

    def _is_one_block(self, data: bytes) -> bool:
        """One `data:` line and its blank line, as nearly all that upstreams send.

        A short cut, and it must change nothing: it is taken only where nothing is
        pending, and where the long way would give the same event.
        """
        return (
            data[:6] == b"data: "
            and data.find(b"\n") == len(data) - 2 <= self.max_bytes
            and data[-1:] == b"\n"
            and b"\r" not in data
            and not (self._data or self._type or any(self._tail))
        )

    def _line(self, raw: bytes) -> ServerSentEvent | None:
        if self._first_line:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
            self._first_line = False
        if not raw:
            return self._dispatch()
        name, _, value = raw.decode(errors="replace").partition(":")
        self._field(name, value.removeprefix(" "))
        return None

    def _field(self, name: str, value: str) -> None:
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._type = value
        elif name == "id" and "\0" not in value:
            self.last_event_id = value
        elif name == "retry" and re.fullmatch("[0-9]{1,15}", value):
            self.retry = int(value)

    def _dispatch(self) -> ServerSentEvent | None:
        """At a blank line. Without data it is no event, and its type is forgotten."""
        event = None
        if self._data:
            data = "\n".join(self._data)
            event = ServerSentEvent(data, self._type or "message", self.last_event_id)
        self._data, self._type, self._size = [], "", len(self._tail[0])
        return event


class Closing(Exception):
    """The connection must end, with this code (RFC 6455, section 7.4.1)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class FrameParser:
    """Reads a client's WebSocket frames (RFC 6455, section 5), however they were split.

    What comes next is pulled, not pushed: who is called away between two messages
    finds the second one still here. Raises Closing: 1002 for what is no frame, 1007 for
    text that is not UTF-8, 1009 for a message of more than MESSAGE_BYTES.
    """

    __slots__ = ("_buffer", "_decoder", "_opcode", "_parts", "_size")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._opcode = CONTINUATION  # of the message whose fragments are coming, if any
        self._size = 0  # of these so far
        self._parts: list[str] = []
        self._decoder: codecs.IncrementalDecoder | None = None

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> tuple[int, str | bytes] | None:
        """A whole message, text as str, or a control frame. None: feed me more."""
        while frame := self._next_frame():
            final, opcode, payload = frame
            if opcode >= CLOSE:
                return opcode, payload
            self._opcode = opcode or self._opcode
            if self._opcode == TEXT:
                self._parts.append(self._decode(payload, final))
            self._size += len(payload)
            if final:
                text, opcode = "".join(self._parts), self._opcode
                self._opcode, self._size, self._parts = CONTINUATION, 0, []
                return opcode, text if opcode == TEXT else b""  # which nobody wants
        return None

    def _next_frame(self) -> tuple[bool, int, bytes] | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        self._check_head(buffer[0], buffer[1])
        final, opcode, size = buffer[0] >= 0x80, buffer[0] & 0xF, buffer[1] & 0x7F
        start = {126: 4, 127: 10}.get(size, 2)
        if len(buffer) < start:
            return None
        if start > 2:
            size = int.from_bytes(buffer[2:start])
            if size >> 63 or size < (126 if start == 4 else 1 << 16):
                raise Closing(1002, "this length could be written shorter")
        if opcode < CLOSE and self._size + size > MESSAGE_BYTES:
            raise Closing(1009, f"at most {MESSAGE_CHARACTERS} characters, please")
        end = start + 4 + size
        if len(buffer) < end:
            return None
        payload = unmask(buffer[start + 4 : end], buffer[start : start + 4])
        del buffer[:end]
        return final, opcode, payload

    def _check_head(self, first: int, second: int) -> None:
        opcode = first & 0xF
        if first & 0x70 or opcode not in (0x0, 0x1, 0x2, 0x8, 0x9, 0xA):
            raise Closing(1002, "reserved bits and opcodes mean nothing here")
        if second < 0x80:
            raise Closing(1002, "a client must mask its frames")
        if opcode >= CLOSE:
            if first < 0x80 or second & 0x7F > 125:
                raise Closing(1002, "a control frame is short, and in one piece")
        elif (opcode == CONTINUATION) != (self._opcode != CONTINUATION):
            raise Closing(1002, "a message begins once, then it continues")

    def _decode(self, payload: bytes, final: bool) -> str:
        """Text may be cut inside of a character; nonsense is found in its fragment."""
        try:
            if final and not self._decoder:
                return payload.decode()
            self._decoder = self._decoder or UTF8()
            text = self._decoder.decode(payload, final)
        except UnicodeDecodeError:
            raise Closing(1007, "text must be UTF-8") from None
        if final:
            self._decoder = None
        return text


UTF8 = codecs.getincrementaldecoder("utf-8")


def unmask(data: bytes | bytearray, key: bytes | bytearray) -> bytes:
    """XOR with the key, again and again (RFC 6455, section 5.3), as one number."""
    mask = (key * (len(data) // 4 + 1))[: len(data)]
    return (int.from_bytes(data) ^ int.from_bytes(mask)).to_bytes(len(data))


def parse_close(payload: bytes) -> tuple[int, str]:
    """Code and reason of a close frame (RFC 6455, section 7.4). Raises Closing."""
    if not payload:
        return 1005, ""
    code = int.from_bytes(payload[:2])
    known = 1000 <= code <= 1014 and code not in (1004, 1005, 1006)
    if len(payload) == 1 or not (known or 3000 <= code < 5000):
        raise Closing(1002, "this is no close code")
    try:
        return code, payload[2:].decode()
    except UnicodeDecodeError:
        raise Closing(1007, "a reason must be UTF-8") from None


# ─── Delivery ────────────────────────────────────────────────────────────────────────
# The usual design wakes a task for each reader of each event. Here one task, the pump,
# makes one plain pass over the readers of every log that has news, and writes without
# waiting. What a socket does not take stays with that reader, whose own task waits for
# room while the pass goes on. A slow reader costs the others one failed attempt.


class Outlet(Protocol):
    """Where a reader writes. `busy`: something is still on its way, write nothing."""

    @property
    def busy(self) -> bool: ...

    def write_now(self, data: bytes) -> None: ...
    async def flush(self) -> None: ...


class Wire(trio.abc.Stream):
    """The stream of one connection, for whoever writes to it: the pump, h11, a library.

    On TCP `write_now` goes straight to the socket, and every write has a deadline: no
    progress for STUCK_TIMEOUT seconds breaks the connection. TLS goes between two
    wires: the lower one keeps the deadline, the upper one the order of the writes.

    `rest` is what the socket did not take. Nobody writes while there is some, or while
    somebody else holds the lock, because half a frame inside of another is the end of
    any protocol. Who cannot wait looks whether it is busy; all others take the lock.
    """

    def __init__(self, stream: trio.SocketStream | trio.SSLStream[Wire]) -> None:
        self.stream = stream
        self.tcp = isinstance(stream, trio.SocketStream)
        self.socket: trio.socket.SocketType = (
            stream.socket if isinstance(stream, trio.SocketStream)
            else stream.transport_stream.socket
        )  # fmt: skip
        self.fd = self.socket.fileno() if self.tcp else -1
        self.rest: memoryview | bytes = b""
        self.busy = False  # there is some, or somebody holds the lock
        self.unread = b""  # put back, to be read before what the peer sends
        self.sent = 0
        self.stuck = False
        self.ended = False  # the peer has said all that it will
        self.listening_since = inf  # when we began to wait for bytes; inf: we do not
        self._lock = trio.Lock()

    def write_now(self, data: bytes) -> None:
        """Write without waiting, if not busy; what is not taken waits for flush().

        With TLS nothing is taken at once: its records are flush()'s to make. `os.write`
        does what `socket.send` does, cheaper: Trio's sockets never block, and Python
        ignores SIGPIPE.
        """
        taken = 0
        if self.tcp:
            try:
                taken = os.write(self.fd, data)
            except OSError:  # no room, or broken: flush() will see which
                taken = 0
        self.sent += taken
        if taken < len(data):
            self.rest, self.busy = memoryview(data)[taken:], True

    async def flush(self) -> None:
        """Wait until all is written. Raises BrokenResourceError, also if stuck."""
        if self.busy:
            await self._send(b"")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write all; against Trio's custom no checkpoint if it is taken at once.

        That saves a turn of the loop for each response. The price: who sends without
        end must wait for something else now and then, as all here do for input.
        """
        if self.tcp and not self.busy:
            self.write_now(bytes(data))
            await self.flush()
        else:
            await self._send(data)

    async def _send(self, data: bytes | bytearray | memoryview) -> None:
        self.busy = True
        try:
            async with self._lock:
                await self._drain()
                self.rest = memoryview(data)
                await self._drain()
        finally:
            self.busy = bool(self.rest) or self._lock.locked()

    async def _drain(self) -> None:
        while self.rest:
            if not self.tcp:
                data, self.rest = self.rest, b""
                await self.stream.send_all(data)
                self.sent += len(data)
                continue
            try:
                taken = os.write(self.fd, self.rest)
                self.sent += taken
                self.rest = self.rest[taken:]
            except BlockingIOError:
                await self._room()
            except OSError as error:
                raise trio.BrokenResourceError(str(error)) from error

    async def _room(self) -> None:
        """Wait for room in the socket's buffer, as long as the peer takes anything.

        Linux calls a socket writable when a third of its buffer is free. A slow peer
        may take longer than our limit for that: so what counts is what it acknowledges.
        """
        queued = self._queued()
        while True:
            with trio.move_on_after(STUCK_TIMEOUT):
                await trio.lowlevel.wait_writable(self.fd)
                return
            before, queued = queued, self._queued()
            if queued >= before:
                self.stuck = True
                self.abort()
                raise trio.BrokenResourceError(STUCK)

    def _queued(self) -> int:
        """Bytes that the peer has not acknowledged yet."""
        raw = fcntl.ioctl(self.fd, termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(raw, sys.byteorder)

    def abort(self) -> None:
        """Reset the connection when it is closed, so that its buffers are freed."""
        with contextlib.suppress(OSError):  # it is gone already
            reset = struct.pack("ii", 1, 0)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)

    async def wait_send_all_might_not_block(self) -> None:
        await self.flush()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self.unread:
            data, self.unread = self.unread, b""
            return data
        self.listening_since = trio.current_time()
        data = await self._receive(max_bytes or 64 * KiB)
        self.listening_since = inf
        self.ended = not data
        return data

    def receive_now(self) -> bytes:
        """What is there already, and b"" if nothing is. Never waits."""
        try:
            return os.read(self.fd, 64 * KiB) if self.tcp else b""
        except OSError:  # nothing, or broken: receive_some() will see which
            return b""

    async def _receive(self, max_bytes: int) -> bytes:
        """As SocketStream does, with 1 KB less of it in memory while nothing comes."""
        while self.tcp:
            await trio.lowlevel.wait_readable(self.fd)
            try:
                return os.read(self.fd, max_bytes)
            except BlockingIOError:
                continue  # it was a false alarm
            except OSError as error:
                raise trio.BrokenResourceError(str(error)) from error
        return bytes(await self.stream.receive_some(max_bytes))

    async def aclose(self) -> None:
        self.fd = -1
        await self.stream.aclose()

    async def linger(self) -> None:
        """Say that no more will come, and give the peer time to read what it was sent.

        Closing a socket with unread input resets it, and destroys what is under way.
        """
        if self.ended:  # there is no input: what we have sent will arrive
            return
        with trio.move_on_after(LINGER_CLOSE):
            if isinstance(self.stream, trio.SSLStream):
                with contextlib.suppress(trio.BrokenResourceError):  # no goodbye back
                    await self.stream.unwrap()
                return
            await self.stream.send_eof()
            while await self.receive_some(64 * KiB):
                pass


class AsgiOutlet:
    """HTTP/2 has frames, windows and streams of its own: here Hypercorn writes.

    Nothing goes out by itself: each write calls the reader's own task to flush(). So
    here each event wakes a task for each reader, as in the usual design.
    """

    def __init__(self, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        self.send = send
        self.rest = b""

    @property
    def busy(self) -> bool:
        return bool(self.rest)

    def write_now(self, data: bytes) -> None:
        self.rest = data

    async def flush(self) -> None:
        if self.rest:
            body = {"type": "http.response.body", "body": self.rest, "more_body": True}
            await self.send(body)
            self.rest = b""


class Reader:
    """A position in a log, on a wire.

    Two drive it. The pump calls catch_up() when there is news; that is a plain
    function. The task of the connection sits in run(), and is needed only for what
    has to wait: a full wire, the end of the log, the client's leaving.
    """

    __slots__ = (
        "_listening",
        "delivered",
        "framing",
        "gaps",
        "log",
        "outlet",
        "position",
        "problem",
        "quiet_since",
    )  # fmt: skip

    def __init__(
        self, log: EventLog, outlet: Outlet, framing: Framing, position: int
    ) -> None:
        self.log = log
        self.outlet = outlet
        self.framing = framing
        self.position = position
        self.delivered = self.gaps = 0
        self.problem: str | None = None
        self.quiet_since = trio.current_time()
        self._listening = trio.CancelScope()

    def catch_up(self, now: float) -> None:
        """Write what is new, as far as the wire takes it. Never waits."""
        log, outlet, framing = self.log, self.outlet, self.framing
        while self.position < log.end and not outlet.busy:
            if self.position < log.start:
                self._tell_gap()
                continue
            frames, position = log.frames(framing, self.position)
            self.delivered += position - self.position
            self.position = position
            if frames:
                outlet.write_now(frames)
            if not framing.steady:
                self.quiet_since = now
        if log.closed or outlet.busy:
            self._listening.cancel()

    def _tell_gap(self) -> None:
        """What it missed is gone for good: say how much, go on where the log begins."""
        gap = self.framing.gap(self.log.start - self.position)
        self.position = self.log.start
        self.gaps += 1
        if gap:
            self.outlet.write_now(self.framing.wrap(gap))

    def keep_alive(self, now: float) -> None:
        """Called once a second: break the silence when it has lasted long enough."""
        if now - self.quiet_since >= self.framing.every and not self.outlet.busy:
            self.quiet_since += self.framing.every
            self.write_aside(self.framing.wrap(self.framing.keep_alive))

    def write_aside(self, data: bytes) -> None:
        """Write something that is no event."""
        self.outlet.write_now(data)
        if self.outlet.busy:
            self._listening.cancel()

    def drop(self, problem: str) -> None:
        """End this reader from outside; its own task raises."""
        self.problem = problem
        self._listening.cancel()

    async def run(self, listen: Callable[[], Awaitable[object]]) -> bool:
        """Read the log to its end (True), or until the client has left (False).

        One task does it all. It listens to the client, and `listen` returns when that
        has left; catch_up() calls it away, by cancelling, when there is something that
        must be waited for: room on a full wire, or the log's last bytes. So `listen`
        must be something that can be cancelled and called again, with nothing lost.
        Raises BrokenResourceError when the client takes nothing any more.
        """
        self.log.readers[self] = None
        try:
            while True:
                self.catch_up(trio.current_time())
                with self._listening:
                    await listen()
                    return False
                # Made anew before anything is waited for: who cancels it from now on
                # ends the next listen(), so that no call is lost.
                self._listening = trio.CancelScope()
                if self.problem:
                    raise trio.BrokenResourceError(self.problem)
                await self.outlet.flush()
                if self.log.closed and self.position >= self.log.end:
                    return True
        finally:
            self.log.readers.pop(self, None)


class Pump:
    """One task for the whole server: every log with news, every reader catches up."""

    def __init__(self) -> None:
        self._news_in: dict[EventLog, int] = {}
        self._news = trio.Event()

    def notify(self, log: EventLog) -> None:
        self._news_in[log] = self._news_in.get(log, 0) + 1
        self._news.set()

    async def run(self) -> None:
        """Pass after pass. The busier it gets, the more each write carries.

        After a pass that found more than one event in a log, rest as long as it took:
        incoming messages are served meanwhile, and the next pass carries them together.
        After one that was over in no time, rest for PUMP_REST: with many small logs, to
        wake up is what costs. After a long pass with single events only yield a few
        times: in a full room a lone message must not wait for a rest.

        So when events pile up, the passes take half of the time: the rest is for input.
        """
        while True:
            await self._news.wait()
            # Taken before the pass: what is appended from now on is for the next one.
            self._news = trio.Event()
            logs, self._news_in = self._news_in, {}
            took = await self._pass(logs)
            if max(logs.values()) > 1 or took < PUMP_REST:
                await trio.sleep(max(took, PUMP_REST))
            else:
                for _ in range(3):  # turns, in which what has arrived is heard
                    await trio.lowlevel.checkpoint()

    async def _pass(self, logs: Iterable[EventLog]) -> float:
        """All readers of these logs. Returns the seconds that it took."""
        took, now, started = 0.0, trio.current_time(), time.perf_counter()
        for log in logs:
            for reader in list(log.readers):
                reader.catch_up(now)
            turn = time.perf_counter() - started
            if turn > TURN:
                took += turn
                await trio.lowlevel.checkpoint()
                started = time.perf_counter()
        return took + time.perf_counter() - started


# ─── Connections ─────────────────────────────────────────────────────────────────────
# One client is one nursery, with one `except*`: whatever goes wrong inside ends that
# connection and no other. Libraries that keep all connections in one nursery can be
# ended by one client (a ping at the wrong moment: trio-websocket issue 184; a header
# that is not ASCII), so we accept by ourselves.
#
# The first head decides who goes on: h11 for HTTP/1, trio-websocket for a WebSocket,
# Hypercorn for HTTP/2. The application above sees ASGI in each HTTP case.

Message = dict[str, Any]  # ASGI's events, as its specification names their keys
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n"
QUIET_ENDS = (  # of a connection: no fault of ours, and no news
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    h11.RemoteProtocolError,
    trio_websocket.ConnectionClosed,
    ssl.SSLError,
    OSError,
)


@dataclasses.dataclass
class Visit:
    """One connection, as its line in the log tells it."""

    peer: str
    started: float = dataclasses.field(default_factory=time.monotonic)
    asked: str = "nothing"
    requests: int = 0
    ended: str = "done"

    def line(self, sent: int) -> str:
        """One line that nobody can forge: what the client wrote is escaped."""
        more = f" (+{self.requests - 1})" if self.requests > 1 else ""
        seconds = time.monotonic() - self.started
        text = (
            f"{self.peer} {self.asked}{more} {sent} bytes {seconds:.1f} s: {self.ended}"
        )
        return text.encode("ascii", "backslashreplace").decode().translate(ESCAPED)


ESCAPED = {n: f"\\x{n:02x}" for n in [*range(32), 127]}


class Upgrade(NamedTuple):
    """The client asks for a WebSocket: its handshake, and what came right after."""

    request: h11.Request
    trailing: bytes


class Http1:
    """HTTP/1.x on one stream: h11 knows the rules, the application sees ASGI.

    One task reads and writes. While an app streams, it sits in receive(): that is how
    it learns at once that its client has left, which a server that only writes learns
    when its buffers are full.
    """

    def __init__(self, stream: Wire, scheme: str, visit: Visit) -> None:
        self.stream = stream
        self.scheme = scheme
        self.visit = visit
        self.conn = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        self.head: h11.Response | None = None
        self.raw = b""  # as read, until the head is complete

    async def serve(self, app: App) -> Upgrade | None:
        """Request after request, until either side wants no more, or a WebSocket."""
        if (
            early := self.stream.receive_now()
        ):  # a head mostly comes with its connection
            self.feed(early)
        try:
            while request := await self.next_request():
                if isinstance(request, Upgrade):
                    return request
                await app(self.scope(request), self.receive, self.send)
                # Something of this exchange is left over: what came next on this
                # connection could be taken for it.
                if self.conn.our_state is not h11.DONE:
                    break
                if self.conn.their_state is not h11.DONE:
                    break
                self.conn.start_next_cycle()
        except h11.RemoteProtocolError as error:
            await self.refuse(Problem(error.error_status_hint, str(error)))
        except Problem as problem:
            await self.refuse(problem)
        if self.conn.our_state is not h11.IDLE:
            await self.stream.linger()
        return None

    def feed(self, data: bytes) -> None:
        self.raw += data
        self.conn.receive_data(data)

    async def next_request(self) -> h11.Request | Upgrade | None:
        """The next request's head; None if the client leaves instead of asking."""
        event: object = self.conn.next_event()
        if event is h11.NEED_DATA:
            event = await self.rest_of_head()
        return self.accept(event) if isinstance(event, h11.Request) else None

    async def rest_of_head(self) -> object:
        limit: float = IDLE_TIMEOUT if self.visit.requests else HEAD_TIMEOUT
        with trio.move_on_after(limit) as scope:
            while (event := self.conn.next_event()) is h11.NEED_DATA:
                data = await self.stream.receive_some(64 * KiB)
                if self.visit.requests and not self.raw:
                    scope.deadline = trio.current_time() + HEAD_TIMEOUT
                self.feed(data)
        if not scope.cancelled_caught:
            return event
        if self.raw or not self.visit.requests:
            raise Problem(408, "the request's head did not arrive in time")
        return None

    def accept(self, request: h11.Request) -> h11.Request | Upgrade:
        """What h11 lets through, and we do not. Raises Problem."""
        self.raw = b""
        self.visit.requests += 1
        # h11 only limits a head that is incomplete; one packet may bring a whole one.
        size = sum(len(name) + len(value) + 4 for name, value in request.headers)
        if size + len(request.target) > HEAD_BYTES:
            raise Problem(431, f"the request's head is larger than {HEAD_BYTES} bytes")
        target = request.target.decode("latin-1").partition("?")[0]
        self.visit.asked = f"{request.method.decode()} {target}"
        headers = [name for name, _ in request.headers]
        # A proxy before us may go by the other one of the two: then the rest of what
        # it took for one request would be a second one to us (RFC 9112, section 11.2).
        if b"content-length" in headers and b"transfer-encoding" in headers:
            raise Problem(400, "send Content-Length or Transfer-Encoding, not both")
        if request.http_version not in (b"1.0", b"1.1"):
            raise Problem(505, "this server speaks HTTP/1.0, HTTP/1.1 and HTTP/2")
        if any(
            n == b"upgrade" and v.lower() == b"websocket" for n, v in request.headers
        ):
            return Upgrade(request, self.conn.trailing_data[0])
        return request

    def scope(self, request: h11.Request) -> Scope:
        path, _, query = request.target.partition(b"?")
        return {
            "type": "http",
            "http_version": request.http_version.decode(),
            "method": request.method.decode(),
            "scheme": self.scheme,
            "path": unquote(path.decode("latin-1")),
            "query_string": query,
            "headers": list(request.headers),
            "extensions": {"chatstream.wire": self.stream},
        }

    async def receive(self) -> Message:
        """The body, piece by piece; then nothing until the client has left."""
        while True:
            if self.conn.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                await self.stream.send_all(self.conn.send(go_on))
            event = self.conn.next_event()
            if isinstance(event, h11.Data):
                body = bytes(event.data)
                return {"type": "http.request", "body": body, "more_body": True}
            if isinstance(event, h11.EndOfMessage):
                return {"type": "http.request", "body": b"", "more_body": False}
            if not await self.read_on(event):
                return {"type": "http.disconnect"}

    async def read_on(self, event: object) -> bool:
        """Feed h11; False when the client has left, or sends what nobody will read."""
        if event is not h11.NEED_DATA and event is not h11.PAUSED:
            return False
        data = await self.stream.receive_some(64 * KiB)
        self.conn.receive_data(data)
        if event is h11.NEED_DATA:  # h11 tells an end of the body from a cut
            return True
        self.raw += data  # a pipelined request: it waits for its turn
        return bool(data) and len(self.raw) <= HEAD_BYTES

    async def send(self, message: Message) -> None:
        """The head waits for the first piece of the body: one write, one packet."""
        if message["type"] == "http.response.start":
            status, headers = message["status"], tuple(message["headers"])
            self.head = response_head(status, headers, int(time.time()))
            self.visit.asked += f" {status}"
            return
        data = b""
        if self.head is not None:
            data = self.conn.send(self.head) or b""
            self.head = None
        if message.get("body"):
            data += self.conn.send(h11.Data(message["body"])) or b""
        if not message.get("more_body"):
            data += self.conn.send(h11.EndOfMessage()) or b""
        if data:
            await self.stream.send_all(data)

    async def refuse(self, problem: Problem) -> None:
        """Answer what h11 or we cannot accept as a request, if there is still time."""
        self.visit.ended = f"{problem.status}: {problem}"
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        headers, body = problem_response(problem)
        headers.append((b"connection", b"close"))
        head = h11.Response(status_code=problem.status, headers=headers)
        parts = [self.conn.send(e) for e in (head, h11.Data(body), h11.EndOfMessage())]
        await self.stream.send_all(b"".join(part or b"" for part in parts))


@functools.lru_cache(10)  # most are like the last one
def response_head(
    status: int, headers: tuple[tuple[bytes, bytes], ...], second: int
) -> h11.Response:
    return h11.Response(
        status_code=status,
        headers=[*headers, (b"date", formatdate(second, usegmt=True).encode())],
        reason=http.client.responses.get(status, "").encode(),
    )


def problem_response(problem: Problem) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of a refusal: every error has the OpenAI error shape."""
    body = to_json({"error": problem.error}).encode() + b"\n"
    headers = {"content-type": "application/json", **problem.headers}
    headers["content-length"] = str(len(body))
    return [
        (k.encode(), v.encode("latin-1", "replace")) for k, v in headers.items()
    ], body


class Http2(H2Protocol):
    """Hypercorn's HTTP/2, without what lets one stream end all the others.

    An exception in here ends the connection, and with it every stream. Hypercorn 0.18
    raises KeyError for a body whose stream has ended, UnicodeDecodeError for a head
    that is not ASCII, and what its priority tree raises for a stream that depends on
    itself. And where an app leaves off in mid-response, it tells the client nothing.
    """

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        for event in events:
            if isinstance(event, h2.events.DataReceived | h2.events.RequestReceived):
                await self._handle_stream(event)
            # RFC 9113, section 5.3.2, lets us ignore priorities: all streams are equal.
            elif not isinstance(event, h2.events.PriorityUpdated):
                await super()._handle_events([event])
        await self._flush()

    async def _handle_stream(
        self, event: h2.events.DataReceived | h2.events.RequestReceived
    ) -> None:
        """Reset what Hypercorn fails on: a late body, and heads it cannot decode."""
        number = event.stream_id
        if isinstance(event, h2.events.RequestReceived):
            head = dict(event.headers or ())
            method, path = head.get(b":method", b""), head.get(b":path", b"")
            good = path.isascii() and path and method.isascii() and method != b"CONNECT"
        else:
            good = number in self.streams
            if not good:  # the connection's window is shared
                size = event.flow_controlled_length
                self.connection.acknowledge_received_data(size, number)
        if good:
            await super()._handle_events([event])
        else:
            self._reset(number, h2.errors.ErrorCodes.PROTOCOL_ERROR)

    async def stream_send(self, event: Any) -> None:
        """Wait for a full window; tell the client when an app ends in mid-response.

        Hypercorn 0.18 takes an attempt to send nothing for progress: with a window that
        stays shut, all of a log would go into its buffer, once for each reader.
        """
        await super().stream_send(event)
        buffer = self.stream_buffers.get(event.stream_id)
        if buffer and isinstance(event, Body | Data):
            await buffer.drain()
        if isinstance(event, StreamClosed) and buffer and not buffer.complete:
            del self.stream_buffers[event.stream_id]
            self.priority.remove_stream(event.stream_id)
            self._reset(event.stream_id, h2.errors.ErrorCodes.INTERNAL_ERROR)
            await self._flush()

    def _reset(self, number: int, code: h2.errors.ErrorCodes) -> None:
        with contextlib.suppress(h2.exceptions.ProtocolError):  # it is closed already
            self.connection.reset_stream(number, code)


def in_time(app: App) -> App:
    """An app for Hypercorn: what ends one stream is no fault, and does not last."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            # A window that is never opened: TCP goes on, so the wire sees nothing.
            with trio.fail_after(STUCK_TIMEOUT):
                await send(message)

        try:
            await app(scope, receive, send_in_time)
        except* QUIET_ENDS:
            pass  # this stream's client has gone, or is stuck; the others go on

    return run


async def serve_http2(stream: Wire, scheme: str, app: App, ended: trio.Event) -> None:
    """HTTP/2 on one stream, by Hypercorn's protocol class, in a nursery of our own.

    Its TCPServer would wait for ever for a request whose body nobody reads, and its
    offer of WebSockets over HTTP/2 (RFC 8441), which browsers take, leads nowhere here.
    """

    async def send(event: object) -> None:
        if isinstance(event, RawData):
            await stream.send_all(event.data)
        elif isinstance(event, Closed):
            raise trio.BrokenResourceError("the HTTP/2 connection has ended")

    async with TaskGroup() as tasks:
        protocol = Http2(
            ASGIWrapper(cast(Any, in_time(app))), http2_config(), WorkerContext(None),
            tasks, ConnectionState(LifespanState({})), scheme == "https",
            None, None, send,
        )  # fmt: skip
        offered = protocol.connection.local_settings
        offered[h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL] = 0
        offered.acknowledge()  # else h2 sends the old value, until that is confirmed
        await protocol.initiate()
        while not (ended.is_set() and protocol.idle):
            data = None
            with trio.move_on_after(
                IDLE_TIMEOUT if protocol.keep_alive_requests else HEAD_TIMEOUT
            ):
                data = await stream.receive_some(64 * KiB)
            if data:
                await protocol.handle(RawData(data))
            elif data == b"" or protocol.idle:  # None: silence, which a stream may keep
                break
        await protocol.handle(Closed())


def http2_config() -> Config:
    config = Config()
    config.errorlog = logger
    config.include_server_header = False
    config.keep_alive_max_requests = 1 << 62  # it would end the live streams, too
    return config


# ─── Writers ─────────────────────────────────────────────────────────────────────────
# Each log has its writers, and they belong to the server: a reader that leaves takes
# nothing with it. An answer alone looks back: with nobody attending, it is cancelled.


def clock_text(second: int) -> str:
    moment = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(second))
    return f"The server time is: {moment}"


async def tick(clock: EventLog) -> None:
    """One ticker for all readers: event n is the Unix second n, appended on the second.

    Seconds that were missed (a busy or suspended machine) are made up for, as far back
    as the log reaches; that also fills it at the start, so that a reader loses nothing
    when the server is started again. A clock that is set back has said those seconds:
    it is silent until it has caught up.
    """
    while True:
        second = int(time.time())
        if second - clock.end > CLOCK_EVENTS:
            clock.skip_to(second - CLOCK_EVENTS)
        while clock.end <= second:
            clock.append(clock_text(clock.end))
        await trio.sleep(1 - time.time() % 1)


class Room(EventLog):
    """What is said in the room. Its ids carry a token of this start of the server.

    Without it, event 7 of yesterday's room would pass for event 7 of today's.
    """

    def __init__(self, on_news: Callable[[EventLog], None]) -> None:
        name = f"room-{secrets.token_hex(4)}"
        super().__init__(name, ROOM_EVENTS, ROOM_BYTES, on_news)
        self.here = self.members = 0  # in this process; in all of them

    def history(self) -> int:
        """The place from which the last ROOM_HISTORY messages follow."""
        place, wanted = self.end, ROOM_HISTORY
        while place > self.start and wanted:
            place -= 1
            wanted -= self[place].type == "message"
        return place

    async def publish(self, type: str, name: str, data: str = "") -> None:
        """Let everybody know; with Redis, in every process (Shared.publish)."""
        self.members = self.here
        about = {} if type == "message" else {"members": self.members}
        if not self.closed:
            self.append(data, type, name=name, at=now_ms(), **about)

    async def enter(self, name: str, change: int) -> None:
        """A member more, or less. The room works without, should that not be told.

        Shielded, for who leaves because all is being cancelled is to be told of, too.
        """
        self.here += change
        with contextlib.suppress(Problem), trio.move_on_after(1, shield=True):
            await self.publish("joined" if change > 0 else "left", name)


def now_ms() -> int:
    """Milliseconds, as JavaScript counts them."""
    return int(time.time() * 1000)


def upstream_problem(message: str, status: int = 502, **more: Any) -> Problem:
    return Problem(status, message, "upstream_error", **more)


# Raised more than once, each time without the traceback (and its frames) of the last.
STOPPED = Problem(409, "this answer was stopped", "stopped")
ABANDONED = Problem(409, "nobody was reading, so this answer was stopped", "stopped")
STOPPING = Problem(
    503,
    "the server is stopping: ask again",
    "server_stopping",
    headers={"retry-after": "5"},
)


UNKNOWN_ANSWER = Problem(404, "there is no such answer, or no longer", code="not_found")


class Answer(EventLog):
    """An answer under way, or ended less than ANSWER_KEPT seconds ago.

    Its name is unguessable (128 bits): who knows it may read it and stop it.

    `scope` is around its writer, and all that can stop it is done with that: Stop
    cancels it, and the linger time is its deadline, so there is no timer to be kept.
    """

    def __init__(self, table: Answers, seed: bool, short: bool) -> None:
        super().__init__(secrets.token_hex(16), on_news=table.on_news)
        self.table = table
        self.seed = seed  # in the format of the chat page, else in OpenAI's
        self.short = short  # asked for as one body, not as a stream
        self.scope = trio.CancelScope()
        self.verdict = ABANDONED  # why, should the scope be cancelled: by its deadline
        self.attending = 0  # requests here,
        self.remote: set[str] = set()  # and processes where there are some
        self.mirrored = 0  # events that Redis has
        self.begun = trio.current_time()
        self.head = trio.Event()  # the upstream has accepted, or the answer has ended
        self.ended = trio.Event()
        self.problem: Problem | None = None
        self.refused = False  # the problem came before the head: it has a status

    @contextlib.contextmanager
    def attended(self) -> Iterator[None]:
        """While somebody listens. When the last one leaves, the linger time begins."""
        self.attending += 1
        self.scope.deadline = inf
        try:
            yield
        finally:
            self.attending -= 1
            self._linger()

    def attend(self, process: str) -> None:
        self.remote.add(process)
        self.scope.deadline = inf

    def leave(self, process: str) -> None:
        self.remote.discard(process)
        self._linger()

    def _linger(self) -> None:
        if not self.attending and not self.remote:
            self.scope.deadline = trio.current_time() + self.table.settings.linger

    async def started(self) -> None:
        """Until the first reader can be answered: with a status, or all that is said.

        A stream starts after HEAD_WAIT in any case: a model that thinks for long must
        not be cut by a proxy's idle limit.
        """
        with trio.move_on_after(inf if self.short else HEAD_WAIT):
            await (self.ended if self.short else self.head).wait()

    def skip_to(self, n: int) -> None:
        """Only a Replica ever does; append() keeps the same account."""
        self.table.held -= self.size
        super().skip_to(n)

    def write(self, raw: str) -> None:
        """A chunk as the model sent it. Raises Problem if it is none, or an error."""
        try:
            chunk = from_json(raw)
        except ValueError:
            raise upstream_problem(
                "the upstream sent a chunk that is not JSON"
            ) from None
        if not isinstance(chunk, dict):
            raise upstream_problem("the upstream sent a chunk that is no JSON object")
        if chunk.get("error"):
            raise passed_on(502, chunk)
        self.write_chunk(raw, chunk)

    def write_chunk(self, raw: str, chunk: Message) -> None:
        """Its text for the chat page, else as it came: with fields nobody knows yet."""
        if self.size + len(raw) > ANSWER_BYTES or not self.table.has_room(len(raw)):
            raise upstream_problem("the answer is too large to keep", code="too_large")
        if not len(self):
            self.table.metrics.first_token(trio.current_time() - self.begun)
        if not self.seed:
            self.append(raw)
        elif text := content_of(chunk):
            self.append(to_json({"content": text}))

    def append(self, data: str, type: str = "message", **about: Any) -> Event:
        before = self.size
        event = super().append(data, type, **about)
        self.table.held += self.size - before
        return event

    def stop(self, verdict: Problem) -> None:
        self.verdict = verdict
        self.scope.cancel()

    def finish(self, problem: Problem | None = None) -> None:
        """The end, in exactly one of three ways; whatever is said later is ignored.

        So it may be called by whoever sees an end first, and by run() in any case.
        """
        if self.closed:
            return
        if problem is None:
            self.append("[DONE]")
        else:
            self.append(self.error_text(problem), "error")
        self.table.metrics.count(
            "answers_total", ending=problem.type if problem else "done"
        )
        self.problem = problem
        self.refused = problem is not None and not self.head.is_set()
        self.close()
        self.head.set()
        self.ended.set()

    def error_text(self, problem: Problem) -> str:
        error = {"error": {**problem.error, "type": problem.type}}
        return to_json({"content": "", **error} if self.seed else error)

    def completion(self) -> str:
        """The whole answer as one body, as it came or put together from its chunks."""
        chunks = [
            from_json(event.data) for event in self.events(self.start, self.end - 1)
        ]
        if len(chunks) == 1 and chunks[0].get("object") != "chat.completion.chunk":
            return self[self.start].data
        try:
            return to_json(join_chunks(chunks))
        except (TypeError, AttributeError, ValueError, LookupError):
            odd = "the upstream sent chunks that do not fit together"
            raise upstream_problem(odd) from None


def content_of(chunk: Mapping[str, Any]) -> str:
    """The text in a chunk, whatever else it is; "" if there is none."""
    try:
        text = chunk["choices"][0]["delta"]["content"]
    except (KeyError, IndexError, TypeError):
        return ""
    return text if isinstance(text, str) else ""


def join_chunks(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """One chat.completion out of its chunks; fields that we do not know are kept.

    A null says "nothing new here": it never replaces what an earlier chunk said.
    """
    whole: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        whole |= {key: value for key, value in chunk.items() if value is not None}
        for choice in chunk.get("choices") or []:
            number = choice.get("index", 0)
            kept = choices.setdefault(number, {"index": number, "message": {}})
            join_delta(kept["message"], choice.get("delta") or {})
            rest = {k: v for k, v in choice.items() if k not in ("delta", "index")}
            kept |= {k: v for k, v in rest.items() if v is not None or k not in kept}
    whole["object"] = "chat.completion"
    whole["choices"] = [choices[number] for number in sorted(choices)]
    return whole


def join_delta(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    """Text is continued, lists go by their items' index, all else is replaced."""
    for key, value in delta.items():
        old = message.get(key)
        if isinstance(old, str) and isinstance(value, str):
            # These are repeated, or come whole: put together they would be nonsense.
            once = key in ("role", "id", "type", "name", "object")
            message[key] = value if once else old + value
        elif isinstance(old, dict) and isinstance(value, dict):
            join_delta(old, value)
        elif isinstance(value, list) and all(isinstance(i, dict) for i in value):
            items = {item.get("index", n): item for n, item in enumerate(old or [])}
            for n, item in enumerate(value):
                join_delta(items.setdefault(item.get("index", n), {}), item)
            message[key] = [items[n] for n in sorted(items)]
        elif value is not None or key not in message:
            message[key] = value


class Metrics:
    """Counters, as text for Prometheus (its exposition format, version 0.0.4).

    A reader counts for itself, on the fast path without a lookup, and is added when it
    ends; text() is given those that are still here as `live`.
    """

    FIRST_TOKEN = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def count(self, name: str, n: float = 1, **labels: object) -> None:
        inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
        self.counts[f"chatstream_{name}" + (f"{{{inside}}}" if inside else "")] += n  # type: ignore[assignment]

    def count_reader(self, reader: Reader) -> None:
        self.count("events_delivered_total", reader.delivered)
        self.count("gaps_total", reader.gaps)
        if reader.problem:
            self.count("readers_dropped_total", cause=reader.problem)

    def first_token(self, seconds: float) -> None:
        for bound in (*self.FIRST_TOKEN, "+Inf"):
            within = bound == "+Inf" or seconds <= float(bound)
            self.count("first_token_seconds_bucket", int(within), le=bound)
        self.count("first_token_seconds_sum", seconds)
        self.count("first_token_seconds_count")

    def text(self, now: Mapping[str, float], live: Metrics) -> str:
        lines = [f"# TYPE {name} gauge\n{name} {value}" for name, value in now.items()]
        typed = set()
        counts = Counter(self.counts)
        counts.update(live.counts)  # `+` would leave out what is 0
        # By name only: the format wants a histogram's buckets as they were counted.
        for sample in sorted(counts, key=lambda sample: sample.partition("{")[0]):
            name, value = sample.partition("{")[0], counts[sample]
            family = re.sub("_(bucket|sum|count)$", "", name)
            if family not in typed:
                kind = "counter" if name == family else "histogram"
                lines.append(f"# TYPE {family} {kind}")
                typed.add(family)
            lines.append(f"{sample} {value}")
        return "\n".join(lines) + "\n"


class Model(Protocol):
    """Whoever writes answers: a real one behind an upstream, or the demo."""

    async def run(self) -> None: ...

    async def write(
        self, answer: Answer, body: Message, authorization: str
    ) -> None: ...
    async def models(self, authorization: str) -> str: ...


class Answers:
    """All answers: who may start one, who writes it, when it is forgotten.

    `held` is the size of all of them, kept up by each that grows or is forgotten: to
    add them up for each token would cost more than the token.
    """

    def __init__(
        self, settings: Settings, model: Model, on_news: Callable[[EventLog], None]
    ) -> None:
        self.settings = settings
        self.model = model
        self.on_news = on_news
        self.by_id: dict[str, Answer] = {}
        self.running = self.held = 0
        self.metrics = Metrics()

    def begin(
        self, nursery: trio.Nursery, seed: bool, body: Message, authorization: str
    ) -> Answer:
        """Start an answer. Raises Problem 503 when there are too many of them."""
        if self.running >= ANSWERS_RUNNING or not self.has_room(1):
            busy = "too many answers are under way: try again in a moment"
            raise Problem(503, busy, "server_busy", headers={"retry-after": "5"})
        answer = Answer(self, seed, not body.get("stream"))
        self.by_id[answer.name] = answer
        self.running += 1
        nursery.start_soon(self.run, answer, body, authorization)
        return answer

    def has_room(self, size: int) -> bool:
        """Forget ended answers, the oldest first, until so much more can be held."""
        while self.held + size > ANSWERS_BYTES:
            ended = next((a for a in self.by_id.values() if a.closed), None)
            if ended is None:
                return False
            self.forget(ended)
        return True

    def forget(self, answer: Answer) -> None:
        if self.by_id.pop(answer.name, None):
            self.held -= answer.size

    async def run(self, answer: Answer, body: Message, authorization: str) -> None:
        """The writer of one answer, from its first word to its being forgotten.

        The task of an ended answer is its own timer: it sleeps, then it forgets it.
        """
        problem: Problem | None = STOPPING  # if the server ends while we write
        try:
            with answer.scope:
                await self.model.write(answer, body, authorization)
                problem = None
            if answer.scope.cancelled_caught:
                problem = answer.verdict
        except Problem as failure:
            problem = failure
        except Exception:
            logger.exception("an answer failed in a way that nobody thought of")
            problem = upstream_problem("the answer failed inside the server", 500)
        finally:
            answer.finish(problem)
            self.running -= 1
        if not answer.refused:
            await trio.sleep(ANSWER_KEPT)
        self.forget(answer)


# ─── The upstream, and the demo in its place ─────────────────────────────────────────
# What the upstream sends is read by the standard's rules and passed on as it came. It
# has said everything only when it has said [DONE]: whatever ends before is a cut.


def passed_on(status: int, said: Any, **headers: str) -> Problem:
    """The upstream's own words about what went wrong."""
    error = said.get("error") if isinstance(said, dict) else None
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict):
        error = {"message": f"the upstream answered {status}"}
    problem = upstream_problem("the upstream failed", status, headers=headers)
    problem.error |= error
    return problem


class Upstream:
    """An OpenAI-compatible server, reached by httpx2."""

    def __init__(self, settings: Settings) -> None:
        self.base = settings.upstream
        self.intake = Intake()
        self.model = settings.model
        self.api_key = settings.api_key

    @functools.cached_property
    def client(self) -> httpx2.AsyncClient:
        """One for all answers. No pool limit that makes one wait; no cookie is kept.

        A cookie jar would send what one client's answer set along with the next one's.
        The pool is set from outside, because httpx2's transport takes no network
        backend. It is mounted, because a client that is given a `transport` no longer
        looks for HTTP_PROXY and HTTPS_PROXY. (It replaces ALL_PROXY, though.)
        """
        import httpcore2  # loaded with the first question to an upstream, not at start
        import httpx2

        no_cookie = http.cookiejar.DefaultCookiePolicy(allowed_domains=[])
        transport = httpx2.AsyncHTTPTransport()
        transport._pool = httpcore2.AsyncConnectionPool(
            ssl_context=httpx2.create_ssl_context(),
            max_connections=None,
            max_keepalive_connections=100,
            # Before the upstream's own limit, often 5 s: a question that meets its
            # goodbye cannot be asked again, for it may have been heard.
            keepalive_expiry=3,
            network_backend=cast(Any, HeadBackend(httpcore2.TrioBackend())),
        )
        return httpx2.AsyncClient(
            timeout=httpx2.Timeout(None, connect=CONNECT_TIMEOUT),
            limits=httpx2.Limits(max_connections=None),  # also by way of a proxy
            cookies=http.cookiejar.CookieJar(no_cookie),
            mounts={"all://": transport},
        )

    async def run(self) -> None:
        await self.intake.run()

    async def write(self, answer: Answer, body: Message, authorization: str) -> None:
        """Ask, and pass on what comes. Raises Problem, also when it comes too late.

        `limit` is one deadline for all of it, which pass_on() moves with each token.
        """
        try:
            with trio.fail_after(FIRST_TOKEN_TIMEOUT) as limit:
                if not body.get("model"):
                    body["model"] = self.model or await self.first_model(authorization)
                await self.ask(
                    "POST", "/chat/completions", authorization, body,
                    functools.partial(self.pass_on, answer, limit),
                )  # fmt: skip
        except trio.TooSlowError:
            late = "the upstream took too long to say anything"
            raise upstream_problem(late, 504, code="timeout") from None

    async def models(self, authorization: str) -> str:
        """The upstream's list of models, as it came."""
        read: list[bytes] = []

        async def keep(response: httpx2.Response) -> None:
            read.append(await read_at_most(response, MiB))

        with trio.move_on_after(HEAD_WAIT):
            await self.ask("GET", "/models", authorization, None, keep)
            return read[0].decode(errors="replace")
        raise upstream_problem("the upstream took too long", 504, code="timeout")

    async def first_model(self, authorization: str) -> str:
        """The model to ask, where nobody named one."""
        try:
            return str(from_json(await self.models(authorization))["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            name_one = "the upstream lists no model: name one with --model"
            raise upstream_problem(name_one) from None

    async def ask(
        self,
        method: str,
        path: str,
        authorization: str,
        body: Message | None,
        then: Callable[[httpx2.Response], Awaitable[None]],
    ) -> None:
        """Send a request; hand over its response if it is a 200.

        Raises Problem. Whatever its words are, there is no key among them.
        """
        try:
            await self.exchange(method, path, authorization, body, then)
        except Problem as problem:
            text = to_json(problem.error)
            for secret in (self.api_key, authorization.partition(" ")[2]):
                text = text.replace(secret, "[key]") if secret else text
            problem.error = from_json(text)
            raise

    async def exchange(
        self,
        method: str,
        path: str,
        authorization: str,
        body: Message | None,
        then: Callable[[httpx2.Response], Awaitable[None]],
    ) -> None:
        """The same, with httpx2's exceptions as Problems."""
        import httpx2

        try:
            response = await self.connect(method, path, authorization, body)
            try:
                if response.status_code != 200:
                    raise await self.refusal(response)
                await then(response)
            finally:
                # Also when we are cancelled, and then above all: that this connection
                # is closed is what tells the model to stop.
                with trio.move_on_after(1, shield=True):
                    await response.aclose()
        except httpx2.TimeoutException:
            late = "the upstream could not be reached in time"
            raise upstream_problem(late, 504, code="timeout") from None
        except httpx2.ConnectError as error:
            unreached = f"the upstream cannot be reached: {in_words(error)}"
            raise upstream_problem(unreached) from None
        except httpx2.HTTPError as error:
            broke = f"the connection to the upstream broke: {in_words(error)}"
            raise upstream_problem(broke, code="connection_cut") from None

    async def connect(
        self, method: str, path: str, authorization: str, body: Message | None
    ) -> httpx2.Response:
        """Tried again only when there was no connection: nothing can have been sent."""
        import httpx2

        if self.api_key:
            authorization = f"Bearer {self.api_key}"
        headers = {
            b"accept-encoding": b"identity",  # nothing between us and the next token
            b"content-type": b"application/json",
            b"user-agent": b"chatstream",
        }
        if authorization:
            headers[b"authorization"] = authorization.encode("latin-1")
        url = self.base + path
        content = None if body is None else to_json(body).encode()
        request = self.client.build_request(
            method, url, content=content, headers=headers
        )
        for again in reversed(range(CONNECT_TRIES)):
            try:
                return await self.client.send(request, stream=True)
            except httpx2.ConnectError:
                if not again:
                    raise
                await trio.sleep(0.2)
        raise AssertionError("unreachable")

    async def refusal(self, response: httpx2.Response) -> Problem:
        """The upstream's status is the client's, if it says no and says it clearly."""
        status = response.status_code if 400 <= response.status_code < 600 else 502
        kept = {k: v for k, v in response.headers.items() if k in PASSED_HEADERS}
        import httpx2

        try:
            said = from_json(await read_at_most(response, 64 * KiB))
        except (ValueError, Problem, httpx2.HTTPError):
            said = None
        if 300 <= response.status_code < 400:
            said = {"error": "the upstream redirects, and the key goes nowhere else"}
        return passed_on(status, said, **kept)

    async def pass_on(
        self, answer: Answer, limit: trio.CancelScope, response: httpx2.Response
    ) -> None:
        """Everything that a willing upstream says, into the answer."""
        kind = (
            response.headers.get("content-type", "").partition(";")[0].strip().lower()
        )
        # What was not asked for as a stream need not come as one.
        if kind == "application/json" and answer.short:
            whole = await read_at_most(response, ANSWER_BYTES)
            return answer.write(whole.decode(errors="replace"))
        if kind != "text/event-stream":
            raise upstream_problem(f"the upstream sent {kind!r}, not an event stream")
        answer.head.set()
        parser = SSEParser(EVENT_BYTES)

        def take(data: bytes) -> None:
            for event in parser.feed(data):
                late = trio.current_time() + NEXT_TOKEN_TIMEOUT
                if abs(late - limit.deadline) > 1:  # to move it costs a little
                    limit.deadline = late
                if event.data == "[DONE]":
                    # Then read to the end, to keep the connection for the next one;
                    # should that come too late, the answer is none the worse for it.
                    answer.finish()
                    limit.deadline = trio.current_time() + 1
                elif event.data.strip() and not answer.closed:
                    answer.write(event.data)

        try:
            await UpstreamBody(response, take).read(self.intake)
        except ValueError as error:
            raise upstream_problem(f"the upstream sent {error}") from None
        if not answer.closed:
            raise upstream_problem("the upstream stopped in mid-answer", code="cut")


PASSED_HEADERS = ("retry-after", "retry-after-ms", "x-request-id")


def in_words(error: BaseException) -> str:
    """What an exception says, or else what it came from: those of TLS are mute."""
    inner = error
    while not str(inner) and (came_from := inner.__cause__ or inner.__context__):
        inner = came_from
    return str(inner) or type(error).__name__


class HeadBackend:
    """httpcore's way to the network, with an eye on where a response's head ends."""

    def __init__(self, backend: httpcore2.AsyncNetworkBackend) -> None:
        self.backend = backend

    async def connect_tcp(self, *args: Any, **kwargs: Any) -> HeadStream:
        return HeadStream(await self.backend.connect_tcp(*args, **kwargs))


class HeadStream:
    """A connection that gives httpcore the head of a response, and no byte more.

    httpx2's layers cost more than all the rest of a token's way. So they connect, ask
    and read the head, and the body of a stream is read by UpstreamBody, without them.

    What came with the head waits in `rest`. `ours` says that httpcore has not asked for
    what follows: only then may it be read behind its back. Once it reads on by itself,
    a body of another kind or what follows a 1xx, all goes through as it comes.
    """

    def __init__(self, stream: httpcore2.AsyncNetworkStream) -> None:
        self.stream = stream
        self.head: bytes | None = b""  # as far as it has come; None: leave it alone
        self.rest = b""
        self.ours = False

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self.ours:
            self.ours, self.head = False, None
        if self.rest:
            data, self.rest = self.rest, b""
            return data
        data = await self.stream.read(max_bytes, timeout)
        if self.head is None:
            return data
        self.head += data
        if (end := self.head.find(b"\r\n\r\n") + 4) >= 4:
            self.rest, self.ours = self.head[end:], True
            data = data[: len(data) - len(self.rest)]
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.head, self.ours = b"", False
        await self.stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self.stream.aclose()

    async def start_tls(self, *args: Any, **kwargs: Any) -> HeadStream:
        return HeadStream(await self.stream.start_tls(*args, **kwargs))

    def get_extra_info(self, info: str) -> Any:
        return self.stream.get_extra_info(info)


class Intake:
    """The pump's counterpart: one task reads from all upstreams that have news.

    To wake a task a token costs more than the token. After a pass it rests for a
    moment, so that the next one finds several of them: a delay of INTAKE_REST at most,
    which nobody sees in a text that is being written.

    Linux's selector (epoll) is itself a file that can be waited for: so Trio waits for
    this one only, and not for each upstream's.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    async def run(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._selector.fileno())
            started = time.perf_counter()
            for key, _ in self._selector.select(0):
                if time.perf_counter() - started > TURN:
                    await trio.lowlevel.checkpoint()
                    started = time.perf_counter()
                if self._selector.get_map().get(key.fd) is key:  # still
                    key.data()
            await trio.sleep(INTAKE_REST)

    @contextlib.contextmanager
    def reading(self, fd: int, read: Callable[[], None]) -> Iterator[None]:
        """Call `read` whenever this socket has something."""
        self._selector.register(fd, selectors.EVENT_READ, read)
        try:
            yield
        finally:
            self._selector.unregister(fd)


class UpstreamBody:
    """The body of an upstream's response, read with as little as possible between.

    Three ways, one meaning. A chunked body on plain TCP: the intake calls read_now().
    The same in TLS: receive(), because bytes that TLS has already taken from the socket
    wake no selector. Any other body: httpcore reads it, slower.
    """

    def __init__(
        self, response: httpx2.Response, take: Callable[[bytes], None]
    ) -> None:
        import httpcore2

        self.broken = (OSError, httpcore2.NetworkError)
        self.response = response
        self.take = take
        self.chunks = ChunkDecoder()
        self.failed: Exception | None = None
        self.ended = trio.Event()

    async def read(self, intake: Intake) -> None:
        """To its end. Raises Problem on a cut, and whatever `take` raises."""
        stream = self.response.extensions.get("network_stream")
        coding = self.response.headers.get("transfer-encoding", "").lower()
        if not isinstance(stream, HeadStream) or not stream.ours or coding != "chunked":
            async for data in self.response.aiter_raw():
                self.take(data)
            return
        early, stream.rest = stream.rest, b""
        self.feed(early or None)  # None: nothing came with the head
        if stream.get_extra_info("ssl_object"):
            while not self.ended.is_set():
                await self.receive(stream.stream)
        elif not self.ended.is_set():
            self.fd = stream.get_extra_info("socket").fileno()
            with intake.reading(self.fd, self.read_now):
                await self.ended.wait()
        if self.failed:
            raise self.failed
        # h11 has seen no body, and a connection whose response has not ended is not
        # used again. So it is given an empty one; after trailers or more, rather not.
        if self.chunks.rest == b"\r\n":
            stream.rest = b"0\r\n\r\n"
            async for _ in self.response.aiter_raw():
                pass

    async def receive(self, stream: httpcore2.AsyncNetworkStream) -> None:
        """Some more, of TLS."""
        try:
            self.feed(await stream.read(64 * KiB))
        except self.broken as error:
            self.fail(cut_short(str(error)))

    def read_now(self) -> None:
        """Some more. Raises nothing: the intake that calls it reads for everyone."""
        try:
            self.feed(os.read(self.fd, 64 * KiB))
        except BlockingIOError:
            pass
        except OSError as error:
            self.fail(cut_short(str(error)))

    def feed(self, data: bytes | None) -> None:
        """What has come: b"" is the end of the connection, None is nothing at all."""
        if self.ended.is_set():  # what comes after a failure makes nothing good
            return
        if data == b"":
            return self.fail(cut_short("it was closed in mid-answer"))
        try:
            payload = self.chunks.feed(data or b"")
            while payload:
                self.take(payload)
                payload = self.chunks.feed(b"")
        except Exception as error:  # whatever it is, it is this answer's alone
            return self.fail(error)
        if self.chunks.done:
            self.ended.set()

    def fail(self, error: Exception) -> None:
        self.failed = error
        self.ended.set()


def cut_short(how: str) -> Problem:
    message = f"the connection to the upstream broke: {how}"
    return upstream_problem(message, code="connection_cut")


class ChunkDecoder:
    """The chunked transfer coding, the other way round (RFC 9112, section 7.1).

    A place in a buffer that moves on: to cut off what is read, chunk by chunk, would
    copy the rest as often. Trailers are left unread.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._at = 0  # where the next byte to be looked at is
        self._left = 0  # of a chunk's data
        self._line_end = False  # the CR LF behind it is still to come
        self.done = False

    @property
    def rest(self) -> bytes:
        return self._buffer[self._at :]

    def feed(self, data: bytes) -> bytes:
        """What the next chunk, or part of one, carries; feed(b"") until that is b"".

        Raises ValueError if these are no chunks, after all that came before: one piece
        at a time, so that the good tokens before a bad chunk still reach the reader.
        """
        if data:
            self._buffer, self._at = self.rest + data, 0
        while not self.done:
            if self._left:
                piece = self._buffer[self._at : self._at + self._left]
                self._at += len(piece)
                self._left -= len(piece)
                return piece
            if not self._next_chunk():
                break
        return b""

    def _next_chunk(self) -> bool:
        """The line end behind a chunk, and the next one's size; False if cut short."""
        if self._line_end:
            if len(self._buffer) < self._at + 2:
                return False
            if self._buffer[self._at : self._at + 2] != b"\r\n":
                raise ValueError("a chunk that does not end where it should")
            self._at, self._line_end = self._at + 2, False
        end = self._buffer.find(b"\r\n", self._at)
        size = self._buffer[self._at : end if end >= 0 else None].partition(b";")[0]
        if len(self._buffer) - self._at > KiB and not 0 <= end - self._at < KiB:
            raise ValueError("a chunk without its size")
        if end < 0:
            return False
        if not re.fullmatch(b"[0-9A-Fa-f]{1,8}", size.strip(b" \t")):
            raise ValueError("a chunk without its size")
        self._left, self._at = int(size, 16), end + 2
        self.done, self._line_end = not self._left, bool(self._left)
        return True


async def read_at_most(response: httpx2.Response, limit: int) -> bytes:
    """A whole body. Raises Problem if it is larger than `limit` bytes."""
    body = bytearray()
    async for data in response.aiter_raw():
        body += data
        if len(body) > limit:
            raise upstream_problem(f"the upstream sent more than {limit} bytes")
    return bytes(body)


class Demo:
    """The embedded model: needs no key and no network, and says that it is a demo.

    The same prompt gets the same text, word by word, Chinese character by character.
    """

    PACE = 0.04  # seconds a word

    async def run(self) -> None:
        """It has nothing to do while nobody asks."""

    def text(self, messages: list[Message]) -> str:
        asked = next((m for m in reversed(messages) if m.get("role") == "user"), {})
        content = asked.get("content") or ""
        if isinstance(content, list):
            content = " ".join(str(part.get("text", "")) for part in content)
        text, glue = (DEMO_ZH, "") if re.search("[一-鿿]", content) else (DEMO_EN, " ")
        lessons = [part.strip().replace("\n", glue) for part in text.split("\n\n")]
        first, *others, last = lessons
        lesson = others[zlib.crc32(content.encode(errors="replace")) % len(others)]
        return f"{first}\n\n{lesson}\n\n{last}"

    async def write(self, answer: Answer, body: Message, authorization: str) -> None:
        """Chunks like those of OpenAI's streams, because clients are tried on them."""
        answer.head.set()
        base = {
            "id": f"chatcmpl-{secrets.token_hex(8)}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": "demo",
        }
        words = DEMO_WORD.findall(self.text(body["messages"]))

        def say(delta: Message, finish_reason: str | None = None) -> None:
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
            chunk = {**base, "choices": [choice]}
            answer.write_chunk(to_json(chunk), chunk)

        say({"role": "assistant", "content": ""})
        for word in words:
            await trio.sleep(self.PACE)
            say({"content": word})
        say({}, "stop")
        # In one body always: clients crash where that has no usage.
        if answer.short or (body.get("stream_options") or {}).get("include_usage"):
            asked = len(to_json(body["messages"])) // 4
            usage = {"prompt_tokens": asked, "completion_tokens": len(words)}
            usage["total_tokens"] = asked + len(words)
            chunk = {**base, "choices": [], "usage": usage}
            answer.write_chunk(to_json(chunk), chunk)

    async def models(self, authorization: str) -> str:
        model = {
            "id": "demo",
            "object": "model",
            "created": 0,
            "owned_by": "chatstream",
        }
        return to_json({"object": "list", "data": [model]})


DEMO_WORD = re.compile(r"\s*(?:[\u3000-\uffef]|[^\s\u3000-\uffef]+)")
DEMO_EN = """
This is chatstream's demo model: no key, no network, and no real thought either. But
the way these words reach you is real.

Each word is appended to an event log, and your browser is a position in that log. Pull
the plug for a few seconds: when you are back, you say which event you saw last, and
the log goes on from there. Nothing twice, nothing lost.

A short connection asks and is answered; to know more, it has to ask again. A long
connection stays open, and the server speaks whenever there is something to say.
Server-Sent Events are the simplest kind: one HTTP response that does not end.

SSE goes one way, over plain HTTP, and resumes by itself. WebSocket goes both ways, and
leaves resuming to you. For an answer that streams, SSE is enough; for a room where
everybody talks, take the WebSocket.

If you close this page now, the server waits a few seconds for you to come back, and
then stops the model: nobody pays for words that nobody reads. Press Stop, and it stops
at once.

To hear a real model, start the server with OPENAI_BASE_URL, OPENAI_API_KEY and
OPENAI_MODEL set, or with --upstream and --model.
"""
DEMO_ZH = """
这里是 chatstream 的演示模型：不需要密钥，不需要网络，也没有真正的思考。
不过，这些字传到你面前的方式是真的。

每个字都先写进一份事件日志，你的浏览器只是日志里的一个位置。断网几秒再回来，
告诉服务器你最后看到的是哪一条，它就从那里接着讲：不重复，也不丢失。

短连接一问一答，想知道更多就得再问一次。长连接一直开着，服务器有话就说。
SSE（Server-Sent Events）是其中最简单的一种：一个不结束的 HTTP 响应。

SSE 是单向的，走普通的 HTTP，断线会自己续上。WebSocket 是双向的，续传要自己来做。
逐字输出的回答用 SSE 就够了；大家一起说话的聊天室，才需要 WebSocket。

如果你现在关掉页面，服务器会等你几秒钟，然后让模型停下来：没有人读的字，
就不该有人付钱。按下停止，它会马上停。

想听真正的模型说话，请设置 OPENAI_BASE_URL、OPENAI_API_KEY 和 OPENAI_MODEL，
或者用 --upstream 和 --model 启动服务器。
"""


# ─── Requests: what one may ask, and who ─────────────────────────────────────────────
# One check of Host and Origin, one shape of error. What a handler needs of its request
# stands in Request; what it cannot accept it raises as a Problem.

# The pages load nothing from elsewhere, but may talk to any server on loopback, because
# `?server=` in their address names another one than theirs.
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; "
    "style-src 'self'; img-src 'self'; "
    "connect-src 'self' http://localhost:* http://127.0.0.1:* "
    "https://localhost:* https://127.0.0.1:* ws://localhost:* ws://127.0.0.1:* "
    "wss://localhost:* wss://127.0.0.1:*; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
SSE_HEADERS = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx, asked by whom it serves
}
MAY_SEND = "Authorization, Cache-Control, Content-Type, Last-Event-ID"
MAY_READ = "X-Answer-Id, Retry-After"


class Page(NamedTuple):
    body: bytes
    etag: str
    type: str


def read_pages() -> dict[str, Page]:
    """All of www/, read once: no path can ever leave it."""
    here = Path(__file__).parent
    www = next((d for d in (here / "www", here / "chatstream_www") if d.is_dir()), None)
    pages: dict[str, Page] = {}
    for file in sorted(www.rglob("*")) if www else ():
        if file.is_file():
            body, type = file.read_bytes(), mimetypes.guess_type(file.name)[0]
            etag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
            charset = "; charset=utf-8" if (type or "").startswith("text/") else ""
            page = Page(body, etag, (type or "application/octet-stream") + charset)
            pages[f"/{file.relative_to(www).as_posix()}"] = page  # type: ignore[arg-type]
    if "/index.html" in pages:
        pages["/"] = pages["/index.html"]
    return pages


class Request:
    """One HTTP request and its response, over ASGI."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.receive = receive
        self.send = send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.http_version: str = scope["http_version"]
        self.wire: Wire | None = scope["extensions"].get("chatstream.wire")
        self.headers = fold_headers(scope["headers"])
        self.query = parse_query(scope["query_string"])
        self.body = bytearray()
        self.extra: dict[str, str] = {}  # headers for the response, such as CORS

    @property
    def last_event_id(self) -> str | None:
        return self.headers.get("last-event-id") or self.query.get("after")

    async def read_body(self) -> None:
        """Read the whole body, if any, so that what follows is the client leaving.

        Every handler relies on that: disconnected() would take a body for patience.
        Raises Problem 413, 408.
        """
        length = self.headers.get("content-length", "")
        announced = int(length) if re.fullmatch("[0-9]{1,20}", length) else 0
        if self.wire and not announced and "transfer-encoding" not in self.headers:
            await self.receive()  # which says so without waiting (RFC 9112, 6.3)
            return
        more = True
        with trio.move_on_after(BODY_TIMEOUT):
            while more:
                if max(len(self.body), announced) > BODY_BYTES:
                    raise Problem(413, "the body is larger than 1 MiB: send less")
                message = await self.receive()
                if message["type"] != "http.request":
                    raise trio.BrokenResourceError("the client left in mid-request")
                self.body += message["body"]
                more = message["more_body"]
        if more:
            raise Problem(408, "the request's body did not arrive in time")

    async def disconnected(self) -> None:
        """Wait until the client has left. No server tells an app by cancelling it."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        raw = [(k.encode(), v.encode("latin-1", "replace"))
               for k, v in {**headers, **self.extra}.items()]  # fmt: skip
        head = {"type": "http.response.start", "status": status, "headers": raw}
        await self.send(head)

    async def write(self, body: bytes, more: bool = False) -> None:
        await self.send({"type": "http.response.body", "body": body, "more_body": more})

    async def respond(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        """A short response, in one piece."""
        headers = dict(headers or {})
        if status not in (204, 304):
            headers["content-length"] = str(len(body))
        await self.start(status, headers)
        await self.write(b"" if self.method == "HEAD" else body)

    async def respond_json(self, body: str, status: int = 200) -> None:
        headers = {"content-type": "application/json", "cache-control": "no-store"}
        await self.respond(status, body.encode() + b"\n", headers)

    def outlet(self) -> tuple[Outlet, Framing]:
        """Where a stream's events go: the connection's own wire, if there is one."""
        if self.wire is None:
            return AsgiOutlet(self.send), SSE
        return self.wire, SSE if self.http_version == "1.0" else SSE_CHUNKED


def fold_headers(pairs: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """By lower-case name; one that is repeated is a list (RFC 9110, section 5.3)."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in pairs:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def parse_query(query: bytes) -> dict[str, str]:
    """`?a=b`, the last of each name. What is no UTF-8 is replaced, never refused."""
    if not query:
        return {}
    try:
        pairs = parse_qs(query.decode("latin-1"), max_num_fields=20, errors="replace")
    except ValueError:
        return {}
    return {name: values[-1] for name, values in pairs.items()}


async def race_disconnect(
    request: Request, wait: Callable[[], Awaitable[object]]
) -> bool:
    """Wait for something (True), but no longer than the client stays (False).

    Two tasks in a nursery, and who is first cancels the other: the one pattern for
    "whichever comes first", and no task is left over.
    """
    stayed = False

    async def watch() -> None:
        await request.disconnected()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await wait()
        stayed = True
        nursery.cancel_scope.cancel()
    return stayed


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or bool(
        re.fullmatch(r"127(\.\d{1,3}){3}", host)
    )


@functools.lru_cache(1000)
def split_host(netloc: str) -> tuple[str, int | None]:
    """`name:port` as a lower-case name without brackets, and the port or None."""
    if not re.fullmatch(r"[\w.:\[\]-]*", netloc):
        return "", None
    try:
        parts = urlsplit(f"//{netloc}")
        return (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return "", None


class Access:
    """Who may ask: Host against DNS rebinding, Origin against other people's pages."""

    def __init__(self, settings: Settings, ports: set[int]) -> None:
        self.settings = settings
        self.ports = ports
        origins = [urlsplit(origin).netloc for origin in settings.allow_origin]
        self.hosts = {split_host(netloc)[0] for netloc in origins if netloc}

    def check_host(self, headers: Mapping[str, str]) -> None:
        """On loopback only loopback names: any page can point its own name at us."""
        host = split_host(headers.get("host", "localhost"))[0]
        if is_loopback(self.settings.host.strip("[]")) and not (
            is_loopback(host) or host in self.hosts
        ):
            foreign = f"this server is not {host!r}: ask for localhost, or start it"
            raise Problem(421, f"{foreign} with --allow-origin for that name")

    def check_origin(self, headers: Mapping[str, str]) -> None:
        origin = headers.get("origin")
        if origin is None or origin in self.settings.allow_origin:
            return
        if origin == "null" and not self.settings.upstream:
            return  # a page from disk may play with the demo
        if origin != "null" and self._own(
            urlsplit_netloc(origin), headers.get("host", "")
        ):
            return
        foreign = f"a page of origin {origin!r} may not do this: to allow it, start"
        raise Problem(403, f"{foreign} the server with --allow-origin {origin}")

    def _own(self, netloc: str, host_header: str) -> bool:
        """Is this origin the server itself, on either of its ports?

        The scheme is not compared: behind a proxy we do not know our own.
        """
        if netloc and netloc == host_header:
            return True
        (name, port), (host, _) = split_host(netloc), split_host(host_header)
        same = name == host or (is_loopback(name) and is_loopback(host))
        return bool(name) and same and port in self.ports


def urlsplit_netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def check_messages(body: Any) -> Message:
    """The part of a chat request that we rely on. Raises Problem 400.

    All else is the upstream's to judge, and passed on: it may be newer than we are.
    """
    if not isinstance(body, dict):
        raise Problem(400, 'send a JSON object: {"messages": [{"role", "content"}]}')
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        wanted = "messages must be a list of at least one {role, content}"
        raise Problem(400, wanted, param="messages")
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Problem(400, "each message needs a role", param=f"messages[{n}]")
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        mute = content is None and message["role"] == "assistant"  # it calls a tool
        good = mute or isinstance(content, str | list)
        if not good or not all(isinstance(part, dict) for part in parts):
            wanted = "content must be text, or a list of parts"
            raise Problem(400, wanted, param=f"messages[{n}].content")
    for name, kinds in (("stream", bool), ("stream_options", dict), ("model", str)):
        if body.get(name) is not None and not isinstance(body[name], kinds):
            raise Problem(400, f"{name} has the wrong type", param=name)
    return body


# ─── Members: readers that also speak ────────────────────────────────────────────────
# trio-websocket shakes hands. The frames are ours in both directions: the pump writes
# them, and the reader's one task listens. (With trio-websocket's tasks and channels an
# idle member took three times the memory.)

SUBPROTOCOL = "chatstream.v1"
PING_FRAME = frame_ws(b"", PING)
HANDSHAKE_HEADERS = (
    "host", "connection", "upgrade", "sec-websocket-version", "sec-websocket-key",
    "sec-websocket-protocol",
)  # fmt: skip


def check_handshake(request: h11.Request, headers: Mapping[str, str]) -> None:
    """Refuse what trio-websocket would fail on (RFC 6455, section 4.2.1)."""
    if request.method != b"GET" or request.http_version != b"1.1":
        raise Problem(400, "a WebSocket handshake is a GET over HTTP/1.1")
    if headers.get("upgrade", "").lower() != "websocket":
        raise Problem(400, "a WebSocket handshake has one Upgrade: websocket")
    if "upgrade" not in re.split(r"\s*,\s*", headers.get("connection", "").lower()):
        raise Problem(400, "a WebSocket handshake needs Connection: Upgrade")
    if headers.get("sec-websocket-version") != "13":
        need = {"sec-websocket-version": "13", "upgrade": "websocket"}
        raise Problem(426, "this server speaks WebSocket version 13", headers=need)
    if not re.fullmatch("[A-Za-z0-9+/]{22}==", headers.get("sec-websocket-key", "")):
        raise Problem(400, "Sec-WebSocket-Key must be 16 bytes in base64")
    for name in (
        "connection",
        "host",
        "sec-websocket-extensions",
        "sec-websocket-protocol",
    ):
        if not headers.get(name, "").isascii():
            raise Problem(400, f"the header {name} must be ASCII")
    try:
        headers.get("host", "").encode().decode("idna")
    except UnicodeError:
        raise Problem(400, "the header host is no host name") from None


def clean_name(name: str) -> str:
    """A name to be shown: printable, at most 32 characters; a guest has a number."""
    name = "".join(c for c in name if c.isprintable()).strip()[:32]
    return name or f"guest-{random.randint(1000, 9999)}"


class Lent(trio.abc.Stream):
    """A wire as trio-websocket gets it: to shake hands, not to read on or hang up.

    Its own task goes on reading behind the handshake, and closes the stream when it
    does not like what it reads. From there on both are ours.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.wire.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.wire.flush()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self.wire.unread:
            return await self.wire.receive_some(max_bytes)
        return await trio.sleep_forever()

    async def aclose(self) -> None:
        pass


async def shake_hands(wire: Wire, may_v1: bool) -> bool:
    """Accept the WebSocket (RFC 6455, section 4.2.2). Does it speak our subprotocol?"""
    async with trio.open_nursery() as nursery:
        offer = await trio_websocket.wrap_server_stream(nursery, Lent(wire))
        v1 = may_v1 and SUBPROTOCOL in offer.proposed_subprotocols
        await offer.accept(subprotocol=SUBPROTOCOL if v1 else None)
        nursery.cancel_scope.cancel()
    return v1


class Member(Reader):
    """A reader on a WebSocket; in the room it also speaks.

    One task, as for any reader: while it waits to be allowed to say more, or for room
    on its wire, it does not read, and TCP lets the client feel that.
    """

    __slots__ = (
        "chatter",
        "code",
        "frames",
        "name",
        "owed",
        "pinged_at",
        "pings",
        "reason",
        "said",
        "turn",
        "wire",
    )  # fmt: skip

    def __init__(
        self, wire: Wire, log: EventLog, framing: Framing, start: int, name: str
    ) -> None:
        super().__init__(log, wire, framing, start)
        self.wire = wire
        self.name = name
        self.frames = FrameParser()
        self.said: str | bytes | None = None  # the message that waits for its turn
        self.owed = b""  # pongs and errors, to be sent before we listen on
        self.chatter = 0  # bytes since the last message
        self.turn = 0.0
        self.pings = 0
        self.pinged_at = self.quiet_since
        self.code, self.reason = 1006, ""

    def keep_alive(self, now: float) -> None:
        """Also ping; and drop a member that was silent since the last ping.

        Any bytes are a sign of life: the pong of one that we read slowly may stand
        behind much that it said before.
        """
        super().keep_alive(now)
        if now - self.pinged_at < PING_EVERY or self.outlet.busy:
            return  # we do not listen while a wire is full: that has its own deadline
        if self.pings and self.wire.listening_since <= self.pinged_at:
            self.drop("it answered no ping")
        else:
            self.pings, self.pinged_at = self.pings + 1, now
            self.write_aside(PING_FRAME)

    async def stay(self, room: Room | None, rate: float) -> str:
        """Until it or we have had enough; the close frame goes out last.

        What was said before it, by anyone, must not be lost. Returns how it ended.
        """
        if room is not None:
            await room.enter(self.name, 1)
        try:
            if await self.run(functools.partial(self.listen, room, rate)):
                self.code, self.reason = 1001, "the server is stopping"
        except Closing as closing:
            self.code, self.reason = closing.code, closing.reason
        finally:
            if room is not None:
                await room.enter(self.name, -1)
        return f"closed {self.code} {self.reason}".rstrip()

    async def listen(self, room: Room | None, rate: float) -> None:
        """Everything it says, into the room, until it leaves. Raises Closing.

        May be called away at every `await`, and again later: what is half done stands
        in `said`, `owed` and `frames`.
        """
        while True:
            if self.owed:
                await self.pay()
            elif self.said is not None:
                await self.throttle(rate)
                said, self.said = self.said, None
                if room is not None:
                    await self.tell(room, said)
            elif frame := self.frames.next():
                self.take(*frame)
            elif data := await self.wire.receive_some():
                self.frames.feed(data)
                self.chatter += len(data)
                if self.chatter > CHATTER_BYTES:
                    raise trio.BrokenResourceError("it chatters, and says nothing")
            else:
                return

    def take(self, opcode: int, payload: str | bytes) -> None:
        if opcode == PING:
            self.owed += frame_ws(cast(bytes, payload), PONG)
        elif opcode == CLOSE:
            raise Closing(*parse_close(cast(bytes, payload)))
        elif opcode != PONG:
            self.said, self.chatter = payload, 0

    async def pay(self) -> None:
        if self.outlet.busy:
            await self.outlet.flush()
        owed, self.owed = self.owed, b""
        self.outlet.write_now(owed)
        if self.outlet.busy:
            await self.outlet.flush()

    async def tell(self, room: Room, said: str | bytes) -> None:
        """One message. Raises Closing if the connection must end because of it."""
        try:
            await room.publish("message", self.name, self.text_of(said))
        except Problem as problem:
            told = to_json({"type": "error", "error": problem.error})
            v1 = self.framing is WS_JSON
            self.owed += frame_ws((told if v1 else f"error: {problem}").encode())

    def text_of(self, said: str | bytes) -> str:
        text: Any = said
        if isinstance(said, bytes):
            raise Closing(1003, "this room is for text")
        if self.framing is WS_JSON:
            try:
                text = from_json(said)["text"]
            except (ValueError, LookupError, TypeError):
                text = None
        if not isinstance(text, str):
            raise Closing(1007, 'send {"text": "..."}')
        if len(text) > MESSAGE_CHARACTERS:
            raise Closing(1009, f"at most {MESSAGE_CHARACTERS} characters, please")
        return text

    async def throttle(self, rate: float) -> None:
        """Go on no faster than `rate` messages a second, after a second's worth.

        Who talks faster fills the socket's buffers, and TCP makes it wait.
        """
        if not rate:
            return await trio.lowlevel.checkpoint()  # let the pump have its turn
        await trio.sleep_until(self.turn - 1)
        self.turn = max(self.turn, trio.current_time()) + 1 / rate

    async def goodbye(self) -> None:
        """What was said last, then the close frame."""
        if self.code == 1006:
            return  # there is nobody to tell
        end = self.log.end
        with trio.move_on_after(LINGER_CLOSE):
            while self.position < end:
                await self.wire.flush()
                self.catch_up(trio.current_time())
            await self.wire.send_all(frame_close(self.code, self.reason))


# ─── The service: logs, readers, and who may be one ──────────────────────────────────
# Every handler is one request: it makes a Reader, runs it, and is gone with it. What
# has to outlive a request is started in the writers' nursery, which is the server's.

Handler = Callable[[Request], Awaitable[None]]


class Service:
    """The logs, their readers over HTTP and over WebSocket, and who may be one."""

    def __init__(
        self,
        settings: Settings,
        ports: set[int] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.settings = settings
        self.access = Access(settings, ports or {settings.port, settings.room_port})
        self.pages = read_pages()
        self.paths: dict[str, dict[str, Handler]] = {
            "/clock": {"GET": self.get_clock},
            "/time": {"GET": self.get_time},
            "/healthz": {"GET": self.get_healthz},
            "/metrics": {"GET": self.get_metrics},
            "/v1/models": {"GET": self.get_models},
            "/v1/chat/completions": {"POST": self.post_completion},
            "/chatgptApi/chatgpt_qa_stream": {"POST": self.post_question},
        }
        self.pump = Pump()
        self.clock = EventLog("clock", CLOCK_EVENTS, on_news=self.pump.notify)
        self.room = Room(self.pump.notify)
        self.model: Model = Upstream(settings) if settings.upstream else Demo()
        self.answers = Answers(settings, self.model, self.pump.notify)
        self.plain = Framing(functools.partial(frame_ws_plain, settings.room_suffix))
        self.tls = tls
        self.shared: Shared | None = None
        self.metrics = self.answers.metrics
        self.wires: dict[Wire, None] = {}
        self.stopping = False
        self.active = 0  # requests and members under way
        self.terminated = trio.Event()
        self.writers: trio.Nursery

    async def run_writers(
        self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """The server's own tasks: all writers, the pump, the keeper of silence."""
        async with trio.open_nursery() as self.writers:
            self.writers.start_soon(tick, self.clock)
            self.writers.start_soon(self.pump.run)
            self.writers.start_soon(self.keep_alive)
            self.writers.start_soon(self.model.run)
            task_status.started()

    async def keep_alive(self) -> None:
        """One task for the silence of all: a timer for each reader would cost more."""
        while True:
            await trio.sleep(1)
            now = trio.current_time()
            for log in [self.clock, self.room, *self.answers.by_id.values()]:
                for reader in list(log.readers):
                    reader.keep_alive(now)

    # ── readers over HTTP ──

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        request = Request(scope, receive, send)
        self.active += 1
        try:
            await self.handle(request)
        except Problem as problem:
            raw, body = problem_response(problem)
            headers = {k.decode(): v.decode("latin-1") for k, v in raw}
            if request.wire and problem.status in (408, 413):
                headers["connection"] = "close"
            await request.respond(problem.status, body, headers)
            if not request.wire and problem.status == 413:
                await self.discard(request)
        finally:
            self.active -= 1

    async def discard(self, request: Request) -> None:
        """HTTP/2: a body that nobody reads would hold up the other streams."""
        with trio.move_on_after(LINGER_CLOSE):
            while (await request.receive()).get("more_body"):
                pass

    async def handle(self, request: Request) -> None:
        """Who asks, may they, and what for: in this order, after the whole body.

        A refusal in the middle of a body would cost the connection, and mostly be lost.
        """
        await request.read_body()
        self.access.check_host(request.headers)
        routes = self.routes(request.path)
        if not routes:
            raise Problem(
                404, f"there is nothing at {request.path!r}", code="not_found"
            )
        protected = (
            bool({"POST", "DELETE"} & routes.keys()) or "/answers/" in request.path
        )
        if not protected:
            request.extra["access-control-allow-origin"] = "*"
            request.extra["timing-allow-origin"] = "*"
        else:
            self.allow_origin(request)
        method = "GET" if request.method == "HEAD" else request.method
        allow = ", ".join([*routes, *(["HEAD"] if "GET" in routes else []), "OPTIONS"])
        if method == "OPTIONS":
            await self.preflight(request, allow)
        elif method not in routes:
            wrong = f"{request.method} does not work here: use {allow}"
            raise Problem(405, wrong, headers={"allow": allow})
        else:
            await routes[method](request)

    def allow_origin(self, request: Request) -> None:
        """Check the origin, and let its page read the response.

        A page from disk may also read that it is refused: it says what to do.
        """
        origin = request.headers.get("origin", "")
        request.extra["vary"] = "Origin"
        request.extra["access-control-expose-headers"] = MAY_READ
        if origin == "null":
            request.extra["access-control-allow-origin"] = origin
        if origin != "null" or request.method != "OPTIONS":
            self.access.check_origin(request.headers)
        if origin:
            request.extra["access-control-allow-origin"] = origin

    def routes(self, path: str) -> Mapping[str, Handler]:
        """What is at this path, by method."""
        if path in self.pages:
            return {"GET": self.get_page}
        if re.fullmatch("/answers/[^/]+", path):
            return {"GET": self.get_answer, "DELETE": self.delete_answer}
        return self.paths.get(path, {})

    async def preflight(self, request: Request, allow: str) -> None:
        wanted = request.headers.get("access-control-request-headers", "")
        headers = {
            "allow": allow,
            "access-control-allow-methods": allow,
            "access-control-allow-headers": f"{MAY_SEND}, {wanted}".rstrip(", "),
            "access-control-max-age": "600",
        }
        await request.respond(204, headers=headers)

    async def get_page(self, request: Request) -> None:
        page = self.pages[request.path]
        headers = {**PAGE_HEADERS, "etag": page.etag}
        known = request.headers.get("if-none-match", "")
        if page.etag in known or known == "*":
            return await request.respond(304, headers=headers)
        await request.respond(200, page.body, {**headers, "content-type": page.type})

    async def get_healthz(self, request: Request) -> None:
        status = {"status": "stopping" if self.stopping else "ok"}
        counts = Counter(self.counts())
        if self.shared:
            counts.update(self.shared.others)
        health = {**status, **counts, "model": self.settings.model_name}
        await request.respond_json(to_json(health), 503 if self.stopping else 200)

    def counts(self) -> dict[str, int]:
        """What goes on in this process."""
        attending = sum(answer.attending for answer in self.answers.by_id.values())
        return {
            "readers": len(self.clock.readers) + attending,
            "answers": self.answers.running,
            "members": self.room.here,
        }

    async def get_metrics(self, request: Request) -> None:
        now = {f"chatstream_{name}": n for name, n in self.counts().items()}
        now["chatstream_connections"] = len(self.wires)
        live = Metrics()
        live.count("sent_bytes_total", sum(wire.sent for wire in self.wires))
        for log in [self.clock, self.room, *self.answers.by_id.values()]:
            for reader in log.readers:
                live.count_reader(reader)
        body = self.metrics.text(now, live).encode()
        await request.respond(200, body, {"content-type": "text/plain; version=0.0.4"})

    async def get_models(self, request: Request) -> None:
        authorization = request.headers.get("authorization", "")
        await request.respond_json(await self.model.models(authorization))

    async def get_time(self, request: Request) -> None:
        """The clock as a short connection: who wants the next tick asks again."""
        now = self.clock[self.clock.end - 1]
        await request.respond_json(to_json({"id": f"clock-{now.n}", "data": now.data}))

    async def get_clock(self, request: Request) -> None:
        place = self.clock.place_after(request.last_event_id)
        start = self.clock.end if place is None else place
        await self.stream(request, self.clock, start)

    async def stream(
        self,
        request: Request,
        log: EventLog,
        start: int,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """A log as an event stream, from a place to its end or the client's."""
        await request.start(200, {**SSE_HEADERS, **(headers or {})})
        if request.method == "HEAD":
            return await request.write(b"")
        # At once, also with no event to send: else neither client nor proxies see that
        # it is open. No blank line yet, on which some clients make an empty event.
        await request.write(b"retry: %d\n" % (SSE_RETRY * 1000), more=True)
        reader = Reader(log, *request.outlet(), start)
        try:
            if not await reader.run(request.disconnected):
                return  # the client has left: there is nobody to end it for
        except trio.TooSlowError:  # a stream of HTTP/2; a wire knows by itself
            reader.problem = STUCK
            raise
        finally:
            self.metrics.count_reader(reader)
        again = random.randint(1000, 5000)  # so that they do not all return at once
        with trio.fail_after(STUCK_TIMEOUT):
            await request.write(b"retry: %d\n" % again if self.stopping else b"")

    async def post_question(self, request: Request) -> None:
        """The chat page's own protocol: {messages} in, {content} events out."""
        await self.post_answer(request, seed=True)

    async def post_completion(self, request: Request) -> None:
        await self.post_answer(request, seed=False)

    async def post_answer(self, request: Request, seed: bool) -> None:
        """A new answer; or, repeated with a Last-Event-ID, the one that was cut.

        Two lifetimes part here: the writer is started in the server's nursery, and this
        request only attends. It waits for the upstream no longer than its client does.
        """
        if last := request.last_event_id:
            return await self.follow_answer(request, last.rpartition("-")[0], last)
        try:
            asked = check_messages(from_json(request.body))
        except ValueError as error:
            raise Problem(400, f"the body is not JSON: {error}") from None
        if self.stopping:
            raise STOPPING.with_traceback(None)
        if seed:
            asked = {"messages": asked["messages"], "stream": True}
        authorization = request.headers.get("authorization", "")
        answer = self.answers.begin(self.writers, seed, asked, authorization)
        with answer.attended():
            if self.shared:
                await self.shared.announce(answer)
            if await race_disconnect(request, answer.started):
                await self.first_reader(request, answer)

    async def first_reader(self, request: Request, answer: Answer) -> None:
        """A stream that has begun is 200, whatever comes: problems are events then."""
        if answer.problem and (answer.refused or answer.short):
            raise answer.problem.with_traceback(None)
        if answer.short:
            request.extra["x-answer-id"] = answer.name
            await request.respond_json(answer.completion())
        else:
            await self.stream(request, answer, 0, {"x-answer-id": answer.name})

    async def get_answer(self, request: Request) -> None:
        name = request.path.removeprefix("/answers/")
        await self.follow_answer(request, name, request.last_event_id)

    async def follow_answer(
        self, request: Request, name: str, last_event_id: str | None
    ) -> None:
        """An answer again, after this event, or from its beginning."""
        answer = await self.find_answer(name)
        with answer.attended():
            if last_event_id and isinstance(answer, Replica):
                await answer.reach(last_event_id)
            start = answer.place_after(last_event_id) if last_event_id else 0
            if start is None:
                wrong = (
                    "this Last-Event-ID is not of this answer: send the last you saw"
                )
                raise Problem(400, wrong, param="Last-Event-ID")
            if answer.closed and start == answer.end:
                # What an EventSource takes as: do not come back (HTML standard 9.2).
                return await request.respond(204)
            await self.stream(request, answer, start, {"x-answer-id": answer.name})

    async def delete_answer(self, request: Request) -> None:
        answer = await self.find_answer(request.path.removeprefix("/answers/"))
        answer.stop(STOPPED)
        await request.respond(204)

    async def find_answer(self, name: str) -> Answer:
        answer = self.answers.by_id.get(name)
        if answer is None and self.shared:
            answer = await self.shared.find(name)
        if answer is None:
            raise UNKNOWN_ANSWER.with_traceback(None)
        return answer

    # ── readers over WebSocket ──

    def admit(self, wire: Wire, upgrade: Upgrade) -> tuple[bool, dict[str, str]]:
        """Is this a handshake for the clock (or the room), and what is in its query?

        Raises Problem. trio-websocket gets the handshake anew: the lines that count.
        """
        request = upgrade.request
        headers = fold_headers(request.headers)
        path, _, query = request.target.partition(b"?")
        self.access.check_host(headers)
        check_handshake(request, headers)
        self.access.check_origin(headers)
        if path not in (b"/", b"/room", b"/clock"):
            raise Problem(404, "there is no WebSocket here: use /room or /clock")
        if self.stopping:
            raise STOPPING.with_traceback(None)
        handshake = [(n, v) for n, v in headers.items() if n in HANDSHAKE_HEADERS]
        lines = "".join(f"{name}: {value}\r\n" for name, value in handshake)
        wire.unread = f"GET / HTTP/1.1\r\n{lines}\r\n".encode()
        return path == b"/clock", parse_query(query)

    async def session(
        self, wire: Wire, early: bytes, is_clock: bool, query: Mapping[str, str]
    ) -> str:
        """From the handshake to the close frame; returns how it ended."""
        now = self.clock.end if is_clock else self.room.end
        with trio.fail_after(HEAD_TIMEOUT):  # in which it learns that it is a member:
            v1 = await shake_hands(wire, not is_clock)
        member = self.member(wire, is_clock, v1, now, query)  # it misses nothing since
        member.frames.feed(early)
        try:
            room = None if is_clock else self.room
            ended = await member.stay(room, self.settings.room_rate)
            await member.goodbye()
        finally:
            self.metrics.count_reader(member)
        return ended

    def member(
        self, wire: Wire, is_clock: bool, v1: bool, now: int, query: Mapping[str, str]
    ) -> Member:
        """Where this one starts to read, and how the events look to it."""
        name = clean_name(query.get("name", ""))
        after = query.get("after")
        if is_clock:
            place = self.clock.place_after(after)
            start = now if place is None else place
            return Member(wire, self.clock, WS_CLOCK, start, name)
        if v1:
            place = self.room.place_after(after)
            start = self.room.history() if place is None else place
            return Member(wire, self.room, WS_JSON, start, name)
        return Member(wire, self.room, self.plain, now, name)

    # ── connections ──

    async def accept(
        self, listener: trio.socket.SocketType, connections: trio.Nursery
    ) -> NoReturn:
        """One task for each client, from now on until it leaves."""
        told = -inf
        while True:
            try:
                client, address = await listener.accept()
            except OSError as error:  # of a client that has gone, or no file is left
                if (now := trio.current_time()) > told + 10:
                    logger.error("new connections wait: %s (see ulimit -n)", error)
                    told = now
                await trio.sleep(0.1)
            else:
                connections.start_soon(self.connection, client, peer_name(address))

    async def connection(self, client: trio.socket.SocketType, peer: str) -> None:
        """One client: whatever goes wrong inside ends here, as one line in the log."""
        wire = Wire(trio.SocketStream(client))
        visit = Visit(peer)
        self.wires[wire] = None
        try:
            await self.converse(wire, visit)
        except* QUIET_ENDS as group:
            visit.ended = why(group)
            if wire.stuck:
                visit.ended = f"stuck: {STUCK}"
                self.metrics.count("readers_dropped_total", cause=STUCK)
        except* Exception:
            visit.ended = "a fault of ours"
            logger.exception("a connection failed in a way that nobody thought of")
        finally:
            del self.wires[wire]
            self.metrics.count("sent_bytes_total", wire.sent)
            wire.fd = -1  # the number may be another connection's at once
            client.close()
            if logger.isEnabledFor(logging.INFO):
                logger.info(visit.line(wire.sent))

    async def converse(self, wire: Wire, visit: Visit) -> None:
        """TLS if we have a certificate, then whatever protocol the client speaks.

        A WebSocket begins as HTTP/1, so h11 reads its head, too: one place for limits.
        """
        scheme, protocol = "http", None
        if self.tls:
            tls = trio.SSLStream(
                wire, self.tls, server_side=True, https_compatible=True
            )
            with trio.fail_after(HEAD_TIMEOUT):
                await tls.do_handshake()
            wire, scheme, protocol = Wire(tls), "https", tls.selected_alpn_protocol()
        if protocol == "h2":
            visit.asked = "HTTP/2"
            return await serve_http2(wire, scheme, self, self.terminated)
        http1 = Http1(wire, scheme, visit)
        upgrade = await http1.serve(self)
        if upgrade is None:
            return
        visit.asked = f"WebSocket {visit.asked.partition(' ')[2]}"
        try:
            is_clock, query = self.admit(wire, upgrade)
        except Problem as problem:
            await http1.refuse(problem)
            return await wire.linger()
        early = upgrade.trailing
        del http1, upgrade  # 4 KB that a member needs no more
        self.active += 1
        try:
            visit.ended = await self.session(wire, early, is_clock, query)
        finally:
            await wire.linger()
            self.active -= 1

    # ── the beginning and the end ──

    async def serve(
        self,
        listeners: list[trio.socket.SocketType],
        stop: trio.Event,
        ready: Callable[[], object],
    ) -> None:
        """Accept until `stop`, then end gracefully: every reader is told.

        Who owns whom, in one line: a nursery ends after what is inside of it, and the
        connections' is inside of the writers'. So no reader outlives what it reads.
        """
        async with trio.open_nursery() as writers, trio.open_nursery() as connections:
            await writers.start(self.run_writers)
            if self.shared:
                await writers.start(self.shared.run)
            async with trio.open_nursery() as accepting:
                for listener in listeners:
                    accepting.start_soon(self.accept, listener, connections)
                ready()
                await stop.wait()
                accepting.cancel_scope.cancel()
            for listener in listeners:
                listener.close()
            await self.end()
            connections.cancel_scope.cancel()
            writers.cancel_scope.cancel()

    async def end(self) -> None:
        """Answers may finish; then all logs end, and with them their readers.

        Our answers end before the replicas: other processes are told how ours ended
        while there still is a Redis connection to tell them by.
        """
        self.stopping = True
        with trio.move_on_after(self.settings.grace):
            for answer in list(self.answers.by_id.values()):
                await answer.ended.wait()
        ours = [a for a in self.answers.by_id.values() if not isinstance(a, Replica)]
        for answer in ours:
            answer.stop(STOPPING)
        if self.shared:
            await trio.lowlevel.checkpoint()  # in which they end
            await self.shared.goodbye()
        for answer in list(self.answers.by_id.values()):
            answer.stop(STOPPING)
        self.clock.close()
        self.room.close()
        self.terminated.set()
        with trio.move_on_after(LINGER_CLOSE):
            while self.active:  # noqa: ASYNC110 (an event would be set in four places)
                await trio.sleep(0.02)


def peer_name(address: Any) -> str:
    host, port, *_ = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def why(group: BaseExceptionGroup[BaseException]) -> str:
    """The first reason in a group of exceptions, in words."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}".rstrip(": ")


# ─── More than one process: Redis Streams behind the same logs ───────────────────────
# Nothing above a log changes. The room is written to a Redis Stream, and one task in
# each process copies it into the local log. An answer is written locally, by the
# process that asked the upstream, and mirrored into a stream of its own; a process
# that is asked for somebody else's answer follows that, as a Replica. Event n of a log
# is the same everywhere.
#
# Redis, and any of the others, may be gone at any moment, or stand still and wake up
# later. So nothing waits for Redis longer than REDIS_TIMEOUT; a message that its sender
# was told is not stored will not turn up later (but for a reply that is lost on its
# way); and what must not get lost, who attends which answer, is told twice: at once,
# and again with each lease.
#
#   room        stream of messages; event n is entry 0-(n - base + 1)
#   room:origin the room's name, and its base: written with the first message
#   answer:ID   stream of batches of events; entry 0-1 says who writes, and how
#   control     stream: stop, attend, leave, for whoever writes that answer
#   alive, counts, presence   a lease of LEASE seconds for each process, and its numbers

# FOLLOW_BLOCK is short: an XREAD under way knows nothing of a stream that is added.
LEASE, BEAT, MIRROR_EVERY, FOLLOW_BLOCK = 4, 1, 0.05, 0.1
MIRROR_ANSWERS, MIRROR_EVENTS = 100, 200  # at a time: a batch takes 20 ms, not seconds
REDIS_TIMEOUT = 2
ANSWER_EXPIRES = 300  # after the last event; ANSWER_KEPT once it has ended

# One message: stored, numbered, and with the number of members at that moment, all in
# one step. LATE: a command is not taken back when we give up waiting for its reply. A
# Redis that was frozen would carry it out on waking up, after its sender has been told
# to say it again. So each comes with a time, on Redis's clock, after which it is void.
SAY = """
local t = redis.call('TIME')
if t[1] + t[2] / 1000000 > tonumber(ARGV[9]) then
  return redis.error_reply('LATE: its sender has been told that it was not stored')
end
redis.call('SET', KEYS[2], ARGV[1], 'NX')
redis.call('HSET', KEYS[3], ARGV[2], ARGV[3])
local members = 0
for _, n in ipairs(redis.call('HVALS', KEYS[3])) do members = members + n end
redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[4], '0-*', 'type', ARGV[5], 'data', ARGV[6],
           'name', ARGV[7], 'at', ARGV[8], 'members', members)
"""
# Who has not renewed its lease is gone, and the first to see it cleans up after it: but
# only when somebody was there to see, for Redis itself may have been away meanwhile.
RENEW = """
local t = redis.call('TIME')
local now = t[1] + t[2] / 1000000
local last = tonumber(redis.call('HGET', KEYS[4], 'last') or 0)
if now - last > 2.5 then redis.call('HSET', KEYS[4], 'since', now) end
redis.call('HSET', KEYS[4], 'last', now)
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
local lost, since = 0, redis.call('HGET', KEYS[4], 'since')
local sure = now - since > tonumber(ARGV[4])
if sure then
  for _, gone in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], 0, now - ARGV[4])) do
    lost = lost + (redis.call('HGET', KEYS[3], gone) or 0)
    redis.call('ZREM', KEYS[1], gone)
    redis.call('HDEL', KEYS[2], gone)
    redis.call('HDEL', KEYS[3], gone)
  end
end
return {lost, tostring(now), since, sure and 1 or 0, redis.call('HGETALL', KEYS[2])}
"""


class Replica(Answer):
    """Somebody else's answer, followed here.

    It has no writer in this process, so its scope stops nothing: what one does to it is
    told to the process that has the writer, and what becomes of it is read from Redis.
    """

    def __init__(self, shared: Shared, name: str, seed: bool, writer: str) -> None:
        super().__init__(shared.service.answers, seed, False)
        self.name = name
        self.shared = shared
        self.writer = writer
        self.head.set()

    @contextlib.contextmanager
    def attended(self) -> Iterator[None]:
        self.attending += 1
        if self.attending == 1:
            self.shared.tell("attend", self)
        try:
            yield
        finally:
            self.attending -= 1
            if not self.attending:
                self.shared.tell("leave", self)

    async def reach(self, last_event_id: str) -> None:
        """What its reader has seen elsewhere may still be on its way to us.

        Without this, its id would be refused as one of the future. A second is many
        times what the way takes (MIRROR_EVERY and a round trip).
        """
        name, _, n = last_event_id.rpartition("-")
        if name == self.name and re.fullmatch("[0-9]{1,15}", n):
            with trio.move_on_after(1):
                while int(n) >= self.end and not self.closed:  # noqa: ASYNC110
                    await trio.sleep(0.01)

    def stop(self, verdict: Problem) -> None:
        if verdict is STOPPED:
            self.shared.tell("stop", self)
        else:  # this process ends: no event of ours, the answer goes on elsewhere
            self.close()


class Shared:
    """This process, among others on the same Redis."""

    def __init__(self, service: Service, url: str) -> None:
        import coredis  # only where --redis is given

        self.service = service
        self.me = secrets.token_hex(8)
        self.redis: coredis.Redis[str] = coredis.Redis.from_url(
            url, decode_responses=True, connect_timeout=1, stream_timeout=REDIS_TIMEOUT
        )
        self.trouble = (coredis.exceptions.RedisError, trio.TooSlowError, OSError)
        self.say_script = self.redis.register_script(SAY)
        self.renew_script = self.redis.register_script(RENEW)
        self.base = 0  # the room's place in its stream: event n is entry n - base + 1
        self.offset = 0.0  # Redis's time less ours
        self.since = ""  # when Redis began to see all of us
        self.said = 0  # by `tell`; and by the others, as far as we have heard it
        self.heard: dict[str, int] = {}
        self.read = {"chatstream:control": "", "chatstream:room": "0-0"}  # up to here
        self.others: Counter[str] = Counter()
        self.unsent: dict[str, str] | None = None  # taken from the channel, not stored
        self.told, self.to_tell = trio.open_memory_channel[dict[str, str]](inf)
        # The one place where the room learns of Redis: members do not see a difference.
        service.room.publish = self.publish  # type: ignore[method-assign]

    async def run(
        self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Everything that this process does for the others, and they for it."""
        async with self.redis, trio.open_nursery() as nursery:
            try:  # know the others, and what was said, before the first client comes
                await self.renew_once()
                await self.find_origin()
                while await self.follow_once(block=1):
                    pass
            except self.trouble as error:
                logger.warning("redis: %s", error)
            for task in (self.renew, self.follow, self.mirror, self.send_told):
                nursery.start_soon(self.for_ever, task)
            task_status.started()

    async def goodbye(self) -> None:
        """The last events of our answers, for who reads them elsewhere; then our lease.

        Who follows an answer of a process that stops as well gets its end from there.
        """
        with contextlib.suppress(*self.trouble), trio.fail_after(0.5):
            while ours := [a for a in self.mine() if a.mirrored < a.end]:
                await self.store(ours)
            await self.redis.zrem("chatstream:alive", [self.me])
            await self.redis.hdel("chatstream:counts", [self.me])
            await self.redis.hdel("chatstream:presence", [self.me])
        with trio.move_on_after(0.2):
            for replica in self.replicas():
                await replica.ended.wait()

    async def for_ever(self, task: Callable[[], Awaitable[None]]) -> None:
        """Again after each trouble with Redis, with back-off."""
        wait = 0.1
        while True:
            started = trio.current_time()
            try:
                await task()
            except (*self.trouble, Problem) as error:
                logger.warning("redis: %s: %s", task.__name__, error)
            except Exception:
                logger.exception("redis: %s failed", task.__name__)
            wait = 0.1 if trio.current_time() - started > 5 else min(wait * 2, 2)
            await trio.sleep(wait * random.uniform(0.5, 1))

    # ── the room ──

    async def publish(self, type: str, name: str, data: str = "") -> None:
        """Say it to all processes. Raises Problem if it could not be stored."""
        room = self.service.room
        origin = f"{room.name} {room.end + ROOM_EVENTS}"
        late = self.offset + trio.current_time() + REDIS_TIMEOUT
        args: list[str | int | float] = [origin, self.me, room.here, ROOM_EVENTS]
        args += [type, data, name, now_ms(), late]
        try:
            with trio.fail_after(REDIS_TIMEOUT, shield=True):  # said is said
                await self.say_script(keys("room", "room:origin", "presence"), args)
        except self.trouble:
            away = "the room cannot store messages at the moment: say it again later"
            raise Problem(503, away, "server_error", code="not_stored") from None

    async def find_origin(self) -> None:
        """Take over the room's name and base, as whoever spoke first has set them.

        A Redis that comes back empty counts from 1 again. The base makes up for it: it
        is beyond all that whoever spoke first has seen, and by ROOM_EVENTS beyond what
        others may have seen. So a number means one event, were they no further apart.
        """
        room = self.service.room
        mine = f"{room.name} {room.end + (ROOM_EVENTS if room.end else 0)}"
        await self.redis.eval(
            "redis.call('SET', KEYS[1], ARGV[1], 'NX')", keys("room:origin"), [mine]
        )
        name, base = str(await self.redis.get("chatstream:room:origin")).split()
        if (name, int(base)) != (room.name, self.base):
            room.name, self.base = name, int(base)
            self.read["chatstream:room"] = "0-0"
            if self.base < room.end:  # who knew less than we was first
                room.skip_to(self.base)
                for reader in room.readers:
                    reader.position = self.base - 1  # so that each is told of a gap
        if not self.read["chatstream:control"]:  # what is told from now on
            last: Any = await self.redis.xrevrange("chatstream:control", count=1)
            self.read["chatstream:control"] = last[0].identifier if last else "0-0"

    def hear_room(self, place: int, entry: Mapping[str, str]) -> None:
        """An entry of the room's stream, into the local log, at its place."""
        room, n = self.service.room, self.base + place - 1
        if n < room.end:
            return
        if n > room.end:
            room.skip_to(n)
        about: dict[str, Any] = {"name": entry["name"], "at": int(entry["at"])}
        room.members = int(entry["members"])
        if entry["type"] != "message":
            about["members"] = room.members
        room.append(entry["data"], entry["type"], **about)

    # ── answers ──

    async def announce(self, answer: Answer) -> None:
        """Before a client learns an answer's name: let every process find it."""
        with contextlib.suppress(*self.trouble), trio.fail_after(REDIS_TIMEOUT):
            await self.found(answer)

    async def found(self, answer: Answer) -> None:
        key = f"chatstream:answer:{answer.name}"
        entry = {"writer": self.me, "seed": str(int(answer.seed))}
        await self.redis.xadd(key, entry, identifier="0-1")
        await self.redis.expire(key, ANSWER_EXPIRES)
        answer.mirrored = answer.start

    async def mirror(self) -> None:
        """Our answers into their streams, many in one round trip."""
        while True:
            await trio.sleep(MIRROR_EVERY)
            ours = [a for a in self.mine() if a.mirrored < a.end]
            for n in range(0, len(ours), MIRROR_ANSWERS):
                with trio.fail_after(REDIS_TIMEOUT):
                    await self.store(ours[n : n + MIRROR_ANSWERS])

    def mine(self) -> list[Answer]:
        answers = self.service.answers.by_id.values()
        return [answer for answer in answers if not isinstance(answer, Replica)]

    async def store(self, answers: list[Answer]) -> None:
        """A stream that is not there (any more) is written again from the start.

        An entry's id is the place after its last event, plus one for the entry 0-1.
        Redis takes only ids that grow: what is sent twice, because its first reply was
        lost, is stored once.
        """
        # Before any waiting: the answers grow meanwhile, and this much is sent.
        ends = [min(a.end, a.mirrored + MIRROR_EVENTS) for a in answers]
        pipe = self.redis.pipeline(transaction=False, raise_on_error=False)
        async with pipe:  # an error of one stream: it was buried while we were away
            for answer, end in zip(answers, ends, strict=True):
                key = f"chatstream:answer:{answer.name}"
                batch = answer.events(answer.mirrored, end)
                events = to_json([[event.type, event.data] for event in batch])
                entry = {"n": str(answer.mirrored), "events": events}
                pipe.xadd(key, entry, identifier=f"0-{end + 1}", nomkstream=True)
                pipe.expire(key, ANSWER_KEPT if answer.closed else ANSWER_EXPIRES)
        added = (pipe.results or ())[::2]
        for answer, end, id in zip(answers, ends, added, strict=True):
            if id is None:
                await self.found(answer)
            else:
                answer.mirrored = end

    async def find(self, name: str) -> Answer | None:
        """Another process's answer, followed from now on. Raises Problem 503."""
        key = f"chatstream:answer:{name}"
        try:
            with trio.fail_after(REDIS_TIMEOUT):
                entries: Any = await self.redis.xrange(key)
        except self.trouble:
            away = "this answer cannot be found at the moment: try again"
            retry = {"retry-after": "2"}
            raise Problem(503, away, "server_error", headers=retry) from None
        table = self.service.answers.by_id
        if name in table or not entries:
            return table.get(name)  # somebody else asked at the same moment
        first = entries[0].field_values
        if "writer" not in first:
            return None
        replica = Replica(self, name, first["seed"] == "1", str(first["writer"]))
        table[name] = replica
        for entry in entries[1:]:
            self.hear_answer(replica, entry.field_values)
        if not replica.closed:
            self.read[key] = str(entries[-1].identifier)
        return replica

    def hear_answer(self, replica: Answer, entry: Mapping[str, str]) -> None:
        """A batch of its events, of which we may have some already."""
        if "events" not in entry or replica.closed:
            return
        events, n = from_json(entry["events"]), int(entry["n"])
        if n > replica.end:
            replica.skip_to(n)  # what Redis has lost, the reader is told of by a gap
        for type, data in events[replica.end - n :]:
            replica.append(data, type)
            if type == "error" or data == "[DONE]":
                replica.close()
                replica.ended.set()

    async def bury(self, replica: Replica) -> None:
        """Its writer is gone: the answer ends for all who follow that stream."""
        gone = upstream_problem("the server that wrote this answer is gone")
        events = to_json([["error", replica.error_text(gone)]])
        key, place = f"chatstream:answer:{replica.name}", replica.end + 2
        entry = {"n": str(replica.end), "events": events}
        with contextlib.suppress(*self.trouble):  # another process may have done it
            await self.redis.xadd(key, entry, identifier=f"0-{place}")
            await self.redis.expire(key, ANSWER_KEPT)

    # ── what the processes tell each other ──

    def tell(self, what: str, answer: Answer) -> None:
        """Never waits, for it is called where a reader comes or goes: send_told() does.

        Each has a number, by which hear_counts() tells old news from new.
        """
        self.said += 1
        message = {"do": what, "answer": answer.name}
        self.told.send_nowait({**message, "from": self.me, "nth": str(self.said)})

    async def send_told(self) -> None:
        """In order, and again after trouble: a lost `leave` would cost tokens."""
        from coredis.tokens import PureToken

        while True:
            self.unsent = self.unsent or await self.to_tell.receive()
            with trio.fail_after(REDIS_TIMEOUT):
                await self.redis.xadd(
                    "chatstream:control", self.unsent,
                    trim_strategy=PureToken.MAXLEN, threshold=10000,
                )  # fmt: skip
            self.unsent = None

    def hear_control(self, entry: Mapping[str, str]) -> None:
        self.heard[entry["from"]] = int(entry["nth"])
        answer = self.service.answers.by_id.get(entry["answer"])
        if answer is None or isinstance(answer, Replica):
            return
        if entry["do"] == "stop":
            answer.stop(STOPPED)
        elif entry["do"] == "attend":
            answer.attend(entry["from"])
        else:
            answer.leave(entry["from"])

    async def follow(self) -> None:
        """The one task that copies: every followed stream, into its local log."""
        await self.find_origin()
        while True:
            await self.follow_once(int(FOLLOW_BLOCK * 1000))
            self.unfollow()

    async def follow_once(self, block: int) -> bool:
        with trio.fail_after(REDIS_TIMEOUT):
            news: Any = await self.redis.xread(self.read, count=500, block=block)
        for key, entries in (news or {}).items():
            self.read[key] = entries[-1].identifier
            for entry in entries:
                self.hear(key, entry.identifier, entry.field_values)
        return bool(news)

    def hear(self, key: str, identifier: str, entry: Mapping[str, str]) -> None:
        _, kind, *rest = key.split(":")
        if kind == "room":
            self.hear_room(int(identifier.partition("-")[2]), entry)
        elif kind == "control":
            self.hear_control(entry)
        elif answer := self.service.answers.by_id.get(rest[0]):
            self.hear_answer(answer, entry)

    def unfollow(self) -> None:
        """Streams that have ended, or that nobody here reads any more."""
        for key in [key for key in self.read if ":answer:" in key]:
            answer = self.service.answers.by_id.get(key.split(":")[2])
            if answer is None or answer.closed or not answer.attending:
                del self.read[key]
        for answer in list(self.service.answers.by_id.values()):
            if isinstance(answer, Replica) and not answer.attending:
                self.service.answers.forget(answer)

    async def renew(self) -> None:
        while True:
            await self.renew_once()
            await trio.sleep(BEAT)

    async def renew_once(self) -> None:
        """Our lease, our numbers; and what became of the others.

        `told` is taken in the same step as `attends`: all up to there is in it.
        """
        attends = [replica.name for replica in self.replicas() if replica.attending]
        mine = {**self.service.counts(), "attends": attends, "told": self.said}
        args: list[str | int] = [self.me, to_json(mine), self.service.room.here, LEASE]
        with trio.fail_after(REDIS_TIMEOUT):
            said: Any = await self.renew_script(
                keys("alive", "counts", "presence", "beats"), args
            )
        lost, now, since, sure, counts = said
        self.offset = float(now) - trio.current_time()
        if since != self.since:  # Redis was away, or has been emptied
            self.since = since
            await self.find_origin()
        theirs = dict(zip(counts[::2], counts[1::2], strict=True))
        self.hear_counts({k: from_json(text) for k, text in theirs.items()})
        if int(lost):
            await self.publish("left", f"{lost} members")
        if int(sure):
            await self.bury_the_dead(set(theirs))

    async def bury_the_dead(self, alive: set[str]) -> None:
        """Who has no lease any more neither reads our answers nor writes its own."""
        for answer in self.mine():
            for process in answer.remote - alive:
                answer.leave(process)
        for replica in self.replicas():
            if replica.writer not in alive:
                await self.bury(replica)

    def hear_counts(self, counts: Mapping[str, Any]) -> None:
        """What the others count, and whose answers they read.

        Counts that are older than what we have heard from their process since then say
        nothing: an `attend` would be undone by the count of the moment before it.
        """
        self.others = Counter()
        for process, theirs in counts.items():
            if process == self.me:
                continue
            self.others.update(
                {k: theirs[k] for k in ("readers", "answers", "members")}
            )
            if theirs["told"] < self.heard.get(process, 0):
                continue
            for answer in self.mine():
                if answer.name in theirs["attends"]:
                    answer.attend(process)
                elif process in answer.remote:
                    answer.leave(process)

    def replicas(self) -> list[Replica]:
        answers = self.service.answers.by_id.values()
        return [answer for answer in answers if isinstance(answer, Replica)]


def keys(*names: str) -> list[str]:
    return [f"chatstream:{name}" for name in names]


# ─── main ────────────────────────────────────────────────────────────────────────────
# All that can be wrong with flags, ports, certificate and Redis is found before the
# first client is served, and told in one line.
#
# A signal may come at any time, also before there is a loop to take it and after there
# was one. So each stretch of the program says what a signal does there.


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Usage(Exception):
    """The operator asked for something that cannot be: one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Usage(f"{message} (see --help)")


def parse_flags(argv: list[str] | None, environ: Mapping[str, str]) -> Settings:
    """Flags, then environment, then defaults. Raises Usage."""
    default = Settings()
    parser = Parser(prog="chatstream", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--host", default=default.host, help="address to listen on")
    add("--port", type=port, default=default.port, help="0 means any free one")
    add("--room-port", type=port, default=default.room_port)
    add("--upstream", default=environ.get("OPENAI_BASE_URL", ""), metavar="URL",
        help="base URL of an OpenAI-compatible model (OPENAI_BASE_URL)")  # fmt: skip
    add("--model", default=environ.get("OPENAI_MODEL", ""), metavar="NAME",
        help="the model to ask where a client names none (OPENAI_MODEL)")  # fmt: skip
    add("--allow-origin", action="append", default=[], type=origin, metavar="ORIGIN",
        help="pages of this origin may ask and speak; null: from disk")  # fmt: skip
    add("--linger", type=seconds, default=default.linger,
        help="how long an answer goes on with nobody reading")  # fmt: skip
    add("--grace", type=seconds, default=default.grace,
        help="how long answers may go on when the server stops")  # fmt: skip
    add("--room-rate", type=seconds, default=default.room_rate,
        help="messages a second that one member may say; 0 means no limit")  # fmt: skip
    add("--room-suffix", default=default.room_suffix, metavar="TEXT")
    add("--redis", default="", metavar="URL",
        help="share room and answers with all processes on this Redis")  # fmt: skip
    add("--workers", type=workers, default=1, metavar="N",
        help="so many processes on the same sockets; needs --redis")  # fmt: skip
    add("--certfile", default="", help="PEM, with --keyfile: HTTPS and WSS")
    add("--keyfile", default="")
    add("--log-level", default=default.log_level,
        choices=["debug", "info", "warning", "error"])  # fmt: skip
    flags = vars(parser.parse_args(argv))
    flags["allow_origin"] = tuple(flags["allow_origin"])
    flags["upstream"] = base_url(flags["upstream"])
    if bool(flags["certfile"]) != bool(flags["keyfile"]):
        raise Usage("--certfile and --keyfile go together")
    if flags["workers"] > 1 and not flags["redis"]:
        raise Usage("--workers needs --redis, where the processes share their logs")
    return Settings(**flags, api_key=environ.get("OPENAI_API_KEY", ""))


def port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 0 to 65535")
    return int(text)


def workers(text: str) -> int:
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= 256:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of processes: 1 to 256"
        )
    return int(text)


def seconds(text: str) -> float:
    """A number that is not negative; also used for a rate."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number < inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of 0 or more")
    return number


def origin(text: str) -> str:
    text = text.rstrip("/").lower()
    if text != "null" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s*]+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no origin, such as https://my.site"
        )
    return text


def base_url(text: str) -> str:
    """`http://host:port/v1`, without a slash at its end; a bare host gets its /v1."""
    if not text:
        return ""
    try:
        parts = urlsplit(text)
        good = (
            parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
        )
    except ValueError:
        good = False
    if not good:
        raise Usage(f"--upstream {text!r} is no base URL, such as http://host:port/v1")
    return text.rstrip("/") + ("" if parts.path.strip("/") else "/v1")


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """For HTTPS and WSS, HTTP/2 by ALPN. Raises Usage."""
    if not settings.certfile:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        for file in (settings.certfile, settings.keyfile):
            Path(file).read_bytes()  # whose errors name the file
        context.load_cert_chain(settings.certfile, settings.keyfile)
    except OSError as error:  # ssl.SSLError is one
        raise Usage(f"no certificate from --certfile and --keyfile: {error}") from None
    return context


def listen(host: str, number: int) -> socket.socket:
    """A listening TCP socket. Raises Usage."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server(
            (host.strip("[]"), number), family=family, backlog=4096
        )
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # else TCP takes a quarter of an hour
            limit = VANISHED_TIMEOUT * 1000  # each connection inherits it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit)
        return listener
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Usage(f"cannot listen on {host}:{number}: {reason}") from None


def raise_file_limit() -> None:
    """Each connection is a file: take as many as the system gives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in ((65536, max(hard, 65536)), (hard, hard)):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            break
        except (ValueError, OSError):
            continue
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 10240:
        logger.warning(
            "this system lets us have %d connections (see ulimit -n)", soft - 50
        )


async def run(
    settings: Settings,
    sockets: list[socket.socket],
    tls: ssl.SSLContext | None,
    ready: Callable[[], object],
    parent: int | None = None,
) -> int:
    """Serve on these sockets until a signal; a second one stops at once.

    `parent` is a pipe that ends with the process that started us, and us with it.
    """
    stop = trio.Event()
    gc.freeze()  # what is imported stays: no collection needs to look at it again
    gc.set_threshold(GC_THRESHOLD)
    ports = [listening.getsockname()[1] for listening in sockets]
    service = Service(settings, set(ports), tls)
    if settings.redis:
        service.shared = Shared(service, settings.redis)
    listeners = [trio.socket.from_stdlib_socket(s) for s in sockets]
    with trio.open_signal_receiver(*STOP_SIGNALS) as signals:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                await service.serve(listeners, stop, ready)
                nursery.cancel_scope.cancel()

            async def watch_parent(pipe: int) -> None:
                await trio.lowlevel.wait_readable(pipe)
                stop.set()

            nursery.start_soon(serve)
            if parent is not None:
                nursery.start_soon(watch_parent, parent)
            async for _ in signals:
                if stop.is_set():
                    logger.warning("stopping at once")
                    nursery.cancel_scope.cancel()
                stop.set()
    return 0


def start_line(settings: Settings, sockets: list[socket.socket]) -> str:
    s = "s" if settings.certfile else ""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    http, ws = (f"{host}:{listening.getsockname()[1]}" for listening in sockets)
    model = settings.model_name
    return f"chatstream: http{s}://{http}  ws{s}://{ws}  model: {model}"


async def check_redis(url: str) -> None:
    """Raises Usage, without the password that may stand in the URL."""
    try:
        import coredis
    except ImportError:
        raise Usage("--redis needs coredis: pip install 'chatstream[redis]'") from None
    if not re.match("(rediss?|unix)://", url):
        raise Usage("--redis needs a URL, such as redis://host:6379")
    reason = ""
    trouble = (coredis.exceptions.RedisError, trio.TooSlowError, OSError, ValueError)
    try:
        with trio.fail_after(5):
            async with coredis.Redis.from_url(url, connect_timeout=3) as redis:
                await redis.ping()
    except* trouble as group:  # coredis has a nursery of its own
        reason = why(group)
    if reason:
        where = url.rpartition("@")[2].removeprefix("redis://")
        raise Usage(f"cannot reach Redis at {where}: {reason}")


class Supervisor:
    """N processes on the same sockets: who dies is replaced, a stop goes to all.

    It has no event loop, only os.wait(): to fork a loop would share its epoll between
    two processes. What the workers do share is the listening sockets, opened once by
    main(): the kernel gives each new connection to one of them, so no port is ever
    closed while a worker is replaced.
    """

    def __init__(self, settings: Settings, *args: Any) -> None:
        self.settings = settings
        self.args = args
        self.workers: dict[int, float] = {}
        self.stopped = False
        self.pipe, self.held_open = os.pipe()  # ends with us, and the workers with it

    def run(self, start: str) -> int:
        for number in (*STOP_SIGNALS, signal.SIGALRM):
            signal.signal(number, self.stop)
        self.begin(functools.partial(print, start, flush=True))
        for _ in range(self.settings.workers - 1):
            self.begin()
        while self.workers:
            pid, status = os.wait()
            lived = time.monotonic() - self.workers.pop(pid)
            if not self.stopped:
                logger.error("worker %d died (%d) and is replaced", pid, status)
                time.sleep(max(0, 1 - lived))  # one that cannot live: not in a hurry
                self.begin()
        return 0

    def begin(self, ready: Callable[[], object] = bool) -> None:
        # Blocked, so that a stop finds no worker with this process's own handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        pid = os.fork()
        if pid == 0:
            self.work(ready)
        self.workers[pid] = time.monotonic()
        if self.stopped:  # before there was this one to be told
            os.kill(pid, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def work(self, ready: Callable[[], object]) -> NoReturn:
        """The worker's whole life: it must never return into the parent's code."""
        code = 1
        try:
            os.setpgid(0, 0)  # Ctrl-C is for the parent, which passes it on
            os.close(self.held_open)  # else it is held open by the workers themselves
            code = run_until_stopped(self.settings, *self.args, ready, self.pipe)
        except Exception:
            logger.exception("a worker failed")
        finally:
            os._exit(code)

    def stop(self, number: int, frame: object) -> None:
        """Passed on to all; and once more, for good, to one that is frozen, say.

        The alarm comes after `grace`, in time for the promise of `grace` plus 3 s.
        """
        self.stopped = True
        too_late = number == signal.SIGALRM
        for pid in list(self.workers):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGKILL if too_late else signal.SIGTERM)
        signal.setitimer(signal.ITIMER_REAL, self.settings.grace + 2.8)


def run_until_stopped(*args: Any) -> int:
    """run(), with signals that wait for it at the start, and do no harm at the end.

    What Trio's receiver has not delivered is raised again when it closes: an exception
    of ours would then come out of Trio's own loop.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
    return trio.run(run, *args)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 when it could not start."""
    for number in STOP_SIGNALS:  # until we serve; an exception could get lost
        signal.signal(number, lambda *_: os._exit(0))
    try:
        settings = parse_flags(argv, os.environ)
        logging.basicConfig(
            level=settings.log_level.upper(), stream=sys.stderr,
            format="%(asctime)s %(levelname)s %(message)s",
        )  # fmt: skip
        logging.getLogger("trio-websocket").setLevel(logging.WARNING)
        for noisy in ("httpx2", "httpcore2", "hpack", "coredis"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        raise_file_limit()
        sockets = [
            listen(settings.host, n) for n in (settings.port, settings.room_port)
        ]
        tls = tls_context(settings)
        if settings.redis:
            trio.run(check_redis, settings.redis)
        start = start_line(settings, sockets)
        if settings.workers > 1:
            return Supervisor(settings, sockets, tls).run(start)
        ready = functools.partial(print, start, flush=True)
        return run_until_stopped(settings, sockets, tls, ready)
    except Usage as error:
        print(f"chatstream: {error}", file=sys.stderr)
        return 2
    finally:
        for number in STOP_SIGNALS:  # it has ended: let it
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
