"""Read rows: determine their form, check each row against it, and count the rows that are not used."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from tunesmith.api.dataset import Columns, DataFormat, DuplicateRows, UnusableRows
from tunesmith.api.finetunejob import FORMATS
from tunesmith.api.finetunejob_status import DropReason
from tunesmith.api.objective import ObjectiveName
from tunesmith_trainer.data.formats import records
from tunesmith_trainer.data.messages import RowError, chat_of, kind, messages_of, text_of, tools_of
from tunesmith_trainer.data.report import joined
from tunesmith_trainer.errors import DatasetInvalidError, InvalidSpecError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from tunesmith.api.dataset import Dataset
    from tunesmith_trainer.data.formats import Record
    from tunesmith_trainer.data.report import RowReport
    from tunesmith_trainer.data.sources import Source

_SHOWN_PROBLEMS = 3
_OTHER_NAMES = {
    "messages": ("conversations", "conversation", "dialog", "dialogue", "chat"),
    "prompt": ("question", "query", "input", "context"),
    "completion": ("answer", "response", "output", "target"),
    "instruction": ("task",),
    "output": ("response", "answer", "completion"),
    "text": ("content", "document"),
}
"""Common names of columns; used for suggestions only."""


class RowForm(StrEnum):
    """Content of a row."""

    MESSAGES = "Messages"
    PROMPT_COMPLETION = "PromptCompletion"
    INSTRUCTION = "Instruction"
    TEXT = "Text"
    PREFERENCE = "Preference"
    UNPAIRED_PREFERENCE = "UnpairedPreference"


FORMS = {
    objective: frozenset(RowForm(data_format.value) for data_format in formats)
    for objective, formats in FORMATS.items()
}
"""Row forms that each objective can learn from."""
SFT_FORMS = FORMS[ObjectiveName.SFT]
"""Forms of which each is a text with a part that is learned."""
_REQUIRED = {
    RowForm.MESSAGES: ("messages",),
    RowForm.PROMPT_COMPLETION: ("prompt", "completion"),
    RowForm.INSTRUCTION: ("instruction", "output"),
    RowForm.TEXT: ("text",),
    RowForm.PREFERENCE: ("chosen", "rejected"),
    RowForm.UNPAIRED_PREFERENCE: ("prompt", "completion", "label"),
}


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
    """

    form: RowForm
    value: dict[str, Any]
    where: str
    source: int = 0
    key: int = 0


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
        before = report.read
        for file in source.files:
            for record in records(file, reader.wanted):
                row = reader.row(record, number)
                if row is not None:
                    yield from reader.examples(row)
        if report.read == before:
            name = source.files[0].name if len(source.files) == 1 else source.uri
            raise DatasetInvalidError(f"{name} is empty: a data set needs at least one row")
    reader.finish()


@dataclass
class _Reader:
    dataset: Dataset
    report: RowReport
    forms: Collection[RowForm]
    names: dict[str, str] = field(default_factory=dict)
    first: dict[int, tuple[RowForm, str]] = field(default_factory=dict)
    """Form and location of the first usable row, by source."""
    seen: set[bytes] = field(default_factory=set)
    mismatches: list[str] = field(default_factory=list)
    mismatched: int = 0
    records: int = 0

    def __post_init__(self) -> None:
        given = self.dataset.columns.model_dump(exclude_none=True) if self.dataset.columns else {}
        self.names = {name: given.get(name, name) for name in Columns.model_fields}

    @property
    def wanted(self) -> frozenset[str]:
        """Columns that rows are read from, and those that a suggestion may name."""
        return frozenset(self.names.values()).union(*_OTHER_NAMES.values())

    def row(self, record: Record, source: int) -> Row | None:
        self.report.read += 1
        self.records += 1
        try:
            if record.problem is not None:
                raise RowError(record.problem, DropReason.UNDECODABLE)  # noqa: TRY301 - handled with the others
            form = self._form(record, source)
            value = _CHECKS[form](record.value, self.names)
        except RowError as error:
            problem = f"{record.where}: {error}"
            if error.reason is not None:
                self.report.drop(error.reason, problem)
            else:
                self.mismatched += 1
                if len(self.mismatches) < _SHOWN_PROBLEMS:
                    self.mismatches.append(problem)
            return None
        self.first.setdefault(source, (form, record.where))
        if self.mismatched:
            return None  # the rest is read only to report its errors
        digest = hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=12).digest()
        if self.dataset.duplicates is DuplicateRows.DROP:
            if digest in self.seen:
                self.report.drop(DropReason.DUPLICATE, record.where)
                return None
            self.seen.add(digest)
        return Row(form, value, record.where, source, int.from_bytes(digest[:8]))

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

    def _form(self, record: Record, source: int) -> RowForm:
        value = record.value
        if value is None:
            raise RowError("is null, not an object with the columns of a row", DropReason.NULL)
        if not isinstance(value, dict):
            raise RowError(f"is not a JSON object but {kind(value)}: a row is an object with its columns")
        known = self.first.get(source)
        if known is not None:
            form, before = known
            self._require(form, value, f" (the rows from {before} on have it)")
            return form
        if self.dataset.format is DataFormat.AUTO:
            form = self._detected(value)
        else:
            form = RowForm(self.dataset.format.value)
            self._require(form, value, f" (dataset.format is {form}){self._suggestion(form, value)}")
        self._check_allowed(form, record.where)
        return form

    def _require(self, form: RowForm, value: dict[str, Any], why: str) -> None:
        for name in _REQUIRED[form]:
            if self.names[name] not in value:
                raise RowError(f"'{self.names[name]}' is missing{why}")

    def _detected(self, value: dict[str, Any]) -> RowForm:
        has = {name for name, column in self.names.items() if column in value}
        found = [form for form in RowForm if set(_REQUIRED[form]) <= has]
        if RowForm.UNPAIRED_PREFERENCE in found:
            labelled = isinstance(value[self.names["label"]], bool)
            found.remove(RowForm.PROMPT_COMPLETION if labelled else RowForm.UNPAIRED_PREFERENCE)
        if len(found) > 1:
            names = " and ".join(found)
            raise RowError(f"has the columns of {names}: select one of them with dataset.format")
        if found:
            return found[0]
        for form in RowForm:
            if has & set(_REQUIRED[form]) - {"prompt"} or ("prompt" in has and form is RowForm.PROMPT_COMPLETION):
                self._require(form, value, self._suggestion(form, value))
        columns = ", ".join(f"'{name}'" for name in list(value)[:8]) or "none"
        raise RowError(
            "has no columns that can be learned from: a row needs 'messages', or 'prompt' and 'completion', or"
            f" 'instruction' and 'output', or 'text'; it has {columns}{self._suggestion(None, value)}"
        )

    def _suggestion(self, form: RowForm | None, value: dict[str, Any]) -> str:
        for candidate in [form] if form is not None else SFT_FORMS_IN_ORDER:
            missing = [name for name in _REQUIRED[candidate] if self.names[name] not in value]
            other = {
                name: next((known for known in _OTHER_NAMES.get(name, ()) if known in value), None) for name in missing
            }
            if all(other.values()):
                named = ", ".join(f"{name}: {column}" for name, column in other.items())
                return f"; did you mean dataset.columns {{{named}}}?"
        return ""

    def _check_allowed(self, form: RowForm, where: str) -> None:
        if form not in self.forms:
            allowed = ", ".join(form for form in RowForm if form in self.forms)
            raise DatasetInvalidError(
                f"{where}: has the dataset.format {form}, which this objective cannot learn from; it learns"
                f" from {allowed}: choose another objective, or set dataset.format and dataset.columns"
            )
        if self.dataset.format is DataFormat.AUTO or self.dataset.columns is None:
            return
        of_form = {*_REQUIRED[form], *_OPTIONAL.get(form, ())}
        for name in self.dataset.columns.model_dump(exclude_none=True):
            if name not in of_form:
                raise InvalidSpecError(
                    f"dataset.columns.{name} does not belong to dataset.format {form}, which has "
                    f"{', '.join(sorted(of_form))}: remove it"
                )


SFT_FORMS_IN_ORDER = tuple(form for form in RowForm if form in SFT_FORMS)
_OPTIONAL = {
    RowForm.MESSAGES: ("tools",),
    RowForm.PROMPT_COMPLETION: ("tools",),
    RowForm.INSTRUCTION: ("input",),
    RowForm.PREFERENCE: ("prompt", "tools"),
    RowForm.UNPAIRED_PREFERENCE: ("tools",),
}


def _messages(value: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {"messages": chat_of(value[names["messages"]], f"'{names['messages']}'"), **_tools(value, names)}


def _tools(value: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    tools = tools_of(value.get(names["tools"]))
    return {"tools": tools} if tools else {}


def _prompt_and_answers(value: dict[str, Any], names: dict[str, str], *answers: str) -> dict[str, Any]:
    """Return prompt and answers, either all as texts or all as messages."""
    result: dict[str, Any] = {}
    for name in ("prompt", *answers):
        given, what = value[names[name]], f"'{names[name]}'"
        result[name] = messages_of(given, what) if isinstance(given, list) else text_of(given, what)
    kinds = {type(part) for part in result.values()}
    if len(kinds) > 1:
        shown = " and ".join(f"'{names[name]}' {kind(part)}" for name, part in result.items())
        raise RowError(f"{shown}: prompt and answer must both be texts, or both lists of messages")
    for name in answers:
        if kinds == {list} and result[name][-1]["role"] != "assistant":
            raise RowError(
                f"the last message of '{names[name]}' must be the assistant's answer, which is what is learned"
            )
    return result | _tools(value, names)


def _prompt_completion(value: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return _prompt_and_answers(value, names, "completion")


def _instruction(value: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return a chat with one question, with the input below the instruction."""
    question = text_of(value[names["instruction"]], f"'{names['instruction']}'")
    extra = value.get(names["input"])
    if extra is not None and not isinstance(extra, str):
        raise RowError(f"'{names['input']}' is {kind(extra)}, not a string")
    if extra and extra.strip():
        question = f"{question}\n\n{extra}"
    answer = text_of(value[names["output"]], f"'{names['output']}'")
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _text(value: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {"text": text_of(value[names["text"]], f"'{names['text']}'")}


def _preference(value: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    chosen, rejected = (value[names[name]] for name in ("chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(value.get(names["prompt"]), list):
        # Whole chats: their common prefix is the prompt.
        better = chat_of(chosen, f"'{names['chosen']}'")
        worse = chat_of(rejected, f"'{names['rejected']}'")
        pairs = enumerate(zip(better, worse, strict=False))
        same = next((index for index, (left, right) in pairs if left != right), min(len(better), len(worse)))
        same = min(same, len(better) - 1, len(worse) - 1)
        if same == 0:
            raise RowError(
                f"'{names['chosen']}' and '{names['rejected']}' begin with different messages, so they have no"
                " common prompt"
            )
        result = {"prompt": better[:same], "chosen": better[same:], "rejected": worse[same:], **_tools(value, names)}
    elif names["prompt"] not in value:
        raise RowError(f"'{names['prompt']}' is missing")
    else:
        result = _prompt_and_answers(value, names, "chosen", "rejected")
    if result["chosen"] == result["rejected"]:
        raise RowError(f"'{names['chosen']}' and '{names['rejected']}' are the same", DropReason.NO_TARGET)
    return result


def _unpaired(value: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    label = value[names["label"]]
    if label is None:
        raise RowError(f"'{names['label']}' is null, not true or false", DropReason.NULL)
    read_as = {"true": True, "false": False, "1": True, "0": False}.get(str(label).lower())
    if read_as is None:
        raise RowError(f"'{names['label']}' is {label!r}, not true or false")
    return _prompt_and_answers(value, names, "completion") | {"label": read_as}


_CHECKS: dict[RowForm, Callable[[dict[str, Any], dict[str, str]], dict[str, Any]]] = {
    RowForm.MESSAGES: _messages,
    RowForm.PROMPT_COMPLETION: _prompt_completion,
    RowForm.INSTRUCTION: _instruction,
    RowForm.TEXT: _text,
    RowForm.PREFERENCE: _preference,
    RowForm.UNPAIRED_PREFERENCE: _unpaired,
}
