"""The modules that a base model really has, and the names that a manifest gives for them."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.integrations import replace_with_bnb_linear
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.dbrx.modeling_dbrx import DbrxExpertGLU
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from tunesmith.api.methods.declaration import ALL_LINEAR
from tunesmith.api.methods.lora import LORA
from tunesmith_trainer.errors import InvalidSpecError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from tunesmith_trainer.base_model.stored import StoredQuantization

BYPASSED = {
    "mamba": "dt_proj",
    "falcon_mamba": "dt_proj",
    "jamba": "dt_proj",
    "longcat_flash": "classifier",
    # In training only, with its weights clamped: an adapter would get no gradient.
    "gemma3n_text": "correction_coefs",
}
"""Linear modules with whose weights the layers multiply themselves, past an adapter or 4 bits, by architecture."""
OWN_EXPERTS = frozenset({"dbrx"})
"""Architectures whose layers multiply with the weights of experts themselves, past an adapter."""
_INDEXER = "Indexer"
"""Part of the names of classes that choose the positions of sparse attention; the choice has no gradient."""
_STACKED_DIMENSIONS = 3
"""Dimensions of a parameter that stacks the weights of all experts of a layer."""


@dataclass(frozen=True)
class Modules:
    """The modules of a base model.

    Args:
        linear: linear modules of the language model, except the output layer: full name → (in, out) features.
        others: full names of all other modules, such as those of a vision tower.
        output: full name of the output layer, or None.
        sizes: number of parameters of every module, by full name.
        expert_weights: weights of experts that are stacked in one parameter, by full name: number of values.
        parameters: number of parameters of the whole model; shared ones count once.
        tied: True if the output layer and the embedding share their weights.
        transposed: True if the linear modules store their weights as (in, out), as GPT-2's do.
        config: the base model's configuration.
        stored: quantisation in which the weights are stored; None: they are not quantised.
        alone: True if it is the language model of a base model whose other parts transformers leaves out.
        indexers: full names of the linear modules that choose the positions of sparse attention.
        grouped: full names of the linear modules that compute each group of outputs from a group of inputs.
        renamed: full names of the linear modules whose adapters PEFT loads under other names, so not at all.
    """

    linear: dict[str, tuple[int, int]]
    others: frozenset[str]
    output: str | None
    sizes: dict[str, int]
    expert_weights: dict[str, int]
    parameters: int
    tied: bool
    transposed: bool
    config: PretrainedConfig
    stored: StoredQuantization | None = None
    alone: bool = False
    indexers: frozenset[str] = frozenset()
    grouped: frozenset[str] = frozenset()
    renamed: frozenset[str] = frozenset()

    @property
    def layer_weights(self) -> int:
        """Number of weights in linear modules and experts of the language model, without embedding and output layer."""
        return sum(wide * high for wide, high in self.linear.values()) + sum(self.expert_weights.values())

    @cached_property
    def quantizable_weights(self) -> int:
        """Number of weights in linear modules of the language model that bitsandbytes can hold quantised."""
        stored = self.stored if self.stored is not None and self.stored.kept else None
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
            skipped = None if stored is None else stored.skipped
            replace_with_bnb_linear(
                model, skipped or get_keys_to_not_convert(model), BitsAndBytesConfig(load_in_4bit=True)
            )
        replaced = [module for name in self.linear if isinstance(module := model.get_submodule(name), Linear4bit)]
        return sum(module.in_features * module.out_features for module in replaced)

    @property
    def class_name(self) -> str:
        """Name of the model's class, which vLLM looks for (`architectures`)."""
        named = self.config.architectures
        return str(named[0] if named else MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)].__name__)

    @property
    def architecture(self) -> str:
        """The language model's `model_type`."""
        return str(self.config.get_text_config().model_type)


def modules_of(config: PretrainedConfig, stored: StoredQuantization | None = None) -> Modules:
    """Return the modules of a model with this configuration, without allocating its weights.

    Args:
        config: configuration, without the quantisation in which the weights are stored.
        stored: that quantisation.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    output = model.get_output_embeddings()
    language = _language_model(model)
    linear, others, output_name = {}, set(), None
    experts: dict[str, int] = {}
    sizes, transposed = {}, False
    indexers = tuple(f"{name}." for name, module in model.named_modules() if _INDEXER in type(module).__name__)
    for name, module in model.named_modules():
        sizes[name] = sum(parameter.numel() for parameter in module.parameters())
        of_language = name == language or name.startswith(language)
        features = _features(module) if of_language else None
        if module is output:
            output_name = name
        elif features is not None:
            linear[name] = features
            transposed = transposed or isinstance(module, Conv1D)
        elif name:
            others.add(name)
        if of_language and not isinstance(module, torch.nn.Conv1d):
            own = module.named_parameters(prefix=name, recurse=False)
            stacked = _dimensions_of_experts(module)
            experts |= {full: parameter.numel() for full, parameter in own if parameter.ndim in stacked}
    return Modules(
        linear=linear,
        others=frozenset(others),
        output=output_name,
        sizes=sizes,
        expert_weights=experts,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        transposed=transposed,
        config=config,
        stored=stored,
        alone=type(model.config) is not type(config),
        indexers=frozenset(name for name in linear if name.startswith(indexers)),
        grouped=frozenset(name for name in linear if _is_grouped(model.get_submodule(name))),
        renamed=_renamed(linear, model),
    )


def _language_model(model: PreTrainedModel) -> str:
    """Return the beginning of the names of the language model's modules; empty if there are no others."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next(f"{name}." for name, module in model.named_modules() if module is decoder)


def _dimensions_of_experts(module: nn.Module) -> tuple[int, ...]:
    """Return the numbers of dimensions of the parameters of a module that stack the weights of experts.

    DBRX stacks them in two.
    """
    return (2, _STACKED_DIMENSIONS) if isinstance(module, DbrxExpertGLU) else (_STACKED_DIMENSIONS,)


def _renamed(names: Iterable[str], model: PreTrainedModel) -> frozenset[str]:
    """Return the modules that transformers would rename in a published checkpoint, though they have their own names.

    PEFT renames the keys of an adapter likewise. For Laguna, `shared_expert.` also matches `shared_experts`.
    """
    conversions = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    known = set(dict(model.named_modules()))
    return frozenset(
        name
        for name in names
        for entry in conversions
        if (key := entry.rename_source_key(f"{name}.weight")[0]).removesuffix(".weight") not in known
        and not name.endswith(key.removesuffix(".weight"))
    )


def _is_grouped(module: nn.Module) -> bool:
    """Return True if a linear module on the meta device is not one product of its input and its weights."""
    if not isinstance(module, torch.nn.Linear) or type(module).forward is torch.nn.Linear.forward:
        return False
    shape = (5, 7)
    try:
        product = module(torch.empty(*shape, module.in_features, dtype=module.weight.dtype, device="meta"))
    except RuntimeError:
        return True
    return tuple(product.shape) != (*shape, module.out_features)


def _features(module: nn.Module) -> tuple[int, int] | None:
    """Return the (in, out) features of a linear module; None for another one.

    A router of experts may be a linear module to Python, but returns more than a product.
    """
    if "Router" in type(module).__name__:
        return None
    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def adaptable(modules: Modules, peft_type: str) -> dict[str, tuple[int, int]]:
    """Return the linear modules that can get an adapter of a type, by full name, with their (in, out) features.

    Layers of state-space models compute past some of their modules, to which an adapter would do nothing; indexers of
    sparse attention get no gradient; an adapter is one product, a grouped module is not; PEFT does not load adapters of
    renamed ones.
    """
    names = {_last(full) for full in modules.linear} - expert_names(modules, peft_type)
    usable = {name for name in names if not _bypassed(name, modules, peft_type)}
    without = modules.indexers | modules.grouped | modules.renamed
    return {full: shape for full, shape in modules.linear.items() if _last(full) in usable and full not in without}


def expert_names(modules: Modules, peft_type: str) -> frozenset[str]:
    """Return names of modules that PEFT reads as names of experts' weights (`_convert_peft_config_moe`).

    Experts were linear modules with these names before they were stacked in one parameter, and adapters for those are
    still accepted. A dense layer or a shared expert with the same names cannot get an adapter.
    """
    if peft_type != LORA.peft_type:
        return frozenset()
    pattern = _MODEL_TO_CONVERSION_PATTERN.get(modules.config.model_type)
    return frozenset(_MOE_TARGET_MODULE_MAPPING.get(pattern, ()))


def _bypassed(name: str, modules: Modules, peft_type: str) -> bool:
    if BYPASSED.get(modules.architecture) == name:
        return True
    method = SimpleNamespace(peft_type=peft_type)
    try:
        _check_lora_target_modules_mamba(method, SimpleNamespace(config=modules.config), name)
    except ValueError:
        return True
    return False


def _last(full: str) -> str:
    return full.rpartition(".")[2]


def module_names(chosen: Collection[str], modules: Modules) -> list[str]:
    """Return sorted names for PEFT that mean exactly the chosen modules: their last parts where these are unambiguous.

    Args:
        chosen: full names of modules.
        modules: modules of the base model.
    """
    wanted = set(chosen)
    shared = {_last(full) for full in modules.sizes if full not in wanted}
    return sorted({full if _last(full) in shared or _last(full).isdigit() else _last(full) for full in wanted})


def resolve_targets(names: Sequence[str], modules: Modules, peft_type: str) -> list[str]:
    """Return the names for PEFT's `target_modules`; `all-linear` becomes those of all modules that can be adapted.

    Raises:
        InvalidSpecError: a name matches no linear module, or one that cannot get an adapter of this type.
    """
    usable = adaptable(modules, peft_type)
    if ALL_LINEAR in names:
        if not usable:
            raise InvalidSpecError(
                f"method targetModules: no linear module of a {modules.architecture} can get an adapter: use "
                "method.full"
            )
        return module_names(usable, modules)
    for name in names:
        _check_target(name, modules, usable, peft_type)
    if all(full in usable for full in modules.sizes if any(matches_name(full, name) for name in names)):
        return sorted(set(names))
    # Some also mean modules outside the language model.
    return module_names([full for full in usable if any(matches_name(full, name) for name in names)], modules)


def _check_target(name: str, modules: Modules, usable: Mapping[str, tuple[int, int]], peft_type: str) -> None:
    """Raise InvalidSpecError if a name matches no module that can get an adapter."""
    if modules.output is not None and matches_name(modules.output, name):
        raise InvalidSpecError(
            f"method targetModules: {name} is the output layer, which cannot get an adapter; remove it, or train "
            f"it whole with modulesToSave: [{name}]"
        )
    if _last(name) in expert_names(modules, peft_type):
        raise InvalidSpecError(
            f"method targetModules: PEFT reads {name} as the experts of a {modules.architecture}, which are no "
            f"linear modules: name them with targetParameters: [{', '.join(_expert_parameters(modules))}], or "
            f"choose among {', '.join(sorted({_last(full) for full in usable}))}"
        )
    if any(matches_name(full, name) for full in usable):
        return
    if any(matches_name(full, name) for full in modules.indexers):
        raise InvalidSpecError(
            f"method targetModules: {name} is part of the indexer of a {modules.architecture}, which chooses "
            "positions and gets no gradient: remove it"
        )
    if any(matches_name(full, name) for full in modules.renamed):
        raise InvalidSpecError(
            f"method targetModules: PEFT loads an adapter of {name} of a {modules.architecture} under another name, "
            "which does not exist: remove it"
        )
    if any(matches_name(full, name) for full in modules.grouped):
        raise InvalidSpecError(
            f"method targetModules: {name} of a {modules.architecture} computes groups of outputs from groups of "
            "inputs, to which no adapter can be added: remove it"
        )
    if any(matches_name(full, name) for full in modules.linear):
        raise InvalidSpecError(
            f"method targetModules: {name} cannot get an adapter, because the layers of a "
            f"{modules.architecture} bypass it: remove it"
        )
    if any(matches_name(full, name) for full in modules.others):
        raise InvalidSpecError(
            f"method targetModules: {name} is not a linear module of the base model, so it cannot get an adapter: "
            "remove it"
        )
    raise InvalidSpecError(_unknown("targetModules", name, modules.linear))


def resolve_parameters(names: Sequence[str], modules: Modules) -> list[str]:
    """Return the names for PEFT's `target_parameters`.

    Raises:
        InvalidSpecError: a name matches no weight of experts, or one that cannot get an adapter.
    """
    if names and modules.architecture in OWN_EXPERTS:
        raise InvalidSpecError(
            f"method targetParameters: the layers of a {modules.architecture} compute with the weights of experts "
            "themselves, past an adapter: remove targetParameters, or use method.full"
        )
    for name in names:
        if not any(matches_name(full, name) for full in modules.expert_weights):
            known = _expert_parameters(modules)
            hint = f"it has {', '.join(known)}" if known else "it has no experts: remove targetParameters"
            raise InvalidSpecError(
                f"method targetParameters: the base model has no experts' weight named {name}; {hint}"
            )
    return sorted(set(names))


def _expert_parameters(modules: Modules) -> list[str]:
    """Return short names of the experts' weights."""
    return sorted({".".join(full.rsplit(".", 2)[1:]) for full in modules.expert_weights})


def check_saved_modules(names: Sequence[str], targets: Sequence[str], modules: Modules, *, quantized: bool) -> None:
    """Check the names of `modulesToSave`.

    Raises:
        InvalidSpecError: a name matches no module, gets an adapter too, or is held in 4 bits.
    """
    for name in names:
        if not any(matches_name(full, name) for full in modules.sizes):
            raise InvalidSpecError(_unknown("modulesToSave", name, modules.sizes))
        inside = [full for full in modules.sizes if matches_name(full, name)]
        with_adapter = [
            full
            for full in modules.linear
            if any(matches_name(full, target) for target in targets)
            and any(full == outer or full.startswith(f"{outer}.") for outer in inside)
        ]
        if with_adapter:
            raise InvalidSpecError(
                f"method modulesToSave: {name} would be trained whole and, as {with_adapter[0]}, with an adapter: "
                "remove it, or name other targetModules"
            )
        if quantized and any(
            full == outer or full.startswith(f"{outer}.") for full in modules.linear for outer in inside
        ):
            raise InvalidSpecError(
                f"method modulesToSave: {name} is held quantised and cannot be trained whole: remove it, or train it "
                "without quantization"
            )


def check_named_modules(field: str, names: Sequence[str] | str | None, modules: Modules) -> None:
    """Check names, or the regular expression, that PEFT will look for in the names of modules.

    Raises:
        InvalidSpecError: a name matches no module, or the regular expression is invalid.
    """
    if names is None or names == ALL_LINEAR:
        return
    if isinstance(names, str):
        try:
            found = any(re.fullmatch(names, full) for full in modules.sizes)
        except re.error as error:
            raise InvalidSpecError(f"method {field}: {names} is not a regular expression: {error}") from None
        if not found:
            raise InvalidSpecError(
                f"method {field}: no module of the base model has a name that matches the expression {names}: "
                "correct it"
            )
        return
    for name in names:
        if not any(matches_name(full, name) for full in modules.sizes):
            raise InvalidSpecError(_unknown(field, name, modules.sizes))


def check_pattern(field: str, pattern: Mapping[str, int], targets: Sequence[str], modules: Modules) -> None:
    """Check that every key of a pattern is the name of a module that gets an adapter.

    Raises:
        InvalidSpecError: a key is not.
    """
    known = adapted_modules(targets, modules)
    for name in pattern:
        if not any(matches_name(full, name) for full in known):
            raise InvalidSpecError(_unknown(field, name, known, what="module with an adapter"))


def pattern_value(pattern: Mapping[str, int] | None, module: str, default: int) -> int:
    """Return the value that PEFT uses for a module: that of the first key that is a suffix of its name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({re.escape(key)})$", module):
            return value
    return default


def matches_name(full: str, name: str) -> bool:
    """Return True if `name` is the module's full name or its last parts."""
    return full == name or full.endswith(f".{name}")


def adapted_modules(targets: Sequence[str], modules: Modules) -> dict[str, tuple[int, int]]:
    """Return the adapted modules with their (in, out) features."""
    return {full: shape for full, shape in modules.linear.items() if any(matches_name(full, name) for name in targets)}


def adapted_weights(adapted: Mapping[str, tuple[int, int]], experts: Sequence[str], modules: Modules) -> int:
    """Return the number of the base's weights that an adapter changes.

    Args:
        adapted: adapted modules with their (in, out) features.
        experts: names of experts' weights that are adapted.
        modules: modules of the base model.
    """
    stacked = [
        count for full, count in modules.expert_weights.items() if any(matches_name(full, name) for name in experts)
    ]
    return sum(inputs * outputs for inputs, outputs in adapted.values()) + sum(stacked)


def _unknown(field: str, name: str, known: Iterable[str], what: str = "module") -> str:
    last_parts = sorted({full.rsplit(".", 1)[-1] for full in known} - {""})
    last_parts = [name for name in last_parts if not name.isdigit()]
    matches = difflib.get_close_matches(name, last_parts, n=1)
    hint = f"did you mean {matches[0]}?" if matches else f"it has {', '.join(last_parts)}"
    return f"method {field}: the base model has no {what} named {name}; {hint}"
