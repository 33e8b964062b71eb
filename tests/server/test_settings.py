"""The agent's flags: those that the operator renders into pool pods, and the errors for wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.api.servingpool import ServingPool
from tunesmith.serving.render import deployment
from tunesmith.serving.settings import PoolSettings
from tunesmith.settings import read
from tunesmith_server.main import run
from tunesmith_server.settings import FetchBaseSettings, ServeSettings

POOL = ServingPool.model_validate(
    {
        "apiVersion": "tunesmith.dev/v1alpha1",
        "kind": "ServingPool",
        "metadata": {"name": "pool", "namespace": "team", "uid": "uid"},
        "spec": {
            "modelName": "base",
            "baseModel": {"uri": "hf://org/base", "revision": "main"},
            "engine": {"maxLoras": 2, "maxAdapters": 3, "maxLoraRank": 64},
            "drainSeconds": 7,
            "resources": {"gpus": 0, "cpu": "1", "memory": "4Gi"},
        },
    }
)
SETTINGS = PoolSettings(
    store="s3://bucket/store",
    agent_image="agent",
    engine_image="engine",
    allowed_addresses=("10.0.0.7/32", "fd00::/8"),
    adapter_storage="2Gi",
    base_model_storage="3Gi",
    max_adapter_ratio=2.5,
)


@pytest.fixture
def containers(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The arguments of the pod's init containers; their variables are set."""
    pod = deployment(POOL, SETTINGS, 1)["spec"]["template"]["spec"]
    for container in pod["initContainers"]:
        assert container["command"] == ["tunesmith-agent"]
        for variable in container["env"]:
            monkeypatch.setenv(variable["name"], variable.get("value", "the-pods-uid"))
    return {container["args"][0]: container["args"][1:] for container in pod["initContainers"]}


def test_the_flags_of_a_pool_pod_are_the_agents(containers: dict[str, list[str]]) -> None:
    settings = read(ServeSettings, containers["serve"])
    assert settings.pod_uid == "the-pods-uid"
    assert (settings.store, settings.storage, settings.max_adapter_ratio) == ("s3://bucket/store", 2 * 2**30, 2.5)
    assert (settings.max_adapters, settings.max_lora_rank, settings.drain_seconds) == (3, 64, 7)
    assert settings.allowed_addresses == ("10.0.0.7/32", "fd00::/8")
    assert settings.secret == Path("/etc/tunesmith/secrets/tunesmith-store")
    assert settings.hang_seconds > ServeSettings.model_fields["hang_seconds"].default
    assert settings.hang_seconds > settings.stall_seconds > ServeSettings.model_fields["stall_seconds"].default
    fetched = read(FetchBaseSettings, containers["fetch-base"])
    assert (fetched.uri, fetched.revision, fetched.storage) == ("hf://org/base", "main", 3 * 2**30)
    assert fetched.target == settings.base_model
    assert fetched.fingerprint_file == settings.base_fingerprint_file


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serve", "--storage=1", "--secret=/s", "--store=s3://b/s"], "--pod-uid is missing: set it, or the variable"),
        (["serve", "--max-adapters=many"], "--max-adapters: 'many' must be a valid integer"),
        (["serve", "--hang-seconds=0"], "--hang-seconds: '0' must be greater than 0"),
        (["serve", "--allowed-addresses=here"], "--allowed-addresses: 'here' is not a network such as"),
        (["fetch-base", "--storage=0"], "--storage: '0' must be greater than or equal to 1"),
        (["fetch-base", "--pod-uid=x"], "unrecognized arguments: --pod-uid=x"),
        (["serv"], "invalid choice: 'serv'"),
    ],
)
def test_a_wrong_flag_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as done:
        run(arguments)
    assert done.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("model", [ServeSettings, FetchBaseSettings])
def test_the_example_of_the_help_is_a_complete_call(model: type[ServeSettings | FetchBaseSettings]) -> None:
    read(model, model.example.split())
