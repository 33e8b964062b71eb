"""`tunesmith wait`: waits until a job is complete, an adapter answers or a pool is available."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.api.adapterdeployment import AdapterDeployment, RevisionState
from tunesmith.api.conditions import (
    AdapterDeploymentCondition,
    AdapterDeploymentReason,
    ServingPoolCondition,
    find,
    is_true,
)
from tunesmith.cli.connection import connect
from tunesmith.cli.describe import next_step, summary, waiting
from tunesmith.cli.duration import parse_duration
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.follow import follow
from tunesmith.cli.kinds import Kind, KindArgument, NameArgument, missing, parse
from tunesmith.cli.output import Format, FormatOption, NamespaceOption, note, print_json, print_line

if TYPE_CHECKING:
    from datetime import timedelta

    from tunesmith.api.servingpool import ServingPool
    from tunesmith.cluster.client import Cluster
    from tunesmith.cluster.resources import Object

_FINAL = {
    AdapterDeploymentReason.FINE_TUNE_JOB_FAILED,
    AdapterDeploymentReason.NOT_SERVABLE,
    AdapterDeploymentReason.RANK_TOO_HIGH,
}
"""Reasons of `Resolved` that persist until somebody changes the adapter or its pool."""
_GIVEN_UP = {AdapterDeploymentReason.ROLLED_BACK, AdapterDeploymentReason.ROLLOUT_ABORTED}


def wait(
    kind: KindArgument,
    name: NameArgument,
    namespace: NamespaceOption = None,
    timeout: Annotated[
        str | None, typer.Option("--timeout", help="Longest wait: 90s, 30m, 2h; absent: no limit.")
    ] = None,
    output_format: FormatOption = Format.TEXT,
) -> None:
    """Wait until a job is complete, the newest version of an adapter answers, or a pool is available.

    The exit code is 1 if that can no longer happen (a failed job, an adapter that no pod can load) or the timeout has
    passed. Ctrl-C only stops waiting.

    Example: tunesmith wait adapter support --timeout 10m
    """
    limit = parse_duration(timeout, "--timeout") if timeout is not None else None
    try:
        asyncio.run(_wait(kind, name, namespace, limit, output_format))
    except KeyboardInterrupt:
        raise typer.Exit(Exit.INTERRUPTED) from None


async def _wait(kind: Kind, name: str, namespace: str | None, limit: timedelta | None, output_format: Format) -> None:
    async with await connect() as cluster:
        chosen = namespace or cluster.namespace
        try:
            async with asyncio.timeout(limit.total_seconds() if limit is not None else None):
                if kind is Kind.JOB:
                    await follow(cluster, chosen, name, output_format)
                else:
                    await _until_serving(cluster, kind, chosen, name, output_format)
        except TimeoutError:
            raise CliError(
                f"{kind.resource} {chosen}/{name} was not ready within {limit}:"
                f" `tunesmith get {kind} {name} -n {chosen}` shows what it waits for"
            ) from None


async def _until_serving(cluster: Cluster, kind: Kind, namespace: str, name: str, output_format: Format) -> None:
    known: Object | None = None
    shown = ""
    async for event in cluster.watch(kind.resource, namespace, fields=f"metadata.name={name}"):
        if event.type == "DELETED" or (event.type == "SYNCED" and known is None):
            raise missing(kind, namespace, name)
        if event.type == "SYNCED":
            continue
        known = event.object
        resource = parse(kind, known)
        failure = final_failure(resource)
        if failure is not None:
            raise CliError(f"{kind.resource} {namespace}/{name}: {failure}")
        if serves(resource):
            if output_format is Format.JSON:
                print_json(known)
            else:
                print_line(f"{name} serves: {summary(resource, datetime.now(UTC))}")
                note(f"Next: {next_step(resource)}")
            return
        line = waiting(resource) or _progress(resource)
        if line != shown and output_format is Format.TEXT:
            print_line(f"{name}  {line}")
        shown = line


def _progress(resource: AdapterDeployment | ServingPool) -> str:
    rollout = resource.status.rollout if isinstance(resource, AdapterDeployment) else None
    return rollout.message if rollout is not None and rollout.is_running else "the new version is being loaded"


def serves(resource: AdapterDeployment | ServingPool) -> bool:
    """Return True if the resource's newest spec is served: by the newest revision, or by a ready pod."""
    status = resource.status
    if (status.observed_generation or 0) < resource.metadata.generation:
        return False
    if isinstance(resource, AdapterDeployment):
        newest = next(iter(resource.status.revisions), None)
        resolved = is_true(status.conditions, AdapterDeploymentCondition.RESOLVED)
        # During a rollout the old version may still answer everything.
        return resolved and newest is not None and newest.ready_replicas > 0 and newest.weight is None
    return is_true(status.conditions, ServingPoolCondition.AVAILABLE)


def final_failure(resource: AdapterDeployment | ServingPool) -> str | None:
    """Return the reason why the resource cannot serve until somebody changes it or its pool; None if it still can."""
    status = resource.status
    if (status.observed_generation or 0) < resource.metadata.generation or not isinstance(resource, AdapterDeployment):
        return None
    resolved = find(status.conditions, AdapterDeploymentCondition.RESOLVED)
    if resolved is not None and resolved.status == "False" and resolved.reason in _FINAL:
        return resolved.message
    progressing = find(status.conditions, AdapterDeploymentCondition.PROGRESSING)
    if progressing is not None and progressing.reason in _GIVEN_UP:
        return progressing.message
    newest = next(iter(resource.status.revisions), None)
    if newest is not None and newest.state is RevisionState.FAILED:
        return f"the newest version cannot be loaded: {newest.message or 'no reason reported'}"
    return None
