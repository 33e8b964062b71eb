from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tunesmith.api.method import METHODS, Method
from tunesmith.api.methods.declaration import MethodFields, MethodTraits
from tunesmith.api.methods.lora import INITIALIZATIONS, Initialization, initialization_of
from tunesmith.api.methods.peft import OTHER_METHODS, PeftFields


def nested(levels: int) -> Any:
    value: Any = 1
    for number in range(levels):
        value = {"a": value} if number % 2 else [value]
    return value


@pytest.mark.parametrize("config", [{}, {"r": 4, "target_modules": ["a"]}, {"a": nested(7)}, {"a": [1] * 1000}])
def test_a_config_of_normal_size_is_accepted(config: dict[str, Any]) -> None:
    assert PeftFields(type="LOHA", config=config).config == config


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"a": nested(8)}, "nested more than 8 levels deep"),
        ({"a": nested(900)}, "nested more than 8 levels deep"),
        ({"a": [[1] * 100] * 100}, "more than 2000 values"),
        ({f"k{number}": 1 for number in range(65)}, "at most 64 items"),
    ],
)
def test_a_config_that_is_deeper_or_larger_is_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        PeftFields(type="LOHA", config=config)


@pytest.mark.parametrize("name", METHODS)
def test_a_manifest_with_one_method_is_read_as_that_method(name: str) -> None:
    fields = {"type": "VERA"} if name == "peft" else {}
    method = Method.model_validate({name: fields})
    assert (method.name, type(method.fields)) == (name, METHODS[name])
    assert 0 < method.learning_rate < 1


def test_a_peft_type_has_one_declaration_of_traits() -> None:
    typed = [fields.declared.peft_type for fields in METHODS.values() if fields.declared is not None]
    assert set(typed) & set(OTHER_METHODS) == {"LORA"}, "method.peft takes LoRA's variants as well"


@pytest.mark.parametrize("spelled", ["LN_TUNING", "ln_tuning", "ln-tuning"])
def test_traits_follow_the_type_of_peft_however_it_is_spelled(spelled: str) -> None:
    assert PeftFields(type=spelled).traits is OTHER_METHODS["LN_TUNING"]


def test_a_type_that_is_not_listed_has_the_defaults() -> None:
    assert PeftFields(type="newer").traits == MethodTraits("NEWER")


def test_a_field_without_a_name_in_peft_is_refused_when_it_is_declared() -> None:
    with pytest.raises(TypeError, match=r"BrokenFields\.rank needs one PeftName, or NOT_IN_PEFT"):

        class BrokenFields(MethodFields):
            rank: int = 1


def test_every_initialization_has_its_traits() -> None:
    assert list(INITIALIZATIONS) == list(Initialization)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        *((traits.peft, name) for name, traits in INITIALIZATIONS.items() if isinstance(traits.peft, str)),
        ("pissa_niter_4", Initialization.FAST_PISSA),
        ("GAUSSIAN", Initialization.GAUSSIAN),
        (True, None),
        (False, None),
        ("of my own", None),
    ],
)
def test_initializations_are_found_by_pefts_names(value: object, found: Initialization | None) -> None:
    assert initialization_of(value) is found


SHARDED = {
    "lora": ({"lora": {}}, True),
    "lora with dora": ({"lora": {"dora": True}}, True),
    "lora as PiSSA": ({"lora": {"initialization": "PiSSA"}}, True),
    "lora as EVA": ({"lora": {"initialization": "EVA"}}, False),
    "qlora": ({"qlora": {}}, True),
    "qlora with dora": ({"qlora": {"dora": True}}, False),
    "qlora as LoftQ": ({"qlora": {"initialization": "LoftQ"}}, False),
    "ia3": ({"ia3": {}}, True),
    "full": ({"full": {}}, True),
    "adaLora": ({"adaLora": {}}, False),
    "promptTuning": ({"promptTuning": {}}, False),
    "peft": ({"peft": {"type": "VERA"}}, False),
}


@pytest.mark.parametrize("name", SHARDED)
def test_methods_whose_base_can_be_sharded(name: str) -> None:
    method, shardable = SHARDED[name]
    assert Method.model_validate(method).shardable is shardable


@pytest.mark.parametrize("name", [name for name in METHODS if name not in {"lora", "full", "peft"}])
def test_a_method_has_the_field_quantization_or_a_reason(name: str) -> None:
    fields = METHODS[name]
    assert fields.declared is not None
    assert ("quantization" in fields.model_fields) == (fields.declared.not_quantized is None)
