"""AdapterDeployment: a trained adapter, served under a model name from a pool."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import ConfigDict, Field

from tunesmith.api.conditions import Condition
from tunesmith.api.model import API_VERSION, ApiModel, ObjectMeta, ResourceName, Rule, StatusModel
from tunesmith.api.servingpool import MAX_MODEL_NAME, ModelName, min_below_max, replicas_or_autoscaling


class FineTuneJobReference(ApiModel):
    """A FineTuneJob in the same namespace."""

    name: ResourceName = Field(
        description="Name of the FineTuneJob. It may not exist yet: the deployment waits for it."
    )


class AdapterSource(ApiModel):
    """Source of the adapter."""

    fine_tune_job: FineTuneJobReference = Field(description="The artifact of a FineTuneJob.")


class PoolReference(ApiModel):
    """A ServingPool."""

    name: ResourceName = Field(description="Name of the ServingPool.")
    namespace: ResourceName | None = Field(
        default=None, description="Its namespace. Absent: that of the AdapterDeployment."
    )


class AdapterAutoscaling(ApiModel):
    """Bounds and target for the number of pods on which the adapter is resident."""

    rules = (min_below_max,)

    min_replicas: int = Field(default=1, ge=1, le=1000, description="Fewest pods.")
    max_replicas: int = Field(ge=1, le=1000, description="Most pods.")
    target_concurrency: int = Field(
        default=8, ge=1, le=10000, description="Running and waiting requests for this adapter per pod that holds it."
    )
    scale_down_delay_seconds: int = Field(
        default=120, ge=0, le=86400, description="Seconds that fewer copies must be enough before one is removed."
    )


class AdapterDeploymentSpec(ApiModel):
    """The adapter to serve, its pool, and its number of replicas."""

    rules = (replicas_or_autoscaling,)

    adapter_from: AdapterSource = Field(description="Where the adapter comes from.")
    pool: PoolReference | None = Field(
        default=None, description="Absent: the one attachable pool whose base fingerprint matches."
    )
    model_name: ModelName | None = Field(default=None, description="Name that clients call. Absent: metadata.name.")
    replicas: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Pods that keep the adapter resident. With autoscaling it must stay as it is.",
    )
    autoscaling: AdapterAutoscaling | None = Field(default=None, description="Absent: replicas decides.")


class RevisionState(StrEnum):
    """Progress of a revision."""

    PENDING = "Pending"
    LOADING = "Loading"
    RESIDENT = "Resident"
    FAILED = "Failed"


class Revision(StatusModel):
    """One immutable artifact under the model name."""

    digest: str = Field(max_length=71, pattern=r"^sha256:[0-9a-f]{64}$", description="Digest of the artifact.")
    uri: str | None = Field(
        default=None,
        max_length=1024,
        description="Folder of the artifact in the store; pods that come later load it from there.",
    )
    engine_name: str = Field(max_length=256, description="Its name in the engine and in replies.")
    state: RevisionState = Field(description="How far it is.")
    ready_replicas: int = Field(default=0, ge=0, description="Ready pods on which it is resident.")
    message: str | None = Field(default=None, max_length=2048, description="Why it is not resident everywhere.")


class AdapterPhase(StrEnum):
    """Summary of the conditions, for people."""

    WAITING = "Waiting"
    LOADING = "Loading"
    READY = "Ready"
    FAILED = "Failed"


class AdapterDeploymentStatus(StatusModel):
    """Observed state of an AdapterDeployment."""

    phase: AdapterPhase | None = Field(default=None, description="Derived from the conditions.")
    reason: str | None = Field(
        default=None, max_length=64, description="Reason of the condition that the phase is derived from."
    )
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="Resolved, Ready, Progressing; with autoscaling ScalingActive.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    observed_generation: int | None = Field(default=None, description="The metadata.generation that was acted on.")
    pool: PoolReference | None = Field(default=None, description="The pool that serves it.")
    model: str | None = Field(default=None, max_length=320, description="Global id: <namespace>/<modelName>.")
    revisions: list[Revision] = Field(default_factory=list, max_length=8, description="Revisions, newest first.")
    desired_replicas: int | None = Field(default=None, description="Pods that should hold the adapter now.")
    desired_reason: str | None = Field(default=None, max_length=1024, description="Why that many.")
    replicas: int | None = Field(default=None, description="Pods that hold the adapter.")
    ready_replicas: int | None = Field(default=None, description="Ready pods that hold the adapter.")
    selector: str | None = Field(
        default=None, max_length=256, description="For /scale; matches no pod, since pods are shared between adapters."
    )
    url: str | None = Field(
        default=None,
        max_length=512,
        description="The endpoint for clients: the chart's gateway.externalUrl, or the Service inside the cluster.",
    )


class AdapterDeployment(ApiModel):
    """A trained adapter, served under a model name from a pool."""

    model_config = ConfigDict(extra="ignore")
    rules = (
        Rule(
            "has(self.spec.modelName) || size(self.metadata.name) <= 63",
            "metadata.name has more than 63 characters and is the model's name: set spec.modelName to a shorter one",
            lambda self: self.spec.model_name is not None or len(self.metadata.name) <= MAX_MODEL_NAME,
        ),
    )

    api_version: Literal["tunesmith.dev/v1alpha1"] = API_VERSION
    kind: Literal["AdapterDeployment"] = "AdapterDeployment"
    metadata: ObjectMeta
    spec: AdapterDeploymentSpec
    status: AdapterDeploymentStatus = Field(default_factory=AdapterDeploymentStatus)

    @property
    def model(self) -> str:
        """Global id of the model, `<namespace>/<modelName>`."""
        return f"{self.metadata.namespace}/{self.spec.model_name or self.metadata.name}"
