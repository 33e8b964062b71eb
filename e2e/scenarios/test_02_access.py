"""Refused requests, and their messages."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import pytest

from e2e.custom_resources import pool_pods
from e2e.installation import DEMO

if TYPE_CHECKING:
    from openai import OpenAI

ENGINE_PORT, AGENT_PORT = 8000, 9000


def status_of(url: str, method: str = "GET", key: str | None = None, body: object = None) -> tuple[int, str]:
    """Return the status and body of a plain HTTP request."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data=data, headers=headers, method=method)  # noqa: S310 - http only
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:  # noqa: S310
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize("key", [None, "sk-ts-00000000-" + "x" * 43])
def test_requests_without_a_valid_key_are_refused(gateway: str, key: str | None, main_adapter: str) -> None:
    body = {"model": f"{DEMO}/{main_adapter}", "messages": [{"role": "user", "content": "?"}]}
    for method, path, sent in (("POST", "/v1/chat/completions", body), ("GET", "/v1/models", None)):
        code, text = status_of(gateway + path, method, key, sent)
        assert code == 401
        assert json.loads(text)["error"]["message"]


def test_an_unknown_and_a_missing_model_have_different_errors(client: OpenAI, gateway: str) -> None:
    key = client.api_key
    code, text = status_of(f"{gateway}/v1/chat/completions", "POST", key, {"model": "demo/nobody", "messages": []})
    assert (code, json.loads(text)["error"]["code"]) == (404, "model_not_found")
    code, text = status_of(f"{gateway}/v1/chat/completions", "POST", key, {"messages": []})
    assert code == 400
    assert "model" in json.loads(text)["error"]["message"]


def test_without_a_token_a_pool_pod_answers_health_checks_only(pool: str) -> None:
    [pod] = pool_pods(pool)
    engine = f"http://{pod['status']['podIP']}:{ENGINE_PORT}"
    assert status_of(f"{engine}/health")[0] == 200
    routes = [
        ("GET", "/v1/models"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("POST", "/invocations"),
        ("POST", "/tokenize"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/version"),
        ("GET", "/tunesmith/state"),
        ("POST", "/tunesmith/drain"),
        ("GET", "/nothing"),
    ]
    assert {
        route: status_of(engine + route[1], route[0], body={} if route[0] == "POST" else None)[0] for route in routes
    } == (dict.fromkeys(routes, 401))
    agent = f"http://{pod['status']['podIP']}:{AGENT_PORT}"
    for method, path in (("PUT", "/v1/adapters"), ("GET", "/v1/events"), ("POST", "/drain")):
        assert status_of(agent + path, method, body={} if method != "GET" else None)[0] == 401
