"""Decisions about a run: pure functions of the manifest and of what was counted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tunesmith.api.finetunejob_status import Resolved
from tunesmith.api.hyperparameters import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_EPOCHS,
    DEFAULT_LEARNING_RATE,
    DEFAULT_MICRO_BATCH_SIZE,
)
from tunesmith_trainer.errors import InvalidSpecError

if TYPE_CHECKING:
    from tunesmith.api.finetunejob import FineTuneJobSpec


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def resolve(spec: FineTuneJobSpec, *, rows: int, targets: list[str], fingerprint: str, digest: str) -> Resolved:
    """What is decided for the user. The micro-batch size is the largest divisor of the batch size up to 8.

    Args:
        spec: the job's spec, checked.
        rows: training rows that are used.
        targets: modules that get an adapter.
        fingerprint: of the base model.
        digest: of the rows.
    """
    hyper = spec.hyperparameters
    batch = hyper.batch_size or DEFAULT_BATCH_SIZE
    micro = hyper.micro_batch_size or max(size for size in divisors(batch) if size <= DEFAULT_MICRO_BATCH_SIZE)
    steps = hyper.max_steps or max(1, math.ceil((hyper.epochs or DEFAULT_EPOCHS) * math.ceil(rows / batch)))
    return Resolved(
        base_model_fingerprint=fingerprint,
        dataset_digest=digest,
        learning_rate=hyper.learning_rate or DEFAULT_LEARNING_RATE,
        batch_size=batch,
        micro_batch_size=micro,
        total_steps=steps,
        target_modules=targets,
    )


def check_frozen(frozen: Resolved | None, now: Resolved) -> None:
    """Compares what an earlier stage decided with what the inputs are now.

    Raises:
        InvalidSpecError: the base model or the data changed in between.
    """
    if frozen is None:
        return
    for what, before, after in (
        ("base model", frozen.base_model_fingerprint, now.base_model_fingerprint),
        ("data set", frozen.dataset_digest, now.dataset_digest),
    ):
        if before is not None and before != after:
            raise InvalidSpecError(
                f"the {what} changed since the job was validated (it was {before[:19]}…, it is {str(after)[:19]}…): "
                "create a new FineTuneJob"
            )
