"""Two processes and one Redis: what is promised of one log holds for both."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import trio
from kit import (
    BOOK,
    OPENAI,
    PROTOCOLS,
    RESPONSES,
    ROOT,
    TOGETHER,
    Gate,
    Line,
    answer,
    asked,
    asking,
    at,
    delta,
    error_of,
    event,
    fetch,
    fetch_events,
    frozen,
    hear_of,
    hear_texts,
    insist,
    person,
    plain,
    program,
    raw_member,
    read_frame,
    say,
    say_and_hear,
    servers,
    sse,
    stream,
    text_of,
    told,
    until,
)

import chatstream

SOON = 1.0


def two(start, redis, upstream):
    flags = ("--redis", redis.url, *TOGETHER)
    env = {"OPENAI_BASE_URL": upstream.url}
    return start(*flags, env=env), start(*flags, env=env)


@pytest.fixture(scope="module")
def both(request, quiet_redis, upstream):
    """Two processes that nothing happens to."""
    with servers(request.config) as start:
        yield two(start, quiet_redis, upstream)


@pytest.fixture
def pair(serve, redis, upstream):
    """Two processes for a test that breaks something."""
    return two(serve, redis, upstream)


@contextlib.asynccontextmanager
async def read_by_both(pair, upstream):
    """An answer in its middle, a reader of it in each process, and its key in Redis."""
    a, b = pair
    gate = Gate()
    prompt = upstream.script(*answer("a ", gate, "b"))
    async with asked(a, prompt) as here, stream("GET", at(b, here)) as there:
        first = await here.events(1)
        assert await there.events(1) == first
        yield here, there, gate, f"chatstream:2:answer:{here.headers['x-answer-id']}"


def closed(upstream, prompt):
    (heard,) = upstream.asked(prompt)
    return heard.closed_at is not None


# ---------------------------------------------------------------------------- the room


async def test_all_members_hear_all_messages_once_and_in_one_order(both):
    a, b = both
    heard, count = [], 40

    async def talk(member, who):
        for n in range(count):
            await say(member, f"{who} {n}")

    async def listen(member):
        said = [await hear_of(member, "message") for _ in range(4 * count)]
        heard.append([(message["id"], message["text"]) for message in said])

    async with person(a) as one, person(a) as two, person(b) as three, person(b) as four:
        members = (one, two, three, four)
        after = (await say_and_hear(one))["id"]
        for member in members[1:]:
            while (await event(member)).get("id") != after:
                pass
        async with trio.open_nursery() as nursery:
            for who, member in enumerate(members):
                nursery.start_soon(talk, member, who)
                nursery.start_soon(listen, member)
    assert heard == [heard[0]] * 4
    texts = [text for _, text in heard[0]]
    for who in range(4):
        mine = [text for text in texts if text.startswith(f"{who} ")]
        assert mine == [f"{who} {n}" for n in range(count)]


async def test_a_member_resumes_at_the_other_process(both):
    a, b = both
    async with person(a) as ann:
        seen = await say_and_hear(ann)
        for word in ("one", "two"):
            await say(ann, word)
        await hear_of(ann, "message", text="two")
        async with person(b, after=seen["id"]) as bob:
            assert await hear_texts(bob, 2) == ["one", "two"]


async def test_members_are_counted_over_both(both):
    a, b = both
    async with person(a, "Ann") as ann:
        before = (await hear_of(ann, "joined", name="Ann"))["members"]
        async with person(b, "Bob") as bob:
            joined = await hear_of(bob, "joined", name="Bob")
            assert joined["members"] == before + 1
            assert (await hear_of(ann, "joined", name="Bob")) == joined
        assert (await hear_of(ann, "left", name="Bob"))["members"] == before


# ------------------------------------------------------------------------- the answers


async def test_an_answer_is_followed_at_the_other_process_from_any_id(both, upstream):
    a, b = both
    gate = Gate()
    prompt = upstream.script(*answer("a ", "b ", gate, "c ", "d"))
    read = {}

    async def follow(start):
        head = {"Last-Event-ID": first[start - 1].id} if start else None
        read[start] = await fetch_events("GET", url, head)

    async with asked(a, prompt) as response:
        url = at(b, response)
        first = await response.events(2)
        async with trio.open_nursery() as nursery:
            for start in range(3):
                nursery.start_soon(follow, start)
            gate.open()
            events = first + await response.events()
    assert read == {start: events[start:] for start in range(3)}
    assert await fetch_events("GET", url) == events


async def test_a_new_answer_is_known_to_the_other_process_at_once(both, upstream):
    a, b = both
    for _ in range(10):
        prompt = upstream.script(*answer("a ", "b"))
        async with asked(a, prompt) as response:
            events = await fetch_events("GET", at(b, response))
            assert events == await response.events()


async def test_the_same_post_at_the_other_process_costs_nothing(both, upstream):
    a, b = both
    gate = Gate()
    prompt = upstream.script(*answer("a ", "b ", gate, "c"))
    async with asked(a, prompt) as response:
        first = await response.events(2)
    head, body = {"Last-Event-ID": first[-1].id}, asking(prompt, stream=True)
    async with stream("POST", b.http + OPENAI, head, body) as response:
        assert response.status == 200
        await trio.sleep(0.8)  # twice the linger
        gate.open()
        events = first + await response.events()
    assert text_of(events) == "a b c"
    assert events[-1].data == "[DONE]"
    assert len(upstream.asked(prompt)) == 1


async def test_it_is_stopped_from_the_other_process(both, upstream):
    a, b = both
    prompt = upstream.script(*sse(delta("a"), Gate()))
    async with asked(a, prompt) as here, stream("GET", at(b, here)) as there:
        await here.events(1)
        assert (await fetch("DELETE", at(b, here))).status == 204
        await until(lambda: closed(upstream, prompt), SOON)
        events = await here.events()
        assert error_of(events)["type"] == "stopped"
        assert (await there.events())[-1:] == events


@pytest.mark.parametrize("attempt", range(2))
async def test_the_last_reader_is_the_last_one_anywhere(both, upstream, attempt):
    a, b = both
    prompt = upstream.script(*sse(delta("a"), Gate()))
    async with asked(a, prompt) as here, stream("GET", at(b, here)) as there:
        await there.events(1)
        await here.connection.transport.aclose()
        await trio.sleep(0.9)
        assert not closed(upstream, prompt)
    await until(lambda: closed(upstream, prompt), 0.4 + SOON)


@pytest.mark.parametrize("last", ["{}-99", "{}-x", "other-1"])
async def test_an_answers_id_must_be_right_at_the_other_process_too(both, upstream, last):
    a, b = both
    prompt = upstream.script(*answer("a"))
    async with asked(a, prompt) as response:
        await response.events()
        url = at(b, response)
    last = last.format(url.rpartition("/")[2])
    assert (await fetch("GET", url, {"Last-Event-ID": last})).status == 400


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_what_neither_knows_is_404(both, method):
    for server in both:
        url = f"{server.http}/answers/{'0' * 32}"
        assert (await fetch(method, url)).status == 404


async def test_a_process_that_comes_later_knows_what_was_said(serve, redis):
    flags = ("--redis", redis.url, *TOGETHER)
    a = serve(*flags)
    async with person(a) as ann:
        for word in ("one", "two"):
            await say(ann, word)
        said = await hear_of(ann, "message", text="two")
    async with person(serve(*flags)) as bob:
        assert await hear_texts(bob, 2) == ["one", "two"]
        assert (await say_and_hear(bob))["id"] > said["id"]


async def test_a_copy_for_which_there_is_no_memory_is_refused(serve, redis, upstream):
    """Those who read it where it is written lose nothing."""
    flags, env = ("--redis", redis.url, *TOGETHER), {"OPENAI_BASE_URL": upstream.url}
    a, b = serve(*flags, env=env), serve(*flags, env=env, program=program(ANSWERS_BYTES=200_000))
    gate = Gate()
    prompt = upstream.script(*answer("a ", gate, *["x" * 50_000] * 10))
    async with asked(a, prompt) as here, stream("GET", at(b, here)) as there:
        first = await here.events(1)
        assert await there.events(1) == first
        gate.open()
        assert error_of(await there.events())["type"] == "server_busy"
        assert (await here.events())[-1].data == "[DONE]"
    assert (await fetch("GET", b.http + "/healthz")).json["answers"] == 0


# -------------------------------------------------------------------- one of them stops


async def test_who_followed_at_a_process_that_stops_can_go_on(pair, upstream):
    """Its stream is ended properly, and tells of no failure: the answer goes on."""
    a, b = pair
    gate = Gate()
    prompt = upstream.script(*answer("a ", gate, "b"))
    async with asked(a, prompt) as here:
        first = await here.events(1)
        async with stream("GET", at(b, here)) as there:
            assert await there.events(1) == first
            b.signal()
            assert await there.events() == []
            assert 1000 <= there.retry[-1] <= 5000
        assert await b.exit_code(1 + 3) == 0
        gate.open()
        rest = await here.events()
        head = {"Last-Event-ID": first[0].id}
        assert await fetch_events("GET", at(a, here), head) == rest


# ------------------------------------------------------------------- when things break


async def test_a_killed_process_leaves_an_error_and_no_ghosts(pair, upstream):
    a, b = pair
    prompt = upstream.script(*sse(delta("a"), Gate()))
    async with person(a), person(b, "Bob") as bob, asked(a, prompt) as here:
        await hear_of(bob, "joined", members=2)  # who of them came last is open
        async with stream("GET", at(b, here)) as there:
            await there.events(1)
            os.kill(a.process.pid, signal.SIGKILL)
            with trio.fail_after(10):
                assert error_of(await there.events())["type"] == "upstream_error"
        with trio.fail_after(10):
            while (await event(bob)).get("members") != 1:
                pass


async def test_the_dead_have_an_end_for_all_also_if_redis_has_more_than_was_heard(
    serve, redis, upstream
):
    flags, env = ("--redis", redis.url, *TOGETHER), {"OPENAI_BASE_URL": upstream.url}
    a, b, c = (serve(*flags, env=env, program=program(SILENCE=1.5)) for _ in range(3))
    prompt = upstream.script(*sse(delta("a"), Gate()))
    async with asked(a, prompt) as here, stream("GET", at(b, here)) as there:
        first = await there.events(1)
        redis.do(f"XADD chatstream:2:answer:{here.headers['x-answer-id']} * to 9")
        os.kill(a.process.pid, signal.SIGKILL)
        with trio.fail_after(10):
            ended = await there.events()
        assert error_of(ended)["type"] == "upstream_error"
        await trio.sleep(0.2)
        late = await fetch_events("GET", at(c, here))
        assert error_of(late) == error_of(first + ended)


async def test_nobody_pays_for_what_a_killed_process_was_reading(pair, upstream):
    """Its readers cannot say that they have left: so their silence says it."""
    a, b = pair
    prompt = upstream.script(*sse(delta("a"), Gate()))
    async with asked(a, prompt) as here, stream("GET", at(b, here)) as there:
        await there.events(1)
        await here.connection.transport.aclose()
        await trio.sleep(3)
        assert not closed(upstream, prompt)
        os.kill(b.process.pid, signal.SIGKILL)
        await until(lambda: closed(upstream, prompt), 10)


async def test_while_redis_is_away_an_answer_elsewhere_cannot_be_found(pair, redis, upstream):
    """Which is not the same as: there is none."""
    a, b = pair
    async with asked(a, upstream.script(*answer("a"))) as here:
        events = await here.events()
        redis.stop()
        response = await fetch("GET", at(b, here))
        assert response.status == 503
        assert int(response.headers["retry-after"]) >= 1
        assert await fetch_events("GET", at(a, here)) == events


async def test_while_redis_is_away_what_was_said_meanwhile_is_not_known(pair, redis, upstream):
    """Which is not the same as: nobody said that. And nothing is told twice."""
    a, b = pair
    gate, book = Gate(), BOOK._replace(done=True)
    head, first, *rest = told(book, PROTOCOLS["responses"].stream())
    prompt = upstream.script(head, first, gate, *rest[:3], Gate())
    body = PROTOCOLS["responses"].ask(prompt) | {"stream": True}
    async with stream("POST", a.http + RESPONSES, None, body) as here:
        (created,) = await here.events(1)
        response = f"{b.http}{RESPONSES}/{created.json['response']['id']}?stream=true"
        async with stream("GET", response) as there:
            assert await there.events(1) == [created]
            redis.stop()
            gate.open()
            last = (await here.events(2))[-1]
            known = fetch("GET", at(b, here), {"Last-Event-ID": last.id})
            with trio.fail_after(8):
                assert (await known).status == 503
                after = f"&starting_after={last.json['sequence_number']}"
                assert (await fetch("GET", response + after)).status == 503


@pytest.mark.parametrize("lost", ["the middle", "the end", "all"])
async def test_what_redis_has_lost_of_an_answer(pair, redis, upstream, lost):
    """Its writer has it still, and notices unless something follows: that is a gap."""
    a, b = pair
    gates = Gate(), Gate()
    prompt = upstream.script(*answer("a ", gates[0], "b ", gates[1], "c"))
    async with asked(a, prompt) as here:
        key = f"chatstream:2:answer:{here.headers['x-answer-id']}"

        def stored():
            """The ids of its entries that have events."""
            found = redis.do(f"XRANGE {key} - +").decode()
            return re.findall(r"(\d+-\d+)\r\n\*8", found)

        events = await here.events(1)
        await until(lambda: stored())
        first = stored()
        gates[0].open()
        events += await here.events(1)
        await until(lambda: len(stored()) > len(first))
        gone = {"the middle": first[-1:], "the end": stored()[-1:], "all": ()}[lost]
        redis.do(" ".join(["XDEL", key, *gone] if gone else ["DEL", key]))
        gates[1].open()
        events += await here.events()
        await until(lambda: b"[DONE]" in redis.do(f"XRANGE {key} - +"))
        there = await fetch_events("GET", at(b, here))
    if lost == "the middle":
        (n,) = [n for n, event in enumerate(there) if event.type == "gap"]
        there[n : n + 1] = events[n : n + there[n].json["missed"]]
    assert there == events


async def test_an_end_that_redis_lost_before_it_was_read(pair, redis, upstream):
    async with read_by_both(pair, upstream) as (here, there, gate, key):
        with frozen(pair[1].process):
            await trio.sleep(0.3)  # until it has no XREAD under way
            gate.open()
            rest = await here.events()
            await until(lambda: b"[DONE]" in redis.do(f"XRANGE {key} - +"))
            redis.do(f"DEL {key}")
        with trio.fail_after(5):
            assert await there.events() == rest


async def test_a_room_that_was_set_back_goes_on_after_a_gap(pair, redis):
    """Redis comes back with what somebody said first who had heard less than we."""
    a, b = pair
    async with person(a, "Ann") as ann, person(b, "Bob") as bob:
        for n in range(5):
            await say(ann, str(n))
            await hear_of(bob, "message", text=str(n))
        with frozen(a.process), frozen(b.process):
            redis.stop()
            redis.forget()
            redis.start()
            redis.do("XADD chatstream:2:room * room newroom place 1 last 1")
        with trio.fail_after(10):
            await insist(ann, "well again")
            assert (await hear_of(bob, "gap"))["missed"] >= 1
            await hear_of(bob, "message", text="well again")


async def test_what_redis_lost_before_all_had_heard_it_is_a_gap(pair, redis):
    """One stands still, hears nothing of what is said, and is the first to speak again."""
    a, b = pair
    async with person(a, "Ann") as ann, person(b, "Bob") as bob:
        await say(bob, "one")
        await hear_of(ann, "message", text="one")
        await hear_of(bob, "message", text="one")
        with frozen(b.process):
            await say(ann, "two")
            await hear_of(ann, "message", text="two")
            with frozen(a.process):
                redis.stop()
                redis.forget()
                redis.start()
        heard = []
        with trio.fail_after(15):
            await say(bob, "three")
            while not heard or heard[-1] != ("message", "three"):
                found = await event(bob)
                heard.append((found["type"], found.get("text")))
                if found["type"] == "error":
                    await say(bob, "three")
    assert "gap" in dict(heard)


def emptied(redis):
    redis.stop()
    redis.forget()
    redis.start()


@pytest.mark.parametrize("meanwhile", ["emptied before", "a thousand messages"])
async def test_who_missed_much_and_speaks_first_is_heard_after_a_gap(pair, redis, meanwhile):
    """Redis is emptied, and the others have heard more than this process can think of."""
    a, b = pair
    async with person(a, "Ann") as ann, person(b, "Bob") as bob:
        said = await say_and_hear(ann)
        await hear_of(bob, "message", text=said["text"])
        with frozen(a.process):
            if meanwhile == "emptied before":
                emptied(redis)
                await insist(bob, "in between")
            else:
                for n in range(1100):
                    await say(bob, str(n))
                await hear_of(bob, "message", text="1099")
            emptied(redis)
        with trio.fail_after(12):
            await insist(ann, "last")
            await hear_of(bob, "gap")
            await hear_of(bob, "message", text="last")


async def test_what_was_stored_when_redis_died_is_not_refused(serve, redis):
    """The reply is lost, and Redis comes back at once with what it has stored."""
    with Line(redis.port) as line:
        a = serve("--redis", f"redis://127.0.0.1:{line.port}", *TOGETHER)
        b = serve("--redis", redis.url, *TOGETHER)
        async with person(a, "Ann") as ann, person(b, "Bob") as bob:
            said = await say_and_hear(ann)
            await hear_of(bob, "message", text=said["text"])
            line.stall()
            await say(ann, "one")
            newest = "XREVRANGE chatstream:2:room + - COUNT 1"
            await until(lambda: b"one" in redis.do(newest))
            redis.stop()
            line.cut()
            line.flow()
            await trio.sleep(0.4)
            redis.start()
            await say(ann, "two")
            for member in (ann, bob):
                heard = []
                while heard[-1:] != ["two"]:
                    found = await event(member)
                    if found["type"] in ("message", "error", "gap"):
                        heard.append(found.get("text", found["type"]))
                assert heard == ["one", "two"]


def test_thousands_of_messages_fit_into_one_batch(redis):
    """As many as there are members who speak at the same time, while Redis is slow."""
    keys = [f"chatstream:2:{name}" for name in ("room", "room:comings", "presence", "said:me")]
    said = ["message", '[1, ["message", "Ann", "hello", null]]'] * 4100
    late = str(time.time() + 60)
    done = redis.command("EVAL", chatstream.LUA + chatstream.SAY, str(len(keys)), *keys,
                         late, "room-1", "0", "me", "1", *said)  # fmt: skip
    assert done == b":1\r\n"
    assert b"\r\nplace\r\n$4\r\n4099\r\n" in redis.do(f"XREVRANGE {keys[0]} + - COUNT 1")


async def while_away(a, b, upstream, away, kept=True):
    """What must hold before, during and after an absence of Redis."""
    gates = Gate(), Gate()
    prompt = upstream.script(*answer("a ", gates[0], "b ", gates[1], "c"))
    async with person(a, "Ann") as ann, person(b, "Bob") as bob, asked(a, prompt) as here:
        said = await say_and_hear(ann)
        await hear_of(bob, "message", text=said["text"])
        async with stream("GET", at(b, here)) as there:
            first = await there.events(1)
            assert await here.events(1) == first
            with away():
                await say(ann, "into the void")
                assert (await hear_of(ann, "error"))["error"]["code"] == "not_stored"
                gates[0].open()
                rest = await here.events(1)  # its own reader does not notice
                assert (await fetch("GET", b.http + "/healthz")).status == 200
            with trio.fail_after(5):
                await insist(ann, "well again")
                await hear_of(bob, "message", text="well again")
            gates[1].open()
            rest += await here.events()
            assert text_of(first + rest) == "a b c"
            assert await there.events() == rest
        if kept:
            async with person(b, "Cid") as cid:
                texts = await hear_texts(cid, 2)
            assert texts == [said["text"], "well again"]


async def test_redis_goes_away_and_comes_back(pair, redis, upstream):
    @contextlib.contextmanager
    def away():
        redis.stop()
        yield
        redis.start()

    await while_away(*pair, upstream, away)


async def test_redis_hangs_for_a_while(pair, redis, upstream):
    await while_away(*pair, upstream, lambda: frozen(redis.process))


async def test_connections_that_break_are_replaced_for_ever(serve, redis, upstream):
    """With places for four of them, and more than four breaks."""
    flags = ("--redis", f"{redis.url}?max_connections=4", *TOGETHER)
    a, b = (serve(*flags, env={"OPENAI_BASE_URL": upstream.url}) for _ in range(2))
    for _ in range(6):
        await until(lambda: redis.do("CLIENT LIST").count(b"cmd=xread") == 2)
        redis.do("CLIENT KILL TYPE normal")
    with trio.fail_after(10):
        await works(a, b, upstream)


async def test_an_answer_that_is_forgotten_while_redis_is_away_ends_elsewhere(
    serve, redis, upstream
):
    flags, env = ("--redis", redis.url, *TOGETHER), {"OPENAI_BASE_URL": upstream.url}
    a, b = serve(*flags, "--keep", "0.3", env=env), serve(*flags, env=env)
    async with read_by_both((a, b), upstream) as (here, there, gate, _):
        await trio.sleep(1.2)  # a beat, with which its reader is known
        redis.stop()
        gate.open()
        rest = await here.events()
        await trio.sleep(3)  # forgotten, and one attempt to reach Redis after that
        redis.start()
        with trio.fail_after(8):
            assert await there.events() == rest


async def test_a_redis_that_hangs_does_not_delay_the_head(pair, redis, upstream):
    """The model is slow, too: clients that give up after 5 s must see both."""
    with frozen(redis.process), trio.fail_after(5):
        async with asked(pair[0], upstream.script(Gate())) as here:
            assert here.status == 200


async def test_a_stop_does_not_wait_for_a_redis_that_hangs(pair, redis):
    a, _ = pair
    async with person(a) as ann:
        with frozen(redis.process):
            for word in ("one", "two"):
                await say(ann, word)
            a.signal()
            assert await a.exit_code(1 + 3) == 0


async def test_redis_comes_back_empty(pair, redis, upstream):
    @contextlib.contextmanager
    def away():
        redis.stop()
        yield
        redis.forget()
        redis.start()

    await while_away(*pair, upstream, away, kept=False)


# ------------------------------------------------------------------- what is not ours

HUGE = "[" * 20_000
JUNK = [
    ["XADD", "{}", "*", "foreign", "field"],
    ["XADD", "{}", "*", b"\xff\xfe", b"\xc3("],
    ["XADD", "{}", "9999999999999-0", "room", "x", "place", "x", "from", "y"],
    ["XADD", "{}", "*", "room", "x", "place", "1", "after", "0", "at", "1", "members", "1",
     "said", "{", "from", "y", "state", '[{"members": "x"}, [], []]'],
    *(["XADD", "{}", "*", "room", "x", "place", n, "after", n, "at", "1", "members", n,
       "said", '[1, ["message", "x", "y", null]]', "from", n, "to", n, "events", "[]", "end", "",
       "state", "[]"] for n in ("1.5", "1_0", "inf")),
    ["XADD", "{}", "*", "room", "x", "place", "1", "after", "0", "at", "1", "members", "1",
     "said", HUGE, "from", "y", "state", HUGE],
]  # fmt: skip
FULL = [["XADD", "{}", "18446744073709551615-18446744073709551615", "nothing", "follows"]]
WRONG_TYPES = [["DEL", "{}"], ["SET", "{}", "mine"]]


def spoil(redis, key, commands):
    for command in commands:
        redis.command(*(part.replace("{}", key) if isinstance(part, str) else part
                        for part in command))  # fmt: skip


async def works(a, b, upstream):
    """The room and an answer, from either process to the other."""
    prompt = upstream.script(*answer("a ", "b"))
    async with person(a) as ann, person(b) as bob, asked(a, prompt) as here:
        await insist(ann, "from a")
        await hear_of(bob, "message", text="from a")
        await insist(bob, "from b")
        await hear_of(ann, "message", text="from b")
        events = await here.events()
        assert await fetch_events("GET", at(b, here)) == events


@pytest.mark.parametrize("key", ["room", "state"])
@pytest.mark.parametrize("when", ["before", "while it runs"])
@pytest.mark.parametrize("commands", [JUNK, FULL, WRONG_TYPES], ids=["junk", "full", "wrong type"])
async def test_what_is_not_ours_is_skipped(serve, redis, upstream, key, when, commands):
    key = f"chatstream:2:{key}"
    if when == "before":
        spoil(redis, key, commands)
    a, b = two(serve, redis, upstream)
    if when == "while it runs":
        await works(a, b, upstream)
        spoil(redis, key, commands)
    with trio.fail_after(15):
        await works(a, b, upstream)
    for server in (a, b):
        log = server.log()
        assert "Traceback" not in log
        assert len(re.findall("is not ours", log)) <= 1
        assert not re.search("ERROR|failed in a way", log)
    if commands is JUNK:
        assert "is not ours" in a.log()


async def test_who_else_is_here_is_told_in_whole_numbers(pair, redis):
    redis.do("HSET chatstream:2:presence foreign inf")
    async with person(pair[0]) as ann:
        with trio.fail_after(8):
            assert (await hear_of(ann, "joined"))["members"] == 1


async def test_an_answer_whose_writer_has_no_name(both, quiet_redis):
    name = "f" * 32
    quiet_redis.command("XADD", f"chatstream:2:answer:{name}", "*",
                        "head", '[[], 1, true, "m", false, ""]', "to", "0")  # fmt: skip
    async with stream("GET", f"{both[0].http}/answers/{name}") as response:
        assert response.status == 200
        assert error_of(await response.events())["type"] == "upstream_error"


async def test_an_answer_is_fetched_once_however_many_ask(pair, redis, upstream):
    a, b = pair
    async with asked(a, upstream.script(*answer("a ", "b"))) as here:
        events = await here.events()
    redis.do("CONFIG RESETSTAT")

    async def follow():
        assert await fetch_events("GET", at(b, here)) == events

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(follow)
    assert b"cmdstat_xrange:calls=1," in redis.do("INFO commandstats")


@pytest.mark.parametrize("key", ["room:comings", "presence"])
async def test_a_key_of_another_type_is_replaced(pair, redis, upstream, key):
    a, b = pair
    await works(a, b, upstream)
    spoil(redis, f"chatstream:2:{key}", WRONG_TYPES)
    with trio.fail_after(15):
        await works(a, b, upstream)
    assert "Traceback" not in a.log() + b.log()


@pytest.mark.parametrize("commands", [JUNK, FULL, WRONG_TYPES], ids=["junk", "full", "wrong type"])
async def test_what_is_not_ours_in_an_answer(pair, redis, upstream, commands):
    a, b = pair
    async with read_by_both(pair, upstream) as (here, there, gate, key):
        spoil(redis, key, commands)
        gate.open()
        rest = await here.events()
        with trio.fail_after(10):
            assert await there.events() == rest
    assert "Traceback" not in a.log() + b.log()
    await works(a, b, upstream)


async def test_an_event_that_is_no_text_ends_nothing(pair, redis, upstream):
    """It is heard as the text that it can be, and what follows it, too."""
    a, b = pair
    async with read_by_both(pair, upstream) as (here, there, gate, key):
        events = ["from", "1", "to", "2", "events", '[[5,"told"]]', "end", ""]
        redis.command("XADD", key, "*", *events)
        with trio.fail_after(8):
            await there.event()
            gate.open()
            assert (await there.events())[-1].data == "[DONE]"
            assert (await here.events())[-1].data == "[DONE]"
    assert "Traceback" not in a.log() + b.log()
    await works(a, b, upstream)


async def test_numbers_where_the_room_has_texts_end_nothing(pair, redis, upstream):
    a, b = pair
    async with person(a) as ann, person(b) as bob, raw_member(b.ws) as plain:
        await insist(ann, "before")
        await hear_of(bob, "message", text="before")
        said = '[1,["message",6,7,8]]'
        entry = ["room", "x", "place", "1", "after", "0", "said", said]
        redis.command("XADD", "chatstream:2:room", "*", *entry)
        with trio.fail_after(8):
            await insist(ann, "after")
            await hear_of(bob, "message", text="after")
            while b"after" not in (await read_frame(plain))[1]:
                pass
    assert not re.search("Traceback|failed in a way", a.log() + b.log())
    await works(a, b, upstream)


async def test_half_a_pair_of_surrogates_is_text_to_all(both):
    a, b = both
    async with person(a) as ann, person(b) as bob:
        await ann.send_message(r'{"text": "half \ud800", "key": "\udfff"}')
        while not (await event(bob)).get("text", "").startswith("half "):
            pass
        await say_and_hear(ann)


# --------------------------------------------------------------- when processes stand still


@pytest.mark.parametrize("seconds", [1, 8])
async def test_a_process_that_stood_still_goes_on(pair, upstream, seconds):
    """For a moment, nobody notices; for longer, its answers end for everybody."""
    a, b = pair
    gate = Gate()
    prompt = upstream.script(*answer("a ", gate, "b"))
    async with person(a, "Ann") as ann, person(b, "Bob") as bob, asked(a, prompt) as here:
        first = await here.events(1)
        async with stream("GET", at(b, here)) as there:
            assert await there.events(1) == first
            with frozen(a.process):
                await trio.sleep(seconds)
            if seconds == 1:
                gate.open()
            ended = await there.events()
        if seconds == 1:
            assert ended == await here.events()
            assert text_of(first + ended) == "a b"
        else:
            assert error_of(ended)["type"] == "upstream_error"
            assert error_of(await here.events())["type"] == "upstream_error"
            await until(lambda: closed(upstream, prompt), SOON)
        await insist(ann, "awake")
        await hear_of(bob, "message", text="awake")
        await trio.sleep(1.2)  # a beat: its members count again
        async with person(b, "Cid"):
            assert (await hear_of(bob, "joined", name="Cid"))["members"] == 3
    assert "Traceback" not in a.log() + b.log()


async def test_who_comes_to_a_process_that_slept_hears_nothing_twice(pair):
    """It has heard more elsewhere than this process, which has just woken up."""
    a, b = pair
    async with person(a, "Ann") as ann, person(b, "Bob") as bob:
        said = await say_and_hear(ann)
        await hear_of(bob, "message", text=said["text"])
        with frozen(b.process):
            for _ in range(50):
                said = await say_and_hear(ann)
                await trio.sleep(0.05)  # longer than Redis may be silent
        async with person(b, "Cid", after=said["id"]) as cid:
            await say(ann, "new")
            heard = [await event(cid)]
            while heard[-1].get("text") != "new":
                heard.append(await event(cid))
            assert not [found for found in heard[:-1] if found["type"] in ("message", "gap")]


async def test_an_answer_that_was_refused_here_is_nobody_elses(serve, redis, upstream):
    """It is found in Redis only, where it says that this process writes it."""
    env = {"OPENAI_BASE_URL": upstream.url}
    server = serve("--redis", redis.url, *TOGETHER, env=env, program=program(SILENCE=0.5))
    prompt = upstream.script(plain(429, {"error": {"message": "no"}}))
    async with person(server) as ann:
        await hear_of(ann, "joined")
        async with asked(server, prompt) as response:
            assert response.status == 429
            url = at(server, response)
        async with stream("GET", url) as again:
            with trio.fail_after(12):
                await again.events()
            await trio.sleep(1.2)  # a beat
        await say(ann, "still here")
        assert (await event(ann))["type"] == "message"


async def test_members_of_the_dead_are_forgotten_by_who_comes_later(serve, redis, upstream):
    a = serve("--redis", redis.url, *TOGETHER)
    async with person(a), person(a):
        a.signal(signal.SIGKILL)
        await a.exit_code(5)
    b = serve("--redis", redis.url, *TOGETHER)
    with trio.fail_after(10):
        async with person(b, "Bob") as bob:
            while (await event(bob)).get("members") != 1:
                pass
    assert (await fetch("GET", b.http + "/healthz")).json["members"] == 0


# ------------------------------------------------------------------------- without it

WITHOUT = """
import sys
sys.path.insert(0, {root!r})
sys.modules["coredis"] = None
import chatstream
sys.exit(chatstream.main())
"""


async def test_without_the_flag_coredis_is_not_wanted(serve):
    server = serve(program=[sys.executable, "-c", WITHOUT.format(root=str(ROOT))])
    assert (await fetch("GET", server.http + "/time")).status == 200


def test_with_the_flag_it_is_asked_for_in_one_line():
    program = [sys.executable, "-c", WITHOUT.format(root=str(ROOT))]
    flags = ["--port", "0", "--room-port", "0", "--redis", "redis://localhost"]
    done = subprocess.run(program + flags, check=False, capture_output=True, text=True, timeout=15)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "chatstream: --redis needs coredis: pip install 'chatstream[redis]'"
    ]
