"""`tunesmith gc`: removes leftovers of complete and deleted FineTuneJobs from the store."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli import garbage
from tunesmith.cli.connection import connect
from tunesmith.cli.duration import parse_duration
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.output import (
    AllNamespacesOption,
    Format,
    FormatOption,
    NamespaceOption,
    note,
    print_json,
    print_table,
)
from tunesmith.contracts.owner import OWNER_FILE
from tunesmith.storage.schemes import Use, examples

if TYPE_CHECKING:
    from tunesmith.cli.garbage import Leftover
    from tunesmith.cli.store import Store


def gc(
    store: Annotated[
        str,
        typer.Option(
            "--store",
            envvar="TUNESMITH_STORE",
            help=f"The installation's store, as in its chart: {examples(Use.STORE)}.",
        ),
    ],
    namespace: NamespaceOption = None,
    all_namespaces: AllNamespacesOption = False,  # noqa: FBT002 - typer's convention
    older_than: Annotated[
        str, typer.Option("--older-than", help="Keep files written more recently than this: 30m, 24h, 7d.")
    ] = "24h",
    artifacts: Annotated[  # noqa: FBT002 - typer's convention
        bool, typer.Option("--artifacts", help="Also published artifacts that nothing in the cluster uses.")
    ] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Remove them; absent: only list them.")] = False,  # noqa: FBT002 - typer's convention
    output_format: FormatOption = Format.TEXT,
) -> None:
    """List, and with --delete remove, the leftovers of deleted and complete FineTuneJobs in the store.

    Checkpoints are removed, and all files of deleted jobs that published nothing; published artifacts only with
    --artifacts. Files that a resource of the cluster refers to are kept, and so are the files of other clusters.
    Credentials come from environment variables with the names of the Secret's keys, such as AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL and AWS_REGION. The command reads the resources of the whole cluster.

    Example: tunesmith gc --store s3://tunesmith/store -A --older-than 7d --delete
    """
    floor = parse_duration(older_than, "--older-than")
    found, opened = asyncio.run(_find(store, namespace, floor, artifacts=artifacts, everywhere=all_namespaces))
    removable = [leftover for leftover in found if leftover.kept is None]
    failed = _remove(opened, removable) if delete else {}
    if output_format is Format.JSON:
        print_json([_document(opened, leftover, failed, deleted=delete) for leftover in found])
    else:
        print_table(
            ("NAMESPACE", "JOB", "WHAT", "FILES", "SIZE", "LAST WRITTEN"),
            [_row(leftover) for leftover in removable],
            empty="nothing to remove",
        )
        _explain(found, removable, deleted=delete)
    for uri, text in failed.items():
        note(f"error: {uri} was not removed: {text}")
    if failed:
        raise typer.Exit(Exit.FAILED)


async def _find(
    store: str, namespace: str | None, older_than: timedelta, *, artifacts: bool, everywhere: bool
) -> tuple[list[Leftover], Store]:
    # Imported lazily: its libraries take a second to import, for which other commands should not wait.
    from tunesmith.cli.store import Store  # noqa: PLC0415
    from tunesmith.storage.folder import Retry  # noqa: PLC0415

    opened = Store(store, Retry(attempts=5, longest=8))
    async with await connect() as cluster:
        await asyncio.to_thread(opened.check)
        # List the store first, so that the folder of a FineTuneJob created meanwhile is not among the files.
        files = await asyncio.to_thread(opened.files, None if everywhere else namespace or cluster.namespace)
        resources = garbage.Resources(
            cluster=(await cluster.get("Namespace", "kube-system"))["metadata"]["uid"],
            jobs=await cluster.list("FineTuneJob"),
            others=[*await cluster.list("AdapterDeployment"), *await cluster.list("ServingPool")],
        )
    folders = garbage.unneeded(garbage.folders(files), resources)
    owners = {
        folder.path: await asyncio.to_thread(opened.owner, f"{folder.path}/{OWNER_FILE}")
        for folder in folders
        if any(file.path == f"{folder.path}/{OWNER_FILE}" for file in folder.files)
    }
    found = garbage.leftovers(
        folders, owners, resources, opened.uri, now=datetime.now(UTC), older_than=older_than, artifacts=artifacts
    )
    return found, opened


def _remove(store: Store, removable: list[Leftover]) -> dict[str, str]:
    """Remove leftovers; return the errors by uri.

    After an error the other parts of the same folder are kept: the last one has the owner, without which the folder
    could not be removed later.
    """
    failed = {}
    blocked = set()
    for leftover in removable:
        uri, folder = store.uri_of(leftover), leftover.folder.path
        if folder in blocked:
            failed[uri] = (
                f"another part of its folder was not, and {OWNER_FILE} must be removed last: run the command again"
            )
            continue
        try:
            store.remove([file.path for file in leftover.files])
        except CliError as error:
            failed[uri] = str(error)
            blocked.add(folder)
    return failed


def _document(store: Store, leftover: Leftover, failed: dict[str, str], *, deleted: bool) -> dict[str, Any]:
    uri = store.uri_of(leftover)
    return {
        "namespace": leftover.folder.namespace,
        "job": leftover.folder.name,
        "uid": leftover.folder.uid,
        "what": leftover.part,
        "uri": uri,
        "files": len(leftover.files),
        "sizeBytes": leftover.size,
        "modified": leftover.modified.isoformat(),
        "kept": leftover.kept,
        "deleted": deleted and leftover.kept is None and uri not in failed,
    }


def _row(leftover: Leftover) -> tuple[str, ...]:
    folder = leftover.folder
    modified = f"{leftover.modified:%Y-%m-%d %H:%M}"
    return (folder.namespace, folder.name, leftover.part, str(len(leftover.files)), _size(leftover.size), modified)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:  # noqa: PLR2004 - SI
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _explain(found: list[Leftover], removable: list[Leftover], *, deleted: bool) -> None:
    """Print notes about removed leftovers and the reasons why the others are kept."""
    if removable and not deleted:
        note(f"{_size(sum(leftover.size for leftover in removable))} would be freed: add --delete to remove them")
    kept: dict[str, int] = {}
    for leftover in found:
        if leftover.kept is not None:
            kept[leftover.kept] = kept.get(leftover.kept, 0) + 1
    for reason, count in sorted(kept.items()):
        note(f"{count} kept: {reason}")
