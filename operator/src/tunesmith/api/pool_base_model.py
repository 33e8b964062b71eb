"""Base model of a ServingPool: its location, the cache that pods share, and its arrival on a pod."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from tunesmith.api.finetunejob import BaseModelSource
from tunesmith.api.image_volume import IMAGE_EXAMPLE, IMAGE_PATTERN
from tunesmith.api.model import ApiModel, ResourceName, Rule, StatusModel, StringPattern
from tunesmith.api.uri import MAX_URI
from tunesmith.storage.schemes import SCHEMES, Use, examples, listed, pattern

_MOUNTED = [*(f"{scheme.name}://" for scheme in SCHEMES if scheme.mounted), "oci://"]
_MOUNTED_CEL = " || ".join(f"self.baseModel.uri.startsWith('{prefix}')" for prefix in _MOUNTED)

CacheSize = Annotated[
    str,
    Field(max_length=32),
    StringPattern(r"^[0-9]+(Mi|Gi)$", "a cache size is a whole number with the unit Mi or Gi, such as 512Mi"),
]
cache_rule = Rule(
    f"!has(self.baseModelCache) || !({_MOUNTED_CEL})",
    f"baseModelCache is only for base models that pods download; {listed(_MOUNTED, 'and')} uris are mounted: remove "
    "baseModelCache",
    lambda self: self.base_model_cache is None or not self.base_model.uri.startswith(tuple(_MOUNTED)),
)
"""Rule of ServingPool's spec."""


class PoolBaseModel(BaseModelSource):
    """Location of a pool's base model: a folder in the layout of a Hugging Face model repository."""

    rules = (
        *BaseModelSource.rules,
        Rule(
            "!has(self.secretRef) || !self.uri.startsWith('oci://')",
            "baseModel.secretRef is not for oci:// uris: remove it; the nodes pull the image with the imagePullSecrets "
            "of the namespace's service account `default`, or with their own credentials",
            lambda self: self.secret_ref is None or not self.uri.startswith("oci://"),
        ),
    )

    uri: Annotated[
        str,
        Field(max_length=MAX_URI),
        StringPattern(
            f"{pattern(Use.BASE_MODEL)}|{IMAGE_PATTERN}",
            f"a uri is {examples(Use.BASE_MODEL)} or {IMAGE_EXAMPLE}, where the tag or a digest is required",
        ),
    ] = Field(
        description=f"Folder in the layout of a Hugging Face model repository: {examples(Use.BASE_MODEL)}, or an image "
        f"of an OCI registry, {IMAGE_EXAMPLE}, which the nodes mount (Kubernetes 1.33 or newer, with the feature gate "
        "ImageVolume).",
    )


class BaseModelCache(ApiModel):
    """Volume on which the pods of the pool, and of other pools with the same claim, share downloaded base models."""

    claim_name: ResourceName = Field(
        description="Name of a PersistentVolumeClaim in the pool's namespace. Its volume must be writable by user or "
        "group 65532 and by nobody else: a pod that can write to it can change what the pools serve.",
    )
    max_size: CacheSize | None = Field(
        default=None,
        description="Maximum size of all models on the volume. Models that no pod uses are removed to make room. "
        "Absent: the size of the volume.",
    )


class BaseModelOrigin(StrEnum):
    """Origin of a base model's files on a pod."""

    CACHE = "Cache"
    DOWNLOAD = "Download"


class BaseModelArrival(StatusModel):
    """Arrival of the base model on a pod, before its engine starts."""

    origin: BaseModelOrigin = Field(
        description="Origin of the files. Cache: all were in the cache, and had their hashes. Download: the pod "
        "downloaded at least one byte."
    )
    seconds: float = Field(
        ge=0, le=10**7, allow_inf_nan=False, description="Duration of download and checks, in seconds."
    )
    size_bytes: int = Field(ge=0, le=2**60, description="Size of the files, in bytes.")
    downloaded_bytes: int = Field(ge=0, le=2**60, description="Number of downloaded bytes.")


class PodBaseModel(BaseModelArrival):
    """Arrival of the base model on one pod."""

    pod: str = Field(max_length=253, description="Name of the pod.")
