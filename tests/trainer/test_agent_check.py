"""The agent of a pool rejects exactly those adapters that validation reports as unservable."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.trainer import agent_package  # noqa: F401 - before the agent's modules
from tests.trainer.methods_cases import CASES, LOFTQ, Case
from tests.trainer.methods_rig import plan, try_method
from tunesmith.api.finetunejob_status import ServableStatus
from tunesmith.contracts.agent import DesiredAdapter
from tunesmith.contracts.artifact import ArtifactAdapter, ArtifactBase, ArtifactFile, ArtifactManifest, digest_of
from tunesmith.contracts.location import ARTIFACT_MANIFEST, engine_name
from tunesmith.contracts.servability import ADAPTER_CONFIG, MAX_RANK
from tunesmith_server.artifact import PodLimits, fetch_artifact
from tunesmith_server.base_weights import read_base_weights
from tunesmith_server.lora import UnfitAdapterError
from tunesmith_trainer.errors import InvalidSpecError

if TYPE_CHECKING:
    from pathlib import Path

STORE, FINGERPRINT = "s3://tunesmith", "sha256:" + "b" * 64
_QV = ["q_proj", "v_proj"]
METHODS: dict[str, dict[str, Any]] = {
    "plain": {"lora": {"rank": 4, "alpha": 8}},
    "patterns": {
        "lora": {"rank": 4, "targetModules": _QV, "rankPattern": {"v_proj": 6}, "alphaPattern": {"q_proj": 3}}
    },
    "PiSSA with patterns and rsLora": {
        "lora": {
            "rank": 4,
            "initialization": "PiSSA",
            "rsLora": True,
            "targetModules": _QV,
            "rankPattern": {"v_proj": 6},
        }
    },
    "EVA": {"lora": {"rank": 4, "initialization": "EVA"}},
    "qlora": {"qlora": {"rank": 4}},
    "expressions": {
        "peft": {
            "type": "LORA",
            "config": {
                "r": 4,
                "lora_alpha": 8,
                "target_modules": r".*\.self_attn\.(q|v)_proj",
                "rank_pattern": {r".*\.1\.self_attn\.q_.*": 2},
                "alpha_pattern": {r"layers\.[01]\.self_attn\.v_proj": 2},
            },
        }
    },
    "layers": {"peft": {"type": "LORA", "config": {"r": 4, "target_modules": _QV, "layers_to_transform": [1]}}},
}


_EMBEDDING_AND_LAYERS = ["embed_tokens", *_QV]
OTHERS = {
    "an embedding": {"peft": {"type": "LORA", "config": {"r": 4, "target_modules": ["embed_tokens"]}}},
    "an embedding and a layer": {"peft": {"type": "LORA", "config": {"r": 4, "target_modules": _EMBEDDING_AND_LAYERS}}},
    "a rank above all pools'": {"peft": {"type": "LORA", "config": {"r": MAX_RANK + 1, "target_modules": ["q_proj"]}}},
    "modules by their ending": {"peft": {"type": "LORA", "config": {"r": 4, "target_modules": "all-linear"}}},
    "DoRA and a saved module": {"lora": {"dora": True, "targetModules": _QV, "modulesToSave": ["lm_head"]}},
}
EVERY = [*CASES, *(Case(name, method, None) for name, method in (METHODS | OTHERS).items())]


class FolderSource:
    """A folder that the agent reads like a store."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def size(self, name: str) -> int:
        return (self._folder / name).stat().st_size

    def read(self, name: str, start: int, end: int) -> bytes:
        return (self._folder / name).read_bytes()[start:end]

    def download(self, name: str, target: Path, size: int, progress: Any) -> str:
        target.write_bytes(self.read(name, 0, size))
        progress(size)
        return hashlib.sha256(target.read_bytes()).hexdigest()


def refusal(artifact: Path, base: Path, work: Path, max_ratio: float = 4.0) -> str | None:
    """Return the agent's reason to reject an artifact that its manifest calls servable; None if it accepts it."""
    config = artifact / ADAPTER_CONFIG
    rank = json.loads(config.read_text()).get("r") if config.exists() else None
    files = {
        path.name: ArtifactFile(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size_bytes=path.stat().st_size)
        for path in artifact.iterdir()
        if path.name != ARTIFACT_MANIFEST
    }
    manifest = ArtifactManifest(
        files=files,
        base=ArtifactBase(fingerprint=FINGERPRINT, uri="s3://tunesmith/models/tiny"),
        adapter=ArtifactAdapter(method="lora", rank=rank or None, target_modules=[]),
        dataset_digest="sha256:" + "0" * 64,
        hyperparameters={},
        versions={},
        servable=ServableStatus(vllm=True),
    ).to_bytes()
    (artifact / ARTIFACT_MANIFEST).write_bytes(manifest)
    digest = digest_of(manifest)
    wanted = DesiredAdapter(
        engine_name=engine_name("team", "pirate", digest), digest=digest, uri=f"{STORE}/team/pirate-1/artifact"
    )
    limits = PodLimits(STORE, FINGERPRINT, read_base_weights(base), max_rank=MAX_RANK, max_ratio=max_ratio)
    work.mkdir()
    try:
        fetch_artifact(wanted, limits, work, lambda _: FolderSource(artifact))
    except UnfitAdapterError as error:
        return str(error)
    return None


@pytest.mark.parametrize("case", EVERY, ids=[case.name for case in EVERY])
def test_the_agent_refuses_exactly_what_validation_calls_unservable(
    case: Case, base_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    method = case.quantized if LOFTQ in case.name and case.quantized is not None else case.method
    try:
        planned = plan(method, base_model)
    except InvalidSpecError:
        return  # it cannot be trained at all
    if planned.config is None:
        shutil.copytree(base_model, folder)
    else:
        try_method(method, base_model, folder, steps=1)
    refused = refusal(folder, base_model, tmp_path / "adapters")
    assert (refused is None) == planned.servable.vllm, (refused, planned.servable.reason)


@pytest.mark.parametrize(
    ("method", "reason", "remedy"),
    [
        ({"lora": {"rank": 4, "dora": True}}, "the adapter uses DoRA; vLLM does not support that", "remove dora ("),
        ({"ia3": {}}, "vLLM loads LORA adapters only, not IA3", "use method.lora, or merge the adapter"),
        (
            {"peft": {"type": "lily", "config": {"r": 4, "target_modules": _QV}}},
            "vLLM loads LORA adapters only, not LILY",
            "use method.lora; this adapter cannot be merged",
        ),
    ],
    ids=["DoRA", "IA3", "Lily"],
)
def test_validation_and_agent_give_the_same_reason(
    base_model: Path, tmp_path: Path, method: dict[str, Any], reason: str, remedy: str
) -> None:
    trial = try_method(method, base_model, tmp_path / "adapter", steps=1)
    assert refusal(tmp_path / "adapter", base_model, tmp_path / "adapters") == reason
    assert (trial.servable.reason or "").startswith(f"{reason}: {remedy}")


def test_an_expression_for_an_embedding_and_layers_is_saved_as_names(base_model: Path, tmp_path: Path) -> None:
    config = {"r": 4, "target_modules": r".*(embed_tokens|layers\.0\.self_attn\.q_proj)"}
    trial = try_method({"peft": {"type": "LORA", "config": config}}, base_model, tmp_path / "adapter", steps=1)
    saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert saved["target_modules"] == ["model.embed_tokens", "model.layers.0.self_attn.q_proj"]
    assert trial.servable.vllm
    assert refusal(tmp_path / "adapter", base_model, tmp_path / "adapters") is None


def test_expressions_are_saved_as_names(base_model: Path, tmp_path: Path) -> None:
    try_method(METHODS["expressions"], base_model, tmp_path / "adapter", steps=1)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    layers = [f"model.layers.{layer}.self_attn" for layer in (0, 1)]
    assert config["target_modules"] == [f"{layer}.{part}_proj" for layer in layers for part in "qv"]
    assert config["rank_pattern"] == {f"{layers[1]}.q_proj": 2}
    assert config["alpha_pattern"] == {f"{layer}.v_proj": 2 for layer in layers}
