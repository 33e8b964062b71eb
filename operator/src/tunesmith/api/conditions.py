"""Condition types, reasons and the condition itself (Kubernetes API conventions, `metav1.Condition`)."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Self

from pydantic import Field

from tunesmith.api.model import StatusModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class ConditionStatus(StrEnum):
    """Status of a condition."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(StatusModel):
    """One observation of a resource's state."""

    type: str = Field(max_length=64, description="Type of the condition, in CamelCase.")
    status: ConditionStatus = Field(description="True, False or Unknown.")
    reason: str = Field(max_length=64, description="Why, as a CamelCase word for programs.")
    message: str = Field(
        default="",
        max_length=4096,
        description="Why, as a sentence for people: what is wrong, where, and how to fix it.",
    )
    last_transition_time: datetime = Field(description="When the status last changed.")
    observed_generation: int | None = Field(
        default=None, ge=0, description="The metadata.generation that the condition was set for."
    )


class Severity(StrEnum):
    """Severity of a reason. It decides which Events are written about the resource."""

    DETAIL = "Detail"
    """An ordinary step. An Event is written only if it replaces a warning."""
    NORMAL = "Normal"
    """News that needs no action: an Event of type Normal."""
    WARNING = "Warning"
    """A problem that needs action: an Event of type Warning."""


_Declared = tuple[str, Severity, str]


def _detail(value: str, description: str) -> _Declared:
    return value, Severity.DETAIL, description


def _normal(value: str, description: str) -> _Declared:
    return value, Severity.NORMAL, description


def _warning(value: str, description: str) -> _Declared:
    return value, Severity.WARNING, description


class ConditionType(StrEnum):
    """Condition types of a kind, each with its meaning."""

    description: str

    def __new__(cls, value: str, description: str = "") -> Self:
        """Return a new member."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.description = description
        return member


class Reason(StrEnum):
    """Reasons of a kind's conditions, each with its severity and its meaning."""

    severity: Severity
    description: str

    def __new__(cls, value: str, severity: Severity = Severity.NORMAL, description: str = "") -> Self:
        """Return a new member."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.severity = severity
        member.description = description
        return member


class FineTuneJobCondition(ConditionType):
    """Condition types of a FineTuneJob. Complete and Failed are terminal."""

    VALIDATED = "Validated", "True once the CPU stage has checked data, base model and settings."
    ADMITTED = "Admitted", "With a queue: True once Kueue has admitted the attempt's Job."
    STARTED = "Started", "True while every pod of an attempt is running."
    SUSPENDED = "Suspended", "True while spec.suspend keeps the job from running."
    PUBLISHED = "Published", "True once the adapter is in the store."
    EXPORTED = "Exported", "With spec.output.exports: True if every copy is where it was wanted."
    COMPLETE = "Complete", "Terminal: the adapter is published."
    FAILED = "Failed", "Terminal: the job did not succeed, and the reason says why."


class ServingPoolCondition(ConditionType):
    """Condition types of a ServingPool."""

    AVAILABLE = "Available", "True while at least one pod serves."
    PROGRESSING = "Progressing", "True while pods are being started, stopped or replaced."
    DEGRADED = "Degraded", "True while something is wrong that somebody should act on."
    UPDATED = "Updated", "True if every pod has the current settings."
    SCALING_ACTIVE = "ScalingActive", "With autoscaling: True if the demand is completely known."


class AdapterDeploymentCondition(ConditionType):
    """Condition types of an AdapterDeployment."""

    RESOLVED = "Resolved", "True if the artifact and a pool for it were found."
    READY = "Ready", "True while requests for the model are answered."
    PROGRESSING = "Progressing", "True while a revision is being loaded."
    SCALING_ACTIVE = "ScalingActive", "With autoscaling: True if the demand is completely known."


class FineTuneJobReason(Reason):
    """Reasons of a FineTuneJob's conditions besides those in FailureReason."""

    POD_PENDING = _detail("PodPending", "A Job or its pod was created a moment ago, or the pod is being started.")
    VALIDATING = _detail("Validating", "The CPU stage is checking data, base model and settings.")
    VALID = _normal("Valid", "The CPU stage found nothing wrong.")
    QUEUED = _normal("Queued", "The queue in scheduling.queue has not admitted the attempt's Job.")
    ADMITTED = _normal("Admitted", "The queue admitted the attempt's Job.")
    UNSCHEDULABLE = _warning("Unschedulable", "No node takes the pod. The message is the scheduler's.")
    RUNNING = _normal("Running", "An attempt is running.")
    STOPPING = _detail("Stopping", "An attempt is being stopped, and may save a checkpoint first.")
    SUSPENDED = _normal("Suspended", "spec.suspend is true: set it to false to continue.")
    RESUMED = _detail("Resumed", "spec.suspend is false again.")
    RETRYING = _warning("Retrying", "The pause after an attempt that failed or was pre-empted.")
    FINISHED = _detail("Finished", "No attempt is running, because the job finished.")
    PUBLISHED = _normal("Published", "The adapter is in the store.")
    EXPORTED = _normal("Exported", "Every copy of spec.output.exports was written.")
    EXPORT_FAILED = _warning("ExportFailed", "A copy could not be written; the artifact in the store is complete.")
    COMPLETE = _normal("Complete", "The adapter is published and the job is finished.")
    NAME_TAKEN = _warning("NameTaken", "A Job with the name that this job needs belongs to somebody else: delete it.")
    WRITE_REFUSED = _warning(
        "WriteRefused",
        "The API server refuses an object that the job needs: a quota, an admission policy or missing rights of "
        "the operator. The message is the API server's. The write is retried, and the job continues once it is "
        "accepted.",
    )
    PODS_REFUSED = _warning(
        "PodsRefused",
        "A Job exists and a ResourceQuota of the namespace leaves no room for its pods. The job continues once "
        "there is room.",
    )
    PODS_MISSING = _warning(
        "PodsMissing",
        "A Job exists without all of its pods, and no ResourceQuota explains it. `kubectl describe job` shows "
        "what refuses them: an admission policy, a LimitRange or a missing PriorityClass.",
    )


class FailureReason(Reason):
    """Reasons for the failure of a FineTuneJob, an attempt or an export. The message names the fix."""

    INVALID_SPEC = _warning("InvalidSpec", "The manifest is wrong; found by the validation, or by a newer release.")
    BASE_MODEL_NOT_FOUND = _warning("BaseModelNotFound", "The base model is not at its uri.")
    SECRET_NOT_FOUND = _warning(
        "SecretNotFound",
        "The Secret `tunesmith-store`, `tunesmith-reporting` or that of a secretRef is missing. Create it: a job "
        "that waits for it continues.",
    )
    ACCESS_DENIED = _warning(
        "AccessDenied",
        "The store refuses the credentials of the Secret that the message names, or a uri leads to an address "
        "that jobs may not reach or out of its claim.",
    )
    DATASET_NOT_FOUND = _warning("DatasetNotFound", "No rows are at the uri.")
    DATASET_INVALID = _warning(
        "DatasetInvalid",
        "Rows have a different format than those before them; or half of all rows or more are unusable; or "
        "`overlong: Error` or `unusable: Error` refuses a row. The message has file and line. A few bad rows are "
        "dropped and counted in status.preflight.dropped.",
    )
    WILL_NOT_FIT = _warning(
        "WillNotFit",
        "The estimate says that the GPU's memory is too small. The message has the change that fits.",
    )
    NOT_SERVABLE = _warning(
        "NotServable",
        "`servable` is `Required` and vLLM cannot load what the method makes. The message has the nearest method "
        "that it can load.",
    )
    OUT_OF_MEMORY = _warning(
        "OutOfMemory",
        "A pod or its GPU ran out of memory: lower microBatchSize or maxLength, use method.qlora, or raise "
        "resources.memory, as the message says.",
    )
    LOSS_DIVERGED = _warning(
        "LossDiverged",
        "The loss was not a number any more, or stayed far above that of the first steps: lower learningRate.",
    )
    GATE_FAILED = _warning(
        "GateFailed",
        "A score is outside the limits of evaluation.gates. The artifact is published; nothing of it is exported,"
        " and no AdapterDeployment serves it.",
    )
    STORAGE_UNAVAILABLE = _warning("StoreUnavailable", "The store cannot be reached; a pod that runs waits for it.")
    IMAGE_PULL_FAILED = _warning("ImagePullFailed", "The trainer's image cannot be pulled.")
    DEADLINE_EXCEEDED = _warning(
        "DeadlineExceeded",
        "The job ran longer than activeDeadlineSeconds, or its checks longer than six hours.",
    )
    ATTEMPTS_EXHAUSTED = _warning(
        "AttemptsExhausted",
        "maxAttempts attempts failed for reasons that are worth a retry. The message has the last.",
    )
    NOT_ALLOWED = _warning(
        "NotAllowed",
        "The installation does not let jobs of this namespace name such a PriorityClass, RuntimeClass, taint, "
        "node label or GPU resource, or a uri is in a part of the store that is not this namespace's.",
    )
    OUT_OF_DISK = _warning("OutOfDisk", "The job's files filled the disk of its node, or a volume of its pod.")
    NO_PROGRESS = _warning(
        "NoProgress",
        "Ten attempts in a row were pre-empted or evicted before they trained further than those before them. The"
        " pause between two attempts is 5 seconds, doubles up to 5 minutes, and is short again after progress.",
    )
    INTERNAL_ERROR = _warning("InternalError", "A fault of Tunesmith. The pod's log says more.")


class ServingPoolReason(Reason):
    """Reasons of a ServingPool's conditions."""

    PODS_READY = _normal("PodsReady", "At least one pod serves.")
    NO_POD_READY = _normal("NoPodReady", "No pod is ready yet, and none reports a problem.")
    SCALED_TO_ZERO = _normal("ScaledToZero", "spec.replicas is 0: raise it to serve.")
    ROLLING_OUT = _normal("RollingOut", "Pods are being replaced, because their settings changed.")
    PODS_CURRENT = _normal("PodsCurrent", "Every pod has the current settings.")
    UPDATE_PENDING = _normal("UpdatePending", "A new release of the installation changes the pods; other pools first.")
    UPDATE_BLOCKED = _warning(
        "UpdateBlocked",
        "The update of another pool fails, and this one waits until it is fixed.",
    )
    UPDATE_FAILED = _warning("UpdateFailed", "Pods with the current settings do not become ready.")
    SCALING = _detail("Scaling", "The number of ready pods is not the wanted one yet.")
    SETTLED = _detail("Settled", "The pool has the wanted number of ready pods.")
    AS_EXPECTED = _detail("AsExpected", "No pod reports a problem.")
    INVALID_SPEC = _warning("InvalidSpec", "The spec is wrong, or the installation does not allow it.")
    MODEL_NAME_TAKEN = _warning("ModelNameTaken", "An older resource has the model name of the base.")
    UNSCHEDULABLE = _warning("Unschedulable", "No node takes a pod. The message is the scheduler's.")
    IMAGE_PULL_FAILED = _warning("ImagePullFailed", "An image of the pods cannot be pulled.")
    CONFIGURATION = _warning("ContainerConfigError", "The kubelet cannot start a container, such as for a Secret.")
    BASE_MODEL_UNAVAILABLE = _warning("BaseModelUnavailable", "The base model cannot be fetched.")
    ENGINE_FAILED = _warning("EngineFailed", "The engine stopped. The message has the last line of its log.")
    ENGINE_UNHEALTHY = _warning(
        "EngineUnhealthy",
        "The engine runs but must not get requests: its canary's answer changed, or it hangs.",
    )
    AGENT_FAILED = _warning("AgentFailed", "The agent of a pod stopped.")
    AGENT_SILENT = _warning("AgentSilent", "The agent of a pod reports nothing, so what the pod holds is unknown.")
    AGENT_UNREACHABLE = _warning("AgentUnreachable", "The operator cannot connect to the agent of a running pod.")
    POD_FAILED = _warning("PodFailed", "A pod was evicted or its node was shut down.")
    PODS_REFUSED = _warning("PodsRefused", "The API server refuses the pool's pods. The message is the API server's.")
    WRITE_REFUSED = _warning(
        "WriteRefused",
        "The API server refuses an object of the pool: a quota, an admission policy or missing rights of the "
        "operator. The message is the API server's. The write is retried.",
    )
    DEMAND_KNOWN = _detail("DemandKnown", "Every gateway reports its requests.")
    GATEWAY_SILENT = _warning("GatewaySilent", "A gateway does not report its requests, so nothing is scaled down.")
    FINGERPRINTS_DIFFER = _warning("FingerprintsDiffer", "The pods fetched different contents of the base model.")


class AdapterDeploymentReason(Reason):
    """Reasons of an AdapterDeployment's conditions."""

    INVALID_SPEC = _warning("InvalidSpec", "The spec does not fit the schema of this release.")
    RESOLVED = _normal("Resolved", "The artifact and a pool for it were found.")
    FINE_TUNE_JOB_NOT_FOUND = _normal("FineTuneJobNotFound", "The FineTuneJob does not exist yet.")
    FINE_TUNE_JOB_RUNNING = _normal("FineTuneJobRunning", "The FineTuneJob is not complete yet.")
    FINE_TUNE_JOB_FAILED = _warning("FineTuneJobFailed", "The FineTuneJob failed: name another one.")
    NOT_SERVABLE = _warning("NotServable", "The engine cannot load the adapter that the FineTuneJob made.")
    POOL_NOT_FOUND = _warning("PoolNotFound", "The ServingPool in spec.pool does not exist.")
    POOL_NOT_ALLOWED = _warning("PoolNotAllowed", "The ServingPool does not let this namespace attach adapters.")
    POOL_NOT_NAMED = _warning("PoolNotNamed", "Only pools of foreign namespaces have the base: name one in spec.pool.")
    POOL_NOT_REPORTED = _normal("PoolNotReported", "A pool has not reported the fingerprint of its base yet.")
    NO_MATCHING_POOL = _warning("NoMatchingPool", "No pool that this namespace may use has the adapter's base.")
    SEVERAL_POOLS = _warning("SeveralPools", "Several pools have the adapter's base: name one in spec.pool.")
    BASE_MODEL_MISMATCH = _warning("BaseModelMismatch", "The pool's base is not the one the adapter was trained on.")
    RANK_TOO_HIGH = _warning("RankTooHigh", "The adapter's rank is above engine.maxLoraRank of the pool.")
    MODEL_NAME_TAKEN = _warning("ModelNameTaken", "An older resource has the model name: choose another one.")
    RESIDENT = _normal("Resident", "The newest revision is resident on a ready pod.")
    PREVIOUS_REVISION = _normal("PreviousRevision", "The previous revision serves until the newest one is resident.")
    REVISION_FAILED = _warning("RevisionFailed", "The newest revision cannot be loaded. The message says why.")
    POOL_NOT_READY = _normal("PoolNotReady", "No pod of the pool is ready.")
    AGENT_SILENT = _warning("AgentSilent", "The agent of a pod that held the adapter reports nothing.")
    NO_FREE_SLOT = _warning("NoFreeSlot", "No pod of the pool has a free adapter slot.")
    LOADING = _normal("Loading", "The newest revision is being loaded.")
    SETTLED = _detail("Settled", "The newest revision is on as many ready pods as wanted.")
    DEMAND_KNOWN = _detail("DemandKnown", "Every gateway reports its requests.")
    GATEWAY_SILENT = _warning("GatewaySilent", "A gateway does not report its requests, so no copy is removed.")


class EventReason(Reason):
    """Reasons of Events that do not come from a condition."""

    ATTEMPT_FAILED = _warning("AttemptFailed", "An attempt of a FineTuneJob failed.")
    ATTEMPT_PREEMPTED = _warning("AttemptPreempted", "An attempt of a FineTuneJob was pre-empted.")
    SCORED_ROWS_TRAINED = _warning("ScoredRowsTrained", "Rows that are scored are trained on too.")
    SUITE_FAILED = _warning("SuiteFailed", "A suite of spec.evaluation could not be scored.")
    SCALED_UP = _normal("ScaledUp", "More pods of a pool, or copies of an adapter, are wanted. The message says why.")
    SCALED_DOWN = _normal("ScaledDown", "Fewer pods of a pool, or copies of an adapter, are wanted.")
    STATUS_REFUSED = _warning("StatusRefused", "The API server refuses the status, which is out of date until then.")


CONDITIONS: Mapping[str, type[ConditionType]] = {
    "FineTuneJob": FineTuneJobCondition,
    "ServingPool": ServingPoolCondition,
    "AdapterDeployment": AdapterDeploymentCondition,
}
"""Condition types of each kind."""
REASONS: Mapping[str, tuple[type[Reason], ...]] = {
    "FineTuneJob": (FineTuneJobReason, FailureReason),
    "ServingPool": (ServingPoolReason,),
    "AdapterDeployment": (AdapterDeploymentReason,),
}
"""Reasons of each kind's conditions."""


def severity_of(kind: str, reason: str) -> Severity:
    """Return the severity of a reason in a kind's conditions; Detail for a reason unknown to this release."""
    return next((enum(reason).severity for enum in REASONS[kind] if reason in set(enum)), Severity.DETAIL)


def find(conditions: Iterable[Condition], type_: str) -> Condition | None:
    """Return the condition of a type; None if it is missing."""
    return next((condition for condition in conditions if condition.type == type_), None)


def is_true(conditions: Iterable[Condition], type_: str) -> bool:
    """Return True if the condition of a type is present and its status is True."""
    condition = find(conditions, type_)
    return condition is not None and condition.status is ConditionStatus.TRUE


def set_condition(conditions: Sequence[Condition], new: Condition) -> list[Condition]:
    """Return the conditions with `new` in place of the one of its type.

    The transition time is kept if the status does not change.
    """
    old = find(conditions, new.type)
    if old is None:
        return [*conditions, new]
    if old.status is new.status:
        new = new.model_copy(update={"last_transition_time": old.last_transition_time})
    return [new if condition.type == new.type else condition for condition in conditions]
