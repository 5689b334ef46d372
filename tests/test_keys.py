"""Keys and tokens: who gets them, and that nobody else ever sees one.

The key below looks different in each form: raw, quoted, escaped, as a repr. All of them
begin alike, so that one look finds any. (No id has a q in it.)
"""

import gzip
import hashlib
import html
import json
from urllib.parse import quote, quote_plus

import pytest
from kit import (
    CHAT,
    FIN,
    MESSAGES,
    OPENAI,
    PROTOCOLS,
    RESPONSES,
    Upstream,
    answer,
    ask,
    asking,
    chat_whole,
    delta,
    fetch,
    fetch_events,
    free_port,
    measured,
    plain,
    run_to_exit,
    sse,
    text_of,
)

KEY = "sk-q7xw/9c+55\"e1\\b'd&%41=zz"
MARK = "q7xw"
TOKEN = "token-9b02/of+our=own"
FORMS = {
    "raw": KEY,
    "quoted": quote(KEY, safe=""),
    "quoted but for slashes": quote(KEY),
    "quoted for a form": quote_plus(KEY),
    "escaped": json.dumps(KEY)[1:-1],
    "repr": repr(KEY),
    "repr of bytes": repr(KEY.encode()),
    "html": html.escape(KEY),
}
PATHS = [CHAT, OPENAI, RESPONSES, MESSAGES]


def body_for(path, prompt, streamed):
    by_path = {protocol.path: protocol.ask for protocol in PROTOCOLS.values()}
    return by_path.get(path, asking)(prompt) | {"stream": streamed}


@pytest.fixture(scope="module")
def keyed(shared, upstream):
    """A relay with this key that logs all it can."""
    env = {"OPENAI_BASE_URL": upstream.url, "OPENAI_API_KEY": KEY}
    return shared("--log-level", "debug", "--model", "scripted", env=env)


@pytest.fixture(scope="module")
def keyless(shared, upstream):
    """A relay whose clients bring their own."""
    flags = ("--log-level", "debug", "--model", "scripted")
    return shared(*flags, "--upstream", upstream.url)


@pytest.fixture(scope="module")
def guarded(shared, upstream):
    """A relay that asks for a token and has no key."""
    flags = ("--log-level", "debug", "--model", "scripted")
    env = {"CHATSTREAM_TOKEN": TOKEN, "OPENAI_BASE_URL": upstream.url}
    return shared(*flags, env=env)


# --------------------------------------------------------------------- it is not told


def words(form):
    return f"Not with {form} as a key."


def fails_with_json(form):
    error = {"message": words(form), "type": form, "param": form, "code": form}
    return [plain(400, {"error": error})]


def fails_with_an_escaped_key(form):
    """Each character of it as JSON may have it, too."""
    escaped = "".join(f"\\u{ord(character):04x}" for character in words(form))
    return [plain(400, b'{"error": {"message": "%b"}}' % escaped.encode())]


def fails_with_detail(form):
    return [plain(422, {"detail": [{form: words(form), "msg": words(form)}]})]


def fails_with_text(form):
    return [plain(500, words(form).encode(), content_type="text/plain")]


def fails_with_html(form):
    page = f"<h1>{words(form)}</h1><a href='/{form}'>?</a>".encode()
    return [plain(502, page, content_type="text/html")]


def fails_with_gzip(form):
    body = gzip.compress(json.dumps({"error": words(form)}).encode())
    return [plain(400, body, "Content-Encoding: gzip")]


def fails_with_headers(form):
    names = ("x-request-id", "openai-organization", "x-ratelimit-limit", "retry-after")
    return [plain(429, {}, *(f"{name}: {form}" for name in names))]


def fails_with_a_redirect(form):
    return [plain(302, b"", f"Location: http://127.0.0.1:9/{form}")]


def fails_with_a_content_type(form):
    return [plain(200, b"<p>", content_type=f"text/html; key={form}")]


def fails_with_a_status_line(form):
    return [f"HTTP/1.1 {form}\r\n\r\n".encode(), FIN]


def fails_with_rubbish(form):
    return [f"rubbish {form}\r\n\r\n".encode(), FIN]


def fails_with_a_chunk_size(form):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    return [head + b"Transfer-Encoding: chunked\r\n\r\n", form.encode() + b"\r\n", FIN]


def fails_with_an_encoding(form):
    return [plain(200, b"zzz", f"Content-Encoding: {form}")]


def fails_with_json_for_a_stream(form):
    return [plain(200, {"error": {"message": words(form)}})]


def fails_with_a_failed_response(form):
    error = {"code": form, "message": words(form)}
    response = {"id": "resp_1", "object": "response", "status": "failed", "output": []}
    return [plain(200, response | {"error": error})]


def fails_in_mid_stream(form):
    return [*sse(delta("Hello"), {"error": {"message": words(form), "code": form}})]


def fails_in_an_event_of_its_own(form):
    return [*sse(delta("Hello"), f"event: error\ndata: {words(form)}\n\n".encode())]


WAYS = {
    name.removeprefix("fails_").replace("_", " "): way
    for name, way in list(globals().items())
    if name.startswith("fails_")
}


@pytest.mark.parametrize("way", WAYS)
async def test_the_key_is_not_told_however_the_upstream_fails(keyed, upstream, way):
    in_head = way.split()[-1] in ("headers", "redirect", "type", "line", "encoding")
    for form in [FORMS["raw"], FORMS["quoted"]] if in_head else FORMS.values():
        for path in PATHS:
            for streamed in (True, False):
                prompt = upstream.script(*WAYS[way](form))
                body = body_for(path, prompt, streamed)
                response = await fetch("POST", keyed.http + path, None, body)
                said = response.body.decode() + str(response.headers)
                if streamed or path == CHAT or "stream" not in way:
                    assert response.status != 200 or "error" in said
                assert MARK not in said, (form, path, streamed)
    assert MARK not in keyed.log()
    for page in ("/", "/healthz", "/metrics", "/v1/models", "/nothing"):
        response = await fetch("GET", keyed.http + page)
        assert MARK not in response.body.decode() + str(response.headers)


async def test_words_around_the_key_are_told(keyed, upstream):
    """What hides the key hides nothing else."""
    prompt = upstream.script(plain(400, {"error": {"message": words(KEY)}}))
    response = await fetch("POST", keyed.http + OPENAI, None, ask(prompt))
    assert response.error["message"].startswith("Not with ")
    assert response.error["message"].endswith(" as a key.")


HIDDEN = {
    "among tags": (
        f"<p>{'</b>'.join(KEY[n : n + 3] for n in range(0, len(KEY), 3))}</p>",
        "text/html",
    ),
    "where the text is cut": ("x" * 490 + KEY, "text/plain"),
    "where the text is cut, later": ("x" * 495 + KEY, "text/plain"),
    "behind backslashes": ("\\" * 50_000 + KEY, "text/plain"),  # in linear time
    "many times": ((KEY + " ") * 200, "text/plain"),
}


@pytest.mark.parametrize("name", HIDDEN)
async def test_no_piece_of_the_key_is_told(keyed, upstream, name):
    """Tags go first, then the key, and only then the length."""
    text, kind = HIDDEN[name]
    prompt = upstream.script(plain(500, text.encode(), content_type=kind))
    response = await fetch("POST", keyed.http + OPENAI, None, ask(prompt))
    assert response.error["message"]
    assert "sk-q" not in response.error["message"]
    assert MARK not in response.body.decode()


async def test_what_a_model_says_is_not_touched(keyed, upstream):
    for path in (CHAT, OPENAI):
        prompt = upstream.script(*answer("Say ", KEY))
        events = await fetch_events("POST", keyed.http + path, None, ask(prompt))
        assert text_of(events) == f"Say {KEY}"
    prompt = upstream.script(plain(200, chat_whole([KEY])))
    response = await fetch("POST", keyed.http + OPENAI, None, asking(prompt))
    assert response.json["choices"] == chat_whole([KEY])["choices"]


async def test_a_short_key_hides_no_ordinary_word(serve, upstream):
    env = {"OPENAI_API_KEY": "none", "OPENAI_BASE_URL": upstream.url}
    server = serve("--model", "scripted", env=env)
    said = {"error": {"message": "None of them is one, and none is nonesuch."}}
    prompt = upstream.script(plain(400, said))
    response = await fetch("POST", server.http + OPENAI, None, ask(prompt))
    assert response.error["message"] == said["error"]["message"]


@pytest.mark.parametrize("name", ["Authorization", "x-api-key", "api-key"])
@pytest.mark.parametrize("way", ["with json", "with text", "in mid stream"])
async def test_the_clients_own_key_is_not_told_either(keyless, upstream, name, way):
    head = {name: f"Bearer {KEY}" if name == "Authorization" else KEY}
    for form in FORMS.values():
        for path in PATHS:
            prompt = upstream.script(*WAYS[way](form))
            body = body_for(path, prompt, True)
            response = await fetch("POST", keyless.http + path, head, body)
            assert MARK not in response.body.decode()
    assert MARK not in keyless.log()


async def test_a_long_key_is_hidden_and_holds_nobody_up(serve, upstream):
    """As a pattern, each character takes 100 us and 200 bytes."""
    server = serve("--upstream", upstream.url, "--model", "m", program=measured(60, rounds=0.06))
    for n in range(4):
        key = "".join(hashlib.sha256(b"%d %d" % (n, m)).hexdigest() for m in range(200))
        for shown in (key, quote(f"{key[:40]}/{key[40:]}", safe="")):
            prompt = upstream.script(plain(400, {"error": {"message": words(shown)}}))
            head = {"x-api-key": key if shown == key else f"{key[:40]}/{key[40:]}"}
            response = await fetch("POST", server.http + OPENAI, head, ask(prompt))
            assert response.error["message"] == words("[key]")
    assert "round:" not in server.stderr_text(), server.stderr_text()


# ------------------------------------------------------------------- who gets which key

SENT = {
    "authorization": {"Authorization": "Bearer mine-0123456789"},
    "x-api-key": {"x-api-key": "mine-0123456789"},
    "api-key": {"api-key": "mine-0123456789"},
}


def keys_in(heard):
    names = ("authorization", "x-api-key", "api-key")
    return {name: heard.headers[name] for name in names if name in heard.headers}


async def heard_by(upstream, server, path, head):
    """The keys that come with a question."""
    prompt = upstream.script(plain(400, {"error": {"message": "No."}}))
    await fetch("POST", server.http + path, head, body_for(path, prompt, True))
    (heard,) = upstream.asked(prompt)
    return keys_in(heard)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SENT)
async def test_the_clients_key_goes_on_as_it_came(keyless, upstream, path, name):
    keys = await heard_by(upstream, keyless, path, SENT[name])
    assert keys == {key.lower(): value for key, value in SENT[name].items()}


BASIC = ["Basic dXNlcjpwYXNz", "basic dXNlcjpwYXNz", "BASIC  dXNlcjpwYXNz"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("login", BASIC)
async def test_a_proxys_login_is_never_passed_on(keyless, keyed, upstream, path, login):
    head = {"Authorization": login}
    assert await heard_by(upstream, keyless, path, head) == {}
    mixed = head | SENT["x-api-key"]
    assert await heard_by(upstream, keyless, path, mixed) == SENT["x-api-key"]
    keys = await heard_by(upstream, keyed, path, head)
    assert keys["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("path", PATHS)
async def test_the_servers_key_goes_where_there_is_one(keyed, upstream, path):
    for head in SENT.values():
        keys = await heard_by(upstream, keyed, path, head)
        assert keys.pop("authorization") == f"Bearer {KEY}"
        assert keys == ({"x-api-key": KEY} if path == MESSAGES else {})


# --------------------------------------------------------------------------- the token

TOKENS = {
    "authorization": {"Authorization": f"Bearer {TOKEN}"},
    "x-api-key": {"x-api-key": TOKEN},
    "api-key": {"api-key": TOKEN},
    "cookie": {"Cookie": f"a=b; chatstream={TOKEN}"},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["authorization", "x-api-key", "api-key"])
async def test_the_token_opens_and_goes_no_further(guarded, upstream, path, name):
    assert await heard_by(upstream, guarded, path, TOKENS[name]) == {}
    assert TOKEN not in str(upstream.heard[-1].headers)
    assert TOKEN not in guarded.log()


@pytest.mark.parametrize("head", [None, {"Authorization": "Bearer wrong"}])
@pytest.mark.parametrize("path", PATHS)
async def test_without_the_token_nothing_is_asked(guarded, upstream, path, head):
    prompt = upstream.script(*answer("Hello"))
    body = body_for(path, prompt, True)
    response = await fetch("POST", guarded.http + path, head, body)
    assert response.status == 401
    assert response.error["message"]
    assert not upstream.asked(prompt)


async def test_the_token_as_a_cookie_leaves_room_for_the_clients_key(guarded, upstream):
    login = await fetch("GET", f"{guarded.http}/?token={quote(TOKEN, safe='')}")
    assert login.status in (302, 303, 307)
    assert TOKEN not in login.headers["location"]
    cookie = login.headers["set-cookie"].partition(";")[0]
    head = {"Cookie": cookie} | SENT["authorization"]
    keys = await heard_by(upstream, guarded, OPENAI, head)
    assert keys == {"authorization": "Bearer mine-0123456789"}
    assert "cookie" not in upstream.heard[-1].headers
    for form in (TOKEN, quote(TOKEN, safe=""), quote(TOKEN)):
        assert form not in guarded.log()


async def test_a_wrong_token_is_not_told(guarded):
    """It may be the right one with a slip."""
    for head in ({"Authorization": "Bearer slip-q7xw"}, {"Cookie": "token=slip-q7xw"}):
        response = await fetch("GET", guarded.http + "/v1/models", head)
        assert response.status == 401
        assert MARK not in response.body.decode() + str(response.headers)
    await fetch("GET", guarded.http + "/?token=slip-q7xw")
    assert MARK not in guarded.log()


# ------------------------------------------------------------------------- at the start

BAD = {
    "an end of line": KEY + "\r\nX: y",
    "a zero-width space": KEY + "\u200bq7xw",
    "a letter that is not ASCII": KEY + "\xe9",
    "a tab": KEY[:5] + "\t" + KEY[5:],
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("variable", ["OPENAI_API_KEY", "CHATSTREAM_TOKEN"])
def test_a_key_that_cannot_be_sent_is_not_told_at_the_start(variable, name):
    env = {"OPENAI_BASE_URL": f"http://127.0.0.1:{free_port()}/v1", variable: BAD[name]}
    done = run_to_exit("--port", "0", "--room-port", "0", env=env)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert variable in done.stderr or "key" in done.stderr or "token" in done.stderr
    assert "q7" not in done.stdout + done.stderr


PASSWORDS = {
    "upstream": {"OPENAI_BASE_URL": "http://me:pass-q7xw@127.0.0.1:{}/v1\x01"},
    "upstream flag": {"CHATSTREAM_UPSTREAM": "ftp://me:pass-q7xw@127.0.0.1:{}/v1"},
    "redis": {"CHATSTREAM_REDIS": "redis://me:pass-q7xw@127.0.0.1:{}"},
    "proxy": {
        "OPENAI_BASE_URL": "http://models.example/v1",
        "HTTP_PROXY": "socks5://me:pass-q7xw@127.0.0.1:{}",
    },
}


@pytest.mark.parametrize("name", PASSWORDS)
def test_a_password_in_a_url_is_not_told_at_the_start(name):
    env = {key: value.format(free_port()) for key, value in PASSWORDS[name].items()}
    done = run_to_exit("--port", "0", "--room-port", "0", env=env)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert MARK not in done.stdout + done.stderr


async def test_the_key_goes_to_no_other_host(serve):
    """A redirect elsewhere is not followed, with the key or without."""
    with Upstream() as first, Upstream() as other:
        env = {"OPENAI_BASE_URL": first.url, "OPENAI_API_KEY": KEY}
        server = serve("--model", "m", env=env)
        where = f"Location: http://127.0.0.1:{other.port}/v1/chat/completions"
        for status in (301, 302, 303, 307, 308):
            prompt = first.script(plain(status, b"", where))
            response = await fetch("POST", server.http + OPENAI, None, ask(prompt))
            assert response.status == 502
        assert not other.heard
