"""The protocol between the operator, the agent of a pool pod, the engine's middleware and the gateway."""

from __future__ import annotations

import hashlib
import hmac
from enum import StrEnum

from pydantic import Field

from tunesmith.api.model import StatusModel

AGENT_PORT = 9000
"""Port of the agent: PUT /v1/adapters, GET /v1/events, POST /drain, GET /healthz, GET /metrics."""
ENGINE_PORT = 8000
"""Port of vLLM."""
SILENCE_SECONDS = 3.0
"""After this long without a line, what an event stream said is unknown."""
HEARTBEAT_SECONDS = 1.0


Keys = tuple[bytes, ...]
"""A key and its predecessors, newest first. More than one while the installation key is being rotated: clients present
the newest that is accepted, servers accept all of them. A file holds one key a line in this order."""
_MAX_KEYS = 2
_MIN_KEY_LENGTH = 16


def parse_keys(content: bytes) -> Keys:
    """Return the keys of a file.

    Raises:
        ValueError: there is no key, there are too many, or one is too short; the message never contains one.
    """
    keys = tuple(line.strip() for line in content.splitlines() if line.strip())
    if not keys:
        raise ValueError("there is no key")
    if len(keys) > _MAX_KEYS:
        raise ValueError(f"there are {len(keys)} keys, at most {_MAX_KEYS} are expected: the current and the previous")
    if min(map(len, keys)) < _MIN_KEY_LENGTH:
        raise ValueError(f"a key is shorter than {_MIN_KEY_LENGTH} characters")
    return keys


def keys_file(keys: Keys) -> bytes:
    """Return the content of a file with these keys."""
    return b"".join(key + b"\n" for key in keys)


def gateway_keys(installation: Keys) -> Keys:
    """Derive the gateways' keys. No control key can be derived from them."""
    return _derived(installation, "gateway")


def control_keys(installation: Keys, pool_namespace: str, pool_uid: str) -> Keys:
    """Derive a pool's keys for what changes a pod: PUT /v1/adapters and POST /drain of its agent."""
    return _derived(installation, f"control/{pool_namespace}/{pool_uid}")


def serving_keys(gateway: Keys, pool_namespace: str, pool_uid: str) -> Keys:
    """Derive a pool's keys for requests to its engines, from the gateways' keys."""
    return _derived(gateway, f"serving/{pool_namespace}/{pool_uid}")


def events_keys(gateway: Keys, pool_namespace: str, pool_uid: str) -> Keys:
    """Derive a pool's keys for the event streams of its agents, from the gateways' keys."""
    return _derived(gateway, f"events/{pool_namespace}/{pool_uid}")


def pod_tokens(pool: Keys, pod_uid: str) -> tuple[str, ...]:
    """Derive the bearer tokens of one pod from its pool's keys, so that what one pod is sent is refused by all others.

    The engine's middleware derives the same with the standard library: HMAC-SHA256 of the pod's UID, hex.
    """
    return _tokens(pool, pod_uid)


def demand_tokens(gateway: Keys) -> tuple[str, ...]:
    """Derive the bearer tokens of the gateways' demand stream."""
    return _tokens(gateway, "demand")


def accepts(presented: str, tokens: tuple[str, ...]) -> bool:
    """True if the value of an Authorization header is one of the bearer tokens; all are compared, in constant time."""
    scheme, _, token = presented.partition(" ")
    given = token.strip().encode("utf-8", "surrogateescape")
    equal = [hmac.compare_digest(given, expected.encode()) for expected in tokens]
    return scheme.lower() == "bearer" and any(equal)


def _derived(keys: Keys, purpose: str) -> Keys:
    return tuple(_hex(key, purpose).encode() for key in keys)


def _tokens(keys: Keys, purpose: str) -> tuple[str, ...]:
    return tuple(_hex(key, purpose) for key in keys)


def _hex(key: bytes, purpose: str) -> str:
    return hmac.new(key, purpose.encode(), hashlib.sha256).hexdigest()


MAX_MESSAGE = 1000
"""Longest sentence of an agent, in characters."""


class DesiredAdapter(StatusModel):
    """A revision that a pod should hold."""

    engine_name: str
    digest: str
    uri: str


class DesiredAdapters(StatusModel):
    """The body of `PUT /v1/adapters`: the whole list. A lower (epoch, sequence) than the last is refused with 409."""

    epoch: int = Field(ge=0)
    sequence: int = Field(ge=0)
    adapters: list[DesiredAdapter]


class ResidencyState(StrEnum):
    """How far a revision is on one pod."""

    DOWNLOADING = "Downloading"
    LOADING = "Loading"
    RESIDENT = "Resident"
    UNLOADING = "Unloading"
    FAILED = "Failed"


class Residency(StatusModel):
    """A revision on one pod. `permanent`: trying again cannot help (a damaged or unfit artifact)."""

    engine_name: str
    digest: str
    state: ResidencyState
    message: str = ""
    permanent: bool = False


class PodState(StatusModel):
    """One line of `GET /v1/events` (NDJSON): the whole state of the pod, on every change and at least every second."""

    epoch: int = 0
    sequence: int = 0
    base_model_fingerprint: str | None = None
    engine_ready: bool = False
    draining: bool = False
    problem: str = Field(
        default="",
        max_length=MAX_MESSAGE,
        description="Why the pod must not get requests although its engine answers /health; empty: nothing is known "
        "against it.",
    )
    adapters: list[Residency] = Field(default_factory=list)
    in_flight: dict[str, int] = Field(
        default_factory=dict, description="Requests in the engine by model (engine name, or the base's id)."
    )


class AdapterDemand(StatusModel):
    """Requests for one model at one gateway replica."""

    running: int = Field(default=0, ge=0, description="Forwarded to a pod and not finished.")
    waiting: int = Field(default=0, ge=0, description="Held by the gateway.")


class GatewayDemand(StatusModel):
    """One line of a gateway's `GET /v1/demand` (NDJSON), on its internal port: on change, at least every second."""

    models: dict[str, AdapterDemand] = Field(
        default_factory=dict, description="By global id, <namespace>/<modelName>, of adapters and of pools' bases."
    )


GATEWAY_PORT = 8000
GATEWAY_INTERNAL_PORT = 8081
"""Demand, metrics and probes of the gateway."""
