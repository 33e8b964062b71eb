"""Limits of API keys and adapters: requests per minute, tokens per minute and day, and sequences at once.

With Redis, all gateways count together and a limit is exact. Without it, and while it is down, a limit is divided by
the number of gateways and each counts its own part: a load balancer that spreads requests unevenly makes a key reach
its limit early, never late.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from tunesmith.gateway import errors
from tunesmith.gateway.windows import Charge, LocalCounters, Measure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith.contracts.apikey import ApiKey
    from tunesmith.gateway.catalog import Model
    from tunesmith.gateway.shared_counters import SharedCounters
    from tunesmith.gateway.windows import Decision


_ADAPTER = "adapter/"


class Reservation(NamedTuple):
    """Use of limits that is reserved for a request.

    Attributes:
        charges: sequences, which are given back in any case, tokens, which are settled, and requests, which are kept.
        starts: Unix time in seconds at which the window of each charge started.
        headers: what is left of the key's limit of tokens per minute.
    """

    charges: Sequence[Charge]
    starts: Sequence[float]
    headers: dict[str, str]


class Quotas:
    """The use of limits.

    Args:
        replicas: number of gateways that share the limits.
        local: counts of this gateway.
        shared: counts of all gateways; None: no Redis is configured.
    """

    def __init__(self, replicas: int, local: LocalCounters, shared: SharedCounters | None) -> None:
        self._replicas = replicas
        self._local = local
        self._shared = shared

    async def count_request(self, key: ApiKey) -> dict[str, str]:
        """Count a request, and return the headers by which OpenAI's clients see what is left of the key's limit.

        Raises:
            ApiError: 429, the key has used up its requests of the last minute.
        """
        limit = key.requests_per_minute
        if limit is None:
            return {}
        charge = Charge(f"key/{key.name}", Measure.REQUESTS_PER_MINUTE, limit, 1)
        (charge,), decision = await self._admit([charge])
        headers = _headers("requests", limit, charge, decision)
        if decision.refused is not None:
            raise errors.too_many_requests(limit, _whole_seconds(decision.states[0].seconds_until(charge)), headers)
        return headers

    async def reserve(self, key: ApiKey, model: Model, sequences: int, tokens: int) -> Reservation | None:
        """Reserve what a request may use of the limits of its key and its model, or return None if there are none.

        Raises:
            ApiError: 429, a limit is used up; 400, the request alone needs more.
        """
        owner = f"key/{key.name}"
        wanted = [
            (owner, Measure.CONCURRENCY, key.max_concurrency, sequences),
            (owner, Measure.TOKENS_PER_MINUTE, key.tokens_per_minute, tokens),
            (owner, Measure.TOKENS_PER_DAY, key.tokens_per_day, tokens),
        ]
        if model.limits is not None:
            adapter = f"{_ADAPTER}{model.id}"
            wanted += [
                (adapter, Measure.CONCURRENCY, model.limits.max_concurrency, sequences),
                (adapter, Measure.REQUESTS_PER_MINUTE, model.limits.requests_per_minute, 1),
                (adapter, Measure.TOKENS_PER_MINUTE, model.limits.tokens_per_minute, tokens),
            ]
        charges = [Charge(*charge) for charge in wanted if charge[2] is not None]  # type: ignore[arg-type]
        if not charges:
            return None
        for charge in charges:
            self._check_alone(charge)
        counted, decision = await self._admit(charges)
        if decision.refused is not None:
            state, refused = decision.states[decision.refused], counted[decision.refused]
            raise _refusal(charges[decision.refused], _whole_seconds(state.seconds_until(refused)))
        headers = {}
        for charge, state in zip(counted, decision.states, strict=True):
            if charge.measure is Measure.TOKENS_PER_MINUTE and charge.owner == owner:
                headers = _headers("tokens", key.tokens_per_minute or 0, charge, decision._replace(states=(state,)))
        return Reservation(charges, [state.start for state in decision.states], headers)

    def settle(self, reservation: Reservation, tokens: int) -> None:
        """Give back the sequences of a request, and count the tokens that it used instead of those reserved.

        A window that ended meanwhile keeps its count.
        """
        for charge, start in zip(reservation.charges, reservation.starts, strict=True):
            if charge.measure is Measure.REQUESTS_PER_MINUTE:
                continue
            change = -charge.cost if charge.measure is Measure.CONCURRENCY else tokens - charge.cost
            if change:
                self._local.settle(charge, start, change)
                if self._shared is not None:
                    self._shared.change(charge, start, change)

    async def _admit(self, charges: list[Charge]) -> tuple[list[Charge], Decision]:
        """Return the charges with the limits that were applied, and the decision."""
        decision = await self._shared.admit(charges) if self._shared is not None else None
        if decision is not None:
            if decision.refused is None:
                self._local.record(charges, decision)
            return charges, decision
        parts = [charge._replace(limit=self._part(charge.limit)) for charge in charges]
        decision = self._local.admit(parts)
        if self._shared is not None and decision.refused is None:
            for charge, state in zip(charges, decision.states, strict=True):
                self._shared.change(charge, state.start, charge.cost)
        return parts, decision

    def _check_alone(self, charge: Charge) -> None:
        """Raise if a charge exceeds its limit even when nothing else is used.

        Raises:
            ApiError: 400.
        """
        limit = charge.limit if self._shared is not None else self._part(charge.limit)
        if charge.cost <= limit:
            return
        whose = _whose(charge)
        if charge.measure is Measure.CONCURRENCY:
            raise errors.too_many_sequences_for_limit(charge.cost, limit, whose)
        raise errors.too_many_tokens_for_limit(charge.cost, limit, whose)

    def _part(self, limit: int) -> int:
        return math.ceil(limit / self._replicas)


def _whose(charge: Charge) -> str:
    """Return the subject of a sentence about a limit."""
    if charge.owner.startswith(_ADAPTER):
        return f"The adapter {charge.owner.removeprefix(_ADAPTER)}"
    return "Your API key"


def _refusal(charge: Charge, seconds: int) -> errors.ApiError:
    whose = _whose(charge)
    if charge.measure is Measure.CONCURRENCY:
        return errors.too_many_running(charge.limit, whose)
    if charge.measure is Measure.REQUESTS_PER_MINUTE:
        return errors.too_many_requests(charge.limit, seconds, {}, whose)
    unit = "day" if charge.measure is Measure.TOKENS_PER_DAY else "minute"
    return errors.too_many_tokens(charge.limit, unit, seconds, whose)


def _whole_seconds(seconds: float) -> int:
    return max(1, math.ceil(seconds))


def _headers(what: str, limit: int, charge: Charge, decision: Decision) -> dict[str, str]:
    """Return OpenAI's headers about a limit of requests or tokens."""
    state = decision.states[0]
    refused = decision.refused is not None
    seconds = state.seconds_until(charge) if refused else state.seconds_until_reset(charge.measure)
    return {
        f"x-ratelimit-limit-{what}": str(limit),
        f"x-ratelimit-remaining-{what}": str(max(0, charge.limit - state.used(charge.measure))),
        f"x-ratelimit-reset-{what}": f"{_whole_seconds(seconds)}s",
    }
