"""The modules that a base model really has, and the names that a manifest gives for them."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

from tunesmith.api.methods.declaration import ALL_LINEAR
from tunesmith_trainer.errors import InvalidSpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Modules:
    """The modules of a base model.

    Args:
        linear: linear modules except the output layer: full name → (in, out) features.
        others: full names of all other modules.
        output: full name of the output layer, or None.
        sizes: number of parameters of every module, by full name.
        parameters: number of parameters of the whole model; shared ones count once.
        tied: True if the output layer and the embedding share their weights.
        config: the base model's configuration.
    """

    linear: dict[str, tuple[int, int]]
    others: frozenset[str]
    output: str | None
    sizes: dict[str, int]
    parameters: int
    tied: bool
    config: PretrainedConfig


def modules_of(config: PretrainedConfig) -> Modules:
    """Return the modules of a model with this configuration, without allocating its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    output = model.get_output_embeddings()
    linear, others, output_name = {}, set(), None
    sizes = {}
    for name, module in model.named_modules():
        sizes[name] = sum(parameter.numel() for parameter in module.parameters())
        if module is output:
            output_name = name
        elif isinstance(module, torch.nn.Linear):
            linear[name] = (module.in_features, module.out_features)
        elif name:
            others.add(name)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Modules(linear, frozenset(others), output_name, sizes, parameters, tied, config)


def resolve_targets(names: Sequence[str], modules: Modules) -> list[str]:
    """Return the names for PEFT's `target_modules`; `all-linear` becomes the sorted last parts of all linear names.

    Raises:
        InvalidSpecError: a name matches no linear module.
    """
    if ALL_LINEAR in names:
        return sorted({name.rsplit(".", 1)[-1] for name in modules.linear})
    for name in names:
        if modules.output is not None and matches_name(modules.output, name):
            raise InvalidSpecError(
                f"method targetModules: {name} is the output layer, which cannot get an adapter; remove it, or train "
                f"it whole with modulesToSave: [{name}]"
            )
        if any(matches_name(full, name) for full in modules.linear):
            continue
        if any(matches_name(full, name) for full in modules.others):
            raise InvalidSpecError(
                f"method targetModules: {name} is not a linear module of the base model, so it cannot get an adapter: "
                "remove it"
            )
        raise InvalidSpecError(_unknown("targetModules", name, modules.linear))
    return sorted(set(names))


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
                f"method modulesToSave: {name} is held in 4 bits and cannot be trained whole: remove it, or use a "
                "method without quantization"
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


def _unknown(field: str, name: str, known: Iterable[str], what: str = "module") -> str:
    last_parts = sorted({full.rsplit(".", 1)[-1] for full in known} - {""})
    last_parts = [name for name in last_parts if not name.isdigit()]
    matches = difflib.get_close_matches(name, last_parts, n=1)
    hint = f"did you mean {matches[0]}?" if matches else f"it has {', '.join(last_parts)}"
    return f"method {field}: the base model has no {what} named {name}; {hint}"
