"""The device that a run trains on."""

from __future__ import annotations

import torch

from tunesmith_trainer.errors import InvalidSpecError

_WITH_BFLOAT16 = (8, 0)
"""Lowest compute capability with bfloat16."""


def choose_device(gpus: int, number: int = 0) -> torch.device:
    """Return the device that the manifest requests.

    Args:
        gpus: number of GPUs of the manifest.
        number: index of the device.

    Raises:
        InvalidSpecError: the manifest requests more GPUs than are visible.
    """
    if gpus == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InvalidSpecError(
            f"resources.gpus is {gpus} and this machine has no visible GPU: set it to 0 to train on the CPU, or check "
            "the driver"
        )
    if torch.cuda.device_count() < gpus:
        raise InvalidSpecError(
            f"resources.gpus is {gpus} and this machine has {torch.cuda.device_count()} visible GPUs: lower it, or use "
            "a machine with more"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def emulates_bfloat16(device: torch.device) -> bool:
    """Return True for a GPU that computes bfloat16 with slower instructions: NVIDIA's before Ampere."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    capability: tuple[int, int] = torch.cuda.get_device_capability(device)
    return capability < _WITH_BFLOAT16


def device_memory(device: torch.device) -> int | None:
    """Return the memory of a GPU in bytes; None for the CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
