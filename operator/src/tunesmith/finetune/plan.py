"""Decide the next actions for a FineTuneJob, and its next status. Pure: an observation in, a plan out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from tunesmith.api.conditions import FailureReason, FineTuneJobReason
from tunesmith.api.finetunejob_status import Attempt, AttemptOutcome, FineTuneJobStatus
from tunesmith.contracts.location import artifact_uri, owned_name
from tunesmith.contracts.refusal import RefusalCause
from tunesmith.contracts.scheduling import DEFAULT_SCHEDULING
from tunesmith.finetune.classify import VALIDATION, Ending, ending, evicted, obstacle
from tunesmith.finetune.permission import forbidden
from tunesmith.finetune.status import Status

if TYPE_CHECKING:
    from tunesmith.contracts.refusal import Refusal
    from tunesmith.contracts.scheduling import AllowedScheduling
    from tunesmith.finetune.observe import JobView, Observation

MAX_LISTED_ATTEMPTS = 100
MAX_FRUITLESS_ATTEMPTS = 10
"""Consecutive attempts, stopped before they train further than the preceding ones, after which the job fails."""
MAX_VALIDATION_PODS = 10
_VALIDATION_PATIENCE = timedelta(hours=1)
_PERMISSION_LOOK = timedelta(minutes=5)
_FIRST_RETRY = timedelta(seconds=5)
_LAST_RETRY = timedelta(minutes=5)
_WAITING_LOOK = timedelta(seconds=30)
_REFUSED_LOOK = timedelta(seconds=5)
"""Delay until the next plan after a refused write; the executor's own delays between retries are longer."""


@dataclass(frozen=True)
class CreateValidation:
    """Create the validation Job."""


@dataclass(frozen=True)
class CreateAttempt:
    """Create the Job of an attempt."""

    number: int


@dataclass(frozen=True)
class StopJob:
    """Delete a Job that is running or waiting, with its pods."""

    name: str


Action = CreateValidation | CreateAttempt | StopJob


@dataclass(frozen=True)
class Plan:
    """Actions in order, the status to write after them, and the delay until the next check (None: at the next change).

    If an action is refused, the plan is made again with the refusal as an observation, and the new status is written.
    """

    actions: tuple[Action, ...]
    status: FineTuneJobStatus
    look_again: timedelta | None = None


@dataclass(frozen=True)
class _Step:
    """Actions, and the delay until the next check, without the status."""

    actions: tuple[Action, ...] = ()
    look_again: timedelta | None = None


def plan(seen: Observation, store: str, allowed: AllowedScheduling = DEFAULT_SCHEDULING) -> Plan:
    """Decide the next actions.

    Args:
        seen: the observed state.
        store: uri of the installation's store, from which the artifact's uri is computed.
        allowed: scheduling that the installation allows.
    """
    status = Status(seen.job, seen.now)
    step = _decide(seen, status, store, allowed)
    if step.actions and seen.refusal is not None:
        step = _refused(seen.refusal, seen, status)
    return Plan(step.actions, status.build(), step.look_again)


def _decide(seen: Observation, status: Status, store: str, allowed: AllowedScheduling) -> _Step:
    if status.terminal:
        status.released()
        return _Step(_stop_running(seen))
    late = _deadline(seen, status)
    if late is not None:
        return late
    if seen.job.spec.suspend:
        return _suspend(seen, status)
    status.resumed()
    forbids = forbidden(seen.job, store, allowed)
    step = _train(seen, status, store, forbids) if status.validated else _validate(seen, status, store, forbids)
    limit, active = seen.job.spec.active_deadline_seconds, status.active_seconds
    if limit is None or active is None or status.terminal:
        return step
    left = timedelta(seconds=max(1.0, limit - active))
    return replace(step, look_again=min(left, step.look_again or left))


def _refused(refusal: Refusal, seen: Observation, status: Status) -> _Step:
    """Report the refusal of the step's action. A rule of the cluster never discards training progress."""
    if refusal.cause is RefusalCause.INVALID and not status.terminal and not seen.job.status.attempts:
        status.failed(FailureReason.INVALID_SPEC, f"the spec leads to an invalid object: {refusal.message}")
        return _Step()
    taken = refusal.cause is RefusalCause.NAME_TAKEN
    status.held(FineTuneJobReason.NAME_TAKEN if taken else FineTuneJobReason.WRITE_REFUSED, refusal.sentence)
    return _Step(look_again=_REFUSED_LOOK)


def _deadline(seen: Observation, status: Status) -> _Step | None:
    """Return the final step of a job that exceeded its deadline; None if it did not."""
    limit, active = seen.job.spec.active_deadline_seconds, status.active_seconds
    if limit is None or active is None or active < limit:
        return None
    recorded = {_number(attempt.name) for attempt in seen.job.status.attempts if attempt.end_time is not None}
    if any(job.finished for number, job in seen.attempts.items() if number not in recorded):
        return None  # the outcome of an attempt is recorded first
    status.failed(
        FailureReason.DEADLINE_EXCEEDED,
        f"the job ran for {int(active)} s, longer than spec.activeDeadlineSeconds, {limit}: "
        "give another FineTuneJob more time, or fewer steps",
    )
    return _Step(_stop_running(seen))


def _suspend(seen: Observation, status: Status) -> _Step:
    """Stop the running Jobs.

    An attempt is recorded as suspended before its Job is deleted, so that a crash does not miscount it.
    """
    attempts = _recorded(seen)
    recorded = True
    for number, attempt in attempts.items():
        job = seen.attempts.get(number)
        if attempt.outcome is AttemptOutcome.RUNNING and not (job is not None and job.finished):
            attempts[number] = attempt.model_copy(
                update={"outcome": AttemptOutcome.SUSPENDED, "message": "stopped by spec.suspend"}
            )
            recorded = False
        elif attempt.outcome is AttemptOutcome.SUSPENDED and attempt.end_time is None and job is None:
            attempts[number] = attempt.model_copy(update={"end_time": seen.now})
    status.attempts(attempts)
    left = _unfinished(seen)
    if not left and not seen.lingering:
        status.suspended()
        return _Step()
    status.stopping(f"Job {left[0].name}" if left else f"pod {seen.lingering[0]}")
    if not recorded:
        return _Step(look_again=timedelta(0))
    return _Step(_stop_running(seen), _WAITING_LOOK)


def _validate(seen: Observation, status: Status, store: str, forbids: str | None) -> _Step:
    job = seen.validation
    if job is None and forbids is not None:
        status.invalid(FailureReason.NOT_ALLOWED, forbids)
        return _Step()
    if job is None:
        status.validating(FineTuneJobReason.POD_PENDING, "the validation Job is created")
        return _Step((CreateValidation(),), _WAITING_LOOK)
    if not job.finished:
        end = _wasteful(job)
        if end is not None:
            status.invalid(end.reason or FailureReason.INTERNAL_ERROR, end.message)
            return _Step(_stop_running(seen))
        wait = obstacle(job, seen.now)
        # Waiting loses nothing: the kubelet retries automatically, and succeeds once the cause is gone.
        if wait is not None and wait.failure is not None and seen.now - job.created >= _VALIDATION_PATIENCE:
            status.invalid(wait.failure, wait.message)
            return _Step(_stop_running(seen))
        if wait is not None:
            status.validating(wait.reason, wait.message)
        elif seen.progress is not None and seen.progress.outage is not None:
            status.validating(FailureReason.STORAGE_UNAVAILABLE, seen.progress.outage)
            status.progress(seen.progress)
        else:
            status.validating(FineTuneJobReason.VALIDATING, "data, base model and settings are being checked")
            status.progress(seen.progress)
        return _Step(look_again=wait.look_again if wait is not None else None)
    end = ending(job, VALIDATION)
    if end.outcome is AttemptOutcome.SUCCEEDED:
        status.valid(end.result)
        # The first attempt follows in the same pass, and therefore in the same status write.
        return _train(seen, status, store, forbids)
    if end.outcome is AttemptOutcome.PREEMPTED:
        # The Job replaces disrupted pods automatically, so this outcome means that the whole Job was pre-empted.
        end = replace(end, reason=FailureReason.INTERNAL_ERROR, message="validation was pre-empted too often")
    status.invalid(end.reason or FailureReason.INTERNAL_ERROR, end.message, end.result)
    return _Step()


def _wasteful(job: JobView) -> Ending | None:
    """Return why another pod of a validation would be wasted; None if it would not.

    The Job itself would replace disrupted pods without limit.
    """
    found = next((end for pod in job.pods if (end := evicted(pod, VALIDATION)) is not None), None)
    if found is not None or sum(pod.disrupted for pod in job.pods) < MAX_VALIDATION_PODS:
        return found
    return Ending(
        AttemptOutcome.FAILED,
        FailureReason.NO_PROGRESS,
        f"validation was evicted or pre-empted {MAX_VALIDATION_PODS} times: submit the job again when the cluster has "
        "room for it, or name a PriorityClass that is not pre-empted in scheduling.priorityClassName",
    )


def _train(seen: Observation, status: Status, store: str, forbids: str | None) -> _Step:
    attempts = _recorded(seen)
    for number, attempt in list(attempts.items()):
        job = seen.attempts.get(number)
        if attempt.outcome is AttemptOutcome.SUSPENDED and attempt.end_time is None:
            if job is not None and not job.finished:
                # Two attempts must not write at the same time.
                status.attempts(attempts)
                status.stopping(f"Job {job.name}")
                return _Step(() if job.deleting else (StopJob(job.name),), _WAITING_LOOK)
            attempts[number] = attempt.model_copy(update={"end_time": seen.now})
            continue
        if attempt.outcome is not AttemptOutcome.RUNNING:
            if job is not None and not job.finished:
                # Its pod never started, and must not start beside the next attempt's.
                status.attempts(attempts)
                status.waiting(
                    FineTuneJobReason.STOPPING, f"Job {job.name} of an attempt that is over is being deleted"
                )
                return _Step(() if job.deleting else (StopJob(job.name),), _WAITING_LOOK)
            continue
        if job is None:
            attempts[number] = attempt.model_copy(
                update={
                    "outcome": AttemptOutcome.FAILED,
                    "end_time": seen.now,
                    "reason": FailureReason.INTERNAL_ERROR,
                    "message": f"Job {attempt.name} was deleted while it ran",
                    "last_step": _last_step(seen),
                }
            )
        elif job.finished:
            end = ending(job, f"attempt {number}")
            attempts[number] = _ended(attempt, job, end, seen)
            status.attempts(attempts)
            if _conclude(seen, status, end, store):
                return _Step(_stop_running(seen))
        else:
            attempts[number] = _running(attempt, job)
            status.attempts(attempts)
            return _wait(seen, status, attempts, number)
    status.attempts(attempts)
    return _next(seen, status, attempts, forbids)


def _recorded(seen: Observation) -> dict[int, Attempt]:
    """Return the attempts of the status, and those whose Job was created but is not recorded yet."""
    metadata = seen.job.metadata
    known = {_number(attempt.name): attempt for attempt in seen.job.status.attempts}
    for number in seen.attempts:
        known.setdefault(number, Attempt(name=owned_name(metadata.name, metadata.uid, str(number))))
    return dict(sorted(known.items())[-MAX_LISTED_ATTEMPTS:])


def _number(name: str) -> int:
    return int(name.rsplit("-", 1)[1])


def _running(attempt: Attempt, job: JobView) -> Attempt:
    """Return the attempt with its nodes and, once all its pods have started, its start time."""
    started = [pod.started for pod in job.members]
    update: dict[str, object] = {}
    if len(started) == job.size and None not in started:
        update["start_time"] = max(time for time in started if time is not None)
    nodes = list(dict.fromkeys(pod.node for pod in job.members if pod.node))
    if nodes:
        update["node"] = nodes[0] + (f" and {len(nodes) - 1} more" if len(nodes) > 1 else "")
    return attempt.model_copy(update=update)


def _last_step(seen: Observation) -> int | None:
    """Return the last observed step of the attempt that just finished."""
    samples = [sample for sample in (seen.progress, seen.job.status.progress) if sample is not None]
    return max((sample.step for sample in samples if sample.step is not None), default=None)


def _ended(attempt: Attempt, job: JobView, end: Ending, seen: Observation) -> Attempt:
    ends = [pod.ended for pod in job.members if pod.ended is not None]
    return _running(attempt, job).model_copy(
        update={
            "end_time": min(max(ends, default=None) or job.ended or seen.now, seen.now),
            "outcome": end.outcome,
            "reason": end.reason,
            "message": end.message[:2048] or None,
            "resumed_from_step": end.result.resumed_from_step if end.result is not None else None,
            "last_step": _last_step(seen),
        }
    )


def _conclude(seen: Observation, status: Status, end: Ending, store: str) -> bool:
    """Return True if the attempt's outcome finishes the job, and report that outcome in the status."""
    metadata = seen.job.metadata
    place = artifact_uri(store, metadata.namespace, metadata.name, metadata.uid)
    if end.outcome is AttemptOutcome.FAILED and not end.retryable:
        if end.result is not None and end.result.artifact is not None and end.result.artifact.uri == place:
            status.published(end.result)
        status.failed(end.reason or FailureReason.INTERNAL_ERROR, end.message)
        return True
    if end.outcome is not AttemptOutcome.SUCCEEDED:
        return False
    if end.result is None or end.result.artifact is None:
        # The pod was gone before its result was read. The next attempt finds the artifact in the store and reports it.
        return False
    if end.result.artifact.uri != place:
        status.failed(
            FailureReason.INTERNAL_ERROR,
            f"the trainer reports an artifact at {end.result.artifact.uri}, but its place is {place}",
        )
        return True
    status.complete(end.result)
    return True


def _wait(seen: Observation, status: Status, attempts: dict[int, Attempt], number: int) -> _Step:
    job = seen.attempts[number]
    queue = seen.job.spec.scheduling.queue
    if queue is not None:
        if job.suspended:
            status.queued(queue, job.name, job.held_back)
            return _Step(look_again=_WAITING_LOOK)
        status.admitted(queue)
    wait = obstacle(job, seen.now)
    if wait is None:
        status.started(number, seen.progress.outage if seen.progress is not None else None)
        status.progress(seen.progress)
        return _Step()
    status.waiting(wait.reason, wait.message)
    if wait.failure is None:
        return _Step(look_again=wait.look_again)
    # The cause may be temporary: this attempt fails, and the next one follows once its Job is gone.
    attempts[number] = attempts[number].model_copy(
        update={
            "outcome": AttemptOutcome.FAILED,
            "end_time": seen.now,
            "reason": wait.failure,
            "message": wait.message[:2048],
        }
    )
    status.attempts(attempts)
    return _Step((StopJob(job.name),), _WAITING_LOOK)


def _next(seen: Observation, status: Status, attempts: dict[int, Attempt], forbids: str | None) -> _Step:
    """Begin the next attempt, or fail the job if no attempts are left."""
    failures = [attempt for attempt in attempts.values() if attempt.outcome is AttemptOutcome.FAILED]
    allowed = seen.job.spec.max_attempts
    last = attempts[max(attempts)] if attempts else None
    if len(failures) >= allowed:
        final = failures[-1]
        status.failed(
            FailureReason.ATTEMPTS_EXHAUSTED,
            f"{len(failures)} of {allowed} attempts failed; the last: {final.reason}: {final.message}",
        )
        return _Step()
    since, best = _since_progress(attempts)
    fruitless = since - (best > 0)
    if fruitless >= MAX_FRUITLESS_ATTEMPTS and last is not None:
        status.failed(
            FailureReason.NO_PROGRESS,
            f"{fruitless} attempts in a row were stopped before they trained beyond step {best}; the last: "
            f"{last.message or last.outcome}; use nodes or a PriorityClass from which pods are not taken away, or save "
            "more often (checkpoint.everySteps), in a new FineTuneJob",
        )
        return _Step()
    number = max(attempts, default=0) + 1
    if seen.lingering:
        # Two attempts must not write at the same time, and the next one resumes from this one's checkpoint.
        pod = seen.lingering[0]
        status.waiting(
            FineTuneJobReason.STOPPING, f"attempt {number} waits for pod {pod} of the one before, which saves and ends"
        )
        return _Step(look_again=_WAITING_LOOK)
    if last is not None and last.outcome is not AttemptOutcome.SUSPENDED and last.end_time is not None:
        delay = min(_FIRST_RETRY * 2 ** (since - 1), _LAST_RETRY)
        due = last.end_time + delay
        if seen.now < due:
            status.waiting(FineTuneJobReason.RETRYING, _retry(number, last, int(delay.total_seconds())))
            return _Step(look_again=due - seen.now)
    if forbids is not None:
        # The installation changed after the validation; that must not discard training progress.
        status.waiting(FailureReason.NOT_ALLOWED, f"attempt {number} is not created: {forbids}")
        return _Step(look_again=_PERMISSION_LOOK)
    if seen.refusal is None:
        status.begin_attempt(number)
        metadata = seen.job.metadata
        attempts[number] = Attempt(name=owned_name(metadata.name, metadata.uid, str(number)))
        status.attempts(attempts)
    return _Step((CreateAttempt(number),), _WAITING_LOOK)


def _since_progress(attempts: dict[int, Attempt]) -> tuple[int, int]:
    """Return the number of attempts since the one that trained furthest, that one included, and the highest step."""
    count, best = 0, 0
    for attempt in attempts.values():
        if attempt.outcome in {AttemptOutcome.RUNNING, AttemptOutcome.SUSPENDED}:
            continue
        count = 1 if (attempt.last_step or 0) > best else count + 1
        best = max(best, attempt.last_step or 0)
    return count, best


def _retry(number: int, last: Attempt, seconds: int) -> str:
    end = {AttemptOutcome.FAILED: "failed", AttemptOutcome.PREEMPTED: "was pre-empted"}.get(
        last.outcome, "ended without a readable result"
    )
    return f"attempt {number} starts {seconds} s after attempt {number - 1} {end}"


def _unfinished(seen: Observation) -> list[JobView]:
    jobs = [*seen.attempts.values()] + ([seen.validation] if seen.validation is not None else [])
    return [job for job in jobs if not job.finished]


def _stop_running(seen: Observation) -> tuple[Action, ...]:
    return tuple(StopJob(job.name) for job in _unfinished(seen) if not job.deleting)
