"""Several processes train together, like the pods of a job on several nodes, with the same result as one process."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.trainer import pods as processes
from tests.trainer.chat_styles import share_prefixes
from tests.trainer.pods import Pods, assert_equal, pods
from tests.trainer.s3server import free_port
from tests.trainer.slow_save import with_a_slow_save
from tests.trainer.trainer_rig import chat_rows, write_rows
from tunesmith.api.placement import TrainingResources
from tunesmith.contracts.result import Outcome, TrainerResult
from tunesmith_trainer.process.ranks import PeersMissingError, Ranks, of_pod

if TYPE_CHECKING:
    from pathlib import Path


LAUNCH = """
import pathlib, sys
from tunesmith_trainer.process.launch import launch
from tunesmith_trainer.process.ranks import Ranks
command = [sys.executable, "-m", "tunesmith_trainer.main", *sys.argv[2:]]
print(launch(command, Ranks(size=2, port=0), 2, pathlib.Path(sys.argv[1])).model_dump_json())
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Pods:
    """Run one process until it has finished."""
    run = pods(tmp_path_factory.mktemp("alone"), base_model, 1)
    run.finish()
    return run


def test_two_nodes_give_the_result_of_one(tmp_path: Path, base_model: Path, alone: Pods) -> None:
    two = pods(tmp_path, base_model, 2)
    two.finish()
    assert_equal(two, alone)
    first, second = two.result(0), two.result(1)
    assert first.artifact is not None
    assert (second.outcome, second.artifact) == (Outcome.SUCCEEDED, None)
    assert second.message == "rank 1 of 2 has finished; rank 0 has the result"
    assert "step 6/6" in two.log(0)
    assert "step" not in two.log(1)


@pytest.mark.long
def test_two_nodes_share_prefixes_as_one_does(tmp_path: Path, base_model: Path) -> None:
    runs = [pods(tmp_path / str(nodes), base_model, nodes) for nodes in (2, 1)]
    for run in runs:
        share_prefixes(run.manifest)
        run.finish()
    assert_equal(*runs)


def test_the_first_of_two_scores_the_suites(tmp_path: Path, base_model: Path) -> None:
    data = write_rows(tmp_path / "questions.jsonl", chat_rows(2))
    suites = [
        {"name": "rows", "heldOutLoss": {}},
        {"name": "doors", "generation": {"dataset": {"uri": f"file://{data}"}, "maxNewTokens": 2}},
    ]
    gates = [{"suite": "doors", "metric": "ExactMatch", "max": 1}]
    two = pods(tmp_path, base_model, 2, evaluation={"suites": suites, "gates": gates})
    two.finish()
    first = two.result(0).evaluation
    assert first is not None
    assert [(score.suite, score.metric) for score in first.scores or []] == [("rows", "Loss"), ("doors", "ExactMatch")]
    assert [gate.passed for gate in first.gates or []] == [True]


@dataclass(frozen=True)
class Interruption:
    """A signal to some pods, a number of seconds after a step was reported."""

    number: signal.Signals
    pods: tuple[int, ...]
    step: int
    seconds: float = 0.0


def random_interruptions(seed: int) -> tuple[Interruption, ...]:
    chance = random.Random(seed)  # noqa: S311 - reproducible on purpose
    return tuple(
        Interruption(
            chance.choice([signal.SIGKILL, signal.SIGTERM]),
            chance.choice([(0,), (1,), (0, 1)]),
            chance.randint(1, 5),
            chance.random() * 0.3,
        )
        for _ in range(2)
    )


INTERRUPTIONS = [
    (Interruption(signal.SIGKILL, (1,), 3), Interruption(signal.SIGTERM, (1,), 3)),
    *(random_interruptions(seed) for seed in range(1, int(os.environ.get("TUNESMITH_RESUME_KILLS", "1")))),
]


@pytest.mark.parametrize("interruptions", INTERRUPTIONS, ids=range(len(INTERRUPTIONS)))
def test_pods_that_are_killed_or_stopped_resume_together(
    tmp_path: Path, base_model: Path, alone: Pods, interruptions: tuple[Interruption, ...]
) -> None:
    two = pods(tmp_path, base_model, 2)
    for interruption in interruptions:
        two.start()
        two.interrupt(interruption.pods, interruption.number, interruption.step, interruption.seconds)
        codes = two.wait()
        for index, code in enumerate(codes):
            if interruption.number == signal.SIGKILL and index in interruption.pods:
                assert code in {0, -signal.SIGKILL}
            else:
                # finished before; stopped; lost the other, which stopped first
                assert code in {0, 143, 3}, two.log(index)
                assert two.result(index).lost_peer is (code == 3)
        if codes[0] == 0:  # the signal came too late
            break
    two.finish()
    assert_equal(two, alone)


def test_a_signal_to_one_pod_saves_and_stops_all(tmp_path: Path, base_model: Path) -> None:
    two = pods(tmp_path, base_model, 2, checkpoint={"everyMinutes": 60})
    two.start()
    two.interrupt((1,), signal.SIGTERM, step=3)
    assert two.wait() == [143, 143], [two.log(0), two.log(1)]
    assert two.result(0).outcome is Outcome.PREEMPTED
    step = re.fullmatch(r"stopped with another rank at step (\d) of 6; the checkpoint .*", two.result(0).message)
    assert step is not None, two.result(0).message
    two.finish()
    assert two.result(0).resumed_from_step == int(step[1])


@pytest.mark.long
def test_a_large_checkpoint_may_take_longer_than_a_step(
    tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_command", with_a_slow_save)
    two = pods(tmp_path, base_model, 2, hyperparameters=FEW)
    two.finish()


@pytest.mark.long
def test_a_rank_that_waits_for_a_checkpoint_notices_the_loss_of_its_writer(
    tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_command", with_a_slow_save)
    two = pods(tmp_path, base_model, 2, hyperparameters=FEW)
    two.environment["SAVE_ENDS"] = "1"
    two.start()
    assert two.wait() == [-signal.SIGKILL, 3], two.log(1)
    assert two.result(1).lost_peer


FEW = {"maxSteps": 3, "batchSize": 6, "microBatchSize": 2, "learningRate": 0.01}
OTHERS: dict[str, dict[str, Any]] = {
    "qlora with recomputed activations": {
        "method": {"qlora": {"rank": 4, "alpha": 8}},
        "hyperparameters": FEW | {"gradientCheckpointing": True},
    },
    "compiled layers": {"hyperparameters": FEW | {"torchCompile": True}},
    "answers marked as good or bad": {
        "objective": {"kto": {}},
        "hyperparameters": FEW,
        "rows": [
            {
                "prompt": f"Door {number}?",
                "completion": f"It is {'blue' if number % 3 else 'green'}.",
                "label": number % 2 == 0,
            }
            for number in range(20)
        ],
    },
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if "compiled" in name else name for name in OTHERS]
)
def test_other_jobs_on_two_nodes(tmp_path: Path, base_model: Path, name: str) -> None:
    runs = [pods(tmp_path / str(nodes), base_model, nodes, **OTHERS[name]) for nodes in (1, 2)]
    for run in runs:
        run.finish()
    assert_equal(runs[1], runs[0])


@pytest.mark.long
def test_two_processes_of_one_pod_read_the_data_once(tmp_path: Path, alone: Pods) -> None:
    """As `gpus: 2` starts them, but on the CPU."""
    two = Pods(tmp_path, alone.manifest, 2)
    command = [sys.executable, "-c", LAUNCH, str(tmp_path), "train", "--job", str(two.manifest), "--allow-file"]
    command += ["--output", str(two.output), "--work", str(tmp_path / "work"), "--progress-port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=True)
    *lines, last = done.stdout.splitlines()
    result = TrainerResult.model_validate_json(last)
    assert result.artifact is not None, (result.message, done.stderr)
    assert len([line for line in lines if "held out" in line]) == 1
    assert_equal(two, alone)


def test_ranks_that_do_not_connect_are_named() -> None:
    port = free_port()
    with pytest.raises(PeersMissingError, match=r"rank 1, 2 of 3 did not connect within 0 s: check the pods"):
        Ranks(rank=0, size=3, port=port).connect("gloo", seconds=0.1)
    port = free_port()
    with pytest.raises(PeersMissingError, match=rf"rank 1 of 2 did not reach rank 0 at localhost:{port} within 0 s"):
        Ranks(rank=1, size=2, port=port).connect("gloo", seconds=0.1)


@pytest.mark.parametrize(
    ("resources", "environment", "expected"),
    [
        ({}, {}, (0, 1, 1)),
        ({"gpus": 4}, {}, (0, 4, 4)),
        ({"gpus": 0, "nodes": 3}, {}, (0, 1, 1)),  # no cluster: only this machine trains
        ({"gpus": 0, "nodes": 3}, {"JOB_COMPLETION_INDEX": "2"}, (2, 3, 1)),
        ({"gpus": 2, "nodes": 3}, {"JOB_COMPLETION_INDEX": "2"}, (4, 6, 2)),
        ({"gpus": 2}, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2, 1)),
    ],
    ids=str,
)
def test_ranks_follow_from_resources_and_environment(
    resources: dict[str, int], environment: dict[str, str], expected: tuple[int, int, int]
) -> None:
    ranks, count = of_pod(TrainingResources(**resources), environment)
    assert (ranks.rank, ranks.size, count) == expected
