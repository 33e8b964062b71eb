"""Import an adapter: from another trainer, converted and checked, or an artifact, copied unchanged; then publish it."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from typing import TYPE_CHECKING

from tunesmith.api.adapterdeployment import ImportedAdapter
from tunesmith.api.finetunejob_status import Stage
from tunesmith.contracts.artifact import (
    MAX_MANIFEST_BYTES,
    ArtifactAdapter,
    ArtifactBase,
    ArtifactFile,
    ArtifactManifest,
    ImportedFrom,
    check_files,
    digest_of,
    parse_manifest,
)
from tunesmith.contracts.foreign_adapter import ForeignAdapterError
from tunesmith.contracts.location import ADAPTER_IMAGE, ARTIFACT_FOLDER, ARTIFACT_MANIFEST
from tunesmith.contracts.parity import PARITY_FILE, PARITY_ROWS_FILE, gap_of
from tunesmith.contracts.result import Outcome, TrainerResult
from tunesmith.contracts.safetensors import read_tensors
from tunesmith.contracts.servability import ADAPTER_WEIGHTS
from tunesmith_trainer.artifact import package, parity
from tunesmith_trainer.base_model import model
from tunesmith_trainer.errors import AdapterNotFoundError, InvalidSpecError, StorageUnavailableError
from tunesmith_trainer.foreign.base import folder_of, open_base
from tunesmith_trainer.foreign.conversion import check_structure, convert, download
from tunesmith_trainer.methods import servable
from tunesmith_trainer.store import PUBLISHING_RETRY, file_sha256

if TYPE_CHECKING:
    from pathlib import Path

    from tunesmith.api.finetunejob_status import ArtifactStatus
    from tunesmith.storage.folder import Folder
    from tunesmith_trainer.foreign.base import Base
    from tunesmith_trainer.foreign.conversion import Converted
    from tunesmith_trainer.options import ImportOptions
    from tunesmith_trainer.process.progress import Progress
    from tunesmith_trainer.store import Stores

_MAX_OTHER_BYTES = 2**26
"""Largest file of an artifact besides its weights."""
_VERSIONED = ("tunesmith-trainer", "torch", "transformers", "peft", "safetensors")


def run(options: ImportOptions, stores: Stores, work: Path, progress: Progress) -> TrainerResult:
    """Import the adapter, unless an earlier attempt has published it.

    Raises:
        TrainerError: the adapter or its base model is missing, or cannot be imported.
    """
    progress.update(stage=Stage.PREPARING)
    target = _target(options, stores)
    published = package.find(target)
    if published is None:
        published = _published(options, stores, work, progress, target)
    manifest, artifact = published
    imported = ImportedAdapter(
        base_model_fingerprint=manifest.base.fingerprint,
        rank=manifest.adapter.rank,
        parity=PARITY_FILE in manifest.files,
        missed_gates=manifest.evaluation.missed_gates if manifest.evaluation is not None else None,
    )
    return TrainerResult(
        outcome=Outcome.SUCCEEDED, message=_summary(options, manifest), artifact=artifact, imported=imported
    )


def _target(options: ImportOptions, stores: Stores) -> Folder:
    local, uri = options.output_folder, options.output
    if local is not None:
        if not options.allow_file:
            raise InvalidSpecError(
                f"--output {uri} is a local folder: use a URI, or add --allow-file outside a cluster"
            )
        local.mkdir(parents=True, exist_ok=True)
        uri = f"file://{local}/{ARTIFACT_FOLDER}"
    return stores.folder(uri, what="the artifact's folder", missing=StorageUnavailableError)


def _published(
    options: ImportOptions, stores: Stores, work: Path, progress: Progress, target: Folder
) -> tuple[ArtifactManifest, ArtifactStatus]:
    remote = stores.folder(
        folder_of(options.adapter, ADAPTER_IMAGE),
        what="the adapter's folder",
        missing=AdapterNotFoundError,
        secret=options.secret,
    )
    names = frozenset(remote.names())
    folder = work / ARTIFACT_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = open_base(options, stores, work)
    try:
        if ARTIFACT_MANIFEST in names:
            manifest, document = _copied(options, remote, names, folder, base)
        else:
            if options.digest is not None:
                raise ForeignAdapterError(f"a digest is that of {ARTIFACT_MANIFEST}, which it does not have")
            manifest, document = _converted(options, remote, names, folder, base, progress), None
    except ValueError as error:
        raise InvalidSpecError(f"the adapter in {options.adapter} cannot be imported: {error}") from None
    progress.update(stage=Stage.PUBLISHING)
    artifact = package.publish(folder, manifest, target.child(retry=PUBLISHING_RETRY), document)
    return manifest, artifact


def _copied(
    options: ImportOptions, remote: Folder, names: frozenset[str], folder: Path, base: Base
) -> tuple[ArtifactManifest, bytes]:
    """Copy an artifact unchanged, with its evaluation and its digest; return its manifest, also as it is.

    Exports omit the prompts of its rows.

    Raises:
        ValueError: it is damaged, another one than requested, or of another base model.
    """
    document = remote.read(ARTIFACT_MANIFEST, length=min(remote.size(ARTIFACT_MANIFEST), MAX_MANIFEST_BYTES + 1))
    digest = digest_of(document)
    if options.digest not in (None, digest):
        raise ForeignAdapterError(f"it has the digest {digest} instead of {options.digest}: it is another artifact")
    manifest = parse_manifest(document)
    if manifest.adapter.method == "full":
        raise ForeignAdapterError("it is a whole model: serve it as the baseModel of a ServingPool")
    check_files(manifest.files)
    if manifest.base.fingerprint != base.fingerprint:
        raise ForeignAdapterError(
            f"it was trained on another base model ({manifest.base.uri}, {manifest.base.fingerprint[:19]}…) than the "
            f"pool's ({base.uri}, {base.fingerprint[:19]}…): name a pool with that base model"
        )
    for name, entry in manifest.files.items():
        if name == PARITY_ROWS_FILE and name not in names:
            continue
        limit = base.largest_adapter if name == ADAPTER_WEIGHTS else _MAX_OTHER_BYTES
        download(remote, name, folder / name, limit)
        if (folder / name).stat().st_size != entry.size_bytes or file_sha256(folder / name) != entry.sha256:
            raise ForeignAdapterError(f"{name} was changed after it was published: its SHA-256 is not the manifest's")
    return manifest, document


def _converted(
    options: ImportOptions, remote: Folder, names: frozenset[str], folder: Path, base: Base, progress: Progress
) -> ArtifactManifest:
    """Write the artifact's files, except its manifest, for an adapter of another trainer.

    Raises:
        ValueError: it cannot be converted, or does not fit the base model.
    """
    progress.update(stage=Stage.VALIDATING)
    converted = convert(remote, names, folder, base)
    check_structure(folder, converted.config, base.config)
    verdict = servable.of_files(converted.config, list(read_tensors(folder / ADAPTER_WEIGHTS)))
    if verdict.vllm:
        verdict = servable.on_base(base.modules, converted.modules)
    for file in model.tokenizer_files(base.folder):
        shutil.copyfile(file, folder / file.name)
    progress.update(stage=Stage.PACKAGING)
    gap = _record_parity(folder, base, progress)
    (folder / "README.md").write_text(_card(options, converted, base), encoding="utf-8")
    return ArtifactManifest(
        files={
            file.name: ArtifactFile(sha256=file_sha256(file), size_bytes=file.stat().st_size)
            for file in sorted(folder.iterdir())
        },
        base=ArtifactBase(fingerprint=base.fingerprint, uri=base.uri, revision=base.revision),
        adapter=ArtifactAdapter(
            method="lora",
            rank=converted.config["r"],
            alpha=converted.config["lora_alpha"],
            target_modules=sorted(converted.config["target_modules"]),
            parity_gap=gap,
        ),
        imported_from=ImportedFrom(
            uri=options.adapter, layout=converted.layout, sha256=converted.sha256, changes=converted.changes
        ),
        hyperparameters={},
        versions={name: version(name) for name in _VERSIONED},
        servable=verdict,
    )


def _record_parity(folder: Path, base: Base, progress: Progress) -> float | None:
    """Record the answers of base and adapter; return their gap in nats; None if the base does not fit in memory."""
    sizes = [base.remote.size(name) for name in base.remote.names() if name.endswith(".safetensors")]
    if not base.fits(sum(sizes)):
        # Reading the layers from disk for each token would take hours for a large model.
        progress.write_line(f"  no answers recorded: the base's {sum(sizes)} bytes do not fit into memory")
        return None
    weights = model.fetch_base(base.remote, base.folder, weights=True)
    tokenizer = model.load_tokenizer(weights, base.uri)
    ends = model.end_tokens(weights, tokenizer, base.uri)
    recorded = parity.record(weights, folder, base.config, tokenizer, ends=ends, pad=model.pad_token(tokenizer, ends))
    (folder / PARITY_FILE).write_text(
        json.dumps(recorded.parity.manifest(), indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return round(gap_of([recorded.parity]), 4)


def _card(options: ImportOptions, converted: Converted, base: Base) -> str:
    lines = [
        "# Imported adapter",
        "",
        f"LoRA of rank {converted.config['r']} for `{base.uri}` ({base.fingerprint}), imported with Tunesmith",
        f"from `{options.adapter}`, which has the layout of {converted.layout}.",
        *(f"- {change}" for change in converted.changes),
        "",
        "Its training data and its scores are unknown to Tunesmith. The licence and the limitations of the base model",
        "apply to it too.",
    ]
    return "\n".join(lines) + "\n"


def _summary(options: ImportOptions, manifest: ArtifactManifest) -> str:
    origin = manifest.imported_from
    if origin is None:
        return f"copied the artifact of {options.adapter}, unchanged"
    changes = "".join(f"; {change}" for change in origin.changes)
    answers = "" if PARITY_FILE in manifest.files else "; its expected answers were not recorded, for want of memory"
    return f"imported {options.adapter} ({origin.layout}, rank {manifest.adapter.rank}){changes}{answers}"
