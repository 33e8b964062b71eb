"""GPU time of a job, estimated from jobs that have finished on the same base model and kind of GPU. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from tunesmith.api.finetunejob_status import Phase

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.finetunejob_status import Preflight, Resolved

GPU_PRODUCT = "nvidia.com/gpu.product"
"""Label with the kind of a node's GPUs, which NVIDIA's GPU feature discovery sets."""
_LAST = 5
_UNKNOWN_KIND = "a GPU of unknown kind"


@dataclass(frozen=True)
class GpuTime:
    """GPU time of a job.

    Args:
        seconds: GPUs times seconds.
        tokens_per_second: tokens that one GPU trained on per second, with loading and evaluation.
        kind: kind of the GPUs.
        jobs: names of the jobs that were measured, newest first.
    """

    seconds: float
    tokens_per_second: float
    kind: str
    jobs: tuple[str, ...]


def trained_tokens(counted: Preflight | None, resolved: Resolved | None) -> float | None:
    """Return the number of tokens that all steps of a run compute; None if it is unknown."""
    if counted is None or resolved is None:
        return None
    sequences = counted.packed_sequences or counted.rows
    if not sequences or not counted.tokens or not resolved.total_steps or not resolved.batch_size:
        return None
    return (counted.tokens - (counted.shared_tokens or 0)) * resolved.total_steps * resolved.batch_size / sequences


def similar(job: FineTuneJob, other: FineTuneJob) -> bool:
    """Return True if another job has finished, used a GPU, and trained the same base model by the same method."""
    return (
        other.status.phase is Phase.COMPLETE
        and bool(other.status.gpu_seconds)
        and trained_tokens(other.status.preflight, other.status.resolved) is not None
        and other.spec.base_model.uri == job.spec.base_model.uri
        and other.spec.base_model.revision == job.spec.base_model.revision
        and other.spec.method.name == job.spec.method.name
    )


def node_of(job: FineTuneJob) -> str | None:
    """Return the name of the node of a job's last attempt; None if it is unknown."""
    node = job.status.attempts[-1].node if job.status.attempts else None
    return node.split()[0].rstrip(",") if node else None


def kind_of(job: FineTuneJob, products: Mapping[str, str]) -> str | None:
    """Return the kind of GPU that a job selects or ran on; None if it is unknown.

    Args:
        job: the job.
        products: kind of GPU by node.
    """
    selected = (job.spec.scheduling.node_selector or {}).get(GPU_PRODUCT)
    return selected or products.get(node_of(job) or "")


def gpu_time(
    job: FineTuneJob,
    tokens: float | None,
    measured: Sequence[FineTuneJob],
    products: Mapping[str, str],
    wanted: str | None = None,
) -> GpuTime | str:
    """Return the estimated GPU time of a job, or the reason why it is unknown.

    Args:
        job: the job.
        tokens: tokens of all of its steps; None if this is unknown.
        measured: similar jobs.
        products: kind of GPU by node.
        wanted: kind of GPU; None: that of the job's node selector, or the only one that was measured.
    """
    if tokens is None:
        return "the number of its tokens is unknown"
    if not measured:
        return "no completed job has trained this base model by this method on a GPU"
    wanted = wanted or (job.spec.scheduling.node_selector or {}).get(GPU_PRODUCT)
    by_kind: dict[str, list[FineTuneJob]] = {}
    for other in measured:
        by_kind.setdefault(kind_of(other, products) or _UNKNOWN_KIND, []).append(other)
    if wanted is None and len(by_kind) > 1:
        return f"completed jobs ran on {', '.join(sorted(by_kind))}: choose one with --gpu"
    kind = wanted or next(iter(by_kind))
    if kind not in by_kind:
        return f"no completed job has trained this base model by this method on {kind}"
    last = sorted(by_kind[kind], key=lambda other: str(other.status.completion_time), reverse=True)[:_LAST]
    rate = median(_rate(other) for other in last)
    return GpuTime(tokens / rate, rate, kind, tuple(other.metadata.name for other in last))


def _rate(job: FineTuneJob) -> float:
    """Return the tokens per GPU-second of a finished job for which `similar` is true."""
    return (trained_tokens(job.status.preflight, job.status.resolved) or 0) / (job.status.gpu_seconds or 1)
