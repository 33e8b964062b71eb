"""Artifacts of a hostile trainer: folders with a valid `tunesmith.json` and hashes, and harmful content."""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
from array import array
from dataclasses import dataclass, field
from operator import mul
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
    """Safetensors file: shapes by name, and the float32 values of each tensor."""

    shapes: dict[str, Shape]
    values: dict[str, array[float]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Tensors:
        """Return the tensors of a float32 file."""
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
        """Return the file's bytes."""
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
    """Valid artifact, from whose parts hostile artifacts are built."""

    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        """Return its `adapter_config.json`."""
        document: dict[str, Any] = json.loads((self.folder / CONFIG).read_text())
        return document

    @property
    def manifest(self) -> ArtifactManifest:
        """Return its `tunesmith.json`."""
        return ArtifactManifest.model_validate_json((self.folder / ARTIFACT_MANIFEST).read_bytes())

    def tensors(self) -> Tensors:
        """Return its weights."""
        return Tensors.read(self.folder / WEIGHTS)

    def filled(self, value: float, *, only: str = "") -> Tensors:
        """Return its weights, with all values of the tensors whose name contains `only` replaced by one value."""
        tensors = self.tensors()
        for name, values in tensors.values.items():
            if only in name:
                tensors.values[name] = array("f", [value]) * len(values)
        return tensors

    def scaled(self, factor: float) -> Tensors:
        """Return its weights with lora_B multiplied by a factor."""
        tensors = self.tensors()
        for name, values in tensors.values.items():
            if "lora_B" in name:
                tensors.values[name] = array("f", [value * factor for value in values])
        return tensors

    def changing(self, ratio: float, base: Path, seed: int) -> Tensors:
        """Return random weights whose change to each module has `ratio` times the norm of the base's weights.

        Args:
            ratio: norm of scaling · B · A over that of the base's matrix.
            base: `model.safetensors` of the base, in bfloat16.
            seed: of the random numbers.
        """
        source = random.Random(seed)  # noqa: S311 - test data
        tensors, config, norms = self.tensors(), self.config, bfloat16_norms(base)
        scaling = config["lora_alpha"] / config["r"]
        for name, values in tensors.values.items():
            tensors.values[name] = array("f", [source.uniform(-1, 1) for _ in values])
        for name in [name for name in tensors.values if ".lora_B" in name]:
            module = name.removeprefix("base_model.model.").partition(".lora_B")[0]
            outputs, rank = tensors.shapes[name]
            inputs = tensors.shapes[name.replace("lora_B", "lora_A")][1]
            # Products of numbers that are uniform between -1 and 1 have the variance 1/9.
            expected = scaling * math.sqrt(outputs * inputs * rank) / 3
            factor = ratio * norms[f"{module}.weight"] / expected
            # A is small, so B determines the change.
            first = name.replace("lora_B", "lora_A")
            tensors.values[first] = array("f", [value * 0.1 for value in tensors.values[first]])
            tensors.values[name] = array("f", [value * factor * 10 for value in tensors.values[name]])
        return tensors


def bfloat16_norms(path: Path) -> dict[str, float]:
    """Return the Frobenius norms of a bfloat16 file's matrices."""
    norms = {}
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__" or len(entry["shape"]) != 2:
                continue
            begin, end = entry["data_offsets"]
            file.seek(8 + length + begin)
            raw = file.read(end - begin)
            wide = bytearray(2 * len(raw))
            wide[2::4], wide[3::4] = raw[0::2], raw[1::2]
            values = array("f", bytes(wide))
            norms[name] = math.sqrt(math.fsum(map(mul, values, values)))
    return norms


def build(
    folder: Path,
    template: Template,
    *,
    config: dict[str, Any] | None = None,
    weights: bytes | Tensors | None = None,
    files: dict[str, bytes] | None = None,
    manifest: Callable[[dict[str, Any]], None] = lambda _: None,
) -> str:
    """Write an artifact folder with valid hashes; return the digest of its manifest.

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
    """Return a safetensors file that declares `count` empty tensors."""
    names = (
        f'"base_model.model.{number:x}.lora_A.weight":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
        for number in range(count)
    )
    header = b"{" + ",".join(names).encode() + b"}"
    return struct.pack("<Q", len(header)) + header
