"""`tunesmith cancel`: stop, pause or resume a job."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from tunesmith.cli.connection import connect
from tunesmith.cli.errors import CliError
from tunesmith.cli.kinds import Kind, NameArgument, fetch, parse
from tunesmith.cli.output import Format, FormatOption, NamespaceOption, note, print_json, print_line
from tunesmith.cli.progress import final_condition


def cancel(
    name: NameArgument,
    namespace: NamespaceOption = None,
    pause: Annotated[  # noqa: FBT002 - typer's convention
        bool, typer.Option("--pause", help="Keep the job: it saves a checkpoint and can be resumed.")
    ] = False,
    resume: Annotated[  # noqa: FBT002 - typer's convention
        bool, typer.Option("--resume", help="Resume a paused job from its latest checkpoint.")
    ] = False,
    output_format: FormatOption = Format.TEXT,
) -> None:
    """Stop a job and delete it; with --pause keep it, with a checkpoint, until --resume.

    A finished job is not changed. Files that a deleted job wrote to the store stay there until `tunesmith gc`.

    Example: tunesmith cancel support --pause
    """
    if pause and resume:
        raise typer.BadParameter("--pause and --resume exclude each other: use one of them")
    chosen = asyncio.run(_cancel(name, namespace, suspend=True if pause else False if resume else None))
    action = "paused" if pause else "resumed" if resume else "deleted"
    if output_format is Format.JSON:
        print_json({"namespace": chosen, "name": name, "action": action})
        return
    print_line(f"FineTuneJob {chosen}/{name} is {action}.")
    if pause:
        note(f"Next: tunesmith cancel {name} -n {chosen} --resume")
    elif resume:
        note(f"Next: tunesmith wait job {name} -n {chosen}")
    else:
        note(f"Next: tunesmith list jobs -n {chosen}")


async def _cancel(name: str, namespace: str | None, *, suspend: bool | None) -> str:
    async with await connect() as cluster:
        chosen = namespace or cluster.namespace
        document = await fetch(cluster, Kind.JOB, chosen, name)
        end = final_condition(parse(Kind.JOB, document))
        if end is not None:
            raise CliError(
                f"FineTuneJob {chosen}/{name} has already finished ({end.type}), so it cannot be stopped:"
                f" `kubectl delete finetunejob {name} -n {chosen}` deletes it and keeps its artifact in the store"
            )
        if suspend is None:
            await cluster.delete(Kind.JOB.resource, name, chosen, uid=document["metadata"]["uid"])
        else:
            await cluster.patch(Kind.JOB.resource, name, chosen, {"spec": {"suspend": suspend}})
    return chosen
