"""Reconcile loop of the agent: observe the engine, plan, act, and publish the pod's state."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from tunesmith.contracts.agent import (
    MAX_ADAPTERS,
    TRAFFIC_SECONDS,
    DesiredAdapter,
    DesiredAdapters,
    PodState,
    PodUse,
    Residency,
    ResidencyState,
)
from tunesmith_server.activity import Activity
from tunesmith_server.artifact import adapter_path, remove_leftovers, remove_revision, stored_size, stored_sizes
from tunesmith_server.crashes import Crashes, StartTime
from tunesmith_server.engine import (
    EngineAdapters,
    EngineClient,
    EngineDownError,
    EngineLostError,
    EngineSilentError,
    EngineSnapshot,
    LoadRefusedError,
)
from tunesmith_server.guard import Guard
from tunesmith_server.lora import UnfitAdapterError
from tunesmith_server.parity import ParityChecks
from tunesmith_server.residency import MAX_LOAD_REFUSALS, Failure, Loads, PodObservation, PodPlan, next_loads, plan
from tunesmith_server.retention import Retention
from tunesmith_server.store import StoreError

if TYPE_CHECKING:
    from tunesmith.contracts.crash import EngineExit
    from tunesmith.contracts.traffic import Traffic
    from tunesmith_server.desired import DesiredFile
    from tunesmith_server.fetching import ArtifactFetcher
    from tunesmith_server.metrics import Metrics
    from tunesmith_server.settings import ServeSettings

PERIOD_SECONDS = 0.5
"""Time between two observations of the engine, unless an event triggers one sooner."""
PARALLEL_DOWNLOADS = 4

log = logging.getLogger(__name__)


class Agent:
    """Reconciler of the engine's adapters with the list of wanted adapters.

    Args:
        settings: settings of the pod.
        fingerprint: fingerprint of the base model.
        engine: client of the pod's vLLM.
        desired: persisted list of wanted adapters.
        fetcher: fetcher of artifacts.
        metrics: metrics to update.
    """

    def __init__(
        self,
        settings: ServeSettings,
        fingerprint: str,
        engine: EngineClient,
        desired: DesiredFile,
        fetcher: ArtifactFetcher,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._fingerprint = fingerprint
        self._engine = engine
        self._desired = desired
        self._fetcher = fetcher
        self._metrics = metrics
        self._snapshot: EngineSnapshot | None = None
        self._boot_id: str | None = None
        self._sizes = stored_sizes(settings.adapters)
        self._loads: dict[str, Loads] = {}
        self._supervisor = ""
        self._crashes = Crashes(settings.state)
        self._start_time = StartTime()
        self._activity = Activity()
        self._retention = Retention()
        self._downloads: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, Failure] = {}
        self._refused: set[str] = set()
        self._unwanted_since: dict[str, float] = {}
        self._ready_since = float("inf")
        self._wake = asyncio.Event()
        self._changed = asyncio.Condition()
        self._draining = False
        self._named: frozenset[str] = frozenset()
        self._traffic_due = 0.0
        self._download_slots = asyncio.Semaphore(PARALLEL_DOWNLOADS)
        self._guard = Guard(
            engine,
            settings.state,
            self._wake.set,
            canary_seconds=settings.canary_seconds,
            hang_seconds=settings.hang_seconds,
            stall_seconds=settings.stall_seconds,
        )
        self._parity = ParityChecks(engine, settings.adapters, settings.state, self._wake.set)
        self.state = PodState(base_model_fingerprint=fingerprint)

    async def put(self, wanted: DesiredAdapters) -> None:
        """Accept a new list.

        Raises:
            OutdatedError: the list is older than the current one.
            ImplausibleEpochError: its epoch is too far in the future.
        """
        before = {adapter.engine_name: adapter for adapter in self._wanted()}
        self._desired.put(wanted, time.time())
        after = {adapter.engine_name: adapter for adapter in wanted.adapters}
        for name in [name for name in self._failures if after.get(name) != before.get(name)]:
            self._forget(name)
        self._loads = {name: loads for name, loads in self._loads.items() if name in after}
        self._activity.forget_others(after)
        await self._publish()
        self._wake.set()

    async def changed(self, than: PodState, seconds: float) -> PodState:
        """Return the state as soon as it differs from `than`, or the current state after `seconds`."""
        async with self._changed:
            try:
                async with asyncio.timeout(seconds):
                    await self._changed.wait_for(lambda: self.state != than)
            except TimeoutError:
                pass
            return self.state

    async def record_exit(self, report: EngineExit) -> None:
        """Record that the engine exited; its supervisor starts another."""
        log.warning("the engine stopped: %s", report.reason)
        if self._crashes.record(report, time.time()):
            self._metrics.crashed()
        if self._snapshot is not None and self._snapshot.state.started_at <= report.started_at:
            self._snapshot = None
            self._metrics.engine_ready(ready=False)
        await self._publish()
        self._wake.set()

    async def drain(self) -> bool:
        """Refuse new requests and wait for running ones; return True if all finished within `drain_seconds`."""
        self._draining = True
        self._wake.set()
        try:
            async with asyncio.timeout(self._settings.drain_seconds):
                while not await self._drained():  # noqa: ASYNC110 - the engine is another process: it is polled
                    await asyncio.sleep(PERIOD_SECONDS / 2)
        except TimeoutError:
            log.warning("requests are still running after %s s of draining", self._settings.drain_seconds)
            return False
        return True

    async def _drained(self) -> bool:
        try:
            await self._engine.drain()
            snapshot = await self._engine.observe()
        except EngineDownError:
            return True  # an engine that is down runs no requests
        return snapshot.state.draining and not snapshot.state.in_flight

    async def run(self) -> None:
        """Reconcile until cancelled."""
        remove_leftovers(self._settings.adapters)
        try:
            while True:
                self._wake.clear()
                await self._pass()
                try:
                    async with asyncio.timeout(PERIOD_SECONDS):
                        await self._wake.wait()
                except TimeoutError:
                    pass
        finally:
            self._guard.close()
            self._parity.close()
            self._fetcher.close()
            for task in self._downloads.values():
                task.cancel()

    async def _pass(self) -> None:
        await self._observe()
        if not self._draining:
            await self._guard.step(self._snapshot, time.monotonic())
            self._check_parity()
        steps = plan(self._observation())
        await self._publish(steps)
        if self._draining:
            if self._snapshot is not None and not self._snapshot.state.draining:
                await self._try_drain()
            return
        for adapter in steps.downloads:
            self._downloads[adapter.digest] = asyncio.create_task(self._download(adapter))
        for name in steps.unloads:
            await self._unload(name)
        allowed = self._guard.allowed_loads(self._activity.most_recent_first(steps.loads))
        now = time.monotonic()
        self._ready_since = min(self._ready_since, now) if allowed else float("inf")
        loads = next_loads(allowed, len(self._downloads), now - self._ready_since)
        for adapter in loads:
            await self._load(adapter)
        if loads:
            self._ready_since = float("inf")
        if len(allowed) > len(loads) > 0:
            self._wake.set()
        if await self._name_base() or loads or steps.unloads:
            await self._observe()
            await self._guard.step(self._snapshot, time.monotonic())
            await self._publish()
        await self._remove_unused()

    def _check_parity(self) -> None:
        usable = self._snapshot if self._guard.ready and not self._guard.problem else None
        self._parity.step(usable, self._wanted(), self._guard.unverified, time.monotonic())

    async def _remove_unused(self) -> None:
        """Remove the files that the engine can no longer read."""
        snapshot = self._snapshot
        if snapshot is None or self._desired.current is None:
            return
        folders = {digest: adapter_path(self._settings.adapters, digest) for digest in self._sizes}
        unused = self._retention.unused(
            folders=folders,
            wanted={adapter.digest for adapter in self._wanted()} | set(self._downloads),
            registered=snapshot.leaving.union(snapshot.resident.values()),
            running=set(snapshot.state.in_flight),
            now=time.monotonic(),
        )
        for digest in unused:
            del self._sizes[digest]
            await asyncio.to_thread(remove_revision, self._settings.adapters, digest)
            log.info("removed the files of %s", digest)

    async def _try_drain(self) -> None:
        try:
            await self._engine.drain()
        except EngineDownError as error:
            log.info("%s", error)

    async def _observe(self) -> None:
        try:
            snapshot = await self._engine.observe()
        except EngineDownError as error:
            if self._snapshot is not None:
                log.warning("the engine is down: %s", error)
            self._snapshot = None
            self._metrics.engine_ready(ready=False)
            return
        self._metrics.engine_ready(ready=True)
        self._metrics.engine_totals(snapshot.state)
        if snapshot.state.boot_id != self._boot_id:
            self._record_boot(snapshot)
        self._snapshot = snapshot
        self._activity.observe(snapshot.state, time.monotonic())
        folder = {a.engine_name: adapter_path(self._settings.adapters, a.digest) for a in self._wanted()}
        now = time.monotonic()
        self._unwanted_since = {
            name: self._unwanted_since.get(name, now)
            for name, path in snapshot.resident.items()
            if folder.get(name) != path
        }

    def _record_boot(self, snapshot: EngineSnapshot) -> None:
        """Forget the refusals of the previous process, and that its container was drained.

        The kubelet also runs the preStop hook, which drains, before it restarts a container whose liveness probe
        failed. In a pod that is being deleted no container is restarted, but an engine that exits while it drains is.
        """
        log.info("the engine is up, boot %s", snapshot.state.boot_id)
        if not snapshot.state.can_constrain:
            log.warning(
                "the tokenizer of the base model has no decoder that maps tokens to bytes: requests with "
                "response_format, structured_outputs or a tool_choice are refused"
            )
        if self._boot_id is not None and snapshot.state.supervisor != self._supervisor:
            self._draining = False
        self._supervisor = snapshot.state.supervisor
        for name in self._refused.copy():
            self._forget(name)
        self._boot_id = snapshot.state.boot_id

    def _wanted(self) -> list[DesiredAdapter]:
        """Return the adapters that the engine should load."""
        listed = self._desired.current.adapters if self._desired.current else []
        return [adapter for adapter in listed if adapter.digest != self._settings.base_artifact]

    def _base_revisions(self) -> list[DesiredAdapter]:
        """Return the revisions that are the base model itself: nothing is loaded, it answers to their names."""
        listed = self._desired.current.adapters if self._desired.current else []
        return [revision for revision in listed if revision.digest == self._settings.base_artifact]

    async def _name_base(self) -> bool:
        """Set the names of the base model; return True if they have changed."""
        snapshot, names = self._snapshot, sorted(revision.engine_name for revision in self._base_revisions())
        if snapshot is None or self._desired.current is None:
            return False
        present = snapshot.state.adapters.base_names
        # What is about to be removed is not reported any more, even if the list changes meanwhile.
        self._named = frozenset(present) & frozenset(names)
        if present == names:
            return False
        try:
            await self._engine.set_base_names(names)
        except EngineDownError as error:
            log.warning("the names of the base model: %s", error)
            return False
        self._named = frozenset(names)
        return True

    def _base_residencies(self) -> list[Residency]:
        named: frozenset[str] = frozenset()
        if self._snapshot is not None and self._guard.ready:
            named = self._named.intersection(self._snapshot.state.adapters.base_names)
        return [
            Residency(
                engine_name=revision.engine_name,
                digest=revision.digest,
                state=ResidencyState.RESIDENT if revision.engine_name in named else ResidencyState.LOADING,
                message="" if revision.engine_name in named else "the engine is not ready",
            )
            for revision in self._base_revisions()
        ]

    def _observation(self) -> PodObservation:
        snapshot = self._snapshot
        # Before the first list, no adapter is known to be unwanted.
        has_list = self._desired.current is not None
        return PodObservation(
            now=time.monotonic(),
            desired=self._wanted(),
            folders={digest: adapter_path(self._settings.adapters, digest) for digest in self._sizes},
            downloading=frozenset(self._downloads),
            failures=self._failures | self._refused_failures(),
            engine=None if snapshot is None or not self._guard.ready else (snapshot.resident if has_list else {}),
            in_flight={} if snapshot is None else snapshot.state.in_flight,
            unwanted_since=self._unwanted_since,
            max_adapters=self._settings.max_adapters,
            unverified=self._guard.unverified,
            sizes=self._sizes,
            loads=self._loads,
            parity=self._parity.results,
        )

    def _refused_failures(self) -> dict[str, Failure]:
        """Return the failures of the adapters that the guard refuses on this pod."""
        return {
            adapter.engine_name: Failure(self._guard.refused[adapter.digest], permanent=True, attempts=1, retry_at=0.0)
            for adapter in self._wanted()
            if adapter.digest in self._guard.refused
        }

    async def _download(self, adapter: DesiredAdapter) -> None:
        try:
            async with self._download_slots:
                await asyncio.to_thread(self._fetcher.fetch, adapter)
            self._sizes[adapter.digest] = await asyncio.to_thread(stored_size, self._settings.adapters, adapter.digest)
            for name in [a.engine_name for a in self._wanted() if a.digest == adapter.digest]:
                self._forget(name)
        except UnfitAdapterError as error:
            self._fail(adapter, str(error), permanent=True)
        except StoreError as error:
            self._fail(adapter, str(error), permanent=error.permanent)
        except OSError as error:
            message = f"its files cannot be written to {self._settings.adapters}: {error.strerror or error}"
            self._fail(adapter, message, permanent=False)
        except Exception as error:
            log.exception("download of %s", adapter.engine_name)
            self._fail(adapter, f"the agent could not download it: {type(error).__name__}: {error}", permanent=False)
        finally:
            self._downloads.pop(adapter.digest, None)
            self._wake.set()

    async def _load(self, adapter: DesiredAdapter) -> None:
        name, started = adapter.engine_name, time.monotonic()
        self._parity.forget(name)
        folder = adapter_path(self._settings.adapters, adapter.digest)
        try:
            await self._engine.load(name, folder)
        except LoadRefusedError as error:
            previous = self._failures.get(name)
            permanent = name in self._refused and previous is not None and previous.attempts + 1 >= MAX_LOAD_REFUSALS
            self._fail(adapter, str(error), permanent=permanent)
            self._refused.add(name)
        except EngineSilentError:
            await self._guard.load_hung(name, folder)
        except EngineLostError as error:
            log.warning("loading %s: %s", name, error)
            self._guard.load_crashed(name, folder)
        except EngineDownError as error:
            log.warning("loading %s: %s", name, error)
        else:
            self._guard.load_finished(folder)
            seconds = time.monotonic() - started
            self._loads[name] = Loads(self._loads[name].count + 1 if name in self._loads else 1, round(seconds, 3))
            self._metrics.loaded(seconds)
            self._forget(name)
            log.info("loaded %s", name)

    async def _unload(self, name: str) -> None:
        try:
            await self._engine.unload(name)
            log.info("unloaded %s", name)
        except (LoadRefusedError, EngineDownError) as error:
            log.warning("unloading %s: %s", name, error)

    def _fail(self, adapter: DesiredAdapter, message: str, *, permanent: bool) -> None:
        name = adapter.engine_name
        failure = Failure.after(self._failures.get(name), message, permanent=permanent, now=time.monotonic())
        self._failures[name] = failure
        self._metrics.failed(permanent=permanent)
        log.warning("%s: %s", name, message)

    def _forget(self, name: str) -> None:
        self._failures.pop(name, None)
        self._refused.discard(name)

    def _use(self, snapshot: EngineSnapshot | None) -> PodUse:
        """Return what the pod's adapters use."""
        engine = EngineAdapters() if snapshot is None else snapshot.state.adapters
        in_flight = {} if snapshot is None else snapshot.state.in_flight
        resident = {} if snapshot is None else snapshot.resident
        return PodUse(
            slots=engine.slots,
            max_adapters=self._settings.max_adapters,
            active=sorted(name for name, count in in_flight.items() if count and name in resident)[:MAX_ADAPTERS],
            running=engine.running,
            waiting=engine.waiting,
            memory_bytes=engine.memory_bytes,
            memory_limit_bytes=engine.memory_limit_bytes,
            disk_bytes=sum(self._sizes.values()),
            disk_limit_bytes=self._settings.storage,
            reloads=engine.reloads,
        )

    def _next_traffic(self) -> dict[str, Traffic]:
        """Return the traffic to report, which changes at most every TRAFFIC_SECONDS."""
        now, snapshot = time.monotonic(), self._snapshot
        if snapshot is None or now < self._traffic_due:
            return self.state.traffic
        self._traffic_due = now + TRAFFIC_SECONDS
        return snapshot.traffic

    async def _publish(self, steps: PodPlan | None = None) -> None:
        """Publish the state; `steps`: plan for it, if it has been made."""
        current = self._desired.current
        snapshot = self._snapshot
        now = time.time()
        if snapshot is not None:
            self._start_time.observe(snapshot.state, now, ready=self._guard.ready)
            self._metrics.engine_start_seconds(self._start_time.seconds)
        state = PodState(
            epoch=current.epoch if current else 0,
            sequence=current.sequence if current else 0,
            list_digest=self._desired.digest,
            base_model_fingerprint=self._fingerprint,
            engine_ready=snapshot is not None and self._guard.ready,
            problem=self._guard.problem,
            stalled=self._guard.stalled,
            draining=self._draining,
            use=self._use(snapshot),
            engine_crashes=self._crashes.total,
            engine_start_seconds=self._start_time.seconds,
            crashes=self._crashes.recent(now),
            adapters=[*(steps or plan(self._observation())).report, *self._base_residencies()],
            traffic=self._next_traffic(),
        )
        self._metrics.residencies(state)
        async with self._changed:
            self.state = state
            self._changed.notify_all()
