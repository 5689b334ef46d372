"""Fixtures: servers that start on free ports and are gone after the test, whatever
happens, and whose logs stand in the report of a test that failed."""

import signal
import sys

import pytest
from kit import (
    ROOT,
    SECRET,
    Line,
    Profile,
    Upstream,
    from_disk,
    from_http,
    launched,
    make_certificate,
    need_module,
    npm_packages,
    running,
    running_redis,
    servers,
)


def pytest_configure(config):
    config.stash[running] = []


def pytest_sessionstart(session):
    """A run that is terminated (timeout, CI) cleans up like one that is interrupted."""

    def interrupt(*_):
        session.shouldstop = "terminated"
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    # A shell starts what it runs in the background with SIGINT ignored, and that would
    # be passed on to each server: a signal with a handler is not.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.failed:
        for server in item.config.stash[running]:
            end = "".join(server.log().splitlines(keepends=True)[-25:])
            report.sections.append((f"chatstream {server.http}", end[-4000:]))
    return report


@pytest.fixture
def serve(request):
    """serve(*flags, env=None): start a server of this test's own."""
    with servers(request.config) as start:
        yield start


@pytest.fixture(scope="session")
def shared(request):
    """The same for servers that many tests use."""
    with servers(request.config) as start:
        yield start


@pytest.fixture(scope="session")
def demo(shared):
    """A server with the demo model and no flag at all."""
    return shared()


QUICK = """
import sys
sys.path.insert(0, {root!r})
import chatstream
chatstream.Demo.PACE /= 20
sys.exit(chatstream.main())
"""


@pytest.fixture(scope="session")
def quick_demo(shared):
    """The demo for tests that read whole answers and do not look at its pace."""
    return shared(program=[sys.executable, "-c", QUICK.format(root=str(ROOT))])


@pytest.fixture(scope="session")
def open_room(shared):
    """A server whose room has no limit to its pace."""
    return shared("--room-rate", "0")


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """The flags that give a server a certificate for localhost."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="session")
def upstream():
    """A model's server that says what each test tells it to."""
    with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="session")
def relay(shared, upstream):
    """A server that relays to the upstream, with a key, and is quick to let go."""
    env = {"OPENAI_BASE_URL": upstream.url, "OPENAI_API_KEY": SECRET}
    return shared("--linger", "0.4", "--model", "scripted", env=env)


@pytest.fixture
def second_upstream():
    """For tests that look at an upstream's connections and not at one request."""
    with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def chromium():
    """A real Chromium, driven by Playwright; for tests that are not async."""
    with launched() as browser:
        yield browser


@pytest.fixture
def page(chromium):
    """A fresh page in a fresh context: no cache, no storage."""
    context = chromium.new_context()
    yield context.new_page()
    context.close()


@pytest.fixture
def redis(tmp_path):
    """A real redis-server of this test's own. Nobody else can name it."""
    with running_redis(tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def quiet_redis(tmp_path_factory):
    """The same for the tests of a file, which let it be."""
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


# ------------------------------------------------------------------------- the pages


@pytest.fixture(scope="module")
def expect(chromium):
    return need_module("playwright.sync_api", "pip install playwright").expect


@pytest.fixture
def profile(chromium, serve):  # so that it is closed before the servers are
    """A browser's profile, whose pages must have nothing to complain of."""
    context = chromium.new_context(locale="en-US")
    profile = Profile(context)
    yield profile
    context.close()
    assert profile.problems == []


@pytest.fixture(scope="module")
def model(shared, upstream):
    """A server whose model says what a test tells it to, also to a page from disk."""
    flags = ["--upstream", upstream.url, "--model", "scripted"]
    return shared(*flags, "--allow-origin", "null")


@pytest.fixture(params=[from_http, from_disk], ids=["http", "disk"])
def where(request):
    return request.param


@pytest.fixture
def line(model, profile):
    """Between the page and its server, a line that the test can break."""
    with Line(model.port) as line:
        yield line
        profile.network_fails = True  # that it ends now is no problem of the page's


@pytest.fixture(scope="session")
def axe():
    """The source of axe-core."""
    folder = npm_packages("axe-core@4") / "node_modules" / "axe-core"
    return (folder / "axe.min.js").read_text()
