"""What a server's process is like: that an attack harmed nobody else, what it holds.

unharmed()   around an attack: the server lives, and a reader has lost no tick
"""

import contextlib
import os
import signal
import time
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from .client import fetch, stream
from .common import until


@asynccontextmanager
async def unharmed(server):
    """Around an attack: a reader of the clock that was there before loses no tick, the
    server is well afterwards, and no fault of its own stands in its log."""
    said = len(server.stderr_text())
    async with stream("GET", server.http + "/clock") as clock:
        seen = await clock.events(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect, clock, seen)
            yield
            count = len(seen)
            await until(lambda: len(seen) > count)
            nursery.cancel_scope.cancel()
    numbers = [event.n for event in seen]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert time.time() - numbers[-1] < 3, "the clock is late"
    assert (await fetch("GET", server.http + "/healthz")).status == 200
    assert_no_fault(server.stderr_text()[said:])


async def collect(response, seen):
    while True:
        seen.append(await response.event())


def assert_no_fault(log):
    for word in ("Traceback", "fault of ours", "nobody thought of"):
        assert word not in log, log[-4000:]


async def health(server):
    return (await fetch("GET", server.http + "/healthz")).json


async def tasks(server):
    """How many tasks a server with our PROGRAM has."""
    lines = server.stderr_text().count("tasks:")
    server.signal(signal.SIGUSR1)
    await until(lambda: server.stderr_text().count("tasks:") > lines)
    return int(server.stderr_text().rpartition("tasks:")[2].split()[0])


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident(pid):
    """Resident memory, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def processor(pid):
    """Processor time used so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def frozen(process):
    """Stopped in the middle of whatever it does; it goes on at the end."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


def workers_of(server):
    """The processes of this server that accept connections."""
    return [pid for pid in children_of(server.process.pid) if "chatstream" in named(pid)]


def children_of(pid):
    """Of all its threads: each has a list of those that it has started."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in lists for child in path.read_text().split()]


def named(pid):
    """The command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def worker_of(server, response):
    """The process that has the other end of this connection."""
    ours = response.connection.transport.socket
    wanted = socket_between(ours.getpeername()[1], ours.getsockname()[1])
    for worker in workers_of(server):
        for file in Path(f"/proc/{worker}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed since we looked
                if os.readlink(file) == wanted:
                    return worker
    raise LookupError("no worker has this connection")


def socket_between(local_port, remote_port):
    """The server's socket of this connection, as /proc names it.

    Both ports are needed: other servers have connections from the same one.
    """
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        ports = [int(address.rpartition(":")[2], 16) for address in fields[1:3]]
        if ports == [local_port, remote_port]:
            return f"socket:[{fields[9]}]"
    raise LookupError("no such connection")
