"""C. Objects and users of the cluster are hostile input: manifests, labels, owners, identities and tokens."""

from __future__ import annotations

import http.client
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from e2e.attacks.stage import (
    GATEWAY_LABELS,
    HOSTILE,
    PLATFORM,
    POOL,
    VICTIM,
    gateway_pods,
    listening,
    plain_pod,
    pool_manifest,
)
from e2e.attacks.wire import CHAT, Client
from e2e.containers import container_status, processes_of, resident_bytes
from e2e.custom_resources import adapter_manifest, job_manifest
from e2e.demo import JOB
from e2e.installation import (
    STORE,
    SYSTEM,
    InstallationError,
    apply,
    condition,
    delete,
    get,
    items,
    kubectl,
    until,
)
from tunesmith.contracts.agent import AGENT_PORT, pod_tokens

if TYPE_CHECKING:
    from e2e.attacks.stage import Stage
    from e2e.attacks.trial import Trial
    from e2e.installation import Object

SPEC: dict[str, Any] = yaml.safe_load(JOB.read_text())["spec"]
OPERATOR = f"system:serviceaccount:{SYSTEM}:tunesmith-operator"
GATEWAY_ACCOUNT = f"system:serviceaccount:{SYSTEM}:tunesmith-gateway"
OPERATOR_LABELS = "app.kubernetes.io/component=operator,app.kubernetes.io/name=tunesmith"


def changed(**parts: object) -> Object:
    """Return the demo's job with changes to its spec."""
    return {**SPEC, **parts}


def refused_or_failed(stage: Stage, manifest: Object, sentence: str) -> tuple[str, str]:
    """Apply a FineTuneJob as a tenant; return the component that refuses it, and its message.

    It must be refused by the API server, or be Failed before any pod of it exists.
    """
    name = manifest["metadata"]["name"]
    try:
        stage.apply_as_tenant(manifest)
    except InstallationError as error:
        if re.search(sentence, str(error)):
            return "kubectl apply", str(error).partition("failed: ")[2]
        raise

    def refusal() -> Any:  # noqa: ANN401 - the condition
        job = get("finetunejob", name, HOSTILE)
        found = [condition(job, kind) for kind in ("Failed", "Validated")]
        return next((c for c in found if c["message"] and re.search(sentence, c["message"])), None)

    found = until(f"{name} reports the problem", refusal, 30)
    assert not items("pods", HOSTILE, f"tunesmith.dev/finetunejob={name}")
    return f"condition {found['reason']}", str(found["message"])


@pytest.mark.attack("C1", "a FineTuneJob with the priority class system-node-critical")
def test_priority_class(stage: Stage, trial: Trial) -> None:
    manifest = job_manifest("critical", changed(scheduling={"priorityClassName": "system-node-critical"}), HOSTILE)
    try:
        with trial.attack():
            who, sentence = refused_or_failed(stage, manifest, "priority")
            trial.observe(f"{who}: {sentence}")
    finally:
        delete("finetunejob", "critical", HOSTILE)


@pytest.mark.attack("C1", "a FineTuneJob that tolerates every taint, and one that picks the control plane's node")
def test_tolerations(stage: Stage, trial: Trial) -> None:
    schedulings: dict[str, Object] = {
        "tolerant": {"tolerations": [{"operator": "Exists"}]},
        "picky": {"nodeSelector": {"node-role.kubernetes.io/control-plane": ""}},
        "runtime": {"runtimeClassName": "privileged"},
    }
    try:
        with trial.attack():
            for name, scheduling in schedulings.items():
                manifest = job_manifest(name, changed(scheduling=scheduling), HOSTILE)
                who, sentence = refused_or_failed(stage, manifest, "(?i)toleration|nodeselector|runtimeclass")
                trial.observe(f"{who}: {sentence}")
    finally:
        for name in schedulings:
            delete("finetunejob", name, HOSTILE)


@pytest.mark.attack(
    "C2", "FineTuneJobs that name a Secret whose author may not read Secrets, before and after it exists"
)
def test_foreign_secret(stage: Stage, trial: Trial) -> None:
    metadata = {"name": "private", "namespace": HOSTILE}
    value = "hf_attack_first_line\nhf_attack_second_line"
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"HF_TOKEN": value}}
    base = {"uri": "hf://attack/none", "secretRef": {"name": "private"}}
    early, late = (job_manifest(name, changed(baseModel=base), HOSTILE) for name in ("early", "late"))
    try:
        with trial.attack(tolerance=4, reason="a validation pod shared two cores with the victim"):
            stage.apply_as_tenant(early)
            apply(secret)
            who, sentence = refused_or_failed(stage, late, "label")
            trial.observe(f"{who}: {sentence}")

            def missing_secret() -> Any:  # noqa: ANN401 - the condition
                job = get("finetunejob", "early", HOSTILE)
                found = [condition(job, kind) for kind in ("Failed", "Validated")]
                return next((c for c in found if c["status"] == "False" or c["reason"] == "SecretNotFound"), None)

            # Its pod may exist before the Secret; it starts within some seconds, and reads no Secret after that.
            found = trial.status("the earlier job fails without the Secret", missing_secret, within=90, timeout=180)
            trial.observe(f"{found['reason']}: {found['message']}")
        everything = json.dumps([items("finetunejobs", HOSTILE), items("events", HOSTILE)])
        assert "hf_attack" not in everything
    finally:
        for name in ("early", "late"):
            delete("finetunejob", name, HOSTILE)
        delete("secret", "private", HOSTILE)


@pytest.mark.attack("C3", "a foreign pool open to all namespaces, and an adapter and a client that name no pool")
def test_foreign_pool(stage: Stage, trial: Trial) -> None:
    client = Client(stage.gateway, stage.victims_key)
    try:
        with trial.attack():
            apply(adapter_manifest("poolless", "assistant", None, VICTIM))

            def resolution() -> Any:  # noqa: ANN401 - the condition
                found = condition(get("adapterdeployment", "poolless", VICTIM), "Resolved")
                return found if found["reason"] else None

            found = trial.status("the AdapterDeployment has the condition Resolved", resolution)
            trial.observe(f"{found['reason']}: {found['message']}")
            reply = client.post_once(
                CHAT, {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
            )
            trial.observe(f"the bare name base: {reply.status}")
        assert found["status"] == "False", "the adapter was attracted by a pool of another namespace"
        assert reply.status == 404
    finally:
        delete("adapterdeployment", "poolless", VICTIM)


@pytest.mark.attack("C4", "60 objects with annotations of 250 KiB")
def test_annotations(trial: Trial) -> None:
    def operators() -> dict[str, int]:
        return {
            pod["metadata"]["name"]: sum(
                resident_bytes(process)
                for process in processes_of(str(container_status(pod, "operator")["containerID"]))
            )
            for pod in items("pods", SYSTEM, OPERATOR_LABELS)
        }

    labels = {"attack": "annotations"}
    big = "x" * (250 * 1024)
    before = operators()
    try:
        with trial.attack(tolerance=3, reason="kubectl and etcd wrote 15 MB on the two cores"):
            for start in range(0, 60, 10):
                manifests = [
                    job_manifest(f"big-{number}", changed(suspend=True), HOSTILE) for number in range(start, start + 10)
                ]
                for manifest in manifests:
                    manifest["metadata"] |= {"annotations": {"attack": big}, "labels": labels}
                apply(*manifests)
            until("the operators have seen them", lambda: bool(_phase("big-59")), 30)
        after = operators()
        grown = {name: (after.get(name, 0) - size) / 2**20 for name, size in before.items()}
        trial.observe(", ".join(f"{name} +{size:.0f} MiB" for name, size in grown.items()))
        assert max(grown.values()) < 15, grown
    finally:
        kubectl("delete", "finetunejobs", "--namespace", HOSTILE, "--selector", "attack=annotations", "--wait=false")


def _phase(name: str) -> str:
    return str(((get("finetunejob", name, HOSTILE) or {}).get("status") or {}).get("phase") or "")


@pytest.mark.attack("C5", "a Job of another namespace with a FineTuneJob's name, labels and UID")
def test_foreign_owner(trial: Trial) -> None:
    name = "imitated"
    apply(job_manifest(name, changed(suspend=True), VICTIM))
    job = get("finetunejob", name, VICTIM) or {}
    owner = {
        "apiVersion": job["apiVersion"], "kind": "FineTuneJob", "name": name, "uid": job["metadata"]["uid"],
        "controller": True,
    }  # fmt: skip
    try:
        with trial.attack(tolerance=4, reason="a validation pod shared two cores with the victim"):
            for component, more in (("validate", {}), ("train", {"tunesmith.dev/attempt": "1"})):
                forged = _job(f"forged-{component}", HOSTILE)
                forged["metadata"] |= {
                    "ownerReferences": [owner],
                    "labels": {
                        "app.kubernetes.io/managed-by": "tunesmith",
                        "app.kubernetes.io/component": component,
                        "tunesmith.dev/finetunejob": name,
                        **more,
                    },
                }
                apply(forged)
            kubectl(
                "patch",
                "finetunejob",
                name,
                "--namespace",
                VICTIM,
                "--type=merge",
                "--patch",
                '{"spec":{"suspend":false}}',
            )

            def created() -> list[str]:
                return [j["metadata"]["name"] for j in items("jobs", VICTIM, f"tunesmith.dev/finetunejob={name}")]

            trial.observe(f"its own Job {trial.status('its own Job is created', created)[0]}")
        attempts = ((get("finetunejob", name, VICTIM) or {}).get("status") or {}).get("attempts") or []
        assert not [a for a in attempts if "forged" in a["name"]]
    finally:
        delete("finetunejob", name, VICTIM)
        for component in ("validate", "train"):
            delete("job", f"forged-{component}", HOSTILE)


def _job(name: str, namespace: str) -> Object:
    pod = plain_pod("x", namespace)
    template = {"spec": pod["spec"] | {"restartPolicy": "Never"}}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"suspend": True, "template": template},
    }


@pytest.mark.attack("C8", "tokens that a client or an engine could hold, on the agents: PUT with epoch 2^62")
def test_pool_tokens(stage: Stage, trial: Trial) -> None:
    keys = stage.pool_keys()
    unload = json.dumps({"epoch": 2**62, "sequence": 0, "adapters": []}).encode()
    first, second = stage.pods()
    uid, address = first["metadata"]["uid"], first["status"]["podIP"]
    tokens = {"API key": stage.hostile_key, "none": ""}
    for purpose in ("serving", "events"):
        tokens |= {f"{purpose} key": keys[purpose][0].decode(), f"{purpose} token": pod_tokens(keys[purpose], uid)[0]}
    tokens["control token of the other pod"] = pod_tokens(keys["control"], second["metadata"]["uid"])[0]
    harmed = True
    try:
        with trial.attack():
            for name, token in tokens.items():
                for method, path in (("PUT", "/v1/adapters"), ("POST", "/drain")):
                    status = agent_call(address, method, path, token, unload)
                    assert status in {401, 403}, f"{method} {path} with {name}: {status}"
            control = pod_tokens(keys["control"], uid)[0]
            status = agent_call(address, "PUT", "/v1/adapters", control, unload)
            trial.observe(f"{2 * len(tokens)} calls refused; epoch 2^62 with the control token: {status}")
            assert 400 <= status < 500
        harmed = False
    finally:
        if harmed:  # pods that accepted the epoch would refuse every later operator
            stage.replace_pods()


def agent_call(address: str, method: str, path: str, token: str, body: bytes) -> int:
    """Return the HTTP status of a call to an agent."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection(address, AGENT_PORT, timeout=10)
    try:
        connection.request(method, path, body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.attack("C14", "exports into the store's folder of another job")
def test_export_into_another_job(stage: Stage, trial: Trial) -> None:
    uris = {
        "thief": f"{STORE}/{VICTIM}/assistant/artifact",
        "thief-spelled": f"{STORE.replace('s3://tunesmith', 's3://tunesmith/.')}/{VICTIM}/x",
    }
    try:
        with trial.attack():
            for name, uri in uris.items():
                manifest = job_manifest(name, changed(output={"exports": [{"uri": uri}]}), HOSTILE)
                who, sentence = refused_or_failed(stage, manifest, "store|export")
                trial.observe(f"{who}: {sentence}")
    finally:
        for name in uris:
            delete("finetunejob", name, HOSTILE)


@pytest.mark.attack("C15", "ports that the pool's pods open on the pod network")
def test_ports(stage: Stage, trial: Trial) -> None:
    with trial.attack():
        for pod in stage.pods():
            for container in ("engine", "agent"):
                process = processes_of(str(container_status(pod, container)["containerID"]))[0]
                sockets = listening(process)
                trial.observe(f"{container}: {', '.join(sorted(f'{port}/{family}' for port, family in sockets))}")
                assert {port for port, _ in sockets} <= {8000, 9000}, sockets


PEEK = """
import sys, urllib.error, urllib.request
for url in sys.argv[1:]:
    try:
        with urllib.request.urlopen(url, timeout=4) as answer:
            print(url, answer.status, len(answer.read()))
    except urllib.error.HTTPError as error:
        print(url, error.code)
    except OSError as error:
        print(url, "unreachable")
"""


@pytest.mark.attack("C15", "any pod reads metrics, models, events and adapters of pool pods and the gateway")
def test_peeking_pod(stage: Stage, trial: Trial) -> None:
    urls = []
    for pod in stage.pods():
        address = pod["status"]["podIP"]
        engine = ("metrics", "v1/models", "tunesmith/state", "openapi.json", "version")
        urls += [f"http://{address}:8000/{path}" for path in engine]
        urls += [f"http://{address}:9000/{path}" for path in ("metrics", "v1/events", "v1/adapters")]
    gateways = [pod["status"]["podIP"] for pod in gateway_pods()]
    urls += [f"http://{address}:8081/v1/demand" for address in gateways]
    with stage.attacker_pod() as execute, trial.attack():
        printed = execute(PEEK, *urls)
    opened = [line for line in printed.splitlines() if len(line.split()) == 3]
    trial.observe(f"{len(urls)} addresses without a token, opened: {', '.join(opened) or 'none'}")
    assert [line for line in opened if "/metrics " not in line] == []
    # Metrics of all tenants may be open if a NetworkPolicy restricts their readers; this cluster enforces none.
    trial.observe(f"metrics by NetworkPolicy: {', '.join(_guarded_metrics())}")


def _guarded_metrics() -> list[str]:
    """Return the pods whose NetworkPolicy opens only the clients' port to everyone."""
    guarded = []
    for name, namespace, selector in (
        ("gateway", SYSTEM, GATEWAY_LABELS),
        ("pool", PLATFORM, f"tunesmith.dev/pool={POOL}"),
    ):
        pod = items("pods", namespace, selector)[0]
        labels = pod["metadata"]["labels"]
        policies = [
            policy["spec"]
            for policy in items("networkpolicies", namespace)
            if all(labels.get(key) == value for key, value in policy["spec"]["podSelector"]["matchLabels"].items())
        ]
        rules = [rule for policy in policies for rule in policy.get("ingress", [])]
        everywhere = [port["port"] for rule in rules if not rule.get("from") for port in rule.get("ports", [])]
        assert policies, f"no NetworkPolicy selects the {name}"
        assert set(everywhere) <= {"http"}, f"the NetworkPolicy of the {name} opens {everywhere} to every pod"
        guarded.append(name)
    return guarded


@pytest.mark.attack("C7", "what the operator's and the gateway's identity could do to Secrets and kube-system")
def test_operators_rights(trial: Trial) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "private", "namespace": VICTIM}}
    apply(secret | {"stringData": {"password": "attack-secret"}})
    workload = {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "attack", "namespace": "kube-system"},
        "spec": {
            "selector": {"matchLabels": {"attack": "yes"}},
            "template": {
                "metadata": {"labels": {"attack": "yes"}},
                "spec": {"containers": [{"name": "x", "image": "x"}]},
            },
        },
    }  # fmt: skip
    foreign = json.loads(json.dumps(workload))
    foreign["metadata"]["namespace"] = VICTIM
    job = _job("attack", "kube-system")
    dry = ("--dry-run=server", "--output=json")
    create = ("create", *dry, "--filename", "-")
    secrets = ("secret", "private", "--namespace", VICTIM)
    tries: list[tuple[str, tuple[str, ...], Object | None]] = [
        ("read a Secret", ("get", *secrets), None),
        ("read a Secret through an empty PATCH", ("patch", *secrets, "--type=merge", "--patch={}", *dry), None),
        ("read a Secret by applying to it", ("apply", "--server-side", *dry, "--filename", "-"), secret),
        ("list Secrets", ("get", "secrets", "--namespace", VICTIM), None),
        ("create a Deployment in kube-system", create, workload),
        ("create a Job in kube-system", create, job),
        ("create a Deployment that belongs to no pool", create, foreign),
        ("delete a system Deployment", ("delete", "deployment/coredns", "-n=kube-system", "--dry-run=server"), None),
        ("exec into pods", ("auth", "can-i", "create", "pods/exec", "--all-namespaces"), None),
        ("impersonate users", ("auth", "can-i", "impersonate", "users"), None),
        ("make tokens", ("auth", "can-i", "create", "serviceaccounts/token", "--all-namespaces"), None),
    ]
    try:
        with trial.attack():
            allowed = []
            for account in (OPERATOR, GATEWAY_ACCOUNT):
                for what, arguments, document in tries:
                    stdin = json.dumps(document) if document else None
                    try:
                        kubectl(*arguments, f"--as={account}", stdin=stdin)
                    except InstallationError:
                        continue
                    allowed.append(f"{account.rpartition('-')[2]} may: {what}")
            trial.observe("; ".join(allowed) or f"{2 * len(tries)} tries, none allowed")
            assert not allowed, allowed
    finally:
        delete("secret", "private", VICTIM)


@pytest.mark.attack("C7", "a tenant creates ServingPools, Secrets of keys, and statuses")
def test_tenants_rights(stage: Stage, trial: Trial) -> None:
    pool = pool_manifest("tenants")
    pool["metadata"]["namespace"] = HOSTILE
    with trial.attack():
        with pytest.raises(InstallationError, match="forbidden"):
            stage.apply_as_tenant(pool)
        for verb, resource, *more in (
            ("get", "secrets"),
            ("patch", "finetunejobs.tunesmith.dev", "--subresource=status"),
            ("patch", "adapterdeployments.tunesmith.dev", "--subresource=status"),
            ("create", "servingpools.tunesmith.dev"),
            ("delete", "leases"),
        ):
            with pytest.raises(InstallationError):
                kubectl("auth", "can-i", verb, resource, *more, "--namespace", HOSTILE, f"--as={stage.tenant}")
        trial.observe("forbidden")


@pytest.mark.attack("C13", "an endless chat template in a FineTuneJob")
def test_endless_chat_template(stage: Stage, trial: Trial) -> None:
    template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    dataset = SPEC["dataset"] | {"chatTemplate": template}
    try:
        with trial.attack(tolerance=6, reason="validation shared two cores with the victim"):
            try:
                stage.apply_as_tenant(job_manifest("endless", changed(dataset=dataset), HOSTILE))
            except InstallationError as error:
                trial.observe(f"refused at apply: {error}"[:200])
                return

            def template_failure() -> Any:  # noqa: ANN401 - the condition
                job = get("finetunejob", "endless", HOSTILE)
                return next(
                    (c for c in (condition(job, k) for k in ("Failed", "Validated")) if "chatTemplate" in c["message"]),
                    None,
                )

            found = trial.status(
                "the job reports that its template does not end", template_failure, within=120, timeout=180
            )
            trial.observe(f"{found['reason']}: {found['message']}")
    finally:
        delete("finetunejob", "endless", HOSTILE)
