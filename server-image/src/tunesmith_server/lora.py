"""Whether a LoRA adapter fits the engine and the base model. vLLM loads many that do not, and then answers garbage."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunesmith_server.safetensors import Tensor, first_non_finite, read_tensors

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
}
# What PEFT's LoRA can do and vLLM can not, by the key of adapter_config.json that turns it on.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "biases of LoRA layers",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "layer_replication": "layer replication",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "parameters as targets",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "auto_map": "code of its own (auto_map)",
}
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class UnfitAdapterError(Exception):
    """The adapter is damaged, or does not fit the engine or the base model. Trying again cannot help."""


@dataclass(frozen=True)
class LoraConfig:
    """What the shapes depend on."""

    rank: int
    rank_pattern: dict[str, int] = field(default_factory=dict)
    fan_in_fan_out: bool = False

    def rank_of(self, module: str) -> int:
        """The rank of a module, as PEFT decides it: the first pattern that ends the module's name."""
        for pattern, rank in self.rank_pattern.items():
            if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
                return rank
        return self.rank


def check_config(document: bytes, *, max_rank: int) -> LoraConfig:
    """The checked `adapter_config.json`.

    Raises:
        UnfitAdapterError: it is malformed, no LoRA, of too high a rank, or uses what vLLM does not load.
    """
    try:
        config = json.loads(document)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UnfitAdapterError(f"{CONFIG} is not a JSON object")
    if config.get("peft_type") != "LORA":
        raise UnfitAdapterError(f"the adapter's method is {config.get('peft_type')}; vLLM serves LORA only")
    if config.get("task_type") not in {None, "CAUSAL_LM"}:
        raise UnfitAdapterError(f"the adapter's task is {config['task_type']}; CAUSAL_LM is needed")
    if used := _unsupported(config):
        raise UnfitAdapterError(f"the adapter uses {', '.join(used)}; vLLM cannot serve that")
    ranks = _ranks(config)
    highest = max(ranks.rank, *ranks.rank_pattern.values(), 0)
    if highest > max_rank:
        raise UnfitAdapterError(
            f"the adapter's rank is {highest} and the pool's engine.maxLoraRank is {max_rank}; "
            "raise it or train with a lower rank"
        )
    return ranks


def _unsupported(config: dict[str, Any]) -> list[str]:
    used = [name for key, name in _UNSUPPORTED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append(f"bias={config['bias']}")
    initialization = config.get("init_lora_weights")
    if isinstance(initialization, str) and initialization.lower().startswith(_CHANGED_BASE):
        used.append(f"the initialization {initialization}, which changes the base")
    return used


def _ranks(config: dict[str, Any]) -> LoraConfig:
    rank, pattern = config.get("r"), config.get("rank_pattern") or {}
    if not isinstance(pattern, dict) or not all(
        type(value) is int and value > 0 for value in (rank, *pattern.values())
    ):
        raise UnfitAdapterError(f"r and rank_pattern of {CONFIG} must be natural numbers")
    try:
        for expression in pattern:
            re.compile(expression)
    except re.error as error:
        raise UnfitAdapterError(f"rank_pattern of {CONFIG} is no regular expression: {error}") from None
    return LoraConfig(rank=int(rank or 0), rank_pattern=pattern, fan_in_fan_out=bool(config.get("fan_in_fan_out")))


def base_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a base model's tensors by name.

    Raises:
        ValueError: a safetensors file is damaged.
        OSError: the folder cannot be read.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        shapes |= {name: tensor.shape for name, tensor in read_tensors(path).items()}
    return shapes


def check_weights(path: Path, config: LoraConfig, base: dict[str, tuple[int, ...]]) -> None:
    """Check the adapter's tensors against the base's.

    Raises:
        UnfitAdapterError: the file is damaged; a name, a shape or a rank does not fit the base; a value is not finite.
    """
    try:
        tensors = read_tensors(path)
    except ValueError as error:
        raise UnfitAdapterError(str(error)) from None
    modules = _by_module(tensors)
    for module, parts in modules.items():
        if set(parts) != {"A", "B"}:
            raise UnfitAdapterError(f"{module} has only one of lora_A and lora_B")
        _check_module(module, parts["A"], parts["B"], config, base)
    try:
        damaged = first_non_finite(path, tensors)
    except ValueError as error:
        raise UnfitAdapterError(str(error)) from None
    if damaged is not None:
        raise UnfitAdapterError(f"{damaged} holds values that are infinite or not a number; train again")


def _by_module(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    if not tensors:
        raise UnfitAdapterError(f"{WEIGHTS} holds no tensors")
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        suffix = next((suffix for suffix in _PARTS if name.endswith(suffix)), None)
        if suffix is None or not name.startswith(_PREFIX):
            raise UnfitAdapterError(
                f"the tensor {name} is none of a LoRA adapter: base_model.model.<module>.lora_A.weight and lora_B are"
            )
        modules.setdefault(name.removeprefix(_PREFIX).removesuffix(suffix), {})[_PARTS[suffix]] = tensor
    return modules


def _check_module(
    module: str, first: Tensor, second: Tensor, config: LoraConfig, base: dict[str, tuple[int, ...]]
) -> None:
    embedding = module.endswith("embed_tokens")
    shape = base.get(f"{module}.weight")
    if shape is None and module == "lm_head":  # tied: stored once, as the embedding
        shape = next((value for name, value in base.items() if name.endswith("embed_tokens.weight")), None)
    if shape is None:
        raise UnfitAdapterError(f"the base model has no {module}.weight: the adapter belongs to another model")
    if len(shape) != 2:  # noqa: PLR2004 - a matrix
        raise UnfitAdapterError(f"{module} of the base model is no linear layer; LoRA does not apply to it")
    outputs, inputs = reversed(shape) if config.fan_in_fan_out or embedding else shape
    rank = config.rank_of(module)
    for part, tensor, expected in (("lora_A", first, (rank, inputs)), ("lora_B", second, (outputs, rank))):
        if tensor.shape != expected:
            raise UnfitAdapterError(
                f"{part} of {module} has the shape {list(tensor.shape)} and the base model and rank {rank} need "
                f"{list(expected)}: the adapter belongs to another model or is damaged"
            )
