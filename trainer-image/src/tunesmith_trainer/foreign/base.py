"""Base model of a foreign adapter: its configuration, its modules, and single weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tunesmith.api.image_volume import image_volume
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint
from tunesmith.contracts.location import BASE_IMAGE
from tunesmith.contracts.safetensors import read_tensors
from tunesmith.contracts.servability import MAX_RANK
from tunesmith_trainer.artifact.main_memory import available_memory
from tunesmith_trainer.base_model import model
from tunesmith_trainer.base_model.stored import stored_quantization
from tunesmith_trainer.errors import BaseModelNotFoundError
from tunesmith_trainer.methods.targets import modules_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from transformers import PretrainedConfig

    from tunesmith.storage.folder import Folder
    from tunesmith_trainer.methods.targets import Modules
    from tunesmith_trainer.options import ImportOptions
    from tunesmith_trainer.store import Stores

MAX_HEADER_BYTES = 2**24
"""Longest header of an adapter's weights."""
_FLOAT_BYTES = 4
_MEMORY_SHARE = 0.7
"""Share of the available main memory that the base's weights may have."""


@dataclass(frozen=True)
class Base:
    """Base model of the adapter: its folder in the store, and locally its configuration and tokenizer."""

    uri: str
    revision: str | None
    remote: Folder
    folder: Path
    config: PretrainedConfig
    fingerprint: str
    names: frozenset[str]
    embeddings: frozenset[str]
    largest_adapter: int
    """Bytes of the largest adapter: all matrices of all modules with the highest rank, and copies of all embeddings."""
    modules: Modules

    def fits(self, size: int) -> bool:
        """Return True if the base's weights with this size, in bytes, leave memory for the rest."""
        return size <= _MEMORY_SHARE * available_memory()


def open_base(options: ImportOptions, stores: Stores, work: Path) -> Base:
    """Return the base model that a command names, without its weights.

    Raises:
        TrainerError: it is missing, or not a causal language model that this release can load.
    """
    remote = stores.folder(
        folder_of(options.base, BASE_IMAGE),
        what="the base model",
        missing=BaseModelNotFoundError,
        secret=options.base_secret,
        revision=options.base_revision,
    )
    folder = model.fetch_base(remote, work / "base", weights=False)
    config = model.load_config(folder, options.base)
    try:
        fingerprint = base_fingerprint(remote if remote.local is None else LocalModelFolder(remote.local))
    except ValueError as error:
        raise BaseModelNotFoundError(f"{options.base}: {error}") from None
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    weights = {name: module.weight for name, module in whole.named_modules() if hasattr(module, "weight")}
    matrices = [tuple(weight.shape) for weight in weights.values() if getattr(weight, "ndim", 0) == 2]  # noqa: PLR2004
    embeddings = {name for name, module in whole.named_modules() if isinstance(module, torch.nn.Embedding)}
    copied = sum(weights[name].numel() for name in embeddings) * 2  # an output layer is as large
    return Base(
        uri=options.base,
        revision=options.base_revision,
        remote=remote,
        folder=folder,
        config=config,
        fingerprint=fingerprint,
        names=frozenset(name for name, _ in whole.named_modules() if name),
        embeddings=frozenset(embeddings),
        largest_adapter=_FLOAT_BYTES * (2 * MAX_RANK * sum(map(sum, matrices)) + copied) + MAX_HEADER_BYTES,
        modules=modules_of(config, stored_quantization(folder)),
    )


def folder_of(uri: str, mounted: str) -> str:
    """Return the uri of a folder that can be read: an image is mounted beside the claims, under the name `mounted`."""
    image = image_volume(uri)
    return uri if image is None else f"pvc://{mounted}/{image.folder}"


def parameters(base: Base, names: Iterable[str]) -> dict[str, torch.Tensor | None]:
    """Return the base's parameters of these names; None for one that it does not have."""
    folder = model.fetch_base(base.remote, base.folder, weights=True)
    where: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        where |= dict.fromkeys(read_tensors(file), file)
    found: dict[str, torch.Tensor | None] = {}
    for name in names:
        # An output layer that shares its weights has none in the file.
        tied = [other for other in where if other.endswith("embed_tokens.weight")] if "lm_head" in name else []
        stored = next((known for known in (name, *tied) if known in where), None)
        if stored is None:
            found[name] = None
            continue
        with safe_open(where[stored], framework="pt") as tensors:
            found[name] = tensors.get_tensor(stored)
    return found
