"""The log, the readers at their places in it, and the pump: in memory, without a wait.

The clock here jumps as soon as all tasks wait (Trio's autojump), so four seconds of
silence take no time, and nothing depends on how busy the machine is.
"""

import json
from functools import partial
from math import inf

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio import sleep_forever
from trio.testing import MockClock

from chatstream import (
    SSE,
    WRITE_BYTES,
    WS_JSON,
    EventLog,
    Framing,
    Pump,
    Reader,
    SSEParser,
    frame_sse,
    frame_ws,
    frame_ws_plain,
    gap,
)

# Nothing here is judged by the clock, so that a busy machine breaks no test.
calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Outlet:
    """A wire into memory, which takes so many bytes before it is full."""

    def __init__(self, room=inf):
        self.taken, self.unsent, self.room = b"", b"", room
        self.writes = 0
        self._more_room = trio.Event()

    def write_now(self, data):
        assert not self.unsent, "written to while something was on its way"
        self.writes += 1
        self.unsent = data
        self._take()

    def _take(self):
        size = int(min(self.room, len(self.unsent)))
        self.taken, self.unsent = self.taken + self.unsent[:size], self.unsent[size:]
        self.room -= size

    def make_room(self, size):
        self.room += size
        self._take()
        self._more_room.set()
        self._more_room = trio.Event()

    async def flush(self):
        while self.unsent:
            await self._more_room.wait()

    @property
    def events(self):
        return SSEParser().feed(self.taken)


async def settle():
    """Until nothing more happens by itself, a rest of the pump included."""
    await trio.sleep(1)


def numbers(outlet):
    """The places of the events it took; a gap as how many are missing, negative."""
    return [
        -json.loads(event.data)["missed"] if event.type == "gap" else int(event.data)
        for event in outlet.events
    ]


def filled(count, **bounds):
    """A log whose event n says n."""
    log = EventLog("log", **bounds)
    for n in range(count):
        log.append(str(n))
    return log


@pytest.fixture
def pumped(nursery):
    """A log of at most ten events whose news the pump takes to its readers."""
    pump = Pump()
    nursery.start_soon(pump.run)
    return EventLog("log", max_events=10, on_news=pump.notify)


# ------------------------------------------------------------------------------ log


def test_places_are_numbered_for_ever():
    log = filled(25, max_events=10)
    assert (log.start, log.end) == (15, 25)
    assert [log[n].data for n in range(15, 25)] == [str(n) for n in range(15, 25)]


def test_the_oldest_go_when_there_are_too_many_bytes():
    """What counts is the memory that they take, and not only their text."""
    text = "x" * 1000
    one = filled(0)
    one.append(text)
    log = EventLog("log", max_bytes=10 * one.size)
    for _ in range(30):
        log.append(text)
    assert (log.start, log.end, log.size) == (20, 30, 10 * one.size)
    assert len(text) < one.size < len(text) + 200


def test_an_event_that_does_not_fit_is_missed_by_all():
    log = filled(3, max_bytes=1000)
    log.append("x" * 1001)
    assert (log.start, log.end, log.size) == (4, 4, 0)
    log.append("4")
    assert log[4].data == "4"


def test_a_log_that_starts_elsewhere_forgets_what_it_had():
    log = filled(3)
    assert log.frames(SSE, 0)[1] == 3
    log.skip_to(1000)
    assert (log.start, log.end, log.size) == (1000, 1000, 0)
    assert log.frames(SSE, 0) == (frame_sse("log", None, gap(1000)), 1000)
    assert log.append("x") == 1000


@pytest.mark.parametrize(
    ("last_event_id", "place"),
    [
        ("log-0", 1),
        ("log-9", 10),
        ("log-09", 10),
        ("log-10", None),  # not yet said
        ("log--1", None),
        ("log-", None),
        ("log", None),
        ("-5", None),
        ("5", None),
        ("", None),
        (None, None),
        ("other-5", None),
        ("LOG-5", None),
        ("log-5 ", None),
        ("log-5\n", None),
        ("log-5.0", None),
        ("log-٣", None),  # a digit, but not one of ours
        ("log-" + "9" * 5000, None),
    ],
)
def test_where_an_id_leads(last_event_id, place):
    assert filled(10).place_after(last_event_id) == place


def test_what_many_readers_need_is_made_once():
    log = filled(10)
    first, again = log.frames(SSE, 3), log.frames(SSE, 3)
    assert first[0] is again[0]
    assert first[1] == 10
    log.append("10")
    assert log.frames(SSE, 3)[1] == 11


def test_the_same_event_in_two_framings():
    log = filled(1)
    assert log.frames(SSE, 0)[0] == b"data: 0\nid: log-0\n\n"
    assert log.frames(WS_JSON, 0)[0].endswith(b'{"id":"log-0","type":"message","text":"0"}')


def test_a_long_log_is_framed_piece_by_piece():
    log = EventLog("log")
    for _ in range(100):
        log.append("x" * 10_000)
    frames, place = log.frames(SSE, 0)
    assert WRITE_BYTES <= len(frames) < WRITE_BYTES + 11_000
    assert 0 < place < 10


# ---------------------------------------------------------------------------- reader


@pytest.mark.parametrize("start", range(11))
async def test_a_reader_gets_what_follows_its_place(start, pumped, nursery, autojump_clock):
    for n in range(8):
        pumped.append(str(n))
    outlet = Outlet()
    nursery.start_soon(Reader(pumped, outlet, SSE, min(start, pumped.end)).run, sleep_forever)
    await settle()
    for n in range(8, 10):
        pumped.append(str(n))
    pumped.close()
    await settle()
    assert numbers(outlet) == list(range(min(start, 8), 10))


async def test_a_reader_of_a_log_that_has_ended_gets_all_and_returns(autojump_clock):
    log = filled(1000)
    log.close()
    outlet = Outlet(room=10)

    async def read_slowly():
        while outlet.unsent or outlet.room <= 0:
            outlet.make_room(700)
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_slowly)
        assert await Reader(log, outlet, SSE, 0).run(sleep_forever) is True
        nursery.cancel_scope.cancel()
    assert numbers(outlet) == list(range(1000))
    assert not log.readers


async def test_who_falls_behind_is_told_how_much_is_missing(pumped, nursery, autojump_clock):
    outlet = Outlet(room=5)
    nursery.start_soon(Reader(pumped, outlet, SSE, 0).run, sleep_forever)
    for n in range(25):
        pumped.append(str(n))
        await settle()
    assert outlet.unsent
    outlet.make_room(inf)
    pumped.close()
    await settle()
    assert numbers(outlet) == [0, -14, *range(15, 25)]
    gap = outlet.taken[outlet.taken.index(b"event: gap") :].partition(b"\n\n")[0]
    assert b"id:" not in gap, "a client keeps the id of what it has seen"


async def test_who_could_not_tell_a_gap_from_a_message_is_told_of_none(
    pumped, nursery, autojump_clock
):
    """A plain member: what reaches it is what was said, and nothing else."""
    plain = Framing(partial(frame_ws_plain, "!"))
    outlet = Outlet(room=0)
    reader = Reader(pumped, outlet, plain, 0)
    nursery.start_soon(reader.run, sleep_forever)
    for n in range(25):
        pumped.append(str(n))
        await settle()
    outlet.make_room(inf)
    await settle()
    heard = [b"0!", *(b"%d!" % n for n in range(15, 25))]
    assert outlet.taken == b"".join(frame_ws(text) for text in heard)
    assert reader.gaps == 1


async def test_a_client_that_leaves_takes_its_reader_along(pumped, nursery, autojump_clock):
    """Its place is free at once, whether all was written or nothing."""
    left = trio.Event()
    for room in (inf, 0):
        reader = Reader(pumped, Outlet(room), SSE, 0)
        nursery.start_soon(reader.run, left.wait)
    await settle()
    assert len(pumped.readers) == 2
    left.set()
    await settle()
    assert not pumped.readers


async def test_a_dropped_reader_ends_although_its_wire_is_full(autojump_clock):
    reader = Reader(filled(3), Outlet(room=0), SSE, 0)

    async def drop():
        await settle()
        reader.outlet.make_room(1000)
        reader.drop("it answered no ping")

    async def run():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drop)
            await reader.run(sleep_forever)

    with pytest.RaisesGroup(pytest.RaisesExc(trio.BrokenResourceError, match="no ping")):
        await run()
    assert not reader.log.readers


@pytest.mark.parametrize(("framing", "times"), [(SSE, [4, 8, 12]), (WS_JSON, [4, 8, 12])])
async def test_silence_is_broken_in_time(framing, times, autojump_clock):
    reader = Reader(filled(0), Outlet(), framing, 0)
    started = trio.current_time()
    spoken = []
    for second in range(1, 15):
        reader.keep_alive(started + second)
        if reader.outlet.taken:
            spoken.append(second)
            assert framing.keep_alive == reader.outlet.taken
            reader.outlet.taken = b""
    assert spoken == times


@pytest.mark.parametrize(("framing", "times"), [(SSE, [6, 10, 14]), (WS_JSON, [4, 8, 12])])
async def test_after_an_event_sse_waits_anew_and_a_heartbeat_does_not(
    framing, times, autojump_clock
):
    reader = Reader(filled(0), Outlet(), framing, 0)
    started = trio.current_time()
    spoken = []
    for second in range(1, 15):
        if second == 2:
            reader.log.append("something")
            reader.catch_up(started + second)
            reader.outlet.taken = b""
        reader.keep_alive(started + second)
        if reader.outlet.taken:
            spoken.append(second)
            reader.outlet.taken = b""
    assert spoken == times


async def test_a_keep_alive_never_cuts_into_an_event(autojump_clock):
    reader = Reader(filled(1), Outlet(room=3), SSE, 0)
    reader.catch_up(0)
    reader.keep_alive(trio.current_time() + 100)
    reader.outlet.make_room(100)
    assert reader.outlet.taken == b"data: 0\nid: log-0\n\n"


# ------------------------------------------------------------------------------ pump


async def test_one_slow_reader_delays_nobody(pumped, nursery, autojump_clock):
    stuck, quick = Outlet(room=0), Outlet()
    for outlet in (stuck, quick):
        nursery.start_soon(Reader(pumped, outlet, SSE, 0).run, sleep_forever)
    await settle()
    for n in range(5):
        pumped.append(str(n))
        await settle()
        assert numbers(quick)[-1] == n
    assert stuck.taken == b""
    assert stuck.writes == 1, "nothing more is piled up behind what it did not take"


async def test_what_happens_at_once_is_written_at_once(pumped, nursery, autojump_clock):
    outlet = Outlet()
    nursery.start_soon(Reader(pumped, outlet, SSE, 0).run, sleep_forever)
    await settle()
    for n in range(9):
        pumped.append(str(n))
    await settle()
    assert numbers(outlet) == list(range(9))
    assert outlet.writes == 1


@pytest.mark.parametrize("readers", [1, 64, 65])
async def test_what_an_upstream_says_is_written_before_any_other_task_runs(
    readers, nursery, autojump_clock
):
    """If few read it. Otherwise run() writes it, which pauses in between."""
    pump = Pump()
    log = EventLog("log", on_news=pump.notify)
    outlets = [Outlet() for _ in range(readers)]
    for outlet in outlets:
        nursery.start_soon(Reader(log, outlet, SSE, 0).run, sleep_forever)
    await settle()
    pump.at_once(lambda: [log.append("0"), log.append("1")])
    assert all(numbers(outlet) == [0, 1] for outlet in outlets) == (readers <= 64)
    nursery.start_soon(pump.run)
    await settle()
    log.append("2")
    await settle()
    assert all(numbers(outlet) == [0, 1, 2] for outlet in outlets)


async def test_a_reader_that_comes_during_a_rest_of_the_pump_waits_for_nothing(
    pumped, nursery, autojump_clock
):
    for n in range(5):
        pumped.append(str(n))
    outlet = Outlet()
    nursery.start_soon(Reader(pumped, outlet, SSE, 2).run, sleep_forever)
    await settle()
    assert numbers(outlet) == [2, 3, 4]


async def test_leaving_in_the_middle_of_a_pass_harms_nobody(pumped, nursery, autojump_clock):
    """An outlet that ends another reader while the pump is writing to it."""
    scopes = [trio.CancelScope() for _ in range(3)]

    class Rude(Outlet):
        def write_now(self, data):
            super().write_now(data)
            scopes[2].cancel()

    outlets = [Outlet(), Rude(), Outlet()]

    async def read(scope, outlet):
        with scope:
            await Reader(pumped, outlet, SSE, 0).run(sleep_forever)

    for scope, outlet in zip(scopes, outlets, strict=True):
        nursery.start_soon(read, scope, outlet)
    await settle()
    pumped.append("0")
    await settle()
    assert len(pumped.readers) == 2
    pumped.append("1")
    await settle()
    assert numbers(outlets[0]) == numbers(outlets[1]) == [0, 1]


# ------------------------------------------------------------------- whatever happens

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 30), st.booleans()),
        st.tuples(st.just("take"), st.integers(0, 2), st.integers(1, 400)),
        st.just(("settle",)),
    ),
    max_size=40,
)


@calm
@given(STEPS)
def test_every_reader_hears_all_in_order_or_how_much_it_missed(steps):
    """Three readers take bytes as they like, while events come as they like."""

    async def run():
        pump = Pump()
        log = EventLog("log", max_events=10, on_news=pump.notify)
        outlets = [Outlet(room=0) for _ in range(3)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump.run)
            for outlet in outlets:
                nursery.start_soon(Reader(log, outlet, SSE, 0).run, sleep_forever)
            for step, *values in steps:
                await play(step, values, pump, log, outlets)
            for outlet in outlets:
                outlet.make_room(inf)
            log.close()
            await settle()
            assert not log.readers
            nursery.cancel_scope.cancel()
        return log.end, outlets

    async def play(step, values, pump, log, outlets):
        def append():
            for _ in range(values[0]):
                log.append(str(log.end))

        if step == "append":
            pump.at_once(append) if values[1] else append()
        elif step == "take":
            outlets[values[0]].make_room(values[1])
        else:
            await settle()

    end, outlets = trio.run(run, clock=MockClock(autojump_threshold=0))
    for outlet in outlets:
        place = 0
        for number in numbers(outlet):
            assert number < 0 or number == place
            place += -number if number < 0 else 1
        assert place == end
