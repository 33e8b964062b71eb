"""Check a chat's messages and tools, and normalise them into the form that chat templates expect."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from tunesmith.api.finetunejob_status import DropReason

ROLES = ("system", "developer", "user", "assistant", "tool")
_CALL = "function_call"
"""Role of a message whose text is the JSON of the assistant's tool calls."""
_OTHER_ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "model", "ai"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys((_CALL, "tool_call"), _CALL),
}
"""Roles of other layouts."""
_OTHER_KEYS = {
    "from": "role",
    "value": "content",
    "text": "content",
    "reasoning": "reasoning_content",
    "thinking": "reasoning_content",
}
"""Keys of other layouts."""
_FUNCTION_KEYS = {"input_schema": "parameters", "inputSchema": "parameters", "arguments": "parameters"}
"""Keys of functions in other layouts."""
_KEYS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "function_call"})
_WEIGHTS = frozenset({"weight", "loss", "train"})
"""Keys that state if an answer is learned."""
MEDIA_COLUMNS = frozenset({"image", "images", "audio", "audios", "video", "videos"})
"""Columns whose content would be missing from the text."""
_MEDIA = MEDIA_COLUMNS | {"files"}
"""Keys of messages whose content would be missing from the text."""
_METADATA = frozenset(
    {"id", "uuid", "index", "turn", "turn_id", "message_id", "parent_id", "created_at", "timestamp", "date", "lang"}
    | {"language", "model", "source", "annotations"}
)
"""Keys that describe a message and are never part of its text."""
_TURN = re.compile(r"(?im)^[^\w\n]{0,16}(?:user|human|assistant|gpt|bot):")
"""Start of a turn of a chat that is one text."""
_TRANSCRIPT_CHARACTERS = 10_000
_MAY_BE_EMPTY = frozenset({"system", "developer", "tool"})
_TEXT_TYPES = ("text", "input_text", "output_text")
"""Types of the parts of a message's content that are text."""
_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
MAX_ROW_CHARACTERS = 8 * 2**20
"""Highest number of characters of a row's JSON. Its tokens take about a hundred times as much memory."""
_MAX_IGNORED_KEYS = 64
_MAX_MESSAGES = 1024
"""Highest number of messages of a chat. Its answers are located one by one, each by rendering all that is before it."""
_MAX_PROBLEM, _KEPT_END = 800, 300
"""Characters of the description of a row's problem, and those of them from its end, which states the fix."""


class RowError(ValueError):
    """A row that cannot be used.

    Args:
        text: description of the problem; follows the row's location in messages.
        reason: drop reason if the row contains nothing to learn; None if its format differs from that of the other
            rows.
    """

    def __init__(self, text: str, reason: DropReason | None = None) -> None:
        # A name or a value of a row may be as large as the row.
        shown = text if len(text) <= _MAX_PROBLEM else f"{text[: _MAX_PROBLEM - _KEPT_END]}…{text[-_KEPT_END:]}"
        # They may contain half of a surrogate pair, which cannot be written.
        super().__init__(shown.encode("utf-8", "backslashreplace").decode("utf-8"))
        self.reason = reason


@dataclass
class Origin:
    """Origin of the rows that are checked, and the message keys that were ignored in them.

    Args:
        columnar: True if the row is from a columnar file: its structs have a null for each key that another row has.
        ignored: number of messages by ignored key.
    """

    columnar: bool = False
    ignored: dict[str, int] = field(default_factory=dict)

    def ignore(self, key: str) -> None:
        """Count a message with a key that is not used."""
        if key in self.ignored or len(self.ignored) < _MAX_IGNORED_KEYS:
            self.ignored[key] = self.ignored.get(key, 0) + 1

    def present(self, value: Any) -> Any:  # noqa: ANN401 - JSON
        """Return a nested value; without nulls if it is from a columnar file, where they only fill up structs."""
        return _without_nulls(value) if self.columnar else value


def kind(value: object) -> str:
    """Return the type of a decoded value, in words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def text_of(value: object, what: str) -> str:
    """Return a text that is not blank; a number is a text too."""
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"{what} is empty", DropReason.EMPTY)
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise RowError(f"{what} is null, not a string", DropReason.NULL)
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return str(value)
    raise RowError(f"{what} is {kind(value)}, not a string")


def optional_text_of(value: object, what: str) -> str | None:
    """Return a text, or None if it is null or blank."""
    blank = value is None or (isinstance(value, str) and not value.strip())
    return None if blank or (isinstance(value, float) and math.isnan(value)) else text_of(value, what)


def flag_of(value: object, what: str) -> bool:
    """Return a boolean, given as such, as 0 or 1, or as text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise RowError(f"{what} is null, not true or false", DropReason.NULL)
    flag = rating_of(value)
    if flag is None:
        raise RowError(f"{what} is {value!r}, not true or false")
    return flag


def rating_of(value: object) -> bool | None:
    """Return the boolean that a value stands for, as such, as 0 or 1, or as text; None if it stands for none."""
    return _FLAGS.get(str(value).strip().lower())


def check_media(row: dict[str, Any]) -> None:
    """Raise RowError if a row has an image, audio or a video in a column of its own."""
    name = next((name for name in sorted(MEDIA_COLUMNS) if row.get(name)), None)
    if name is not None:
        raise RowError(f"has '{name}', and only text can be learned: remove that column", DropReason.NOT_RENDERED)


def check_chat(messages: list[dict[str, Any]]) -> None:
    """Raise RowError unless the messages are a chat that ends with an answer to a question."""
    last, first = messages[-1]["role"], messages[0]["role"]
    if last != "assistant":
        raise RowError(
            f"the last message has the role {last}: it must be the assistant's answer, which is what is learned",
            DropReason.INCOMPLETE,
        )
    if first == "assistant":
        raise RowError(
            "the first message is the assistant's: a message of the user must precede it", DropReason.INCOMPLETE
        )


def require_no_transcript(value: object, what: str) -> None:
    """Raise RowError if a value is a text with a whole chat: where a turn in it ends is a matter of its author."""
    if isinstance(value, str) and len(_TURN.findall(value, 0, _TRANSCRIPT_CHARACTERS)) > 1:
        raise RowError(
            f"{what} is one text with a whole chat (USER: … ASSISTANT: …): convert it to a list of messages; the"
            " documentation of training data (docs/data.md) shows how"
        )


def is_message(value: object) -> bool:
    """Return True if it is one message, not an object with a list of each key's values."""
    return isinstance(value, dict) and isinstance(value.get("role", value.get("from")), str)


def messages_of(value: object, what: str, origin: Origin) -> list[dict[str, Any]]:
    """Return a list of messages, given as such, as one message, as JSON text, or as lists of each key's values."""
    if isinstance(value, str):
        require_no_transcript(value, what)
        value, origin = _parsed(value, what), _of_json(origin)
    if value is None:
        raise RowError(f"{what} is null, not a list", DropReason.NULL)
    if isinstance(value, dict):
        value = [value] if is_message(value) else _transposed(value)
    if not isinstance(value, list):
        raise RowError(f"{what} is {kind(value)}, not a list")
    if not value:
        raise RowError(f"{what} is empty", DropReason.EMPTY)
    if len(value) > _MAX_MESSAGES:
        raise RowError(
            f"{what} has {len(value)} messages, more than {_MAX_MESSAGES}: divide the chat into several rows",
            DropReason.OVERLONG,
        )
    return [_message(message, number, origin) for number, message in enumerate(value, start=1)]


def history_of(value: object, what: str, origin: Origin) -> list[dict[str, Any]]:
    """Return earlier turns as messages, given as such or as pairs of question and answer; empty if there are none."""
    if isinstance(value, str):
        if not value.strip():
            return []
        value, origin = _parsed(value, what), _of_json(origin)
    if not value:
        return []
    if not isinstance(value, list):
        raise RowError(f"{what} is {kind(value)}, not a list of messages or of pairs of question and answer")
    if not isinstance(value[0], list):
        return messages_of(value, what, origin)
    turns = []
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2:  # noqa: PLR2004 - question and answer
            raise RowError(f"{what} has an entry that is not a pair of question and answer")
        turns.append({"role": "user", "content": text_of(pair[0], f"a question of {what}")})
        turns.append({"role": "assistant", "content": text_of(pair[1], f"an answer of {what}")})
    return turns


def tools_of(value: object, origin: Origin) -> list[dict[str, Any]]:
    """Return the descriptions of tools, given as such or as JSON text; empty if there are no tools."""
    if isinstance(value, str):
        if not value.strip():
            return []
        value, origin = _parsed(value, "'tools'"), _of_json(origin)
    if value is None:
        return []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowError("'tools' is not a list of objects, each the JSON schema of a function")
    return [_tool(tool, origin) for tool in value]


def _tool(tool: Any, origin: Origin) -> dict[str, Any]:  # noqa: ANN401 - JSON
    """Return a tool in OpenAI's form, which an engine passes to the template."""
    if isinstance(tool, str):
        tool, origin = _parsed(tool, "'tools'"), _of_json(origin)
    if not isinstance(tool, dict):
        raise RowError("'tools' is not a list of objects, each the JSON schema of a function")
    present: dict[str, Any] = origin.present(tool)
    function = present.get("function", present)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("'tools' has an entry without 'function' and its 'name': only functions can be called")
    named = {_FUNCTION_KEYS.get(key, key): value for key, value in function.items() if key != "type"}
    for key in named.keys() - {"name", "description", "parameters", "strict"}:
        origin.ignore(f"tools.{key}")
    return {"type": "function", "function": named}


def _of_json(origin: Origin) -> Origin:
    """Return the origin of a value that is JSON text: nulls in it are as written."""
    return Origin(columnar=False, ignored=origin.ignored)


def _parsed(text: str, what: str) -> Any:  # noqa: ANN401 - JSON
    if not text.strip():
        raise RowError(f"{what} is empty", DropReason.EMPTY)
    if len(text) > MAX_ROW_CHARACTERS:
        raise RowError(f"{what} has {len(text)} characters, more than {MAX_ROW_CHARACTERS}", DropReason.OVERLONG)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError(f"{what} is a string that is not JSON", DropReason.UNDECODABLE) from None


def _without_nulls(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _transposed(value: dict[str, Any]) -> object:
    """Return a list of messages from lists of their values, as the `datasets` library stores a sequence of objects."""
    columns = {key: items for key, items in value.items() if items is not None}
    if not columns or not all(isinstance(items, list) for items in columns.values()):
        return value
    if len({len(items) for items in columns.values()}) > 1:
        return value
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def _message(message: object, number: int, origin: Origin) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowError(f"message {number} is {kind(message)}, not an object with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if len(message) == 2 and type(content) is str and role in ROLES and (content.strip() or role in _MAY_BE_EMPTY):  # noqa: PLR2004 - the usual message
        return message
    if len(message) == 2 and "from" in message:  # noqa: PLR2004 - the usual message of ShareGPT
        role, content = _OTHER_ROLES.get(str(message["from"]), message["from"]), message.get("value")
        if type(content) is str and role in ROLES and content.strip():
            return {"role": role, "content": content}
    return _unusual_message(_renamed(message), number, origin)


def _renamed(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with the usual keys and roles, without empty values, which have no meaning."""
    result = {key: value for key, value in message.items() if value is not None or key == "content"}
    for other, key in _OTHER_KEYS.items():
        if result.get(key) is None and other in message:
            result[key] = message[other]
            result.pop(other, None)
    role = result.get("role")
    if isinstance(role, str) and role not in ROLES:
        result["role"] = _OTHER_ROLES.get(role.strip().lower(), role.strip().lower())
        if result["role"] not in {*ROLES, _CALL}:
            result["role"] = role
    return result


def _unusual_message(message: dict[str, Any], number: int, origin: Origin) -> dict[str, Any]:
    calls = message.get("tool_calls") or message.get("function_call")
    for key in ("role", "content"):
        if key not in message and not (key == "content" and calls):
            raise RowError(f"message {number}: '{key}' is missing")
    role = message["role"]
    if role == _CALL:
        text = text_of(message["content"], f"message {number} ({role}): its text")
        calls = _parsed(text, f"message {number} ({role}): its text")
        message = {**message, "role": "assistant", "content": None}
        role = "assistant"
    if role not in ROLES:
        raise RowError(f"message {number}: unknown role {role!r}, expected one of {', '.join((*ROLES, *_OTHER_ROLES))}")
    result = {"role": role, "content": _content(message, number, origin, calls=bool(calls))}
    if calls:
        result["tool_calls"] = _calls(calls, number, origin)
    for key in ("name", "tool_call_id", "reasoning_content"):
        if optional := optional_text_of(message.get(key), f"message {number} ({role}): '{key}'"):
            result[key] = optional
    weight = _weight(message, number)
    _check_unused(message, number, origin)
    return result if weight is None else result | {"weight": weight}


def _check_unused(message: dict[str, Any], number: int, origin: Origin) -> None:
    """Count the keys that are not used, unless they are metadata; raise RowError if one has content."""
    for key, value in message.items():
        if key in _KEYS or key in _WEIGHTS or key in _METADATA or value in (None, "", [], {}):
            continue
        if key in _MEDIA:
            raise RowError(
                f"message {number}: has '{key}', and only text can be learned: remove it", DropReason.NOT_RENDERED
            )
        origin.ignore(key)


def _weight(message: dict[str, Any], number: int) -> int | None:
    """Return 0 or 1 for an answer whose weight is given; None if it is not."""
    role, weight = message["role"], message.get("weight")
    if weight is not None and str(weight).lower() not in _FLAGS:
        raise RowError(
            f"message {number} ({role}): 'weight' is {weight!r}; only the assistant's messages may have one, 0 or 1"
        )
    flags = {
        key: flag_of(message[key], f"message {number} ({role}): '{key}'")
        for key in ("weight", "loss", "train")
        if message.get(key) is not None
    }
    if role != "assistant":
        asked = next((key for key, flag in flags.items() if flag), None)
        if asked is not None:
            raise RowError(
                f"message {number} ({role}): '{asked}' is {message[asked]!r}; only the assistant's messages are"
                " learned: remove it"
            )
        return None
    if not all(flags.values()):
        return 0
    return 1 if "weight" in flags else None


def _content(message: dict[str, Any], number: int, origin: Origin, *, calls: bool) -> str | list[dict[str, str]]:
    """Return the text of a message, or several parts of it."""
    role, content = message["role"], message.get("content")
    what = f"message {number} ({role}): 'content'"
    if isinstance(content, list):
        texts = [_part(part, what, origin) for part in content]
        if len(texts) > 1 and any(text.strip() for text in texts):
            return [{"type": "text", "text": text} for text in texts]
        content = "".join(texts)
    if isinstance(content, dict) and role == "tool":
        return json.dumps(origin.present(content), ensure_ascii=False)
    if (role in _MAY_BE_EMPTY or calls) and (content is None or content == ""):
        return ""
    return text_of(content, what)


def _part(given: object, what: str, origin: Origin) -> str:
    """Return the text of a part of a message's content."""
    if isinstance(given, str):
        return given
    part = _without_nulls(given)
    text = part.get("text") if isinstance(part, dict) and part.get("type") in _TEXT_TYPES else None
    if not isinstance(text, str):
        raise RowError(
            f"{what} has a part that is not text, and only text can be learned: remove it", DropReason.NOT_RENDERED
        )
    for key in part.keys() - {"type", "text"}:
        if part[key]:
            origin.ignore(key)
    return text


def _calls(calls: object, number: int, origin: Origin) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as an object, as vLLM passes them to the template."""
    what = f"message {number}: 'tool_calls'"
    if isinstance(calls, str):
        calls, origin = _parsed(calls, what), _of_json(origin)
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        raise RowError(f"{what} is {kind(calls)}, not a list")
    result = []
    for call in calls:
        given = _parsed(call, what) if isinstance(call, str) else call
        function = given.get("function", given) if isinstance(given, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{what} has a call without 'function' and its 'name'")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _parsed(arguments if arguments.strip() else "{}", f"{what}: 'arguments'")
        else:
            arguments = origin.present(arguments)
        if not isinstance(arguments, dict | None):
            raise RowError(f"{what}: 'arguments' is {kind(arguments)}, not an object", DropReason.UNDECODABLE)
        own = {key: value for key, value in given.items() if value is not None}
        named = {key: value for key, value in function.items() if value is not None}
        if function is given:  # without OpenAI's envelope
            own = {key: value for key, value in own.items() if key == "id"}
            named = {key: value for key, value in named.items() if key not in {"id", "type"}}
        result.append(own | {"type": "function", "function": named | {"arguments": arguments or {}}})
    return result
