"""`tunesmith rollout`: state of the rollout of an adapter's new version, and commands for it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.api.rollout import ROLLOUT_ANNOTATION, RolloutCommand
from tunesmith.cli.connection import connect
from tunesmith.cli.describe import rollout_lines
from tunesmith.cli.errors import CliError
from tunesmith.cli.kinds import Kind, fetch, parse
from tunesmith.cli.output import Format, FormatOption, NamespaceOption, note, print_json, print_line, single_line

if TYPE_CHECKING:
    from tunesmith.api.adapterdeployment import AdapterDeployment
    from tunesmith.api.rollout import HandledCommand
    from tunesmith.cluster.client import Cluster

_ANSWER_SECONDS = 60

app = typer.Typer(no_args_is_help=True, help="Rollout of a new version of an adapter.")
AdapterName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the AdapterDeployment.")]


@app.command()
def status(name: AdapterName, namespace: NamespaceOption = None, output_format: FormatOption = Format.TEXT) -> None:
    """Show the latest rollout: its step, the shares of the requests, the measures, and what it waits for.

    Example: tunesmith rollout status support
    """
    adapter = asyncio.run(_read(name, namespace))
    found = adapter.status.rollout
    if output_format is Format.JSON:
        print_json(found.manifest() if found is not None else None)
        return
    described = rollout_lines(adapter)
    if not described:
        note(f"AdapterDeployment {adapter.metadata.namespace}/{name} has had no rollout: set spec.rollout")
        return
    width = max(len(head) for head, _ in described) + 2
    for head, text in described:
        print_line(f"{head:<{width}}{single_line(text)}".rstrip())


@app.command()
def pause(name: AdapterName, namespace: NamespaceOption = None, output_format: FormatOption = Format.TEXT) -> None:
    """Keep the present step. A failed check still rolls the version back.

    Example: tunesmith rollout pause support
    """
    _send(RolloutCommand.PAUSE, name, namespace, output_format)


@app.command()
def resume(name: AdapterName, namespace: NamespaceOption = None, output_format: FormatOption = Format.TEXT) -> None:
    """Continue a paused rollout.

    Example: tunesmith rollout resume support
    """
    _send(RolloutCommand.RESUME, name, namespace, output_format)


@app.command()
def promote(name: AdapterName, namespace: NamespaceOption = None, output_format: FormatOption = Format.TEXT) -> None:
    """Let the new version answer all requests, without the remaining steps and checks, once all of its pods have it.

    Example: tunesmith rollout promote support
    """
    _send(RolloutCommand.PROMOTE, name, namespace, output_format)


@app.command()
def abort(name: AdapterName, namespace: NamespaceOption = None, output_format: FormatOption = Format.TEXT) -> None:
    """Give up the new version: the old one answers all requests again.

    Example: tunesmith rollout abort support
    """
    _send(RolloutCommand.ABORT, name, namespace, output_format)


@app.command()
def undo(name: AdapterName, namespace: NamespaceOption = None, output_format: FormatOption = Format.TEXT) -> None:
    """Return to the previous version, also after the rollout is complete.

    Example: tunesmith rollout undo support
    """
    _send(RolloutCommand.UNDO, name, namespace, output_format)


async def _read(name: str, namespace: str | None) -> AdapterDeployment:
    async with await connect() as cluster:
        return await _adapter(cluster, namespace or cluster.namespace, name)


async def _adapter(cluster: Cluster, namespace: str, name: str) -> AdapterDeployment:
    adapter: AdapterDeployment = parse(Kind.ADAPTER, await fetch(cluster, Kind.ADAPTER, namespace, name))
    return adapter


def _send(command: RolloutCommand, name: str, namespace: str | None, output_format: Format) -> None:
    chosen, handled = asyncio.run(_command(command, name, namespace))
    if output_format is Format.JSON:
        print_json({"namespace": chosen, "name": name, "command": command, "message": handled.message})
        return
    print_line(f"AdapterDeployment {chosen}/{name}: {single_line(handled.message)}")
    note(f"Next: tunesmith rollout status {name} -n {chosen}")


async def _command(command: RolloutCommand, name: str, namespace: str | None) -> tuple[str, HandledCommand]:
    # The time makes the value differ from that of an earlier, equal command, which is not handled twice.
    value = f"{command} {datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
    async with await connect() as cluster:
        chosen = namespace or cluster.namespace
        await _adapter(cluster, chosen, name)
        body = {"metadata": {"annotations": {ROLLOUT_ANNOTATION: value}}}
        await cluster.patch(Kind.ADAPTER.resource, name, chosen, body)
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                async for event in cluster.watch(Kind.ADAPTER.resource, chosen, fields=f"metadata.name={name}"):
                    if event.type in {"SYNCED", "DELETED"}:
                        continue
                    handled = parse(Kind.ADAPTER, event.object).status.rollout_command
                    if handled is not None and handled.value == value:
                        return chosen, handled
        except TimeoutError:
            pass
    raise CliError(
        f"the operator has not handled the command within {_ANSWER_SECONDS} seconds; it will once it runs: "
        "`kubectl get pods -n tunesmith-system` shows it"
    )
