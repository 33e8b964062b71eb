"""The two stages of a job: what the CPU checks, and what trains, packages and publishes."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.api.conditions import FailureReason
from tunesmith.api.finetunejob_status import EvaluationStatus, Stage
from tunesmith.contracts.location import ARTIFACT_FOLDER, MERGED_FOLDER, beside_artifact
from tunesmith.contracts.result import Outcome, TrainerResult
from tunesmith_trainer.artifact import exports, merge, package
from tunesmith_trainer.data.report import told
from tunesmith_trainer.errors import InvalidSpecError, StorageUnavailableError, TrainerError
from tunesmith_trainer.evaluation import gates
from tunesmith_trainer.evaluation.folders import TaskCode
from tunesmith_trainer.preflight.prepare import prepare
from tunesmith_trainer.preflight.sizing import refusal
from tunesmith_trainer.preflight.spec import run_digest, spec_digest
from tunesmith_trainer.process.interruption import Faults
from tunesmith_trainer.process.ranks import POD_INDEX, PeerLostError
from tunesmith_trainer.reporting.run import begin, trackers_of
from tunesmith_trainer.store import PUBLISHING_RETRY
from tunesmith_trainer.training.checkpoint import Checkpoints

if TYPE_CHECKING:
    import argparse

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.storage.folder import Folder
    from tunesmith_trainer.preflight.prepare import Prepared
    from tunesmith_trainer.process.ending import Ending
    from tunesmith_trainer.process.progress import Progress
    from tunesmith_trainer.process.ranks import Ranks
    from tunesmith_trainer.reporting.reporter import Reporter
    from tunesmith_trainer.store import Stores


def validate(
    job: FineTuneJob, stores: Stores, work: Path, progress: Progress, arguments: argparse.Namespace
) -> TrainerResult:
    """Checks the job on the CPU, without its base's weights.

    Raises:
        TrainerError: it cannot be trained as it is.
    """
    progress.update(stage=Stage.VALIDATING)
    if not arguments.allow_file:
        trackers_of(job, arguments.secrets, local=False)
    tokens = _tokens(arguments.tokens, stores)
    memory = arguments.gpu_memory_bytes
    prepared = prepare(
        job,
        stores,
        work,
        weights=False,
        gpu_memory=memory,
        tokens=tokens,
        task_code=_task_code(arguments),
        say=progress.say,
    )
    counted = prepared.preflight
    for line in told(counted):
        progress.say(line)
    refused = _refused(prepared, cluster=not arguments.allow_file)
    if refused is not None:
        return refused
    exports.check(job, stores)
    return TrainerResult(
        outcome=Outcome.SUCCEEDED,
        message=f"{counted.rows} rows to train on with {counted.tokens} tokens, {counted.validation_rows} held out,"
        f" {counted.dropped_rows} dropped;"
        f" {counted.trainable_parameters} trainable parameters, {prepared.resolved.total_steps} steps",
        preflight=counted,
        resolved=prepared.resolved,
    )


def _refused(prepared: Prepared, *, cluster: bool) -> TrainerResult | None:
    """The result of a job that cannot fit into its GPU."""
    told = refusal(prepared.preflight, cluster=cluster)
    if told is None:
        return None
    return TrainerResult(
        outcome=Outcome.FAILED,
        reason=FailureReason.WILL_NOT_FIT,
        message=told,
        preflight=prepared.preflight,
        resolved=prepared.resolved,
    )


def train(
    job: FineTuneJob, stores: Stores, work: Path, ending: Ending, reporter: Reporter, arguments: argparse.Namespace
) -> TrainerResult:
    """Trains, packages, publishes and copies, unless an earlier attempt has published.

    Raises:
        TrainerError: it failed.
        InterruptedRunError: it was stopped from outside, and saved its state.
    """
    progress = ending.progress
    local, target = _target(arguments.output, stores, allow_file=arguments.allow_file)
    found = package.find(target)
    if found is not None:
        manifest, artifact = found
        if manifest.spec_digest not in (None, spec_digest(job)):
            raise InvalidSpecError(
                f"{target.uri} already holds the artifact of another spec: choose another --output,"
                " or remove that folder"
            )
        if local is None:
            _remove(stores, arguments.checkpoints, arguments.tokens)
        result = _judged(
            TrainerResult(
                outcome=Outcome.SUCCEEDED,
                message="an earlier attempt published this artifact; nothing was trained again",
                artifact=artifact,
                evaluation=manifest.evaluation,
                metrics=manifest.metrics,
            )
        )
        return exports.exported(result, job, stores, target, work, progress) if ending.ranks.first else result

    from tunesmith_trainer.training import loop  # noqa: PLC0415

    ranks = ending.ranks
    tokens = arguments.tokens or (f"file://{local}/tokens" if local is not None else None)
    prepared = _prepared(job, stores, work, ranks, progress, _tokens(tokens, stores), _task_code(arguments))
    refused = _refused(prepared, cluster=not arguments.allow_file)
    if refused is not None:
        return refused
    counted = prepared.preflight
    for line in told(counted):
        progress.say(line)
    place = stores.folder(
        arguments.checkpoints or beside_artifact(target.uri, "checkpoints"),
        what="the checkpoints' folder",
        missing=StorageUnavailableError,
    )
    checkpoints = Checkpoints(
        place,
        work / ("checkpoints" if ranks.first else f"checkpoints-{ranks.rank}"),
        binding=run_digest(job, prepared.resolved),
        keep=job.spec.checkpoint.keep,
        say=progress.say,
    )
    ending.interruption.checkpoints = checkpoints
    begin(reporter, job, prepared.resolved, stores, target, local)
    faults = Faults(checkpoints, ending.interruption, ending.hung)
    trained = loop.train(job, prepared, progress, reporter, work, faults, ranks)
    if trained is None:
        ranks.part()
        return TrainerResult(
            outcome=Outcome.SUCCEEDED, message=f"rank {ranks.rank} of {ranks.size} is done; rank 0 has the result"
        )
    progress.update(stage=Stage.PACKAGING)
    folder, merged = work / ARTIFACT_FOLDER, work / MERGED_FOLDER
    for old in (folder, merged):
        shutil.rmtree(old, ignore_errors=True)
    manifest, merge_error = package.build(job, prepared, trained, folder, merged)
    progress.update(stage=Stage.PUBLISHING)
    if merged.is_dir():
        uri = beside_artifact(target.uri, MERGED_FOLDER)
        beside = stores.folder(uri, what="the merged model", missing=StorageUnavailableError)
        merge.publish(merged, beside.child(retry=PUBLISHING_RETRY))
    artifact = package.publish(folder, manifest, target.child(retry=PUBLISHING_RETRY))
    if local is not None:
        package.write_curves(local / package.CURVES, trained.curve)
    else:
        checkpoints.clear()
    _remove(stores, tokens)
    with contextlib.suppress(PeerLostError):  # what is published is published
        ranks.part()
    result = _judged(
        TrainerResult(
            outcome=Outcome.SUCCEEDED,
            message=_summary(trained.evaluation, merge_error),
            preflight=counted,
            resolved=prepared.resolved,
            artifact=artifact,
            evaluation=trained.evaluation,
            metrics=manifest.metrics,
        )
    )
    return exports.exported(result, job, stores, target, work, progress)


def _remove(stores: Stores, *uris: str | None) -> None:
    """Removes temporary folders; what stays is for the bucket's lifecycle rule."""
    for uri in uris:
        if uri is not None:
            with contextlib.suppress(TrainerError):
                stores.folder(uri, what="temporary files", missing=StorageUnavailableError).remove()


def _tokens(uri: str | None, stores: Stores) -> Folder | None:
    """The folder of tokenised rows that outlives this process."""
    return stores.folder(uri, what="the folder of tokenised rows", missing=StorageUnavailableError) if uri else None


def _task_code(arguments: argparse.Namespace) -> TaskCode:
    if arguments.allow_task_code:
        return TaskCode.ALLOWED
    return TaskCode.REFUSED_LOCALLY if arguments.allow_file else TaskCode.REFUSED


def _prepared(
    job: FineTuneJob,
    stores: Stores,
    work: Path,
    ranks: Ranks,
    progress: Progress,
    tokens: Folder | None,
    task_code: TaskCode,
) -> Prepared:
    """The inputs, once all ranks are here: each pod reads them once."""
    from tunesmith_trainer.training.loop import choose_device, device_memory  # noqa: PLC0415

    wanted = job.spec.resources
    device = choose_device(wanted.gpus, ranks.local_rank)
    if wanted.nodes > 1 and POD_INDEX not in os.environ:
        progress.say(f"  resources.nodes is {wanted.nodes}: this machine trains alone, to the same result")
    ranks.meet("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    progress.update(stage=Stage.PREPARING)
    # What the CPU stage of a cluster decided stays; a local run has had none, and knows its GPU.
    memory = device_memory(device) if job.status.resolved is None else None
    prepared = ranks.once_per_pod(
        work / "prepared",
        lambda: prepare(
            job,
            stores,
            work,
            weights=True,
            ranks=ranks.size,
            gpu_memory=memory,
            tokens=tokens,
            task_code=task_code,
            say=progress.say,
        ),
    )
    if job.status.resolved is None and ranks.first:
        exports.check(job, stores)
    if not ranks.agree(prepared.resolved.model_dump_json()):
        raise InvalidSpecError(
            "the base model, the data set or a task folder changed while the pods of this job read it: give the job"
            " files of its own"
        )
    return prepared


def _judged(result: TrainerResult) -> TrainerResult:
    """The result, failed where a gate did not pass. The artifact stays published and reported."""
    evaluation = result.evaluation
    if evaluation is None:
        return result
    told = gates.failure(evaluation)
    if told is not None:
        change = {"outcome": Outcome.FAILED, "reason": FailureReason.GATE_FAILED, "message": told}
        return result.model_copy(update=change)
    if evaluation.failures:
        return result.model_copy(update={"message": f"{result.message}; {evaluation.unscored}"})
    return result


def _summary(evaluation: EvaluationStatus, merge_error: float | None) -> str:
    losses = (
        f"held-out loss {evaluation.base_loss:.3f} (base) to {evaluation.loss:.3f} (adapter),"
        f" {-(evaluation.loss_reduction_percent or 0.0):+.0f} %"
    )
    return losses if merge_error is None else f"{losses}; merged weights {merge.told(merge_error)}"


def _target(output: str, stores: Stores, *, allow_file: bool) -> tuple[Path | None, Folder]:
    """The folder of a local run, or None, and the artifact's folder."""
    local = None
    if "://" not in output:
        if not allow_file:
            raise InvalidSpecError(
                f"--output {output} is a folder of this machine, which is allowed only where no cluster runs the job:"
                " use a uri"
            )
        local = Path(output).resolve()
        try:
            local.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidSpecError(f"cannot make the folder {local}: {error.strerror}") from None
        output = f"file://{local}/artifact"
    return local, stores.folder(output, what="the artifact's folder", missing=StorageUnavailableError)
