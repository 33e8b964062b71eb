"""Saves the state of a Trainer and restores it, so that a resumed run equals one that was never interrupted.

The Trainer's own resume runs the data up to the position and loads optimizer, scheduler and random states; its own
saving is neither atomic nor checked, so what it reads is written and verified here.
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
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from tunesmith_trainer.base_model import sharding
from tunesmith_trainer.errors import LossDivergedError, TrainerError
from tunesmith_trainer.methods import hooks
from tunesmith_trainer.reporting.curve import CurvePoint
from tunesmith_trainer.training.divergence import SUSTAINED_STEPS, diverged, far_off

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from tunesmith.api.checkpoint import Checkpoint
    from tunesmith_trainer.process.interruption import Interruption
    from tunesmith_trainer.process.ranks import Ranks
    from tunesmith_trainer.training.checkpoint import Checkpoints, Saved
    from tunesmith_trainer.training.trainer import StepTrainer

log = logging.getLogger(__name__)

WEIGHTS = "trainable.safetensors"
RUN_STATE = "run.json"
_FEW = 2 * SUSTAINED_STEPS
TRAINER_STATE = "trainer_state.json"


class NotCompiledError(TrainerError):
    """The run began with compiled layers, and cannot go on with them here."""

    retryable = True


class Saver(TrainerCallback):
    """Writes checkpoints when they are due, on interruption and after the last step.

    Args:
        checkpoints: where to.
        policy: how often.
        interruption: asks for the end of the run.
        curve: of the run; a restored checkpoint replaces its content.
        ranks: that train together; the first one saves for all.
        paused: within it, nobody takes the time that passes for that of a step.
        clock: seconds.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        policy: Checkpoint,
        interruption: Interruption,
        curve: list[CurvePoint],
        ranks: Ranks,
        paused: Callable[[], AbstractContextManager[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._checkpoints = checkpoints
        self._policy = policy
        self._interruption = interruption
        self._curve = curve
        self._ranks = ranks
        self._paused = paused
        self._clock = clock
        self._saved_step = 0
        self._saved_at = clock()
        self._trainer: StepTrainer | None = None
        self.interrupted_at: int | None = None
        """Step after which the run was stopped, where it was."""

    def attach(self, trainer: StepTrainer) -> None:
        """Takes the place of the Trainer's own saving, and of its loading of weights and of the optimizer's state."""
        self._trainer = trainer
        trainer._save_checkpoint = self._save  # noqa: SLF001 - its one place between logging and the next step
        trainer._load_from_checkpoint = self._load_weights  # noqa: SLF001 - it knows PEFT's files only
        trainer._load_optimizer_and_scheduler = self._load_optimizer  # noqa: SLF001 - it loads all onto each rank's GPU
        trainer.add_callback(self)

    def restore(self, saved: Saved) -> None:
        """Brings back the curve and the counters; the Trainer's `resume_from_checkpoint` does the rest.

        Raises:
            NotCompiledError: with what to change.
        """
        trainer = self._attached
        run = json.loads((saved.path / RUN_STATE).read_text(encoding="utf-8"))
        self._curve[:] = [CurvePoint(**point) for point in run["curve"]]
        if saved.step >= trainer.args.max_steps:
            # No step is left, so the Trainer does not load them.
            self._load_weights(str(saved.path))
        else:
            self._compute_alike(saved.step, compiled=run.get("compiled", trainer.compiled))
        self._saved_step = saved.step
        self._interruption.resumed_from_step = saved.step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The interval begins, and signals are looked at from here on."""
        self._saved_at = self._clock()
        self._interruption.armed = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks for a checkpoint where one is due; it is written once the step is in the curves."""
        step = state.global_step
        due = self._policy.due(steps=step - self._saved_step, seconds=self._clock() - self._saved_at)
        # A signal to any rank stops all of them after the same step; the first one's clock counts.
        asked, due = self._ranks.any(self._interruption.signal is not None, due and self._ranks.first)
        if asked:
            control.should_training_stop = True
            if step < state.max_steps:
                self.interrupted_at = step
        if due or asked or step >= state.max_steps:
            control.should_save = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing looks at signals any more."""
        self._interruption.armed = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stops a run whose loss has run away, before its state is saved."""
        if "loss" in kwargs["logs"] and diverged(self._losses):
            raise LossDivergedError(
                f"the loss is far above that of the first steps since {SUSTAINED_STEPS} steps, at step"
                f" {state.global_step} of {state.max_steps} it is {kwargs['logs']['loss']:.3f}: lower"
                f" hyperparameters.learningRate (it is {args.learning_rate:g})"
            )

    def last_good(self) -> str:
        """The words of an error about the newest checkpoint."""
        last = self._checkpoints.last
        if last is None:
            return "no checkpoint was written before"
        return f"the last good checkpoint is that of step {last}, in {self._checkpoints.uri}"

    @property
    def _losses(self) -> list[float]:
        """The first and the last, which is what is looked at after each of perhaps a million steps."""
        few = self._curve if len(self._curve) < 4 * _FEW else [*self._curve[:_FEW], *self._curve[-_FEW:]]
        return [point.loss for point in few if point.loss is not None]

    @property
    def _attached(self) -> StepTrainer:
        assert self._trainer is not None  # noqa: S101 - attach() is called first
        return self._trainer

    def _save(self, model: torch.nn.Module, trial: object = None) -> None:
        trainer = self._attached
        step = trainer.state.global_step
        # The first rank's word: what follows may need all of them.
        if self._ranks.of_first(int(step == self._saved_step and self._checkpoints.last == step)):
            return
        if far_off(self._losses) and self.interrupted_at is None and step < trainer.state.max_steps:
            # The newest checkpoint stays one from before the loss ran away; the next step is looked at again.
            return
        with self._paused():
            weights = _trainable(trainer, keep=self._ranks.first)
            optimizer = trainer.optimizer.state_dict()
            if self._ranks.first:
                self._write(step, weights, optimizer)
            # Here, and not in the next step, whose time is limited.
            self._ranks.wait()
        # Where it could not be written, the next attempt comes after the next interval, not at every step.
        self._saved_step, self._saved_at = step, self._clock()

    def _write(self, step: int, weights: dict[str, torch.Tensor], optimizer: dict[str, Any]) -> None:
        for name, tensor in weights.items():
            if not bool(tensor.isfinite().all()):
                raise LossDivergedError(
                    f"{name} has values that are not finite after step {step} of {self._attached.state.max_steps}:"
                    " lower hyperparameters.learningRate"
                )
        self._checkpoints.save(step, lambda folder: self._fill(folder, weights, optimizer))

    def _fill(self, folder: Path, weights: dict[str, torch.Tensor], optimizer: dict[str, Any]) -> None:
        trainer = self._attached
        save_file(weights, folder / WEIGHTS)
        torch.save(optimizer, folder / OPTIMIZER_NAME)
        torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        trainer._save_rng_state(str(folder))  # noqa: SLF001
        state = copy.copy(trainer.state)
        state.log_history = []  # the curve has it
        state.save_to_json(str(folder / TRAINER_STATE))
        run = {"curve": [asdict(point) for point in self._curve], "compiled": trainer.compiled}
        (folder / RUN_STATE).write_text(json.dumps(run), encoding="utf-8")
        hooks.save_state(trainer.accelerator.unwrap_model(trainer.model), folder)

    def _load_weights(self, folder: str, model: object = None) -> None:
        trainer = self._attached
        stored = load_file(f"{folder}/{WEIGHTS}")
        own = {name: tensor for name, tensor in _named(trainer).items() if tensor.requires_grad}
        if set(stored) != set(own):
            odd = min(set(stored) ^ set(own))
            raise RuntimeError(f"the checkpoint and the model differ in the trainable parameter {odd}")
        with torch.no_grad():
            for name, tensor in stored.items():
                own[name].copy_(sharding.part_of(tensor, own[name]))
        hooks.load_state(trainer.accelerator.unwrap_model(trainer.model), Path(folder))

    def _load_optimizer(self, folder: str) -> None:
        trainer = self._attached
        # Mapped: ranks of one node share its pages, where each keeps a part of each state.
        states = torch.load(f"{folder}/{OPTIMIZER_NAME}", map_location="cpu", mmap=True, weights_only=True)
        trainer.optimizer.load_state_dict(states)
        for state in trainer.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                    state[name] = value.clone()  # the file goes with its checkpoint
        schedule = torch.load(f"{folder}/{SCHEDULER_NAME}", map_location="cpu", weights_only=True)
        trainer.lr_scheduler.load_state_dict(schedule)

    def _compute_alike(self, step: int, *, compiled: bool) -> None:
        """What kernels an attempt gets is tried by each; a run is to have the same in all of its attempts."""
        if compiled and not self._attached.compiled:
            raise NotCompiledError(
                f"layers were compiled up to the checkpoint of step {step}, and cannot be here, where the result would"
                " be another: let the next attempt run on a machine like that of the first"
                " (scheduling.nodeSelector), or create a new FineTuneJob with hyperparameters.torchCompile false"
            )
        if self._attached.compiled and not compiled:
            log.warning("compiled layers are not used: they were not up to the checkpoint of step %d", step)
        self._attached.compiled = compiled


def _named(trainer: Trainer) -> dict[str, torch.nn.Parameter]:
    return dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())


def _trainable(trainer: Trainer, *, keep: bool) -> dict[str, torch.Tensor]:
    """What is trained, whole and in main memory where `keep`; each rank must ask for what is shared out."""
    asked = {
        name: tensor
        for name, tensor in _named(trainer).items()
        if tensor.requires_grad and (keep or sharding.is_shared_out(tensor))
    }
    found = {name: sharding.gathered(tensor, keep=keep) for name, tensor in asked.items()}
    return found if keep else {}
