"""What a cluster refuses is shown by the resource that needs it, which continues once it is accepted.

Refused are Jobs, Deployments and pods; by a quota, an admission policy, a webhook that does not answer, or missing
rights of the operator. The API server and its controllers are real, and only the kubelet is played.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.controlplane.kubelet import published
from tests.controlplane.manifests import pool
from tests.controlplane.operatorprocess import until
from tests.controlplane.poolkubelet import PoolKubelet
from tests.controlplane.trainingworld import KIND

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from tests.controlplane.apiserver import ApiServer
    from tests.controlplane.trainingworld import World

pytestmark = pytest.mark.controlplane
Object = dict[str, Any]
OPERATOR = "system:serviceaccount:default:tunesmith-operator"
ROLE = "tunesmith-operator"
POD = {"restartPolicy": "Never", "containers": [{"name": "c", "image": "localhost/none:1"}]}
PROBES: dict[str, Object] = {
    "jobs": {"apiVersion": "batch/v1", "kind": "Job", "spec": {"template": {"spec": POD}}},
    "deployments": {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "spec": {
            "selector": {"matchLabels": {"app": "probe"}},
            "template": {
                "metadata": {"labels": {"app": "probe"}},
                "spec": {"containers": POD["containers"]},
            },
        },
    },
    "pods": {"apiVersion": "v1", "kind": "Pod", "spec": POD},
}
GROUPS = {"jobs": "batch", "deployments": "apps", "pods": ""}


@dataclass
class Refused:
    """A resource that is refused in a namespace while `by` says so."""

    server: ApiServer
    namespace: str
    resource: str

    @contextmanager
    def by(self, cause: str) -> Iterator[None]:
        """Refuse for as long as the block runs, and begin it when the API server does."""
        apply, remove = {
            "quota": (self._quota, self._remove("resourcequota", "none", "-n", self.namespace)),
            "policy": (self._policy, self._remove("validatingadmissionpolicybinding", self._name)),
            "webhook": (self._webhook, self._remove("validatingwebhookconfiguration", self._name)),
            "rights": (self._take_rights, self._give_rights),
        }[cause]
        self._rights = self.server.get("clusterrole", ROLE)
        apply()
        try:
            yield
        finally:
            remove()

    async def begun(self, cause: str) -> None:
        """Return once the API server refuses the resource."""

        async def refuses() -> bool:
            return not await asyncio.to_thread(self._is_accepted, cause)

        await until(refuses, f"the refusal of {self.resource} by {cause}")

    @property
    def _name(self) -> str:
        return f"{self.namespace}-{self.resource}"

    def _is_accepted(self, cause: str) -> bool:
        if cause == "rights":
            can = ("auth", "can-i", "create", f"{self.resource}.{GROUPS[self.resource]}", "--as", OPERATOR)
            return self.server.kubectl(*can, "-n", self.namespace).returncode == 0
        probe = {**PROBES[self.resource], "metadata": {"name": "probe", "namespace": self.namespace}}
        return self.server.kubectl("create", "--dry-run=server", "-f", "-", manifest=probe).returncode == 0

    def _remove(self, *what: str) -> Any:
        return lambda: self.server.kubectl("delete", *what)

    def _quota(self) -> None:
        group = GROUPS[self.resource]
        self.server.apply(
            {
                "apiVersion": "v1",
                "kind": "ResourceQuota",
                "metadata": {"name": "none", "namespace": self.namespace},
                "spec": {"hard": {f"count/{self.resource}" + (f".{group}" if group else ""): "0"}},
            }
        )

    def _match(self) -> Object:
        return {"matchLabels": {"kubernetes.io/metadata.name": self.namespace}}

    def _rule(self) -> Object:
        return {
            "apiGroups": [GROUPS[self.resource]],
            "apiVersions": ["v1"],
            "resources": [self.resource],
            "operations": ["CREATE"],
        }

    def _policy(self) -> None:
        api, name = "admissionregistration.k8s.io/v1", {"name": self._name}
        match = {"namespaceSelector": self._match(), "resourceRules": [self._rule()]}
        rule = {"expression": "false", "message": "not in this team's hours"}
        for kind, spec in (
            ("ValidatingAdmissionPolicy", {"matchConstraints": match, "validations": [rule]}),
            ("ValidatingAdmissionPolicyBinding", {"policyName": self._name, "validationActions": ["Deny"]}),
        ):
            self.server.apply({"apiVersion": api, "kind": kind, "metadata": name, "spec": spec})

    def _webhook(self) -> None:
        webhook = {
            "name": "nobody.example.com",
            "clientConfig": {"url": "https://127.0.0.1:1/"},
            "rules": [self._rule()],
            "namespaceSelector": self._match(),
            "sideEffects": "None",
            "admissionReviewVersions": ["v1"],
            "timeoutSeconds": 1,
        }
        self.server.apply(
            {
                "apiVersion": "admissionregistration.k8s.io/v1",
                "kind": "ValidatingWebhookConfiguration",
                "metadata": {"name": self._name},
                "webhooks": [webhook],
            }
        )

    def _take_rights(self) -> None:
        rules = [
            {**rule, "verbs": [verb for verb in rule["verbs"] if verb not in {"create", "patch"}]}
            if self.resource in rule["resources"]
            else rule
            for rule in self._rights["rules"]
        ]
        self._set_rules(rules)

    def _give_rights(self) -> None:
        self._set_rules(self._rights["rules"])

    def _set_rules(self, rules: list[Object]) -> None:
        done = self.server.kubectl("patch", "clusterrole", ROLE, "--type=merge", "-p", json.dumps({"rules": rules}))
        assert done.returncode == 0, done.stderr


def shown(server: ApiServer, kind: str, name: str, namespace: str) -> tuple[str, str]:
    """The line of `kubectl get`, and what `kubectl describe` prints."""
    line = server.kubectl("get", kind, name, "-n", namespace, "--no-headers").stdout
    return line, server.kubectl("describe", kind, name, "-n", namespace).stdout


async def until_shown(server: ApiServer, kind: str, name: str, namespace: str, reason: str, words: str) -> None:
    """Return once `kubectl get` has the reason, and `kubectl describe` a Warning with the API server's message."""
    found = ("", "")

    async def is_shown() -> bool:
        nonlocal found
        found = await asyncio.to_thread(shown, server, kind, name, namespace)
        events = found[1].partition("Events:")[2]
        return reason in found[0] and words in found[1].partition("Events:")[0] and f"Warning  {reason}" in events

    try:
        await until(is_shown, f"{reason} of {kind} {name}")
    except TimeoutError as error:
        raise TimeoutError(f"{error}: {found}") from None


@pytest.fixture
def stopwatch(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Record, in the test's report, the seconds from the latest call until this one."""
    since = time.monotonic()

    def record(what: str) -> None:
        nonlocal since
        record_property(what, round(time.monotonic() - since, 1))
        since = time.monotonic()

    return record


WORDS = {
    "quota": "exceeded quota: none",
    "policy": "denied request: not in this team's hours",
    "webhook": "failed calling webhook",
    "rights": f'User "{OPERATOR}" cannot create resource',
}


@pytest.mark.parametrize("cause", WORDS)
async def test_a_job_whose_jobs_are_refused_reports_the_reason_and_continues(
    world: World, server: ApiServer, stopwatch: Callable[[str], None], cause: str
) -> None:
    world.kubelet.script = published
    refused = Refused(server, world.namespace, "jobs")
    with refused.by(cause):
        await refused.begun(cause)
        stopwatch("refused")
        await world.submit()
        await until_shown(server, KIND, "tone", world.namespace, "WriteRefused", WORDS[cause])
        stopwatch("shown")
        assert (await world.status())["phase"] == "Validating"
    await world.until_condition("Validated")
    stopwatch("continued")
    await world.until_condition("Complete")


async def test_a_refused_attempt_keeps_the_validation(world: World, server: ApiServer) -> None:
    world.kubelet.script = lambda _: None
    await world.submit()

    async def validates() -> bool:
        return bool(await world.cluster.list("Pod", world.namespace))

    await until(validates, "the validation's pod")
    refused = Refused(server, world.namespace, "jobs")
    with refused.by("policy"):
        await refused.begun("policy")
        [pod] = await world.cluster.list("Pod", world.namespace)
        await world.kubelet.end(pod, published(pod))
        await until_shown(server, KIND, "tone", world.namespace, "WriteRefused", WORDS["policy"])
        status = await world.status()
        assert status["preflight"]["rows"] == 90
        assert "attempts" not in status or not status["attempts"]
        world.kubelet.script = published
    await world.until_condition("Complete")
    assert len((await world.status())["attempts"]) == 1


@pytest.mark.parametrize(
    ("hard", "words"),
    [
        ({"pods": "0"}, "ResourceQuota none allows 0 of pods, 0 are used, and a pod needs 1"),
        (
            {"requests.nvidia.com/gpu": "0"},
            "ResourceQuota none allows 0 of requests.nvidia.com/gpu, 0 are used, and a pod needs 1",
        ),
    ],
    ids=["pods", "GPUs"],
)
async def test_a_job_whose_pods_a_quota_refuses_reports_the_reason_and_continues(
    world: World, server: ApiServer, stopwatch: Callable[[str], None], hard: Object, words: str
) -> None:
    world.kubelet.script = published
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none", "namespace": world.namespace}}
    server.apply({**quota, "spec": {"hard": hard}})

    async def enforced() -> bool:
        return bool(server.get("resourcequota", "none", "-n", world.namespace).get("status", {}).get("hard"))

    await until(enforced, "the quota's status")
    stopwatch("refused")
    await world.submit()
    await until_shown(server, KIND, "tone", world.namespace, "PodsRefused", words)
    stopwatch("shown")
    server.kubectl("delete", "resourcequota", "none", "-n", world.namespace)
    await world.until_condition("Complete", seconds=240)
    stopwatch("continued")


async def test_a_job_whose_pods_a_policy_refuses_names_the_command_to_run(
    world: World, server: ApiServer, stopwatch: Callable[[str], None]
) -> None:
    world.kubelet.script = published
    refused = Refused(server, world.namespace, "pods")
    with refused.by("policy"):
        await refused.begun("policy")
        stopwatch("refused")
        await world.submit()
        await until_shown(server, KIND, "tone", world.namespace, "PodsMissing", "kubectl describe job")
        stopwatch("shown")
        [name] = await world.jobs()
        assert WORDS["policy"] in shown(server, "job", name, world.namespace)[1]
    await world.until_condition("Complete", seconds=240)
    stopwatch("continued")


@pytest.fixture
async def pods(world: World) -> AsyncIterator[PoolKubelet]:
    """The pods of a pool, played in the world's namespace."""
    played = PoolKubelet(world.cluster, world.namespace)
    task = asyncio.create_task(played.run())
    yield played
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await world.cluster.delete("ServingPool", "small", world.namespace)


async def until_pool_available(world: World) -> None:
    async def available() -> bool:
        status = (await world.cluster.get("ServingPool", "small", world.namespace)).get("status", {})
        return (status.get("phase"), status.get("reason")) == ("Available", "PodsReady")

    await until(available, "the pool is available", seconds=240)


@pytest.mark.parametrize("cause", WORDS)
@pytest.mark.usefixtures("pods")
async def test_a_pool_whose_deployment_is_refused_reports_the_reason_and_continues(
    world: World, server: ApiServer, stopwatch: Callable[[str], None], cause: str
) -> None:
    refused = Refused(server, world.namespace, "deployments")
    words = WORDS[cause].replace("create resource", "patch resource")  # server-side apply
    with refused.by(cause):
        await refused.begun(cause)
        stopwatch("refused")
        await world.cluster.create(pool(world.namespace))
        await until_shown(server, "ServingPool", "small", world.namespace, "WriteRefused", words)
        stopwatch("shown")
    await until_pool_available(world)
    stopwatch("continued")


@pytest.mark.parametrize("cause", ["quota", "policy"])
@pytest.mark.usefixtures("pods")
async def test_a_pool_whose_pods_are_refused_reports_the_reason_and_continues(
    world: World, server: ApiServer, stopwatch: Callable[[str], None], cause: str
) -> None:
    refused = Refused(server, world.namespace, "pods")
    with refused.by(cause):
        await refused.begun(cause)
        stopwatch("refused")
        await world.cluster.create(pool(world.namespace))
        await until_shown(server, "ServingPool", "small", world.namespace, "PodsRefused", WORDS[cause])
        stopwatch("shown")
    await until_pool_available(world)
    stopwatch("continued")
