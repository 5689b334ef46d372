"""A server whose clock a test turns: what takes minutes takes no time.

    server = serve(program=turned())
    await passes(server, 600)        ten minutes, second by second
    await leaps(server, 30)          half a minute at once: the machine was suspended

The server is a process of its own and is reached over sockets, as ever. Its clock runs
as fast as ours, and is set forward besides. When `passes` returns, the server has done
all that it had to do in that time.
"""

import sys

import trio

from .common import PATIENCE, ROOT

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
import socket, time, trio, trio.testing
import chatstream

door = socket.socket(socket.AF_UNIX)
door.bind("clock")
door.listen()

clock = trio.testing.MockClock(rate=1)
run, wall_clock, ahead = trio.run, time.time, 0.0

def set_forward(seconds):
    global ahead
    ahead += seconds
    clock.jump(seconds)

async def turn(stream):
    async for command in stream:
        count, size = command.split()
        for _ in range(int(count)):
            set_forward(float(size))
            await trio.testing.wait_all_tasks_blocked(0.001)
        await trio.testing.wait_all_tasks_blocked(0.02)
        await stream.send_all(b"done")

async def listen():
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(door))
    await trio.serve_listeners(turn, [listener])

def run_turned(main, *args):
    async def beside():
        trio.lowlevel.spawn_system_task(listen)
        return await main(*args)
    return run(beside, clock=clock)

trio.run = run_turned
time.time = lambda: wall_clock() + ahead
sys.exit(chatstream.main())
"""


def turned():
    """A program for serve(), with a clock that passes() and leaps() turn."""
    return [sys.executable, "-c", PROGRAM.format(root=str(ROOT))]


async def passes(server, seconds):
    """So much time goes by for this server, in steps of at most a second."""
    whole = int(seconds)
    await turn(server, whole, 1)
    await turn(server, 1, seconds - whole)


async def leaps(server, seconds):
    """It wakes up so much later than it fell asleep."""
    await turn(server, 1, seconds)


async def turn(server, count, size):
    clock = await trio.open_unix_socket(server.out.parent / "clock")
    async with clock:
        with trio.fail_after(PATIENCE + count / 10):
            await clock.send_all(f"{count} {size}".encode())
            assert await clock.receive_some(4) == b"done"
