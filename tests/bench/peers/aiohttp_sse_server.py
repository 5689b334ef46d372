"""aiohttp with aiohttp-sse.  aiohttp_sse_server.py PORT RATE"""

import asyncio
import sys

import feed
from aiohttp import web
from aiohttp_sse import sse_response

port, rate = int(sys.argv[1]), float(sys.argv[2])


async def stream(request):
    async with sse_response(request) as response:
        async for data in feed.follow():
            await response.send(data)
    return response


async def start(app):
    app["tick"] = asyncio.create_task(feed.tick(rate))


app = web.Application()
app.router.add_get("/", stream)
app.on_startup.append(start)
web.run_app(app, host="127.0.0.1", port=port, backlog=1024, access_log=None, print=None)
