"""Full fine-tuning: all weights are trained, and the artifact is a complete model."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from tunesmith_trainer.base_model.sharding import is_sharded, shard_like
from tunesmith_trainer.base_model.stored import load_published
from tunesmith_trainer.errors import SelfCheckError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel


def unfreeze(base: PreTrainedModel, shard: Callable[[], None] | None = None) -> PeftModel:
    """Return the base with all its weights trained, in float32: in bfloat16 small updates would be lost.

    It has the one method of a PeftModel that the trainer needs: within `model.disable_adapter()` the weights are those
    of the base, read again from its folder.

    Args:
        base: base model with its weights.
        shard: shards them over the ranks, in float32.
    """
    model: Any = base
    model.requires_grad_(requires_grad=True)
    if shard is None:
        model.float()
    else:
        shard()

    @contextmanager
    def base_alone() -> Iterator[None]:
        published = dict(load_published(Path(base.name_or_path), "auto").named_parameters())
        own = dict(model.named_parameters())
        trained = {name: parameter.detach().cpu() for name, parameter in own.items()}
        _copy_values(own, published)
        try:
            yield
        finally:
            _copy_values(own, trained)

    model.disable_adapter = base_alone
    result: PeftModel = model
    return result


def _copy_values(own: dict[str, Any], values: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, parameter in own.items():
            value = values[name].detach()
            parameter.copy_(value if is_sharded(value) else shard_like(value.to(parameter.dtype), parameter))


def save(model: PeftModel, folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> None:
    """Save the model in the type that it will be served with."""
    whole: Any = model
    rounded: dict[int, torch.Tensor] = {}  # shared weights stay shared
    state = {}
    for name, tensor in whole.state_dict().items():
        key = tensor.data_ptr()
        if key not in rounded:
            rounded[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        state[name] = rounded[key]
    whole.save_pretrained(str(folder), state_dict=state)
    path = folder / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written["dtype"] = str(dtype).removeprefix("torch.")
    written.get("text_config", written)["use_cache"] = getattr(config.get_text_config(), "use_cache", True)
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check(folder: Path) -> None:
    """Raise SelfCheckError if a saved weight is not finite, or if there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SelfCheckError("the model was saved without weights")
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                if not bool(tensors.get_tensor(name).isfinite().all()):
                    raise SelfCheckError(f"the saved model is damaged: {name} has values that are not finite")
