"""The base model: its folder, configuration, tokenizer and weights."""

from __future__ import annotations

import json
import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.nn import Params4bit
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)
from transformers.integrations import replace_with_bnb_linear
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from tunesmith_trainer.base_model.convertible import code_conversion, quantized_conversion, weights_conversion
from tunesmith_trainer.base_model.layers import has_known_layers
from tunesmith_trainer.base_model.stored import GENERATION_CONFIG, load_published, of_settings, stored_quantization
from tunesmith_trainer.errors import BaseModelNotFoundError, InvalidSpecError
from tunesmith_trainer.libraries import refused

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

    from tunesmith.api.finetunejob import BaseModelSource, FineTuneJobSpec
    from tunesmith.api.methods.fields import Quantization
    from tunesmith.storage.folder import Folder
    from tunesmith_trainer.base_model.stored import StoredQuantization
    from tunesmith_trainer.store import Stores

log = logging.getLogger(__name__)

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
_MAX_LAYERS = 1024
"""Highest number of layers; the modules of each take time and memory, even without weights."""
_MAX_TOKEN = 2**31 - 1
"""Highest token id: rows are stored as numbers of 32 bits."""
_SAFETENSORS = ".safetensors"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADAPTER_CONFIG = "adapter_config.json"
_SMALL_FILES = ("config.json", GENERATION_CONFIG, *_TOKENIZER_FILES)
_MAX_FILE_BYTES = 128 * 2**20
"""Size limit of each file without weights, which are read into memory. Tokenizers of 256,000 tokens take 35 MB."""
_RANGES = (
    ("eps", 0.0, 1.0),
    ("epsilon", 0.0, 1.0),
    ("dropout", 0.0, 1.0),
    ("pdrop", 0.0, 1.0),
    ("rope_theta", 1e-3, math.inf),
    ("num_labels", 0, 100_000),
)
"""Ends of the names of numbers in a config.json with the lowest and highest value; a label takes memory."""
_CARD, _MAX_CARD = "README.md", 65_536
"""File that names the model that a quantised one was made from, and the characters of it that are read."""


def open_base(source: BaseModelSource, stores: Stores) -> Folder:
    """Return the base model's folder in its store."""
    return stores.folder(
        source.uri,
        what="the base model",
        missing=BaseModelNotFoundError,
        secret=source.secret_ref.name if source.secret_ref else None,
        revision=source.revision,
    )


def fetch_base(folder: Folder, target: Path, *, weights: bool) -> Path:
    """Return a local folder with the base model, downloaded into `target` if needed; weights only if `weights`.

    Raises:
        BaseModelNotFoundError: the folder is missing or is not a model.
        InvalidSpecError: a file is too large.
    """
    names = folder.names()
    if (
        "config.json" not in names
        or "tokenizer.json" not in names
        or not any(name.endswith(".safetensors") for name in names)
    ):
        conversion = weights_conversion(names, folder.uri)
        if conversion is not None:
            raise BaseModelNotFoundError(conversion)
        raise BaseModelNotFoundError(
            f"there is no base model in {folder.uri}: it needs config.json, tokenizer.json and *.safetensors, and "
            f"contains {', '.join(names[:10]) or 'no files'}"
        )
    for name in (*_SMALL_FILES, _INDEX):
        if name in names and folder.size(name) > _MAX_FILE_BYTES:
            raise InvalidSpecError(
                f"{name} of the base model {folder.uri} has more than 128 MiB: use a model with a smaller one"
            )
    weight_files(folder)
    if folder.local is not None:
        folder.check_links()
        if _ADAPTER_CONFIG in names:
            raise InvalidSpecError(
                f"{folder.uri} has an adapter beside the base model ({_ADAPTER_CONFIG}), which would be loaded into it:"
                " use a folder without it, and spec.continueFrom to start from an adapter"
            )
        return folder.local
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        wanted = (
            name in _SMALL_FILES
            or (name == _CARD and folder.size(name) <= _MAX_CARD)
            or (weights and name.endswith((".safetensors", ".safetensors.index.json")))
        )
        if wanted and not (target / name).exists():
            folder.download(name, target / name)
    return target


def weight_files(folder: Folder) -> list[str]:
    """Return the names of the files that a base model's weights are loaded from.

    Raises:
        BaseModelNotFoundError: there are none, or the index names others than safetensors files of the folder.
    """
    names = folder.names()
    if _WEIGHTS in names:
        return [_WEIGHTS]
    if _INDEX not in names:
        found = ", ".join(sorted(name for name in names if name.endswith(_SAFETENSORS))[:3])
        raise BaseModelNotFoundError(
            f"{folder.uri} has neither {_WEIGHTS} nor {_INDEX}, which names the files with weights, but {found}: rename"
            " a single file, or copy the whole base model"
        )
    try:
        shards = {str(shard) for shard in json.loads(folder.read(_INDEX))["weight_map"].values()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        shards = set()
    if not shards:
        raise BaseModelNotFoundError(f"{_INDEX} in {folder.uri} is damaged: copy the base model again")
    missing = sorted(shards.difference(names))
    if missing:
        raise BaseModelNotFoundError(
            f"{_INDEX} in {folder.uri} names {', '.join(missing[:3])}, which the folder does not contain: copy the"
            " whole base model"
        )
    others = sorted(shard for shard in shards if not shard.endswith(_SAFETENSORS))
    if others:
        raise BaseModelNotFoundError(
            f"{_INDEX} in {folder.uri} names {others[0]}, and only {_SAFETENSORS} files are loaded: copy the base model"
            " again"
        )
    return sorted(shards)


def tokenizer_files(base: Path) -> list[Path]:
    """Return the files that make up the base model's tokenizer and chat template."""
    return [base / name for name in _TOKENIZER_FILES if (base / name).is_file()]


def load_config(base: Path, uri: str) -> PretrainedConfig:
    """Load the base model's configuration.

    Raises:
        InvalidSpecError: it is not a causal language model that this release can train.
    """
    with refused(f"the config.json of the base model {uri} cannot be loaded"):
        return _checked_config(base, uri)


def _checked_config(base: Path, uri: str) -> PretrainedConfig:
    path = base / "config.json"
    document = path.read_text(encoding="utf-8", errors="replace")
    conversion = code_conversion(document, uri)
    if conversion is not None:
        raise InvalidSpecError(conversion)
    _check_numbers(json.loads(document), uri)
    config: PretrainedConfig = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InvalidSpecError(
            f"the base model {uri} is a {config.model_type}, which is not a causal language model that this release "
            "can train: use another base model"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise InvalidSpecError(
            f"the base model {uri} has an encoder besides its decoder (is_encoder_decoder in its config.json): use a"
            " causal language model"
        )
    if getattr(config, "transformers_weights", None) is not None:
        raise InvalidSpecError(
            f"the config.json of the base model {uri} names its file with weights (transformers_weights), which engines"
            f" do not read: rename that file to {_WEIGHTS}, and remove the key"
        )
    for owner in (config, config.get_text_config()):
        settings = getattr(owner, "quantization_config", None)
        if settings is None:
            continue
        if not isinstance(settings, dict) or owner is not config or of_settings(settings) is None:
            raise InvalidSpecError(quantized_conversion(settings, uri, _card(base)))
        # The modules are those of the model that was quantised.
        del config.quantization_config
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        layers = getattr(part, "num_hidden_layers", None)
        if isinstance(layers, int) and layers > _MAX_LAYERS:
            raise InvalidSpecError(
                f"the base model {uri} has {layers} layers according to its config.json, more than {_MAX_LAYERS}:"
                " correct num_hidden_layers, or use another base model"
            )
    return config


def _check_numbers(document: object, uri: str) -> None:
    """Raise InvalidSpecError for a number in a `config.json` with which no model computes anything."""
    waiting = [("", document)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(name, item) for item in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            limits = [(low, high) for end, low, high in _RANGES if name.endswith(end)]
            if math.isnan(value) or not all(low <= value <= high for low, high in limits):
                raise InvalidSpecError(
                    f"the config.json of the base model {uri} has {name} {value}, which no model can have: copy the"
                    " base model again, or correct it"
                )


def _card(base: Path) -> str:
    """Return the beginning of the model's card; empty without one."""
    path = base / _CARD
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(_MAX_CARD)


def can_be_sharded(config: PretrainedConfig, stored: StoredQuantization | None) -> bool:
    """Return True if FSDP2 can shard a model: its layers are known, and its weights are not in 8 bits.

    Args:
        config: the base model's configuration.
        stored: quantisation of its weights; None: they are not quantised.
    """
    in_8_bits = stored is not None and stored.kept and not stored.in_4_bits
    return has_known_layers(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]) and not in_8_bits


def load_tokenizer(base: Path, uri: str) -> PreTrainedTokenizerFast:
    """Load the base model's tokenizer, unchanged.

    Raises:
        InvalidSpecError: the tokenizer cannot be loaded or has no end-of-sequence token.
    """
    with refused(f"the tokenizer of the base model {uri} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InvalidSpecError(
            f"the tokenizer of the base model {uri} has no usable tokenizer.json: use a base model with a fast "
            "tokenizer"
        )
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest > _MAX_TOKEN:
        raise InvalidSpecError(
            f"the tokenizer of the base model {uri} has the token id {highest}, more than {_MAX_TOKEN}: copy its files"
            " again, or use another base model"
        )
    return tokenizer


def load_tokenizer_of(base: Path, spec: FineTuneJobSpec) -> PreTrainedTokenizerFast:
    """Load the tokenizer for a job's rows and its artifact: the base model's, or with the job's chat template."""
    tokenizer = load_tokenizer(base, spec.base_model.uri)
    tokenizer.chat_template = spec.dataset.chat_template or tokenizer.chat_template
    return tokenizer


def end_tokens(base: Path, tokenizer: PreTrainedTokenizerFast, uri: str) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's end token first, then those of generation_config.json.

    Raises:
        InvalidSpecError: there is no such token.
    """
    tokens = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    path = base / GENERATION_CONFIG
    if path.is_file():
        with refused(f"the generation_config.json of the base model {uri} cannot be read"):
            configured = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        given = configured if isinstance(configured, list) else [configured]
        known = set(tokenizer.get_vocab().values()).difference(tokens)
        tokens += dict.fromkeys(token for token in given if type(token) is int and token in known)
    if not tokens:
        raise InvalidSpecError(
            f"the base model {uri} has no end token in its tokenizer or its generation_config.json, so its answers "
            "would never end: add eos_token_id to generation_config.json"
        )
    return tokens


def pad_token(tokenizer: PreTrainedTokenizerFast, ends: Sequence[int]) -> int:
    """Return a padding token that is not an end token: a masked end token would never be learned."""
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *range(len(ends) + 1))
    return next(int(token) for token in candidates if token is not None and token not in ends)


def load_model(
    base: Path,
    device: torch.device,
    quantization: Quantization | None,
    dtype: torch.dtype,
    *,
    as_stored: bool = False,
) -> PreTrainedModel:
    """Load the base model with its weights on a device, or in 4 bits; frozen.

    Args:
        base: folder of the base model.
        device: device to load the weights onto.
        quantization: quantisation of the linear layers, or None.
        dtype: type of the weights and of matrix products.
        as_stored: True if the weights keep the type that they have in their files.
    """
    arguments: dict[str, Any] = {}
    stored = stored_quantization(base)
    if quantization is not None and stored is not None and not stored.kept:
        # One quantisation at a time: the published one is undone first.
        return load_for_sharding(base, quantization, dtype, as_stored=as_stored).to(device)
    if quantization is not None and stored is None:
        arguments["quantization_config"] = _bits_and_bytes(quantization, dtype)
    compute = None if quantization is None else _compute_type(quantization, dtype)
    model = _load(base, "auto" if as_stored else dtype, compute, device_map={"": str(device)}, **arguments)
    model.config.dtype = dtype
    if quantization is not None:
        _keep_order(model)
    return model


def load_for_sharding(
    base: Path, quantization: Quantization | None, dtype: torch.dtype, *, as_stored: bool
) -> PreTrainedModel:
    """Load the base model into main memory, frozen; weights that already have their type are read only when used.

    Weights to be held in 4 bits are quantised when they are moved to a device, as `load_model` would have done it.

    Args:
        base: folder of the base model.
        quantization: quantisation of the linear layers, or None.
        dtype: type of the weights and of matrix products.
        as_stored: True if the weights keep the type that they have in their files.
    """
    stored = stored_quantization(base)
    compute = None if quantization is None else _compute_type(quantization, dtype)
    model = _load(base, "auto" if as_stored else dtype, compute)
    model.config.dtype = dtype
    if quantization is None:
        return model
    if stored is not None and stored.kept:
        _keep_order(model)
        return model
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    replace_with_bnb_linear(model, get_keys_to_not_convert(model), _bits_and_bytes(quantization, dtype))
    for name, before in linear.items():
        module: Any = model.get_submodule(name)
        if module is before:
            continue
        module.weight = Params4bit(
            before.weight.data.T if isinstance(before, Conv1D) else before.weight.data,
            requires_grad=False,
            compress_statistics=quantization.double_quantization,
            quant_type=quantization.type,
            module=module,
        )
        module.bias = before.bias
    model.is_loaded_in_4bit = True  # PEFT checks this attribute
    model.requires_grad_(requires_grad=False)
    _keep_order(model)
    return model


def _load(
    base: Path,
    dtype: torch.dtype | str,
    compute: torch.dtype | None = None,
    **arguments: Any,  # noqa: ANN401 - transformers' own
) -> PreTrainedModel:
    model = load_published(base, dtype, compute, **arguments)
    # The loss never needs the cache, and it takes memory for each layer.
    model.config.get_text_config().use_cache = False
    return model


def _bits_and_bytes(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quantization,
        bnb_4bit_compute_dtype=_compute_type(quantization, dtype),
    )


def _compute_type(quantization: Quantization, dtype: torch.dtype) -> torch.dtype:
    """Return the type of the products of weights in 4 bits."""
    compute: torch.dtype = getattr(torch, quantization.compute_type) if quantization.compute_type else dtype
    return compute


def _keep_order(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights, which it does on some CPUs and which blocks gradients."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - an attribute its type does not declare
