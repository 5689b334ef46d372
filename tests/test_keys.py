"""Keys: which one is sent to the model, who may spend it, and that nobody sees it."""

import json
import time
from contextlib import AsyncExitStack

import pytest
import trio
from conftest import SECRET
from kit import (
    CHAT,
    HOLD,
    OPENAI,
    Gate,
    answer,
    asking,
    delta,
    fetch,
    plain,
    run_to_exit,
    sse,
    stream,
    until,
)
from test_answers import FORMATS, ask, error_of

LIST = {"object": "list", "data": [{"id": "scripted", "object": "model"}]}
FOREIGN = {"Origin": "http://evil.example"}


def relayed(serve, upstream, *flags, key=""):
    env = {"OPENAI_BASE_URL": upstream.url, "OPENAI_API_KEY": key}
    return serve("--model", "scripted", *flags, env=env)


# ------------------------------------------------------------------------- at start


@pytest.mark.parametrize("space", ["\r", "\n", "\r\n", " ", "\t"])
async def test_white_space_around_key_and_url_is_no_part_of_them(
    serve, upstream, space
):
    """A key that is read from a file has the end of its line."""
    key, url = f"{space}{SECRET}{space}", f"{space}{upstream.url}{space}"
    server = serve("--model", "m", env={"OPENAI_API_KEY": key, "OPENAI_BASE_URL": url})
    prompt = upstream.script(*answer("Hello"))
    response = await fetch("POST", server.http + CHAT, None, ask(prompt))
    assert response.status == 200
    assert upstream.asked(prompt)[0].headers["authorization"] == f"Bearer {SECRET}"


UNSENDABLE = ["\r", "\n", "\x01", "\x7f", "\x1b[0m", "é", "钥", "\u2028", "\udcff"]


@pytest.mark.parametrize("odd", UNSENDABLE, ids=ascii)
@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "OPENAI_BASE_URL"])
def test_a_key_or_url_that_cannot_be_sent_is_one_line_and_exit_2(name, odd):
    """The line names what is wrong, and says nothing of the key itself."""
    env = {
        "OPENAI_BASE_URL": "http://127.0.0.1:1/v1",
        "OPENAI_API_KEY": SECRET,
    }
    env[name] = {
        "OPENAI_API_KEY": f"sk-7f3a9c{odd}55e1",
        "OPENAI_BASE_URL": f"http://me:pa55word@127.0.0.1:1/v1{odd}/x",
    }[name]
    done = run_to_exit("--port", "0", "--room-port", "0", env=env)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert {"OPENAI_API_KEY": "OPENAI_API_KEY", "OPENAI_BASE_URL": "--upstream"}[
        name
    ] in done.stderr
    for hidden in (SECRET, "7f3a9c", "55e1", "pa55word"):
        assert hidden not in done.stderr + done.stdout
    assert "chatstream: http" not in done.stdout + done.stderr


# ------------------------------------------------------------- which key, and whose


@FORMATS
@pytest.mark.parametrize(
    ("head", "passed"),
    [
        ({"Authorization": "Bearer sk-client-1"}, ["authorization"]),
        ({"Authorization": "bearer sk-client-1"}, ["authorization"]),
        ({"x-api-key": "sk-client-1"}, ["x-api-key"]),
        ({"api-key": "sk-client-1"}, ["api-key"]),
        ({"Authorization": "Basic bWU6cGE1NXdvcmQ="}, []),
        ({"Authorization": "basic bWU6cGE1NXdvcmQ="}, []),
        ({"Authorization": "Digest username=me"}, []),
        ({"Authorization": "Negotiate YIIabc"}, []),
        ({"Authorization": "bWU6cGE1NXdvcmQ="}, []),
        ({"Authorization": "Bearer"}, []),
        ({"Authorization": "Bearer abc, Basic bWU6cGE1NXdvcmQ="}, []),
        (
            {"Authorization": "Bearer abc", "authorization": "Basic bWU6cGE1NXdvcmQ="},
            [],
        ),
        (
            {"Authorization": "Basic bWU6cGE1NXdvcmQ=", "x-api-key": "sk-client-1"},
            ["x-api-key"],
        ),
        ({"Proxy-Authorization": "Basic bWU6cGE1NXdvcmQ="}, []),
        ({"Cookie": "session=1"}, []),
    ],
    ids=str,
)
async def test_only_what_is_meant_for_a_model_is_sent_to_it(
    keyless, upstream, path, head, passed
):
    """A login at the proxy before us is not."""
    prompt = upstream.script(*answer("Hello"))
    await fetch("POST", keyless.http + path, head, ask(prompt))
    sent = upstream.asked(prompt)[0].headers
    given = {name.lower(): value for name, value in head.items()}
    kinds = ("authorization", "x-api-key", "api-key", "proxy-authorization", "cookie")
    assert {k: v for k, v in sent.items() if k in kinds} == {
        name: given[name] for name in passed
    }


@pytest.fixture(scope="session")
def keyless(shared, upstream):
    """A server that relays without a key of its own."""
    return shared("--model", "scripted", env={"OPENAI_BASE_URL": upstream.url})


async def test_the_list_of_models_is_asked_for_with_the_clients_key(
    serve, second_upstream
):
    second_upstream.other = lambda heard: [plain(200, LIST)]
    server = relayed(serve, second_upstream)
    for head in (
        {"Authorization": "Bearer sk-client-1"},
        {"x-api-key": "sk-client-1"},
        {"api-key": "sk-client-1"},
        {"Authorization": "Basic bWU6cGE1NXdvcmQ="},
    ):
        listed = await fetch("GET", server.http + "/v1/models", head)
        assert listed.json == LIST
    sent = [
        {k: v for k, v in h.headers.items() if k.endswith(("authorization", "-key"))}
        for h in second_upstream.heard
    ]
    assert sent == [
        {"authorization": "Bearer sk-client-1"},
        {"x-api-key": "sk-client-1"},
        {"api-key": "sk-client-1"},
        {},
    ]


# ---------------------------------------------------------------------- never shown

ODD = ["{", '"', "e", "}", ":", ",", "\\", "null", "message", "error", "[key]", "1"]


@FORMATS
@pytest.mark.parametrize("key", ODD)
async def test_a_short_key_leaves_an_error_as_it_is(keyless, upstream, path, key):
    """A key may be any text: also one that is a part of all JSON."""
    error = {"message": 'No {such} "key": message, e1', "type": "t", "code": "e1"}
    for name, value in [("Authorization", f"Bearer {key}"), ("x-api-key", key)]:
        prompt = upstream.script(plain(401, {"error": error}))
        response = await fetch("POST", keyless.http + path, {name: value}, ask(prompt))
        assert response.status == 401
        assert response.error["message"] == error["message"]
        prompt = upstream.script(*sse(delta("Hello"), {"error": error}))
        async with stream(
            "POST", keyless.http + path, {name: value}, ask(prompt)
        ) as response:
            assert error_of(await response.events())["message"] == error["message"]
    assert "Traceback" not in keyless.log()


@pytest.mark.parametrize("key", [*ODD, "caf\xe9"])
async def test_a_short_key_leaves_the_error_of_the_models_as_it_is(
    serve, second_upstream, key
):
    error = {"message": "message: no such key", "type": "t", "param": None}
    second_upstream.other = lambda heard: [plain(401, {"error": error})]
    server = relayed(serve, second_upstream)
    for head in ({"Authorization": f"Bearer {key}"}, {"api-key": key}):
        response = await fetch("GET", server.http + "/v1/models", head)
        assert response.status == 401
        assert response.error["message"] == error["message"]
    assert "Traceback" not in server.log()


LONG = ['12345678"', "{{{{{{{{", "\\\\\\\\\\\\\\\\", "messages", "sk-client-2b8e9d"]
HEADS = ["Authorization: Bearer {}", "x-api-key: {}", "api-key: {}"]


@FORMATS
@pytest.mark.parametrize("key", LONG)
@pytest.mark.parametrize("head", HEADS)
async def test_the_key_that_was_sent_is_hidden_wherever_it_is_said(
    keyless, upstream, path, key, head
):
    name, _, value = head.format(key).partition(": ")
    error = {"message": f"Bad key {key}, {key}.", "code": key, "param": f"<{key}>"}
    for steps, status in [
        ([plain(401, {"error": error}, f"x-request-id: {key}")], 401),
        (sse(delta("Hello"), {"error": error}), 200),
    ]:
        prompt = upstream.script(*steps)
        async with stream(
            "POST", keyless.http + path, {name: value}, ask(prompt)
        ) as response:
            assert response.status == status
            assert key not in str(response.headers)
            if status == 200:
                found = error_of(await response.events())
            else:
                found = (await response.read()).error
        assert found["message"] == "Bad key [key], [key]."
        assert (found["code"], found["param"]) == ("[key]", "<[key]>")


async def test_only_the_key_that_was_sent_is_hidden(serve, upstream):
    """The server's own was sent: what the client brought is a word like any other."""
    server = relayed(serve, upstream, key=SECRET)
    prompt = upstream.script(plain(500, {"error": f"no {SECRET}, completion 12345678"}))
    head = {"Authorization": "Bearer completion", "x-api-key": "12345678"}
    response = await fetch("POST", server.http + CHAT, head, ask(prompt))
    assert response.error["message"] == "no [key], completion 12345678"


async def test_an_error_that_is_nested_deeply_is_an_error_still(keyless, upstream):
    for depth in (100, 900, 5000, 20_000):
        body = b'{"error":{"message":"no","more":' + b"[" * depth + b"]" * depth + b"}}"
        prompt = upstream.script(plain(418, body))
        response = await fetch("POST", keyless.http + CHAT, None, ask(prompt))
        assert response.status == 418
        assert json.loads(response.body)["error"]["message"]
    assert "Traceback" not in keyless.log()


# ------------------------------------------------------- who may spend it on models


@pytest.fixture
def listing(serve, second_upstream):
    """A server with a key, and what its upstream, which lists its models, has heard."""
    second_upstream.other = lambda heard: [plain(200, LIST)]
    return relayed(serve, second_upstream, key=SECRET), second_upstream.heard


async def test_a_foreign_page_cannot_spend_the_key_on_models(listing):
    server, heard = listing
    for origin in ("http://evil.example", "null", "https://127.0.0.1.evil.example"):
        for method in ("GET", "HEAD", "OPTIONS"):
            head = {"Origin": origin, "Access-Control-Request-Method": "GET"}
            response = await fetch(method, server.http + "/v1/models", head)
            assert response.headers.get("access-control-allow-origin") in (
                None,
                "null",  # who may read that it is refused
            )
            assert response.status == 403 or (method, origin) == ("OPTIONS", "null")
    assert heard == []


async def test_the_servers_own_page_and_an_allowed_one_may_list_the_models(
    serve, second_upstream
):
    second_upstream.other = lambda heard: [plain(200, LIST)]
    allowed = "https://my.site"
    server = relayed(serve, second_upstream, "--allow-origin", allowed)
    for origin in (allowed, f"http://127.0.0.1:{server.port}"):
        head = {"Origin": origin}
        response = await fetch("GET", server.http + "/v1/models", head)
        assert response.json == LIST
        assert response.headers["access-control-allow-origin"] == origin


async def test_the_models_are_asked_for_once_for_many(listing):
    server, heard = listing
    listed = []

    async def ask_for_them(number):
        # With the server's key nothing that a client brings makes a difference.
        head = {"Authorization": f"Bearer sk-client-{number}"}
        listed.append((await fetch("GET", server.http + "/v1/models", head)).json)

    for _ in range(2):
        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(ask_for_them, number)
    assert listed == [LIST] * 100
    assert len(heard) == 1


async def test_a_list_is_shared_by_those_with_the_same_key_only(serve, second_upstream):
    """Each key has models of its own."""

    def own(heard):
        return [plain(200, {"data": [{"id": heard.headers.get("authorization")}]})]

    second_upstream.other = own
    server = relayed(serve, second_upstream)
    for key in ("sk-an", "sk-bo", "sk-an", "sk-bo", None):
        head = {"Authorization": f"Bearer {key}"} if key else {}
        listed = (await fetch("GET", server.http + "/v1/models", head)).json
        assert listed["data"][0]["id"] == head.get("Authorization")
    assert len(second_upstream.heard) == 3


async def test_the_list_is_asked_for_anew_after_10_seconds(listing):
    server, heard = listing
    began = time.monotonic()
    while len(heard) < 2:
        assert (await fetch("GET", server.http + "/v1/models")).json == LIST
        await trio.sleep(0.25)
        assert time.monotonic() - began < 20
    assert heard[1].at - heard[0].at > 9


async def test_a_failure_is_told_and_not_kept(serve, second_upstream):
    answers = [plain(503, {"error": "busy"}), plain(200, LIST)]
    second_upstream.other = lambda heard: [answers[len(second_upstream.heard) - 1]]
    server = relayed(serve, second_upstream)
    first = await fetch("GET", server.http + "/v1/models")
    assert (first.status, first.error["message"]) == (503, "busy")
    assert (await fetch("GET", server.http + "/v1/models")).json == LIST


async def test_300_that_ask_for_the_models_and_leave_cost_one_connection(
    serve, second_upstream
):
    second_upstream.other = lambda heard: [HOLD]
    server = relayed(serve, second_upstream, key=SECRET)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(trio.open_nursery())
        connections = []
        for _ in range(300):
            transport = await trio.open_tcp_stream("127.0.0.1", server.port)
            connections.append(transport)
            await transport.send_all(
                b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
            )
        await until(lambda: second_upstream.heard)
        for transport in connections:
            await trio.aclose_forcefully(transport)
    await until(lambda: all(heard.closed_at for heard in second_upstream.heard), 5)
    assert len(second_upstream.heard) == 1


async def test_who_stays_gets_the_list_though_the_first_has_left(
    serve, second_upstream
):
    gate = Gate()
    second_upstream.other = lambda heard: [gate, plain(200, LIST)]
    server = relayed(serve, second_upstream)
    url, request = server.http + "/v1/models", b"GET /v1/models HTTP/1.1\r\n"
    listed = []

    async def stay():
        listed.append((await fetch("GET", url)).json)

    async with trio.open_nursery() as nursery:
        first = await trio.open_tcp_stream("127.0.0.1", server.port)
        await first.send_all(request + b"Host: localhost\r\n\r\n")
        await until(lambda: second_upstream.heard)
        nursery.start_soon(stay)
        await trio.sleep(0.2)  # until it waits, too
        await trio.aclose_forcefully(first)
        await trio.sleep(0.2)
        gate.open()
    assert listed == [LIST]
    assert len(second_upstream.heard) == 1


async def test_a_question_without_a_model_shares_the_list(serve, second_upstream):
    """The first model is found by the same question as the list is."""
    second_upstream.other = lambda heard: [plain(200, LIST)]
    server = serve(env={"OPENAI_BASE_URL": second_upstream.url})
    for _ in range(3):
        prompt = second_upstream.script(*answer("Hello"))
        await fetch("POST", server.http + OPENAI, None, asking(prompt))
        assert second_upstream.asked(prompt)[0].json["model"] == "scripted"
    lists = [heard for heard in second_upstream.heard if heard.method == "GET"]
    assert len(lists) == 1
