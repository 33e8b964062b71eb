"""Guard of the engine: detects changed answers of the base model, and hangs.

At each start of the engine, before any adapter is loaded, its answer to a canary prompt is recorded. The canary is
repeated after every load, once a minute, and when no token is processed. Two faults make the pod unready and restart
the engine, which runs in another container and exits on request; its supervisor starts another:

- The base model's answers changed: CONFIRMATIONS consecutive answers differ from the reference by more than noise. If
  only one adapter can be the cause (it was loaded since the last good canary, and no other was loaded or used since),
  it is permanently refused on this pod. Otherwise the adapters that were loaded since are on trial: after the restart
  each of them is loaded alone and before all others, so that it is not blamed for damage that another adapter did when
  it was used. The adapters that were used since are suspects: each incident keeps only the suspects that were used in
  it too, and the last remaining one is refused.
- The engine hangs: a canary has waited for HANG_SECONDS, in which the engine processed no token at all. A busy engine
  processes tokens, however long its queue is. After STALL_SECONDS the pod receives no more requests; an engine that
  was only starved of CPU receives them again after its next token.

An adapter is also refused if the engine died in MAX_FATAL_LOADS consecutive attempts to load it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from tunesmith_server import canary
from tunesmith_server.canary import CanaryAnswer
from tunesmith_server.engine import EngineDownError, RequestRefusedError
from tunesmith_server.state_file import read_state, write_state

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence

    from tunesmith.contracts.agent import DesiredAdapter
    from tunesmith_server.engine import EngineClient, EngineSnapshot

CANARY_SECONDS = 60.0
"""Time between two canaries of an idle engine. They cost 12 tokens a minute."""
CONFIRMATIONS = 3
"""Number of consecutive answers that must differ: each is computed in another batch, so that noise does not repeat."""
HANG_SECONDS = 30.0
"""Time without any token while a canary waits, after which the engine counts as hung. The longest step of a
healthy engine is the prefill of a full batch: some seconds on a CPU."""
STALL_SECONDS = 6.0
"""Time without a token while a canary waits, after which requests are routed to other pods."""
WARM_UP_SECONDS = 600.0
"""Time without a token before the first answer, while kernels are compiled, after which the engine counts as hung."""
QUIET_SECONDS = 3.0
"""Time without a token while requests run, after which a canary is sent."""
PROGRESS_SECONDS = 1.0
"""Time between two reads of the engine's own counters while no token passes the middleware."""
MAX_UNEXPLAINED = 3
"""Number of restarts for changed answers without a suspect, after which changes are only logged: such an engine is not
deterministic, and another restart does not help."""
MAX_REFUSED = 256
MAX_FATAL_LOADS = 3
"""Number of consecutive loads of an adapter, during all of which the engine died, after which it is refused. A crash
with another cause may coincide with a load."""

log = logging.getLogger(__name__)


class GuardRecord(BaseModel):
    """State that outlives the agent's process, in the state folder.

    Attributes:
        boot_id: process of the engine to which `reference` belongs.
        reference: first answer of that process.
        refused: reason for never loading a digest on this pod again, by digest.
        on_trial: digests that are loaded alone, and before others.
        suspected: digests, one of which changed the base model's answers when it was used.
        unexplained: number of restarts for changed answers without a suspect.
        fatal_loads: number of consecutive loads during which the engine died, by digest.
    """

    model_config = ConfigDict(extra="ignore")

    boot_id: str = ""
    reference: CanaryAnswer | None = None
    refused: dict[str, str] = Field(default_factory=dict)
    on_trial: frozenset[str] = frozenset()
    suspected: frozenset[str] = frozenset()
    unexplained: int = 0
    fatal_loads: dict[str, int] = Field(default_factory=dict)


@dataclass
class _Boot:
    """State of one process of the engine."""

    verified: set[str] = field(default_factory=set)
    checked_at: float = float("-inf")
    differing: int = 0
    used: dict[str, int] = field(default_factory=dict)
    progress: tuple[object, ...] = ()
    progress_at: float = float("-inf")
    counters_read_at: float = float("-inf")


class Guard:
    """Guard of one engine.

    Args:
        engine: client of the pod's vLLM.
        state: folder for the record.
        changed: called when `problem`, `stalled`, `ready` or `unverified` may have changed.
        canary_seconds: time between two canaries of an idle engine.
        hang_seconds: time without a token after which an engine counts as hung.
        stall_seconds: time without a token after which it receives no requests.
    """

    def __init__(
        self,
        engine: EngineClient,
        state: Path,
        changed: Callable[[], None],
        *,
        canary_seconds: float = CANARY_SECONDS,
        hang_seconds: float = HANG_SECONDS,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._engine = engine
        self._path = state / "guard.json"
        self._changed = changed
        self._canary_seconds = canary_seconds
        self._hang_seconds = hang_seconds
        self._stall_seconds = stall_seconds
        self._record = read_state(self._path, GuardRecord())
        self._boot = _Boot()
        self._boot_id = ""
        self._resident: dict[str, str] = {}
        self._check: asyncio.Task[None] | None = None
        self._check_started = float("inf")
        self.problem = ""
        self.stalled = ""

    @property
    def ready(self) -> bool:
        """True if the engine's first answer is recorded: it is warmed up, and adapters may be loaded."""
        return self._boot_id != "" and self._record.boot_id == self._boot_id and self._record.reference is not None

    @property
    def refused(self) -> Mapping[str, str]:
        """Reason for never loading a digest on this pod again, by digest."""
        return self._record.refused

    @property
    def unverified(self) -> frozenset[str]:
        """Adapters in the engine whose first canary has not passed."""
        return frozenset(self._resident) - self._boot.verified

    def allowed_loads(self, wanted: Sequence[DesiredAdapter]) -> list[DesiredAdapter]:
        """Return the adapters that may be loaded now: none while the engine is suspect; those on trial first, alone."""
        if self.problem or self._boot.differing or not self.ready:
            return []
        on_trial = [adapter for adapter in wanted if adapter.digest in self._record.on_trial]
        if any(self._resident[name] in self._record.on_trial for name in self.unverified):
            return []
        return on_trial[:1] or list(wanted)

    async def step(self, snapshot: EngineSnapshot | None, now: float) -> None:
        """Observe the engine: start a canary if one is due, and restart an engine on which one does not finish.

        Args:
            snapshot: current snapshot of the engine; None while it does not answer.
            now: monotonic seconds.
        """
        if snapshot is None:
            self._forget_check()
            return
        if snapshot.state.boot_id != self._boot_id:
            self._record_boot(snapshot)
        self._resident = {name: _digest(path) for name, path in snapshot.resident.items()}
        self._boot.verified &= set(self._resident)
        if self.problem:
            return  # the engine is shutting down
        await self._observe_progress(snapshot, now)
        self._observe_stall(now)
        if self._check is None:
            if self._due(snapshot, now):
                self._start_check(self._canary(snapshot, now), now)
        else:
            limit = self._hang_seconds if self.ready else WARM_UP_SECONDS
            if min(now - self._check_started, now - self._boot.progress_at) >= limit:
                await self._restart(
                    f"The engine has processed no token for {limit:.0f} s although requests are waiting: it hangs and "
                    "is restarted.",
                    hung=True,
                )

    async def load_hung(self, name: str, path: str) -> None:
        """Restart the engine because it did not finish loading an adapter, and refuse the adapter from now on."""
        self._refuse(frozenset({_digest(path)}), f"vLLM did not finish loading {name}; it is refused on this pod.")
        await self._restart(f"The engine did not finish loading the adapter {name}: it hangs and is restarted.")

    def load_crashed(self, name: str, path: str) -> None:
        """Record that the engine died while it loaded an adapter; refuse the adapter if that happens repeatedly."""
        digest = _digest(path)
        count = self._record.fatal_loads.get(digest, 0) + 1
        counts = {**self._record.fatal_loads, digest: count}
        self._save(fatal_loads=dict(list(counts.items())[-MAX_REFUSED:]))
        if count >= MAX_FATAL_LOADS:
            self._refuse(
                frozenset({digest}), f"vLLM died {count} times while loading {name}; it is refused on this pod."
            )

    def load_finished(self, path: str) -> None:
        """Record that the engine survived the load of an adapter."""
        if (digest := _digest(path)) in self._record.fatal_loads:
            self._save(fatal_loads={key: count for key, count in self._record.fatal_loads.items() if key != digest})

    def close(self) -> None:
        """Stop the background task."""
        self._forget_check()

    def _record_boot(self, snapshot: EngineSnapshot) -> None:
        self._forget_check()
        self._boot_id = snapshot.state.boot_id
        self._boot = _Boot(used=_requests(snapshot))
        self.problem = self.stalled = ""
        if self._record.boot_id == self._boot_id:  # the agent restarted, the engine did not
            self._boot.verified = set(snapshot.resident)
        else:
            self._save(boot_id=self._boot_id, reference=None)

    def _due(self, snapshot: EngineSnapshot, now: float) -> bool:
        quiet = bool(snapshot.state.in_flight) and now - self._boot.progress_at >= QUIET_SECONDS
        waited = now - self._boot.checked_at
        return (
            not self.ready
            or bool(self.unverified)
            or self._boot.differing > 0
            or waited >= self._canary_seconds
            or (quiet and waited >= QUIET_SECONDS)
        )

    async def _observe_progress(self, snapshot: EngineSnapshot, now: float) -> None:
        """Record when the engine last processed a token: from the middleware's totals, else vLLM's own counters."""
        passed = tuple(
            sorted((name, t.prompt_tokens + t.completion_tokens) for name, t in snapshot.state.totals.items())
        )
        busy = bool(snapshot.state.in_flight) or self._check is not None
        if not busy or passed != self._boot.progress[:-1]:
            self._boot.progress, self._boot.progress_at = (*passed, None), now
            return
        if now - self._boot.counters_read_at < PROGRESS_SECONDS:
            return
        self._boot.counters_read_at = now
        try:
            processed = await self._engine.processed_tokens()
        except EngineDownError:
            return
        if processed != self._boot.progress[-1]:
            self._boot.progress, self._boot.progress_at = (*passed, processed), now

    def _observe_stall(self, now: float) -> None:
        """Report an engine that processes no tokens, until it does or counts as hung."""
        waited = now - self._boot.progress_at
        stalled = (
            self.ready
            and self._check is not None
            and now - self._check_started >= QUIET_SECONDS
            and waited >= self._stall_seconds
        )
        if stalled == bool(self.stalled):
            return
        self.stalled = ""
        if stalled:
            self.stalled = (
                f"The engine has processed no token for {waited:.0f} s although requests are waiting; it is restarted "
                f"after {self._hang_seconds:.0f} s."
            )
            log.warning("%s", self.stalled)
        self._changed()

    def _start_check(self, check: Coroutine[None, None, None], now: float) -> None:
        self._check_started = now
        self._check = asyncio.create_task(check)
        self._check.add_done_callback(self._check_finished)

    def _check_finished(self, task: asyncio.Task[None]) -> None:
        if task is self._check:
            self._check = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the canary failed", exc_info=error)
        self._changed()

    def _forget_check(self) -> None:
        if self._check is not None:
            self._check.cancel()
            self._check = None

    async def _canary(self, snapshot: EngineSnapshot, now: float) -> None:
        model, length, used = snapshot.base, snapshot.length, _requests(snapshot)
        candidates = self.unverified
        try:
            if not self.ready:
                first = canary.warm_up(model, length, can_constrain=snapshot.state.can_constrain)
                await asyncio.gather(*(self._send_probe(body) for body in first))
            # A harmful adapter does damage only when it computes.
            probes = [canary.request(name, length, max_tokens=4, logprobs=None) for name in sorted(candidates)]
            await asyncio.gather(*(self._send_probe(body) for body in probes))
            answer = canary.read(await self._engine.complete(canary.request(model, length)))
        except EngineDownError as error:
            log.info("canary: %s", error)
            return
        except RequestRefusedError as error:
            if not self.ready:
                self.problem = f"The engine refuses the agent's canary request: {error}"
                log.exception("%s", self.problem)
                return
            answer = None  # the engine accepted this request before; log-probabilities that are NaN cause a 400
        self._boot.checked_at = now
        if not self.ready:
            if answer is None:
                await self._restart(
                    "The base model's first answer is not a sequence of tokens: the engine is restarted."
                )
                return
            log.info("canary: %r", "".join(answer.tokens))
            self._save(reference=answer)
            self._boot.verified |= candidates
        elif canary.agrees(self._record.reference, answer):
            self._passed(candidates, used)
        else:
            self._boot.differing += 1
            log.warning("canary: the base model's answer differs (%d of %d)", self._boot.differing, CONFIRMATIONS)
            if self._boot.differing >= CONFIRMATIONS:
                await self._find_cause(snapshot)

    async def _send_probe(self, body: dict[str, object]) -> None:
        """Send a request whose answer does not matter."""
        with contextlib.suppress(RequestRefusedError):
            await self._engine.complete(body)

    def _passed(self, candidates: frozenset[str], used: dict[str, int]) -> None:
        self._boot.differing = 0
        self._boot.verified |= candidates
        self._boot.used = used
        passed = self._record.on_trial & {self._resident.get(name, "") for name in candidates}
        if passed:
            self._save(on_trial=self._record.on_trial - passed)

    async def _find_cause(self, snapshot: EngineSnapshot) -> None:
        """Determine which adapters may have changed the base model's answers, and restart the engine."""
        loaded, requests = self.unverified, _requests(snapshot)
        used = {name for name in self._resident if requests.get(name, 0) > self._boot.used.get(name, 0)} - loaded
        if not loaded and not used:
            if self._record.unexplained >= MAX_UNEXPLAINED:
                log.error("canary: the base model's answers change without an adapter; further changes are only logged")
                self._boot.differing = 0
                return
            self._save(unexplained=self._record.unexplained + 1)
            await self._restart(
                "The base model's answers changed although no adapter was used: the engine is restarted."
            )
            return
        if len(loaded) == 1 and not used:
            self._refuse_harmful(self._digests(loaded))
        else:
            before = self._record.suspected
            suspected = before & self._digests(used) or self._digests(used)
            self._save(on_trial=self._record.on_trial | self._digests(loaded), suspected=suspected)
            if not loaded and before and len(suspected) == 1:
                self._refuse_harmful(suspected)
        events = [f"{_adapters_phrase(names)} {verb}" for names, verb in ((loaded, "loaded"), (used, "used")) if names]
        await self._restart(f"The base model's answers changed after {' and '.join(events)}: the engine is restarted.")

    def _refuse_harmful(self, digest: frozenset[str]) -> None:
        self._refuse(
            digest, "It changes the answers of the base model and of other adapters; it is refused on this pod."
        )
        self._save(on_trial=self._record.on_trial - digest, suspected=frozenset())

    def _digests(self, names: Iterable[str]) -> frozenset[str]:
        return frozenset(self._resident[name] for name in names)

    def _refuse(self, digests: frozenset[str], sentence: str) -> None:
        refused = {**self._record.refused, **dict.fromkeys(digests, sentence)}
        self._save(refused=dict(list(refused.items())[-MAX_REFUSED:]))

    async def _restart(self, problem: str, *, hung: bool = False) -> None:
        self.problem, self.stalled = problem, ""
        log.error("%s", problem)
        self._changed()
        try:
            await self._engine.restart(problem, hung=hung)
        except EngineDownError as error:
            log.warning("restart: %s; its supervisor kills an engine that does not answer", error)

    def _save(self, **changes: object) -> None:
        self._record = self._record.model_copy(update=changes)
        write_state(self._path, self._record)


def _digest(path: str) -> str:
    name = Path(path).name
    return f"sha256:{name}" if re.fullmatch("[0-9a-f]{64}", name) else name


def _adapters_phrase(names: Collection[str]) -> str:
    listed = ", ".join(sorted(names))
    return f"the adapter {listed} was" if len(names) == 1 else f"the adapters {listed} were"


def _requests(snapshot: EngineSnapshot) -> dict[str, int]:
    return {name: totals.requests for name, totals in snapshot.state.totals.items()}
