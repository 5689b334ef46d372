"""The room with `websockets` and its broadcast().  websockets_room.py PORT"""

import asyncio
import sys

from websockets.asyncio.server import broadcast, serve

members = set()


async def member(socket):
    members.add(socket)
    try:
        async for text in socket:
            broadcast(members, f"{text}--返回数据")
    finally:
        members.discard(socket)


async def main():
    async with serve(member, "127.0.0.1", int(sys.argv[1]), backlog=1024) as server:
        await server.serve_forever()


asyncio.run(main())
