"""Serve 1,000 adapters, each with an answer of its own, from two pods with 8 slots, beside vLLM alone with all of them.

The pods have vLLM, the middleware and the agent, and a gateway in front; placement is the operator's own. Every answer
is compared with the tokens that PEFT computed. The loads are interleaved, so that other work on the machine affects
both. A run that was interrupted continues: finished loads are kept in the folder's results.json. Needs the server's
environment:

    uv run --frozen --project server-image python -m benchmarks.density.benchmark --adapters 1000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import aiohttp

from benchmarks.density import load, processes, rig
from benchmarks.density.prompt import PROMPT
from tests.server.server_rig import S3Server
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

MIB = 2**20
_PROCESSOR = "processor_ms_per_token"


@dataclass(frozen=True)
class Settings:
    """Settings of a run."""

    folder: Path
    adapters: int
    sizes: tuple[int, ...]
    clients: int
    seconds: float
    tokens: int
    repeats: int
    memory: int
    plain: tuple[tuple[int, int, int], ...]
    """Servers, slots and threads of vLLM alone."""


class Results:
    """Finished parts of a run, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def put(self, name: str, value: Any) -> None:
        """Add or replace a result."""
        self.values[name] = value
        temporary = self._path.with_suffix(".part")
        temporary.write_text(json.dumps(self.values, indent=1))
        temporary.replace(self._path)


def say(text: str) -> None:
    """Report progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


async def until(condition: Callable[[], bool], what: str, seconds: float, check: Callable[[], None]) -> None:
    """Wait for a condition, which a failure of a process ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        check()
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        await asyncio.sleep(0.2)


async def healthy(http: aiohttp.ClientSession, url: str, container: rig.Container) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + rig.START_SECONDS
    while time.monotonic() < deadline:
        if not container.running():
            raise RuntimeError(f"{container.log} ends with:\n{container.tail()}")
        with contextlib.suppress(aiohttp.ClientError, OSError):
            async with http.get(f"{url}/health") as response:
                if response.status == 200:  # noqa: PLR2004 - HTTP
                    return
        await asyncio.sleep(0.5)
    raise TimeoutError(f"{url} does not answer; see {container.log}")


@dataclass
class Contender:
    """A server with its name in the report. `usage`: returns the processor seconds of its processes so far."""

    name: str
    endpoint: load.Endpoint
    usage: Callable[[], processes.Usage]


@contextlib.asynccontextmanager
async def tunesmith(
    settings: Settings, http: aiohttp.ClientSession, store: S3Server, entries: list[rig.Object], results: Results
) -> AsyncIterator[Contender]:
    """Start pods and gateway, and register all adapters."""
    base = settings.folder / "made/base"
    capacity = max(rig.CAPACITY, -(-settings.adapters // 2))
    pods = []
    for name in ("pod-1", "pod-2"):
        folder = settings.folder / "run" / name
        shutil.rmtree(folder, ignore_errors=True)
        pods.append(rig.ServingPod(name, folder, base, store, capacity, settings.memory))
    gateway = rig.Gateway(settings.folder / "run/gateway", pods)
    operator = rig.Operator(pods, entries, capacity)
    tasks = []

    def check() -> None:
        for pod in pods:
            pod.check()
        for task in tasks:
            if task.done():
                task.result()

    try:
        for pod in pods:
            pod.agent.start()
            tasks.append(asyncio.create_task(pod.follow(http)))
        for pod in pods:
            await until((pod.pod.state / "admin-token").exists, f"the agent of {pod.name} starts", 120, lambda: None)
            pod.engine.start()
        await until(
            lambda: all(pod.state.engine_ready for pod in pods), "the engines are ready", rig.START_SECONDS, check
        )
        before = [rig.memory(pod.engine)["total"] for pod in pods]
        say("registering the adapters")
        started = time.monotonic()
        tasks.append(asyncio.create_task(operator.run(http)))
        names = {entry["engineName"] for entry in entries}
        await until(
            lambda: names <= frozenset().union(*(pod.resident for pod in pods)), "all are resident", 3600, check
        )
        results.put(
            "registration",
            {
                "seconds": time.monotonic() - started,
                "pods": [len(pod.resident) for pod in pods],
                "engine_mib_before": [size / MIB for size in before],
                "engine_mib": [rig.memory(pod.engine)["total"] / MIB for pod in pods],
                "agent_mib": [rig.memory(pod.agent)["total"] / MIB for pod in pods],
                "cache_mib": [pod.state.use.memory_bytes / MIB for pod in pods],
                "disk_mib": [rig.disk(pod.pod.adapters) / MIB for pod in pods],
                "load_ms": median(a.load_seconds for pod in pods for a in pod.state.adapters) * 1000,
            },
        )
        say(f"registered: {results.values['registration']}")
        await gateway.start(entries)
        await healthy(http, gateway.url, pods[0].engine)
        yield Contender(
            "tunesmith",
            load.Endpoint(
                lambda _: gateway.url,
                gateway.key,
                lambda number: f"team/a{number:04d}" if number >= 0 else "serving/base",
            ),
            lambda: rig.usage(pods, gateway=gateway, store=store),
        )
        check()
        results.put("moves", operator.moves)
        results.put("reloads", [pod.state.use.reloads for pod in pods])
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(AttributeError):
            await gateway.stop()
        for pod in pods:
            pod.engine.kill()
            pod.agent.kill()


@contextlib.asynccontextmanager
async def plain(
    settings: Settings, http: aiohttp.ClientSession, count: int, slots: int, threads: int, results: Results
) -> AsyncIterator[Contender]:
    """Start one or several vLLM alone, without anything in front, and load the adapters: each has an equal part."""
    name = f"{count if count > 1 else 'one'} vLLM, {slots} slots, {threads} thread{'s' * (threads > 1)}"
    servers = [
        rig.Plain(
            settings.folder / f"run/plain-{count}x{slots}x{threads}-{index}",
            settings.folder / "made/base",
            range(index, settings.adapters, count),
            slots,
            threads,
        )
        for index in range(count)
    ]
    try:
        for server in servers:
            server.engine.start()
        for server in servers:
            await healthy(http, server.url, server.engine)
        before = [rig.memory(server.engine)["total"] / MIB for server in servers]
        seconds = await asyncio.gather(*(server.load(http, settings.folder / "made") for server in servers))
        memory = [rig.memory(server.engine)["total"] / MIB for server in servers]
        results.put(f"{name}: registration", {"seconds": max(seconds), "mib_before": before, "mib": memory})
        yield Contender(
            name,
            load.Endpoint(
                lambda number: servers[max(0, number) % count].url,
                "",
                lambda number: f"a{number:04d}" if number >= 0 else "base",
            ),
            lambda: rig.usage_of("engine", *(server.engine for server in servers)),
        )
    finally:
        for server in servers:
            server.engine.kill()


async def measure(
    settings: Settings,
    http: aiohttp.ClientSession,
    contenders: Sequence[Contender],
    markers: dict[int, Sequence[int]],
    results: Results,
) -> None:
    """Run all loads that have no result yet."""
    ours = contenders[0]
    if "all" not in results.values:
        say("each adapter once, with the base model between them")
        numbers = [number for i in range(settings.adapters) for number in ((i, -1) if i % 4 == 0 else (i,))]
        outcome = await load.each(http, ours.endpoint, numbers, markers, PROMPT, clients=settings.clients)
        say(f"{outcome.figures()}")
        if outcome.failed:
            raise RuntimeError(f"{len(outcome.failed)} requests failed, such as {outcome.failed[0]}")
        results.put("all", outcome.figures())
    for repeat in range(settings.repeats):
        for size in settings.sizes:
            for distribution in ("uniform", "zipf"):
                for contender in contenders:
                    name = f"{contender.name} | {size} | {distribution} | {repeat}"
                    if name in results.values:
                        continue
                    choose = load.chooser(distribution, size, seed=repeat)
                    common = (http, contender.endpoint, choose, markers, PROMPT)
                    await load.run(*common, tokens=settings.tokens, clients=settings.clients, seconds=3)  # warm
                    before = contender.usage(), time.process_time()
                    outcome = await load.run(
                        *common, tokens=settings.tokens, clients=settings.clients, seconds=settings.seconds
                    )
                    used = contender.usage().since(before[0])
                    used["clients"] = time.process_time() - before[1]
                    results.put(name, {**outcome.figures(), _PROCESSOR: used.divided(outcome.tokens / 1000)})
                    figures = results.values[name]
                    say(
                        f"{name}: {figures['tokens_per_second']:.0f} tok/s, p50 {figures['ttft_p50']:.2f} s, "
                        f"p95 {figures['ttft_p95']:.2f} s, {figures['wrong']} wrong, {figures['failed']} failed"
                    )


def report(settings: Settings, results: Results) -> str:
    """Return the report in Markdown."""
    values = results.values
    names = list(dict.fromkeys(key.split(" | ")[0] for key in values if " | " in key))
    lines = [
        f"| adapters | distribution | {' | '.join(f'{name}: tok/s | p95 to first token, s' for name in names)} |",
        f"|---|---|{'---|---|' * len(names)}",
    ]
    for size in settings.sizes:
        for distribution in ("uniform", "zipf"):
            cells = []
            for name in names:
                runs = [
                    values[key]
                    for repeat in range(settings.repeats)
                    if (key := f"{name} | {size} | {distribution} | {repeat}") in values
                ]
                if runs:
                    cells.append(f"{median(run['tokens_per_second'] for run in runs):.0f}")
                    cells.append(f"{median(run['ttft_p95'] for run in runs):.2f}")
                else:
                    cells += ["", ""]
            lines.append(f"| {size} | {distribution} | {' | '.join(cells)} |")
    lines += ["", *_processors(settings, values, names)]
    extra = {key: value for key, value in values.items() if " | " not in key}
    return "\n".join([*lines, "", "```json", json.dumps(extra, indent=1), "```", ""])


def _processors(settings: Settings, values: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Return a table of processor milliseconds per token, by process."""
    parts = sorted({part for value in values.values() if isinstance(value, dict) for part in value.get(_PROCESSOR, ())})
    lines = [f"| adapters | server | {' | '.join(parts)} | all |", f"|---|---|{'---|' * (len(parts) + 1)}"]
    for size in settings.sizes:
        for name in names:
            runs = [
                value[_PROCESSOR]
                for key, value in values.items()
                if key.startswith(f"{name} | {size} | ") and _PROCESSOR in value
            ]
            if runs:
                found = [median(run.get(part, 0.0) for run in runs) for part in parts]
                cells = " | ".join(f"{value:.2f}" for value in [*found, sum(found)])
                lines.append(f"| {size} | {name} | {cells} |")
    return lines


async def benchmark(settings: Settings) -> int:
    """Run the benchmark, and return the exit code."""
    results = Results(settings.folder / "results.json")
    say(f"making {settings.adapters} adapters")
    rig.make(settings.folder / "made", settings.adapters)
    made = json.loads((settings.folder / "made/markers.json").read_text())
    markers = dict(enumerate(made["adapters"][: settings.adapters])) | {-1: made["base"]}
    shutil.rmtree(settings.folder / "run", ignore_errors=True)
    (settings.folder / "run").mkdir()
    (settings.folder / "run/s3").mkdir()
    store = S3Server(settings.folder / "run/s3")
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    try:
        say("publishing them")
        fingerprint = base_fingerprint(LocalModelFolder(settings.folder / "made/base"))
        entries = rig.artifacts(settings.folder / "made", fingerprint, store, settings.adapters)
        async with contextlib.AsyncExitStack() as stack:
            http = await stack.enter_async_context(
                aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=2**20)
            )
            say("starting the pods")
            contenders = [await stack.enter_async_context(tunesmith(settings, http, store, entries, results))]
            for count, slots, threads in settings.plain:
                say(f"starting {count} vLLM alone with {slots} slots and {threads} threads")
                contenders.append(
                    await stack.enter_async_context(plain(settings, http, count, slots, threads, results))
                )
            await measure(settings, http, contenders, markers, results)
    finally:
        store.stop()
    text = report(settings, results)
    (settings.folder / "report.md").write_text(text)
    print(text)
    bad = [
        key
        for key, value in results.values.items()
        if isinstance(value, dict)
        and (value.get("wrong") or value.get("failed"))
        and key.startswith(("all", "tunesmith"))
    ]
    if bad:
        say(f"wrong or failed answers: {', '.join(bad)}")
    return 1 if bad else 0


def main() -> None:
    """Parse the arguments, and run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/density"))
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 64, 1000])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--memory", type=int, default=512 * MIB, help="bytes of each engine's cache of adapters")
    parser.add_argument(
        "--plain",
        nargs="*",
        default=["1x8x1", "1x16x2", "2x8x1"],
        help="vLLM alone: servers, slots and threads of each, such as 2x8x1: two that share the adapters",
    )
    parser.add_argument("--fresh", action="store_true", help="discard the results of an earlier run")
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.fresh:
        (folder / "results.json").unlink(missing_ok=True)
    settings = Settings(
        folder=folder,
        adapters=options.adapters,
        sizes=tuple(size for size in options.sizes if size <= options.adapters),
        clients=options.clients,
        seconds=options.seconds,
        tokens=options.tokens,
        repeats=options.repeats,
        memory=options.memory,
        plain=tuple(
            (int(count), int(slots), int(threads))
            for count, slots, threads in (text.split("x") for text in options.plain)
        ),
    )
    sys.exit(asyncio.run(benchmark(settings)))


if __name__ == "__main__":
    main()
