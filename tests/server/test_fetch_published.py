"""`tunesmith-agent fetch-base` with the whole model of a FineTuneJob: only files with their published hashes."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.server.server_rig import S3Server, write_safetensors
from tests.server.test_fetch_base import fetch
from tunesmith.api.finetunejob_status import ServableStatus
from tunesmith.contracts.artifact import ArtifactAdapter, ArtifactBase, ArtifactFile, ArtifactManifest, digest_of

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

JOB = "s3://tunesmith/store/team/job-1"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Published:
    """A job's folder in the store, with a merged model or a fully trained one."""

    def __init__(self, store: S3Server, model: Path, *, merged: bool) -> None:
        self.store = store
        files = {path.name: path.read_bytes() for path in model.iterdir()}
        self.folder = f"{JOB}/{'merged' if merged else 'artifact'}"
        merged_json = json.dumps({"files": {name: _sha256(data) for name, data in files.items()}}).encode()
        artifact = {"adapter_config.json": b"{}"} if merged else files
        manifest = ArtifactManifest(
            files={name: ArtifactFile(sha256=_sha256(data), size_bytes=len(data)) for name, data in artifact.items()},
            base=ArtifactBase(fingerprint="sha256:f", uri="s3://models/tiny"),
            adapter=ArtifactAdapter(method="lora" if merged else "full", target_modules=[]),
            dataset_digest="sha256:d",
            merged_sha256=_sha256(merged_json) if merged else None,
            hyperparameters={},
            versions={},
            servable=ServableStatus(vllm=False),
        ).to_bytes()
        self.digest = digest_of(manifest)
        for name, data in files.items():
            self.put(name, data)
        if merged:
            self.put("merged.json", merged_json)
        store.files.pipe_file(f"{JOB}/artifact/tunesmith.json", manifest)

    def put(self, name: str, data: bytes) -> None:
        self.store.files.pipe_file(f"{self.folder}/{name}", data)

    def fetch(self, target: Path, digest: str | None = None) -> subprocess.CompletedProcess[str]:
        return fetch(self.folder, target, self.store.secret, "--artifact-digest", digest or self.digest)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", {"a.weight": np.ones((64, 64), np.float32)})
    return folder


@pytest.mark.parametrize("merged", [True, False])
def test_the_published_files_are_downloaded(model: Path, store: S3Server, tmp_path: Path, *, merged: bool) -> None:
    published = Published(store, model, merged=merged)
    try:
        published.put("added.json", b"{}")
        done = published.fetch(tmp_path / "base")
        assert done.returncode == 0, done.stderr
        names = {path.name for path in (tmp_path / "base").iterdir()}
        assert names == {"config.json", "tokenizer.json", "model.safetensors"}
    finally:
        store.files.rm(JOB, recursive=True)


def test_a_changed_model_is_refused(model: Path, store: S3Server, tmp_path: Path) -> None:
    published = Published(store, model, merged=True)
    try:
        another = published.fetch(tmp_path / "another", "sha256:" + "0" * 64)
        published.put("config.json", b'{"model_type": "other"}')
        changed = published.fetch(tmp_path / "changed")
        document = json.dumps({"files": dict.fromkeys(("config.json", "model.safetensors"), "0" * 64)})
        published.put("merged.json", document.encode())
        listed = published.fetch(tmp_path / "listed")
    finally:
        store.files.rm(JOB, recursive=True)
    for done, words in (
        (another, "the artifact was changed"),
        (changed, "config.json has the checksum sha256:"),
        (listed, "merged.json was changed"),
    ):
        assert (done.returncode, words in done.stderr) == (3, True), done.stderr
    assert not (tmp_path / "changed/config.json").exists()
