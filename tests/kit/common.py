"""What all of the kit needs: where things are, what is installed, how to wait."""

import importlib.util
import os
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

ROOT = Path(__file__).resolve().parent.parent.parent
REBUILD = pytest.mark.xfail(strict=False, reason="the rebuild")
PATIENCE = 8  # seconds for anything that should come at once, on a busy machine too


def need(names, how):
    """The path of the first of these programs, else a skip that says how to get it."""
    for name in names.split():
        if path := shutil.which(name):
            return path
    return missing(names, how)


def need_module(name, how):
    """Import a package that only some tests need."""
    if importlib.util.find_spec(name) is None:
        missing(name, how)
    return importlib.import_module(name)


def missing(what, how):
    if os.environ.get("CHATSTREAM_NO_SKIP") == "1":
        pytest.fail(f"{what} is missing: {how}")
    pytest.skip(f"{what} is missing: {how}")


async def until(condition, seconds=PATIENCE):
    """Wait for something that another thread or process does."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 (no event comes from over there)
            await trio.sleep(0.01)


def wait_until(condition, seconds=PATIENCE):
    """until() for tests without Trio."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@contextmanager
def paused(*arguments):
    """A process that the test may stop (SIGSTOP); killed at the end."""
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def refused(port):
    """Nobody listens there (any more)."""
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) != 0


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
