"""chatstream.py in a process of its own, on free ports."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from .common import ROOT, need, until, wait_until

START = re.compile(r"^chatstream: (https?://\S+:(\d+))  (wss?://\S+:(\d+))  model: (.+)$")
SECRET = "sk-server-7f3a9c55e1"  # the server's own key, which nobody must ever see
running = pytest.StashKey[list]()


def clean_environment(extra=None):
    """The environment without anybody's real model account, settings or proxy in it."""
    ours = ("OPENAI_", "CHATSTREAM_")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(ours) and not name.lower().endswith("_proxy")
    }
    return kept | (extra or {})


def command(*flags):
    return [sys.executable, str(ROOT / "chatstream.py"), *flags]


class Server:
    """chatstream.py in a process of its own, on free ports."""

    def __init__(self, folder, *flags, env=None, program=None):
        self.out, self.err = folder / "stdout", folder / "stderr"
        start = program or command()
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [*start, "--port", "0", "--room-port", "0", *flags],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=clean_environment(env),
                cwd=folder,
                start_new_session=True,  # so that workers can be killed with it
            )
        try:
            self._read_start_line()
        except BaseException:
            self.stop()
            raise

    def _read_start_line(self):
        try:
            wait_until(lambda: self.process.poll() is not None or self._find(), 20)
        except AssertionError:
            pytest.fail(f"no start line came:\n{self.log()}")
        if not (found := self._find()):
            pytest.fail(f"exit {self.process.returncode} at start:\n{self.log()}")
        self.http, port, self.ws, room_port, self.model = found.groups()
        self.port, self.room_port = int(port), int(room_port)

    def _find(self):
        """The start line, once all of it is there."""
        lines = self.log().splitlines(keepends=True)
        matches = (START.match(line[:-1]) for line in lines if line.endswith("\n"))
        return next(filter(None, matches), None)

    def stdout_text(self):
        return self.out.read_text(errors="backslashreplace")

    def stderr_text(self):
        return self.err.read_text(errors="backslashreplace")

    def log(self):
        return self.stdout_text() + self.stderr_text()

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    async def exit_code(self, seconds):
        """Its exit code, which must come within so many seconds."""
        await until(lambda: self.process.poll() is not None, seconds)
        return self.process.returncode

    def stop(self):
        """Ask, ask again (which means at once), then kill what is left of it."""
        for _ in range(2):
            if self.process.poll() is None:
                self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.7)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_to_exit(*flags, env=None, seconds=15):
    """Start a server that is expected not to come up."""
    return subprocess.run(
        command(*flags),
        check=False,
        env=clean_environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


@contextmanager
def servers(config):
    """A way to start servers, all of which are stopped in the end."""
    started, folder = [], Path(tempfile.mkdtemp(prefix="chatstream-test-"))

    def start(*flags, env=None, program=None):
        home = folder / str(len(started))
        home.mkdir()
        server = Server(home, *flags, env=env, program=program)
        started.append(server)
        config.stash[running].append(server)
        return server

    try:
        yield start
    finally:
        for server in started:
            server.stop()
            config.stash[running].remove(server)
        shutil.rmtree(folder)


FULL = os.environ.get("CHATSTREAM_FULL") == "1"  # real time limits, thousands of clients

# Starts the server with other time limits, and tells on SIGUSR1 how many tasks it has.
PROGRAM = """
import signal, sys
sys.path.insert(0, {root!r})
import chatstream, trio
for name, value in {limits!r}.items():
    assert hasattr(chatstream, name), name
    setattr(chatstream, name, value)
def tell(*_):
    tasks = trio.lowlevel.current_statistics().tasks_living
    print("tasks:", tasks, file=sys.stderr, flush=True)
signal.signal(signal.SIGUSR1, tell)
sys.exit(chatstream.main())
"""

# Starts the server, and says in its log when nobody else had a turn for too long.
MEASURED = """
import sys, time
sys.path.insert(0, {root!r})
import chatstream, trio
class Turns(trio.abc.Instrument):
    round = 1e9
    def before_task_step(self, task):
        self.began = time.thread_time()  # of the processor: other programs do not count
    def after_task_step(self, task):
        if (took := time.thread_time() - self.began) > {seconds}:
            print(f"held: {{took:.3f}} s by {{task.name}}", file=sys.stderr, flush=True)
    def after_io_wait(self, timeout):
        self.round = time.thread_time()
    def before_io_wait(self, timeout):  # when each of those who could run has had a turn
        if (took := time.thread_time() - self.round) > {rounds}:
            print(f"round: {{took:.3f}} s", file=sys.stderr, flush=True)
run = trio.run
trio.run = lambda *args: run(*args, instruments=[Turns()])
sys.exit(chatstream.main())
"""


def measured(seconds, rounds=60):
    """A program for serve(): it tells of each turn that takes longer, and of each round."""
    text = MEASURED.format(root=str(ROOT), seconds=seconds, rounds=rounds)
    return [sys.executable, "-c", text]


def program(**limits):
    """A program for serve(): with these time limits, unless all is done in full."""
    limits = {} if FULL else limits
    return [sys.executable, "-c", PROGRAM.format(root=str(ROOT), limits=limits)]


def make_certificate(folder):
    """The flags that make a server use a certificate for localhost."""
    openssl = need("openssl", "apt-get install openssl")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    make = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-out", cert, "-keyout", key]
    subprocess.run([openssl, *make.split(), *names, *files], check=True, capture_output=True)
    return ["--certfile", cert, "--keyfile", key]
