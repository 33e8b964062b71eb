"""A proxy with aiohttp and nothing else, for comparison.

Run as `python -m benchmarks.gateway.minimal_proxy PORT UPSTREAM TOKEN`.
"""

from __future__ import annotations

import asyncio
import sys

import aiohttp
import uvloop
from aiohttp import web


async def serve(port: int, upstream: str, token: str) -> None:
    """Forward each request, and its answer as it arrives."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", "x-tunesmith-digest": "none"}
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def forward(request: web.BaseRequest) -> web.StreamResponse:
            body = await request.read()
            async with session.post(upstream + request.path, data=body, headers=headers) as answer:
                if answer.content_type != "text/event-stream":
                    return web.Response(body=await answer.read(), content_type=answer.content_type)
                response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                await response.prepare(request)
                while chunk := await answer.content.readany():
                    await response.write(chunk)
                await response.write_eof()
                return response

        runner = web.ServerRunner(web.Server(forward))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
