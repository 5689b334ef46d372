"""Requests: pages, the clock, what is refused and how, and who may do what."""

import json
import time
from urllib.parse import quote

import pytest
import trio
from kit import CHAT, OPENAI, ROOT, asking, connect, fetch, program, raw_member, stream
from trio_websocket import open_websocket_url

LOOPBACK = "127.0.0.1"
HELLO = asking("Hello", stream=True)

# ------------------------------------------------------------------------------ pages

TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


def page_paths():
    """Every file of www/, as a path on the server."""
    files = (file for file in (ROOT / "www").rglob("*") if file.is_file())
    return sorted(f"/{file.relative_to(ROOT / 'www')}" for file in files)


@pytest.mark.parametrize("path", page_paths())
async def test_each_file_is_served_and_known_again(demo, path):
    file = ROOT / "www" / path[1:]
    page = await fetch("GET", demo.http + path)
    assert (page.status, page.body) == (200, file.read_bytes())
    assert page.headers["content-type"].startswith(TYPES.get(file.suffix, ""))
    head = await fetch("HEAD", demo.http + path)
    assert (head.status, head.headers["etag"]) == (200, page.headers["etag"])
    known = {"If-None-Match": page.headers["etag"]}
    again = await fetch("GET", demo.http + path, known)
    assert (again.status, again.body) == (304, b"")
    assert again.headers["etag"] == page.headers["etag"]


async def test_the_root_is_the_page(demo):
    page = await fetch("GET", demo.http + "/")
    assert page.headers["content-type"].startswith("text/html")
    assert page.body == (ROOT / "www" / "index.html").read_bytes()
    assert (await fetch("GET", demo.http + "/?a=b")).body == page.body


@pytest.mark.parametrize(
    ("tag", "status"),
    [('"other"', 200), ("*", 304), ('"other", {}', 304), ("W/{}", 304), ("", 200)],
)
async def test_an_etag_is_compared_as_a_list(demo, tag, status):
    etag = (await fetch("GET", demo.http + "/")).headers["etag"]
    page = await fetch("GET", demo.http + "/", {"If-None-Match": tag.format(etag)})
    assert page.status == status


@pytest.mark.parametrize(
    "path",
    [
        "/../chatstream.py",
        "/..%2fchatstream.py",
        "/%2e%2e/chatstream.py",
        "/%2e%2e%2f%2e%2e%2fetc/passwd",
        "/www/../chatstream.py",
        "/www/index.html",
        "/./../chatstream.py",
        "/..\\chatstream.py",
        "/..%5cchatstream.py",
        "//etc/passwd",
        "/" + quote(str(ROOT / "chatstream.py"), safe=""),
        "/index.html%00",
        "/.gitignore",
        "/chatstream.py",
        "/%ff%fe",
    ],
)
async def test_no_path_leads_out_of_the_pages(demo, path):
    async with connect(demo.http) as connection:
        response = await (await connection.request("GET", path)).read()
    assert response.status == 404
    assert response.error["message"]


# ------------------------------------------------------------------------------ clock


async def test_the_clock_ticks_each_second_on_the_second(demo):
    async with stream("GET", demo.http + "/clock") as clock:
        assert clock.status == 200
        assert clock.headers["content-type"].startswith("text/event-stream")
        assert clock.headers["cache-control"] == "no-cache, no-transform"
        assert clock.headers["x-accel-buffering"] == "no"
        first = await clock.event()
        second = await clock.event()
        late = time.time() % 1
        third = await clock.event()
    assert [second.n, third.n] == [first.n + 1, first.n + 2]
    assert abs(third.n - time.time()) < 2
    assert late < 0.5
    assert clock.retry == [2000]


async def test_all_readers_see_the_same_tick(demo):
    async with (
        stream("GET", demo.http + "/clock") as one,
        stream("GET", demo.http + "/clock") as other,
    ):
        seen = {event.n: event for event in await one.events(2)}
        same = [event for event in await other.events(2) if event.n in seen]
    assert same
    assert all(seen[event.n] == event for event in same)


async def test_time_is_the_same_tick_as_a_short_connection(demo):
    async with stream("GET", demo.http + "/clock") as clock:
        for _ in range(3):  # a tick may fall between the two
            event = await clock.event()
            short = (await fetch("GET", demo.http + "/time")).json
            if short["id"] == event.id:
                break
    assert short == {"id": event.id, "data": event.data}
    assert event.data.startswith("The server time is: ")


async def test_a_reader_that_comes_back_misses_no_tick(demo):
    """By a header, or by the URL where a client can set none, over either transport."""
    async with stream("GET", demo.http + "/clock") as clock:
        first, second = await clock.events(2)
    head, query = {"Last-Event-ID": first.id}, f"?after={quote(first.id)}"
    async with (
        stream("GET", demo.http + "/clock", head) as one,
        stream("GET", demo.http + "/clock" + query) as other,
        open_websocket_url(demo.ws + "/clock" + query) as member,
    ):
        with trio.fail_after(0.8):  # at once: no tick is due that soon
            assert await one.event() == await other.event() == second
            assert json.loads(await member.get_message())["id"] == second.id
        assert (await one.event()).n == first.n + 2


async def test_a_reader_that_was_away_too_long_is_told_what_it_missed(demo):
    async with stream("GET", demo.http + "/clock") as clock:
        event = await clock.event()
    long_ago = event.id.replace(str(event.n), str(event.n - 1000))
    async with stream("GET", demo.http + "/clock", {"Last-Event-ID": long_ago}) as clock:
        gap, first, second = await clock.events(3)
    assert (gap.type, gap.id) == ("gap", None)
    assert gap.json == {"missed": first.n - (event.n - 1000) - 1}
    assert second.n == first.n + 1


MEANINGLESS = ["rubbish", "clock", "clock-", "clock-x", "clock--5", "clock-1e9"]
MEANINGLESS += ["clock-99999999999", "clock-" + "9" * 5000, "clock-\xb2", "room-5", "-5"]
MEANINGLESS += ["caf\xe9", "x" * 4000]


async def test_an_id_of_the_clock_that_means_nothing_counts_as_none(demo):
    async with trio.open_nursery() as nursery:
        for last in MEANINGLESS:
            nursery.start_soon(read_live_ticks, demo, last)


async def read_live_ticks(server, last):
    head = {"Last-Event-ID": last}
    async with stream("GET", server.http + "/clock", head) as clock:
        assert clock.status == 200
        first, second = await clock.events(2)
    assert (first.type, second.n) == ("message", first.n + 1)
    assert abs(first.n - time.time()) < 3


async def test_a_query_of_too_many_fields_is_none(demo):
    query = "&".join(f"field{n}=x" for n in range(100))
    async with stream("GET", f"{demo.http}/clock?{query}&after=clock-1") as response:
        assert response.status == 200
        assert (await response.event()).type == "message"  # and no gap


async def test_the_clock_over_a_websocket_is_the_same_log(demo):
    async with (
        stream("GET", demo.http + "/clock") as clock,
        open_websocket_url(demo.ws + "/clock") as member,
    ):
        with trio.fail_after(5):
            message = json.loads(await member.get_message())
            while (event := await clock.event()).id != message["id"]:
                pass
    assert message == {"id": event.id, "data": event.data}


@pytest.mark.parametrize("path", ["/clock", "/time", "/healthz", "/"])
async def test_head_opens_no_stream(demo, path):
    async with connect(demo.http) as connection:
        head = await connection.request("HEAD", path)
        assert head.status == 200
        after = await (await connection.request("GET", "/time")).read()
        assert after.json["data"]  # no body came in between
    get = await stream_head(demo.http + path)
    assert head.headers["content-type"] == get["content-type"]


async def stream_head(url):
    async with stream("GET", url) as response:
        return response.headers


async def test_health_counts(serve):
    server = serve()
    async with (
        stream("GET", server.http + "/clock"),
        raw_member(server.ws),
        raw_member(server.http + "/room"),
        stream("POST", server.http + CHAT, None, HELLO) as answering,
    ):
        await answering.event()
        health = await fetch("GET", server.http + "/healthz")
    assert health.json == {
        "status": "ok",
        "readers": 2,
        "answers": 1,
        "members": 2,
        "model": "demo",
    }


# ---------------------------------------------------------------------------- refusals

ROUTES = {
    "/": "GET",
    "/clock": "GET",
    "/time": "GET",
    "/healthz": "GET",
    "/v1/models": "GET",
    CHAT: "POST",
    OPENAI: "POST",
    "/answers/unknown": "GET, DELETE",
}
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW"]


@pytest.mark.parametrize("path", ROUTES)
async def test_a_wrong_method_is_405_and_names_the_right_ones(demo, path):
    right = set(ROUTES[path].split(", "))
    for method in set(METHODS) - right:
        response = await fetch(method, demo.http + path)
        assert response.status == 405, method
        allowed = {name.strip() for name in response.headers["allow"].split(",")}
        assert right <= allowed <= right | {"HEAD", "OPTIONS"}
        assert response.error["message"]


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("path", ["/nothing", "/v1", "/answers", "/answers/"])
async def test_a_wrong_path_is_404(demo, method, path):
    response = await fetch(method, demo.http + path)
    assert response.status == 404
    assert response.error["message"]


DEEP = b"[" * 100_000 + b"]" * 100_000
TALK = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("path", [CHAT, OPENAI])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"hello",
        b"messages=hello",
        b"\xff\xfe",
        b'{"messages": "\xff"}',
        b'{"messages": ' + DEEP + b"}",
        b'{"messages": [], "n": ' + b"9" * 10_000 + b"}",
        b"[]",
        b"null",
        b"5",
        b'"text"',
        b"{}",
        b'{"messages": null}',
        b'{"messages": "Hello"}',
        b'{"messages": {}}',
        b'{"messages": []}',
        b'{"messages": [null]}',
        b'{"messages": ["Hello"]}',
        b'{"messages": [[]]}',
        b'{"messages": [{}]}',
        b'{"messages": [{"content": "Hello"}]}',
        b'{"messages": [{"role": 5, "content": "Hello"}]}',
        b'{"messages": [{"role": "user", "content": 5}]}',
        b'{"messages": [{"role": "user", "content": "Hello"}], "seed": 1e999}',
        b'{"messages": [{"role": "user", "content": "Hello"}], "seed": ' + b"9" * 10_000 + b"}",
    ],
    ids=lambda body: body[:40].decode("latin-1"),
)
async def test_a_body_of_the_wrong_shape_is_400(demo, path, body):
    response = await fetch("POST", demo.http + path, None, body)
    assert response.status == 400
    assert response.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields", [{"stream": "yes"}, {"stream": 1}, {"model": 5}, {"stream_options": 5}]
)
async def test_a_field_of_the_wrong_type_is_400(demo, fields):
    response = await fetch("POST", demo.http + OPENAI, None, HELLO | fields)
    assert response.status == 400
    assert response.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be brief."}, *TALK],
        [{"role": "developer", "content": "Be brief."}, *TALK],
        [*TALK, {"role": "assistant", "content": None, "tool_calls": []}, *TALK],
        [*TALK, {"role": "tool", "tool_call_id": "1", "content": "sun"}],
        [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": "\ud800 half an emoji"}],
        [{"role": "user", "content": "\0\u2028\x1b[31m"}],
    ],
    ids=repr,
)
@pytest.mark.parametrize("path", [CHAT, OPENAI])
async def test_every_legal_talk_is_answered(demo, path, messages):
    body = {"messages": messages, "stream": True}
    async with stream("POST", demo.http + path, None, body) as response:
        assert response.status == 200
        assert (await response.event()).json


@pytest.mark.parametrize("path", [CHAT, OPENAI])
async def test_a_body_over_16_mib_is_413_before_it_has_come(demo, path):
    async with connect(demo.http) as connection:
        head = {"Content-Length": str((16 << 20) + 1)}
        response = await connection.request("POST", path, head, b"{")
        await response.read()
    assert response.status == 413
    assert response.error["message"]


async def test_a_chunked_body_over_16_mib_is_413(demo):
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    async with connect(demo.http) as connection:
        head = f"POST {OPENAI} HTTP/1.1\r\nHost: localhost\r\n"
        await connection.send(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        await connection.send(chunk * 256 + b"1\r\n \r\n")
        response = await (await connection.response()).read()
    assert response.status == 413


async def test_bodies_that_are_too_much_together_are_503(serve):
    """Here one is too much alone, and comes in many pieces at once."""
    server = serve(program=program(BODIES_BYTES=10_000))
    async with connect(server.http) as connection:
        head = f"POST {OPENAI} HTTP/1.1\r\nHost: localhost\r\n"
        await connection.send(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        await connection.send((b"3e8\r\n" + b" " * 1000 + b"\r\n") * 50)
        response = await (await connection.response()).read()
    assert response.status == 503
    assert response.error["type"] == "server_busy"


async def test_a_body_of_just_16_mib_is_read(demo):
    body = json.dumps(HELLO).encode()
    body += b" " * ((16 << 20) - len(body))
    async with stream("POST", demo.http + OPENAI, None, body) as response:
        assert response.status == 200


async def test_a_chunked_body_is_read(demo):
    body = json.dumps(HELLO | {"stream": True}).encode()
    async with connect(demo.http) as connection:
        head = f"POST {OPENAI} HTTP/1.1\r\nHost: localhost\r\n"
        await connection.send(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        for byte in body:
            await connection.send(b"1\r\n%c\r\n" % byte)
        await connection.send(b"0\r\n\r\n")
        response = await connection.response()
        assert response.status == 200
        assert (await response.event()).json["choices"]


async def test_a_client_that_asks_first_is_told_to_go_on(demo):
    body = json.dumps(HELLO).encode()
    async with connect(demo.http) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
        await connection.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
        assert b"100" in await connection.up_to(b"\r\n\r\n")
        await connection.send(body)
        assert (await connection.response()).status == 200


async def test_a_body_that_breaks_off_starts_nothing(serve, upstream):
    server = serve(env={"OPENAI_BASE_URL": upstream.url})
    before = len(upstream.heard)
    async with connect(server.http) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n"
        await connection.send(head.encode() + json.dumps(HELLO).encode())
    await trio.sleep(0.3)
    assert len(upstream.heard) == before
    assert (await fetch("GET", server.http + "/healthz")).json["answers"] == 0
