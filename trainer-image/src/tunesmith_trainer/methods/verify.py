"""Verify that a wrapped model is what was requested, before time is spent on training it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import AdaLoraConfig, LoraConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import PeftType

from tunesmith_trainer.base_model.logits import batch_of_one, mixed_precision
from tunesmith_trainer.errors import SelfCheckError
from tunesmith_trainer.methods.start import check_answers
from tunesmith_trainer.methods.targets import pattern_value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from datasets import Dataset
    from peft import PeftConfig, PeftModel
    from torch import nn

    from tunesmith_trainer.methods.config import MethodPlan

_PROBE_ROWS = 2
_PROBE_TOKENS = 256
# Relative to the loss: rounding of float32, and of products in bfloat16 or 4 bits.
_TOLERANCE = 1e-3
_COARSE_TOLERANCE = 3e-2


@dataclass(frozen=True)
class Probe:
    """Loss of the base on a few rows.

    Args:
        rows: token ids.
        loss: mean negative log-likelihood of each next token, in nats.
    """

    rows: list[list[int]]
    loss: float


def probe(base: nn.Module, rows: Dataset) -> Probe:
    """Measure the base's loss on the first training rows, before anything is changed."""
    probed = [list(rows[index]["input_ids"])[:_PROBE_TOKENS] for index in range(min(len(rows), _PROBE_ROWS))]
    return Probe(probed, _loss(base, probed))


def check_parameters(model: PeftModel, planned: MethodPlan) -> None:
    """Raise SelfCheckError unless exactly the planned parameters are trained, with the planned ranks and scales."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    count = sum(parameter.numel() for parameter in trained.values())
    config = planned.config
    assert config is not None  # noqa: S101 - there is an adapter
    required, optional = _parts(config)
    unexpected = [name for name in trained if not any(part in name for part in (*required, *optional))]
    if unexpected:
        raise SelfCheckError(f"{unexpected[0]} is trained and is not part of the adapter")
    if planned.parameters is not None and count != planned.parameters:
        raise SelfCheckError(f"the adapter has {count} trainable parameters where {planned.parameters} are expected")
    # LoRA's matrices of an embedding have different names.
    names = [name.replace(".lora_embedding_", ".lora_") for name in trained]
    missing = [part for part in required if not any(part in name for name in names)]
    if missing:
        raise SelfCheckError(f"no parameter named {missing[0].strip('.')} is trained, which the method needs")
    if isinstance(config, LoraConfig) and planned.ranks:
        _check_scales(model, config, planned.ranks)


def probe_without(model: PeftModel, rows: Dataset) -> Probe:
    """Measure the base's loss as in `probe`, if it cannot be computed before the adapter exists."""
    with model.disable_adapter():
        return probe(model, rows)


def check_start(model: PeftModel, planned: MethodPlan, before: Probe) -> None:
    """Check the model before its first step.

    Raises:
        SelfCheckError: a new adapter changes the base's loss, disabling the adapter does, or an adapter that training
            continues from gives other answers than recorded.
    """
    coarse = any(
        parameter.dtype is not torch.float32 or hasattr(parameter, "quant_state") for parameter in model.parameters()
    )
    tolerance = (_COARSE_TOLERANCE if coarse else _TOLERANCE) * max(1.0, before.loss)
    if not math.isfinite(before.loss):
        return  # the held-out loss will reveal it
    found = _loss(model, before.rows)
    if planned.identity and not abs(found - before.loss) <= tolerance:
        raise SelfCheckError(
            f"the untrained adapter changes the base's loss from {before.loss:.6f} to {found:.6f}, which must not "
            "change it"
        )
    if planned.start is not None:
        check_answers(model, planned.start)
    with model.disable_adapter():
        base = _loss(model, before.rows)
    if not abs(base - before.loss) <= tolerance:
        raise SelfCheckError(
            f"without its adapter the model has the loss {base:.6f}, the base had {before.loss:.6f}: base and adapter "
            "cannot be compared"
        )


def _parts(config: PeftConfig) -> tuple[list[str], list[str]]:
    """Return parts of the names of trained parameters: required ones and optional ones."""
    if config.is_prompt_learning:
        return ["prompt_encoder."], []
    optional = ["trainable_tokens_"] if getattr(config, "trainable_token_indices", None) else []
    optional += [".bias"] if getattr(config, "bias", "none") != "none" else []
    if isinstance(config, AdaLoraConfig):
        required = [".lora_A.", ".lora_B.", ".lora_E."]
    elif isinstance(config, LoraConfig):
        required = [".lora_A."] if config.init_lora_weights == "mica" else [".lora_A.", ".lora_B."]
        required += [".lora_magnitude_vector."] if config.use_dora else []
        optional.append(".lora_")
    elif config.is_adaption_prompt:
        required = [".adaption_"]
    else:
        required = [PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(config.peft_type)]]
    if getattr(config, "modules_to_save", None):
        required.append(".modules_to_save.")
    return required, optional


def _check_scales(model: PeftModel, config: LoraConfig, ranks: Mapping[str, int]) -> None:
    prefix = "base_model.model."
    for full, module in model.named_modules():
        if not isinstance(module, LoraLayer) or isinstance(module, ParamWrapper):
            continue  # the ranks of experts are those of the configuration
        name = full.removeprefix(prefix)
        rank = ranks[name]
        alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        if module.r["default"] != rank or not math.isclose(module.scaling["default"], scale, rel_tol=1e-6):
            raise SelfCheckError(
                f"{name} has rank {module.r['default']} and scale {module.scaling['default']:g} where {rank} and "
                f"{scale:g} are expected"
            )


def _loss(model: Any, rows: Sequence[Sequence[int]]) -> float:  # noqa: ANN401 - with or without adapter
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        with torch.no_grad(), mixed_precision(model):
            for ids in rows:
                given = batch_of_one(model, ids)
                # A prompt that the method prepends has logits too.
                logits = model(input_ids=given).logits[0, -len(ids) : -1].float()
                scores = torch.log_softmax(logits, dim=-1).gather(1, given[0, 1:, None])
                total -= float(scores.double().sum())
                count += len(ids) - 1
    finally:
        model.train(was_training)
    return total / count if count else math.nan
