"""A small server in a thread, which browsers and blocking SDKs can use, too."""

import threading

import trio

from .client import Cut


class Background:
    """A small server in a thread of its own, on a free port."""

    host = "127.0.0.1"

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
        (listener,) = await trio.open_tcp_listeners(0, host=self.host, backlog=2000)
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
