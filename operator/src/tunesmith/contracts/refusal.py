"""A write that the API server refused, as an observation for the next status."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_RETRY_SECONDS = 30.0
"""Longest time between retries of a refused write: no event announces that its cause is gone."""
_QUOTA = re.compile(r"(exceeded|failed) quota: ")
_POLICY = re.compile(r"denied (the )?request|failed calling webhook|violates PodSecurity")
_PERMISSION = re.compile(r'cannot [a-z]+ resource "')


class RefusalCause(StrEnum):
    """Causes of refusals, each with its fix."""

    fix: str

    def __new__(cls, value: str, fix: str = "") -> Self:
        """Return a new member."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.fix = fix
        return member

    QUOTA = "Quota", "delete objects that use the quota, or raise it"
    POLICY = "Policy", "change the fields that the admission policy denies, or ask its owner"
    PERMISSION = "Permission", "grant the operator the permission listed in docs/reference/rbac.md"
    IMAGE_VOLUME = "ImageVolume", "enable the feature gate ImageVolume (Kubernetes 1.33 or newer), or use no oci:// uri"
    """The API server accepts the object without its volumes of images, which it does not support."""
    INVALID = "Invalid", ""
    """The object itself is invalid: the same write is refused until the spec changes."""
    NAME_TAKEN = "NameTaken", ""
    """Another object has the name."""


@dataclass(frozen=True)
class Refusal:
    """A refused write.

    `verb`: such as create. `kind`: of the object. `message`: a sentence with the object's name and the API server's
    message.
    """

    verb: str
    kind: str
    message: str
    cause: RefusalCause

    @property
    def sentence(self) -> str:
        """Sentence with the message, the fix, and the time of the next try."""
        fix = f"; {self.cause.fix}" if self.cause.fix else ""
        return f"{self.message}{fix}; retrying within {MAX_RETRY_SECONDS:.0f} s"


def removed_images(manifest: Mapping[str, Any], written: Mapping[str, Any]) -> list[str]:
    """Return the names of the volumes of images that the API server removed or replaced by empty folders."""
    kept = {volume["name"] for volume in _volumes(written) if "image" in volume}
    return [volume["name"] for volume in _volumes(manifest) if "image" in volume and volume["name"] not in kept]


def _volumes(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if manifest.get("kind") not in {"Deployment", "Job"}:
        return []
    return manifest["spec"]["template"]["spec"].get("volumes") or []


def cause_of(message: str, *, forbidden: bool) -> RefusalCause:
    """Return the cause of a refusal, from the API server's message. `forbidden`: True for HTTP status 403."""
    for pattern, cause in (
        (_QUOTA, RefusalCause.QUOTA),
        (_POLICY, RefusalCause.POLICY),
        (_PERMISSION, RefusalCause.PERMISSION),
    ):
        if pattern.search(message):
            return cause
    return RefusalCause.POLICY if forbidden else RefusalCause.INVALID
