"""`tunesmith list`: jobs, adapters, and the pools that they may use."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tunesmith.cli.connection import connect
from tunesmith.cli.describe import age, state, summary
from tunesmith.cli.errors import CliError
from tunesmith.cli.kinds import Kind, OptionalKindArgument, parse
from tunesmith.cli.output import (
    AllNamespacesOption,
    Format,
    FormatOption,
    NamespaceOption,
    note,
    print_json,
    print_table,
)
from tunesmith.cli.pools import usable_pools

if TYPE_CHECKING:
    from tunesmith.cluster.client import Cluster
    from tunesmith.cluster.resources import Object, Objects


@dataclass(frozen=True)
class Row:
    """One resource."""

    kind: str
    namespace: str
    name: str
    state: str
    age: str
    message: str


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
        empty=_nothing(kind, home),
    )
    if rows:
        note("Next: tunesmith get KIND NAME")


def _nothing(kind: Kind | None, namespace: str | None) -> str:
    if kind is Kind.POOL:
        return "there are no pools that this namespace may use: ask a platform engineer for a ServingPool"
    what = f"{kind}s" if kind is not None else "jobs, adapters or pools"
    place = f" in {namespace}" if namespace else ""
    return f"there are no {what}{place}: `tunesmith submit -f job.yaml` starts a job"


async def _read(kind: Kind | None, namespace: str | None, *, everywhere: bool) -> list[Row]:
    async with await connect() as cluster:
        home = namespace or cluster.namespace
        now = datetime.now(UTC)
        rows = []
        for wanted in Kind if kind is None else (kind,):
            documents = await _documents(cluster, wanted, None if everywhere else home)
            found = [_row(wanted, document, now) for document in documents]
            rows += sorted(found, key=lambda row: (row.namespace, row.name))
    return rows


async def _documents(cluster: Cluster, kind: Kind, namespace: str | None) -> Objects:
    if kind is Kind.POOL and namespace is not None:
        return await usable_pools(cluster, namespace)
    return await cluster.list(kind.resource, namespace)


def _row(kind: Kind, document: Object, now: datetime) -> Row:
    """Return a resource's row, even if this release cannot parse the resource."""
    metadata = document["metadata"]
    try:
        resource = parse(kind, document)
    except CliError as error:
        return Row(kind.value, metadata["namespace"], metadata["name"], "Unknown", "?", str(error))
    created = resource.metadata.creation_timestamp
    return Row(
        kind=kind.value,
        namespace=resource.metadata.namespace,
        name=resource.metadata.name,
        state=state(resource),
        age=age(created, now),
        message=summary(resource, now),
    )
