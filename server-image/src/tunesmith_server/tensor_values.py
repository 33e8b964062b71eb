"""Reader of tensor values in safetensors files, without torch: in pieces, as float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from tunesmith.contracts.safetensors import Tensor

FLOATS: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
"""safetensors types that need no scales, with the numpy type that reads them."""


def columns(path: Path, tensor: Tensor, piece: int = 1 << 20) -> Iterator[NDArray[np.float64]]:
    """Yield a matrix as float64, in blocks of all rows and some columns with about `piece` values each."""
    rows, width = tensor.shape
    matrix = _mapped(path, tensor).reshape(rows, width)
    step = max(1, piece // max(rows, 1))
    for start in range(0, width, step):
        yield _as_float64(matrix[:, start : start + step], tensor.dtype)


def rows(path: Path, tensor: Tensor, piece: int = 1 << 20) -> Iterator[NDArray[np.float64]]:
    """Yield a matrix as float64, in blocks of some rows and all columns with about `piece` values each."""
    height, width = tensor.shape
    matrix = _mapped(path, tensor).reshape(height, width)
    step = max(1, piece // max(width, 1))
    for start in range(0, height, step):
        yield _as_float64(matrix[start : start + step], tensor.dtype)


def blocks(path: Path, tensor: Tensor, offsets: Iterable[int], size: int) -> Iterator[NDArray[np.float64]]:
    """Yield values of a tensor as float64, in storage order: at most `size` from each offset."""
    stored = _mapped(path, tensor)
    for offset in offsets:
        yield _as_float64(stored[offset : offset + size], tensor.dtype)


def _mapped(path: Path, tensor: Tensor) -> NDArray[Any]:
    mapped: NDArray[Any] = np.memmap(path, FLOATS[tensor.dtype], "r", tensor.start, (tensor.count,))
    return mapped


def _as_float64(stored: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    with np.errstate(invalid="ignore"):  # a signalling NaN, which the caller refuses as it does any other
        return stored.astype(np.float64)
