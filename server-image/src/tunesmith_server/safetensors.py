"""Reader for safetensors files without torch: the header's table, and values in pieces."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.contracts.strict_json import parse_object

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

LENGTH_BYTES = 8
"""Bytes before the header, with its length."""
MAX_HEADER_BYTES = 100_000_000
"""Longest header that safetensors itself reads."""
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
FLOATS: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
"""Types whose values are numbers as they are stored, by the type that numpy reads them with."""
_SHORTEST_ENTRY = 32
"""Bytes of the header that a tensor takes at least."""
_VALUES_PER_TENSOR = 16
"""Of JSON: seven, and some more that other writers may add."""


@dataclass(frozen=True)
class Tensor:
    """A tensor's dtype as safetensors names it, its shape, and the place of its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def header_length(start: bytes, size: int, limit: int = MAX_HEADER_BYTES) -> int:
    """Length of the header of a file of `size` bytes, from the first bytes of the file.

    Raises:
        ValueError: it is not a safetensors file, or its header is longer than `limit` bytes.
    """
    (length,) = struct.unpack("<Q", start[:LENGTH_BYTES].ljust(LENGTH_BYTES, b"\xff"))
    if not 2 <= length <= size - LENGTH_BYTES:  # noqa: PLR2004 - "{}"
        raise ValueError("is not a safetensors file")
    if length > limit:
        raise ValueError(f"has a header of {length} bytes, more than {limit}")
    return int(length)


def parse_header(text: bytes, size: int, max_tensors: int | None = None) -> dict[str, Tensor]:
    """Parse the header of a file of `size` bytes.

    Args:
        text: the header without its length.
        size: bytes of the whole file.
        max_tensors: highest number of tensors; None: as many as fit.

    Raises:
        ValueError: it is malformed, has too many tensors, or they overlap, leave gaps or do not fit their shapes.
    """
    most = len(text) // _SHORTEST_ENTRY if max_tensors is None else max_tensors
    try:
        header = parse_object(text, max_bytes=MAX_HEADER_BYTES, max_values=_VALUES_PER_TENSOR * (most + 16))
        _check_metadata(header.pop("__metadata__", {}))
        if len(header) > most:
            message = f"it has {len(header)} tensors, more than {most}"
            raise ValueError(message)  # noqa: TRY301 - as every other damage
        tensors = {name: _tensor(entry, LENGTH_BYTES + len(text)) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"has a damaged safetensors header: {error}") from None
    place = LENGTH_BYTES + len(text)
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != place or tensor.end - tensor.start != tensor.count * _SIZES[tensor.dtype]:
            raise ValueError(f"is damaged: the bytes of {name} do not fit its shape or its neighbours")
        place = tensor.end
    if place != size:
        raise ValueError(f"is damaged: it has {size} bytes and its header describes {place}")
    return tensors


def read_tensors(path: Path, *, limit: int = MAX_HEADER_BYTES, max_tensors: int | None = None) -> dict[str, Tensor]:
    """Tensors of a file by name.

    Raises:
        ValueError: the file is damaged, or its header is longer or has more tensors than allowed.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = header_length(file.read(LENGTH_BYTES), size, limit)
            return parse_header(file.read(length), size, max_tensors)
    except ValueError as error:
        raise ValueError(f"{path.name} {error}") from None


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must be an object of texts")


def _tensor(entry: dict[str, object], data: int) -> Tensor:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise ValueError(f"dtype {str(dtype)[:20]!a} is unknown")
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError("shape and data_offsets must be lists")
    if not all(type(number) is int and number >= 0 for number in [*shape, *offsets]):
        raise ValueError("shape and data_offsets must be natural numbers")
    start, end = offsets
    return Tensor(dtype, tuple(shape), data + start, data + end)


def columns(path: Path, tensor: Tensor, piece: int = 1 << 20) -> Iterator[NDArray[np.float64]]:
    """A matrix as float64, in blocks of all rows and some columns with about `piece` values each."""
    rows, width = tensor.shape
    matrix = _mapped(path, tensor).reshape(rows, width)
    step = max(1, piece // max(rows, 1))
    for start in range(0, width, step):
        yield _as_float64(matrix[:, start : start + step], tensor.dtype)


def rows(path: Path, tensor: Tensor, piece: int = 1 << 20) -> Iterator[NDArray[np.float64]]:
    """A matrix as float64, in blocks of some rows and all columns with about `piece` values each."""
    height, width = tensor.shape
    matrix = _mapped(path, tensor).reshape(height, width)
    step = max(1, piece // max(width, 1))
    for start in range(0, height, step):
        yield _as_float64(matrix[start : start + step], tensor.dtype)


def blocks(path: Path, tensor: Tensor, places: Iterable[int], size: int) -> Iterator[NDArray[np.float64]]:
    """Values of a tensor as float64, in the order in which they are stored: from each place on, at most `size`."""
    stored = _mapped(path, tensor)
    for place in places:
        yield _as_float64(stored[place : place + size], tensor.dtype)


def _mapped(path: Path, tensor: Tensor) -> NDArray[Any]:
    mapped: NDArray[Any] = np.memmap(path, FLOATS[tensor.dtype], "r", tensor.start, (tensor.count,))
    return mapped


def _as_float64(stored: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    with np.errstate(invalid="ignore"):  # a signalling NaN, which the caller refuses as it does any other
        return stored.astype(np.float64)
