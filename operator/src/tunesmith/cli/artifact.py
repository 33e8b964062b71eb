"""`tunesmith artifact`: published adapters in the store."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from tunesmith.cli.connection import connect
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.kinds import Kind, NameArgument, fetch, parse
from tunesmith.cli.output import Format, FormatOption, NamespaceOption, note, print_json, print_line
from tunesmith.contracts.artifact import ArtifactManifest, digest_of
from tunesmith.contracts.location import ARTIFACT_MANIFEST

if TYPE_CHECKING:
    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.storage.folder import Folder

app = typer.Typer(no_args_is_help=True, help="Published adapters in the store.")
_CHUNK_BYTES = 2**20
_PARTIAL = ".partial"
"""Folder in the output for files that are being downloaded; an interrupted download leaves only this."""


@app.callback()
def options() -> None:
    """Options of all commands about artifacts."""


@app.command()
def download(
    name: NameArgument,
    namespace: NamespaceOption = None,
    output: Annotated[
        Path, typer.Option("--output", help="Folder for the files; it is created if missing and must be empty.")
    ] = Path("artifact"),
    output_format: FormatOption = Format.TEXT,
) -> None:
    """Download the artifact of a job, and check every file against its hash.

    PEFT and vLLM can load the folder. The keys are those of the environment (AWS_ACCESS_KEY_ID
    and so on), otherwise those of the Secret tunesmith-store of the namespace.

    Example: tunesmith artifact download support --output support-adapter
    """
    # Imported lazily: its libraries take a second to import, for which other commands should not wait.
    from tunesmith.cli.location import find_credentials, open_at  # noqa: PLC0415

    if output.exists() and (not output.is_dir() or any(entry.name != _PARTIAL for entry in output.iterdir())):
        raise CliError(f"{output} exists and is not an empty folder: name another one with --output", Exit.USAGE)
    job = asyncio.run(_read(name, namespace))
    artifact = job.status.artifact
    if artifact is None:
        raise CliError(
            f"FineTuneJob {job.metadata.namespace}/{name} has published no artifact:"
            f" `tunesmith get job {name} -n {job.metadata.namespace}` shows its state"
        )
    credentials = asyncio.run(find_credentials(artifact.uri, job.metadata.namespace))
    folder = open_at(artifact.uri, credentials, what="the artifact")
    output.mkdir(parents=True, exist_ok=True)
    files = fetch_artifact(folder, artifact.digest, output)
    if output_format is Format.JSON:
        print_json({"folder": str(output), "digest": artifact.digest, "files": files})
        return
    print_line(f"Downloaded {len(files)} files to {output}; their hashes match the published ones.")
    note(f'Next: PeftModel.from_pretrained(base, "{output}") in Python, or tunesmith deploy {name}')


async def _read(name: str, namespace: str | None) -> FineTuneJob:
    async with await connect() as cluster:
        job: FineTuneJob = parse(Kind.JOB, await fetch(cluster, Kind.JOB, namespace or cluster.namespace, name))
    return job


def fetch_artifact(folder: Folder, digest: str, output: Path) -> list[str]:
    """Download the files that an artifact's manifest lists; return their names, the manifest's last.

    The output contains none of them until all are complete and checked.

    Raises:
        CliError: a file is missing, or its hash is not the published one.
    """
    data = folder.read(ARTIFACT_MANIFEST)
    if digest_of(data) != digest:
        raise CliError(
            f"{folder.uri}/{ARTIFACT_MANIFEST} is not the published manifest: its digest is {digest_of(data)}, but"
            f" the job's status has {digest}"
        )
    try:
        manifest = ArtifactManifest.model_validate_json(data)
    except ValidationError:
        raise CliError(
            f"{folder.uri}/{ARTIFACT_MANIFEST} was written by another release: use the CLI of that release"
        ) from None
    for name in manifest.files:
        if Path(name).name != name or name in {".", "..", ARTIFACT_MANIFEST, _PARTIAL}:
            raise CliError(f"{folder.uri}/{ARTIFACT_MANIFEST} lists {name!r}, which is not a file of an adapter")
    names = [*sorted(manifest.files), ARTIFACT_MANIFEST]
    partial = output / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, file in sorted(manifest.files.items()):
            folder.download(name, partial / name)
            if _hash(partial / name) != file.sha256:
                raise CliError(f"{folder.uri}/{name} is damaged: its hash differs from the published one")
        (partial / ARTIFACT_MANIFEST).write_bytes(data)
        for name in names:
            (partial / name).rename(output / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return names


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
