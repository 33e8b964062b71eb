"""Reading safetensors files without torch: the header's table, and whether every value is finite."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

MAX_HEADER_BYTES = 100_000_000
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
# Unsigned view, and the exponent's bits: all set means infinite or not a number.
_FLOATS = {"F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80), "F32": (np.uint32, 0x7F800000)}
_PIECE = 4 * 1024 * 1024


@dataclass(frozen=True)
class Tensor:
    """A tensor's dtype as safetensors names it, its shape, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Raises:
        ValueError: the file is damaged: no header, or tensors that overlap, leave gaps or do not fit their shapes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):  # noqa: PLR2004 - "{}"
            raise ValueError(f"{path.name} is not a safetensors file")
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            tensors = {name: _tensor(entry, 8 + length) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name} has a damaged safetensors header: {error}") from None
    place = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != place or tensor.end - tensor.start != math.prod(tensor.shape) * _SIZES[tensor.dtype]:
            raise ValueError(f"{path.name} is damaged: the bytes of {name} do not fit its shape or its neighbours")
        place = tensor.end
    if place != size:
        raise ValueError(f"{path.name} is damaged: it has {size} bytes and its header describes {place}")
    return tensors


def _tensor(entry: dict[str, object], data: int) -> Tensor:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _SIZES or not isinstance(dtype, str):
        raise ValueError(f"dtype {dtype!r} is unknown")
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError("shape and data_offsets must be lists")
    if not all(type(number) is int and number >= 0 for number in [*shape, *offsets]):
        raise ValueError("shape and data_offsets must be natural numbers")
    start, end = offsets
    return Tensor(dtype, tuple(shape), data + start, data + end)


def first_non_finite(path: Path, tensors: dict[str, Tensor]) -> str | None:
    """The name of a tensor that holds an infinite value or one that is not a number; None where all are finite.

    Raises:
        ValueError: a tensor is of no floating type that vLLM takes for LoRA (F16, BF16, F32).
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} is of type {tensor.dtype}; LoRA weights are F16, BF16 or F32")
        view, exponent = _FLOATS[tensor.dtype]
        count = math.prod(tensor.shape)
        with path.open("rb") as file:
            file.seek(tensor.start)
            for piece in range(0, count, _PIECE):
                bits = np.fromfile(file, dtype=view, count=min(_PIECE, count - piece))
                if np.any((bits & exponent) == exponent):
                    return name
    return None
