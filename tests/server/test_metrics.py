"""Metrics of the agent: the engine's totals are counters that restart with the engine."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tunesmith_server.engine import EngineState
from tunesmith_server.metrics import Metrics


def state(requests: int, running: int = 0) -> EngineState:
    total = {"requests": requests, "promptTokens": 10 * requests, "completionTokens": 5 * requests}
    return EngineState.model_validate(
        {"bootId": "a", "draining": False, "inFlight": {"team/a": running}, "totals": {"team/a": total}}
    )


def samples(metrics: Metrics) -> dict[tuple[str, str], tuple[str, float]]:
    return {
        (sample.name, sample.labels.get("kind", "")): (family.type, sample.value)
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def test_totals_of_the_engine_are_counters() -> None:
    metrics = Metrics()
    assert not [name for name, _ in samples(metrics) if name.startswith("tunesmith_agent_engine_requests")]
    metrics.engine_totals(state(7, running=2))
    seen = samples(metrics)
    assert seen["tunesmith_agent_engine_requests_running", ""] == ("gauge", 2)
    assert seen["tunesmith_agent_engine_requests_total", ""] == ("counter", 7)
    assert seen["tunesmith_agent_engine_tokens_total", "prompt"] == ("counter", 70)
    assert seen["tunesmith_agent_engine_tokens_total", "completion"] == ("counter", 35)
    metrics.engine_totals(state(1))
    assert samples(metrics)["tunesmith_agent_engine_requests_total", ""] == ("counter", 1)
