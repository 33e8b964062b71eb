"""The status of an AdapterDeployment: its revisions, their states, and the reasons why it is not ready.

A new artifact becomes a revision beside the serving one. The old revision stays until the new one takes over, see
`rollout`, and keeps serving if the new one cannot be loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tunesmith.api.adapterdeployment import (
    AdapterDeploymentStatus,
    AdapterPhase,
    PoolReference,
    Revision,
    RevisionPod,
    RevisionState,
)
from tunesmith.api.conditions import AdapterDeploymentCondition, ConditionStatus, Severity
from tunesmith.api.conditions import AdapterDeploymentReason as Reason
from tunesmith.api.parity import ParityVerdict
from tunesmith.api.rollout import RolloutPhase
from tunesmith.api.servingpool import MAX_LISTED_PODS, ServingPool
from tunesmith.autoscale.schedule import unknown_time_zone
from tunesmith.contracts.agent import ResidencyState
from tunesmith.contracts.location import engine_name
from tunesmith.contracts.sentence import one_line
from tunesmith.contracts.transitions import conditions_of
from tunesmith.serving.analysis import Evidence, PodMeasure
from tunesmith.serving.parity import parity_condition, shown_parity, worst_parity
from tunesmith.serving.resolve import Artifact, Unresolved, has_base_of, reference, short
from tunesmith.serving.rollout import RolloutObservation, in_order, next_rollout, spec_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from tunesmith.api.adapterdeployment import AdapterDeployment, AdapterImport
    from tunesmith.api.autoscaling import AdapterAutoscaling
    from tunesmith.autoscale.decide import Decision
    from tunesmith.contracts.claims import ModelNameClaim
    from tunesmith.contracts.traffic import Comparison
    from tunesmith.serving.analysis import QueryResult
    from tunesmith.serving.pod import PoolPod
    from tunesmith.serving.rollout import RolloutPlan

SELECTOR = "tunesmith.dev/none=pods-are-shared"
NO_PROMETHEUS = (
    "the installation names no Prometheus: ask the platform's engineers to set the chart's value prometheus.url"
)
_MAX_MESSAGE_LENGTH = 2000
_WAS_RESIDENT = frozenset({RevisionState.RESIDENT, RevisionState.IDLE})
_IN_PROGRESS = (ResidencyState.DOWNLOADING, ResidencyState.LOADING)


@dataclass(frozen=True)
class AdapterObservation:
    """Observed state from which an AdapterDeployment's status is computed.

    `lost_to`: older claim that holds the model name, None if this adapter holds it. `pods`: pods of the chosen pool, or
    of the one that keeps serving. `unplaced`: reason why there is no room for copies, by engine name. `decision`:
    number of desired copies. `imported`: record of the import of its source. `unknown_demand`: reason why the demand is
    not completely known, None if it is. `queries`: results of the PromQL expressions of `spec.rollout.analysis`.
    `no_queries`: reason why none are evaluated; empty if they are. `comparisons`: comparisons of shadows, of each
    gateway, by engine name.
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
    queries: Mapping[str, QueryResult] = field(default_factory=dict)
    no_queries: str = NO_PROMETHEUS
    comparisons: Mapping[str, Sequence[Comparison]] = field(default_factory=dict)


def plan(adapter: AdapterDeployment, observation: AdapterObservation, now: datetime) -> AdapterDeploymentStatus:
    """Compute the whole status."""
    rolled = _rolled(adapter, observation, now)
    builder = _ConditionBuilder(adapter, observation, rolled)
    conditions = {
        AdapterDeploymentCondition.RESOLVED: builder.resolved(),
        AdapterDeploymentCondition.READY: builder.ready(),
        AdapterDeploymentCondition.PROGRESSING: builder.progressing(),
    }
    conditions |= kstatus_conditions(conditions)
    newest = next(iter(builder.revisions), None)
    parity = parity_condition(adapter.spec.parity, newest)
    if parity is not None:
        conditions[AdapterDeploymentCondition.PARITY] = parity
    if adapter.spec.autoscaling is not None:
        conditions[AdapterDeploymentCondition.SCALING_ACTIVE] = builder.scaling(adapter.spec.autoscaling)
    holders = [
        pod
        for pod in pods_about(observation.pods, builder.revisions)
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
        revisions=list(rolled.revisions),
        rollout=rolled.rollout,
        rollout_spec=spec_digest(adapter.spec),
        rollout_command=rolled.command,
        rejected_digests=list(rolled.rejected),
        previous_revision=rolled.previous,
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


def copies_of(adapter: AdapterDeployment) -> int:
    """Return the desired number of copies; 1 for a new AdapterDeployment."""
    desired = adapter.status.desired_replicas
    return 1 if desired is None else desired


def was_never_loaded(adapter: AdapterDeployment) -> bool:
    """Return True if no pod has held the newest revision yet, and it is not known to fail."""
    revisions = adapter.status.revisions
    return not revisions or revisions[0].state in {RevisionState.PENDING, RevisionState.LOADING}


def desired_copies(revisions: Sequence[Revision], desired: int) -> list[tuple[Revision, int]]:
    """Return each revision with the number of pods that should hold it, serving revisions first.

    During a rollout the status has these numbers. A revision that failed permanently is tried on one pod if it has
    room, since a newer pod may be able to load it.
    """
    if not revisions or desired == 0:
        return [(revision, 0) for revision in revisions]
    newest, older = revisions[0], revisions[1:]
    if newest.weight is not None:
        return [(revision, revision.desired_replicas or desired) for revision in (*older, newest)]
    if newest.state is RevisionState.FAILED:
        return [*((revision, desired) for revision in older), (newest, 1)]
    return [*((revision, max(1, min(desired, revision.ready_replicas))) for revision in older), (newest, desired)]


def copies_of_rollouts(adapters: Iterable[AdapterDeployment]) -> dict[str, int]:
    """Return the copies of the revisions that are being rolled out, by engine name. They need additional room."""
    return {
        revision.engine_name: revision.desired_replicas
        for adapter in adapters
        for revision in adapter.status.revisions[:1]
        if revision.weight is not None and revision.desired_replicas and copies_of(adapter)
    }


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


def _rolled(adapter: AdapterDeployment, observation: AdapterObservation, now: datetime) -> RolloutPlan:
    """Return the revisions, and the state of their rollout."""
    observed, source = _observed_revisions(adapter, observation)
    found = RolloutObservation(
        revisions=observed,
        from_source=source is not None and bool(observed) and observed[0].digest == source,
        copies=observation.decision.replicas,
        answering=sum(1 for pod in observation.pods if pod.answering),
        evidence=_evidence(adapter, observed[0], observation) if observed else Evidence(),
    )
    return next_rollout(adapter, found, now)


def _observed_revisions(
    adapter: AdapterDeployment, observation: AdapterObservation
) -> tuple[list[Revision], str | None]:
    """Return the revisions, the one that should serve first, and the digest of the source; None if it is not known."""
    if observation.lost_to is not None:
        return [], None
    prefix = f"{adapter.model}@"
    known = [revision for revision in adapter.status.revisions if revision.engine_name.startswith(prefix)]
    source = None
    if isinstance(observation.artifact, Artifact) and isinstance(observation.pool, ServingPool):
        namespace, _, model_name = adapter.model.partition("/")
        artifact = observation.artifact
        whole = artifact.whole if is_base(adapter, artifact, observation.pool) else None
        source = Revision(
            digest=artifact.digest,
            uri=artifact.uri if whole is None else whole.uri,
            base_model=True if whole is not None else None,
            engine_name=engine_name(namespace, model_name, artifact.digest),
            state=RevisionState.PENDING,
        )
        previous = next((revision for revision in known if revision.engine_name == source.engine_name), None)
        if previous is not None and previous.state is RevisionState.FAILED and _is_unchanged(adapter, observation.pool):
            source = previous.model_copy(update={"uri": source.uri})
        elif previous is not None and previous.state in _WAS_RESIDENT:
            source = source.model_copy(update={"state": previous.state})
    ordered = in_order(adapter, source, known)
    pods = pods_about(observation.pods, ordered)
    observed = [_observed(revision, observation, pods) for revision in ordered]
    return observed, source.digest if source is not None else None


def pods_about(pods: Sequence[PoolPod], revisions: Iterable[Revision]) -> list[PoolPod]:
    """Return the pods whose agents report one of the revisions; the other pods of a large pool say nothing of them."""
    names = frozenset(revision.engine_name for revision in revisions)
    return [pod for pod in pods if not names.isdisjoint(pod.reported)]


def _evidence(adapter: AdapterDeployment, revision: Revision, observation: AdapterObservation) -> Evidence:
    """Return the facts about a revision that decide about its rollout."""
    rollout = adapter.status.rollout
    # A pod that counted before is expected to report, although a restarted operator does not know what it holds.
    counted = {pod.uid for pod in rollout.pods} if rollout is not None and rollout.digest == revision.digest else set()
    pods = []
    for pod in observation.pods:
        if pod.stopping or (revision.engine_name not in pod.reported and pod.uid not in counted):
            continue
        traffic = pod.traffic(revision.engine_name)
        is_counting = traffic is not None and bool(traffic.start)
        if revision.engine_name in pod.resident or is_counting or pod.uid in counted:
            pods.append(PodMeasure(pod.uid, pod.name, traffic))
    missed = observation.artifact.missed_gates if isinstance(observation.artifact, Artifact) else None
    comparisons = observation.comparisons.get(revision.engine_name, ())
    return Evidence(pods, revision.parity, missed, observation.queries, observation.no_queries, comparisons)


def _is_unchanged(adapter: AdapterDeployment, pool: ServingPool) -> bool:
    """Return True if neither the spec nor the pool has changed since the status was written."""
    status = adapter.status
    return status.observed_generation == adapter.metadata.generation and status.pool == reference(pool)


def _observed(revision: Revision, observation: AdapterObservation, pods: Sequence[PoolPod]) -> Revision:
    found = [
        (pod, entry) for pod in pods if not pod.stopping and (entry := pod.residency(revision.engine_name)) is not None
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
    if observation.decision.replicas == 0 and revision.state in _WAS_RESIDENT:
        state = RevisionState.IDLE
    elif resident:
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
_STALLED = frozenset(
    reason
    for reason in Reason
    if reason.severity is Severity.WARNING and reason not in (Reason.AGENT_SILENT, Reason.GATEWAY_SILENT)
)
"""Reasons that last until somebody changes something."""


def kstatus_conditions(
    conditions: Mapping[AdapterDeploymentCondition, _ConditionState],
) -> dict[AdapterDeploymentCondition, _ConditionState]:
    """Return the conditions by which kstatus, and so Flux and Argo CD, recognises progress and failure.

    They exist only while they are True (https://github.com/kubernetes-sigs/cli-utils, pkg/kstatus).
    """
    status, reason, message = conditions[AdapterDeploymentCondition.PROGRESSING]
    if status is ConditionStatus.TRUE:
        return {AdapterDeploymentCondition.RECONCILING: (status, reason, message)}
    for type_ in (AdapterDeploymentCondition.RESOLVED, AdapterDeploymentCondition.PROGRESSING):
        status, reason, message = conditions[type_]
        if status is ConditionStatus.FALSE and reason in _STALLED:
            return {AdapterDeploymentCondition.STALLED: (ConditionStatus.TRUE, reason, message)}
    return {}


class _ConditionBuilder:
    """Builder of the conditions that follow from one observation."""

    def __init__(self, adapter: AdapterDeployment, observation: AdapterObservation, rolled: RolloutPlan) -> None:
        self.adapter = adapter
        self.observation = observation
        self.revisions = rolled.revisions
        self.rolled = rolled
        self.serving = next((revision for revision in self.revisions if revision.ready_replicas > 0), None)
        self.idle = next((revision for revision in self.revisions if revision.state is RevisionState.IDLE), None)

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
        if self.idle is not None:
            message = f"no request: the next one waits until revision {short(self.idle.digest)} is on a pod again"
            return ConditionStatus.TRUE, Reason.SCALED_TO_ZERO, message
        if self.serving is not None:
            newest = self.revisions[0]
            if newest.weight is not None:
                return ConditionStatus.TRUE, Reason.ROLLING_OUT, self._shares()
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
            for pod in pods_about(self.observation.pods, self.revisions)
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
        newest, rollout = next(iter(self.revisions), None), self.rolled.rollout
        if newest is not None and newest.weight is not None and rollout is not None:
            reason = Reason.ROLLOUT_PAUSED if rollout.paused else Reason.ROLLING_OUT
            return ConditionStatus.TRUE, reason, rollout.message or self._shares()
        if self.idle is not None and newest is self.idle:
            return self._given_up() or (ConditionStatus.FALSE, Reason.SETTLED, "no request: the adapter needs no pod")
        if newest is not None and newest.ready_replicas >= self.observation.decision.replicas:
            given_up = self._given_up()
            if given_up is not None:
                return given_up
            message = f"revision {short(newest.digest)} is resident on {newest.ready_replicas} ready pods, as desired"
            return ConditionStatus.FALSE, Reason.SETTLED, message.replace(" 1 ready pods", " 1 ready pod")
        moving, reason, message = self._why_not_settled()
        return ConditionStatus.TRUE if moving else ConditionStatus.FALSE, reason, message

    def _shares(self) -> str:
        """Return the shares of the requests that the revisions answer during a rollout."""
        shares = [f"revision {short(item.digest)} answers {item.weight} %" for item in self.revisions if item.weight]
        shadows = [
            f"revision {short(item.digest)} also gets {item.shadow_percent} % for comparison"
            for item in self.revisions
            if item.shadow_percent
        ]
        return ", ".join([*shares, *shadows]) + " of the requests"

    def _given_up(self) -> _ConditionState | None:
        """Return the outcome if the source's revision was rolled back, aborted or undone; None otherwise."""
        artifact, rollout = self.observation.artifact, self.rolled.rollout
        if not isinstance(artifact, Artifact) or artifact.digest not in self.rolled.rejected:
            return None
        is_latest = rollout is not None and rollout.digest == artifact.digest
        message = (
            rollout.message
            if rollout is not None and is_latest
            else f"revision {short(artifact.digest)} was given up earlier: change the spec to try it again"
        )
        by_check = rollout is not None and is_latest and rollout.phase is RolloutPhase.ROLLED_BACK
        return ConditionStatus.FALSE, Reason.ROLLED_BACK if by_check else Reason.ROLLOUT_ABORTED, message

    def scaling(self, rule: AdapterAutoscaling) -> _ConditionState:
        if (unknown := unknown_time_zone(rule)) is not None:
            return ConditionStatus.FALSE, Reason.INVALID_SCHEDULE, unknown
        if self.observation.unknown_demand is not None:
            message = f"{self.observation.unknown_demand}: no copy is removed"
            return ConditionStatus.FALSE, Reason.GATEWAY_SILENT, message
        return ConditionStatus.TRUE, Reason.DEMAND_KNOWN, "every gateway reports its requests"

    def phase(self) -> AdapterPhase:
        if self.idle is not None:
            return AdapterPhase.IDLE
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
