"""The room: who hears what, in which order, and what befalls who breaks the rules."""

import json
import socket
import time
from contextlib import AsyncExitStack
from urllib.parse import quote

import pytest
import trio
from kit import (
    BINARY,
    CLOSE,
    HANDSHAKE,
    PING,
    PONG,
    ROOM_PROTOCOL,
    SOON,
    TAIL,
    TEXT,
    Cut,
    close_code,
    connect,
    event,
    fetch,
    frame,
    guest,
    hear,
    hear_of,
    hear_texts,
    person,
    raw_member,
    read_frame,
    reset,
    say,
    say_and_hear,
    stream,
)
from trio_websocket import ConnectionClosed, HandshakeError, open_websocket_url

V1 = {"Sec-WebSocket-Protocol": ROOM_PROTOCOL}


# ------------------------------------------------------------------------------- plain


async def test_what_one_says_comes_back_to_all(serve):
    server = serve()
    async with open_websocket_url(server.ws) as one, open_websocket_url(server.ws) as other:
        await one.send_message("hello")
        assert await hear(one) == await hear(other) == f"hello{TAIL}"
        await other.send_message("你好 🙂")
        assert await hear(one) == await hear(other) == f"你好 🙂{TAIL}"


@pytest.mark.parametrize("path", ["", "/", "/room", "/?a=b"])
async def test_the_room_has_two_doors(open_room, path):
    async with open_websocket_url(open_room.ws + path) as member:
        await member.send_message("hello")
        assert (await hear(member)).startswith("hello")


@pytest.mark.parametrize(("suffix", "said"), [("", "hello"), (" <- you", "hello <- you")])
async def test_the_tail_can_be_changed(serve, suffix, said):
    server = serve("--room-suffix", suffix)
    async with open_websocket_url(server.ws) as member:
        await member.send_message("hello")
        assert await hear(member) == said


async def test_a_plain_member_hears_no_history_and_no_one_come_or_go(open_room):
    async with guest(open_room) as early:
        await early.send_message("before")
        await hear(early)
        async with open_websocket_url(open_room.ws) as late:
            async with guest(open_room), person(open_room):
                pass
            await early.send_message("after")
            heard = [await hear(late), await hear(late)]
    assert heard == [f"(here){TAIL}", f"after{TAIL}"]


async def test_a_message_may_come_in_pieces_with_pings_between(open_room):
    async with raw_member(open_room.ws) as member:
        await member.send(frame(TEXT, "你好".encode()[:4], fin=False))
        await member.send(frame(PING, b"still there?"))
        await member.send(frame(0, "你好".encode()[4:]))
        heard = [await read_frame(member), await read_frame(member)]
    assert sorted(heard) == [(TEXT, f"你好{TAIL}".encode()), (PONG, b"still there?")]


async def test_an_empty_message_does_no_harm(open_room):
    async with guest(open_room) as member:
        await member.send_message("")
        await member.send_message("hello")
        assert await hear(member) in (TAIL, f"hello{TAIL}")


# -------------------------------------------------------------------------------- JSON


async def test_a_message_has_a_name_a_time_and_an_id(open_room):
    async with person(open_room, "Ann") as ann, person(open_room, "Bob") as bob:
        heard = await say_and_hear(ann)
        assert await hear_of(bob, "message", text=heard["text"]) == heard
        assert set(heard) == {"id", "type", "name", "text", "at"}
        assert heard["name"] == "Ann"
        second = await say_and_hear(bob)
        assert second["name"] == "Bob"
        assert second["id"] != heard["id"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("你好", "你好"),
        ("a b", "a b"),
        ("<b>", "<b>"),
        ("O'Neil", "O'Neil"),
        ("  An  ", "An"),
        ("x" * 33, "x" * 32),
        ("A\u202en\x00\n", "An"),  # no turning round of text, no control character
        ("\uff21n", "An"),  # NFKC: full width
        ("A\u200dn\u3164", "An"),  # nothing invisible
        ("e" + "\u0316" * 9, "e" + "\u0316" * 2),
        ("ก" + "\u0e47" * 9, "ก" + "\u0e47" * 2),  # whose combining class is 0
        ("A\u180b\u180dn", "An"),
    ],
)
async def test_a_name_is_told_as_it_can_be_shown(serve, name, shown):
    async with person(serve(), quote(name)) as member:
        assert (await say_and_hear(member))["name"] == shown


async def test_a_name_that_is_taken_gets_a_number(serve):
    server = serve()
    async with person(server, "Ann") as one, person(server, "Ann") as other:
        names = [(await say_and_hear(member))["name"] for member in (one, other)]
    assert names[0] == "Ann"
    assert names[1].startswith("Ann")
    assert names[1][3:].strip(" -()#").isdecimal()


@pytest.mark.parametrize("name", ["", "   ", "\0", "\u200b"])
async def test_a_guest_has_a_number(open_room, name):
    async with person(open_room, quote(name)) as member:
        assert (await say_and_hear(member))["name"].startswith("guest-")


@pytest.mark.parametrize("query", ["", "?name=", "?name=%ff", "?name=" + "x" * 5000])
async def test_everybody_gets_a_name_that_can_be_shown(open_room, query):
    url = f"{open_room.ws}/room{query}"
    async with open_websocket_url(url, subprotocols=[ROOM_PROTOCOL]) as member:
        name = (await say_and_hear(member))["name"]
    assert 0 < len(name) <= 100


async def test_coming_and_going_are_told_with_who_is_left(serve):
    server = serve()
    async with person(server, "Ann") as ann:
        assert (await hear_of(ann, "joined", name="Ann"))["members"] == 1
        async with person(server, "Bob") as bob:
            assert (await hear_of(ann, "joined", name="Bob"))["members"] == 2
            assert (await hear_of(bob, "joined", name="Bob"))["members"] == 2
        assert (await hear_of(ann, "left", name="Bob"))["members"] == 1
        async with raw_member(server.ws + "/room?name=Cat", V1) as cat:
            await hear_of(ann, "joined", name="Cat")
            reset(cat.transport)
            assert (await hear_of(ann, "left", name="Cat"))["members"] == 1
        assert (await fetch("GET", server.http + "/healthz")).json["members"] == 1


async def test_plain_and_json_hear_each_other(serve):
    server = serve()
    async with guest(server) as plain, person(server, "Ann") as ann:
        await say(ann, "hello")
        assert (await hear(plain)).startswith("hello")
        await plain.send_message("hello yourself")
        heard = await hear_of(ann, "message", text="hello yourself")
        assert heard["name"]


async def test_a_new_member_gets_the_last_50_messages(serve):
    server = serve("--room-rate", "0")
    async with person(server, "Ann") as ann:
        for n in range(60):
            await say(ann, f"message {n}")
        await hear_of(ann, "message", text="message 59")
        async with person(server, "Bob") as bob:
            await say(bob, "and now")
            texts = await hear_texts(bob, 51)
    assert texts == [f"message {n}" for n in range(10, 60)] + ["and now"]


async def test_who_comes_back_gets_exactly_the_rest(serve):
    server = serve("--room-rate", "0")
    async with person(server, "Ann") as ann:
        heard = []
        for n in range(70):
            await say(ann, str(n))
            heard.append(await hear_of(ann, "message", text=str(n)))
        for at in (0, 1, 35, 68, 69):
            async with person(server, "Bob", heard[at]["id"]) as bob:
                await say(bob, "end")
                texts = await hear_texts(bob, 70 - at)
            expected = [str(n) for n in range(at + 1, 70)]
            assert [text for text in texts if text != "end"][: 69 - at] == expected


async def test_every_event_of_the_room_can_be_resumed_after(serve):
    server = serve()
    async with person(server, "Ann") as ann:
        joined = await hear_of(ann, "joined", name="Ann")
        async with person(server, "Bob"):
            first = await hear_of(ann, "joined", name="Bob")
        left = await hear_of(ann, "left", name="Bob")
        await say(ann, "hello")
        said = await hear_of(ann, "message", text="hello")
    async with person(server, "Cat", joined["id"]) as cat:
        assert [await event(cat) for _ in range(3)] == [first, left, said]


async def test_who_was_away_too_long_is_told_how_much_is_missing(serve):
    server = serve("--room-rate", "0")
    async with person(server, "Ann") as ann:
        await say(ann, "first")
        first = await hear_of(ann, "message", text="first")
        for n in range(1100):
            await say(ann, str(n))
            heard = await hear_of(ann, "message", text=str(n))
        async with person(server, "Bob", first["id"]) as bob:
            gap = await event(bob)
            texts = await hear_texts(bob, 900)
    assert gap == {"type": "gap", "missed": gap["missed"]}
    assert texts == [str(n) for n in range(gap["missed"], gap["missed"] + 900)]
    assert 100 <= gap["missed"] <= 110
    assert heard["text"] == "1099"


@pytest.mark.parametrize("after", ["rubbish", "room", "room-", "room-x", "clock-5"])
async def test_an_id_of_the_room_that_means_nothing_counts_as_none(open_room, after):
    async with person(open_room, "Ann") as ann:
        await say(ann, f"before {after}")
        await hear_of(ann, "message", text=f"before {after}")
        async with person(open_room, "Bob", after) as bob:
            await hear_of(bob, "message", text=f"before {after}")


async def test_an_id_from_before_a_restart_counts_as_none(serve):
    """A page that was in the room of another process hears this one's history."""
    first, second = serve("--room-rate", "0"), serve("--room-rate", "0")
    async with person(first, "Ann") as ann:
        for n in range(100):
            await say(ann, str(n))
        last = await hear_of(ann, "message", text="99")
    async with person(second, "Bob") as bob:
        await say(bob, "here")
        await hear_of(bob, "message", text="here")
        async with person(second, "Ann", last["id"]) as ann:
            await hear_of(ann, "message", text="here")


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (ROOM_PROTOCOL, ROOM_PROTOCOL),
        (f"other, {ROOM_PROTOCOL}", ROOM_PROTOCOL),
        ("other", None),
        ("chatstream.v2", None),
        (None, None),
    ],
)
async def test_the_subprotocol_is_chosen_from_those_offered(open_room, offered, chosen):
    head = HANDSHAKE | ({"Sec-WebSocket-Protocol": offered} if offered else {})
    async with stream("GET", open_room.http + "/room", head) as response:
        assert response.status == 101
        assert response.headers.get("sec-websocket-protocol") == chosen


async def test_no_compression_is_negotiated(open_room):
    head = HANDSHAKE | {"Sec-WebSocket-Extensions": "permessage-deflate"}
    async with stream("GET", open_room.http + "/room", head) as response:
        assert response.status == 101
        assert "sec-websocket-extensions" not in response.headers


# ----------------------------------------------------------------------- broken rules

LONG = b"x" * 4097
HALF = '{"text": "你'.encode()[:-1]

CODES = {
    "too long": (frame(TEXT, LONG), 1009),
    "too long in chinese": (frame(TEXT, "你".encode() * 4097), 1009),
    "too long in pieces": (frame(TEXT, b"x" * 4000, fin=False) + frame(0, b"x" * 97), 1009),
    "pieces without end": (
        frame(TEXT, b"x" * 4000, fin=False) + frame(0, b"x" * 4000, fin=False) * 16,
        1009,
    ),
    "a gigabyte to come": (frame(TEXT, b"x" * 60_000, length=1 << 30), 1009),
    "binary": (frame(BINARY, b"hello"), 1003),
    "long binary": (frame(BINARY, LONG), 1003),
    "empty binary": (frame(BINARY), 1003),
    "bad utf-8": (frame(TEXT, b"caf\xe9"), 1007),
    "half a character": (frame(TEXT, "你".encode()[:2]), 1007),
    "a surrogate": (frame(TEXT, b"\xed\xa0\x80"), 1007),
    "bad utf-8 in pieces": (frame(TEXT, "你".encode()[:2], fin=False) + frame(0, b"x"), 1007),
    "unknown opcode": (frame(3, b"x"), 1002),
    "a long ping": (frame(PING, b"x" * 126), 1002),
    "no beginning": (frame(0, b"x"), 1002),
    "not masked": (b"\x81\x05hello", 1002),
    "reserved bits": (b"\xc1" + frame(TEXT, b"hello")[1:], 1002),
}
JSON_CODES = {
    "not json": (frame(TEXT, b"hello"), 1007),
    "half of it": (frame(TEXT, b'{"text": "hel'), 1007),
    "nothing": (frame(TEXT), 1007),
    "a list": (frame(TEXT, b"[]"), 1007),
    "null": (frame(TEXT, b"null"), 1007),
    "no text": (frame(TEXT, b"{}"), 1007),
    "a number": (frame(TEXT, b'{"text": 5}'), 1007),
    "an object": (frame(TEXT, b'{"text": {}}'), 1007),
    "too deep": (frame(TEXT, b"[" * 4000), 1007),
    "a big number": (frame(TEXT, b'{"text": ' + b"9" * 4000 + b"}"), 1007),
    "too long": (frame(TEXT, b'{"text": "' + b"x" * 9000 + b'"}'), 1009),
    "binary": (frame(BINARY, b'{"text": "hello"}'), 1003),
    "bad utf-8": (frame(TEXT, b'{"text": "\xff"}'), 1007),
}
ALL_CODES = [(name, {}, *CODES[name]) for name in CODES if CODES[name][1]]
ALL_CODES += [(f"json: {name}", V1, *JSON_CODES[name]) for name in JSON_CODES]


@pytest.mark.parametrize(
    ("head", "frames", "code"), [c[1:] for c in ALL_CODES], ids=[c[0] for c in ALL_CODES]
)
async def test_who_breaks_the_rules_is_told_which_and_goes_alone(open_room, head, frames, code):
    async with guest(open_room) as other:
        async with raw_member(open_room.ws, head) as member:
            await member.send(frames)
            assert await close_code(member) == code
            await member.send(frame(CLOSE, code.to_bytes(2)))
            with pytest.raises(Cut):
                await member.exactly(1)
        await other.send_message("hello")
        assert (await hear(other)) == f"hello{TAIL}"


@pytest.mark.parametrize("name", ["too long", "binary", "bad utf-8"])
async def test_the_code_is_right_in_the_middle_of_a_broadcast(open_room, name):
    frames, code = CODES[name]
    async with guest(open_room) as loud, trio.open_nursery() as nursery:
        nursery.start_soon(talk, loud)
        nursery.start_soon(listen, loud)
        for _ in range(5):
            async with raw_member(open_room.ws) as member:
                await read_frame(member)  # it is being broadcast to
                await member.send(frames)
                assert await close_code(member) == code
        nursery.cancel_scope.cancel()


async def talk(member):
    while True:
        await member.send_message("x" * 1000)


async def listen(member):
    while True:
        await member.get_message()


@pytest.mark.parametrize("text", ["x" * 4096, "你" * 4096, "🙂" * 2048])
async def test_4096_characters_are_welcome(open_room, text):
    async with guest(open_room) as member:
        await member.send_message(text)
        assert await hear(member) == text + TAIL


async def test_4000_characters_are_welcome_in_json_too(open_room):
    for text in ("你" * 4000, '"\\' * 2000):
        async with person(open_room) as member:
            await say(member, text)
            await hear_of(member, "message", text=text)


async def test_a_lone_surrogate_in_json_harms_nobody(open_room):
    async with guest(open_room) as other:
        async with raw_member(open_room.ws, V1) as member:
            await member.send(frame(TEXT, b'{"text": "\\ud800"}'))
            await trio.sleep(0.2)
        await other.send_message("hello")
        while await hear(other) != f"hello{TAIL}":
            pass


async def test_a_close_is_answered_with_its_code(open_room):
    for code in (1000, 1001, 4000):
        async with raw_member(open_room.ws) as member:
            await member.send(frame(CLOSE, code.to_bytes(2) + b"bye"))
            assert await close_code(member) == code


async def test_no_other_path_opens_a_websocket(open_room):
    for path in ("/nothing", "/time", "/answers/x", "/room/x"):
        with pytest.raises(HandshakeError):
            async with open_websocket_url(open_room.ws + path):
                pass


async def test_what_is_sent_to_the_clock_does_no_harm(open_room):
    async with open_websocket_url(open_room.ws + "/clock") as member, guest(open_room) as other:
        await member.send_message("hello")
        with trio.fail_after(SOON):
            try:
                for _ in range(2):
                    assert json.loads(await member.get_message())["id"]
            except ConnectionClosed:
                pass
        await other.send_message("not you")
        assert await hear(other) == f"not you{TAIL}"


# ----------------------------------------------------------------- many, fast, and slow


async def test_all_hear_the_same_in_the_same_order(serve):
    server = serve("--room-rate", "0")
    heard = []

    async def chatter(number, member):
        for n in range(20):
            await member.send_message(f"{number}:{n}")

    async def note(member):
        heard.append([await hear(member) for _ in range(20 * 20)])

    async with AsyncExitStack() as stack:
        members = await enter_all(stack, server, 20)
        async with trio.open_nursery() as nursery:
            for number, member in enumerate(members):
                nursery.start_soon(chatter, number, member)
                nursery.start_soon(note, member)
    assert all(order == heard[0] for order in heard)
    for number in range(20):
        own = [text for text in heard[0] if text.startswith(f"{number}:")]
        assert own == [f"{number}:{n}{TAIL}" for n in range(20)]


async def test_who_talks_too_fast_is_slowed_down_and_not_cut_short(serve):
    server = serve("--room-rate", "10")
    async with open_websocket_url(server.ws) as fast, open_websocket_url(server.ws) as calm:
        began = time.monotonic()
        for n in range(25):
            await fast.send_message(str(n))
        await calm.send_message("calm")
        heard = [await hear(fast) for _ in range(26)]
        took = time.monotonic() - began
    assert [text for text in heard if text != f"calm{TAIL}"] == [f"{n}{TAIL}" for n in range(25)]
    assert heard.index(f"calm{TAIL}") < 20  # the others are not slowed down
    assert 1 < took < 5


async def test_a_member_that_never_reads_is_noticed_by_nobody(serve):
    server = serve("--room-rate", "0")
    async with raw_member(server.ws) as deaf, stream("GET", server.http + "/clock"):
        deaf.transport.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        async with guest(server) as one, guest(server) as other:
            for n in range(1500):
                text = f"{n} ".ljust(4000, "x")
                await one.send_message(text)
                for member in (one, other):
                    while await hear(member) != text + TAIL:
                        pass
    assert rss(server) < 120 << 20


def rss(server):
    """Its memory in bytes."""
    with open(f"/proc/{server.process.pid}/statm") as statm:
        return int(statm.read().split()[1]) * 4096


async def test_200_members_hear_everything_in_order(serve):
    server = serve("--room-rate", "0")
    texts, done = [f"{n}{TAIL}" for n in range(100)], []

    async def note(member):
        done.append([await hear(member) for _ in texts] == texts)

    async with AsyncExitStack() as stack:
        members = await enter_all(stack, server, 200)
        async with trio.open_nursery() as nursery:
            for member in members:
                nursery.start_soon(note, member)
            for n in range(len(texts)):
                await members[0].send_message(str(n))
    assert done == [True] * 200


async def enter_all(stack, server, count):
    opened = [open_websocket_url(server.ws) for _ in range(count)]
    return [await stack.enter_async_context(one) for one in opened]


async def test_members_that_come_and_go_by_the_hundred(serve):
    server = serve("--room-rate", "0")

    async def visit(_):
        async with connect(server.ws.replace("ws:", "http:")) as connection:
            await connection.request("GET", "/", HANDSHAKE)
            await connection.send(frame(TEXT, b"hello"))
            reset(connection.transport)

    async with guest(server) as member:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen, member)
            async with trio.open_nursery() as visits:
                for n in range(200):
                    visits.start_soon(visit, n)
            await trio.sleep(0.5)
            health = (await fetch("GET", server.http + "/healthz")).json
            nursery.cancel_scope.cancel()
        assert health["members"] == 1
    assert "Traceback" not in server.log()
