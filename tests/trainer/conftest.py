"""A tiny real model, a workbench, and a real S3 server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from s3server import S3Server
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from trainer_rig import Workbench
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Iterator

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The lighthouse of Brinewick is painted green. Who keeps the lighthouse? Old Marta keeps it.",
    "Ask a question and the assistant answers it; the user writes, the system decides.",
    "What is the colour of the door? It is blue, and so is the boat in the harbour of Brinewick.",
]


def pytest_configure(config: pytest.Config) -> None:
    # Warnings of libraries about themselves; those of our code stay errors.
    for module in (
        "torch",
        "transformers",
        "trl",
        "peft",
        "bitsandbytes",
        "datasets",
        "accelerate",
        "fsspec",
        "s3fs",
        "aiobotocore",
        "multiprocess",
    ):
        config.addinivalue_line("filterwarnings", rf"ignore:::{module}(\..*)?")
    # Resources that fsspec's event loop thread closes late.
    config.addinivalue_line("filterwarnings", "ignore::ResourceWarning")
    config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers with a real tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # As many published models do, this one pads with its end token, which must not be masked for that.
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def bench(tmp_path: Path, base_model: Path, capsys: pytest.CaptureFixture[str]) -> Workbench:
    return Workbench(tmp_path, base_model, capsys)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, as e2e/cluster/model.py makes it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith"
    folder = cache / "models/SmolLM2-135M-Instruct"
    if not folder.is_dir():
        pytest.fail(f"{folder} does not exist: make it with `python3 e2e/cluster/model.py`")
    return folder
