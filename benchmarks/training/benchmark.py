#!/usr/bin/env python3
"""Trains SmolLM2-135M on the same rows in several ways, and tells useful tokens per second, memory and loss of each.

Every run is a process of its own; the repeats are interleaved, so that a busy machine is busy for all. Useful tokens
are those of the rows, without padding. Needs the trainer's environment:

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
from contender import OTHERS, OURS, PAD_LENGTH

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "e2e/cluster/model.py"
VALIDATION_ROWS = 16
WHAT = {
    "notebook": ("PEFT + Trainer, pad to 512", "all positions computed, most of them padding"),
    "trl-default": ("TRL, defaults", "pads to the batch's longest; logits in chunks; activations computed twice"),
    "trl-packed": ("TRL, packing", "no padding; attention of a bin is masked, not skipped"),
    "trl-grouped": ("TRL, length grouping", "little padding; only similar rows meet in a batch"),
    "tunesmith-padded-logits": ("Tunesmith, padded, all logits", "a step's rows sorted by length"),
    "tunesmith-padded": (
        "Tunesmith, padded",
        "+ logits at target positions only, in chunks, one pass through the head",
    ),
    "tunesmith": ("Tunesmith", "+ rows end to end without padding, attention within each row only"),
}


def tokenise(base: Path, folder: Path) -> dict[str, int]:
    """`tokens.json`: the rows as everyone trains on them, with the loss on the answers; their counts."""
    from tunesmith.api.finetunejob import FineTuneJob  # noqa: PLC0415
    from tunesmith_trainer.prepare import prepare  # noqa: PLC0415
    from tunesmith_trainer.store import Stores  # noqa: PLC0415

    dataset = {
        "train": [{"uri": f"file://{folder}/train.jsonl"}],
        "validation": [{"uri": f"file://{folder}/validation.jsonl"}],
        "maxLength": PAD_LENGTH,
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


def measure(name: str, method: str, base: Path, folder: Path, threads: int) -> dict[str, Any]:
    """The figures of one run."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads slow everyone down where cores are shared
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [sys.executable, str(HERE / "contender.py"), name, method]
    command += ["--base", str(base), "--data", str(folder), "--began", str(time.time())]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        sys.exit(f"{name} with {method} failed:\n{ran.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return figures


def table(method: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """The figures of all runs with one method, as a table in Markdown: medians, and the range of the speed."""
    speeds = {name: [run["tokens"] / run["seconds"] for run in runs] for name, runs in found.items()}
    against = median(speeds["notebook"]) if "notebook" in speeds else None
    lines = [
        f"### {method}",
        "",
        "| | useful tok/s (range) | × notebook | peak memory | first step | held-out loss | where it comes from |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for name, runs in found.items():
        what, why = WHAT[name]
        speed = median(speeds[name])
        times = f"{speed / against:.1f}" if against else ""
        lines.append(
            f"| {what} | {speed:.0f} ({min(speeds[name]):.0f}–{max(speeds[name]):.0f}) | {times} "
            f"| {median(run['peak'] for run in runs) / 1e9:.1f} GB | {median(run['first'] for run in runs):.0f} s "
            f"| {median(run['loss'] for run in runs):.4f} | {why} |"
        )
    return "\n".join(lines)


def verdicts(method: str, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The aims, and whether these figures reach them; only those whose contenders ran."""
    if not {"notebook", "trl-packed", "trl-grouped", "tunesmith"} <= set(found):
        return []
    speed = {name: median(run["tokens"] / run["seconds"] for run in runs) for name, runs in found.items()}
    memory = {name: median(run["peak"] for run in runs) for name, runs in found.items()}
    better = max(speed["trl-packed"], speed["trl-grouped"])
    ratios = {
        "times the notebook's speed, at least 3": (speed["tunesmith"] / speed["notebook"], 3.0, 1),
        "times the better of TRL packed and grouped, at least 1.1": (speed["tunesmith"] / better, 1.1, 1),
        "times the memory of TRL packed, at most 1": (memory["tunesmith"] / memory["trl-packed"], 1.0, -1),
    }
    return [
        f"{method}: {value:.2f} {what}: {'reached' if (value - aim) * sign >= 0 else 'MISSED'}"
        for what, (value, aim, sign) in ratios.items()
    ]


def main() -> None:
    """Runs everything and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="rows to train on, once (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, interleaved (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=("lora", "qlora"), default=["lora", "qlora"], metavar="METHOD")
    parser.add_argument("--only", nargs="+", choices=(*OTHERS, *OURS), default=[*OTHERS, *OURS], metavar="NAME")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each run (default: all cores)")
    parser.add_argument("--base", type=Path, help="folder of another base model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--output", type=Path, help="write the tables there too")
    given = parser.parse_args()
    base = given.base or Path(
        subprocess.run([sys.executable, str(MODEL)], check=True, capture_output=True, text=True).stdout.split()[-1]
    )
    with tempfile.TemporaryDirectory(prefix="tunesmith-benchmark-") as temporary:
        folder = Path(temporary)
        texts.write(folder, given.rows, VALIDATION_ROWS)
        counts = tokenise(base, folder)
        head = (
            f"{base.name}, {counts['rows']} rows of {counts['tokens'] / counts['rows']:.0f} tokens on average (longest "
            f"{counts['longest']}), {given.threads} threads, {given.repeats} interleaved repeats"
        )
        print(head, flush=True)
        runs: dict[str, dict[str, list[dict[str, Any]]]] = {
            method: {name: [] for name in given.only} for method in given.methods
        }
        for repeat in range(1, given.repeats + 1):
            for method in given.methods:
                for name in given.only:
                    figures = measure(name, method, base, folder, given.threads)
                    runs[method][name].append(figures)
                    print(
                        f"  repeat {repeat} {method:5} {name:24} {figures['tokens'] / figures['seconds']:6.1f} tok/s "
                        f"{figures['peak'] / 1e9:4.1f} GB  first step {figures['first']:4.0f} s  "
                        f"loss {figures['loss']:.4f}",
                        flush=True,
                    )
    parts = [head, *(table(method, found) for method, found in runs.items())]
    parts += ["\n".join(line for method, found in runs.items() for line in verdicts(method, found))]
    text = "\n\n".join(part for part in parts if part)
    print(f"\n{text}")
    if given.output is not None:
        given.output.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
