"""Machines of their own, with a router between them that can lose all packets.

    with Network(clients=2) as network:
        network.server.command("python", ...)   the same command on that machine
        network.clients[0].call(function)       in a thread that is on that machine
        network.lose(client); network.restore(client)

Each is a network namespace: real TCP, real retransmissions, and no side hears a word
when packets are lost. All are deleted in the end, and nothing outside is touched.
"""

import ctypes
import itertools
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

from .common import missing, need

CLONE_NEWNET = 0x40000000
numbers = itertools.count(1)


class Machine:
    """One network namespace, with one link to the router."""

    def __init__(self, name, subnet):
        self.name, self.subnet = name, subnet
        self.address, self.gateway = f"{subnet}.2", f"{subnet}.1"

    def command(self, *arguments):
        """This command, on this machine."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def enter(self):
        """From now on, the sockets of this thread are on this machine."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.name}", "rb") as namespace:
            if libc.setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.name}")

    def threads(self, count):
        """Threads that are on this machine."""
        return ThreadPoolExecutor(count, initializer=self.enter)


class Network:
    """A server, several clients, and the router between them."""

    def __init__(self, clients):
        need("ip", "apt-get install iproute2")
        base = f"chatstream-{os.getpid()}-{next(numbers)}"
        self.router = f"{base}-router"
        self.server = Machine(f"{base}-server", "10.77.0")
        self.clients = [Machine(f"{base}-client-{n}", f"10.77.{n}") for n in range(1, clients + 1)]
        self._made = []

    def __enter__(self):
        try:
            self._make(self.router)
            self._on(self.router, "link set lo up")
            self._forward()
            for machine in [self.server, *self.clients]:
                self._make(machine.name)
                self._connect(machine)
        except subprocess.CalledProcessError as error:
            self.__exit__()
            why = error.stderr.decode().strip()
            missing(f"a network namespace ({why})", "run the tests as root")
        return self

    def __exit__(self, *_):
        for name in reversed(self._made):
            ip("netns", "del", name)

    def _make(self, name):
        ip("netns", "add", name)
        self._made.append(name)

    def _on(self, name, words):
        ip("-n", name, *words.split())

    def _forward(self):
        write = "echo 1 > /proc/sys/net/ipv4/ip_forward"
        ip("netns", "exec", self.router, "sh", "-c", write)

    def _connect(self, machine):
        link = machine.subnet
        self._on(self.router, f"link add {link} type veth peer name eth0 netns {machine.name}")
        self._on(self.router, f"addr add {machine.gateway}/24 dev {link}")
        self._on(self.router, f"link set {link} up")
        self._on(machine.name, f"addr add {machine.address}/24 dev eth0")
        self._on(machine.name, "link set lo up")
        self._on(machine.name, "link set eth0 up")
        self._on(machine.name, f"route add default via {machine.gateway}")

    def lose(self, client):
        """Every packet to and from this client, without a word to anybody."""
        self._on(self.router, f"rule add iif {client.subnet} blackhole")
        self._on(self.router, f"rule add to {client.address} blackhole")

    def restore(self, client):
        self._on(self.router, f"rule del iif {client.subnet} blackhole")
        self._on(self.router, f"rule del to {client.address} blackhole")


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
