from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from tests.gateway.gateway_rig import adapter_manifest, eventually
from tunesmith.contracts.agent import metrics_tokens
from tunesmith.gateway.demand import Demand
from tunesmith.gateway.metrics import Metrics
from tunesmith.gateway.usage import TokenCounts

if TYPE_CHECKING:
    from tests.gateway.gateway_rig import Rig

PIRATE = "team/pirate@aaaaaaaaaaaa"


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = b"".join(metrics.exposition()).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_can_read_the_exposition() -> None:
    demand = Demand()
    demand.add_running("team/a", "team/a@1", 3)
    metrics = Metrics(demand, lambda _: True)
    for seconds in (0.01, 0.2, 1000.0):
        metrics.finished("team/a@1", 200, seconds)
    metrics.finished("", 404, 0.5)
    metrics.streamed("team/a@1", 0.2, 0.02)
    metrics.streamed("team/a@1", 0.2, None)
    metrics.generated("team/a@1", TokenCounts(7, 5, 12))
    metrics.not_started("draining")
    metrics.malformed()
    seen = samples(metrics)
    a = (("model", "team/a"), ("revision", "1"))
    name = "tunesmith_gateway_request_duration_seconds"
    assert seen["tunesmith_gateway_requests_total", (("code", "200"), *a)] == 3
    assert seen["tunesmith_gateway_requests_total", (("code", "404"), ("model", ""), ("revision", ""))] == 1
    assert seen["tunesmith_gateway_sequences_running", a] == 3
    assert seen[f"{name}_bucket", (("le", "0.01"), *a)] == 1
    assert seen[f"{name}_bucket", (("le", "0.25"), *a)] == 2
    assert seen[f"{name}_bucket", (("le", "300.0"), *a)] == 2
    assert seen[f"{name}_bucket", (("le", "+Inf"), *a)] == 3
    assert seen[f"{name}_count", a] == 3
    assert seen[f"{name}_sum", a] == 1000.21
    assert seen["tunesmith_gateway_time_to_first_token_seconds_count", a] == 2
    assert seen["tunesmith_gateway_time_per_output_token_seconds_count", a] == 1
    assert seen["tunesmith_gateway_tokens_total", (("kind", "prompt"), *a)] == 7
    assert seen["tunesmith_gateway_tokens_total", (("kind", "completion"), *a)] == 5
    assert seen["tunesmith_gateway_failed_attempts_total", (("reason", "draining"),)] == 1
    assert seen["tunesmith_gateway_malformed_requests_total", ()] == 1


def test_series_of_deleted_models_are_removed() -> None:
    models = {"team/a", "team/b"}
    metrics = Metrics(Demand(), models.__contains__)
    for model in ("team/a", "team/b", ""):
        metrics.finished(model, 200, 0.1)
    models.remove("team/a")
    labels = {dict(labels).get("model") for _, labels in samples(metrics)}
    assert labels & {"team/a", "team/b", ""} == {"team/b", ""}


def test_series_of_deleted_models_are_removed_without_a_scrape() -> None:
    metrics = Metrics(Demand(), lambda _: False)
    for number in range(10_000):
        metrics.finished(f"team/{number}", 200, 0.1)
    assert len(metrics._series) < 1000


def test_pieces_stay_small_with_many_models() -> None:
    metrics = Metrics(Demand(), lambda _: True)
    for number in range(10_000):
        metrics.finished(f"team/{number}", 200, 0.1)
    assert max(map(len, metrics.exposition())) < 100_000


async def test_requests_are_answered_during_a_scrape_of_many_models(rig: Rig) -> None:
    rig.watches.put(adapter_manifest("pirate"))
    await rig.add_pod(PIRATE)
    metrics = rig.gateway.metrics
    metrics._exists = lambda _: True
    for number in range(3000):
        metrics.finished(f"team/{number}", 200, 0.1)
    (token, *_) = metrics_tokens(rig.pods[0].keys)
    url, headers = f"{rig.internal_url}/metrics", {"Authorization": f"Bearer {token}"}
    answered = asyncio.Event()

    async def scrape() -> bool:
        async with rig.http.get(url, headers=headers) as response:
            size = 0
            async for chunk in response.content.iter_any():
                size += len(chunk)
                if size > 100_000 and not answered.is_set():
                    await answered.wait()
            return size > 3_000_000

    scraping = asyncio.create_task(scrape())
    assert (await rig.chat("pirate"))[0] == 200
    answered.set()
    assert await scraping
    await eventually(lambda: not rig.gateway.demand.running, "nothing runs")
