from __future__ import annotations

import csv
import json
import signal
import socket
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from mlflow import MlflowClient

from tests.trainer.pods import pods
from tests.trainer.trackers import events, mlflow_server, wandb_records
from tunesmith.api.conditions import FailureReason
from tunesmith.api.credentials import REPORTING_SECRET
from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.api.output import Tracker
from tunesmith.contracts.environment import ALLOWED_ADDRESSES
from tunesmith.contracts.result import Outcome
from tunesmith_trainer.manifest import spec_digest
from tunesmith_trainer.reporting.curve import CurvePoint
from tunesmith_trainer.reporting.mlflow_server import RUN_TAG
from tunesmith_trainer.reporting.reporter import Reporter, parameters_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mlflow.entities import Run

    from tests.trainer.s3server import S3Server
    from tests.trainer.trainer_rig import Workbench

SECONDS = 120.0


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as address:
        yield address


def curve(first: int, last: int) -> list[CurvePoint]:
    return [CurvePoint(step, step / 10, 2 / step, 0.01, 0.5, 100 * step) for step in range(first, last + 1)]


def reporter(folder: Path, settings: Mapping[Tracker, Mapping[str, str]], *, guarded: bool = False) -> Reporter:
    """Return a started reporter."""
    made = Reporter(settings, folder / "reporting", folder / "tensorboard")
    made.start(run="8f3c", name="team/doors", parameters={"method.lora.rank": "4"}, guarded=guarded, store=None)
    return made


def two_attempts(folder: Path, settings: Mapping[Tracker, Mapping[str, str]]) -> None:
    """Run two attempts: the first is stopped after step 6, with a checkpoint of step 4; the second finishes 8 steps."""
    before = CurvePoint(0, 0.0, evaluation_loss=3.0)
    first = reporter(folder, settings)
    for point in (before, *curve(1, 6)):
        first.add(point, tokens_per_second=50.0)
    assert first.close(Outcome.PREEMPTED, {}, SECONDS) is None
    second = reporter(folder, settings)
    second.add(before)
    second.replay([before, *curve(1, 4)])
    for point in curve(5, 8):
        second.add(point, tokens_per_second=50.0)
    second.add(CurvePoint(8, 0.8, evaluation_loss=1.5))
    assert second.close(Outcome.SUCCEEDED, {"evaluationLoss": 1.5, "colours/ExactMatch": 0.75}, SECONDS) is None


def the_run(address: str, identity: str, experiment: str = "tunesmith") -> Run:
    client = MlflowClient(address)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id], f"tags.`{RUN_TAG}` = '{identity}'")
    return run


def history(address: str, run: Run, name: str) -> list[tuple[int, float]]:
    metrics = MlflowClient(address).get_metric_history(run.info.run_id, name)
    return sorted((metric.step, metric.value) for metric in metrics)


def test_tensorboard_shows_each_step_once_over_attempts(tmp_path: Path) -> None:
    two_attempts(tmp_path, {Tracker.TENSORBOARD: {}})
    shown = events(tmp_path / "tensorboard")
    losses = [(event.step, event.value) for event in shown.Scalars("loss")]
    assert losses == [(step, pytest.approx(2 / step)) for step in range(1, 9)]
    assert [(event.step, event.value) for event in shown.Scalars("evaluationLoss")] == [(0, 3.0), (8, 1.5)]
    assert [event.value for event in shown.Scalars("final/colours/ExactMatch")] == [0.75]
    (table,) = shown.Tensors("parameters")
    assert b"| method.lora.rank | 4 |" in table.tensor_proto.string_val[0]


def test_mlflow_has_one_run_with_each_step_once_over_attempts(tmp_path: Path, mlflow: str) -> None:
    two_attempts(tmp_path, {Tracker.MLFLOW: {"MLFLOW_TRACKING_URI": mlflow, "MLFLOW_EXPERIMENT_NAME": "doors"}})
    run = the_run(mlflow, "8f3c", "doors")
    assert (run.info.run_name, run.info.status) == ("team/doors", "FINISHED")
    assert history(mlflow, run, "loss") == [(step, 2 / step) for step in range(1, 9)]
    assert history(mlflow, run, "evaluationLoss") == [(0, 3.0), (8, 1.5)]
    for name in ("learningRate", "gradientNorm", "tokensPerSecond", "tokens", "epoch"):
        assert run.data.metrics[name] > 0
    assert run.data.metrics["final/colours/ExactMatch"] == 0.75
    assert run.data.params == {"method.lora.rank": "4"}


def test_wandb_has_one_run_with_each_step_once_over_attempts(tmp_path: Path) -> None:
    """Offline: whether the server continues the run with this id depends on W&B, and is not tested here."""
    made = reporter(tmp_path, {Tracker.WANDB: {"WANDB_MODE": "offline", "WANDB_PROJECT": "colours"}})
    for point in (CurvePoint(0, 0.0, evaluation_loss=3.0), *curve(1, 5), CurvePoint(5, 0.5, evaluation_loss=1.5)):
        made.add(point)
    assert made.close(Outcome.SUCCEEDED, {"evaluationLoss": 1.5}, SECONDS) is None
    records = wandb_records(tmp_path / "reporting/wandb")
    (run, *_) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.display_name, run.project) == ("8f3c", "team/doors", "colours")
    assert {update.key: json.loads(update.value_json) for update in run.config.update}["method.lora.rank"] == "4"
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["loss"] for row in rows[1:]] == [pytest.approx(2 / step) for step in range(1, 6)]
    assert (rows[0]["evaluationLoss"], rows[5]["evaluationLoss"]) == (3.0, 1.5)
    assert not any(record.WhichOneof("record_type") in {"output", "output_raw", "stats"} for record in records)


def test_points_of_an_outage_are_sent_after_it(tmp_path: Path, mlflow: str) -> None:
    settings = {"MLFLOW_TRACKING_URI": mlflow, "MLFLOW_EXPERIMENT_NAME": "outage"}
    down = reporter(tmp_path, {Tracker.MLFLOW: settings | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}})
    for point in curve(1, 3):
        down.add(point)
    assert down.close(Outcome.PREEMPTED, {}, 1.0) is not None
    up = reporter(tmp_path, {Tracker.MLFLOW: settings})
    up.replay(curve(1, 3))
    assert up.close(Outcome.SUCCEEDED, {}, SECONDS) is None
    run = the_run(mlflow, "8f3c", "outage")
    assert [step for step, _ in history(mlflow, run, "loss")] == [1, 2, 3]


@pytest.mark.parametrize("answers", [False, True], ids=["that hangs", "that refuses"])
def test_a_failing_tracker_does_not_delay_training_and_its_password_is_not_shown(
    tmp_path: Path, *, answers: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if answers:
            server.close()
        address = f"http://user:sesame@127.0.0.1:{port}"
        made = reporter(tmp_path, {Tracker.MLFLOW: {"MLFLOW_TRACKING_URI": address, "MLFLOW_TRACKING_TOKEN": "sesame"}})
        for point in curve(1, 5000):
            made.add(point)
        missed = made.close(Outcome.SUCCEEDED, {}, SECONDS if answers else 1.0)
    assert missed is not None
    assert missed.startswith("not all steps were reported to MLflow (")
    if answers:
        assert "Connection refused" in missed
    assert "sesame" not in missed
    assert not any(b"sesame" in file.read_bytes() for file in (tmp_path / "reporting").rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("address", "more"),
    [
        ("http://169.254.169.254", {}),
        ("http://localhost:9", {"WANDB_MODE": "online"}),
        ("http://localhost:9", {"WANDB_MODE": "shared"}),
        ("http://169.254.169.254", {"WANDB_MODE": "run"}),
    ],
)
def test_a_job_in_a_cluster_does_not_report_to_a_refused_wandb_server(
    tmp_path: Path, address: str, more: dict[str, str]
) -> None:
    settings = {"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": address, **more}
    made = reporter(tmp_path, {Tracker.WANDB: settings}, guarded=True)
    missed = made.close(Outcome.SUCCEEDED, {}, SECONDS)
    assert missed is not None
    assert "which jobs and pools may not reach: correct the address" in missed


def test_a_job_in_a_cluster_reports_to_wandb(tmp_path: Path) -> None:
    """The guard allows W&B's library to connect to its own process."""
    made = reporter(tmp_path, {Tracker.WANDB: {"WANDB_MODE": "offline"}}, guarded=True)
    made.add(CurvePoint(1, 0.1, 2.0, 0.01, 0.5, 100))
    assert made.close(Outcome.SUCCEEDED, {}, SECONDS) is None
    records = wandb_records(tmp_path / "reporting/wandb")
    assert any(record.WhichOneof("record_type") == "history" for record in records)


@pytest.mark.parametrize("listed", ["10.0.0.0/8", "127.0.0.1/32"])
def test_a_job_in_a_cluster_reports_only_to_allowed_addresses(
    tmp_path: Path, mlflow: str, monkeypatch: pytest.MonkeyPatch, listed: str
) -> None:
    monkeypatch.setenv(ALLOWED_ADDRESSES, listed)
    made = reporter(tmp_path, {Tracker.MLFLOW: {"MLFLOW_TRACKING_URI": mlflow}}, guarded=True)
    missed = made.close(Outcome.SUCCEEDED, {}, SECONDS)
    if listed == "127.0.0.1/32":
        assert missed is None
    else:
        assert missed is not None
        assert (
            "(its address resolves to 127.0.0.1, an address of the pod itself, which jobs and pools may not reach: "
            "correct" in missed
        )


@pytest.mark.parametrize(
    ("secret", "message"),
    [
        (None, f"the Secret {REPORTING_SECRET} does not exist in this namespace"),
        ({"MLFLOW_TRACKING_URI": "http://mlflow.team:5000"}, "has no key WANDB_API_KEY"),
        ({"MLFLOW_TRACKING_URI": "file:///etc", "WANDB_API_KEY": "sesame"}, "MLFLOW_TRACKING_URI in the Secret"),
    ],
)
def test_a_missing_or_wrong_secret_is_reported_first(
    tmp_path: Path, bench: Workbench, secret: dict[str, str] | None, message: str
) -> None:
    for name, value in (secret or {}).items():
        (tmp_path / "secrets" / REPORTING_SECRET).mkdir(parents=True, exist_ok=True)
        (tmp_path / "secrets" / REPORTING_SECRET / name).write_text(value)
    job = bench.job(output={"reporting": ["MLflow", "WandB"]})
    ran = bench.run("validate", job, "--secrets", str(tmp_path / "secrets"), allow_file=False)
    assert ran.code == 2
    assert ran.result.reason in {FailureReason.SECRET_NOT_FOUND, FailureReason.INVALID_SPEC}
    assert message in ran.result.message
    assert "sesame" not in ran.result.message


def manifest(**output: Any) -> FineTuneJob:
    spec = {"baseModel": {"uri": "hf://org/model"}, "dataset": {"train": [{"uri": "s3://data/rows.jsonl"}]}}
    spec |= {"method": {"lora": {"rank": 8}}, "output": output} if output else {"method": {"lora": {"rank": 8}}}
    head = {"apiVersion": "tunesmith.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "doors"}}
    return FineTuneJob.model_validate(head | {"spec": spec})


def test_reporting_does_not_change_what_is_trained() -> None:
    assert spec_digest(manifest(reporting=["TensorBoard"])) == spec_digest(manifest())
    assert spec_digest(manifest(merge="Original")) != spec_digest(manifest())


def test_a_local_run_reports_to_mlflow_and_tensorboard(
    bench: Workbench, mlflow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "local")
    monkeypatch.setattr("tunesmith_trainer.main.CLOSING_SECONDS", SECONDS)
    ran = bench.run("train", bench.job(output={"reporting": ["TensorBoard", "MLflow"]}))
    assert ran.code == 0, ran.lines
    assert "not all steps" not in ran.result.message
    with (bench.output / "metrics.csv").open() as file:
        expected = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file) if row["loss"]]
    run = the_run(mlflow, (bench.output / "run-id").read_text().strip(), "local")
    assert run.info.run_name == "default/doors"
    assert history(mlflow, run, "loss") == expected
    assert run.data.metrics["final/evaluationLoss"] == ran.result.metrics["evaluationLoss"]
    assert run.data.metrics["memoryBytes"] > 0
    assert run.data.params["resolved.learningRate"] == "0.01"
    assert run.data.params["method.lora.rank"] == "4"
    shown = events(bench.output / "tensorboard")
    assert [event.step for event in shown.Scalars("loss")] == [1, 2, 3]
    assert ran.result.resolved is not None
    job = FineTuneJob.model_validate(yaml.safe_load((bench.folder / "job.yaml").read_text()))
    assert run.data.params == parameters_of(job, ran.result.resolved)


def test_only_the_first_rank_reports_and_the_next_attempt_continues_its_run(tmp_path: Path, base_model: Path) -> None:
    run = pods(tmp_path, base_model, 2, output={"reporting": ["TensorBoard"]})
    run.start()
    run.interrupt((0, 1), signal.SIGTERM, 3)
    run.wait()
    run.finish()
    assert len(list((run.output / "tensorboard").iterdir())) == 1
    shown = events(run.output / "tensorboard")
    assert [event.step for event in shown.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in shown.Scalars("evaluationLoss")] == [0, 2, 4, 6]


def test_event_files_are_beside_the_artifact_in_the_store(
    tmp_path: Path, bench: Workbench, s3_environment: S3Server
) -> None:
    job = bench.job(output={"reporting": ["TensorBoard"]})
    ran = bench.run("train", job, output="s3://tunesmith/reporting/artifact")
    assert ran.code == 0, ran.lines
    assert "not all steps" not in ran.result.message
    copied = tmp_path / "copied"
    s3_environment.filesystem().get("tunesmith/reporting/tensorboard/", f"{copied}/", recursive=True)
    assert [event.step for event in events(copied).Scalars("loss")] == [1, 2, 3]
    assert not any("tfevents" in name for name in s3_environment.filesystem().ls("tunesmith/reporting/artifact"))
