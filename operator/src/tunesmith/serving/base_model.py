"""Volumes and mounts of a pool's base model: downloaded to the pod, shared through a cache, or mounted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.api.image_volume import image_volume
from tunesmith.api.placement import quantity_value
from tunesmith.contracts.location import volume_claim

if TYPE_CHECKING:
    from tunesmith.api.servingpool import ServingPool
    from tunesmith.serving.settings import PoolSettings

Manifest = dict[str, Any]

BASE_FOLDER = "/models/base"
FINGERPRINT_FILE = "/models/base.fingerprint"
FETCH_SIZE = 2**30
"""Bytes of storage for temporary files of a download."""
_CACHE = "/cache"
_COPIES_SIZE = 2**30
"""Bytes of storage for the files of a cached base model that are copied to the pod: all but its weights."""
_MODELS, _CACHE_VOLUME = "models", "base-model-cache"


def is_mounted(pool: ServingPool) -> bool:
    """Return True if the base model is mounted, so that nothing is downloaded: the agent computes its fingerprint."""
    return _mounted(pool) is not None


def mounts(pool: ServingPool, *, read_only: bool) -> list[Manifest]:
    """Return the mounts of the base model: with a cache, the base model's folder has links to its weights."""
    found = _mounted(pool)
    if found is not None:
        return [{**_mount(_MODELS, BASE_FOLDER, read_only=True), **({"subPath": found[1]} if found[1] else {})}]
    cache = [] if pool.spec.base_model_cache is None else [_mount(_CACHE_VOLUME, _CACHE, read_only=read_only)]
    return [_mount(_MODELS, "/models", read_only=read_only), *cache]


def volume_sizes(pool: ServingPool, settings: PoolSettings) -> dict[str, int]:
    """Return the size limits in bytes of the base model's volumes on the node's disk, by name; see `render`."""
    if is_mounted(pool):
        return {}
    own = _bytes(settings.base_model_storage) * 17 // 16
    size = own if pool.spec.base_model_cache is None else _COPIES_SIZE
    return {_MODELS: size, "tmp-base-model": FETCH_SIZE}


def volumes(pool: ServingPool) -> list[Manifest]:
    """Return the base model's volumes that are not on the node's disk."""
    found, secret, cache = _mounted(pool), pool.spec.base_model.secret_ref, pool.spec.base_model_cache
    built: list[Manifest] = []
    if found is not None:
        built.append({"name": _MODELS, **found[0]})
    elif secret is not None:
        built.append({"name": "base-model-secret", "secret": {"secretName": secret.name, "defaultMode": 0o440}})
    if cache is not None:
        built.append({"name": _CACHE_VOLUME, "persistentVolumeClaim": {"claimName": cache.claim_name}})
    return built


def fetch_arguments(pool: ServingPool, settings: PoolSettings, secret: str) -> list[str]:
    """Return the arguments of the agent's image that download the base model. `secret`: folder of the credentials."""
    source, cache, digest = pool.spec.base_model, pool.spec.base_model_cache, artifact_digest(pool)
    arguments = ["fetch-base", "--uri", source.uri or "", "--target", BASE_FOLDER]
    arguments += ["--fingerprint-file", FINGERPRINT_FILE]
    if source.revision is not None:
        arguments += ["--revision", source.revision]
    if digest is not None:
        arguments += ["--artifact-digest", digest]
    arguments += ["--secret", secret, *gpu_arguments(pool)]
    if cache is None:
        return [*arguments, "--storage", str(_bytes(settings.base_model_storage))]
    limit = [] if cache.max_size is None else ["--storage", str(_bytes(cache.max_size))]
    return [*arguments, "--cache", _CACHE, *limit]


def artifact_digest(pool: ServingPool) -> str | None:
    """Return the digest of the artifact whose whole model is the base; None for a base with a uri."""
    artifact = pool.status.base_model_artifact
    return None if pool.base_job is None or artifact is None else artifact.digest


def artifact_arguments(pool: ServingPool) -> list[str]:
    """Return the arguments by which the agent recognises revisions that are the base model itself."""
    digest = artifact_digest(pool)
    return [] if digest is None else ["--base-artifact", digest]


def equivalence_arguments(pool: ServingPool) -> list[str]:
    """Return the arguments by which the agent accepts adapters of the base model that the pool's one stands for."""
    return [] if pool.spec.equivalent_to is None else ["--equivalent-to", pool.spec.equivalent_to]


def gpu_arguments(pool: ServingPool) -> list[str]:
    """Return the arguments by which both containers of the agent's image check that the engine can divide the model."""
    return ["--gpus", str(pool.spec.resources.gpus)] if pool.spec.resources.gpus > 1 else []


def _mounted(pool: ServingPool) -> tuple[Manifest, str] | None:
    """Return the source of the volume and the folder in it, for a base model that is mounted."""
    uri = pool.spec.base_model.uri or ""
    claim, image = volume_claim(uri), image_volume(uri)
    if claim is not None:
        return {"persistentVolumeClaim": {"claimName": claim[0], "readOnly": True}}, claim[1]
    if image is not None:
        return {"image": {"reference": image.reference, "pullPolicy": "IfNotPresent"}}, image.folder
    return None


def _mount(name: str, path: str, *, read_only: bool) -> Manifest:
    return {"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})}


def _bytes(quantity: str) -> int:
    return int(quantity_value(quantity))
