"""The APIs besides chat and completions: what the gateway reads of their bodies and answers, and their errors."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from tests.gateway.gateway_rig import adapter_manifest
from tunesmith.gateway import errors
from tunesmith.gateway.apis import API_BY_PATH, APIS, COMPLETIONS, EMBEDDINGS, RERANK, RESPONSES, SCORE, error_body
from tunesmith.gateway.body import parse
from tunesmith.gateway.usage import AnswerUsage

if TYPE_CHECKING:
    from tests.gateway.gateway_rig import Rig
    from tunesmith.gateway.apis import Api

PIRATE = "team/pirate@aaaaaaaaaaaa"
TALK = [{"role": "user", "content": "Hello"}]


@pytest.fixture
async def pirates(rig: Rig) -> Rig:
    rig.watches.put(adapter_manifest("pirate"))
    await rig.add_pod(PIRATE)
    return rig


def answer(
    rig: Rig, *pieces: str, status: int = 200, stream: bool = False, headers: dict[str, str] | None = None
) -> None:
    """Have the pod give this answer."""

    async def respond(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        kind = "text/event-stream" if stream else "application/json"
        response = web.StreamResponse(status=status, headers={"Content-Type": kind, **(headers or {})})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece.replace("MODEL", body["model"]).encode())
        await response.write_eof()
        return response

    rig.pods[0].answer = respond


def test_the_gateway_and_the_engine_know_the_same_apis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "server-image/src/tunesmith_server/middleware")
    engine, parameters = importlib.import_module("tunesmith_apis"), importlib.import_module("tunesmith_parameters")
    assert {api.path for api in APIS} == parameters.ROUTES
    assert {api.path: api.envelope for api in APIS if api.envelope} == dict(engine.ENVELOPES)
    assert {api.path for api in APIS if not api.computes} == engine.NOT_COMPUTED


@pytest.mark.parametrize(
    ("api", "members", "sequences"),
    [
        (EMBEDDINGS, {"input": "a"}, 1),
        (EMBEDDINGS, {"input": ["a", "b", "c"]}, 3),
        (EMBEDDINGS, {"input": [1, 2, 3]}, 1),
        (EMBEDDINGS, {"input": [[1], [2]]}, 2),
        (SCORE, {"text_1": "a", "text_2": ["b", "c"]}, 3),
        (RERANK, {"query": "a", "documents": ["b", "c"]}, 3),
        (RESPONSES, {"input": [{"role": "user"}] * 5}, 1),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 2}, 4),
    ],
)
def test_inputs_count_as_sequences(api: Api, members: dict[str, Any], sequences: int) -> None:
    assert parse(json.dumps({"model": "m"} | members).encode(), 128, api).sequences == sequences


def test_more_inputs_than_sequences_are_refused() -> None:
    body = json.dumps({"model": "m", "input": ["a"] * 129}).encode()
    with pytest.raises(errors.ApiError, match="129 sequences"):
        parse(body, 128, EMBEDDINGS)


EVENT = 'event: response.created\ndata: {"response":{"id":"r","metadata":{"a":"b"},"model":"MODEL"},"type":"x"}\n\n'
LONG = "x" * 200_000


@pytest.mark.parametrize(
    ("path", "pieces"),
    [
        ("/v1/responses", [EVENT, "event: done\ndata: {}\n\n"]),
        ("/v1/responses", [EVENT[:40], EVENT[40:]]),
        ("/v1/responses", ['event: x\ndata: {"response":{"model":"MODEL","instructions":"' + LONG, '"}}\n\n']),
        ("/v1/messages", ['event: x\ndata: {"type":"message_start","message":{"id":"m","model":"MODEL"}}\n\n']),
    ],
)
async def test_a_stream_passes_once_it_names_the_model(pirates: Rig, path: str, pieces: list[str]) -> None:
    answer(pirates, *pieces, stream=True)
    headers = {"Authorization": f"Bearer {pirates.key}"}
    body = {"model": "pirate", "input": "Hi", "messages": TALK, "stream": True}
    async with pirates.http.post(f"{pirates.url}{path}", json=body, headers=headers) as response:
        assert (response.status, await response.text()) == (200, "".join(pieces).replace("MODEL", PIRATE))
        assert response.headers["X-Accel-Buffering"] == "no"


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_a_stream_of_another_model_ends_with_the_apis_error_event(pirates: Rig, path: str) -> None:
    envelope = API_BY_PATH[path].envelope
    answer(pirates, f'event: x\ndata: {{"model":"MODEL","{envelope}":{{"model":"other"}}}}\n\n', stream=True)
    body = {"model": "pirate", "input": "Hi", "messages": TALK, "stream": True}
    headers = {"Authorization": f"Bearer {pirates.key}"}
    async with pirates.http.post(f"{pirates.url}{path}", json=body, headers=headers) as response:
        kind, data = (await response.text()).strip().split("\n")
    assert kind == "event: error"
    document = json.loads(data.removeprefix("data: "))
    assert document["type"] == "error"
    assert "answered with a model other than `team/pirate`" in document["error"]["message"]


async def test_an_answer_that_names_no_model_passes_only_where_the_api_has_none(pirates: Rig) -> None:
    answer(pirates, '{"count":1,"tokens":[5]}')
    status, document, _ = await pirates.post({"model": "pirate", "prompt": "Hi"}, path="/tokenize")
    assert (status, document) == (200, {"count": 1, "tokens": [5]})
    status, document, _ = await pirates.post({"model": "pirate", "input": "Hi"}, path="/v1/embeddings")
    assert (status, document["error"]["code"]) == (502, "wrong_model")


async def test_anthropics_clients_use_their_own_header_and_get_their_own_errors(pirates: Rig) -> None:
    url = f"{pirates.url}/v1/messages"
    answer(pirates, '{"model":"MODEL","id":"m","content":[]}')
    body = {"model": "pirate", "messages": TALK, "max_tokens": 5}
    async with pirates.http.post(url, json=body, headers={"x-api-key": pirates.key}) as response:
        assert (response.status, (await response.json())["model"]) == (200, PIRATE)
    for headers, changes, status, type_ in (
        ({"x-api-key": "wrong"}, {}, 401, "authentication_error"),
        ({"x-api-key": pirates.key}, {"model": "parrot"}, 404, "not_found_error"),
        ({"x-api-key": pirates.key}, {"model": None}, 400, "invalid_request_error"),
    ):
        async with pirates.http.post(url, json=body | changes, headers=headers) as response:
            document = await response.json()
            assert (response.status, document["type"], document["error"]["type"]) == (status, "error", type_)
            assert document["request_id"] == response.headers["X-Request-Id"]


async def test_the_engines_error_gets_anthropics_schema_with_its_message(pirates: Rig) -> None:
    answer(pirates, '{"error":{"message":"max_tokens must be smaller","type":"x"}}', status=400)
    status, document, _ = await pirates.post({"model": "pirate", "messages": TALK}, path="/v1/messages")
    assert (status, document["error"]) == (
        400,
        {"type": "invalid_request_error", "message": "max_tokens must be smaller"},
    )


def test_every_status_has_a_type_of_anthropic() -> None:
    for status in (*range(400, 432), *range(500, 512), 529, 599):
        document = json.loads(error_body(errors.ApiError(status, "x"), "/v1/messages", "id"))
        assert document["error"]["type"].endswith(("_error", "request_too_large"))


async def test_an_engine_without_the_api_is_named_with_its_pool(pirates: Rig) -> None:
    answer(pirates, '{"error":{"message":"x"}}', status=404, headers={"x-tunesmith-no-route": "true"})
    status, document, _ = await pirates.post({"model": "pirate", "input": "Hi"}, path="/v1/embeddings")
    assert (status, document["error"]["code"]) == (404, "api_not_served")
    assert document["error"]["message"].startswith(
        "The engine of the pool `serving/pool`, which serves `team/pirate`, has no /v1/embeddings"
    )


@pytest.mark.parametrize("path", ["/v1/responses/resp_1", "/v1/responses/resp_1/cancel", "/v1/responses/a/input_items"])
async def test_stored_responses_do_not_exist(pirates: Rig, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        headers = {"Authorization": f"Bearer {pirates.key}"}
        async with pirates.http.request(method, f"{pirates.url}{path}", headers=headers) as response:
            document = await response.json()
            assert (response.status, document["error"]["code"]) == (404, "responses_not_stored")
        async with pirates.http.request(method, f"{pirates.url}{path}") as response:
            assert response.status == 401


@pytest.mark.parametrize("path", ["/rerank", "/v2/rerank", "/v1/rerank"])
async def test_paths_of_other_services_reach_the_engines_own(pirates: Rig, path: str) -> None:
    seen: list[str] = []

    async def respond(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        seen.append(request.path)
        return web.json_response({"model": body["model"], "results": []})

    pirates.pods[0].answer = respond
    status, _, _ = await pirates.post({"model": "pirate", "query": "a", "documents": ["b"]}, path=path)
    assert (status, seen) == (200, ["/v1/rerank"])


@pytest.mark.parametrize(
    ("pieces", "tokens"),
    [
        (
            [
                b'{"usage":{"input_tokens":3,"input_tokens_details":{"cached_tokens":1},"output_tokens":4,"total_tokens":7}}'
            ],
            7,
        ),
        ([b'{"model":"m","usage":{"input_tokens":3,"output_tokens":4,"cache_read_input_tokens":5}}'], 12),
        ([b'{"id":"x","usage":{"prompt_tokens":9,"total_tokens":9},"results":[', b'"x",' * 5000, b"1]}"], 9),
        ([b'{"tools":[{"usage":{"total_tokens":1}}],', b'"usage":{"total_tokens":70}}'], 70),
    ],
)
def test_the_usage_of_an_answer_is_found(pieces: list[bytes], tokens: int) -> None:
    usage = AnswerUsage(7, hide=False)
    for piece in pieces:
        usage.read_body(piece)
    assert usage.counts.total == tokens


def test_the_usage_of_a_stream_is_its_last_one() -> None:
    usage = AnswerUsage(7, hide=False)
    for event in (
        b'data: {"type":"message_start","message":{"usage":{"input_tokens":31,"output_tokens":0}}}\n\n',
        b'data: {"type":"message_delta","usage":{"input_tokens":31,"output_tokens":3}}\n\n',
    ):
        assert usage.pass_events(event) == event
    assert usage.counts.total == 34


async def test_tokens_of_a_responses_stream_count_towards_the_keys_limit(pirates: Rig) -> None:
    key = pirates.add_key("limited", home="team", tokens_per_minute=1000)
    last = '{"response":{"model":"MODEL","usage":{"input_tokens":300,"output_tokens":400,"total_tokens":700}}}'
    answer(pirates, EVENT, f"event: response.completed\ndata: {last}\n\n", stream=True)
    body = {"model": "pirate", "input": "Hi", "stream": True, "max_output_tokens": 200}
    headers = {"Authorization": f"Bearer {key}"}
    statuses = []
    for _ in range(2):
        async with pirates.http.post(f"{pirates.url}/v1/responses", json=body, headers=headers) as response:
            await response.read()
            statuses.append(response.status)
    assert statuses == [200, 200]
    async with pirates.http.post(f"{pirates.url}/v1/responses", json=body, headers=headers) as response:
        assert response.status == 429
    assert pirates.pods[0].seen[0].keys() == {"model", "cache_salt", "input", "stream", "max_output_tokens"}


async def test_models_have_the_members_that_clients_read(rig: Rig) -> None:
    rig.pool["spec"]["engine"] = {"maxModelLength": 4096}
    rig.watches.put(adapter_manifest("pirate", digests=("b", "a")))
    await rig.add_pod(PIRATE)
    headers = {"Authorization": f"Bearer {rig.key}"}
    async with rig.http.get(f"{rig.url}/v1/models", headers=headers) as response:
        models = {model["id"]: model for model in (await response.json())["data"]}
    members = {"root": "team/pirate@bbbbbbbbbbbb", "parent": "serving/base", "max_model_len": 4096}
    assert models["team/pirate"].items() >= members.items()
    members = {"root": "serving/base", "parent": None, "max_model_len": 4096}
    assert models["serving/base"].items() >= members.items()


BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/embeddings": {"input": ["Hi"]},
    "/v1/score": {"text_1": "a", "text_2": ["b"]},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
}


@pytest.mark.parametrize("path", sorted(API_BY_PATH))
async def test_a_key_calls_only_its_models_on_every_path(pirates: Rig, path: str) -> None:
    pirates.watches.put(adapter_manifest("poet"))
    body = {"model": "team/pirate", **BODIES.get(API_BY_PATH[path].path, {"messages": TALK, "max_tokens": 5})}
    foreign = pirates.add_key("foreign", home="elsewhere")
    narrow = pirates.add_key("narrow", home="team", models=["team/poet"])
    for key, status in ((foreign, 404), (narrow, 403), ("sk-ts-wrong", 401)):
        assert (await pirates.post(body, path=path, key=key))[0] == status
    assert (await pirates.post(body | {"model": None}, path=path))[0] == 400
    assert pirates.pods[0].seen == []
