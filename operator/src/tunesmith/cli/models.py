"""`tunesmith models`: models that can be called, and reasons why some do not serve yet."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING

from tunesmith.cli.connection import connect
from tunesmith.cli.kinds import Kind, parse
from tunesmith.cli.output import (
    AllNamespacesOption,
    Format,
    FormatOption,
    NamespaceOption,
    note,
    print_json,
    print_table,
)
from tunesmith.cli.rows import list_resources, model_row

if TYPE_CHECKING:
    from tunesmith.cli.rows import ModelRow


def models(
    namespace: NamespaceOption = None,
    all_namespaces: AllNamespacesOption = False,  # noqa: FBT002 - typer's convention
    output_format: FormatOption = Format.TEXT,
) -> None:
    """List the models: adapters of the namespace, and the bases it may call.

    Example: tunesmith models -n team-a
    """
    rows = asyncio.run(_read(namespace, all_namespaces=all_namespaces))
    if output_format is Format.JSON:
        print_json([asdict(row) for row in rows])
        return
    print_table(
        ("MODEL", "KIND", "POOL", "STATE", "PODS", "WAITS FOR"),
        [(row.model, row.kind, row.pool, row.state, row.pods, row.message) for row in rows],
        empty="no models: apply an AdapterDeployment, or ask a platform engineer for a ServingPool",
    )
    if rows:
        note("Next: tunesmith chat MODEL")


async def _read(namespace: str | None, *, all_namespaces: bool) -> list[ModelRow]:
    rows = []
    async with await connect() as cluster:
        home = None if all_namespaces else namespace or cluster.namespace
        for kind in (Kind.ADAPTER, Kind.POOL):
            rows += [model_row(parse(kind, document)) for document in await list_resources(cluster, kind, home)]
    return sorted(rows, key=lambda row: (row.kind, row.model))
