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
    reason: str = Field(max_length=64, description="Machine-readable reason, in CamelCase.")
    message: str = Field(
        default="",
        max_length=4096,
        description="Human-readable message: the problem, its location and the fix.",
    )
    last_transition_time: datetime = Field(description="Time of the last change of the status.")
    observed_generation: int | None = Field(
        default=None, ge=0, description="metadata.generation for which the condition was set."
    )


class Severity(StrEnum):
    """Severity of a reason. It determines which Events are recorded for the resource."""

    DETAIL = "Detail"
    """An ordinary step: an Event is recorded only if it replaces a warning."""
    NORMAL = "Normal"
    """A change that needs no action: an Event of type Normal."""
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
    EXPORTED = "Exported", "With spec.output.exports: True if every copy was written."
    COMPLETE = "Complete", "Terminal: the adapter is published."
    FAILED = "Failed", "Terminal: the job did not succeed, for the given reason."


class ServingPoolCondition(ConditionType):
    """Condition types of a ServingPool."""

    AVAILABLE = "Available", "True while at least one pod is ready."
    PROGRESSING = "Progressing", "True while pods are being started, stopped or replaced."
    DEGRADED = "Degraded", "True while a problem needs action."
    UPDATED = "Updated", "True if every pod has the current settings."
    RESOLVED = "Resolved", "With baseModel.from: True if the FineTuneJob has published a whole model."
    SCALING_ACTIVE = "ScalingActive", "With autoscaling: True if every gateway reports its demand."


class AdapterDeploymentCondition(ConditionType):
    """Condition types of an AdapterDeployment."""

    RESOLVED = "Resolved", "True if the artifact and a pool for it were found."
    READY = "Ready", "True while requests for the model are answered."
    PROGRESSING = "Progressing", "True while a revision is being loaded or rolled out."
    RECONCILING = "Reconciling", "True while Progressing is True, otherwise missing (kstatus)."
    STALLED = "Stalled", "True while the spec cannot be served without a change, otherwise missing (kstatus)."
    PARITY = "Parity", "Unless spec.parity is Off: True if the engine answers as the trained model."
    SCALING_ACTIVE = "ScalingActive", "With autoscaling: True if every gateway reports its demand."


class FineTuneJobReason(Reason):
    """Reasons of a FineTuneJob's conditions besides those in FailureReason."""

    POD_PENDING = _detail("PodPending", "A Job or its pod was just created, or the pod is starting.")
    VALIDATING = _detail("Validating", "The CPU stage is checking data, base model and settings.")
    VALID = _normal("Valid", "The CPU stage found no problem.")
    WAITING_FOR_ADAPTER = _normal(
        "WaitingForAdapter", "The FineTuneJob in continueFrom does not exist yet or is not complete."
    )
    QUEUED = _normal("Queued", "The queue in scheduling.queue has not admitted the attempt's Job.")
    ADMITTED = _normal("Admitted", "The queue admitted the attempt's Job.")
    UNSCHEDULABLE = _warning("Unschedulable", "No node fits the pod. The message is the scheduler's.")
    RUNNING = _normal("Running", "An attempt is running.")
    STOPPING = _detail("Stopping", "An attempt is being stopped and may save a checkpoint first.")
    SUSPENDED = _normal("Suspended", "spec.suspend is true: set it to false to continue.")
    RESUMED = _detail("Resumed", "spec.suspend was set to false.")
    RETRYING = _warning("Retrying", "An attempt failed or was pre-empted. The next one starts after a back-off period.")
    FINISHED = _detail("Finished", "No attempt is running because the job has finished.")
    PUBLISHED = _normal("Published", "The adapter is in the store.")
    EXPORTED = _normal("Exported", "Every copy of spec.output.exports was written.")
    EXPORT_FAILED = _warning("ExportFailed", "A copy could not be written. The artifact in the store is complete.")
    COMPLETE = _normal("Complete", "The adapter is published and the job is finished.")
    STOPPED_EARLY = _normal(
        "StoppedEarly",
        "The adapter is published and the job is finished. evaluation.earlyStopping stopped training before its last "
        "step, because the held-out loss had stopped falling.",
    )
    NAME_TAKEN = _warning(
        "NameTaken", "A Job that this FineTuneJob does not own has the name that it needs: delete that Job."
    )
    WRITE_REFUSED = _warning(
        "WriteRefused",
        "The API server rejects an object that the job needs, because of a quota, an admission policy or missing "
        "permissions of the operator. The message is the API server's. The write is retried, and the job continues "
        "once it is accepted.",
    )
    PODS_REFUSED = _warning(
        "PodsRefused",
        "A Job exists, but a ResourceQuota of the namespace does not allow its pods. The job continues once the "
        "quota allows them.",
    )
    PODS_MISSING = _warning(
        "PodsMissing",
        "A Job exists without all of its pods, and no ResourceQuota is the cause. `kubectl describe job` shows "
        "the cause, such as an admission policy, a LimitRange or a missing PriorityClass.",
    )


class FailureReason(Reason):
    """Reasons for the failure of a FineTuneJob, an attempt or an export. The message contains the fix."""

    INVALID_SPEC = _warning("InvalidSpec", "The manifest is invalid. Found by the CPU stage, or by a newer release.")
    BASE_MODEL_NOT_FOUND = _warning("BaseModelNotFound", "The base model does not exist at its uri.")
    SECRET_NOT_FOUND = _warning(
        "SecretNotFound",
        "The Secret `tunesmith-store`, `tunesmith-reporting` or the Secret of a secretRef is missing. Create it: a "
        "waiting job then continues.",
    )
    ACCESS_DENIED = _warning(
        "AccessDenied",
        "The store rejects the credentials of the Secret that the message names, or a uri resolves to an address "
        "that jobs may not reach, or a link points outside of its PersistentVolumeClaim.",
    )
    ADAPTER_NOT_FOUND = _warning(
        "AdapterNotFound", "spec.continueFrom names a FineTuneJob that failed, or a uri without an artifact."
    )
    DATASET_NOT_FOUND = _warning("DatasetNotFound", "The uri has no rows.")
    DATASET_INVALID = _warning(
        "DatasetInvalid",
        "Rows differ in format from the preceding ones, at least half of all rows are unusable, or "
        "`overlong: Error` or `unusable: Error` rejects a row. The message contains the file and line. Fewer "
        "unusable rows are dropped and counted in status.preflight.dropped.",
    )
    WILL_NOT_FIT = _warning(
        "WillNotFit",
        "The estimated memory exceeds the GPU's. The message suggests a change that fits.",
    )
    NOT_SERVABLE = _warning(
        "NotServable",
        "`servable` is `Required` and vLLM cannot load the result of the method. The message suggests the "
        "closest method whose result it can load.",
    )
    OUT_OF_MEMORY = _warning(
        "OutOfMemory",
        "A pod or its GPU ran out of memory: lower microBatchSize or maxLength, use method.qlora, or raise "
        "resources.memory, as the message suggests.",
    )
    LOSS_DIVERGED = _warning(
        "LossDiverged",
        "The loss became NaN or infinite, or stayed far above that of the first steps: lower learningRate.",
    )
    NOTHING_LEARNED = _warning(
        "NothingLearned",
        "Training left the adapter as it was at the start: raise learningRate or the number of steps, as the message "
        "suggests.",
    )
    GATE_FAILED = _warning(
        "GateFailed",
        "A score is outside the limits of evaluation.gates. The artifact is published but not exported, and no"
        " AdapterDeployment serves it.",
    )
    STORAGE_UNAVAILABLE = _warning("StoreUnavailable", "The store cannot be reached. A running pod waits for it.")
    IMAGE_PULL_FAILED = _warning("ImagePullFailed", "The trainer's image cannot be pulled.")
    DEADLINE_EXCEEDED = _warning(
        "DeadlineExceeded",
        "The job ran longer than activeDeadlineSeconds, or its checks longer than six hours.",
    )
    ATTEMPTS_EXHAUSTED = _warning(
        "AttemptsExhausted",
        "maxAttempts attempts failed for retryable reasons. The message contains the last one.",
    )
    NOT_ALLOWED = _warning(
        "NotAllowed",
        "The installation does not allow the PriorityClass, RuntimeClass, toleration, node label or GPU resource "
        "of the job, or a uri is in another namespace's part of the store.",
    )
    OUT_OF_DISK = _warning("OutOfDisk", "The job's files filled the disk of its node, or a volume of its pod.")
    NO_PROGRESS = _warning(
        "NoProgress",
        "Ten attempts in a row were pre-empted or evicted before they advanced beyond the preceding ones. The"
        " back-off between two attempts starts at 5 seconds, doubles up to 5 minutes, and is reset by progress.",
    )
    INTERNAL_ERROR = _warning("InternalError", "A fault in Tunesmith. See the pod's log.")


class ServingPoolReason(Reason):
    """Reasons of a ServingPool's conditions."""

    PODS_READY = _normal("PodsReady", "At least one pod is ready.")
    NO_POD_READY = _normal("NoPodReady", "No pod is ready yet, and none reports a problem.")
    SCALED_TO_ZERO = _normal(
        "ScaledToZero",
        "The pool has no pods: with autoscaling because there is no request, and the next one starts a pod; otherwise "
        "because spec.replicas is 0.",
    )
    ROLLING_OUT = _normal("RollingOut", "Pods are being replaced because their settings changed.")
    PODS_CURRENT = _normal("PodsCurrent", "Every pod has the current settings.")
    UPDATE_PENDING = _normal(
        "UpdatePending", "A new release of the installation changes the pods. Other pools are updated first."
    )
    UPDATE_BLOCKED = _warning(
        "UpdateBlocked",
        "The update of another pool fails. This pool waits until it is fixed.",
    )
    UPDATE_FAILED = _warning("UpdateFailed", "Pods with the current settings do not become ready.")
    ROLLED_BACK = _warning(
        "RolledBack",
        "Pods with the current settings did not become ready. The pods have the previous settings until the spec "
        "changes.",
    )
    SCALING = _detail("Scaling", "The number of ready pods differs from desiredReplicas.")
    SETTLED = _detail("Settled", "The pool has desiredReplicas ready pods.")
    AS_EXPECTED = _detail("AsExpected", "No pod reports a problem.")
    INVALID_SPEC = _warning("InvalidSpec", "The spec is invalid, or the installation does not allow it.")
    MODEL_NAME_TAKEN = _warning("ModelNameTaken", "An older resource has the pool's model name.")
    RESOLVED = _normal("Resolved", "The FineTuneJob in baseModel.from has published a whole model.")
    FINE_TUNE_JOB_NOT_FOUND = _normal("FineTuneJobNotFound", "The FineTuneJob in baseModel.from does not exist.")
    FINE_TUNE_JOB_RUNNING = _normal("FineTuneJobRunning", "The FineTuneJob in baseModel.from is not complete yet.")
    FINE_TUNE_JOB_FAILED = _warning(
        "FineTuneJobFailed", "The FineTuneJob in baseModel.from failed, for example because a gate did not pass."
    )
    NO_WHOLE_MODEL = _warning(
        "NoWholeModel",
        "The FineTuneJob in baseModel.from published an adapter only: it needs output.merge or method.full.",
    )
    UNSCHEDULABLE = _warning("Unschedulable", "No node fits a pod. The message is the scheduler's.")
    IMAGE_PULL_FAILED = _warning("ImagePullFailed", "An image of the pods cannot be pulled.")
    CONFIGURATION = _warning(
        "ContainerConfigError", "The kubelet cannot start a container, for example because a Secret is missing."
    )
    VOLUMES_NOT_MOUNTED = _warning(
        "VolumesNotMounted",
        "The node of a pod has not mounted its volumes, such as a claim or an image, for two minutes.",
    )
    BASE_MODEL_UNAVAILABLE = _warning("BaseModelUnavailable", "The base model cannot be fetched.")
    ENGINE_FAILED = _warning("EngineFailed", "The engine stopped. The message contains the last line of its log.")
    ENGINE_UNHEALTHY = _warning(
        "EngineUnhealthy",
        "The engine is running but receives no requests: its canary's answer changed, or it hangs.",
    )
    AGENT_FAILED = _warning("AgentFailed", "The agent of a pod stopped.")
    AGENT_SILENT = _warning("AgentSilent", "The agent of a pod does not report, so the pod's adapters are unknown.")
    AGENT_UNREACHABLE = _warning("AgentUnreachable", "The operator cannot connect to the agent of a running pod.")
    POD_FAILED = _warning("PodFailed", "A pod was evicted or its node was shut down.")
    PODS_REFUSED = _warning("PodsRefused", "The API server rejects the pool's pods. The message is the API server's.")
    WRITE_REFUSED = _warning(
        "WriteRefused",
        "The API server rejects an object of the pool, because of a quota, an admission policy or missing permissions "
        "of the operator. The message is the API server's. The write is retried.",
    )
    DEMAND_KNOWN = _detail("DemandKnown", "Every gateway reports its requests.")
    GATEWAY_SILENT = _warning("GatewaySilent", "A gateway does not report its requests, so nothing is scaled down.")
    INVALID_SCHEDULE = _warning(
        "InvalidSchedule", "A time zone of spec.autoscaling.schedules does not exist, so the schedule has no effect."
    )
    FINGERPRINTS_DIFFER = _warning("FingerprintsDiffer", "The pods downloaded different versions of the base model.")


class AdapterDeploymentReason(Reason):
    """Reasons of an AdapterDeployment's conditions."""

    INVALID_SPEC = _warning("InvalidSpec", "The spec does not match the schema of this release.")
    RESOLVED = _normal("Resolved", "The artifact and a pool for it were found.")
    FINE_TUNE_JOB_NOT_FOUND = _normal("FineTuneJobNotFound", "The FineTuneJob does not exist yet.")
    FINE_TUNE_JOB_RUNNING = _normal("FineTuneJobRunning", "The FineTuneJob is not complete yet.")
    FINE_TUNE_JOB_FAILED = _warning("FineTuneJobFailed", "The FineTuneJob failed: refer to another one.")
    NOT_SERVABLE = _warning("NotServable", "The engine cannot load the adapter.")
    IMPORTING = _normal("Importing", "A Job imports the adapter. The message states its progress.")
    IMPORT_FAILED = _warning("ImportFailed", "The adapter could not be imported. The message contains the cause.")
    IMPORT_REFUSED = _warning(
        "ImportRefused",
        "The API server rejects the Job that imports the adapter. The message is the API server's. It is retried.",
    )
    NOT_ALLOWED = _warning("NotAllowed", "The adapter's uri is in the store, in the folder of another namespace.")
    POOL_NOT_FOUND = _warning("PoolNotFound", "The ServingPool in spec.pool does not exist.")
    POOL_NOT_ALLOWED = _warning("PoolNotAllowed", "The ServingPool does not allow adapters of this namespace.")
    POOL_NOT_NAMED = _warning("PoolNotNamed", "Only pools in other namespaces have the base model: set spec.pool.")
    POOL_NOT_REPORTED = _normal("PoolNotReported", "A pool has not reported the fingerprint of its base model yet.")
    NO_MATCHING_POOL = _warning("NoMatchingPool", "No pool that allows this namespace has the adapter's base model.")
    SEVERAL_POOLS = _warning("SeveralPools", "Several pools have the adapter's base model: set spec.pool.")
    BASE_MODEL_MISMATCH = _warning(
        "BaseModelMismatch", "The pool's base model is not the one that the adapter was trained on."
    )
    RANK_TOO_HIGH = _warning("RankTooHigh", "The adapter's rank exceeds engine.maxLoraRank of the pool.")
    MODEL_NAME_TAKEN = _warning("ModelNameTaken", "An older resource has the model name: set another spec.modelName.")
    RESIDENT = _normal("Resident", "The newest revision is resident on a ready pod.")
    PREVIOUS_REVISION = _normal("PreviousRevision", "The previous revision is served until the newest one is resident.")
    REVISION_FAILED = _warning(
        "RevisionFailed", "The newest revision cannot be loaded. The message contains the cause."
    )
    PARITY_PASSED = _normal("ParityPassed", "The engine answers as the trained model.")
    PARITY_FAILED = _warning(
        "ParityFailed",
        "The engine's answers differ from the trained model's, or parity is Required and they could not be compared. "
        "The message contains the cause.",
    )
    PARITY_UNDECIDED = _normal(
        "ParityUndecided", "Adapter and base model answer too similarly to tell whether the engine applies the adapter."
    )
    PARITY_NOT_RECORDED = _normal("ParityNotRecorded", "The artifact has no expected answers.")
    PARITY_PENDING = _detail("ParityPending", "No pod has compared the newest revision's answers.")
    POOL_NOT_READY = _normal("PoolNotReady", "No pod of the pool is ready.")
    AGENT_SILENT = _warning("AgentSilent", "The agent of a pod that had the adapter does not report.")
    POOL_FULL = _warning("PoolFull", "No pod of the pool has room for the adapter (engine.maxAdapters).")
    LOADING = _normal("Loading", "The newest revision is being loaded.")
    SETTLED = _detail("Settled", "The newest revision is resident on desiredReplicas ready pods.")
    ROLLING_OUT = _normal("RollingOut", "A new revision is being rolled out. status.rollout shows its progress.")
    ROLLOUT_PAUSED = _normal("RolloutPaused", "The rollout is paused: `tunesmith rollout resume` continues it.")
    ROLLED_BACK = _warning(
        "RolledBack",
        "A check of the newest revision failed, and the previous one answers all requests until the spec or the "
        "source changes. status.rollout.measures has the values.",
    )
    ROLLOUT_ABORTED = _warning(
        "RolloutAborted",
        "The newest revision was aborted or undone by a command. The previous one answers all requests until the spec "
        "or the source changes.",
    )
    DEMAND_KNOWN = _detail("DemandKnown", "Every gateway reports its requests.")
    GATEWAY_SILENT = _warning("GatewaySilent", "A gateway does not report its requests, so no copy is removed.")
    INVALID_SCHEDULE = _warning(
        "InvalidSchedule", "A time zone of spec.autoscaling.schedules does not exist, so the schedule has no effect."
    )
    SCALED_TO_ZERO = _normal(
        "ScaledToZero", "There is no request, so no pod holds the adapter. The next request waits until one does."
    )


class EventReason(Reason):
    """Reasons of Events that do not come from a condition."""

    ATTEMPT_FAILED = _warning("AttemptFailed", "An attempt of a FineTuneJob failed.")
    ATTEMPT_PREEMPTED = _warning("AttemptPreempted", "An attempt of a FineTuneJob was pre-empted.")
    EXPIRED = _normal(
        "Expired",
        "spec.ttlSecondsAfterFinished has passed: the FineTuneJob is deleted. Its artifact stays in the store.",
    )
    DELETION_REFUSED = _warning(
        "DeletionRefused", "The API server refuses to delete an expired FineTuneJob. The deletion is retried."
    )
    SCORED_ROWS_TRAINED = _warning("ScoredRowsTrained", "Rows are used both for scoring and for training.")
    SUITE_FAILED = _warning("SuiteFailed", "A suite of spec.evaluation could not be scored.")
    SCALED_UP = _normal(
        "ScaledUp", "desiredReplicas of a pool or an adapter increased. The message contains the cause."
    )
    SCALED_DOWN = _normal("ScaledDown", "desiredReplicas of a pool or an adapter decreased.")
    ENGINE_CRASHED = _warning(
        "EngineCrashed", "The engine of a pod stopped and is started again. The message contains its last error line."
    )
    REQUEST_REFUSED = _warning(
        "RequestRefused",
        "A request was being processed at two crashes of a pool's engines: the gateways refuse it for an hour. The "
        "message contains the first digits of its digest and its model.",
    )
    ROLLOUT_STEP = _normal("RolloutStep", "A step of a rollout began, or the rollout ended. The message is its state.")
    ROLLOUT_COMMAND = _normal("RolloutCommand", "A command for a rollout was handled. The message is its effect.")
    STATUS_REFUSED = _warning(
        "StatusRefused", "The API server rejects the status, which stays out of date until it accepts it."
    )


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
