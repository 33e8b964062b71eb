"""Limits of an adapter's use, whoever calls it."""

from __future__ import annotations

from pydantic import Field

from tunesmith.api.model import ApiModel, Rule

_MAX_LIMIT = 999_999_999


class AdapterLimits(ApiModel):
    """Highest use of the adapter by all API keys together. The gateway refuses further requests with 429."""

    rules = (
        Rule(
            "has(self.requestsPerMinute) || has(self.tokensPerMinute) || has(self.maxConcurrency)",
            "limits limits nothing: set requestsPerMinute, tokensPerMinute or maxConcurrency, or remove it",
            lambda self: any((self.requests_per_minute, self.tokens_per_minute, self.max_concurrency)),
        ),
    )

    requests_per_minute: int | None = Field(
        default=None, ge=1, le=_MAX_LIMIT, description="Accepted requests in a minute. Absent: no limit."
    )
    tokens_per_minute: int | None = Field(
        default=None, ge=1, le=_MAX_LIMIT, description="Tokens of prompts and answers in a minute. Absent: no limit."
    )
    max_concurrency: int | None = Field(
        default=None,
        ge=1,
        le=_MAX_LIMIT,
        description="Sequences (choices × prompts) that are held or running at once. Absent: no limit.",
    )
