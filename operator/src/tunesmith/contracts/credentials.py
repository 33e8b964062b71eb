"""Credentials in Secrets: which Secrets and keys may be used, what a well-formed value is, and texts without them."""

from __future__ import annotations

import base64
import json
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, quote_plus

from tunesmith.contracts.google_key import GOOGLE_KEY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

STORE_KEYS = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3",
    "AWS_REGION", "AWS_DEFAULT_REGION", GOOGLE_KEY, "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_ACCOUNT_KEY", "HF_TOKEN", "HF_ENDPOINT",
)  # fmt: skip
"""Keys of a Secret that a secretRef names. Pods mount no others."""
_PUBLIC = re.compile(
    r"ENDPOINT|REGION|ACCESS_KEY_ID|ACCOUNT_NAME|_PROJECT|_ENTITY|_MODE|EXPERIMENT|TRACKING_URI|BASE_URL"
)
"""Keys whose values are no secrets. A password in a URL is found by its form."""
_SEVERAL_LINES = frozenset({GOOGLE_KEY})
_MAX_VALUE = 65536
_PRINTABLE = re.compile(r"[\x21-\x7e]*")
_USER_OF_URL = re.compile(r"(https?|ftp|socks5h?)://[^/@\s]*@", re.IGNORECASE)
_REMOVED = "***"
_SHORTEST = 4
"""Shorter values would be found in any text."""
_DISTINCT = 8
"""Shortest value that is recognised inside a word."""
_CUT = 12
"""Shortest beginning of a value that is recognised where a library or a limit cut the rest off."""


def malformed(key: str, value: str, credentials: str) -> str | None:
    """Return why a value cannot be used, as a sentence that does not contain it; None where it can.

    Args:
        key: name of the value, such as HF_TOKEN.
        value: without the line break at its end.
        credentials: where it comes from, for the sentence.
    """
    if key not in STORE_KEYS or not value:
        return None
    if len(value) > _MAX_VALUE:
        found = f"has more than {_MAX_VALUE} characters"
    elif key in _SEVERAL_LINES:
        return None
    elif len(value.splitlines()) > 1:
        found = "has several lines"
    elif re.search(r"\s", value):
        found = "has spaces or tabs"
    elif _PRINTABLE.fullmatch(value) is None:
        found = "has characters that are not printable ASCII"
    else:
        return None
    return f"{key} of {credentials} {found}: put the value there alone, in one line and as its issuer gives it"


class Scrubber:
    """Removes the values of credentials from texts, also where they are encoded or cut off at their end.

    Args:
        values: keys and values of all credentials that this process knows.
    """

    def __init__(self, *values: Mapping[str, str]) -> None:
        texts = {text for given in values for key, value in given.items() for text in _parts(key, value)}
        forms = {form for text in texts for form in _forms(text)}
        self._long: dict[str, list[str]] = {}
        for form in forms:
            if len(form) >= _DISTINCT:
                self._long.setdefault(form[:_DISTINCT], []).append(form)
        short = sorted(re.escape(form) for form in forms if _SHORTEST <= len(form) < _DISTINCT)
        self._short = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(short)})(?![A-Za-z0-9])") if short else None

    def clean(self, text: str) -> str:
        """Return the text with `***` in place of credentials."""
        for beginning, forms in self._long.items():
            if beginning in text:
                text = _without(text, beginning, forms)
        if self._short is not None:
            text = self._short.sub(_REMOVED, text)
        return _USER_OF_URL.sub(rf"\1://{_REMOVED}@", text)

    def clean_fields(self, document: Any, names: frozenset[str]) -> Any:  # noqa: ANN401 - any JSON document
        """Return the JSON document with the texts in fields of these names cleaned."""
        if isinstance(document, list):
            return [self.clean_fields(entry, names) for entry in document]
        if not isinstance(document, dict):
            return document
        return {
            key: self._cleaned(value) if key in names else self.clean_fields(value, names)
            for key, value in document.items()
        }

    def _cleaned(self, value: Any) -> Any:  # noqa: ANN401 - a text, texts or anything else
        if isinstance(value, list):
            return [self._cleaned(entry) for entry in value]
        return self.clean(value) if isinstance(value, str) else value


def _without(text: str, beginning: str, forms: Iterable[str]) -> str:
    """The text without values that begin so, and without what is left of them where a library or a limit cut them."""
    pieces, position = [], 0
    while (found := text.find(beginning, position)) >= 0:
        length = max((_found(text[found : found + len(form)], form) for form in forms), default=0)
        pieces += [text[position:found], _REMOVED if length else beginning]
        position = found + (length or len(beginning))
    return "".join([*pieces, text[position:]])


def _found(text: str, form: str) -> int:
    """Number of characters of the value with which the text begins; 0 where they are too few to be the value."""
    pairs = enumerate(zip(text, form, strict=False))
    same = next((number for number, (one, other) in pairs if one != other), len(text))
    return same if same == len(form) or same >= _CUT else 0


def _parts(key: str, value: str) -> Iterator[str]:
    """What of a value is secret: all of it, its lines, and the values inside of a document or a connection string."""
    if _PUBLIC.search(key) or not value.strip():
        return
    yield value.strip()
    yield from (line.strip() for line in value.splitlines())
    if key == GOOGLE_KEY:
        yield from _texts_of(value)
    if "=" in value and ";" in value:
        yield from (part.partition("=")[2] for part in value.split(";") if "Key=" in part or "Signature=" in part)


def _texts_of(document: str) -> Iterator[str]:
    try:
        parsed = json.loads(document)
    except (ValueError, RecursionError):
        return
    secret = parsed.get("private_key") if isinstance(parsed, dict) else None
    if isinstance(secret, str):
        yield from (line.strip() for line in secret.splitlines() if not line.startswith("-----"))


def _forms(text: str) -> Iterator[str]:
    """The text as programs write it: plain, in a URL, in JSON or a repr, in base64 at each of its three offsets."""
    if len(text) < _SHORTEST or text.startswith("-----"):
        return
    data = text.encode("utf-8", "surrogateescape")
    yield text
    yield from (quote(data, safe=""), quote_plus(data), json.dumps(text)[1:-1], repr(text)[1:-1])
    if len(data) < _DISTINCT:
        return
    for offset in range(3):
        # Characters that share bits with what is beside the value are left out.
        for encoded in (base64.b64encode(b"\0" * offset + data), base64.urlsafe_b64encode(b"\0" * offset + data)):
            clipped = encoded.decode().rstrip("=")
            yield clipped[(0, 2, 3)[offset] : len(clipped) - 1]


def secret_values(environment: Mapping[str, str], names: Iterable[str] = STORE_KEYS) -> dict[str, str]:
    """Return the credentials among the variables of a process."""
    return {name: environment[name] for name in names if environment.get(name)}
