"""Metrics of the agent: the engine's totals are counters that restart with the engine."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tunesmith.api.parity import ParityVerdict
from tunesmith.contracts.agent import AdapterParity, PodState, Residency, ResidencyState
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


def test_each_revision_has_its_parity_loads_and_size_until_it_leaves_the_pod() -> None:
    metrics, digest = Metrics(), "sha256:" + "a" * 64
    parity = AdapterParity(verdict=ParityVerdict.PASSED, distance=0.004, gap=2.1)
    checked = Residency(
        engine_name="team/a@1",
        digest=digest,
        state=ResidencyState.RESIDENT,
        size_bytes=500,
        loads=2,
        load_seconds=0.25,
        parity=parity,
    )
    waiting = Residency(engine_name="team/b@1", digest=digest, state=ResidencyState.DOWNLOADING)

    def figures() -> dict[tuple[str, str], float]:
        return {
            (sample.name.removeprefix("tunesmith_agent_adapter_"), sample.labels["model"]): sample.value
            for family in text_string_to_metric_families(metrics.text().decode())
            for sample in family.samples
            if sample.name.startswith("tunesmith_agent_adapter_") and "model" in sample.labels
        }

    metrics.residencies(PodState(adapters=[checked, waiting]))
    assert figures() == {
        ("resident", "team/a@1"): 1,
        ("resident", "team/b@1"): 0,
        ("loads_total", "team/a@1"): 2,
        ("latest_load_seconds", "team/a@1"): 0.25,
        ("file_bytes", "team/a@1"): 500,
        ("parity", "team/a@1"): 1,
        ("parity_distance_nats", "team/a@1"): 0.004,
        ("parity_gap_nats", "team/a@1"): 2.1,
    }
    assert b'tunesmith_agent_adapter_parity{model="team/a@1",verdict="Passed"} 1.0' in metrics.text()
    metrics.residencies(PodState(adapters=[waiting]))
    assert figures() == {("resident", "team/b@1"): 0}
