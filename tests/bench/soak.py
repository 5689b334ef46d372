"""Everything at once, as long as you like: `python tests/bench/soak.py --minutes 20`.

Steady clients that must lose nothing (clock readers, members, answers read to their
end and resumed) share one server with those of the fault tests: floods, resets, stuck
readers, slow heads, garbage. Each minute it prints what came and went, the server's
memory, descriptors and tasks; the exit code is 0 if no event was lost.
"""

import argparse
import random
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
            with suppress(*GONE):
                async with AsyncExitStack() as stack:
                    for _ in range(10):
                        stuck = await stack.enter_async_context(narrow(self.server.http))
                        await stuck.send(ask)
                    await self.shout(20)
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

    async def throw(self, data):
        with suppress(*GONE):
            async with connect(self.server.http) as connection:
                await connection.send(data)
                with trio.move_on_after(0.1):
                    await connection.receive()

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


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), "--room-rate", "0", program=program())
        soak = Soak(server, minutes)
        try:
            trio.run(soak.run)
        finally:
            faults = server.stderr_text().count("Traceback")
            server.stop()
    print(f"lost: {dict(soak.lost)}  tracebacks: {faults}")
    return 1 if sum(soak.lost.values()) or faults else 0


if __name__ == "__main__":
    sys.exit(main())
