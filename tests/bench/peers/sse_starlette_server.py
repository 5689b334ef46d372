"""uvicorn and sse-starlette.  sse_starlette_server.py PORT RATE"""

import asyncio
import sys
from contextlib import asynccontextmanager

import feed
import uvicorn
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.routing import Route

port, rate = int(sys.argv[1]), float(sys.argv[2])


async def events():
    async for data in feed.follow():
        yield {"data": data}


async def stream(request):
    return EventSourceResponse(events())


@asynccontextmanager
async def lifespan(app):
    task = asyncio.create_task(feed.tick(rate))
    yield
    task.cancel()


app = Starlette(routes=[Route("/", stream)], lifespan=lifespan)
uvicorn.run(app, port=port, log_level="error", access_log=False)
