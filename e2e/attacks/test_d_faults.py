"""D. Faults that are reported wrongly or not at all: the status shows them, and they are fixed automatically."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from e2e.attacks.artifacts import build
from e2e.attacks.stage import HOSTILE, PLATFORM, SINGLE, pool_manifest
from e2e.attacks.wire import CHAT, Client
from e2e.installation import (
    InstallationError,
    apply,
    condition,
    get,
    kubectl,
    store_secret,
    until,
)

if TYPE_CHECKING:
    from pathlib import Path

    from e2e.attacks.stage import Stage
    from e2e.attacks.trial import Trial
    from e2e.installation import Object


@pytest.mark.attack(
    "D2, D5", "a pool whose engines exit immediately: the status reports it, and its pods can be evicted"
)
def test_crashing_pool(stage: Stage, trial: Trial) -> None:
    manifest = pool_manifest("broken")
    manifest["spec"]["engine"] = manifest["spec"]["engine"] | {"args": ["--no-such-argument"]}
    reason = "two engines started repeatedly on the two cores"
    with stage.pool(manifest, ready=False), trial.attack(tolerance=4, reason=reason):

        def degraded() -> Any:  # noqa: ANN401 - the condition
            found = condition(get("servingpool", "broken", PLATFORM), "Degraded")
            return found if found["status"] == "True" and "no-such-argument" in found["message"] else None

        # An engine needs about 20 s to read its arguments on a busy core.
        found = trial.status("the pool reports why its engines exit", degraded, within=90, timeout=180)
        trial.observe(f"{found['reason']}: {found['message']}")
        evicted = [_evict(pod["metadata"]["name"]) for pod in stage.pods("broken")]
        trial.observe(f"evictions allowed: {sum(evicted)} of {len(evicted)}")
        assert evicted
        assert all(evicted)


def _evict(pod: str) -> bool:
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": PLATFORM}}
    try:
        kubectl(
            *("create", "--raw", f"/api/v1/namespaces/{PLATFORM}/pods/{pod}/eviction", "--filename", "-"),
            stdin=json.dumps(body),
        )
    except InstallationError as error:
        if "disruption budget" in str(error):
            return False
        raise
    return True


@pytest.mark.attack("D3", "the store's keys are wrong, and right again a little later")
def test_wrong_store_keys(stage: Stage, trial: Trial, tmp_path: Path) -> None:
    name = "late"
    # A separate artifact: a pod that already has the files would not read the store.
    build(tmp_path / "artifact", stage.template, weights=stage.template.scaled(0.5))
    stage.publish(name, tmp_path / "artifact")
    try:
        with trial.attack():
            apply(store_secret(PLATFORM, AWS_SECRET_ACCESS_KEY="wrong"))
            # The kubelet writes a changed Secret into running pods within 60 to 90 s; until then the old keys work.
            until("every agent has the wrong keys", lambda: stage.store_keys("AWS_SECRET_ACCESS_KEY") == {"wrong"}, 150)
            trial.began = time.monotonic()
            stage.deploy(name)

            def access_denied() -> Any:  # noqa: ANN401 - the condition
                found = condition(get("adapterdeployment", name, HOSTILE), "Ready")
                return found if re.search("tunesmith-store|denied|403|credential", found["message"]) else None

            denied = trial.status("the AdapterDeployment shows that the store denies the keys", access_denied)
            trial.observe(denied["message"])
            apply(store_secret(PLATFORM))
            right = store_secret(PLATFORM)["stringData"]["AWS_SECRET_ACCESS_KEY"]
            until("every agent has the right keys", lambda: stage.store_keys("AWS_SECRET_ACCESS_KEY") == {right}, 150)
            trial.began = time.monotonic()
            # A denied download is repeated within a minute.
            trial.recovered("the adapter is served once the keys are right", lambda: _ready(name), within=90)
    finally:
        apply(store_secret(PLATFORM))
        stage.remove(name)


def _ready(name: str) -> bool:
    return bool(condition(get("adapterdeployment", name, HOSTILE), "Ready")["status"] == "True")


@pytest.mark.attack("D6", "a pool of one pod is changed under load")
def test_change_of_one_pod(stage: Stage, single: Object, trial: Trial) -> None:
    model = f"{PLATFORM}/{single['spec']['modelName']}"
    client = Client(stage.gateway, stage.hostile_key)
    statuses: list[int] = []
    done = threading.Event()

    def load() -> None:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        while not done.wait(0.5):
            statuses.append(client.post_once(CHAT, body).status)

    def settled() -> bool:
        """Return True once the only pod has the new template."""
        pods = stage.pods(SINGLE)
        arguments = [" ".join(pod["spec"]["containers"][0].get("args", [])) for pod in pods]
        return len(pods) == 1 and "--max-model-len 768" in arguments[0] and _serves(pods[0])

    sentences: dict[str, None] = {}

    def settled_or_reported() -> bool:
        pool = get("servingpool", SINGLE, PLATFORM)
        sentences.update({condition(pool, kind)["message"]: None for kind in ("Progressing", "Updated")})
        return settled()

    worker = threading.Thread(target=load)
    worker.start()
    try:
        with trial.attack(tolerance=6, reason="another engine started on the two cores"):
            apply(single | {"spec": single["spec"] | {"engine": single["spec"]["engine"] | {"maxModelLength": 768}}})
            trial.recovered("the pool has its new pod only", settled_or_reported, within=300, timeout=300)
    finally:
        done.set()
        worker.join()
    failed = [status for status in statuses if status != 200]
    trial.observe(f"{len(failed)} of {len(statuses)} requests failed")
    trial.observe(" → ".join(sentence for sentence in sentences if sentence))
    assert not failed


def _serves(pod: Object) -> bool:
    return any(entry["type"] == "Ready" and entry["status"] == "True" for entry in pod["status"].get("conditions", []))


ARGUMENTS = (
    "--hos=::", "--ho=::", "--api-k=x", "--api_k=x", "--config=/x.yaml", "--conf=/x", "--mod=/x", "--served=x",
    "--middle=x", "--enable-lor", "--max-lora=1", "--lora-mod=x", "--port=1", "--por=1", "--uds=/x", "--root=/x",
    "--ssl-key=/x", "--no-enable-lora",
)  # fmt: skip


@pytest.mark.attack("D7", "abbreviations of reserved engine arguments")
def test_abbreviated_arguments(trial: Trial) -> None:
    accepted = []
    with trial.attack():
        for argument in ARGUMENTS:
            manifest = pool_manifest("sly")
            manifest["spec"]["engine"] = manifest["spec"]["engine"] | {"args": [argument]}
            try:
                kubectl("apply", "--server-side", "--dry-run=server", "--filename", "-", stdin=json.dumps(manifest))
            except InstallationError:
                continue
            accepted.append(argument)
        trial.observe(f"{len(ARGUMENTS)} tried, accepted: {', '.join(accepted) or 'none'}")
        assert not accepted
