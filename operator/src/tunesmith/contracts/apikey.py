"""API keys: made by the CLI, kept hashed in ConfigMaps of the gateway's namespace, checked by the gateway.

ConfigMaps, because RBAC cannot select by label: a gateway that may list Secrets could also read the installation
key. The key cannot be recovered from the hash of 256 random bits.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KEY_LABEL = "tunesmith.dev/api-key"
"""Label, with the value "true", of the ConfigMaps that hold a key's hash."""
KEY_PREFIX = "api-key-"
KEY_KIND = "ConfigMap"
_ALL = "*"
_HASH = re.compile(r"^[0-9a-f]{64}$")
MAX_LIMIT = 999_999_999
"""Highest limit of a key, of nine digits."""
_COUNT = re.compile(r"^[1-9][0-9]{0,8}$", re.ASCII)


class Priority(StrEnum):
    """Priority class of a key: its part of a busy pod, relative to those of the other keys."""

    HIGH = "High"
    NORMAL = "Normal"
    LOW = "Low"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key and its permissions.

    Attributes:
        name: for people and logs.
        digest: SHA-256 of the key.
        home: namespace in which bare model names are looked up.
        namespaces: namespaces whose models may be called.
        models: global ids that may be called; None: all in those namespaces.
        requests_per_minute: requests that are accepted in a minute; None: no limit.
        tokens_per_minute: tokens of prompts and answers in a minute; None: no limit.
        tokens_per_day: tokens of prompts and answers in a day; None: no limit.
        max_concurrency: sequences that may run at once; None: no limit.
        priority: priority class.
        expires: Unix time in seconds from which the key is refused; None: never.
        previous_digest: SHA-256 of the key that this one replaces, or None.
        previous_expires: Unix time in seconds from which the replaced key is refused.
    """

    name: str
    digest: bytes
    home: str
    namespaces: frozenset[str]
    models: frozenset[str] | None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    max_concurrency: int | None = None
    priority: Priority = Priority.NORMAL
    expires: float | None = None
    previous_digest: bytes | None = None
    previous_expires: float = 0.0

    def may_call(self, model: str) -> bool:
        """Return True if the list of models allows the global id; its namespace is checked separately."""
        return self.models is None or model in self.models


def new_key() -> str:
    """Return a new key: `sk-ts-<8 hex id>-<43 characters, 256 random bits>`."""
    return f"sk-ts-{secrets.token_hex(4)}-{secrets.token_urlsafe(32)}"


def key_digest(key: str) -> bytes:
    """Return the SHA-256 of a key. The key has 256 random bits, so a slow hash would not add security."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def key_record(
    name: str,
    gateway_namespace: str,
    key: str,
    *,
    home: str,
    namespaces: Sequence[str],
    models: Sequence[str],
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    tokens_per_day: int | None = None,
    max_concurrency: int | None = None,
    priority: Priority = Priority.NORMAL,
    expires: datetime | None = None,
) -> dict[str, Any]:
    """Return the ConfigMap that makes a key valid; it contains only the key's hash.

    Args:
        name: name of the key; the ConfigMap is called `api-key-<name>`.
        gateway_namespace: namespace of the gateway, in which the ConfigMap is.
        key: the key itself.
        home: namespace in which bare model names are looked up.
        namespaces: namespaces that may be called.
        models: global ids that may be called; `["*"]`: all.
        requests_per_minute: requests that are accepted in a minute; None: no limit.
        tokens_per_minute: tokens of prompts and answers in a minute; None: no limit.
        tokens_per_day: tokens of prompts and answers in a day; None: no limit.
        max_concurrency: sequences that may run at once; None: no limit.
        priority: priority class.
        expires: time from which the key is refused; None: never.
    """
    limits = {
        "requestsPerMinute": requests_per_minute,
        "tokensPerMinute": tokens_per_minute,
        "tokensPerDay": tokens_per_day,
        "maxConcurrency": max_concurrency,
    }
    return {
        "apiVersion": "v1",
        "kind": KEY_KIND,
        "metadata": {
            "name": f"{KEY_PREFIX}{name}",
            "namespace": gateway_namespace,
            "labels": {KEY_LABEL: "true", "app.kubernetes.io/managed-by": "tunesmith"},
        },
        "data": {
            "hash": key_digest(key).hex(),
            "namespace": home,
            "namespaces": json.dumps(list(namespaces)),
            "models": json.dumps(list(models)),
            **{field: str(value) for field, value in limits.items() if value is not None},
            **({"priority": priority.value} if priority is not Priority.NORMAL else {}),
            **({"expires": time_text(expires)} if expires else {}),
        },
    }


def rotated(record: Mapping[str, Any], key: str, overlap_until: datetime) -> dict[str, str]:
    """Return the data of a key's ConfigMap that makes `key` valid, and the present key until `overlap_until`."""
    data = dict(record["data"])
    return data | {
        "hash": key_digest(key).hex(),
        "previousHash": data["hash"],
        "previousExpires": time_text(overlap_until),
    }


def parse_key_record(record: Mapping[str, Any]) -> ApiKey:
    """Return the key that a ConfigMap describes.

    Raises:
        ValueError: a field is missing or malformed; the message names it, never its value.
    """
    name = str(record["metadata"]["name"]).removeprefix(KEY_PREFIX)
    data = record.get("data") or {}
    digest = _digest(data, "hash")
    home = data.get("namespace", "").strip()
    if not home:
        raise ValueError("`namespace` is missing")
    namespaces = _strings("namespaces", data["namespaces"]) if "namespaces" in data else [home]
    models = _strings("models", data.get("models", "[]"))
    return ApiKey(
        name=name,
        digest=digest,
        home=home,
        namespaces=frozenset(namespaces),
        models=None if _ALL in models else frozenset(models),
        requests_per_minute=_limit(data, "requestsPerMinute"),
        tokens_per_minute=_limit(data, "tokensPerMinute"),
        tokens_per_day=_limit(data, "tokensPerDay"),
        max_concurrency=_limit(data, "maxConcurrency"),
        priority=_priority(data),
        expires=_time(data, "expires"),
        previous_digest=_digest(data, "previousHash") if "previousHash" in data else None,
        previous_expires=_time(data, "previousExpires") or 0.0,
    )


def _digest(data: Mapping[str, str], field: str) -> bytes:
    digest = data.get(field, "").strip().lower()
    if not _HASH.match(digest):
        raise ValueError(f"`{field}` must be the SHA-256 of the key as 64 hex digits")
    return bytes.fromhex(digest)


def _limit(data: Mapping[str, str], field: str) -> int | None:
    text = data.get(field)
    if text is None:
        return None
    if not _COUNT.match(text.strip()):
        raise ValueError(f"`{field}` must be a number from 1 to {MAX_LIMIT}")
    return int(text)


def _priority(data: Mapping[str, str]) -> Priority:
    try:
        return Priority(data.get("priority", Priority.NORMAL).strip())
    except ValueError:
        raise ValueError(f"`priority` must be {', '.join(Priority)}") from None


def _time(data: Mapping[str, str], field: str) -> float | None:
    text = data.get(field)
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ValueError(f"`{field}` must be a time with a time zone, such as 2027-01-31T00:00:00Z")
    return moment.timestamp()


def time_text(moment: datetime) -> str:
    """Return a time as key records have it, such as `2027-01-31T00:00:00Z`."""
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _strings(field: str, text: str) -> list[str]:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"`{field}` must be a JSON list of strings")
    return values
