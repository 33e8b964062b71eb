"""The reserved arguments of the engine: their documentation, and that no argument of vLLM is shadowed by accident."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tunesmith.api.engine_arguments import RESERVED_ARGUMENTS, RESERVED_VARIABLES, reserved_argument, reserved_variable

DOCUMENTATION = Path(__file__).resolve().parents[2] / "docs/requests.md"


def test_the_documentation_lists_them_with_their_reasons() -> None:
    text = DOCUMENTATION.read_text()
    table = text[text.index("| Why it is reserved") : text.index("`engine.env` takes")]
    rows = [line.split("|")[1:3] for line in table.splitlines()[2:] if line]
    listed = {name: reason.strip() for reason, names in rows for name in re.findall("`(--[a-z0-9-]+)`", names)}
    assert listed == {name: reason[0].upper() + reason[1:] for name, reason in RESERVED_ARGUMENTS.items()}
    assert all(re.split(r"\[", variable)[0] in text for variable in RESERVED_VARIABLES)


@pytest.mark.parametrize(
    "argument",
    [
        "--block-size", "--chat-template-content-format", "--cpu-offload-gb", "--default-chat-template-kwargs",
        "--enable-auto-tool-choice", "--enable-expert-parallel", "--enable-prefix-caching", "--enforce-eager",
        "--generation-config", "--gpu-memory-utilization", "--kv-cache-dtype", "--kv-offloading-size",
        "--limit-mm-per-prompt", "--log-level", "--lora-dtype", "--max-log-len", "--max-num-batched-tokens",
        "--max-num-seqs", "--model-impl", "--otlp-traces-endpoint", "--quantization", "--reasoning-parser", "--seed",
        "--speculative-config", "--tokenizer-mode", "--tool-call-parser", "qwen3", "-1", "{}", "a=--host",
    ],
)  # fmt: skip
def test_tuning_arguments_are_allowed(argument: str) -> None:
    assert reserved_argument(argument) is None


@pytest.mark.parametrize("argument", ["--", "--h", "--host", "--tens", "--max-lo", "-O3", "-tp", "-q=x"])
def test_abbreviations_are_reserved(argument: str) -> None:
    assert reserved_argument(argument) is not None


def test_variables_are_matched_whole() -> None:
    assert reserved_variable("PYTHONPATH")
    assert reserved_variable("TUNESMITH_ANYTHING")
    assert not reserved_variable("MY_PYTHONPATH")
    assert not reserved_variable("HOME_FOLDER")
