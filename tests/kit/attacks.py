"""Requests with two readings, bodies in bad chunks, visits that end in every way."""

import random
from contextlib import suppress

import trio

from .client import CHAT, Cut, asking, connect, head, reset
from .websocket import HANDSHAKE, TEXT, frame

SHAPES = {
    "length and chunked": ["Content-Length: 4", "Transfer-Encoding: chunked"],
    "chunked and length": ["Transfer-Encoding: chunked", "Content-Length: 4"],
    "two lengths": ["Content-Length: 4", "Content-Length: 0"],
    "a list of lengths": ["Content-Length: 4, 0"],
    "a signed length": ["Content-Length: +4"],
    "a negative length": ["Content-Length: -4"],
    "a hexadecimal length": ["Content-Length: 0x4"],
    "an endless length": ["Content-Length: " + "9" * 30],
    "a length of letters": ["Content-Length: four"],
    "chunked twice": ["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"],
    "chunked and more": ["Transfer-Encoding: chunked, identity"],
    "not quite chunked": ["Transfer-Encoding: xchunked"],
    "chunked after a tab": ["Transfer-Encoding:\x0bchunked"],
    "a space before the colon": ["Transfer-Encoding : chunked"],
    "a folded line": ["X: y", " Transfer-Encoding: chunked"],
    "a nul": ["Transfer-Encoding: chun\0ked"],
    "a bare cr": ["X: y\rTransfer-Encoding: chunked"],
}


BODIES = {
    "a size of letters": b"zz\r\nab\r\n",
    "a signed size": b"+2\r\nab\r\n",
    "a negative size": b"-2\r\nab\r\n",
    "a size with 0x": b"0x2\r\nab\r\n",
    "an endless size": b"f" * 40 + b"\r\nab",
    "more than its size": b"2\r\nabcd\r\n0\r\n\r\n",
    "an endless extension": b"2;" + b"x" * 30_000,
    "an endless trailer": b"0\r\nX: " + b"y" * 30_000,
}


BROKEN = (Cut, trio.BrokenResourceError, trio.ClosedResourceError)


async def visit(server, n):
    """One connection that ends in one of all the ways there are."""
    ways = [leave_reading, leave_answer, leave_room, leave_head, leave_body, garbage]
    with suppress(*BROKEN, OSError):
        async with connect(server.http if n % 2 else plain_url(server.ws)) as connection:
            with trio.move_on_after(5):
                await ways[n % len(ways)](connection)
            if n // len(ways) % 3 == 0:
                reset(connection.transport)
            elif n // len(ways) % 3 == 1:
                await connection.transport.send_eof()


def plain_url(url):
    return url.replace("ws", "http", 1)


async def leave_reading(connection):
    response = await connection.request("GET", "/clock")
    await response.piece()


async def leave_answer(connection):
    response = await connection.request("POST", CHAT, None, asking("Hello"))
    await response.piece()
    await response.piece()


async def leave_room(connection):
    response = await connection.request("GET", "/room", HANDSHAKE)
    assert response.status == 101
    await connection.send(frame(TEXT, b"hello") + frame(TEXT, b"and")[:5])


async def leave_head(connection):
    await connection.send(b"GET /clock HTTP/1.1\r\nHo")


async def leave_body(connection):
    await connection.send(head("POST", CHAT, "Host: localhost", "Content-Length: 99") + b'{"me')


async def garbage(connection):
    await connection.send(random.Random(1).randbytes(300))
    await connection.receive()
