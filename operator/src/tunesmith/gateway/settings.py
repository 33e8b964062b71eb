"""Settings of the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from tunesmith.contracts.agent import AGENT_PORT, ENGINE_PORT, GATEWAY_INTERNAL_PORT, GATEWAY_PORT
from tunesmith.contracts.settings import ChartValue, Internal
from tunesmith.gateway.cors import Origins  # noqa: TC001 - read by pydantic
from tunesmith.gateway.limits import Limits
from tunesmith.settings import ClusterSettings

GATEWAY_KEY_FILE = Path("/etc/tunesmith/gateway/key")
_Port = Annotated[int, Field(ge=0, le=65535)]
_POD = Internal("the Deployment's ports and probes refer to it")
_POOLS = Internal("the same in all pool pods")


class GatewaySettings(Limits, ClusterSettings):
    """Settings of the gateway."""

    model_config = SettingsConfigDict()

    program: ClassVar[str] = "tunesmith-gateway"
    description: ClassVar[str] = (
        "Serve the OpenAI API in front of the ServingPools of a cluster: the one of KUBECONFIG, or the pod's own."
    )
    example: ClassVar[str] = "--namespace tunesmith-system --gateway-key-file ./key --port 8000"

    gateway_key_file: Annotated[
        Path, Internal("the Deployment mounts the Secret tunesmith-gateway-key at this path")
    ] = GATEWAY_KEY_FILE
    """File with the gateway's key and, during a rotation, the previous one."""
    host: Annotated[str, Internal("a pod listens on all its addresses")] = ""
    """Address to listen on; empty: all."""
    port: Annotated[_Port, _POD] = GATEWAY_PORT
    """Port for clients; 0: any free port."""
    internal_port: Annotated[_Port, _POD] = GATEWAY_INTERNAL_PORT
    """Port for demand, metrics and probes; 0: any free port."""
    replicas: Annotated[
        int, Field(ge=1, le=1000), ChartValue("gateway.replicas", "toString .Values.gateway.replicas")
    ] = 1
    """Number of gateways that share the limits of API keys."""
    redis_url_file: Annotated[Path | None, Internal("the Deployment mounts the Secret of gateway.redis.secretName")] = (
        None
    )
    """File with the URL of the Redis that counts the limits of all gateways, `redis://user:password@host:6379/0`, or
    `rediss://…` with TLS. Empty: each gateway applies its share."""
    redis_ca_file: Annotated[
        Path | None, Internal("the Deployment mounts the key gateway.redis.caKey of the same Secret")
    ] = None
    """File with the certificates of the authorities that the certificate of Redis must be from; empty: the system's."""
    redis_timeout_seconds: Annotated[
        float, Field(gt=0, le=10, allow_inf_nan=False), ChartValue("gateway.redis.timeoutSeconds")
    ] = 0.25
    """Seconds after which an unanswered Redis is down and the gateway applies its share, until Redis answers again."""
    access_log: Annotated[bool, ChartValue("gateway.accessLog")] = True
    """Write a line of JSON to stdout for each request, without API keys and contents."""
    cors_origins: Annotated[Origins, ChartValue("gateway.corsOrigins")] = ()
    """Origins whose web pages may call the gateway from a browser, such as https://app.example.com; `*`: all; empty:
    none."""
    engine_port: Annotated[_Port, _POOLS] = ENGINE_PORT
    """Port of the engines."""
    agent_port: Annotated[_Port, _POOLS] = AGENT_PORT
    """Port of the agents."""
    linger_seconds: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False),
        ChartValue("gateway.lingerSeconds", narrower={"type": "integer", "maximum": 600}),
    ] = 5
    """Seconds for which new connections are accepted after SIGTERM, until load balancers send no new ones."""
    drain_seconds: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False),
        ChartValue("gateway.drainSeconds", narrower={"type": "integer", "maximum": 86400}),
    ] = 600
    """Seconds that running requests may take once new connections are refused; the remaining ones are cut off
    with an error."""
