"""Behind the proxies of README.md, as its snippets have them: a real nginx and a real
Caddy, with TLS and HTTP/2, as a browser and as curl see it."""

import re
import subprocess
import time
from contextlib import contextmanager

import pytest
from kit import (
    DONE,
    HOLD,
    OPENAI,
    ROOT,
    Gate,
    asking,
    connect,
    delta,
    free_port,
    launched,
    need,
    refused,
    sse,
    stream,
    wait_until,
)

NAME = "chat.example.com"
NGINX = """
daemon off;
pid nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
{snippet}
}}
"""


def snippet(language):
    """The block of README.md in this language."""
    text = (ROOT / "README.md").read_text()
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)
    return found


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    need("openssl", "apt-get install openssl")
    folder = tmp_path_factory.mktemp("tls")
    pem, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"],
            *("-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"),
            *("-keyout", key, "-out", pem),
        ],
        check=True,
        capture_output=True,
    )
    return pem, key


@contextmanager
def running(arguments, port, folder):
    """A proxy, until the test is over."""
    with (folder / "log").open("wb") as output:
        process = subprocess.Popen(arguments, cwd=folder, stdout=output, stderr=output)
    try:
        wait_until(lambda: process.poll() is not None or not refused(port))
        assert process.poll() is None, (folder / "log").read_text()
        yield
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def nginx(folder, behind, port, pem, key):
    program = need("nginx", "apt-get install nginx")
    text = snippet("nginx").replace("443", f"127.0.0.1:{port}")
    text = text.replace("127.0.0.1:4001", f"127.0.0.1:{behind}")
    text = re.sub("/etc/ssl/.*pem", str(pem), text)
    text = re.sub("/etc/ssl/.*key", str(key), text)
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(snippet=text))
    with running([program, "-p", folder, "-c", config, "-e", "stderr"], port, folder):
        yield


@contextmanager
def caddy(folder, behind, port, pem, key):
    """Its own certificate authority is the internet; here it gets a certificate."""
    program = need("caddy", "apt-get install caddy")
    text = snippet("caddyfile").replace("127.0.0.1:4001", f"127.0.0.1:{behind}")
    text = text.replace(f"{NAME} {{", f"https://{NAME}:{port} {{\n    tls {pem} {key}")
    config = folder / "Caddyfile"
    quiet = "{\n    admin off\n    auto_https disable_redirects\n}\n"
    config.write_text(quiet + text)
    command = [program, "run", "--config", config, "--adapter", "caddyfile"]
    with running(command, port, folder):
        yield


@pytest.fixture(scope="module", params=[nginx, caddy])
def proxy(request, shared, upstream, certificate, tmp_path_factory):
    """The port of a proxy in front of a server in front of the scripted upstream."""
    port = free_port()
    page = f"https://{NAME}:{port}"
    server = shared("--upstream", upstream.url, "--model", "m", "--allow-origin", page)
    folder = tmp_path_factory.mktemp(request.param.__name__)
    with request.param(folder, server.port, port, *certificate):
        yield port


def curl(port, path, *options):
    """A curl that trusts the tests' certificate and finds the name here."""
    need("curl", "apt-get install curl")
    here = f"{NAME}:{port}:127.0.0.1"
    url = f"https://{NAME}:{port}{path}"
    return ["curl", "-skN", "--resolve", here, *options, url]


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_each_token_passes_at_once(proxy, upstream, version):
    """The upstream waits in mid-answer; what it said before must be there."""
    gate = Gate()
    prompt = upstream.script(*sse(delta("One, "), gate, delta("two."), DONE))
    body = f'{{"stream":true,"messages":[{{"role":"user","content":"{prompt}"}}]}}'
    command = curl(proxy, OPENAI, version, "-d", body)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            heard = read_until(process.stdout, b"One, ")
            assert b"two." not in heard
            gate.open()
            assert b"[DONE]" in process.stdout.read()
        finally:
            gate.open()
            process.kill()


def read_until(pipe, mark):
    heard = b""
    while mark not in heard:
        line = pipe.readline()
        assert line, f"ended after {heard!r}"
        heard += line
    return heard


def test_http_2_reaches_the_browser(proxy):
    command = curl(
        proxy, "/healthz", "--http2", "-o", "/dev/null", "-w", "%{http_version}"
    )
    assert subprocess.check_output(command) == b"2"


def test_who_leaves_the_proxy_leaves_the_server(proxy, upstream):
    prompt = upstream.script(*sse(delta("One, "), HOLD))
    body = f'{{"stream":true,"messages":[{{"role":"user","content":"{prompt}"}}]}}'
    with subprocess.Popen(
        curl(proxy, OPENAI, "-d", body), stdout=subprocess.PIPE
    ) as process:
        read_until(process.stdout, b"One, ")
        assert readers(proxy) == 1
        process.kill()
    wait_until(lambda: readers(proxy) == 0)


def readers(port):
    health = subprocess.check_output(curl(port, "/healthz"), text=True)
    return int(re.search(r'"readers":(\d+)', health)[1])


def test_resuming_passes(proxy):
    second = int(time.time()) - 5
    command = curl(proxy, "/clock", "-m", "1", "-H", f"Last-Event-ID: clock-{second}")
    heard = subprocess.run(command, check=False, capture_output=True).stdout
    assert f"id: clock-{second + 1}\n".encode() in heard


@pytest.fixture
def page_at(proxy, certificate):
    """A page in Chromium, which finds the name at this proxy and trusts it."""
    with launched(f"--host-resolver-rules=MAP {NAME} 127.0.0.1") as browser:
        page = browser.new_context(ignore_https_errors=True).new_page()
        page.goto(f"https://{NAME}:{proxy}/#room")
        yield page


def test_a_page_joins_the_room_and_streams_over_http_2(page_at):
    said = page_at.evaluate(
        """() => new Promise((resolve, reject) => {
            const socket = new WebSocket(`wss://${location.host}/room`);
            socket.onopen = () => socket.send("hello");
            socket.onmessage = (message) => resolve(message.data);
            socket.onerror = () => reject(new Error("no WebSocket"));
        })"""
    )
    assert said == "hello--返回数据"
    protocol, streams = page_at.evaluate(
        """async () => {
            const clocks = await Promise.all(
                Array.from({ length: 10 }, () => fetch("clock")));
            const firsts = await Promise.all(
                clocks.map((clock) => clock.body.getReader().read()));
            const [entry] = performance.getEntriesByType("navigation");
            return [entry.nextHopProtocol, firsts.filter((f) => f.value).length];
        }"""
    )
    assert (protocol, streams) == ("h2", 10)


async def test_a_proxy_that_hides_the_name_is_told_what_to_do(serve):
    """Without --allow-origin for the public name: 421, and the words say why."""
    server = serve()
    async with connect(server.http) as connection:
        response = await connection.request("GET", "/", host=NAME)
        await response.read()
    assert response.status == 421
    assert "--allow-origin" in response.error["message"]


async def test_nothing_is_asked_of_a_buffer(relay, upstream):
    """The header that turns nginx's buffer off, where its owner forgot to."""
    prompt = upstream.script(*sse(delta("One, "), DONE))
    question = asking(prompt, stream=True)
    async with stream("POST", relay.http + OPENAI, body=question) as response:
        assert response.headers["x-accel-buffering"] == "no"
