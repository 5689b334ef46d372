"""A real redis-server on a port of its own."""

import socket
import subprocess
from contextlib import contextmanager, suppress

from .common import free_port, need, wait_until

TOGETHER = ("--linger", "0.4", "--room-rate", "0", "--grace", "1")


class Redis:
    """A real redis-server on a port of its own that can go away and come back."""

    def __init__(self, folder):
        self.folder, self.port, self.process = folder, free_port(), None

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}"

    def start(self):
        """Every write goes to its file, so that it comes back as it went."""
        options = f"--port {self.port} --bind 127.0.0.1 --dir {self.folder}"
        durable = ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        self.process = subprocess.Popen(
            ["redis-server", *options.split(), *durable],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        wait_until(self.answers)

    def answers(self):
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)) as s:
            s.sendall(b"PING\r\n")
            return s.recv(100).startswith(b"+PONG")
        return False

    def do(self, line):
        """A command as one would type it; returns what Redis says."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(f"{line}\r\n".encode())
            return connection.recv(65536)

    def command(self, *parts):
        """A command of any bytes; returns what Redis says."""
        parts = [part.encode() if isinstance(part, str) else part for part in parts]
        bulks = b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(b"*%d\r\n%s" % (len(parts), bulks))
            return connection.recv(65536)

    def forget(self):
        """All that it has written to its disk."""
        for path in sorted(self.folder.rglob("*.aof*")):
            if path.is_file():
                path.unlink()

    def stop(self):
        """At once, as if its machine had gone."""
        if self.process:
            self.process.kill()
            self.process.wait()


@contextmanager
def running_redis(folder):
    need("redis-server", "apt-get install redis-server")
    server = Redis(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
