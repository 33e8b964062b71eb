"""Folders with a published artifact, for the commands that read one."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from tunesmith.contracts.artifact import ArtifactAdapter, ArtifactBase, ArtifactFile, ArtifactManifest, digest_of

if TYPE_CHECKING:
    from pathlib import Path


def publish(folder: Path, files: dict[str, bytes], *, base: str = "s3://models/base") -> str:
    """Write a manifest and the files that it lists, except those with names of other folders; return the digest."""
    manifest = ArtifactManifest(
        files={
            name: ArtifactFile(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
            for name, data in files.items()
        },
        base=ArtifactBase(fingerprint="sha256:f", uri=base),
        adapter=ArtifactAdapter(method="lora", rank=8, target_modules=["q_proj"]),
        dataset_digest="sha256:d",
        hyperparameters={},
        versions={},
        servable={"vllm": True},
    ).to_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tunesmith.json").write_bytes(manifest)
    for name, data in files.items():
        if name not in {"tunesmith.json", ".."} and "/" not in name:
            (folder / name).write_bytes(data)
    return digest_of(manifest)
