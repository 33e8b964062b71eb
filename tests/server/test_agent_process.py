"""The agent's process and its HTTP API, without an engine; test_serving_pod.py tests it with one."""

from __future__ import annotations

import json
import subprocess
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.server.server_rig import (
    CONTROL_KEY,
    CONTROL_TOKEN,
    EVENTS_TOKEN,
    METRICS_TOKEN,
    POD_UID,
    SERVING_TOKEN,
    Artifact,
    Container,
    Pod,
    S3Server,
    agent_container,
    listens,
    wait_until,
)
from tunesmith.contracts.agent import (
    MAX_EPOCH_LEAD,
    DesiredAdapter,
    PodEvent,
    PodState,
    ResidencyState,
    list_digest,
    pod_tokens,
)
from tunesmith.contracts.podevents import EventReader

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

ENTRY = {"engineName": "a", "uri": "b", "digest": "sha256:" + "c" * 64}
CONTROL = {"Authorization": f"Bearer {CONTROL_TOKEN}"}
EVENTS = {"Authorization": f"Bearer {EVENTS_TOKEN}"}


@pytest.fixture
def pod(tmp_path: Path, base: Path, store: S3Server) -> Pod:
    return Pod(tmp_path / "pod", base, store)


@pytest.fixture
def agent(pod: Pod) -> Iterator[Container]:
    container = agent_container(pod, drain_seconds=1)
    container.start()
    wait_until(lambda: listens(pod.agent_port), "the agent listens", 60)
    yield container
    container.kill()


@pytest.fixture
async def http(agent: Container, pod: Pod) -> AsyncIterator[aiohttp.ClientSession]:
    assert agent.running()
    async with aiohttp.ClientSession(pod.agent_url) as session:
        yield session


async def until(http: aiohttp.ClientSession, condition: Callable[[PodState], Any]) -> PodState:
    """The first line of the event stream that meets the condition."""
    timeout = aiohttp.ClientTimeout(total=60)
    reader = EventReader()
    async with http.get("/v1/events", headers=EVENTS, timeout=timeout) as events:
        async for line in events.content:
            reader.read(line)
            if condition(reader.state):
                return reader.state
    raise AssertionError("the event stream closed")


async def put(http: aiohttp.ClientSession, body: Any) -> tuple[int, Any]:
    async with http.put("/v1/adapters", json=body, headers=CONTROL) as response:
        return response.status, await response.json()


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", "/v1/adapters"), ("GET", "/v1/events"), ("POST", "/drain"), ("GET", "/metrics"), ("GET", "/x")],
)
async def test_each_route_needs_the_token_of_its_purpose(
    http: aiohttp.ClientSession, pod: Pod, method: str, path: str
) -> None:
    tokens = {"control": CONTROL_TOKEN, "events": EVENTS_TOKEN, "metrics": METRICS_TOKEN, "admin": pod.admin_token}
    purpose = {"/v1/events": "events", "/metrics": "metrics", "/drain": "admin"}.get(path, "control")
    right = tokens[purpose]
    others = {*tokens.values(), SERVING_TOKEN, CONTROL_KEY.decode(), "wrong"} - {right}
    others |= {pod_tokens((CONTROL_KEY,), "uid-of-another-pod")[0], (pod.keys / "metrics").read_text().strip()}
    for headers in (
        {},
        {"Authorization": f"Basic {right}"},
        *({"Authorization": f"Bearer {wrong}"} for wrong in others),
    ):
        async with http.request(method, path, headers=headers) as response:
            assert response.status == 401
    async with http.request(method, path, headers={"Authorization": f"Bearer {right}"}) as response:
        assert response.status in {200, 400, 404}
    async with http.get("/healthz") as response:
        assert response.status == 200


async def test_a_rotated_key_is_accepted_beside_the_previous_one(http: aiohttp.ClientSession, pod: Pod) -> None:
    new_key = b"another-control-key-of-the-tests"
    new = {"Authorization": f"Bearer {pod_tokens((new_key,), POD_UID)[0]}"}

    async def accepted(headers: dict[str, str]) -> bool:
        async with http.put("/v1/adapters", json={}, headers=headers) as response:
            return response.status != 401

    (pod.keys / "control").write_bytes(new_key + b"\n" + CONTROL_KEY)
    while not await accepted(new):
        assert await accepted(CONTROL)
    assert await accepted(CONTROL)
    (pod.keys / "control").write_bytes(new_key)
    while await accepted(CONTROL):
        assert await accepted(new)
    assert await accepted(new)


async def test_the_stream_begins_with_the_state_and_sends_heartbeats(
    http: aiohttp.ClientSession, fingerprint: str
) -> None:
    async with http.get("/v1/events", headers=EVENTS) as events:
        lines = [PodEvent.model_validate_json(await events.content.readline()) for _ in range(2)]
    assert [line.snapshot for line in lines] == [True, False]
    assert [line.base_model_fingerprint for line in lines] == [fingerprint] * 2


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ([], "the body"),
        ({"epoch": -1, "sequence": 0, "adapters": []}, "epoch"),
        ({"epoch": 1, "sequence": 1}, "adapters"),
        ({"epoch": 1, "sequence": 1, "adapters": [{"engineName": "a", "uri": "b"}]}, "adapters.0.digest"),
        ({"epoch": 1, "sequence": 1, "adapters": [ENTRY] * 2}, "adapters: an"),
        ({"epoch": 1, "sequence": 1, "adapters": [ENTRY | {"digest": "sha256:../../etc"}]}, "adapters.0.digest"),
        ({"epoch": 1, "sequence": 1, "adapters": [ENTRY] * 1025}, "adapters"),
        ({"epoch": 2**62, "sequence": 1, "adapters": []}, "epoch"),
        ({"epoch": 2**40, "sequence": 1, "adapters": []}, f"epoch {2**40} is more than 86400 s ahead"),
    ],
)
async def test_a_malformed_list_is_refused_and_changes_nothing(
    http: aiohttp.ClientSession, body: Any, place: str
) -> None:
    status, answer = await put(http, body)
    assert (status, answer["error"].startswith(place)) == (400, True), answer
    assert (await until(http, bool)).sequence == 0


async def test_a_foreign_list_is_replaced_and_visible(http: aiohttp.ClientSession) -> None:
    """One request with the highest epoch that is plausible locks the operator out until its next list only."""
    epoch = int(time.time()) + MAX_EPOCH_LEAD - 600
    assert (await put(http, {"epoch": epoch, "sequence": 2**53, "adapters": []}))[0] == 200
    state = await until(http, lambda state: state.epoch == epoch)
    assert state.list_digest == list_digest([])
    wanted = {"epoch": state.epoch + 1, "sequence": 7, "adapters": [ENTRY]}
    assert (await put(http, wanted))[0] == 200
    assert (await put(http, wanted | {"adapters": []}))[0] == 409, "another list of the same number"
    held = await until(http, lambda state: state.epoch == wanted["epoch"])
    assert held.list_digest == list_digest([DesiredAdapter.model_validate(ENTRY)])


async def test_older_lists_are_refused_and_lists_survive_the_agent(
    http: aiohttp.ClientSession, agent: Container, pod: Pod
) -> None:
    assert await put(http, {"epoch": 2, "sequence": 7, "adapters": []}) == (200, {"epoch": 2, "sequence": 7})
    assert (await put(http, {"epoch": 2, "sequence": 7, "adapters": []}))[0] == 200
    token = pod.admin_token
    agent.kill()
    agent.start()
    wait_until(lambda: listens(pod.agent_port), "the agent listens", 60)
    for older in ({"epoch": 2, "sequence": 6}, {"epoch": 1, "sequence": 8}):
        status, answer = await put(http, {**older, "adapters": []})
        assert status == 409
        assert "is older than epoch 2, sequence 7" in answer["error"]
    assert pod.admin_token == token
    assert (await put(http, {"epoch": 3, "sequence": 0, "adapters": []}))[0] == 200


async def test_without_an_engine_adapters_are_fetched_and_wait(
    http: aiohttp.ClientSession, adapter: Callable[..., Artifact], store: S3Server, pod: Pod
) -> None:
    sound, unfit = adapter(1).publish(store), adapter(2, use_dora=True).publish(store, model="unfit")
    await put(http, {"epoch": 1, "sequence": 1, "adapters": [sound, unfit]})
    state = await until(http, lambda state: {entry.state for entry in state.adapters} == {"Loading", "Failed"})
    by_name = {entry.engine_name: entry for entry in state.adapters}
    assert by_name[sound["engineName"]].message == "the engine is not ready"
    assert by_name[unfit["engineName"]].permanent
    assert "DoRA" in by_name[unfit["engineName"]].message
    assert not state.engine_ready
    assert [path.name for path in pod.adapters.iterdir()] == [sound["digest"].removeprefix("sha256:")]
    async with http.get("/metrics", headers={"Authorization": f"Bearer {METRICS_TOKEN}"}) as response:
        text = await response.text()
    assert 'tunesmith_agent_adapter_failures_total{permanent="true"} 1.0' in text
    assert 'tunesmith_agent_adapters{state="Loading"} 1.0' in text


async def test_an_artifact_that_appears_later_is_fetched_for_a_new_list(
    http: aiohttp.ClientSession, adapter: Callable[..., Artifact], store: S3Server
) -> None:
    entry = adapter().publish(store)
    manifest = f"{entry['uri']}/tunesmith.json"
    document = store.files.cat_file(manifest)
    store.files.rm(manifest)
    await put(http, {"epoch": 1, "sequence": 1, "adapters": [entry]})
    state = await until(http, lambda state: state.adapters and state.adapters[0].state is ResidencyState.FAILED)
    assert "tunesmith.json does not exist" in state.adapters[0].message
    store.files.pipe_file(manifest, document)
    await put(http, {"epoch": 1, "sequence": 2, "adapters": []})
    await put(http, {"epoch": 1, "sequence": 3, "adapters": [entry]})
    await until(http, lambda state: state.adapters and state.adapters[0].state is ResidencyState.LOADING)


async def test_a_pod_whose_engine_is_down_drains_at_once(http: aiohttp.ClientSession, pod: Pod) -> None:
    async with http.post("/drain", headers={"Authorization": f"Bearer {pod.admin_token}"}) as response:
        assert await response.json() == {"drained": True}
    assert (await until(http, bool)).draining


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda pod: (pod.keys / "control").unlink(), "with the pool's control key cannot be read"),
        (lambda pod: (pod.keys / "events").write_text("short"), "with the pool's events key cannot be used"),
        (lambda pod: setattr(pod, "base", pod.folder / "none"), "The base model at"),
        (lambda pod: (pod.state.mkdir(), (pod.state / "desired.json").write_text("{")), "is damaged"),
    ],
)
def test_errors_in_the_pods_setup_are_reported(pod: Pod, damage: Callable[[Pod], Any], sentence: str) -> None:
    damage(pod)
    container = agent_container(pod)
    done = subprocess.run(container._command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_the_state_is_one_line_of_json(pod: Pod, agent: Container) -> None:
    assert agent.running()
    assert (pod.state / "middleware/tunesmith_middleware.py").is_file()
    assert (pod.state / "admin-token").stat().st_mode & 0o777 == 0o440
    assert "\n" not in json.dumps(PodState().model_dump(mode="json"))
