"""Rollout of a new revision of an AdapterDeployment: by steps with analysis, or at once. Pure.

The state is in the status only, so a restart of the operator changes nothing. A revision takes over exactly once: when
all steps have passed, on the command promote, or without a strategy once it is resident on its pods. Until then the
stable revision, the one that served before, keeps its share of the requests.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from datetime import timedelta
from math import ceil
from typing import TYPE_CHECKING

from tunesmith.api.adapterdeployment import Revision, RevisionState
from tunesmith.api.rollout import (
    DEFAULT_MIN_REQUESTS,
    MAX_COMMAND,
    MAX_REJECTED,
    ROLLOUT_ANNOTATION,
    HandledCommand,
    RevisionReference,
    RolloutCommand,
    RolloutPhase,
    RolloutStatus,
    RolloutStrategy,
    parse_command,
    steps_of,
)
from tunesmith.contracts.location import engine_name
from tunesmith.contracts.sentence import one_line
from tunesmith.serving.analysis import (
    Evidence,
    StepTraffic,
    analyse,
    beginning,
    compare,
    first_failure,
    first_unknown,
    may_begin,
)
from tunesmith.serving.resolve import short

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from tunesmith.api.adapterdeployment import AdapterDeployment, AdapterDeploymentSpec
    from tunesmith.api.rollout import AdapterRollout, MeasureStatus

_MAX_MESSAGE = 1000
_OTHER_SPEC = {"replicas", "autoscaling"}
"""Fields of the spec that do not affect a rollout: they are set by autoscalers."""
_ALL = 100


@dataclass(frozen=True)
class RolloutObservation:
    """Observed state from which the next state of a rollout is computed.

    Attributes:
        revisions: observed revisions: the one that should serve, followed by those that were served before.
        from_source: True if the first one is what the spec's source resolves to now.
        copies: desired number of pods.
        answering: number of pods that answer.
        evidence: facts about the first revision.
    """

    revisions: Sequence[Revision]
    from_source: bool
    copies: int
    answering: int
    evidence: Evidence = field(default_factory=Evidence)

    def has_copies(self, revision: Revision, copies: int) -> bool:
        """Return True if as many ready pods hold the revision, or all pods that answer, or if it is idle."""
        return revision.state is RevisionState.IDLE or revision.ready_replicas >= max(1, min(copies, self.answering))


@dataclass(frozen=True)
class RolloutPlan:
    """Next state of a rollout: the fields of the status that it determines."""

    revisions: Sequence[Revision]
    rollout: RolloutStatus | None
    rejected: Sequence[str]
    previous: RevisionReference | None
    command: HandledCommand | None


def spec_digest(spec: AdapterDeploymentSpec) -> str:
    """Return the digest of the fields on which a rollout depends."""
    fields = spec.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=_OTHER_SPEC)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def rejected_digests(adapter: AdapterDeployment) -> Sequence[str]:
    """Return the digests that are not tried again with the present spec."""
    is_same = adapter.status.rollout_spec == spec_digest(adapter.spec)
    return adapter.status.rejected_digests if is_same else []


def in_order(adapter: AdapterDeployment, source: Revision | None, known: Sequence[Revision]) -> list[Revision]:
    """Return the revision that should serve, followed by the others.

    Args:
        adapter: the AdapterDeployment.
        source: revision of the spec's source; None if it is not known.
        known: revisions of the status.
    """
    rejected = rejected_digests(adapter)
    if source is not None and source.digest not in rejected:
        return [source, *(revision for revision in known if revision.digest != source.digest)]
    kept = [revision for revision in known if revision.digest not in rejected]
    rollout = adapter.status.rollout
    if source is not None and rollout is not None and rollout.stable is not None:
        stable = rollout.stable.digest
        if not kept:
            kept = [_pending(adapter, rollout.stable)]
        elif rollout.is_running:
            # The source is no longer the revision that is being rolled out.
            kept.sort(key=lambda revision: revision.digest != stable)
    return [*kept, *(revision for revision in known if revision not in kept)] or ([source] if source else [])


def next_rollout(adapter: AdapterDeployment, observation: RolloutObservation, now: datetime) -> RolloutPlan:
    """Return the next state of the rollout."""
    before, rule = adapter.status, adapter.spec.rollout
    running = before.rollout if before.rollout is not None and before.rollout.is_running else None
    plan = RolloutPlan(
        observation.revisions,
        before.rollout,
        rejected_digests(adapter),
        before.previous_revision,
        before.rollout_command,
    )
    command, plan = _command(adapter, plan)
    if not observation.revisions:
        plan = plan if running is None else replace(plan, rollout=None)
        return _ignored(plan, command, "there is no revision yet")
    newest, older = observation.revisions[0], observation.revisions[1:]
    if running is not None and running.stable is not None and running.stable.digest == newest.digest:
        message = f"the source is revision {short(newest.digest)} again, which has served all along"
        ended = _ended(running, RolloutPhase.ABORTED, message, now)
        return _ignored(replace(plan, revisions=[_alone(newest)], rollout=ended), command, "no rollout is running")
    stable = _stable(running, older)
    continues = running is not None and running.digest == newest.digest
    undone = before.rollout is not None and before.rollout.phase is RolloutPhase.UNDONE
    if (
        rule is None
        or rule.strategy is RolloutStrategy.IMMEDIATE
        or stable is None
        or not (observation.from_source or continues)
        or (undone and before.rollout is not None and before.rollout.stable == _reference(newest))
        or (stable.state is RevisionState.FAILED and not stable.ready_replicas)
        or newest.base_model
        or stable.base_model
    ):
        return _take_over(adapter, observation, stable, plan, command, now)
    is_same = before.rollout_spec == spec_digest(adapter.spec)
    state = running if continues and is_same else None
    if state is None or state.stable is None or state.stable.digest != stable.digest:
        state = RolloutStatus(
            phase=RolloutPhase.PREPARING,
            digest=newest.digest,
            stable=_reference(stable),
            steps=len(steps_of(rule)),
            weight=0,
            started_at=now,
        )
    return _Gradual(rule, observation, newest, stable, plan, now).next(state, command)


def _command(adapter: AdapterDeployment, plan: RolloutPlan) -> tuple[RolloutCommand | None, RolloutPlan]:
    """Return a command that was not handled yet, and the plan with the record of an invalid or withdrawn one."""
    text = adapter.metadata.annotations.get(ROLLOUT_ANNOTATION)
    if text is None:
        return None, replace(plan, command=None)
    value = text[:MAX_COMMAND]
    if plan.command is not None and plan.command.value == value:
        return None, plan
    command = parse_command(text)
    names = ", ".join(RolloutCommand)
    message = f"{one_line(value, MAX_COMMAND)!r} is not a command: use {names}" if command is None else ""
    return command, replace(plan, command=HandledCommand(value=value, message=message))


def _handled(plan: RolloutPlan, message: str) -> RolloutPlan:
    """Return the plan with the effect of its command."""
    assert plan.command is not None  # noqa: S101 - `_command` recorded it
    return replace(plan, command=HandledCommand(value=plan.command.value, message=one_line(message, _MAX_MESSAGE)))


def _ignored(plan: RolloutPlan, command: RolloutCommand | None, message: str) -> RolloutPlan:
    return plan if command is None else _handled(plan, f"{command} has no effect: {message}")


def _stable(running: RolloutStatus | None, older: Sequence[Revision]) -> Revision | None:
    """Return the revision that answers until the new one takes over; None if there is none."""
    if running is not None and running.stable is not None:
        found = next((revision for revision in older if revision.digest == running.stable.digest), None)
        if found is not None:
            return found
    return next(iter(_serving(older)), None)


def _serving(older: Sequence[Revision]) -> Sequence[Revision]:
    """Return the serving ones; otherwise those that were resident a moment ago and may serve again; otherwise all."""
    return (
        [revision for revision in older if revision.ready_replicas > 0]
        or [revision for revision in older if revision.state in (RevisionState.RESIDENT, RevisionState.IDLE)]
        or older
    )


def _take_over(
    adapter: AdapterDeployment,
    observation: RolloutObservation,
    stable: Revision | None,
    plan: RolloutPlan,
    command: RolloutCommand | None,
    now: datetime,
) -> RolloutPlan:
    """Let the newest revision answer all requests once it is resident on its pods; `stable` answers until then."""
    newest = observation.revisions[0]
    if command in (RolloutCommand.ABORT, RolloutCommand.UNDO):
        back = _way_back(adapter, stable, command)
        if back is not None:
            return _undo(newest, back, _handled(plan, f"revision {short(back.digest)} answers again"), command, now)
        plan = _ignored(plan, command, "there is no previous revision")
    else:
        plan = _ignored(plan, command, "no rollout is running")
    is_settled = observation.has_copies(newest, observation.copies)
    if plan.rollout is not None and plan.rollout.is_running:
        plan = replace(plan, rollout=_without_steps(plan.rollout, newest, now, is_settled=is_settled))
    if not is_settled:
        return replace(plan, revisions=[_alone(newest), *([_alone(stable)] if stable is not None else [])])
    return replace(plan, revisions=[_alone(newest)], previous=_reference(stable) if stable else plan.previous)


def _without_steps(running: RolloutStatus, newest: Revision, now: datetime, *, is_settled: bool) -> RolloutStatus:
    """Return the state of a rollout whose strategy was removed, or whose stable revision cannot be loaded any more."""
    if running.digest != newest.digest:
        return _ended(running, RolloutPhase.ABORTED, f"replaced by revision {short(newest.digest)}", now)
    if is_settled:
        message = f"revision {short(newest.digest)} answers all requests"
        return _ended(running, RolloutPhase.COMPLETE, message, now)
    message = f"revision {short(newest.digest)} takes over without steps"
    return running.model_copy(update={"phase": RolloutPhase.PROMOTING, "weight": None, "message": message})


def _way_back(adapter: AdapterDeployment, stable: Revision | None, command: RolloutCommand) -> Revision | None:
    """Return the revision to which a command returns; None if there is none."""
    if stable is not None and stable.state is not RevisionState.FAILED:
        return stable
    if command is RolloutCommand.ABORT or adapter.status.previous_revision is None:
        return None
    return _pending(adapter, adapter.status.previous_revision)


def _undo(newest: Revision, back: Revision, plan: RolloutPlan, command: RolloutCommand, now: datetime) -> RolloutPlan:
    is_undo = command is RolloutCommand.UNDO
    rollout = RolloutStatus(
        phase=RolloutPhase.UNDONE if is_undo else RolloutPhase.ABORTED,
        digest=newest.digest,
        stable=_reference(back),
        started_at=now,
        finished_at=now,
        message=f"revision {short(newest.digest)} was {'undone' if is_undo else 'aborted'} by a command",
    )
    rejected = [digest for digest in plan.rejected if digest not in (newest.digest, back.digest)]
    return replace(
        plan,
        revisions=[_alone(back), _alone(newest)],
        rollout=rollout,
        rejected=[newest.digest, *rejected][:MAX_REJECTED],
        previous=_reference(newest),
    )


@dataclass(frozen=True)
class _Gradual:
    """One pass of a rollout with steps."""

    rule: AdapterRollout
    observation: RolloutObservation
    newest: Revision
    stable: Revision
    plan: RolloutPlan
    now: datetime

    def next(self, state: RolloutStatus, command: RolloutCommand | None) -> RolloutPlan:
        plan = self.plan
        if command in (RolloutCommand.ABORT, RolloutCommand.UNDO):
            plan = _handled(plan, f"revision {short(self.stable.digest)} answers all requests")
            return self._rejected(plan, state, RolloutPhase.ABORTED, f"aborted by the command {command}")
        if command is not None:
            state, message = _commanded(state, command)
            plan = _handled(plan, message)
        if self.newest.state is RevisionState.FAILED:
            message = f"it cannot be loaded: {self.newest.message or 'no reason was reported'}"
            return self._rejected(plan, state, RolloutPhase.ROLLED_BACK, message)
        state, results = self._measured(state)
        failure = None if state.promoted else first_failure(results)
        if failure is not None:
            message = f"{failure.query or failure.measure}: {failure.message}"
            return self._rejected(plan, state, RolloutPhase.ROLLED_BACK, message)
        state = self._passed(state, results)
        target = self._target(state)
        waits = self._waits(state, results, target)
        if waits:
            return self._shared(plan, state.model_copy(update={"message": one_line(waits, _MAX_MESSAGE)}), target)
        if target == _ALL and (state.promoted or state.step == len(self._steps)):
            message = f"revision {short(self.newest.digest)} answers all requests"
            ended = _ended(state, RolloutPhase.COMPLETE, message, self.now)
            return replace(plan, revisions=[_alone(self.newest)], rollout=ended, previous=_reference(self.stable))
        return self._shared(plan, self._begun(state, target), target)

    @property
    def _steps(self) -> Sequence[int]:
        return [step.weight for step in steps_of(self.rule)]

    @property
    def _is_shadow(self) -> bool:
        return self.rule.strategy is RolloutStrategy.SHADOW

    def _measured(self, state: RolloutStatus) -> tuple[RolloutStatus, Sequence[MeasureStatus]]:
        """Return the state with the traffic and the results of the current step."""
        pods = self.observation.evidence.pods
        traffic = StepTraffic(state.traffic, state.pods)
        if state.step_started_at is not None:
            traffic = traffic.followed_by(pods, shadow=self._is_shadow)
        results = self._results(traffic, state.step_started_at)
        changes = {"traffic": traffic.total, "pods": list(traffic.pods), "measures": results}
        if self._is_shadow:
            changes["comparison"] = compare(self.observation.evidence.comparisons) or state.comparison
        return state.model_copy(update=changes), results

    def _results(self, traffic: StepTraffic, since: datetime | None) -> list[MeasureStatus]:
        needed = self.rule.min_requests or DEFAULT_MIN_REQUESTS
        return analyse(self.rule.analysis or (), self.observation.evidence, traffic, needed, since)

    def _passed(self, state: RolloutStatus, results: Sequence[MeasureStatus]) -> RolloutStatus:
        """Return the state with the current step passed if its time is over and all checks pass."""
        if state.step == 0 or state.step_passed or state.paused or state.step_started_at is None:
            return state
        pause = timedelta(seconds=steps_of(self.rule)[state.step - 1].pause_seconds)
        is_over = self.now - state.step_started_at >= pause
        return state.model_copy(update={"step_passed": is_over and first_unknown(results) is None})

    def _target(self, state: RolloutStatus) -> int:
        """Return the weight for which the new revision needs pods: that of the next step once one has passed."""
        if state.promoted:
            return _ALL
        number = state.step + 1 if state.step == 0 or state.step_passed else state.step
        return self._steps[number - 1] if number <= len(self._steps) else _ALL

    def _waits(self, state: RolloutStatus, results: Sequence[MeasureStatus], target: int) -> str:
        """Return what the next step, or the take-over, waits for; empty if nothing."""
        newest = short(self.newest.digest)
        if state.paused:
            return "paused by a command: `tunesmith rollout resume` continues"
        unknown = may_begin(results) if state.step == 0 else first_unknown(results)
        if not state.promoted:
            if unknown is not None:
                return f"waits for {unknown.query or unknown.measure}: {unknown.message}"
            if state.step and not state.step_passed:
                return f"step {state.step} of {len(self._steps)} lasts {self._pause(state)} seconds"
        copies = self._copies(target)
        if not self.observation.has_copies(self.newest, copies):
            detail = f": {self.newest.message}" if self.newest.message else ""
            return f"revision {newest} is resident on {self.newest.ready_replicas} of {copies} pods{detail}"
        return ""

    def _pause(self, state: RolloutStatus) -> int:
        return steps_of(self.rule)[state.step - 1].pause_seconds

    def _begun(self, state: RolloutStatus, weight: int) -> RolloutStatus:
        """Return the state at the beginning of the next step."""
        traffic = beginning(self.observation.evidence.pods, shadow=self._is_shadow)
        number, count = state.step + 1, len(self._steps)
        verb = "also gets" if self._is_shadow else "answers"
        return state.model_copy(
            update={
                "phase": RolloutPhase.PROGRESSING,
                "step": number,
                "step_passed": False,
                "weight": weight,
                "step_started_at": self.now,
                "traffic": traffic.total,
                "pods": list(traffic.pods),
                "measures": self._results(traffic, self.now),
                "message": f"step {number} of {count}: revision {short(self.newest.digest)} {verb} {weight} % of the "
                "requests",
            }
        )

    def _copies(self, weight: int) -> int:
        return max(1, ceil(self.observation.copies * weight / _ALL))

    def _shared(self, plan: RolloutPlan, state: RolloutStatus, target: int) -> RolloutPlan:
        """Return the plan in which both revisions are served."""
        weight = state.weight or 0
        answered = 0 if self._is_shadow else weight
        newest = self.newest.model_copy(
            update={
                "weight": answered,
                "desired_replicas": self._copies(max(target, weight)),
                "shadow_percent": (weight or None) if self._is_shadow else None,
            }
        )
        stable = self.stable.model_copy(
            update={
                "weight": _ALL - answered,
                "desired_replicas": self._copies(_ALL - answered),
                "shadow_percent": None,
            }
        )
        if state.promoted or (state.step == len(self._steps) and state.step_passed):
            state = state.model_copy(update={"phase": RolloutPhase.PROMOTING})
        return replace(plan, revisions=[newest, stable], rollout=state)

    def _rejected(self, plan: RolloutPlan, state: RolloutStatus, phase: RolloutPhase, message: str) -> RolloutPlan:
        """Return the plan in which the stable revision serves alone, and the new one is not tried again."""
        message = f"revision {short(self.newest.digest)} was given up: {message}"
        others = [digest for digest in plan.rejected if digest != self.newest.digest]
        return replace(
            plan,
            revisions=[_alone(self.stable)],
            rollout=_ended(state, phase, message, self.now),
            rejected=[self.newest.digest, *others][:MAX_REJECTED],
        )


def _commanded(state: RolloutStatus, command: RolloutCommand) -> tuple[RolloutStatus, str]:
    if command is RolloutCommand.PAUSE:
        return state.model_copy(update={"paused": True}), "the rollout is paused; a failed check still rolls it back"
    if command is RolloutCommand.RESUME:
        return state.model_copy(update={"paused": False}), "the rollout continues"
    return (
        state.model_copy(update={"promoted": True, "paused": False}),
        f"revision {short(state.digest)} takes over once it is resident on all of its pods",
    )


def _ended(state: RolloutStatus, phase: RolloutPhase, message: str, now: datetime) -> RolloutStatus:
    return state.model_copy(
        update={
            "phase": phase,
            "weight": None,
            "paused": False,
            "finished_at": now,
            "message": one_line(message, _MAX_MESSAGE),
            "pods": [],
        }
    )


def _alone(revision: Revision) -> Revision:
    """Return the revision outside of a rollout."""
    return revision.model_copy(update={"weight": None, "desired_replicas": None, "shadow_percent": None})


def _reference(revision: Revision) -> RevisionReference:
    return RevisionReference(digest=revision.digest, uri=revision.uri)


def _pending(adapter: AdapterDeployment, found: RevisionReference) -> Revision:
    namespace, _, model_name = adapter.model.partition("/")
    return Revision(
        digest=found.digest,
        uri=found.uri,
        engine_name=engine_name(namespace, model_name, found.digest),
        state=RevisionState.PENDING,
    )
