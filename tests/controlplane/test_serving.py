"""ServingPools and AdapterDeployments on a real API server with the real controllers; kubelet and agents are played."""

from __future__ import annotations

import base64
import contextlib
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.controlplane.manifests import job, pool
from tests.controlplane.operatorprocess import STORE, until
from tests.controlplane.poolkubelet import FINGERPRINT, gateway
from tests.controlplane.servingworld import World, digest_of, serving_world
from tunesmith.cluster.errors import InvalidError
from tunesmith.contracts.agent import list_digest, parse_keys, pod_tokens

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.controlplane.apiserver import ApiServer
    from tests.controlplane.operatorprocess import Operator
    from tunesmith.cluster.client import Cluster
    from tunesmith.contracts.agent import Keys


pytestmark = pytest.mark.controlplane
Object = dict[str, Any]


@pytest.fixture
async def world(operator: Operator, cluster: Cluster) -> AsyncIterator[World]:
    async with serving_world(operator, cluster) as made:
        yield made


async def test_an_adapter_whose_job_is_created_later_serves_requests(world: World) -> None:
    await world.pool()
    await world.serve("pirate", "talk")
    waiting = await world.until_condition("pirate", "Ready", "False", "FineTuneJobNotFound")
    assert waiting["message"].startswith(
        f"waits for FineTuneJob talk, which does not exist in namespace {world.namespace}"
    )
    made = await world.train("talk")
    await world.until_condition("pirate", "Ready", "True", "Resident")
    await world.until_condition("pirate", "Progressing", "False", "Settled")
    name = world.engine_name("pirate", "talk")
    (agent,) = world.pods.agents.values()
    (wanted,) = agent.lists[-1].adapters
    assert (wanted.engine_name, wanted.digest) == (name, digest_of("talk"))
    assert wanted.uri == f"{STORE}/{world.namespace}/talk-{made['metadata']['uid']}/artifact"
    assert agent.refused == 0
    status = (await world.get("pirate"))["status"]
    assert status["phase"] == "Ready"
    assert status["model"] == f"{world.namespace}/pirate"
    assert status["pool"] == {"name": "small", "namespace": world.namespace}
    assert (status["desiredReplicas"], status["replicas"], status["readyReplicas"]) == (1, 1, 1)
    assert status["revisions"][0]["state"] == "Resident"
    await world.until_condition("small", "Available", "True", kind="ServingPool")
    pool_status = (await world.get("small", "ServingPool"))["status"]
    assert pool_status["baseModelFingerprint"] == FINGERPRINT
    assert (pool_status["adapters"], pool_status["registeredAdapters"], pool_status["adapterCapacity"]) == (1, 1, 64)


async def test_a_pool_follows_the_whole_model_of_a_job(world: World) -> None:
    await world.pool(baseModel={"from": {"fineTuneJob": {"name": "talk"}}})
    waiting = await world.until_condition("small", "Resolved", "False", "FineTuneJobNotFound", kind="ServingPool")
    assert waiting["message"].startswith("waits for FineTuneJob talk, which does not exist")
    assert not await world.cluster.list("Deployment", world.namespace)
    whole = job(world.namespace, "talk", output={"merge": "Original"})
    first = await world.cluster.create(whole)
    await world.until_condition("small", "Available", "True", kind="ServingPool")
    await world.until_condition("small", "Resolved", "True", kind="ServingPool")

    async def served() -> str:
        (deployment,) = await world.cluster.list("Deployment", world.namespace)
        arguments = deployment["spec"]["template"]["spec"]["initContainers"][0]["args"]
        assert arguments[arguments.index("--artifact-digest") + 1] == digest_of("talk")
        return str(arguments[arguments.index("--uri") + 1])

    location = f"{STORE}/{world.namespace}/talk-{first['metadata']['uid']}/merged"
    assert await served() == location
    status = (await world.get("small", "ServingPool"))["status"]
    assert status["baseModelArtifact"] == {"digest": digest_of("talk"), "uri": location}
    # An AdapterDeployment of the job is a name of the base model; nothing is loaded.
    await world.serve("pirate", "talk", pool={"name": "small"})
    await world.until_condition("pirate", "Ready", "True", "Resident")
    name = world.engine_name("pirate", "talk")
    (agent,) = world.pods.agents.values()
    assert [(entry.engine_name, entry.uri) for entry in agent.lists[-1].adapters] == [(name, location)]
    assert (await world.get("pirate"))["status"]["revisions"][0]["baseModel"] is True
    assert (await world.get("small", "ServingPool"))["status"]["registeredAdapters"] == 0
    pods = set(world.pods.agents)
    await world.cluster.delete("FineTuneJob", "talk", world.namespace)
    await world.until_condition("small", "Resolved", "False", "FineTuneJobNotFound", kind="ServingPool")
    assert await served() == location
    second = await world.cluster.create(whole)
    new_location = f"{STORE}/{world.namespace}/talk-{second['metadata']['uid']}/merged"

    async def followed() -> bool:
        return await served() == new_location

    await until(followed, "the Deployment has the new artifact")
    await world.until(lambda: bool(world.pods.agents) and not pods & set(world.pods.agents), "the pods are replaced")
    await world.until_condition("small", "Resolved", "True", kind="ServingPool")
    await world.until_condition("pirate", "Progressing", "False", "Settled")
    await world.until_holders(name, 1)


async def test_a_pool_of_a_tenant_does_not_serve_the_job_of_another_one(world: World) -> None:
    await world.pool(baseModel={"from": {"fineTuneJob": {"name": "talk", "namespace": "elsewhere"}}})
    refused = await world.until_condition("small", "Degraded", "True", "InvalidSpec", kind="ServingPool")
    assert "sharedPoolNamespaces" in refused["message"]
    assert not await world.cluster.list("Deployment", world.namespace)


async def test_metadata_of_users_is_ignored_and_preserved(world: World) -> None:
    note = "x" * 250_000
    made = await world.pool()
    metadata = {"annotations": {"example.com/note": note}, "labels": {"example.com/team": "a"}}
    await world.cluster.patch("ServingPool", "small", world.namespace, {"metadata": metadata})
    await world.train("talk")
    await world.serve("pirate", "talk")
    await world.cluster.patch("AdapterDeployment", "pirate", world.namespace, {"metadata": metadata})
    await world.until_condition("pirate", "Ready", "True", "Resident")
    await world.until_condition("small", "Available", "True", kind="ServingPool")
    for item in (await world.get("pirate"), await world.get("small", "ServingPool")):
        assert item["metadata"]["annotations"]["example.com/note"] == note
        assert item["metadata"]["labels"] == {"example.com/team": "a"}
    assert made["spec"] == (await world.get("small", "ServingPool"))["spec"]


async def test_the_pool_owns_its_objects_and_restores_them(world: World) -> None:
    made = await world.pool(replicas=2)
    await world.until_condition("small", "Available", "True", kind="ServingPool")
    for kind in ("Deployment", "Secret", "PodDisruptionBudget"):
        (item,) = await world.cluster.list(kind, world.namespace, labels="tunesmith.dev/pool=small")
        assert item["metadata"]["ownerReferences"][0]["uid"] == made["metadata"]["uid"]
    (deployment,) = await world.cluster.list("Deployment", world.namespace)
    await world.cluster.patch("Deployment", deployment["metadata"]["name"], world.namespace, {"spec": {"replicas": 5}})

    async def mended() -> bool:
        (found,) = await world.cluster.list("Deployment", world.namespace)
        return bool(found["spec"]["replicas"] == 2)

    await until(mended, "the Deployment has 2 replicas again")
    await world.cluster.delete("ServingPool", "small", world.namespace)

    async def gone() -> bool:
        kinds = ("Deployment", "Secret", "PodDisruptionBudget", "Pod")
        return not any([await world.cluster.list(kind, world.namespace) for kind in kinds])

    await until(gone, "all objects of the pool are gone")


async def test_the_older_of_two_claims_on_a_name_wins_until_it_is_deleted(world: World) -> None:
    await world.pool()
    await world.train("talk")
    await world.serve("first", "talk", modelName="pirate")
    await world.until_condition("first", "Ready", "True")
    # Times of creation have whole seconds.
    created = datetime.fromisoformat((await world.get("first"))["metadata"]["creationTimestamp"])

    async def another_second() -> bool:
        return datetime.now(UTC) >= created + timedelta(seconds=1)

    await until(another_second, "the next second")
    await world.serve("second", "talk", modelName="pirate")
    lost = await world.until_condition("second", "Ready", "False", "ModelNameTaken")
    assert lost["message"] == (
        f"the model name {world.namespace}/pirate belongs to AdapterDeployment "
        f"{world.namespace}/first, which is older: "
        "choose another spec.modelName"
    )
    assert (
        "revisions" not in (await world.get("second"))["status"]
        or not (await world.get("second"))["status"]["revisions"]
    )
    await world.cluster.delete("AdapterDeployment", "first", world.namespace)
    await world.until_condition("second", "Ready", "True", "Resident")


async def test_a_damaged_artifact_is_reported_and_others_keep_serving(world: World) -> None:
    broken = world.engine_name("broken", "flipped")
    world.pods.damaged.add(broken)
    await world.pool()
    await world.train("flipped")
    await world.train("fine")
    await world.serve("broken", "flipped")
    await world.serve("good", "fine")
    told = await world.until_condition("broken", "Ready", "False", "RevisionFailed")
    assert "adapter_model.safetensors has another SHA-256" in told["message"]
    await world.until_condition("good", "Ready", "True", "Resident")


async def test_the_reason_of_a_failed_job_is_reported(world: World) -> None:
    await world.pool()
    await world.train("bad")
    await world.serve("pirate", "bad")
    told = await world.until_condition("pirate", "Ready", "False", "FineTuneJobFailed")
    assert "FineTuneJob bad failed with DatasetInvalid" in told["message"]
    assert "line 3 of data.jsonl is not JSON" in told["message"]


async def test_namespace_labels_decide_which_adapters_may_attach(world: World) -> None:
    made = await world.cluster.create(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"generateName": "platform-"}}
    )
    platform, labels = made["metadata"]["name"], {"labels": {"tier": "paid"}}
    allowed = {"from": "Selector", "selector": {"matchLabels": labels["labels"]}}
    await world.cluster.create(pool(platform, allowedNamespaces=allowed))
    await world.train("talk")
    await world.serve("pirate", "talk", pool={"name": "small", "namespace": platform})
    refused = await world.until_condition("pirate", "Resolved", "False", "PoolNotAllowed")
    assert f"ServingPool {platform}/small does not allow namespace {world.namespace} to attach" in refused["message"]
    await world.cluster.patch("Namespace", world.namespace, None, {"metadata": labels})
    await world.until_condition("pirate", "Resolved", "True")

    async def attached(count: int) -> bool:
        status = (await world.cluster.get("ServingPool", "small", platform)).get("status", {})
        return status.get("adapters") == count

    await until(lambda: attached(1), "the pool counts the adapter")
    await world.cluster.patch("Namespace", world.namespace, None, {"metadata": {"labels": {"tier": None}}})
    await world.until_condition("pirate", "Resolved", "False", "PoolNotAllowed")
    await until(lambda: attached(0), "the pool has let it go")
    await world.cluster.delete("Namespace", platform)


async def test_another_job_rolls_out_and_keeps_serving_after_its_source_is_deleted(world: World) -> None:
    await world.pool()
    await world.train("one")
    await world.train("two")
    await world.serve("pirate", "one")
    await world.until_condition("pirate", "Ready", "True", "Resident")
    patch = {"spec": {"adapterFrom": {"fineTuneJob": {"name": "two"}}}}
    await world.cluster.patch("AdapterDeployment", "pirate", world.namespace, patch)
    (agent,) = world.pods.agents.values()
    await world.until(lambda: agent.holds == [world.engine_name("pirate", "two")], "only the new revision is resident")
    held = [{entry.engine_name for entry in told.adapters} for told in agent.lists]
    both = {world.engine_name("pirate", "one"), world.engine_name("pirate", "two")}
    assert both in held, "the old one stayed until the new one was there"
    await world.cluster.delete("FineTuneJob", "two", world.namespace)
    resolved = await world.until_condition("pirate", "Resolved", "False", "FineTuneJobNotFound")
    assert resolved["message"].endswith("keeps serving")
    assert (await world.condition("pirate", "Ready"))["status"] == "True"


async def test_scale_by_hand_and_not_beside_autoscaling(world: World) -> None:
    await world.pool(replicas=2)
    await world.train("talk")
    await world.serve("plain", "talk")
    await world.serve("auto", "talk", autoscaling={"maxReplicas": 2})
    await world.until_condition("plain", "Ready", "True")
    await world.cluster.scale("AdapterDeployment", "plain", world.namespace, 2)
    await world.until_holders(world.engine_name("plain", "talk"), 2)
    with pytest.raises(InvalidError, match="replicas is set by autoscaling: remove autoscaling first"):
        await world.cluster.scale("AdapterDeployment", "auto", world.namespace, 2)
    await world.cluster.scale("AdapterDeployment", "plain", world.namespace, 1)
    await world.until_holders(world.engine_name("plain", "talk"), 1)


async def test_more_copies_than_pods_are_reported(world: World) -> None:
    await world.pool()
    await world.train("talk")
    await world.serve("pirate", "talk", replicas=2)
    found = await world.until_condition("pirate", "Progressing", "True", "PoolFull")
    assert "the pool has 1 pod and two copies never share one" in found["message"]


async def test_load_adds_a_copy_on_a_second_pod_and_removes_it(world: World) -> None:
    await world.pool(
        autoscaling={"minReplicas": 1, "maxReplicas": 2, "targetConcurrency": 64, "scaleDownDelaySeconds": 3}
    )
    await world.train("talk")
    rule = {"maxReplicas": 2, "targetConcurrency": 8, "scaleDownDelaySeconds": 3}
    await world.serve("busy", "talk", autoscaling=rule)
    await world.serve("quiet", "talk", autoscaling=rule)
    busy, quiet = world.engine_name("busy", "talk"), world.engine_name("quiet", "talk")
    await world.until_condition("busy", "Ready", "True")
    await world.until_condition("quiet", "Ready", "True")
    async with gateway(world.cluster, "default") as front:
        await front.set(**{f"{world.namespace}/busy": 24})
        await world.until_holders(busy, 2)
        assert len(world.pods.holders(quiet)) == 1
        status = (await world.get("busy"))["status"]
        assert status["desiredReplicas"] == 2
        assert re.fullmatch(
            r"\d+ requests running or waiting on average over \d+ s, 8 per copy: (2 copies|3 copies, limited to 2 by "
            r"maxReplicas)",
            status["desiredReason"],
        )
        pool_status = (await world.get("small", "ServingPool"))["status"]
        assert pool_status["desiredReason"] == (
            f"{world.namespace}/busy needs 2 copies, each on a separate pod: 2 pods"
        )
        await front.set()
        await world.until(lambda: len(world.pods.agents) == 1, "the pool has one pod again")
        assert len(world.pods.holders(busy)) == 1
        assert len(world.pods.holders(quiet)) == 1
        assert front.refused == 0
    await world.until_condition("busy", "Ready", "True")


async def test_an_idle_adapter_and_its_pool_go_to_zero_and_the_next_request_brings_both_back(world: World) -> None:
    rule = {"minReplicas": 0, "maxReplicas": 1, "scaleDownDelaySeconds": 1, "idleSeconds": 10}
    await world.pool(autoscaling=rule)
    await world.train("talk")
    async with gateway(world.cluster, "default") as front:
        await world.serve("seldom", "talk", autoscaling=rule)
        model = world.engine_name("seldom", "talk")
        await world.until_condition("seldom", "Ready", "True", "Resident")
        await world.until_condition("seldom", "Ready", "True", "ScaledToZero")
        status = (await world.get("seldom"))["status"]
        assert (status["phase"], status["desiredReplicas"]) == ("Idle", 0)
        assert [revision["state"] for revision in status["revisions"]] == ["Idle"], "the gateway holds its requests"
        await world.until(lambda: not world.pods.agents, "the pool has no pod")
        await world.until_condition("small", "Available", "False", "ScaledToZero", kind="ServingPool")
        await front.set(**{f"{world.namespace}/seldom": 1})
        await world.until_holders(model, 1)
        assert (await world.get("seldom"))["status"]["desiredReason"].endswith("1 copy")
        assert front.refused == 0


async def test_a_schedule_with_an_unknown_time_zone_is_reported(world: World) -> None:
    await world.pool()
    await world.train("talk")
    schedule = {"minReplicas": 2, "start": "08:00", "end": "18:00", "timeZone": "Europe/Nowhere"}
    await world.serve("pirate", "talk", autoscaling={"maxReplicas": 2, "schedules": [schedule]})
    found = await world.until_condition("pirate", "ScalingActive", "False", "InvalidSchedule")
    assert found["message"].startswith("spec.autoscaling.schedules[0].timeZone Europe/Nowhere does not exist")


async def test_nothing_shrinks_without_gateways(world: World) -> None:
    await world.pool(replicas=2)
    await world.train("talk")
    await world.serve("pirate", "talk", replicas=2)
    await world.until_holders(world.engine_name("pirate", "talk"), 2)
    patch: Object = {"spec": {"autoscaling": {"maxReplicas": 2, "scaleDownDelaySeconds": 0}}}
    await world.cluster.patch("AdapterDeployment", "pirate", world.namespace, patch)

    async def decided() -> bool:
        status = (await world.get("pirate"))["status"]
        return bool(status["observedGeneration"] == 2)

    await until(decided, "the new rule was acted on")
    assert (await world.get("pirate"))["status"]["desiredReplicas"] == 2


async def test_a_pods_problem_is_shown_while_it_lasts(world: World) -> None:
    await world.pool()
    await world.until_condition("small", "Degraded", "False", "AsExpected", kind="ServingPool")
    await world.until(lambda: len(world.pods.agents) == 1, "the pool has one pod")
    (name,) = world.pods.agents

    async def set_engine(**state: object) -> None:
        engine = {"name": "engine", "image": "engine:1", "imageID": "", "ready": False, "restartCount": 2, **state}
        status = {"status": {"containerStatuses": [engine]}}
        await world.cluster.patch("Pod", name, world.namespace, status, type_="strategic", subresource="status")

    ended = {"terminated": {"exitCode": 0, "reason": "Completed", "message": "EngineDeadError: killed"}}
    for state, reason, message in (
        (
            {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}},
            "ImagePullFailed",
            "image engine:1 of engine cannot be pulled: not found",
        ),
        (
            {"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": ended},
            "EngineFailed",
            "the engine stopped (exit code 0, restarted 2 times): EngineDeadError: killed",
        ),
    ):
        await set_engine(**state)
        shown = await world.until_condition("small", "Degraded", "True", reason, kind="ServingPool")
        assert shown["message"] == f"pod {name}: {message}"
        await set_engine(state={"running": {}}, lastState=ended, ready=True)
        await world.until_condition("small", "Degraded", "False", "AsExpected", kind="ServingPool")


async def test_a_refused_write_is_a_condition_until_it_is_accepted(world: World, server: ApiServer) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "none", "namespace": world.namespace},
        "spec": {"hard": {"count/deployments.apps": "0"}},
    }
    server.apply(quota)
    await world.pool()
    refused = await world.until_condition("small", "Degraded", "True", "WriteRefused", kind="ServingPool")
    sentence = rf"the API server refuses Deployment {world.namespace}/small-\w+-pool: .*exceeded quota: none"
    assert re.match(sentence, refused["message"])
    assert (await world.condition("small", "Available", "ServingPool"))["reason"] == "WriteRefused"
    server.apply({**quota, "spec": {"hard": {"count/deployments.apps": "5"}}})
    await world.until_condition("small", "Available", "True", kind="ServingPool")
    await world.until_condition("small", "Degraded", "False", kind="ServingPool")


async def test_a_changed_pool_of_one_pod_never_stops_serving(world: World) -> None:
    await world.pool()
    await world.train("talk")
    await world.serve("pirate", "talk")
    await world.until_condition("pirate", "Ready", "True", "Resident")
    await world.until_condition("small", "Updated", "True", "PodsCurrent", kind="ServingPool")
    (old,) = world.pods.agents
    since = (await world.condition("pirate", "Ready"))["lastTransitionTime"]
    world.pods.engines_start = False
    await world.cluster.patch("ServingPool", "small", world.namespace, {"spec": {"drainSeconds": 7}})
    await world.until(lambda: len(world.pods.agents) == 2, "a surge pod exists")
    rolling = await world.until_condition("small", "Updated", "False", "RollingOut", kind="ServingPool")
    assert "each pod stops after its replacement is ready and has loaded its adapters" in rolling["message"]
    assert old in world.pods.agents
    (new,) = set(world.pods.agents) - {old}
    await world.pods.agents[new].set(engine_ready=True)
    await world.until(lambda: list(world.pods.agents) == [new], "the old pod is gone")
    assert world.pods.holders(world.engine_name("pirate", "talk")) == [new]
    await world.until_condition("small", "Updated", "True", "PodsCurrent", kind="ServingPool")
    ready = await world.condition("pirate", "Ready")
    assert (ready["status"], ready["lastTransitionTime"]) == ("True", since), "it was ready all the time"


async def test_a_failed_change_is_rolled_back_on_request(world: World) -> None:
    await world.pool(rollingUpdate={"onFailure": "RollBack"})
    await world.train("talk")
    await world.serve("pirate", "talk")
    await world.until_condition("pirate", "Ready", "True", "Resident")
    await world.until_condition("small", "Updated", "True", "PodsCurrent", kind="ServingPool")
    (old,) = world.pods.agents
    world.pods.engines_start = False
    change = {"spec": {"engine": {"image": "engine:broken"}}}
    await world.cluster.patch("ServingPool", "small", world.namespace, change)
    await world.until(lambda: len(world.pods.agents) == 2, "a surge pod exists")
    (new,) = set(world.pods.agents) - {old}
    state = {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}
    engine = {"name": "engine", "image": "engine:broken", "imageID": "", "ready": False, "restartCount": 0}
    status = {"status": {"containerStatuses": [{**engine, "state": state}]}}
    await world.cluster.patch("Pod", new, world.namespace, status, type_="strategic", subresource="status")
    failing = await world.until_condition("small", "Progressing", "False", "UpdateFailed", kind="ServingPool")
    assert "1 pod with the previous settings keeps running" in failing["message"]
    back = await world.until_condition("small", "Updated", "False", "RolledBack", kind="ServingPool", seconds=240)
    assert "engine:broken" in back["message"]
    await world.until(lambda: list(world.pods.agents) == [old], "only the old pod is left")
    world.pods.engines_start = True
    await world.cluster.patch("ServingPool", "small", world.namespace, {"spec": {"engine": {"image": "engine:fixed"}}})
    await world.until_condition("small", "Updated", "True", "PodsCurrent", kind="ServingPool")
    await world.until(lambda: old not in world.pods.agents, "a pod with the fixed image replaced the old one")


async def test_a_new_release_updates_one_pool_after_the_other(world: World, operator: Operator) -> None:
    await world.pool()
    await world.cluster.create(pool(world.namespace, "tiny", modelName="tiny"))
    for name in ("small", "tiny"):
        await world.until_condition(name, "Available", "True", kind="ServingPool")
        await world.until_condition(name, "Updated", "True", kind="ServingPool")
    before = set(world.pods.agents)
    world.pods.engines_start = False
    operator.kill()
    operator.engine_image = "localhost/engine:2"
    operator.start()
    try:
        await world.until_condition("small", "Updated", "False", "RollingOut", kind="ServingPool")
        waiting = await world.until_condition("tiny", "Updated", "False", "UpdatePending", kind="ServingPool")
        assert f"waits for the update of ServingPool {world.namespace}/small" in waiting["message"]
        await world.until(lambda: len(world.pods.agents) == 3, "one surge pod exists")
        (first,) = set(world.pods.agents) - before
        assert first.startswith("small-")
        world.pods.engines_start = True
        await world.pods.agents[first].set(engine_ready=True)
        await world.until(lambda: not before & set(world.pods.agents), "all pods were replaced")
        for name in ("small", "tiny"):
            await world.until_condition(name, "Updated", "True", "PodsCurrent", kind="ServingPool")
            assert (await world.condition(name, "Available", "ServingPool"))["status"] == "True"
    finally:
        operator.engine_image = "localhost/engine:1"
        operator.kill()
        operator.start()


async def test_a_restart_of_the_operator_moves_nothing(world: World, operator: Operator) -> None:
    await world.pool(replicas=2)
    await world.train("talk")
    for number in range(4):
        await world.serve(f"model-{number}", "talk")
        await world.until_condition(f"model-{number}", "Ready", "True")
    before = {name: agent.holds for name, agent in world.pods.agents.items()}
    counts = {name: len(agent.lists) for name, agent in world.pods.agents.items()}
    since = {name: (await world.condition(name, "Ready"))["lastTransitionTime"] for name in ("model-0", "model-3")}
    operator.kill()
    operator.start()
    agents = world.pods.agents
    await world.until(
        lambda: all(len(agents[name].lists) > counts[name] for name in agents), "the lists were told again"
    )
    for name, agent in agents.items():
        for told in agent.lists[counts[name] :]:
            assert sorted(entry.engine_name for entry in told.adapters) == before[name]
    for name, time in since.items():
        assert (await world.condition(name, "Ready"))["lastTransitionTime"] == time


async def test_a_silent_agent_makes_it_unknown(world: World) -> None:
    await world.pool()
    await world.train("talk")
    await world.serve("pirate", "talk")
    await world.until_condition("pirate", "Ready", "True")
    (agent,) = world.pods.agents.values()
    agent.silent = True
    await world.until_condition("pirate", "Ready", "Unknown", "AgentSilent")
    await world.until_condition("small", "Degraded", "True", "AgentSilent", kind="ServingPool")
    agent.silent = False
    await world.until_condition("pirate", "Ready", "True", "Resident")


async def test_a_rotated_installation_key_reaches_every_pod_without_interruption(world: World) -> None:
    await world.pool()
    await world.train("talk")
    await world.serve("first", "talk")
    ready = await world.until_condition("first", "Ready", "True")
    (agent,) = world.pods.agents.values()
    place = ("Secret", "tunesmith-installation-key", "default")
    installation = await world.cluster.get(*place)
    old, new = installation["data"]["key"], base64.b64encode(b"the next installation key of the tests").decode()

    async def until_keys(count: int) -> dict[str, Keys]:
        """Wait until gateways and pools have so many keys; return those of the pool."""
        found: dict[str, Keys] = {}

        async def holds() -> bool:
            (secret,) = await world.cluster.list("Secret", world.namespace)
            gateway = await world.cluster.get("Secret", "tunesmith-gateway-key", "default")
            found.update({name: parse_keys(base64.b64decode(text)) for name, text in secret["data"].items()})
            keys = [*found.values(), parse_keys(base64.b64decode(gateway["data"]["key"]))]
            return [len(entry) for entry in keys] == [count] * 5

        await until(holds, f"{count} keys everywhere")
        return found

    await world.cluster.patch(*place, {"data": {"key": new, "previous": old}})
    keys = await until_keys(2)
    await world.serve("second", "talk")  # the agent has not read its new files yet
    await world.until_condition("second", "Ready", "True")
    agent.tokens = pod_tokens(keys["events"], agent.pod_uid)
    agent.control_tokens = pod_tokens(keys["control"], agent.pod_uid)
    await world.cluster.patch(*place, {"data": {"previous": None}})
    keys = await until_keys(1)
    agent.tokens = pod_tokens(keys["events"], agent.pod_uid)
    agent.control_tokens = pod_tokens(keys["control"], agent.pod_uid)
    await agent.disconnect()
    await world.serve("third", "talk")
    await world.until_condition("third", "Ready", "True")
    assert (await world.condition("first", "Ready"))["lastTransitionTime"] == ready["lastTransitionTime"]


async def test_agents_accept_the_leader_after_the_lease_was_deleted(world: World) -> None:
    await world.pool()
    await world.train("talk")
    await world.serve("first", "talk")
    await world.until_condition("first", "Ready", "True")
    (agent,) = world.pods.agents.values()
    before = agent.lists[-1].epoch
    assert await world.cluster.delete("Lease", "tunesmith-operator", "default")

    async def led_again() -> bool:
        return await world.cluster.find("Lease", "tunesmith-operator", "default") is not None

    await until(led_again, "another leader")
    await world.serve("second", "talk")
    await world.until_condition("second", "Ready", "True")
    assert agent.lists[-1].epoch > before


async def test_a_list_from_another_client_is_replaced(world: World) -> None:
    await world.pool()
    await world.train("talk")
    await world.serve("pirate", "talk")
    await world.until_condition("pirate", "Ready", "True")
    (agent,) = world.pods.agents.values()
    await agent.set(epoch=2**50, sequence=2**50, list_digest=list_digest([]), adapters=[])
    await world.until_holders(world.engine_name("pirate", "talk"), 1)
    assert agent.lists[-1].epoch == 2**50 + 1


async def test_tokens_stay_out_of_status_events_and_logs(world: World, operator: Operator) -> None:
    await world.pool()
    await world.train("talk")
    await world.serve("pirate", "talk")
    await world.until_condition("pirate", "Ready", "True")
    (secret,) = await world.cluster.list("Secret", world.namespace)
    assert secret["data"].keys() == {"control", "events", "serving", "metrics"}
    keys = [base64.b64decode(value).decode().strip() for value in secret["data"].values()]
    keys += [token for agent in world.pods.agents.values() for token in (*agent.tokens, *agent.control_tokens)]
    for kind in ("ServingPool", "AdapterDeployment", "Pod", "Deployment", "Event"):
        with contextlib.suppress(KeyError):
            text = str(await world.cluster.list(kind, world.namespace))
            assert not any(key in text for key in keys)
    log = operator.log.read_text()
    assert not any(key in log for key in keys)
