"""Render chats as text with a chat template, and locate the answers in it."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from tunesmith.api.dataset import LossOn
from tunesmith_trainer.errors import DatasetInvalidError, InvalidSpecError
from tunesmith_trainer.process.activity import limited

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerFast

Span = tuple[int, int]
"""Start and end of a passage, in characters."""
Chat = dict[str, Any]
"""A chat: `messages`, and `tools` if there are any."""

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


class ChatTemplate:
    """The base model's chat template, or one that replaces it.

    Args:
        tokenizer: tokenizer of the base model.
        given: value of `dataset.chatTemplate`.

    Raises:
        InvalidSpecError: the template is not valid Jinja.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, given: str | None = None) -> None:
        self._name = "dataset.chatTemplate" if given else "the base model's chat template"
        self._special = dict(tokenizer.special_tokens_map)
        self._text: str | None = given or (str(tokenizer.get_chat_template()) if tokenizer.chat_template else None)
        self._marked = self._text is not None and _MARKS.search(self._text) is not None
        if self._text is None:
            return
        try:
            with limited(self._name):  # constant expressions in it are evaluated here
                compiled = _compile_jinja_template(self._text)
        except TemplateSyntaxError as error:
            raise InvalidSpecError(
                f"{self._name} is not a valid Jinja template: line {error.lineno}: {error.message}"
            ) from None
        # The same rows give the same tokens on every day, also for an attempt that resumes tomorrow.
        compiled.environment.globals["strftime_now"] = _TODAY.strftime

    def answers(self, chat: Chat, loss_on: LossOn, where: str) -> tuple[str, list[Span]]:
        """Return the text of a chat, and the spans of it that are learned.

        Raises:
            InvalidSpecError: there is no template, or the answers cannot be located in its output.
            DatasetInvalidError: the template rejects the chat.
        """
        messages = chat["messages"]
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        learned = [number for number in turns if messages[number].get("weight") != 0]
        if loss_on is LossOn.ALL_TOKENS:
            text = self.render(chat, where)
            return text, [(0, len(text))]
        if loss_on is LossOn.COMPLETION:
            learned = learned[-1:] if learned and learned[-1] == turns[-1] else []
        if self._marked:
            text, marks = self._render_marked(chat, where)
            if len(marks) != len(turns):
                raise InvalidSpecError(
                    f"{where}: {self._name} marks {len(marks)} passages with {{% generation %}} for {len(turns)}"
                    " answers of the assistant: put the marks around the content of every answer"
                )
            return text, [marks[turns.index(number)] for number in learned]
        text = self.render(chat, where)
        return text, [self._found(chat, text, number, where) for number in learned]

    def prompt(self, chat: Chat, where: str) -> str:
        """Return the text of a chat up to the start of the next answer."""
        return self.render(chat, where, prompt=True)

    def render(self, chat: Chat, where: str, *, prompt: bool = False) -> str:
        """Return the text of a chat.

        Raises:
            InvalidSpecError: there is no template, or it does not support tools.
            DatasetInvalidError: the template rejects the chat.
        """
        return str(self._rendered(chat, where, prompt=prompt, marked=False)[0][0])

    def _render_marked(self, chat: Chat, where: str) -> tuple[str, list[Span]]:
        texts, marks = self._rendered(chat, where, prompt=False, marked=True)
        return str(texts[0]), [(int(start), int(end)) for start, end in marks[0]]

    def _rendered(self, chat: Chat, where: str, *, prompt: bool, marked: bool) -> Any:  # noqa: ANN401 - of transformers
        if self._text is None:
            raise InvalidSpecError(
                "the base model has no chat template: use a chat model, set dataset.chatTemplate, or use a data set"
                " with 'prompt' and 'completion' or with 'text'"
            )
        if chat.get("tools") and "tools" not in self._text:
            raise InvalidSpecError(
                f"{where}: has tools, and {self._name} does not support them: use a base model whose template"
                " supports tools, or set dataset.chatTemplate"
            )
        messages = [
            {key: value for key, value in message.items() if key != "weight"} if "weight" in message else message
            for message in chat["messages"]
        ]
        if "tool_calls" not in self._text and any("tool_calls" in message for message in messages):
            raise InvalidSpecError(
                f"{where}: has tool calls, and {self._name} does not support them: use a base model whose template"
                " supports tools, or set dataset.chatTemplate"
            )
        try:
            with limited(f"{where}: {self._name}" if where else self._name):
                return render_jinja_template(
                    conversations=[messages],
                    tools=chat.get("tools") or None,
                    chat_template=self._text,
                    return_assistant_tokens_mask=marked,
                    add_generation_prompt=prompt,
                    **self._special,
                )
        except MemoryError:
            raise DatasetInvalidError(
                f"{where}: {self._name} ran out of memory: shorten the row, or simplify the template"
            ) from None
        except _TEMPLATE_FAULTS as error:
            text = " ".join(str(error).split())[:300]
            raise DatasetInvalidError(f"{where}: {self._name} rejects the row: {text}") from None

    def _found(self, chat: Chat, text: str, number: int, where: str) -> Span:
        """Locate the answer of a message: between the texts of the chat before it and including it."""
        messages = chat["messages"]
        last = number == len(messages) - 1
        before = self.render({**chat, "messages": messages[:number]}, where, prompt=True)
        through = text if last else self.render({**chat, "messages": messages[: number + 1]}, where)
        if text.startswith(through) and through.startswith(before):
            return len(before), len(through)
        if last:
            raise InvalidSpecError(
                f"{where}: {self._name} renders the question differently when an answer follows, so the answer cannot"
                " be located: set a dataset.chatTemplate with {% generation %} and {% endgeneration %} around the"
                " answer, or learn the whole text with dataset.lossOn AllTokens"
            )
        raise InvalidSpecError(
            f"{where}: {self._name} changes earlier turns when later ones follow, so the assistant's turns cannot be"
            " marked for the loss: learn only the last answer with dataset.lossOn Completion, or set a"
            " dataset.chatTemplate with {% generation %} and {% endgeneration %} around every answer"
        )


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
