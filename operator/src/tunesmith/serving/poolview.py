"""Detection of changes of a pool that affect the status of its adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunesmith.serving.pod import PoolPod


@dataclass(frozen=True)
class PoolView:
    """Pods of a pool, and the reasons why there is no room for copies, by engine name."""

    pods: Sequence[PoolPod]
    unplaced: Mapping[str, str]

    def changed_since(self, before: PoolView | None) -> set[str] | None:
        """Return the engine names whose adapters must be reconciled; None: all attached adapters."""
        if before is None or [_facts(pod) for pod in self.pods] != [_facts(pod) for pod in before.pods]:
            return None
        names = {name for name, _ in self.unplaced.items() ^ before.unplaced.items()}
        for pod, old in zip(self.pods, before.pods, strict=True):
            if pod.state is not old.state:
                held, had = pod.adapters, old.adapters
                names |= {name for name in held.keys() | had.keys() if held.get(name) != had.get(name)}
        return names


def _facts(pod: PoolPod) -> tuple[object, ...]:
    """Return the properties of a pod that affect every adapter of its pool."""
    return pod.uid, pod.ready, pod.stopping, pod.is_reporting, pod.answering
