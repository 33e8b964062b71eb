"""Weights of a large Llama in a file without data: enough for checks that read headers only."""

from __future__ import annotations

import json
import math
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_BYTES = 2


def enlarge(folder: Path, **changes: Any) -> None:
    """Change the configuration of a Llama, and replace its weights by zeros of the shapes that follow."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in _shapes(config):
        begin, end = end, end + _BYTES * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    hidden, wide, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries, keys = (config[heads] * config["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    yield "model.embed_tokens.weight", [vocabulary, hidden]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield f"{layer}.input_layernorm.weight", [hidden]
        yield f"{layer}.post_attention_layernorm.weight", [hidden]
        yield f"{layer}.self_attn.q_proj.weight", [queries, hidden]
        yield f"{layer}.self_attn.k_proj.weight", [keys, hidden]
        yield f"{layer}.self_attn.v_proj.weight", [keys, hidden]
        yield f"{layer}.self_attn.o_proj.weight", [hidden, queries]
        yield f"{layer}.mlp.gate_proj.weight", [wide, hidden]
        yield f"{layer}.mlp.up_proj.weight", [wide, hidden]
        yield f"{layer}.mlp.down_proj.weight", [hidden, wide]
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [vocabulary, hidden]
    if config.get("quantization_config", {}).get("load_in_8bit"):
        yield "model.layers.0.mlp.up_proj.SCB", [wide]
