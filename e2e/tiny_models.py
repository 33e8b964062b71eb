"""Make tiny random models of other architectures than the demo's, with the tokenizer of the demo's base model.

It needs the trainer's environment: python -m e2e.tiny_models TOKENIZER_FOLDER FOLDER
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, Qwen3Config

from tests.trainer.chat_styles import STYLES

# The weights are large enough for a small output layer to prefer one token clearly.
_TOKENS = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "initializer_range": 0.1}
MODELS = {
    "tiny-qwen3": (
        Qwen3Config(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            **_TOKENS,
        ),
        "qwen3",
    ),
    "tiny-gpt2": (GPT2Config(n_embd=128, n_layer=2, n_head=4, n_positions=1024, **_TOKENS), "chatml"),
}
"""Configuration and style of chat template by name."""


def main() -> None:
    """Write each model to a folder of its name."""
    tokenizer, target = Path(sys.argv[1]), Path(sys.argv[2])
    for name, (config, style) in MODELS.items():
        torch.manual_seed(0)
        folder = target / name
        AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / file, folder / file)
        (folder / "chat_template.jinja").write_text(STYLES[style].template)


if __name__ == "__main__":
    main()
