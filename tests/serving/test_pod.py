from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tunesmith.contracts.agent import PodState
from tunesmith.serving.pod import PoolPod, current_problem, observe_pod

NOW = datetime(2026, 1, 1, 2, tzinfo=UTC)
RUNNING = {
    "phase": "Running",
    "podIP": "10.0.0.5",
    "conditions": [{"type": "ContainersReady", "status": "True"}, {"type": "Ready", "status": "False"}],
    "initContainerStatuses": [{"name": "agent", "image": "x", "state": {"running": {}}}],
    "containerStatuses": [{"name": "engine", "image": "y", "state": {"running": {}}}],
}


def pod(**status: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "p", "namespace": "team", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "status": status,
    }


def container(name: str, **state: Any) -> dict[str, Any]:
    return {"name": name, "image": "registry/x:1", **state}


@pytest.mark.parametrize(
    ("status", "reason", "message"),
    [
        pytest.param(
            {
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes"}
                ]
            },
            "Unschedulable",
            "it cannot be scheduled: 0/1 nodes",
            id="unschedulable",
        ),
        pytest.param(
            {
                "initContainerStatuses": [
                    container("agent", state={"waiting": {"reason": "ImagePullBackOff", "message": "not found"}})
                ]
            },
            "ImagePullFailed",
            "image registry/x:1 of agent cannot be pulled: not found",
            id="image",
        ),
        pytest.param(
            {
                "initContainerStatuses": [
                    container(
                        "agent",
                        state={
                            "waiting": {
                                "reason": "CreateContainerConfigError",
                                "message": 'secret "tunesmith-store" not found',
                            }
                        },
                    )
                ]
            },
            "ContainerConfigError",
            'container agent cannot be started: secret "tunesmith-store" not found',
            id="secret",
        ),
        pytest.param(
            {
                "initContainerStatuses": [
                    container(
                        "base-model",
                        state={"waiting": {"reason": "CrashLoopBackOff"}},
                        lastState={"terminated": {"exitCode": 2, "message": "s3://models/x does not exist."}},
                    )
                ]
            },
            "BaseModelUnavailable",
            "the base model cannot be fetched (exit code 2): s3://models/x does not exist.",
            id="base model",
        ),
        pytest.param(
            {
                "containerStatuses": [
                    container(
                        "engine",
                        state={"waiting": {"reason": "CrashLoopBackOff"}},
                        lastState={
                            "terminated": {"exitCode": 1, "message": "Traceback\n  File x\nValueError: bad argument\n"}
                        },
                    )
                ]
            },
            "EngineFailed",
            "the engine stopped (exit code 1): ValueError: bad argument",
            id="engine",
        ),
        pytest.param(
            {
                "containerStatuses": [
                    container("engine", state={"terminated": {"exitCode": 137, "reason": "OOMKilled"}})
                ]
            },
            "EngineFailed",
            "the engine stopped (out of memory)",
            id="memory",
        ),
        pytest.param(
            {
                "initContainerStatuses": [
                    container(
                        "base-model", state={"terminated": {"exitCode": 3, "message": '{"message": "no bucket"}'}}
                    )
                ]
            },
            "BaseModelUnavailable",
            "the base model cannot be fetched (exit code 3): no bucket",
            id="json",
        ),
        pytest.param(
            {
                "containerStatuses": [
                    container(
                        "engine",
                        restartCount=4,
                        state={"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 2m40s restarting"}},
                        lastState={
                            "terminated": {"exitCode": 0, "reason": "Completed", "message": "EngineDeadError\n"}
                        },
                    )
                ]
            },
            "EngineFailed",
            "the engine stopped (exit code 0, restarted 4 times): EngineDeadError",
            id="an engine that dies exits with 0",
        ),
        pytest.param(
            {
                "containerStatuses": [
                    container("engine", restartCount=1, state={"terminated": {"exitCode": 0, "reason": "Completed"}})
                ]
            },
            "EngineFailed",
            "the engine stopped (exit code 0, restarted 1 time)",
            id="without a last line",
        ),
        pytest.param(
            {
                "containerStatuses": [
                    container(
                        "engine",
                        restartCount=1,
                        ready=False,
                        state={"running": {}},
                        lastState={"terminated": {"exitCode": 1, "message": "boom"}},
                    )
                ]
            },
            "EngineFailed",
            "the engine stopped (exit code 1, restarted 1 time): boom",
            id="until it is ready again",
        ),
        pytest.param(
            {
                "initContainerStatuses": [
                    container("agent", state={"terminated": {"exitCode": 0, "reason": "Completed"}})
                ]
            },
            "AgentFailed",
            "the agent stopped (exit code 0)",
            id="agent",
        ),
        pytest.param(
            {
                "containerStatuses": [
                    container(
                        "engine",
                        state={"terminated": {"exitCode": 1, "message": "\x1b[31mbad\u202e \x00line\x07" + "x" * 5000}},
                    )
                ]
            },
            "EngineFailed",
            "the engine stopped (exit code 1): bad line" + "x" * 591 + "…",
            id="control characters and length",
        ),
    ],
)
def test_problems(status: dict[str, Any], reason: str, message: str) -> None:
    problem = observe_pod(pod(**status)).problem
    assert problem is not None
    assert (problem.reason, problem.message) == (reason, message)


@pytest.mark.parametrize(
    "status",
    [
        {},
        {"initContainerStatuses": [container("base-model", state={"terminated": {"exitCode": 0}})]},
        {"containerStatuses": [container("engine", state={"waiting": {"reason": "PodInitializing"}})]},
        {"containerStatuses": [container("engine", state={"running": {}}, lastState={"terminated": {"exitCode": 1}})]},
    ],
)
def test_no_problem(status: dict[str, Any]) -> None:
    assert observe_pod(pod(**status)).problem is None


def test_observed_fields() -> None:
    manifest = pod(
        podIP="10.0.0.1",
        conditions=[{"type": "Ready", "status": "True"}, {"type": "tunesmith.dev/adapters", "status": "False"}],
    )
    manifest["metadata"]["annotations"] = {"controller.kubernetes.io/pod-deletion-cost": "3"}
    found = observe_pod(manifest)
    assert (found.ready, found.gate, found.address, found.deletion_cost, found.stopping) == (
        True,
        False,
        "10.0.0.1",
        "3",
        False,
    )
    assert observe_pod(pod()).gate is None
    manifest["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert observe_pod(manifest).stopping
    assert observe_pod(pod(phase="Failed")).stopping


def found(observed: PoolPod, now: datetime = NOW) -> tuple[str, str] | None:
    problem = current_problem(observed, now)
    return None if problem is None else (problem.reason, problem.message)


def test_an_agent_that_cannot_be_reached() -> None:
    reason, message = found(observe_pod(pod(**RUNNING))) or ("", "")
    assert reason == "AgentUnreachable"
    assert message == (
        "the operator cannot reach its agent at 10.0.0.5:9000: allow TCP port 9000 from the operator's pods, "
        "if a NetworkPolicy of namespace team or of the operator's namespace denies it"
    )
    silent = observe_pod(pod(**RUNNING), silent_seconds=6.0, stream_error="Cannot connect\x1b\n(timeout)")
    assert "10.0.0.5:9000 (Cannot connect (timeout)): allow" in (found(silent) or ("", ""))[1]


def test_a_stalled_engine_is_a_problem_and_keeps_its_adapters() -> None:
    state = PodState(engine_ready=True, stalled="The engine has processed no token for 6 s.")
    ready = pod(**{**RUNNING, "conditions": [{"type": "Ready", "status": "True"}]})
    stalled = observe_pod(ready, state, is_reporting=True)
    assert found(stalled) == ("EngineUnhealthy", state.stalled)
    assert stalled.engine_up
    assert not stalled.answering
    assert not stalled.serving
    assert observe_pod(ready, state.model_copy(update={"stalled": ""}), is_reporting=True).serving


@pytest.mark.parametrize(
    "observed",
    [
        pytest.param(observe_pod(pod(**RUNNING), PodState(), is_reporting=True), id="reporting"),
        pytest.param(observe_pod(pod(**RUNNING), silent_seconds=1.0), id="the operator has just started"),
        pytest.param(observe_pod(pod(**{**RUNNING, "podIP": None})), id="no address yet"),
        pytest.param(observe_pod(pod(phase="Pending", podIP="10.0.0.5")), id="the agent does not run yet"),
    ],
)
def test_a_reachable_or_new_agent_is_not_a_problem(observed: PoolPod) -> None:
    assert found(observed) is None


def test_an_agent_may_take_some_seconds_to_start() -> None:
    started = NOW.isoformat()
    agent = {"name": "agent", "image": "x", "state": {"running": {"startedAt": started}}}
    silent = observe_pod(
        pod(**{**RUNNING, "initContainerStatuses": [agent]}), silent_seconds=19.0, stream_error="connection refused"
    )
    assert found(silent, NOW + timedelta(seconds=19)) is None
    assert (found(silent, NOW + timedelta(seconds=20)) or ("",))[0] == "AgentUnreachable"


def test_an_agent_that_is_connected_but_does_not_report_is_silent() -> None:
    assert (found(observe_pod(pod(**RUNNING), PodState(), silent_seconds=6.0)) or ("",))[0] == "AgentSilent"


def test_the_agents_own_problem_is_reported_and_stops_requests_to_the_pod() -> None:
    state = PodState(engine_ready=True, problem="the canary's answer changed after adapter team/huge was loaded")
    observed = observe_pod(pod(**RUNNING), state, is_reporting=True)
    assert found(observed) == ("EngineUnhealthy", state.problem)
    assert not observed.answering


def test_an_engine_that_restarts_repeatedly_stays_reported_for_a_while() -> None:
    end = datetime(2026, 1, 1, 1, 55, tzinfo=UTC)
    terminated = {"exitCode": 0, "message": "EngineDeadError", "finishedAt": end.isoformat()}

    def restarted(count: int) -> PoolPod:
        engine = container("engine", restartCount=count, state={"running": {}}, lastState={"terminated": terminated})
        return observe_pod(pod(**{**RUNNING, "containerStatuses": [engine]}), PodState(), is_reporting=True)

    assert found(restarted(1)) is None
    assert found(restarted(3)) == (
        "EngineFailed",
        "the engine stopped (exit code 0, restarted 3 times): EngineDeadError; it is running again",
    )
    assert found(restarted(3), end + timedelta(minutes=11)) is None


def test_an_evicted_pod_is_reported_for_a_while() -> None:
    observed = observe_pod(
        pod(
            phase="Failed",
            reason="Evicted",
            message='Usage of EmptyDir volume "adapters" exceeds the limit "20Gi". ',
            startTime="2026-01-01T01:55:00Z",
        )
    )
    assert observed.stopping
    assert found(observed) == (
        "PodFailed",
        'it finished (Evicted): Usage of EmptyDir volume "adapters" exceeds the limit "20Gi".',
    )
    assert found(observed, NOW + timedelta(minutes=10)) is None


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        ('{"origin": "Cache", "seconds": 1.25, "sizeBytes": 8, "downloadedBytes": 0, "later": 1}', 1.25),
        ('{"origin": "Elsewhere", "seconds": 1.25, "sizeBytes": 8, "downloadedBytes": 0}', None),
        ('{"origin": "Cache", "seconds": -1, "sizeBytes": 8, "downloadedBytes": 0}', None),
        ("a log line", None),
        ("", None),
    ],
)
def test_the_arrival_of_the_base_model_is_read_from_its_container(message: str, seconds: float | None) -> None:
    arrived = container("base-model", state={"terminated": {"exitCode": 0, "message": message}})
    observed = observe_pod(pod(**{**RUNNING, "initContainerStatuses": [arrived]}))
    assert (observed.base_model.seconds if observed.base_model else None) == seconds
    assert observed.problem is None


def test_volumes_that_are_not_mounted_are_reported_after_a_while() -> None:
    conditions = [
        {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T01:58:30Z"},
        {"type": "PodReadyToStartContainers", "status": "False", "lastTransitionTime": "2026-01-01T01:58:30Z"},
    ]
    observed = observe_pod(pod(phase="Pending", conditions=conditions))
    assert found(observed) is None
    assert found(observed, NOW + timedelta(minutes=1)) == (
        "VolumesNotMounted",
        "its node has not mounted its volumes within 120 s: kubectl describe pod p --namespace team shows the reason",
    )
    conditions[1]["status"] = "True"
    assert found(observe_pod(pod(phase="Pending", conditions=conditions)), NOW + timedelta(minutes=1)) is None
