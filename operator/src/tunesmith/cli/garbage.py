"""Leftovers of FineTuneJobs and imported adapters in the store and the decision which of them to remove. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tunesmith.api.conditions import FineTuneJobCondition
from tunesmith.contracts.location import ARTIFACT_FOLDER, ARTIFACT_MANIFEST, TEMPORARY_FOLDER
from tunesmith.contracts.owner import OWNER_FILE
from tunesmith.storage.schemes import normalised

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from datetime import datetime, timedelta

    from tunesmith.contracts.owner import Owner

Object = dict[str, Any]
ARTIFACT = "artifact"
UNPUBLISHED = "unpublished"
_JOB_FOLDER = re.compile(r"^(?P<name>[a-z0-9][a-z0-9.-]*)-(?P<uid>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})$")


@dataclass(frozen=True)
class StoredFile:
    """One object of the store."""

    path: str
    """Path relative to the store's root, without a leading slash."""
    size: int
    modified: datetime


@dataclass(frozen=True)
class JobFolder:
    """The folder of a FineTuneJob or of an imported adapter, `<namespace>/<name>-<uid>`."""

    namespace: str
    name: str
    uid: str
    files: tuple[StoredFile, ...]

    @property
    def path(self) -> str:
        """Path relative to the store's root."""
        return f"{self.namespace}/{self.name}-{self.uid}"


@dataclass(frozen=True)
class Leftover:
    """A part of a folder whose FineTuneJob no longer needs it."""

    folder: JobFolder
    part: str
    """`tmp`: files needed only during training; the rest is `artifact`, or `unpublished` if no artifact exists."""
    files: tuple[StoredFile, ...]
    """Files in the order of their removal."""
    kept: str | None
    """Reason why it is kept; None if it may be removed."""

    @property
    def size(self) -> int:
        """Total size in bytes."""
        return sum(file.size for file in self.files)

    @property
    def modified(self) -> datetime:
        """Modification time of the newest file."""
        return max(file.modified for file in self.files)


@dataclass(frozen=True)
class Resources:
    """The custom resources of the whole cluster, listed after the store.

    With this order, the folder of a new FineTuneJob is never mistaken for that of a deleted one.
    """

    cluster: str
    """UID of the namespace kube-system."""
    jobs: Sequence[Object]
    others: Sequence[Object]
    """AdapterDeployments and ServingPools."""

    def find(self, folder: JobFolder) -> Object | None:
        """Return the FineTuneJob or AdapterDeployment that owns the folder, or None."""
        owners = (*self.jobs, *self.others)
        return next((owner for owner in owners if owner["metadata"]["uid"] == folder.uid), None)

    @cached_property
    def references(self) -> list[tuple[str, str]]:
        """Every uri in a spec or a status, normalised, with the resource that contains it."""
        return [
            (normalised(text), f"{item['kind']} {item['metadata']['namespace']}/{item['metadata']['name']}")
            for item in (*self.jobs, *self.others)
            for text in _strings([item.get("spec"), item.get("status")])
            if "://" in text
        ]

    def user_of(self, root: str, parts: Iterable[str]) -> str | None:
        """Return a resource that contains the uri of the folder, of one of its parts or of a file in them, or None."""
        uris = [f"{root}/{part}" for part in parts]
        for text, user in self.references:
            if text == root or any(text == uri or text.startswith(f"{uri}/") for uri in uris):
                return user
        return None


def is_job_folder(name: str) -> bool:
    """Return True if a folder of a namespace in the store is that of a FineTuneJob."""
    return _JOB_FOLDER.match(name) is not None


def folders(files: Iterable[StoredFile]) -> list[JobFolder]:
    """Return the folders of FineTuneJobs among the files of a store; other files are ignored."""
    found: dict[tuple[str, str], list[StoredFile]] = {}
    for file in files:
        parts = file.path.split("/")
        if len(parts) > 2:  # noqa: PLR2004 - namespace, folder, file
            found.setdefault((parts[0], parts[1]), []).append(file)
    return [
        JobFolder(namespace, match["name"], match["uid"], tuple(below))
        for (namespace, name), below in sorted(found.items())
        if (match := _JOB_FOLDER.match(name)) is not None
    ]


def unneeded(found: Iterable[JobFolder], resources: Resources) -> list[JobFolder]:
    """Return the folders whose FineTuneJob is complete or deleted. If it is deleted, the owner has to be read."""
    return [folder for folder in found if (job := resources.find(folder)) is None or _complete(job)]


def leftovers(
    found: Iterable[JobFolder],
    owners: Mapping[str, Owner | None],
    resources: Resources,
    store: str,
    *,
    now: datetime,
    older_than: timedelta,
    artifacts: bool,
) -> list[Leftover]:
    """Return the leftovers of complete and deleted FineTuneJobs in the store, with the reasons for keeping some.

    Args:
        found: folders returned by `unneeded`.
        owners: content of `owner.json` by the folder's path; None if there is no such file.
        resources: the cluster.
        store: normalised uri of the store's root.
        now: current time, UTC.
        older_than: minimum age; a pod of a job that was just deleted may still write.
        artifacts: True if published artifacts may be removed too.
    """
    parts = []
    for folder in found:
        deleted = resources.find(folder) is None
        for part, files in _parts(folder, deleted=deleted, artifacts=artifacts):
            kept = _ownership(folder, owners.get(folder.path), resources) if deleted else None
            kept = kept or _use(folder, part, files, resources, store)
            if kept is None and part == ARTIFACT and not artifacts:
                kept = "it is a published artifact: --artifacts removes it too"
            if kept is None and max(file.modified for file in folder.files) > now - older_than:
                kept = "it was written more recently than --older-than allows"
            parts.append(Leftover(folder, part, files, kept))
    return parts


def _parts(folder: JobFolder, *, deleted: bool, artifacts: bool) -> Iterator[tuple[str, tuple[StoredFile, ...]]]:
    """Yield the folder's parts that its FineTuneJob does not need; for a complete job, the temporary part.

    For a deleted job that published nothing, the rest is removed like `tmp`: event files, a merged model, files of an
    artifact without a manifest. The owner is the last file of the last part, so that an interrupted removal can be
    resumed.
    """
    below = len(folder.path) + 1
    temporary = [file for file in folder.files if file.path[below:].startswith(f"{TEMPORARY_FOLDER}/")]
    owner = [file for file in folder.files if file.path[below:] == OWNER_FILE]
    rest = [file for file in folder.files if file not in temporary and file not in owner]
    # Delete the manifest first, so that a half-deleted artifact is never found.
    rest.sort(key=lambda file: (not file.path.endswith(f"/{ARTIFACT_MANIFEST}"), file.path))
    # An imported adapter has a folder for each of its imports.
    manifest = f"/{ARTIFACT_FOLDER}/{ARTIFACT_MANIFEST}"
    published = any(f"/{file.path[below:]}".endswith(manifest) for file in rest)
    if deleted and (artifacts or not published):
        (rest or temporary).extend(owner)
    if temporary:
        yield TEMPORARY_FOLDER, tuple(temporary)
    if rest and deleted:
        yield ARTIFACT if published else UNPUBLISHED, tuple(rest)


def _ownership(folder: JobFolder, owner: Owner | None, resources: Resources) -> str | None:
    """Return the reason why the folder of a missing FineTuneJob may not belong to this cluster, or None."""
    if owner is None:
        return f"it has no {OWNER_FILE}, so its owner is unknown"
    if owner.cluster != resources.cluster:
        return "it belongs to another cluster"
    if (owner.namespace, owner.name, owner.uid) != (folder.namespace, folder.name, folder.uid):
        return f"its {OWNER_FILE} names another resource"
    return None


def _use(folder: JobFolder, part: str, files: Iterable[StoredFile], resources: Resources, store: str) -> str | None:
    """Return a sentence that names the user of the part, or None if it is unused."""
    below = len(folder.path) + 1
    others = set() if part == TEMPORARY_FOLDER else {file.path[below:].split("/")[0] for file in files}
    names = {TEMPORARY_FOLDER} | others
    user = resources.user_of(f"{store}/{folder.path}", names)
    return f"{user} uses it" if user is not None else None


def _complete(job: Object) -> bool:
    conditions = job.get("status", {}).get("conditions") or ()
    return any(entry["type"] == FineTuneJobCondition.COMPLETE and entry["status"] == "True" for entry in conditions)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)
