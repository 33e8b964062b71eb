"""Requests that were in flight at crashes: who is refused, for how long, and what a tenant cannot do to others."""

from __future__ import annotations

import time
from itertools import count
from typing import TYPE_CHECKING

import pytest

from tunesmith.contracts.crash import (
    MAX_CRASHED_REQUESTS,
    MAX_LEDGER_REQUESTS,
    CrashedRequest,
    CrashLedger,
    EngineCrash,
    request_digest,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

NOW = 1_800_000_000.0
MODEL = "team/pirate@aaaaaaaaaaaa"
_numbers = count()


def digest(number: int, tenant: str = "a") -> str:
    return tenant * 8 + f"{number:040x}"


def crash(*digests: str, at: float = NOW, model: str = MODEL) -> EngineCrash:
    requests = [CrashedRequest(digest=entry, model=model) for entry in digests]
    return EngineCrash(id=f"{next(_numbers):016x}", at=at, reason="killed", was_ready=True, requests=requests)


@pytest.fixture
def ledger() -> CrashLedger:
    return CrashLedger()


def refused(ledger: CrashLedger, now: float = NOW) -> set[str]:
    return {suspect.digest for suspect in ledger.refused(now)}


def test_a_request_at_two_crashes_is_refused_for_an_hour(ledger: CrashLedger) -> None:
    ledger.record(crash(digest(1), digest(2)), NOW)
    assert refused(ledger) == set()
    first = ledger.find(digest(1), NOW)
    assert first is not None
    assert (first.crashes, first.is_refused) == (1, False)
    ledger.record(crash(digest(1), at=NOW + 100), NOW + 100)
    assert refused(ledger, NOW + 100) == {digest(1)}
    found = ledger.find(digest(1), NOW + 100)
    assert found is not None
    assert (found.crashes, found.model, found.until) == (2, MODEL, NOW + 3700)
    assert refused(ledger, NOW + 3699) == {digest(1)}
    assert refused(ledger, NOW + 3700) == set()
    assert ledger.find(digest(1), NOW + 3700) is None


def test_a_crash_counts_once(ledger: CrashLedger) -> None:
    """Every connection to an agent repeats the crashes of the past hour."""
    report = crash(digest(1))
    assert [ledger.record(report, NOW) for _ in range(3)] == [True, False, False]
    assert refused(ledger) == set()
    assert not ledger.record(crash(digest(1), at=NOW - 3600), NOW)  # too long ago
    assert refused(ledger) == set()


def test_a_clock_that_is_ahead_does_not_extend_the_refusal(ledger: CrashLedger) -> None:
    for _ in range(2):
        ledger.record(crash(digest(1), at=NOW + 1e9), NOW)
    assert refused(ledger, NOW + 3599) == {digest(1)}
    assert refused(ledger, NOW + 3600) == set()


def flood(ledger: CrashLedger, tenant: str, crashes: int) -> None:
    for number in range(crashes):
        first = number * MAX_CRASHED_REQUESTS
        ledger.record(crash(*(digest(first + i, tenant) for i in range(MAX_CRASHED_REQUESTS))), NOW)


def test_a_tenant_that_fills_the_ledger_displaces_only_its_own_requests(ledger: CrashLedger) -> None:
    for _ in range(2):
        ledger.record(crash(digest(1, "b"), digest(2, "c")), NOW)
    ledger.record(crash(digest(3, "b")), NOW)
    started = time.perf_counter()
    flood(ledger, "a", 200)
    assert time.perf_counter() - started < 5
    assert len(ledger._suspects) == MAX_LEDGER_REQUESTS
    assert refused(ledger) == {digest(1, "b"), digest(2, "c")}
    other = ledger.find(digest(3, "b"), NOW)
    assert other is not None


def test_a_refused_request_is_displaced_after_those_at_one_crash(ledger: CrashLedger) -> None:
    for _ in range(2):
        ledger.record(crash(digest(10**6)), NOW)
    flood(ledger, "a", 40)
    assert refused(ledger) == {digest(10**6)}


def test_endless_crashes_take_bounded_memory(ledger: CrashLedger) -> None:
    for _ in range(10_000):
        ledger.record(crash(), NOW)
    assert len(ledger._recorded) <= 4096


def test_a_digest_depends_on_tenant_model_path_and_body() -> None:
    salts = ("s" * 64, "t" * 64)

    def made(
        salt: str = salts[0], path: str = "/v1/completions", model: str = MODEL, body: Iterable[bytes] = ()
    ) -> str:
        return request_digest(salt, path, model, body)

    all_made = {
        made(),
        made(salts[1]),
        made(path="/v1/chat/completions"),
        made(model="team/poet@1"),
        made(body=[b"x"]),
    }
    assert len(all_made) == 5
    assert made(body=[b"ab", b"c"]) == made(body=[b"a", b"bc"])
    assert {len(entry) for entry in all_made} == {48}
    assert made()[:8] == made(body=[b"x"])[:8] != made(salts[1])[:8]
