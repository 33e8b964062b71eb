"""Last use of API keys, for the operator."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from tunesmith.contracts.agent import MAX_USED_KEYS
from tunesmith.contracts.keyuse import KEY_USE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable


class KeyUse:
    """Time at which each key was used, recorded at most once in `KEY_USE_SECONDS`.

    Args:
        wall_clock: Unix time in seconds.
    """

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._times: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._sequence = 0

    def record(self, name: str) -> None:
        """Record that a key is used now."""
        known = self._times.get(name)
        now = int(self._wall_clock())
        if known is not None and now - known[1] < KEY_USE_SECONDS:
            return
        self._sequence += 1
        self._times[name] = (self._sequence, now)
        self._times.move_to_end(name)
        if len(self._times) > MAX_USED_KEYS:
            self._times.popitem(last=False)

    def since(self, sequence: int) -> tuple[int, dict[str, int]]:
        """Return the number of the latest record, and the times by key of those after `sequence`."""
        found = {}
        for name, (recorded, at) in reversed(self._times.items()):
            if recorded <= sequence:
                break
            found[name] = at
        return self._sequence, found
