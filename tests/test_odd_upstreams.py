"""What real upstreams send: endings, reasons, silence, sizes, in odd forms.

Each is asked for the chat page, and with OpenAI's protocol streamed and not streamed.
"""

import gzip
import json
import zlib

import pytest
import trio
from kit import (
    CHAT,
    DONE,
    FIN,
    HOLD,
    OPENAI,
    RESPONSES,
    RST,
    SECRET,
    SSE_HEAD,
    Background,
    Connection,
    Gate,
    Upstream,
    answer,
    ask,
    asking,
    chat_whole,
    connect,
    data,
    delta,
    error_of,
    fetch,
    fetch_events,
    free_port,
    need_module,
    openai_client,
    plain,
    program,
    run_to_exit,
    sse,
    stream,
    text_of,
    unharmed,
    until,
)

HELLO, STOP = delta("Hello"), delta(finish="stop")
USAGE = delta() | {"choices": [], "usage": {"prompt_tokens": 3, "total_tokens": 9}}
WAYS = {"page": (CHAT, True), "streamed": (OPENAI, True), "whole": (OPENAI, False)}
WAY = pytest.mark.parametrize("way", WAYS)
STREAMED = pytest.mark.parametrize("path", [CHAT, OPENAI])


def question(way, prompt, **fields):
    path, streamed = WAYS[way]
    return path, asking(prompt, stream=streamed, **fields)


async def refusal(relay, way, prompt):
    """The answer to a question that gets an error and no event."""
    path, body = question(way, prompt)
    return await fetch("POST", relay.http + path, None, body)


async def events_of(relay, path, prompt):
    return await fetch_events("POST", relay.http + path, None, ask(prompt))


def assert_whole(events, text="Hello"):
    assert text_of(events) == text
    assert events[-1].data == "[DONE]"
    assert "error" not in {event.type for event in events}


def no_length(*steps):
    """A body that ends with its connection."""
    head = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    return [head, *(data(s) if isinstance(s, dict) else s for s in steps)]


# ------------------------------------------------------------------- how answers end

SAID = data(HELLO) + data(STOP)
TWO_CHOICES = [delta("Hello"), delta()]
TWO_CHOICES[1]["choices"][0] |= {"index": 1, "delta": {"content": ""}}
SECOND_STOP = delta(finish="length")
SECOND_STOP["choices"][0]["index"] = 1

WHOLE = {
    "no [DONE]": list(sse(HELLO, STOP)),
    "no [DONE], usage last": list(sse(HELLO, STOP, USAGE)),
    "no [DONE], both choices ended": list(sse(*TWO_CHOICES, STOP, SECOND_STOP)),
    "no [DONE], no length": no_length(HELLO, STOP, FIN),
    "no [DONE], usage last, no length": no_length(HELLO, STOP, USAGE, FIN),
    "[DONE] without a blank line": list(sse(SAID + b"data: [DONE]")),
    "[DONE] and half an end of line": list(sse(SAID + b"data: [DONE]\r")),
    "[DONE] without a blank line, no length": no_length(SAID, b"data: [DONE]", FIN),
    "[DONE] and a space": list(sse(SAID + b"data: [DONE] \n\n")),
    "[DONE] after two spaces": list(sse(SAID + b"data:  [DONE]\n\n")),
    "[DONE] and a tab": list(sse(SAID + b"data:[DONE]\t\r\n\r\n")),
    "[DONE] as an event of its own name": list(sse(SAID + b"event: done\ndata: [DONE]\n\n")),
    "[DONE] with no finish_reason": list(sse(HELLO, DONE)),
    "no [DONE], an empty finish_reason until the last": list(sse(delta("Hello", finish=""), STOP)),
}


@STREAMED
@pytest.mark.parametrize("name", WHOLE)
async def test_a_whole_answer_is_not_called_cut(relay, upstream, path, name):
    prompt = upstream.script(*WHOLE[name])
    assert_whole(await events_of(relay, path, prompt))


LENGTH = SSE_HEAD + b"Content-Length: 10000\r\n\r\n"
CUT = {
    "no finish_reason": list(sse(HELLO)),
    "no finish_reason, no length": no_length(HELLO, FIN),
    "usage and no finish_reason": list(sse(HELLO, USAGE)),
    "one choice of two has ended": list(sse(*TWO_CHOICES, STOP)),
    "finish_reason, then no last chunk": list(sse(HELLO, STOP, FIN)),
    "finish_reason, then a reset": no_length(HELLO, STOP, 0.05, RST),
    "finish_reason, then less than its length": [LENGTH, SAID, FIN],
    "inside [DONE]": list(sse(HELLO, b"data: [DON")),
    "an empty finish_reason": list(sse(delta("Hello", finish=""))),
}


@STREAMED
@pytest.mark.parametrize("name", CUT)
async def test_a_cut_answer_is_not_called_whole(relay, upstream, path, name):
    events = await events_of(relay, path, upstream.script(*CUT[name]))
    *said, error = events
    assert error.type == "error"
    assert error.json["error"]["type"] == "upstream_error"
    assert text_of(said) == "Hello"
    assert "[DONE]" not in {event.data for event in events}


CRASHED = {"message": "crashed", "code": 500}
FAILED = {
    "event: error, flat": b"event: error\n" + data(CRASHED),
    "event: error, nested": b"event: error\n" + data({"error": CRASHED}),
    "event: error, words": b"event: error\ndata: crashed\n\n",
    "event: error, a string": b'event: error\ndata: "crashed"\n\n',
    "event: error, detail": b"event: error\n" + data({"detail": "crashed"}),
    "object: error": data({"object": "error", **CRASHED}),
    "error beside choices": data(delta() | {"error": CRASHED}),
    "error is a string": data({"error": "crashed"}),
    "type: error": data({"type": "error", "error": CRASHED}),
    # Not event streams, but servers write it into one.
    "error: instead of data:, flat": b"error: %b\n\n" % json.dumps(CRASHED).encode(),
    "error: instead of data:, nested": b"error:%b\n\n" % json.dumps({"error": CRASHED}).encode(),
    "JSON and nothing before it": json.dumps({"error": CRASHED}).encode() + b"\n\n",
}


@STREAMED
@pytest.mark.parametrize("name", FAILED)
async def test_a_failed_answer_is_not_called_whole(relay, upstream, path, name):
    prompt = upstream.script(*sse(HELLO, FAILED[name], DONE))
    events = await events_of(relay, path, prompt)
    error = error_of(events)
    assert "crashed" in error["message"]
    assert error["type"] == "upstream_error"
    if "flat" in name or "nested" in name:
        assert str(error["code"]) == "500"
    assert text_of(events[:-1]) == "Hello"


@STREAMED
@pytest.mark.parametrize("said", [b"{}", b"", b"null", b"[DONE]"])
async def test_an_error_event_without_a_word_is_an_error(relay, upstream, path, said):
    prompt = upstream.script(*sse(HELLO, b"event: error\ndata: %b\n\n" % said, DONE))
    assert error_of(await events_of(relay, path, prompt))["message"]


@STREAMED
@pytest.mark.parametrize("before", [data(HELLO), b": soon\n\n"])
@pytest.mark.parametrize("framed", [b"data: %b", b"event: error\ndata: %b\n", b"%b", b"%b\n"])
async def test_an_error_that_ends_the_body_at_once_is_told(relay, upstream, path, before, framed):
    """Without its blank line, or as JSON alone: the server had begun, and then failed."""
    prompt = upstream.script(*sse(before + framed % json.dumps({"error": CRASHED}).encode()))
    assert error_of(await events_of(relay, path, prompt))["message"] == "crashed"


@STREAMED
async def test_an_error_that_is_null_is_none(relay, upstream, path):
    """Some send it with each chunk."""
    chunks = [HELLO | {"error": None}, STOP | {"error": None}]
    assert_whole(await events_of(relay, path, upstream.script(*sse(*chunks, DONE))))


@STREAMED
@pytest.mark.parametrize("code", [None, 429, "rate_limited"])
async def test_what_an_error_says_of_itself_is_kept(relay, upstream, path, code):
    said = {"message": "No.", "type": "t", "param": "top_p", "code": code}
    prompt = upstream.script(*sse(HELLO, {"error": said}))
    error = error_of(await events_of(relay, path, prompt))
    assert error["param"] == "top_p"
    assert str(error["code"]) == str(code)


@STREAMED
@pytest.mark.parametrize(
    "steps", [list(sse(DONE)), list(sse(USAGE)), list(sse(b": nothing\n\n", DONE))]
)
async def test_an_end_without_a_word_is_an_error(relay, upstream, path, steps):
    response = await fetch("POST", relay.http + path, None, ask(upstream.script(*steps)))
    assert response.status == 502 or b"event: error" in response.body
    assert b"[DONE]" not in response.body


@STREAMED
async def test_each_error_event_makes_every_sdk_raise(relay, upstream, path):
    """One form for all: OpenAI's fields, Anthropic's type, a sequence number."""
    prompt = upstream.script(*sse(HELLO, FIN))
    *_, last = await events_of(relay, path, prompt)
    fields = {"type", "sequence_number", "error"} | ({"content"} if path == CHAT else set())
    assert set(last.json) == fields
    assert last.json["type"] == "error"
    assert isinstance(last.json["sequence_number"], int)
    assert set(last.json["error"]) == {"message", "type", "param", "code"}


# ------------------------------------------------------------------ in whose words

CONTEXT = "maximum context length is 8192 tokens"
REASONS = {
    "openai": {"error": {"message": CONTEXT, "type": "t", "param": None, "code": "c"}},
    "vllm": {"object": "error", "message": CONTEXT, "code": 400},
    "google": [{"error": {"code": 400, "message": CONTEXT, "status": "INVALID"}}],
    "fastapi": {"detail": CONTEXT},
    "fastapi, a list": {"detail": [{"loc": ["body"], "msg": CONTEXT, "type": "t"}]},
    "error is a string": {"error": CONTEXT},
    "errors": {"errors": [{"message": CONTEXT}]},
    "errors are strings": {"success": False, "errors": [CONTEXT]},
    "message": {"message": CONTEXT},
    "a string": CONTEXT,
    "text": CONTEXT.encode(),
    "html": f"<html><h1>400</h1><p>{CONTEXT}</p></html>".encode(),
    "one inside the other": {"error": {"error": {"message": CONTEXT}}},
    "byte order mark": b"\xef\xbb\xbf" + json.dumps({"error": CONTEXT}).encode(),
}


@WAY
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", REASONS)
async def test_a_refusal_is_told_in_the_upstreams_words(relay, upstream, way, name, zipped):
    said = REASONS[name]
    body = said if isinstance(said, bytes) else json.dumps(said).encode()
    kind = {"html": "text/html", "text": "text/plain"}.get(name, "application/json")
    head = ["Content-Encoding: gzip"] if zipped else []
    body = gzip.compress(body) if zipped else body
    prompt = upstream.script(plain(400, body, *head, content_type=kind))
    response = await refusal(relay, way, prompt)
    assert response.status == 400
    assert CONTEXT in response.error["message"]
    assert not set("<{") & set(response.error["message"])
    assert response.json["type"] == "error"


ELSEWHERE = {
    "another name": {"Message": CONTEXT},
    "by field": {"errors": {"messages": [CONTEXT]}},
    "in two languages": {"error": {"message": {"en": CONTEXT}, "code": 400}},
}


@pytest.mark.parametrize("name", ELSEWHERE)
@WAY
async def test_words_in_a_place_that_nobody_knows_are_told_with_it(relay, upstream, way, name):
    prompt = upstream.script(plain(400, ELSEWHERE[name] | {"key": SECRET}))
    response = await refusal(relay, way, prompt)
    assert response.status == 400
    assert CONTEXT in response.error["message"]
    assert SECRET not in response.body.decode()


@WAY
async def test_a_long_reason_is_cut(relay, upstream, way):
    prompt = upstream.script(plain(500, b"word " * 10_000, content_type="text/plain"))
    message = (await refusal(relay, way, prompt)).error["message"]
    assert "word word" in message
    assert message.count("word") <= 100


NO_ANSWERS = {name: said for name, said in REASONS.items() if name not in ("text", "html")}
NO_ANSWERS |= {"nothing": {}, "an empty list": []}


@STREAMED
@pytest.mark.parametrize("name", NO_ANSWERS)
async def test_json_without_an_answer_is_no_success(relay, upstream, path, name):
    """A 200 all the same."""
    prompt = upstream.script(plain(200, NO_ANSWERS[name]))
    response = await fetch("POST", relay.http + path, None, ask(prompt))
    assert response.status >= 400 or b"event: error" in response.body
    assert b"[DONE]" not in response.body
    if name in REASONS:
        assert CONTEXT in response.body.decode()


async def test_json_with_an_error_is_no_whole_answer(relay, upstream):
    prompt = upstream.script(plain(200, {"error": {"message": "Quota used up"}}))
    response = await fetch("POST", relay.http + OPENAI, None, asking(prompt))
    assert response.status >= 400
    assert "Quota used up" in response.error["message"]


SSE_ERROR = b'{"error":{"message":"Quota used up"}}'


@STREAMED
async def test_a_bare_error_for_a_stream_is_told(relay, upstream, path):
    """The head says event stream, and the body is one line of JSON."""
    prompt = upstream.script(*sse(SSE_ERROR))
    response = await fetch("POST", relay.http + path, None, ask(prompt))
    assert response.status >= 400 or b"event: error" in response.body
    assert b"Quota used up" in response.body


# ------------------------------------------------------------------ the server's key


@WAY
@pytest.mark.parametrize("status", [401, 403])
async def test_when_the_servers_key_is_refused_it_is_not_the_client(relay, upstream, way, status):
    words = "Incorrect API key: sk-...q7xw, organization org-42"
    prompt = upstream.script(plain(status, {"error": {"message": words, "code": "x"}}))
    response = await refusal(relay, way, prompt)
    assert response.status == 502
    assert response.error["code"] == "server_key_refused"
    text = response.body.decode()
    assert "q7xw" not in text
    assert "org-42" not in text


@WAY
@pytest.mark.parametrize("status", [401, 403])
async def test_when_the_clients_key_is_refused_it_is_told(open_relay, upstream, way, status):
    prompt = upstream.script(plain(status, {"error": {"message": "Key is no good."}}))
    path, body = question(way, prompt)
    head = {"Authorization": "Bearer sk-mine-0123456789"}
    response = await fetch("POST", open_relay.http + path, head, body)
    assert response.status == status
    assert "Key is no good." in response.error["message"]


@pytest.fixture(scope="module")
def open_relay(shared, upstream):
    """A relay without a key: the client brings its own."""
    return shared("--upstream", upstream.url, "--model", "scripted")


# --------------------------------------------------------------------------- silence


@pytest.fixture(scope="module")
def impatient(shared, upstream):
    """A relay that gives an upstream up after a second and a half without a byte."""
    flags = ("--upstream", upstream.url, "--model", "scripted", "--patience", "1.5")
    return shared(*flags)


async def all_at_once(function, cases):
    """So that their silences pass together."""
    async with trio.open_nursery() as nursery:
        for case in cases:
            nursery.start_soon(function, *case)


def every(pause, step, times):
    return [one for _ in range(times) for one in (pause, step)]


async def test_any_byte_of_a_stream_is_life(impatient, upstream):
    async def look(path, byte):
        prompt = upstream.script(*sse(*every(0.3, byte, 8), HELLO, STOP, DONE))
        assert_whole(await events_of(impatient, path, prompt))

    signs = (b": keep-alive\n\n", b"\n", b":\n")
    await all_at_once(look, [(path, byte) for path in (CHAT, OPENAI) for byte in signs])


async def test_any_byte_of_a_whole_answer_is_life(impatient, upstream):
    body = json.dumps(chat_whole()).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % (len(body) + 8)
    prompt = upstream.script(head, *every(0.3, b"\n", 8), body)
    response = await fetch("POST", impatient.http + OPENAI, None, asking(prompt))
    assert response.json["choices"] == chat_whole()["choices"]


async def test_silence_ends_when_patience_does(impatient, upstream):
    async def look(path, *steps):
        prompt = upstream.script(*steps)
        response = await fetch("POST", impatient.http + path, None, ask(prompt))
        assert response.status == 504 or b"event: error" in response.body
        assert b"[DONE]" not in response.body
        assert len(upstream.asked(prompt)) == 1

    silent = [[HOLD], list(sse(HOLD)), list(sse(HELLO, HOLD))]
    cases = [(path, *steps) for path in (CHAT, OPENAI) for steps in silent]
    await all_at_once(look, cases)


async def test_silence_before_a_whole_answer_is_a_504(impatient, upstream):
    prompt = upstream.script(HOLD)
    response = await fetch("POST", impatient.http + OPENAI, None, asking(prompt))
    assert response.status == 504
    assert len(upstream.asked(prompt)) == 1


class Late(Background):
    """It is busy with something else, and reads a question two seconds late."""

    async def handle(self, transport):
        await trio.sleep(2)
        connection = Connection(transport)
        head = (await connection.up_to(b"\r\n\r\n")).lower()
        await connection.exactly(int(head.partition(b"content-length: ")[2].split()[0]))
        await transport.send_all(b"".join(answer("Hello")))


@STREAMED
async def test_a_long_question_may_be_read_late(serve, path):
    with Late() as late:
        url = f"http://127.0.0.1:{late.port}/v1"
        server = serve("--upstream", url, "--model", "m", program=program(STUCK_TIMEOUT=1))
        assert_whole(await events_of(server, path, "A" * (8 << 20)))


# ----------------------------------------------------------------------------- sizes

MIB = 1 << 20


@WAY
async def test_a_question_with_an_image_arrives_whole(relay, upstream, way):
    image = {"url": "data:image/png;base64," + "A" * (3 * MIB // 2)}
    prompt = upstream.script(*(answer("Hello") if WAYS[way][1] else [plain(200, chat_whole())]))
    path, body = question(way, prompt)
    seen = [{"type": "image_url", "image_url": image}, {"type": "text", "text": "?"}]
    body["messages"].insert(0, {"role": "user", "content": seen})
    response = await fetch("POST", relay.http + path, None, body)
    assert response.status == 200
    assert upstream.asked(prompt)[0].json["messages"] == body["messages"]


@WAY
async def test_a_question_over_16_mib_is_refused(relay, way):
    path, body = question(way, "A" * (16 * MIB))
    response = await fetch("POST", relay.http + path, None, body)
    assert response.status == 413


@STREAMED
async def test_an_image_as_an_answer_passes(relay, upstream, path):
    long = "A" * (8 * MIB // 5)
    prompt = upstream.script(*sse(delta(long), STOP, DONE))
    assert_whole(await events_of(relay, path, prompt), long)


async def test_a_whole_answer_may_be_as_long(relay, upstream):
    whole = chat_whole(["A" * (8 * MIB // 5)])
    prompt = upstream.script(plain(200, whole))
    response = await fetch("POST", relay.http + OPENAI, None, asking(prompt))
    assert response.json["choices"] == whole["choices"]


@WAY
async def test_over_16_mib_at_once_is_a_clear_error(relay, upstream, way):
    long = "A" * (17 * MIB)
    steps = sse(HELLO, delta(long)) if WAYS[way][1] else [plain(200, chat_whole([long]))]
    path, body = question(way, upstream.script(*steps))
    response = await fetch("POST", relay.http + path, None, body)
    assert response.status == 502 or b"event: error" in response.body
    assert len(response.body) < MIB
    assert b"16 MiB" in response.body or b"16777216" in response.body


# ---------------------------------------------------------------- heads and encodings


def headed(*lines, status=200):
    return "\r\n".join([f"HTTP/1.1 {status} OK", *lines, ""]).encode()


HEADS = {
    "text/plain": headed("Content-Type: text/plain"),
    "octets": headed("Content-Type: application/octet-stream"),
    "no type": headed(),
    "json": headed("Content-Type: application/json"),
    "an empty type": headed("Content-Type: "),
    "201": headed("Content-Type: text/event-stream", status=201),
    "202": headed("Content-Type: text/event-stream; charset=utf-8", status=202),
    "capitals": headed("CONTENT-TYPE: Text/Event-Stream"),
    "coded by nothing": headed("Content-Type: text/event-stream", "Content-Encoding: none"),
    "coded by a charset": headed("Content-Type: text/event-stream", "Content-Encoding: UTF-8"),
}


@STREAMED
@pytest.mark.parametrize("name", HEADS)
async def test_a_stream_is_known_by_what_it_says(relay, upstream, path, name):
    for begin in (b"", b"\xef\xbb\xbf", b": comment\n\n", b"\n\n"):
        script = sse(begin + data(HELLO), STOP, DONE, head=HEADS[name])
        assert_whole(await events_of(relay, path, upstream.script(*script)))


@STREAMED
async def test_html_is_no_stream(relay, upstream, path):
    html = b"<!doctype html><title>Log in</title><p>Please log in.</p>"
    prompt = upstream.script(plain(200, html, content_type="text/html"))
    response = await fetch("POST", relay.http + path, None, ask(prompt))
    assert response.status == 502
    assert "<" not in response.error["message"]


async def test_a_whole_answer_may_have_any_success_and_type(relay, upstream):
    for status in (200, 201, 202):
        for kind in ("text/plain", "application/json; charset=utf-8", "a/b+json"):
            prompt = upstream.script(plain(status, chat_whole(), content_type=kind))
            body = asking(prompt)
            response = await fetch("POST", relay.http + OPENAI, None, body)
            assert response.status in (200, status)
            assert response.json["choices"] == chat_whole()["choices"]


@STREAMED
async def test_gzip_that_nobody_asked_for_is_read_token_by_token(relay, upstream, path):
    gate, packer = Gate(), zlib.compressobj(wbits=31)

    def packed(payload):
        piece = payload if isinstance(payload, bytes) else data(payload)
        return packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH)

    head = SSE_HEAD + b"Content-Encoding: gzip\r\n"
    steps = [packed(HELLO), gate, packed(STOP), packed(DONE) + packer.flush()]
    prompt = upstream.script(*sse(*steps, head=head))
    async with stream("POST", relay.http + path, None, ask(prompt)) as response:
        first = await response.event()
        gate.open()
        assert_whole([first, *await response.events()])
    assert "gzip" not in response.headers.get("content-encoding", "")


async def test_a_whole_answer_in_gzip_is_read(relay, upstream):
    body = gzip.compress(json.dumps(chat_whole()).encode())
    prompt = upstream.script(plain(200, body, "Content-Encoding: gzip"))
    response = await fetch("POST", relay.http + OPENAI, None, asking(prompt))
    assert response.json["choices"] == chat_whole()["choices"]


@STREAMED
@pytest.mark.parametrize("packed", [b"this is not gzip at all", gzip.compress(SAID)[:-20]])
async def test_gzip_that_is_broken_is_an_error(relay, upstream, path, packed):
    head = SSE_HEAD + b"Content-Encoding: gzip\r\n"
    prompt = upstream.script(*sse(packed, head=head))
    response = await fetch("POST", relay.http + path, None, ask(prompt))
    assert response.status == 502 or b"event: error" in response.body
    assert b"[DONE]" not in response.body


@STREAMED
async def test_gzip_in_several_members_is_read_to_its_end(relay, upstream, path):
    head = SSE_HEAD + b"Content-Encoding: gzip\r\n"
    packed = [gzip.compress(data(HELLO)), gzip.compress(data(STOP) + DONE)]
    for steps in (packed, [b"".join(packed)]):
        prompt = upstream.script(*sse(*steps, head=head))
        assert_whole(await events_of(relay, path, prompt))


async def test_gzip_that_becomes_an_answer_at_once_holds_up_nobody(relay, upstream):
    """20 KB of it are 20,000 tokens. (A busy machine may hold somebody up, too.)"""
    said = data(delta("word ")) * 20_000 + data(STOP) + DONE
    zipped = plain(200, gzip.compress(said), "Content-Encoding: gzip")
    for _ in range(4):
        waits, began = [], trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_again_and_again, relay, waits)
            response = await fetch("POST", relay.http + OPENAI, None, ask(upstream.script(zipped)))
            nursery.cancel_scope.cancel()
        assert response.body.count(b"data: ") == 20_002
        if max(waits) < (trio.current_time() - began) / 4:
            return
    raise AssertionError(waits)


async def ask_again_and_again(server, waits):
    async with connect(server.http) as connection:
        while True:
            began = trio.current_time()
            await (await connection.request("GET", "/healthz")).read()
            waits.append(trio.current_time() - began)


@pytest.mark.parametrize("size", [1, 32 * 1024, 32 * 1024 + 1, 100_000])
async def test_gzip_loses_no_byte(relay, upstream, size):
    """Whatever the size, and also where most of it is the same again."""
    whole = chat_whole(["a" * (size - len(json.dumps(chat_whole([""]))))])
    for body in (json.dumps(whole).encode(), json.dumps(whole).encode() + b" " * size):
        prompt = upstream.script(plain(200, gzip.compress(body), "Content-Encoding: gzip"))
        response = await fetch("POST", relay.http + OPENAI, None, asking(prompt))
        assert response.json == whole


@WAY
async def test_a_refusal_in_an_unknown_encoding_is_a_refusal(relay, upstream, way):
    for status in (400, 429):
        step = plain(status, b"zzz", "Content-Encoding: br", "Retry-After: 7")
        response = await refusal(relay, way, upstream.script(step))
        assert response.status == status
        assert response.headers["retry-after"] == "7"
        assert "zzz" not in response.error["message"]


@WAY
async def test_a_success_without_a_body_is_an_error(relay, upstream, way):
    for head in (b"204 No Content\r\n", b"200 OK\r\nContent-Length: 0\r\n"):
        prompt = upstream.script(b"HTTP/1.1 " + head + b"\r\n")
        response = await refusal(relay, way, prompt)
        assert response.status == 502 or b"event: error" in response.body


async def test_a_small_gzip_that_becomes_huge_is_an_error(relay, upstream):
    bomb = gzip.compress(b" " * (64 * MIB))
    prompt = upstream.script(plain(200, bomb, "Content-Encoding: gzip"))
    response = await fetch("POST", relay.http + OPENAI, None, asking(prompt))
    assert response.status == 502


@STREAMED
async def test_a_whole_completion_becomes_a_stream(relay, upstream, path):
    prompt = upstream.script(plain(200, chat_whole()))
    events = await events_of(relay, path, prompt)
    assert_whole(events, "".join(c["message"]["content"] for c in chat_whole()["choices"]))
    if path == OPENAI:
        chunks = [event.json for event in events[:-1]]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        (reason,) = [
            choice["finish_reason"]
            for chunk in chunks
            for choice in chunk["choices"]
            if choice.get("finish_reason")
        ]
        assert reason == "stop"


async def test_a_whole_completion_keeps_its_tool_calls(relay, upstream):
    whole = chat_whole([])
    function = {"name": "f", "arguments": "{}"}
    call = {"id": "call_1", "type": "function", "function": function}
    whole["choices"][0]["finish_reason"] = "tool_calls"
    whole["choices"][0]["message"] = {"role": "assistant", "tool_calls": [call]}
    need_module("openai", "pip install openai")
    prompt = upstream.script(plain(200, whole))
    talk = asking(prompt)["messages"]

    def read():
        with openai_client(relay.http) as client:
            create = client.chat.completions.create
            return list(create(model="scripted", messages=talk, stream=True))

    chunks = await trio.to_thread.run_sync(read)
    calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    assert [(c.index, c.function.name) for c in calls] == [(0, "f")]


async def test_a_stream_for_a_whole_question_is_an_error_that_says_so(relay, upstream):
    prompt = upstream.script(*answer("Hello"))
    response = await fetch("POST", relay.http + OPENAI, None, asking(prompt))
    assert response.status == 502
    assert "stream" in response.error["message"]


# -------------------------------------------------------------------- the environment


@pytest.mark.parametrize("name", ["all_proxy", "ALL_PROXY"])
async def test_a_socks_proxy_does_no_harm(serve, upstream, name):
    env = {name: "socks5://127.0.0.1:9", "OPENAI_BASE_URL": upstream.url}
    server = serve("--model", "scripted", env=env)
    for path in (CHAT, OPENAI):
        assert_whole(await events_of(server, path, upstream.script(*answer("Hello"))))


async def test_certificates_do_not_matter_to_plain_http(serve, upstream):
    env = {"SSL_CERT_FILE": "/nonexistent", "SSL_CERT_DIR": "/nonexistent"}
    server = serve("--model", "m", env=env | {"OPENAI_BASE_URL": upstream.url})
    prompt = upstream.script(*answer("Hello"))
    assert_whole(await events_of(server, CHAT, prompt))


@pytest.mark.parametrize("odd", ["{}\r", " {} ", "{}\r\n", "\t{}/\n"])
async def test_white_space_around_a_setting_is_not_meant(serve, upstream, odd):
    env = {
        "OPENAI_BASE_URL": odd.format(upstream.url),
        "OPENAI_API_KEY": odd.replace("/", "").format("sk-0123456789"),
        "OPENAI_MODEL": odd.replace("/", "").format("scripted"),
    }
    server = serve(env=env)
    prompt = upstream.script(*answer("Hello"))
    assert_whole(await events_of(server, CHAT, prompt))
    (heard,) = upstream.asked(prompt)
    assert heard.target == "/v1/chat/completions"
    assert heard.headers["authorization"] == "Bearer sk-0123456789"
    assert heard.json["model"] == "scripted"


UNUSABLE = {
    "no scheme": {"OPENAI_BASE_URL": "localhost:11434/v1"},
    "another scheme": {"OPENAI_BASE_URL": "ftp://localhost/v1"},
    "no host": {"OPENAI_BASE_URL": "http:///v1"},
    "a port that is none": {"OPENAI_BASE_URL": "http://localhost:port/v1"},
    "an end of line inside": {"OPENAI_BASE_URL": "http://localhost/v1\r\nX: y"},
    "a URL not in ASCII": {"OPENAI_BASE_URL": "http://localhost/\u4f60"},
    "a key with an end of line inside": {"OPENAI_API_KEY": "sk-0123\r\n456789"},
    "a key not in ASCII": {"OPENAI_API_KEY": "sk-0123456\u4f60789"},
    "a proxy that is none": {"HTTP_PROXY": "socks5://127.0.0.1:9"},
    "a proxy with a blank inside": {"HTTP_PROXY": "http://127.0.0.1 :9"},
    "a proxy not in ASCII": {"HTTP_PROXY": "http://\u4f60..:9"},
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_setting_that_cannot_be_used_is_one_line_at_start(name):
    env = {"OPENAI_BASE_URL": f"http://models.example:{free_port()}/v1"}
    done = run_to_exit("--port", "0", "--room-port", "0", env=env | UNUSABLE[name])
    assert done.returncode == 2, done
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert "sk-0123" not in done.stderr
    assert "789" not in done.stderr


# --------------------------------------------------------------------- Azure's address


@pytest.fixture(scope="module")
def azure(shared, upstream):
    """A deployment, whose version is in the query of each request."""
    base = f"http://127.0.0.1:{upstream.port}/openai/deployments/gpt"
    env = {"OPENAI_API_KEY": "azure-0123456789"}
    url = base + "?api-version=2025-01-01-preview"
    return shared("--upstream", url, "--model", "scripted", env=env)


@WAY
async def test_a_query_goes_with_every_request(azure, upstream, way):
    whole = [plain(200, chat_whole())]
    prompt = upstream.script(*(answer("Hello") if WAYS[way][1] else whole))
    path, body = question(way, prompt)
    response = await fetch("POST", azure.http + path, None, body)
    assert response.status == 200
    (heard,) = upstream.asked(prompt)
    assert heard.target == (
        "/openai/deployments/gpt/chat/completions?api-version=2025-01-01-preview"
    )
    assert heard.headers["api-key"] == "azure-0123456789"


# ---------------------------------------------------------------- connections that end


@pytest.fixture(scope="module")
def alone(shared):
    """An upstream that nobody else asks, and a relay to it."""
    with Upstream() as upstream:
        flags = ("--upstream", upstream.url, "--model", "scripted")
        yield upstream, shared(*flags)


async def keep_one(upstream, server, way):
    """Have the relay keep a connection to the upstream, which has just answered."""
    steps = answer("Hello") if WAYS[way][1] else [plain(200, chat_whole())]
    path, body = question(way, upstream.script(*steps))
    assert (await fetch("POST", server.http + path, None, body)).status == 200


@WAY
@pytest.mark.parametrize("end", [FIN, RST])
async def test_the_goodbye_of_a_kept_connection_is_not_the_answer(alone, way, end):
    """It closes at the moment of the second question, which is asked once more."""
    upstream, server = alone
    await keep_one(upstream, server, way)
    steps = list(answer("Hello")) if WAYS[way][1] else [plain(200, chat_whole())]
    prompt = upstream.script(lambda heard: [end] if len(upstream.asked(prompt)) == 1 else steps)
    path, body = question(way, prompt)
    response = await fetch("POST", server.http + path, None, body)
    assert response.status == 200
    assert b"error" not in response.body
    assert len(upstream.asked(prompt)) == 2


@WAY
@pytest.mark.parametrize("end", [FIN, RST])
async def test_a_kept_connection_that_has_ended_is_not_used(alone, way, end):
    upstream, server = alone
    steps = list(answer("Hello")) if WAYS[way][1] else [plain(200, chat_whole())]
    prompts = [upstream.script(*steps, 0.1, end), upstream.script(*steps)]
    for prompt in prompts:
        path, body = question(way, prompt)
        response = await fetch("POST", server.http + path, None, body)
        assert response.status == 200
        assert b"error" not in response.body
        await until(lambda: upstream.asked(prompts[0])[0].closed_at)


@WAY
async def test_an_upstream_that_always_breaks_is_not_asked_for_ever(alone, way):
    upstream, server = alone
    prompt = upstream.script(FIN)
    response = await refusal(server, way, prompt)
    assert response.status == 502
    assert len(upstream.asked(prompt)) <= 2


@WAY
async def test_one_byte_of_an_answer_is_an_answer(alone, way):
    """Then the question is not asked again: it may have been paid for."""
    upstream, server = alone
    await keep_one(upstream, server, way)
    prompt = upstream.script(b"HTTP/1.1 2", FIN)
    response = await refusal(server, way, prompt)
    assert response.status == 502
    assert len(upstream.asked(prompt)) == 1


class Hasty(Background):
    """It has heard enough when it has the head, and hangs up."""

    async def handle(self, transport):
        await Connection(transport).up_to(b"\r\n\r\n")
        error = {"error": {"message": "Too much for me."}}
        await transport.send_all(plain(413, error, "Connection: close"))
        await transport.aclose()


@WAY
async def test_a_refusal_that_comes_before_the_question_has_gone_is_heard(serve, way):
    with Hasty() as hasty:
        url = f"http://127.0.0.1:{hasty.port}/v1"
        server = serve("--upstream", url, "--model", "m")
        response = await refusal(server, way, "A" * (2 * MIB))
    assert response.status in (413, 502)  # the reset may overtake the words
    assert response.error["message"]


BROKEN_OFF = {
    "less than its length": [plain(200, chat_whole())[:-20], FIN],
    "no last chunk": list(sse(b'{"choices": [', FIN, head=headed())),
    "a reset": [plain(200, chat_whole())[:-20], 0.05, RST],
    "nothing but a head": [plain(200, chat_whole()).partition(b"{")[0], FIN],
    "half a JSON": [plain(200, b'{"choices": [{"index": 0, "mess')],
}


@pytest.mark.parametrize("name", BROKEN_OFF)
def test_what_was_begun_is_not_paid_for_twice(relay, upstream, name):
    """An SDK with its retries asks once."""
    openai = need_module("openai", "pip install openai")
    prompt = upstream.script(*BROKEN_OFF[name])
    with openai_client(relay.http, max_retries=2) as client:
        create = client.chat.completions.create
        with pytest.raises(openai.APIStatusError) as raised:
            create(model="scripted", messages=asking(prompt)["messages"])
    assert raised.value.status_code == 502
    assert raised.value.response.headers["x-should-retry"] == "false"
    assert len(upstream.asked(prompt)) == 1


# ------------------------------------------------------------------- headers, both ways

TO = {
    "OpenAI-Organization": "org-1",
    "OpenAI-Project": "proj-1",
    "HTTP-Referer": "https://example.org",
    "X-Title": "A title",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "tracestate": "a=b",
    "anthropic-beta": "c",
    "Idempotency-Key": "once-{}",
}
NOT_TO = {"Cookie": "a=b", "X-Mine": "c", "Forwarded": "for=1.2.3.4", "Accept": "x/y"}
NOT_TO |= {"X-Forwarded-For": "1.2.3.4", "User-Agent": "mine", "Accept-Encoding": "br"}


@WAY
async def test_headers_that_matter_to_the_upstream_reach_it(relay, upstream, way):
    steps = answer("Hello") if WAYS[way][1] else [plain(200, chat_whole())]
    path, body = question(way, upstream.script(*steps))
    head = {name: value.format(way) for name, value in TO.items()}
    response = await fetch("POST", relay.http + path, head | NOT_TO, body)
    assert response.status == 200
    sent = upstream.heard[-1].headers
    assert {name.lower(): value for name, value in head.items()}.items() <= sent.items()
    for name, value in NOT_TO.items():
        assert sent.get(name.lower()) != value


BACK = {
    "x-request-id": "req_1",
    "openai-processing-ms": "12",
    "openai-organization": "org-1",
    "x-ratelimit-remaining-tokens": "99",
}
NOT_BACK = {"Set-Cookie": "a=b", "X-Internal": "c", "Server": "theirs"}
NOT_BACK |= {"openai-model": "caf\u00e9", "x-ratelimit-reset": "1\x7f"}  # what no header may be
BACK_REFUSED = {"retry-after": "7", "retry-after-ms": "7000", "x-should-retry": "false"}


@WAY
async def test_headers_that_matter_to_the_client_reach_it(relay, upstream, way):
    lines = [f"{name}: {value}" for name, value in (BACK | NOT_BACK).items()]
    head = SSE_HEAD + "".join(f"{line}\r\n" for line in lines).encode()
    whole = [plain(200, chat_whole(), *lines)]
    prompt = upstream.script(*(sse(HELLO, DONE, head=head) if WAYS[way][1] else whole))
    path, body = question(way, prompt)
    response = await fetch("POST", relay.http + path, None, body)
    assert response.status == 200
    assert BACK.items() <= response.headers.items()
    for name, value in NOT_BACK.items():
        assert response.headers.get(name.lower()) != value


@WAY
async def test_headers_of_a_refusal_reach_the_client(relay, upstream, way):
    lines = [f"{k}: {v}" for k, v in (BACK | BACK_REFUSED | NOT_BACK).items()]
    error = {"error": {"message": "Slower."}}
    response = await refusal(relay, way, upstream.script(plain(429, error, *lines)))
    assert response.status == 429
    assert (BACK | BACK_REFUSED).items() <= response.headers.items()
    for name, value in NOT_BACK.items():
        assert response.headers.get(name.lower()) != value


# ----------------------------------------------------------- what the chat page is told


@pytest.mark.parametrize("reason", ["length", "content_filter", "tool_calls"])
async def test_the_page_is_told_why_an_answer_ended_early(relay, upstream, reason):
    prompt = upstream.script(*sse(HELLO, delta(finish=reason), DONE))
    events = await events_of(relay, CHAT, prompt)
    assert [event.json for event in events[:-1]] == [
        {"content": "Hello"},
        {"content": "", "finish_reason": reason},
    ]
    assert events[-1].data == "[DONE]"


async def test_the_page_is_told_the_last_words_and_the_reason(relay, upstream):
    """Both stand in one chunk; the text is not lost."""
    prompt = upstream.script(*sse(delta("Hello", finish="length"), DONE))
    events = await events_of(relay, CHAT, prompt)
    assert text_of(events) == "Hello"
    reasons = [event.json.get("finish_reason") for event in events[:-1]]
    assert reasons[-1] == "length"


async def test_the_page_is_not_told_of_a_reason_that_is_none(relay, upstream):
    """Some send an empty one with each chunk."""
    steps = sse(delta("Hel", finish=""), delta("lo", finish=""), STOP, DONE)
    events = await events_of(relay, CHAT, upstream.script(*steps))
    assert [event.data for event in events] == ['{"content":"Hel"}', '{"content":"lo"}', "[DONE]"]


async def test_the_page_is_told_what_the_model_refuses(relay, upstream):
    """OpenAI's models say it in a field of its own, and end with "stop"."""
    refused = delta()
    refused["choices"][0]["delta"] = {"content": None, "refusal": "I cannot help with that."}
    events = await events_of(relay, CHAT, upstream.script(*sse(refused, STOP, DONE)))
    assert_whole(events, "I cannot help with that.")


async def test_the_page_is_not_told_that_all_is_well(relay, upstream):
    events = await events_of(relay, CHAT, upstream.script(*answer("Hello")))
    assert [event.json for event in events[:-1]] == [{"content": "Hello"}]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
async def test_the_page_is_told_what_the_model_thinks(relay, upstream, field):
    thought = delta()
    thought["choices"][0]["delta"] = {field: "Let me see"}
    prompt = upstream.script(*sse(thought, HELLO, STOP, DONE))
    events = await events_of(relay, CHAT, prompt)
    assert [event.json for event in events[:-1]] == [
        {"content": "", "reasoning": "Let me see"},
        {"content": "Hello"},
    ]


DEEP = {
    "an item": '{"type":"response.output_item.done","sequence_number":1,"item":%s}',
    "a response": '{"type":"response.created","response":{"id":"r","metadata":%s}}',
    "the end": '{"type":"response.completed","response":{"id":"r","output":[%s]}}',
}


@pytest.mark.parametrize("name", DEEP)
async def test_what_can_just_be_read_ends_no_more_than_its_own_answer(relay, upstream, name):
    """Python reads JSON of some depth that it cannot write inside something else."""
    created = {"type": "response.created", "response": {"id": "resp_1"}}
    polls = set()
    async with unharmed(relay):
        for depth in range(900, 996):
            deep = DEEP[name] % ('{"a":' * depth + "1" + "}" * depth)
            prompt = upstream.script(*sse(created, f"data: {deep}\n\n".encode(), FIN))
            body = {"input": prompt, "stream": True}
            async with stream("POST", relay.http + RESPONSES, None, body) as response:
                answer_id = response.headers["x-answer-id"]
                types = [event.type for event in await response.events()]
            assert {"error", "response.completed"} & {*types}
            poll = await fetch("GET", f"{relay.http}{RESPONSES}/resp_1.{answer_id}")
            polls.add(poll.status)
    assert polls <= {200, 502}


# ------------------------------------------------------- what the upstream is to judge

TALKS = {
    "role tool": [{"role": "tool", "tool_call_id": "call_1", "content": "21 degrees"}],
    "content null": [{"role": "user", "content": None}],
    "no content": [{"role": "assistant", "tool_calls": []}],
    "strings": [{"role": "user", "content": ["Hello ", "you"]}],
    "role developer": [{"role": "developer", "content": "Be brief."}],
    "more fields": [{"role": "user", "content": "Hi", "name": "Ann", "x": {"y": [1]}}],
}


@WAY
@pytest.mark.parametrize("name", TALKS)
async def test_messages_are_the_upstreams_to_judge(relay, upstream, way, name):
    whole = [plain(200, chat_whole())]
    prompt = upstream.script(*(answer("Hello") if WAYS[way][1] else whole))
    path, body = question(way, prompt)
    body["messages"] = TALKS[name] + body["messages"]
    response = await fetch("POST", relay.http + path, None, body)
    assert response.status == 200
    assert upstream.asked(prompt)[0].json["messages"] == body["messages"]
