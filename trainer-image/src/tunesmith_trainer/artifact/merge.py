"""Merge the adapter into its base model, and measure the distance of the full weights from the trained model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.pytorch_utils import Conv1D

from tunesmith.api.output import Merge
from tunesmith.contracts.location import MERGED_MANIFEST
from tunesmith_trainer.artifact.parity import serving_type
from tunesmith_trainer.base_model import model as base_model
from tunesmith_trainer.base_model.logits import last_logits, relative_distance
from tunesmith_trainer.base_model.stored import copy_generation_settings, dequantize
from tunesmith_trainer.errors import SelfCheckError
from tunesmith_trainer.store import file_sha256

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn
    from transformers import PretrainedConfig

    from tunesmith.api.methods.fields import Quantization
    from tunesmith.storage.folder import Folder


def merge(
    kind: Merge,
    base: Path,
    artifact: Path,
    target: Path,
    *,
    config: PretrainedConfig,
    quantization: Quantization | None,
    dtype: torch.dtype,
    prompts: Sequence[Sequence[int]],
    trained: Sequence[torch.Tensor],
) -> float:
    """Write the merged model into `target`: sharded safetensors, tokenizer and `merged.json`.

    Args:
        kind: merge into the published base model, or into the dequantised 4-bit one.
        base: folder of the base model with its weights.
        artifact: folder of the saved adapter.
        target: folder to create.
        config: configuration of the base model.
        quantization: quantisation of the base model while training.
        dtype: type that it was quantised from.
        prompts: prompts for the comparison, as token ids.
        trained: `last_logits` of the trained model for these prompts.

    Returns:
        Distance of the merged model from the trained one: norm of the difference of the logits over their norm.

    Raises:
        SelfCheckError: the merged weights are not finite.
    """
    cpu = torch.device("cpu")
    loaded: Any
    if kind is Merge.DEQUANTIZED:
        loaded = dequantize(base_model.load_model(base, cpu, quantization, dtype), dtype)
    else:
        loaded = base_model.load_model(base, cpu, None, torch.float32)
    # Merge in float32 and round once, when saving.
    merged: Any = PeftModel.from_pretrained(loaded.float(), str(artifact)).merge_and_unload(safe_merge=True)
    _store_as_published(merged, config)
    merged.config.get_text_config().use_cache = getattr(config.get_text_config(), "use_cache", True)
    merged.to(serving_type(config)).save_pretrained(str(target))
    copy_generation_settings(base, target)
    for file in base_model.tokenizer_files(artifact):
        (target / file.name).write_bytes(file.read_bytes())
    del loaded, merged
    saved = AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, local_files_only=True, generation_config=GenerationConfig()
    )
    found = last_logits(saved, prompts)
    if not all(bool(logits.isfinite().all()) for logits in found):
        raise SelfCheckError("the merged model's logits are not finite")
    error = relative_distance(found, trained)
    document = {
        "merge": kind.value,
        "dataType": str(serving_type(config)).removeprefix("torch."),
        "relativeLogitError": error,
        "files": {file.name: file_sha256(file) for file in sorted(target.iterdir())},
    }
    (target / MERGED_MANIFEST).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return error


def _store_as_published(model: nn.Module, config: PretrainedConfig) -> None:
    """Store weights as (in, out) where the architecture does: dequantised, they are stored as (out, in)."""
    with torch.device("meta"):
        published = AutoModelForCausalLM.from_config(config)
    for name, module in published.named_modules():
        linear = model.get_submodule(name) if isinstance(module, Conv1D) else None
        if isinstance(linear, torch.nn.Linear):
            stored = Conv1D(module.nf, module.nx)
            stored.weight = torch.nn.Parameter(linear.weight.data.T.contiguous())
            stored.bias = torch.nn.Parameter(linear.bias.data)
            model.set_submodule(name, stored)


def describe(error: float) -> str:
    """Format the distance for people."""
    return f"differ from the trained model by {error:.2g} (relative distance of logits)"


def publish(folder: Path, target: Folder) -> None:
    """Upload the merged model, its manifest last."""
    for name in sorted((file.name for file in folder.iterdir()), key=lambda name: (name == MERGED_MANIFEST, name)):
        target.upload(name, folder / name)
