"""Adapters as other trainers write them, for a tiny base model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tunesmith.contracts.result import TrainerResult
from tunesmith.contracts.servability import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tunesmith_trainer.main import run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROMPTS = torch.tensor([[5, 9, 40, 7, 3, 22], [100, 12, 8, 61, 2, 30]])


def loaded(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=PROMPTS).logits


def randomize(model: PeftModel, scale: float = 0.2) -> None:
    """Give every trained parameter values as training would: small and different from the start."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            assert "lora_" in name
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def peft_adapter(base: Path, folder: Path, *, scale: float = 0.2, **config: Any) -> torch.Tensor:
    """Save an adapter with PEFT; return its logits."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(loaded(base), LoraConfig(**given))
    randomize(model, scale)
    model.save_pretrained(str(folder))
    return logits(model.eval())


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rename_tensors(folder: Path, rename: Callable[[str], str]) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / ADAPTER_WEIGHTS)


@dataclass
class Imported:
    code: int
    result: TrainerResult
    folder: Path

    def logits(self, base: Path) -> torch.Tensor:
        """Return the logits of the published artifact, loaded by plain PEFT."""
        return logits(PeftModel.from_pretrained(loaded(base), str(self.folder)).eval())

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / ADAPTER_CONFIG).read_text())


def import_adapter(adapter: Path, base: Path, work: Path, *arguments: str) -> Imported:
    """Run the command `import` in this process."""
    message = work / "termination-message"
    output = work / "out"
    argv = ["import", "--adapter", f"file://{adapter}", "--base", f"file://{base}", "--output", str(output)]
    code = run([*argv, "--allow-file", "--termination-message", str(message), *arguments])
    return Imported(code, TrainerResult.model_validate_json(message.read_text()), output / "artifact")
