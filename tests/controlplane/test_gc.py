"""`tunesmith gc` against a real API server and a real S3 server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
import pytest
from obstore.store import S3Store

from tests.controlplane.manifests import adapter, job, pool
from tests.trainer.s3server import S3Server
from tunesmith.contracts.owner import Owner

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.controlplane.apiserver import ApiServer

pytestmark = pytest.mark.controlplane

PROGRAM = Path(sys.executable).with_name("tunesmith")
CHECKPOINT = "tmp/checkpoints/step-00000004/weights"
MANIFEST = "artifact/tunesmith.json"
FILES = (CHECKPOINT, MANIFEST, "artifact/adapter_model.safetensors")
BESIDE = ("merged/model.safetensors", "tensorboard/events.out.tfevents.1")
SECONDS = 240


@dataclass
class Place:
    """A namespace with FineTuneJobs that are there and others that are gone, and their folders in the store."""

    apiserver: ApiServer
    namespace: str
    server: S3Server
    cluster: str

    @property
    def store(self) -> S3Store:
        return S3Store(
            self.server.bucket,
            prefix="store",
            endpoint=self.server.endpoint,
            access_key_id=self.server.access_key,
            secret_access_key=self.server.secret_key,
            region="us-east-1",
            client_options={"allow_http": True},
        )

    def folder(self, name: str, uid: str = "", *, cluster: str | None = None, files: Sequence[str] = FILES) -> str:
        """Fills the folder of a FineTuneJob; with the cluster's mark unless another one is given ('' for none)."""
        uid = uid or str(uuid.uuid4())
        path = f"{self.namespace}/{name}-{uid}"
        for file in files:
            obstore.put(self.store, f"{path}/{file}", b"0" * 100)
        if cluster != "":
            owner = Owner(cluster=cluster or self.cluster, namespace=self.namespace, name=name, uid=uid)
            obstore.put(self.store, f"{path}/owner.json", owner.model_dump_json(by_alias=True).encode())
        return path

    def stored(self, path: str) -> list[str]:
        listed = [entry["path"] for page in obstore.list(self.store, prefix=path) for entry in page]
        return sorted(entry.removeprefix(f"{path}/") for entry in listed)

    def create(self, manifest: dict[str, Any]) -> str:
        """Creates a resource and returns its uid."""
        self.apiserver.apply(manifest)
        name = manifest["metadata"]["name"]
        shown = self.apiserver.kubectl("get", manifest["kind"], name, "-n", self.namespace, "-o", "json")
        return str(json.loads(shown.stdout)["metadata"]["uid"])

    def set_status(self, kind: str, name: str, status: dict[str, Any]) -> None:
        patch = ("--subresource=status", "--type=merge", "-p", json.dumps({"status": status}))
        assert self.apiserver.kubectl("patch", kind, name, "-n", self.namespace, *patch).returncode == 0

    def gc(self, *arguments: str, store: str = "s3://tunesmith/store", **variables: str) -> tuple[int, str, str]:
        environment = os.environ | self.server.environment() | {"KUBECONFIG": str(self.apiserver.kubeconfig)}
        command = [PROGRAM, "gc", "--store", store, "-n", self.namespace, *arguments]
        given = {name: value for name, value in (environment | variables).items() if value}
        done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=SECONDS, check=False)
        return done.returncode, done.stdout, done.stderr


@pytest.fixture
def place(apiserver: ApiServer, namespace: str, tmp_path: Path) -> Iterator[Place]:
    shown = apiserver.kubectl("get", "namespace", "kube-system", "-o", "json")
    with S3Server(tmp_path / "s3") as server:
        yield Place(apiserver, namespace, server, json.loads(shown.stdout)["metadata"]["uid"])


def serve(place: Place, folder: str) -> None:
    """An AdapterDeployment serves the artifact of a job's folder."""
    place.create(adapter(place.namespace, "bot"))
    revision = {
        "digest": "sha256:" + "a" * 64,
        "engineName": "x",
        "state": "Resident",
        "uri": f"s3://tunesmith/store/{folder}/artifact",
    }
    place.set_status("adapterdeployment", "bot", {"revisions": [revision]})


def test_what_deleted_jobs_left_goes_and_nothing_else(place: Place) -> None:
    everything = sorted([CHECKPOINT, MANIFEST, "artifact/adapter_model.safetensors", "owner.json"])
    running = place.folder("running", place.create(job(place.namespace, "running")))
    complete = place.folder("complete", place.create(job(place.namespace, "complete")))
    ended = {"type": "Complete", "status": "True", "reason": "Complete", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    place.set_status("finetunejob", "complete", {"conditions": [ended]})
    deleted, used = place.folder("deleted"), place.folder("used")
    serve(place, used)
    foreign, unsigned = place.folder("foreign", cluster="another"), place.folder("unsigned", cluster="")
    obstore.put(place.store, f"{place.namespace}/notes.txt", b"not Tunesmith's")

    code, output, problems = place.gc("--older-than", "0m")
    assert code == 0, problems
    rows = [line.split()[:3] for line in output.splitlines()]
    assert rows == [
        ["NAMESPACE", "JOB", "WHAT"],
        *([place.namespace, name, "tmp"] for name in ("complete", "deleted", "used")),
    ]
    assert "300 B would be freed: add --delete to remove them" in problems
    assert "2 kept: it belongs to another cluster" in problems
    assert "2 kept: it has no owner.json, so its owner is unknown" in problems
    assert "1 kept: it is a published artifact: --artifacts removes it too" in problems
    assert place.stored(deleted) == everything, "nothing is removed without --delete"

    code, output, _ = place.gc("--delete", "-o", "json")
    assert code == 0
    assert {row["kept"] for row in json.loads(output) if row["job"] == "deleted"} == {
        "it was written more recently than --older-than allows",
        "it is a published artifact: --artifacts removes it too",
    }
    assert place.stored(deleted) == everything, "a day must pass"

    code, output, problems = place.gc("--older-than", "0m", "--artifacts", "--delete", "-o", "json")
    assert (code, problems) == (0, "")
    gone = {(row["job"], row["what"]) for row in json.loads(output) if row["deleted"]}
    assert gone == {("complete", "tmp"), ("deleted", "tmp"), ("deleted", "artifact"), ("used", "tmp")}
    [kept] = [row for row in json.loads(output) if (row["job"], row["what"]) == ("used", "artifact")]
    assert kept["kept"] == f"AdapterDeployment {place.namespace}/bot uses it"
    without = [name for name in everything if name != CHECKPOINT]
    assert (place.stored(deleted), place.stored(used), place.stored(complete)) == ([], without, without)
    assert place.stored(running) == place.stored(foreign) == everything
    assert len(place.stored(unsigned)) == 3
    assert "notes.txt" in place.stored(place.namespace)

    code, output, problems = place.gc("--older-than", "0m")
    assert (code, output) == (0, "")
    assert "nothing to remove" in problems


def test_what_lies_beside_an_artifact_stays_with_it_and_goes_where_none_was_published(place: Place) -> None:
    published = place.folder("published", files=[*FILES, *BESIDE])
    half = [CHECKPOINT, "artifact/adapter_model.safetensors", *BESIDE]
    stopped = place.folder("stopped", files=half)
    served = place.folder("served", files=[CHECKPOINT, *BESIDE])
    failed = place.folder("failed", place.create(job(place.namespace, "failed")), files=half)
    place.create(pool(place.namespace, "big", baseModel={"uri": f"s3://tunesmith/store/{served}/merged"}))

    code, output, problems = place.gc("--older-than", "0m", "--delete", "-o", "json")
    assert (code, problems) == (0, "")
    shown = {(row["job"], row["what"]): row for row in json.loads(output)}
    assert {parts for parts, row in shown.items() if row["deleted"]} == {
        ("published", "tmp"),
        ("served", "tmp"),
        ("stopped", "tmp"),
        ("stopped", "unpublished"),
    }
    assert shown["stopped", "unpublished"]["uri"] == f"s3://tunesmith/store/{stopped}"
    assert shown["served", "unpublished"]["kept"] == f"ServingPool {place.namespace}/big uses it"
    assert place.stored(stopped) == []
    assert place.stored(published) == sorted([*FILES[1:], *BESIDE, "owner.json"])
    assert place.stored(served) == sorted([*BESIDE, "owner.json"])
    assert place.stored(failed) == sorted([*half, "owner.json"])

    code, _, problems = place.gc("--older-than", "0m", "--artifacts", "--delete", "-o", "json")
    assert (code, problems) == (0, "")
    assert place.stored(published) == []


@pytest.mark.parametrize("store", ["s3://tunesmith//store", "S3://tunesmith/store/", "s3://tunesmith/store//"])
def test_however_the_store_is_spelled_what_serves_stays(place: Place, store: str) -> None:
    used, deleted = place.folder("used"), place.folder("deleted")
    serve(place, used)
    code, _, problems = place.gc("--older-than", "0m", "--artifacts", "--delete", "-o", "json", store=store)
    assert (code, problems) == (0, "")
    assert place.stored(deleted) == []
    assert place.stored(used) == sorted([*FILES[1:], "owner.json"])


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "words"),
    [
        (("--older-than", "a week"), {}, 2, "--older-than a week is not a duration: write seconds, minutes"),
        (
            (),
            {"AWS_SECRET_ACCESS_KEY": "wrong"},
            1,
            "was denied with the credentials of the environment: check the keys",
        ),
        ((), {"AWS_SECRET_ACCESS_KEY": ""}, 1, "AWS_ACCESS_KEY_ID and no AWS_SECRET_ACCESS_KEY: add the key"),
        ((), {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, 1, "must have AWS_ACCESS_KEY_ID and AWS_SECRET_"),
        ((), {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, 1, "could not be reached, tried 5 times"),
        (("--store", "s3://tunesmith/stroe"), {}, 1, "the store s3://tunesmith/stroe does not exist: check the uri"),
        (("--store", "s3://tunesmiht/store"), {}, 1, "the store s3://tunesmiht/store does not exist: check the uri"),
        (
            ("--store", "s3://tunesmith"),
            {},
            1,
            "has no folder of a FineTuneJob, <namespace>/<job>-<uid>: check --store",
        ),
        (("--store", "abfs://tunesmith/store"), {}, 2, "write az://tunesmith/store"),
    ],
    ids=[
        "no duration",
        "wrong credentials",
        "half a credential",
        "no credentials",
        "no server",
        "a mistyped folder",
        "a mistyped bucket",
        "the bucket instead of the folder",
        "another tool's name",
    ],
)
def test_invalid_fields_are_reported_in_a_sentence(
    place: Place, arguments: tuple[str, ...], variables: dict[str, str], code: int, words: str
) -> None:
    place.folder("deleted")
    ended, output, problems = place.gc(*arguments, **variables)
    assert (ended, output) == (code, "")
    assert problems.startswith("error: ")
    assert words in problems
    assert "Traceback" not in problems
    assert "writer" not in problems
