from __future__ import annotations

import io
import socket
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.api.finetunejob_status import FineTuneJobStatus, Phase, Stage
from tunesmith.cli.progress import live_line
from tunesmith.storage.credentials import Scrubber
from tunesmith_trainer.main import progress_served
from tunesmith_trainer.options import Command, RunOptions
from tunesmith_trainer.process.interruption import Interruption
from tunesmith_trainer.process.metrics import exposition
from tunesmith_trainer.process.progress import Progress
from tunesmith_trainer.process.ranks import Ranks
from tunesmith_trainer.process.termination import Termination

if TYPE_CHECKING:
    from pathlib import Path

STEP = {
    "step": 12,
    "epoch": 0.41,
    "loss": 2.3456,
    "evaluation_loss": 2.4,
    "learning_rate": 2e-4,
    "tokens_per_second": 431.4,
    "memory_bytes": 1_900_000_000,
    "eta_seconds": 150,
}
LINE = "  step 12/60 (20 %)  epoch 0.4  loss 2.346  held-out 2.400  rate 2.0e-04  431 tok/s  1.9 GB  ETA 2 min 30 s"


class Terminal(io.StringIO):
    """A terminal that records its output."""

    def isatty(self) -> bool:
        return True


def training(out: io.StringIO, **changes: Any) -> Progress:
    """Return the progress of a run that has just done a step."""
    progress = Progress(out=out)
    progress.update(stage=Stage.TRAINING, total_steps=60)
    progress.update(**STEP | changes)
    return progress


def test_a_local_run_and_a_followed_job_show_a_step_in_the_same_words() -> None:
    out = io.StringIO()
    status = training(out).status
    shown = out.getvalue().splitlines()[-1]
    assert shown == LINE
    job = FineTuneJob.model_validate(
        {
            "metadata": {"name": "doors"},
            "spec": {
                "baseModel": {"uri": "s3://models/base"},
                "dataset": {"train": [{"uri": "s3://data/train.jsonl"}]},
                "method": {"lora": {}},
            },
        }
    )
    job.status = FineTuneJobStatus(phase=Phase.RUNNING, progress=status)
    assert status.update_time is not None
    assert live_line(job, status.update_time) == f"Training{shown}"


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (120, LINE),
        (80, "  step 12/60 (20 %)  loss 2.346  held-out 2.400  431 tok/s  ETA 2 min 30 s"),
        (65, "  step 12/60 (20 %)  loss 2.346  held-out 2.400  ETA 2 min 30 s"),
        (20, "  step 12/60 (20 %) "),
    ],
)
def test_a_line_that_is_rewritten_fits_its_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, line: str) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    training(terminal)
    assert terminal.getvalue() == f"Training\n\r\x1b[2K{line}"


def test_descriptions_of_losses_have_their_unit() -> None:
    metrics = exposition(training(io.StringIO()).status).decode()
    unit = "nats per target token for the objective sft, the objective's own loss for others."
    assert f"# HELP tunesmith_trainer_loss Training loss of the last step: {unit}\n" in metrics
    assert f"# HELP tunesmith_trainer_evaluation_loss Held-out loss: {unit}\n" in metrics
    assert "\ntunesmith_trainer_evaluation_loss 2.4\n" in metrics


def test_only_rank_0_serves_progress(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = RunOptions(
        command=Command.TRAIN, job=tmp_path / "job.yaml", secrets=tmp_path, format="json", progress_port=port
    )
    termination = Termination(Progress("json", io.StringIO()), "json", None, Interruption(), Scrubber())
    for ranks, served in ((Ranks(rank=0, size=2), True), (Ranks(rank=1, size=2), False)):
        termination.ranks = ranks
        with progress_served(options, termination), socket.socket() as client:
            assert (client.connect_ex(("127.0.0.1", port)) == 0) is served
