"""Lines that misbehave, for what a page does about it.

Line        between a page and a real server: cut, stalled, down, byte by byte; and it
            counts what passes
Scripted    a server that sends exactly the bytes a test gives it, to any request
"""

import threading
from collections import deque
from dataclasses import dataclass, field

import trio
from kit import FIN, HOLD, Background, Connection, Cut, Headers, reset


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
        self._flowing.set()

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
        passing = []  # the requests of this connection
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


@dataclass
class Asked:
    method: str
    target: str
    headers: Headers
    body: bytes
    ended: threading.Event = field(default_factory=threading.Event)


class Scripted(Background):
    """Answers each request, from whatever page, by the next of these scripts; the last
    of them stands for all further ones. A script is bytes, seconds, FIN or HOLD."""

    def __init__(self, *scripts, files=None):
        self.scripts, self.files = deque(scripts), files or {}
        self.asked = []  # without those for files

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, transport):
        connection = Connection(transport, float("inf"))
        async with transport:
            while asked := await self._request(connection):
                if asked.target in self.files:
                    await transport.send_all(document(*self.files[asked.target]))
                    continue
                return await self._answer(transport, connection, asked)

    async def _request(self, connection):
        lines = (await connection.up_to(b"\r\n\r\n")).split(b"\r\n")[:-2]
        method, target, _ = lines[0].decode().split()
        headers = Headers.parse(lines[1:])
        body = await connection.exactly(int(headers.get("content-length", 0)))
        return Asked(method, target, headers, body)

    async def _answer(self, transport, connection, asked):
        self.asked.append(asked)
        script = self.scripts.popleft() if len(self.scripts) > 1 else self.scripts[0]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, connection, asked)
            for step in script:
                if step is FIN:
                    break
                if step is HOLD:
                    await trio.sleep_forever()
                elif isinstance(step, bytes):
                    await transport.send_all(step)
                else:
                    await trio.sleep(step)
            nursery.cancel_scope.cancel()

    async def _watch(self, connection, asked):
        """Whether the reader went away by itself."""
        try:
            await connection.receive()
        except Cut:
            asked.ended.set()
            raise


def document(content_type, body):
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
