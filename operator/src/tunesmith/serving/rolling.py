"""Replacement of a pool's pods after a change of their template: its start, and the use of a surge pod.

Replacement after a change of the pool's own spec starts immediately. A change of the installation (its images and
settings) would replace the pods of all pools at the same time, so pools with serving pods start one after the other,
by name. If a replacement fails, the other pools of its namespace wait, and all pools wait once the replacement of a
pool in a second namespace fails: the owner of a pool can make its update fail, and must not block those of others.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from tunesmith.api.conditions import ServingPoolReason
from tunesmith.serving.pod import TEMPLATE_ANNOTATION, current_problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from tunesmith.api.servingpool import ServingPool
    from tunesmith.serving.pod import PoolPod

Manifest = dict[str, Any]
_SPEC_ANNOTATION = "tunesmith.dev/template-spec"
_CAUSE_ANNOTATION = "tunesmith.dev/template-cause"
FIELDS_WITHOUT_EFFECT = {"replicas", "autoscaling", "allowed_namespaces", "rolling_update", "hold_seconds"}
"""Fields of a pool's spec that do not affect its pods."""
_SURGE_SCHEDULING_TIMEOUT = timedelta(seconds=60)
"""Time after which a surge pod that cannot be scheduled is abandoned."""
_SCHEDULING_TIMEOUT = timedelta(minutes=3)
_FAILURE_DELAY = timedelta(minutes=1)
"""Age at which a new pod with a problem makes the replacement fail for good."""


class Cause(StrEnum):
    """Origin of a changed template."""

    SPEC = "Spec"
    INSTALLATION = "Installation"


@dataclass(frozen=True)
class Rollout:
    """Observed state of a pool's pods compared with the desired template.

    `pool`: its namespace and name. `change`: cause of the difference between the desired template and the Deployment's,
    None if they are equal. `serves`: True if it has serving pods. `outdated`: names of pods whose template is not the
    Deployment's. `cause`: cause of the Deployment's template. `unfinished`: True if pods with the Deployment's template
    do not serve yet, or some are outdated. `failure`: problem of a pod with the Deployment's template. `has_failed`:
    True if that problem lasts. `is_unschedulable`: True if such a pod cannot be scheduled.
    """

    pool: str
    change: Cause | None = None
    serves: bool = False
    outdated: frozenset[str] = frozenset()
    cause: Cause | None = None
    unfinished: bool = False
    failure: str | None = None
    has_failed: bool = False
    is_unschedulable: bool = False

    @property
    def namespace(self) -> str:
        """Namespace of the pool."""
        return self.pool.partition("/")[0]

    @property
    def is_waiting(self) -> bool:
        """True if the pool must wait for its turn."""
        return self.change is Cause.INSTALLATION and self.serves

    @property
    def active(self) -> bool:
        """True while the pods are being replaced because the installation changed."""
        return self.change is None and self.cause is Cause.INSTALLATION and self.unfinished


@dataclass(frozen=True)
class RolloutHold:
    """A sentence on why a pool's replacement does not begin. `failed`: True if another pool's replacement failed."""

    message: str
    failed: bool = False


def stamped(deployment: Manifest, pool: ServingPool, cause: Cause) -> Manifest:
    """Return a rendered Deployment with the digests by which `observe_rollout` identifies its template."""
    template = deployment["spec"]["template"]
    digest = _digest(template)
    metadata = template["metadata"]
    annotations = {**metadata.get("annotations", {}), TEMPLATE_ANNOTATION: digest}
    own = {TEMPLATE_ANNOTATION: digest, _SPEC_ANNOTATION: spec_digest(pool), _CAUSE_ANNOTATION: cause.value}
    return {
        **deployment,
        "metadata": {**deployment["metadata"], "annotations": own},
        "spec": {
            **deployment["spec"],
            "template": {**template, "metadata": {**metadata, "annotations": annotations}},
        },
    }


def cause_of(rollout: Rollout) -> Cause:
    """Return the cause to stamp. Updating a pool that does not serve gives no evidence about the installation."""
    if rollout.change is Cause.INSTALLATION and not rollout.serves:
        return Cause.SPEC
    return rollout.change or rollout.cause or Cause.SPEC


def observe_rollout(
    pool: ServingPool,
    rendered: Manifest,
    deployment: Mapping[str, Any] | None,
    pods: Sequence[PoolPod],
    now: datetime,
) -> Rollout:
    """Compare the desired template with the Deployment and its pods.

    Args:
        pool: the ServingPool.
        rendered: its Deployment as rendered by this release, without stamps.
        deployment: the observed Deployment; None if it does not exist.
        pods: pods of the pool.
        now: current time.
    """
    name = f"{pool.metadata.namespace}/{pool.metadata.name}"
    living = [pod for pod in pods if not pod.stopping]
    serves = any(pod.serving and pod.is_reporting for pod in living)
    if deployment is None:
        return Rollout(name, serves=serves)
    annotations = deployment["metadata"].get("annotations") or {}
    current = annotations.get(TEMPLATE_ANNOTATION)
    if current != _digest(rendered["spec"]["template"]):
        same_spec = annotations.get(_SPEC_ANNOTATION) in {None, spec_digest(pool)}
        return Rollout(name, Cause.INSTALLATION if same_spec else Cause.SPEC, serves)
    updated = [pod for pod in living if pod.template == current]
    outdated = frozenset(pod.name for pod in living if pod.template != current)
    cause = annotations.get(_CAUSE_ANNOTATION)
    return Rollout(
        pool=name,
        serves=serves,
        outdated=outdated,
        cause=Cause(cause) if cause in set(Cause) else None,
        unfinished=bool(outdated) or not all(pod.serving for pod in updated),
        failure=_failure(deployment, updated, now),
        has_failed=_failure(deployment, [pod for pod in updated if now - pod.created >= _FAILURE_DELAY], now)
        is not None,
        is_unschedulable=bool(outdated)
        and any(_unscheduled(pod) and now - pod.created >= _SURGE_SCHEDULING_TIMEOUT for pod in updated),
    )


def find_hold(rollout: Rollout, rollouts: Iterable[Rollout], *, complete: bool) -> RolloutHold | None:
    """Return the reason why the pool's pods are not replaced yet; None if they may be replaced.

    Args:
        rollout: rollout of the pool.
        rollouts: rollouts of all pools.
        complete: True if all pools have been observed since this process became the leader.
    """
    if not rollout.is_waiting:
        return None
    if not complete:
        return RolloutHold("waits until all pools have been observed")
    others = sorted(rollouts, key=lambda other: other.pool)
    active = [other for other in others if other.active]
    failed = [other for other in active if other.failure is not None]
    stopped = {other.namespace for other in failed}
    if len(stopped) == 1:  # no evidence yet that the installation is the cause
        failed = [other for other in failed if other.namespace == rollout.namespace]
    if failed:
        return RolloutHold(
            f"the update of ServingPool {failed[0].pool} is failing: {failed[0].failure}; other pools wait until it is "
            "fixed",
            failed=True,
        )
    waiting = [other.pool for other in others if other.is_waiting and other.namespace not in stopped]
    position = f" (position {waiting.index(rollout.pool) + 1} of {len(waiting)})" if rollout.pool in waiting else ""
    running = [other for other in active if other.failure is None]
    if running:
        return RolloutHold(f"waits for the update of ServingPool {running[0].pool}{position}")
    if waiting and waiting[0] != rollout.pool:
        return RolloutHold(f"waits for the update of ServingPool {waiting[0]}{position}")
    return None


def surge(
    pool: ServingPool, replicas: int, rollout: Rollout, deployment: Mapping[str, Any] | None, *, has_room: bool | None
) -> int:
    """Return the Deployment's maxSurge: 1 if a pod's replacement starts before the pod stops.

    Args:
        pool: the ServingPool.
        replicas: number of desired pods.
        rollout: its observed state.
        deployment: the observed Deployment, or None.
        has_room: True if a node has room for one more pod; None if unknown.
    """
    if rollout.is_unschedulable:
        return 0
    if pool.spec.rolling_update.max_surge is not None:
        return pool.spec.rolling_update.max_surge
    if deployment is not None and rollout.change is None and not rollout.outdated:
        # No pod is being replaced: keep the latest decision, so that the Deployment is not written needlessly.
        strategy = (deployment.get("spec") or {}).get("strategy") or {}
        return 1 if (strategy.get("rollingUpdate") or {}).get("maxSurge") == 1 else 0
    return 1 if replicas <= 1 or has_room else 0


def needs_room_check(pool: ServingPool, replicas: int, rollout: Rollout) -> bool:
    """Return True if `surge` depends on whether a node has room."""
    replaces_pods = rollout.change is not None or bool(rollout.outdated)
    return (
        replaces_pods and not rollout.is_unschedulable and pool.spec.rolling_update.max_surge is None and replicas > 1
    )


def interruption(
    pool: ServingPool, pods: Sequence[PoolPod], replaced: frozenset[str], max_surge: int, running: int | None
) -> str:
    """Return a sentence on the interruptions that replacing pods causes.

    Args:
        pool: the ServingPool.
        pods: pods of the pool that are not stopping.
        replaced: names of the pods to replace.
        max_surge: result of `surge`.
        running: current number of requests for the pool's models; None if unknown.
    """
    serving = [pod for pod in pods if pod.serving]
    leaving = [pod for pod in serving if pod.name in replaced]
    now = "" if running is None else f" ({running} now)"
    drained = f"running requests{now} have {pool.spec.drain_seconds} s to finish"
    if not leaving:
        return "no serving pod is replaced"
    if max_surge:
        return f"each pod stops after its replacement is ready and has loaded its adapters; {drained}"
    if len(serving) == 1:
        return (
            f"the pool's only serving pod stops before its replacement starts, because no surge pod is possible: no "
            f"request is answered until the replacement is ready; {drained}"
        )
    count = _on_one_pod_only(leaving, serving)
    adapters = f"{count} adapter{' is' if count == 1 else 's are'} on one pod only and may have to be loaded again"
    return f"each pod stops before its replacement starts, one at a time; {adapters}; {drained}"


def _on_one_pod_only(leaving: Sequence[PoolPod], serving: Sequence[PoolPod]) -> int:
    holders: dict[str, int] = {}
    for pod in serving:
        for name in pod.resident:
            holders[name] = holders.get(name, 0) + 1
    return sum(1 for pod in leaving for name in pod.resident if holders[name] == 1)


def _failure(deployment: Mapping[str, Any], updated: Sequence[PoolPod], now: datetime) -> str | None:
    for pod in updated:
        problem = current_problem(pod, now)
        if problem is not None and not (_unscheduled(pod) and now - pod.created < _SCHEDULING_TIMEOUT):
            return f"pod {pod.name}: {problem.message}"
    conditions = (deployment.get("status") or {}).get("conditions") or ()
    exceeded = any(condition.get("reason") == "ProgressDeadlineExceeded" for condition in conditions)
    return "the new pods did not become ready in time" if exceeded else None


def _unscheduled(pod: PoolPod) -> bool:
    return pod.problem is not None and pod.problem.reason is ServingPoolReason.UNSCHEDULABLE


def spec_digest(pool: ServingPool) -> str:
    """Return the digest of the fields of a pool's spec that affect its pods."""
    return _digest(pool.spec.model_dump(mode="json", exclude_defaults=True, exclude=FIELDS_WITHOUT_EFFECT))


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:32]
