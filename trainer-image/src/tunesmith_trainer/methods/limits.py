"""What was measured of PEFT's methods (peft 0.21.2, bitsandbytes 0.50.2): where they fail, or pass and do nothing.

`make verify-methods` measures it again and writes docs/methods.md.
"""

from __future__ import annotations

NOT_IN_4_BITS = {
    "ADAMSS": "it works on the weights themselves",
    "DEFT": "it works on the weights themselves",
    "DELORA": "it works on the weights themselves",
    "FROD": "it decomposes the weights",
    "GLORA": "it knows plain linear modules only",
    "HRA": "it works on the weights themselves",
    "LOHA": "it works on the weights themselves",
    "LOKR": "it works on the weights themselves",
    "OSF": "it decomposes the weights",
    "PEANUT": "it works on the weights themselves",
    "PSOFT": "it decomposes the weights",
    "SUPERTUNING": "it works on the weights themselves",
    "TINYLORA": "it decomposes the weights",
    "UNILORA": "no gradient reaches it there, so it would learn nothing",
}
"""Methods of PEFT that cannot be trained on a base in 4 bits, and why."""

LORA_NOT_IN_4_BITS = {
    "kasa_config": "it is silently left out",
    "use_bdlora": "it is silently left out",
    "monteclora_config": "it is silently left out",
    "velora_config": "it knows full weights only",
}
"""Variants of LoRA that cannot be trained on a base in 4 bits, by their key, and why."""

REFUSED = {
    "XLORA": "it is made of adapters that lie in folders of the machine",
    "POLY": "it learns several tasks at once, and the rows of a data set name none",
    "MULTITASK_PROMPT_TUNING": "it learns several tasks, and the rows of a data set name none: use promptTuning",
    "CPT": "it computes a loss of its own from whole logits, training here does not make them: use promptTuning",
    "ADALORA": "it has fields of its own here: use method.adaLora",
    "IA3": "it has fields of its own here: use method.ia3",
    "PREFIX_TUNING": "it has fields of its own here: use method.prefixTuning",
    "PROMPT_TUNING": "it has fields of its own here: use method.promptTuning",
    "P_TUNING": "it has fields of its own here: use method.pTuning",
}
"""Methods of PEFT that `method.peft` does not take, and why."""

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
"""Keys that are set here."""

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
"""Keys of LoraConfig that `method.peft` does not take, and why."""

LORA_BEGINNINGS = {
    "gaussian": "method.lora.initialization: Gaussian",
    "orthogonal": "method.lora.initialization: Orthogonal",
    "eva": "method.lora.initialization: EVA",
    "olora": "method.lora.initialization: OLoRA",
    "pissa": "method.lora.initialization: PiSSA",
    "corda": "method.lora.initialization: CorDA",
    "lora_ga": "method.lora.initialization: LoRAGA",
    "mica": "method.lora.initialization: MiCA",
    "loftq": "method.qlora.initialization: LoftQ",
}
"""What says here what a string in init_lora_weights says to PEFT."""

NOT_MERGED = {
    "ADAPTION_PROMPT": "it adds vectors to the prompt of some layers",
    "BEFT": "it adds biases that the base's modules do not have",
    "CARTRIDGE": "it adds keys and values",
    "LILY": "PEFT cannot do it",
    "PREFIX_TUNING": "it adds keys and values",
    "PROMPT_TUNING": "it adds vectors to the prompt",
    "P_TUNING": "it adds vectors to the prompt",
    "SHADOW": "it runs a second network beside the base",
}
"""Methods whose adapters cannot be merged into the base's weights, and why."""

CHANGES_AT_FIRST = frozenset(
    {"C3A", "CARTRIDGE", "FOURIERFT", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "UNILORA", "VBLORA"}
)
"""Methods whose untrained adapter already changes the model."""

UNCOUNTED = frozenset({"ADAMSS", "FROD", "SHIRA"})
"""Methods whose parameters PEFT can only count with the weights at hand."""
