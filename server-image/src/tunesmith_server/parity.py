"""Parity checks: compare an adapter's answers on the engine with those that its artifact recorded after training.

An adapter is checked after each of its loads; the base model with the first check of each artifact on a process of the
engine. The requests do not precede those of clients: a check whose result traffic waits for is queued with them, any
other after them.

While no client's request runs, adapters are checked in groups: the engine answers the prompts of all of them in the
same steps, and those to the base model, which artifacts have in common, once for the group, after the adapters have
computed. Only a good result of a group counts. Otherwise the group's adapters are checked again one at a time, so that
an adapter is never blamed for another one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections import defaultdict
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
from tunesmith_server.artifact import adapter_folder, adapter_path
from tunesmith_server.engine import EngineDownError, EngineLostError, RequestRefusedError
from tunesmith_server.state_file import read_state, write_state

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from pathlib import Path

    from tunesmith.contracts.agent import DesiredAdapter
    from tunesmith.contracts.parity import BaseAnswer
    from tunesmith_server.engine import EngineClient, EngineSnapshot

FILE = "parity-checks.json"
CHECK_SECONDS = 120.0
"""Time limit of a check, after which it is retried: the engine is busy."""
FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS = 5.0, 300.0
MAX_GROUP = 8
"""Adapters that are checked at the same time."""
MAX_REQUESTS = 4
"""Requests for one answer: the engine may choose another token where two are about equally likely, and the rest of the
expected answer is then compared with another request."""
MAX_DEATHS = 3
"""Number of consecutive checks of an artifact during which the engine died, after which it is not checked again on this
pod. A crash with another cause may coincide with a check. At most one of those checks was that of a group."""
ALTERNATIVES = 5
TRAFFIC_WAITS, IN_BACKGROUND = 0, 1
"""Priorities of requests: that of clients, and a later one."""
_MAX_RENDERED = 64
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
        # Without a penalty of its own, a request gets that of the base model's generation_config.json.
        self.body = {"temperature": 0, "repetition_penalty": 1, "ignore_eos": True, "priority": self.priority}

    async def generate(self, model: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[ServedPosition]]:
        """Return the greedy answers to prompts, in their order."""
        body = {
            **self.body,
            "model": model,
            "prompt": [list(prompt) for prompt in prompts],
            "max_tokens": tokens,
            "logprobs": ALTERNATIVES,
            "return_tokens_as_token_ids": True,
            "cache_salt": secrets.token_hex(16),
        }
        choices = _parsed(await self.client.complete(body, _BY_IDS))["choices"]
        try:
            answers = [served_positions(choice["logprobs"]) for choice in choices]
        except (ValueError, KeyError, TypeError) as error:
            raise _UnusableAnswerError(f"its answer is malformed: {error!r}") from None
        if len(answers) != len(prompts):
            raise _UnusableAnswerError(f"it answered {len(answers)} of {len(prompts)} prompts")
        return answers

    async def rendered(self, message: str) -> list[int] | None:
        """Return the tokens of a chat with one message; None if the engine does not report them."""
        body = {
            **self.body,
            "model": self.base,
            "messages": [{"role": "user", "content": message}],
            "max_tokens": 1,
            "return_token_ids": True,
        }
        return _parsed(await self.client.complete(body, _BY_MESSAGES)).get("prompt_token_ids")


class _UnusableAnswerError(Exception):
    """The engine failed at a request."""


@dataclass
class _Check:
    """Check of one adapter.

    Attributes:
        adapter: revision.
        fixed: expected answers to the fixed prompts.
        rows: expected answers to prompts of rows.
        measured: distances.
        problem: reason why the distances are not complete; empty: they are.
        engine_died: True if the engine closed the connection meanwhile.
    """

    adapter: DesiredAdapter
    fixed: Parity | None
    rows: Parity | None
    measured: Measured
    problem: str = ""
    engine_died: bool = False

    @property
    def parities(self) -> list[Parity]:
        """Expected answers, those to rows first."""
        return [parity for parity in (self.rows, self.fixed) if parity is not None]

    @property
    def probes(self) -> list[ParityProbe]:
        """All prompts with their answers."""
        return [probe for parity in self.parities for probe in parity.probes]

    @property
    def base_answers(self) -> list[tuple[ParityProbe, BaseAnswer]]:
        """Prompts with answers of the base model: the fixed ones, which artifacts have in common, if it has any."""
        of_fixed = _base_answers(self.fixed)
        return of_fixed or _base_answers(self.rows)


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
        self._alone: set[str] = set()
        self._rendered: dict[str, list[int] | None] = {}
        self._task: asyncio.Task[None] | None = None
        self._group: list[DesiredAdapter] = []

    @property
    def results(self) -> Mapping[str, AdapterParity]:
        """Results of the adapters in the engine, by engine name."""
        return self._record.results

    def forget(self, name: str) -> None:
        """Forget the result of an adapter, because it is loaded again."""
        if any(adapter.engine_name == name for adapter in self._group):
            self.close()
        self._alone.discard(name)
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
            self._retries, self._alone, self._rendered = {}, set(), {}
            self._save(boot_id=snapshot.state.boot_id, results={}, bases={})
        for name in self._record.results.keys() - snapshot.resident.keys():
            self.forget(name)
        self._forget_others(wanted, snapshot)
        due = [
            adapter
            for adapter in wanted
            if adapter.parity is not ParityMode.OFF
            and self._is_due(adapter.engine_name, now)
            and adapter.engine_name not in unverified
            and snapshot.resident.get(adapter.engine_name) == adapter_path(self._adapters, adapter.digest)
        ]
        recorded = [adapter for adapter in due if self._has_answers(adapter)]
        if len(recorded) < len(due):
            missing = {adapter.engine_name for adapter in due} - {adapter.engine_name for adapter in recorded}
            self._save(results={**self._record.results, **dict.fromkeys(missing, _NOT_RECORDED)})
        group = self._next_group(recorded, is_busy=any(snapshot.state.in_flight.values()))
        if not group:
            return
        if self._group:
            if _is_in_background(group[0]) or not _is_in_background(self._group[0]):
                return
            self.close()  # it may wait for a long time behind clients' requests
        self._group = group
        self._task = asyncio.create_task(self._run(group, snapshot, now))
        self._task.add_done_callback(self._finished)

    def close(self) -> None:
        """Stop the running check."""
        if self._task is not None:
            self._task.cancel()
        self._task, self._group = None, []

    def _next_group(self, due: Sequence[DesiredAdapter], *, is_busy: bool) -> list[DesiredAdapter]:
        """Return the adapters to check next: those that traffic waits for first, and only one of an engine in use."""
        required = [adapter for adapter in due if not _is_in_background(adapter)] or due
        together = [adapter for adapter in required if not self._is_checked_alone(adapter)]
        if together:
            return together[: 1 if is_busy else MAX_GROUP]
        return list(required[:1])

    def _is_checked_alone(self, adapter: DesiredAdapter) -> bool:
        return (
            adapter.engine_name in self._alone
            or adapter.engine_name in self._retries
            or adapter.digest in self._record.deaths
        )

    def _forget_others(self, wanted: Sequence[DesiredAdapter], snapshot: EngineSnapshot) -> None:
        """Forget what is recorded of artifacts that are neither wanted nor in the engine any more."""
        digests = {adapter.digest for adapter in wanted} | {
            f"sha256:{path.rpartition('/')[2]}" for path in snapshot.resident.values()
        }
        bases = {digest: base for digest, base in self._record.bases.items() if digest in digests}
        deaths = {digest: count for digest, count in self._record.deaths.items() if digest in digests}
        if len(bases) < len(self._record.bases) or len(deaths) < len(self._record.deaths):
            self._save(bases=bases, deaths=deaths)

    def _has_answers(self, adapter: DesiredAdapter) -> bool:
        folder = adapter_folder(self._adapters, adapter.digest)
        return any((folder / name).exists() for name in (PARITY_FILE, PARITY_ROWS_FILE))

    def _is_due(self, name: str, now: float) -> bool:
        result = self._record.results.get(name)
        if result is None:
            return True
        return result.verdict is ParityVerdict.UNFINISHED and now >= self._retries.get(name, _Retry()).at

    def _finished(self, task: asyncio.Task[None]) -> None:
        if task is self._task:
            self._task, self._group = None, []
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a parity check failed", exc_info=error)
        self._changed()

    async def _run(self, group: Sequence[DesiredAdapter], snapshot: EngineSnapshot, now: float) -> None:
        results: dict[str, AdapterParity] = {}
        checks = []
        for adapter in group:
            folder = adapter_folder(self._adapters, adapter.digest)
            try:
                fixed, rows = await asyncio.to_thread(_recorded, folder, snapshot.length)
            except (OSError, ValueError) as error:
                message = str(error)
                results[adapter.engine_name] = AdapterParity(verdict=ParityVerdict.NOT_RECORDED, message=message)
                continue
            if fixed is None and rows is None:
                results[adapter.engine_name] = _NOT_RECORDED
                continue
            checks.append(_Check(adapter, fixed, rows, Measured(base=self._record.bases.get(adapter.digest))))
        priority = IN_BACKGROUND if _is_in_background(group[0]) else TRAFFIC_WAITS
        engine = _Engine(self._client, snapshot.base, snapshot.length, priority)
        fatal = [check for check in checks if self._record.deaths.get(check.adapter.digest, 0) >= MAX_DEATHS]
        await self._measure(engine, [check for check in checks if check not in fatal])
        bases, sound = dict(self._record.bases), []
        for check in checks:
            name, digest, gap = check.adapter.engine_name, check.adapter.digest, gap_of(check.parities)
            limit = tolerance(check.parities[0].data_type, snapshot.state.adapters.data_type)
            judgement = self._judge(check, gap, limit, is_fatal=check in fatal)
            if len(group) > 1 and judgement.verdict in {ParityVerdict.UNFINISHED, ParityVerdict.FAILED}:
                log.info("parity of %s is checked alone: %s", name, judgement.message)
                self._alone.add(name)
                continue
            if judgement.verdict is ParityVerdict.UNFINISHED:
                retry = self._retries.setdefault(name, _Retry())
                retry.at = now + min(MAX_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2**retry.attempts)
                retry.attempts += 1
            else:
                log.info("parity of %s: %s, %s", name, judgement.verdict, judgement.message)
                self._alone.discard(name)
                if not check.problem and check not in fatal:
                    sound.append(digest)
                if check.measured.base is not None:
                    bases[digest] = check.measured.base
            results[name] = AdapterParity(
                verdict=judgement.verdict,
                distance=_finite(check.measured.adapter),
                base_distance=_finite(check.measured.base),
                gap=_finite(gap),
                tolerance=limit,
                message=judgement.message,
            )
        deaths = {digest: count for digest, count in self._record.deaths.items() if digest not in sound}
        self._save(results={**self._record.results, **results}, bases=bases, deaths=deaths)

    def _judge(self, check: _Check, gap: float, limit: float, *, is_fatal: bool) -> Judgement:
        if is_fatal:
            message = f"the engine died {MAX_DEATHS} times while it answered the prompts of {PARITY_FILE}"
            return Judgement(ParityVerdict.UNDECIDED, message)
        if check.problem:
            return Judgement(ParityVerdict.UNFINISHED, check.problem)
        return judge(check.measured, gap, limit)

    async def _measure(self, engine: _Engine, checks: Sequence[_Check]) -> None:
        """Fill in the distances of a group, or the problems."""
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                for check in checks:
                    await _attempt([check], self._compare_template(engine, check))
                await asyncio.gather(*(_attempt([check], _compare_adapter(engine, check)) for check in checks))
                # Afterwards: an adapter changes the base model, if at all, when it computes.
                due = [check for check in checks if check.measured.base is None and not check.problem]
                await _attempt(due, _compare_base(engine, due))
        except TimeoutError:
            for check in checks:
                check.problem = (
                    f"the engine is busy: it has not answered the prompts of {PARITY_FILE} in {CHECK_SECONDS:.0f} s"
                )
        if any(check.engine_died for check in checks):
            deaths = dict(self._record.deaths)
            for check in checks:
                deaths[check.adapter.digest] = deaths.get(check.adapter.digest, 0) + 1
                check.problem = "the engine died during the check"
            self._save(deaths=deaths)

    async def _compare_template(self, engine: _Engine, check: _Check) -> None:
        """Compare the engine's tokens of a chat with those in training. They do not depend on the adapter."""
        probe = next((probe for probe in check.probes if probe.chat and probe.prompt), None)
        if probe is None or probe.prompt is None:
            return
        if probe.prompt not in self._rendered:
            if len(self._rendered) >= _MAX_RENDERED:
                self._rendered.clear()
            try:
                self._rendered[probe.prompt] = await engine.rendered(probe.prompt)
            except RequestRefusedError:
                check.measured.template = False
                return
        found = self._rendered[probe.prompt]
        check.measured.template = None if found is None else found == probe.prompt_token_ids

    def _save(self, **changes: object) -> None:
        self._record = self._record.model_copy(update=changes)
        write_state(self._path, self._record)


def _is_in_background(adapter: DesiredAdapter) -> bool:
    return adapter.parity is not ParityMode.REQUIRED


def _recorded(folder: Path, length: int) -> tuple[Parity | None, Parity | None]:
    """Return the expected answers, to fixed prompts and to rows, that fit into the engine's longest request.

    Raises:
        ValueError: a file is malformed.
        OSError: a file cannot be read.
    """
    found: dict[str, Parity] = {}
    room = MAX_PROBES
    for name in (PARITY_ROWS_FILE, PARITY_FILE):
        path = folder / name
        if not path.exists():
            continue
        parity = parse_parity(path.read_bytes(), name)
        probes = [probe for probe in parity.probes if _length(probe) <= length][:room]
        room -= len(probes)
        if probes:
            found[name] = parity.model_copy(update={"probes": probes})
    return found.get(PARITY_FILE), found.get(PARITY_ROWS_FILE)


def _length(probe: ParityProbe) -> int:
    of_base = len(probe.base_answer.token_ids) if probe.base_answer else 0
    return len(probe.prompt_token_ids) + max(len(probe.answer_token_ids), of_base)


def _base_answers(parity: Parity | None) -> list[tuple[ParityProbe, BaseAnswer]]:
    probes = parity.probes if parity is not None else []
    return [(probe, probe.base_answer) for probe in probes if probe.base_answer is not None]


async def _attempt(checks: Sequence[_Check], work: Awaitable[None]) -> None:
    """Do a part of checks, and record in them why it failed."""
    try:
        await work
    except RequestRefusedError as error:
        for check in checks:
            check.measured.refusal = str(error)[:300]
    except (EngineDownError, _UnusableAnswerError) as error:
        for check in checks:
            check.problem = f"the engine does not answer the prompts of {PARITY_FILE}: {error}"
            check.engine_died = isinstance(error, EngineLostError)


async def _compare_adapter(engine: _Engine, check: _Check) -> None:
    if check.problem or check.measured.template is False:
        return
    answers = [
        _Answer(probe.prompt_token_ids, probe.answer_token_ids, [probe.adapter, probe.base]) for probe in check.probes
    ]
    await _compare(engine, check.adapter.engine_name, answers)
    check.measured.adapter = max(answer.distances[0] for answer in answers)
    check.measured.adapter_from_base = max(answer.distances[1] for answer in answers)


async def _compare_base(engine: _Engine, checks: Sequence[_Check]) -> None:
    """Compare the base model's answers; a prompt that artifacts have in common is sent once."""
    answers: dict[tuple[tuple[int, ...], tuple[int, ...]], _Answer] = {}
    of_checks: list[list[tuple[_Answer, int]]] = []
    for check in checks:
        places = []
        for probe, expected in check.base_answers:
            key = (tuple(probe.prompt_token_ids), tuple(expected.token_ids))
            answer = answers.setdefault(key, _Answer(*key, []))
            places.append((answer, len(answer.expectations)))
            answer.expectations.append(expected.positions)
        of_checks.append(places)
    await _compare(engine, engine.base, list(answers.values()))
    for check, places in zip(checks, of_checks, strict=True):
        check.measured.base = max((answer.distances[index] for answer, index in places), default=None)


@dataclass
class _Answer:
    """Comparison of the engine's answer to a prompt with expectations of the same tokens.

    Attributes:
        prompt: tokens of the prompt.
        tokens: expected tokens.
        expectations: expected log-probabilities of those tokens.
        done: number of tokens that were compared.
        distances: distance from each expectation so far.
    """

    prompt: Sequence[int]
    tokens: Sequence[int]
    expectations: list[Sequence[ParityPosition]]
    done: int = 0
    distances: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    def compare(self, served: Sequence[ServedPosition]) -> None:
        """Compare the next tokens.

        Raises:
            _UnusableAnswerError: there are none.
        """
        compared = matching(self.tokens[self.done :], served)
        if not compared:
            raise _UnusableAnswerError("it generated no token")
        for place, position in enumerate(served[:compared], self.done):
            for index, expected in enumerate(self.expectations):
                found = difference(self.tokens[place], expected[place], position)
                self.distances[index] = max(self.distances[index], found)
        self.done += compared


async def _compare(engine: _Engine, model: str, answers: Sequence[_Answer]) -> None:
    """Compare the engine's answers of a model with the expected ones. Prompts with equally long answers go together."""

    async def compare(tokens: int, together: Sequence[_Answer]) -> None:
        prompts = [[*answer.prompt, *answer.tokens[: answer.done]] for answer in together]
        for answer, served in zip(together, await engine.generate(model, prompts, tokens), strict=True):
            answer.compare(served)

    for _ in range(MAX_REQUESTS):
        by_length: dict[int, list[_Answer]] = {}
        for answer in answers:
            if answer.done < len(answer.tokens):
                by_length.setdefault(len(answer.tokens) - answer.done, []).append(answer)
        await asyncio.gather(*(compare(tokens, together) for tokens, together in by_length.items()))


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
