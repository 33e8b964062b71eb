"""C and B on the installation's own namespace: its pods, its Lease, its labels.

These replace or imitate parts of the installation while they run. `-m "not installation"` leaves them out.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING

import pytest

from e2e.attacks.stage import HOSTILE, gateway_pods, plain_pod
from e2e.attacks.wire import Client
from e2e.containers import container_status
from e2e.installation import SYSTEM, apply, condition, delete, get, items, kubectl, until

if TYPE_CHECKING:
    from e2e.attacks.stage import Stage
    from e2e.attacks.trial import Trial

pytestmark = pytest.mark.installation
LEASE = "tunesmith-operator"
LISTENER = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        print(self.path, "token" if self.headers.get("Authorization") else "bare", flush=True)
        self.send_response(404); self.end_headers()
http.server.ThreadingHTTPServer(("", 8081), Handler).serve_forever()
"""


@pytest.mark.attack("B11", "the gateway's pod is deleted while a long stream passes through it")
def test_gateway_ends(stage: Stage, trial: Trial) -> None:
    client = Client(stage.gateway, stage.hostile_key)
    body = {
        "model": stage.base_model,
        "messages": [{"role": "user", "content": "Say hi."}],
        "stream": True,
        "max_tokens": 600,
        "ignore_eos": True,
    }
    data = json.dumps(body).encode()

    async def run() -> bytes:
        stream = asyncio.create_task(client.raw(client.head(len(data)) + data, 150))
        await asyncio.sleep(2)
        for pod in gateway_pods():
            name = pod["metadata"]["name"]
            await asyncio.to_thread(kubectl, "delete", "pod", name, "--namespace", SYSTEM, "--wait=false")
        return await stream

    # The demo has one replica of the gateway: until its successor is ready, no requests are served.
    with trial.attack(outage_seconds=30, reason="the only gateway was replaced"):
        answer = asyncio.run(run())
    ending = "[DONE]" if b"[DONE]" in answer else "an error event" if b'"error"' in answer else "nothing"
    trial.observe(f"{answer.count(b'data:')} events, the last of which was {ending}")
    assert ending != "nothing", answer[-300:]
    trial.victim_recovers()


@pytest.mark.attack("C6", "a pod in the operator's namespace with the label component=gateway")
def test_imitated_gateway(trial: Trial) -> None:
    pod = plain_pod(
        "attack-gateway", SYSTEM, **{"app.kubernetes.io/component": "gateway", "app.kubernetes.io/name": "loki"}
    )
    pod["spec"]["containers"][0]["command"] = ["python3", "-c", LISTENER]
    try:
        with trial.attack():
            apply(pod)
            kubectl("wait", "pod/attack-gateway", "--namespace", SYSTEM, "--for=condition=Ready", "--timeout=60s")
            deadline = time.monotonic() + 6
            until("the operator has had time to send it a request", lambda: time.monotonic() > deadline, 10)
            log = kubectl("logs", "attack-gateway", "--namespace", SYSTEM)
            trial.observe(f"{len(log.splitlines())} requests from the operator")
            assert "token" not in log
    finally:
        kubectl(
            "delete",
            "pod",
            "attack-gateway",
            "--namespace",
            SYSTEM,
            "--ignore-not-found",
            "--grace-period=0",
            "--force",
        )


@pytest.mark.attack("C9", "the operator's Lease is deleted")
def test_lease_deleted(stage: Stage, trial: Trial) -> None:
    name = "after-the-lease"
    stage.publish(name, stage.template.folder)
    try:
        with trial.attack():
            kubectl("delete", "lease", LEASE, "--namespace", SYSTEM)
            until("there is a leader", lambda: get("lease", LEASE, SYSTEM), 60)
            # The leader that lost its Lease is replaced too: its epoch must be higher than that of the agents.
            leader = (get("lease", LEASE, SYSTEM) or {})["spec"]["holderIdentity"]
            trial.observe(f"led by {leader}")
            stage.deploy(name)
            trial.recovered(
                "the agents take the new leader's list",
                lambda: condition(get("adapterdeployment", name, HOSTILE), "Ready")["status"] == "True",
            )
    finally:
        stage.remove(name)


@pytest.mark.attack("C9", "all operators and the Lease are deleted at once")
def test_operators_replaced(stage: Stage, trial: Trial) -> None:
    name = "after-the-operators"
    stage.publish(name, stage.template.folder)
    try:
        with trial.attack(tolerance=4, reason="two operators started on the two cores"):
            pods = items("pods", SYSTEM, "app.kubernetes.io/component=operator")
            for pod in pods:
                kubectl("delete", "pod", pod["metadata"]["name"], "--namespace", SYSTEM, "--grace-period=0", "--force")
            delete("lease", LEASE, SYSTEM)
            stage.deploy(name)
            trial.recovered(
                "the agents take the new leader's list",
                lambda: condition(get("adapterdeployment", name, HOSTILE), "Ready")["status"] == "True",
                within=90,  # two images start on the two cores
            )
        assert all(container_status(pod, "agent")["restartCount"] == 0 for pod in stage.pods())
    finally:
        stage.remove(name)
