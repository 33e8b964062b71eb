"""Select the rows of an optimizer step, and divide them into micro-batches.

The rows of a step depend only on the seed, the step and the batch size. Ranks and micro-batches only divide them, and
the loss is a sum over target tokens divided by those of the whole step, so neither changes the result.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import Sampler

from tunesmith_trainer.data import IGNORED
from tunesmith_trainer.data.prefixes import sequences
from tunesmith_trainer.training.objectives import DESIRABLE, StepObjective, SupervisedObjective

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from tunesmith_trainer.training.objectives import Row

_READ_ROWS = 1000


class Layout(StrEnum):
    """Layout of the rows of a micro-batch in its tensors."""

    FLAT = "flat"
    """(1, tokens): concatenated, separated by `cu_seq_lens_q`; no padding."""
    PADDED = "padded"
    """(rows, longest): padded on the right, with a mask where there is padding."""


def row_lengths(rows: Dataset) -> NDArray[np.int64]:
    """Return the tokens of each row, read in parts: the rows are never all in memory."""
    parts = rows.select_columns("input_ids").with_format("arrow").iter(_READ_ROWS)
    return np.concatenate([pc.list_value_length(part["input_ids"]).to_numpy() for part in parts]).astype(np.int64)


class StepPlan(Sampler[list[int]]):
    """The rows of each optimizer step of a run.

    Every pass over the rows takes each row once, in a different order; its last step may be smaller. The very first
    step takes the longest rows: the step that needs the most memory runs first, whatever the micro-batch size.

    Args:
        lengths: tokens per row.
        batch_size: rows per optimizer step, over all ranks.
        seed: seed of the order.
        steps: optimizer steps of the run.
    """

    def __init__(self, lengths: Sequence[int] | NDArray[np.int64], batch_size: int, seed: int, steps: int) -> None:
        self._lengths = np.asarray(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._steps = steps

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps of one pass over the rows."""
        return -(-len(self._lengths) // self._batch_size)

    def epoch(self, step: int) -> float:
        """Return the number of passes over the rows after `step` steps."""
        return step / self.steps_per_epoch

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the rows of a pass (counted from 0), in the order in which the steps take them."""
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._lengths))
        if epoch > 0:
            return order
        by_length = order[np.argsort(-self._lengths[order], kind="stable")]
        longest = by_length[: self._batch_size]
        return np.concatenate([longest, order[~np.isin(order, longest)]])

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        order = np.empty(0, dtype=np.int64)
        for step in range(self._steps):
            epoch, index = divmod(step, self.steps_per_epoch)
            if index == 0:
                order = self.order(epoch)
            yield order[index * self._batch_size : (index + 1) * self._batch_size].tolist()


def micro_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Divide row indices into micro-batches of at most `size` rows of similar length, the longest first."""
    indices = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def micro_batches_of_rank(parts: Sequence[list[int]], rank: int, ranks: int) -> list[list[int]]:
    """Return the micro-batches of one rank; if others have one more, an empty one is added.

    Every rank gets the same number, because the ranks' forward and backward passes communicate.
    """
    rounds = -(-len(parts) // ranks)
    own = list(parts[rank::ranks])
    return own + [[] for _ in range(rounds - len(own))]


@dataclass(frozen=True)
class Step:
    """Input of one rank for one optimizer step.

    Attributes:
        micro_batches: micro-batches of the rank.
        counts: divisor of each term of the objective: of the whole step, over all ranks.
        tokens: tokens of the whole step, over all ranks, without padding.
        mismatched: micro-batches of the rank's own mismatched rows, if the objective needs them.
    """

    micro_batches: list[dict[str, Any]]
    counts: tuple[int, ...]
    tokens: int
    mismatched: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Collator:
    """Converts the rows of a step to the micro-batches of a rank.

    Args:
        size: rows per micro-batch.
        pad: token for padding.
        layout: layout of a micro-batch.
        rank: rank of this process.
        ranks: number of ranks.
        objective: counts the divisors of its terms.
        shares_prefixes: True if the model computes prefixes that packed rows share once; otherwise each row is whole.
    """

    size: int
    pad: int
    layout: Layout
    rank: int = 0
    ranks: int = 1
    objective: StepObjective = field(default_factory=SupervisedObjective)
    shares_prefixes: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Step]:
        """Return the rank's share of a step, under the key `step`: a Trainer accepts mappings only."""
        if not self.shares_prefixes:
            rows = [part for row in rows for part in without_shared_prefixes(row)]
        return {
            "step": Step(
                micro_batches=self._micro_batches(rows),
                counts=self.objective.counts(rows),
                tokens=sum(len(row["input_ids"]) for row in rows),
                mismatched=self._micro_batches(mismatched(rows)) if self.objective.mismatched else [],
            )
        }

    def _micro_batches(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        parts = micro_batches([len(row["input_ids"]) for row in rows], self.size)
        own = micro_batches_of_rank(parts, self.rank, self.ranks)
        return [self.join([rows[index] for index in part] if part else [row_without_targets(rows[0])]) for part in own]

    def join(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the tensors of one micro-batch."""
        batch = _flat(rows) if self.layout is Layout.FLAT else _padded(rows, self.pad)
        if DESIRABLE in rows[0]:
            batch[DESIRABLE] = torch.tensor([bool(row[DESIRABLE]) for row in rows])
        return batch


def without_shared_prefixes(row: Row) -> list[Row]:
    """Return a packed row as rows that share no prefixes, each of at most as many tokens."""
    if "prefix_lengths" not in row:
        return [row]
    parts: list[list[tuple[Any, Any]]] = []
    room = 0
    for ids, labels in sequences(row):
        if len(ids) > room:
            parts.append([])
            room = len(row["input_ids"])
        parts[-1].append((ids, labels))
        room -= len(ids)
    return [
        {
            "input_ids": np.concatenate([ids for ids, _ in part]),
            "labels": np.concatenate([labels for _, labels in part]),
            "seq_lengths": [len(ids) for ids, _ in part],
        }
        for part in parts
    ]


def first_whole_rows(rows: Dataset, count: int) -> Dataset:
    """Return the first `count` rows without shared prefixes; all rows if there are no such prefixes."""
    if "prefix_lengths" not in rows.column_names:
        return rows
    first = rows.select(range(min(count, len(rows)))).with_format("numpy")
    return Dataset.from_list([part for row in first for part in without_shared_prefixes(row)])


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a micro-batch with its tensors on a device."""
    return {name: part.to(device) if isinstance(part, torch.Tensor) else part for name, part in batch.items()}


def mismatched(rows: Sequence[Row]) -> list[Row]:
    """Combine each row's prompt with the answer of the row before it (or the last), no longer than the rows.

    Return an empty list for a single row, which has no other.
    """
    if len(rows) == 1:
        return []
    longest = max(len(row["input_ids"]) for row in rows)
    starts = [int(np.argmax(np.asarray(row["labels"]) != IGNORED)) for row in rows]
    result: list[Row] = []
    for index, row in enumerate(rows):
        other, start = rows[index - 1], starts[index - 1]
        prompt, answer = row["input_ids"][: starts[index]], other["input_ids"][start:]
        labels = [*[IGNORED] * len(prompt), *other["labels"][start:]]
        ids = [*prompt, *answer]
        result.append({"input_ids": ids[:longest], "labels": labels[:longest]})
    return result


def row_without_targets(row: Row) -> Row:
    """Return a short row like another one but without targets, for a rank that has nothing to add."""
    ids = row["input_ids"][:1]
    sequences = len(row.get("seq_lengths", [0]))
    result = {"input_ids": [*ids, *ids] * sequences, "labels": [IGNORED] * 2 * sequences}
    if "seq_lengths" in row:
        result["seq_lengths"] = [2] * sequences
    return result | {DESIRABLE: row[DESIRABLE]} if DESIRABLE in row else result


def _padded(rows: Sequence[Row], pad: int) -> dict[str, Any]:
    pieces = [piece for row in rows for piece in sequences(row)]
    longest = max(len(ids) for ids, _ in pieces)
    ids = torch.full((len(pieces), longest), pad)
    labels = torch.full((len(pieces), longest), IGNORED)
    mask = torch.zeros((len(pieces), longest), dtype=torch.long)
    for number, (piece, targets) in enumerate(pieces):
        ids[number, : len(piece)] = torch.as_tensor(piece)
        labels[number, : len(piece)] = torch.as_tensor(targets)
        mask[number, : len(piece)] = 1
    batch = {"input_ids": ids, "labels": labels}
    # Without padding there is nothing to mask, and attention has a faster path.
    return batch if bool(mask.all()) else batch | {"attention_mask": mask}


def _flat(rows: Sequence[Row]) -> dict[str, Any]:
    pieces = [piece for row in rows for piece in _stored_sequences(row)]
    sizes = [len(ids) for ids, _ in pieces]
    bounds = _bounds(sizes)
    ids = torch.cat([torch.as_tensor(ids) for ids, _ in pieces]).long()
    labels = torch.cat([torch.as_tensor(labels) for _, labels in pieces]).long()
    labels[bounds[:-1].long()] = IGNORED  # the token before a sequence does not predict its first
    return {
        "input_ids": ids[None],
        "labels": labels[None],
        "position_ids": torch.cat([torch.arange(size) for size in sizes])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(sizes),
        "max_length_k": max(sizes),
        "sequence_bounds": tuple(bounds.tolist()),
    } | _shared_prefixes(rows, sizes)


def _shared_prefixes(rows: Sequence[Row], sizes: Sequence[int]) -> dict[str, Any]:
    """Return what differs in a batch if sequences continue a prefix of an earlier one."""
    prefixes = [int(size) for row in rows for size in row.get("prefix_lengths", [0] * len(row.get("seq_lengths", [0])))]
    if not any(prefixes):
        return {}
    begins = [0, *itertools.accumulate(sizes)][:-1]
    trunks = list(itertools.accumulate(zip(begins, prefixes, strict=True), _trunk))
    keys = [prefix + size for prefix, size in zip(prefixes, sizes, strict=True)]
    return {
        "position_ids": torch.cat([torch.arange(prefix, end) for prefix, end in zip(prefixes, keys, strict=True)])[
            None
        ],
        "cu_seq_lens_k": _bounds(keys),
        "max_length_k": max(keys),
        "shared_prefixes": tuple((begin, begin + prefix) for (begin, _), prefix in zip(trunks, prefixes, strict=True)),
    }


def _trunk(before: tuple[int, int], sequence: tuple[int, int]) -> tuple[int, int]:
    """Return the last sequence that continues no other one."""
    return before if sequence[1] else sequence


def _bounds(sizes: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)


def _stored_sequences(row: Row) -> Iterator[tuple[Any, Any]]:
    """Yield the sequences of a row: itself, or those of a packed row, without prefixes that they share."""
    start = 0
    sizes = row.get("seq_lengths")
    for size in [len(row["input_ids"])] if sizes is None else sizes:
        yield row["input_ids"][start : start + size], row["labels"][start : start + size]
        start += int(size)
