"""Condition types, reasons and the condition itself (Kubernetes API conventions, `metav1.Condition`)."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING

from pydantic import Field

from tunesmith.api.model import StatusModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class ConditionStatus(StrEnum):
    """Whether a condition holds."""

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
        description="Why, as a sentence for people: what is wrong, where, and how to mend it.",
    )
    last_transition_time: datetime = Field(description="When the status last changed.")
    observed_generation: int | None = Field(
        default=None, ge=0, description="The metadata.generation that the condition was set for."
    )


class FineTuneJobCondition(StrEnum):
    """Condition types of a FineTuneJob. Complete and Failed are terminal."""

    VALIDATED = "Validated"
    ADMITTED = "Admitted"
    STARTED = "Started"
    SUSPENDED = "Suspended"
    PUBLISHED = "Published"
    EXPORTED = "Exported"
    COMPLETE = "Complete"
    FAILED = "Failed"


class ServingPoolCondition(StrEnum):
    """Condition types of a ServingPool."""

    AVAILABLE = "Available"
    PROGRESSING = "Progressing"
    DEGRADED = "Degraded"
    UPDATED = "Updated"
    SCALING_ACTIVE = "ScalingActive"


class AdapterDeploymentCondition(StrEnum):
    """Condition types of an AdapterDeployment."""

    RESOLVED = "Resolved"
    READY = "Ready"
    PROGRESSING = "Progressing"
    SCALING_ACTIVE = "ScalingActive"


class ServingPoolReason(StrEnum):
    """Reasons of a ServingPool's conditions."""

    PODS_READY = "PodsReady"
    NO_POD_READY = "NoPodReady"
    SCALED_TO_ZERO = "ScaledToZero"
    ROLLING_OUT = "RollingOut"
    PODS_CURRENT = "PodsCurrent"
    UPDATE_PENDING = "UpdatePending"
    UPDATE_BLOCKED = "UpdateBlocked"
    UPDATE_FAILED = "UpdateFailed"
    SCALING = "Scaling"
    SETTLED = "Settled"
    AS_EXPECTED = "AsExpected"
    INVALID_SPEC = "InvalidSpec"
    MODEL_NAME_TAKEN = "ModelNameTaken"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CONFIGURATION = "ContainerConfiguration"
    BASE_MODEL_UNAVAILABLE = "BaseModelUnavailable"
    ENGINE_FAILED = "EngineFailed"
    ENGINE_UNHEALTHY = "EngineUnhealthy"
    AGENT_FAILED = "AgentFailed"
    AGENT_SILENT = "AgentSilent"
    AGENT_UNREACHABLE = "AgentUnreachable"
    POD_FAILED = "PodFailed"
    PODS_REFUSED = "PodsRefused"
    WRITE_REFUSED = "WriteRefused"
    DEMAND_KNOWN = "DemandKnown"
    GATEWAY_SILENT = "GatewaySilent"
    FINGERPRINTS_DIFFER = "FingerprintsDiffer"


class AdapterDeploymentReason(StrEnum):
    """Reasons of an AdapterDeployment's conditions."""

    INVALID_SPEC = "InvalidSpec"
    RESOLVED = "Resolved"
    FINE_TUNE_JOB_NOT_FOUND = "FineTuneJobNotFound"
    FINE_TUNE_JOB_RUNNING = "FineTuneJobRunning"
    FINE_TUNE_JOB_FAILED = "FineTuneJobFailed"
    NOT_SERVABLE = "NotServable"
    POOL_NOT_FOUND = "PoolNotFound"
    POOL_NOT_ALLOWED = "PoolNotAllowed"
    POOL_NOT_NAMED = "PoolNotNamed"
    POOL_NOT_REPORTED = "PoolNotReported"
    NO_MATCHING_POOL = "NoMatchingPool"
    SEVERAL_POOLS = "SeveralPools"
    BASE_MODEL_MISMATCH = "BaseModelMismatch"
    RANK_TOO_HIGH = "RankTooHigh"
    MODEL_NAME_TAKEN = "ModelNameTaken"
    RESIDENT = "Resident"
    PREVIOUS_REVISION = "PreviousRevision"
    REVISION_FAILED = "RevisionFailed"
    POOL_NOT_READY = "PoolNotReady"
    AGENT_SILENT = "AgentSilent"
    NO_FREE_SLOT = "NoFreeSlot"
    LOADING = "Loading"
    SETTLED = "Settled"
    DEMAND_KNOWN = "DemandKnown"
    GATEWAY_SILENT = "GatewaySilent"


class FailureReason(StrEnum):
    """Why a FineTuneJob failed. Each comes with a message that names the mend."""

    INVALID_SPEC = "InvalidSpec"
    BASE_MODEL_NOT_FOUND = "BaseModelNotFound"
    SECRET_NOT_FOUND = "SecretNotFound"  # noqa: S105 - a reason, not a secret
    ACCESS_DENIED = "AccessDenied"
    DATASET_NOT_FOUND = "DatasetNotFound"
    DATASET_INVALID = "DatasetInvalid"
    WILL_NOT_FIT = "WillNotFit"
    NOT_SERVABLE = "NotServable"
    OUT_OF_MEMORY = "OutOfMemory"
    LOSS_DIVERGED = "LossDiverged"
    GATE_FAILED = "GateFailed"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    ATTEMPTS_EXHAUSTED = "AttemptsExhausted"
    NOT_ALLOWED = "NotAllowed"
    """The installation does not let jobs of this namespace do what the spec names: a permission, not a mistake."""
    OUT_OF_DISK = "OutOfDisk"
    NO_PROGRESS = "NoProgress"
    """Attempt after attempt was stopped before it trained further than those before it."""
    INTERNAL_ERROR = "InternalError"


def find(conditions: Iterable[Condition], type_: str) -> Condition | None:
    """The condition of that type, or None."""
    return next((condition for condition in conditions if condition.type == type_), None)


def is_true(conditions: Iterable[Condition], type_: str) -> bool:
    """Whether the condition of that type is present with status True."""
    condition = find(conditions, type_)
    return condition is not None and condition.status is ConditionStatus.TRUE


def set_condition(conditions: Sequence[Condition], new: Condition) -> list[Condition]:
    """The list with `new` in place of its type; the transition time is kept while the status does not change."""
    old = find(conditions, new.type)
    if old is None:
        return [*conditions, new]
    if old.status is new.status:
        new = new.model_copy(update={"last_transition_time": old.last_transition_time})
    return [new if condition.type == new.type else condition for condition in conditions]
