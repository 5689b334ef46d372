"""Everything at once, as long as you like: `python tests/bench/soak.py --minutes 20`.

Steady clients that must lose nothing (clock readers, members, answers read to their
end and resumed) share one server with those of the fault tests: floods, resets, stuck
readers, slow heads, garbage, questions that nobody reads or that never end. Each minute it
prints what came and went, the server's memory, descriptors and tasks. How long 1,000
readers of the clock wait is measured beside 1,000 of a second server, which nobody
attacks. The exit code is 0 if no event was lost.
"""

import argparse
import json
import random
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kit import (
    BODIES,
    CHAT,
    HANDSHAKE,
    SHAPES,
    TEXT,
    Cut,
    Server,
    asking,
    connect,
    descriptors,
    frame,
    head,
    health,
    narrow,
    processor,
    program,
    raw_member,
    read_frame,
    reset,
    resident,
    stream,
    tasks,
    visit,
)

GONE = (Cut, OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError)
ROUND = 5  # seconds between what one member says


class Soak:
    def __init__(self, server, minutes):
        self.server = server
        self.seconds = minutes * 60
        self.counts = Counter()
        self.lost = Counter()
        self.dice = random.Random(6455)

    async def run(self):
        with trio.move_on_after(self.seconds):
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(self.read_clock)
                for n in range(5):
                    nursery.start_soon(self.talk, n)
                    nursery.start_soon(self.ask)
                for attack in (self.churn, self.stick, self.crawl, self.smuggle):
                    nursery.start_soon(attack)
                for attack in (self.pipeline, self.desert, self.hoard, self.nest, self.drift):
                    nursery.start_soon(attack)
                nursery.start_soon(self.report)
        await trio.sleep(75)  # ended answers are forgotten after a minute
        await self.line("after")

    # ------------------------------------------------------------ who loses nothing

    async def read_clock(self):
        """One connection all the time: each second is there once."""
        async with stream("GET", self.server.http + "/clock") as clock:
            last = (await clock.event()).n
            while True:
                event = await clock.event()
                self.lost["ticks"] += event.n != last + 1
                self.counts["ticks"] += 1
                last = event.n

    async def talk(self, me):
        """Say something every few seconds, and hear it once and in its order."""
        async with raw_member(self.server.ws) as member:
            member.patience = 60
            pen = trio.Lock()  # pongs and messages share the connection
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.say, member, me, pen)
                said = -1
                while True:
                    opcode, payload = await read_frame(member)
                    if opcode == 9:
                        async with pen:
                            await member.send(frame(10, payload))
                    if opcode == TEXT and payload.startswith(b"soak %d " % me):
                        n = int(payload.split()[2].partition(b"--")[0])
                        self.lost["messages"] += n != said + 1
                        self.counts["messages"] += 1
                        said = n

    async def say(self, member, me, pen):
        n = 0
        while True:
            async with pen:
                await member.send(frame(TEXT, b"soak %d %d" % (me, n)))
            n += 1
            await trio.sleep(ROUND * self.dice.random())

    async def ask(self):
        """An answer, cut off somewhere and resumed: it is whole, with nothing twice."""
        while True:
            url = self.server.http
            async with stream("POST", url + CHAT, None, asking("Hello")) as response:
                got = await response.events(self.dice.randrange(1, 40))
            name = got[0].id.rpartition("-")[0]
            back = {"Last-Event-ID": got[-1].id}
            async with stream("GET", f"{url}/answers/{name}", back) as response:
                got += await response.events()
            whole = [event.n for event in got] == list(range(len(got)))
            self.lost["answers"] += not (whole and got[-1].data == "[DONE]")
            self.counts["answers"] += 1

    # ------------------------------------------------------------ who does all wrong

    async def churn(self):
        """Connections that end in every way."""
        n = 0
        while True:
            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(visit, self.server, n)
                    n += 1
            self.counts["churned"] += 10
            await trio.sleep(0.2)

    async def stick(self):
        """Members that never read, and one that talks until their buffers are full."""
        lines = [f"{k}: {v}" for k, v in HANDSHAKE.items()]
        ask = head("GET", "/room", "Host: localhost", *lines)
        while True:
            try:
                async with AsyncExitStack() as stack:
                    for _ in range(10):
                        stuck = await stack.enter_async_context(narrow(self.server.http))
                        await stuck.send(ask)
                    await self.shout(20)
            except* GONE:
                self.counts["too late"] += 1
            self.counts["stuck"] += 10

    async def shout(self, seconds):
        async with raw_member(self.server.ws) as member, trio.open_nursery() as nursery:
            nursery.start_soon(listen, member)
            with trio.move_on_after(seconds):
                while True:
                    await member.send(frame(TEXT, b"x" * 4000))
                    self.counts["shouts"] += 1
                    await trio.sleep(0.003)
            nursery.cancel_scope.cancel()

    async def crawl(self):
        """Heads that come a byte a second."""
        while True:
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(self.crawl_once)
            self.counts["slow heads"] += 50

    async def crawl_once(self):
        with suppress(*GONE):
            async with connect(self.server.http) as connection:
                for byte in head("GET", "/time", "Host: localhost", "X: " + "x" * 99):
                    await connection.send(bytes([byte]))
                    with trio.move_on_after(1):
                        await connection.receive()

    async def smuggle(self):
        """Requests with two readings, bodies in bad chunks, floods of pings."""
        while True:
            for lines in SHAPES.values():
                await self.throw(head("POST", CHAT, "Host: localhost", *lines))
            chunked = head("POST", CHAT, "Host: localhost", "Transfer-Encoding: chunked")
            for body in BODIES.values():
                await self.throw(chunked + body)
            with suppress(*GONE):
                async with raw_member(self.server.ws) as member:
                    await member.send(frame(9, b"x" * 100) * 2000)
                    reset(member.transport)
            self.counts["thrown"] += len(SHAPES) + len(BODIES) + 1

    async def throw(self, data, seconds=0.1):
        with suppress(*GONE):
            async with connect(self.server.http) as connection:
                await connection.send(data)
                with trio.move_on_after(seconds):
                    await connection.receive()

    async def pipeline(self):
        """1,500 requests in one packet, on five connections at a time."""
        packet = head("HEAD", "/metrics", "Host: localhost") * 1500
        while True:
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(self.throw, packet)
            self.counts["pipelined"] += 5 * 1500

    async def desert(self):
        """250 questions a second, each left at once."""
        body = json.dumps(asking("Hello")).encode()
        ask = head("POST", CHAT, "Host: localhost", f"Content-Length: {len(body)}") + body
        while True:
            with suppress(*GONE):
                async with connect(self.server.http) as connection:
                    await connection.send(ask)
                    reset(connection.transport)
            self.counts["deserted"] += 1
            await trio.sleep(1 / 250)

    async def hoard(self):
        """100 questions of 1 MiB at once; every other one lacks its end."""
        body = json.dumps(asking("x" * 2**20)).encode()
        ask = head("POST", CHAT, "Host: localhost", f"Content-Length: {len(body)}") + body
        while True:
            async with trio.open_nursery() as nursery:
                for n in range(100):
                    nursery.start_soon(self.throw, ask[: len(ask) - n % 2], 5)
            self.counts["hoarded"] += 100
            await trio.sleep(5)

    async def nest(self):
        """Questions at the limits of what is parsed."""
        lists = "[" * 100 + "]" * 100
        deep = json.dumps(asking("hi"))[:-1] + ',"x":[' + ",".join([lists] * 2900) + "]}"
        wide = json.dumps(asking("hi"))[:-1] + ',"x":[' + "1," * 900_000 + "1]}"
        while True:
            for text in (deep, wide):
                body = text.encode()
                lines = "Host: localhost", f"Content-Length: {len(body)}"
                await self.throw(head("POST", CHAT, *lines) + body, 1)
                self.counts["nested"] += 1
            await trio.sleep(20)

    async def drift(self):
        """Members that come and go."""
        while True:
            with suppress(*GONE):
                async with raw_member(self.server.ws) as member:
                    reset(member.transport)
            self.counts["drifted"] += 1
            await trio.sleep(0.02)

    # ------------------------------------------------------------------- what is seen

    async def report(self):
        while True:
            await self.line("")
            await trio.sleep(60)

    async def line(self, when):
        pid = self.server.process.pid
        asked = time.perf_counter()
        found = await health(self.server)
        took = (time.perf_counter() - asked) * 1000
        print(
            time.strftime("%H:%M:%S"),
            f"rss {resident(pid) / 2**20:.1f} MiB  fds {descriptors(pid)}",
            f"tasks {await tasks(self.server)}  cpu {processor(pid):.0f} s",
            f"healthz {took:.0f} ms  lost {sum(self.lost.values())}",
            {k: found[k] for k in ("readers", "answers", "members")},
            dict(self.counts),
            when,
            flush=True,
        )


async def listen(member):
    with suppress(*GONE):
        while True:
            await member.receive()
            member.buffer = b""


def watch(ports, readers, seconds):
    """How late each tick reaches each of these readers of each server, in ms."""
    selector = selectors.DefaultSelector()
    late, lost = {port: [] for port in ports}, Counter()
    for _ in range(readers):
        for port in ports:
            reader = socket.create_connection(("localhost", port))
            reader.sendall(head("GET", "/clock", "Host: localhost"))
            selector.register(reader, selectors.EVENT_READ, [port, None])
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for key, _ in selector.select(1):
            data, now = key.fileobj.recv(65536), time.time()
            port, last = key.data
            if not data:
                lost[port] += 1
                selector.unregister(key.fileobj)
            for n in map(int, re.findall(rb"\nid: clock-(\d+)\n\n", data)):
                lost[port] += last is not None and n != last + 1
                key.data[1] = last = n
                late[port].append((now - n) * 1000)
    for port in ports:
        waits = sorted(late[port])
        shown = {f"p{100 * p:g}": waits[int(p * len(waits))] for p in (0.5, 0.99, 0.999)}
        print(
            f"port {port}: {len(waits)} ticks, lost {lost[port]}",
            "  ".join(f"{name} {wait:.1f} ms" for name, wait in shown.items()),
            f"most {waits[-1]:.1f} ms",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--readers", type=int, default=1000)
    parser.add_argument("--watch", type=int, nargs="*", help="only watch these ports")
    options = parser.parse_args()
    if options.watch:
        return watch(options.watch, options.readers, options.minutes * 60)
    with tempfile.TemporaryDirectory() as folder:
        calm_folder = Path(folder, "calm")
        calm_folder.mkdir()
        server = Server(Path(folder), "--room-rate", "0", program=program())
        calm = Server(calm_folder, program=program())
        print(f"attacked: port {server.port}  calm: port {calm.port}")
        arguments = ["--minutes", options.minutes - 0.2, "--readers", options.readers]
        watching = [*arguments, "--watch", server.port, calm.port]
        watcher = subprocess.Popen([sys.executable, __file__, *map(str, watching)])
        soak = Soak(server, options.minutes)
        try:
            trio.run(soak.run)
            watcher.wait(60)
        finally:
            faults = server.stderr_text().count("Traceback")
            for process in (server, calm):
                process.stop()
            watcher.kill()
    print(f"lost: {dict(soak.lost)}  tracebacks: {faults}")
    return 1 if sum(soak.lost.values()) or faults else 0


if __name__ == "__main__":
    sys.exit(main())
