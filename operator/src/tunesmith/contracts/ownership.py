"""Owners of objects in the cluster. Anyone may write owner references, labels and uids into objects of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def controller_of(item: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """Return the owner reference of an object's controller if that is of `kind`, otherwise None.

    The API server admits one controller at most. An owner is of the object's own namespace: the caller compares it.
    """
    owners = item["metadata"].get("ownerReferences") or ()
    return next((owner for owner in owners if owner.get("controller") and owner.get("kind") == kind), None)
