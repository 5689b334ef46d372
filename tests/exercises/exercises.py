"""The checks of the README's "Things to try": each fails until you have done it.

    pytest tests/exercises/exercises.py -k typing

Without -k all five run. They start chatstream.py as you have changed it.
"""

import json
import os
import sys

import pytest
import trio
from kit import OPENAI, ROOM_PROTOCOL, asking, fetch, fetch_events, stream
from trio_websocket import open_websocket_url


@pytest.fixture
def server(serve):
    program = os.environ.get("EXERCISE_PROGRAM")
    return serve(program=[sys.executable, *program.split()] if program else None)


def member(server, name, protocol=ROOM_PROTOCOL):
    offered = [protocol] if protocol else None
    return open_websocket_url(f"{server.ws}/room?name={name}", subprotocols=offered)


async def next_of(socket, type):
    """The next event of this type; nothing for five seconds is a failure."""
    with trio.fail_after(5):
        while (event := json.loads(await socket.get_message()))["type"] != type:
            pass
    return event


async def test_typing(server):
    """The others see who is typing; a plain member sees nothing of it."""
    async with (
        member(server, "An") as an,
        member(server, "Bo") as bo,
        member(server, "plain", protocol=None) as plain,
    ):
        await an.send_message('{"typing": true}')
        assert (await next_of(bo, "typing"))["name"] == "An"
        await an.send_message('{"text": "there"}')
        assert (await next_of(bo, "message"))["text"] == "there"
        with trio.fail_after(5):
            assert (await plain.get_message()).startswith("there")


async def test_model(server):
    """A second model that says it in capitals, beside the first, and listed."""
    listed = (await fetch("GET", f"{server.http}/v1/models")).json["data"]
    assert {"demo", "shout"} <= {model["id"] for model in listed}
    question = asking("Hello there", model="shout", stream=True)
    *chunks, done = await fetch_events("POST", server.http + OPENAI, body=question)
    assert done.data == "[DONE]"
    choices = [choice for chunk in chunks for choice in chunk.json["choices"]]
    said = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert said == "HELLO THERE"
    other = await fetch("POST", server.http + OPENAI, body=asking("Hello there"))
    assert "demo" in other.json["choices"][0]["message"]["content"]


async def test_poll(server):
    """A vote changes the count, and all are told; what is no vote is a message."""
    async with member(server, "An") as an, member(server, "Bo") as bo:
        for said, told in [
            ("/poll tea coffee", "tea 0, coffee 0"),
            ("/vote tea", "tea 1, coffee 0"),
            ("/vote coffee", "tea 1, coffee 1"),
            ("/vote tea", "tea 2, coffee 1"),
        ]:
            await an.send_message(json.dumps({"text": said}))
            while (await next_of(bo, "message"))["text"] != told:
                pass
        await an.send_message('{"text": "Thanks!"}')
        assert (await next_of(bo, "message"))["text"] == "Thanks!"


async def test_endpoint(server):
    """What is posted is streamed, also to those who come later, and resumed."""
    url = f"{server.http}/notes"
    for note in (b"one", b"two"):
        assert (await fetch("POST", url, body=note)).status in (200, 201, 204)
    async with stream("GET", url) as response:
        assert response.headers["content-type"] == "text/event-stream"
        first, second = await response.events(2)
        assert (first.data, second.data) == ("one", "two")
        await fetch("POST", url, body=b"three")
        assert (await response.event()).data == "three"
    async with stream("GET", url, {"Last-Event-ID": first.id}) as response:
        assert [event.data for event in await response.events(2)] == ["two", "three"]


async def test_rate(server):
    """Three questions pass, the fourth is refused, a second later all is well."""
    statuses = []
    for _ in range(4):
        async with stream("POST", server.http + OPENAI, body=streamed()) as response:
            statuses.append(response.status)
            later = response.headers.get("retry-after")
    assert statuses == [200, 200, 200, 429]
    await trio.sleep(max(int(later), 1))
    async with stream("POST", server.http + OPENAI, body=streamed()) as response:
        assert response.status == 200


def streamed():
    return asking("Hello", stream=True)
