"""The command `tunesmith-trainer`: arguments, signals, exit codes and the termination message."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tunesmith.api.conditions import FailureReason
from tunesmith.contracts.environment import WORK_FOLDER
from tunesmith.contracts.owner import OWNER_FILE, Owner
from tunesmith.contracts.result import Outcome, TrainerResult
from tunesmith_trainer.command_line import parser
from tunesmith_trainer.connections import denied, guarded
from tunesmith_trainer.errors import InterruptedRunError, InvalidSpecError, StorageUnavailableError, TrainerError
from tunesmith_trainer.preflight.spec import load_job
from tunesmith_trainer.process.confidential import clean_output, scrubber_of
from tunesmith_trainer.process.ending import UPLOAD_SECONDS, Ending
from tunesmith_trainer.process.interruption import Interruption
from tunesmith_trainer.process.launch import LAUNCHED, die_with_parent, launch
from tunesmith_trainer.process.progress import Progress, serve
from tunesmith_trainer.process.ranks import PeerLostError, Ranks, lost_peer, of_pod
from tunesmith_trainer.process.watched import watched

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.storage.credentials import Scrubber
    from tunesmith.storage.folder import Folder

log = logging.getLogger("tunesmith_trainer")

CLOSING_SECONDS = 30.0
"""For trackers, after the artifact is published."""
STOPPING_SECONDS = 10.0
"""For trackers, of the grace between SIGTERM and SIGKILL, after the checkpoint."""

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
    arguments = parser().parse_args(argv)
    arguments.argv = argv
    os.environ.update(_ENVIRONMENT)
    die_with_parent()
    logging.captureWarnings(capture=True)
    for noisy in ("py.warnings", "bitsandbytes", "lm_eval"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    scrubber = scrubber_of(arguments.secrets, os.environ)
    with clean_output(scrubber):
        return _run(arguments, scrubber)


def _run(arguments: argparse.Namespace, scrubber: Scrubber) -> int:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s")
    progress = Progress(arguments.format)
    interruption = Interruption()
    ending = Ending(progress, arguments.format, arguments.termination_message, interruption, scrubber)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ending.signalled)
    try:
        # On a person's own machine the network is theirs.
        with contextlib.nullcontext() if arguments.allow_file else guarded():
            watches = arguments.command == "validate" and arguments.deadline and LAUNCHED not in os.environ
            result = _watched(arguments) if watches else _execute(arguments, progress, ending, scrubber)
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


def _report_outage(progress: Progress, scrubber: Scrubber, sentence: str | None) -> None:
    """Show a store that does not answer where the operator sees it, and in the log."""
    text = None if sentence is None else scrubber.clean(sentence)[:2048]
    if text is not None:
        log.warning("%s", text)
    progress.update(outage=text)


def _execute(arguments: argparse.Namespace, progress: Progress, ending: Ending, scrubber: Scrubber) -> TrainerResult:
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
    from tunesmith_trainer.reporting.run import reporter_of  # noqa: PLC0415
    from tunesmith_trainer.store import TRAINING_RETRY, Stores  # noqa: PLC0415

    patient = arguments.command == "train" and not arguments.allow_file
    stores = Stores(
        secrets=arguments.secrets,
        allow_file=arguments.allow_file,
        retry=TRAINING_RETRY if patient else None,
        waiting=partial(_report_outage, progress, scrubber),
    )
    try:
        stores.check_secrets()
        if arguments.job_folder and arguments.cluster and ending.ranks.first:
            what = "the job's folder"
            place = stores.folder(arguments.job_folder, what=what, missing=StorageUnavailableError)
            _sign(job, arguments.cluster, place)
        with _work_folder(arguments.work) as work:
            # Its libraries look where their cache is when they are imported.
            from tunesmith_trainer import stages  # noqa: PLC0415

            if arguments.command == "validate":
                return stages.validate(job, stores, work, progress, arguments)
            reporter = reporter_of(job, work, ending.ranks, arguments)
            try:
                result = stages.train(job, stores, work, ending, reporter, arguments)
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


def _sign(job: FineTuneJob, cluster: str, folder: Folder) -> None:
    """Says in the job's folder whose it is: before anything else is there, and once."""
    metadata = job.metadata
    owner = Owner(cluster=cluster, namespace=metadata.namespace, name=metadata.name, uid=metadata.uid)
    folder.create(OWNER_FILE, owner.model_dump_json(by_alias=True).encode())


def _watched(arguments: argparse.Namespace) -> TrainerResult:
    with _work_folder(arguments.work) as work:
        command = [sys.executable, "-m", "tunesmith_trainer.main", *arguments.argv, "--work", str(work)]
        return watched(command, work, arguments.deadline)


def _launched(arguments: argparse.Namespace, first: Ranks, count: int, progress: Progress) -> TrainerResult:
    progress.say(f"  {count} GPUs: one process for each of them")
    with _work_folder(arguments.work) as work:
        command = [sys.executable, "-m", "tunesmith_trainer.main", *arguments.argv, "--work", str(work)]
        return launch(command, first, count, work)


@contextlib.contextmanager
def _work_folder(asked: Path | None) -> Iterator[Path]:
    default = os.environ.get(WORK_FOLDER)
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
