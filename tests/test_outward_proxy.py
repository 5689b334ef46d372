"""HTTP_PROXY, HTTPS_PROXY and NO_PROXY: an upstream that is behind somebody's proxy."""

import pytest
import trio
from kit import (
    CHAT,
    OPENAI,
    Background,
    Connection,
    Gate,
    SecureUpstream,
    answer,
    ask,
    asking,
    chat_whole,
    fetch,
    fetch_events,
    free_port,
    make_certificate,
    plain,
    run_to_exit,
    stream,
    text_of,
)

KEY = "sk-behind-a-proxy-q7xw"
NOWHERE = "http://models.example/v1"  # has no address: only the proxy can get there


class ForwardProxy(Background):
    """A proxy that leads every request to one upstream, whatever it is for."""

    def __init__(self, port, refusal=None):
        self.server_port, self.refusal = port, refusal
        self.heads, self.seen = [], b""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, client):
        connection = Connection(client)
        head = await connection.up_to(b"\r\n\r\n")
        self.heads.append(head.decode())
        if self.refusal:
            return await client.send_all(self.refusal)
        server = await trio.open_tcp_stream("127.0.0.1", self.server_port)
        if head.startswith(b"CONNECT "):
            await client.send_all(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            await server.send_all(head + connection.buffer)
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass, client, server, nursery.cancel_scope)
            await self._pass(server, client, nursery.cancel_scope)

    async def _pass(self, source, sink, scope):
        async for piece in source:
            self.seen += piece
            await sink.send_all(piece)
        scope.cancel()


@pytest.fixture
def proxy(upstream):
    with ForwardProxy(upstream.port) as proxy:
        yield proxy


def behind(proxy, name="HTTP_PROXY", **more):
    return {name: proxy.url, "OPENAI_BASE_URL": NOWHERE, "OPENAI_API_KEY": KEY} | more


async def says_hello(server, upstream):
    for path in (CHAT, OPENAI):
        prompt = upstream.script(*answer("Hel", "lo"))
        events = await fetch_events("POST", server.http + path, None, ask(prompt))
        assert text_of(events) == "Hello"
    prompt = upstream.script(plain(200, chat_whole(["Hello"])))
    whole = (await fetch("POST", server.http + OPENAI, None, asking(prompt))).json
    assert whole["choices"][0]["message"]["content"] == "Hello"
    return upstream.asked(prompt)[0]


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy"])
async def test_plain_http_goes_by_the_proxy(serve, upstream, proxy, name):
    server = serve("--model", "m", env=behind(proxy, name))
    heard = await says_hello(server, upstream)
    first = proxy.heads[0].splitlines()[0]
    assert first == "POST http://models.example/v1/chat/completions HTTP/1.1"
    assert heard.headers["host"] == "models.example"
    assert heard.headers["authorization"] == f"Bearer {KEY}"


async def test_a_token_by_a_proxy_is_passed_on_at_once(serve, upstream, proxy):
    server = serve("--model", "m", env=behind(proxy))
    gate = Gate()
    prompt = upstream.script(*answer("Hel", gate, "lo"))
    async with stream("POST", server.http + CHAT, None, ask(prompt)) as response:
        assert text_of(await response.events(1)) == "Hel"
        gate.open()
        assert text_of(await response.events()) == "lo"


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy"])
async def test_https_goes_through_a_tunnel(serve, tmp_path, name):
    """The proxy learns the host, and neither the key nor a word."""
    cert, key = make_certificate(tmp_path)[1::2]
    with SecureUpstream(cert, key) as upstream, ForwardProxy(upstream.port) as proxy:
        env = behind(proxy, name, OPENAI_BASE_URL=upstream.url, SSL_CERT_FILE=cert)
        server = serve("--model", "m", env=env)
        await says_hello(server, upstream)
        assert proxy.heads[0].startswith(f"CONNECT localhost:{upstream.port} HTTP/1.1")
        assert KEY not in "".join(proxy.heads)
        assert KEY.encode() not in proxy.seen
        assert b"Hello" not in proxy.seen


async def test_the_proxy_of_the_other_scheme_is_not_asked(serve, upstream, proxy):
    env = behind(proxy, "HTTPS_PROXY", OPENAI_BASE_URL=upstream.url)
    await says_hello(serve("--model", "m", env=env), upstream)
    assert not proxy.heads


async def test_the_proxys_login_is_the_proxys_alone(serve, upstream, proxy):
    env = behind(proxy)
    env["HTTP_PROXY"] = proxy.url.replace("//", "//me:p%40ss-q7xw@")
    server = serve("--log-level", "debug", "--model", "m", env=env)
    heard = await says_hello(server, upstream)
    assert "proxy-authorization: basic bwu6cebzcy1xn3h3" in proxy.heads[0].lower()
    assert heard.headers["authorization"] == f"Bearer {KEY}"
    assert "q7xw" not in server.log()


NOT_BY_PROXY = ["127.0.0.1", "*", "other.example, 127.0.0.1", "127.0.0.1:{port}"]
BY_PROXY = ["other.example", "127.0.0.2", "27.0.0.1", ""]


@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
@pytest.mark.parametrize("value", NOT_BY_PROXY)
async def test_no_proxy_is_heeded(serve, upstream, proxy, name, value):
    value = value.format(port=upstream.port)
    env = behind(proxy, OPENAI_BASE_URL=upstream.url) | {name: value}
    await says_hello(serve("--model", "m", env=env), upstream)
    assert not proxy.heads


@pytest.mark.parametrize("value", BY_PROXY)
async def test_no_proxy_names_whole_hosts(serve, upstream, proxy, value):
    env = behind(proxy, OPENAI_BASE_URL=upstream.url, NO_PROXY=value)
    await says_hello(serve("--model", "m", env=env), upstream)
    assert proxy.heads


@pytest.mark.parametrize("value", ["example", ".example", "models.example"])
async def test_no_proxy_may_name_a_domain(serve, proxy, value):
    """Then nobody gets there: the name has no address."""
    server = serve("--model", "m", env=behind(proxy, NO_PROXY=value))
    response = await fetch("POST", server.http + OPENAI, None, ask("Hello"))
    assert response.status in (502, 504)
    assert not proxy.heads


REFUSALS = [
    b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 503 No\r\nContent-Type: text/html\r\nContent-Length: 9\r\n\r\n<p>No</p>",
    b"rubbish\r\n\r\n",
    b"\r\n",
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=["407", "503", "rubbish", "an empty line"])
async def test_a_tunnel_that_is_refused_is_a_clear_error(serve, refusal):
    with ForwardProxy(0, refusal) as proxy:
        env = behind(proxy, "HTTPS_PROXY", OPENAI_BASE_URL="https://models.example/v1")
        server = serve("--model", "m", env=env)
        response = await fetch("POST", server.http + OPENAI, None, ask("Hello"))
    assert response.status == 502
    assert "proxy" in response.error["message"].lower()
    assert KEY not in server.log()


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_that_is_not_there_is_named(serve, scheme):
    port = free_port()
    env = {f"{scheme.upper()}_PROXY": f"http://127.0.0.1:{port}"}
    env |= {"OPENAI_BASE_URL": f"{scheme}://models.example/v1"}
    server = serve("--model", "m", env=env)
    response = await fetch("POST", server.http + OPENAI, None, ask("Hello"))
    assert response.status == 502
    assert "proxy" in response.error["message"].lower()


@pytest.mark.parametrize("value", ["socks5://127.0.0.1:9", "ftp://127.0.0.1", "http://"])
async def test_a_proxy_that_cannot_be_used_matters_only_where_it_is_needed(serve, upstream, value):
    """One line at the start, else nothing."""
    done = run_to_exit(
        *("--port", "0", "--room-port", "0"), env={"HTTP_PROXY": value, "OPENAI_BASE_URL": NOWHERE}
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "proxy" in done.stderr.lower()
    for env in ({"HTTPS_PROXY": value}, {"HTTP_PROXY": value, "NO_PROXY": "127.0.0.1"}):
        env = env | {"OPENAI_BASE_URL": upstream.url}
        await says_hello(serve("--model", "m", env=env), upstream)
    serve(env={"HTTP_PROXY": value})  # the demo needs none
