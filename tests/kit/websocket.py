"""A raw WebSocket client, which may break the protocol."""

import struct
from contextlib import asynccontextmanager

from .client import stream

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
ROOM_PROTOCOL = "chatstream.v1"


HANDSHAKE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def frame(opcode, payload=b"", fin=True, length=None):
    """A client's frame; `length` lies about how much is to come."""
    size = len(payload) if length is None else length
    head = bytes([fin << 7 | opcode])
    if size < 126:
        head += bytes([0x80 | size])
    elif size < 65536:
        head += bytes([0x80 | 126]) + struct.pack("!H", size)
    else:
        head += bytes([0x80 | 127]) + struct.pack("!Q", size)
    return head + bytes(4) + payload  # masked with four zero bytes: a legal mask


async def read_frame(connection):
    """(opcode, payload) of a server's frame."""
    first, size = await connection.exactly(2)
    if size == 126:
        (size,) = struct.unpack("!H", await connection.exactly(2))
    elif size == 127:
        (size,) = struct.unpack("!Q", await connection.exactly(8))
    return first & 15, await connection.exactly(size)


async def close_code(connection):
    """The code of the close frame, past whatever was said before it."""
    while True:
        opcode, payload = await read_frame(connection)
        if opcode == CLOSE:
            return int.from_bytes(payload[:2])


@asynccontextmanager
async def raw_member(url, headers=None):
    """A member of the room that may break the protocol."""
    async with stream("GET", url, HANDSHAKE | (headers or {})) as response:
        assert response.status == 101, (await response.read()).body
        yield response.connection


async def answer_pings(member, count):
    member.patience = 60
    for _ in range(count):
        opcode, payload = await read_frame(member)
        assert opcode == PING
        await member.send(frame(PONG, payload))
