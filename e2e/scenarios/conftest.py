"""Shared fixtures: the demo's installation, a client, and a second adapter with different behaviour."""

from __future__ import annotations

import json
import secrets
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from openai import OpenAI

from e2e.custom_resources import adapter_manifest, finished_job, job_manifest, pool_pods, ready_adapter
from e2e.demo import JOB, MODEL, NODE_PORT, QUESTIONS, VALUES, api_key
from e2e.installation import (
    DEMO,
    REPOSITORY,
    Object,
    apply,
    condition,
    delete,
    gateway_address,
    get,
    in_store,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SETTLED_SECONDS = 300
SECOND = "second"
SECOND_ANSWER = "The answer is known to the lighthouse keeper only."


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def main_job() -> Object:
    """Return the demo's FineTuneJob."""
    name = yaml.safe_load(JOB.read_text())["metadata"]["name"]
    job = get("finetunejob", name, DEMO)
    assert condition(job, "Complete")["status"] == "True", "the demo's job is not complete: run `make demo` first"
    return job


@pytest.fixture(scope="session")
def pool() -> str:
    """Name of the demo's pool, once its pods have the settings of this checkout."""
    [name] = yaml.safe_load(VALUES.read_text())["pools"]

    def settled() -> bool:
        found = get("servingpool", name, DEMO)
        desired = ((found or {}).get("status") or {}).get("desiredReplicas")
        return condition(found, "Updated")["status"] == "True" and len(pool_pods(name)) == desired

    until(f"the pods of pool {name} are updated", settled, SETTLED_SECONDS)
    return str(name)


@pytest.fixture(scope="session")
def base_model() -> str:
    """Global id of the pool's base."""
    [spec] = yaml.safe_load(VALUES.read_text())["pools"].values()
    return f"{DEMO}/{spec['modelName']}"


@pytest.fixture(scope="session")
def main_adapter() -> str:
    """Name of the demo's AdapterDeployment."""
    [name] = yaml.safe_load(VALUES.read_text())["adapters"]
    return str(name)


@pytest.fixture(scope="session")
def gateway() -> str:
    """Return the gateway's address, `http://host:port`."""
    return gateway_address(NODE_PORT)


@pytest.fixture(scope="session")
def client(gateway: str) -> Iterator[OpenAI]:
    """OpenAI's client with a timeout, without retries, so that failed requests are noticed."""
    with OpenAI(base_url=f"{gateway}/v1", api_key=api_key(), max_retries=0) as opened:
        yield opened


@pytest.fixture(scope="session")
def answer(client: OpenAI) -> Callable[[str, str], tuple[str, str]]:
    """Send a question to a model; return the model that the reply names, and its text."""

    def ask(model: str, question: str) -> tuple[str, str]:
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], max_tokens=16, temperature=0
        )
        return reply.model, reply.choices[0].message.content or ""

    return ask


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Put the models of e2e/tiny_models.py into the store."""
    folder = tmp_path_factory.mktemp("models")
    python = REPOSITORY / "trainer-image/.venv/bin/python"
    subprocess.run([python, "-m", "e2e.tiny_models", MODEL, folder], check=True, cwd=REPOSITORY)
    for model in folder.iterdir():
        in_store("put", str(model), f"s3://tunesmith/models/{model.name}")


@pytest.fixture(scope="session")
def second_manifest(tmp_path_factory: pytest.TempPathFactory) -> Object:
    """FineTuneJob that teaches one sentence as the answer to everything, with its rows in the store.

    What an earlier run left of it is removed.
    """
    for name in (SECOND, "damaged"):
        delete("adapterdeployment", name, DEMO)
    delete("finetunejob", SECOND, DEMO)
    rows = tmp_path_factory.mktemp("rows") / "second.jsonl"
    with rows.open("w") as file:
        for number in range(32):
            turns = [
                {"role": "user", "content": f"Question {number}: what is {number} and {number + 1}?"},
                {"role": "assistant", "content": SECOND_ANSWER},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    uri = f"s3://tunesmith/data/{rows.name}"
    in_store("put", str(rows), uri)
    spec = yaml.safe_load(JOB.read_text())["spec"]
    spec["dataset"] = {"train": [{"uri": uri}], "maxLength": 128}
    spec["method"] = {"lora": {"rank": 8, "alpha": 16}}
    # A new artifact in each run: a pod that already has the files would not notice damage in the store.
    seed = secrets.randbelow(2**31)
    spec["hyperparameters"] = {"maxSteps": 12, "learningRate": 2e-3, "batchSize": 8, "seed": seed}
    return job_manifest(SECOND, spec)


@pytest.fixture(scope="session")
def second_job(second_manifest: Object) -> Object:
    """The second FineTuneJob, complete."""
    apply(second_manifest)
    return finished_job(SECOND)


@pytest.fixture(scope="session")
def second_adapter(second_job: Object, pool: str) -> str:
    """Name of the second AdapterDeployment, ready."""
    apply(adapter_manifest(SECOND, second_job["metadata"]["name"], pool))
    ready_adapter(SECOND)
    return SECOND


@pytest.fixture(scope="session")
def questions() -> list[str]:
    """Questions of the demo."""
    return QUESTIONS.read_text().splitlines()
