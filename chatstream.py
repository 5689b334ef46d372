"""chatstream: the working model of a long connection.

One idea carries the whole program:

    Everything that happens is appended to an event log.
    Everyone who listens is a position in one.

    writers               logs                       readers
    tick() ──────────▶  clock   ●●●●●●●●──▶   SSE or WebSocket
    a model ─────────▶  answer  ●●●●──▶       SSE, or one JSON body (a short connection)
    a member ────────▶  room    ●●●●●●──▶     WebSocket

Joining late, resuming after a cut, several readers of one answer, fan-out, slow readers and
scaling out are then one mechanism, not six. SSE and WebSocket differ only in how an event is
framed. A request owns its reader; the server owns the writers: that decides every lifetime.

    log      keeps                 a new reader starts    ends
    clock    60 events             with the next tick     with the server
    room     1000 events, 1 MiB    50 messages back       with the server
    answer   all, at most 64 MiB   at the beginning       done, stopped, abandoned, failed

The classes, from the idea outwards (★: read these first; they need nothing below):

    ★ EventLog, Framing            events, numbered for ever; how they look on a connection
    ★ Outlet, Reader, Pump         who writes what to whom, and when
    ★ Room, Answer                 the logs and their writers; the clock is tick()
      Answers                      who may start an answer, and how long it is kept
      Wire, Http1, Member          connections: HTTP/1.1, WebSocket
      Request, AccessPolicy        one request; who may ask
      App, Server                  the routes and sessions; accepting and stopping
      SSEParser, Exchange          what the upstream says, and how it is asked
      Api, Relay, Upstream, Demo   the four protocols; the models
      Http2                        HTTP/2, by Hypercorn
      Cluster                      other processes, over Redis
      Settings, main               the flags and the command

Endpoints (see ROUTES for the rights): GET /clock, /time, /healthz, /metrics, the pages; POST
/chatgptApi/chatgpt_qa_stream, /v1/chat/completions, /v1/completions, /v1/responses,
/v1/messages; GET and DELETE /answers/{id}; GET /v1/responses/{id}; POST
/v1/responses/{id}/cancel; WebSocket on /, /room and /clock.

Limits: a request head 16 KiB and 256 lines, a question 16 MiB, an event 16 MiB, an answer 64 MiB,
all answers 512 MiB and 1000 of them running, a message in the room 4096 characters.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import codecs
import contextlib
import dataclasses
import difflib
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
import select
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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from email.utils import formatdate
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

import h2.events
import h2.exceptions
import h2.frame_buffer
import h2.settings
import h11
import hpack
import trio
import trio.testing
import trio_websocket
from h2.connection import ConnectionInputs, ConnectionState, H2ConnectionStateMachine
from h2.errors import ErrorCodes
from hypercorn.config import Config
from hypercorn.events import Closed, RawData
from hypercorn.protocol.events import Body, EndBody, StreamClosed
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.utils import filter_pseudo_headers

try:  # not on Windows
    import fcntl
    import resource
    import termios
except ImportError:  # pragma: no cover
    fcntl = resource = termios = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import coredis

JSON = dict[str, Any]
AsyncCall = Callable[[], Awaitable[object]]
Socket = socket.socket  # in a class, a field named `socket` hides the module
NOTHING: Mapping[str, Any] = {}  # shared by all that have nothing to add
KiB, MiB = 1024, 1024 * 1024
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
logger = logging.getLogger("chatstream")


def to_json(value: object) -> str:
    """Compact JSON that can be encoded: a lone surrogate stays an escape."""
    text = ENCODER.encode(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"))
    return text


# ─── The log ★ ───────────────────────────────────────────────────────────────────────
# append() and close() are plain functions: no other task runs before they return, so none sees
# half a change. Each calls `on_news` once, and waits for no reader.
#
# A reader keeps its own position, and the log never asks for it. The log forgets by its bounds
# alone, and a reader that stood still for too long finds `start` past its position.
#
#         start                  end
#           │                     │          as in a slice: `start` is the first event
#     · · · ● ● ● ● ● ● ● ● ● ● ●            still kept, `end` the place of the next
#                   │
#                position                    the place of a reader's next event

EVENT_OVERHEAD = 96  # bytes of memory that an Event takes beside its text


class Event(NamedTuple):
    """One thing that happened. `about` holds what only some framings show."""

    data: str
    type: str = "message"
    about: Mapping[str, Any] = NOTHING


@dataclasses.dataclass(eq=False)
class EventLog:
    """A bounded list of events, and its readers.

    Events are numbered for ever. The number is an event's place, and `<name>-<place>` its id.
    """

    name: str
    max_events: float = inf
    max_bytes: float = inf
    on_news: Callable[[EventLog], None] = lambda log: None

    def __post_init__(self) -> None:
        self.start = self.end = 0
        self.size = 0  # bytes of memory
        self.closed = False
        self.readers: dict[Reader, None] = {}  # an ordered set, for the pump
        # A plain message is stored as its text alone: an Event would double a model's token.
        self._events: list[Event | str] = []
        self._joined: dict[tuple[Framing, int], tuple[bytes, int]] = {}  # see frames()

    def append(self, data: str, type: str = "message", **about: Any) -> int:
        """Add an event; forget the oldest beyond the bounds. Returns the new one's place."""
        plain = type == "message" and not about
        event = data if plain else Event(data, type, about or NOTHING)
        self._events.append(event)
        self._grow(size_of(event))
        self.end += 1
        while len(self._events) > self.max_events or self.size > self.max_bytes:
            self._forget(0)
        self._joined.clear()
        self.on_news(self)
        return self.end - 1

    def close(self) -> None:
        """Say that nothing more will come. Readers go on to the end."""
        self.closed = True
        self.on_news(self)

    def skip_to(self, place: int) -> None:
        """Start again at this place, with nothing kept: readers miss what was before."""
        self._events.clear()
        self._joined.clear()
        self._grow(-self.size)
        self.start = self.end = place

    # An index is one in `_events`. Room, where some places are empty, overrides these; so does
    # Answer, whose memory is accounted for.

    def _forget(self, index: int) -> None:
        self._grow(-size_of(self._events.pop(index)))
        self.start += 1

    def _grow(self, size: int) -> None:
        self.size += size

    def _index(self, place: int) -> int:
        return place - self.start

    def _at(self, index: int) -> tuple[int, Event]:
        event = self._events[index]
        return self.start + index, Event(event) if isinstance(event, str) else event

    def __getitem__(self, place: int) -> Event:
        return self._at(self._index(place))[1]

    def backwards(self, types: Iterable[str], end: float) -> Iterator[tuple[int, Event]]:
        """The first event, and all of these types up to a place; the last one first."""
        for index in reversed(range(int(min(end - self.start, len(self._events))))):
            if index == 0 or getattr(self._events[index], "type", "") in types:
                yield self._at(index)

    def place_after(self, last_event_id: str | None) -> int | None:
        """The place after the event with this id, even a forgotten one; None if it is not ours."""
        name, _, place = (last_event_id or "").rpartition("-")
        if name != self.name or not re.fullmatch("[0-9]{1,15}", place):
            return None
        return int(place) + 1 if int(place) < self.end else None

    def frames(self, framing: Framing, place: int) -> tuple[bytes, int]:
        """The bytes of the events from `place` on, and the place after the last of them.

        Most readers stand at the same place, so the bytes are made once, and kept until the
        log changes. They end with the event that reaches WRITE_BYTES: a slow reader's outlet
        keeps no more than this, however far back the reader stands.
        """
        joined = self._joined.get((framing, place))
        if joined is None:
            if len(self._joined) > 8:  # stragglers, each at its own place, fill it
                self._joined.clear()
            joined = self._joined[framing, place] = self._join(framing, place)
        return joined

    def _join(self, framing: Framing, place: int) -> tuple[bytes, int]:
        frames, size = [], 0
        if place < self.start:  # what was missed is gone for good: say how much
            frames.append(framing.frame(self.name, None, gap(self.start - place)))
            place = self.start
        for index in range(self._index(place), len(self._events)):
            place, event = self._at(index)
            frames.append(framing.frame(self.name, place, event))
            place += 1
            size += len(frames[-1])
            if size >= WRITE_BYTES:
                break
        return framing.wrap(b"".join(frames)), place


def size_of(event: Event | str) -> int:
    if isinstance(event, str):
        return sys.getsizeof(event) + 16  # for its place in the list
    return sys.getsizeof(event.data) + EVENT_OVERHEAD


# ─── Framing ★ ───────────────────────────────────────────────────────────────────────
SSE_KEEP_ALIVE = HEARTBEAT_EVERY = 4  # seconds; many clients give up after 5 to 10
WRITE_BYTES = 64 * KiB  # when a write takes no more events


def gap(missed: int) -> Event:
    """How much a reader has missed. It has no id, so that the client keeps its last one."""
    return Event(f'{{"missed": {missed}}}', "gap", {"missed": missed})


def frame_sse(name: str, place: int | None, event: Event) -> bytes:
    """An event as a block of an event stream (HTML standard, section 9.2.5).

    `id:` comes after `data:`, because some clients store an id as soon as they have read its
    line. Otherwise, they would skip an event that was cut in half.
    """
    type_line = "" if event.type == "message" else f"event: {event.type}\n"
    data = event.data
    if "\n" in data or "\r" in data:  # not splitlines(): U+2028 does not end a line
        data = "\ndata: ".join(re.split("\r\n|\r|\n", data))
    id_line = "" if place is None else f"id: {name}-{place}\n"
    return f"{type_line}data: {data}\n{id_line}\n".encode(errors="replace")  # lone surrogates


def http_chunk(data: bytes) -> bytes:
    """A chunk of an HTTP/1.1 body (RFC 9112, section 7.1). An empty one would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA


def frame_ws(payload: bytes, opcode: int = TEXT) -> bytes:
    """One unmasked, unfragmented WebSocket frame (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", 0x80 | opcode, size) + payload
    form, mark = ("!BBH", 126) if size < 1 << 16 else ("!BBQ", 127)
    return struct.pack(form, 0x80 | opcode, mark, size) + payload


def frame_ws_json(name: str, place: int | None, event: Event) -> bytes:
    """As JSON: an event of the clock, or of the room for a chatstream.v1 client."""
    fields: JSON = {} if place is None else {"id": f"{name}-{place}"}
    if event.type != "message":
        fields |= {"type": event.type, **event.about}
    elif name == "clock":
        fields["data"] = event.data
    else:
        fields |= {"type": "message", **event.about, "text": event.data}
    return frame_ws(to_json(fields).encode())


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity: a fast dict key
class Framing:
    """How the events of a log look on one kind of connection."""

    frame: Callable[[str, int | None, Event], bytes]
    wrap: Callable[[bytes], bytes] = bytes  # around all that goes out in one write
    keep_alive: bytes = b""
    every: float = inf  # seconds
    steady: bool = False  # keep-alives at fixed times, not only after silence


SSE = Framing(frame_sse, bytes, b": keep-alive\n", SSE_KEEP_ALIVE)
SSE_CHUNKED = dataclasses.replace(SSE, wrap=http_chunk)
HEARTBEAT = frame_ws(b'{"type":"heartbeat"}')
WS_JSON = Framing(frame_ws_json, bytes, HEARTBEAT, HEARTBEAT_EVERY, steady=True)
WS_CLOCK = Framing(frame_ws_json)  # a tick each second keeps it alive


# ─── Delivery ★ ──────────────────────────────────────────────────────────────────────
# The usual design wakes a task for each reader of each event. Here one task, the pump, passes
# over the readers of every log with news, and writes without waiting. As long as the sockets
# take everything, no other task runs. What a socket does not take stays with its outlet, and
# the connection's own task waits for space while the pass goes on. So a slow reader costs the
# others one failed write. It catches up later; a gap tells it how much the log has forgotten.

STUCK_TIMEOUT = 10  # seconds until a client that takes nothing is dropped
LOOK_EVERY = 1  # seconds between two looks at what a slow client takes
TURN = 0.005  # seconds after which a busy loop lets the other tasks run
NOT_READY = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)  # a full socket


@dataclasses.dataclass
class Turn:
    """How long a busy loop has been running; pause() lets other tasks run when it is time.

    Without it, a pass over 10,000 readers would hold up everybody for 60 ms.
    """

    began: float = dataclasses.field(default_factory=time.perf_counter)
    worked: float = 0  # seconds before this turn

    async def pause(self) -> None:
        if time.perf_counter() - self.began > TURN:
            self.worked = self.total()
            await trio.lowlevel.checkpoint()
            self.began = time.perf_counter()

    def total(self) -> float:
        return self.worked + time.perf_counter() - self.began


class Stuck(trio.BrokenResourceError):
    """The peer takes nothing more of what we send."""


@dataclasses.dataclass(slots=True, eq=False)
class Outlet:
    """The sending side of a connection: a non-blocking socket, plain or TLS.

    The pump calls write_now(), the connection's task send(). A frame in the middle of another
    one would break any protocol. So write_now() may be called only if nothing is unsent, and
    send() first waits for that.
    """

    socket: Socket
    unsent: memoryview | bytes = b""  # what the socket has not taken yet
    sent: int = 0  # bytes
    stuck: bool = False  # the peer takes nothing more
    patience: float = dataclasses.field(default_factory=lambda: STUCK_TIMEOUT)  # seconds

    def write_now(self, data: bytes) -> None:
        """Write without waiting. What the socket does not take is left to flush()."""
        try:
            taken = self.socket.send(data)
        except OSError:  # full, or broken: flush() finds out which
            taken = 0
        self.sent += taken
        if taken < len(data):
            self.unsent = memoryview(data)[taken:]

    async def flush(self) -> None:
        """Wait until nothing is unsent. Raises BrokenResourceError, which may be Stuck."""
        while self.unsent:
            await self._wait_for_space()
            try:
                taken = self.socket.send(self.unsent)
            except NOT_READY:
                continue
            except OSError as error:
                raise trio.BrokenResourceError(str(error)) from error
            self.sent += taken
            self.unsent = self.unsent[taken:]

    async def send(self, data: bytes) -> None:
        """Write all of it. Unlike most of Trio, no checkpoint if it need not wait."""
        await self.flush()
        self.write_now(data)
        await self.flush()

    async def _wait_for_space(self) -> None:
        """Wait until the socket takes more, as long as the peer acknowledges anything.

        Linux calls a socket writable only when a third of its buffer is free. A slow peer may
        need longer than STUCK_TIMEOUT for that.
        """
        pending, since = self._unacknowledged(), trio.current_time()
        while trio.current_time() - since < self.patience:
            with trio.move_on_after(LOOK_EVERY):
                return await trio.lowlevel.wait_writable(self.socket)
            before, pending = pending, self._unacknowledged()
            if pending < before:
                since = trio.current_time()
        self.stuck = True
        raise Stuck(f"it read nothing for {self.patience:g} s")

    def _unacknowledged(self) -> int:
        """Bytes that the peer has not acknowledged (SIOCOUTQ in tcp(7)); 0 if unknown."""
        raw = bytes(4)
        with contextlib.suppress(OSError):
            if fcntl is not None:
                raw = fcntl.ioctl(self.socket, termios.TIOCOUTQ, raw)
        return int.from_bytes(raw, sys.byteorder)


@dataclasses.dataclass(slots=True, eq=False)
class Reader:
    """A position in a log, and where its events go.

    Two tasks drive it. The pump calls catch_up(), a plain function, when there is news. The
    connection's task stays in run() for what must wait: a full socket, the end of the log,
    the client's leaving.
    """

    log: EventLog
    outlet: Outlet | Http2Stream
    framing: Framing
    position: int
    delivered: int = 0  # events
    gaps: int = 0
    dropped: str | None = None  # why the server has ended it
    quiet_since: float = dataclasses.field(default_factory=trio.current_time)
    _listening: trio.CancelScope = dataclasses.field(default_factory=trio.CancelScope)

    def catch_up(self, now: float) -> None:
        """Write what is new, as far as the outlet takes it."""
        log, outlet, framing = self.log, self.outlet, self.framing
        while self.position < log.end and not outlet.unsent:
            frames, position = log.frames(framing, self.position)
            if self.position < log.start:  # then `frames` begins with a gap
                self.gaps += 1
                self.position = log.start
            self.delivered += position - self.position
            self.position = position
            if frames:  # a framing may leave events out
                outlet.write_now(frames)
            if not framing.steady:
                self.quiet_since = now
        if log.closed or outlet.unsent:  # run() has to end, or to flush
            self._listening.cancel()

    def keep_alive(self, now: float) -> None:
        """Break a silence that has lasted long enough. The server calls it every 250 ms."""
        if now - self.quiet_since >= self.framing.every and not self.outlet.unsent:
            self.quiet_since = now
            self.write_aside(self.framing.wrap(self.framing.keep_alive))

    def write_aside(self, data: bytes) -> None:
        """Write something that is not an event. Nothing may be unsent."""
        self.outlet.write_now(data)
        if self.outlet.unsent:
            self._listening.cancel()

    def rewind(self, place: int) -> None:
        """Go back to this place, if the position is past it: the log has started again."""
        self.position = min(self.position, place)

    def drop(self, why: str) -> None:
        """End this reader from outside: run() raises BrokenResourceError."""
        self.dropped = why
        self._listening.cancel()

    async def run(self, listen: AsyncCall) -> bool:
        """Read the log to its end (True), or until the client has left (False).

        `listen` returns when the client has left. It can be cancelled and called again, with
        nothing lost. Raises BrokenResourceError when the client takes nothing more. The pump
        and this task take turns:

            this task   has nothing to write, and waits in listen()
            the pump    catch_up() writes an event; this task sleeps on
            the pump    catch_up() fills the socket, and cancels `_listening`
            this task   wakes up, and waits in flush() for space
            the pump    catch_up() does nothing, because something is unsent
            this task   writes what it has missed meanwhile, and waits in listen() again

        While this task waits in flush(), no scope is open, and a cancel does nothing. None is
        needed: from flush() to the next scope no other task runs, and there this task looks at
        all that a cancel can mean.
        """
        self.log.readers[self] = None
        try:
            while True:
                await self.outlet.flush()
                if self.dropped:
                    raise trio.BrokenResourceError(self.dropped)
                self.catch_up(trio.current_time())
                if self.outlet.unsent:
                    continue
                if self.log.closed:
                    return True
                with trio.CancelScope() as self._listening:
                    await listen()
                    return False
        except Stuck:
            self.dropped = "stuck"
            raise
        finally:
            self.log.readers.pop(self, None)


class Pump:
    """One task for the whole server: in every log with news, every reader catches up."""

    def __init__(self) -> None:
        self._news_in: dict[EventLog, int] = {}  # and how many times
        self._news = trio.Event()
        self._waking = True

    def notify(self, log: EventLog) -> None:
        if log.readers:
            self._news_in[log] = self._news_in.get(log, 0) + 1
            if self._waking:
                self._news.set()

    def at_once(self, append: Callable[[], None]) -> None:
        """Append, and write it to its readers: for a few of them, waking up run() costs more."""
        self._waking = False
        try:
            append()
        finally:
            self._waking = True
        if sum(len(log.readers) for log in self._news_in) > 64:
            return self._news.set()  # run() pauses among them
        logs, self._news_in, now = self._news_in, {}, trio.current_time()
        for reader in [reader for log in logs for reader in log.readers]:
            reader.catch_up(now)

    async def run(self) -> None:
        """Pass after pass. The busier it gets, the more each write carries.

        Only after a pass that carried more than one event of a log, the pump rests for as long
        as the pass took. Meanwhile more events come, and the next pass carries them together.
        """
        while True:
            await self._news.wait()
            # Taken before the pass: what is appended from now on is for the next one.
            logs, self._news_in, self._news = self._news_in, {}, trio.Event()
            turn, now = Turn(), trio.current_time()
            for log in logs:
                for n, reader in enumerate(list(log.readers)):
                    if n % 64 == 63:  # pause() is not free
                        await turn.pause()
                    if reader in log.readers:  # it may have left during a pause
                        reader.catch_up(now)
                await turn.pause()
            if max(logs.values(), default=0) > 1:
                await trio.sleep(turn.total())
            elif turn.total() > TURN / 10:
                await trio.lowlevel.checkpoint()  # after a long pass, let others append first


async def race_disconnect(disconnected: AsyncCall, wait: AsyncCall) -> bool:
    """Wait for something (True), but no longer than the client stays (False).

    For a request that has no reader yet. Of two tasks, the first to end cancels the other.
    """

    async def watch() -> None:
        await disconnected()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await wait()
        nursery.cancel_scope.cancel()
        return True
    return False  # watch() has cancelled wait()


# ─── Writers ★ ───────────────────────────────────────────────────────────────────────
# They belong to the server: a reader that leaves takes nothing with it. Only an answer needs
# an audience: when it has had none for a while, it is stopped.

CLOCK_EVENTS = 60
ROOM_EVENTS, ROOM_BYTES = 1000, MiB
ROOM_HISTORY, ROOM_COMINGS = 50, 50  # messages, and comings and goings, that are kept
HEAD_WAIT = 4  # seconds for the model to begin, before the stream starts without it


async def tick(clock: EventLog) -> None:
    """Event n is the Unix second n, appended on the second.

    Seconds that a busy or suspended machine has missed are made up for, as far back as the log
    reaches. That also fills it at the start: a client that resumes after a restart loses
    nothing. If the system's time is set back, the log is silent until it has caught up.
    """
    while True:
        second = int(time.time())
        if second - clock.end > CLOCK_EVENTS:
            clock.skip_to(second - CLOCK_EVENTS)
        while clock.end <= second:
            moment = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(clock.end))
            clock.append(f"The server time is: {moment}")
        await trio.sleep(1 - time.time() % 1)


class Said(NamedTuple):
    """Something for the room: a message, or that a member joined or left."""

    type: str
    name: str
    text: str = ""
    key: str | None = None  # by which the sender knows its own message


class Room(EventLog):
    """What is said in the room, and who came and went.

    Its name is random at each start of the server. Otherwise, event 7 of yesterday's room
    would pass for event 7 of today's.

    Comings and goings must not push messages out of the log. So only the last few of them are
    kept, and the places of the others stay empty: `_places` has the place of each event kept.
    """

    def __init__(self, on_news: Callable[[EventLog], None]) -> None:
        super().__init__(f"room-{secrets.token_hex(4)}", ROOM_EVENTS, ROOM_BYTES, on_news)
        self.here = 0  # members in this process
        self._places: list[int] = []
        self._comings: deque[int] = deque()  # the places of comings and goings

    def _index(self, place: int) -> int:
        return bisect.bisect_left(self._places, place)

    def _at(self, index: int) -> tuple[int, Event]:
        return self._places[index], super()._at(index)[1]

    def _forget(self, index: int) -> None:
        self._grow(-size_of(self._events.pop(index)))
        place = self._places.pop(index)
        if self._comings and self._comings[0] == place:
            self._comings.popleft()
        else:  # only a lost message makes a gap
            self.start = place + 1

    def skip_to(self, place: int) -> None:
        super().skip_to(place)
        self._places.clear()
        self._comings.clear()

    def add(self, said: Said, at: int, place: int | None = None, members: int = 0) -> None:
        """Append it, said `at` this time in ms. A `place` from Redis may leave some empty."""
        self.end = self.end if place is None else place
        about: JSON = {"name": said.name, "at": at}
        if said.key is not None:
            about["key"] = said.key
        if said.type != "message":
            about["members"] = self.here if place is None else members
            self._comings.append(self.end)
            if len(self._comings) > ROOM_COMINGS:
                self._forget(self._index(self._comings[0]))
        self._places.append(self.end)
        self.append(said.text, said.type, **about)

    async def store(self, said: Said) -> None:
        """What a member calls to speak; with Redis, it calls Cluster.store() instead."""
        if not self.closed:
            self.add(said, int(time.time() * 1000))

    def history(self) -> int:
        """Where a new member starts: the last ROOM_HISTORY messages begin there."""
        wanted = ROOM_HISTORY
        for place in reversed(self._places):
            wanted -= self[place].type == "message"
            if not wanted:
                return place
        return self.start


class Answer(EventLog):
    """An answer under way, or one that has ended and is kept for late readers.

    Its name has 128 random bits: a client that knows it may read the answer and stop it.
    `model` writes it inside `scope`, whose deadline ends the linger time without a timer.
    `question` is what was asked, and its `api` knows how an answer ends. `account` is told
    how much memory is taken, and says whether there is enough. A Problem is an error for
    clients.
    """

    def __init__(
        self, name: str, question: Question, model: Model, linger: float = 60,
        on_news: Callable[[EventLog], None] = lambda log: None,
        account: Callable[[int], bool] = lambda size: True,
    ) -> None:  # fmt: skip
        super().__init__(name, on_news=on_news)
        self.question = question
        self.model = model
        self.linger = linger  # seconds that it goes on with nobody there
        self.account = account
        # What keeps it going
        self.attendants = 0  # requests, also before they read; "background" counts as one
        self.scope = trio.CancelScope()
        # How it goes
        self.begun = trio.current_time()
        self.accepted = trio.Event()  # the model has begun to answer, or it has ended
        self.ended = trio.Event()
        self.headers: dict[str, str] = {}  # from the upstream, for our response
        # How it ended
        self.problem: Problem | None = None
        self.refused = False  # it ended before it was accepted: the HTTP status says so
        self.kept = True  # late readers may have it
        self.affordable = True  # else its writer gives up

    def attend(self) -> None:
        self.attendants += 1
        self.scope.deadline = inf

    def leave(self) -> None:
        """When the last attendant leaves, the linger time begins."""
        self.attendants -= 1
        if not self.attendants:
            self.scope.deadline = trio.current_time() + self.linger

    @contextlib.contextmanager
    def attended(self) -> Iterator[None]:
        self.attend()
        try:
            yield
        finally:
            self.leave()

    async def started(self) -> None:
        """Wait until the response can begin: a stream with the answer, any other at its end.

        A stream begins after HEAD_WAIT in any case: clients give up after 5 s, and one that
        has not been told the answer's name asks again, and pays twice.
        """
        question = self.question
        patient = question.polled or not question.stream  # polled: the model names the response
        with trio.move_on_at(inf if patient else self.begun + HEAD_WAIT):
            await (self.accepted if question.stream else self.ended).wait()

    def _grow(self, size: int) -> None:
        self.size += size
        self.affordable = self.account(size)

    def finish(self, problem: Problem | None = None) -> None:
        """End it once: whatever sees an end calls this, and the first call counts."""
        if self.closed:
            return
        self.problem = problem
        self.refused = problem is not None and not self.accepted.is_set()
        for event in self.question.api.closing(self, problem):
            self.append(event.data, event.type)
        self.close()

    def close(self, kept: bool = True) -> None:
        """A copy that ends before its answer, which goes on elsewhere, is not kept."""
        self.kept = kept
        super().close()
        self.accepted.set()
        self.ended.set()


# That is the idea. What follows is what the open internet demands of it.

# ─── Answers: who may start one, and how long it is kept ─────────────────────────────

ANSWER_BYTES = 64 * MiB
ANSWERS_BYTES, ANSWERS_RUNNING, ANSWERS_BACKGROUND = 512 * MiB, 1000, 100
LONG_QUESTION = 8 * KiB  # may take 0.2 ms to parse
ANSWER_OVERHEAD = 4 * KiB  # bytes of memory that an answer takes beside its events
PACKED_BYTES, PACKED_OVERHEAD = 128 * KiB, 512  # the largest answer that is packed


class Problem(Exception):
    """What went wrong, as the client is told it: an HTTP error, or an `error` event.

    `error` is OpenAI's error object; `status` is an HTTP status.
    """

    def __init__(
        self, status: int, message: str, type: str = "invalid_request_error",
        code: str | None = None, param: str | None = None, headers: Mapping[str, str] = NOTHING,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.type, self.headers = status, type, dict(headers)
        self.error: JSON = {"message": message, "type": type, "param": param, "code": code}

    def arguments(self) -> JSON:
        """With these, the same Problem is made again: later, or in another process."""
        return {"status": self.status, "headers": self.headers, **self.error}


def stopped() -> Problem:
    return Problem(400, "this answer was stopped", "stopped")


def abandoned() -> Problem:
    return Problem(400, "nobody was reading, so this answer was stopped", "abandoned")


def too_busy() -> Problem:
    busy = "too many answers are under way: try again in a moment"
    return Problem(503, busy, "server_busy", headers={"retry-after": "5"})


def server_stopping() -> Problem:
    retry = {"retry-after": "5"}
    return Problem(503, "the server is stopping: ask again", "server_stopping", headers=retry)


class Model:
    """Whoever writes answers: an upstream, the demo, or another process."""

    writer = ""  # the other process, if it is one

    def prepare(self, question: Question, fields: JSON) -> None:
        """Look at what is asked. Raises Problem if it does not speak this protocol."""

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


@dataclasses.dataclass(eq=False)
class Question:
    """What a client asks a model: as bytes, and only until the model has them.

    The objects that they parse to take up to 30 times as much memory.
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
    prepared: Any = None  # what the demo has to say

    def outline(self) -> list[Any]:
        """What is needed of it when it has been answered."""
        api = APIS.index(self.api)
        return [api, self.stream, self.model, self.polled, self.digest]

    @classmethod
    def from_outline(cls, outline: list[Any], key: str = "") -> Question:
        api, stream, model, polled, digest = outline
        return cls(APIS[api], b"", stream, model, polled=polled, digest=digest, key=key)


@dataclasses.dataclass(eq=False)
class Answers:
    """All answers: who may start one, and when it is forgotten.

    `held` is the memory of all of them. Each answer keeps it up: to add them all up
    for each token would cost more than the token.

    One that has ended, and that nobody reads, is packed: as objects, 100,000 of them
    would hold up everybody for a second whenever Python looks for cycles.
    """

    linger: float  # seconds that one goes on with nobody there
    keep: float  # seconds that one is kept when it has ended
    pump: Pump
    on_end: Callable[[Answer], None]
    by_id: dict[str, Answer] = dataclasses.field(default_factory=dict)
    packed: dict[str, bytes] = dataclasses.field(default_factory=dict)
    by_key: dict[str, str] = dataclasses.field(default_factory=dict)  # Idempotency-Key
    running: dict[Answer, None] = dataclasses.field(default_factory=dict)
    ended: OrderedDict[str, float] = dataclasses.field(default_factory=OrderedDict)  # when
    held: int = 0
    _parsing: trio.Lock = dataclasses.field(default_factory=trio.Lock)

    @contextlib.asynccontextmanager
    async def parsing(self, body: bytes) -> AsyncIterator[None]:
        """Of long questions, one is parsed at a time: all else has its turn in between.

        Those that wait are counted. Raises Problem 503 if there are too many.
        """
        if len(body) < LONG_QUESTION:
            yield
        else:
            with self.reserved(len(body), stop=True):
                async with self._parsing:
                    yield

    def begin(self, nursery: trio.Nursery, model: Model, question: Question, name: str) -> Answer:
        """Start an answer in this nursery. Raises Problem 503 if there are too many.

        If all places are taken, or memory is full, those that nobody has attended for the
        longest time are stopped.
        """
        if question.background:
            background = sum(other.question.background for other in self.open())
            if background >= ANSWERS_BACKGROUND:
                raise too_busy()
        size = len(question.body) + ANSWER_OVERHEAD
        self.reserve(size, stop=True)  # first, because it may refuse
        if len(self.open()) >= ANSWERS_RUNNING:
            if not (alone := self.alone()):
                self.held -= size
                raise too_busy()
            self.stop(alone[0], abandoned())
        name = name or secrets.token_hex(16)
        answer = Answer(name, question, model, self.linger, self.pump.notify, self.account)
        answer.size = size
        self.by_id[name] = answer
        if question.background:
            answer.attend()
        if question.key:
            self.by_key[question.key] = name
        self.running[answer] = None
        nursery.start_soon(self.run, answer)
        return answer

    def open(self) -> list[Answer]:
        return [answer for answer in self.running if not answer.closed]

    def alone(self) -> list[Answer]:
        """Those that nobody attends; first the one that was left first."""
        alone = [answer for answer in self.open() if not answer.attendants]
        return sorted(alone, key=lambda answer: answer.scope.deadline)

    def stop(self, answer: Answer, problem: Problem) -> None:
        if not answer.closed:
            answer.model.stop(answer, problem)

    def account(self, size: int) -> bool:
        """Is there room for so many more bytes? The oldest ended answers make it."""
        self.held += size
        while self.held > ANSWERS_BYTES and self.ended:
            self.forget(next(iter(self.ended)))
        return self.excess() <= 0

    def excess(self) -> int:
        """Bytes beyond the limit. An answer that was just stopped no longer counts."""
        if (excess := self.held - ANSWERS_BYTES) <= 0:
            return excess  # nearly always; and this is asked for each token
        return excess - sum(answer.size for answer in self.running if answer.closed)

    def reserve(self, size: int, stop: bool = False) -> None:
        """Count so many bytes, until they are taken off `held`. Raises Problem 503.

        For a question, running answers that nobody attends are stopped: as many as it
        takes, or none if all of them would not do.
        """
        if not self.account(size):
            alone = self.alone() if stop else []
            if sum(answer.size for answer in alone) < self.excess():
                self.held -= size
                raise too_busy()
            while alone and self.excess() > 0:
                self.stop(alone.pop(0), abandoned())

    @contextlib.contextmanager
    def reserved(self, size: int, stop: bool = False) -> Iterator[None]:
        self.reserve(size, stop)
        try:
            yield
        finally:
            self.held -= size

    async def run(self, answer: Answer) -> None:
        """The writer of an answer, from the first word to the end, whatever happens."""
        problem: Problem | None = abandoned()  # at its scope's deadline
        try:
            with answer.scope:
                await answer.model.write(answer)
                problem = None
        except Problem as failure:
            problem = failure.with_traceback(None)
        except RecursionError:  # Python could read it, and not write it inside something else
            problem = upstream_problem("the upstream's answer is nested too deeply")
        except Exception:
            logger.exception("an answer failed in a way that nobody thought of")
            problem = Problem(500, "the answer failed inside the server", "server_error")
        finally:
            try:
                answer.finish(problem)
            except Exception:  # else it would end the server
                logger.exception("the end of an answer failed in a way that nobody thought of")
                answer.close()
            del self.running[answer]
            self.drop_question(answer)
            self.ended[answer.name] = trio.current_time()
            if answer.question.background:
                answer.leave()
            self.on_end(answer)
            question, late = answer.question, trio.current_time() > answer.begun + HEAD_WAIT
            if answer.refused:
                self.by_key.pop(question.key, None)
            # After HEAD_WAIT, a client has been told its name, and may come back for the reason.
            named = late and question.stream and not question.polled
            if not answer.kept or (answer.refused and not named):
                self.forget(answer.name)

    def drop_question(self, answer: Answer) -> None:
        """The model has it: nobody needs its bytes any more."""
        self.replace_question(answer, b"")
        answer.question.headers = {}

    def replace_question(self, answer: Answer, body: bytes) -> None:
        grown = len(body) - len(answer.question.body)
        answer.question.body = body
        answer.size += grown
        self.held += grown

    def forget(self, name: str) -> None:
        """Only if it has ended."""
        del self.ended[name]
        if answer := self.by_id.pop(name, None):
            key, size = answer.question.key, answer.size
        else:
            packed = self.packed.pop(name)
            key, size = packed.partition(b"\n")[0].decode(), len(packed) + PACKED_OVERHEAD
        if self.by_key.get(key) == name:
            del self.by_key[key]
        self.held -= size

    def look_after(self, now: float) -> None:
        """Called a few times a second: forget what is old, and pack what nobody reads."""
        while self.ended and next(iter(self.ended.values())) <= now - self.keep:
            self.forget(next(iter(self.ended)))
        turn = Turn()
        for name, answer in list(self.by_id.items()):
            if name in self.ended and not answer.attendants and answer.size < PACKED_BYTES:
                self.pack(answer)
                if turn.total() > TURN:
                    break  # the others have to wait

    def pack(self, answer: Answer) -> None:
        problem = answer.problem and answer.problem.arguments()
        about = [answer.model.writer, answer.headers, problem, answer.refused, answer.start]
        events = [answer[place][:2] for place in range(answer.start, answer.end)]
        told = to_json([answer.question.outline(), *about, events])
        packed = self.packed[answer.name] = f"{answer.question.key}\n{told}".encode()
        self.held += len(packed) + PACKED_OVERHEAD - answer.size
        del self.by_id[answer.name]

    def has(self, name: str) -> bool:
        return name in self.by_id or name in self.packed

    def find(self, name: str) -> Answer | None:
        """The answer of this name, unpacked."""
        if name not in self.packed:
            return self.by_id.get(name)
        packed = self.packed.pop(name)
        key, _, told = packed.partition(b"\n")
        outline, writer, headers, problem, refused, start, events = from_json(told)
        model, question = Model(), Question.from_outline(outline, key.decode())
        model.writer = writer
        # Counted at the end, and once: to make room now could forget this very answer.
        answer = self.by_id[name] = Answer(name, question, model)
        answer.skip_to(start)
        for data, type in events:
            answer.append(data, type)
        answer.size += ANSWER_OVERHEAD
        self.held += answer.size - len(packed) - PACKED_OVERHEAD
        answer.headers, answer.refused = headers, refused
        answer.problem = problem and Problem(**problem)
        answer.close()
        return answer


# ─── Connections: HTTP/1.1 and WebSocket ─────────────────────────────────────────────
# One client is one nursery, with one `except*`: whatever goes wrong inside ends that
# connection and no other. (Libraries that keep all connections in one nursery can be
# ended by one client: trio-websocket issue 184.)

LINGER_CLOSE = 2  # seconds for the last bytes to arrive before a socket is closed
HEAD_BYTES, HEAD_TIMEOUT = 16 * KiB, 10
HEAD_LINES = 256  # the parser takes 3 us for each: thousands of them would hold up everybody
AHEAD_BYTES = 128 * KiB  # what a client may send before its turn has come
IDLE_TIMEOUT = 75  # between two requests; more than a load balancer's 60
# Ends of a connection that are not a fault of ours, and not news
QUIET_ENDS = (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, OSError)
# An empty line ends a head: those behind it do not count.
TOO_MANY_LINES = re.compile(rb"(?:(?!\r?\n)[^\n]*+\n){%d}" % (HEAD_LINES + 1))
NOT_HTTP = f"this is not HTTP/1 with a head of at most {HEAD_BYTES} bytes, chunked if coded"


@dataclasses.dataclass(slots=True, eq=False)
class Wire(Outlet):
    """One connection, to a client or an upstream: an outlet that is also read from."""

    peer: str = ""  # its address, for the log
    waiting_since: float = inf  # when we began to wait for bytes; inf: we do not

    async def receive(self) -> bytes:
        """The next bytes; b"" when the peer has ended. Can be cancelled and repeated.

        Always a checkpoint: a client that sends faster than we read stops nobody.
        """
        self.waiting_since = trio.current_time()
        await trio.lowlevel.checkpoint()
        while (data := self.receive_now()) is None:
            await trio.lowlevel.wait_readable(self.socket)
        self.waiting_since = inf
        return data

    def receive_now(self) -> bytes | None:
        """What is there already, b"" at the end, None if nothing is there.

        64 KiB hold more than a TLS record: so nothing is left inside of OpenSSL that a
        selector would not see.
        """
        try:
            return self.socket.recv(64 * KiB)
        except NOT_READY:
            return None
        except OSError as error:  # ssl.SSLError is one
            raise trio.BrokenResourceError(str(error)) from error

    async def finish(self) -> None:
        """Say goodbye, and give the peer time to read what it was sent.

        Closing a socket with unread input resets it and destroys what is under way.
        """
        if self.stuck:
            return  # it has had its time
        with contextlib.suppress(*QUIET_ENDS), trio.move_on_after(LINGER_CLOSE):
            await self.flush()
            self._close_notify()
            self.socket.shutdown(socket.SHUT_WR)
            while await self.receive():
                pass

    def close(self) -> None:
        """Close it; reset it if it is stuck, so that its buffers are freed at once."""
        if self.stuck:
            with contextlib.suppress(OSError):  # it is gone already
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self._close_notify()
        trio.lowlevel.notify_closing(self.socket)
        self.socket.close()

    def _close_notify(self) -> None:
        """TLS's goodbye (RFC 8446, section 6.1), without waiting for the peer's."""
        if isinstance(self.socket, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                self.socket.unwrap()


async def shake_tls(sock: ssl.SSLSocket) -> None:
    """TLS's handshake, which both reads and writes. Raises BrokenResourceError."""
    while True:
        try:
            return sock.do_handshake()
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(sock)
        except ssl.SSLWantWriteError:
            await trio.lowlevel.wait_writable(sock)
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error


class Http1:
    """HTTP/1.x on one wire: h11 knows the rules, and we move the bytes.

    One task reads and writes. If all goes well, it waits for a head, hands the request
    to `handle`, and waits for the next head. Much can go wrong (a head that is late,
    too large or not HTTP; a client that leaves, or sends the next request early), and
    it all ends in one of two ways: as long as no response has begun, the client gets an
    error that says why; after that, only the connection's end is left to say it.

    While a response streams, the task sits in disconnected(), which reads. So it learns
    at once that its client has left.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.conn: h11.Connection  # a new one for each request
        self.ahead = b""  # what the client has sent of the next one
        self.only_head = False  # no response to HEAD has a body

    async def serve(self, handle: Callable[[Request], Awaitable[None]]) -> Request | None:
        """Request after request until either side has had enough: None.

        Or until a request asks for a WebSocket: that is returned, and not answered.
        """
        try:
            while request := await self.next_request():
                if request.headers.get("upgrade", "").lower() == "websocket":
                    return request
                await handle(request)
                # Something is left of this exchange: what came next on this connection
                # could be taken for it.
                if {self.conn.our_state, self.conn.their_state} != {h11.DONE}:
                    break
                self.ahead = self.conn.trailing_data[0]
                del request  # with its body; the next one may be long in coming
                await trio.lowlevel.checkpoint()  # pipelined requests let others in
        except (Problem, h11.RemoteProtocolError) as error:
            await self.refuse(error)
        await self.wire.finish()
        return None

    async def next_request(self) -> Request | None:
        """The next request's head; None if the client leaves instead of asking.

        Its parser is a new one. A client may send empty lines before a request (RFC 9112,
        section 2.2), and h11 takes none.
        """
        ahead = self.ahead.lstrip(b"\r\n")
        self.conn = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        self.only_head = False
        first, raw = not self.wire.sent, b""
        with trio.move_on_after(HEAD_TIMEOUT if first or ahead else IDLE_TIMEOUT) as scope:
            while (event := self.conn.next_event()) is h11.NEED_DATA:
                data, ahead = ahead or await self.wire.receive(), b""
                if data and not raw:
                    data = data.lstrip(b"\r\n")
                    if not data:
                        continue
                    if not first:  # it has begun, perhaps in the last of the idle seconds
                        scope.deadline = trio.current_time() + HEAD_TIMEOUT
                raw += data
                if TOO_MANY_LINES.match(raw):
                    raise Problem(431, f"a head has at most {HEAD_LINES} lines")
                self.conn.receive_data(data)
        if scope.cancelled_caught and (first or raw):
            raise Problem(408, "the request's head did not arrive in time")
        return self.accept(event, raw) if isinstance(event, h11.Request) else None

    def accept(self, head: h11.Request, raw: bytes) -> Request:
        """Refuse what h11 lets through and we do not. Raises Problem."""
        self.only_head = head.method == b"HEAD"
        raw = raw[: len(raw) - len(self.conn.trailing_data[0])]
        # h11 only limits a head that is incomplete; one packet may bring a whole one.
        if len(raw) > HEAD_BYTES:
            raise Problem(431, NOT_HTTP)
        names = {name for name, _ in head.headers}
        # A proxy before us may go by the other one of the two. The rest of what it took
        # for one request would be a second one to us (RFC 9112, section 11.2).
        if {b"content-length", b"transfer-encoding"} <= names:
            raise Problem(400, "send Content-Length or Transfer-Encoding, not both")
        version = head.http_version.decode()
        if version not in ("1.0", "1.1"):
            raise Problem(505, "this server speaks HTTP/1.0, HTTP/1.1 and HTTP/2")
        if b"upgrade" not in names:  # only a handshake needs these bytes again
            raw = b""
        return Request(self, head.method, head.target, head.headers, version, raw)

    # What a Request needs of its connection

    async def receive(self) -> bytes | None:
        """The next piece of the body; b"" after the last; None: the client has left."""
        if self.conn.they_are_waiting_for_100_continue:
            await self._send(h11.InformationalResponse(status_code=100, headers=[]))
        while (event := self.conn.next_event()) is h11.NEED_DATA:
            self.conn.receive_data(await self.wire.receive())  # h11 tells end from cut
        if isinstance(event, h11.Data):
            return bytes(event.data)
        return b"" if isinstance(event, h11.EndOfMessage) else None

    async def disconnected(self) -> None:
        """Wait until the client has left, or sends more than anybody will read."""
        while len(self.conn.trailing_data[0]) <= AHEAD_BYTES:
            data = await self.wire.receive()
            self.conn.receive_data(data)  # a pipelined request waits for its turn
            if not data:
                return

    async def respond(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """A whole response."""
        await self.start(status, headers, body, h11.EndOfMessage())

    async def start(
        self, status: int, headers: Mapping[str, str], body: bytes, *end: h11.EndOfMessage
    ) -> None:
        """The head of a stream, with its first bytes. A reader writes the rest."""
        reason = http.client.responses.get(status, "")
        head = h11.Response(status_code=status, headers=dated(headers), reason=reason)
        await self._send(head, h11.Data(body), *end)

    async def end(self, last: bytes = b"") -> None:
        """The end of a stream; `last` are its last bytes."""
        await self._send(h11.Data(last), h11.EndOfMessage())

    async def _send(self, *events: h11.Event) -> None:
        """All in one write."""
        await self.wire.send(b"".join([self.conn.send(event) or b"" for event in events]))

    def reader(self, log: EventLog, start: int) -> Reader:
        chunked = self.conn.their_http_version == b"1.1"
        return Reader(log, self.wire, SSE_CHUNKED if chunked else SSE, start)

    async def refuse(self, problem: Problem | h11.RemoteProtocolError) -> None:
        """Answer what cannot be accepted as a request, if no response has begun."""
        if isinstance(problem, h11.RemoteProtocolError):
            problem = Problem(problem.error_status_hint, NOT_HTTP)
        logger.info("%s refused: %d %s", self.wire.peer, problem.status, problem)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers, body = problem_response(problem)
            body = b"" if self.only_head else body
            # Whoever sends Upgrade names it in Connection (RFC 9110, section 7.8).
            ends = "upgrade, close" if "upgrade" in headers else "close"
            await self.respond(problem.status, headers | {"connection": ends}, body)


def dated(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    return [*headers.items(), ("date", formatdate(usegmt=True))]


def problem_response(problem: Problem) -> tuple[dict[str, str], bytes]:
    """Headers and body of a refusal: OpenAI's error object, Anthropic's type on top."""
    body = to_json({"type": "error", "error": problem.error}).encode() + b"\n"
    headers = {"content-type": "application/json", **problem.headers}
    return headers | {"content-length": str(len(body))}, body


MESSAGE_CHARACTERS = 4096
MESSAGE_BYTES = 12 * MESSAGE_CHARACTERS + KiB  # as JSON, all of them escaped emoji


class WebSocketClose(Exception):
    """The connection must end, with this code (RFC 6455, section 7.4.1)."""

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason


CUT_OFF = WebSocketClose(1006, "")  # it left without a close frame


@dataclasses.dataclass(slots=True, eq=False)
class FrameParser:
    """Reads a client's WebSocket frames (RFC 6455, section 5), however they were split.

    What comes next is pulled, not pushed: a task that is called away between two
    messages finds the second one still here. Raises WebSocketClose: 1002 for what is
    not a frame, 1007 for text that is not UTF-8, 1009 for a message of more than
    MESSAGE_BYTES.
    """

    _buffer: bytearray = dataclasses.field(default_factory=bytearray)
    # The message whose fragments are coming, if any. Its text is one: a list of fragments
    # would take 40 times their bytes.
    _opcode: int = CONTINUATION
    _size: int = 0  # bytes so far
    _text: str = ""
    _rest: bytes = b""  # of a character that was cut

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> tuple[int, str | bytes] | None:
        """A whole message, text as str, or a control frame. None: feed me more.

        CONTINUATION stands for a fragment that is not the last one.
        """
        if frame := self._next_frame():
            final, opcode, payload = frame
            if opcode >= CLOSE:
                return opcode, payload
            self._opcode = opcode or self._opcode
            self._size += len(payload)
            if self._opcode == TEXT:
                data = self._rest + payload
                try:  # now: nonsense is found in its own fragment
                    text, used = codecs.utf_8_decode(data, "strict", final)
                except UnicodeDecodeError:
                    raise WebSocketClose(1007, "text must be UTF-8") from None
                self._text += text
                self._rest = data[used:]
            if final:
                text, opcode = self._text, self._opcode
                self._opcode, self._size, self._text = CONTINUATION, 0, ""
                return opcode, text if opcode == TEXT else b""  # which nobody wants
            return CONTINUATION, b""
        return None

    def _next_frame(self) -> tuple[bool, int, bytes] | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        final, opcode, size = buffer[0] >= 0x80, buffer[0] & 0xF, buffer[1] & 0x7F
        if buffer[0] & 0x70 or opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
            raise WebSocketClose(1002, "reserved bits and opcodes mean nothing here")
        if buffer[1] < 0x80:
            raise WebSocketClose(1002, "a client must mask its frames")
        if opcode >= CLOSE:
            if not final or size > 125:
                raise WebSocketClose(1002, "a control frame is short, and in one piece")
        elif (opcode == CONTINUATION) != (self._opcode != CONTINUATION):
            raise WebSocketClose(1002, "a message begins once, then it continues")
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
        mask = (buffer[start : start + 4] * (size // 4 + 1))[:size]
        payload = int.from_bytes(buffer[start + 4 : end]) ^ int.from_bytes(mask)
        del buffer[:end]
        return final, opcode, payload.to_bytes(size)


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
    if not known and not 3000 <= code < 5000:
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
PING_EVERY = 20  # seconds
NAME_CHARACTERS = 32


def frame_ws_plain(suffix: str, name: str, place: int | None, event: Event) -> bytes:
    """What was said and nothing else, for any WebSocket client."""
    if event.type != "message":
        return b""
    return frame_ws((event.data + suffix).encode(errors="replace"))


def check_handshake(request: Request) -> None:
    """Refuse what trio-websocket would fail on (RFC 6455, section 4.2.1)."""
    headers = request.headers
    upgrades = map(str.strip, headers.get("connection", "").lower().split(","))
    if request.method != "GET" or request.version != "1.1" or "upgrade" not in upgrades:
        raise Problem(400, "a WebSocket begins with GET, HTTP/1.1 and Connection: Upgrade")
    if headers.get("sec-websocket-version") != "13":
        need = {"sec-websocket-version": "13", "upgrade": "websocket"}
        raise Problem(426, "this server speaks WebSocket version 13", headers=need)
    if not re.fullmatch("[A-Za-z0-9+/]{22}==", headers.get("sec-websocket-key", "")):
        raise Problem(400, "Sec-WebSocket-Key must be 16 bytes in base64")


async def shake_hands(head: bytes, may_v1: bool) -> tuple[bytes, bool]:
    """The response that accepts a WebSocket (RFC 6455, section 4.2.2), and whether it has v1.

    Raises Problem for a head that trio-websocket cannot read or does not accept.
    """
    received = trio.testing.MemoryReceiveStream()
    received.put_data(head)
    with contextlib.suppress(ExceptionGroup):  # of a UnicodeError
        async with trio.open_nursery() as nursery:
            sent = trio.testing.MemorySendStream(close_hook=nursery.cancel_scope.cancel)
            stream = trio.StapledStream(sent, received)
            offer = await trio_websocket.wrap_server_stream(nursery, stream)
            v1 = may_v1 and SUBPROTOCOL in offer.proposed_subprotocols
            await offer.accept(subprotocol=SUBPROTOCOL if v1 else None)
            nursery.cancel_scope.cancel()
            return bytes(sent.get_data_nowait()), v1
    wrong = "Host must be a host's name, and Connection and Sec-WebSocket-* ASCII, in one line each"
    raise Problem(400, wrong)


INVISIBLE = re.compile(
    "[\u00ad\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]"
)


def clean_name(name: str) -> str:
    """A name to be shown: NFKC, nothing invisible, at most 32 characters.

    A tower of combining marks is cut to two; a guest has a number.
    """
    shown, marks = "", 0
    for c in filter(str.isprintable, INVISIBLE.sub("", unicodedata.normalize("NFKC", name[:500]))):
        is_mark = unicodedata.category(c) in ("Mn", "Me")  # combining() is 0 for some of Thai
        marks = marks + 1 if is_mark else 0
        if marks <= 2:
            shown += c
    return shown.strip()[:NAME_CHARACTERS].strip() or f"guest-{random.randint(1000, 9999)}"


def free_name(wanted: str, taken: set[str]) -> str:
    """The name itself, or with a number if a member has it already."""
    name, number = wanted, 2
    while name in taken:
        name, number = f"{wanted[: NAME_CHARACTERS - 5]} {number}", number + 1
    return name


@dataclasses.dataclass(slots=True, eq=False)
class Member(Reader):
    """A reader on a WebSocket; in the room it also speaks.

    One task does both. While it waits until it may say more, or until its socket has space,
    it does not read, and TCP slows the client down.
    """

    outlet: Wire
    name: str = ""
    frames: FrameParser = dataclasses.field(default_factory=FrameParser)
    owed: bytes = b""  # a pong or an error, to be sent before we listen on
    turn: float = 0  # a second after this, the next frame may be read
    pinged_at: float = dataclasses.field(default_factory=trio.current_time)
    close: WebSocketClose = CUT_OFF

    def keep_alive(self, now: float) -> None:
        """Also ping; and drop a member that was silent since the last ping.

        Any bytes are a sign of life: the pong of a member that we read slowly may stand
        behind much that it said earlier.
        """
        Reader.keep_alive(self, now)  # super() fails in a dataclass with slots (CPython 90562)
        if now - self.pinged_at < PING_EVERY or self.outlet.unsent:
            return  # we do not listen while a wire is full: that has its own deadline
        if self.outlet.waiting_since < self.pinged_at:
            return self.drop("silent")
        self.pinged_at = now
        self.write_aside(frame_ws(b"", PING))

    async def stay(self, say: Callable[[Said], Awaitable[None]], rate: float) -> None:
        """Until it or we have had enough. Its messages go to `say`, `rate` a second.

        Then everything that was said earlier, by anyone, and the close frame.
        """
        try:
            if await self.run(functools.partial(self.listen, say, rate)):
                self.close = WebSocketClose(1001, "the server is stopping")
        except WebSocketClose as close:
            self.close = close
        if self.close is CUT_OFF:
            return  # there is nobody to tell
        end = self.log.end
        with trio.move_on_after(LINGER_CLOSE):
            while self.position < end:
                await self.outlet.flush()
                self.catch_up(trio.current_time())
            await self.outlet.send(frame_close(self.close.code, self.close.reason))

    async def listen(self, say: Callable[[Said], Awaitable[None]], rate: float) -> None:
        """Pass on everything that it says, until it leaves. Raises WebSocketClose.

        May be called away at every `await`, and again later: what is half done stands
        in `owed`, `turn` and `frames`.
        """
        while True:
            if self.owed:
                await self.outlet.flush()
                owed, self.owed = self.owed, b""
                self.write_aside(owed)
            if self.turn > trio.current_time() + 1:  # it has said a second's worth
                await trio.sleep_until(self.turn - 1)
            if frame := self.frames.next():
                opcode, payload = frame
                if opcode == PING:
                    self.owed = frame_ws(cast(bytes, payload), PONG)
                elif opcode == CLOSE:
                    raise parse_close(cast(bytes, payload))
                elif opcode not in (PONG, CONTINUATION):
                    self.turn = max(self.turn, trio.current_time()) + 1 / (rate or inf)
                    await self.pass_on(say, payload)
                await trio.lowlevel.checkpoint()  # let the others have their turn
            elif data := await self.outlet.receive():
                self.frames.feed(data)
            else:
                return

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
            self.owed = frame_ws((to_json(told) if v1 else f"error: {problem}").encode())

    def parse(self, message: str | bytes) -> Said:
        if isinstance(message, bytes):
            raise WebSocketClose(1003, "this room is for text")
        try:
            fields = from_json(message) if self.framing is WS_JSON else {"text": message}
            text, key = fields["text"], fields.get("key")
        except (ValueError, TypeError, KeyError):
            text = key = None
        if not isinstance(text, str) or not isinstance(key, str | None):
            raise WebSocketClose(1007, 'send {"text": "..."}')
        if len(text) > MESSAGE_CHARACTERS:
            raise WebSocketClose(1009, f"at most {MESSAGE_CHARACTERS} characters")
        # Half a surrogate pair cannot be encoded: it is replaced.
        text = text.encode(errors="replace").decode()
        return Said("message", self.name, text, key and key[:100])


# ─── Requests: what one may ask, and who ─────────────────────────────────────────────
# What a handler needs of its request stands in Request; what it cannot accept it raises
# as a Problem. One policy for Host, Origin and the token, one shape of error.

BODY_BYTES, BODY_SILENCE, BODY_TIMEOUT = 16 * MiB, 10, 120
BODIES_BYTES = 64 * MiB  # of all the bodies that are still arriving
# At these limits, parsing takes 0.1 s. A colon counts as a bracket does: a name is an object.
BODY_BRACKETS, BODY_COMMAS, BODY_COLONS = 300_000, 1_000_000, 300_000
SSE_RETRY = 2  # seconds
SSE_HEADERS = {
    "content-type": "text/event-stream",
    # no-transform: a proxy that compresses would hold the stream back (RFC 9111, 5.2.2)
    "cache-control": "no-cache, no-transform",
    "x-accel-buffering": "no",  # for nginx
}
# The pages load nothing from elsewhere, but may talk to any server on loopback, because
# `?server=` in their address names another one than theirs.
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "connect-src 'self' http://localhost:* https://localhost:* ws://localhost:* wss://localhost:* "
    "http://127.0.0.1:* https://127.0.0.1:* ws://127.0.0.1:* wss://127.0.0.1:*; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
MAY_READ = "X-Answer-Id, Retry-After, X-Request-Id, X-Should-Retry"
TOKEN_COOKIE = "chatstream_token"
# Who may ask: everybody; everybody with the token; with the token, and no page of a
# foreign origin.
OPEN, PUBLIC, OWN = "open", "public", "own"


def _finite(text: str) -> float:
    """Python also takes NaN, and reads 1e999 as infinity: no browser could parse that."""
    number = float(text)
    if not abs(number) < inf:
        raise ValueError(f"{text} is not JSON")
    return number


DECODER = json.JSONDecoder(parse_constant=_finite, parse_float=_finite)
# To check a question, nobody needs its numbers, and a long integer takes quadratic time.
CHECKER = json.JSONDecoder(parse_constant=_finite, parse_int=float)


def from_json(text: str | bytes, decoder: json.JSONDecoder = DECODER) -> Any:
    """Parse JSON as RFC 8259 has it. Raises ValueError."""
    try:
        return decoder.decode(text if isinstance(text, str) else text.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


class BodyBudget:
    """All the bodies that are still arriving: together, they take BODIES_BYTES at most.

    Beyond that, the body that began to arrive first is given up.
    """

    def __init__(self) -> None:
        self.scopes: OrderedDict[trio.CancelScope, None] = OrderedDict()  # the oldest first
        self.size = 0

    async def read(self, request: Request) -> bytes:
        """A whole body, if any, so that what follows is the client leaving.

        Every handler relies on that: disconnected() would take a body for silence.
        Raises Problem 413, 408, 503.
        """
        length = request.headers.get("content-length", "")
        announced = int(length) if re.fullmatch("[0-9]{1,20}", length) else 0
        if request.version != "2" and not (announced or "transfer-encoding" in request.headers):
            return await request.connection.receive() or b""  # it is there: the body's end
        body, end, turn = bytearray(), trio.current_time() + BODY_TIMEOUT, Turn()
        close = {"connection": "close"}  # what is left of the body would come next
        with trio.CancelScope() as scope:
            self.scopes[scope] = None
            try:
                while max(announced, len(body)) <= BODY_BYTES:
                    scope.deadline = min(end, trio.current_time() + BODY_SILENCE)
                    data = await request.connection.receive()
                    if data is None:
                        raise trio.BrokenResourceError("the client left in mid-request")
                    if not data:
                        return bytes(body)
                    body += data
                    self.size += len(data)
                    if self.size > BODIES_BYTES and self.scopes:
                        self.scopes.popitem(last=False)[0].cancel()
                    await turn.pause()  # a packet may have thousands of pieces
            finally:
                self.scopes.pop(scope, None)
                self.size -= len(body)
            raise Problem(413, f"a body has {BODY_BYTES >> 20} MiB at most", headers=close)
        if trio.current_time() >= scope.deadline:
            raise Problem(408, "the request's body did not arrive in time", headers=close)
        busy = "too many questions are arriving at once: send this one again"
        raise Problem(503, busy, "server_busy", headers=close | {"retry-after": "2"})


class Request:
    """One HTTP request and its response."""

    def __init__(
        self, connection: Http1 | Http2Stream, method: bytes, target: bytes,
        headers: Iterable[tuple[bytes, bytes]], version: str, head: bytes = b"",
    ) -> None:  # fmt: skip
        self.connection = connection
        self.method = method.decode("latin-1")
        self.headers = fold_headers(headers)
        self.version = version
        self.head = head  # as it came
        text = target.decode("latin-1")
        if absolute := re.match("(?i)https?://([^/?#]*)", text):
            # RFC 9112, section 3.2.2: its host counts, and not that of the Host header.
            self.headers["host"] = absolute[1]
            text = text[absolute.end() :]
        path, _, query = text.partition("?")
        self.path = re.sub("/+", "/", unquote(path)).rstrip("/") or "/"
        self.query = parse_query(query)
        self.body = b""
        self.extra: dict[str, str] = {}  # headers for the response, such as CORS
        self.status = 0  # of the response; 0: none has begun

    @property
    def last_event_id(self) -> str | None:
        """Where an EventSource cannot set a header, its URL says it."""
        names = ("after", "lasteventid", "last-event-id")
        found = [self.headers.get("last-event-id"), *map(self.query.get, names)]
        return next(filter(None, found), None)

    async def respond(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] = NOTHING
    ) -> None:
        """A short response, in one piece. With 204 and 304 there is no body."""
        headers = {**headers, **self.extra}
        if status not in (204, 304):
            headers.setdefault("content-length", str(len(body)))
        self.status = status
        await self.connection.respond(status, headers, b"" if self.method == "HEAD" else body)

    async def respond_json(self, body: str, status: int = 200) -> None:
        headers = {"content-type": "application/json", "cache-control": "no-store"}
        await self.respond(status, body.encode(errors="replace") + b"\n", headers)

    async def start(self, headers: Mapping[str, str], body: bytes) -> None:
        """A response that a reader goes on with."""
        self.status = 200
        await self.connection.start(200, {**headers, **self.extra}, body)


def fold_headers(pairs: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """By lower-case name; one that is repeated is a list (RFC 9110, section 5.3)."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in pairs:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        glue = "; " if name == "cookie" else ", "
        headers[name] = f"{headers[name]}{glue}{value}".strip() if name in headers else value
    return headers


def parse_query(query: str) -> dict[str, str]:
    """`?a=b` by lower-case name, the last of each. Too many fields count as none."""
    try:
        pairs = parse_qsl(query, max_num_fields=20, errors="replace")
    except ValueError:
        return {}
    return {name.lower(): value for name, value in pairs}


LOOPBACK = re.compile(r"(.+\.)?localhost|::1|127(\.\d{1,3}){3}")
ADDRESS = re.compile(r".*:.*|\d{1,3}(\.\d{1,3}){3}")


def split_host(netloc: str) -> tuple[str, int | None]:
    """`name:port` as a lower-case name without brackets, and the port or None."""
    parts = re.fullmatch(r"(?a)(\[[\w.:]+\]|[\w.-]*)(?::(\d{0,5}))?", netloc)
    if parts is None:
        return "", None
    return parts[1].strip("[]").lower().rstrip("."), int(parts[2]) if parts[2] else None


class AccessPolicy:
    """Who may ask: the Host against DNS rebinding, the Origin against other people's
    pages, the token against everybody else. Each check raises Problem."""

    def __init__(self, settings: Settings, ports: set[int]) -> None:
        self.settings = settings
        self.ports = ports
        self.on_loopback = bool(LOOPBACK.fullmatch(settings.host.strip("[]")))
        self.hosts = {split_host(origin.partition("://")[2])[0] for origin in settings.allow_origin}
        self.cookie = hashlib.sha256(settings.token.encode()).hexdigest()

    def check(self, request: Request, right: str) -> None:
        self.check_host(request)
        if request.method == "OPTIONS":
            return  # to a preflight, the headers of its response say enough
        if right == OWN and not self.welcomes(request):
            origin = request.headers["origin"][:200]
            foreign = f"a page of origin {origin!r} may not do this: to allow it,"
            raise Problem(403, f"{foreign} start the server with --allow-origin {origin}")
        if right != OPEN:
            self.check_token(request)

    def check_host(self, request: Request) -> None:
        """Bound to loopback: any page can point its own name at us, but no address."""
        host = split_host(request.headers.get("host", "localhost"))[0]
        known = LOOPBACK.fullmatch(host) or ADDRESS.fullmatch(host) or host in self.hosts - {""}
        if self.on_loopback and not known:
            foreign = f"this server is not {host!r}: ask for localhost, or start it"
            raise Problem(421, f"{foreign} with --allow-origin https://{host or 'NAME'}")

    def welcomes(self, request: Request) -> bool:
        """A page of our own, on either port, or of an origin that may ask.

        A request without Origin is not a page's: curl, an SDK, another server. The scheme
        is not compared: behind a proxy we do not know our own. Where the whole world can
        connect, a name is not ours because the Host header repeats it.
        """
        origin = request.headers.get("origin")
        if origin is None or origin.lower() in self.settings.allow_origin:
            return True
        if origin == "null":
            return not self.settings.upstream  # a page from disk may play with the demo
        parts = re.fullmatch("(?i)https?://(.+)", origin)
        name, port = split_host(parts[1]) if parts else ("", None)
        host, host_port = split_host(request.headers.get("host", ""))
        local = LOOPBACK.fullmatch(name)
        same = name == host or (local and LOOPBACK.fullmatch(host))
        trusted = self.on_loopback or local or ADDRESS.fullmatch(name)
        return bool(name and same and trusted) and port in {host_port, *self.ports}

    def cors(self, request: Request, right: str) -> dict[str, str]:
        """A page that may ask may read the response. One from disk may read a refusal, too."""
        if right != OWN:
            return {"access-control-allow-origin": "*", "timing-allow-origin": "*"}
        headers = {"vary": "Origin", "access-control-expose-headers": MAY_READ}
        origin = request.headers.get("origin", "")
        if origin == "null" or (origin and self.welcomes(request)):
            headers["access-control-allow-origin"] = origin
        return headers

    def check_token(self, request: Request, *offered: str) -> None:
        if not self.settings.token:
            return
        offered = (*offered, *credentials(request).values())
        good = [same_secret(given, self.settings.token) for given in offered]
        cookies = re.findall(rf"{TOKEN_COOKIE}=(\w+)", request.headers.get("cookie", ""))
        if not any(good + [same_secret(given, self.cookie) for given in cookies]):
            wrong = "send this server's token as Authorization: Bearer, or open /?token=... once"
            scheme = {"www-authenticate": "Bearer"}
            raise Problem(401, wrong, "authentication_error", "invalid_api_key", headers=scheme)


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


def www_folder() -> Path | None:
    here = Path(__file__).parent
    return next(filter(Path.is_dir, (here / "www", here / "chatstream_www")), None)


def read_pages() -> dict[str, tuple[bytes, dict[str, str]]]:
    """Body and headers of each file in www/, read once: no path can ever leave it."""
    pages, www = {}, www_folder()
    types = mimetypes.MimeTypes()  # not the system's: a registry may call JavaScript plain text
    types.add_type("text/javascript", ".js")  # RFC 9239
    for file in filter(Path.is_file, www.iterdir() if www else ()):
        body, type = file.read_bytes(), types.guess_type(file.name)[0] or "text/plain"
        etag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
        about = {"etag": etag, "content-type": f"{type}; charset=utf-8"}
        for name in {file.name, file.name.removesuffix("index.html")}:
            pages[f"/{name}"] = body, PAGE_HEADERS | about
    return pages


class Metrics:
    """Counters and one histogram, as text for Prometheus (format version 0.0.4)."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        bounds = ("0.1", "0.25", "0.5", "1", "2.5", "5", "10", "30", "60", "120", "+Inf")
        self.first_tokens = dict.fromkeys(bounds, 0)  # how many took at most so many seconds
        self.first_token_sum = 0.0

    def count_reader(self, reader: Reader) -> None:
        self.counts["events_delivered_total"] += reader.delivered
        self.counts["gaps_total"] += reader.gaps
        if reader.dropped:
            self.counts[f'readers_dropped_total{{cause="{reader.dropped}"}}'] += 1

    def first_token(self, seconds: float) -> None:
        self.first_token_sum += seconds
        for bound in self.first_tokens:
            self.first_tokens[bound] += seconds <= float(bound)

    def text(self, living: Counter[str]) -> str:
        """`living` is added: gauges, and what those who are still here have counted."""
        lines, name = [], "chatstream_first_token_seconds"
        living.update(self.counts)
        for family, samples in itertools.groupby(sorted(living), lambda s: s.partition("{")[0]):
            kind = "counter" if family.endswith("_total") else "gauge"
            lines.append(f"# TYPE chatstream_{family} {kind}")
            lines += [f"chatstream_{sample} {living[sample]}" for sample in samples]
        lines.append(f"# TYPE {name} histogram")
        lines += [f'{name}_bucket{{le="{bound}"}} {n}' for bound, n in self.first_tokens.items()]
        lines.append(f"{name}_sum {self.first_token_sum}")
        return "\n".join([*lines, f"{name}_count {self.first_tokens['+Inf']}\n"])


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
        self.room = Room(self.pump.notify)
        self.say = self.cluster.store if self.cluster else self.room.store
        self.answers = Answers(settings.linger, settings.keep, self.pump, self.on_end)
        model = Upstream if settings.upstream else Demo
        self.model: Upstream | Demo = model(settings, self.answers, self.metrics)
        self.plain = Framing(functools.partial(frame_ws_plain, settings.room_suffix))
        # What goes on
        self.readers: dict[Reader, None] = {}  # of all logs
        self.names: set[str] = set()  # of the room's members here
        self.wires: dict[Wire, None] = {}
        self.active = 0  # requests and members under way
        self.passing = 0  # short requests that wait for the model
        self.stopping = False
        self.metrics_text = ("", -inf)  # and when it was made
        self.writers: trio.Nursery  # the server's

    def on_end(self, answer: Answer) -> None:
        if answer.model.writer:
            return  # it counts where it is written
        ending = answer.problem.type if answer.problem else "done"
        self.metrics.counts[f'answers_total{{ending="{ending}"}}'] += 1
        if answer.refused and answer.question.key and self.cluster:
            self.writers.start_soon(self.cluster.free_key, answer.question)

    # ── from a request to its handler ──

    async def handle(self, wire: Wire, request: Request) -> None:
        """Answer one request, whatever comes of it, and log it."""
        started, sent = time.monotonic(), wire.sent
        self.active += 1
        try:
            await self.route(request)
        except Problem as problem:
            if request.status:
                raise
            await self.refuse(request, problem)
        finally:
            self.active -= 1
            log_line(wire, f"{request.method} {request.path}", request.status, started, sent)

    async def refuse(self, request: Request, problem: Problem) -> None:
        headers, body = problem_response(problem)
        await request.respond(problem.status, body, headers)

    async def route(self, request: Request) -> None:
        """Who asks, may they, and what for: in this order, after the whole body.

        A refusal in the middle of a body would cost the connection, and mostly be lost.
        """
        route, arguments = self.find_route(request.path)
        allow = ", ".join([*route.handlers, "OPTIONS"]).replace("GET", "GET, HEAD")
        request.extra = self.policy.cors(request, route.right)
        request.body = await self.bodies.read(request)
        self.policy.check(request, route.right)
        if request.method == "OPTIONS":
            wanted = request.headers.get("access-control-request-headers", "")
            cors = {"access-control-allow-methods": allow, "access-control-max-age": "600"}
            cors["access-control-allow-headers"] = wanted if wanted.isascii() else ""
            return await request.respond(204, headers=cors | {"allow": allow})
        if not route.handlers:
            there = ", ".join(known.path for known in ROUTES)
            nothing = f"there is nothing at {request.path[:100]!r}; there is {there}, and the pages"
            raise Problem(404, nothing, code="not_found")
        handler = route.handlers.get("GET" if request.method == "HEAD" else request.method)
        if handler is None:
            wrong = f"{request.method} does not work here: use {allow}"
            raise Problem(405, wrong, headers={"allow": allow})
        if request.method != "POST":
            request.body = b""  # nobody asks for it, and a stream may last for hours
        await handler(self, request, *arguments)

    def find_route(self, path: str) -> tuple[Route, tuple[str, ...]]:
        """What is at this path, and the groups of its pattern."""
        if path in self.pages:
            return PAGE, ()
        for spelling in (path, f"/v1{path}"):  # a base URL may lack its /v1
            for route in ROUTES:
                if found := re.fullmatch(route.path, spelling):
                    return route, found.groups()
        return NOWHERE, ()

    # ── all but answers ──

    async def get_page(self, request: Request) -> None:
        body, headers = self.pages[request.path]
        known = request.headers.get("if-none-match", "")
        if request.path == "/" and self.settings.token and "token" in request.query:
            await self.log_in(request)
        elif headers["etag"] in known or known == "*":
            await request.respond(304, headers=headers)
        else:
            await request.respond(200, body, headers)

    async def log_in(self, request: Request) -> None:
        """The token by a visit: from here on the browser sends it as a cookie."""
        self.policy.check_token(request, request.query["token"])
        ours = "https" if self.settings.certfile else "http"
        scheme = request.headers.get("x-forwarded-proto", ours)
        cookie = f"{TOKEN_COOKIE}={self.policy.cookie}; Path=/; HttpOnly; SameSite=Lax"
        cookie += "; Secure" if scheme.lower() == "https" else ""
        headers = {"location": "/", "set-cookie": cookie, "cache-control": "no-store"}
        await request.respond(303, headers=headers)

    async def get_time(self, request: Request) -> None:
        """The clock as a short connection: for the next tick, ask again."""
        last = self.clock.end - 1
        tick = {"id": f"clock-{last}", "data": self.clock[last].data}
        await request.respond_json(to_json(tick))

    async def get_healthz(self, request: Request) -> None:
        counts = self.counts()
        for other in self.cluster.neighbours.values() if self.cluster else ():
            counts.update(other.counts)
        status = "stopping" if self.stopping else "ok"
        health = {"status": status, **counts, "model": self.settings.model_name}
        await request.respond_json(to_json(health), 503 if self.stopping else 200)

    def counts(self) -> Counter[str]:
        """What goes on in this process."""
        return Counter(
            readers=sum(reader.log is not self.room for reader in self.readers),
            answers=sum(not answer.model.writer for answer in self.answers.running),
            members=self.room.here,
        )

    async def get_metrics(self, request: Request) -> None:
        """Made anew once a second at most: it asks every reader."""
        text, made = self.metrics_text
        if trio.current_time() - made > 1:
            living = self.counts()
            living["connections"] = len(self.wires)
            living["sent_bytes_total"] = sum(wire.sent for wire in self.wires)
            living["events_delivered_total"] = sum(reader.delivered for reader in self.readers)
            living["gaps_total"] = sum(reader.gaps for reader in self.readers)
            text = self.metrics.text(living)
            self.metrics_text = text, trio.current_time()
        headers = {"content-type": "text/plain; version=0.0.4"}
        await request.respond(200, text.encode(), headers)

    async def get_models(self, request: Request, name: str | None) -> None:
        one = functools.partial(self.model.model, name or "")
        many = functools.partial(self.model.models, query=urlencode(request.query))
        await self.pass_through(request, one if name else many)

    async def post_short(self, request: Request, path: str) -> None:
        """Embeddings, count_tokens: nothing that one could follow."""
        async with self.answers.parsing(request.body):
            body = JsonBody(request.body)
            if path != "/embeddings":
                body.choose(self.model.choose(body.model))
            raw = request.body = body.raw()
            del body  # its objects, while the model thinks
        with self.answers.reserved(len(raw)):
            await self.pass_through(request, lambda headers: self.model.short(path, headers, raw))

    async def pass_through(
        self, request: Request, ask: Callable[[dict[str, str]], Awaitable[Reply]]
    ) -> None:
        """Respond with what the model says, unless the client leaves before."""

        async def respond() -> None:
            try:
                reply = await ask(passed_headers(request, self.settings.token))
                request.extra |= reply.headers
                await self.respond_long(request, reply.body)
            except Problem as problem:
                await self.refuse(request, problem)

        self.passing += 1
        try:
            await race_disconnect(request.connection.disconnected, respond)
        finally:
            self.passing -= 1

    async def respond_long(self, request: Request, body: str) -> None:
        """A body that may be long, and that a client that reads slowly makes us hold."""
        with self.answers.reserved(3 * len(body)):  # as text, as bytes, and behind its head
            await request.respond_json(body)

    async def get_clock(self, request: Request) -> None:
        last = request.last_event_id or ""
        place = self.clock.place_after(last)
        start, after = (self.clock.end, "") if place is None else (place, last)
        await self.stream(request, self.clock, start, after)

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
        await request.start(SSE_HEADERS, f"retry: {SSE_RETRY * 1000}\n{id_line}".encode())
        reader = request.connection.reader(log, start)
        self.readers[reader] = None
        try:
            if not await reader.run(request.connection.disconnected):
                return  # the client has left: there is nobody to end it for
        finally:
            del self.readers[reader]
            self.metrics.count_reader(reader)
        again = random.randint(1000, 5000)  # so that they do not all return at once
        await request.connection.end(b"retry: %d\n" % again if self.stopping else b"")

    # ── answers ──

    async def post_question(self, request: Request, path: str) -> None:
        """The path says in which protocol; that of the chat page is ours alone."""
        apis = {api.path: api for api in (CHAT, COMPLETIONS, RESPONSES, MESSAGES)}
        await self.post_answer(request, apis.get(path, CHAT_PAGE))

    async def post_answer(self, request: Request, api: Api) -> None:
        """A new answer; or the one that this question, asked earlier, has started.

        Two lifetimes part here: the writer is started in the server's nursery, and this
        request only attends. It waits for the model no longer than its client does.
        """
        if last := request.last_event_id:
            request.body = b""
            answer = await self.find_answer(last.rpartition("-")[0] or last)
            return await self.follow(request, answer, last)
        async with self.answers.parsing(request.body):
            question = await self.read_question(request, api)
        request.body = b""
        answer = await self.ask(question)
        with answer.attended():
            if self.cluster:
                await self.cluster.announce(answer)
            if await race_disconnect(request.connection.disconnected, answer.started):
                await self.first_response(request, answer)

    async def read_question(self, request: Request, api: Api) -> Question:
        body = JsonBody(request.body)
        check_question(body.fields, api)
        body.choose(self.model.choose(body.model))
        if len(request.body) >= LONG_QUESTION:
            await trio.lowlevel.checkpoint()  # let others in, before it is parsed again
        question = api.ask(api, body, passed_headers(request, self.settings.token))
        self.model.prepare(question, body.fields)
        if key := request.headers.get("idempotency-key"):
            caller = to_json([request.path, key, sorted(credentials(request).items())])
            question.key = hashlib.sha256(caller.encode()).hexdigest()
            question.digest = hashlib.sha256(request.body).hexdigest()
        return question

    async def ask(self, question: Question) -> Answer:
        """A new answer, or the one that the same Idempotency-Key has started."""
        answer, name = self.answers.find(self.answers.by_key.get(question.key, "")), ""
        if question.key and answer is None and self.cluster:
            answer, name = await self.cluster.claim_key(question)
        if answer is None:
            if self.stopping:
                raise server_stopping()
            answer = self.answers.begin(self.writers, self.model, question, name)
        if answer.question.digest != question.digest:
            other = "this Idempotency-Key was used for another question: use a new one"
            raise Problem(422, other, param="Idempotency-Key")
        return answer

    async def first_response(self, request: Request, answer: Answer) -> None:
        """A stream that has begun is 200, whatever comes: problems are events then."""
        question, problem = answer.question, answer.problem
        request.extra["x-answer-id"] = answer.name
        if not answer.kept:  # we stop, and it goes on in another process
            raise server_stopping()
        if problem and (answer.refused or not question.stream):
            raise problem.with_traceback(None)
        request.extra |= answer.headers
        if question.polled:
            await request.respond_json(show_response(answer, answer.start + 1))
        elif question.stream:
            await self.stream(request, answer, 0, answer.name)
        else:
            await self.respond_long(request, question.api.whole(answer))

    async def get_answer(self, request: Request, name: str) -> None:
        answer = await self.find_answer(name)
        await self.follow(request, answer, request.last_event_id or name)

    async def delete_answer(self, request: Request, name: str) -> None:
        self.answers.stop(await self.find_answer(name), stopped())
        await request.respond(204)

    async def find_answer(self, name: str) -> Answer:
        answer = self.answers.find(name)
        if answer is None and self.cluster:
            answer = await self.cluster.find(name)
        if answer is None:
            raise Problem(404, "there is no such answer, or no longer", code="not_found")
        return answer

    async def follow(
        self, request: Request, answer: Answer, last_event_id: str, start: int = 0
    ) -> None:
        """An answer again, after this event; its name stands for "nothing seen yet"."""
        with answer.attended():
            if last_event_id != answer.name:
                await self.reach(answer, lambda: answer.place_after(last_event_id) is not None)
                place = answer.place_after(last_event_id)
                if place is None:
                    wrong = "this Last-Event-ID is not of this answer: send the last one you saw"
                    raise Problem(400, wrong, param="Last-Event-ID")
                start = place
            request.extra |= {"x-answer-id": answer.name, **answer.headers}
            seen = answer.closed and start == answer.end
            if seen and last_event_id != answer.name and request.method != "POST":
                # To an EventSource this says: do not come back (HTML standard 9.2.3).
                # A client that repeats a POST would take it for a failure, and so does
                # OpenAI's SDK for Node, which names no event but a sequence_number.
                return await request.respond(204)
            await self.stream(request, answer, start, last_event_id)

    async def reach(self, answer: Answer, known: Callable[[], bool]) -> None:
        """Wait until we know what a reader may have seen in another process. Raises Problem."""
        if self.cluster and answer.model.writer:
            await self.cluster.reach(answer, known)

    async def find_response(self, id: str) -> Answer:
        """By the id that we gave it: the upstream's, and our secret behind a dot."""
        answer = await self.find_answer(id.rpartition(".")[2])
        await self.reach(answer, lambda: answer.end > 0)
        # Its first event settles its id; if Redis has lost that one, any other may name it.
        with not_too_deep():
            named = response_now(answer, inf if answer.start else 1)
        if answer.question.api is not RESPONSES or named.get("id") != id:
            raise Problem(404, "there is no such response", code="not_found")
        return answer

    async def get_response(self, request: Request, id: str) -> None:
        answer = await self.find_response(id)
        if request.query.get("stream", "").lower() != "true":
            return await self.respond_long(request, show_response(answer))
        start, after = 0, request.query.get("starting_after", "")
        if re.fullmatch("[0-9]{1,15}", after):
            number = int(after)
            await self.reach(answer, lambda: place_of_sequence(answer, number - 1) < answer.end)
            start = place_of_sequence(answer, number)
        await self.follow(request, answer, request.last_event_id or answer.name, start)

    async def cancel_response(self, request: Request, id: str) -> None:
        answer = await self.find_response(id)
        self.answers.stop(answer, stopped())
        with trio.move_on_after(2):  # another process may have to hear of it
            await answer.ended.wait()
        await self.respond_long(request, show_response(answer))

    # ── WebSockets ──

    def admit(self, request: Request) -> EventLog:
        """The log that this handshake is for. Raises Problem."""
        check_handshake(request)
        self.policy.check(request, OWN)
        if request.path not in ("/", "/room", "/clock"):
            raise Problem(404, "there is no WebSocket here: use /room or /clock")
        if self.stopping:
            raise server_stopping()
        return self.clock if request.path == "/clock" else self.room

    async def session(
        self, wire: Wire, log: EventLog, v1: bool, trailing: bytes, query: Mapping[str, str]
    ) -> str:
        """From the handshake's end to the close frame; returns how it ended."""
        now = log.end  # it misses nothing of what follows
        framing = self.plain if log is self.room else WS_CLOCK
        after = query.get("after", "")
        if self.cluster and after.startswith(f"{self.room.name}-"):
            with contextlib.suppress(Problem):  # another process may be ahead of us
                await self.cluster.reach(log, lambda: log.place_after(after) is not None)
        start = log.place_after(after)
        if start is None:
            start = self.room.history() if v1 else min(now, log.end)
        name = free_name(clean_name(query.get("name", "")), self.names)
        member = Member(log, wire, WS_JSON if v1 else framing, start, name=name)
        member.frames.feed(trailing)
        self.readers[member] = None
        try:
            await self.enter(member, "joined")
            say = self.say if log is self.room else ignore
            await member.stay(say, self.settings.room_rate)
        finally:
            del self.readers[member]
            self.metrics.count_reader(member)
            await self.enter(member, "left")
        return f"closed {member.close.code} {member.close.reason}".rstrip()

    async def enter(self, member: Member, type: str) -> None:
        """Let the room know. It works without, should that not be stored.

        Shielded: that a member left is told also when all is being cancelled.
        """
        if member.log is self.room:
            self.room.here += 1 if type == "joined" else -1
            (self.names.add if type == "joined" else self.names.discard)(member.name)
            with contextlib.suppress(Problem), trio.move_on_after(1, shield=True):
                await self.say(Said(type, member.name))


async def ignore(said: Said) -> None:
    """What a member of the clock says."""


class Route(NamedTuple):
    path: str  # a pattern: its groups are the handlers' arguments
    right: str
    handlers: Mapping[str, Callable[..., Awaitable[None]]]  # by method


PAGE = Route("the path of a file", OPEN, {"GET": App.get_page})
NOWHERE = Route("any other path", OWN, {})
ROUTES = [
    Route("/clock", PUBLIC, {"GET": App.get_clock}),
    Route("/time", PUBLIC, {"GET": App.get_time}),
    Route("/healthz", OPEN, {"GET": App.get_healthz}),
    Route("/metrics", OWN, {"GET": App.get_metrics}),
    Route("(/chatgptApi/chatgpt_qa_stream)", OWN, {"POST": App.post_question}),
    Route("/v1(/chat/completions|/completions)", OWN, {"POST": App.post_question}),
    Route("/v1(/responses|/messages)", OWN, {"POST": App.post_question}),
    Route("/v1/responses/(.+)/cancel", OWN, {"POST": App.cancel_response}),
    Route(r"/v1/responses/(.+\.\w+|[^/]+)", OWN, {"GET": App.get_response}),
    Route("/v1/models(?:/(.+))?", OWN, {"GET": App.get_models}),
    Route("/v1(/embeddings|/messages/count_tokens)", OWN, {"POST": App.post_short}),
    Route("/answers/([^/]+)", OWN, {"GET": App.get_answer, "DELETE": App.delete_answer}),
]


# ─── The server ──────────────────────────────────────────────────────────────────────


class Server:
    """Accepting, the server's own tasks, and a stop that everybody is told of."""

    def __init__(self, app: App, tls: ssl.SSLContext | None) -> None:
        self.app = app
        self.tls = tls

    async def serve(self, listeners: list[socket.socket], start: str) -> None:
        """Accept until a signal, then end gracefully: every reader is told.

        A worker has no start line to print, and a pipe as stdin that ends with its parent.
        A nursery ends after what is inside of it, and the connections' is inside of the
        writers'. So no reader outlives what it reads.
        """
        app, stop = self.app, trio.Event()
        async with trio.open_nursery() as app.writers:
            await app.writers.start(heed_signals, stop.set, app.writers.cancel_scope.cancel)
            if not start:
                app.writers.start_soon(end_with_parent, stop)
            for task in (app.pump.run, app.model.run, self.keep_alive):
                app.writers.start_soon(task)
            app.writers.start_soon(tick, app.clock)
            if app.cluster:
                app.writers.start_soon(app.cluster.run)
                with trio.move_on_after(REDIS_TIMEOUT):  # first we hear what was said
                    await app.cluster.caught_up.wait()
            async with trio.open_nursery() as connections:
                async with trio.open_nursery() as accepting:
                    for listener in listeners:
                        accepting.start_soon(self.accept, listener, connections)
                    if start:
                        print(start, flush=True)
                    await stop.wait()
                    accepting.cancel_scope.cancel()
                for listener in listeners:
                    listener.close()
                await self.end()
                app.writers.cancel_scope.cancel()  # and the connections, which are inside

    async def end(self) -> None:
        """Answers may finish; then all logs end, and with them their readers."""
        app = self.app
        app.stopping = True
        with trio.move_on_after(app.settings.grace):
            for answer in app.answers.open():
                await answer.ended.wait()
            while app.passing:  # noqa: ASYNC110
                await trio.sleep(0.02)
        for answer in app.answers.open():
            app.answers.stop(answer, server_stopping())
        if app.cluster:
            await app.cluster.goodbye()  # other processes are told how ours ended
        app.clock.close()
        app.room.close()
        with trio.move_on_after(LINGER_CLOSE):
            while app.active:  # noqa: ASYNC110 (an event would be set in two places)
                await trio.sleep(0.02)

    async def keep_alive(self) -> None:
        """One task for the silence of all: a timer for each reader would cost more."""
        readers = self.app.readers
        while True:
            await trio.sleep(0.25)
            now, turn = trio.current_time(), Turn()
            self.app.answers.look_after(now)
            for n, reader in enumerate(list(readers)):
                if n % 64 == 63:
                    await turn.pause()
                if reader in readers:  # it may have left during a pause
                    reader.keep_alive(now)

    async def accept(self, listener: socket.socket, connections: trio.Nursery) -> NoReturn:
        """One task for each client, from now on until it leaves."""
        warned = -inf
        while True:
            await trio.lowlevel.wait_readable(listener)
            try:
                for _ in range(50):
                    connections.start_soon(self.connection, *listener.accept())
            except BlockingIOError:
                pass
            except OSError as error:  # of a client that has gone, or no file is left
                if trio.current_time() > warned + 10:
                    logger.error("new connections wait: %s (see ulimit -n)", error)
                    warned = trio.current_time()
                await trio.sleep(0.1)

    async def connection(self, client: socket.socket, address: tuple[Any, ...]) -> None:
        """One client: whatever goes wrong inside ends here, as one line in the log."""
        host, port, *_ = address
        peer = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        client.setblocking(False)
        if tls := self.tls:
            try:
                client = tls.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
            except OSError as error:  # a client that has gone already (CPython 108310)
                return logger.debug("%s ended: %s", peer, error)
        wire = Wire(client, peer=peer)
        self.app.wires[wire] = None
        try:
            await self.converse(wire)
        except* QUIET_ENDS as group:
            level = logging.INFO if wire.stuck else logging.DEBUG
            logger.log(level, "%s ended: %s", wire.peer, why(group))
        except* Exception:
            logger.exception("a connection failed in a way that nobody thought of")
        finally:
            del self.app.wires[wire]
            self.app.metrics.counts["sent_bytes_total"] += wire.sent
            wire.close()

    async def converse(self, wire: Wire) -> None:
        """TLS if we have a certificate, then whatever protocol the client speaks.

        A WebSocket begins as HTTP/1, so h11 reads its head, too: one place for limits.
        """
        handle = functools.partial(self.app.handle, wire)
        if isinstance(wire.socket, ssl.SSLSocket):
            try:
                with trio.fail_after(HEAD_TIMEOUT):
                    await shake_tls(wire.socket)
            except trio.BrokenResourceError:
                return await wire.finish()  # with an alert that says why
            if wire.socket.selected_alpn_protocol() == "h2":
                return await serve_http2(wire, handle)
        http1 = Http1(wire)
        request = await http1.serve(handle)
        if request is None:
            return
        try:
            log = self.app.admit(request)
            accepted, v1 = await shake_hands(request.head, log is self.app.room)
        except Problem as problem:
            await http1.refuse(problem)
            return await wire.finish()
        started, path, query = time.monotonic(), request.path, request.query
        trailing = http1.conn.trailing_data[0]
        del http1, request  # 4 KB that a member does not need any more
        self.app.active += 1
        ended = ""
        try:
            await wire.send(accepted)
            ended = await self.app.session(wire, log, v1, trailing, query)
        finally:
            await wire.finish()
            self.app.active -= 1
            log_line(wire, f"WebSocket {path}", ended, started)


def log_line(wire: Wire, what: str, ended: str | int, started: float, sent: int = 0) -> None:
    """One line that nobody can forge, and that gives no answer away."""
    what = re.sub("([0-9a-f]{6})[0-9a-f]{26}", r"\1...", what)[:200]
    text = ascii(f"{what} {ended or 'cut'}")[1:-1]
    size, took = wire.sent - sent, time.monotonic() - started
    logger.info("%s %s %d bytes %.1f s", wire.peer, text, size, took)


def why(group: BaseException) -> str:
    """The first reason in a group of exceptions, in words."""
    error = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}".rstrip(": ")


# ─── What the upstream says ──────────────────────────────────────────────────────────
# The upstream's stream is read by the standard's rules, and passed on as it came. It has
# said everything only when it has said its end: whatever ends before that is a cut.

EVENT_BYTES, WHOLE_BYTES = 16 * MiB, 16 * MiB
WORDS_BYTES, WORDS_CHARACTERS = 64 * KiB, 500  # of the upstream's reasons
KEY_CHARACTERS = 32  # by which a key is known: to compile a pattern of 15,000 takes 1.5 s


class SSEParser:
    """Reads an event stream (HTML standard 9.2.6), however its bytes were split.

    Bytes become text only up to a blank line: by then, a character that came in two pieces
    is whole. An event larger than `max_bytes` raises ValueError.
    """

    def __init__(self, max_bytes: float = inf) -> None:
        self.max_bytes = max_bytes
        self._unread = bytearray()  # of the event that is not complete yet
        self._after_cr = False  # a line end already; should a LF come, it is part of it
        self._encoding = "utf-8-sig"  # until the first event: a byte order mark may come

    def feed(self, data: bytes) -> list[Event]:
        """Take the next bytes; return the events that they complete.

        A last event without its blank line is never returned, as the standard wants.
        """
        if data and (self._after_cr or b"\r" in data):
            after_cr, self._after_cr = self._after_cr, data[-1:] == b"\r"
            data = data[1:] if after_cr and data[:1] == b"\n" else data
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if self._unread or data[-2:] != b"\n\n":  # else it is whole, as nearly always
            searched = max(len(self._unread) - 1, 0)  # no byte is searched twice
            self._unread += data
            end = self._unread.rfind(b"\n\n", searched) + 1
            if not end:
                if len(self._unread) > self.max_bytes:
                    raise ValueError(f"an event of more than {self.max_bytes / MiB:.3g} MiB")
                return []
            data = bytes(self._unread[:end])
            del self._unread[: end + 1]
        text = data.decode(self._encoding, "replace")
        self._encoding = "utf-8"
        events = []
        lines, type = [], ""
        for line in text.split("\n"):
            name, _, value = line.partition(":")
            if name == "data":
                lines.append(value.removeprefix(" "))
            elif name == "event":
                type = value.removeprefix(" ")
            elif not line:
                if lines:  # without data it does not end an event, and the type is lost
                    events.append(Event("\n".join(lines), type or "message"))
                lines, type = [], ""
            elif name == "error":  # not in the standard: llama.cpp tells one so
                lines, type = [value], name
            elif line[0] == "{":  # nor this: a server that had begun, and then failed
                lines.append(line)
        return events

    def unfinished(self) -> list[Event]:
        """The last event, if it lacks its blank line and tells the end: [DONE], or an error."""
        for event in self.feed(b"\n\n"):
            failed = event.type == "error" or '"error":' in event.data
            if failed or event.data.strip() == "[DONE]":
                return [event]
        return []


def upstream_problem(message: str, status: int = 502, code: str | None = None) -> Problem:
    return Problem(status, message, "upstream_error", code)


def is_error(said: Any) -> bool:
    """Whichever of the usual forms it has; a null in `error` is not one."""
    if isinstance(said, list) and said:
        said = said[0]
    return isinstance(said, dict) and (
        "error" in (said.get("object"), said.get("type"))
        or (said.get("error") is not None and said.get("object") != "response")
    )


def reason_given(status: int, said: Any, secrets: Iterable[str]) -> Problem:
    """The upstream's own words about what went wrong, wherever they stand, without the key."""
    places = ("error", "message", "detail", "errors", "msg", "title", "reason")
    words, waiting, whole = "", [said], said
    around: JSON = {}
    while waiting and not words:
        said = waiting.pop()
        if isinstance(said, dict):
            around, said = around | said, [said.get(place) for place in places]
        if isinstance(said, list):
            waiting += reversed(said[: len(places)])
        elif isinstance(said, str):
            words = clean_words(said, secrets)
    if not words and whole and isinstance(whole, dict | list):  # somewhere else
        words = clean_words(to_json(whole), secrets)
    problem = upstream_problem(words or f"the upstream answered {status}", status)
    for name in ("type", "param", "code"):
        value = around.get(name)
        if isinstance(value, str | int) and value not in ("", "error"):
            problem.error[name] = clean_words(value, secrets) if isinstance(value, str) else value
    return problem


def clean_words(text: str, secrets: Iterable[str]) -> str:
    """In this order: strip tags, hide the key, cut to length.

    A key with a tag inside would be put together by stripping, and a key that is cut in half
    could not be found.
    """
    text = re.sub(r"(?is)<(script|style)\b[^<>]*>.*?(</\1>|\Z)", " ", text)
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
    codes = ((re.escape(c), f"{ord(c):02x}") for c in secret[:KEY_CHARACTERS])
    return re.compile(  # not from each of many backslashes: that takes quadratic time
        r"(?<!\\)"
        + "".join(rf"\\*(?:{c}|(?i:u00{code}|x{code}|%(?:25)*{code}))" for c, code in codes)
        + rf"(?:\\*(?i:(?:u00|x|%(?:25)*)[0-9a-f]{{2}}|.)){{0,{len(secret[KEY_CHARACTERS:])}}}"
    )


# ─── The four protocols ──────────────────────────────────────────────────────────────
# One relay for all of them: what differs stands in the table at the end. Sources: the
# references of OpenAI's chat completions, completions and responses, and of Anthropic's
# messages.


class JsonBody:
    """A question as JSON: parsed to be checked, and changed only where it must be.

    What need not change goes on byte for byte. Raises Problem 400, 413.
    """

    def __init__(self, raw: bytes) -> None:
        brackets = raw.count(b"{") + raw.count(b"[")
        many = brackets > BODY_BRACKETS or raw.count(b",") > BODY_COMMAS
        if many or raw.count(b":") > BODY_COLONS:
            raise Problem(413, "the body has too many brackets, commas or colons: send less")
        self._raw = raw
        self.fields = self.parse(CHECKER)
        if not isinstance(self.fields, dict):
            raise Problem(400, 'send a JSON object, such as {"messages": [...]}')
        self.model = str(self.fields.get("model") or "")
        self.changes: JSON = {}  # None takes the field out

    def parse(self, decoder: json.JSONDecoder = DECODER) -> Any:
        """All of it; by DECODER with its numbers as they are."""
        try:
            return from_json(self._raw, decoder)
        except ValueError as error:
            raise Problem(400, f"the body is not JSON: {error}"[:300]) from None

    def choose(self, model: str) -> None:
        # A second "model" may be the one that counts for the upstream.
        twice = self._raw.count(b'"model"') > 1 or b"\\u00" in self._raw
        if model and (model != self.model or twice):
            self.model = self.changes["model"] = model

    def raw(self) -> bytes:
        if not self.changes:
            return self._raw
        fields = (self.parse() | self.changes).items()
        return to_json({k: v for k, v in fields if v is not None or k not in self.changes}).encode()


def check_question(fields: JSON, api: Api) -> None:
    """The part of a question that we rely on. Raises Problem 400.

    All else is the upstream's to judge, and passed on: it may be newer than we are.
    """
    kinds = {"stream": bool, "background": bool, "model": str, "stream_options": dict}
    for name, kind in {**kinds, "previous_response_id": str}.items():
        value = fields.get(name)
        too_long = isinstance(value, str) and len(value) > 1000
        if not isinstance(value, kind | None) or too_long:
            raise Problem(400, f"{name} has the wrong type, or is too long", param=name)
    messages = fields.get("messages") if api.has_messages else [{"role": "any"}]
    if not isinstance(messages, list) or not messages:
        raise Problem(400, "messages must be a list, and not empty", param="messages")
    for n, message in enumerate(messages):
        has_role = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not has_role or not isinstance(message.get("content"), str | list | None):
            wanted = "each message needs a role, and content that is text or a list of parts"
            raise Problem(400, wanted, param=f"messages[{n}]")


def ask_as_is(api: Api, body: JsonBody, headers: dict[str, str]) -> Question:
    stream = body.fields.get("stream") is True
    return Question(api, body.raw(), stream, body.model, headers)


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

    def take(self, event: Event) -> None:
        """Raises Problem if it says an error, or nothing that can be understood."""
        data, type, _ = event
        api, answer, data = self.api, self.answer, data.strip()
        if answer.closed or not (data or type == "error"):
            return
        if data == "[DONE]" and type != "error":
            return None if api.ends else self.end(done=True)
        try:
            chunk, end = DECODER.raw_decode(data)
        except (ValueError, RecursionError):
            end = -1
        if end != len(data):
            if type != "error":
                raise upstream_problem("the upstream sent a chunk that is not JSON")
            chunk = data
        if type == "error" or is_error(chunk):
            raise reason_given(502, chunk, self.secrets)
        if not isinstance(chunk, dict):
            raise upstream_problem("the upstream sent a chunk that is not an object")
        if api.ends and isinstance(named := chunk.get("type"), str) and named.isprintable():
            type = named or type
        if not self.began:
            self.began = True
            answer.accepted.set()
        # Where events have names, those that bring a word end in "delta".
        if not self.spoke and (type.endswith("delta") or not api.ends):
            self.spoke = True
            self.metrics.first_token(trio.current_time() - answer.begun)
        if not api.ends:
            self.note_choices(chunk)
        api.take(self, chunk, data, type)
        if type in api.ends:
            answer.finish()

    def note_choices(self, chunk: JSON) -> None:
        """Which choices have begun, and which have ended."""
        choices = chunk.get("choices")
        for n, choice in enumerate(choices if isinstance(choices, list) else ()):
            if isinstance(choice, dict):
                index = str(choice.get("index", n))
                ended = bool(choice.get("finish_reason"))  # "" is none: some send it each time
                self.choices[index] = ended or self.choices.get(index, False)

    def take_whole(self, text: str) -> None:
        """A body that is not a stream. Raises Problem."""
        api, stream = self.api, self.answer.question.stream
        try:
            whole = from_json(text)
        except ValueError:
            raise upstream_problem("the upstream sent what is not JSON") from None
        if is_error(whole) or not isinstance(whole, dict) or api.says not in whole:
            raise reason_given(502, whole, self.secrets)
        if whole[api.says] == [] and stream and not api.ends:
            raise upstream_problem("the upstream ended without an answer", code="cut")
        try:
            events = [*api.split(whole)] if stream else [api.keep(whole)] if api.keep else []
        except (TypeError, AttributeError, ValueError, LookupError):
            raise upstream_problem("the upstream's answer has a shape that nobody knows") from None
        self.metrics.first_token(trio.current_time() - self.answer.begun)
        for event in events:
            api.take(self, event, to_json(event), event["type"] if api.ends else "message")
        if not events:
            self.write(text)
        self.answer.finish()

    def end(self, done: bool = False) -> None:
        """The upstream says that it is done, or its body has ended. Raises Problem if cut."""
        if self.answer.closed:
            return
        if not self.began:
            raise upstream_problem("the upstream ended without an answer", code="cut")
        if not (done or (self.choices and all(self.choices.values()))):
            raise upstream_problem("the upstream stopped in mid-answer", code="cut")
        self.answer.finish()

    def write(self, data: str, type: str = "message") -> None:
        """Append what the model says. Raises Problem if it is too much to keep."""
        self.answer.append(data, type)
        if not self.answer.affordable or self.answer.size > ANSWER_BYTES:
            raise upstream_problem("the answer is too large to keep", code="too_large")


def take_as_is(relay: Relay, chunk: JSON, data: str, type: str) -> None:
    relay.write(data, type)


def split_chat(whole: JSON) -> Iterator[JSON]:
    """A whole completion as one chunk; the end follows by itself."""
    choices = []
    for choice in whole["choices"]:
        delta = {**(choice.get("message") or {})}
        if calls := delta.get("tool_calls"):
            delta["tool_calls"] = [{"index": n, **call} for n, call in enumerate(calls)]
        choices.append({**choice, "delta": delta})
        choices[-1].pop("message", None)
    yield {**whole, "object": "chat.completion.chunk", "choices": choices}


def ask_for_page(api: Api, body: JsonBody, headers: dict[str, str]) -> Question:
    """{messages} is all that the chat page's protocol knows, and perhaps a model."""
    asked = {"messages": body.parse()["messages"], "stream": True}
    if body.model:
        asked["model"] = body.model
    return Question(api, to_json(asked).encode(), True, body.model, headers)


def take_for_page(relay: Relay, chunk: JSON, data: str, type: str) -> None:
    """Text, reasoning, and an end that is not an ordinary one, each as an event."""
    choices = chunk.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return
    delta, finish = choice.get("delta"), choice.get("finish_reason")
    if isinstance(delta, dict):
        if text := text_of(delta.get("content") or delta.get("refusal")):
            relay.write(to_json({"content": text}))
        if text := text_of(delta.get("reasoning_content") or delta.get("reasoning")):
            relay.write(to_json({"content": "", "reasoning": text}))
    if isinstance(finish, str) and finish not in ("stop", ""):
        relay.write(to_json({"content": "", "finish_reason": finish}))


def text_of(content: Any) -> str:
    """Text, also as a list of parts."""
    if isinstance(content, list):
        parts = (part.get("text") if isinstance(part, dict) else part for part in content)
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""


# ── responses ──
# Whatever the upstream sends, a response can be retrieved: its first event settles its id,
# its numbers only grow, and an event that ends it has it.

RESPONSE_ENDS = frozenset(f"response.{end}" for end in ("completed", "incomplete", "failed"))
RESPONSE_STATES = RESPONSE_ENDS | {"response.created", "response.queued", "response.in_progress"}


def ask_for_response(api: Api, body: JsonBody, headers: dict[str, str]) -> Question:
    """`background` is ours: a log needs nobody there, and upstreams seldom know it.

    So that there is something to poll, the upstream is then asked for a stream.
    """
    background = body.fields.get("background") is True
    polled = background and body.fields.get("stream") is not True
    previous = body.fields.get("previous_response_id") or ""
    if "background" in body.fields:
        body.changes["background"] = None
    if polled:
        body.changes["stream"] = True
    if ours := re.fullmatch(r"(.+)\.[0-9a-f]{32}", previous):
        body.changes["previous_response_id"] = ours[1]
    question = ask_as_is(api, body, headers)
    question.stream |= polled
    question.background, question.polled, question.previous = background, polled, previous
    return question


def take_response(relay: Relay, chunk: JSON, data: str, kind: str) -> None:
    """As it came, but for our id, and a sequence_number where there is none of use."""
    response, number = chunk.get("response"), chunk.get("sequence_number")
    relay.response_id = relay.response_id or response_id(relay.answer, response)
    changes: JSON = {"response_id": relay.response_id} if "response_id" in chunk else {}
    if isinstance(response, dict):
        changes["response"] = renamed = {**response, "id": relay.response_id}
        if previous := relay.answer.question.previous:
            renamed["previous_response_id"] = previous
        if response.get("error"):
            failure = reason_given(502, {"error": response["error"]}, relay.secrets).error
            code = failure["code"] or "server_error"
            renamed["error"] = {"code": code, "message": failure["message"]}
    elif kind in RESPONSE_ENDS:
        raise upstream_problem("the upstream ended without a response", code="cut")
    if type(number) is not int or not relay.sequence < number < 10**14:
        number = changes["sequence_number"] = relay.sequence + 1
    relay.sequence = number
    relay.write(to_json(chunk | changes) if changes else data, kind)


def response_id(answer: Answer, response: Any) -> str:
    """The upstream's, with our secret: it cannot be guessed, and it cannot be repeated."""
    id = response.get("id") if isinstance(response, dict) else None
    return f"{id if id and isinstance(id, str | int) else 'resp_0'}.{answer.name}"


def keep_response(whole: JSON) -> JSON:
    """As the last event of a stream, so that it can be retrieved like one."""
    end = f"response.{whole.get('status') or 'completed'}"
    return {"type": end if end in RESPONSE_ENDS else "response.incomplete", "response": whole}


def response_events(
    whole: JSON, cut: Callable[[str], list[str]] = lambda text: [text]
) -> Iterator[JSON]:
    """The events of a stream that ends in this response; `cut` makes deltas of a text."""
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    for n, item in enumerate(whole["output"]):
        content = item.get("content") if item.get("type") == "message" else None
        empty = {**item, "status": "in_progress"} | ({"content": []} if content else {})
        yield {"type": "response.output_item.added", "output_index": n, "item": empty}
        for m, part in enumerate(content or ()):
            at = {"item_id": item.get("id"), "output_index": n, "content_index": m}
            text = part.get("text")
            first = {**part, "text": ""} if text else part
            yield {"type": "response.content_part.added", **at, "part": first}
            for delta in cut(text) if text else ():
                yield {"type": "response.output_text.delta", **at, "delta": delta, "logprobs": []}
            if text:
                yield {"type": "response.output_text.done", **at, "text": text, "logprobs": []}
            yield {"type": "response.content_part.done", **at, "part": part}
        yield {"type": "response.output_item.done", "output_index": n, "item": item}
    yield keep_response(whole)


def response_now(answer: Answer, end: float = inf) -> JSON:
    """A response as it stands: the last one named, with the items that are done.

    Or as it stood when its log had that end.
    """
    items: list[Any] = []
    found: JSON = {}
    for _, event in answer.backwards(RESPONSE_STATES | {"response.output_item.done"}, end):
        if event.type == "response.output_item.done":
            item = from_json(event.data).get("item")
            items += [item] if isinstance(item, dict) else []
        else:
            response = from_json(event.data).get("response")
            found = found or (response if isinstance(response, dict) else {})
            if found and (event.type not in RESPONSE_ENDS or found.get("output")):
                break  # some end with none: then it is in the items before
    unnamed: JSON = {
        "id": response_id(answer, None), "object": "response", "created_at": int(time.time()),
        "status": "in_progress", "model": answer.question.model, "parallel_tool_calls": True,
        "tools": [], "tool_choice": "auto",
    }  # fmt: skip
    return (found or unnamed) | {"output": items[::-1] or found.get("output") or []}


@contextlib.contextmanager
def not_too_deep() -> Iterator[None]:
    """Raises Problem where an item, as deep as Python can just read, stands a level deeper."""
    try:
        yield
    except (ValueError, RecursionError):
        raise upstream_problem("this response is nested too deeply to be shown") from None


def show_response(answer: Answer, end: float = inf) -> str:
    with not_too_deep():
        return to_json(response_now(answer, end))


def fail_response(answer: Answer, problem: Problem, number: int) -> Event:
    """The end of a response after an error, with the status that retrieve tells."""
    status = "cancelled" if problem.type == "stopped" else "failed"
    error = {"code": "server_error", "message": str(problem)}
    response = {**response_now(answer), "status": status, "error": error}
    last = {"type": "response.failed", "sequence_number": number, "response": response}
    return Event(to_json(last), "response.failed")


def sequence_of(answer: Answer, place: int) -> int:
    """An event's sequence_number, or its place where it has none."""
    with contextlib.suppress(ValueError, LookupError, TypeError):
        return int(from_json(answer[place].data)["sequence_number"])
    return place


def place_of_sequence(answer: Answer, number: int) -> int:
    """The place of the first event after this sequence_number. They only grow."""
    places, key = range(answer.start, answer.end), functools.partial(sequence_of, answer)
    return answer.start + bisect.bisect_right(places, number, key=key)


def split_message(whole: JSON) -> Iterator[JSON]:
    """Each block with one delta for what a client puts together of deltas."""
    yield {"type": "message_start", "message": {**whole, "content": [], "stop_reason": None}}
    for n, block in enumerate(whole["content"]):
        grows = [name for name in ("text", "thinking", "signature") if name in block]
        deltas = [{"type": f"{name}_delta", name: block[name]} for name in grows]
        begun = {**block, **dict.fromkeys(grows, "")}
        if "input" in block:  # a tool's
            deltas = [{"type": "input_json_delta", "partial_json": to_json(block["input"])}]
            begun["input"] = {}
        yield {"type": "content_block_start", "index": n, "content_block": begun}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": n, "delta": delta}
        yield {"type": "content_block_stop", "index": n}
    end = {name: whole.get(name) for name in ("stop_reason", "stop_sequence")}
    yield {"type": "message_delta", "delta": end, "usage": whole.get("usage") or {}}
    yield {"type": "message_stop"}


@dataclasses.dataclass(frozen=True)
class Api:
    """One protocol: all that differs from the others."""

    path: str  # below the base URL of the upstream
    says: str  # the field of a whole answer that has what it says
    split: Callable[[JSON], Iterable[JSON]]  # JSON where a stream was wanted
    take: Callable[[Relay, JSON, str, str], None] = take_as_is  # an event
    ask: Callable[[Api, JsonBody, dict[str, str]], Question] = ask_as_is
    keep: Callable[[JSON], JSON] | None = None  # a whole answer; else as it came
    whole: Callable[[Answer], str] = lambda answer: answer[answer.start].data
    fail: Callable[[Answer, Problem, int], Event] | None = None  # after the error
    ends: frozenset[str] = frozenset()  # names of its last events; without any, [DONE] ends it
    error_has: tuple[str, ...] = ()  # empty texts
    has_messages: bool = False

    def closing(self, answer: Answer, problem: Problem | None) -> list[Event]:
        """Our last events: the end, or an error in the one form that makes every SDK raise."""
        if problem is None:
            return [] if self.ends else [Event("[DONE]")]
        number = sequence_of(answer, answer.end - 1) + 1 if answer.end > answer.start else 0
        error = {
            "type": "error", "sequence_number": number, **dict.fromkeys(self.error_has, ""),
            "error": {**problem.error, "type": problem.type},
        }  # fmt: skip
        last = [Event(to_json(error), "error")]
        if self.fail:
            # An item may be nested as deep as Python could just read it: not two levels deeper.
            with contextlib.suppress(ValueError, RecursionError):
                last.append(self.fail(answer, problem, number + 1))
        return last


CHAT = Api("/chat/completions", "choices", split_chat, has_messages=True)
CHAT_PAGE = dataclasses.replace(CHAT, take=take_for_page, ask=ask_for_page, error_has=("content",))
COMPLETIONS = Api("/completions", "choices", lambda whole: [whole])
RESPONSES = Api("/responses", "output", response_events, take_response, ask_for_response,
                keep_response, show_response, fail_response, RESPONSE_ENDS)  # fmt: skip
MESSAGES = Api("/messages", "content", split_message, ends=frozenset({"message_stop"}),
               has_messages=True)  # fmt: skip
APIS = (CHAT_PAGE, CHAT, COMPLETIONS, RESPONSES, MESSAGES)


# ─── The upstream ────────────────────────────────────────────────────────────────────
# Asked by h11's client side on wires of our own. There is one way to read a body: plain or
# TLS, chunked or not.

CONNECT_TIMEOUT = 5
# Before the upstream's own limit, often 5 s: fewer questions meet its goodbye.
IDLE_WIRES, IDLE_WIRE_KEPT = 100, 3
MODELS_TIMEOUT, MODELS_KEPT = 10, 10
VANISHED_TIMEOUT = 30  # seconds without TCP acknowledgement: its network is gone
PLAIN_BYTES = 32 * KiB  # at once, of a body that is compressed
READ_UNASKED = 32 * KiB  # what the system of any host takes, whatever its program does
INTAKE_REST = 0.001  # seconds, after a pass; epoll counts whole milliseconds
CREDENTIALS = ("authorization", "x-api-key", "api-key")
PASSED_TO = re.compile(
    "(openai|anthropic)-[a-z0-9-]+|http-referer|x-title|traceparent|tracestate|idempotency-key"
)
PASSED_BACK = re.compile(
    "retry-after|retry-after-ms|x-should-retry|(x-)?request-id|openai-.*|"
    "(x-|anthropic-)ratelimit-.*"
)
LIKE_A_STREAM = re.compile(rb"(\xef\xbb\xbf)?\s*(data|event|id|retry)?:")
NOT_JSON = re.compile(rb"(\xef\xbb\xbf)?+\s*+[^\s{\[]")
CODINGS = re.compile("gzip|deflate|compress|br|zstd")  # other names, such as "none", mean nothing
CUT = (trio.BrokenResourceError, OSError, h11.RemoteProtocolError)  # of an exchange
Headers = dict[str, str]


def passed_headers(request: Request, token: str) -> dict[str, str]:
    """What of a client's headers goes on to the upstream: never our own token."""
    passed = {k: v for k, v in request.headers.items() if PASSED_TO.fullmatch(k)}
    for name, secret in credentials(request).items():
        if not (token and same_secret(secret, token)):
            passed[name] = f"Bearer {secret}" if name == "authorization" else secret
    return {k: v for k, v in passed.items() if v.isascii() and v.isprintable()}


@dataclasses.dataclass(eq=False)
class Exchange:
    """One request to an upstream and its response. Raises what stands in CUT.

    h11 reads the head, and answers for the lengths in it. The body is read here (RFC 9112,
    sections 6.3 and 7.1), because a token is a chunk, and h11 makes several objects of one.
    Bytes are life: where there is patience, any of them moves the limit.
    """

    # A chunk's last line end is read with what follows it. begin() puts one before the first.
    SIZE = re.compile(rb"\r\n([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?\r\n")
    LAST = re.compile(rb"\r\n0+[ \t]*(?:;.*)?(?:\r\n[!#-'*+\-.0-9A-Z^-z|~]+:.*)*\r\n\r\n")

    wire: Wire
    limit: trio.CancelScope
    patience: float = 0  # seconds
    heard: bool = False  # a byte of the response
    status: int = 0
    headers: Headers = dataclasses.field(default_factory=dict)
    secrets: list[str] = dataclasses.field(default_factory=list)  # sent, and never to come back
    # The body
    room: float = WHOLE_BYTES  # for so much of it
    chunked: bool = False
    coded: bool = False
    unzip: Any = None
    left: int = 0  # bytes, of a chunk or of all
    rest: bytes = b""  # what waits for more, or follows the body
    ended: trio.Event = dataclasses.field(default_factory=trio.Event)  # well, or failed
    failed: Exception | None = None
    reusable: bool = False  # the connection, after a good end

    async def ask(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> None:
        """Send it, and read the head of the response."""
        self.secrets = [headers[n].removeprefix("Bearer ") for n in CREDENTIALS if n in headers]
        conn = h11.Connection(h11.CLIENT, max_incomplete_event_size=64 * KiB)
        request = h11.Request(method=method, target=target, headers=[*headers.items()])
        try:
            await self.wire.send(conn.send(request) + body)
        except trio.BrokenResourceError:
            if self.wire.stuck:
                raise
            # An upstream that refuses a long question may hang up before it is read.
        while not isinstance(head := conn.next_event(), h11.Response):
            if head is h11.NEED_DATA:
                conn.receive_data(self.hear(await self.wire.receive()))
        self.begin(head, conn.trailing_data[0])

    def begin(self, head: h11.Response, body: bytes) -> None:
        self.status, self.headers = head.status_code, fold_headers(head.headers)
        if self.status not in (204, 304):
            self.chunked = "transfer-encoding" in self.headers
            self.left = 0 if self.chunked else int(self.headers.get("content-length", sys.maxsize))
        self.coded = bool(CODINGS.search(self.headers.get("content-encoding", "").lower()))
        self.rest = b"\r\n" + body if self.chunked else body
        if not (self.chunked or self.left):
            self.ended.set()
        close = "close" in self.headers.get("connection", "").lower()
        self.reusable = head.http_version > b"1.0" and not close

    def hear(self, data: bytes) -> bytes:
        self.heard = self.heard or bool(data)
        late = trio.current_time() + self.patience
        if late > self.limit.deadline + min(1, self.patience / 10):  # moving it costs
            self.limit.deadline = late
        return data

    def read_now(self, take: Callable[[bytes], None]) -> None:
        """What has come of the body. Raises nothing, because the intake serves everyone."""
        try:
            data = None if self.ended.is_set() else self.wire.receive_now()
            if data:
                self.feed(self.hear(data), take)
            elif data is not None:  # the connection has ended
                if self.chunked or "content-length" in self.headers:
                    raise h11.RemoteProtocolError("the body is cut")
                self.reusable = False
                self.ended.set()
        except Exception as error:
            self.failed = error
            self.ended.set()

    def feed(self, data: bytes, take: Callable[[bytes], None]) -> None:
        """`take` gets what these bytes carry, also where this raises because they go wrong."""
        data, at, size = self.rest + data, self.left, None
        pieces = [data[:at]]
        while self.chunked and (size := self.SIZE.match(data, at)) and (more := int(size[1], 16)):
            at = size.end() + more
            pieces.append(data[size.end() : at])
        self.left, self.rest = max(0, at - len(data)), data[at:]
        if payload := b"".join(pieces):
            take(payload if self.coded else self.count(payload))
        last = self.LAST.match(self.rest) if size else None
        whole = b"\r\n\r\n" if size else b"\r\n"  # if it is there, more bytes will not help
        if last or not (self.chunked or self.left):
            self.rest = self.rest[last.end() :] if last else self.rest
            self.ended.set()
        elif whole in self.rest[2:] or len(self.rest) > HEAD_BYTES:
            raise h11.RemoteProtocolError("the framing of the body is broken")

    def count(self, data: bytes) -> bytes:
        self.room -= len(data)
        if self.room < 0:
            raise upstream_problem(f"the upstream sent more than {WHOLE_BYTES / MiB:g} MiB")
        return data

    def decode(self, data: bytes) -> Iterator[bytes]:
        """gzip, though we ask for none, also in several members (RFC 1952, section 2.2)."""
        plain = b""
        try:
            while data or len(plain) == PLAIN_BYTES:  # then there may be more inside
                if self.unzip is None or self.unzip.eof:
                    self.unzip = zlib.decompressobj(zlib.MAX_WBITS | 32)
                plain = self.unzip.decompress(data, PLAIN_BYTES)
                data = self.unzip.unconsumed_tail or self.unzip.unused_data
                yield self.count(plain)
        except zlib.error:
            raise upstream_problem("the upstream compresses, and not by gzip") from None

    def passed_back(self) -> Headers:
        """What of its headers goes on to the client."""
        return {
            name: hide(value, self.secrets)
            for name, value in self.headers.items()
            if PASSED_BACK.fullmatch(name) and value.isascii() and value.isprintable()
        }


class Intake:
    """The pump's counterpart: one task reads from all upstreams that have news.

    To wake up for each token costs more than the token. So it rests for a moment after a
    pass, and the next one finds many. A token that comes alone, after the rest, waits for
    nobody. Linux's epoll is itself a file that can be waited for, so Trio waits for this one
    only. Where there is none, each upstream has a task that reads it.
    """

    def __init__(self, pump: Pump) -> None:
        self.pump = pump
        epoll = getattr(select, "epoll", None)
        self._epoll = epoll() if epoll else None
        self._reads: dict[int, Callable[[], None]] = {}  # by file descriptor

    async def run(self) -> None:
        while self._epoll:
            while not (ready := self._epoll.poll(0)):
                await trio.lowlevel.wait_readable(self._epoll.fileno())
            while ready:
                self.pump.at_once(functools.partial(self._read_some, ready))
                if ready:
                    await trio.lowlevel.checkpoint()
            await trio.sleep(INTAKE_REST)

    def _read_some(self, ready: list[tuple[int, int]]) -> None:
        turn = Turn()
        while ready and turn.total() < TURN:
            fd, _ = ready.pop()
            if read_now := self._reads.get(fd):  # still
                read_now()

    async def read(self, exchange: Exchange, take: Callable[[bytes], None]) -> None:
        """A body, to its end. Raises what `take` and the exchange raise."""
        fd, coded = exchange.wire.socket.fileno(), bytearray()
        hear = coded.extend if exchange.coded else take
        exchange.feed(b"", hear)  # what came with the head
        if self._epoll and not (exchange.coded or exchange.ended.is_set()):
            self._reads[fd] = functools.partial(exchange.read_now, take)
            self._epoll.register(fd, select.EPOLLIN)
            try:
                await exchange.ended.wait()
            finally:
                self._epoll.unregister(fd)
                del self._reads[fd]
        while coded or not exchange.ended.is_set():
            if not coded:
                await trio.lowlevel.wait_readable(fd)
                exchange.read_now(hear)
            for plain in exchange.decode(bytes(coded)):  # a few bytes may be thousands of events
                take(plain)
                await trio.lowlevel.checkpoint()
            coded.clear()
        if exchange.failed:
            raise exchange.failed


@dataclasses.dataclass
class ModelList:
    """The upstream's models, as everyone with the same key is shown them."""

    lock: trio.Lock = dataclasses.field(default_factory=trio.Lock)
    reply: Reply | Problem = dataclasses.field(init=False)
    fresh_until: float = -inf


class Upstream(Model):
    """A server that speaks OpenAI's protocols, or Anthropic's."""

    def __init__(self, settings: Settings, answers: Answers, metrics: Metrics) -> None:
        self.settings = settings
        self.answers = answers
        self.metrics = metrics
        # Where it is
        self.url = urlsplit(settings.upstream)
        self.tls = ssl.create_default_context() if self.url.scheme == "https" else None
        self.proxy = urlsplit(settings.proxy) if settings.proxy else None
        self.proxy_login: Headers = {}
        if self.proxy and self.proxy.username:
            pair = f"{unquote(self.proxy.username)}:{unquote(self.proxy.password or '')}"
            login = base64.b64encode(pair.encode()).decode()
            self.proxy_login["proxy-authorization"] = f"Basic {login}"
        # A proxy for plain HTTP is asked for the whole URL (RFC 9112, section 3.2.2).
        whole = self.proxy and not self.tls
        self.base = settings.upstream.partition("?")[0] if whole else self.url.path
        self.query = f"?{self.url.query}" if self.url.query else ""
        # What goes on
        self.intake = Intake(answers.pump)
        self.idle: list[tuple[Wire, float]] = []  # kept, and since when
        self.lists: dict[str, ModelList] = {}  # by key

    async def run(self) -> None:
        await self.intake.run()

    # ── answers ──

    def choose(self, model: str) -> str:
        """The model to ask; "" stands for the upstream's first. Raises Problem 404."""
        pinned = self.settings.model
        if pinned and model and model not in pinned:
            raise model_not_found(model, pinned)
        return model or (pinned[0] if pinned else "")

    async def write(self, answer: Answer) -> None:
        question = answer.question
        if not question.model:
            first = await self.first_model(question.headers)
            async with self.answers.parsing(question.body):
                body = JsonBody(question.body)  # now: its objects would take memory meanwhile
                body.choose(first)
                question.model = body.model
                self.answers.replace_question(answer, body.raw())
                del body  # which may be long, and the answer takes its time
        async with self.asking(question.api.path, question.headers, question.body) as exchange:
            self.answers.drop_question(answer)
            await self.relay(answer, exchange)

    async def relay(self, answer: Answer, exchange: Exchange) -> None:
        """Everything that a willing upstream says. Its first bytes tell what it is."""
        question, answer.headers = answer.question, exchange.passed_back()
        relay, parser = Relay(answer, self.metrics, exchange.secrets), SSEParser(EVENT_BYTES)
        named = exchange.headers.get("content-type", "")
        kind = named.partition(";")[0].strip().lower()
        begins = NOT_JSON if kind == "text/event-stream" else LIKE_A_STREAM
        if question.stream == (begins is NOT_JSON) and not question.polled:
            answer.accepted.set()  # a polled one is answered when its response has a name
        first, streams = bytearray(), False

        def take(data: bytes) -> None:
            nonlocal streams
            if not streams:
                first.extend(data if first else data.lstrip())
                if not begins.match(first):
                    return
                if not question.stream:
                    raise upstream_problem("the upstream sent a stream where none was asked for")
                streams, data, exchange.room = True, bytes(first), inf
            for event in parser.feed(data):
                relay.take(event)
            if answer.closed and exchange.patience:  # read on, so that the connection is kept
                exchange.patience, exchange.limit.deadline = 0, trio.current_time() + 1

        try:
            await self.intake.read(exchange, take)
        except ValueError as error:
            raise upstream_problem(f"the upstream sent {error}") from None
        if answer.closed:  # stopped at the very moment when the last byte came
            return
        if streams or not first.strip():
            for event in parser.unfinished():
                relay.take(event)
            relay.end()
        elif kind == "text/html" or (kind != "application/json" and NOT_JSON.match(first)):
            shown = clean_words(named, exchange.secrets) or "nothing"
            raise upstream_problem(f"the upstream sent {shown!r}, not an answer")
        else:
            relay.take_whole(first.decode("utf-8-sig", errors="replace"))

    # ── short requests ──

    async def short(self, path: str, headers: Headers, body: bytes = b"") -> Reply:
        """A request that is answered at once, and its answer as it came."""
        read = bytearray()
        async with self.asking(path, headers, body) as exchange:
            await self.intake.read(exchange, read.extend)
        return Reply(read.decode(errors="replace"), exchange.passed_back())

    async def models(self, headers: Headers, query: str = "") -> Reply:
        """The list of models: the pinned ones, or the upstream's as it came.

        It is asked once for everyone with the same key, and kept for a moment; a failure is
        told to those who wait for it.
        """
        if self.settings.model:
            return list_models(self.settings.model)
        path = f"/models?{query}" if query else "/models"  # a list may have pages
        began, key = trio.current_time(), to_json([path, *map(headers.get, CREDENTIALS)])
        shown = self.lists.setdefault(key, ModelList())
        if len(self.lists) > 32:
            del self.lists[next(iter(self.lists))]
        async with shown.lock:
            if shown.fresh_until < began:
                try:
                    shown.reply, kept = await self.short(path, headers), MODELS_KEPT
                except Problem as problem:
                    shown.reply, kept = problem, 0
                shown.fresh_until = trio.current_time() + kept
        if isinstance(shown.reply, Problem):
            raise shown.reply.with_traceback(None)
        return shown.reply

    async def model(self, name: str, headers: Headers) -> Reply:
        if ".." in name.split("/"):  # it would lead elsewhere, with the server's key
            raise Problem(404, "no model is called so", code="model_not_found", param="model")
        if not self.settings.model:
            return await self.short(f"/models/{quote(name)}", headers)
        return Reply(to_json(model_object(self.choose(name))))

    async def first_model(self, headers: Headers) -> str:
        """The model to ask, where nobody named one."""
        try:
            return str(from_json((await self.models(headers)).body)["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            name_one = "the upstream lists no model: name one with --model"
            raise upstream_problem(name_one) from None

    # ── requests and connections ──

    @contextlib.asynccontextmanager
    async def asking(self, path: str, passed: Headers, body: bytes) -> AsyncIterator[Exchange]:
        """Ask, and have a response that is a 2xx. Raises Problem, whatever goes wrong."""
        method, patience = ("POST", self.settings.patience) if body else ("GET", MODELS_TIMEOUT)
        begun = False
        try:
            with trio.fail_after(patience) as limit, contextlib.ExitStack() as stack:
                headers = self.headers(path, passed, body)
                query = self.query.replace("?", "&") if "?" in path else self.query
                # A question that meets the goodbye of a kept connection, with not one byte of a
                # response, is asked once more on a fresh one, as curl and browsers do.
                for kept in (self.kept_wire(), None):
                    wire = kept or await self.connect()
                    unread = 0 if len(body) > READ_UNASKED else VANISHED_TIMEOUT
                    watch_for_life(wire.socket, VANISHED_TIMEOUT, unread)
                    exchange = Exchange(wire, limit, patience if body else 0)
                    try:
                        await exchange.ask(method, self.base + path + query, headers, body)
                        break
                    except BaseException as error:
                        wire.close()
                        if kept is None or exchange.heard or not isinstance(error, CUT):
                            raise
                stack.callback(self.release, exchange)
                if exchange.status // 100 != 2:
                    raise await self.refusal(exchange)
                begun = True
                del body  # it may be long, and the answer takes its time
                yield exchange
            return
        except Problem as error:
            problem = error.with_traceback(None)
        except trio.TooSlowError:
            silent = f"the upstream said nothing for {patience:g} s"
            problem = upstream_problem(silent, 504, "timeout")
        except CUT:
            broke = "the connection to the upstream broke in mid-answer"
            problem = upstream_problem(broke, code="connection_cut")
        if begun:  # an SDK would ask again, twice, and pay for it
            problem.headers["x-should-retry"] = "false"
        raise problem

    def headers(self, path: str, passed: Headers, body: bytes) -> Headers:
        """The server's key, if it has one, goes in place of the client's."""
        key = self.settings.api_key
        headers = {k: v for k, v in passed.items() if not (key and k in CREDENTIALS)}
        headers |= {"host": self.url.netloc, "user-agent": "chatstream", "accept": "*/*"}
        headers["accept-encoding"] = "identity"  # nothing between us and the next token
        if body:
            headers |= {"content-type": "application/json", "content-length": str(len(body))}
        if not self.tls:
            headers |= self.proxy_login
        if key:
            headers["authorization"] = f"Bearer {key}"
        if key and path.startswith("/messages"):
            headers["x-api-key"] = key
        if key and self.query:  # Azure's way
            headers["api-key"] = key
        return headers

    async def refusal(self, exchange: Exchange) -> Problem:
        """The upstream's status is the client's, if it says no and says it clearly."""
        status = exchange.status
        if status in (401, 403) and self.settings.api_key:
            refused = "the upstream refuses the server's key: its operator must look"
            return upstream_problem(refused, code="server_key_refused")
        if status // 100 == 3:
            return upstream_problem("the upstream redirects, and the key goes nowhere else")
        body, exchange.room = bytearray(), WORDS_BYTES
        with contextlib.suppress(Problem, *CUT), trio.move_on_after(5):
            await self.intake.read(exchange, body.extend)
        text = body.decode("utf-8-sig", errors="replace")
        try:
            said = from_json(text)
        except ValueError:
            said = text
        status = status if 400 <= status < 600 else 502
        problem = reason_given(status, said, exchange.secrets)
        problem.headers = exchange.passed_back()
        return problem

    def release(self, exchange: Exchange) -> None:
        """Keep the connection for the next question, or tell the model to stop."""
        clean = exchange.ended.is_set() and not (exchange.failed or exchange.rest)
        if clean and exchange.reusable and len(self.idle) < IDLE_WIRES:
            self.idle.append((exchange.wire, trio.current_time()))
        else:
            exchange.wire.close()

    def kept_wire(self) -> Wire | None:
        """The last one kept, if it has not said goodbye. Those that are too old are closed."""
        while self.idle and self.idle[0][1] <= trio.current_time() - IDLE_WIRE_KEPT:
            self.idle.pop(0)[0].close()
        while self.idle:
            wire, _ = self.idle.pop()
            with contextlib.suppress(*CUT):
                if wire.receive_now() is None:
                    return wire
            wire.close()
        return None

    async def connect(self) -> Wire:
        """Tried again: nothing can have been sent yet. Raises Problem."""
        with trio.move_on_after(CONNECT_TIMEOUT):
            for tries_left in (2, 1, 0):
                try:
                    return await self.connect_once()
                except CUT as error:
                    if not tries_left:
                        way = " by way of its proxy" if self.proxy else ""
                        reason = f"the upstream cannot be reached{way}: {unreachable(error)}"
                        raise upstream_problem(reason) from None
                await trio.sleep(0.2)
        raise upstream_problem("the upstream could not be reached in time", 504, "timeout")

    async def connect_once(self) -> Wire:
        to = self.proxy or self.url
        port = to.port or (443 if to.scheme == "https" else 80)
        stream = await trio.open_tcp_stream(to.hostname or "", port)
        sock = socket.socket(fileno=stream.socket.detach())
        sock.setblocking(False)
        wire = Wire(sock, patience=self.settings.patience)
        try:
            if tls := self.tls:
                if self.proxy:
                    await self.tunnel(wire)
                host = self.url.hostname
                sock = tls.wrap_socket(sock, do_handshake_on_connect=False, server_hostname=host)
                wire = Wire(sock, patience=self.settings.patience)
                await shake_tls(sock)
        except BaseException:
            wire.close()
            raise
        return wire

    async def tunnel(self, wire: Wire) -> None:
        """CONNECT (RFC 9110, section 9.3.6): what follows is between us and the host."""
        target = self.url.netloc if self.url.port else f"{self.url.netloc}:443"
        exchange = Exchange(wire, trio.CancelScope())
        with contextlib.suppress(*CUT):
            await exchange.ask("CONNECT", target, {"host": target, **self.proxy_login}, b"")
        if exchange.status // 100 != 2:
            said = exchange.status or "what is not HTTP"
            raise upstream_problem(f"the proxy to the upstream answered {said}")


def unreachable(error: BaseException) -> str:
    """Why, in the words of the system or of TLS; none of them quotes a request."""
    reason = error.__cause__ or error
    while isinstance(reason, BaseExceptionGroup):  # one for each address
        reason = reason.exceptions[0]
    if isinstance(reason, ssl.SSLError | socket.gaierror):
        return str(reason.strerror)
    number = reason.errno if isinstance(reason, OSError) else None
    return os.strerror(number) if number else "no connection"


def watch_for_life(sock: socket.socket, silent: int, unread: int) -> None:
    """Let the system notice a peer whose network is gone, where it can (tcp(7)).

    It is given up after so many seconds: `silent`, or with something of ours `unread` (0: not
    for that). The latter also ends a peer that is there and reads less than a segment, which
    may have 64 KiB, in that time: at 4 KB/s, that takes 16 s. And an upstream that is busy,
    or still loading its model, may wait with a long question.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", silent // 3), ("TCP_KEEPINTVL", silent // 6),
        ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", unread * 1000),
        ("TCP_NODELAY", 1),
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
DEMO_WORD = re.compile(rf"\s*(?:[{CJK}]|[^\s{CJK}]+)")


def read_lessons(text: str) -> dict[str, list[str]]:
    """The words of each answer in a www/lessons.*.md, by its question.

    The text before the first `# heading` introduces each answer, the one below `# *`
    ends it, and each other heading is a question with its lesson.
    """
    introduction, *parts = re.split(r"(?m)^# +(.+)\n", text)
    lessons = dict(zip(parts[::2], parts[1::2], strict=True)) or {"": ""}
    ending = lessons.pop("*", "")
    return {q: DEMO_WORD.findall(introduction + said + ending) for q, said in lessons.items()}


class Demo(Model):
    """The embedded model: needs no key and no network, and says that it is a demo.

    The same prompt gets the same text, word by word, Chinese character by character.
    """

    PACE = 0.04  # seconds a word

    def __init__(self, settings: Settings, answers: Answers, metrics: Metrics) -> None:
        self.answers = answers
        self.metrics = metrics
        www = www_folder()
        files = [www / f"lessons.{language}.md" for language in ("en", "zh")] if www else []
        texts = [file.read_text("utf-8") for file in files] or ["A demo."] * 2
        self.lessons = [*map(read_lessons, texts)]  # shared by all answers
        self.speaking: dict[Relay, Iterator[JSON]] = {}

    def prepare(self, question: Question, fields: JSON) -> None:
        if question.api in (COMPLETIONS, MESSAGES):
            raise self.only_chats()
        make = demo_response if question.api is RESPONSES else demo_chat
        with_usage = bool((fields.get("stream_options") or {}).get("include_usage"))
        question.prepared = make(self.words(fields), len(question.body) // 4, with_usage)

    def only_chats(self) -> Problem:
        only = "the demo model speaks chat completions and responses: for the rest, "
        return Problem(404, only + "start the server with --upstream", code="not_found")

    def choose(self, model: str) -> str:
        return model or "demo"

    async def models(self, headers: dict[str, str], query: str = "") -> Reply:
        return list_models(["demo"])

    async def model(self, name: str, headers: dict[str, str]) -> Reply:
        if name != "demo":
            raise model_not_found(name, ["demo"])
        return Reply(to_json(model_object(name)))

    async def short(self, path: str, headers: dict[str, str], body: bytes) -> Reply:
        raise self.only_chats()

    def words(self, asked: JSON) -> list[str]:
        """Its answer to the last question of a body."""
        said = asked.get("messages") or asked.get("input") or ""
        if isinstance(said, list):
            users = [m for m in said if isinstance(m, dict) and m.get("role") == "user"]
            said = users[-1].get("content") if users else ""
        question = text_of(said)[:300]
        lessons = self.lessons[bool(re.search(f"[{CJK}]", question))]
        return lessons[difflib.get_close_matches(question, lessons, n=1, cutoff=0)[0]]

    async def run(self) -> None:
        """A word of every answer at each step: a timer for each would cost twice the word."""
        while True:
            await trio.sleep(self.PACE)
            turn = Turn()
            for relay, events in list(self.speaking.items()):
                try:
                    if event := next(events, None):
                        relay.take(Event(to_json(event)))
                    else:
                        relay.end()
                except Problem as problem:
                    relay.answer.finish(problem)
                await turn.pause()

    async def write(self, answer: Answer) -> None:
        """Events like those of OpenAI's streams, because clients are tried on them."""
        events, answer.question.prepared = answer.question.prepared, None
        self.answers.drop_question(answer)
        if not answer.question.polled:  # then its first event has to name it
            answer.accepted.set()
        relay, whole = Relay(answer, self.metrics), next(events)
        if not answer.question.stream:
            await trio.sleep(self.PACE)
            return relay.take_whole(to_json(whole))
        self.speaking[relay] = events  # made one by one: all would take more than the log
        try:
            await answer.ended.wait()
        finally:
            del self.speaking[relay]


def demo_usage(names: str, words: list[str], prompt: int) -> JSON:
    return dict(zip(names.split(), (prompt, len(words), prompt + len(words)), strict=True))


def demo_chat(words: list[str], prompt: int, with_usage: bool) -> Iterator[JSON]:
    """A whole chat completion; then its chunks."""
    base = {"id": f"chatcmpl-{secrets.token_hex(8)}", "object": "chat.completion.chunk",
            "created": int(time.time()), "model": "demo"}  # fmt: skip
    usage = demo_usage("prompt_tokens completion_tokens total_tokens", words, prompt)
    message = {"role": "assistant", "content": "".join(words)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    yield {**base, "object": "chat.completion", "choices": [choice], "usage": usage}
    deltas = ({"content": word} for word in words)
    for delta in itertools.chain([{"role": "assistant", "content": ""}], deltas, [{}]):
        choice = {"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}
        yield {**base, "choices": [choice]}
    if with_usage:
        yield {**base, "choices": [], "usage": usage}


def demo_response(words: list[str], prompt: int, with_usage: bool) -> Iterator[JSON]:
    """A whole response; then the events of its stream."""
    part = {"type": "output_text", "text": "".join(words), "annotations": []}
    item = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant",
            "status": "completed", "content": [part]}  # fmt: skip
    usage = demo_usage("input_tokens output_tokens total_tokens", words, prompt)
    usage |= {"input_tokens_details": {"cached_tokens": 0},
              "output_tokens_details": {"reasoning_tokens": 0}}  # fmt: skip
    whole = {
        "id": f"resp_{secrets.token_hex(12)}", "object": "response",
        "created_at": int(time.time()), "status": "completed", "model": "demo",
        "output": [item], "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
        "error": None, "incomplete_details": None, "instructions": None,
        "metadata": {}, "temperature": 1.0, "top_p": 1.0, "usage": usage,
    }  # fmt: skip
    yield whole
    yield from response_events(whole, lambda text: words)


# ─── HTTP/2 ──────────────────────────────────────────────────────────────────────────
# Hypercorn speaks it, on our wire. To our handlers, a stream is what a connection is over
# HTTP/1. It has a task and a window of its own. The pump writes an event into each window,
# and so makes a TLS record and a write of it for each reader, as over HTTP/1.

HTTP2_STREAMS = 100
HTTP2_TABLE = 4 * KiB  # of headers that were sent before
HTTP2_BITE = KiB  # h2 takes 0.1 ms for a frame of 10 bytes, and does not pause
GOODBYE = 0.5  # seconds, for a client that may be stuck
IGNORED = (h2.events.PriorityUpdated, h2.events.ConnectionTerminated)  # see GoesOn


class Http2Stream:
    """One request over HTTP/2: Hypercorn tells it what comes, it tells h2 what goes out."""

    def __init__(self, protocol: Http2, number: int) -> None:
        self.protocol = protocol
        self.h2 = protocol.connection
        self.number = number
        self._unsent = b""  # what the window has not taken yet
        self.heard = self.answered = False  # all of the request, of the response
        self.gone = trio.Event()
        self.disconnected = self.gone.wait
        self._body_in, self._body = trio.open_memory_channel[bytes](10)

    async def handle(self, event: object) -> None:
        """From Hypercorn: a piece of the body, its end, or the end of the stream."""
        if isinstance(event, Body):
            answered = (trio.ClosedResourceError, trio.BrokenResourceError)  # already
            with contextlib.suppress(*answered):
                return await self._body_in.send(event.data)
        self.heard |= isinstance(event, EndBody)
        self._body_in.close()
        if isinstance(event, StreamClosed):
            self.gone.set()

    async def receive(self) -> bytes | None:
        async for piece in self._body:
            if piece:
                return piece
        return b"" if self.heard else None

    async def start(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        own = [(k.encode(), v.encode("latin-1", "replace")) for k, v in dated(headers)]
        self._body.close()  # what still comes of a refused one must not stop all reading
        self.h2.send_headers(self.number, [(b":status", b"%d" % status), *own])
        await self.protocol._flush()
        await self._write(body)

    async def respond(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        await self.start(status, headers, body)
        await self.end()

    async def end(self, last: bytes = b"") -> None:
        await self._write(last)
        self.h2.end_stream(self.number)
        self.answered = True
        await self.protocol._flush()

    def reader(self, log: EventLog, start: int) -> Reader:
        return Reader(log, self, SSE, start)

    @property
    def unsent(self) -> bool:
        return bool(self._unsent or self.protocol.wire.unsent)

    def write_now(self, data: bytes) -> None:
        """Write without waiting, if the window has space."""
        self._unsent = data
        with contextlib.suppress(trio.BrokenResourceError, h2.exceptions.ProtocolError):
            if self._space() >= len(data):
                self.h2.send_data(self.number, data)
                self._unsent = b""
                self.protocol.push()

    async def flush(self) -> None:
        await self._write(self._unsent)
        self._unsent = b""
        async with self.protocol.sending:
            await self.protocol.wire.flush()

    async def _write(self, data: bytes | memoryview) -> None:
        """Wait for the client's window, as long as the client takes anything."""
        data = memoryview(data)
        while data:
            since = trio.current_time()
            while (space := self._space()) <= 0:
                if self.h2.outbound_flow_control_window <= 0:  # other streams were faster
                    since = max(since, self.protocol.widened)
                with trio.move_on_at(since + STUCK_TIMEOUT) as patience:
                    await self.protocol.news.wait()
                if patience.cancelled_caught:
                    raise Stuck(f"it read nothing for {STUCK_TIMEOUT} s")
            self.h2.send_data(self.number, data[:space])
            data = data[space:]
            await self.protocol._flush()

    def _space(self) -> int:
        if self.gone.is_set():
            raise trio.BrokenResourceError("the client has left")
        window = self.h2.local_flow_control_window(self.number)
        return min(window, self.h2.max_outbound_frame_size, WRITE_BYTES)


class HeadDecoder(hpack.Decoder):
    """Refuses a head that hpack would work on for a second: a MiB of changes of its table's size.

    At most two may come before the first field (RFC 7541, section 4.2).
    """

    def decode(self, data: bytes, raw: bool = False) -> Iterable[hpack.HeaderTuple]:
        if len(data) > HEAD_BYTES or re.match(rb"(?s)([ ->]|\?[\x80-\xff]*.){3}", data):
            raise hpack.OversizedHeaderListError("this is not a head of at most 16 KiB")
        return super().decode(data, raw)


class GoesOn(H2ConnectionStateMachine):
    """After a client's GOAWAY, h2 sends nothing more. But the client still reads its streams."""

    def process_input(self, input_: ConnectionInputs) -> list[h2.events.Event]:
        return [] if input_ is ConnectionInputs.RECV_GOAWAY else super().process_input(input_)


class Http2(H2Protocol):
    """Hypercorn's HTTP/2, with streams of ours in place of its ASGI.

    Hypercorn 0.18 takes an attempt to send nothing for progress: with a window that
    stays shut, all of a log would go into its buffers. It raises KeyError for a body
    whose stream has ended, and ends all streams at a client's GOAWAY, which only
    promises no new ones (RFC 9113, section 6.8). And h2 4 ends the connection at the
    stream that is one too many, where RFC 9113, section 5.1.2, wants that one refused.
    """

    streams: dict[int, Http2Stream]  # type: ignore[assignment]

    def __init__(
        self, wire: Wire, handle: Callable[[Request], Awaitable[None]], tasks: trio.Nursery
    ) -> None:
        unused: Any = None  # an ASGI app, its tasks, and the state that it would share
        super().__init__(
            unused, Config(), WorkerContext(None), unused, unused, True, None, None, self.on_event
        )
        self.wire = wire
        self.handle_request = handle
        self.tasks = tasks
        self.said = b""  # by h2, and not yet written
        self.sending = trio.Lock()  # of those that wait for the socket
        self.news = trio.Event()  # from the client: there may be more room
        self.widened = -inf  # when the window of all streams was last
        self.patience = trio.CancelScope()
        self.patience.deadline = trio.current_time() + HEAD_TIMEOUT  # for a whole head

    async def on_event(self, event: object) -> None:
        if isinstance(event, Closed):
            raise trio.BrokenResourceError("the client has broken the rules of HTTP/2")

    def push(self) -> None:
        """Write what h2 has said, in its order, unless the socket is full."""
        self.said += self.connection.data_to_send()
        if self.said and not self.wire.unsent:
            said, self.said = self.said, b""
            self.wire.write_now(said)

    async def _flush(self) -> None:
        """Wait until all that h2 has said is written.

        A task that is called away meanwhile leaves it to the next one: a head that is
        lost would make all heads after it unreadable (RFC 7541, section 2.2).
        """
        self.said += self.connection.data_to_send()
        if self.said:
            async with self.sending:
                await self.wire.flush()
                self.push()
                await self.wire.flush()

    async def run(self) -> None:
        """Read until either side has had enough."""
        codes = h2.settings.SettingCodes
        most = {codes.MAX_CONCURRENT_STREAMS: HTTP2_STREAMS, codes.MAX_HEADER_LIST_SIZE: HEAD_BYTES}
        self.connection.local_settings = h2.settings.Settings(client=False, initial_values=most)
        self.connection.initiate_connection()
        self.connection.local_settings = h2.settings.Settings(client=False)  # h2 has no limit
        # Of streams, that is. A head of 20 bytes can stand for the 64 KiB that it allows.
        self.connection.decoder = HeadDecoder(HEAD_BYTES)
        self.connection.state_machine = GoesOn()
        h2.frame_buffer.CONTINUATION_BACKLOG = 8  # frames of a head; h2 would keep a MiB of one
        await self._flush()
        try:
            with self.patience:
                while data := await self.wire.receive():
                    turn = Turn()
                    for at in range(0, len(data), HTTP2_BITE):
                        await self.handle(RawData(data[at : at + HTTP2_BITE]))
                        await turn.pause()
        finally:
            with trio.move_on_after(GOODBYE, shield=True):
                if self.connection.state_machine.state is not ConnectionState.CLOSED:
                    self.connection.close_connection()  # GOAWAY (RFC 9113, section 6.8)
                    await self._flush()
                await self.handle(Closed())
                async with self.sending:
                    await self.wire.finish()

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        for event in events:
            if isinstance(event, h2.events.RemoteSettingsChanged):
                for code in event.changed_settings.keys() - {*h2.settings.SettingCodes}:
                    self.connection.remote_settings.pop(code, None)  # h2 keeps 800 bytes of each
            elif isinstance(event, h2.events.DataReceived) and event.stream_id not in self.streams:
                size = event.flow_controlled_length  # of the connection's window, too
                self.connection.acknowledge_received_data(size, event.stream_id)
            # RFC 9113, section 5.3.2, lets us ignore priorities: all streams are equal.
            elif not isinstance(event, IGNORED):
                if isinstance(event, h2.events.WindowUpdated) and not event.stream_id:
                    self.widened = trio.current_time()
                await super()._handle_events([event])
        self.bound_table()
        await self._flush()
        self.news.set()
        self.news = trio.Event()

    def bound_table(self) -> None:
        """A client may allow us a table of 4 GiB for our heads: it is searched for each.

        And hpack keeps each change of its size, to tell them all with the next head.
        """
        encoder = self.connection.encoder
        if encoder.header_table_size > HTTP2_TABLE:
            encoder.header_table_size = HTTP2_TABLE
        if sizes := encoder.table_size_changes:
            sizes[:] = [min(sizes), sizes[-1]]  # RFC 7541, section 4.2
            encoder.header_table.resized = True

    async def _create_stream(self, request: h2.events.RequestReceived) -> None:
        if len(self.streams) >= HTTP2_STREAMS:
            return self.reset(request.stream_id, ErrorCodes.REFUSED_STREAM)
        stream = self.streams[request.stream_id] = Http2Stream(self, request.stream_id)
        self.patience.deadline = inf
        self.tasks.start_soon(self.serve, stream, request.headers)

    async def serve(self, stream: Http2Stream, headers: list[tuple[bytes, bytes]]) -> None:
        """One request: whatever goes wrong inside ends this stream and no other."""
        head = dict(headers)
        method, path = head[b":method"], head.get(b":path", b"")
        headers = filter_pseudo_headers(headers)
        try:
            await self.handle_request(Request(stream, method, path, headers, "2"))
        except* (*QUIET_ENDS, h2.exceptions.ProtocolError):
            if self.wire.stuck:
                raise  # then all streams are
        except* Exception:
            logger.exception("a stream failed in a way that nobody thought of")
        if not (stream.gone.is_set() or (stream.answered and stream.heard)):
            code = ErrorCodes.NO_ERROR if stream.answered else ErrorCodes.INTERNAL_ERROR
            self.reset(stream.number, code)  # RFC 9113, section 8.1
        await self._close_stream(stream.number)
        if not self.streams:
            self.patience.deadline = trio.current_time() + IDLE_TIMEOUT
        await self._flush()

    def reset(self, number: int, code: ErrorCodes) -> None:
        with contextlib.suppress(h2.exceptions.ProtocolError):  # the client was first
            self.connection.reset_stream(number, code)


async def serve_http2(wire: Wire, handle: Callable[[Request], Awaitable[None]]) -> None:
    """HTTP/2 on one wire: a task for each stream, and this one, which reads for all."""
    async with trio.open_nursery() as tasks:
        await Http2(wire, handle, tasks).run()


# ─── More than one process: Redis Streams behind the same logs ───────────────────────
# Nothing above a log changes, and event n is the same everywhere. A message for the room
# goes into a Redis Stream, which each process copies into its room. An answer is written
# by the process that asks the upstream, and mirrored into a stream of its own; a process
# that is asked for it has a copy, whose model reads Redis where others read HTTP. An
# entry that is read twice changes nothing: after any trouble, all is read again.
#
# The processes tell each other their state, once a second and when it changes: their
# counts, which copies somebody reads, which of these are to be stopped. A process is gone
# when it has said nothing for SILENCE seconds in which we heard ourselves. Redis and each
# process may stand still and wake up later. So nothing waits for Redis longer than
# REDIS_TIMEOUT, and a message does not turn up after its sender was told that it is lost.
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
REDIS_TIMEOUT, BEAT, SILENCE, WANTS_EVERY = 2, 1, 4.5, 0.05
FOLLOW_BLOCK = 100  # milliseconds; an XREAD under way misses streams that are added to it
MIRROR_EVERY, MIRROR_ANSWERS, MIRROR_EVENTS = 0.02, 100, 200  # in one round trip
UNHEARD_EXPIRES = 3600  # seconds after the last event of an answer that has not ended

LUA = """
-- A key of another type is not ours. It would block commands that name it beside others.
local function heal(key, type)
  if redis.call('TYPE', key).ok ~= type then redis.call('DEL', key) end
end
-- A number that is ours. (For Lua, "inf", "1.5" and "0x10" are some, too.)
local function whole(text)
  return text and text:find('^%d+$') and #text < 16 and tonumber(text)
end
-- The last entry that has this field: others are not ours.
local function last_entry(key, field)
  heal(key, 'stream')
  for _, entry in ipairs(redis.call('XREVRANGE', key, '+', '-', 'COUNT', 5)) do
    if entry[1]:find('^18446744073709551615') then redis.call('DEL', key) return {} end
    local fields = {}
    for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
    if whole(fields[field]) then return fields end
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
local late, our_name, our_end, me, here = unpack(ARGV, 1, 5)
local now = redis.call('TIME')
if redis.call('GET', stored) == late then return 1 end
if now[1] + now[2] / 1000000 > tonumber(late) then return 0 end
redis.call('SET', stored, late, 'EX', 3600)
heal(comings, 'list') heal(presence, 'hash')
redis.call('HSET', presence, me, here)
local members = 0
for _, n in ipairs(redis.call('HVALS', presence)) do members = members + (whole(n) or 0) end
local tail = last_entry(room, 'place')
local name, place = tail.room or our_name, (tail.place or -1) + 1
local last = tail.members and tail.after or tail.place or -1  -- the last message's place
if name == our_name and place < tonumber(our_end) then
  -- Redis has lost what we have heard, and perhaps more, which others have heard: go on
  -- where no process can have been, and after a message that nobody has: all hear of a gap.
  -- The time tells it from a place where others went on when Redis had lost all before.
  place = our_end + 1000 + (now[1] % 1000 * 1000 + math.floor(now[2] / 1000))
  last = place - 1
end
for i = 6, #ARGV, 2 do
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
return 1
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
local me, members, state, at = unpack(ARGV)
heal(KEYS[1], 'hash') last_entry(KEYS[2])
for i = 3, #KEYS do heal(KEYS[i], 'stream') end
redis.call('HSET', KEYS[1], me, members)
redis.call('XADD', KEYS[2], 'MAXLEN', '~', 1000, '*', 'from', me, 'state', state, 'at', at)
return redis.call('TIME')
"""
# Of those who claim a key at the same time, one gets it: also a key whose answer is forgotten.
CLAIM = """
heal(KEYS[1], 'string')
local claimed, forgotten = redis.call('GET', KEYS[1]) or '', ARGV[1]
if claimed ~= forgotten and claimed ~= '' then return claimed end
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
return ARGV[2]
"""


def our_number(text: str) -> int:
    """A number that is ours, as whole() in LUA. Raises ValueError."""
    return int(text if re.fullmatch("-1|[0-9]{1,15}", text) else "")


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
                answer.close(kept=False)

    def stop(self, answer: Answer, problem: Problem) -> None:
        """Its writer is told; what becomes of it is read from Redis."""
        if problem.type == "stopped":
            self.cluster.stops.add(answer.name)
        else:
            answer.close(kept=False)


class Cluster:
    """This process, among others on the same Redis."""

    def __init__(self, app: App, url: str) -> None:
        import coredis  # only where --redis is given

        self.app = app
        self.me = secrets.token_hex(8)
        options: JSON = {"connect_timeout": 1, "stream_timeout": REDIS_TIMEOUT}
        options["retry_policy"] = coredis.retry.NoRetryPolicy()  # else a timeout counts thrice
        self.connect: Callable[[], coredis.Redis[str]]
        self.connect = lambda: coredis.Redis.from_url(url, decode_responses=True, **options)
        self.redis: coredis.Redis[str]
        # What we have heard
        self.read = {ROOM: "", STATE: ""}  # the last entry of each stream
        self.last = -1  # the place of the room's last message
        self.finding: dict[str, trio.Lock] = {}  # by answer
        self.neighbours: dict[str, Neighbour] = {}
        self.beaten = -inf  # when we heard ourselves
        self.told = -inf  # when we told what we heard then: it may be read again much later
        self.offset = 0.0  # Redis's time less ours, in seconds
        self.caught_up = trio.Event()
        self.warned: set[str] = set()  # of these streams
        # What we have to say
        self.batch: list[Said] = []  # for one round trip; say() empties it if it is stored
        self.batch_ended = trio.Event()
        self.saying = trio.Lock()
        self.mirrored: dict[Answer, int] = {}  # how many of their events are stored
        self.stops: set[str] = set()  # copies that somebody here wants stopped

    async def run(self) -> None:
        """All that this process does for the others, and they for it.

        Again after each trouble, and from the beginning: Redis may have lost everything.
        With a new client. The old one may have connections whose network is gone, and its
        pool loses a place with each that breaks under an XREAD (coredis 6.9).
        """
        reason, pause = "", 0.0
        while True:
            # Answers are forgotten meanwhile. Not those that somebody reads elsewhere.
            needed = set[Answer]().union(*(n.reads for n in self.neighbours.values()))
            self.mirrored = {a: n for a, n in self.mirrored.items()
                             if a in needed or self.app.answers.has(a.name)}  # fmt: skip
            self.read, self.finding = dict.fromkeys(self.read, "0-0"), {}
            try:
                async with self.connect() as self.redis, trio.open_nursery() as nursery:
                    await trio.sleep(pause)  # whoever has something to say may say it
                    await self.tell()  # and so heal what we read
                    for task in (self.beat, self.follow, self.mirror):
                        nursery.start_soon(task)
            except* Exception as group:
                if reason != (reason := why(group)):
                    logger.warning("redis: %s", reason)
            pause = random.uniform(0.1, 2)

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
            if said.type != "message":
                raise
            with trio.CancelScope(shield=True):  # to enter one for each would take 5 us
                await ended.wait()
        if batch:  # not emptied
            away = "the room cannot store messages at the moment: say it again later"
            raise Problem(503, away, "server_error", code="not_stored")

    async def say(self, batch: list[Said], ended: trio.Event) -> None:
        """Try until Redis says that it is stored, or that it came too late.

        No other outcome tells which: the reply may be lost, or have come while this process
        stood still.
        """
        room, keys = self.app.room, [ROOM, COMINGS, PRESENCE, f"{PREFIX}said:{self.me}"]
        try:
            async with self.saying:
                self.batch, self.batch_ended = [], trio.Event()
                late = self.offset + trio.current_time() + REDIS_TIMEOUT
                args: list[Any] = [late, room.name, room.end, self.me, room.here]
                for said in batch:
                    args += [said.type, to_json((int(time.time() * 1000), said))]
                end = inf  # when we give up: Redis may be away for long
                while trio.current_time() < end:
                    with contextlib.suppress(Exception):
                        if await self.redis.eval(LUA + SAY, keys, args):
                            batch.clear()
                        break
                    end = min(end, trio.current_time() + REDIS_TIMEOUT)
                    await trio.sleep(0.1)
        finally:
            ended.set()

    def hear_room(self, entry: Mapping[str, str]) -> None:
        """An entry of the room's stream, into the local room, at its place."""
        room, (at, said) = self.app.room, from_json(entry["said"])
        place, after = our_number(entry["place"]), our_number(entry["after"])
        members = our_number(entry.get("members", "-1"))  # -1: nobody has come or gone
        known = entry["room"] == room.name
        if known and place < room.end:
            return
        if not known or after > self.last:  # we are new; or messages between are lost
            room.name = entry["room"]
            room.skip_to(place)
            for reader in self.app.readers:  # also those that have not begun to read
                if reader.log is room:
                    reader.rewind(place - 1)  # so that each is told of a gap
        self.last = place if members < 0 else after
        type, name, text, key = said
        said = Said(str(type), str(name), str(text), key and str(key))
        room.add(said, at, place, members)

    # ── our answers, for others ──

    async def announce(self, answer: Answer) -> None:
        """Before a client learns an answer's name: let every process find it."""
        if answer not in self.mirrored and not answer.model.writer:
            self.mirrored[answer] = 0
            with contextlib.suppress(Exception):
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
        args, turn = [], Turn()
        for answer in answers:
            args += self.news(answer)
            await turn.pause()
        args += [int(self.app.settings.keep) + 1, UNHEARD_EXPIRES]
        results: Any = await self.redis.eval(LUA + MIRROR, keys, args)
        for answer, stored in zip(answers, map(int, results), strict=True):
            self.mirrored[answer] = stored
            if stored < 0:
                del self.mirrored[answer]
                gone = "the server that wrote this answer was silent for too long"
                self.app.answers.stop(answer, upstream_problem(gone))  # if it goes on here

    def news(self, answer: Answer) -> list[str | int]:
        """What MIRROR is told of it. The end of an answer goes with its last events."""
        asked, problem, ending = answer.question, answer.problem, ""
        head = [answer.model.writer or self.me, *asked.outline()]
        start = self.mirrored.get(answer, answer.end)
        end = min(answer.end, start + MIRROR_EVENTS)
        events = [answer[place][:2] for place in range(start, end)]
        if answer.closed and end == answer.end:
            ending = to_json(problem and problem.arguments())
        return [to_json(head), answer.start, start, end, to_json(events), ending]

    # ── others' answers, for us ──

    @contextlib.contextmanager
    def must_know(self, what: str) -> Iterator[None]:
        try:
            yield
        except Problem:
            raise
        except Exception:  # whatever coredis makes of what Redis says
            unknown, retry = f"{what} cannot be known now: try again", {"retry-after": "2"}
            raise Problem(503, unknown, "server_error", headers=retry) from None

    async def find(self, name: str) -> Answer | None:
        """Another process's answer, copied from now on. Raises Problem 503.

        It may be long. So it is fetched once, however many ask at the same time.
        """
        key, answers = ANSWER_PREFIX + name, self.app.answers
        with self.must_know("whether there is this answer"), trio.fail_after(REDIS_TIMEOUT):
            async with self.finding.setdefault(name, trio.Lock()):
                if not answers.has(name):
                    entries: Any = await self.redis.xrange(key) or ()
        self.finding.pop(name, None)
        if found := answers.find(name):
            return found  # somebody else asked at the same moment
        told = [entry.field_values for entry in entries]
        try:
            head = next((fields["head"] for fields in told if "head" in fields), "")
            writer, *outline = from_json(head)
            question = Question.from_outline(outline)
        except (ValueError, TypeError, IndexError):
            return None
        copy = answers.begin(self.app.writers, Elsewhere(self, str(writer)), question, name)
        copy.accepted.set()
        self.neighbours.setdefault(copy.model.writer, Neighbour())
        with trio.CancelScope(shield=True):  # others read it, too
            await self.hear(key, told)
        if not copy.closed:
            self.read[key] = entries[-1].identifier
        return copy

    async def reach(self, log: EventLog, known: Callable[[], bool]) -> None:
        """Wait for what may be on its way: at most until a state told a second later is heard."""
        asked = trio.current_time()
        with self.must_know("what was said"), trio.fail_after(REDIS_TIMEOUT + 1):
            while not (known() or log.closed or self.told > asked + 1):  # noqa: ASYNC110
                await trio.sleep(0.01)

    def hear_answer(self, key: str, entry: Mapping[str, str]) -> None:
        """A batch of its events, of which we may have some already."""
        copy = self.app.answers.by_id.get(key.removeprefix(ANSWER_PREFIX))
        if copy is None or copy.closed or "head" in entry:
            return
        events, start = from_json(entry["events"]), our_number(entry["from"])
        if start > copy.end:
            copy.skip_to(start)  # what Redis has lost, readers are told of by a gap
        for data, type in events[copy.end - start :]:
            if not copy.affordable:  # asked before each event: the last one would end it well
                copy.kept = False
                return copy.finish(too_busy())
            copy.append(str(data), str(type))
        if entry["end"]:
            if problem := from_json(entry["end"]):
                copy.problem = Problem(**problem)
                if not events:  # buried by a process that had heard less than Redis has
                    return copy.finish(copy.problem)
            copy.close()

    async def claim_key(self, question: Question) -> tuple[Answer | None, str]:
        """The answer that this Idempotency-Key has started in another process, if any;
        else the name under which it may be started here. Raises Problem."""
        key, name, forgotten = f"{PREFIX}key:{question.key}", secrets.token_hex(16), ""
        expires = UNHEARD_EXPIRES + int(self.app.settings.keep)
        with self.must_know("whether this was asked before"):
            while True:
                claimed: Any = await self.redis.eval(LUA + CLAIM, [key], [forgotten, name, expires])
                if claimed == name:
                    return None, name
                for _ in range(20):  # it may not have been announced yet
                    if answer := await self.find(str(claimed)):
                        return answer, answer.name
                    await trio.sleep(0.05)
                forgotten = claimed

    async def free_key(self, question: Question) -> None:
        """The question was refused: it may be asked again."""
        with contextlib.suppress(Exception):
            await self.redis.delete([f"{PREFIX}key:{question.key}"])

    # ── what the processes tell each other ──

    def wants(self) -> list[list[str]]:
        """Other processes' answers: those that are read here, those that are to be stopped."""
        copies = [answer for answer in self.app.answers.open() if answer.model.writer]
        return [[copy.name for copy in copies if copy.attendants], sorted(self.stops)]

    async def tell(self) -> list[list[str]]:
        """All that the others need to know of us. Returns what it is that we want."""
        counts, wants = self.app.counts(), self.wants()
        state = to_json([counts, *wants])
        args: list[Any] = [self.me, counts["members"], state, trio.current_time()]
        now: Any = await self.redis.eval(LUA + TELL, [PRESENCE, STATE, *self.read], args)
        self.offset = int(now[0]) + int(now[1]) / 1e6 - trio.current_time()
        return wants

    async def beat(self) -> None:
        """Our state, once a second and when somebody begins or ceases to want something."""
        while True:
            told = await self.tell()
            while dead := [name for name, n in self.neighbours.items() if n.silent > SILENCE]:
                await self.bury(dead[0])
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
            self.told = max(self.told, float(entry["at"]))
            return
        counts, reads, stops = from_json(entry["state"])
        answers, counts = self.app.answers, {what: int(n) for what, n in counts.items()}
        ours = {a for a in map(answers.find, reads) if a and not a.model.writer}
        neighbour = self.neighbours.setdefault(entry["from"], Neighbour())
        for answer in ours - neighbour.reads:
            answer.attend()
        for answer in neighbour.reads - ours:
            answer.leave()
        neighbour.silent, neighbour.counts, neighbour.reads = 0, Counter(counts), ours
        for answer in ours:
            if answer.closed:  # and still it is read: Redis may have lost its end
                self.mirrored.setdefault(answer, answer.end)
        for answer in filter(None, map(answers.by_id.get, stops)):
            answers.stop(answer, stopped())

    async def bury(self, name: str) -> None:
        """What a process that is gone has left: readers, answers, members."""
        for answer in self.neighbours.pop(name).reads:  # now: it may come back meanwhile
            answer.leave()
        for copy in self.app.answers.open():
            if copy.model.writer == name:  # we write its end, for all who read it
                self.mirrored[copy] = copy.end
                copy.finish(upstream_problem("the server that wrote this answer is gone"))
        if name == self.me:
            return  # we wrote that answer, and have forgotten it
        members = await self.redis.hget(PRESENCE, name)
        if await self.redis.hdel(PRESENCE, [name]) and members != "0":  # nobody else tells it
            with contextlib.suppress(Problem):
                await self.store(Said("left", f"{members} members"))

    async def follow(self) -> None:
        """The one task that copies: every stream that we read, into its log."""
        while True:
            block = FOLLOW_BLOCK if self.caught_up.is_set() else None
            count = 1 + 1000 // len(self.read)  # of each
            news: Any = await self.redis.xread(self.read, count=count, block=block)
            for key, entries in (news or {}).items():
                await self.hear(key, [entry.field_values for entry in entries])
                if entries[-1].identifier.startswith("18446744073709551615"):
                    await self.redis.delete([key])  # nothing can be added to it any more
                    self.read[key] = "0-0"
                elif key in self.read:
                    self.read[key] = entries[-1].identifier
            if not news:
                self.caught_up.set()

    async def hear(self, key: str, told: list[Any]) -> None:
        """What is foreign or broken is skipped: it must not end what we do."""
        turn = Turn()
        takers: JSON = {ROOM: self.hear_room, STATE: self.hear_state}
        take = takers.get(key) or functools.partial(self.hear_answer, key)
        for one in told:
            try:
                take(one)
            except Exception as error:  # whatever somebody has written there
                if key not in self.warned:
                    self.warned.add(key)
                    logger.warning("redis: something in %s is not ours: %r", key, error)
            await turn.pause()


# ─── Flags ───────────────────────────────────────────────────────────────────────────
# Each flag stands once, in Settings: its default, the form of its value, its help. Each
# can also be given as an environment variable, CHATSTREAM_PORT and so on; a flag wins.

ANY, WORD = ("(?s).*", "text"), (r"(?s)(\S.*)?", "text")  # as it is; without space around it
PORT = "[0-9]{1,5}", "a port"
COUNT = "[1-9][0-9]{0,2}", "a number from 1 to 999"
NUMBER = r"[0-9]{0,9}\.?[0-9]{1,9}", "a number of 0 or more"
LEVEL = "debug|info|warning|error", "debug, info, warning or error"
ORIGIN = r"null|https?://[^/?#\s*@]+/?", "an origin, such as https://my.site"
REDIS = "((rediss?|unix)://.*)?", "a URL, such as redis://host:6379"
SECRET = "[ -~]*", "text that can be sent"


class UsageError(Exception):
    """The operator asked for something that cannot be: one line, exit code 2."""


def flag(default: Any, form: tuple[str, str], help: str, metavar: str = "", env: str = "") -> Any:
    """A field of Settings. A tuple as its default: it may be repeated. No help: no flag."""
    about = {"form": form, "help": help, "metavar": metavar or None, "env": env}
    return dataclasses.field(default=default, metadata=about, repr=bool(help))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the flags say. Times in seconds."""

    host: str = flag("localhost", WORD, "address to listen on")
    port: int = flag(4001, PORT, "of the pages and of HTTP; 0 means any free one")
    room_port: int = flag(8888, PORT, "of the room; both ports serve everything")
    upstream: str = flag("", WORD, "of an OpenAI-compatible model", "BASE_URL", "OPENAI_BASE_URL")
    model: tuple[str, ...] = flag((), WORD, "one that may be asked", "NAME", "OPENAI_MODEL")
    patience: float = flag(600, NUMBER, "how long the model may be silent", "S")
    allow_origin: tuple[str, ...] = flag((), ORIGIN, "whose pages may ask; null: from disk")
    linger: float = flag(60, NUMBER, "how long an answer goes on unread", "S")
    keep: float = flag(600, NUMBER, "how long an ended answer is kept", "S")
    grace: float = flag(5, NUMBER, "how long answers may go on at a stop", "S")
    room_rate: float = flag(20, NUMBER, "messages a second of one member; 0 means no limit", "N")
    room_suffix: str = flag("--返回数据", ANY, "behind each message", "TEXT")
    redis: str = flag("", REDIS, "share room and answers over this Redis", "URL")
    workers: int = flag(1, COUNT, "processes on the same sockets; needs --redis", "N")
    certfile: str = flag("", WORD, "PEM, with --keyfile: HTTPS and WSS", "FILE")
    keyfile: str = flag("", WORD, "PEM", "FILE")
    log_level: str = flag("info", LEVEL, "debug, info, warning or error", "LEVEL")
    # Never a flag: a command line can be read by everybody on the machine.
    api_key: str = flag("", SECRET, "", env="OPENAI_API_KEY")
    token: str = flag("", SECRET, "")
    proxy: str = dataclasses.field(default="", repr=False)

    @property
    def model_name(self) -> str:
        return next(iter(self.model), "default" if self.upstream else "demo")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def parse_flags(argv: list[str] | None, environ: Mapping[str, str]) -> Settings:
    """Flags, then environment, then defaults. Raises UsageError."""
    about = __doc__.partition("\n")[0]
    # argparse quotes all of an ambiguous abbreviation, with a key that may stand in it.
    parser = Parser(prog="chatstream", description=about, allow_abbrev=False)
    fields = [field for field in dataclasses.fields(Settings) if field.metadata]
    for field in fields:
        if help := field.metadata["help"]:
            option, metavar = f"--{field.name.replace('_', '-')}", field.metadata["metavar"]
            parser.add_argument(option, action="append", help=help, metavar=metavar)
    known, unknown = parser.parse_known_args(argv)
    if unknown:  # it may be a key, or a key may follow: only a name or a plain word is shown
        shown = re.match("--[a-z-]+|[a-z]+$", unknown[0])
        wrong = f"there is no flag {shown[0]}" if shown else "a word belongs to no flag"
        raise UsageError(f"{wrong} (see --help)")
    given = vars(known)
    settings: JSON = {}
    for field in fields:
        many = isinstance(field.default, tuple)
        source, texts = f"--{field.name.replace('_', '-')}", given.get(field.name)
        for variable in (f"CHATSTREAM_{field.name.upper()}", field.metadata["env"]):
            if not texts and (text := environ.get(variable)):
                source, texts = variable, text.split(",") if many else [text]
        values = [read_value(field, text, source) for text in texts or ()]
        if values:
            settings[field.name] = tuple(filter(None, values)) if many else values[-1]
    return complete(settings, environ)


def read_value(field: dataclasses.Field[Any], text: str, source: str) -> Any:
    form, wanted = field.metadata["form"]
    text = text if form == ANY[0] else text.strip()
    if not re.fullmatch(form, text):
        shown = repr(text) if field.repr and not set("@?") & set(text) else "it"  # a password?
        raise UsageError(f"{source}: {shown} is not {wanted}")
    return {"int": int, "float": float}.get(str(field.type), str)(text)


def complete(settings: JSON, environ: Mapping[str, str]) -> Settings:
    """What is not a flag, and what must fit together. Raises UsageError."""
    settings["upstream"] = base_url(settings.get("upstream", ""))
    settings["proxy"] = find_proxy(settings["upstream"], environ)
    origins = settings.get("allow_origin", ())
    settings["allow_origin"] = tuple(origin.rstrip("/").lower() for origin in origins)
    made = Settings(**settings)
    if (port := max(made.port, made.room_port)) > 65535:
        raise UsageError(f"{port} is not a port: 0 to 65535")
    if bool(made.certfile) != bool(made.keyfile):
        raise UsageError("--certfile and --keyfile go together")
    if made.workers > 1 and not made.redis:
        raise UsageError("--workers needs --redis, where they share their logs")
    if made.workers > 1 and not hasattr(os, "fork"):
        raise UsageError("--workers does not work on this system: start one process")
    return made


def split_url(url: str, *schemes: str) -> SplitResult | None:
    """Its parts, if it is in ASCII and has one of these schemes, and a host."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in schemes and parts.hostname and parts.port != 0
    except ValueError:
        return None
    return parts if good and re.fullmatch("[!-~]+", url) else None


def base_url(text: str) -> str:
    """`http://host:port/v1[?query]`; a bare host gets its /v1. Raises UsageError."""
    if not text:
        return ""
    parts = split_url(text, "http", "https")
    if not parts or "@" in parts.netloc:
        wanted = "a base URL in ASCII, such as http://host:port/v1, with no key in it"
        raise UsageError(f"--upstream or OPENAI_BASE_URL must be {wanted}")
    path = parts.path.rstrip("/") or ("" if parts.query else "/v1")
    return parts._replace(path=path, fragment="").geturl()


def find_proxy(url: str, environ: Mapping[str, str]) -> str:
    """The proxy to this URL, by HTTP_PROXY, HTTPS_PROXY and NO_PROXY; or "".

    Raises UsageError if there is one that cannot be used.
    """
    parts = urlsplit(url)
    name = f"{parts.scheme}_proxy"
    lower = {k.lower(): v.strip() for k, v in environ.items() if v.strip()}
    if name not in lower:
        return ""
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # it is slow

    host = f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
    if proxy_bypass_environment(host, {"no": lower.get("no_proxy", "")}):
        return ""
    proxy = lower[name] if "://" in lower[name] else f"http://{lower[name]}"
    if not split_url(proxy, "http"):
        raise UsageError(f"{name.upper()} must be an http:// proxy; NO_PROXY exempts a host")
    return proxy


# ─── main ────────────────────────────────────────────────────────────────────────────
# All that can be wrong with flags, ports, certificate and Redis is found before the
# first client is served, and told in one line.

CLIENT_VANISHED, CLIENT_READS_NOTHING = 20, 60  # seconds without TCP acknowledgement
GC_THRESHOLD = 20_000  # new objects; the default of 700 looks for cycles all the time


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """For HTTPS and WSS, HTTP/2 by ALPN. Raises UsageError."""
    if not settings.certfile:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION  # a write must not wait for a read
    try:
        context.load_cert_chain(settings.certfile, settings.keyfile)
    except OSError as error:  # ssl.SSLError is one
        files = f"{settings.certfile} and {settings.keyfile}"  # which the error does not name
        raise UsageError(f"no certificate from {files}: {error}") from None
    return context


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of a host, with one port number for all.

    Browsers and Node may try ::1 first for localhost. An address that this machine
    lacks is skipped, one that is taken is an error. Raises UsageError.
    """
    host, reason = host.strip("[]"), "no such host"
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        found = []
    for family, address in dict.fromkeys((f[0], str(f[4][0])) for f in found):
        both = address == "::" and socket.has_dualstack_ipv6()
        place = (address, port)
        try:
            listener = socket.create_server(place, family=family, backlog=4096, dualstack_ipv6=both)
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue
            raise UsageError(f"cannot listen on {host}:{port}: {reason}") from None
        listener.setblocking(False)
        # Each connection inherits it.
        watch_for_life(listener, CLIENT_VANISHED, CLIENT_READS_NOTHING)
        listeners.append(listener)
        port = listener.getsockname()[1]
    if not listeners:
        raise UsageError(f"cannot listen on {host}:{port}: {reason}")
    return listeners


def raise_file_limit() -> None:
    """Each connection is a file: take as many as the system gives."""
    if resource is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for soft in (hard, 65536):  # root may have more than the hard limit; macOS has none
        with contextlib.suppress(ValueError, OSError):
            if soft > resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, max(hard, soft)))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 10240:
        logger.warning("this system lets us have %d connections (see ulimit -n)", soft - 50)


async def check_redis(url: str) -> None:
    """Raises UsageError, without the password that may stand in the URL."""
    try:
        import coredis
    except ImportError:
        raise UsageError("--redis needs coredis: pip install 'chatstream[redis]'") from None
    try:
        with trio.fail_after(5):
            async with coredis.Redis.from_url(url, connect_timeout=3) as redis:
                await redis.ping()
    except ValueError:  # whose text quotes the URL
        wrong = "its URL cannot be read: / ? # @ in a password are written %2F %3F %23 %40"
        raise UsageError(f"cannot reach Redis: {wrong}") from None
    except Exception as error:  # mostly in a group: coredis has a nursery of its own
        where = url.rpartition("@")[2].removeprefix("redis://").partition("?")[0]
        raise UsageError(f"cannot reach Redis at {where}: {why(error)}") from None


def start_line(settings: Settings, http: socket.socket, ws: socket.socket) -> str:
    s = "s" if settings.certfile else ""
    host = settings.host.strip("[]")
    host = f"[{host}]" if ":" in host else host
    http_port, ws_port = (sock.getsockname()[1] for sock in (http, ws))
    model = settings.model_name
    return f"chatstream: http{s}://{host}:{http_port}  ws{s}://{host}:{ws_port}  model: {model}"


async def heed_signals(
    stop: Callable[[], object], at_once: Callable[[], object], task_status: trio.TaskStatus[None]
) -> None:
    """The first SIGINT or SIGTERM means: stop. Another one: at once."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            stop()
            stop = at_once


async def serve(
    settings: Settings, tls: ssl.SSLContext | None, listeners: list[socket.socket], start: str
) -> int:
    """Serve on these sockets until a signal; a second one stops at once."""
    gc.freeze()  # what is imported stays: no collection needs to look at it again
    gc.set_threshold(GC_THRESHOLD)
    app = App(settings, {sock.getsockname()[1] for sock in listeners})
    await Server(app, tls).serve(listeners, start)
    return 0


async def end_with_parent(stop: trio.Event) -> None:
    await trio.lowlevel.wait_readable(0)
    stop.set()


async def keep_worker(start: Callable[..., Awaitable[object]]) -> NoReturn:
    while True:
        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            worker = await nursery.start(start)
        logger.error("a worker died (%d) and is replaced", worker.returncode)
        await trio.sleep_until(started + 1)  # one that cannot live: not in a hurry


async def supervise(
    settings: Settings, argv: list[str], listeners: list[socket.socket], start: str
) -> int:
    """N processes on the same sockets: one that dies is replaced, a stop goes to all.

    They share the listening sockets, opened once: the kernel gives each new connection
    to one of them, so no port is ever closed while a worker is replaced.
    """
    at_once = trio.Event()

    async def stop(worker: trio.Process) -> None:
        """What is still there in the end, perhaps frozen, is killed."""
        for listener in listeners:  # else the system goes on accepting, for nobody
            listener.close()
        worker.terminate()
        with trio.move_on_after(settings.grace + 2.5):
            await at_once.wait()
        worker.kill()

    fds = [sock.fileno() for sock in listeners]
    start_worker = functools.partial(
        trio.run_process,
        [sys.executable, __file__, *argv],
        stdin=subprocess.PIPE,
        env={**os.environ, "CHATSTREAM_LISTENERS": json.dumps(fds)},
        pass_fds=fds,
        process_group=0,  # Ctrl-C is for this process, which passes it on
        check=False,
        deliver_cancel=stop,
    )

    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as workers:
            await nursery.start(heed_signals, workers.cancel_scope.cancel, at_once.set)
            for _ in range(settings.workers):
                workers.start_soon(keep_worker, start_worker)
            print(start, flush=True)
        nursery.cancel_scope.cancel()
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 when it could not start."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        settings = parse_flags(argv, os.environ)
        form = "%(asctime)s %(levelname)s %(message)s"
        logging.basicConfig(level=settings.log_level.upper(), format=form)
        # They log heads, which may hold keys, and a traceback for each lost connection.
        for noisy in ("trio-websocket", "hpack", "coredis"):
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        raise_file_limit()
        tls = tls_context(settings)
        if inherited := os.environ.pop("CHATSTREAM_LISTENERS", ""):
            listeners = [socket.socket(fileno=fd) for fd in json.loads(inherited)]
            return trio.run(serve, settings, tls, listeners, "")
        http, ws = (listen(settings.host, n) for n in (settings.port, settings.room_port))
        if settings.redis:
            trio.run(check_redis, settings.redis)
        start = start_line(settings, http[0], ws[0])
        if settings.workers > 1:
            return trio.run(supervise, settings, argv, [*http, *ws], start)
        return trio.run(serve, settings, tls, [*http, *ws], start)
    except UsageError as error:
        print(f"chatstream: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there was a loop to take the signal
        return 0


if __name__ == "__main__":
    sys.exit(main())
