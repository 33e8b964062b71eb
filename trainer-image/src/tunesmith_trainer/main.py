"""The command `tunesmith-trainer`: arguments, signals, exit codes and the termination message."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
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
from tunesmith_trainer.command_line import parse
from tunesmith_trainer.connections import denied, guarded
from tunesmith_trainer.errors import (
    InterruptedRunError,
    InvalidSpecError,
    OutOfDiskError,
    OutOfMemoryError,
    StorageUnavailableError,
    TrainerError,
)
from tunesmith_trainer.libraries import is_panic
from tunesmith_trainer.manifest import load_job
from tunesmith_trainer.options import Command, ImportOptions
from tunesmith_trainer.process.confidential import clean_output, scrubber_of
from tunesmith_trainer.process.interruption import Interruption
from tunesmith_trainer.process.launch import LAUNCHED, die_with_launcher, launch
from tunesmith_trainer.process.progress import Progress, serve
from tunesmith_trainer.process.ranks import PeerLostError, Ranks, lost_peer, of_pod
from tunesmith_trainer.process.termination import UPLOAD_SECONDS, Termination
from tunesmith_trainer.process.watched import watched

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.storage.credentials import Scrubber
    from tunesmith.storage.folder import Retry
    from tunesmith_trainer.options import ProcessOptions, RunOptions
    from tunesmith_trainer.stages import Attempt
    from tunesmith_trainer.store import Stores

log = logging.getLogger("tunesmith_trainer")

CLOSING_SECONDS = 30.0
"""Time for trackers to finish after the artifact is published, in seconds."""
_MAX_MESSAGE = 4096
"""Characters of a failure's message; a name in it may be as large as a row."""
STOPPING_SECONDS = 10.0
"""Time for trackers to finish after the checkpoint, out of the grace period between SIGTERM and SIGKILL, in seconds."""

# Libraries that would otherwise send telemetry, draw their own progress bars or access the network.
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
    # Without it cuBLAS sums in no fixed order: see training/determinism.py.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


_PROGRAM_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    ImportError,
    LookupError,
    NameError,
    RuntimeError,
    StopIteration,
    SyntaxError,
    TypeError,
    ValueError,
)
"""Errors of a program, which another attempt would raise again; those of devices, stores and trackers are others."""
_UNUSABLE_FILES = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR})
"""Errors of files that another attempt would have too."""
_OF_DEVICES = re.compile(r"CUDA (error|driver)|CUBLAS_STATUS|cuDNN error|CUDNN_STATUS|cusolver error|NCCL|NVML")
"""Text of the errors of GPUs, which torch raises as RuntimeError."""
_OF_INDICES = "device-side assert"
"""Text of the error of a GPU whose program read or wrote outside of a tensor."""


def main() -> NoReturn:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    options = parse(argv)
    os.environ.update(_ENVIRONMENT)
    die_with_launcher()
    logging.captureWarnings(capture=True)
    for noisy in ("py.warnings", "bitsandbytes", "lm_eval"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    scrubber = scrubber_of(options.secrets, os.environ)
    with clean_output(scrubber):
        return _run(options, argv, scrubber)


def _run(options: RunOptions | ImportOptions, argv: Sequence[str], scrubber: Scrubber) -> int:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(message)s")
    progress = Progress(options.format)
    termination = Termination(progress, options.format, options.termination_message, Interruption(), scrubber)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, termination.handle_signal)
    try:
        # A local run uses the network of its user, unguarded.
        with contextlib.nullcontext() if options.allow_file else guarded():
            if isinstance(options, ImportOptions):
                result = _import(options, termination, scrubber)
            else:
                result = _execute(options, argv, termination, scrubber)
    except InterruptedRunError as error:
        result = termination.interrupted_result(error, local=options.output_folder is not None)
    except Exception as error:  # noqa: BLE001 - every error becomes a result
        result = failure(error, termination.ranks)
    except BaseException as error:
        if not is_panic(error):
            raise
        result = failure(RuntimeError(f"a library in Rust panicked: {error}"), termination.ranks)
    if result.lost_peer:
        result = termination.after_lost_peer(result)
    termination.report(result)
    return int(result.exit_code)


def failure(error: Exception, ranks: Ranks) -> TrainerResult:
    """Return the result of a run that raised an error."""
    if isinstance(error, MemoryError):
        error = OutOfMemoryError(
            "memory ran out: a row, its text after the chat template, or a file of the base model is too large; split"
            " or remove it, or use a machine or resources.memory with more memory"
        )
    if _is_full_disk(error):
        error = OutOfDiskError(
            f"the disk has no room ({' '.join(str(error).split())[:300]}): free some, or use a larger one; a local run"
            " takes another folder with --work, and its result with --output"
        )
    if isinstance(error, OSError) and error.filename is not None and error.errno in _UNUSABLE_FILES:
        error = TrainerError(
            f"a file or folder of this machine cannot be used ({' '.join(str(error).split())[:300]}): correct its"
            " permissions; a local run takes another folder with --work, and its result with --output"
        )
    known = error if isinstance(error, TrainerError) else denied(error, "a connection") or lost_peer(error, ranks)
    if known is None:
        log.error("unexpected error", exc_info=error)
        text = " ".join(str(error).split())[:300]
        return TrainerResult(
            outcome=Outcome.FAILED,
            reason=FailureReason.INTERNAL_ERROR,
            message=_writable(f"unexpected {type(error).__name__}: {text}; the log has the traceback"),
            retryable=not _is_deterministic(error),
        )
    log.debug("failed", exc_info=error)
    return TrainerResult(
        outcome=Outcome.FAILED,
        reason=known.reason,
        message=_writable(str(known)),
        retryable=known.retryable,
        lost_peer=isinstance(known, PeerLostError),
    )


def _is_full_disk(error: BaseException) -> bool:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or (not isinstance(error, TrainerError) and os.strerror(errno.ENOSPC) in str(error))


def _writable(text: str) -> str:
    """Return the text within its limit, without halves of surrogate pairs: names of files and keys may have them."""
    shown = text if len(text) <= _MAX_MESSAGE else f"{text[: _MAX_MESSAGE - 1]}…"
    return shown.encode("utf-8", "backslashreplace").decode("utf-8")


def _is_deterministic(error: Exception) -> bool:
    """Return True if another attempt would raise the same unexpected error."""
    text = str(error)
    of_device = _OF_DEVICES.search(text) is not None and _OF_INDICES not in text
    # The class Exception itself is raised by the libraries in Rust that read tokenizers.
    of_program = isinstance(error, _PROGRAM_ERRORS) or type(error) is Exception
    return of_program and not (isinstance(error, RuntimeError) and of_device)


def _report_outage(progress: Progress, scrubber: Scrubber, sentence: str | None) -> None:
    """Show a store that does not answer in the progress, which the operator reads, and in the log."""
    text = None if sentence is None else scrubber.clean(sentence)[:2048]
    if text is not None:
        log.warning("%s", text)
    progress.update(outage=text)


def _import(options: ImportOptions, termination: Termination, scrubber: Scrubber) -> TrainerResult:
    """Import an adapter of another trainer."""
    stores = _stores(options, termination, scrubber, None)
    if options.job_folder and options.cluster and options.owner:
        namespace, name, uid = options.owner.split("/")
        owner = Owner(cluster=options.cluster, namespace=namespace, name=name, uid=uid)
        _record_owner(owner, stores, options.job_folder)
    with _work_folder(options.work) as work:
        from tunesmith_trainer.foreign.adapter import run  # noqa: PLC0415

        return run(options, stores, work, termination.progress)


def _execute(options: RunOptions, argv: Sequence[str], termination: Termination, scrubber: Scrubber) -> TrainerResult:
    """Run the command in this process, or in child processes if it needs several or one that can be killed."""
    if options.command is Command.VALIDATE and options.deadline_seconds and LAUNCHED not in os.environ:
        with _work_folder(options.work) as work:
            return watched(_child_command(argv, work), work, options.deadline_seconds)
    job = load_job(options.job)
    if options.command is Command.TRAIN:
        termination.ranks, count = of_pod(job.spec.resources, os.environ)
        if count > 1:
            termination.progress.write_line(f"  {count} GPUs: one process per GPU")
            with _work_folder(options.work) as work:
                return launch(_child_command(argv, work), termination.ranks, count, work)
        os.environ.update(termination.ranks.environment())
        if not termination.ranks.first:
            termination.progress.mute()
    with progress_served(options, termination):
        return _run_stage(options, job, termination, scrubber)


def _child_command(argv: Sequence[str], work: Path) -> list[str]:
    return [sys.executable, "-m", "tunesmith_trainer.main", *argv, "--work", str(work)]


@contextlib.contextmanager
def progress_served(options: RunOptions, termination: Termination) -> Iterator[None]:
    """Serve the progress over HTTP while the block runs, on the first rank only."""
    if not options.progress_port or not termination.ranks.first:
        yield
        return
    server = serve(termination.progress, options.progress_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def _run_stage(options: RunOptions, job: FineTuneJob, termination: Termination, scrubber: Scrubber) -> TrainerResult:
    """Run the command's stage."""
    from tunesmith_trainer.store import TRAINING_RETRY  # noqa: PLC0415

    long_retries = options.command is Command.TRAIN and not options.allow_file
    stores = _stores(options, termination, scrubber, TRAINING_RETRY if long_retries else None)
    if options.job_folder and options.cluster and termination.ranks.first:
        metadata = job.metadata
        owner = Owner(cluster=options.cluster, namespace=metadata.namespace, name=metadata.name, uid=metadata.uid)
        _record_owner(owner, stores, options.job_folder)
    with _work_folder(options.work) as work:
        # Libraries read the location of their cache when they are imported.
        from tunesmith_trainer import stages  # noqa: PLC0415

        attempt = stages.Attempt(job, options, stores, work, termination)
        return stages.validate(attempt) if options.command is Command.VALIDATE else _train(attempt)


def _stores(options: ProcessOptions, termination: Termination, scrubber: Scrubber, retry: Retry | None) -> Stores:
    """Return the stores of a command, after a check of its Secrets."""
    # These imports take seconds: an invalid manifest is reported before them.
    from tunesmith_trainer.store import Stores  # noqa: PLC0415

    stores = Stores(
        secrets=options.secrets,
        allow_file=options.allow_file,
        retry=retry,
        waiting=partial(_report_outage, termination.progress, scrubber),
    )
    stores.check_secrets()
    return stores


def _train(attempt: Attempt) -> TrainerResult:
    """Train, and close the trackers' runs and the checkpoints' uploads whatever the outcome."""
    from tunesmith_trainer import stages  # noqa: PLC0415
    from tunesmith_trainer.reporting.run import reporter_of  # noqa: PLC0415

    options, termination = attempt.options, attempt.termination
    reporter = reporter_of(
        attempt.job,
        attempt.work,
        attempt.ranks,
        secrets=options.secrets,
        output=options.output_folder,
        local=options.allow_file,
    )
    try:
        result = stages.train(attempt, reporter)
    except Exception as error:
        # Checkpoints are uploaded from the work folder, which may be removed when the caller's block is left.
        if termination.interruption.checkpoints is not None:
            termination.interruption.checkpoints.flush(UPLOAD_SECONDS)
        stopped = isinstance(error, InterruptedRunError)
        missed = reporter.close(Outcome.PREEMPTED if stopped else Outcome.FAILED, {}, STOPPING_SECONDS)
        if missed is not None:
            log.warning(missed)
        raise
    missed = reporter.close(result.outcome, result.metrics, CLOSING_SECONDS)
    return result if missed is None else result.model_copy(update={"message": f"{result.message}; {missed}"})


def _record_owner(owner: Owner, stores: Stores, uri: str) -> None:
    """Record the owner of a folder in it, once, before anything else is written there."""
    folder = stores.folder(uri, what="the owner's folder", missing=StorageUnavailableError)
    folder.create(OWNER_FILE, owner.model_dump_json(by_alias=True).encode())


@contextlib.contextmanager
def _work_folder(option: Path | None) -> Iterator[Path]:
    default = os.environ.get(WORK_FOLDER)
    folder = option or (Path(default) if default else None)
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="tunesmith-") as name:
            os.environ.setdefault("HF_HOME", f"{name}/huggingface")
            yield Path(name)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidSpecError(
            f"cannot create the work folder {folder}: {error.strerror}; choose another with --work"
        ) from None
    os.environ.setdefault("HF_HOME", str(folder / "huggingface"))
    yield folder


if __name__ == "__main__":
    main()
