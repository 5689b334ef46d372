"""uvicorn and Starlette's StreamingResponse.  starlette_sse.py PORT RATE [CERT KEY]"""

import asyncio
import sys
from contextlib import asynccontextmanager

import feed
import uvicorn
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

port, rate, tls = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]


async def frames():
    async for data in feed.follow():
        yield f"data: {data}\n\n"


async def stream(request):
    headers = {"Cache-Control": "no-cache"}
    return StreamingResponse(frames(), media_type="text/event-stream", headers=headers)


@asynccontextmanager
async def lifespan(app):
    task = asyncio.create_task(feed.tick(rate))
    yield
    task.cancel()


app = Starlette(routes=[Route("/", stream)], lifespan=lifespan)
secure = dict(zip(("ssl_certfile", "ssl_keyfile"), tls, strict=False))
uvicorn.run(app, port=port, log_level="error", access_log=False, **secure)
