"""What the tests drive the server with: real sockets, real processes, no mocks.

    Server      chatstream.py as a process of its own, on free ports
    fetch()     one request, its whole answer        stream()   one request, left open
    Response    head, body and events, read strictly by the order that real clients need
    Upstream    a model's server that sends exactly the bytes a test gives it
    Proxy       a connection that breaks where the test wants it to

Upstream and Proxy run in a thread each: a browser or a blocking SDK can use them too.
"""

import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trio

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 8  # seconds for anything that should come at once, on a busy machine too
ROOM_PROTOCOL = "chatstream.v1"
CHAT, OPENAI = "/chatgptApi/chatgpt_qa_stream", "/v1/chat/completions"
START = re.compile(
    r"^chatstream: (https?://\S+:(\d+))  (wss?://\S+:(\d+))  model: (.+)$"
)


# ------------------------------------------------------------------ what is installed


def need(names, how):
    """The path of the first of these programs, else a skip that says how to get it."""
    for name in names.split():
        if path := shutil.which(name):
            return path
    return missing(names, how)


def need_module(name, how):
    """Import a package that only some tests need."""
    if importlib.util.find_spec(name) is None:
        missing(name, how)
    return importlib.import_module(name)


def missing(what, how):
    if os.environ.get("CHATSTREAM_NO_SKIP") == "1":
        pytest.fail(f"{what} is missing: {how}")
    pytest.skip(f"{what} is missing: {how}")


# --------------------------------------------------------------------------- waiting


async def until(condition, seconds=PATIENCE):
    """Wait for something that another thread or process does."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 (no event comes from over there)
            await trio.sleep(0.01)


def wait_until(condition, seconds=PATIENCE):
    """until() for tests without Trio."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


# ------------------------------------------------------------------------ the server


def asking(prompt, **fields):
    """The body of a question."""
    return {"messages": [{"role": "user", "content": prompt}]} | fields


def clean_environment(extra=None):
    """The environment without anybody's real model account in it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")}
    return kept | (extra or {})


def command(*flags):
    return [sys.executable, str(ROOT / "chatstream.py"), *flags]


class Server:
    """chatstream.py in a process of its own, on free ports."""

    def __init__(self, folder, *flags, env=None, program=None):
        self.out, self.err = folder / "stdout", folder / "stderr"
        start = program or command()
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [*start, "--port", "0", "--room-port", "0", *flags],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=clean_environment(env),
                cwd=folder,
                start_new_session=True,  # so that workers can be killed with it
            )
        try:
            self._read_start_line()
        except BaseException:
            self.stop()
            raise

    def _read_start_line(self):
        try:
            wait_until(lambda: self.process.poll() is not None or self._find(), 20)
        except AssertionError:
            pytest.fail(f"no start line came:\n{self.log()}")
        if not (found := self._find()):
            pytest.fail(f"exit {self.process.returncode} at start:\n{self.log()}")
        self.http, port, self.ws, room_port, self.model = found.groups()
        self.port, self.room_port = int(port), int(room_port)

    def _find(self):
        """The start line, once all of it is there."""
        lines = self.log().splitlines(keepends=True)
        matches = (START.match(line[:-1]) for line in lines if line.endswith("\n"))
        return next(filter(None, matches), None)

    def stdout_text(self):
        return self.out.read_text(errors="backslashreplace")

    def stderr_text(self):
        return self.err.read_text(errors="backslashreplace")

    def log(self):
        return self.stdout_text() + self.stderr_text()

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    async def exit_code(self, seconds):
        """Its exit code, which must come within so many seconds."""
        await until(lambda: self.process.poll() is not None, seconds)
        return self.process.returncode

    def stop(self):
        """Ask, ask again (which means at once), then kill what is left of it."""
        for _ in range(2):
            if self.process.poll() is None:
                self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.7)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_to_exit(*flags, env=None, seconds=15):
    """Start a server that is expected not to come up."""
    return subprocess.run(
        command(*flags),
        check=False,
        env=clean_environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


# ---------------------------------------------------------------------- a raw client


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
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
        head = {"Host": host} | (headers or {})
        if body is not None:
            head = {"Content-Type": "application/json"} | head
            head.setdefault("Content-Length", str(len(body)))
        lines = [f"{method} {target} HTTP/1.1", *(f"{k}: {v}" for k, v in head.items())]
        await self.send("\r\n".join([*lines, "\r\n"]).encode("latin-1") + (body or b""))
        return await self.response(method)

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
        self._block, self._text = [], b""

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
            return event
        name, _, value = line.partition(": ")
        if line.startswith(":"):
            self.comments.append(line)
        elif name == "retry":
            self.retry.append(int(value))
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
    by some; an id that stands before its data is remembered too early by others)."""
    names = [name for name, _ in block]
    assert "data" in names, f"a blank line that ends no data: {block}"
    assert set(names) <= {"data", "id", "event"}, block
    assert "id" not in names or names.index("id") > names.index("data"), block
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


@contextmanager
def paused(*arguments):
    """A process that the test may stop (SIGSTOP); killed at the end."""
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


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


# -------------------------------------------------------------------- raw WebSockets

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10

HANDSHAKE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def frame(opcode, payload=b"", fin=True, length=None):
    """A client's frame; `length` lies about how much is to come."""
    size = len(payload) if length is None else length
    head = bytes([fin << 7 | opcode])
    if size < 126:
        head += bytes([0x80 | size])
    elif size < 65536:
        head += bytes([0x80 | 126]) + struct.pack("!H", size)
    else:
        head += bytes([0x80 | 127]) + struct.pack("!Q", size)
    return head + bytes(4) + payload  # masked with four zero bytes: a legal mask


async def read_frame(connection):
    """(opcode, payload) of a server's frame."""
    first, size = await connection.exactly(2)
    if size == 126:
        (size,) = struct.unpack("!H", await connection.exactly(2))
    elif size == 127:
        (size,) = struct.unpack("!Q", await connection.exactly(8))
    return first & 15, await connection.exactly(size)


async def close_code(connection):
    """The code of the close frame, past whatever was said before it."""
    while True:
        opcode, payload = await read_frame(connection)
        if opcode == CLOSE:
            return int.from_bytes(payload[:2])


@asynccontextmanager
async def raw_member(url, headers=None):
    """A member of the room that may break the protocol."""
    async with stream("GET", url, HANDSHAKE | (headers or {})) as response:
        assert response.status == 101, (await response.read()).body
        yield response.connection


# --------------------------------------------------------------- a server in a thread


class Background:
    """A small server in a thread of its own, on a free port."""

    def __enter__(self):
        ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._run, ready))
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *_):
        self.soon(self._scope.cancel)
        self._thread.join()

    def soon(self, function):
        """Call it in the server's own thread."""
        self._token.run_sync_soon(function)

    async def _run(self, ready):
        self._token = trio.lowlevel.current_trio_token()
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=2000)
        self.port = listener.socket.getsockname()[1]
        with trio.CancelScope() as self._scope:
            ready.set()
            await trio.serve_listeners(self._guarded, [listener])

    async def _guarded(self, transport):
        """Peers that break a connection are what many tests are about."""
        try:
            await self.handle(transport)
        except* (Cut, OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass


def reset(transport):
    """End a connection by RST: linger on, for no time at all."""
    transport = getattr(transport, "transport_stream", transport)  # under TLS
    transport.socket.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
    )
    transport.socket.close()


# --------------------------------------------------------------------- an upstream

FIN, RST, HOLD = "end the connection", "reset it", "say no more and wait"


class Gate:
    """A step of a script at which the upstream waits until the test says go."""

    def __init__(self):
        self._open = threading.Event()

    def open(self):
        self._open.set()

    async def passed(self):
        await until(self._open.is_set, math.inf)


@dataclass
class Heard:
    """One request, as the upstream got it."""

    method: str
    target: str
    headers: Headers
    body: bytes
    at: float = field(default_factory=time.monotonic)
    closed_at: float | None = None  # when its connection had ended

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def prompt(self):
        """What was asked. That names the script. (None: a request of another kind.)"""
        return prompt_of(self.json) if self.body else None


def prompt_of(body):
    """The last thing said in a question, in whichever protocol it is asked."""
    said = next((body[k] for k in ("messages", "input", "prompt") if body.get(k)), None)
    while isinstance(said, list | dict):
        if isinstance(said, list):
            said = said[-1]
        else:
            said = said.get("content") or said.get("text")
    return said


class Upstream(Background):
    """A model's server that follows a script for each prompt.

    A script is bytes to send as they are, seconds to wait, a Gate, or one of FIN, RST,
    HOLD. A single function of the request may stand for them.
    """

    def __init__(self):
        self.heard, self._scripts, self._numbers = [], {}, itertools.count(1)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def script(self, *steps):
        """A prompt that gets these steps for an answer."""
        prompt = f"script {next(self._numbers)}"
        self._scripts[prompt] = steps
        return prompt

    def asked(self, prompt):
        """The requests for this prompt."""
        return [heard for heard in list(self.heard) if heard.prompt == prompt]

    async def handle(self, transport):
        """Answer requests in order; notice at once when the peer goes away."""
        arrived, served = trio.open_memory_channel(10)
        on_it = []
        try:
            async with transport, trio.open_nursery() as nursery:
                scope = nursery.cancel_scope
                nursery.start_soon(self._answer, transport, served, scope)
                await self._listen(Connection(transport, math.inf), arrived, on_it)
        finally:
            for heard in on_it:
                heard.closed_at = time.monotonic()

    async def _listen(self, connection, arrived, on_it):
        while True:
            lines = (await connection.up_to(b"\r\n\r\n")).split(b"\r\n")[:-2]
            method, path, _ = lines[0].decode().split()
            headers = Headers.parse(lines[1:])
            body = await connection.exactly(int(headers.get("content-length", 0)))
            heard = Heard(method, path, headers, body)
            on_it.append(heard)
            self.heard.append(heard)
            await arrived.send(heard)

    async def _answer(self, transport, served, scope):
        async for heard in served:
            steps = self._scripts.get(heard.prompt) or self.other(heard)
            if len(steps) == 1 and callable(steps[0]):
                steps = steps[0](heard)
            for step in steps:
                if not await self._play(transport, step):
                    return scope.cancel()

    def other(self, heard):
        """Whatever is not a question: the list of models."""
        model = {"id": "scripted", "object": "model", "created": 1, "owned_by": "test"}
        assert (heard.method, heard.target) == ("GET", "/v1/models")
        return [plain(200, {"object": "list", "data": [model]})]

    async def _play(self, transport, step):
        """False once this connection is over."""
        if step is FIN:
            return False
        if step is RST:
            return reset(transport)
        if step is HOLD:
            await trio.sleep_forever()
        elif isinstance(step, Gate):
            await step.passed()
        elif isinstance(step, bytes):
            await transport.send_all(step)
        else:
            await trio.sleep(step)
        return True


class SecureUpstream(Upstream):
    """The same over TLS, as the models on the internet are reached."""

    def __init__(self, cert, key):
        super().__init__()
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(cert, key)

    @property
    def url(self):
        return f"https://localhost:{self.port}/v1"

    async def handle(self, transport):
        await super().handle(
            trio.SSLStream(
                transport, self._context, server_side=True, https_compatible=True
            )
        )


SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
DONE = b"data: [DONE]\n\n"


def delta(content=None, finish=None, **extra):
    """A chunk of an answer, as the OpenAI protocol has it."""
    change = {} if content is None else {"content": content}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "scripted",
        "choices": [{"index": 0, "delta": change, "finish_reason": finish}],
    } | extra


def data(payload):
    """An event with this payload."""
    return f"data: {json.dumps(payload, ensure_ascii=False)}\n\n".encode()


def sse(*steps, head=SSE_HEAD):
    """A script for a streamed answer; dicts are events, bytes go in as they are.

    It is framed in chunks and properly ended, unless its last step breaks it off.
    """
    yield head + b"Transfer-Encoding: chunked\r\n\r\n"
    for step in steps:
        step = data(step) if isinstance(step, dict) else step
        yield b"%x\r\n%b\r\n" % (len(step), step) if isinstance(step, bytes) else step
    if steps[-1] not in (FIN, RST, HOLD):
        yield b"0\r\n\r\n"


def answer(*words):
    """The script of a sound answer that says these words; other steps may be among
    them."""
    chunks = [delta(word) if isinstance(word, str) else word for word in words]
    return sse(*chunks, delta(finish="stop"), DONE)


def plain(status, body, *headers, content_type="application/json"):
    """The one step of an answer that does not stream."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} Because", f"Content-Type: {content_type}", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "\r\n"]).encode() + body


# --------------------------------------------------------------------------- Redis


class Redis:
    """A real redis-server on a port of its own that can go away and come back."""

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, free_port(), None

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}"

    def start(self):
        """Every write goes to its file, so that it comes back as it went."""
        options = f"--port {self.port} --bind 127.0.0.1 --dir {self.folder}"
        durable = ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        self.process = subprocess.Popen(
            ["redis-server", *options.split(), *durable],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        wait_until(self.answers)

    def answers(self):
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)) as s:
            s.sendall(b"PING\r\n")
            return s.recv(100).startswith(b"+PONG")
        return False

    def do(self, line):
        """A command as one would type it; returns what Redis says."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(f"{line}\r\n".encode())
            return connection.recv(65536)

    def forget(self):
        """All that it has written to its disk."""
        for path in sorted(self.folder.rglob("*.aof*")):
            if path.is_file():
                path.unlink()

    def stop(self):
        """At once, as if its machine had gone."""
        if self.process:
            self.process.kill()
            self.process.wait()


def refused(port):
    """Nobody listens there (any more)."""
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) != 0


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


# ----------------------------------------------------------------- a breaking line


class Proxy(Background):
    """Passes bytes on, and resets the connection in the middle of each mark."""

    def __init__(self, port):
        self.server_port, self.marks, self.cuts = port, deque(), 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def cut_at(self, *marks):
        """Cut once inside each of these, in their order, on the way to the client."""
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
            if self.marks and (at := seen.find(self.marks[0])) >= 0:
                half = at + len(self.marks.popleft()) // 2 - (len(seen) - len(piece))
                self.cuts += 1
                await client.send_all(piece[: max(half, 0)])
                return reset(client)
            await client.send_all(piece)


# ------------------------------------------------------------------- a static server


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
