"""`tunesmith compare`: results, cost and differing fields of two or more jobs."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.connection import connect
from tunesmith.cli.describe import state
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.kinds import Kind, fetch, parse
from tunesmith.cli.output import Format, FormatOption, NamespaceOption, note, print_json, print_table
from tunesmith.contracts.progress import duration

if TYPE_CHECKING:
    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.cluster.resources import Object

_ABSENT = "-"
_MIN_JOBS = 2


def compare(
    jobs: Annotated[list[str], typer.Argument(metavar="JOB JOB...", help="Two or more FineTuneJobs.")],
    namespace: NamespaceOption = None,
    output_format: FormatOption = Format.TEXT,
) -> None:
    """Show scores, steps and cost of jobs side by side, and every field of the spec in which they differ.

    Losses can be compared if the jobs name the same dataset.validation, or have the same digest of the data.

    Example: tunesmith compare support support-2
    """
    if len(jobs) < _MIN_JOBS:
        raise CliError("name two or more jobs, as in `tunesmith compare support support-2`", Exit.USAGE)
    documents = asyncio.run(_read(jobs, namespace))
    models = [parse(Kind.JOB, document) for document in documents]
    results = [figures(model) for model in models]
    different = differences([document["spec"] for document in documents])
    if output_format is Format.JSON:
        print_json(
            [
                {"name": name, "results": result, "differences": {path: values[index] for path, values in different}}
                for index, (name, result) in enumerate(zip(jobs, results, strict=True))
            ]
        )
        return
    heads = list(dict.fromkeys(head for result in results for head in result))
    rows = [(head, *(result.get(head, _ABSENT) for result in results)) for head in heads]
    rows += [(path, *map(_shown, values)) for path, values in different]
    print_table(("", *jobs), rows, empty="")
    lowest = best(models)
    if lowest is None:
        note(f"The losses cannot be compared: {incomparable(models)}.")
        return
    note(f"Lowest held-out loss: {lowest.metadata.name}")
    note(f"Next: tunesmith deploy {lowest.metadata.name} -n {lowest.metadata.namespace} --name ADAPTER")


async def _read(jobs: list[str], namespace: str | None) -> list[Object]:
    async with await connect() as cluster:
        chosen = namespace or cluster.namespace
        return [await fetch(cluster, Kind.JOB, chosen, job) for job in jobs]


def figures(job: FineTuneJob) -> dict[str, str]:
    """Return a job's results and cost by heading, without those that are unknown."""
    status = job.status
    preflight, resolved, artifact = status.preflight, status.resolved, status.artifact
    digest = resolved.dataset_digest if resolved is not None else None
    elapsed = None
    if status.start_time is not None and status.completion_time is not None:
        elapsed = duration((status.completion_time - status.start_time).total_seconds())
    found = {
        "state": state(job),
        **_scores(job),
        "training rows": preflight.rows if preflight is not None else None,
        "digest of the data": digest.removeprefix("sha256:")[:12] if digest is not None else None,
        "steps": resolved.total_steps if resolved is not None else None,
        "time": elapsed,
        "GPU time": duration(status.gpu_seconds) if status.gpu_seconds is not None else None,
        "adapter": f"{artifact.size_bytes / 1e6:.1f} MB" if artifact is not None else None,
    }
    return {head: str(value) for head, value in found.items() if value is not None}


def _scores(job: FineTuneJob) -> dict[str, str | None]:
    scores = job.status.evaluation
    if scores is None:
        return {}
    found = {
        "held-out loss, base": _figure(scores.base_loss),
        "held-out loss, adapter": _figure(scores.loss),
        "published step": None if scores.published_step is None else str(scores.published_step),
    }
    found |= {f"{score.suite} {score.metric}": _figure(score.adapter) for score in scores.scores or []}
    found |= {
        f"gate {gate.suite} {gate.metric}": "passed" if gate.passed else "not passed" for gate in scores.gates or []
    }
    return found


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def differences(specs: list[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Return the paths at which specs differ, each with its value in every spec; None if it is absent."""
    flat = [_leaves(spec) for spec in specs]
    paths = sorted({path for leaves in flat for path in leaves})
    found = [(path, [leaves.get(path) for leaves in flat]) for path in paths]
    return [(path, values) for path, values in found if any(value != values[0] for value in values)]


def _leaves(value: object, path: str = "spec") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {key: leaf for name, part in value.items() for key, leaf in _leaves(part, f"{path}.{name}").items()}
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return {
            key: leaf for index, part in enumerate(value) for key, leaf in _leaves(part, f"{path}[{index}]").items()
        }
    return {path: value}


def _shown(value: object) -> str:
    if value is None:
        return _ABSENT
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def best(jobs: list[FineTuneJob]) -> FineTuneJob | None:
    """Return the job with the lowest held-out loss; None if the losses cannot be compared."""
    losses = [(loss, job) for job in jobs if (loss := _held_out_loss(job)) is not None]
    return None if incomparable(jobs) else min(losses, key=lambda entry: entry[0])[1]


def incomparable(jobs: list[FineTuneJob]) -> str:
    """Return the reason why the held-out losses of jobs cannot be compared; empty if they can."""
    running = [job.metadata.name for job in jobs if job.status.artifact is None]
    if running:
        return f"{', '.join(running)} {'is' if len(running) == 1 else 'are'} not complete"
    without = [job.metadata.name for job in jobs if _held_out_loss(job) is None]
    if without:
        return f"{', '.join(without)} {'has' if len(without) == 1 else 'have'} no held-out loss"
    held_out = [job.spec.dataset.validation for job in jobs]
    digests = {job.status.resolved.dataset_digest if job.status.resolved is not None else None for job in jobs}
    same = (held_out[0] and all(sources == held_out[0] for sources in held_out)) or (
        len(digests) == 1 and None not in digests
    )
    return "" if same else "their held-out rows differ; name the same dataset.validation in all jobs"


def _held_out_loss(job: FineTuneJob) -> float | None:
    scores = job.status.evaluation
    return scores.loss if scores is not None else None
