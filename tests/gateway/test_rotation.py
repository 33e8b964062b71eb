"""The installation key is rotated: gateway and pods read their files at different times, and no request fails."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.gateway.gateway_rig import GATEWAY_KEYS, adapter_manifest

if TYPE_CHECKING:
    from tests.gateway.gateway_rig import Rig
    from tunesmith.contracts.agent import Keys

OLD = GATEWAY_KEYS
NEW: Keys = (b"the next gateway key of the tests, thirty",)
BOTH: Keys = NEW + OLD


@pytest.mark.parametrize(
    "steps",
    [
        [(BOTH, OLD), (BOTH, BOTH), (BOTH, NEW), (NEW, NEW)],
        [(OLD, BOTH), (BOTH, BOTH), (NEW, BOTH), (NEW, NEW)],
        [(BOTH, OLD), (BOTH, NEW), (BOTH, OLD), (OLD, OLD)],
    ],
    ids=["the gateway first", "the pods first", "there and back"],
)
async def test_no_request_fails_while_gateway_and_pod_share_a_key(rig: Rig, steps: list[tuple[Keys, Keys]]) -> None:
    rig.watches.put(adapter_manifest("pirate"))
    pod = await rig.add_pod("team/pirate@aaaaaaaaaaaa")
    for gateway_keys, pod_keys in steps:
        rig.watches.gateway_keys, pod.keys = gateway_keys, pod_keys
        answers = await asyncio.gather(*(rig.post({"model": "pirate"}) for _ in range(8)))
        assert [status for status, *_ in answers] == [200] * 8
        await pod.stop("agent")
        await pod.start_agent()
        await rig.settled(pod)
        assert (await rig.post({"model": "pirate"}))[0] == 200


async def test_a_pod_that_shares_no_key_gets_no_request(rig: Rig) -> None:
    rig.watches.put(adapter_manifest("pirate"))
    pod = await rig.add_pod("team/pirate@aaaaaaaaaaaa")
    pod.keys = NEW
    assert (await rig.post({"model": "pirate"}))[0] == 503
    assert pod.seen == []
