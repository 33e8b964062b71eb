"""Wake everybody who waits for a change."""

from __future__ import annotations

import asyncio


class Broadcast:
    """A change that any number of tasks may wait for.

    Take `next()` before looking at the state, look, then wait for what was taken: no change in between is missed.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def next(self) -> asyncio.Event:
        """The event that the next change sets."""
        return self._event

    def fire(self) -> None:
        """Tell a change."""
        self._event.set()
        self._event = asyncio.Event()


async def within(event: asyncio.Event, seconds: float) -> None:
    """Wait for the event, at most so long."""
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            await event.wait()
    except TimeoutError:
        return
