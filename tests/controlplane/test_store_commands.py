"""`tunesmith data upload` and `tunesmith artifact download` against a real API server and a real S3 server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.cli.artifact_folder import publish
from tests.controlplane.manifests import job
from tests.trainer.s3server import S3Server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.controlplane.apiserver import ApiServer

pytestmark = pytest.mark.controlplane

PROGRAM = Path(sys.executable).with_name("tunesmith")
ROW = '{"text": "a"}\n'
WEIGHTS = b"weights"
SECONDS = 240


@dataclass
class Place:
    """A namespace, a store, and a person whose environment has no keys of it."""

    apiserver: ApiServer
    namespace: str
    server: S3Server
    folder: Path

    def run(self, *arguments: str | Path, **variables: str) -> tuple[int, str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        done = subprocess.run(
            [PROGRAM, *arguments, "-n", self.namespace],
            env=inherited | {"KUBECONFIG": str(self.apiserver.kubeconfig)} | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert "Traceback" not in done.stderr
        assert self.server.secret_key not in done.stdout + done.stderr
        return done.returncode, done.stdout, done.stderr

    def give_secret(self, **changes: str) -> None:
        values = self.server.environment() | changes
        self.apiserver.apply(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": "tunesmith-store", "namespace": self.namespace},
                "stringData": values,
            }
        )

    def stored(self, path: str) -> Path:
        return self.server.folder / self.server.bucket / path

    def publish(self, name: str, files: dict[str, bytes] | None = None, **status: Any) -> str:
        """Create a job whose artifact is in the store; return the digest."""
        folder = self.stored(f"store/{name}/artifact")
        digest = publish(folder, {"adapter_model.safetensors": WEIGHTS} if files is None else files)
        self.apiserver.apply(job(self.namespace, name))
        artifact = {
            "uri": f"s3://{self.server.bucket}/store/{name}/artifact",
            "digest": digest,
            "sizeBytes": 1,
            "servable": {"vllm": True},
        }
        patch = json.dumps({"status": {"artifact": artifact | status}})
        arguments = ("patch", "ftj", name, "-n", self.namespace, "--subresource=status", "--type=merge", "-p", patch)
        assert self.apiserver.kubectl(*arguments).returncode == 0
        return digest


@pytest.fixture
def place(apiserver: ApiServer, namespace: str, tmp_path: Path) -> Iterator[Place]:
    (tmp_path / "person").mkdir()
    with S3Server(tmp_path / "s3") as server:
        yield Place(apiserver, namespace, server, tmp_path / "person")


def test_rows_are_uploaded_with_the_keys_of_the_environment_or_of_the_namespaces_secret(place: Place) -> None:
    (place.folder / "train.jsonl").write_text(ROW)
    to = f"s3://{place.server.bucket}/team/train.jsonl"
    code, output, problems = place.run("data", "upload", "train.jsonl", to, **place.server.environment())
    assert (code, output) == (0, f"Uploaded train.jsonl to {to} ({len(ROW)} bytes).\n"), problems
    assert place.stored("team/train.jsonl").read_text() == ROW
    assert f"dataset: {{train: [{{uri: {to}}}]}}" in problems

    place.give_secret(AWS_ENDPOINT_URL="http://127.0.0.1:1")
    outside = {"AWS_ENDPOINT_URL": place.server.endpoint}
    folder = f"s3://{place.server.bucket}/other/"
    code, output, problems = place.run("data", "upload", "train.jsonl", folder, "-o", "json", **outside)
    assert (code, json.loads(output or "null")) == (0, [{"uri": f"{folder}train.jsonl"}]), problems
    assert place.stored("other/train.jsonl").read_text() == ROW


def test_a_folder_is_uploaded_with_what_is_below_it(place: Place) -> None:
    for name in ("a.jsonl", "more/b.csv"):
        (place.folder / "rows" / name).parent.mkdir(parents=True, exist_ok=True)
        (place.folder / "rows" / name).write_text(ROW)
    place.give_secret()
    code, _, problems = place.run("data", "upload", "rows", f"s3://{place.server.bucket}/set")
    assert code == 0, problems
    assert place.stored("set/a.jsonl").is_file()
    assert place.stored("set/more/b.csv").is_file()


@pytest.mark.parametrize(
    ("content", "to", "variables", "code", "sentence"),
    [
        (ROW + "no\n", "s3://tunesmith/a.jsonl", {}, 2, "train.jsonl line 2 is not a JSON object"),
        ("\n", "s3://tunesmith/a.jsonl", {}, 2, "train.jsonl has no rows"),
        (None, "s3://tunesmith/a.jsonl", {}, 2, "the file train.jsonl does not exist"),
        (ROW, "tunesmith/a.jsonl", {}, 2, "tunesmith/a.jsonl is not a URI of a store"),
        (ROW, "s3://tunesmith/a.jsonl", {"AWS_SECRET_ACCESS_KEY": "wrong"}, 1, "keys are read from the environment"),
    ],
    ids=["no JSON", "empty", "absent", "no uri", "wrong keys"],
)
def test_each_mistake_of_an_upload_is_a_sentence(
    place: Place, content: str | None, to: str, variables: dict[str, str], code: int, sentence: str
) -> None:
    if content is not None:
        (place.folder / "train.jsonl").write_text(content)
    environment = place.server.environment() | variables
    found, output, problems = place.run("data", "upload", "train.jsonl", to, **environment)
    assert (found, output) == (code, "")
    assert sentence in problems
    assert not place.stored("a.jsonl").exists()


def test_an_artifact_is_downloaded_and_checked(place: Place) -> None:
    digest = place.publish("tone")
    place.give_secret()
    code, output, problems = place.run("artifact", "download", "tone", "--output", "got", "-o", "json")
    names = ["adapter_model.safetensors", "tunesmith.json"]
    assert (code, json.loads(output or "null")) == (0, {"folder": "got", "digest": digest, "files": names}), problems
    assert (place.folder / "got/adapter_model.safetensors").read_bytes() == WEIGHTS
    code, _, problems = place.run("artifact", "download", "tone", "--output", "got")
    assert (code, "got exists and is not an empty folder" in problems) == (2, True)

    place.stored("store/tone/artifact/adapter_model.safetensors").write_bytes(b"other")
    code, _, problems = place.run("artifact", "download", "tone", "--output", "damaged")
    assert (code, "adapter_model.safetensors is damaged" in problems) == (1, True)
    assert list((place.folder / "damaged").iterdir()) == []


def test_an_artifact_that_is_not_the_published_one_is_refused(place: Place) -> None:
    place.give_secret()
    place.publish("other", digest="sha256:" + "b" * 64)
    code, _, problems = place.run("artifact", "download", "other")
    assert (code, "is not the published manifest" in problems) == (1, True)
    place.publish("outside", {"../escaped": WEIGHTS})
    code, _, problems = place.run("artifact", "download", "outside", "--output", "outside")
    assert (code, "lists '../escaped', which is not a file of an adapter" in problems) == (1, True)
    assert not (place.folder / "escaped").exists()
    place.apiserver.apply(job(place.namespace, "young"))
    code, _, problems = place.run("artifact", "download", "young")
    assert (code, "has published no artifact" in problems) == (1, True)
