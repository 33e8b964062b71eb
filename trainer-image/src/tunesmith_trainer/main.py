"""The command `tunesmith-trainer`: arguments, signals, exit codes and the termination message."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import uuid
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tunesmith.api.conditions import FailureReason
from tunesmith.api.finetunejob_status import EvaluationStatus, Stage
from tunesmith.contracts.location import ARTIFACT_FOLDER, EVENTS_FOLDER, MERGED_FOLDER, beside_artifact
from tunesmith.contracts.owner import OWNER_FILE, Owner
from tunesmith.contracts.progress import PROGRESS_PORT
from tunesmith.contracts.result import TERMINATION_MESSAGE_PATH, Outcome, TrainerResult
from tunesmith_trainer.connections import denied, guarded
from tunesmith_trainer.ending import UPLOAD_SECONDS, Ending
from tunesmith_trainer.errors import InterruptedRunError, InvalidSpecError, StorageUnavailableError, TrainerError
from tunesmith_trainer.interruption import Faults, Interruption
from tunesmith_trainer.launch import die_with_parent, launch
from tunesmith_trainer.progress import Progress, serve
from tunesmith_trainer.ranks import POD_INDEX, PeerLostError, Ranks, lost_peer, of_pod
from tunesmith_trainer.spec import load_job, run_digest, spec_digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.output import Tracker
    from tunesmith_trainer.evaluation.folders import TaskCode
    from tunesmith_trainer.prepare import Prepared
    from tunesmith_trainer.reporting.reporter import Reporter
    from tunesmith_trainer.store import Folder, Stores

log = logging.getLogger("tunesmith_trainer")

RUN_FILE = "run-id"
CLOSING_SECONDS = 30.0
"""For trackers, after the artifact is published."""
STOPPING_SECONDS = 10.0
"""For trackers, of the grace between SIGTERM and SIGKILL, after the checkpoint."""

_EXAMPLES = """examples:
  tunesmith-trainer validate --job job.yaml --allow-file
      checks manifest, data and base model on the CPU, without loading weights
  tunesmith-trainer train --job job.yaml --output out --allow-file
      trains on this machine; the adapter is in out/artifact, the curves in out/metrics.csv
  tunesmith-trainer train --job /etc/tunesmith/job/job.yaml --output s3://tunesmith/store/default/demo-1/artifact
      what a training pod runs

exit codes: 0 done, 2 the job must be changed, 3 worth another attempt, 143 stopped from outside
"""
# Libraries that would report to their makers, draw progress bars of their own or go to the network.
_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "HF_EVALUATE_OFFLINE": "1",  # its metrics are code from the Hub
    "DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "true",  # nothing forks
    "TRANSFORMERS_VERBOSITY": "error",
    # Threads that spin while they wait make training many times slower where the cores are shared.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Without it cuBLAS sums in an order of its own: see training/determinism.py.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


def main() -> NoReturn:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Runs one command and returns its exit code."""
    arguments = _parser().parse_args(argv)
    arguments.argv = argv
    os.environ.update(_ENVIRONMENT)
    die_with_parent()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s")
    logging.captureWarnings(capture=True)
    for noisy in ("py.warnings", "bitsandbytes", "lm_eval"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    progress = Progress(arguments.format)
    interruption = Interruption()
    ending = Ending(progress, arguments.format, arguments.termination_message, interruption)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ending.signalled)
    try:
        # On a person's own machine the network is theirs.
        with contextlib.nullcontext() if arguments.allow_file else guarded():
            result = _execute(arguments, progress, ending)
    except InterruptedRunError as error:
        result = ending.interrupted(error, local="://" not in arguments.output)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        result = _failure(error, ending.ranks)
    if result.lost_peer:
        result = ending.left_alone(result)
    ending.tell(result)
    return int(result.exit_code)


def _failure(error: Exception, ranks: Ranks) -> TrainerResult:
    known = error if isinstance(error, TrainerError) else denied(error, "a connection") or lost_peer(error, ranks)
    if known is None:
        log.error("unexpected error", exc_info=error)
        text = " ".join(str(error).split())[:300]
        return TrainerResult(
            outcome=Outcome.FAILED,
            reason=FailureReason.INTERNAL_ERROR,
            message=f"unexpected {type(error).__name__}: {text}; the log has the traceback",
            retryable=True,
        )
    log.debug("failed", exc_info=error)
    return TrainerResult(
        outcome=Outcome.FAILED,
        reason=known.reason,
        message=str(known),
        retryable=known.retryable,
        lost_peer=isinstance(known, PeerLostError),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tunesmith-trainer",
        description="Trains a LoRA adapter from a FineTuneJob manifest.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("validate", "check the job on the CPU, without weights"),
        ("train", "train, evaluate, package and publish"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=text.capitalize() + ".",
            epilog=_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "--job", type=Path, required=True, metavar="FILE", help="the FineTuneJob manifest, YAML or JSON"
        )
        if name == "validate":
            command.add_argument(
                "--gpu-memory-bytes",
                type=int,
                metavar="N",
                help="memory of the GPU that the job will get, for the verdict (default: not known)",
            )
        if name == "train":
            command.add_argument(
                "--output",
                required=True,
                metavar="PLACE",
                help="uri of the artifact's folder, or a folder here that gets artifact/, checkpoints/ and metrics.csv",
            )
            command.add_argument(
                "--checkpoints",
                metavar="URI",
                help="folder of the checkpoints (default: checkpoints/ beside the artifact)",
            )
        command.add_argument(
            "--tokens",
            metavar="URI",
            help="folder that keeps the tokenised rows for the next attempt (default: tokens/ beside the artifact, of"
            " train in a folder here; otherwise they are not kept)",
        )
        command.add_argument(
            "--job-folder",
            metavar="URI",
            help=f"folder of the job in the store, which gets {OWNER_FILE} (default: none)",
        )
        command.add_argument("--cluster", metavar="ID", help=f"the cluster's identity, for {OWNER_FILE}")
        command.add_argument(
            "--work",
            type=Path,
            metavar="DIR",
            help="for downloads and temporary files (default: $TUNESMITH_WORK, or a temporary folder)",
        )
        command.add_argument(
            "--secrets",
            type=Path,
            default=Path("/etc/tunesmith/secrets"),
            metavar="DIR",
            help="mounted Secrets (default: %(default)s)",
        )
        command.add_argument(
            "--termination-message",
            type=Path,
            metavar="FILE",
            help=f"where the result goes as JSON (default: {TERMINATION_MESSAGE_PATH} if it is there)",
        )
        command.add_argument(
            "--progress-port",
            type=int,
            default=PROGRESS_PORT,
            metavar="PORT",
            help="port of /progress and /metrics, 0 for none (default: %(default)s)",
        )
        command.add_argument(
            "--allow-file",
            action="store_true",
            help="allow file:// and folders of this machine: where no cluster runs the job",
        )
        command.add_argument(
            "--allow-task-code",
            action="store_true",
            help="run the evaluation tasks that the job brings (lmEval.taskFolder), which are code",
        )
        command.add_argument(
            "-o",
            dest="format",
            choices=("text", "json"),
            default="text",
            help="progress as text or one JSON object per line (default: text)",
        )
    return parser


def _execute(arguments: argparse.Namespace, progress: Progress, ending: Ending) -> TrainerResult:
    job = load_job(arguments.job)
    if arguments.command == "train":
        ending.ranks, count = of_pod(job.spec.resources, os.environ)
        if count > 1:
            return _launched(arguments, ending.ranks, count, progress)
        os.environ.update(ending.ranks.environment())
        if not ending.ranks.first:
            progress.mute()
    serving = arguments.progress_port and ending.ranks.first
    server = serve(progress, arguments.progress_port) if serving else None
    # These imports take seconds: a wrong manifest is told before.
    from tunesmith_trainer.store import TRAINING_RETRY, Stores  # noqa: PLC0415

    patient = arguments.command == "train" and not arguments.allow_file
    stores = Stores(
        secrets=arguments.secrets, allow_file=arguments.allow_file, retry=TRAINING_RETRY if patient else None
    )
    try:
        if arguments.job_folder and arguments.cluster and ending.ranks.first:
            what = "the job's folder"
            place = stores.folder(arguments.job_folder, what=what, missing=StorageUnavailableError)
            _sign(job, arguments.cluster, place)
        with _work_folder(arguments.work) as work:
            if arguments.command == "validate":
                return _validate(job, stores, work, progress, arguments)
            reporter = _reporter(job, work, ending, arguments)
            try:
                result = _train(job, stores, work, ending, reporter, arguments)
            except Exception as error:
                # Checkpoints are uploaded from this folder, which may go with the block.
                if ending.interruption.checkpoints is not None:
                    ending.interruption.checkpoints.flush(UPLOAD_SECONDS)
                stopped = isinstance(error, InterruptedRunError)
                missed = reporter.close(Outcome.PREEMPTED if stopped else Outcome.FAILED, {}, STOPPING_SECONDS)
                if missed is not None:
                    log.warning(missed)
                raise
            missed = reporter.close(result.outcome, result.metrics, CLOSING_SECONDS)
            return result if missed is None else result.model_copy(update={"message": f"{result.message}; {missed}"})
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()


def _reporter(job: FineTuneJob, work: Path, ending: Ending, arguments: argparse.Namespace) -> Reporter:
    """What reports to the trackers: on the first rank alone, and to none before the training begins."""
    from tunesmith_trainer.reporting.reporter import Reporter  # noqa: PLC0415

    if not ending.ranks.first:
        return Reporter()
    settings = _trackers(job, arguments)
    local = "://" not in arguments.output
    events = Path(arguments.output).resolve() if local else work
    return Reporter(settings, work / "reporting", events / EVENTS_FOLDER)


def _trackers(job: FineTuneJob, arguments: argparse.Namespace) -> dict[Tracker, dict[str, str]]:
    from tunesmith_trainer.reporting.settings import tracker_settings  # noqa: PLC0415

    wanted = (job.spec.output.reporting or []) if job.spec.output else []
    return tracker_settings(wanted, arguments.secrets, os.environ, local=arguments.allow_file)


def _report(
    reporter: Reporter, job: FineTuneJob, prepared: Prepared, stores: Stores, target: Folder, local: Path | None
) -> None:
    """Begins to report: the job's uid identifies the run over its attempts, in a folder here a file of it does."""
    from tunesmith_trainer.reporting.reporter import parameters_of  # noqa: PLC0415
    from tunesmith_trainer.store import ONE_TRY  # noqa: PLC0415

    if not reporter.wanted:
        return
    metadata = job.metadata
    store = None
    run = metadata.uid or hashlib.sha256(target.uri.encode()).hexdigest()[:32]
    if local is None:
        uri = beside_artifact(target.uri, EVENTS_FOLDER)
        store = stores.folder(uri, what="the folder of event files", missing=StorageUnavailableError)
        store = store.child(retry=ONE_TRY)
    else:
        kept = local / RUN_FILE
        if not kept.exists():
            kept.write_text(f"{uuid.uuid4().hex}\n", encoding="utf-8")
        run = kept.read_text(encoding="utf-8").strip()
    reporter.start(
        run=run,
        name=f"{metadata.namespace}/{metadata.name}",
        parameters=parameters_of(job, prepared.resolved),
        guarded=local is None,
        store=store,
    )


def _sign(job: FineTuneJob, cluster: str, folder: Folder) -> None:
    """Says in the job's folder whose it is: before anything else is there, and once."""
    metadata = job.metadata
    owner = Owner(cluster=cluster, namespace=metadata.namespace, name=metadata.name, uid=metadata.uid)
    folder.create(OWNER_FILE, owner.model_dump_json(by_alias=True).encode())


def _validate(
    job: FineTuneJob, stores: Stores, work: Path, progress: Progress, arguments: argparse.Namespace
) -> TrainerResult:
    from tunesmith_trainer.data.report import told  # noqa: PLC0415
    from tunesmith_trainer.prepare import prepare  # noqa: PLC0415

    progress.update(stage=Stage.VALIDATING)
    if not arguments.allow_file:
        _trackers(job, arguments)
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
    _check_exports(job, stores)
    return TrainerResult(
        outcome=Outcome.SUCCEEDED,
        message=f"{counted.rows} rows to train on with {counted.tokens} tokens, {counted.validation_rows} held out,"
        f" {counted.dropped_rows} dropped;"
        f" {counted.trainable_parameters} trainable parameters, {prepared.resolved.total_steps} steps",
        preflight=counted,
        resolved=prepared.resolved,
    )


def _launched(arguments: argparse.Namespace, first: Ranks, count: int, progress: Progress) -> TrainerResult:
    progress.say(f"  {count} GPUs: one process for each of them")
    with _work_folder(arguments.work) as work:
        command = [sys.executable, "-m", "tunesmith_trainer.main", *arguments.argv, "--work", str(work)]
        return launch(command, first, count, work)


def _refused(prepared: Prepared, *, cluster: bool) -> TrainerResult | None:
    """The result of a job that cannot fit into its GPU."""
    from tunesmith_trainer.preflight import refusal  # noqa: PLC0415

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


def _train(
    job: FineTuneJob, stores: Stores, work: Path, ending: Ending, reporter: Reporter, arguments: argparse.Namespace
) -> TrainerResult:
    progress = ending.progress
    local, target = _target(arguments.output, stores, allow_file=arguments.allow_file)
    from tunesmith_trainer import merge, package  # noqa: PLC0415

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
        return _exported(result, job, stores, target, work, progress) if ending.ranks.first else result

    from tunesmith_trainer.checkpoint import Checkpoints  # noqa: PLC0415
    from tunesmith_trainer.data.report import told  # noqa: PLC0415
    from tunesmith_trainer.store import PUBLISHING_RETRY  # noqa: PLC0415
    from tunesmith_trainer.training.loop import train  # noqa: PLC0415

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
    _report(reporter, job, prepared, stores, target, local)
    faults = Faults(checkpoints, ending.interruption, ending.hung)
    trained = train(job, prepared, progress, reporter, work, faults, ranks)
    if trained is None:
        ranks.part()
        return TrainerResult(
            outcome=Outcome.SUCCEEDED, message=f"rank {ranks.rank} of {ranks.size} is done; rank 0 has the result"
        )
    progress.update(stage=Stage.PACKAGING)
    folder, merged = work / ARTIFACT_FOLDER, work / MERGED_FOLDER
    for old in (folder, merged):
        shutil.rmtree(old, ignore_errors=True)
    manifest = package.build(job, prepared, trained, folder, merged)
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
            message=_summary(trained.evaluation),
            preflight=counted,
            resolved=prepared.resolved,
            artifact=artifact,
            evaluation=trained.evaluation,
            metrics=manifest.metrics,
        )
    )
    return _exported(result, job, stores, target, work, progress)


def _check_exports(job: FineTuneJob, stores: Stores) -> None:
    """Finds before training what would make an export fail."""
    if job.spec.exports:
        from tunesmith_trainer.exports import check  # noqa: PLC0415

        check(job, stores)


def _exported(
    result: TrainerResult, job: FineTuneJob, stores: Stores, published: Folder, work: Path, progress: Progress
) -> TrainerResult:
    """The result with what became of the copies; nothing is copied where a gate did not pass."""
    wanted = job.spec.exports
    if not wanted or result.outcome is not Outcome.SUCCEEDED:
        return result
    from tunesmith_trainer.exports import export_all  # noqa: PLC0415

    progress.update(stage=Stage.EXPORTING)
    copies = export_all(job, stores, published, work, progress.say)
    failed = [copy.message for copy in copies if copy.reason is not None]
    message = result.message
    if failed:
        message += f"; {len(failed)} of {len(wanted)} exports failed: {'; '.join(failed)}"
    return result.model_copy(update={"exports": copies, "message": message})


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
    from tunesmith_trainer.evaluation.folders import TaskCode  # noqa: PLC0415

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
    from tunesmith_trainer.prepare import prepare  # noqa: PLC0415
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
            gpu_memory=memory,
            tokens=tokens,
            task_code=task_code,
            say=progress.say,
        ),
    )
    if job.status.resolved is None and ranks.first:
        _check_exports(job, stores)
    brought = [own.digest for _, own in sorted(prepared.task_folders.items())]
    if not ranks.agree(prepared.resolved.model_dump_json() + "".join(brought)):
        raise InvalidSpecError(
            "the base model, the data set or a task folder changed while the pods of this job read it: give the job"
            " files of its own"
        )
    return prepared


def _judged(result: TrainerResult) -> TrainerResult:
    """The result, failed where a gate did not pass. The artifact stays published and reported."""
    from tunesmith_trainer.evaluation import gates  # noqa: PLC0415

    told = gates.failure(result.evaluation) if result.evaluation else None
    if told is None:
        return result
    return result.model_copy(update={"outcome": Outcome.FAILED, "reason": FailureReason.GATE_FAILED, "message": told})


def _summary(evaluation: EvaluationStatus) -> str:
    return (
        f"held-out loss {evaluation.base_loss:.3f} (base) to {evaluation.loss:.3f} (adapter),"
        f" {-(evaluation.loss_reduction_percent or 0.0):+.0f} %"
    )


def _target(output: str, stores: Stores, *, allow_file: bool) -> tuple[Path | None, Any]:
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


@contextlib.contextmanager
def _work_folder(asked: Path | None) -> Iterator[Path]:
    default = os.environ.get("TUNESMITH_WORK")
    folder = asked or (Path(default) if default else None)
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="tunesmith-") as name:
            os.environ.setdefault("HF_HOME", f"{name}/huggingface")
            yield Path(name)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidSpecError(
            f"cannot make the work folder {folder}: {error.strerror}; choose another with --work"
        ) from None
    os.environ.setdefault("HF_HOME", str(folder / "huggingface"))
    yield folder


if __name__ == "__main__":
    main()
