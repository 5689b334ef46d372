"""Nothing that a client or an operator does takes the server down.

Time limits are a second or two here, so that nobody waits; with CHATSTREAM_FULL=1 they
are the real ones, and there are thousands of clients instead of hundreds.
"""

import json
import random
import re
import shlex
import signal
import socket
import time
from contextlib import AsyncExitStack, suppress

import pytest
import trio
from kit import (
    BODIES,
    BOOK,
    BROKEN,
    CHAT,
    CLOSE,
    FULL,
    HANDSHAKE,
    HOLD,
    OPENAI,
    PING,
    PONG,
    PROTOCOLS,
    RESPONSES,
    ROOM_PROTOCOL,
    SHAPES,
    TAIL,
    TEXT,
    Gate,
    Upstream,
    answer,
    answer_pings,
    ask,
    asking,
    assert_no_fault,
    close_code,
    command,
    connect,
    delta,
    descriptors,
    drain,
    fetch,
    frame,
    head,
    health,
    measured,
    narrow,
    need,
    paused,
    plain,
    program,
    raw_connection,
    raw_member,
    read_frame,
    reset,
    resident,
    response_stream,
    response_whole,
    sse,
    stream,
    tasks,
    told,
    unharmed,
    until,
    visit,
)

LIMITS = {"HEAD_TIMEOUT": 1.5, "STUCK_TIMEOUT": 1.5, "BODY_TIMEOUT": 2}


@pytest.fixture
def impatient(serve):
    return serve(program=program(**LIMITS))


# ------------------------------------------------------------- requests that are none

NAMES = """
    host connection upgrade origin accept accept-encoding authorization cookie range
    content-type content-length transfer-encoding expect te trailer last-event-id
    if-none-match access-control-request-method access-control-request-headers
    sec-websocket-key sec-websocket-version sec-websocket-protocol
    sec-websocket-extensions x-forwarded-for x-anything
"""
HEADERS = NAMES.split()


async def said_to(url, request, eof=True):
    """All that the server says to these bytes, to the end of the connection."""
    async with raw_connection(url) as connection:
        with suppress(trio.BrokenResourceError):
            await connection.send(request)
            if eof:
                await connection.transport.send_eof()
        return await drain(connection)


@pytest.mark.parametrize("port", ["http", "ws"])
async def test_odd_bytes_in_any_header_harm_nobody(demo, port):
    """Both libraries decode some headers as ASCII, one of them outside of any `try`."""
    url = getattr(demo, port)
    upgrade = [f"{k}: {v}" for k, v in HANDSHAKE.items()]
    async with unharmed(demo):
        for name in HEADERS:
            for value in (b"caf\xe9", b"\xff" * 40, b"\xe4\xbd\xa0", b"a, \xa0, b"):
                odd = name.encode() + b": " + value
                others = [h for h in upgrade if h.split(":")[0].lower() != name]
                host = [] if name == "host" else ["Host: localhost"]
                for path in ("/time", "/room"):
                    ask = head("GET", path, *host, *others, odd)
                    twice = head("GET", path, *host, odd, *upgrade)  # a second is good
                    plain = head("GET", "/time", *host, odd)
                    for request in (ask, twice, plain):
                        assert b"HTTP/1.1 500" not in await said_to(url, request)


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def test_a_request_with_two_readings_is_refused(demo):
    """What a proxy in front may read otherwise must not become a second request."""
    async with unharmed(demo):
        for name, lines in SHAPES.items():
            request = head("POST", CHAT, "Host: localhost", *lines) + b"0\r\n\r\n"
            said = await said_to(demo.http, request + SMUGGLED)
            assert re.match(rb"HTTP/1.1 (4..|501) ", said), (name, said)
            assert not re.search(rb"HTTP/1.1 (2|404)", said), (name, said)
            assert b"smuggled" not in said, (name, said)


async def test_a_body_in_bad_chunks_is_refused(demo):
    request = head("POST", CHAT, "Host: localhost", "Transfer-Encoding: chunked")
    async with unharmed(demo):
        for name, body in BODIES.items():
            said = await said_to(demo.http, request + body + SMUGGLED)
            assert re.match(rb"HTTP/1.1 (4..|501) ", said), (name, said)
            assert said.count(b"HTTP/1.1 ") == 1, (name, said)


HEADS = {
    "a handshake": (f"{k}: {v}" for k, v in HANDSHAKE.items()),
    "two lengths": ("Content-Length: 0", "Transfer-Encoding: chunked"),
    "a bad chunk": ("Transfer-Encoding: chunked",),
}


@pytest.mark.parametrize("name", HEADS)
async def test_a_refusal_of_head_has_no_body(demo, name):
    request = head("HEAD", "/time", "Host: localhost", *HEADS[name])
    async with unharmed(demo):
        refusal, _, body = (await said_to(demo.http, request + b"zz\r\n")).partition(b"\r\n\r\n")
        assert refusal.startswith(b"HTTP/1.1 4")
        assert body == b""


@pytest.mark.parametrize("pieces", [1, 3])
async def test_a_head_has_256_lines_at_most(demo, pieces):
    """A parser takes longer for many short lines than for a few long ones."""
    async with unharmed(demo):
        for count, status in ((254, 200), (255, 431), (5400, 431)):
            request = head("GET", "/time", "Host: localhost", *["a:"] * count)
            size = len(request) // pieces + 1
            async with connect(demo.http) as connection:
                for at in range(0, len(request), size):
                    with suppress(trio.BrokenResourceError):  # refused already
                        await connection.send(request[at : at + size])
                    await trio.sleep(0.05)
                response = await (await connection.response()).read()
                assert response.status == status


async def test_many_lines_behind_a_head_are_no_part_of_it(demo):
    body = b"[" + b"\n" * 1000 + b"]"
    ask = head("POST", CHAT, "Host: localhost", f"Content-Length: {len(body)}")
    get = head("GET", "/time", "Host: localhost", *["a:"] * 100)
    async with raw_connection(demo.http, ask + body + get * 5) as connection:
        assert (await (await connection.response()).read()).status == 400
        for _ in range(5):
            assert (await (await connection.response()).read()).status == 200


async def test_a_reader_that_pipelines_is_seen_to_leave(serve):
    """What stands in the queue must not hide that its client has gone."""
    server = serve()
    ask = head("GET", "/clock", "Host: localhost")
    async with unharmed(server):
        for more in (b"", SMUGGLED * 3, b"GET /tim", b"\xff" * 99):
            async with raw_connection(server.http, ask + more) as connection:
                assert (await connection.response()).status == 200
                await connection.up_to(b"data:")
                assert (await health(server))["readers"] == 2
            await trio.sleep(0.3)
            assert (await health(server))["readers"] == 1


async def test_a_client_that_talks_into_its_stream_without_end_is_dropped(serve):
    server = serve()
    async with unharmed(server):
        async with raw_connection(
            server.http, head("GET", "/clock", "Host: localhost")
        ) as connection:
            with pytest.raises(BROKEN):
                await send_without_end(connection, b"x" * 10_000)
        assert resident(server.process.pid) < 100 << 20


async def send_without_end(connection, data):
    with trio.fail_after(30):
        while True:
            await connection.transport.send_all(data)


async def test_a_handshake_may_follow_a_request(demo):
    """On a kept connection, also in the same packet, also right behind a body."""
    upgrade = head("GET", "/room", "Host: localhost", *(f"{k}: {v}" for k, v in HANDSHAKE.items()))
    get = head("GET", "/time", "Host: localhost")
    post = head("POST", CHAT, "Host: localhost", "Content-Length: 2") + b"[]"
    hello = frame(TEXT, b"hello")
    for first, status in ((get, 200), (post, 400)):
        async with raw_connection(demo.http, first + upgrade) as connection:
            answered = await (await connection.response()).read()
            assert answered.status == status
            assert (await connection.response()).status == 101
            await connection.send(hello)
            assert await read_frame(connection) == (TEXT, ("hello" + TAIL).encode())


async def test_any_status_of_an_upstream_reaches_the_client(relay, upstream):
    """Also those that Python has no name for; what is no refusal is 502."""
    async with unharmed(relay):
        for status in (404, 418, 429, 499, 503, 520, 529, 599, 101, 204, 304, 600, 999):
            prompt = upstream.script(plain(status, {"error": {"message": "not today"}}))
            response = await fetch("POST", relay.http + OPENAI, None, asking(prompt))
            assert response.status == (status if 400 <= status < 600 else 502)
            assert response.error["message"]


# ------------------------------------------------------------------------ slow clients


async def one_byte_a_time(url, data, ended):
    """Slower than anybody has reason to be."""
    async with connect(url) as connection:
        started = time.monotonic()
        with suppress(*BROKEN):
            for byte in data:
                await connection.send(bytes([byte]))
                with trio.move_on_after(0.2 if not FULL else 1):
                    await connection.receive()
        ended.append(time.monotonic() - started)


async def test_slow_heads_are_closed_in_time(impatient):
    """Some send a byte a time, some nothing, some stop in the middle."""
    ended, count = [], 200
    begun = head("GET", "/time", "Host: localhost", "X: " + "x" * 1000)
    async with unharmed(impatient), trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one_byte_a_time, impatient.http, begun, ended)
        for _ in range(10):
            assert (await fetch("GET", impatient.http + "/time")).status == 200
        with trio.fail_after(15 if FULL else 5):
            while len(ended) < count:  # noqa: ASYNC110
                await trio.sleep(0.1)


SILENT = {
    "nothing": b"",
    "half a head": b"GET /time HTTP/1.1\r\nHost: local",
    "half a head behind a request": head("GET", "/time", "Host: localhost") + b"GET /time HT",
    "half a body": head("POST", CHAT, "Host: localhost", "Content-Length: 9") + b"{",
    "half a chunk": head("POST", CHAT, "Host: localhost", "Transfer-Encoding: chunked")
    + b"9\r\nabc",
    "no body though it asked first": head(
        "POST", CHAT, "Host: localhost", "Content-Length: 9", "Expect: 100-continue"
    ),
}


async def test_who_says_no_more_is_told_and_closed(impatient):
    told = {}

    async def wait(name):
        async with raw_connection(impatient.http, SILENT[name]) as connection:
            told[name] = b" 408 " in await drain(connection, 32 if FULL else 4)

    async with trio.open_nursery() as nursery:
        for name in SILENT:
            nursery.start_soon(wait, name)
    assert told == dict.fromkeys(SILENT, True)


async def test_who_asks_no_more_is_closed_without_a_word(serve):
    """Between two requests: a 408 could be taken for the next one's answer."""
    server = serve(program=program(IDLE_TIMEOUT=1))
    async with connect(server.http) as connection:
        for _ in range(2):
            await (await connection.request("GET", "/time")).read()
            await trio.sleep(0.5)  # each one begins a new wait
        assert await drain(connection, 70) == b""


async def test_a_head_that_begins_when_the_wait_is_nearly_over_gets_its_time(serve):
    server = serve(program=program(IDLE_TIMEOUT=1, HEAD_TIMEOUT=3))
    async with connect(server.http) as connection:
        await (await connection.request("GET", "/time")).read()
        await trio.sleep(0.7)
        await connection.send(b"GET /time HTTP/1.1\r\n")
        await trio.sleep(0.7)
        await connection.send(b"Host: localhost\r\n\r\n")
        assert (await connection.response()).status == 200


# -------------------------------------------------------------- what one client costs

NOTHING_MUCH = ['{"":0}', "[]", "0", '""', "null"]


@pytest.mark.parametrize("item", NOTHING_MUCH)
async def test_a_question_takes_its_own_size_and_not_that_of_its_parts(serve, upstream, item):
    """JSON of 1 MiB can be 30 MiB of objects, and each is left at once.

    What is left goes on for the linger time: all of them are here together.
    """
    env = {"OPENAI_BASE_URL": upstream.url}
    server = serve("--linger", "30", "--model", "m", env=env)
    prompt = upstream.script(*sse(delta("Hello"), HOLD))
    count = (1 << 20) // (len(item) + 1) - 100
    many = ",".join([item] * min(count, 290_000))  # below the limit of brackets
    messages = json.dumps(asking(prompt)["messages"])
    body = f'{{"messages":{messages},"more":[{many}],"stream":true}}'.encode()
    before = resident(server.process.pid)
    async with unharmed(server):
        for _ in range(20):
            async with connect(server.http) as connection:
                length = f"Content-Length: {len(body)}"
                start = head("POST", OPENAI, "Host: localhost", length)
                await connection.send(start + body)
        await until(lambda: len(upstream.asked(prompt)) == 20, 60)
        assert resident(server.process.pid) - before < 200 << 20


EMBEDDINGS = "/v1/embeddings"


@pytest.mark.parametrize("path", [OPENAI, EMBEDDINGS])
async def test_nobody_keeps_a_questions_objects_while_an_upstream_thinks(serve, path):
    """About which model to ask, or about vectors: 1 MiB, or 8 if the question were kept."""
    more = ",".join([NOTHING_MUCH[0]] * 140_000)
    asked = '"input":"a"' if path == EMBEDDINGS else '"messages":[{"role":"user"}]'
    body = f'{{{asked},"more":[{more}]}}'.encode()
    with Upstream() as upstream:
        upstream.other = lambda heard: [HOLD]
        upstream.script(HOLD)
        server = serve("--upstream", upstream.url)
        before = resident(server.process.pid)
        async with AsyncExitStack() as stack:
            for _ in range(20):
                connection = await stack.enter_async_context(connect(server.http))
                length = f"Content-Length: {len(body)}"
                await connection.send(head("POST", path, "Host: localhost", length) + body)
            await trio.sleep(2)
            await until(lambda: len(upstream.heard) == (20 if path == EMBEDDINGS else 1))
            assert resident(server.process.pid) - before < 120 << 20


async def test_a_connection_that_waits_keeps_nothing_of_its_last_question(serve):
    server, body = serve(), b" " * (8 << 20)
    before = resident(server.process.pid)
    async with unharmed(server), AsyncExitStack() as stack:
        for _ in range(10):
            connection = await stack.enter_async_context(connect(server.http))
            response = await connection.request("POST", "/nothing", {}, body)
            assert (await response.read()).status == 404
        assert resident(server.process.pid) - before < 40 << 20


@pytest.mark.parametrize("way", ["the clock", "an answer", "a question again"])
async def test_a_stream_holds_nothing_of_a_body_that_came_with_it(serve, upstream, way):
    """Nobody asks for one, and it would be held for hours."""
    server, body = serve("--upstream", upstream.url, "--model", "m"), b" " * (8 << 20)
    prompt = upstream.script(*sse(delta("Hello"), HOLD))
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        first = await enter(stream("POST", server.http + CHAT, None, asking(prompt)))
        seen = {"Last-Event-ID": (await first.event()).id}
        method, path, headers = {
            "the clock": ("GET", "/clock", {}),
            "an answer": ("GET", f"/answers/{first.headers['x-answer-id']}", {}),
            "a question again": ("POST", CHAT, seen),
        }[way]
        before = resident(server.process.pid)
        for _ in range(20):
            reader = await enter(stream(method, server.http + path, headers, body))
            assert reader.status == 200
        await until_health(server, readers=21)
        assert resident(server.process.pid) - before < 40 << 20


async def test_many_requests_in_one_packet_stop_nobody(serve):
    """1,500 of them, each with work to do: others have their turn in between."""
    server = serve(program=program())
    readers = 3000 if FULL else 500
    packet = head("HEAD", "/metrics", "Host: localhost") * 1500
    async with unharmed(server), AsyncExitStack() as stack:
        for _ in range(readers):
            connection = await stack.enter_async_context(narrow(server.http))
            await connection.send(head("GET", "/clock", "Host: localhost"))
        await until_health(server, readers=readers + 1)
        other = await stack.enter_async_context(connect(server.http))
        many = await stack.enter_async_context(connect(server.http))
        many.patience = 120
        await many.send(packet)
        asked = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_heads, many, 1500, nursery.cancel_scope)
            while True:
                await (await other.request("GET", "/time")).read()
                asked += 1
    # Had they been served in one go, this one would have been asked once, or twice.
    assert asked > 20


def handshake_bytes():
    lines = [f"{k}: {v}" for k, v in HANDSHAKE.items()]
    return head("GET", "/room", "Host: localhost", *lines)


PIECES = head("POST", "/nothing", "Host: localhost", "Transfer-Encoding: chunked")
UPGRADES = ["Host: localhost", "Upgrade: websocket", f"Connection: x{' ' * 15_000}y"]
PACKETS = {
    "a body in pieces of one byte": PIECES + b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n",
    "blanks in a header": head("GET", "/room", *UPGRADES),
    "fragments of nothing": handshake_bytes()
    + frame(TEXT, b"", fin=False)
    + frame(0, b"", fin=False) * 30_000,
    "blank lines": b"\r\n" * 100_000,
}


@pytest.mark.parametrize("name", PACKETS)
async def test_no_bytes_of_one_client_hold_the_others_up(serve, name):
    server = serve(program=measured(0.03))
    async with unharmed(server), connect(server.http) as connection:
        with suppress(*BROKEN):
            await connection.send(PACKETS[name])
            with trio.move_on_after(2):
                await drain(connection, 2)
    assert "held:" not in server.stderr_text(), server.stderr_text()


async def test_the_demo_keeps_no_question_while_it_answers(serve):
    server = serve()
    question = json.dumps({"messages": [{"role": "user", "content": "a"}] * 100_000}).encode()
    before = resident(server.process.pid)
    async with unharmed(server), AsyncExitStack() as stack:
        for _ in range(8):
            url = server.http + CHAT
            await (await stack.enter_async_context(stream("POST", url, None, question))).event()
        assert resident(server.process.pid) - before < 120 << 20


async def test_what_the_demo_has_yet_to_say_takes_no_memory(serve):
    server = serve(program=program())
    before = resident(server.process.pid)
    async with AsyncExitStack() as stack:
        for _ in range(100):
            asked = stream("POST", server.http + CHAT, None, asking("Hello"))
            await (await stack.enter_async_context(asked)).event()
        assert resident(server.process.pid) - before < 20 << 20


async def test_an_answer_that_has_ended_takes_what_is_counted_for_it(serve):
    server = serve("--linger", "0")

    async def ask():
        headers = {"X-Title": "x" * 10_000}  # which goes on to an upstream
        async with stream("POST", server.http + CHAT, headers, asking("Hello")) as response:
            await response.event()

    async def leave(times):
        for _ in range(times // 50):
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(ask)
        await until_health(server, answers=0)
        return resident(server.process.pid)

    before = await leave(100)
    assert await leave(1000) - before < 6 << 20


@pytest.mark.parametrize("name", ["model", "previous_response_id"])
async def test_a_name_that_is_kept_with_an_answer_has_a_limit(demo, name):
    question = {"input": "Hello", name: "x" * 1_000_000}
    refused = await fetch("POST", demo.http + "/v1/responses", None, question)
    assert refused.status == 400
    assert json.loads(refused.body)["error"]["param"] == name


@pytest.mark.parametrize(
    ("more", "count"), [(f'"{"x" * 2**20}"', 40), (f"[{'[],' * 19_000}0]", 150)]
)
async def test_long_questions_that_come_together_are_parsed_one_by_one(serve, more, count):
    server = serve(program=measured(60, rounds=0.06))
    question = f'{json.dumps(asking("hi"))[:-1]},"more":{more}}}'.encode()
    lines = "Host: localhost", f"Content-Length: {len(question)}"
    async with unharmed(server), AsyncExitStack() as stack:
        askers = [await stack.enter_async_context(connect(server.http)) for _ in range(count)]
        for asker in askers:
            await asker.send(head("POST", OPENAI, *lines) + question[:-1])
        await trio.sleep(0.5)  # until all but the last byte is there
        for asker in askers:
            await asker.send(question[-1:])
        for asker in askers:
            assert (await asker.response("POST")).status == 200
    assert "round:" not in server.stderr_text(), server.stderr_text()


async def test_long_questions_that_wait_to_be_parsed_are_counted(serve):
    """Each takes 0.1 s: they come much faster than that."""
    server = serve(program=program(ANSWERS_BYTES=4 << 20))
    lists = ",".join(["[" * 100 + "]" * 100] * 1400)
    question = f'{json.dumps(asking("hi"))[:-1]},"x":[{lists}],}}'.encode()  # not quite JSON
    statuses = []

    async def ask():
        statuses.append((await fetch("POST", server.http + OPENAI, None, question)).status)

    async with unharmed(server), trio.open_nursery() as nursery:
        for _ in range(60):
            nursery.start_soon(ask)
    assert {*statuses} == ({400} if FULL else {400, 503})


async def test_a_question_whose_model_is_chosen_later_is_counted_as_it_goes_on(serve, upstream):
    """It is written anew without its spaces; what is no longer there must not be counted."""
    server = serve("--upstream", upstream.url, program=program(ANSWERS_BYTES=16 << 20))
    async with AsyncExitStack() as stack:
        for _ in range(6):
            prompt = upstream.script(*sse(delta("Hello")), HOLD)
            question = json.dumps(ask(prompt))[:-1] + " " * (3 << 20) + "}"
            asked = stream("POST", server.http + OPENAI, None, question.encode())
            response = await stack.enter_async_context(asked)
            assert response.status == 200


LONG_TEXT = "x" * 6_000_000  # more than the system takes from us
LONG_WHOLE = {
    "a response so far": ("GET", None),
    "a whole answer": (RESPONSES, response_whole([LONG_TEXT])),
    "vectors": (EMBEDDINGS, {"object": "list", "data": [LONG_TEXT]}),
}


@pytest.mark.parametrize("name", LONG_WHOLE)
async def test_long_bodies_that_nobody_takes_are_counted(serve, upstream, name):
    """Each client makes us hold three times as much: there is room for some of them."""
    limits = program(ANSWERS_BYTES=80 << 20)
    server = serve("--upstream", upstream.url, "--model", "scripted", program=limits)
    begun = told(BOOK, [*response_stream([LONG_TEXT])[:-1], HOLD])
    asked = {"input": upstream.script(*begun), "stream": True}
    async with unharmed(server), stream("POST", server.http + RESPONSES, None, asked) as running:
        events = await running.events(8)
        path, said = LONG_WHOLE[name]
        if said is None:
            question = "GET", f"{RESPONSES}/{events[0].json['response']['id']}", None
        else:
            question = "POST", path, {"input": upstream.script(plain(200, said))}
        assert (await one_of_them(server, *question)).status == 200
        async with AsyncExitStack() as stack:
            for _ in range(8):
                connection = await stack.enter_async_context(narrow(server.http))
                await connection.ask(*question[:2], None, question[2])
            await trio.sleep(0.3)
            status = (await one_of_them(server, *question)).status
            assert FULL or status in (502, 503)
        await trio.sleep(0.3)
        assert (await one_of_them(server, *question)).status == 200


async def one_of_them(server, method, path, body):
    return await fetch(method, server.http + path, None, body)


async def test_a_number_without_end_is_no_fault_of_the_demo(demo):
    question = (
        json.dumps(asking("Hello", model="demo"))[:-1].encode() + b', "seed": ' + b"9" * 5000 + b"}"
    )
    async with unharmed(demo):
        assert (await fetch("POST", demo.http + OPENAI, None, question)).status == 200


async def test_names_without_end_are_refused(demo):
    """A parser remembers each of them: half a second for a million."""
    names = b",".join(b'"%x":0' % n for n in range(310_000))
    question = json.dumps(asking("Hello"))[:-1].encode() + b', "x": {' + names + b"}}"
    async with unharmed(demo):
        assert (await fetch("POST", demo.http + OPENAI, None, question)).status == 413


async def read_heads(connection, count, scope):
    for _ in range(count):
        assert (await connection.response("HEAD")).status == 200
    scope.cancel()


WHOLE = {
    "a whole answer again": (OPENAI, "chat"),
    "a response again": ("/v1/responses", "responses"),
    "vectors": (EMBEDDINGS, "chat"),
}


@pytest.mark.parametrize("what", WHOLE)
async def test_what_is_not_read_of_a_whole_body_is_counted(serve, upstream, what):
    """4 MiB, held for each client that reads nothing; there is room for a few of them."""
    limits = program(ANSWERS_BYTES=40 << 20)
    server = serve("--upstream", upstream.url, "--model", "m", program=limits)
    path, name = WHOLE[what]
    whole = PROTOCOLS[name].whole(["x" * (4 << 20)])
    prompt = upstream.script(plain(200, whole))
    url, key = server.http + path, {"Idempotency-Key": "again"}
    question = {"model": "m", "input": prompt} | asking(prompt)
    assert (await fetch("POST", url, key, question)).status == 200
    statuses = []
    async with AsyncExitStack() as stack:
        for _ in range(10):
            client = await stack.enter_async_context(narrow(server.http))
            statuses.append((await client.request("POST", path, key, question)).status)
    assert statuses[:2] == [200, 200]
    assert FULL or statuses.count(200) < 6
    with trio.fail_after(5):  # there is room again when they have left
        status = 0
        while status != 200:
            status = (await fetch("POST", url, None, question)).status
            await trio.sleep(0.1)


# --------------------------------------------------------------------- stuck readers

STUCK = 50


async def test_a_reader_that_stands_still_is_dropped_after_10_seconds(serve, upstream):
    """Counted from the last byte that it took. Two of them: a curl that is stopped,
    and a reader that takes something once more, 5 seconds later."""
    curl = need("curl", "apt-get install curl")
    server = serve("--upstream", upstream.url, "--model", "m")
    gate, much = Gate(), [delta("x" * 500_000)] * 16
    prompt = upstream.script(*sse(delta("Hel"), gate, *much, HOLD))
    began = {}
    async with (
        stream("POST", server.http + CHAT, None, asking(prompt)) as first,
        narrow(server.http) as late,
        trio.open_nursery() as nursery,
    ):
        path = f"/answers/{first.headers['x-answer-id']}"
        with paused(curl, "-sN", server.http + path) as stopped:
            await late.request("GET", path)
            await until_health(server, readers=3)
            first.connection.patience = 60
            nursery.start_soon(read_on, first)
            stopped.send_signal(signal.SIGSTOP)
            gate.open()
            began["curl"] = time.monotonic()
            await trio.sleep(5)
            for _ in range(4):
                await late.receive()
            began["late"] = time.monotonic()
            for name, left in (("curl", 2), ("late", 1)):
                await until_health(server, readers=left)
                assert 9 < time.monotonic() - began[name] < 15, name
        nursery.cancel_scope.cancel()


async def test_a_reader_of_4_kilobytes_a_second_is_not_dropped(serve, upstream):
    """The system may take one that never has room for a whole segment for one that is gone."""
    limits = program(CLIENT_VANISHED=6)
    server = serve("--upstream", upstream.url, "--model", "m", program=limits)
    body = json.dumps(asking(upstream.script(*sse(*[delta("x" * 500_000)] * 16, HOLD)))).encode()
    plain = trio.socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with plain:
        await plain.connect(("127.0.0.1", server.port))
        length = f"Content-Length: {len(body)}"
        await plain.send(head("POST", CHAT, "Host: localhost", length) + body)
        for _ in range(160 if FULL else 44):
            await trio.sleep(0.25)
            with trio.fail_after(5):
                assert await plain.recv(1024)


async def read_on(response):
    while await response.piece():
        pass


MOUTHFUL = "x" * 4000


async def deaf(stack, count, url, request):
    """So many clients that ask for something, and then never read."""
    for _ in range(count):
        connection = await stack.enter_async_context(narrow(url))
        await connection.send(request)


async def test_members_that_never_read_are_dropped_and_delay_nobody(serve):
    """50 of them, while one talks faster than any buffer lasts; 5 hear all of it."""
    server = serve("--room-rate", "0", program=program(**LIMITS))
    pid, count = server.process.pid, 4000
    heard = []
    before = resident(pid)
    async with unharmed(server), AsyncExitStack() as stack:
        enter = stack.enter_async_context
        healthy = [await enter(raw_member(server.ws)) for _ in range(5)]
        await deaf(stack, STUCK, server.http, handshake_bytes())
        await until_health(server, members=STUCK + 5)
        async with trio.open_nursery() as nursery:
            for member in healthy:
                nursery.start_soon(hear_all, member, count, heard)
            grown = await talk_until_dropped(server, healthy[0], count)
        await until_health(server, members=5)
    assert heard == [True] * 5
    assert grown - before < STUCK << 20
    assert resident(pid) - before < 20 << 20


async def test_a_member_that_is_stuck_gets_no_time_for_a_goodbye(serve):
    limits = program(STUCK_TIMEOUT=3, LINGER_CLOSE=3)
    server = serve("--room-rate", "0", program=limits)
    async with raw_member(server.ws) as loud, AsyncExitStack() as stack:
        files = descriptors(server.process.pid)
        await deaf(stack, 1, server.http, handshake_bytes())
        await until_health(server, members=2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain, loud, 60)
            for n in range(2500):
                await loud.send(frame(TEXT, f"{n} {MOUTHFUL}".encode()))
            await until_health(server, members=1)
            await until(lambda: descriptors(server.process.pid) <= files, 1.5)
            nursery.cancel_scope.cancel()


async def talk_until_dropped(server, member, count):
    """Say everything; returns how large the server became."""
    largest = 0
    for n in range(count):
        await member.send(frame(TEXT, f"{n} {MOUTHFUL}".encode()))
        if n % 100 == 0:
            largest = max(largest, resident(server.process.pid))
            await trio.sleep(0.05)
    return largest


async def hear_all(member, count, heard):
    """Everything that is said, in order."""
    expected = (f"{n} {MOUTHFUL}{TAIL}".encode() for n in range(count))
    member.patience = 30
    heard.append(all([(await read_frame(member))[1] == text for text in expected]))


async def until_health(server, seconds=20, **wanted):
    with trio.fail_after(seconds):
        while True:
            found = await health(server)
            if wanted.items() <= found.items():
                return
            await trio.sleep(0.1)


async def test_readers_that_never_read_are_dropped_and_delay_nobody(serve, upstream):
    """50 of them on an answer of 16 MiB; 5 others read all of it."""
    env = {"OPENAI_BASE_URL": upstream.url}
    server = serve(program=program(**LIMITS), env=env)
    pid, gate, last = server.process.pid, Gate(), Gate()
    words = [f"{n} " + "y" * 16_000 for n in range(1000)]
    prompt = upstream.script(*answer("Go", gate, *words, last))
    whole = []
    async with unharmed(server), AsyncExitStack() as stack:
        first = await stack.enter_async_context(
            stream("POST", server.http + CHAT, None, asking(prompt))
        )
        name = first.headers["x-answer-id"]
        ask = head("GET", f"/answers/{name}", "Host: localhost")
        await deaf(stack, STUCK, server.http, ask)
        await until_health(server, readers=STUCK + 2)
        before = resident(pid)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_answer, first, whole)
            for _ in range(4):
                url = f"{server.http}/answers/{name}"
                other = await stack.enter_async_context(stream("GET", url))
                nursery.start_soon(read_answer, other, whole)
            gate.open()
            await until_health(server, readers=6)
            grown = resident(pid) - before
            last.open()
    expected = ["Go", *words]
    assert [text == expected for text in whole] == [True] * 5
    assert grown < (STUCK + 32) << 20  # the answer itself is kept, too


async def read_answer(response, whole):
    response.connection.patience = 30
    *events, done = await response.events()
    assert done.data == "[DONE]"
    whole.append([event.json["content"] for event in events])


# -------------------------------------------------------------------------- WebSocket


async def test_a_flood_of_pings_delays_nobody(demo):
    """Each gets its pong, in order; who never reads them is dropped."""
    async with unharmed(demo), raw_member(demo.ws) as member, trio.open_nursery() as nursery:
        nursery.start_soon(pings, member, 5000)
        for n in range(5000):
            assert await read_frame(member) == (PONG, b"%d" % n)


async def pings(member, count):
    for n in range(count):
        await member.send(frame(PING, b"%d" % n))


async def test_who_floods_and_never_reads_is_dropped(impatient):
    async with unharmed(impatient):
        async with narrow(impatient.http) as connection:
            await connection.send(handshake_bytes())
            flood = frame(PING, b"x" * 125) * 1000
            with pytest.raises(BROKEN):
                await send_without_end(connection, flood)
        await until_health(impatient, members=0)


async def test_fragments_of_nothing_do_not_pile_up(serve):
    """Empty ones cost nobody's limit of a message's size, and yet take memory."""
    server = serve("--room-rate", "0")
    before = resident(server.process.pid)
    async with unharmed(server), raw_member(server.ws) as member:
        await member.send(frame(TEXT, b"", fin=False))
        with suppress(*BROKEN):
            for _ in range(100):
                await member.send(frame(0, b"", fin=False) * 5000)
        assert resident(server.process.pid) - before < 3 << 20


async def test_a_message_in_tiny_fragments_takes_the_memory_of_its_text(serve):
    """As a list of texts, it would take 40 times as much."""
    server = serve("--room-rate", "0")
    letter = "\u0436".encode()
    message = frame(TEXT, letter, fin=False) + frame(0, letter, fin=False) * 24_000
    async with AsyncExitStack() as stack:
        members = [await stack.enter_async_context(raw_member(server.ws)) for _ in range(5)]
        before = resident(server.process.pid)
        for member in members:
            await member.send(message + frame(PING, b"read"))
        for member in members:
            assert await read_frame(member) == (PONG, b"read")
        assert resident(server.process.pid) - before < 4 << 20


@pytest.mark.parametrize("opcode", [PING, PONG])
async def test_a_member_that_says_nothing_for_long_is_welcome(serve, opcode):
    """Nothing but half a megabyte of signs of life."""
    server = serve()
    async with raw_member(server.ws) as member, trio.open_nursery() as nursery:
        nursery.start_soon(signs_of_life, member, opcode)
        while await read_frame(member) != (TEXT, ("hello" + TAIL).encode()):
            pass


async def signs_of_life(member, opcode):
    for _ in range(80):
        await member.send(frame(opcode, b"x" * 125) * 50)
    await member.send(frame(TEXT, b"hello"))


async def test_a_ping_after_the_close_harms_nobody(demo):
    """Whatever comes behind a close frame, and while the server is closing."""
    close = frame(CLOSE, (1000).to_bytes(2))
    too_long = frame(TEXT, b"x" * 4097)
    async with unharmed(demo):
        for ending in (close, too_long, frame(2, b"x"), b"\xff\xff", frame(TEXT, b"\xff")):
            for _ in range(10):
                async with raw_member(demo.ws) as member:
                    with suppress(*BROKEN):
                        await member.send(ending + frame(PING, b"hello") * 50)
                        await member.send(frame(PING, b"hello"))
                        assert await close_code(member)


async def test_half_a_frame_and_then_nothing(serve):
    """It holds nobody up, and is dropped when it answers no ping."""
    limits = LIMITS | {"PING_EVERY": 1}
    server = serve(program=program(**limits))
    async with unharmed(server), AsyncExitStack() as stack:
        for half in (1, 2, 5, 8):
            member = await stack.enter_async_context(raw_member(server.ws))
            await member.send(frame(TEXT, b"hello")[:half])
        await until_health(server, 60, members=0)


async def test_a_member_that_answers_pings_stays(serve):
    server = serve(program=program(PING_EVERY=1, HEARTBEAT_EVERY=1))
    async with raw_member(server.ws) as member:
        await answer_pings(member, 3)
        assert (await health(server))["members"] == 1


# ------------------------------------------------------------------------------- stop


async def load(stack, server, upstream):
    """100 readers, 50 members, 20 answers, and 10 that never read."""
    enter = stack.enter_async_context
    prompt = upstream.script(*sse(delta("Hel"), delta("z" * 500_000), HOLD))
    answers = [
        await enter(stream("POST", server.http + CHAT, None, asking(prompt))) for _ in range(20)
    ]
    name = answers[0].headers["x-answer-id"]
    for _ in range(6):
        await deaf(stack, 1, server.http, head("GET", f"/answers/{name}", "Host: localhost"))
    await deaf(stack, 4, server.http, handshake_bytes())
    clocks = [await enter(stream("GET", server.http + "/clock")) for _ in range(100)]
    protocols = [{"Sec-WebSocket-Protocol": ROOM_PROTOCOL}, {}] * 25
    members = [await enter(raw_member(server.ws, one)) for one in protocols]
    await until_health(server, members=54, answers=20)
    return answers, clocks, members


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_under_load_tells_everybody_and_ends_with_0(serve, upstream, number):
    server = serve("--grace", "1", env={"OPENAI_BASE_URL": upstream.url})
    async with AsyncExitStack() as stack:
        answers, clocks, members = await load(stack, server, upstream)
        began = time.monotonic()
        server.signal(number)
        for answered in answers:
            *_, last = await answered.events()
            assert last.type == "error"
            assert last.json["error"]["type"] == "server_stopping"
        for clock in clocks:
            await clock.events()
            assert 1000 <= clock.retry[-1] <= 5000
        for member in members:
            assert await close_code(member) == 1001
        assert await server.exit_code(began + 1 + 3 - time.monotonic()) == 0
    assert_no_fault(server.log())


async def test_a_second_signal_under_load_stops_at_once(serve, upstream):
    server = serve("--grace", "60", env={"OPENAI_BASE_URL": upstream.url})
    async with AsyncExitStack() as stack:
        await load(stack, server, upstream)
        server.signal()
        await trio.sleep(0.2)
        server.signal()
        await server.exit_code(2)
    assert_no_fault(server.log())


async def test_signals_during_the_stop_do_no_harm(serve, upstream):
    server = serve("--grace", "0.3", env={"OPENAI_BASE_URL": upstream.url})
    async with AsyncExitStack() as stack:
        await load(stack, server, upstream)
        for _ in range(40):
            if server.process.poll() is None:
                server.signal(random.choice([signal.SIGTERM, signal.SIGINT]))
            await trio.sleep(0.01)
        await server.exit_code(3)
    assert_no_fault(server.log())


# ------------------------------------------------------------------------------ churn


async def crowd(server, count):
    async with trio.open_nursery() as nursery:
        limit = trio.CapacityLimiter(50)

        async def one(n):
            async with limit:
                await visit(server, n)

        for n in range(count):
            nursery.start_soon(one, n)


async def test_nothing_is_left_of_those_that_came_and_went(serve):
    """Descriptors, tasks, readers, answers and memory are back where they were."""
    limits = {"LINGER_CLOSE": 0.5}
    flags = ("--linger", "0.2", "--keep", "0.5", "--room-rate", "0")
    server = serve(*flags, program=program(**limits))
    pid, count = server.process.pid, 5000 if FULL else 200
    await crowd(server, 100)  # what is loaded or grown once
    await settle(server)
    before = descriptors(pid), await tasks(server), await health(server)
    memory = resident(pid)
    async with unharmed(server):
        await crowd(server, count)
        await settle(server, readers=1)
    await settle(server)
    assert (descriptors(pid), await tasks(server), await health(server)) == before
    assert resident(pid) - memory < 10 << 20


async def settle(server, readers=0):
    wait = 90 if FULL else 15
    await until_health(server, wait, readers=readers, answers=0, members=0)
    await trio.sleep(62 if FULL else 1.5)


# ----------------------------------------------------------------- too many for it


def limited(files):
    """A program for serve() that the system lets have only so many files."""
    start = shlex.join(command())
    return ["sh", "-c", f'ulimit -n {files}; exec {start} "$@"', "sh"]


async def test_out_of_descriptors_is_not_the_end(serve):
    """Who is there goes on; who waits gets in as soon as somebody leaves."""
    server = serve(program=limited(60))
    assert "ulimit -n" in server.stderr_text()
    async with unharmed(server), AsyncExitStack() as stack:
        held = [await stack.enter_async_context(connect(server.http)) for _ in range(100)]
        await trio.sleep(1)
        assert server.process.poll() is None
        late = await stack.enter_async_context(connect(server.http))
        await late.send(head("GET", "/time", "Host: localhost"))
        for connection in held[:90]:
            reset(connection.transport)
        assert (await late.response()).status == 200
    assert len(server.stderr_text()) < 40_000, "it fills the disk with its complaints"


async def test_ten_thousand_idle_readers(serve):
    """(Some hundred, unless all is done in full.)"""
    server, count = serve(), 10_000 if FULL else 400
    pid = server.process.pid
    async with unharmed(server), AsyncExitStack() as stack:
        before = resident(pid)
        for n in range(count):
            connection = await stack.enter_async_context(
                narrow(server.http, f"127.0.0.{2 + n % 20}")
            )
            await connection.send(head("GET", "/clock", "Host: localhost"))
        await until_health(server, 60, readers=count + 1)
        await trio.sleep(2)
        assert resident(pid) - before < count * 20_000
        assert (await fetch("GET", server.http + "/time")).status == 200


# --------------------------------------------------------------------------- the log


async def test_nobody_can_forge_a_line_of_the_log(serve):
    server = serve()
    forged = "2026-01-01 00:00:00,000 ERROR stolen"
    async with unharmed(server):
        for path in (f"/%0a{forged.replace(' ', '%20')}", "/%0d%0astolen", "/%1b[2Jstolen"):
            assert (await fetch("GET", server.http + path)).status == 404
        name = "%0a" + forged.replace(" ", "%20")
        async with raw_member(f"{server.ws}/room?name={name}") as member:
            await member.send(frame(TEXT, forged.encode()))
            await member.send(frame(CLOSE, (1000).to_bytes(2) + f"\n{forged}".encode()))
            assert await close_code(member) == 1000
    log = server.stderr_text()
    assert all(re.match(r"\d{4}-\d\d-\d\d [\d:,]+ [A-Z]+ ", li) for li in log.splitlines())
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", log)
    assert not re.search("^2026-01-01|^stolen", log, re.MULTILINE)


async def test_a_quiet_log_has_no_line_for_a_connection(serve):
    server = serve("--log-level", "warning")
    for _ in range(3):
        await fetch("GET", server.http + "/time")
    assert server.stderr_text() == ""


async def test_one_line_for_each_connection_tells_what_became_of_it(serve):
    server = serve("--log-level", "info")
    secret = "sk-client-key-55221"
    head = {"Authorization": f"Bearer {secret}"}
    await fetch("GET", server.http + "/time", head)
    await fetch("POST", server.http + CHAT, head, asking("what is my PIN 7788?"))
    async with raw_member(server.ws) as member:
        await member.send(frame(TEXT, b"the PIN is 7788"))
        await read_frame(member)
        await member.send(frame(CLOSE, (1000).to_bytes(2)))
        await close_code(member)
    await until(lambda: server.stderr_text().count("127.0.0.1") == 3)
    log = server.stderr_text()
    time_line, chat_line, room_line = [x for x in log.splitlines() if "127.0.0.1" in x]
    assert "GET /time 200" in time_line
    assert f"POST {CHAT} 200" in chat_line
    assert "WebSocket" in room_line
    assert "1000" in room_line
    assert "7788" not in log
    assert secret not in log
