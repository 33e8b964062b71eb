"""Render chats as text with a chat template, and locate the answers in it."""

from __future__ import annotations

import functools
import itertools
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import _compile_jinja_template, _render_with_assistant_indices

from tunesmith_trainer.data import reasoning
from tunesmith_trainer.data.messages import MAX_ROW_CHARACTERS
from tunesmith_trainer.data.served import ServedForm
from tunesmith_trainer.errors import DatasetInvalidError, InvalidSpecError
from tunesmith_trainer.libraries import refused
from tunesmith_trainer.process.activity import limited

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from transformers import PreTrainedTokenizerFast

    from tunesmith_trainer.data.served import Chat, Message

Span = tuple[int, int]
"""Start and end of a passage, in characters."""

PROBE = "zq0qz"
"""Text of a made-up message that follows an answer; no chat contains it."""
_TAIL = 4
"""Characters by which the end of an answer is found in a text that renders its start differently."""
_CONTEXT = 32
"""Characters before an answer by which its start is found in a text that begins in another way."""
_PARTS_AT_ONCE = 64
"""Parts of a text that are in memory before its length is checked."""
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATE_FAULTS = (
    TemplateError,
    ArithmeticError,  # division by zero, and ranges longer than Jinja's sandbox allows
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
_TODAY = datetime(2024, 7, 26, tzinfo=UTC)
"""Date for templates that print one: the default of Llama's own templates."""


@contextmanager
def _untranslatable(name: str) -> Iterator[None]:
    try:
        yield
    except (ArithmeticError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        raise InvalidSpecError(f"{name} cannot be compiled ({text}): simplify it") from None


def _refuse_chance(*_: object, **__: object) -> str:
    """Replace what Jinja chooses at random."""
    raise TemplateError("random and lipsum render another text each time: remove them")


def _bounded(parts: Iterable[str]) -> Iterator[str]:
    """Yield the parts of a text; raise TemplateError if they are too long for the memory.

    It reads no part ahead: transformers locates answers by the parts that were read when their block begins and ends.
    """
    size = 0
    for part in parts:
        size += len(part)
        if size > MAX_ROW_CHARACTERS:
            raise TemplateError(f"its text has more than {MAX_ROW_CHARACTERS} characters")
        yield part


def _joined(parts: Iterable[str]) -> str:
    iterator = iter(parts)
    some = list(itertools.islice(iterator, _PARTS_AT_ONCE))
    if len(some) < _PARTS_AT_ONCE and sum(map(len, some)) <= MAX_ROW_CHARACTERS:
        return "".join(some)  # the usual case, in which a generator would take most of the time
    return "".join(_bounded(itertools.chain(some, iterator)))


class RowRejectedError(DatasetInvalidError):
    """The chat template rejects a row, or does not render a part of it."""


@dataclass(frozen=True)
class ChatText:
    """A chat as text, with the answers in it that are learned.

    Args:
        text: the text of the chat.
        learned: spans of the answers that are learned, ascending.
        messages: number of the message of each of these answers.
        closing: end token of the last of these answers if the text does not contain it: some templates write it only as
            the start of the next message. Empty if there is no such token.
    """

    text: str
    learned: list[Span]
    messages: Sequence[int] = ()
    closing: str = ""


@dataclass(frozen=True)
class _Answer:
    """An answer after the prompt that an engine receives for it.

    Args:
        number: number of its message.
        prompt: text of the messages before it, up to the start of the answer.
        through: text of the messages up to and including it, while it is the newest one.
        end: end of the generated text in `through`.
        ended: True if the generated text contains an end token.
        closing: as in `ChatText`.
    """

    number: int
    prompt: str
    through: str
    end: int
    ended: bool
    closing: str = ""

    @property
    def span(self) -> Span:
        """The generated text, in `through`."""
        return len(self.prompt), self.end


class ChatTemplate:
    """The base model's chat template, or one that replaces it.

    Args:
        tokenizer: tokenizer of the base model.
        given: value of `dataset.chatTemplate`.
        end_tokens: tokens that end an answer.

    Raises:
        InvalidSpecError: the template is not valid Jinja.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, given: str | None = None, end_tokens: Sequence[int] = ()
    ) -> None:
        self.name = "dataset.chatTemplate" if given else "the base model's chat template"
        # Plain data, as a template must not reach the methods of objects. Rows are from JSON or columns.
        self._special: dict[str, Any] = json.loads(json.dumps(dict(tokenizer.special_tokens_map), default=str))
        self._text: str | None = given or (str(tokenizer.get_chat_template()) if tokenizer.chat_template else None)
        self._marked = self._text is not None and _MARKS.search(self._text) is not None
        with refused("the base model's tokenizer cannot decode its end tokens"):
            decoded = [str(tokenizer.decode([token])) for token in end_tokens]
        ends = sorted(filter(None, decoded), key=len, reverse=True)
        self._ends = re.compile("|".join(map(re.escape, ends)) or r"(?!)")
        if self._text is None:
            return
        try:
            # Constant expressions in it are evaluated here, and it becomes Python code.
            with limited(self.name), _untranslatable(self.name):
                self._compiled: Any = _compile_jinja_template(self._text)
                self._form = ServedForm.of(self._text)
        except TemplateSyntaxError as error:
            raise InvalidSpecError(
                f"{self.name} is not a valid Jinja template: line {error.lineno}: {error.message}"
            ) from None
        # The same rows give the same tokens on every day, also for an attempt that resumes tomorrow.
        environment = self._compiled.environment
        environment.globals["strftime_now"] = _TODAY.strftime
        environment.concat = _joined
        # Of the class, since compiled templates are cached.
        generate = functools.partial(type(self._compiled).generate, self._compiled)
        self._compiled.generate = lambda **variables: _bounded(generate(**variables))
        environment.globals["lipsum"] = environment.filters["random"] = _refuse_chance
        # Each rendering copies them, which takes longer from a chain of dictionaries than the usual chat's rendering.
        self._compiled.globals = dict(self._compiled.globals)

    def texts(self, chat: Chat, learned: Sequence[int] | None, where: str) -> list[ChatText]:
        """Return the text of a chat with the answers that are learned.

        A template may render an answer differently once other messages follow it: many omit its reasoning. Then there
        are several texts, each with the answers that it renders as an engine generates them: after the same prompt,
        with the same end.

        Args:
            chat: the chat.
            learned: numbers of the messages that are learned, ascending; None: the whole text is.
            where: file and line of the row.

        Raises:
            InvalidSpecError: there is no template, or the answers cannot be located in its output.
            RowRejectedError: the template rejects the chat.
        """
        with self._limited(where):
            return self._texts(self._served(chat), learned, where)

    def _texts(self, chat: Chat, learned: Sequence[int] | None, where: str) -> list[ChatText]:
        if learned is None:
            text = self._render(chat, where)
            return [ChatText(text, [(0, len(text))])]
        answers = [self._answer(chat, number, where) for number in reversed(learned)]
        newest = len(learned) > 0 and learned[-1] == len(chat["messages"]) - 1
        texts: list[tuple[str, list[_Answer]]] = [(answers[0].through if newest else self._render(chat, where), [])]
        for answer in answers:
            placed = next((others for text, others in texts if self._fits(answer, text)), None)
            if placed is None:
                texts.append((answer.through, [answer]))
            else:
                placed.insert(0, answer)
        return [
            ChatText(
                text,
                [self._with_end(text, answer.span) for answer in placed],
                [answer.number for answer in placed],
                placed[-1].closing,
            )
            for text, placed in reversed(texts)
            if placed
        ] or [ChatText(texts[0][0], [])]

    def answer(self, chat: Chat, number: int, where: str) -> tuple[str, str]:
        """Return the prompt that an engine receives for an answer of a chat, and the text that it then generates."""
        with self._limited(where):
            answer = self._answer(self._served(chat), number, where)
        return answer.prompt, answer.through[len(answer.prompt) : answer.end]

    def prompt(self, chat: Chat, where: str) -> str:
        """Return the text of a chat up to the start of the next answer."""
        with self._limited(where):
            return self._render(self._served(chat), where, prompt=True)

    def _limited(self, where: str) -> AbstractContextManager[None]:
        """Limit the time of all renderings of a row: once, as the usual one takes only a few microseconds."""
        return limited(f"{where}: {self.name}" if where else self.name)

    def _served(self, chat: Chat) -> Chat:
        """Return a chat in the form that the template receives.

        Raises:
            InvalidSpecError: there is no template.
        """
        if self._text is None:
            raise InvalidSpecError(
                "the base model has no chat template: use a chat model, set dataset.chatTemplate, or use a data set"
                " with 'prompt' and 'completion' or with 'text'"
            )
        return self._form.chat(chat)

    def _render(self, chat: Chat, where: str, *, prompt: bool = False) -> str:
        """Return the text of a chat in the form that the template receives.

        Raises:
            RowRejectedError: the template rejects the chat.
        """
        return str(self._run(self._compiled.render, chat, where, prompt=prompt))

    def _run(self, render: Callable[..., Any], chat: Chat, where: str, *, prompt: bool) -> Any:  # noqa: ANN401 - of jinja2
        """Render a chat with a method of the compiled template."""
        try:
            return render(
                messages=self._form.roles(chat["messages"]),
                tools=chat.get("tools"),
                documents=None,
                add_generation_prompt=prompt,
                **self._special,
            )
        except MemoryError:
            raise DatasetInvalidError(
                f"{where}: {self.name} ran out of memory: shorten the row, or simplify the template"
            ) from None
        except _TEMPLATE_FAULTS as error:
            text = " ".join(str(error).split())[:300]
            raise RowRejectedError(f"{where}: {self.name} rejects the row: {text}") from None

    def _answer(self, chat: Chat, number: int, where: str) -> _Answer:
        """Locate the answer of a message, between the prompt for it and the first token that ends it."""
        newest = chat | {"messages": chat["messages"][: number + 1]}
        if self._marked:
            return self._marked_answer(newest, where)
        earlier = chat | {"messages": chat["messages"][:number]}
        message = chat["messages"][number]
        prompt, through = self._render(earlier, where, prompt=True), self._render(newest, where)
        rendered = self._generated(earlier, message, prompt, through, where)
        through = prompt + rendered
        ends = [match.end() for match in self._ends.finditer(through, len(prompt))]
        if len(ends) == 1:
            return _Answer(number, prompt, through, ends[0], ended=True)
        following = self._continued(newest, where)
        if not ends:
            closing = self._closing(through, following)
            return _Answer(number, prompt, through, len(through), ended=False, closing=closing)
        # Text that differs as soon as another message follows ends the chat, not the answer; unless the answer has no
        # other end.
        shared = _shared_length(through, following)
        within = [end for end in ends if end <= shared]
        end = within[-1] if within else next(end for end in ends if end > shared)
        return _Answer(number, prompt, through, end, ended=True)

    def _generated(self, earlier: Chat, message: Message, prompt: str, through: str, where: str) -> str:
        """Return the text that follows the prompt for an answer, as a model generates it."""
        if through.startswith(prompt):
            return reasoning.with_reasoning(message, through[len(prompt) :])
        opened = reasoning.opening(prompt)
        if opened is not None and through.startswith(prompt[: opened.start()]):
            return reasoning.after_opening(opened, message, through[opened.start() :])
        return self._moved_answer(earlier, prompt, through, where)

    def _marked_answer(self, chat: Chat, where: str) -> _Answer:
        """Locate the last answer of a chat by the template's marks."""
        render = functools.partial(_render_with_assistant_indices, self._compiled)
        text, marks = self._run(render, chat, where, prompt=False)
        turns = sum(message["role"] == "assistant" for message in chat["messages"])
        if len(marks) != turns:
            raise InvalidSpecError(
                f"{where}: {self.name} marks {len(marks)} passages with {{% generation %}} for {turns} answers of the"
                " assistant: put the marks around the content of every answer"
            )
        start, end = self._with_end(text, (int(marks[-1][0]), int(marks[-1][1])))
        return _Answer(len(chat["messages"]) - 1, text[:start], text, end, ended=True)

    def _moved_answer(self, earlier: Chat, prompt: str, through: str, where: str) -> str:
        """Return the answer of a text that begins in another way than the prompt for the answer.

        Some templates omit the reasoning of a tool call as soon as the final answer follows.

        Args:
            earlier: the messages before the answer.
            prompt: their text, up to the start of the answer.
            through: their text with the answer.
            where: file and line of the row.
        """
        before = self._render(earlier, where)
        start = prompt[max(0, len(before) - _CONTEXT) :]
        if len(before) < len(prompt) and prompt.startswith(before) and through.count(start) == 1:
            return through[through.index(start) + len(start) :]
        raise InvalidSpecError(
            f"{where}: {self.name} renders the question differently when an answer follows, so the answer cannot be"
            " located: set a dataset.chatTemplate with {% generation %} and {% endgeneration %} around the answer, or"
            " learn the whole text with dataset.lossOn AllTokens"
        )

    def _continued(self, chat: Chat, where: str) -> str:
        """Return the text of a chat with a made-up message after it; of the chat if the template rejects that one."""
        messages = chat["messages"]
        calls = messages[-1].get("tool_calls")
        if calls:
            identifier = {"tool_call_id": calls[0]["id"]} if "id" in calls[0] else {}
            after = {"role": "tool", "content": PROBE, "name": calls[0]["function"]["name"], **identifier}
        else:
            after = {"role": "user", "content": PROBE}
        try:
            return self._render(chat | {"messages": [*messages, self._form.message(after)]}, where)
        except RowRejectedError:
            return self._render(chat, where)

    def _closing(self, through: str, following: str) -> str:
        """Return the end token with which the message after an answer begins; empty if it begins with none."""
        tail = through[-_TAIL:]
        found = [
            match.group()
            for match in self._ends.finditer(following, 0, max(0, following.rfind(PROBE)))
            if following.endswith(tail, 0, match.start())
        ]
        return found[-1] if found else ""

    def _with_end(self, text: str, span: Span) -> Span:
        """Return the span with the end token that directly follows it, if there is one."""
        start, end = span
        after = self._ends.match(text, end)
        return span if after is None or self._ends.search(text, start, end) else (start, after.end())

    def _fits(self, answer: _Answer, text: str) -> bool:
        """Return True if a text contains an answer after its prompt, with its end token or at the end of the text."""
        if not text.startswith(answer.through[: answer.end]):
            return False
        return answer.ended or text == answer.through or self._ends.match(text, answer.end) is not None


def _shared_length(left: str, right: str) -> int:
    """Return the number of characters with which both texts begin."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(left), len(right)))


def same_prompts(tokenizer: PreTrainedTokenizerFast, given: str) -> bool:
    """Return True if the given template renders prompts as the base model's does; then it only adds marks."""
    if not tokenizer.chat_template:
        return False
    chats: Sequence[Chat] = [
        {"messages": [{"role": "user", "content": "One?"}]},
        {
            "messages": [
                {"role": "user", "content": "One?"},
                {"role": "assistant", "content": "Uno."},
                {"role": "user", "content": "Two?"},
            ]
        },
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}]},
    ]
    own, replaced = ChatTemplate(tokenizer), ChatTemplate(tokenizer, given)
    return _prompts(own, chats) == _prompts(replaced, chats)


def _prompts(template: ChatTemplate, chats: Sequence[Chat]) -> str:
    texts: list[str | None] = []
    for chat in chats:
        try:
            texts.append(template.prompt(chat, ""))
        except DatasetInvalidError:
            texts.append(None)
    return json.dumps(texts)
