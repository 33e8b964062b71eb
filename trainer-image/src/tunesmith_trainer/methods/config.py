"""Convert a manifest's method to PEFT's configuration, and check it against the base's modules without weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from peft import AdaLoraConfig, LoraConfig
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig

from tunesmith.api.methods.full import FullFields
from tunesmith.api.methods.lora import INITIALIZATIONS, LORA, Initialization, LoraFields
from tunesmith.api.methods.peft import PeftFields
from tunesmith.api.output import Merge
from tunesmith_trainer.errors import InvalidSpecError
from tunesmith_trainer.methods import generic, servable, typed, weightless
from tunesmith_trainer.methods.conversion import published_config
from tunesmith_trainer.methods.stored import check_stored
from tunesmith_trainer.methods.targets import (
    BYPASSED,
    adapted_modules,
    adapted_weights,
    check_pattern,
    check_saved_modules,
    matches_name,
    pattern_value,
    resolve_parameters,
    resolve_targets,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from peft import PeftConfig

    from tunesmith.api.finetunejob import FineTuneJobSpec
    from tunesmith.api.finetunejob_status import ServableStatus
    from tunesmith.api.method import Method
    from tunesmith_trainer.methods.targets import Modules

_LEAST_QUANTIZED = 0.5
"""Least share of the weights in a base's layers that 4 bits must apply to."""
_EMBEDDING = "embed_tokens"


@dataclass(frozen=True)
class MethodPlan:
    """Plan of an adapter, made before any weight is loaded.

    Args:
        config: PEFT's configuration of it; None if all weights are trained.
        parameters: number of trained parameters; None if PEFT can only count them with the weights loaded.
        targets: last parts of the names of the adapted modules.
        modules: adapted linear modules: full name → (in, out) features.
        servable: verdict on whether vLLM will be able to load it.
        ranks: ranks of the LoRA matrices: full name of the module → rank.
        adapted_weights: number of the base's weights in modules and experts that have an adapter.
        identity: True if the new adapter changes nothing.
        doubled: True if it is saved as the difference from its initial state, with twice the rank.
        start: folder of the adapter whose weights it starts with; None: new ones.
    """

    config: PeftConfig | None
    parameters: int | None
    targets: list[str]
    modules: dict[str, tuple[int, int]]
    servable: ServableStatus
    ranks: dict[str, int] = field(default_factory=dict)
    adapted_weights: int = 0
    identity: bool = True
    doubled: bool = False
    start: Path | None = None


def plan_method(spec: FineTuneJobSpec, modules: Modules) -> MethodPlan:
    """Plan the adapter that a spec requests, on a base with these modules.

    Raises:
        InvalidSpecError: a field does not fit the base model, or another field of the spec.
        NotServableError: the spec requires an adapter that vLLM can load, and this is not one.
    """
    stored = modules.stored
    check_stored(spec, stored)
    kept = stored is not None and stored.kept
    fields, quantized = spec.method.fields, kept or spec.method.quantization is not None
    if quantized and not kept:
        _check_quantizable(modules)
    if isinstance(fields, LoraFields):
        planned = _plan_lora(fields, modules, quantized=quantized)
    elif isinstance(fields, FullFields):
        planned = MethodPlan(None, modules.parameters, [], {}, servable.WHOLE_MODEL)
    else:
        if isinstance(fields, PeftFields):
            config = generic.config_of(fields, modules)
        else:
            config = typed.config_of(spec.method.name, fields, modules, quantized=quantized)
        planned = _plan_other(spec.method, config, modules)
    if planned.servable.vllm:
        planned = replace(planned, servable=servable.on_base(modules, planned.modules))
    _check_merge(spec, planned, modules)
    servable.require(spec, planned.servable)
    return planned


def _check_quantizable(modules: Modules) -> None:
    """Raise InvalidSpecError if bitsandbytes would leave most of the layers' weights as they are."""
    if modules.architecture in BYPASSED or modules.grouped:
        raise InvalidSpecError(
            f"method: the layers of a {modules.architecture} compute with the weights of linear modules themselves, "
            "which 4 bits do not allow: use method.lora"
        )
    share = modules.quantizable_weights / max(1, modules.layer_weights)
    if share >= _LEAST_QUANTIZED:
        return
    why = "its experts are" if modules.expert_weights else "its layers are"
    raise InvalidSpecError(
        f"method: bitsandbytes can hold {share:.0%} of the weights in the layers of a {modules.architecture} in 4 "
        f"bits, because {why} not linear modules that it knows: use method.lora"
    )


def parameters_at(rank: int | None, planned: MethodPlan, spec: FineTuneJobSpec, modules: Modules) -> int:
    """Return the number of parameters a spec would train with LoRA of another rank; as planned if that is None.

    0 if PEFT can only count them with the weights loaded.
    """
    fields = spec.method.fields
    if rank is None or not isinstance(fields, LoraFields) or rank == fields.rank:
        return planned.parameters or 0
    other = fields.model_copy(update={"rank": rank})
    quantized = spec.method.quantization is not None or (modules.stored is not None and modules.stored.kept)
    return _plan_lora(other, modules, quantized=quantized).parameters or 0


def _count_parameters(method: Method, config: PeftConfig, modules: Modules) -> tuple[int | None, list[str]]:
    """Return the number of trained parameters and the sorted names of the adapted modules."""
    if not method.fields.traits.counted or getattr(config, "monteclora_config", None) is not None:
        return None, sorted(_target_names(config))
    if isinstance(config, AdaLoraConfig):
        # Besides its matrices it has values that PEFT counts and nothing trains.
        targets = sorted(_target_names(config))
        shapes = adapted_modules(targets, modules).values()
        matrices = sum(config.init_r * (inputs + outputs + 1) for inputs, outputs in shapes)
        return matrices + _saved_parameters(config.modules_to_save or [], modules), targets
    name = f"peft {method.peft.peft_type}" if method.peft is not None else method.name
    model = weightless.wrapped(config, modules.config, name)
    return weightless.trained_parameters(model), weightless.targets(model)


def _saved_parameters(names: Sequence[str], modules: Modules) -> int:
    """Return the number of parameters of the modules that are trained whole."""
    return sum(size for full, size in modules.sizes.items() if any(matches_name(full, name) for name in names))


def _target_names(config: PeftConfig) -> list[str]:
    targets = getattr(config, "target_modules", None)
    return [targets] if isinstance(targets, str) else list(targets or [])


def _plan_other(method: Method, config: PeftConfig, modules: Modules) -> MethodPlan:
    traits = method.fields.traits
    parameters, names = _count_parameters(method, config, modules)
    targets = sorted({name.rsplit(".", 1)[-1] for name in names})
    adapted = adapted_modules(names, modules)
    initial = [getattr(config, key, True) for key in ("init_weights", "init_lora_weights", "init_ia3_weights")]
    return MethodPlan(
        config,
        parameters,
        targets,
        adapted,
        servable.verdict(method.fields, published_config(config.to_dict(), names, doubled=False)),
        adapted_weights=adapted_weights(adapted, [], modules),
        identity=traits.identity_at_start and False not in initial,
    )


def _check_merge(spec: FineTuneJobSpec, planned: MethodPlan, modules: Modules) -> None:
    if spec.output is None or spec.output.merge is Merge.NONE:
        return
    if planned.config is None:
        raise InvalidSpecError(
            "output.merge: method.full trains all weights and makes no adapter to merge: remove output.merge"
        )
    not_merged = spec.method.fields.traits.not_merged
    if not_merged is not None:
        raise InvalidSpecError(
            f"output.merge: an adapter of {spec.method.peft.type if spec.method.peft else spec.method.name} cannot be "
            f"merged into the base's weights, {not_merged}: remove output.merge, or use another method"
        )
    if planned.doubled and not planned.identity and spec.output.merge is Merge.DEQUANTIZED:
        raise InvalidSpecError(
            "output.merge: an adapter initialised with LoftQ fits the published base, not the quantised "
            "one: use Original"
        )
    if getattr(planned.config, "lora_bias", False):
        raise InvalidSpecError("output.merge: biases of LoRA layers cannot be merged: remove lora_bias or output.merge")
    saved = getattr(planned.config, "modules_to_save", None) or []
    if modules.tied and any(
        matches_name(name, module) for module in saved for name in (modules.output or "", _EMBEDDING)
    ):
        raise InvalidSpecError(
            f"output.merge: the base model's output layer and embedding share their weights, and {', '.join(saved)} is "
            "trained separately: remove output.merge or modulesToSave"
        )


def _plan_lora(fields: LoraFields, modules: Modules, *, quantized: bool) -> MethodPlan:
    targets = resolve_targets(fields.target_modules, modules, str(LORA.peft_type))
    experts = resolve_parameters(fields.target_parameters or [], modules)
    saved = fields.modules_to_save or []
    check_saved_modules(saved, targets, modules, quantized=quantized)
    check_pattern("rankPattern", fields.rank_pattern or {}, targets, modules)
    check_pattern("alphaPattern", fields.alpha_pattern or {}, targets, modules)
    shapes = adapted_modules(targets, modules)
    ranks = {name: pattern_value(fields.rank_pattern, name, fields.rank) for name in shapes}
    _check_ranks(fields, shapes, ranks)
    initialization = fields.initialization
    settings: dict[str, Any] = {}
    if initialization is Initialization.EVA:
        # Every module keeps the requested rank, so that memory and vLLM's limit are known in advance.
        settings["eva_config"] = EvaConfig(rho=1.0)
    elif initialization is Initialization.CORDA:
        settings["corda_config"] = CordaConfig(corda_method="ipm")
    elif initialization is Initialization.LORA_GA:
        settings["lora_ga_config"] = LoraGAConfig()
    elif initialization is Initialization.LOFTQ:
        settings["init_lora_weights"] = True  # initialised once the base is loaded in 4 bits
    values = fields.peft_values() | {"target_modules": list(targets), "target_parameters": experts or None} | settings
    # PEFT would set it for weights stored as (in, out); in 4 bits they are stored as (out, in).
    transposed = modules.transposed and not quantized
    config = LoraConfig(bias="none", task_type="CAUSAL_LM", fan_in_fan_out=transposed, **values)
    parameters = _trained_by_lora(config, shapes, ranks, modules)
    doubled = INITIALIZATIONS[initialization].changes_base or initialization is Initialization.LOFTQ
    verdict = servable.verdict(fields, published_config(config.to_dict(), sorted(shapes), doubled=doubled))
    identity = initialization is not Initialization.LOFTQ
    return MethodPlan(
        config,
        parameters,
        sorted({name.rpartition(".")[2] for name in shapes} | set(experts)),
        shapes,
        verdict,
        ranks,
        adapted_weights=adapted_weights(shapes, experts, modules),
        identity=identity,
        doubled=doubled,
    )


def _trained_by_lora(
    config: LoraConfig, shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], modules: Modules
) -> int:
    """Return the number of trained parameters, of the real adapter on a base without weights.

    Args:
        config: PEFT's configuration.
        shapes: modules that should get an adapter, with their (in, out) features.
        ranks: ranks of their matrices.
        modules: modules of the base model.

    Raises:
        InvalidSpecError: PEFT rejects the configuration, or adapts other modules.
    """
    # Initialisations compute with the weights.
    model = weightless.wrapped(replace(config, init_lora_weights=True), modules.config, "lora")
    differ = sorted(set(weightless.targets(model)) ^ set(shapes))
    if differ:
        raise InvalidSpecError(
            f"method targetModules: PEFT does not read them as names of the modules they name: {differ[0]} would "
            "be wrong; give full names of modules"
        )
    trained = weightless.trained_parameters(model)
    if config.init_lora_weights == INITIALIZATIONS[Initialization.MICA].peft:
        trained -= sum(ranks[name] * outputs for name, (_, outputs) in shapes.items())  # it trains A alone
    return trained


def _check_ranks(fields: LoraFields, shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> None:
    initialization = fields.initialization
    if initialization is Initialization.ORTHOGONAL and any(rank % 2 for rank in ranks.values()):
        raise InvalidSpecError("method rankPattern: initialization Orthogonal needs even ranks: change the odd ones")
    factor = INITIALIZATIONS[initialization].base_columns
    if not factor:
        return
    for name, shape in shapes.items():
        if factor * ranks[name] > min(shape):
            raise InvalidSpecError(
                f"method initialization {initialization} needs rank {factor * ranks[name]} of {name}, whose smaller "
                f"dimension is {min(shape)}: lower rank to at most {min(shape) // factor}, or exclude that module"
            )
