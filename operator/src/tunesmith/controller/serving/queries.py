"""PromQL expressions of rollouts, evaluated by the Prometheus that the platform names, while this process leads."""

from __future__ import annotations

import asyncio
import math
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import aiohttp

from tunesmith.contracts.sentence import one_line
from tunesmith.contracts.strict_json import parse_object
from tunesmith.serving.analysis import QueryResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

_INTERVAL = timedelta(seconds=10)
_TICK_SECONDS = 1.0
_TIMEOUT_SECONDS = 5.0
_MAX_BYTES = 64 * 1024
_MAX_VALUES = 4096
_MAX_AT_ONCE = 8
_MAX_PROBLEM = 400


class PrometheusQueries:
    """Latest results of the expressions of each AdapterDeployment.

    Args:
        url: base URL of the Prometheus; empty: there is none.
        now: returns the current time, UTC.
    """

    def __init__(self, url: str, now: Callable[[], datetime]) -> None:
        self._url = url.rstrip("/")
        self._now = now
        self._wanted: dict[str, Mapping[str, str]] = {}
        self._results: dict[str, dict[str, QueryResult]] = {}

    @property
    def is_enabled(self) -> bool:
        """True if expressions are evaluated."""
        return bool(self._url)

    def want(self, uid: str, expressions: Mapping[str, str]) -> None:
        """Set the expressions of an AdapterDeployment, by their name; empty: none."""
        if self._wanted.get(uid, {}) == expressions:
            return
        self._results.pop(uid, None)
        if expressions:
            self._wanted[uid] = expressions
        else:
            self._wanted.pop(uid, None)

    def results(self, uid: str) -> Mapping[str, QueryResult]:
        """Return the latest results of an AdapterDeployment, by the names of the expressions."""
        return self._results.get(uid, {})

    async def run(self) -> None:
        """Evaluate each expression every ten seconds. Runs until cancelled."""
        limit = asyncio.Semaphore(_MAX_AT_ONCE)
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            while True:
                await asyncio.gather(
                    *(self._evaluate(session, limit, uid, name, text) for uid, name, text in self._due())
                )
                await asyncio.sleep(_TICK_SECONDS)

    def _due(self) -> list[tuple[str, str, str]]:
        if not self.is_enabled:
            return []
        oldest = self._now() - _INTERVAL
        return [
            (uid, name, text)
            for uid, expressions in self._wanted.items()
            for name, text in expressions.items()
            if (result := self._results.get(uid, {}).get(name)) is None or result.at <= oldest
        ]

    async def _evaluate(
        self, session: aiohttp.ClientSession, limit: asyncio.Semaphore, uid: str, name: str, text: str
    ) -> None:
        async with limit:
            at = self._now()
            try:
                result = QueryResult(at, value=await self._number(session, text))
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                problem = one_line(str(error) or type(error).__name__, _MAX_PROBLEM)
                result = QueryResult(at, problem=f"Prometheus: {problem}")
            if self._wanted.get(uid, {}).get(name) == text:
                self._results.setdefault(uid, {})[name] = result

    async def _number(self, session: aiohttp.ClientSession, expression: str) -> float:
        """Return the result of an expression.

        Raises:
            ValueError: it is not exactly one number, or the expression is refused.
            ClientError: Prometheus cannot be reached.
        """
        form = {"query": expression, "timeout": f"{_TIMEOUT_SECONDS:g}s"}
        async with session.post(f"{self._url}/api/v1/query", data=form, allow_redirects=False) as response:
            body = await response.content.read(_MAX_BYTES + 1)
            while len(body) <= _MAX_BYTES and not response.content.at_eof():
                body += await response.content.read(_MAX_BYTES + 1 - len(body))
            document = _parsed(body, response.status)
        return number_of(document)


def _parsed(body: bytes, status: int) -> dict[str, Any]:
    try:
        document = parse_object(body, max_bytes=_MAX_BYTES, max_values=_MAX_VALUES)
    except ValueError as error:
        raise ValueError(f"the answer, with status {status}, is not understood: {error}") from None
    if document.get("status") != "success":
        raise ValueError(f"{document.get('errorType', status)}: {document.get('error', 'no reason')}")
    return document


def number_of(document: Mapping[str, Any]) -> float:
    """Return the number in an answer of `/api/v1/query`: a scalar, or a vector of one sample.

    Raises:
        ValueError: it is not exactly one finite number.
    """
    data = document.get("data")
    found = data.get("result") if isinstance(data, dict) else None
    kind = data.get("resultType") if isinstance(data, dict) else None
    if kind == "vector" and isinstance(found, list):
        if len(found) != 1:
            raise ValueError(
                f"the expression has {len(found)} results instead of one: aggregate it, for example by sum()"
            )
        found = found[0].get("value") if isinstance(found[0], dict) else None
    elif kind != "scalar":
        raise ValueError(f"the expression has the type {kind} instead of a scalar or a vector of one sample")
    try:
        value = float(found[1]) if isinstance(found, list) else math.nan
    except (IndexError, TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError("the expression has no finite result yet")
    return value
