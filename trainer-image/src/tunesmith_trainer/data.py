"""Rows of a data set: read, checked, rendered with the chat template, tokenised, with the loss on completions only."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from tunesmith.api.dataset import DEFAULT_VALIDATION_FRACTION
from tunesmith_trainer.errors import DatasetInvalidError, DatasetNotFoundError, InvalidSpecError

if TYPE_CHECKING:
    import hashlib
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from tunesmith.api.dataset import Dataset, DatasetSource
    from tunesmith_trainer.store import Stores

IGNORED = -100
"""Label of a token that is no target (PyTorch's `ignore_index`)."""
_ROLES = ("system", "user", "assistant")
_SHOWN_PROBLEMS = 3


class RowForm(StrEnum):
    """What a row holds."""

    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt-completion"


@dataclass(frozen=True)
class DataFile:
    """A downloaded JSONL file and the name that messages give it."""

    name: str
    path: Path


@dataclass(frozen=True)
class Row:
    """One checked row and where it stands."""

    form: RowForm
    value: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Tokens:
    """A tokenised row: `labels` has the same length as `input_ids`, `IGNORED` where there is no loss."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class RowCheck:
    """Checks rows one after the other: all must have the form of the first, and problems are collected."""

    form: RowForm | None = None
    first: str = ""
    problems: list[str] = field(default_factory=list)
    count: int = 0

    def row(self, line: bytes, where: str) -> Row | None:
        """The row on a line, or None (and a problem more) where it is not usable."""
        try:
            value = _object(line)
            form = self._form(value)
            if form is RowForm.MESSAGES:
                _check_messages(value["messages"])
            else:
                _check_text(value["prompt"], "'prompt'")
                _check_text(value["completion"], "'completion'")
        except ValueError as problem:
            self.count += 1
            if len(self.problems) < _SHOWN_PROBLEMS:
                self.problems.append(f"{where}: {problem}")
            return None
        if self.form is None:
            self.form, self.first = form, where
        return Row(form, value, where)

    def raise_problems(self) -> None:
        """Raises DatasetInvalidError if there was a problem."""
        if self.count:
            rest = self.count - len(self.problems)
            more = f"; and {rest} more row{'s' if rest > 1 else ''} with errors" if rest else ""
            raise DatasetInvalidError("; ".join(self.problems) + more)

    def _form(self, value: dict[str, Any]) -> RowForm:
        if self.form is RowForm.MESSAGES and "messages" not in value:
            raise ValueError(f"'messages' is missing (the rows before have it, from {self.first} on)")
        if "tools" in value:
            raise ValueError("has 'tools', which are not supported: remove it")
        if "messages" in value:
            if "prompt" in value or "completion" in value:
                raise ValueError("has both 'messages' and 'prompt'/'completion': keep one of them")
            if self.form is RowForm.PROMPT_COMPLETION:
                raise ValueError(
                    f"has 'messages' where the rows before have 'prompt' and 'completion' (from {self.first} on)"
                )
            return RowForm.MESSAGES
        for key, other in (("prompt", "completion"), ("completion", "prompt")):
            if key not in value and (other in value or self.form is RowForm.PROMPT_COMPLETION):
                raise ValueError(f"'{key}' is missing")
        if "prompt" not in value:
            raise ValueError("'messages' is missing (a row needs 'messages', or 'prompt' and 'completion')")
        return RowForm.PROMPT_COMPLETION


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("is not JSON that can be read: it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"is not a JSON object but {_kind(value)}: a JSONL file has one object per line")  # noqa: TRY004
    return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}[
        type(value)
    ]


def _check_text(value: object, what: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {_kind(value)}, not a string")  # noqa: TRY004 - the row is wrong, not the program
    if not value.strip():
        raise ValueError(f"{what} is empty")


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list):
        raise ValueError(f"'messages' is {_kind(messages)}, not a list")  # noqa: TRY004
    if not messages:
        raise ValueError("'messages' is empty")
    for number, message in enumerate(messages, start=1):
        _check_message(message, number)
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant":
        raise ValueError(f"the last message is the {roles[-1]}'s: it must be the assistant's, which is what is learned")
    if roles[0] == "assistant":
        raise ValueError("the first message is the assistant's: nothing was asked")


def _check_message(message: object, number: int) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"message {number} is {_kind(message)}, not an object with 'role' and 'content'")  # noqa: TRY004
    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f"message {number}: '{key}' is missing")
    unknown = sorted(set(message) - {"role", "content"})
    if unknown:
        raise ValueError(f"message {number}: unknown key '{unknown[0]}', a message has 'role' and 'content'")
    role = message["role"]
    if role not in _ROLES:
        raise ValueError(f"message {number}: unknown role {role!r}, expected one of {', '.join(_ROLES)}")
    _check_text(message["content"], f"message {number} ({role}): 'content'")


def fetch(sources: Sequence[DatasetSource], stores: Stores, folder: Path) -> list[DataFile]:
    """Downloads the files of a data set.

    Raises:
        DatasetNotFoundError: a file does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, source in enumerate(sources):
        store, name = stores.file(
            source.uri,
            what="the data set",
            missing=DatasetNotFoundError,
            secret=source.secret_ref.name if source.secret_ref else None,
        )
        target = folder / f"{number}.jsonl"
        store.download(name, target)
        files.append(DataFile(name, target))
    return files


def read(files: Iterable[DataFile], digest: hashlib._Hash) -> Iterator[Row]:
    """The rows of JSONL files, each checked; blank lines are passed over. The content goes into `digest`.

    Raises:
        DatasetInvalidError: a file has no rows, or (raised at the end) rows are not usable: with file, line and reason.
    """
    check = RowCheck()
    for file in files:
        seen = False
        with file.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                content = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
                if not content:
                    continue
                seen = True
                digest.update(content + b"\n")
                row = check.row(content, f"{file.name} line {number}")
                if row is not None:
                    yield row
        if not seen:
            raise DatasetInvalidError(f"{file.name} is empty: a data set needs at least one row")
    check.raise_problems()


class Encoder:
    """Turns rows into tokens and labels.

    Args:
        tokenizer: a fast tokenizer, as the base model has it.
        end_tokens: the tokens that end an answer; the first is put after a completion whose template puts none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, end_tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ends = frozenset(end_tokens)
        self._end = end_tokens[0]

    def encode(self, row: Row) -> Tokens:
        """Tokens of a row, with labels on the assistant's turns or on the completion.

        Raises:
            InvalidSpecError: the base model has no chat template, or one that rewrites earlier turns.
            DatasetInvalidError: the template does not accept the row.
        """
        if row.form is RowForm.MESSAGES:
            text, spans = self._render(row)
        else:
            prompt, completion = row.value["prompt"], row.value["completion"]
            text, spans = prompt + completion, [(len(prompt), len(prompt) + len(completion))]
        special = row.form is RowForm.PROMPT_COMPLETION
        ids, offsets = self._tokens(text, special=special)
        starts = [start for start, _ in spans]
        if any(left < start < right for start in starts for left, right in offsets):
            # A token over the border would hide the first word of an answer. A served prompt ends at the border too.
            ids, offsets = [], []
            for begin, end in itertools.pairwise([0, *starts, len(text)]):
                more, places_of = self._tokens(text[begin:end], special=special and begin == 0)
                ids += more
                offsets += [(left + begin, right + begin) for left, right in places_of]
        labels = [IGNORED] * len(ids)
        for start, end in spans:
            places = [place for place, (left, right) in enumerate(offsets) if start <= left < end and right > left]
            ends = [place for place in places if ids[place] in self._ends]
            # What a template writes after the end token is never generated.
            for place in places:
                if not ends or place <= ends[-1]:
                    labels[place] = ids[place]
        if not any(label in self._ends for label in labels[_last_span_start(offsets, spans) :]):
            last = max((place for place, label in enumerate(labels) if label != IGNORED), default=len(ids) - 1)
            ids[last + 1 :] = [self._end]
            labels[last + 1 :] = [self._end]
        if labels:
            labels[0] = IGNORED  # nothing precedes the first token, so nothing can predict it
        return Tokens(ids, labels)

    def _tokens(self, text: str, *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of a text and where each stands in it, without an end token that the tokenizer puts there."""
        encoded = self._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids: list[int] = list(encoded["input_ids"])
        offsets: list[tuple[int, int]] = list(encoded["offset_mapping"])
        while special and ids and ids[-1] in self._ends and offsets[-1][0] == offsets[-1][1]:
            del ids[-1], offsets[-1]
        return ids, offsets

    def _render(self, row: Row) -> tuple[str, list[tuple[int, int]]]:
        messages = row.value["messages"]
        text = self._template(messages, row.where, prompt=False)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._template(messages[:number], row.where, prompt=True)
            through = (
                text if number == len(messages) - 1 else self._template(messages[: number + 1], row.where, prompt=False)
            )
            if not (text.startswith(through) and through.startswith(before)):
                raise InvalidSpecError(
                    f"{row.where}: the base model's chat template changes earlier turns when later ones follow, so the"
                    " assistant's turns cannot be marked for the loss: use rows with one assistant turn,"
                    " or 'prompt' and 'completion'"
                )
            spans.append((len(before), len(through)))
        return text, spans

    def _template(self, messages: list[dict[str, Any]], where: str, *, prompt: bool) -> str:
        if not self._tokenizer.chat_template:
            raise InvalidSpecError(
                "the base model has no chat template: use a chat model, or a data set of 'prompt' and 'completion'"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": message["role"], "content": message["content"]} for message in messages],
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except TemplateError as error:
            raise DatasetInvalidError(f"{where}: the base model's chat template refuses the row: {error}") from None
        return str(text)  # without tokenize it is one; the annotation allows more


def _last_span_start(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> int:
    return next((place for place, (left, _) in enumerate(offsets) if left >= spans[-1][0]), len(offsets))


@dataclass
class Kept:
    """Rows that are short enough, and how many were not."""

    lengths: list[int] = field(default_factory=list)
    dropped: int = 0
    longest: int = 0

    def add(self, length: int, limit: int) -> bool:
        """Counts a row; whether it is kept."""
        self.longest = max(self.longest, length)
        if length > limit:
            self.dropped += 1
            return False
        self.lengths.append(length)
        return True

    def require(self, what: str, limit: int, least: int = 1) -> None:
        """Raises DatasetInvalidError where too few rows are left."""
        if len(self.lengths) < least:
            total = len(self.lengths) + self.dropped
            reason = (
                f"{self.dropped} of {total} rows have more than maxLength {limit} tokens"
                f" (the longest has {self.longest})"
                if self.dropped
                else f"there are only {total}"
            )
            raise DatasetInvalidError(f"the {what} need at least {least} rows: {reason}")


def held_out(count: int, dataset: Dataset, seed: int) -> tuple[list[int], list[int]]:
    """Which of `count` training rows train, and which are held out: all and none where there is a validation set."""
    if dataset.validation:
        return list(range(count)), []
    fraction = dataset.validation_fraction or DEFAULT_VALIDATION_FRACTION
    size = min(max(1, math.floor(count * fraction + 0.5)), count - 1)
    chosen = sorted(random.Random(seed).sample(range(count), size))  # noqa: S311 - reproducible on purpose
    out = set(chosen)
    return [index for index in range(count) if index not in out], chosen
