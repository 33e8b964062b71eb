"""A failure that another attempt would repeat is not retried."""

from __future__ import annotations

import pytest

from tunesmith.api.conditions import FailureReason
from tunesmith_trainer.errors import SelfCheckError
from tunesmith_trainer.main import failure
from tunesmith_trainer.process.ranks import Ranks

CUDA = "CUDA error: {}\nCUDA kernel errors might be asynchronously reported at some other API call"


@pytest.mark.parametrize(
    "error",
    [
        SelfCheckError("the adapter has 3 trainable parameters where 4 are expected"),
        AssertionError("no task"),
        KeyError("lora_A"),
        NotImplementedError("the operator is not implemented"),
        RecursionError("maximum recursion depth exceeded"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x64 and 128x64)"),
        RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
        RuntimeError(CUDA.format("device-side assert triggered")),
        TypeError("unexpected keyword"),
    ],
    ids=str,
)
def test_a_deterministic_failure_is_not_retried(error: Exception) -> None:
    result = failure(error, Ranks())
    assert (result.reason, result.retryable, result.exit_code) == (FailureReason.INTERNAL_ERROR, False, 2)


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, "Input/output error"),
        ConnectionResetError("Connection reset by peer"),
        RuntimeError(CUDA.format("uncorrectable ECC error encountered")),
        RuntimeError(CUDA.format("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx")),
        RuntimeError("NCCL communicator was aborted on rank 1"),
    ],
    ids=str,
)
def test_a_failure_of_a_device_or_connection_is_retried(error: Exception) -> None:
    result = failure(error, Ranks())
    assert (result.reason, result.retryable, result.exit_code) == (FailureReason.INTERNAL_ERROR, True, 3)
