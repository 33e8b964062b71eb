"""Read rows: determine their form, check each row against it, and count the rows that are not used."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from tunesmith.api.dataset import Columns, DataFormat, DuplicateRows, Overlong, UnusableRows
from tunesmith.api.finetunejob import FORMATS
from tunesmith.api.finetunejob_status import DropReason
from tunesmith.api.objective import ObjectiveName
from tunesmith_trainer.data.formats import records
from tunesmith_trainer.data.messages import (
    Origin,
    RowError,
    check_chat,
    flag_of,
    history_of,
    kind,
    messages_of,
    optional_text_of,
    text_of,
    tools_of,
)
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
    "input": ("context",),
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
_SURROGATE = re.compile(r"\\ud[89a-f]")
_ANSWER_MARK = "\n\nAssistant:"
"""Text that precedes each answer in dialogues written as one text (HH-RLHF)."""
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


@dataclass(frozen=True)
class _Layout:
    """Layout of the rows of a source, determined by its first usable row.

    Args:
        form: form of the rows.
        where: file and line of the first usable row.
        chat: True if prompts and answers that are texts are turns of a chat, as there is a column with its system
            prompt or with earlier turns.
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

    def __post_init__(self) -> None:
        given = self.dataset.columns.model_dump(exclude_none=True) if self.dataset.columns else {}
        self.names = {name: given.get(name, name) for name in Columns.model_fields}
        self.report.ignored_keys = self.origin.ignored

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
            layout = self._layout(record, source)
            self.origin.columnar = record.columnar
            value = _CHECKS[layout.form](record.value, self.names, self.origin)
            if layout.chat or self.names["system"] in record.value or self.names["history"] in record.value:
                value = self._with_context(value, record.value, layout)
            if "tools" in value and isinstance(value.get("prompt"), str):
                raise RowError(f"has tools, but '{self.names['prompt']}' is a text: write it as messages")  # noqa: TRY301
            text = json.dumps(value, sort_keys=True)
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
        return Row(layout.form, value, record.where, source, int.from_bytes(digest[:8]))

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
        chat = form is not RowForm.TEXT and (self.names["system"] in value or self.names["history"] in value)
        return _Layout(form, record.where, chat)

    def _with_context(self, value: dict[str, Any], given: dict[str, Any], layout: _Layout) -> dict[str, Any]:
        """Return the row as a chat that begins with the system prompt and the earlier turns of its columns."""
        if layout.form is RowForm.TEXT:
            return value
        system, history = (self.names[name] for name in ("system", "history"))
        instructions = optional_text_of(given.get(system), f"'{system}'")
        turns = history_of(given.get(history), f"'{history}'", self.origin)
        if not layout.chat:
            if instructions is None and not turns:
                return value
            name = history if turns else system
            raise RowError(f"has '{name}', which the rows from {layout.where} do not have: add it to all rows")
        result = {name: _as_turns(part, name) for name, part in value.items()}
        begin = "messages" if "messages" in result else "prompt"
        result[begin] = _after(instructions, turns, result[begin], f"'{system}'")
        return result

    def _require(self, form: RowForm, value: dict[str, Any], why: str) -> None:
        for name in _REQUIRED[form]:
            if self.names[name] not in value:
                raise RowError(f"'{self.names[name]}' is missing{why}")

    def _detected(self, value: dict[str, Any]) -> RowForm:
        has = {name for name, column in self.names.items() if column in value}
        found = [form for form in RowForm if set(_REQUIRED[form]) <= has]
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
                for name in _OPTIONAL.get(candidate, ()) if missing else ():
                    known = next((known for known in _OTHER_NAMES.get(name, ()) if known in value), None)
                    if known is not None and known not in other.values() and self.names[name] not in value:
                        other[name] = known
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
        if self.dataset.overlong is Overlong.CHUNK and form is not RowForm.TEXT:
            raise InvalidSpecError(
                f"{where}: has the dataset.format {form}, and dataset.overlong Chunk splits only texts (dataset.format"
                " Text): set dataset.overlong to Drop or Truncate"
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
    RowForm.MESSAGES: ("tools", "system", "history"),
    RowForm.PROMPT_COMPLETION: ("tools", "system", "history"),
    RowForm.INSTRUCTION: ("input", "tools", "system", "history"),
    RowForm.PREFERENCE: ("prompt", "tools", "system", "history"),
    RowForm.UNPAIRED_PREFERENCE: ("tools", "system", "history"),
}


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


def _as_turns(part: Any, name: str) -> Any:  # noqa: ANN401 - a part of a row
    """Return a prompt or an answer as messages."""
    if name not in _TURNS or isinstance(part, list):
        return part
    return [{"role": "user" if name == "prompt" else "assistant", "content": part}]


_TURNS = frozenset({"prompt", "completion", "chosen", "rejected"})


def _after(
    system: str | None, history: list[dict[str, Any]], messages: list[dict[str, Any]], what: str
) -> list[dict[str, Any]]:
    """Return the messages after a system prompt and earlier turns."""
    own, rest = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
    if system is not None and own and own[0]["content"] != system:
        raise RowError(f"has a system message, and another text in {what}: remove one of them")
    if system is not None and not own:
        own = [{"role": "system", "content": system}]
    return [*own, *history, *rest]


def _messages(value: dict[str, Any], names: dict[str, str], origin: Origin) -> dict[str, Any]:
    messages = messages_of(value[names["messages"]], f"'{names['messages']}'", origin)
    check_chat(messages)
    return {"messages": messages, **_tools(value, names, origin)}


def _tools(value: dict[str, Any], names: dict[str, str], origin: Origin) -> dict[str, Any]:
    tools = tools_of(value.get(names["tools"]), origin)
    return {"tools": tools} if tools else {}


def _prompt_and_answers(value: dict[str, Any], names: dict[str, str], origin: Origin, *answers: str) -> dict[str, Any]:
    """Return prompt and answers: all as texts, or all as messages if one of them is."""
    result: dict[str, Any] = {}
    for name in ("prompt", *answers):
        given, what = value[names[name]], f"'{names[name]}'"
        result[name] = messages_of(given, what, origin) if isinstance(given, list | dict) else text_of(given, what)
    if any(isinstance(part, list) for part in result.values()):
        result = {name: _as_turns(part, name) for name, part in result.items()}
        length = len(result["prompt"])
        if all(result[name][:length] == result["prompt"] for name in answers):
            result |= {name: result[name][length:] for name in answers}  # whole chats, which repeat the prompt
        for name in answers:
            if not result[name] or result[name][-1]["role"] != "assistant":
                raise RowError(
                    f"the last message of '{names[name]}' must be the assistant's answer, which is what is learned",
                    DropReason.INCOMPLETE,
                )
    return result | _tools(value, names, origin)


def _prompt_completion(value: dict[str, Any], names: dict[str, str], origin: Origin) -> dict[str, Any]:
    return _prompt_and_answers(value, names, origin, "completion")


def _instruction(value: dict[str, Any], names: dict[str, str], origin: Origin) -> dict[str, Any]:
    """Return a chat with one question, with the input below the instruction."""
    question = text_of(value[names["instruction"]], f"'{names['instruction']}'")
    extra = optional_text_of(value.get(names["input"]), f"'{names['input']}'")
    if extra is not None:
        question = f"{question}\n\n{extra}"
    answer = text_of(value[names["output"]], f"'{names['output']}'")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **_tools(value, names, origin)}


def _text(value: dict[str, Any], names: dict[str, str], _: Origin) -> dict[str, Any]:
    return {"text": text_of(value[names["text"]], f"'{names['text']}'")}


def _preference(value: dict[str, Any], names: dict[str, str], origin: Origin) -> dict[str, Any]:
    chosen, rejected, prompt = (value.get(names[name]) for name in ("chosen", "rejected", "prompt"))
    if isinstance(chosen, str) and isinstance(rejected, str) and prompt is None:
        result = _implicit_prompt(chosen, rejected, names)
    elif isinstance(chosen, list | dict) and isinstance(rejected, list | dict) and _are_whole(chosen, prompt):
        result = _common_prompt(chosen, rejected, names, origin) | _tools(value, names, origin)
    elif names["prompt"] not in value:
        raise RowError(f"'{names['prompt']}' is missing")
    else:
        result = _prompt_and_answers(value, names, origin, "chosen", "rejected")
    if result["chosen"] == result["rejected"]:
        raise RowError(f"'{names['chosen']}' and '{names['rejected']}' are the same", DropReason.NO_TARGET)
    return result


def _are_whole(chosen: object, prompt: object) -> bool:
    """Return True if an answer given as messages is a whole chat, which begins with the question."""
    if prompt is None or isinstance(chosen, dict):
        return True
    if not isinstance(prompt, str) or not isinstance(chosen, list) or not chosen:
        return False
    first = chosen[0]
    return not isinstance(first, dict) or first.get("role", first.get("from")) not in {"assistant", "gpt"}


def _common_prompt(chosen: object, rejected: object, names: dict[str, str], origin: Origin) -> dict[str, Any]:
    """Return the common beginning of two chats as their prompt, and what follows as the answers."""
    better = messages_of(chosen, f"'{names['chosen']}'", origin)
    worse = messages_of(rejected, f"'{names['rejected']}'", origin)
    check_chat(better)
    check_chat(worse)
    pairs = enumerate(zip(better, worse, strict=False))
    same = next((index for index, (left, right) in pairs if left != right), min(len(better), len(worse)))
    same = min(same, len(better) - 1, len(worse) - 1)
    if same == 0:
        raise RowError(
            f"'{names['chosen']}' and '{names['rejected']}' begin with different messages, so they have no"
            " common prompt",
            DropReason.INCOMPLETE,
        )
    return {"prompt": better[:same], "chosen": better[same:], "rejected": worse[same:]}


def _implicit_prompt(chosen: str, rejected: str, names: dict[str, str]) -> dict[str, Any]:
    """Return the common beginning of two texts as their prompt.

    It ends after the last mark of an answer that both texts contain, or at their last common space.
    """
    what = f"'{names['chosen']}'", f"'{names['rejected']}'"
    common = chosen[: _common_length(text_of(chosen, what[0]), text_of(rejected, what[1]))]
    mark = common.rfind(_ANSWER_MARK)
    end = mark + len(_ANSWER_MARK) if mark >= 0 else max(common.rfind(space) for space in " \n\t")
    if end <= 0 or not common[:end].strip():
        raise RowError(f"{what[0]} and {what[1]} have no common prompt: add 'prompt'", DropReason.INCOMPLETE)
    return {
        "prompt": common[:end],
        "chosen": text_of(chosen[end:], what[0]),
        "rejected": text_of(rejected[end:], what[1]),
    }


def _common_length(left: str, right: str) -> int:
    """Return the number of characters with which both texts begin."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _unpaired(value: dict[str, Any], names: dict[str, str], origin: Origin) -> dict[str, Any]:
    label = flag_of(value[names["label"]], f"'{names['label']}'")
    return _prompt_and_answers(value, names, origin, "completion") | {"label": label}


_CHECKS: dict[RowForm, Callable[[dict[str, Any], dict[str, str], Origin], dict[str, Any]]] = {
    RowForm.MESSAGES: _messages,
    RowForm.PROMPT_COMPLETION: _prompt_completion,
    RowForm.INSTRUCTION: _instruction,
    RowForm.TEXT: _text,
    RowForm.PREFERENCE: _preference,
    RowForm.UNPAIRED_PREFERENCE: _unpaired,
}
