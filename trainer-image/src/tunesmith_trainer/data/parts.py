"""Find the parts of a chat that a chat template does not render."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith_trainer.data.served import content_texts
from tunesmith_trainer.data.template import RowRejectedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tunesmith_trainer.data.served import Chat
    from tunesmith_trainer.data.template import ChatTemplate, ChatText

_MAX_SHAPES = 10_000
"""Number of shapes of chats whose result is kept."""
_SEPARATORS = re.compile(r"(?:\s|<[^<>\s]*>)+")
"""Whitespace, which templates trim, and tags such as `<think>`, which they rewrite."""


@dataclass(frozen=True)
class _Part:
    """A part of a chat.

    Args:
        message: number of its message; None: it belongs to the whole chat.
        what: its name, for people.
        text: its text.
        reasoning: True if it is reasoning, which many templates omit from earlier answers.
    """

    message: int | None
    what: str
    text: str
    reasoning: bool = False


class PartCheck:
    """Finds the parts of chats that a template does not render.

    A chat is rendered with a unique text in place of each part. Templates treat chats of the same shape (the same
    roles, keys, and numbers of calls and tools) alike, so this is done once per shape.

    Args:
        template: the chat template.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._omitted: dict[Any, list[_Part] | None] = {}

    def require_all(self, chat: Chat, learned: Sequence[int] | None, where: str, texts: Sequence[ChatText]) -> None:
        """Raise RowRejectedError if a part of a chat is not rendered where it is needed.

        Args:
            chat: a chat that the template renders.
            learned: numbers of the messages that are learned; None: the whole text is.
            where: file and line of the row.
            texts: the texts in which they are learned.
        """
        shape = (_shape(chat), None if learned is None else tuple(learned))
        if shape not in self._omitted:
            if len(self._omitted) >= _MAX_SHAPES:
                self._omitted.clear()
            self._omitted[shape] = self._omitted_in_shape(chat, learned)
        omitted = self._omitted[shape]
        if omitted is None:
            omitted = self._missing(*_taken_apart(chat, str), learned)
        for text in () if omitted else texts:
            for number, (start, end) in zip(text.messages, text.learned, strict=False):
                message = chat["messages"][number]
                own = [_Part(number, "'content'", text) for text in content_texts(message["content"])]
                own.append(_Part(number, "'reasoning_content'", message.get("reasoning_content") or ""))
                omitted = omitted or [part for part in own if not _shows(text.text[start:end], part.text)]
        if omitted:
            place = omitted[0].message
            message = "" if place is None else f"message {place + 1} ({chat['messages'][place]['role']}): "
            raise RowRejectedError(f"{where}: {message}{omitted[0].what} is not rendered by {self._template.name}")

    def _omitted_in_shape(self, chat: Chat, learned: Sequence[int] | None) -> list[_Part] | None:
        """Return the parts that are not rendered in chats of this shape; None if the shape alone does not decide it."""
        numbers = itertools.count()
        try:
            return self._missing(*_taken_apart(chat, lambda _: f"zq{next(numbers)}part"), learned)
        except RowRejectedError:
            return None

    def _missing(self, chat: Chat, parts: list[_Part], learned: Sequence[int] | None) -> list[_Part]:
        texts = self._template.texts(chat, learned, "")
        if len(texts) == 1 or learned is None:
            needed = (part for part in parts if not part.reasoning or learned is None or part.message in learned)
            return [part for part in needed if not _shows(texts[0].text, part.text)]
        missing = []
        for number in learned:
            prompt, answer = self._template.answer(chat, number, "")
            earlier = (part for part in parts if part.message is None or (part.message < number and not part.reasoning))
            missing += [part for part in earlier if not _shows(prompt, part.text)]
            missing += [part for part in parts if part.message == number and not _shows(answer, part.text)]
        return missing


def _shows(text: str, part: str) -> bool:
    """Return True if a text contains a part: as it is, as JSON, or with other whitespace and tags."""
    if part.strip() in text or json.dumps(part)[1:-1] in text or json.dumps(part, ensure_ascii=False)[1:-1] in text:
        return True
    place = 0
    for piece in filter(None, _SEPARATORS.split(part)):
        place = text.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True


def _shape(chat: Chat) -> tuple[Any, ...]:
    """Return the properties of a chat on which the rendering of its parts depends."""
    called: set[str] = set()
    messages: list[tuple[Any, ...]] = []
    for message in chat["messages"]:
        content = message["content"]
        size: int | bool = bool(content) if isinstance(content, str) else len(content)
        if len(message) == 2:  # noqa: PLR2004 - the usual message
            messages.append((message["role"], size))
            continue
        calls = message.get("tool_calls") or []
        called.update(call["function"]["name"] for call in calls)
        arguments = [
            tuple(isinstance(value, str) for value in given.values()) if isinstance(given, dict) else type(given)
            for given in (call["function"].get("arguments") for call in calls)
        ]
        keys = frozenset(key for key, value in message.items() if value and key != "weight")
        messages.append((message["role"], size, keys, tuple(arguments), message.get("name") in called))
    tools = [(frozenset(tool["function"]), len(_properties(tool["function"]))) for tool in chat.get("tools") or ()]
    return tuple(messages), tuple(tools)


def _taken_apart(chat: Chat, write: Callable[[str], str]) -> tuple[Chat, list[_Part]]:
    """Return a chat with each of its parts written by `write`, and these parts."""
    parts: list[_Part] = []

    def part(number: int | None, what: str, text: str, *, reasoning: bool = False) -> str:
        parts.append(_Part(number, what, write(text), reasoning))
        return parts[-1].text

    called: dict[str, str] = {}
    messages = []
    for number, given in enumerate(chat["messages"]):
        message = dict(given)
        content = message["content"]
        if isinstance(content, str):
            message["content"] = part(number, "'content'", content) if content else ""
        else:
            message["content"] = [
                piece | {"text": part(number, "'content'", piece["text"])} if piece["text"] else piece
                for piece in content
            ]
        if message.get("reasoning_content"):
            message["reasoning_content"] = part(
                number, "'reasoning_content'", message["reasoning_content"], reasoning=True
            )
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                function = dict(call["function"])
                name, arguments = function["name"], function.get("arguments")
                function["name"] = called[name] = part(number, "'tool_calls'", name)
                if isinstance(arguments, dict):
                    function["arguments"] = {
                        part(number, "'tool_calls'", key): (
                            part(number, "'tool_calls'", value) if isinstance(value, str) else value
                        )
                        for key, value in arguments.items()
                    }
                calls.append(call | {"function": function})
            message["tool_calls"] = calls
        if message.get("name"):  # the name of a called function is rendered with its call
            message["name"] = called.get(message["name"]) or part(number, "'name'", message["name"])
        messages.append(message)
    tools = [_tool(tool, lambda text: part(None, "'tools'", text)) for tool in chat.get("tools") or ()]
    return {"messages": messages} | ({"tools": tools} if tools else {}), parts


def _tool(tool: dict[str, Any], part: Callable[[str], str]) -> dict[str, Any]:
    function = dict(tool["function"])
    for key in ("name", "description"):
        if isinstance(function.get(key), str) and function[key]:
            function[key] = part(function[key])
    properties = _properties(function)
    if properties:
        names = {name: part(name) for name in properties}
        parameters = function["parameters"] | {"properties": {names[name]: value for name, value in properties.items()}}
        if isinstance(parameters.get("required"), list):
            parameters["required"] = [names.get(name, name) for name in parameters["required"]]
        function["parameters"] = parameters
    return tool | {"function": function}


def _properties(function: dict[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return properties if isinstance(properties, dict) else {}
