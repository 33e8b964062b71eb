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
from tunesmith.finetune.permission import forbidden
from tunesmith.finetune.start import NotReady, start_of
from tunesmith.finetune.status import StatusBuilder
from tunesmith.jobs.classify import VALIDATION, JobOutcome, eviction_outcome, find_obstacle, job_outcome

if TYPE_CHECKING:
    from tunesmith.contracts.refusal import Refusal
    from tunesmith.contracts.scheduling import AllowedScheduling
    from tunesmith.finetune.observe import Observation
    from tunesmith.jobs.observe import JobView

MAX_LISTED_ATTEMPTS = 100
MAX_FRUITLESS_ATTEMPTS = 10
"""Number of consecutive attempts without progress beyond the highest step so far, after which the job fails."""
MAX_VALIDATION_PODS = 10
_VALIDATION_START_TIMEOUT = timedelta(hours=1)
_PERMISSION_REQUEUE = timedelta(minutes=5)
_MIN_RETRY_DELAY = timedelta(seconds=5)
_MAX_RETRY_DELAY = timedelta(minutes=5)
_WAITING_REQUEUE = timedelta(seconds=30)
_SOURCE_REQUEUE = timedelta(minutes=5)
_IN_USE_REQUEUE = timedelta(minutes=5)
_MAX_REQUEUE = timedelta(days=1)
_REFUSED_REQUEUE = timedelta(seconds=5)
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

    `deletion`: message of the Event after which the FineTuneJob itself is deleted; None: it is kept.

    If an action is refused, the plan is made again with the refusal as an observation, and the new status is written.
    """

    actions: tuple[Action, ...]
    status: FineTuneJobStatus
    requeue_after: timedelta | None = None
    deletion: str | None = None


@dataclass(frozen=True)
class _Step:
    """Actions, and the delay until the next check, without the status."""

    actions: tuple[Action, ...] = ()
    requeue_after: timedelta | None = None


def plan(observation: Observation, store: str, allowed: AllowedScheduling = DEFAULT_SCHEDULING) -> Plan:
    """Decide the next actions.

    Args:
        observation: the observed state.
        store: uri of the installation's store, from which the artifact's uri is computed.
        allowed: scheduling that the installation allows.
    """
    status = StatusBuilder(observation.job, observation.now)
    step = _decide(observation, status, store, allowed)
    if step.actions and observation.refusal is not None:
        step = _report_refusal(observation.refusal, observation, status)
    built = status.build()
    if status.terminal and not step.actions:
        return _expire(observation, built, step)
    return Plan(step.actions, built, step.requeue_after)


def _expire(observation: Observation, status: FineTuneJobStatus, step: _Step) -> Plan:
    """Return the plan of a finished job, which is deleted once its time has passed and nothing names it."""
    seconds, finished = observation.job.spec.ttl_seconds_after_finished, status.completion_time
    if seconds is None or finished is None:
        return Plan((), status, step.requeue_after)
    due = finished + timedelta(seconds=seconds)
    if observation.now < due:
        return Plan((), status, min(due - observation.now, _MAX_REQUEUE))
    if observation.users:
        return Plan((), status, _IN_USE_REQUEUE)
    location = f"; its artifact stays at {status.artifact.uri}" if status.artifact is not None else ""
    return Plan((), status, None, f"finished more than {seconds} s ago (spec.ttlSecondsAfterFinished){location}")


def _decide(observation: Observation, status: StatusBuilder, store: str, allowed: AllowedScheduling) -> _Step:
    if status.terminal:
        status.unblocked()
        return _Step(_stop_running(observation))
    expired = _check_deadline(observation, status)
    if expired is not None:
        return expired
    if observation.job.spec.suspend:
        return _suspend(observation, status)
    status.resumed()
    denial = forbidden(observation.job, store, allowed)
    step = (
        _train(observation, status, store, denial)
        if status.validated
        else _validate(observation, status, store, denial)
    )
    limit, active = observation.job.spec.active_deadline_seconds, status.active_seconds
    if limit is None or active is None or status.terminal:
        return step
    remaining = timedelta(seconds=max(1.0, limit - active))
    return replace(step, requeue_after=min(remaining, step.requeue_after or remaining))


def _report_refusal(refusal: Refusal, observation: Observation, status: StatusBuilder) -> _Step:
    """Report the refusal of the step's action. It never fails a job that has an attempt: training progress is kept."""
    if refusal.cause is RefusalCause.INVALID and not status.terminal and not observation.job.status.attempts:
        status.failed(FailureReason.INVALID_SPEC, f"the spec results in an invalid object: {refusal.message}")
        return _Step()
    is_taken = refusal.cause is RefusalCause.NAME_TAKEN
    status.blocked(FineTuneJobReason.NAME_TAKEN if is_taken else FineTuneJobReason.WRITE_REFUSED, refusal.sentence)
    return _Step(requeue_after=_REFUSED_REQUEUE)


def _check_deadline(observation: Observation, status: StatusBuilder) -> _Step | None:
    """Return the final step of a job that exceeded its deadline; None if it did not."""
    limit, active = observation.job.spec.active_deadline_seconds, status.active_seconds
    if limit is None or active is None or active < limit:
        return None
    recorded = {_number(attempt.name) for attempt in observation.job.status.attempts if attempt.end_time is not None}
    if any(job.finished for number, job in observation.attempts.items() if number not in recorded):
        return None  # the outcome of an attempt is recorded first
    status.failed(
        FailureReason.DEADLINE_EXCEEDED,
        f"the job ran for {int(active)} s, longer than spec.activeDeadlineSeconds, {limit}: "
        "give another FineTuneJob more time, or fewer steps",
    )
    return _Step(_stop_running(observation))


def _suspend(observation: Observation, status: StatusBuilder) -> _Step:
    """Stop the running Jobs.

    An attempt is recorded as suspended before its Job is deleted, so that a crash does not miscount it.
    """
    attempts = _recorded(observation)
    is_recorded = True
    for number, attempt in attempts.items():
        job = observation.attempts.get(number)
        if attempt.outcome is AttemptOutcome.RUNNING and not (job is not None and job.finished):
            attempts[number] = attempt.model_copy(
                update={"outcome": AttemptOutcome.SUSPENDED, "message": "stopped by spec.suspend"}
            )
            is_recorded = False
        elif attempt.outcome is AttemptOutcome.SUSPENDED and attempt.end_time is None and job is None:
            attempts[number] = attempt.model_copy(update={"end_time": observation.now})
    status.record_attempts(attempts)
    unfinished = _unfinished(observation)
    if not unfinished and not observation.lingering:
        status.suspended()
        return _Step()
    status.stopping(f"Job {unfinished[0].name}" if unfinished else f"pod {observation.lingering[0]}")
    if not is_recorded:
        return _Step(requeue_after=timedelta(0))
    return _Step(_stop_running(observation), _WAITING_REQUEUE)


def _validate(observation: Observation, status: StatusBuilder, store: str, denial: str | None) -> _Step:
    job = observation.validation
    if job is None:
        return _begin_validation(observation, status, store, denial)
    if not job.finished:
        outcome = _futile_validation(job)
        if outcome is not None:
            status.invalid(outcome.reason or FailureReason.INTERNAL_ERROR, outcome.message)
            return _Step(_stop_running(observation))
        obstacle = find_obstacle(job, observation.now)
        # Waiting loses nothing: the kubelet retries automatically, and succeeds once the cause is gone.
        if (
            obstacle is not None
            and obstacle.failure is not None
            and observation.now - job.created >= _VALIDATION_START_TIMEOUT
        ):
            status.invalid(obstacle.failure, obstacle.message)
            return _Step(_stop_running(observation))
        if obstacle is not None:
            status.validating(obstacle.reason, obstacle.message)
        elif observation.progress is not None and observation.progress.outage is not None:
            status.validating(FailureReason.STORAGE_UNAVAILABLE, observation.progress.outage)
            status.record_progress(observation.progress)
        else:
            status.validating(FineTuneJobReason.VALIDATING, "data, base model and settings are being checked")
            status.record_progress(observation.progress)
        return _Step(requeue_after=obstacle.requeue_after if obstacle is not None else None)
    outcome = job_outcome(job, VALIDATION)
    if outcome.outcome is AttemptOutcome.SUCCEEDED:
        status.valid(outcome.result)
        # The first attempt follows in the same pass, and therefore in the same status write.
        return _train(observation, status, store, denial)
    if outcome.outcome is AttemptOutcome.PREEMPTED:
        # The Job replaces disrupted pods automatically, so this outcome means that the whole Job was pre-empted.
        outcome = replace(outcome, reason=FailureReason.INTERNAL_ERROR, message="validation was pre-empted too often")
    status.invalid(outcome.reason or FailureReason.INTERNAL_ERROR, outcome.message, outcome.result)
    return _Step()


def _begin_validation(observation: Observation, status: StatusBuilder, store: str, denial: str | None) -> _Step:
    """Create the validation Job, once the adapter that the job starts from is published."""
    if denial is not None:
        status.invalid(FailureReason.NOT_ALLOWED, denial)
        return _Step()
    start = start_of(observation.job, observation.source, store)
    if isinstance(start, NotReady):
        if start.final:
            status.invalid(FailureReason.ADAPTER_NOT_FOUND, start.message)
            return _Step()
        status.validating(FineTuneJobReason.WAITING_FOR_ADAPTER, start.message)
        return _Step(requeue_after=_SOURCE_REQUEUE)
    if start is not None:
        status.starts_from(start)
    status.validating(FineTuneJobReason.POD_PENDING, "the validation Job is being created")
    return _Step((CreateValidation(),), _WAITING_REQUEUE)


def _futile_validation(job: JobView) -> JobOutcome | None:
    """Return the outcome of a validation that more pods would not complete; None if they may.

    The Job itself would replace disrupted pods without limit.
    """
    found = next((found for pod in job.pods if (found := eviction_outcome(pod, VALIDATION)) is not None), None)
    if found is not None or sum(pod.disrupted for pod in job.pods) < MAX_VALIDATION_PODS:
        return found
    return JobOutcome(
        AttemptOutcome.FAILED,
        FailureReason.NO_PROGRESS,
        f"validation was evicted or pre-empted {MAX_VALIDATION_PODS} times: submit the job again when the cluster has "
        "room for it, or name a PriorityClass that is not pre-empted in scheduling.priorityClassName",
    )


def _train(observation: Observation, status: StatusBuilder, store: str, denial: str | None) -> _Step:
    attempts = _recorded(observation)
    for number, attempt in list(attempts.items()):
        job = observation.attempts.get(number)
        if attempt.outcome is AttemptOutcome.SUSPENDED and attempt.end_time is None:
            if job is not None and not job.finished:
                # Two attempts must not write at the same time.
                status.record_attempts(attempts)
                status.stopping(f"Job {job.name}")
                return _Step(() if job.deleting else (StopJob(job.name),), _WAITING_REQUEUE)
            attempts[number] = attempt.model_copy(update={"end_time": observation.now})
            continue
        if attempt.outcome is not AttemptOutcome.RUNNING:
            if job is not None and not job.finished:
                # Its pod never started, and must not start beside the next attempt's.
                status.record_attempts(attempts)
                status.waiting(FineTuneJobReason.STOPPING, f"Job {job.name} of a finished attempt is being deleted")
                return _Step(() if job.deleting else (StopJob(job.name),), _WAITING_REQUEUE)
            continue
        if job is None:
            attempts[number] = attempt.model_copy(
                update={
                    "outcome": AttemptOutcome.FAILED,
                    "end_time": observation.now,
                    "reason": FailureReason.INTERNAL_ERROR,
                    "message": f"Job {attempt.name} was deleted while it was running",
                    "last_step": _last_step(observation),
                }
            )
        elif job.finished:
            outcome = job_outcome(job, f"attempt {number}")
            attempts[number] = _finished(attempt, job, outcome, observation)
            status.record_attempts(attempts)
            if _conclude(observation, status, outcome, store):
                return _Step(_stop_running(observation))
        else:
            attempts[number] = _running(attempt, job)
            status.record_attempts(attempts)
            return _follow(observation, status, attempts, number)
    status.record_attempts(attempts)
    return _start_next(observation, status, attempts, denial)


def _recorded(observation: Observation) -> dict[int, Attempt]:
    """Return the attempts of the status, and those whose Job was created but is not recorded yet."""
    metadata = observation.job.metadata
    known = {_number(attempt.name): attempt for attempt in observation.job.status.attempts}
    for number in observation.attempts:
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


def _last_step(observation: Observation) -> int | None:
    """Return the last observed step of the attempt that just finished."""
    samples = [sample for sample in (observation.progress, observation.job.status.progress) if sample is not None]
    return max((sample.step for sample in samples if sample.step is not None), default=None)


def _finished(attempt: Attempt, job: JobView, outcome: JobOutcome, observation: Observation) -> Attempt:
    times = [pod.finished_at for pod in job.members if pod.finished_at is not None]
    return _running(attempt, job).model_copy(
        update={
            "end_time": min(max(times, default=None) or job.finished_at or observation.now, observation.now),
            "outcome": outcome.outcome,
            "reason": outcome.reason,
            "message": outcome.message[:2048] or None,
            "resumed_from_step": outcome.result.resumed_from_step if outcome.result is not None else None,
            "last_step": _last_step(observation),
        }
    )


def _conclude(observation: Observation, status: StatusBuilder, outcome: JobOutcome, store: str) -> bool:
    """Return True if the attempt's outcome finishes the job, and report that outcome in the status."""
    metadata = observation.job.metadata
    expected = artifact_uri(store, metadata.namespace, metadata.name, metadata.uid)
    if outcome.outcome is AttemptOutcome.FAILED and not outcome.retryable:
        if (
            outcome.result is not None
            and outcome.result.artifact is not None
            and outcome.result.artifact.uri == expected
        ):
            status.published(outcome.result)
        status.failed(outcome.reason or FailureReason.INTERNAL_ERROR, outcome.message)
        return True
    if outcome.outcome is not AttemptOutcome.SUCCEEDED:
        return False
    if outcome.result is None or outcome.result.artifact is None:
        # The pod was gone before its result was read. The next attempt finds the artifact in the store and reports it.
        return False
    if outcome.result.artifact.uri != expected:
        status.failed(
            FailureReason.INTERNAL_ERROR,
            f"the trainer reported an artifact at {outcome.result.artifact.uri} instead of {expected}",
        )
        return True
    status.complete(outcome.result)
    return True


def _follow(observation: Observation, status: StatusBuilder, attempts: dict[int, Attempt], number: int) -> _Step:
    job = observation.attempts[number]
    queue = observation.job.spec.scheduling.queue
    if queue is not None:
        if job.suspended:
            status.queued(queue, job.name, job.held_back)
            return _Step(requeue_after=_WAITING_REQUEUE)
        status.admitted(queue)
    obstacle = find_obstacle(job, observation.now)
    if obstacle is None:
        status.started(number, observation.progress.outage if observation.progress is not None else None)
        status.record_progress(observation.progress)
        return _Step()
    status.waiting(obstacle.reason, obstacle.message)
    if obstacle.failure is None:
        return _Step(requeue_after=obstacle.requeue_after)
    # The cause may be temporary: this attempt fails, and the next one follows once its Job is gone.
    attempts[number] = attempts[number].model_copy(
        update={
            "outcome": AttemptOutcome.FAILED,
            "end_time": observation.now,
            "reason": obstacle.failure,
            "message": obstacle.message[:2048],
        }
    )
    status.record_attempts(attempts)
    return _Step((StopJob(job.name),), _WAITING_REQUEUE)


def _start_next(
    observation: Observation, status: StatusBuilder, attempts: dict[int, Attempt], denial: str | None
) -> _Step:
    """Begin the next attempt, or fail the job if no attempts are left."""
    failures = [attempt for attempt in attempts.values() if attempt.outcome is AttemptOutcome.FAILED]
    allowed = observation.job.spec.max_attempts
    last = attempts[max(attempts)] if attempts else None
    if len(failures) >= allowed:
        final = failures[-1]
        status.failed(
            FailureReason.ATTEMPTS_EXHAUSTED,
            f"{len(failures)} of {allowed} attempts failed; the last: {final.reason}: {final.message}",
        )
        return _Step()
    since, best = _since_progress(attempts)
    fruitless = since - (1 if best > 0 else 0)  # the attempt that trained furthest made progress
    if fruitless >= MAX_FRUITLESS_ATTEMPTS and last is not None:
        status.failed(
            FailureReason.NO_PROGRESS,
            f"{fruitless} attempts in a row were stopped before they trained beyond step {best}; the last: "
            f"{last.message or last.outcome}; use nodes that are not reclaimed or a PriorityClass that is not "
            "pre-empted, or save more often (checkpoint.everySteps), in a new FineTuneJob",
        )
        return _Step()
    number = max(attempts, default=0) + 1
    if observation.lingering:
        # Two attempts must not write at the same time, and the next one resumes from this one's checkpoint.
        pod = observation.lingering[0]
        status.waiting(
            FineTuneJobReason.STOPPING, f"attempt {number} waits for pod {pod} of the previous attempt, which is saving"
        )
        return _Step(requeue_after=_WAITING_REQUEUE)
    if last is not None and last.outcome is not AttemptOutcome.SUSPENDED and last.end_time is not None:
        delay = min(_MIN_RETRY_DELAY * 2 ** (since - 1), _MAX_RETRY_DELAY)
        due = last.end_time + delay
        if observation.now < due:
            status.waiting(FineTuneJobReason.RETRYING, _retry(number, last, int(delay.total_seconds())))
            return _Step(requeue_after=due - observation.now)
    if denial is not None:
        # The installation changed after the validation; that must not discard training progress.
        status.waiting(FailureReason.NOT_ALLOWED, f"attempt {number} is not created: {denial}")
        return _Step(requeue_after=_PERMISSION_REQUEUE)
    if observation.refusal is None:
        status.begin_attempt(number)
        metadata = observation.job.metadata
        attempts[number] = Attempt(name=owned_name(metadata.name, metadata.uid, str(number)))
        status.record_attempts(attempts)
    return _Step((CreateAttempt(number),), _WAITING_REQUEUE)


def _since_progress(attempts: dict[int, Attempt]) -> tuple[int, int]:
    """Return the number of attempts from the one that trained furthest to the last one, and the highest step."""
    count, best = 0, 0
    for attempt in attempts.values():
        if attempt.outcome in {AttemptOutcome.RUNNING, AttemptOutcome.SUSPENDED}:
            continue
        count = 1 if (attempt.last_step or 0) > best else count + 1
        best = max(best, attempt.last_step or 0)
    return count, best


def _retry(number: int, last: Attempt, seconds: int) -> str:
    event = {AttemptOutcome.FAILED: "failed", AttemptOutcome.PREEMPTED: "was pre-empted"}.get(
        last.outcome, "stopped without a readable result"
    )
    return f"attempt {number} starts {seconds} s after attempt {number - 1} {event}"


def _unfinished(observation: Observation) -> list[JobView]:
    jobs = [*observation.attempts.values()] + ([observation.validation] if observation.validation is not None else [])
    return [job for job in jobs if not job.finished]


def _stop_running(observation: Observation) -> tuple[Action, ...]:
    return tuple(StopJob(job.name) for job in _unfinished(observation) if not job.deleting)
