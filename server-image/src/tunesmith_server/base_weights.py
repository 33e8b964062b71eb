"""Shapes and norms of the base model's tensors, to which an adapter's are compared."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.contracts.safetensors import Tensor, read_tensors
from tunesmith_server.tensor_values import FLOATS, blocks

if TYPE_CHECKING:
    from pathlib import Path

MEASURED_WHOLE = 1 << 20
"""Number of values up to which a tensor is read in full; of a larger tensor, a sample of this size is read."""
_BLOCK = 1 << 14
_FORMER_NAMES = {"model.language_model.": "language_model.model.", "model.": "backbone."}
"""Beginnings of the names of modules in transformers, with those of published weights (Gemma 3, Nemotron-H)."""
_NOMINAL_DEVIATION = 0.02
"""Usual standard deviation of a linear layer's weights."""


@dataclass(frozen=True)
class BaseWeights:
    """Tensors of a base model by name, each with the file that holds it.

    Attributes:
        folder: folder of the model.
        files: name of the file that holds each tensor.
        tensors: position and shape of each tensor.
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

        Large tensors are sampled in evenly spaced blocks, always the same ones. The norm of a quantised tensor (FP8,
        INT8) cannot be computed without its scales; for it, and for a tensor that is zero or not finite, the norm of a
        tensor of its shape with values of the usual size is returned.
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
    return BaseWeights(folder, files, tensors, _architecture(folder / "config.json"))


def _architecture(config: Path) -> str:
    try:
        named = json.loads(config.read_bytes()).get("architectures")
    except (FileNotFoundError, ValueError, RecursionError, AttributeError):
        return ""  # vLLM reports a missing or damaged configuration
    return str(named[0]) if isinstance(named, list) and named else ""
