"""Whether vLLM can load what a method produces: decided before training, and confirmed on the files after it.

The rules are those of `tunesmith.contracts.servability`, which the agents of pools apply too.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from tunesmith.api.finetunejob_status import ServableStatus
from tunesmith.api.methods.lora import LoraFields
from tunesmith.api.output import Servable
from tunesmith.contracts.servability import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MAX_RANK,
    UnservableError,
    check_adapter_config,
    check_pairs,
    check_rank,
)
from tunesmith_trainer.errors import NotServableError, SelfCheckError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tunesmith.api.finetunejob import FineTuneJobSpec
    from tunesmith.api.methods.declaration import MethodFields

_MERGED = "serve merged weights (output.merge) as a model of its own"
_YES = ServableStatus(vllm=True)
WHOLE_MODEL = ServableStatus(
    vllm=False,
    reason="method.full makes a model, not an adapter: serve its folder as the baseModel of a ServingPool, or use "
    "method.lora",
)
"""The verdict on full fine-tuning."""
_REMEDIES = {
    "use_dora": "leave out dora (rsLora is the nearest that it serves)",
    "modules_to_save": "leave out modulesToSave",
    "r": "lower rank",
}
"""Changes of method.lora and method.qlora, by the key of adapter_config.json that vLLM does not take."""


def verdict(fields: MethodFields, config: Mapping[str, Any]) -> ServableStatus:
    """The verdict on an adapter that is yet to be trained.

    Args:
        fields: the method's.
        config: content of its adapter_config.json as it will be published.
    """
    try:
        # Of an adapter that has target_modules only once PEFT has chosen them.
        _check(config if config.get("target_modules") else {**config, "target_modules": ["chosen-by-peft"]})
    except UnservableError as error:
        return _no(f"{error}: {_remedy(fields, error.keys)}")
    return _YES


def _remedy(fields: MethodFields, keys: Sequence[str]) -> str:
    if fields.traits.not_merged is not None:
        return "use method.lora; this one cannot be merged either"
    known = _REMEDIES if isinstance(fields, LoraFields) else {}
    changes = [known[key] for key in keys if key in known] or ["use method.lora"]
    return f"{' and '.join(changes)}, or {_MERGED}"


def _check(config: Mapping[str, Any]) -> None:
    check_rank(check_adapter_config(config), MAX_RANK, "the highest that vLLM loads")


def require(spec: FineTuneJobSpec, verdict: ServableStatus) -> None:
    """Raises NotServableError where the spec demands what the verdict denies."""
    if spec.servable is Servable.REQUIRED and not verdict.vllm:
        raise NotServableError(
            f"servable is Required and {verdict.reason}; or set servable to Ignored, to train it all the same"
        )


def confirm(folder: Path, before: ServableStatus) -> ServableStatus:
    """The verdict on a saved adapter; where it is no, the reason is that from before training.

    Args:
        folder: with PEFT's adapter_config.json and adapter_model.safetensors.
        before: the verdict on what was to be trained.

    Raises:
        SelfCheckError: the files are not what the verdict before was about.
    """
    if not before.vllm:
        return before
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    found = of_files(config, _names(folder / ADAPTER_WEIGHTS))
    if not found.vllm:
        raise SelfCheckError(f"the adapter was to be servable, and as it was saved {found.reason}")
    return before


def of_files(config: Mapping[str, Any], tensors: Sequence[str]) -> ServableStatus:
    """The verdict on a saved adapter.

    Args:
        config: content of adapter_config.json.
        tensors: names in adapter_model.safetensors.
    """
    try:
        _check(config)
        check_pairs(tensors)
    except UnservableError as error:
        return _no(str(error))
    return _YES


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as tensors:
        return sorted(tensors.keys())


def _no(reason: str) -> ServableStatus:
    return ServableStatus(vllm=False, reason=reason)
