"""Training objectives: SFT, DPO, ORPO and KTO over the rows of an optimizer step.

A loss is a sum of terms. Each term is summed over micro-batches and ranks and divided by its own count over the whole
step (target tokens, rows), so that the result depends on neither micro-batches nor ranks.

A preference row is two sequences in one row, the chosen answer and the rejected one, each after the prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tunesmith.api.objective import DpoFields, KtoFields, Objective, ObjectiveName, OrpoFields
from tunesmith_trainer.data import IGNORED
from tunesmith_trainer.training import preference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from peft import PeftModel
    from torch import nn

    from tunesmith_trainer.process.ranks import Ranks
    from tunesmith_trainer.training.loss import TargetLoss

    Row = Mapping[str, Any]
    """`input_ids` and `labels` of the same length. A packed row and a pair of answers also have `seq_lengths`, the
    lengths of their sequences; an answer that is labelled as good or bad has `desirable`."""
    Batch = dict[str, Any]

DESIRABLE = "desirable"
"""Key of a micro-batch that is not passed to the model: True for each answer that is a good one, (rows,) bool."""


@dataclass(frozen=True)
class Forward:
    """Runs a model on micro-batches.

    Args:
        model: model with adapter and `target_loss`; may be wrapped for several ranks.
        unwrapped: the same model without that wrapper.
        adapter: True to compute with the adapter, False for the base alone.
    """

    model: nn.Module
    unwrapped: PeftModel
    adapter: bool = True

    def __call__(self, batch: Batch) -> TargetLoss:
        """Return the policy's loss at the targets of a micro-batch."""
        if not self.adapter:
            return self.base(batch)
        output: TargetLoss = self.model(**_inputs(batch), target_loss=True)
        return output

    def base(self, batch: Batch) -> TargetLoss:
        """Return the base's loss, which is the reference."""
        return self.without_gradient(batch, adapter=False)

    def without_gradient(self, batch: Batch, *, adapter: bool | None = None) -> TargetLoss:
        """Return the loss without dropout, noise and gradients; `adapter` defaults to that of this Forward."""
        adapted = self.adapter if adapter is None else adapter
        training = self.unwrapped.training
        self.unwrapped.eval()
        try:
            with torch.no_grad(), nullcontext() if adapted else self.unwrapped.disable_adapter():
                output: TargetLoss = self.unwrapped(**_inputs(batch), target_loss=True)
        finally:
            self.unwrapped.train(training)
        return output


@dataclass(frozen=True)
class Terms:
    """Contribution of a micro-batch to each term of the loss, and the penalty that the method itself adds."""

    sums: list[torch.Tensor]
    penalty: torch.Tensor


class StepObjective(ABC):
    """Objective that an optimizer step minimises."""

    mismatched = False
    """True if it needs the rows' prompts with other rows' answers (see `estimate`)."""

    @abstractmethod
    def counts(self, rows: Sequence[Row]) -> tuple[int, ...]:
        """Return the number that rows add to each term's count, by which the term is divided."""

    @abstractmethod
    def terms(self, forward: Forward, batch: Batch) -> Terms:
        """Return the contribution of a micro-batch to each term."""

    def estimate(self, forward: Forward, batches: Iterable[Batch], ranks: Ranks) -> None:  # noqa: B027 - few need it
        """Process a step's mismatched rows before its micro-batches, if the objective needs them."""


class SupervisedObjective(StepObjective):
    """Negative log-likelihood per target token."""

    def counts(self, rows: Sequence[Row]) -> tuple[int, ...]:
        """Return the number of target tokens."""
        return (sum(_targets(row, 0, 1) for row in rows),)

    def terms(self, forward: Forward, batch: Batch) -> Terms:
        """Return the sum over the targets."""
        output = forward(batch)
        return Terms([_filled(output.summed)], _filled(output.loss))


class PairObjective(StepObjective):
    """DPO: the loss per pair of answers."""

    def __init__(self, fields: DpoFields) -> None:
        self._fields = fields

    def counts(self, rows: Sequence[Row]) -> tuple[int, ...]:
        """Return the number of pairs."""
        return (len(rows),)

    def terms(self, forward: Forward, batch: Batch) -> Terms:
        """Return the sum over the pairs."""
        reference, _ = answers(forward.base(batch), batch)
        output = forward(batch)
        policy, sizes = answers(output, batch)
        losses = preference.dpo(policy[::2], policy[1::2], reference[::2], reference[1::2], self._fields)
        return Terms([(losses * (sizes[::2] > 0)).sum()], _filled(output.loss))


class OddsRatioObjective(StepObjective):
    """ORPO: the chosen answer's loss per target token, and the odds ratio per pair."""

    def __init__(self, fields: OrpoFields) -> None:
        self._weight = fields.weight

    def counts(self, rows: Sequence[Row]) -> tuple[int, ...]:
        """Return the target tokens of the chosen answers, and the number of pairs."""
        return sum(_targets(row, 0, 2) for row in rows), len(rows)

    def terms(self, forward: Forward, batch: Batch) -> Terms:
        """Return the sum over the chosen answers' targets, and the weighted sum over the pairs."""
        output = forward(batch)
        policy, sizes = answers(output, batch)
        mean = policy / sizes.clamp(min=1)
        losses = self._weight * preference.odds_ratio(mean[::2], mean[1::2]) * (sizes[::2] > 0)
        return Terms([-policy[::2].sum(), losses.sum()], _filled(output.loss))


class LabelledObjective(StepObjective):
    """KTO: the loss per answer.

    The divergence from the base is estimated over the whole step, from each row's prompt with the answer of the row
    before it.
    """

    mismatched = True

    def __init__(self, fields: KtoFields) -> None:
        self._fields = fields
        self._divergence = torch.zeros(())

    def counts(self, rows: Sequence[Row]) -> tuple[int, ...]:
        """Return the number of answers."""
        return (len(rows),)

    def estimate(self, forward: Forward, batches: Iterable[Batch], ranks: Ranks) -> None:
        """Estimate the divergence: the mean log-ratio of policy and base over the mismatched rows, at least 0."""
        total, rows = 0.0, 0
        for batch in batches:
            policy, sizes = answers(forward.without_gradient(batch), batch)
            reference, _ = answers(forward.base(batch), batch)
            total += float((policy - reference).sum())
            rows += int((sizes > 0).sum())
        total, count = ranks.sum(total, float(rows))
        self._divergence = torch.tensor(max(total / max(count, 1.0), 0.0), device=forward.unwrapped.device)

    def terms(self, forward: Forward, batch: Batch) -> Terms:
        """Return the sum over the answers."""
        reference, _ = answers(forward.base(batch), batch)
        output = forward(batch)
        policy, sizes = answers(output, batch)
        losses = preference.kto(policy, reference, batch[DESIRABLE], self._divergence, self._fields)
        return Terms([(losses * (sizes > 0)).sum()], _filled(output.loss))


def step_objective(objective: Objective | None) -> StepObjective:
    """Return the objective that a manifest requests; SFT by default."""
    name = ObjectiveName.SFT if objective is None else objective.name
    classes: dict[ObjectiveName, Callable[[Any], StepObjective]] = {
        ObjectiveName.DPO: PairObjective,
        ObjectiveName.ORPO: OddsRatioObjective,
        ObjectiveName.KTO: LabelledObjective,
    }
    return SupervisedObjective() if name is ObjectiveName.SFT else classes[name](getattr(objective, name))


def answers(output: TargetLoss, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed log-probability of each sequence's targets, and their number: two tensors (sequences,)."""
    each = _filled(output.each)
    # A target is predicted by the token before it.
    positions = (batch["labels"][:, 1:] != IGNORED).nonzero()
    if "cu_seq_lens_q" in batch:
        bounds = batch["cu_seq_lens_q"].long()
        number = torch.bucketize(positions[:, 1] + 1, bounds, right=True) - 1
        sequences = len(bounds) - 1
    else:
        number, sequences = positions[:, 0], len(batch["labels"])
    sums = torch.zeros(sequences, dtype=each.dtype, device=each.device).index_add(0, number, -each)
    return sums, torch.bincount(number, minlength=sequences)


def _targets(row: Row, sequence: int, step: int) -> int:
    """Return the number of targets of every `step`-th sequence of a row, starting with `sequence`."""
    sizes = row.get("seq_lengths")
    bounds = np.cumsum([0, *([len(row["labels"])] if sizes is None else sizes)])
    labels = np.asarray(row["labels"])
    return sum(
        # Nothing precedes the first token, so nothing predicts it.
        int(np.count_nonzero(labels[start + 1 : end] != IGNORED))
        for start, end in zip(bounds[sequence:-1:step], bounds[sequence + 1 :: step], strict=True)
    )


def _inputs(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != DESIRABLE}


def _filled(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None  # noqa: S101 - a model with target_loss fills it
    return value
