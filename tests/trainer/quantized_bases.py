"""Base models as people publish them quantised: with bitsandbytes, in FP8 and in MXFP4."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

if TYPE_CHECKING:
    from pathlib import Path

_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FP8_BLOCK = 32
_MXFP4_BLOCK = 32
_E8M0_BIAS = 127
_FP8_HIGHEST = 448.0


def bits_and_bytes(base: Path, target: Path, **settings: Any) -> Path:
    """Publish a base with bitsandbytes; settings of BitsAndBytesConfig."""
    _copy_tokenizer(base, target)
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.save_pretrained(target)
    return target


def in_4_bits(base: Path, target: Path, **settings: Any) -> Path:
    """Publish a base in nf4 with double quantisation, as those of Unsloth are."""
    given = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
    return bits_and_bytes(base, target, load_in_4bit=True, **(given | settings))


def in_8_bits(base: Path, target: Path) -> Path:
    """Publish a base in int8."""
    return bits_and_bytes(base, target, load_in_8bit=True)


def in_fp8(base: Path, target: Path) -> Path:
    """Publish a base with the linear modules of its layers in FP8, with a scale per block, as DeepSeek-V3 is."""
    _copy_tokenizer(base, target)
    tensors, skipped = {}, ["lm_head"]
    for name, tensor in load_file(base / "model.safetensors").items():
        router = name.endswith(".mlp.gate.weight")
        if ".layers." not in name or tensor.ndim != 2 or router:
            tensors[name] = tensor.to(torch.bfloat16)
            skipped += [name.removesuffix(".weight")] if router else []
            continue
        rows, columns = tensor.shape
        blocks = tensor.float().reshape(rows // _FP8_BLOCK, _FP8_BLOCK, columns // _FP8_BLOCK, _FP8_BLOCK)
        scales = blocks.abs().amax(dim=(1, 3)) / _FP8_HIGHEST
        values = (blocks / scales[:, None, :, None]).reshape(rows, columns)
        tensors[name] = values.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales.contiguous()
    settings = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [_FP8_BLOCK, _FP8_BLOCK],
        "modules_to_not_convert": skipped,
    }
    return _publish(base, target, tensors, settings)


def in_mxfp4(base: Path, target: Path) -> Path:
    """Publish a gpt-oss with its experts in MXFP4, as OpenAI does: two values per byte and a scale for 32 of them."""
    _copy_tokenizer(base, target)
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor.to(torch.bfloat16)
            continue
        experts, inputs, outputs = tensor.shape
        groups = tensor.float().transpose(1, 2).reshape(experts, outputs, inputs // _MXFP4_BLOCK, _MXFP4_BLOCK)
        exponents = groups.abs().amax(dim=-1).clamp_min(1e-30).log2().floor() - 2
        scaled = groups / exponents.exp2()[..., None]
        nearest = (scaled.abs()[..., None] - _FP4).abs().argmin(dim=-1)
        codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
        tensors[f"{name}_blocks"] = codes[..., 0::2] | (codes[..., 1::2] << 4)
        tensors[f"{name}_scales"] = (exponents + _E8M0_BIAS).to(torch.uint8)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return _publish(base, target, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": skipped})


def _copy_tokenizer(base: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, target / name)


def _publish(base: Path, target: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> Path:
    config = json.loads((base / "config.json").read_text())
    config |= {"quantization_config": settings, "dtype": "bfloat16"}
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
