"""What a pool's pod says: through the API server, and through its agent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tunesmith.api.conditions import ServingPoolReason
from tunesmith.contracts.agent import ResidencyState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tunesmith.contracts.agent import PodState, Residency

READINESS_GATE = "tunesmith.dev/adapters"
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
BASE_MODEL_CONTAINER = "base-model"
AGENT_CONTAINER = "agent"
ENGINE_CONTAINER = "engine"
_LONGEST = 600
_PULL = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"})
_CONFIGURATION = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
_OF_CONTAINER = {
    BASE_MODEL_CONTAINER: (ServingPoolReason.BASE_MODEL_UNAVAILABLE, "the base model cannot be fetched"),
    AGENT_CONTAINER: (ServingPoolReason.AGENT_FAILED, "the agent ended"),
    ENGINE_CONTAINER: (ServingPoolReason.ENGINE_FAILED, "the engine ended"),
}


@dataclass(frozen=True)
class Problem:
    """What keeps a pod from working, as a sentence."""

    reason: ServingPoolReason
    message: str


@dataclass(frozen=True)
class PoolPod:
    """A pod of a pool.

    `ready`: its Ready condition. `gate`: the readiness gate as it stands, None when never set. `stopping`: it is being
    deleted, or has ended. `state`: the agent's last line, None before the first. `heard`: that line is recent.
    """

    namespace: str
    name: str
    uid: str
    address: str | None
    created: datetime
    ready: bool
    gate: bool | None
    deletion_cost: str | None
    stopping: bool
    problem: Problem | None = None
    state: PodState | None = None
    heard: bool = False

    @property
    def answering(self) -> bool:
        """Whether its engine takes requests, as far as is known now."""
        return (
            self.heard
            and not self.stopping
            and self.state is not None
            and self.state.engine_ready
            and not self.state.draining
            and not self.state.problem
        )

    def residency(self, engine_name: str) -> Residency | None:
        """What the agent last said about a revision."""
        adapters = self.state.adapters if self.state is not None else []
        return next((entry for entry in adapters if entry.engine_name == engine_name), None)

    @property
    def present(self) -> frozenset[str]:
        """Revisions that it holds, is loading or could not load."""
        adapters = self.state.adapters if self.state is not None else []
        return frozenset(entry.engine_name for entry in adapters if entry.state is not ResidencyState.UNLOADING)

    @property
    def resident(self) -> frozenset[str]:
        """Revisions that its engine holds, as the agent said last."""
        adapters = self.state.adapters if self.state is not None else []
        return frozenset(entry.engine_name for entry in adapters if entry.state is ResidencyState.RESIDENT)


def observe_pod(manifest: Mapping[str, Any], state: PodState | None = None, *, heard: bool = False) -> PoolPod:
    """The pod that a manifest describes, with what its agent said."""
    metadata, status = manifest["metadata"], manifest.get("status") or {}
    conditions = {condition["type"]: condition for condition in status.get("conditions") or ()}
    gate = conditions.get(READINESS_GATE)
    return PoolPod(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        address=status.get("podIP"),
        created=datetime.fromisoformat(metadata["creationTimestamp"]).astimezone(UTC),
        ready=_is_true(conditions.get("Ready")),
        gate=None if gate is None else _is_true(gate),
        deletion_cost=(metadata.get("annotations") or {}).get(DELETION_COST),
        stopping=bool(metadata.get("deletionTimestamp")) or status.get("phase") in {"Failed", "Succeeded"},
        problem=next(_problems(status, conditions), None),
        state=state,
        heard=heard,
    )


def _is_true(condition: Mapping[str, Any] | None) -> bool:
    return condition is not None and condition.get("status") == "True"


def _problems(status: Mapping[str, Any], conditions: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    scheduled = conditions.get("PodScheduled")
    if scheduled is not None and scheduled.get("status") == "False":
        message = scheduled.get("message") or scheduled.get("reason") or "no node takes it"
        yield Problem(ServingPoolReason.UNSCHEDULABLE, f"no node takes it: {_cut(message)}")
    for container in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason, name = waiting.get("reason", ""), container["name"]
        if reason in _PULL:
            yield Problem(
                ServingPoolReason.IMAGE_PULL_FAILED,
                f"image {container.get('image')} of {name} cannot be pulled: {_cut(waiting.get('message') or reason)}",
            )
        elif reason in _CONFIGURATION:
            yield Problem(
                ServingPoolReason.CONFIGURATION,
                f"container {name} cannot be started: {_cut(waiting.get('message') or reason)}",
            )
        elif not _is_running(container) and (ended := _failure(container)) is not None:
            kind, what = _OF_CONTAINER.get(name, (ServingPoolReason.ENGINE_FAILED, f"container {name} ended"))
            yield Problem(kind, f"{what}{ended}")


def _is_running(container: Mapping[str, Any]) -> bool:
    return "running" in (container.get("state") or {})


def _failure(container: Mapping[str, Any]) -> str | None:
    """How the container's last run ended; None when it did not fail."""
    for where in ("state", "lastState"):
        ended = (container.get(where) or {}).get("terminated")
        if ended and ended.get("exitCode", 0) != 0:
            said = _said(ended.get("message") or "")
            cause = "out of memory" if ended.get("reason") == "OOMKilled" else f"exit code {ended['exitCode']}"
            return f": {said}" if said else f" ({cause})"
    return None


def _said(message: str) -> str:
    """The sentence of a termination message: `message` of a JSON object, or the last line of a log."""
    text = message.strip()
    try:
        document = json.loads(text)
    except ValueError:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return _cut(lines[-1]) if lines else ""
    return _cut(str(document.get("message") or "")) if isinstance(document, dict) else _cut(text)


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
