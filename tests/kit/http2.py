"""An HTTP/2 client that may break every rule."""

import ssl
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import trio

from .client import Headers, insecure
from .common import PATIENCE


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
        self.reading = trio.Lock()  # who holds it lets the server's bytes pile up
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
                async with self.reading:
                    pass
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
                    self.conn.acknowledge_received_data(event.flow_controlled_length, number)
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
