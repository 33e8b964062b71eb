"""Identity of a conversation, by which its turns reach the pod that has its prefix in the cache. Pure.

A chat sends its whole history with each turn, so its turns begin with the same bytes: system messages and the first
message of the user. Their digest, without white space, identifies the conversation without any state in the gateway and
without decoding the messages. A client that orders or escapes the same messages differently in each turn gets no
affinity, but correct answers.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX_BYTES = 1024
"""Bytes of a prompt that is not a list of messages of a user, a few blocks of the engine's prefix cache."""
MAX_MESSAGE_BYTES = 64 * 1024
"""Bytes of the first messages that count."""
_MAX_TOKENS = 512
"""Brackets and strings of JSON that are read to find the end of the message."""
_INSTRUCTIONS = ("system", "instructions")
_PROMPTS = ("messages", "input", "prompt")
_TOKEN = re.compile(rb'[\[\]{}]|"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
"""A bracket, or a string, which may be cut off at the end of the bytes: a search never starts inside a string."""
_USER = re.compile(rb'"role"\s*:\s*"user"')
"""Quotes within a string are escaped, so a message's text never matches."""
_WHITESPACE = b" \t\r\n"
_OBJECTS = re.compile(rb"\s*\[\s*\{")


def conversation(model: str, members: Mapping[str, bytes | memoryview], salt: str) -> bytes:
    """Return the digest of a conversation with a model, the same for all its turns.

    Args:
        model: global id of the model.
        members: the undecoded members of the request's body: valid JSON.
        salt: salt of the engine's prefix cache; conversations with different salts share no cache. A client does not
            know it, so it cannot choose conversations that all prefer one pod.
    """
    digest = hashlib.blake2b(f"{salt}\0{model}".encode(), digest_size=16)
    for name in _INSTRUCTIONS:
        if (raw := members.get(name)) is not None:
            digest.update(_dense(memoryview(raw)[:MAX_MESSAGE_BYTES]))
    for name in _PROMPTS:
        if (raw := members.get(name)) is not None:
            digest.update(_dense(_first_messages(memoryview(raw))))
            break
    return digest.digest()


def _dense(raw: memoryview) -> bytes:
    return bytes(raw).translate(None, _WHITESPACE)


def _first_messages(raw: memoryview) -> memoryview:
    """Return the start of a list of messages, to the end of the first one of the user, or the start of another prompt.

    The result depends only on the bytes that it consists of, so later turns of the conversation have the same one.
    """
    if not _OBJECTS.match(raw) or (role := _USER.search(raw, 0, MAX_MESSAGE_BYTES)) is None:
        return raw[:PREFIX_BYTES]
    depth, end = 0, role.end()
    for count, token in enumerate(_TOKEN.finditer(raw, end, MAX_MESSAGE_BYTES)):
        end = token.end()
        first = raw[token.start()]
        if first in b"[{":
            depth += 1
        elif first in b"]}":
            depth -= 1
        if depth < 0 or count == _MAX_TOKENS:
            break
    return raw[:end]
