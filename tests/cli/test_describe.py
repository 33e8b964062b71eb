"""Resources in words, and when `tunesmith wait` is over."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tunesmith.api.adapterdeployment import AdapterDeployment
from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.api.servingpool import ServingPool
from tunesmith.cli.describe import age, lines, next_step, rollout_lines, state, summary, waiting
from tunesmith.cli.errors import CliError
from tunesmith.cli.kinds import Kind, parse, parse_kind
from tunesmith.cli.wait import final_failure, serves

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
DIGEST = "sha256:" + "a" * 64
ARTIFACT = {"uri": "s3://store/a", "digest": DIGEST, "sizeBytes": 1, "servable": {"vllm": True}}
EVALUATION = {"baseLoss": 3.0, "loss": 1.5, "lossReductionPercent": 50.0}


def condition(type_: str, status: str, reason: str, message: str = "") -> dict[str, Any]:
    fields = {"type": type_, "status": status, "reason": reason, "message": message}
    return {**fields, "lastTransitionTime": NOW.isoformat()}


def job(**status: Any) -> FineTuneJob:
    spec = {
        "baseModel": {"uri": "s3://models/base"},
        "dataset": {"train": [{"uri": "s3://data/train.jsonl"}]},
        "method": {"lora": {}},
    }
    return FineTuneJob.model_validate(
        {"metadata": {"name": "sail", "namespace": "team"}, "spec": spec, "status": status}
    )


def adapter(**status: Any) -> AdapterDeployment:
    metadata = {"name": "sail", "namespace": "team", "generation": 2}
    spec = {"adapterFrom": {"fineTuneJob": {"name": "sail"}}}
    return AdapterDeployment.model_validate(
        {"metadata": metadata, "spec": spec, "status": {"observedGeneration": 2, **status}}
    )


def pool(**status: Any) -> ServingPool:
    metadata = {"name": "small", "namespace": "platform", "generation": 1}
    spec = {"modelName": "base", "baseModel": {"uri": "s3://models/base"}}
    return ServingPool.model_validate(
        {"metadata": metadata, "spec": spec, "status": {"observedGeneration": 1, **status}}
    )


def revision(state: str, pods: int, message: str | None = None) -> dict[str, Any]:
    fields = {"digest": DIGEST, "engineName": "team/sail@aaaaaaaaaaaa", "state": state, "readyReplicas": pods}
    return fields | ({"message": message} if message else {})


RESOLVED = condition("Resolved", "True", "Resolved")
COMPLETE = {"phase": "Complete", "conditions": [condition("Complete", "True", "Completed")]}
FAILED = {"phase": "Failed", "conditions": [condition("Failed", "True", "OutOfMemory", "no memory")]}
SERVING = {
    "conditions": [RESOLVED, condition("Ready", "True", "Resident")],
    "revisions": [revision("Resident", 1)],
    "pool": {"name": "small", "namespace": "platform"},
    "readyReplicas": 1,
    "desiredReplicas": 1,
}


@pytest.mark.parametrize(
    ("resource", "line", "step"),
    [
        (job(), "waiting for the operator", "tunesmith wait job sail -n team"),
        (
            job(**COMPLETE, evaluation=EVALUATION, artifact=ARTIFACT),
            "loss 3.000 before, 1.500 after (-50.0 %)",
            "tunesmith deploy sail -n team",
        ),
        (
            job(**COMPLETE, evaluation=EVALUATION | {"lossReductionPercent": -4.2}, artifact=ARTIFACT),
            "loss 3.000 before, 1.500 after (+4.2 %)",
            "tunesmith deploy sail -n team",
        ),
        (
            job(**COMPLETE, evaluation=EVALUATION | {"publishedStep": 12}, artifact=ARTIFACT),
            "loss 3.000 before, 1.500 after (-50.0 %), at step 12",
            "tunesmith deploy sail -n team",
        ),
        (
            job(**COMPLETE, artifact={**ARTIFACT, "servable": {"vllm": False, "reason": "IA3"}}),
            "complete, without held-out rows",
            "tunesmith artifact download sail -n team",
        ),
        (job(**FAILED), "OutOfMemory: no memory", "tunesmith logs sail -n team"),
        (adapter(), "the operator has not processed it yet", "tunesmith wait adapter sail -n team"),
        (
            adapter(conditions=[condition("Resolved", "False", "PoolNotFound", "waits for pool x")]),
            "waits for pool x",
            "tunesmith wait adapter sail -n team",
        ),
        (adapter(**SERVING), "1/1 pods of platform/small", "tunesmith chat team/sail"),
        (
            pool(
                conditions=[condition("Available", "True", "PodsReady")],
                readyReplicas=1,
                adapterCapacity=4,
                registeredAdapters=1,
            ),
            "1/? pods, 3 more adapters fit, s3://models/base",
            "tunesmith deploy JOB --pool platform/small",
        ),
    ],
)
def test_a_resource_has_a_summary_and_a_next_command(
    resource: FineTuneJob | AdapterDeployment | ServingPool, line: str, step: str
) -> None:
    assert summary(resource, NOW) == line
    assert next_step(resource) == step


def test_the_details_of_a_job_name_what_it_cost_and_where_the_artifact_is() -> None:
    shown = dict(lines(job(**COMPLETE, evaluation=EVALUATION, artifact=ARTIFACT, gpuSeconds=7500)))
    assert shown["cost"] == "2 h 5 min of GPU time (7500 GPU seconds)"
    assert (shown["artifact"], shown["digest"], shown["servable"]) == (
        "s3://store/a",
        DIGEST,
        "by vLLM, in pools that accept rank 16",
    )


def test_the_details_of_an_adapter_show_why_it_does_not_serve() -> None:
    shown = dict(lines(adapter(conditions=[condition("Resolved", "False", "PoolNotFound", "waits for pool x")])))
    assert shown["reason"] == "waits for pool x"


@pytest.mark.parametrize(("count", "text"), [(1, "1 pod"), (2, "2 pods")])
def test_the_details_of_an_adapter_show_the_pods_of_a_revision(count: int, text: str) -> None:
    shown = dict(lines(adapter(**{**SERVING, "revisions": [revision("Resident", count)]})))
    assert shown["revision"] == f"aaaaaaaaaaaa  Resident on {text}"


@pytest.mark.parametrize(
    ("resource", "over"),
    [
        (adapter(), False),
        (adapter(**SERVING), True),
        (adapter(**{**SERVING, "observedGeneration": 1}), False),
        (adapter(**{**SERVING, "revisions": [revision("Loading", 0), revision("Resident", 1)]}), False),
        (adapter(**{**SERVING, "conditions": [condition("Resolved", "False", "FineTuneJobRunning")]}), False),
        (pool(conditions=[condition("Available", "True", "PodsReady")]), True),
        (pool(conditions=[condition("Available", "False", "NoPodReady")]), False),
    ],
    ids=["unseen", "serving", "an older spec", "the older version", "next job trains", "pool", "pool without pods"],
)
def test_waiting_is_over_once_the_newest_spec_is_served(
    resource: AdapterDeployment | ServingPool,
    *,
    over: bool,
) -> None:
    assert serves(resource) is over
    assert final_failure(resource) is None


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        ({"conditions": [condition("Resolved", "False", "FineTuneJobFailed", "job x failed")]}, "job x failed"),
        ({"conditions": [condition("Resolved", "False", "RankTooHigh", "rank 17")]}, "rank 17"),
        (
            {"conditions": [RESOLVED], "revisions": [revision("Failed", 0, "rank 64 is above 32")]},
            "the newest version cannot be loaded: rank 64 is above 32",
        ),
    ],
)
def test_waiting_stops_if_only_a_change_of_the_spec_helps(status: dict[str, Any], sentence: str) -> None:
    assert final_failure(adapter(**status)) == sentence
    assert final_failure(adapter(**{**status, "observedGeneration": 1})) is None


@pytest.mark.parametrize("word", ["job", "jobs", "ftj", "FineTuneJob", "finetunejobs"])
def test_a_kind_is_found_by_all_its_names(word: str) -> None:
    assert parse_kind(word) is Kind.JOB


def test_a_resource_of_another_release_is_an_error_message() -> None:
    document = {"metadata": {"name": "a", "namespace": "team"}, "spec": {"later": 1}}
    with pytest.raises(CliError, match=r"ServingPool team/a does not fit this release of tunesmith: spec.modelName"):
        parse(Kind.POOL, document)


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5s"), (300, "5m"), (7200, "2h"), (200_000, "2d")], ids=["5s", "5m", "2h", "2d"]
)
def test_an_age_is_written_as_kubectl_does(seconds: int, text: str) -> None:
    assert age(NOW - timedelta(seconds=seconds), NOW) == text
    assert age(None, NOW) == "?"


def test_an_available_pool_is_not_waiting() -> None:
    assert waiting(pool(conditions=[condition("Available", "True", "PodsReady")])) == ""


GIVEN_UP = "revision bbbbbbbbbbbb was given up: ErrorRate: 0.2 is above the max, 0.05"
ROLLING_OUT = {
    "phase": "Progressing",
    "digest": DIGEST,
    "stable": {"digest": f"sha256:{'b' * 64}"},
    "step": 1,
    "steps": 2,
    "startedAt": "2026-01-01T00:00:00Z",
    "message": "step 1 of 2 lasts 600 seconds",
    "measures": [
        {"measure": "ErrorRate", "value": 0.01, "max": 0.05, "passed": True},
        {"measure": "Query", "query": "up", "max": 1.0, "message": "no result"},
    ],
}
SHARED = {
    **SERVING,
    "phase": "Ready",
    "revisions": [
        {**revision("Resident", 1), "weight": 10},
        {**revision("Resident", 2), "digest": f"sha256:{'b' * 64}", "weight": 90},
    ],
    "rollout": ROLLING_OUT,
}


def test_a_rollout_is_shown_with_its_measures() -> None:
    resource = adapter(**SHARED)
    assert rollout_lines(resource) == [
        ("state", "Progressing"),
        ("new", "aaaaaaaaaaaa"),
        ("old", "bbbbbbbbbbbb"),
        ("step", "1 of 2"),
        ("requests", "10 % to aaaaaaaaaaaa, 1 pod"),
        ("requests", "90 % to bbbbbbbbbbbb, 2 pods"),
        ("measure", "ErrorRate: 0.01 (max 0.05), passes"),
        ("measure", "up: ? (max 1), no result"),
        ("message", "step 1 of 2 lasts 600 seconds"),
    ]
    assert dict(lines(resource))["rollout"] == "step 1 of 2 lasts 600 seconds"
    assert (state(resource), summary(resource, NOW)) == ("RollingOut", "step 1 of 2 lasts 600 seconds")
    assert rollout_lines(adapter(**SERVING)) == []


def test_a_version_that_was_given_up_is_no_success() -> None:
    conditions = [
        *SERVING["conditions"],
        condition("Progressing", "False", "RolledBack", GIVEN_UP),
        condition("Stalled", "True", "RolledBack", GIVEN_UP),
    ]
    resource = adapter(**{**SERVING, "phase": "Ready", "conditions": conditions})
    assert (state(resource), summary(resource, NOW)) == ("Stalled", GIVEN_UP)
    assert final_failure(resource) == GIVEN_UP


def test_a_new_version_serves_once_its_rollout_is_over() -> None:
    assert not serves(adapter(**SHARED))


def test_a_rollout_shows_how_the_answers_of_a_shadow_differ() -> None:
    comparison = {
        "answers": 412,
        "dropped": 3,
        "shadowTokens": 138.24,
        "servedTokens": 151.9,
        "shadowRefusals": 0.0024,
        "servedRefusals": 0.0,
    }
    rollout = {
        "phase": "Progressing",
        "digest": DIGEST,
        "startedAt": NOW.isoformat(),
        "step": 1,
        "steps": 2,
        "comparison": comparison,
    }
    shadow = {**revision("Resident", 1), "weight": 0, "shadowPercent": 20}
    found = rollout_lines(adapter(rollout=rollout, revisions=[shadow]))
    assert ("mirrored", "20 % to aaaaaaaaaaaa, 1 pod") in found
    assert ("compared", "412 answers; 0 failed, 3 were not mirrored") in found
    assert ("tokens per answer", "138.2 (clients got 151.9)") in found
    assert ("refusals", "0.0024 (clients got 0)") in found
    assert "log-probability" not in dict(found)
