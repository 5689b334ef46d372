"""The room with `websockets` and its broadcast().

websockets_room.py PORT ARGUMENT [CERTIFICATE KEY]
"""

import asyncio
import ssl
import sys

from websockets.asyncio.server import broadcast, serve

port, tls = int(sys.argv[1]), sys.argv[3:]
members = set()


async def member(socket):
    members.add(socket)
    try:
        async for text in socket:
            broadcast(members, f"{text}--返回数据")
    finally:
        members.discard(socket)


async def main():
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) if tls else None
    if context:
        context.load_cert_chain(*tls)
    at = ("127.0.0.1", port)
    async with serve(member, *at, backlog=1024, ssl=context) as server:
        await server.serve_forever()


asyncio.run(main())
