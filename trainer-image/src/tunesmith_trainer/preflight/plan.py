"""Decide the settings of a run: pure functions of the manifest and of the counts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tunesmith.api.checkpoint import steps_of_ratio
from tunesmith.api.finetunejob_status import Resolved, TaskFolderStatus
from tunesmith.api.hyperparameters import (
    COMPILED_STEPS,
    DEFAULT_BATCH_SIZE,
    DEFAULT_EPOCHS,
    DEFAULT_MICRO_BATCH_SIZE,
    DEFAULT_WARMUP_RATIO,
    Precision,
)
from tunesmith.api.placement import DataParallelism
from tunesmith_trainer.errors import InvalidSpecError
from tunesmith_trainer.manifest import require_unchanged

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunesmith.api.finetunejob import FineTuneJobSpec
    from tunesmith.api.finetunejob_status import ContinuedFrom
    from tunesmith.api.hyperparameters import Hyperparameters
    from tunesmith_trainer.base_model.stored import StoredQuantization

_EVALUATIONS = 10
_MAX_EVALUATION_SHARE = 0.05
"""Maximum time for evaluation, as a share of the training time."""


def divisors(number: int) -> list[int]:
    """Return all divisors in ascending order."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def micro_batch_sizes(spec: FineTuneJobSpec) -> list[int]:
    """Return the possible micro-batch sizes if the user names none: divisors of the batch size up to 8.

    Each rank gets at least one micro-batch of each step.
    """
    batch = spec.hyperparameters.batch_size or DEFAULT_BATCH_SIZE
    largest = min(DEFAULT_MICRO_BATCH_SIZE, batch // spec.resources.ranks)
    return [size for size in divisors(batch) if size <= largest]


def evaluation_interval(steps: int, batch: int, held_out: int) -> int:
    """Return the steps between two evaluations of the held-out loss if the user names none.

    Args:
        steps: steps of the run.
        batch: rows per step.
        held_out: rows that are evaluated; each takes a third of a training row's time, its forward pass.
    """
    affordable = math.ceil(held_out / 3 / (_MAX_EVALUATION_SHARE * batch))
    return max(math.ceil(steps / _EVALUATIONS), affordable)


def warmup_steps(hyper: Hyperparameters, steps: int) -> int:
    """Return the number of steps in which the learning rate rises.

    Args:
        hyper: the job's hyperparameters.
        steps: steps of the run.

    Raises:
        InvalidSpecError: the run has fewer steps than its warm-up.
    """
    if hyper.warmup_steps is None:
        ratio = DEFAULT_WARMUP_RATIO if hyper.warmup_ratio is None else hyper.warmup_ratio
        return math.ceil(ratio * steps)
    if hyper.warmup_steps > steps:
        raise InvalidSpecError(
            f"hyperparameters.warmupSteps is {hyper.warmup_steps}, but the run has {steps} steps, so it would never "
            "reach its learning rate: lower warmupSteps, or raise hyperparameters.epochs"
        )
    return hyper.warmup_steps


def evaluation_every(spec: FineTuneJobSpec, steps: int, batch: int, held_out: int) -> int:
    """Return the steps between two evaluations of the held-out loss; early stopping always gets about ten."""
    if spec.evaluation is not None and spec.evaluation.every_steps is not None:
        return spec.evaluation.every_steps
    if spec.evaluation is not None and spec.evaluation.every_ratio is not None:
        return steps_of_ratio(spec.evaluation.every_ratio, steps)
    if spec.early_stopping is not None:
        return math.ceil(steps / _EVALUATIONS)
    return evaluation_interval(steps, batch, held_out)


def resolve(
    spec: FineTuneJobSpec,
    *,
    rows: int,
    held_out: int,
    targets: list[str],
    fingerprint: str,
    digest: str,
    start: ContinuedFrom | None,
    rank: int | None,
    stored: StoredQuantization | None,
    folders: Mapping[str, str],
    micro_batch_size: int,
    checkpointing: bool,
    sharded: bool,
) -> Resolved:
    """Return the decisions that are made for the user.

    Args:
        spec: the job's spec, checked.
        rows: number of training rows used.
        held_out: number of held-out rows.
        targets: names of the adapted modules.
        fingerprint: fingerprint of the base model.
        digest: digest of the rows.
        start: adapter that training starts from; None: a new one.
        rank: rank of that adapter; None if it has none.
        stored: quantisation in which the base model is published; None: it is not quantised.
        folders: digests of the supplied task folders, by suite.
        micro_batch_size: sequences per forward pass.
        checkpointing: True if activations are recomputed.
        sharded: True if the base's weights are sharded over the ranks.

    Raises:
        InvalidSpecError: the run has fewer steps than its warm-up.
    """
    hyper = spec.hyperparameters
    batch = hyper.batch_size or DEFAULT_BATCH_SIZE
    steps = hyper.max_steps or max(1, math.ceil((hyper.epochs or DEFAULT_EPOCHS) * math.ceil(rows / batch)))
    parallelism = DataParallelism.FSDP2 if sharded else DataParallelism.DDP
    return Resolved(
        base_model_fingerprint=fingerprint,
        dataset_digest=digest,
        continued_from=start,
        task_folders=[TaskFolderStatus(suite=suite, digest=own) for suite, own in folders.items()] or None,
        learning_rate=spec.learning_rate,
        batch_size=batch,
        micro_batch_size=micro_batch_size,
        gradient_checkpointing=checkpointing,
        torch_compile=compiles(spec, steps, sharded=sharded) if hyper.torch_compile is None else hyper.torch_compile,
        precision=hyper.precision or (Precision.BFLOAT16 if spec.resources.gpus else Precision.FLOAT32),
        quantization=held_in(spec, stored),
        data_parallelism=parallelism if spec.resources.ranks > 1 else None,
        total_steps=steps,
        warmup_steps=warmup_steps(hyper, steps),
        evaluation_every_steps=evaluation_every(spec, steps, batch, held_out),
        publish=spec.publish,
        target_modules=targets,
        method=None if start is None else spec.method.name,
        rank=None if start is None else rank,
    )


def compiles(spec: FineTuneJobSpec, steps: int, *, sharded: bool) -> bool:
    """Return True if layers are compiled by default: on GPUs, without sharding, in runs long enough to benefit."""
    return spec.resources.gpus > 0 and not sharded and steps >= COMPILED_STEPS


def held_in(spec: FineTuneJobSpec, stored: StoredQuantization | None) -> str | None:
    """Return the quantisation in which the base's weights are held: its own, or the method's; None: not quantised."""
    if stored is not None and stored.kept:
        return stored.type
    return None if spec.method.quantization is None else spec.method.quantization.type


def _digest(start: ContinuedFrom | None) -> str | None:
    return None if start is None else start.digest


def frozen(before: Resolved | None, now: Resolved) -> Resolved:
    """Keep what an earlier stage decided, whatever GPU this one runs on; decide the rest now.

    Raises:
        InvalidSpecError: the base model or the data has changed since.
    """
    if before is None:
        return now
    require_unchanged("base model", before.base_model_fingerprint, now.base_model_fingerprint)
    require_unchanged("data set", before.dataset_digest, now.dataset_digest)
    require_unchanged("adapter of continueFrom", _digest(before.continued_from), _digest(now.continued_from))
    return now.model_copy(update={name: value for name, value in before if value is not None})
