"""The engine is killed while two adapters serve: both return at once, and no model answers for another."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from openai import APIConnectionError, APIStatusError, APITimeoutError

from e2e.containers import container_status, processes_of
from e2e.custom_resources import engine_name, pool_pods, ready_adapter
from e2e.installation import DEMO, condition, get, until

if TYPE_CHECKING:
    from collections.abc import Callable

    Answer = Callable[[str, str], tuple[str, str]]

ENGINE_UP_SECONDS = 240
RESIDENT_SECONDS = 30


def engine_status(pool: str) -> dict[str, object]:
    [pod] = pool_pods(pool)
    return container_status(pod, "engine")


def engine_processes(container: str) -> list[int]:
    """The processes of a container without its supervisor."""
    command_lines = {process: Path(f"/proc/{process}/cmdline").read_bytes() for process in processes_of(container)}
    found = [process for process, command in command_lines.items() if b"tunesmith_supervisor" not in command]
    assert len(found) == len(command_lines) - 1
    return found


def latest_crash(pool: str) -> object:
    return get("servingpool", pool, DEMO)["status"].get("latestCrash")


def test_both_adapters_return_and_no_model_answers_for_another(
    answer: Answer,
    base_model: str,
    main_adapter: str,
    second_adapter: str,
    pool: str,
    questions: list[str],
    record_property: Callable[[str, object], None],
) -> None:
    question = questions[0]
    models = [base_model, f"{DEMO}/{main_adapter}", f"{DEMO}/{second_adapter}"]
    revisions = [base_model, *(engine_name(ready_adapter(name)) for name in (main_adapter, second_adapter))]
    expected = {
        model: (revision, answer(model, question)[1]) for model, revision in zip(models, revisions, strict=True)
    }
    assert len({text for _, text in expected.values()}) == 3

    before, latest = engine_status(pool), latest_crash(pool)
    for process in engine_processes(str(before["containerID"])):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)

    up_at: float | None = None
    resident_after: float | None = None
    deadline = time.monotonic() + ENGINE_UP_SECONDS + RESIDENT_SECONDS
    until("the pool reports the crash", lambda: latest_crash(pool) != latest, 30)
    assert "killed by SIGKILL" in str(latest_crash(pool))
    while resident_after is None:
        assert time.monotonic() < deadline, "the adapters were not resident again in time"
        for model in models:
            try:
                assert answer(model, question) == expected[model]
            except (APIStatusError, APIConnectionError, APITimeoutError):
                continue  # refused while the engine is down
        now = engine_status(pool)
        assert now["restartCount"] == before["restartCount"]  # the supervisor restarts it, not the kubelet
        if up_at is None and now["ready"]:
            up_at = time.monotonic()
        adapters = [get("adapterdeployment", name, DEMO) for name in (main_adapter, second_adapter)]
        if up_at is not None and all(condition(adapter, "Ready")["status"] == "True" for adapter in adapters):
            resident_after = time.monotonic() - up_at
    record_property("resident again after seconds", round(resident_after, 1))
    assert resident_after <= RESIDENT_SECONDS
    for model in models:
        assert until(f"{model} answers", lambda model=model: _tried(answer, model, question), 60) == expected[model]


def _tried(answer: Answer, model: str, question: str) -> tuple[str, str] | None:
    try:
        return answer(model, question)
    except (APIStatusError, APIConnectionError, APITimeoutError):
        return None
