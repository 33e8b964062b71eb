"""Keys of PEFT's configurations that `method.peft` does not accept (peft 0.21.2, bitsandbytes 0.50.2).

Limits of whole methods are in their traits (`tunesmith.api.methods`). `make verify-methods` measures both.
"""

from __future__ import annotations

LORA_NOT_IN_4_BITS = {
    "kasa_config": "PEFT silently ignores it",
    "use_bdlora": "PEFT silently ignores it",
    "monteclora_config": "PEFT silently ignores it",
    "velora_config": "it supports unquantised weights only",
}
"""Reasons why variants of LoRA cannot be trained on a base in 4 bits, by their key."""

PATHS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "megatron_config",
        "megatron_core",
        "prompt_tuning_init_state_dict_path",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
        "cache_file",
        "covariance_file",
        "adapters",
    }
)
"""Keys of PEFT's configurations that name files, code or models, at any depth."""

SET_BY_TRAINER = {
    "peft_type": "method.peft.type determines it",
    "task_type": "it is always CAUSAL_LM",
    "inference_mode": "training sets it",
    "revision": "baseModel.revision determines it",
    "peft_version": "the trainer's image determines it",
}
"""Keys that the trainer sets, with the source of their value."""

LORA_REFUSED = {
    "kasa_config": "KaSA truncates the base's weights permanently, so base and adapter cannot be compared",
    "layer_replication": "it changes the base itself, so base and adapter cannot be compared",
    "use_qalora": "it has no effect on a base that is not quantised with GPTQ: use method.qlora",
    "alora_invocation_tokens": "activated LoRA only takes effect after its invocation tokens, which the serving "
    "engine does not support",
    "arrow_config": "it routes between adapters that must already be trained",
    "use_dora": "it has its own field: use method.lora.dora",
    "eva_config": "use method.lora.initialization: EVA",
    "corda_config": "use method.lora.initialization: CorDA",
    "lora_ga_config": "use method.lora.initialization: LoRAGA",
    "loftq_config": "use method.qlora.initialization: LoftQ",
}
"""Reasons why `method.peft` does not accept these keys of LoraConfig."""
