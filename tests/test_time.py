"""What takes seconds to hours, on a server whose clock the tests turn."""

import json

import pytest
import trio
from kit import (
    CHAT,
    DONE,
    FORMATS,
    HOLD,
    OPENAI,
    PING,
    PONG,
    ROOM_PROTOCOL,
    TEXT,
    Cut,
    Gate,
    ask,
    asking,
    connect,
    delta,
    error_of,
    fetch,
    fetch_events,
    frame,
    health,
    leaps,
    passes,
    plain,
    raw_member,
    read_frame,
    sse,
    stream,
    text_of,
    turned,
    until,
)

KEEP_ALIVE = 4  # seconds of silence; it may take a second more
HEAD_WAIT = 4  # for the model's consent, before the stream starts without it
LINGER, KEEP, PATIENCE = 60, 600, 600  # unless a flag says otherwise
HEAD, BODY_PIECE, BODY, IDLE, PING_EVERY = 10, 10, 120, 75, 20


@pytest.fixture(scope="module")
def server(shared, upstream):
    env = {"OPENAI_BASE_URL": upstream.url}
    return shared("--model", "scripted", program=turned(), env=env)


# ------------------------------------------------------------------------- the clock


async def test_seconds_that_a_suspended_machine_missed_are_made_up_for(server):
    async with stream("GET", server.http + "/clock") as clock:
        first = await clock.event()
        await leaps(server, 30)
        events = await clock.events(32)
    assert [event.n for event in events] == list(range(first.n + 1, first.n + 33))
    assert {event.type for event in events} == {"message"}


async def test_a_night_of_sleep_is_a_gap(server):
    async with stream("GET", server.http + "/clock") as clock:
        last = await clock.event()
        await leaps(server, 28_800)
        while (event := await clock.event()).type == "message":  # before the night
            last = event
        following = await clock.event()
    assert event.type == "gap"
    assert 28_800 - 62 <= event.json["missed"] <= 28_800
    assert following.n == last.n + event.json["missed"] + 1


# --------------------------------------------------------------------------- silence


@FORMATS
@pytest.mark.parametrize(
    ("seconds", "least", "most"),
    [(KEEP_ALIVE - 1, 0, 0), (KEEP_ALIVE + 1.5, 1, 1), (15 * KEEP_ALIVE, 12, 15)],
)
async def test_silence_is_broken_every_4_seconds(server, upstream, path, seconds, least, most):
    gate = Gate()
    prompt = upstream.script(*sse(delta("Hm. "), gate, delta("Yes.", "stop"), DONE))
    async with stream("POST", server.http + path, None, ask(prompt)) as response:
        first = await response.event()
        while not text_of([first]):  # a format's own beginning
            first = await response.event()
        await passes(server, seconds)
        gate.open()
        await response.events()
    assert response.comments.count(": keep-alive") == len(response.comments)
    assert least <= len(response.comments) <= most


async def test_a_clock_needs_no_keep_alive(server):
    async with stream("GET", server.http + "/clock") as clock:
        await passes(server, 50)
        await clock.events(50)
        assert clock.comments == []


async def test_a_member_hears_a_heartbeat_every_4_seconds(server):
    protocol = {"Sec-WebSocket-Protocol": ROOM_PROTOCOL}
    async with raw_member(server.ws, protocol) as member:
        await passes(server, 4 * KEEP_ALIVE + 1)
        await member.send(frame(TEXT, json.dumps({"text": "last"}).encode()))
        heard = []
        while not heard or heard[-1].get("text") != "last":
            opcode, payload = await read_frame(member)
            heard += [json.loads(payload)] if opcode == TEXT else []
    beats = [said for said in heard if said["type"] == "heartbeat"]
    assert 3 <= len(beats) <= 4


# ------------------------------------------------------------- an upstream that waits


@FORMATS
async def test_after_4_seconds_without_a_head_the_stream_starts_anyway(server, upstream, path):
    gate = Gate()
    prompt = upstream.script(gate, *sse(delta("At last.", "stop"), DONE))
    async with connect(server.http) as connection:
        await connection.ask("POST", path, None, ask(prompt))
        await until(lambda: upstream.asked(prompt))
        await passes(server, HEAD_WAIT - 1)
        assert connection.silent
        await passes(server, 1.5)
        response = await connection.response()
        assert response.status == 200
        await passes(server, 3 * KEEP_ALIVE)
        gate.open()
        events = await response.events()
        assert response.comments.count(": keep-alive") >= 2
    assert text_of(events) == "At last."
    assert events[-1].data == "[DONE]"


@FORMATS
async def test_a_refusal_that_comes_late_is_an_error_event(server, upstream, path):
    gate = Gate()
    prompt = upstream.script(gate, plain(429, {"error": {"message": "slow down"}}))
    async with connect(server.http) as connection:
        await connection.ask("POST", path, None, ask(prompt))
        await until(lambda: upstream.asked(prompt))
        await passes(server, 11)
        response = await connection.response()
        assert response.status == 200
        gate.open()
        assert error_of(await response.events())["message"] == "slow down"


async def test_a_whole_answer_waits_for_the_refusal_and_has_its_status(server, upstream):
    gate = Gate()
    prompt = upstream.script(gate, plain(429, {"error": {"message": "slow down"}}))
    async with connect(server.http) as connection:
        await connection.ask("POST", OPENAI, None, asking(prompt))
        await until(lambda: upstream.asked(prompt))
        await passes(server, 60)
        assert connection.silent
        gate.open()
        response = await (await connection.response()).read()
    assert response.status == 429
    assert response.error["message"] == "slow down"


async def test_a_list_of_models_that_never_comes_is_504(serve):
    (silent,) = await trio.open_tcp_listeners(0, host="127.0.0.1")  # and never accept
    async with silent:
        url = f"http://127.0.0.1:{silent.socket.getsockname()[1]}/v1"
        server = serve("--upstream", url, program=turned())
        async with connect(server.http) as connection:
            await connection.ask("GET", "/v1/models")
            await passes(server, PATIENCE + 2)
            assert (await connection.response()).status == 504


# ------------------------------------------------- answers that nobody needs any more


async def test_an_ended_answer_is_kept_for_10_minutes(server, upstream):
    prompt = upstream.script(*sse(delta("Short.", "stop"), DONE))
    events = await fetch_events("POST", server.http + OPENAI, None, ask(prompt))
    last = {"Last-Event-ID": events[-1].id}
    url = f"{server.http}/answers/{events[-1].id.rpartition('-')[0]}"
    await passes(server, KEEP - 2)
    assert (await fetch("GET", url)).status == 200
    assert (await fetch("GET", url, last)).status == 204
    await passes(server, 4)
    assert (await fetch("GET", url)).status == 404
    assert (await fetch("DELETE", url)).status == 404
    again = await fetch("POST", server.http + OPENAI, last, ask(prompt))
    assert again.status == 404
    assert (await health(server))["answers"] == 0


@pytest.mark.parametrize("first", [[], [delta("One, ")]])
async def test_an_answer_outlives_its_last_reader_by_a_minute(server, upstream, first):
    prompt = upstream.script(*sse(*first, HOLD))
    async with stream("POST", server.http + OPENAI, None, ask(prompt)) as response:
        url = f"{server.http}/answers/{response.headers['x-answer-id']}"
    (asked,) = upstream.asked(prompt)
    await nobody_reads(server)
    await passes(server, LINGER - 2)
    assert (await health(server))["answers"] == 1
    assert asked.closed_at is None
    await passes(server, 4)
    await until(lambda: asked.closed_at)
    assert error_of(await fetch_events("GET", url))["type"] == "abandoned"


async def nobody_reads(server):
    with trio.fail_after(5):
        while (await health(server))["readers"]:  # noqa: ASYNC110
            await trio.sleep(0.01)


async def test_a_reader_that_is_back_in_time_keeps_an_answer_alive(server, upstream):
    gate = Gate()
    prompt = upstream.script(*sse(delta("One, "), gate, delta("two.", "stop"), DONE))
    async with stream("POST", server.http + CHAT, None, ask(prompt)) as response:
        url = f"{server.http}/answers/{response.headers['x-answer-id']}"
        await response.event()
    await nobody_reads(server)
    await passes(server, LINGER - 5)
    async with stream("GET", url) as again:
        await passes(server, 3 * LINGER)
        gate.open()
        assert text_of(await again.events()) == "One, two."


# ------------------------------------------------------------------ clients that wait


UNFINISHED = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n" + (
    b"Content-Type: application/json\r\nContent-Length: 999\r\n\r\n"
)


@pytest.mark.parametrize(
    ("began", "seconds"),
    [(b"GET /time HTTP/1.1\r\n", HEAD), (UNFINISHED, BODY_PIECE)],
    ids=["head", "body"],
)
async def test_a_request_that_brings_nothing_for_10_seconds_is_408(server, began, seconds):
    async with connect(server.http) as connection:
        await connection.send(began)
        await passes(server, seconds - 2)
        assert connection.silent
        await passes(server, 4)
        assert (await connection.response()).status == 408


async def test_an_idle_connection_is_kept_for_75_seconds(server):
    async with connect(server.http) as connection:
        await (await connection.request("GET", "/time")).read()
        await passes(server, IDLE - 2)
        await (await connection.request("GET", "/time")).read()
        await passes(server, IDLE + 2)
        with pytest.raises(Cut):
            await connection.receive()


async def test_a_body_may_not_take_longer_than_2_minutes(server):
    async with connect(server.http) as connection:
        await connection.send(UNFINISHED)
        for _ in range(BODY // 5 - 1):
            await connection.send(b" ")
            await passes(server, 5)
            assert connection.silent
        await passes(server, 7)
        assert (await connection.response()).status == 408


async def test_a_member_is_pinged_every_20_seconds_and_must_answer(server):
    async with raw_member(server.ws) as member:
        for _ in range(2):
            await passes(server, PING_EVERY + 1)
            opcode, payload = await read_frame(member)
            assert opcode == PING
            await member.send(frame(PONG, payload))
            await fetch("GET", server.http + "/time")  # by then the pong is read
        await passes(server, 2 * PING_EVERY + 2)
        with pytest.raises(Cut):
            await read_to_the_end(member)


async def read_to_the_end(member):
    while True:
        await read_frame(member)
