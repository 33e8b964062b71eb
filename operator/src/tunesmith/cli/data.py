"""`tunesmith data`: training data in a store."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated

import typer
from pydantic import ValidationError

from tunesmith.api.dataset import DatasetSource
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.output import Format, FormatOption, NamespaceOption, note, print_json, print_line
from tunesmith.storage.schemes import canonical, normalised

app = typer.Typer(no_args_is_help=True, help="Training data in a store.")
_LINES = ".jsonl"
_SHOWN = 3
"""Number of hidden files that are named."""


@app.callback()
def options() -> None:
    """Options of all commands about data."""


@app.command()
def upload(
    source: Annotated[Path, typer.Argument(help="A file, or a folder whose files, except hidden ones, are uploaded.")],
    destination: Annotated[
        str, typer.Argument(metavar="URI", help="Such as s3://bucket/rows.jsonl; a folder ends with a slash.")
    ],
    namespace: NamespaceOption = None,
    output_format: FormatOption = Format.TEXT,
) -> None:
    """Upload rows to a store, replacing files of the same name. Each line of a .jsonl file must be a JSON object.

    The keys are those of the environment (AWS_ACCESS_KEY_ID and so on), otherwise those of the namespace's Secret
    tunesmith-store.

    Example: tunesmith data upload train.jsonl s3://team-a-data/support/train.jsonl
    """
    # Imported lazily: its libraries take a second to import, for which other commands should not wait.
    from tunesmith.cli.location import find_credentials, open_at  # noqa: PLC0415

    folder, names = _targets(source, destination)
    for name, file in names.items():
        _check_uri(f"{folder}/{name}")
        _check(file)
    credentials = asyncio.run(find_credentials(folder, namespace))
    opened = open_at(folder, credentials, what="the destination")
    uris = []
    for name, file in names.items():
        inner = opened
        *parents, last = name.split("/")
        for parent in parents:
            inner = inner.child(parent)
        inner.upload(last, file)
        uris.append(f"{folder}/{name}")
        if output_format is Format.TEXT:
            print_line(f"Uploaded {file} to {uris[-1]} ({file.stat().st_size} bytes).")
    if output_format is Format.JSON:
        print_json([{"uri": uri} for uri in uris])
        return
    named = uris[0] if len(uris) == 1 else f"{folder}/"
    note(f"Next: use it in a FineTuneJob, `dataset: {{train: [{{uri: {named}}}]}}`, and tunesmith submit -f job.yaml")


def _targets(source: Path, destination: str) -> tuple[str, dict[str, Path]]:
    """Return the uri of the destination folder, and the files by their path in it.

    Raises:
        CliError: there is nothing to upload, or the destination is not a uri.
    """
    scheme, separator, path = destination.partition("://")
    if not separator or not scheme or "/" not in path.strip("/") + ("/" if path.endswith("/") else ""):
        raise CliError(
            f"{destination} is not a URI of a store: use s3://bucket/folder/ or s3://bucket/folder/rows.jsonl",
            Exit.USAGE,
        )
    if canonical(destination) == destination:
        # The libraries of stores disagree on empty names between slashes.
        destination = normalised(destination) + ("/" if destination.endswith("/") else "")
    if source.is_dir():
        names = {path.relative_to(source).as_posix(): path for path in _files(source)}
        files = {name: path for name, path in names.items() if not _is_hidden(name)}
        hidden = [name for name in names if _is_hidden(name)]
        if not files:
            raise CliError(f"the folder {source} has no files" + (" except hidden ones" if hidden else ""), Exit.USAGE)
        if hidden:
            more = f" and {len(hidden) - _SHOWN} more" if len(hidden) > _SHOWN else ""
            note(f"Hidden files, which no job reads, are not uploaded: {', '.join(hidden[:_SHOWN])}{more}.")
        return destination.rstrip("/"), files
    if not source.is_file():
        raise CliError(f"the file {source} does not exist: pass the path of the rows", Exit.USAGE)
    if destination.endswith("/"):
        return destination.rstrip("/"), {source.name: source}
    folder, _, name = destination.rpartition("/")
    return folder, {name: source}


def _files(folder: Path) -> list[Path]:
    """Return the files in and below a folder, sorted.

    Raises:
        CliError: a link points outside of the folder, or not to a file.
    """
    paths, root = sorted(folder.rglob("*")), folder.resolve()
    for path in paths:
        if _is_hidden(path.relative_to(folder).as_posix()):
            continue
        if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(root)):
            raise CliError(
                f"{path} is a link that does not point to a file in {folder}: remove it, or replace it with the"
                " linked file",
                Exit.USAGE,
            )
    return [path for path in paths if path.is_file()]


def _is_hidden(path: str) -> bool:
    """Return True if a name in a relative path starts with a dot: `.git/config`, `.DS_Store`."""
    return any(name.startswith(".") for name in path.split("/"))


def _check_uri(uri: str) -> None:
    """Refuse a uri that no job could read.

    Raises:
        CliError: a FineTuneJob does not accept it.
    """
    try:
        DatasetSource(uri=uri)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise CliError(f"a FineTuneJob does not accept the uri {uri!r}: {reason}", Exit.USAGE) from None


def _check(path: Path) -> None:
    """Refuse a file that no job could read, before it is uploaded.

    Raises:
        CliError: the file cannot be read, is empty, or has a line that is not a JSON object.
    """
    if not os.access(path, os.R_OK):
        raise CliError(f"{path} cannot be read: change its permissions, or use another file", Exit.USAGE)
    if path.suffix != _LINES:
        return
    rows = 0
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                if not isinstance(_parsed(line), dict):
                    raise CliError(f"{path} line {number} is not a JSON object: write one row per line", Exit.USAGE)
                rows += 1
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"{path} cannot be read: {error}", Exit.USAGE) from None
    if not rows:
        raise CliError(f"{path} has no rows", Exit.USAGE)


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
