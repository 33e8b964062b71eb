"""Requests that are refused, each in OpenAI's error schema."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gateway.gateway_rig import adapter_manifest, condition, eventually, pool_manifest
from tunesmith.contracts.apikey import key_record, new_key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.gateway.gateway_rig import Rig

CHAT = "/v1/chat/completions"
BODY = b'{"model": "pirate", "messages": []}'


async def send(
    rig: Rig, method: str, path: str, body: bytes | None = None, authorization: str | None = None
) -> tuple[int, dict[str, object], str]:
    headers = {"Authorization": f"Bearer {rig.key}" if authorization is None else authorization}
    async with rig.http.request(method, rig.url + path, data=body, headers=headers) as response:
        document = await response.json()
        assert set(document) == {"error"}
        assert set(document["error"]) == {"message", "type", "param", "code"}
        assert response.headers["X-Request-Id"]
        return response.status, document["error"], response.headers.get("Allow", "")


@pytest.mark.parametrize(
    ("method", "path", "body", "authorization", "status", "code"),
    [
        ("POST", CHAT, BODY, "", 401, "missing_api_key"),
        ("POST", CHAT, BODY, "Bearer ", 401, "missing_api_key"),
        ("POST", CHAT, BODY, "Basic dXNlcjpw", 401, "missing_api_key"),
        ("POST", CHAT, BODY, "Bearer sk-ts-00000000-wrong", 401, "invalid_api_key"),
        ("POST", CHAT, BODY, "Bearer sk-ts-clé", 401, "invalid_api_key"),
        ("GET", "/v1/models", None, "", 401, "missing_api_key"),
        ("GET", "/v1/models", None, "Bearer wrong", 401, "invalid_api_key"),
        ("POST", CHAT, b"", None, 400, "invalid_json"),
        ("POST", CHAT, b'{"model": "pirate",', None, 400, "invalid_json"),
        ("POST", CHAT, b"\xff\xfe", None, 400, "invalid_json"),
        ("POST", CHAT, b'["pirate"]', None, 400, "invalid_json"),
        ("POST", CHAT, b'"pirate"', None, 400, "invalid_json"),
        ("POST", CHAT, b"{}", None, 400, "missing_model"),
        ("POST", CHAT, b'{"model": ""}', None, 400, "missing_model"),
        ("POST", CHAT, b'{"model": null}', None, 400, "missing_model"),
        ("POST", CHAT, b'{"model": 7}', None, 400, "invalid_type"),
        ("POST", "/v1/completions", b"{}", None, 400, "missing_model"),
        ("POST", CHAT, b'{"model": "nobody"}', None, 404, "model_not_found"),
        ("POST", CHAT, b'{"model": "team/nobody"}', None, 404, "model_not_found"),
        ("POST", CHAT, b'{"model": "../adapters/x"}', None, 404, "model_not_found"),
        ("POST", CHAT, b'{"model": "team/pirate@"}', None, 404, "model_not_found"),
        ("POST", CHAT, b'{"model": "team/pirate@cccccccccccc"}', None, 404, "model_not_found"),
        ("POST", CHAT, b'{"model": "serving/base@cccccccccccc"}', None, 404, "model_not_found"),
        ("GET", "/v1/models/team/nobody", None, None, 404, "model_not_found"),
        ("GET", CHAT, None, None, 405, "method_not_allowed"),
        ("DELETE", "/v1/models/team/pirate", None, None, 405, "method_not_allowed"),
        ("POST", "/v1/models", b"{}", None, 405, "method_not_allowed"),
        ("POST", "/v1/load_lora_adapter", b"{}", None, 404, "unknown_url"),
        ("POST", "/v1/chat/completions/", b"{}", None, 404, "unknown_url"),
        ("POST", "/v1/images/generations", b"{}", None, 404, "unknown_url"),
        ("GET", "/metrics", None, None, 404, "unknown_url"),
    ],
)
async def test_each_mistake_has_its_error(
    rig: Rig, method: str, path: str, body: bytes | None, authorization: str | None, status: int, code: str
) -> None:
    rig.watches.put(adapter_manifest("pirate"))
    pod = await rig.add_pod("team/pirate@aaaaaaaaaaaa")
    seen, error, _ = await send(rig, method, path, body, authorization)
    assert (seen, error["code"]) == (status, code)
    assert pod.seen == []


async def test_a_missing_model_is_reported_with_openais_message(rig: Rig) -> None:
    status, error, _ = await send(rig, "POST", CHAT, b"{}")
    assert (status, error["message"], error["param"]) == (400, "you must provide a model parameter", "model")


async def test_a_wrong_method_is_answered_with_the_allowed_ones(rig: Rig) -> None:
    assert (await send(rig, "PUT", CHAT, b"{}"))[2] == "POST"


async def test_a_wrong_key_is_not_repeated(rig: Rig) -> None:
    _, error, _ = await send(rig, "POST", CHAT, BODY, "Bearer sk-ts-00000000-secret")
    assert "secret" not in str(error["message"])


async def test_a_body_above_the_limit_is_refused(start: Callable[..., Awaitable[Rig]]) -> None:
    rig = await start(max_body_bytes=1000)
    status, error, _ = await send(rig, "POST", CHAT, b'{"model": "%s"}' % (b"x" * 2000))
    assert (status, error["code"]) == (413, "request_too_large")

    async def pieces() -> object:
        for _ in range(100):
            yield b"x" * 100

    headers = {"Authorization": f"Bearer {rig.key}"}
    async with rig.http.post(rig.url + CHAT, data=pieces(), headers=headers) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (413, "request_too_large")


async def test_other_tenants_models_look_like_unknown_ones(rig: Rig) -> None:
    rig.watches.put(adapter_manifest("secret", "rival"))
    await rig.add_pod("rival/secret@aaaaaaaaaaaa")
    status, hidden = await rig.chat("rival/secret")
    assert (status, hidden["error"]["code"]) == (404, "model_not_found")
    _, unknown = await rig.chat("rival/unknow")
    assert hidden["error"]["message"].replace("rival/secret", "") == unknown["error"]["message"].replace(
        "rival/unknow", ""
    )
    assert (await rig.chat("rival/secret@aaaaaaaaaaaa"))[0] == 404


async def test_a_key_calls_the_namespaces_and_models_it_names(rig: Rig) -> None:
    rig.watches.put(adapter_manifest("pirate"))
    rig.watches.put(adapter_manifest("secret", "rival"))
    await rig.add_pod("rival/secret@aaaaaaaaaaaa", "team/pirate@aaaaaaaaaaaa")
    both = rig.add_key("both", home="team", namespaces=["team", "rival"])
    key = rig.add_key("one", home="team", namespaces=["team", "rival"], models=["rival/secret"])
    await eventually(lambda: rig.gateway.keys.find(key), "the keys are known")
    assert (await rig.chat("rival/secret", key=both))[0] == 200
    assert (await rig.chat("rival/secret", key=key))[0] == 200
    status, answer = await rig.chat("pirate", key=key)
    assert (status, answer["error"]["code"]) == (403, "model_forbidden")
    assert (await rig.chat("serving/base", key=key))[0] == 403
    async with rig.http.get(f"{rig.url}/v1/models", headers={"Authorization": f"Bearer {key}"}) as response:
        assert [model["id"] for model in (await response.json())["data"]] == ["rival/secret"]


async def test_a_pool_that_is_not_open_serves_its_base_to_its_own_namespace(rig: Rig) -> None:
    await rig.add_pod(pool=pool_manifest(open_to="Same"))
    own = rig.add_key("own", home="serving")
    await eventually(lambda: rig.gateway.keys.find(own), "the key is known")
    assert (await rig.chat("base", key=own))[0] == 200
    assert (await rig.chat("serving/base"))[0] == 404
    assert (await rig.chat("base"))[0] == 404


async def test_a_bare_name_that_several_open_pools_offer_is_refused_with_their_ids(rig: Rig) -> None:
    rig.watches.put(pool_manifest("one"))
    rig.watches.put(pool_manifest("two", "elsewhere"))
    await eventually(lambda: len(rig.gateway.catalog._models) == 2, "both pools are known")
    status, answer = await rig.chat("base")
    assert (status, answer["error"]["code"]) == (400, "model_ambiguous")
    assert "elsewhere/base, serving/base" in answer["error"]["message"]


async def test_a_key_is_refused_once_its_record_is_deleted(rig: Rig) -> None:
    rig.watches.put(pool_manifest())
    key = new_key()
    record = key_record("short", "tunesmith-system", key, home="team", namespaces=["team"], models=["*"])
    rig.watches.put(record)
    await eventually(lambda: rig.gateway.keys.find(key), "the key is known")
    rig.watches.delete(record)
    await eventually(lambda: not rig.gateway.keys.find(key), "the key is gone")
    assert (await send(rig, "GET", "/v1/models", None, f"Bearer {key}"))[0] == 401


async def test_a_damaged_key_record_does_not_affect_other_keys(rig: Rig) -> None:
    broken = key_record("broken", "tunesmith-system", new_key(), home="team", namespaces=[], models=["*"])
    broken["data"]["namespaces"] = "bm90IEpTT04="
    rig.watches.put(broken)
    rig.watches.put(pool_manifest())
    later = rig.add_key("later", home="team")
    await eventually(lambda: rig.gateway.keys.find(later), "the later key is known")
    assert rig.gateway.keys.find(rig.key)


async def test_only_keys_of_the_gateways_own_namespace_are_read(rig: Rig) -> None:
    assert rig.watches.asked["ConfigMap"] == ("tunesmith-system", "tunesmith.dev/api-key=true")
    assert rig.watches.asked["Pod"] == (None, "tunesmith.dev/pool")


@pytest.mark.parametrize(
    ("conditions", "digests", "state", "reason"),
    [
        ([condition("Resolved", "False", "JobNotFound", "FineTuneJob sail does not exist")], (), "", "does not exist"),
        ([condition("Resolved", "False", "JobFailed", "")], (), "", "JobFailed"),
        ([condition("Resolved", "True", "Resolved")], ("a",), "Failed", "no pod could load it"),
    ],
)
async def test_a_model_that_is_not_ready_is_answered_with_the_reason(
    rig: Rig, conditions: list[dict[str, object]], digests: tuple[str, ...], state: str, reason: str
) -> None:
    rig.watches.put(adapter_manifest("pirate", digests=digests, state=state, conditions=conditions))
    await rig.add_pod()
    status, answer = await rig.chat("pirate")
    assert (status, answer["error"]["code"]) == (503, "model_not_ready")
    assert reason in answer["error"]["message"]


async def test_the_loser_of_two_claims_on_a_name_is_not_served(rig: Rig) -> None:
    young = adapter_manifest("young", model="pirate", digests=("b",), created="2026-01-03T00:00:00Z")
    rig.watches.put(young)
    rig.watches.put(adapter_manifest("old", model="pirate", digests=("a",), created="2026-01-02T00:00:00Z"))
    await rig.add_pod("team/pirate@aaaaaaaaaaaa", "team/pirate@bbbbbbbbbbbb")
    rig.watches.put(young)
    assert (await rig.chat("pirate"))[1]["model"] == "team/pirate@aaaaaaaaaaaa"


async def test_all_requests_are_a_503_until_the_cluster_is_read(start: Callable[..., Awaitable[Rig]]) -> None:
    rig = await start(synced=False)
    status, error, _ = await send(rig, "POST", CHAT, BODY)
    assert (status, error["code"]) == (503, "gateway_starting")
    async with rig.http.get(f"{rig.internal_url}/readyz") as response:
        assert (response.status, await response.text()) == (
            503,
            "not read yet: ServingPool, AdapterDeployment, Pod, Namespace, ConfigMap\n",
        )
    rig.watches.sync.set()
    await eventually(rig.gateway.feed.synced, "everything is read")
    async with rig.http.get(f"{rig.internal_url}/readyz") as response:
        assert response.status == 200
    assert (await send(rig, "POST", CHAT, BODY))[1]["code"] == "model_not_found"
