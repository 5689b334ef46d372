"""What the tests of several processes share: who has which connection, and a pause."""

import contextlib
import os
import signal
from pathlib import Path

from kit import OPENAI, asking, stream

TOGETHER = ("--linger", "0.4", "--room-rate", "0", "--grace", "1")


def asked(server, prompt):
    """An answer under way."""
    return stream("POST", server.http + OPENAI, None, asking(prompt, stream=True))


def at(server, response):
    """Where this server has somebody's answer."""
    return f"{server.http}/answers/{response.headers['x-answer-id']}"


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
    pid = server.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in children.split()]


def worker_of(server, response):
    """The process that has the other end of this connection."""
    _, port = response.connection.transport.socket.getsockname()
    wanted = socket_from(port)
    for worker in workers_of(server):
        for file in Path(f"/proc/{worker}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed since we looked
                if os.readlink(file) == wanted:
                    return worker
    raise LookupError("no worker has this connection")


def socket_from(remote_port):
    """The server's socket of the connection from this port, as /proc names it."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[2].rpartition(":")[2], 16) == remote_port:
            return f"socket:[{fields[9]}]"
    raise LookupError("no such connection")
