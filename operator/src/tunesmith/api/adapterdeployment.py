"""AdapterDeployment: a trained adapter, served under a model name from a pool."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from tunesmith.api.adapter_limits import AdapterLimits
from tunesmith.api.autoscaling import AdapterAutoscaling, replicas_or_autoscaling
from tunesmith.api.conditions import Condition
from tunesmith.api.continue_from import Digest, FineTuneJobReference
from tunesmith.api.credentials import SecretReference
from tunesmith.api.finetunejob_status import ArtifactStatus
from tunesmith.api.image_volume import IMAGE_EXAMPLE, IMAGE_PATTERN
from tunesmith.api.model import API_VERSION, ApiModel, ObjectMeta, ResourceName, Rule, StatusModel, StringPattern
from tunesmith.api.parity import ParityMode, RevisionParity
from tunesmith.api.rollout import MAX_REJECTED, AdapterRollout, HandledCommand, RevisionReference, RolloutStatus
from tunesmith.api.servingpool import MAX_LISTED_PODS, MAX_MODEL_NAME, ModelName
from tunesmith.api.uri import MAX_URI, secret_rule, uri_rules
from tunesmith.storage.schemes import Use, examples, pattern

AdapterUri = Annotated[
    str,
    Field(max_length=MAX_URI),
    StringPattern(
        f"{pattern(Use.BASE_MODEL)}|{IMAGE_PATTERN}",
        f"a uri is {examples(Use.BASE_MODEL)} or {IMAGE_EXAMPLE}, where the tag or a digest is required",
    ),
]


class ImportedArtifact(ApiModel):
    """Adapter that a Job imports: an artifact of Tunesmith, or an adapter of another trainer."""

    rules = (
        *uri_rules,
        secret_rule,
        Rule(
            "!has(self.secretRef) || !self.uri.startsWith('oci://')",
            "secretRef is not for oci:// uris: remove it; the nodes pull the image with the imagePullSecrets of the "
            "namespace's service account `default`, or with their own credentials",
            lambda self: self.secret_ref is None or not self.uri.startswith("oci://"),
        ),
    )

    uri: AdapterUri = Field(
        description=f"Folder of the adapter: {examples(Use.BASE_MODEL)}, or an image of an OCI registry, "
        f"{IMAGE_EXAMPLE}, which the node mounts (Kubernetes 1.33 or newer, with the feature gate ImageVolume). "
        "It is imported once, for the base model of the pool: an artifact is copied unchanged; an adapter of PEFT or "
        "MLX LM is checked, and converted where that "
        "is exact. Adapters in pickle files are refused."
    )
    digest: Digest | None = Field(
        default=None,
        description="SHA-256 that the tunesmith.json of an artifact must have. Absent: any. Not for an adapter of "
        "another trainer.",
    )
    secret_ref: SecretReference | None = Field(
        default=None, description="Credentials for the uri. Absent: those of the store."
    )


class AdapterSource(ApiModel):
    """Source of the adapter; exactly one field."""

    rules = (
        Rule(
            "has(self.fineTuneJob) != has(self.artifact)",
            "adapterFrom must have exactly one of fineTuneJob and artifact: keep one and remove the other",
            lambda self: (self.fine_tune_job is None) != (self.artifact is None),
        ),
    )

    fine_tune_job: FineTuneJobReference | None = Field(default=None, description="The artifact of a FineTuneJob.")
    artifact: ImportedArtifact | None = Field(default=None, description="An adapter from elsewhere, by its location.")


class PoolReference(ApiModel):
    """A ServingPool."""

    name: ResourceName = Field(description="Name of the ServingPool.")
    namespace: ResourceName | None = Field(
        default=None, description="Its namespace. Absent: that of the AdapterDeployment."
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
    rollout: AdapterRollout | None = Field(
        default=None,
        description="Transition from the serving revision to a new one. Absent: the new revision answers all requests "
        "once it is resident. A change of the spec, except for replicas and autoscaling, begins a running rollout "
        "again.",
    )
    limits: AdapterLimits | None = Field(
        default=None, description="Highest use by all API keys together. Absent: only the limits of the keys apply."
    )


class ImportedAdapter(StatusModel):
    """Facts about an imported adapter."""

    base_model_fingerprint: str = Field(max_length=128, description="Content fingerprint of its base model.")
    rank: int | None = Field(default=None, ge=1, description="Rank of the adapter. Absent: it has none.")
    parity: bool = Field(
        description="True if the answers of base and adapter were recorded, with which an engine can be checked."
    )
    missed_gates: int | None = Field(
        default=None, ge=0, description="Number of gates of evaluation.gates that it missed. Absent: it records none."
    )


class AdapterImport(StatusModel):
    """Import of spec.adapterFrom.artifact."""

    uri: str = Field(max_length=1024, description="The uri that was imported.")
    base_model: str = Field(max_length=1200, description="Base model that it was imported for: uri and revision.")
    artifact: ArtifactStatus | None = Field(
        default=None, description="The published artifact. Absent: the import has failed."
    )
    adapter: ImportedAdapter | None = Field(default=None, description="Facts about the published adapter.")
    message: str | None = Field(default=None, max_length=2048, description="What was done, or why the import failed.")
    job: str | None = Field(default=None, max_length=253, description="Name of the Job.")


class RevisionState(StrEnum):
    """Progress of a revision."""

    PENDING = "Pending"
    LOADING = "Loading"
    RESIDENT = "Resident"
    IDLE = "Idle"
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
        "loaded. Resident: loaded on a ready pod. Idle: was resident, and is on no pod while there are no "
        "requests. Failed: cannot be loaded; see message."
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
    weight: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Share of the requests, in percent, that the revision answers during a rollout; 100 over all "
        "revisions. Absent: no rollout shares the requests, and the newest resident revision answers.",
    )
    desired_replicas: int | None = Field(
        default=None,
        ge=1,
        description="Number of pods that should hold the revision during a rollout. Absent: that of the adapter.",
    )
    shadow_percent: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description="Share of the requests, in percent, that the revision answers as well, for comparison; clients "
        "never get these answers. Absent: none.",
    )


class AdapterPhase(StrEnum):
    """Summary of the conditions, for people."""

    WAITING = "Waiting"
    LOADING = "Loading"
    READY = "Ready"
    IDLE = "Idle"
    FAILED = "Failed"


class AdapterDeploymentStatus(StatusModel):
    """Observed state of an AdapterDeployment."""

    phase: AdapterPhase | None = Field(
        default=None,
        description="Summary of the conditions. Waiting: there is no revision yet. Loading: no revision is "
        "resident yet. Ready: requests are answered. Idle: there are no "
        "requests, and the next one waits until a pod holds the adapter. Failed: a problem needs action; see reason.",
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
    adapter_import: AdapterImport | None = Field(
        default=None,
        description="Import of spec.adapterFrom.artifact. Absent: it has not finished, or the field is absent.",
    )
    revisions: list[Revision] = Field(default_factory=list, max_length=8, description="Revisions, newest first.")
    rollout: RolloutStatus | None = Field(default=None, description="The latest rollout. Absent: none.")
    rollout_spec: str | None = Field(
        default=None,
        max_length=16,
        description="Digest of the spec without replicas and autoscaling, to which rollout and rejectedDigests belong.",
    )
    rollout_command: HandledCommand | None = Field(
        default=None, description="Latest command of the annotation tunesmith.dev/rollout. Absent: none."
    )
    rejected_digests: list[Annotated[str, Field(max_length=71)]] = Field(
        default_factory=list,
        max_length=MAX_REJECTED,
        description="Digests that were rolled back, aborted or undone, newest first. They are not tried again until "
        "the spec changes, except for replicas and autoscaling.",
    )
    previous_revision: RevisionReference | None = Field(
        default=None, description="Revision that answered before the current one, to which the command undo returns."
    )
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
