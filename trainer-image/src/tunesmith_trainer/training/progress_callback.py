"""Monitor a run during training: progress, curves, and the reasons to stop it."""

from __future__ import annotations

import math
import resource
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from tunesmith_trainer.errors import LossDivergedError, NothingLearnedError
from tunesmith_trainer.reporting.curve import CurvePoint

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from tunesmith_trainer.process.progress import Progress
    from tunesmith_trainer.reporting.reporter import Reporter

_RECENT_STEPS = 10


class ProgressCallback(TrainerCallback):
    """Updates progress, records and reports the curves, and stops a run that fails."""

    def __init__(self, progress: Progress, reporter: Reporter, curve: list[CurvePoint], device: torch.device) -> None:
        self._progress = progress
        self._reporter = reporter
        self._curve = curve
        self._device = device
        self._times: list[float] = []
        self._tokens: list[int] = []

    def record_score(self, loss: float, seconds: float = 0.0) -> None:
        """Record a score of the adapter after the last step.

        Args:
            loss: held-out loss.
            seconds: duration of the scoring; it is not counted in the speed and the estimated time left.
        """
        last = self._curve[-1]
        self._curve.append(CurvePoint(step=last.step, epoch=last.epoch, evaluation_loss=loss))
        self._reporter.add(self._curve[-1])
        self._progress.update(evaluation_loss=loss)
        self._times = [moment + seconds for moment in self._times]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of the first step."""
        self._times.append(time.monotonic())
        self._tokens.append(state.num_input_tokens_seen)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise unless a gradient reaches the adapter in the first step.

        The embeddings of a few tokens are exempt: the rows of the first step may contain none of them.
        """
        if state.global_step == 0:
            parameters = kwargs["model"].named_parameters()
            trained = {name: parameter for name, parameter in parameters if parameter.requires_grad}
            if all("trainable_tokens_" in name for name in trained):
                return
            gradients = [parameter.grad for parameter in trained.values()]
            if not any(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients):
                finite = all(gradient is None or bool(torch.isfinite(gradient).all()) for gradient in gradients)
                if finite:
                    raise NothingLearnedError(
                        "no gradient reaches the adapter at step 1, so it would learn nothing: the loss of this step's "
                        "rows does not depend on the trained weights; check the rows and the modules of the method"
                    )

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record an optimizer step."""
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:
            return
        step, loss, norm = state.global_step, float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm}"
            raise LossDivergedError(
                f"the {what} at step {step} of {state.max_steps}: lower hyperparameters.learningRate (it is "
                f"{args.learning_rate:g}) and check the rows for outliers"
            )
        self._times.append(time.monotonic())
        self._tokens.append(state.num_input_tokens_seen)
        del self._times[: -_RECENT_STEPS - 1], self._tokens[: -_RECENT_STEPS - 1]
        seconds = self._times[-1] - self._times[0]
        epoch = round(float(state.epoch or 0.0), 4)
        rate = float(logs["learning_rate"])
        point = CurvePoint(step, epoch, loss, rate, norm, self._tokens[-1])
        self._curve.append(point)
        speed = round((self._tokens[-1] - self._tokens[0]) / seconds, 1) if seconds > 0 else None
        memory = _peak_memory(self._device)
        self._reporter.add(point, tokens_per_second=speed, memory_bytes=memory)
        self._progress.update(
            step=step,
            epoch=epoch,
            loss=loss,
            learning_rate=rate,
            tokens_per_second=speed,
            memory_bytes=memory,
            eta_seconds=round(seconds / (len(self._times) - 1) * (state.max_steps - step)),
        )


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
