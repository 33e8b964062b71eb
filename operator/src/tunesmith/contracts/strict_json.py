"""Parser for JSON from untrusted files: bounded in size and number of values, and without ambiguity."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    from collections.abc import Callable

Model = TypeVar("Model", bound=BaseModel)

_MAX_DIGITS = 32
"""Highest number of digits of a number; conversion takes quadratic time."""


def parse_object(document: bytes, *, max_bytes: int, max_values: int) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: it is too large, malformed or not an object, has a duplicate key, is nested too deeply, or
            has a number that is too long or not finite.
    """
    if len(document) > max_bytes:
        raise ValueError(f"it has {len(document)} bytes, more than {max_bytes}")
    # Counted before parsing: a short text can describe many objects, each of which needs memory.
    values = sum(map(document.count, (b"{", b"[", b",")))
    if values > max_values:
        raise ValueError(f"it has more than {max_values} values")
    if not document.startswith(b"{"):
        raise ValueError("it is not a JSON object")
    try:
        return json.loads(  # type: ignore[no-any-return]
            document.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_finite,
        )
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_model(
    model: type[Model],
    document: bytes,
    name: str,
    *,
    max_bytes: int,
    max_values: int,
    check: Callable[[Model], None] | None = None,
) -> Model:
    """Return the content of an untrusted file as a model.

    Args:
        model: its class.
        document: the file's bytes.
        name: the file's name, for messages.
        max_bytes: highest number of bytes.
        max_values: highest number of values.
        check: raises ValueError for a model that exceeds a limit.

    Raises:
        ValueError: it is malformed or exceeds a limit; the text names the file and the first problem.
    """
    try:
        parsed = model.model_validate(parse_object(document, max_bytes=max_bytes, max_values=max_values))
        if check is not None:
            check(parsed)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"{name} is malformed: {field}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is malformed: {error}") from None
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        (repeated, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {repeated[:80]!a} appears twice")
    return result


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text) if len(text) <= _MAX_DIGITS else math.inf
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:_MAX_DIGITS]} is too large or too long")
    return value
