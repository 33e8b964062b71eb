"""Adapters of the engine: which of them compute at the same time, and what they occupy in memory.

This module runs inside vLLM's API server, so it uses the standard library, and of vLLM only what its API server has.

vLLM registers more adapters than it has slots: those of the running requests are in slots, and others are in a cache in
the main memory. An adapter that is in neither is read from its files again, in the engine's step.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import secrets
import struct
import sys
import tempfile
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping

TURN_SECONDS = 3.0
"""Time for which an adapter keeps its slot with new requests while other adapters wait for one."""
_EMPTY_ADAPTER = 2**30
"""First number of the empty adapters; vLLM numbers its own from 1."""
_WEIGHTS = "adapter_model.safetensors"
_MAX_HEADER = 100_000_000
_MAX_MODULES = 40
_VALUE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass
class _Queued:
    """Requests that wait for their adapter's slot."""

    waiters: list[asyncio.Future[None]] = field(default_factory=list)


class Slots:
    """Admission of requests, so that at most `count` adapters have running requests.

    An adapter that has a slot keeps it while it has running requests. Requests of an adapter without a slot wait, and
    are admitted together when it gets one; adapters get slots in the order in which their first requests arrived. So
    that none starves, the adapters that have had a slot the longest, and for `TURN_SECONDS`, release it: their new
    requests wait too. As many do so as adapters wait for a slot.

    Args:
        count: number of slots; None: unlimited.
        clock: monotonic seconds.
    """

    def __init__(self, count: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.count = count
        self._clock = clock
        self._running: dict[str, int] = {}
        self._since: dict[str, float] = {}
        self._queue: dict[str, _Queued] = {}

    @property
    def running(self) -> Collection[str]:
        """Adapters with running requests."""
        return self._running.keys()

    @property
    def waiting(self) -> Collection[str]:
        """Adapters with waiting requests, the next one first."""
        return self._queue.keys()

    def is_free(self, adapter: str) -> bool:
        """Return True if a request would be admitted immediately and nothing waits."""
        return self.count is None or (not self._queue and (adapter in self._running or len(self._running) < self.count))

    def start(self, adapter: str, *, first: bool = False) -> bool:
        """Admit a request if it need not wait; return False otherwise.

        Args:
            adapter: name of the adapter.
            first: True if the request takes precedence over those that wait.
        """
        has_slot = adapter in self._running
        if self.count is None:
            may_start = True
        elif first or not self._queue:
            may_start = has_slot or len(self._running) < self.count
        else:
            may_start = has_slot and adapter not in self._queue and not self._releases(adapter)
        if may_start:
            self._add(adapter)
        return may_start

    async def wait(self, adapter: str, *, first: bool = False) -> None:
        """Wait until a request is admitted; a cancelled request is not."""
        waiter = asyncio.get_running_loop().create_future()
        self._queue.setdefault(adapter, _Queued()).waiters.append(waiter)
        if first:
            self._queue = {adapter: self._queue.pop(adapter), **self._queue}
        self._admit()
        try:
            await waiter
        except asyncio.CancelledError:
            queued = self._queue.get(adapter)
            if waiter.done() and not waiter.cancelled():
                self.finish(adapter)
            elif queued is not None and waiter in queued.waiters:
                queued.waiters.remove(waiter)
                if not queued.waiters:
                    del self._queue[adapter]
                self._admit()
            raise

    def finish(self, adapter: str) -> None:
        """Record the end of an admitted request."""
        self._running[adapter] -= 1
        if not self._running[adapter]:
            del self._running[adapter], self._since[adapter]
            self._admit()

    def _releases(self, adapter: str) -> bool:
        """Return True if an adapter with a slot must release it."""
        if self._clock() - self._since[adapter] < TURN_SECONDS:
            return False
        waiting = sum(1 for other in self._queue if other not in self._running)
        return adapter in sorted(self._since, key=self._since.__getitem__)[:waiting]

    def _add(self, adapter: str) -> None:
        self._since.setdefault(adapter, self._clock())
        self._running[adapter] = self._running.get(adapter, 0) + 1

    def _admit(self) -> None:
        """Give free slots to the adapters that wait."""
        while self._queue:
            adapter = next(iter(self._queue))
            if self.count is not None and adapter not in self._running and len(self._running) >= self.count:
                return
            self._since[adapter] = self._clock()
            for waiter in self._queue.pop(adapter).waiters:
                if not waiter.done():
                    self._add(adapter)
                    waiter.set_result(None)
            if adapter not in self._running:
                del self._since[adapter]


@dataclass
class _Registered:
    """Adapter that the engine knows. `used`: place in the order of use."""

    name: str
    number: int
    path: str
    size: int
    used: int = 0
    cached: bool = True


class EngineAdapters:
    """Adapters that the engine knows, and the memory of its cache.

    Unlike vLLM, whose cache counts adapters, this limits the bytes of the cache: when a use exceeds them, the adapters
    that have been idle the longest are removed from it.

    Args:
        memory: highest number of bytes of the cache; None: unlimited. Adapters of running requests may exceed it.
        on_cpu: True if the engine computes on CPUs.
    """

    def __init__(self, memory: int | None = None, *, on_cpu: bool = False) -> None:
        self.slots = Slots()
        self.memory = memory
        self.reloads = 0
        """Number of times that an adapter's files were read again, because it was not in the cache any more."""
        self.version = secrets.randbelow(2**40)
        """Changes whenever an adapter is registered or removed, and differs from those of other processes."""
        self.base_names: frozenset[str] = frozenset()
        """Further names of the base model. Its requests need no slot."""
        self._on_cpu = on_cpu
        self._engine: Any = None
        self._value_bytes = 4
        self._data_type = ""
        self._registered: dict[str, _Registered] = {}
        self._leaving: dict[str, list[_Registered]] = {}
        self._uses = 0
        self._removals: set[asyncio.Future[Any]] = set()

    async def start(self, engine: Any) -> None:  # noqa: ANN401 - vLLM's engine client
        """Prepare an engine that has loaded no adapter yet.

        On CPUs, vLLM computes a base request that is batched with an adapter's request with the adapter in the last
        slot. An empty adapter is therefore pinned there, and clients' adapters get the other slots only.
        """
        self._engine = engine
        model = engine.vllm_config.model_config
        self._data_type = str(getattr(model, "quantization", None) or model.dtype).removeprefix("torch.")
        config = engine.vllm_config.lora_config
        if config is None:
            return
        self._value_bytes = getattr(config.lora_dtype, "itemsize", 4)
        self.slots.count = config.max_loras
        if not self._on_cpu:
            return
        if config.max_loras < 2:  # noqa: PLR2004 - the empty adapter and another one
            raise SystemExit("vLLM on CPUs needs --max-loras of at least 2: its last slot stays empty.")
        await _pin_empty_adapter(engine, config.max_loras)
        self.slots.count = config.max_loras - 1

    @asynccontextmanager
    async def use(
        self, name: str, left: Callable[[], asyncio.Future[Any]] | None = None, *, first: bool = False
    ) -> AsyncIterator[bool]:
        """Hold a slot for a request; the value is False if the client left while the request waited.

        Args:
            name: name of the model; one that is not a registered adapter needs no slot.
            left: returns a future that is done when the client leaves.
            first: True if the request takes precedence over those that wait.
        """
        if name not in self._registered:
            yield True
            return
        if not self.slots.start(name, first=first) and not await self._wait(name, left, first=first):
            yield False
            return
        try:
            self._record_use(name)
            yield True
        finally:
            self.slots.finish(name)
            self._remove_leaving(name)

    def has_free_slot(self, name: str) -> bool:
        """Return True if a request for a model needs no slot, or gets one immediately while no adapter waits."""
        return name not in self._registered or self.slots.is_free(name)

    def knows(self, name: str) -> bool:
        """Return True if a name is that of a registered adapter or a further name of the base model."""
        return name in self._registered or name in self.base_names

    @property
    def names(self) -> set[str]:
        """Names of the registered adapters, and further names of the base model."""
        return self._registered.keys() | self.base_names

    async def _wait(self, name: str, left: Callable[[], asyncio.Future[Any]] | None, *, first: bool) -> bool:
        waiting = asyncio.ensure_future(self.slots.wait(name, first=first))
        try:
            await asyncio.wait({waiting, left()} if left else {waiting}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self._give_up(name, waiting)
            raise
        if not waiting.done():
            await self._give_up(name, waiting)
            return False
        return True

    async def _give_up(self, name: str, waiting: asyncio.Future[None]) -> None:
        if waiting.done():
            self.slots.finish(name)
        else:
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting
        self._remove_leaving(name)

    def register(self, name: str, number: int, path: str) -> None:
        """Record an adapter that vLLM has loaded."""
        if name in self._registered:
            return
        entry = _Registered(name, number, path, values(Path(path)) * self._value_bytes)
        self._registered[name] = entry
        self.version += 1
        self._touch(entry)
        self._shrink(entry)

    async def unregister(self, name: str) -> None:
        """Remove an adapter from the engine that vLLM has unloaded: its API server refuses it, its engine keeps it.

        An adapter with running or waiting requests is removed after the last one.
        """
        entry = self._registered.pop(name, None)
        if entry is not None:
            self._leaving.setdefault(name, []).append(entry)
            self.version += 1
            if self._is_idle(name):
                await self._forget(entry)

    def state(self, seen: int | None = None) -> dict[str, Any]:
        """Return the state for the agent.

        Args:
            seen: version that the agent has; if it is the current one, the adapters are omitted.
        """
        document: dict[str, Any] = {
            "version": self.version,
            "slots": self.slots.count,
            "running": len(self.slots.running),
            "waiting": len(self.slots.waiting),
            "memoryBytes": sum(entry.size for entry in self._known() if entry.cached),
            "memoryLimitBytes": self.memory,
            "reloads": self.reloads,
            "dataType": self._data_type,
            "baseNames": sorted(self.base_names),
        }
        if seen != self.version:
            document["registered"] = {name: entry.path for name, entry in self._registered.items()}
            document["leaving"] = [entry.path for entries in self._leaving.values() for entry in entries]
        return document

    def _known(self) -> list[_Registered]:
        return [*self._registered.values(), *(entry for entries in self._leaving.values() for entry in entries)]

    def _record_use(self, name: str) -> None:
        entry = self._registered.get(name)
        if entry is None:
            return
        self._touch(entry)
        if not entry.cached:
            entry.cached = True
            self.reloads += 1
            self._shrink(entry)

    def _touch(self, entry: _Registered) -> None:
        self._uses += 1
        entry.used = self._uses

    def _shrink(self, newest: _Registered) -> None:
        """Remove idle adapters from the cache until the others fit; `newest` stays."""
        if self.memory is None:
            return
        cached = [entry for entry in self._known() if entry.cached]
        excess = sum(entry.size for entry in cached) - self.memory
        idle = [entry for entry in cached if entry is not newest and entry.name not in self.slots.running]
        for entry in sorted(idle, key=lambda entry: entry.used):
            if excess <= 0:
                return
            entry.cached = False
            excess -= entry.size
            self._in_background(self._remove(entry))

    def _remove_leaving(self, name: str) -> None:
        """Remove unloaded adapters from the engine once none of their requests is running or waiting."""
        if name in self._leaving and self._is_idle(name):
            for entry in self._leaving[name]:
                self._in_background(self._forget(entry))

    def _is_idle(self, name: str) -> bool:
        return name not in self.slots.running and name not in self.slots.waiting

    async def _forget(self, entry: _Registered) -> None:
        if not await self._remove(entry):
            return  # the engine may read its files until it restarts
        remaining = [other for other in self._leaving.get(entry.name, ()) if other is not entry]
        if remaining:
            self._leaving[entry.name] = remaining
        else:
            self._leaving.pop(entry.name, None)
        self.version += 1

    async def _remove(self, entry: _Registered) -> bool:
        try:
            await self._engine.remove_lora(entry.number)
        except Exception as error:  # noqa: BLE001 - vLLM's own; the engine continues to serve
            sys.stderr.write(f"tunesmith: the engine could not remove the adapter {entry.name}: {error!r}\n")
            sys.stderr.flush()
            return False
        return True

    def _in_background(self, work: Coroutine[None, None, Any]) -> None:
        task = asyncio.ensure_future(work)
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)


async def _pin_empty_adapter(engine: Any, slots: int) -> None:  # noqa: ANN401 - vLLM's engine client
    """Keep an adapter that changes nothing in the last slot."""
    request = importlib.import_module("vllm.lora.request").LoRARequest  # not a dependency of the agent
    folder = Path(tempfile.mkdtemp(prefix="tunesmith-empty-adapter-"))
    numbers = range(_EMPTY_ADAPTER, _EMPTY_ADAPTER + slots)
    error: Exception | None = None
    for module in _linear_modules(Path(engine.vllm_config.model_config.model)):
        write_empty_adapter(folder, module)
        try:
            for number in numbers:  # vLLM fills the slots in order
                await engine.add_lora(request(f"tunesmith-empty-{number}", number, str(folder)))
            break
        except Exception as refused:  # noqa: BLE001 - vLLM's own: it does not know the module
            error = refused
    else:
        raise SystemExit(f"vLLM on CPUs needs an empty adapter in its last slot, and refuses it: {error}")
    await engine.pin_lora(numbers[-1])
    for number in numbers[:-1]:
        await engine.remove_lora(number)


def write_empty_adapter(folder: Path, module: str) -> None:
    """Write an adapter that changes nothing: vLLM knows its module's name, but no layer has its path."""
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [module], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensor = {"dtype": "F32", "shape": [1, 1]}
    names = [f"base_model.model.tunesmith_empty.{module}.lora_{matrix}.weight" for matrix in "AB"]
    header = json.dumps({name: {**tensor, "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}).encode()
    (folder / _WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


def _linear_modules(base: Path) -> list[str]:
    """Return names that the base model's linear modules may have, likelier ones first."""
    names = dict.fromkeys(("q_proj", "qkv_proj", "query_key_value", "c_attn"))
    for file in sorted(base.glob("*.safetensors")):
        for tensor in _header(file):
            module = tensor.removesuffix(".weight").rpartition(".")[2]
            if tensor.endswith(".weight") and "norm" not in module and "embed" not in module:
                names[module] = None
    return list(names)[:_MAX_MODULES]


def values(folder: Path) -> int:
    """Return the number of values in an adapter's weights; 0 if the file cannot be read."""
    try:
        return sum(_count(entry) for name, entry in _header(folder / _WEIGHTS).items() if name != "__metadata__")
    except (KeyError, TypeError, ValueError):
        return 0


def _header(file: Path) -> Mapping[str, Any]:
    """Return the header of a safetensors file; empty if it cannot be read."""
    try:
        with file.open("rb") as content:
            (length,) = struct.unpack("<Q", content.read(8))
            return dict(json.loads(content.read(min(length, _MAX_HEADER))))
    except (OSError, ValueError, TypeError, struct.error):
        return {}


def _count(entry: Mapping[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return int((end - begin) // _VALUE_BYTES.get(entry["dtype"], 1))
