"""What can go wrong, each with its failure reason and whether another attempt can help."""

from __future__ import annotations

from typing import ClassVar

from tunesmith.api.conditions import FailureReason


class TrainerError(Exception):
    """A failure that has been understood: its text says what is wrong, where, and how to mend it."""

    reason: ClassVar[FailureReason] = FailureReason.INTERNAL_ERROR
    retryable: ClassVar[bool] = False


class InvalidSpecError(TrainerError):
    """The manifest asks for something that cannot be done."""

    reason = FailureReason.INVALID_SPEC


class NotServableError(TrainerError):
    """vLLM could not load the result, and the manifest demands it."""

    reason = FailureReason.NOT_SERVABLE


class BaseModelNotFoundError(TrainerError):
    """There is no usable base model at its uri."""

    reason = FailureReason.BASE_MODEL_NOT_FOUND


class DatasetNotFoundError(TrainerError):
    """There is no data set at its uri."""

    reason = FailureReason.DATASET_NOT_FOUND


class DatasetInvalidError(TrainerError):
    """A row of the data set cannot be used."""

    reason = FailureReason.DATASET_INVALID


class SecretNotFoundError(TrainerError):
    """The manifest names a Secret that is not mounted."""

    reason = FailureReason.SECRET_NOT_FOUND


class AccessDeniedError(TrainerError):
    """The store refused the credentials."""

    reason = FailureReason.ACCESS_DENIED


class StorageUnavailableError(TrainerError):
    """The store did not answer, or not well, for as long as was waited for it."""

    reason = FailureReason.STORAGE_UNAVAILABLE
    retryable = True


class OutOfMemoryError(TrainerError):
    """The model, its activations or the optimizer did not fit."""

    reason = FailureReason.OUT_OF_MEMORY


class LossDivergedError(TrainerError):
    """The loss or the gradient is not a number any more."""

    reason = FailureReason.LOSS_DIVERGED


class SelfCheckError(TrainerError):
    """What was built is not what was asked for: a fault of the trainer or of its libraries."""

    reason = FailureReason.INTERNAL_ERROR
    retryable = True


class InterruptedRunError(Exception):
    """Training was asked to stop from outside and saved its state; no failure.

    Args:
        step: optimizer steps done.
        total: optimizer steps in all.
    """

    def __init__(self, step: int, total: int) -> None:
        super().__init__(f"at step {step} of {total}")
