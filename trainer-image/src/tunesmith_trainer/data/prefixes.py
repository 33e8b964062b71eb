"""Rows of one chat begin alike: lay out what they have in common once.

A tree is a row in full, its trunk, and branches: the rest of other rows, each after a prefix that it has in common with
the trunk. A branch attends to that prefix and to itself, so its tokens are computed as those of the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith_trainer.data.encoding import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    IntArray = np.ndarray[Any, np.dtype[np.integer[Any]]]
    Row = tuple[IntArray, IntArray]
    """Tokens and labels."""


_MAX_SHARE = 4
"""Maximum tokens of the whole rows of a tree per token of the tree: attention gathers the keys of whole rows, and the
estimate of memory does not count them."""


@dataclass(frozen=True)
class Trees:
    """Rows as trees; a row that shares nothing is a tree of its own.

    Args:
        rows: indices of the rows, tree by tree, the trunk first.
        starts: tokens of each of these rows that its trunk computes; 0 for a trunk.
        bounds: where each tree begins in `rows`, and the end of the last one.
    """

    rows: IntArray
    starts: IntArray
    bounds: IntArray

    def places(self, trees: Sequence[int]) -> IntArray:
        """Return the places in `rows` of some trees."""
        if len(self.bounds) == len(self.rows) + 1:  # each is one row
            return np.asarray(trees)
        return np.concatenate([np.arange(self.bounds[tree], self.bounds[tree + 1]) for tree in trees])


def trees_of(keys: IntArray, capacity: int, read: Callable[[list[range]], Iterator[list[Row]]]) -> Trees:
    """Return rows as trees of at most `capacity` tokens. Only consecutive rows with the same key are compared.

    Args:
        keys: key per row: the same for the rows of a chat.
        capacity: maximum tokens of a tree.
        read: yields the rows of ranges of indices.
    """
    count = len(keys)
    bounds = np.flatnonzero(np.diff(keys, prepend=~keys[:1], append=~keys[-1:]))
    several = np.flatnonzero(np.diff(bounds) > 1)
    if not len(several):
        return Trees(np.arange(count), np.zeros(count, np.int64), np.arange(count + 1))
    rows, starts, sizes = np.arange(count), np.zeros(count, np.int64), np.ones(count, np.int64)
    chats = [range(int(bounds[number]), int(bounds[number + 1])) for number in several]
    for chat, content in zip(chats, read(chats), strict=True):
        place = chat.start
        for tree in _trees(content, capacity):
            for number, (row, start) in enumerate(tree):
                rows[place], starts[place], sizes[place] = chat.start + row, start, 0 if number else len(tree)
                place += 1
    return Trees(rows, starts, np.cumsum([0, *sizes[sizes > 0]]))


def _trees(rows: Sequence[Row], capacity: int) -> Iterator[list[tuple[int, int]]]:
    """Yield the trees of a chat's rows: the number of each row, and the tokens that its trunk computes."""
    left = list(range(len(rows)))
    while left:
        trunk = left.pop()  # the last answer comes after the most messages
        tree, size = [(trunk, 0)], len(rows[trunk][0])
        others, left, whole = left, [], size
        for number in others:
            start, tokens = shared_tokens(rows[trunk][0], *rows[number]), len(rows[number][0])
            larger = size + tokens - start
            if start == 0:
                yield [(number, 0)]
            elif larger <= capacity and whole + tokens <= _MAX_SHARE * larger:
                tree.append((number, start))
                size, whole = larger, whole + tokens
            else:
                left.append(number)
        yield tree


def shared_tokens(trunk: IntArray, ids: IntArray, labels: IntArray) -> int:
    """Return the number of first tokens of a row that need not be computed again after a trunk.

    One token less than they have in common before the first one that is learned: it is the branch's first token, from
    which the next one is predicted.
    """
    size = min(len(trunk), len(ids))
    different = np.flatnonzero(trunk[:size] != ids[:size])
    learned = np.flatnonzero(labels != IGNORED)
    common: int = min([size, *different[:1].tolist(), *learned[:1].tolist()])
    return max(common - 1, 0)


def sequences(row: Mapping[str, Any]) -> Iterator[Row]:
    """Yield tokens and labels of the whole sequences of a row: itself, or those that are packed in it."""
    ids, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"])
    sizes = row.get("seq_lengths")
    sizes = [len(ids)] if sizes is None else sizes
    prefixes = row.get("prefix_lengths")
    begin = trunk = 0
    for number, size in enumerate(sizes):
        end = begin + int(size)
        prefix = 0 if prefixes is None else int(prefixes[number])
        if prefix:
            yield (
                np.concatenate([ids[trunk : trunk + prefix], ids[begin:end]]),
                np.concatenate([np.full(prefix, IGNORED, labels.dtype), labels[begin:end]]),
            )
        else:
            trunk = begin
            yield ids[begin:end], labels[begin:end]
        begin = end
