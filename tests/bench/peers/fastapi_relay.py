"""FastAPI and httpx2 as a relay, the bytes passed on unread.

fastapi_relay.py PORT UPSTREAM_URL
"""

import sys
from contextlib import asynccontextmanager

import httpx2
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask

port, upstream = int(sys.argv[1]), sys.argv[2]
limits = httpx2.Limits(max_connections=None)


@asynccontextmanager
async def lifespan(app):
    async with httpx2.AsyncClient(timeout=None, limits=limits) as client:
        app.state.client = client
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/v1/chat/completions")
async def relay(request: Request):
    client = request.app.state.client
    url, question = f"{upstream}/chat/completions", await request.body()
    asked = client.build_request("POST", url, content=question)
    answer = await client.send(asked, stream=True)
    return StreamingResponse(
        answer.aiter_raw(),
        status_code=answer.status_code,
        media_type="text/event-stream",
        background=BackgroundTask(answer.aclose),
    )


uvicorn.run(app, port=port, log_level="error", access_log=False)
