"""Read rows: determine their form, check each row against it, and count the rows that are not used."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tunesmith.api.dataset import Columns, DataFormat, DuplicateRows, Overlong, UnusableRows
from tunesmith.api.finetunejob_status import DropReason
from tunesmith_trainer.data.formats import has_column, records
from tunesmith_trainer.data.forms import (
    CHECKS,
    FORMS,
    FUNCTIONS,
    OPTIONAL,
    PROMPT_FORMS,
    REQUIRED,
    SFT_FORMS,
    SFT_FORMS_IN_ORDER,
    RowForm,
    after,
    as_turns,
)
from tunesmith_trainer.data.messages import (
    MAX_ROW_CHARACTERS,
    MEDIA_COLUMNS,
    Origin,
    RowError,
    check_media,
    history_of,
    kind,
    optional_text_of,
    require_no_transcript,
)
from tunesmith_trainer.data.report import joined
from tunesmith_trainer.errors import DatasetInvalidError, InvalidSpecError
from tunesmith_trainer.process.activity import limited

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from tunesmith.api.dataset import Dataset
    from tunesmith_trainer.data.formats import DataFile, Record
    from tunesmith_trainer.data.report import RowReport
    from tunesmith_trainer.data.sources import Source

_SHOWN_PROBLEMS = 3
_OTHER_NAMES = {
    "messages": ("conversations", "conversation", "dialog", "dialogue", "chat"),
    "prompt": ("question", "query", "input", "context"),
    "completion": ("answer", "answers", "response", "output", "target"),
    "instruction": ("task", "question"),
    "input": ("context",),
    "output": ("response", "answer", "answers", "completion"),
    "text": ("content", "document"),
    "system": ("system_prompt", "system_message"),
    "tools": ("functions", "tool_definitions"),
    "history": ("past", "turns"),
}
"""Common names of columns; used for suggestions only."""
_SHOWN_COLUMNS = 8
_SURROGATE = re.compile(r"\\ud[89a-f]")


@dataclass(frozen=True)
class Row:
    """One checked row.

    Args:
        form: form of its content.
        value: `messages` and, where there are some, `tools` (Messages, Instruction); `prompt` and `completion`; `text`;
            `prompt`, `chosen` and `rejected`; or `prompt`, `completion` and `label`. Prompts and answers are texts or
            lists of messages.
        where: file and line of the row.
        source: index of its source.
        key: 64 bits of a digest of its content: the same for the same row, whatever the file and its column names.
            The two examples made from a pair have the pair's key.
        size: characters of its content as JSON in ASCII.
    """

    form: RowForm
    value: dict[str, Any]
    where: str
    source: int = 0
    key: int = 0
    size: int = 0


def read(
    sources: Iterable[Source],
    dataset: Dataset,
    report: RowReport,
    *,
    forms: Collection[RowForm] = SFT_FORMS,
) -> Iterator[Row]:
    """Yield the usable rows in order; the others are counted in `report`.

    Args:
        sources: downloaded files.
        dataset: settings for reading them.
        report: counts the rows that are not used.
        forms: row forms that the objective can learn from. If they include single answers, a pair becomes two rows: the
            chosen answer, which is a good one, and the rejected one.

    Raises:
        DatasetInvalidError: a source has no rows, a row does not have the form of the others (raised at the end, with
            file, line and fix), or too few rows are usable.
        InvalidSpecError: `dataset.columns` names a column that these rows do not have.
    """
    reader = _Reader(dataset, report, forms)
    for number, source in enumerate(sources):
        before, reader.files = report.read, source.files
        for file in source.files:
            with limited(file.name, math.inf):
                for record in records(file, reader.wanted, MEDIA_COLUMNS):
                    row = reader.row(record, number)
                    if row is not None:
                        yield from reader.examples(row)
        if report.read == before:
            name = source.files[0].name if len(source.files) == 1 else source.uri
            raise DatasetInvalidError(f"{name} is empty: a data set needs at least one row")
    reader.finish()


def require_columns(missing: Mapping[str, str], sources: Iterable[Source]) -> None:
    """Raise InvalidSpecError if `dataset.columns` names a column that no row has.

    Args:
        missing: names of these columns, by their fields.
        sources: downloaded files.
    """
    for name, column in missing.items():
        first = next((record.value for source in sources for record in records(source.files[0])), None)
        present = list(first) if isinstance(first, dict) else []
        near = difflib.get_close_matches(column, present, n=1) or [
            known for known in _OTHER_NAMES.get(name, ()) if known in present
        ]
        meant = f"did you mean {near[0]}? " if near else ""
        raise InvalidSpecError(
            f"dataset.columns.{name} is {column!r}, a column that no row has: {meant}The first row has"
            f" {', '.join(present[:_SHOWN_COLUMNS]) or 'none'}"
        )


@dataclass(frozen=True)
class _Layout:
    """Layout of the rows of a source, determined by its first usable row.

    Args:
        form: form of the rows.
        where: file and line of the first usable row.
        chat: True if prompts and answers that are texts are turns of a chat, as some rows have a system prompt or
            earlier turns in columns of their own.
    """

    form: RowForm
    where: str
    chat: bool


@dataclass
class _Reader:
    dataset: Dataset
    report: RowReport
    forms: Collection[RowForm]
    names: dict[str, str] = field(default_factory=dict)
    layouts: dict[int, _Layout] = field(default_factory=dict)
    """Layout of the rows, by source."""
    origin: Origin = field(default_factory=Origin)
    seen: set[bytes] = field(default_factory=set)
    mismatches: list[str] = field(default_factory=list)
    mismatched: int = 0
    records: int = 0
    files: Sequence[DataFile] = ()
    """Files of the source that is read."""
    context: frozenset[str] = frozenset()
    """Columns of the system prompt and of earlier turns."""

    def __post_init__(self) -> None:
        given = self.dataset.columns.model_dump(exclude_none=True) if self.dataset.columns else {}
        self.names = {name: given.get(name, name) for name in Columns.model_fields}
        self.context = frozenset((self.names["system"], self.names["history"]))
        self.report.missing_columns = given
        self.report.ignored_keys = self.origin.ignored

    @property
    def wanted(self) -> frozenset[str]:
        """Columns that rows are read from, and those that a suggestion may name."""
        return frozenset(self.names.values()).union(MEDIA_COLUMNS, {FUNCTIONS}, *_OTHER_NAMES.values())

    def row(self, record: Record, source: int) -> Row | None:
        self.report.read += 1
        self.records += 1
        try:
            if record.problem is not None:
                raise RowError(record.problem, DropReason.UNDECODABLE)  # noqa: TRY301 - handled with the others
            layout = self._layout(record, source)
            value = self._value(record, layout)
            text = _json_of(value)
            _check_characters(text, value)
        except RowError as error:
            problem = f"{record.where}: {error}"
            if error.reason is not None:
                self.report.drop(error.reason, problem)
            else:
                self.mismatched += 1
                if len(self.mismatches) < _SHOWN_PROBLEMS:
                    self.mismatches.append(problem)
            return None
        self.layouts.setdefault(source, layout)
        if self.mismatched:
            return None  # the rest is read only to report its errors
        digest = hashlib.blake2b(text.encode(), digest_size=12).digest()
        if self.dataset.duplicates is DuplicateRows.DROP:
            if digest in self.seen:
                self.report.drop(DropReason.DUPLICATE, record.where)
                return None
            self.seen.add(digest)
        return Row(layout.form, value, record.where, source, int.from_bytes(digest[:8]), len(text))

    def _value(self, record: Record, layout: _Layout) -> dict[str, Any]:
        """Return the content of a row, checked."""
        try:
            return self._checked(record, layout)
        except RecursionError:
            raise RowError("is nested too deeply", DropReason.UNDECODABLE) from None

    def _checked(self, record: Record, layout: _Layout) -> dict[str, Any]:
        given = record.value
        if not MEDIA_COLUMNS.isdisjoint(given):
            check_media(given)
        self.origin.columnar = record.columnar
        value = CHECKS[layout.form](given, self.names, self.origin)
        if layout.form is not RowForm.TEXT and (layout.chat or not self.context.isdisjoint(given)):
            value = self._with_context(value, given)
        if "tools" in value and isinstance(value.get("prompt"), str):
            raise RowError(f"has tools, but '{self.names['prompt']}' is a text: write it as messages")
        return value

    def examples(self, row: Row) -> list[Row]:
        """Return the row, or the two examples made from a pair if single answers are learned."""
        if row.form is not RowForm.PREFERENCE or RowForm.UNPAIRED_PREFERENCE not in self.forms:
            return [row]
        self.report.read += 1
        shared = {name: part for name, part in row.value.items() if name not in {"chosen", "rejected"}}
        return [
            replace(
                row,
                form=RowForm.UNPAIRED_PREFERENCE,
                value=shared | {"completion": row.value[answer], "label": answer == "chosen"},
            )
            for answer in ("chosen", "rejected")
        ]

    def finish(self) -> None:
        """Raise DatasetInvalidError unless enough rows are usable."""
        unusable = self.report.unusable
        too_many = unusable and (self.dataset.unusable is UnusableRows.ERROR or 2 * unusable >= self.records)
        if not self.mismatched and not too_many:
            return
        raise DatasetInvalidError(joined(self.mismatches + self.report.unusable_examples(), self.mismatched + unusable))

    def _layout(self, record: Record, source: int) -> _Layout:
        value = record.value
        if value is None:
            raise RowError("is null, not an object with the columns of a row", DropReason.NULL)
        if not isinstance(value, dict):
            raise RowError(f"is not a JSON object but {kind(value)}: a row is an object with its columns")
        missing = self.report.missing_columns
        if missing:
            self.report.missing_columns = {name: column for name, column in missing.items() if column not in value}
        known = self.layouts.get(source)
        if known is not None:
            self._require(known.form, value, f" (the rows from {known.where} on have it)")
            return known
        if self.dataset.format is DataFormat.AUTO:
            form = self._detected(value)
        else:
            form = RowForm(self.dataset.format.value)
            self._require(form, value, f" (dataset.format is {form}){self._suggestion(form, value)}")
        self._check_allowed(form, record.where)
        chat = form in PROMPT_FORMS and (
            not self.context.isdisjoint(value) or any(has_column(file, self.context) for file in self.files)
        )
        return _Layout(form, record.where, chat)

    def _with_context(self, value: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """Return the row as a chat that begins with the system prompt and the earlier turns of its columns."""
        system, history = (self.names[name] for name in ("system", "history"))
        instructions = optional_text_of(given.get(system), f"'{system}'")
        turns = history_of(given.get(history), f"'{history}'", self.origin)
        result = {name: as_turns(part, name) for name, part in value.items()}
        begin = "messages" if "messages" in result else "prompt"
        result[begin] = after(instructions, turns, result[begin], f"'{system}'")
        return result

    def _require(self, form: RowForm, value: dict[str, Any], why: str) -> None:
        for name in REQUIRED[form]:
            if self.names[name] not in value:
                raise RowError(f"'{self.names[name]}' is missing{why}")

    def _detected(self, value: dict[str, Any]) -> RowForm:
        has = {name for name, column in self.names.items() if column in value}
        found = [form for form in RowForm if set(REQUIRED[form]) <= has]
        if len(found) > 1 and set(found) & set(self.forms):
            found = [form for form in found if form in self.forms]
        if RowForm.UNPAIRED_PREFERENCE in found and RowForm.PROMPT_COMPLETION in found:
            labelled = isinstance(value[self.names["label"]], bool)
            found.remove(RowForm.PROMPT_COMPLETION if labelled else RowForm.UNPAIRED_PREFERENCE)
        if len(found) > 1:
            names = " and ".join(found)
            raise RowError(f"has the columns of {names}: select one of them with dataset.format")
        if found:
            return found[0]
        for form in RowForm:
            if has & set(REQUIRED[form]) - {"prompt"} or ("prompt" in has and form is RowForm.PROMPT_COMPLETION):
                self._require(form, value, self._suggestion(form, value))
        for name, given in value.items():
            require_no_transcript(given, f"'{name}'")
        columns = ", ".join(f"'{name}'" for name in list(value)[:_SHOWN_COLUMNS]) or "none"
        raise RowError(
            f"has no columns that can be learned from: a row needs {self._needed()}; it has"
            f" {columns}{self._suggestion(None, value)}"
        )

    def _needed(self) -> str:
        """Return the columns of the forms from which the objective can learn."""
        return ", or ".join(
            " and ".join(f"'{self.names[name]}'" for name in REQUIRED[form]) for form in RowForm if form in self.forms
        )

    def _suggestion(self, form: RowForm | None, value: dict[str, Any]) -> str:
        """Return a suggestion for `dataset.columns`, of the form for which it names the most columns; else nothing."""
        found: list[dict[str, str]] = []
        for candidate in [form] if form is not None else SFT_FORMS_IN_ORDER:
            missing = [name for name in REQUIRED[candidate] if self.names[name] not in value]
            named: dict[str, str] = {}
            for name in (*missing, *OPTIONAL.get(candidate, ())):
                known = (
                    other for other in _OTHER_NAMES.get(name, ()) if other in value and other not in named.values()
                )
                column = None if self.names[name] in value else next(known, None)
                if column is not None:
                    named[name] = column
            if missing and named.keys() >= set(missing):
                found.append(named)
        if not found:
            return ""
        best = ", ".join(f"{name}: {column}" for name, column in max(found, key=len).items())
        return f"; did you mean dataset.columns {{{best}}}?"

    def _check_allowed(self, form: RowForm, where: str) -> None:
        if form not in self.forms:
            allowed = ", ".join(form for form in RowForm if form in self.forms)
            others = ", ".join(f"objective.{name}" for name, forms in FORMS.items() if form in forms)
            raise DatasetInvalidError(
                f"{where}: has the dataset.format {form}, which this objective cannot learn from; it learns"
                f" from {allowed}: choose another objective ({others}), or set dataset.format and dataset.columns"
            )
        if self.dataset.overlong is Overlong.CHUNK and form is not RowForm.TEXT:
            raise InvalidSpecError(
                f"{where}: has the dataset.format {form}, and dataset.overlong Chunk splits only texts (dataset.format"
                " Text): set dataset.overlong to Drop or Truncate"
            )
        if self.dataset.format is DataFormat.AUTO or self.dataset.columns is None:
            return
        of_form = {*REQUIRED[form], *OPTIONAL.get(form, ())}
        for name in self.dataset.columns.model_dump(exclude_none=True):
            if name not in of_form:
                raise InvalidSpecError(
                    f"dataset.columns.{name} does not belong to dataset.format {form}, which has "
                    f"{', '.join(sorted(of_form))}: remove it"
                )


def _json_of(value: dict[str, Any]) -> str:
    """Return the JSON of a row in ASCII.

    Raises:
        RowError: it is too long, or has values that JSON does not have: columnar files have times, for example.
    """
    try:
        text = json.dumps(value, sort_keys=True)
    except TypeError as error:
        raise RowError(f"has a value that JSON does not have ({error}): convert it to text") from None
    except RecursionError:
        raise RowError("is nested too deeply", DropReason.UNDECODABLE) from None
    if len(text) > MAX_ROW_CHARACTERS:
        raise RowError(
            f"has {len(text)} characters, more than {MAX_ROW_CHARACTERS}: divide it into several rows",
            DropReason.OVERLONG,
        )
    return text


def _check_characters(text: str, value: dict[str, Any]) -> None:
    """Raise RowError if the row contains half of a surrogate pair, which is not a character.

    Args:
        text: JSON of the row in ASCII.
        value: the row.
    """
    if "\\ud" not in text or _SURROGATE.search(text) is None:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(error.object[error.start]):04x}"
        raise RowError(
            f"contains {code}, half of a surrogate pair, which is not text", DropReason.UNDECODABLE
        ) from None
