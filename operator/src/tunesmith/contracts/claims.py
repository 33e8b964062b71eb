"""Ownership of model names, for the operator and the gateway: the precedence of competing claims on one id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tunesmith.api.adapterdeployment import AdapterDeployment
    from tunesmith.api.servingpool import ServingPool

_NEVER = datetime.max.replace(tzinfo=UTC)
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def precedence(created: datetime | None, uid: str) -> tuple[datetime, str]:
    """Return the sort key of objects that compete for a name or a slot: oldest first, then by UID.

    An object with an unknown creation time sorts last.
    """
    return created or _NEVER, uid


@dataclass(frozen=True, slots=True)
class ModelNameClaim:
    """A claim on a global id, `<namespace>/<modelName>`."""

    model: str
    kind: str
    namespace: str
    name: str
    uid: str
    created: datetime | None

    @property
    def holder(self) -> str:
        """The claimant, as a noun phrase for messages."""
        return f"{self.kind} {self.namespace}/{self.name}"


def model_name_claim(resource: AdapterDeployment | ServingPool) -> ModelNameClaim:
    """Return the claim that a resource makes."""
    meta = resource.metadata
    return ModelNameClaim(resource.model, resource.kind, meta.namespace, meta.name, meta.uid, meta.creation_timestamp)


def winner(model: str, claims: Iterable[ModelNameClaim]) -> ModelNameClaim | None:
    """Return the claim that holds the id, by `precedence`; None if nobody claims it."""
    rivals = (claim for claim in claims if claim.model == model)
    return min(rivals, key=lambda claim: precedence(claim.created, claim.uid), default=None)


def older_claim(resource: AdapterDeployment | ServingPool, claims: Iterable[ModelNameClaim]) -> ModelNameClaim | None:
    """Return the older claim on the resource's id; None if the resource holds the id itself."""
    mine = model_name_claim(resource)
    first = winner(mine.model, claims)
    return None if first is None or first.uid == mine.uid else first


def parse_namespaces(text: str) -> tuple[str, ...]:
    """Return the namespaces in an option's comma-separated list.

    Raises:
        ValueError: an entry is not a valid namespace name; the message contains it.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if _NAMESPACE.fullmatch(name) is None:
            raise ValueError(f"{name} is not a valid name of a namespace")
    return names
