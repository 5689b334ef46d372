"""Servers of other origins, for pages.

site()     the files of a folder
Scripted   sends exactly the bytes a test gives it, to any request
"""

import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from .background import Background
from .client import Connection, Cut, Headers
from .upstream import FIN, HOLD


@contextmanager
def site(folder):
    """Pages of another origin, as a developer's own web server would have them."""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def translate_path(self, path):
            """Modules import './parse' and mean the file parse.js."""
            found = super().translate_path(path)
            return found if Path(found).exists() else f"{found}.js"

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


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
