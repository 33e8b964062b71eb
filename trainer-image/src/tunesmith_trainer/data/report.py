"""Rows that are not used, counted by reason with the first examples of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunesmith.api.finetunejob_status import DroppedRows, DropReason

if TYPE_CHECKING:
    from tunesmith.api.finetunejob_status import Preflight

EXAMPLES = 3
"""Rows that are shown of each kind."""
_EXAMPLE_LENGTH = 160
"""Characters of each; a path in a store may have more."""
UNUSABLE = (DropReason.UNDECODABLE, DropReason.NULL, DropReason.EMPTY)
"""Reasons that lie in the row itself: there is nothing in it to learn."""


def shortened(example: str) -> str:
    """A row's place, and what is said of it, without their middle where they are long: both ends tell which it is."""
    if len(example) <= _EXAMPLE_LENGTH:
        return example
    half = (_EXAMPLE_LENGTH - 1) // 2
    return f"{example[:half]}…{example[-half:]}"


@dataclass
class RowReport:
    """What became of the rows of a data set."""

    read: int = 0
    """Rows that were looked at; a pair that becomes two examples is two."""
    truncated: int = 0
    """Rows that were cut to the longest length."""
    longest: int = 0
    """Tokens of the longest row, used or not."""
    counts: dict[DropReason, int] = field(default_factory=dict)
    examples: dict[DropReason, list[str]] = field(default_factory=dict)

    def drop(self, reason: DropReason, example: str) -> None:
        """Counts a row that is not used."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES:
            shown.append(shortened(example))

    @property
    def dropped(self) -> int:
        """Rows that are not used."""
        return sum(self.counts.values())

    @property
    def unusable(self) -> int:
        """Rows that hold nothing to learn."""
        return sum(self.counts.get(reason, 0) for reason in UNUSABLE)

    def unusable_examples(self) -> list[str]:
        """The first rows that hold nothing to learn, in the order of their reasons."""
        return [example for reason in UNUSABLE for example in self.examples.get(reason, [])]

    def add(self, other: RowReport) -> RowReport:
        """The report of both data sets; the examples are this one's first."""
        return RowReport(
            read=self.read + other.read,
            truncated=self.truncated + other.truncated,
            longest=max(self.longest, other.longest),
            counts={
                reason: total
                for reason in DropReason
                if (total := self.counts.get(reason, 0) + other.counts.get(reason, 0))
            },
            examples={
                reason: (self.examples.get(reason, []) + other.examples.get(reason, []))[:EXAMPLES]
                for reason in DropReason
            },
        )

    def status(self) -> list[DroppedRows] | None:
        """For `status.preflight.dropped`, the most frequent reason first."""
        order = sorted(self.counts, key=lambda reason: -self.counts[reason])
        return [
            DroppedRows(reason=reason, rows=self.counts[reason], examples=self.examples.get(reason) or None)
            for reason in order
        ] or None

    def document(self) -> dict[str, Any]:
        """As JSON, for the cache."""
        return {
            "read": self.read,
            "truncated": self.truncated,
            "longest": self.longest,
            "counts": {reason.value: count for reason, count in self.counts.items()},
            "examples": {reason.value: shown for reason, shown in self.examples.items()},
        }

    @classmethod
    def of(cls, document: dict[str, Any]) -> RowReport:
        """The report that `document` made."""
        return cls(
            read=document["read"],
            truncated=document["truncated"],
            longest=document["longest"],
            counts={DropReason(reason): count for reason, count in document["counts"].items()},
            examples={DropReason(reason): shown for reason, shown in document["examples"].items()},
        )


def told(preflight: Preflight) -> list[str]:
    """What was counted, in lines for people: the totals, then for each reason the rows that are not used."""
    packed = f" in {preflight.packed_sequences} sequences" if preflight.packed_sequences is not None else ""
    cut = f", {preflight.truncated_rows} cut" if preflight.truncated_rows else ""
    total = (
        f"  {preflight.rows} rows{packed}, {preflight.tokens} tokens, {preflight.target_tokens} of them learned;"
        f" {preflight.validation_rows} held out, {preflight.dropped_rows} dropped{cut}"
    )
    reasons = [
        f"    {one.rows} {one.reason}" + (f", the first: {one.examples[0]}" if one.examples else "")
        for one in preflight.dropped or []
    ]
    trained = [
        f"    {one.sentence}" + (f"; the first: {one.examples[0]}" if one.examples else "")
        for one in preflight.also_trained or []
    ]
    return [total, *reasons, *trained]
