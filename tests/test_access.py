"""Who may do what: by what a client calls the server, and by where its page is from."""

from urllib.parse import urlsplit

import pytest
from kit import (
    CHAT,
    HANDSHAKE,
    OPENAI,
    Cut,
    answer,
    asking,
    connect,
    fetch,
    fetch_events,
    raw_member,
    stream,
)

HELLO = asking("Hello", stream=True)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:{port}", 200),
        ("127.0.0.1:1", 200),
        ("localhost", 200),
        ("LocalHost:{port}", 200),
        ("[::1]", 200),
        ("[::1]:{port}", 200),
        ("192.168.0.1", 200),  # a name server cannot make an address ours
        ("evil.example", 421),
        ("evil.example:{port}", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("evil.example@localhost", 421),
        ("localhost@evil.example", 421),
        ("127.0.0.1 evil.example", 421),
        ("localhost:evil.example", 421),
        ("localhost/../evil", 421),
        ("localhost.", 200),
        ("127.1.2.3", 200),
        ("[::ffff:127.0.0.1", 421),
        ("xn--\x7f", 421),
        ("", 421),
    ],
)
@pytest.mark.parametrize("path", ["/", "/clock", "/v1/models"])
async def test_a_rebound_host_is_421(demo, host, status, path):
    host = host.format(port=demo.port)
    async with connect(demo.http) as connection:
        response = await connection.request("GET", path, host=host)
        if status == 421:
            assert response.status in (421, 400)  # 400: it cannot be a Host at all
            assert (await response.read()).error["message"]
        else:
            assert response.status == 200


@pytest.mark.parametrize("port", ["port", "room_port"])
async def test_a_rebound_host_cannot_join(demo, port):
    url = f"http://127.0.0.1:{getattr(demo, port)}/"
    async with connect(url) as connection:
        response = await connection.request("GET", "/", HANDSHAKE, host="evil.example")
        assert response.status == 421


async def test_a_server_for_the_network_has_any_name(serve):
    server = serve("--host", "0.0.0.0")
    async with connect(f"http://127.0.0.1:{server.port}") as connection:
        response = await connection.request("GET", "/time", host="chat.example.org")
        assert response.status == 200


async def test_a_name_is_not_believed_because_host_says_the_same(serve):
    """A name may be made to lead here by whoever owns it: an address may not."""
    server = serve("--host", "0.0.0.0", "--allow-origin", "https://my.site")
    for origin, host, status in [
        ("http://evil.example:{port}", "evil.example:{port}", 403),
        ("http://127.0.0.1:{port}", "127.0.0.1:{port}", 404),
        ("http://localhost:{port}", "localhost:{port}", 404),
        ("http://10.0.0.7:{port}", "10.0.0.7:{port}", 404),
        ("http://10.0.0.8:{port}", "10.0.0.7:{port}", 403),
        ("https://my.site", "chat.my.site", 404),
    ]:
        origin, host = (text.format(port=server.port) for text in (origin, host))
        async with connect(f"http://127.0.0.1:{server.port}") as connection:
            response = await connection.request(
                "DELETE", "/answers/x", {"Origin": origin}, host=host
            )
            assert response.status == status, origin


def origins(server):
    """(origin, welcome) at a server with the demo model and no flag."""
    yield f"http://127.0.0.1:{server.port}", True
    yield f"http://127.0.0.1:{server.room_port}", True  # our page, our other port
    yield f"http://localhost:{server.port}", True
    yield "null", True
    yield None, True
    yield "http://evil.example", False
    yield f"http://127.0.0.1.evil.example:{server.port}", False
    yield f"http://evil.example:{server.port}", False
    yield "http://127.0.0.1:1", False
    yield "http://127.0.0.1", False
    yield "", False
    yield "rubbish", False
    yield "http://[", False
    yield "file://", False
    yield f"http://localhost:{server.port}@evil.example", False
    yield f"http://127.0.0.1:{server.port}, http://evil.example", False
    yield "caf\xe9", False


def from_origin(origin):
    return {} if origin is None else {"Origin": origin}


GUARDED = [("POST", CHAT), ("POST", OPENAI)]
GUARDED += [("GET", "/answers/{id}"), ("DELETE", "/answers/{id}")]


@pytest.mark.parametrize(("method", "path"), GUARDED)
async def test_a_foreign_origin_cannot_start_read_or_stop_an_answer(demo, method, path):
    for origin, welcome in origins(demo):
        async with stream("POST", demo.http + CHAT, None, HELLO) as running:
            url = demo.http + path.format(id=running.headers["x-answer-id"])
            body = HELLO if method == "POST" else None
            async with stream(method, url, from_origin(origin), body) as response:
                check_welcome(response, origin, welcome)


def check_welcome(response, origin, welcome):
    allowed = response.headers.get("access-control-allow-origin")
    if welcome:
        assert response.status in (200, 204), origin
        assert allowed in (origin, "*") or origin is None
    else:
        assert response.status == 403, origin
        assert allowed is None


async def test_a_refusal_says_what_to_do(demo):
    head = {"Origin": "http://evil.example"}
    response = await fetch("POST", demo.http + CHAT, head, HELLO)
    assert "--allow-origin http://evil.example" in response.error["message"]


@pytest.mark.parametrize("path", ["/", "/room", "/clock"])
async def test_a_foreign_origin_opens_no_websocket(demo, path):
    for url in (demo.http, demo.ws):
        for origin, welcome in origins(demo):
            async with connect(url) as connection:
                head = HANDSHAKE | from_origin(origin)
                host = urlsplit(url).netloc
                response = await connection.request("GET", path, head, host=host)
                assert response.status == (101 if welcome else 403), (url, origin)


@pytest.mark.parametrize("path", ["/clock", "/time", "/healthz", "/"])
@pytest.mark.parametrize("origin", ["http://any.example", "null"])
async def test_public_reads_allow_any_origin(demo, path, origin):
    async with stream("GET", demo.http + path, {"Origin": origin}) as response:
        assert response.status == 200
        assert response.headers["access-control-allow-origin"] in ("*", origin)


@pytest.mark.parametrize(("method", "path"), GUARDED)
async def test_a_preflight_is_answered(demo, method, path):
    head = {
        "Origin": f"http://127.0.0.1:{demo.port}",
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "content-type,last-event-id",
    }
    response = await fetch("OPTIONS", demo.http + path.format(id="x"), head)
    assert response.status in (200, 204)
    assert response.headers["access-control-allow-origin"] in (head["Origin"], "*")
    allowed = response.headers["access-control-allow-headers"].lower()
    assert {"content-type", "last-event-id"} <= set(allowed.replace(" ", "").split(","))
    assert method in response.headers["access-control-allow-methods"]
    head["Origin"] = "http://evil.example"
    response = await fetch("OPTIONS", demo.http + path.format(id="x"), head)
    assert "access-control-allow-origin" not in response.headers


async def test_a_preflight_of_the_clock_is_answered_for_any_origin(demo):
    head = {
        "Origin": "http://any.example",
        "Access-Control-Request-Method": "GET",
        "Access-Control-Request-Headers": "last-event-id",
    }
    response = await fetch("OPTIONS", demo.http + "/clock", head)
    assert response.status in (200, 204)
    assert response.headers["access-control-allow-origin"] in ("*", head["Origin"])
    assert "last-event-id" in response.headers["access-control-allow-headers"].lower()


async def test_a_preflight_for_an_odd_header_is_answered(demo):
    """It cannot be sent back, and no such header can be allowed."""
    for odd in ("caf\xe9", "x-one, \xff\xfe"):
        head = {"Access-Control-Request-Headers": odd}
        response = await fetch("OPTIONS", demo.http + "/v1/models", head)
        assert response.status == 204
        assert response.headers["access-control-allow-headers"] == ""


async def test_allow_origin_lets_a_page_in(serve):
    flags = ["--allow-origin", "http://one.example", "--allow-origin", "http://two.example"]
    server = serve(*flags)
    for origin in ("http://one.example", "http://two.example"):
        head = {"Origin": origin}
        async with stream("POST", server.http + CHAT, head, HELLO) as response:
            assert response.status == 200
            assert response.headers["access-control-allow-origin"] in (origin, "*")
            exposed = response.headers.get("access-control-expose-headers", "").lower()
            assert "x-answer-id" in exposed
        async with raw_member(server.ws, head):
            pass
    for origin in ("https://one.example", "http://one.example.net", "http://x.example"):
        response = await fetch("POST", server.http + CHAT, {"Origin": origin}, HELLO)
        assert response.status == 403, origin


async def test_a_page_from_disk_is_refused_once_a_real_upstream_is_there(relay, upstream):
    head, body = {"Origin": "null"}, asking(upstream.script(*answer("Hello")))
    response = await fetch("POST", relay.http + CHAT, head, body)
    assert response.status == 403
    assert "--allow-origin null" in response.error["message"]
    with pytest.raises((AssertionError, Cut)):
        async with raw_member(relay.ws, head):
            pass


async def test_a_page_from_disk_is_let_in_by_a_flag(serve, upstream):
    server = serve("--allow-origin", "null", env={"OPENAI_BASE_URL": upstream.url})
    head, body = {"Origin": "null"}, asking(upstream.script(*answer("Hello")))
    events = await fetch_events("POST", server.http + CHAT, head, body)
    assert events[-1].data == "[DONE]"


async def test_a_foreign_page_cannot_spend_money(relay, upstream):
    prompt = upstream.script(*answer("Hello"))
    head = {"Origin": "http://evil.example"}
    for path in (CHAT, OPENAI):
        response = await fetch("POST", relay.http + path, head, asking(prompt))
        assert response.status == 403
    assert not upstream.asked(prompt)
