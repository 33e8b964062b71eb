"""Prefixes that the rows of a chat share: laid out and computed once, with the loss and gradient of whole rows."""

from __future__ import annotations

import csv
import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.trainer.architectures import FAMILIES, Family
from tests.trainer.chat_styles import STYLES, reasoned_chat
from tests.trainer.test_batches import close, gradient, reference, tiny
from tests.trainer.test_chat_templates import tokenizer_of
from tests.trainer.tiny_model import SMALL
from tunesmith.api.dataset import LossOn
from tunesmith_trainer.base_model.layers import can_share_prefixes
from tunesmith_trainer.data import IGNORED, Encoder, Row, RowForm
from tunesmith_trainer.data.prefixes import sequences, shared_tokens, trees_of
from tunesmith_trainer.data.tokens import _Writer, measure, open_rows, pack
from tunesmith_trainer.training.batches import Collator, Layout, first_whole_rows, without_shared_prefixes
from tunesmith_trainer.training.layout import choose_loss_implementation, shares_prefixes
from tunesmith_trainer.training.loss import add_target_loss

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset

    from tests.trainer.trainer_rig import Workbench

MODEL = SMALL | {"vocab_size": 500}


@dataclass(frozen=True)
class Chats:
    """Chats as whole rows and as packed sequences."""

    whole: list[dict[str, Any]]
    packed: Dataset
    shared: int

    @property
    def tokens(self) -> int:
        return sum(len(row["input_ids"]) for row in self.whole)


def packed_chats(
    base_model: Path, folder: Path, chats: list[dict[str, Any]], capacity: int = 2000, loss_on: LossOn | None = None
) -> Chats:
    """Return the rows of chats of Qwen3's template, packed into sequences of at most `capacity` tokens."""
    tokenizer, ends = tokenizer_of(base_model, STYLES["qwen3"])
    encoder = Encoder(tokenizer, ends, loss_on=loss_on)
    encoded = [encoder.encode(Row(RowForm.MESSAGES, chat, "line 1")) for chat in chats]
    keys = [number for number, rows in enumerate(encoded) for _ in rows]
    tokens = [tokens for rows in encoded for tokens in rows]
    with _Writer(folder / "rows.arrow", keyed=True) as writer:
        writer.write(tokens, keys)
    sizes = measure(folder / "rows.arrow")
    indices, path = np.arange(len(keys)), folder / "packed.arrow"
    packed = pack(folder / "rows.arrow", indices, sizes, capacity, path, share_prefixes=True)
    whole = [{"input_ids": row.input_ids, "labels": row.labels} for row in tokens]
    rows = open_rows(path).with_format("numpy")
    assert packed.lengths.tolist() == [len(row["input_ids"]) for row in rows]
    assert sum(packed.lengths) + packed.shared == sum(len(row.input_ids) for row in tokens)
    return Chats(whole, rows, packed.shared)


def learned(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    return [int(token) for token in row["input_ids"]], [int(label) for label in row["labels"]]


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**MODEL),
        LlamaConfig(**MODEL),
        MistralConfig(**MODEL, sliding_window=40),
        Qwen3MoeConfig(**MODEL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("loss_on", [LossOn.ASSISTANT_TURNS, LossOn.COMPLETION])
def test_loss_and_gradient_of_a_chat_of_8_turns(
    base_model: Path, tmp_path: Path, config: PretrainedConfig, loss_on: LossOn
) -> None:
    chats = packed_chats(base_model, tmp_path, [reasoned_chat(8, "1"), reasoned_chat(3, "2")], loss_on=loss_on)
    (row,) = chats.packed
    if loss_on is LossOn.ASSISTANT_TURNS:
        assert len(chats.whole) == 11
        assert len(row["input_ids"]) < 0.5 * chats.tokens
    model, base = tiny(config)
    loss, expected = reference(model, chats.whole)
    implementation = choose_loss_implementation(model, base)
    assert can_share_prefixes(config)
    assert shares_prefixes(model, base, implementation)
    for collate in (
        Collator(8, 0, Layout.FLAT, shares_prefixes=True),
        Collator(8, 0, Layout.FLAT),
        Collator(8, 0, Layout.PADDED),
    ):
        model.zero_grad()
        step = collate([row])["step"]
        (batch,) = step.micro_batches
        with implementation.use_attention(base) if collate.layout is Layout.FLAT else torch.enable_grad():
            output = model(**batch, target_loss=True)
            output.summed.backward()
        assert output.summed.item() == pytest.approx(loss, rel=1e-5)
        assert float((gradient(model) - expected).norm()) <= 1e-5 * float(expected.norm())
        assert step.tokens == chats.tokens - (chats.shared if collate.shares_prefixes else 0)
        assert step.counts == (int(output.targets),)


def test_ranks_and_micro_batches_do_not_change_the_loss(base_model: Path, tmp_path: Path) -> None:
    chats = packed_chats(base_model, tmp_path, [reasoned_chat(3, str(number)) for number in range(5)], capacity=300)
    rows = list(chats.packed)
    assert len(rows) > 2
    model, base = tiny(Qwen3Config(**MODEL))
    loss, expected = reference(model, chats.whole)
    implementation = choose_loss_implementation(model, base)
    for shares, size, ranks in ((True, 1, 1), (True, 2, 2), (False, 1, 3), (False, 2, 2)):
        model.zero_grad()
        total, seen = 0.0, set()
        for rank in range(ranks):
            step = Collator(size, 0, Layout.FLAT, rank, ranks, shares_prefixes=shares)(rows)["step"]
            seen.add((step.counts, step.tokens, len(step.micro_batches)))
            with implementation.use_attention(base):
                for batch in step.micro_batches:
                    assert batch["input_ids"].numel() <= size * 300
                    output = model(**batch, target_loss=True)
                    output.summed.backward()
                    total += output.summed.item()
        assert len(seen) == 1
        assert total == pytest.approx(loss, rel=1e-5)
        assert close(gradient(model), expected)


@pytest.mark.parametrize("capacity", [250, 300, 2000])
def test_every_row_is_packed_once_as_it_was(base_model: Path, tmp_path: Path, capacity: int) -> None:
    chats = packed_chats(base_model, tmp_path, [reasoned_chat(4, str(number)) for number in range(6)], capacity)
    assert chats.shared > 0
    assert max(len(row["input_ids"]) for row in chats.packed) <= capacity
    expected = sorted(learned(row) for row in chats.whole)
    whole = [{"input_ids": ids, "labels": labels} for row in chats.packed for ids, labels in sequences(row)]
    assert sorted(map(learned, whole)) == expected
    parts = [part for row in chats.packed for part in without_shared_prefixes(row)]
    assert max(len(part["input_ids"]) for part in parts) <= capacity
    assert len(parts) == len(first_whole_rows(chats.packed, len(chats.packed)))
    separate = [{"input_ids": ids, "labels": labels} for part in parts for ids, labels in sequences(part)]
    assert sorted(map(learned, separate)) == expected


def test_the_keys_that_attention_gathers_are_bounded() -> None:
    text = np.arange(400)
    rows = [(text[: end + 2], np.where(text[: end + 2] > end, text[: end + 2], IGNORED)) for end in range(20, 398, 2)]
    trees = trees_of(np.zeros(len(rows), np.uint64), 1000, lambda _: iter([rows]))
    assert sorted(trees.rows) == list(range(len(rows)))
    for begin, end in itertools.pairwise(trees.bounds):
        whole = sum(len(rows[row][0]) for row in trees.rows[begin:end])
        assert whole <= 4 * (whole - trees.starts[begin:end].sum())
    assert len(trees.bounds) - 1 < len(rows) / 4


def test_what_is_learned_is_never_in_a_shared_prefix() -> None:
    trunk = np.array([1, 2, 3, 4, 5, 6])
    for ids, labels, shared in (
        ([1, 2, 3, 9], [IGNORED, IGNORED, IGNORED, 9], 2),
        ([1, 2, 3, 4, 5, 6], [IGNORED, IGNORED, 3, IGNORED, IGNORED, 6], 1),
        ([1, 2, 3], [IGNORED, IGNORED, 3], 1),
        ([1, 2, 3], [IGNORED, 2, 3], 0),
        ([9, 2, 3], [IGNORED, IGNORED, 3], 0),
    ):
        assert shared_tokens(trunk, np.array(ids), np.array(labels)) == shared


def test_an_architecture_that_caps_its_attention_cannot_share() -> None:
    assert not can_share_prefixes(Gemma2Config(**MODEL, query_pre_attn_scalar=16))
    model, base = tiny(Gemma2Config(**MODEL, query_pre_attn_scalar=16))
    assert not shares_prefixes(model, base, choose_loss_implementation(model, base))


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if can_share_prefixes(family.config)], ids=lambda family: family.name
)
def test_an_architecture_that_can_share_does(family: Family) -> None:
    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_config(family.config).float()
    add_target_loss(base)
    targets = rf"(?!.*(vision|audio)).*\.({'|'.join(map(re.escape, family.explicit))})"
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    assert shares_prefixes(model, base, choose_loss_implementation(model, base))


def test_sharing_changes_neither_loss_nor_adapter_of_a_step(bench: Workbench) -> None:
    loss, weights, tokens = {}, {}, {}
    for packing in (False, True):
        job = bench.job(
            [reasoned_chat(3, str(number)) for number in range(10)],
            hyperparameters={"maxSteps": 1, "batchSize": 64, "warmupRatio": 0.0},
        )
        job["spec"]["dataset"] |= {"packing": packing, "maxLength": 512, "chatTemplate": STYLES["qwen3"].template}
        output = bench.folder / f"packing-{packing}"
        ran = bench.run("train", job, output=str(output))
        assert ran.code == 0, ran.result.message
        counted = ran.result.preflight
        assert counted is not None
        tokens[packing] = (counted.tokens, counted.target_tokens)
        assert bool(counted.shared_tokens) is packing
        assert any("tokens that rows of a chat have in common" in line for line in ran.lines) is packing
        with (output / "metrics.csv").open() as file:
            loss[packing] = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
        weights[packing] = load_file(output / "artifact/adapter_model.safetensors")
    assert tokens[True] == tokens[False]
    assert loss[True] == pytest.approx(loss[False], rel=1e-5)
    for name, tensor in weights[True].items():
        assert torch.allclose(tensor, weights[False][name], atol=1e-5), name
