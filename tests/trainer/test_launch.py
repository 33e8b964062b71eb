"""Processes of a pod with several GPUs: starting and stopping, with small programs instead of the trainer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.trainer.trainer_rig import job_manifest
from tunesmith.contracts.result import TrainerResult

if TYPE_CHECKING:
    from pathlib import Path

RANK = """
import json, os, pathlib, signal, sys, time

rank, folder = os.environ["RANK"], pathlib.Path(sys.argv[1])
message = pathlib.Path(sys.argv[sys.argv.index("--termination-message") + 1])

def finish(code, **fields):
    if fields:
        message.write_text(json.dumps(fields))
    sys.exit(code)

def record_signal(number, frame):
    (folder / f"signal-{rank}-{number}-{time.monotonic_ns()}").touch()
    if rank in IGNORES_SIGTERM:
        return
    finish(143, outcome="Preempted", message=f"rank {rank} was stopped", retryable=True)

IGNORES_SIGTERM = sys.argv[2]
signal.signal(signal.SIGTERM, record_signal)
signal.signal(signal.SIGINT, record_signal)
(folder / f"started-{rank}").write_text(json.dumps({name: os.environ.get(name) for name in
    ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")} | {"argv": sys.argv[3:]}))
"""
WAIT = "\nwhile True: time.sleep(0.05)\n"
LAUNCH = """
import pathlib, sys
from tunesmith_trainer.process.launch import launch
from tunesmith_trainer.process.ranks import Ranks
folder = pathlib.Path(sys.argv[1])
command = [sys.executable, str(folder / "rank.py"), str(folder), sys.argv[2]]
result = launch(command, Ranks(rank=2, size=4, port=0), 2, folder, settling=0.5, stopping=0.5)
print(result.model_dump_json())
"""
LOST = 'finish(3, outcome="Failed", reason="InternalError", message="lost", retryable=True, lostPeer=True)'


def start(folder: Path, program: str, ignores_sigterm: str = "-") -> subprocess.Popen[str]:
    (folder / "rank.py").write_text(RANK + program)
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(folder), ignores_sigterm], stdout=subprocess.PIPE, text=True
    )


def result_of(process: subprocess.Popen[str]) -> TrainerResult:
    out, _ = process.communicate(timeout=180)
    return TrainerResult.model_validate_json(out)


def wait_for(folder: Path, *names: str) -> None:
    deadline = time.monotonic() + 120
    while not all((folder / name).exists() and (folder / name).read_text() for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (f'{LOST} if rank == "2" else finish(2, outcome="Failed", reason="InvalidSpec", message="bad")', "bad"),
        ('finish(0, outcome="Succeeded", message=f"rank {rank}")', "rank 2"),
        (f'{LOST} if rank == "3" else os.kill(os.getpid(), 9)', "rank 2 of 4 exited with code 137 without a"),
        (f'os.kill(os.getpid(), 11) if rank == "3" else None\n{WAIT}', "rank 3 of 4 exited with code 139 without a"),
    ],
    ids=["a fault", "success", "killed", "others get SIGTERM"],
)
def test_the_result_of_the_decisive_rank_is_returned(tmp_path: Path, program: str, expected: str) -> None:
    assert expected in result_of(start(tmp_path, program)).message


def test_each_rank_gets_its_environment(tmp_path: Path) -> None:
    result_of(start(tmp_path, ""))
    first, second = (json.loads((tmp_path / f"started-{rank}").read_text()) for rank in (2, 3))
    assert (first["WORLD_SIZE"], first["LOCAL_RANK"], second["LOCAL_RANK"]) == ("4", "0", "1")
    assert first["MASTER_PORT"] == second["MASTER_PORT"] != "0"


def test_the_command_starts_a_process_per_gpu_and_reports_one_result(tmp_path: Path) -> None:
    """They fail immediately: in a cluster a local folder cannot be the artifact's destination."""
    job = job_manifest("s3://models/base", "s3://data/rows.jsonl", resources={"gpus": 2})
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    command = [sys.executable, "-m", "tunesmith_trainer.main", "train", "--job", str(tmp_path / "job.yaml")]
    command += ["--output", str(tmp_path / "out"), "--progress-port", "0", "--work", str(tmp_path / "work")]
    command += ["--termination-message", str(tmp_path / "message")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=180, check=False)
    assert done.returncode == 2
    first, last = done.stdout.splitlines()
    assert first == "  2 GPUs: one process per GPU"
    assert last.startswith("Failed (InvalidSpec): --output")
    assert sorted(file.name for file in (tmp_path / "work").glob("result-*")) == ["result-0.json", "result-1.json"]
    assert TrainerResult.model_validate_json((tmp_path / "message").read_text()).reason == "InvalidSpec"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_once(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, WAIT)
    wait_for(tmp_path, "started-2", "started-3")
    process.send_signal(number)
    assert result_of(process).message == "rank 2 was stopped"
    assert sorted(name.name.rsplit("-", 1)[0] for name in tmp_path.glob("signal-*")) == [
        f"signal-2-{int(number)}",
        f"signal-3-{int(number)}",
    ]


def test_a_rank_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    process = start(
        tmp_path, f'finish(2, outcome="Failed", reason="InvalidSpec") if rank == "3" else None\n{WAIT}', "2"
    )
    assert result_of(process).reason == "InvalidSpec"
    assert list(tmp_path.glob("signal-2-15-*"))
