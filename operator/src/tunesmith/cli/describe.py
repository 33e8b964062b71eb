"""Resources in words: state, one-line summary, details, next command. Pure: the time is passed in."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tunesmith.api.adapterdeployment import AdapterDeployment, AdapterPhase
from tunesmith.api.conditions import AdapterDeploymentCondition, ServingPoolCondition, find, is_true
from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.cli.progress import final_condition, live_line
from tunesmith.contracts.progress import duration

if TYPE_CHECKING:
    from tunesmith.api.rollout import ShadowComparison
    from tunesmith.api.servingpool import ServingPool, ServingPoolStatus
    from tunesmith.cli.kinds import Resource

_UNOBSERVED = "the operator has not processed it yet"


def state(resource: Resource) -> str:
    """Return the phase; `Pending` before the operator has set one.

    An adapter that serves, but not the version of its spec, is `RollingOut`, or `Stalled` if that has failed.
    """
    if isinstance(resource, AdapterDeployment) and resource.status.phase is AdapterPhase.READY:
        if is_true(resource.status.conditions, AdapterDeploymentCondition.STALLED):
            return "Stalled"
        if resource.status.rollout is not None and resource.status.rollout.is_running:
            return "RollingOut"
    return resource.status.phase.value if resource.status.phase else "Pending"


def summary(resource: Resource, now: datetime) -> str:
    """Return one line: progress, result, or what the resource waits for."""
    if isinstance(resource, FineTuneJob):
        end = final_condition(resource)
        if end is None:
            return live_line(resource, now)
        return _loss(resource) if end.type == "Complete" else f"{end.reason}: {end.message}"
    if isinstance(resource, AdapterDeployment):
        pool = adapter_pool(resource)
        served = f"{pods(resource)} pods of {pool}" if pool else ""
        return waiting(resource) or _unfinished(resource) or served
    status = resource.status
    free = f", {_free(status)} more adapters fit" if status.adapter_capacity is not None else ""
    return waiting(resource) or f"{pods(resource)} pods{free}, {resource.spec.base_model.origin}"


def _unfinished(adapter: AdapterDeployment) -> str:
    """Return why a serving adapter does not serve the version of its spec alone; empty if it does."""
    stalled = find(adapter.status.conditions, AdapterDeploymentCondition.STALLED)
    if stalled is not None:
        return stalled.message
    rollout = adapter.status.rollout
    return rollout.message if rollout is not None and rollout.is_running else ""


def waiting(resource: AdapterDeployment | ServingPool) -> str:
    """Return the reason why an adapter or a pool does not serve yet; empty if it serves."""
    kinds: tuple[str, ...] = (ServingPoolCondition.AVAILABLE,)
    if isinstance(resource, AdapterDeployment):
        kinds = (AdapterDeploymentCondition.RESOLVED, AdapterDeploymentCondition.READY)
    conditions = resource.status.conditions
    for kind in kinds:
        condition = find(conditions, kind)
        if condition is not None and not is_true(conditions, kind):
            return condition.message or condition.reason
    return "" if find(conditions, kinds[0]) is not None else _UNOBSERVED


def pods(resource: AdapterDeployment | ServingPool) -> str:
    """Return ready and desired pods as `1/2`; `?` for a number that the operator has not decided."""
    desired = resource.status.desired_replicas
    return f"{resource.status.ready_replicas or 0}/{'?' if desired is None else desired}"


def adapter_pool(adapter: AdapterDeployment) -> str:
    """Return `<namespace>/<name>` of the pool that serves an adapter, or of the one that its spec names, or ""."""
    pool = adapter.status.pool or adapter.spec.pool
    return f"{pool.namespace or adapter.metadata.namespace}/{pool.name}" if pool else ""


def age(created: datetime | None, now: datetime) -> str:
    """Return the time since creation in kubectl's format, such as `5m` or `3d`."""
    if created is None:
        return "?"
    seconds = max(0, int((now - created).total_seconds()))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def lines(resource: Resource) -> list[tuple[str, str]]:
    """Return pairs of a heading and a text."""
    found = [("name", f"{resource.metadata.namespace}/{resource.metadata.name}"), ("state", state(resource))]
    if isinstance(resource, FineTuneJob):
        return found + _job(resource)
    message = waiting(resource)
    if message:
        found.append(("reason", message))
    if isinstance(resource, AdapterDeployment):
        return found + _adapter(resource)
    return found + _of_pool(resource)


def _job(job: FineTuneJob) -> list[tuple[str, str]]:
    status, found = job.status, []
    end = final_condition(job)
    if end is None:
        found.append(("progress", live_line(job, datetime.now(UTC))))
        conditions = sorted(status.conditions, key=lambda condition: condition.last_transition_time)
        found += [(condition.type, condition.message or condition.reason) for condition in conditions]
    else:
        found.append(("reason", f"{end.reason}: {end.message}".rstrip(": ")))
    if status.evaluation is not None:
        found.append(("held-out", _loss(job)))
    found += [
        (f"attempt {attempt.name}", f"{attempt.outcome.value}: {attempt.reason}: {attempt.message or ''}".rstrip(": "))
        for attempt in status.attempts
        if attempt.reason is not None
    ]
    if status.gpu_seconds is not None:
        found.append(("cost", f"{duration(status.gpu_seconds)} of GPU time ({status.gpu_seconds:.0f} GPU seconds)"))
    if status.artifact is not None:
        found += [("artifact", status.artifact.uri), ("digest", status.artifact.digest)]
        servable = status.artifact.servable
        rank = job.spec.method.published_rank
        accepting = f", in pools that accept rank {rank}" if rank is not None else ""
        found.append(("servable", f"by vLLM{accepting}" if servable.vllm else f"no: {servable.reason}"))
    return found


def _pods(count: int) -> str:
    return f"{count} pod{'' if count == 1 else 's'}"


def _adapter(adapter: AdapterDeployment) -> list[tuple[str, str]]:
    status, source = adapter.status, adapter.spec.adapter_from
    found = [
        ("model", status.model or adapter.model),
        *([("job", source.fine_tune_job.name)] if source.fine_tune_job is not None else []),
        *([("imported from", source.artifact.uri)] if source.artifact is not None else []),
        ("pool", adapter_pool(adapter) or "not chosen yet"),
        ("pods", pods(adapter)),
    ]
    found += [
        (
            "revision",
            f"{revision.engine_name.rpartition('@')[2]}  {revision.state.value} on {_pods(revision.ready_replicas)}",
        )
        for revision in status.revisions
    ]
    if status.rollout is not None and status.rollout.is_running:
        found.append(("rollout", status.rollout.message))
    if status.url:
        found.append(("url", status.url))
    return found


def rollout_lines(adapter: AdapterDeployment) -> list[tuple[str, str]]:
    """Return pairs of a heading and a text about the latest rollout; empty without one."""
    rollout, status = adapter.status.rollout, adapter.status
    if rollout is None:
        return []
    found = [
        ("state", f"{rollout.phase.value}{', paused' if rollout.paused else ''}"),
        ("new", _short(rollout.digest)),
        *([("old", _short(rollout.stable.digest))] if rollout.stable is not None else []),
        *([("step", f"{rollout.step} of {rollout.steps}")] if rollout.steps else []),
    ]
    found += [
        ("requests", f"{revision.weight} % to {_short(revision.digest)}, {_pods(revision.ready_replicas)}")
        for revision in status.revisions
        if revision.weight is not None and not revision.shadow_percent
    ]
    found += [
        ("mirrored", f"{revision.shadow_percent} % to {_short(revision.digest)}, {_pods(revision.ready_replicas)}")
        for revision in status.revisions
        if revision.shadow_percent
    ]
    for measure in rollout.measures:
        value = "?" if measure.value is None else f"{measure.value:g}"
        limit = "" if measure.max is None else f" (max {measure.max:g})"
        verdict = {True: "passes", False: "fails", None: measure.message or "unknown"}[measure.passed]
        found.append(("measure", f"{measure.query or measure.measure.value}: {value}{limit}, {verdict}"))
    if rollout.comparison is not None:
        found += _comparison(rollout.comparison)
    if rollout.message:
        found.append(("message", rollout.message))
    found += [("rejected", _short(digest)) for digest in status.rejected_digests]
    return found


def _comparison(found: ShadowComparison) -> list[tuple[str, str]]:
    lines = [("compared", f"{found.answers} answers; {found.failures} failed, {found.dropped} were not mirrored")]
    for what, shadow, served in (
        ("tokens per answer", found.shadow_tokens, found.served_tokens),
        ("refusals", found.shadow_refusals, found.served_refusals),
        ("log-probability", found.shadow_logprob, found.served_logprob),
    ):
        if shadow is not None and served is not None:
            lines.append((what, f"{shadow:g} (clients got {served:g})"))
    return lines


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


def _of_pool(pool: ServingPool) -> list[tuple[str, str]]:
    status = pool.status
    free = "?" if status.adapter_capacity is None else _free(status)
    active = f"{status.active_adapters or 0} active in {status.adapter_slots or 0} slots"
    return [
        ("model", pool.model),
        ("base", pool.spec.base_model.origin),
        ("pods", pods(pool)),
        ("adapters", f"{status.adapters or 0} attached, {free} more fit, {active}"),
        ("highest rank", str(pool.spec.engine.max_lora_rank)),
    ]


def _free(status: ServingPoolStatus) -> int:
    """Return the number of adapters for which the pods have room."""
    return max(0, (status.adapter_capacity or 0) - (status.registered_adapters or 0))


def next_step(resource: Resource) -> str:
    """Return the next command to run; empty if there is none."""
    target = f"{resource.metadata.name} -n {resource.metadata.namespace}"
    if isinstance(resource, FineTuneJob):
        end = final_condition(resource)
        if end is None:
            return f"tunesmith wait job {target}"
        if end.type == "Failed":
            return f"tunesmith logs {target}"
        servable = resource.status.artifact is not None and resource.status.artifact.servable.vllm
        return f"tunesmith deploy {target}" if servable else f"tunesmith artifact download {target}"
    if isinstance(resource, AdapterDeployment):
        return f"tunesmith wait adapter {target}" if waiting(resource) else f"tunesmith chat {resource.model}"
    return f"tunesmith deploy JOB --pool {resource.metadata.namespace}/{resource.metadata.name}"


def _loss(job: FineTuneJob) -> str:
    scores = job.status.evaluation
    if scores is None or scores.loss is None or scores.base_loss is None:
        return "complete, without held-out rows"
    change = f" ({scores.loss_change})" if scores.loss_change else ""
    at = f", at step {scores.published_step}" if scores.published_step is not None else ""
    return f"loss {scores.base_loss:.3f} before, {scores.loss:.3f} after{change}{at}"
