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


def pool_token(installation_key: bytes, pool_namespace: str, pool_uid: str) -> str:
    """The bearer token of a pool's agents and engines: HMAC-SHA256 of the pool's UID, hex."""
    return hmac.new(installation_key, f"pool/{pool_namespace}/{pool_uid}".encode(), hashlib.sha256).hexdigest()


def gateway_token(installation_key: bytes) -> str:
    """The bearer token of the gateways' demand stream."""
    return hmac.new(installation_key, b"gateway-demand", hashlib.sha256).hexdigest()


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
