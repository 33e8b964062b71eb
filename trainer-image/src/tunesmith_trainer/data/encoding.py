"""Encode rows as tokens with labels on those that are learned."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from tunesmith.api.dataset import LossOn
from tunesmith_trainer.data.forms import RowForm
from tunesmith_trainer.data.parts import PartCheck
from tunesmith_trainer.data.template import ChatTemplate, ChatText, RowRejectedError
from tunesmith_trainer.errors import InvalidSpecError
from tunesmith_trainer.libraries import refused
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
class Encoded:
    """The result of encoding a row.

    Args:
        rows: its tokens; several rows if the chat template renders earlier answers differently later.
        problem: the reason why it cannot be used; empty if it can.
    """

    rows: list[Tokens]
    problem: str = ""


@dataclass(frozen=True)
class _Rendered:
    text: str
    learned: list[Span]
    special: bool
    """True if the tokenizer adds its special tokens; a template has already written them."""
    document: bool = False
    """True if it is one text without answers: end tokens inside it do not end it."""
    closing: str = ""
    """End token of the last answer if the text does not contain it."""


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
        self._ends = {int(token): str(tokenizer.decode([token])) for token in end_tokens}
        self._end = end_tokens[0]
        self._template = ChatTemplate(tokenizer, chat_template, end_tokens)
        self._parts = PartCheck(self._template)
        self._loss_on = loss_on

    def encode(self, row: Row) -> list[Tokens]:
        """Return the tokens of a row, with labels on those that are learned.

        Several rows if the chat template renders earlier answers differently once later messages follow.

        Raises:
            InvalidSpecError: there is no chat template, or the answers cannot be located in its output.
            RowRejectedError: the template rejects the row, or does not render a part of it.
        """
        (encoded,) = self.encode_all([row])
        if encoded.problem:
            raise RowRejectedError(encoded.problem)
        return encoded.rows

    def encode_all(self, rows: Sequence[Row]) -> list[Encoded]:
        """Return the tokens of each row, as `encode` does; encoding several at once is faster."""
        result = [Encoded([]) for _ in rows]
        rendered: list[tuple[int, _Rendered]] = []
        for index, row in enumerate(rows):
            try:
                if row.form is RowForm.PREFERENCE:
                    result[index] = Encoded([self._pair(row)])
                elif row.form is RowForm.UNPAIRED_PREFERENCE:
                    result[index] = Encoded([self._unpaired(row)])
                else:
                    rendered += [(index, text) for text in self._rendered(row)]
            except RowRejectedError as error:
                result[index] = Encoded([], str(error))
        for index, tokens in self._encoded(rendered):
            result[index].rows.append(tokens)
        return result

    def _encoded(self, rendered: list[tuple[int, _Rendered]]) -> Iterable[tuple[int, Tokens]]:
        """Yield the tokens of each text, with its index; texts with the same index keep their order."""
        encoded: list[list[Tokens]] = [[] for _ in rendered]
        for special in (False, True):
            numbers = [number for number, (_, text) in enumerate(rendered) if text.special is special]
            texts = [rendered[number][1].text for number in numbers]
            for number, (ids, offsets) in zip(numbers, self._tokens(texts, special=special), strict=True):
                encoded[number] = self._labelled(rendered[number][1], ids, offsets)
        for (index, _), rows in zip(rendered, encoded, strict=True):
            yield from ((index, tokens) for tokens in rows)

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
        """Encode a prompt and one of its answers, which ends with an end token.

        They are tokenised separately, as in an engine: it receives the prompt and generates the answer.
        """
        prompt = row.value["prompt"]
        if isinstance(prompt, str):
            text = prompt + row.value[answer]
            chat = ChatText(text, [(len(prompt), len(text))])
        else:
            chat = self._completed(row, answer)
        begin = chat.learned[0][0] if chat.learned else len(chat.text)
        ((prompt_ids, _),) = self._tokens([chat.text[:begin]], special=isinstance(prompt, str))
        ids, labels = self._generated(chat) if chat.learned else ([], [])
        labels = [*[IGNORED] * len(prompt_ids), *labels]
        labels[0] = IGNORED  # nothing precedes the first token, so nothing can predict it
        return Tokens(prompt_ids + ids, labels)

    def _completed(self, row: Row, answer: str) -> ChatText:
        """Return the text of messages with a prompt and one of its answers."""
        texts = self._texts(row, answer, None)
        if len(texts) > 1:
            raise InvalidSpecError(
                f"{row.where}: '{answer}' has several messages of the assistant, and {self._template.name} renders the"
                " earlier ones differently when later ones follow: move the earlier ones to 'prompt', or set a"
                " dataset.chatTemplate that always renders them the same"
            )
        return texts[0]

    def _generated(self, chat: ChatText) -> tuple[list[int], list[int]]:
        """Return tokens and labels of the text from the first learned answer to the end of the last one."""
        begin, end = chat.learned[0][0], chat.learned[-1][1]
        ((ids, offsets),) = self._tokens([chat.text[begin:end]], special=False)
        ends = [index for index, token in enumerate(ids) if token in self._ends]
        ids = ids[: ends[-1] + 1] if ends else [*ids, self._closing(chat.closing)]
        starts = [begin + left for left, _ in offsets]
        labels = [*[IGNORED] * (len(ids) - 1), ids[-1]]
        for left, right in chat.learned:
            inside = slice(bisect_left(starts, left), bisect_left(starts, right))
            labels[inside] = ids[inside]
        return ids, labels

    def _rendered(self, row: Row) -> list[_Rendered]:
        value = row.value
        if "text" in value:
            text = value["text"]
            return [_Rendered(text, [(0, len(text))], special=True, document=True)]
        if "messages" in value or isinstance(value["prompt"], list):
            texts = self._texts(row, "completion", self._loss_on)
            return [_Rendered(chat.text, chat.learned, special=False, closing=chat.closing) for chat in texts]
        text = value["prompt"] + value["completion"]
        begin = 0 if self._loss_on is LossOn.ALL_TOKENS else len(value["prompt"])
        return [_Rendered(text, [(begin, len(text))], special=True)]

    def _texts(self, row: Row, answer: str, loss_on: LossOn | None) -> list[ChatText]:
        """Return the texts of a row of messages, with the answers in them that are learned."""
        value, before = row.value, 0
        if "messages" not in value:
            before = len(value["prompt"])
            value = {"messages": value["prompt"] + value[answer], "tools": value.get("tools")}
        if loss_on is None:
            loss_on = LossOn.COMPLETION if row.form is RowForm.INSTRUCTION else LossOn.ASSISTANT_TURNS
        learned = _learned(value["messages"], loss_on, before)
        texts = self._template.texts(value, learned, row.where)
        self._parts.require_all(value, learned, row.where, texts)
        return texts

    def _tokens(self, texts: Sequence[str], *, special: bool) -> Iterable[tuple[list[int], Offsets]]:
        """Tokenise texts and return each token's position in its text, without tokens that the tokenizer appends."""
        with (
            limited(f"the base model's tokenizer, on {len(texts)} texts,", _TOKENIZER_SECONDS),
            refused("the base model's tokenizer cannot encode the rows"),
        ):
            batch = self._backend.encode_batch(list(texts), add_special_tokens=special)
        for encoded in batch:
            ids: list[int] = encoded.ids
            offsets: Offsets = encoded.offsets
            while special and ids and offsets[-1][0] == offsets[-1][1]:
                del ids[-1], offsets[-1]
            yield ids, offsets

    def _labelled(self, rendered: _Rendered, ids: list[int], offsets: Offsets) -> list[Tokens]:
        """Label the tokens of a text.

        A token across the start of an answer would hide its first word, and an engine tokenises the prompt without the
        answer. So the text is tokenised in two parts there. It can only be one such place: the prompts of later answers
        contain that text in one part, so they are other rows.
        """
        across = [span for span in rendered.learned if _is_inside_a_token(span[0], offsets)]
        if not across:
            return [self._labelled_tokens(rendered, ids, offsets)]
        last = rendered.learned[-1]
        rows = [
            self._in_two_parts(replace(rendered, text=rendered.text[:end], learned=[(start, end)], closing=""))
            for start, end in across
            if (start, end) != last
        ]
        rest = replace(rendered, learned=[span for span in rendered.learned if span == last or span not in across])
        return [*rows, self._in_two_parts(rest) if last in across else self._labelled_tokens(rest, ids, offsets)]

    def _in_two_parts(self, rendered: _Rendered) -> Tokens:
        """Tokenise a text in two parts, of which the second begins with the last answer."""
        begin = rendered.learned[-1][0]
        ((ids, offsets),) = self._tokens([rendered.text[:begin]], special=rendered.special)
        ((more, spans),) = self._tokens([rendered.text[begin:]], special=False)
        moved = [(left + begin, right + begin) for left, right in spans]
        return self._labelled_tokens(rendered, ids + more, offsets + moved)

    def _labelled_tokens(self, rendered: _Rendered, ids: list[int], offsets: Offsets) -> Tokens:
        begins = [left for left, _ in offsets]
        first = [bisect_left(begins, start) for start, _ in rendered.learned]
        labels = [IGNORED] * len(ids)
        for index, (_, end) in zip(first, rendered.learned, strict=True):
            after = bisect_left(begins, end)
            if after > index:
                after = after if rendered.document else self._answer_end(ids, index, after)
                labels[index:after] = ids[index:after]
        begin = len(ids) - 1 if rendered.document else (first or [0])[-1]
        if rendered.learned and self._ends.keys().isdisjoint(labels[begin:]):
            last = max((index for index, label in enumerate(labels) if label != IGNORED), default=len(ids) - 1)
            closing = self._closing(rendered.closing)
            ids[last + 1 :] = [closing]
            labels[last + 1 :] = [closing]
        if labels:
            labels[0] = IGNORED  # nothing precedes the first token, so nothing can predict it
        return Tokens(ids, labels)

    def _closing(self, text: str) -> int:
        """Return the end token with this text; the first end token if it is empty."""
        return next((token for token, known in self._ends.items() if known == text), self._end)

    def _answer_end(self, ids: list[int], begin: int, end: int) -> int:
        """Return the end of an answer: after its last end token. An engine generates nothing after it."""
        return next((index + 1 for index in range(end - 1, begin - 1, -1) if ids[index] in self._ends), end)


def _learned(messages: Sequence[dict[str, Any]], loss_on: LossOn, begin: int) -> list[int] | None:
    """Return the numbers of the messages that are learned, from `begin` on; None: the whole text is."""
    if loss_on is LossOn.ALL_TOKENS:
        return None
    turns = [index for index, message in enumerate(messages) if index >= begin and message["role"] == "assistant"]
    if loss_on is LossOn.COMPLETION:
        turns = turns[-1:]
    return [index for index in turns if messages[index].get("weight") != 0]


def _is_inside_a_token(place: int, offsets: Offsets) -> bool:
    index = bisect_left(offsets, place, key=itemgetter(0))
    return index > 0 and offsets[index - 1][1] > place
