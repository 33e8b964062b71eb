"""LoftQ (arXiv:2310.08659): the adapter begins as the best approximation of the base's quantisation error in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open

from tunesmith_trainer.errors import InvalidSpecError

if TYPE_CHECKING:
    from peft import PeftModel


def initialize_loftq(model: PeftModel, folder: str) -> None:
    """Set each adapter to the truncated singular value decomposition of the full weight minus the 4-bit one.

    Args:
        model: base in 4 bits with a new LoRA adapter.
        folder: folder of the base model, with its unquantised weights.

    Raises:
        InvalidSpecError: the names of the weights in the files differ from those of the model.
    """
    files: dict[str, Path] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            files |= dict.fromkeys(tensors.keys(), path)
    for full, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = f"{full.removeprefix('base_model.model.')}.weight"
        if name not in files:
            raise InvalidSpecError(
                f"method.qlora.initialization: LoftQ needs {name} of the base model, and its files have no weight of "
                "that name: use Default"
            )
        with safe_open(files[name], framework="pt") as tensors:
            weight_in_full = tensors.get_tensor(name).float()
        error = weight_in_full - dequantize_module_weight(module.get_base_layer()).float().cpu()
        rank = module.r["default"]
        left, values, right = torch.linalg.svd(error, full_matrices=False)
        root = (values[:rank] / module.scaling["default"]).sqrt()
        for weight, value in (
            (module.lora_A["default"].weight, root[:, None] * right[:rank]),
            (module.lora_B["default"].weight, left[:, :rank] * root),
        ):
            weight.data.copy_(value)
