"""Convert the fields of methods that have their own, except LoRA, to PEFT's configurations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)

from tunesmith.api.methods.ada_lora import AdaLoraFields
from tunesmith.api.methods.ia3 import Ia3Fields
from tunesmith.api.methods.p_tuning import PTuningFields
from tunesmith.api.methods.prompt_tuning import PromptTuningFields
from tunesmith_trainer.errors import InvalidSpecError
from tunesmith_trainer.methods.generic import config_class
from tunesmith_trainer.methods.targets import check_saved_modules, resolve_targets

if TYPE_CHECKING:
    from peft import AdaLoraConfig, PeftConfig

    from tunesmith.api.methods.declaration import MethodFields
    from tunesmith_trainer.methods.targets import Modules

_PLACEHOLDER_STEPS = 1_000_000


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
    match fields:
        case AdaLoraFields():
            values["total_step"] = _PLACEHOLDER_STEPS
        case Ia3Fields():
            values |= _ia3_modules(fields, modules)
        case PromptTuningFields():
            # A text's tokens are looked up once the weights are loaded.
            values.pop("prompt_tuning_init_text", None)
            values["prompt_tuning_init"] = "SAMPLE_VOCAB"
        case PTuningFields():
            values.setdefault("encoder_hidden_size", modules.config.get_text_config().hidden_size)
    if "target_modules" in values:
        values["target_modules"] = resolve_targets(values["target_modules"], modules)
    check_saved_modules(
        values.get("modules_to_save", []), values.get("target_modules", []), modules, quantized=quantized
    )
    try:
        return config_class(str(fields.traits.peft_type))(task_type="CAUSAL_LM", **values)
    except (ValueError, TypeError) as error:
        raise InvalidSpecError(f"method.{name}: {' '.join(str(error).split())[:300]}") from None


def schedule(config: AdaLoraConfig, fields: AdaLoraFields, total: int) -> None:
    """Set the steps of AdaLoRA's three phases in PEFT's configuration."""
    config.total_step = total
    config.tinit = int(fields.warmup_ratio * total)
    config.tfinal = int(fields.final_ratio * total)


def _ia3_modules(fields: Ia3Fields, modules: Modules) -> dict[str, Any]:
    kind = modules.config.get_text_config().model_type
    asked = fields.target_modules or TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.get(kind)
    inner = fields.feedforward_modules
    if inner is None:
        inner = [] if fields.target_modules else TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, [])
    if asked is None:
        raise InvalidSpecError(
            f"method ia3: PEFT has no targetModules for a {kind}: name them, the linear modules that make keys, values "
            "and the feed-forward's output, and that last one in feedforwardModules too"
        )
    return {"target_modules": asked, "feedforward_modules": list(inner)}
