"""An OpenID Connect issuer whose tokens are accepted as API keys. The code that verifies them is loaded only then."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OidcSettings:
    """What a token must have, and what it may do.

    Attributes:
        issuer: URL of the issuer, as tokens have it in `iss`.
        audience: the value that `aud` must contain.
        namespace_claim: claim with the namespace, or a list of them whose first one is the home.
        requests_per_minute: limit of each subject; None: none.
        tokens_per_day: as above.
        max_concurrency: as above.
    """

    issuer: str
    audience: str
    namespace_claim: str
    requests_per_minute: int | None = None
    tokens_per_day: int | None = None
    max_concurrency: int | None = None
