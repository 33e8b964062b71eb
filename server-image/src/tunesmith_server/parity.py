"""Parity checks: compare an adapter's answers on the engine with those that its artifact recorded after training.

An adapter is checked after each of its loads; the base model with the first check of each artifact on a process of the
engine. One adapter is checked at a time, with a bounded number of tokens. The requests do not precede those of clients:
a check whose result traffic waits for is queued with them, any other after them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from tunesmith.api.parity import ParityMode, ParityVerdict
from tunesmith.contracts.agent import AdapterParity
from tunesmith.contracts.parity import (
    MAX_PROBES,
    PARITY_FILE,
    PARITY_ROWS_FILE,
    Judgement,
    Measured,
    Parity,
    ParityPosition,
    ParityProbe,
    ServedPosition,
    difference,
    gap_of,
    judge,
    matching,
    parse_parity,
    served_positions,
    tolerance,
)
from tunesmith_server.artifact import adapter_folder
from tunesmith_server.engine import EngineDownError, EngineLostError, RequestRefusedError
from tunesmith_server.state_file import read_state, write_state

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tunesmith.contracts.agent import DesiredAdapter
    from tunesmith_server.engine import EngineClient, EngineSnapshot

FILE = "parity-checks.json"
CHECK_SECONDS = 120.0
"""Time limit of a check, after which it is retried: the engine is busy."""
FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS = 5.0, 300.0
MAX_REQUESTS = 4
"""Requests for one answer: the engine may choose another token where two are about equally likely, and the rest of the
expected answer is then compared with another request."""
MAX_DEATHS = 3
"""Number of consecutive checks of an artifact during which the engine died, after which it is not checked again on this
pod. A crash with another cause may coincide with a check."""
ALTERNATIVES = 5
TRAFFIC_WAITS, IN_BACKGROUND = 0, 1
"""Priorities of requests: that of clients, and a later one."""
_BY_IDS = "/v1/completions"
_BY_MESSAGES = "/v1/chat/completions"

_NOT_RECORDED = AdapterParity(
    verdict=ParityVerdict.NOT_RECORDED,
    message=f"the artifact has no {PARITY_FILE} with prompts that the engine accepts, so it cannot be shown that the "
    "engine applies the adapter",
)

log = logging.getLogger(__name__)


class ParityRecord(BaseModel):
    """State that outlives the agent's process, in the state folder.

    Attributes:
        boot_id: process of the engine to which the results belong.
        results: results by engine name.
        bases: distances of the base model's answers, by digest of the artifact.
        deaths: number of consecutive checks during which the engine died, by digest.
    """

    model_config = ConfigDict(extra="ignore")

    boot_id: str = ""
    results: dict[str, AdapterParity] = Field(default_factory=dict)
    bases: dict[str, float] = Field(default_factory=dict)
    deaths: dict[str, int] = Field(default_factory=dict)


@dataclass
class _Retry:
    attempts: int = 0
    at: float = float("-inf")


@dataclass
class _Engine:
    """The engine as one check uses it."""

    client: EngineClient
    base: str
    length: int
    priority: int
    body: dict[str, object] = field(init=False)

    def __post_init__(self) -> None:
        self.body = {"temperature": 0, "ignore_eos": True, "priority": self.priority}

    async def generate(self, model: str, prompt: Sequence[int], tokens: int) -> list[ServedPosition]:
        """Return the greedy answer to a prompt."""
        body = {
            **self.body,
            "model": model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "logprobs": ALTERNATIVES,
            "return_tokens_as_token_ids": True,
            "cache_salt": secrets.token_hex(16),
        }
        reply = _parsed(await self.client.complete(body, _BY_IDS))
        return served_positions(reply["choices"][0]["logprobs"])

    async def rendered(self, model: str, message: str) -> list[int] | None:
        """Return the tokens of a chat with one message; None if the engine does not report them."""
        body = {
            **self.body,
            "model": model,
            "messages": [{"role": "user", "content": message}],
            "max_tokens": 1,
            "return_token_ids": True,
        }
        return _parsed(await self.client.complete(body, _BY_MESSAGES)).get("prompt_token_ids")


class _UnusableAnswerError(Exception):
    """The engine failed at a request."""


class ParityChecks:
    """Parity checks of a pod's adapters.

    Args:
        client: client of the pod's vLLM.
        adapters: folder of the adapters' files.
        state: folder for the record.
        changed: called when a result may have changed.
    """

    def __init__(self, client: EngineClient, adapters: Path, state: Path, changed: Callable[[], None]) -> None:
        self._client = client
        self._adapters = adapters
        self._path = state / FILE
        self._changed = changed
        self._record = read_state(self._path, ParityRecord())
        self._retries: dict[str, _Retry] = {}
        self._check: asyncio.Task[None] | None = None
        self._checked: DesiredAdapter | None = None

    @property
    def results(self) -> Mapping[str, AdapterParity]:
        """Results of the adapters in the engine, by engine name."""
        return self._record.results

    def forget(self, name: str) -> None:
        """Forget the result of an adapter, because it is loaded again."""
        if self._checked is not None and self._checked.engine_name == name:
            self.close()
        self._retries.pop(name, None)
        if name in self._record.results:
            self._save(results={key: value for key, value in self._record.results.items() if key != name})

    def step(
        self,
        snapshot: EngineSnapshot | None,
        wanted: Sequence[DesiredAdapter],
        unverified: frozenset[str],
        now: float,
    ) -> None:
        """Start a check if one is due.

        Args:
            snapshot: current snapshot of the engine; None while it is not ready.
            wanted: wanted revisions, the most important first.
            unverified: adapters whose canary has not passed.
            now: monotonic seconds.
        """
        if snapshot is None:
            self.close()
            return
        if snapshot.state.boot_id != self._record.boot_id:
            self.close()
            self._retries = {}
            self._save(boot_id=snapshot.state.boot_id, results={}, bases={})
        for name in self._record.results.keys() - snapshot.resident.keys():
            self.forget(name)
        due = [
            adapter
            for adapter in wanted
            if adapter.parity is not ParityMode.OFF
            and self._is_due(adapter.engine_name, now)
            and adapter.engine_name not in unverified
            and snapshot.resident.get(adapter.engine_name) == str(adapter_folder(self._adapters, adapter.digest))
        ]
        recorded = [adapter for adapter in due if self._has_answers(adapter)]
        if len(recorded) < len(due):
            missing = {adapter.engine_name for adapter in due} - {adapter.engine_name for adapter in recorded}
            self._save(results={**self._record.results, **dict.fromkeys(missing, _NOT_RECORDED)})
        next_ = min(recorded, key=_is_in_background, default=None)
        if next_ is None:
            return
        if self._checked is not None:
            if _is_in_background(next_) or not _is_in_background(self._checked):
                return
            self.close()  # it may wait for a long time behind clients' requests
        self._checked = next_
        self._check = asyncio.create_task(self._run(next_, snapshot, now))
        self._check.add_done_callback(self._finished)

    def close(self) -> None:
        """Stop the running check."""
        if self._check is not None:
            self._check.cancel()
        self._check, self._checked = None, None

    def _has_answers(self, adapter: DesiredAdapter) -> bool:
        folder = adapter_folder(self._adapters, adapter.digest)
        return any((folder / name).exists() for name in (PARITY_FILE, PARITY_ROWS_FILE))

    def _is_due(self, name: str, now: float) -> bool:
        result = self._record.results.get(name)
        if result is None:
            return True
        return result.verdict is ParityVerdict.UNFINISHED and now >= self._retries.get(name, _Retry()).at

    def _finished(self, task: asyncio.Task[None]) -> None:
        if task is self._check:
            self._check, self._checked = None, None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a parity check failed", exc_info=error)
        self._changed()

    async def _run(self, adapter: DesiredAdapter, snapshot: EngineSnapshot, now: float) -> None:
        name, digest = adapter.engine_name, adapter.digest
        folder = adapter_folder(self._adapters, digest)
        try:
            parities = await asyncio.to_thread(_recorded, folder, snapshot.length)
        except (OSError, ValueError) as error:
            self._save_result(name, AdapterParity(verdict=ParityVerdict.NOT_RECORDED, message=str(error)))
            return
        if not parities:
            self._save_result(name, _NOT_RECORDED)
            return
        gap = gap_of(parities)
        limit = tolerance(parities[0].data_type, snapshot.state.adapters.data_type)
        engine = _Engine(
            self._client,
            snapshot.base,
            snapshot.length,
            IN_BACKGROUND if _is_in_background(adapter) else TRAFFIC_WAITS,
        )
        measured = Measured(base=self._record.bases.get(digest))
        if self._record.deaths.get(digest, 0) >= MAX_DEATHS:
            message = f"the engine died {MAX_DEATHS} times while it answered the prompts of {PARITY_FILE}"
            judgement = Judgement(ParityVerdict.UNDECIDED, message)
        elif problem := await self._measure(engine, adapter, parities, measured):
            judgement = Judgement(ParityVerdict.UNFINISHED, problem)
        else:
            judgement = judge(measured, gap, limit)
            self._forget_deaths(digest)
        if judgement.verdict is ParityVerdict.UNFINISHED:
            retry = self._retries.setdefault(name, _Retry())
            retry.at = now + min(MAX_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2**retry.attempts)
            retry.attempts += 1
        else:
            log.info("parity of %s: %s, %s", name, judgement.verdict, judgement.message)
            if measured.base is not None:
                self._save(bases={**self._record.bases, digest: measured.base})
        result = AdapterParity(
            verdict=judgement.verdict,
            distance=_finite(measured.adapter),
            base_distance=_finite(measured.base),
            gap=_finite(gap),
            tolerance=limit,
            message=judgement.message,
        )
        self._save_result(name, result)

    async def _measure(
        self, engine: _Engine, adapter: DesiredAdapter, parities: Sequence[Parity], measured: Measured
    ) -> str:
        """Fill in the distances; return the reason why they are not complete, or an empty string."""
        probes = [probe for parity in parities for probe in parity.probes]
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                measured.template = await _template_agrees(engine, adapter.engine_name, probes)
                await _measure_adapter(engine, adapter.engine_name, probes, measured)
                if measured.base is None:
                    measured.base = await _measure_base(engine, probes)
        except RequestRefusedError as error:
            measured.refusal = str(error)[:300]
        except EngineLostError:
            deaths = self._record.deaths.get(adapter.digest, 0) + 1
            self._save(deaths={**self._record.deaths, adapter.digest: deaths})
            return "the engine died during the check"
        except (EngineDownError, _UnusableAnswerError) as error:
            return f"the engine does not answer the prompts of {PARITY_FILE}: {error}"
        except TimeoutError:
            return f"the engine is busy: it has not answered the prompts of {PARITY_FILE} in {CHECK_SECONDS:.0f} s"
        return ""

    def _forget_deaths(self, digest: str) -> None:
        if digest in self._record.deaths:
            self._save(deaths={key: count for key, count in self._record.deaths.items() if key != digest})

    def _save_result(self, name: str, result: AdapterParity) -> None:
        self._save(results={**self._record.results, name: result})

    def _save(self, **changes: object) -> None:
        self._record = self._record.model_copy(update=changes)
        write_state(self._path, self._record)


def _is_in_background(adapter: DesiredAdapter) -> bool:
    return adapter.parity is not ParityMode.REQUIRED


def _recorded(folder: Path, length: int) -> list[Parity]:
    """Return the expected answers that fit into the engine's longest request; those to rows first.

    Raises:
        ValueError: a file is malformed.
        OSError: a file cannot be read.
    """
    parities = []
    room = MAX_PROBES
    for name in (PARITY_ROWS_FILE, PARITY_FILE):
        path = folder / name
        if not path.exists():
            continue
        parity = parse_parity(path.read_bytes(), name)
        probes = [probe for probe in parity.probes if _length(probe) <= length][:room]
        room -= len(probes)
        if probes:
            parities.append(parity.model_copy(update={"probes": probes}))
    return parities


def _length(probe: ParityProbe) -> int:
    of_base = len(probe.base_answer.token_ids) if probe.base_answer else 0
    return len(probe.prompt_token_ids) + max(len(probe.answer_token_ids), of_base)


async def _template_agrees(engine: _Engine, model: str, probes: Sequence[ParityProbe]) -> bool | None:
    """Return True if the engine renders a prompt as in training; None if no prompt is rendered."""
    probe = next((probe for probe in probes if probe.chat and probe.prompt), None)
    if probe is None or probe.prompt is None:
        return None
    try:
        found = await engine.rendered(model, probe.prompt)
    except RequestRefusedError:
        return False
    return None if found is None else found == probe.prompt_token_ids


async def _measure_adapter(engine: _Engine, model: str, probes: Sequence[ParityProbe], measured: Measured) -> None:
    answers = await asyncio.gather(
        *(
            _distances(engine, model, probe.prompt_token_ids, probe.answer_token_ids, (probe.adapter, probe.base))
            for probe in probes
        )
    )
    measured.adapter = max(own for own, _ in answers)
    measured.adapter_from_base = max(of_base for _, of_base in answers)


async def _measure_base(engine: _Engine, probes: Sequence[ParityProbe]) -> float | None:
    found = await asyncio.gather(
        *(
            _distances(
                engine,
                engine.base,
                probe.prompt_token_ids,
                probe.base_answer.token_ids,
                (probe.base_answer.positions,),
            )
            for probe in probes
            if probe.base_answer is not None
        )
    )
    return max((own for (own,) in found), default=None)


async def _distances(
    engine: _Engine,
    model: str,
    prompt: Sequence[int],
    answer: Sequence[int],
    expectations: Sequence[Sequence[ParityPosition]],
) -> list[float]:
    """Return the distance of the engine's answer from each of several expectations of the same tokens."""
    distances = [0.0] * len(expectations)
    done = requests = 0
    while done < len(answer) and requests < MAX_REQUESTS:
        served = await engine.generate(model, [*prompt, *answer[:done]], len(answer) - done)
        requests += 1
        compared = matching(answer[done:], served)
        if not compared:
            raise _UnusableAnswerError("it generated no token")
        for index, position in enumerate(served[:compared], done):
            for which, expected in enumerate(expectations):
                distances[which] = max(distances[which], difference(answer[index], expected[index], position))
        done += compared
    return distances


def _parsed(text: str) -> dict[str, Any]:
    """Return a reply of the engine.

    Raises:
        _UnusableAnswerError: it is an error.
    """
    try:
        reply = json.loads(text)
        if not isinstance(reply, dict) or "choices" not in reply:
            raise _UnusableAnswerError(text[:200])
    except ValueError:
        raise _UnusableAnswerError(text[:200]) from None
    return reply


def _finite(value: float | None) -> float | None:
    """Return a distance as it is reported; 1000 nats stand for values that are not numbers."""
    return None if value is None else min(value, 1000.0)
