"""Build the artifact (adapter, tokenizer, scores, curves, model card and, last, the manifest), then publish it."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from pydantic.alias_generators import to_camel
from safetensors import safe_open

from tunesmith.api.finetunejob_status import ArtifactStatus
from tunesmith.api.hyperparameters import Precision
from tunesmith.api.output import Merge
from tunesmith.contracts.artifact import ArtifactAdapter, ArtifactBase, ArtifactFile, ArtifactManifest, digest_of
from tunesmith.contracts.location import ARTIFACT_MANIFEST, MERGED_MANIFEST
from tunesmith.contracts.parity import PARITY_FILE, PARITY_ROWS_FILE, gap_of
from tunesmith.contracts.servability import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tunesmith_trainer.artifact import card, curves, merge, parity
from tunesmith_trainer.base_model import model
from tunesmith_trainer.base_model.logits import relative_distance
from tunesmith_trainer.base_model.precision import dtype_of
from tunesmith_trainer.base_model.stored import copy_generation_settings, stored_quantization
from tunesmith_trainer.errors import SelfCheckError, StorageUnavailableError
from tunesmith_trainer.methods import conversion, full, servable
from tunesmith_trainer.reporting.curve import CurvePoint
from tunesmith_trainer.store import file_sha256

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.finetunejob_status import EvaluationStatus
    from tunesmith.storage.folder import Folder
    from tunesmith_trainer.methods.config import MethodPlan
    from tunesmith_trainer.preflight.prepare import Prepared
    from tunesmith_trainer.training.loop import Trained

CURVES = "metrics.csv"
PICTURE = "curves.png"
_EXACT_LIMIT, _ROUNDED_LIMIT = 1e-3, 1e-1
"""Limits of the relative distance of logits: in float32, and where weights or products are rounded to fewer bits."""
_BESIDE_LOSS = ("publishedStep", "stoppedEarlyAt", "scores", "gates", "failures")
"""Fields of the scores that `evaluation.json` does not have under `heldOutLoss`."""
_VERSIONED = ("tunesmith-trainer", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors")


def build(
    job: FineTuneJob, prepared: Prepared, trained: Trained, folder: Path, merged: Path
) -> tuple[ArtifactManifest, float | None]:
    """Write every file of the artifact except its manifest into `folder`.

    If the job requests merged weights, they are written into `merged`. The trained model is consumed.

    The files contain no times and no local paths: the same job gives the same bytes.

    Returns:
        The manifest, and the distance of the merged model from the trained one, or None if nothing was merged.

    Raises:
        SelfCheckError: the saved adapter is not the one that was requested.
    """
    folder.mkdir(parents=True)
    config = model.load_config(prepared.base, job.spec.base_model.uri)
    saved = _save_weights(job, prepared, trained, folder, config)
    _write_tokenizer(job, prepared, folder)
    _write_scores(job, prepared, trained, folder)
    # The following steps load the base again; memory need not hold both.
    for parameter in trained.model.parameters():
        parameter.data = torch.empty(0)
    merge_error = _merge(job, prepared, trained, folder, merged, config)
    error, gap = _probe_parity(job, prepared, trained, folder, config)
    versions = {name: version(name) for name in _VERSIONED}
    text = card.text(job, prepared, trained, versions, merge_error, gap)
    (folder / "README.md").write_text(text, encoding="utf-8")
    adapter = ArtifactAdapter(
        method=job.spec.method.name,
        rank=saved["r"] if saved.get("peft_type") == "LORA" else None,
        alpha=saved["lora_alpha"] if saved.get("peft_type") == "LORA" else None,
        target_modules=prepared.resolved.target_modules or [],
        relative_logit_error=error,
        parity_gap=gap,
    )
    manifest = _manifest(job, prepared, trained, folder, adapter, versions)
    if merge_error is not None:
        manifest = manifest.model_copy(update={"merged_sha256": file_sha256(merged / MERGED_MANIFEST)})
    return manifest, merge_error


def _save_weights(
    job: FineTuneJob, prepared: Prepared, trained: Trained, folder: Path, config: PretrainedConfig
) -> dict[str, Any]:
    """Save the adapter, or all weights, and return PEFT's configuration of it; empty if all weights were trained.

    Raises:
        SelfCheckError: the saved files differ from what was requested.
    """
    if prepared.planned.config is None:
        full.save(trained.model, folder, config, parity.serving_type(config))
        copy_generation_settings(prepared.base, folder)
        full.check(folder)
        return {}
    conversion.save(trained.model, folder)
    _rewrite_config(folder / ADAPTER_CONFIG, job, prepared)
    return check_saved(folder, prepared.planned)


def _write_tokenizer(job: FineTuneJob, prepared: Prepared, folder: Path) -> None:
    """Copy the base model's tokenizer; a chat template of the job replaces the base model's."""
    for file in model.tokenizer_files(prepared.base):
        (folder / file.name).write_bytes(file.read_bytes())
    template = job.spec.dataset.chat_template
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_scores(job: FineTuneJob, prepared: Prepared, trained: Trained, folder: Path) -> None:
    """Write the scores and the curves."""
    _write_json(folder / "evaluation.json", _evaluation(trained.evaluation, prepared))
    write_curves(folder / CURVES, trained.curve)
    curves.draw(folder / PICTURE, trained.curve, job.spec.objective_name, trained.evaluation.published_step)


def _merge(
    job: FineTuneJob, prepared: Prepared, trained: Trained, folder: Path, merged: Path, config: PretrainedConfig
) -> float | None:
    """Write merged weights into `merged` if the job requests them.

    Returns:
        Distance of the merged model from the trained one; None if nothing was merged.
    """
    kind = job.spec.output.merge if job.spec.output else Merge.NONE
    if kind is Merge.NONE:
        return None
    return merge.merge(
        kind,
        prepared.base,
        folder,
        merged,
        config=config,
        quantization=job.spec.method.quantization,
        dtype=dtype_of(prepared.resolved.precision),
        prompts=trained.prompts,
        trained=trained.logits,
    )


def _probe_parity(
    job: FineTuneJob, prepared: Prepared, trained: Trained, folder: Path, config: PretrainedConfig
) -> tuple[float, float]:
    """Reload base and saved adapter, and record an engine's expected answers.

    Returns:
        Distance of the saved adapter's logits from the trained one's, and the gap between adapter and base in nats.

    Raises:
        SelfCheckError: the saved adapter is not the trained one.
    """
    tokenizer = model.load_tokenizer_of(prepared.base, job.spec)
    recorded = parity.record(
        prepared.base,
        folder,
        config,
        tokenizer,
        ends=prepared.ends,
        pad=prepared.pad,
        rows=parity.row_prompts(prepared.validation, prepared.train),
    )
    error = relative_distance(recorded.logits, trained.logits)
    _check_error(error, job, prepared, parity.serving_type(config))
    _write_json(folder / PARITY_FILE, recorded.parity.manifest())
    if recorded.rows is not None:
        _write_json(folder / PARITY_ROWS_FILE, recorded.rows.manifest())
    return error, round(gap_of(found for found in (recorded.parity, recorded.rows) if found is not None), 4)


def _manifest(
    job: FineTuneJob,
    prepared: Prepared,
    trained: Trained,
    folder: Path,
    adapter: ArtifactAdapter,
    versions: dict[str, str],
) -> ArtifactManifest:
    """Describe the files in `folder` and what they were made from."""
    resolved = prepared.resolved
    hyper = job.spec.hyperparameters.model_dump(mode="json", by_alias=True, exclude_none=True)
    decided = resolved.model_dump(
        mode="json",
        by_alias=True,
        include={"learning_rate", "batch_size", "micro_batch_size", "total_steps", "warmup_steps"},
    )
    return ArtifactManifest(
        files={
            file.name: ArtifactFile(sha256=file_sha256(file), size_bytes=file.stat().st_size)
            for file in sorted(folder.iterdir())
        },
        base=ArtifactBase(
            fingerprint=resolved.base_model_fingerprint or "",
            uri=job.spec.base_model.uri,
            revision=job.spec.base_model.revision,
        ),
        adapter=adapter,
        dataset_digest=resolved.dataset_digest or "",
        spec_digest=prepared.spec_digest,
        continued_from=prepared.lineage or None,
        hyperparameters={**hyper, **decided},
        versions=versions,
        evaluation=trained.evaluation,
        metrics=metrics_of(trained.evaluation),
        servable=servable.confirm(folder, prepared.planned.servable),
    )


def metrics_of(evaluation: EvaluationStatus) -> dict[str, float]:
    """Return the metrics of a result: the objective's held-out losses, and the adapter's scores by suite and metric."""
    named = {"baseEvaluationLoss": evaluation.base_loss, "evaluationLoss": evaluation.loss}
    named |= {f"{score.suite}/{score.metric}": score.adapter for score in evaluation.scores or []}
    return {name: value for name, value in named.items() if value is not None}


def _evaluation(evaluation: EvaluationStatus, prepared: Prepared) -> dict[str, object]:
    """Return the content of `evaluation.json`."""
    whole = evaluation.manifest()
    more: dict[str, object] = {name: whole.pop(name) for name in _BESIDE_LOSS if name in whole}
    supplied = [
        {"suite": suite, "uri": own.uri, "digest": own.digest} for suite, own in sorted(prepared.task_folders.items())
    ]
    if supplied:
        more["taskFolders"] = supplied
    return {"heldOutLoss": whole, "rows": prepared.preflight.validation_rows, **more}


def publish(folder: Path, manifest: ArtifactManifest, target: Folder, document: bytes | None = None) -> ArtifactStatus:
    """Upload the files, then the manifest unless one exists: if another attempt was first, return its artifact.

    Args:
        folder: folder with the files; an artifact that was exported lacks the prompts of its rows.
        manifest: the manifest.
        target: folder of the artifact.
        document: the manifest's bytes; None: its canonical form.
    """
    published = find(target)
    if published is None:
        for name in manifest.files:
            if name != PARITY_ROWS_FILE or (folder / name).exists():
                target.upload(name, folder / name)
        data = document or manifest.to_bytes()
        (folder / ARTIFACT_MANIFEST).write_bytes(data)
        if target.create(ARTIFACT_MANIFEST, data):
            return _status(target.uri, manifest, data)
        published = find(target)
    if published is None:
        raise StorageUnavailableError(
            f"{ARTIFACT_MANIFEST} in {target.uri} existed when this attempt was about to write it, and has since been"
            " deleted"
        )
    return published[1]


def find(target: Folder) -> tuple[ArtifactManifest, ArtifactStatus] | None:
    """Return the artifact that an earlier attempt published, or None.

    Raises:
        SelfCheckError: the existing manifest is not valid.
    """
    if not target.exists(ARTIFACT_MANIFEST):
        return None
    data = target.read(ARTIFACT_MANIFEST)
    try:
        manifest = ArtifactManifest.model_validate_json(data)
    except ValueError:
        raise SelfCheckError(f"{ARTIFACT_MANIFEST} in {target.uri} is damaged: delete it to publish again") from None
    return manifest, _status(target.uri, manifest, data)


def _status(uri: str, manifest: ArtifactManifest, data: bytes) -> ArtifactStatus:
    size = len(data) + sum(file.size_bytes for file in manifest.files.values())
    return ArtifactStatus(uri=uri, digest=digest_of(data), size_bytes=size, servable=manifest.servable)


def _check_error(error: float, job: FineTuneJob, prepared: Prepared, served: torch.dtype) -> None:
    """Raise SelfCheckError if the reloaded adapter is not the trained one.

    On a base that was only in 4 bits while training, they differ by the quantisation error, for which there is no
    limit.
    """
    stored = stored_quantization(prepared.base)
    kept = stored is not None and stored.kept
    exact = served is torch.float32 and prepared.resolved.precision is Precision.FLOAT32 and not kept
    limit = _EXACT_LIMIT if exact else _ROUNDED_LIMIT
    if (kept or job.spec.method.quantization is None) and not error <= limit:
        raise SelfCheckError(
            f"the saved adapter, loaded again, differs from the trained one: its logits differ by {error:.2g} of their"
            f" norm, the limit is {limit:g}"
        )


def check_saved(folder: Path, planned: MethodPlan) -> dict[str, Any]:
    """Check names, shapes and values of the saved adapter's tensors: PEFT and vLLM load them by these names.

    Returns:
        PEFT's configuration of the saved adapter.

    Raises:
        SelfCheckError: a tensor is wrong; names the first one.
    """
    config: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    expected = {}
    for name, rank in planned.ranks.items():
        in_features, out_features = planned.modules[name]
        saved = rank * 2 if planned.doubled else rank
        expected[f"base_model.model.{name}.lora_A.weight"] = (saved, in_features)
        expected[f"base_model.model.{name}.lora_B.weight"] = (out_features, saved)
    problem: str | None = None
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as tensors:
        names = set(tensors.keys())
        missing = sorted(set(expected) - names) or ([] if names else ["every tensor"])
        if missing:
            problem = f"{missing[0]} is missing"
        for name in sorted(names):
            tensor = tensors.get_tensor(name)
            if name in expected and tuple(tensor.shape) != expected[name]:
                problem = f"{name} has the shape {list(tensor.shape)}, expected {list(expected[name])}"
            elif not bool(tensor.isfinite().all()):
                problem = f"{name} has non-finite values"
    if problem is not None:
        raise SelfCheckError(f"the saved adapter differs from the trained one: {problem}")
    return config


def write_curves(path: Path, curve: list[CurvePoint]) -> None:
    """Write the curves as CSV, one line per step and per evaluation; empty cells were not measured."""
    names = [field.name for field in fields(CurvePoint)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([to_camel(name) for name in names])
        for point in curve:
            writer.writerow(["" if value is None else value for value in asdict(point).values()])


def _rewrite_config(path: Path, job: FineTuneJob, prepared: Prepared) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    # The name by which transformers finds the base, if it can: of the Hugging Face Hub, or a path.
    config["base_model_name_or_path"] = job.spec.base_model.uri.removeprefix("hf://").removeprefix("file://")
    config["revision"] = job.spec.base_model.revision
    planned = prepared.planned.config
    if isinstance(planned, LoraConfig) and prepared.planned.ranks:
        # PEFT shortens the names to parts that are unambiguous today.
        config["target_modules"] = sorted(planned.target_modules)
    _write_json(path, config)


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
