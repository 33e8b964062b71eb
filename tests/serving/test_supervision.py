"""A task of the operator that ends where none should: the process ends, or the watches start again."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith.controller.main import _until
from tunesmith.controller.watching import Watcher


async def forever() -> None:
    await asyncio.Event().wait()


async def test_a_task_that_returns_or_fails_stops_the_process() -> None:
    async def ends() -> None:
        return

    async def fails() -> None:
        raise KeyError("a fault")

    with pytest.raises(RuntimeError, match="permanent task of the operator returned"):
        await _until(asyncio.Event(), forever(), ends())
    with pytest.raises(KeyError):
        await _until(asyncio.Event(), forever(), fails())


async def test_stopping_is_not_an_error() -> None:
    stop = asyncio.Event()
    stop.set()
    await _until(stop, forever())


async def test_cancelled_watches_are_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    """kopf cancels every task of its loop when one of its own ends."""
    faults: list[BaseException] = [asyncio.CancelledError(), RuntimeError("a fault")]
    running = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def operator(*, stop_flag: Any, ready_flag: Any, **_: object) -> None:
        if faults:
            raise faults.pop(0)
        ready_flag.set()
        loop.call_soon_threadsafe(running.set)
        await asyncio.to_thread(stop_flag.wait)

    monkeypatch.setattr("tunesmith.controller.watching.kopf.operator", operator)
    monkeypatch.setattr("tunesmith.controller.watching._MAX_BACKOFF_SECONDS", 0.01)
    ended: list[int] = []
    cluster: Any = SimpleNamespace()
    watcher = Watcher(cluster, (), {}, lambda *_: None, lambda: ended.append(1))
    assert not watcher.died
    watcher.start()
    async with asyncio.timeout(120):
        await running.wait()
    assert watcher.alive
    assert not watcher.died
    assert len(ended) == 2
    await watcher.stop()
    assert not watcher.died
