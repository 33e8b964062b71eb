from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from tunesmith.api.conditions import CONDITIONS, REASONS, Condition, ConditionStatus, EventReason, Severity, severity_of
from tunesmith.contracts.transitions import NewEvent, new_events, unreadable_status

NOW = datetime(2026, 1, 1, tzinfo=UTC)
TRUE, FALSE, UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN


def condition(type_: str, status: ConditionStatus, reason: str, message: str = "") -> Condition:
    return Condition(type=type_, status=status, reason=reason, message=message, last_transition_time=NOW)


def test_a_change_is_reported_once_with_its_severity() -> None:
    waits = [
        condition("Resolved", FALSE, "FineTuneJobNotFound", "waits for job"),
        condition("Ready", FALSE, "FineTuneJobNotFound", "waits for job"),
        condition("Progressing", FALSE, "FineTuneJobNotFound", "waits for job"),
    ]
    assert new_events("AdapterDeployment", [], waits) == [NewEvent("FineTuneJobNotFound", "waits for job", "Normal")]
    assert new_events("AdapterDeployment", waits, waits) == []
    broken = [waits[0], condition("Ready", FALSE, "RevisionFailed", "flipped byte"), waits[2]]
    assert new_events("AdapterDeployment", waits, broken) == [NewEvent("RevisionFailed", "flipped byte", "Warning")]
    ready = [condition("Ready", TRUE, "Resident", "it answers")]
    assert new_events("AdapterDeployment", broken, ready) == [NewEvent("Resident", "it answers", "Normal")]


def test_a_detail_is_reported_only_if_it_replaces_a_warning() -> None:
    well = [condition("Degraded", FALSE, "AsExpected", "no pod reports a problem")]
    assert new_events("ServingPool", [], well) == []
    bad = [condition("Degraded", TRUE, "ImagePullFailed", "no image")]
    assert new_events("ServingPool", well, bad) == [NewEvent("ImagePullFailed", "no image", "Warning")]
    assert new_events("ServingPool", bad, well) == [NewEvent("AsExpected", "no pod reports a problem", "Normal")]


def test_a_refused_write_of_a_job_and_its_end_are_reported() -> None:
    created = [condition("Validated", UNKNOWN, "PodPending", "the validation Job is being created")]
    refused = [condition("Validated", UNKNOWN, "WriteRefused", "exceeded quota")]
    assert new_events("FineTuneJob", [], created) == []
    assert new_events("FineTuneJob", created, refused) == [NewEvent("WriteRefused", "exceeded quota", "Warning")]
    assert new_events("FineTuneJob", refused, created) == [NewEvent("PodPending", created[0].message, "Normal")]


def test_a_reason_of_another_release_is_a_detail() -> None:
    later = [condition("Ready", TRUE, "Teleported", "it is there")]
    assert severity_of("AdapterDeployment", "Teleported") is Severity.DETAIL
    assert new_events("AdapterDeployment", [], later) == []


@pytest.mark.parametrize("kind", REASONS)
def test_each_reason_of_a_kind_is_declared_once_and_described(kind: str) -> None:
    reasons = [reason for enum in (*REASONS[kind], EventReason) for reason in enum]
    assert len({str(reason) for reason in reasons}) == len(reasons)
    for described in (*reasons, *CONDITIONS[kind]):
        assert described.description.endswith((".", "…")), described
        assert len(described) <= 64


def manifest(kind: str, status: object = None) -> dict[str, Any]:
    metadata = {"name": "x", "namespace": "team", "uid": "u", "generation": 7, "resourceVersion": "5"}
    return {"kind": kind, "metadata": metadata, "spec": {}} | ({} if status is None else {"status": status})


@pytest.mark.parametrize(
    "status", [None, {}, "text", [1], {"conditions": 5}, {"conditions": [{"type": "Degraded"}, 3]}, {"replicas": 2}]
)
def test_a_spec_that_cannot_be_read_has_a_condition_and_the_status_stays(status: object) -> None:
    found = unreadable_status(manifest("ServingPool", status), "spec.replicas is not a number\x1b[0m\n", NOW)
    conditions = {condition["type"]: condition for condition in found["conditions"]}
    assert conditions["Degraded"]["status"] == "True"
    assert conditions["Available"]["status"] == "Unknown"
    assert {condition["reason"] for condition in conditions.values()} == {"InvalidSpec"} == {found["reason"]}
    assert conditions["Degraded"]["message"] == "spec.replicas is not a number"
    assert conditions["Degraded"]["observedGeneration"] == 7
    assert found.get("replicas") == (2 if status == {"replicas": 2} else None)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("AdapterDeployment", {"Resolved": "False", "Ready": "False"}),
        ("FineTuneJob", {"Validated": "False"}),
    ],
)
def test_unreadable_resources_have_false_conditions(kind: str, expected: dict[str, str]) -> None:
    found = unreadable_status(manifest(kind), "x", NOW)
    assert {condition["type"]: condition["status"] for condition in found["conditions"]} == expected


def test_the_status_of_a_newer_release_is_kept() -> None:
    status = {"attempts": [{"name": "x-1", "outcome": "Paused"}], "phase": "Running"}
    found = unreadable_status(manifest("FineTuneJob", status), "status.attempts.0.outcome", NOW)
    assert {name: found[name] for name in status} == status
