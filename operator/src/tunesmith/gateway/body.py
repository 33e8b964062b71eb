"""The JSON body of a request. Pure.

A body stays bytes: its members are separated, the few that the gateway reads are decoded, and `model` and `cache_salt`
are replaced when it is forwarded. The forwarded body has each member once, as the gateway read it, so a duplicate
member cannot mean one thing to the gateway and another to the engine.
"""

from __future__ import annotations

import codecs
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from tunesmith.gateway import errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tunesmith.gateway.apis import Api

MAX_DEPTH = 64
MAX_CONTAINERS = 20_000
"""Maximum number of arrays and objects. The engine builds and checks a Python object for each of them."""
MAX_VALUES = 500_000
"""Maximum number of values; prompts may be lists of token ids."""
MAX_STRINGS = 100_000
"""Maximum number of strings, including names of members."""
MAX_MEMBERS = 256
_PLAIN = bytes(set(range(256)) - set(b'"[]{},'))
_MAX_DIGITS = 9
_UTF8_PIECE = 64 * 1024
_PIECE = 64 * 1024
_REPLACED = frozenset({"model", "cache_salt"})
_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ELEMENTS = msgspec.json.Decoder(list[msgspec.Raw])
_VALUE = msgspec.json.Decoder()
_WHITESPACE = b" \t\r\n"


@dataclass(frozen=True, slots=True)
class Body:
    """Parsed body of a request.

    Attributes:
        model: the model name that the client sent.
        stream: True if the client requests a stream of events.
        sequences: number of sequences that the engine computes at once: choices × prompts, or inputs.
        max_tokens: longest answer that the client accepts, in tokens; None: as long as the model's context allows.
        members: the other members, undecoded, by name.
    """

    model: str
    stream: bool
    sequences: int
    max_tokens: int | None
    members: Mapping[str, msgspec.Raw]

    def pieces(self, model: str, cache_salt: str) -> list[bytes | memoryview]:
        """Return the body for the engine, in pieces; the client's members are not copied.

        Args:
            model: the engine's name of the revision that answers.
            cache_salt: salt that separates the prefix cache of this key's namespace from those of others.
        """
        head = msgspec.json.encode({"model": model, "cache_salt": cache_salt})[:-1]
        pieces: list[bytes | memoryview] = [head]
        for name, raw in self.members.items():
            pieces.append(b"," + msgspec.json.encode(name) + b":")
            pieces.append(memoryview(raw))
        pieces.append(b"}")
        return pieces

    def with_usage(self) -> tuple[Body, bool]:
        """Return a copy that asks the engine for the number of tokens, and True if the client did not ask for it."""
        options = _value(self.members, "stream_options")
        if not self.stream or not (options is None or isinstance(options, dict)):
            return self, False
        asked = options is not None and options.get("include_usage") is True
        raw = msgspec.Raw(msgspec.json.encode({**(options or {}), "include_usage": True}))
        return replace(self, members={**self.members, "stream_options": raw}), not asked

    def without_members(self) -> Body:
        """Return a copy without the bytes of the body, for a request that a pod has accepted."""
        return Body(self.model, self.stream, self.sequences, self.max_tokens, {})


def socket_pieces(pieces: list[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Yield the same bytes in pieces of a size that suits a socket."""
    small = bytearray()
    for piece in pieces:
        if len(piece) + len(small) <= _PIECE:
            small += piece
            continue
        if small:
            yield bytes(small)
            small.clear()
        view = memoryview(piece)
        for start in range(0, len(view), _PIECE):
            yield view[start : start + _PIECE]
    if small:
        yield bytes(small)


def parse(data: bytes | bytearray, max_sequences: int, api: Api) -> Body:
    """Return the parsed body. The result refers to `data`, which must not be changed afterwards.

    Raises:
        ApiError: the gateway does not forward the body; the message gives the reason.
    """
    members = _members(data)
    body = Body(
        model=_model(members),
        stream=bool(_typed(members, "stream", bool)),
        sequences=_sequences(members, api),
        max_tokens=_max_tokens(members),
        members={name: raw for name, raw in members.items() if name not in _REPLACED},
    )
    if body.sequences > max_sequences:
        raise errors.too_many_sequences(body.sequences)
    return body


def _members(data: bytes | bytearray) -> dict[str, msgspec.Raw]:
    _check_structure(data)
    _check_utf8(data)
    if data.lstrip(_WHITESPACE)[:1] != b"{":
        # The decoder distinguishes other JSON values from invalid JSON.
        try:
            _VALUE.decode(data)
        except (msgspec.DecodeError, RecursionError) as error:
            raise errors.body_not_json(_reason(error)) from None
        raise errors.body_not_an_object()
    try:
        members = _MEMBERS.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise errors.body_not_json(_reason(error)) from None
    if len(members) > MAX_MEMBERS:
        raise errors.body_too_complex(f"it has {len(members)} members, more than {MAX_MEMBERS}")
    return members


def _reason(error: Exception) -> str:
    return str(error).removeprefix("JSON is malformed: ") or "it cannot be parsed"


def _check_structure(data: bytes | bytearray) -> None:
    """Refuse bodies whose tree would be deep or many times as large as the body."""
    if data.count(b",") + data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    # Keep only brackets and commas, and the quotes around those that are part of strings.
    skeleton = data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _PLAIN)
    if skeleton.count(b'"') > 2 * MAX_STRINGS:
        raise errors.body_too_complex(f"it has more than {MAX_STRINGS} strings")
    outside = b"".join(skeleton.split(b'"')[::2])
    brackets = outside.translate(None, b",")
    if len(outside) - len(brackets) > MAX_VALUES:
        raise errors.body_too_complex(f"it has more than {MAX_VALUES} values")
    if len(brackets) > 2 * MAX_CONTAINERS:
        raise errors.body_too_complex(f"it has more than {MAX_CONTAINERS} arrays and objects")
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise errors.body_too_complex(f"it is nested more than {MAX_DEPTH} deep")


def _check_utf8(data: bytes | bytearray) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    view = memoryview(data)
    try:
        for start in range(0, len(view), _UTF8_PIECE):
            decoder.decode(view[start : start + _UTF8_PIECE])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise errors.body_not_json("it is not UTF-8") from None


def _value(members: Mapping[str, msgspec.Raw], name: str) -> Any:  # noqa: ANN401 - any JSON value
    raw = members.get(name)
    if raw is None:
        return None
    try:
        return _VALUE.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise errors.body_not_json(_reason(error)) from None


def _typed(members: Mapping[str, msgspec.Raw], name: str, type_: type) -> Any:  # noqa: ANN401 - of the given type
    """Return a member of this type, or None. Its first bytes show the type, so other types are not decoded."""
    raw = members.get(name)
    if raw is None:
        return None
    text = bytes(memoryview(raw)[:5])
    if text == b"null":
        return None
    expected = {bool: text in {b"true", b"false"}, int: text[:1].isdigit() or text[:1] == b"-", str: text[:1] == b'"'}
    if not expected[type_]:
        raise errors.wrong_type(name, type_)
    value = _value(members, name)
    if type(value) is not type_:
        raise errors.wrong_type(name, type_)
    return value


def _model(members: Mapping[str, msgspec.Raw]) -> str:
    name: str | None = _typed(members, "model", str)
    if not name:
        raise errors.missing_model()
    return name


def _sequences(members: Mapping[str, msgspec.Raw], api: Api) -> int:
    """Return choices × prompts, or the number of inputs. vLLM's beam search keeps `n` beams for each prompt."""
    _typed(members, "use_beam_search", bool)
    choices = max(1, _typed(members, "n", int) or 1, _typed(members, "best_of", int) or 1)
    prompts = api.own_sequences + sum(_count(members, name) for name in api.lists)
    return choices * max(1, prompts)


def _max_tokens(members: Mapping[str, msgspec.Raw]) -> int | None:
    """Return the client's bound of an answer; the engine refuses what is not a number."""
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        text = bytes(memoryview(members.get(name, b""))[: 2 * _MAX_DIGITS]).strip()
        if text.isdigit():
            return int(text[:_MAX_DIGITS])
    return None


def _count(members: Mapping[str, msgspec.Raw], name: str) -> int:
    """Return the number of prompts in a member: one per element of an array, but one for an array of token ids."""
    raw = members.get(name)
    if raw is None or bytes(memoryview(raw)[:4]) == b"null":
        return 0
    text = bytes(memoryview(raw)[:1024])
    if not text.startswith(b"["):
        return 1
    first = text[1:].lstrip(_WHITESPACE)[:1]
    if first and (first.isdigit() or first == b"-"):
        return 1
    return len(_ELEMENTS.decode(raw))
