"""Base class of every method's fields, and the declarations that a method makes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final

from tunesmith.api.model import ApiModel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


ALL_LINEAR: Final = "all-linear"
"""All linear modules except the output layer, as in PEFT."""


@dataclass(frozen=True)
class MethodTraits:
    """Facts about a method, measured with PEFT and vLLM by `make verify-methods`.

    Reasons complete the sentence "…, it works on the weights themselves".

    Args:
        peft_type: PEFT's name of the method (PeftType); None: all weights are trained, without an adapter.
        learning_rate: peak learning rate of a manifest that sets none. Where PEFT's benchmark (method_comparison,
            MetaMathQA to GSM8K with Llama 3.2 3B) compared rates, its best; otherwise the paper's, or 1e-4.
        served: True if vLLM loads this type of adapter.
        not_quantized: reason why it cannot be trained on a base in 4 bits; None: it can.
        not_merged: reason why it cannot be merged into the base's weights; None: it can.
        identity_at_start: True if the untrained adapter does not change the model.
        counted: True if PEFT can count the trained parameters without the base's weights.
        recomputable: True if activations can be recomputed in the backward pass (gradient checkpointing).
        refused: reason why Tunesmith does not train it; None: it does.
        takes_peft_config: True if `method.peft` accepts the type although it has its own fields, for variants that
            those fields do not cover.
        decided_by_training: keys of adapter_config.json that training writes, and that are therefore not requests.
    """

    peft_type: str | None
    learning_rate: float = 1e-4
    served: bool = False
    not_quantized: str | None = None
    not_merged: str | None = None
    identity_at_start: bool = True
    counted: bool = True
    recomputable: bool = True
    refused: str | None = None
    takes_peft_config: bool = False
    decided_by_training: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class PeftName:
    """Metadata of a field: the key of PEFT's configuration class that has the same meaning.

    Args:
        key: PEFT's name, also in adapter_config.json.
        values: PEFT's values by the field's values, if they differ.
        modules: True if the field is a list of module names, for which PEFT also accepts other forms.
    """

    key: str
    values: Mapping[Any, Any] = field(default_factory=dict)
    modules: bool = False

    def peft_value(self, value: object) -> object:
        """Return PEFT's value for a value of the field."""
        return self.values[value] if self.values else value

    def field_value(self, value: object) -> object:
        """Return the field's value for PEFT's value; None if it has no counterpart."""
        if self.values:
            return next((ours for ours, theirs in self.values.items() if _spelled(theirs) == _spelled(value)), None)
        if self.modules:
            # PEFT keeps sets, whose order differs between runs, and accepts regular expressions.
            return sorted(value) if isinstance(value, list) else [value] if value == ALL_LINEAR else None
        return value


def _spelled(value: object) -> str:
    return str(value).lower()


@dataclass(frozen=True)
class NotInPeft:
    """Metadata of a field that PEFT's configuration class does not have."""


NOT_IN_PEFT: Final = NotInPeft()


@dataclass(frozen=True)
class FieldCondition:
    """Condition on a method's fields.

    Args:
        cel: CEL expression with `{fields}` as the placeholder for the fields' path; None: they only have to exist.
        holds: the same in Python.
    """

    cel: str | None
    holds: Callable[[Any], bool]

    def at(self, path: str) -> str:
        """Return the CEL expression: true if the fields at a path, such as `self.method.lora`, exist and satisfy it."""
        present = f"has({path})"
        return present if self.cel is None else f"({present} && {self.cel.replace('{fields}', path)})"


ALWAYS: Final = FieldCondition(None, lambda _: True)


class MethodFields(ApiModel):
    """Fields of one method."""

    declared: ClassVar[MethodTraits | None] = None
    """Traits of the method; None if they depend on its fields."""
    sharding: ClassVar[FieldCondition | None] = None
    """Condition for sharding the base's weights over ranks (FSDP2); None: never possible."""
    peft_names: ClassVar[dict[str, PeftName]] = {}
    """PEFT's names by attribute, collected from the fields' metadata."""
    peft_constants: ClassVar[dict[str, Any]] = {}
    """Arguments of PEFT's configuration class that no field sets, by PEFT's names."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:  # noqa: ANN401 - pydantic's signature
        """Collect PEFT's names.

        Raises:
            TypeError: a field has neither a `PeftName` nor `NOT_IN_PEFT`.
        """
        super().__pydantic_init_subclass__(**kwargs)
        cls.peft_names = {}
        for attribute, info in cls.model_fields.items():
            names = [entry for entry in info.metadata if isinstance(entry, PeftName | NotInPeft)]
            if len(names) != 1:
                raise TypeError(f"{cls.__name__}.{attribute} needs one PeftName, or NOT_IN_PEFT")
            if isinstance(names[0], PeftName):
                cls.peft_names[attribute] = names[0]

    @classmethod
    def quantization_cel(cls, path: str) -> str | None:
        """Return the CEL expression that is true if fields at a path request a quantized base; None: they never do."""
        info = cls.model_fields.get("quantization")
        if info is None:
            return None
        present = f"has({path})"
        return present if info.default_factory is not None else f"({present} && has({path}.quantization))"

    @property
    def traits(self) -> MethodTraits:
        """Traits of the method.

        Raises:
            NotImplementedError: the class neither declares nor computes them.
        """
        if self.declared is None:
            raise NotImplementedError(f"{type(self).__name__} declares no traits")
        return self.declared

    @property
    def shardable(self) -> bool:
        """True if the base's weights can be sharded over ranks."""
        return self.sharding is not None and self.sharding.holds(self)

    def peft_values(self) -> dict[str, Any]:
        """Return the arguments of PEFT's configuration class; absent fields are omitted."""
        values = dict(self.peft_constants)
        for attribute, name in self.peft_names.items():
            value = getattr(self, attribute)
            if value is not None:
                values[name.key] = name.peft_value(value)
        return values

    def peft_values_of_run(self, total_steps: int, base_model: str) -> dict[str, Any]:  # noqa: ARG002 - few use them
        """Return the arguments of PEFT's configuration class that are only known in the run.

        Args:
            total_steps: optimizer steps of the run.
            base_model: folder of the base model and its tokenizer.
        """
        return {}
