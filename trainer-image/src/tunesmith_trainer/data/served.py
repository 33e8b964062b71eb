"""Give chats the form in which vLLM passes them to a chat template.

The rules are those of vLLM 0.32: `vllm/renderers/hf.py` and `chat_utils.py`. A test compares the prompts with vLLM's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from transformers.utils.chat_template_utils import _compile_jinja_template

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

Message = dict[str, Any]
Chat = dict[str, Any]
"""A chat: `messages`, and `tools` if there are any."""

_KEYS = {
    "assistant": ("role", "content", "name", "tool_calls", "reasoning_content"),
    "tool": ("role", "content", "name", "tool_call_id"),
}
"""Keys that reach the template, by role."""
_OTHER_KEYS = ("role", "content", "name")
_FUNCTION_KEYS = ("name", "description", "parameters")
"""Keys of a function, in this order and null if they are absent."""


def content_texts(content: str | Sequence[Message] | None) -> list[str]:
    """Return the texts of a message's content, which is a text or a list of parts with a text each."""
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content or ()]


@dataclass(frozen=True)
class ServedForm:
    """Properties of a template that decide the form of the chats that it receives.

    Args:
        parts: True if it receives content as a list of parts; otherwise as text.
        developer: True if it receives the role developer; otherwise its messages are the system's.
    """

    parts: bool
    developer: bool

    @classmethod
    def of(cls, template: str) -> ServedForm:
        """Return the form for a template that is valid Jinja."""
        return cls(_takes_parts(template), '"developer"' in template or "'developer'" in template)

    def chat(self, chat: Chat) -> Chat:
        """Return a chat with its messages and tools in this form."""
        served: Chat = {"messages": [self.message(message) for message in chat["messages"]]}
        if chat.get("tools"):
            served["tools"] = [_tool(tool) for tool in chat["tools"]]
        return served

    def message(self, message: Message) -> Message:
        """Return a message in this form."""
        content, role = message["content"], message["role"]
        if not self.parts and len(message) == 2 and isinstance(content, str):  # noqa: PLR2004 - the usual message
            return message
        result = {key: message[key] for key in _KEYS.get(role, _OTHER_KEYS) if key in message}
        texts = content_texts(content)
        if self.parts and role != "tool":
            without = not any(texts) and "tool_calls" in result
            result["content"] = [] if without else [{"type": "text", "text": text} for text in texts]
        else:
            result["content"] = "\n".join(texts)
        if "reasoning_content" in result:
            # gpt-oss's template reads `thinking`: vLLM renders these chats without it, in the same way.
            result |= dict.fromkeys(("reasoning", "thinking"), result["reasoning_content"])
        return result

    def roles(self, messages: list[Message]) -> list[Message]:
        """Return messages of this form, without the role developer if the template does not receive it.

        All messages of the developer and of the system then are one message of the system, which is the first.
        """
        if self.developer or not any(message["role"] == "developer" for message in messages):
            return messages
        instructions = [message for message in messages if message["role"] in {"developer", "system"}]
        if len(instructions) == 1 and instructions[0] is messages[0]:
            return [messages[0] | {"role": "system"}, *messages[1:]]
        texts = ["\n".join(content_texts(message["content"])) for message in instructions]
        others = [message for message in messages if message["role"] not in {"developer", "system"}]
        return [{"role": "system", "content": "\n\n".join(filter(None, texts))}, *others]


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool with the keys that reach the template."""
    function = tool["function"]
    served = {key: function.get(key) for key in _FUNCTION_KEYS}
    if function.get("strict") is not None:
        served["strict"] = function["strict"]
    return {"type": "function", "function": served}


def _takes_parts(template: str) -> bool:
    """Return True if a template iterates over the content of a message, as vLLM detects it."""
    try:
        tree = _compile_jinja_template(template).environment.parse(template)
        return _iterates_over_content(tree)
    except (jinja2.TemplateError, _UnknownTargetError):
        return False


class _UnknownTargetError(Exception):
    """A variable is assigned to something other than a name: vLLM then assumes content as text."""


def _iterates_over_content(tree: nodes.Template) -> bool:
    messages = set(_names_of_messages(tree))
    items = {
        _name(loop.target)
        for loop in tree.find_all(nodes.For)
        if any(_is_of(loop.iter, variable) for variable in messages)
    }
    in_macros: dict[int, set[str]] = {}
    for macro in tree.find_all(nodes.Macro):
        given = _parameters_with_content(tree, macro, items)
        in_macros.update((id(loop), given) for loop in macro.find_all(nodes.For))
    for loop in tree.find_all(nodes.For):
        variable = loop.iter.name if isinstance(loop.iter, nodes.Name) else None
        if (
            any(_is_of(loop.iter, item, "content") for item in items)
            or variable in in_macros.get(id(loop), ())
            or (variable == "content" and id(loop) not in in_macros)
        ):
            _name(loop.target)
            return True
    return False


def _names_of_messages(tree: nodes.Template) -> Iterator[str]:
    """Yield the names of variables that hold messages."""
    yield "messages"
    related, seen = ["messages"], {"messages"}
    while related:
        variable = related.pop(0)
        for assignment in tree.find_all(nodes.Assign):
            if _is_of(assignment.node, variable):
                name = _name(assignment.target)
                yield name
                if name not in seen:
                    related.append(name)
                    seen.add(name)


def _parameters_with_content(tree: nodes.Template, macro: nodes.Macro, items: Collection[str]) -> set[str]:
    """Return the parameters of a macro that are called with the content of a message."""
    names = [argument.name for argument in macro.args]
    found = set()
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
            given = [*zip(names, call.args, strict=False)]
            given += [(keyword.key, keyword.value) for keyword in call.kwargs if keyword.key in names]
            found |= {name for name, value in given if any(_is_of(value, item, "content") for item in items)}
    return found


def _name(target: nodes.Node) -> str:
    if not isinstance(target, nodes.Name):
        raise _UnknownTargetError
    return target.name


def _is_of(node: nodes.Node | None, variable: str, key: str | None = None) -> bool:
    """Return True if an expression is a variable, or its value for a key, possibly filtered, tested or sliced."""
    if isinstance(node, nodes.Filter | nodes.Test):
        return _is_of(node.node, variable, key)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _is_of(node.node, variable, key)
    if key is None:
        return _is_variable(node, variable)
    if isinstance(node, nodes.Getitem):
        return _is_variable(node.node, variable) and isinstance(node.arg, nodes.Const) and node.arg.value == key
    return isinstance(node, nodes.Getattr) and _is_variable(node.node, variable) and node.attr == key


def _is_variable(node: nodes.Node | None, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name
