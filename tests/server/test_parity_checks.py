"""Parity checks of the agent: when they run, what they ask, and what they record."""

from __future__ import annotations

import asyncio
import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.api.parity import ParityMode, ParityVerdict
from tunesmith.contracts.agent import AdapterParity, DesiredAdapter
from tunesmith_server import parity
from tunesmith_server.engine import EngineLostError, EngineSnapshot, EngineState, RequestRefusedError
from tunesmith_server.parity import FIRST_RETRY_SECONDS, MAX_DEATHS, ParityChecks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BASE = "team/base"
PROMPT = [1, 2, 3]
ANSWERS = {"adapter": [7, 8, 9], BASE: [4, 5]}
LOG_PROBABILITIES = {"adapter": -0.1, BASE: -0.2}
ADAPTER_ON_BASE = -5.0


def desired(name: str, mode: ParityMode = ParityMode.REPORT) -> DesiredAdapter:
    return DesiredAdapter(
        engine_name=f"team/{name}@{name * 12}",
        digest=f"sha256:{name * 64}",
        uri=f"s3://s/team/{name}",
        parity=mode,
    )


A, B = desired("a"), desired("b")


def positions(tokens: list[int], value: float) -> list[dict[str, Any]]:
    return [{"chosen": value, "top": [{"tokenId": token, "logProbability": value}]} for token in tokens]


def document(**changes: Any) -> dict[str, Any]:
    answer, base_answer = ANSWERS["adapter"], ANSWERS[BASE]
    probe = {
        "prompt": "Hello",
        "chat": True,
        "promptTokenIds": PROMPT,
        "answerTokenIds": answer,
        "base": positions(answer, ADAPTER_ON_BASE),
        "adapter": positions(answer, LOG_PROBABILITIES["adapter"]),
        "baseAnswer": {"tokenIds": base_answer, "positions": positions(base_answer, LOG_PROBABILITIES[BASE])},
        **changes,
    }
    return {"schemaVersion": 1, "dataType": "float32", "probes": [probe]}


class Engine:
    """Simulated engine, which answers as recorded unless a test changes it."""

    def __init__(self) -> None:
        self.boot = 0
        self.data_type = "float32"
        self.resident: dict[str, str] = {}
        self.sent: list[dict[str, Any]] = []
        self.shift = 0.0
        self.shifts: dict[str, float] = {}
        self.in_flight: dict[str, int] = {}
        self.bad = ""
        self.base_shift = 0.0
        self.first_token: int | None = None
        self.rendered: list[int] | None = PROMPT
        self.error: Exception | None = None
        self.answering = asyncio.Event()
        self.answering.set()

    def snapshot(self) -> EngineSnapshot:
        state = {
            "bootId": str(self.boot),
            "draining": False,
            "inFlight": self.in_flight,
            "totals": {},
            "adapters": {"dataType": self.data_type},
        }
        return EngineSnapshot(EngineState.model_validate(state), dict(self.resident), BASE)

    async def complete(self, body: dict[str, Any], path: str) -> str:
        self.sent.append(body)
        await self.answering.wait()
        if self.error is not None:
            raise self.error
        if "messages" in body:
            assert path == "/v1/chat/completions"
            return json.dumps({"choices": [{}], "prompt_token_ids": self.rendered})
        if body["model"] == self.bad:
            self.base_shift = 1.0
        return json.dumps({"choices": [self._choice(body, prompt) for prompt in body["prompt"]]})

    def _choice(self, body: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
        is_base = body["model"] == BASE
        answer = ANSWERS[BASE if is_base else "adapter"]
        value = LOG_PROBABILITIES["adapter"] + (self.shifts.get(body["model"], self.shift))
        if is_base:
            value = LOG_PROBABILITIES[BASE] + self.base_shift
        rest = answer[len(prompt) - len(PROMPT) :]
        assert body["max_tokens"] == len(rest)
        tops = [{f"token_id:{token}": value} for token in rest]
        if self.first_token is not None and len(rest) == len(answer) and not is_base:
            rest = [self.first_token, *rest[1:]]
            tops[0][f"token_id:{self.first_token}"] = value + 0.001
        tokens = [f"token_id:{token}" for token in rest]
        own = [top[token] for top, token in zip(tops, tokens, strict=True)]
        return {"logprobs": {"tokens": tokens, "token_logprobs": own, "top_logprobs": tops}}


class Checks:
    """Checks with the test's clock."""

    def __init__(self, folder: Path) -> None:
        self.engine = Engine()
        self.state, self.adapters = folder / "state", folder / "adapters"
        self.state.mkdir()
        self.now = 1000.0
        self.checks = self.new()

    def new(self) -> ParityChecks:
        return ParityChecks(self.engine, self.adapters, self.state, lambda: None)  # type: ignore[arg-type]

    def load(self, adapter: DesiredAdapter, content: Any = None) -> None:
        folder = self.adapters / adapter.digest.removeprefix("sha256:")
        folder.mkdir(parents=True, exist_ok=True)
        if content is not None:
            (folder / "parity.json").write_text(json.dumps(content))
        self.checks.forget(adapter.engine_name)
        self.engine.resident[adapter.engine_name] = str(folder)

    def start(self, *wanted: DesiredAdapter, unverified: frozenset[str] = frozenset()) -> None:
        self.checks.step(self.engine.snapshot(), wanted, unverified, self.now)

    async def run(self, *wanted: DesiredAdapter) -> AdapterParity | None:
        """Take steps until no check is due; return the first adapter's result."""
        for _ in wanted:
            self.start(*wanted)
            if self.checks._task is not None:
                await asyncio.wait({self.checks._task}, timeout=60)
                await asyncio.sleep(0)  # its callbacks
                assert self.checks._task is None
        return self.checks.results.get(wanted[0].engine_name)

    async def finished(self, *adapters: DesiredAdapter) -> dict[str, ParityVerdict]:
        """The verdicts after the running check, by engine name, without those that are not known yet."""
        if self.checks._task is not None:
            await asyncio.wait({self.checks._task}, timeout=60)
            await asyncio.sleep(0)  # its callbacks
        found = {adapter.engine_name: self.checks.results.get(adapter.engine_name) for adapter in adapters}
        return {
            name: result.verdict
            for name, result in found.items()
            if result is not None and result.verdict is not ParityVerdict.UNFINISHED
        }

    def recorded(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.state / parity.FILE).read_bytes())
        return found

    def models(self) -> list[str]:
        return [body["model"] for body in self.engine.sent]


@pytest.fixture
def checks(tmp_path: Path) -> Checks:
    return Checks(tmp_path)


async def test_a_sound_adapter_passes(checks: Checks) -> None:
    checks.load(A, document())
    checks.engine.shift = 0.004
    found = await checks.run(A)
    assert found is not None
    assert (found.verdict, found.distance, found.base_distance) == (ParityVerdict.PASSED, pytest.approx(0.004), 0.0)
    assert (found.gap, found.tolerance) == (pytest.approx(4.9), 0.01)
    assert checks.models() == [BASE, A.engine_name, BASE]
    assert {body["priority"] for body in checks.engine.sent} == {parity.IN_BACKGROUND}
    assert {body["repetition_penalty"] for body in checks.engine.sent} == {1}
    assert sum(body["max_tokens"] for body in checks.engine.sent) == 1 + 3 + 2


async def test_traffic_that_waits_for_a_check_is_queued_with_clients(checks: Checks) -> None:
    required = desired("b", ParityMode.REQUIRED)
    checks.load(A, document())
    checks.load(required, document())
    await checks.run(A, required)
    of_first = [body["priority"] for body in checks.engine.sent[:3]]
    assert checks.models()[:3] == [BASE, required.engine_name, BASE]
    assert of_first == [parity.TRAFFIC_WAITS] * 3


async def test_a_check_that_traffic_waits_for_replaces_another(checks: Checks) -> None:
    required = desired("b", ParityMode.REQUIRED)
    checks.load(A, document())
    checks.engine.answering.clear()
    checks.start(A, required)
    await asyncio.sleep(0)
    checks.load(required, document())
    checks.start(A, required)
    checks.engine.answering.set()
    found = await checks.run(required, A)
    assert found is not None
    assert found.verdict is checks.checks.results[A.engine_name].verdict is ParityVerdict.PASSED
    assert [name for name in checks.models() if name != BASE] == [required.engine_name, A.engine_name]


async def test_the_base_is_checked_once_for_each_artifact_and_engine(checks: Checks) -> None:
    for adapter in (A, B, A, B):
        checks.load(adapter, document())
        await checks.run(adapter)
    assert checks.models().count(BASE) == 2 + 1, "its answers once for each, and the chat once"
    checks.engine.boot += 1
    await checks.run(A)
    assert checks.models().count(BASE) == 3 + 2
    await checks.run(A)
    assert checks.models().count(A.engine_name) == 3


async def test_a_token_that_is_as_likely_does_not_end_the_comparison(checks: Checks) -> None:
    checks.load(A, document())
    checks.engine.first_token = 99
    found = await checks.run(A)
    assert found is not None
    assert found.verdict is ParityVerdict.PASSED
    assert [body["prompt"] for body in checks.engine.sent[1:3]] == [[PROMPT], [[*PROMPT, 7]]]


async def test_an_engine_that_does_not_apply_the_adapter_is_detected(checks: Checks) -> None:
    checks.load(A, document())
    checks.engine.shift = ADAPTER_ON_BASE - LOG_PROBABILITIES["adapter"]
    found = await checks.run(A)
    assert found is not None
    assert (found.verdict, found.distance) == (ParityVerdict.FAILED, pytest.approx(4.9))
    assert "it does not apply the adapter" in found.message


def _other_base(engine: Engine) -> None:
    engine.base_shift = 1.0


def _other_template(engine: Engine) -> None:
    engine.rendered = [1, 2]


def _infinite(engine: Engine) -> None:
    engine.shift = -math.inf


def _refusing(engine: Engine) -> None:
    engine.error = RequestRefusedError("token id 7 is out of vocabulary")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_base, "the base model's answers differ by 1.0"),
        (_other_template, "the engine's chat template renders a prompt differently"),
        (_infinite, "its answers differ by"),
        (_refusing, "the engine refuses the prompts of parity.json: token id 7"),
    ],
)
async def test_other_answers_fail(checks: Checks, change: Callable[[Engine], None], message: str) -> None:
    checks.load(A, document())
    change(checks.engine)
    found = await checks.run(A)
    assert found is not None
    assert found.verdict is ParityVerdict.FAILED
    assert message in found.message


async def test_a_small_gap_decides_nothing(checks: Checks) -> None:
    checks.load(A, document(base=positions(ANSWERS["adapter"], LOG_PROBABILITIES["adapter"] - 0.03)))
    found = await checks.run(A)
    assert found is not None
    assert (found.verdict, found.gap) == (ParityVerdict.UNDECIDED, pytest.approx(0.03))


async def test_the_tolerance_follows_the_engines_data_type(checks: Checks) -> None:
    for data_type, verdict in (("bfloat16", ParityVerdict.PASSED), ("float32", ParityVerdict.FAILED)):
        checks.engine.data_type, checks.engine.shift = data_type, 0.2
        checks.load(A, document())
        found = await checks.run(A)
        assert found is not None
        assert found.verdict is verdict


@pytest.mark.parametrize("content", [None, {"schemaVersion": 1, "dataType": "float32", "probes": []}, {"probes": 1}])
async def test_an_artifact_without_expected_answers_is_reported(checks: Checks, content: Any) -> None:
    checks.load(A, content)
    found = await checks.run(A)
    assert found is not None
    assert found.verdict is ParityVerdict.NOT_RECORDED
    assert checks.engine.sent == []


async def test_a_prompt_longer_than_the_engine_accepts_is_not_sent(checks: Checks) -> None:
    checks.load(A, document(promptTokenIds=[1] * 2047))
    found = await checks.run(A)
    assert found is not None
    assert found.verdict is ParityVerdict.NOT_RECORDED


async def test_nothing_is_checked_with_parity_off_or_before_the_canary(checks: Checks) -> None:
    off = desired("b", ParityMode.OFF)
    checks.load(A, document())
    checks.load(off, document())
    checks.start(A, off, unverified=frozenset({A.engine_name}))
    assert checks.checks._task is None
    assert await checks.run(off) is None


async def test_a_busy_engine_is_asked_again_later(checks: Checks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "CHECK_SECONDS", 0.01)
    checks.load(A, document())
    checks.engine.answering.clear()
    found = await checks.run(A)
    assert found is not None
    assert found.verdict is ParityVerdict.UNFINISHED
    assert "the engine is busy" in found.message
    checks.engine.answering.set()
    monkeypatch.setattr(parity, "CHECK_SECONDS", 60)
    await checks.run(A)
    assert len(checks.engine.sent) == 1, "it is too early"
    checks.now += FIRST_RETRY_SECONDS
    found = await checks.run(A)
    assert found is not None
    assert found.verdict is ParityVerdict.PASSED


async def test_prompts_during_which_the_engine_dies_are_not_sent_again(checks: Checks) -> None:
    checks.load(A, document(chat=False))
    checks.engine.error = EngineLostError("the engine closed the connection")
    for _ in range(MAX_DEATHS):
        checks.engine.boot += 1
        checks.checks = checks.new()  # the agent was restarted as well
        found = await checks.run(A)
        assert found is not None
        assert found.verdict is ParityVerdict.UNFINISHED
    sent = len(checks.engine.sent)
    checks.engine.boot += 1
    found = await checks.run(A)
    assert found is not None
    assert found.verdict is ParityVerdict.UNDECIDED
    assert f"the engine died {MAX_DEATHS} times" in found.message
    assert len(checks.engine.sent) == sent


async def test_crashes_with_another_cause_are_no_alarm(checks: Checks) -> None:
    checks.load(A, document())
    for _ in range(2 * MAX_DEATHS):
        checks.engine.boot += 1
        checks.engine.error = EngineLostError("the engine closed the connection")
        await checks.run(A)
        checks.engine.boot += 1
        checks.engine.error = None
        found = await checks.run(A)
        assert found is not None
        assert found.verdict is ParityVerdict.PASSED


async def test_a_restarted_agent_knows_the_results_of_the_running_engine(checks: Checks) -> None:
    checks.load(A, document())
    await checks.run(A)
    sent = len(checks.engine.sent)
    checks.checks = checks.new()
    found = await checks.run(A)
    assert found is not None
    assert found.verdict is ParityVerdict.PASSED
    assert len(checks.engine.sent) == sent
    checks.engine.resident.clear()
    assert await checks.run(A) is None


async def test_a_check_stops_when_its_adapter_is_loaded_again(checks: Checks) -> None:
    checks.load(A, document())
    checks.engine.answering.clear()
    checks.start(A)
    await asyncio.sleep(0)
    checks.load(A, document())
    assert checks.checks._task is None
    checks.engine.answering.set()
    found = await checks.run(A)
    assert found is not None
    assert found.verdict is ParityVerdict.PASSED


MANY = [desired(name) for name in "abcdef"]


def names(adapters: list[DesiredAdapter]) -> list[str]:
    return [adapter.engine_name for adapter in adapters]


async def test_the_adapters_of_an_idle_engine_are_checked_together(checks: Checks) -> None:
    for adapter in MANY:
        checks.load(adapter, document())
    checks.start(*MANY)
    assert await checks.finished(*MANY) == dict.fromkeys(names(MANY), ParityVerdict.PASSED)
    assert checks.models() == [BASE, *names(MANY), BASE]
    assert checks.engine.sent[-1]["prompt"] == [PROMPT]


async def test_the_adapters_of_an_engine_in_use_are_checked_one_at_a_time(checks: Checks) -> None:
    checks.engine.in_flight = {A.engine_name: 1}
    for adapter in (A, B):
        checks.load(adapter, document())
    checks.start(A, B)
    assert await checks.finished(A, B) == {A.engine_name: ParityVerdict.PASSED}


async def test_an_adapter_that_fails_in_a_group_is_checked_again_alone(checks: Checks) -> None:
    checks.engine.shifts = {B.engine_name: 1.0}
    for adapter in MANY:
        checks.load(adapter, document())
    checks.start(*MANY)
    others = [adapter for adapter in MANY if adapter != B]
    assert await checks.finished(*MANY) == dict.fromkeys(names(others), ParityVerdict.PASSED)
    checks.start(*MANY)
    assert (await checks.finished(*MANY))[B.engine_name] is ParityVerdict.FAILED
    assert checks.models().count(B.engine_name) == 2


async def test_only_what_is_checked_after_a_change_of_the_base_fails(checks: Checks) -> None:
    """All adapters of the group are checked again, and the change lasts."""
    for adapter in (A, B):
        checks.load(adapter, document())
    checks.engine.bad = B.engine_name
    checks.start(A, B)
    assert await checks.finished(A, B) == {}
    checks.engine.bad, checks.engine.base_shift = "", 0.0
    await checks.run(A)
    checks.engine.bad = B.engine_name
    await checks.run(B)
    assert await checks.finished(A, B) == {A.engine_name: ParityVerdict.PASSED, B.engine_name: ParityVerdict.FAILED}


async def test_an_adapter_is_checked_alone_after_the_engine_died(checks: Checks) -> None:
    for adapter in (A, B):
        checks.load(adapter, document(chat=False))
    checks.engine.error = EngineLostError("the engine closed the connection")
    checks.start(A, B)
    await checks.finished(A, B)
    checks.engine.boot += 1
    checks.engine.error = None
    checks.start(A, B)
    assert await checks.finished(A, B) == {A.engine_name: ParityVerdict.PASSED}


async def test_what_left_the_pod_is_not_recorded_any_more(checks: Checks) -> None:
    for adapter in (A, B):
        checks.load(adapter, document(chat=False))
    checks.engine.error = EngineLostError("the engine closed the connection")
    checks.start(A, B)
    await checks.finished(A, B)
    checks.engine.boot += 1
    checks.engine.error = None
    await checks.run(A)
    assert set(checks.recorded()["bases"]) == {A.digest}
    assert set(checks.recorded()["deaths"]) == {B.digest}
    checks.start(A)
    assert set(checks.recorded()["deaths"]) == {B.digest}, "the engine has it"
    checks.engine.resident.clear()
    checks.start(A)
    assert set(checks.recorded()["bases"]) == {A.digest}, "it is loaded again"
    assert checks.recorded()["deaths"] == {}
    checks.start()
    assert checks.recorded()["bases"] == {}
