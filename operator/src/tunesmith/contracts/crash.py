"""Crashes of engines, and the requests that are refused because they were in flight at several of them.

An engine's supervisor reports each exit to the agent of its pod. The agents' event streams carry the crashes to the
operator and to every gateway, and each of them applies `CrashLedger` to all crashes of a pool.

A gateway sends the digest of each request to the engine with it. A digest contains the secret salt of the key's
namespace, so only requests of the same namespace, with the same body and the same revision, have the same digest: a
tenant cannot have another's requests refused, and nobody can find out a body from its digest.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, ConfigDict, Field

from tunesmith.api.model import StatusModel

if TYPE_CHECKING:
    from collections.abc import Iterable

EXITS_PATH = "/v1/engine-exits"
"""Path of the agent's API to which the supervisor of the engine sends its reports."""
DIGEST_HEADER = "x-tunesmith-digest"
"""Header with which a gateway sends the digest of a request to an engine."""
ENGINE_LOST_HEADER = "x-tunesmith-engine-lost"
"""Header of an engine's error which shows that the engine died while it processed the request."""
MAX_CRASHES = 2
"""Number of crashes during which a request was in flight after which it is refused."""
REFUSED_SECONDS = 3600.0
"""Seconds for which a request is refused after the last of these crashes, and for which a crash counts."""
MAX_CRASHED_REQUESTS = 256
"""Highest number of requests in the report of a crash."""
MAX_POD_CRASHES = 16
"""Highest number of crashes that a pod reports, the latest ones."""
MAX_LEDGER_REQUESTS = 4096
"""Highest number of requests in the ledger of a pool."""
SHOWN_DIGITS = 16
"""Number of a digest's digits in messages."""
_TENANT_DIGITS = 8
_BODY_DIGITS = 40
_MAX_REASON = 600
_MAX_RECORDED = 4096

_Reason = Annotated[str, BeforeValidator(lambda text: text[:_MAX_REASON] if isinstance(text, str) else text)]


class _WireModel(StatusModel):
    model_config = ConfigDict(strict=True, hide_input_in_errors=True)


class CrashedRequest(_WireModel):
    """A request that an engine was processing when it crashed. `model`: the engine's name of the model."""

    digest: str = Field(pattern=r"^[0-9a-f]{48}$")
    model: str = Field(min_length=1, max_length=256)


class EngineCrash(_WireModel):
    """A crash. `at`: seconds since 1970. `reason`: a phrase with the last error line."""

    id: str = Field(pattern=r"^[0-9a-f]{16}$")
    at: float = Field(ge=0, le=2**53)
    reason: _Reason
    was_ready: bool = Field(description="True if the engine had answered its health check.")
    requests: list[CrashedRequest] = Field(default_factory=list, max_length=MAX_CRASHED_REQUESTS)


class EngineExit(EngineCrash):
    """Body of `POST /v1/engine-exits`. `is_crash`: False if the agent had requested a restart."""

    started_at: float = Field(ge=0, le=2**53)
    is_crash: bool


def request_digest(tenant_salt: str, path: str, engine_name: str, body: Iterable[bytes | memoryview]) -> str:
    """Return the digest of a request.

    Args:
        tenant_salt: secret salt of the namespace of the client's key, at most 64 characters.
        path: path of the API.
        engine_name: the engine's name of the model.
        body: the body in pieces.
    """
    key = tenant_salt.encode()
    content = hashlib.blake2b(f"{path}\0{engine_name}\0".encode(), digest_size=_BODY_DIGITS // 2, key=key)
    for piece in body:
        content.update(piece)
    tenant = hashlib.blake2b(b"tenant", digest_size=_TENANT_DIGITS // 2, key=key)
    return tenant.hexdigest() + content.hexdigest()


@dataclass(slots=True)
class SuspectRequest:
    """A request that was in flight at crashes. `last`: time of the latest one, seconds since 1970."""

    digest: str
    model: str
    crashes: int = 0
    last: float = 0.0

    @property
    def is_refused(self) -> bool:
        """True if gateways refuse it until `until`."""
        return self.crashes >= MAX_CRASHES

    @property
    def until(self) -> float:
        """Time after which it is forgotten."""
        return self.last + REFUSED_SECONDS


class CrashLedger:
    """Requests that were in flight at the crashes of a pool's engines.

    It is bounded: if it is full, the tenant with the most entries loses its oldest one, of those at one crash only if
    there are any, so that a tenant displaces only its own.
    """

    def __init__(self) -> None:
        self._suspects: dict[str, SuspectRequest] = {}
        self._by_tenant: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
        self._recorded: dict[str, float] = {}

    def record(self, crash: EngineCrash, now: float) -> bool:
        """Count a crash once; return True if it was new. `now`: seconds since 1970."""
        # A clock that is ahead must not extend the time for which a request is refused.
        at = min(crash.at, now)
        self._forget(now)
        if crash.id in self._recorded or at + REFUSED_SECONDS <= now:
            return False
        if len(self._recorded) >= _MAX_RECORDED:
            del self._recorded[next(iter(self._recorded))]
        self._recorded[crash.id] = at
        for digest, model in {request.digest: request.model for request in crash.requests}.items():
            suspect = self._suspects.get(digest) or self._add(digest, model)
            suspect.crashes += 1
            suspect.last = max(suspect.last, at)
            if suspect.is_refused:
                once, repeatedly = self._by_tenant[digest[:_TENANT_DIGITS]]
                once.pop(digest, None)
                repeatedly[digest] = None
        return True

    def find(self, digest: str, now: float) -> SuspectRequest | None:
        """Return the crashes during which a request was in flight; None without any."""
        suspect = self._suspects.get(digest)
        return suspect if suspect is not None and suspect.until > now else None

    def refused(self, now: float) -> list[SuspectRequest]:
        """Return the requests that are refused now."""
        return [suspect for suspect in self._suspects.values() if suspect.is_refused and suspect.until > now]

    def is_empty(self, now: float) -> bool:
        """Return True if no crash counts any more."""
        self._forget(now)
        return not self._recorded

    def _add(self, digest: str, model: str) -> SuspectRequest:
        if len(self._suspects) >= MAX_LEDGER_REQUESTS:
            once, repeatedly = max(self._by_tenant.values(), key=lambda entries: len(entries[0]) + len(entries[1]))
            self._remove(next(iter(once or repeatedly)))
        suspect = self._suspects[digest] = SuspectRequest(digest, model)
        self._by_tenant.setdefault(digest[:_TENANT_DIGITS], ({}, {}))[0][digest] = None
        return suspect

    def _remove(self, digest: str) -> None:
        del self._suspects[digest]
        tenant = digest[:_TENANT_DIGITS]
        for entries in self._by_tenant[tenant]:
            entries.pop(digest, None)
        if not any(self._by_tenant[tenant]):
            del self._by_tenant[tenant]

    def _forget(self, now: float) -> None:
        for digest in [digest for digest, suspect in self._suspects.items() if suspect.until <= now]:
            self._remove(digest)
        for crash in [crash for crash, at in self._recorded.items() if at + REFUSED_SECONDS <= now]:
            del self._recorded[crash]
