"""`tunesmith estimate`: cost and memory estimate of a job, from the trainer's CPU stage on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import tempfile
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from tunesmith.api.finetunejob_status import Verdict
from tunesmith.api.manifest import parse_manifest
from tunesmith.api.placement import quantity_value
from tunesmith.cli.connection import connect
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.kinds import Kind, parse
from tunesmith.cli.manifest import read_manifest
from tunesmith.cli.output import Format, FormatOption, note, print_json, print_line
from tunesmith.cli.run import TaskCodeOption, task_code, trainer_command
from tunesmith.cli.throughput import GPU_PRODUCT, GpuTime, gpu_time, node_of, similar, trained_tokens
from tunesmith.cluster.errors import ClusterError, ForbiddenError
from tunesmith.contracts.result import ExitCode, TrainerResult

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.finetunejob_status import Preflight, Resolved

_GIB = 2**30
_CLUSTER_SECONDS = 15
"""Time for reading the cluster's jobs, in seconds."""
_MAX_JOBS = 2000
_PARTS = ("weights", "trainable", "activations", "logits", "overhead")


def estimate(
    filename: Annotated[Path, typer.Option("--filename", "-f", help="The FineTuneJob manifest (YAML or JSON).")],
    gpu_memory: Annotated[
        str | None,
        typer.Option("--gpu-memory", help="Memory of the GPU, such as 80GiB or 24GB; absent: the verdict is Unknown."),
    ] = None,
    *,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            help="Kind of GPU, as in the nodes' label nvidia.com/gpu.product; absent: that of the nodeSelector, or the"
            " only one on which similar jobs ran.",
        ),
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option("--price-per-hour", min=0, help="Price of a GPU per hour: the cost is shown.")
    ] = None,
    allow_task_code: TaskCodeOption = False,
    output_format: FormatOption = Format.TEXT,
) -> None:
    """Check a job on this machine, without a GPU or a cluster: rows, tokens, steps, peak memory, and whether it fits.

    The data and the base's configuration are read, its weights are not. The GPU time is estimated from the last
    completed jobs of the cluster with the same base model and method, or unknown. Exit codes: 0 it fits or this is
    unknown, 2 the job must be changed, 3 worth retrying.

    Example: tunesmith estimate -f job.yaml --gpu-memory 80GiB
    """
    if output_format is Format.TEXT:  # otherwise the trainer, which reads in the same way, writes the result
        read_manifest(filename, allow_file=True)
    memory = ["--gpu-memory-bytes", str(_bytes(gpu_memory))] if gpu_memory is not None else []
    more = [*memory, *task_code(allowed=allow_task_code)]
    result = _validate([*trainer_command(), "validate", "--job", str(filename), "--allow-file", *more])
    time = _gpu_time(filename, result, gpu) if result.preflight is not None else None
    if output_format is Format.JSON:
        document = result.model_dump(mode="json", by_alias=True, exclude_none=True)
        print_json(document if time is None else document | {"gpuTime": _document(time, price_per_hour)})
    elif result.preflight is not None:
        for name, text in [*_lines(result.preflight, result.resolved), *_costs(time, price_per_hour)]:
            print_line(f"{name:<14}{text}")
    if result.exit_code is not ExitCode.DONE:
        note(f"error: {result.reason}: {result.message}")
        raise typer.Exit(int(result.exit_code))


def _gpu_time(filename: Path, result: TrainerResult, gpu: str | None) -> GpuTime | str | None:
    """Return the estimated GPU time, the reason why it is unknown, or None for a job without a GPU."""
    job = parse_manifest(filename.read_text(encoding="utf-8"))
    if job.spec.resources.gpus == 0:
        return None
    try:
        measured, products = asyncio.run(asyncio.wait_for(_measured(job), _CLUSTER_SECONDS))
    except (ClusterError, TimeoutError) as error:
        return f"the jobs of the cluster cannot be read: {error or f'no answer within {_CLUSTER_SECONDS} s'}"
    return gpu_time(job, trained_tokens(result.preflight, result.resolved), measured, products, gpu)


async def _measured(job: FineTuneJob) -> tuple[list[FineTuneJob], dict[str, str]]:
    """Return the similar jobs of the namespace, out of at most `_MAX_JOBS`, and the kinds of GPU of their nodes."""
    async with await connect() as cluster:
        found: list[FineTuneJob] = []
        read = 0
        async with aclosing(cluster.pages(Kind.JOB.resource, cluster.namespace)) as pages:
            async for page, _ in pages:
                read += len(page)
                for document in page:
                    with contextlib.suppress(CliError):  # of another release
                        other = parse(Kind.JOB, document)
                        found += [other] if similar(job, other) else []
                if read >= _MAX_JOBS:
                    break
        products: dict[str, str] = {}
        for name in {node_of(other) for other in found} - {None}:
            with contextlib.suppress(ForbiddenError):
                node = await cluster.find("Node", str(name)) or {}
                labels = node.get("metadata", {}).get("labels") or {}
                products |= {str(name): labels[GPU_PRODUCT]} if GPU_PRODUCT in labels else {}
        return found, products


def _document(time: GpuTime | str, price: float | None) -> dict[str, Any]:
    if isinstance(time, str):
        return {"gpuSeconds": None, "reason": time}
    return {
        "gpuSeconds": round(time.seconds),
        "tokensPerGpuSecond": round(time.tokens_per_second, 1),
        "gpu": time.kind,
        "jobs": list(time.jobs),
        **({"cost": round(time.seconds / 3600 * price, 2)} if price is not None else {}),
    }


def _costs(time: GpuTime | str | None, price: float | None) -> Iterator[tuple[str, str]]:
    if isinstance(time, str):
        yield "GPU time", f"unknown: {time}"
    elif time is not None:
        rate = f"{time.tokens_per_second:.0f} tokens/s per GPU as in {', '.join(time.jobs)}"
        yield "GPU time", f"about {time.seconds:.0f} GPU-seconds on {time.kind}, at {rate}"
        if price is not None:
            yield "cost", f"about {time.seconds / 3600 * price:.2f}, at {price:g} per GPU and hour"


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
    yield from _row_counts(counted)
    packed = f", in {counted.packed_sequences} packed sequences" if counted.packed_sequences is not None else ""
    shared = f", {counted.shared_tokens} computed with another row" if counted.shared_tokens else ""
    yield "tokens", f"{counted.tokens}, {counted.target_tokens} of them learned{shared}{packed}"
    if resolved is not None:
        yield "steps", f"{resolved.total_steps} of {resolved.batch_size} sequences"
        again = "on" if resolved.gradient_checkpointing else "off"
        yield "micro-batch", f"{resolved.micro_batch_size} sequences, gradient checkpointing {again}"
        if resolved.data_parallelism is not None:
            yield "parallelism", resolved.data_parallelism
    yield "trainable", f"{counted.trainable_parameters} parameters"
    if counted.adapted_percent is not None:
        yield "adapted", f"{counted.adapted_percent} % of the weights in the layers"
    if counted.quantized_percent is not None:
        yield "in 4 bits", f"{counted.quantized_percent} % of the weights in the layers"
    yield from _verdicts(counted)


def _row_counts(counted: Preflight) -> Iterator[tuple[str, str]]:
    """Yield what is not used of the rows, or used in another form."""
    for source in counted.sources or []:
        if source.skipped_splits:
            yield "  split", f"{source.split or 'rows'} of {source.uri}, not {', '.join(source.skipped_splits)}"
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
    if counted.chunked_rows:
        yield "  split", f"{counted.chunked_rows} texts longer than maxLength"
    if counted.ignored_keys:
        yield "  ignored keys", ", ".join(f"{ignored.key} ({ignored.messages})" for ignored in counted.ignored_keys)


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
