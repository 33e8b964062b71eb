"""The gateway with another choice of pods, for comparison; everything else is the gateway's own.

Run as `python -m benchmarks.routing.gateway PORTS …` with the policy's name in ROUTING_POLICY; PORTS as in
tests.gateway.local_pods_gateway.
"""

from __future__ import annotations

import os
import sys
from itertools import count
from typing import TYPE_CHECKING

import uvloop

from tests.gateway import gateway_process, local_pods_gateway
from tunesmith.gateway import backends
from tunesmith.gateway.routing import choose

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tunesmith.gateway.routing import PodLoad

_TURNS = count()


def _round_robin(pods: Sequence[PodLoad], _weight: int = 1, _conversation: bytes = b"") -> int:
    order = sorted(range(len(pods)), key=lambda index: pods[index].uid)
    return order[next(_TURNS) % len(order)]


def _least_loaded(pods: Sequence[PodLoad], _weight: int = 1, _conversation: bytes = b"") -> int:
    return min(range(len(pods)), key=lambda index: (pods[index].running, pods[index].uid))


def _load_only(pods: Sequence[PodLoad], weight: int = 1, _conversation: bytes = b"") -> int:
    return choose(pods, weight)


POLICIES: dict[str, Callable[..., int]] = {
    "tunesmith": choose,
    "without affinity": _load_only,
    "round-robin": _round_robin,
    "consistent hashing": lambda *_: 0,
    "least-loaded": _least_loaded,
}
"""Functions in the place of `routing.choose`; the pods are in the model's rendezvous order."""


if __name__ == "__main__":
    backends.Backend = local_pods_gateway.Backend  # type: ignore[misc]
    backends.choose = POLICIES[os.environ["ROUTING_POLICY"]]
    uvloop.run(gateway_process.run(0, 0, sys.argv[2:]))
