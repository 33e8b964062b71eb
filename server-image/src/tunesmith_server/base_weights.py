"""Shapes and norms of the base model's tensors, to which an adapter's are compared."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.contracts.safetensors import Tensor, read_tensors
from tunesmith_server.tensor_values import FLOATS, blocks

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MEASURED_WHOLE = 1 << 20
"""Number of values up to which a tensor is read in full; of a larger tensor, a sample of this size is read."""
_BLOCK = 1 << 14
_FORMER_NAMES = {"model.language_model.": "language_model.model.", "model.": "backbone."}
"""Beginnings of the names of modules in transformers, with those of published weights (Gemma 3, Nemotron-H)."""
_NOMINAL_DEVIATION = 0.02
"""Usual standard deviation of a linear layer's weights."""
_PACKED_PART = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}
_PACKED_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class BaseWeights:
    """Tensors of a base model by name, each with the file that holds it.

    Attributes:
        folder: folder of the model.
        files: name of the file that holds each tensor.
        tensors: position and shape of each tensor, and of each matrix whose values are packed.
        architecture: name of the model's class, which vLLM looks for; "" if its configuration names none.
        norms: Frobenius norms measured so far, by tensor.
    """

    folder: Path
    files: dict[str, str]
    tensors: dict[str, Tensor]
    architecture: str = ""
    norms: dict[str, float] = field(default_factory=dict)

    def matrix_of(self, module: str) -> str | None:
        """Return the name of a module's weight matrix; None if the base model has no such module.

        A tied `lm_head` is stored once, as the embedding. Some weights are stored with the names that modules had once.
        """
        name = f"{module}.weight"
        if name in self.tensors:
            return name
        if module == "lm_head":
            return next((name for name in self.tensors if name.endswith("embed_tokens.weight")), None)
        for current, former in _FORMER_NAMES.items():
            stored = former + name.removeprefix(current)
            if name.startswith(current) and stored in self.tensors:
                return stored
        return None

    def norm(self, name: str) -> float:
        """Return the Frobenius norm of a tensor.

        Large tensors are sampled in evenly spaced blocks, always the same ones. The norm of a quantised tensor cannot
        be computed without its scales; for it, and for a tensor that is zero or not finite, the norm of a tensor of its
        shape with values of the usual size is returned.
        """
        known = self.norms.get(name)
        if known is None:
            known = self.norms[name] = self._measure(name)
        return known

    def _measure(self, name: str) -> float:
        tensor = self.tensors[name]
        nominal = _NOMINAL_DEVIATION * math.sqrt(tensor.count)
        if tensor.dtype not in FLOATS:
            return nominal
        path = self.folder / self.files[name]
        if tensor.count <= MEASURED_WHOLE:
            offsets = list(range(0, tensor.count, _BLOCK))
        else:
            last = MEASURED_WHOLE // _BLOCK - 1
            offsets = [(tensor.count - _BLOCK) * number // last for number in range(last + 1)]
        squares = math.fsum(float(np.dot(block, block)) for block in blocks(path, tensor, offsets, _BLOCK))
        total = squares * max(1.0, tensor.count / MEASURED_WHOLE)
        return math.sqrt(total) if math.isfinite(total) and total > 0 else nominal


def read_base_weights(folder: Path) -> BaseWeights:
    """Read the headers of a base model's safetensors files, and its architecture.

    Raises:
        ValueError: a safetensors file is damaged.
        OSError: the folder cannot be read.
    """
    files: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found = read_tensors(path)
        tensors |= found
        files |= dict.fromkeys(found, path.name)
    config = _config(folder / "config.json")
    for packed, name, tensor in _unpacked(tensors, config.get("quantization_config")):
        tensors[name], files[name] = tensor, files[packed]
    return BaseWeights(folder, files, tensors, _architecture(config))


def _unpacked(tensors: Mapping[str, Tensor], quantization: object) -> list[tuple[str, str, Tensor]]:
    """Return the weight matrices that are stored with several values in each 32-bit integer.

    GPTQ and AWQ store a layer's transposed matrix as `qweight`, packed along its inputs or its outputs;
    compressed-tensors stores `weight_packed`, packed along its inputs.

    Returns:
        Name of the packed tensor, name of the matrix as other models have it, and a tensor with the matrix's shape,
        whose type is not among `FLOATS`.
    """
    method, bits = _packing(quantization)
    found = []
    for stored, tensor in tensors.items():
        module, _, part = stored.rpartition(".")
        if not bits or part != _PACKED_PART[method] or len(tensor.shape) != 2:  # noqa: PLR2004 - a matrix
            continue
        first, second = tensor.shape
        shape = {
            "gptq": (second, first * 32 // bits),
            "awq": (second * 32 // bits, first),
            "compressed-tensors": (first, second * 32 // bits),
        }[method]
        found.append((stored, f"{module}.weight", replace(tensor, dtype=f"{method} {bits} bits", shape=shape)))
    return found


def _packing(quantization: object) -> tuple[str, int]:
    """Return the method of packed weights and the bits of a value; 0 bits: weights are not packed, or unknown."""
    if not isinstance(quantization, dict):
        return "", 0
    method = quantization.get("quant_method")
    groups = quantization.get("config_groups")
    widths: list[object] = []
    if method in ("gptq", "awq"):  # a tuple: the value may be a list
        widths = [quantization.get("bits", quantization.get("w_bit"))]
    elif method == "compressed-tensors" and isinstance(groups, dict):
        weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        widths = [part.get("num_bits") for part in weights if isinstance(part, dict)]
    known = [width for width in widths if isinstance(width, int) and width in _PACKED_BITS]
    return str(method), known[0] if known and all(width == known[0] for width in widths) else 0


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}  # vLLM reports a missing or damaged configuration
    return found if isinstance(found, dict) else {}


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""
