"""Locations in the store, and names derived from a resource. The operator computes them, never a pod."""

from __future__ import annotations

import hashlib
import re
from fnmatch import fnmatchcase
from urllib.parse import unquote

from tunesmith.storage.schemes import BY_NAME, normalised, split

ARTIFACT_MANIFEST = "tunesmith.json"
ARTIFACT_FOLDER = "artifact"
"""Sub-folder of a job's folder in the store, as are the next three."""
TEMPORARY_FOLDER = "tmp"
MERGED_FOLDER = "merged"
"""Beside the artifact, as is EVENTS_FOLDER: an engine's pod downloads every file that the artifact's manifest lists."""
MERGED_MANIFEST = "merged.json"
"""File of the merged model that is written last: hashes of the others, and the distance from the trained model."""
EVENTS_FOLDER = "tensorboard"
CLAIMS_FOLDER = "/mnt/claims"
"""Folder in which a training pod mounts its job's PersistentVolumeClaims read-only, each under its own name."""
ADAPTER_IMAGE, BASE_IMAGE = "_adapter", "_base"
"""Folders beside those of the claims in which an import's pod mounts images; no claim has such a name."""
_DIGEST = re.compile(r"^sha256:([0-9a-f]{64})$")


def job_folder(store: str, namespace: str, name: str, uid: str) -> str:
    """Return the folder of a FineTuneJob: `<store>/<namespace>/<job>-<uid>`, without a trailing slash."""
    return f"{store.rstrip('/')}/{namespace}/{name}-{uid}"


def artifact_uri(store: str, namespace: str, name: str, uid: str) -> str:
    """Return the folder of a FineTuneJob's artifact."""
    return f"{job_folder(store, namespace, name, uid)}/{ARTIFACT_FOLDER}"


def beside_artifact(uri: str, folder: str) -> str:
    """Return the folder of that name beside the artifact at `uri`."""
    return f"{uri.removesuffix(f'/{ARTIFACT_FOLDER}')}/{folder}"


def temporary_folder(store: str, namespace: str, name: str, uid: str) -> str:
    """Return the folder for data that a FineTuneJob needs only until it succeeds.

    It is removed on success; `tunesmith gc` removes those of deleted jobs.
    """
    return f"{job_folder(store, namespace, name, uid)}/{TEMPORARY_FOLDER}"


def checkpoints_uri(store: str, namespace: str, name: str, uid: str) -> str:
    """Return the folder of a FineTuneJob's checkpoints."""
    return f"{temporary_folder(store, namespace, name, uid)}/checkpoints"


def tokens_uri(store: str, namespace: str, name: str, uid: str) -> str:
    """Return the folder of a FineTuneJob's tokenised rows, kept from validation until the artifact is published."""
    return f"{temporary_folder(store, namespace, name, uid)}/tokens"


def namespace_of_artifact(store: str, uri: str) -> str | None:
    """Return the namespace whose prefix of the store contains `uri`; None if it is outside the store."""
    rest = uri.removeprefix(f"{normalised(store)}/")
    parts = rest.split("/")
    if rest == uri or len(parts) == 1 or not parts[0] or ".." in parts:
        return None
    return parts[0]


def writes_into_store(store: str, uri: str) -> bool:
    """Return True if files below `uri` would be in the store or contain it, for any spelling of the uri."""
    root = _names(store)
    return any(names[: len(root)] == root or root[: len(names)] == names for names in map(_names, _spellings(uri)))


def reads_foreign_store(store: str, namespace: str, uri: str) -> bool:
    """Return True if the file, folder or glob of `uri` may be in the store but outside the folder of `namespace`."""
    root = _names(store)
    return any(_reaches(_names(spelling), root, namespace) for spelling in _spellings(uri))


def _reaches(requested: tuple[str, ...], root: tuple[str, ...], namespace: str) -> bool:
    for number, name in enumerate(root):
        if len(requested) <= number or "**" in requested[number]:
            return True
        if not fnmatchcase(name, requested[number]) and name != requested[number]:
            return False
    return len(requested) == len(root) or requested[len(root)] != namespace


def _spellings(uri: str) -> set[str]:
    """Return the uri and its percent-decoded forms, decoded up to twice."""
    once = unquote(uri)
    return {uri, once, unquote(once)}


def _names(uri: str) -> tuple[str, ...]:
    """Return the scheme, the bucket and the names of the path, without empty names and dots."""
    scheme, rest = split(uri)
    bucket, *path = [name for name in rest.split("/") if name not in {"", "."}] or [""]
    names: list[str] = []
    for name in path:
        if name == "..":
            del names[-1:]
        else:
            names.append(name)
    # The bucket of az://container@account.dfs.core.windows.net/ is the container; bucket names have no capitals.
    return scheme.lower(), bucket.partition("@")[0].lower(), *names


def short_uid(uid: str) -> str:
    """Return five hex digits that distinguish resources with the same name."""
    return hashlib.sha256(uid.encode()).hexdigest()[:5]


def owned_name(name: str, uid: str, suffix: str) -> str:
    """Return `<name>-<uid5>-<suffix>`: the deterministic name of an object that belongs to a resource."""
    return f"{name}-{short_uid(uid)}-{suffix}"


def engine_name(namespace: str, model_name: str, digest: str) -> str:
    """Return a revision's name in the engine: `<namespace>/<modelName>@<12 hex of its digest>`.

    Raises:
        ValueError: `digest` is not `sha256:<64 hex>`.
    """
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise ValueError(f"{digest!r} is not a digest of the form sha256:<64 hex digits>")
    return f"{namespace}/{model_name}@{match.group(1)[:12]}"


def volume_claim(uri: str) -> tuple[str, str] | None:
    """Return the PersistentVolumeClaim of a uri and the folder in it; None for a uri of a store."""
    name, path = split(uri)
    if not (name in BY_NAME and BY_NAME[name].mounted):
        return None
    claim, _, folder = path.partition("/")
    return claim, folder.strip("/")
