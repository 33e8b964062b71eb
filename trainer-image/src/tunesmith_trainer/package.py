"""The artifact: adapter, tokenizer, scores, curves, model card and, last, the manifest; built here, then published."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, fields
from importlib.metadata import version
from typing import TYPE_CHECKING

from pydantic.alias_generators import to_camel
from safetensors import safe_open

from tunesmith.api.finetunejob_status import ArtifactStatus, ServableStatus
from tunesmith.contracts.artifact import ArtifactAdapter, ArtifactBase, ArtifactFile, ArtifactManifest, digest_of
from tunesmith.contracts.location import ARTIFACT_MANIFEST
from tunesmith_trainer import model
from tunesmith_trainer.errors import SelfCheckError
from tunesmith_trainer.spec import spec_digest
from tunesmith_trainer.store import file_sha256
from tunesmith_trainer.training.watch import CurvePoint

if TYPE_CHECKING:
    from pathlib import Path

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith_trainer.prepare import Prepared
    from tunesmith_trainer.store import Folder
    from tunesmith_trainer.training.loop import Trained

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CURVES = "metrics.csv"
_VERSIONED = ("tunesmith-trainer", "torch", "transformers", "peft", "trl", "bitsandbytes", "tokenizers", "safetensors")


def build(job: FineTuneJob, prepared: Prepared, trained: Trained, folder: Path) -> ArtifactManifest:
    """Writes every file of the artifact but its manifest into `folder`, and returns the manifest.

    The files hold no times and no paths of this machine: the same job gives the same bytes.

    Raises:
        SelfCheckError: the saved adapter is not the one that was asked for.
    """
    folder.mkdir(parents=True)
    trained.model.save_pretrained(str(folder), save_embedding_layers=False)
    _rewrite_config(folder / ADAPTER_CONFIG, job, prepared)
    check_weights(folder / ADAPTER_WEIGHTS, prepared.modules, job.spec.method.fields.rank)
    for file in model.tokenizer_files(prepared.base):
        (folder / file.name).write_bytes(file.read_bytes())
    _write_json(
        folder / "evaluation.json",
        {"heldOutLoss": trained.evaluation.manifest(), "rows": prepared.preflight.validation_rows},
    )
    write_curves(folder / CURVES, trained.curve)
    (folder / "README.md").write_text(_card(job, prepared, trained), encoding="utf-8")

    hyper = job.spec.hyperparameters.model_dump(mode="json", by_alias=True, exclude_none=True)
    decided = prepared.resolved.model_dump(
        mode="json", by_alias=True, include={"learning_rate", "batch_size", "micro_batch_size", "total_steps"}
    )
    evaluation = trained.evaluation
    return ArtifactManifest(
        files={
            file.name: ArtifactFile(sha256=file_sha256(file), size_bytes=file.stat().st_size)
            for file in sorted(folder.iterdir())
        },
        base=ArtifactBase(
            fingerprint=prepared.resolved.base_model_fingerprint or "",
            uri=job.spec.base_model.uri,
            revision=job.spec.base_model.revision,
        ),
        adapter=ArtifactAdapter(
            method="qlora" if job.spec.method.qlora else "lora",
            rank=job.spec.method.fields.rank,
            alpha=job.spec.method.fields.alpha,
            target_modules=prepared.resolved.target_modules or [],
        ),
        dataset_digest=prepared.resolved.dataset_digest or "",
        spec_digest=spec_digest(job),
        hyperparameters={**hyper, **decided},
        versions={name: version(name) for name in _VERSIONED},
        evaluation=evaluation,
        metrics=metrics_of(evaluation.base_loss, evaluation.loss),
        # Plain LoRA on linear modules is what vLLM loads as it is.
        servable=ServableStatus(vllm=True),
    )


def metrics_of(base_loss: float | None, loss: float | None) -> dict[str, float]:
    """The metrics of a result: held-out losses in nats per target token."""
    return {
        name: value
        for name, value in (("baseEvaluationLoss", base_loss), ("evaluationLoss", loss))
        if value is not None
    }


def publish(folder: Path, manifest: ArtifactManifest, target: Folder) -> ArtifactStatus:
    """Uploads the files, then the manifest if there is none: where another attempt was first, that is the result."""
    published = find(target)
    if published is None:
        for name in manifest.files:
            target.upload(name, folder / name)
        data = manifest.to_bytes()
        (folder / ARTIFACT_MANIFEST).write_bytes(data)
        if target.create(ARTIFACT_MANIFEST, data):
            return _status(target.uri, manifest, data)
        published = find(target)
    if published is None:
        raise SelfCheckError(
            f"{ARTIFACT_MANIFEST} in {target.uri} was there when it was to be written, and is gone now"
        )
    return published[1]


def find(target: Folder) -> tuple[ArtifactManifest, ArtifactStatus] | None:
    """The artifact that an earlier attempt published, or None.

    Raises:
        SelfCheckError: what is there is no manifest.
    """
    if not target.exists(ARTIFACT_MANIFEST):
        return None
    data = target.read(ARTIFACT_MANIFEST)
    try:
        manifest = ArtifactManifest.model_validate_json(data)
    except ValueError:
        raise SelfCheckError(f"{ARTIFACT_MANIFEST} in {target.uri} is damaged: remove it to publish anew") from None
    return manifest, _status(target.uri, manifest, data)


def _status(uri: str, manifest: ArtifactManifest, data: bytes) -> ArtifactStatus:
    size = len(data) + sum(file.size_bytes for file in manifest.files.values())
    return ArtifactStatus(uri=uri, digest=digest_of(data), size_bytes=size, servable=manifest.servable)


def check_weights(path: Path, modules: dict[str, tuple[int, int]], rank: int) -> None:
    """Checks names, shapes and values of the saved adapter: what PEFT and vLLM load under these names.

    Raises:
        SelfCheckError: with the first tensor that is wrong.
    """
    expected = {}
    for name, (wide, high) in modules.items():
        expected[f"base_model.model.{name}.lora_A.weight"] = (rank, wide)
        expected[f"base_model.model.{name}.lora_B.weight"] = (high, rank)
    problem: str | None = None
    with safe_open(path, framework="pt") as tensors:
        names = set(tensors.keys())
        for name in sorted(names ^ set(expected)):
            problem = f"{name} is {'missing' if name in expected else 'not of the adapter'}"
            break
        for name in sorted(names & set(expected)):
            tensor = tensors.get_tensor(name)
            if tuple(tensor.shape) != expected[name]:
                problem = f"{name} has the shape {list(tensor.shape)}, expected {list(expected[name])}"
            elif not bool(tensor.isfinite().all()):
                problem = f"{name} has values that are not finite"
    if problem is not None:
        raise SelfCheckError(f"the saved adapter is not what was trained: {problem}")


def write_curves(path: Path, curve: list[CurvePoint]) -> None:
    """The curves as CSV, one line per step and per evaluation; an empty cell is not measured there."""
    names = [field.name for field in fields(CurvePoint)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([to_camel(name) for name in names])
        for point in curve:
            writer.writerow(["" if value is None else value for value in asdict(point).values()])


def _rewrite_config(path: Path, job: FineTuneJob, prepared: Prepared) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = job.spec.base_model.uri.removeprefix("hf://")
    config["revision"] = job.spec.base_model.revision
    config["target_modules"] = prepared.resolved.target_modules
    _write_json(path, config)


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _card(job: FineTuneJob, prepared: Prepared, trained: Trained) -> str:
    spec, fields_, evaluation = job.spec, job.spec.method.fields, trained.evaluation
    method = "QLoRA (nf4)" if spec.method.qlora else "LoRA"
    base = spec.base_model.uri
    front = ["library_name: peft", "pipeline_tag: text-generation", "tags: [lora, tunesmith]"]
    if base.startswith("hf://"):
        front.insert(0, f"base_model: {base.removeprefix('hf://')}")
    resolved, counted = prepared.resolved, prepared.preflight
    return "\n".join(
        [
            "---",
            *front,
            "---",
            f"# {job.metadata.name}",
            "",
            f"A {method} adapter for `{base}`, trained with Tunesmith on {counted.rows} rows, {counted.tokens} tokens.",
            "",
            "| | |",
            "|---|---|",
            f"| Held-out loss, base | {evaluation.base_loss:.4f} nats per target token |",
            f"| Held-out loss, adapter | {evaluation.loss:.4f} ({-(evaluation.loss_reduction_percent or 0):+.1f} %) |",
            f"| Held-out rows | {counted.validation_rows} |",
            f"| Rank, alpha | {fields_.rank}, {fields_.alpha} |",
            f"| Modules | {', '.join(resolved.target_modules or [])} |",
            f"| Steps, batch size | {resolved.total_steps}, {resolved.batch_size} |",
            f"| Learning rate | {resolved.learning_rate:g}, {spec.hyperparameters.scheduler} |",
            f"| Seed | {spec.hyperparameters.seed} |",
            "",
            "Load it with PEFT:",
            "",
            "```python",
            "from peft import AutoPeftModelForCausalLM",
            "# base_model_name_or_path of adapter_config.json must be reachable",
            'model = AutoPeftModelForCausalLM.from_pretrained("path/of/this/folder")',
            "```",
            "",
        ]
    )
