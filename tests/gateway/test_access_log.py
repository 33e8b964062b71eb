"""The access log: one line for each request, without keys and contents."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tests.gateway.gateway_rig import adapter_manifest, eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import pytest

    from tests.gateway.gateway_rig import Rig

    Start = Callable[..., Awaitable[Rig]]

PIRATE = "team/pirate@aaaaaaaaaaaa"
ANSWERED = {"key": "default", "method": "POST", "model": "team/pirate", "revision": PIRATE, "status": 200}


def lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


async def pirate(start: Start, **settings: object) -> Rig:
    rig = await start(**settings)
    rig.watches.put(adapter_manifest("pirate"))
    await rig.add_pod(PIRATE)
    return rig


async def test_a_request_is_a_line(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    rig = await pirate(start)
    key = rig.add_key("limited", home="team", tokens_per_day=100)
    await eventually(lambda: rig.gateway.keys.find(key), "the key is known")
    before = datetime.now(UTC)
    assert (await rig.chat("pirate", secret="a secret prompt"))[0] == 200
    assert (await rig.chat("pirate", key=key, n=2))[0] == 200
    assert (await rig.chat("unknown-to-all"))[0] == 404
    assert (await rig.chat("pirate", key="sk-ts-00000000-wrong"))[0] == 401
    async with rig.http.get(f"{rig.url}/v1/models/team%2Fpirate", headers={"Authorization": f"Bearer {rig.key}"}):
        pass
    async with rig.http.get(f"{rig.url}/health"), rig.http.get(f"{rig.url}/wp-login.php?secret"):
        pass
    output = capfd.readouterr().out
    first, limited, unknown, wrong, models, other = lines(output)
    assert ANSWERED.items() <= first.items()
    assert first["path"] == "/v1/chat/completions"
    assert first["pod"].endswith("pod-1")
    assert (first["stream"], first["sequences"]) == (False, 1)
    assert 0 < first["firstByteSeconds"] <= first["seconds"]
    assert before.timestamp() - 1 <= datetime.fromisoformat(first["time"]).timestamp() <= datetime.now(UTC).timestamp()
    assert first["tokens"] == 2
    assert (limited["key"], limited["sequences"], limited["tokens"]) == ("limited", 2, 2)
    assert (unknown["status"], unknown["key"], "model" in unknown) == (404, "default", False)
    assert (wrong["status"], "key" in wrong) == (401, False)
    assert (models["path"], models["status"]) == ("/v1/models", 200)
    assert (other["status"], "path" in other) == (404, False)
    for hidden in ("secret", rig.key, key, "unknown-to-all", "wp-login", "Hello"):
        assert hidden not in output


async def test_a_stream_is_a_line_when_it_ends(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    rig = await pirate(start)
    pod = rig.pods[0]
    pod.gate.clear()
    body = {"model": "pirate", "messages": [], "stream": True}
    headers = {"Authorization": f"Bearer {rig.key}"}
    async with rig.http.post(f"{rig.url}/v1/chat/completions", json=body, headers=headers) as response:
        await response.content.readany()
        assert capfd.readouterr().out == ""
    await eventually(lambda: pod.disconnected, "the gateway cancels the request")
    (line,) = lines(capfd.readouterr().out)
    assert (line["status"], line["stream"], line["revision"]) == (499, True, PIRATE)


async def test_no_access_log(start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    rig = await pirate(start, access_log=False)
    assert (await rig.chat("pirate"))[0] == 200
    assert capfd.readouterr().out == ""
