"""Check a chat's messages and tools, and normalise them into the form that chat templates expect."""

from __future__ import annotations

import json
from typing import Any

from tunesmith.api.finetunejob_status import DropReason

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
"""Roles of messages with `from` and `value`."""
_KEYS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "weight"})
_MAY_BE_EMPTY = frozenset({"system", "tool"})


class RowError(ValueError):
    """A row that cannot be used.

    Args:
        text: description of the problem; follows the row's location in messages.
        reason: drop reason if the row contains nothing; None if its format differs from that of the other rows.
    """

    def __init__(self, text: str, reason: DropReason | None = None) -> None:
        super().__init__(text)
        self.reason = reason


def kind(value: object) -> str:
    """Return the type of a decoded value, in words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def text_of(value: object, what: str) -> str:
    """Return a text that is not blank."""
    if value is None:
        raise RowError(f"{what} is null, not a string", DropReason.NULL)
    if not isinstance(value, str):
        raise RowError(f"{what} is {kind(value)}, not a string")
    if not value.strip():
        raise RowError(f"{what} is empty", DropReason.EMPTY)
    return value


def chat_of(value: object, what: str) -> list[dict[str, Any]]:
    """Return messages that end with an answer."""
    messages = messages_of(value, what)
    last, first = messages[-1]["role"], messages[0]["role"]
    if last != "assistant":
        raise RowError(
            f"the last message has the role {last}: it must be the assistant's answer, which is what is learned"
        )
    if first == "assistant":
        raise RowError("the first message is the assistant's: a message of the user must precede it")
    return messages


def messages_of(value: object, what: str) -> list[dict[str, Any]]:
    """Return a list of messages, given as such or as JSON text."""
    if isinstance(value, str):
        value = _parsed(value, what)
    if value is None:
        raise RowError(f"{what} is null, not a list", DropReason.NULL)
    if not isinstance(value, list):
        raise RowError(f"{what} is {kind(value)}, not a list")
    if not value:
        raise RowError(f"{what} is empty", DropReason.EMPTY)
    return [_message(message, number) for number, message in enumerate(value, start=1)]


def tools_of(value: object) -> list[dict[str, Any]]:
    """Return the descriptions of tools, given as such or as JSON text; empty if there are no tools."""
    if isinstance(value, str):
        value = _parsed(value, "'tools'")
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("'tools' is not a list of objects, each the JSON schema of a function")
    return [_present(tool) for tool in value]


def _parsed(text: str, what: str) -> object:
    if not text.strip():
        raise RowError(f"{what} is empty", DropReason.EMPTY)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError(f"{what} is a string that is not JSON", DropReason.UNDECODABLE) from None


def _present(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Remove nulls: columnar files have one for every key that another row has."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value


def _message(message: object, number: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowError(f"message {number} is {kind(message)}, not an object with 'role' and 'content'")
    if "from" in message and "role" not in message:
        speaker = message["from"]
        message = {"role": _SHAREGPT_ROLES.get(str(speaker), speaker), "content": message.get("value")} | {
            key: value for key, value in message.items() if key not in {"from", "value"}
        }
    role, content = message.get("role"), message.get("content")
    if len(message) == 2 and type(content) is str and role in ROLES and (content.strip() or role in _MAY_BE_EMPTY):  # noqa: PLR2004 - the usual message
        return message
    return _unusual_message(message, number)


def _unusual_message(message: dict[str, Any], number: int) -> dict[str, Any]:
    for key in ("role", "content"):
        if key not in message and not (key == "content" and message.get("tool_calls")):
            raise RowError(f"message {number}: '{key}' is missing")
    unknown = sorted(str(key) for key, value in message.items() if key not in _KEYS and value is not None)
    if unknown:
        raise RowError(f"message {number}: unknown key '{unknown[0]}', expected one of {', '.join(sorted(_KEYS))}")
    role = message["role"]
    if role not in ROLES:
        raise RowError(f"message {number}: unknown role {role!r}, expected one of {', '.join(ROLES)}")
    result = {"role": role, "content": _content(message, number)}
    if message.get("tool_calls"):
        result["tool_calls"] = _calls(message["tool_calls"], number)
    for key in ("name", "tool_call_id", "reasoning_content"):
        if message.get(key) is not None:
            result[key] = text_of(message[key], f"message {number} ({role}): '{key}'")
    weight = message.get("weight")
    if weight is not None:
        if weight not in {0, 1} or role != "assistant":
            raise RowError(
                f"message {number} ({role}): 'weight' is {weight!r}; only the assistant's messages may have one, 0 or 1"
            )
        result["weight"] = int(weight)
    return result


def _content(message: dict[str, Any], number: int) -> str:
    role, content = message["role"], message.get("content")
    what = f"message {number} ({role}): 'content'"
    if isinstance(content, list):
        parts = [_present(part) for part in content]
        other = [part for part in parts if not isinstance(part, dict) or set(part) != {"type", "text"}]
        if other:
            raise RowError(f"{what} has a part that is not text, and only text can be learned: remove it")
        content = "\n".join(str(part["text"]) for part in parts)
    if not content and (role in _MAY_BE_EMPTY or message.get("tool_calls")) and (content is None or content == ""):
        return ""
    return text_of(content, what)


def _calls(calls: object, number: int) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as an object, as vLLM passes them to the template."""
    what = f"message {number}: 'tool_calls'"
    if isinstance(calls, str):
        calls = _parsed(calls, what)
    if not isinstance(calls, list):
        raise RowError(f"{what} is {kind(calls)}, not a list")
    result = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{what} has a call without 'function' and its 'name'")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments or "{}", f"{what}: 'arguments'")
        result.append(_present(call) | {"type": "function", "function": _present(function) | {"arguments": arguments}})
    return result
