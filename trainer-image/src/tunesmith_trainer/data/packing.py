"""Pack several rows into one sequence without letting one attend to another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    IntArray = np.ndarray[Any, np.dtype[np.integer[Any]]]


def best_fit_decreasing(lengths: Sequence[int] | IntArray, capacity: int) -> list[list[int]]:
    """Group row indices so that each group has at most `capacity` tokens.

    The longest row is placed first, each where it leaves the least room. Rows of the same length keep their order,
    so the same lengths always give the same groups.

    Args:
        lengths: tokens per row, 1 to `capacity`.
        capacity: tokens of a sequence.
    """
    sizes = np.asarray(lengths)
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    """Bins by their exact remaining room."""
    rooms = 0
    """Bit set of the remaining rooms for which a bin exists."""
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            bins[number].append(index)
        else:
            room, number = capacity, len(bins)
            bins.append([index])
        with_room[room - size].append(number)
        rooms |= 1 << (room - size)
    return bins
