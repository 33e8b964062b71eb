"""The objects of pools as YAML, in `golden/`. With UPDATE_GOLDEN=1 in the environment they are written again."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tunesmith.api.engine_arguments import reserved_argument, reserved_variable
from tunesmith.contracts.environment import (
    ADAPTER_MEMORY,
    ADMIN_TOKEN_FILE,
    AGENT_URL,
    POD_UID,
    REQUESTS,
    SERVING_KEY_FILE,
)
from tunesmith.contracts.network import NetworkPolicySettings
from tunesmith.serving.render import (
    deployment,
    disruption_budget,
    isolation,
    key_secret,
    reserved,
    selector_text,
)
from tunesmith.serving.settings import PoolSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.api.servingpool import ServingPool

GOLDEN = Path(__file__).parent / "golden"
REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = PoolSettings(
    agent_image="registry/agent@sha256:1",
    engine_image="registry/vllm@sha256:2",
    store="s3://tunesmith/store",
    allowed_addresses=("10.0.0.7/32",),
    adapter_storage="16Gi",
    base_model_storage="512Gi",
    max_adapter_ratio=10.0,
)
CASES: dict[str, dict[str, Any]] = {
    "cpu": {
        "resources": {"gpus": 0, "cpu": "1", "memory": "4Gi"},
        "engine": {
            "maxLoras": 4,
            "maxLoraRank": 16,
            "maxModelLength": 512,
            "dataType": "float32",
            "kvCacheMemory": "256Mi",
        },
        "drainSeconds": 20,
    },
    "gpu": {
        "baseModel": {"uri": "hf://org/name", "revision": "main", "secretRef": {"name": "hub"}},
        "resources": {"gpus": 2, "cpu": "8", "memory": "64Gi"},
        "engine": {
            "image": "vllm/vllm-openai:v0.32.0",
            "args": ["--gpu-memory-utilization=0.8"],
            "env": [{"name": "VLLM_LOGGING_LEVEL", "value": "DEBUG"}],
        },
        "scheduling": {
            "nodeSelector": {"pool": "gpu"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "priorityClassName": "serving",
            "runtimeClassName": "nvidia",
        },
    },
    "cache": {
        "baseModel": {"uri": "hf://org/name"},
        "baseModelCache": {"claimName": "models", "maxSize": "2048Gi"},
    },
    "image": {"baseModel": {"uri": "oci://registry.example:5000/models/llama:1.0/8b/instruct"}},
    "claim": {"baseModel": {"uri": "pvc://models/llama/8b"}},
}


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, _: object) -> bool:
        return True


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str, pool: Callable[..., ServingPool]) -> None:
    resource = pool("base", **CASES[case])
    built = [
        deployment(resource, SETTINGS, 2),
        key_secret(resource, {"control": b"the-control-key", "events": b"the-events-key"}),
        disruption_budget(resource),
        isolation(resource, NetworkPolicySettings(namespace="tunesmith-system", instance="tunesmith")),
    ]
    text = yaml.dump_all(built, Dumper=_NoAliases, sort_keys=False, width=120)
    place = GOLDEN / f"{case}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        place.write_text(text)
    assert text == place.read_text(), "UPDATE_GOLDEN=1 writes it again"


@pytest.mark.parametrize("case", CASES)
def test_every_container_passes_pod_security_restricted(case: str, pool: Callable[..., ServingPool]) -> None:
    spec = deployment(pool("base", **CASES[case]), SETTINGS, 1)["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in [*spec["initContainers"], *spec["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_each_container_gets_only_the_keys_that_it_needs(pool: Callable[..., ServingPool]) -> None:
    spec = deployment(pool("base", **CASES["gpu"]), SETTINGS, 1)["spec"]["template"]["spec"]
    entries = {
        volume["name"]: {item["key"] for item in volume["secret"]["items"]}
        for volume in spec["volumes"]
        if "items" in volume.get("secret", {})
    }
    found = {
        container["name"]: set().union(*(entries.get(mount["name"], ()) for mount in container["volumeMounts"]))
        for container in [*spec["initContainers"], *spec["containers"]]
    }
    assert found == {"base-model": set(), "agent": {"control", "events", "metrics"}, "engine": {"serving"}}


def test_the_engine_has_no_credentials_of_the_store(pool: Callable[..., ServingPool]) -> None:
    spec = deployment(pool("base", **CASES["gpu"]), SETTINGS, 1)["spec"]["template"]["spec"]
    engine = spec["containers"][0]
    assert "envFrom" not in engine
    assert "base-model-secret" not in {mount["name"] for mount in engine["volumeMounts"]}


@pytest.mark.parametrize("case", CASES)
def test_every_volume_and_container_has_a_storage_limit(case: str, pool: Callable[..., ServingPool]) -> None:
    spec = deployment(pool("base", **CASES[case]), SETTINGS, 1)["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume["emptyDir"] for volume in spec["volumes"] if "emptyDir" in volume}
    assert all(volume["sizeLimit"] for volume in volumes.values())
    on_disk = sum(int(volume["sizeLimit"]) for volume in volumes.values() if volume.get("medium") != "Memory")
    running = [container for container in spec["initContainers"] if container.get("restartPolicy")] + spec["containers"]
    limits = [int(container["resources"]["limits"]["ephemeral-storage"]) for container in running]
    # The kubelet evicts a pod whose volumes and logs exceed the sum. tmp-base-model is in use before the others.
    assert sum(limits) >= on_disk - int(volumes.get("tmp-base-model", {"sizeLimit": 0})["sizeLimit"])
    for container in [*spec["initContainers"], *spec["containers"]]:
        assert container["resources"]["requests"]["ephemeral-storage"] == "256Mi"


def test_keys_are_mounted_and_never_set_as_variables(pool: Callable[..., ServingPool]) -> None:
    for case, more in (("cpu", set()), ("gpu", {"hub"}), ("claim", set())):
        spec = deployment(pool("base", **CASES[case]), SETTINGS, 1)["spec"]["template"]["spec"]
        containers = [*spec["initContainers"], *spec["containers"]]
        assert not any("envFrom" in container for container in containers)
        names = {volume["secret"]["secretName"] for volume in spec["volumes"] if volume["name"].endswith("-secret")}
        assert names == {"tunesmith-store"} | more


def test_the_pods_match_the_selector(pool: Callable[..., ServingPool]) -> None:
    spec = deployment(pool(), SETTINGS, 1)["spec"]
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    assert selector_text(pool()) == "tunesmith.dev/pool=base,tunesmith.dev/pool-uid=uid-base"


def test_a_stopping_pod_has_time_to_drain(pool: Callable[..., ServingPool]) -> None:
    spec = deployment(pool(drainSeconds=20), SETTINGS, 1)["spec"]["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] == 50


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        ({}, None),
        ({"args": ["--enable-prefix-caching", "--seed=1"]}, None),
        (
            {"args": ["--middleware=rollout", "--port", "1"]},
            (
                "spec.engine.args[0]: --middleware is reserved: it is set by the pool, usually from a field of its "
                "spec. Remove it. spec.engine.args[1]: --port is reserved: the gateway and the agent reach the engine"
            ),
        ),
        *(
            ({"args": words}, f"spec.engine.args[0]: {name} ")
            for words, name in (
                (["--api_key=x"], "--api-key"),
                (["--host=::"], "--host"),
                (["--ho", "::"], "--ho"),
                (["--api-server-count=2"], "--api-server-count"),
                (["--api-k", "x"], "--api-k"),
                (["--config", "/x.yaml"], "--config"),
                (["--conf=/x.yaml"], "--conf"),
                (["--chat-template", "/x"], "--chat-template"),
                (["--no-enable-lora"], "--no-enable-lora"),
                (["--no_enable_l"], "--no-enable-l"),
                (["--max-lora", "1"], "--max-lora"),
                (["-tp=2"], "-tp"),
                (["-dp", "2"], "-dp"),
                (["-n2"], "-n2"),
                (["--root_path=/x"], "--root-path"),
                (["--load-format=dummy"], "--load-format"),
                (["--tokenizer=/other"], "--tokenizer"),
                (["--trust-remote-code"], "--trust-remote-code"),
                (["--kv_transfer_config.kv_role=kv_both"], "--kv-transfer-config"),
                (["--enable-log-re"], "--enable-log-re"),
                (["--"], "--"),
            )
        ),
        (
            {"args": ["--seed=1", "--trust-rem"]},
            (
                "spec.engine.args[1]: --trust-rem abbreviates --trust-remote-code, which is reserved: it runs code "
                "from outside the engine. Remove it."
            ),
        ),
        ({"args": ["foo"]}, "spec.engine.args[0]: it is not the value of an argument. Write --name=value"),
        ({"args": ["--seed=1", "foo"]}, "spec.engine.args[1]: it is not the value of an argument."),
        ({"args": ["--max-num-seqs 8"]}, "spec.engine.args[0]: the name of an argument must not contain spaces."),
        ({"args": ["--cudagraph-capture-sizes", "1", "2"]}, None),
        ({"args": ["--enable-auto-tool-choice", "--tool-call-parser=hermes"]}, None),
        ({"args": ["--sse-keep-alive-interval=15", "--max-num-seqs", "-1", "--seed=-1"]}, None),
        ({"args": ["--model-impl=vllm", "--tokenizer-mode=auto", "--quantization", "fp8", "--log-level=info"]}, None),
        *(
            ({"env": [{"name": name}]}, f"engine.env must not hold {name}: ")
            for name in ("PYTHONSTARTUP", "TUNESMITH_REQUESTS", "VLLM_PLUGINS", "VLLM_LORA_RESOLVER_CACHE_DIR")
        ),
        ({"env": [{"name": "VLLM_CPU_KVCACHE_SPACE", "value": "1"}, {"name": "LD_PRELOAD", "value": "/x.so"}]}, None),
        (
            {"env": [{"name": "PYTHONPATH", "value": "/x"}]},
            "engine.env must not hold PYTHONPATH: the pool sets or reserves them; remove them",
        ),
    ],
)
def test_settings_of_the_pool_cannot_be_overridden(
    engine: dict[str, Any], sentence: str | None, pool: Callable[..., ServingPool]
) -> None:
    found = reserved(pool(engine=engine))
    if sentence is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith(sentence)


def test_request_limits_are_passed_to_the_engine(pool: Callable[..., ServingPool]) -> None:
    def engine(**requests: Any) -> tuple[list[str], dict[str, Any]]:
        container = deployment(pool(requests=requests), SETTINGS, 1)["spec"]["template"]["spec"]["containers"][0]
        variables = {variable["name"]: variable.get("value", "") for variable in container["env"]}
        return container["args"], json.loads(variables["TUNESMITH_REQUESTS"])

    arguments, requests = engine()
    assert requests == {
        "allowPromptLogprobs": False,
        "allowMediaUrls": False,
        "allowChatTemplate": False,
        "maxChoices": 16,
    }
    assert "--trust-request-chat-template" not in arguments
    arguments, requests = engine(allowChatTemplate=True, maxTokens=64, maxChoices=2)
    assert (requests["allowChatTemplate"], requests["maxTokens"], requests["maxChoices"]) == (True, 64, 2)
    assert "--trust-request-chat-template" in arguments
    assert '{"max_new_tokens": 64}' in arguments


def test_the_middleware_and_the_supervisor_read_the_variables_that_the_operator_sets() -> None:
    """They import nothing but the standard library, so they have their names once more."""
    folder = REPOSITORY / "server-image/src/tunesmith_server/middleware"

    def variables(*modules: str) -> set[str]:
        sources = [(folder / f"tunesmith_{module}.py").read_text() for module in modules]
        return {name for source in sources for name in re.findall(r'"(TUNESMITH_[A-Z_]+)"', source)}

    assert variables("middleware") == {POD_UID, SERVING_KEY_FILE, ADMIN_TOKEN_FILE, REQUESTS, ADAPTER_MEMORY}
    assert variables("supervisor", "output", "reports") == {AGENT_URL, ADMIN_TOKEN_FILE}


@pytest.mark.parametrize("case", CASES)
def test_arguments_and_variables_that_the_pool_sets_are_reserved(case: str, pool: Callable[..., ServingPool]) -> None:
    given = pool(
        **{"baseModel": {"uri": "s3://models/base"}, "requests": {"maxTokens": 9, "allowChatTemplate": True}}
        | CASES[case]
    )
    spec = deployment(given, SETTINGS, 1)["spec"]["template"]["spec"]
    engine = next(container for container in spec["containers"] if container["name"] == "engine")
    own = engine["args"][: len(engine["args"]) - len(given.spec.engine.args or ())]
    names = {argument for argument in own if argument.startswith("--")}
    assert names
    assert {name for name in names if reserved_argument(name) is None} == set()
    users = {variable.name for variable in given.spec.engine.env or ()}
    assert {variable["name"] for variable in engine["env"] if not reserved_variable(variable["name"])} <= users


def test_the_agent_knows_which_base_models_are_equivalent(pool: Callable[..., ServingPool]) -> None:
    def agent_of(**spec: Any) -> list[str]:
        pod = deployment(pool(**spec), SETTINGS, 1)["spec"]["template"]["spec"]
        (agent,) = [container for container in pod["initContainers"] if container["name"] == "agent"]
        arguments: list[str] = agent["args"]
        return arguments

    trained = "sha256:" + "1" * 64
    arguments = agent_of(equivalentTo=trained)
    assert arguments[arguments.index("--equivalent-to") + 1] == trained
    assert "--equivalent-to" not in agent_of()
