"""The middleware, driven as an ASGI application; what it does inside vLLM is in test_serving_pod.py."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.contracts.agent import pod_tokens
from tunesmith.contracts.traffic import BOUNDS_SECONDS, SHADOW_HEADER, Traffic, TrafficCounts
from tunesmith_server import middleware

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

MODULE = Path(middleware.__path__[0]) / "tunesmith_middleware.py"
KEY, ADMIN, POD_UID = "k" * 32, "a" * 32, "uid-of-the-pod"
POOL = pod_tokens((KEY.encode(),), POD_UID)[0]
CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for variable, token in (("TUNESMITH_SERVING_KEY_FILE", KEY), ("TUNESMITH_ADMIN_TOKEN_FILE", ADMIN)):
        (tmp_path / variable).write_text(token + "\n")
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("TUNESMITH_POD_UID", POD_UID)
    monkeypatch.syspath_prepend(str(MODULE.parent))
    spec = importlib.util.spec_from_file_location("tunesmith_middleware", MODULE)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class Engine:
    """Application after the middleware: echoes the request in two pieces, when the test allows it."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.cut_off = False
        self.breaks = False
        self.bodies: list[bytes] = []
        self.closed: list[str] = []
        self.go = asyncio.Event()
        self.go.set()
        self.reply = [b'{"choices": [], ', b'"usage": {"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2}}']

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            self.closed.append(scope["type"])
            return
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": self.reply[0], "more_body": True})
        await self.go.wait()
        for piece in self.reply[1:]:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if self.breaks:
            raise RuntimeError("the engine has an error")
        if not self.cut_off:
            await send({"type": "http.response.body", "body": b""})
        self.closed.append((await receive())["type"])


class Exchange:
    """One request, and what came back so far."""

    def __init__(
        self, app: Any, /, path: str, body: Any = None, *, method: str = "POST", token: str | None = POOL, **scope: Any
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = [(b"content-length", str(len(data)).encode())]
        headers += [(b"authorization", f"Bearer {token}".encode())] if token else []
        self._messages = [
            {"type": "http.request", "body": data[:5], "more_body": True},
            {"type": "http.request", "body": data[5:]},
        ]
        self._scope = {"type": "http", "method": method, "path": path, "headers": headers, **scope}
        self._app = app
        self.sent: list[dict[str, Any]] = []
        self.answering = asyncio.Event()

    async def run(self) -> Exchange:
        async def receive() -> dict[str, Any]:
            return self._messages.pop(0) if self._messages else {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            self.sent.append(dict(message))
            self.answering.set()

        await self._app(self._scope, receive, send)
        return self

    def hang_up_early(self) -> Exchange:
        self._messages = self._messages[:1]
        return self

    @property
    def status(self) -> int:
        status: int = self.sent[0]["status"]
        return status

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def code(self) -> str:
        code: str = json.loads(self.body)["error"]["code"]
        return code


async def state(app: Any) -> Any:
    return json.loads((await Exchange(app, "/tunesmith/state", method="GET", token=ADMIN).run()).body)


@pytest.mark.parametrize("scope", [{"path": "/health"}, {"path": "/x/health", "root_path": "/x"}])
async def test_health_is_open(module: ModuleType, scope: dict[str, str]) -> None:
    app = module.Middleware(Engine())
    assert (await Exchange(app, body=b"", method="GET", token=None, **scope).run()).status == 200


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        (CHAT, []),
        (CHAT, [(b"authorization", b"Bearer wrong")]),
        (CHAT, [(b"authorization", POOL.encode())]),
        (CHAT, [(b"authorization", b"Basic " + POOL.encode())]),
        (CHAT, [(b"authorization", b"Bearer " + POOL.encode()), (b"authorization", b"Bearer x")]),
        ("/health/", []),
        ("//health", []),
        ("/healthz", []),
        ("/xhealth", []),
    ],
)
async def test_without_the_token_nothing_reaches_the_engine(
    module: ModuleType, path: str, headers: list[tuple[bytes, bytes]]
) -> None:
    engine = Engine()
    exchange = await Exchange(
        module.Middleware(engine), path, HELLO, method="GET", root_path="/x", headers=headers
    ).run()
    assert (exchange.status, exchange.code, engine.bodies) == (401, "invalid_api_key", [])


@pytest.mark.parametrize(("token", "status"), [(POOL, 403), (ADMIN, 200)])
async def test_other_routes_are_the_agents(module: ModuleType, token: str, status: int) -> None:
    app = module.Middleware(Engine())
    assert (await Exchange(app, "/v1/load_lora_adapter", {}, token=token).run()).status == status


async def test_websockets_are_refused_and_lifespan_passes(module: ModuleType) -> None:
    engine = Engine()
    app = module.Middleware(engine)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await app({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send)
    await app({"type": "lifespan"}, None, send)
    assert [message["type"] for message in sent] == ["websocket.close"]
    assert engine.closed == ["lifespan"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b"", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"model": "m", "messages": ' + b"[" * 300 + b"]" * 300 + b"}", "invalid_json"),
        (b'{"model": "m", "messages": [' + b"[]," * 2**20 + b"[]]}", "invalid_json"),
        (b'{"model": "m", "temperature": NaN}', "invalid_json"),
        (b'{"model": "m", "user": "\\ud800"}', "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        ([], "invalid_json"),
        ({"prompt": "x"}, "missing_model"),
        ({"model": ""}, "missing_model"),
        ({"model": 3}, "missing_model"),
    ],
)
async def test_a_body_without_a_model_is_refused(module: ModuleType, body: Any, code: str) -> None:
    engine = Engine()
    exchange = await Exchange(module.Middleware(engine), CHAT, body).run()
    assert (exchange.status, exchange.code, engine.bodies) == (400, code, [])


async def test_a_large_body_is_refused(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BODY_BYTES", 20)
    app = module.Middleware(Engine())
    assert (await Exchange(app, CHAT, {"model": "m", "prompt": "x" * 30}).run()).status == 413
    undeclared = Exchange(
        app, CHAT, {"model": "m", "prompt": "x" * 30}, headers=[(b"authorization", f"Bearer {POOL}".encode())]
    )
    assert (await undeclared.run()).status == 413


async def test_requests_and_tokens_are_counted_while_they_stream(module: ModuleType) -> None:
    engine = Engine()
    engine.go.clear()
    app = module.Middleware(engine)
    exchange = Exchange(app, CHAT, HELLO)
    running = asyncio.create_task(exchange.run())
    await exchange.answering.wait()
    assert (await state(app))["inFlight"] == {"m": 1}
    engine.go.set()
    await running
    after = await state(app)
    assert [json.loads(body) for body in engine.bodies] == [HELLO]
    assert engine.closed == ["http.disconnect"]
    assert after["inFlight"] == {}
    assert after["totals"] == {"m": {"requests": 1, "promptTokens": 3, "completionTokens": 2}}


@pytest.mark.parametrize(
    ("options", "shown"), [(None, False), ({"include_usage": False}, False), ({"include_usage": True}, True)]
)
async def test_usage_of_a_stream_is_sent_only_if_requested(
    module: ModuleType,
    options: dict[str, bool] | None,
    shown: bool,  # noqa: FBT001
) -> None:
    engine = Engine()
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"details":{"cached":0}}}\n\n'
    text = rb'data: {"choices":[{"text":"\"usage\":{\"prompt_tokens\":9}"}]}' + b"\n\n"
    engine.reply = [text, usage, b"data: [DONE]\n\n"]
    app = module.Middleware(engine)
    body = HELLO | {"stream": True} | ({} if options is None else {"stream_options": options})
    exchange = await Exchange(app, CHAT, body).run()
    assert json.loads(engine.bodies[0])["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert exchange.body == text + (usage if shown else b"") + b"data: [DONE]\n\n"
    assert (await state(app))["totals"]["m"] == {"requests": 1, "promptTokens": 3, "completionTokens": 2}


async def test_unknown_models_are_not_counted(module: ModuleType) -> None:
    app = module.Middleware(Engine(status=404))
    await Exchange(app, CHAT, HELLO | {"model": "nobody"}).run()
    assert (await state(app))["totals"] == {}


async def test_a_client_that_leaves_early_is_not_served(module: ModuleType) -> None:
    engine = Engine()
    exchange = await Exchange(module.Middleware(engine), CHAT, HELLO).hang_up_early().run()
    assert (exchange.sent, engine.bodies) == ([], [])


async def test_a_failing_engine_is_not_counted_as_running(module: ModuleType) -> None:
    async def broken(_scope: Any, _receive: Any, _send: Any) -> None:
        raise RuntimeError("broken")

    app = module.Middleware(broken)
    with pytest.raises(RuntimeError):
        await Exchange(app, CHAT, HELLO).run()
    assert (await state(app))["inFlight"] == {}


async def test_draining_refuses_new_requests_and_finishes_running_ones(module: ModuleType) -> None:
    engine = Engine()
    engine.go.clear()
    app = module.Middleware(engine)
    exchange = Exchange(app, CHAT, HELLO)
    running = asyncio.create_task(exchange.run())
    await exchange.answering.wait()
    assert (await Exchange(app, "/tunesmith/drain", b"", token=POOL).run()).status == 403
    assert (await Exchange(app, "/tunesmith/drain", b"", token=ADMIN).run()).status == 200
    refused = await Exchange(app, CHAT, HELLO).run()
    assert (refused.status, refused.code) == (503, "not_started")
    assert (b"x-tunesmith-not-started", b"true") in refused.sent[0]["headers"]
    assert (await state(app))["inFlight"] == {"m": 1}
    engine.go.set()
    await running
    assert exchange.status == 200
    assert (await state(app))["inFlight"] == {}


async def test_every_process_has_its_own_boot_id(module: ModuleType) -> None:
    assert (await state(module.Middleware(Engine())))["bootId"] != (await state(module.Middleware(Engine())))["bootId"]


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda _file: None, "cannot be read (No such file or directory)"),
        (lambda file: file.write_text("short"), "fewer than 16"),
    ],
)
def test_without_token_files_the_engine_does_not_start(
    tmp_path: Path, prepare: Callable[[Path], Any], sentence: str
) -> None:
    prepare(tmp_path / "token")
    for variables, expected in (
        ({"TUNESMITH_SERVING_KEY_FILE": str(tmp_path / "token"), "TUNESMITH_POD_UID": "uid"}, sentence),
        ({"TUNESMITH_POD_UID": "uid"}, "TUNESMITH_SERVING_KEY_FILE is not set"),
    ):
        done = subprocess.run(
            [sys.executable, MODULE], env=variables, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 1
        assert expected in done.stderr
        assert "Traceback" not in done.stderr


USAGE = b',"usage":{"prompt_tokens":%d,"completion_tokens":%d}'


def event(text: str, index: int = 0, usage: bytes = b"") -> bytes:
    return b'data: {"choices":[{"index":%d,"text":"%s"}]%s}\n\n' % (index, text.encode(), usage)


@pytest.mark.parametrize("pieces", [1, 7, 1000])
async def test_tokens_of_a_stream_are_counted_as_they_pass(module: ModuleType, pieces: int) -> None:
    engine = Engine()
    events = [
        event("a", 0, USAGE % (5, 1)),
        event("b", 1, USAGE % (5, 1)),
        event("c", 0, USAGE % (5, 2)),
        event("d", 1),
    ]
    whole = b"".join(events)
    engine.reply = [
        b"",
        *(whole[i : i + max(1, len(whole) // pieces)] for i in range(0, len(whole), max(1, len(whole) // pieces))),
    ]
    engine.cut_off = True  # the client leaves: no last usage comes
    app = module.Middleware(engine)
    exchange = await Exchange(app, CHAT, HELLO | {"stream": True, "n": 2}).run()
    assert exchange.body == b"".join(event(text, index) for text, index in (("a", 0), ("b", 1), ("c", 0), ("d", 1)))
    assert (await state(app))["totals"]["m"] == {"requests": 1, "promptTokens": 5, "completionTokens": 3}


async def test_usage_before_the_end_of_a_reply_is_counted(module: ModuleType) -> None:
    engine = Engine()
    engine.reply = [b'{"choices": []' + USAGE % (3, 2) + b', "prompt_logprobs": [', b"0, " * 10_000, b"0]}"]
    app = module.Middleware(engine)
    await Exchange(app, CHAT, HELLO).run()
    assert (await state(app))["totals"]["m"] == {"requests": 1, "promptTokens": 3, "completionTokens": 2}


async def test_the_engine_gets_the_checked_document(module: ModuleType) -> None:
    engine = Engine()
    twice = b'{"model": "a", "messages": [{"role": "user", "content": "x"}], "n": 1000, "n": 1, "model": "m"}'
    assert (await Exchange(module.Middleware(engine), CHAT, twice).run()).status == 200
    assert engine.bodies[0].count(b'"n"') == engine.bodies[0].count(b'"model"') == 1


async def test_the_agents_requests_are_neither_checked_nor_counted(module: ModuleType) -> None:
    engine = Engine()
    app = module.Middleware(engine)
    assert (await Exchange(app, "/v1/completions", {"anything": 1}, token=ADMIN).run()).status == 200
    assert (await state(app))["totals"] == {}


async def test_only_the_agent_restarts_the_engine(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    exited: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(module, "_exit", lambda code, reason: exited.set_result((code, reason)))
    app = module.Middleware(Engine())
    assert (await Exchange(app, "/tunesmith/restart", {"reason": "x"}, token=POOL).run()).status == 403
    assert (await Exchange(app, "/tunesmith/restart", {}, token=ADMIN).run()).status == 400
    assert (await Exchange(app, "/tunesmith/restart", {"reason": "its canary failed"}, token=ADMIN).run()).status == 200
    assert (await Exchange(app, CHAT, HELLO).run()).code == "not_started"
    code, reason = await exited
    assert code != 0
    assert "its canary failed" in reason


@pytest.mark.parametrize("errored", [True, False])
async def test_a_server_whose_engine_died_exits_with_an_error(
    module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    errored: bool,  # noqa: FBT001
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(module, "_exit", lambda code, _reason: codes.append(code))

    async def application(_scope: Any, receive: Any, _send: Any) -> None:
        while (await receive())["type"] != "lifespan.shutdown":
            pass

    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    without_lora = SimpleNamespace(lora_config=None, model_config=SimpleNamespace(dtype="torch.float32"))

    async def receive() -> Any:
        return messages.pop(0)

    server = SimpleNamespace(
        state=SimpleNamespace(engine_client=SimpleNamespace(errored=errored, vllm_config=without_lora))
    )
    await module.Middleware(application)({"type": "lifespan", "app": server}, receive, None)
    assert codes == ([1] if errored else [])


def test_a_policy_that_cannot_be_read_stops_the_engine(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t" * 32)
    files = {name: str(tmp_path / "token") for name in ("TUNESMITH_SERVING_KEY_FILE", "TUNESMITH_ADMIN_TOKEN_FILE")}
    for text in ("{", "[]", '{"maxChoices": 0}', '{"maxChoices": true}', '{"allowMediaUrls": 1}', '{"unknown": 1}'):
        variables = {**files, "TUNESMITH_POD_UID": "uid", "TUNESMITH_REQUESTS": text}
        done = subprocess.run(
            [sys.executable, MODULE], env=variables, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 1
        assert "TUNESMITH_REQUESTS cannot be used" in done.stderr
        assert "Traceback" not in done.stderr


class LoraEngine(Engine):
    """An engine with an adapter `m`, and the numbers of adapters that were removed."""

    def __init__(self, status: int = 200) -> None:
        super().__init__(status)
        self.removed: list[int] = []
        self.freed = asyncio.Event()
        config = SimpleNamespace(max_loras=2, lora_dtype=None)
        self.vllm_config = SimpleNamespace(lora_config=config, model_config=SimpleNamespace(dtype="torch.float32"))
        self.models = {"m": SimpleNamespace(lora_int_id=7, lora_path="/adapters/m")}
        models = SimpleNamespace(lora_requests=self.models)
        self._state = SimpleNamespace(openai_serving_models=models, engine_client=self)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
        else:
            await super().__call__(scope, receive, send)

    async def remove_lora(self, number: int) -> bool:
        self.removed.append(number)
        self.freed.set()
        return True

    def application(self, module: ModuleType) -> Any:
        """The middleware, with the application in the scope as Starlette puts it there."""
        guarded = module.Middleware(self)

        async def run(scope: Any, receive: Any, send: Any) -> None:
            await guarded({**scope, "app": SimpleNamespace(state=self._state)}, receive, send)

        return run


async def load(app: Any) -> None:
    """Start the server, and load the adapter."""

    async def receive() -> dict[str, str]:
        return {"type": "lifespan.startup"}

    await app({"type": "lifespan"}, receive, None)
    body = {"lora_name": "m", "lora_path": "/adapters/m"}
    assert (await Exchange(app, "/v1/load_lora_adapter", body, token=ADMIN).run()).status == 200


def unload(app: Any) -> Exchange:
    return Exchange(app, "/v1/unload_lora_adapter", {"lora_name": "m"}, token=ADMIN)


async def test_an_unloaded_adapter_leaves_its_slot_once_none_of_its_requests_runs(module: ModuleType) -> None:
    engine = LoraEngine()
    app = engine.application(module)
    await load(app)
    engine.go.clear()
    request = Exchange(app, CHAT, HELLO)
    running = asyncio.create_task(request.run())
    await request.answering.wait()
    unloading = asyncio.create_task(unload(app).run())
    engine.go.set()
    assert (await unloading).status == 200
    await running
    await asyncio.wait_for(engine.freed.wait(), 5)
    assert engine.removed == [7]


async def test_an_unload_frees_the_slot_before_it_answers(module: ModuleType) -> None:
    engine = LoraEngine()
    app = engine.application(module)
    await load(app)
    assert (await state(app))["adapters"]["registered"] == {"m": "/adapters/m"}
    assert (await unload(app).run()).status == 200
    assert engine.removed == [7]
    assert (await state(app))["adapters"]["registered"] == {}


async def test_an_unload_that_is_refused_frees_nothing(module: ModuleType) -> None:
    engine = LoraEngine(status=404)
    assert (await unload(engine.application(module)).run()).status == 404
    assert engine.removed == []


def _with_base() -> Any:
    """Scope of an application whose engine serves a base model named `pool/base`."""
    models = SimpleNamespace(base_model_paths=[SimpleNamespace(name="pool/base")])
    return SimpleNamespace(state=SimpleNamespace(openai_serving_models=models))


async def test_the_base_model_answers_under_further_names(module: ModuleType) -> None:
    engine = Engine()
    app, alias = module.Middleware(engine), "team/whole@0123456789ab"
    scope = {"app": _with_base()}
    names = {"names": [alias]}
    assert (await Exchange(app, "/tunesmith/base-names", names, **scope).run()).status == 403
    assert (await Exchange(app, "/tunesmith/base-names", {"names": "x"}, token=ADMIN, **scope).run()).status == 400
    assert (await Exchange(app, "/tunesmith/base-names", names, token=ADMIN, **scope).run()).status == 200
    assert (await state(app))["adapters"]["baseNames"] == [alias]
    text = b'"choices": [{"text": "{\\"model\\": \\"pool/base\\"}"}], '
    usage = b'"usage": {"prompt_tokens": 3, "completion_tokens": 2}}'
    engine.reply = [b'{"id": "cmpl-1", "created": 7, "model": "pool/base", ', text + usage]
    answer = await Exchange(app, CHAT, {**HELLO, "model": alias}, **scope).run()
    document = json.loads(answer.body)
    assert document["model"] == alias
    assert document["choices"][0]["text"] == '{"model": "pool/base"}'
    assert json.loads(engine.bodies[-1])["model"] == "pool/base"
    assert dict(answer.sent[0]["headers"])[b"content-length"] == str(len(answer.body)).encode()
    event = b'data: {"id": "cmpl-1", "model": "pool/base", "choices": [{"index": 0}], "usage": {"prompt_tokens": 3}}'
    engine.reply = [event[:30], event[30:] + b"\n\n", event + b"\n\ndata: [DONE]\n\n"]
    answer = await Exchange(app, CHAT, {**HELLO, "model": alias, "stream": True}, **scope).run()
    first, second, done, _ = answer.body.split(b"\n\n")
    assert [json.loads(event.removeprefix(b"data: "))["model"] for event in (first, second)] == [alias, alias]
    assert done == b"data: [DONE]"
    assert (await state(app))["totals"][alias]["requests"] == 2
    answer = await Exchange(app, CHAT, {**HELLO, "model": "pool/base", "stream": True}, **scope).run()
    assert b'"model": "pool/base"' in answer.body


async def traffic(app: Any, query: bytes = b"") -> Any:
    request = Exchange(app, "/tunesmith/state", method="GET", token=ADMIN, query_string=query)
    return json.loads((await request.run()).body)["traffic"]


SHADOW = {"headers": [(b"authorization", f"Bearer {POOL}".encode()), (SHADOW_HEADER.encode(), b"true")]}


def test_the_buckets_are_those_of_the_contract(module: ModuleType) -> None:
    assert module.tunesmith_traffic.BOUNDS_SECONDS == BOUNDS_SECONDS
    assert SHADOW_HEADER.encode() == module.tunesmith_traffic.SHADOW_HEADER


async def test_traffic_is_counted_by_adapter_with_its_latencies(module: ModuleType) -> None:
    engine = LoraEngine()
    app = engine.application(module)
    await load(app)
    await Exchange(app, CHAT, HELLO).run()
    engine.reply = [b"", event("a", 0, USAGE % (5, 1)), event("b", 0, USAGE % (5, 2)), b"data: [DONE]\n\n"]
    await Exchange(app, CHAT, HELLO | {"stream": True}).run()
    await Exchange(app, CHAT, HELLO | {"model": "base", "stream": True}).run()
    found = await traffic(app)
    assert found["models"].keys() == {"m"}
    counts = Traffic.model_validate_json(json.dumps(found["models"]["m"]))
    assert (counts.served.requests, counts.served.errors) == (2, 0)
    assert sum(counts.served.first_token.values()) == sum(counts.served.per_output_token.values()) == 1
    assert counts.shadow == TrafficCounts()
    assert (await state(app))["bootId"].startswith(counts.start)


async def test_a_reader_gets_only_the_traffic_that_changed(module: ModuleType) -> None:
    app = LoraEngine().application(module)
    await load(app)
    await Exchange(app, CHAT, HELLO).run()
    first = await traffic(app)
    unchanged = await traffic(app, b"adapters=1&traffic=%d" % first["changes"])
    assert (unchanged["models"], unchanged["changes"]) == ({}, first["changes"])
    await Exchange(app, CHAT, HELLO).run()
    assert (await traffic(app, b"traffic=%d" % first["changes"]))["models"]["m"]["served"]["requests"] == 2
    assert (await traffic(app, b"traffic=3"))["models"].keys() == {"m"}  # the number of another process


@pytest.mark.parametrize(
    ("status", "reply", "stream", "expected"),
    [
        (500, [b"", b'{"error": {}}'], False, (1, 1)),
        (400, [b"", b'{"error": {}}'], False, (0, 0)),
        (404, [b"", b'{"error": {}}'], True, (0, 0)),
        (200, [b"", event("a"), b'data: {"error": {"code": 500}}\n\n', b"data: [DONE]\n\n"], True, (1, 1)),
    ],
    ids=["5xx", "4xx", "404", "an error in the stream"],
)
async def test_errors_are_counted_and_refusals_are_not(
    module: ModuleType,
    status: int,
    reply: list[bytes],
    stream: bool,  # noqa: FBT001
    expected: tuple[int, int],
) -> None:
    engine = LoraEngine()
    app = engine.application(module)
    await load(app)
    engine.status, engine.reply = status, reply
    await Exchange(app, CHAT, HELLO | {"stream": stream}).run()
    models = (await traffic(app))["models"]
    counts = models["m"]["served"] if models else {"requests": 0, "errors": 0}
    assert (counts["requests"], counts["errors"]) == expected


async def test_a_stream_that_breaks_is_an_error_unless_its_client_left(module: ModuleType) -> None:
    engine = LoraEngine()
    app = engine.application(module)
    await load(app)
    engine.cut_off = True  # the engine sees that the client left
    await Exchange(app, CHAT, HELLO | {"stream": True}).run()
    assert (await traffic(app))["models"]["m"]["served"]["errors"] == 0
    engine.breaks = True
    with pytest.raises(RuntimeError):
        await Exchange(app, CHAT, HELLO | {"stream": True}).run()
    counts = (await traffic(app))["models"]["m"]["served"]
    assert (counts["requests"], counts["errors"]) == (2, 1)


async def test_a_mirrored_request_is_counted_apart_and_never_waits_for_a_slot(module: ModuleType) -> None:
    engine = LoraEngine()
    app = engine.application(module)
    await load(app)
    assert (await Exchange(app, CHAT, HELLO, **SHADOW).run()).status == 200
    counts = (await traffic(app))["models"]["m"]
    assert (counts["served"]["requests"], counts["shadow"]["requests"]) == (0, 1)
    for number, name in enumerate(("second", "third"), 8):
        engine.models[name] = SimpleNamespace(lora_int_id=number, lora_path=f"/adapters/{name}")
        body = {"lora_name": name, "lora_path": f"/adapters/{name}"}
        assert (await Exchange(app, "/v1/load_lora_adapter", body, token=ADMIN).run()).status == 200
    engine.go.clear()
    running = []
    for name in ("m", "second"):  # as many as there are slots
        request = Exchange(app, CHAT, HELLO | {"model": name})
        running.append(asyncio.create_task(request.run()))
        await request.answering.wait()
    assert (await Exchange(app, CHAT, HELLO | {"model": "third"}, **SHADOW).run()).code == "not_started"
    engine.go.set()
    await asyncio.gather(*running)
    assert (await Exchange(app, CHAT, HELLO | {"model": "third"}, **SHADOW).run()).status == 200
    assert (await traffic(app))["models"]["third"]["shadow"] == {**counts["shadow"], "requests": 1}


REPORTED = {"input_tokens": 31, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 3, "total_tokens": 34}
CLIENTS_OWN = [{"type": "function", "name": "f", "parameters": {"usage": {"input_tokens": 9000}, "model": "other"}}]
RESPONSE = {
    "id": "resp_1",
    "metadata": {"a": "b"},
    "tools": CLIENTS_OWN,
    "model": "pool/base",
    "usage": REPORTED,
    "user": None,
}
MESSAGE = {"id": "m", "content": [{"type": "text", "text": "{}"}], "model": "pool/base", "usage": REPORTED}


def _event(**members: Any) -> bytes:
    return b"event: x\ndata: " + json.dumps(members).encode() + b"\n\n"


@pytest.mark.parametrize(("path", "reply"), [("/v1/responses", RESPONSE), ("/v1/messages", MESSAGE)])
async def test_a_reply_begins_with_its_model_and_ends_with_its_usage(
    module: ModuleType, path: str, reply: dict[str, Any]
) -> None:
    engine, alias = Engine(), "team/whole@0123456789ab"
    app, scope = module.Middleware(engine), {"app": _with_base()}
    await Exchange(app, "/tunesmith/base-names", {"names": [alias]}, token=ADMIN, **scope).run()
    data = json.dumps(reply).encode()
    engine.reply = [data[:20], data[20:]]
    request = {"model": alias, "input": "x"} if path == "/v1/responses" else {**HELLO, "model": alias, "max_tokens": 5}
    answer = await Exchange(app, path, request, **scope).run()
    document = json.loads(answer.body)
    assert (next(iter(document)), list(document)[-1]) == ("model", "usage")
    assert document == {**reply, "model": alias}
    assert dict(answer.sent[0]["headers"])[b"content-length"] == str(len(answer.body)).encode()
    totals = {"requests": 1, "promptTokens": 31, "completionTokens": 3}
    assert (await state(app))["totals"][alias].items() >= totals.items()


async def test_events_of_responses_begin_with_their_model_and_others_pass(module: ModuleType) -> None:
    engine, alias = Engine(), "team/whole@0123456789ab"
    app, scope = module.Middleware(engine), {"app": _with_base()}
    await Exchange(app, "/tunesmith/base-names", {"names": [alias]}, token=ADMIN, **scope).run()
    created = _event(response={**RESPONSE, "usage": None}, sequence_number=0, type="response.created")
    delta = _event(delta='say "model" and "usage"', type="response.output_text.delta")
    completed = _event(response=RESPONSE, type="response.completed")
    engine.reply = [created[:50], created[50:] + delta, completed]
    answer = await Exchange(app, "/v1/responses", {"model": alias, "input": "x", "stream": True}, **scope).run()
    first, second, third, _ = answer.body.split(b"\n\n")
    for event in (first, third):
        assert event.startswith(b'event: x\ndata: {"response":{"model":"team/whole@0123456789ab",')
    assert second + b"\n\n" == delta
    assert json.loads(third.partition(b"data: ")[2])["response"] == {**RESPONSE, "model": alias}
    totals = {"requests": 1, "promptTokens": 31, "completionTokens": 3}
    assert (await state(app))["totals"][alias].items() >= totals.items()


async def test_events_of_messages_count_their_tokens_once(module: ModuleType) -> None:
    engine = Engine()
    app, scope = module.Middleware(engine), {"app": _with_base()}
    start = _event(type="message_start", message={**MESSAGE, "usage": {"input_tokens": 31, "output_tokens": 0}})
    delta = _event(type="message_delta", usage={"input_tokens": 21, "cache_read_input_tokens": 10, "output_tokens": 3})
    engine.reply = [start, delta]
    body = {**HELLO, "model": "pool/base", "max_tokens": 5, "stream": True}
    answer = await Exchange(app, "/v1/messages", body, **scope).run()
    assert answer.body.startswith(b'event: x\ndata: {"message":{"model":"pool/base",')
    assert answer.body.endswith(delta)
    totals = {"requests": 1, "promptTokens": 31, "completionTokens": 3}
    assert (await state(app))["totals"]["pool/base"].items() >= totals.items()


async def test_an_engine_without_an_api_differs_from_one_without_the_model(module: ModuleType) -> None:
    engine = Engine()
    app = _with_base()
    app.routes = [SimpleNamespace(path="/v1/embeddings"), SimpleNamespace()]
    for path, status in (("/v1/embeddings", 200), ("/v1/rerank", 404)):
        body = {"model": "pool/base", "input": "x", "query": "x", "documents": ["y"]}
        body = {name: body[name] for name in (("model", "input") if status == 200 else ("model", "query", "documents"))}
        answer = await Exchange(module.Middleware(engine), path, body, app=app).run()
        assert answer.status == status
    assert answer.code == "api_not_served"
    assert dict(answer.sent[0]["headers"])[b"x-tunesmith-no-route"] == b"true"
