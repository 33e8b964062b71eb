"""`tunesmith estimate`: cost and memory estimate of a job, from the trainer's CPU stage on this machine."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from tunesmith.api.finetunejob_status import Verdict
from tunesmith.api.placement import quantity_value
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.manifest import read_manifest
from tunesmith.cli.output import Format, FormatOption, note, print_json, print_line
from tunesmith.cli.run import TaskCodeOption, task_code, trainer_command
from tunesmith.contracts.result import ExitCode, TrainerResult

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tunesmith.api.finetunejob_status import Preflight, Resolved

_GIB = 2**30
_PARTS = ("weights", "trainable", "activations", "logits", "overhead")


def estimate(
    filename: Annotated[Path, typer.Option("--filename", "-f", help="The FineTuneJob manifest (YAML or JSON).")],
    gpu_memory: Annotated[
        str | None,
        typer.Option("--gpu-memory", help="Memory of the GPU, such as 80GiB or 24GB; absent: the verdict is Unknown."),
    ] = None,
    *,
    allow_task_code: TaskCodeOption = False,
    output_format: FormatOption = Format.TEXT,
) -> None:
    """Check a job on this machine, without a GPU or a cluster: rows, tokens, steps, peak memory, and whether it fits.

    The data and the base's configuration are read, its weights are not. Exit codes: 0 it fits or this is unknown, 2 the
    job must be changed, 3 worth retrying.

    Example: tunesmith estimate -f job.yaml --gpu-memory 80GiB
    """
    if output_format is Format.TEXT:  # otherwise the trainer, which reads in the same way, writes the result
        read_manifest(filename, allow_file=True)
    memory = ["--gpu-memory-bytes", str(_bytes(gpu_memory))] if gpu_memory is not None else []
    more = [*memory, *task_code(allowed=allow_task_code)]
    result = _validate([*trainer_command(), "validate", "--job", str(filename), "--allow-file", *more])
    if output_format is Format.JSON:
        print_json(result.model_dump(mode="json", by_alias=True, exclude_none=True))
    elif result.preflight is not None:
        for name, text in _lines(result.preflight, result.resolved):
            print_line(f"{name:<14}{text}")
    if result.exit_code is not ExitCode.DONE:
        note(f"error: {result.reason}: {result.message}")
        raise typer.Exit(int(result.exit_code))


def _bytes(text: str) -> int:
    try:
        size = int(quantity_value(text.removesuffix("B")))
    except ArithmeticError:
        raise CliError(f"--gpu-memory {text} is not a size: write it as 80GiB or 24GB", Exit.USAGE) from None
    if size < _GIB // 4:
        raise CliError(f"--gpu-memory {text} is {size} bytes: write the unit, as in 80GiB", Exit.USAGE)
    return size


def _validate(command: list[str]) -> TrainerResult:
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        path = Path(folder, "result.json")
        try:
            process = subprocess.run(  # noqa: S603 - our own arguments
                [*command, "--progress-port", "0", "--termination-message", str(path)],
                check=False,
                stdout=subprocess.DEVNULL,
            )
        except OSError as error:
            raise CliError(f"the trainer {command[0]} cannot be started: {error.strerror}") from error
        try:
            return TrainerResult.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError):
            raise CliError(
                f"the trainer {command[0]} exited with code {process.returncode} and without a result: check that it is"
                " of this release"
            ) from None


def _lines(counted: Preflight, resolved: Resolved | None) -> Iterator[tuple[str, str]]:
    yield (
        "rows",
        f"{counted.rows} to train on, {counted.validation_rows} held out, {counted.dropped_rows or 0} dropped",
    )
    for dropped in counted.dropped or []:
        example = f", such as {dropped.examples[0]}" if dropped.examples else ""
        yield f"  {dropped.reason}", f"{dropped.rows}{example}"
    for trained in counted.also_trained or []:
        example = f"; the first: {trained.examples[0]}" if trained.examples else ""
        yield "  also trained", f"{trained.sentence}{example}"
    if counted.split_chats:
        yield "  split", f"{counted.split_chats} chats into {counted.split_rows} rows"
    if counted.truncated_rows:
        yield "  truncated", f"{counted.truncated_rows}"
    packed = f", in {counted.packed_sequences} packed sequences" if counted.packed_sequences is not None else ""
    yield "tokens", f"{counted.tokens}, {counted.target_tokens} of them learned{packed}"
    if resolved is not None:
        yield "steps", f"{resolved.total_steps} of {resolved.batch_size} sequences"
        again = "on" if resolved.gradient_checkpointing else "off"
        yield "micro-batch", f"{resolved.micro_batch_size} sequences, gradient checkpointing {again}"
        if resolved.data_parallelism is not None:
            yield "parallelism", resolved.data_parallelism
    yield "trainable", f"{counted.trainable_parameters} parameters"
    yield from _verdicts(counted)


def _verdicts(counted: Preflight) -> Iterator[tuple[str, str]]:
    if counted.servable is not None:
        yield "servable", "yes, by vLLM" if counted.servable.vllm else f"no: {counted.servable.reason}"
    if counted.estimated_peak_bytes is not None:
        yield "peak", f"{_gibibytes(counted.estimated_peak_bytes)} of GPU memory, within about 15 %"
    if counted.peak_parts is not None:
        for part in _PARTS:
            yield f"  {part}", _gibibytes(getattr(counted.peak_parts, f"{part}_bytes"))
    if counted.gpu_memory_bytes is not None:
        yield "GPU", _gibibytes(counted.gpu_memory_bytes)
    if counted.verdict is None:
        yield "verdict", "the job has no GPU (resources.gpus: 0)"
        return
    unknown = counted.verdict is Verdict.UNKNOWN and counted.gpu_memory_bytes is None
    yield "verdict", counted.verdict + (": set --gpu-memory" if unknown else "")
    if counted.suggestion is not None:
        yield "suggestion", counted.suggestion


def _gibibytes(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
