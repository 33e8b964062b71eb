"""Extend the training loop for a method: separate learning rates (LoRA+), rank allocation (AdaLoRA)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import AdaLoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from tunesmith.api.methods.lora import LoraFields

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from tunesmith.api.method import Method

_STATE = "method.safetensors"
_STATISTICS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_RANK_PATTERN = "rank_pattern"


def attach(trainer: Trainer, model: PeftModel, method: Method) -> None:
    """Add to the loop what the method needs; most need nothing."""
    fields = method.fields
    if isinstance(fields, LoraFields) and fields.lora_plus_ratio is not None:
        _scale_learning_rate_of_b(trainer, model, fields.lora_plus_ratio)
    if _reallocates_ranks(model):
        trainer.add_callback(_RankAllocation(model))


def save_state(model: object, folder: Path) -> None:
    """Save the method's state other than the trained parameters in a checkpoint."""
    if isinstance(model, PeftModel) and _reallocates_ranks(model):
        allocator: Any = model.base_model.rankallocator
        state = {
            f"{statistic}.{name}": tensor.detach().cpu().contiguous()
            for statistic in _STATISTICS
            for name, tensor in getattr(allocator, statistic).items()
        }
        pattern = model.peft_config[model.active_adapter].rank_pattern or {}
        state |= {f"{_RANK_PATTERN}.{name}": torch.tensor(kept) for name, kept in pattern.items()}
        save_file(state, folder / _STATE)


def load_state(model: object, folder: Path) -> None:
    """Restore the state saved by `save_state`."""
    if isinstance(model, PeftModel) and _reallocates_ranks(model):
        config: Any = model.peft_config[model.active_adapter]
        allocator: Any = model.base_model.rankallocator
        stored: dict[str, dict[str, torch.Tensor]] = {statistic: {} for statistic in (*_STATISTICS, _RANK_PATTERN)}
        for key, tensor in load_file(folder / _STATE).items():
            statistic, name = key.split(".", 1)
            stored[statistic][name] = tensor
        for statistic in _STATISTICS:
            setattr(allocator, statistic, {name: tensor.to(model.device) for name, tensor in stored[statistic].items()})
        config.rank_pattern = {name: kept.tolist() for name, kept in stored[_RANK_PATTERN].items()} or None


class _RankAllocation(TrainerCallback):
    """AdaLoRA reduces ranks after the optimizer step and before the next one, while the gradients exist."""

    def __init__(self, model: PeftModel) -> None:
        self._tuner: Any = model.base_model

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the ranks. Steps are counted from 1, so that the last one is `total_step`."""
        self._tuner.update_and_allocate(state.global_step + 1)


def _reallocates_ranks(model: PeftModel) -> bool:
    return isinstance(model, PeftModel) and isinstance(model.peft_config[model.active_adapter], AdaLoraConfig)


def _scale_learning_rate_of_b(trainer: Trainer, model: PeftModel, ratio: float) -> None:
    """Make the B matrices, and DoRA's magnitudes, learn `ratio` times as fast as the A matrices."""
    create = trainer.create_optimizer

    def create_optimizer(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = create(*args, **kwargs)
        fast = {
            id(parameter)
            for name, parameter in (args[0] if args else model).named_parameters()
            if ".lora_B." in name or ".lora_magnitude_vector." in name
        }
        for group in list(optimizer.param_groups):
            faster = [parameter for parameter in group["params"] if id(parameter) in fast]
            if faster:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in fast]
                optimizer.add_param_group({**group, "params": faster, "lr": group["lr"] * ratio})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    trainer.create_optimizer = create_optimizer
