"""The protocol between the operator, the agent of a pool pod, the engine's middleware and the gateway."""

from __future__ import annotations

import hashlib
import hmac
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from tunesmith.api.model import StatusModel
from tunesmith.api.parity import ParityMode, ParityVerdict
from tunesmith.api.servingpool import MAX_DESIRED_ADAPTERS
from tunesmith.contracts.crash import MAX_POD_CRASHES, EngineCrash
from tunesmith.contracts.traffic import MAX_COMPARISONS, MAX_TRAFFIC_PER_LINE, Comparison, Traffic

if TYPE_CHECKING:
    from collections.abc import Iterable

AGENT_PORT = 9000
"""Port of the agent: PUT /v1/adapters, GET /v1/events, POST /drain, GET /healthz, GET /metrics."""
ENGINE_PORT = 8000
"""Port of vLLM."""
STALE_AFTER_SECONDS = 3.0
"""Seconds without a line after which the state from an event stream is unknown."""
HEARTBEAT_SECONDS = 1.0
TRAFFIC_SECONDS = 5.0
"""Shortest time between two reports of traffic, of agents and gateways."""
EVENTS_WITH_TRAFFIC = "/v1/events?traffic=true"
"""Path of an agent's event stream for a reader that analyses the traffic; gateways do not."""

METRICS_REFUSAL = "metrics require the token in the Secret tunesmith-metrics-token of the release's namespace\n"
Keys = tuple[bytes, ...]
"""A key and its predecessors, newest first. There are several while the installation key is being rotated: clients
present the newest accepted one, and servers accept all. A file has one key per line, in this order."""
_MAX_KEYS = 2
_MIN_KEY_LENGTH = 16


def parse_keys(content: bytes) -> Keys:
    """Return the keys of a file.

    Raises:
        ValueError: there is no key, there are too many, or one is too short; the message never contains a key.
    """
    keys = tuple(line.strip() for line in content.splitlines() if line.strip())
    if not keys:
        raise ValueError("the file contains no key")
    if len(keys) > _MAX_KEYS:
        raise ValueError(
            f"the file contains {len(keys)} keys; at most {_MAX_KEYS} are allowed: the current and the previous one"
        )
    if min(map(len, keys)) < _MIN_KEY_LENGTH:
        raise ValueError(f"a key is shorter than {_MIN_KEY_LENGTH} characters")
    return keys


def keys_file(keys: Keys) -> bytes:
    """Return the content of a file with the keys."""
    return b"".join(key + b"\n" for key in keys)


def gateway_keys(installation: Keys) -> Keys:
    """Derive the gateways' keys, from which no control key can be derived."""
    return _derived(installation, "gateway")


def control_keys(installation: Keys, pool_namespace: str, pool_uid: str) -> Keys:
    """Derive a pool's keys for requests that change a pod: PUT /v1/adapters and POST /drain of its agent."""
    return _derived(installation, f"control/{pool_namespace}/{pool_uid}")


def serving_keys(gateway: Keys, pool_namespace: str, pool_uid: str) -> Keys:
    """Derive a pool's keys for requests to its engines, from the gateways' keys."""
    return _derived(gateway, f"serving/{pool_namespace}/{pool_uid}")


def events_keys(gateway: Keys, pool_namespace: str, pool_uid: str) -> Keys:
    """Derive a pool's keys for the event streams of its agents, from the gateways' keys."""
    return _derived(gateway, f"events/{pool_namespace}/{pool_uid}")


def pod_tokens(pool: Keys, pod_uid: str) -> tuple[str, ...]:
    """Derive the bearer tokens of one pod from its pool's keys. No other pod accepts them.

    The engine's middleware derives the same tokens with the standard library: HMAC-SHA256 of the pod's UID, hex.
    """
    return _tokens(pool, pod_uid)


def demand_tokens(gateway: Keys) -> tuple[str, ...]:
    """Derive the bearer tokens of the gateways' demand stream."""
    return _tokens(gateway, "demand")


def metrics_tokens(gateway: Keys) -> tuple[str, ...]:
    """Derive the bearer tokens of /metrics of operator, gateways and agents."""
    return _tokens(gateway, "metrics")


def metrics_digests(gateway: Keys) -> Keys:
    """Return the digests by which agents check the tokens of /metrics.

    A pool's Secret has these instead of the keys, so that its readers cannot read all metrics.
    """
    return tuple(_digest(token) for token in metrics_tokens(gateway))


def accepts_digest(presented: str, digests: Keys) -> bool:
    """Return True if the value of an Authorization header is a bearer token with one of the digests."""
    scheme, _, token = presented.partition(" ")
    given = _digest(token.strip())
    equal = [hmac.compare_digest(given, digest) for digest in digests]
    return scheme.lower() == "bearer" and any(equal)


def accepts(presented: str, tokens: tuple[str, ...]) -> bool:
    """Return True if an Authorization header's value is one of the bearer tokens; compares all in constant time."""
    scheme, _, token = presented.partition(" ")
    given = token.strip().encode("utf-8", "surrogateescape")
    equal = [hmac.compare_digest(given, expected.encode()) for expected in tokens]
    return scheme.lower() == "bearer" and any(equal)


def _derived(keys: Keys, purpose: str) -> Keys:
    return tuple(_hex(key, purpose).encode() for key in keys)


def _tokens(keys: Keys, purpose: str) -> tuple[str, ...]:
    return tuple(_hex(key, purpose) for key in keys)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest().encode()


def _hex(key: bytes, purpose: str) -> str:
    return hmac.new(key, purpose.encode(), hashlib.sha256).hexdigest()


MAX_MESSAGE = 1000
"""Longest message of an agent, in characters."""
MAX_ADAPTERS = 2048
"""Highest number of revisions on one pod, with those still being unloaded."""
MAX_MODELS = 20_000
"""Highest number of models with requests that a gateway reports."""
MAX_USED_KEYS = 20_000
"""Highest number of API keys whose last use a gateway reports."""
MAX_REQUESTS = 1_000_000
"""Highest plausible number of requests for one model at one gateway; a higher one is invalid."""
MAX_EPOCH_LEAD = 24 * 3600
"""Highest accepted lead, in seconds, of an epoch over an agent's clock. An epoch is at least the time, in seconds since
1970, at which its leader began; without this limit a single request could lock out all future leaders."""
_MAX_NUMBER = 2**53


class _WireModel(StatusModel):
    """Message from another process: values are not converted, and errors do not contain the input."""

    model_config = ConfigDict(strict=True, hide_input_in_errors=True)


EngineName = Annotated[str, Field(min_length=1, max_length=256)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Message = Annotated[str, BeforeValidator(lambda text: text[:MAX_MESSAGE] if isinstance(text, str) else text)]
"""A message; cut to `MAX_MESSAGE` characters."""


class DesiredAdapter(_WireModel):
    """Desired revision of a pod. `parity`: with `Required` it is reported as resident only after its check passed."""

    engine_name: EngineName
    digest: Digest
    uri: str = Field(max_length=2048)
    parity: ParityMode = ParityMode.REPORT


class DesiredAdapters(_WireModel):
    """Body of `PUT /v1/adapters`: the whole list. A lower (epoch, sequence) than the last is refused with 409."""

    epoch: int = Field(ge=0, le=_MAX_NUMBER)
    sequence: int = Field(ge=0, le=_MAX_NUMBER)
    adapters: list[DesiredAdapter] = Field(max_length=MAX_DESIRED_ADAPTERS)


def list_digest(adapters: Iterable[DesiredAdapter]) -> str:
    """Return the digest of a list; the operator compares it to check that an agent has the list that it sent."""
    lines = sorted(
        f"{adapter.engine_name}\0{adapter.digest}\0{adapter.uri}"
        # Agents of earlier releases ignore the field, and their digest must agree wherever it has its default.
        + ("" if adapter.parity is ParityMode.REPORT else f"\0{adapter.parity}")
        for adapter in adapters
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class ResidencyState(StrEnum):
    """State of a revision on one pod."""

    DOWNLOADING = "Downloading"
    LOADING = "Loading"
    RESIDENT = "Resident"
    UNLOADING = "Unloading"
    FAILED = "Failed"


class AdapterParity(_WireModel):
    """Result of the parity check of a revision on one pod. Distances are in nats; None: not measured."""

    verdict: ParityVerdict
    distance: float | None = Field(default=None, ge=0, le=1000, allow_inf_nan=False)
    base_distance: float | None = Field(default=None, ge=0, le=1000, allow_inf_nan=False)
    gap: float | None = Field(default=None, ge=0, le=1000, allow_inf_nan=False)
    tolerance: float | None = Field(default=None, ge=0, le=1000, allow_inf_nan=False)
    message: Message = ""


class Residency(_WireModel):
    """A revision on one pod.

    `digest`: empty if the engine holds a revision that is not wanted. `permanent`: a retry cannot succeed (a damaged or
    unsuitable artifact). `size_bytes`: size of its files on the pod's disk. `loads`: number of its loads into the
    engine, and `load_seconds`: duration of the latest one, since the agent's start. `parity`: result of the check after
    the latest load; None: it is off, or not finished.
    """

    engine_name: EngineName
    digest: Digest | Literal[""]
    state: ResidencyState
    message: Message = ""
    permanent: bool = False
    size_bytes: int = Field(default=0, ge=0, le=_MAX_NUMBER)
    loads: int = Field(default=0, ge=0, le=_MAX_NUMBER)
    load_seconds: float = Field(default=0.0, ge=0, le=_MAX_NUMBER, allow_inf_nan=False)
    parity: AdapterParity | None = None


class PodUse(_WireModel):
    """Adapters in use on a pod, and the disk and memory that its adapters occupy."""

    slots: int | None = Field(
        default=None, ge=1, le=MAX_ADAPTERS, description="Adapters that compute at the same time; null: unknown."
    )
    max_adapters: int = Field(default=0, ge=0, le=MAX_ADAPTERS, description="Adapters that may be registered.")
    active: list[EngineName] = Field(
        default_factory=list, max_length=MAX_ADAPTERS, description="Adapters with requests in the engine."
    )
    running: int = Field(default=0, ge=0, le=MAX_ADAPTERS, description="Adapters with requests in slots.")
    waiting: int = Field(
        default=0, ge=0, le=MAX_ADAPTERS, description="Adapters whose requests wait for a slot of the engine."
    )
    memory_bytes: int = Field(default=0, ge=0, le=_MAX_NUMBER, description="Size of the engine's cache of adapters.")
    memory_limit_bytes: int | None = Field(
        default=None, ge=0, le=_MAX_NUMBER, description="Highest size of that cache; null: unlimited or unknown."
    )
    disk_bytes: int = Field(default=0, ge=0, le=_MAX_NUMBER, description="Size of the adapters' files on the pod.")
    disk_limit_bytes: int = Field(default=0, ge=0, le=_MAX_NUMBER, description="Highest size of those files.")
    reloads: int = Field(
        default=0,
        ge=0,
        le=_MAX_NUMBER,
        description="Times that the engine read the files of an adapter again, which its cache no longer had.",
    )


class PodHeader(_WireModel):
    """State of a pod without its revisions. `list_digest`: digest of the list with the number (epoch, sequence)."""

    epoch: int = Field(default=0, ge=0, le=_MAX_NUMBER)
    sequence: int = Field(default=0, ge=0, le=_MAX_NUMBER)
    list_digest: str = Field(default="", max_length=64)
    base_model_fingerprint: str | None = Field(default=None, max_length=128)
    engine_ready: bool = False
    draining: bool = False
    problem: Message = Field(
        default="",
        description="Reason why the pod must not receive requests although its engine answers /health; empty: none.",
    )
    stalled: Message = Field(
        default="",
        description="Reason why the pod temporarily receives no requests although it keeps its adapters; empty: none.",
    )
    use: PodUse = Field(default_factory=PodUse)
    engine_crashes: int = Field(default=0, ge=0, le=_MAX_NUMBER, description="Crashes of the engine in this pod.")
    engine_start_seconds: float | None = Field(
        default=None,
        ge=0,
        le=_MAX_NUMBER,
        description="Time from the latest start of the engine's process until it accepted adapters.",
    )


class PodState(PodHeader):
    """Complete state of a pod."""

    adapters: list[Residency] = Field(default_factory=list, max_length=MAX_ADAPTERS)
    crashes: list[EngineCrash] = Field(
        default_factory=list, max_length=MAX_POD_CRASHES, description="Crashes of the past hour, oldest first."
    )
    traffic: dict[EngineName, Traffic] = Field(
        default_factory=dict,
        max_length=MAX_ADAPTERS,
        description="Traffic of the revisions since the engine's start; those without requests are absent.",
    )


class PodEvent(PodHeader):
    """One line of `GET /v1/events` (NDJSON): on every change and at least every second.

    The first line of a stream is a snapshot; each later line holds the changes. `residency_digest` covers all revisions
    as of the line, so a reader that missed a change detects it and reconnects for another snapshot. `crashes`: those
    that no earlier line of the stream had. `traffic`: that of revisions for which it changed, at most every
    `TRAFFIC_SECONDS`, and only in streams with the parameter `traffic=true`.
    """

    snapshot: bool = False
    changed: list[Residency] = Field(default_factory=list, max_length=MAX_ADAPTERS)
    removed: list[EngineName] = Field(default_factory=list, max_length=MAX_ADAPTERS)
    residency_digest: str = Field(max_length=64)
    crashes: list[EngineCrash] = Field(default_factory=list, max_length=MAX_POD_CRASHES)
    traffic: dict[EngineName, Traffic] = Field(default_factory=dict, max_length=MAX_TRAFFIC_PER_LINE)


class AdapterDemand(_WireModel):
    """Requests for one model at one gateway replica."""

    running: int = Field(
        default=0, ge=0, le=MAX_REQUESTS, description="Requests that were forwarded to a pod and have not finished."
    )
    waiting: int = Field(default=0, ge=0, le=MAX_REQUESTS, description="Requests that wait in the gateway.")
    arrival_rate: float = Field(
        default=0.0,
        ge=0,
        le=MAX_REQUESTS,
        allow_inf_nan=False,
        description="Requests that arrive per second; see `tunesmith.contracts.load`.",
    )
    service_seconds: float | None = Field(
        default=None,
        ge=0,
        le=_MAX_NUMBER,
        allow_inf_nan=False,
        description="Mean time of recent requests on a pod; null: none has finished yet.",
    )


class GatewayDemand(_WireModel):
    """One line of a gateway's `GET /v1/demand` (NDJSON), on its internal port: on change, at least every second."""

    models: dict[Annotated[str, Field(max_length=200)], AdapterDemand] = Field(
        default_factory=dict,
        max_length=MAX_MODELS,
        description="Demand by global ID, <namespace>/<modelName>, of adapters and base models.",
    )
    comparisons: dict[EngineName, Comparison] = Field(
        default_factory=dict,
        max_length=MAX_COMPARISONS,
        description="Comparisons of shadows that changed since the preceding line; the first line of a stream has all.",
    )
    used_keys: dict[Annotated[str, Field(max_length=253)], Annotated[int, Field(ge=0)]] = Field(
        default_factory=dict,
        max_length=MAX_USED_KEYS,
        description="API keys that were used since the preceding line, with the Unix time in seconds; the first line "
        "of a stream has all. A key is repeated after a minute at the earliest.",
    )


GATEWAY_PORT = 8000
GATEWAY_INTERNAL_PORT = 8081
"""Port of the gateway's demand stream, metrics and probes."""
