"""A whole pod: the real vLLM with the middleware, the real agent, a real S3 server. The tests run in order on one."""

from __future__ import annotations

import importlib
import json
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.http_client import Answer, call, open_stream
from tests.server.server_rig import (
    BASE_NAME,
    CONTROL_TOKEN,
    EVENTS_TOKEN,
    SERVING_TOKEN,
    Artifact,
    Container,
    MissingPartError,
    Pod,
    S3Server,
    agent_container,
    engine_container,
    has_ipv6,
    listens,
    make_adapter,
    wait_until,
)
from tunesmith.contracts.agent import EVENTS_WITH_TRAFFIC, PodState, Residency, ResidencyState
from tunesmith.contracts.podevents import EventReader
from tunesmith.contracts.traffic import Traffic, served_between, shadow_between
from tunesmith_server import middleware

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import ModuleType

PASSING = ("one", "two", "three", "four", "five")
"""Adapters that are served for a while."""
PROMPT = "Q: What is the capital of France?\nA:"


def parameters() -> ModuleType:
    """The table of parameters, as the engine imports it."""
    sys.path.insert(0, middleware.__path__[0])
    return importlib.import_module("tunesmith_parameters")


class ServingPod:
    """The running pod and its two adapters' entries of the desired list."""

    def __init__(self, pod: Pod, entries: dict[str, dict[str, str]]) -> None:
        self.pod = pod
        self.entries = entries
        self.agent = agent_container(pod)
        self.engine: Container = engine_container(pod)
        self._sequence = 0

    def start(self) -> None:
        self.agent.start()
        wait_until(lambda: listens(self.pod.agent_port), f"the agent listens; see {self.agent.log}", 30)
        self.engine.start()

    def stop(self) -> None:
        self.engine.kill()
        self.agent.kill()

    def want(self, *names: str) -> None:
        self._sequence += 1
        adapters = [self.entries[name] for name in names]
        body = {"epoch": 1, "sequence": self._sequence, "adapters": adapters}
        assert call(f"{self.pod.agent_url}/v1/adapters", "PUT", body, CONTROL_TOKEN).json == {
            "epoch": 1,
            "sequence": self._sequence,
        }

    def state(self) -> PodState:
        with open_stream(f"{self.pod.agent_url}/v1/events", "GET", None, EVENTS_TOKEN) as events:
            reader = EventReader()
            reader.read(events.readline())
            return reader.state

    def residency(self, name: str) -> Residency | None:
        wanted = self.entries[name]["engineName"]
        return next((entry for entry in self.state().adapters if entry.engine_name == wanted), None)

    def wait_resident(self, *names: str) -> None:
        def resident() -> bool:
            assert self.engine.running(), self.engine.tail()
            assert self.agent.running(), self.agent.tail()
            states = [self.residency(name) for name in names]
            return all(entry is not None and entry.state is ResidencyState.RESIDENT for entry in states)

        wait_until(resident, f"{names} are resident; see {self.agent.log} and {self.engine.log}")

    def complete(self, model: str, tokens: int = 8) -> str:
        body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        answer = call(f"{self.pod.engine_url}/v1/completions", "POST", body)
        assert answer.status == 200, answer.text
        assert answer.json["model"] == model
        text: str = answer.json["choices"][0]["text"]
        return text

    def answers(self) -> dict[str, str]:
        return {name: self.complete(self.entries[name]["engineName"]) for name in ("pirate", "poet")}

    def engine_state(self) -> Any:
        return call(f"{self.pod.engine_url}/tunesmith/state", token=self.pod.admin_token).json


@pytest.fixture(scope="module")
def pod(
    tmp_path_factory: pytest.TempPathFactory, base: Path, fingerprint: str, store: S3Server
) -> Iterator[ServingPod]:
    folder = tmp_path_factory.mktemp("pod")

    def make(name: str, seed: int) -> Artifact:
        return make_adapter(folder / "made" / name, base, fingerprint, seed=seed)

    entries = {name: make(name, seed).publish(store, model=name) for seed, name in enumerate(("pirate", "poet"), 1)}
    passing = {name: make(name, seed).publish(store, model=name) for seed, name in enumerate(PASSING, 4)}
    entries |= passing
    flipped = make("flipped", 3).publish(store, model="flipped")
    weights = f"{flipped['uri']}/adapter_model.safetensors"
    content = bytearray(store.files.cat_file(weights))
    content[-1000] ^= 1
    store.files.pipe_file(weights, bytes(content))
    entries["flipped"] = flipped
    try:
        running = ServingPod(Pod(folder / "pod", base, store), entries)
    except MissingPartError as error:
        pytest.fail(str(error), pytrace=False)
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def served(pod: ServingPod) -> dict[str, str]:
    """What the two adapters answer when they were loaded first."""
    pod.want("pirate", "poet")
    pod.wait_resident("pirate", "poet")
    return pod.answers()


def test_each_adapter_answers_as_itself(pod: ServingPod, served: dict[str, str]) -> None:
    assert len({served["pirate"], served["poet"], pod.complete(BASE_NAME)}) == 3
    assert pod.answers() == served


@pytest.mark.usefixtures("served")
def test_every_route_but_health_refuses_a_caller_without_the_pools_token(pod: ServingPod) -> None:
    routes = re.findall(r"Route: (\S+), Methods: (.+)", pod.engine.log.read_text())
    pairs = {(path, method.strip()) for path, methods in routes for method in methods.split(",")}
    assert {path for path, _ in pairs} >= {"/v1/chat/completions", "/adapters", "/invocations", "/metrics", "/tokenize"}
    pairs |= {("/tunesmith/state", "GET"), ("/tunesmith/drain", "POST"), ("/nowhere", "GET"), ("/health", "POST")}
    answers = {
        (path, method, token): call(f"{pod.pod.engine_url}{re.sub('{.*?}', 'x', path)}", method, token=token).status
        for path, method in pairs
        for token in (None, "wrong")
    }
    assert {key[:2] for key, status in answers.items() if status != 401} == {("/health", "GET")}


@pytest.mark.usefixtures("served")
def test_the_use_of_slots_memory_and_disk_is_reported(pod: ServingPod) -> None:
    wait_until(lambda: not pod.state().use.active, "no adapter is active", 30)
    use = pod.state().use
    assert (use.slots, use.max_adapters, use.reloads) == (3, 3, 0)
    assert use.memory_bytes > 0
    entry = pod.residency("pirate")
    assert entry is not None
    assert 0 < entry.size_bytes <= use.disk_bytes < use.disk_limit_bytes
    assert (entry.loads, entry.load_seconds > 0) == (1, True)


OTHER_APIS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/responses", {"input": "Hello", "max_output_tokens": 4, "temperature": 0, "store": False}, "model"),
    ("/v1/messages", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}, "model"),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "Hello"}]}, "input_tokens"),
    ("/tokenize", {"prompt": "Hello"}, "tokens"),
    ("/tokenize", {"messages": [{"role": "user", "content": "Hello"}]}, "tokens"),
    ("/detokenize", {"tokens": [1, 2, 3]}, "prompt"),
]


@pytest.mark.usefixtures("served")
def test_the_other_apis_answer_as_the_adapter_and_count_tokens(pod: ServingPod) -> None:
    model = pod.entries["pirate"]["engineName"]
    for path, body, member in OTHER_APIS:
        # As the gateway does: the salt is in every body.
        request = {"model": model, "cache_salt": "salt", **body}
        before = pod.engine_state()["totals"].get(model, {}).get("completionTokens", 0)
        answer = call(f"{pod.pod.engine_url}{path}", "POST", request)
        assert answer.status == 200, (path, answer.text)
        assert member in answer.json, path
        if member == "model":
            assert answer.text.startswith('{"model":"' + model), answer.text
            assert pod.engine_state()["totals"][model]["completionTokens"] == before + 4
    absent = call(f"{pod.pod.engine_url}/v1/embeddings", "POST", {"model": model, "input": "Hello"})
    assert (absent.status, absent.headers["x-tunesmith-no-route"]) == (404, "true")
    refused = call(f"{pod.pod.engine_url}/v1/responses", "POST", {"model": model, "input": "Hello", "store": True})
    assert (refused.status, refused.json["error"]["param"]) == (400, "store")


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(("path", "envelope"), [("/v1/responses", "response"), ("/v1/messages", "message")])
def test_streams_of_the_other_apis_begin_with_the_model_and_count_tokens(
    pod: ServingPod, path: str, envelope: str
) -> None:
    model = pod.entries["pirate"]["engineName"]
    talk = (
        {"input": "Hello", "max_output_tokens": 5} if envelope == "response" else OTHER_APIS[1][1] | {"max_tokens": 5}
    )
    before = pod.engine_state()["totals"].get(model, {}).get("completionTokens", 0)
    answer = call(f"{pod.pod.engine_url}{path}", "POST", {"model": model, "stream": True, **talk})
    assert answer.status == 200
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    assert next(iter(events[0])) == envelope
    assert next(iter(events[0][envelope].items())) == ("model", model)
    assert len(events) > 5
    assert pod.engine_state()["totals"][model]["completionTokens"] == before + 5


@pytest.mark.usefixtures("served")
def test_clients_can_use_only_the_routes_that_they_need(pod: ServingPod) -> None:
    body = {"lora_name": "x", "lora_path": "/"}
    statuses = {
        path: call(f"{pod.pod.engine_url}{path}", method, body).status
        for method, path in (
            ("POST", "/v1/load_lora_adapter"),
            ("POST", "/v1/unload_lora_adapter"),
            ("POST", "/adapters"),
            ("DELETE", "/adapters/x"),
            ("POST", "/v1/responses/x/cancel"),
            ("GET", "/v1/responses/x"),
            ("POST", "/v1/chat/completions/render"),
            ("POST", "/inference/v1/generate"),
            ("POST", "/invocations"),
            ("POST", "/tunesmith/drain"),
            ("GET", "/tunesmith/state"),
        )
    }
    assert set(statuses.values()) == {403}
    assert {call(f"{pod.pod.engine_url}{path}").status for path in ("/v1/models", "/metrics", "/health")} == {200}


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("model", [{}, {"model": ""}, {"model": None}, {"model": ["a"]}])
def test_a_request_that_names_no_model_is_refused(pod: ServingPod, model: dict[str, Any]) -> None:
    answer = call(f"{pod.pod.engine_url}/v1/completions", "POST", {"prompt": PROMPT, **model})
    assert (answer.status, answer.json["error"]["code"]) == (400, "missing_model")


@pytest.mark.usefixtures("served")
def test_an_unknown_model_is_not_answered_by_the_base(pod: ServingPod) -> None:
    answer = call(f"{pod.pod.engine_url}/v1/completions", "POST", {"prompt": PROMPT, "model": "team/pirate"})
    assert answer.status == 404
    assert "team/pirate" not in pod.engine_state()["totals"]


@pytest.mark.usefixtures("served")
def test_streams_pass_through_and_are_counted(pod: ServingPod) -> None:
    model = pod.entries["pirate"]["engineName"]
    before = pod.engine_state()["totals"][model]
    body = {"model": model, "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "stream": True}
    with open_stream(f"{pod.pod.engine_url}/v1/completions", "POST", body, SERVING_TOKEN) as stream:
        first = stream.readline()
        running = pod.engine_state()["inFlight"]
        events = [line for line in stream if line.startswith(b"data: ")]
    assert first.startswith(b"data: {")
    assert running == {model: 1}
    assert events[-1].strip() == b"data: [DONE]"
    assert not any(json.loads(event[6:]).get("usage") for event in events[:-1])
    wait_until(lambda: not pod.engine_state()["inFlight"], "the request is not counted any more", 10)
    after = pod.engine_state()["totals"][model]
    assert after["requests"] - before["requests"] == 1
    assert after["completionTokens"] - before["completionTokens"] == 40
    assert after["promptTokens"] > before["promptTokens"]


@pytest.mark.usefixtures("served")
def test_the_traffic_of_an_adapter_reaches_a_reader_of_the_events(pod: ServingPod) -> None:
    model = pod.entries["poet"]["engineName"]
    url = f"{pod.pod.engine_url}/v1/completions"
    body = {"model": model, "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "ignore_eos": True, "stream": True}
    before = served_between(
        None, Traffic.model_validate_json(json.dumps(pod.engine_state()["traffic"]["models"][model]))
    )
    started = time.monotonic()
    with open_stream(url, "POST", body, SERVING_TOKEN) as stream:
        stream.readline()
        first = time.monotonic() - started
        stream.read()
        whole = time.monotonic() - started
    with open_stream(url, "POST", body, SERVING_TOKEN, x_tunesmith_shadow="true") as stream:
        stream.read()
    assert call(url, "POST", {**body, "max_tokens": -1}).status == 400
    reader = EventReader()
    with open_stream(f"{pod.pod.agent_url}{EVENTS_WITH_TRAFFIC}", "GET", None, EVENTS_TOKEN) as events:

        def traffic() -> Traffic | None:
            line = events.readline()
            assert len(line) < 10_000
            reader.read(line)
            return reader.state.traffic.get(model)

        def both() -> Traffic | None:
            found = traffic()
            counted = found is not None and found.shadow.requests and found.served.requests > before.requests
            return found if counted else None

        found = wait_until(both, "both requests are reported", 120)
    assert found is not None
    period = served_between(None, found)
    assert (period.requests, period.errors, sum(period.first_token.values())) == (before.requests + 1, 0, 1)
    # The client's view includes the connection, and reading.
    assert 0 < (period.first_token_p95 or 0) <= 1.15 * first
    assert 0 < (period.per_output_token_p95 or 0) <= 1.15 * whole / 19
    assert sum(shadow_between(None, found).first_token.values()) == 1
    assert b"raffic" not in call_line(f"{pod.pod.agent_url}/v1/events")


def call_line(url: str) -> bytes:
    with open_stream(url, "GET", None, EVENTS_TOKEN) as events:
        return events.readline()


MESSAGES = [{"role": "user", "content": "Name a colour."}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
BOTH_ROUTES: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.2,
    "length_penalty": 1.1,
    "temperature": 0.7,
    "top_p": 0.5,
    "min_p": 0.1,
    "top_k": 5,
    "seed": 7,
    "n": 2,
    "max_tokens": 3,
    "min_tokens": 1,
    "stop": ["x", "y"],
    "stop_token_ids": [5],
    "allowed_token_ids": [5, 6, 7],
    "logit_bias": {"5": 10, "6": -10},
    "bad_words": ["red"],
    "prompt_logprobs": 1,
    "stream": True,
    "stream_interval": 2,
    "user": "someone",
    "use_beam_search": True,
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "truncate_prompt_tokens": 4,
    "truncation_side": "left",
    "echo": True,
    "add_special_tokens": True,
    "response_format": {"type": "json_schema", "json_schema": {"name": "colour", "schema": SCHEMA}},
    "structured_outputs": {"regex": "(red|blue){1,2}"},
    "thinking_token_budget": 2,
    "return_tokens_as_token_ids": True,
    "return_token_ids": True,
    "return_token_offsets": True,
    "watermarking": False,
    "repetition_detection": {"max_pattern_size": 3, "min_count": 2},
    "cache_salt": "salt",
    "priority": 0,
    "request_id": "mine",
    "session_id": "mine",
    "kv_transfer_params": {"a": 1},
    "ec_transfer_params": {"a": 1},
    "vllm_xargs": {"a": 1},
    "routed_experts_prompt_start": 0,
    "mm_payload": "tensors",
    "return_mm_kwargs": True,
    "metadata": {"a": "b"},
    "safety_identifier": "x",
    "service_tier": "auto",
    "store": False,
    "prompt_cache_key": "x",
    "prompt_cache_retention": "24h",
    "best_of": 1,
}
EACH: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        *({name: value} for name, value in BOTH_ROUTES.items()),
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 3},
        {"logprobs": True, "logprob_token_ids": [5, 6]},
        {"max_completion_tokens": 3},
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": "none"},
        {"parallel_tool_calls": False},
        {"reasoning_effort": "low"},
        {"include_reasoning": False},
        {"add_generation_prompt": False},
        {"continue_final_message": True, "add_generation_prompt": False},
        {"documents": [{"title": "a", "text": "b"}]},
        {"chat_template": "{{ messages[0].content }}"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"return_prompt_text": True},
        {"media_io_kwargs": {}},
        {"mm_processor_kwargs": {}},
        {"verbosity": "low"},
        {"modalities": ["text"]},
        *({name: {}} for name in ("audio", "prediction", "web_search_options", "functions", "function_call")),
    ],
    "/v1/completions": [
        *({name: value} for name, value in BOTH_ROUTES.items()),
        {"stream": True, "stream_options": {"include_usage": True}},
        {"logprobs": 3},
        {"logprobs": 1, "logprob_token_ids": [5, 6]},
        {"logprobs": 1, "echo": True},
        {"suffix": "end"},
        {"prompt_embeds": "AAAA"},
        {"prompt": [1, 2, 3]},
        {"prompt": [49151, 2**31 - 1]},
        {"prompt": ["a", "b"], "n": 2, "logprobs": 2},
        {"response_format": {"type": "json_object"}, "logprobs": 1, "n": 2},
        *({"structured_outputs": value} for value in (
            {"json": SCHEMA}, {"choice": ["red", "blue"]}, {"json_object": True}, {"regex": "([a-z]+ ?)+"},
            {"grammar": 'root ::= "a" root | ""'}, {"regex": "(x+x+)+y"}, {"regex": "("},
        )),
    ],
}  # fmt: skip


def ask(pod: ServingPod, route: str, model: str, parameters: dict[str, Any]) -> int:
    prompt = {"messages": MESSAGES} if "chat" in route else {"prompt": PROMPT}
    limit = {} if "max_completion_tokens" in parameters else {"max_tokens": 2}
    answer = call(f"{pod.pod.engine_url}{route}", "POST", {"model": model, **prompt, **limit, **parameters})
    assert answer.status in {200, 400}, f"{route} {parameters}: {answer.status} {answer.text[:300]}"
    if answer.status == 400:
        assert answer.json["error"]["message"]
    return answer.status


def test_each_parameter_of_the_table_is_sent() -> None:
    for route, cases in EACH.items():
        table = {name for name, rows in parameters().PARAMETERS.items() if any(route in row.routes for row in rows)}
        assert table - {name for case in cases for name in case} - {"model", "messages", "prompt"} == set()


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("at_once", [pytest.param(1, marks=pytest.mark.long), 4])
def test_each_parameter_of_the_api_leaves_the_engine_alive(pod: ServingPod, at_once: int) -> None:
    boot = pod.engine_state()["bootId"]
    models = [BASE_NAME, *(pod.entries[name]["engineName"] for name in ("pirate", "poet"))]
    every = [(route, case) for route, cases in EACH.items() for case in cases]
    with ThreadPoolExecutor(at_once) as clients:
        statuses = list(
            clients.map(lambda pair: ask(pod, pair[1][0], models[pair[0] % len(models)], pair[1][1]), enumerate(every))
        )
    assert statuses.count(200) > 60
    assert pod.engine_state()["bootId"] == boot
    assert call(f"{pod.pod.engine_url}/health").status == 200
    assert "Traceback" not in pod.engine.log.read_text()


@pytest.mark.usefixtures("served")
def test_a_client_that_leaves_is_counted(pod: ServingPod) -> None:
    model = pod.entries["poet"]["engineName"]
    before = pod.engine_state()["totals"].get(model, {"completionTokens": 0})["completionTokens"]
    body = {"model": model, "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with open_stream(f"{pod.pod.engine_url}/v1/completions", "POST", body, SERVING_TOKEN) as stream:
        for _ in range(10):
            assert b'"usage"' not in stream.readline()
    wait_until(lambda: not pod.engine_state()["inFlight"], "the request is aborted", 10)
    assert 4 <= pod.engine_state()["totals"][model]["completionTokens"] - before < 400


def test_only_the_engines_port_is_open_to_other_pods(pod: ServingPod) -> None:
    listening = pod.engine.listening()
    assert [(address, port) for address, port in listening if port == pod.pod.engine_port] == [
        ("::" if has_ipv6() else "0.0.0.0", pod.pod.engine_port)  # noqa: S104
    ]
    others = {address for address, port in listening if port != pod.pod.engine_port}
    assert others <= {"127.0.0.1", "::1"}


def test_both_address_families_are_served(pod: ServingPod) -> None:
    for host in ("127.0.0.1", *(["[::1]"] if has_ipv6() else [])):
        assert call(f"http://{host}:{pod.pod.engine_port}/health").status == 200


def test_a_damaged_artifact_is_refused_and_others_keep_serving(pod: ServingPod, served: dict[str, str]) -> None:
    pod.want("pirate", "poet", "flipped")

    def failed() -> Residency | None:
        entry = pod.residency("flipped")
        return entry if entry is not None and entry.state is ResidencyState.FAILED else None

    failure = wait_until(failed, "the damaged artifact is refused", 60)
    assert failure.permanent
    assert "adapter_model.safetensors was changed after the artifact was published" in failure.message
    pod.wait_resident("pirate", "poet")
    assert pod.answers() == served
    pod.want("pirate", "poet")


def test_a_lower_sequence_is_refused(pod: ServingPod, served: dict[str, str]) -> None:
    answer = call(
        f"{pod.pod.agent_url}/v1/adapters", "PUT", {"epoch": 0, "sequence": 99, "adapters": []}, CONTROL_TOKEN
    )
    assert answer.status == 409
    assert "older than epoch 1" in answer.json["error"]
    assert pod.answers() == served


def test_an_unwanted_adapter_is_unloaded(pod: ServingPod, served: dict[str, str]) -> None:
    pod.want("poet")
    wait_until(lambda: pod.residency("pirate") is None, "pirate is gone", 60)
    body = {"model": pod.entries["pirate"]["engineName"], "prompt": PROMPT}
    assert call(f"{pod.pod.engine_url}/v1/completions", "POST", body).status == 404
    pod.want("pirate", "poet")
    pod.wait_resident("pirate", "poet")
    assert pod.answers() == served


def test_the_base_answers_as_itself_beside_adapters_after_many_were_loaded(
    pod: ServingPod, served: dict[str, str]
) -> None:
    base = pod.complete(BASE_NAME, 24)
    for name in PASSING:  # one after the other: more than the engine has slots, though never more than it may hold
        pod.want("poet", name)
        pod.wait_resident("poet", name)
        assert pod.complete(pod.entries[name]["engineName"]) not in {base, *served.values()}
    pod.want("pirate", "poet")
    pod.wait_resident("pirate", "poet")
    models = [BASE_NAME, *(pod.entries[name]["engineName"] for name in ("pirate", "poet"))] * 2
    with ThreadPoolExecutor(len(models)) as clients:
        for _ in range(4):
            texts = list(clients.map(lambda model: pod.complete(model, 24), models))
            assert [text for model, text in zip(models, texts, strict=True) if model == BASE_NAME] == [base, base]


def test_killing_the_agent_interrupts_nothing(pod: ServingPod, served: dict[str, str]) -> None:
    pod.agent.kill()
    assert pod.answers() == served
    pod.agent.start()
    wait_until(lambda: listens(pod.pod.agent_port), "the agent listens again", 30)
    pod.wait_resident("pirate", "poet")
    assert pod.answers() == served


def test_a_killed_engine_gets_its_adapters_back(pod: ServingPod, served: dict[str, str]) -> None:
    boot = pod.engine_state()["bootId"]
    pod.engine.kill()
    state = wait_until(lambda: (state := pod.state()) and not state.engine_ready and state, "the loss is reported", 5)
    assert {entry.state for entry in state.adapters} == {ResidencyState.LOADING}
    pod.engine.start()
    pod.wait_resident("pirate", "poet")
    assert pod.engine_state()["bootId"] != boot
    assert pod.answers() == served


@pytest.mark.usefixtures("served")
def test_a_draining_pod_finishes_requests_and_refuses_new_ones(pod: ServingPod) -> None:
    model = pod.entries["pirate"]["engineName"]
    body = {"model": model, "prompt": PROMPT, "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": True}
    drained: list[Answer] = []
    with open_stream(f"{pod.pod.engine_url}/v1/completions", "POST", body, SERVING_TOKEN) as stream:
        stream.readline()
        drain = threading.Thread(
            target=lambda: drained.append(call(f"{pod.pod.agent_url}/drain", "POST", None, pod.pod.admin_token))
        )
        drain.start()
        wait_until(lambda: pod.engine_state()["draining"], "the engine drains", 20)
        refused = call(f"{pod.pod.engine_url}/v1/completions", "POST", {**body, "stream": False})
        rest = stream.read()
    drain.join()
    assert (refused.status, refused.json["error"]["code"]) == (503, "not_started")
    assert refused.headers["x-tunesmith-not-started"] == "true"
    assert rest.strip().endswith(b"data: [DONE]")
    assert drained[0].json == {"drained": True}
    assert pod.state().draining


@pytest.mark.usefixtures("served")
def test_an_engine_restarted_after_its_hook_drained_it_gets_requests_again(pod: ServingPod) -> None:
    assert call(f"{pod.pod.agent_url}/drain", "POST", None, pod.pod.admin_token).json == {"drained": True}
    pod.engine.kill()
    pod.engine.start()
    wait_until(lambda: not pod.state().draining, "the pod no longer drains")
    pod.wait_resident("pirate", "poet")
