#!/usr/bin/env python3
"""Measure the CPU time of encoding chats: rendered with the chat template, answers located, tokenised.

Prints a Markdown table with the median of the repeats, in milliseconds of CPU per chat.
Needs the trainer's environment:

    uv run --frozen --project trainer-image benchmarks/encoding/benchmark.py --base FOLDER --chats 2000
    uv run --frozen --project trainer-image benchmarks/encoding/benchmark.py --base FOLDER --profile "4 turns"
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import random
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from tunesmith_trainer.data import Encoder, Row, RowForm

if TYPE_CHECKING:
    from collections.abc import Callable

_BATCH = 512
_WORDS = ("lighthouse", "Brinewick", "green", "Marta", "keeps", "the", "harbour", "boat", "of", "and", "door", "blue")
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
_REASONING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.index0 > ns.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that omits the reasoning of earlier answers."""


def _text(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(most // 4, most)))


def _turns(rng: random.Random, count: int, *, reasoning: bool = False) -> list[dict[str, Any]]:
    messages = []
    for _ in range(count):
        thought = {"reasoning_content": _text(rng, 120)} if reasoning else {}
        messages += [
            {"role": "user", "content": _text(rng, 20) + "?"},
            {"role": "assistant", "content": _text(rng, 60), **thought},
        ]
    return messages


def _called(rng: random.Random) -> dict[str, Any]:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"city": _text(rng, 4)}}}
    messages = [
        {"role": "user", "content": _text(rng, 20) + "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": _text(rng, 20), "tool_call_id": "call_1"},
        {"role": "assistant", "content": _text(rng, 60)},
    ]
    return {"messages": messages, "tools": [_TOOL]}


CHATS: dict[str, tuple[Callable[[random.Random], dict[str, Any]], str | None]] = {
    "1 turn": (lambda rng: {"messages": _turns(rng, 1)}, None),
    "4 turns": (lambda rng: {"messages": _turns(rng, 4)}, None),
    "8 turns": (lambda rng: {"messages": _turns(rng, 8)}, None),
    "tool call": (_called, _REASONING),
    "8 turns, reasoning": (lambda rng: {"messages": _turns(rng, 8, reasoning=True)}, _REASONING),
}
"""Kinds of chats, with the template that replaces the base model's."""


def encode(encoder: Encoder, rows: list[Row]) -> tuple[float, int, int]:
    """Return CPU seconds of this process and its threads, the number of rows and that of their tokens."""
    start = time.process_time()
    encoded = [one for begin in range(0, len(rows), _BATCH) for one in encoder.encode_all(rows[begin : begin + _BATCH])]
    seconds = time.process_time() - start
    texts = [tokens for one in encoded for tokens in getattr(one, "rows", [one])]
    return seconds, len(texts), sum(len(tokens.input_ids) for tokens in texts)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--chats", type=int, default=2000, help="chats of each kind (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="repeats, interleaved (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=CHATS, default=list(CHATS), metavar="KIND")
    parser.add_argument("--profile", choices=CHATS, metavar="KIND", help="print the profile of one kind instead")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    kinds = [options.profile] if options.profile else options.kinds
    rows = {
        kind: [Row(RowForm.MESSAGES, CHATS[kind][0](rng), f"row {number}") for number in range(options.chats)]
        for kind in kinds
        for rng in (random.Random(1),)  # noqa: S311 - rows, not secrets
    }
    encoders = {kind: Encoder(tokenizer, [tokenizer.eos_token_id], chat_template=CHATS[kind][1]) for kind in kinds}
    if options.profile:
        profile = cProfile.Profile()
        profile.runcall(encode, encoders[options.profile], rows[options.profile])
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
        return
    measured: dict[str, list[tuple[float, int, int]]] = {kind: [] for kind in kinds}
    for _ in range(options.repeats):
        for kind in kinds:
            measured[kind].append(encode(encoders[kind], rows[kind]))
    print("| chats | rows per chat | tokens per chat | ms of CPU per chat (range) |\n|---|--:|--:|--:|")
    for kind, repeats in measured.items():
        times = [1000 * seconds / options.chats for seconds, _, _ in repeats]
        texts, tokens = (repeats[0][index] / options.chats for index in (1, 2))
        print(f"| {kind} | {texts:.0f} | {tokens:.0f} | {median(times):.3f} ({min(times):.3f}–{max(times):.3f}) |")


if __name__ == "__main__":
    main()
