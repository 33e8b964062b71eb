"""The base model: its folder, configuration, tokenizer, modules, weights, and the adapter that is put on it."""

from __future__ import annotations

import difflib
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tunesmith_trainer.errors import BaseModelNotFoundError, InvalidSpecError, SelfCheckError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

    from tunesmith.api.finetunejob import BaseModelSource
    from tunesmith.api.method import LoraFields, Quantization
    from tunesmith_trainer.store import Folder, Stores

log = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_SMALL_FILES = ("config.json", "generation_config.json", *_TOKENIZER_FILES)


def open_base(source: BaseModelSource, stores: Stores) -> Folder:
    """The base model's folder in its store."""
    return stores.folder(
        source.uri,
        what="the base model",
        missing=BaseModelNotFoundError,
        secret=source.secret_ref.name if source.secret_ref else None,
        revision=source.revision,
    )


def fetch_base(folder: Folder, target: Path, *, weights: bool) -> Path:
    """A local folder with the base model, downloaded into `target` if needed; weights only where `weights`.

    Raises:
        BaseModelNotFoundError: the folder is missing or is no model.
    """
    names = folder.names()
    if (
        "config.json" not in names
        or "tokenizer.json" not in names
        or not any(name.endswith(".safetensors") for name in names)
    ):
        raise BaseModelNotFoundError(
            f"there is no base model in {folder.uri}: it needs config.json, tokenizer.json and *.safetensors, and "
            f"holds {', '.join(names[:10]) or 'nothing'}"
        )
    if folder.local is not None:
        return folder.local
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        wanted = name in _SMALL_FILES or (weights and name.endswith((".safetensors", ".safetensors.index.json")))
        if wanted and not (target / name).exists():
            folder.download(name, target / name)
    return target


def tokenizer_files(base: Path) -> list[Path]:
    """The files that make up the base model's tokenizer and chat template."""
    return [base / name for name in _TOKENIZER_FILES if (base / name).is_file()]


def load_config(base: Path, uri: str) -> PretrainedConfig:
    """The base model's configuration.

    Raises:
        InvalidSpecError: it is no causal language model that this release can train.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise InvalidSpecError(f"the config.json of the base model {uri} cannot be used: {_line(error)}") from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InvalidSpecError(
            f"the base model {uri} is a {config.model_type}, which is no causal language model that can be trained here"
        )
    return config


def load_tokenizer(base: Path, uri: str) -> PreTrainedTokenizerFast:
    """The base model's tokenizer, as it is.

    Raises:
        InvalidSpecError: it cannot be loaded or has no end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise InvalidSpecError(f"the tokenizer of the base model {uri} cannot be used: {_line(error)}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InvalidSpecError(f"the tokenizer of the base model {uri} has no tokenizer.json that can be used")
    return tokenizer


def end_tokens(base: Path, tokenizer: PreTrainedTokenizerFast, uri: str) -> list[int]:
    """The tokens that end an answer: the tokenizer's end token first, then those of generation_config.json.

    Raises:
        InvalidSpecError: there is none.
    """
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    path = base / "generation_config.json"
    if path.is_file():
        more = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        found += [
            token
            for token in (more if isinstance(more, list) else [more])
            if isinstance(token, int) and token not in found
        ]
    if not found:
        raise InvalidSpecError(
            f"the base model {uri} has no end token, in its tokenizer or its generation_config.json: its answers "
            "would never stop"
        )
    return found


def pad_token(tokenizer: PreTrainedTokenizerFast, ends: Sequence[int]) -> int:
    """A token for padding that is no end token: a masked end token would never be learned."""
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *range(len(ends) + 1))
    return next(int(token) for token in candidates if token is not None and token not in ends)


@dataclass(frozen=True)
class Modules:
    """The linear modules of a base model, without its output layer.

    Args:
        linear: full name → (in, out) features.
        others: full names of all other modules.
        output: full name of the output layer, or None.
        parameters: of the whole model; shared ones count once.
    """

    linear: dict[str, tuple[int, int]]
    others: frozenset[str]
    output: str | None
    parameters: int


def modules_of(config: PretrainedConfig) -> Modules:
    """The modules that a model of this configuration has; no memory is used for weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    output = model.get_output_embeddings()
    linear, others, output_name = {}, set(), None
    for name, module in model.named_modules():
        if module is output:
            output_name = name
        elif isinstance(module, torch.nn.Linear):
            linear[name] = (module.in_features, module.out_features)
        elif name:
            others.add(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Modules(linear, frozenset(others), output_name, parameters)


def resolve_targets(asked: Sequence[str], modules: Modules) -> list[str]:
    """The names for PEFT's `target_modules`: `all-linear` becomes the last parts of all linear modules' names, sorted.

    Raises:
        InvalidSpecError: a name fits no linear module.
    """
    if ALL_LINEAR in asked:
        if len(asked) > 1:
            raise InvalidSpecError(
                "method targetModules: all-linear stands for all of them; remove it or the other names"
            )
        return sorted({name.rsplit(".", 1)[-1] for name in modules.linear})
    for name in asked:
        if modules.output is not None and _fits(modules.output, name):
            raise InvalidSpecError(
                f"method targetModules: {name} is the output layer, which cannot get an adapter; remove it"
            )
        if any(_fits(full, name) for full in modules.linear):
            continue
        if any(_fits(full, name) for full in modules.others):
            raise InvalidSpecError(
                f"method targetModules: {name} is not a linear module of the base model, so it cannot get an adapter"
            )
        short = sorted({full.rsplit(".", 1)[-1] for full in modules.linear})
        near = difflib.get_close_matches(name, short, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(short)}"
        raise InvalidSpecError(f"method targetModules: the base model has no module named {name}; {hint}")
    return sorted(set(asked))


def _fits(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


def adapted(targets: Sequence[str], modules: Modules) -> dict[str, tuple[int, int]]:
    """The modules that get an adapter, with their (in, out) features."""
    return {full: shape for full, shape in modules.linear.items() if any(_fits(full, name) for name in targets)}


def adapter_parameters(rank: int, shapes: Sequence[tuple[int, int]]) -> int:
    """Parameters of LoRA matrices A (rank × in) and B (out × rank)."""
    return sum(rank * (wide + high) for wide, high in shapes)


def load_model(base: Path, device: torch.device, quantization: Quantization | None) -> PreTrainedModel:
    """The base with its weights: float32 on a CPU, bfloat16 on a GPU, or in 4 bits; frozen."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    arguments: dict[str, Any] = {}
    if quantization is not None:
        compute = getattr(torch, quantization.compute_type) if quantization.compute_type else dtype
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.type,
            bnb_4bit_use_double_quant=quantization.double_quantization,
            bnb_4bit_compute_dtype=compute,
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        device_map={"": str(device)},
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        **arguments,
    )
    # On some CPUs bitsandbytes repacks 4-bit weights at the first evaluation, and no gradient passes them any more.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - an attribute its type does not declare
    # The loss never needs it, and it takes memory for each layer.
    model.config.use_cache = False
    return model


def with_adapter(
    model: PreTrainedModel, fields: LoraFields, targets: Sequence[str], *, quantized: bool, checkpointing: bool
) -> PeftModel:
    """The base with a new LoRA adapter; only the adapter can be trained."""
    if quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    config = LoraConfig(
        r=fields.rank,
        lora_alpha=fields.alpha,
        lora_dropout=fields.dropout,
        target_modules=list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)  # noqa: S101 - narrows the type
    return wrapped


def check_adapter(model: PeftModel, expected: int) -> None:
    """Raises SelfCheckError unless exactly the adapter's `expected` parameters are trained."""
    trained = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    strange = [name for name in trained if ".lora_A." not in name and ".lora_B." not in name]
    if strange or sum(trained.values()) != expected:
        raise SelfCheckError(
            f"the adapter has {sum(trained.values())} trainable parameters where {expected} are "
            f"expected{f'; {strange[0]} is not of the adapter' if strange else ''}"
        )


def full_precision_adapter(model: PeftModel) -> None:
    """The adapter in float32: in bfloat16, into which TRL casts over a 4-bit base, small updates are lost."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
