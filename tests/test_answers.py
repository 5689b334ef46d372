"""The life of an answer: how it starts, who reads it, how it resumes, how it ends."""

import json
import re
import time

import pytest
import trio
from kit import (
    BOOK,
    CHAT,
    DONE,
    FIN,
    FORMATS,
    FULL,
    HOLD,
    OPENAI,
    RESPONSES,
    Gate,
    answer,
    ask,
    asking,
    connect,
    delta,
    error_of,
    fetch,
    fetch_events,
    health,
    plain,
    program,
    resident,
    response_stream,
    sse,
    stream,
    text_of,
    told,
    until,
)

WORDS = ["Long ", "connections ", "are ", "\u4f60\u597d ", "fun."]
SOON = 1.0  # seconds: "at once", and the 0.5 s after the linger, on a busy machine
LINGER = 0.4  # the relay's


# -------------------------------------------------------------------------- the demo


@FORMATS
async def test_an_answer_comes_piece_by_piece_and_ends_with_done(demo, path):
    async with stream("POST", demo.http + path, None, ask("Hello")) as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache, no-transform"
        assert response.headers["x-accel-buffering"] == "no"
        began, arrived, events = time.monotonic(), [], []
        while event := await response.event():
            events.append(event)
            arrived.append(time.monotonic() - began)
    assert [e.data for e in events].index("[DONE]") == len(events) - 1
    assert len({round(at, 2) for at in arrived}) > 10  # spread over time
    assert {e.type for e in events} == {"message"}
    assert len(text_of(events)) > 50


async def test_each_event_of_the_plain_format_carries_a_string_content(quick_demo):
    *events, _ = await fetch_events("POST", quick_demo.http + CHAT, None, ask("Hello"))
    assert all(isinstance(event.json["content"], str) for event in events)


async def test_the_demo_says_that_it_is_one_and_how_to_plug_in_a_model(quick_demo):
    text = text_of(await fetch_events("POST", quick_demo.http + CHAT, None, ask("Hello")))
    assert "demo" in text.lower()
    assert "OPENAI_BASE_URL" in text or "--upstream" in text


@FORMATS
async def test_the_same_prompt_gets_the_same_text(quick_demo, path):
    texts = set()

    async def note():
        url = quick_demo.http + path
        texts.add(text_of(await fetch_events("POST", url, None, ask("Again"))))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(note)
    assert len(texts) == 1


async def test_chinese_is_answered_in_chinese_character_by_character(quick_demo):
    body = ask("你好，请介绍一下长连接")
    events = await fetch_events("POST", quick_demo.http + CHAT, None, body)
    pieces = [event.json["content"] for event in events[:-1]]
    chinese = [piece for piece in pieces if re.search("[\u4e00-\u9fff]", piece)]
    assert len(chinese) > 20
    assert all(len(re.findall("[\u4e00-\u9fff]", piece)) == 1 for piece in chinese)


async def test_chunks_are_well_formed(quick_demo):
    body = ask("Hello", model="demo")
    *events, done = await fetch_events("POST", quick_demo.http + OPENAI, None, body)
    chunks = [event.json for event in events]
    assert done.data == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert len({chunk["created"] for chunk in chunks}) == 1
    assert abs(chunks[0]["created"] - time.time()) < 60
    assert {chunk["model"] for chunk in chunks} == {"demo"}
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    assert {chunk["choices"][0]["index"] for chunk in chunks} == {0}
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert not any(chunk.get("usage") for chunk in chunks)


async def test_usage_comes_when_asked_for(quick_demo):
    body = ask("Hello", stream_options={"include_usage": True})
    *_, last, done = await fetch_events("POST", quick_demo.http + OPENAI, None, body)
    assert done.data == "[DONE]"
    assert last.json["choices"] == []
    check_usage(last.json["usage"])


def check_usage(usage):
    assert usage["prompt_tokens"] > 0
    assert usage["completion_tokens"] > 10
    total = usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["total_tokens"] == total


@pytest.mark.parametrize("fields", [{}, {"stream": False}])
async def test_an_answer_that_is_not_streamed_says_the_same(quick_demo, fields):
    response = await fetch("POST", quick_demo.http + OPENAI, None, asking("Hello", **fields))
    assert response.status == 200
    whole = response.json
    assert whole["object"] == "chat.completion"
    assert whole["model"] == "demo"
    (choice,) = whole["choices"]
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert choice["message"]["role"] == "assistant"
    check_usage(whole["usage"])
    events = await fetch_events("POST", quick_demo.http + OPENAI, None, ask("Hello"))
    assert choice["message"]["content"] == text_of(events)


async def test_the_models(demo):
    models = (await fetch("GET", demo.http + "/v1/models")).json
    assert models["object"] == "list"
    (model,) = models["data"]
    assert (model["id"], model["object"]) == ("demo", "model")
    assert {"created", "owned_by"} <= set(model)


# ------------------------------------------------------------------ ids and resume


@FORMATS
async def test_ids_name_the_answer_and_count_on(quick_demo, path):
    async with stream("POST", quick_demo.http + path, None, ask("Hello")) as response:
        name = response.headers["x-answer-id"]
        events = await response.events()
    assert {event.id.rpartition("-")[0] for event in events} == {name}
    numbers = [event.n for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


async def test_an_id_cannot_be_guessed(demo):
    names = []
    for _ in range(20):
        async with stream("POST", demo.http + CHAT, None, ask("Hello")) as response:
            names.append(response.headers["x-answer-id"])
    assert len(set(names)) == 20
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{22,64}", name) for name in names)
    assert len({name[:6] for name in names}) == 20  # nor does it start with a clock


@pytest.fixture
async def ended(relay, upstream):
    """ended(path): the URL, the events and the prompt of an answer that has ended."""

    async def make(path, *words):
        prompt = upstream.script(*answer(*(words or WORDS)))
        async with stream("POST", relay.http + path, None, ask(prompt)) as response:
            url = f"{relay.http}/answers/{response.headers['x-answer-id']}"
            return url, await response.events(), prompt

    return make


@FORMATS
async def test_an_ended_answer_is_replayed_in_its_own_format(ended, path):
    url, events, _ = await ended(path)
    assert await fetch_events("GET", url) == events
    assert text_of(events) == "".join(WORDS)


@FORMATS
async def test_resume_after_every_single_id_gives_exactly_the_rest(ended, path):
    url, events, _ = await ended(path)
    for at, event in enumerate(events[:-1], 1):
        head = {"Last-Event-ID": event.id}
        assert await fetch_events("GET", url, head) == events[at:]
        assert await fetch_events("GET", f"{url}?after={event.id}") == events[at:]


@FORMATS
async def test_the_same_post_with_each_id_gives_the_rest_and_costs_nothing(
    relay, upstream, ended, path
):
    _, events, prompt = await ended(path)
    for at, event in enumerate(events[:-1], 1):
        head, body = {"Last-Event-ID": event.id}, ask(prompt)
        assert await fetch_events("POST", relay.http + path, head, body) == events[at:]
    assert len(upstream.asked(prompt)) == 1


@FORMATS
async def test_after_the_last_event_there_is_nothing(relay, upstream, ended, path):
    url, events, prompt = await ended(path)
    head = {"Last-Event-ID": events[-1].id}
    response = await fetch("GET", url, head)
    assert (response.status, response.body) == (204, b"")
    assert len(upstream.asked(prompt)) == 1


@FORMATS
async def test_a_question_repeated_after_the_last_event_gets_an_empty_stream(
    relay, upstream, ended, path
):
    """A client that repeats its POST takes anything but a stream for a failure."""
    _, events, prompt = await ended(path)
    head = {"Last-Event-ID": events[-1].id}
    for body in (ask(prompt), None):
        async with stream("POST", relay.http + path, head, body) as response:
            assert response.status == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            assert await response.events() == []
    assert len(upstream.asked(prompt)) == 1


@pytest.mark.parametrize(
    "last",
    [
        "clock-5",
        "rubbish",
        "-",
        "{name}-",
        "{name}-x",
        "{name}--1",
        "{name}-99999",
        "{name}-" + "9" * 5000,
        "{name}-\xb2",
        "caf\xe9",
    ],
)
async def test_an_answers_id_must_be_right(relay, upstream, ended, last):
    url, _, prompt = await ended(CHAT)
    name = url.rpartition("/")[2]
    head = {"Last-Event-ID": last.format(name=name)}
    for path in (CHAT, OPENAI):
        response = await fetch("POST", relay.http + path, head, ask(prompt))
        assert response.status in (400, 404), path
        assert response.error["message"]
    response = await fetch("GET", url, head)
    assert response.status in (400, 404)
    assert len(upstream.asked(prompt)) == 1


async def test_an_answer_no_longer_known_is_404_and_not_asked_for_again(relay, upstream, ended):
    _, events, prompt = await ended(CHAT)
    head = {"Last-Event-ID": f"{'0' * 32}-{events[0].n}"}
    for path in (CHAT, OPENAI):
        response = await fetch("POST", relay.http + path, head, ask(prompt))
        assert response.status == 404
        assert response.error["message"]
    assert len(upstream.asked(prompt)) == 1


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("name", ["x", "0" * 32, "A" * 5000, "%ff", "%2e%2e"])
async def test_an_unknown_answer_is_404(demo, method, name):
    response = await fetch(method, f"{demo.http}/answers/{name}")
    assert response.status == 404
    assert response.error["message"]


async def test_the_id_of_another_answer_is_no_way_in(ended):
    url, _, _ = await ended(CHAT)
    _, others, _ = await ended(CHAT)
    response = await fetch("GET", url, {"Last-Event-ID": others[0].id})
    assert response.status in (400, 404)


# ------------------------------------------------------------------- several readers


@FORMATS
async def test_readers_that_come_at_any_time_all_read_the_same(relay, upstream, path):
    gates = [Gate() for _ in range(3)]
    words = [step for pair in zip(WORDS, gates, strict=False) for step in pair]
    prompt = upstream.script(*answer(*words, "end"))
    read = []

    async def follow(url):
        read.append(await fetch_events("GET", url))

    async with stream("POST", relay.http + path, None, ask(prompt)) as response:
        url = f"{relay.http}/answers/{response.headers['x-answer-id']}"
        async with trio.open_nursery() as nursery:
            for gate in gates:
                nursery.start_soon(follow, url)
                nursery.start_soon(follow, url)
                await trio.sleep(0.05)
                gate.open()
            events = await response.events()
    assert read == [events] * 6
    assert len(upstream.asked(prompt)) == 1


async def test_one_reader_leaves_and_the_other_reads_to_the_end(relay, upstream):
    gate = Gate()
    prompt = upstream.script(*answer("Hel", gate, "lo"))
    async with stream("POST", relay.http + CHAT, None, ask(prompt)) as first:
        url = f"{relay.http}/answers/{first.headers['x-answer-id']}"
        await first.event()
        async with stream("GET", url) as second:
            await second.event()
            await first.connection.transport.aclose()
            await trio.sleep(LINGER + 0.2)
            gate.open()
            rest = await second.events()
    assert rest[-1].data == "[DONE]"
    assert text_of(rest) == "lo"


# ------------------------------------------------------------------ stopped, abandoned


@FORMATS
async def test_delete_stops_the_upstream_and_tells_every_reader(relay, upstream, path):
    prompt = upstream.script(*sse(delta("Hel"), HOLD))
    async with stream("POST", relay.http + path, None, ask(prompt)) as first:
        url = f"{relay.http}/answers/{first.headers['x-answer-id']}"
        async with stream("GET", url) as second:
            started = [await first.event(), await second.event()]
            assert (await fetch("DELETE", url)).status == 204
            await until(lambda: upstream.asked(prompt)[0].closed_at, SOON)
            for reader in (first, second):
                assert error_of(await reader.events())["type"] == "stopped"
    assert started[0] == started[1]
    assert error_of(await fetch_events("GET", url))["type"] == "stopped"
    assert (await fetch("DELETE", url)).status == 204


@FORMATS
async def test_delete_before_the_first_token(relay, upstream, path):
    prompt = upstream.script(*sse(b": thinking\n", HOLD))
    async with stream("POST", relay.http + path, None, ask(prompt)) as response:
        url = f"{relay.http}/answers/{response.headers['x-answer-id']}"
        assert (await fetch("DELETE", url)).status == 204
        await until(lambda: upstream.asked(prompt)[0].closed_at, SOON)
        assert error_of(await response.events())["type"] == "stopped"


async def test_the_plain_formats_error_has_a_content_too(relay, upstream):
    """So that `text += data.content` never prints undefined."""
    prompt = upstream.script(*sse(delta("Hel"), HOLD))
    async with stream("POST", relay.http + CHAT, None, ask(prompt)) as response:
        await response.event()
        url = f"{relay.http}/answers/{response.headers['x-answer-id']}"
        await fetch("DELETE", url)
        (last,) = await response.events()
    assert last.json["content"] == ""
    assert set(last.json["error"]) == {"message", "type", "param", "code"}


async def test_delete_of_an_ended_answer_changes_nothing(ended):
    url, events, _ = await ended(CHAT)
    assert (await fetch("DELETE", url)).status == 204
    assert await fetch_events("GET", url) == events


LEAVING = {
    "before the head": ([0.2, HOLD], False),
    "before the first token": ([*sse(b": thinking\n\n", HOLD)], False),
    "in the middle": ([*sse(delta("Hel"), HOLD)], True),
}


@FORMATS
@pytest.mark.parametrize("when", LEAVING)
async def test_nobody_pays_for_tokens_that_nobody_reads(relay, upstream, path, when):
    steps, has_begun = LEAVING[when]
    prompt = upstream.script(*steps)
    async with connect(relay.http) as connection:
        body = json.dumps(ask(prompt)).encode()
        with trio.move_on_after(0.3):
            response = await connection.request("POST", path, None, body)
            if has_begun:
                await response.event()
        await until(lambda: upstream.asked(prompt))
    left = time.monotonic()
    await until(lambda: upstream.asked(prompt)[0].closed_at, LINGER + SOON)
    assert upstream.asked(prompt)[0].closed_at - left > LINGER * 0.8


async def test_an_abandoned_answer_says_that_it_is(relay, upstream):
    prompt = upstream.script(*sse(delta("Hel"), HOLD))
    async with stream("POST", relay.http + CHAT, None, ask(prompt)) as response:
        await response.event()
        url = f"{relay.http}/answers/{response.headers['x-answer-id']}"
    await until(lambda: upstream.asked(prompt)[0].closed_at, LINGER + SOON)
    events = await fetch_events("GET", url)
    assert text_of(events) == "Hel"
    assert error_of(events)["type"] == "abandoned"


@FORMATS
@pytest.mark.parametrize("way", ["GET", "POST"])
async def test_who_comes_back_in_time_loses_nothing(relay, upstream, path, way):
    gate = Gate()
    prompt = upstream.script(*answer("Hel", "lo ", gate, "wor", "ld"))
    async with stream("POST", relay.http + path, None, ask(prompt)) as response:
        events = await response.events(2)
        name = response.headers["x-answer-id"]
    await trio.sleep(LINGER / 2)
    url = relay.http + (path if way == "POST" else f"/answers/{name}")
    head, body = {"Last-Event-ID": events[-1].id}, ask(prompt)
    async with stream(way, url, head, body if way == "POST" else None) as response:
        assert response.status == 200
        await trio.sleep(LINGER + 0.2)
        gate.open()
        events += await response.events()
    assert text_of(events) == "Hello world"
    assert [e.n for e in events] == list(range(events[0].n, events[0].n + len(events)))
    assert events[-1].data == "[DONE]"
    assert len(upstream.asked(prompt)) == 1


async def test_an_answer_ends_for_late_readers_within_the_linger(relay, upstream):
    prompt = upstream.script(*answer("Hel", 0.2, "lo"))
    async with stream("POST", relay.http + CHAT, None, ask(prompt)) as response:
        await response.event()
        url = f"{relay.http}/answers/{response.headers['x-answer-id']}"
    await trio.sleep(LINGER + 0.3)
    events = await fetch_events("GET", url)
    assert (text_of(events), events[-1].data) == ("Hello", "[DONE]")


# ------------------------------------------------------------------------ not streamed


async def test_leaving_an_answer_that_is_not_streamed_cancels_it(relay, upstream):
    prompt = upstream.script(HOLD)
    async with connect(relay.http) as connection:
        await connection.ask("POST", OPENAI, None, asking(prompt))
        await until(lambda: upstream.asked(prompt))
        assert upstream.asked(prompt)[0].closed_at is None
    await until(lambda: upstream.asked(prompt)[0].closed_at, LINGER + SOON)


async def test_health_forgets_what_has_ended(relay, upstream):
    prompt = upstream.script(*sse(delta("Hel"), HOLD))
    before = (await fetch("GET", relay.http + "/healthz")).json["answers"]
    async with stream("POST", relay.http + CHAT, None, ask(prompt)) as response:
        await response.event()
        during = (await fetch("GET", relay.http + "/healthz")).json["answers"]
        assert during == before + 1
    await until(lambda: upstream.asked(prompt)[0].closed_at, LINGER + SOON)
    await trio.sleep(0.2)
    assert (await fetch("GET", relay.http + "/healthz")).json["answers"] == before


# ---------------------------------------------------------------------------- how many


@pytest.fixture
def many(serve, second_upstream):
    """A server that keeps abandoned answers running, and its upstream."""
    env = {"OPENAI_BASE_URL": second_upstream.url}
    return serve("--linger", "60", "--grace", "0", env=env)


async def test_the_thousand_and_first_answer_takes_the_place_of_one_that_nobody_reads(
    many, second_upstream
):
    body = ask(second_upstream.script(*sse(delta("Hel"), HOLD)))

    async def start(_):
        async with stream("POST", many.http + CHAT, None, body) as response:
            assert response.status == 200
            await response.event()
            names.append(response.headers["x-answer-id"])

    names = []
    await in_turns(start, 1000)
    async with stream("POST", many.http + CHAT, None, body) as response:
        assert response.status == 200
        endings = [await fetch("DELETE", f"{many.http}/answers/{name}") for name in names[:3]]
        assert {ending.status for ending in endings} == {204}
    ended = await fetch_events("GET", f"{many.http}/answers/{names[0]}")
    assert error_of(ended)["type"] in ("abandoned", "stopped")


async def in_turns(action, count, at_once=50):
    """Do it so many times, some at a time."""
    limit = trio.CapacityLimiter(at_once)

    async def limited(number):
        async with limit:
            await action(number)

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(limited, number)


async def test_300_answers_at_once_are_all_complete(many, second_upstream):
    """At 20 tokens a second each, after all have begun: none waits for a pool."""
    words, gate, begun, texts = [f"{n} " for n in range(40)], Gate(), [], []
    paced = [step for word in words for step in (0.05, word)]
    body = ask(second_upstream.script(*answer("first ", gate, *paced)))

    async def read():
        async with stream("POST", many.http + CHAT, None, body) as response:
            begun.append(await response.event())
            if len(begun) == 300:
                gate.open()
            events = await response.events()
            assert events[-1].data == "[DONE]"
            texts.append(text_of(events))

    async with trio.open_nursery() as nursery:
        for _ in range(300):
            nursery.start_soon(read)
    assert texts == ["".join(words)] * 300


async def test_a_slow_reader_of_an_answer_delays_no_other(relay, upstream):
    gate = Gate()
    much = [delta("x" * 100_000)] * 100
    prompt = upstream.script(*sse(delta("a"), gate, *much, delta(finish="stop"), DONE))
    async with stream("POST", relay.http + CHAT, None, ask(prompt)) as slow:
        await slow.event()
        url = f"{relay.http}/answers/{slow.headers['x-answer-id']}"
        async with stream("GET", url) as quick:
            gate.open()
            events = await quick.events()
            assert events[-1].data == "[DONE]"
        rest = await slow.events()  # and it has lost nothing
    assert rest == events[1:]


async def test_a_failed_answer_is_kept_for_late_readers_too(relay, upstream):
    prompt = upstream.script(*sse(delta("Hel"), FIN))
    async with stream("POST", relay.http + CHAT, None, ask(prompt)) as response:
        url = f"{relay.http}/answers/{response.headers['x-answer-id']}"
        events = await response.events()
    assert error_of(events)["type"] == "upstream_error"
    assert await fetch_events("GET", url) == events
    head = {"Last-Event-ID": events[0].id}
    assert await fetch_events("GET", url, head) == events[1:]


PUT_AWAY = {
    "whole": [*map(delta, WORDS), delta(finish="stop"), DONE],
    "cut": [delta("Hel"), FIN],
    "in strange characters": [
        b'data: {"choices": [{"index": 0, "delta": {"content": "\\ud800 \\u2028 \\u0000"}}]}\n\n',
        *(delta("\u2028\n\n你好"), delta(finish="stop"), DONE),
    ],
}


@FORMATS
@pytest.mark.parametrize("how", PUT_AWAY)
async def test_an_answer_that_nobody_has_read_for_a_while_is_still_the_same(
    relay, upstream, path, how
):
    prompt = upstream.script(*sse(*PUT_AWAY[how]))
    head = {"Idempotency-Key": f"{path} {how}"}
    async with stream("POST", relay.http + path, head, ask(prompt)) as response:
        url = f"{relay.http}/answers/{response.headers['x-answer-id']}"
        events = await response.events()
    for _ in range(2):  # put away, read, and put away again
        await trio.sleep(0.6)
        assert await fetch_events("GET", url) == events
        assert await fetch_events("POST", relay.http + path, head, ask(prompt)) == events
    for at, event in enumerate(events[:-1], 1):
        assert await fetch_events("GET", url, {"Last-Event-ID": event.id}) == events[at:]
    await trio.sleep(0.6)
    assert (await fetch("DELETE", url)).status == 204
    assert await fetch_events("GET", url) == events
    assert len(upstream.asked(prompt)) == 1


async def test_a_late_refusal_is_kept_for_who_was_cut_off(serve, upstream):
    """The stream had begun, because the upstream took its time to say no."""
    server = serve("--upstream", upstream.url, "--model", "scripted")
    no = {"error": {"message": "Used up."}}
    prompt = upstream.script(5, plain(429, no))
    head = {"Idempotency-Key": "late"}
    async with stream("POST", server.http + OPENAI, head, ask(prompt)) as response:
        name = response.headers["x-answer-id"]  # after 4 s; and then the network is gone
    await trio.sleep(1.5)
    events = await fetch_events("GET", f"{server.http}/answers/{name}")
    assert error_of(events)["message"] == "Used up."
    async with stream("POST", server.http + OPENAI, head, ask(prompt)) as response:
        assert response.headers["x-answer-id"] != name  # a refusal frees its key


async def test_ended_answers_are_forgotten_the_oldest_first(serve, upstream):
    limits = {"ANSWERS_BYTES": 4_000_000}
    env = {"OPENAI_BASE_URL": upstream.url}
    server = serve("--model", "scripted", program=program(**limits), env=env)
    long = [delta("x" * 300_000)] * 3  # with its overhead, a million bytes or less
    prompt = upstream.script(*sse(*long, delta(finish="stop"), DONE))
    names = []
    for _ in range(7):
        async with stream("POST", server.http + OPENAI, None, ask(prompt)) as response:
            names.append(response.headers["x-answer-id"])
            assert (await response.events())[-1].data == "[DONE]"
    known = [(await fetch("GET", f"{server.http}/answers/{n}")).status for n in names]
    assert known == sorted(known, reverse=True)
    assert known[0] == 404
    assert known[-3:] == [200, 200, 200]


async def test_when_memory_is_full_the_answer_that_was_left_first_makes_room(serve, upstream):
    limits = program(ANSWERS_BYTES=2_000_000)
    server = serve("--upstream", upstream.url, "--model", "scripted", program=limits)
    prompt = upstream.script(*sse(delta("x" * 200_000), HOLD))
    names = []

    async def start(_):
        body = ask(prompt, user="y" * 300_000)
        async with stream("POST", server.http + OPENAI, None, body) as response:
            assert response.status == 200
            assert (await response.event()).json["choices"]
            names.append(response.headers["x-answer-id"])

    async with stream("POST", server.http + OPENAI, None, ask(prompt)) as read:
        await read.event()
        for n in range(10):
            await start(n)
        left = (await health(server))["answers"]
        body = ask(prompt, user="y" * 3_000_000)
        too_long = await fetch("POST", server.http + OPENAI, None, body)
        if not FULL:
            assert too_long.status == 503
            assert (await health(server))["answers"] == left  # none was stopped for nothing
            async with stream("GET", f"{server.http}/answers/{names[0]}") as first:
                assert first.status == 404
        for name in (read.headers["x-answer-id"], *names[-3:]):
            async with stream("GET", f"{server.http}/answers/{name}") as again:
                assert (await again.event()).json["choices"]
        await in_turns(start, 10, at_once=3)
        url = f"{server.http}/answers/{read.headers['x-answer-id']}"
        assert (await fetch("DELETE", url)).status == 204
        assert error_of(await read.events())["type"] == "stopped"


async def test_an_old_answer_is_read_again_though_memory_is_nearly_full(serve, upstream):
    """It was put away, and takes twice as much when it is read."""
    limits = program(ANSWERS_BYTES=150_000)
    server = serve("--upstream", upstream.url, "--model", "scripted", program=limits)
    short = upstream.script(*answer(*["x"] * 1300))
    full = upstream.script(*answer("y" * 90_000))
    for _ in range(3):
        async with stream("POST", server.http + CHAT, None, ask(short)) as response:
            url = f"{server.http}/answers/{response.headers['x-answer-id']}"
            events = await response.events()
        assert text_of(events) == "x" * 1300
        await trio.sleep(0.5)  # put away
        assert len(await fetch_events("POST", server.http + CHAT, None, ask(full))) == 2
        assert await fetch_events("GET", url) == events


async def test_a_response_in_the_background_is_put_away_at_its_end(serve, upstream):
    """It takes a third then: more of them are still known."""
    limits = program(ANSWERS_BYTES=1_000_000)
    server = serve("--upstream", upstream.url, "--model", "scripted", program=limits)
    created, *_, end = response_stream(["Hi"])
    steps = [created, *[{"type": "x"}] * 550, end]
    body = {"input": upstream.script(*told(BOOK, steps)), "stream": True, "background": True}
    urls = []
    for n in range(15):
        created, *_ = await fetch_events("POST", server.http + RESPONSES, None, body)
        urls.append(f"{server.http}{RESPONSES}/{created.json['response']['id']}")
        if n % 5 == 4:
            await trio.sleep(0.5)
    assert {(await fetch("GET", url)).status for url in urls} == {200}


async def test_what_is_left_of_a_stopped_answer_is_small(serve):
    """Neither what the demo would have said, nor the objects that an answer was."""
    server = serve()
    body = {"input": "What is SSE?", "stream": True}

    async def ask_and_stop(count):
        for _ in range(count):
            async with stream("POST", server.http + "/v1/responses", None, body) as response:
                name = response.headers["x-answer-id"]
            assert (await fetch("DELETE", f"{server.http}/answers/{name}")).status == 204

    await ask_and_stop(300)  # what a server needs once
    before = resident(server.process.pid)
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(ask_and_stop, 400)
    await trio.sleep(0.5)
    assert (resident(server.process.pid) - before) / 1600 < 2500
