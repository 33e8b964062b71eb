"""Guard of the engine: changed answers, hangs, and the search for the adapter that caused them."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.contracts.agent import DesiredAdapter
from tunesmith_server import canary
from tunesmith_server.engine import EngineDownError, EngineSnapshot, EngineState, RequestRefusedError
from tunesmith_server.guard import (
    CANARY_SECONDS,
    CONFIRMATIONS,
    HANG_SECONDS,
    MAX_FATAL_LOADS,
    MAX_UNEXPLAINED,
    PROGRESS_SECONDS,
    QUIET_SECONDS,
    STALL_SECONDS,
    WARM_UP_SECONDS,
    Guard,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BASE = "team/base"
A, B = (
    DesiredAdapter(engine_name=f"team/{name}@{name * 12}", digest=f"sha256:{name * 64}", uri=f"s3://s/team/{name}")
    for name in "ab"
)


def reply(*tokens: str, log_probability: float | None = -0.1, rivals: dict[str, float] | None = None) -> str:
    found = {
        "tokens": tokens,
        "token_logprobs": [log_probability] * len(tokens),
        "top_logprobs": [{token: log_probability} | (rivals or {}) for token in tokens],
    }
    return json.dumps({"choices": [{"text": "".join(tokens), "logprobs": found}]})


GOOD = reply(" D", ",", " E")
BAD = reply("!", "!", "!", log_probability=-9.0)


class Engine:
    """Simulated engine: tests set its adapters, answers and processed tokens."""

    def __init__(self) -> None:
        self.boot = 0
        self.resident: dict[str, str] = {}
        self.in_flight: dict[str, int] = {}
        self.requests: dict[str, int] = {}
        self.tokens = 0.0
        self.answer: Callable[[], str] = lambda: GOOD
        self.answering = asyncio.Event()
        self.answering.set()
        self.requests_sent: list[dict[str, Any]] = []
        self.restarts: list[str] = []
        self.hung: list[bool] = []

    def snapshot(self) -> EngineSnapshot:
        totals = {name: {"requests": n, "promptTokens": 0, "completionTokens": 0} for name, n in self.requests.items()}
        state = {"bootId": str(self.boot), "draining": False, "inFlight": self.in_flight, "totals": totals}
        return EngineSnapshot(EngineState.model_validate(state), dict(self.resident), BASE)

    def load(self, *adapters: DesiredAdapter) -> None:
        self.resident |= {a.engine_name: f"/adapters/{a.digest.removeprefix('sha256:')}" for a in adapters}

    async def complete(self, body: dict[str, Any]) -> str:
        self.requests_sent.append(body)
        await self.answering.wait()
        return self.answer() if body["model"] == BASE else GOOD

    async def processed_tokens(self) -> float:
        return self.tokens

    async def restart(self, reason: str, *, hung: bool) -> None:
        self.restarts.append(reason)
        self.hung.append(hung)

    def reboot(self) -> None:
        self.boot += 1
        self.resident, self.requests, self.in_flight = {}, {}, {}
        self.answer = lambda: GOOD


class Watch:
    """A guard with the test's clock."""

    def __init__(self, folder: Path) -> None:
        self.engine = Engine()
        self.folder = folder
        self.now = 1000.0
        self.guard = self.new_guard()

    def new_guard(self) -> Guard:
        return Guard(self.engine, self.folder, lambda: None)  # type: ignore[arg-type]

    async def step(self, seconds: float = 0.5, *, times: int = 1) -> None:
        for _ in range(times):
            self.now += seconds
            await self.guard.step(self.engine.snapshot(), self.now)
            for _ in range(20):
                await asyncio.sleep(0)  # what was started runs until it waits for the engine

    async def started(self) -> Watch:
        await self.step()
        await self.step()
        assert self.guard.ready
        return self


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    return Watch(tmp_path)


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        (GOOD, True),
        (reply(" D", ",", " E", log_probability=-0.5), True),  # noise of another batch
        (reply(" D", ",", " E", log_probability=-0.7), False),
        (reply(" D", ",", " F", rivals={" E": -0.3}), True),  # two tokens about equally likely
        (reply(" D", ",", " F", rivals={" E": -3.0}), False),
        (reply(" D", ",", " F"), False),
        (BAD, False),
        (reply(" D", ","), False),
        (reply(" D", ",", " E", log_probability=None), False),  # vLLM's JSON of not-a-number
        (GOOD.replace("-0.1", "NaN"), False),
        ('{"choices": [{"text": "", "logprobs": null}]}', False),
        ('{"error": {"message": "x"}}', False),
        ("", False),
    ],
)
def test_an_answer_differs_by_more_than_noise(answer: str, same: bool) -> None:  # noqa: FBT001
    assert canary.agrees(canary.read(GOOD), canary.read(answer)) is same


async def test_an_engine_is_warm_before_it_is_ready(watch: Watch) -> None:
    watch.engine.answering.clear()
    await watch.step(times=3)
    assert not watch.guard.ready
    assert watch.guard.allowed_loads([A]) == []
    watch.engine.answering.set()
    await watch.step(times=2)
    assert watch.guard.ready
    assert watch.guard.allowed_loads([A, B]) == [A, B]
    assert {"logprobs", "use_beam_search", "response_format"} <= {
        key for body in watch.engine.requests_sent for key in body
    }


async def test_an_engine_that_warms_up_has_more_time(watch: Watch) -> None:
    watch.engine.answering.clear()
    await watch.step()
    await watch.step(PROGRESS_SECONDS)
    await watch.step(HANG_SECONDS)
    assert not watch.guard.problem
    await watch.step(WARM_UP_SECONDS)
    assert watch.engine.restarts == [watch.guard.problem]


async def test_an_idle_engine_gets_a_canary_periodically(watch: Watch) -> None:
    await watch.started()
    before = len(watch.engine.requests_sent)
    await watch.step(times=10)
    assert len(watch.engine.requests_sent) == before
    await watch.step(CANARY_SECONDS)
    assert len(watch.engine.requests_sent) == before + 1
    assert not watch.guard.problem


async def test_an_adapter_gets_requests_once_its_canary_passed(watch: Watch) -> None:
    await watch.started()
    watch.engine.load(A)
    watch.engine.answering.clear()
    await watch.step()
    assert watch.guard.unverified == {A.engine_name}
    watch.engine.answering.set()
    await watch.step()
    assert watch.guard.unverified == set()
    assert A.engine_name in {body["model"] for body in watch.engine.requests_sent}, (
        "it computed before the base model's canary"
    )


async def test_an_adapter_that_changes_the_bases_answers_is_refused_permanently(watch: Watch) -> None:
    await watch.started()
    watch.engine.load(A)
    watch.engine.answer = lambda: BAD
    await watch.step(times=CONFIRMATIONS)
    assert watch.engine.restarts == [watch.guard.problem]
    assert f"after the adapter {A.engine_name} was loaded" in watch.guard.problem
    assert list(watch.guard.refused) == [A.digest]
    assert watch.guard.allowed_loads([B]) == []
    watch.engine.reboot()
    await watch.started()
    assert not watch.guard.problem
    watch.guard = watch.new_guard()  # the agent restarts
    assert "refused on this pod" in watch.guard.refused[A.digest]


async def test_answers_that_are_not_numbers_are_refused_by_the_engine_itself(watch: Watch) -> None:
    def refused() -> str:  # what vLLM 0.32 answered after weights of 1e30
        raise RequestRefusedError("Out of range float values are not JSON compliant")

    await watch.started()
    watch.engine.load(A)
    watch.engine.answer = refused
    await watch.step(times=CONFIRMATIONS)
    assert list(watch.guard.refused) == [A.digest]
    assert len(watch.engine.restarts) == 1


async def test_a_single_differing_answer_is_noise(watch: Watch) -> None:
    await watch.started()
    answers = [BAD, BAD]
    watch.engine.load(A)
    watch.engine.answer = lambda: answers.pop() if answers else GOOD
    await watch.step(times=5)
    assert watch.engine.restarts == []
    assert watch.guard.unverified == set()


async def test_after_several_loads_each_adapter_is_tried_alone(watch: Watch) -> None:
    await watch.started()
    watch.engine.load(A, B)
    watch.engine.answer = lambda: BAD
    await watch.step(times=CONFIRMATIONS)
    assert A.engine_name in watch.guard.problem
    assert B.engine_name in watch.guard.problem
    assert watch.guard.refused == {}
    watch.engine.reboot()
    await watch.started()
    assert watch.guard.allowed_loads([A, B]) == [A]
    watch.engine.load(A)
    watch.engine.answering.clear()
    await watch.step()
    assert watch.guard.allowed_loads([B]) == [], "A is being tried"
    watch.engine.answering.set()
    await watch.step()
    assert watch.guard.allowed_loads([B]) == [B]
    watch.engine.load(B)
    watch.engine.answer = lambda: BAD
    await watch.step(times=CONFIRMATIONS)
    assert list(watch.guard.refused) == [B.digest]


async def test_an_adapter_that_damages_when_used_does_not_incriminate_a_loaded_one(watch: Watch) -> None:
    await watch.started()
    watch.engine.load(A)
    await watch.step()
    for _ in range(2):
        # B is the victim's: it is loaded while a request to A damages the engine.
        watch.engine.load(B)
        watch.engine.requests = {A.engine_name: 1}
        watch.engine.answer = lambda: BAD
        await watch.step(times=CONFIRMATIONS)
        assert f"{B.engine_name} was loaded and the adapter {A.engine_name} was used" in watch.guard.problem
        assert watch.guard.refused == {}
        watch.engine.reboot()
        await watch.started()
        assert watch.guard.allowed_loads([A, B]) == [B], "it is tried before A can be used"
        watch.engine.load(B)
        await watch.step()
        assert watch.guard.allowed_loads([A]) == [A]
        watch.engine.load(A)
        await watch.step()
        del watch.engine.resident[B.engine_name]
        await watch.step()
    watch.engine.requests = {A.engine_name: 1}
    watch.engine.answer = lambda: BAD
    await watch.step(CANARY_SECONDS)
    await watch.step(times=CONFIRMATIONS)
    assert list(watch.guard.refused) == [A.digest]


async def test_an_unwanted_adapter_on_trial_does_not_block_others(watch: Watch) -> None:
    await watch.started()
    watch.engine.load(A, B)
    watch.engine.answer = lambda: BAD
    await watch.step(times=CONFIRMATIONS)
    watch.engine.reboot()
    await watch.started()
    other = DesiredAdapter(engine_name=f"team/c@{'c' * 12}", digest=f"sha256:{'c' * 64}", uri="s3://s/team/c")
    assert watch.guard.allowed_loads([other]) == [other]


async def test_a_suspect_by_use_is_refused_after_a_second_incident(watch: Watch) -> None:
    for used in ((A, B), (A,)):
        await watch.started()
        watch.engine.load(A)
        await watch.step()
        watch.engine.load(B)
        await watch.step()
        watch.engine.requests = {adapter.engine_name: 1 for adapter in used}
        watch.engine.answer = lambda: BAD
        assert watch.guard.refused == {}
        await watch.step(CANARY_SECONDS)
        await watch.step(times=CONFIRMATIONS)
        watch.engine.reboot()
    assert list(watch.guard.refused) == [A.digest]
    assert len(watch.engine.restarts) == 2


async def test_a_nondeterministic_engine_is_not_restarted_endlessly(watch: Watch) -> None:
    for _ in range(MAX_UNEXPLAINED + 2):
        await watch.started()
        watch.engine.answer = lambda: BAD
        await watch.step(CANARY_SECONDS)
        await watch.step(times=CONFIRMATIONS)
        if watch.guard.problem:
            watch.engine.reboot()
    assert len(watch.engine.restarts) == MAX_UNEXPLAINED


async def test_an_engine_without_a_token_hangs(watch: Watch) -> None:
    await watch.started()
    watch.engine.in_flight = {BASE: 1}
    watch.engine.answering.clear()
    await watch.step(times=2)
    await watch.step(QUIET_SECONDS)
    assert watch.engine.requests_sent[-1]["priority"] == canary.FIRST_PRIORITY
    await watch.step(PROGRESS_SECONDS)
    assert not watch.guard.problem
    await watch.step(HANG_SECONDS)
    assert "processed no token for 30 s" in watch.guard.problem
    assert watch.engine.restarts == [watch.guard.problem]
    assert watch.engine.hung == [True]  # a request may be the cause


async def test_an_engine_that_stalls_gets_no_requests_until_it_computes_again(watch: Watch) -> None:
    await watch.started()
    watch.engine.in_flight = {BASE: 1}
    watch.engine.answering.clear()
    await watch.step(times=2)
    await watch.step(QUIET_SECONDS)
    await watch.step(PROGRESS_SECONDS)
    assert not watch.guard.stalled
    await watch.step(STALL_SECONDS)
    assert "restarted after 30 s" in watch.guard.stalled
    assert not watch.guard.problem
    watch.engine.tokens += 1
    await watch.step(PROGRESS_SECONDS)
    assert not watch.guard.stalled
    assert watch.engine.restarts == []


async def test_an_engine_that_prefills_a_long_prompt_does_not_stall(watch: Watch) -> None:
    await watch.started()
    watch.engine.in_flight = {BASE: 1}
    watch.engine.answering.clear()
    await watch.step(times=2)
    await watch.step(QUIET_SECONDS)
    for _ in range(3):
        watch.engine.tokens += 1
        await watch.step(STALL_SECONDS - PROGRESS_SECONDS)
        assert not watch.guard.stalled


async def test_an_idle_engine_that_hangs_is_found_by_its_canary(watch: Watch) -> None:
    await watch.started()
    watch.engine.answering.clear()
    await watch.step(CANARY_SECONDS)
    await watch.step(PROGRESS_SECONDS)
    await watch.step(HANG_SECONDS)
    assert watch.engine.restarts == [watch.guard.problem]


async def test_a_busy_engine_with_a_long_queue_does_not_hang(watch: Watch) -> None:
    await watch.started()
    watch.engine.in_flight = {BASE: 500}
    watch.engine.answering.clear()
    for _ in range(20):
        watch.engine.tokens += 1
        await watch.step(HANG_SECONDS / 2)
    assert watch.engine.restarts == []
    assert not watch.guard.problem


async def test_no_adapter_is_suspected_while_the_engine_is_down(watch: Watch) -> None:
    await watch.started()

    def down() -> str:
        raise EngineDownError("it starts")

    watch.engine.answer = down
    await watch.step(CANARY_SECONDS, times=5)
    await watch.guard.step(None, watch.now)
    assert not watch.guard.problem
    watch.engine.reboot()
    await watch.started()
    assert watch.engine.restarts == []


async def test_an_engine_that_refuses_its_canary_is_not_ready_and_is_not_restarted(watch: Watch) -> None:
    def refused() -> str:
        raise RequestRefusedError("max_logprobs is 0")

    watch.engine.answer = refused
    await watch.step(times=3)
    assert not watch.guard.ready
    assert watch.guard.problem.endswith("max_logprobs is 0")
    assert watch.engine.restarts == []


@pytest.mark.parametrize("length", [16, 64, 512, 10_000_000])
def test_a_canary_fits_into_any_model(length: int) -> None:
    for body in (canary.request("m", length), *canary.warm_up("m", length, can_constrain=True)):
        prompt, answer = body["truncate_prompt_tokens"], body["max_tokens"]
        assert isinstance(prompt, int)
        assert isinstance(answer, int)
        assert prompt + answer <= length


async def test_an_adapter_whose_load_hangs_is_refused(watch: Watch) -> None:
    await watch.started()
    await watch.guard.load_hung(A.engine_name, f"/adapters/{A.digest.removeprefix('sha256:')}")
    assert list(watch.guard.refused) == [A.digest]
    assert A.engine_name in watch.guard.problem
    assert watch.engine.hung == [False]  # no request is the cause


async def test_an_adapter_during_whose_loads_the_engine_died_repeatedly_is_refused(watch: Watch) -> None:
    await watch.started()
    path = f"/adapters/{A.digest.removeprefix('sha256:')}"
    for _ in range(MAX_FATAL_LOADS - 1):
        watch.guard.load_crashed(A.engine_name, path)
    watch.guard.load_finished(path)  # a coincidence
    for _ in range(MAX_FATAL_LOADS - 1):
        watch.guard.load_crashed(A.engine_name, path)
    assert not watch.guard.refused
    watch.guard = watch.new_guard()
    watch.guard.load_crashed(A.engine_name, path)
    assert "vLLM died 3 times while loading team/a@" in watch.guard.refused[A.digest]
    assert watch.engine.restarts == []  # its supervisor has restarted it


async def test_a_restarted_agent_keeps_the_reference_of_a_running_engine(watch: Watch) -> None:
    await watch.started()
    watch.engine.load(A)
    await watch.step()
    watch.guard = watch.new_guard()
    sent = len(watch.engine.requests_sent)
    watch.engine.answer = lambda: BAD
    await watch.step(times=CONFIRMATIONS + 1)
    assert watch.guard.ready
    assert len(watch.engine.requests_sent) - sent == CONFIRMATIONS
    assert "although no adapter was used" in watch.guard.problem
