"""Facts that follow from the status of a rollout: Events, expressions to evaluate, and changes that may wait. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.api.conditions import AdapterDeploymentCondition, EventReason
from tunesmith.api.rollout import Measure, MeasuredTraffic
from tunesmith.contracts.sentence import one_line
from tunesmith.contracts.transitions import NewEvent
from tunesmith.serving.resolve import short

if TYPE_CHECKING:
    from tunesmith.api.adapterdeployment import AdapterDeployment, AdapterDeploymentStatus
    from tunesmith.api.rollout import RolloutStatus

_WITH_PROGRESS = (AdapterDeploymentCondition.PROGRESSING, AdapterDeploymentCondition.RECONCILING)


def expressions(adapter: AdapterDeployment, status: AdapterDeploymentStatus) -> dict[str, str]:
    """Return the PromQL expressions that a running step needs: by their text in the spec, with the names filled in."""
    rollout, rule = status.rollout, adapter.spec.rollout
    if rollout is None or rule is None or not rollout.is_running or not rollout.step:
        return {}
    names = {
        "{{revision}}": status.revisions[0].engine_name,
        "{{model}}": adapter.model,
        "{{namespace}}": adapter.metadata.namespace,
    }
    found = {}
    for check in rule.analysis or ():
        if check.measure is Measure.QUERY and check.query is not None:
            text = check.query
            for placeholder, name in names.items():
                text = text.replace(placeholder, name)
            found[check.query] = text
    return found


def rollout_events(before: AdapterDeploymentStatus, after: AdapterDeploymentStatus) -> list[NewEvent]:
    """Return the Events about steps of a rollout and handled commands. Its failure is an Event of its condition."""
    found = []
    old, new = before.rollout, after.rollout
    if new is not None and _place(old) != _place(new) and (new.is_running or (old is not None and old.is_running)):
        found.append(NewEvent(EventReason.ROLLOUT_STEP, _sentence(new)))
    handled = after.rollout_command
    if handled is not None and handled != before.rollout_command:
        found.append(NewEvent(EventReason.ROLLOUT_COMMAND, one_line(f"{handled.value}: {handled.message}", 1024)))
    return found


def without_measures(status: AdapterDeploymentStatus) -> AdapterDeploymentStatus:
    """Return the status without the figures that change with every request to a revision in a rollout."""
    if status.rollout is None or not status.rollout.is_running:
        return status
    results = [result.model_copy(update={"value": None, "message": None}) for result in status.rollout.measures]
    changes = {"traffic": MeasuredTraffic(), "comparison": None, "pods": [], "measures": results, "message": ""}
    conditions = [
        condition.model_copy(update={"message": ""}) if condition.type in _WITH_PROGRESS else condition
        for condition in status.conditions
    ]
    rollout = status.rollout.model_copy(update=changes)
    return status.model_copy(update={"rollout": rollout, "conditions": conditions})


def _place(rollout: RolloutStatus | None) -> tuple[object, ...] | None:
    return None if rollout is None else (rollout.phase, rollout.digest, rollout.step, rollout.started_at)


def _sentence(rollout: RolloutStatus) -> str:
    if rollout.is_running and not rollout.step:
        return f"rollout of revision {short(rollout.digest)} began: {rollout.message}"
    return rollout.message
