"""Notification of all tasks that wait for a change."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Broadcast:
    """Change notification that any number of tasks can await.

    Call `next()` before reading the state, then await the returned event: no change in between is missed.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._callbacks: list[Callable[[], None]] = []

    def call(self, callback: Callable[[], None]) -> None:
        """Call a function at every change."""
        self._callbacks.append(callback)

    def next(self) -> asyncio.Event:
        """Return the event that the next change sets."""
        return self._event

    def notify(self) -> None:
        """Wake all tasks that wait for a change."""
        self._event.set()
        self._event = asyncio.Event()
        for callback in self._callbacks:
            callback()


async def wait_for_event(event: asyncio.Event, seconds: float) -> None:
    """Wait for the event or until the timeout, whichever comes first."""
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            await event.wait()
    except TimeoutError:
        return
