"""Linear modules that vLLM cannot adapt. Written by `make verify-architectures`, from engines: do not edit."""

ASKED = "0.32"
"""Release of vLLM that was asked."""
UNADAPTED: dict[str, frozenset[str]] = {
    "DeepseekV4ForCausalLM": frozenset(
        {
            "model.layers.mlp.shared_experts.down_proj",
            "model.layers.mlp.shared_experts.gate_proj",
            "model.layers.mlp.shared_experts.up_proj",
            "model.layers.self_attn.compressor.gate_proj",
            "model.layers.self_attn.compressor.kv_proj",
            "model.layers.self_attn.kv_proj",
            "model.layers.self_attn.o_b_proj",
            "model.layers.self_attn.q_a_proj",
            "model.layers.self_attn.q_b_proj",
        }
    ),
    "GPTBigCodeForCausalLM": frozenset(
        {
            "transformer.h.attn.c_attn",
        }
    ),
    "Glm4ForCausalLM": frozenset(
        {
            "model.layers.mlp.gate_up_proj",
        }
    ),
    "GraniteMoeSharedForCausalLM": frozenset(
        {
            "model.layers.shared_mlp.input_linear",
        }
    ),
    "HYV3ForCausalLM": frozenset(
        {
            "model.layers.mlp.shared_experts.down_proj",
            "model.layers.mlp.shared_experts.gate_proj",
            "model.layers.mlp.shared_experts.up_proj",
        }
    ),
    "HYV4ForCausalLM": frozenset(
        {
            "model.layers.mlp.gate_proj",
            "model.layers.mlp.shared_experts.gate_proj",
            "model.layers.self_attn.gate_proj",
        }
    ),
    "Llama4ForCausalLM": frozenset(
        {
            "model.layers.self_attn.k_proj",
            "model.layers.self_attn.q_proj",
        }
    ),
    "Qwen2MoeForCausalLM": frozenset(
        {
            "model.layers.mlp.shared_expert_gate",
        }
    ),
    "Qwen3NextForCausalLM": frozenset(
        {
            "model.layers.linear_attn.in_proj_ba",
            "model.layers.mlp.shared_expert_gate",
        }
    ),
    "Qwen3_5MoeForCausalLM": frozenset(
        {
            "model.layers.mlp.shared_expert_gate",
        }
    ),
}
"""Full names, without the numbers of layers, of modules of which vLLM does not compute adapters as PEFT does.

It refuses some, ignores others, and computes other answers with those of weights that it reorders when it loads the
base; agents refuse those of modules that they do not find among the published weights. By architecture; besides
`kv_b_proj` of those in `vllm_architectures.LATENT_ATTENTION`.
"""
