"""Write the reasoning of an answer as the model generates it, where a template omits it from every message."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from tunesmith_trainer.data.served import content_texts

if TYPE_CHECKING:
    from tunesmith_trainer.data.served import Message

_TAG = r"think|thinking|thought|reasoning"
_OPENING = re.compile(rf"<({_TAG})>(\s*)\Z")
_LEADING = re.compile(rf"\s*<({_TAG})>\s*")
_CLOSING = re.compile(rf"</({_TAG})>\s*")


def opening(prompt: str) -> re.Match[str] | None:
    """Return the tag with which a prompt opens the reasoning of the answer; None if it opens none."""
    return _OPENING.search(prompt)


def after_opening(tag: re.Match[str], message: Message, rendered: str) -> str:
    """Return the text that a model generates after a prompt that opens its reasoning.

    It begins with the reasoning and closes it, even without any: the parsers of servers, and templates that render
    reasoning, expect that.

    Args:
        tag: the tag at the end of the prompt.
        message: the answer.
        rendered: the answer as the template renders it in place of the tag.
    """
    inside = _LEADING.match(rendered)
    if inside is not None:  # with other whitespace than in the prompt
        return rendered[inside.end() :]
    if f"</{tag[1]}>" in rendered:
        return rendered
    whole = with_reasoning(message, rendered)
    if whole != rendered:
        return _LEADING.sub("", whole, count=1)
    reasoning, closing = str(message.get("reasoning_content") or ""), f"</{tag[1]}>"
    if "\n" not in tag[2]:
        return reasoning + closing + rendered
    return reasoning.strip("\n") + f"\n{closing}\n\n" + rendered.lstrip("\n")


def with_reasoning(message: dict[str, Any], rendered: str) -> str:
    """Return a rendered answer with the reasoning that its content begins with, if the template omits it.

    Templates omit it from a message that a client sends back; the model generates it.
    """
    texts = content_texts(message["content"])
    closing = list(_CLOSING.finditer(texts[0])) if len(texts) == 1 and "</" in texts[0] else []
    if not closing:
        return rendered
    reasoning, shown = texts[0][: closing[-1].end()], texts[0][closing[-1].end() :].rstrip()
    start = len(rendered) - len(rendered.lstrip())
    if not rendered.startswith(shown, start) or closing[-1][0].rstrip() in rendered:
        return rendered
    return reasoning + rendered[start:]
