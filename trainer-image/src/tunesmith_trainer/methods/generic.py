"""`method.peft`: a raw PEFT configuration, checked against its class before any weight is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from typing import TYPE_CHECKING, Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from pydantic import TypeAdapter, ValidationError

from tunesmith.api.method import METHODS
from tunesmith.api.methods.lora import LORA, Initialization, initialization_of
from tunesmith_trainer.errors import InvalidSpecError
from tunesmith_trainer.methods import limits
from tunesmith_trainer.methods.targets import check_named_modules, check_saved_modules

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from peft import PeftConfig

    from tunesmith.api.methods.declaration import MethodTraits
    from tunesmith.api.methods.peft import PeftFields
    from tunesmith_trainer.methods.targets import Modules

_ABSENT: tuple[Any, ...] = (None, False, [])


def config_class(peft_type: str) -> type[PeftConfig]:
    """Return PEFT's configuration class of a method, by PEFT's name for the method."""
    found: type[PeftConfig] = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]
    return found


def traits_of(fields: PeftFields) -> MethodTraits:
    """Return the traits of the chosen type.

    Raises:
        InvalidSpecError: PEFT has no such type, or it cannot be trained.
    """
    known = [kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING]
    name = fields.peft_type
    if name not in known:
        matches = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {matches[0]}?" if matches else f"it has {', '.join(sorted(known))}"
        raise InvalidSpecError(f"method.peft.type: PEFT has no method {fields.type}; {hint}")
    reason = fields.traits.refused or _dedicated_fields(name)
    if reason is not None:
        raise InvalidSpecError(f"method.peft.type: {name} is not supported, {reason}")
    return fields.traits


def _dedicated_fields(peft_type: str) -> str | None:
    """Return why a type with its own method is refused; None: it has none, or has variants for method.peft."""
    for name, fields in METHODS.items():
        traits = fields.declared
        if traits is not None and traits.peft_type == peft_type and not traits.takes_peft_config:
            return f"it has its own fields: use method.{name}"
    return None


def config_of(fields: PeftFields, modules: Modules) -> PeftConfig:
    """Return PEFT's configuration.

    Raises:
        InvalidSpecError: a key is unknown, refused or of the wrong type, a name matches no module of the base, or the
            method cannot be trained in 4 bits.
    """
    traits = traits_of(fields)
    quantized = fields.quantization is not None
    if quantized and traits.not_quantized is not None:
        raise InvalidSpecError(
            f"method.peft: {traits.peft_type} cannot be trained on a base in 4 bits, {traits.not_quantized}: remove "
            "quantization, or use method.qlora"
        )
    _check_keys(fields.config, "config")
    if traits is LORA:
        _check_lora(fields.config, quantized=quantized)
    cls = config_class(fields.peft_type)
    values = _convert(cls, fields.config, "config")
    for key in ("target_modules", "feedforward_modules", "exclude_modules"):
        check_named_modules(f"peft.config.{key}", fields.config.get(key), modules)
    saved = fields.config.get("modules_to_save") or []
    check_saved_modules(saved, fields.config.get("target_modules") or [], modules, quantized=quantized)
    try:
        config = cls(task_type="CAUSAL_LM", **values)
    except (ValueError, TypeError, ImportError) as error:
        raise InvalidSpecError(f"method.peft.config: {' '.join(str(error).split())[:300]}") from None
    return config


def _check_keys(config: Mapping[str, Any], where: str) -> None:
    """Raise for keys that name files, code or models, at any depth, and for those that the trainer sets."""
    for key, value in config.items():
        if key in limits.PATHS:
            raise InvalidSpecError(f"method.peft.{where}.{key} names files or code, which a job cannot use: remove it")
        if where == "config" and key in limits.SET_BY_TRAINER:
            raise InvalidSpecError(f"method.peft.{where}.{key} cannot be set, {limits.SET_BY_TRAINER[key]}: remove it")
        if isinstance(value, dict):
            _check_keys(value, f"{where}.{key}")


def _check_lora(config: Mapping[str, Any], *, quantized: bool) -> None:
    for key, reason in limits.LORA_REFUSED.items():
        if config.get(key, False) not in _ABSENT:
            raise InvalidSpecError(f"method.peft.config.{key} is not supported, {reason}")
    initialization = config.get("init_lora_weights")
    if isinstance(initialization, str):
        found = initialization_of(initialization)
        method = "method.qlora" if found is Initialization.LOFTQ else "method.lora"
        raise InvalidSpecError(
            f"method.peft.config.init_lora_weights must be true or false: for {initialization!r} use {method}"
            + (f".initialization: {found}" if found is not None else "")
        )
    for key, reason in limits.LORA_NOT_IN_4_BITS.items():
        if quantized and config.get(key) is not None:
            raise InvalidSpecError(
                f"method.peft.config.{key} cannot be used on a base in 4 bits, {reason}: remove quantization, or {key}"
            )


def _convert(cls: type[Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert the values to the types of the fields of one of PEFT's dataclasses."""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in given.items():
        if key not in fields:
            matches = difflib.get_close_matches(key, list(fields), n=1)
            accepted = set(fields) - limits.PATHS - set(limits.SET_BY_TRAINER)
            hint = f"did you mean {matches[0]}?" if matches else f"it has {', '.join(sorted(accepted))}"
            raise InvalidSpecError(f"method.peft.{where}: {cls.__name__} has no field {key}; {hint}")
        nested = _dataclass_in(hints[key])
        if nested is not None and isinstance(value, dict):
            values[key] = _build(nested, _convert(nested, value, f"{where}.{key}"), f"{where}.{key}")
            continue
        try:
            values[key] = TypeAdapter(hints[key]).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]["msg"]
            raise InvalidSpecError(
                f"method.peft.{where}.{key} is {json.dumps(value)[:80]}: {problem[:1].lower()}{problem[1:]}"
            ) from None
    return values


def _build(cls: type[Any], values: Mapping[str, Any], where: str) -> Any:  # noqa: ANN401 - a dataclass of PEFT's
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise InvalidSpecError(f"method.peft.{where}: {' '.join(str(error).split())[:300]}") from None


def _dataclass_in(hint: Any) -> type[Any] | None:  # noqa: ANN401 - any annotation
    options: Iterable[Any] = typing.get_args(hint) or (hint,)
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)
