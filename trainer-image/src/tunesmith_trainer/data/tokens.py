"""Tokenised rows on disk: memory use does not grow with their number."""

from __future__ import annotations

import itertools
import mmap
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import pyarrow as pa
from datasets import Dataset

from tunesmith.api.dataset import Overlong
from tunesmith.api.finetunejob_status import DropReason
from tunesmith_trainer.data.encoding import IGNORED, Tokens
from tunesmith_trainer.data.forms import RowForm
from tunesmith_trainer.data.packing import best_fit_decreasing
from tunesmith_trainer.data.prefixes import trees_of
from tunesmith_trainer.data.report import RowReport
from tunesmith_trainer.data.rows import read
from tunesmith_trainer.errors import DatasetInvalidError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    from tunesmith.api import dataset as api
    from tunesmith_trainer.data.encoding import Encoder
    from tunesmith_trainer.data.rows import Row
    from tunesmith_trainer.data.sources import Source

    IntArray = np.ndarray[Any, np.dtype[np.integer[Any]]]

T = TypeVar("T")

_BATCH = 512
"""Rows that are tokenised and written at once."""
_BATCH_CHARACTERS = 4 * 2**20
"""Characters of these rows after which a batch ends."""
_MAX_ROWS_IN_MEMORY = 200
"""Rows whose pages are in memory at once: each may bring in 64 KiB around it."""
_KEY = "key"
"""Column of `Row.key`, which is not used in training."""
_PROGRESS_ROWS = 50_000
"""Rows between two progress lines."""


@dataclass(frozen=True)
class Counted:
    """Counts of the rows: a report, and the number of rows used per source."""

    report: RowReport
    per_source: list[int]

    @property
    def used(self) -> int:
        """Number of rows that are used."""
        return sum(self.per_source)

    def require(self, what: str, limit: int, minimum: int = 1) -> None:
        """Raise DatasetInvalidError if too few rows are left."""
        if self.used >= minimum:
            return
        report = self.report
        overlong = report.counts.get(DropReason.OVERLONG, 0)
        reason = f"there are only {self.used}"
        if overlong and report.longest <= limit:
            reason = (
                f"{overlong} of {report.rows} rows are too long, the first is {report.examples[DropReason.OVERLONG][0]}"
            )
        elif overlong:
            reason = (
                f"{overlong} of {report.rows} rows have more than maxLength {limit} tokens (the longest has "
                f"{report.longest}): raise dataset.maxLength, or set dataset.overlong to Truncate or, for texts, Chunk"
            )
        elif report.dropped:
            dropped = report.status() or []
            shown = ", ".join(f"{rows.rows} {rows.reason} ({(rows.examples or [''])[0]})" for rows in dropped)
            reason = f"only {self.used} of {report.rows} rows can be used; dropped: {shown}"
        raise DatasetInvalidError(f"the {what} need at least {minimum} rows: {reason}")


def tokenise(
    sources: Sequence[Source],
    dataset: api.Dataset,
    forms: Collection[RowForm],
    encoder: Encoder,
    path: Path,
    write_line: Callable[[str], None],
) -> Counted:
    """Write the tokens of the usable rows to an Arrow file.

    Args:
        sources: downloaded files.
        dataset: settings for reading the files.
        forms: row forms that the objective can learn from.
        encoder: turns rows into tokens.
        path: path of the Arrow file.
        write_line: reports progress to a person.

    Raises:
        DatasetInvalidError: a row is unusable, or too long if dataset.overlong is Error.
        InvalidSpecError: the chat template cannot be used.
    """
    report = RowReport()
    per_source, done = [0] * len(sources), 0
    unpaired = RowForm.UNPAIRED_PREFERENCE in forms
    paired = RowForm.PREFERENCE in forms and not unpaired
    with _Writer(path, paired=paired, unpaired=unpaired, keyed=True) as writer:
        for batch in row_batches(read(sources, dataset, report, forms=forms)):
            kept: list[Tokens] = []
            keys: list[int] = []
            for row, encoded in zip(batch, encoder.encode_all(batch), strict=True):
                if encoded.problem:
                    report.drop(DropReason.NOT_RENDERED, encoded.problem)
                    continue
                report.split(len(encoded.rows))
                for whole in encoded.rows:
                    fitted = _fitted(whole, row.where, dataset, report)
                    kept += fitted
                    keys += [row.key] * len(fitted)
                    per_source[row.source] += len(fitted)
            writer.write(kept, keys)
            before, done = done, done + len(batch)
            if done // _PROGRESS_ROWS > before // _PROGRESS_ROWS:
                write_line(f"  {done} rows tokenised")
    report.require_usable(dataset.unusable)
    overlong = report.counts.get(DropReason.OVERLONG, 0)
    if overlong and dataset.overlong is Overlong.ERROR:
        raise DatasetInvalidError(
            f"{overlong} of {report.rows} rows have more than maxLength {dataset.max_length} tokens, the first is "
            f"{report.examples[DropReason.OVERLONG][0]}: raise dataset.maxLength, or set dataset.overlong to Drop or "
            "Truncate"
        )
    return Counted(report, per_source)


def _fitted(tokens: Tokens, where: str, dataset: api.Dataset, report: RowReport) -> list[Tokens]:
    """Return the row within its maximum length, or the parts of a text; count it and return none if it is not used."""
    size, limit = tokens.longest, dataset.max_length
    report.longest = max(report.longest, size)
    parts = [tokens]
    if size > limit:
        if dataset.overlong is Overlong.CHUNK:
            parts = _chunks(tokens, limit)
        elif dataset.overlong is Overlong.TRUNCATE:
            parts = [tokens.cut(limit)]
        else:
            report.drop(DropReason.OVERLONG, f"{where}: {size} tokens")
            return []
    parts = [part for part in parts if not part.without_target]
    if not parts:
        explanation = f", its question alone fills maxLength {limit}" if size > limit else ""
        report.drop(DropReason.NO_TARGET, f"{where}: none of its tokens is learned{explanation}")
        return []
    report.truncated += size > limit and dataset.overlong is Overlong.TRUNCATE
    report.chunked += size > limit and dataset.overlong is Overlong.CHUNK
    return parts


def _chunks(tokens: Tokens, limit: int) -> list[Tokens]:
    """Return a text's tokens in as few parts as possible, of about equal length: none is too short to be learned."""
    size = len(tokens.input_ids)
    count = -(-size // limit)
    ends = [size * number // count for number in range(count + 1)]
    return [
        # Nothing precedes the first token of a part, so nothing can predict it.
        Tokens(tokens.input_ids[begin:end], [IGNORED, *tokens.labels[begin + 1 : end]])
        for begin, end in itertools.pairwise(ends)
    ]


@dataclass(frozen=True)
class Sizes:
    """Sizes of tokenised rows.

    Args:
        lengths: tokens per row.
        targets: target tokens per row.
        longest: tokens of the longest sequence; a pair of answers is two.
        highest: highest token id; -1 without rows.
        keys: `Row.key` per row.
    """

    lengths: IntArray
    targets: IntArray
    longest: int
    highest: int
    keys: IntArray


def measure(path: Path) -> Sizes:
    """Return the sizes of the rows of an Arrow file."""
    lengths, targets, longest, highest = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0, -1
    keys = [np.zeros(0, np.uint64)]
    for batch in _Reader(path).batches():
        labels = batch.column("labels")
        offsets = labels.offsets.to_numpy()
        learned = labels.values.to_numpy() != IGNORED
        lengths.append(np.diff(offsets).astype(np.int64))
        targets.append(np.add.reduceat(learned, offsets[:-1], dtype=np.int64))
        paired = "seq_lengths" in batch.schema.names
        sequences = batch.column("seq_lengths").values.to_numpy() if paired else lengths[-1]
        longest = max(longest, int(sequences.max()))
        highest = max(highest, int(batch.column("input_ids").values.to_numpy().max()))
        keys.append(batch.column(_KEY).to_numpy().copy())
    return Sizes(np.concatenate(lengths), np.concatenate(targets), longest, highest, np.concatenate(keys))


@dataclass(frozen=True)
class Packed:
    """Rows packed into sequences.

    Args:
        lengths: tokens of each sequence.
        shared: tokens of the rows that are not in the sequences again: those of prefixes that rows of a chat share.
    """

    lengths: IntArray
    shared: int


def pack(rows: Path, indices: IntArray, sizes: Sizes, capacity: int, path: Path, *, share_prefixes: bool) -> Packed:
    """Pack the rows at `indices` into sequences of at most `capacity` tokens.

    `seq_lengths` has the tokens of each row. If rows share prefixes, `prefix_lengths` has the tokens that precede each
    of them in the last row without such a prefix.

    Args:
        rows: Arrow file of tokenised rows.
        indices: indices of the rows to pack; an index may appear more than once.
        sizes: sizes of all rows.
        capacity: tokens of a sequence.
        path: path of the Arrow file to write.
        share_prefixes: True to write prefixes that rows of a chat share once.
    """
    lengths, reader = sizes.lengths[indices], _Reader(rows)
    keys = sizes.keys[indices] if share_prefixes else np.arange(len(indices), dtype=np.uint64)
    trees = trees_of(keys, capacity, lambda chats: reader.rows(indices[chat].tolist() for chat in chats))
    own = lengths[trees.rows] - trees.starts
    groups = best_fit_decreasing(np.add.reduceat(own, trees.bounds[:-1]), capacity)
    read = reader.rows(indices[trees.rows[trees.places(group)]].tolist() for group in groups)
    shared = int(trees.starts.sum())
    packed: list[int] = []
    with _Writer(path, paired=True, shared=shared > 0) as writer:
        for batch in _batched(iter(groups), _BATCH):
            places = [trees.places(group) for group in batch]
            ids, labels = [], []
            for part, content in zip(places, itertools.islice(read, len(batch)), strict=True):
                rest = [slice(start, None) for start in trees.starts[part]]
                ids.append(np.concatenate([row[end] for end, (row, _) in zip(rest, content, strict=True)]))
                labels.append(
                    np.concatenate([_first_ignored(row[end]) for end, (_, row) in zip(rest, content, strict=True)])
                )
            columns = [_lists(ids), _lists(labels), _lists([own[part] for part in places])]
            writer.write_columns([*columns, *([_lists([trees.starts[part] for part in places])] if shared else [])])
            packed += map(len, ids)
    return Packed(np.asarray(packed, np.int64), shared)


def _first_ignored(labels: IntArray) -> IntArray:
    """Ignore the first label of a row: the token follows another row, which does not predict it."""
    copy = labels.copy()
    copy[0] = IGNORED
    return copy


def open_rows(path: Path) -> Dataset:
    """Open the training columns of an Arrow file; rows are read from disk when needed."""
    rows = Dataset.from_file(str(path))
    return rows.remove_columns(_KEY) if _KEY in rows.column_names else rows


class _Reader:
    """Reads an Arrow file without keeping what was read in this process's memory."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the batches in order."""
        for batch in pa.ipc.open_stream(pa.py_buffer(self._map)):
            yield batch
            self.forget()

    def rows(self, groups: Iterable[Sequence[int]]) -> Iterator[list[tuple[IntArray, IntArray]]]:
        """Yield the tokens and labels of the rows in each group of indices; copy them before the next group."""
        columns, begins, read = [], [0], 0
        for batch in self.batches():
            names = ("input_ids", "labels")
            values = [batch.column(name).values.to_numpy() for name in names]
            columns.append((batch.column(names[0]).offsets.to_numpy().copy(), *values))
            begins.append(begins[-1] + batch.num_rows)
        for group in groups:
            parts = []
            for index in group:
                number = bisect_right(begins, index) - 1
                offsets, ids, labels = columns[number]
                begin, end = offsets[index - begins[number] : index - begins[number] + 2]
                parts.append((ids[begin:end], labels[begin:end]))
            yield parts
            read += len(group)
            if read > _MAX_ROWS_IN_MEMORY:
                self.forget()
                read = 0

    def forget(self) -> None:
        """Release the pages; they are read again when needed."""
        self._map.madvise(mmap.MADV_DONTNEED)


class _Writer:
    """Writes an Arrow file in batches.

    Args:
        path: path of the file.
        paired: True if the rows have `seq_lengths`.
        shared: True if the rows have `prefix_lengths`.
        unpaired: True if the rows have `desirable`.
        keyed: True if the rows have `key`.
    """

    def __init__(
        self,
        path: Path,
        *,
        paired: bool = False,
        shared: bool = False,
        unpaired: bool = False,
        keyed: bool = False,
    ) -> None:
        names = ["input_ids", "labels", *(["seq_lengths"] if paired else []), *(["prefix_lengths"] if shared else [])]
        fields = [pa.field(name, pa.list_(pa.int32())) for name in names]
        fields += [pa.field("desirable", pa.bool_())] if unpaired else []
        fields += [pa.field(_KEY, pa.uint64())] if keyed else []
        self._schema = pa.schema(fields)
        self._writer = pa.ipc.new_stream(str(path), self._schema)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def write(self, rows: Sequence[Tokens], keys: Sequence[int]) -> None:
        """Write rows, each with its key."""
        if rows:
            columns: dict[str, Callable[[], pa.Array]] = {
                "input_ids": lambda: _lists([row.input_ids for row in rows]),
                "labels": lambda: _lists([row.labels for row in rows]),
                "seq_lengths": lambda: _lists([row.seq_lengths or [] for row in rows]),
                "desirable": lambda: pa.array([row.desirable for row in rows], pa.bool_()),
                _KEY: lambda: pa.array(keys, pa.uint64()),
            }
            self.write_columns([columns[name]() for name in self._schema.names])

    def write_columns(self, columns: Sequence[pa.Array]) -> None:
        """Write rows, one array per column."""
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))


def _lists(rows: Sequence[Sequence[int] | IntArray]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    values = np.concatenate([np.asarray(row, dtype=np.int32) for row in rows])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def row_batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Yield the rows in batches whose tokens fit into memory."""
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += row.size
        if len(batch) == _BATCH or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _batched(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(itertools.islice(items, size)):
        yield batch
