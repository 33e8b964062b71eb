"""Calls from pages in browsers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gateway.gateway_rig import adapter_manifest
from tunesmith.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.gateway.gateway_rig import Rig

APP, OTHER = "https://app.example.com", "https://other.example.com"
PIRATE = "team/pirate@aaaaaaaaaaaa"
ASKS = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}


@pytest.fixture
async def pirates(start: Callable[..., Awaitable[Rig]]) -> Rig:
    rig = await start(hold_seconds=0.5, cors_origins=(APP,))
    rig.watches.put(adapter_manifest("pirate"))
    await rig.add_pod(PIRATE)
    return rig


async def test_a_browsers_question_needs_no_key(pirates: Rig) -> None:
    async with pirates.http.options(f"{pirates.url}/v1/responses", headers={"Origin": APP, **ASKS}) as response:
        assert (response.status, await response.read()) == (204, b"")
        headers = response.headers
    assert headers["Access-Control-Allow-Origin"] == APP
    assert headers["Access-Control-Allow-Methods"] == "GET, POST"
    assert headers["Access-Control-Allow-Headers"] == "authorization,x-stainless-os"
    assert "Access-Control-Allow-Credentials" not in headers


@pytest.mark.parametrize("stream", [True, False])
async def test_a_page_reads_answers_errors_and_what_is_left_of_the_limits(pirates: Rig, *, stream: bool) -> None:
    key = pirates.add_key("page", home="team", requests_per_minute=5)
    body = {"model": "pirate", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    url = f"{pirates.url}/v1/chat/completions"
    for model, status in (("pirate", 200), ("parrot", 404)):
        headers = {"Origin": APP, "Authorization": f"Bearer {key}"}
        async with pirates.http.post(url, json=body | {"model": model}, headers=headers) as response:
            assert response.status == status
            assert response.headers["Access-Control-Allow-Origin"] == APP
            exposed = response.headers["Access-Control-Expose-Headers"]
            assert "x-ratelimit-remaining-requests" in exposed
            assert "x-request-id" in exposed
            assert response.headers["x-ratelimit-limit-requests"] == "5"
    async with pirates.http.post(url, json=body, headers={"Origin": APP}) as response:
        assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (401, APP)


async def test_pages_of_other_origins_get_no_permission(pirates: Rig, rig: Rig) -> None:
    for gateway, origin, vary in ((pirates, OTHER, "Origin"), (rig, APP, None)):
        async with gateway.http.options(f"{gateway.url}/v1/models", headers={"Origin": origin, **ASKS}) as response:
            assert response.status == 405
            assert "Access-Control-Allow-Origin" not in response.headers
            assert response.headers.get("Vary") == vary


async def test_all_origins(start: Callable[..., Awaitable[Rig]]) -> None:
    rig = await start(cors_origins=("*",))
    async with rig.http.get(f"{rig.url}/health", headers={"Origin": OTHER}) as response:
        assert response.headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize("origin", ["app.example.com", "https://app.example.com/", "https://*.example.com", "null"])
def test_what_is_not_an_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="is not an origin"):
        GatewaySettings(namespace="n", cors_origins=(origin,))
