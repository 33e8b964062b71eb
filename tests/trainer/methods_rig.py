"""Train an adapter of any method for a few steps on a tiny model, without the trainer's loop, and save it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import set_seed

from tunesmith.api.finetunejob import FineTuneJobSpec
from tunesmith_trainer.artifact import package
from tunesmith_trainer.base_model import model as base_model
from tunesmith_trainer.base_model.logits import last_logits
from tunesmith_trainer.methods import conversion, servable
from tunesmith_trainer.methods.config import MethodPlan, plan_method
from tunesmith_trainer.methods.targets import modules_of
from tunesmith_trainer.methods.wrap import wrap

if TYPE_CHECKING:
    from pathlib import Path

    from tunesmith.api.finetunejob_status import ServableStatus

PROMPTS = [[5, 9, 33, 12], [40, 41, 7, 19, 88, 3]]


@dataclass
class Trial:
    """Result of trying a method."""

    planned: MethodPlan
    model: Any
    losses: list[float]
    base_logits: list[torch.Tensor]
    logits: list[torch.Tensor]
    servable: ServableStatus


def spec_of(method: dict[str, Any], **more: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "baseModel": {"uri": "hf://tiny/llama"},
            "dataset": {"train": [{"uri": "s3://tiny/rows.jsonl"}]},
            "method": method,
            "resources": {"gpus": 0},
            **more,
        }
    )


def plan(method: dict[str, Any], base: Path, **more: Any) -> MethodPlan:
    return plan_method(spec_of(method, **more), modules_of(base_model.load_config(base, "base")))


def rows_of(vocabulary: int, count: int = 8, tokens: int = 24) -> Dataset:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, vocabulary, (count, tokens), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def try_method(method: dict[str, Any], base: Path, folder: Path, *, steps: int = 3, rate: float = 1e-2) -> Trial:
    """Plan, wrap and train an adapter for `steps` steps on the same rows, save it, and check the saved files."""
    spec = spec_of(method)
    planned = plan(method, base)
    quantization = spec.method.quantization
    set_seed(7)
    loaded = base_model.load_model(base, torch.device("cpu"), quantization, torch.float32)
    rows = rows_of(loaded.config.get_text_config().vocab_size)
    base_logits = last_logits(loaded, PROMPTS)
    model = wrap(loaded, planned, rows, spec.method, steps)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=rate)
    ids = torch.tensor(rows["input_ids"])
    losses = []
    for _ in range(steps):
        model.train()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    logits = last_logits(model, PROMPTS)
    folder.mkdir(parents=True)
    conversion.save(model, folder)
    package.check_saved(folder, planned)
    return Trial(planned, model, losses, base_logits, logits, servable.confirm(folder, planned.servable))


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Return the largest difference of two lists of logits."""
    return max(float((left - right).abs().max()) for left, right in zip(one, other, strict=True))
