"""A raw client: HTTP/1.1 byte for byte.

fetch()     one request, its whole answer        stream()   one request, left open
Response    head, body and events, read strictly by the order that real clients need
"""

import json
import select
import socket
import ssl
import struct
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import trio

from .common import PATIENCE

CHAT, OPENAI = "/chatgptApi/chatgpt_qa_stream", "/v1/chat/completions"


def asking(prompt, **fields):
    """The body of a question."""
    return {"messages": [{"role": "user", "content": prompt}]} | fields


@dataclass
class Event:
    """One event of a stream, as a reader sees it."""

    data: str
    id: str | None = None
    type: str = "message"

    @property
    def json(self):
        return json.loads(self.data)

    @property
    def n(self):
        """The number in its id, `<log>-<n>`."""
        return int(self.id.rpartition("-")[2])


class Cut(Exception):
    """The connection ended before the answer did."""


class Headers(dict):
    """Names in lower case; a header sent twice has its values joined."""

    @classmethod
    def parse(cls, lines):
        headers = cls()
        for line in lines:
            name, _, value = line.decode("latin-1").partition(":")
            name, value = name.lower(), value.strip()
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        return headers


class Connection:
    """One HTTP/1.1 connection, byte for byte."""

    def __init__(self, transport, patience=PATIENCE):
        self.transport, self.patience = transport, patience
        self.buffer = b""

    async def send(self, data):
        with trio.fail_after(PATIENCE):
            await self.transport.send_all(data)

    async def receive(self):
        """More bytes, or Cut where there are no more."""
        with trio.fail_after(self.patience):
            try:
                data = await self.transport.receive_some(65536)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise Cut(str(error)) from None
        if not data:
            raise Cut("end of file")
        return data

    @property
    def silent(self):
        """Nothing has come that was not read."""
        sock = self.transport.socket
        return not self.buffer and not select.select([sock], [], [], 0)[0]

    async def line(self):
        return (await self.up_to(b"\n")).rstrip(b"\r\n")

    async def up_to(self, mark):
        while mark not in self.buffer:
            self.buffer += await self.receive()
        found, _, self.buffer = self.buffer.partition(mark)
        return found + mark

    async def exactly(self, count):
        while len(self.buffer) < count:
            self.buffer += await self.receive()
        found, self.buffer = self.buffer[:count], self.buffer[count:]
        return found

    async def request(self, method, target, headers=None, body=None, host="127.0.0.1"):
        """Send one request and read the head of its answer."""
        await self.ask(method, target, headers, body, host)
        return await self.response(method)

    async def ask(self, method, target, headers=None, body=None, host="127.0.0.1"):
        """Send one request."""
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
        head = {"Host": host} | (headers or {})
        if body is not None:
            head = {"Content-Type": "application/json"} | head
            head.setdefault("Content-Length", str(len(body)))
        lines = [f"{method} {target} HTTP/1.1", *(f"{k}: {v}" for k, v in head.items())]
        await self.send("\r\n".join([*lines, "\r\n"]).encode("latin-1") + (body or b""))

    async def response(self, method="GET"):
        lines = (await self.up_to(b"\r\n\r\n")).split(b"\r\n")[:-2]
        status = int(lines[0].split()[1])
        if status == 100:
            return await self.response(method)
        return Response(self, method, status, Headers.parse(lines[1:]))


class Response:
    """An answer's head, then its body in pieces, whole, or as events."""

    def __init__(self, connection, method, status, headers):
        self.connection, self.status, self.headers = connection, status, headers
        self.body = b""  # all of it, once read() has returned
        self.retry, self.comments = [], []
        self.ended = method == "HEAD" or status in (204, 304)
        self._left = int(headers.get("content-length", 0))
        self._block, self._text, self._opened = [], b"", False
        self.opening_id = None

    @property
    def json(self):
        assert self.headers["content-type"].startswith("application/json"), self.body
        return json.loads(self.body)

    @property
    def error(self):
        """What is in an OpenAI error body, its shape checked."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert error["type"]
        return error

    async def piece(self):
        """Some more of the body; b"" at its proper end, Cut at any other."""
        if self.ended:
            return b""
        if self.headers.get("transfer-encoding") == "chunked":
            data = await self._chunk()
        elif "content-length" in self.headers:
            data = await self._counted()
        else:
            data = await self._to_the_end()
        self.ended = not data
        return data

    async def _chunk(self):
        size = int(await self.connection.line(), 16)
        data = await self.connection.exactly(size)
        assert await self.connection.exactly(2) == b"\r\n"
        return data

    async def _counted(self):
        data = await self.connection.exactly(self._left)
        self._left = 0
        return data

    async def _to_the_end(self):
        data, self.connection.buffer = self.connection.buffer, b""
        with suppress(Cut):
            return data or await self.connection.receive()
        return b""

    async def read(self):
        while data := await self.piece():
            self.body += data
        return self

    async def event(self):
        """The next event; None at the proper end of the stream."""
        while True:
            line, found, rest = self._text.partition(b"\n")
            if not found:
                data = await self.piece()
                if not data:
                    assert not self._block, f"ends inside an event: {self._block}"
                    return None
                self._text += data
                continue
            self._text = rest
            if event := self._line(line.decode()):
                return event

    def _line(self, line):
        if not line:
            event, self._block = make_event(self._block), []
            self._opened = True
            return event
        name, _, value = line.partition(": ")
        if line.startswith(":"):
            self.comments.append(line)
        elif name == "retry":
            self.retry.append(int(value))
        elif name == "id" and not self._opened and not self._block:
            self.opening_id = value  # after which a resumed stream goes on
        else:
            self._block.append((name, value))
        return None

    async def events(self, count=None):
        """The next so many events, or all to the proper end."""
        found = []
        while count is None or len(found) < count:
            event = await self.event()
            if event is None:
                assert count is None, f"ended after {found}"
                return found
            found.append(event)
        return found


def make_event(block):
    """Check the order of lines that real clients need (an empty block is dispatched
    by some; an id that stands before its data is remembered too early by others).

    But an answer's first block, or a resumed one's, opens with the id after which it
    begins: that is what a client is to remember until there is more.
    """
    names = [name for name, _ in block]
    assert "data" in names, f"a blank line that ends no data: {block}"
    assert set(names) <= {"data", "id", "event"}, block
    later = names[1:] if names[0] == "id" else names
    assert "id" not in later or later.index("id") > later.index("data"), block
    fields = dict(block)
    data = "\n".join(value for name, value in block if name == "data")
    return Event(data, fields.get("id"), fields.get("event", "message"))


def insecure():
    """TLS without asking who signed: the tests' certificate is its own authority."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@asynccontextmanager
async def connect(url):
    """A connection to the server of this URL, dropped without a word at the end."""
    parts = urlsplit(url)
    transport = await trio.open_tcp_stream(parts.hostname, parts.port)
    async with over(transport, parts.scheme) as connection:
        yield connection


@asynccontextmanager
async def over(transport, scheme):
    if scheme in ("https", "wss"):
        transport = trio.SSLStream(transport, insecure(), https_compatible=True)
    try:
        yield Connection(transport)
    finally:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(transport)


def target(url):
    parts = urlsplit(url)
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


@asynccontextmanager
async def stream(method, url, headers=None, body=None):
    """One request whose answer stays open inside the block."""
    host = urlsplit(url).netloc
    async with connect(url) as connection:
        yield await connection.request(method, target(url), headers, body, host)


async def fetch(method, url, headers=None, body=None):
    """One request and its whole answer."""
    async with stream(method, url, headers, body) as response:
        return await response.read()


async def fetch_events(method, url, headers=None, body=None):
    """One request and all events of its answer, to a proper end."""
    async with stream(method, url, headers, body) as response:
        assert response.status == 200, (await response.read()).body
        return await response.events()


@asynccontextmanager
async def narrow(url, source=None):
    """A connection whose own side is full after a few kilobytes."""
    parts = urlsplit(url)
    plain = trio.socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    if source:
        await plain.bind((source, 0))
    await plain.connect((parts.hostname, parts.port))
    async with over(trio.SocketStream(plain), parts.scheme) as connection:
        yield connection


async def drain(connection, seconds=PATIENCE):
    """All that still comes, to the end of the connection (or of our patience)."""
    data, connection.buffer = connection.buffer, b""
    with trio.move_on_after(seconds):
        with suppress(trio.BrokenResourceError, ssl.SSLError):
            while more := await connection.transport.receive_some(65536):
                data += more
        return data
    raise AssertionError(f"still open after {seconds} s, got {data[:200]!r}")


@asynccontextmanager
async def raw_connection(url, data=b""):
    """A connection on which these bytes have been sent already."""
    async with connect(url.replace("ws:", "http:")) as connection:
        await connection.send(data)
        yield connection


def head(method, path, *headers):
    """A request as bytes, exactly these."""
    lines = [f"{method} {path} HTTP/1.1".encode()]
    lines += [h.encode("latin-1") if isinstance(h, str) else h for h in headers]
    return b"\r\n".join([*lines, b"\r\n"])


def reset(transport):
    """End a connection by RST: linger on, for no time at all."""
    transport = getattr(transport, "transport_stream", transport)  # under TLS
    transport.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.socket.close()
