"""What the fault tests attack with, and how they see that nobody else was harmed.

unharmed()   around an attack: the server lives, and a reader has lost no tick
vitals()     descriptors and resident memory of the server's process
H2           one HTTP/2 connection that may break every rule
certificate  a self-signed one, made by the openssl command
"""

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import trio
from kit import (
    PATIENCE,
    PING,
    PONG,
    ROOT,
    Headers,
    connect,
    fetch,
    frame,
    insecure,
    need,
    over,
    read_frame,
    stream,
    until,
)

FULL = (
    os.environ.get("CHATSTREAM_FULL") == "1"
)  # real time limits, thousands of clients

# Starts the server with other time limits, and tells on SIGUSR1 how many tasks it has.
PROGRAM = """
import signal, sys
sys.path.insert(0, {root!r})
import chatstream, trio
for name, value in {limits!r}.items():
    assert hasattr(chatstream, name), name
    setattr(chatstream, name, value)
def tell(*_):
    tasks = trio.lowlevel.current_statistics().tasks_living
    print("tasks:", tasks, file=sys.stderr, flush=True)
signal.signal(signal.SIGUSR1, tell)
sys.exit(chatstream.main())
"""


def program(**limits):
    """A program for serve(): with these time limits, unless all is done in full."""
    limits = {} if FULL else limits
    return [sys.executable, "-c", PROGRAM.format(root=str(ROOT), limits=limits)]


# ------------------------------------------------------------------------ no harm done


@asynccontextmanager
async def unharmed(server):
    """Around an attack: a reader of the clock that was there before loses no tick, the
    server is well afterwards, and no fault of its own stands in its log."""
    said = len(server.stderr_text())
    async with stream("GET", server.http + "/clock") as clock:
        seen = await clock.events(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect, clock, seen)
            yield
            count = len(seen)
            await until(lambda: len(seen) > count)
            nursery.cancel_scope.cancel()
    numbers = [event.n for event in seen]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert time.time() - numbers[-1] < 3, "the clock is late"
    assert (await fetch("GET", server.http + "/healthz")).status == 200
    assert_no_fault(server.stderr_text()[said:])


async def collect(response, seen):
    while True:
        seen.append(await response.event())


def assert_no_fault(log):
    for word in ("Traceback", "fault of ours", "nobody thought of"):
        assert word not in log, log[-4000:]


async def health(server):
    return (await fetch("GET", server.http + "/healthz")).json


async def tasks(server):
    """How many tasks a server with our PROGRAM has."""
    lines = server.stderr_text().count("tasks:")
    server.signal(signal.SIGUSR1)
    await until(lambda: server.stderr_text().count("tasks:") > lines)
    return int(server.stderr_text().rpartition("tasks:")[2].split()[0])


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident(pid):
    """Resident memory, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


def processor(pid):
    """Processor time used so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --------------------------------------------------------------------------- the wire


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


async def answer_pings(member, count):
    member.patience = 60
    for _ in range(count):
        opcode, payload = await read_frame(member)
        assert opcode == PING
        await member.send(frame(PONG, payload))


async def drain(connection, seconds=PATIENCE):
    """All that still comes, to the end of the connection (or of our patience)."""
    data, connection.buffer = connection.buffer, b""
    with trio.move_on_after(seconds):
        with suppress(trio.BrokenResourceError, ssl.SSLError):
            while more := await connection.transport.receive_some(65536):
                data += more
        return data
    raise AssertionError(f"still open after {seconds} s, got {data[:200]!r}")


# -------------------------------------------------------------------------------- TLS


def make_certificate(folder):
    """The flags that make a server use a certificate for localhost."""
    openssl = need("openssl", "apt-get install openssl")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    make = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-out", cert, "-keyout", key]
    subprocess.run(
        [openssl, *make.split(), *names, *files], check=True, capture_output=True
    )
    return ["--certfile", cert, "--keyfile", key]


# ----------------------------------------------------------------------------- HTTP/2


class H2:
    """A client's end of an HTTP/2 connection; `raw()` sends whatever bytes it likes."""

    def __init__(self, transport, host):
        self.transport, self.host = transport, host
        settings = h2.config.H2Configuration(
            client_side=True,
            header_encoding="utf-8",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
            validate_inbound_headers=False,
        )
        self.conn = h2.connection.H2Connection(settings)
        self.heads, self.bodies = {}, {}
        self.ended, self.resets = set(), {}
        self.closed = False  # the connection has ended
        self.goaway = None
        self.acknowledge = True  # False: nothing is ever read, windows stay shut
        self._news = trio.Event()
        self._sending = trio.Lock()

    async def flush(self):
        if data := self.conn.data_to_send():
            await self.raw(data)

    async def raw(self, data):
        with trio.fail_after(PATIENCE):
            async with self._sending:
                await self.transport.send_all(data)

    async def listen(self):
        """Take in what the server sends; the tests look at what has come."""
        with suppress(trio.BrokenResourceError, ssl.SSLError):
            while data := await self.transport.receive_some(65536):
                for event in self.conn.receive_data(data):
                    self.note(event)
                self._tell()
                await self.flush()
        self.closed = True
        self._tell()

    def _tell(self):
        self._news.set()
        self._news = trio.Event()

    def note(self, event):
        number = getattr(event, "stream_id", None)
        if isinstance(event, h2.events.ResponseReceived):
            self.heads[number] = Headers(event.headers)
        elif isinstance(event, h2.events.DataReceived):
            self.bodies[number] = self.bodies.get(number, b"") + event.data
            if self.acknowledge:
                with suppress(h2.exceptions.ProtocolError):
                    self.conn.acknowledge_received_data(
                        event.flow_controlled_length, number
                    )
        elif isinstance(event, h2.events.StreamEnded):
            self.ended.add(number)
        elif isinstance(event, h2.events.StreamReset):
            self.resets[number] = event.error_code
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.goaway = event.error_code

    async def until(self, condition, seconds=PATIENCE):
        with trio.fail_after(seconds):
            while not condition():
                assert not self.closed, "the connection has ended"
                await self._news.wait()

    async def ask(self, path, method="GET", body=None, headers=(), end=True):
        """Send a request; returns the number of its stream."""
        number = self.conn.get_next_available_stream_id()
        head = [
            (":method", method),
            (":scheme", "https"),
            (":authority", self.host),
            (":path", path),
            *headers,
        ]
        self.conn.send_headers(number, head, end_stream=end and body is None)
        if body is not None:
            self.conn.send_data(number, body, end_stream=end)
        await self.flush()
        return number

    async def status(self, number, seconds=PATIENCE):
        await self.until(lambda: number in self.heads, seconds)
        return int(self.heads[number][":status"])

    async def whole(self, number, seconds=PATIENCE):
        """The status and the body of an answer that has properly ended."""
        await self.until(lambda: number in self.ended, seconds)
        return await self.status(number), self.bodies.get(number, b"")

    async def body_has(self, number, text, seconds=PATIENCE):
        await self.until(lambda: text in self.bodies.get(number, b""), seconds)


@asynccontextmanager
async def http2(url, **settings):
    """An HTTP/2 connection to a server with TLS, dropped at the end of the block."""
    parts = urlsplit(url)
    context = insecure()
    context.set_alpn_protocols(["h2"])
    plain = await trio.open_tcp_stream(parts.hostname, parts.port)
    transport = trio.SSLStream(plain, context, https_compatible=True)
    try:
        async with trio.open_nursery() as nursery:
            with trio.fail_after(PATIENCE):
                await transport.do_handshake()
            assert transport.selected_alpn_protocol() == "h2"
            client = H2(transport, parts.netloc)
            client.conn.initiate_connection()
            codes = h2.settings.SettingCodes
            client.conn.update_settings({codes[k]: settings[k] for k in settings})
            await client.flush()
            nursery.start_soon(client.listen)
            yield client
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(transport)


@asynccontextmanager
async def raw_connection(url, data=b""):
    """A connection on which these bytes have been sent already."""
    async with connect(url.replace("ws:", "http:")) as connection:
        await connection.send(data)
        yield connection
