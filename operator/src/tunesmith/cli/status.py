"""`tunesmith status`: all jobs, adapters and pools of a namespace at a glance, those with a problem first."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from enum import IntEnum
from typing import TYPE_CHECKING

from tunesmith.cli.connection import connect
from tunesmith.cli.kinds import Kind
from tunesmith.cli.output import (
    AllNamespacesOption,
    Format,
    FormatOption,
    NamespaceOption,
    note,
    print_json,
    print_table,
)
from tunesmith.cli.rows import list_resources, resource_row

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tunesmith.cli.rows import ResourceRow


class Urgency(IntEnum):
    """Order of the resources."""

    PROBLEM = 0
    """It needs action."""
    IN_PROGRESS = 1
    """It runs, or waits for something."""
    DONE = 2
    """It serves, or is complete."""


_BY_STATE = {
    "Failed": Urgency.PROBLEM,
    "Degraded": Urgency.PROBLEM,
    "Stalled": Urgency.PROBLEM,
    "Unknown": Urgency.PROBLEM,
    "Ready": Urgency.DONE,
    "Available": Urgency.DONE,
    "Complete": Urgency.DONE,
}
_SERVING_FIRST = (Kind.POOL, Kind.ADAPTER, Kind.JOB)
_NAMES = {
    Urgency.PROBLEM: ("needs action", "need action"),
    Urgency.IN_PROGRESS: ("is in progress", "are in progress"),
    Urgency.DONE: ("is fine", "are fine"),
}


def status(
    namespace: NamespaceOption = None,
    all_namespaces: AllNamespacesOption = False,  # noqa: FBT002 - typer's convention
    output_format: FormatOption = Format.TEXT,
) -> None:
    """Show the pools, adapters and jobs of a namespace: what needs action first, then what is in progress.

    Example: tunesmith status -n team-a
    """
    rows = by_urgency(asyncio.run(_read(namespace, everywhere=all_namespaces)))
    if output_format is Format.JSON:
        print_json([{**asdict(row), "needsAction": urgency(row) is Urgency.PROBLEM} for row in rows])
        return
    print_table(
        ("", "KIND", "NAME", "STATE", "AGE", "MESSAGE"),
        [
            (
                "!" if urgency(row) is Urgency.PROBLEM else "",
                row.kind,
                f"{row.namespace}/{row.name}",
                row.state,
                row.age,
                row.message,
            )
            for row in rows
        ],
        empty="no pools, adapters or jobs: `tunesmith submit -f job.yaml` starts a job",
    )
    if rows:
        note(counts(rows))
        first = rows[0]
        if urgency(first) is Urgency.PROBLEM:
            note(f"Next: tunesmith get {first.kind} {first.name} -n {first.namespace}")


def urgency(row: ResourceRow) -> Urgency:
    """Return the place of a resource in the order."""
    return _BY_STATE.get(row.state, Urgency.IN_PROGRESS)


def by_urgency(rows: Iterable[ResourceRow]) -> list[ResourceRow]:
    """Return the resources in their order: by urgency, then pools, adapters and jobs."""
    return sorted(rows, key=lambda row: (urgency(row), _SERVING_FIRST.index(Kind(row.kind)), row.namespace, row.name))


def counts(rows: Iterable[ResourceRow]) -> str:
    """Return the numbers of resources in one sentence."""
    found = Counter(map(urgency, rows))
    return ", ".join(f"{found[place]} {_NAMES[place][found[place] != 1]}" for place in Urgency if found[place]) + "."


async def _read(namespace: str | None, *, everywhere: bool) -> list[ResourceRow]:
    async with await connect() as cluster:
        home = None if everywhere else namespace or cluster.namespace
        now = datetime.now(UTC)
        return [
            resource_row(kind, document, now) for kind in Kind for document in await list_resources(cluster, kind, home)
        ]
