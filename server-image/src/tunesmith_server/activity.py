"""Use of the engine's models, by which adapters are loaded again after a restart of the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tunesmith.contracts.agent import DesiredAdapter
    from tunesmith_server.engine import EngineState


class Activity:
    """Time at which each model was last observed to be used; outlives the engine's process."""

    def __init__(self) -> None:
        self._used_at: dict[str, float] = {}
        self._boot_id = ""
        self._requests: dict[str, int] = {}

    def observe(self, state: EngineState, now: float) -> None:
        """Observe an engine. `now`: monotonic seconds."""
        before = self._requests if state.boot_id == self._boot_id else {}
        requests = {name: totals.requests for name, totals in state.totals.items()}
        used = {name for name, count in requests.items() if count > before.get(name, 0)}
        self._used_at.update(dict.fromkeys(used | {name for name, count in state.in_flight.items() if count}, now))
        self._boot_id, self._requests = state.boot_id, requests

    def most_recent_first(self, adapters: Iterable[DesiredAdapter]) -> list[DesiredAdapter]:
        """Return the adapters with those used last first; the others keep their order."""
        return sorted(adapters, key=lambda adapter: -self._used_at.get(adapter.engine_name, float("-inf")))

    def forget_others(self, names: Iterable[str]) -> None:
        """Forget all models but these."""
        kept = set(names)
        self._used_at = {name: at for name, at in self._used_at.items() if name in kept}
