"""Iterate over the records of data files, in memory that does not grow with the file."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tunesmith_trainer.errors import DatasetInvalidError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from pathlib import Path

_MAX_RECORD_BYTES = 64 * 2**20
"""Size limit of a record, in bytes."""
_MAX_BLANK_BYTES = 2**20
"""Size limit of what is blank between two records: a gzip file of a few kilobytes may contain gigabytes of it."""
_CHUNK = 2**20
_BATCH = 8
"""Rows of a columnar file that are decoded at once: a few bytes of it may stand for a value of many megabytes."""
_MAX_VALUES = 8 * 2**20
"""Highest number of values in a row: `{}` takes 2 bytes in a file and 64 in memory, a null in a columnar file none."""
_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks of other encodings; that of UTF-32 begins with that of UTF-16."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_ANNEX_POINTER = b"/annex/objects/"
_DELIMITERS = ",;\t|"
_SEPARATOR_LINE = re.compile(r"sep=(.)\s*")
"""First line that names the delimiter, for Excel."""
_TOO_MANY_VALUES = "has more than 8 million values: divide it into several rows"
_NARROW = (pa.null(), pa.bool_(), pa.binary(0))
"""Types whose values take less than a byte."""
_BLANK = b" \t\r\n"
_FIXES_OF_SEVERAL_LINES = {
    b"[": "; a list of rows needs a file whose name ends with .json",
    b"{": "; each row must be on one line, or in a list in a .json file",
}
csv.field_size_limit(_MAX_RECORD_BYTES)


@dataclass(frozen=True)
class DataFile:
    """A local file and its name in messages, whose extension indicates its format."""

    name: str
    path: Path


@dataclass(frozen=True)
class Record:
    """Content of one location in a file: a decoded value, or the reason why it cannot be decoded."""

    where: str
    value: Any = None
    problem: str | None = None
    columnar: bool = False
    """True if the value is from a columnar file, whose structs have a null for each key that another row has."""


def format_of(name: str) -> str | None:
    """Return the format that a file name indicates, such as "parquet"; None if it indicates none."""
    lower = name.lower()
    compressed = lower.endswith(".gz")
    extension = lower.removesuffix(".gz").rpartition(".")[2] if "." in lower else ""
    known = extension in _TEXT_READERS or (extension in _COLUMNAR and not compressed)
    return extension if known else None


def records(file: DataFile, wanted: Collection[str] | None = None, present: Collection[str] = ()) -> Iterator[Record]:
    """Yield the records of a file.

    Args:
        file: file to read.
        wanted: names of columns; other columns of columnar files are not read, unless the file has none of these. None:
            all.
        present: names of columns of columnar files that are not read either: the value is True if there is one.

    Raises:
        DatasetInvalidError: the name indicates no format, or the file is damaged so that the rows after the damage
            cannot be read.
    """
    data_format = format_of(file.name)
    if data_format is None:
        raise DatasetInvalidError(
            f"the name of {file.name} does not indicate its format: use one of the extensions {', '.join(EXTENSIONS)}"
        )
    _check_content(file)
    try:
        if data_format in _COLUMNAR:
            yield from _COLUMNAR[data_format](file, wanted, present)
        else:
            yield from _TEXT_READERS[data_format](file, wanted)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DatasetInvalidError(f"{file.name} is not a complete gzip file: {error}") from None
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # of the disk; pyarrow raises OSError for damaged files too
        text = "".join(filter(str.isprintable, " ".join(str(error).split())))[:200]
        raise DatasetInvalidError(f"{file.name} cannot be read as {data_format}: {text}") from None


def has_column(file: DataFile, names: Collection[str]) -> bool:
    """Return True if a record of a file has one of these columns.

    Raises:
        DatasetInvalidError: as for `records`.
    """
    values = (record.value for record in records(file, names) if isinstance(record.value, dict))
    if format_of(file.name) not in _WITH_OWN_KEYS:
        return any(not value.keys().isdisjoint(names) for value in itertools.islice(values, 1))
    keys = [json.dumps(name).encode() for name in names]
    return _contains(file, keys) and any(not value.keys().isdisjoint(names) for value in values)


def _contains(file: DataFile, texts: Sequence[bytes]) -> bool:
    """Return True if a file contains one of some texts."""
    longest = max(map(len, texts))
    before = b""
    with _open(file) as content:
        while part := content.read(_CHUNK):
            window = before + part
            if any(text in window for text in texts):
                return True
            before = window[-longest:]
    return False


def _check_content(file: DataFile) -> None:
    """Raise DatasetInvalidError if the file is only a pointer to its content."""
    with file.path.open("rb") as content:
        start = content.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise DatasetInvalidError(
            f"{file.name} is a pointer of Git LFS, not the data: run `git lfs pull` in the repository that it was"
            " copied from, and copy the file again"
        )
    if start.startswith(_ANNEX_POINTER):
        raise DatasetInvalidError(
            f"{file.name} is a pointer of git-annex, not the data: run `git annex get` in the repository that it was"
            " copied from, and copy the file again"
        )


def _open(file: DataFile) -> IO[bytes]:
    """Open a text file; the content is UTF-8 if it is in another encoding with a byte order mark."""
    compressed = file.name.lower().endswith(".gz")
    raw = io.BufferedReader(gzip.open(file.path, "rb") if compressed else file.path.open("rb", buffering=0))  # noqa: SIM115 - the caller closes it
    start = raw.peek(4)[:4]
    encoding = next((name for mark, name in _OTHER_BOMS.items() if start.startswith(mark)), None)
    if encoding is not None:
        return io.BufferedReader(_Transcoded(raw, encoding, file.name))
    if b"\0" in start[:2]:
        raw.close()
        raise DatasetInvalidError(f"{file.name} is not UTF-8 but seems to be UTF-16: save it as UTF-8")
    return raw


class _Transcoded(io.RawIOBase):
    """A text file of another encoding, as UTF-8."""

    def __init__(self, raw: IO[bytes], encoding: str, name: str) -> None:
        self._raw = raw
        self._encoding = encoding
        self._name = name
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - a writable buffer
        while not self._ready:
            data = self._raw.read(_CHUNK)
            try:
                self._ready = self._decoder.decode(data, final=not data).encode()
            except UnicodeDecodeError:
                raise DatasetInvalidError(
                    f"{self._name} is not valid {self._encoding.upper()}: save it as UTF-8"
                ) from None
            if not data:
                break
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


def _jsonl(file: DataFile, _: Collection[str] | None = None) -> Iterator[Record]:
    """Yield one value per line; blank lines are skipped."""
    with _open(file) as lines:
        for number, line in _filled(lines, file.name):
            if len(line) > _MAX_RECORD_BYTES:
                raise DatasetInvalidError(
                    f"{file.name} line {number} is longer than 64 MiB: put each row on its own line"
                )
            yield _decoded(line.strip(_BLANK), f"{file.name} line {number}")


def _filled(content: IO[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of the lines that are not blank; a line that is too long is cut."""
    blank = 0
    for number in itertools.count(1):
        line = content.readline(_MAX_RECORD_BYTES + 1)
        if not line:
            return
        text = line.removeprefix(_BOM) if number == 1 else line
        if not text.strip(_BLANK):
            blank += len(line)
            _check_blank(blank, f"{name} line {number}")
        else:
            blank = 0
            yield number, text


def _check_blank(size: int, where: str) -> None:
    if size > _MAX_BLANK_BYTES:
        raise DatasetInvalidError(f"{where} follows more than 1 MiB of blank text: remove it")


def _has_too_many_values(text: bytes) -> bool:
    """Return True if JSON may have more values than a row may have."""
    return len(text) > _MAX_VALUES and sum(map(text.count, (b",", b"[", b"{"))) > _MAX_VALUES


def _decoded(content: bytes, where: str) -> Record:
    if _has_too_many_values(content):
        return Record(where, problem=_TOO_MANY_VALUES)
    try:
        return Record(where, json.loads(content.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Record(where, problem=f"is not UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        fix = _FIXES_OF_SEVERAL_LINES.get(content, "")
        return Record(where, problem=f"is not JSON: {error.msg} at column {error.colno}{fix}")
    except (RecursionError, ValueError):  # ValueError: a number with thousands of digits
        return Record(where, problem="is JSON that cannot be read: it is nested too deeply, or a number is too long")


def _json(file: DataFile, wanted: Collection[str] | None) -> Iterator[Record]:
    """Yield the values of a list, which may be below a key of one object, or one value per line."""
    with _open(file) as content:
        start = content.read(_CHUNK).removeprefix(_BOM).lstrip(_BLANK)
    if start.startswith(b"["):
        return _json_list(file)
    if start.startswith(b"{") and _is_one_object(file):
        return _json_object(file, wanted or ())
    return _jsonl(file)


def _is_one_object(file: DataFile) -> bool:
    """Return False if the first line is a complete JSON value and other lines follow."""
    with _open(file) as content:
        lines = _filled(content, file.name)
        _, first = next(lines, (0, b""))
        if len(first) > _MAX_RECORD_BYTES or _has_too_many_values(first) or next(lines, None) is None:
            return True
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return True
    return False


def _json_list(file: DataFile) -> Iterator[Record]:
    """Yield the values of a list, decoded one at a time from a window of the file."""
    with _open(file) as raw:
        text = _Window(raw, file.name)
        yield from _elements(text, file.name)
        if text.next():
            raise DatasetInvalidError(f"{file.name}: there is text after the end of the list: remove it")


def _elements(text: _Window, name: str) -> Iterator[Record]:
    """Yield the values of the list that begins at the window's position."""
    decoder = json.JSONDecoder()
    text.expect("[", "a list")
    for number in itertools.count(1):
        if text.next() == "]" and number == 1:
            text.skip()
            return
        where = f"{name} row {number}"
        yield Record(where, text.value(decoder, where))
        follows = text.next()
        if follows == "]":
            text.skip()
            return
        text.expect(",", f"a comma or the list's end after row {number}")


def _json_object(file: DataFile, columns: Collection[str]) -> Iterator[Record]:
    """Yield the rows of the list of objects below a key of one object, or the object if it is itself a row."""
    found = None
    with _open(file) as raw:
        text = _Window(raw, file.name)
        text.expect("{", "an object")
        for key in _keys_of_lists(text, file.name, columns):
            if found is not None:
                raise DatasetInvalidError(
                    f"{file.name} has rows below several keys, '{found}' and '{key}': save each list as a file"
                )
            found = key
            yield from _elements(text, file.name)
        if found is not None:
            text.expect("}", "the end of the object")
            if text.next():
                raise DatasetInvalidError(f"{file.name}: there is text after the end of the object: remove it")
    if found is None:
        yield from _jsonl(file)


def _keys_of_lists(text: _Window, name: str, columns: Collection[str]) -> Iterator[str]:
    """Yield the keys of the lists of objects in an object, with the window at the list, which the caller reads.

    Yield none if the object has the columns of a row.
    """
    decoder = json.JSONDecoder()
    found = False
    while text.next() == '"':
        try:
            key = str(text.value(decoder, name))
            text.expect(":", f"a colon after the key '{key}'")
            if key in columns and not found:
                return
            rows = text.next() == "[" and text.begins_objects()
            if not rows:
                text.value(decoder, f"{name}: the value of '{key}'")
        except DatasetInvalidError:
            if found:
                raise
            return  # read as one row per line, which reports the line
        if rows:
            found = True
            yield key
        if text.next() != ",":
            return
        text.skip()


class _Window:
    """Sliding window over a file with JSON text."""

    def __init__(self, raw: IO[bytes], name: str) -> None:
        self._raw = raw
        self._name = name
        self._text = ""
        self._position = 0
        self._rest = b""
        self._at_end = False
        self._started = False
        self._dense = False

    def next(self) -> str:
        """Return the next character that is not blank; "" at the end of the file."""
        blank = 0
        while True:
            before = self._position
            while self._position < len(self._text) and self._text[self._position] in " \t\r\n":
                self._position += 1
            blank += self._position - before
            _check_blank(blank, f"{self._name}: a row")
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._more():
                return ""

    def begins_objects(self) -> bool:
        """Return True if a list of objects begins at the position."""
        self.skip()
        first = self.next()
        self._text, self._position = "[" + self._text[self._position :], 0
        return first == "{"

    def skip(self) -> None:
        self._position += 1

    def expect(self, character: str, what: str) -> None:
        found = self.next()
        if found != character:
            raise DatasetInvalidError(
                f"{self._name} is not JSON: {what} is expected, not {repr(found) if found else 'the end of the file'}"
            )
        self.skip()

    def value(self, decoder: json.JSONDecoder, where: str) -> object:
        self.next()
        while True:
            if self._dense:
                raise DatasetInvalidError(f"{where} {_TOO_MANY_VALUES}")
            try:
                value, end = decoder.raw_decode(self._text, self._position)
            except (ValueError, RecursionError) as error:
                # An apparent error may only be a value that is cut off.
                if len(self._text) - self._position < _MAX_RECORD_BYTES and self._more():
                    continue
                problem = (
                    error.msg
                    if isinstance(error, json.JSONDecodeError)
                    else "it is nested too deeply, or a number is too long"
                )
                raise DatasetInvalidError(f"{where} is not JSON: {problem}; the rows after it cannot be read") from None
            if end == len(self._text) and self._more():
                continue  # more digits may follow
            self._position = end
            return value

    def _more(self) -> bool:
        """Read more of the file; return False at its end."""
        if self._at_end:
            return False
        # Read increasing amounts, so that a long row is not decoded from its start too often.
        data = self._raw.read(max(_CHUNK, len(self._text) - self._position))
        self._at_end = not data
        if not self._started:
            data, self._started = data.removeprefix(_BOM), True
        data = self._rest + data
        try:
            text, self._rest = data.decode("utf-8"), b""
        except UnicodeDecodeError as error:
            cut = len(data) - error.start < 4 and not self._at_end  # noqa: PLR2004 - bytes of a character, cut off
            if not cut:
                raise DatasetInvalidError(f"{self._name} is not UTF-8: save it as UTF-8") from None
            text, self._rest = data[: error.start].decode("utf-8"), data[error.start :]
        self._text = self._text[self._position :] + text
        self._position = 0
        # Longer than the usual chunk only if a row is.
        self._dense = len(self._text) > _MAX_VALUES and sum(map(self._text.count, ",[{")) > _MAX_VALUES
        return not self._at_end or bool(text)


def _delimiter(line: str, usual: str) -> str:
    """Return the delimiter of a file: the usual one, or another one that alone separates the first line's names."""
    for delimiter in f"{usual}{_DELIMITERS}":
        names = next(csv.reader([line], delimiter=delimiter), [])
        if len(names) > 1:
            return delimiter
    return usual


def _separated(file: DataFile, usual: str) -> Iterator[Record]:
    """Yield the rows that follow a header line of column names."""
    with _open(file) as raw, io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="") as text:
        lines = _Lines(text, file.name)
        first = next(lines, "")
        given = _SEPARATOR_LINE.fullmatch(first)
        delimiter = str(given[1]) if given else _delimiter(first, usual)
        reader = csv.reader(lines if given else itertools.chain([first], lines), delimiter=delimiter, strict=True)
        names: list[str] = []
        before = 1 if given else 0
        line = 1 + before
        blank = 0
        try:
            for cells in reader:
                blank, lines.size = 0 if any(cells) else blank + lines.size, 0
                _check_blank(blank, f"{file.name} line {reader.line_num + before}")
                where, line = f"{file.name} line {line}", reader.line_num + 1 + before
                if not names:
                    names = [name.strip() for name in cells]
                    _check_header(names, file.name)
                elif any(cells):
                    yield _row_of(names, cells, where)
        except csv.Error as error:
            raise DatasetInvalidError(
                f"{file.name} line {line} is not {file.name.rpartition('.')[2].upper()}: {error}; the rows after it "
                "cannot be read"
            ) from None


class _Lines:
    """Lines of a text, within the size limit of the record that they belong to.

    Args:
        text: text file.
        name: name of the file.

    Attributes:
        size: characters of the record that were read; set to 0 at the start of the next one.
    """

    def __init__(self, text: IO[str], name: str) -> None:
        self.size = 0
        self._text = text
        self._name = name
        self._number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(_MAX_RECORD_BYTES + 1)
        self.size += len(line)
        self._number += 1
        if self.size > _MAX_RECORD_BYTES:
            raise DatasetInvalidError(
                f"{self._name} line {self._number} ends a row that is longer than 64 MiB: put each row on its own line,"
                " and close the quotes of each cell"
            )
        if not line:
            raise StopIteration
        return line


def _check_header(names: list[str], file: str) -> None:
    doubled = sorted(name for name, times in Counter(names).items() if times > 1)
    named = names[1:] or names  # the first column may be an index without a name
    if doubled or "" in named:
        problem = "a column has no name" if "" in named else f"the column {doubled[0]!r} appears twice"
        raise DatasetInvalidError(f"{file}: the first line must contain the names of the columns: {problem}")


def _row_of(names: list[str], cells: list[str], where: str) -> Record:
    if len(cells) != len(names):
        return Record(where, problem=f"has {len(cells)} cells, but the first line names {len(names)} columns")
    for cell in cells:
        try:
            cell.encode("utf-8")
        except UnicodeEncodeError:
            return Record(where, problem="is not UTF-8")
    return Record(where, dict(zip(names, cells, strict=True)))


def _parquet(file: DataFile, wanted: Collection[str] | None, present: Collection[str]) -> Iterator[Record]:
    with pq.ParquetFile(file.path, memory_map=True) as table:
        columns = _chosen(table.schema_arrow.names, wanted, present)
        paths = [table.schema.column(number).path for number in range(len(table.schema))]
        columns = [_smallest(name, paths) if name in present else name for name in columns]
        # Without threads, no column is decoded ahead of the rows that are requested.
        batches = table.iter_batches(batch_size=_BATCH, columns=columns, use_threads=False)
        yield from _rows(file, batches, present)


def _smallest(name: str, paths: Sequence[str]) -> str:
    """Return a part of a column that shows where it is null: of images not their bytes."""
    parts = [path for path in paths if path.startswith(f"{name}.")]
    return next((path for path in parts if not path.endswith(".bytes")), name)


def _chosen(names: list[str], wanted: Collection[str] | None, present: Collection[str]) -> list[str]:
    chosen = [name for name in names if wanted is None or name in wanted]
    return chosen if any(name not in present for name in chosen) else names


def _arrow(file: DataFile, wanted: Collection[str] | None, present: Collection[str]) -> Iterator[Record]:
    """Yield the rows of Arrow's stream format, as written by `datasets`, or of its file format."""
    with pa.memory_map(str(file.path)) as source:
        try:
            stream = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            source.seek(0)
            table = pa.ipc.open_file(source)
            batches: Iterator[pa.RecordBatch] = (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            batches = iter(stream)
        yield from _rows(
            file, (batch.select(_chosen(batch.schema.names, wanted, present)) for batch in batches), present
        )


def _rows(file: DataFile, batches: Iterator[pa.RecordBatch], present: Collection[str]) -> Iterator[Record]:
    number = 0
    for read in batches:
        batch = read
        for name in batch.schema.names:
            if name in present:
                batch = batch.set_column(batch.schema.get_field_index(name), name, _presence(batch.column(name)))
        for start in range(0, batch.num_rows, _BATCH):
            for value in _values(batch.slice(start, _BATCH)):
                number += 1
                where = f"{file.name} row {number}"
                yield (Record(where, problem=value) if isinstance(value, str) else Record(where, value, columnar=True))


def _presence(column: pa.Array) -> pa.Array:
    """Return True where a column has a value: a list or a text is not one if it is empty."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pc.fill_null(pc.greater(pc.list_value_length(column), 0), False)  # noqa: FBT003 - its argument's place
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pc.fill_null(pc.greater(pc.binary_length(column), 0), False)  # noqa: FBT003
    return column.is_valid()


def _values(rows: pa.RecordBatch) -> Iterator[dict[str, Any] | str]:
    """Yield the values of rows; of a row that cannot be read, the reason."""
    if rows.nbytes <= _MAX_RECORD_BYTES and _count(rows) <= _MAX_VALUES:
        try:
            yield from rows.to_pylist(maps_as_pydicts="lossy")
        except UnicodeDecodeError:
            pass
        else:
            return
    for number in range(rows.num_rows):
        row = rows.slice(number, 1)
        if row.nbytes > _MAX_RECORD_BYTES or _count(row) > _MAX_VALUES:
            yield f"is longer than 64 MiB, or {_TOO_MANY_VALUES}"
            continue
        try:
            yield row.to_pylist(maps_as_pydicts="lossy")[0]
        except UnicodeDecodeError:
            yield "is not UTF-8"


def _count(rows: pa.RecordBatch) -> int:
    """Return the number of values in the lists of rows; 0 without values that take less than a byte."""
    narrow = [column for column in rows.columns if _has_narrow_values(column.type)]
    return sum(map(_values_in_lists, narrow))


def _has_narrow_values(kind: pa.DataType) -> bool:
    if not kind.num_fields:
        return kind in _NARROW or pa.types.is_struct(kind)
    return any(_has_narrow_values(kind.field(number).type) for number in range(kind.num_fields))


def _values_in_lists(column: pa.Array) -> int:
    if pa.types.is_struct(column.type):
        return sum(map(_values_in_lists, column.flatten()))
    if pa.types.is_map(column.type):
        return _values_in_lists(column.items)
    if not isinstance(column, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        return 0
    values = column.flatten()
    return len(values) if len(values) > _MAX_VALUES else len(values) + _values_in_lists(values)


_TEXT_READERS: dict[str, Callable[[DataFile, Collection[str] | None], Iterator[Record]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": lambda file, _: _separated(file, ","),
    "tsv": lambda file, _: _separated(file, "\t"),
}
_WITH_OWN_KEYS = {"jsonl", "json"}
"""Formats in which a record may have other columns than the first."""
_COLUMNAR: dict[str, Callable[[DataFile, Collection[str] | None, Collection[str]], Iterator[Record]]] = {
    "parquet": _parquet,
    "arrow": _arrow,
}
EXTENSIONS = (*(f".{name}" for name in (*_TEXT_READERS, *_COLUMNAR)), *(f".{name}.gz" for name in _TEXT_READERS))
