"""The relay: what the upstream says is what the reader gets, and how it fails."""

import json
import socket

import pytest
import trio
from kit import (
    CHAT,
    DONE,
    FIN,
    FORMATS,
    HOLD,
    OPENAI,
    RST,
    SECRET,
    SSE_HEAD,
    Gate,
    SecureUpstream,
    Upstream,
    answer,
    ask,
    asking,
    connect,
    data,
    delta,
    descriptors,
    error_of,
    fetch,
    fetch_events,
    free_port,
    head,
    make_certificate,
    plain,
    program,
    sse,
    stream,
    text_of,
    until,
    whole_answer,
)

CLIENTS_OWN = "sk-client-2b8e"

# ------------------------------------------------------------- chatstream to chatstream


@FORMATS
async def test_a_relay_to_another_chatstream_says_the_same(serve, quick_demo, path):
    middle = serve("--upstream", quick_demo.http + "/v1", "--model", "demo")
    said = {}

    async def note(server):
        said[server] = await fetch_events("POST", server.http + path, None, ask("SSE?"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(note, quick_demo)
        nursery.start_soon(note, middle)
    assert text_of(said[middle]) == text_of(said[quick_demo])
    assert said[middle][-1].data == said[quick_demo][-1].data == "[DONE]"


async def test_a_relay_of_a_whole_answer_says_the_same(serve, quick_demo):
    middle = serve("--upstream", quick_demo.http + "/v1", "--model", "demo")
    said = {}

    async def note(server):
        response = await fetch("POST", server.http + OPENAI, None, asking("SSE?"))
        said[server] = response.json

    async with trio.open_nursery() as nursery:
        nursery.start_soon(note, quick_demo)
        nursery.start_soon(note, middle)
    for part in ("choices", "usage"):
        assert said[middle][part] == said[quick_demo][part]


# ----------------------------------------------------------------------- byte by byte

HELLO = delta("Hello")
STOP = delta(finish="stop")
NOT_ASCII = delta("é \u2028 \u2029 \x85 🙂 你好")
TOOL = {"index": 0, "id": "call_1", "type": "function"}
TOOL |= {"function": {"name": "weather", "arguments": '{"city": "'}}
TOOL_CALL = delta()
TOOL_CALL["choices"][0]["delta"] = {"tool_calls": [TOOL]}
REASONING = delta()
REASONING["choices"][0]["delta"] = {"reasoning_content": "Let me see", "refusal": None}
USAGE = delta() | {"choices": [], "usage": {"prompt_tokens": 3, "total_tokens": 9}}
FUTURE = delta("x", service_tier="new", not_invented={"yet": [1.5, None, 10**20]})
TWO_LINES = b'data: {"choices": [{"index": 0, "finish_reason": null,\n'
TWO_LINES += b'data: "delta": {"content": "two"}}]}\n\n'
TWO = {"choices": [{"index": 0, "finish_reason": None, "delta": {"content": "two"}}]}

SHAPES = {
    "lf": (data(HELLO) + data(STOP) + DONE, [HELLO, STOP]),
    "cr": ((data(HELLO) + data(STOP) + DONE).replace(b"\n", b"\r"), [HELLO, STOP]),
    "crlf": ((data(HELLO) + data(STOP) + DONE).replace(b"\n", b"\r\n"), [HELLO, STOP]),
    "all three": (
        data(HELLO).replace(b"\n\n", b"\r\n\n")
        + data(STOP).replace(b"\n\n", b"\r\r")
        + b"data: [DONE]\n\r\n",
        [HELLO, STOP],
    ),
    "bom": (b"\xef\xbb\xbf" + data(HELLO) + data(STOP) + DONE, [HELLO, STOP]),
    "no space": ((data(HELLO) + data(STOP) + DONE).replace(b"data: ", b"data:"), [HELLO, STOP]),
    "comments": (
        b": OPENROUTER PROCESSING\n\n:\n\n" + data(HELLO) + b":x\n" + data(STOP) + DONE,
        [HELLO, STOP],
    ),
    "id only": (
        b"id: 1\n\n" + data(HELLO) + b"id: 2\n\nretry: 10\n\n" + data(STOP) + DONE,
        [HELLO, STOP],
    ),
    "empty data": (b"data\n\ndata:\n\n" + data(HELLO) + data(STOP) + DONE, None),
    "unknown fields": (b"x: y\nz\n" + data(HELLO) + data(STOP) + DONE, [HELLO, STOP]),
    "two data lines": (TWO_LINES + data(STOP) + DONE, [TWO, STOP]),
    "not ascii": (data(NOT_ASCII) + data(STOP) + DONE, [NOT_ASCII, STOP]),
    "tool calls": (data(TOOL_CALL) + data(STOP) + DONE, [TOOL_CALL, STOP]),
    "reasoning": (data(REASONING) + data(HELLO) + data(STOP) + DONE, None),
    "usage": (data(HELLO) + data(STOP) + data(USAGE) + DONE, [HELLO, STOP, USAGE]),
    "the future": (data(FUTURE) + data(STOP) + DONE, [FUTURE, STOP]),
    "two choices": (data(delta("a", index=0)) + data(STOP) + DONE, [delta("a", index=0), STOP]),
    "event names": (b"event: message\n" + data(HELLO) + data(STOP) + DONE, [HELLO, STOP]),
    "more after the end": (data(HELLO) + data(STOP) + DONE + data(HELLO), [HELLO, STOP]),
}
EXACT = {name: shape for name, shape in SHAPES.items() if shape[1]}


def split(body, size):
    return [body[at : at + size] for at in range(0, len(body), size)]


@pytest.mark.parametrize("size", [1, 7, 10**6])
@pytest.mark.parametrize("name", EXACT)
async def test_each_chunk_is_passed_on_as_it_came(relay, upstream, name, size):
    body, chunks = EXACT[name]
    prompt = upstream.script(*sse(*split(body, size)))
    *events, done = await fetch_events("POST", relay.http + OPENAI, None, ask(prompt))
    assert [event.json for event in events] == chunks
    assert done.data == "[DONE]"


@pytest.mark.parametrize("size", [1, 10**6])
@pytest.mark.parametrize("name", SHAPES)
async def test_the_plain_format_has_the_text_alone(relay, upstream, name, size):
    prompt = upstream.script(*sse(*split(SHAPES[name][0], size)))
    *events, done = await fetch_events("POST", relay.http + CHAT, None, ask(prompt))
    said = {"not ascii": NOT_ASCII, "two data lines": TWO, "the future": FUTURE}
    said |= {"tool calls": STOP, "two choices": delta("a")}
    said = said.get(name, HELLO)["choices"][0]["delta"].get("content", "")
    assert text_of(events) == said
    assert all(isinstance(event.json["content"], str) for event in events)
    assert done.data == "[DONE]"


CHUNKED_HEAD = SSE_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
SAID = data(HELLO) + data(STOP) + DONE
FRAMINGS = {
    "one chunk": b"%x\r\n%b\r\n0\r\n\r\n" % (len(SAID), SAID),
    "extension": b"%x;a=b\r\n%b\r\n0;c\r\n\r\n" % (len(SAID), SAID),
    "spaces": b"%x ; a = b\r\n%b\r\n0 \r\n\r\n" % (len(SAID), SAID),
    "zeros, capitals": b"000%X\r\n%b\r\n000\r\n\r\n" % (len(SAID), SAID),
    "trailers": b"%x\r\n%b\r\n0\r\nX-Sum: 1\r\nY: 2\r\n\r\n" % (len(SAID), SAID),
    "chunks of a byte": b"".join(b"1\r\n%c\r\n" % c for c in SAID) + b"0\r\n\r\n",
}


@pytest.mark.parametrize("size", [1, 2, 3, 50, 10**6])
@pytest.mark.parametrize("name", FRAMINGS)
async def test_chunked_framing_however_it_is_cut(relay, upstream, name, size):
    for _ in range(2):  # the connection is good for another answer
        prompt = upstream.script(*split(CHUNKED_HEAD + FRAMINGS[name], size))
        events = await fetch_events("POST", relay.http + OPENAI, None, ask(prompt))
        assert [event.json for event in events[:-1]] == [HELLO, STOP]
        assert events[-1].data == "[DONE]"


@pytest.mark.parametrize("size", [40, 150])
async def test_a_body_that_is_no_stream_may_come_in_pieces(relay, upstream, size):
    """The first of them with some of the body behind the head, as large ones do."""
    message = {"role": "assistant", "content": "word " * 100}
    whole = {"object": "chat.completion", "choices": [{"index": 0, "message": message}]}
    head, _, body = plain(200, whole).partition(b"\r\n\r\n")
    first, *others = split(body, size)
    steps = [step for piece in others for step in (0.01, piece)]
    prompt = upstream.script(head + b"\r\n\r\n" + first, *steps)
    response = await fetch("POST", relay.http + OPENAI, None, asking(prompt))
    assert response.json == whole


async def test_what_comes_before_the_head_is_no_head(relay, upstream):
    said = b"".join(answer("a ", "b"))
    prompt = upstream.script(b"HTTP/1.1 103 Early Hints\r\n\r\n", 0.05, said)
    events = await fetch_events("POST", relay.http + OPENAI, None, ask(prompt))
    assert text_of(events) == "a b"
    assert events[-1].data == "[DONE]"


HALF = b"%x\r\n%b\r\n" % (len(data(HELLO)), data(HELLO))
BROKEN_FRAMINGS = {
    "no number": HALF + b"zz\r\n",
    "negative": HALF + b"-5\r\nhello\r\n",
    "0x": HALF + b"0x5\r\nhello\r\n",
    "underscore": HALF + b"1_0\r\n" + b"x" * 16 + b"\r\n",
    "empty": HALF + b"\r\n",
    "too long by far": HALF + b"f" * 40 + b"\r\n" + b"x" * 100,
    "no end of line": HALF + b"5\r\nhelloXX0\r\n\r\n",
    "a line without end": HALF + b"5;" + b"x" * 100_000,
    "no trailer": HALF + b"0\r\nnothing\r\n\r\n",
    "trailers without end": HALF + b"0\r\n" + b"a: b\r\n" * 20_000,
}


@FORMATS
@pytest.mark.parametrize("name", BROKEN_FRAMINGS)
async def test_broken_framing_is_a_failure(relay, upstream, path, name):
    """At once; and no other answer comes over that connection."""
    prompt = upstream.script(CHUNKED_HEAD, BROKEN_FRAMINGS[name], HOLD)
    events = await fetch_events("POST", relay.http + path, None, ask(prompt))
    assert error_of(events)["type"] == "upstream_error"
    assert text_of(events) == "Hello"
    await until(lambda: upstream.asked(prompt)[0].closed_at, 1)


@FORMATS
async def test_an_upstream_without_chunked_framing(relay, upstream, path):
    """As HTTP/1.0 has it: the answer ends with its connection."""
    head = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    prompt = upstream.script(head, data(HELLO), data(STOP), DONE, FIN)
    events = await fetch_events("POST", relay.http + path, None, ask(prompt))
    assert (text_of(events), events[-1].data) == ("Hello", "[DONE]")


async def test_text_is_utf_8_whatever_the_head_says(relay, upstream):
    head = SSE_HEAD.replace(b"event-stream", b"event-stream; charset=latin-1")
    prompt = upstream.script(*sse(NOT_ASCII, STOP, DONE, head=head))
    events = await fetch_events("POST", relay.http + CHAT, None, ask(prompt))
    assert text_of(events) == NOT_ASCII["choices"][0]["delta"]["content"]


@FORMATS
async def test_an_event_of_900_kb_passes(relay, upstream, path):
    long = delta("x" * 900_000)
    prompt = upstream.script(*sse(long, STOP, DONE))
    events = await fetch_events("POST", relay.http + path, None, ask(prompt))
    assert (text_of(events), events[-1].data) == ("x" * 900_000, "[DONE]")


TOO_LONG = {
    "one line": data(delta("x" * 17_000_000)),
    "many lines": b"data: xxxxxxxx\n" * 1_200_000 + b"\n",
    "no end of line": b"data: " + b"x" * 17_000_000,
    "a comment": b":" + b"x" * 17_000_000,
}


@FORMATS
@pytest.mark.parametrize("name", TOO_LONG)
async def test_an_event_of_17_mb_is_a_clear_error(relay, upstream, path, name):
    prompt = upstream.script(*sse(HELLO, *split(TOO_LONG[name], 65536), STOP, DONE))
    events = await fetch_events("POST", relay.http + path, None, ask(prompt))
    error = error_of(events)
    assert error["type"] == "upstream_error"
    assert "16 MiB" in error["message"]
    assert text_of(events) == "Hello"


async def test_an_answer_over_64_mib_is_a_clear_error(relay, upstream):
    prompt = upstream.script(*sse(*[delta("x" * 900_000)] * 80, STOP, DONE))
    events = await fetch_events("POST", relay.http + CHAT, None, ask(prompt))
    error = error_of(events)
    assert error["type"] == "upstream_error"
    assert "large" in error["message"]
    assert 60 < sum(len(e.data) for e in events) / (1 << 20) <= 65


# ---------------------------------------------------------------------- how it refuses

ERROR = {"error": {"message": "No.", "type": "t", "param": None, "code": "c"}}
REFUSALS = {
    "400": (plain(400, ERROR), 400),
    "401": (plain(401, ERROR), 502),
    "403": (plain(403, ERROR), 502),
    "404": (plain(404, ERROR), 404),
    "422": (plain(422, {"detail": "No."}), 422),
    "429": (plain(429, ERROR, "Retry-After: 7"), 429),
    "500": (plain(500, ERROR), 500),
    "500 html": (plain(500, b"<h1>No.</h1>", content_type="text/html"), 500),
    "500 empty": (plain(500, b""), 500),
    "503 broken json": (plain(503, b'{"error": '), 503),
    "529": (plain(529, ERROR), 529),
    "json that is no error": (plain(400, [1, 2]), 400),
    "not utf-8": (plain(400, b"\xff\xfe"), 400),
    "very long": (plain(500, b"x" * 3_000_000, content_type="text/plain"), 500),
    "moved": (plain(302, b"", "Location: http://127.0.0.1:9/"), 502),
    "moved for good": (plain(308, b"", "Location: /v2/chat/completions"), 502),
    "not modified": (b"HTTP/1.1 304 Not Modified\r\n\r\n", 502),
    "200 html": (plain(200, b"<h1>Log in</h1>", content_type="text/html"), 502),
    "200 empty": (plain(200, b"", content_type="text/event-stream"), None),
    "not http": (b"SSH-2.0-OpenSSH_9\r\n", 502),
    "nothing": (b"", 502),
}


@pytest.mark.parametrize(("path", "streamed"), [(CHAT, True), (OPENAI, True), (OPENAI, False)])
@pytest.mark.parametrize("name", REFUSALS)
async def test_the_upstreams_refusal_is_the_clients(relay, upstream, name, path, streamed):
    step, status = REFUSALS[name]
    whole = step.startswith(b"HTTP")  # one that then hangs up could break the next test
    prompt = upstream.script(step, *([] if whole else [FIN]))
    body = asking(prompt, stream=streamed)
    async with stream("POST", relay.http + path, None, body) as response:
        if status is None and response.status == 200:
            error = error_of(await response.events())
        else:
            assert response.status == (status or 502), (await response.read()).error
            error = (await response.read()).error
    assert len(upstream.asked(prompt)) == 1
    assert "<" not in error["message"]
    assert len(error["message"]) < 2000
    if name == "429":
        assert response.headers["retry-after"] == "7"
    if name in ("401", "403"):  # of the server's own key
        assert error["code"] == "server_key_refused"
        assert "No." not in error["message"]
    elif step.endswith(json.dumps(ERROR).encode()):
        assert "No." in error["message"]


@FORMATS
async def test_an_upstream_that_is_not_there_is_502(serve, path):
    server = serve("--upstream", f"http://127.0.0.1:{free_port()}/v1", "--model", "m")
    response = await fetch("POST", server.http + path, None, ask("Hello"))
    assert response.status == 502
    assert response.error["type"] == "upstream_error"


async def test_an_upstream_without_a_name_is_502(serve):
    server = serve("--upstream", "http://nowhere.invalid/v1", "--model", "m")
    response = await fetch("POST", server.http + CHAT, None, ask("Hello"))
    assert response.status == 502


@FORMATS
async def test_a_reset_before_the_head_is_502_and_not_tried_again(relay, upstream, path):
    """The request may have been read: a second one could cost a second answer."""
    prompt = upstream.script(RST)
    response = await fetch("POST", relay.http + path, None, ask(prompt))
    assert response.status == 502
    assert len(upstream.asked(prompt)) == 1


IN_BAND = {"error": {"message": "Overloaded.", "type": "server_error", "code": 500}}
CUTS = {
    "fin in an event": [*sse(HELLO, b'data: {"choices": [{"de', FIN)],
    "fin between events": [*sse(HELLO, FIN)],
    "fin after a finish": [*sse(HELLO, STOP, FIN)],
    "rst": [*sse(HELLO, 0.05, RST)],
    "a proper end, but no last chunk": [*sse(HELLO)],
    "no blank line at the end": [*sse(HELLO, data(delta("lost"))[:-1])],
    "close-delimited": [SSE_HEAD + b"\r\n", data(HELLO), FIN],
    "content-length too long": [SSE_HEAD + b"Content-Length: 100000\r\n\r\n", data(HELLO), FIN],
    "broken framing": [*list(sse(HELLO, FIN))[:-1], b"zz\r\n", FIN],
    "in band": [*sse(HELLO, IN_BAND, DONE)],
    "in band, no done": [*sse(HELLO, IN_BAND)],
    "in band, as an event": [*sse(HELLO, b"event: error\n" + data(IN_BAND), DONE)],
    "in band, a string": [*sse(HELLO, {"error": "Overloaded."}, DONE)],
    "not json": [*sse(HELLO, b"data: hello\n\n", DONE)],
    "not utf-8": [*sse(HELLO, b'data: {"x": "\xff"\n\n', DONE)],
    "too deep": [*sse(HELLO, b"data: " + b"[" * 100_000 + b"\n\n", DONE)],
    "a number": [*sse(HELLO, b"data: 5\n\n", DONE)],
}


@FORMATS
@pytest.mark.parametrize("name", CUTS)
async def test_a_cut_answer_never_looks_like_a_success(relay, upstream, path, name):
    prompt = upstream.script(*CUTS[name])
    events = await fetch_events("POST", relay.http + path, None, ask(prompt))
    if name == "fin after a finish":  # that finish is the upstream's own
        assert events[-1].type == "error"
        error = events[-1].json["error"]
    else:
        error = error_of(events)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "upstream_error"
    assert text_of(events) == "Hello"
    assert "DONE" not in "".join(event.data for event in events)
    if name.startswith("in band"):
        assert "Overloaded." in error["message"]


@FORMATS
async def test_nothing_that_comes_after_a_failure_is_heard(relay, upstream, path):
    """Not even when it is there before the failure has been dealt with."""
    head, hello, failure, done, end = sse(HELLO, IN_BAND, DONE)
    for _ in range(40):
        prompt = upstream.script(head + hello + failure, done + end)
        events = await fetch_events("POST", relay.http + path, None, ask(prompt))
        assert "Overloaded." in error_of(events)["message"]


@pytest.mark.parametrize("shape", [{"choices": None}, {"choices": [None]}, {"choices": 5}, {}])
@FORMATS
async def test_a_chunk_of_an_odd_shape_harms_nobody(relay, upstream, path, shape):
    prompt = upstream.script(*sse(HELLO, shape, delta(" you"), STOP, DONE))
    events = await fetch_events("POST", relay.http + path, None, ask(prompt))
    assert events[0].json
    assert events[-1].data == "[DONE]" or events[-1].type == "error"
    if path == OPENAI and events[-1].data == "[DONE]":
        assert events[1].json == shape


# -------------------------------------------------------------------------- over TLS


@pytest.fixture(scope="module")
def secure_upstream(tmp_path_factory):
    """An upstream with a certificate, and the environment that trusts it."""
    cert, key = make_certificate(tmp_path_factory.mktemp("tls"))[1::2]
    with SecureUpstream(cert, key) as upstream:
        yield upstream, {"OPENAI_BASE_URL": upstream.url, "SSL_CERT_FILE": cert}


@pytest.fixture(scope="module")
def secure_relay(shared, secure_upstream):
    return shared("--linger", "0.4", "--model", "scripted", env=secure_upstream[1])


@pytest.mark.parametrize("size", [1, 7, 100_000])
async def test_each_chunk_is_passed_on_over_tls_too(secure_relay, secure_upstream, size):
    whole = b"".join(sse(HELLO, NOT_ASCII, USAGE, DONE))
    pieces = [whole[n : n + size] for n in range(0, len(whole), size)]
    prompt = secure_upstream[0].script(*pieces)
    events = await fetch_events("POST", secure_relay.http + OPENAI, None, ask(prompt))
    assert [json.loads(event.data) for event in events[:-1]] == [HELLO, NOT_ASCII, USAGE]
    assert events[-1].data == "[DONE]"


async def test_a_token_over_tls_is_passed_on_at_once(secure_relay, secure_upstream):
    """Several tokens may come in one record, and the last of them must not wait."""
    gate = Gate()
    prompt = secure_upstream[0].script(*answer("Hel", "lo ", gate, "you"))
    body = ask(prompt)
    async with stream("POST", secure_relay.http + CHAT, None, body) as response:
        assert text_of(await response.events(2)) == "Hello "
        gate.open()
        assert text_of(await response.events()) == "you"


@pytest.mark.parametrize("end", [FIN, RST], ids=["FIN", "RST"])
async def test_an_answer_cut_over_tls_never_looks_like_a_success(
    secure_relay, secure_upstream, end
):
    prompt = secure_upstream[0].script(*sse(HELLO, 0.1, end))
    events = await fetch_events("POST", secure_relay.http + CHAT, None, ask(prompt))
    assert text_of(events[:-1]) == "Hello"
    assert error_of(events)["type"] == "upstream_error"


async def test_leaving_stops_an_upstream_over_tls(secure_relay, secure_upstream):
    upstream, _ = secure_upstream
    prompt = upstream.script(*sse(HELLO, HOLD))
    body = ask(prompt)
    async with stream("POST", secure_relay.http + CHAT, None, body) as response:
        await response.event()
    await until(lambda: upstream.asked(prompt)[0].closed_at)


async def test_an_upstream_that_nobody_vouches_for_is_not_asked(serve, secure_upstream):
    upstream, env = secure_upstream
    server = serve(env={"OPENAI_BASE_URL": env["OPENAI_BASE_URL"]})
    prompt = upstream.script(*answer("Hello"))
    response = await fetch("POST", server.http + OPENAI, None, asking(prompt))
    assert response.status == 502
    assert "certificate" in response.error["message"].lower()
    assert not upstream.asked(prompt)


# --------------------------------------------------------------------- not streamed


async def test_a_whole_answer_comes_as_the_upstream_gave_it(relay, upstream):
    step = whole_answer("Hello", new=[1, None])
    prompt = upstream.script(step)
    response = await fetch("POST", relay.http + OPENAI, None, asking(prompt))
    assert response.status == 200
    assert response.json == json.loads(step.partition(b"\r\n\r\n")[2])


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
CUT_WHOLE = {
    "fin": [whole_answer("Hello")[:-5], FIN],
    "rst": [whole_answer("Hello")[:-5], RST],
    "fin before the body": [whole_answer("Hello").partition(b"{")[0], FIN],
    "fin in a chunk": [CHUNKED + b"Content-Type: application/json\r\n\r\n9\r\n{", FIN],
    "half of its json": [plain(200, b'{"choices": [')],
}


@pytest.mark.parametrize("name", CUT_WHOLE)
async def test_a_whole_answer_that_is_cut_is_502(relay, upstream, name):
    prompt = upstream.script(*CUT_WHOLE[name])
    response = await fetch("POST", relay.http + OPENAI, None, asking(prompt))
    assert response.status == 502
    assert response.error["message"]


# ------------------------------------------------------------------- what is sent on


async def test_the_request_is_passed_on_as_it_came(relay, upstream):
    prompt = upstream.script(*answer("Hello"))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    fields = {"model": "scripted", "temperature": 0.5, "tools": tools, "new": [1, None]}
    body = ask(prompt, **fields, stream_options={"include_usage": True})
    await fetch_events("POST", relay.http + OPENAI, None, body)
    (heard,) = upstream.asked(prompt)
    assert (heard.method, heard.target) == ("POST", "/v1/chat/completions")
    assert heard.json == body


async def test_the_plain_format_asks_for_the_servers_model(relay, upstream):
    prompt = upstream.script(*answer("Hello"))
    talk = [{"role": "system", "content": "你好"}, *asking(prompt)["messages"]]
    await fetch_events("POST", relay.http + CHAT, None, {"messages": talk})
    (heard,) = upstream.asked(prompt)
    assert heard.json["messages"] == talk
    assert (heard.json["model"], heard.json["stream"]) == ("scripted", True)


async def test_a_request_that_names_no_model_gets_the_servers(relay, upstream):
    prompt = upstream.script(*answer("Hello"))
    await fetch_events("POST", relay.http + OPENAI, None, ask(prompt))
    assert upstream.asked(prompt)[0].json["model"] == "scripted"


@pytest.mark.parametrize("models", [{"data": []}, {}, ["m"], "none"])
async def test_an_upstream_that_lists_no_model_is_a_clear_error(serve, second_upstream, models):
    """The page names no model; so the first of the list would be asked."""
    second_upstream.other = lambda heard: [plain(200, models)]
    server = serve(env={"OPENAI_BASE_URL": second_upstream.url})
    response = await fetch("POST", server.http + CHAT, None, asking("Hello"))
    assert response.status == 502
    assert "--model" in response.error["message"]


async def test_an_upstream_that_takes_no_connection_is_504(serve):
    """Its queue is full, so that nothing answers: no refusal either."""
    with socket.socket() as full, socket.socket() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting.connect(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        limits = program(CONNECT_TIMEOUT=0.5)
        server = serve("--upstream", url, "--model", "m", program=limits)
        response = await fetch("POST", server.http + OPENAI, None, asking("Hello"))
    assert response.status == 504
    assert response.error["code"] == "timeout"


async def test_a_base_url_may_end_with_a_slash(serve, upstream):
    server = serve("--upstream", upstream.url + "/", "--model", "m")
    prompt = upstream.script(*answer("Hello"))
    await fetch_events("POST", server.http + CHAT, None, ask(prompt))
    assert upstream.asked(prompt)[0].target == "/v1/chat/completions"


@FORMATS
async def test_the_servers_key_is_used_and_no_header_of_the_client(relay, upstream, path):
    prompt = upstream.script(*answer("Hello"))
    head = {"Authorization": f"Bearer {CLIENTS_OWN}", "Cookie": "a=b", "X-Mine": "c"}
    await fetch_events("POST", relay.http + path, head, ask(prompt))
    sent = upstream.asked(prompt)[0].headers
    assert sent["authorization"] == f"Bearer {SECRET}"
    assert not {"cookie", "x-mine", "origin", "referer"} & set(sent)
    assert CLIENTS_OWN not in str(sent)


@FORMATS
async def test_without_a_key_the_clients_own_is_passed_on(serve, upstream, path):
    server = serve("--upstream", upstream.url, "--model", "m")
    head = {"Authorization": f"Bearer {CLIENTS_OWN}"}
    prompt = upstream.script(*answer("Hello"))
    await fetch_events("POST", server.http + path, head, ask(prompt))
    assert upstream.asked(prompt)[0].headers["authorization"] == f"Bearer {CLIENTS_OWN}"
    prompt = upstream.script(*answer("Hello"))
    await fetch_events("POST", server.http + path, None, ask(prompt))
    assert "authorization" not in upstream.asked(prompt)[0].headers


async def test_no_cookie_is_kept_for_the_next_client(relay, upstream):
    head = SSE_HEAD + b"Set-Cookie: who=first; Path=/\r\n"
    first = upstream.script(*sse(HELLO, STOP, DONE, head=head))
    response = await fetch("POST", relay.http + CHAT, None, ask(first))
    assert "set-cookie" not in response.headers
    second = upstream.script(*answer("Hello"))
    await fetch_events("POST", relay.http + CHAT, None, ask(second))
    assert "cookie" not in upstream.asked(second)[0].headers


@FORMATS
async def test_a_redirect_is_not_followed(relay, upstream, path):
    with Upstream() as elsewhere:
        to = f"Location: http://127.0.0.1:{elsewhere.port}/v1/chat/completions"
        for status in (301, 302, 303, 307, 308):
            prompt = upstream.script(plain(status, b"", to))
            response = await fetch("POST", relay.http + path, None, ask(prompt))
            assert response.status == 502
        assert not elsewhere.heard


BEHIND = [b"HTTP/1.1 200 OK\r\n", b"\r\n", b"5\r\nhello\r\n0\r\n\r\n"]


@FORMATS
async def test_what_comes_behind_an_answer_begins_no_other(relay, upstream, path):
    """Whoever sent it, no answer comes over that connection any more."""
    for more in BEHIND:
        *steps, last = answer("Hello")
        prompt = upstream.script(*steps, last + more)
        events = await fetch_events("POST", relay.http + path, None, ask(prompt))
        assert (text_of(events), events[-1].data) == ("Hello", "[DONE]")
        await until(lambda prompt=prompt: upstream.asked(prompt)[0].closed_at, 1)


async def test_an_upstream_that_talks_on_after_its_answer_is_left(serve, upstream):
    server = serve("--upstream", upstream.url, "--model", "m")
    steps = [step for _ in range(20) for step in (0.3, b": keep-alive\n\n")]
    prompt = upstream.script(*sse(HELLO, STOP, DONE, *steps))
    events = await fetch_events("POST", server.http + CHAT, None, ask(prompt))
    assert events[-1].data == "[DONE]"
    await until(lambda: upstream.asked(prompt)[0].closed_at, 2.5)


async def test_an_upstream_that_closes_idle_connections_is_asked_anew(relay, upstream):
    for _ in range(3):
        prompt = upstream.script(*answer("Hello"), FIN)
        events = await fetch_events("POST", relay.http + CHAT, None, ask(prompt))
        assert events[-1].data == "[DONE]"
        await trio.sleep(0.1)


async def test_connections_that_the_upstream_has_closed_are_not_kept(serve):
    """Also if one question at a time always finds a fresh one."""
    with Upstream() as upstream:
        server = serve("--upstream", upstream.url, "--model", "m")
        prompt = upstream.script(*answer("Hello"), 1.5, FIN)

        async def ask_it():
            await fetch_events("POST", server.http + OPENAI, None, ask(prompt))

        before = descriptors(server.process.pid)
        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(ask_it)
        for _ in range(6):  # longer than any is kept
            await trio.sleep(0.8)
            await ask_it()
        await until(lambda: descriptors(server.process.pid) <= before + 5, 1)


async def test_a_header_that_is_repeated_with_nothing_in_it_goes_on(serve, upstream):
    server = serve("--upstream", upstream.url, "--model", "m")
    prompt = upstream.script(*answer("Hello"))
    body = json.dumps(ask(prompt)).encode()
    lines = ["Host: localhost", f"Content-Length: {len(body)}", f"x-api-key: {CLIENTS_OWN}"]
    lines += ["x-api-key:", "tracestate: a=1", "tracestate: "]
    async with connect(server.http) as connection:
        await connection.send(head("POST", OPENAI, *lines) + body)
        assert (await connection.response("POST")).status == 200
    [heard] = upstream.asked(prompt)
    assert heard.headers["tracestate"].startswith("a=1")
    assert heard.headers["x-api-key"].startswith(CLIENTS_OWN)
    assert CLIENTS_OWN not in server.log()


async def test_the_key_is_in_no_log_no_error_and_no_page(serve, upstream):
    env = {"OPENAI_BASE_URL": upstream.url, "OPENAI_API_KEY": SECRET}
    server = serve("--log-level", "debug", "--model", "m", env=env)
    tells = {"error": {"message": f"Incorrect API key provided: {SECRET}."}}
    scripts = [
        answer("Hello"),
        [plain(401, tells)],
        [plain(500, f"<h1>{SECRET}</h1>".encode(), content_type="text/html")],
        sse(HELLO, tells, DONE),
        [b"HTTP/1.1 200 " + SECRET.encode() + b"\r\nbad\r\n\r\n", FIN],
        [b"rubbish " + SECRET.encode() + b"\r\n\r\n", FIN],
        sse(HELLO, f"data: {SECRET}\n\n".encode(), DONE),
        [plain(302, b"", f"Location: http://{SECRET}.example/")],
        [plain(200, b"rubbish", content_type=SECRET)],
    ]
    for script in map(list, scripts):
        for path in (CHAT, OPENAI):
            prompt = upstream.script(*script)
            response = await fetch("POST", server.http + path, None, ask(prompt))
            assert SECRET not in response.body.decode() + str(response.headers)
    for path in ("/", "/healthz", "/v1/models", "/nothing"):
        page = await fetch("GET", server.http + path)
        assert SECRET not in page.body.decode() + str(page.headers)
    assert SECRET not in server.log()


async def test_a_clients_key_is_not_logged_either(serve, upstream):
    server = serve("--log-level", "debug", "--upstream", upstream.url, "--model", "m")
    head = {"Authorization": f"Bearer {CLIENTS_OWN}"}
    for script in ([*answer("Hello")], [plain(401, ERROR)], [RST], [*sse(HELLO, FIN)]):
        prompt = upstream.script(*script)
        await fetch("POST", server.http + CHAT, head, ask(prompt))
    assert CLIENTS_OWN not in server.log()


async def test_a_key_of_odd_bytes_is_refused_at_start_or_in_a_clear_error(serve):
    url = f"http://127.0.0.1:{free_port()}/v1"
    server = serve("--upstream", url, "--model", "m")
    head = {"Authorization": "Bearer caf\xe9"}
    response = await fetch("POST", server.http + CHAT, head, ask("Hello"))
    assert response.status in (400, 401, 502)
