"""Adapter slots of the engine: which requests are admitted, and what is removed from the engine."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from tests.server.server_rig import write_safetensors
from tunesmith_server.middleware.tunesmith_adapters import TURN_SECONDS, EngineAdapters, Slots, values

if TYPE_CHECKING:
    from pathlib import Path

import numpy as np


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def waiting(slots: Slots, *adapters: str) -> list[asyncio.Task[None]]:
    tasks = [asyncio.ensure_future(slots.wait(adapter)) for adapter in adapters]
    await settle()
    return tasks


def test_adapters_up_to_the_number_of_slots_start() -> None:
    slots = Slots(2)
    assert [slots.start(name) for name in ("a", "b", "a", "c")] == [True, True, True, False]
    assert set(slots.running) == {"a", "b"}


def test_without_a_limit_everything_starts() -> None:
    slots = Slots(None)
    assert all(slots.start(str(number)) for number in range(100))


async def test_waiting_adapters_get_slots_in_order_with_all_their_requests() -> None:
    slots = Slots(1)
    assert slots.start("a")
    tasks = await waiting(slots, "b", "c", "b")
    slots.finish("a")
    await settle()
    assert [task.done() for task in tasks] == [True, False, True]
    slots.finish("b")
    assert not tasks[1].done()
    slots.finish("b")
    await settle()
    assert tasks[1].done()


async def test_an_adapter_keeps_its_slot_for_a_turn_only_while_others_wait() -> None:
    clock = Clock()
    slots = Slots(1, clock)
    assert slots.start("a")
    clock.now += TURN_SECONDS + 1
    assert slots.start("a")  # nobody waits
    (other,) = await waiting(slots, "b")
    assert not slots.start("a")  # its turn has ended
    (again,) = await waiting(slots, "a")
    slots.finish("a")
    slots.finish("a")
    await settle()
    assert (other.done(), again.done()) == (True, False)
    slots.finish("b")
    await settle()
    assert again.done()


async def test_as_many_adapters_release_their_slots_as_others_wait() -> None:
    clock = Clock()
    slots = Slots(3, clock)
    for name in "abc":
        assert slots.start(name)
        clock.now += 1
    clock.now += TURN_SECONDS
    await waiting(slots, "d")
    assert [slots.start(name) for name in "abc"] == [False, True, True]
    await waiting(slots, "e")
    assert [slots.start(name) for name in "abc"] == [False, False, True]


async def test_an_adapter_within_its_turn_admits_requests_while_others_wait() -> None:
    clock = Clock()
    slots = Slots(1, clock)
    slots.start("a")
    await waiting(slots, "b")
    clock.now += TURN_SECONDS / 2
    assert slots.start("a")


async def test_a_request_that_takes_precedence_is_next() -> None:
    slots = Slots(1)
    slots.start("a")
    (other,) = await waiting(slots, "b")
    first = asyncio.ensure_future(slots.wait("c", first=True))
    await settle()
    slots.finish("a")
    await settle()
    assert (first.done(), other.done()) == (True, False)


async def test_a_cancelled_request_gets_no_slot() -> None:
    slots = Slots(1)
    slots.start("a")
    (leaving, staying) = await waiting(slots, "b", "c")
    leaving.cancel()
    await settle()
    assert list(slots.waiting) == ["c"]
    slots.finish("a")
    await settle()
    assert staying.done()
    assert set(slots.running) == {"c"}


async def test_a_request_cancelled_as_it_is_admitted_frees_its_slot() -> None:
    slots = Slots(1)
    slots.start("a")
    (leaving, staying) = await waiting(slots, "b", "c")
    slots.finish("a")
    leaving.cancel()
    await settle()
    assert staying.done()
    assert set(slots.running) == {"c"}


class Engine:
    """vLLM's engine client, as far as adapters are concerned."""

    def __init__(self, max_loras: int = 2) -> None:
        self.vllm_config = SimpleNamespace(
            lora_config=SimpleNamespace(max_loras=max_loras, lora_dtype=SimpleNamespace(itemsize=4)),
            model_config=SimpleNamespace(dtype="torch.bfloat16", quantization="fp8"),
        )
        self.removed: list[int] = []
        self.refuses = False

    async def remove_lora(self, number: int) -> bool:
        if self.refuses:
            raise RuntimeError("no")
        self.removed.append(number)
        return True


def adapter(folder: Path, name: str, count: int = 250) -> str:
    (folder / name).mkdir()
    write_safetensors(folder / name / "adapter_model.safetensors", {"x": np.zeros(count, np.float16)}, dtype="F16")
    return str(folder / name)


async def started(engine: Engine, memory: int | None = None) -> EngineAdapters:
    adapters = EngineAdapters(memory)
    await adapters.start(engine)
    return adapters


async def use(adapters: EngineAdapters, name: str) -> None:
    async with adapters.use(name) as admitted:
        assert admitted
        await settle()


async def test_the_data_type_of_the_weights_is_reported() -> None:
    engine = Engine()
    assert (await started(engine)).state()["dataType"] == "fp8"
    engine.vllm_config.model_config.quantization = None
    assert (await started(engine)).state()["dataType"] == "bfloat16"


async def test_idle_adapters_leave_the_cache_when_it_is_full(tmp_path: Path) -> None:
    engine = Engine()
    adapters = await started(engine, memory=2500)
    for number, name in enumerate("abc", 1):
        adapters.register(name, number, adapter(tmp_path, name))  # 1,000 bytes each in the engine's type
    await settle()
    assert engine.removed == [1]
    assert adapters.state()["memoryBytes"] == 2000
    await use(adapters, "a")  # read from its files again
    assert adapters.state()["reloads"] == 1
    assert engine.removed == [1, 2]
    await use(adapters, "a")
    assert adapters.state()["reloads"] == 1


async def test_an_adapter_with_requests_stays_in_the_cache(tmp_path: Path) -> None:
    engine = Engine()
    adapters = await started(engine, memory=1500)
    adapters.register("a", 1, adapter(tmp_path, "a"))
    async with adapters.use("a"):
        adapters.register("b", 2, adapter(tmp_path, "b"))
        adapters.register("c", 3, adapter(tmp_path, "c"))
        await settle()
    assert engine.removed == [2]


async def test_an_unloaded_adapter_is_listed_until_the_engine_has_removed_it(tmp_path: Path) -> None:
    engine = Engine()
    adapters = await started(engine)
    adapters.register("a", 1, path := adapter(tmp_path, "a"))
    async with adapters.use("a"):
        await adapters.unregister("a")
        assert (adapters.state()["registered"], adapters.state()["leaving"]) == ({}, [path])
        assert engine.removed == []
    await settle()
    assert engine.removed == [1]
    assert adapters.state()["leaving"] == []


async def test_an_adapter_that_the_engine_keeps_stays_listed(tmp_path: Path) -> None:
    engine = Engine()
    adapters = await started(engine)
    adapters.register("a", 1, path := adapter(tmp_path, "a"))
    engine.refuses = True
    await adapters.unregister("a")
    assert adapters.state()["leaving"] == [path]


async def test_adapters_are_listed_only_when_they_changed(tmp_path: Path) -> None:
    adapters = await started(Engine())
    seen = adapters.state()["version"]
    assert "registered" not in adapters.state(seen)
    adapters.register("a", 1, adapter(tmp_path, "a"))
    assert "registered" in adapters.state(seen)


async def test_a_client_that_leaves_while_it_waits_is_not_admitted(tmp_path: Path) -> None:
    adapters = await started(Engine(max_loras=1))
    for number, name in enumerate("ab", 1):
        adapters.register(name, number, adapter(tmp_path, name))
    left: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def leave() -> bool:
        async with adapters.use("b", lambda: left) as admitted:
            return admitted

    async with adapters.use("a"):
        request = asyncio.ensure_future(leave())
        await settle()
        left.set_result(None)
        assert not await request
    assert adapters.state()["running"] == adapters.state()["waiting"] == 0


async def test_the_base_model_needs_no_slot(tmp_path: Path) -> None:
    adapters = await started(Engine(max_loras=1))
    adapters.register("a", 1, adapter(tmp_path, "a"))
    async with adapters.use("a"):
        await use(adapters, "base")


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"\x04" + bytes(7) + b"null", b"\x02" + bytes(7) + b"[]"])
def test_a_file_that_is_not_safetensors_counts_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    assert values(tmp_path) == 0
