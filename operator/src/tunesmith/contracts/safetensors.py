"""Headers of safetensors files, which may be untrusted: read by the check of adapters and by base fingerprints.

The format: 8 bytes with the header's length, the header (JSON: dtype, shape and offsets by tensor), the values.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.contracts.strict_json import parse_object

if TYPE_CHECKING:
    from pathlib import Path

LENGTH_BYTES = 8
"""Size, in bytes, of the field before the header that holds the header's length."""
MAX_HEADER_BYTES = 100_000_000
"""Longest header that the safetensors library reads."""
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits per value, by data type."""
_MIN_ENTRY_BYTES = 32
"""Fewest bytes of the header per tensor."""
_VALUES_PER_TENSOR = 16
"""JSON values per tensor: seven, and some more that other writers may add."""


@dataclass(frozen=True)
class Tensor:
    """A tensor's data type (safetensors' name), its shape, and the position of its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def header_length(start: bytes, size: int | None, limit: int = MAX_HEADER_BYTES) -> int:
    """Return the length of a file's header.

    Args:
        start: the first bytes of the file.
        size: bytes of the whole file; None if unknown.
        limit: highest length.

    Raises:
        ValueError: it is not a safetensors file, or its header is longer than `limit` bytes.
    """
    (length,) = struct.unpack("<Q", start[:LENGTH_BYTES].ljust(LENGTH_BYTES, b"\xff"))
    if length < 2 or (size is not None and length > size - LENGTH_BYTES):  # noqa: PLR2004 - "{}"
        raise ValueError("is not a safetensors file")
    if length > limit:
        raise ValueError(f"has a header of {length} bytes, more than {limit}")
    return int(length)


def parse_header(text: bytes, size: int | None, max_tensors: int | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file by name.

    Args:
        text: the header without its length.
        size: bytes of the whole file; None if unknown.
        max_tensors: highest number of tensors; None: as many as fit.

    Raises:
        ValueError: it is malformed, has too many tensors, or they overlap, leave gaps or do not fit their shapes.
    """
    allowed = len(text) // _MIN_ENTRY_BYTES if max_tensors is None else max_tensors
    try:
        header = parse_object(text, max_bytes=MAX_HEADER_BYTES, max_values=_VALUES_PER_TENSOR * (allowed + 16))
        _check_metadata(header.pop("__metadata__", {}))
        if len(header) > allowed:
            message = f"it has {len(header)} tensors, more than {allowed}"
            raise ValueError(message)  # noqa: TRY301 - as every other damage
        tensors = {name: _tensor(entry, LENGTH_BYTES + len(text)) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"has a damaged safetensors header: {error}") from None
    expected = LENGTH_BYTES + len(text)
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != expected or 8 * (tensor.end - tensor.start) != tensor.count * _BITS[tensor.dtype]:
            raise ValueError(f"is damaged: the bytes of {name} do not fit its shape or its neighbours")
        expected = tensor.end
    if size is not None and expected != size:
        raise ValueError(f"is damaged: it has {size} bytes, but its header describes {expected}")
    return tensors


def read_tensors(path: Path, *, limit: int = MAX_HEADER_BYTES, max_tensors: int | None = None) -> dict[str, Tensor]:
    """Return the tensors of a local file by name.

    Raises:
        ValueError: the file is damaged, or has a longer header or more tensors than allowed.
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
        raise ValueError("__metadata__ must be an object with string values")


def _tensor(entry: dict[str, object], data: int) -> Tensor:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"dtype {str(dtype)[:20]!a} is unknown")
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError("shape and data_offsets must be lists")
    if not all(type(number) is int and number >= 0 for number in [*shape, *offsets]):
        raise ValueError("shape and data_offsets must be natural numbers")
    start, end = offsets
    return Tensor(dtype, tuple(shape), data + start, data + end)
