"""The copies of an adapter follow its load or the user; the pool follows the copies."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from e2e.custom_resources import adapter_manifest, pool_pods, ready_adapter
from e2e.installation import DEMO, InstallationError, apply, delete, get, kubectl, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from openai import OpenAI

CONCURRENCY = 24
"""Three times the demo's target. Answers are short because pods are slow while another starts on the two cores."""
GROWN_SECONDS = 360
SHRUNK_SECONDS = 180
IDLE_SECONDS = 120


def copies(name: str) -> int:
    return int(((get("adapterdeployment", name, DEMO) or {}).get("status") or {}).get("readyReplicas", 0))


def test_load_scales_an_adapter_to_two_pods_and_back(
    client: OpenAI, main_adapter: str, second_adapter: str, questions: list[str]
) -> None:
    for name in (main_adapter, second_adapter):
        ready_adapter(name, 1)
    grown = threading.Event()
    other: set[tuple[int, int]] = set()

    def load(number: int) -> int:
        done = 0
        while not grown.is_set():
            reply = client.chat.completions.create(
                model=f"{DEMO}/{main_adapter}",
                messages=[{"role": "user", "content": f"{questions[number % len(questions)]} ({number})"}],
                max_tokens=8,
            )
            assert reply.model.startswith(f"{DEMO}/{main_adapter}@")
            done += 1
        return done

    def two_copies() -> bool:
        # Not its ready copies: a pod may not answer for a while when another one starts on the same two cores.
        status = (get("adapterdeployment", second_adapter, DEMO) or {})["status"]
        other.add((status["desiredReplicas"], status["replicas"]))
        return copies(main_adapter) == 2

    with ThreadPoolExecutor(CONCURRENCY) as workers:
        running = [workers.submit(load, number) for number in range(CONCURRENCY)]
        try:
            until(f"{main_adapter} on two pods", two_copies, GROWN_SECONDS, interval=1)
            enough = time.monotonic() + 10  # both pods answer for a while
            until("both pods under load", lambda: time.monotonic() > enough, 20)
        finally:
            grown.set()
        answered = [worker.result() for worker in running]
    assert min(answered) > 0
    assert other == {(1, 1)}
    assert "request" in get("adapterdeployment", main_adapter, DEMO)["status"]["desiredReason"]
    ready_adapter(main_adapter, 1, SHRUNK_SECONDS)


def test_manual_scaling_works_without_autoscaling(second_adapter: str, pool: str) -> None:
    kubectl("scale", f"adapterdeployment/{second_adapter}", "--replicas=2", "--namespace", DEMO)
    ready_adapter(second_adapter, 2, GROWN_SECONDS)
    kubectl("scale", f"adapterdeployment/{second_adapter}", "--replicas=1", "--namespace", DEMO)
    ready_adapter(second_adapter, 1, SHRUNK_SECONDS)
    until(f"pool {pool} back on one pod", lambda: len(pool_pods(pool)) == 1, SHRUNK_SECONDS)


def test_manual_scaling_is_refused_with_autoscaling(main_adapter: str) -> None:
    with pytest.raises(InstallationError, match="remove autoscaling first"):
        kubectl("scale", f"adapterdeployment/{main_adapter}", "--replicas=2", "--namespace", DEMO)


def test_an_idle_adapter_is_on_no_pod_and_answers_the_next_request(
    client: OpenAI, main_adapter: str, pool: str, record_property: Callable[[str, object], None]
) -> None:
    job = (get("adapterdeployment", main_adapter, DEMO) or {})["spec"]["adapterFrom"]["fineTuneJob"]["name"]
    autoscaling = {"minReplicas": 0, "maxReplicas": 1, "idleSeconds": 10, "scaleDownDelaySeconds": 0}
    apply(adapter_manifest("seldom", job, pool, autoscaling=autoscaling))
    try:
        until("seldom is idle", lambda: _phase("seldom") == "Idle" and copies("seldom") == 0, IDLE_SECONDS)
        asked = time.monotonic()
        reply = client.chat.completions.create(
            model=f"{DEMO}/seldom", messages=[{"role": "user", "content": "Who are you?"}], max_tokens=4
        )
        record_property("seconds_to_the_answer_of_an_idle_adapter", round(time.monotonic() - asked, 2))
        assert reply.model.startswith(f"{DEMO}/seldom@")
        until("seldom is idle again", lambda: _phase("seldom") == "Idle" and copies("seldom") == 0, IDLE_SECONDS)
    finally:
        delete("adapterdeployment", "seldom", DEMO)


def _phase(name: str) -> str:
    return str(((get("adapterdeployment", name, DEMO) or {}).get("status") or {}).get("phase"))
