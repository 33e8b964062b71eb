"""What an adapter_config.json of PEFT says, as the method and base of a FineTuneJob. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from tunesmith.api.method import Initialization

_EMPTY: tuple[Any, ...] = (None, [], {}, "none")
_ON_BY_DEFAULT = frozenset(
    {
        *("init_lora_weights", "init_ia3_weights", "init_weights", "save_projection", "use_cayley_neumann"),
        *("psoft_orth", "psoft_mag_a", "psoft_mag_b", "select_top", "save_precomputed_indices", "share_embeddings"),
        "use_idwt",
    }
)
"""Keys that matter where they are false, since PEFT's default is true."""
_NEUTRAL = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "task_type"),
        "revision",  # of the base
        # what PEFT fills in from the base model
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
_SHARED = {"lora_alpha": "alpha", "lora_dropout": "dropout", "modules_to_save": "modulesToSave"}
_TYPED: dict[str, tuple[str, dict[str, str]]] = {
    "LORA": (
        "lora",
        _SHARED
        | {"r": "rank", "use_rslora": "rsLora", "use_dora": "dora"}
        | {"rank_pattern": "rankPattern", "alpha_pattern": "alphaPattern"},
    ),
    "ADALORA": (
        "adaLora",
        _SHARED
        | {"init_r": "initialRank", "target_r": "targetRank", "deltaT": "interval", "orth_reg_weight": "orthogonality"},
    ),
    "IA3": ("ia3", {"feedforward_modules": "feedforwardModules", "modules_to_save": "modulesToSave"}),
    "PREFIX_TUNING": (
        "prefixTuning",
        {
            "num_virtual_tokens": "virtualTokens",
            "prefix_projection": "projection",
            "encoder_hidden_size": "encoderHiddenSize",
        },
    ),
    "PROMPT_TUNING": (
        "promptTuning",
        {"num_virtual_tokens": "virtualTokens", "prompt_tuning_init_text": "initialText"},
    ),
    "P_TUNING": (
        "pTuning",
        {
            "num_virtual_tokens": "virtualTokens",
            "encoder_hidden_size": "encoderHiddenSize",
            "encoder_num_layers": "encoderLayers",
            "encoder_dropout": "encoderDropout",
        },
    ),
}
"""By peft_type, the method's name and the fields that its keys become."""
_WITH_MODULES = frozenset({"LORA", "ADALORA", "IA3"})
_INITIALIZATIONS = {
    "gaussian": Initialization.GAUSSIAN,
    "orthogonal": Initialization.ORTHOGONAL,
    "eva": Initialization.EVA,
    "pissa": Initialization.PISSA,
    "olora": Initialization.OLORA,
    "corda": Initialization.CORDA,
    "lora_ga": Initialization.LORA_GA,
    "mica": Initialization.MICA,
    "loftq": Initialization.LOFTQ,
}
_FAST_PISSA = re.compile(r"pissa_niter_\d+")
_LOFTQ_BITS = 4
_RESULTS = {"ADALORA": frozenset({"rank_pattern", "r"})}
"""Keys that training wrote."""


@dataclass
class Adapter:
    """An adapter's counterpart.

    Args:
        base: of a FineTuneJob, its baseModel.
        method: of a FineTuneJob.
        lost: keys without a counterpart, with a hint or "".
        changed: keys whose counterpart does something else, with what.
    """

    base: dict[str, Any]
    method: dict[str, Any]
    lost: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)


def initialization_of(asked: object) -> tuple[Initialization | None, str]:
    """How a LoRA adapter begins, by PEFT's name of it, and what is otherwise here, or "".

    None where it has no counterpart; LoftQ goes with qlora.
    """
    name = str(asked).lower()
    if _FAST_PISSA.fullmatch(name):
        return Initialization.FAST_PISSA, "initialization FastPiSSA has Tunesmith's own number of iterations"
    found = _INITIALIZATIONS.get(name)
    loftq = "method.qlora holds the base in 4 bits, and LoftQ makes up for what they lose in one iteration"
    return found, loftq if found is Initialization.LOFTQ else ""


def adapter_of(config: dict[str, Any]) -> Adapter:
    """The base and the method that train such an adapter, and what becomes of the other keys.

    Methods that have no fields of their own here become `peft`, with all of their keys.

    Args:
        config: the file's content; `peft_type` and `base_model_name_or_path` are in it.
    """
    kind = str(config["peft_type"])
    given = {key: value for key, value in config.items() if key not in _NEUTRAL and _says_something(key, value)}
    adapter = Adapter({}, {})
    _read_base(config, adapter)
    if kind not in _TYPED:
        adapter.method = {"peft": {"type": kind, "config": given}}
        return adapter
    name, renamed = _TYPED[kind]
    fields = {ours: given.pop(theirs) for theirs, ours in renamed.items() if theirs in given}
    targets = given.get("target_modules")
    if kind in _WITH_MODULES and (isinstance(targets, list) or targets == "all-linear"):
        fields["targetModules"] = sorted(targets) if isinstance(targets, list) else [targets]
        del given["target_modules"]
    encoder = given.pop("encoder_reparameterization_type", None)
    if encoder is not None:
        fields["encoder"] = str(encoder).capitalize()
    if kind == "PROMPT_TUNING" and "initialText" in fields:
        given.pop("prompt_tuning_init", None)
    if kind == "LORA" and _read_initialization(given, fields, adapter) is Initialization.LOFTQ:
        name = "qlora"
    adapter.method = {name: fields}
    results = _RESULTS.get(kind, frozenset())
    adapter.lost |= {key: _hint(key, value, kind) for key, value in given.items() if key not in results}
    return adapter


def _says_something(key: str, value: object) -> bool:
    """Whether a key asks for something that PEFT would not do without it."""
    if value is False:
        return key in _ON_BY_DEFAULT
    return value not in _EMPTY and value != _DEFAULTS.get(key)


def _read_base(config: dict[str, Any], adapter: Adapter) -> None:
    name, revision = config["base_model_name_or_path"], config.get("revision")
    folder = name.startswith("/")
    adapter.base = {"uri": f"file://{name}" if folder else f"hf://{name}"}
    if revision and folder:
        adapter.lost["revision"] = "a folder has none; name an hf:// model in baseModel.uri to use it"
    elif revision:
        adapter.base["revision"] = str(revision)


def _read_initialization(given: dict[str, Any], fields: dict[str, Any], adapter: Adapter) -> Initialization | None:
    """Takes what init_lora_weights says out of the keys."""
    found, what = initialization_of(given.get("init_lora_weights"))
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
            adapter.lost["loftq_config"] = f"method.qlora holds the base in {_LOFTQ_BITS} bits, not in {bits}"
    return found


def _hint(key: str, value: object, kind: str) -> str:
    if value is not False or not key.startswith("init_"):
        return ""
    begin = "a new adapter changes nothing here, it does not begin at random"
    return f"{begin}; method.peft with type LORA takes {key}: false" if kind == "LORA" else begin
