"""Save and restore the state of a Trainer, so that a resumed run equals one that was never interrupted.

The Trainer's own resume skips the data up to the position and loads optimizer, scheduler and random states; its own
saving is neither atomic nor verified, so the files that it reads are written and verified here.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from tunesmith_trainer.errors import LossDivergedError, TrainerError
from tunesmith_trainer.methods import hooks
from tunesmith_trainer.reporting.curve import CurvePoint
from tunesmith_trainer.training import weights
from tunesmith_trainer.training.divergence import SUSTAINED_STEPS, diverged, far_above_start
from tunesmith_trainer.training.loss_scale import LossScale

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from transformers import TrainerControl, TrainerState, TrainingArguments

    from tunesmith.api.checkpoint import Checkpoint
    from tunesmith_trainer.process.interruption import Interruption
    from tunesmith_trainer.process.ranks import Ranks
    from tunesmith_trainer.training.best import BestWeights
    from tunesmith_trainer.training.checkpoint import Checkpoints, LocalCheckpoint
    from tunesmith_trainer.training.trainer import StepTrainer

log = logging.getLogger(__name__)

WEIGHTS = "trainable.safetensors"
RUN_STATE = "run.json"
_CHECKED_POINTS = 2 * SUSTAINED_STEPS
TRAINER_STATE = "trainer_state.json"


class NotCompiledError(TrainerError):
    """The run began with compiled layers, and cannot resume with them on this machine."""

    retryable = True


class Saver(TrainerCallback):
    """Writes checkpoints when they are due, on interruption and after the last step.

    Args:
        checkpoints: destination of the checkpoints.
        policy: checkpoint interval.
        interruption: request to stop the run.
        curve: curve of the run; a restored checkpoint replaces its content.
        ranks: ranks that train together; the first one saves for all.
        paused: context manager within which the time does not count towards a step.
        best: best weights so far, which checkpoints contain too; None if the last ones are published.
        stopped: returns True if the curve shows that training has stopped early.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        policy: Checkpoint,
        interruption: Interruption,
        curve: list[CurvePoint],
        ranks: Ranks,
        paused: Callable[[], AbstractContextManager[None]],
        best: BestWeights | None = None,
        stopped: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._checkpoints = checkpoints
        self._policy = policy
        self._interruption = interruption
        self._curve = curve
        self._ranks = ranks
        self._paused = paused
        self._best = best
        self._stopped = stopped
        self._clock = clock
        self._saved_step = 0
        self._saved_at = clock()
        self._trainer: StepTrainer | None = None
        self.interrupted_at: int | None = None
        """Step after which the run was stopped; None if it was not."""

    def attach(self, trainer: StepTrainer) -> None:
        """Replace the Trainer's own saving, and its loading of weights and optimizer state."""
        self._trainer = trainer
        trainer._save_checkpoint = self._save  # noqa: SLF001 - its one place between logging and the next step
        trainer._load_from_checkpoint = self._load_weights  # noqa: SLF001 - it knows PEFT's files only
        trainer._load_optimizer_and_scheduler = self._load_optimizer  # noqa: SLF001 - it loads all onto each rank's GPU
        trainer.add_callback(self)

    def restore(self, saved: LocalCheckpoint) -> bool:
        """Restore the curve, the best weights and the counters; the Trainer's `resume_from_checkpoint` does the rest.

        Returns:
            True if steps are left. Otherwise the weights are loaded too, because the Trainer does not run.

        Raises:
            NotCompiledError: layers cannot be compiled as before; states what to change.
        """
        trainer = self._attached
        run = json.loads((saved.path / RUN_STATE).read_text(encoding="utf-8"))
        self._curve[:] = [CurvePoint(**point) for point in run["curve"]]
        if self._best is not None:
            self._best.restore(saved.path, saved.step, run.get("best"), WEIGHTS)
        self._saved_step = saved.step
        self._interruption.resumed_from_step = saved.step
        if saved.step >= trainer.args.max_steps or self._stopped():
            self._load_weights(str(saved.path))
            return False
        self._restore_compilation(saved.step, compiled=run.get("compiled", trainer.compiled))
        if trainer.loss_scale is not None:
            trainer.loss_scale = LossScale(**run["lossScale"])
        return True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the checkpoint interval, and check for signals from here on."""
        self._saved_at = self._clock()
        self._interruption.armed = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a checkpoint if one is due; it is written once the step is in the curves."""
        step = state.global_step
        due = self._policy.due(
            steps=step - self._saved_step, seconds=self._clock() - self._saved_at, total=state.max_steps
        )
        # A signal to any rank stops all of them after the same step; the first rank's clock counts.
        stop, due = self._ranks.any(self._interruption.signal is not None, due and self._ranks.first)
        if stop:
            control.should_training_stop = True
            if step < state.max_steps:
                self.interrupted_at = step
        if due or stop or step >= state.max_steps:
            control.should_save = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop checking for signals."""
        self._interruption.armed = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop a run whose loss has diverged, before its state is saved."""
        if "loss" in kwargs["logs"] and diverged(self._losses):
            raise LossDivergedError(
                f"the loss has been far above that of the first steps for {SUSTAINED_STEPS} steps; at step"
                f" {state.global_step} of {state.max_steps} it is {kwargs['logs']['loss']:.3f}: lower"
                f" hyperparameters.learningRate (it is {args.learning_rate:g})"
            )

    def describe_last_checkpoint(self) -> str:
        """Describe the newest checkpoint for an error message."""
        last = self._checkpoints.last
        if last is None:
            return "no checkpoint was written before it"
        return f"the last good checkpoint is that of step {last}, in {self._checkpoints.uri}"

    @property
    def _losses(self) -> list[float]:
        """First and last losses: only these are checked, after each of perhaps a million steps."""
        points = self._curve
        if len(points) >= 4 * _CHECKED_POINTS:
            points = [*points[:_CHECKED_POINTS], *points[-_CHECKED_POINTS:]]
        return [point.loss for point in points if point.loss is not None]

    @property
    def _attached(self) -> StepTrainer:
        assert self._trainer is not None  # noqa: S101 - attach() is called first
        return self._trainer

    def _save(self, model: torch.nn.Module, trial: object = None) -> None:
        trainer = self._attached
        step = trainer.state.global_step
        # Decided by the first rank: the following may need all of them.
        if self._ranks.of_first(int(step == self._saved_step and self._checkpoints.last == step)):
            return
        if far_above_start(self._losses) and self.interrupted_at is None and step < trainer.state.max_steps:
            # Keep the newest checkpoint from before the loss diverged; the next step is checked again.
            return
        with self._paused():
            trained = weights.gather(_unwrapped(trainer), keep=self._ranks.first)
            optimizer = trainer.optimizer.state_dict()
            if self._ranks.first:
                self._write(step, trained, optimizer)
            # Wait here and not in the next step, whose time is limited.
            self._ranks.wait()
        # If it could not be written, it is tried again after the next interval, not at every step.
        self._saved_step, self._saved_at = step, self._clock()

    def _write(self, step: int, trained: dict[str, torch.Tensor], optimizer: dict[str, Any]) -> None:
        for name, tensor in trained.items():
            if not bool(tensor.isfinite().all()):
                raise LossDivergedError(
                    f"{name} has values that are not finite after step {step} of {self._attached.state.max_steps}:"
                    " lower hyperparameters.learningRate"
                )
        self._checkpoints.save(step, lambda folder: self._fill(folder, trained, optimizer))

    def _fill(self, folder: Path, trained: dict[str, torch.Tensor], optimizer: dict[str, Any]) -> None:
        trainer = self._attached
        save_file(trained, folder / WEIGHTS)
        torch.save(optimizer, folder / OPTIMIZER_NAME)
        torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        trainer._save_rng_state(str(folder))  # noqa: SLF001
        state = copy.copy(trainer.state)
        state.log_history = []  # the curve contains it
        state.save_to_json(str(folder / TRAINER_STATE))
        best = self._best.save(folder, trainer.state.global_step) if self._best is not None else None
        run = {"curve": [asdict(point) for point in self._curve], "compiled": trainer.compiled, "best": best}
        if trainer.loss_scale is not None:
            run["lossScale"] = asdict(trainer.loss_scale)
        (folder / RUN_STATE).write_text(json.dumps(run), encoding="utf-8")
        hooks.save_state(_unwrapped(trainer), folder)

    def _load_weights(self, folder: str, model: object = None) -> None:
        trained = _unwrapped(self._attached)
        weights.load(trained, Path(folder) / WEIGHTS)
        hooks.load_state(trained, Path(folder))

    def _load_optimizer(self, folder: str) -> None:
        trainer = self._attached
        # Memory-mapped: ranks of one node share its pages if each keeps a shard of each state.
        states = torch.load(f"{folder}/{OPTIMIZER_NAME}", map_location="cpu", mmap=True, weights_only=True)
        trainer.optimizer.load_state_dict(states)
        for state in trainer.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                    state[name] = value.clone()  # the file is removed with its checkpoint
        schedule = torch.load(f"{folder}/{SCHEDULER_NAME}", map_location="cpu", weights_only=True)
        trainer.lr_scheduler.load_state_dict(schedule)

    def _restore_compilation(self, step: int, *, compiled: bool) -> None:
        """Compute as up to the checkpoint: a run uses compiled layers in all of its attempts or in none."""
        if compiled and not self._attached.compiled:
            raise NotCompiledError(
                f"layers were compiled up to the checkpoint of step {step} and cannot be compiled on this machine,"
                " which would change the result: run the next attempt on a machine like that of the first"
                " (scheduling.nodeSelector), or create a new FineTuneJob with hyperparameters.torchCompile false"
            )
        if self._attached.compiled and not compiled:
            log.warning("compiled layers are not used: layers were not compiled up to the checkpoint of step %d", step)
        self._attached.compiled = compiled


def _unwrapped(trainer: StepTrainer) -> torch.nn.Module:
    model: torch.nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    return model
