"""Division of rows into steps, micro-batches and ranks' shares, and the loss computed on them."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from tests.trainer.tiny_model import SMALL
from tunesmith_trainer.training.attention import Attention
from tunesmith_trainer.training.batches import (
    Collator,
    Layout,
    StepPlan,
    micro_batches,
    micro_batches_of_rank,
    row_lengths,
)
from tunesmith_trainer.training.layout import LossImplementation, choose_loss_implementation
from tunesmith_trainer.training.lora import fuse
from tunesmith_trainer.training.loss import add_target_loss

if TYPE_CHECKING:
    from peft import PeftModel

    from tests.trainer.trainer_rig import Workbench

SEGMENTS = LossImplementation(Layout.FLAT, Attention.SEGMENTS)
LENGTHS = [5, 9, 3, 7, 8, 2, 6]
# architecture → its configuration, and the layout that fits it
ARCHITECTURES: dict[str, tuple[PretrainedConfig, Layout]] = {
    "llama": (LlamaConfig(**SMALL), Layout.FLAT),
    "llama with tied embeddings, as SmolLM2": (LlamaConfig(**SMALL, tie_word_embeddings=True), Layout.FLAT),
    "qwen2": (Qwen2Config(**SMALL), Layout.FLAT),
    "qwen3": (Qwen3Config(**SMALL), Layout.FLAT),
    "mistral with a window of 4 tokens": (MistralConfig(**SMALL, sliding_window=4), Layout.FLAT),
    "granite, which scales its logits": (GraniteConfig(**SMALL, logits_scaling=4.0), Layout.FLAT),
    "gemma2, which caps its attention": (Gemma2Config(**SMALL, query_pre_attn_scalar=16), Layout.PADDED),
}


def rows(*sizes: int) -> list[dict[str, Any]]:
    """Return random rows; the second half of each is learned."""
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 300, (size,), generator=generator).tolist() for size in sizes]
    return [{"input_ids": row, "labels": [-100] * (len(row) // 2) + row[len(row) // 2 :]} for row in ids]


def packed(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "input_ids": [token for part in parts for token in part["input_ids"]],
        "labels": [label for part in parts for label in part["labels"]],
        "seq_lengths": [len(part["input_ids"]) for part in parts],
    }


def tiny(config: PretrainedConfig) -> tuple[PeftModel, Any]:
    """Return a random model of the architecture with a LoRA adapter that changes its output."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    add_target_loss(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return model, base


def reference(model: PeftModel, parts: list[dict[str, Any]]) -> tuple[float, torch.Tensor]:
    """Compute loss and gradient from the logits of each row alone."""
    model.zero_grad()
    total = sum(
        torch.nn.functional.cross_entropy(
            model(input_ids=torch.tensor([part["input_ids"]])).logits[0, :-1],
            torch.tensor(part["labels"][1:]),
            reduction="sum",
        )
        for part in parts
    )
    assert isinstance(total, torch.Tensor)
    total.backward()
    return total.item(), gradient(model)


def gradient(model: PeftModel) -> torch.Tensor:
    found = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat(found)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).norm()) <= 1e-4 * float(other.norm())


def test_every_pass_takes_each_row_once_and_the_longest_rows_run_first() -> None:
    steps = list(StepPlan(LENGTHS, batch_size=3, seed=1, steps=8))
    assert [len(step) for step in steps] == [3, 3, 1, 3, 3, 1, 3, 3]
    assert sorted(LENGTHS[row] for row in steps[0]) == [7, 8, 9]
    for first in (0, 3):
        assert sorted(row for step in steps[first : first + 3] for row in step) == list(range(7))
    assert steps[:3] != steps[3:6]
    assert steps == list(StepPlan(LENGTHS, batch_size=3, seed=1, steps=8))
    assert steps != list(StepPlan(LENGTHS, batch_size=3, seed=2, steps=8))
    assert StepPlan(LENGTHS, batch_size=3, seed=1, steps=8).epoch(6) == 2


def test_lengths_are_those_of_the_selected_rows() -> None:
    table = Dataset.from_list(rows(*LENGTHS))
    assert row_lengths(table).tolist() == LENGTHS
    assert row_lengths(table.select([6, 0, 1])).tolist() == [6, 5, 9]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_share_all_micro_batches_and_have_the_same_number(ranks: int) -> None:
    parts = micro_batches(LENGTHS, 2)
    assert [LENGTHS[place] for place in parts[0]] == [9, 8]
    shares = [micro_batches_of_rank(parts, rank, ranks) for rank in range(ranks)]
    assert len({len(own) for own in shares}) == 1
    assert sorted(place for own in shares for part in own for place in part) == list(range(len(LENGTHS)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_fastest_correct_layout_is_chosen_and_returns_each_rows_loss(architecture: str) -> None:
    config, layout = ARCHITECTURES[architecture]
    model, base = tiny(config)
    parts = rows(30, 7, 18)
    loss, expected = reference(model, parts)
    implementation = choose_loss_implementation(model, base)
    assert implementation.layout is layout
    for batch in (parts, [packed(parts)], [packed(parts[:2]), parts[2]]):
        model.zero_grad()
        with implementation.use_attention(base):
            output = model(**Collator(size=8, pad=0, layout=layout).join(batch), target_loss=True)
            output.summed.backward()
        assert output.summed.item() == pytest.approx(loss, rel=1e-5)
        assert int(output.targets) == sum(label != -100 for part in parts for label in part["labels"])
        assert close(gradient(model), expected)


def test_neither_micro_batches_nor_ranks_change_loss_and_gradient() -> None:
    model, base = tiny(LlamaConfig(**SMALL))
    parts = rows(*LENGTHS)
    loss, expected = reference(model, parts)
    for size, ranks in ((7, 1), (1, 1), (2, 2), (2, 3), (4, 4)):
        model.zero_grad()
        total, seen = 0.0, set()
        for rank in range(ranks):
            step = Collator(size, 0, Layout.FLAT, rank, ranks)(parts)["step"]
            seen.add((step.counts, step.tokens, len(step.micro_batches)))
            with SEGMENTS.use_attention(base):
                for batch in step.micro_batches:
                    output = model(**batch, target_loss=True)
                    output.summed.backward()
                    total += output.summed.item()
        assert len(seen) == 1
        assert total == pytest.approx(loss, rel=1e-5)
        assert close(gradient(model), expected)


def test_fused_layers_change_neither_loss_nor_gradient() -> None:
    parts = rows(30, 7)
    for settings in ({}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, attention_bias=True))
        add_target_loss(base)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **settings)
        model = get_peft_model(base, config).eval()
        loss, expected = reference(model, parts)
        assert fuse(model) == 4
        assert choose_loss_implementation(model, base) == SEGMENTS
        model.zero_grad()
        with SEGMENTS.use_attention(base):
            output = model(**Collator(8, 0, Layout.FLAT).join(parts), target_loss=True)
            output.summed.backward()
        assert output.summed.item() == pytest.approx(loss, rel=1e-5)
        assert close(gradient(model), expected)


def test_packing_changes_neither_loss_nor_adapter_of_a_step(bench: Workbench) -> None:
    loss, weights = {}, {}
    for packing in (False, True):
        job = bench.job(hyperparameters={"maxSteps": 1, "batchSize": 32, "warmupRatio": 0.0})
        job["spec"]["dataset"] |= {"packing": packing, "maxLength": 128}
        output = bench.folder / f"packing-{packing}"
        ran = bench.run("train", job, output=str(output))
        assert ran.code == 0, ran.result.message
        with (output / "metrics.csv").open() as file:
            loss[packing] = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
        weights[packing] = load_file(output / "artifact/adapter_model.safetensors")
    assert loss[True] == pytest.approx(loss[False], rel=1e-5)
    for name, tensor in weights[True].items():
        assert torch.allclose(tensor, weights[False][name], atol=1e-5), name


def test_a_trained_head_gets_its_gradient() -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    add_target_loss(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    parts = rows(30, 7)
    _, expected = reference(model, parts)
    model.zero_grad()
    model(**Collator(8, 0, Layout.PADDED).join(parts), target_loss=True).summed.backward()
    assert close(gradient(model), expected)


def test_generation_is_unchanged(base_model: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(base_model)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    add_target_loss(base)
    with SEGMENTS.use_attention(base):
        base(input_ids=ids)
    after = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert before.tolist() == after.tolist()
