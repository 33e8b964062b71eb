"""A transformers Trainer whose batches are whole optimizer steps."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer

from tunesmith_trainer.base_model import sharding
from tunesmith_trainer.base_model.precision import training_precision
from tunesmith_trainer.training.compilation import run_compiled
from tunesmith_trainer.training.loss_scale import divide
from tunesmith_trainer.training.objectives import Forward

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from datasets import Dataset
    from peft import PeftModel
    from torch import nn
    from transformers import TrainerCallback, TrainingArguments

    from tunesmith_trainer.process.ranks import Ranks
    from tunesmith_trainer.training.batches import Step, StepPlan
    from tunesmith_trainer.training.loss_scale import LossScale
    from tunesmith_trainer.training.neftune import EmbeddingNoise
    from tunesmith_trainer.training.objectives import StepObjective, Terms
    from tunesmith_trainer.training.schedule import Schedule


class StepTrainer(Trainer):
    """Trains a model with `target_loss`; the loss of a step is its objective's, over all ranks together.

    Args:
        model: base with adapter.
        args: arguments with gradient_accumulation_steps 1: the micro-batches are inside a step.
        rows: tokenised rows.
        plan: rows of each step.
        collate: converts the rows of a step to `{"step": Step}`.
        objective: objective to minimise.
        ranks: ranks that train together.
        callbacks: callbacks; on_substep_end is called after each micro-batch.
        compiled: True if some layers are compiled; they run compiled within the steps.
        noise: noise on the embeddings, or None.
        schedule: learning rate of each step.
        loss_scale: factor of the loss in float16; None: products are in another type.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        rows: Dataset,
        plan: StepPlan,
        collate: Callable[[Sequence[Any]], dict[str, Step]],
        objective: StepObjective,
        ranks: Ranks,
        callbacks: list[TrainerCallback],
        *,
        schedule: Schedule,
        compiled: bool = False,
        noise: EmbeddingNoise | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows.with_format("numpy"),
            data_collator=collate,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self._plan = plan
        self._objective = objective
        self._ranks = ranks
        self.compiled = compiled
        self._noise = noise
        self._schedule = schedule
        self.loss_scale = loss_scale

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader of one optimizer step per element and one pass per run; every rank sees all steps."""
        # Not prepared by accelerate, which would divide the steps instead of their micro-batches.
        return DataLoader(self.train_dataset, batch_sampler=self._plan, collate_fn=self.data_collator)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer like the Trainer; its states are whole in checkpoints."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.is_distributed_loading_by_transformers:
            sharding.use_full_optimizer_states(optimizer, keep=self._ranks.first)
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the scheduler of the run's schedule; the Trainer's would take the first step at the rate 0."""
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self._schedule.factor)
        self.lr_scheduler = scheduler
        return scheduler

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Run the forward and backward pass of a step; the loss returned, averaged over ranks, is the step's."""
        step: Step = inputs["step"]
        self.state.num_input_tokens_seen += step.tokens
        model.train()
        scale = self.loss_scale
        if scale is None:
            return self._gradients(model, step, 1.0)
        while True:
            total = self._gradients(model, step, scale.factor)
            finite = divide(model.parameters(), scale.factor)
            overflown = self._ranks.any(not finite and bool(total.isfinite()))[0]
            if not overflown or scale.lowest:
                scale.count_step()
                return total
            scale.halve()
            model.zero_grad()

    def _gradients(self, model: nn.Module, step: Step, factor: float) -> torch.Tensor:
        """Add the gradients of a step's loss times a factor, and return the loss."""
        forward = Forward(model, self.accelerator.unwrap_model(model))
        if self._objective.mismatched:
            with self._products(model):
                self._objective.estimate(forward, self._batches_in_order(step.mismatched, 1), self._ranks)
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(self._batches_in_order(step.micro_batches, 0), start=1):
            if self._noise is not None:
                self._noise.expect(batch)
            # The ranks' gradients are averaged once per step.
            last = number == len(step.micro_batches)
            with nullcontext() if last else self.accelerator.no_sync(model), self._compiled_layers():
                with self._products(model):
                    loss = self._step_loss(self._objective.terms(forward, batch), step)
                self.accelerator.backward(loss if factor == 1.0 else loss * factor)
            total += loss.detach()
            if not last:
                self.callback_handler.on_substep_end(self.args, self.state, self.control)
        if self.is_distributed_loading_by_transformers:
            sharding.average_gradients(model.parameters(), self._ranks)
        return total

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Give an adapter over a sharded base the first rank's values on every rank; its gradients are averaged."""
        sharding.broadcast_from_first(model.parameters())

    def _batches_in_order(self, batches: Sequence[dict[str, Any]], pass_: int) -> Iterator[dict[str, Any]]:
        """Yield the rank's batches on its device.

        Dropout and noise depend on the seed, the step and a batch's position in the pass over it, whichever rank has
        it.
        """
        for number, tensors in enumerate(batches):
            position = number * self._ranks.size + self._ranks.rank
            entropy = (self.args.seed, self.state.global_step, pass_, position)
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
            yield self._prepare_inputs(tensors)

    def _products(self, model: nn.Module) -> AbstractContextManager[None]:
        """Compute products in float16; those in bfloat16 are set up by the Trainer."""
        return nullcontext() if self.loss_scale is None else training_precision(self.accelerator.unwrap_model(model))

    def _compiled_layers(self) -> AbstractContextManager[None]:
        return run_compiled() if self.compiled else nullcontext()

    def _step_loss(self, terms: Terms, step: Step) -> torch.Tensor:
        """Return a micro-batch's part of the step's loss, times `ranks`: ranks average their gradients."""
        loss = terms.penalty / len(step.micro_batches)
        for summed, count in zip(terms.sums, step.counts, strict=True):
            loss = loss + summed / max(count, 1) * self.args.world_size
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log like the Trainer, with the number of passes over the rows as the epoch."""
        self.state.epoch = self._plan.epoch(self.state.global_step)
        super().log(logs, start_time)
