"""The commands that talk to a cluster, against a real API server; the test writes the status as the operator would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.controlplane.apiserver import until
from tests.controlplane.manifests import adapter, job, pool
from tunesmith.contracts.apikey import key_digest, parse_key_record

if TYPE_CHECKING:
    from tests.controlplane.apiserver import ApiServer

pytestmark = pytest.mark.controlplane

PROGRAM = Path(sys.executable).with_name("tunesmith")
DIGEST = "sha256:" + "a" * 64
NOW = "2026-01-01T00:00:00Z"
SECONDS = 240


def start(apiserver: ApiServer, *arguments: str | Path) -> subprocess.Popen[str]:
    # With compiled bytecode Kubernetes' client is imported in a third of the time.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment = inherited | {"KUBECONFIG": str(apiserver.kubeconfig)}
    # Where the test run was started in the background, SIGINT is ignored and its children would inherit that.
    command = ["env", "--default-signal=INT", PROGRAM, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def tunesmith(apiserver: ApiServer, *arguments: str | Path) -> tuple[int, str, str]:
    process = start(apiserver, *arguments)
    output, problems = process.communicate(timeout=SECONDS)
    return process.returncode, output, problems


def condition(type_: str, status: str, reason: str, message: str) -> dict[str, Any]:
    return {"type": type_, "status": status, "reason": reason, "message": message, "lastTransitionTime": NOW}


def set_status(apiserver: ApiServer, kind: str, namespace: str, name: str, **status: object) -> None:
    done = apiserver.kubectl(
        *("patch", kind, name, "-n", namespace, "--subresource=status", "--type=merge"),
        *("-p", json.dumps({"status": status})),
    )
    assert done.returncode == 0, done.stderr


def exists(apiserver: ApiServer, kind: str, namespace: str, name: str) -> bool:
    return apiserver.kubectl("get", kind, name, "-n", namespace).returncode == 0


@pytest.fixture
def manifest(tmp_path: Path, namespace: str) -> Path:
    document = job(namespace, "sail")
    del document["metadata"]["namespace"]
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_job_is_followed_to_its_result(apiserver: ApiServer, namespace: str, manifest: Path) -> None:
    watching = start(apiserver, "submit", "-f", manifest, "-n", namespace, "--watch")
    until(lambda: exists(apiserver, "finetunejob", namespace, "sail"), seconds=SECONDS, what="the job")
    progress = {"stage": "Training", "step": 1, "totalSteps": 4, "loss": 2.5, "etaSeconds": 30, "updateTime": NOW}
    validated = condition("Validated", "True", "Valid", "412 rows")
    set_status(apiserver, "finetunejob", namespace, "sail", phase="Running", progress=progress, conditions=[validated])
    assert watching.stdout is not None
    for line in watching.stdout:
        if "Training" in line:
            break
    assert line == "sail  Training  step 1/4 (25 %)  loss 2.500  ETA 0 s\n"
    set_status(
        apiserver,
        "finetunejob",
        namespace,
        "sail",
        phase="Complete",
        conditions=[validated, condition("Complete", "True", "Completed", "held-out loss fell by 40 %")],
        artifact={"uri": "s3://store/a", "digest": DIGEST, "sizeBytes": 1, "servable": {"vllm": True}},
    )
    output, problems = watching.communicate(timeout=SECONDS)
    assert (watching.returncode, problems) == (0, f"Next: tunesmith deploy sail -n {namespace}\n")
    assert output == f"sail is complete: held-out loss fell by 40 %\n  artifact s3://store/a\n  digest   {DIGEST}\n"
    code, output, _ = tunesmith(apiserver, "submit", "-f", manifest, "-n", namespace, "--watch", "-o", "json")
    last = json.loads(output.splitlines()[-1])
    assert (code, last["outcome"], last["artifact"]) == (0, "Succeeded", {"uri": "s3://store/a", "digest": DIGEST})


def test_the_reason_of_a_failed_job_is_reported(apiserver: ApiServer, namespace: str, manifest: Path) -> None:
    code, output, _ = tunesmith(apiserver, "submit", "-f", manifest, "-n", namespace)
    assert (code, output) == (0, f"FineTuneJob {namespace}/sail is submitted.\n")
    failed = condition("Failed", "True", "DatasetInvalid", "train.jsonl line 3: not JSON")
    set_status(apiserver, "finetunejob", namespace, "sail", phase="Failed", conditions=[failed])
    code, output, problems = tunesmith(apiserver, "submit", "-f", manifest, "-n", namespace, "-w", "-o", "json")
    sentence = f"error: FineTuneJob {namespace}/sail failed: DatasetInvalid: train.jsonl line 3: not JSON"
    assert (code, problems) == (1, f"{sentence} (`tunesmith logs sail -n {namespace}` shows the logs of its pods)\n")
    last = json.loads(output.splitlines()[-1])
    assert (last["outcome"], last["reason"]) == ("Failed", "DatasetInvalid")


def test_submitting_again_says_that_nothing_was_started(apiserver: ApiServer, namespace: str, manifest: Path) -> None:
    again = ("submit", "-f", manifest, "-n", namespace)
    assert tunesmith(apiserver, *again)[0] == 0
    code, output, problems = tunesmith(apiserver, *again)
    sentence = f"FineTuneJob {namespace}/sail already exists and is Pending: nothing was started.\n"
    assert (code, output, problems) == (0, sentence, f"Next: tunesmith wait job sail -n {namespace}\n")
    ended = [condition("Complete", "True", "Completed", "done")]
    set_status(apiserver, "finetunejob", namespace, "sail", phase="Complete", conditions=ended)
    code, output, _ = tunesmith(apiserver, *again)
    assert code == 0
    assert output == (
        f"FineTuneJob {namespace}/sail has already finished (complete, without held-out rows): nothing was started."
        " To train again, submit it under another name.\n"
    )
    code, output, _ = tunesmith(apiserver, *again, "-o", "json")
    assert json.loads(output) == {"name": "sail", "namespace": namespace, "created": False}


def test_an_interrupted_watch_leaves_the_job_and_says_how_to_come_back(
    apiserver: ApiServer, namespace: str, manifest: Path
) -> None:
    watching = start(apiserver, "submit", "-f", manifest, "-n", namespace, "--watch")
    assert watching.stdout is not None
    assert watching.stdout.readline() == "sail  waiting for the operator\n"
    watching.send_signal(signal.SIGINT)
    _, problems = watching.communicate(timeout=SECONDS)
    assert watching.returncode == 130
    assert f"continues in the cluster. Follow it again: tunesmith wait job sail -n {namespace}\n" in problems
    assert f"Pause it, with a checkpoint: tunesmith cancel sail -n {namespace} --pause\n" in problems
    assert f"Stop it: tunesmith cancel sail -n {namespace}\n" in problems
    assert "Traceback" not in problems
    assert exists(apiserver, "finetunejob", namespace, "sail")


def test_a_deleted_job_ends_the_watch(apiserver: ApiServer, namespace: str, manifest: Path) -> None:
    watching = start(apiserver, "submit", "-f", manifest, "-n", namespace, "--watch")
    assert watching.stdout is not None
    watching.stdout.readline()
    apiserver.kubectl("delete", "finetunejob", "sail", "-n", namespace)
    _, problems = watching.communicate(timeout=SECONDS)
    assert (watching.returncode, problems) == (1, f"error: FineTuneJob {namespace}/sail was deleted\n")


def test_the_api_servers_sentences_are_shown(apiserver: ApiServer, namespace: str, manifest: Path) -> None:
    assert tunesmith(apiserver, "submit", "-f", manifest, "-n", namespace)[0] == 0
    manifest.write_text(manifest.read_text().replace("train.jsonl", "other.jsonl"))
    code, _, problems = tunesmith(apiserver, "submit", "-f", manifest, "-n", namespace)
    assert code == 1
    assert "spec is immutable except for suspend, activeDeadlineSeconds and ttlSecondsAfterFinished: create" in problems
    code, _, problems = tunesmith(apiserver, "submit", "-f", manifest, "-n", "not-there")
    assert code == 1
    assert 'namespaces "not-there" not found' in problems


def test_a_key_is_shown_once_and_kept_hashed(apiserver: ApiServer, namespace: str) -> None:
    own = ("--gateway-namespace", namespace)
    code, output, _ = tunesmith(
        apiserver,
        *("keys", "create", "alice", "-n", "team", "--allow-namespace", "shared", "--model", "pirate", *own),
    )
    key = output.strip()
    assert code == 0
    assert key.startswith("sk-ts-")
    shown = apiserver.kubectl("get", "configmap", "api-key-alice", "-n", namespace, "-o", "json").stdout
    assert key not in shown
    stored = parse_key_record(json.loads(shown))
    assert stored.digest == key_digest(key)
    assert (stored.home, stored.namespaces, stored.models) == ("team", {"team", "shared"}, {"team/pirate"})

    foreign = ("keys", "create", "carl", "-n", "team", "--model", "other/x", *own)
    code, _, problems = tunesmith(apiserver, *foreign)
    assert (code, "add --allow-namespace other" in problems) == (2, True)
    code, _, problems = tunesmith(apiserver, "keys", "create", "alice", *own)
    assert (code, "the key alice already exists" in problems) == (1, True)

    code, output, _ = tunesmith(apiserver, "keys", "create", "bob", "-n", "team", "-o", "json", *own)
    made = json.loads(output)
    assert (made["name"], made["namespaces"], made["models"]) == ("bob", ["team"], ["*"])

    code, output, _ = tunesmith(apiserver, "keys", "list", "-o", "json", *own)
    assert [(row["name"], row["namespace"], row["models"]) for row in json.loads(output)] == [
        ("alice", "team", ["team/pirate"]),
        ("bob", "team", ["*"]),
    ]
    assert key not in output

    limits = ("--requests-per-minute", "60", "--tokens-per-day", "9", "--max-concurrency", "4", "--expires-in", "90d")
    code, output, notes = tunesmith(apiserver, "keys", "create", "ci", "-n", "team", *limits, *own)
    assert (code, "team, 60/min and 9 tokens/day and 4 at once. Keep it" in notes) == (0, True)
    first = output.strip()
    code, output, _ = tunesmith(apiserver, "keys", "rotate", "ci", "--overlap", "7d", *own)
    second = output.strip()
    assert (code, second.startswith("sk-ts-"), second != first) == (0, True, True)
    shown = apiserver.kubectl("get", "configmap", "api-key-ci", "-n", namespace, "-o", "json").stdout
    stored = parse_key_record(json.loads(shown))
    assert (stored.digest, stored.previous_digest) == (key_digest(second), key_digest(first))
    assert (stored.requests_per_minute, stored.tokens_per_day, stored.max_concurrency) == (60, 9, 4)
    assert stored.expires is not None
    assert stored.expires - stored.previous_expires == pytest.approx(83 * 24 * 3600, abs=120)
    code, output, _ = tunesmith(apiserver, "keys", "list", *own)
    assert "60/min,9 tokens/day,4 at once" in output
    code, _, problems = tunesmith(apiserver, "keys", "rotate", "nobody", *own)
    assert (code, "the key nobody does not exist" in problems) == (1, True)
    assert tunesmith(apiserver, "keys", "create", "old", "--expires-in", "0s", *own)[0] == 0
    code, _, problems = tunesmith(apiserver, "keys", "rotate", "old", *own)
    assert (code, "the key old has expired" in problems) == (1, True)

    assert tunesmith(apiserver, "keys", "delete", "alice", *own)[0] == 0
    assert not exists(apiserver, "configmap", namespace, "api-key-alice")
    code, _, problems = tunesmith(apiserver, "keys", "delete", "alice", *own)
    assert (code, "the key alice does not exist" in problems) == (1, True)


def test_a_secret_that_is_no_key_is_never_deleted(apiserver: ApiServer, namespace: str) -> None:
    apiserver.kubectl("create", "configmap", "api-key-other", "-n", namespace)
    assert tunesmith(apiserver, "keys", "delete", "other", "--gateway-namespace", namespace)[0] == 1
    assert exists(apiserver, "configmap", namespace, "api-key-other")


def test_models_say_their_state_and_what_they_wait_for(apiserver: ApiServer, namespace: str) -> None:
    apiserver.apply(pool(namespace))
    apiserver.apply(adapter(namespace, "pirate"))
    apiserver.apply(adapter(namespace, "parrot"))
    ready = [condition("Resolved", "True", "Resolved", ""), condition("Ready", "True", "Resident", "on 1 pod")]
    set_status(
        apiserver,
        *("adapterdeployment", namespace, "pirate"),
        phase="Ready",
        conditions=ready,
        pool={"name": "small", "namespace": namespace},
        readyReplicas=1,
        desiredReplicas=1,
    )
    waiting = [condition("Resolved", "False", "FineTuneJobNotFound", "FineTuneJob tone does not exist")]
    set_status(apiserver, "adapterdeployment", namespace, "parrot", phase="Waiting", conditions=waiting)
    code, output, _ = tunesmith(apiserver, "models", "-n", namespace, "-o", "json")
    rows = {row["model"]: row for row in json.loads(output)}
    assert code == 0
    assert list(rows) == [f"{namespace}/parrot", f"{namespace}/pirate", f"{namespace}/base"]
    parrot, pirate, base = rows.values()
    assert (parrot["state"], parrot["message"]) == ("Waiting", "FineTuneJob tone does not exist")
    assert (pirate["state"], pirate["pods"], pirate["pool"], pirate["message"]) == (
        "Ready",
        "1/1",
        f"{namespace}/small",
        "",
    )
    assert (base["kind"], base["message"]) == ("base", "the operator has not processed it yet")
    code, output, _ = tunesmith(apiserver, "models", "-n", namespace)
    assert output.splitlines()[0].split() == ["MODEL", "KIND", "POOL", "STATE", "PODS", "WAITS", "FOR"]
    code, output, problems = tunesmith(apiserver, "models", "-n", "empty")
    assert (code, output, "no models" in problems) == (0, "", True)


def test_everything_of_a_namespace_is_listed_and_shown(apiserver: ApiServer, namespace: str) -> None:
    for document in (job(namespace, "tone"), adapter(namespace, "tone"), pool(namespace)):
        apiserver.apply(document)
    code, output, problems = tunesmith(apiserver, "list", "-n", namespace)
    assert (code, problems) == (0, "Next: tunesmith get KIND NAME\n")
    rows = [line.split()[:3] for line in output.splitlines()[1:]]
    assert rows == [
        ["job", f"{namespace}/tone", "Pending"],
        ["adapter", f"{namespace}/tone", "Pending"],
        ["pool", f"{namespace}/small", "Pending"],
    ]
    code, output, _ = tunesmith(apiserver, "list", "adapters", "-n", namespace, "-o", "json")
    assert [(row["kind"], row["name"]) for row in json.loads(output)] == [("adapter", "tone")]
    code, output, problems = tunesmith(apiserver, "list", "pools", "-n", "empty")
    assert (code, output) == (0, "")
    assert "ask a platform engineer for a ServingPool" in problems

    code, output, problems = tunesmith(apiserver, "get", "job", "tone", "-n", namespace)
    assert (code, problems) == (0, f"Next: tunesmith wait job tone -n {namespace}\n")
    assert output.splitlines()[:2] == [f"name      {namespace}/tone", "state     Pending"]
    code, output, _ = tunesmith(apiserver, "get", "pool", "small", "-n", namespace, "-o", "json")
    assert (code, json.loads(output)["kind"]) == (0, "ServingPool")
    code, _, problems = tunesmith(apiserver, "get", "adapter", "pirate", "-n", namespace)
    assert code == 1
    assert problems == (
        f"error: AdapterDeployment {namespace}/pirate does not exist: `tunesmith list adapters -n {namespace}` lists"
        " those that exist\n"
    )


def test_waiting_for_an_adapter_ends_when_it_serves_or_the_time_is_over(apiserver: ApiServer, namespace: str) -> None:
    apiserver.apply(adapter(namespace, "tone"))
    code, _, problems = tunesmith(apiserver, "wait", "adapter", "tone", "-n", namespace, "--timeout", "1s")
    assert (code, "was not ready within 0:00:01" in problems) == (1, True)
    waiting = start(apiserver, "wait", "adapter", "tone", "-n", namespace)
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "tone  the operator has not processed it yet\n"
    revision = {"digest": DIGEST, "engineName": f"{namespace}/tone@a", "state": "Resident", "readyReplicas": 1}
    set_status(
        apiserver,
        *("adapterdeployment", namespace, "tone"),
        observedGeneration=1,
        conditions=[condition("Resolved", "True", "Resolved", ""), condition("Ready", "True", "Resident", "")],
        pool={"name": "small", "namespace": namespace},
        revisions=[revision],
        readyReplicas=1,
        desiredReplicas=1,
    )
    output, problems = waiting.communicate(timeout=SECONDS)
    assert (waiting.returncode, output) == (0, f"tone serves: 1/1 pods of {namespace}/small\n")
    assert problems == f"Next: tunesmith chat {namespace}/tone\n"
    code, _, problems = tunesmith(apiserver, "wait", "pool", "small", "-n", namespace)
    assert (code, f"ServingPool {namespace}/small does not exist" in problems) == (1, True)


def test_a_job_is_paused_resumed_and_stopped_and_a_finished_one_is_left(apiserver: ApiServer, namespace: str) -> None:
    def suspended() -> bool:
        shown = apiserver.kubectl("get", "finetunejob", "tone", "-n", namespace, "-o", "json")
        return bool(json.loads(shown.stdout)["spec"].get("suspend", False))

    place = ("tone", "-n", namespace)
    apiserver.apply(job(namespace, "tone"))
    code, output, problems = tunesmith(apiserver, "cancel", *place, "--pause")
    assert (code, output, suspended()) == (0, f"FineTuneJob {namespace}/tone is paused.\n", True)
    assert problems == f"Next: tunesmith cancel tone -n {namespace} --resume\n"
    assert tunesmith(apiserver, "cancel", *place, "--resume")[0] == 0
    assert not suspended()
    assert tunesmith(apiserver, "cancel", *place, "--pause", "--resume")[0] == 2
    code, output, _ = tunesmith(apiserver, "cancel", *place, "-o", "json")
    assert json.loads(output) == {"namespace": namespace, "name": "tone", "action": "deleted"}
    assert not exists(apiserver, "finetunejob", namespace, "tone")

    apiserver.apply(job(namespace, "tone"))
    set_status(apiserver, "finetunejob", namespace, "tone", conditions=[condition("Complete", "True", "Completed", "")])
    code, _, problems = tunesmith(apiserver, "cancel", *place)
    assert (code, "has already finished (Complete), so it cannot be stopped" in problems) == (1, True)
    assert exists(apiserver, "finetunejob", namespace, "tone")


def test_an_adapter_is_deployed_and_moved_to_the_next_version(apiserver: ApiServer, namespace: str) -> None:
    def spec() -> dict[str, Any]:
        shown = apiserver.kubectl("get", "adapterdeployment", "tone", "-n", namespace, "-o", "json").stdout
        return dict(json.loads(shown)["spec"])

    for name in ("tone", "tone-2"):
        apiserver.apply(job(namespace, name))
    apiserver.apply(pool(namespace))
    given = ("deploy", "tone", "-n", namespace, "--pool", "small", "--model-name", "support", "--replicas", "2")
    code, output, problems = tunesmith(apiserver, *given)
    sentence = f"AdapterDeployment {namespace}/tone is created: it serves the adapter of job tone.\n"
    assert (code, output, problems) == (0, sentence, f"Next: tunesmith wait adapter tone -n {namespace}\n")
    common = {"pool": {"name": "small"}, "modelName": "support", "replicas": 2, "parity": "Report"}
    assert spec() == {"adapterFrom": {"fineTuneJob": {"name": "tone"}}, **common}

    code, output, _ = tunesmith(apiserver, "deploy", "tone-2", "-n", namespace, "--name", "tone")
    assert (code, "is changed" in output) == (0, True)
    assert spec() == {"adapterFrom": {"fineTuneJob": {"name": "tone-2"}}, **common}, "what is not named stays"

    code, _, problems = tunesmith(apiserver, "deploy", "tone", "-n", namespace, "--pool", "large")
    assert code == 1
    assert problems == f"error: ServingPool {namespace}/large does not exist; {namespace} may use {namespace}/small\n"
    assert tunesmith(apiserver, "deploy", "absent", "-n", namespace)[0] == 1
    failed = [condition("Failed", "True", "OutOfMemory", "no memory")]
    set_status(apiserver, "finetunejob", namespace, "tone", phase="Failed", conditions=failed)
    code, _, problems = tunesmith(apiserver, "deploy", "tone", "-n", namespace)
    assert (code, "failed (OutOfMemory) and has no adapter to serve" in problems) == (1, True)


def test_a_job_is_deployed_if_it_has_a_whole_model_instead_of_a_servable_adapter(
    apiserver: ApiServer, namespace: str
) -> None:
    artifact = {
        "uri": "s3://store/a",
        "digest": DIGEST,
        "sizeBytes": 1,
        "servable": {"vllm": False, "reason": "it uses DoRA"},
    }
    for name, merge in (("alone", "None"), ("merged", "Original")):
        apiserver.apply(job(namespace, name, output={"merge": merge}))
        set_status(apiserver, "finetunejob", namespace, name, phase="Complete", artifact=artifact)
    code, _, problems = tunesmith(apiserver, "deploy", "alone", "-n", namespace)
    assert (code, "cannot load the adapter" in problems) == (1, True)
    assert tunesmith(apiserver, "deploy", "merged", "-n", namespace)[0] == 0


def test_two_jobs_are_compared(apiserver: ApiServer, namespace: str) -> None:
    apiserver.apply(job(namespace, "tone"))
    apiserver.apply(job(namespace, "tone-2", method__lora__rank=64))
    for name, loss in (("tone", 1.5), ("tone-2", 1.25)):
        set_status(
            apiserver,
            *("finetunejob", namespace, name),
            phase="Complete",
            evaluation={"baseLoss": 3.0, "loss": loss},
            resolved={"datasetDigest": DIGEST},
            artifact={"uri": "s3://store/a", "digest": DIGEST, "sizeBytes": 1, "servable": {"vllm": True}},
        )
    code, output, problems = tunesmith(apiserver, "compare", "tone", "tone-2", "-n", namespace)
    assert (code, problems.splitlines()[0]) == (0, "Lowest held-out loss: tone-2")
    shown = {line.split("   ")[0]: line.split()[-2:] for line in output.splitlines()}
    assert shown["held-out loss, adapter"] == ["1.5000", "1.2500"]
    assert shown["spec.method.lora.rank"][1] == "64"
    code, output, _ = tunesmith(apiserver, "compare", "tone", "tone-2", "-n", namespace, "-o", "json")
    assert [entry["differences"]["spec.method.lora.rank"] for entry in json.loads(output)][1] == 64


def test_status_shows_what_needs_action_first(apiserver: ApiServer, namespace: str) -> None:
    apiserver.apply(pool(namespace))
    apiserver.apply(adapter(namespace, "pirate"))
    set_status(apiserver, "servingpool", namespace, "small", phase="Available")
    failed = [condition("Resolved", "False", "NotServable", "DoRA is not servable")]
    set_status(apiserver, "adapterdeployment", namespace, "pirate", phase="Failed", conditions=failed)
    code, output, notes = tunesmith(apiserver, "status", "-n", namespace)
    assert code == 0
    lines = output.splitlines()
    assert lines[1].split()[:4] == ["!", "adapter", f"{namespace}/pirate", "Failed"]
    assert "DoRA is not servable" in lines[1]
    assert lines[2].split()[:3] == ["pool", f"{namespace}/small", "Available"]
    assert notes.splitlines() == [
        "1 needs action, 1 is fine.",
        f"Next: tunesmith get adapter pirate -n {namespace}",
    ]
    code, output, _ = tunesmith(apiserver, "status", "-n", namespace, "-o", "json")
    assert [row["needsAction"] for row in json.loads(output)] == [True, False]
