"""Copies of the artifact: a real S3 server, folders, and a server with the Hub's API."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.trainer.hubserver import MAY_READ, MAY_WRITE, HubServer, StoredRepository
from tests.trainer.trainer_rig import Ran, Workbench, job_manifest
from tunesmith.api.conditions import FailureReason
from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.contracts.artifact import ArtifactManifest, digest_of
from tunesmith.contracts.parity import PARITY_ROWS_FILE
from tunesmith.storage.folder import Retry
from tunesmith_trainer.artifact.exports import export_all
from tunesmith_trainer.errors import StorageUnavailableError
from tunesmith_trainer.manifest import spec_digest
from tunesmith_trainer.store import Stores, file_sha256

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.trainer.s3server import S3Server
    from tunesmith.contracts.result import ExportResult

HUB = {"hub": "org/doors", "secretRef": {"name": "hub"}}
S3 = {"uri": "s3://tunesmith/copies/doors", "secretRef": {"name": "bucket"}}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    # Files are uploaded by the protocol that every Hub supports; the other one needs Hugging Face's own client and
    # service.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with HubServer() as server:
        yield server


@pytest.fixture
def secrets(tmp_path: Path, hub: HubServer, s3: S3Server) -> Path:
    """Return the mounted Secrets: hub and bucket have write access."""
    for name, values in (("hub", {"HF_TOKEN": MAY_WRITE, "HF_ENDPOINT": hub.url}), ("bucket", s3.environment())):
        (tmp_path / "secrets" / name).mkdir(parents=True)
        for key, value in values.items():
            (tmp_path / "secrets" / name / key).write_text(value)
    return tmp_path / "secrets"


@pytest.fixture(autouse=True)
def emptied(s3: S3Server) -> None:
    filesystem = s3.filesystem()
    if filesystem.exists("tunesmith/copies"):
        filesystem.rm("tunesmith/copies", recursive=True)


def make_artifact(folder: Path, content: str = "a", **more: Any) -> dict[str, bytes]:
    """Return the files of a copy of an artifact by name: all but the prompts of rows, which the manifest lists too."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "adapter_model.safetensors": f"weights {content}".encode() * 1000,
        "adapter_config.json": b"{}",
        "README.md": f"---\ntags: [lora]\n---\n# doors {content}\n".encode(),
    }
    whole = {**files, PARITY_ROWS_FILE: b"{}"}
    for name, data in whole.items():
        (folder / name).write_bytes(data)
    manifest = ArtifactManifest.model_validate(
        {
            "files": {
                name: {"sha256": file_sha256(folder / name), "sizeBytes": len(data)} for name, data in whole.items()
            },
            "base": {"fingerprint": "base", "uri": "s3://models/base"},
            "adapter": {"method": "lora", "targetModules": []},
            "datasetDigest": "rows",
            "hyperparameters": {},
            "versions": {},
            "servable": {"vllm": True},
            **more,
        }
    )
    (folder / "tunesmith.json").write_bytes(manifest.to_bytes())
    return files | {"tunesmith.json": manifest.to_bytes()}


def make_merged(folder: Path, *names: str) -> dict[str, bytes]:
    """Return the merged model's files beside an artifact, by their names in a copy."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(f"merged {name}".encode())
    hashes = {name: file_sha256(folder / name) for name in names}
    (folder / "merged.json").write_text(json.dumps({"files": hashes}))
    return {f"merged/{file.name}": file.read_bytes() for file in folder.iterdir()}


def exported(tmp_path: Path, secrets: Path, *exports: dict[str, Any], **output: Any) -> list[ExportResult]:
    """Return the exports of an attempt that finds the artifact published."""
    job = FineTuneJob.model_validate(
        job_manifest("s3://models/base", "s3://data/rows.jsonl", output={"exports": list(exports), **output})
    )
    retry = Retry(attempts=3, first=0.0)
    stores = Stores(secrets=secrets, allow_file=True, retry=retry, environ={})
    published = stores.folder(f"file://{tmp_path}/artifact", what="the artifact", missing=StorageUnavailableError)
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    return export_all(job, stores, published, work, print, retry)


def in_bucket(s3: S3Server) -> dict[str, bytes]:
    root = s3.folder / "tunesmith/copies/doors"
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_a_copy_is_the_artifact_file_by_file(tmp_path: Path, secrets: Path, hub: HubServer, s3: S3Server) -> None:
    files = make_artifact(tmp_path / "artifact") | make_merged(tmp_path / "merged", "model.safetensors", "config.json")
    copies = exported(tmp_path, secrets, S3, HUB, {"uri": f"file://{tmp_path}/copy"}, merge="Original")
    assert [copy.reason for copy in copies] == [None, None, None]
    copy = tmp_path / "copy"
    assert in_bucket(s3) == files
    assert {str(file.relative_to(copy)): file.read_bytes() for file in copy.rglob("*") if file.is_file()} == files
    repository = hub.repositories["org/doors"]
    (commit,) = repository.commits
    assert repository.private
    assert commit.files == files
    assert commit.message == f"default/doors: artifact {digest_of(files['tunesmith.json'])}"
    assert set(hub.objects.values()) == {content for name, content in files.items() if name.endswith(".safetensors")}


def test_an_attempt_that_was_killed_exports_again(tmp_path: Path, secrets: Path, hub: HubServer, s3: S3Server) -> None:
    files = make_artifact(tmp_path / "artifact")
    s3.filesystem().pipe_file("tunesmith/copies/doors/adapter_model.safetensors", b"half of i")
    hub.lost_answers = 1
    copies = exported(tmp_path, secrets, S3, HUB)
    assert [copy.reason for copy in copies] == [None, None]
    assert in_bucket(s3) == files
    # All of it was written before the answer was lost: it is found, and not committed a second time.
    assert [commit.files for commit in hub.repositories["org/doors"].commits] == [files]
    again = exported(tmp_path, secrets, S3, HUB)
    assert [copy.reason for copy in again] == [None, None]
    assert len(hub.repositories["org/doors"].commits) == 1


def test_a_short_outage_of_the_hub_is_retried_and_a_long_one_is_reported(
    tmp_path: Path, secrets: Path, hub: HubServer
) -> None:
    make_artifact(tmp_path / "artifact")
    hub.faults = [503, 409]
    assert exported(tmp_path, secrets, HUB)[0].reason is None
    make_artifact(tmp_path / "artifact", "b")
    hub.faults = [503] * 3
    (copy,) = exported(tmp_path, secrets, HUB)
    assert copy.reason is FailureReason.STORAGE_UNAVAILABLE
    assert "the export hf://org/doors could not be reached, tried 3 times: " in copy.message


def test_a_newer_artifact_is_another_commit_and_removes_the_old_merged_model(
    tmp_path: Path, secrets: Path, hub: HubServer
) -> None:
    make_artifact(tmp_path / "artifact")
    make_merged(tmp_path / "merged", "model-1.safetensors", "model-2.safetensors")
    exported(tmp_path, secrets, HUB, merge="Original")
    repository = hub.repositories["org/doors"]
    repository.files["notes.md"] = b"a colleague's"
    shutil.rmtree(tmp_path / "merged")
    files = make_artifact(tmp_path / "artifact", "b") | make_merged(tmp_path / "merged", "model.safetensors")
    exported(tmp_path, secrets, HUB, merge="Original")
    assert repository.files == files | {"notes.md": b"a colleague's"}
    assert len(repository.commits) == 2


def test_a_folder_with_another_artifact_is_not_changed(
    tmp_path: Path, secrets: Path, hub: HubServer, s3: S3Server
) -> None:
    make_artifact(tmp_path / "artifact")
    exported(tmp_path, secrets, S3)
    before = in_bucket(s3)
    make_artifact(tmp_path / "artifact", "b")
    copies = exported(tmp_path, secrets, S3, HUB)
    assert [copy.reason for copy in copies] == [FailureReason.INVALID_SPEC, None]
    assert "already contains another artifact: choose another folder, or delete its content" in copies[0].message
    assert in_bucket(s3) == before
    assert len(hub.repositories["org/doors"].commits) == 1


def test_files_built_by_this_attempt_are_not_downloaded(tmp_path: Path, secrets: Path, s3: S3Server) -> None:
    files = make_artifact(tmp_path / "artifact") | make_merged(tmp_path / "merged", "model.safetensors")
    for name in ("artifact", "merged"):
        shutil.copytree(tmp_path / name, tmp_path / "work" / name)
    (tmp_path / "work/artifact/adapter_config.json").write_bytes(b"not what was published")
    (tmp_path / "artifact/adapter_model.safetensors").unlink()
    (tmp_path / "merged/model.safetensors").unlink()
    (copy,) = exported(tmp_path, secrets, S3, merge="Original")
    assert copy.reason is None, copy.message
    assert in_bucket(s3) == files


def test_files_that_changed_in_the_store_are_not_copied(tmp_path: Path, secrets: Path, s3: S3Server) -> None:
    make_artifact(tmp_path / "artifact")
    (tmp_path / "artifact/adapter_config.json").write_bytes(b"{ }")
    (copy,) = exported(tmp_path, secrets, S3)
    assert copy.reason is FailureReason.INTERNAL_ERROR
    assert "adapter_config.json in file://" in copy.message
    assert not (s3.folder / "tunesmith/copies").exists()


def test_an_export_that_fails_does_not_lose_the_artifact(bench: Workbench, secrets: Path, s3: S3Server) -> None:
    """As in an attempt after one that was killed between publishing and exporting."""
    files = make_artifact(bench.output / "artifact")
    (secrets / "hub/HF_TOKEN").write_text(MAY_READ)
    ran = bench.run("train", bench.job(output={"exports": [HUB, S3]}), "--secrets", str(secrets))
    assert ran.code == 0
    assert ran.result.artifact is not None
    assert ran.result.artifact.digest == digest_of(files["tunesmith.json"])
    assert ran.result.exports is not None
    assert [copy.reason for copy in ran.result.exports] == [FailureReason.ACCESS_DENIED, None]
    denied = "access to the export hf://org/doors was denied with the credentials of the Secret hub: HF_TOKEN must"
    assert f"; 1 of 2 exports failed: {denied}" in ran.result.message
    assert MAY_READ not in ran.result.message
    assert in_bucket(s3) == files
    assert f"  copied to {S3['uri']}" in ran.lines


def test_nothing_is_exported_if_a_gate_failed(bench: Workbench, secrets: Path, hub: HubServer) -> None:
    gate = {"suite": "rows", "metric": "Loss", "value": 2.0, "max": 1.0, "passed": False}
    make_artifact(bench.output / "artifact", evaluation={"gates": [gate]})
    ran = bench.run("train", bench.job(output={"exports": [HUB]}), "--secrets", str(secrets))
    assert (ran.result.reason, ran.result.exports) == (FailureReason.GATE_FAILED, None)
    assert hub.repositories == {}


def validated(bench: Workbench, secrets: Path, *exports: dict[str, Any]) -> Ran:
    return bench.run("validate", bench.job(output={"exports": list(exports)}), "--secrets", str(secrets))


def test_validation_writes_to_each_destination_and_leaves_nothing(
    bench: Workbench, secrets: Path, hub: HubServer, s3: S3Server
) -> None:
    ran = validated(bench, secrets, HUB, S3)
    assert ran.code == 0, ran.result.message
    assert s3.filesystem().find("tunesmith/copies") == []
    assert hub.repositories == {"org/doors": StoredRepository(private=True)}


@pytest.mark.parametrize(
    ("export", "secret", "reason", "mend"),
    [
        (HUB | {"secretRef": {"name": "none"}}, {}, FailureReason.SECRET_NOT_FOUND, "the Secret none does not exist"),
        (HUB, {"hub/HF_TOKEN": ""}, FailureReason.ACCESS_DENIED, "put HF_TOKEN, a token that may write to it, into"),
        (HUB, {"hub/HF_TOKEN": "hf_old"}, FailureReason.ACCESS_DENIED, "a token that may write to org/doors"),
        (HUB, {"hub/HF_TOKEN": MAY_READ}, FailureReason.ACCESS_DENIED, "a token that may write to org/doors"),
        (HUB | {"hub": "other/doors"}, {}, FailureReason.ACCESS_DENIED, "hf://other/doors was denied"),
        (S3, {"bucket/AWS_SECRET_ACCESS_KEY": "old"}, FailureReason.ACCESS_DENIED, "of the Secret bucket: check the"),
        (
            S3 | {"uri": "s3://no-such-bucket/doors"},
            {},
            FailureReason.INVALID_SPEC,
            "s3://no-such-bucket/doors does not exist: check the uri (there is no bucket 'no-such-bucket')",
        ),
    ],
    ids=["no Secret", "no token", "an old token", "a token that reads", "another's", "a wrong key", "no bucket"],
)
def test_the_cause_of_a_failing_export_is_found_before_training(
    bench: Workbench,
    secrets: Path,
    export: dict[str, Any],
    secret: dict[str, str],
    reason: FailureReason,
    mend: str,
) -> None:
    for name, value in secret.items():
        (secrets / name).write_text(value)
    ran = validated(bench, secrets, export)
    assert mend in ran.result.message
    assert (ran.code, ran.result.reason) == (2, reason)
    assert not [value for value in secret.values() if value and value in ran.result.message]


def test_a_read_only_token_is_found_if_the_repository_exists(bench: Workbench, secrets: Path, hub: HubServer) -> None:
    hub.repositories["org/doors"] = StoredRepository(private=False)
    (secrets / "hub/HF_TOKEN").write_text(MAY_READ)
    assert validated(bench, secrets, HUB).result.reason is FailureReason.ACCESS_DENIED


def test_a_folder_of_another_artifact_is_found_before_training(bench: Workbench, secrets: Path) -> None:
    export = {"uri": f"file://{bench.folder}/copy"}
    job = bench.job(output={"exports": [export]})
    make_artifact(bench.folder / "copy", specDigest=spec_digest(FineTuneJob.model_validate(job)))
    assert validated(bench, secrets, export).code == 0  # the copy belongs to a job with the same spec
    for other in (make_artifact(bench.folder / "other", specDigest="sha256:" + "0" * 64)["tunesmith.json"], b"{"):
        (bench.folder / "copy/tunesmith.json").write_bytes(other)
        ran = validated(bench, secrets, export)
        assert (ran.code, ran.result.reason) == (2, FailureReason.INVALID_SPEC)
        assert "already contains another artifact" in ran.result.message


def test_exports_do_not_change_the_artifact() -> None:
    def digest(**output: Any) -> str:
        spec = {"output": output} if output else {}
        return spec_digest(FineTuneJob.model_validate(job_manifest("s3://a/b", "s3://a/c.jsonl", **spec)))

    assert digest(exports=[HUB]) == digest()
    assert digest(exports=[HUB], merge="Original") == digest(merge="Original") != digest()


def test_a_local_run_exports_its_artifact(bench: Workbench, secrets: Path, hub: HubServer) -> None:
    job = bench.job(output={"merge": "Original", "exports": [{"uri": f"file://{bench.folder}/copy"}, HUB]})
    ran = bench.run("train", job, "--secrets", str(secrets))
    assert ran.code == 0, ran.result.message
    made = {file.name: file.read_bytes() for file in (bench.output / "artifact").iterdir()}
    assert made.pop(PARITY_ROWS_FILE), "it has prompts of the data set, so exports omit it"
    made |= {f"merged/{file.name}": file.read_bytes() for file in (bench.output / "merged").iterdir()}
    copy = bench.folder / "copy"
    assert {str(file.relative_to(copy)): file.read_bytes() for file in copy.rglob("*") if file.is_file()} == made
    assert [commit.files for commit in hub.repositories["org/doors"].commits] == [made]
