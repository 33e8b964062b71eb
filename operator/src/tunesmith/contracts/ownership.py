"""Owners of objects in the cluster. Users may write any owner references, labels and UIDs into their own objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def controller_of(item: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """Return the owner reference of an object's controller if it is of `kind`, otherwise None.

    The API server allows at most one controller. An owner is always in the object's namespace, which the caller must
    compare.
    """
    owners = item["metadata"].get("ownerReferences") or ()
    return next((owner for owner in owners if owner.get("controller") and owner.get("kind") == kind), None)
