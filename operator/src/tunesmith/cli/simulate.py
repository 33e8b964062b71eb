"""`tunesmith simulate`: what autoscaling would do with a trace of requests."""

from __future__ import annotations

import csv
import json
from datetime import UTC, datetime
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import ValidationError

from tunesmith.api.adapterdeployment import AdapterDeployment
from tunesmith.api.autoscaling import AdapterAutoscaling
from tunesmith.api.manifest import ManifestError, load_document
from tunesmith.api.servingpool import ServingPool
from tunesmith.autoscale.policies import Dynamo, Fixed, Hpa, Tunesmith
from tunesmith.autoscale.record import read
from tunesmith.autoscale.simulate import Arrival, Outcome, Policy, Timing, simulate, smallest
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.output import Format, FormatOption, note, print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tunesmith.api.autoscaling import Autoscaling

MAX_REQUESTS = 5_000_000
DEFAULT_START_SECONDS = 60.0
_COLUMNS = ("time", "model", "seconds")
_LONGEST_SECONDS = 7 * 86400
_OK = 200
Resource = TypeVar("Resource", ServingPool, AdapterDeployment)


def simulate_(
    trace: Annotated[
        Path | None, typer.Option(help="CSV with time, model, seconds; or the gateway's access log.")
    ] = None,
    filename: Annotated[
        Path | None, typer.Option("--filename", "-f", help="Manifest of the ServingPool, with autoscaling.")
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="Manifest of an AdapterDeployment, whose autoscaling holds for every model; absent: 0 to 8."),
    ] = None,
    start_seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="From the creation of a pod until it serves; absent: the manifest's status.engineStartSeconds, or 60.",
        ),
    ] = None,
    load_seconds: Annotated[float, typer.Option(min=0, help="From the placement of an adapter until it answers.")] = 1,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests that a pod computes at once; absent: twice targetConcurrency.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="PNG of pods and waits over time to write; needs the extra tunesmith[plot].")
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Operator's log, whose recorded decisions are taken again instead.")
    ] = None,
    output_format: FormatOption = Format.TEXT,
) -> None:
    """Replay a trace of requests, or recorded decisions, through the operator's own scaling decisions.

    Beside them are one HorizontalPodAutoscaler on the pool's requests, and the smallest fixed pools whose requests wait
    no longer: one in which every pod holds every adapter, as with the HorizontalPodAutoscaler, and one whose copies are
    in proportion to the arrivals, as NVIDIA Dynamo computes them.

    Example:
      tunesmith simulate --trace access.log -f pool.yaml --start-seconds 90
      tunesmith simulate --replay operator.log
    """
    if replay is not None:
        _replay(replay, output_format)
        return
    if trace is None or filename is None:
        raise CliError("pass --trace and --filename, or --replay", Exit.USAGE)
    pool = _read(filename, ServingPool)
    rule = pool.spec.autoscaling
    if rule is None:
        raise CliError(f"{filename}: the pool has no spec.autoscaling to simulate: add it", Exit.USAGE)
    rows = read_trace(trace)
    if not rows:
        raise CliError(f"{trace} has no requests", Exit.USAGE)
    first = rows[0][0]
    arrivals = [Arrival(at - first, model, seconds) for at, model, seconds in rows]
    models = sorted({arrival.model for arrival in arrivals})
    measured = pool.status.engine_start_seconds
    timing = Timing(
        start_seconds=start_seconds if start_seconds is not None else measured or DEFAULT_START_SECONDS,
        load_seconds=load_seconds,
        concurrency=concurrency or 2 * rule.target_concurrency,
        capacity=pool.spec.engine.adapter_capacity,
        slots=pool.spec.engine.max_loras,
        gpus=pool.spec.resources.gpus,
    )
    policies: list[tuple[str, Policy]] = [
        ("tunesmith", Tunesmith(datetime.fromtimestamp(first, UTC), rule, _rules(adapter, models), timing)),
        ("hpa", Hpa(rule.target_concurrency, rule.min_replicas, rule.max_replicas, models)),
    ]
    outcomes = []
    for name, policy in policies:
        note(f"simulating {name} with {len(arrivals)} requests for {len(models)} models")
        outcomes.append((name, simulate(arrivals, policy, timing)))
    own = outcomes[0][1]
    for name, policy_of in (
        ("fixed", lambda pods: Fixed(pods, models)),
        ("dynamo-like", lambda pods: Dynamo(Fixed(pods, models), timing.slots)),
    ):
        found = smallest(arrivals, policy_of, timing, own.wait(0.99), own.unserved, rule.max_replicas)
        if found is not None:
            outcomes.append((f"{name} ({found[0]} pods)", found[1]))
        else:
            note(f"No {name} pool of up to {rule.max_replicas} pods waits as little.")
    if plot is not None:
        _plot(outcomes, plot)
    if output_format is Format.JSON:
        print_json([{"policy": name, **_figures(outcome)} for name, outcome in outcomes])
        return
    heads = ("POLICY", "GPU-HOURS", "PODS", "CHANGES", "WAIT P50", "P95", "P99", "UNSERVED")
    print_table(heads, [_row(name, outcome) for name, outcome in outcomes], empty="")


def _replay(path: Path, output_format: Format) -> None:
    """Take recorded decisions again.

    Raises:
        CliError: the log cannot be read, or a decision differs.
    """
    records = []
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    record = read(line)
                except ValueError as error:
                    raise CliError(f"{path}, line {number}: {error}", Exit.USAGE) from None
                if record is not None:
                    records.append((record, record.again()))
    except OSError as error:
        raise CliError(f"{path} cannot be read: {error}", Exit.USAGE) from None
    differing = sum(
        1 for record, again in records if (record.replicas, record.reason) != (again.replicas, again.reason)
    )
    if output_format is Format.JSON:
        print_json(
            [
                {
                    "resource": record.resource,
                    "before": record.inputs.current,
                    "recorded": record.replicas,
                    "again": again.replicas,
                    "reason": again.reason,
                }
                for record, again in records
            ]
        )
    else:
        rows = [
            (record.resource, _size(record.inputs.current), str(record.replicas), str(again.replicas), again.reason)
            for record, again in records
        ]
        heads = ("RESOURCE", "BEFORE", "RECORDED", "AGAIN", "REASON")
        print_table(heads, rows, empty=f"{path} has no recorded decisions: the operator logs them at level INFO")
    if differing:
        raise CliError(f"{differing} of {len(records)} decisions differ: this release decides otherwise", Exit.FAILED)


def _size(replicas: int | None) -> str:
    return "-" if replicas is None else str(replicas)


def _plot(outcomes: Sequence[tuple[str, Outcome]], path: Path) -> None:
    try:
        from tunesmith.cli.plot import plot_outcomes  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise CliError("--plot needs matplotlib: pip install 'tunesmith[plot]'", Exit.USAGE) from None
    try:
        plot_outcomes(outcomes, path)
    except (OSError, ValueError) as error:
        raise CliError(f"{path} cannot be written: {error}", Exit.USAGE) from None


def read_trace(path: Path) -> list[tuple[float, str, float]]:
    """Return the requests of a trace, as arrival in seconds, model and duration in seconds, sorted by arrival.

    Raises:
        CliError: the file is missing, too long, or has a line that is not a request.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            head = file.read(1)
            file.seek(0)
            rows = list(_of_log(file, path) if head == "{" else _of_csv(file, path))
    except FileNotFoundError:
        raise CliError(f"the file {path} does not exist: pass the trace with --trace", Exit.USAGE) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CliError(f"{path} cannot be read: {error}", Exit.USAGE) from None
    rows.sort(key=lambda row: row[0])
    if rows and rows[-1][0] - rows[0][0] > _LONGEST_SECONDS:
        raise CliError(f"{path} spans more than 7 days: cut it", Exit.USAGE)
    return rows


def _of_csv(lines: Iterator[str], path: Path) -> Iterator[tuple[float, str, float]]:
    reader = csv.DictReader(lines)
    if not set(_COLUMNS) <= set(reader.fieldnames or ()):
        raise CliError(f"{path}: the first line does not have the columns {', '.join(_COLUMNS)}", Exit.USAGE)
    for number, row in enumerate(reader, 2):
        _check_count(number, path)
        try:
            yield _moment(row["time"]), row["model"], _duration(float(row["seconds"]))
        except (TypeError, ValueError) as error:
            raise CliError(f"{path}, line {number}: {error}", Exit.USAGE) from None


def _of_log(lines: Iterator[str], path: Path) -> Iterator[tuple[float, str, float]]:
    """Yield the answered requests of an access log, whose times are those of the answers' ends."""
    for number, line in enumerate(lines, 1):
        _check_count(number, path)
        try:
            record: dict[str, Any] = json.loads(line)
            if record.get("status") == _OK and record.get("model"):
                seconds = _duration(float(record["seconds"]))
                yield _moment(record["time"]) - seconds, str(record["model"]), seconds
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CliError(f"{path}, line {number} is not a record of the access log: {error}", Exit.USAGE) from None


def _check_count(number: int, path: Path) -> None:
    if number > MAX_REQUESTS:
        raise CliError(f"{path} has more than {MAX_REQUESTS} lines: cut it", Exit.USAGE)


def _moment(text: str) -> float:
    """Return a time, given in seconds or in ISO 8601, in seconds."""
    try:
        return float(text)
    except ValueError:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _duration(seconds: float) -> float:
    if not 0 <= seconds <= 86400:  # noqa: PLR2004 - a day
        raise ValueError(f"{seconds} s is not a duration of a request")
    return seconds


def _rules(path: Path | None, models: Sequence[str]) -> Mapping[str, Autoscaling]:
    rule: Autoscaling | None = AdapterAutoscaling(min_replicas=0, max_replicas=8)
    if path is not None:
        rule = _read(path, AdapterDeployment).spec.autoscaling
        if rule is None:
            raise CliError(f"{path}: the adapter has no spec.autoscaling to simulate: add it", Exit.USAGE)
    assert rule is not None  # noqa: S101
    return dict.fromkeys(models, rule)


def _read(path: Path, kind: type[Resource]) -> Resource:
    try:
        document = load_document(path.read_text(encoding="utf-8"))
        if document.get("kind") != kind.__name__:
            raise CliError(f"{path} is a {document.get('kind')}, not a {kind.__name__}", Exit.USAGE)
        return kind.model_validate(document)
    except FileNotFoundError:
        raise CliError(f"the file {path} does not exist", Exit.USAGE) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"{path} cannot be read: {error}", Exit.USAGE) from None
    except ManifestError as error:
        raise CliError("\n".join(f"{path}: {problem}" for problem in error.problems), Exit.USAGE) from None
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        lines = [f"{path}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems]
        raise CliError("\n".join(lines), Exit.USAGE) from None


def _figures(outcome: Outcome) -> dict[str, object]:
    sizes = [size for _, size in outcome.sizes]
    return {
        "gpuHours": round(outcome.gpu_hours, 2),
        "minPods": min(sizes),
        "maxPods": max(sizes),
        "changes": outcome.changes,
        "waitSeconds": {f"p{share:g}": round(outcome.wait(share / 100), 3) for share in (50, 95, 99, 99.9)},
        "unserved": outcome.unserved,
    }


def _row(name: str, outcome: Outcome) -> tuple[str, ...]:
    sizes = [size for _, size in outcome.sizes]
    waits = [f"{outcome.wait(share):.2f} s" for share in (0.5, 0.95, 0.99)]
    pods = f"{min(sizes)}–{max(sizes)}"
    return name, f"{outcome.gpu_hours:.1f}", pods, str(outcome.changes), *waits, str(outcome.unserved)
