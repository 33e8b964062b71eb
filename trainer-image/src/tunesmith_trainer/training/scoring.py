"""Compute the held-out loss during training: the points of its curve between the first and the last."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from tunesmith_trainer.errors import LossDivergedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import TrainerControl, TrainerState, TrainingArguments

    from tunesmith_trainer.training.progress_callback import ProgressCallback


class Scoring(TrainerCallback):
    """Scores the adapter every few steps; all ranks after the same steps.

    It runs when the step is logged, so a checkpoint of that step includes the score: a run that resumes from it does
    not compute it again. The last step is scored with the result. Early stopping is decided with each score.

    Args:
        every: optimizer steps between scores.
        score: returns the current held-out loss of the adapter.
        progress_callback: receives the points.
        keep: called with the step and its score; may keep the weights.
        stop: returns True if the curve shows that training should stop.
    """

    def __init__(
        self,
        every: int,
        score: Callable[[], float],
        progress_callback: ProgressCallback,
        keep: Callable[[int, float], None],
        stop: Callable[[], bool],
    ) -> None:
        self._every = every
        self._score = score
        self._progress_callback = progress_callback
        self._keep = keep
        self._stop = stop

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Score the adapter if the step is due."""
        step = state.global_step
        if "loss" not in kwargs["logs"] or step % self._every or step >= state.max_steps:
            return
        began = time.monotonic()
        loss = self._score()
        if not math.isfinite(loss):
            raise LossDivergedError(
                f"the held-out loss is {loss} after step {step} of {state.max_steps}: lower"
                f" hyperparameters.learningRate (it is {args.learning_rate:g})"
            )
        self._keep(step, loss)
        self._progress_callback.record_score(loss, time.monotonic() - began)
        if self._stop():
            # With a checkpoint, so that a new attempt does not train on.
            control.should_training_stop = control.should_save = True
