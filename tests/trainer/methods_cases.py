"""A small configuration of every method, for a Llama with hidden size 128 (q 128→128, v 128→64)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

LOFTQ = "LoftQ"
_QV = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Case:
    """A method on a base in its own precision and, if possible, in 4 bits."""

    name: str
    method: dict[str, Any]
    quantized: dict[str, Any] | None

    @property
    def manifest(self) -> str:
        """Return the method as written in a manifest, on one line."""
        return json.dumps(self.method).replace('"', "")


def _lora(name: str, **fields: Any) -> Case:
    fields = {"rank": 8, "alpha": 16, **fields}
    return Case(name, {"lora": fields}, {"qlora": fields})


def _typed(name: str, method: str, **fields: Any) -> Case:
    return Case(name, {method: fields}, {method: {**fields, "quantization": {}}})


def _peft(name: str, kind: str, targets: list[str] | None = None, **config: Any) -> Case:
    if targets:
        config["target_modules"] = targets
    fields = {"type": kind, "config": config}
    return Case(name, {"peft": fields}, {"peft": {**fields, "quantization": {}}})


CASES = [
    _lora("LoRA"),
    _lora("LoRA, rsLoRA", rsLora=True),
    _lora("LoRA, DoRA", dora=True),
    _lora("LoRA, LoRA+", loraPlusRatio=16),
    _lora("LoRA, patterns", targetModules=_QV, rankPattern={"v_proj": 4}, alphaPattern={"q_proj": 32}),
    _lora("LoRA, modulesToSave", targetModules=_QV, modulesToSave=["lm_head"]),
    *(
        _lora(f"LoRA, {name}", initialization=name)
        for name in (
            *("Gaussian", "Orthogonal", "EVA", "PiSSA", "FastPiSSA", "OLoRA", "CorDA", "LoRAGA", "MiCA", LOFTQ),
        )
    ),
    _peft("LoRA, some layers", "LORA", _QV, layers_to_transform=[1]),
    _peft("LoRA, bias", "LORA", _QV, lora_bias=True),
    _peft("LoRA, tokens", "LORA", _QV, trainable_token_indices=[14, 16]),
    _peft("LoRA, VeLoRA", "LORA", _QV, velora_config={"num_groups": 16}),
    _peft("LoRA, MonteCLoRA", "LORA", _QV, monteclora_config={}),
    _peft(
        "LoRA, BD-LoRA",
        "LORA",
        _QV,
        use_bdlora={"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2},
    ),
    _peft("LoRA, KaSA", "LORA", _QV, kasa_config={}),
    _peft("LoRA, QALoRA", "LORA", _QV, use_qalora=True),
    _peft("LoRA, aLoRA", "LORA", _QV, alora_invocation_tokens=[9, 33]),
    _peft("LoRA, layer replication", "LORA", _QV, layer_replication=[[0, 2], [0, 2]]),
    _peft("LoRA, Arrow", "LORA", _QV, arrow_config={"top_k": 2}),
    Case("Full fine-tuning", {"full": {}}, None),
    _typed("AdaLoRA", "adaLora", initialRank=8, targetRank=4),
    _typed("IA3", "ia3"),
    _typed("Prefix tuning", "prefixTuning", virtualTokens=8),
    _typed("Prefix tuning, projection", "prefixTuning", virtualTokens=8, projection=True),
    _typed("Prompt tuning", "promptTuning", virtualTokens=8),
    _typed("Prompt tuning, text", "promptTuning", virtualTokens=8, initialText="the colour of doors"),
    _typed("P-tuning", "pTuning", virtualTokens=8),
    _typed("P-tuning, LSTM", "pTuning", virtualTokens=8, encoder="Lstm", encoderHiddenSize=64),
    _peft("AdaMSS", "ADAMSS", _QV, r=8, num_subspaces=2),
    _peft("Adaption prompt", "ADAPTION_PROMPT", adapter_len=4, adapter_layers=2),
    _peft("BEFT", "BEFT", ["v_proj"]),
    _peft("BOFT", "BOFT", _QV, boft_block_size=4),
    _peft("C3A", "C3A", _QV, block_size=32),
    _peft("Cartridge", "CARTRIDGE", num_virtual_tokens=8),
    _peft("CPT", "CPT", cpt_token_ids=[5, 6], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]),
    _peft("DEFT", "DEFT", _QV, r=4),
    _peft("DeLoRA", "DELORA", _QV, r=4),
    _peft("FourierFT", "FOURIERFT", _QV, n_frequency=100),
    _peft("FRoD", "FROD", _QV),
    _peft("GLoRA", "GLORA", _QV, r=4),
    _peft("GraLoRA", "GRALORA", _QV, r=8),
    _peft("HiRA", "HIRA", _QV, r=4),
    _peft("HRA", "HRA", _QV, r=4),
    _peft("Lily", "LILY", _QV, r=4),
    _peft("LN tuning", "LN_TUNING"),
    _peft("LoHa", "LOHA", _QV, r=4),
    _peft("LoKr", "LOKR", _QV, r=4),
    _peft("MiSS", "MISS", _QV, r=4),
    _peft("MiSS, bat", "MISS", _QV, r=4, init_weights="bat"),
    _peft("Multitask prompt tuning", "MULTITASK_PROMPT_TUNING", num_virtual_tokens=8),
    _peft("OFT", "OFT", _QV, oft_block_size=16),
    _peft("OSF", "OSF", _QV, effective_rank=8),
    _peft("Peanut", "PEANUT", _QV, r=4),
    _peft("Poly", "POLY", _QV, r=4),
    _peft("PSOFT", "PSOFT", _QV, r=8),
    _peft("PVeRA", "PVERA", _QV, r=16),
    _peft("RandLoRA", "RANDLORA", _QV, r=8),
    _peft("RoAd", "ROAD", _QV, group_size=32),
    _peft("Shadow", "SHADOW", r=4),
    _peft("SHiRA", "SHIRA", _QV, r=4, random_seed=1),
    _peft("Supertuning", "SUPERTUNING", _QV),
    _peft("TinyLoRA", "TINYLORA", _QV),
    _peft("Trainable tokens", "TRAINABLE_TOKENS", token_indices=[14, 16, 33]),
    _peft("Uni-LoRA", "UNILORA", _QV),
    _peft("VB-LoRA", "VBLORA", _QV, vector_length=32, num_vectors=32),
    _peft("VeRA", "VERA", _QV, r=16),
    _peft("WaveFT", "WAVEFT", _QV, n_frequency=100),
    _peft("X-LoRA", "XLORA"),
]
_TYPED = {"ADALORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
PEFT_TYPES = _TYPED | {case.method["peft"]["type"] for case in CASES if "peft" in case.method}
