"""Pods of a pool are evicted and replaced under load: no request fails."""

from __future__ import annotations

import json
from collections import Counter
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from openai import OpenAI, OpenAIError

from e2e.custom_resources import API_VERSION, adapter_manifest, finished_job, job_manifest, pool_pods, ready_adapter
from e2e.demo import JOB, VALUES, api_key
from e2e.installation import DEMO, apply, condition, delete, get, in_store, kubectl, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Self

    from e2e.installation import Object

NAME = "steady"
CLIENTS = 3
REPLACED_SECONDS = 300


class Load:
    """Clients that send requests without pause and without retries; a context manager."""

    def __init__(self, gateway: str, model: str) -> None:
        self.model = model
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []
        self._client = OpenAI(base_url=f"{gateway}/v1", api_key=api_key(), max_retries=0, timeout=120)
        self._stopped = Event()
        self._threads = [Thread(target=self._send, args=(number % 2 == 0,)) for number in range(CLIENTS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._client.close()

    def _send(self, stream: bool) -> None:  # noqa: FBT001 - a thread's argument
        messages: Any = [{"role": "user", "content": "What is 1?"}]
        while not self._stopped.is_set():
            try:
                if stream:
                    parts = self._client.chat.completions.create(
                        model=self.model, messages=messages, max_tokens=24, temperature=0, stream=True
                    )
                    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
                else:
                    reply = self._client.chat.completions.create(
                        model=self.model, messages=messages, max_tokens=24, temperature=0
                    )
                    text = reply.choices[0].message.content or ""
                self.answers[text] += 1
            except OpenAIError as error:
                self.failures.append(f"{type(error).__name__}: {error}")


@pytest.fixture(scope="module")
def job(tiny_models: None, tmp_path_factory: pytest.TempPathFactory) -> str:  # noqa: ARG001 - they must be in the store
    """Name of a FineTuneJob that is complete."""
    rows: Path = tmp_path_factory.mktemp("rows") / "steady.jsonl"
    with rows.open("w") as file:
        for number in range(16):
            turns = [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": "A number."}]
            file.write(json.dumps({"messages": turns}) + "\n")
    uri = f"s3://tunesmith/data/{rows.name}"
    in_store("put", str(rows), uri)
    spec = yaml.safe_load(JOB.read_text())["spec"] | {
        "baseModel": {"uri": "s3://tunesmith/models/tiny-qwen3"},
        "dataset": {"train": [{"uri": uri}], "maxLength": 64},
        "method": {"lora": {"rank": 8, "alpha": 16}},
        "hyperparameters": {"maxSteps": 20, "learningRate": 5e-3, "batchSize": 8},
    }
    delete("finetunejob", NAME, DEMO)
    apply(job_manifest(NAME, spec))
    assert condition(finished_job(NAME), "Complete")["status"] == "True"
    return NAME


def pool_of(replicas: int) -> Object:
    [pool] = yaml.safe_load(VALUES.read_text())["pools"].values()
    del pool["autoscaling"]
    spec = pool | {
        "modelName": NAME,
        "baseModel": {"uri": "s3://tunesmith/models/tiny-qwen3"},
        "resources": {"gpus": 0, "cpu": "50m", "memory": "3Gi"},
        "replicas": replicas,
    }
    metadata = {"name": NAME, "namespace": DEMO}
    return {"apiVersion": API_VERSION, "kind": "ServingPool", "metadata": metadata, "spec": spec}


@pytest.fixture
def serve(job: str) -> Iterator[Callable[[int], str]]:
    """Return a function that starts a pool with a number of pods, all of which hold the adapter."""

    def start(replicas: int) -> str:
        apply(pool_of(replicas), adapter_manifest(NAME, job, NAME, modelName="numbers", replicas=replicas))
        ready_adapter(NAME, replicas, seconds=600)
        return f"{DEMO}/numbers"

    yield start
    delete("adapterdeployment", NAME, DEMO)
    delete("servingpool", NAME, DEMO)


def is_settled(replicas: int, without: set[str]) -> bool:
    """Return True if that many pods are ready, none of them among `without`, and all hold the adapter."""
    names = {pod["metadata"]["name"] for pod in pool_pods(NAME)}
    status = (get("servingpool", NAME, DEMO) or {}).get("status") or {}
    adapter = (get("adapterdeployment", NAME, DEMO) or {}).get("status") or {}
    return (
        len(names) == replicas
        and not names & without
        and status.get("readyReplicas") == replicas
        and adapter.get("readyReplicas") == replicas
    )


@pytest.mark.long
def test_an_evicted_pod_is_replaced_without_a_failed_request(gateway: str, serve: Callable[[int], str]) -> None:
    """`kubectl drain` evicts pods in the same way."""
    model = serve(2)
    first, _ = (pod["metadata"]["name"] for pod in pool_pods(NAME))
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": first, "namespace": DEMO}}
    with Load(gateway, model) as load:
        until("some answers", lambda: load.answers.total() > CLIENTS, 60)
        path = f"/api/v1/namespaces/{DEMO}/pods/{first}/eviction"
        kubectl("create", "--raw", path, "--filename", "-", stdin=json.dumps(eviction))
        until("the pod is replaced", lambda: is_settled(2, {first}), REPLACED_SECONDS)
        answered = load.answers.total()
        until("more answers", lambda: load.answers.total() > answered + CLIENTS, 60)
    assert not load.failures, load.failures[:3]
    assert len(load.answers) == 1, load.answers


@pytest.mark.long
def test_the_only_pod_is_replaced_without_a_failed_request(gateway: str, serve: Callable[[int], str]) -> None:
    model = serve(1)
    old = {pod["metadata"]["name"] for pod in pool_pods(NAME)}
    with Load(gateway, model) as load:
        until("some answers", lambda: load.answers.total() > CLIENTS, 60)
        kubectl(
            *("patch", "servingpool", NAME, "--namespace", DEMO, "--type", "merge"),
            *("--patch", json.dumps({"spec": {"drainSeconds": 31}})),
        )
        until("the pod is replaced", lambda: is_settled(1, old), REPLACED_SECONDS)
        answered = load.answers.total()
        until("more answers", lambda: load.answers.total() > answered + CLIENTS, 60)
    assert not load.failures, load.failures[:3]
    assert len(load.answers) == 1, load.answers
