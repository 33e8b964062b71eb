"""The status of an AdapterDeployment: its revisions, their states, and the reasons why it is not ready.

A new artifact becomes a revision beside the serving one. The old revision stays until the new one is resident on every
pod that is to hold it, and keeps serving if the new one cannot be loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.api.adapterdeployment import (
    AdapterDeploymentStatus,
    AdapterPhase,
    PoolReference,
    Revision,
    RevisionPod,
    RevisionState,
)
from tunesmith.api.conditions import AdapterDeploymentCondition, ConditionStatus
from tunesmith.api.conditions import AdapterDeploymentReason as Reason
from tunesmith.api.parity import ParityVerdict
from tunesmith.api.servingpool import MAX_LISTED_PODS, ServingPool
from tunesmith.contracts.agent import ResidencyState
from tunesmith.contracts.location import engine_name
from tunesmith.contracts.sentence import one_line
from tunesmith.contracts.transitions import conditions_of
from tunesmith.serving.parity import parity_condition, shown_parity, worst_parity
from tunesmith.serving.resolve import Artifact, Unresolved, has_base_of, reference, short

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from tunesmith.api.adapterdeployment import AdapterDeployment, AdapterImport
    from tunesmith.autoscale.decide import Decision
    from tunesmith.contracts.claims import ModelNameClaim
    from tunesmith.serving.pod import PoolPod

SELECTOR = "tunesmith.dev/none=pods-are-shared"
_MAX_MESSAGE_LENGTH = 2000
_IN_PROGRESS = (ResidencyState.DOWNLOADING, ResidencyState.LOADING)


@dataclass(frozen=True)
class AdapterObservation:
    """Observed state from which an AdapterDeployment's status is computed.

    `lost_to`: older claim that holds the model name, None if this adapter holds it. `pods`: pods of the chosen pool, or
    of the one that keeps serving. `unplaced`: reason why there is no room for copies, by engine name. `decision`:
    number of desired copies. `imported`: record of the import of its source. `unknown_demand`: reason why the demand is
    not completely known, None if it is.
    """

    artifact: Artifact | Unresolved
    pool: ServingPool | Unresolved
    lost_to: ModelNameClaim | None
    pods: Sequence[PoolPod]
    unplaced: Mapping[str, str]
    decision: Decision
    url: str
    unknown_demand: str | None = None
    imported: AdapterImport | None = None


def plan(adapter: AdapterDeployment, observation: AdapterObservation, now: datetime) -> AdapterDeploymentStatus:
    """Compute the whole status."""
    builder = _ConditionBuilder(adapter, observation, _revisions(adapter, observation))
    conditions = {
        AdapterDeploymentCondition.RESOLVED: builder.resolved(),
        AdapterDeploymentCondition.READY: builder.ready(),
        AdapterDeploymentCondition.PROGRESSING: builder.progressing(),
    }
    newest = next(iter(builder.revisions), None)
    parity = parity_condition(adapter.spec.parity, newest)
    if parity is not None:
        conditions[AdapterDeploymentCondition.PARITY] = parity
    if adapter.spec.autoscaling is not None:
        conditions[AdapterDeploymentCondition.SCALING_ACTIVE] = builder.scaling()
    holders = [
        pod
        for pod in observation.pods
        if not pod.stopping and any(revision.engine_name in pod.resident for revision in builder.revisions)
    ]
    old = adapter.status
    # The reason explains the choice of this size; it is not rewritten with every request.
    is_same_size = (old.desired_replicas, old.observed_generation) == (
        observation.decision.replicas,
        adapter.metadata.generation,
    )
    return AdapterDeploymentStatus(
        phase=builder.phase(),
        reason=conditions[AdapterDeploymentCondition.READY][1],
        conditions=conditions_of(adapter.status.conditions, conditions, adapter.metadata.generation, now),
        observed_generation=adapter.metadata.generation,
        pool=_pool(adapter, observation) if observation.lost_to is None else None,
        model=adapter.model if observation.lost_to is None else None,
        adapter_import=observation.imported,
        revisions=builder.revisions,
        desired_replicas=observation.decision.replicas,
        desired_reason=old.desired_reason
        if is_same_size and old.desired_reason
        else one_line(observation.decision.reason, 1024),
        parity=shown_parity(newest),
        replicas=len(holders),
        ready_replicas=sum(1 for pod in holders if pod.ready and pod.answering),
        selector=SELECTOR,
        url=observation.url or None,
    )


def _pool(adapter: AdapterDeployment, observation: AdapterObservation) -> PoolReference | None:
    if isinstance(observation.pool, ServingPool):
        return reference(observation.pool)
    gone = observation.pool.reason in (Reason.POOL_NOT_FOUND, Reason.POOL_NOT_ALLOWED)
    return None if gone or not adapter.status.revisions else adapter.status.pool


def desired_copies(revisions: Sequence[Revision], desired: int) -> list[tuple[Revision, int]]:
    """Return each revision with the number of pods that should hold it, serving revisions first.

    A revision that failed permanently is tried on one pod if it has room, since a newer pod may be able to load it.
    """
    if not revisions:
        return []
    newest, older = revisions[0], revisions[1:]
    if newest.state is RevisionState.FAILED:
        return [*((revision, desired) for revision in older), (newest, 1)]
    return [*((revision, max(1, min(desired, revision.ready_replicas))) for revision in older), (newest, desired)]


def needs_room(adapter: AdapterDeployment) -> bool:
    """Return True if the adapter has a revision that is to be loaded and is not known to fail on the pool."""
    return any(
        revision.state is not RevisionState.FAILED and not revision.base_model for revision in adapter.status.revisions
    )


def is_whole(adapter: AdapterDeployment) -> bool:
    """Return True if a revision of the adapter is the base model of its pool."""
    return any(revision.base_model for revision in adapter.status.revisions)


def is_base(adapter: AdapterDeployment, artifact: Artifact | Unresolved, pool: ServingPool | None) -> bool:
    """Return True if the pool that serves an AdapterDeployment has its artifact as base model, on all of its pods."""
    if pool is None or not has_base_of(adapter, pool):
        return False
    if isinstance(artifact, Artifact):
        return artifact.whole is not None
    return is_whole(adapter)


def _revisions(adapter: AdapterDeployment, observation: AdapterObservation) -> list[Revision]:
    if observation.lost_to is not None:
        return []
    prefix = f"{adapter.model}@"
    known = [revision for revision in adapter.status.revisions if revision.engine_name.startswith(prefix)]
    if isinstance(observation.artifact, Artifact) and isinstance(observation.pool, ServingPool):
        namespace, _, model_name = adapter.model.partition("/")
        artifact = observation.artifact
        whole = artifact.whole if is_base(adapter, artifact, observation.pool) else None
        newest = Revision(
            digest=artifact.digest,
            uri=artifact.uri if whole is None else whole.uri,
            base_model=True if whole is not None else None,
            engine_name=engine_name(namespace, model_name, artifact.digest),
            state=RevisionState.PENDING,
        )
        previous = next((revision for revision in known if revision.engine_name == newest.engine_name), None)
        if previous is not None and previous.state is RevisionState.FAILED and _is_unchanged(adapter, observation.pool):
            newest = previous.model_copy(update={"uri": newest.uri})
        known = [newest, *(revision for revision in known if revision.engine_name != newest.engine_name)]
    observed = [_observed(revision, observation) for revision in known]
    if not observed:
        return []
    newest, older = observed[0], observed[1:]
    if _is_settled(newest, observation):
        return [newest]
    # Of the older revisions keep only serving ones; those that were resident a moment ago may serve again.
    serving = [revision for revision in older if revision.ready_replicas > 0] or [
        revision for revision in older if revision.state is RevisionState.RESIDENT
    ]
    return [newest, *(serving or older)[:1]]


def _is_unchanged(adapter: AdapterDeployment, pool: ServingPool) -> bool:
    """Return True if neither the spec nor the pool has changed since the status was written."""
    status = adapter.status
    return status.observed_generation == adapter.metadata.generation and status.pool == reference(pool)


def _is_settled(revision: Revision, observation: AdapterObservation) -> bool:
    """Return True if as many ready pods as desired hold the revision, or all pods that answer."""
    answering = sum(1 for pod in observation.pods if pod.answering)
    return revision.ready_replicas >= max(1, min(observation.decision.replicas, answering))


def _observed(revision: Revision, observation: AdapterObservation) -> Revision:
    found = [
        (pod, entry)
        for pod in observation.pods
        if not pod.stopping and (entry := pod.residency(revision.engine_name)) is not None
    ]
    resident = [pod for pod, entry in found if entry.state is ResidencyState.RESIDENT]
    loaded = [
        RevisionPod(name=pod.name, loads=entry.loads, load_seconds=entry.load_seconds)
        for pod, entry in found
        if entry.state is ResidencyState.RESIDENT
    ]
    has_failed = revision.state is RevisionState.FAILED
    failures = [(pod, entry) for pod, entry in found if entry.state is ResidencyState.FAILED]
    message = (
        f"{failures[0][1].message or 'it could not be loaded'} (pod {failures[0][0].name})"
        if failures
        else (revision.message if has_failed else observation.unplaced.get(revision.engine_name))
    )
    if resident:
        state = RevisionState.RESIDENT
    elif has_failed or any(entry.permanent for _, entry in failures):
        # It stays failed while it is retried or has no place, so that it does not compete with loadable revisions.
        state = RevisionState.FAILED
    elif failures or any(entry.state in _IN_PROGRESS for _, entry in found):
        state = RevisionState.LOADING
    else:
        state = RevisionState.PENDING
    return revision.model_copy(
        update={
            "state": state,
            "ready_replicas": sum(1 for pod in resident if pod.ready and pod.answering),
            "message": one_line(message, _MAX_MESSAGE_LENGTH) if message else None,
            "size_bytes": max((entry.size_bytes for _, entry in found), default=0) or None,
            "parity": worst_parity((pod.name, entry.parity) for pod, entry in found)
            or (revision.parity if state is RevisionState.FAILED else None),
            "pods": sorted(loaded, key=lambda pod: pod.name)[:MAX_LISTED_PODS],
        }
    )


_ConditionState = tuple[ConditionStatus, Reason, str]


class _ConditionBuilder:
    """Builder of the conditions that follow from one observation."""

    def __init__(self, adapter: AdapterDeployment, observation: AdapterObservation, revisions: list[Revision]) -> None:
        self.adapter = adapter
        self.observation = observation
        self.revisions = revisions
        self.serving = next((revision for revision in revisions if revision.ready_replicas > 0), None)

    def resolved(self) -> _ConditionState:
        taken = self.observation.lost_to
        if taken is not None:
            return (
                ConditionStatus.FALSE,
                Reason.MODEL_NAME_TAKEN,
                (
                    f"the model name {self.adapter.model} belongs to {taken.holder}, "
                    "which is older: choose another spec.modelName"
                ),
            )
        for part in (self.observation.artifact, self.observation.pool):
            if isinstance(part, Unresolved):
                serving = f"; revision {short(self.serving.digest)} keeps serving" if self.serving else ""
                return ConditionStatus.FALSE, part.reason, part.message + serving
        artifact, pool = self.observation.artifact, self.observation.pool
        assert isinstance(artifact, Artifact)  # noqa: S101 - the loop above returned otherwise
        assert isinstance(pool, ServingPool)  # noqa: S101
        return (
            ConditionStatus.TRUE,
            Reason.RESOLVED,
            (
                f"{artifact.origin}, revision {short(artifact.digest)}, on ServingPool "
                f"{pool.metadata.namespace}/{pool.metadata.name}"
            ),
        )

    def ready(self) -> _ConditionState:
        if self.serving is not None:
            newest = self.revisions[0]
            if newest is not self.serving and newest.state is RevisionState.FAILED:
                message = (
                    f"revision {short(self.serving.digest)} keeps serving, because "
                    f"{short(newest.digest)} cannot be loaded: {newest.message}"
                )
                return ConditionStatus.TRUE, Reason.PREVIOUS_REVISION, message
            if newest is not self.serving:
                message = f"revision {short(self.serving.digest)} serves until {short(newest.digest)} is resident"
                return ConditionStatus.TRUE, Reason.PREVIOUS_REVISION, message
            return (
                ConditionStatus.TRUE,
                Reason.RESIDENT,
                f"revision {short(newest.digest)} is resident on a ready pod and answers under {self.adapter.model}",
            )
        silent = [
            pod.name
            for pod in self.observation.pods
            if pod.ready
            and not pod.is_reporting
            and any(revision.engine_name in pod.resident for revision in self.revisions)
        ]
        if silent:
            return (
                ConditionStatus.UNKNOWN,
                Reason.AGENT_SILENT,
                f"the agent of pod {silent[0]} does not report, so it is unknown whether the pod holds the adapter",
            )
        _, reason, message = self._why_not_settled()
        return ConditionStatus.FALSE, reason, message

    def progressing(self) -> _ConditionState:
        newest = next(iter(self.revisions), None)
        if newest is not None and newest.ready_replicas >= self.observation.decision.replicas:
            message = f"revision {short(newest.digest)} is resident on {newest.ready_replicas} ready pods, as desired"
            return ConditionStatus.FALSE, Reason.SETTLED, message.replace(" 1 ready pods", " 1 ready pod")
        moving, reason, message = self._why_not_settled()
        return ConditionStatus.TRUE if moving else ConditionStatus.FALSE, reason, message

    def scaling(self) -> _ConditionState:
        if self.observation.unknown_demand is not None:
            message = f"{self.observation.unknown_demand}: no copy is removed"
            return ConditionStatus.FALSE, Reason.GATEWAY_SILENT, message
        return ConditionStatus.TRUE, Reason.DEMAND_KNOWN, "every gateway reports its requests"

    def phase(self) -> AdapterPhase:
        if self.serving is not None:
            return AdapterPhase.READY
        if self.observation.lost_to is not None or (self.revisions and self.revisions[0].state is RevisionState.FAILED):
            return AdapterPhase.FAILED
        return AdapterPhase.LOADING if self.revisions else AdapterPhase.WAITING

    def _why_not_settled(self) -> tuple[bool, Reason, str]:
        """Return True if progress is being made, and the reason why the newest revision is not resident everywhere."""
        _, reason, message = self.resolved()
        if not self.revisions:
            return False, reason, message
        newest = self.revisions[0]
        if newest.state is RevisionState.FAILED:
            if newest.parity is not None and newest.parity.verdict is not ParityVerdict.PASSED:
                return False, Reason.PARITY_FAILED, f"revision {short(newest.digest)} is not served: {newest.message}"
            return False, Reason.REVISION_FAILED, f"revision {short(newest.digest)} cannot be loaded: {newest.message}"
        if isinstance(self.observation.pool, Unresolved):
            return False, reason, message
        if newest.engine_name in self.observation.unplaced:
            return (
                True,
                Reason.POOL_FULL,
                (
                    f"no pod has room for revision {short(newest.digest)}: "
                    f"{self.observation.unplaced[newest.engine_name]}"
                ),
            )
        if not any(pod.answering for pod in self.observation.pods):
            pool = self.observation.pool
            return (
                True,
                Reason.POOL_NOT_READY,
                (f"no pod of ServingPool {pool.metadata.namespace}/{pool.metadata.name} is ready: see its conditions"),
            )
        if newest.base_model:
            return True, Reason.LOADING, f"the pods of the pool get revision {short(newest.digest)} as their base model"
        detail = f": {newest.message}" if newest.message else ""
        return True, Reason.LOADING, f"revision {short(newest.digest)} is being loaded{detail}"
