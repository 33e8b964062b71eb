"""Parity of an AdapterDeployment: from the reports of its pods to conditions, Events and a column."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.api.conditions import Severity, find, severity_of
from tunesmith.api.parity import ParityMode, ParityVerdict
from tunesmith.autoscale.decide import Decision
from tunesmith.contracts.agent import AdapterParity, Residency, ResidencyState
from tunesmith.serving.adapter import AdapterObservation, plan
from tunesmith.serving.pool import PlacementCache
from tunesmith.serving.resolve import Artifact

if TYPE_CHECKING:
    from datetime import datetime

    from tunesmith.api.adapterdeployment import AdapterDeploymentStatus
    from tunesmith.serving.pod import PoolPod

ENGINE_NAME = "team/pirate@aaaaaaaaaaaa"
ARTIFACT = Artifact(f"sha256:{'a' * 64}", "s3://store/team/job-a/artifact", "sha256:f", "FineTuneJob job")
Build = Callable[..., Any]


def reported(verdict: ParityVerdict, distance: float | None = None, message: str = "why") -> AdapterParity:
    gap = None if distance is None else 2.125
    return AdapterParity(verdict=verdict, distance=distance, gap=gap, tolerance=0.01, message=message)


PASSED = reported(ParityVerdict.PASSED, 0.00421)
FAILED = reported(ParityVerdict.FAILED, 2.1, "its answers differ by 2.1 of 2.1, and 0.010 is tolerated")


@pytest.fixture
def status(adapter: Build, pool: Build, pod: Build, start: datetime) -> Callable[..., AdapterDeploymentStatus]:
    def holding(name: str, result: AdapterParity | None, mode: ParityMode) -> PoolPod:
        refused = mode is ParityMode.REQUIRED and result is FAILED
        entry = Residency(
            engine_name=ENGINE_NAME,
            digest="",
            state=ResidencyState.FAILED if refused else ResidencyState.RESIDENT,
            permanent=refused,
            message=f"parity is required, and {FAILED.message}" if refused else "",
            parity=result,
        )
        built = pod(name)
        built.state.adapters.append(entry)
        found: PoolPod = built
        return found

    def build(mode: ParityMode, *results: AdapterParity | None) -> AdapterDeploymentStatus:
        observation = AdapterObservation(
            artifact=ARTIFACT,
            pool=pool(),
            lost_to=None,
            pods=[holding(f"pod-{number}", result, mode) for number, result in enumerate(results)],
            unplaced={},
            decision=Decision(1, "spec.replicas"),
            url="",
        )
        return plan(adapter(parity=mode), observation, start)

    return build


def parity(status: AdapterDeploymentStatus) -> tuple[str, str] | None:
    condition = find(status.conditions, "Parity")
    return None if condition is None else (str(condition.status), condition.reason)


@pytest.mark.parametrize(
    ("results", "condition", "column"),
    [
        pytest.param([PASSED], ("True", "ParityPassed"), "0.004 of 2.1", id="passed"),
        pytest.param([PASSED, FAILED], ("False", "ParityFailed"), "2.1 of 2.1 Failed", id="failed on one pod"),
        pytest.param([PASSED, None], ("True", "ParityPassed"), "0.004 of 2.1", id="not checked on one pod"),
        pytest.param([None], ("Unknown", "ParityPending"), None, id="not checked"),
        pytest.param(
            [reported(ParityVerdict.UNDECIDED, 0.001)],
            ("Unknown", "ParityUndecided"),
            "0.001 of 2.1 Undecided",
            id="undecided",
        ),
        pytest.param(
            [reported(ParityVerdict.NOT_RECORDED)], ("Unknown", "ParityNotRecorded"), "NotRecorded", id="not recorded"
        ),
        pytest.param([reported(ParityVerdict.UNFINISHED)], ("Unknown", "ParityPending"), "Unfinished", id="busy"),
    ],
)
def test_the_worst_result_of_the_pods_is_reported(
    status: Build, results: list[AdapterParity | None], condition: tuple[str, str], column: str | None
) -> None:
    got = status(ParityMode.REPORT, *results)
    assert (parity(got), got.parity) == (condition, column)
    ready = find(got.conditions, "Ready")
    assert ready is not None
    assert ready.reason == "Resident", "the adapter is served, whatever the result"


def test_a_failure_is_a_warning_with_the_pod_and_the_cause(status: Build) -> None:
    condition = find(status(ParityMode.REPORT, PASSED, FAILED).conditions, "Parity")
    assert condition is not None
    assert severity_of("AdapterDeployment", condition.reason) is Severity.WARNING
    assert condition.message == f"revision aaaaaaaaaaaa on pod pod-1: {FAILED.message}"


def test_required_parity_keeps_a_revision_from_being_served(status: Build) -> None:
    got = status(ParityMode.REQUIRED, FAILED)
    assert (got.phase, got.reason, got.ready_replicas) == ("Failed", "ParityFailed", 0)
    ready = find(got.conditions, "Ready")
    assert ready is not None
    assert "is not served: parity is required, and its answers differ by 2.1 of 2.1" in ready.message
    assert "(pod pod-0)" in ready.message


def test_a_refused_revision_keeps_its_reason_while_no_pod_has_it(
    status: Build, adapter: Build, pool: Build, start: datetime
) -> None:
    refused = status(ParityMode.REQUIRED, FAILED)
    before = {**refused.manifest(), "observedGeneration": 1}
    observation = AdapterObservation(ARTIFACT, pool(), None, [], {}, Decision(1, "spec.replicas"), "")
    got = plan(adapter(parity=ParityMode.REQUIRED, status=before), observation, start)
    assert (got.phase, got.reason, got.parity) == ("Failed", "ParityFailed", refused.parity)


def test_no_condition_with_parity_off(status: Build) -> None:
    assert parity(status(ParityMode.OFF, None)) is None


def test_pods_are_told_the_mode(adapter: Build, revision: Build) -> None:
    for mode in ParityMode:
        deployment = adapter(status={"revisions": [revision("a").manifest()]}, parity=mode)
        wanted, *_ = PlacementCache().desired([deployment], frozenset())
        assert wanted[ENGINE_NAME].parity is mode
