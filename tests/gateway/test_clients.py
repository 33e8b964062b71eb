"""Client libraries against a gateway whose pod answers in vLLM's formats: chat, stream, tools, responses, errors."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from tests.gateway.gateway_rig import adapter_manifest
from tests.gateway.vllm_answers import answer

if TYPE_CHECKING:
    from tests.gateway.gateway_rig import Rig

PROJECT = Path(__file__).parents[1] / "clients"
PYTHON = PROJECT / ".venv/bin/python"
PIRATE = "team/pirate@aaaaaaaaaaaa"


async def respond(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    status, content = answer(request.path, body)
    if isinstance(content, bytes):
        headers = {"x-tunesmith-no-route": "true"} if status == 404 else {}
        return web.Response(status=status, body=content, content_type="application/json", headers=headers)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    for event in content:
        await response.write(event)
    await response.write_eof()
    return response


@pytest.mark.parametrize("library", ["openai", "anthropic", "langchain", "llama-index", "litellm"])
async def test_a_client_library_chats_streams_and_calls_tools(rig: Rig, library: str) -> None:
    if not PYTHON.exists():
        pytest.fail(f"the client libraries are missing: run `uv sync --project {PROJECT}`", pytrace=False)
    rig.watches.put(adapter_manifest("pirate"))
    pod = await rig.add_pod(PIRATE)
    pod.answer = respond
    # The libraries reach the gateway only, and report to nobody.
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "no_proxy": "127.0.0.1"}
    process = await asyncio.create_subprocess_exec(
        *(PYTHON, PROJECT / "calls.py", library, rig.url, rig.key, "team/pirate"),
        env={name: value for name, value in environment.items() if name != "PYTHONPATH"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()[-4000:]
    assert pod.seen
