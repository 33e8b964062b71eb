"""Credentials of stores: read from a mounted Secret or the environment, checked before use, and removed from texts."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, auto
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, quote_plus, urlsplit

from tunesmith.storage.errors import AccessDeniedError, CredentialsMissingError
from tunesmith.storage.schemes import GOOGLE_KEY, STORE_KEYS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from tunesmith.storage.schemes import Scheme

_PUBLIC = re.compile(
    r"ENDPOINT|REGION|ACCESS_KEY_ID|ACCOUNT_NAME|_PROJECT|_ENTITY|_MODE|EXPERIMENT|TRACKING_URI|BASE_URL"
)
"""Keys with public values. A password in a URL is recognised by its format."""
_SEVERAL_LINES = frozenset({GOOGLE_KEY})
_MAX_VALUE = 65536
_VERSION_LINK = "..data"
"""Link that the kubelet points to a new folder, named after the time, whenever it writes a changed Secret."""
_VERSION_FORMAT = "..%Y_%m_%d_%H_%M_%S"
_PRINTABLE = re.compile(r"[\x21-\x7e]*")
_USER_OF_URL = re.compile(r"(https?|ftp|socks5h?)://[^/@\s]*@", re.IGNORECASE)
_REPLACEMENT = "***"
_MIN_LENGTH = 4
"""Fewest characters of a value; shorter ones would match in any text."""
_MIN_EMBEDDED_LENGTH = 8
"""Fewest characters of a value that is recognised inside a word."""
_MIN_PREFIX_LENGTH = 12
"""Fewest characters of a value's beginning that are recognised where a library or a limit cut off the rest."""


class Origin(Enum):
    """Source of credentials, which determines what the libraries may add to them."""

    SECRET = auto()
    """A Secret that a secretRef names: nothing is added, and it must have the keys of the scheme."""
    STORE_SECRET = auto()
    """The Secret of the installation's store: schemes without a key in it use the identity of the pod."""
    ENVIRONMENT = auto()
    """Variables of this process: the libraries may add what they find on the machine."""


@dataclass(frozen=True)
class Credentials:
    """Credentials of stores.

    Attributes:
        values: by key.
        source: source for messages, such as "the Secret mine".
        origin: kind of source.
        overridden: keys whose values are those of the environment instead.
    """

    values: Mapping[str, str]
    source: str
    origin: Origin
    overridden: frozenset[str] = frozenset()

    def source_of(self, key: str) -> str:
        """Return the source of a key for messages."""
        return "the environment" if key in self.overridden else self.source

    def check_values(self) -> None:
        """Check that a store could have issued the values, before a library puts them into a message.

        Raises:
            AccessDeniedError: a value is malformed.
        """
        for key in STORE_KEYS:
            sentence = malformed(key, self.values.get(key, ""), self.source_of(key))
            if sentence is not None:
                raise AccessDeniedError(sentence)

    def ambient(self, scheme: Scheme) -> bool:
        """Return True if no key of the scheme is set, so the library may use credentials of the machine."""
        return self.origin is Origin.ENVIRONMENT or (
            self.origin is Origin.STORE_SECRET and not any(self.values.get(key) for key in scheme.keys)
        )

    def check_keys(self, scheme: Scheme) -> None:
        """Check that a Secret is complete; otherwise the library would silently look for credentials elsewhere.

        Raises:
            CredentialsMissingError: a key is missing.
            AccessDeniedError: a value cannot be a credential, or the server's address is malformed.
        """
        endpoint = scheme.endpoint_of(self.values)
        if endpoint is not None and not _is_address(endpoint[1]):
            raise AccessDeniedError(
                f"{endpoint[0]} of {self.source_of(endpoint[0])} is not an address: write http:// or https://, and the"
                " host with its port"
            )
        given = {key for keys in scheme.credentials for key in keys if self.values.get(key)}
        named = self.origin is Origin.SECRET
        if named and scheme.credentials and not any(self.values.get(key) for key in scheme.keys):
            first = " and no ".join(keys[0] for keys in scheme.credentials)
            raise CredentialsMissingError(
                f"{self.source} has no {first}, which {scheme.name}:// requires: add the key, or remove the"
                " secretRef to use the store's credentials"
            )
        complete = any(given.issuperset(keys) for keys in scheme.credentials)
        if given and not complete and (named or not given <= scheme.alone):
            raise (CredentialsMissingError if named else AccessDeniedError)(self._incomplete(scheme, given))
        fault = scheme.malformed(self.values)
        if fault is not None:
            raise AccessDeniedError(f"{unusable(scheme, self, fault)}")

    def _incomplete(self, scheme: Scheme, given: set[str]) -> str:
        keys = max(scheme.credentials, key=lambda keys: len(given.intersection(keys)))
        missing = [key for key in keys if key not in given]
        others = [" and ".join(other) for other in scheme.credentials if other != keys]
        instead = f", or use {' or '.join(others)} instead" if others else ""
        has = " and ".join(key for key in keys if key in given)
        return f"{self.source} has {has} and no {' and no '.join(missing)}: add the key{instead}"


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and bool(parts.hostname)


def unusable(scheme: Scheme, credentials: Credentials, fault: str) -> str:
    """Return the message about a credential that cannot be used, which contains no part of its value."""
    keys = " or ".join(" and ".join(keys) for keys in scheme.credentials)
    return (
        f"{keys} of {credentials.source} cannot be used for {scheme.name}://: {fault}; use the whole value as the store"
        " issued it"
    )


def environment_credentials(environment: Mapping[str, str], source: str = "the environment") -> Credentials:
    """Return the credentials among the variables of a process."""
    return Credentials(environment, source, Origin.ENVIRONMENT)


def read_secrets(folder: Path) -> dict[str, dict[str, str]]:
    """Return the keys and values of all mounted Secrets, by the Secret's name.

    Args:
        folder: one sub-folder per mounted Secret, with one file per key. In a cluster the mounts are optional: a
            missing Secret has an empty folder.
    """
    folders = [entry for entry in sorted(folder.iterdir()) if entry.is_dir()] if folder.is_dir() else []
    return {entry.name: _read_keys(entry) for entry in folders}


def read_secret(folder: Path) -> tuple[dict[str, str], datetime | None]:
    """Return the keys and values of one mounted Secret, all of one version, and the time when the kubelet wrote them.

    The kubelet writes changes within about two minutes. The values are outdated if the time is before the Secret's last
    change (`kubectl get secret NAME --show-managed-fields`).

    Returns:
        An empty dict and None for a Secret that does not exist or is empty.

    Raises:
        OSError: the folder cannot be read.
    """
    version = folder / _VERSION_LINK
    current = version.resolve(strict=True) if version.is_symlink() else folder
    values = _read_keys(current)
    return values, _written(current) if values else None


def _read_keys(folder: Path) -> dict[str, str]:
    return {
        entry.name: entry.read_bytes()[: _MAX_VALUE + 1].decode("utf-8", "surrogateescape").strip()
        for entry in sorted(folder.iterdir())
        if entry.is_file()
    }


def _written(folder: Path) -> datetime:
    try:
        return datetime.strptime(folder.name.rpartition(".")[0], _VERSION_FORMAT).replace(tzinfo=UTC)
    except ValueError:  # not written by the kubelet
        return datetime.fromtimestamp(max(entry.stat().st_mtime for entry in [folder, *folder.iterdir()]), UTC)


def malformed(key: str, value: str, credentials: str) -> str | None:
    """Return why a value cannot be used, as a sentence that does not contain it; None if it can.

    Args:
        key: name of the value, such as HF_TOKEN.
        value: the value without a trailing line break.
        credentials: source of the value, for the sentence.
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
    return f"{key} of {credentials} {found}: store only the value, on one line and exactly as issued"


class Scrubber:
    """Filter that removes the values of credentials from texts, even if encoded or truncated.

    Args:
        values: keys and values of all credentials known to this process.
    """

    def __init__(self, *values: Mapping[str, str]) -> None:
        texts = {text for given in values for key, value in given.items() for text in _parts(key, value)}
        forms = {form for text in texts for form in _forms(text)}
        self._long: dict[str, list[str]] = {}
        for form in forms:
            if len(form) >= _MIN_EMBEDDED_LENGTH:
                self._long.setdefault(form[:_MIN_EMBEDDED_LENGTH], []).append(form)
        short = sorted(re.escape(form) for form in forms if _MIN_LENGTH <= len(form) < _MIN_EMBEDDED_LENGTH)
        self._short = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(short)})(?![A-Za-z0-9])") if short else None

    def clean(self, text: str) -> str:
        """Return the text with credentials replaced by `***`."""
        for beginning, forms in self._long.items():
            if beginning in text:
                text = _without(text, beginning, forms)
        if self._short is not None:
            text = self._short.sub(_REPLACEMENT, text)
        return _USER_OF_URL.sub(rf"\1://{_REPLACEMENT}@", text)

    def clean_fields(self, document: Any, names: frozenset[str]) -> Any:  # noqa: ANN401 - any JSON document
        """Return the JSON document with credentials removed from the texts in fields of these names."""
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
    """Return the text without values that have this beginning, even if a library or a limit truncated them."""
    pieces, position = [], 0
    while (found := text.find(beginning, position)) >= 0:
        length = max((_found(text[found : found + len(form)], form) for form in forms), default=0)
        pieces += [text[position:found], _REPLACEMENT if length else beginning]
        position = found + (length or len(beginning))
    return "".join([*pieces, text[position:]])


def _found(text: str, form: str) -> int:
    """Return the length of the value's prefix at the start of the text; 0 if too short to identify the value."""
    pairs = enumerate(zip(text, form, strict=False))
    same = next((number for number, (found, expected) in pairs if found != expected), len(text))
    return same if same == len(form) or same >= _MIN_PREFIX_LENGTH else 0


def _parts(key: str, value: str) -> Iterator[str]:
    """Yield the secret parts of a value: all of it, its lines, and the secrets in a document or a connection string."""
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
    """Yield the forms in which programs write a text: plain, URL, JSON, repr, and base64 at its three offsets."""
    if len(text) < _MIN_LENGTH or text.startswith("-----"):
        return
    data = text.encode("utf-8", "surrogateescape")
    yield text
    yield from (quote(data, safe=""), quote_plus(data), json.dumps(text)[1:-1], repr(text)[1:-1])
    if len(data) < _MIN_EMBEDDED_LENGTH:
        return
    for offset in range(3):
        # Without the characters that share bits with the value's neighbours.
        for encoded in (base64.b64encode(b"\0" * offset + data), base64.urlsafe_b64encode(b"\0" * offset + data)):
            clipped = encoded.decode().rstrip("=")
            yield clipped[(0, 2, 3)[offset] : len(clipped) - 1]


def secret_values(environment: Mapping[str, str], names: Iterable[str] = STORE_KEYS) -> dict[str, str]:
    """Return the credentials among the variables of a process."""
    return {name: environment[name] for name in names if environment.get(name)}
