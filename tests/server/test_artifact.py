"""Artifacts that the agent accepts or refuses, with a real S3 server and real artifacts."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.server.server_rig import STORE, Artifact, S3Server, write_safetensors
from tunesmith.contracts.agent import DesiredAdapter
from tunesmith.contracts.artifact import ArtifactFile
from tunesmith.contracts.safetensors import read_tensors
from tunesmith.storage.credentials import Credentials, Origin
from tunesmith_server.artifact import PodLimits, fetch_artifact, remove_leftovers, remove_revision, stored_sizes
from tunesmith_server.base_weights import read_base_weights
from tunesmith_server.lora import UnfitAdapterError
from tunesmith_server.store import StoreError, StoreFolder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def limits(base: Path, fingerprint: str) -> PodLimits:
    return PodLimits(STORE, fingerprint, read_base_weights(base), max_rank=16, max_ratio=10.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    return tmp_path / "adapters"


def fetch(entry: dict[str, str], limits: PodLimits, folder: Path, store: S3Server) -> Path:
    return fetch_artifact(DesiredAdapter.model_validate(entry), limits, folder, opening(store.secret))


def opening(secret: dict[str, str]) -> Callable[[str], StoreFolder]:
    return lambda uri: StoreFolder(uri, Credentials(secret, "the Secret of the tests", Origin.SECRET))


def refusal(entry: dict[str, str], limits: PodLimits, folder: Path, store: S3Server) -> str:
    with pytest.raises(UnfitAdapterError) as refused:
        fetch(entry, limits, folder, store)
    assert set(stored_sizes(folder)) == set()
    assert list(folder.iterdir()) == []
    return str(refused.value)


def tensors(artifact: Artifact) -> dict[str, np.ndarray[Any, Any]]:
    path = artifact.folder / "adapter_model.safetensors"
    content = path.read_bytes()
    return {
        name: np.frombuffer(content[tensor.start : tensor.end], np.float32).reshape(tensor.shape).copy()
        for name, tensor in read_tensors(path).items()
    }


def test_a_valid_artifact_is_stored_in_the_folder_of_its_digest(
    adapter: Callable[..., Artifact], limits: PodLimits, folder: Path, store: S3Server
) -> None:
    artifact = adapter()
    (artifact.folder / "tokenizer.json").write_text("{}")  # the engine does not need it
    entry = artifact.publish(store)
    place = fetch(entry, limits, folder, store)
    assert place == folder / entry["digest"].removeprefix("sha256:")
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {
        name: (artifact.folder / name).read_bytes()
        for name in ("adapter_config.json", "adapter_model.safetensors", "tunesmith.json")
    }
    assert set(stored_sizes(folder)) == {entry["digest"]}
    assert fetch(entry, limits, folder, store) == place


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "tunesmith.json"])
def test_a_flipped_bit_anywhere_is_detected(
    adapter: Callable[..., Artifact], limits: PodLimits, folder: Path, store: S3Server, file: str
) -> None:
    entry = adapter().publish(store)
    content = bytearray(store.files.cat_file(f"{entry['uri']}/{file}"))
    content[len(content) // 2] ^= 1
    store.files.pipe_file(f"{entry['uri']}/{file}", bytes(content))
    assert f"{file} was changed after the artifact was published" in refusal(entry, limits, folder, store)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"peft_type": "IA3"}, "vLLM loads LORA adapters only, not IA3"),
        ({"task_type": "SEQ_CLS"}, "the adapter's task is SEQ_CLS"),
        ({"use_dora": True}, "uses DoRA"),
        ({"bias": "all"}, "bias=all"),
        ({"modules_to_save": ["lm_head"]}, "fully trained modules"),
        ({"auto_map": {"AutoModel": "x.py"}}, "custom code"),
        ({"init_lora_weights": "pissa_niter_4"}, "the initialization pissa_niter_4"),
        ({"r": 0}, "r of adapter_config.json must be a natural number"),
        ({"r": "8"}, "r of adapter_config.json must be a natural number"),
        ({"r": 32}, "the adapter's rank is 32; the pool's engine.maxLoraRank is 16"),
        ({"rank_pattern": {"q_proj": 64}}, "the adapter's rank is 64"),
        ({"rank_pattern": {"q_proj": 4}}, "lora_A of model.layers.0.self_attn.q_proj has the shape [8, 576]"),
        ({"rank_pattern": {"(": 4}}, "regular expressions are not accepted"),
    ],
)
def test_unsupported_configurations_are_refused_by_name(
    adapter: Callable[..., Artifact],
    limits: PodLimits,
    folder: Path,
    store: S3Server,
    change: dict[str, Any],
    sentence: str,
) -> None:
    artifact = adapter()
    config = artifact.folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert sentence in refusal(artifact.publish(store), limits, folder, store)


def _nan(weights: dict[str, Any]) -> None:
    weights[f"{PREFIX}.lora_B.weight"][5, 5] = np.nan


def _infinite(weights: dict[str, Any]) -> None:
    weights[f"{PREFIX}.lora_A.weight"][0, 0] = -np.inf


def _narrow(weights: dict[str, Any]) -> None:
    weights[f"{PREFIX}.lora_A.weight"] = np.zeros((8, 64), np.float32)


def _lonely(weights: dict[str, Any]) -> None:
    del weights[f"{PREFIX}.lora_B.weight"]


def _extra_layer(weights: dict[str, Any]) -> None:
    for part in ("lora_A", "lora_B"):
        weights[f"base_model.model.model.layers.99.self_attn.q_proj.{part}.weight"] = np.zeros((8, 8), np.float32)


def _wrong_prefix(weights: dict[str, Any]) -> None:
    weights[f"{PREFIX}.lora_A.weight".removeprefix("base_model.")] = weights.pop(f"{PREFIX}.lora_A.weight")


def _norm(weights: dict[str, Any]) -> None:
    for part in ("lora_A", "lora_B"):
        weights[f"base_model.model.model.norm.{part}.weight"] = np.zeros((8, 8), np.float32)


def _nothing(weights: dict[str, Any]) -> None:
    weights.clear()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_nan, "lora_B of model.layers.0.self_attn.q_proj contains values that are infinite or not a number"),
        (_infinite, "lora_A of model.layers.0.self_attn.q_proj contains values that are infinite or not a number"),
        (_narrow, "has the shape [8, 64] and the base model and rank 8 need [8, 576]"),
        (_lonely, "q_proj has only one of lora_A and lora_B"),
        (_extra_layer, "the base model has no model.layers.99.self_attn.q_proj.weight"),
        (_wrong_prefix, "is not one of a LoRA adapter"),
        (_norm, "model.norm of the base model is not a linear layer"),
        (_nothing, "contains no tensors"),
    ],
)
def test_weights_that_do_not_fit_the_base_are_refused(
    adapter: Callable[..., Artifact],
    limits: PodLimits,
    folder: Path,
    store: S3Server,
    damage: Callable[[dict[str, Any]], None],
    sentence: str,
) -> None:
    artifact = adapter()
    weights = tensors(artifact)
    damage(weights)
    write_safetensors(artifact.folder / "adapter_model.safetensors", weights)
    assert sentence in refusal(artifact.publish(store), limits, folder, store)


@pytest.mark.parametrize(
    ("cut", "sentence"),
    [
        (lambda content: content[:-4], "is damaged: it has"),
        (lambda content: content[:4], "is not a safetensors file"),
        (lambda content: b"\x80\x04pickle" + content, "is not a safetensors file"),
        (lambda content: content[:8] + b"!" + content[9:], "damaged safetensors header"),
    ],
)
def test_a_damaged_weights_file_is_refused(
    adapter: Callable[..., Artifact],
    limits: PodLimits,
    folder: Path,
    store: S3Server,
    cut: Callable[[bytes], bytes],
    sentence: str,
) -> None:
    artifact = adapter()
    path = artifact.folder / "adapter_model.safetensors"
    path.write_bytes(cut(path.read_bytes()))
    assert sentence in refusal(artifact.publish(store), limits, folder, store)


@pytest.mark.parametrize(
    ("dtype", "bits", "sentence"),
    [
        ("F16", 0x2C00, None),  # 1/16
        ("F16", 0x7BFF, "more than the largest 16-bit float"),
        ("F16", 0x7C00, "infinite or not a number"),
        ("BF16", 0x3D80, None),
        ("BF16", 0x7F7F, "more than the largest 16-bit float"),
        ("BF16", 0xFF80, "infinite or not a number"),
    ],
)
def test_half_precision_is_checked_bit_by_bit(
    adapter: Callable[..., Artifact],
    limits: PodLimits,
    folder: Path,
    store: S3Server,
    dtype: str,
    bits: int,
    sentence: str | None,
) -> None:
    artifact = adapter()
    weights = {name: np.full(tensor.shape, bits, np.uint16) for name, tensor in tensors(artifact).items()}
    write_safetensors(artifact.folder / "adapter_model.safetensors", weights, dtype)
    entry = artifact.publish(store)
    if sentence is None:
        assert fetch(entry, limits, folder, store).is_dir()
    else:
        assert sentence in refusal(entry, limits, folder, store)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("adapter_model.bin", "code and pickle files are refused"),
        ("weights.pt", "code and pickle files are refused"),
        ("modeling.py", "code and pickle files are refused"),
        ("other.safetensors", "code and pickle files are refused"),
        ("../../escape.json", "not a plain file name"),
        ("/etc/passwd", "not a plain file name"),
        ("..", "not a plain file name"),
        (".hidden.json", "not a plain file name"),
        ("tunesmith.json", "not a plain file name"),
    ],
)
def test_unexpected_files_are_refused(
    adapter: Callable[..., Artifact], limits: PodLimits, folder: Path, store: S3Server, name: str, sentence: str
) -> None:
    artifact = adapter()
    artifact.seal()
    files = {
        path.name: ArtifactFile(sha256="0" * 64, size_bytes=path.stat().st_size) for path in artifact.folder.iterdir()
    } | {name: ArtifactFile(sha256="0" * 64, size_bytes=1)}
    if name != "tunesmith.json":
        files.pop("tunesmith.json")
    entry = artifact.upload(store, artifact.seal(files=files), "team", "pirate")
    assert sentence in refusal(entry, limits, folder, store)


def test_an_adapter_of_another_base_is_refused(
    adapter: Callable[..., Artifact], limits: PodLimits, folder: Path, store: S3Server
) -> None:
    artifact = adapter()
    artifact.fingerprint = "sha256:" + "1" * 64
    entry = artifact.publish(store)
    assert "was trained on another base model" in refusal(entry, limits, folder, store)
    equivalent = dataclasses.replace(limits, equivalent_to="sha256:" + "1" * 64)
    assert fetch(entry, equivalent, folder, store).is_dir()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"uri": "s3://tunesmith/elsewhere/team/x/artifact"}, "is not in the part of the store that belongs to team"),
        ({"uri": f"{STORE}/other/x/artifact"}, "is not in the part of the store that belongs to team"),
        ({"uri": f"{STORE}/team/../other/x/artifact"}, "is not in the part of the store that belongs to team"),
        ({"uri": "file:///etc"}, "is not in the part of the store that belongs to team"),
        ({"engineName": "team/pirate@000000000000"}, "is not the engine name of a revision"),
        ({"engineName": "team"}, "is not the engine name of a revision"),
    ],
)
def test_locations_outside_the_namespace_are_never_read(
    adapter: Callable[..., Artifact],
    limits: PodLimits,
    folder: Path,
    store: S3Server,
    change: dict[str, str],
    sentence: str,
) -> None:
    entry = adapter().publish(store)
    assert sentence in refusal(entry | change, limits, folder, store)


def test_missing_objects_are_named(
    adapter: Callable[..., Artifact], limits: PodLimits, folder: Path, store: S3Server
) -> None:
    entry = adapter().publish(store)
    store.files.rm(f"{entry['uri']}/adapter_model.safetensors")
    with pytest.raises(StoreError, match=r"adapter_model\.safetensors does not exist") as missing:
        fetch(entry, limits, folder, store)
    assert not missing.value.permanent
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "access to .* was denied with the credentials of the Secret of the tests"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "access to .* was denied with the credentials of the Secret of the tests"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "could not be reached"),
    ],
)
def test_a_store_that_misbehaves_is_reported(
    adapter: Callable[..., Artifact],
    limits: PodLimits,
    folder: Path,
    store: S3Server,
    change: dict[str, str],
    sentence: str,
) -> None:
    entry = DesiredAdapter.model_validate(adapter().publish(store))
    with pytest.raises(StoreError, match=sentence) as failure:
        fetch_artifact(entry, limits, folder, opening(store.secret | change))
    assert not failure.value.permanent
    assert store.secret["AWS_SECRET_ACCESS_KEY"] not in str(failure.value)


def test_leftovers_of_a_killed_download_are_removed(folder: Path) -> None:
    (folder / ".incoming-x/artifact").mkdir(parents=True)
    (folder / ("a" * 64)).mkdir()
    remove_leftovers(folder)
    assert [path.name for path in folder.iterdir()] == ["a" * 64]


ANSWERS = json.dumps({"schemaVersion": 1, "dataType": "float32", "probes": []})


def test_the_expected_answers_are_stored_and_a_copy_may_lack_those_to_rows(
    adapter: Callable[..., Artifact], limits: PodLimits, folder: Path, store: S3Server
) -> None:
    artifact = adapter()
    for name in ("parity.json", "parity-rows.json"):
        (artifact.folder / name).write_text(ANSWERS)
    entry = artifact.publish(store)
    place = fetch(entry, limits, folder, store)
    assert (place / "parity.json").read_text() == (place / "parity-rows.json").read_text() == ANSWERS
    copy = adapter(seed=2)
    for name in ("parity.json", "parity-rows.json"):
        (copy.folder / name).write_text(ANSWERS)
    entry = copy.publish(store)
    store.files.rm(f"{entry['uri']}/parity-rows.json")
    place = fetch(entry, limits, folder, store)
    assert sorted(path.name for path in place.glob("parity*")) == ["parity.json"]
    store.files.rm(f"{entry['uri']}/parity.json")
    remove_revision(folder, entry["digest"])
    with pytest.raises(StoreError, match=r"parity\.json"):
        fetch(entry, limits, folder, store)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ANSWERS.replace("[]", "[{}]"), "parity.json is malformed: probes.0.promptTokenIds: Field required"),
        ("[" * 100_000, "parity.json is malformed: it has more than 65536 values"),
        (" " * (512 * 1024 + 1), "parity.json has 524289 bytes; at most 524288 are read"),
    ],
)
def test_hostile_expected_answers_are_refused(
    adapter: Callable[..., Artifact], limits: PodLimits, folder: Path, store: S3Server, content: str, message: str
) -> None:
    artifact = adapter()
    (artifact.folder / "parity.json").write_text(content)
    assert message in refusal(artifact.publish(store), limits, folder, store)
