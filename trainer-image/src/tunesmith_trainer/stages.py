"""The two stages of a job: checks on a CPU; training with packaging, publishing and copies."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.api.conditions import FailureReason
from tunesmith.api.finetunejob_status import EvaluationStatus, Stage
from tunesmith.contracts.location import ARTIFACT_FOLDER, MERGED_FOLDER, beside_artifact
from tunesmith.contracts.result import Outcome, TrainerResult
from tunesmith_trainer.artifact import exports, merge, package
from tunesmith_trainer.data.report import summary_lines
from tunesmith_trainer.errors import InvalidSpecError, StorageUnavailableError, TrainerError
from tunesmith_trainer.evaluation import gates
from tunesmith_trainer.evaluation.folders import TaskCode
from tunesmith_trainer.manifest import run_digest, spec_digest
from tunesmith_trainer.preflight.prepare import prepare
from tunesmith_trainer.preflight.sizing import refusal
from tunesmith_trainer.process.ranks import POD_INDEX, PeerLostError
from tunesmith_trainer.reporting.run import begin, trackers_of
from tunesmith_trainer.store import PUBLISHING_RETRY
from tunesmith_trainer.training.checkpoint import Checkpoints

if TYPE_CHECKING:
    from pathlib import Path

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.finetunejob_status import ArtifactStatus, Preflight
    from tunesmith.contracts.artifact import ArtifactManifest
    from tunesmith.storage.folder import Folder
    from tunesmith_trainer.options import RunOptions
    from tunesmith_trainer.preflight.prepare import Prepared
    from tunesmith_trainer.process.progress import Progress
    from tunesmith_trainer.process.ranks import Ranks
    from tunesmith_trainer.process.termination import Termination
    from tunesmith_trainer.reporting.reporter import Reporter
    from tunesmith_trainer.store import Stores
    from tunesmith_trainer.training.loop import Trained


@dataclass(frozen=True)
class Attempt:
    """One attempt at a stage of a job, by this process.

    Attributes:
        job: the manifest.
        options: options of the command.
        stores: opens the locations that the manifest and the options name.
        work: folder for downloads and temporary files.
        termination: has the progress, the ranks and a signal to stop; receives the checkpoints.
    """

    job: FineTuneJob
    options: RunOptions
    stores: Stores
    work: Path
    termination: Termination

    @property
    def progress(self) -> Progress:
        """Progress of this process."""
        return self.termination.progress

    @property
    def ranks(self) -> Ranks:
        """This process among those that train together."""
        return self.termination.ranks

    @property
    def tokens(self) -> str | None:
        """URI of the folder that keeps tokenised rows; None if they are not kept."""
        local = self.options.output_folder
        return self.options.tokens or (f"file://{local}/tokens" if local is not None else None)

    @property
    def task_code(self) -> TaskCode:
        """Decide whether evaluation tasks supplied with the job may be run."""
        if self.options.allow_task_code:
            return TaskCode.ALLOWED
        return TaskCode.REFUSED_LOCALLY if self.options.allow_file else TaskCode.REFUSED

    def folder(self, uri: str, what: str) -> Folder:
        """Open a folder that this process writes to.

        Args:
            uri: URI of the folder.
            what: description of the folder for error messages.
        """
        return self.stores.folder(uri, what=what, missing=StorageUnavailableError)


def validate(attempt: Attempt) -> TrainerResult:
    """Check the job on the CPU, without its base model's weights.

    Raises:
        TrainerError: the job cannot be trained as specified.
    """
    job, options, progress = attempt.job, attempt.options, attempt.progress
    progress.update(stage=Stage.VALIDATING)
    if not options.allow_file:
        trackers_of(job, options.secrets, local=False)
    prepared = prepare(
        job,
        attempt.stores,
        attempt.work,
        weights=False,
        gpu_memory=options.gpu_memory_bytes,
        tokens=_tokens(attempt, options.tokens),
        task_code=attempt.task_code,
        write_line=progress.write_line,
    )
    counted = prepared.preflight
    _write_counts(progress, prepared)
    refused = _refusal(attempt, prepared)
    if refused is not None:
        return refused
    exports.check(job, attempt.stores)
    return TrainerResult(
        outcome=Outcome.SUCCEEDED,
        message=f"{counted.rows} training rows with {counted.tokens} tokens, {counted.validation_rows} held out,"
        f" {counted.dropped_rows} dropped;"
        f" {counted.trainable_parameters} trainable parameters{_describe_shares(counted)},"
        f" {prepared.resolved.total_steps} steps",
        preflight=counted,
        resolved=prepared.resolved,
    )


def _describe_shares(counted: Preflight) -> str:
    """Return the shares of the base's weights that have an adapter or 4 bits, where these are not all."""
    adapted, quantized = counted.adapted_percent, counted.quantized_percent
    texts = [] if adapted in {None, 100} else [f"an adapter on {adapted} % of the weights in the layers"]
    texts += [] if quantized in {None, 100} else [f"{quantized} % of them in 4 bits"]
    return f" ({', '.join(texts)})" if texts else ""


def train(attempt: Attempt, reporter: Reporter) -> TrainerResult:
    """Train, package, publish and copy, unless an earlier attempt has published.

    Raises:
        TrainerError: the job failed.
        InterruptedRunError: a signal stopped the job, which has saved its state.
    """
    target = _artifact_folder(attempt)
    published = package.find(target)
    if published is not None:
        return _reused_result(attempt, target, *published)
    prepared = _prepared(attempt)
    refused = _refusal(attempt, prepared)
    if refused is not None:
        return refused
    _write_counts(attempt.progress, prepared)
    checkpoints = _checkpoints(attempt, prepared, target)
    trained = _trained(attempt, reporter, prepared, target, checkpoints)
    ranks = attempt.ranks
    if trained is None:
        ranks.disconnect()
        return TrainerResult(
            outcome=Outcome.SUCCEEDED, message=f"rank {ranks.rank} of {ranks.size} has finished; rank 0 has the result"
        )
    manifest, artifact, merge_error = _published(attempt, prepared, trained, target)
    _clean_up(attempt, trained, checkpoints)
    with contextlib.suppress(PeerLostError):  # the artifact is published already
        ranks.disconnect()
    result = _with_gates(
        TrainerResult(
            outcome=Outcome.SUCCEEDED,
            message=_summary(trained.evaluation, merge_error),
            preflight=prepared.preflight,
            resolved=prepared.resolved,
            artifact=artifact,
            evaluation=trained.evaluation,
            metrics=manifest.metrics,
        )
    )
    return exports.with_exports(result, attempt.job, attempt.stores, target, attempt.work, attempt.progress)


def _artifact_folder(attempt: Attempt) -> Folder:
    """Return the artifact's folder; in a local run, create its parent folder.

    Raises:
        InvalidSpecError: the output is a local folder, which is not allowed here or cannot be created.
    """
    options, local = attempt.options, attempt.options.output_folder
    if local is None:
        return attempt.folder(options.output, "the artifact's folder")
    if not options.allow_file:
        raise InvalidSpecError(
            f"--output {options.output} is a local folder, which is not allowed for a job in a cluster: use a URI, or"
            " add --allow-file if the job runs outside a cluster"
        )
    try:
        local.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidSpecError(f"cannot create the folder {local}: {error.strerror}; choose another --output") from None
    return attempt.folder(f"file://{local}/{ARTIFACT_FOLDER}", "the artifact's folder")


def _reused_result(
    attempt: Attempt, target: Folder, manifest: ArtifactManifest, artifact: ArtifactStatus
) -> TrainerResult:
    """Return the result of an artifact that an earlier attempt has published.

    Raises:
        InvalidSpecError: the artifact belongs to another spec.
    """
    job, options = attempt.job, attempt.options
    if manifest.spec_digest not in (None, spec_digest(job)):
        raise InvalidSpecError(
            f"{target.uri} already contains the artifact of another spec: choose another --output, or delete"
            " that folder"
        )
    if options.output_folder is None:
        _remove(attempt, options.checkpoints, options.tokens)
    result = _with_gates(
        TrainerResult(
            outcome=Outcome.SUCCEEDED,
            message="an earlier attempt has already published this artifact",
            artifact=artifact,
            evaluation=manifest.evaluation,
            metrics=manifest.metrics,
        )
    )
    if not attempt.ranks.first:
        return result
    return exports.with_exports(result, job, attempt.stores, target, attempt.work, attempt.progress)


def _prepared(attempt: Attempt) -> Prepared:
    """Return the inputs once all ranks have started; each pod reads them once.

    Raises:
        TrainerError: an input is missing, refused or unusable.
        InvalidSpecError: the pods have read different inputs.
    """
    from tunesmith_trainer.training.device import choose_device, device_memory  # noqa: PLC0415

    job, ranks, progress = attempt.job, attempt.ranks, attempt.progress
    requested = job.spec.resources
    device = choose_device(requested.gpus, ranks.local_rank)
    if requested.nodes > 1 and POD_INDEX not in os.environ:
        progress.write_line(
            f"  resources.nodes is {requested.nodes}: outside a cluster one machine trains, with the same result"
        )
    ranks.connect("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    progress.update(stage=Stage.PREPARING)
    # In a cluster the decisions of the CPU stage are kept; a local run has no such stage, and knows its GPU.
    memory = device_memory(device) if job.status.resolved is None else None
    tokens = _tokens(attempt, attempt.tokens)
    prepared = ranks.once_per_pod(
        attempt.work / "prepared",
        lambda: prepare(
            job,
            attempt.stores,
            attempt.work,
            weights=True,
            ranks=ranks.size,
            gpu_memory=memory,
            tokens=tokens,
            task_code=attempt.task_code,
            write_line=progress.write_line,
        ),
    )
    if job.status.resolved is None and ranks.first:
        exports.check(job, attempt.stores)
    if not ranks.agree(prepared.resolved.model_dump_json()):
        raise InvalidSpecError(
            "the base model, the data set or a task folder changed while the pods of this job read it: use files that"
            " do not change while a job runs"
        )
    return prepared


def _write_counts(progress: Progress, prepared: Prepared) -> None:
    for line in summary_lines(prepared.preflight):
        progress.write_line(line)


def _refusal(attempt: Attempt, prepared: Prepared) -> TrainerResult | None:
    """Return the result of a job that cannot fit into its GPU; None if it may fit."""
    message = refusal(prepared.preflight, cluster=not attempt.options.allow_file)
    if message is None:
        return None
    return TrainerResult(
        outcome=Outcome.FAILED,
        reason=FailureReason.WILL_NOT_FIT,
        message=message,
        preflight=prepared.preflight,
        resolved=prepared.resolved,
    )


def _checkpoints(attempt: Attempt, prepared: Prepared, target: Folder) -> Checkpoints:
    """Open the run's checkpoints, beside the artifact unless the command names another folder."""
    ranks = attempt.ranks
    return Checkpoints(
        attempt.folder(
            attempt.options.checkpoints or beside_artifact(target.uri, "checkpoints"), "the checkpoints' folder"
        ),
        attempt.work / ("checkpoints" if ranks.first else f"checkpoints-{ranks.rank}"),
        binding=run_digest(attempt.job, prepared.resolved),
        keep=attempt.job.spec.checkpoint.keep,
        write_line=attempt.progress.write_line,
    )


def _trained(
    attempt: Attempt, reporter: Reporter, prepared: Prepared, target: Folder, checkpoints: Checkpoints
) -> Trained | None:
    """Train and score from the newest usable checkpoint; return the result on the first rank, None on the others."""
    from tunesmith_trainer.training import loop  # noqa: PLC0415

    termination = attempt.termination
    termination.interruption.checkpoints = checkpoints
    begin(reporter, prepared.job, prepared.resolved, attempt.stores, target, attempt.options.output_folder)
    return loop.train(
        loop.Run(
            job=prepared.job,
            prepared=prepared,
            work=attempt.work,
            ranks=attempt.ranks,
            progress=attempt.progress,
            reporter=reporter,
            checkpoints=checkpoints,
            interruption=termination.interruption,
            hung=termination.stop_hung_training,
        )
    )


def _published(
    attempt: Attempt, prepared: Prepared, trained: Trained, target: Folder
) -> tuple[ArtifactManifest, ArtifactStatus, float | None]:
    """Package and publish the artifact, preceded by merged weights if the job requests them.

    Returns:
        The manifest, the published artifact, and the distance of the merged model from the trained one.
    """
    progress = attempt.progress
    progress.update(stage=Stage.PACKAGING)
    folder, merged = attempt.work / ARTIFACT_FOLDER, attempt.work / MERGED_FOLDER
    for old in (folder, merged):
        shutil.rmtree(old, ignore_errors=True)
    manifest, merge_error = package.build(prepared.job, prepared, trained, folder, merged)
    progress.update(stage=Stage.PUBLISHING)
    if merged.is_dir():
        beside = attempt.folder(beside_artifact(target.uri, MERGED_FOLDER), "the merged model")
        merge.publish(merged, beside.child(retry=PUBLISHING_RETRY))
    artifact = package.publish(folder, manifest, target.child(retry=PUBLISHING_RETRY))
    return manifest, artifact, merge_error


def _clean_up(attempt: Attempt, trained: Trained, checkpoints: Checkpoints) -> None:
    """Remove what only another attempt would need; a local run keeps its checkpoints and gets a plot of its curves."""
    local = attempt.options.output_folder
    if local is not None:
        package.write_curves(local / package.CURVES, trained.curve)
    else:
        checkpoints.clear()
    _remove(attempt, attempt.tokens)


def _remove(attempt: Attempt, *uris: str | None) -> None:
    """Remove temporary folders; anything that cannot be removed is left to the bucket's lifecycle rule."""
    for uri in uris:
        if uri is not None:
            with contextlib.suppress(TrainerError):
                attempt.folder(uri, "temporary files").remove()


def _tokens(attempt: Attempt, uri: str | None) -> Folder | None:
    """Open the folder of tokenised rows that outlives this process; None if they are not kept."""
    return attempt.folder(uri, "the folder of tokenised rows") if uri else None


def _with_gates(result: TrainerResult) -> TrainerResult:
    """Return the result, marked as failed if a gate did not pass. The artifact stays published and reported."""
    evaluation = result.evaluation
    if evaluation is None:
        return result
    failure = gates.describe_failures(evaluation)
    if failure is not None:
        change = {"outcome": Outcome.FAILED, "reason": FailureReason.GATE_FAILED, "message": failure}
        return result.model_copy(update=change)
    if evaluation.failures:
        return result.model_copy(update={"message": f"{result.message}; {evaluation.unscored}"})
    return result


def _summary(evaluation: EvaluationStatus, merge_error: float | None) -> str:
    stopped = f"stopped early after step {evaluation.stopped_early_at}; " if evaluation.stopped_early_at else ""
    losses = (
        f"{stopped}held-out loss {evaluation.base_loss:.3f} (base) to {evaluation.loss:.3f} (adapter of step"
        f" {evaluation.published_step}), {evaluation.loss_change}"
    )
    return losses if merge_error is None else f"{losses}; merged weights {merge.describe(merge_error)}"
