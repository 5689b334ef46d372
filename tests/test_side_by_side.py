"""Direct and through chatstream, side by side, with the official OpenAI SDK.

For each odd upstream the SDK gets the same text and the same kind of error, or
chatstream is stricter (or more helpful) on purpose: DIFFERENT says how, and why.
"""

import gzip
import json

import pytest
from kit import (
    DONE,
    FIN,
    ROOT,
    RST,
    SSE_HEAD,
    asking,
    chat_whole,
    data,
    delta,
    need_module,
    openai_client,
    plain,
    sse,
)

HELLO, STOP = delta("Hello"), delta(finish="stop")
SAID = data(HELLO) + data(STOP)
USAGE = delta() | {"choices": [], "usage": {"prompt_tokens": 3, "total_tokens": 9}}
NO = {"error": {"message": "No.", "type": "t", "param": None, "code": "c"}}
THINKING = delta()
THINKING["choices"][0]["delta"] = {"reasoning_content": "Let me see"}
EMPTY = delta() | {"choices": []}
ODD_TEXT = delta("\u00e9 \u2028 \x85 \U0001f642 \u4f60\u597d")


def headed(*lines, status=200):
    return "\r\n".join([f"HTTP/1.1 {status} OK", *lines, ""]).encode()


def no_length(*steps):
    head = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    return [head, *(data(s) if isinstance(s, dict) else s for s in steps)]


def elsewhere(heard):
    if heard.target.endswith("/elsewhere"):
        return [plain(200, chat_whole(["Hello"]))]
    return [plain(307, b"", "Location: /v1/elsewhere")]


STREAMED = {
    "as it should be": sse(HELLO, STOP, DONE),
    "usage last": sse(HELLO, STOP, USAGE, DONE),
    "role first": sse(delta(), HELLO, STOP, DONE),
    "empty choices first": sse(EMPTY, HELLO, STOP, DONE),
    "thinking": sse(THINKING, HELLO, STOP, DONE),
    "odd text": sse(ODD_TEXT, STOP, DONE),
    "comments": sse(b": one\n\n", HELLO, b":two\n", STOP, b":\n\n", DONE),
    "CRLF": sse((SAID + DONE).replace(b"\n", b"\r\n")),
    "CR": sse((SAID + DONE).replace(b"\n", b"\r")),
    "no space after the colon": sse((SAID + DONE).replace(b"data: ", b"data:")),
    "ids and retry": sse(b"retry: 5\n\n", b"id: 7\n" + data(HELLO), STOP, DONE),
    "names": sse(b"event: message\n" + data(HELLO), STOP, DONE),
    "a byte at a time": sse(*(b"%c" % byte for byte in SAID + DONE)),
    "no [DONE]": sse(HELLO, STOP),
    "no [DONE], no length": no_length(HELLO, STOP, FIN),
    "no [DONE], usage last": sse(HELLO, STOP, USAGE),
    "no finish_reason": sse(HELLO, DONE),
    "[DONE] without a blank line": sse(SAID + b"data: [DONE]"),
    "[DONE] and a space": sse(SAID + b"data: [DONE] \n\n"),
    "more after [DONE]": sse(HELLO, STOP, DONE, HELLO),
    "length": sse(HELLO, delta(finish="length"), DONE),
    "text/plain": sse(HELLO, STOP, DONE, head=headed("Content-Type: text/plain")),
    "no type": sse(HELLO, STOP, DONE, head=headed()),
    "201": sse(HELLO, STOP, DONE, head=headed(status=201)),
    "gzip": [plain(200, gzip.compress(SAID + DONE), "Content-Encoding: gzip")],
    "an error": sse(HELLO, NO, DONE),
    "an error first": sse(NO),
    "an error that is null": sse(HELLO | {"error": None}, STOP, DONE),
    "an error as a string": sse(HELLO, {"error": "No."}),
    "event: error": sse(HELLO, b"event: error\n" + data(NO)),
    "broken JSON": sse(HELLO, b'data: {"choices": [\n\n', STOP, DONE),
    "cut": sse(HELLO, FIN),
    "reset": sse(HELLO, 0.05, RST),
    "less than its length": [SSE_HEAD + b"Content-Length: 9999\r\n\r\n", SAID, FIN],
    "broken framing": [*list(sse(HELLO, FIN))[:-1], b"zz\r\n", FIN],
    "400": [plain(400, NO)],
    "401": [plain(401, NO)],
    "403": [plain(403, NO)],
    "404": [plain(404, NO)],
    "422": [plain(422, {"detail": "No."})],
    "429": [plain(429, NO, "Retry-After: 7")],
    "500": [plain(500, b"<h1>No.</h1>", content_type="text/html")],
    "503, no body": [plain(503, b"")],
    "529": [plain(529, NO)],
    "400 in gzip": [plain(400, gzip.compress(json.dumps(NO).encode()), "Content-Encoding: gzip")],
    "goodbye": [FIN],
    "not HTTP": [b"SSH-2.0-OpenSSH_9\r\n", FIN],
    # where chatstream differs
    "no finish_reason, no [DONE]": sse(HELLO),
    "no finish_reason, no [DONE], no length": no_length(HELLO, FIN),
    "[DONE] alone": sse(DONE),
    "object: error": sse(HELLO, {"object": "error", "message": "No."}, DONE),
    "event: error, flat": sse(HELLO, b"event: error\n" + data(NO["error"]), DONE),
    "an HTML page": [plain(200, b"<h1>Log in</h1>", content_type="text/html")],
    "an empty body": [plain(200, b"", content_type="text/event-stream")],
    "JSON with an error": [plain(200, NO)],
    "a whole completion": [plain(200, chat_whole(["Hello"]))],
    "cut after [DONE]": sse(HELLO, STOP, DONE, FIN),
}

WHOLE = {
    "as it should be": [plain(200, chat_whole(["Hello"]))],
    "text/plain": [plain(200, chat_whole(["Hello"]), content_type="text/plain")],
    "more JSON": [plain(200, chat_whole(["Hello"]), content_type="a/b+json")],
    "201": [plain(201, chat_whole(["Hello"]))],
    "blank lines first": [plain(200, b"\n\n" + json.dumps(chat_whole()).encode())],
    "gzip": [
        plain(
            200, gzip.compress(json.dumps(chat_whole(["Hello"])).encode()), "Content-Encoding: gzip"
        )
    ],
    "in chunks": sse(
        json.dumps(chat_whole(["Hello"])).encode(), head=headed("Content-Type: application/json")
    ),
    "no choices": [plain(200, chat_whole() | {"choices": []})],
    "cut": [plain(200, chat_whole())[:-20], FIN],
    "reset": [plain(200, chat_whole())[:-20], 0.05, RST],
    "half a JSON": [plain(200, b'{"choices": [{"index": 0, "mess')],
    "400": [plain(400, NO)],
    "401": [plain(401, NO)],
    "429": [plain(429, NO)],
    "500": [plain(500, NO)],
    "goodbye": [FIN],
    # where chatstream differs
    "JSON with an error": [plain(200, NO)],
    "an HTML page": [plain(200, b"<h1>Log in</h1>", content_type="text/html")],
    "an event stream": sse(HELLO, STOP, DONE),
    "a redirect": [lambda heard: elsewhere(heard)],
}
UPSTREAMS = {(name, True): list(steps) for name, steps in STREAMED.items()}
UPSTREAMS |= {(name, False): list(steps) for name, steps in WHOLE.items()}

# What differs on purpose, and the line of the README that says so: (the names above,
# what the SDK gets direct, what it gets through chatstream).
FAILED = "failed"
DIFFERENT = {
    "A stream that ends with neither a `finish_reason` nor `[DONE]` is an error; "
    "an SDK would take it for a whole answer.": (
        [("no finish_reason, no [DONE]", True), ("no finish_reason, no [DONE], no length", True)],
        ("Hello", None),
        ("Hello", FAILED),
    ),
    "An end before the first event is an error.": (
        [("[DONE] alone", True), ("an empty body", True)],
        ("", None),
        ("", FAILED),
    ),
    'An error counts in any form: `event: error`, `"object": "error"`.': (
        [("object: error", True), ("event: error, flat", True)],
        ("Hello", None),
        ("Hello", FAILED),
    ),
    "An error with status 200 is an error.": (
        [("JSON with an error", True), ("JSON with an error", False)],
        ("", None),
        ("", FAILED),
    ),
    "An HTML page is an error: it is mostly the login page of something in between.": (
        [("an HTML page", True)],
        ("", None),
        ("", FAILED),
    ),
    "An HTML page or an event stream in answer to a question that was not streamed is "
    "an error; an SDK hands its text over as if it were the answer.": (
        [("an HTML page", False), ("an event stream", False)],
        ("not an answer", None),
        ("", FAILED),
    ),
    "A redirect is not followed: the key would go to another place.": (
        [("a redirect", False)],
        ("Hello", None),
        ("", FAILED),
    ),
    "A whole completion in answer to a streamed question is sent as a stream.": (
        [("a whole completion", True)],
        ("", None),
        ("Hello", None),
    ),
    "An event without data is left out; it makes the SDK for Python raise.": (
        [("ids and retry", True)],
        ("", FAILED),
        ("Hello", None),
    ),
}
SAME = [case for case in UPSTREAMS if all(case not in row[0] for row in DIFFERENT.values())]


@pytest.fixture(scope="module")
def openai():
    return need_module("openai", "pip install openai")


@pytest.fixture(scope="module")
def both(openai, shared, upstream):
    """The SDK with the upstream's address, and with ours."""
    relay = shared("--upstream", upstream.url, "--model", "scripted")
    direct = upstream.url.removesuffix("/v1")
    with openai_client(direct) as one, openai_client(relay.http) as other:
        yield one, other


def outcome(openai, client, prompt, streamed):
    """(text, kind of error), as a program that uses the SDK sees it.

    A bad gateway is to a client of ours what a broken connection is to one of the
    upstream: both failed.
    """
    text = []
    talk = asking(prompt)["messages"]
    try:
        create = client.chat.completions.create
        got = create(model="scripted", messages=talk, stream=streamed)
        if isinstance(got, str):
            return "not an answer", None
        for chunk in got if streamed else [got]:
            text += [words_of(choice) for choice in chunk.choices or []]
    except openai.APIStatusError as error:
        bad = error.status_code in (502, 504)
        return "".join(text), FAILED if bad else type(error).__name__
    except (openai.APIError, json.JSONDecodeError):
        return "".join(text), FAILED
    return "".join(text), None


def words_of(choice):
    said = choice.delta if hasattr(choice, "delta") else choice.message
    return said.content or ""


def side_by_side(openai, both, upstream, case):
    name, streamed = case
    prompts = [upstream.script(*UPSTREAMS[name, streamed]) for _ in both]
    asked = zip(both, prompts, strict=True)
    return [outcome(openai, client, prompt, streamed) for client, prompt in asked]


@pytest.mark.parametrize("case", SAME, ids=str)
def test_the_sdk_gets_the_same_either_way(openai, both, upstream, case):
    direct, through = side_by_side(openai, both, upstream, case)
    assert through == direct


@pytest.mark.parametrize("line", DIFFERENT)
def test_what_differs_does_so_on_purpose(openai, both, upstream, line):
    cases, direct, through = DIFFERENT[line]
    for case in cases:
        assert side_by_side(openai, both, upstream, case) == [direct, through], case


def test_the_readme_says_what_differs():
    readme = " ".join((ROOT / "README.md").read_text().split())
    for line in DIFFERENT:
        assert f"* {line}" in readme


def test_the_reason_of_a_refusal_is_the_same(openai, both, upstream):
    for status in (400, 401, 403, 404, 422, 429, 500, 529):
        said = []
        for client in both:
            talk = asking(upstream.script(plain(status, NO)))["messages"]
            with pytest.raises(openai.APIStatusError) as raised:
                client.chat.completions.create(model="scripted", messages=talk)
            said.append((raised.value.message, raised.value.code, raised.value.param))
        assert said[0] == said[1]
