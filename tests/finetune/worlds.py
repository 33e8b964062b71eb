"""Builders of observations of a FineTuneJob."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.contracts.location import artifact_uri, owned_name
from tunesmith.finetune.observe import Observation
from tunesmith.jobs.observe import JobView, PodView

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
STORE = "s3://tunesmith/store"
UID = "0f0e0d0c-0000-4000-8000-000000000001"
ARTIFACT = {
    "uri": artifact_uri(STORE, "team", "tone", UID),
    "digest": "sha256:" + "a" * 64,
    "sizeBytes": 10,
    "servable": {"vllm": True},
}


def manifest(**spec: Any) -> dict[str, Any]:
    """Return a minimal FineTuneJob with additional fields of the spec."""
    return {
        "apiVersion": "tunesmith.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tone", "namespace": "team", "uid": UID, "generation": 1, "resourceVersion": "7"},
        "spec": {
            "baseModel": {"uri": "s3://models/base"},
            "dataset": {"train": [{"uri": "s3://data/train.jsonl"}]},
            "method": {"lora": {}},
            **spec,
        },
    }


def job(status: dict[str, Any] | None = None, **spec: Any) -> FineTuneJob:
    return FineTuneJob.model_validate({**manifest(**spec), "status": status or {}})


def condition(type_: str, status: str = "True", reason: str = "Valid") -> dict[str, Any]:
    return {"type": type_, "status": status, "reason": reason, "lastTransitionTime": "2026-11-24T11:00:00Z"}


def validated(*attempts: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the status of a job that passed validation."""
    return {"conditions": [condition("Validated"), *more.pop("conditions", [])], "attempts": list(attempts), **more}


def attempt(number: int, outcome: str = "Running", age: timedelta | None = None) -> dict[str, Any]:
    """Return an attempt of the status. `age`: time since it finished."""
    found: dict[str, Any] = {"name": owned_name("tone", UID, str(number)), "outcome": outcome}
    if age is not None:
        found |= {"endTime": (NOW - age).isoformat(), "reason": "StoreUnavailable", "message": "no answer"}
    return found


def pod(age: timedelta = timedelta(minutes=1), **fields: Any) -> PodView:
    return PodView(name="tone-pod", created=NOW - age, **fields)


def kube_job(suffix: str, *pods: PodView, age: timedelta = timedelta(minutes=1), **fields: Any) -> JobView:
    return JobView(name=owned_name("tone", UID, suffix), created=NOW - age, pods=pods, **fields)


def observed(of: FineTuneJob, **fields: Any) -> Observation:
    return Observation(job=of, now=NOW, **fields)
