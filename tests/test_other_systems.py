"""Windows and macOS, as far as Linux can be made to look like them."""

import signal
import subprocess
import sys
import types

import pytest
from kit import (
    CHAT,
    ROOT,
    TAIL,
    answer,
    asking,
    assert_no_fault,
    clean_environment,
    fetch,
    fetch_events,
    guest,
    hear,
    person,
    say_and_hear,
    stream,
    text_of,
)

import chatstream

# What the libraries need of Linux they have found before it is taken away; Trio looks
# for epoll only when it runs, and so gets a `select` of its own.
PROGRAM = """
import sys
sys.path.insert(0, {root!r})
import os, select, signal, socket, types
import h2.connection, hypercorn.trio, trio, trio_websocket
trio._core._io_epoll.select = types.SimpleNamespace(**vars(select))

class Blocked:
    NAMES = ("fcntl", "termios", "resource")
    def find_spec(self, name, path=None, target=None):
        if name in self.NAMES:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

for name in Blocked.NAMES:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Blocked())
del os.fork, os.sched_getaffinity, select.epoll
del signal.pthread_sigmask, signal.SIGHUP, socket.TCP_USER_TIMEOUT

import chatstream
sys.exit(chatstream.main())
"""


LIMITS = {
    "as many as there are": ((1024, 1 << 20), (1 << 20, 1 << 20)),
    "root takes more": ((1024, 4096), (65536, 65536)),
    "what it has": ((200_000, 200_000), (200_000, 200_000)),
    "more than a system without a limit gives": ((100_000, 1 << 63), (100_000, 1 << 63)),
    "a system without a limit": ((256, 1 << 63), (65536, 1 << 63)),
}


@pytest.mark.parametrize(("before", "after"), LIMITS.values(), ids=LIMITS)
def test_a_limit_of_files_is_raised_and_never_lowered(monkeypatch, before, after):
    """macOS says that there is none, and refuses to give that."""
    given = [before]

    def give(_, limit):
        if limit[0] > min(limit[1], 1 << 30):
            raise ValueError("not allowed to raise maximum limit")
        given.append(limit)

    system = types.SimpleNamespace(RLIMIT_NOFILE=7, getrlimit=lambda _: given[-1], setrlimit=give)
    monkeypatch.setattr(chatstream, "resource", system)
    chatstream.raise_file_limit()
    assert given[-1] == after


OTHER_TYPES = """
import mimetypes, sys
sys.path.insert(0, {root!r})
mimetypes.knownfiles.append({types!r})
import chatstream
sys.exit(chatstream.main())
"""


async def test_the_systems_own_types_do_not_break_the_pages(serve, tmp_path):
    """Of a script that is called text, a browser runs nothing."""
    system = tmp_path / "mime.types"
    system.write_text("text/plain js css html\n")
    text = OTHER_TYPES.format(root=str(ROOT), types=str(system))
    server = serve(program=[sys.executable, "-c", text])
    for path, kind in [("/", "html"), ("/page.js", "javascript"), ("/style.css", "css")]:
        response = await fetch("GET", server.http + path)
        assert kind in response.headers["content-type"]


@pytest.fixture(scope="module")
def elsewhere(shared):
    return shared("--room-rate", "0", program=program())


def program():
    return [sys.executable, "-c", PROGRAM.format(root=str(ROOT))]


async def test_the_clock_ticks_and_resumes(elsewhere):
    async with stream("GET", elsewhere.http + "/clock") as clock:
        first, second = await clock.events(2)
    assert second.n == first.n + 1
    resumed = {"Last-Event-ID": first.id}
    async with stream("GET", elsewhere.http + "/clock", resumed) as clock:
        assert (await clock.event()).data == second.data


async def test_the_demo_answers_to_the_end(elsewhere):
    events = await fetch_events("POST", elsewhere.http + CHAT, None, asking("Hello"))
    assert events[-1].data == "[DONE]"
    assert "demo" in text_of(events)


async def test_a_model_is_relayed(serve, upstream):
    env = {"OPENAI_BASE_URL": upstream.url}
    server = serve("--model", "scripted", program=program(), env=env)
    question = asking(upstream.script(*answer("Long ", "live!")))
    events = await fetch_events("POST", server.http + CHAT, None, question)
    assert text_of(events) == "Long live!"


async def test_the_room_is_open(elsewhere):
    async with guest(elsewhere) as plain, person(elsewhere, "Ann") as ann:
        said = await say_and_hear(ann)
        assert said["name"] == "Ann"
        assert await hear(plain) == said["text"] + TAIL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_stop_ends_streams_and_exits_with_0(serve, number):
    server = serve(program=program())
    async with stream("GET", server.http + "/clock") as clock:
        await clock.event()
        server.signal(number)
        await clock.events()
        assert await server.exit_code(8) == 0
    assert_no_fault(server.log())


def test_workers_that_cannot_be_had_are_one_line_and_exit_2():
    flags = ["--workers", "2", "--redis", "redis://localhost"]
    done = subprocess.run(
        [*program(), *flags],
        check=False,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=15,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("chatstream: ")
