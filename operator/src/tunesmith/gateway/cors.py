"""Answers to browsers: pages of the listed origins may call the gateway (CORS). Pure.

A page sends its API key in a header, never in a cookie, so credentials are not allowed. Source: the Fetch standard,
https://fetch.spec.whatwg.org/#http-cors-protocol.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from tunesmith.contracts.settings import COMMA_SEPARATED, MAX_ENTRIES, SettingPattern

if TYPE_CHECKING:
    from collections.abc import Mapping

Origins = Annotated[
    tuple[
        Annotated[
            str,
            SettingPattern(
                r"\*|https?://[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?(:[0-9]{1,5})?",
                "an origin such as https://app.example.com (without a path), or * for all",
            ),
        ],
        ...,
    ],
    Field(max_length=MAX_ENTRIES),
    COMMA_SEPARATED,
]

_METHODS = "GET, POST"
_EXPOSED = ", ".join(
    (
        "x-request-id",
        "retry-after",
        "x-should-retry",
        *(f"x-ratelimit-{part}-{what}" for part in ("limit", "remaining", "reset") for what in ("requests", "tokens")),
    )
)
_MAX_AGE_SECONDS = "3600"
_MAX_HEADERS = 2048


class Cors:
    """The origins whose pages may call the gateway.

    Args:
        origins: such as `https://app.example.com`; `*`: all.
    """

    def __init__(self, origins: tuple[str, ...]) -> None:
        self._origins = frozenset(origins)

    def headers(self, request: Mapping[str, str]) -> dict[str, str]:
        """Return the headers of an answer, given those of the request; empty if its page may not read the answer."""
        origin = request.get("Origin", "")
        if not self._origins:
            return {}
        if origin not in self._origins and "*" not in self._origins:
            return {"Vary": "Origin"}
        return {
            "Access-Control-Allow-Origin": "*" if "*" in self._origins else origin,
            "Access-Control-Expose-Headers": _EXPOSED,
            "Vary": "Origin",
        }

    def preflight(self, method: str, request: Mapping[str, str]) -> dict[str, str] | None:
        """Return the headers of the answer to a browser's question before a request; None for other requests.

        The question carries no API key.
        """
        allowed = self.headers(request)
        if (
            method != "OPTIONS"
            or "Access-Control-Request-Method" not in request
            or "Access-Control-Allow-Origin" not in allowed
        ):
            return None
        # The headers that a page may send are not bounded by a list: clients add their own, which do nothing.
        headers = request.get("Access-Control-Request-Headers", "")
        return {
            **allowed,
            "Access-Control-Allow-Methods": _METHODS,
            "Access-Control-Allow-Headers": headers if len(headers) <= _MAX_HEADERS else "authorization, content-type",
            "Access-Control-Max-Age": _MAX_AGE_SECONDS,
        }
