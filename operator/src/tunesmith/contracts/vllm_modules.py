"""Linear modules that vLLM cannot adapt. Written by `make verify-architectures`, from engines: do not edit."""

ASKED = "0.32"
"""Release of vLLM that was asked."""
UNADAPTED: dict[str, frozenset[str]] = {
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
    "Qwen2MoeForCausalLM": frozenset(
        {
            "model.layers.mlp.shared_expert_gate",
        }
    ),
    "Qwen3NextForCausalLM": frozenset(
        {
            "model.layers.mlp.shared_expert_gate",
        }
    ),
    "Qwen3_5MoeForCausalLM": frozenset(
        {
            "model.layers.mlp.shared_expert_gate",
        }
    ),
}
"""Full names, without the numbers of layers, of modules whose adapters vLLM refuses or ignores, by architecture."""
