"""Last use of API keys: counted by the gateways, written by the operator, shown by the CLI.

All keys are in one ConfigMap of the gateways' namespace, so that the right to write it is no right to change a key.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY_USE_NAME = "tunesmith-key-use"
"""Name of the ConfigMap."""
KEY_USE_SECONDS = 60
"""Seconds between two reports of a key's use, and between two writes of the ConfigMap."""
_MAX_BYTES = 900_000
"""Size of the list; a ConfigMap must stay below 1 MiB. The keys that were used last are kept."""
_FIELD = "lastUsed"


def newest(times: Mapping[str, int]) -> dict[str, int]:
    """Return the keys that were used last, as many as the ConfigMap holds."""
    size, kept = 0, {}
    for name, at in sorted(times.items(), key=lambda entry: entry[1], reverse=True):
        size += len(json.dumps(name)) + len(str(at)) + 2
        if size > _MAX_BYTES:
            break
        kept[name] = at
    return dict(sorted(kept.items()))


def key_use_record(namespace: str, times: Mapping[str, int]) -> dict[str, Any]:
    """Return the ConfigMap.

    Args:
        namespace: namespace of the gateways.
        times: Unix time in seconds of the last use, by the key's name.
    """
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": KEY_USE_NAME,
            "namespace": namespace,
            "labels": {"app.kubernetes.io/managed-by": "tunesmith"},
        },
        "data": {_FIELD: json.dumps(dict(times), separators=(",", ":"))},
    }


def parse_key_use(record: Mapping[str, Any] | None) -> dict[str, int]:
    """Return the last use by key, in Unix seconds; empty if the ConfigMap is missing or damaged."""
    try:
        times = json.loads(((record or {}).get("data") or {}).get(_FIELD, "{}"))
    except (ValueError, TypeError, AttributeError):
        return {}
    if not isinstance(times, dict):
        return {}
    return {name: at for name, at in times.items() if isinstance(at, int) and 0 < at < 2**40}
