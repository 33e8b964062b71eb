"""Encode rows as tokens with labels on those that are learned."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.api.dataset import LossOn
from tunesmith_trainer.data.rows import RowForm
from tunesmith_trainer.data.template import ChatTemplate
from tunesmith_trainer.errors import InvalidSpecError
from tunesmith_trainer.process.activity import limited

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from transformers import PreTrainedTokenizerFast

    from tunesmith_trainer.data.rows import Row
    from tunesmith_trainer.data.template import Span

IGNORED = -100
"""Label of a token that is not a target (PyTorch's `ignore_index`)."""
Offsets = list[tuple[int, int]]
_TOKENIZER_SECONDS = 600.0
"""Time limit for a batch of rows: a tokenizer's patterns are arbitrary regular expressions of its author."""


@dataclass(frozen=True)
class Tokens:
    """A tokenised row.

    Args:
        input_ids: token ids of its sequences, concatenated.
        labels: same length as `input_ids`, `IGNORED` where there is no loss.
        seq_lengths: tokens of each sequence if there are two: a chosen and a rejected answer to one prompt.
        desirable: True if the answer is a good one; None if the row does not specify it.
    """

    input_ids: list[int]
    labels: list[int]
    seq_lengths: list[int] | None = None
    desirable: bool | None = None

    @property
    def longest(self) -> int:
        """Number of tokens of its longest sequence."""
        return max(self.seq_lengths or [len(self.input_ids)])

    def cut(self, limit: int) -> Tokens:
        """Return the row with each sequence truncated to `limit` tokens."""
        ids, labels, sizes, start = [], [], [], 0
        for size in self.seq_lengths or [len(self.input_ids)]:
            end = start + min(size, limit)
            ids += self.input_ids[start:end]
            labels += self.labels[start:end]
            sizes.append(end - start)
            start += size
        return Tokens(ids, labels, sizes if self.seq_lengths else None, self.desirable)

    @property
    def without_target(self) -> bool:
        """Return True if one of its sequences has no targets."""
        start = 0
        for size in self.seq_lengths or [len(self.labels)]:
            if self.labels[start : start + size].count(IGNORED) == size:
                return True
            start += size
        return False


@dataclass(frozen=True)
class _Rendered:
    text: str
    learned: list[Span]
    special: bool
    """True if the tokenizer adds its special tokens; a template has already written them."""
    document: bool = False
    """True if it is one text without answers: end tokens inside it do not end it."""


class Encoder:
    """Encodes rows as tokens and labels.

    Args:
        tokenizer: fast tokenizer of the base model.
        end_tokens: tokens that end an answer; the first is appended to a completion whose template adds none.
        chat_template: template that replaces the base model's.
        loss_on: parts that are learned; None: decided by the row's form.

    Raises:
        InvalidSpecError: `chat_template` is not valid Jinja.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        end_tokens: Sequence[int],
        *,
        chat_template: str | None = None,
        loss_on: LossOn | None = None,
    ) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._ends = frozenset(end_tokens)
        self._end = end_tokens[0]
        self._template = ChatTemplate(tokenizer, chat_template)
        self._loss_on = loss_on

    def encode(self, row: Row) -> Tokens:
        """Return the tokens of a row, with labels on those that are learned.

        Raises:
            InvalidSpecError: there is no chat template, or the answers cannot be located in its output.
            DatasetInvalidError: the template rejects the row.
        """
        return self.encode_all([row])[0]

    def encode_all(self, rows: Sequence[Row]) -> list[Tokens]:
        """Return the tokens of each row, as `encode` does; encoding several at once is faster."""
        forms = {row.form for row in rows}
        if RowForm.PREFERENCE in forms:
            return [self._pair(row) for row in rows]
        if RowForm.UNPAIRED_PREFERENCE in forms:
            return [self._unpaired(row) for row in rows]
        rendered = [self._rendered(row) for row in rows]
        result: list[Tokens | None] = [None] * len(rows)
        for special in (False, True):
            indices = [index for index, row_text in enumerate(rendered) if row_text.special is special]
            if not indices:
                continue
            texts = [rendered[index].text for index in indices]
            for index, (ids, offsets) in zip(indices, self._tokens(texts, special=special), strict=True):
                result[index] = self._labelled(rendered[index], ids, offsets)
        return [tokens for tokens in result if tokens is not None]

    def _pair(self, row: Row) -> Tokens:
        """Encode a row of the form Preference: both answers, each after the same prompt."""
        chosen, rejected = (self._prompt_and_answer(row, answer) for answer in ("chosen", "rejected"))
        return Tokens(
            chosen.input_ids + rejected.input_ids,
            chosen.labels + rejected.labels,
            [len(chosen.input_ids), len(rejected.input_ids)],
        )

    def _unpaired(self, row: Row) -> Tokens:
        """Encode a row of the form UnpairedPreference."""
        encoded = self._prompt_and_answer(row, "completion")
        return Tokens(encoded.input_ids, encoded.labels, desirable=bool(row.value["label"]))

    def _prompt_and_answer(self, row: Row, answer: str) -> Tokens:
        """Encode a prompt and one of its answers, which ends with an end token."""
        prompt, ids = self._prompt_and_answer_ids(row, answer)
        labels = [*[IGNORED] * len(prompt), *ids]
        labels[0] = IGNORED  # nothing precedes the first token, so nothing can predict it
        return Tokens(prompt + ids, labels)

    def _rendered(self, row: Row) -> _Rendered:
        value = row.value
        if "text" in value:
            text = value["text"]
            return _Rendered(text, [(0, len(text))], special=True, document=True)
        if "messages" in value:
            loss_on = self._loss_on
            if loss_on is None:
                loss_on = LossOn.COMPLETION if row.form is RowForm.INSTRUCTION else LossOn.ASSISTANT_TURNS
            text, learned = self._template.answers(value, loss_on, row.where)
            return _Rendered(text, learned, special=False)
        whole = self._loss_on is LossOn.ALL_TOKENS
        prompt, text = self._texts(row, "completion")
        return _Rendered(text, [(0 if whole else len(prompt), len(text))], special=isinstance(value["prompt"], str))

    def _texts(self, row: Row, answer: str) -> tuple[str, str]:
        """Return the prompt, and the prompt with the answer."""
        value = row.value
        if isinstance(value["prompt"], str):
            return value["prompt"], value["prompt"] + value[answer]
        tools = {"tools": value["tools"]} if "tools" in value else {}
        prompt = self._template.prompt({"messages": value["prompt"], **tools}, row.where)
        text = self._template.render({"messages": value["prompt"] + value[answer], **tools}, row.where)
        if not text.startswith(prompt):
            raise InvalidSpecError(
                f"{row.where}: the chat template renders the prompt differently when an answer follows, so the"
                " answer cannot be located: set a dataset.chatTemplate that renders it the same"
            )
        return prompt, text

    def _prompt_and_answer_ids(self, row: Row, answer: str) -> tuple[list[int], list[int]]:
        """Tokenise prompt and answer separately, as in an engine: it receives the prompt and generates the answer."""
        prompt, text = self._texts(row, answer)
        special = isinstance(row.value["prompt"], str)
        ((prompt_ids, _),) = self._tokens([prompt], special=special)
        ((ids, _),) = self._tokens([text[len(prompt) :]], special=False)
        ends = [index for index, token in enumerate(ids) if token in self._ends]
        return prompt_ids, ids[: ends[-1] + 1] if ends else [*ids, self._end]

    def _tokens(self, texts: Sequence[str], *, special: bool) -> Iterable[tuple[list[int], Offsets]]:
        """Tokenise texts and return each token's position in its text, without tokens that the tokenizer appends."""
        with limited(f"the base model's tokenizer, on {len(texts)} texts,", _TOKENIZER_SECONDS):
            batch = self._backend.encode_batch(list(texts), add_special_tokens=special)
        for encoded in batch:
            ids: list[int] = encoded.ids
            offsets: Offsets = encoded.offsets
            while special and ids and offsets[-1][0] == offsets[-1][1]:
                del ids[-1], offsets[-1]
            yield ids, offsets

    def _labelled(self, rendered: _Rendered, ids: list[int], offsets: Offsets) -> Tokens:
        starts = [start for start, _ in rendered.learned]
        begins = [left for left, _ in offsets]
        first = [bisect_left(begins, start) for start in starts]
        if any(index and offsets[index - 1][1] > start for index, start in zip(first, starts, strict=True)):
            # A token across the boundary would hide the first word of an answer. A served prompt ends at the boundary
            # too.
            ids, offsets = self._tokens_of_passages(rendered, starts)
            begins = [left for left, _ in offsets]
            first = [bisect_left(begins, start) for start in starts]
        labels = [IGNORED] * len(ids)
        for index, (_, end) in zip(first, rendered.learned, strict=True):
            after = bisect_left(begins, end)
            if after > index:
                after = after if rendered.document else self._answer_end(ids, index, after)
                labels[index:after] = ids[index:after]
        begin = len(ids) - 1 if rendered.document else (first or [0])[-1]
        if rendered.learned and self._ends.isdisjoint(labels[begin:]):
            last = max((index for index, label in enumerate(labels) if label != IGNORED), default=len(ids) - 1)
            ids[last + 1 :] = [self._end]
            labels[last + 1 :] = [self._end]
        if labels:
            labels[0] = IGNORED  # nothing precedes the first token, so nothing can predict it
        return Tokens(ids, labels)

    def _answer_end(self, ids: list[int], begin: int, end: int) -> int:
        """Return the end of an answer: after its last end token, which may directly follow the answer's marks."""
        for index in range(end - 1, begin - 1, -1):
            if ids[index] in self._ends:
                return index + 1  # text that a template writes after it is never generated
        return end + 1 if end < len(ids) and ids[end] in self._ends else end

    def _tokens_of_passages(self, rendered: _Rendered, starts: list[int]) -> tuple[list[int], Offsets]:
        ids: list[int] = []
        offsets: Offsets = []
        for begin, end in itertools.pairwise([0, *starts, len(rendered.text)]):
            pieces = self._tokens([rendered.text[begin:end]], special=rendered.special and begin == 0)
            for more, spans in pieces:
                ids += more
                offsets += [(left + begin, right + begin) for left, right in spans]
        return ids, offsets
