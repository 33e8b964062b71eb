"""Bit-identical results of equal runs on a GPU. Results on a CPU are bit-identical by default."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
_NOT_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")


def run_deterministically(device: torch.device, run: Callable[[], T], write_line: Callable[[str], None]) -> T:
    """Return the result of `run`, computed with PyTorch's deterministic algorithms on a GPU.

    If the model needs an operation that has none, this is reported and the run starts again without the requirement: a
    job must not fail because of it. cuBLAS needs the environment variable CUBLAS_WORKSPACE_CONFIG, which the command
    sets.

    Args:
        device: device of the computation.
        run: computation; may be called twice.
        write_line: reports to a person.
    """
    if device.type != "cuda":
        return run()
    torch.backends.cudnn.benchmark = False
    # Uninitialised memory does not affect the result of a run, and filling it costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(mode=True)
    try:
        return run()
    except RuntimeError as error:
        match = _NOT_DETERMINISTIC.match(str(error))
        if match is None:
            raise
    # Outside of the handler, which would keep the first run's tensors alive.
    write_line(f"  {match[1]} has no deterministic implementation: this run cannot be repeated bit for bit")
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    return run()
