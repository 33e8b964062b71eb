"""Undo initialisations that change the base: base behaviour while training, and plain LoRA when it is saved.

Such an initialisation (PiSSA, OLoRA, CorDA, LoRA-GA) replaces a weight W by W - s·B₀A₀ and begins with the adapter
B₀A₀. With the trained BA, the difference from W is s·(BA - B₀A₀): LoRA of twice the rank, [A; A₀] and [B, -B₀], with
the same scale s. LoftQ begins with the quantisation error of W: there, too, W is approximately the base with its first
adapter.
"""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import PeftType
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file

from tunesmith.contracts.servability import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TENSOR_PREFIX, TENSOR_SUFFIXES, is_literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_initial: WeakKeyDictionary[PeftModel, dict[str, torch.Tensor]] = WeakKeyDictionary()
"""Initial adapters of models whose base was changed, by parameter name."""


def keep_initial(model: PeftModel, *, changed: bool) -> None:
    """Keep a copy of the new adapter.

    If the base was changed, the published base is the changed base plus the initial adapter: from here on
    `model.disable_adapter()` gives the base as it was published, not the changed one.
    """
    initial = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    _initial[model] = initial
    if not changed:
        return

    @contextmanager
    def base_alone() -> Iterator[None]:
        parameters = {name: tensor for name, tensor in model.named_parameters() if name in initial}
        trained = {name: tensor.data for name, tensor in parameters.items()}
        try:
            for name, tensor in parameters.items():
                tensor.data = initial[name].to(tensor)
            yield
        finally:
            for name, tensor in parameters.items():
                tensor.data = trained[name]

    model.disable_adapter = base_alone


def save(model: PeftModel, folder: Path) -> None:
    """Save the adapter so that it fits the published base: weights, and PEFT's configuration.

    The configuration no longer mentions the initialisation: a loaded adapter is not initialised again.
    """
    initial = _initial.get(model)
    if initial is None:
        model.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        state = difference_from_initial(get_peft_model_state_dict(model, save_embedding_layers=False), initial)
        save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        model.peft_config[model.active_adapter].save_pretrained(str(folder))
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config = published_config(config, _lora_modules(folder / ADAPTER_WEIGHTS), doubled=initial is not None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def published_config(config: Mapping[str, Any], modules: Sequence[str], *, doubled: bool) -> dict[str, Any]:
    """Return the content of the adapter_config.json that is published.

    Args:
        config: content of PEFT's file.
        modules: full names of the modules that have LoRA matrices.
        doubled: True if the adapter is saved as the difference from its initial state, with twice the rank.
    """
    config = {**config, "peft_type": PeftType(config["peft_type"]).value, "inference_mode": True}
    if isinstance(config.get("init_lora_weights"), str):
        config |= {"init_lora_weights": True, "eva_config": None, "corda_config": None, "lora_ga_config": None}
    if doubled:
        # The scale is alpha / rank, or alpha / √rank.
        alpha = math.sqrt(2) if config["use_rslora"] else 2
        config["r"] *= 2
        config["lora_alpha"] *= alpha
        config["rank_pattern"] = {name: 2 * rank for name, rank in (config["rank_pattern"] or {}).items()}
        config["alpha_pattern"] = {name: alpha * value for name, value in (config["alpha_pattern"] or {}).items()}
    # Only needed at the start of training, and names local folders.
    for key in ("tokenizer_name_or_path", "tokenizer_kwargs", "prompt_tuning_init_text"):
        if key in config:
            config[key] = None
    if "prompt_tuning_init" in config:
        config["prompt_tuning_init"] = "RANDOM"
    # PEFT keeps sets, whose order differs from run to run.
    for key in ("target_modules", "exclude_modules", "feedforward_modules"):
        if isinstance(config.get(key), list | set):
            config[key] = sorted(config[key])
    if config["peft_type"] == "LORA":
        config |= _literal(config, modules)
    return config


def _lora_modules(weights: Path) -> list[str]:
    """Return the sorted full names of the modules that have LoRA matrices in a file."""
    with safe_open(weights, framework="pt") as tensors:
        names = [name.removeprefix(TENSOR_PREFIX) for name in tensors.keys()]  # noqa: SIM118 - not a dict
    ends = [suffix for suffix, matrix in TENSOR_SUFFIXES.items() if matrix == "A"]
    return sorted({name.removesuffix(end) for name in names for end in ends if name.endswith(end)})


def _literal(config: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Replace regular expressions that name modules by the names of the adapter's modules.

    Engines evaluate such expressions as they are, and one can keep an engine busy forever.
    """
    changed: dict[str, Any] = {}
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not all(map(is_literal, pattern)):
            found = {module: get_pattern_key(pattern.keys(), module) for module in modules}
            changed[key] = {module: pattern[name] for module, name in found.items() if name in pattern}
    if isinstance(config.get("target_modules"), str) and not is_literal(config["target_modules"]):
        changed |= {"target_modules": list(modules), "layers_to_transform": None, "layers_pattern": None}
    if isinstance(config.get("exclude_modules"), str) and not is_literal(config["exclude_modules"]):
        changed["exclude_modules"] = None
    return changed


def difference_from_initial(
    state: Mapping[str, torch.Tensor], initial: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the matrices of the trained adapter minus the initial one."""
    # Saved names omit the adapter's name.
    initial_by_saved_name = {name.replace(".default.", "."): tensor for name, tensor in initial.items()}
    result = {}
    for name, tensor in state.items():
        if name.endswith(".lora_A.weight"):
            result[name] = torch.cat([tensor, initial_by_saved_name[name].to(tensor)], dim=0)
        elif name.endswith(".lora_B.weight"):
            result[name] = torch.cat([tensor, -initial_by_saved_name[name].to(tensor)], dim=1)
        else:
            result[name] = tensor
    return {name: tensor.detach().cpu().contiguous() for name, tensor in result.items()}
