"""Artifacts of a hostile trainer: folders whose `tunesmith.json` and hashes are right and whose content is not."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunesmith.contracts.artifact import ArtifactFile, ArtifactManifest, digest_of
from tunesmith.contracts.location import ARTIFACT_MANIFEST

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
Shape = tuple[int, ...]


@dataclass
class Tensors:
    """A safetensors file: shapes by name, and the float32 values of each tensor."""

    shapes: dict[str, Shape]
    values: dict[str, array[float]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Tensors:
        """The tensors of a float32 file."""
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        found = cls({name: tuple(entry["shape"]) for name, entry in header.items()})
        for name, entry in header.items():
            if entry["dtype"] != "F32":
                raise ValueError(f"{name} of {path} is {entry['dtype']}, F32 is needed")
            begin, end = entry["data_offsets"]
            found.values[name] = array("f", content[8 + length + begin : 8 + length + end])
        return found

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        header: dict[str, Any] = {}
        place = 0
        for name, values in self.values.items():
            size = 4 * len(values)
            header[name] = {"dtype": "F32", "shape": list(self.shapes[name]), "data_offsets": [place, place + size]}
            place += size
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + b"".join(values.tobytes() for values in self.values.values())


@dataclass(frozen=True)
class Template:
    """A sound artifact, whose parts hostile ones are made from."""

    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        """Its `adapter_config.json`."""
        document: dict[str, Any] = json.loads((self.folder / CONFIG).read_text())
        return document

    @property
    def manifest(self) -> ArtifactManifest:
        """Its `tunesmith.json`."""
        return ArtifactManifest.model_validate_json((self.folder / ARTIFACT_MANIFEST).read_bytes())

    def tensors(self) -> Tensors:
        """Its weights."""
        return Tensors.read(self.folder / WEIGHTS)

    def filled(self, value: float, *, only: str = "") -> Tensors:
        """Its weights with one value in place of all of those whose name contains `only`."""
        tensors = self.tensors()
        for name, values in tensors.values.items():
            if only in name:
                tensors.values[name] = array("f", [value]) * len(values)
        return tensors

    def scaled(self, factor: float) -> Tensors:
        """Its weights, with lora_B multiplied."""
        tensors = self.tensors()
        for name, values in tensors.values.items():
            if "lora_B" in name:
                tensors.values[name] = array("f", [value * factor for value in values])
        return tensors

    def noisy(self, deviation: float, seed: int) -> Tensors:
        """Random weights of the same shapes."""
        source = random.Random(seed)  # noqa: S311 - test data
        tensors = self.tensors()
        for name, values in tensors.values.items():
            tensors.values[name] = array("f", [source.gauss(0, deviation) for _ in values])
        return tensors


def build(
    folder: Path,
    template: Template,
    *,
    config: dict[str, Any] | None = None,
    weights: bytes | Tensors | None = None,
    files: dict[str, bytes] | None = None,
    manifest: Callable[[dict[str, Any]], None] = lambda _: None,
) -> str:
    """Write an artifact folder whose hashes are right; the digest of its manifest.

    Args:
        folder: an empty one.
        template: what is not changed comes from it.
        config: changed keys of `adapter_config.json`.
        weights: in place of the template's.
        files: more files, by name.
        manifest: changes the document of `tunesmith.json` in place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(template.config | (config or {})))
    content = weights.to_bytes() if isinstance(weights, Tensors) else weights
    (folder / WEIGHTS).write_bytes(content if content is not None else (template.folder / WEIGHTS).read_bytes())
    for name, data in (files or {}).items():
        (folder / name).write_bytes(data)
    listed = {
        path.name: ArtifactFile(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size_bytes=path.stat().st_size)
        for path in sorted(folder.iterdir())
        if path.name != ARTIFACT_MANIFEST
    }
    sealed = template.manifest.model_copy(update={"files": listed})
    document = json.loads(sealed.to_bytes())
    manifest(document)
    text = (json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()
    (folder / ARTIFACT_MANIFEST).write_bytes(text)
    return digest_of(text)


def header_of_many_tensors(count: int) -> bytes:
    """A safetensors file that declares `count` empty tensors."""
    names = (
        f'"base_model.model.{number:x}.lora_A.weight":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
        for number in range(count)
    )
    header = b"{" + ",".join(names).encode() + b"}"
    return struct.pack("<Q", len(header)) + header
