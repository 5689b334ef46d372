"""One port, several processes: nobody outside sees how many, or that one has died."""

import os
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from kit import (
    TOGETHER,
    Gate,
    answer,
    asked,
    at,
    close_code,
    command,
    delta,
    error_of,
    fetch,
    hear_of,
    insist,
    person,
    raw_member,
    refused,
    sse,
    stream,
    text_of,
    until,
    worker_of,
    workers_of,
)


@pytest.fixture
def crew(serve, redis, upstream):
    """start(n): n workers behind one port."""

    def start(count):
        flags = ("--redis", redis.url, "--workers", str(count), *TOGETHER)
        return serve(*flags, env={"OPENAI_BASE_URL": upstream.url})

    return start


async def elsewhere(server, response, stack):
    """Follow this answer at another worker than the one that writes it."""
    writer = worker_of(server, response)
    for _ in range(100):
        found = await stack.enter_async_context(stream("GET", at(server, response)))
        if worker_of(server, found) != writer:
            return found
    raise AssertionError("one worker takes all connections")


async def test_a_killed_worker_is_replaced_and_its_answers_end(crew, upstream):
    server = crew(2)
    prompt = upstream.script(*sse(delta("a"), Gate()))
    async with asked(server, prompt) as here, AsyncExitStack() as stack:
        await here.events(1)
        there = await elsewhere(server, here, stack)
        await there.events(1)
        writer = worker_of(server, here)
        os.kill(writer, signal.SIGKILL)
        with trio.fail_after(10):
            assert error_of(await there.events())["type"] == "upstream_error"
    await until(lambda: len(workers_of(server)) == 2 and writer not in workers_of(server))
    for _ in range(10):
        assert (await fetch("GET", server.http + "/time")).status == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stop_goes_to_all(crew, number):
    server = crew(3)
    codes = []

    async def member(task_status=trio.TASK_STATUS_IGNORED):
        async with raw_member(server.ws) as connection:
            task_status.started()
            codes.append(await close_code(connection))

    async with trio.open_nursery() as nursery:
        for _ in range(9):
            await nursery.start(member)
        began = time.monotonic()
        server.signal(number)
        assert await server.exit_code(1 + 3) == 0
    assert time.monotonic() - began < 1 + 3
    assert codes == [1001] * 9
    assert "Traceback" not in server.log()


async def test_at_a_stop_nobody_is_accepted_though_an_answer_goes_on(serve, redis, upstream):
    """Who would be accepted then, would wait for an answer that nobody gives."""
    flags = ("--redis", redis.url, "--workers", "2", "--grace", "20")
    server = serve(*flags, env={"OPENAI_BASE_URL": upstream.url})
    gate = Gate()
    async with asked(server, upstream.script(*answer("a ", gate, "b"))) as here:
        await here.events(1)
        server.signal()
        await until(lambda: refused(server.port) and refused(server.room_port), 3)
        gate.open()
        assert text_of(await here.events()) == "b"
    assert await server.exit_code(5) == 0


@pytest.mark.parametrize("child", ["sleep 1", "sleep 1; exit 3", "sleep 1; kill -9 $$"])
async def test_a_child_of_somebody_else_does_not_end_the_parent(serve, redis, child):
    """A shell leaves its children to what it is replaced by; so does a container."""
    shell = ["sh", "-c", f"sh -c '{child}' & exec \"$@\"", "sh", *command()]
    server = serve("--redis", redis.url, "--workers", "2", program=shell)
    await until(lambda: len(workers_of(server)) == 2)
    assert (await fetch("GET", server.http + "/time")).status == 200
    killed = min(workers_of(server))
    os.kill(killed, signal.SIGKILL)  # its own are looked after still
    await until(lambda: len(set(workers_of(server)) - {killed}) == 2)
    server.signal()
    assert await server.exit_code(5 + 3) == 0
    assert "Traceback" not in server.log()


async def test_a_worker_that_starts_while_redis_is_away_serves(crew, redis, upstream):
    server = crew(2)
    redis.stop()
    old = set(workers_of(server))
    for worker in old:
        os.kill(worker, signal.SIGKILL)
    await until(lambda: len(set(workers_of(server)) - old) == 2)
    assert (await fetch("GET", server.http + "/time")).status == 200
    async with asked(server, upstream.script(*answer("a ", "b"))) as here:
        assert text_of(await here.events()) == "a b"
    redis.start()
    async with person(server) as one, person(server) as two:
        with trio.fail_after(10):
            await insist(one, "well again")
            await hear_of(two, "message", text="well again")
    assert "Traceback" not in server.log()


async def test_workers_do_not_outlive_their_parent(crew):
    server = crew(2)
    workers = workers_of(server)
    server.signal(signal.SIGKILL)
    await until(lambda: refused(server.port))
    await until(lambda: not any(alive(worker) for worker in workers))


def alive(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
