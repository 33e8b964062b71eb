"""The plan of a ServingPool: the adapters of its pods, the pods to remove, and its status."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tunesmith.api.adapterdeployment import RevisionState
from tunesmith.api.conditions import ConditionStatus, ServingPoolCondition, Severity
from tunesmith.api.conditions import ServingPoolReason as Reason
from tunesmith.api.image_volume import image_volume
from tunesmith.api.pool_base_model import PodBaseModel
from tunesmith.api.servingpool import MAX_LISTED_PODS, PodUsage, PoolPhase, ServingPoolStatus
from tunesmith.autoscale.schedule import unknown_time_zone
from tunesmith.contracts.agent import DesiredAdapter, PodUse, ResidencyState
from tunesmith.contracts.sentence import one_line
from tunesmith.contracts.transitions import conditions_of
from tunesmith.serving.adapter import copies_of, desired_copies
from tunesmith.serving.crashes import crash_status
from tunesmith.serving.placement import DesiredRevision, Placement, PlacementPod, is_evacuated, place, victims
from tunesmith.serving.pod import Problem, current_problem
from tunesmith.serving.render import selector_text
from tunesmith.serving.resolve import short
from tunesmith.serving.rolling import Rollout, RolloutHold, interruption

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from tunesmith.api.adapterdeployment import AdapterDeployment
    from tunesmith.api.autoscaling import PoolAutoscaling
    from tunesmith.api.servingpool import PoolRollback, ServingPool
    from tunesmith.autoscale.decide import Decision
    from tunesmith.contracts.claims import ModelNameClaim
    from tunesmith.contracts.refusal import Refusal
    from tunesmith.serving.pod import PoolPod
    from tunesmith.serving.trained_base import BaseModelProblem

_VICTIM_COST = -1000
_IMAGES = (
    "; for an oci:// base model the kubelet needs the feature gate ImageVolume, and a runtime that mounts images, such "
    "as containerd 2.1 or CRI-O 1.33"
)
_FINGERPRINT = re.compile(r"[a-z0-9]+:[0-9a-zA-Z]{1,96}")
_MAX_WAIT_WITH_OTHERS = timedelta(minutes=5)
"""Time after which a pod gets requests although an adapter is still being loaded, while other pods serve."""
_MAX_WAIT_ALONE = timedelta(seconds=30)
"""The same time if no other pod serves."""


@dataclass(frozen=True)
class PoolObservation:
    """Observed state from which a pool's plan is computed.

    `deployment`: as observed. `pods`: all pods of the pool, including stopping ones. `adapters`: attached
    AdapterDeployments, in order of precedence. `decision`: the desired pods. `spread`: see `placement.place`.
    `invalid`: reason why the spec cannot be rendered. `refusal`: refused write of one of the pool's objects.
    `unknown_demand`: reason why the demand is not completely known, None if it is. `rollout`: the pods compared with
    the desired template. `rollback`: record for the status. `hold`: reason why their replacement does not begin.
    `max_surge`: see `rolling.surge`. `running`: current number of requests for the pool's models, None if unknown.
    `busy`: engine names of adapters that are active much of the time. `base_problem`: reason why the FineTuneJob of the
    base model has no whole model now.
    """

    deployment: dict[str, Any] | None
    pods: Sequence[PoolPod]
    adapters: Sequence[AdapterDeployment]
    decision: Decision
    spread: bool = False
    lost_to: ModelNameClaim | None = None
    invalid: str | None = None
    refusal: Refusal | None = None
    unknown_demand: str | None = None
    rollout: Rollout = field(default_factory=lambda: Rollout(""))
    rollback: PoolRollback | None = None
    hold: RolloutHold | None = None
    max_surge: int = 0
    running: int | None = None
    busy: frozenset[str] = frozenset()
    base_problem: BaseModelProblem | None = None


@dataclass(frozen=True)
class PoolPlan:
    """Decisions about a pool.

    `replicas`: replicas of the Deployment. `assigned`: complete list of each pod's adapters, by pod name. `costs`:
    pod-deletion-cost to set, by pod name, so that the Deployment's controller deletes the pods that the plan chose.
    `gates`: readiness gates to set, by pod name. `unplaced`: reason why there is no room for copies, by engine name.
    """

    replicas: int
    assigned: Mapping[str, tuple[DesiredAdapter, ...]]
    costs: Mapping[str, int]
    gates: Mapping[str, bool]
    unplaced: Mapping[str, str]
    status: ServingPoolStatus


class PlacementCache:
    """Cache of the latest placement of a pool and its input.

    Decisions remain functions of their input; the cache only avoids computing them again for equal input.
    """

    def __init__(self) -> None:
        self._adapters: Sequence[AdapterDeployment] | None = None
        self._busy: frozenset[str] = frozenset()
        self._desired: tuple[dict[str, DesiredAdapter], list[DesiredRevision], list[DesiredAdapter]] = ({}, [], [])
        self._input: object = None
        self._output: tuple[Placement, frozenset[str]] = (Placement({}, {}), frozenset())
        self._assigned: Mapping[str, tuple[DesiredAdapter, ...]] = {}

    def desired(
        self, adapters: Sequence[AdapterDeployment], busy: frozenset[str]
    ) -> tuple[dict[str, DesiredAdapter], list[DesiredRevision], list[DesiredAdapter]]:
        """Return the adapters by engine name, the number of pods that each needs, and the whole models."""
        if self._adapters is not adapters or self._busy is not busy:
            self._desired = _desired_revisions(adapters, busy)
            self._adapters, self._busy = adapters, busy
        return self._desired

    def place(
        self, pool: ServingPool, observation: PoolObservation, living: Sequence[PoolPod]
    ) -> tuple[Placement, frozenset[str], Mapping[str, tuple[DesiredAdapter, ...]]]:
        """Return the placement, the pods to remove, and the complete list of each pod's adapters."""
        revisions, desired, bases = self.desired(observation.adapters, observation.busy)
        base_of = {pod.name: pod.base_artifact for pod in living}
        pods = tuple(
            (
                pod.name,
                pod.created,
                pod.ready,
                _counts_as_ready(pod),
                pod.present,
                pod.resident,
                _drains(pod),
                _is_marked(pod),
                pod.base_artifact,
            )
            for pod in living
        )
        engine = pool.spec.engine
        size = (observation.decision.replicas, observation.spread, engine.adapter_capacity, engine.max_loras)
        inputs = (pods, desired, revisions, bases, size, observation.rollout.outdated, observation.max_surge)
        if self._input != inputs:
            self._output = _placement(pool, observation, living, desired)
            self._assigned = {
                name: self._list(
                    name, [*(revisions[key] for key in keys), *(base for base in bases if base.digest == base_of[name])]
                )
                for name, keys in self._output[0].pods.items()
            }
            self._input = inputs
        return *self._output, self._assigned

    def _list(self, pod: str, adapters: Sequence[DesiredAdapter]) -> tuple[DesiredAdapter, ...]:
        """Return the complete list of a pod: the same tuple while it is equal, so that comparisons are cheap."""
        new = tuple(adapters)
        old = self._assigned.get(pod)
        return old if old is not None and old == new else new


def plan(
    pool: ServingPool, observation: PoolObservation, now: datetime, cache: PlacementCache | None = None
) -> PoolPlan:
    """Return all decisions about a pool. `cache`: cache of earlier calls for the pool."""
    living = [pod for pod in observation.pods if not pod.stopping]
    placement, leaving, assigned = (cache or PlacementCache()).place(pool, observation, living)
    costs = {pod.name: _VICTIM_COST if pod.name in leaving else 0 for pod in living}
    current = _replicas(observation.deployment)
    is_marked = all(_is_marked(pod) for pod in living if pod.name in leaving)
    is_empty = is_evacuated(
        placement, [PlacementPod(pod.name, ready=pod.ready, victim=pod.name in leaving) for pod in living]
    )
    # During an update a new pod becomes ready only when outdated pods can be spared: the Deployment's controller then
    # removes one.
    may_open = not observation.rollout.outdated or _is_covered(placement, living, leaving)
    shrinks = current is not None and observation.decision.replicas < current
    replicas = (
        current if shrinks and not (is_marked and is_empty) and current is not None else observation.decision.replicas
    )
    return PoolPlan(
        replicas=replicas,
        assigned=assigned,
        costs={pod.name: costs[pod.name] for pod in living if (pod.deletion_cost or "0") != str(costs[pod.name])},
        gates={
            pod.name: gate
            for pod in living
            if (gate := _gate(pod, _awaited(assigned[pod.name], placement), living, now, may_open=may_open))
            is not pod.gate
            and gate is not None
        },
        unplaced={entry.revision: entry.reason for entry in placement.unplaced},
        status=_status(pool, observation, living, placement, now),
    )


def _desired_revisions(
    adapters: Sequence[AdapterDeployment], busy: frozenset[str]
) -> tuple[dict[str, DesiredAdapter], list[DesiredRevision], list[DesiredAdapter]]:
    """Return the adapters by engine name, the number of pods that each needs, in order of precedence, and whole models.

    A whole model needs no room: each pod whose base model it is answers under its name.
    """
    revisions: dict[str, DesiredAdapter] = {}
    desired: list[DesiredRevision] = []
    bases: list[DesiredAdapter] = []
    for adapter in adapters:
        bases += [
            DesiredAdapter(engine_name=revision.engine_name, digest=revision.digest, uri=revision.uri or "")
            for revision in adapter.status.revisions
            if revision.base_model
        ]
        for revision, copies in desired_copies(adapter.status.revisions, copies_of(adapter)):
            if revision.engine_name not in revisions and revision.uri is not None and not revision.base_model:
                revisions[revision.engine_name] = DesiredAdapter(
                    engine_name=revision.engine_name,
                    digest=revision.digest,
                    uri=revision.uri,
                    parity=adapter.spec.parity,
                )
                desired.append(
                    DesiredRevision(
                        revision.engine_name,
                        copies,
                        best_effort=revision.state is RevisionState.FAILED,
                        busy=revision.engine_name in busy,
                    )
                )
    return revisions, desired, bases


def _placement(
    pool: ServingPool, observation: PoolObservation, living: Sequence[PoolPod], desired: Sequence[DesiredRevision]
) -> tuple[Placement, frozenset[str]]:
    ages = {pod.name: rank for rank, pod in enumerate(sorted(living, key=lambda pod: (pod.created, pod.name)))}

    def pods(leaving: frozenset[str]) -> list[PlacementPod]:
        return [
            PlacementPod(
                pod.name,
                ready=_counts_as_ready(pod),
                reachable=pod.ready,
                age_rank=ages[pod.name],
                present=pod.present,
                resident=pod.resident,
                victim=pod.name in leaving,
                outdated=pod.name in observation.rollout.outdated,
            )
            for pod in living
        ]

    # A draining pod is leaving, regardless of its other state.
    draining = frozenset(pod.name for pod in living if _drains(pod))
    capacity, slots = pool.spec.engine.adapter_capacity, pool.spec.engine.max_loras
    candidates = pods(draining)
    undisturbed = place(desired, candidates, capacity)
    marked = {pod.name for pod in living if _is_marked(pod)}
    # Prefer pods that were chosen before, so that consecutive passes remove the same pods.
    counts = {name: -1 if name in marked else len(keys) for name, keys in undisturbed.pods.items()}
    staying = [pod for pod in candidates if not pod.victim]
    leaving = draining | victims(staying, observation.decision.replicas, counts)
    placement = place(desired, pods(leaving), capacity, slots=slots, spread=observation.spread)
    next_pod = _next_to_be_replaced(observation, staying, leaving, counts)
    if next_pod is None:
        return placement, leaving
    # Without a surge pod, the next pod is emptied while the previous one's replacement starts, if others have room.
    with_next = place(desired, pods(leaving | {next_pod}), capacity, slots=slots, spread=observation.spread)
    fits = sum(entry.copies for entry in with_next.unplaced) <= sum(entry.copies for entry in placement.unplaced)
    return (with_next, leaving | {next_pod}) if fits else (placement, leaving)


def _next_to_be_replaced(
    observation: PoolObservation, staying: Sequence[PlacementPod], leaving: frozenset[str], counts: Mapping[str, int]
) -> str | None:
    outdated = [pod for pod in staying if pod.outdated and pod.name not in leaving]
    if observation.max_surge or leaving or len(outdated) == len(staying):
        return None
    return min(outdated, key=lambda pod: (pod.ready, counts.get(pod.name, 0), pod.name)).name if outdated else None


def _drains(pod: PoolPod) -> bool:
    return pod.state is not None and pod.state.draining


def _is_marked(pod: PoolPod) -> bool:
    return pod.deletion_cost == str(_VICTIM_COST)


def _counts_as_ready(pod: PoolPod) -> bool:
    """Return True if the pod keeps its copies: its engine is up, or its agent is silent but the pod ready.

    A stalled engine keeps them too: loading them elsewhere would burden the pods that get its requests.
    """
    return pod.engine_up or (pod.ready and not pod.is_reporting)


def _replicas(deployment: Mapping[str, Any] | None) -> int | None:
    return None if deployment is None else int(deployment["spec"].get("replicas", 1))


def _awaited(assigned: Sequence[DesiredAdapter], placement: Placement) -> list[DesiredAdapter]:
    """Return the adapters that a pod must load before it gets requests."""
    return [adapter for adapter in assigned if adapter.engine_name not in placement.best_effort]


def _gate(
    pod: PoolPod, assigned: Sequence[DesiredAdapter], living: Sequence[PoolPod], now: datetime, *, may_open: bool
) -> bool | None:
    """Return the desired state of the readiness gate; None to leave it unchanged.

    An open gate stays open while the engine is up, so that loading an adapter does not interrupt the others. An adapter
    that cannot be loaded must not delay the others for long either. `may_open`: True if every adapter of the pods to
    remove is resident elsewhere.
    """
    if not pod.is_reporting or pod.state is None:
        return None
    if not pod.state.engine_ready or pod.state.problem:
        return False
    if pod.gate:
        return True
    others = [other for other in living if other is not pod and other.serving]
    since = pod.containers_ready_since
    if since is not None and now - since >= (_MAX_WAIT_WITH_OTHERS if others else _MAX_WAIT_ALONE):
        return True
    return may_open and all(_needs_no_wait(pod, adapter, others) for adapter in assigned)


def _is_covered(placement: Placement, living: Sequence[PoolPod], leaving: frozenset[str]) -> bool:
    """Return True if every revision that pods to remove still hold is resident on a pod that stays."""
    staying = [pod for pod in living if pod.name not in leaving and pod.answering]
    kept = {key for name in leaving for key in placement.pods.get(name, ())}
    return all(any(key in pod.resident for pod in staying) for key in kept)


def _needs_no_wait(pod: PoolPod, adapter: DesiredAdapter, others: Sequence[PoolPod]) -> bool:
    """Return True if the adapter is resident, or failed on this pod and is resident on no other."""
    entry = pod.residency(adapter.engine_name)
    if entry is None:
        return False
    if entry.state is ResidencyState.FAILED:
        return entry.permanent or not any(adapter.engine_name in other.resident for other in others)
    return entry.state is ResidencyState.RESIDENT


def _status(
    pool: ServingPool, observation: PoolObservation, living: Sequence[PoolPod], placement: Placement, now: datetime
) -> ServingPoolStatus:
    ready = sum(1 for pod in living if pod.serving)
    used = sum(len(frozenset(keys) - placement.best_effort) for keys in placement.pods.values())
    fingerprint, differing = _fingerprint(pool, living, observation.rollout.outdated)
    problem = _first_problem(pool, observation, living, ready, now)
    conditions = {
        ServingPoolCondition.AVAILABLE: _available(pool, observation, ready, living, problem),
        ServingPoolCondition.PROGRESSING: _progressing(pool, observation, ready, living),
        ServingPoolCondition.DEGRADED: _degraded(pool, observation, living, problem, differing),
        ServingPoolCondition.UPDATED: _updated(pool, observation, living),
    }
    if pool.base_job is not None:
        conditions[ServingPoolCondition.RESOLVED] = _resolved(pool, observation)
    if pool.spec.autoscaling is not None:
        conditions[ServingPoolCondition.SCALING_ACTIVE] = _scaling(pool.spec.autoscaling, observation)
    phase, decisive = _phase(conditions)
    old = pool.status
    # The reason explains the choice of this size; it is not rewritten with every request.
    is_same_size = (old.desired_replicas, old.observed_generation) == (
        observation.decision.replicas,
        pool.metadata.generation,
    )
    return ServingPoolStatus(
        phase=phase,
        reason=conditions[decisive][1],
        conditions=conditions_of(pool.status.conditions, conditions, pool.metadata.generation, now),
        observed_generation=pool.metadata.generation,
        base_model_fingerprint=fingerprint,
        base_model=_base_model(pool, living),
        base_model_artifact=pool.status.base_model_artifact if pool.base_job is not None else None,
        desired_replicas=observation.decision.replicas,
        desired_reason=old.desired_reason
        if is_same_size and old.desired_reason
        else one_line(observation.decision.reason, 1024),
        replicas=len(living),
        ready_replicas=ready,
        adapters=len(observation.adapters),
        ready=f"{ready}/{observation.decision.replicas}",
        registered_adapters=used,
        adapter_capacity=len(living) * pool.spec.engine.adapter_capacity,
        active_adapters=sum(len(pod.active) for pod in living),
        adapter_slots=len(living) * pool.spec.engine.max_loras,
        pods=[_usage(pod) for pod in sorted(living, key=lambda pod: pod.name)[:MAX_LISTED_PODS]],
        selector=selector_text(pool),
        rollback=observation.rollback,
        **crash_status(old, living, now),
    )


def _usage(pod: PoolPod) -> PodUsage:
    use = PodUse() if pod.state is None else pod.state.use
    return PodUsage(
        name=pod.name,
        registered=len(pod.resident),
        active=len(pod.active),
        waiting=use.waiting,
        disk_bytes=use.disk_bytes,
        disk_limit_bytes=use.disk_limit_bytes,
        memory_bytes=use.memory_bytes,
        memory_limit_bytes=use.memory_limit_bytes,
        reloads=use.reloads,
    )


_ConditionState = tuple[ConditionStatus, Reason, str]
_TRUE, _FALSE, _UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN


def _phase(conditions: Mapping[ServingPoolCondition, _ConditionState]) -> tuple[PoolPhase, ServingPoolCondition]:
    """Return the phase and the condition from which it is derived."""
    if conditions[ServingPoolCondition.DEGRADED][0] is _TRUE:
        return PoolPhase.DEGRADED, ServingPoolCondition.DEGRADED
    available = conditions[ServingPoolCondition.AVAILABLE][0] is _TRUE
    return PoolPhase.AVAILABLE if available else PoolPhase.PENDING, ServingPoolCondition.AVAILABLE


def _available(
    pool: ServingPool, observation: PoolObservation, ready: int, living: Sequence[PoolPod], problem: Problem | None
) -> _ConditionState:
    desired = max(observation.decision.replicas, len(living))
    if any(pod.serving and pod.is_reporting for pod in living):
        return _TRUE, Reason.PODS_READY, f"{ready} of {desired} pods ready"
    if ready:
        message = problem.message if problem else "their agents do not report"
        return _UNKNOWN, Reason.AGENT_SILENT, f"{ready} of {desired} pods are ready in Kubernetes; {message}"
    if (blocked := _blocked(pool, observation)) is not None:
        return _FALSE, *blocked
    if observation.decision.replicas == 0:
        idle = pool.spec.autoscaling is not None
        message = "no request: the next one starts a pod" if idle else "replicas is 0: raise it to serve"
        return _FALSE, Reason.SCALED_TO_ZERO, message
    if problem is not None:
        return _FALSE, problem.reason, problem.message
    return _FALSE, Reason.NO_POD_READY, f"0 of {observation.decision.replicas} pods ready"


def _blocked(pool: ServingPool, observation: PoolObservation) -> tuple[Reason, str] | None:
    """Return why the pool's objects cannot be written; None if they can."""
    if (refused := _refused(observation)) is not None:
        return refused
    problem = observation.base_problem
    return None if problem is None or pool.spec.base_model.uri is not None else (problem.reason, problem.message)


def _refused(observation: PoolObservation) -> tuple[Reason, str] | None:
    """Return why the spec, or a write of one of the pool's objects, is refused; None if it is not."""
    if observation.invalid is not None:
        return Reason.INVALID_SPEC, observation.invalid
    if observation.refusal is not None:
        return Reason.WRITE_REFUSED, observation.refusal.sentence
    return None


def _progressing(
    pool: ServingPool, observation: PoolObservation, ready: int, living: Sequence[PoolPod]
) -> _ConditionState:
    desired = observation.decision.replicas
    status = (observation.deployment or {}).get("status") or {}
    if (blocked := _blocked(pool, observation)) is not None:
        return _FALSE, *blocked
    if (failure := _update_failure(observation.rollout)) is not None:
        return _FALSE, Reason.UPDATE_FAILED, failure
    if observation.deployment is not None and status.get("updatedReplicas", 0) < min(
        desired, status.get("replicas", 0)
    ):
        updated = status.get("updatedReplicas", 0)
        return _TRUE, Reason.ROLLING_OUT, f"{updated} of {desired} pods have the current settings"
    if ready < desired or len(living) != desired:
        return _TRUE, Reason.SCALING, f"{ready} of {desired} desired pods ready, {len(living)} exist"
    return _FALSE, Reason.SETTLED, f"{desired} pod{'' if desired == 1 else 's'}, as desired"


def _degraded(
    pool: ServingPool,
    observation: PoolObservation,
    living: Sequence[PoolPod],
    problem: Problem | None,
    differing: str | None,
) -> _ConditionState:
    silent = next((pod.name for pod in living if pod.ready and not pod.is_reporting), None)
    sentences: list[tuple[Reason, str | None]] = [
        _refused(observation) or (Reason.AS_EXPECTED, None),
        _severe(observation.base_problem) or (Reason.AS_EXPECTED, None),
        (Reason.PODS_REFUSED, refusal_of_pods(observation.deployment)),
        (Reason.AS_EXPECTED, None) if problem is None else (problem.reason, problem.message),
        (Reason.FINGERPRINTS_DIFFER, differing),
        (Reason.MODEL_NAME_TAKEN, _taken(pool, observation.lost_to)),
        (
            Reason.AGENT_SILENT,
            None
            if silent is None
            else f"the agent of pod {silent} does not report, so the adapters of the pod are unknown",
        ),
    ]
    return next(
        ((_TRUE, reason, message) for reason, message in sentences if message),
        (_FALSE, Reason.AS_EXPECTED, "no pod reports a problem"),
    )


def _severe(problem: BaseModelProblem | None) -> tuple[Reason, str] | None:
    """Return a problem that needs action: a FineTuneJob that does not exist yet, or runs, needs none."""
    if problem is None or problem.reason.severity is not Severity.WARNING:
        return None
    return problem.reason, problem.message


def _resolved(pool: ServingPool, observation: PoolObservation) -> _ConditionState:
    """Return the condition of the FineTuneJob that the base model comes from."""
    artifact, problem = pool.status.base_model_artifact, observation.base_problem
    if observation.invalid is not None or artifact is None or problem is not None:
        reason, message = (
            (Reason.INVALID_SPEC, observation.invalid or "") if problem is None else (problem.reason, problem.message)
        )
        return _FALSE, reason, message
    return _TRUE, Reason.RESOLVED, f"{pool.spec.base_model.origin}, artifact {short(artifact.digest)}"


def _taken(pool: ServingPool, by: ModelNameClaim | None) -> str | None:
    if by is None:
        return None
    return (
        f"the model name {pool.model} belongs to {by.holder}, which is older: the base model cannot be called by this "
        "name"
    )


def _updated(pool: ServingPool, observation: PoolObservation, living: Sequence[PoolPod]) -> _ConditionState:
    rollout = observation.rollout
    if (blocked := _blocked(pool, observation)) is not None:
        return _FALSE, *blocked
    if observation.hold is not None:
        reason = Reason.UPDATE_BLOCKED if observation.hold.failed else Reason.UPDATE_PENDING
        impact = interruption(
            pool, living, frozenset(pod.name for pod in living), observation.max_surge, observation.running
        )
        message = (
            f"the installation changed, and the pods have to be replaced: {observation.hold.message}. When the "
            f"replacement begins, {impact}"
        )
        return _FALSE, reason, message
    if rollout.change is not None:
        impact = interruption(
            pool, living, frozenset(pod.name for pod in living), observation.max_surge, observation.running
        )
        return _FALSE, Reason.ROLLING_OUT, f"the pods are being replaced: {impact}"
    if (failure := _update_failure(rollout)) is not None:
        return _FALSE, Reason.UPDATE_FAILED, failure
    if rollout.outdated:
        impact = interruption(pool, living, rollout.outdated, observation.max_surge, observation.running)
        current = len(living) - len(rollout.outdated)
        return _FALSE, Reason.ROLLING_OUT, f"{current} of {len(living)} pods have the current settings: {impact}"
    if observation.rollback is not None and observation.rollback.rejected_spec is not None:
        message = f"{observation.rollback.reason}; the pods have the previous settings again, until the spec changes"
        return _FALSE, Reason.ROLLED_BACK, message
    return _TRUE, Reason.PODS_CURRENT, "every pod has the current settings"


def _update_failure(rollout: Rollout) -> str | None:
    """Return a sentence about pods that fail with the current settings; None if none does."""
    if rollout.failure is None or not rollout.unfinished:
        return None
    count = len(rollout.outdated)
    kept = f"; {count} pod{'' if count == 1 else 's'} with the previous settings keep{'s' * (count == 1)} running"
    return f"{rollout.failure}{kept if count else ''}"


def _scaling(rule: PoolAutoscaling, observation: PoolObservation) -> _ConditionState:
    if (unknown := unknown_time_zone(rule)) is not None:
        return _FALSE, Reason.INVALID_SCHEDULE, unknown
    if observation.unknown_demand is not None:
        return _FALSE, Reason.GATEWAY_SILENT, f"{observation.unknown_demand}: no pod is removed"
    return _TRUE, Reason.DEMAND_KNOWN, "every gateway reports its requests"


def _first_problem(
    pool: ServingPool, observation: PoolObservation, living: Sequence[PoolPod], ready: int, now: datetime
) -> Problem | None:
    """Return the first pod's problem, with the number of other pods that have one.

    Pods that finished count while there are too few ready ones.
    """
    finished = [pod for pod in observation.pods if pod.stopping] if ready < observation.decision.replicas else []
    found = [(pod, problem) for pod in (*living, *finished) if (problem := current_problem(pod, now)) is not None]
    if not found:
        return None
    pod, problem = found[0]
    more = len(found) - 1
    others = f"; {more} more pod{' reports a problem' if more == 1 else 's report problems'}" if more else ""
    needs_images = (
        problem.reason is Reason.VOLUMES_NOT_MOUNTED and image_volume(pool.spec.base_model.uri or "") is not None
    )
    return Problem(problem.reason, f"pod {pod.name}: {problem.message}{_IMAGES if needs_images else ''}{others}")


def refusal_of_pods(deployment: Mapping[str, Any] | None) -> str | None:
    """Return the reason why the API server refuses the Deployment's pods, as a sentence; None if it does not."""
    conditions = ((deployment or {}).get("status") or {}).get("conditions") or ()
    return next(
        (
            f"the API server refuses the pods: {condition.get('message') or condition['type']}"
            for condition in conditions
            if condition["type"] == "ReplicaFailure" and condition["status"] == "True"
        ),
        None,
    )


def _base_model(pool: ServingPool, living: Sequence[PoolPod]) -> PodBaseModel | None:
    """Return the arrival of the base model on the newest pod that has it, else the last one that was known."""
    arrivals = [(pod.created, pod.name, pod.base_model) for pod in living if pod.base_model is not None]
    if not arrivals:
        return pool.status.base_model
    _, name, arrival = max(arrivals, key=lambda entry: entry[:2])
    return PodBaseModel(pod=name, **arrival.model_dump())


def _fingerprint(
    pool: ServingPool, living: Sequence[PoolPod], outdated: frozenset[str]
) -> tuple[str | None, str | None]:
    """Return the base's fingerprint, and a sentence if the pods report different ones.

    While the pods get a newer artifact of their FineTuneJob, the outdated ones have another fingerprint.
    """
    known = pool.status.base_model_fingerprint
    compared = [pod for pod in living if pool.base_job is None or pod.name not in outdated]
    reported = {
        pod.name: pod.state.base_model_fingerprint
        for pod in compared
        if pod.state is not None
        and pod.state.base_model_fingerprint is not None
        and _FINGERPRINT.fullmatch(pod.state.base_model_fingerprint)
    }
    values = sorted(set(reported.values()))
    if len(values) > 1:
        return (
            known if known in values else values[0],
            (
                f"the pods fetched different contents of {pool.spec.base_model.uri}: "
                f"delete the pods {', '.join(sorted(reported)[:8])}"
            ),
        )
    return (values[0] if values else known), None
