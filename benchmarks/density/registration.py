"""Register adapters on one pod, and print the processor seconds of each process for each adapter.

Processor seconds are comparable on a machine that does other work, unlike the time on a clock. Three variants are
registered by one engine, one after the other: adapters without expected answers, adapters whose parity is reported, and
the latter with parity required. With `--worker-process`, vLLM computes in a process of its own, which is its default on
CPUs. Needs the server's environment:

    uv run --frozen --project server-image python -m benchmarks.density.registration --adapters 60
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from benchmarks.density import rig
from benchmarks.density.benchmark import MIB, healthy, say, until
from tests.server.server_rig import S3Server
from tunesmith.api.parity import ParityMode, ParityVerdict
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint

if TYPE_CHECKING:
    from collections.abc import Mapping

_COUNTERS = re.compile(
    r"^vllm:(prompt_tokens_total|generation_tokens_total|request_success_total)\{[^}]*\} (\S+)$", re.MULTILINE
)


async def counters(http: aiohttp.ClientSession, pod: rig.ServingPod) -> dict[str, float]:
    """Return vLLM's counters of completions and tokens."""
    headers = {"Authorization": f"Bearer {pod.pod.admin_token}"}
    async with http.get(f"{pod.pod.engine_url}/metrics", headers=headers) as response:
        text = await response.text()
    found: dict[str, float] = {}
    for name, value in _COUNTERS.findall(text):
        found[name] = found.get(name, 0.0) + float(value)
    return found


def is_done(pod: rig.ServingPod, names: set[str], *, checked: bool) -> bool:
    """Return True if the adapters are resident, and their parity is known."""
    found = {a.engine_name: a for a in pod.state.adapters if a.engine_name in names}
    return names <= pod.resident & found.keys() and (
        not checked
        or all(a.parity is not None and a.parity.verdict is not ParityVerdict.UNFINISHED for a in found.values())
    )


async def register(
    http: aiohttp.ClientSession, pod: rig.ServingPod, store: S3Server, entries: list[rig.Object], *, checked: bool
) -> dict[str, Any]:
    """Register adapters that the pod has not had before, and return the seconds for each."""
    names = {entry["engineName"] for entry in entries}
    before, counted, started = rig.usage([pod], store=store), await counters(http, pod), time.monotonic()
    await pod.want(http, entries)
    await until(lambda: is_done(pod, names, checked=checked), "all are registered", 3600, pod.check)
    seconds = time.monotonic() - started
    used, after, count = rig.usage([pod], store=store).since(before), await counters(http, pod), len(entries)
    verdicts = {a.parity.verdict.value for a in pod.state.adapters if a.parity is not None}
    return {
        "clock seconds": round(seconds / count, 3),
        "processor seconds": {**used.divided(count), "all": round(sum(used.values()) / count, 4)},
        "engine": {name: round((after[name] - counted.get(name, 0.0)) / count, 2) for name in sorted(after)},
        "verdicts": sorted(verdicts),
    }


async def measure(folder: Path, count: int, variables: Mapping[str, str]) -> dict[str, Any]:
    """Start a pod, and register the adapters in each variant. `variables`: further ones of vLLM."""
    rig.make(folder / "made", count, parity=True)
    shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "run/s3").mkdir(parents=True)
    store = S3Server(folder / "run/s3")
    pod = rig.ServingPod(
        "pod-1", folder / "run/pod-1", folder / "made/base", store, 3 * count + 1, 512 * MIB, variables=variables
    )
    results: dict[str, Any] = {}
    following = None
    try:
        fingerprint = base_fingerprint(LocalModelFolder(folder / "made/base"))
        plain = rig.artifacts(folder / "made", fingerprint, store, count, parity=False)
        with_parity = rig.artifacts(folder / "made", fingerprint, store, count)
        required = rig.artifacts(folder / "made", fingerprint, store, count, prefix="r")
        async with aiohttp.ClientSession() as http:
            pod.agent.start()
            following = asyncio.create_task(pod.follow(http))
            await until((pod.pod.state / "admin-token").exists, "the agent starts", 120, lambda: None)
            pod.engine.start()
            await healthy(http, pod.pod.engine_url, pod.engine)
            await until(lambda: pod.state.engine_ready, "the engine is ready", rig.START_SECONDS, pod.check)
            say(f"process groups: engine {pod.engine.group}, agent {pod.agent.group}")
            for name, entries, mode in (
                ("without expected answers", plain, ParityMode.REPORT),
                ("parity reported", with_parity, ParityMode.REPORT),
                ("parity required", required, ParityMode.REQUIRED),
            ):
                wanted = [{**entry, "parity": mode.value} for entry in entries]
                results[name] = await register(http, pod, store, wanted, checked=mode is not ParityMode.OFF)
                say(f"{name}, for each of {count} adapters: {json.dumps(results[name], indent=1)}")
                await pod.want(http, [])
                await until(lambda: not pod.state.adapters, "all are removed", 600, pod.check)
    finally:
        if following is not None:
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following
        pod.engine.kill()
        pod.agent.kill()
        store.stop()
    return results


def main() -> None:
    """Parse the arguments, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/density-registration"))
    parser.add_argument("--adapters", type=int, default=60)
    parser.add_argument("--worker-process", action="store_true", help="as vLLM starts without a variable of the image")
    options = parser.parse_args()
    folder = options.folder.resolve()
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} if options.worker_process else {}
    results = asyncio.run(measure(folder, options.adapters, variables))
    (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
