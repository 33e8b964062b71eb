"""A ServingPool: what its pods should hold, which may leave, and its status."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tunesmith.api.conditions import Condition, ConditionStatus, ServingPoolCondition, set_condition
from tunesmith.api.conditions import ServingPoolReason as Reason
from tunesmith.api.servingpool import PoolPhase, ServingPoolStatus
from tunesmith.contracts.agent import DesiredAdapter, ResidencyState
from tunesmith.serving.placement import Placement, PlacementPod, Wanted, evacuated, place, victims
from tunesmith.serving.render import selector_text
from tunesmith.serving.rollout import wanted_copies

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from tunesmith.api.adapterdeployment import AdapterDeployment, Revision
    from tunesmith.api.servingpool import ServingPool
    from tunesmith.autoscale.decide import Decision
    from tunesmith.contracts.claims import Claim
    from tunesmith.serving.pod import PoolPod, Problem

_VICTIM_COST = -1000


@dataclass(frozen=True)
class PoolObservation:
    """What a pool is decided from.

    `deployment`: as the API server has it. `pods`: all of the pool's, stopping ones too. `adapters`: attached
    AdapterDeployments, in order of precedence. `decision`: the wanted pods. `spread`: see `placement.place`.
    `invalid`: why the spec cannot be rendered.
    """

    deployment: Mapping[str, Any] | None
    pods: Sequence[PoolPod]
    adapters: Sequence[AdapterDeployment]
    decision: Decision
    spread: bool = False
    lost_to: Claim | None = None
    invalid: str | None = None


@dataclass(frozen=True)
class PoolPlan:
    """What to do.

    `replicas`: of the Deployment. `assigned`: the whole list of each pod, by pod name. `costs`: pod-deletion-cost to
    set, by pod name: the Deployment's controller deletes the pods that were chosen here. `gates`: readiness gates to
    set, by pod name. `unplaced`: by engine name, why copies have no place.
    """

    replicas: int
    assigned: Mapping[str, tuple[DesiredAdapter, ...]]
    costs: Mapping[str, int]
    gates: Mapping[str, bool]
    unplaced: Mapping[str, str]
    status: ServingPoolStatus


def plan(pool: ServingPool, seen: PoolObservation, now: datetime) -> PoolPlan:
    """Everything about a pool at one moment."""
    living = [pod for pod in seen.pods if not pod.stopping]
    revisions, wanted = _wanted(seen.adapters)
    placement, leaving = _placement(pool, seen, living, wanted)
    assigned = {
        name: tuple(
            DesiredAdapter(engine_name=key, digest=revisions[key].digest, uri=revisions[key].uri or "") for key in keys
        )
        for name, keys in placement.pods.items()
    }
    costs = {pod.name: _VICTIM_COST if pod.name in leaving else 0 for pod in living}
    current = _replicas(seen.deployment)
    marked = all(pod.deletion_cost == str(_VICTIM_COST) for pod in living if pod.name in leaving)
    empty = evacuated(
        placement, [PlacementPod(pod.name, ready=pod.ready, victim=pod.name in leaving) for pod in living]
    )
    shrinks = current is not None and seen.decision.replicas < current
    replicas = current if shrinks and not (marked and empty) and current is not None else seen.decision.replicas
    return PoolPlan(
        replicas=replicas,
        assigned=assigned,
        costs={pod.name: costs[pod.name] for pod in living if int(pod.deletion_cost or 0) != costs[pod.name]},
        gates={
            pod.name: gate
            for pod in living
            if (gate := _gate(pod, assigned[pod.name])) is not pod.gate and gate is not None
        },
        unplaced={entry.revision: entry.reason for entry in placement.unplaced},
        status=_status(pool, seen, living, placement, now),
    )


def _wanted(adapters: Sequence[AdapterDeployment]) -> tuple[dict[str, Revision], list[Wanted]]:
    """Revisions by engine name, and the pods that each wants, in order of precedence."""
    revisions: dict[str, Revision] = {}
    wanted: list[Wanted] = []
    for adapter in adapters:
        for revision, copies in wanted_copies(adapter.status.revisions, adapter.status.desired_replicas or 1):
            if revision.engine_name not in revisions and revision.uri is not None:
                revisions[revision.engine_name] = revision
                wanted.append(Wanted(revision.engine_name, copies))
    return revisions, wanted


def _placement(
    pool: ServingPool, seen: PoolObservation, living: Sequence[PoolPod], wanted: Sequence[Wanted]
) -> tuple[Placement, frozenset[str]]:
    ages = {pod.name: rank for rank, pod in enumerate(sorted(living, key=lambda pod: (pod.created, pod.name)))}

    def pods(leaving: frozenset[str]) -> list[PlacementPod]:
        return [
            PlacementPod(
                pod.name,
                ready=_counts_as_ready(pod),
                age_rank=ages[pod.name],
                present=pod.present,
                resident=pod.resident,
                victim=pod.name in leaving,
            )
            for pod in living
        ]

    # A draining pod is on its way out, whatever else is said about it.
    draining = frozenset(pod.name for pod in living if pod.state is not None and pod.state.draining)
    slots = pool.spec.engine.max_loras
    candidates = pods(draining)
    before = place(wanted, candidates, slots)
    marked = {pod.name for pod in living if pod.deletion_cost == str(_VICTIM_COST)}
    # Pods that were chosen before are chosen again, so that two passes agree on who leaves.
    counts = {name: -1 if name in marked else len(keys) for name, keys in before.pods.items()}
    staying = [pod for pod in candidates if not pod.victim]
    leaving = draining | victims(staying, seen.decision.replicas, counts)
    return place(wanted, pods(leaving), slots, spread=seen.spread), leaving


def _counts_as_ready(pod: PoolPod) -> bool:
    """A pod whose agent is silent keeps its copies while Kubernetes says that it is ready."""
    return pod.answering or (pod.ready and not pod.heard)


def _replicas(deployment: Mapping[str, Any] | None) -> int | None:
    return None if deployment is None else int(deployment["spec"].get("replicas", 1))


def _gate(pod: PoolPod, assigned: Sequence[DesiredAdapter]) -> bool | None:
    """Whether the readiness gate is open; None: as it is.

    Once open it stays open while the engine is up: an adapter on its way must not take the pod from those it serves.
    """
    if not pod.heard or pod.state is None:
        return None
    if not pod.state.engine_ready:
        return False
    if pod.gate:
        return True
    return all(_done(pod, adapter) for adapter in assigned)


def _done(pod: PoolPod, adapter: DesiredAdapter) -> bool:
    entry = pod.residency(adapter.engine_name)
    return entry is not None and (
        entry.state is ResidencyState.RESIDENT or (entry.state is ResidencyState.FAILED and entry.permanent)
    )


def _status(
    pool: ServingPool, seen: PoolObservation, living: Sequence[PoolPod], placement: Placement, now: datetime
) -> ServingPoolStatus:
    ready = sum(1 for pod in living if pod.ready)
    used = sum(len(keys) for keys in placement.pods.values())
    fingerprint, differing = _fingerprint(pool, living)
    conditions: Sequence[Condition] = pool.status.conditions
    outcomes = {
        ServingPoolCondition.AVAILABLE: _available(seen, ready, living),
        ServingPoolCondition.PROGRESSING: _progressing(seen, ready, living),
        ServingPoolCondition.DEGRADED: _degraded(pool, seen, living, differing),
    }
    for type_, (holds, reason, message) in outcomes.items():
        status = ConditionStatus.TRUE if holds else ConditionStatus.FALSE
        conditions = set_condition(
            conditions,
            Condition(
                type=type_,
                status=status,
                reason=reason,
                message=message,
                last_transition_time=now,
                observed_generation=pool.metadata.generation,
            ),
        )
    old = pool.status
    # The reason tells why this size was chosen; it is not written again with every request that comes.
    kept = (old.desired_replicas, old.observed_generation) == (seen.decision.replicas, pool.metadata.generation)
    degraded, available = outcomes[ServingPoolCondition.DEGRADED][0], outcomes[ServingPoolCondition.AVAILABLE][0]
    return ServingPoolStatus(
        phase=PoolPhase.DEGRADED if degraded else PoolPhase.AVAILABLE if available else PoolPhase.PENDING,
        conditions=list(conditions),
        observed_generation=pool.metadata.generation,
        base_model_fingerprint=fingerprint,
        desired_replicas=seen.decision.replicas,
        desired_reason=old.desired_reason if kept and old.desired_reason else seen.decision.reason[:1024],
        replicas=len(living),
        ready_replicas=ready,
        adapters=len(seen.adapters),
        slots_used=used,
        slots_free=max(0, len(living) * pool.spec.engine.max_loras - used),
        selector=selector_text(pool),
    )


_Outcome = tuple[bool, Reason, str]


def _available(seen: PoolObservation, ready: int, living: Sequence[PoolPod]) -> _Outcome:
    if seen.invalid is not None:
        return False, Reason.INVALID_SPEC, seen.invalid
    if ready:
        return True, Reason.PODS_READY, f"{ready} of {max(seen.decision.replicas, len(living))} pods ready"
    if seen.decision.replicas == 0:
        return False, Reason.SCALED_TO_ZERO, "replicas is 0: raise it to serve"
    problem = _first_problem(living)
    return (
        False,
        problem.reason if problem else Reason.NO_POD_READY,
        problem.message if problem else f"0 of {seen.decision.replicas} pods ready",
    )


def _progressing(seen: PoolObservation, ready: int, living: Sequence[PoolPod]) -> _Outcome:
    wanted = seen.decision.replicas
    status = (seen.deployment or {}).get("status") or {}
    if seen.invalid is not None:
        return False, Reason.INVALID_SPEC, seen.invalid
    if seen.deployment is not None and status.get("updatedReplicas", 0) < min(wanted, status.get("replicas", 0)):
        return (
            True,
            Reason.ROLLING_OUT,
            f"{status.get('updatedReplicas', 0)} of {wanted} pods have the current settings",
        )
    if ready < wanted or len(living) != wanted:
        return True, Reason.SCALING, f"{ready} of {wanted} wanted pods ready, {len(living)} exist"
    return False, Reason.SETTLED, f"{wanted} pod{'' if wanted == 1 else 's'} as wanted"


def _degraded(pool: ServingPool, seen: PoolObservation, living: Sequence[PoolPod], differing: str | None) -> _Outcome:
    if seen.invalid is not None:
        return True, Reason.INVALID_SPEC, seen.invalid
    refused = _refusal(seen.deployment)
    if refused is not None:
        return True, Reason.PODS_REFUSED, f"the API server refuses the pods: {refused}"
    problem = _first_problem(living)
    if problem is not None:
        return True, problem.reason, problem.message
    if differing is not None:
        return True, Reason.FINGERPRINTS_DIFFER, differing
    if seen.lost_to is not None:
        return (
            True,
            Reason.MODEL_NAME_TAKEN,
            (
                f"the model name {pool.model} belongs to {seen.lost_to.holder}, which "
                "is older: the base cannot be called under it"
            ),
        )
    silent = [pod.name for pod in living if pod.ready and not pod.heard]
    if silent:
        return True, Reason.AGENT_SILENT, f"the agent of pod {silent[0]} says nothing: what the pod holds is unknown"
    return False, Reason.AS_EXPECTED, "no pod reports a problem"


def _first_problem(living: Sequence[PoolPod]) -> Problem | None:
    pod = next((pod for pod in living if pod.problem is not None), None)
    return (
        None
        if pod is None or pod.problem is None
        else replace(pod.problem, message=f"pod {pod.name}: {pod.problem.message}")
    )


def _refusal(deployment: Mapping[str, Any] | None) -> str | None:
    conditions = ((deployment or {}).get("status") or {}).get("conditions") or ()
    return next(
        (
            condition.get("message") or condition["type"]
            for condition in conditions
            if condition["type"] == "ReplicaFailure" and condition["status"] == "True"
        ),
        None,
    )


def _fingerprint(pool: ServingPool, living: Sequence[PoolPod]) -> tuple[str | None, str | None]:
    """The base's fingerprint, and a sentence when the pods do not agree on it."""
    known = pool.status.base_model_fingerprint
    reported = {
        pod.name: pod.state.base_model_fingerprint
        for pod in living
        if pod.state is not None and pod.state.base_model_fingerprint is not None
    }
    values = sorted(set(reported.values()))
    if len(values) > 1:
        return (
            known if known in values else values[0],
            (
                f"the pods fetched different contents of {pool.spec.base_model.uri}: "
                f"delete the pods {', '.join(sorted(reported))}"
            ),
        )
    return (values[0] if values else known), None
