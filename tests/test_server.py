"""The process: how it starts, what it shrugs off, how it stops."""

import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import AsyncExitStack

import pytest
import trio
from kit import (
    CHAT,
    HANDSHAKE,
    HOLD,
    ROOM_PROTOCOL,
    ROOT,
    TEXT,
    Cut,
    Gate,
    answer,
    asking,
    close_code,
    connect,
    delta,
    fetch,
    frame,
    head,
    need,
    paused,
    plain,
    program,
    raw_connection,
    raw_member,
    read_frame,
    refused,
    reset,
    run_to_exit,
    sse,
    stream,
    unharmed,
    until,
)
from trio_websocket import ConnectionClosed, open_websocket_url

# ----------------------------------------------------------------------------- start


def test_the_start_line_names_the_real_addresses_once(serve):
    server = serve()
    assert 0 < server.port != server.room_port > 0
    line = (
        f"chatstream: http://localhost:{server.port}"
        f"  ws://localhost:{server.room_port}  model: demo\n"
    )
    assert server.log().count("chatstream: http") == 1
    assert line in server.log()


async def test_both_ports_speak_both_protocols(demo):
    for port in (demo.port, demo.room_port):
        health = await fetch("GET", f"http://127.0.0.1:{port}/healthz")
        assert health.json["status"] == "ok"
        async with open_websocket_url(f"ws://127.0.0.1:{port}/room") as member:
            await member.send_message("hello")
            with trio.fail_after(5):
                assert await member.get_message() == "hello--返回数据"


@pytest.mark.parametrize(
    ("flags", "env", "model"),
    [
        ([], {}, "demo"),
        (["--upstream", "http://127.0.0.1:9/v1", "--model", "flag"], {}, "flag"),
        ([], {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "OPENAI_MODEL": "e"}, "e"),
        (
            ["--model", "flag"],
            {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "OPENAI_MODEL": "e"},
            "flag",
        ),
    ],
)
async def test_a_flag_wins_over_the_environment(serve, flags, env, model):
    server = serve(*flags, env=env)
    assert server.model == model
    assert (await fetch("GET", server.http + "/healthz")).json["model"] == model


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--nonsense"], "--nonsense"),
        (["--port", "many"], "many"),
        (["--port", "65536"], "65536"),
        (["--room-port", "-1"], "-1"),
        (["--grace", "soon"], "soon"),
        (["--linger", "-1"], "-1"),
        (["--room-rate", "fast"], "fast"),
        (["--log-level", "shouting"], "shouting"),
        (["--upstream", "ftp://example.org"], "--upstream"),
        (["--upstream", "no url"], "--upstream"),
        (["--certfile", "cert.pem"], "--keyfile"),
        (["--keyfile", "key.pem"], "--certfile"),
        (["--certfile", "no.pem", "--keyfile", "no.key"], "no.pem"),
        (["--workers", "2"], "--redis"),
        (["--workers", "none"], "none"),
        (["--redis", "redis://me:pa55word@127.0.0.1:1"], "127.0.0.1:1"),
        (["--redis", "me:pa55word@127.0.0.1:1"], "redis://"),
        (["--host", "256.1.1.1"], "256.1.1.1"),
        (["extra"], "extra"),
        (["--prot", "80"], "--prot"),
        # what may be a secret is not repeated: this text is kept in logs
        (["--api-key", "sk-pa55word"], "--api-key"),
        (["--token=sk-pa55word"], "--token"),
        (["--k=sk-pa55word"], "--k"),
        (["--api-key sk-pa55word"], "--api-key"),
        (["sk-pa55word"], "belongs to no flag"),
        (["--redis", "redis://default:pa55word/abc@127.0.0.1:1"], "%2F"),
        (["--redis", "redis://127.0.0.1:1?password=pa55word"], "127.0.0.1:1"),
        (["--redis", "redis://127.0.0.1:1?password=pa55word&db=x"], "Redis"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_2(flags, says):
    ports = [] if "port" in flags[0] else ["--port", "0", "--room-port", "0"]
    done = run_to_exit(*ports, *flags)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert says in done.stderr
    assert "pa55word" not in done.stdout + done.stderr
    assert "chatstream: http" not in done.stdout + done.stderr


@pytest.mark.parametrize("flag", ["--port", "--room-port"])
def test_a_taken_port_is_one_line_and_exit_2(demo, flag):
    other = {"--port": "--room-port", "--room-port": "--port"}[flag]
    done = run_to_exit(flag, str(demo.port), other, "0")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert str(demo.port) in done.stderr


def test_help_names_every_flag():
    done = run_to_exit("--help")
    assert done.returncode == 0
    flags = "host port room-port upstream model allow-origin redis workers linger"
    flags += " grace room-rate room-suffix certfile keyfile log-level"
    for flag in flags.split():
        assert f"--{flag}" in done.stdout


IMPORT = """
import sys, threading, os
seen = []
def audit(event, args):
    if event in ("socket.bind", "socket.connect", "socket.getaddrinfo"):
        seen.append((event, args[-1]))
    if event == "open" and "/www" in str(args[0]):
        seen.append((event, args[0]))
class Watched(dict):
    def get(self, name, default=None):
        if name.startswith("OPENAI"):
            seen.append(("environ", name))
        return super().get(name, default)
    def __getitem__(self, name):
        return self.get(name)
os.environ = Watched(os.environ)
sys.addaudithook(audit)
import chatstream
assert not seen, seen
assert threading.active_count() == 1
assert "coredis" not in sys.modules and "redis" not in sys.modules
"""


def test_import_opens_nothing():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -------------------------------------------------------------------- hostile clients

HANDSHAKES = [
    ({}, 101),
    ({"Connection": "keep-alive, Upgrade"}, 101),  # Firefox
    ({"Connection": "upgrade"}, 101),
    ({"Sec-WebSocket-Protocol": "chatstream.v1, other"}, 101),
    ({"Sec-WebSocket-Extensions": "permessage-deflate"}, 101),
    ({"X-Anything": "\xff" * 100}, 101),
    ({"Connection": "close"}, 400),
    ({"Connection": "Upgrade, caf\xe9"}, 400),
    ({"Sec-WebSocket-Version": "8"}, 426),
    ({"Sec-WebSocket-Version": "\xb2"}, 426),
    ({"Sec-WebSocket-Key": "short=="}, 400),
    ({"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ"}, 400),
    ({"Sec-WebSocket-Key": "\xff\xfe"}, 400),
    ({"Sec-WebSocket-Protocol": "caf\xe9"}, 400),
    ({"Sec-WebSocket-Extensions": "permessage-d\xe9flate"}, 400),
    ({"Origin": "http://caf\xe9.example"}, 403),
]


@pytest.mark.parametrize(("changes", "status"), HANDSHAKES)
async def test_a_handshake_is_accepted_or_refused_with_a_reason(demo, changes, status):
    for url in (demo.http, demo.ws.replace("ws", "http", 1)):
        async with connect(url) as connection:
            response = await connection.request("GET", "/room", HANDSHAKE | changes)
            assert response.status == status
            if status != 101:
                assert (await response.read()).error["message"]


async def test_a_wrong_version_is_told_the_right_one(demo):
    head = HANDSHAKE | {"Sec-WebSocket-Version": "8"}
    response = await fetch("GET", demo.http + "/room", head)
    assert response.headers["sec-websocket-version"] == "13"
    assert response.headers["upgrade"] == "websocket"
    assert response.headers["connection"] == "upgrade, close"


HANDSHAKE_LINES = [f"{name}: {value}" for name, value in HANDSHAKE.items()]
UNREADABLE = {
    "a host that is no name": ("http://localhost/room", "Host: caf\xe9"),
    "two lines that must be one": ("/room", "Host: localhost", "Connection: keep-alive"),
}


@pytest.mark.parametrize("name", UNREADABLE)
async def test_a_handshake_that_cannot_be_read_is_refused_at_once(demo, name):
    path, *lines = UNREADABLE[name]
    request = head("GET", path, *HANDSHAKE_LINES, *lines)
    async with unharmed(demo), raw_connection(demo.http, request) as connection:
        response = await connection.response()
        assert response.status == 400
        assert (await response.read()).error["message"]


async def test_a_handshake_of_another_kind_ends_its_connection_only(demo):
    """Without a key, by POST, in HTTP/1.0, for no host, with a broken extension."""
    lines = [f"{name}: {value}" for name, value in HANDSHAKE.items()]
    good = head("GET", "/room", "Host: localhost", *lines)
    odd = [
        head("GET", "/room", "Host: localhost", *lines[:-1]),
        good.replace(b"GET", b"POST"),
        good.replace(b"HTTP/1.1", b"HTTP/1.0"),
        good.replace(b"localhost", b"caf\xe9"),
        good.replace(b"localhost", b"xn--\x7f"),
        good[:-2] + b"Sec-WebSocket-Extensions: ;;;=,\"'\r\n\r\n",
    ]
    async with unharmed(demo):
        for request in odd:
            async with raw_connection(demo.http, request) as connection:
                response = await connection.response()
                assert response.status in (101, 400, 404, 405, 421)


GARBAGE = {
    "nothing": b"",
    "a newline": b"\r\n\r\n",
    "noise": bytes(range(256)) * 4,
    "tls": bytes.fromhex("16030100f8010000f4030350"),
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 60,
    "half a head": b"GET /clock HTTP/1.1\r\nHost: 127",
    "no version": b"GET /\r\n\r\n",
    "a future version": b"GET / HTTP/3.7\r\nHost: 127.0.0.1\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "folded": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nA: b\r\n c\r\n\r\n",
    "space before colon": b"GET / HTTP/1.1\r\nHost : 127.0.0.1\r\n\r\n",
    "bad length": b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
    "bad chunk": b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "non-ascii target": b"GET /caf\xe9 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "absolute target": b"GET http://evil.example/ HTTP/1.1\r\nHost: x\r\n\r\n",
    "connect": b"CONNECT example.org:443 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "nul": b"GET /\x00 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "one header of 20 KiB": b"GET / HTTP/1.1\r\nX: " + b"x" * 20480,
    "a thousand headers": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 4000,
    "a long target": b"GET /" + b"x" * 20480,
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage_ends_its_connection_only(demo, name):
    async with raw_member(demo.ws) as room:
        for url in (demo.http, demo.ws):
            for ending in ("fin", "rst"):
                await throw(url, GARBAGE[name], ending)
        await room.send(frame(TEXT, b"still here"))
        assert (await read_frame(room))[1].startswith(b"still here")
    assert (await fetch("GET", demo.http + "/healthz")).status == 200
    assert "Traceback" not in demo.log()


async def throw(url, garbage, ending):
    """Send it and go, by FIN after what comes back or by RST without waiting."""
    async with connect(url.replace("ws:", "http:")) as connection:
        with trio.move_on_after(0.2):
            await connection.transport.send_all(garbage)
            if ending == "fin":
                await connection.transport.send_eof()
                while await connection.transport.receive_some():
                    pass
        if ending == "rst":
            reset(connection.transport)


@pytest.mark.parametrize("size", [17, 64, 1024])
async def test_a_first_head_over_16_kib_is_refused(demo, size):
    head = {"X-Long": "x" * (size << 10)}
    async with connect(demo.http) as connection:
        try:
            response = await connection.request("GET", "/time", head)
        except (Cut, trio.BrokenResourceError):
            return
        assert 400 <= response.status < 500


async def test_a_head_of_8_kib_is_welcome(demo):
    response = await fetch("GET", demo.http + "/time", {"X-Long": "x" * 8192})
    assert response.status == 200


async def test_length_and_chunked_together_are_refused(demo):
    head = {"Transfer-Encoding": "chunked", "Content-Length": "5"}
    async with connect(demo.http) as connection:
        response = await connection.request("POST", CHAT, head, b"0\r\n\r\n")
        assert response.status == 400
        await response.read()
        with pytest.raises(Cut):
            await connection.receive()


async def test_a_request_may_arrive_byte_by_byte(demo):
    async with connect(demo.http) as connection:
        for byte in b"GET /time HTTP/1.1\r\nHost: localhost\r\n\r\n":
            await connection.send(bytes([byte]))
        response = await (await connection.response()).read()
        assert response.json["data"].startswith("The server time is: ")


async def test_a_connection_carries_one_request_after_another(demo):
    async with connect(demo.http) as connection:
        for path in ["/time", "/healthz", "/nothing-here", "/time"]:
            response = await (await connection.request("GET", path)).read()
            assert response.status == (404 if path == "/nothing-here" else 200)
            assert response.headers.get("connection") != "close"


async def test_a_connection_goes_on_after_a_stream_has_ended(relay, upstream):
    async with connect(relay.http) as connection:
        for _ in range(3):
            body = asking(upstream.script(*answer("Hello")))
            response = await connection.request("POST", CHAT, None, body)
            assert (await response.events())[-1].data == "[DONE]"
        assert (await (await connection.request("GET", "/time")).read()).status == 200


async def test_pipelined_requests_are_answered_in_order(demo):
    one = b"GET /time HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with connect(demo.http) as connection:
        await connection.send(one + one.replace(b"/time", b"/healthz"))
        assert "data" in (await (await connection.response()).read()).json
        assert "status" in (await (await connection.response()).read()).json


@pytest.mark.parametrize("pause", [0, 0.1])
async def test_empty_lines_before_any_request_are_ignored(demo, pause):
    """In one packet with the request before them, as old clients end a body, or alone."""
    one = b"POST /time HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
    async with connect(demo.http) as connection:
        for packet in [b"\r\n" + one + b"\r\n\r\n" + one + b"\r\n", one + b"\r\n", one]:
            await connection.send(packet)
            await trio.sleep(pause)
        for _ in range(4):
            assert (await (await connection.response()).read()).status == 405
        await connection.send(b"\r\n")
        await trio.sleep(pause)
        assert (await (await connection.request("GET", "/time")).read()).status == 200


async def test_http_1_0_gets_the_clock_too(demo):
    async with connect(demo.http) as connection:
        await connection.send(b"GET /clock HTTP/1.0\r\nHost: localhost\r\n\r\n")
        response = await connection.response()
        assert response.status == 200
        assert "transfer-encoding" not in response.headers
        first, second = await response.events(2)
        assert second.n == first.n + 1


async def test_http_1_0_gets_an_answer_to_its_end(quick_demo):
    """Which is the end of the connection: there are no chunks that could tell it."""
    body = json.dumps(asking("Hello")).encode()
    head = f"POST {CHAT} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
    async with connect(quick_demo.http) as connection:
        await connection.send(head.encode() + body)
        response = await connection.response()
        assert (await response.events())[-1].data == "[DONE]"


async def test_a_reader_that_leaves_is_gone_at_once(serve):
    server = serve()

    async def readers():
        return (await fetch("GET", server.http + "/healthz")).json["readers"]

    async with AsyncExitStack() as stack:
        for _ in range(5):
            clock = await stack.enter_async_context(stream("GET", server.http + "/clock"))
            assert clock.status == 200
        assert await readers() == 5
    await trio.sleep(0.5)
    assert await readers() == 0


async def test_three_hundred_idle_connections_hold_nobody_up(demo):
    async with AsyncExitStack() as stack:
        for _ in range(300):
            await stack.enter_async_context(connect(demo.http))
        assert (await fetch("GET", demo.http + "/time")).status == 200


# ------------------------------------------------------------------------------- stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_idle_server_stops_with_0(serve, number):
    server = serve()
    server.signal(number)
    assert await server.exit_code(3) == 0
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_second_signal_stops_at_once(serve, upstream, number):
    env = {"OPENAI_BASE_URL": upstream.url}
    server = serve("--grace", "60", env=env)
    body = asking(upstream.script(*sse(delta("Hello"), HOLD)))
    async with stream("POST", server.http + CHAT, None, body) as response:
        await response.event()
        server.signal(number)
        await trio.sleep(0.3)
        assert server.process.poll() is None
        server.signal(number)
        await server.exit_code(3)
    assert "Traceback" not in server.log()


@pytest.fixture
def stopping(serve, upstream):
    return serve("--grace", "0.5", env={"OPENAI_BASE_URL": upstream.url})


async def test_a_graceful_stop_gives_all_their_due(stopping, upstream):
    """20 clock readers, 5 members, an answer that ends in time, and one that cannot."""
    gate = Gate()
    in_time = asking(upstream.script(*answer("Hel", gate, "lo")))
    too_long = asking(upstream.script(*sse(delta("Hel"), HOLD)))
    async with AsyncExitStack() as stack:
        enter, url = stack.enter_async_context, stopping.http
        clocks = [await enter(stream("GET", url + "/clock")) for _ in range(20)]
        protocols = [{"Sec-WebSocket-Protocol": ROOM_PROTOCOL}] * 2 + [{}] * 3
        members = [await enter(raw_member(stopping.ws, head)) for head in protocols]
        first = await enter(stream("POST", url + CHAT, None, in_time))
        second = await enter(stream("POST", url + CHAT, None, too_long))
        for response in (first, second, *clocks):
            await response.event()

        stopping.signal(signal.SIGTERM)
        began = time.monotonic()
        gate.open()
        assert [e.data for e in await first.events()][-1] == "[DONE]"
        await ends_with_an_error(second, "server_stopping")
        await end_with_different_retries(clocks)
        for member in members:
            assert await close_code(member) == 1001
        assert await stopping.exit_code(began + 0.5 + 3 - time.monotonic()) == 0
    assert "Traceback" not in stopping.log()


async def ends_with_an_error(response, kind):
    *_, last = await response.events()
    assert last.type == "error"
    assert last.json["error"]["type"] == kind


async def end_with_different_retries(clocks):
    """A proper end for each, and a time to come back at which not all come at once."""
    for clock in clocks:
        await clock.events()
    retries = [clock.retry[-1] for clock in clocks]
    assert all(1000 <= retry <= 5000 for retry in retries)
    assert len(set(retries)) > 1


async def test_while_it_stops_it_says_so_and_takes_nobody_new(stopping, upstream):
    body = asking(upstream.script(*sse(delta("Hel"), HOLD)))
    async with (
        stream("POST", stopping.http + CHAT, None, body) as running,
        connect(stopping.http) as kept,
    ):
        await running.event()
        await (await kept.request("GET", "/healthz")).read()
        stopping.signal()
        await until(lambda: refused(stopping.port) and refused(stopping.room_port), 1)
        health = await (await kept.request("GET", "/healthz")).read()
        assert (health.status, health.json["status"]) == (503, "stopping")
        joined = await kept.request("GET", "/room", HANDSHAKE)
        assert joined.status == 503
        assert (await joined.read()).error["type"] == "server_stopping"


async def test_a_stopped_curl_does_not_hold_up_a_stop(stopping, upstream):
    """It has stopped reading in the middle of an answer that fills every buffer."""
    gate = Gate()
    much = [delta("x" * 500_000)] * 16
    prompt = upstream.script(*sse(delta("Hel"), gate, *much, HOLD))
    body, url = json.dumps(asking(prompt)), stopping.http + CHAT
    curl = need("curl", "apt-get install curl")
    with paused(curl, "-sN", "-d", body, "-H", "Content-Type: application/json", url) as c:
        await until(lambda: upstream.asked(prompt))
        c.send_signal(signal.SIGSTOP)
        gate.open()
        await trio.sleep(0.5)
        stopping.signal()
        assert await stopping.exit_code(0.5 + 3) == 0


async def test_a_stop_waits_no_longer_than_its_answers(serve, upstream):
    server = serve("--grace", "60", "--upstream", upstream.url, "--model", "m")
    body = asking(upstream.script(*answer("Hel", 0.5, "lo")))
    async with stream("POST", server.http + CHAT, None, body) as response:
        await response.event()
        server.signal()
        assert (await response.events())[-1].data == "[DONE]"
        assert await server.exit_code(3) == 0


async def test_an_answer_that_is_not_streamed_is_told_of_the_stop(serve, upstream):
    server = serve("--grace", "0.2", env={"OPENAI_BASE_URL": upstream.url})
    prompt = upstream.script(HOLD)
    url = server.http + "/v1/chat/completions"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(signal_when_asked, server, upstream, prompt)
        response = await fetch("POST", url, None, asking(prompt))
    assert response.status == 503
    assert response.error["type"] == "server_stopping"
    assert await server.exit_code(3) == 0


async def test_a_short_request_is_answered_before_a_stop(serve, upstream):
    server = serve("--upstream", upstream.url, program=program(LINGER_CLOSE=0.1))
    gate = Gate()
    question = {"model": "m", "input": upstream.script(gate, plain(200, {"data": [1]}))}
    async with connect(server.http) as client:
        await client.ask("POST", "/v1/embeddings", None, question)
        await until(lambda: upstream.asked(question["input"]))
        server.signal()
        await until(lambda: refused(server.port))
        await trio.sleep(0.5)
        gate.open()
        response = await (await client.response("POST")).read()
    assert response.json == {"data": [1]}
    assert await server.exit_code(3) == 0


async def signal_when_asked(server, upstream, prompt):
    await until(lambda: upstream.asked(prompt))
    server.signal()


async def test_members_that_never_read_do_not_hold_up_a_stop(serve):
    server = serve("--grace", "0", "--room-rate", "0")
    async with raw_member(server.ws) as deaf:
        deaf.transport.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        async with open_websocket_url(server.ws) as loud:
            with trio.move_on_after(0.5):
                for _ in range(2000):
                    await loud.send_message("x" * 4000)
                    await loud.get_message()
            server.signal()
            assert await reason(loud) == 1001
        assert await server.exit_code(3) == 0


async def reason(member):
    """The code with which the server closes."""
    try:
        with trio.fail_after(3):
            while True:
                await member.get_message()
    except ConnectionClosed as closed:
        return closed.reason.code
