"""Checks of a LoRA adapter's weights against the engine and the base model.

vLLM loads many adapters that do not fit and then returns garbage, and overflowing values spread to other clients'
answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.contracts.safetensors import LENGTH_BYTES, Tensor, header_length, parse_header
from tunesmith.contracts.servability import (
    ADAPTER_WEIGHTS,
    TENSOR_PREFIX,
    TENSOR_SUFFIXES,
    LoraConfig,
    UnservableError,
    check_modules,
    check_pairs,
    check_rank,
    parse_adapter_config,
)
from tunesmith_server.tensor_values import columns, rows

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from tunesmith_server.base_weights import BaseWeights

LARGEST_VALUE = 65504.0
"""Largest 16-bit float: the engine may convert weights to float16."""
LARGEST_ROW = 1e3
"""Highest norm of a row of lora_A: above it, products overflow 16-bit floats before lora_B is applied."""
_TYPES = frozenset({"F16", "BF16", "F32"})
_BYTES_PER_TENSOR = 256
"""Bytes of the header for each tensor, besides its name."""
_MESSAGE_LENGTH = 600


class UnfitAdapterError(Exception):
    """The adapter is damaged, or does not fit the engine or the base model. Retrying does not help."""

    def __init__(self, message: str) -> None:
        printable = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)
        super().__init__(printable if len(printable) <= _MESSAGE_LENGTH else f"{printable[:_MESSAGE_LENGTH]}…")


@dataclass(frozen=True)
class WeightBounds:
    """Limits of an adapter's weights file, derived from the base model's modules.

    Attributes:
        header: bytes of the header.
        tensors: number of tensors.
        size: bytes of the file.
    """

    header: int
    tensors: int
    size: int


def weight_bounds(base: BaseWeights, max_rank: int) -> WeightBounds:
    """Return the limits for adapters of a base model: two float32 tensors of the highest rank for each matrix."""
    matrices = {name: tensor.shape for name, tensor in base.tensors.items() if len(tensor.shape) == 2}  # noqa: PLR2004
    tensors = 2 * (len(matrices) + 1)  # one more for a tied lm_head
    longest = max(map(len, matrices), default=0) + len(TENSOR_PREFIX) + max(map(len, TENSOR_SUFFIXES))
    header = tensors * (longest + _BYTES_PER_TENSOR) + 4096
    widest = max((sum(shape) for shape in matrices.values()), default=0)
    values = (sum(sum(shape) for shape in matrices.values()) + widest) * max_rank
    return WeightBounds(header, tensors, LENGTH_BYTES + header + 4 * values)


def check_config(document: bytes, *, max_rank: int) -> LoraConfig:
    """Check `adapter_config.json`.

    Raises:
        UnfitAdapterError: the configuration is malformed, is not LoRA, has too high a rank, or uses a feature that vLLM
            does not load.
    """
    try:
        config = parse_adapter_config(document)
    except UnservableError as error:
        raise UnfitAdapterError(str(error)) from None
    try:
        check_rank(config, max_rank, "the pool's engine.maxLoraRank")
    except UnservableError as error:
        raise UnfitAdapterError(f"{error}; raise it or train with a lower rank") from None
    return config


Modules = dict[str, dict[str, Tensor]]
"""Tensors of an adapter by module: `A` and `B`."""


def check_header(text: bytes, size: int, config: LoraConfig, base: BaseWeights, bounds: WeightBounds) -> Modules:
    """Check the names and shapes of an adapter's tensors against the base's.

    Args:
        text: header of the weights file, without its length prefix.
        size: bytes of the weights file.
        config: checked configuration.
        base: base model of the pod.
        bounds: bounds from `weight_bounds`.

    Raises:
        UnfitAdapterError: the header is damaged, a name, shape, rank or type does not fit, or vLLM would not apply the
            adapter to a module.
    """
    try:
        tensors = parse_header(text, size, bounds.tensors)
    except ValueError as error:
        raise UnfitAdapterError(f"{ADAPTER_WEIGHTS} {error}") from None
    modules = _by_module(tensors)
    try:
        check_modules(base.architecture, modules)
    except UnservableError as error:
        raise UnfitAdapterError(str(error)) from None
    for module, parts in modules.items():
        _check_module(module, parts["A"], parts["B"], config, base)
    return modules


def check_length(start: bytes, size: int, bounds: WeightBounds) -> int:
    """Return the length of the weights file's header, from the file's first bytes.

    Raises:
        UnfitAdapterError: the file is not a safetensors file, or its header is longer than the base model's modules
            need.
    """
    try:
        return header_length(start, size, bounds.header)
    except ValueError as error:
        raise UnfitAdapterError(f"{ADAPTER_WEIGHTS} {error}") from None


def check_values(path: Path, modules: Modules, config: LoraConfig, base: BaseWeights, max_ratio: float) -> float:
    """Check that an adapter's values are finite and its change to each module is bounded; return the highest ratio.

    The ratio of a module is the Frobenius norm of scaling · B · A divided by the norm of the base model's matrix. This
    ratio must not exceed `max_ratio`, and neither must the ratio of any single rank: a column of B times a row of A,
    which other ranks could cancel out only before rounding.

    Raises:
        UnfitAdapterError: a value is not finite or too large, or a ratio is above the limit.
    """
    highest = 0.0
    for module, parts in modules.items():
        name = base.matrix_of(module)
        assert name is not None  # noqa: S101 - check_header found it
        ratio = _magnitude(path, module, parts, config.scaling_of(module)) / base.norm(name)
        if not ratio <= max_ratio:
            raise UnfitAdapterError(
                f"the adapter changes {module} by {ratio:.3g} times the base's weights (norm of scaling · B · A), more "
                f"than the platform's limit of {max_ratio:g}: its values or its lora_alpha are too large; train again, "
                "with a lower learning rate or lora_alpha"
            )
        highest = max(highest, ratio)
    return highest


def _magnitude(path: Path, module: str, parts: dict[str, Tensor], scaling: float) -> float:
    """Return the larger of the norm of scaling · B · A and the norm of its largest rank.

    ‖BA‖² is the trace of (BᵀB)(AAᵀ), two matrices of rank × rank. Products of float32 values do not overflow float64.
    """
    rank = parts["A"].shape[0]
    gram_a, largest_a = _gram(columns(path, parts["A"]), rank, f"lora_A of {module}")
    gram_b, largest_b = _gram((block.T for block in rows(path, parts["B"])), rank, f"lora_B of {module}")
    if max(largest_a, largest_b * max(scaling, 1.0)) > LARGEST_VALUE:
        raise UnfitAdapterError(
            f"{module} has values of up to {max(largest_a, largest_b):.3g} with a scaling of {scaling:.3g}, more than "
            f"the largest 16-bit float ({LARGEST_VALUE:g}); train again"
        )
    row_norms = np.sqrt(np.diagonal(gram_a))
    if float(np.max(row_norms)) > LARGEST_ROW:
        raise UnfitAdapterError(
            f"lora_A of {module} has a row of norm {float(np.max(row_norms)):.3g}, more than {LARGEST_ROW:g}: its "
            "products overflow 16-bit floats; train again"
        )
    product = math.sqrt(max(0.0, float(np.sum(gram_a * gram_b))))
    largest_rank = float(np.max(row_norms * np.sqrt(np.diagonal(gram_b))))
    return scaling * max(product, largest_rank)


def _gram(blocks: Iterator[NDArray[np.float64]], rank: int, part: str) -> tuple[NDArray[np.float64], float]:
    """Return the sum of block · blockᵀ, and the largest absolute value."""
    gram, largest = np.zeros((rank, rank)), 0.0
    for block in blocks:
        peak = float(np.max(np.abs(block), initial=0.0))
        if not math.isfinite(peak):
            raise UnfitAdapterError(f"{part} contains values that are infinite or not a number; train again")
        largest = max(largest, peak)
        gram += block @ block.T
    return gram, largest


def _by_module(tensors: dict[str, Tensor]) -> Modules:
    try:
        pairs = check_pairs(tensors)
    except UnservableError as error:
        raise UnfitAdapterError(str(error)) from None
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPES:
            raise UnfitAdapterError(f"{name} is of type {tensor.dtype}; LoRA weights are F16, BF16 or F32")
    return {module: {matrix: tensors[name] for matrix, name in pair.items()} for module, pair in pairs.items()}


def _check_module(module: str, first: Tensor, second: Tensor, config: LoraConfig, base: BaseWeights) -> None:
    embedding = module.endswith("embed_tokens")
    name = base.matrix_of(module)
    if name is None:
        raise UnfitAdapterError(f"the base model has no {module}.weight: the adapter belongs to another model")
    shape = base.tensors[name].shape
    if len(shape) != 2:  # noqa: PLR2004 - a matrix
        raise UnfitAdapterError(f"{module} of the base model is not a linear layer; LoRA does not apply to it")
    if 0 in shape:
        raise UnfitAdapterError(f"{module} of the base model has no values; LoRA does not apply to it")
    outputs, inputs = reversed(shape) if config.fan_in_fan_out or embedding else shape
    rank = config.rank_of(module)
    for part, tensor, expected in (("lora_A", first, (rank, inputs)), ("lora_B", second, (outputs, rank))):
        if tensor.shape != expected:
            raise UnfitAdapterError(
                f"{part} of {module} has the shape {list(tensor.shape)} and the base model and rank {rank} need "
                f"{list(expected)}: the adapter belongs to another model or is damaged"
            )
