"""`tunesmith logs`: logs of a job's pods."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.connection import connect
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.kinds import Kind, NameArgument, fetch
from tunesmith.cli.output import Format, FormatOption, NamespaceOption, note, print_json, print_line
from tunesmith.cluster.errors import ClusterError, InvalidError, NotFoundError
from tunesmith.finetune.render import JOB_LABEL
from tunesmith.jobs.observe import CONTAINER

if TYPE_CHECKING:
    from tunesmith.cluster.client import Cluster
    from tunesmith.cluster.resources import Object


def logs(
    name: NameArgument,
    namespace: NamespaceOption = None,
    follow: Annotated[  # noqa: FBT002 - typer's convention
        bool, typer.Option("--follow", "-f", help="Follow the newest pod until it stops.")
    ] = False,
    tail: Annotated[
        int | None, typer.Option("--tail", min=0, help="Number of last lines to print of each pod; absent: all.")
    ] = None,
    output_format: FormatOption = Format.TEXT,
) -> None:
    """Print the logs of a job's pods, the oldest pod first: validation, then each attempt.

    Example: tunesmith logs support --follow
    """
    try:
        asyncio.run(_logs(name, namespace, tail, output_format, following=follow))
    except KeyboardInterrupt:
        raise typer.Exit(Exit.INTERRUPTED) from None


async def _logs(name: str, namespace: str | None, tail: int | None, output_format: Format, *, following: bool) -> None:
    async with await connect() as cluster:
        chosen = namespace or cluster.namespace
        job = await fetch(cluster, Kind.JOB, chosen, name)
        pods = await cluster.list("Pod", chosen, labels=f"{JOB_LABEL}={name}")
        pods.sort(key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))
        if not pods:
            phase = (job.get("status") or {}).get("phase") or "Pending"
            raise CliError(
                f"FineTuneJob {chosen}/{name} is {phase} and has no pods in the cluster:"
                f" `tunesmith get job {name} -n {chosen}` shows its status"
            )
        for pod in pods:
            await _print_log(cluster, pod, tail, output_format, following=following and pod is pods[-1])


async def _print_log(
    cluster: Cluster, pod: Object, tail: int | None, output_format: Format, *, following: bool
) -> None:
    namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
    options: dict[str, Any] = {"container": CONTAINER, "tail": tail, "follow": following}
    if output_format is Format.TEXT:
        note(f"--- pod {name}")
    try:
        async for line in cluster.log(name, namespace, **options):
            text = line.decode(errors="replace")
            if output_format is Format.JSON:
                print_json({"pod": name, "line": text})
            else:
                # Progress bars overwrite their line.
                print_line(text.rstrip("\r").replace("\r", "\n"))
    except (NotFoundError, InvalidError) as error:
        # A pod that was removed meanwhile, or whose container has not started.
        note(f"pod {name} has no log: {error}")
    except ClusterError as error:
        raise CliError(f"the log of pod {namespace}/{name} cannot be read: {error}") from error
