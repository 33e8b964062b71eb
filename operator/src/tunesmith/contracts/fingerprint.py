"""Fingerprint of a base model: computed from its content, never from names, which mirrors change.

SHA-256 over, in this order: `config.json` (canonical JSON, without the keys for paths and versions),
`tokenizer.json`, the chat template (`chat_template.jinja`, or `chat_template` of `tokenizer_config.json`), and for
every safetensors file in order of tensor names: name, dtype, shape and 64 bytes sampled at the start, the middle and
the end of the tensor's data.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Protocol

from tunesmith.contracts.safetensors import LENGTH_BYTES, header_length, parse_header

if TYPE_CHECKING:
    from pathlib import Path

    from tunesmith.contracts.safetensors import Tensor

_IGNORED_KEYS = frozenset(
    {"_name_or_path", "transformers_version", "_commit_hash", "name_or_path", "torch_dtype", "dtype"}
)
_SAMPLE = 64
_MAX_TENSORS = 2**18
"""Highest number of tensors of a model. Three ranges of each are read."""


class ModelFolder(Protocol):
    """Random access to a model's files."""

    def names(self) -> list[str]:
        """Return the names of the files in the folder, without sub-folders."""

    def size(self, name: str) -> int:
        """Return the size of one file in bytes.

        Raises:
            FileNotFoundError: the file does not exist.
        """

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return bytes of one file.

        Raises:
            FileNotFoundError: the file does not exist.
        """


class LocalModelFolder:
    """A ModelFolder on this machine's disk."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self) -> list[str]:
        """Return the names of the regular files in the folder."""
        return sorted(entry.name for entry in self._root.iterdir() if entry.is_file())

    def size(self, name: str) -> int:
        """Return the size of one file in bytes."""
        return (self._root / name).stat().st_size

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Return bytes of one file."""
        with (self._root / name).open("rb") as file:
            file.seek(offset)
            return file.read() if length is None else file.read(length)


def base_fingerprint(folder: ModelFolder) -> str:
    """Return the fingerprint, `sha256:<64 hex>`, of a base model's content.

    Raises:
        ValueError: the folder is not a model: config, tokenizer or safetensors are missing or malformed.
    """
    names = set(folder.names())
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    missing = [
        what
        for what, present in (
            ("config.json", "config.json" in names),
            ("tokenizer.json", "tokenizer.json" in names),
            ("*.safetensors", bool(weights)),
        )
        if not present
    ]
    if missing:
        raise ValueError(f"the base model's folder has no {', no '.join(missing)}")
    digest = hashlib.sha256()

    def add(label: str, data: bytes) -> None:
        digest.update(f"{label}\0{len(data)}\0".encode())
        digest.update(data)

    config = {key: value for key, value in _json(folder, "config.json").items() if key not in _IGNORED_KEYS}
    add("config", json.dumps(config, sort_keys=True).encode())
    add("tokenizer", folder.read("tokenizer.json"))
    add("chat_template", _chat_template(folder, names))
    for name, dtype, shape, sample in sorted(_tensors(folder, weights)):
        add(f"tensor {name} {dtype} {list(shape)}", sample)
    return f"sha256:{digest.hexdigest()}"


def tensors_of(folder: ModelFolder, file: str, limit: int = _MAX_TENSORS) -> dict[str, Tensor]:
    """Return the tensors of a base model's safetensors file by name, from its header.

    Args:
        folder: folder of the base model.
        file: name of the file.
        limit: highest number of tensors.

    Raises:
        ValueError: the file is damaged, or has more tensors.
    """
    try:
        size = folder.size(file)
        text = folder.read(file, LENGTH_BYTES, header_length(folder.read(file, 0, LENGTH_BYTES), size))
        return parse_header(text, size, limit)
    except ValueError as error:
        raise ValueError(f"{file} of the base model {error}: copy it again") from None


def _json(folder: ModelFolder, name: str) -> dict[str, Any]:
    try:
        document = json.loads(folder.read(name))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} of the base model is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{name} of the base model is not a JSON object")  # noqa: TRY004 - content, not a type, is wrong
    return document


def _chat_template(folder: ModelFolder, names: set[str]) -> bytes:
    if "chat_template.jinja" in names:
        return folder.read("chat_template.jinja")
    if "tokenizer_config.json" in names:
        return json.dumps(_json(folder, "tokenizer_config.json").get("chat_template", ""), sort_keys=True).encode()
    return b""


def _tensors(folder: ModelFolder, weights: list[str]) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    found: list[tuple[str, str, tuple[int, ...], bytes]] = []
    for file in weights:
        for name, tensor in tensors_of(folder, file, _MAX_TENSORS - len(found)).items():
            length = min(_SAMPLE, tensor.end - tensor.start)
            offsets = (
                tensor.start,
                tensor.start + (tensor.end - tensor.start - length) // 2,
                tensor.end - length,
            )
            sample = b"".join(folder.read(file, offset, length) for offset in offsets) if length else b""
            found.append((name, tensor.dtype, tensor.shape, sample))
    return found
