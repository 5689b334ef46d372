"""Idempotency-Key: a question that is repeated is not asked again."""

import re

import pytest
import trio
from kit import (
    BOOK,
    CHAT,
    DONE,
    OPENAI,
    PROTOCOLS,
    RESPONSES,
    WORDS,
    Gate,
    answer,
    asking,
    chat_whole,
    connect,
    delta,
    fetch,
    fetch_events,
    plain,
    sse,
    stream,
    told,
    until,
)

MINE, YOURS = ({"Authorization": f"Bearer {who}-0123456789"} for who in ("me", "you"))


@pytest.fixture(scope="module")
def open_relay(shared, upstream):
    """A relay without a key: clients are told apart by their own."""
    return shared("--upstream", upstream.url, "--model", "scripted", "--linger", "0.4")


def keyed(key, caller=MINE):
    return caller | {"Idempotency-Key": key}


def question(name, prompt, streamed):
    if name == "page":
        return CHAT, asking(prompt)
    protocol = PROTOCOLS[name]
    return protocol.path, protocol.ask(prompt) | {"stream": streamed}


def steps_for(name, streamed):
    protocol = PROTOCOLS["chat" if name == "page" else name]
    if streamed:
        return list(told(BOOK._replace(done=True), protocol.stream()))
    return [plain(200, protocol.whole())]


CASES = [("page", True)]
CASES += [(name, streamed) for name in PROTOCOLS for streamed in (True, False)]


@pytest.mark.parametrize(("name", "streamed"), CASES)
async def test_the_same_question_again_gets_the_same_answer(open_relay, upstream, name, streamed):
    prompt = upstream.script(*steps_for(name, streamed))
    path, body = question(name, prompt, streamed)
    url, head = open_relay.http + path, keyed(f"again {name} {streamed}")
    first, again = [await told_by(url, head, body, streamed) for _ in range(2)]
    assert first == again
    (heard,) = upstream.asked(prompt)
    assert heard.headers["idempotency-key"] == head["Idempotency-Key"]


async def told_by(url, head, body, streamed):
    """(its id, what it says) of an answer."""
    async with stream("POST", url, head, body) as response:
        assert response.status == 200
        said = await response.events() if streamed else (await response.read()).json
    return response.headers["x-answer-id"], said


async def test_a_repeat_follows_the_answer_that_is_under_way(open_relay, upstream):
    """The first connection broke before its first token."""
    gate = Gate()
    prompt = upstream.script(gate, *steps_for("chat", True))
    path, body = question("chat", prompt, True)
    url, head = open_relay.http + path, keyed("under way")
    with trio.move_on_after(0.3):
        await fetch("POST", url, head, body)
    gate.open()
    events = await fetch_events("POST", url, head, body)
    assert events[-1].data == "[DONE]"
    assert len(upstream.asked(prompt)) == 1


@pytest.mark.parametrize("streamed", [True, False])
async def test_those_who_ask_at_once_share_one_answer(open_relay, upstream, streamed):
    gate = Gate()
    prompt = upstream.script(gate, *steps_for("chat", streamed))
    path, body = question("chat", prompt, streamed)
    said = []

    async def ask_it():
        head = keyed(f"at once {streamed}")
        said.append((await fetch("POST", open_relay.http + path, head, body)).body)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(ask_it)
        await until(lambda: upstream.asked(prompt))
        gate.open()
    assert len(set(said)) == 1
    assert len(upstream.asked(prompt)) == 1


@pytest.mark.parametrize("path", [CHAT, OPENAI, RESPONSES])
async def test_another_question_with_the_same_key_is_422(open_relay, upstream, path):
    name = {CHAT: "page", OPENAI: "chat", RESPONSES: "responses"}[path]
    head = keyed(f"other {name}")
    first, second = (upstream.script(*steps_for(name, True)) for _ in range(2))
    url, body = open_relay.http + path, question(name, first, True)[1]
    await fetch("POST", url, head, body)
    response = await fetch("POST", url, head, question(name, second, True)[1])
    assert response.status == 422
    assert "Idempotency-Key" in response.error["message"]
    assert not upstream.asked(second)


async def test_each_path_has_keys_of_its_own(open_relay, upstream):
    """The same body may be asked in the chat page's format, and in OpenAI's."""
    prompt = upstream.script(*answer("Hello"))
    body, said = asking(prompt, model="scripted", stream=True), []
    for path in (CHAT, OPENAI):
        said += [await fetch_events("POST", open_relay.http + path, keyed("both"), body)]
    assert said[0][0].json == {"content": "Hello"}
    assert said[1][0].json["choices"]
    assert len(upstream.asked(prompt)) == 2


async def test_another_callers_key_is_another(open_relay, upstream):
    prompt = upstream.script(*answer("Hello"))
    path, body = question("chat", prompt, True)
    ids = set()
    for caller in (MINE, YOURS, {}, {"x-api-key": "third-0123456789"}):
        head = keyed("shared by chance", caller)
        response = await fetch("POST", open_relay.http + path, head, body)
        ids.add(response.headers["x-answer-id"])
    assert len(ids) == len(upstream.asked(prompt)) == 4


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_question_that_was_refused_frees_its_key(open_relay, upstream, streamed):
    good = steps_for("chat", streamed)
    bad = [plain(429, {"error": {"message": "Slower."}})]
    prompt = upstream.script(lambda heard: bad if len(upstream.asked(prompt)) == 1 else good)
    path, body = question("chat", prompt, streamed)
    url, head = open_relay.http + path, keyed(f"refused {streamed}")
    assert (await fetch("POST", url, head, body)).status == 429
    assert (await fetch("POST", url, head, body)).status == 200
    assert (await fetch("POST", url, head, body)).status == 200
    assert len(upstream.asked(prompt)) == 2


async def test_a_key_is_forgotten_with_its_answer(serve, upstream):
    flags = ("--keep", "0.3", "--upstream", upstream.url, "--model", "scripted")
    server = serve(*flags)
    prompt = upstream.script(*answer("Hello"))
    path, body = question("chat", prompt, True)
    with trio.fail_after(8):
        while len(upstream.asked(prompt)) < 2:
            await fetch_events("POST", server.http + path, keyed("kept"), body)
            await trio.sleep(0.2)


async def test_a_key_is_known_to_every_process(serve, redis, upstream):
    flags = ("--redis", redis.url, "--upstream", upstream.url, "--model", "scripted")
    gate = Gate()
    prompt = upstream.script(*sse(delta("Hel"), gate, delta("lo", "stop"), DONE))
    path, body = question("chat", prompt, True)
    here, there = serve(*flags), serve(*flags)
    async with stream("POST", here.http + path, keyed("all"), body) as first:
        await first.event()
        async with stream("POST", there.http + path, keyed("all"), body) as second:
            await second.event()
            gate.open()
            assert await first.events() == await second.events()
    other = question("chat", prompt + "?", True)[1]
    response = await fetch("POST", there.http + path, keyed("all"), other)
    assert response.status == 422
    assert len(upstream.asked(prompt)) == 1


async def test_a_forgotten_key_is_used_again_by_one_process_alone(serve, redis, upstream):
    flags = (
        "--redis",
        redis.url,
        "--upstream",
        upstream.url,
        "--model",
        "scripted",
        "--keep",
        "0.1",
    )
    here, there = serve(*flags), serve(*flags)
    prompt = upstream.script(*answer("Hello"))
    path, body = question("chat", prompt, True)
    await fetch_events("POST", here.http + path, keyed("forgotten"), body)
    await until(lambda: b":0" in redis.do("EVAL \"return #redis.call('KEYS', '*answer:*')\" 0"))
    async with trio.open_nursery() as nursery:
        for server in (here, there):
            nursery.start_soon(fetch_events, "POST", server.http + path, keyed("forgotten"), body)
    assert len(upstream.asked(prompt)) == 2


async def test_an_answer_that_was_not_streamed_is_known_to_every_process(serve, redis, upstream):
    flags = ("--redis", redis.url, "--upstream", upstream.url, "--model", "scripted")
    prompt = upstream.script(plain(200, chat_whole()))
    path, body = question("chat", prompt, False)
    said = [
        (await fetch("POST", server.http + path, keyed("whole"), body)).json
        for server in (serve(*flags), serve(*flags))
    ]
    assert said[0] == said[1]
    assert len(upstream.asked(prompt)) == 1


@pytest.mark.parametrize("name", ["chat", "responses"])
async def test_who_waits_at_a_process_that_stops_is_told_so(serve, redis, upstream, name):
    """And not that the answer is empty: it is still under way at the other process."""
    flags = ("--redis", redis.url, "--upstream", upstream.url, "--model", "scripted")
    here, there = serve(*flags), serve(*flags, "--grace", "0.2")
    gate = Gate()
    prompt = upstream.script(gate, plain(200, PROTOCOLS[name].whole()))
    path, body = question(name, prompt, False)
    async with connect(here.http) as first, connect(there.http) as second:
        await first.ask("POST", path, keyed("waits"), body)
        await until(lambda: upstream.asked(prompt))
        await second.ask("POST", path, keyed("waits"), body)
        state = "XRANGE chatstream:2:state - +"  # in which it says whose answers it reads
        await until(lambda: re.search(rb"[0-9a-f]{32}", redis.do(state)))
        there.signal()
        response = await (await second.response("POST")).read()
        assert (response.status, response.error["type"]) == (503, "server_stopping")
        assert await there.exit_code(3) == 0
        gate.open()
        response = await (await first.response("POST")).read()
        assert response.status == 200
        assert WORDS[-1] in response.body.decode()
    assert "Traceback" not in there.log()
