"""AdapterDeployment: a trained adapter, served under a model name from a pool."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import ConfigDict, Field

from tunesmith.api.conditions import Condition
from tunesmith.api.continue_from import FineTuneJobReference
from tunesmith.api.model import API_VERSION, ApiModel, ObjectMeta, ResourceName, Rule, StatusModel
from tunesmith.api.parity import ParityMode, RevisionParity
from tunesmith.api.servingpool import MAX_LISTED_PODS, MAX_MODEL_NAME, ModelName, min_below_max, replicas_or_autoscaling


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

    min_replicas: int = Field(default=1, ge=1, le=1000, description="Minimum number of pods.")
    max_replicas: int = Field(ge=1, le=1000, description="Maximum number of pods.")
    target_concurrency: int = Field(
        default=8,
        ge=1,
        le=10000,
        description="Target number of running and waiting requests per pod on which the adapter is resident.",
    )
    scale_down_delay_seconds: int = Field(
        default=120, ge=0, le=86400, description="Seconds for which fewer copies must suffice before one is removed."
    )


class AdapterDeploymentSpec(ApiModel):
    """The adapter to serve, its pool, and its number of replicas."""

    rules = (replicas_or_autoscaling,)

    adapter_from: AdapterSource = Field(description="Source of the adapter.")
    pool: PoolReference | None = Field(
        default=None,
        description="ServingPool to attach to. Absent: the only pool that allows this namespace and has the "
        "adapter's base model.",
    )
    model_name: ModelName | None = Field(
        default=None, description="Model name in clients' requests. Absent: metadata.name."
    )
    replicas: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Number of pods on which the adapter is resident. Immutable while autoscaling is set.",
    )
    autoscaling: AdapterAutoscaling | None = Field(
        default=None, description="Autoscaling of the replicas. Absent: replicas is used."
    )
    parity: ParityMode = Field(
        default=ParityMode.REPORT,
        description="Comparison of the engine's answers with those that were recorded after training, after each load. "
        "Required: a pod gets no requests for the adapter until they agree. Report: the result is in the status. Off: "
        "they are not compared.",
    )


class RevisionState(StrEnum):
    """Progress of a revision."""

    PENDING = "Pending"
    LOADING = "Loading"
    RESIDENT = "Resident"
    FAILED = "Failed"


class RevisionPod(StatusModel):
    """A revision on one pod."""

    name: str = Field(max_length=253, description="Name of the pod.")
    loads: int = Field(default=0, description="Number of loads into the engine since the agent's start.")
    load_seconds: float = Field(default=0.0, description="Seconds that the latest load took.")


class Revision(StatusModel):
    """One immutable artifact under the model name."""

    digest: str = Field(max_length=71, pattern=r"^sha256:[0-9a-f]{64}$", description="Digest of the artifact.")
    uri: str | None = Field(
        default=None,
        max_length=1024,
        description="Folder of the artifact in the store, from which pods load it.",
    )
    base_model: bool | None = Field(
        default=None,
        description="True if the revision is the pool's own base model, from the same FineTuneJob: nothing is loaded, "
        "and every pod of the pool that has it answers under its name. Absent: it is an adapter.",
    )
    engine_name: str = Field(max_length=256, description="Name of the revision in the engine and in responses.")
    state: RevisionState = Field(
        description="State of the revision. Pending: not requested from a pod yet. Loading: being downloaded or "
        "loaded. Resident: loaded on a ready pod. Failed: cannot be loaded; see message."
    )
    ready_replicas: int = Field(default=0, ge=0, description="Number of ready pods on which the revision is resident.")
    message: str | None = Field(
        default=None, max_length=2048, description="Reason why the revision is not resident on every pod."
    )
    size_bytes: int | None = Field(default=None, description="Size of the revision's files on a pod.")
    pods: list[RevisionPod] = Field(
        default_factory=list,
        max_length=MAX_LISTED_PODS,
        description=f"Pods on which the revision is resident; the first {MAX_LISTED_PODS}.",
    )
    parity: RevisionParity | None = Field(
        default=None, description="Result of the parity check. Absent: it is off, or no pod has finished it."
    )


class AdapterPhase(StrEnum):
    """Summary of the conditions, for people."""

    WAITING = "Waiting"
    LOADING = "Loading"
    READY = "Ready"
    FAILED = "Failed"


class AdapterDeploymentStatus(StatusModel):
    """Observed state of an AdapterDeployment."""

    phase: AdapterPhase | None = Field(
        default=None,
        description="Summary of the conditions. Waiting: there is no revision yet. Loading: no revision is "
        "resident yet. Ready: requests are answered. Failed: a problem needs action; see reason.",
    )
    reason: str | None = Field(
        default=None, max_length=64, description="Reason of the condition that the phase is derived from."
    )
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="Conditions: Resolved, Ready, Progressing and, unless parity is Off, Parity; with autoscaling, "
        "ScalingActive.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    observed_generation: int | None = Field(default=None, description="Observed metadata.generation.")
    pool: PoolReference | None = Field(default=None, description="ServingPool that serves the adapter.")
    model: str | None = Field(
        default=None, max_length=320, description="Global ID of the model: <namespace>/<modelName>."
    )
    revisions: list[Revision] = Field(default_factory=list, max_length=8, description="Revisions, newest first.")
    desired_replicas: int | None = Field(default=None, description="Desired number of pods with the adapter.")
    desired_reason: str | None = Field(default=None, max_length=1024, description="Reason for desiredReplicas.")
    parity: str | None = Field(
        default=None,
        max_length=32,
        description="Distance and gap of the newest revision's parity check, in nats, such as 0.004 of 2.1; after "
        "that, the verdict unless it is Passed.",
    )
    replicas: int | None = Field(default=None, description="Number of pods with the adapter.")
    ready_replicas: int | None = Field(default=None, description="Number of ready pods with the adapter.")
    selector: str | None = Field(
        default=None,
        max_length=256,
        description="Label selector for the scale subresource. It matches no pod, because adapters share pods.",
    )
    url: str | None = Field(
        default=None,
        max_length=512,
        description="Endpoint for clients: the chart's gateway.externalUrl, or the Service in the cluster.",
    )


class AdapterDeployment(ApiModel):
    """A trained adapter, served under a model name from a pool."""

    model_config = ConfigDict(extra="ignore")
    rules = (
        Rule(
            "has(self.spec.modelName) || size(self.metadata.name) <= 63",
            "metadata.name has more than 63 characters, the limit of a model name: set spec.modelName",
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
        """Global ID of the model, `<namespace>/<modelName>`."""
        return f"{self.metadata.namespace}/{self.spec.model_name or self.metadata.name}"
