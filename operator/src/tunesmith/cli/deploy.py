"""`tunesmith deploy`: serves the adapter of a job, or moves an adapter to the next version."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.api.model import API_VERSION
from tunesmith.cli.connection import connect
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.kinds import Kind, fetch, parse
from tunesmith.cli.output import FIELD_MANAGER, Format, FormatOption, NamespaceOption, note, print_json, print_line
from tunesmith.cli.pools import usable_pools
from tunesmith.cli.progress import final_condition

if TYPE_CHECKING:
    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.cluster.client import Cluster
    from tunesmith.cluster.resources import Object


def deploy(
    job: Annotated[str, typer.Argument(metavar="JOB", help="The FineTuneJob whose adapter is served.")],
    namespace: NamespaceOption = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="The AdapterDeployment: an existing one gets the new version; absent: JOB."),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option("--pool", help="NAMESPACE/NAME of the ServingPool, or NAME; absent: the one with the job's base."),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option("--model-name", help="Name that clients call; absent: that of --name.")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option("--replicas", min=1, max=1000, help="Pods that hold the adapter; absent: 1.")
    ] = None,
    output_format: FormatOption = Format.TEXT,
) -> None:
    """Serve the adapter of a job. The job need not be complete yet: the adapter waits for it.

    With the --name of an existing adapter only its job and the given options change: the serving version is replaced
    once the new one is loaded.

    Example: tunesmith deploy support-2 --name support
    """
    document, created = asyncio.run(
        _deploy(job, namespace, name or job, _changes(job, pool, model_name, replicas), checked_pool=pool)
    )
    if output_format is Format.JSON:
        print_json(document)
        return
    adapter = f"{document['metadata']['namespace']}/{document['metadata']['name']}"
    print_line(
        f"AdapterDeployment {adapter} is {'created' if created else 'changed'}: it serves the adapter of job {job}."
    )
    note(f"Next: tunesmith wait adapter {document['metadata']['name']} -n {document['metadata']['namespace']}")


def _changes(job: str, pool: str | None, model_name: str | None, replicas: int | None) -> dict[str, Any]:
    """Return the part of the spec that the command line names."""
    changes: dict[str, Any] = {"adapterFrom": {"fineTuneJob": {"name": job}}}
    if pool is not None:
        owner, _, name = pool.rpartition("/")
        if not name or "/" in owner:
            raise CliError(f"--pool {pool} is not a pool: write NAMESPACE/NAME, or NAME", Exit.USAGE)
        changes["pool"] = {"name": name, "namespace": owner or None}
    if model_name is not None:
        changes["modelName"] = model_name
    if replicas is not None:
        changes["replicas"] = replicas
    return changes


async def _deploy(
    job: str, namespace: str | None, name: str, changes: dict[str, Any], *, checked_pool: str | None
) -> tuple[Object, bool]:
    async with await connect() as cluster:
        chosen = namespace or cluster.namespace
        _check_job(parse(Kind.JOB, await fetch(cluster, Kind.JOB, chosen, job)))
        if checked_pool is not None:
            await _check_pool(cluster, chosen, changes["pool"])
        if await cluster.find(Kind.ADAPTER.resource, name, chosen) is not None:
            source = {**changes["adapterFrom"], "artifact": None}
            change = {"spec": {**changes, "adapterFrom": source}}
            return await cluster.patch(Kind.ADAPTER.resource, name, chosen, change), False
        spec = changes
        if "pool" in changes:
            spec = changes | {"pool": {key: value for key, value in changes["pool"].items() if value is not None}}
        manifest = {
            "apiVersion": API_VERSION,
            "kind": Kind.ADAPTER.resource,
            "metadata": {"name": name, "namespace": chosen},
            "spec": spec,
        }
        return await cluster.create(manifest, field_manager=FIELD_MANAGER), True


def _check_job(job: FineTuneJob) -> None:
    """Raise a CliError for a job that publishes neither an adapter that vLLM can load nor a whole model."""
    end, title = final_condition(job), f"FineTuneJob {job.metadata.namespace}/{job.metadata.name}"
    if end is not None and end.type == "Failed":
        raise CliError(f"{title} failed ({end.reason}) and has no adapter to serve: choose another job")
    artifact = job.status.artifact
    if artifact is not None and not artifact.servable.vllm and not job.spec.publishes_whole_model:
        raise CliError(f"vLLM cannot load the adapter of {title}: {artifact.servable.reason or 'no reason reported'}")


async def _check_pool(cluster: Cluster, namespace: str, requested: dict[str, Any]) -> None:
    """Raise a CliError if a pool of the adapter's namespace does not exist; pools of others may be unreadable."""
    pools = [pool["metadata"] for pool in await usable_pools(cluster, namespace)]
    pool_key = (requested["namespace"] or namespace, requested["name"])
    if pool_key[0] != namespace or pool_key in {(pool["namespace"], pool["name"]) for pool in pools}:
        return
    names = sorted(f"{pool['namespace']}/{pool['name']}" for pool in pools)
    usable = f"{namespace} may use {', '.join(names)}" if names else f"{namespace} may not use any pool"
    raise CliError(f"ServingPool {'/'.join(pool_key)} does not exist; {usable}")
