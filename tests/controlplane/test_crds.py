"""What `kubectl apply` takes and refuses, on a real API server: each refusal with the sentence that the user reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.controlplane.manifests import API, LOCAL_ONLY, REFUSED_JOBS, adapter, job, pool
from tunesmith.api.adapterdeployment import AdapterDeployment
from tunesmith.api.finetunejob import FORMATS, FineTuneJob
from tunesmith.api.manifest import parse_manifest
from tunesmith.api.servingpool import ServingPool

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.controlplane.apiserver import ApiServer
    from tunesmith.api.dataset import DataFormat
    from tunesmith.api.objective import ObjectiveName

    Build = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.controlplane

AUTOSCALED = "replicas is set by autoscaling: remove autoscaling first"
IMMUTABLE = "spec is immutable except for suspend, activeDeadlineSeconds and ttlSecondsAfterFinished: create"


def assert_refused(apiserver: ApiServer, document: dict[str, Any], sentence: str, *arguments: str) -> None:
    """`kubectl apply` refuses the manifest with the sentence."""
    done = apiserver.kubectl("apply", "-f", "-", *arguments, manifest=document)
    assert done.returncode != 0, f"taken: {done.stdout}"
    assert sentence in " ".join(done.stderr.split())


@pytest.mark.parametrize("case", REFUSED_JOBS)
def test_fine_tune_job_is_refused_with_a_sentence(apiserver: ApiServer, case: str) -> None:
    changes, sentence, _ = REFUSED_JOBS[case]
    assert_refused(apiserver, job("default", **changes), sentence)


@pytest.mark.parametrize(
    ("objective", "format_"),
    [(name, form) for name, forms in FORMATS.items() for form in sorted(forms)],
    ids=str,
)
def test_each_objective_takes_its_formats(apiserver: ApiServer, objective: ObjectiveName, format_: DataFormat) -> None:
    taken = job("default", objective={objective.value: {}}, dataset__format=format_.value)
    done = apiserver.kubectl("apply", "-f", "-", "--dry-run=server", manifest=taken)
    assert done.returncode == 0, done.stderr


def test_server_side_apply_says_the_same(apiserver: ApiServer) -> None:
    for case in ("two methods", "rank -4", "file data set", "memory without a number", "epochs and steps"):
        changes, sentence, _ = REFUSED_JOBS[case]
        assert_refused(apiserver, job("default", **changes), sentence, "--server-side")


def test_name_that_leaves_no_room_for_names_of_pods_is_refused(apiserver: ApiServer, namespace: str) -> None:
    at_most = "metadata.name must have at most 40 characters, because it is part of the names of"
    assert_refused(apiserver, job(namespace, name="n" * 41), f"{at_most} Jobs and pods")
    apiserver.apply(job(namespace, name="n" * 40))
    assert_refused(apiserver, pool(namespace, name="n" * 41), f"{at_most} pods")
    apiserver.apply(pool(namespace, name="n" * 40))
    several = "metadata.name must not contain '.' if resources.nodes is above 1, because it is part of host names"
    assert_refused(apiserver, job(namespace, name="a.b", resources__nodes=2), several)
    apiserver.apply(job(namespace, name="a.b"))
    too_long = "metadata.name has more than 63 characters, the limit of a model name: set spec.modelName"
    assert_refused(apiserver, adapter(namespace, name="n" * 64), too_long)
    apiserver.apply(adapter(namespace, name="n" * 64, modelName="short"))


def test_defaults_are_those_of_a_local_run(apiserver: ApiServer, namespace: str) -> None:
    apiserver.apply(job(namespace))
    spec = apiserver.get("ftj", "tone", "-n", namespace)["spec"]
    lora = {"rank": 16, "alpha": 32, "dropout": 0.0, "targetModules": ["all-linear"]}
    assert spec["method"] == {"lora": {**lora, "rsLora": False, "dora": False, "initialization": "Default"}}
    assert spec["resources"] == {"gpus": 1, "gpuResource": "nvidia.com/gpu", "cpu": "1", "memory": "8Gi", "nodes": 1}
    assert spec == parse_manifest(json.dumps(job(namespace))).spec.manifest()


def test_stored_objects_are_read_by_the_models(apiserver: ApiServer, namespace: str) -> None:
    apiserver.apply(job(namespace))
    apiserver.apply(pool(namespace))
    apiserver.apply(adapter(namespace))
    stored = FineTuneJob.model_validate(apiserver.get("ftj", "tone", "-n", namespace))
    assert (stored.metadata.namespace, stored.metadata.generation) == (namespace, 1)
    assert ServingPool.model_validate(apiserver.get("spool", "small", "-n", namespace)).spec.replicas == 1
    assert AdapterDeployment.model_validate(apiserver.get("adep", "tone", "-n", namespace)).model == f"{namespace}/tone"


def test_quantities_may_be_numbers(apiserver: ApiServer, namespace: str) -> None:
    apiserver.apply(job(namespace, resources={"cpu": 2, "memory": "1.5Gi"}))
    assert apiserver.get("ftj", "tone", "-n", namespace)["spec"]["resources"]["cpu"] == 2


@pytest.mark.parametrize(
    "change",
    [
        {"hyperparameters__seed": 1},
        {"method": {"qlora": {}}},
        {"dataset__train": [{"uri": "s3://data/other.jsonl"}]},
        {"maxAttempts": 4},
        {"scheduling__queue": "team"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_fine_tune_job_is_immutable(apiserver: ApiServer, namespace: str, change: dict[str, object]) -> None:
    apiserver.apply(job(namespace))
    assert_refused(apiserver, job(namespace, **change), IMMUTABLE)
    apiserver.apply(job(namespace))  # the same manifest again is no change


@pytest.mark.parametrize(
    "change", [{"suspend": True}, {"activeDeadlineSeconds": 60}, {"suspend": True, "activeDeadlineSeconds": 1}]
)
def test_a_fine_tune_job_may_be_suspended_and_bounded_later(
    apiserver: ApiServer, namespace: str, change: dict[str, object]
) -> None:
    for document in (job(namespace), job(namespace, **change), job(namespace)):
        apiserver.apply(document)
    assert_refused(apiserver, job(namespace, hyperparameters__seed=1, **change), IMMUTABLE)


def test_fields_of_peft_are_kept_and_do_not_change(apiserver: ApiServer, namespace: str) -> None:
    config = {"r": 8, "target_modules": ["q_proj"], "init_weights": True, "rank_pattern": {"q_proj": 4}}
    apiserver.apply(job(namespace, method={"peft": {"type": "LOHA", "config": config}}))
    assert apiserver.get("ftj", "tone", "-n", namespace)["spec"]["method"]["peft"]["config"] == config
    other = {**config, "rank_pattern": {"q_proj": 2}}
    assert_refused(apiserver, job(namespace, method={"peft": {"type": "LOHA", "config": other}}), IMMUTABLE)


def test_metadata_of_a_fine_tune_job_may_change(apiserver: ApiServer, namespace: str) -> None:
    apiserver.apply(job(namespace))
    assert apiserver.kubectl("label", "ftj", "tone", "team=a", "-n", namespace).returncode == 0


REFUSED_POOLS = {
    "rank that vLLM has not": (
        {"engine": {"maxLoraRank": 48}},
        'spec.engine.maxLoraRank: Unsupported value: 48: supported values: "8", "16", "32"',
    ),
    "more at least than at most": (
        {"autoscaling": {"minReplicas": 3, "maxReplicas": 2}},
        "autoscaling.minReplicas must not be above autoscaling.maxReplicas",
    ),
    "no most": ({"autoscaling": {}}, "spec.autoscaling.maxReplicas: Required value"),
    "replicas beside autoscaling": ({"replicas": 2, "autoscaling": {"maxReplicas": 4}}, AUTOSCALED),
    "a slash in the model's name": (
        {"modelName": "org/base"},
        "a model name has letters, digits, '-', '.' and '_', and begins and ends with a letter or digit",
    ),
    "file base model": ({"baseModel__uri": "file:///models/base"}, LOCAL_ONLY),
    **{
        f"the argument {' '.join(arguments)}": (
            {"engine": {"args": ["--seed=1", *arguments]}},
            "is reserved, or abbreviates a reserved argument. Remove it",
        )
        for arguments in (
            ["--max_loras=4"],
            ["--host=::"],
            ["--ho", "::"],
            ["--api-k=x"],
            ["--config", "/x.yaml"],
            ["--no-enable-lora"],
            ["--root_path=/x"],
            ["--kv_transfer_config.kv_connector=x"],
            ["--weight-tr.x=1"],
            ["--"],
        )
    },
    "an abbreviation": (
        {"engine": {"args": ["--seed=1", "--trust_rem"]}},
        "engine.args: --trust-rem is reserved, or abbreviates a reserved argument. Remove it",
    ),
    **{
        f"the value {words}": (
            {"engine": {"args": words}},
            "an element that is neither an argument nor the value of one",
        )
        for words in (["foo"], [""], ["--seed=1", "foo"], ["--max-num-seqs 8"], ["--seed=1", "--a\tb"])
    },
    "fewer adapters than slots": (
        {"engine": {"maxLoras": 8, "maxAdapters": 4}},
        "engine.maxAdapters must not be below engine.maxLoras",
    ),
    "more adapters than an agent accepts": ({"engine": {"maxAdapters": 1025}}, "should be less than or equal to 1024"),
    "more memory for adapters than the pod has": (
        {"engine": {"adapterMemory": "8Gi"}, "resources": {"memory": "8Gi"}},
        "engine.adapterMemory must be below resources.memory",
    ),
    "a short form": ({"engine": {"args": ["-tp=2"]}}, "engine.args must not contain short forms: write the long name"),
    "a variable that the pool sets": (
        {"engine": {"env": [{"name": "PYTHONPATH", "value": "/mine"}]}},
        "engine.env must not contain reserved variables: remove them; reserved are GLOO_",
    ),
    "no choice at all": ({"requests": {"maxChoices": 0}}, "spec.requests.maxChoices in body should be greater than"),
    "a cache without a unit": (
        {"engine": {"kvCacheMemory": "512"}},
        "a cache size is a whole number with the unit Mi or Gi, such as 512Mi",
    ),
    "a cache of a mounted base model": (
        {"baseModel": {"uri": "pvc://models/llama"}, "baseModelCache": {"claimName": "models"}},
        "baseModelCache is only for base models that pods download",
    ),
    "a base model from two places": (
        {"baseModel": {"uri": "s3://models/llama", "from": {"fineTuneJob": {"name": "tone"}}}},
        "baseModel must have exactly one of uri and from: keep one and remove the other",
    ),
    "an equivalent base model that is no fingerprint": (
        {"equivalentTo": "llama"},
        "a fingerprint is sha256: and 64 hex digits, as in status.baseModelFingerprint of a ServingPool",
    ),
    "no base model": ({"baseModel": {}}, "baseModel must have exactly one of uri and from"),
    "a job's model with a Secret": (
        {"baseModel": {"from": {"fineTuneJob": {"name": "tone"}}, "secretRef": {"name": "mine"}}},
        "the result of a FineTuneJob is read with the credentials of the store",
    ),
    "a cache without a claim": ({"baseModelCache": {}}, "spec.baseModelCache.claimName: Required value"),
    "a cache on the node's own path": (
        {"baseModelCache": {"hostPath": "/var/models"}},
        'unknown field "spec.baseModelCache.hostPath"',
    ),
    "negative replicas": ({"replicas": -1}, "spec.replicas in body should be greater than or equal to 0"),
    "unknown admission": (
        {"allowedNamespaces": {"from": "Some"}},
        'spec.allowedNamespaces.from: Unsupported value: "Some": supported values: "Same", "All", "Selector"',
    ),
    "a selector that is missing": (
        {"allowedNamespaces": {"from": "Selector"}},
        "allowedNamespaces.selector and from: Selector require each other: set both, or remove the selector",
    ),
    "a selector that nothing uses": (
        {"allowedNamespaces": {"selector": {"matchLabels": {"tier": "paid"}}}},
        "allowedNamespaces.selector and from: Selector require each other: set both, or remove the selector",
    ),
    "a requirement without values": (
        {"allowedNamespaces": {"from": "Selector", "selector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}},
        "In and NotIn require values, Exists and DoesNotExist must not have any: change operator or values",
    ),
}


@pytest.mark.parametrize("case", REFUSED_POOLS)
def test_serving_pool_is_refused_with_a_sentence(apiserver: ApiServer, case: str) -> None:
    changes, sentence = REFUSED_POOLS[case]
    assert_refused(apiserver, pool("default", **changes), sentence)


def test_pool_keeps_its_base_and_its_name(apiserver: ApiServer, namespace: str) -> None:
    apiserver.apply(pool(namespace))
    sentence = "baseModel is immutable, because adapters belong to it: create another ServingPool"
    assert_refused(apiserver, pool(namespace, baseModel__uri="s3://models/other"), sentence)
    sentence = "modelName is immutable, because clients use it: create another ServingPool"
    assert_refused(apiserver, pool(namespace, modelName="other"), sentence)
    engine = {"maxLoras": 4, "maxAdapters": 512, "adapterMemory": "2Gi"}
    apiserver.apply(pool(namespace, replicas=2, engine=engine, drainSeconds=10))


def test_free_arguments_and_variables_are_taken(apiserver: ApiServer, namespace: str) -> None:
    engine = {
        "args": ["--max-num-seqs=8", "--model-impl=vllm", "--cudagraph-capture-sizes", "1", "2", "--seed", "-1"],
        "env": [{"name": "VLLM_LOGGING_LEVEL", "value": "INFO"}, {"name": "HOMEPAGE"}],
        "kvCacheMemory": "512Mi",
    }
    apiserver.apply(pool(namespace, engine=engine))
    assert apiserver.get("spool", "small", "-n", namespace)["spec"]["engine"]["args"] == engine["args"]


def test_minimal_pool_and_adapter_get_the_defaults(apiserver: ApiServer, namespace: str) -> None:
    apiserver.apply(pool(namespace, autoscaling={"maxReplicas": 3}))
    spec = apiserver.get("spool", "small", "-n", namespace)["spec"]
    assert spec["replicas"] == 1
    assert spec["drainSeconds"] == 60
    assert spec["allowedNamespaces"] == {"from": "Same"}
    assert spec["engine"] == {"maxLoras": 8, "maxLoraRank": 64, "dataType": "auto"}
    assert spec["autoscaling"] == {
        "minReplicas": 1,
        "maxReplicas": 3,
        "targetConcurrency": 16,
        "scaleDownDelaySeconds": 120,
        "idleSeconds": 300,
    }
    apiserver.apply(adapter(namespace))
    spec = apiserver.get("adep", "tone", "-n", namespace)["spec"]
    assert spec == {"adapterFrom": {"fineTuneJob": {"name": "tone"}}, "replicas": 1, "parity": "Report"}


REFUSED_ADAPTERS = {
    "no source": ({"adapterFrom": {}}, "adapterFrom must have exactly one of fineTuneJob and artifact"),
    "two sources": (
        {"adapterFrom": {"fineTuneJob": {"name": "tone"}, "artifact": {"uri": "s3://bucket/adapter"}}},
        "adapterFrom must have exactly one of fineTuneJob and artifact",
    ),
    "a local adapter": (
        {"adapterFrom": {"fineTuneJob": None, "artifact": {"uri": "file:///adapter"}}},
        "file:// uris work only in a local run",
    ),
    "replicas beside autoscaling": ({"replicas": 3, "autoscaling": {"maxReplicas": 4}}, AUTOSCALED),
    "more at least than at most": (
        {"autoscaling": {"minReplicas": 3, "maxReplicas": 2}},
        "autoscaling.minReplicas must not be above autoscaling.maxReplicas",
    ),
    "no replicas": ({"replicas": 0}, "spec.replicas in body should be greater than or equal to 1"),
    "a space in the model's name": (
        {"modelName": "my model"},
        "a model name has letters, digits, '-', '.' and '_', and begins and ends with a letter or digit",
    ),
}


@pytest.mark.parametrize("case", REFUSED_ADAPTERS)
def test_adapter_deployment_is_refused_with_a_sentence(apiserver: ApiServer, case: str) -> None:
    changes, sentence = REFUSED_ADAPTERS[case]
    assert_refused(apiserver, adapter("default", **changes), sentence)


@pytest.mark.parametrize(
    ("build", "resource"), [(pool, "spool/small"), (adapter, "adep/tone")], ids=["pool", "adapter"]
)
class TestReplicasAndAutoscaling:
    """kubectl scale works where replicas decides, and is refused where autoscaling does."""

    def test_scale_by_hand(self, apiserver: ApiServer, namespace: str, build: Build, resource: str) -> None:
        apiserver.apply(build(namespace))
        done = apiserver.kubectl("scale", resource, "--replicas=3", "-n", namespace)
        assert done.returncode == 0, done.stderr
        assert apiserver.get(resource, "-n", namespace)["spec"]["replicas"] == 3

    def test_scale_is_refused_with_autoscaling(
        self, apiserver: ApiServer, namespace: str, build: Build, resource: str
    ) -> None:
        apiserver.apply(build(namespace, autoscaling={"maxReplicas": 4}))
        done = apiserver.kubectl("scale", resource, "--replicas=2", "-n", namespace)
        assert done.returncode != 0
        assert AUTOSCALED in done.stderr
        assert_refused(apiserver, build(namespace, autoscaling={"maxReplicas": 4}, replicas=2), AUTOSCALED)
        assert apiserver.get(resource, "-n", namespace)["spec"]["replicas"] == 1

    def test_autoscaling_may_come_and_go(
        self, apiserver: ApiServer, namespace: str, build: Build, resource: str
    ) -> None:
        apiserver.apply(build(namespace))
        apiserver.kubectl("scale", resource, "--replicas=3", "-n", namespace)
        apiserver.apply(build(namespace, autoscaling={"maxReplicas": 4}))
        assert apiserver.get(resource, "-n", namespace)["spec"]["replicas"] == 3
        for count in ("1", "2"):
            done = apiserver.kubectl("scale", resource, f"--replicas={count}", "-n", namespace)
            assert AUTOSCALED in done.stderr
        apiserver.apply(build(namespace, autoscaling={"maxReplicas": 5}))  # its own fields may change
        apiserver.apply(build(namespace))
        done = apiserver.kubectl("scale", resource, "--replicas=2", "-n", namespace)
        assert done.returncode == 0, done.stderr

    def test_a_default_replicas_may_come_with_autoscaling(
        self, apiserver: ApiServer, namespace: str, build: Build, resource: str
    ) -> None:
        apiserver.apply(build(namespace, replicas=3))
        done = apiserver.kubectl("replace", "-f", "-", manifest=build(namespace, autoscaling={"maxReplicas": 4}))
        assert done.returncode == 0, done.stderr
        assert apiserver.get(resource, "-n", namespace)["spec"]["replicas"] == 1

    def test_scale_shows_status(self, apiserver: ApiServer, namespace: str, build: Build, resource: str) -> None:
        apiserver.apply(build(namespace))
        patch_status(apiserver, namespace, resource, '{"status": {"replicas": 2, "selector": "a=b"}}')
        kind, name = resource.split("/")
        plural = {"spool": "servingpools", "adep": "adapterdeployments"}[kind]
        path = f"/apis/{API}/namespaces/{namespace}/{plural}/{name}/scale"
        scale = json.loads(apiserver.kubectl("get", f"--raw={path}").stdout)
        assert scale["spec"] == {"replicas": 1}
        assert scale["status"] == {"replicas": 2, "selector": "a=b"}


def patch_status(apiserver: ApiServer, namespace: str, resource: str, patch: str) -> None:
    done = apiserver.kubectl("patch", resource, "-n", namespace, "--subresource=status", "--type=merge", "-p", patch)
    assert done.returncode == 0, done.stderr


STATUSES = {
    "ftj": """{"status": {"phase": "Validating", "reason": "StoreUnavailable",
        "progress": {"stage": "Training", "step": 12345, "totalSteps": 12345,
        "loss": 12.3456, "evaluationLoss": 11.2345, "etaSeconds": 3600}, "gpuSeconds": 123456.7,
        "artifact": {"uri": "s3://tunesmith/store/team/tone-123/artifact", "digest": "sha256:%s", "sizeBytes": 1,
        "servable": {"vllm": true}}, "attempts": [{"name": "a-1", "outcome": "Failed", "node": "node-1"},
        {"name": "a-2", "outcome": "Succeeded", "node": "node-2"}]}}"""
    % ("a" * 64),
    "spool": """{"status": {"phase": "Available", "reason": "ContainerConfigError",
        "readyReplicas": 10, "desiredReplicas": 12, "ready": "10/12", "activeAdapters": 1234}}""",
    "adep": """{"status": {"phase": "Waiting", "reason": "FineTuneJobNotFound",
        "readyReplicas": 10, "desiredReplicas": 12,
        "pool": {"name": "a-pool-of-20-letters"}}}""",
}


@pytest.mark.parametrize(
    ("build", "short", "shown"),
    [
        (job, "ftj", ["Validating", "StoreUnavailable", "12345", "12.3456"]),
        (pool, "spool", ["Available", "ContainerConfigError", "10/12", "1234"]),
        (adapter, "adep", ["Waiting", "FineTuneJobNotFound", "10", "12"]),
    ],
    ids=["ftj", "spool", "adep"],
)
def test_get_fits_80_columns(apiserver: ApiServer, namespace: str, build: Build, short: str, shown: list[str]) -> None:
    name = "a-name-of-20-letters"
    apiserver.apply(build(namespace, name=name))
    patch_status(apiserver, namespace, f"{short}/{name}", STATUSES[short])
    printed = apiserver.kubectl("get", short, "-n", namespace).stdout
    room = len("2d23h") - len("0s")  # the widest age
    assert max(len(line.rstrip()) for line in printed.splitlines()) + room <= 80, printed
    assert all(word in printed for word in shown), printed


def test_wide_shows_where(apiserver: ApiServer, namespace: str) -> None:
    apiserver.apply(job(namespace))
    patch_status(apiserver, namespace, "ftj/tone", STATUSES["ftj"])
    printed = apiserver.kubectl("get", "ftj", "-n", namespace, "-o", "wide").stdout
    assert "s3://tunesmith/store/team/tone-123/artifact" in printed
    assert "11.2345" in printed
    assert "node-2" in printed
    assert "node-1" not in printed


def test_status_is_a_subresource(apiserver: ApiServer, namespace: str) -> None:
    apiserver.apply(job(namespace) | {"status": {"phase": "Complete"}})
    assert "status" not in apiserver.get("ftj", "tone", "-n", namespace)


def test_category_lists_all_kinds(apiserver: ApiServer, namespace: str) -> None:
    for document in (job(namespace), pool(namespace), adapter(namespace)):
        apiserver.apply(document)
    printed = apiserver.kubectl("get", "tunesmith", "-n", namespace, "-o", "name").stdout.split()
    assert sorted(printed) == [
        "adapterdeployment.tunesmith.dev/tone",
        "finetunejob.tunesmith.dev/tone",
        "servingpool.tunesmith.dev/small",
    ]


def test_explain_describes_fields(apiserver: ApiServer) -> None:
    done = apiserver.kubectl("explain", "ftj.spec.method.lora.rank")
    assert "Rank of the update matrices." in done.stdout
