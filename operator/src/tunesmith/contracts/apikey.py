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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KEY_LABEL = "tunesmith.dev/api-key"
"""Label, with the value "true", of the ConfigMaps that hold a key's hash."""
KEY_PREFIX = "api-key-"
KEY_KIND = "ConfigMap"
_ALL = "*"
_HASH = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key and its permissions.

    Attributes:
        name: for people and logs.
        digest: SHA-256 of the key.
        home: namespace in which bare model names are looked up.
        namespaces: namespaces whose models may be called.
        models: global ids that may be called; None: all in those namespaces.
    """

    name: str
    digest: bytes
    home: str
    namespaces: frozenset[str]
    models: frozenset[str] | None

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
    name: str, gateway_namespace: str, key: str, *, home: str, namespaces: Sequence[str], models: Sequence[str]
) -> dict[str, Any]:
    """Return the ConfigMap that makes a key valid; it contains only the key's hash.

    Args:
        name: name of the key; the ConfigMap is called `api-key-<name>`.
        gateway_namespace: namespace of the gateway, in which the ConfigMap is.
        key: the key itself.
        home: namespace in which bare model names are looked up.
        namespaces: namespaces that may be called.
        models: global ids that may be called; `["*"]`: all.
    """
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
        },
    }


def parse_key_record(record: Mapping[str, Any]) -> ApiKey:
    """Return the key that a ConfigMap describes.

    Raises:
        ValueError: a field is missing or malformed; the message names it, never its value.
    """
    name = str(record["metadata"]["name"]).removeprefix(KEY_PREFIX)
    data = record.get("data") or {}
    digest = data.get("hash", "").strip().lower()
    if not _HASH.match(digest):
        raise ValueError("`hash` must be the SHA-256 of the key as 64 hex digits")
    home = data.get("namespace", "").strip()
    if not home:
        raise ValueError("`namespace` is missing")
    namespaces = _strings("namespaces", data["namespaces"]) if "namespaces" in data else [home]
    models = _strings("models", data.get("models", "[]"))
    return ApiKey(
        name=name,
        digest=bytes.fromhex(digest),
        home=home,
        namespaces=frozenset(namespaces),
        models=None if _ALL in models else frozenset(models),
    )


def _strings(field: str, text: str) -> list[str]:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"`{field}` must be a JSON list of strings")
    return values
