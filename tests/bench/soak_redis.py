"""Three processes on one Redis, while everything breaks: `soak_redis.py --minutes 20`.

Every few seconds a process is frozen, killed or stopped and started anew, or Redis is
frozen, killed, or killed and started empty. Meanwhile members talk and answers are read
at two processes at once. What must hold: a message that its sender has heard reaches all
others or they are told of a gap, a message that was refused is never heard, an answer is
the same for all who read it to its end, and in the end all counts are right.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import trio
from trio_websocket import ConnectionClosed, HandshakeError, open_websocket_url

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kit import OPENAI, ROOM_PROTOCOL, Cut, Redis, Server, asking, fetch, frozen, program, stream

GONE = (
    Cut,
    OSError,
    AssertionError,
    ConnectionClosed,
    HandshakeError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
)


class Soak:
    def __init__(self, folder, seconds, seed):
        self.folder, self.seconds = folder, seconds
        self.dice = random.Random(seed)
        (folder / "redis").mkdir()
        self.redis = Redis(folder / "redis")
        self.redis.start()
        self.servers, self.old, self.started = [], [], 0
        self.counts, self.lost = Counter(), Counter()
        self.stored = {}  # what a sender has heard: its id
        self.texts = {}  # what stands at each place
        self.refused, self.heard = set(), set()
        self.chains = []  # what one member heard without being told of a gap
        self.calm = trio.Event()
        self.last_words = set()

    def start(self):
        self.started += 1
        home = self.folder / str(self.started)
        home.mkdir()
        flags = ("--redis", self.redis.url, "--linger", "3", "--room-rate", "0", "--grace", "1")
        return Server(home, *flags, program=program())

    async def run(self):
        self.servers = [await trio.to_thread.run_sync(self.start) for _ in range(3)]
        async with trio.open_nursery() as nursery:
            for n in range(6):
                nursery.start_soon(self.member, n)
            for _ in range(4):
                nursery.start_soon(self.ask)
            began = time.monotonic()
            while time.monotonic() < began + self.seconds:
                await self.wreck()
                await trio.sleep(self.dice.uniform(1, 6))
            self.calm.set()
            await trio.sleep(15)
            nursery.cancel_scope.cancel()
        await self.check()

    # ---------------------------------------------------------------- what breaks

    async def wreck(self):
        deeds = (self.freeze, self.freeze, self.kill, self.stop, self.freeze_redis,
                 self.restart_redis, self.empty_redis)  # fmt: skip
        deed = self.dice.choice(deeds)
        self.counts[deed.__name__] += 1
        print(f"{time.strftime('%X')} {deed.__name__}", flush=True)
        await deed()

    async def freeze(self):
        with frozen(self.dice.choice(self.servers).process):
            await trio.sleep(self.dice.uniform(1, 10))

    async def kill(self):
        server = self.dice.choice(self.servers)
        server.process.kill()
        await self.replace(server)

    async def stop(self):
        server = self.dice.choice(self.servers)
        server.signal()
        with suppress(AssertionError, trio.TooSlowError):
            if await server.exit_code(6) != 0:
                self.lost["exit code"] += 1
        await self.replace(server)

    async def replace(self, server):
        await trio.sleep(self.dice.uniform(0, 2))
        new = await trio.to_thread.run_sync(self.start)
        self.servers[self.servers.index(server)] = new
        self.old.append(server)

    async def freeze_redis(self):
        with frozen(self.redis.process):
            await trio.sleep(self.dice.uniform(1, 6))

    async def restart_redis(self, empty=False):
        self.redis.stop()
        await trio.sleep(self.dice.uniform(0, 4))
        if empty:
            self.redis.forget()
        await trio.to_thread.run_sync(self.redis.start)

    async def empty_redis(self):
        await self.restart_redis(empty=True)

    # ------------------------------------------------------------ who must lose nothing

    async def member(self, n):
        last, chain = None, None

        async def session(server):
            nonlocal last, chain
            query = f"?name=m{n}" + (f"&after={last}" if last else "")
            async with self.connect(server, query) as connection, trio.open_nursery() as nursery:
                nursery.start_soon(self.talk, connection, n)
                while True:
                    with trio.fail_after(30):
                        event = json.loads(await connection.get_message())
                    last, chain = self.take(event, last, chain)

        while True:
            try:
                await session(self.dice.choice(self.servers))
            except* GONE:
                self.counts["reconnects"] += 1
            await trio.sleep(0.3)

    def connect(self, server, query):
        return open_websocket_url(
            f"{server.ws}/room{query}",
            subprotocols=[ROOM_PROTOCOL],
            connect_timeout=5,
            disconnect_timeout=1,
        )

    def take(self, event, last, chain):
        if event["type"] == "error":
            self.refused.add(event["error"] and event.get("key"))
            self.counts["refused"] += 1
            return last, chain
        if event["type"] == "gap":
            self.counts["gaps"] += 1
            return last, None
        if "id" not in event:
            return last, chain
        name, _, place = event["id"].rpartition("-")
        if chain is None or chain[0] != name:
            if chain:
                self.counts["rooms"] += 1
            chain = (name, [])
            self.chains.append(chain)
        if chain[1] and int(place) <= chain[1][-1]:
            self.lost["twice or out of order"] += 1
        chain[1].append(int(place))
        if event["type"] == "message":
            self.heard.add(event["text"])
            if self.texts.setdefault(event["id"], event["text"]) != event["text"]:
                self.lost["two messages at one place"] += 1
            self.stored[event["text"]] = (name, int(place))
            if event["text"].startswith("last"):
                self.last_words.add((event["text"], id(chain)))
        return event["id"], chain

    async def talk(self, connection, n):
        word = 0
        while True:
            word += 1
            calm = "last " if self.calm.is_set() else ""
            text = f"{calm}{n} {word} {self.dice.random()}"
            await connection.send_message(json.dumps({"text": text, "key": text}))
            self.counts["said"] += 1
            await trio.sleep(self.dice.uniform(0.02, 0.3))

    async def ask(self):
        while not self.calm.is_set():
            with trio.move_on_after(90) as scope:
                try:
                    await self.ask_once(*self.dice.sample(self.servers, 2))
                except* GONE:
                    self.counts["not asked"] += 1
            if scope.cancelled_caught:
                self.lost["readers without an end"] += 1
            await trio.sleep(0.2)

    async def ask_once(self, one, other):
        body, read = asking(f"question {self.dice.random()}", stream=True), {}
        async with stream("POST", one.http + OPENAI, None, body) as here:
            url = f"{other.http}/answers/{here.headers.get('x-answer-id')}"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.follow, url, read)
                with suppress(*GONE):
                    read["here"] = [event.data for event in await here.events()]
        self.compare(read)

    async def follow(self, url, read):
        with suppress(*GONE):
            async with stream("GET", url) as there:
                if there.status == 200:
                    events = await there.events()
                    self.counts["gaps in answers"] += any(e.type == "gap" for e in events)
                    read["there"] = [event.data for event in events if event.type != "gap"]
                else:
                    self.counts[f"follow {there.status}"] += 1

    def compare(self, read):
        ended = [data for data in read.values() if data and data[-1] == "[DONE]"]
        self.counts[f"answers whole at {len(ended)}"] += 1
        if len(ended) == 2 and ended[0] != ended[1]:
            short, long = sorted(ended, key=len)
            if long[-len(short) :] != short:
                self.lost["answers that differ"] += 1

    # ---------------------------------------------------------------------- in the end

    async def check(self):
        for text in self.refused & self.heard:
            self.lost["heard though refused"] += 1
            print("heard though refused", text)
        for name, places in self.chains:
            kept = set(places)
            for room, place in self.stored.values():
                if room == name and places[0] < place < places[-1] and place not in kept:
                    self.lost["messages"] += 1
        calm = Counter(text for text, _ in self.last_words)
        if not calm or max(calm.values()) < 6:
            self.lost["deaf in the end"] += 1
        await trio.sleep(6)
        for server in self.servers:
            health = (await fetch("GET", server.http + "/healthz")).json
            print(health)
            if (health["members"], health["answers"], health["readers"]) != (0, 0, 0):
                self.lost["counts"] += 1
            with suppress(*GONE):
                await self.look(server)

    async def look(self, server):
        """A member that comes now is the only one."""
        async with self.connect(server, "?name=late") as late:
            while True:
                with trio.fail_after(5):
                    event = json.loads(await late.get_message())
                if event["type"] == "joined" and event["name"] == "late":
                    self.counts[f"members in the end: {event['members']}"] += 1
                    return

    def end(self):
        faults = 0
        for server in (*self.old, *self.servers):
            server.stop()
            log = server.log()
            if "Traceback" in log or " ERROR " in log:
                faults += 1
                print(log[-3000:])
        self.redis.stop()
        print(f"{dict(self.counts)}\nlost: {dict(self.lost)}  faults: {faults}")
        return 1 if sum(self.lost.values()) or faults else 0


@contextmanager
def folder():
    path = Path(tempfile.mkdtemp(prefix="chatstream-soak-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=6455)
    given = parser.parse_args()
    with folder() as path:
        soak = Soak(path, given.minutes * 60, given.seed)
        try:
            trio.run(soak.run)
        finally:
            code = soak.end()
    return code


if __name__ == "__main__":
    sys.exit(main())
