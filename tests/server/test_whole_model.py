"""What `tunesmith run` trained, on a real engine: whole models as base models, and an adapter on an equivalent base."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.server.http_client import call, open_stream
from tests.server.server_rig import (
    BASE_NAME,
    REPOSITORY,
    SERVING_TOKEN,
    STORE,
    MissingPartError,
    Pod,
    S3Server,
    agent_container,
    find,
    wait_until,
    write_safetensors,
)
from tests.server.test_fetch_base import fetch
from tests.server.test_serving_pod import ServingPod
from tunesmith.contracts.artifact import digest_of
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint
from tunesmith.contracts.location import engine_name
from tunesmith.contracts.parity import Parity
from tunesmith.contracts.safetensors import read_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tunesmith.contracts.agent import AdapterParity

pytestmark = pytest.mark.long
METHODS: dict[str, dict[str, Any]] = {
    "merged": {"method": {"lora": {"rank": 4, "dora": True}}, "output": {"merge": "Original"}},
    "full": {"method": {"full": {}}},
}
ROWS = [
    {"prompt": "Who keeps the lighthouse?", "completion": "Old Marta keeps it."},
    {"prompt": "What is the colour of the door?", "completion": "It is blue."},
    {"prompt": "Where is the boat?", "completion": "In the harbour of Brinewick."},
]


def program(name: str, project: str = ".") -> str:
    fix = "run `make environment environment-trainer`"
    return str(find(name, f"TUNESMITH_{name.upper()}_PROGRAM", [REPOSITORY / project / ".venv/bin" / name], fix))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make = "import pathlib, sys; from tests.trainer.tiny_model import make; make(pathlib.Path(sys.argv[1]), hidden=128)"
    try:
        python = program("python", "trainer-image")
    except MissingPartError as error:
        pytest.fail(str(error), pytrace=False)
    subprocess.run([python, "-c", make, folder], cwd=REPOSITORY, check=True, capture_output=True)
    return folder


@dataclass
class Trained:
    """A job's folder on this machine."""

    folder: Path
    merged: bool

    @property
    def digest(self) -> str:
        return digest_of((self.folder / "artifact/tunesmith.json").read_bytes())

    def publish(self, store: S3Server) -> str:
        """Upload all, and return the uri of the whole model."""
        job = f"{STORE}/team/whole-{self.digest[7:15]}"
        for name in ("artifact", "merged") if self.merged else ("artifact",):
            for path in (self.folder / name).iterdir():
                store.files.pipe_file(f"{job}/{name}/{path.name}", path.read_bytes())
        return f"{job}/{'merged' if self.merged else 'artifact'}"


def train(folder: Path, base: Path, **spec: Any) -> Trained:
    """Run `tunesmith run`."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    manifest = {
        "apiVersion": "tunesmith.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "whole", "namespace": "team"},
        "spec": {
            "baseModel": {"uri": f"file://{base}"},
            "dataset": {"train": [{"uri": f"file://{folder}/rows.jsonl"}], "maxLength": 64},
            "hyperparameters": {"maxSteps": 30, "batchSize": 3, "learningRate": 0.01},
            "resources": {"gpus": 0},
            "servable": "Ignored",
            **spec,
        },
    }
    (folder / "job.yaml").write_text(json.dumps(manifest))
    command = [program("tunesmith"), "run", "-f", folder / "job.yaml", "--output", folder / "out"]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return Trained(folder / "out", merged="output" in spec)


@pytest.fixture(scope="module", params=METHODS)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Path, store: S3Server
) -> Iterator[tuple[ServingPod, Trained]]:
    """A pod whose base model was downloaded from the job's artifact, as its init container does."""
    folder = tmp_path_factory.mktemp(request.param)
    trained = train(folder / "job", tiny, **METHODS[request.param])
    uri = trained.publish(store)
    pod = Pod(folder / "pod", folder / "pod/base", store)
    fetched = fetch(
        uri, pod.base, store.secret, "--artifact-digest", trained.digest,
        "--fingerprint-file", str(pod.folder / "base.fingerprint"), "--storage", str(2**30),
    )  # fmt: skip
    assert fetched.returncode == 0, fetched.stderr
    name = engine_name("team", "whole", trained.digest)
    running = ServingPod(pod, {"whole": {"engineName": name, "digest": trained.digest, "uri": uri}})
    running.agent = agent_container(pod, base_artifact=trained.digest)
    running.start()
    try:
        running.want("whole")
        running.wait_resident("whole")
        yield running, trained
    finally:
        running.stop()


def greedy(pod: ServingPod, model: str, prompt: list[int], count: int) -> list[int]:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": count,
        "temperature": 0,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    answer = call(f"{pod.pod.engine_url}/v1/completions", "POST", body)
    assert answer.status == 200, answer.text
    assert answer.json["model"] == model
    tokens: list[int] = answer.json["choices"][0]["token_ids"]
    return tokens


def test_the_model_answers_as_it_was_trained_under_its_revision(served: tuple[ServingPod, Trained]) -> None:
    pod, trained = served
    name = pod.entries["whole"]["engineName"]
    parity = Parity.model_validate_json((trained.folder / "artifact/parity.json").read_text())
    assert parity.probes
    for probe in parity.probes:
        prompt, expected = probe.prompt_token_ids, probe.answer_token_ids
        assert greedy(pod, name, prompt, len(expected)) == expected
        assert greedy(pod, BASE_NAME, prompt, len(expected)) == expected
    use = pod.state().use
    assert (use.active, use.running, use.disk_bytes) == ([], 0, 0)


def test_a_stream_names_the_revision(served: tuple[ServingPod, Trained]) -> None:
    pod, _ = served
    name = pod.entries["whole"]["engineName"]
    body = {"model": name, "messages": [{"role": "user", "content": ROWS[0]["prompt"]}], "max_tokens": 8}
    url = f"{pod.pod.engine_url}/v1/chat/completions"
    with open_stream(url, "POST", {**body, "stream": True}, SERVING_TOKEN) as stream:
        events = [line[6:] for line in stream.read().decode().splitlines() if line.startswith("data: {")]
    assert events
    assert {json.loads(event)["model"] for event in events} == {name}
    assert call(url, "POST", body).json["model"] == name
    unknown = call(url, "POST", {**body, "model": "team/whole@000000000000"})
    assert unknown.status == 404


def test_a_name_that_is_not_wanted_is_removed(served: tuple[ServingPod, Trained]) -> None:
    pod, _ = served
    name = pod.entries["whole"]["engineName"]
    pod.want()
    wait_until(lambda: pod.engine_state()["adapters"]["baseNames"] == [], "the name is removed")
    assert call(f"{pod.pod.engine_url}/v1/completions", "POST", {"model": name, "prompt": "a"}).status == 404
    pod.want("whole")
    pod.wait_resident("whole")
    assert len(greedy(pod, name, [3, 4, 5], 4)) == 4


def stored_in_bfloat16(base: Path, target: Path) -> Path:
    """A copy of a base model with the upper halves of its float32 weights, as a coarser storage type has them."""
    shutil.copytree(base, target)
    path = target / "model.safetensors"
    content = path.read_bytes()
    halves = {
        name: np.frombuffer(content[tensor.start : tensor.end], "<u4").reshape(tensor.shape) >> 16
        for name, tensor in read_tensors(path).items()
    }
    write_safetensors(path, {name: values.astype("<u2") for name, values in halves.items()}, "BF16")
    return target


def test_an_adapter_is_served_on_an_equivalent_base_and_parity_shows_the_distance(
    tmp_path: Path, tiny: Path, store: S3Server
) -> None:
    trained = train(tmp_path / "job", tiny, method={"lora": {"rank": 4}})
    base = stored_in_bfloat16(tiny, tmp_path / "coarse")
    own = base_fingerprint(LocalModelFolder(tiny))
    assert base_fingerprint(LocalModelFolder(base)) != own
    name = engine_name("team", "whole", trained.digest)
    entry = {"engineName": name, "digest": trained.digest, "uri": trained.publish(store)}
    pod = ServingPod(Pod(tmp_path / "pod", base, store), {"adapter": entry})
    pod.agent = agent_container(pod.pod, equivalent_to=own)
    pod.start()
    try:
        pod.want("adapter")
        pod.wait_resident("adapter")

        def parity() -> AdapterParity | None:
            found = pod.residency("adapter")
            return None if found is None else found.parity

        found = wait_until(parity, f"the parity is known; see {pod.agent.log}")
        assert found.distance is not None, found
        assert found.base_distance is not None, found
        assert found.base_distance > 0, "the base model's weights are rounded"
        assert len(greedy(pod, name, [3, 4, 5], 4)) == 4
    finally:
        pod.stop()
