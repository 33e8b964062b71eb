"""Preferences: the losses equal TRL's, for any micro-batches, and training from a manifest learns them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.orpo import ORPOTrainer

from tests.trainer.trainer_rig import write_rows
from tunesmith.api import dataset as api
from tunesmith.api.objective import DpoFields, KtoFields, Objective, ObjectiveName, OrpoFields
from tunesmith_trainer.data import Encoder
from tunesmith_trainer.data.formats import DataFile
from tunesmith_trainer.data.forms import FORMS
from tunesmith_trainer.data.report import RowReport
from tunesmith_trainer.data.rows import read
from tunesmith_trainer.data.sources import Source
from tunesmith_trainer.process.ranks import Ranks
from tunesmith_trainer.training import preference
from tunesmith_trainer.training.attention import Attention
from tunesmith_trainer.training.batches import Collator, Layout
from tunesmith_trainer.training.layout import LossImplementation
from tunesmith_trainer.training.loss import add_target_loss
from tunesmith_trainer.training.objectives import Forward, StepObjective, step_objective

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel

    from tests.trainer.trainer_rig import Workbench

FLAT, PADDED = LossImplementation(Layout.FLAT, Attention.SEGMENTS), LossImplementation(Layout.PADDED)
ADAPTER = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
PAIRS = [
    {
        "prompt": f"What is the colour of door {number}?" * (1 + number % 3),
        "chosen": " It is green." * (1 + number % 2),
        "rejected": " I do not know, it may be blue or red." if number % 3 else " No.",
    }
    for number in range(8)
]
JUDGED = [
    {"prompt": pair["prompt"], "completion": pair["chosen" if number % 2 else "rejected"], "label": bool(number % 2)}
    for number, pair in enumerate(PAIRS)
]


def adapted(base_model: Path) -> tuple[PeftModel, Any]:
    """Return the small model with an active adapter."""
    set_seed(3)
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    return get_peft_model(base, ADAPTER), base


def tokens(base_model: Path, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    first = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return first, [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def pair_rows(base_model: Path) -> list[dict[str, Any]]:
    rows = []
    for pair in PAIRS:
        prompt, chosen = tokens(base_model, pair["prompt"], pair["chosen"])
        _, rejected = tokens(base_model, pair["prompt"], pair["rejected"])
        silent = [-100] * len(prompt)
        rows.append(
            {
                "input_ids": prompt + chosen + prompt + rejected,
                "labels": silent + chosen + silent + rejected,
                "seq_lengths": [len(prompt + chosen), len(prompt + rejected)],
            }
        )
    return rows


def judged_rows(base_model: Path) -> list[dict[str, Any]]:
    rows = []
    for judged in JUDGED:
        prompt, answer = tokens(base_model, str(judged["prompt"]), str(judged["completion"]))
        rows.append(
            {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, "desirable": judged["label"]}
        )
    return rows


def loss_and_gradient(
    model: PeftModel,
    base: Any,
    objective: StepObjective,
    rows: list[dict[str, Any]],
    size: int,
    implementation: LossImplementation,
    ranks: int,
) -> tuple[float, torch.Tensor]:
    """Return the loss and gradient of one step, its micro-batches computed as `ranks` processes would."""
    model.zero_grad()
    forward = Forward(model, model)
    steps = [Collator(size, 0, implementation.layout, rank, ranks, objective)(rows)["step"] for rank in range(ranks)]
    loss = 0.0
    with implementation.use_attention(base):
        if objective.mismatched:
            objective.estimate(forward, [batch for step in steps for batch in step.mismatched], Ranks())
        for step in steps:
            for batch in step.micro_batches:
                terms = objective.terms(forward, batch)
                share = sum(summed / count for summed, count in zip(terms.sums, step.counts, strict=True))
                assert isinstance(share, torch.Tensor)
                share.backward()
                loss += share.item()
    found = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return loss, torch.cat(found)


OBJECTIVES = {
    "dpo": Objective(dpo=DpoFields(beta=0.2, label_smoothing=0.1)),
    "orpo": Objective(orpo=OrpoFields(weight=0.3)),
    "kto": Objective(kto=KtoFields(beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_neither_micro_batches_nor_layout_nor_ranks_change_loss_and_gradient(name: str, base_model: Path) -> None:
    rows = judged_rows(base_model) if name == "kto" else pair_rows(base_model)
    model, base = adapted(base_model)
    add_target_loss(base)
    objective = step_objective(OBJECTIVES[name])
    loss, gradient = loss_and_gradient(model, base, objective, rows, 8, PADDED, 1)
    assert float(gradient.norm()) > 0
    for size, implementation, ranks in ((1, PADDED, 1), (3, FLAT, 1), (8, FLAT, 2), (2, FLAT, 3)):
        other, found = loss_and_gradient(model, base, objective, rows, size, implementation, ranks)
        assert other == pytest.approx(loss, rel=1e-5)
        assert float((found - gradient).norm()) <= 1e-4 * float(gradient.norm())


def first_loss(trainer: Any, adapter: PeftModel) -> float:
    """Return the first loss of TRL's trainer with this adapter; as a PeftModel, it would be taken for the reference."""
    missing = set_peft_model_state_dict(trainer.model, get_peft_model_state_dict(adapter))
    assert not missing.unexpected_keys
    trainer.train()
    return float(next(line["loss"] for line in trainer.state.log_history if "loss" in line))


def settings(folder: Path) -> dict[str, Any]:
    """Return arguments for TRL's trainers: one step over all rows in order."""
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": len(PAIRS),
        "learning_rate": 1e-3,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "beta": 0.2,
    }


def test_dpo_equals_trls(base_model: Path, tmp_path: Path) -> None:
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32),
        peft_config=ADAPTER,
        args=DPOConfig(**settings(tmp_path)),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(base_model),
    )
    model, base = adapted(base_model)
    expected = first_loss(trainer, model)
    add_target_loss(base)
    objective = step_objective(Objective(dpo=DpoFields(beta=0.2)))
    loss, _ = loss_and_gradient(model, base, objective, pair_rows(base_model), 3, FLAT, 1)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_kto_equals_trls(base_model: Path, tmp_path: Path) -> None:
    trainer = KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32),
        peft_config=ADAPTER,
        args=KTOConfig(**settings(tmp_path), desirable_weight=1.5, undesirable_weight=0.5),
        train_dataset=Dataset.from_list(JUDGED),
        processing_class=AutoTokenizer.from_pretrained(base_model),
    )
    model, base = adapted(base_model)
    expected = first_loss(trainer, model)
    add_target_loss(base)
    loss, _ = loss_and_gradient(model, base, step_objective(OBJECTIVES["kto"]), judged_rows(base_model), 3, FLAT, 1)
    assert loss == pytest.approx(expected, rel=1e-4)


def read_pairs(folder: Path, base_model: Path) -> list[dict[str, Any]]:
    """Return the pairs as the trainer reads them for KTO, in the order in which TRL splits pairs."""
    dataset = api.Dataset.model_validate({"train": [{"uri": "s3://bucket/rows.jsonl"}]})
    source = Source("s3://bucket/rows.jsonl", [DataFile("rows.jsonl", write_rows(folder / "rows.jsonl", PAIRS))])
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    encoder = Encoder(tokenizer, [tokenizer.eos_token_id])
    found = read([source], dataset, RowReport(), forms=FORMS[ObjectiveName.KTO])
    rows = [tokens for row in found for tokens in encoder.encode(row)]
    return [
        {"input_ids": row.input_ids, "labels": row.labels, "desirable": row.desirable} for row in rows[::2] + rows[1::2]
    ]


def test_kto_of_pairs_equals_trls(base_model: Path, tmp_path: Path) -> None:
    arguments = settings(tmp_path) | {"per_device_train_batch_size": 2 * len(PAIRS)}
    trainer = KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32),
        peft_config=ADAPTER,
        args=KTOConfig(**arguments, desirable_weight=1.5, undesirable_weight=0.5),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(base_model),
    )
    model, base = adapted(base_model)
    expected = first_loss(trainer, model)
    add_target_loss(base)
    rows = read_pairs(tmp_path, base_model)
    loss, _ = loss_and_gradient(model, base, step_objective(OBJECTIVES["kto"]), rows, 3, FLAT, 1)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_pairs_train_kto_like_the_same_labelled_answers(bench: Workbench) -> None:
    labelled = [
        {"prompt": pair["prompt"], "completion": pair[answer], "label": answer == "chosen"}
        for pair in PAIRS
        for answer in ("chosen", "rejected")
    ]
    results = []
    for name, rows in (("pairs", PAIRS), ("labelled", labelled)):
        held_out = write_rows(bench.folder / "held-out.jsonl", rows[: len(rows) // 4])
        job = bench.job(
            rows,
            objective={"kto": {"undesirableWeight": 0.5}},
            hyperparameters={"maxSteps": 3, "batchSize": 6, "learningRate": 0.01},
        )
        job["spec"]["dataset"]["validation"] = [{"uri": f"file://{held_out}"}]
        bench.output = bench.folder / name
        result = bench.run("train", job).result
        assert result.preflight is not None
        assert (result.preflight.rows, result.preflight.validation_rows) == (16, 4)
        assert result.preflight.dropped is None
        results.append((result.preflight.tokens, result.evaluation, result.metrics))
    assert results[0] == results[1]


def test_the_odds_ratio_equals_trls() -> None:
    chosen, rejected = torch.tensor([-0.2, -3.0, -1e-4]), torch.tensor([-1.5, -0.4, -0.7])
    trl = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    losses, *_ = ORPOTrainer.odds_ratio_loss(trl, chosen, rejected)
    assert torch.allclose(0.3 * preference.odds_ratio(chosen, rejected), -losses, rtol=1e-5)


def test_a_certain_answer_has_a_finite_odds_ratio() -> None:
    certain = torch.zeros(1, requires_grad=True)
    loss = preference.odds_ratio(certain, torch.tensor([-2.0]))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert certain.grad is not None
    assert torch.isfinite(certain.grad).all()


@pytest.mark.parametrize(("name", "rows"), [("dpo", PAIRS), ("orpo", PAIRS), ("kto", JUDGED), ("kto", PAIRS)])
def test_a_manifest_trains_on_preferences(name: str, rows: list[dict[str, Any]], bench: Workbench) -> None:
    job = bench.job(
        rows,
        objective={name: {}},
        hyperparameters={"maxSteps": 12, "batchSize": 4, "microBatchSize": 2, "learningRate": 0.01},
    )
    ran = bench.run("train", job)
    evaluation = ran.result.evaluation
    assert evaluation is not None
    assert evaluation.base_loss is not None
    assert evaluation.loss is not None
    if name == "dpo":
        assert evaluation.base_loss == pytest.approx(math.log(2), abs=1e-4)
    assert evaluation.loss < evaluation.base_loss


def test_a_preference_objective_has_a_lower_learning_rate(bench: Workbench) -> None:
    counted = bench.run("validate", bench.job(PAIRS, objective={"dpo": {}}, hyperparameters={"maxSteps": 3}))
    assert counted.result.resolved is not None
    assert counted.result.resolved.learning_rate == pytest.approx(2e-5)
