"""TLS and HTTP/2: the same promises on the same ports, and what only they have.

Hypercorn speaks HTTP/2; a client may break its rules in ways that no library sends, so
these tests have a client of their own (hostile.H2), besides Chromium.
"""

import itertools
import json
import re
import socket
import ssl
import struct
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
import trio
from hpack import NeverIndexedHeaderTuple
from hyperframe import frame as frames
from kit import (
    CHAT,
    FULL,
    HANDSHAKE,
    HOLD,
    OPENAI,
    PATIENCE,
    TEXT,
    Cut,
    answer,
    answer_pings,
    asking,
    assert_no_fault,
    close_code,
    connect,
    delta,
    descriptors,
    drain,
    fetch,
    frame,
    frozen,
    health,
    http2,
    insecure,
    measured,
    narrow,
    need,
    plain,
    program,
    raw_member,
    read_frame,
    reset,
    resident,
    sse,
    stream,
    unharmed,
    until,
    wait_until,
)
from trio_websocket import open_websocket_url

BROKEN = (Cut, trio.BrokenResourceError, trio.ClosedResourceError)
LIMITS = {"HEAD_TIMEOUT": 1.5, "STUCK_TIMEOUT": 1.5}


@pytest.fixture(scope="module")
def secure(shared, certificate):
    return shared(*certificate, "--room-rate", "0")


@pytest.fixture
def impatient(serve, certificate):
    return serve(*certificate, program=program(**LIMITS))


# ---------------------------------------------------------------------- what it is for


def serialized(frame_type, stream_id, **fields):
    made = frame_type(stream_id)
    for name, value in fields.items():
        setattr(made, name, value)
    return made.serialize()


def headers_frame(number, block, *flags):
    return serialized(frames.HeadersFrame, number, data=block, flags={*flags})


async def test_tls_serves_pages_streams_and_the_room(secure):
    assert secure.http.startswith("https://")
    assert secure.ws.startswith("wss://")
    for url in (secure.http, secure.ws):
        async with stream("GET", url + "/clock") as clock:
            assert (await clock.event()).data
        options = {"ssl_context": insecure()}
        async with open_websocket_url(url.replace("http", "ws"), **options) as member:
            await member.send_message("hello")
            with trio.fail_after(5):
                assert await member.get_message() == "hello--返回数据"


async def test_an_answer_over_tls_is_whole(serve, certificate, upstream):
    secure = serve(*certificate, "--upstream", upstream.url, "--model", "scripted")
    body = asking(upstream.script(*answer("Hel", 0.05, "lo")))
    async with stream("POST", secure.http + CHAT, None, body) as response:
        events = await response.events()
    assert [event.data for event in events[:2]] == ['{"content":"Hel"}', '{"content":"lo"}']
    assert events[-1].data == "[DONE]"


async def test_http_2_is_offered_and_ten_streams_share_a_connection(secure):
    curl = need("curl", "apt-get install curl")
    urls = [f"{secure.http}/clock?{n}" for n in range(10)]
    watch = [curl, "-skN", "--http2", "--parallel", "--max-time", "2.5"]
    watch += ["-w", "%{http_version} %{num_connects}\n", *urls]
    done = await trio.run_process(watch, capture_stdout=True, check=False)
    ends = re.findall(rb"^(\S+) (\d)$", done.stdout, re.MULTILINE)
    assert {version for version, _ in ends} == {b"2"}
    assert done.stdout.count(b"The server time is:") >= 20


async def test_a_plain_client_on_the_tls_port_harms_nobody(secure):
    async with stream("GET", secure.http + "/clock") as clock:
        async with connect(secure.http.replace("https", "http")) as plain:
            await plain.send(b"GET / HTTP/1.1\r\n\r\n")
            await drain(plain)
        await clock.events(1)


@pytest.mark.parametrize("said", [b"", b"x"])
async def test_clients_that_are_gone_before_they_are_accepted_harm_nobody(secure, said):
    plain = secure.http.replace("https", "http")
    async with unharmed(secure), AsyncExitStack() as stack:
        with frozen(secure.process):
            for _ in range(20):
                connection = await stack.enter_async_context(connect(plain))
                await connection.send(said)
                reset(connection.transport)


def test_old_tls_is_refused(secure):
    context = insecure()
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", secure.port)) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(plain)


def test_eight_tabs_stream_at_once_on_one_http_2_connection(chromium, secure):
    """Over HTTP/1.1 the seventh would wait for ever: browsers open six a host."""
    context = chromium.new_context(ignore_https_errors=True)
    url = secure.http.replace("127.0.0.1", "localhost")
    try:
        pages = [context.new_page() for _ in range(8)]
        for page in pages:
            page.goto(url)
            page.evaluate(FOLLOW_CLOCK)
        for page in pages:
            wait_until(lambda page=page: page.evaluate("window.ticks") >= 2)
            assert page.evaluate("window.protocol") == "h2"
        wait_until(lambda: connections_to(secure.port) == 1)
        assert pages[0].evaluate(SAY, url.replace("https", "wss")) == "hello--返回数据"
    finally:
        context.close()


FOLLOW_CLOCK = """() => {
    window.ticks = 0
    const source = new EventSource("/clock")
    source.onmessage = () => {
        window.ticks += 1
        const entries = performance.getEntriesByType("navigation")
        window.protocol = entries[0].nextHopProtocol
    }
}"""
SAY = """url => new Promise((resolve, reject) => {
    const socket = new WebSocket(url + "/room")
    socket.onopen = () => socket.send("hello")
    socket.onmessage = event => resolve(event.data)
    socket.onerror = () => reject("refused")
})"""


def connections_to(port):
    """How many connections there are to this port of this machine."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = (line.split() for line in lines)
    return sum(f[1].endswith(f":{port:04X}") and f[3] == "01" for f in fields)


async def test_a_quiet_room_over_wss_is_kept_alive(serve, certificate):
    """Pings and heartbeats go out though nobody speaks, and who answers them stays."""
    limits = {"PING_EVERY": 1, "HEARTBEAT_EVERY": 1}
    server = serve(*certificate, program=program(**limits))
    async with raw_member(server.ws.replace("wss", "https")) as member:
        await answer_pings(member, 3)
        assert (await health(server))["members"] == 1


async def test_the_thousand_and_first_request_ends_no_stream(secure):
    async with unharmed(secure), http2(secure.http) as client:
        clock = await client.ask("/clock")
        await client.body_has(clock, b"data:")
        for _ in range(11):
            asked = [await client.ask("/time") for _ in range(99)]
            for number in asked:
                assert (await client.whole(number))[0] == 200
        await lives(client, clock)


async def test_the_stream_that_is_one_too_many_is_refused_alone(secure):
    """Its client may ask again (RFC 9113, section 8.7), and all others go on."""
    async with unharmed(secure), http2(secure.http) as client:
        clocks = [await client.ask("/clock") for _ in range(100)]
        for _ in range(3):
            # (h2 would keep to the limit that it was told.)
            client.conn.remote_settings.update({3: 1000})
            client.conn.remote_settings.acknowledge()
            number = await client.ask("/time")
            await client.until(lambda number=number: number in client.resets)
            assert client.resets.pop(number) == 7, "REFUSED_STREAM"
        for clock in clocks:
            await client.body_has(clock, b"data:")
        client.conn.reset_stream(clocks.pop())
        await client.flush()
        assert (await client.whole(await client.ask("/time")))[0] == 200
        assert not client.resets


@pytest.mark.parametrize(
    "more", [b"", serialized(frames.WindowUpdateFrame, 0, window_increment=1)], ids=["", "window"]
)
async def test_a_client_that_says_goodbye_reads_on_to_the_end(serve, certificate, upstream, more):
    """It promises to ask nothing new, and no more (RFC 9113, section 6.8)."""
    server = serve(*certificate, env={"OPENAI_BASE_URL": upstream.url})
    body = json.dumps(asking(upstream.script(*answer("Hel", 0.5, "lo")))).encode()
    async with unharmed(server), http2(server.http) as client:
        number = await client.ask(CHAT, "POST", body)
        await client.body_has(number, b"Hel")
        goodbye = serialized(frames.GoAwayFrame, 0, last_stream_id=0, error_code=0)
        await client.raw(goodbye + more)  # in one packet
        status, said = await client.whole(number)
        assert status == 200
        assert b"data: [DONE]" in said


async def lives(client, number):
    """This stream goes on."""
    so_far = len(client.bodies[number])
    await client.until(lambda: len(client.bodies[number]) > so_far)
    assert number not in client.ended | client.resets.keys()


# ---------------------------------------------------------------- broken requests


def request_head(client, path=b"/time", method=b"GET", scheme=b"https"):
    """A HEADERS frame with whatever bytes in it, as no library would send them."""
    fields = [(b":method", method), (b":scheme", scheme), (b":path", path)]
    fields += [(b":authority", client.host.encode())]
    number = client.conn.get_next_available_stream_id()
    client.conn.send_headers(number, [f for f in fields if f[1]], end_stream=True)
    return number


ODD_REQUESTS = {
    "connect": {"method": b"CONNECT", "path": b"", "scheme": b""},
    "connect with a scheme": {"method": b"CONNECT", "path": b""},
    "connect for a websocket": {"method": b"CONNECT"},
    "a path beyond ascii": {"path": "/caf\xe9".encode()},
    "a path of bytes": {"path": b"/\xff\xfe"},
    "a method beyond ascii": {"method": b"G\xe9T"},
    "an odd method": {"method": b"BREW"},
    "no slash": {"path": b"time"},
    "a star": {"path": b"*"},
    "an absolute path": {"path": b"https://evil.example/"},
    "a way out": {"path": b"/../../../etc/passwd"},
    "a way out, encoded": {"path": b"/%2e%2e/%2e%2e/etc/passwd"},
    "a long path": {"path": b"/" + b"x" * 10_000},
}


async def test_a_request_that_is_none_ends_alone(secure):
    """It is refused or reset; the streams beside it, and the connection, go on.

    (What the HTTP/2 library takes for an attack ends with its goodbye.)
    """
    async with unharmed(secure):
        for name, odd in ODD_REQUESTS.items():
            async with http2(secure.http) as client:
                number = request_head(client, **odd)
                await client.flush()
                await over(client, number)
                if not client.closed:
                    assert (await client.whole(await client.ask("/time")))[0] == 200
                assert not client.closed or client.goaway == 1, name
                if number in client.heads:
                    assert client.heads[number][":status"][0] == "4", name


async def over(client, number):
    with trio.fail_after(PATIENCE):
        while not client.closed and number not in client.ended | client.resets.keys():  # noqa: ASYNC110
            await trio.sleep(0.01)


async def test_a_body_that_comes_after_its_answer_ends_nothing(secure):
    """An upload of 18 MiB gets its 413, and goes on for a while, as browsers do."""
    async with unharmed(secure), http2(secure.http) as client:
        clock = await client.ask("/clock")
        await client.body_has(clock, b"data:")
        for _ in range(3):
            number = await client.ask(OPENAI, "POST", end=False)
            await upload(client, number, 18 << 20)
            assert await client.status(number) == 413
        await lives(client, clock)
        assert (await client.whole(await client.ask("/time")))[0] == 200


async def upload(client, number, size):
    """Send so much, whatever the server has answered meanwhile."""
    sent = 0
    while sent < size and number not in client.resets:
        room = client.conn.local_flow_control_window(number)
        if not room:
            with trio.move_on_after(1) as waited:
                await client.until(
                    lambda: number in client.resets or client.conn.local_flow_control_window(number)
                )
            if waited.cancelled_caught:
                return
            continue
        piece = min(room, 16384, size - sent)
        client.conn.send_data(number, bytes(piece), end_stream=sent + piece == size)
        sent += piece
        await client.flush()


async def test_a_body_that_breaks_off_ends_its_stream_only(secure):
    async with unharmed(secure), http2(secure.http) as client:
        clock = await client.ask("/clock")
        await client.body_has(clock, b"data:")
        for _ in range(3):
            number = await client.ask(OPENAI, "POST", end=False)
            client.conn.send_data(number, b'{"messages": [')
            client.conn.reset_stream(number)
            await client.flush()
        await lives(client, clock)
        assert (await client.whole(await client.ask("/time")))[0] == 200


@pytest.mark.parametrize("path", ["/nothing", "/time", CHAT, "/clock"])
async def test_a_body_in_many_pieces_blocks_no_other_stream(secure, path):
    async with http2(secure.http) as client:
        number = client.conn.get_next_available_stream_id()
        request = [(":method", "POST"), (":scheme", "https"), (":path", path)]
        client.conn.send_headers(number, [*request, (":authority", client.host)])
        for _ in range(60):
            client.conn.send_data(number, b"x" * 100)
        await client.flush()
        assert (await client.whole(await client.ask("/time")))[0] == 200
        client.conn.end_stream(number)
        await client.flush()
        assert await client.status(number) in (400, 404, 405)
    assert_no_fault(secure.stderr_text())


async def test_a_body_that_nobody_reads_any_more_holds_no_other_stream_up(secure):
    """Its refusal waits for the client's window; all else is read meanwhile."""
    async with unharmed(secure), http2(secure.http, INITIAL_WINDOW_SIZE=0) as client:
        length = [("content-length", str(20 << 20))]
        number = await client.ask(OPENAI, "POST", headers=length, end=False)
        for _ in range(30):
            client.conn.send_data(number, b"x" * 1000)
            await client.flush()
        asked = await client.ask("/time")
        client.conn.increment_flow_control_window(1000, asked)
        await client.flush()
        assert (await client.whole(asked, 5))[0] == 200


async def test_a_head_has_16_kib_at_most_over_http_2_too(secure):
    """Sent twice, it takes a few bytes, and as much memory as before for each stream."""
    async with unharmed(secure), http2(secure.http) as client:
        for size, many in ((3000, 5), (3000, 6)):
            with suppress(AssertionError):  # the connection has ended
                for _ in range(3):
                    head = [("x-long", "y" * size)] * many
                    assert (await client.whole(await client.ask("/time", headers=head)))[0] == 200
            assert client.closed == (many == 6)
        assert client.goaway == 11, "ENHANCE_YOUR_CALM"


PLAIN_HEAD = b"\x82\x84\x87\x41\x09localhost"  # GET https://localhost/
TO_NOTHING, AND_BACK = b"\x20", b"\x3f\xe1\x1f"  # sizes of the table: 0 and 4096


@pytest.mark.parametrize("sizes", [TO_NOTHING, TO_NOTHING + AND_BACK], ids=["one", "two"])
async def test_the_tables_size_may_change_twice_before_a_head(secure, sizes):
    """As RFC 7541, section 4.2, has it."""
    async with unharmed(secure), http2(secure.http) as client:
        number = request_head(client)
        client.conn.data_to_send()  # not with this head, but with
        await client.raw(headers_frame(number, sizes + PLAIN_HEAD, "END_HEADERS", "END_STREAM"))
        assert (await client.whole(number))[0] == 200


async def test_it_may_not_change_three_times(secure):
    """Each costs the client a byte."""
    async with unharmed(secure), http2(secure.http) as client:
        sizes = TO_NOTHING * 2 + AND_BACK
        await client.raw(headers_frame(1, sizes + PLAIN_HEAD, "END_HEADERS", "END_STREAM"))
        await until(lambda: client.closed)
        assert client.goaway == 11, "ENHANCE_YOUR_CALM"


async def test_a_head_may_come_in_pieces(secure):
    async with http2(secure.http) as client:
        number = request_head(client)
        client.conn.data_to_send()  # not in this form, but in
        flags = [set()] * 5 + [{"END_HEADERS"}]
        parts = [PLAIN_HEAD[n : n + 1] for n in range(1, 6)] + [PLAIN_HEAD[6:]]
        pieces = [
            serialized(frames.ContinuationFrame, number, data=part, flags=ends)
            for part, ends in zip(parts, flags, strict=True)
        ]
        await client.raw(headers_frame(number, PLAIN_HEAD[:1], "END_STREAM") + b"".join(pieces))
        assert (await client.whole(number))[0] == 200


@pytest.mark.parametrize("ends", [True, False])
async def test_a_head_of_changes_only_holds_nobody_up(serve, certificate, ends):
    """Nor is a MiB of it kept."""
    server = serve(*certificate, program=measured(0.1))
    async with unharmed(server), http2(server.http) as client:
        number = await client.ask("/clock")
        await client.body_has(number, b"data:")
        piece = TO_NOTHING * 16384
        more = serialized(frames.ContinuationFrame, number + 2, data=piece) * 60
        ending = {"data": PLAIN_HEAD, "flags": {"END_HEADERS"}}
        last = serialized(frames.ContinuationFrame, number + 2, **ending) if ends else b""
        with suppress(*BROKEN):  # it need not hear all of it
            await client.raw(headers_frame(number + 2, piece) + more + last)
        await until(lambda: client.closed)
    assert "held:" not in server.stderr_text(), server.stderr_text()


# ---------------------------------------------------------------- broken frames


BAD_FRAMES = {
    "noise": bytes(range(256)),
    "http/1.1": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "data on an idle stream": serialized(frames.DataFrame, 999, data=b"x"),
    "data on stream 0": b"\x00\x00\x01\x00\x00\x00\x00\x00\x00x",
    "a frame too large": b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
    "an even stream": headers_frame(2, b"\x82", "END_HEADERS", "END_STREAM"),
    "a bad header block": headers_frame(999, b"\xff" * 50, "END_HEADERS", "END_STREAM"),
    "an endless head": headers_frame(999, b"\x00" * 99)
    + serialized(frames.ContinuationFrame, 999, data=b"\x00" * 9000) * 100,
    "a bomb of headers": headers_frame(
        999, b"\x40\x01a\x7f\x80\x1e" + b"b" * 3967 + b"\xbe" * 9000, "END_HEADERS"
    ),
    "a window of nothing": serialized(frames.WindowUpdateFrame, 0, window_increment=1).replace(
        b"\x00\x00\x00\x01", b"\x00\x00\x00\x00"
    ),
    "a window too wide": serialized(frames.WindowUpdateFrame, 0, window_increment=0x7FFFFFFF),
    "a ping of 7 bytes": b"\x00\x00\x07\x06\x00\x00\x00\x00\x001234567",
    "a push": serialized(frames.PushPromiseFrame, 999, promised_stream_id=2, flags={"END_HEADERS"}),
    "a bad setting": serialized(frames.SettingsFrame, 0, settings={4: 0xFFFFFFFF}),
    "a goodbye": serialized(frames.GoAwayFrame, 0, last_stream_id=0, error_code=0),
    "an unknown type": b"\x00\x00\x02\xfa\x00\x00\x00\x00\x01hi",
}


async def test_broken_frames_end_their_connection_only(secure):
    async with unharmed(secure):
        for data in BAD_FRAMES.values():
            async with http2(secure.http) as client:
                await client.ask("/clock")
                try:
                    await client.raw(data)
                    with trio.move_on_after(0.1):
                        await client.until(lambda: False)
                except (AssertionError, *BROKEN):
                    pass  # it has hung up, as it should


async def test_a_thousand_priorities_do_no_harm(secure):
    """Of streams that never come; the standard has given them up since (RFC 9113)."""
    async with unharmed(secure), http2(secure.http) as client:
        clock = await client.ask("/clock")
        await client.body_has(clock, b"data:")
        for n in range(2000):
            await client.raw(serialized(frames.PriorityFrame, 2 * n + 1001, depends_on=n and 1001))
        await lives(client, clock)
        assert (await client.whole(await client.ask("/time")))[0] == 200


@pytest.mark.parametrize(
    "flood",
    [
        serialized(frames.PingFrame, 0, opaque_data=b"12345678"),
        serialized(frames.SettingsFrame, 0, settings={4: 65535}),
        serialized(frames.WindowUpdateFrame, 0, window_increment=1),
        serialized(frames.RstStreamFrame, 1, error_code=8),
    ],
    ids=["pings", "settings", "windows", "resets"],
)
async def test_a_flood_of_small_frames_delays_nobody(secure, flood):
    async with unharmed(secure), http2(secure.http) as client:
        number = await client.ask("/time")
        await client.whole(number)
        try:
            for _ in range(50):
                await client.raw(flood * 100)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # or it hangs up


async def test_no_frames_of_one_client_hold_the_others_up(serve, certificate):
    """However many come in one packet, and whatever h2 makes of each."""
    server = serve(*certificate, program=measured(0.03))
    async with unharmed(server), http2(server.http) as client:
        number = await client.ask("/clock")
        opened = range(number + 2, number + 6002, 2)
        fields = {":method": "GET", ":scheme": "https", ":authority": "localhost", ":path": "/time"}
        head = client.conn.encoder.encode(
            itertools.starmap(NeverIndexedHeaderTuple, fields.items())
        )
        asked = [
            serialized(frames.HeadersFrame, n, data=head, flags=["END_HEADERS"]) for n in opened
        ]
        gone = [serialized(frames.RstStreamFrame, n, error_code=8) for n in opened]
        grown = serialized(frames.WindowUpdateFrame, number, window_increment=1)
        await client.raw(grown * 10_000)
        await client.raw(b"".join(itertools.chain.from_iterable(zip(asked, gone, strict=True))))
        client.conn.highest_outbound_stream_id = opened[-1]
        assert (await client.whole(await client.ask("/time")))[0] == 200
    assert "held:" not in server.stderr_text(), server.stderr_text()


async def test_requests_that_are_reset_at_once_leave_nothing(secure):
    """The rapid reset: each costs the client a few bytes, and the server a task."""
    async with unharmed(secure):
        before = resident(secure.process.pid)
        async with http2(secure.http) as client:
            for _ in range(500 if FULL else 20):
                for path in (b"/clock", b"/", b"/answers/x", b"/v1/models") * 5:
                    number = request_head(client, path=path)
                    client.conn.reset_stream(number)
                await client.flush()
            await until_readers(secure, 1)
            assert (await client.whole(await client.ask("/time"), 60))[0] == 200
        assert resident(secure.process.pid) - before < 20 << 20


async def until_readers(server, count, seconds=20):
    with trio.fail_after(seconds):
        while (await health(server))["readers"] != count:  # noqa: ASYNC110
            await trio.sleep(0.1)


async def test_answers_that_are_reset_are_stopped(serve, certificate, upstream):
    env = {"OPENAI_BASE_URL": upstream.url}
    server = serve(*certificate, "--linger", "0.2", env=env)
    prompt = upstream.script(*sse(delta("Hel"), HOLD))
    async with unharmed(server), http2(server.http) as client:
        body = json.dumps(asking(prompt)).encode()
        for _ in range(20):
            number = await client.ask(CHAT, "POST", body)
            client.conn.reset_stream(number)
        await client.flush()
        asked = upstream.asked(prompt)
        await until(lambda: all(heard.closed_at for heard in asked))
        with trio.fail_after(5):
            while (await health(server))["answers"]:  # noqa: ASYNC110
                await trio.sleep(0.1)


async def test_a_reset_while_the_socket_is_full_harms_no_other_stream(serve, certificate, upstream):
    """A head that is not sent would leave the client with a table unlike ours."""
    server = serve(*certificate, "--upstream", upstream.url, "--model", "scripted")
    lots = asking(upstream.script(*sse(*[delta("x" * 500_000)] * 40, HOLD)))
    short = {"input": upstream.script(1, plain(200, {"object": "list", "data": []}))}
    async with unharmed(server), http2(server.http, INITIAL_WINDOW_SIZE=2**31 - 1) as client:
        client.conn.increment_flow_control_window(2**30)
        asked = [
            await client.ask("/v1/embeddings", "POST", json.dumps(short).encode()) for _ in range(3)
        ]
        async with client.reading:
            big = await client.ask(CHAT, "POST", json.dumps(lots).encode())
            await trio.sleep(2.5)  # the socket is full, and then the short answers come
            for number in asked:
                client.conn.reset_stream(number)
            await client.flush()
            await trio.sleep(0.5)
        client.conn.reset_stream(big)
        for path in ("/v1/models", "/time", "/healthz"):
            assert (await client.whole(await client.ask(path)))[0] == 200


async def test_a_table_whose_size_changes_all_the_time_stops_nobody(serve, certificate):
    server = serve(*certificate, program=measured(0.03))
    sizes = (2**32 - 1, 2**32 - 2)
    changes = [serialized(frames.SettingsFrame, 0, settings={1: size}) for size in sizes]
    async with unharmed(server), http2(server.http) as client:
        client.conn.decoder.max_allowed_table_size = 2**32 - 1
        for _ in range(100):
            await client.raw(b"".join(changes) * 100)
        assert (await client.whole(await client.ask("/time"), 30))[0] == 200
    assert "held:" not in server.stderr_text(), server.stderr_text()


async def test_settings_that_nobody_knows_are_not_kept(serve, certificate):
    """Each would cost memory for ever, and time at each frame of settings that follows."""
    server = serve(*certificate, program=measured(0.1))
    async with unharmed(server), http2(server.http) as client:
        number = await client.ask("/clock")
        await client.body_has(number, b"data:")
        before = resident(server.process.pid)
        for first in range(16, 65_536, 2600):
            many = range(first, min(first + 2600, 65_536))  # of which the library knows no frame
            body = b"".join(struct.pack(">HL", code, 70_000) for code in many)
            head = struct.pack(">L", len(body))[1:] + b"\x04" + bytes(5)
            await client.raw(head + body)
        await client.raw(serialized(frames.SettingsFrame, 0, settings={}) * 1000)
        assert (await client.whole(await client.ask("/time"), 30))[0] == 200
        assert resident(server.process.pid) - before < 20 << 20
        await lives(client, number)
    assert "held:" not in server.stderr_text(), server.stderr_text()


async def test_our_table_of_sent_headers_stays_small(serve, certificate):
    """However large the client's may be, and whatever we are made to repeat to it."""
    server = serve(*certificate)
    before = resident(server.process.pid)
    async with unharmed(server), http2(server.http, HEADER_TABLE_SIZE=2**32 - 1) as client:
        client.conn.decoder.max_allowed_table_size = 2**32 - 1
        for n in range(300):
            echoed = [("access-control-request-headers", f"{n}" + "x" * 10_000)]
            asked = await client.ask("/clock", "OPTIONS", headers=echoed)
            assert (await client.whole(asked))[0] == 204
            client.heads.clear()
        assert (
            sum(len(value) for _, value in client.conn.decoder.header_table.dynamic_entries) < 5000
        )
    assert resident(server.process.pid) - before < 10 << 20


# ------------------------------------------------------------------------- silence


async def test_a_client_that_only_listens_is_no_idle_one(serve, certificate):
    """A stream may go on for hours without a word from its reader."""
    server = serve(*certificate, program=program(IDLE_TIMEOUT=1))
    async with http2(server.http) as client:
        client.acknowledge = False  # not even that: the window is wide enough
        clock = await client.ask("/clock")
        await trio.sleep(3)
        await client.body_has(clock, b"data:")
        await lives(client, clock)
        client.conn.reset_stream(clock)
        await client.flush()
        with trio.fail_after(70 if FULL else PATIENCE):  # but now it is one
            while not client.closed:  # noqa: ASYNC110
                await trio.sleep(0.1)
        assert client.goaway == 0


# -------------------------------------------------------------------- stuck readers


async def test_streams_whose_window_stays_shut_are_dropped(impatient):
    """Pages, not only event streams: nobody may hold a response for ever."""
    async with unharmed(impatient), http2(impatient.http) as other:
        clock = await other.ask("/clock")
        async with http2(impatient.http, INITIAL_WINDOW_SIZE=0) as client:
            asked = [await client.ask("/") for _ in range(50)]
            gone = lambda: client.closed or client.resets.keys() >= {*asked}  # noqa: E731
            with trio.fail_after(15 if FULL else 6):
                while not gone():  # noqa: ASYNC110
                    await trio.sleep(0.1)
        await lives(other, clock)


async def test_a_reader_whose_window_fills_up_is_dropped_and_counted(serve, certificate, upstream):
    """There is room for the first line, and then for nothing of a long answer."""
    env = {"OPENAI_BASE_URL": upstream.url}
    server = serve(*certificate, program=program(**LIMITS), env=env)
    body = asking(upstream.script(*sse(*[delta("x" * 500_000)] * 20, HOLD)))
    dropped = b'chatstream_readers_dropped_total{cause="stuck"} 1'
    async with http2(server.http, INITIAL_WINDOW_SIZE=50) as client:
        client.acknowledge = False
        asked = await client.ask(CHAT, "POST", json.dumps(body).encode())
        await client.body_has(asked, b"retry:")
        with trio.fail_after(30 if FULL else PATIENCE):
            while asked not in client.resets:  # noqa: ASYNC110
                await trio.sleep(0.1)
        assert dropped in (await fetch("GET", server.http + "/metrics")).body


async def test_streams_that_share_a_narrow_window_are_not_stuck(serve, certificate, upstream):
    """The connection's window is given back in halves: each time, only two get any of it."""
    env = {"OPENAI_BASE_URL": upstream.url}
    server = serve(*certificate, program=program(**LIMITS), env=env)
    body = json.dumps(asking(upstream.script(*sse(*[delta("x" * 5000)] * 100, HOLD)))).encode()
    async with http2(server.http, INITIAL_WINDOW_SIZE=2**31 - 1) as client:
        client.acknowledge = False
        asked = [await client.ask(CHAT, "POST", body) for _ in range(6)]
        for _ in range(10):
            await trio.sleep(8 if FULL else 1)
            client.conn.increment_flow_control_window(32768)
            await client.flush()
        assert not client.resets
        # Now nothing is given back any more.
        await client.until(lambda: client.resets.keys() == {*asked}, 15 if FULL else 6)


@pytest.mark.parametrize("scheme", ["https", "wss"])
async def test_readers_over_tls_that_never_read_are_dropped(serve, certificate, upstream, scheme):
    env = {"OPENAI_BASE_URL": upstream.url}
    flags = [*certificate, "--room-rate", "0"]
    server = serve(*flags, program=program(**LIMITS), env=env)
    async with unharmed(server), AsyncExitStack() as stack:
        talker = await stack.enter_async_context(raw_member(server.ws.replace("wss", "https")))
        path, head, key = "/room", HANDSHAKE, "members"
        if scheme == "https":
            prompt = upstream.script(*sse(*[delta("x" * 100_000)] * 150, HOLD))
            path, head, key = CHAT, {"Content-Type": "application/json"}, "readers"
        for _ in range(10):
            stuck = await stack.enter_async_context(narrow(server.http))
            if scheme == "https":
                body = json.dumps(asking(prompt)).encode()
                length = {"Content-Length": str(len(body))}
                await stuck.send(request_bytes("POST", path, head | length) + body)
            else:
                await stuck.send(request_bytes("GET", path, head))
        await until_counted(server, key, lambda n: n >= 10)
        heard = 0
        with trio.fail_after(25 if FULL else 15):
            while (await health(server))[key] > 1:
                if scheme == "wss":
                    for _ in range(50):
                        await talker.send(frame(TEXT, b"x" * 4000))
                    for _ in range(50):
                        heard += (await read_frame(talker))[0] == TEXT
                await trio.sleep(0.05)
        assert scheme == "https" or heard


def request_bytes(method, path, headers):
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "\r\n"]).encode()


async def until_counted(server, key, good, seconds=15):
    with trio.fail_after(seconds):
        while not good((await health(server))[key]):  # noqa: ASYNC110
            await trio.sleep(0.1)


async def test_silent_and_slow_handshakes_are_closed_in_time(impatient):
    """Half a TLS hello, or an HTTP/2 connection on which nobody asks anything."""
    plain = impatient.http.replace("https", "http")
    over = []

    async def wait(data):
        async with connect(plain) as connection:
            await connection.send(data)
            with pytest.raises(BROKEN):
                await connection.receive()
            over.append(data)

    async with unharmed(impatient), trio.open_nursery() as nursery:
        for data in (b"\x16\x03\x01\x02\x00\x01", b"\x16", b"\x16\x03\x01" * 9):
            for _ in range(20):
                nursery.start_soon(wait, data)
        async with http2(impatient.http) as client:
            with trio.fail_after(13 if FULL else 5):
                while not client.closed:  # noqa: ASYNC110
                    await trio.sleep(0.1)
    assert len(over) == 60


async def test_nothing_is_left_of_those_that_came_and_went(serve, certificate):
    """Half handshakes, half requests, resets, in TLS and in HTTP/2."""
    server = serve(*certificate, program=program(LINGER_CLOSE=0.5, HEAD_TIMEOUT=3))
    pid, plain = server.process.pid, server.http.replace("https", "http")

    async def visit(n):
        if n % 3 == 0:
            async with connect(plain) as connection:
                await connection.send(b"\x16\x03\x01\x02\x00\x01"[: n % 7])
        elif n % 3 == 1:
            async with http2(server.http) as client:
                await client.body_has(await client.ask("/clock"), b"retry")
        else:
            async with connect(server.http) as connection:
                await (await connection.request("GET", "/clock")).piece()
                reset(connection.transport.transport_stream)

    async def crowd(count):
        for start in range(0, count, 20):
            async with trio.open_nursery() as nursery:
                for n in range(start, start + 20):
                    nursery.start_soon(visit, n)
        await until_readers(server, 0)
        await trio.sleep(1)

    await crowd(60)
    files, memory = descriptors(pid), resident(pid)
    await crowd(2000 if FULL else 120)
    await until(lambda: descriptors(pid) <= files)
    assert resident(pid) - memory < 10 << 20
    assert_no_fault(server.stderr_text())


# ------------------------------------------------------------------------------- stop


async def test_a_stop_tells_everybody_over_tls_too(serve, certificate, upstream):
    env = {"OPENAI_BASE_URL": upstream.url}
    server = serve(*certificate, "--grace", "1", env=env)
    prompt = upstream.script(*sse(delta("Hel"), HOLD))
    async with (
        http2(server.http) as client,
        http2(server.http, INITIAL_WINDOW_SIZE=0) as stuck,
        raw_member(server.ws.replace("wss", "https")) as member,
    ):
        clocks = [await client.ask("/clock") for _ in range(20)]
        answered = await client.ask(CHAT, "POST", json.dumps(asking(prompt)).encode())
        for _ in range(10):
            await stuck.ask("/")
        await client.body_has(answered, b"Hel")
        for clock in clocks:
            await client.body_has(clock, b"data:")
        began = time.monotonic()
        server.signal()
        for clock in clocks:
            await client.whole(clock)
            assert b"\nretry: " in client.bodies[clock]
        _, body = await client.whole(answered)
        assert b"server_stopping" in body
        assert b"[DONE]" not in body
        assert await close_code(member) == 1001
        assert await server.exit_code(began + 1 + 3 - time.monotonic()) == 0
        assert client.goaway == 0
    assert_no_fault(server.log())
