"""`tunesmith list`: jobs, adapters, and the pools that they may use."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tunesmith.cli.connection import connect
from tunesmith.cli.kinds import Kind, OptionalKindArgument
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
    from tunesmith.cli.rows import ResourceRow


def list_(
    kind: OptionalKindArgument = None,
    namespace: NamespaceOption = None,
    all_namespaces: AllNamespacesOption = False,  # noqa: FBT002 - typer's convention
    output_format: FormatOption = Format.TEXT,
) -> None:
    """List jobs, adapters and pools of a namespace, and the pools of other namespaces that it may use.

    Example: tunesmith list pools -n team-a
    """
    rows = asyncio.run(_read(kind, namespace, everywhere=all_namespaces))
    if output_format is Format.JSON:
        print_json([asdict(row) for row in rows])
        return
    home = None if all_namespaces else namespace
    print_table(
        ("KIND", "NAME", "STATE", "AGE", "MESSAGE"),
        [(row.kind, f"{row.namespace}/{row.name}", row.state, row.age, row.message) for row in rows],
        empty=_empty_message(kind, home),
    )
    if rows:
        note("Next: tunesmith get KIND NAME")


def _empty_message(kind: Kind | None, namespace: str | None) -> str:
    if kind is Kind.POOL:
        return "no pools that this namespace may use: ask a platform engineer for a ServingPool"
    plural = f"{kind}s" if kind is not None else "jobs, adapters or pools"
    place = f" in {namespace}" if namespace else ""
    return f"no {plural}{place}: `tunesmith submit -f job.yaml` starts a job"


async def _read(kind: Kind | None, namespace: str | None, *, everywhere: bool) -> list[ResourceRow]:
    async with await connect() as cluster:
        home = namespace or cluster.namespace
        now = datetime.now(UTC)
        rows = []
        for listed in Kind if kind is None else (kind,):
            documents = await list_resources(cluster, listed, None if everywhere else home)
            found = [resource_row(listed, document, now) for document in documents]
            rows += sorted(found, key=lambda row: (row.namespace, row.name))
    return rows
