"""The key of a Google service account in a Secret or in the environment, as the trainer and the agent take it."""

from __future__ import annotations

import json
from typing import Any

GOOGLE_KEY = "GOOGLE_SERVICE_ACCOUNT_KEY"
"""Key of a Secret, or variable of the environment: the JSON file that Google gives for a key of a service account."""
_TYPE = "service_account"


def parse_service_account(text: str) -> dict[str, Any]:
    """The document of a key.

    Only this type of credentials is taken: others name files and addresses that a pod would read.

    Raises:
        ValueError: it is none; the text says why, and nothing of what is in it.
    """
    try:
        document = json.loads(text)
    except ValueError:
        raise ValueError("it is not JSON") from None
    if not isinstance(document, dict) or document.get("type") != _TYPE:
        raise ValueError(f"its type is not {_TYPE}")
    return document
