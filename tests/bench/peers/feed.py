"""The source of the Python peers: one timer, and a queue for each reader.

In the same process, which spares them the upstream that chatstream reads from.
"""

import asyncio
import time

readers: set[asyncio.Queue] = set()
newest = None  # for a reader that joins


async def tick(rate):
    """Keep to the clock: an event that is late is sent late, none is left out."""
    global newest
    due = time.monotonic()
    while rate:
        due += 1 / rate
        await asyncio.sleep(max(0, due - time.monotonic()))
        newest = f'{{"content": "@{time.monotonic_ns():018d} "}}'
        for queue in readers:
            queue.put_nowait(newest)


async def follow():
    queue = asyncio.Queue()
    if newest:
        queue.put_nowait(newest)
    readers.add(queue)
    try:
        while True:
            yield await queue.get()
    finally:
        readers.discard(queue)
