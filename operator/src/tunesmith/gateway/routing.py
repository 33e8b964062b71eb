"""Choice of the pod for a request: few active adapters per pod first, the prefix cache second, bounded loads. Pure.

An engine computes as many adapters at a time as it has slots; requests of further ones wait. A request therefore goes
to a pod where its adapter is active, or that has a free slot, whose load stays within `LOAD_FACTOR` times the mean
(consistent hashing with bounded loads, arXiv:1608.01350). An adapter becomes active on another pod only when the load
requires it and a slot is free there, so that busy adapters do not take all slots of all pods.

Rendezvous hashing (Thaler, Ravishankar 1998) orders the pods twice. The conversation's order decides among the pods
where the adapter is active or most slots are free, so each turn of a chat reaches the pod that has its earlier turns in
the prefix cache. Where slots are scarce, the model's order decides on which pod an adapter becomes active.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

LOAD_FACTOR = 1.25

T = TypeVar("T")


def rank(model: str, pods: Iterable[T], identity: Callable[[T], str]) -> tuple[T, ...]:
    """Return the pods in the model's own order; adding or removing a pod does not change the order of the others."""

    def weight(pod: T) -> bytes:
        return hashlib.blake2b(f"{model}\0{identity(pod)}".encode(), digest_size=8).digest()

    return tuple(sorted(pods, key=weight))


class PodLoad(NamedTuple):
    """Load of a pod.

    Attributes:
        running: running sequences.
        excess: number of active adapters, with the model of the request, above the number of slots; at most 0 if it has
            a slot for each.
        active: True if the model of the request is active on it, or needs no slot.
        roomy: True if at least half of the slots remain free with the model of the request.
        uid: the pod's identity in the order of a conversation.
    """

    running: int
    excess: int = 0
    active: bool = True
    roomy: bool = False
    uid: str = ""


def choose(pods: Sequence[PodLoad], weight: int = 1, conversation: bytes = b"") -> int:
    """Return the index of the pod that gets the request.

    Args:
        pods: loads in the model's order; not empty.
        weight: sequences of the request.
        conversation: its identity (`affinity.conversation`); empty: the model's order is used throughout.
    """
    if len(pods) == 1:
        return 0
    bound = math.ceil(LOAD_FACTOR * (sum(pod.running for pod in pods) + weight) / len(pods))
    if conversation:
        warm = [index for index, pod in enumerate(pods) if (pod.active or pod.roomy) and pod.running + weight <= bound]
        if warm:
            return min(warm, key=lambda index: _place(conversation, pods[index].uid)) if len(warm) > 1 else warm[0]

    def preference(index: int) -> tuple[int, int, int]:
        pod = pods[index]
        if not (pod.active or pod.excess <= 0):
            return 3, pod.excess, pod.running
        if pod.running + weight > bound:
            return 2, pod.running, 0
        return (0 if pod.active else 1), 0, 0

    return min(range(len(pods)), key=preference)


def _place(conversation: bytes, uid: str) -> bytes:
    return hashlib.blake2b(uid.encode(), key=conversation, digest_size=8).digest()
