"""Builders of the resources and pods that the tables of this folder are made of."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.api.adapterdeployment import AdapterDeployment, Revision, RevisionState
from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.api.servingpool import ServingPool
from tunesmith.contracts.agent import PodState, Residency, ResidencyState
from tunesmith.serving.pod import PoolPod

if TYPE_CHECKING:
    from collections.abc import Callable

START = datetime(2026, 1, 1, tzinfo=UTC)
DIGESTS = {letter: f"sha256:{letter * 64}" for letter in "abcdef"}


@pytest.fixture
def start() -> datetime:
    return START


@pytest.fixture
def pool() -> Callable[..., ServingPool]:
    def build(
        name: str = "base", *, namespace: str = "team", age: int = 0, fingerprint: str | None = "sha256:f", **spec: Any
    ) -> ServingPool:
        return ServingPool.model_validate(
            {
                "metadata": {
                    "name": name,
                    "namespace": namespace,
                    "uid": f"uid-{name}",
                    "generation": 1,
                    "creationTimestamp": (START - timedelta(seconds=age)).isoformat(),
                },
                "spec": {"modelName": "smol", "baseModel": {"uri": "s3://models/smol"}, **spec},
                "status": {"baseModelFingerprint": fingerprint},
            }
        )

    return build


@pytest.fixture
def adapter() -> Callable[..., AdapterDeployment]:
    def build(
        name: str = "pirate",
        *,
        namespace: str = "team",
        age: int = 0,
        status: dict[str, Any] | None = None,
        **spec: Any,
    ) -> AdapterDeployment:
        return AdapterDeployment.model_validate(
            {
                "metadata": {
                    "name": name,
                    "namespace": namespace,
                    "uid": f"uid-{name}",
                    "generation": 1,
                    "creationTimestamp": (START - timedelta(seconds=age)).isoformat(),
                },
                "spec": {"adapterFrom": {"fineTuneJob": {"name": "job"}}, **spec},
                "status": status or {},
            }
        )

    return build


@pytest.fixture
def job() -> Callable[..., FineTuneJob]:
    def build(**status: Any) -> FineTuneJob:
        return FineTuneJob.model_validate(
            {
                "metadata": {"name": "job", "namespace": "team", "uid": "uid-job"},
                "spec": {
                    "baseModel": {"uri": "s3://models/smol"},
                    "dataset": {"train": [{"uri": "s3://data/rows.jsonl"}]},
                    "method": {"lora": {}},
                },
                "status": status,
            }
        )

    return build


@pytest.fixture
def revision() -> Callable[..., Revision]:
    def build(letter: str, model: str = "team/pirate", state: str = "Pending", ready: int = 0) -> Revision:
        return Revision(
            digest=DIGESTS[letter],
            engine_name=f"{model}@{letter * 12}",
            uri=f"s3://store/team/job-{letter}/artifact",
            state=RevisionState(state),
            ready_replicas=ready,
        )

    return build


@pytest.fixture
def pod() -> Callable[..., PoolPod]:
    def build(name: str, *, ready: bool = True, is_reporting: bool = True, engine: bool = True, **more: Any) -> PoolPod:
        """`holds`: residency by engine name, as a state or as (state, message, permanent)."""
        adapters = []
        for engine_name, entry in more.pop("holds", {}).items():
            state, message, permanent = entry if isinstance(entry, tuple) else (entry, "", False)
            adapters.append(
                Residency(
                    engine_name=engine_name,
                    digest="",
                    state=ResidencyState(state),
                    message=message,
                    permanent=permanent,
                )
            )
        fields: dict[str, Any] = {
            "namespace": "team",
            "uid": f"uid-{name}",
            "address": "127.0.0.1",
            "created": START,
            "gate": ready or None,
            "deletion_cost": None,
            "stopping": False,
            "problem": None,
            "state": PodState(
                engine_ready=engine,
                base_model_fingerprint="sha256:f",
                draining=more.pop("draining", False),
                problem=more.pop("problem_of_agent", ""),
                stalled=more.pop("stalled", ""),
                adapters=adapters,
            ),
            "is_reporting": is_reporting,
            **more,
        }
        return PoolPod(name=name, ready=ready, **fields)

    return build
