"""Tiny random models of the architectures that people fine-tune, with the tokenizer of the tests' base model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ImageProcessor, PretrainedConfig

from tests.trainer.tiny_model import make as make_llama

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 400
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": VOCABULARY}
_DENSE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    # vLLM's kernels for CPUs need heads of at least 32.
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
_ONE_HEAD_EACH = {name: value for name, value in _DENSE.items() if name not in {"num_key_value_heads", "head_dim"}}
"""Settings of architectures without heads that share keys and values; vLLM would read their number all the same."""
_MIXTRAL = _DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GROUPED = _DENSE | {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT = _GROUPED | {
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    # The only sizes of latent attention for which vLLM has a kernel for CPUs.
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "head_dim": 64,
}
_INDEXED = {"index_topk": 16, "index_head_dim": 128, "index_n_heads": 2}
_LATENT_DENSE = {
    name: value for name, value in _LATENT.items() if name not in set(_GROUPED) - set(_DENSE) and name != "head_dim"
}
_LINEAR_ATTENTION = _DENSE | {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    # As published: vLLM's kernels for CPUs have few sizes.
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "full_attention"],
}
_BFLOAT16 = {"dtype": "bfloat16"}
"""Arguments of engines for linear attention, which vLLM's kernels for CPUs compute in bfloat16."""
_SHARED = _ROUTED | {"shared_expert_intermediate_size": 32}
_QWEN4 = (
    _LINEAR_ATTENTION
    | _SHARED
    | {
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    }
)
_LLAMA_4 = _MIXTRAL | {
    "intermediate_size_mlp": 128,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 128,
}
_GPT = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 512,
    # Without dropout, so that runs can be compared.
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "depth": 1,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}


@dataclass(frozen=True)
class Family:
    """A family of base models.

    Args:
        name: name of the family, as people know it.
        model_type: transformers' name of the architecture.
        settings: keywords of its configuration class.
        explicit: names for targetModules.
        experts: names for targetParameters; empty without experts.
        engine: further arguments of vLLM's `LLM`.
        whole: class of the published models, where transformers makes a causal model of their language model alone.
        unmeasured: reason why vLLM's answers on a CPU cannot be compared; empty: they can.
    """

    name: str
    model_type: str
    settings: dict[str, Any] = field(default_factory=lambda: dict(_DENSE))
    explicit: tuple[str, ...] = ("q_proj", "v_proj")
    experts: tuple[str, ...] = ()
    engine: dict[str, Any] = field(default_factory=dict)
    whole: str = ""
    unmeasured: str = ""

    @property
    def config(self) -> PretrainedConfig:
        """Configuration of a tiny model."""
        composite = "text_config" in self.settings
        settings = self.settings if composite else _IDS | self.settings
        architectures = {"architectures": [self.whole]} if self.whole else {}
        return AutoConfig.for_model(self.model_type, **settings, **architectures)


_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
FAMILIES = [
    Family("Llama 3", "llama"),
    Family("Mistral", "mistral"),
    Family("Ministral 3", "ministral3"),
    Family("Qwen2.5", "qwen2"),
    Family("Qwen3", "qwen3"),
    Family("Qwen3.5", "qwen3_5_text", _LINEAR_ATTENTION, engine=_BFLOAT16),
    Family("Gemma", "gemma"),
    Family("Gemma 2", "gemma2"),
    Family("Gemma 3", "gemma3_text"),
    Family(
        "Gemma 3, vision",
        "gemma3",
        {
            "text_config": {**_DENSE, **_IDS, "model_type": "gemma3_text"},
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 5,
            "boi_token_index": 6,
            "eoi_token_index": 7,
        },
        engine={"limit_mm_per_prompt": {"image": 0}},
    ),
    Family(
        "Gemma 3n",
        "gemma3n_text",
        _DENSE
        | {
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
        },
    ),
    Family(
        "Gemma 4",
        "gemma4_text",
        _DENSE
        | {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    ),
    Family("Phi-2", "phi"),
    Family("Phi-3, Phi-4", "phi3", explicit=("qkv_proj", "o_proj")),
    Family("Phi-3.5-MoE", "phimoe", _MIXTRAL, experts=_EXPERTS),
    Family("SmolLM3", "smollm3"),
    Family("OLMo", "olmo"),
    Family("OLMo 2", "olmo2"),
    Family("OLMo 3", "olmo3"),
    Family("OLMoE", "olmoe", _DENSE | {"num_experts": 4, "num_experts_per_tok": 2}, experts=_EXPERTS),
    Family("Granite", "granite"),
    Family("Granite MoE", "granitemoe", _MIXTRAL, experts=_EXPERTS),
    Family(
        "Granite MoE hybrid",
        "granitemoehybrid",
        _MIXTRAL
        | {
            "shared_intermediate_size": 32,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_state": 16,
            "mamba_d_head": 16,
        },
        experts=_EXPERTS,
    ),
    Family("GLM-4-9B", "glm"),
    Family("GLM-4-0414", "glm4"),
    Family("GLM-4-MoE", "glm4_moe", _GROUPED, experts=_EXPERTS),
    Family("Cohere", "cohere"),
    Family("Cohere 2", "cohere2"),
    Family("StableLM", "stablelm"),
    Family("StarCoder2", "starcoder2"),
    Family("GPT-2", "gpt2", _GPT, ("c_attn",)),
    Family("GPT-J", "gptj", _GPT | {"rotary_dim": 8}),
    Family(
        "GPT-Neo",
        "gpt_neo",
        {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 512,
        },
    ),
    Family("GPT-NeoX", "gpt_neox", _ONE_HEAD_EACH, ("query_key_value",)),
    Family("GPT-BigCode", "gpt_bigcode", _GPT, ("c_fc", "c_proj")),
    Family("CodeGen", "codegen", _GPT | {"n_head": 4, "rotary_dim": 8, "n_ctx": 512}, ("qkv_proj",)),
    Family(
        "Falcon",
        "falcon",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True, "alibi": False},
        ("query_key_value",),
    ),
    Family(
        "Falcon-H1",
        "falcon_h1",
        _DENSE | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1},
    ),
    Family("BLOOM", "bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}, ("query_key_value",)),
    Family("OPT", "opt", _DENSE | {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    Family("MPT", "mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}, ("Wqkv",)),
    Family("Mixtral", "mixtral", _MIXTRAL, experts=_EXPERTS),
    Family("Qwen2-MoE", "qwen2_moe", _DENSE | _SHARED, experts=_EXPERTS),
    Family("Qwen3-MoE", "qwen3_moe", _DENSE | _ROUTED, experts=_EXPERTS),
    Family("Qwen3-Next", "qwen3_next", _LINEAR_ATTENTION | _SHARED, experts=_EXPERTS, engine=_BFLOAT16),
    Family("Qwen3.5-MoE", "qwen3_5_moe_text", _LINEAR_ATTENTION | _SHARED, experts=_EXPERTS, engine=_BFLOAT16),
    Family("DeepSeek-V2", "deepseek_v2", _LATENT, ("q_a_proj", "o_proj"), _EXPERTS),
    Family("DeepSeek-V3", "deepseek_v3", _LATENT | {"topk_method": "noaux_tc"}, ("q_a_proj", "o_proj"), _EXPERTS),
    Family("gpt-oss", "gpt_oss", _MIXTRAL | {"layer_types": ["sliding_attention", "full_attention"]}, experts=_EXPERTS),
    Family(
        "Llama 4, text",
        "llama4_text",
        _LLAMA_4,
        explicit=("v_proj", "o_proj"),
        experts=_EXPERTS,
    ),
    Family("ERNIE 4.5", "ernie4_5"),
    Family(
        "ERNIE 4.5 MoE",
        "ernie4_5_moe",
        _DENSE | {"moe_intermediate_size": 32, "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1},
        experts=_EXPERTS,
    ),
    Family("EXAONE 4", "exaone4"),
    Family("EXAONE MoE", "exaone_moe", _DENSE | _ROUTED | {"sliding_window": 128}, experts=_EXPERTS),
    Family("Seed-OSS", "seed_oss"),
    Family("Apertus", "apertus"),
    Family("Arcee", "arcee"),
    Family("Code World Model", "cwm", _DENSE | {"sliding_window": 128}),
    Family("HyperCLOVA X", "hyperclovax"),
    Family("InternLM 3", "internlm3"),
    Family("IQuest-Coder", "iquestcoder"),
    Family("Jais 2", "jais2", _DENSE | {"head_dim": 32}),
    Family("VaultGemma", "vaultgemma"),
    Family("HRM-Text", "hrm_text", explicit=("o_proj", "down_proj")),
    Family("MiniCPM 3", "minicpm3", _LATENT_DENSE, ("q_a_proj", "o_proj")),
    Family("Granite, sliding window", "granite_swa"),
    Family("Granite MoE, sliding window", "granitemoe_swa", _MIXTRAL, experts=_EXPERTS),
    Family("Granite MoE shared", "granitemoeshared", _MIXTRAL | {"shared_intermediate_size": 32}, experts=_EXPERTS),
    Family(
        "Trinity",
        "afmoe",
        _DENSE | _ROUTED | {"num_shared_experts": 1},
        experts=_EXPERTS,
        unmeasured="vLLM reads settings of published models that the configuration class does not have",
    ),
    Family(
        "A.X K1",
        "axk1",
        _LATENT,
        ("q_a_proj", "o_proj"),
        _EXPERTS,
        unmeasured="vLLM does not load the tiny model, whose first layer lacks a norm",
    ),
    Family("Cohere 2 MoE", "cohere2_moe", _DENSE | _ROUTED, experts=_EXPERTS),
    Family(
        "DBRX",
        "dbrx",
        {
            "d_model": 64,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 512,
            "attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        },
        ("Wqkv",),
        ("mlp.w1", "mlp.v1", "mlp.w2"),
    ),
    Family(
        "DeepSeek-V3.2",
        "deepseek_v32",
        _LATENT | _INDEXED,
        ("q_a_proj", "o_proj"),
        _EXPERTS,
        unmeasured="vLLM has sparse attention for GPUs only",
    ),
    Family(
        "DeepSeek-V4",
        "deepseek_v4",
        {
            "hidden_size": 64,
            "moe_intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 64,
            "q_lora_rank": 16,
            "o_lora_rank": 16,
            "o_groups": 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 512,
            "index_n_heads": 2,
            "index_head_dim": 64,
            "index_topk": 16,
            "hc_mult": 2,
            "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
            # Short enough for the tests' rows.
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        },
        ("q_a_proj",),
        _EXPERTS,
        unmeasured="the transformers of vLLM does not read this configuration",
    ),
    Family("dots3", "dots3_note_text", _LATENT | _INDEXED, ("q_a_proj", "o_proj"), _EXPERTS),
    Family("FlexOlmo", "flex_olmo", _DENSE | {"num_experts": 4, "num_experts_per_tok": 2}, experts=_EXPERTS),
    Family("GLM-4.7-Flash", "glm4_moe_lite", _LATENT, ("q_a_proj", "o_proj"), _EXPERTS),
    Family(
        "GLM-5",
        "glm_moe_dsa",
        _LATENT | _INDEXED,
        ("q_a_proj", "o_proj"),
        _EXPERTS,
        unmeasured="vLLM has sparse attention for GPUs only",
    ),
    Family("Hunyuan MoE", "hunyuan_v1_moe", _DENSE | {"num_experts": 4, "moe_topk": 2}, experts=_EXPERTS),
    Family(
        "Hy 3",
        "hy_v3",
        _DENSE | _ROUTED | {"num_shared_experts": 1},
        experts=_EXPERTS,
        unmeasured="vLLM reads settings of published models that the configuration class does not have",
    ),
    Family(
        "Hy 4",
        "hy_v4",
        _LATENT | _INDEXED,
        ("q_a_proj", "o_proj"),
        _EXPERTS,
        unmeasured="vLLM has sparse attention for GPUs only",
    ),
    Family(
        "Inkling, text",
        "inkling_text",
        _DENSE
        | {
            "swa_num_attention_heads": 2,
            "swa_num_key_value_heads": 1,
            "swa_head_dim": 32,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
        experts=_EXPERTS,
        unmeasured="vLLM has the kernels of this architecture for GPUs only",
    ),
    Family(
        "Jamba",
        "jamba",
        _DENSE
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 16,
        },
        experts=_EXPERTS,
        unmeasured="vLLM has the kernels of its state-space layers for GPUs only",
    ),
    Family(
        "Kimi Linear",
        "kimi_linear",
        _LATENT
        | {
            "q_lora_rank": None,
            "num_local_experts": 4,
            "linear_head_dim": 32,
            "linear_num_heads": 2,
            "layer_types": ["linear_attention", "full_attention"],
        },
        ("o_proj",),
        _EXPERTS,
    ),
    Family(
        "Laguna",
        "laguna",
        _DENSE | _SHARED | {"sliding_window": 128, "layer_types": ["full_attention", "sliding_attention"]},
        experts=_EXPERTS,
        unmeasured="vLLM's router of experts for CPUs has no sigmoid",
    ),
    Family(
        "LFM2-MoE",
        "lfm2_moe",
        _DENSE | _ROUTED | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        experts=_EXPERTS,
        unmeasured="on a CPU, vLLM's log-probabilities of the base alone differ from those of transformers, by 0.2",
    ),
    Family(
        "LongCat-Flash",
        "longcat_flash",
        {
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "expert_ffn_hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 64,
            "v_head_dim": 64,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "max_position_embeddings": 512,
        },
        ("q_a_proj", "o_proj"),
        _EXPERTS,
        unmeasured="vLLM reads settings of published models that the configuration class does not have",
    ),
    Family(
        "Mellum",
        "mellum",
        # Without layers for speculation, of which vLLM reads the number.
        _DENSE | _ROUTED | {"num_mtp_layers": 0},
        experts=_EXPERTS,
    ),
    Family(
        "MiMo-V2-Flash",
        "mimo_v2_flash",
        _DENSE
        | {
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "sliding_window": 128,
        },
        experts=_EXPERTS,
    ),
    Family(
        "OLMo hybrid",
        "olmo_hybrid",
        _DENSE
        | {
            "num_key_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 64,
            "layer_types": ["linear_attention", "full_attention"],
        },
        unmeasured="vLLM has the kernels of its linear attention for GPUs only",
    ),
    Family(
        "Qwen4",
        "qwen4_exp_text",
        _QWEN4,
        experts=_EXPERTS,
        engine=_BFLOAT16,
        unmeasured="vLLM reads settings of published models that the configuration class does not have",
    ),
    Family("Falcon Mamba", "falcon_mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 16}, ("in_proj",)),
    Family(
        "Zamba 2",
        "zamba2",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "mamba", "hybrid"],
            "num_attention_heads": 2,
            "mamba_d_state": 16,
            "n_mamba_heads": 4,
            "adapter_rank": 8,
            "max_position_embeddings": 512,
        },
        ("q_proj", "v_proj"),
    ),
    Family("Hunyuan", "hunyuan_v1_dense"),
    Family("Nemotron", "nemotron"),
    Family(
        "LFM2",
        "lfm2",
        _DENSE
        | {
            "layer_types": ["conv", "full_attention"],
            # As published: transformers ignores them, vLLM reads them.
            "conv_dim": 64,
            "block_dim": 64,
            "block_multiple_of": 32,
            "block_auto_adjust_ff_dim": False,
            "block_ffn_dim_multiplier": 1.0,
        },
        unmeasured="on a CPU, vLLM's log-probabilities of the base alone differ from those of transformers, by 0.09",
    ),
    Family(
        "MiniMax-M2",
        "minimax_m2",
        _MIXTRAL | {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
        experts=_EXPERTS,
        unmeasured="vLLM's router of experts for CPUs has no sigmoid",
    ),
    Family(
        "Nemotron-H",
        "nemotron_h",
        _DENSE
        | {
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
        },
    ),
    Family("Mamba", "mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 16}, ("in_proj",)),
    Family(
        "Mamba-2",
        "mamba2",
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 16,
            "n_groups": 1,
        },
        ("in_proj",),
    ),
    Family(
        "Qwen3.5, vision",
        "qwen3_5",
        {
            "text_config": {**_LINEAR_ATTENTION, **_IDS, "model_type": "qwen3_5_text"},
            "vision_config": _QWEN_VISION,
        },
        whole="Qwen3_5ForConditionalGeneration",
    ),
    Family(
        "Qwen3.5-MoE, vision",
        "qwen3_5_moe",
        {
            "text_config": {**_LINEAR_ATTENTION, **_SHARED, **_IDS, "model_type": "qwen3_5_moe_text"},
            "vision_config": _QWEN_VISION,
        },
        experts=_EXPERTS,
        whole="Qwen3_5MoeForConditionalGeneration",
    ),
    Family(
        "Gemma 4, vision",
        "gemma4",
        {
            "text_config": {
                **_DENSE,
                **_IDS,
                "model_type": "gemma4_text",
                "num_kv_shared_layers": 0,
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 8,
            },
            "vision_config": _VISION | {"model_type": "gemma4_vision", "head_dim": 16, "global_head_dim": 16},
            "audio_config": None,
        },
        engine={"limit_mm_per_prompt": {"image": 0, "audio": 0, "video": 0}},
    ),
    Family(
        "Gemma 4 unified",
        "gemma4_unified",
        {
            "text_config": {**_DENSE, **_IDS, "model_type": "gemma4_unified_text"},
            "vision_config": {
                "patch_size": 14,
                "pooling_kernel_size": 1,
                "mm_embed_dim": 32,
                "mm_posemb_size": 16,
                "output_proj_dims": 32,
            },
            "audio_config": None,
        },
        engine={"limit_mm_per_prompt": {"image": 0, "audio": 0, "video": 0}},
    ),
    Family(
        "Qwen4, vision",
        "qwen4_exp",
        {"text_config": {**_QWEN4, **_IDS, "model_type": "qwen4_exp_text"}, "vision_config": _QWEN_VISION},
        experts=_EXPERTS,
        whole="Qwen4ExpForConditionalGeneration",
    ),
    Family(
        "Llama 4, vision",
        "llama4",
        {
            "text_config": {**_LLAMA_4, **_IDS, "model_type": "llama4_text"},
            "vision_config": _VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        },
        explicit=("v_proj", "o_proj"),
        experts=_EXPERTS,
        whole="Llama4ForConditionalGeneration",
    ),
]

LEFT_OUT = {
    "gpt-sw3": "GPT-SW3 has the classes of GPT-2",
    "gemma3n": "the vision tower of Gemma 3n needs timm, which the image does not have, so it is refused; its language "
    "model alone is listed",
    "dots3_note": "dots3 with its towers for images and speech; its language model alone is listed",
    "moss_transcribe_diarize": "MOSS-Transcribe-Diarize transcribes speech",
}
"""Causal models that transformers and vLLM share without a row, and why, by `model_type`."""


def make(family: Family, folder: Path) -> Path:
    """Create a tiny random model of a family with the tokenizer of the tests; return its folder."""
    if (folder / "model.safetensors").exists():
        return folder
    tokenizer = make_llama(folder.with_name("tokenizer"))
    torch.manual_seed(0)
    build = getattr(transformers, family.whole) if family.whole else AutoModelForCausalLM.from_config
    model = build(family.config).to(torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith(".correct_output_scale"):
            # Zero in a model that was not trained, which takes the gradients of all that it scales.
            torch.nn.init.normal_(parameter)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / file, partial / file)
    if family.model_type == "gemma3":
        side = family.settings["vision_config"]["image_size"]
        Gemma3ImageProcessor(size={"height": side, "width": side}).save_pretrained(partial)
    model.save_pretrained(partial)
    return partial.rename(folder)
