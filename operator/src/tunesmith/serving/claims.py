"""Who owns a model name. The older claim wins; a pool's base and an adapter claim from the same set of names."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tunesmith.api.adapterdeployment import AdapterDeployment
    from tunesmith.api.servingpool import ServingPool

_NEVER = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Claim:
    """A claim on a global id, `<namespace>/<modelName>`."""

    model: str
    kind: str
    namespace: str
    name: str
    uid: str
    created: datetime

    @property
    def holder(self) -> str:
        """The claimant, for a sentence."""
        return f"{self.kind} {self.namespace}/{self.name}"


def claim_of(resource: AdapterDeployment | ServingPool) -> Claim:
    """The claim that a resource makes."""
    meta = resource.metadata
    return Claim(resource.model, resource.kind, meta.namespace, meta.name, meta.uid, meta.creation_timestamp or _NEVER)


def owner(model: str, claims: Iterable[Claim]) -> Claim | None:
    """The claim that holds the id: the oldest by creation time, then by UID. None when nobody claims it."""
    return min(
        (claim for claim in claims if claim.model == model), key=lambda claim: (claim.created, claim.uid), default=None
    )


def lost_to(resource: AdapterDeployment | ServingPool, claims: Iterable[Claim]) -> Claim | None:
    """The older claim that takes the resource's id from it; None when the resource holds it."""
    mine = claim_of(resource)
    first = owner(mine.model, claims)
    return None if first is None or first.uid == mine.uid else first
