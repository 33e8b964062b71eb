#!/usr/bin/env python3
"""Train SmolLM2-135M on the same rows with several contenders, and report the speed, memory and loss of each.

Every run is a separate process; the repeats are interleaved, so that other load on the machine affects all. The speed
counts useful tokens: those of the rows, without padding. Needs the trainer's environment:

    uv run --frozen --project trainer-image benchmarks/training/benchmark.py --rows 64 --repeats 3
    uv run --frozen --project trainer-image benchmarks/training/benchmark.py --methods lora --only tunesmith notebook
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import rows as texts

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "e2e/cluster/model.py"
VALIDATION_ROWS = 16
WHAT = {
    "notebook": ("PEFT + Trainer, pad to 512", "all positions computed, most of them padding"),
    "trl-default": ("TRL, defaults", "pads to the batch's longest; logits in chunks; activations computed twice"),
    "trl-packed": ("TRL, packing", "no padding; attention of a bin is masked, not skipped"),
    "trl-grouped": ("TRL, length grouping", "little padding; a batch has only rows of similar length"),
    "litgpt": ("litgpt", "pads to the batch's longest; its own transformer, logits at all positions"),
    "tunesmith-padded-logits": ("Tunesmith, padded, all logits", "a step's rows sorted by length"),
    "tunesmith-padded": (
        "Tunesmith, padded",
        "+ logits at target positions only, in chunks, one pass through the head",
    ),
    "tunesmith": ("Tunesmith", "+ rows concatenated without padding, attention within each row only"),
    "tunesmith-compiled": (
        "Tunesmith, torchCompile",
        "+ norms and feed-forward layers compiled (the default on GPUs only)",
    ),
}


def tokenise(base: Path, folder: Path) -> dict[str, int]:
    """Write `tokens.json`, the rows for all contenders with the answers as targets, and return their counts."""
    from tunesmith.api.finetunejob import FineTuneJob  # noqa: PLC0415
    from tunesmith_trainer.preflight.prepare import prepare  # noqa: PLC0415
    from tunesmith_trainer.store import Stores  # noqa: PLC0415

    dataset = {
        "train": [{"uri": f"file://{folder}/train.jsonl"}],
        "validation": [{"uri": f"file://{folder}/validation.jsonl"}],
        "maxLength": texts.LONGEST,
    }
    spec = {
        "baseModel": {"uri": f"file://{base}"},
        "dataset": dataset,
        "method": {"lora": {}},
        "resources": {"gpus": 0},
    }
    job = FineTuneJob.model_validate({"metadata": {"name": "benchmark"}, "spec": spec})
    prepared = prepare(job, Stores(secrets=folder, allow_file=True), folder / "prepared", weights=False)
    tokens = {
        "train": [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in prepared.train],
        "validation": [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in prepared.validation],
    }
    (folder / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")
    lengths = [len(row["input_ids"]) for row in tokens["train"]]
    return {"rows": len(lengths), "tokens": sum(lengths), "longest": max(lengths)}


def command_of(name: str, method: str) -> list[str]:
    """Return the command of a contender, without the arguments that all of them have."""
    if name == "litgpt":
        project = HERE / "litgpt"
        uv = os.environ.get("UV", "uv")
        return [uv, "run", "--quiet", "--frozen", "--project", str(project), "python", str(project / "contender.py")]
    return [sys.executable, str(HERE / "contender.py"), name, method]


def contenders(method: str, requested: list[str]) -> list[str]:
    """Return the contenders that support a method, in the table's order; report those that are omitted, and why."""
    omitted = {}
    if "litgpt" in requested:
        if method == "qlora":
            omitted["litgpt"] = "it quantises on GPUs only"
        elif subprocess.run([*command_of("litgpt", method), "--help"], capture_output=True, check=False).returncode:
            omitted["litgpt"] = "it cannot be installed on this machine"
    for name, why in omitted.items():
        print(f"  {method}: {name} is omitted: {why}", flush=True)
    return [name for name in requested if name not in omitted]


def measure(name: str, method: str, base: Path, folder: Path, threads: int) -> dict[str, Any]:
    """Return the results of one run."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads slow down all processes on shared cores
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [*command_of(name, method), "--base", str(base), "--data", str(folder), "--began", str(time.time())]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"{name} with {method} failed:\n{ran.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return figures


def table(method: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """Return the results of all runs with one method as a Markdown table: medians, and the range of the speed."""
    speeds = {name: [run["tokens"] / run["seconds"] for run in runs] for name, runs in found.items()}
    busy = {name: median(run["tokens"] / run["busy"] for run in runs) for name, runs in found.items()}
    lines = [
        f"### {method}",
        "",
        "| | useful tok/s (range) | per core second | peak memory | first step | held-out loss | where it comes from |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for name, runs in found.items():
        what, why = WHAT[name]
        speed = median(speeds[name])
        lines.append(
            f"| {what} | {speed:.0f} ({min(speeds[name]):.0f}–{max(speeds[name]):.0f}) | {busy[name]:.0f} "
            f"| {median(run['peak'] for run in runs) / 1e9:.1f} GB | {median(run['first'] for run in runs):.0f} s "
            f"| {median(run['loss'] for run in runs):.4f} | {why} |"
        )
    return "\n".join(lines)


def verdicts(method: str, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the goals and whether the results reach them; none unless all contenders that they compare ran."""
    if not {"notebook", "trl-packed", "trl-grouped", "tunesmith"} <= set(found):
        return []
    times, cores = (
        {name: median(run["tokens"] / run[seconds] for run in runs) for name, runs in found.items()}
        for seconds in ("seconds", "busy")
    )
    memory = {name: median(run["peak"] for run in runs) for name, runs in found.items()}
    lines = []
    for others, goal, what in (
        (("notebook",), 3.0, "the speed of the notebook"),
        (("trl-packed", "trl-grouped"), 1.1, "the speed of the better of TRL packed and grouped"),
    ):
        by_time, by_core = (speed["tunesmith"] / max(speed[name] for name in others) for speed in (times, cores))
        lines.append(
            f"{method}: {by_time:.2f} × {what} ({by_core:.2f} × by the time of the cores), at least {goal:g}: "
            f"{'reached' if by_time >= goal else 'MISSED'}"
        )
    share = memory["tunesmith"] / memory["trl-packed"]
    lines.append(
        f"{method}: {share:.2f} × the memory of TRL packed, at most 1: {'reached' if share <= 1 else 'MISSED'}"
    )
    return lines


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="rows to train on, once (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, interleaved (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=("lora", "qlora"), default=["lora", "qlora"], metavar="METHOD")
    parser.add_argument("--only", nargs="+", choices=tuple(WHAT), default=list(WHAT), metavar="NAME")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="threads of each run (default: all cores)"
    )
    parser.add_argument("--base", type=Path, help="folder of another base model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--output", type=Path, help="file to which the tables are also written")
    arguments = parser.parse_args()
    base = arguments.base or Path(
        subprocess.run([sys.executable, str(MODEL)], check=True, capture_output=True, text=True).stdout.split()[-1]
    )
    with tempfile.TemporaryDirectory(prefix="tunesmith-benchmark-") as temporary:
        folder = Path(temporary)
        texts.write(folder, arguments.rows, VALIDATION_ROWS)
        counts = tokenise(base, folder)
        head = (
            f"{base.name}, {counts['rows']} rows of {counts['tokens'] / counts['rows']:.0f} tokens on average (longest "
            f"{counts['longest']}), {arguments.threads} threads, {arguments.repeats} interleaved repeats"
        )
        print(head, flush=True)
        runs: dict[str, dict[str, list[dict[str, Any]]]] = {
            method: {name: [] for name in contenders(method, arguments.only)} for method in arguments.methods
        }
        for repeat in range(1, arguments.repeats + 1):
            for method in arguments.methods:
                for name, found in runs[method].items():
                    figures = measure(name, method, base, folder, arguments.threads)
                    found.append(figures)
                    print(
                        f"  repeat {repeat} {method:5} {name:24} {figures['tokens'] / figures['seconds']:6.1f} tok/s "
                        f"{figures['tokens'] / figures['busy']:6.1f} tok/core-s "
                        f"{figures['peak'] / 1e9:4.1f} GB  first step {figures['first']:4.0f} s  "
                        f"loss {figures['loss']:.4f}",
                        flush=True,
                    )
    parts = [head, *(table(method, found) for method, found in runs.items())]
    parts += ["\n".join(line for method, found in runs.items() for line in verdicts(method, found))]
    text = "\n\n".join(part for part in parts if part)
    print(f"\n{text}")
    if arguments.output is not None:
        arguments.output.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
