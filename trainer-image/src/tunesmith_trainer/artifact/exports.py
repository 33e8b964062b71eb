"""Copy the published artifact to folders of other stores and to repositories of the Hugging Face Hub."""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import TYPE_CHECKING

from tunesmith.api.conditions import FailureReason
from tunesmith.api.finetunejob_status import Stage
from tunesmith.api.output import Merge
from tunesmith.contracts.artifact import digest_of
from tunesmith.contracts.location import (
    ARTIFACT_FOLDER,
    ARTIFACT_MANIFEST,
    MERGED_FOLDER,
    MERGED_MANIFEST,
    beside_artifact,
)
from tunesmith.contracts.parity import PARITY_ROWS_FILE
from tunesmith.contracts.result import ExportResult, Outcome
from tunesmith_trainer.artifact import package
from tunesmith_trainer.errors import InvalidSpecError, SelfCheckError, StorageUnavailableError, TrainerError
from tunesmith_trainer.hub import Repository
from tunesmith_trainer.manifest import spec_digest
from tunesmith_trainer.store import EXPORTING_RETRY, file_sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.output import Export
    from tunesmith.contracts.result import TrainerResult
    from tunesmith.storage.folder import Folder, Retry
    from tunesmith_trainer.process.progress import Progress
    from tunesmith_trainer.store import Stores

log = logging.getLogger(__name__)


def check(job: FineTuneJob, stores: Stores) -> None:
    """Check before training that each export can be written: write to each destination.

    Raises:
        TrainerError: a Secret is missing, access is denied, the bucket does not exist, or it contains another artifact.
    """
    for export in job.spec.exports:
        if export.uri is None:
            _repository(export, stores).create()
            continue
        folder = _folder(export, stores)
        folder.check_writable()
        try:
            found = package.find(folder)
        except SelfCheckError:  # not a manifest of an artifact
            raise _occupied(folder) from None
        if found is not None and found[0].spec_digest != spec_digest(job):
            raise _occupied(folder)


def with_exports(
    result: TrainerResult, job: FineTuneJob, stores: Stores, published: Folder, work: Path, progress: Progress
) -> TrainerResult:
    """Return the result with the outcome of each copy; nothing is copied if a gate did not pass."""
    exports = job.spec.exports
    if not exports or result.outcome is not Outcome.SUCCEEDED:
        return result
    progress.update(stage=Stage.EXPORTING)
    copies = export_all(job, stores, published, work, progress.write_line)
    failed = [copy.message for copy in copies if copy.reason is not None]
    message = result.message
    if failed:
        message += f"; {len(failed)} of {len(exports)} exports failed: {'; '.join(failed)}"
    return result.model_copy(update={"exports": copies, "message": message})


def export_all(
    job: FineTuneJob,
    stores: Stores,
    published: Folder,
    work: Path,
    write_line: Callable[[str], None],
    retry: Retry = EXPORTING_RETRY,
) -> list[ExportResult]:
    """Copy the artifact to every destination of the job, and return the outcome of each copy.

    It never fails: the artifact is in the store, whatever the outcome of its copies.

    Args:
        job: the FineTuneJob.
        stores: opens the destinations.
        published: the artifact's folder in the store.
        work: local folder with the files that this attempt has built, or empty.
        write_line: reports copies to people.
        retry: retries during outages.
    """
    files: dict[str, Path] = {}
    gathered = _outcome("of the artifact", lambda: files.update(_gathered(job, stores, published, work, retry)))
    results = []
    for export in job.spec.exports:
        result = gathered
        if result.reason is None:
            result = _outcome(export.destination, partial(_copy, job, export, stores, files, retry))
        write_line(f"  copied to {export.destination}" if result.reason is None else f"  not copied: {result.message}")
        results.append(result)
    return results


def _outcome(place: str, operation: Callable[[], None]) -> ExportResult:
    """Run an operation and return its outcome; never raises."""
    try:
        operation()
    except TrainerError as error:
        return ExportResult(reason=error.reason, message=str(error))
    except Exception as error:
        log.exception("unexpected error in the export %s", place)
        text = f"the export {place} failed with an unexpected {type(error).__name__}; the log has the traceback"
        return ExportResult(reason=FailureReason.INTERNAL_ERROR, message=text)
    return ExportResult()


def _copy(job: FineTuneJob, export: Export, stores: Stores, files: Mapping[str, Path], retry: Retry) -> None:
    data = files[ARTIFACT_MANIFEST].read_bytes()
    if export.uri is not None:
        _copy_to_folder(_folder(export, stores).child(retry=retry), files, data)
        return
    repository = _repository(export, stores, retry)
    repository.create()
    message = f"{job.metadata.namespace}/{job.metadata.name}: artifact {digest_of(data)}"
    repository.commit(files, ARTIFACT_MANIFEST, MERGED_FOLDER, message)


def _copy_to_folder(folder: Folder, files: Mapping[str, Path], manifest: bytes) -> None:
    """Copy the files, the manifest last: if it exists, so do all the others."""
    if not folder.exists(ARTIFACT_MANIFEST):
        for path, file in files.items():
            if path == ARTIFACT_MANIFEST:
                continue
            inner, _, name = path.rpartition("/")
            (folder.child(inner) if inner else folder).upload(name, file)
        if folder.create(ARTIFACT_MANIFEST, manifest):
            return
    if folder.read(ARTIFACT_MANIFEST) != manifest:
        raise _occupied(folder)


def _occupied(folder: Folder) -> InvalidSpecError:
    return InvalidSpecError(
        f"the export {folder.uri} already contains another artifact: choose another folder, or delete its content"
    )


def _gathered(job: FineTuneJob, stores: Stores, published: Folder, work: Path, retry: Retry) -> dict[str, Path]:
    """Return the files to copy by their path in the copy, as in the store: fetched unless they are on this machine.

    The file with rows of the data set is not copied.
    """
    published = published.child(retry=retry)
    found = package.find(published)
    if found is None:
        raise SelfCheckError(f"{ARTIFACT_MANIFEST} in {published.uri} was deleted after it was published")
    manifest, _ = found
    folder = work / ARTIFACT_FOLDER
    hashes = {name: file.sha256 for name, file in manifest.files.items() if name != PARITY_ROWS_FILE}
    files = {name: _local_copy(name, digest, folder, published) for name, digest in hashes.items()}
    if job.spec.output is not None and job.spec.output.merge is not Merge.NONE:
        uri = beside_artifact(published.uri, MERGED_FOLDER)
        beside = stores.folder(uri, what="the merged model", missing=StorageUnavailableError).child(retry=retry)
        (work / MERGED_FOLDER).mkdir(exist_ok=True)
        document = beside.read(MERGED_MANIFEST)
        for name, digest in json.loads(document)["files"].items():
            files[f"{MERGED_FOLDER}/{name}"] = _local_copy(name, digest, work / MERGED_FOLDER, beside)
        (work / MERGED_FOLDER / MERGED_MANIFEST).write_bytes(document)
        files[f"{MERGED_FOLDER}/{MERGED_MANIFEST}"] = work / MERGED_FOLDER / MERGED_MANIFEST
    (folder / ARTIFACT_MANIFEST).write_bytes(published.read(ARTIFACT_MANIFEST))
    return {**files, ARTIFACT_MANIFEST: folder / ARTIFACT_MANIFEST}


def _local_copy(name: str, digest: str, folder: Path, source: Folder) -> Path:
    """Return a local copy of a file of the store."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    if not (file.is_file() and file_sha256(file) == digest):
        source.download(name, file)
        if file_sha256(file) != digest:
            raise SelfCheckError(f"{name} in {source.uri} differs from the published file: its hash is wrong")
    return file


def _folder(export: Export, stores: Stores) -> Folder:
    secret = export.secret_ref.name if export.secret_ref else None
    return stores.folder(export.uri or "", what="the export", missing=InvalidSpecError, secret=secret)


def _repository(export: Export, stores: Stores, retry: Retry | None = None) -> Repository:
    credentials = stores.credentials(export.secret_ref.name if export.secret_ref else None)
    return Repository(export.hub or "", credentials, stores.access(InvalidSpecError, retry))
