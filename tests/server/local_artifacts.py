"""Adapters for a tiny base model, and a source of their files that is a folder: for checks by the thousand."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.server.server_rig import STORE, write_safetensors
from tunesmith.contracts.agent import DesiredAdapter
from tunesmith.contracts.artifact import digest_of
from tunesmith.contracts.location import engine_name
from tunesmith_server.artifact import PodLimits
from tunesmith_server.base_weights import read_base_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FINGERPRINT = "sha256:" + "b" * 64
RANK, WIDTH, HEIGHT = 4, 32, 48
MODULES = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(2) for part in "qv"]


def make_base(folder: Path) -> Path:
    """A base model of four linear modules, an embedding and a norm."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    tensors = {f"{module}.weight": random.normal(0, 0.05, (HEIGHT, WIDTH)).astype(np.float32) for module in MODULES}
    tensors["model.embed_tokens.weight"] = random.normal(0, 0.05, (64, WIDTH)).astype(np.float32)
    tensors["model.norm.weight"] = np.ones(WIDTH, np.float32)
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def limits_of(base: Path, max_ratio: float = 4.0) -> PodLimits:
    return PodLimits(STORE, FINGERPRINT, read_base_weights(base), max_rank=16, max_ratio=max_ratio)


def adapter_tensors(scale: float = 0.02) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(1)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for module in MODULES:
        place = f"base_model.model.{module}"
        tensors[f"{place}.lora_A.weight"] = random.normal(0, scale, (RANK, WIDTH)).astype(np.float32)
        tensors[f"{place}.lora_B.weight"] = random.normal(0, scale, (HEIGHT, RANK)).astype(np.float32)
    return tensors


def adapter_config(**changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "lora_dropout": 0.0,
        "rank_pattern": {},
        "alpha_pattern": {"v_proj": 6.0},
        **changes,
    }


def safetensors_bytes(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@dataclass
class LocalArtifact:
    """An artifact as three files, with a manifest that fits them."""

    files: dict[str, bytes]
    manifest: dict[str, Any]

    @classmethod
    def make(cls, folder: Path, tensors: dict[str, np.ndarray[Any, Any]] | None = None, **config: Any) -> LocalArtifact:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "adapter_model.safetensors", tensors or adapter_tensors())
        return cls.of(
            json.dumps(adapter_config(**config)).encode(), (folder / "adapter_model.safetensors").read_bytes()
        )

    @classmethod
    def of(cls, config: bytes, weights: bytes) -> LocalArtifact:
        files = {"adapter_config.json": config, "adapter_model.safetensors": weights}
        manifest = {
            "schemaVersion": 1,
            "files": {
                name: {"sha256": hashlib.sha256(data).hexdigest(), "sizeBytes": len(data)}
                for name, data in files.items()
            },
            "base": {"fingerprint": FINGERPRINT, "uri": "s3://tunesmith/models/tiny"},
            "adapter": {"method": "lora", "rank": RANK, "alpha": 8.0, "targetModules": ["q_proj", "v_proj"]},
            "datasetDigest": "sha256:" + "0" * 64,
            "hyperparameters": {},
            "versions": {},
            "servable": {"vllm": True},
        }
        return cls(files, manifest)

    def place(self, folder: Path, manifest: bytes | None = None) -> DesiredAdapter:
        """Write the files, replacing what is in the folder; the entry of the list that wants them."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        document = json.dumps(self.manifest).encode() if manifest is None else manifest
        for name, data in {**self.files, "tunesmith.json": document}.items():
            (folder / name).write_bytes(data)
        digest = digest_of(document)
        return DesiredAdapter(
            engine_name=engine_name("team", "pirate", digest), digest=digest, uri=f"{STORE}/team/pirate-1/artifact"
        )


class LocalSource:
    """A folder that is read as a store is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def size(self, name: str) -> int:
        return (self._folder / name).stat().st_size

    def read(self, name: str, start: int, end: int) -> bytes:
        with (self._folder / name).open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def download(self, name: str, target: Path, size: int, progress: Callable[[int], None]) -> str:
        data = self.read(name, 0, size)
        target.write_bytes(data)
        progress(len(data))
        return hashlib.sha256(data).hexdigest()
