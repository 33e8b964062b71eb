"""Permissions of a FineTuneJob in an installation: its scheduling, its sources and its destinations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.contracts.location import reads_foreign_store, writes_into_store
from tunesmith.contracts.scheduling import scheduling_violation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tunesmith.api.continue_from import ArtifactReference
    from tunesmith.api.dataset import DatasetSource
    from tunesmith.api.evaluation import TaskFolder
    from tunesmith.api.finetunejob import BaseModelSource, FineTuneJob
    from tunesmith.contracts.scheduling import AllowedScheduling


def sources(job: FineTuneJob) -> Iterator[tuple[str, BaseModelSource | ArtifactReference | DatasetSource | TaskFolder]]:
    """Yield everything that the job reads, with its path in the manifest."""
    spec = job.spec
    yield "spec.baseModel", spec.base_model
    if spec.continue_from is not None and spec.continue_from.artifact is not None:
        yield "spec.continueFrom.artifact", spec.continue_from.artifact
    for field in ("train", "validation"):
        for number, source in enumerate(getattr(spec.dataset, field) or []):
            yield f"spec.dataset.{field}[{number}]", source
    for number, suite in enumerate(spec.suites):
        where = f"spec.evaluation.suites[{number}]"
        if suite.generation is not None:
            yield f"{where}.generation.dataset", suite.generation.dataset
        if suite.lm_eval is not None and suite.lm_eval.task_folder is not None:
            yield f"{where}.lmEval.taskFolder", suite.lm_eval.task_folder


def forbidden(job: FineTuneJob, store: str, allowed: AllowedScheduling) -> str | None:
    """Return why the installation does not run the job, as a sentence; None if it does.

    Args:
        job: the FineTuneJob.
        store: uri of the installation's store.
        allowed: scheduling that the installation allows.
    """
    found = [
        scheduling_violation(job.spec.scheduling, job.spec.resources, allowed),
        *(_source_violation(where, source.uri, job, store) for where, source in sources(job)),
        *(
            _export_violation(f"spec.output.exports[{number}].uri", export.uri, store)
            for number, export in enumerate(job.spec.exports)
            if export.uri is not None
        ),
    ]
    return "; ".join(sentence for sentence in found if sentence is not None) or None


def _source_violation(where: str, uri: str, job: FineTuneJob, store: str) -> str | None:
    namespace = job.metadata.namespace
    if not reads_foreign_store(store, namespace, uri):
        return None
    return (
        f"{where}.uri {uri} is in this installation's store, but outside the folder of namespace {namespace}: use a "
        f"location in {store}/{namespace}/ or outside the store"
    )


def _export_violation(where: str, uri: str, store: str) -> str | None:
    if not writes_into_store(store, uri):
        return None
    return (
        f"{where} {uri} is in this installation's store {store} or contains it; only the operator writes there: "
        "use a location outside the store"
    )
