"""The same promises over the local log, over Redis, and behind several workers."""

import pytest
import trio
from kit import (
    TOGETHER,
    Gate,
    answer,
    asked,
    at,
    delta,
    error_of,
    fetch,
    fetch_events,
    hear_of,
    hear_texts,
    person,
    say,
    say_and_hear,
    servers,
    sse,
    text_of,
    until,
)


@pytest.fixture(scope="module", params=["plain", "redis", "workers"])
def server(request, upstream):
    flags = [*TOGETHER]
    if request.param != "plain":
        flags += ["--redis", request.getfixturevalue("quiet_redis").url]
    if request.param == "workers":
        flags += ["--workers", "4"]
    with servers(request.config) as start:
        yield start(*flags, env={"OPENAI_BASE_URL": upstream.url})


async def test_members_hear_the_same(server):
    async with person(server) as one, person(server) as two, person(server) as three:
        said = await say_and_hear(one)
        for member in (two, three):
            assert await hear_of(member, "message", text=said["text"]) == said


async def test_a_member_resumes(server):
    async with person(server) as one:
        seen = await say_and_hear(one)
        await say(one, "missed")
        await hear_of(one, "message", text="missed")
    async with person(server, after=seen["id"]) as back:
        assert await hear_texts(back, 1) == ["missed"]


async def test_readers_of_an_answer_read_the_same(server, upstream):
    gate = Gate()
    prompt = upstream.script(*answer("a ", "b ", gate, "c"))
    read = []

    async def follow(url, head=None):
        read.append(await fetch_events("GET", url, head))

    async with asked(server, prompt) as response:
        first = await response.events(2)
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(follow, at(server, response))
            gate.open()
            events = first + await response.events()
    assert text_of(events) == "a b c"
    assert read == [events] * 4
    head = {"Last-Event-ID": first[0].id}
    assert await fetch_events("GET", at(server, response), head) == events[1:]


async def test_an_answer_is_stopped(server, upstream):
    prompt = upstream.script(*sse(delta("a"), Gate()))
    async with asked(server, prompt) as response:
        await response.events(1)
        assert (await fetch("DELETE", at(server, response))).status == 204
        assert error_of(await response.events())["type"] == "stopped"
    (heard,) = upstream.asked(prompt)
    await until(lambda: heard.closed_at)
