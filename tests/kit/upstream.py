"""A model's server that sends exactly the bytes a test gives it."""

import functools
import itertools
import json
import math
import ssl
import threading
import time
from dataclasses import dataclass, field

import trio

from .background import Background
from .client import Connection, Headers, reset
from .common import until

FIN, RST, HOLD = "end the connection", "reset it", "say no more and wait"
SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
DONE = b"data: [DONE]\n\n"


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

    @functools.cached_property  # a test asks again and again, of each request of all tests
    def prompt(self):
        """What was asked. That names the script. (None: a request of another kind.)"""
        return prompt_of(self.json) if self.body else None


def prompt_of(body):
    """The last thing said in a question, in whichever protocol it is asked."""
    said = next((body[k] for k in ("messages", "input", "prompt") if body.get(k)), None)
    while isinstance(said, list | dict):
        part = said[-1] if isinstance(said, list) else said
        is_part = isinstance(part, dict)
        said = part.get("content") or part.get("text") if is_part else part
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
            trio.SSLStream(transport, self._context, server_side=True, https_compatible=True)
        )


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
    lines = [f"HTTP/1.1 {status} Because", f"Content-Type: {content_type}", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "\r\n"]).encode() + body


def whole_answer(text=None, finish="stop", **said):
    """The one step of a completion that was not to be streamed."""
    message = {"role": "assistant", "content": text} | said
    choice = {"index": 0, "message": message, "finish_reason": finish}
    usage = {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}
    chunk = delta() | {"object": "chat.completion", "choices": [choice], "usage": usage}
    return plain(200, chunk)
