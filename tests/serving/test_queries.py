"""PromQL expressions of rollouts, against a server with the HTTP API of Prometheus."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from tunesmith.controller.serving.queries import PrometheusQueries, number_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tunesmith.serving.analysis import QueryResult

SECONDS = 120
VECTOR = {"resultType": "vector", "result": [{"metric": {}, "value": [1700000000.0, "0.25"]}]}


class Clock:
    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time


class Prometheus:
    """Answers `/api/v1/query` as Prometheus does."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, Any]] = {}
        self.asked: list[str] = []
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        form = await request.post()
        query = str(form["query"])
        self.asked.append(query)
        status, body = self.answers.get(query, (200, {"status": "success", "data": VECTOR}))
        return web.Response(status=status, body=body if isinstance(body, bytes) else json.dumps(body).encode())


@pytest.fixture
async def prometheus() -> AsyncIterator[Prometheus]:
    found = Prometheus()
    application = web.Application()
    application.add_routes([web.post("/prefix/api/v1/query", found.answer)])
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}/prefix/"
    yield found
    await runner.cleanup()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def queries(prometheus: Prometheus, clock: Clock) -> AsyncIterator[PrometheusQueries]:
    made = PrometheusQueries(prometheus.url, clock)
    task = asyncio.create_task(made.run())
    yield made
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def result_of(queries: PrometheusQueries, name: str, after: datetime | None = None) -> QueryResult:
    async with asyncio.timeout(SECONDS):
        while True:
            found = queries.results("uid").get(name)
            if found is not None and (after is None or found.at > after):
                return found
            await asyncio.sleep(0.05)


async def test_a_number_is_the_result_and_is_renewed(
    queries: PrometheusQueries, prometheus: Prometheus, clock: Clock
) -> None:
    queries.want("uid", {"name in the spec": "expression"})
    first = await result_of(queries, "name in the spec")
    assert (first.value, first.problem, first.at) == (0.25, "", clock.time)
    assert prometheus.asked == ["expression"]
    prometheus.answers["expression"] = 200, {"status": "success", "data": {"resultType": "scalar", "result": [1, "2"]}}
    clock.time += timedelta(seconds=11)
    assert (await result_of(queries, "name in the spec", first.at)).value == 2.0
    queries.want("uid", {})
    assert queries.results("uid") == {}


@pytest.mark.parametrize(
    ("status", "body", "problem"),
    [
        (400, {"status": "error", "errorType": "bad_data", "error": "1:5: parse error"}, "bad_data: 1:5: parse error"),
        (502, b"<html>", "the answer, with status 502, is not understood: it is not a JSON object"),
        (200, b"{" + b" " * 70_000 + b"}", "is not understood: it has 65537 bytes"),
        (200, {"status": "success", "data": {"resultType": "vector", "result": []}}, "has 0 results instead of one"),
        (
            200,
            {"status": "success", "data": {"resultType": "scalar", "result": [1, "NaN"]}},
            "the expression has no finite result yet",
        ),
        (302, b"", "not understood"),
    ],
)
async def test_anything_else_is_a_problem(
    status: int, body: Any, problem: str, queries: PrometheusQueries, prometheus: Prometheus
) -> None:
    prometheus.answers["expression"] = status, body
    queries.want("uid", {"name": "expression"})
    found = await result_of(queries, "name")
    assert found.value is None
    assert problem in found.problem


async def test_a_server_that_does_not_answer_is_a_problem(clock: Clock) -> None:
    made = PrometheusQueries("http://127.0.0.1:1", clock)
    task = asyncio.create_task(made.run())
    made.want("uid", {"name": "expression"})
    assert "Cannot connect" in (await result_of(made, "name")).problem
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(
    "data", [None, [], {"resultType": "matrix", "result": []}, {"resultType": "vector", "result": [3]}, {"result": {}}]
)
def test_a_document_of_another_shape_is_no_number(data: Any) -> None:
    with pytest.raises(ValueError, match="the expression has"):
        number_of({"data": data})
