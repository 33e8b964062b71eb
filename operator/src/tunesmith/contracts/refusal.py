"""A write that the API server refused, as an observation from which the next status is decided."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

MAX_RETRY_SECONDS = 30.0
"""A refused write is tried again at least this often: what refuses it changes without telling anybody."""
_QUOTA = re.compile(r"(exceeded|failed) quota: ")
_POLICY = re.compile(r"denied (the )?request|failed calling webhook|violates PodSecurity")
_RIGHT = re.compile(r'cannot [a-z]+ resource "')


class RefusalCause(StrEnum):
    """Kinds of refusals, each with what ends it."""

    fix: str

    def __new__(cls, value: str, fix: str = "") -> Self:
        """Make a member from its value and its fix."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.fix = fix
        return member

    QUOTA = "Quota", "delete what uses the quota, or ask for a larger one"
    POLICY = "Policy", "change what the admission policy denies, or ask who owns it"
    RIGHT = "Right", "give the operator the right that docs/reference/rbac.md lists"
    INVALID = "Invalid", ""
    """The object itself is wrong: the same write is refused until the spec is another one."""
    NAME_TAKEN = "NameTaken", ""
    """Another object has the name."""


@dataclass(frozen=True)
class Refusal:
    """A refused write.

    `verb`: such as create. `kind`: of the object. `message`: a sentence that names the object and has the API server's
    message.
    """

    verb: str
    kind: str
    message: str
    cause: RefusalCause

    @property
    def sentence(self) -> str:
        """The message, what ends the refusal, and when the write is tried again."""
        fix = f"; {self.cause.fix}" if self.cause.fix else ""
        return f"{self.message}{fix}; the operator tries again within {MAX_RETRY_SECONDS:.0f} s"


def cause_of(message: str, *, forbidden: bool) -> RefusalCause:
    """Classify a refusal by the API server's message. `forbidden`: its status is 403."""
    for pattern, cause in (
        (_QUOTA, RefusalCause.QUOTA),
        (_POLICY, RefusalCause.POLICY),
        (_RIGHT, RefusalCause.RIGHT),
    ):
        if pattern.search(message):
            return cause
    return RefusalCause.POLICY if forbidden else RefusalCause.INVALID
