"""The operator's flags, their variables and the sentences about wrong ones."""

from __future__ import annotations

import pytest

from tunesmith.contracts.scheduling import AllowedScheduling
from tunesmith.controller.settings import OperatorSettings
from tunesmith.settings import read

REQUIRED = (
    *("--store=s3://bucket/store/", "--namespace=system"),
    *("--trainer-image=t", "--agent-image=a", "--engine-image=e"),
)


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SystemExit) as error:
        read(OperatorSettings, flags)
    assert error.value.code == 2
    return capsys.readouterr().err


def test_flags_lists_and_defaults() -> None:
    settings = read(
        OperatorSettings,
        [
            *REQUIRED,
            *("--watch-namespaces", "team-a, team-b", "--allowed-addresses=10.0.0.7/32,fd00::/8"),
            *("--allowed-priority-classes=batch,team-*", "--allowed-tolerations=", "--adapter-storage=8Gi"),
            *("--metrics-from=[]", "--no-network-policies", "--log-level=debug"),
        ],
    )
    assert settings.store == "s3://bucket/store"
    assert settings.watch_namespaces == ("team-a", "team-b")
    assert settings.shared_namespaces == ("system",)
    assert settings.allowed_addresses == ("10.0.0.7/32", "fd00::/8")
    assert settings.allowed_priority_classes == ("batch", "team-*")
    assert settings.allowed_tolerations == ()
    assert settings.allowed_runtime_classes == AllowedScheduling().allowed_runtime_classes
    assert (settings.adapter_storage, settings.base_model_storage, settings.max_adapter_ratio) == ("8Gi", "500Gi", 4)
    assert (settings.network_policies, settings.require_metrics_token, settings.log_level) == (False, True, "DEBUG")
    assert settings.identity != read(OperatorSettings, REQUIRED).identity


def test_a_variable_is_used_if_the_flag_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WATCH_NAMESPACES", "a,b"), ("NETWORK_POLICIES", "false"), ("JOB_STORAGE", "1Gi")):
        monkeypatch.setenv(f"TUNESMITH_{name}", value)
    settings = read(OperatorSettings, [*REQUIRED, "--job-storage=2Gi"])
    assert (settings.watch_namespaces, settings.network_policies, settings.job_storage) == (("a", "b"), False, "2Gi")


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--adapter-storage=8G", "--adapter-storage (chart value serving.adapterStorage): '8G' is not a size such as"),
        (
            "--max-adapter-ratio=0",
            "--max-adapter-ratio (chart value serving.maxAdapterRatio): '0' must be greater than",
        ),
        (
            "--max-adapter-ratio=inf",
            "--max-adapter-ratio (chart value serving.maxAdapterRatio): 'inf' must be a finite",
        ),
        ("--max-adapter-ratio=much", "'much' must be a valid number"),
        (
            "--allowed-addresses=10.0.0.7/8",
            "(chart value trainer.allowedAddresses): '10.0.0.7/8' is not a network such as",
        ),
        ("--allowed-tolerations=a=b=c", "(chart value scheduling.allowedTolerations): 'a=b=c' is not key, key=value"),
        ("--allowed-runtime-classes=a b", "(chart value scheduling.allowedRuntimeClasses): 'a b' is not a name"),
        ("--watch-namespaces=Team_A", "(chart value watchNamespaces): 'Team_A' is not a valid name of a namespace"),
        ("--metrics-from={}", "(chart value networkPolicy.metricsFrom): {} is not a JSON list of NetworkPolicy peers"),
        (
            "--image-pull-policy=Sometimes",
            "(chart value images.pullPolicy): 'Sometimes' must be 'Always', 'IfNotPresent'",
        ),
        ("--lm-eval-tasks=tasks", "(chart value trainer.lmEvalTasks): 'tasks' is not an absolute path"),
        ("--lease-seconds=-1", "--lease-seconds (chart value operator.leaseSeconds): '-1' must be greater than 0"),
        ("--workers=0", "--workers: '0' must be greater than or equal to 1"),
        ("--allow-task-folders=perhaps", "--allow-task-folders"),
        ("--job-storag=1Gi", "unrecognized arguments: --job-storag=1Gi"),
    ],
)
def test_a_wrong_value_is_refused_with_its_flag_and_the_charts_value(
    capsys: pytest.CaptureFixture[str], flag: str, sentence: str
) -> None:
    assert sentence in refused(capsys, *REQUIRED, flag)


def test_all_errors_are_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "--namespace=system", "--workers=none")
    assert "--store (chart value store) is missing" in message
    assert "--trainer-image (chart value images.trainer) is missing" in message
    assert "--workers: 'none' must be a valid integer" in message


def test_help_names_the_chart_value_the_variables_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        read(OperatorSettings, ["--help"])
    assert error.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 4; chart: serving.maxAdapterRatio)" in text
    assert "TUNESMITH_LOG_LEVEL" in text
    assert "(default: nvidia.com/gpu,amd.com/gpu; chart:" in text
    assert f"Example: tunesmith-operator {OperatorSettings.example}" in text


def test_the_example_of_the_help_is_a_complete_call() -> None:
    assert read(OperatorSettings, OperatorSettings.example.split()).namespace == "tunesmith-system"
