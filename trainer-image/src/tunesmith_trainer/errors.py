"""Errors of the trainer, each with its failure reason and whether another attempt can help."""

from __future__ import annotations

from typing import ClassVar

from tunesmith.api.conditions import FailureReason


class TrainerError(Exception):
    """A failure with a known cause: its text states what is wrong, where, and how to fix it."""

    reason: ClassVar[FailureReason] = FailureReason.INTERNAL_ERROR
    retryable: ClassVar[bool] = False


class InvalidSpecError(TrainerError):
    """The manifest requests something that cannot be done."""

    reason = FailureReason.INVALID_SPEC


class NotServableError(TrainerError):
    """vLLM could not load the result, and the manifest requires that it can."""

    reason = FailureReason.NOT_SERVABLE


class BaseModelNotFoundError(TrainerError):
    """No usable base model exists at its URI."""

    reason = FailureReason.BASE_MODEL_NOT_FOUND


class AdapterNotFoundError(TrainerError):
    """No adapter exists at the URI that training should continue from."""

    reason = FailureReason.ADAPTER_NOT_FOUND


class DatasetNotFoundError(TrainerError):
    """No data set exists at its URI."""

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
    """The store did not answer, or answered with errors, until the retries were exhausted."""

    reason = FailureReason.STORAGE_UNAVAILABLE
    retryable = True


class OutOfMemoryError(TrainerError):
    """The model, its activations, the optimizer or a row did not fit into memory."""

    reason = FailureReason.OUT_OF_MEMORY


class OutOfDiskError(TrainerError):
    """A file that the run needs cannot be written to the local disk."""

    reason = FailureReason.OUT_OF_DISK


class LossDivergedError(TrainerError):
    """The loss or the gradient is no longer a finite number."""

    reason = FailureReason.LOSS_DIVERGED


class NothingLearnedError(TrainerError):
    """The trained weights are those of the start."""

    reason = FailureReason.NOTHING_LEARNED


class SelfCheckError(TrainerError):
    """The result differs from what was requested: a fault of the trainer or of its libraries.

    Runs are bit-identical, so the next attempt would have it too.
    """

    reason = FailureReason.INTERNAL_ERROR


class InterruptedRunError(Exception):
    """Training was stopped by a signal and saved its state; not a failure.

    Args:
        step: optimizer steps done.
        total: optimizer steps of the whole run.
    """

    def __init__(self, step: int, total: int) -> None:
        super().__init__(f"at step {step} of {total}")
