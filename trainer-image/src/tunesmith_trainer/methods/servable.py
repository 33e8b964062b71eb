"""Decide before training whether vLLM can load what a method produces, and confirm it afterwards on the files.

The rules are in `tunesmith.contracts.servability`; the agents of pools apply them too.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from tunesmith.api.finetunejob_status import ServableStatus
from tunesmith.api.methods.lora import LORA, LoraFields
from tunesmith.api.output import Servable
from tunesmith.contracts.servability import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MAX_RANK,
    MERGED,
    UnservableError,
    check_adapter_config,
    check_modules,
    check_pairs,
    check_rank,
)
from tunesmith.contracts.vllm_architectures import VLLM, WITH_ADAPTERS, WITHOUT_ADAPTERS
from tunesmith_trainer.errors import NotServableError, SelfCheckError
from tunesmith_trainer.methods.targets import adaptable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from tunesmith.api.finetunejob import FineTuneJobSpec
    from tunesmith.api.methods.declaration import MethodFields
    from tunesmith_trainer.methods.targets import Modules

_SERVABLE = ServableStatus(vllm=True)
WHOLE_MODEL = ServableStatus(
    vllm=False,
    reason="method.full produces a model, not an adapter: serve its folder as the baseModel of a ServingPool, or use "
    "method.lora",
)
"""Verdict on full fine-tuning."""
_UNKNOWN_TO_VLLM = frozenset({"internlm3", "iquestcoder"})
"""Types of models whose class vLLM serves, but not their configuration, which its release of transformers lacks."""
_REMEDIES = {
    "use_dora": "remove dora (rsLora is the closest variant that vLLM serves)",
    "modules_to_save": "remove modulesToSave",
    "target_parameters": "remove targetParameters",
    "r": "lower rank",
}
"""Settings of method.lora and method.qlora, by the key of adapter_config.json that vLLM does not accept."""


def verdict(fields: MethodFields, config: Mapping[str, Any]) -> ServableStatus:
    """Return the verdict on an adapter before it is trained.

    Args:
        fields: fields of the method.
        config: content of its future adapter_config.json.
    """
    try:
        # An adapter may have no target_modules until PEFT has chosen them.
        _check(config if config.get("target_modules") else {**config, "target_modules": ["chosen-by-peft"]})
    except UnservableError as error:
        return _not_servable(f"{error}: {_remedy(fields, error.keys)}")
    return _SERVABLE


def on_base(modules: Modules, adapted: Iterable[str]) -> ServableStatus:
    """Return the verdict on a servable adapter.

    Args:
        modules: modules of the base model.
        adapted: full names of those with an adapter.
    """
    class_name, stored = modules.class_name, modules.stored
    if stored is not None and stored.kept:
        # Agents check an adapter's shapes against those of the base, which bitsandbytes packs.
        remedy = f"{MERGED.replace('output.merge', 'output.merge: Dequantized')}, or " if stored.in_4_bits else ""
        return _not_servable(
            f"pools do not serve base models in {stored.name}: {remedy}train on the model that it was quantised from"
        )
    if modules.architecture in _UNKNOWN_TO_VLLM:
        return _not_servable(
            f"vLLM {VLLM} does not read the configuration of a {modules.architecture}: serve it with another engine"
        )
    if class_name in WITH_ADAPTERS and modules.alone:
        return _not_servable(
            f"it is an adapter of the language model of a {class_name} alone, whose modules have other names than in "
            f"the whole model, which vLLM serves: {MERGED}"
        )
    if class_name in WITH_ADAPTERS:
        try:
            check_modules(class_name, adapted, adaptable(modules, str(LORA.peft_type)))
        except UnservableError as error:
            return _not_servable(str(error))
        return _SERVABLE
    if class_name in WITHOUT_ADAPTERS:
        return _not_servable(f"vLLM {VLLM} serves a {class_name}, but not with adapters: {MERGED}")
    return _not_servable(f"vLLM {VLLM} does not have the architecture {class_name}: serve it with another engine")


def _remedy(fields: MethodFields, keys: Sequence[str]) -> str:
    if fields.traits.not_merged is not None:
        return "use method.lora; this adapter cannot be merged either"
    known = _REMEDIES if isinstance(fields, LoraFields) else {}
    changes = [known[key] for key in keys if key in known] or ["use method.lora"]
    return f"{' and '.join(changes)}, or {MERGED}"


def _check(config: Mapping[str, Any]) -> None:
    check_rank(check_adapter_config(config), MAX_RANK, "the highest that vLLM loads")


def require(spec: FineTuneJobSpec, verdict: ServableStatus) -> None:
    """Raise NotServableError if the spec requires a servable artifact and the verdict is negative."""
    if spec.servable is Servable.REQUIRED and not verdict.vllm:
        raise NotServableError(
            f"servable is Required and {verdict.reason}; or set servable to Ignored to train it anyway"
        )


def confirm(folder: Path, before: ServableStatus) -> ServableStatus:
    """Return the verdict from before training, after checking that the saved files agree with a positive one.

    Args:
        folder: folder with PEFT's adapter_config.json and adapter_model.safetensors.
        before: verdict before training.

    Raises:
        SelfCheckError: the files do not match the verdict before training.
    """
    if not before.vllm:
        return before
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    found = of_files(config, _names(folder / ADAPTER_WEIGHTS))
    if not found.vllm:
        raise SelfCheckError(f"the adapter should be servable, but for the saved files {found.reason}")
    return before


def of_files(config: Mapping[str, Any], tensors: Sequence[str]) -> ServableStatus:
    """Return the verdict on a saved adapter.

    Args:
        config: content of adapter_config.json.
        tensors: names of the tensors in adapter_model.safetensors.
    """
    try:
        _check(config)
        check_pairs(tensors)
    except UnservableError as error:
        return _not_servable(str(error))
    return _SERVABLE


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as tensors:
        return sorted(tensors.keys())


def _not_servable(reason: str) -> ServableStatus:
    return ServableStatus(vllm=False, reason=reason)
