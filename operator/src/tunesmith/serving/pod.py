"""Observed state of a pool's pod: from the API server and from its agent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tunesmith.api.conditions import ServingPoolReason
from tunesmith.api.pool_base_model import BaseModelArrival
from tunesmith.contracts.addresses import url_host
from tunesmith.contracts.agent import AGENT_PORT, ResidencyState
from tunesmith.contracts.report import parse_report
from tunesmith.contracts.sentence import one_line
from tunesmith.contracts.traffic import Traffic
from tunesmith.contracts.waiting import CONFIGURATION_REASONS, IMAGE_PULL_REASONS
from tunesmith.serving.crashes import crash_problem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tunesmith.contracts.agent import PodState, Residency

READINESS_GATE = "tunesmith.dev/adapters"
TEMPLATE_ANNOTATION = "tunesmith.dev/template"
"""Annotation of a pod with the digest of its template, and of a Deployment with that of its current template."""
BASE_MODEL_ANNOTATION = "tunesmith.dev/base-model"
"""Annotation of a pod with the digest of the artifact whose whole model is its base model."""
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
BASE_MODEL_CONTAINER = "base-model"
AGENT_CONTAINER = "agent"
ENGINE_CONTAINER = "engine"
MAX_PROBLEM_LENGTH = 600
_CONTAINER_PROBLEMS = {
    BASE_MODEL_CONTAINER: (ServingPoolReason.BASE_MODEL_UNAVAILABLE, "the base model cannot be fetched"),
    AGENT_CONTAINER: (ServingPoolReason.AGENT_FAILED, "the agent stopped"),
    ENGINE_CONTAINER: (ServingPoolReason.ENGINE_FAILED, "the engine stopped"),
}
_SILENT_AGENT_SECONDS = 5.0
"""Time without a line on its stream after which a running agent is reported as a problem."""
_AGENT_START_SECONDS = 20.0
"""Time after the start of an agent's container in which the agent need not be reachable yet."""
_MOUNT_TIME = timedelta(minutes=2)
"""Time after which volumes that are not mounted are reported as a problem."""
_MIN_RESTARTS = 3
_RECENT = timedelta(minutes=10)
"""Time for which a container has to run until the kubelet resets its restart back-off."""


@dataclass(frozen=True)
class Problem:
    """Problem of a pod: its reason, and a sentence."""

    reason: ServingPoolReason
    message: str


@dataclass(frozen=True)
class Restarts:
    """Restarts of a container that is running again. `last`: time of its latest termination."""

    problem: Problem
    count: int
    last: datetime | None


@dataclass(frozen=True)
class PoolPod:
    """A pod of a pool.

    `ready`: its Ready condition. `gate`: the observed readiness gate, None if it was never set. `stopping`: it is being
    deleted, or has finished. `problem`: problem reported by the API server. `failed_at`: time at which the pod
    finished. `restarts`: restarts of a container that is running again. `agent_since`: start time of the agent's
    container, None while it does not run. `template`: digest of its template. `base_artifact`: digest of the artifact
    whose whole model is its base, None for a base with a uri. `state`: the agent's latest state, None before the first
    line. `is_reporting`: True if the latest line is recent. `silent_seconds`: time for which the operator has read the
    agent's stream without receiving a line, None while it does not read it. `stream_error`: error that broke that
    stream. `base_model`: arrival of its base model, None before, and for mounted models. `unmounted_since`: time since
    which its node has been mounting its volumes.
    """

    namespace: str
    name: str
    uid: str
    address: str | None
    created: datetime
    ready: bool
    gate: bool | None
    deletion_cost: str | None
    stopping: bool
    problem: Problem | None = None
    failed_at: datetime | None = None
    restarts: Restarts | None = None
    agent_since: datetime | None = None
    containers_ready_since: datetime | None = None
    template: str | None = None
    base_artifact: str | None = None
    state: PodState | None = None
    is_reporting: bool = False
    silent_seconds: float | None = None
    stream_error: str = ""
    base_model: BaseModelArrival | None = None
    unmounted_since: datetime | None = None

    @cached_property
    def engine_up(self) -> bool:
        """True if its engine holds its adapters and accepts requests, as far as is currently known."""
        return (
            self.is_reporting
            and not self.stopping
            and self.state is not None
            and self.state.engine_ready
            and not self.state.draining
            and not self.state.problem
        )

    @cached_property
    def answering(self) -> bool:
        """True if its engine is up and not stalled."""
        return self.engine_up and self.state is not None and not self.state.stalled

    @property
    def serving(self) -> bool:
        """True if it receives requests: it is ready, and its agent does not contradict that."""
        return self.ready and not self.stopping and (self.answering or not self.is_reporting)

    def residency(self, engine_name: str) -> Residency | None:
        """Return the agent's latest report about a revision, or None."""
        return self.adapters.get(engine_name)

    @cached_property
    def adapters(self) -> Mapping[str, Residency]:
        """The agent's latest reports, by engine name."""
        return {entry.engine_name: entry for entry in self.state.adapters} if self.state is not None else {}

    @cached_property
    def reported(self) -> frozenset[str]:
        """Names of the revisions of which its agent reports a residency or traffic."""
        return frozenset(self.adapters) if self.state is None else frozenset((*self.adapters, *self.state.traffic))

    def traffic(self, engine_name: str) -> Traffic | None:
        """Return the counters of a revision; None if the pod does not report now.

        Counters without a `start` if the pod reports none, as before the first request.
        """
        if self.state is None or not self.is_reporting:
            return None
        return self.state.traffic.get(engine_name) or Traffic(start="")

    @property
    def active(self) -> Sequence[str]:
        """Adapters with requests in its engine, by the agent's latest report; empty if it does not report."""
        return self.state.use.active if self.state is not None and self.is_reporting else ()

    @cached_property
    def present(self) -> frozenset[str]:
        """Revisions that the pod holds, is loading or could not load."""
        return frozenset(name for name, entry in self.adapters.items() if entry.state is not ResidencyState.UNLOADING)

    @cached_property
    def resident(self) -> frozenset[str]:
        """Revisions that its engine holds, by the agent's latest report."""
        return frozenset(name for name, entry in self.adapters.items() if entry.state is ResidencyState.RESIDENT)


def observe_pod(
    manifest: Mapping[str, Any],
    state: PodState | None = None,
    *,
    is_reporting: bool = False,
    silent_seconds: float | None = None,
    stream_error: str = "",
) -> PoolPod:
    """Return the observed state of a pod, from its manifest and its agent's reports."""
    metadata, status = manifest["metadata"], manifest.get("status") or {}
    conditions = {condition["type"]: condition for condition in status.get("conditions") or ()}
    gate = conditions.get(READINESS_GATE)
    annotations = metadata.get("annotations") or {}
    is_finished = status.get("phase") in {"Failed", "Succeeded"}
    return PoolPod(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        address=status.get("podIP"),
        created=datetime.fromisoformat(metadata["creationTimestamp"]).astimezone(UTC),
        ready=_is_true(conditions.get("Ready")),
        gate=None if gate is None else _is_true(gate),
        deletion_cost=annotations.get(DELETION_COST),
        stopping=bool(metadata.get("deletionTimestamp")) or is_finished,
        problem=_finished_pod_problem(status) if is_finished else next(_problems(status, conditions), None),
        failed_at=_latest_change(status) if is_finished and not metadata.get("deletionTimestamp") else None,
        restarts=next(_restarts(status), None),
        agent_since=_running_since(status, AGENT_CONTAINER, metadata["creationTimestamp"]),
        template=annotations.get(TEMPLATE_ANNOTATION),
        base_artifact=annotations.get(BASE_MODEL_ANNOTATION),
        containers_ready_since=_true_since(conditions.get("ContainersReady")),
        state=state,
        is_reporting=is_reporting,
        silent_seconds=silent_seconds,
        stream_error=stream_error,
        base_model=_base_model(status),
        unmounted_since=_unmounted_since(conditions),
    )


def current_problem(pod: PoolPod, now: datetime) -> Problem | None:
    """Return a pod's current problem; None if none is known."""
    if pod.stopping:
        recent = pod.failed_at is not None and now - pod.failed_at <= _RECENT
        return pod.problem if recent else None
    if pod.problem is not None:
        return pod.problem
    if pod.unmounted_since is not None and now - pod.unmounted_since >= _MOUNT_TIME:
        return Problem(
            ServingPoolReason.VOLUMES_NOT_MOUNTED,
            f"its node has not mounted its volumes within {_MOUNT_TIME.total_seconds():.0f} s: kubectl describe pod "
            f"{pod.name} --namespace {pod.namespace} shows the reason",
        )
    if pod.is_reporting and pod.state is not None and (pod.state.problem or pod.state.stalled):
        message = pod.state.problem or pod.state.stalled
        return Problem(ServingPoolReason.ENGINE_UNHEALTHY, one_line(message, MAX_PROBLEM_LENGTH))
    if pod.is_reporting and pod.state is not None and (crash := crash_problem(pod.state, now)):
        return Problem(ServingPoolReason.ENGINE_FAILED, one_line(crash, MAX_PROBLEM_LENGTH))
    if _silent_for(pod, now) >= _SILENT_AGENT_SECONDS:
        return _unreachable(pod)
    restarts = pod.restarts
    if (
        restarts is not None
        and restarts.count >= _MIN_RESTARTS
        and restarts.last is not None
        and now - restarts.last <= _RECENT
    ):
        return restarts.problem
    return None


def _silent_for(pod: PoolPod, now: datetime) -> float:
    if pod.is_reporting or not pod.address or pod.agent_since is None:
        return 0.0
    if (now - pod.agent_since).total_seconds() < _AGENT_START_SECONDS:
        return 0.0
    return (now - pod.agent_since).total_seconds() if pod.silent_seconds is None else pod.silent_seconds


def _unreachable(pod: PoolPod) -> Problem | None:
    if pod.state is not None and not pod.stream_error:
        return Problem(
            ServingPoolReason.AGENT_SILENT,
            "its agent is connected but does not report, so the adapters of the pod are unknown",
        )
    host = url_host(pod.address or "")
    error = f" ({one_line(pod.stream_error, 200)})" if pod.stream_error else ""
    return Problem(
        ServingPoolReason.AGENT_UNREACHABLE,
        f"the operator cannot reach its agent at {host}:{AGENT_PORT}{error}: allow TCP port {AGENT_PORT} from the "
        f"operator's pods, if a NetworkPolicy of namespace {pod.namespace} or of the operator's namespace denies it",
    )


def _is_true(condition: Mapping[str, Any] | None) -> bool:
    return condition is not None and condition.get("status") == "True"


def _true_since(condition: Mapping[str, Any] | None) -> datetime | None:
    return _time(condition.get("lastTransitionTime")) if condition is not None and _is_true(condition) else None


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text).astimezone(UTC) if text else None


def _containers(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


def _running_since(status: Mapping[str, Any], name: str, created: str) -> datetime | None:
    running = next(
        (container["state"]["running"] for container in _containers(status)
         if container["name"] == name and "running" in (container.get("state") or {})),
        None,
    )  # fmt: skip
    return None if running is None else _time(running.get("startedAt") or created)


def _unmounted_since(conditions: Mapping[str, Mapping[str, Any]]) -> datetime | None:
    """Return when the pod was scheduled, if its volumes are not mounted, which is the first step of its start."""
    started = conditions.get("PodReadyToStartContainers")
    if started is None or started.get("status") != "False":
        return None
    return _true_since(conditions.get("PodScheduled"))


def _base_model(status: Mapping[str, Any]) -> BaseModelArrival | None:
    """Return what fetch-base reported when it succeeded."""
    for container in status.get("initContainerStatuses") or ():
        terminated = (container.get("state") or {}).get("terminated") or {}
        if container["name"] == BASE_MODEL_CONTAINER and terminated.get("exitCode") == 0:
            try:
                return parse_report(BaseModelArrival, terminated.get("message") or "")
            except ValueError:
                return None
    return None


def _finished_pod_problem(status: Mapping[str, Any]) -> Problem | None:
    """Return the reason why a finished pod stopped, although pool pods should run indefinitely."""
    conditions = {condition["type"]: condition for condition in status.get("conditions") or ()}
    disruption = conditions.get("DisruptionTarget") or {}
    reason = status.get("reason") or disruption.get("reason") or status["phase"]
    message = status.get("message") or disruption.get("message") or "its containers finished"
    return Problem(ServingPoolReason.POD_FAILED, f"it finished ({one_line(reason, 64)}): {_truncated(message)}")


def _latest_change(status: Mapping[str, Any]) -> datetime | None:
    times = [_time(condition.get("lastTransitionTime")) for condition in status.get("conditions") or ()]
    times += [
        _time(((container.get("state") or {}).get("terminated") or {}).get("finishedAt"))
        for container in _containers(status)
    ]
    return max((time for time in (*times, _time(status.get("startTime"))) if time is not None), default=None)


def _problems(status: Mapping[str, Any], conditions: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    scheduled = conditions.get("PodScheduled")
    if scheduled is not None and scheduled.get("status") == "False":
        message = scheduled.get("message") or scheduled.get("reason") or "the scheduler gave no reason"
        yield Problem(ServingPoolReason.UNSCHEDULABLE, f"it cannot be scheduled: {_truncated(message)}")
    for container in _containers(status):
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason, name = waiting.get("reason", ""), container["name"]
        if reason in IMAGE_PULL_REASONS:
            yield Problem(
                ServingPoolReason.IMAGE_PULL_FAILED,
                f"image {one_line(str(container.get('image')), 256)} of {name} cannot be pulled: "
                f"{_truncated(waiting.get('message') or reason)}",
            )
        elif reason in CONFIGURATION_REASONS:
            yield Problem(
                ServingPoolReason.CONFIGURATION,
                f"container {name} cannot be started: {_truncated(waiting.get('message') or reason)}",
            )
        elif not _is_up(container) and (problem := _termination(container)) is not None:
            yield problem


def _restarts(status: Mapping[str, Any]) -> Iterator[Restarts]:
    for container in _containers(status):
        count = container.get("restartCount", 0)
        if count and _is_up(container) and (problem := _termination(container)) is not None:
            last = ((container.get("lastState") or {}).get("terminated") or {}).get("finishedAt")
            yield Restarts(Problem(problem.reason, f"{problem.message}; it is running again"), count, _time(last))


def _is_up(container: Mapping[str, Any]) -> bool:
    """True if the container runs, and passes its readiness probe where the kubelet reports that."""
    return "running" in (container.get("state") or {}) and container.get("ready", True)


def _termination(container: Mapping[str, Any]) -> Problem | None:
    """Return the container's latest termination as a problem; None if there is none, or it is expected."""
    name = container["name"]
    for field in ("state", "lastState"):
        terminated = (container.get(field) or {}).get("terminated")
        if not terminated or (name == BASE_MODEL_CONTAINER and terminated.get("exitCode", 0) == 0):
            continue
        cause = (
            "out of memory" if terminated.get("reason") == "OOMKilled" else f"exit code {terminated.get('exitCode', 0)}"
        )
        count = container.get("restartCount", 0)
        restarts = f", restarted {count} time{'' if count == 1 else 's'}" if count else ""
        text = _termination_sentence(terminated.get("message") or "")
        reason, summary = _CONTAINER_PROBLEMS.get(name, (ServingPoolReason.ENGINE_FAILED, f"container {name} stopped"))
        return Problem(reason, f"{summary} ({cause}{restarts}){f': {text}' if text else ''}")
    return None


def _termination_sentence(message: str) -> str:
    """Return the sentence in a termination message: `message` of a JSON object, or the last line of a log."""
    text = message.strip()
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return _truncated(lines[-1]) if lines else ""
    return _truncated(str(document.get("message") or "")) if isinstance(document, dict) else _truncated(text)


def _truncated(text: str) -> str:
    return one_line(text, MAX_PROBLEM_LENGTH)
