"""The caches and the work queue, which need no API server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tunesmith.controller.cache import Cache
from tunesmith.controller.reconciler import Key
from tunesmith.controller.workqueue import WorkQueue

Object = dict[str, Any]


def item(name: str, version: int, uid: str = "", owner: str | None = None) -> Object:
    owners = [{"uid": owner}] if owner is not None else []
    metadata = {"name": name, "namespace": "team", "uid": uid or name, "resourceVersion": str(version)}
    return {"kind": "Job", "metadata": {**metadata, "ownerReferences": owners}}


def test_an_older_version_does_not_replace_a_newer_one() -> None:
    cache = Cache("Job")
    assert cache.put(item("a", 5))
    assert not cache.put(item("a", 4))
    assert not cache.put(item("a", 5))
    assert cache.get("team", "a") == item("a", 5)


def test_a_late_event_does_not_bring_a_deleted_object_back() -> None:
    cache = Cache("Job")
    cache.put(item("a", 5))
    assert cache.remove(item("a", 7))
    assert not cache.put(item("a", 6))
    assert cache.get("team", "a") is None
    assert cache.put(item("a", 9, uid="another"))


def test_a_late_deletion_does_not_remove_the_next_object_of_that_name() -> None:
    cache = Cache("Job")
    cache.put(item("a", 9, uid="another"))
    assert not cache.remove(item("a", 7))
    assert cache.get("team", "a") is not None


def test_a_list_yields_missed_changes() -> None:
    cache = Cache("Job")
    for each in (item("kept", 1), item("changed", 2), item("deleted", 3), item("written-after-the-list", 30)):
        cache.put(each)
    changed = cache.replace([item("kept", 1), item("changed", 12), item("new", 11)], "20", lambda _: True)
    assert [each["metadata"]["name"] for each in changed] == ["changed", "new", "deleted"]
    assert {each["metadata"]["name"] for each in cache.list()} == {"kept", "changed", "new", "written-after-the-list"}


def test_a_list_of_a_part_removes_nothing_of_another() -> None:
    cache = Cache("Job")
    cache.put(item("a", 1))
    cache.put(item("b", 2))
    cache.replace([], "9", lambda each: each["metadata"]["name"] == "a")
    assert [each["metadata"]["name"] for each in cache.list()] == ["b"]


def test_owned_follows_changes_and_deletions() -> None:
    cache = Cache("Job")
    cache.put(item("a", 1, owner="x"))
    cache.put(item("b", 2, owner="x"))
    cache.put(item("b", 3, owner="y"))
    assert [each["metadata"]["name"] for each in cache.owned("x")] == ["a"]
    cache.remove(item("a", 4))
    assert cache.owned("x") == []


A, B = Key("Job", "team", "a"), Key("Job", "team", "b")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_key_is_queued_once_and_processed_by_one_worker() -> None:
    queue = WorkQueue()
    for key in (A, B, A):
        queue.add(key)
    assert [await queue.get(), await queue.get()] == [A, B]
    queue.add(A)
    waiting = asyncio.ensure_future(queue.get())
    await asyncio.sleep(0)
    assert not waiting.done()
    queue.done(A)
    assert await waiting == A


async def test_failures_wait_longer_each_time_until_one_success() -> None:
    clock = Clock()
    queue = WorkQueue(clock)
    queue.add(A)
    delays = []
    for _ in range(4):
        assert await queue.get() == A
        delays.append(queue.failed(A))
        assert queue.depth == 0
        clock.now += 60
    assert all(0.05 * 2**n <= delay <= 0.1 * 2**n for n, delay in enumerate(delays))
    assert await queue.get() == A
    queue.done(A)
    queue.add(A)
    assert await queue.get() == A
    assert queue.failed(A) <= 0.1


async def test_a_change_during_a_rest_is_processed_after_it() -> None:
    clock = Clock()
    queue = WorkQueue(clock)
    queue.add(A)
    assert await queue.get() == A
    queue.add(A)
    queue.done(A, rest=2.0)
    queue.add(A)
    assert queue.depth == 0
    clock.now += 2.1
    assert await queue.get() == A
    queue.done(A)
    queue.add(A)
    assert queue.depth == 1


async def test_an_earlier_date_wins_over_a_later_one() -> None:
    clock = Clock()
    queue = WorkQueue(clock)
    queue.add_after(A, 100)
    queue.add_after(A, 5)
    queue.add_after(A, 50)
    clock.now = 5
    assert await queue.get() == A
    queue.done(A)
    clock.now = 200
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.get(), 0.05)


async def test_a_change_during_a_failing_reconcile_is_reconciled_immediately() -> None:
    queue = WorkQueue(Clock())
    queue.add(A)
    assert await queue.get() == A
    queue.add(A)
    queue.failed(A)
    assert await queue.get() == A


async def test_a_worker_is_cancelled_even_if_a_key_is_added_at_the_same_moment() -> None:
    queue = WorkQueue()
    queue.add_after(B, 100.0)
    waiting = asyncio.ensure_future(queue.get())
    for _ in range(5):
        await asyncio.sleep(0)
    queue.add(A)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_worker_whose_keys_need_no_io_lets_others_run() -> None:
    queue = WorkQueue()
    keys = [Key("FineTuneJob", "team", str(number)) for number in range(100)]
    for key in keys:
        queue.add(key)
    left: list[int] = []

    async def other() -> None:
        left.append(len(queue))

    running = asyncio.ensure_future(other())
    for _ in keys:
        queue.done(await queue.get())
    await running
    assert left[0] > 90
