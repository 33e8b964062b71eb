"""Measure the CPU time that the gateway takes for a request and for a chunk of a stream, beside a minimal proxy.

The contenders are processes of their own; client and engine share another one, which is not counted. CPU time is the
scheduler's, so other work on the machine distorts it less than wall-clock time; the contenders take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import aiohttp
import uvloop
from aiohttp import web

from tests.gateway.gateway_rig import adapter_manifest, free_ports
from tests.gateway.process_rig import PIRATE, ProcessRig
from tunesmith.contracts.agent import serving_keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MIB = 2**20
REPOSITORY = Path(__file__).resolve().parents[2]
_CHUNK = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"%s","choices":[{"index":0,'
    b'"delta":{"content":" word"},"logprobs":null,"finish_reason":null}]}\n\n'
) % PIRATE.encode()
_STEP_SECONDS = 0.004
"""Time between the chunks of a stream, so that each arrives by itself as an engine's tokens do."""
_BODY = {
    "model": "pirate",
    "messages": [
        {"role": "system", "content": "You are a pirate. " * 20},
        {"role": "user", "content": "Where is the treasure? " * 20},
    ],
    "temperature": 0.7,
    "max_tokens": 200,
}


@dataclass
class Contender:
    """A process under load. CPU seconds per request and per chunk, one of each round."""

    name: str
    pid: int
    url: str
    key: str
    per_request: list[float] = field(default_factory=list)
    per_chunk: list[float] = field(default_factory=list)

    def cpu(self) -> float:
        """Return the CPU seconds of all threads so far."""
        tasks = Path(f"/proc/{self.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def memory(self) -> float:
        """Return the resident memory in MiB."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / MIB


async def ask(http: aiohttp.ClientSession, contender: Contender, body: bytes) -> None:
    """Send a request, and read its answer."""
    headers = {"Authorization": f"Bearer {contender.key}", "Content-Type": "application/json"}
    async with http.post(f"{contender.url}/v1/chat/completions", data=body, headers=headers) as response:
        data = await response.read()
        if response.status != 200:  # noqa: PLR2004 - HTTP
            raise RuntimeError(f"{contender.name}: {response.status} {data[:300]!r}")


async def load(http: aiohttp.ClientSession, contender: Contender, count: int, clients: int, **fields: Any) -> float:
    """Send `count` requests, and return the CPU seconds of each."""
    body = json.dumps(_BODY | fields).encode()
    remaining = iter(range(count))

    async def client() -> None:
        for _ in remaining:
            await ask(http, contender, body)

    before = contender.cpu()
    await asyncio.gather(*(client() for _ in range(clients)))
    return (contender.cpu() - before) / count


@contextlib.asynccontextmanager
async def gateway(name: str, adapters: int, chunks: int, *options: str) -> AsyncIterator[Contender]:
    """Start a gateway with a pod and a number of adapters."""
    with tempfile.TemporaryDirectory() as folder:
        async with ProcessRig(Path(folder), *options) as rig:
            rig.pod.answer = _stream(chunks)
            for number in range(adapters):
                rig.put(adapter_manifest(f"adapter-{number}", f"team-{number // 100}"))
            contender = Contender(name, rig._process.pid, rig.url, rig.key)  # noqa: SLF001 - its process is measured
            if adapters:
                # The watch is in order: once the last object is known, the others are as well.
                rig.put(adapter_manifest("last"))
                await _known(rig)
            yield contender


async def _known(rig: ProcessRig) -> None:
    headers = {"Authorization": f"Bearer {rig.key}"}
    while True:
        async with rig.http.get(f"{rig.url}/v1/models", headers=headers) as response:
            if b"team/last" in await response.read():
                return
        await asyncio.sleep(0.1)


def _stream(chunks: int) -> Any:
    """Return the engine's answer: a stream of single chunks, or None for its usual answer."""

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse | None:
        if not body.get("stream"):
            return None
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(chunks):
            await response.write(_CHUNK)
            await asyncio.sleep(_STEP_SECONDS)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    return answer


@contextlib.asynccontextmanager
async def minimal(chunks: int) -> AsyncIterator[Contender]:
    """Start the minimal proxy with a pod of its own."""
    with tempfile.TemporaryDirectory() as folder:
        async with ProcessRig(Path(folder)) as rig:
            rig.pod.answer = _stream(chunks)
            (port,) = free_ports(1)
            token = rig.pod.tokens(serving_keys)[0]
            upstream = f"http://{rig.pod.address}:{rig._engine_port}"  # noqa: SLF001 - the same engine
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "benchmarks.gateway.minimal_proxy", str(port), upstream, token),
                env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
            )
            contender = Contender("minimal aiohttp", process.pid, f"http://127.0.0.1:{port}", "any")
            try:
                async with asyncio.timeout(120):
                    while True:
                        with contextlib.suppress(aiohttp.ClientError):
                            await ask(rig.http, contender, json.dumps(_BODY | {"model": PIRATE}).encode())
                            break
                        await asyncio.sleep(0.1)
                yield contender
            finally:
                process.terminate()
                await process.wait()


async def benchmark(options: argparse.Namespace) -> None:
    """Run all rounds, and print the table."""
    async with contextlib.AsyncExitStack() as stack:
        contenders = [await stack.enter_async_context(minimal(options.chunks))]
        contenders.append(await stack.enter_async_context(gateway("gateway", 0, options.chunks)))
        if options.adapters:
            name = f"gateway, {options.adapters:,} adapters"
            contenders.append(await stack.enter_async_context(gateway(name, options.adapters, options.chunks)))
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        for number in range(options.rounds + 1):
            for contender in contenders:
                model = {"model": PIRATE} if contender.name.startswith("minimal") else {}
                request = await load(http, contender, options.requests, options.clients, **model)
                streams = options.requests // 20
                stream = await load(http, contender, streams, options.clients, stream=True, **model)
                if number:  # the first round warms up
                    contender.per_request.append(request)
                    contender.per_chunk.append((stream - request) / options.chunks)
        print("| | CPU per request | CPU per 10,000 chunks | requests per CPU second | memory |\n|---|---|---|---|---|")
        for contender in contenders:
            request, chunk = median(contender.per_request), median(contender.per_chunk)
            print(
                f"| {contender.name} | {request * 1e6:.0f} µs | {chunk * 1e4:.2f} s | {1 / request:,.0f} "
                f"| {contender.memory():.0f} MiB |"
            )


def main() -> None:
    """Parse the arguments, and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=4000, help="of each contender and round")
    parser.add_argument("--chunks", type=int, default=200, help="of each stream")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--adapters", type=int, default=10_000, help="of the last contender; 0: omit it")
    uvloop.run(benchmark(parser.parse_args()))


if __name__ == "__main__":
    main()
