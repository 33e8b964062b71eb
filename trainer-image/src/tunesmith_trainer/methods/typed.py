"""AdaLoRA, IA3, prefix tuning, prompt tuning and P-tuning: their fields as PEFT's configurations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import AdaLoraConfig, IA3Config, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)

from tunesmith.api.methods.ada_lora import AdaLoraFields
from tunesmith.api.methods.ia3 import Ia3Fields
from tunesmith.api.methods.p_tuning import PTuningFields
from tunesmith.api.methods.prefix_tuning import PrefixTuningFields
from tunesmith.api.methods.prompt_tuning import PromptTuningFields
from tunesmith_trainer.errors import InvalidSpecError
from tunesmith_trainer.methods import weightless
from tunesmith_trainer.methods.targets import adapted, check_saved_modules, fits, resolve_targets

if TYPE_CHECKING:
    from peft import PeftConfig

    from tunesmith_trainer.methods.targets import Modules

Typed = AdaLoraFields | Ia3Fields | PrefixTuningFields | PromptTuningFields | PTuningFields
_PLACEHOLDER_STEPS = 1_000_000


def config_of(fields: Typed, modules: Modules, *, quantized: bool) -> PeftConfig:
    """PEFT's configuration.

    Raises:
        InvalidSpecError: a name fits no module of the base, or the architecture has no default.
    """
    match fields:
        case AdaLoraFields():
            return _ada_lora(fields, modules, quantized=quantized)
        case Ia3Fields():
            return _ia3(fields, modules, quantized=quantized)
        case PrefixTuningFields():
            return PrefixTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=fields.virtual_tokens,
                prefix_projection=fields.projection,
                **_given(encoder_hidden_size=fields.encoder_hidden_size),
            )
        case PromptTuningFields():
            return PromptTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=fields.virtual_tokens,
                # A text's tokens are looked up once the weights are there.
                prompt_tuning_init="SAMPLE_VOCAB",
            )
        case PTuningFields():
            return PromptEncoderConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=fields.virtual_tokens,
                encoder_reparameterization_type=fields.encoder.upper(),
                encoder_hidden_size=fields.encoder_hidden_size or modules.config.get_text_config().hidden_size,
                encoder_num_layers=fields.encoder_layers,
                encoder_dropout=fields.encoder_dropout,
            )


def trained(fields: Typed, config: PeftConfig, modules: Modules) -> tuple[int, list[str]]:
    """How many parameters are trained, and last parts of the names of the modules that get an adapter."""
    if isinstance(fields, AdaLoraFields):
        targets = sorted(config.target_modules or [])
        saved = sum(
            size for name, size in modules.sizes.items() if any(fits(name, one) for one in fields.modules_to_save or [])
        )
        shapes = adapted(targets, modules).values()
        return saved + sum(fields.initial_rank * (wide + high + 1) for wide, high in shapes), targets
    model = weightless.wrapped(config, modules.config, type(fields).__name__.removesuffix("Fields"))
    return weightless.trained_parameters(model), weightless.targets(model)


def schedule(config: AdaLoraConfig, fields: AdaLoraFields, total: int) -> None:
    """Sets the steps of AdaLoRA's three phases in PEFT's configuration."""
    config.total_step = total
    config.tinit = int(fields.warmup_ratio * total)
    config.tfinal = int(fields.final_ratio * total)


def _ada_lora(fields: AdaLoraFields, modules: Modules, *, quantized: bool) -> AdaLoraConfig:
    targets = resolve_targets(fields.target_modules, modules)
    check_saved_modules(fields.modules_to_save or [], targets, modules, quantized=quantized)
    return AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=fields.initial_rank,
        target_r=fields.target_rank,
        lora_alpha=fields.alpha,
        lora_dropout=fields.dropout,
        target_modules=targets,
        modules_to_save=fields.modules_to_save,
        deltaT=fields.interval,
        orth_reg_weight=fields.orthogonality,
        total_step=_PLACEHOLDER_STEPS,
    )


def _ia3(fields: Ia3Fields, modules: Modules, *, quantized: bool) -> IA3Config:
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
    targets = resolve_targets(asked, modules)
    check_saved_modules(fields.modules_to_save or [], targets, modules, quantized=quantized)
    return IA3Config(
        task_type="CAUSAL_LM",
        target_modules=targets,
        feedforward_modules=list(inner),
        modules_to_save=fields.modules_to_save,
    )


def _given(**values: Any) -> dict[str, Any]:  # noqa: ANN401 - of any type
    return {name: value for name, value in values.items() if value is not None}
