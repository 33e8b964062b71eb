"""Conversion of a foreign adapter's files to PEFT's of today, for the original base."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tunesmith.contracts.foreign_adapter import (
    ForeignAdapterError,
    Layout,
    changes_base,
    find_layout,
    follows_from_base,
    initial_folder,
    other_base,
    translate_config,
)
from tunesmith.contracts.safetensors import read_tensors
from tunesmith.contracts.servability import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MAX_CONFIG_BYTES
from tunesmith.contracts.strict_json import parse_object
from tunesmith_trainer.base_model import model
from tunesmith_trainer.base_model.stored import load_published
from tunesmith_trainer.foreign.base import MAX_HEADER_BYTES, parameters
from tunesmith_trainer.foreign.weights import adapter_config, renamed, without_copies
from tunesmith_trainer.methods import weightless
from tunesmith_trainer.methods.conversion import difference_from_initial, published_config
from tunesmith_trainer.store import file_sha256

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

    from transformers import PretrainedConfig

    from tunesmith.api.methods.lora import Initialization
    from tunesmith.storage.folder import Folder
    from tunesmith_trainer.foreign.base import Base

_FLOAT_BYTES = 4
_MAX_TENSORS = 2**16
_MAX_CONFIG_VALUES = 65_536


@dataclass(frozen=True)
class Converted:
    """Adapter in PEFT's layout of today, on the local disk.

    Attributes:
        layout: layout of its files.
        sha256: hash of its weights, as they were.
        config: content of adapter_config.json.
        modules: full names of the modules that have matrices.
        changes: what was converted, as sentences.
    """

    layout: Layout
    sha256: str
    config: Mapping[str, Any]
    modules: list[str]
    changes: list[str]


def convert(remote: Folder, names: frozenset[str], folder: Path, base: Base) -> Converted:
    """Write adapter_config.json and adapter_model.safetensors of an adapter of another trainer."""
    folders = remote.folders()
    layout = find_layout(names, folders)
    document = _config(remote)
    config = translate_config(document, layout)
    foreign = folder.parent / "foreign.safetensors"
    matrices, others, sha256 = _weights(remote, layout, foreign, base)
    changes = [] if layout is Layout.PEFT else [f"converted from the layout of {layout}"]
    if others:
        kept = without_copies(others, parameters(base, others))
        config = {key: value for key, value in config.items() if key != "modules_to_save"}
        changes.append(f"left out {', '.join(kept)}, which equal the base's")
    initialization = changes_base(config)
    if initialization is not None:
        trained = adapter_config({**config, "init_lora_weights": True}, matrices, base.names)
        untrained = initial_folder(initialization, folders)
        if untrained is not None:
            initial, _, _ = _weights(remote.child(untrained), layout, folder.parent / "initial.safetensors", base)
            how = "with the untrained adapter"
        else:
            initial = _computed(
                initialization, {**trained, "init_lora_weights": config["init_lora_weights"]}, base, folders
            )
            how = "computed from the base"
        shapes = [{name: tensor.shape for name, tensor in part.items()} for part in (matrices, initial)]
        if shapes[0] != shapes[1]:
            raise ForeignAdapterError(f"the untrained adapter in {untrained} has other tensors than the trained one")
        written = published_config(trained, sorted(_modules(matrices)), doubled=True)
        matrices = difference_from_initial(matrices, initial)
        changes.append(f"undid the initialization {initialization}, {how}, which doubles the rank")
    else:
        written = adapter_config(config, matrices, base.names)
    written |= {
        "base_model_name_or_path": base.uri.removeprefix("hf://").removeprefix("file://"),
        "revision": base.revision,
    }
    save_file(matrices, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(
        json.dumps(written, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return Converted(layout, sha256, written, sorted(_modules(matrices)), changes)


def _computed(
    initialization: Initialization, config: Mapping[str, Any], base: Base, folders: Collection[str]
) -> dict[str, torch.Tensor]:
    """Return the matrices with which PEFT initializes such an adapter.

    Signs of singular vectors may differ from those of the trainer's, but not the product of the matrices.

    Raises:
        ForeignAdapterError: they do not follow from the base, or it does not fit into memory.
    """
    if not follows_from_base(initialization) or base.modules.stored is not None:
        raise other_base(initialization, folders, "")
    if not base.fits(_FLOAT_BYTES * base.modules.parameters):
        raise other_base(initialization, folders, " and its start cannot be computed in this memory")
    weights = model.fetch_base(base.remote, base.folder, weights=True)
    wrapped = get_peft_model(load_published(weights, torch.float32), LoraConfig.from_peft_type(**config))
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return state


def _config(remote: Folder) -> dict[str, Any]:
    size = remote.size(ADAPTER_CONFIG)
    data = remote.read(ADAPTER_CONFIG, length=min(size, MAX_CONFIG_BYTES + 1))
    try:
        return parse_object(data, max_bytes=MAX_CONFIG_BYTES, max_values=_MAX_CONFIG_VALUES)
    except ValueError as error:
        raise ForeignAdapterError(f"{ADAPTER_CONFIG} is malformed: {error}") from None


def _weights(
    remote: Folder, layout: Layout, path: Path, base: Base
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], str]:
    """Download and check the weights.

    Returns:
        The matrices under PEFT's names, the other tensors, and the file's SHA-256.
    """
    download(remote, layout.weights, path, base.largest_adapter)
    for name, header in read_tensors(path, limit=MAX_HEADER_BYTES, max_tensors=_MAX_TENSORS).items():
        if header.dtype not in {"F16", "BF16", "F32"}:
            raise ForeignAdapterError(f"{name[:200]} is of type {header.dtype}; weights must be F16, BF16 or F32")
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ForeignAdapterError(f"{name[:200]} has values that are infinite or not a number: train it again")
    matrices, others = renamed(tensors, layout, base.names, base.embeddings)
    return matrices, others, file_sha256(path)


def _modules(matrices: Iterable[str]) -> set[str]:
    return {re.sub(r"^base_model\.model\.|\.lora_.*$", "", name) for name in matrices}


def download(remote: Folder, name: str, target: Path, limit: int) -> None:
    """Download a file of at most `limit` bytes.

    Raises:
        ForeignAdapterError: it is larger.
    """
    size = remote.size(name)
    if size > limit:
        raise ForeignAdapterError(f"{name} has {size} bytes, and an adapter of this base model at most {limit}")
    remote.download(name, target)


def check_structure(folder: Path, config: Mapping[str, Any], base: PretrainedConfig) -> None:
    """Check that PEFT creates exactly these tensors for the configuration on this base.

    Raises:
        ValueError: a tensor is missing, or has another shape.
    """
    planned = LoraConfig.from_peft_type(**{**config, "base_model_name_or_path": None, "revision": None})
    wrapped = weightless.wrapped(planned, base, "lora")
    state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = {name: tensor.shape for name, tensor in read_tensors(folder / ADAPTER_WEIGHTS).items()}
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise ForeignAdapterError(f"{missing[0]} is missing: the files are not of the same adapter")
    if extra:
        raise ForeignAdapterError(f"{extra[0]} is none of the tensors that PEFT has for its {ADAPTER_CONFIG}")
    for name, shape in sorted(found.items()):
        if shape != expected[name]:
            raise ForeignAdapterError(
                f"{name} has the shape {list(shape)}, and the base model needs {list(expected[name])}: the adapter is "
                "of another base model"
            )
