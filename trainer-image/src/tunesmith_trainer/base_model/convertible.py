"""Base models that cannot be trained as they are published, and how to convert each."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

if TYPE_CHECKING:
    from collections.abc import Collection

_LOAD = 'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
_SOURCE = re.compile(r"^base_model:\s*(?:-\s*)?[\"']?([\w.-]{1,96}/[\w.-]{1,96})[\"']?\s*$", re.MULTILINE)
"""Line of a model's card with the model that it was made from."""


def weights_conversion(names: Collection[str], uri: str) -> str | None:
    """Return why the files of a folder are not a base model that can be trained; None: other files are missing.

    Args:
        names: names of the folder's files.
        uri: location of the folder.
    """
    safe = any(name.endswith(".safetensors") for name in names)
    pickled = sorted(name for name in names if name.startswith("pytorch_model") and name.endswith(".bin"))
    if not safe and pickled:
        return (
            f"the weights in {uri} are in {pickled[0]}, a pickle, which can run code when it is read and is never "
            f"loaded: convert them on a machine of yours with {_LOAD}M.from_pretrained('SOURCE').save_pretrained("
            "'TARGET'); T.from_pretrained('SOURCE').save_pretrained('TARGET')\" and copy TARGET to the store"
        )
    slow = sorted(name for name in names if name in {"tokenizer.model", "vocab.json", "spiece.model", "vocab.txt"})
    if safe and "config.json" in names and "tokenizer.json" not in names and slow:
        return (
            f"the tokenizer in {uri} is {slow[0]} and has no tokenizer.json: convert it on a machine of yours with "
            f"{_LOAD}T.from_pretrained('SOURCE').save_pretrained('TARGET')\" and add the files of TARGET to the store"
        )
    return None


def code_conversion(document: str, uri: str) -> str | None:
    """Return why a `config.json` needs code that the base brings along; None: it does not.

    Args:
        document: content of the file.
        uri: location of the base model.
    """
    try:
        config = json.loads(document)
    except ValueError:
        return None
    if not isinstance(config, dict) or "auto_map" not in config or config.get("model_type") in CONFIG_MAPPING:
        return None
    return (
        f"the base model {uri} is a {config.get('model_type')}, which needs code of its own (auto_map, "
        "trust_remote_code); such code is never run: use a release of the model for an architecture of transformers, "
        "or convert its weights to one"
    )


def quantized_conversion(quantization: object, uri: str, card: str) -> str:
    """Return why a base whose weights are stored quantised cannot be trained, and what to use.

    Args:
        quantization: `quantization_config` of its config.json.
        uri: location of the base model.
        card: beginning of its README.md; empty without one.
    """
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    source = _SOURCE.search(card)
    remedy = f"use {source[1]}, from which it was made" if source else "use the model that it was quantised from"
    return (
        f"the weights of the base model {uri} are stored quantised ({str(method)[:40]}), which cannot be trained: "
        f"{remedy}; method.qlora holds that one in 4 bits while it trains"
    )
