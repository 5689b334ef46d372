"""Behind the proxies of README.md, as its snippets have them (a real nginx, Caddy and
HAProxy, with TLS and HTTP/2) and behind a development server that compresses: as a
browser, curl and the checker see it."""

import json
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
from kit import (
    DONE,
    HOLD,
    OPENAI,
    ROOT,
    Gate,
    Report,
    answer,
    asking,
    connect,
    delta,
    free_port,
    launched,
    need,
    npm_packages,
    refused,
    sse,
    stream,
    wait_until,
)

NAME = "chat.example.com"
NGINX = """
daemon off;
user root;
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
            *("-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME},DNS:localhost"),
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
def nginx(folder, behind, port, pem, key, buffering="proxy_buffering off;", login=""):
    program = need("nginx", "apt-get install nginx")
    text = snippet("nginx").replace("443", f"127.0.0.1:{port}")
    text = text.replace("127.0.0.1:4001", f"127.0.0.1:{behind}")
    if login:
        (folder / "users").write_text(login)
        text = re.sub(r"# (auth_basic|proxy_set_header)", r"\1", text)
        text = text.replace("/etc/nginx/chatstream.users", str(folder / "users"))
    text = text.replace("proxy_buffering off;", buffering)
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


@contextmanager
def haproxy(folder, behind, port, pem, key):
    program = need("haproxy", "apt-get install haproxy")
    both = folder / "both.pem"  # it wants the certificate and its key in one file
    both.write_bytes(pem.read_bytes() + key.read_bytes())
    text = snippet("haproxy").replace("bind :443", f"bind 127.0.0.1:{port}")
    text = text.replace("127.0.0.1:4001", f"127.0.0.1:{behind}")
    config = folder / "haproxy.cfg"
    config.write_text(re.sub(r"/etc/ssl/\S+", str(both), text))
    with running([program, "-f", config], port, folder):
        yield


NODE = """
const fs = require("fs");
const app = require("express")();
const [target, port, cert, key] = process.argv.slice(2);
const proxy = require("http-proxy").createProxyServer({ target, ws: true });
proxy.on("error", (error, request, response) => response.destroy());
app.use(require("compression")());
app.use((request, response) => proxy.web(request, response));
const tls = { cert: fs.readFileSync(cert), key: fs.readFileSync(key) };
require("https").createServer(tls, app)
  .on("upgrade", (request, socket, head) => proxy.ws(request, socket, head))
  .listen(port, "127.0.0.1");
"""


@contextmanager
def compressing(folder, behind, port, pem, key):
    """A development server, as many tools have it: Express with compression()."""
    packages = npm_packages("express", "compression", "http-proxy")
    (folder / "node_modules").symlink_to(packages / "node_modules")
    (folder / "proxy.cjs").write_text(NODE)
    command = ["node", "proxy.cjs", f"http://127.0.0.1:{behind}", str(port), pem, key]
    with running(command, port, folder):
        yield


@pytest.fixture(scope="module")
def behind(shared, upstream, certificate, tmp_path_factory):
    """behind(proxy): the port of this proxy, before a server, before the upstream."""
    ports = {proxy: free_port() for proxy in PROXIES}
    origins = [f"--allow-origin=https://{NAME}:{port}" for port in ports.values()]
    server = shared("--upstream", upstream.url, "--model", "m", *origins)
    started = set()
    with ExitStack() as stack:

        def start(proxy):
            if proxy not in started:
                started.add(proxy)
                folder = tmp_path_factory.mktemp(proxy.__name__)
                running = proxy(folder, server.port, ports[proxy], *certificate)
                stack.enter_context(running)
            return ports[proxy]

        yield start


ON_THE_INTERNET = [nginx, caddy, haproxy]
PROXIES = [*ON_THE_INTERNET, compressing]


@pytest.fixture(params=PROXIES)
def proxy(request, behind):
    return behind(request.param)


@pytest.fixture(params=ON_THE_INTERNET)
def internet_proxy(request, behind):
    return behind(request.param)


def curl(port, path, *options):
    """A curl that trusts the tests' certificate and finds the name here."""
    need("curl", "apt-get install curl")
    here = f"{NAME}:{port}:127.0.0.1"
    url = f"https://{NAME}:{port}{path}"
    return ["curl", "-skN", "--compressed", "--resolve", here, *options, url]


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


def test_http_2_reaches_the_browser(internet_proxy):
    command = curl(
        internet_proxy, "/healthz", "--http2", "-o", "/dev/null", "-w", "%{http_version}"
    )
    assert subprocess.check_output(command) == b"2"


def test_who_leaves_the_proxy_leaves_the_server(internet_proxy, upstream):
    """(http-proxy 1.18, in the development server, tells nobody of it.)"""
    prompt = upstream.script(*sse(delta("One, "), HOLD))
    body = f'{{"stream":true,"messages":[{{"role":"user","content":"{prompt}"}}]}}'
    with subprocess.Popen(
        curl(internet_proxy, OPENAI, "-d", body), stdout=subprocess.PIPE
    ) as process:
        read_until(process.stdout, b"One, ")
        assert readers(internet_proxy) == 1
        process.kill()
    wait_until(lambda: readers(internet_proxy) == 0)


def readers(port):
    health = subprocess.check_output(curl(port, "/healthz"), text=True)
    return int(re.search(r'"readers":(\d+)', health)[1])


def test_resuming_passes(proxy):
    second = int(time.time()) - 5
    command = curl(proxy, "/clock", "-m", "1", "-H", f"Last-Event-ID: clock-{second}")
    heard = subprocess.run(command, check=False, capture_output=True).stdout
    assert f"id: clock-{second + 1}\n".encode() in heard


@pytest.fixture(scope="module")
def browser():
    """It finds the name here, at whatever port, and trusts the certificate."""
    with launched(f"--host-resolver-rules=MAP {NAME} 127.0.0.1") as browser:
        context = browser.new_context(ignore_https_errors=True)
        yield context


@pytest.fixture
def open_page(browser):
    """open_page(port): our own page, behind this proxy."""
    page = browser.new_page()

    def go(port, part=""):
        page.goto(f"https://{NAME}:{port}/{part}")
        return page

    yield go
    page.close()


PIECES = """async ([url, body]) => {
  const response = await fetch(url, {method: 'POST', body: JSON.stringify(body)});
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  const pieces = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return pieces;
    pieces.push(decoder.decode(value, { stream: true }));
  }
}"""


def test_chromium_gets_each_event_in_a_piece_of_its_own(proxy, upstream, open_page):
    # At this pace: a browser on a busy machine joins what comes within some 40 ms.
    paced = [step for n in range(47) for step in (f"word {n} ", 0.15)]
    prompt = upstream.script(*answer("First: ", 0.15, *paced))
    question = [OPENAI, asking(prompt, stream=True)]
    pieces = open_page(proxy).evaluate(PIECES, question)
    found = [piece.count("\ndata: ") + piece.startswith("data: ") for piece in pieces]
    assert sum(found) == 50  # with the last two: its finish_reason, and [DONE]
    assert found.count(1) >= 0.9 * sum(found)


TICKS = """(count) => new Promise((resolve, reject) => {
  const seen = [];
  const source = new EventSource("clock");
  source.onerror = reject;
  source.onmessage = (message) => {
    seen.push(Number(message.lastEventId.split("-")[1]));
    if (seen.length === count) { source.close(); resolve(seen); }
  };
})"""


def test_the_clock_ticks_in_chromium(proxy, open_page):
    first, second = open_page(proxy).evaluate(TICKS, 2)
    assert second == first + 1


def test_a_page_joins_the_room(proxy, open_page):
    said = open_page(proxy, "#room").evaluate(
        """() => new Promise((resolve, reject) => {
            const socket = new WebSocket(`wss://${location.host}/room`);
            socket.onopen = () => socket.send("hello");
            socket.onmessage = (message) => resolve(message.data);
            socket.onerror = () => reject(new Error("no WebSocket"));
        })"""
    )
    assert said == "hello--返回数据"


def test_a_page_has_ten_streams_over_http_2(internet_proxy, open_page):
    protocol, streams = open_page(internet_proxy).evaluate(
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


def checked(port, path, certificate, *options):
    """What the checker says of a stream behind a proxy."""
    name = ("--header", f"Host: {NAME}:{port}")
    trust = {"SSL_CERT_FILE": str(certificate[0])}
    return Report(f"https://127.0.0.1:{port}{path}", *name, *options, **trust)


def test_the_checker_finds_nothing_wrong(behind, upstream, certificate):
    words = [step for n in range(40) for step in (f"word {n} ", 0.05)]
    reports = []
    with ThreadPoolExecutor(2 * len(PROXIES)) as pool:
        for proxy in PROXIES:
            port = behind(proxy)
            body = asking(upstream.script(*answer(*words)), stream=True)
            question = ("--data", json.dumps(body), "--seconds", "3")
            reports += [
                pool.submit(checked, port, OPENAI, certificate, *question),
                pool.submit(checked, port, "/clock", certificate),
            ]
    for report in reports:
        assert report.result().code == 0, report.result()


BUFFER = "proxy_ignore_headers X-Accel-Buffering;"


def test_the_checker_finds_a_buffer(demo, certificate, tmp_path):
    """Of an nginx that has been told not to heed the server."""
    port = free_port()
    with nginx(tmp_path, demo.port, port, *certificate, buffering=BUFFER):
        trust = {"SSL_CERT_FILE": str(certificate[0])}
        report = Report(f"https://localhost:{port}/clock", "--seconds", "3", **trust)
    assert report.code == 1
    assert "held back" in report.says("first event")


@pytest.fixture
def own_nginx(behind, upstream, serve, certificate, tmp_path):
    """own_nginx(**options): the port of an nginx before a server of this test's own."""
    with ExitStack() as stack:

        def start(*flags, env=None, **options):
            port = free_port()
            origin = f"--allow-origin=https://{NAME}:{port}"
            server = serve(origin, "--upstream", upstream.url, *flags, env=env)
            proxy = nginx(tmp_path, server.port, port, *certificate, **options)
            stack.enter_context(proxy)
            return port

        yield start


def status_of(port, path, *options):
    code = ("-o", "/dev/null", "-w", "%{http_code}")
    command = curl(port, path, *code, "-m", "2", *options)
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return int(done.stdout)


def test_nginx_slows_down_a_stranger_who_floods_with_questions(own_nginx):
    port = own_nginx()
    with ThreadPoolExecutor(10) as pool:
        asked = [pool.submit(status_of, port, OPENAI, "-d", "{}") for _ in range(40)]
        statuses = [future.result() for future in asked]
    assert statuses.count(429) >= 5
    assert statuses.count(400) >= 20, "a burst is let through, to the server"
    assert status_of(port, "/time") == 200, "who only reads is not counted"


def test_nginx_limits_the_connections_of_one_address(own_nginx):
    port = own_nginx()
    with ThreadPoolExecutor(60) as pool:
        asked = [pool.submit(status_of, port, "/clock", "--http1.1") for _ in range(60)]
        statuses = [future.result() for future in asked]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) == 50


def test_a_login_of_nginx_is_not_for_the_model(own_nginx, upstream):
    port = own_nginx(login="an:{PLAIN}secret\n")
    body = json.dumps(asking(upstream.script(*answer("Hello")), stream=True))
    assert status_of(port, OPENAI, "-d", body) == 401
    assert status_of(port, OPENAI, "-d", body, "-u", "an:secret") == 200
    assert "authorization" not in upstream.heard[-1].headers


def test_the_token_and_a_login_of_nginx_go_together(own_nginx):
    """The cookie of /?token= passes, whatever nginx does to Authorization."""
    env = {"CHATSTREAM_TOKEN": "a-token-of-ours"}
    port = own_nginx(login="an:{PLAIN}secret\n", env=env)
    login = ("-u", "an:secret")
    assert status_of(port, "/time", *login) == 401
    command = curl(port, "/?token=a-token-of-ours", "-i", *login)
    head = subprocess.check_output(command, text=True)
    (cookie,) = re.findall(r"(?im)^set-cookie: ([^;]+);.*Secure", head)
    assert status_of(port, "/time", *login, "-b", cookie) == 200


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
