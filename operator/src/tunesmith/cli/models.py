"""`tunesmith models`: what can be called, and what it waits for."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from tunesmith.api.adapterdeployment import AdapterDeployment
from tunesmith.api.conditions import AdapterDeploymentCondition, ServingPoolCondition, find, is_true
from tunesmith.api.servingpool import ServingPool
from tunesmith.cli.connection import connect
from tunesmith.cli.output import Format, FormatOption, NamespaceOption, print_json, print_table
from tunesmith.cluster.errors import ForbiddenError


@dataclass(frozen=True)
class Row:
    """One model. `pods` is ready/wanted; `message` says what it waits for, empty where it serves."""

    model: str
    kind: str
    pool: str
    state: str
    pods: str
    message: str


def models(
    namespace: NamespaceOption = None,
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Those of every namespace.")] = False,  # noqa: FBT002 - typer's way
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


async def _read(namespace: str | None, *, all_namespaces: bool) -> list[Row]:
    async with await connect() as cluster:
        home = namespace or cluster.namespace
        adapters = await cluster.list("AdapterDeployment", None if all_namespaces else home)
        try:
            pools = await cluster.list("ServingPool")
        except ForbiddenError:
            pools = await cluster.list("ServingPool", home)
    rows = [adapter_row(AdapterDeployment.model_validate(adapter)) for adapter in adapters]
    rows += [
        pool_row(pool)
        for pool in map(ServingPool.model_validate, pools)
        if all_namespaces or pool.metadata.namespace == home or pool.spec.allowed_namespaces.from_ == "All"
    ]
    return sorted(rows, key=lambda row: (row.kind, row.model))


def adapter_row(adapter: AdapterDeployment) -> Row:
    """The row of an AdapterDeployment."""
    status = adapter.status
    waiting = next(
        (
            condition.message or condition.reason
            for kind in (AdapterDeploymentCondition.RESOLVED, AdapterDeploymentCondition.READY)
            if (condition := find(status.conditions, kind)) is not None and not is_true(status.conditions, kind)
        ),
        "" if status.conditions else "the operator has not seen it yet",
    )
    pool = status.pool or adapter.spec.pool
    return Row(
        model=adapter.model,
        kind="adapter",
        pool=f"{pool.namespace or adapter.metadata.namespace}/{pool.name}" if pool else "",
        state=status.phase.value if status.phase else "Unknown",
        pods=_count(status.ready_replicas, status.desired_replicas),
        message=waiting,
    )


def pool_row(pool: ServingPool) -> Row:
    """The row of a ServingPool's base."""
    status = pool.status
    available = find(status.conditions, ServingPoolCondition.AVAILABLE)
    message = "the operator has not seen it yet"
    if available is not None:
        holds = is_true(status.conditions, ServingPoolCondition.AVAILABLE)
        message = "" if holds else (available.message or available.reason)
    return Row(
        model=pool.model,
        kind="base",
        pool=f"{pool.metadata.namespace}/{pool.metadata.name}",
        state=status.phase.value if status.phase else "Unknown",
        pods=_count(status.ready_replicas, status.desired_replicas),
        message=message,
    )


def _count(ready: int | None, wanted: int | None) -> str:
    def shown(number: Any) -> str:  # noqa: ANN401 - an int or None
        return "?" if number is None else str(number)

    return f"{ready or 0}/{shown(wanted)}"
