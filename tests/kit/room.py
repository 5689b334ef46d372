"""Members of the room: what they say and what they hear."""

import json
import secrets
from contextlib import asynccontextmanager

import trio
from trio_websocket import open_websocket_url

from .websocket import ROOM_PROTOCOL

TAIL = "--返回数据"
SOON = 5


@asynccontextmanager
async def guest(server, path="/"):
    """A plain WebSocket client. It is in the room: it has heard itself."""
    async with open_websocket_url(server.ws + path) as member:
        await member.send_message("(here)")
        while not (await hear(member)).startswith("(here)"):
            pass
        yield member


async def hear(member):
    with trio.fail_after(SOON):
        return await member.get_message()


@asynccontextmanager
async def person(server, name="Ann", after=None):
    """A member that speaks our subprotocol."""
    query = f"?name={name}" + (f"&after={after}" if after else "")
    url = f"{server.ws}/room{query}"
    async with open_websocket_url(url, subprotocols=[ROOM_PROTOCOL]) as member:
        assert member.subprotocol == ROOM_PROTOCOL
        yield member


async def event(member):
    return json.loads(await hear(member))


async def hear_of(member, kind, **fields):
    """The next event of this kind, with these fields, past whatever else is said."""
    while True:
        found = await event(member)
        if found["type"] == kind and fields.items() <= found.items():
            return found


async def hear_texts(member, count):
    return [(await hear_of(member, "message"))["text"] for _ in range(count)]


async def say(member, text):
    await member.send_message(json.dumps({"text": text}))


async def say_and_hear(member):
    """Something that nobody has said before, as it comes back."""
    text = f"hello {secrets.token_hex(4)}"
    await say(member, text)
    return await hear_of(member, "message", text=text)


async def insist(member, text):
    """Say it until it is not refused; returns the refusals that came before."""
    refused = []
    while True:
        await say(member, text)
        while True:
            found = await event(member)
            if found["type"] == "error":
                refused.append(found["error"])
                break
            if found.get("text") == text:
                return refused
        await trio.sleep(0.1)
