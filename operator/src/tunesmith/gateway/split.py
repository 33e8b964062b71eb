"""Choice of the revision that answers a request during a rollout. Pure.

A request has a point between 0 and 1, and the revisions divide this range by their weights, the newest one first. A
session's point is a hash of the session and the newest revision: a higher weight of the newest revision moves sessions
to it and none away from it, and every rollout begins with other sessions. Without a session, the points of a model's
requests are multiples of the golden ratio, modulo 1, which cover the range evenly after any number of requests (an
additive recurrence, a sequence of low discrepancy), unlike random ones.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_GOLDEN_RATIO = 0.618033988749895
_PRUNE_INTERVAL = 256
MAX_SESSION_BYTES = 1024
"""Bytes of a session's name that count."""


def session_point(session: bytes, newest: str) -> float:
    """Return the point of a session's requests, from 0 to below 1.

    Args:
        session: name of the session.
        newest: name of the newest revision.
    """
    digest = hashlib.blake2b(session[:MAX_SESSION_BYTES] + b"\0" + newest.encode(), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


def in_order(revisions: Sequence[str], weights: Sequence[int], point: float) -> list[str]:
    """Return the revisions that may answer a request, the chosen one first, then those with the highest weights.

    Args:
        revisions: names of the revisions, newest first.
        weights: their weights; a revision without a weight never answers.
        point: the request's point, from 0 to below 1.
    """
    weighted = [(name, weight) for name, weight in zip(revisions, weights, strict=True) if weight > 0]
    rest = point * sum(weight for _, weight in weighted)
    for index, (_, weight) in enumerate(weighted):
        if rest < weight:
            others = sorted(weighted[:index] + weighted[index + 1 :], key=lambda other: -other[1])
            return [weighted[index][0], *(name for name, _ in others)]
        rest -= weight
    return [name for name, _ in reversed(weighted)]


class Points:
    """Points of requests without a session, by name of what they choose from.

    Args:
        exists: returns True if a name still exists; others are forgotten.
    """

    def __init__(self, exists: Callable[[str], bool]) -> None:
        self._exists = exists
        self._points: dict[str, float] = {}

    def next(self, name: str) -> float:
        """Return the next point, from 0 to below 1."""
        point = self._points.get(name)
        if point is None:
            if len(self._points) % _PRUNE_INTERVAL == _PRUNE_INTERVAL - 1:
                self._points = {known: at for known, at in self._points.items() if self._exists(known)}
            point = random.random()  # noqa: S311 - replicas must differ; no secret
        self._points[name] = point = (point + _GOLDEN_RATIO) % 1.0
        return point
