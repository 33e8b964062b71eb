"""Client of the pod's vLLM: observes its state and adapters, and loads and unloads adapters."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from tunesmith.contracts.traffic import Traffic

if TYPE_CHECKING:
    from collections.abc import Mapping

POLL_SECONDS = 10.0
"""Timeout of a status request to a running engine. A dead engine refuses the connection immediately."""
LOAD_SECONDS = 120.0
COMPLETE_SECONDS = 600.0
"""Timeout of the agent's own completion request. The guard decides sooner."""
_PROCESSED = re.compile(
    r"^vllm:(?:prompt_tokens_total|generation_tokens_total|iteration_tokens_total_sum)(?:\{[^}]*\})? (\S+)$",
    re.MULTILINE,
)

log = logging.getLogger(__name__)


class EngineDownError(Exception):
    """The engine does not answer: it is starting, has exited, or hangs."""


class EngineSilentError(EngineDownError):
    """The engine accepted a request and did not answer in time."""


class EngineLostError(EngineDownError):
    """The engine closed the connection while it processed a request: it has probably died."""


class RequestRefusedError(Exception):
    """The engine refused a request of the agent."""


class LoadRefusedError(Exception):
    """The engine refused to load or unload an adapter."""


class ModelTotals(BaseModel):
    """Requests and tokens that one process of the engine has processed for a model so far."""

    model_config = ConfigDict(alias_generator=to_camel)

    requests: int
    prompt_tokens: int
    completion_tokens: int


class EngineAdapters(BaseModel):
    """Part of the middleware's state about adapters.

    Attributes:
        version: changes whenever an adapter is registered or removed.
        slots: number of adapters that compute at the same time; None: unlimited.
        running: number of adapters with requests in slots.
        waiting: number of adapters whose requests wait for a slot.
        memory_bytes: size of the engine's cache of adapters.
        memory_limit_bytes: highest size of that cache; None: unlimited.
        reloads: number of times that the engine read an adapter's files again.
        data_type: data type of the engine's weights, or their quantisation; empty: unknown.
        base_names: further names of the base model.
        registered: path of every adapter that accepts requests, by name; None: as in the version that the agent has.
        leaving: paths of unloaded adapters that the engine may still read.
    """

    model_config = ConfigDict(alias_generator=to_camel)

    version: int = 0
    slots: int | None = None
    running: int = 0
    waiting: int = 0
    memory_bytes: int = 0
    memory_limit_bytes: int | None = None
    reloads: int = 0
    data_type: str = ""
    base_names: list[str] = Field(default_factory=list)
    registered: dict[str, str] | None = None
    leaving: list[str] | None = None


class EngineTraffic(BaseModel):
    """Part of the middleware's state about traffic.

    Attributes:
        changes: number of the latest change.
        models: traffic of the models whose traffic changed since the number that the agent has.
    """

    changes: int = 0
    models: dict[str, Traffic] = Field(default_factory=dict)


class EngineState(BaseModel):
    """Response of the middleware's `GET /tunesmith/state`.

    Every process of the engine has another `boot_id`, and every start of its container another `supervisor`.
    `started_at`: start of the process, in seconds since 1970; 0 if unknown. `can_constrain`: True if the engine can
    constrain answers to a grammar.
    """

    model_config = ConfigDict(alias_generator=to_camel)

    boot_id: str
    supervisor: str = ""
    started_at: float = 0.0
    draining: bool
    in_flight: dict[str, int]
    totals: dict[str, ModelTotals]
    can_constrain: bool = True
    adapters: EngineAdapters = Field(default_factory=EngineAdapters)
    traffic: EngineTraffic = Field(default_factory=EngineTraffic)


@dataclass(frozen=True)
class EngineSnapshot:
    """Snapshot of a running engine.

    Attributes:
        state: state of the middleware.
        resident: path of every loaded adapter, by name.
        leaving: paths of unloaded adapters that the engine may still read.
        traffic: traffic by model since the start of the engine's process.
        base: name of the base model.
        length: longest request, in tokens.
    """

    state: EngineState
    resident: dict[str, str]
    base: str = ""
    length: int = 2048
    leaving: frozenset[str] = frozenset()
    traffic: dict[str, Traffic] = field(default_factory=dict)


class EngineClient:
    """Client of vLLM's API with the agent's token.

    Args:
        session: HTTP session.
        url: URL of the engine, such as http://127.0.0.1:8000.
        admin_token: admin token of the middleware.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, admin_token: str) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {admin_token}"}
        self._last: EngineSnapshot | None = None

    async def observe(self) -> EngineSnapshot:
        """Return a snapshot of the engine.

        Raises:
            EngineDownError: the engine does not answer, or its health check fails.
        """
        status, _ = await self._call("GET", "/health", POLL_SECONDS)
        if status != 200:  # noqa: PLR2004 - HTTP
            raise EngineDownError(f"the engine's health check answers {status}")
        last = self._last
        known = last.state if last is not None else None
        seen = "" if known is None else f"?adapters={known.adapters.version}&traffic={known.traffic.changes}"
        try:
            state = EngineState.model_validate_json(await self._call_text("GET", f"/tunesmith/state{seen}"))
            if last is None or last.state.boot_id != state.boot_id:
                base, length = await self._base()
            else:
                base, length = last.base, last.length
        except (ValidationError, KeyError, TypeError, AttributeError, StopIteration, ValueError) as error:
            raise EngineDownError(f"the engine's answer is malformed: {error}") from None
        if state.adapters.registered is not None:
            resident, leaving = state.adapters.registered, frozenset(state.adapters.leaving or ())
        elif last is not None and last.state.adapters.version == state.adapters.version:
            resident, leaving = last.resident, last.leaving
        else:
            raise EngineDownError("the engine's answer does not list its adapters")
        traffic = last.traffic if last is not None and last.state.boot_id == state.boot_id else {}
        if state.traffic.models:
            names = resident.keys() | set(state.adapters.base_names)
            traffic = {name: counts for name, counts in (traffic | state.traffic.models).items() if name in names}
        self._last = EngineSnapshot(state, resident, base, length, leaving, traffic)
        return self._last

    async def _base(self) -> tuple[str, int]:
        """Return the name of the base model and its longest request, in tokens."""
        models = await self._call_json("GET", "/v1/models")
        base = next(entry for entry in models["data"] if entry.get("parent") is None)
        return str(base["id"]), int(base.get("max_model_len") or 2048)

    async def load(self, name: str, path: str) -> None:
        """Load an adapter from a folder.

        Raises:
            LoadRefusedError: the engine refuses to load the adapter, or has other weights loaded under the name.
            EngineSilentError: the engine did not finish in LOAD_SECONDS.
            EngineLostError: the engine died meanwhile.
            EngineDownError: the engine does not answer.
        """
        status, text = await self._call(
            "POST", "/v1/load_lora_adapter", LOAD_SECONDS, {"lora_name": name, "lora_path": path}
        )
        if status == 200:  # noqa: PLR2004 - HTTP
            return
        if status == 400:  # noqa: PLR2004 - HTTP
            try:
                if (await self.observe()).resident.get(name) == path:
                    return
            except EngineSilentError as error:
                raise EngineDownError(str(error)) from None
        raise LoadRefusedError(f"vLLM refused to load it ({status}): {text}")

    async def unload(self, name: str) -> None:
        """Unload an adapter; do nothing if it is not loaded.

        Raises:
            LoadRefusedError: the engine refuses to unload the adapter.
            EngineDownError: the engine does not answer.
        """
        status, text = await self._call("POST", "/v1/unload_lora_adapter", POLL_SECONDS, {"lora_name": name})
        if status not in {200, 404}:
            raise LoadRefusedError(f"vLLM refused to unload it ({status}): {text}")

    async def drain(self) -> None:
        """Make the engine refuse new requests from now on.

        Raises:
            EngineDownError: the engine does not answer.
        """
        await self._call_json("POST", "/tunesmith/drain")

    async def complete(self, body: dict[str, object], path: str = "/v1/completions") -> str:
        """Send a completion request of the agent and return the reply's text, also for a server error.

        Args:
            body: the request.
            path: route of the request.

        Raises:
            RequestRefusedError: the engine refuses the request.
            EngineDownError: the engine does not answer.
        """
        status, text = await self._call("POST", path, COMPLETE_SECONDS, body, shorten=False)
        if status != 200:  # noqa: PLR2004 - HTTP
            log.warning("the engine answers %d to a request of the agent: %s", status, _message(text))
        if 400 <= status < 500:  # noqa: PLR2004 - HTTP
            raise RequestRefusedError(_message(text))
        return text

    async def processed_tokens(self) -> float:
        """Return a number that grows with every token that the engine processes, from vLLM's own counters.

        Raises:
            EngineDownError: the engine does not answer.
        """
        _, text = await self._call("GET", "/metrics", POLL_SECONDS)
        return sum(float(value) for value in _PROCESSED.findall(text))

    async def set_base_names(self, names: list[str]) -> None:
        """Set all further names under which the base model answers.

        Raises:
            EngineDownError: the engine does not answer.
        """
        status, text = await self._call("POST", "/tunesmith/base-names", POLL_SECONDS, {"names": names})
        if status != 200:  # noqa: PLR2004 - HTTP
            raise EngineDownError(f"the engine answers {status} to the names of its base model: {text}")

    async def restart(self, reason: str, *, hung: bool) -> None:
        """Make the engine's process exit, so that its supervisor starts another.

        Args:
            reason: a sentence.
            hung: True if the engine hangs, which counts as a crash.

        Raises:
            EngineDownError: the engine does not answer.
        """
        await self._call("POST", "/tunesmith/restart", POLL_SECONDS, {"reason": reason, "hung": hung})

    async def _call_text(self, method: str, path: str) -> str:
        status, text = await self._call(method, path, POLL_SECONDS)
        if status != 200:  # noqa: PLR2004 - HTTP
            raise EngineDownError(f"the engine answers {status} to {method} {path}: {text}")
        return text

    async def _call_json(self, method: str, path: str) -> Any:  # noqa: ANN401 - JSON
        text = await self._call_text(method, path)
        try:
            return json.loads(text)
        except ValueError as error:
            raise EngineDownError(f"the engine's answer to {path} is not JSON: {error}") from None

    async def _call(
        self, method: str, path: str, seconds: float, body: Mapping[str, object] | None = None, *, shorten: bool = True
    ) -> tuple[int, str]:
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.request(
                method, self._url + path, json=body, headers=self._headers, timeout=timeout, allow_redirects=False
            ) as response:
                text = await response.text()
                return response.status, _message(text) if body is not None and shorten else text
        except TimeoutError as error:
            raise EngineSilentError(f"the engine has not answered for {seconds:.0f} s") from error
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise EngineDownError(f"the engine does not answer ({type(error).__name__})") from None
        except (aiohttp.ClientError, OSError) as error:
            raise EngineLostError(f"the engine closed the connection ({type(error).__name__})") from None


def _message(text: str) -> str:
    """Return the message in vLLM's error, at most 500 characters."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return str(text)[:500]
