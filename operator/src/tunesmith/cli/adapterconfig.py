"""What an adapter_config.json of PEFT says, as the method of a FineTuneJob. Pure."""

from __future__ import annotations

from typing import Any

from tunesmith.api.method import Initialization

_EMPTY: tuple[Any, ...] = (None, False, [], {}, "none")
_NEUTRAL = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "task_type"),
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
}
_RESULTS = {"ADALORA": frozenset({"rank_pattern", "r"})}
"""Keys that training wrote."""


def method_of(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The method that trains such an adapter, and the keys that have no counterpart in it.

    Methods that have no fields of their own here become `peft`, with all of their keys.

    Args:
        config: the file's content; `peft_type` is in it.
    """
    kind = str(config["peft_type"])
    given = {
        key: value
        for key, value in config.items()
        if key not in _NEUTRAL and value not in _EMPTY and value != _DEFAULTS.get(key)
    }
    if kind not in _TYPED:
        return {"peft": {"type": kind, "config": given}}, []
    name, renamed = _TYPED[kind]
    fields = {ours: given.pop(theirs) for theirs, ours in renamed.items() if theirs in given}
    targets = given.get("target_modules")
    if kind in _WITH_MODULES and (isinstance(targets, list) or targets == "all-linear"):
        fields["targetModules"] = sorted(targets) if isinstance(targets, list) else [targets]
        del given["target_modules"]
    initialization = given.get("init_lora_weights")
    if isinstance(initialization, str) and initialization in _INITIALIZATIONS:
        fields["initialization"] = _INITIALIZATIONS[initialization].value
        del given["init_lora_weights"]
    encoder = given.pop("encoder_reparameterization_type", None)
    if encoder is not None:
        fields["encoder"] = str(encoder).capitalize()
    if kind == "PROMPT_TUNING" and "initialText" in fields:
        given.pop("prompt_tuning_init", None)
    return {name: fields}, [key for key in given if key not in _RESULTS.get(kind, frozenset())]
