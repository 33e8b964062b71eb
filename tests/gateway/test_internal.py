"""The internal port: demand, metrics, probes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.gateway.gateway_rig import GATEWAY_KEYS, adapter_manifest, eventually
from tunesmith.contracts.agent import AdapterDemand, GatewayDemand, demand_tokens, metrics_tokens
from tunesmith.contracts.load import RATE_SECONDS

if TYPE_CHECKING:
    from tests.gateway.gateway_rig import Rig

PIRATE = "team/pirate@aaaaaaaaaaaa"


async def test_demand_is_streamed_to_clients_with_the_token(rig: Rig) -> None:
    rig.watches.put(adapter_manifest("pirate"))
    pod = await rig.add_pod(PIRATE)
    pod.gate.clear()
    for token in ("", "Bearer ", "Bearer wrong", f"Bearer {rig.key}"):
        async with rig.http.get(f"{rig.internal_url}/v1/demand", headers={"Authorization": token}) as response:
            assert response.status == 401
    headers = {"Authorization": f"Bearer {demand_tokens(GATEWAY_KEYS)[0]}"}
    async with asyncio.timeout(120), rig.http.get(f"{rig.internal_url}/v1/demand", headers=headers) as response:

        async def until(running: int) -> AdapterDemand:
            while True:
                line = GatewayDemand.model_validate_json(await response.content.readline())
                demand = line.models.get("team/pirate", AdapterDemand())
                if (demand.running, demand.waiting) == (running, 0):
                    return demand

        await until(0)
        await until(0)
        requests = [asyncio.create_task(rig.chat("pirate")) for _ in range(3)]
        began = await until(3)
        assert 0 < began.arrival_rate <= 3 / RATE_SECONDS
        assert began.service_seconds is None
        pod.gate.set()
        await asyncio.gather(*requests)
        finished = await until(0)
        assert finished.arrival_rate > 0, "they arrived a moment ago"
        assert finished.service_seconds is not None
        assert 0 < finished.service_seconds < 120


async def test_a_request_arrives_once_however_often_it_is_sent_and_refusals_take_no_time(rig: Rig) -> None:
    rig.watches.put(adapter_manifest("pirate"))
    pod = await rig.add_pod(PIRATE)
    pod.draining = True
    assert (await rig.chat("pirate"))[0] == 503
    demand = rig.gateway.demand.snapshot().models["team/pirate"]
    assert 0 < demand.arrival_rate <= 1 / RATE_SECONDS
    assert demand.service_seconds is None


async def test_held_requests_count_as_demand(rig: Rig) -> None:
    rig.watches.put(adapter_manifest("pirate"))
    await rig.add_pod()
    request = asyncio.create_task(rig.chat("pirate"))
    await eventually(lambda: rig.gateway.demand.waiting == {"team/pirate": 1}, "the request waits")
    assert (await request)[0] == 503


async def test_metrics_count_by_model_and_code_and_never_by_unknown_names(rig: Rig) -> None:
    rig.watches.put(adapter_manifest("pirate"))
    await rig.add_pod(PIRATE)
    await rig.chat("pirate")
    await rig.chat("team/pirate")
    await rig.chat("unheard-of")
    token = metrics_tokens(GATEWAY_KEYS)[0]
    wrong = [{}, {"Authorization": f"Bearer {demand_tokens(GATEWAY_KEYS)[0]}"}, {"Authorization": token}]
    for headers in wrong:
        async with rig.http.get(f"{rig.internal_url}/metrics", headers=headers) as response:
            assert response.status == 401
            assert "team" not in await response.text()
    headers = {"Authorization": f"Bearer {token}"}
    async with rig.http.get(f"{rig.internal_url}/metrics", headers=headers) as response:
        text = await response.text()
    assert 'tunesmith_gateway_requests_total{code="200",model="team/pirate",revision="aaaaaaaaaaaa"} 2.0' in text
    assert 'tunesmith_gateway_requests_total{code="404",model="",revision=""} 1.0' in text
    assert 'tunesmith_gateway_request_duration_seconds_count{model="team/pirate",revision="aaaaaaaaaaaa"} 2.0' in text
    assert "unheard-of" not in text


async def test_a_gateway_that_shuts_down_is_not_ready_but_still_answers(rig: Rig) -> None:
    rig.watches.put(adapter_manifest("pirate"))
    await rig.add_pod(PIRATE)
    await rig.gateway.linger()
    async with rig.http.get(f"{rig.internal_url}/readyz") as response:
        assert response.status == 503
    async with rig.http.get(f"{rig.internal_url}/healthz") as response:
        assert response.status == 200
    status, _, headers = await rig.post({"model": "pirate"})
    assert (status, headers["Connection"]) == (200, "close")
