"""`tunesmith models`: models that can be called, and reasons why some do not serve yet."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tunesmith.cli.connection import connect
from tunesmith.cli.describe import adapter_pool, pods, waiting
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
from tunesmith.cli.pools import usable_pools

if TYPE_CHECKING:
    from tunesmith.api.adapterdeployment import AdapterDeployment
    from tunesmith.api.servingpool import ServingPool


@dataclass(frozen=True)
class Row:
    """One model. `pods` is ready/wanted; `message` is the reason why it does not serve yet, empty if it serves."""

    model: str
    kind: str
    pool: str
    state: str
    pods: str
    message: str


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
        empty="there are no models: apply an AdapterDeployment, or ask the platform for a ServingPool",
    )
    if rows:
        note("Next: tunesmith chat MODEL")


async def _read(namespace: str | None, *, all_namespaces: bool) -> list[Row]:
    async with await connect() as cluster:
        home = namespace or cluster.namespace
        adapters = await cluster.list(Kind.ADAPTER.resource, None if all_namespaces else home)
        pools = await (cluster.list(Kind.POOL.resource) if all_namespaces else usable_pools(cluster, home))
    rows = [adapter_row(parse(Kind.ADAPTER, adapter)) for adapter in adapters]
    rows += [pool_row(parse(Kind.POOL, pool)) for pool in pools]
    return sorted(rows, key=lambda row: (row.kind, row.model))


def adapter_row(adapter: AdapterDeployment) -> Row:
    """Return the row of an AdapterDeployment."""
    return Row(
        model=adapter.model,
        kind="adapter",
        pool=adapter_pool(adapter),
        state=adapter.status.phase.value if adapter.status.phase else "Unknown",
        pods=pods(adapter),
        message=waiting(adapter),
    )


def pool_row(pool: ServingPool) -> Row:
    """Return the row of a ServingPool's base."""
    return Row(
        model=pool.model,
        kind="base",
        pool=f"{pool.metadata.namespace}/{pool.metadata.name}",
        state=pool.status.phase.value if pool.status.phase else "Unknown",
        pods=pods(pool),
        message=waiting(pool),
    )
