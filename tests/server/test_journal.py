"""The middleware's journal of the requests in the engine, and its answers when the engine has died."""

from __future__ import annotations

import importlib
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.test_middleware import CHAT, HELLO, POOL, Engine, Exchange, module

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

__all__ = ["module"]  # the fixture
DIGEST = "a" * 48


@pytest.fixture
def journal(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The supervisor's side; the engine has the journal."""
    assert module
    found = importlib.import_module("tunesmith_journal")
    descriptor = found.create()
    monkeypatch.setenv(found.JOURNAL_FD, str(descriptor))
    yield lambda: [(request.digest, request.model) for request in found.read(descriptor, 10)]
    os.close(descriptor)


class DyingEngine(Engine):
    """The engine dies while it processes a request, before its answer begins."""

    def __init__(self, status: int = 500) -> None:
        super().__init__(status)
        self.core = SimpleNamespace(errored=False)

    @property
    def scope(self) -> Any:
        return SimpleNamespace(state=SimpleNamespace(engine_client=self.core))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.core.errored = True
        await super().__call__(scope, receive, send)


def exchange(app: Any, engine: Engine, *, digest: str = DIGEST, **body: Any) -> Exchange:
    made = Exchange(app, CHAT, HELLO | body, token=POOL)
    made._scope["app"] = getattr(engine, "scope", None)
    made._scope["headers"].append((b"x-tunesmith-digest", digest.encode()))
    return made


async def test_a_request_is_in_the_journal_while_it_is_processed(module: ModuleType, journal: Any) -> None:
    engine = Engine()
    seen = []

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        seen.append(journal())
        await engine(scope, receive, send)

    app = module.Middleware(watched)
    assert (await exchange(app, engine).run()).status == 200
    assert (await exchange(app, engine, digest="no digest").run()).status == 200
    assert seen == [[(DIGEST, "m")], []]
    assert journal() == []


async def test_it_stays_in_the_journal_of_an_engine_that_died(module: ModuleType, journal: Any) -> None:
    engine = DyingEngine()
    app = module.Middleware(engine)
    answer = await exchange(app, engine).run()
    assert (b"x-tunesmith-engine-lost", b"true") in answer.sent[0]["headers"]
    assert journal() == [(DIGEST, "m")]
    later = await exchange(app, engine, digest="b" * 48).run()  # it cannot be the cause
    assert (later.status, later.code) == (503, "not_started")
    assert journal() == [(DIGEST, "m")]


async def test_a_stream_of_an_engine_that_died_is_cut_before_its_error(module: ModuleType, journal: Any) -> None:
    engine = DyingEngine(200)
    engine.reply = [b'data: {"error": {"message": "EngineCore encountered an issue"}}\n\n']
    made = exchange(module.Middleware(engine), engine, stream=True)
    with pytest.raises(ConnectionAbortedError):
        await made.run()
    assert made.body == b""
    assert journal() == [(DIGEST, "m")]
