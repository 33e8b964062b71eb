"""Compare the operator's scaling with other controllers on a day of requests for 200 adapters.

The decisions are the operator's own code; requests, pods and time are simulated (`tunesmith.autoscale.simulate`). Each
other controller gets the setting with the fewest GPU-hours at which its 99th percentile of waits is not above the
operator's.
"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.autoscaling.day import day
from tunesmith.api.autoscaling import AdapterAutoscaling, PoolAutoscaling
from tunesmith.autoscale.policies import Dynamo, Fixed, Hpa, Tunesmith
from tunesmith.autoscale.simulate import Timing, simulate, smallest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith.autoscale.simulate import Arrival, Outcome

MAX_PODS = 30
TIMING = Timing(start_seconds=75.0, load_seconds=1.0, concurrency=16, capacity=256, slots=8)
POOL = PoolAutoscaling(min_replicas=1, max_replicas=MAX_PODS, target_concurrency=12)
ADAPTER = AdapterAutoscaling(min_replicas=0, max_replicas=MAX_PODS)
LESS_THAN_FIXED, LESS_THAN_HPA = 0.40, 0.15
"""Shares of the GPU-hours of the best fixed pool, and of the best HorizontalPodAutoscaler, that must be saved."""


def compare(trace: Sequence[Arrival]) -> list[tuple[str, Outcome]]:
    """Return the outcomes; a controller that waits longer with every setting is missing."""
    models = sorted({arrival.model for arrival in trace})
    start = datetime(2026, 1, 1, tzinfo=UTC)
    own = simulate(trace, Tunesmith(start, POOL, dict.fromkeys(models, ADAPTER), TIMING), TIMING)
    found = [("tunesmith", own)]
    print(_row(*found[0]), flush=True)
    others = (
        ("fixed pool, {} pods", lambda pods: Fixed(pods, models), MAX_PODS),
        # A lower target costs more and waits less, as more pods do.
        ("HPA, target {}", lambda step: Hpa(17 - step, 1, MAX_PODS, models), 16),
        ("Dynamo-like, {} pods", lambda pods: Dynamo(Fixed(pods, models), TIMING.slots), MAX_PODS),
    )
    for name, policy_of, most in others:
        best = smallest(trace, policy_of, TIMING, own.wait(0.99), own.unserved, most)
        if best is not None:
            setting = 17 - best[0] if name.startswith("HPA") else best[0]
            found.append((name.format(setting), best[1]))
            print(_row(*found[-1]), flush=True)
    return found


def _row(name: str, outcome: Outcome) -> str:
    sizes = [size for _, size in outcome.sizes]
    waits = " | ".join(f"{outcome.wait(share):.2f} s" for share in (0.5, 0.95, 0.99, 0.999))
    return f"| {name} | {outcome.gpu_hours:.1f} | {min(sizes)}–{max(sizes)} | {outcome.changes} | {waits} |"


def main() -> None:
    """Print the table, and exit with 1 if too little is saved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=200, help="number of adapters")
    parser.add_argument("--hours", type=float, default=24.0, help="length of the trace, from midnight")
    parser.add_argument("--seed", type=int, default=1, help="seed of the trace")
    parser.add_argument("--plot", type=Path, help="PNG to write; needs matplotlib")
    arguments = parser.parse_args()
    trace = day(arguments.adapters, arguments.hours * 3600, arguments.seed)
    print(f"{len(trace)} requests in {arguments.hours:g} hours for {arguments.adapters} adapters\n")
    print(
        "| controller | GPU-hours | pods | changes | wait p50 | p95 | p99 | p99.9 |\n|---|---|---|---|---|---|---|---|"
    )
    outcomes = compare(trace)
    if arguments.plot is not None:
        from tunesmith.cli.plot import plot_outcomes  # noqa: PLC0415 - an optional extra

        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        plot_outcomes(outcomes, arguments.plot)
    own = outcomes[0][1].gpu_hours
    print()
    failed = False
    for name, outcome in outcomes[1:]:
        saved = 1 - own / outcome.gpu_hours
        needed = LESS_THAN_FIXED if "fixed" in name else LESS_THAN_HPA if "HPA" in name else 0.0
        failed |= saved < needed
        print(f"{100 * saved:.0f} % fewer GPU-hours than: {name} (at least {100 * needed:.0f} %)")
    sys.exit(failed)


if __name__ == "__main__":
    main()
