"""Numbers of GPUs among which vLLM can divide a base model."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith_server.parallel_sizes import config_problem, parallel_problem

LLAMA_8B = {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "intermediate_size": 14336}
QWEN_7B = {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584, "intermediate_size": 18944}
SMOL = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576, "intermediate_size": 1536}
ONE_KV_HEAD = {"num_attention_heads": 8, "num_key_value_heads": 1, "intermediate_size": 512}
LATENT = {"num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512, "moe_intermediate_size": 2048}
NESTED = {"model_type": "gemma3", "text_config": SMOL}
OLD = {"n_head": 12, "n_embd": 768}
GROUPS = {**LLAMA_8B, "intermediate_size": 11008, "quantization_config": {"quant_method": "gptq", "group_size": 128}}


@pytest.mark.parametrize(
    ("config", "works", "fails"),
    [
        (LLAMA_8B, [1, 2, 4, 8, 16, 32], [3, 5, 6, 12, 64]),
        (QWEN_7B, [1, 2, 4], [3, 7, 8, 14, 28]),
        (SMOL, [1, 3], [2, 4, 9]),
        (ONE_KV_HEAD, [1, 2, 4, 8], [3, 16]),
        (LATENT, [1, 2, 16, 64], [3]),
        (NESTED, [1, 3], [2]),
        (OLD, [1, 2, 3, 4, 6, 12], [5, 8]),
        (GROUPS, [1, 2], [4, 8, 3]),
        ({"model_type": "unknown"}, [1, 2, 3, 7], []),
    ],
)
def test_sizes(config: dict[str, Any], works: list[int], fails: list[int]) -> None:
    assert [size for size in [*works, *fails] if parallel_problem(config, size) is not None] == fails


def test_the_sentence_names_the_sizes_that_work() -> None:
    assert parallel_problem(QWEN_7B, 8) == (
        "The base model has 28 attention heads, 4 KV heads and feed-forward layers of 18944, which cannot be divided "
        "among 8 GPUs: set resources.gpus to one of 1, 2, 4."
    )


@pytest.mark.parametrize("document", [b"{", b"[]", b"[" * 100_000, b'{"num_attention_heads": "nine"}', b"{}"])
def test_a_malformed_config_is_left_to_others(document: bytes) -> None:
    assert config_problem(document, 7) is None
