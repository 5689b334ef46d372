"""Whatever comes: no exception but the ones we mean, no 500, no fault in the log."""

import json
from contextlib import suppress
from urllib.parse import quote_from_bytes

import h11
import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kit import (
    CHAT,
    CLOSE,
    FULL,
    OPENAI,
    ROOM_PROTOCOL,
    TEXT,
    assert_no_fault,
    drain,
    frame,
    raw_connection,
    raw_member,
    read_frame,
    unharmed,
)
from wsproto.frame_protocol import FrameProtocol, ParseFailed

import chatstream
from chatstream import FrameParser, Problem, SSEParser, WebSocketClose, parse_close


def fuzz(examples):
    """So many, or ten times as many where all is done in full."""
    return settings(
        max_examples=examples * 10 if FULL else examples,
        deadline=None,
        database=None,
        derandomize=not FULL,
        suppress_health_check=list(HealthCheck),
    )


ANY = st.characters(codec=None)  # lone surrogates too: JSON can carry them
TEXTS = st.text(ANY, max_size=20)
NAMES = """
    choices delta content index message messages role user tool_calls id type name
    stream stream_options include_usage model text usage error object
"""
WORDS = st.sampled_from(NAMES.split())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | TEXTS, inner, max_size=4),
    max_leaves=12,
)
CUTS = st.lists(st.integers(0, 400), max_size=8)


def cut(data, cuts):
    """The same bytes in pieces."""
    at = sorted(min(n, len(data)) for n in cuts)
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]


# ------------------------------------------------------------------- what reads bytes

PARTS = [b"data:", b"data", b" ", b"id: 1", b"event: x", b"retry: 9", b": c", b"{}"]
MARKS = [b"\r", b"\n", b"\r\n", b"\n\n", b"\xef\xbb\xbf", b"\0", b"\xe4\xbd", b"\xa0"]
SSE_BYTES = st.lists(
    st.sampled_from(PARTS) | st.sampled_from(MARKS) | st.binary(max_size=6), max_size=40
).map(b"".join)


@fuzz(500)
@given(SSE_BYTES, CUTS)
def test_an_event_stream_reads_the_same_however_it_is_cut(data, cuts):
    parser = SSEParser()
    events = [event for piece in cut(data, cuts) for event in parser.feed(piece)]
    assert events == SSEParser().feed(data)
    assert all(isinstance(event.data, str) for event in events)


@fuzz(200)
@given(SSE_BYTES, st.integers(1, 60))
def test_an_event_that_is_too_large_is_a_value_error(data, limit):
    parser = SSEParser(limit)
    with suppress(ValueError):
        for byte in data:
            for event in parser.feed(bytes([byte])):
                assert len(event.data) <= limit


GOOD_CHUNKS = st.builds(
    lambda zeros, data, more: b"%b%X%b\r\n%b\r\n" % (zeros, len(data), more, data),
    st.sampled_from([b"", b"0", b"000"]),
    st.binary(min_size=1, max_size=20) | st.just(b"long" * 80),
    st.sampled_from([b"", b" ", b";", b";a=b", b';a="b;c" ; d', b";\xe4\t"]),
)
TRAILERS = st.lists(st.sampled_from([b"X-Sum: 1\r\n", b"a:\r\n", b"b_c: d;e: f\r\n"]), max_size=2)
LAST_CHUNKS = st.builds(
    lambda size, trailers: b"%b\r\n%b\r\n" % (size, b"".join(trailers)),
    st.sampled_from([b"0", b"000", b"0;c", b"0 "]),
    TRAILERS,
)
ODD = b"\r\n,\n,\r,5,0,g,-1,0x5,+5,1_0,;,: ,a: b,\r\n0\r\n,fffffffffffffffffffff".split(b",")
ODDITIES = st.sampled_from([*ODD, b" ", b""]) | st.binary(max_size=4)
ODD_CHUNKS = st.lists(GOOD_CHUNKS | LAST_CHUNKS | ODDITIES, max_size=6).map(b"".join)


def body_by_h11(head, pieces):
    """What a body carries, and what is behind it; None where it is not whole."""
    conn, carried = h11.Connection(h11.CLIENT), b""
    conn.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    conn.receive_data(head)
    assert isinstance(conn.next_event(), h11.Response)
    with suppress(h11.RemoteProtocolError):
        for piece in filter(None, pieces):
            conn.receive_data(piece)
            while isinstance(event := conn.next_event(), h11.Data):
                carried += event.data
    whole = conn.their_state in (h11.DONE, h11.MUST_CLOSE)
    return carried, conn.trailing_data[0] if whole else None


def body_by_us(head, pieces):
    conn, carried = h11.Connection(h11.CLIENT), []
    conn.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    conn.receive_data(head)
    exchange = chatstream.Exchange(None, trio.CancelScope())
    exchange.begin(conn.next_event(), b"")
    with suppress(h11.RemoteProtocolError):
        for n, piece in enumerate(pieces):
            exchange.feed(piece, carried.append)
            if exchange.ended.is_set():
                return b"".join(carried), exchange.rest + b"".join(pieces[n + 1 :])
    return b"".join(carried), None


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@fuzz(500)
@given(st.lists(GOOD_CHUNKS, max_size=5), LAST_CHUNKS, st.binary(max_size=9), CUTS)
def test_chunks_are_read_as_h11_reads_them(chunks, last, behind, cuts):
    pieces = cut(b"".join(chunks) + last + behind, cuts)
    ours = body_by_us(CHUNKED, pieces)
    assert ours == body_by_h11(CHUNKED, pieces)
    assert ours[1] == behind


@fuzz(1000)
@given(ODD_CHUNKS, CUTS)
def test_chunks_that_h11_refuses_are_refused(data, cuts):
    pieces = cut(data, cuts)
    ours, theirs = body_by_us(CHUNKED, pieces), body_by_h11(CHUNKED, pieces)
    assert ours[0] == theirs[0]
    assert ours == theirs or ours[1] is None  # its trailers may end with a lone LF


@fuzz(100)
@given(st.binary(max_size=30), st.integers(1, 30), CUTS)
def test_a_body_with_a_length_is_read_as_h11_reads_it(data, length, cuts):
    head, pieces = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length, cut(data, cuts)
    assert body_by_us(head, pieces) == body_by_h11(head, pieces)


@st.composite
def client_frames(draw):
    """A frame, mostly a good one; its length is true, so that it is whole."""
    few = st.integers(0, 40).map(lambda n: n == 0)
    opcode = draw(st.sampled_from([0, 1, 2, 8, 9, 10] * 4 + [3, 15]))
    text = st.text(max_size=8).map(str.encode)
    code = st.sampled_from([0, 999, 1000, 1004, 1005, 1013, 1015, 2999, 3000, 5000])
    reason = st.builds(lambda n, t: n.to_bytes(2) + t, code, text | st.binary())
    long = st.sampled_from([b"x" * n for n in (125, 126, 40_000)])
    payload = draw(reason if opcode == 8 else text | st.binary(max_size=5) | long)
    final = not draw(few) if opcode >= 8 else draw(st.booleans())
    head = final << 7 | (0x40 if draw(few) else 0) | opcode
    if draw(few):
        return bytes([head, len(payload) % 126]) + payload  # not masked
    key = draw(st.binary(min_size=4, max_size=4))
    length = frame(0, payload)[1 : -4 - len(payload)]
    masked = bytes(byte ^ key[n % 4] for n, byte in enumerate(payload))
    return bytes([head]) + length + key + masked


def heard_by_wsproto(data):
    """What its parser makes of these bytes, and with which code it gives up."""
    protocol, heard, parts = FrameProtocol(client=False, extensions=[]), [], []
    protocol.receive_bytes(data)
    try:
        for part in protocol.received_frames():
            if part.opcode.iscontrol():
                heard.append((int(part.opcode), part.payload))
                continue
            parts.append(part.payload)
            if part.message_finished:
                heard.append((int(part.opcode), "".join(parts) if part.opcode == 1 else b""))
                parts = []
    except ParseFailed as failure:
        return heard, int(failure.code)
    return heard, None


# What parse_close() says of a payload that is not one.
NOT_CLOSE = ("this is not a close code", "a reason must be UTF-8")


def heard_by_us(pieces):
    parser, heard = FrameParser(), []
    try:
        for piece in pieces:
            parser.feed(piece)
            while said := parser.next():
                opcode, payload = said
                if opcode == 8:  # after which nothing counts
                    close = parse_close(payload)
                    if close.reason in NOT_CLOSE:
                        return heard, close.code
                    return [*heard, (opcode, (close.code, close.reason))], None
                if opcode:  # else it is a fragment, and more of them will come
                    heard.append(said)
    except WebSocketClose as close:
        return heard, close.code
    return heard, None


@fuzz(500)
@given(st.lists(client_frames(), max_size=8).map(b"".join), CUTS)
def test_frames_are_read_as_wsproto_reads_them(data, cuts):
    ours, theirs = heard_by_us(cut(data, cuts)), heard_by_wsproto(data)
    if ours[1] == 1009:  # our limit; wsproto itself has none
        assert ours[0] == theirs[0][: len(ours[0])]
    else:
        assert ours == theirs


@fuzz(200)
@given(st.lists(st.binary(max_size=30)))
def test_no_bytes_surprise_the_frame_parser(pieces):
    assert heard_by_us(pieces)[1] in (None, 1002, 1007, 1009)


# -------------------------------------------------------------------- what reads JSON


APIS = (chatstream.CHAT_PAGE, chatstream.CHAT, chatstream.COMPLETIONS,
        chatstream.RESPONSES, chatstream.MESSAGES)  # fmt: skip


@fuzz(500)
@given(JSON, st.sampled_from(APIS))
def test_a_question_is_sound_or_a_400(body, api):
    raw, refused = chatstream.to_json(body).encode(), None
    try:
        asked = chatstream.JsonBody(raw)
        chatstream.check_question(asked.fields, api)
        question = api.ask(api, asked, {})
        assert isinstance(chatstream.from_json(question.body), dict)
    except Problem as problem:
        refused = problem
    assert refused is None or (refused.status == 400 and refused.error["message"])


KINDS = """
    message error response.created response.completed response.failed
    response.output_item.done response.output_text.delta message_start message_stop
    content_block_delta
"""
TYPES = st.sampled_from(KINDS.split())
CHUNKS = st.fixed_dictionaries(
    {},
    optional={
        "type": TYPES | JSON,
        "choices": st.lists(st.dictionaries(WORDS, JSON, max_size=4), max_size=2),
        "response": JSON | st.dictionaries(WORDS, JSON, max_size=4),
        "response_id": JSON,
        "sequence_number": JSON | st.integers(-1, 9),
        "item": JSON,
        "error": JSON,
        "content": JSON,
        "usage": JSON,
    },
)
SAID = st.lists(st.tuples(TYPES, CHUNKS | JSON), max_size=5)
ENDS_WITHOUT_IT = [("response.completed", {})]
UNNAMED = [("message", {"response": {}}), ("response.created", {"response": {"id": "resp_1"}})]
ODD_IDS = [("response.created", {"response": {"id": {"a": 1}}}), ("x", {"response_id": 5})]
ODD_NUMBERS = [("x", {"sequence_number": n}) for n in (7, 7, 3, True, -1, 10**20, "8", None)]
TWO_LINES = [("message", {"type": "response.completed\n\ndata: [DONE]", "response": {}})]
NO_ITEM = [("response.output_item.done", {}), ("response.output_item.done", {"item": 5})]


@fuzz(400)
@given(st.sampled_from(APIS), SAID)
@example(chatstream.RESPONSES, ENDS_WITHOUT_IT)
@example(chatstream.RESPONSES, UNNAMED)
@example(chatstream.RESPONSES, ODD_IDS)
@example(chatstream.RESPONSES, ODD_NUMBERS)
@example(chatstream.RESPONSES, TWO_LINES)
@example(chatstream.MESSAGES, TWO_LINES)
@example(chatstream.RESPONSES, NO_ITEM)
def test_chunks_of_any_shape_make_an_answer_or_an_upstream_error(api, said):
    def take(relay):
        for type, chunk in said:
            data = chatstream.to_json(chunk)
            relay.take(chatstream.Event(data, type))
        relay.end()

    make_an_answer(api, True, take)


@fuzz(400)
@given(st.sampled_from(APIS), st.booleans(), CHUNKS | JSON)
def test_a_whole_answer_of_any_shape_is_one_or_an_upstream_error(api, streamed, said):
    streamed = streamed or api is chatstream.CHAT_PAGE  # which always is
    make_an_answer(api, streamed, lambda relay: relay.take_whole(chatstream.to_json(said)))


def make_an_answer(api, streamed, take):
    """Whatever is taken, there is an answer at the end that every client can read."""

    async def relay():
        question = chatstream.Question(api, b"{}", streamed)
        answer = chatstream.Answer("0" * 32, question, chatstream.Model())
        problem = None
        try:
            take(chatstream.Relay(answer, chatstream.Metrics(), ["sk-secret-1"]))
        except Problem as caught:
            problem = caught
        assert problem is None or problem.error["message"]
        answer.finish(problem)
        events = [answer[place] for place in range(answer.end)]
        read = SSEParser().feed(answer.frames(chatstream.SSE, 0)[0])
        assert read == [(e.data, e.type, {}) for e in events]
        if problem is None and not streamed:
            json.loads(api.whole(answer))
        if api is chatstream.RESPONSES:
            assert_retrievable(answer, [json.loads(event.data) for event in events])
            items = chatstream.response_now(answer)["output"] if problem else []
            assert all(isinstance(item, dict) for item in items)

    trio.run(relay)


def assert_retrievable(answer, told):
    """By whatever id it was given in its events, and after whatever number."""
    now = json.loads(chatstream.to_json(chatstream.response_now(answer)))
    ids = [event["response"]["id"] for event in told if isinstance(event.get("response"), dict)]
    ids += [event["response_id"] for event in told if "response_id" in event]
    assert set(ids) <= {now["id"]}
    for place, event in enumerate(told):
        assert chatstream.place_of_sequence(answer, event["sequence_number"]) == place + 1


@fuzz(300)
@given(JSON)
def test_any_value_can_be_sent_and_read_again(value):
    text = chatstream.to_json(value).encode().decode()
    if "NaN" in text or "Infinity" in text:
        with pytest.raises(ValueError, match="JSON"):
            chatstream.from_json(text)
    else:
        assert chatstream.from_json(text) == value


@fuzz(300)
@given(st.binary(max_size=60))
def test_a_query_always_has_an_answer(query):
    for source in (query.decode("latin-1"), f"name={quote_from_bytes(query)}"):
        for value in chatstream.parse_query(source).values():
            name = chatstream.clean_name(value)
            assert 1 <= len(name) <= 32
            assert name.isprintable()
            name.encode()


@fuzz(300)
@given(st.text(max_size=30) | st.from_regex(r"clock-[-0-9a-f]{0,20}", fullmatch=True))
def test_an_id_is_a_place_of_this_log_or_none(text):
    log = chatstream.EventLog("clock", 3)
    for n in range(9):
        log.append(str(n))
    place = log.place_after(text)
    n = text.removeprefix("clock-")
    known = text.startswith("clock-") and n.isdecimal() and n.isascii() and int(n) < 9
    assert place == (int(n) + 1 if known and len(n) <= 15 else None)


FLAGS = st.sampled_from("upstream log-level linger allow-origin port workers redis".split())  # noqa: SIM905


@fuzz(300)
@given(st.text(max_size=30) | st.from_regex(r"https?://[\[\]a-z0-9.:@/?#]{0,20}"), FLAGS)
def test_hosts_and_flags_are_understood_or_refused(text, flag):
    assert len(chatstream.split_host(text)) == 2
    with suppress(chatstream.UsageError):  # the one that its caller awaits
        chatstream.parse_flags([f"--{flag}={text}"], {})


# ------------------------------------------------------------------ the server itself

PATHS = st.sampled_from(
    f"{CHAT} {OPENAI} / /clock /time /healthz /metrics /v1/models /answers/x /answers/"
    f" /answers/{'0' * 32} // /nothing *".split()
)
METHODS = st.sampled_from("GET POST DELETE HEAD OPTIONS PUT TRACE X".split())  # noqa: SIM905
VALUES = st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=20)
IDS = VALUES | st.sampled_from(["clock-1", "-", "clock--5", "0" * 32 + "-3", "9" * 99])
BODIES = (
    JSON.map(json.dumps)
    | st.builds(
        lambda content, more: json.dumps(
            {"messages": [{"role": "user", "content": content}], "stream": True} | more
        ),
        JSON,
        st.dictionaries(WORDS, JSON, max_size=2),
    )
    | TEXTS
)
REQUEST = st.tuples(METHODS, PATHS, VALUES, IDS, BODIES)


def as_bytes(method, path, query, last_event_id, body):
    data = body.encode(errors="replace")
    lines = [f"{method} {path}?{quote_from_bytes(query.encode())} HTTP/1.1"]
    lines += ["Host: localhost", f"Last-Event-ID: {last_event_id}"]
    lines += ["Connection: close", f"Content-Length: {len(data)}", "\r\n"]
    return "\r\n".join(lines).encode("latin-1") + data


async def status_of(server, request):
    """What it says first; a stream, or a slow answer, is left at once."""
    async with raw_connection(server.http, request) as connection:
        with trio.move_on_after(0.05):
            return int((await connection.line()).split()[1])
    return None


def test_no_request_is_answered_by_500(demo):
    @fuzz(25)
    @given(st.lists(REQUEST, min_size=10, max_size=10))
    def ask(requests):
        async def all_at_once():
            async with trio.open_nursery() as nursery:
                for request in requests:
                    nursery.start_soon(one, as_bytes(*request))

        async def one(request):
            status = await status_of(demo, request)
            assert status is None or status < 500, request

        trio.run(all_at_once)

    ask()
    assert_no_fault(demo.stderr_text())


@pytest.mark.parametrize("protocol", [ROOM_PROTOCOL, None])
def test_whatever_is_said_in_the_room_harms_nobody(open_room, protocol):
    """One member says it; another hears it, if it can be heard, and stays."""
    head = {"Sec-WebSocket-Protocol": protocol} if protocol else {}
    said = st.one_of(
        BODIES.map(lambda text: frame(TEXT, text.encode(errors="replace"))),
        JSON.map(lambda value: frame(TEXT, json.dumps({"text": value}).encode())),
        st.binary(max_size=40),
        st.builds(frame, st.integers(0, 15), st.binary(max_size=130), st.booleans()),
    )

    @fuzz(40)
    @given(st.lists(said, max_size=6))
    def say(frames):
        async def one():
            async with raw_member(open_room.ws, head) as member:
                await member.send(b"".join(frames) + frame(CLOSE, b"\x03\xe8"))
                await drain(member)

        trio.run(one)

    async def meanwhile():
        async with (
            unharmed(open_room),
            raw_member(open_room.ws) as other,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(hear, other)
            await trio.to_thread.run_sync(say)
            nursery.cancel_scope.cancel()

    trio.run(meanwhile)
    assert_no_fault(open_room.stderr_text())


async def hear(member):
    member.patience = 60
    while True:
        opcode, payload = await read_frame(member)
        if opcode == TEXT:
            payload.decode()
