"""Rows that are not used, counted by reason with the first examples of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunesmith.api.dataset import UnusableRows
from tunesmith.api.finetunejob_status import DroppedRows, DropReason, IgnoredKey
from tunesmith_trainer.errors import DatasetInvalidError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith.api.finetunejob_status import Preflight

EXAMPLES = 3
"""Number of example rows per reason."""
_EXAMPLE_LENGTH = 160
"""Characters per example; a path in a store may be longer."""
UNUSABLE = (
    DropReason.UNDECODABLE,
    DropReason.NULL,
    DropReason.EMPTY,
    DropReason.INCOMPLETE,
    DropReason.NOT_RENDERED,
)
"""Reasons in the row itself: it contains nothing to learn, or the chat template does not render it."""
_SHOWN_KEYS = 8
_KEY_LENGTH = 64
_SHOWN_PROBLEMS = 3
_NOT_RENDERED_FIX = (
    ": remove what is not rendered from the rows, use a base model whose template renders it, or set"
    " dataset.chatTemplate"
)


def joined(examples: Sequence[str], total: int) -> str:
    """Return the first of the problems of rows as one message, each problem once, with the number of the others."""
    rows: dict[str, list[str]] = {}
    for example in examples[:_SHOWN_PROBLEMS]:
        where, _, problem = example.partition(": ")
        rows.setdefault(problem, []).append(where)
    shown = [
        f"{where}: {problem}" + (f" (also {', '.join(others)})" if others else "")
        for problem, (where, *others) in rows.items()
    ]
    rest = total - len(examples[:_SHOWN_PROBLEMS])
    return "; ".join(shown) + (f"; and {rest} more row{'s' if rest > 1 else ''} with errors" if rest else "")


def shortened(example: str) -> str:
    """Shorten a row's location and description in the middle: both ends are needed to identify it."""
    if len(example) <= _EXAMPLE_LENGTH:
        return example
    half = (_EXAMPLE_LENGTH - 1) // 2
    return f"{example[:half]}…{example[-half:]}"


SPLIT = "the chat template renders earlier answers differently once later messages follow"
"""Cause of a chat that becomes several rows."""


@dataclass
class RowReport:
    """Counts of the rows of a data set: read, truncated, dropped."""

    read: int = 0
    """Rows that were read; a pair that becomes two examples counts as two."""
    truncated: int = 0
    """Rows that were truncated to the maximum length."""
    chunked: int = 0
    """Texts that were split into several rows of at most the maximum length."""
    longest: int = 0
    """Tokens of the longest row, used or not."""
    split_chats: int = 0
    """Chats that became several rows."""
    split_rows: int = 0
    """Rows that these chats became."""
    counts: dict[DropReason, int] = field(default_factory=dict)
    examples: dict[DropReason, list[str]] = field(default_factory=dict)
    ignored_keys: dict[str, int] = field(default_factory=dict)
    """Number of messages by key that is not used."""
    missing_columns: dict[str, str] = field(default_factory=dict)
    """Columns that `dataset.columns` names and no row that was read has, by their fields; not kept in the cache."""

    def drop(self, reason: DropReason, example: str) -> None:
        """Count a row that is not used."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES:
            shown.append(shortened(example))

    def split(self, rows: int) -> None:
        """Count the rows that a chat became."""
        if rows > 1:
            self.split_chats += 1
            self.split_rows += rows

    def require_usable(self, handling: UnusableRows) -> None:
        """Raise DatasetInvalidError if a row, or half of the rows or more, contain nothing to learn.

        Args:
            handling: value of `dataset.unusable`.
        """
        if self.unusable and (handling is UnusableRows.ERROR or 2 * self.unusable >= self.read):
            fix = _NOT_RENDERED_FIX if self.counts.get(DropReason.NOT_RENDERED) else ""
            raise DatasetInvalidError(joined(self.unusable_examples(), self.unusable) + fix)

    @property
    def rows(self) -> int:
        """Number of rows that were read, or that chats became."""
        return self.read - self.split_chats + self.split_rows

    @property
    def dropped(self) -> int:
        """Number of rows that are not used."""
        return sum(self.counts.values())

    @property
    def unusable(self) -> int:
        """Number of rows that contain nothing to learn."""
        return sum(self.counts.get(reason, 0) for reason in UNUSABLE)

    def unusable_examples(self) -> list[str]:
        """Return the first rows that contain nothing to learn, in the order of their reasons."""
        return [example for reason in UNUSABLE for example in self.examples.get(reason, [])]

    def add(self, other: RowReport) -> RowReport:
        """Return the combined report of both data sets; this one's examples come first."""
        return RowReport(
            read=self.read + other.read,
            truncated=self.truncated + other.truncated,
            chunked=self.chunked + other.chunked,
            longest=max(self.longest, other.longest),
            split_chats=self.split_chats + other.split_chats,
            split_rows=self.split_rows + other.split_rows,
            counts={
                reason: total
                for reason in DropReason
                if (total := self.counts.get(reason, 0) + other.counts.get(reason, 0))
            },
            examples={
                reason: (self.examples.get(reason, []) + other.examples.get(reason, []))[:EXAMPLES]
                for reason in DropReason
            },
            ignored_keys={
                key: self.ignored_keys.get(key, 0) + other.ignored_keys.get(key, 0)
                for key in {**self.ignored_keys, **other.ignored_keys}
            },
        )

    def ignored(self) -> list[IgnoredKey] | None:
        """Return the value of `status.preflight.ignoredKeys`, the most frequent key first."""
        order = sorted(self.ignored_keys, key=lambda key: (-self.ignored_keys[key], key))
        return [
            IgnoredKey(
                key=key.encode("utf-8", "backslashreplace").decode()[:_KEY_LENGTH], messages=self.ignored_keys[key]
            )
            for key in order[:_SHOWN_KEYS]
        ] or None

    def status(self) -> list[DroppedRows] | None:
        """Return the value of `status.preflight.dropped`, the most frequent reason first."""
        order = sorted(self.counts, key=lambda reason: -self.counts[reason])
        return [
            DroppedRows(reason=reason, rows=self.counts[reason], examples=self.examples.get(reason) or None)
            for reason in order
        ] or None

    def document(self) -> dict[str, Any]:
        """Return the report as JSON, for the cache."""
        return {
            "read": self.read,
            "truncated": self.truncated,
            "chunked": self.chunked,
            "longest": self.longest,
            "splitChats": self.split_chats,
            "splitRows": self.split_rows,
            "counts": {reason.value: count for reason, count in self.counts.items()},
            "examples": {reason.value: shown for reason, shown in self.examples.items()},
            "ignoredKeys": self.ignored_keys,
        }

    @classmethod
    def of(cls, document: dict[str, Any]) -> RowReport:
        """Restore the report from the output of `document`."""
        return cls(
            read=document["read"],
            truncated=document["truncated"],
            chunked=document["chunked"],
            longest=document["longest"],
            split_chats=document["splitChats"],
            split_rows=document["splitRows"],
            counts={DropReason(reason): count for reason, count in document["counts"].items()},
            examples={DropReason(reason): shown for reason, shown in document["examples"].items()},
            ignored_keys=document["ignoredKeys"],
        )


def summary_lines(preflight: Preflight) -> list[str]:
    """Return the counts as lines for people: the totals, then the unused rows by reason."""
    packed = f" in {preflight.packed_sequences} sequences" if preflight.packed_sequences is not None else ""
    truncated = f", {preflight.truncated_rows} truncated" if preflight.truncated_rows else ""
    chunked = f", {preflight.chunked_rows} texts split" if preflight.chunked_rows else ""
    total = (
        f"  {preflight.rows} rows{packed}, {preflight.tokens} tokens, {preflight.target_tokens} of them learned;"
        f" {preflight.validation_rows} held out, {preflight.dropped_rows} dropped{truncated}{chunked}"
    )
    reasons = [
        f"    {rows.rows} {rows.reason}" + (f", the first: {rows.examples[0]}" if rows.examples else "")
        for rows in preflight.dropped or []
    ]
    trained = [
        f"    {overlap.sentence}" + (f"; the first: {overlap.examples[0]}" if overlap.examples else "")
        for overlap in preflight.also_trained or []
    ]
    split = (
        [f"    {preflight.split_chats} chats became {preflight.split_rows} rows: {SPLIT}"]
        if preflight.split_chats
        else []
    )
    if preflight.shared_tokens:
        split.append(f"    {preflight.shared_tokens} tokens that rows of a chat have in common are computed once")
    keys = ", ".join(f"{ignored.key} ({ignored.messages})" for ignored in preflight.ignored_keys or [])
    ignored = [f"    keys of messages that are not used: {keys}"] if keys else []
    skipped = [
        f"    {source.uri}: read {source.split or 'the files without a split'}, not {', '.join(source.skipped_splits)}"
        for source in preflight.sources or []
        if source.skipped_splits
    ]
    return [total, *skipped, *split, *reasons, *ignored, *trained]
