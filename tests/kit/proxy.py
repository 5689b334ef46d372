"""Connections that break or stall where the test wants it.

Proxy       resets the connection at each mark
EventProxy  resets it after so many events
Line        between a page and a server: cut, stalled, down, byte by byte; and it counts
            what passes
"""

import re
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import trio

from .background import Background
from .client import reset
from .common import until


class Proxy(Background):
    """Passes bytes on, and resets the connection at each mark."""

    def __init__(self, port):
        self.server_port, self.marks, self.cuts = port, deque(), 0
        self.seen = b""  # all that the server has sent

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def cut_at(self, *marks):
        """Cut once at each of these, in their order, on the way to the client: in the
        middle of bytes, or half a second after what a pattern matches. (What a reset
        overtakes, a page never sees.)"""
        self.marks.extend(marks)

    async def handle(self, client):
        server = await trio.open_tcp_stream("127.0.0.1", self.server_port)
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(self._up, client, server, nursery.cancel_scope)
            await self._down(server, client)
            nursery.cancel_scope.cancel()

    async def _up(self, client, server, scope):
        async for piece in client:
            await server.send_all(piece)
        scope.cancel()

    async def _down(self, server, client):
        seen = b""
        async for piece in server:
            seen += piece
            self.seen += piece
            if self.marks and (place := place_of(self.marks[0], seen)):
                mark = self.marks.popleft()
                await client.send_all(piece[: max(place - len(seen) + len(piece), 0)])
                await trio.sleep(0.5 if isinstance(mark, re.Pattern) else 0)
                self.cuts += 1
                return reset(client)
            await client.send_all(piece)


def place_of(mark, seen):
    """Where to cut for this mark, once it is there."""
    if isinstance(mark, re.Pattern):
        found = mark.search(seen)
        return found and found.end()
    at = seen.find(mark)
    return at + len(mark) // 2 if at >= 0 else None


class EventProxy(Proxy):
    """Passes bytes on, and resets a connection after so many more events."""

    def __init__(self, port):
        super().__init__(port)
        self._after, self._seen = None, b""

    def cut_after(self, count):
        self._after, self._seen = count, b""

    async def _down(self, server, client):
        async for piece in server:
            place = self._place_in(piece)
            await client.send_all(piece[:place])
            if place is not None:
                await until(lambda: not unread(client))
                return reset(client)

    def _place_in(self, piece):
        """Where in this piece the connection is to be cut, if it is."""
        if self._after is None:
            return None
        before, self._seen = self._seen, self._seen + piece
        *events, _ = self._seen.split(b"\n\n")
        if len(events) < self._after:
            return None
        place = sum(len(event) + 2 for event in events[: self._after])
        self._after, self.cuts = None, self.cuts + 1
        return place - len(before)


def unread(transport):
    """How many bytes the peer, a process on this machine, has not read yet.

    A reset would take them away from it.
    """
    port = transport.socket.getpeername()[1]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].rpartition(":")[2], 16) == port:
            return int(fields[4].rpartition(":")[2], 16)
    return 0


@dataclass
class Passed:
    """One request: its head, and the bytes each way until the next one."""

    head: str = ""
    up: int = 0
    down: int = 0


class Line(Background):
    """Passes bytes on to a server, as well or as badly as the test wants."""

    def __init__(self, port=None):
        self.server_port = port
        self.is_down = False  # no connection is accepted
        self.is_deaf = False  # what the client sends is lost
        self.byte_by_byte = False
        self.requests = []  # every one there was, as Passed
        self._open = set()
        self._flowing = threading.Event()
        self._flowing.set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def cut(self):
        """Reset every connection there is."""
        self.soon(lambda: [reset(transport) for transport in list(self._open)])

    def stall(self):
        """From now on nothing arrives, and no connection is seen to end."""
        self._flowing.clear()

    def flow(self):
        """After a cut that was asked for before: what was held back does not overtake it."""
        self.soon(self._flowing.set)

    def passed(self, *marks):
        """The bytes, up and down, of all requests that have these in their heads."""
        found = [r for r in self.requests if all(mark in r.head for mark in marks)]
        return sum(r.up for r in found), sum(r.down for r in found)

    async def handle(self, client):
        if self.is_down:
            return reset(client)
        self._open.add(client)
        try:
            await self._pass_on(client)
        finally:
            self._open.discard(client)

    async def _pass_on(self, client):
        server = await trio.open_tcp_stream("127.0.0.1", self.server_port)
        passing = [Passed()]  # what is none, and then the requests of this connection
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(self._up, client, server, passing, nursery.cancel_scope)
            async for piece in server:
                passing[-1].down += len(piece)
                await self._deliver(client, piece)
            await self._until_flowing()
            nursery.cancel_scope.cancel()

    async def _up(self, client, server, passing, scope):
        async for piece in client:
            if piece.startswith((b"GET ", b"POST ", b"DELETE ")):
                passing.append(Passed(piece.decode("latin-1")))
                self.requests.append(passing[-1])
            passing[-1].up += len(piece)
            if not self.is_deaf:
                await server.send_all(piece)
        scope.cancel()

    async def _deliver(self, client, piece):
        size = 1 if self.byte_by_byte else len(piece)
        for start in range(0, len(piece), size):
            await self._until_flowing()
            await client.send_all(piece[start : start + size])

    async def _until_flowing(self):
        while not self._flowing.is_set():  # noqa: ASYNC110 (set by another thread)
            await trio.sleep(0.01)
