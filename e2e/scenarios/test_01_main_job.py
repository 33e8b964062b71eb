"""Result of the demo: a trained adapter whose answers differ from its base's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from e2e.custom_resources import engine_name, ready_adapter
from e2e.installation import DEMO, SYSTEM, condition, get, items, kubectl

if TYPE_CHECKING:
    from collections.abc import Callable

    from openai import OpenAI

    from e2e.installation import Object

    Answer = Callable[[str, str], tuple[str, str]]


def test_held_out_loss_falls_by_at_least_30_percent(main_job: Object) -> None:
    evaluation = main_job["status"]["evaluation"]
    assert evaluation["lossReductionPercent"] >= 30
    assert evaluation["loss"] < 0.7 * evaluation["baseLoss"]


def test_the_job_ran_once_and_its_status_reports_the_result(main_job: Object) -> None:
    status = main_job["status"]
    assert [attempt["outcome"] for attempt in status["attempts"]] == ["Succeeded"]
    for kind in ("Validated", "Published", "Complete"):
        assert condition(main_job, kind)["status"] == "True", kind
    assert status["artifact"]["digest"].startswith("sha256:")
    assert status["artifact"]["servable"]["vllm"] is True
    assert status["resolved"]["baseModelFingerprint"]
    assert status["preflight"]["rows"] > 0


def test_adapter_and_base_answer_differently_and_replies_name_the_revision(
    answer: Answer, base_model: str, main_adapter: str, questions: list[str]
) -> None:
    revision = engine_name(ready_adapter(main_adapter))
    for question in questions:
        base, adapter = answer(base_model, question), answer(f"{DEMO}/{main_adapter}", question)
        assert base[1] != adapter[1]
        assert adapter[0] == revision


def test_streaming_gives_the_same_answer(
    client: OpenAI, answer: Answer, main_adapter: str, questions: list[str]
) -> None:
    model = f"{DEMO}/{main_adapter}"
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": questions[0]}],
        max_tokens=16,
        temperature=0,
        stream=True,
    )
    parts = [part.choices[0].delta.content or "" for part in stream if part.choices]
    assert len(parts) > 2
    assert "".join(parts) == answer(model, questions[0])[1]


def test_models_lists_the_models_that_the_key_may_use(client: OpenAI, base_model: str, main_adapter: str) -> None:
    assert {base_model, f"{DEMO}/{main_adapter}"} <= {model.id for model in client.models.list()}


def test_all_pods_run_in_namespaces_that_enforce_restricted() -> None:
    for namespace in (SYSTEM, DEMO):
        found = get("namespace", namespace, namespace) or {}
        assert found["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
        assert items("pods", namespace)
        events = kubectl("get", "events", "--namespace", namespace, "--field-selector", "reason=FailedCreate")
        assert "PodSecurity" not in events
