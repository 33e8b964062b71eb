"""Select the rows that train, how often, and those held out: pure functions of counts, weights and the seed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.api.dataset import DEFAULT_VALIDATION_FRACTION
from tunesmith_trainer.errors import DatasetInvalidError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith.api.dataset import Dataset

    IntArray = np.ndarray[Any, np.dtype[np.integer[Any]]]


def held_out(keys: IntArray, dataset: Dataset, seed: int) -> tuple[IntArray, IntArray]:
    """Return the indices of training rows and of held-out rows, ascending.

    With a validation set, all rows are trained on and none is held out. Rows with the same key (duplicates, the two
    answers of a pair, or the rows of one chat) are on the same side. So fewer rows may be held out than the fraction
    specifies, and more only if every key has more rows than that.

    Args:
        keys: key of each row.
        dataset: settings, with the fraction.
        seed: seed of the random choice.

    Raises:
        DatasetInvalidError: there is only one key.
    """
    count = len(keys)
    if dataset.validation:
        return np.arange(count), np.arange(0)
    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    if len(sizes) < 2:  # noqa: PLR2004 - one to train on, one to hold out
        raise DatasetInvalidError(
            f"the {count} training rows are copies of one row or come from one chat, which cannot be both trained on"
            " and held out: add other rows, or set dataset.validation"
        )
    fraction = dataset.validation_fraction or DEFAULT_VALIDATION_FRACTION
    room = min(max(1, math.floor(count * fraction + 0.5)), count - 1)
    order = np.random.default_rng(seed).permutation(len(sizes))
    chosen = []
    for number in map(int, order):  # where each key is one row, only the first few are visited
        if sizes[number] <= room:
            chosen.append(number)
            room -= int(sizes[number])
        if not room:
            break
    out = np.isin(group, chosen or order[np.argmin(sizes[order])])
    return np.flatnonzero(~out), np.flatnonzero(out)


def trained_too(scored: IntArray, trained: IntArray) -> IntArray:
    """Return the indices of the scored rows that are trained on too, compared by key."""
    return np.flatnonzero(np.isin(scored, trained))


def weighted(indices: Sequence[int] | IntArray, counts: Sequence[int], weights: Sequence[float], seed: int) -> IntArray:
    """Return row indices, each as often as the weight of its source specifies; the order of the rows is kept.

    Args:
        indices: indices of rows, ascending; rows are ordered by source.
        counts: number of rows per source.
        weights: weight per source.
        seed: seed for choosing the rows of a fractional weight.
    """
    rows = np.asarray(indices, dtype=np.int64)
    ends = np.cumsum(counts)
    times = np.zeros(len(rows), dtype=np.int64)
    for number, weight in enumerate(weights):
        of_source = np.flatnonzero((rows >= ends[number] - counts[number]) & (rows < ends[number]))
        whole = math.floor(weight)
        times[of_source] = whole
        more = math.floor((weight - whole) * len(of_source) + 0.5)
        times[np.random.default_rng((seed, number)).choice(of_source, size=more, replace=False)] += 1
    return np.repeat(rows, times)
