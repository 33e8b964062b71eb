"""Compare the gateway's choice of pods with other policies: two pods with 4 adapter slots, on this machine.

The pods have vLLM, the middleware and the agent; the gateway is the real one, with its choice replaced. Every adapter
is resident on both pods. Two loads: single requests for adapters by Zipf's law, and chats of several turns. All
policies take turns in each repeat, so that other work on the machine affects them alike. Needs the server's
environment:

    uv run --frozen --project server-image python -m benchmarks.routing.benchmark
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import aiohttp

from benchmarks.density import load, rig
from benchmarks.density.benchmark import healthy, say, until
from tests.server.server_rig import S3Server, make_adapter, model_folder
from tunesmith.contracts.agent import pod_tokens, serving_keys
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

MIB = 2**20
SLOTS = 4
SINGLE = ("tunesmith", "round-robin", "consistent hashing", "least-loaded")
CHATS = ("tunesmith", "without affinity", "round-robin", "least-loaded")
_CACHE = re.compile(r"^vllm:prefix_cache_(queries|hits)_total\{[^}]*\} (\S+)$", re.MULTILINE)
_WORDS = (
    "sail",
    "rum",
    "gold",
    "storm",
    "island",
    "parrot",
    "captain",
    "harbour",
    "treasure",
    "mast",
    "cannon",
    "reef",
)


@dataclass(frozen=True)
class Settings:
    """Settings of a run. Times in seconds."""

    folder: Path
    sizes: tuple[int, ...]
    clients: int
    seconds: float
    tokens: int
    repeats: int
    chats: int
    chat_adapters: int
    turns: int


@dataclass
class Outcome:
    """Result of a load: seconds to the first token of each request, and tokens of prefixes from vLLM's metrics."""

    seconds: float = 0.0
    tokens: int = 0
    failed: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    queries: float = 0.0
    hits: float = 0.0

    def figures(self) -> dict[str, Any]:
        """Return the figures for the report."""
        ordered = sorted(self.first)

        def quantile(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")

        return {
            "requests": len(ordered),
            "failed": self.failed[:3],
            "tokens_per_second": self.tokens / self.seconds,
            "ttft_p50": quantile(0.5),
            "ttft_p95": quantile(0.95),
            "hits": self.hits / self.queries if self.queries else 0.0,
        }


class World:
    """The pods, and the gateway that is started for each policy."""

    def __init__(
        self, folder: Path, http: aiohttp.ClientSession, pods: Sequence[rig.ServingPod], entries: list[rig.Object]
    ) -> None:
        self._folder, self._http, self._entries = folder, http, entries
        self._pods = list(pods)
        self._endpoint: load.Endpoint

    @contextlib.asynccontextmanager
    async def policy(self, name: str) -> AsyncIterator[None]:
        """Start a gateway with a policy."""
        gateway = rig.Gateway(self._folder / "gateway", self._pods)
        os.environ["ROUTING_POLICY"] = name
        await gateway.start(self._entries, "--no-access-log", program="benchmarks.routing.gateway")
        try:
            await healthy(self._http, gateway.url, self._pods[0].engine)
            self._endpoint = load.Endpoint(lambda _: gateway.url, gateway.key, lambda number: f"team/a{number:04d}")
            # The gateway holds requests until it has read the pods' streams.
            outcome = Outcome()
            await self.ask(0, outcome, prompt="Ahoy", max_tokens=1)
            if outcome.failed:
                raise RuntimeError(outcome.failed[0])
            yield
        finally:
            await gateway.stop()

    async def ask(self, number: int, outcome: Outcome, **fields: Any) -> None:
        """Send one request as a stream, and count its answer. The answer's text does not matter."""
        body = {"model": self._endpoint.model(number), "temperature": 0, "ignore_eos": True, "stream": True, **fields}
        path = "chat/completions" if "messages" in fields else "completions"
        headers = {"Authorization": f"Bearer {self._endpoint.key}"}
        started, first = time.monotonic(), None
        async with self._http.post(f"{self._endpoint.url(number)}/v1/{path}", json=body, headers=headers) as response:
            if response.status != 200:  # noqa: PLR2004 - HTTP
                outcome.failed.append(f"{response.status} {(await response.text())[:200]}")
                return
            async for line in response.content:
                if line.startswith(b"data: {") and b'"choices":[{' in line and b'"role":"assistant"' not in line:
                    first = first or time.monotonic()
        outcome.first.append((first or time.monotonic()) - started)
        outcome.tokens += fields["max_tokens"]

    async def cache(self) -> tuple[float, float]:
        """Return the tokens of all prompts, and those of them that were in a prefix cache, of both pods."""
        totals = {"queries": 0.0, "hits": 0.0}
        for pod in self._pods:
            metadata = rig.pool_manifest()["metadata"]
            keys = serving_keys(rig.GATEWAY_KEYS, metadata["namespace"], metadata["uid"])
            headers = {"Authorization": f"Bearer {pod_tokens(keys, pod.uid)[0]}"}
            async with self._http.get(f"{pod.pod.engine_url}/metrics", headers=headers) as response:
                response.raise_for_status()
                for name, value in _CACHE.findall(await response.text()):
                    totals[name] += float(value)
        return totals["queries"], totals["hits"]

    async def measure(self, client: Callable[[Outcome], Awaitable[None]], clients: int) -> Outcome:
        """Run a load: as many clients as given, until each of them has finished."""
        outcome = Outcome()
        queries, hits = await self.cache()
        started = time.monotonic()
        await asyncio.gather(*(client(outcome) for _ in range(clients)))
        outcome.seconds = time.monotonic() - started
        after = await self.cache()
        outcome.queries, outcome.hits = after[0] - queries, after[1] - hits
        return outcome


async def single(world: World, settings: Settings, size: int, repeat: int) -> Outcome:
    """Let clients send requests with prompts of their own, for adapters by Zipf's law, for some time."""
    pick = load.chooser("zipf", size, seed=repeat)
    chance = random.Random(repeat)  # noqa: S311 - a load
    deadline = time.monotonic() + settings.seconds

    async def client(outcome: Outcome) -> None:
        while time.monotonic() < deadline:
            prompt = [chance.randrange(1000, 40_000) for _ in range(24)]
            await world.ask(pick(), outcome, prompt=prompt, max_tokens=settings.tokens)

    return await world.measure(client, settings.clients)


async def chats(world: World, settings: Settings, repeat: int) -> Outcome:
    """Let users have one chat each: every turn repeats the history."""
    pick = load.chooser("zipf", settings.chat_adapters, seed=repeat)
    chance = random.Random(f"{repeat} {time.time()}")  # noqa: S311 - a load; no chat is in a cache already

    def words(count: int) -> str:
        return " ".join(chance.choices(_WORDS, k=count))

    async def client(outcome: Outcome) -> None:
        number = pick()
        messages = [{"role": "system", "content": "Answer as a pirate. " * 8}]
        for _ in range(settings.turns):
            messages.append({"role": "user", "content": words(80)})
            await world.ask(number, outcome, messages=messages, max_tokens=settings.tokens)
            messages.append({"role": "assistant", "content": words(20)})

    return await world.measure(client, settings.chats)


@contextlib.asynccontextmanager
async def started(settings: Settings, http: aiohttp.ClientSession) -> AsyncIterator[World]:
    """Start the store and the pods with all adapters."""
    folder = settings.folder
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "s3").mkdir(parents=True)
    base = model_folder()
    count = max(*settings.sizes, settings.chat_adapters)
    async with contextlib.AsyncExitStack() as stack:
        store = S3Server(folder / "s3")
        stack.callback(store.stop)
        say(f"making {count} adapters")
        fingerprint = base_fingerprint(LocalModelFolder(base))
        entries = []
        for number in range(count):
            artifact = make_adapter(folder / f"adapters/{number:04d}", base, fingerprint, seed=number)
            entries.append(artifact.publish(store, rig.NAMESPACE, f"a{number:04d}"))
        say("starting the pods")
        options = ("--max-model-len", "2048", "--kv-cache-memory-bytes", str(640 * MIB))
        pods = []
        for name in ("pod-1", "pod-2"):
            pod = rig.ServingPod(name, folder / name, base, store, count, 2**30, slots=SLOTS, options=options)
            pods.append(pod)
            pod.agent.start()
            stack.callback(pod.agent.kill)
            await until((pod.pod.state / "admin-token").exists, f"the agent of {name} starts", 300, lambda: None)
            pod.engine.start()
            stack.callback(pod.engine.kill)
            follow = asyncio.create_task(pod.follow(http))
            stack.callback(follow.cancel)

        def check() -> None:
            for pod in pods:
                pod.check()

        await until(
            lambda: all(pod.state.engine_ready for pod in pods), "the engines are ready", rig.START_SECONDS, check
        )
        say("registering the adapters")
        names = {entry["engineName"] for entry in entries}
        for pod in pods:
            await pod.want(http, entries)
        await until(lambda: all(names <= pod.resident for pod in pods), "all are resident", 3600, check)
        yield World(folder, http, pods, entries)


def report(settings: Settings, results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the tables in Markdown: medians of the repeats."""

    def cell(load_name: str, policy: str, measure: str, form: str) -> str:
        return format(median(figures[measure] for figures in results[f"{load_name} | {policy}"]), form)

    names = " | ".join(f"{policy}: tok/s | p95 to first token, s" for policy in SINGLE)
    lines = [f"| adapters | {names} |", f"|---|{'---|---|' * len(SINGLE)}"]
    for size in settings.sizes:
        cells = [
            cell(str(size), policy, measure, form)
            for policy in SINGLE
            for measure, form in (("tokens_per_second", ".0f"), ("ttft_p95", ".2f"))
        ]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    lines += ["", "| chats | prefix hits | p50 to first token, s | p95, s | tok/s |", "|---|---|---|---|---|"]
    for policy in CHATS:
        forms = (("hits", ".0%"), ("ttft_p50", ".2f"), ("ttft_p95", ".2f"), ("tokens_per_second", ".0f"))
        lines.append(f"| {policy} | {' | '.join(cell('chats', policy, *form) for form in forms)} |")
    return "\n".join(lines) + "\n"


async def benchmark(settings: Settings) -> int:
    """Run all loads with all policies, and return the exit code."""
    results: dict[str, list[dict[str, Any]]] = {}
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=2**20) as http,
        started(settings, http) as world,
    ):
        for repeat in range(settings.repeats):
            loads = [*map(str, settings.sizes), "chats"]
            for name in loads:
                for policy in CHATS if name == "chats" else SINGLE:
                    async with world.policy(policy):
                        outcome = await (
                            chats(world, settings, repeat)
                            if name == "chats"
                            else single(world, settings, int(name), repeat)
                        )
                    figures = outcome.figures()
                    results.setdefault(f"{name} | {policy}", []).append(figures)
                    say(f"{name} | {policy}: {json.dumps(figures)}")
    (settings.folder / "results.json").write_text(json.dumps(results, indent=1))
    text = report(settings, results)
    (settings.folder / "report.md").write_text(text)
    print(text)
    failed = [name for name, runs in results.items() if any(figures["failed"] for figures in runs)]
    if failed:
        say(f"failed requests: {', '.join(failed)}")
    return 1 if failed else 0


def main() -> None:
    """Parse the arguments, and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/routing"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 64], help="numbers of adapters")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60, help="of each load of single requests")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chats", type=int, default=12, help="at a time")
    parser.add_argument("--chat-adapters", type=int, default=4)
    parser.add_argument("--turns", type=int, default=6, help="of each chat")
    options = parser.parse_args()
    values = vars(options) | {"folder": options.folder.resolve(), "sizes": tuple(options.sizes)}
    raise SystemExit(asyncio.run(benchmark(Settings(**values))))


if __name__ == "__main__":
    main()
