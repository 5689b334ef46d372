"""chatstream: the working model of a long connection.

One idea carries the whole program:

    Everything that happens is appended to an event log.
    Everyone who listens is a position in one.

    writers               logs                       readers
    tick() ──────────▶  clock   ●●●●●●●●──▶   SSE over HTTP
    a model ─────────▶  answer  ●●●●──▶       WebSocket
    a member ────────▶  room    ●●●●●●──▶     one JSON body (a short connection)

Joining late, resuming after a cut, several readers of one answer, fan-out, slow
readers and scaling out are then one mechanism, not six. SSE and WebSocket differ only
in how an event is framed.

    log      keeps                 a new reader starts    ends
    clock    60 events             with the next tick     with the server
    room     1000 events, 1 MiB    50 messages back       with the server
    answer   all, at most 64 MiB   at the beginning       done, stopped, abandoned, failed

A request owns its reader; the server owns the writers. That decides every lifetime.

The classes, from the idea outwards (★: the part to read first, it needs nothing below):

    ★ EventLog                    a bounded list of events, numbered for ever
    ★ Framing                     how the events look on one kind of connection
    ★ Wire, Reader, Pump          who writes what to whom, and when
    ★ Room, Answer, Answers       the logs and their writers; the clock is tick()
      Http1, FrameParser, Member  connections: HTTP/1.1, WebSocket
      Request, AccessPolicy       one request; who may ask
      App, Server                 the routes and sessions; accepting and stopping
      SSEParser, Exchange         what the upstream says, and how it is asked
      Protocol, Relay, Upstream   the four protocols, one relay for all of them
      Demo                        the model that needs no key
      Http2                       HTTP/2, by Hypercorn
      Cluster                     other processes, over Redis
      Settings, main              the flags and the command

Endpoints (see ROUTES for the rights): GET /clock, /time, /healthz, /metrics, the pages;
POST /chatgptApi/chatgpt_qa_stream, /v1/chat/completions, /v1/completions,
/v1/responses, /v1/messages; GET and DELETE /answers/{id}; GET /v1/responses/{id}; POST
/v1/responses/{id}/cancel; WebSocket on /, /room and /clock.

Limits: a request head 16 KiB, a question 16 MiB, an event 16 MiB, an answer 64 MiB, all
answers 512 MiB and 1000 of them running, a message in the room 4096 characters.

Run `python chatstream.py`, then open http://localhost:4001/.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import codecs
import contextlib
import dataclasses
import errno
import functools
import gc
import hashlib
import hmac
import html
import http.client
import itertools
import json
import logging
import mimetypes
import os
import random
import re
import secrets
import selectors
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
import unicodedata
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from email.utils import formatdate
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, TypeVar, cast
from urllib.parse import parse_qs, quote, unquote, urlsplit

import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import h11
import trio
import trio_websocket
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Closed, RawData
from hypercorn.protocol.events import Body, Data, StreamClosed
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, LifespanState

try:  # to ask the kernel how much a peer has acknowledged; not on Windows
    import fcntl
    import termios
except ImportError:  # pragma: no cover
    fcntl = termios = None  # type: ignore[assignment]
try:  # to raise the limit of open files; not on Windows
    import resource
except ImportError:  # pragma: no cover
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import coredis

T = TypeVar("T")
JSON = dict[str, Any]
KiB, MiB = 1024, 1024 * 1024
logger = logging.getLogger("chatstream")


class Problem(Exception):
    """What went wrong, as the client is told it: an HTTP error, or an `error` event.

    The fields are those of OpenAI's error object; `status` is an HTTP status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.headers = dict(headers or {})
        self.error: JSON = {
            "message": message, "type": type, "param": param, "code": code
        }  # fmt: skip

    def __str__(self) -> str:
        return str(self.error["message"])


def to_json(value: object) -> str:
    """Compact JSON that can be encoded: half a surrogate pair stays an escape."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, separators=(",", ":"))
    return text


# ─── The log ★ ───────────────────────────────────────────────────────────────────────
# append() and close() are plain functions: nothing else runs in between, so nobody
# ever sees half a change. The log calls `on_news` once and waits for no reader.
#
# A reader costs the log nothing: its position is a number that the reader keeps. So the
# log never asks how far its readers are. It forgets by its bounds alone, and a reader
# that stood still for too long finds that `start` has moved past its position.
#
#         start                  end
#           │                     │          as in a slice: `start` is the first event
#     · · · ● ● ● ● ● ● ● ● ● ● ●            still kept, `end` the place of the next
#                   │
#                position                    a reader's next event

NOTHING: Mapping[str, Any] = {}  # shared by all events that have nothing to add
EVENT_OVERHEAD = 96  # bytes that an event takes in memory beside its text


class Event(NamedTuple):
    """One thing that happened. `about` holds what only some framings show."""

    data: str
    type: str = "message"
    about: Mapping[str, Any] = NOTHING


class EventLog:
    """A bounded list of events, and the readers that stand at places in it.

    Places are numbered for ever; an event's id is `<name>-<place>`.
    """

    def __init__(
        self,
        name: str,
        max_events: float = inf,
        max_bytes: float = inf,
        on_news: Callable[[EventLog], None] = lambda log: None,
    ) -> None:
        self.name = name
        self.max_events = max_events
        self.max_bytes = max_bytes
        self.on_news = on_news
        self.start = self.end = 0
        self.size = 0  # bytes of memory
        self.closed = False
        self.readers: dict[Reader, None] = {}  # a set that keeps its order
        # A token is stored as its text alone: an Event for each would double its size.
        self._events: list[Event | str] = []
        self._joined: dict[tuple[Framing, int], tuple[bytes, int]] = {}

    def append(self, data: str, type: str = "message", **about: Any) -> int:
        """Add an event at the end and forget the oldest ones beyond the bounds.

        Returns the place of the new event.
        """
        plain = type == "message" and not about
        event = data if plain else Event(data, type, about or NOTHING)
        self._events.append(event)
        self.size += size_of(event)
        self.end += 1
        while len(self._events) > self.max_events or self.size > self.max_bytes:
            self._forget_oldest()
        self._changed()
        return self.end - 1

    def close(self) -> None:
        """Say that nothing more will come. Readers go on to the end."""
        self.closed = True
        self._changed()

    def skip_to(self, place: int) -> None:
        """Start again at this place, with nothing kept. What was before is missed."""
        self._events.clear()
        self.start = self.end = place
        self.size = 0

    def _forget_oldest(self) -> None:
        self.size -= size_of(self._events.pop(0))
        self.start += 1

    def _changed(self) -> None:
        self._joined.clear()
        self.on_news(self)

    def _index(self, place: int) -> int:
        return place - self.start

    def _place(self, index: int) -> int:
        return self.start + index

    def __getitem__(self, place: int) -> Event:
        event = self._events[self._index(place)]
        return Event(event) if isinstance(event, str) else event

    def id(self, place: int) -> str:
        return f"{self.name}-{place}"

    def place_after(self, last_event_id: str | None) -> int | None:
        """The place after the event with this id; None if it is not an id of this log.

        That event may be forgotten. Its reader then starts before `start`, with a gap.
        """
        name, _, place = (last_event_id or "").rpartition("-")
        if name != self.name or not re.fullmatch("[0-9]{1,15}", place):
            return None
        return int(place) + 1 if int(place) < self.end else None

    def frames(self, framing: Framing, place: int) -> tuple[bytes, int]:
        """The bytes of the events from `place` on, and the place after them.

        Most readers stand at the same place: what one of them needs is made once and
        kept until the log changes. It is WRITE_BYTES or so, because a slow reader holds
        what its socket did not take: its memory is one write, however far back it is.
        """
        joined = self._joined.get((framing, place))
        if joined is None:
            if len(self._joined) > 8:  # stragglers, each at a place of its own
                self._joined.clear()
            joined = self._joined[framing, place] = self._join(framing, place)
        return joined

    def _join(self, framing: Framing, place: int) -> tuple[bytes, int]:
        frames, size, index = [], 0, self._index(place)
        while index < len(self._events) and size < WRITE_BYTES:
            event = self._events[index]
            if isinstance(event, str):
                event = Event(event)
            frames.append(framing.frame(self.name, self._place(index), event))
            size += len(frames[-1])
            index += 1
        after = self._place(index) if index < len(self._events) else self.end
        # A framing may show nothing of an event; an empty chunk would end the body.
        return framing.wrap(b"".join(frames)) if size else b"", after


def size_of(event: Event | str) -> int:
    """Bytes that an event takes in memory."""
    if isinstance(event, str):
        return sys.getsizeof(event) + 16
    return sys.getsizeof(event.data) + EVENT_OVERHEAD


# ─── Framing ★ ───────────────────────────────────────────────────────────────────────
# The same event, framed for SSE or for WebSocket: all that differs between the two.

SSE_KEEP_ALIVE = HEARTBEAT_EVERY = 4  # seconds; many clients give up after 5 to 10
WRITE_BYTES = 64 * KiB  # of one log, to one reader, at a time


def frame_sse(name: str, place: int, event: Event) -> bytes:
    """An event as a block of an event stream (HTML standard, section 9.2.5).

    `id:` comes after `data:`: some clients store an id as soon as they have read its
    line, and would skip an event that was cut in half.
    """
    type_line = "" if event.type == "message" else f"event: {event.type}\n"
    data = event.data
    if "\n" in data or "\r" in data:  # not splitlines(): U+2028 does not end a line
        data = "\ndata: ".join(re.split("\r\n|\r|\n", data))
    block = f"{type_line}data: {data}\nid: {name}-{place}\n\n"
    return block.encode(errors="replace")


def sse_gap(missed: int) -> bytes:
    """The gap is not an event of the log: without an id, the client keeps its last."""
    return b'event: gap\ndata: {"missed": %d}\n\n' % missed


def as_is(data: bytes) -> bytes:
    return data


def http_chunk(data: bytes) -> bytes:
    """A chunk of an HTTP/1.1 body (RFC 9112, section 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA


def frame_ws(payload: bytes, opcode: int = TEXT) -> bytes:
    """One unmasked, unfragmented WebSocket frame (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", 0x80 | opcode, size) + payload
    if size < 1 << 16:
        return struct.pack("!BBH", 0x80 | opcode, 126, size) + payload
    return struct.pack("!BBQ", 0x80 | opcode, 127, size) + payload


def frame_ws_json(name: str, place: int, event: Event) -> bytes:
    """An event of the room for chatstream.v1, or of the clock, as one JSON text."""
    fields: JSON = {"id": f"{name}-{place}", **event.about}
    if name == "clock":
        fields["data"] = event.data
    else:
        fields["type"] = event.type
        if event.type == "message":
            fields["text"] = event.data
    return frame_ws(to_json(fields).encode())


def ws_gap(missed: int) -> bytes:
    return frame_ws(b'{"type":"gap","missed":%d}' % missed)


def frame_ws_plain(suffix: str, name: str, place: int, event: Event) -> bytes:
    """What was said and nothing else, for any WebSocket client."""
    if event.type != "message":
        return b""
    return frame_ws((event.data + suffix).encode(errors="replace"))


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity: a fast dict key
class Framing:
    """How the events of a log look on one kind of connection. Times in seconds."""

    frame: Callable[[str, int, Event], bytes]
    gap: Callable[[int], bytes] = lambda missed: b""
    wrap: Callable[[bytes], bytes] = as_is  # around all that goes out in one write
    keep_alive: bytes = b""
    every: float = inf
    steady: bool = False  # keep-alives at fixed times, not only after silence


SSE = Framing(frame_sse, sse_gap, as_is, b": keep-alive\n", SSE_KEEP_ALIVE)
SSE_CHUNKED = dataclasses.replace(SSE, wrap=http_chunk)
HEARTBEAT = frame_ws(b'{"type":"heartbeat"}')
WS_JSON = Framing(frame_ws_json, ws_gap, as_is, HEARTBEAT, HEARTBEAT_EVERY, True)
WS_CLOCK = Framing(frame_ws_json, ws_gap)  # a tick a second is sign of life enough


# ─── Delivery ★ ──────────────────────────────────────────────────────────────────────
# The usual design wakes a task for each reader of each event. Here one task, the pump,
# makes one plain pass over the readers of every log that has news and writes without
# waiting. What a socket does not take stays with its reader, whose own task waits for
# room while the pass goes on. A slow reader costs the others one failed attempt.

STUCK_TIMEOUT = 10  # seconds for a client that takes nothing of what we send
LOOK_EVERY = 1  # seconds between two looks at what a slow client has taken
LINGER_CLOSE = 2  # seconds for the last bytes to arrive before a socket is closed
TURN = 0.005  # seconds after which a busy loop lets the other tasks run


class Turn:
    """How long a busy loop has been running; pause() lets others run when it is time.

    Without it a pass over 10,000 readers would hold up everybody for 60 ms.
    """

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.worked = 0.0  # seconds before this turn

    async def pause(self) -> None:
        if time.perf_counter() - self.began > TURN:
            self.worked = self.total()
            await trio.lowlevel.checkpoint()
            self.began = time.perf_counter()

    def total(self) -> float:
        return self.worked + time.perf_counter() - self.began


class Stuck(trio.BrokenResourceError):
    """The client takes nothing any more of what we send."""


class Outlet(Protocol):
    """Where a reader writes.

    `rest` are bytes that are still on their way. While there are any, nothing else may
    be written.
    """

    rest: bytes | memoryview

    def write_now(self, data: bytes) -> None: ...
    async def flush(self) -> None: ...


def peer_name(sock: socket.socket) -> str:
    try:
        host, port, *_ = sock.getpeername()
    except (OSError, ValueError):
        return "a client that has gone"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Wire:
    """One connection: a non-blocking socket, plain or TLS, to a client or an upstream.

    Two kinds of writers share it. The pump calls write_now(), which never waits; tasks
    call send(), which does. `rest` is what the socket has not taken. Nobody writes
    anything else before it is gone, because half a frame inside another one is the end
    of any protocol: write_now() is called only if there is no rest, and send() waits
    for its turn.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.peer = peer_name(sock)
        # What goes out
        self.rest: memoryview | bytes = b""
        self.sent = 0  # bytes
        self.stuck = False
        self._lock = trio.Lock()
        # What comes in
        self.ended = False  # the peer has said all that it will
        self.waiting_since = inf  # when we began to wait for bytes; inf: we do not

    async def when_ready(
        self,
        call: Callable[[], T],
        wait: Callable[[Any], Awaitable[None]] = trio.lowlevel.wait_readable,
    ) -> T:
        """Make a call on the socket as soon as the socket is ready for it.

        `wait` says what a plain socket waits for; TLS itself says what it needs.
        Raises BrokenResourceError if the connection is broken.
        """
        needed: Callable[[Any], Awaitable[None]]
        while True:
            try:
                return call()
            except ssl.SSLWantReadError:
                needed = trio.lowlevel.wait_readable
            except ssl.SSLWantWriteError:
                needed = trio.lowlevel.wait_writable
            except BlockingIOError:
                needed = wait
            except OSError as error:  # ssl.SSLError is one
                raise trio.BrokenResourceError(str(error)) from error
            await needed(self.socket)  # out here, where no exception is kept alive

    def write_now(self, data: bytes) -> None:
        """Write without waiting. What the socket does not take is left to flush()."""
        try:
            taken = self.socket.send(data)
        except OSError:  # no room, or broken: flush() will see which
            taken = 0
        self.sent += taken
        if taken < len(data):
            self.rest = memoryview(data)[taken:]

    async def flush(self) -> None:
        """Wait until all is written. Raises BrokenResourceError, also if stuck."""
        if self.rest:
            async with self._lock:
                await self._drain()

    async def send(self, data: bytes) -> None:
        """Write all of it. Unlike most of Trio, not a checkpoint if it goes out at once."""
        if not self.rest:
            self.write_now(data)
            return await self.flush()
        async with self._lock:
            await self._drain()
            self.rest = memoryview(data)
            await self._drain()

    async def _drain(self) -> None:
        while self.rest:
            taken = await self.when_ready(self._send_rest, self._wait_for_room)
            self.sent += taken
            self.rest = self.rest[taken:]

    def _send_rest(self) -> int:
        try:
            return self.socket.send(self.rest)
        except ssl.SSLWantWriteError:  # as a plain socket that is full
            raise BlockingIOError from None

    async def _wait_for_room(self, sock: socket.socket) -> None:
        """Wait until the socket takes more, as long as the peer takes anything.

        Linux calls a socket writable when a third of its buffer is free. A slow peer
        may take longer than our limit for that, so what counts is what it acknowledges.
        """
        unread, since = self._unacknowledged(), trio.current_time()
        while trio.current_time() - since < STUCK_TIMEOUT:
            with trio.move_on_after(LOOK_EVERY):
                return await trio.lowlevel.wait_writable(sock)
            before, unread = unread, self._unacknowledged()
            if unread < before:
                since = trio.current_time()
        self.stuck = True
        self.abort()
        raise Stuck(f"it read nothing for {STUCK_TIMEOUT} s")

    def _unacknowledged(self) -> int:
        """Bytes that the peer's system has not acknowledged; 0 where nobody can tell.

        Source: tcp(7), SIOCOUTQ, which is the same number as termios.TIOCOUTQ.
        """
        if fcntl is None:
            return 0
        try:
            raw = fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4))
        except OSError:
            return 0
        return int.from_bytes(raw, sys.byteorder)

    async def receive(self) -> bytes:
        """The next bytes; b"" when the peer has ended. Can be cancelled and repeated."""
        self.waiting_since = trio.current_time()
        data = await self.when_ready(self._recv)
        self.waiting_since = inf
        self.ended = not data
        return data

    def _recv(self) -> bytes:
        # 64 KiB hold more than a TLS record: so nothing is left inside of OpenSSL that
        # a selector would not see.
        return self.socket.recv(64 * KiB)

    def receive_now(self) -> bytes | None:
        """What is there already, b"" at the end, None if nothing is there."""
        try:
            return self._recv()
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None

    def abort(self) -> None:
        """Let close() reset the connection, so that its buffers are freed at once."""
        with contextlib.suppress(OSError):  # it is gone already
            linger = struct.pack("ii", 1, 0)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    async def finish(self) -> None:
        """Say goodbye, and give the peer time to read what it was sent.

        Closing a socket with unread input resets it and destroys what is under way.
        """
        broken = (trio.BrokenResourceError, OSError)
        with contextlib.suppress(*broken), trio.move_on_after(LINGER_CLOSE):
            await self.flush()
            self._close_notify()
            if not self.ended:
                self.socket.shutdown(socket.SHUT_WR)
                while await self.receive():
                    pass

    def close(self) -> None:
        if not self.stuck:
            self._close_notify()
        trio.lowlevel.notify_closing(self.socket)
        self.socket.close()

    def _close_notify(self) -> None:
        """TLS's goodbye (RFC 8446, section 6.1), without waiting for the peer's."""
        if isinstance(self.socket, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                self.socket.unwrap()


class Reader:
    """A position in a log, on a connection.

    Two drive it. The pump calls catch_up() when there is news; that is a plain
    function. The connection's task sits in run(), and is needed only for what must
    wait: room on a full wire, the end of the log, the client leaving.
    """

    __slots__ = (
        "_listening", "delivered", "dropped", "framing", "gaps", "log", "outlet",
        "position", "quiet_since",
    )  # fmt: skip

    def __init__(self, log: EventLog, outlet: Outlet, framing: Framing, position: int) -> None:
        self.log = log
        self.outlet = outlet
        self.framing = framing
        self.position = position
        self.delivered = self.gaps = 0
        self.dropped: str | None = None  # why, if it was
        self.quiet_since = trio.current_time()
        self._listening = trio.CancelScope()

    def catch_up(self, now: float) -> None:
        """Write what is new, as far as the connection takes it. Never waits."""
        log, outlet, framing = self.log, self.outlet, self.framing
        while self.position < log.end and not outlet.rest:
            if self.position < log.start:
                self._write_gap()
                continue
            frames, position = log.frames(framing, self.position)
            self.delivered += position - self.position
            self.position = position
            if frames:
                outlet.write_now(frames)
            if not framing.steady:
                self.quiet_since = now
        if log.closed or outlet.rest:
            self._listening.cancel()

    def _write_gap(self) -> None:
        """What was missed is gone for good: say how much; go on where the log begins."""
        gap = self.framing.gap(self.log.start - self.position)
        self.position = self.log.start
        self.gaps += 1
        if gap:
            self.outlet.write_now(self.framing.wrap(gap))

    def keep_alive(self, now: float) -> None:
        """Called a few times a second: break a silence that has lasted long enough."""
        if now - self.quiet_since >= self.framing.every and not self.outlet.rest:
            self.quiet_since = now
            self.write_aside(self.framing.wrap(self.framing.keep_alive))

    def write_aside(self, data: bytes) -> None:
        """Write something that is not an event. Only if the outlet has no rest."""
        self.outlet.write_now(data)
        if self.outlet.rest:
            self._listening.cancel()

    def rewind(self, place: int) -> None:
        """Go back to this place, if it stands further on: the log begins anew."""
        self.position = min(self.position, place)

    def drop(self, why: str) -> None:
        """End this reader from outside; its own task raises."""
        self.dropped = why
        self._listening.cancel()

    async def run(self, listen: Callable[[], Awaitable[object]]) -> bool:
        """Read the log to its end (True), or until the client has left (False).

        `listen` waits for the client and returns when the client has left. It must be
        something that can be cancelled and called again with nothing lost.
        Raises BrokenResourceError when the client takes nothing any more.

        Two parties meet here: the pump, and this task.

            this task   writes what is there; sits in listen()
            the pump    catch_up(): writes an event. This task sleeps on.
            the pump    catch_up(): the wire is full. It cancels `_listening`.
            this task   wakes up, makes a new scope, waits in flush() for room
            the pump    catch_up(): the wire is still full. It cancels the new scope, too.
            this task   catches up, enters the cancelled scope, and so flushes again

        The scope is made anew before anything is waited for. A cancel that comes from
        then on ends the next listen() at once, so no call is lost.
        """
        self.log.readers[self] = None
        try:
            while True:
                self.catch_up(trio.current_time())
                with self._listening:
                    await listen()
                    return False
                self._listening = trio.CancelScope()
                if self.dropped:
                    raise trio.BrokenResourceError(self.dropped)
                await self.outlet.flush()
                if self.log.closed and self.position >= self.log.end:
                    return True
        except Stuck:
            self.dropped = "stuck"
            raise
        finally:
            self.log.readers.pop(self, None)


class Pump:
    """One task for the whole server: every log with news, every reader catches up."""

    def __init__(self) -> None:
        self._news_in: dict[EventLog, int] = {}
        self._news = trio.Event()

    def notify(self, log: EventLog) -> None:
        self._news_in[log] = self._news_in.get(log, 0) + 1
        self._news.set()

    async def run(self) -> None:
        """Pass after pass. The busier it gets, the more each write carries.

        After a pass that carried more than one event of a log, the pump rests for as
        long as the pass took: meanwhile more events come, and the next pass carries
        them together. A lone event waits for nobody.
        """
        while True:
            await self._news.wait()
            # Taken before the pass: what is appended from now on is for the next one.
            self._news = trio.Event()
            logs, self._news_in = self._news_in, {}
            took = await self._pass(logs)
            if max(logs.values()) > 1:
                await trio.sleep(took)
            elif took > TURN / 10:
                await trio.lowlevel.checkpoint()  # a crowd: let it speak first

    async def _pass(self, logs: Iterable[EventLog]) -> float:
        """All readers of these logs. Returns the seconds that it took."""
        turn, now = Turn(), trio.current_time()
        for log in logs:
            for n, reader in enumerate(list(log.readers)):
                if n % 64 == 63:
                    await turn.pause()
                if reader in log.readers:  # it may have left during a pause
                    reader.catch_up(now)
            await turn.pause()
        return turn.total()


async def race_disconnect(
    disconnected: Callable[[], Awaitable[object]], wait: Callable[[], Awaitable[object]]
) -> bool:
    """Wait for something (True), but no longer than the client stays (False).

    Two tasks in a nursery, and whichever is first cancels the other: the one pattern
    for "whichever comes first". No task is left over.
    """
    stayed = False

    async def watch() -> None:
        await disconnected()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await wait()
        stayed = True
        nursery.cancel_scope.cancel()
    return stayed


# ─── Writers ★ ───────────────────────────────────────────────────────────────────────
# Each log has its writers, and they belong to the server: a reader that leaves takes
# nothing with it. Only an answer looks back: when nobody attends it, it is stopped.

CLOCK_EVENTS = 60
ROOM_EVENTS, ROOM_BYTES = 1000, MiB
ROOM_HISTORY, ROOM_COMINGS = 50, 50  # messages, and comings and goings, that are kept
ANSWER_BYTES = 64 * MiB
HEAD_WAIT = 4  # seconds for the model's consent, before the stream starts without it


def clock_text(second: int) -> str:
    moment = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(second))
    return f"The server time is: {moment}"


async def tick(clock: EventLog) -> None:
    """One ticker for all readers: event n is the Unix second n, appended on the second.

    Seconds that were missed (a busy or suspended machine) are made up for, as far back
    as the log reaches. That also fills the log at the start, so that a reader loses
    nothing when the server is started again. A clock that is set back has said those
    seconds: it is silent until it has caught up.
    """
    while True:
        second = int(time.time())
        if second - clock.end > CLOCK_EVENTS:
            clock.skip_to(second - CLOCK_EVENTS)
        while clock.end <= second:
            clock.append(clock_text(clock.end))
        await trio.sleep(1 - time.time() % 1)


class Said(NamedTuple):
    """Something for the room: a message, or that a member joined or left."""

    type: str
    name: str
    text: str = ""
    key: str | None = None  # chosen by the sender, to know its own message by


class Room(EventLog):
    """What is said in the room, and who came and went.

    Its ids carry a token of this start of the server: without it, event 7 of
    yesterday's room would pass for event 7 of today's.

    Comings and goings must not push messages out of the log. So only the last few of
    them are kept, and the places of those forgotten stay empty: `_places` says which
    places are kept.
    """

    def __init__(
        self,
        on_news: Callable[[EventLog], None],
        store: Callable[[Said], Awaitable[None]] | None = None,
    ) -> None:
        name = f"room-{secrets.token_hex(4)}"
        super().__init__(name, ROOM_EVENTS, ROOM_BYTES, on_news)
        self.store = store or self.store_here
        self.here = 0  # members in this process
        self.elsewhere = 0  # members in the others
        self._places: list[int] = []
        self._comings: deque[int] = deque()

    def _index(self, place: int) -> int:
        return bisect.bisect_left(self._places, place)

    def _place(self, index: int) -> int:
        return self._places[index]

    def _forget_oldest(self) -> None:
        place, type = self._places[0], self[self._places[0]].type
        self._forget(0)
        if type == "message":  # what was lost before a place is what `start` says
            self.start = place + 1

    def _forget(self, index: int) -> None:
        self.size -= size_of(self._events.pop(index))
        place = self._places.pop(index)
        if self._comings and self._comings[0] == place:
            self._comings.popleft()

    def skip_to(self, place: int) -> None:
        super().skip_to(place)
        self._places.clear()
        self._comings.clear()

    def add(self, said: Said, at: int, place: int | None = None) -> None:
        """Append it. Over Redis, its place may be further on than our end."""
        self.end = self.end if place is None else place
        about: JSON = {"name": said.name, "at": at}
        if said.key is not None:
            about["key"] = said.key
        if said.type != "message":
            about["members"] = self.here + self.elsewhere
            self._comings.append(self.end)
            if len(self._comings) > ROOM_COMINGS:
                self._forget(self._index(self._comings[0]))
        self._places.append(self.end)
        self.append(said.text, said.type, **about)

    async def store_here(self, said: Said) -> None:
        if not self.closed:
            self.add(said, now_ms())

    def history(self) -> int:
        """The place from which the last ROOM_HISTORY messages follow.

        With what is kept of comings and goings, these are at most 100 events.
        """
        wanted = ROOM_HISTORY
        for index in range(len(self._events) - 1, -1, -1):
            wanted -= self[self._places[index]].type == "message"
            if not wanted:
                return self._places[index]
        return self.start


def now_ms() -> int:
    """Milliseconds since 1970, as JavaScript counts them."""
    return int(time.time() * 1000)


def stopped() -> Problem:
    return Problem(400, "this answer was stopped", "stopped")


def abandoned() -> Problem:
    return Problem(400, "nobody was reading, so this answer was stopped", "abandoned")


def server_stopping() -> Problem:
    retry = {"retry-after": "5"}
    message = "the server is stopping: ask again"
    return Problem(503, message, "server_stopping", headers=retry)


class Model:
    """Whoever writes answers: an upstream, the demo, or another process."""

    writer = ""  # the other process, if it is one

    async def run(self) -> None:
        """What it has to do while the server runs."""

    def check(self, api: Api) -> None:
        """Raises Problem if it does not speak this protocol."""

    async def write(self, answer: Answer) -> None:
        """Write the answer to its end. Raises Problem if there will be none."""
        raise NotImplementedError

    def stop(self, answer: Answer, problem: Problem) -> None:
        """Let the answer end with this problem."""
        answer.finish(problem)
        answer.scope.cancel()


class Reply(NamedTuple):
    """A short answer, with nothing to follow."""

    body: str
    headers: Mapping[str, str] = NOTHING


class Answer(EventLog):
    """An answer under way, or one that has ended and is kept for late readers.

    Its name has 128 random bits: a client that knows it may read it and stop it.

    `scope` is around its writer. The linger time is the deadline of that scope, so
    there is no timer to be kept. `account` is told how much memory it takes and says
    whether there is so much.
    """

    def __init__(
        self,
        name: str,
        question: Question,
        model: Model,
        linger: float = 60,
        on_news: Callable[[EventLog], None] = lambda log: None,
        account: Callable[[int], bool] = lambda size: True,
    ) -> None:
        super().__init__(name, on_news=on_news)
        self.question = question
        self.model = model
        self.linger = linger  # seconds that it goes on with nobody there
        self.account = account
        # Who attends it
        self.attendants = 0
        self.unattended_since = trio.current_time()
        self.scope = trio.CancelScope()
        # How it goes
        self.begun = trio.current_time()
        self.accepted = trio.Event()  # the model has agreed to answer, or it has ended
        self.ended = trio.Event()
        self.headers: dict[str, str] = {}  # of the upstream's, for our response
        # How it ended
        self.problem: Problem | None = None
        self.refused = False  # before it was accepted: then the status says so
        self.kept = True  # for late readers
        self.affordable = True  # there is memory for it

    def attend(self) -> None:
        self.attendants += 1
        self.scope.deadline = inf

    def leave(self) -> None:
        """When the last attendant leaves, the linger time begins."""
        self.attendants -= 1
        if not self.attendants:
            self.unattended_since = trio.current_time()
            self.scope.deadline = self.unattended_since + self.linger

    @contextlib.contextmanager
    def attended(self) -> Iterator[None]:
        self.attend()
        try:
            yield
        finally:
            self.leave()

    async def started(self) -> None:
        """Wait until the first reader can be answered.

        A stream starts after HEAD_WAIT in any case. Clients give up after 5 s, and a
        question that is repeated before its answer has a name is paid for twice.
        """
        question = self.question
        patient = question.polled or not question.stream
        with trio.move_on_after(inf if patient else HEAD_WAIT):
            await (self.accepted if question.stream else self.ended).wait()

    async def run(self) -> None:
        """The writer, from the first word to the end, whatever happens."""
        problem: Problem | None = server_stopping()  # if the server ends meanwhile
        try:
            with self.scope:
                await self.model.write(self)
                problem = None
            if self.scope.cancelled_caught:
                problem = abandoned()  # by its deadline; stop() says why by itself
        except Problem as failure:
            problem = failure
        except Exception:
            logger.exception("an answer failed in a way that nobody thought of")
            problem = Problem(500, "the answer failed inside the server", "server_error")
        finally:
            self.finish(problem)

    def append(self, data: str, type: str = "message", **about: Any) -> int:
        before = self.size
        place = super().append(data, type, **about)
        self.affordable = self.account(self.size - before)
        return place

    def skip_to(self, place: int) -> None:
        self.account(-self.size)
        super().skip_to(place)

    def write(self, data: str, type: str = "message") -> None:
        """Append what the model says. Raises Problem if it is too much to keep."""
        self.append(data, type)
        if not self.affordable or self.size > ANSWER_BYTES:
            too_large = "the answer is too large to keep"
            raise Problem(502, too_large, "upstream_error", "too_large")

    def finish(self, problem: Problem | None = None) -> None:
        """End it, in exactly one way; whatever is said later is ignored.

        So this may be called by whoever sees an end first, and by run() in any case.
        """
        if self.closed:
            return
        self.problem = problem
        self.refused = problem is not None and not self.accepted.is_set()
        for event in self.question.closing(self, problem):
            self.append(event.data, event.type)
        self.close()

    def close(self) -> None:
        super().close()
        self.accepted.set()
        self.ended.set()

    def discard(self) -> None:
        """End this copy of an answer that goes on elsewhere: without an event."""
        self.kept = False
        self.close()


# That is the idea. What follows is what the open internet demands of it.

# ─── Answers: who may start one, and how long it is kept ─────────────────────────────

ANSWERS_BYTES, ANSWERS_RUNNING, ANSWERS_BACKGROUND = 512 * MiB, 1000, 100
ANSWER_OVERHEAD = 4 * KiB  # bytes of memory that an answer takes beside its events


@dataclasses.dataclass(eq=False)
class Question:
    """What a client asks a model.

    Only its bytes are kept, and only until the model has them: the objects that they
    parse to take up to 30 times as much.
    """

    api: Api
    body: bytes  # as it goes to the model
    stream: bool
    model: str = ""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    key: str = ""  # the Idempotency-Key, with what tells its caller from others
    digest: str = ""  # of what was asked under that key
    background: bool = False  # the answer goes on with nobody there
    polled: bool = False  # the client does not listen: it will ask how it stands
    previous: str = ""  # the previous_response_id as the client named it

    def closing(self, answer: Answer, problem: Problem | None) -> list[Event]:
        """The last events of its answer."""
        return self.api.closing(answer, problem)


class Answers:
    """All answers: who may start one, and when it is forgotten.

    `held` is the memory of all of them. Each answer keeps it up: to add them all up
    for each token would cost more than the token.
    """

    def __init__(
        self,
        linger: float,
        keep: float,
        on_news: Callable[[EventLog], None] = lambda log: None,
        on_end: Callable[[Answer], None] = lambda answer: None,
    ) -> None:
        self.linger = linger
        self.keep = keep
        self.on_news = on_news
        self.on_end = on_end
        self.by_id: dict[str, Answer] = {}
        self.by_key: dict[str, Answer] = {}  # by Idempotency-Key
        self.ended: OrderedDict[Answer, float] = OrderedDict()  # and when
        self.running: dict[Answer, None] = {}  # their writers have not ended
        self.held = 0

    def begin(
        self, nursery: trio.Nursery, model: Model, question: Question, name: str = ""
    ) -> Answer:
        """Start an answer in this nursery. Raises Problem 503 if there are too many."""
        size = len(question.body) + ANSWER_OVERHEAD
        if len(self.running) >= ANSWERS_RUNNING and len(self.open()) >= ANSWERS_RUNNING:
            self._stop_least_attended()
        background = sum(answer.question.background for answer in self.running)
        if question.background and background >= ANSWERS_BACKGROUND:
            raise too_busy()
        if not self._make_room(size):
            raise too_busy()
        answer = Answer(
            name or secrets.token_hex(16), question, model,
            self.linger, self.on_news, self.account,
        )  # fmt: skip
        if question.background:
            answer.attend()
        self.by_id[answer.name] = answer
        if question.key:
            self.by_key[question.key] = answer
        answer.size = size
        self.held += size
        self.running[answer] = None
        nursery.start_soon(self.run, answer)
        return answer

    def open(self) -> list[Answer]:
        return [answer for answer in self.running if not answer.closed]

    def _stop_least_attended(self) -> None:
        """Make room for one more. Raises Problem if somebody attends each of them."""
        alone = [answer for answer in self.open() if not answer.attendants]
        if not alone:
            raise too_busy()
        self.stop(min(alone, key=lambda a: a.unattended_since), abandoned())

    def stop(self, answer: Answer, problem: Problem) -> None:
        if not answer.closed:
            answer.model.stop(answer, problem)
            if answer.closed:
                self._settle(answer)

    def account(self, size: int) -> bool:
        """An answer has grown by so much: is there room for it?"""
        self.held += size
        return self.held <= ANSWERS_BYTES or self._make_room(0)

    def _make_room(self, size: int) -> bool:
        """Forget ended answers, the oldest first, until so much more can be held."""
        while self.held + size > ANSWERS_BYTES:
            if not self.ended:
                return False
            self.forget(next(iter(self.ended)))
        return True

    def forget(self, answer: Answer) -> None:
        self.ended.pop(answer, None)
        if self.by_id.pop(answer.name, None):
            self.held -= answer.size
        if self.by_key.get(answer.question.key) is answer:
            del self.by_key[answer.question.key]

    def forget_old(self, now: float) -> None:
        """Called a few times a second."""
        while self.ended and next(iter(self.ended.values())) <= now - self.keep:
            self.forget(next(iter(self.ended)))

    async def run(self, answer: Answer) -> None:
        try:
            await answer.run()
        finally:
            del self.running[answer]
            self._settle(answer)

    def _settle(self, answer: Answer) -> None:
        """An answer has ended: keep it, without its question, or forget it."""
        if answer in self.ended or answer.name not in self.by_id:
            return
        self.drop_question(answer)
        self.ended[answer] = trio.current_time()
        self.on_end(answer)
        if answer.refused or not answer.kept:
            self.forget(answer)

    def drop_question(self, answer: Answer) -> None:
        """The model has it: nobody needs its bytes any more."""
        size = len(answer.question.body)
        answer.question.body = b""
        answer.size -= size
        self.held -= size


def too_busy() -> Problem:
    message = "too many answers are under way: try again in a moment"
    return Problem(503, message, "server_busy", headers={"retry-after": "5"})


# ─── Connections: HTTP/1.1 and WebSocket ─────────────────────────────────────────────
# One client is one nursery, with one `except*`: whatever goes wrong inside ends that
# connection and no other. (Libraries that keep all connections in one nursery can be
# ended by one client: trio-websocket issue 184.)

HEAD_BYTES, HEAD_TIMEOUT = 16 * KiB, 10
IDLE_TIMEOUT = 75  # between two requests; more than a load balancer's 60
QUIET_ENDS = (  # of a connection: not a fault of ours, and not news
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    h11.RemoteProtocolError,
    trio_websocket.ConnectionClosed,
    OSError,
)
NOT_HTTP = {
    400: "this is not a valid HTTP/1 request",
    431: f"the request's head is larger than {HEAD_BYTES} bytes",
    501: "the only transfer coding that this server knows is chunked",
}


class Http1:
    """HTTP/1.x on one wire: h11 knows the rules, and we move the bytes.

    One task reads and writes. If all goes well, it waits for a head, hands the request
    to `handle`, and waits for the next head. Much can go wrong (a head that is late,
    too large or not HTTP; a client that leaves, or sends the next request early), and
    it all ends in one of two ways: as long as no response has begun, the client gets an
    error that says why; after that, only the connection's end is left to say it.

    While a response streams, the task sits in disconnected(), which reads. So it learns
    at once that its client has left. A server that only writes learns that when its
    buffers are full.
    """

    def __init__(self, wire: Wire, scheme: str) -> None:
        # Per-connection state
        self.wire = wire
        self.scheme = scheme
        self.conn = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        self.requests = 0
        # Per-request state
        self.raw = b""  # what has come of the next head
        self.chunked = False  # our response is

    async def serve(self, handle: Callable[[Request], Awaitable[None]]) -> Request | None:
        """Request after request until either side has had enough: None.

        Or until a request asks for a WebSocket: that is returned, and not answered.
        """
        if (early := self.wire.receive_now()) is not None:  # a head is mostly there already
            self.feed(early)
        try:
            while request := await self.next_request():
                if request.wants_websocket:
                    return request
                await handle(request)
                # Something is left of this exchange: what came next on this connection
                # could be taken for it.
                if {self.conn.our_state, self.conn.their_state} != {h11.DONE}:
                    break
                self.raw = self.conn.trailing_data[0]  # of a pipelined request
                self.conn.start_next_cycle()
                await trio.lowlevel.checkpoint()  # pipelined requests let others in
        except h11.RemoteProtocolError as error:
            status = error.error_status_hint
            await self.refuse(Problem(status, NOT_HTTP.get(status, NOT_HTTP[400])))
        except Problem as problem:
            await self.refuse(problem)
        if self.conn.our_state is not h11.IDLE:
            await self.wire.finish()
        return None

    def feed(self, data: bytes) -> None:
        if not self.raw and self.conn.their_state is h11.IDLE and data:
            data = data.lstrip(b"\r\n")  # RFC 9112, section 2.2
            if not data:
                return
        self.raw += data
        self.conn.receive_data(data)

    async def next_request(self) -> Request | None:
        """The next request's head; None if the client leaves instead of asking."""
        limit = IDLE_TIMEOUT if self.requests else HEAD_TIMEOUT
        with trio.move_on_after(limit) as scope:
            while (event := self.conn.next_event()) is h11.NEED_DATA:
                data = await self.wire.receive()
                if self.requests and not self.raw:  # the idle time is over
                    scope.deadline = trio.current_time() + HEAD_TIMEOUT
                self.feed(data)
        if scope.cancelled_caught:
            if self.raw or not self.requests:
                raise Problem(408, "the request's head did not arrive in time")
            return None
        return self.accept(event) if isinstance(event, h11.Request) else None

    def accept(self, head: h11.Request) -> Request:
        """Refuse what h11 lets through and we do not. Raises Problem."""
        self.requests += 1
        raw, self.raw = self.raw, b""
        # h11 only limits a head that is incomplete; one packet may bring a whole one.
        size = sum(len(name) + len(value) + 4 for name, value in head.headers)
        if size + len(head.target) > HEAD_BYTES:
            raise Problem(431, NOT_HTTP[431])
        names = [name for name, _ in head.headers]
        # A proxy before us may go by the other one of the two. The rest of what it took
        # for one request would be a second one to us (RFC 9112, section 11.2).
        if b"content-length" in names and b"transfer-encoding" in names:
            raise Problem(400, "send Content-Length or Transfer-Encoding, not both")
        if head.http_version not in (b"1.0", b"1.1"):
            raise Problem(505, "this server speaks HTTP/1.0, HTTP/1.1 and HTTP/2")
        self.chunked = head.http_version == b"1.1"
        trailing = self.conn.trailing_data[0]
        return Request(
            self, head.method, head.target, head.headers, self.scheme,
            head.http_version.decode(), raw[: len(raw) - len(trailing)], trailing,
        )  # fmt: skip

    # What a Request needs of its connection

    async def receive(self) -> bytes | None:
        """The next piece of the body; b"" after the last; None: the client has left."""
        while True:
            if self.conn.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                await self.wire.send(self.conn.send(go_on) or b"")
            event = self.conn.next_event()
            if isinstance(event, h11.Data):
                return bytes(event.data)
            if isinstance(event, h11.EndOfMessage):
                return b""
            if event is not h11.NEED_DATA:
                return None
            self.conn.receive_data(await self.wire.receive())  # h11 tells end from cut

    async def disconnected(self) -> None:
        """Wait until the client has left, or sends more than anybody will read."""
        while len(self.raw) <= HEAD_BYTES:
            data = await self.wire.receive()
            self.feed(data)  # a pipelined request waits for its turn
            if not data:
                return

    async def respond(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """A whole response: one write."""
        await self.wire.send(
            self._head(status, headers)
            + (self.conn.send(h11.Data(body)) or b"" if body else b"")
            + (self.conn.send(h11.EndOfMessage()) or b"")
        )

    async def start(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """The head of a stream, with its first bytes. A reader writes the rest."""
        head = self._head(status, headers)
        await self.wire.send(head + (self.conn.send(h11.Data(body)) or b""))

    def _head(self, status: int, headers: Mapping[str, str]) -> bytes:
        pairs = [*headers.items(), ("date", http_date(int(time.time())))]
        reason = http.client.responses.get(status, "")
        return self.conn.send(h11.Response(status_code=status, headers=pairs, reason=reason))

    def reader(self, log: EventLog, start: int) -> Reader:
        return Reader(log, self.wire, SSE_CHUNKED if self.chunked else SSE, start)

    async def end(self, last: bytes = b"") -> None:
        """The end of a stream; `last` are its last bytes."""
        data = (self.conn.send(h11.Data(last)) or b"") if last else b""
        await self.wire.send(data + (self.conn.send(h11.EndOfMessage()) or b""))

    async def discard(self) -> None:
        """Nobody will read the rest of the body: this connection ends."""

    async def refuse(self, problem: Problem) -> None:
        """Answer what cannot be accepted as a request, if no response has begun."""
        logger.info("%s refused: %d %s", self.wire.peer, problem.status, problem)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers, body = problem_response(problem)
            await self.respond(problem.status, headers | {"connection": "close"}, body)


@functools.lru_cache(1)  # it is the same for all responses of a second
def http_date(second: int) -> str:
    return formatdate(second, usegmt=True)


def problem_response(problem: Problem) -> tuple[dict[str, str], bytes]:
    """Headers and body of a refusal: OpenAI's error object, Anthropic's type on top."""
    body = to_json({"type": "error", "error": problem.error}).encode() + b"\n"
    headers = {"content-type": "application/json", **problem.headers}
    return headers | {"content-length": str(len(body))}, body


MESSAGE_CHARACTERS = 4096
MESSAGE_BYTES = 12 * MESSAGE_CHARACTERS + KiB  # as JSON, all of them escaped emoji
UTF8 = codecs.getincrementaldecoder("utf-8")


class WebSocketClose(Exception):
    """The connection must end, with this code (RFC 6455, section 7.4.1)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class FrameParser:
    """Reads a client's WebSocket frames (RFC 6455, section 5), however they were split.

    What comes next is pulled, not pushed: a task that is called away between two
    messages finds the second one still here. Raises WebSocketClose: 1002 for what is
    not a frame, 1007 for text that is not UTF-8, 1009 for a message of more than
    MESSAGE_BYTES.
    """

    __slots__ = ("_buffer", "_decoder", "_opcode", "_parts", "_size")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._opcode = CONTINUATION  # of the message whose fragments are coming, if any
        self._size = 0  # of these so far
        self._parts: list[str] = []
        self._decoder: codecs.IncrementalDecoder | None = None

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> tuple[int, str | bytes] | None:
        """A whole message, text as str, or a control frame. None: feed me more."""
        while frame := self._next_frame():
            final, opcode, payload = frame
            if opcode >= CLOSE:
                return opcode, payload
            self._opcode = opcode or self._opcode
            if self._opcode == TEXT:
                self._parts.append(self._decode(payload, final))
            self._size += len(payload)
            if final:
                text, opcode = "".join(self._parts), self._opcode
                self._opcode, self._size, self._parts = CONTINUATION, 0, []
                return opcode, text if opcode == TEXT else b""  # which nobody wants
        return None

    def _next_frame(self) -> tuple[bool, int, bytes] | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        self._check_head(buffer[0], buffer[1])
        final, opcode, size = buffer[0] >= 0x80, buffer[0] & 0xF, buffer[1] & 0x7F
        start = {126: 4, 127: 10}.get(size, 2)
        if len(buffer) < start:
            return None
        if start > 2:
            size = int.from_bytes(buffer[2:start])
            if size >> 63 or size < (126 if start == 4 else 1 << 16):
                raise WebSocketClose(1002, "this length could be written shorter")
        if opcode < CLOSE and self._size + size > MESSAGE_BYTES:
            raise WebSocketClose(1009, f"at most {MESSAGE_CHARACTERS} characters")
        end = start + 4 + size
        if len(buffer) < end:
            return None
        payload = unmask(buffer[start + 4 : end], buffer[start : start + 4])
        del buffer[:end]
        return final, opcode, payload

    def _check_head(self, first: int, second: int) -> None:
        opcode = first & 0xF
        if first & 0x70 or opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
            raise WebSocketClose(1002, "reserved bits and opcodes mean nothing here")
        if second < 0x80:
            raise WebSocketClose(1002, "a client must mask its frames")
        if opcode >= CLOSE:
            if first < 0x80 or second & 0x7F > 125:
                raise WebSocketClose(1002, "a control frame is short, and in one piece")
        elif (opcode == CONTINUATION) != (self._opcode != CONTINUATION):
            raise WebSocketClose(1002, "a message begins once, then it continues")

    def _decode(self, payload: bytes, final: bool) -> str:
        """Text may be cut inside a character; nonsense is found in its fragment."""
        try:
            if final and not self._decoder:
                return payload.decode()
            self._decoder = self._decoder or UTF8()
            text = self._decoder.decode(payload, final)
        except UnicodeDecodeError:
            raise WebSocketClose(1007, "text must be UTF-8") from None
        if final:
            self._decoder = None
        return text


def unmask(data: bytes | bytearray, key: bytes | bytearray) -> bytes:
    """XOR with the key, again and again (RFC 6455, section 5.3), as one number."""
    mask = (key * (len(data) // 4 + 1))[: len(data)]
    return (int.from_bytes(data) ^ int.from_bytes(mask)).to_bytes(len(data))


def frame_close(code: int, reason: str = "") -> bytes:
    """A close frame (RFC 6455, section 5.5.1); the reason has at most 123 bytes."""
    if code == 1005:  # stands for: no code
        return frame_ws(b"", CLOSE)
    return frame_ws(struct.pack("!H", code) + reason.encode()[:123], CLOSE)


def parse_close(payload: bytes) -> WebSocketClose:
    """A close frame's code and reason (RFC 6455, section 7.4)."""
    if not payload:
        return WebSocketClose(1005, "")
    code = int.from_bytes(payload[:2])
    known = 1000 <= code <= 1014 and code not in (1004, 1005, 1006)
    if len(payload) == 1 or not (known or 3000 <= code < 5000):
        return WebSocketClose(1002, "this is not a close code")
    try:
        return WebSocketClose(code, payload[2:].decode())
    except UnicodeDecodeError:
        return WebSocketClose(1007, "a reason must be UTF-8")


# ─── Members: readers that also speak ────────────────────────────────────────────────
# trio-websocket shakes hands, on the bytes as they came. The frames are ours in both
# directions: the pump writes them, and the reader's one task listens. (With
# trio-websocket's tasks and channels an idle member takes three times the memory.)

SUBPROTOCOL = "chatstream.v1"
PING_FRAME = frame_ws(b"", PING)
PING_EVERY = 20  # seconds
CHATTER_BYTES = 256 * KiB  # pings and empty fragments, with no message among them
NAME_CHARACTERS = 32


def check_handshake(request: Request) -> None:
    """Refuse what trio-websocket would fail on (RFC 6455, section 4.2.1)."""
    headers = request.headers
    if request.method != "GET" or request.version != "1.1":
        raise Problem(400, "a WebSocket handshake is a GET over HTTP/1.1")
    if headers.get("upgrade", "").lower() != "websocket":
        raise Problem(400, "a WebSocket handshake has one Upgrade: websocket")
    if "upgrade" not in re.split(r"\s*,\s*", headers.get("connection", "").lower()):
        raise Problem(400, "a WebSocket handshake needs Connection: Upgrade")
    if headers.get("sec-websocket-version") != "13":
        need = {"sec-websocket-version": "13", "upgrade": "websocket"}
        raise Problem(426, "this server speaks WebSocket version 13", headers=need)
    if not re.fullmatch("[A-Za-z0-9+/]{22}==", headers.get("sec-websocket-key", "")):
        raise Problem(400, "Sec-WebSocket-Key must be 16 bytes in base64")
    for name in ("connection", "host", "sec-websocket-extensions",
                 "sec-websocket-protocol"):  # fmt: skip
        if not headers.get(name, "").isascii():
            raise Problem(400, f"the header {name} must be ASCII")
    try:
        headers.get("host", "").encode().decode("idna")
    except UnicodeError:
        raise Problem(400, "the header host is not a host name") from None


class HandshakeStream(trio.abc.Stream):
    """A wire as trio-websocket gets it: to shake hands, not to read on or hang up.

    Its own task goes on reading behind the handshake, and closes the stream when it
    does not like what it reads. From there on both are ours.
    """

    def __init__(self, wire: Wire, head: bytes) -> None:
        self.wire = wire
        self.head = head

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.wire.send(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        await self.wire.flush()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        head, self.head = self.head, b""
        return head or await trio.sleep_forever()

    async def aclose(self) -> None:
        pass


async def shake_hands(wire: Wire, head: bytes, may_v1: bool) -> bool:
    """Accept the WebSocket (RFC 6455, section 4.2.2). Does it speak our subprotocol?"""
    async with trio.open_nursery() as nursery:
        stream = HandshakeStream(wire, head)
        offer = await trio_websocket.wrap_server_stream(nursery, stream)
        v1 = may_v1 and SUBPROTOCOL in offer.proposed_subprotocols
        await offer.accept(subprotocol=SUBPROTOCOL if v1 else None)
        nursery.cancel_scope.cancel()
    return v1


INVISIBLE = frozenset("\u00ad\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")


def clean_name(name: str) -> str:
    """A name to be shown: NFKC, nothing invisible, at most 32 characters.

    A tower of combining marks is cut to two; a guest has a number.
    """
    shown: list[str] = []
    for c in unicodedata.normalize("NFKC", name):
        marks = [unicodedata.combining(s) or unicodedata.category(s) == "Me"
                 for s in (*shown[-2:], c)]  # fmt: skip
        variant = "\ufe00" <= c <= "\ufe0f" or "\U000e0100" <= c <= "\U000e01ef"
        shows = c.isprintable() and c not in INVISIBLE and not variant
        if shows and not (len(marks) == 3 and all(marks)):
            shown.append(c)
    text = "".join(shown).strip()[:NAME_CHARACTERS].strip()
    return text or f"guest-{random.randint(1000, 9999)}"


def free_name(wanted: str, taken: set[str]) -> str:
    """The name itself, or with a number if a member has it already."""
    name, number = wanted, 2
    while name in taken:
        name, number = f"{wanted[: NAME_CHARACTERS - 5]} {number}", number + 1
    return name


class Member(Reader):
    """A reader on a WebSocket; in the room it also speaks.

    One task, as for any reader: while it waits to be allowed to say more, or for room
    on its wire, it does not read, and TCP lets the client feel that.
    """

    __slots__ = (
        "chatter", "close", "frames", "message", "name", "owed", "pinged_at", "pings",
        "room", "turn", "wire",
    )  # fmt: skip

    def __init__(
        self, wire: Wire, log: EventLog, framing: Framing, start: int, name: str = ""
    ) -> None:
        super().__init__(log, wire, framing, start)
        self.wire = wire
        self.name = name
        self.frames = FrameParser()
        self.message: str | bytes | None = None  # the one that waits for its turn
        self.owed = b""  # pongs and errors, to be sent before we listen on
        self.chatter = 0  # bytes since the last message
        self.turn = 0.0  # when the next message may be said
        self.pings = 0
        self.pinged_at = self.quiet_since
        self.close = WebSocketClose(1006, "")

    def keep_alive(self, now: float) -> None:
        """Also ping; and drop a member that was silent since the last ping.

        Any bytes are a sign of life: the pong of a member that we read slowly may stand
        behind much that it said earlier.
        """
        super().keep_alive(now)
        if now - self.pinged_at < PING_EVERY or self.outlet.rest:
            return  # we do not listen while a wire is full: that has its own deadline
        if self.pings and self.wire.waiting_since <= self.pinged_at:
            self.drop("silent")
        else:
            self.pings, self.pinged_at = self.pings + 1, now
            self.write_aside(PING_FRAME)

    async def stay(self, say: Callable[[Said], Awaitable[None]], rate: float) -> None:
        """Until it or we have had enough."""
        try:
            if await self.run(functools.partial(self.listen, say, rate)):
                self.close = WebSocketClose(1001, "the server is stopping")
        except WebSocketClose as close:
            self.close = close

    async def listen(self, say: Callable[[Said], Awaitable[None]], rate: float) -> None:
        """Pass on everything that it says, until it leaves. Raises WebSocketClose.

        May be called away at every `await`, and again later: what is half done stands
        in `message`, `owed` and `frames`.
        """
        while True:
            if self.owed:
                await self.pay()
            elif self.message is not None:
                await self.throttle(rate)
                message, self.message = self.message, None
                await self.pass_on(say, message)
            elif frame := self.frames.next():
                self.take(*frame)
            elif data := await self.wire.receive():
                self.frames.feed(data)
                self.chatter += len(data)
                if self.chatter > CHATTER_BYTES:
                    raise trio.BrokenResourceError("it chatters, and says nothing")
            else:
                return

    def take(self, opcode: int, payload: str | bytes) -> None:
        if opcode == PING:
            self.owed += frame_ws(cast(bytes, payload), PONG)
        elif opcode == CLOSE:
            raise parse_close(cast(bytes, payload))
        elif opcode != PONG:
            self.message, self.chatter = payload, 0

    async def pay(self) -> None:
        await self.outlet.flush()
        owed, self.owed = self.owed, b""
        self.outlet.write_now(owed)
        await self.outlet.flush()

    async def pass_on(self, say: Callable[[Said], Awaitable[None]], message: str | bytes) -> None:
        """One message. Raises WebSocketClose if the connection must end of it."""
        said = self.parse(message)
        try:
            await say(said)
        except Problem as problem:
            told = {"type": "error", "error": problem.error}
            if said.key is not None:
                told["key"] = said.key
            v1 = self.framing is WS_JSON
            self.owed += frame_ws((to_json(told) if v1 else f"error: {problem}").encode())

    def parse(self, message: str | bytes) -> Said:
        if isinstance(message, bytes):
            raise WebSocketClose(1003, "this room is for text")
        fields: Any = {"text": message}
        if self.framing is WS_JSON:
            try:
                fields = from_json(message)
            except ValueError:
                fields = None
        said = fields if isinstance(fields, dict) else {}
        text, key = said.get("text"), said.get("key")
        if not isinstance(text, str) or not isinstance(key, str | None):
            raise WebSocketClose(1007, 'send {"text": "..."}')
        if len(text) > MESSAGE_CHARACTERS:
            raise WebSocketClose(1009, f"at most {MESSAGE_CHARACTERS} characters")
        # Half a surrogate pair cannot be encoded: it is replaced.
        text = text.encode(errors="replace").decode()
        return Said("message", self.name, text, key and key[:100])

    async def throttle(self, rate: float) -> None:
        """Go on no faster than `rate` messages a second, after a second's worth.

        A member that talks faster fills the socket's buffers, and TCP makes it wait.
        """
        if not rate:
            return await trio.lowlevel.checkpoint()  # let the pump have its turn
        await trio.sleep_until(self.turn - 1)
        self.turn = max(self.turn, trio.current_time()) + 1 / rate

    async def goodbye(self) -> None:
        """Everything that was said earlier, by anyone, then the close frame."""
        if self.close.code == 1006:
            return  # there is nobody to tell
        end = self.log.end
        with trio.move_on_after(LINGER_CLOSE):
            while self.position < end:
                await self.wire.flush()
                self.catch_up(trio.current_time())
            await self.wire.send(frame_close(self.close.code, self.close.reason))


# ─── Requests: what one may ask, and who ─────────────────────────────────────────────
# What a handler needs of its request stands in Request; what it cannot accept it raises
# as a Problem. One policy for Host, Origin and the token, one shape of error.

BODY_BYTES, BODY_SILENCE, BODY_TIMEOUT = 16 * MiB, 10, 120
BODIES_BYTES = 64 * MiB  # what has come of all the bodies being read
BODY_BRACKETS, BODY_COMMAS = 300_000, 1_000_000  # parsing takes 0.1 s at these limits
SSE_RETRY = 2  # seconds
SSE_HEADERS = {
    "content-type": "text/event-stream",
    # no-transform: a proxy that compresses would hold the stream back (RFC 9111, 5.2.2)
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",  # for nginx
}
# The pages load nothing from elsewhere, but may talk to any server on loopback, because
# `?server=` in their address names another one than theirs.
LOOPBACK_SOURCES = " ".join(
    f"{scheme}://{host}:*"
    for scheme in ("http", "https", "ws", "wss")
    for host in ("localhost", "127.0.0.1")
)
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; "
    f"style-src 'self'; img-src 'self'; connect-src 'self' {LOOPBACK_SOURCES}; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
MAY_SEND = "Authorization, Cache-Control, Content-Type, Idempotency-Key, Last-Event-ID"
MAY_READ = "X-Answer-Id, Retry-After, X-Request-Id, X-Should-Retry"
TOKEN_COOKIE = "chatstream_token"


def from_json(text: str | bytes) -> Any:
    """Parse JSON as RFC 8259 has it. Raises ValueError.

    Python also takes NaN, and reads 1e999 as infinity: passed on, either would be JSON
    that no browser can parse.
    """
    try:
        return DECODER.decode(text if isinstance(text, str) else text.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if abs(number) < inf else _no_constant(text)


DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)
# To check a question, nobody needs its numbers: and a long integer takes quadratic time.
CHECKER = json.JSONDecoder(parse_constant=_no_constant, parse_int=float)


class BodyBudget:
    """What has come of all the bodies being read, BODIES_BYTES together.

    Beyond that, the body that has been coming for the longest is given up.
    """

    def __init__(self) -> None:
        self.parts: dict[BodyPart, None] = {}  # in the order in which they began
        self.size = 0

    @contextlib.contextmanager
    def part(self) -> Iterator[BodyPart]:
        part = BodyPart(self)
        self.parts[part] = None
        try:
            with part.scope:
                yield part
        finally:
            self.parts.pop(part, None)
            self.size -= len(part.body)
        if part.scope.cancelled_caught:
            busy = "too many questions are arriving at once: send this one again"
            raise Problem(503, busy, "server_busy", headers={"retry-after": "2"})


class BodyPart:
    """One body, as far as it has come."""

    def __init__(self, budget: BodyBudget) -> None:
        self.budget = budget
        self.body = bytearray()
        self.scope = trio.CancelScope()

    def add(self, data: bytes) -> None:
        self.body += data
        self.budget.size += len(data)
        if self.budget.size > BODIES_BYTES:
            oldest = next(iter(self.budget.parts))
            del self.budget.parts[oldest]
            oldest.scope.cancel()


class HttpConnection(Protocol):
    """What a Request needs of its connection: Http1, or a stream of HTTP/2."""

    async def receive(self) -> bytes | None: ...
    async def disconnected(self) -> None: ...
    async def respond(self, status: int, headers: Mapping[str, str], body: bytes) -> None: ...
    async def start(self, status: int, headers: Mapping[str, str], body: bytes) -> None: ...
    def reader(self, log: EventLog, start: int) -> Reader: ...
    async def end(self, last: bytes = b"") -> None: ...
    async def discard(self) -> None: ...


class Request:
    """One HTTP request and its response."""

    def __init__(
        self,
        connection: HttpConnection,
        method: bytes,
        target: bytes,
        headers: Iterable[tuple[bytes, bytes]],
        scheme: str,
        version: str,
        head: bytes = b"",
        trailing: bytes = b"",
    ) -> None:
        self.connection = connection
        self.method = method.decode("latin-1")
        self.headers = fold_headers(headers)
        self.scheme = scheme
        self.version = version
        self.head = head  # as it came
        self.trailing = trailing  # what came right behind the head
        text = target.decode("latin-1")
        if absolute := re.match("(?i)https?://([^/?#]*)", text):
            # RFC 9112, section 3.2.2: its host counts, and not that of the Host header.
            self.headers["host"] = absolute[1]
            text = text[absolute.end() :] or "/"
        path, _, query = text.partition("?")
        self.path = re.sub("/+", "/", unquote(path))
        self.path = self.path.rstrip("/") or "/"
        self.query = parse_query(query)
        self.body = b""
        self.extra: dict[str, str] = {}  # headers for the response, such as CORS
        self.status = 0  # of the response; 0: none has begun

    @property
    def wants_websocket(self) -> bool:
        return self.headers.get("upgrade", "").lower() == "websocket"

    @property
    def last_event_id(self) -> str | None:
        names = ("after", "lasteventid", "last-event-id")
        found = (self.query.get(name) for name in names)
        return self.headers.get("last-event-id") or next(filter(None, found), None)

    async def read_body(self, budget: BodyBudget) -> None:
        """Read the whole body, if any, so that what follows is the client leaving.

        Every handler relies on that: disconnected() would take a body for silence.
        Raises Problem 413, 408, 503.
        """
        length = self.headers.get("content-length", "")
        announced = int(length) if re.fullmatch("[0-9]{1,20}", length) else 0
        if announced > BODY_BYTES:
            raise body_too_large()
        if self.version != "2" and not announced and "transfer-encoding" not in self.headers:
            await self.connection.receive()  # which says so without waiting (RFC 9112, 6.3)
            return
        with budget.part() as part, trio.move_on_after(BODY_TIMEOUT):
            while True:
                with trio.move_on_after(BODY_SILENCE) as silence:
                    data = await self.connection.receive()
                if silence.cancelled_caught:
                    break
                if data is None:
                    raise trio.BrokenResourceError("the client left in mid-request")
                if not data:
                    self.body = bytes(part.body)
                    return
                part.add(data)
                if len(part.body) > BODY_BYTES:
                    raise body_too_large()
        raise Problem(408, "the request's body did not arrive in time")

    async def respond(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        """A short response, in one piece."""
        headers = {**(headers or {}), **self.extra}
        if status not in (204, 304):
            headers.setdefault("content-length", str(len(body)))
        self.status = status
        empty = self.method == "HEAD" or status in (204, 304)
        await self.connection.respond(status, headers, b"" if empty else body)

    async def respond_json(self, body: str, status: int = 200) -> None:
        headers = {"content-type": "application/json", "cache-control": "no-store"}
        await self.respond(status, body.encode(errors="replace") + b"\n", headers)

    async def start(self, headers: Mapping[str, str], body: bytes) -> None:
        self.status = 200
        await self.connection.start(200, {**headers, **self.extra}, body)


def body_too_large() -> Problem:
    return Problem(413, f"the body is larger than {BODY_BYTES >> 20} MiB: send less")


def fold_headers(pairs: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """By lower-case name; one that is repeated is a list (RFC 9110, section 5.3)."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in pairs:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        glue = "; " if name == "cookie" else ", "
        headers[name] = f"{headers[name]}{glue}{value}" if name in headers else value
    return headers


def parse_query(query: str) -> dict[str, str]:
    """`?a=b` by lower-case name, the last of each. What is not UTF-8 is replaced."""
    if not query:
        return {}
    try:
        pairs = parse_qs(query, max_num_fields=20, errors="replace")
    except ValueError:
        return {}
    return {name.lower(): values[-1] for name, values in pairs.items()}


def is_loopback(host: str) -> bool:
    return (
        host in ("localhost", "::1")
        or host.endswith(".localhost")
        or bool(re.fullmatch(r"127(\.\d{1,3}){3}", host))
    )


def is_address(host: str) -> bool:
    return ":" in host or bool(re.fullmatch(r"\d{1,3}(\.\d{1,3}){3}", host))


@functools.lru_cache(1000)
def split_host(netloc: str) -> tuple[str, int | None]:
    """`name:port` as a lower-case name without brackets, and the port or None."""
    if not re.fullmatch(r"[\w.:\[\]-]*", netloc):
        return "", None
    try:
        parts = urlsplit(f"//{netloc}")
        return (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return "", None


class AccessPolicy:
    """Who may ask: the Host against DNS rebinding, the Origin against other people's
    pages, the token against everybody else. Each check raises Problem."""

    def __init__(self, settings: Settings, ports: set[int]) -> None:
        self.settings = settings
        self.ports = ports
        self.on_loopback = is_loopback(settings.host.strip("[]"))
        self.hosts = {split_host(origin.partition("://")[2])[0] for origin in settings.allow_origin}
        digest = hashlib.sha256(settings.token.encode()).hexdigest()
        self.cookie = digest if settings.token else ""

    def check_host(self, request: Request) -> None:
        """Bound to loopback: any page can point its own name at us, but no address."""
        host = split_host(request.headers.get("host", "localhost"))[0]
        known = is_loopback(host) or is_address(host) or host in self.hosts - {""}
        if self.on_loopback and not known:
            foreign = f"this server is not {host!r}: ask for localhost, or start it"
            raise Problem(421, f"{foreign} with --allow-origin https://{host or 'NAME'}")

    def check_origin(self, request: Request) -> None:
        """A request without Origin is not a page's: curl, an SDK, another server."""
        origin = request.headers.get("origin")
        if origin is None or origin.lower() in self.settings.allow_origin:
            return
        if origin == "null" and not self.settings.upstream:
            return  # a page from disk may play with the demo
        if not self._is_own(origin, request.headers.get("host", "")):
            foreign = f"a page of origin {origin[:200]!r} may not do this: to allow it,"
            raise Problem(403, f"{foreign} start the server with --allow-origin {origin[:200]}")

    def _is_own(self, origin: str, host_header: str) -> bool:
        """Is this origin the server itself, on either of its ports?

        The scheme is not compared: behind a proxy we do not know our own. Where the
        whole world can connect, a name is not ours because the Host header repeats it.
        """
        parts = re.fullmatch("(?i)https?://([^/?#@]+)", origin)
        name, port = split_host(parts[1]) if parts else ("", None)
        host, host_port = split_host(host_header)
        same = name == host or (is_loopback(name) and is_loopback(host))
        trusted = self.on_loopback or is_loopback(name) or is_address(name)
        here = port == host_port or port in self.ports
        return bool(name) and same and trusted and here

    def check_token(self, request: Request) -> None:
        if not self.settings.token:
            return
        offered = [*credentials(request).values()]
        cookies = request.headers.get("cookie", "").split(";")
        named = dict(c.strip().partition("=")[::2] for c in cookies)
        good = [same_secret(given, self.settings.token) for given in offered]
        good.append(same_secret(named.get(TOKEN_COOKIE, ""), self.cookie))
        if not any(good):
            wrong = (
                "this server needs its token: send it as Authorization: Bearer (an "
                "SDK's api_key), or open /?token=... once in a browser"
            )
            raise Problem(
                401, wrong, "authentication_error", "invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip

    def set_cookie(self, request: Request) -> str:
        """Set-Cookie for a browser that has shown the token in `/?token=`."""
        proto = request.headers.get("x-forwarded-proto", request.scheme)
        secure = "; Secure" if proto.lower() == "https" else ""
        return f"{TOKEN_COOKIE}={self.cookie}; Path=/; HttpOnly; SameSite=Lax{secure}"


def same_secret(given: str, secret: str) -> bool:
    """In constant time."""
    return hmac.compare_digest(given.encode(), secret.encode())


def credentials(request: Request) -> dict[str, str]:
    """The secrets that a request offers, by header, without the word Bearer.

    Never `Basic`: that is the login for a proxy in between.
    """
    found = {name: request.headers.get(name, "") for name in ("x-api-key", "api-key")}
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    found["authorization"] = secret.strip() if scheme.lower() == "bearer" else ""
    return {name: secret for name, secret in found.items() if secret}


# ─── The routes ──────────────────────────────────────────────────────────────────────
# Every handler is one request: it makes a Reader, runs it, and is gone with it. What
# has to outlive a request is started in the writers' nursery, which is the server's.


class Page(NamedTuple):
    body: bytes
    etag: str
    type: str


def www_folder() -> Path | None:
    here = Path(__file__).parent
    return next((d for d in (here / "www", here / "chatstream_www") if d.is_dir()), None)


def read_pages() -> dict[str, Page]:
    """All of www/, read once: no path can ever leave it."""
    www = www_folder()
    pages: dict[str, Page] = {}
    for file in sorted(www.rglob("*")) if www else ():
        if file.is_file() and not file.name.endswith((".py", ".pyc")):
            body, guess = file.read_bytes(), mimetypes.guess_type(file.name)[0]
            type = guess or "text/plain"
            etag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
            charset = "; charset=utf-8" if type.startswith("text/") else ""
            path = f"/{file.relative_to(cast(Path, www)).as_posix()}"
            pages[path] = Page(body, etag, type + charset)
    if "/index.html" in pages:
        pages["/"] = pages["/index.html"]
    return pages


class Metrics:
    """Counters and one histogram, as text for Prometheus (format version 0.0.4)."""

    FIRST_TOKEN = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(
            events_delivered_total=0, gaps_total=0, sent_bytes_total=0
        )
        self.first_tokens: list[float] = [0] * (len(self.FIRST_TOKEN) + 1)
        self.first_token_sum = 0.0

    def count(self, name: str, n: int = 1, **labels: str) -> None:
        inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
        self.counts[f"{name}{{{inside}}}" if inside else name] += n

    def count_reader(self, reader: Reader) -> None:
        self.count("events_delivered_total", reader.delivered)
        self.count("gaps_total", reader.gaps)
        if reader.dropped:
            self.count("readers_dropped_total", cause=reader.dropped)

    def first_token(self, seconds: float) -> None:
        self.first_tokens[bisect.bisect_left(self.FIRST_TOKEN, seconds)] += 1
        self.first_token_sum += seconds

    def text(self, gauges: Mapping[str, int], living: Counter[str]) -> str:
        """`living` is added: what readers that are still here have counted so far."""
        lines = []
        for name, value in gauges.items():
            lines += [f"# TYPE chatstream_{name} gauge", f"chatstream_{name} {value}"]
        counts = Counter(self.counts)
        counts.update(living)
        for family, samples in itertools.groupby(
            sorted(counts), key=lambda sample: sample.partition("{")[0]
        ):
            lines.append(f"# TYPE chatstream_{family} counter")
            lines += [f"chatstream_{sample} {counts[sample]}" for sample in samples]
        name = "chatstream_first_token_seconds"
        lines.append(f"# TYPE {name} histogram")
        within = list(itertools.accumulate(self.first_tokens))
        for bound, n in zip((*self.FIRST_TOKEN, "+Inf"), within, strict=True):
            lines.append(f'{name}_bucket{{le="{bound}"}} {n}')
        lines += [f"{name}_sum {self.first_token_sum}", f"{name}_count {within[-1]}"]
        return "\n".join(lines) + "\n"


class App:
    """The logs, and every handler of a request."""

    def __init__(self, settings: Settings, ports: set[int]) -> None:
        self.settings = settings
        self.policy = AccessPolicy(settings, ports)
        self.pages = read_pages()
        self.metrics = Metrics()
        self.bodies = BodyBudget()
        self.pump = Pump()
        # The logs and who writes them
        self.clock = EventLog("clock", CLOCK_EVENTS, on_news=self.pump.notify)
        self.cluster = Cluster(self, settings.redis) if settings.redis else None
        store = self.cluster.store if self.cluster else None
        self.room = Room(self.pump.notify, store)
        self.answers = Answers(settings.linger, settings.keep, self.pump.notify, self.on_end)
        model = Upstream if settings.upstream else Demo
        self.model: Upstream | Demo = model(settings, self.answers, self.metrics)
        self.plain = Framing(functools.partial(frame_ws_plain, settings.room_suffix))
        # What goes on
        self.names: set[str] = set()  # of the room's members here
        self.wires: dict[Wire, None] = {}
        self.active = 0  # requests and members under way
        self.stopping = False
        self.metrics_text = ("", -inf)  # and when it was made
        self.writers: trio.Nursery  # the server's

    def on_end(self, answer: Answer) -> None:
        if answer.model.writer:
            return  # it counts where it is written
        ending = answer.problem.type if answer.problem else "done"
        self.metrics.count("answers_total", ending=ending)
        if answer.refused and answer.question.key and self.cluster:
            self.writers.start_soon(self.cluster.free_key, answer.question)

    def logs(self) -> list[EventLog]:
        return [self.clock, self.room, *self.answers.by_id.values()]

    # ── from a request to its handler ──

    async def handle(self, request: Request) -> None:
        """Answer one request, whatever comes of it."""
        self.active += 1
        try:
            await self.route(request)
        except Problem as problem:
            if request.status:
                raise
            headers, body = problem_response(problem)
            if problem.status in (408, 413) or problem.type == "server_busy":
                headers["connection"] = "close"
            await request.respond(problem.status, body, headers)
            if problem.status == 413:
                await request.connection.discard()
        finally:
            self.active -= 1

    async def route(self, request: Request) -> None:
        """Who asks, may they, and what for: in this order, after the whole body.

        A refusal in the middle of a body would cost the connection, and mostly be lost.
        """
        routes, arguments = self.find_routes(request.path)
        right = next(iter(routes.values())).right if routes else OWN
        self.set_cors(request, right)
        await request.read_body(self.bodies)
        self.policy.check_host(request)
        from_disk = request.headers.get("origin") == "null"
        if right == OWN and not (from_disk and request.method == "OPTIONS"):
            self.policy.check_origin(request)
        allow = ", ".join([*routes, *(["HEAD"] if "GET" in routes else []), "OPTIONS"])
        if request.method == "OPTIONS":
            return await self.preflight(request, allow)
        if right != OPEN:
            self.policy.check_token(request)
        if not routes:
            raise self.nothing_at(request.path)
        route = routes.get("GET" if request.method == "HEAD" else request.method)
        if route is None:
            wrong = f"{request.method} does not work here: use {allow}"
            raise Problem(405, wrong, headers={"allow": allow})
        await route.handler(self, request, *arguments)

    def find_routes(self, path: str) -> tuple[dict[str, Route], tuple[str, ...]]:
        """What is at this path, by method; and what its {parts} are."""
        if path in self.pages:
            return {"GET": PAGE_ROUTE}, ()
        for spelling in (path, f"/v1{path}"):  # a base URL may lack its /v1
            for template, routes in ROUTES.items():
                if found := template.fullmatch(spelling):
                    return routes, found.groups()
        return {}, ()

    def nothing_at(self, path: str) -> Problem:
        there = ", ".join(template_text(template) for template in ROUTES)
        nothing = f"there is nothing at {path[:100]!r}; there is {there}, and the pages"
        return Problem(404, nothing, code="not_found")

    def set_cors(self, request: Request, right: str) -> None:
        """A page that may ask may read the response, also a refusal."""
        origin = request.headers.get("origin")
        if right != OWN:
            request.extra["access-control-allow-origin"] = "*"
            request.extra["timing-allow-origin"] = "*"
            return
        request.extra["vary"] = "Origin"
        request.extra["access-control-expose-headers"] = MAY_READ
        if origin is None:
            return
        try:
            if origin != "null":  # a page from disk is told what to do
                self.policy.check_origin(request)
            request.extra["access-control-allow-origin"] = origin
        except Problem:
            pass  # route() raises it again, when it is time to

    async def preflight(self, request: Request, allow: str) -> None:
        wanted = request.headers.get("access-control-request-headers", "")
        headers = {
            "allow": allow,
            "access-control-allow-methods": "GET, POST, DELETE, HEAD, OPTIONS",
            "access-control-allow-headers": f"{MAY_SEND}, {wanted}".rstrip(", "),
            "access-control-max-age": "600",
        }
        await request.respond(204, headers=headers)

    # ── short connections ──

    async def get_page(self, request: Request) -> None:
        page = self.pages[request.path]
        if request.path == "/" and self.settings.token and "token" in request.query:
            return await self.log_in(request)
        headers = {**PAGE_HEADERS, "etag": page.etag}
        known = request.headers.get("if-none-match", "")
        if page.etag in known or known == "*":
            return await request.respond(304, headers=headers)
        await request.respond(200, page.body, {**headers, "content-type": page.type})

    async def log_in(self, request: Request) -> None:
        """The token by a visit: from here on the browser sends it as a cookie."""
        if not same_secret(request.query["token"], self.settings.token):
            wrong = "this is not the server's token: look at how it was started"
            raise Problem(401, wrong, "authentication_error", "invalid_api_key")
        cookie = self.policy.set_cookie(request)
        headers = {"location": "/", "set-cookie": cookie, "cache-control": "no-store"}
        await request.respond(303, headers=headers)

    async def get_healthz(self, request: Request) -> None:
        counts = self.counts()
        if self.cluster:
            counts.update(self.cluster.counts_of_others())
        status = {"status": "stopping" if self.stopping else "ok"}
        health = {**status, **counts, "model": self.settings.model_name}
        await request.respond_json(to_json(health), 503 if self.stopping else 200)

    def counts(self) -> Counter[str]:
        """What goes on in this process."""
        answers = (len(answer.readers) for answer in self.answers.by_id.values())
        return Counter(
            readers=len(self.clock.readers) + sum(answers),
            answers=sum(not a.model.writer for a in self.answers.running),
            members=self.room.here,
        )

    async def get_metrics(self, request: Request) -> None:
        """Made anew once a second at most: it asks every reader."""
        text, made = self.metrics_text
        if trio.current_time() - made > 1:
            living = Metrics()
            for log in self.logs():
                for reader in log.readers:
                    living.count_reader(reader)
            living.count("sent_bytes_total", sum(wire.sent for wire in self.wires))
            gauges = {**self.counts(), "connections": len(self.wires)}
            text = self.metrics.text(gauges, living.counts)
            self.metrics_text = text, trio.current_time()
        headers = {"content-type": "text/plain; version=0.0.4"}
        await request.respond(200, text.encode(), headers)

    async def get_models(self, request: Request) -> None:
        headers = self.passed(request)
        await self.respond_soon(request, lambda: self.model.models(headers))

    async def get_model(self, request: Request, name: str) -> None:
        headers = self.passed(request)
        await self.respond_soon(request, lambda: self.model.model(name, headers))

    async def post_short(self, request: Request, path: str) -> None:
        """Passed through, with nothing to follow: embeddings, count_tokens."""
        body, headers = JsonBody(request.body), self.passed(request)
        await self.respond_soon(request, lambda: self.model.post(path, headers, body))

    async def respond_soon(self, request: Request, ask: Callable[[], Awaitable[Reply]]) -> None:
        """With what the model says, unless the client leaves before."""
        said: list[Reply | Problem] = []

        async def wait() -> None:
            try:
                said.append(await ask())
            except Problem as problem:
                said.append(problem)

        if await race_disconnect(request.connection.disconnected, wait):
            if isinstance(said[0], Problem):
                raise said[0]
            request.extra |= said[0].headers
            await request.respond_json(said[0].body)

    async def post_embeddings(self, request: Request) -> None:
        await self.post_short(request, "/embeddings")

    async def post_count_tokens(self, request: Request) -> None:
        await self.post_short(request, "/messages/count_tokens")

    def passed(self, request: Request) -> dict[str, str]:
        return passed_headers(request, self.settings.token)

    async def get_time(self, request: Request) -> None:
        """The clock as a short connection: for the next tick, ask again."""
        last = self.clock.end - 1
        tick = {"id": self.clock.id(last), "data": self.clock[last].data}
        await request.respond_json(to_json(tick))

    # ── readers over HTTP ──

    async def get_clock(self, request: Request) -> None:
        place = self.clock.place_after(request.last_event_id)
        if place is None:
            return await self.stream(request, self.clock, self.clock.end)
        await self.stream(request, self.clock, place, request.last_event_id or "")

    async def stream(self, request: Request, log: EventLog, start: int, after: str = "") -> None:
        """A log as an event stream, from a place to its end or the client's.

        Its first lines go out at once, also with no event to send: else neither client
        nor proxies see that it is open. There is no blank line yet, on which some
        clients make an empty event. `after` is the id after which the stream begins: a
        client that is cut off before the first event returns with that.
        """
        if request.method == "HEAD":
            return await request.respond(200, headers=SSE_HEADERS)
        more = after and not (log.closed and start >= log.end)
        id_line = f"id: {after}\n" if more else ""
        opening = f"retry: {SSE_RETRY * 1000}\n{id_line}"
        await request.start(SSE_HEADERS, opening.encode())
        reader = request.connection.reader(log, start)
        try:
            if not await reader.run(request.connection.disconnected):
                return  # the client has left: there is nobody to end it for
        finally:
            self.metrics.count_reader(reader)
        again = random.randint(1000, 5000)  # so that they do not all return at once
        last = b"retry: %d\n" % again if self.stopping else b""
        await request.connection.end(last)

    async def post_question(self, request: Request) -> None:
        """The chat page's own protocol: {messages} in, {content} events out."""
        await self.post_answer(request, CHAT_PAGE)

    async def post_chat(self, request: Request) -> None:
        await self.post_answer(request, CHAT)

    async def post_completion(self, request: Request) -> None:
        await self.post_answer(request, COMPLETIONS)

    async def post_response(self, request: Request) -> None:
        await self.post_answer(request, RESPONSES)

    async def post_message(self, request: Request) -> None:
        await self.post_answer(request, MESSAGES)

    async def post_answer(self, request: Request, api: Api) -> None:
        """A new answer; or the one that this question, asked earlier, has started.

        Two lifetimes part here: the writer is started in the server's nursery, and this
        request only attends. It waits for the model no longer than its client does.
        """
        if last := request.last_event_id:
            name = last.rpartition("-")[0] or last
            return await self.follow(request, await self.find_answer(name), last)
        question = self.read_question(request, api)
        request.body = b""
        answer = await self.ask(question)
        with answer.attended():
            if self.cluster:
                await self.cluster.announce(answer)
            disconnected = request.connection.disconnected
            if await race_disconnect(disconnected, answer.started):
                await self.first_response(request, answer)

    def read_question(self, request: Request, api: Api) -> Question:
        self.model.check(api)
        body = JsonBody(request.body)
        check_question(body.fields, api)
        body.choose(self.model.choose(body.model))
        key = request.headers.get("idempotency-key", "")
        question = api.ask(api, body, self.passed(request))
        if key:
            caller = to_json([api.path, key, sorted(credentials(request).items())])
            question.key = hashlib.sha256(caller.encode()).hexdigest()
            question.digest = hashlib.sha256(request.body).hexdigest()
        return question

    async def ask(self, question: Question) -> Answer:
        """A new answer, or the one that the same Idempotency-Key has started.

        Raises Problem 422 if that was another question.
        """
        answer, name = self.answers.by_key.get(question.key), ""
        if question.key and answer is None and self.cluster:
            answer, name = await self.cluster.claim_key(question)
        if answer is not None:
            if answer.question.digest != question.digest:
                other = "this Idempotency-Key was used for another question: use a new one"
                raise Problem(422, other, param="Idempotency-Key")
            return answer
        if self.stopping:
            raise server_stopping()
        return self.answers.begin(self.writers, self.model, question, name)

    async def first_response(self, request: Request, answer: Answer) -> None:
        """A stream that has begun is 200, whatever comes: problems are events then."""
        request.extra["x-answer-id"] = answer.name
        question, problem = answer.question, answer.problem
        if problem and (answer.refused or not question.stream):
            raise problem.with_traceback(None)
        request.extra |= answer.headers
        if question.polled:
            begun = response_now(answer, answer.start + 1)
            await request.respond_json(to_json(begun))
        elif question.stream:
            await self.stream(request, answer, 0, answer.name)
        else:
            await request.respond_json(question.api.whole(answer))

    async def get_answer(self, request: Request, name: str) -> None:
        answer = await self.find_answer(name)
        await self.follow(request, answer, request.last_event_id or name)

    async def follow(
        self, request: Request, answer: Answer, last_event_id: str, start: int = 0
    ) -> None:
        """An answer again, after this event; its name stands for "nothing seen yet"."""
        with answer.attended():
            if last_event_id != answer.name:
                await self.reach(answer, last_event_id)
                place = answer.place_after(last_event_id)
                if place is None:
                    wrong = (
                        "this Last-Event-ID is not of this answer: send the last one that you saw"
                    )
                    raise Problem(400, wrong, param="Last-Event-ID")
                start = place
            request.extra |= {"x-answer-id": answer.name, **answer.headers}
            if answer.closed and start == answer.end and request.method != "POST":
                # To an EventSource this says: do not come back (HTML standard 9.2.3).
                # A client that repeats a POST would take it for a failure.
                return await request.respond(204)
            await self.stream(request, answer, start, last_event_id)

    async def reach(self, answer: Answer, last_event_id: str) -> None:
        """What a reader has seen in another process may still be on its way to us.

        Without this, its id would be refused as one of the future. A second is many
        times what the way takes.
        """
        name, _, place = last_event_id.rpartition("-")
        if name == answer.name and re.fullmatch("[0-9]{1,15}", place) and self.cluster:
            with trio.move_on_after(1):
                while int(place) >= answer.end and not answer.closed:  # noqa: ASYNC110
                    await trio.sleep(0.01)

    async def delete_answer(self, request: Request, name: str) -> None:
        self.answers.stop(await self.find_answer(name), stopped())
        await request.respond(204)

    async def find_answer(self, name: str) -> Answer:
        answer = self.answers.by_id.get(name)
        if answer is None and self.cluster:
            answer = await self.cluster.find(name)
        if answer is None:
            gone = "there is no such answer, or no longer"
            raise Problem(404, gone, code="not_found")
        return answer

    # ── responses ──

    async def find_response(self, id: str) -> Answer:
        """By the id that we gave it: the upstream's, and our secret behind a dot."""
        answer = await self.find_answer(id.rpartition(".")[2])
        await self.reach(answer, answer.id(0))
        if answer.question.api is not RESPONSES or response_now(answer).get("id") != id:
            raise Problem(404, "there is no such response", code="not_found")
        return answer

    async def get_response(self, request: Request, id: str) -> None:
        answer = await self.find_response(id)
        if request.query.get("stream", "").lower() != "true":
            return await request.respond_json(to_json(response_now(answer)))
        start, after = 0, request.query.get("starting_after", "")
        if re.fullmatch("[0-9]{1,15}", after):
            await self.reach(answer, answer.id(int(after)))
            start = place_of_sequence(answer, int(after))
        last = request.last_event_id or answer.name
        await self.follow(request, answer, last, start)

    async def cancel_response(self, request: Request, id: str) -> None:
        answer = await self.find_response(id)
        self.answers.stop(answer, stopped())
        with trio.move_on_after(2):  # another process may have to hear of it
            await answer.ended.wait()
        await request.respond_json(to_json(response_now(answer)))

    async def not_here(self, request: Request, *parts: str) -> None:
        raise Problem(
            404, "this server keeps responses to be retrieved, streamed and cancelled "
            "while they run and for a while after, and nothing else of this API",
            code="not_found",
        )  # fmt: skip

    # ── readers over WebSocket ──

    def admit(self, request: Request) -> bool:
        """Is this a handshake for the clock (or the room)? Raises Problem."""
        self.policy.check_host(request)
        check_handshake(request)
        self.policy.check_origin(request)
        self.policy.check_token(request)
        if request.path not in ("/", "/room", "/clock"):
            raise Problem(404, "there is no WebSocket here: use /room or /clock")
        if self.stopping:
            raise server_stopping()
        return request.path == "/clock"

    async def session(
        self, wire: Wire, is_clock: bool, head: bytes, trailing: bytes, query: Mapping[str, str]
    ) -> str:
        """From the handshake to the close frame; returns how it ended."""
        log = self.clock if is_clock else self.room
        now = log.end  # before the handshake ends: it misses nothing of what follows
        with trio.fail_after(HEAD_TIMEOUT):
            v1 = await shake_hands(wire, head, not is_clock)
        member = self.member(wire, is_clock, v1, now, query)
        member.frames.feed(trailing)
        try:
            if is_clock:
                await member.stay(ignore, 0)
            else:
                await self.attend_room(member)
            await member.goodbye()
        finally:
            self.metrics.count_reader(member)
        return f"closed {member.close.code} {member.close.reason}".rstrip()

    async def attend_room(self, member: Member) -> None:
        await self.enter(member.name, "joined")
        try:
            await member.stay(self.room.store, self.settings.room_rate)
        finally:
            await self.enter(member.name, "left")

    async def enter(self, name: str, type: str) -> None:
        """Let the room know. It works without, should that not be stored.

        Shielded: that a member left is told also when all is being cancelled.
        """
        room = self.room
        room.here += 1 if type == "joined" else -1
        (self.names.add if type == "joined" else self.names.discard)(name)
        with contextlib.suppress(Problem), trio.move_on_after(1, shield=True):
            await room.store(Said(type, name))

    def member(
        self, wire: Wire, is_clock: bool, v1: bool, now: int, query: Mapping[str, str]
    ) -> Member:
        """Where this one starts to read, and how the events look to it."""
        log = self.clock if is_clock else self.room
        place = log.place_after(query.get("after"))
        if is_clock:
            return Member(wire, log, WS_CLOCK, now if place is None else place)
        name = free_name(clean_name(query.get("name", "")), self.names)
        if not v1:
            return Member(wire, log, self.plain, now, name)
        start = self.room.history() if place is None else place
        return Member(wire, log, WS_JSON, start, name)


async def ignore(said: Said) -> None:
    """What a member of the clock says."""


# Who may ask: everybody; everybody with the token; with the token, and no page of a
# foreign origin.
OPEN, PUBLIC, OWN = "open", "public", "own"


class Route(NamedTuple):
    handler: Callable[..., Awaitable[None]]
    right: str


def template_text(template: re.Pattern[str]) -> str:
    return re.sub(r"\(\?P<(\w+)>[^)]*\)\??", r"{\1}", template.pattern)


PAGE_ROUTE = Route(App.get_page, OPEN)
ANSWER, RESPONSE = "/answers/(?P<id>[^/]+)", "/v1/responses/(?P<id>[^/]+)"
ROUTES: dict[re.Pattern[str], dict[str, Route]] = {
    re.compile(template): {method: Route(handler, right) for method, handler in handlers.items()}
    for template, right, handlers in (
        ("/clock", PUBLIC, {"GET": App.get_clock}),
        ("/time", PUBLIC, {"GET": App.get_time}),
        ("/healthz", OPEN, {"GET": App.get_healthz}),
        ("/metrics", OWN, {"GET": App.get_metrics}),
        ("/chatgptApi/chatgpt_qa_stream", OWN, {"POST": App.post_question}),
        ("/v1/chat/completions", OWN, {"POST": App.post_chat}),
        ("/v1/completions", OWN, {"POST": App.post_completion}),
        ("/v1/responses", OWN, {"POST": App.post_response}),
        ("/v1/messages", OWN, {"POST": App.post_message}),
        (RESPONSE, OWN, {"GET": App.get_response}),
        (f"{RESPONSE}/cancel", OWN, {"POST": App.cancel_response}),
        (f"{RESPONSE}/input_items", OWN, {"GET": App.not_here}),
        ("/v1/conversations(?P<more>/.*)?", OWN, {"POST": App.not_here}),
        ("/v1/models", OWN, {"GET": App.get_models}),
        ("/v1/models/(?P<name>.+)", OWN, {"GET": App.get_model}),
        ("/v1/embeddings", OWN, {"POST": App.post_embeddings}),
        ("/v1/messages/count_tokens", OWN, {"POST": App.post_count_tokens}),
        (ANSWER, OWN, {"GET": App.get_answer, "DELETE": App.delete_answer}),
    )
}


# ─── The server ──────────────────────────────────────────────────────────────────────


class Server:
    """Accepting, the server's own tasks, and a stop that everybody is told of."""

    def __init__(self, app: App, tls: ssl.SSLContext | None) -> None:
        self.app = app
        self.tls = tls
        self.stopped = trio.Event()

    async def run_writers(
        self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """The server's own tasks: all writers, the pump, the keeper of silence."""
        app = self.app
        async with trio.open_nursery() as app.writers:
            app.writers.start_soon(tick, app.clock)
            app.writers.start_soon(app.pump.run)
            app.writers.start_soon(self.keep_alive)
            app.writers.start_soon(app.model.run)
            task_status.started()

    async def keep_alive(self) -> None:
        """One task for the silence of all: a timer for each reader would cost more."""
        while True:
            await trio.sleep(0.25)
            now, turn = trio.current_time(), Turn()
            self.app.answers.forget_old(now)
            # Readers of an answer that has ended are not silent: they have it to read.
            for log in (self.app.clock, self.app.room, *self.app.answers.running):
                for n, reader in enumerate(list(log.readers)):
                    if n % 64 == 63:
                        await turn.pause()
                    if reader in log.readers:
                        reader.keep_alive(now)
                await turn.pause()

    async def accept(self, listener: socket.socket, connections: trio.Nursery) -> NoReturn:
        """One task for each client, from now on until it leaves."""
        warned = -inf
        while True:
            await trio.lowlevel.wait_readable(listener)
            try:
                for _ in range(50):
                    client, _ = listener.accept()
                    connections.start_soon(self.connection, client)
            except BlockingIOError:
                pass
            except OSError as error:  # of a client that has gone, or no file is left
                if trio.current_time() > warned + 10:
                    logger.error("new connections wait: %s (see ulimit -n)", error)
                    warned = trio.current_time()
                await trio.sleep(0.1)

    async def connection(self, client: socket.socket) -> None:
        """One client: whatever goes wrong inside ends here, as one line in the log."""
        client.setblocking(False)
        if self.tls:
            client = self.tls.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
        wire = Wire(client)
        self.app.wires[wire] = None
        try:
            await self.converse(wire)
        except* QUIET_ENDS as group:
            logger.log(
                logging.INFO if wire.stuck else logging.DEBUG, "%s ended: %s", wire.peer, why(group)
            )
        except* Exception:
            logger.exception("a connection failed in a way that nobody thought of")
        finally:
            del self.app.wires[wire]
            self.app.metrics.count("sent_bytes_total", wire.sent)
            wire.close()

    async def converse(self, wire: Wire) -> None:
        """TLS if we have a certificate, then whatever protocol the client speaks.

        A WebSocket begins as HTTP/1, so h11 reads its head, too: one place for limits.
        """
        scheme = "http"
        if isinstance(wire.socket, ssl.SSLSocket):
            scheme = "https"
            try:
                with trio.fail_after(HEAD_TIMEOUT):
                    await wire.when_ready(wire.socket.do_handshake)
            except trio.BrokenResourceError:
                return await wire.finish()  # with an alert that says why
            if wire.socket.selected_alpn_protocol() == "h2":
                handle = functools.partial(self.handle, wire)
                return await serve_http2(wire, handle, self.stopped)
        http1 = Http1(wire, scheme)
        request = await http1.serve(functools.partial(self.handle, wire))
        if request is None:
            return
        started, path, query = time.monotonic(), request.path, request.query
        try:
            is_clock = self.app.admit(request)
        except Problem as problem:
            await http1.refuse(problem)
            return await wire.finish()
        head, trailing = request.head, request.trailing
        del http1, request  # 4 KB that a member does not need any more
        self.app.active += 1
        ended = "cut off"
        try:
            ended = await self.app.session(wire, is_clock, head, trailing, query)
        finally:
            await wire.finish()
            self.app.active -= 1
            self.log_line(wire, f"WebSocket {path}", ended, started, 0)

    async def handle(self, wire: Wire, request: Request) -> None:
        """One request, and its line in the log."""
        started, sent = time.monotonic(), wire.sent
        try:
            await self.app.handle(request)
        finally:
            what = f"{request.method} {request.path}"
            self.log_line(wire, what, str(request.status or "cut"), started, sent)

    def log_line(self, wire: Wire, what: str, ended: str, started: float, sent: int) -> None:
        """One line that nobody can forge, and that gives no answer away."""
        if logger.isEnabledFor(logging.INFO):
            what = re.sub("([0-9a-f]{6})[0-9a-f]{26}", r"\1...", what)[:200]
            text = f"{what} {ended}".encode("ascii", "backslashreplace").decode()
            text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
            logger.info(
                "%s %s %d bytes %.1f s", wire.peer, text,
                wire.sent - sent, time.monotonic() - started,
            )  # fmt: skip

    async def serve(
        self, listeners: list[socket.socket], stop: trio.Event, ready: Callable[[], object]
    ) -> None:
        """Accept until `stop`, then end gracefully: every reader is told.

        A nursery ends after what is inside of it, and the connections' is inside of
        the writers'. So no reader outlives what it reads.
        """
        app = self.app
        async with trio.open_nursery() as writers:
            await writers.start(self.run_writers)
            if app.cluster:
                await writers.start(app.cluster.run)
            async with trio.open_nursery() as connections:
                async with trio.open_nursery() as accepting:
                    for listener in listeners:
                        accepting.start_soon(self.accept, listener, connections)
                    ready()
                    await stop.wait()
                    accepting.cancel_scope.cancel()
                for listener in listeners:
                    listener.close()
                await self.end()
                connections.cancel_scope.cancel()
            writers.cancel_scope.cancel()

    async def end(self) -> None:
        """Answers may finish; then all logs end, and with them their readers.

        Ours end before the copies of others: other processes are told how ours ended
        while there still is a Redis connection to tell them by.
        """
        app = self.app
        app.stopping = True
        with trio.move_on_after(app.settings.grace):
            for answer in app.answers.open():
                await answer.ended.wait()
        for answer in app.answers.open():
            app.answers.stop(answer, server_stopping())
        if app.cluster:
            await app.cluster.goodbye()
        for answer in app.answers.open():
            answer.discard()
        app.clock.close()
        app.room.close()
        self.stopped.set()
        with trio.move_on_after(LINGER_CLOSE):
            while app.active:  # noqa: ASYNC110 (an event would be set in four places)
                await trio.sleep(0.02)


def why(group: BaseException) -> str:
    """The first reason in a group of exceptions, in words."""
    error = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}".rstrip(": ")


# ─── What the upstream says ──────────────────────────────────────────────────────────
# The upstream's stream is read by the standard's rules, bytes first and text second, and
# passed on as it came. It has said everything only when it has said its end: whatever ends
# before that is a cut.

EVENT_BYTES, WHOLE_BYTES = 16 * MiB, 16 * MiB
WORDS_BYTES, WORDS_CHARACTERS = 64 * KiB, 500  # of the upstream's reasons


class ServerSentEvent(NamedTuple):
    data: str
    type: str


class SSEParser:
    """Reads an event stream (HTML standard 9.2.6), however its bytes were split.

    Lines are cut as bytes and decoded one by one, so that a character that arrives in two
    pieces is whole again. An event larger than `max_bytes` raises ValueError.

    An unfinished line is a list of its pieces, joined when its end is there: adding each
    piece to one growing string would take time that grows with its square.
    """

    _LINE_END = re.compile(rb"\r\n|\n|\r")

    def __init__(self, max_bytes: float = inf) -> None:
        self.max_bytes = max_bytes
        self._type = ""
        self._data: list[str] = []
        self._size = 0  # of the event that is not complete yet
        self._tail: list[bytes] = []
        self._after_cr = False  # a line end already; should a LF come, it is part of it
        self._first_line = True  # which may have a byte order mark

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        """Take the next bytes; return the events that they complete.

        A last event without its blank line is never returned, as the standard wants.
        """
        if self._after_cr and data[:1] == b"\n":  # the second half of a CR LF
            data, self._after_cr = data[1:], False
        if not data:
            return []
        self._after_cr = data[-1:] == b"\r"
        *lines, tail = self._LINE_END.split(data)
        if lines:
            lines[0] = b"".join(self._tail) + lines[0]
            self._tail.clear()
        self._tail.append(tail)
        self._size += len(data)
        events = [event for line in lines if (event := self._line(line))]
        if self._size > self.max_bytes:
            limit = self.max_bytes
            size = f"{limit / MiB:g} MiB" if limit >= MiB else f"{limit} bytes"
            raise ValueError(f"an event of more than {size}")
        return events

    def unfinished(self) -> str:
        """The data of a last event that lacks its blank line."""
        if line := b"".join(self._tail):
            self._line(line)
        return "\n".join(self._data)

    def _line(self, raw: bytes) -> ServerSentEvent | None:
        if self._first_line:
            raw, self._first_line = raw.removeprefix(b"\xef\xbb\xbf"), False
        if raw:
            name, _, value = raw.decode(errors="replace").partition(":")
            if name == "data":
                self._data.append(value.removeprefix(" "))
            elif name == "event":
                self._type = value.removeprefix(" ")
            return None
        # A blank line. Without data it does not end an event, and the type is lost.
        data, type = self._data, self._type
        self._data, self._type, self._size = [], "", len(self._tail[0])
        return ServerSentEvent("\n".join(data), type or "message") if data else None


def upstream_problem(message: str, status: int = 502, code: str | None = None) -> Problem:
    return Problem(status, message, "upstream_error", code)


def find_words(said: Any) -> str:
    """The reason in an error, wherever it stands; "" if there is none."""
    if isinstance(said, str):
        return said
    if isinstance(said, dict):
        places = ("error", "message", "detail", "errors", "msg", "title", "reason")
        said = [said[name] for name in places if said.get(name)]
    if isinstance(said, list):
        return next((words for item in said[:5] if (words := find_words(item))), "")
    return ""


def reason_given(status: int, said: Any, secrets: Iterable[str]) -> Problem:
    """The upstream's own words about what went wrong, without the key."""
    words = clean_words(find_words(said), secrets)
    problem = upstream_problem(words or f"the upstream answered {status}", status)
    error = said[0] if isinstance(said, list) and said else said
    while isinstance(error, dict) and isinstance(error.get("error"), dict):
        error = error["error"]
    for name in ("type", "param", "code"):
        value = error.get(name) if isinstance(error, dict) else None
        if isinstance(value, str | int) and value not in ("", "error"):
            problem.error[name] = clean_words(value, secrets) if isinstance(value, str) else value
    return problem


def clean_words(text: str, secrets: Iterable[str]) -> str:
    """In this order: strip tags, hide the key, cut to length.

    A key with a tag inside would be put together by stripping, and a key that is cut in half
    could not be found.
    """
    text = re.sub(r"(?is)<(script|style)\b[^<>]*>.*?</\1>", " ", text)
    text = html.unescape(re.sub("</?[A-Za-z!][^<>]*>", "", text))
    text = " ".join(hide(text, secrets).split())
    return text if len(text) <= WORDS_CHARACTERS else text[:WORDS_CHARACTERS] + "..."


def hide(text: str, secrets: Iterable[str]) -> str:
    """Without the keys, however JSON, Python or a URL would write them, also twice."""
    for secret in secrets:
        if len(secret) >= 8:  # a shorter one would be found in innocent words
            text = key_pattern(secret).sub("[key]", text)
    return text


@functools.lru_cache(100)
def key_pattern(secret: str) -> re.Pattern[str]:
    codes = ((re.escape(c), f"{ord(c):02x}") for c in secret)
    return re.compile(
        "".join(rf"\\*(?:{c}|(?i:u00{code}|x{code}|%(?:25)*{code}))" for c, code in codes)
    )


# ─── The four protocols ──────────────────────────────────────────────────────────────
# One relay for all of them: what differs stands in the table at the end. Sources: the
# references of OpenAI's chat completions, completions and responses, and of Anthropic's
# messages.

RESPONSE_ENDS = {"response.completed", "response.incomplete", "response.failed"}


class JsonBody:
    """A question as JSON: parsed once, to be checked, and changed only where it must be.

    What need not change goes on byte for byte. Raises Problem 400, 413.
    """

    def __init__(self, raw: bytes) -> None:
        brackets = raw.count(b"{") + raw.count(b"[")
        if brackets > BODY_BRACKETS or raw.count(b",") > BODY_COMMAS:
            raise Problem(413, "the body has too many brackets or commas: send less")
        try:
            self.fields = CHECKER.decode(raw.decode())
        except RecursionError:
            raise Problem(400, "the body is not JSON: nested too deeply") from None
        except ValueError as error:
            raise Problem(400, f"the body is not JSON: {error}"[:300]) from None
        if not isinstance(self.fields, dict):
            raise Problem(400, 'send a JSON object, such as {"messages": [...]}')
        self._raw = raw
        self._changes: JSON = {}

    @property
    def model(self) -> str:
        return str(self._changes.get("model") or self.fields.get("model") or "")

    def choose(self, model: str) -> None:
        # A second "model" may be the one that counts for the upstream.
        twice = self._raw.count(b'"model"') > 1 or b"\\u00" in self._raw
        if model and (model != self.fields.get("model") or twice):
            self._changes["model"] = model

    def change(self, name: str, value: object) -> None:
        """None takes the field out."""
        self._changes[name] = value

    def raw(self) -> bytes:
        if not self._changes:
            return self._raw
        fields = from_json(self._raw) | self._changes
        gone = [name for name, value in self._changes.items() if value is None]
        return to_json({k: v for k, v in fields.items() if k not in gone}).encode()


def check_question(fields: JSON, api: Api) -> None:
    """The part of a question that we rely on. Raises Problem 400.

    All else is the upstream's to judge, and passed on: it may be newer than we are.
    """
    messages = fields.get("messages")
    if api.has_messages and (not isinstance(messages, list) or not messages):
        wanted = "messages must be a list of at least one {role, content}"
        raise Problem(400, wanted, param="messages")
    for n, message in enumerate(cast(list[Any], messages) if api.has_messages else ()):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Problem(400, "each message needs a role", param=f"messages[{n}]")
        if not isinstance(message.get("content"), str | list | None):
            wanted = "content must be text, or a list of parts"
            raise Problem(400, wanted, param=f"messages[{n}].content")
    kinds = {"stream": bool, "background": bool, "model": str, "stream_options": dict}
    for name, kind in {**kinds, "previous_response_id": str}.items():
        if not isinstance(fields.get(name), kind | None):
            raise Problem(400, f"{name} has the wrong type", param=name)


class Relay:
    """What the upstream says, event by event, into one answer."""

    def __init__(self, answer: Answer, metrics: Metrics, secrets: Iterable[str] = ()) -> None:
        self.answer = answer
        self.api = answer.question.api
        self.metrics = metrics
        self.secrets = secrets
        self.began = False  # it has said something
        self.spoke = False  # a word of its answer
        self.choices: dict[str, bool] = {}  # those begun; True: has its finish_reason
        self.sequence = -1  # the last sequence_number
        self.response_id = ""  # as we name it

    def take(self, event: ServerSentEvent) -> None:
        """Raises Problem if it says an error, or nothing that can be understood."""
        data, type = event
        if self.answer.closed or not data.strip():
            return
        if data.strip() == "[DONE]":
            if self.api.adds_done:
                self.finish()
            return
        try:
            chunk = from_json(data)
        except ValueError:
            if type != "error":
                raise upstream_problem("the upstream sent a chunk that is not JSON") from None
            chunk = data
        if type == "error" or is_error(chunk):
            raise reason_given(502, chunk, self.secrets)
        if not isinstance(chunk, dict):
            raise upstream_problem("the upstream sent a chunk that is not an object")
        if not self.began:
            self.began = True
            self.answer.accepted.set()
        self.api.take(self, type, data, chunk)

    def take_whole(self, text: str) -> None:
        """A body that is not a stream. Raises Problem."""
        try:
            whole = from_json(text)
        except ValueError:
            raise upstream_problem("the upstream sent what is not JSON") from None
        if is_error(whole) or not isinstance(whole, dict) or self.api.says not in whole:
            raise reason_given(502, whole, self.secrets)
        if whole[self.api.says] == [] and self.api.adds_done and self.answer.question.stream:
            raise upstream_problem("the upstream ended without an answer", code="cut")
        try:
            chunks = self.api.split(whole) if self.answer.question.stream else []
        except (TypeError, AttributeError, ValueError, LookupError):
            raise upstream_problem("the upstream's answer has a shape that nobody knows") from None
        for chunk in chunks:
            self.take(ServerSentEvent(to_json(chunk), "message"))
        if not self.answer.question.stream:
            self.write(*self.api.keep(self, text, whole))
        self.answer.finish()

    def end(self) -> None:
        """The body has ended cleanly. Raises Problem if the answer has not."""
        if not self.answer.closed:
            if self.began and not (self.choices and all(self.choices.values())):
                raise upstream_problem("the upstream stopped in mid-answer", code="cut")
            self.finish()

    def finish(self) -> None:
        if not self.began:
            raise upstream_problem("the upstream ended without an answer", code="cut")
        self.answer.finish()

    def write(self, data: str, type: str = "message", speaks: bool = True) -> None:
        if speaks and not self.spoke:
            self.spoke = True
            self.metrics.first_token(trio.current_time() - self.answer.begun)
        self.answer.write(data, type)


def is_error(chunk: Any) -> bool:
    """Whichever of the usual forms it has; a null in `error` is not one."""
    if isinstance(chunk, list):
        return bool(chunk) and is_error(chunk[0])
    return isinstance(chunk, dict) and (
        "error" in (chunk.get("object"), chunk.get("type"))
        or (chunk.get("error") is not None and chunk.get("object") != "response")
    )


def take_chat(relay: Relay, type: str, data: str, chunk: JSON) -> None:
    note_choices(relay, chunk)
    relay.write(data, type)


def note_choices(relay: Relay, chunk: JSON) -> Any:
    """Which choices have begun, and which have ended. Returns the first one's delta."""
    delta = None
    choices = chunk.get("choices")
    for n, choice in enumerate(choices if isinstance(choices, list) else ()):
        if isinstance(choice, dict):
            index = choice.get("index", n)
            ended = choice.get("finish_reason") is not None
            relay.choices[str(index)] = ended or relay.choices.get(str(index), False)
            delta = delta or choice
    return delta


def take_chat_page(relay: Relay, type: str, data: str, chunk: JSON) -> None:
    """Text, reasoning, and an end that is not an ordinary one, each as an event."""
    choice = note_choices(relay, chunk) or {}
    delta = choice.get("delta")
    delta = delta if isinstance(delta, dict) else {}
    if text := text_of(delta.get("content")):
        relay.write(to_json({"content": text}))
    if text := text_of(delta.get("reasoning_content") or delta.get("reasoning")):
        relay.write(to_json({"content": "", "reasoning": text}))
    finish = choice.get("finish_reason")
    if isinstance(finish, str) and finish != "stop":
        relay.write(to_json({"content": "", "finish_reason": finish}))


def text_of(content: Any) -> str:
    """Text, also as a list of parts."""
    if isinstance(content, list):
        parts = (part.get("text") if isinstance(part, dict) else part for part in content)
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


def take_response(relay: Relay, type: str, data: str, chunk: JSON) -> None:
    """As it came, but for our id, and a sequence_number where there is none."""
    type, before = str(chunk.get("type") or type), dict(chunk)
    if isinstance(response := chunk.get("response"), dict):
        chunk["response"] = rename_response(relay, response)
    if "response_id" in chunk and relay.response_id:
        chunk["response_id"] = relay.response_id
    if not isinstance(chunk.get("sequence_number"), int):
        chunk["sequence_number"] = relay.sequence + 1
    relay.sequence = chunk["sequence_number"]
    text = data if chunk == before else to_json(chunk)
    if type == "response.failed":
        text = hide(text, relay.secrets)
    relay.write(text, type, type.endswith(".delta"))
    if type in RESPONSE_ENDS:
        relay.answer.finish()


def rename_response(relay: Relay, response: JSON) -> JSON:
    """Its id with our secret: it cannot be guessed, and it cannot be repeated."""
    if not relay.response_id:
        named = response.get("id") or f"resp_{secrets.token_hex(16)}"
        relay.response_id = f"{named}.{relay.answer.name}"
    previous = relay.answer.question.previous or response.get("previous_response_id")
    renamed = {**response, "id": relay.response_id}
    return renamed | ({"previous_response_id": previous} if previous else {})


def take_message(relay: Relay, type: str, data: str, chunk: JSON) -> None:
    type = str(chunk.get("type") or type)
    relay.write(data, type, type == "content_block_delta")
    if type == "message_stop":
        relay.answer.finish()


def split_chat(whole: JSON) -> list[JSON]:
    """A whole completion as one chunk; the end follows by itself."""
    choices = []
    for choice in whole["choices"]:
        delta = dict(choice.get("message") or {})
        if calls := delta.get("tool_calls"):
            delta["tool_calls"] = [{"index": n, **call} for n, call in enumerate(calls)]
        rest = {name: value for name, value in choice.items() if name != "message"}
        choices.append({**rest, "delta": delta})
    return [{**whole, "object": "chat.completion.chunk", "choices": choices}]


def split_completion(whole: JSON) -> list[JSON]:
    return [whole]


def split_response(whole: JSON) -> list[JSON]:
    return response_events(whole, lambda text: [text])


def response_events(whole: JSON, cut: Callable[[str], list[str]]) -> list[JSON]:
    """The events of a stream that ends in this response; `cut` makes deltas of a text."""
    status = whole.get("status") or "completed"
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    events: list[JSON] = [
        {"type": f"response.{name}", "response": begun} for name in ("created", "in_progress")
    ]
    for n, item in enumerate(whole["output"]):
        content = item.get("content") if item.get("type") == "message" else None
        empty = {**item, "status": "in_progress"} | ({"content": []} if content else {})
        events.append({"type": "response.output_item.added", "output_index": n, "item": empty})
        for m, part in enumerate(content or ()):
            at = {"item_id": item.get("id"), "output_index": n, "content_index": m}
            text, says = part.get("text", ""), "response.output_text"
            first = {**part, "text": ""} if "text" in part else part
            events.append({"type": "response.content_part.added", **at, "part": first})
            if text:
                deltas = ({"delta": delta, "logprobs": []} for delta in cut(text))
                events += [{"type": f"{says}.delta", **at, **delta} for delta in deltas]
                events.append({"type": f"{says}.done", **at, "text": text, "logprobs": []})
            events.append({"type": "response.content_part.done", **at, "part": part})
        events.append({"type": "response.output_item.done", "output_index": n, "item": item})
    return [*events, {"type": f"response.{status}", "response": whole}]


def split_message(whole: JSON) -> list[JSON]:
    """Each block whole; of its text, one delta."""
    events: list[JSON] = [
        {"type": "message_start", "message": {**whole, "content": [], "stop_reason": None}}
    ]
    for n, block in enumerate(whole["content"]):
        begun = {**block, "text": ""} if "text" in block else block
        delta = {"type": "text_delta", "text": block.get("text", "")}
        events += [
            {"type": "content_block_start", "index": n, "content_block": begun},
            {"type": "content_block_delta", "index": n, "delta": delta},
            {"type": "content_block_stop", "index": n},
        ]
    end = {name: whole.get(name) for name in ("stop_reason", "stop_sequence")}
    usage = whole.get("usage") or {}
    return [*events, {"type": "message_delta", "delta": end, "usage": usage},
            {"type": "message_stop"}]  # fmt: skip


def keep_as_is(relay: Relay, text: str, whole: JSON) -> tuple[str, str]:
    return text, "message"


def keep_response(relay: Relay, text: str, whole: JSON) -> tuple[str, str]:
    """As the last event of a stream, so that it can be retrieved like one."""
    type = f"response.{whole.get('status') or 'completed'}"
    response = rename_response(relay, whole)
    return to_json({"type": type, "sequence_number": 0, "response": response}), type


def error_event(answer: Answer, problem: Problem, **more: object) -> Event:
    """The one form that makes every SDK raise."""
    error = {**problem.error, "type": problem.type}
    number = next_sequence(answer)
    fields = {"type": "error", "sequence_number": number, **more, "error": error}
    return Event(to_json(fields), "error")


def close_chat(answer: Answer, problem: Problem | None, **more: object) -> list[Event]:
    return [error_event(answer, problem, **more) if problem else Event("[DONE]")]


def close_message(answer: Answer, problem: Problem | None) -> list[Event]:
    return [error_event(answer, problem)] if problem else []


def close_response(answer: Answer, problem: Problem | None) -> list[Event]:
    """The error, then the end of a response, with the status that retrieve tells."""
    if problem is None:
        return []
    status = "cancelled" if problem.type == "stopped" else "failed"
    error = {"code": "server_error", "message": str(problem)}
    number = next_sequence(answer) + 1
    response = {**response_now(answer), "status": status, "error": error}
    last = {"type": "response.failed", "sequence_number": number, "response": response}
    return [error_event(answer, problem), Event(to_json(last), "response.failed")]


def sequence_of(answer: Answer, place: int) -> int:
    """An event's sequence_number, or its place where it has none."""
    found = re.search(r'"sequence_number":\s*(\d{1,15})', answer[place].data)
    return int(found[1]) if found else place


def next_sequence(answer: Answer) -> int:
    return sequence_of(answer, answer.end - 1) + 1 if answer.end > answer.start else 0


def place_of_sequence(answer: Answer, number: int) -> int:
    """The place of the first event after this sequence_number. They only grow."""
    places = range(answer.start, answer.end)
    key = functools.partial(sequence_of, answer)
    return answer.start + bisect.bisect_right(places, number, key=key)


def response_now(answer: Answer, end: float = inf) -> JSON:
    """A response as it stands: the last one named, with the items that are done.

    Or as it stood when its log had that end.
    """
    items: list[Any] = []
    for place in range(int(min(answer.end, end)) - 1, answer.start - 1, -1):
        event = answer[place]
        if event.type == "response.output_item.done":
            items.insert(0, from_json(event.data).get("item"))
        elif event.type in RESPONSE_ENDS:
            return cast(JSON, from_json(event.data)["response"])
        elif place <= answer.start + 1:
            response = from_json(event.data).get("response")
            if isinstance(response, dict):
                return {**response, "output": items}
    return {
        "id": f"resp_{answer.name}.{answer.name}", "object": "response", "output": items,
        "created_at": int(time.time()), "status": "in_progress", "tools": [],
        "model": answer.question.model, "parallel_tool_calls": True, "tool_choice": "auto",
    }  # fmt: skip


def ask_as_is(api: Api, body: JsonBody, headers: dict[str, str]) -> Question:
    stream = body.fields.get("stream") is True
    return Question(api, body.raw(), stream, body.model, headers)


def ask_for_page(api: Api, body: JsonBody, headers: dict[str, str]) -> Question:
    """{messages} is all that the chat page's protocol knows, and perhaps a model."""
    asked: JSON = {"messages": from_json(body.raw())["messages"], "stream": True}
    if body.model:
        asked["model"] = body.model
    return Question(api, to_json(asked).encode(), True, body.model, headers)


def ask_for_response(api: Api, body: JsonBody, headers: dict[str, str]) -> Question:
    """`background` is ours: a log needs nobody there, and upstreams seldom know it.

    So that there is something to poll, the upstream is then asked for a stream.
    """
    stream = body.fields.get("stream") is True
    background = body.fields.get("background") is True
    if "background" in body.fields:
        body.change("background", None)
    if background and not stream:
        body.change("stream", True)
    previous = body.fields.get("previous_response_id") or ""
    if ours := re.fullmatch(r"(.+)\.[0-9a-f]{32}", previous):
        body.change("previous_response_id", ours[1])
    return Question(
        api, body.raw(), stream or background, body.model, headers,
        background=background, polled=background and not stream, previous=previous,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Api:
    """One protocol: all that differs from the others."""

    path: str  # below the base URL of the upstream
    says: str  # the field of a whole answer that has what it says
    take: Callable[[Relay, str, str, JSON], None]  # an event
    closing: Callable[[Answer, Problem | None], list[Event]]  # our last events
    split: Callable[[JSON], list[JSON]]  # JSON where a stream was wanted
    ask: Callable[[Api, JsonBody, dict[str, str]], Question] = ask_as_is
    keep: Callable[[Relay, str, JSON], tuple[str, str]] = keep_as_is  # a whole answer
    whole: Callable[[Answer], str] = lambda answer: answer[answer.start].data
    adds_done: bool = False  # `data: [DONE]` is its end, and ours
    has_messages: bool = False


CHAT = Api("/chat/completions", "choices", take_chat, close_chat, split_chat,
           adds_done=True, has_messages=True)  # fmt: skip
CHAT_PAGE = dataclasses.replace(
    CHAT, take=take_chat_page, closing=functools.partial(close_chat, content=""), ask=ask_for_page
)
COMPLETIONS = Api("/completions", "choices", take_chat, close_chat, split_completion,
                  adds_done=True)  # fmt: skip
RESPONSES = Api("/responses", "output", take_response, close_response, split_response,
                ask_for_response, keep_response,
                lambda answer: to_json(response_now(answer)))  # fmt: skip
MESSAGES = Api("/messages", "content", take_message, close_message, split_message,
               has_messages=True)  # fmt: skip


# ─── The upstream ────────────────────────────────────────────────────────────────────
# Asked by h11's client side on wires of our own. There is one way to read a body: plain or
# TLS, chunked or not.

CONNECT_TIMEOUT, CONNECT_TRIES = 5, 3
# Before the upstream's own limit, often 5 s: fewer questions meet its goodbye.
IDLE_WIRES, IDLE_WIRE_KEPT = 100, 3
MODELS_TIMEOUT, MODELS_KEPT, MODELS_BYTES = 10, 10, 4 * MiB
VANISHED_TIMEOUT = 30  # seconds without TCP acknowledgement: its network is gone
INTAKE_REST = 0.001  # seconds, after a pass
CREDENTIALS = ("authorization", "x-api-key", "api-key")
PASSED_TO = re.compile(
    "openai-.*|anthropic-.*|http-referer|x-title|traceparent|tracestate|idempotency-key"
)
PASSED_BACK = re.compile(
    "retry-after|retry-after-ms|x-should-retry|(x-)?request-id|openai-.*|"
    "(x-|anthropic-)ratelimit-.*"
)
LIKE_A_STREAM = re.compile(rb"(\xef\xbb\xbf)?\s*(data|event|id|retry)?:")
CUT = (trio.BrokenResourceError, OSError, h11.RemoteProtocolError)  # of an exchange


def passed_headers(request: Request, token: str) -> dict[str, str]:
    """What of a client's headers goes on to the upstream: never our own token."""
    passed = {k: v for k, v in request.headers.items() if PASSED_TO.fullmatch(k)}
    for name, secret in credentials(request).items():
        if not (token and same_secret(secret, token)):
            passed[name] = f"Bearer {secret}" if name == "authorization" else secret
    return {k: v for k, v in passed.items() if v.isascii() and v.isprintable()}


class Exchange:
    """One request to an upstream and its response. Raises what stands in CUT."""

    def __init__(self, wire: Wire, on_bytes: Callable[[], None] = lambda: None) -> None:
        self.wire = wire
        self.on_bytes = on_bytes
        self.conn = h11.Connection(h11.CLIENT, max_incomplete_event_size=64 * KiB)
        self.heard = False  # a byte of a response
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = False  # the body has been read to its end
        self.broken: Exception | None = None  # raised after what came before it
        self.coded = self.decodes = False  # it is compressed, though we ask for none
        self._decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)

    async def ask(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> None:
        """Send it, and read the head of the response."""
        request = h11.Request(method=method, target=target, headers=[*headers.items()])
        events = [request, *([h11.Data(body)] if body else []), h11.EndOfMessage()]
        try:
            await self.wire.send(b"".join(self.conn.send(event) or b"" for event in events))
        except trio.BrokenResourceError:
            if self.wire.stuck:
                raise
            # An upstream that refuses a long question may hang up before it is read.
        while not isinstance(event := self.conn.next_event(), h11.Response):
            if event is h11.NEED_DATA:
                self.receive(await self.wire.receive())
            elif not isinstance(event, h11.InformationalResponse):
                raise trio.BrokenResourceError("it was closed without an answer")
        self.status, self.headers = event.status_code, fold_headers(event.headers)
        coding = self.headers.get("content-encoding", "identity").lower()
        self.coded = coding not in ("identity", "")
        self.decodes = coding in ("gzip", "x-gzip", "deflate")

    def receive(self, data: bytes) -> None:
        self.heard = self.heard or bool(data)
        self.on_bytes()
        self.conn.receive_data(data)

    def pieces(self) -> bytes:
        """What has come of the body since the last call; `done` if that was all.

        A body that is cut, or is not what it says, raises; if something good came before
        that, the exception stands in `broken` instead.
        """
        found = []
        try:
            while not self.done:
                event = self.conn.next_event()
                if isinstance(event, h11.Data):
                    found.append(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    self.done = True
                else:
                    break
        except h11.RemoteProtocolError as error:
            if not found:
                raise
            self.broken = error
        data = b"".join(found)
        return self._decode(data) if self.coded else data

    def _decode(self, data: bytes) -> bytes:
        """gzip, also in several members (RFC 1952, section 2.2). Raises Problem."""
        plain = b""
        while data and self.decodes:
            try:
                plain += self._decoder.decompress(data, WHOLE_BYTES)
            except zlib.error:
                raise upstream_problem("the upstream sent what is not gzip") from None
            if self._decoder.unconsumed_tail:
                raise upstream_problem("the upstream sent too much, compressed")
            data = self._decoder.unused_data
            if self._decoder.eof:
                self._decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)
        if data:
            raise upstream_problem("the upstream compresses in a way that nobody asked for")
        return plain

    async def more(self) -> bytes:
        """The next bytes of the body, awaited; b"" at its end."""
        if self.broken:
            raise self.broken
        while not (data := self.pieces()) and not self.done:
            self.receive(await self.wire.receive())
        return data

    async def read(self, limit: int, begun: bytes = b"") -> bytes:
        """A whole body. Raises Problem if it is larger than `limit` bytes."""
        body = bytearray(begun)
        while data := await self.more():
            body += data
            if len(body) > limit:
                raise upstream_problem(f"the upstream sent more than {limit / MiB:g} MiB")
        return bytes(body)

    def passed_back(self, secrets: Iterable[str]) -> dict[str, str]:
        """What of its headers goes on to the client."""
        headers = self.headers.items()
        return {k: hide(v, secrets) for k, v in headers if PASSED_BACK.fullmatch(k)}


class Intake:
    """The pump's counterpart: one task reads from all upstreams that have news.

    To wake a task for each token costs more than the token. So it rests for a moment after a
    pass, and the next one finds many. A token that comes alone, after the rest, waits for
    nobody.

    Linux's selector (epoll) is itself a file that can be waited for, so Trio waits for this
    one only. Where there is none, each upstream has a task that reads it.
    """

    def __init__(self) -> None:
        epoll = getattr(selectors, "EpollSelector", None)
        self._selector = epoll() if epoll else None

    async def run(self) -> None:
        while self._selector:
            await trio.lowlevel.wait_readable(self._selector.fileno())
            turn, ready = Turn(), self._selector.select(0)
            for key, _ in ready:
                await turn.pause()
                if self._selector.get_map().get(key.fd) is key:  # still
                    key.data()
            await trio.sleep(INTAKE_REST)

    async def read(self, exchange: Exchange, take: Callable[[bytes], None]) -> None:
        """The rest of a body, to its end. Raises what `take` and the exchange raise."""
        sock, ended, failed = exchange.wire.socket, trio.Event(), list[Exception]()

        def read_now() -> None:
            """What has come. Raises nothing, because the intake serves everyone."""
            try:
                if (data := exchange.wire.receive_now()) is not None:
                    exchange.receive(data)
                    take_pieces()
            except Exception as error:
                failed.append(error)
                ended.set()

        def take_pieces() -> None:
            if data := exchange.pieces():
                take(data)
            if exchange.broken:
                raise exchange.broken
            if exchange.done:
                ended.set()

        take_pieces()  # of what came with the head
        if self._selector is None:
            while not ended.is_set():
                await trio.lowlevel.wait_readable(sock)
                read_now()
        elif not ended.is_set():
            self._selector.register(sock, selectors.EVENT_READ, read_now)
            try:
                await ended.wait()
            finally:
                self._selector.unregister(sock)
        if failed:
            raise failed[0]


class SharedCall:
    """One call for everyone who wants the same at the same time."""

    def __init__(self) -> None:
        self.waiting = 0
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.stale_at = inf
        self.result: Reply | Problem = upstream_problem("nobody waited for this")

    async def run(self, call: Callable[[], Awaitable[Reply]]) -> None:
        with self.scope:
            try:
                self.result = await call()
            except Problem as problem:
                self.result = problem
        kept = 0 if isinstance(self.result, Problem) else MODELS_KEPT
        self.stale_at = trio.current_time() + kept
        self.ended.set()

    async def wait(self) -> Reply:
        """Its result. When nobody waits any more, it is given up."""
        self.waiting += 1
        try:
            await self.ended.wait()
        finally:
            self.waiting -= 1
            if not self.waiting and not self.ended.is_set():
                self.stale_at = -inf
                self.scope.cancel()
        if isinstance(self.result, Problem):
            raise self.result.with_traceback(None)
        return self.result


class Upstream(Model):
    """A server that speaks OpenAI's protocols, or Anthropic's."""

    def __init__(self, settings: Settings, answers: Answers, metrics: Metrics) -> None:
        self.settings = settings
        self.answers = answers
        self.metrics = metrics
        # Where it is
        parts = urlsplit(settings.upstream)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.host, self.netloc = parts.hostname or "", parts.netloc
        self.port = parts.port or (443 if self.tls else 80)
        self.base, self.query = parts.path.rstrip("/"), parts.query
        self.proxy = urlsplit(settings.proxy) if settings.proxy else None
        # What goes on
        self.intake = Intake()
        self.idle: deque[tuple[Wire, float]] = deque()  # kept, and since when
        self.calls: OrderedDict[str, SharedCall] = OrderedDict()
        self.nursery: trio.Nursery

    async def run(self) -> None:
        async with trio.open_nursery() as self.nursery:
            self.nursery.start_soon(self.intake.run)
            while True:
                await trio.sleep(1)
                self.close_idle()

    # ── answers ──

    def choose(self, model: str) -> str:
        """The model to ask; "" stands for the upstream's first. Raises Problem 404."""
        pinned = self.settings.model
        if pinned and model and model not in pinned:
            raise model_not_found(model, pinned)
        return model or (pinned[0] if pinned else "")

    async def write(self, answer: Answer) -> None:
        """Ask, and pass on what comes. Bytes are life: any of them moves the limit."""
        patience, begun = self.settings.patience, False
        try:
            with trio.fail_after(patience) as limit:

                def alive() -> None:
                    late = trio.current_time() + patience
                    if late > limit.deadline + min(1, patience / 10):  # moving it costs
                        limit.deadline = late

                exchange = await self.ask_question(answer.question, alive)
                begun = True
                self.answers.drop_question(answer)
                try:
                    await self.relay(answer, exchange, limit)
                finally:
                    self.release(exchange)
        except (*CUT, trio.TooSlowError, Problem) as error:
            problem = self.as_problem(error, f"for {patience:g} s (see --patience)")
            if begun:  # an SDK would ask again, twice, and pay for it
                problem.headers["x-should-retry"] = "false"
            raise problem from None

    def as_problem(self, error: Exception, how_long: str) -> Problem:
        if isinstance(error, Problem):
            return error.with_traceback(None)
        if isinstance(error, trio.TooSlowError):
            return upstream_problem(f"the upstream said nothing {how_long}", 504, "timeout")
        broke = "the connection to the upstream broke in mid-answer"
        return upstream_problem(broke, code="connection_cut")

    async def ask_question(self, question: Question, alive: Callable[[], None]) -> Exchange:
        if not question.model:
            body = JsonBody(question.body)
            body.choose(await self.first_model(question.headers))
            question.body, question.model = body.raw(), body.model
        path, headers = question.api.path, question.headers
        return await self.ask("POST", path, headers, question.body, alive)

    async def relay(self, answer: Answer, exchange: Exchange, limit: trio.CancelScope) -> None:
        """Everything that a willing upstream says. Its first bytes tell what it is."""
        secrets = self.secrets(answer.question.headers)
        answer.headers = exchange.passed_back(secrets)
        relay = Relay(answer, self.metrics, secrets)
        kind = exchange.headers.get("content-type", "").partition(";")[0].strip().lower()
        polled = answer.question.polled  # then a name is what it is answered with
        if (kind == "text/event-stream") == answer.question.stream and not polled:
            answer.accepted.set()
        first = b""
        while not first.strip() and not exchange.done:
            first += await exchange.more()
        is_json = first.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[")
        streams = kind == "text/event-stream" or LIKE_A_STREAM.match(first)
        if streams and not is_json:
            if not answer.question.stream:
                raise upstream_problem("the upstream sent a stream where none was asked for")
            return await self.relay_stream(relay, exchange, first, limit)
        body = await exchange.read(WHOLE_BYTES, first)
        if kind == "text/html" or not (is_json or kind == "application/json"):
            raise upstream_problem(f"the upstream sent {kind or 'nothing'!r}, not an answer")
        relay.take_whole(body.decode("utf-8-sig", errors="replace"))

    async def relay_stream(
        self, relay: Relay, exchange: Exchange, first: bytes, limit: trio.CancelScope
    ) -> None:
        parser = SSEParser(EVENT_BYTES)

        def take(data: bytes) -> None:
            for event in parser.feed(data):
                relay.take(event)
            if relay.answer.closed:
                # Read on to the end, to keep the connection for the next question. Should
                # that come too late, the answer is none the worse for it.
                limit.deadline = min(limit.deadline, trio.current_time() + 1)

        try:
            take(first)
            await self.intake.read(exchange, take)
        except ValueError as error:
            raise upstream_problem(f"the upstream sent {error}") from None
        if parser.unfinished().strip() == "[DONE]":
            relay.take(ServerSentEvent("[DONE]", "message"))
        relay.end()

    # ── short requests ──

    async def short(
        self, method: str, path: str, headers: dict[str, str], body: bytes = b""
    ) -> Reply:
        """A request that is answered at once, and its answer as it came."""
        try:
            with trio.fail_after(self.settings.patience if body else MODELS_TIMEOUT):
                exchange = await self.ask(method, path, headers, body)
                try:
                    read = await exchange.read(WHOLE_BYTES if body else MODELS_BYTES)
                finally:
                    self.release(exchange)
        except (*CUT, trio.TooSlowError) as error:
            raise self.as_problem(error, "in time") from None
        return Reply(read.decode(errors="replace"), exchange.passed_back(self.secrets(headers)))

    async def post(self, path: str, headers: dict[str, str], body: JsonBody) -> Reply:
        if path != "/embeddings":
            body.choose(self.choose(body.model))
        return await self.short("POST", path, headers, body.raw())

    async def models(self, headers: dict[str, str]) -> Reply:
        """The list of models: the pinned ones, or the upstream's as it came.

        It is asked once for everyone with the same key, and kept for a moment.
        """
        if self.settings.model:
            return list_models(self.settings.model)
        key = to_json([headers.get(name) for name in CREDENTIALS])
        call = self.calls.get(key)
        if call is None or call.stale_at <= trio.current_time():
            call = self.calls[key] = SharedCall()
            ask = functools.partial(self.short, "GET", "/models", headers)
            self.nursery.start_soon(call.run, ask)
            while len(self.calls) > 32:
                self.calls.popitem(last=False)
        return await call.wait()

    async def model(self, name: str, headers: dict[str, str]) -> Reply:
        if not self.settings.model:
            return await self.short("GET", f"/models/{quote(name)}", headers)
        return Reply(to_json(model_object(self.choose(name))))

    async def first_model(self, headers: dict[str, str]) -> str:
        """The model to ask, where nobody named one."""
        try:
            return str(from_json((await self.models(headers)).body)["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            name_one = "the upstream lists no model: name one with --model"
            raise upstream_problem(name_one) from None

    # ── requests and connections ──

    def secrets(self, headers: Mapping[str, str]) -> list[str]:
        """What must never come back: the key that is sent."""
        if self.settings.api_key:
            return [self.settings.api_key]
        return [headers[n].removeprefix("Bearer ") for n in CREDENTIALS if n in headers]

    def headers(self, path: str, passed: Mapping[str, str], body: bytes) -> dict[str, str]:
        headers = {
            "host": self.netloc,
            "user-agent": "chatstream",
            "accept": "*/*",
            "accept-encoding": "identity",  # nothing between us and the next token
            **passed,
        }
        if body:
            headers["content-type"] = "application/json"
            headers["content-length"] = str(len(body))
        if key := self.settings.api_key:
            headers = {k: v for k, v in headers.items() if k not in CREDENTIALS}
            headers["authorization"] = f"Bearer {key}"
            if path.startswith("/messages"):
                headers["x-api-key"] = key
            if self.query:  # Azure's way
                headers["api-key"] = key
        return headers

    async def ask(
        self,
        method: str,
        path: str,
        passed: Mapping[str, str],
        body: bytes,
        alive: Callable[[], None] = lambda: None,
    ) -> Exchange:
        """Send a request; return its response if that is a 2xx. Raises Problem.

        A question that meets the goodbye of a kept connection, with not one byte of a
        response, is asked once more on a fresh one, as curl and browsers do.
        """
        headers = self.headers(path, passed, body)
        target = self.base + path + (f"?{self.query}" if self.query else "")
        if self.proxy and not self.tls:
            target = f"http://{self.netloc}{target}"
            headers |= self.proxy_login()
        wire = self.kept_wire()
        while True:
            exchange = Exchange(wire or await self.connect(), alive)
            try:
                await exchange.ask(method, target, headers, body)
                if exchange.status // 100 == 2:
                    return exchange
                raise await self.refusal(exchange, self.secrets(passed))
            except BaseException as error:
                self.release(exchange)
                if wire is None or exchange.heard or not isinstance(error, CUT):
                    raise
                wire = None

    async def refusal(self, exchange: Exchange, secrets: list[str]) -> Problem:
        """The upstream's status is the client's, if it says no and says it clearly."""
        status = exchange.status
        if status in (401, 403) and self.settings.api_key:
            refused = "the upstream refuses the server's key: its operator must look"
            return upstream_problem(refused, code="server_key_refused")
        if status // 100 == 3:
            return upstream_problem("the upstream redirects, and the key goes nowhere else")
        body = b""
        with contextlib.suppress(Problem, *CUT), trio.move_on_after(5):
            body = await exchange.read(WORDS_BYTES)
        try:
            said = from_json(body)
        except ValueError:
            said = body.decode(errors="replace")
        problem = reason_given(status if 400 <= status < 600 else 502, said, secrets)
        problem.headers = exchange.passed_back(secrets)
        return problem

    def close_idle(self) -> None:
        old = trio.current_time() - IDLE_WIRE_KEPT
        while self.idle and self.idle[0][1] < old:
            self.idle.popleft()[0].close()

    def kept_wire(self) -> Wire | None:
        self.close_idle()
        while self.idle:
            wire, _ = self.idle.pop()
            with contextlib.suppress(OSError):
                if wire.receive_now() is None:  # it has not said goodbye
                    return wire
            wire.close()
        return None

    def release(self, exchange: Exchange) -> None:
        """Keep the connection for the next question, or tell the model to stop."""
        conn = exchange.conn
        reusable = exchange.done and conn.our_state is conn.their_state is h11.DONE
        if reusable and len(self.idle) < IDLE_WIRES:
            self.idle.append((exchange.wire, trio.current_time()))
        else:
            exchange.wire.close()

    async def connect(self) -> Wire:
        """Tried again: nothing can have been sent yet. Raises Problem."""
        error: Exception | None = None
        with trio.move_on_after(CONNECT_TIMEOUT):
            for n in range(CONNECT_TRIES):
                if n:
                    await trio.sleep(0.2)
                try:
                    return await self.connect_once()
                except CUT as failure:
                    error = failure
        if error is None:
            raise upstream_problem("the upstream could not be reached in time", 504, "timeout")
        way = " by way of its proxy" if self.proxy else ""
        raise upstream_problem(f"the upstream cannot be reached{way}: {unreachable(error)}")

    async def connect_once(self) -> Wire:
        host, port = self.host, self.port
        if self.proxy:
            host, port = self.proxy.hostname or "", self.proxy.port or 80
        stream = await trio.open_tcp_stream(host, port)
        sock = socket.socket(fileno=stream.socket.detach())
        sock.setblocking(False)
        watch_for_life(sock, VANISHED_TIMEOUT)
        wire = Wire(sock)
        try:
            if self.tls and self.proxy:
                await self.tunnel(wire)
            if self.tls:
                secure = self.tls.wrap_socket(
                    sock, server_hostname=self.host, do_handshake_on_connect=False
                )
                wire = Wire(secure)
                await wire.when_ready(secure.do_handshake)
        except BaseException:
            wire.close()
            raise
        return wire

    async def tunnel(self, wire: Wire) -> None:
        """CONNECT (RFC 9110, section 9.3.6): what follows is between us and the host."""
        target = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        exchange = Exchange(wire)
        with contextlib.suppress(*CUT):
            await exchange.ask("CONNECT", target, {"host": target, **self.proxy_login()}, b"")
        if exchange.status // 100 != 2:
            said = exchange.status or "what is not HTTP"
            raise upstream_problem(f"the proxy to the upstream answered {said}")

    def proxy_login(self) -> dict[str, str]:
        if not self.proxy or not self.proxy.username:
            return {}
        pair = f"{unquote(self.proxy.username)}:{unquote(self.proxy.password or '')}"
        login = base64.b64encode(pair.encode()).decode()
        return {"proxy-authorization": f"Basic {login}"}


def unreachable(error: BaseException) -> str:
    """Why, in the words of the system or of TLS; none of them quotes a request."""
    for reason in (error, error.__cause__, error.__context__):
        while isinstance(reason, BaseExceptionGroup):
            reason = reason.exceptions[0]
        if isinstance(reason, ssl.SSLCertVerificationError):
            return f"its certificate is not valid: {reason.verify_message}"
        if isinstance(reason, ssl.SSLError):
            return f"TLS failed: {(reason.reason or 'handshake').lower()}"
        if isinstance(reason, socket.gaierror):
            return "its name is not known"
        if isinstance(reason, OSError) and reason.errno:
            return os.strerror(reason.errno)
    return "no connection"


def watch_for_life(sock: socket.socket, seconds: int) -> None:
    """Let the system notice a peer whose network is gone, where it can (tcp(7))."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", seconds // 3), ("TCP_KEEPINTVL", seconds // 6),
        ("TCP_USER_TIMEOUT", seconds * 1000), ("TCP_NODELAY", 1),
    ):  # fmt: skip
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def model_not_found(name: str, pinned: Iterable[str]) -> Problem:
    choose = f"there is no model {name[:100]!r} here: choose one of {', '.join(pinned)}"
    return Problem(404, choose, code="model_not_found", param="model")


def model_object(name: str) -> JSON:
    return {"id": name, "object": "model", "created": 0, "owned_by": "chatstream"}


def list_models(names: Iterable[str]) -> Reply:
    return Reply(to_json({"object": "list", "data": [model_object(name) for name in names]}))


# ─── The demo ────────────────────────────────────────────────────────────────────────

CJK = "\u3000-\u303f\u3400-\u9fff\uf900-\ufaff\uff00-\uffef"


class Lessons:
    """What the demo knows: www/lessons.en.md and lessons.zh.md.

    The text before the first `# heading` introduces each answer, the one below `# *`
    ends it, and each other heading is a question with its lesson.
    """

    def __init__(self, text: str) -> None:
        parts = re.split(r"(?m)^# +(.+)\n", text)
        self.introduction = parts[0].strip()
        self.lessons = {
            heading.strip(): body.strip()
            for heading, body in zip(parts[1::2], parts[2::2], strict=True)
        }
        self.ending = self.lessons.pop("*", "")

    def answer(self, question: str) -> str:
        """The lesson whose heading shares most with the question; the same each time."""
        asked = set(DEMO_WORD.findall(question.lower()))

        def likeness(heading: str) -> tuple[bool, float, int]:
            words = set(DEMO_WORD.findall(heading.lower()))
            shared = len(words & asked) / (len(words | asked) or 1)
            same = heading.strip() == question.strip()
            return (same, shared, zlib.crc32((heading + question).encode(errors="replace")))

        best = max(self.lessons, key=likeness, default="")
        parts = (self.introduction, self.lessons.get(best, ""), self.ending)
        return "\n\n".join(part for part in parts if part)


DEMO_WORD = re.compile(rf"\s*(?:[{CJK}]|[^\s{CJK}]+)")


class Demo(Model):
    """The embedded model: needs no key and no network, and says that it is a demo.

    The same prompt gets the same text, word by word, Chinese character by character.
    """

    PACE = 0.04  # seconds a word

    def __init__(self, settings: Settings, answers: Answers, metrics: Metrics) -> None:
        self.answers = answers
        self.metrics = metrics
        www = www_folder()
        self.lessons = {
            language: Lessons((www / f"lessons.{language}.md").read_text("utf-8"))
            for language in ("en", "zh") if www
        }  # fmt: skip

    def check(self, api: Api) -> None:
        if api in (COMPLETIONS, MESSAGES):
            raise self.only_chats()

    def choose(self, model: str) -> str:
        return model or "demo"

    async def models(self, headers: dict[str, str]) -> Reply:
        return list_models(["demo"])

    async def model(self, name: str, headers: dict[str, str]) -> Reply:
        if name != "demo":
            raise model_not_found(name, ["demo"])
        return Reply(to_json(model_object(name)))

    async def post(self, path: str, headers: dict[str, str], body: JsonBody) -> Reply:
        raise self.only_chats()

    def only_chats(self) -> Problem:
        only = "the demo model speaks chat completions and responses: for the rest, "
        return Problem(404, only + "start the server with --upstream", code="not_found")

    def words(self, asked: JSON) -> list[str]:
        """Its answer to the last question of a body."""
        said = asked.get("messages") or asked.get("input") or ""
        if isinstance(said, list):
            users = [m for m in said if isinstance(m, dict) and m.get("role") == "user"]
            said = users[-1].get("content") if users else ""
        question = text_of(said)
        lessons = self.lessons.get("zh" if re.search(f"[{CJK}]", question) else "en")
        return DEMO_WORD.findall(lessons.answer(question) if lessons else "A demo.")

    async def write(self, answer: Answer) -> None:
        """Events like those of OpenAI's streams, because clients are tried on them."""
        question = answer.question
        asked = from_json(question.body)
        self.answers.drop_question(answer)
        answer.accepted.set()
        relay = Relay(answer, self.metrics, ())
        make = demo_response if question.api is RESPONSES else demo_chat
        events = list(make(self.words(asked), asked))
        if not question.stream:
            await trio.sleep(self.PACE)
            return relay.take_whole(to_json(events[-1]))
        for event in events[:-1]:
            await trio.sleep(self.PACE)
            relay.take(ServerSentEvent(to_json(event), "message"))
        if not answer.closed:
            relay.finish()


def demo_usage(words: list[str], asked: JSON) -> list[int]:
    prompt = len(to_json(asked)) // 4
    return [prompt, len(words), prompt + len(words)]


def demo_chat(words: list[str], asked: JSON) -> Iterator[JSON]:
    """The chunks of a chat completion; last, the whole of it."""
    base = {"id": f"chatcmpl-{secrets.token_hex(8)}", "created": int(time.time())}
    base |= {"object": "chat.completion.chunk", "model": "demo"}
    deltas = [{"role": "assistant", "content": ""}, *({"content": w} for w in words), {}]
    for delta in deltas:
        ended = None if delta else "stop"
        choice = {"index": 0, "delta": delta, "finish_reason": ended}
        yield {**base, "choices": [choice]}
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    usage = dict(zip(names, demo_usage(words, asked), strict=True))
    if (asked.get("stream_options") or {}).get("include_usage"):
        yield {**base, "choices": [], "usage": usage}
    message = {"role": "assistant", "content": "".join(words)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    yield {**base, "object": "chat.completion", "choices": [choice], "usage": usage}


def demo_response(words: list[str], asked: JSON) -> Iterator[JSON]:
    """The events of a response; last, the whole of it."""
    part = {"type": "output_text", "text": "".join(words), "annotations": []}
    item = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant",
            "status": "completed", "content": [part]}  # fmt: skip
    names = ("input_tokens", "output_tokens", "total_tokens")
    usage: JSON = dict(zip(names, demo_usage(words, asked), strict=True))
    usage |= {"input_tokens_details": {"cached_tokens": 0},
              "output_tokens_details": {"reasoning_tokens": 0}}  # fmt: skip
    whole = {
        "id": f"resp_{secrets.token_hex(12)}", "object": "response",
        "created_at": int(time.time()), "status": "completed", "model": "demo",
        "output": [item], "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
        "error": None, "incomplete_details": None, "instructions": None,
        "metadata": {}, "temperature": 1.0, "top_p": 1.0, "usage": usage,
    }  # fmt: skip
    yield from response_events(whole, lambda text: words)
    yield whole


# ─── HTTP/2 ──────────────────────────────────────────────────────────────────────────
# Hypercorn speaks it, on our wire, in a nursery of ours; our handlers see its ASGI as
# one more HttpConnection. HTTP/2 has frames, windows and streams of its own, so here
# each event wakes a task for each reader, as in the usual design.

HTTP2_STREAMS = 100
GOODBYE = 0.5  # seconds, for a client that may be stuck


class Http2Stream:
    """One request over HTTP/2: ASGI on one side, what a Request needs on the other."""

    def __init__(
        self, receive: Callable[[], Awaitable[JSON]], send: Callable[[JSON], Awaitable[None]]
    ) -> None:
        self._receive = receive
        self._send = send
        self._body_ended = False
        self.rest: bytes | memoryview = b""

    async def receive(self) -> bytes | None:
        while not self._body_ended:
            message = await self._receive()
            if message["type"] != "http.request":
                return None
            self._body_ended = not message.get("more_body")
            if message["body"]:
                return bytes(message["body"])
        return b""

    async def disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _head(self, status: int, headers: Mapping[str, str]) -> None:
        raw = [(k.encode(), v.encode("latin-1", "replace")) for k, v in headers.items()
               if k != "connection"]  # fmt: skip
        raw.append((b"date", http_date(int(time.time())).encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def _body(self, body: bytes, more: bool) -> None:
        message = {"type": "http.response.body", "body": body, "more_body": more}
        await self._send(message)

    async def respond(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        await self._head(status, headers)
        await self._body(body, False)

    async def start(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        await self._head(status, headers)
        await self._body(body, True)

    def reader(self, log: EventLog, start: int) -> Reader:
        return Reader(log, self, SSE, start)

    def write_now(self, data: bytes) -> None:
        """Nothing goes out by itself: the reader's own task is called to flush()."""
        self.rest = data

    async def flush(self) -> None:
        if self.rest:
            await self._body(bytes(self.rest), True)
            self.rest = b""

    async def end(self, last: bytes = b"") -> None:
        await self._body(last, False)

    async def discard(self) -> None:
        """A body that nobody reads would hold up the other streams."""
        with trio.move_on_after(LINGER_CLOSE):
            while await self.receive():
                pass


class Http2(H2Protocol):
    """Hypercorn's HTTP/2, without what lets one stream end or hang the others.

    An exception in here ends the connection, and with it every stream. Hypercorn 0.18
    raises KeyError for a body whose stream has ended, and UnicodeDecodeError for a head
    that is not ASCII. It ends all streams at a client's GOAWAY, which only promises no
    new ones (RFC 9113, section 6.8). And h2 4 ends the connection at the stream that
    is one too many, where RFC 9113, section 5.1.2, wants that stream refused.
    """

    leaving = False  # the client has said GOAWAY

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        for event in events:
            if isinstance(event, h2.events.DataReceived | h2.events.RequestReceived):
                await self._handle_stream(event)
            elif isinstance(event, h2.events.ConnectionTerminated):
                self.leaving = True
                # h2 would send nothing more on any stream.
                self.connection.state_machine.state = h2.connection.ConnectionState(
                    h2.connection.ConnectionState.SERVER_OPEN
                )
            # RFC 9113, section 5.3.2, lets us ignore priorities: all streams are equal.
            elif not isinstance(event, h2.events.PriorityUpdated):
                await super()._handle_events([event])
        await self._flush()

    async def _handle_stream(
        self, event: h2.events.DataReceived | h2.events.RequestReceived
    ) -> None:
        """Reset what Hypercorn fails on; refuse the stream that is one too many."""
        number, codes = event.stream_id, h2.errors.ErrorCodes
        if isinstance(event, h2.events.RequestReceived):
            head = dict(event.headers or ())
            method, path = head.get(b":method", b""), head.get(b":path", b"")
            good = path.isascii() and path and method.isascii() and method != b"CONNECT"
            if len(self.streams) >= HTTP2_STREAMS:
                return self._reset(number, codes.REFUSED_STREAM)
        else:
            good = number in self.streams
            if not good:  # the connection's window is shared
                size = event.flow_controlled_length
                self.connection.acknowledge_received_data(size, number)
        if good:
            await super()._handle_events([event])
        else:
            self._reset(number, codes.STREAM_CLOSED)

    async def stream_send(self, event: Any) -> None:
        """Wait until the client has taken it, as long as it takes anything.

        Hypercorn 0.18 takes an attempt to send nothing for progress: with a window that
        stays shut, all of a log would go into its buffer, once for each reader.
        """
        if isinstance(event, Body | Data):
            for n in range(0, len(event.data), 16 * KiB):
                piece = type(event)(event.stream_id, event.data[n : n + 16 * KiB])
                await super().stream_send(piece)
                await self._taken(event.stream_id)
            return
        await super().stream_send(event)
        buffer = self.stream_buffers.get(event.stream_id)
        if isinstance(event, StreamClosed) and buffer and not buffer.complete:
            # The app has left off in mid-response: the client must not wait for more.
            del self.stream_buffers[event.stream_id]
            self.priority.remove_stream(event.stream_id)
            self._reset(event.stream_id, h2.errors.ErrorCodes.INTERNAL_ERROR)
            await self._flush()

    async def _taken(self, number: int) -> None:
        left, since = inf, trio.current_time()
        while buffer := self.stream_buffers.get(number):
            with trio.move_on_after(LOOK_EVERY):
                return await buffer.drain()
            if len(buffer.buffer) < left:
                left, since = len(buffer.buffer), trio.current_time()
            elif trio.current_time() - since >= STUCK_TIMEOUT:
                raise Stuck(f"it read nothing for {STUCK_TIMEOUT} s")

    def _reset(self, number: int, code: h2.errors.ErrorCodes) -> None:
        with contextlib.suppress(h2.exceptions.ProtocolError):  # it is closed already
            self.connection.reset_stream(number, code)

    async def goodbye(self) -> None:
        """GOAWAY (RFC 9113, section 6.8)."""
        if self.connection.state_machine.state is not h2.connection.ConnectionState.CLOSED:
            self.connection.close_connection()
            await self._flush()


def asgi_app(handle: Callable[[Request], Awaitable[None]]) -> Any:
    """Our handler as an application for Hypercorn: what ends one stream stays in it."""

    async def app(scope: JSON, receive: Any, send: Any) -> None:
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        stream = Http2Stream(receive, send)
        request = Request(
            stream, scope["method"].encode(), scope["raw_path"] + query,
            scope["headers"], scope["scheme"], "2",
        )  # fmt: skip
        try:
            await handle(request)
        except* QUIET_ENDS:
            pass  # this stream's client has gone, or is stuck; the others go on
        except* Exception:
            logger.exception("a stream failed in a way that nobody thought of")

    return app


async def serve_http2(
    wire: Wire, handle: Callable[[Request], Awaitable[None]], stopped: trio.Event
) -> None:
    """HTTP/2 on one wire. Hypercorn's own server would keep no deadline for a head."""

    async def send(event: object) -> None:
        if isinstance(event, RawData):
            await wire.send(event.data)
        elif isinstance(event, Closed):
            raise trio.BrokenResourceError("the HTTP/2 connection has ended")

    async with TaskGroup() as tasks:
        protocol = Http2(
            ASGIWrapper(asgi_app(handle)), http2_config(), WorkerContext(None), tasks,
            ConnectionState(LifespanState({})), True, None, None, send,
        )  # fmt: skip
        offered = protocol.connection.local_settings
        offered[h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL] = 0
        offered.acknowledge()  # else h2 sends the old value, until that is confirmed
        await protocol.initiate()
        offered[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = 1 << 30
        offered.acknowledge()
        try:
            await read_http2(protocol, wire, stopped)
        finally:
            with trio.move_on_after(GOODBYE, shield=True):
                await protocol.goodbye()
                await protocol.handle(Closed())
                await wire.finish()


async def read_http2(protocol: Http2, wire: Wire, stopped: trio.Event) -> None:
    """Until either side has had enough. The first whole head is there in 10 s."""
    first_head = trio.current_time() + HEAD_TIMEOUT
    idle_since = inf
    while not (protocol.idle and (stopped.is_set() or protocol.leaving)):
        now = trio.current_time()
        idle_since = min(idle_since, now) if protocol.idle else inf
        limit = idle_since + IDLE_TIMEOUT if protocol.keep_alive_requests else first_head
        if now >= limit:
            return
        data = None
        with trio.move_on_at(min(limit, now + LOOK_EVERY)):
            data = await wire.receive()
        if data:
            await protocol.handle(RawData(data))
        elif data == b"":
            return


def http2_config() -> Config:
    config = Config()
    config.errorlog = logger
    config.include_server_header = False
    config.include_date_header = False
    config.h2_max_concurrent_streams = HTTP2_STREAMS
    config.keep_alive_max_requests = 1 << 62  # it would end the live streams, too
    return config


# ─── More than one process: Redis Streams behind the same logs ───────────────────────
# Nothing above a log changes, and event n is the same everywhere. A message for the room
# goes into a Redis Stream, which each process copies into its room. An answer is written
# by the process that asks the upstream, and mirrored into a stream of its own; a process
# that is asked for it has a copy, whose model reads Redis where others read HTTP. An
# entry that is read twice changes nothing: after any trouble, all is read again.
#
# The processes tell each other their state, once a second and when it changes: their
# counts, which copies somebody reads, which of these are to be stopped. One of which we
# hear nothing for SILENCE seconds, while we hear ourselves, is gone. Redis, and each of
# them, may also stand still and wake up later: so nothing waits for Redis longer than
# REDIS_TIMEOUT, and a message that its sender was told is not stored will not turn up.
#
#   room           stream of what was said, each entry with its place in the log
#   room:comings   list: which entries of the room are comings and goings
#   presence       hash: members in each process
#   said:PROCESS   the last batch that it has said
#   state          stream of states
#   answer:ID      stream of batches of events; the first entry says who writes it
#   key:DIGEST     the answer that an Idempotency-Key has started
#
# Redis numbers all entries by itself (`*`): with ids of our own, one foreign entry with
# a later id would block them for ever.

PREFIX = "chatstream:2:"
ROOM, COMINGS, PRESENCE = PREFIX + "room", PREFIX + "room:comings", PREFIX + "presence"
STATE, ANSWER_PREFIX = PREFIX + "state", PREFIX + "answer:"
APIS = (CHAT_PAGE, CHAT, COMPLETIONS, RESPONSES, MESSAGES)
REDIS_TIMEOUT, BEAT, SILENCE, WANTS_EVERY = 2, 1, 4.5, 0.05
FOLLOW_BLOCK = 100  # milliseconds; an XREAD under way misses streams that are added to it
MIRROR_EVERY, MIRROR_ANSWERS, MIRROR_EVENTS = 0.02, 100, 200  # in one round trip
UNHEARD_EXPIRES = 3600  # seconds after the last event of an answer that has not ended

LUA = """
-- A key of another type is not ours. It would block commands that name it beside others.
local function heal(key, type)
  if redis.call('TYPE', key).ok ~= type then redis.call('DEL', key) end
end
-- The last entry that has this field: others are not ours.
local function last_entry(key, field)
  heal(key, 'stream')
  for _, entry in ipairs(redis.call('XREVRANGE', key, '+', '-', 'COUNT', 5)) do
    if entry[1]:find('^18446744073709551615') then redis.call('DEL', key) return {} end
    local fields = {}
    for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
    if tonumber(fields[field]) then return fields end
  end
  return {}
end
"""
# A command is not taken back when we give up waiting for its reply: a Redis that was
# frozen would carry it out on waking up, after the sender has been told to say it again.
# So it comes with a time, on Redis's clock, after which it is void. That time also
# names the batch: one that is sent again is not stored again. Only an entry of somebody
# who comes or goes has `members`; 1000 is ROOM_EVENTS, 50 is ROOM_COMINGS.
SAY = """
local room, comings, presence, stored = unpack(KEYS)
local late, our_name, our_end, our_last, me, here = unpack(ARGV)
local now = redis.call('TIME')
if redis.call('GET', stored) == late then return end
if now[1] + now[2] / 1000000 > tonumber(late) then return redis.error_reply('LATE') end
redis.call('SET', stored, late, 'EX', 3600)
heal(comings, 'list') heal(presence, 'hash')
redis.call('HSET', presence, me, here)
local members = 0
for _, n in ipairs(redis.call('HVALS', presence)) do members = members + (tonumber(n) or 0) end
local tail = last_entry(room, 'place')
local name, place = tail.room or our_name, (tail.place or -1) + 1
local last = tail.members and tail.after or tail.place or -1  -- the last message's place
if name == our_name and place < tonumber(our_end) then
  -- Redis has lost what we have heard: go on where no process can have been.
  place, last = our_end + 1000, our_last
end
for i = 7, #ARGV, 2 do
  local more = ARGV[i] == 'message' and {} or {'members', members}
  local id = redis.call('XADD', room, 'MAXLEN', 1000, '*', 'room', name, 'place', place,
    'after', last, 'said', ARGV[i + 1], unpack(more))
  if #more == 0 then
    last = place
  elseif redis.call('RPUSH', comings, id) > 50 then
    redis.call('XDEL', room, redis.call('LPOP', comings))
  end
  place = place + 1
end
"""
# The next events of some answers. Returns for each the place up to which it is stored,
# from where the next batch has to go on: the reply to one that was stored may be lost.
# -1 is an answer that has ended, whoever has written its end.
MIRROR = """
local results, keep, unheard = {}, ARGV[#ARGV - 1], ARGV[#ARGV]
for k, key in ipairs(KEYS) do
  local head, base, from, to, events, ending = unpack(ARGV, k * 6 - 5, k * 6)
  local tail = last_entry(key, 'to')
  local stored, ended = tail.to or base, tail['end'] or ''
  if not tail.to then redis.call('XADD', key, '*', 'head', head, 'to', base) end
  if ended == '' and stored == from and (from ~= to or ending ~= '') then
    redis.call('XADD', key, '*', 'from', from, 'to', to, 'events', events, 'end', ending)
    stored, ended = to, ending
  end
  redis.call('EXPIRE', key, ended == '' and unheard or keep)
  results[k] = ended == '' and tonumber(stored) or -1
end
return results
"""
TELL = """
local me, members, state = unpack(ARGV)
heal(KEYS[1], 'hash') last_entry(KEYS[2])
for i = 3, #KEYS do heal(KEYS[i], 'stream') end
redis.call('HSET', KEYS[1], me, members)
redis.call('XADD', KEYS[2], 'MAXLEN', '~', 1000, '*', 'from', me, 'state', state)
return redis.call('TIME')
"""


@dataclasses.dataclass
class Neighbour:
    """Another process, as far as we have heard of it."""

    silent: float = 0  # seconds
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    reads: set[Answer] = dataclasses.field(default_factory=set)  # of ours


class Elsewhere(Model):
    """The model of somebody else's answer: it reads Redis, where others read HTTP."""

    def __init__(self, cluster: Cluster, writer: str) -> None:
        self.cluster = cluster
        self.writer = writer

    async def write(self, answer: Answer) -> None:
        try:
            await answer.ended.wait()
        finally:
            self.cluster.read.pop(ANSWER_PREFIX + answer.name, None)
            self.cluster.stops.discard(answer.name)
            if not answer.closed:  # nobody here reads it any more: it goes on elsewhere
                answer.discard()

    def stop(self, answer: Answer, problem: Problem) -> None:
        """Its writer is told; what becomes of it is read from Redis."""
        if problem.type == "stopped":
            self.cluster.stops.add(answer.name)
        else:
            answer.discard()


class Cluster:
    """This process, among others on the same Redis."""

    def __init__(self, app: App, url: str) -> None:
        import coredis  # only where --redis is given

        self.app = app
        self.me = secrets.token_hex(8)
        options: JSON = {"connect_timeout": 1, "stream_timeout": REDIS_TIMEOUT}
        options["retry_policy"] = coredis.retry.NoRetryPolicy()  # else a timeout counts thrice
        self.redis: coredis.Redis[str]
        self.redis = coredis.Redis.from_url(url, decode_responses=True, **options)
        register = self.redis.register_script
        self.scripts: JSON = {text: register(LUA + text) for text in (SAY, MIRROR, TELL)}
        self.trouble = (coredis.exceptions.RedisError, OSError)
        self.if_new = coredis.PureToken.NX
        # What we have heard
        self.read = {ROOM: "", STATE: ""}  # the last entry of each stream
        self.last = -1  # the place of the room's last message
        self.neighbours: dict[str, Neighbour] = {}
        self.beaten = -inf  # when we heard ourselves
        self.offset = 0.0  # Redis's time less ours, in seconds
        self.caught_up = trio.Event()
        self.warned: set[str] = set()  # of these streams
        # What we have to say
        self.batch: list[Said] = []  # for one round trip; say() empties it if it is stored
        self.batch_ended = trio.Event()
        self.saying = trio.Lock()
        self.mirrored: dict[Answer, int] = {}  # how many of their events are stored
        self.stops: set[str] = set()  # copies that somebody here wants stopped

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """All that this process does for the others, and they for it.

        No client comes before we know what was said, unless Redis is away.
        """
        async with self.redis, trio.open_nursery() as nursery:
            nursery.start_soon(self.keep_in_touch)
            with trio.move_on_after(REDIS_TIMEOUT):
                await self.caught_up.wait()
            task_status.started()

    async def keep_in_touch(self) -> None:
        """Again after each trouble, and from the beginning: Redis may have lost everything."""
        reason = ""
        while True:
            by_id = self.app.answers.by_id
            self.mirrored = {a: n for a, n in self.mirrored.items() if a.name in by_id}
            self.read = dict.fromkeys(self.read, "0-0")
            try:
                await self.tell()  # and so heal what we read
                async with trio.open_nursery() as nursery:
                    for task in (self.beat, self.follow, self.mirror):
                        nursery.start_soon(task)
            except* Exception as group:
                if reason != (reason := why(group)):
                    logger.warning("redis: %s", reason)
            await trio.sleep(random.uniform(0.1, 2))

    async def goodbye(self) -> None:
        """Until the last events of our answers are stored, for those who read them elsewhere."""
        with trio.move_on_after(0.5):
            while self.mirrored:  # noqa: ASYNC110
                await trio.sleep(MIRROR_EVERY)

    # ── the room ──

    async def store(self, said: Said) -> None:
        """Say it to all processes. Raises Problem if it could not be stored.

        All that is said while a round trip is under way goes in the next one.
        """
        batch, ended = self.batch, self.batch_ended
        batch.append(said)
        if len(batch) == 1:
            self.app.writers.start_soon(self.say, batch, ended)
        try:
            await ended.wait()
        except trio.Cancelled:  # said is said, and its sender must hear of a failure
            with trio.CancelScope(shield=True):  # to enter one for each would take 5 us
                await ended.wait()
        if batch:  # not emptied
            away = "the room cannot store messages at the moment: say it again later"
            raise Problem(503, away, "server_error", code="not_stored")

    async def say(self, batch: list[Said], ended: trio.Event) -> None:
        """Twice, if need be: the reply may be lost, or have come while we stood still."""
        room, keys = self.app.room, [ROOM, COMINGS, PRESENCE, f"{PREFIX}said:{self.me}"]
        try:
            async with self.saying:
                self.batch, self.batch_ended = [], trio.Event()
                late = self.offset + trio.current_time() + REDIS_TIMEOUT
                args = [late, room.name, room.end, self.last, self.me, room.here]
                for said in batch:
                    args += [said.type, to_json((now_ms(), said))]
                for _ in range(2):
                    with contextlib.suppress(*self.trouble):
                        await self.scripts[SAY](keys, args)
                        batch.clear()
                        break
        finally:
            ended.set()

    def hear_room(self, entry: Mapping[str, str]) -> None:
        """An entry of the room's stream, into the local room, at its place."""
        room, place, (at, said) = self.app.room, int(entry["place"]), from_json(entry["said"])
        known, after = entry["room"] == room.name, int(entry["after"])
        if known and place < room.end:
            return
        if not known or after > self.last:  # we are new; or messages between are lost
            room.name = entry["room"]
            room.skip_to(place)
            for reader in room.readers:
                reader.rewind(place - 1)  # so that each is told of a gap
        self.last = place
        if members := entry.get("members"):  # somebody has come or gone
            self.last, room.elsewhere = after, int(members) - room.here
        room.add(Said(*said), at, place)

    # ── our answers, for others ──

    async def announce(self, answer: Answer) -> None:
        """Before a client learns an answer's name: let every process find it."""
        if answer not in self.mirrored and not answer.model.writer:
            self.mirrored[answer] = 0
            with contextlib.suppress(*self.trouble):
                await self.mirror_some([answer])

    async def mirror(self) -> None:
        """Our answers into their streams, many in one round trip."""
        of_all = True
        while True:
            looked = trio.current_time()
            news = [a for a, n in self.mirrored.items() if of_all or n < a.end or a.closed]
            for first in range(0, len(news), MIRROR_ANSWERS):
                await self.mirror_some(news[first : first + MIRROR_ANSWERS])
            await trio.sleep(MIRROR_EVERY)
            of_all = trio.current_time() > looked + 1  # we stood still: has one been ended?

    async def mirror_some(self, answers: list[Answer]) -> None:
        keys = [ANSWER_PREFIX + answer.name for answer in answers]
        args = [arg for answer in answers for arg in self.news(answer)]
        args += [int(self.app.settings.keep) + 1, UNHEARD_EXPIRES]
        results = await self.scripts[MIRROR](keys, args)
        for answer, stored in zip(answers, map(int, results), strict=True):
            self.mirrored[answer] = stored
            if stored < 0:
                del self.mirrored[answer]
                gone = "the server that wrote this answer was silent for too long"
                self.app.answers.stop(answer, upstream_problem(gone))  # if it goes on here

    def news(self, answer: Answer) -> list[str | int]:
        """What MIRROR is told of it. The end of an answer goes with its last events."""
        asked, problem, ending = answer.question, answer.problem, ""
        writer, api = answer.model.writer or self.me, APIS.index(asked.api)
        head = [writer, api, asked.stream, asked.model, asked.polled, asked.digest]
        start = self.mirrored.get(answer, answer.end)
        end = min(answer.end, start + MIRROR_EVENTS)
        events = [answer[place][:2] for place in range(start, end)]
        if answer.closed and end == answer.end:
            ending = to_json(problem and {"status": problem.status, **problem.error})
        return [to_json(head), answer.start, start, end, to_json(events), ending]

    # ── others' answers, for us ──

    @contextlib.contextmanager
    def must_know(self, what: str) -> Iterator[None]:
        try:
            yield
        except self.trouble:
            unknown, retry = f"{what} cannot be known now: try again", {"retry-after": "2"}
            raise Problem(503, unknown, "server_error", headers=retry) from None

    async def find(self, name: str) -> Answer | None:
        """Another process's answer, copied from now on. Raises Problem 503."""
        key, answers = ANSWER_PREFIX + name, self.app.answers
        with self.must_know("whether there is this answer"):
            entries: Any = await self.redis.xrange(key) or ()
        if name in answers.by_id:
            return answers.by_id[name]  # somebody else asked at the same moment
        told = [entry.field_values for entry in entries]
        try:
            head = next((fields["head"] for fields in told if "head" in fields), "")
            writer, api, stream, model, polled, digest = from_json(head)
            question = Question(APIS[api], b"", stream, model, polled=polled, digest=digest)
        except (ValueError, TypeError, IndexError):
            return None
        copy = answers.begin(self.app.writers, Elsewhere(self, writer), question, name)
        copy.accepted.set()
        self.neighbours.setdefault(writer, Neighbour())
        self.read[key] = entries[-1].identifier
        self.hear(key, told)
        return copy

    def hear_answer(self, key: str, entry: Mapping[str, str]) -> None:
        """A batch of its events, of which we may have some already."""
        copy = self.app.answers.by_id.get(key.removeprefix(ANSWER_PREFIX))
        if copy is None or copy.closed or "head" in entry:
            return
        events, start = from_json(entry["events"]), int(entry["from"])
        if start > copy.end:
            copy.skip_to(start)  # what Redis has lost, readers are told of by a gap
        for data, type in events[copy.end - start :]:
            copy.append(data, type)
        if entry["end"]:
            if problem := from_json(entry["end"]):
                copy.problem = Problem(**problem)
            copy.close()

    async def claim_key(self, question: Question) -> tuple[Answer | None, str]:
        """The answer that this Idempotency-Key has started in another process, if any;
        else the name under which it may be started here. Raises Problem."""
        key, name = f"{PREFIX}key:{question.key}", secrets.token_hex(16)
        claim = functools.partial(self.redis.set, key, name, ex=UNHEARD_EXPIRES)
        with self.must_know("whether this was asked before"):
            if claimed := await claim(condition=self.if_new, get=True):
                for _ in range(20):  # it may not have been announced yet
                    if answer := await self.find(str(claimed)):
                        return answer, answer.name
                    await trio.sleep(0.05)
                await claim()  # it is forgotten
        return None, name

    async def free_key(self, question: Question) -> None:
        """The question was refused: it may be asked again."""
        with contextlib.suppress(*self.trouble):
            await self.redis.delete([f"{PREFIX}key:{question.key}"])

    # ── what the processes tell each other ──

    def counts_of_others(self) -> Counter[str]:
        return sum((n.counts for n in self.neighbours.values()), Counter())

    def wants(self) -> list[list[str]]:
        """Other processes' answers: those that are read here, those that are to be stopped."""
        copies = [answer for answer in self.app.answers.open() if answer.model.writer]
        return [[copy.name for copy in copies if copy.attendants], sorted(self.stops)]

    async def tell(self) -> list[list[str]]:
        """All that the others need to know of us. Returns what it is that we want."""
        counts, wants = self.app.counts(), self.wants()
        args = [self.me, counts["members"], to_json([counts, *wants])]
        seconds, micros = await self.scripts[TELL]([PRESENCE, STATE, *self.read], args)
        self.offset = int(seconds) + int(micros) / 1e6 - trio.current_time()
        return wants

    async def beat(self) -> None:
        """Our state, once a second and when somebody begins or ceases to want something."""
        while True:
            told = await self.tell()
            for name in [name for name, n in self.neighbours.items() if n.silent > SILENCE]:
                await self.bury(name)
            with trio.move_on_after(BEAT):
                while self.wants() == told:  # noqa: ASYNC110
                    await trio.sleep(WANTS_EVERY)

    def hear_state(self, entry: Mapping[str, str]) -> None:
        if entry["from"] == self.me:
            now = trio.current_time()
            for neighbour in self.neighbours.values():
                # While Redis or we stood still, it was not silent.
                neighbour.silent += min(now - self.beaten, BEAT)
            self.beaten = now
            return
        counts, reads, stops = from_json(entry["state"])
        by_id, counts = self.app.answers.by_id, {what: int(n) for what, n in counts.items()}
        ours = {by_id[name] for name in by_id.keys() & reads if not by_id[name].model.writer}
        neighbour = self.neighbours.setdefault(entry["from"], Neighbour())
        for answer in ours - neighbour.reads:
            answer.attend()
        for answer in neighbour.reads - ours:
            answer.leave()
        neighbour.silent, neighbour.counts, neighbour.reads = 0, Counter(counts), ours
        for answer in ours:
            if answer.closed:  # and still it is read: Redis may have lost its end
                self.mirrored.setdefault(answer, answer.end)
        for name in by_id.keys() & stops:
            self.app.answers.stop(by_id[name], stopped())

    async def bury(self, name: str) -> None:
        """What a process that is gone has left: readers, answers, members."""
        while reads := self.neighbours[name].reads:
            reads.pop().leave()
        for copy in self.app.answers.open():
            if copy.model.writer == name:  # we write its end, for all who read it
                self.mirrored[copy] = copy.end
                copy.finish(upstream_problem("the server that wrote this answer is gone"))
        members = await self.redis.hget(PRESENCE, name)
        if await self.redis.hdel(PRESENCE, [name]) and members != "0":  # nobody else tells it
            with contextlib.suppress(Problem):
                await self.store(Said("left", f"{members} members"))
        del self.neighbours[name]

    async def follow(self) -> None:
        """The one task that copies: every stream that we read, into its log."""
        while True:
            block = FOLLOW_BLOCK if self.caught_up.is_set() else None
            news: Any = await self.redis.xread(self.read, count=500, block=block)
            for key, entries in (news or {}).items():
                self.hear(key, [entry.field_values for entry in entries])
                if entries[-1].identifier.startswith("18446744073709551615"):
                    await self.redis.delete([key])  # nothing can be added to it any more
                    self.read[key] = "0-0"
                elif key in self.read:
                    self.read[key] = entries[-1].identifier
            if not news:
                self.caught_up.set()

    def hear(self, key: str, told: list[Any]) -> None:
        """What is foreign or broken is skipped: it must not end what we do."""
        takers: JSON = {ROOM: self.hear_room, STATE: self.hear_state}
        take = takers.get(key) or functools.partial(self.hear_answer, key)
        for one in told:
            try:
                take(one)
            except Exception as error:  # whatever somebody has written there
                if key not in self.warned:
                    self.warned.add(key)
                    logger.warning("redis: something in %s is not ours: %r", key, error)


# ─── Flags ───────────────────────────────────────────────────────────────────────────
# Each flag stands once, in Settings: its default, how it is read, its help. Each can
# also be given as an environment variable, CHATSTREAM_PORT and so on; a flag wins.


class UsageError(Exception):
    """The operator asked for something that cannot be: one line, exit code 2."""


def to_text(text: str) -> str:
    return text.strip()


def to_port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > 65535:
        raise ValueError(f"{text!r} is not a port: 0 to 65535")
    return int(text)


def to_workers(text: str) -> int:
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= 256:
        raise ValueError(f"{text!r} is not a number of processes: 1 to 256")
    return int(text)


def to_number(text: str) -> float:
    """Seconds, or a rate."""
    try:
        number = float(text)
    except ValueError:
        number = -1
    if not 0 <= number < inf:
        raise ValueError(f"{text!r} must be a number of 0 or more")
    return number


def to_origin(text: str) -> str:
    text = text.strip().rstrip("/").lower()
    if text != "null" and not re.fullmatch(r"https?://[^/?#\s*@]+", text):
        raise ValueError(f"{text!r} is not an origin, such as https://my.site")
    return text


def to_level(text: str) -> str:
    if text not in ("debug", "info", "warning", "error"):
        raise ValueError(f"{text!r} is not one of debug, info, warning, error")
    return text


def to_base_url(text: str) -> str:
    """`http://host:port/v1[?query]`; a bare host gets its /v1."""
    text = text.strip()
    if not text:
        return ""
    shown = "this" if set(text) & set("@?") else repr(text)  # it may have a key inside
    wrong = f"{shown} is not a base URL, such as http://host:port/v1"
    if not (text.isascii() and text.isprintable() and " " not in text):
        raise ValueError(f"{wrong}: it has characters that cannot be sent")
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ValueError(wrong)
    if parts.username or parts.password:
        raise ValueError(f"{wrong}: a key belongs into OPENAI_API_KEY")
    path = parts.path.rstrip("/") or ("" if parts.query else "/v1")
    return f"{parts.scheme}://{parts.netloc}{path}" + (f"?{parts.query}" if parts.query else "")


def flag(
    default: Any, read: Callable[[str], Any], help: str, metavar: str = "", env: str = ""
) -> Any:
    """A field of Settings that is a flag. A tuple as its default: it may be repeated."""
    about = {"read": read, "help": help, "metavar": metavar or None, "env": env}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the flags say. Times in seconds."""

    host: str = flag("localhost", to_text, "address to listen on")
    port: int = flag(4001, to_port, "of the pages and of HTTP; 0 means any free one")
    room_port: int = flag(8888, to_port, "of the room; both ports serve everything")
    upstream: str = flag(
        "", to_base_url, "base URL of an OpenAI-compatible model", "URL", "OPENAI_BASE_URL"
    )
    model: tuple[str, ...] = flag(
        (), to_text, "a model that one may ask, the first is the default; without: any",
        "NAME", "OPENAI_MODEL",
    )  # fmt: skip
    patience: float = flag(600, to_number, "how long the model may be silent", "S")
    allow_origin: tuple[str, ...] = flag(
        (), to_origin, "pages of this origin may ask and speak; null: from disk", "ORIGIN"
    )
    linger: float = flag(60, to_number, "how long an answer goes on unread", "S")
    keep: float = flag(600, to_number, "how long an ended answer is kept", "S")
    grace: float = flag(5, to_number, "how long answers may go on at a stop", "S")
    room_rate: float = flag(20, to_number, "messages a second of one member; 0 means no limit", "N")
    room_suffix: str = flag("--返回数据", str, "behind each message", "TEXT")
    redis: str = flag("", to_text, "share room and answers over this Redis", "URL")
    workers: int = flag(1, to_workers, "processes on the same sockets; needs --redis", "N")
    certfile: str = flag("", to_text, "PEM, with --keyfile: HTTPS and WSS", "FILE")
    keyfile: str = flag("", to_text, "PEM", "FILE")
    log_level: str = flag("info", to_level, "debug, info, warning or error", "LEVEL")
    # Never a flag: a command line can be read by everybody on the machine.
    api_key: str = dataclasses.field(default="", repr=False)
    token: str = dataclasses.field(default="", repr=False)
    proxy: str = dataclasses.field(default="", repr=False)

    @property
    def model_name(self) -> str:
        return next(iter(self.model), "default" if self.upstream else "demo")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def parse_flags(argv: list[str] | None, environ: Mapping[str, str]) -> Settings:
    """Flags, then environment, then defaults. Raises UsageError."""
    parser = Parser(prog="chatstream", description=__doc__.partition("\n")[0])
    fields = [f for f in dataclasses.fields(Settings) if "read" in f.metadata]
    for field in fields:
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            action="append" if isinstance(field.default, tuple) else "store",
            metavar=field.metadata["metavar"],
            help=field.metadata["help"],
        )
    given = vars(parser.parse_args(argv))
    settings: JSON = {}
    for field in fields:
        texts, source = given_texts(field, given, environ)
        read = field.metadata["read"]
        try:
            values = tuple(read(text) for text in texts)
        except ValueError as error:
            raise UsageError(f"{source}: {error}") from None
        if isinstance(field.default, tuple):
            settings[field.name] = tuple(value for value in values if value)
        elif values:
            settings[field.name] = values[0]
    return complete(settings, environ)


def given_texts(
    field: dataclasses.Field[Any], given: Mapping[str, Any], environ: Mapping[str, str]
) -> tuple[list[str], str]:
    """What was given for a flag, and where."""
    name = field.name.upper()
    if (value := given[field.name]) is not None:
        texts = value if isinstance(value, list) else [value]
        return texts, f"--{field.name.replace('_', '-')}"
    for variable in (f"CHATSTREAM_{name}", field.metadata["env"]):
        if text := environ.get(variable):
            many = isinstance(field.default, tuple)
            return (text.split(",") if many else [text]), variable
    return [], ""


def complete(settings: JSON, environ: Mapping[str, str]) -> Settings:
    """What is not a flag, and what must fit together. Raises UsageError."""
    for name, variable in (("api_key", "OPENAI_API_KEY"), ("token", "CHATSTREAM_TOKEN")):
        secret = environ.get(variable, "").strip()
        if not (secret.isascii() and secret.isprintable()):
            raise UsageError(f"{variable} has characters that cannot be sent")
        settings[name] = secret
    if bool(settings.get("certfile")) != bool(settings.get("keyfile")):
        raise UsageError("--certfile and --keyfile go together")
    if settings.get("workers", 1) > 1:
        if not settings.get("redis"):
            raise UsageError("--workers needs --redis, where they share their logs")
        if not hasattr(os, "fork"):
            raise UsageError("--workers does not work on this system: start one process")
    if upstream := settings.get("upstream"):
        settings["proxy"] = find_proxy(upstream, environ)
    return Settings(**settings)


def find_proxy(url: str, environ: Mapping[str, str]) -> str:
    """The proxy to this URL, by HTTP_PROXY, HTTPS_PROXY and NO_PROXY; or "".

    Raises UsageError if there is one that cannot be used.
    """
    import urllib.request  # slow to load, and only needed here

    parts = urlsplit(url)
    lower = {k.lower(): v.strip() for k, v in environ.items() if v.strip()}
    name = f"{parts.scheme}_proxy"
    proxy = lower.get(name, "")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    exempt = {"no": lower.get("no_proxy", "")}
    if not proxy or urllib.request.proxy_bypass_environment(  # type: ignore[attr-defined]
        f"{parts.hostname}:{port}", exempt
    ):
        return ""
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        parsed = urlsplit(proxy)
        good = parsed.scheme == "http" and bool(parsed.hostname) and parsed.port != 0
    except ValueError:
        good = False
    if not good:
        name = name.upper()
        raise UsageError(f"{name} must be an http:// proxy; NO_PROXY exempts a host")
    return proxy


# ─── main ────────────────────────────────────────────────────────────────────────────
# All that can be wrong with flags, ports, certificate and Redis is found before the
# first client is served, and told in one line.

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
CLIENT_VANISHED = 20  # seconds without TCP acknowledgement
GC_THRESHOLD = 20_000  # new objects; the default of 700 looks for cycles all the time


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """For HTTPS and WSS, HTTP/2 by ALPN. Raises UsageError."""
    if not settings.certfile:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION  # a write must not wait for a read
    try:
        for file in (settings.certfile, settings.keyfile):
            Path(file).read_bytes()  # whose errors name the file
        context.load_cert_chain(settings.certfile, settings.keyfile)
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(f"no certificate from --certfile and --keyfile: {error}") from None
    return context


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of a host, with one port number for all.

    Browsers and Node may try ::1 first for localhost. An address that this machine
    lacks is skipped. Raises UsageError.
    """
    host = host.strip("[]")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                   flags=socket.AI_PASSIVE)  # fmt: skip
    except (OSError, UnicodeError):
        raise UsageError(f"cannot listen on {host}:{port}: no such host") from None
    listeners: list[socket.socket] = []
    lacking: OSError | None = None
    for family, address in dict.fromkeys((f[0], f[4][0]) for f in found):
        number = listeners[0].getsockname()[1] if listeners else port
        try:
            listeners.append(listen_on(family, str(address), number))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                reason = error.strerror or str(error)
                raise UsageError(f"cannot listen on {host}:{number}: {reason}") from None
            lacking = error
    if not listeners:
        reason = (lacking and lacking.strerror) or "no such host"
        raise UsageError(f"cannot listen on {host}:{port}: {reason}")
    return listeners


def listen_on(family: int, address: str, port: int) -> socket.socket:
    dual = address == "::" and socket.has_dualstack_ipv6()
    listener = socket.create_server(
        (address, port), family=family, backlog=4096, dualstack_ipv6=dual
    )
    listener.setblocking(False)
    watch_for_life(listener, CLIENT_VANISHED)  # each connection inherits it
    return listener


def raise_file_limit() -> None:
    """Each connection is a file: take as many as the system gives."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in ((65536, max(hard, 65536)), (hard, hard)):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            break
        except (ValueError, OSError):
            continue
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 10240:
        logger.warning("this system lets us have %d connections (see ulimit -n)", soft - 50)


async def check_redis(url: str) -> None:
    """Raises UsageError, without the password that may stand in the URL."""
    try:
        import coredis
    except ImportError:
        raise UsageError("--redis needs coredis: pip install 'chatstream[redis]'") from None
    if not re.match("(rediss?|unix)://", url):
        raise UsageError("--redis needs a URL, such as redis://host:6379")
    reason = ""
    trouble = (coredis.exceptions.RedisError, trio.TooSlowError, OSError, ValueError)
    try:
        with trio.fail_after(5):
            async with coredis.Redis.from_url(url, connect_timeout=3) as redis:
                await redis.ping()
    except* trouble as group:  # coredis has a nursery of its own
        reason = why(group)
    if reason:
        where = url.rpartition("@")[2].removeprefix("redis://")
        raise UsageError(f"cannot reach Redis at {where}: {reason}")


def start_line(settings: Settings, http: socket.socket, ws: socket.socket) -> str:
    s = "s" if settings.certfile else ""
    host = settings.host.strip("[]")
    host = f"[{host}]" if ":" in host else host
    http_port, ws_port = (sock.getsockname()[1] for sock in (http, ws))
    model = settings.model_name
    return f"chatstream: http{s}://{host}:{http_port}  ws{s}://{host}:{ws_port}  model: {model}"


def on_signals(call: Callable[[], None]) -> None:
    """Call this in Trio's loop at each SIGINT and SIGTERM, until the loop has ended."""
    token = trio.lowlevel.current_trio_token()

    def handle(*_: object) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(call)

    for number in STOP_SIGNALS:
        signal.signal(number, handle)


async def serve(
    settings: Settings,
    tls: ssl.SSLContext | None,
    http: list[socket.socket],
    ws: list[socket.socket],
    ready: Callable[[], object],
    parent: int | None = None,
) -> int:
    """Serve on these sockets until a signal; a second one stops at once.

    `parent` is a pipe that ends with the process that started us, and us with it.
    """
    gc.freeze()  # what is imported stays: no collection needs to look at it again
    gc.set_threshold(GC_THRESHOLD)
    stop = trio.Event()
    ports = {sock.getsockname()[1] for sock in (*http, *ws)}
    server = Server(App(settings, ports), tls)

    async def watch(pipe: int) -> None:
        await trio.lowlevel.wait_readable(pipe)
        stop.set()

    async with trio.open_nursery() as nursery:

        def stop_now() -> None:
            if stop.is_set():
                logger.warning("stopping at once")
                nursery.cancel_scope.cancel()
            stop.set()

        on_signals(stop_now)
        if parent is not None:
            nursery.start_soon(watch, parent)
        await server.serve([*http, *ws], stop, ready)
        nursery.cancel_scope.cancel()
    return 0


class Supervisor:
    """N processes on the same sockets: one that dies is replaced, a stop goes to all.

    They share the listening sockets, opened once: the kernel gives each new connection
    to one of them, so no port is ever closed while a worker is replaced. Each watches a
    pipe, its stdin, that ends with this process.
    """

    def __init__(self, settings: Settings, argv: list[str], fds: list[list[int]]) -> None:
        self.settings = settings
        self.start_worker = functools.partial(
            trio.run_process,
            [sys.executable, str(Path(__file__).resolve()), *argv],
            stdin=subprocess.PIPE,
            env={**os.environ, "CHATSTREAM_LISTENERS": json.dumps(fds)},
            pass_fds=[fd for pair in fds for fd in pair],
            process_group=0,  # Ctrl-C is for this process, which passes it on
            check=False,
            deliver_cancel=kill,
        )
        self.stopping = False
        self.alive: set[trio.Process] = set()

    async def run(self, start: str) -> int:
        async with trio.open_nursery() as nursery:
            on_signals(functools.partial(self.stop, nursery.cancel_scope))
            for _ in range(self.settings.workers):
                nursery.start_soon(self.keep_one)
            print(start, flush=True)
        return 0

    def stop(self, scope: trio.CancelScope) -> None:
        """Passed on to all. What is still there in the end, perhaps frozen, is killed."""
        self.stopping = True
        scope.deadline = trio.current_time() + self.settings.grace + 2.5
        for process in self.alive:
            process.terminate()

    async def keep_one(self) -> None:
        while not self.stopping:
            started = trio.current_time()
            async with trio.open_nursery() as nursery:
                process = await nursery.start(self.start_worker)
                self.alive.add(process)
                if self.stopping:
                    process.terminate()
            self.alive.discard(process)
            if not self.stopping:
                logger.error("a worker died (%d) and is replaced", process.returncode)
                await trio.sleep_until(started + 1)  # one that cannot live: not in a hurry


async def kill(process: trio.Process) -> None:
    process.kill()


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 when it could not start."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        settings = parse_flags(argv, os.environ)
        logging.basicConfig(
            level=settings.log_level.upper(), stream=sys.stderr,
            format="%(asctime)s %(levelname)s %(message)s",
        )  # fmt: skip
        for noisy in ("trio-websocket", "hpack"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        # A connection that it loses is a traceback to coredis, and one line to us.
        logging.getLogger("coredis").setLevel(logging.CRITICAL)
        raise_file_limit()
        tls = tls_context(settings)
        if inherited := os.environ.pop("CHATSTREAM_LISTENERS", ""):
            shared = [[socket.socket(fileno=fd) for fd in fds]
                      for fds in json.loads(inherited)]  # fmt: skip
            return trio.run(serve, settings, tls, shared[0], shared[1], bool, 0)
        http, ws = (listen(settings.host, n) for n in (settings.port, settings.room_port))
        if settings.redis:
            trio.run(check_redis, settings.redis)
        start = start_line(settings, http[0], ws[0])
        if settings.workers > 1:
            fds = [[sock.fileno() for sock in socks] for socks in (http, ws)]
            return trio.run(Supervisor(settings, argv, fds).run, start)
        ready = functools.partial(print, start, flush=True)
        return trio.run(serve, settings, tls, http, ws, ready)
    except UsageError as error:
        print(f"chatstream: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there was a loop to take the signal
        return 0


if __name__ == "__main__":
    sys.exit(main())
