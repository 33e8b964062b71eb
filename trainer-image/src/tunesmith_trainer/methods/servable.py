"""Whether vLLM can load what a method produces: decided before training, and confirmed on the files after it.

The rules for adapter_config.json are those of `tunesmith.contracts.servability`, which the agents of pools apply too.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from tunesmith.api.finetunejob_status import ServableStatus
from tunesmith.api.output import Servable
from tunesmith.contracts.servability import UnservableError, check_adapter_config
from tunesmith_trainer.errors import NotServableError, SelfCheckError
from tunesmith_trainer.methods.conversion import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tunesmith.api.finetunejob import FineTuneJobSpec

MAX_RANK = 512
"""vLLM's highest max_lora_rank."""
_MERGED = "serve merged weights (output.merge) as a model of its own"
_YES = ServableStatus(vllm=True)
WHOLE_MODEL = ServableStatus(
    vllm=False,
    reason="method.full makes a model, not an adapter: serve its folder as the baseModel of a ServingPool, or use "
    "method.lora",
)
"""The verdict on full fine-tuning."""


def lora(ranks: Mapping[str, int], *, dora: bool, saved: Sequence[str]) -> ServableStatus:
    """The verdict on LoRA.

    Args:
        ranks: module → rank, as it will be saved.
        dora: magnitude and direction are trained apart.
        saved: modules that are trained whole.
    """
    if dora:
        return _no(f"vLLM does not load DoRA: leave out dora (rsLora is the nearest that it serves), or {_MERGED}")
    if saved:
        return _no(f"vLLM does not load modules that are trained whole: leave out modulesToSave, or {_MERGED}")
    highest = max(ranks.values())
    if highest > MAX_RANK:
        return _no(f"the adapter is saved with rank {highest} and vLLM loads at most {MAX_RANK}: lower rank")
    return _YES


def other(kind: str, config: Mapping[str, Any], *, mergeable: bool) -> ServableStatus:
    """The verdict on what is not one of `method.lora` and `method.qlora`.

    Args:
        kind: PEFT's name of the method.
        config: content of its adapter_config.json.
        mergeable: whether the adapter can be merged into the base.
    """
    if kind == "LORA":
        verdict = of_files(_named(config), [])
        return verdict if verdict.vllm else _no(f"{verdict.reason}: use method.lora, or {_MERGED}")
    mend = f"use method.lora, or {_MERGED}" if mergeable else "use method.lora; this one cannot be merged either"
    return _no(f"vLLM loads LoRA adapters only, and this is {kind}: {mend}")


def _named(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as it will be saved: lists for sets, and names where it has regular expressions."""
    named = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    if isinstance(named.get("target_modules"), str) or not named.get("target_modules"):
        named["target_modules"] = ["chosen-by-peft"]
    if isinstance(named.get("exclude_modules"), str):
        named["exclude_modules"] = None
    for key in ("rank_pattern", "alpha_pattern"):
        patterns: dict[str, Any] = config.get(key) or {}
        named[key] = {f"module-{number}": value for number, value in enumerate(patterns.values())}
    return named


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
    """The verdict by the rules of vLLM's loader.

    Args:
        config: content of adapter_config.json.
        tensors: names in adapter_model.safetensors.
    """
    try:
        checked = check_adapter_config(config)
    except UnservableError as error:
        return _no(str(error))
    odd = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if odd:
        return _no(f"the adapter holds {odd[0]}, which vLLM does not know")
    if checked.highest_rank > MAX_RANK:
        return _no(f"the adapter's rank is {checked.highest_rank} and vLLM loads at most {MAX_RANK}")
    return _YES


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as tensors:
        return sorted(tensors.keys())


def _no(reason: str) -> ServableStatus:
    return ServableStatus(vllm=False, reason=reason)
