"""Sizes of tensor parallelism that vLLM accepts for a base model, from its config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_HEADS = ("num_attention_heads", "n_head", "num_heads")
_INTERMEDIATE = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
_MAX_SIZE = 64


@dataclass(frozen=True)
class _Shape:
    """Parts of a model that are divided; 0 or empty: not known, so not checked."""

    heads: int
    kv_heads: int
    widths: tuple[int, ...]
    attention: int
    group: int

    def divides(self, size: int) -> bool:
        """Return True if `size` GPUs can share each layer.

        vLLM (`ModelConfig.verify_with_parallel_config`, `QKVParallelLinear`, `ColumnParallelLinear`) divides attention
        heads and feed-forward layers evenly. KV heads are divided, or each is copied to the same number of GPUs.
        Quantised weights are divided between groups.
        """
        if self.heads % size:
            return False
        if self.kv_heads and self.kv_heads % size and size % self.kv_heads:
            return False
        rows = (*self.widths, self.attention) if self.group else self.widths
        return all(width % (size * max(self.group, 1)) == 0 for width in rows)


def config_problem(document: bytes, tensor: int) -> str | None:
    """Return the sentence of `parallel_problem` for a config.json; None if it is not JSON, which others report."""
    try:
        config = json.loads(document)
    except (ValueError, RecursionError):
        return None
    return parallel_problem(config, tensor) if isinstance(config, dict) else None


def parallel_problem(config: Mapping[str, Any], tensor: int) -> str | None:
    """Return a sentence with the sizes that work, or None if vLLM can divide the model or its shape is unknown.

    Args:
        config: content of config.json.
        tensor: number of GPUs that share each layer.
    """
    shape = _shape(config)
    if tensor > 1 and not shape.divides(tensor):
        group = f", quantised in groups of {shape.group}" if shape.group else ""
        widths = f" and feed-forward layers of {' and '.join(map(str, shape.widths))}" if shape.widths else ""
        parts = f"{shape.heads} attention heads, {shape.kv_heads or shape.heads} KV heads{widths}{group}"
        works = ", ".join(str(size) for size in range(1, _MAX_SIZE + 1) if shape.divides(size))
        return (
            f"The base model has {parts}, which cannot be divided among {tensor} GPUs: set resources.gpus to one "
            f"of {works}."
        )
    return None


def _shape(config: Mapping[str, Any]) -> _Shape:
    text = config.get("text_config")
    fields = {**config, **text} if isinstance(text, dict) else config
    quantization = config.get("quantization_config")
    group = _number(quantization, "group_size") if isinstance(quantization, dict) else 0
    latent = _number(fields, "kv_lora_rank") > 0  # latent attention has no KV heads of its own
    widths = [] if "intermediate_size" not in fields else [_number(fields, name) for name in _INTERMEDIATE]
    heads = _number(fields, *_HEADS)
    head_size = _number(fields, "v_head_dim", "head_dim") or _number(fields, "hidden_size") // max(heads, 1)
    return _Shape(
        heads=heads,
        kv_heads=0 if latent else _number(fields, "num_key_value_heads"),
        widths=tuple(width for width in widths if width),
        attention=heads * head_size,
        group=group,
    )


def _number(fields: Mapping[str, Any], *names: str) -> int:
    """Return the first of the fields that is a positive integer, or 0."""
    found = (fields.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool) and value > 0), 0)
