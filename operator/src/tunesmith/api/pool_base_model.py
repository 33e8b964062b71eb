"""Base model of a ServingPool: its location, the cache that pods share, and its arrival on a pod."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from tunesmith.api.credentials import SecretReference
from tunesmith.api.finetunejob import BaseModelSource
from tunesmith.api.image_volume import IMAGE_EXAMPLE, IMAGE_PATTERN
from tunesmith.api.model import ApiModel, ResourceName, Rule, StatusModel, StringPattern
from tunesmith.api.uri import MAX_URI
from tunesmith.storage.schemes import SCHEMES, Use, examples, listed, pattern

_MOUNTED = [*(f"{scheme.name}://" for scheme in SCHEMES if scheme.mounted), "oci://"]
_MOUNTED_CEL = " || ".join(f"self.baseModel.uri.startsWith('{prefix}')" for prefix in _MOUNTED)


def _with_uri(rule: Rule) -> Rule:
    """Return the rule for a model whose `uri` is optional: it holds without one."""
    holds = rule.holds
    return Rule(
        f"!has(self.uri) || ({rule.cel})",
        rule.message,
        None if holds is None else lambda self: self.uri is None or holds(self),
    )


CacheSize = Annotated[
    str,
    Field(max_length=32),
    StringPattern(r"^[0-9]+(Mi|Gi)$", "a cache size is a whole number with the unit Mi or Gi, such as 512Mi"),
]
cache_rule = Rule(
    f"!has(self.baseModelCache) || !has(self.baseModel.uri) || !({_MOUNTED_CEL})",
    f"baseModelCache is only for base models that pods download; {listed(_MOUNTED, 'and')} uris are mounted: remove "
    "baseModelCache",
    lambda self: (
        self.base_model_cache is None
        or self.base_model.uri is None
        or not self.base_model.uri.startswith(tuple(_MOUNTED))
    ),
)
"""Rule of ServingPool's spec."""
PoolModelUri = Annotated[
    str,
    Field(max_length=MAX_URI),
    StringPattern(
        f"{pattern(Use.BASE_MODEL)}|{IMAGE_PATTERN}",
        f"a uri is {examples(Use.BASE_MODEL)} or {IMAGE_EXAMPLE}, where the tag or a digest is required",
    ),
]


class TrainingJobReference(ApiModel):
    """A FineTuneJob, in any namespace."""

    name: ResourceName = Field(
        description="Name of the FineTuneJob. It may not exist yet: the resource that names it waits for it."
    )
    namespace: ResourceName | None = Field(
        default=None,
        description="Its namespace. Absent: that of the pool. Another one is allowed to pools in the namespaces of the "
        "chart's value serving.sharedPoolNamespaces only: those of the platform.",
    )


class TrainedBaseModel(ApiModel):
    """Whole model that a FineTuneJob publishes."""

    fine_tune_job: TrainingJobReference = Field(
        description="The FineTuneJob: with method.full its artifact is the base model, otherwise its merged model "
        "(spec.output.merge). If the job is created again under its name, the pods are replaced once it is Complete."
    )


class PoolBaseModel(ApiModel):
    """Base model of a pool: a folder in the layout of a Hugging Face model repository, or a FineTuneJob's result."""

    rules = (
        Rule(
            "has(self.uri) != has(self.from)",
            "baseModel must have exactly one of uri and from: keep one and remove the other",
            lambda self: (self.uri is None) != (self.from_ is None),
        ),
        Rule(
            "!has(self.from) || !(has(self.revision) || has(self.secretRef))",
            "baseModel.revision and baseModel.secretRef are only for a uri: remove them; the result of a FineTuneJob "
            "is read with the credentials of the store",
            lambda self: self.from_ is None or (self.revision is None and self.secret_ref is None),
        ),
        *map(_with_uri, BaseModelSource.rules),
        _with_uri(
            Rule(
                "!has(self.secretRef) || !self.uri.startsWith('oci://')",
                "baseModel.secretRef is not for oci:// uris: remove it; the nodes pull the image with the "
                "imagePullSecrets of the namespace's service account `default`, or with their own credentials",
                lambda self: self.secret_ref is None or not self.uri.startswith("oci://"),
            )
        ),
    )

    uri: PoolModelUri | None = Field(
        default=None,
        description=f"Folder in the layout of a Hugging Face model repository: {examples(Use.BASE_MODEL)}, or an image "
        f"of an OCI registry, {IMAGE_EXAMPLE}, which the nodes mount (Kubernetes 1.33 or newer, with the feature gate "
        "ImageVolume).",
    )
    revision: str | None = Field(
        default=None, max_length=128, description="Commit, tag or branch of an hf:// model. Absent: main."
    )
    secret_ref: SecretReference | None = Field(
        default=None, description="Credentials for the uri. Absent: those of the store."
    )
    from_: TrainedBaseModel | None = Field(
        default=None,
        alias="from",
        description="Whole model that a FineTuneJob publishes, instead of a uri. Whoever may create that FineTuneJob "
        "decides what the pool serves.",
    )

    @property
    def origin(self) -> str:
        """Origin of the base model, for people: its uri, or its FineTuneJob."""
        if self.from_ is None:
            return self.uri or ""
        job = self.from_.fine_tune_job
        return f"FineTuneJob {f'{job.namespace}/' if job.namespace else ''}{job.name}"


class BaseModelArtifact(StatusModel):
    """Whole model of a FineTuneJob's artifact."""

    digest: str = Field(max_length=71, pattern=r"^sha256:[0-9a-f]{64}$", description="Digest of the artifact.")
    uri: str = Field(max_length=MAX_URI, description="Folder of the model in the store, from which pods load it.")


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
