"""Choice of the pod for a request: consistent hashing with bounded loads. Pure.

Rendezvous hashing (Thaler, Ravishankar 1998) orders the pods that hold a model; the first one whose load stays within
`LOAD_FACTOR` times the mean gets the request (consistent hashing with bounded loads, arXiv:1608.01350). So a model's
requests reach a warm prefix cache while there is room, and spread over all its pods otherwise.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

LOAD_FACTOR = 1.25

T = TypeVar("T")


def rank(model: str, pods: Iterable[T], identity: Callable[[T], str]) -> tuple[T, ...]:
    """Return the pods in the model's own order; adding or removing a pod does not change the order of the others."""

    def weight(pod: T) -> bytes:
        return hashlib.blake2b(f"{model}\0{identity(pod)}".encode(), digest_size=8).digest()

    return tuple(sorted(pods, key=weight))


def choose(loads: Sequence[int], weight: int = 1) -> int:
    """Return the index of the pod that gets the request.

    Args:
        loads: running sequences per pod, in the model's order; not empty.
        weight: sequences of the request.
    """
    bound = math.ceil(LOAD_FACTOR * (sum(loads) + weight) / len(loads))
    for index, load in enumerate(loads):
        if load + weight <= bound:
            return index
    return min(range(len(loads)), key=loads.__getitem__)
