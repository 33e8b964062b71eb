"""Put a planned adapter on a base with weights."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga

from tunesmith_trainer.methods import conversion, full, start, verify
from tunesmith_trainer.methods.loftq import initialize_loftq

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from tunesmith.api.method import Method
    from tunesmith.api.methods.fields import Quantization
    from tunesmith_trainer.methods.config import MethodPlan

INITIALIZATION_ROWS = 256
"""Maximum number of training rows that an initialisation reads."""


def wrap(
    base: PreTrainedModel,
    planned: MethodPlan,
    rows: Dataset,
    method: Method,
    total_steps: int,
    shard: Callable[[], None] | None = None,
) -> PeftModel:
    """Return the base with a new adapter in float32, verified; only the adapter, or all weights, can be trained.

    Args:
        base: base model with its weights.
        planned: adapter to add.
        rows: training rows, as `input_ids` and `labels`.
        method: method of the manifest.
        total_steps: optimizer steps of the run.
        shard: shards the base's weights over the ranks; called before the base computes anything.

    Raises:
        SelfCheckError: the adapter is not the one that was requested.
    """
    if planned.config is None:
        if shard is not None:
            # Autocast would keep a copy of every layer's gathered weights until the end of the forward pass.
            torch.set_autocast_cache_enabled(False)
        return full.unfreeze(base, shard)
    before = verify.probe(base, rows) if shard is None else None
    if method.quantization is not None:
        base = _freeze(base, method.quantization)
    config = _run_config(planned.config, base, method, total_steps)
    if isinstance(config, LoraConfig):
        _measure_rows(base, config, rows)
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)  # noqa: S101 - narrows the type
    _train_in_float32(model)
    if isinstance(config, LoraConfig) and config.init_lora_weights == "eva":
        initialize_lora_eva_weights(model, list(_batches(rows, model.device)), show_progress_bar=False)
    if planned.start is not None:
        start.load(model, planned.start)
    if planned.doubled:
        loftq = not planned.identity
        if loftq:
            initialize_loftq(model, base.name_or_path)
        conversion.keep_initial(model, changed=not loftq)
    verify.check_parameters(model, planned)
    if shard is not None:
        shard()
    verify.check_start(model, planned, before or verify.probe_without(model, rows))
    return model


def _freeze(base: PreTrainedModel, quantization: Quantization) -> PreTrainedModel:
    """Prepare a base in 4 bits; weights that are not in 4 bits keep the type they were loaded in, as under LoRA.

    In float32, as PEFT prepares it, embedding and output layer would take twice the memory. Norms alone in float32
    would make the whole residual stream float32: a norm's result has the wider type, and a layer in 4 bits returns the
    type of its input. If the products of 4-bit weights are to be in float32, everything is.
    """
    if quantization.compute_type == "float32":
        return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    base.requires_grad_(requires_grad=False)
    return base


def _train_in_float32(model: PeftModel) -> None:
    """Convert trained parameters to float32: in bfloat16 small updates would be lost."""
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:
            parameter.requires_grad_(requires_grad=False)  # a constant of AdaLoRA that PEFT unfreezes when it casts it
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def _run_config(planned: PeftConfig, base: PreTrainedModel, method: Method, total_steps: int) -> PeftConfig:
    """Return a copy of the configuration with the values that are only known in the run."""
    config = copy.deepcopy(planned)
    for key, value in method.fields.peft_values_of_run(total_steps, base.name_or_path).items():
        setattr(config, key, value)
    return config


def _measure_rows(base: PreTrainedModel, config: LoraConfig, rows: Dataset) -> None:
    """Run the measurements that an initialisation needs before the adapter exists."""
    if config.init_lora_weights == "corda":
        _measure_for_corda(base, config, rows)
    elif config.init_lora_weights == "lora_ga":
        _measure_for_lora_ga(base, config, rows)


def _measure_for_corda(base: PreTrainedModel, config: LoraConfig, rows: Dataset) -> None:
    def run() -> None:
        was_training = base.training
        base.eval()
        with torch.no_grad():
            for batch in _batches(rows, base.device):
                base(input_ids=batch["input_ids"])
        base.train(was_training)

    preprocess_corda(base, config, run_model=run)


def _measure_for_lora_ga(base: PreTrainedModel, config: LoraConfig, rows: Dataset) -> None:
    def run() -> None:
        for batch in _batches(rows, base.device):
            loss: Any = base(**batch).loss
            loss.backward()

    with warnings.catch_warnings():
        # Its hook on the first layer warns that no input needs a gradient, which is expected.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess_loraga(base, config, run)


def _batches(rows: Dataset, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the first rows in order, one sequence at a time."""
    for index in range(min(len(rows), INITIALIZATION_ROWS)):
        row = rows[index]
        start = 0
        for size in row.get("seq_lengths") or [len(row["input_ids"])]:
            part = slice(start, start + size)
            yield {
                "input_ids": torch.tensor([list(row["input_ids"][part])], device=device),
                "labels": torch.tensor([list(row["labels"][part])], device=device),
            }
            start += size
