"""The command `import`: a PEFT adapter becomes an artifact; artifacts are copied; hostile input is refused."""

from __future__ import annotations

import json
import os
import shutil
import struct
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer.foreign_rig import change_config, import_adapter, loaded, logits, peft_adapter, rename_tensors
from tests.trainer.tiny_model import make
from tunesmith.api.conditions import FailureReason
from tunesmith.api.finetunejob_status import EvaluationStatus, GateStatus
from tunesmith.contracts.artifact import digest_of, parse_manifest
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint
from tunesmith.contracts.location import ARTIFACT_MANIFEST
from tunesmith.contracts.owner import OWNER_FILE, Owner
from tunesmith.contracts.parity import PARITY_FILE, PARITY_ROWS_FILE, Parity
from tunesmith.contracts.result import Outcome, TrainerResult
from tunesmith.contracts.servability import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter_config
from tunesmith_trainer.foreign.adapter import run as import_into
from tunesmith_trainer.main import run
from tunesmith_trainer.options import Command, ImportOptions
from tunesmith_trainer.process.progress import Progress
from tunesmith_trainer.store import Stores

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.trainer.s3server import S3Server
    from tests.trainer.trainer_rig import Workbench


def test_a_peft_adapter_becomes_an_artifact_with_the_same_logits(base_model: Path, tmp_path: Path) -> None:
    expected = peft_adapter(base_model, tmp_path / "adapter")
    imported = import_adapter(tmp_path / "adapter", base_model, tmp_path)
    assert imported.code == 0, imported.result.message
    assert (imported.logits(base_model) - expected).abs().max() <= 1e-4
    assert (logits(loaded(base_model)) - expected).abs().max() > 1e-2
    manifest = parse_manifest((imported.folder / ARTIFACT_MANIFEST).read_bytes())
    assert manifest.base.fingerprint == base_fingerprint(LocalModelFolder(base_model))
    assert manifest.servable.vllm
    assert manifest.imported_from is not None
    assert manifest.imported_from.layout == "PEFT"
    assert manifest.evaluation is manifest.dataset_digest is None
    assert check_adapter_config(imported.config).rank == manifest.adapter.rank == 4
    assert Parity.model_validate_json((imported.folder / PARITY_FILE).read_bytes()).probes
    result = imported.result
    assert result.imported is not None
    assert (result.imported.rank, result.imported.parity) == (4, True)
    assert result.imported.base_model_fingerprint == manifest.base.fingerprint
    assert result.artifact is not None
    assert result.artifact.servable.vllm


def test_the_owner_is_recorded_in_the_folder_of_the_store(base_model: Path, tmp_path: Path) -> None:
    peft_adapter(base_model, tmp_path / "adapter")
    owner = Owner(cluster="here", namespace="team", name="doors", uid="1-2")
    options = ("--job-folder", f"file://{tmp_path}/store", "--cluster", "here", "--owner", "team/doors/1-2")
    assert import_adapter(tmp_path / "adapter", base_model, tmp_path, *options).code == 0
    assert Owner.model_validate_json((tmp_path / "store" / OWNER_FILE).read_bytes()) == owner


def test_from_a_store_into_a_store_as_in_a_pod(uploaded: S3Server, base_model: Path, tmp_path: Path) -> None:
    peft_adapter(base_model, tmp_path / "adapter")
    filesystem = uploaded.filesystem()
    for file in (tmp_path / "adapter").iterdir():
        filesystem.put_file(str(file), f"tunesmith/adapters/doors/{file.name}")
    message, output = tmp_path / "message", "tunesmith/store/team/doors-1-2/import-0a1b2c3d/artifact"
    arguments = ["import", "--adapter", "s3://tunesmith/adapters/doors", "--base", "s3://tunesmith/models/tiny"]
    arguments += ["--output", f"s3://{output}", "--work", str(tmp_path / "work"), "--termination-message", str(message)]
    assert run(arguments) == 0, message.read_text()
    result = TrainerResult.model_validate_json(message.read_text())
    assert result.artifact is not None
    assert result.artifact.uri == f"s3://{output}"
    manifest = filesystem.cat_file(f"{output}/{ARTIFACT_MANIFEST}")
    assert result.artifact.digest == digest_of(manifest)
    stored = {name.rpartition("/")[2] for name in filesystem.ls(output, detail=False)}
    assert stored == {*parse_manifest(manifest).files, ARTIFACT_MANIFEST}
    assert PARITY_FILE in stored


def test_images_are_read_where_the_pod_mounts_them(base_model: Path, tmp_path: Path) -> None:
    peft_adapter(base_model, tmp_path / "claims/_adapter/doors")
    shutil.copytree(base_model, tmp_path / "claims/_base")
    options = ImportOptions(
        command=Command.IMPORT,
        secrets=tmp_path,
        format="text",
        progress_port=0,
        allow_file=True,
        output=str(tmp_path / "out"),
        adapter="oci://registry.example/adapters:1.0/doors",
        base="oci://registry.example/models/tiny:1.0",
    )
    stores = Stores(secrets=tmp_path, allow_file=True, claims=tmp_path / "claims")
    assert import_into(options, stores, tmp_path / "work", Progress("text")).outcome is Outcome.SUCCEEDED
    manifest = parse_manifest((tmp_path / "out/artifact" / ARTIFACT_MANIFEST).read_bytes())
    assert manifest.imported_from is not None
    assert (manifest.imported_from.uri, manifest.base.uri) == (options.adapter, options.base)


def test_a_second_attempt_finds_the_artifact_of_the_first(base_model: Path, tmp_path: Path) -> None:
    peft_adapter(base_model, tmp_path / "adapter")
    first = import_adapter(tmp_path / "adapter", base_model, tmp_path)
    (tmp_path / "adapter" / ADAPTER_WEIGHTS).unlink()
    second = import_adapter(tmp_path / "adapter", base_model, tmp_path)
    assert second.code == 0
    assert second.result.artifact == first.result.artifact
    assert second.result.imported == first.result.imported


def test_an_artifact_is_copied_unchanged_with_its_digest(base_model: Path, tmp_path: Path) -> None:
    peft_adapter(base_model, tmp_path / "adapter")
    first = import_adapter(tmp_path / "adapter", base_model, tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    second = import_adapter(first.folder, base_model, copy)
    assert second.code == 0, second.result.message
    assert first.result.artifact is not None
    assert second.result.artifact is not None
    assert second.result.artifact.digest == first.result.artifact.digest
    for file in first.folder.iterdir():
        assert (second.folder / file.name).read_bytes() == file.read_bytes()


def test_the_gates_that_an_artifact_missed_are_counted(base_model: Path, tmp_path: Path) -> None:
    peft_adapter(base_model, tmp_path / "adapter")
    first = import_adapter(tmp_path / "adapter", base_model, tmp_path)
    assert first.result.imported is not None
    assert first.result.imported.missed_gates is None
    manifest = parse_manifest((first.folder / ARTIFACT_MANIFEST).read_bytes())
    gates = [GateStatus(suite="rows", metric="Loss", value=value, max=1.0, passed=value <= 1) for value in (0.5, 2.0)]
    manifest = manifest.model_copy(update={"evaluation": EvaluationStatus(gates=gates)})
    (first.folder / ARTIFACT_MANIFEST).write_bytes(manifest.to_bytes())
    copy = tmp_path / "copy"
    copy.mkdir()
    second = import_adapter(first.folder, base_model, copy)
    assert second.code == 0, second.result.message
    assert second.result.imported is not None
    assert second.result.imported.missed_gates == 1


def test_training_continues_from_an_imported_adapter(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft_adapter(bench.base, tmp_path / "adapter", scale=0.02)
    imported = import_adapter(tmp_path / "adapter", bench.base, tmp_path / "adapter")
    start = {"artifact": {"uri": f"file://{imported.folder}"}}
    job = bench.job(continueFrom=start)
    del job["spec"]["method"]
    trained = bench.run("train", job)
    assert trained.code == 0, trained.result.message
    document = json.loads((bench.output / "artifact" / ARTIFACT_MANIFEST).read_text())
    assert imported.result.artifact is not None
    assert [entry["digest"] for entry in document["continuedFrom"]] == [imported.result.artifact.digest]
    monkeypatch.setattr("tunesmith_trainer.foreign.base.available_memory", lambda: 1000)
    again = tmp_path / "again"
    again.mkdir()
    without = import_adapter(tmp_path / "adapter", bench.base, again)
    job["spec"]["continueFrom"] = {"artifact": {"uri": f"file://{without.folder}"}}
    assert "has no parity.json, since it was imported where" in bench.run("validate", job).result.message


def test_an_exported_artifact_keeps_its_scores_and_the_digest_of_its_data(bench: Workbench, tmp_path: Path) -> None:
    trained = bench.run("train", bench.job())
    assert trained.result.artifact is not None
    exported = tmp_path / "exported"
    shutil.copytree(bench.output / "artifact", exported)
    (exported / PARITY_ROWS_FILE).unlink()
    manifest = json.loads((exported / ARTIFACT_MANIFEST).read_text())
    work = tmp_path / "import"
    work.mkdir()
    imported = import_adapter(exported, bench.base, work, "--digest", trained.result.artifact.digest)
    assert imported.code == 0, imported.result.message
    assert imported.result.artifact is not None
    assert imported.result.artifact.digest == trained.result.artifact.digest
    copied = json.loads((imported.folder / ARTIFACT_MANIFEST).read_text())
    assert copied == manifest
    assert copied["evaluation"]["loss"] > 0
    assert copied["datasetDigest"].startswith("sha256:")
    assert not (imported.folder / PARITY_ROWS_FILE).exists()


def test_a_changed_artifact_and_another_digest_are_refused(base_model: Path, tmp_path: Path) -> None:
    peft_adapter(base_model, tmp_path / "adapter")
    first = import_adapter(tmp_path / "adapter", base_model, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    refused = import_adapter(first.folder, base_model, other, "--digest", f"sha256:{'0' * 64}")
    assert refused.code == 2
    assert "it is another artifact" in refused.result.message
    weights = bytearray((first.folder / ADAPTER_WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (first.folder / ADAPTER_WEIGHTS).write_bytes(weights)
    refused = import_adapter(first.folder, base_model, other)
    assert refused.code == 2
    assert "was changed after it was published" in refused.result.message


def test_an_adapter_with_dora_is_imported_and_not_servable(base_model: Path, tmp_path: Path) -> None:
    expected = peft_adapter(base_model, tmp_path / "adapter", use_dora=True)
    imported = import_adapter(tmp_path / "adapter", base_model, tmp_path)
    assert imported.code == 0, imported.result.message
    assert (imported.logits(base_model) - expected).abs().max() <= 1e-4
    assert imported.result.artifact is not None
    assert not imported.result.artifact.servable.vllm
    assert "DoRA" in str(imported.result.artifact.servable.reason)


def _refusal(adapter: Path, base_model: Path, tmp_path: Path) -> str:
    imported = import_adapter(adapter, base_model, tmp_path)
    assert imported.code == 2, imported.result
    assert imported.result.reason in {FailureReason.INVALID_SPEC, FailureReason.ADAPTER_NOT_FOUND}
    assert not (imported.folder / ARTIFACT_MANIFEST).exists()
    return imported.result.message


def test_pickled_weights_are_refused_with_the_command_that_converts_them(base_model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    peft_adapter(base_model, adapter)
    torch.save(load_file(adapter / ADAPTER_WEIGHTS), adapter / "adapter_model.bin")
    (adapter / ADAPTER_WEIGHTS).unlink()
    message = _refusal(adapter, base_model, tmp_path)
    assert "adapter_model.bin, a pickle file" in message
    assert "weights_only=True" in message


Tensors = dict[str, torch.Tensor]


def _first(tensors: Tensors) -> str:
    return min(tensors)


def _with_long_header(adapter: Path) -> None:
    with (adapter / ADAPTER_WEIGHTS).open("r+b") as file:
        file.write(struct.pack("<Q", 2**24 + 1))
        file.truncate(2**24 + 9)


DAMAGED_FILES: dict[str, Callable[[Path], object]] = {
    "is damaged": lambda adapter: os.truncate(adapter / ADAPTER_WEIGHTS, 6000),
    "has a header of": _with_long_header,
    "has rank 4, and adapter_config.json states 8": lambda adapter: change_config(adapter, r=8),
    "the base model has no module model.layers.7.self_attn.q_proj": lambda adapter: rename_tensors(
        adapter, lambda name: name.replace("layers.1", "layers.7")
    ),
    "adapter_config.json is malformed": lambda adapter: (adapter / ADAPTER_CONFIG).write_text("{"),
    "more than 262144": lambda adapter: change_config(adapter, x=" " * 300_000),
    "regular expression": lambda adapter: change_config(adapter, alpha_pattern={"(a+)+$": 4}),
    "it replicates layers of the base": lambda adapter: change_config(adapter, layer_replication=[[0, 10**9]]),
    "only LoRA adapters are imported": lambda adapter: change_config(adapter, peft_type="LOHA"),
    "which this release of PEFT does not know": lambda adapter: change_config(adapter, use_magic=True),
}


@pytest.mark.parametrize("text", DAMAGED_FILES)
def test_hostile_and_damaged_files_are_refused(base_model: Path, tmp_path: Path, text: str) -> None:
    peft_adapter(base_model, tmp_path / "adapter")
    DAMAGED_FILES[text](tmp_path / "adapter")
    assert text in _refusal(tmp_path / "adapter", base_model, tmp_path)


DAMAGED_TENSORS: dict[str, Callable[[Tensors], Tensors]] = {
    "infinite or not a number": lambda tensors: tensors | {_first(tensors): tensors[_first(tensors)] * float("nan")},
    "weights must be F16, BF16 or F32": lambda tensors: tensors | {_first(tensors): tensors[_first(tensors)].double()},
    "model.layers.0.self_attn.q_proj has only one of lora_A and lora_B": lambda tensors: {
        name: tensor for name, tensor in tensors.items() if name != _first(tensors)
    },
}


@pytest.mark.parametrize("text", DAMAGED_TENSORS)
def test_damaged_tensors_are_refused(base_model: Path, tmp_path: Path, text: str) -> None:
    adapter = tmp_path / "adapter"
    peft_adapter(base_model, adapter)
    save_file(DAMAGED_TENSORS[text](load_file(adapter / ADAPTER_WEIGHTS)), adapter / ADAPTER_WEIGHTS)
    assert text in _refusal(adapter, base_model, tmp_path)


def test_an_adapter_of_a_wider_base_is_refused(base_model: Path, tmp_path: Path) -> None:
    peft_adapter(make(tmp_path / "wider", hidden=96), tmp_path / "adapter")
    assert "the adapter is of another base model" in _refusal(tmp_path / "adapter", base_model, tmp_path)


def test_a_folder_without_an_adapter_is_refused(base_model: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter" / "checkpoint-20").mkdir(parents=True)
    (tmp_path / "adapter" / "checkpoint-100").mkdir()
    assert "name one of them, such as checkpoint-100" in _refusal(tmp_path / "adapter", base_model, tmp_path)
