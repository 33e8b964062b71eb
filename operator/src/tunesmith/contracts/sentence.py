"""Sentences for status and events, made from text of pods, users and other programs."""

from __future__ import annotations

import re
import unicodedata

_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn"})
"""Unicode categories of control, format (text direction, zero width), surrogate, private and unassigned characters."""


_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


def one_line(text: str, limit: int) -> str:
    """Return the text as one line of at most `limit` characters.

    White space becomes single spaces; control characters, terminal escape sequences, and characters that change the
    direction of text are removed; a text that was cut ends in an ellipsis.
    """
    if len(text) <= limit and text.isprintable() and "  " not in text and text == text.strip():
        return text
    # Cut before it is processed: the text may be as large as a log.
    words = _TERMINAL.sub("", text[: 4 * limit + 64]).split()
    line = "".join(char for char in " ".join(words) if unicodedata.category(char) not in _INVISIBLE)
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"
