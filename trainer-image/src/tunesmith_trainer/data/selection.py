"""Which rows train, how often, and which are held out: pure functions of counts, weights and the seed."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.api.dataset import DEFAULT_VALIDATION_FRACTION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith.api.dataset import Dataset

    IntArray = np.ndarray[Any, np.dtype[np.integer[Any]]]


def held_out(count: int, dataset: Dataset, seed: int) -> tuple[list[int], list[int]]:
    """Which of `count` training rows train, and which are held out: all and none where there is a validation set."""
    if dataset.validation:
        return list(range(count)), []
    fraction = dataset.validation_fraction or DEFAULT_VALIDATION_FRACTION
    size = min(max(1, math.floor(count * fraction + 0.5)), count - 1)
    chosen = sorted(random.Random(seed).sample(range(count), size))  # noqa: S311 - reproducible on purpose
    out = set(chosen)
    return [index for index in range(count) if index not in out], chosen


def weighted(places: Sequence[int], counts: Sequence[int], weights: Sequence[float], seed: int) -> IntArray:
    """Places of rows, each as often as the weight of its source says; the order of the rows stays.

    Args:
        places: ascending, of rows that stand source after source.
        counts: rows of each source.
        weights: of each source.
        seed: chooses the rows that a fraction takes.
    """
    rows = np.asarray(places, dtype=np.int64)
    ends = np.cumsum(counts)
    times = np.zeros(len(rows), dtype=np.int64)
    for number, weight in enumerate(weights):
        mine = np.flatnonzero((rows >= ends[number] - counts[number]) & (rows < ends[number]))
        whole = math.floor(weight)
        times[mine] = whole
        more = math.floor((weight - whole) * len(mine) + 0.5)
        times[np.random.default_rng((seed, number)).choice(mine, size=more, replace=False)] += 1
    return np.repeat(rows, times)
