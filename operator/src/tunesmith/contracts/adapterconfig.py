"""Translation of PEFT's adapter_config.json into the method and base of a FineTuneJob. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from tunesmith.api.method import METHODS
from tunesmith.api.methods.declaration import ALL_LINEAR
from tunesmith.api.methods.lora import Initialization, LoraFields, initialization_of

_EMPTY: tuple[Any, ...] = (None, [], {}, "none")
_ON_BY_DEFAULT = frozenset(
    {
        *("init_lora_weights", "init_ia3_weights", "init_weights", "save_projection", "use_cayley_neumann"),
        *("psoft_orth", "psoft_mag_a", "psoft_mag_b", "select_top", "save_precomputed_indices", "share_embeddings"),
        "use_idwt",
    }
)
"""Keys that matter if they are false, since PEFT's default is true."""
_NEUTRAL = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "task_type"),
        "revision",  # of the base
        # filled in by PEFT from the base model
        *("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "tokenizer_name_or_path"),
    }
)
_DEFAULTS = {
    "init_lora_weights": True,
    "init_ia3_weights": True,
    "init_weights": True,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "prompt_tuning_init": "RANDOM",
    "tinit": 0,
    "tfinal": 0,
}
_LOFTQ_BITS = 4
_CAUSAL_LM = "CAUSAL_LM"
_OLD_NAMES = {
    **{name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "openai-gpt")},
    "distilgpt2": "distilbert/distilgpt2",
    "ctrl": "Salesforce/ctrl",
}
"""Current names of models that were on the Hugging Face Hub before it had organisations."""
_LAST_PARTS = re.compile(r"\^?\.\*\\\.(?:\(\??:?(?P<choices>\w+(?:\|\w+)*)\))?(?P<end>\w*)\$?")
"""Regular expression for modules by the last part of their names alone, such as `.*\\.(q|v)_proj`."""


class UnsupportedAdapterError(ValueError):
    """No FineTuneJob trains such an adapter."""


@dataclass
class Adapter:
    """Parts of a FineTuneJob that train an adapter like a given one.

    Args:
        base: baseModel of the FineTuneJob.
        method: method of the FineTuneJob.
        omitted: keys without a counterpart, with a hint or "".
        changed: keys whose counterpart behaves differently, with a description of the difference.
    """

    base: dict[str, Any]
    method: dict[str, Any]
    omitted: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)


def read_initialization(value: object) -> tuple[Initialization | None, str]:
    """Return the initialization for PEFT's value of init_lora_weights, and its difference from PEFT's, or "".

    The initialization is None if the value has no counterpart; LoftQ is one of the method qlora.
    """
    found = initialization_of(value)
    if found is Initialization.FAST_PISSA:
        return found, "initialization FastPiSSA uses Tunesmith's number of iterations"
    loftq = "method.qlora holds the base in 4 bits, and LoftQ compensates for the quantization error in one iteration"
    return found, loftq if found is Initialization.LOFTQ else ""


def names_of_pattern(pattern: str) -> list[str] | None:
    """Return the names of modules to which PEFT's regular expression is equivalent; None if there are none."""
    found = _LAST_PARTS.fullmatch(pattern)
    if found is None or not (found["choices"] or found["end"]):
        return None
    return [f"{choice}{found['end']}" for choice in (found["choices"] or "").split("|")]


def adapter_of(config: dict[str, Any]) -> Adapter:
    """Return the base and the method that train such an adapter, and the keys that are omitted or changed.

    Methods for which FineTuneJobs have no fields become `peft`, with all of their keys, and so does a LoRA adapter
    whose modules are given by a regular expression.

    Args:
        config: the file's content, which has `peft_type` and `base_model_name_or_path`.

    Raises:
        UnsupportedAdapterError: the adapter is of another task, or its base has no usable name.
    """
    task = config.get("task_type")
    if task not in (None, _CAUSAL_LM):
        raise UnsupportedAdapterError(
            f"task_type is {task}: a FineTuneJob trains causal language models only ({_CAUSAL_LM})"
        )
    kind = str(config["peft_type"])
    given = {key: value for key, value in config.items() if key not in _NEUTRAL and _has_effect(key, value)}
    adapter = Adapter({}, {})
    _read_base(config, adapter)
    name = _method_of(kind)
    targets = given.get("target_modules")
    if isinstance(targets, str) and targets != ALL_LINEAR:
        names = names_of_pattern(targets)
        if names is not None:
            given["target_modules"] = names
        elif name is not None and _accepts_keys(name):
            adapter.changed["target_modules"] = "it is a regular expression, which method.peft keeps"
            name = None
    if name is None:
        adapter.method = {"peft": {"type": kind, "config": given}}
        return adapter
    fields: dict[str, Any] = {}
    if issubclass(METHODS[name], LoraFields) and _read_initialization(given, fields, adapter) is Initialization.LOFTQ:
        name = "qlora"
    model = METHODS[name]
    for attribute, theirs in model.peft_names.items():
        found = theirs.field_value(given.get(theirs.key))
        if found is not None:
            fields[str(model.model_fields[attribute].alias)] = found
            del given[theirs.key]
    adapter.method = {name: fields}
    decided = model.declared.decided_by_training if model.declared is not None else frozenset()
    adapter.omitted |= {key: _hint(key, value, kind) for key, value in given.items() if key not in decided}
    return adapter


def _accepts_keys(name: str) -> bool:
    """Return True if `method.peft` accepts the type of a method that has its own fields."""
    declared = METHODS[name].declared
    return declared is not None and declared.takes_peft_config


def _method_of(kind: str) -> str | None:
    """Return the name of the first method that has fields for one of PEFT's types, or None."""
    return next(
        (name for name, model in METHODS.items() if model.declared is not None and model.declared.peft_type == kind),
        None,
    )


def _has_effect(key: str, value: object) -> bool:
    """Return True if PEFT would behave differently without the key."""
    if value is False:
        return key in _ON_BY_DEFAULT
    return value not in _EMPTY and value != _DEFAULTS.get(key)


def _read_base(config: dict[str, Any], adapter: Adapter) -> None:
    name, revision = config["base_model_name_or_path"], config.get("revision")
    folder = name.startswith("/")
    if name in _OLD_NAMES:
        adapter.changed["base_model_name_or_path"] = f"the model {name} is now {_OLD_NAMES[name]}"
        name = _OLD_NAMES[name]
    elif "/" not in name:
        raise UnsupportedAdapterError(
            f"base_model_name_or_path is {name}, without an organisation: write organisation/{name} as on the Hugging"
            " Face Hub, or the absolute path of a folder"
        )
    adapter.base = {"uri": f"file://{name}" if folder else f"hf://{name}"}
    if revision and folder:
        adapter.omitted["revision"] = "a folder has no revisions; set baseModel.uri to an hf:// model to use one"
    elif revision:
        adapter.base["revision"] = str(revision)


def _read_initialization(given: dict[str, Any], fields: dict[str, Any], adapter: Adapter) -> Initialization | None:
    """Move init_lora_weights from the keys to a method's fields if it names an initialization."""
    found, what = read_initialization(given.get("init_lora_weights"))
    if found is None:
        return None
    del given["init_lora_weights"]
    fields["initialization"] = found.value
    if what:
        adapter.changed["init_lora_weights"] = what
    if found is Initialization.LOFTQ:
        config = given.pop("loftq_config", None)
        bits = config.get("loftq_bits", _LOFTQ_BITS) if isinstance(config, dict) else _LOFTQ_BITS
        if bits != _LOFTQ_BITS:
            adapter.omitted["loftq_config"] = f"method.qlora holds the base in {_LOFTQ_BITS} bits, not in {bits}"
    return found


def _hint(key: str, value: object, kind: str) -> str:
    if value is not False or not key.startswith("init_"):
        return ""
    hint = "a new adapter starts without an effect on the base, not with random weights"
    return f"{hint}; method.peft with type LORA accepts {key}: false" if kind == "LORA" else hint
