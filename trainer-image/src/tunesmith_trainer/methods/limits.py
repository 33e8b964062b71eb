"""Keys of PEFT's configurations that `method.peft` does not accept (peft 0.21.2, bitsandbytes 0.50.2).

Limits of whole methods are in their traits (`tunesmith.api.methods`). `make verify-methods` measures both.
"""

from __future__ import annotations

LORA_NOT_IN_4_BITS = {
    "kasa_config": "it is silently left out",
    "use_bdlora": "it is silently left out",
    "monteclora_config": "it is silently left out",
    "velora_config": "it knows full weights only",
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

OURS = {
    "peft_type": "method.peft.type says it",
    "task_type": "it is CAUSAL_LM",
    "inference_mode": "training decides it",
    "revision": "baseModel.revision says it",
    "peft_version": "the trainer's image decides it",
}
"""Keys that the trainer sets, with the source of their value."""

LORA_REFUSED = {
    "kasa_config": "KaSA cuts the base's weights for good, so that base and adapter cannot be compared",
    "layer_replication": "it changes the base itself, so that base and adapter cannot be compared",
    "use_qalora": "it has no effect on a base that is not quantised with GPTQ: use method.qlora",
    "alora_invocation_tokens": "activated LoRA learns only behind its invocation tokens, and no engine here knows them",
    "arrow_config": "it routes between adapters that were trained before",
    "use_dora": "it has a field of its own here: use method.lora.dora",
    "eva_config": "use method.lora.initialization: EVA",
    "corda_config": "use method.lora.initialization: CorDA",
    "lora_ga_config": "use method.lora.initialization: LoRAGA",
    "loftq_config": "use method.qlora.initialization: LoftQ",
}
"""Reasons why `method.peft` does not accept these keys of LoraConfig."""
