"""Convert the fields of methods that have their own, except LoRA, to PEFT's configurations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)

from tunesmith.api.methods.ia3 import Ia3Fields
from tunesmith_trainer.errors import InvalidSpecError
from tunesmith_trainer.methods.generic import config_class
from tunesmith_trainer.methods.targets import check_saved_modules, matches_name, resolve_targets

if TYPE_CHECKING:
    from collections.abc import Iterable

    from peft import PeftConfig

    from tunesmith.api.methods.declaration import MethodFields
    from tunesmith_trainer.methods.targets import Modules

_ATTENTION = (("k_proj", "v_proj"), ("qkv_proj",), ("query_key_value",), ("c_attn",), ("Wqkv",))
"""Usual names of the modules that compute keys and values."""
_FEEDFORWARD_OUTPUT = ("down_proj", "fc2", "dense_4h_to_h", "fc_out", "c_proj", "w2")
"""Usual names of the feed-forward layers' last module."""


def config_of(name: str, fields: MethodFields, modules: Modules, *, quantized: bool) -> PeftConfig:
    """Return PEFT's configuration: the fields under PEFT's names, and values from the base model or the trainer.

    Args:
        name: name of the method in the manifest, for messages.
        fields: fields of the method.
        modules: modules of the base model.
        quantized: True if the base is held in 4 bits.

    Raises:
        InvalidSpecError: a name matches no module of the base, the architecture has no default, or PEFT rejects a
            value.
    """
    values = fields.peft_values()
    if isinstance(fields, Ia3Fields):
        # Not declared with the fields: the default modules of architectures are in PEFT, which the API does not import.
        values |= _ia3_modules(fields, modules)
    if "target_modules" in values:
        values["target_modules"] = resolve_targets(values["target_modules"], modules, str(fields.traits.peft_type))
    check_saved_modules(
        values.get("modules_to_save", []), values.get("target_modules", []), modules, quantized=quantized
    )
    try:
        return config_class(str(fields.traits.peft_type))(task_type="CAUSAL_LM", **values)
    except (ValueError, TypeError) as error:
        raise InvalidSpecError(f"method.{name}: {' '.join(str(error).split())[:300]}") from None


def _ia3_modules(fields: Ia3Fields, modules: Modules) -> dict[str, Any]:
    architecture = modules.architecture
    targets = fields.target_modules or TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(architecture)
    feedforward = fields.feedforward_modules
    if feedforward is None and not fields.target_modules:
        feedforward = TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(architecture)
    if not fields.target_modules and targets and not _all_exist(targets, modules):
        targets = None  # names of an older release of the architecture
    if targets is None:
        raise InvalidSpecError(
            f"method ia3: PEFT has no default targetModules for a {architecture}: set targetModules to the linear "
            "modules that compute keys, values and the feed-forward layers' output, and feedforwardModules to the last "
            f"of these{_ia3_example(modules)}"
        )
    return {"target_modules": targets, "feedforward_modules": list(feedforward or [])}


def _all_exist(names: Iterable[str], modules: Modules) -> bool:
    return all(any(matches_name(full, name) for full in modules.linear) for name in names)


def _ia3_example(modules: Modules) -> str:
    """Return the modules to name, as the end of a sentence; empty if they do not have their usual names."""
    known = {full.rpartition(".")[2] for full in modules.linear}
    attention = next((names for names in _ATTENTION if known.issuperset(names)), ())
    output = next((name for name in _FEEDFORWARD_OUTPUT if name in known), None)
    if not attention or output is None:
        return f"; it has {', '.join(sorted(known))}"
    return f": targetModules: [{', '.join((*attention, output))}], feedforwardModules: [{output}]"
