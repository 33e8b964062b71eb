from __future__ import annotations

import random

import pytest

from tunesmith.contracts.load import NEGLIGIBLE_RATE, RATE_SECONDS, Load


def test_the_rate_approaches_that_of_steady_arrivals_and_decays_after_them() -> None:
    load, source, now = Load(), random.Random(1), 0.0  # noqa: S311 - not for secrets
    rates = []
    while now < 600:
        now += source.expovariate(20.0)
        load.arrive(1, now)
        rates.append(load.rate(now))
    assert sum(rates[2000:]) / len(rates[2000:]) == pytest.approx(20.0, rel=0.1)
    assert load.rate(now + RATE_SECONDS) == pytest.approx(rates[-1] / 2.718, rel=0.01)
    assert load.rate(now + 60) < NEGLIGIBLE_RATE


def test_a_request_with_several_sequences_counts_as_many() -> None:
    load = Load()
    load.arrive(4, 0.0)
    assert load.rate(0.0) == 4 / RATE_SECONDS


def test_the_service_time_is_known_after_the_first_request_and_follows_recent_ones() -> None:
    load = Load()
    assert load.service_seconds is None
    load.finish(1, 2.0, 10.0)
    assert load.service_seconds == pytest.approx(2.0)
    load.finish(3, 6.0, 10.0)
    assert load.service_seconds == pytest.approx(5.0)
    for second in range(300):
        load.finish(1, 1.0, 10.0 + second)
    assert load.service_seconds == pytest.approx(1.0, rel=0.05)
    assert Load().service_seconds is None


def test_the_mean_of_long_ago_is_kept_until_a_request_finishes() -> None:
    load = Load()
    load.finish(1, 2.0, 0.0)
    assert load.service_seconds == pytest.approx(2.0)
    load.finish(1, 8.0, 1e6)
    assert load.service_seconds == pytest.approx(8.0)
