"""`tunesmith submit`: applies a FineTuneJob and follows it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from tunesmith.cli.connection import connect
from tunesmith.cli.describe import next_step, state, summary
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.follow import follow
from tunesmith.cli.kinds import Kind, parse
from tunesmith.cli.manifest import read_manifest
from tunesmith.cli.output import FIELD_MANAGER, Format, FormatOption, NamespaceOption, note, print_json, print_line
from tunesmith.cli.progress import final_condition

if TYPE_CHECKING:
    from tunesmith.api.finetunejob import FineTuneJob


def submit(
    filename: Annotated[Path, typer.Option("--filename", "-f", help="The FineTuneJob manifest (YAML or JSON).")],
    namespace: NamespaceOption = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Follow the job until it finishes.")] = False,  # noqa: FBT002 - typer's convention
    output_format: FormatOption = Format.TEXT,
) -> None:
    """Apply a FineTuneJob to the cluster. With --watch its exit code is 0 only if the job completes.

    Submitting the same manifest again does not train again: it reports, or follows, the existing job. Ctrl-C leaves the
    job running.

    Example: tunesmith submit -f job.yaml --watch
    """
    document = read_manifest(filename, allow_file=False)
    name = document["metadata"]["name"]
    submitted = asyncio.run(_apply(document, namespace))
    if watch:
        try:
            asyncio.run(_follow(submitted.namespace, name, output_format))
        except KeyboardInterrupt:
            target = f"{name} -n {submitted.namespace}"
            note(
                f"\nFineTuneJob {name} continues in the cluster. Follow it again: tunesmith wait job {target}\n"
                f"Pause it, with a checkpoint: tunesmith cancel {target} --pause\n"
                f"Stop it: tunesmith cancel {target}"
            )
            raise typer.Exit(Exit.INTERRUPTED) from None
    elif output_format is Format.JSON:
        print_json({"name": name, "namespace": submitted.namespace, "created": submitted.created})
    else:
        print_line(submitted.sentence)
        step = next_step(submitted.job)
        if step:
            note(f"Next: {step}")


class Submitted(NamedTuple):
    """A FineTuneJob after its manifest was applied."""

    job: FineTuneJob
    created: bool

    @property
    def namespace(self) -> str:
        """Namespace of the FineTuneJob."""
        return self.job.metadata.namespace

    @property
    def sentence(self) -> str:
        """Sentence about the effect of applying the manifest."""
        title = f"FineTuneJob {self.namespace}/{self.job.metadata.name}"
        if self.created:
            return f"{title} is submitted."
        end = final_condition(self.job)
        if end is None:
            return f"{title} already exists and is {state(self.job)}: nothing was started."
        return (
            f"{title} has already finished ({summary(self.job, datetime.now(UTC))}): nothing was started. To train"
            " again, submit it under another name."
        )


async def _apply(document: dict[str, Any], namespace: str | None) -> Submitted:
    metadata = document["metadata"]
    written = metadata.get("namespace")
    if namespace and written and namespace != written:
        raise CliError(
            f"the manifest has metadata.namespace {written}, but the command line has -n {namespace}: keep one of them",
            Exit.USAGE,
        )
    async with await connect() as cluster:
        chosen: str = namespace or written or cluster.namespace
        document = {key: value for key, value in document.items() if key != "status"}
        known = await cluster.find(Kind.JOB.resource, metadata["name"], chosen)
        manifest = document | {"metadata": metadata | {"namespace": chosen}}
        applied = await cluster.apply(manifest, field_manager=FIELD_MANAGER)
    return Submitted(parse(Kind.JOB, applied), created=known is None)


async def _follow(namespace: str, name: str, output_format: Format) -> None:
    async with await connect() as cluster:
        await follow(cluster, namespace, name, output_format)
