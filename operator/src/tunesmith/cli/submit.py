"""`tunesmith submit`: applies a FineTuneJob and follows it."""

from __future__ import annotations

import asyncio
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated, Any

import typer

from tunesmith.api.manifest import ManifestError, load_document, parse_manifest
from tunesmith.cli.connection import connect
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.follow import follow
from tunesmith.cli.output import Format, FormatOption, NamespaceOption, note, print_json, print_line

FIELD_MANAGER = "tunesmith-cli"


def submit(
    filename: Annotated[Path, typer.Option("--filename", "-f", help="The FineTuneJob manifest (YAML or JSON).")],
    namespace: NamespaceOption = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow the job to its end.")] = False,  # noqa: FBT002 - typer's way
    output_format: FormatOption = Format.TEXT,
) -> None:
    """Apply a FineTuneJob to the cluster. With --watch its exit code is 0 only if the job completes.

    Submitting the same manifest again does not train again: it follows the job that there is. Ctrl-C leaves the job
    running.

    Example: tunesmith submit -f job.yaml --watch
    """
    document = read(filename)
    name = document["metadata"]["name"]
    chosen = asyncio.run(_apply(document, namespace))
    if watch:
        try:
            asyncio.run(_follow(chosen, name, output_format))
        except KeyboardInterrupt:
            again = f"tunesmith submit -f {filename}" + (f" -n {namespace}" if namespace else "") + " --watch"
            note(
                f"\nFineTuneJob {name} goes on in the cluster. Follow it again with: {again}\n"
                f"Pause it, with a checkpoint: kubectl patch finetunejob {name} -n {chosen} --type merge"
                """ -p '{"spec":{"suspend":true}}'\n"""
                f"Stop it: kubectl delete finetunejob {name} -n {chosen}"
            )
            raise typer.Exit(Exit.INTERRUPTED) from None
    elif output_format is Format.JSON:
        print_json({"name": name, "namespace": chosen})
    else:
        print_line(f"FineTuneJob {chosen}/{name} is submitted. Add --watch to follow it.")


def read(filename: Path) -> dict[str, Any]:
    """The manifest in a file, checked as far as it can be without a cluster.

    Raises:
        CliError: it is not there, or the API server would refuse it; all mistakes are told at once.
    """
    try:
        text = filename.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CliError(f"there is no file {filename}: give the manifest's path with -f", Exit.USAGE) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"{filename} cannot be read: {error}", Exit.USAGE) from None
    try:
        parse_manifest(text, allow_file=False)
        return load_document(text)
    except ManifestError as error:
        raise CliError("\n".join(f"{filename}: {problem}" for problem in error.problems), Exit.USAGE) from None


async def _apply(document: dict[str, Any], namespace: str | None) -> str:
    """Apply the manifest and return the namespace that it went to."""
    metadata = document["metadata"]
    written = metadata.get("namespace")
    if namespace and written and namespace != written:
        raise CliError(
            f"the manifest says metadata.namespace: {written}, the command says -n {namespace}: keep one of them",
            Exit.USAGE,
        )
    async with await connect() as cluster:
        chosen: str = namespace or written or cluster.namespace
        document = {key: value for key, value in document.items() if key != "status"}
        await cluster.apply(document | {"metadata": metadata | {"namespace": chosen}}, field_manager=FIELD_MANAGER)
    return chosen


async def _follow(namespace: str, name: str, output_format: Format) -> None:
    async with await connect() as cluster:
        await follow(cluster, namespace, name, output_format)
