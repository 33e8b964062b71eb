"""Settings of the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from tunesmith.contracts.agent import AGENT_PORT, ENGINE_PORT, GATEWAY_INTERNAL_PORT, GATEWAY_PORT
from tunesmith.contracts.apikey import MAX_LIMIT
from tunesmith.contracts.settings import ChartValue, Internal, SettingPattern
from tunesmith.gateway.cors import Origins  # noqa: TC001 - read by pydantic
from tunesmith.gateway.issuer import OidcSettings
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
    oidc_issuer: Annotated[
        str,
        Field(max_length=512),
        SettingPattern("|https?://.+", "a URL"),
        ChartValue("gateway.oidc.issuer", narrower={"pattern": "^$|^https://.+$"}),
    ] = ""
    """URL of the OpenID Connect issuer whose tokens are accepted beside API keys, as they have it in `iss`; empty:
    none."""
    oidc_audience: Annotated[str, Field(max_length=512), ChartValue("gateway.oidc.audience")] = ""
    """Audience (`aud`) that a token must have."""
    oidc_namespace_claim: Annotated[str, Field(max_length=253), ChartValue("gateway.oidc.namespaceClaim")] = ""
    """Claim of a token with the namespace whose models it may call, or a list of them; the first one is its own."""
    oidc_requests_per_minute: Annotated[
        int, Field(ge=0, le=MAX_LIMIT), ChartValue("gateway.oidc.requestsPerMinute")
    ] = 0
    """Requests in a minute of each subject of a token; 0: no limit."""
    oidc_tokens_per_day: Annotated[int, Field(ge=0, le=MAX_LIMIT), ChartValue("gateway.oidc.tokensPerDay")] = 0
    """Tokens of prompts and answers in a day of each subject of a token; 0: no limit."""
    oidc_max_concurrency: Annotated[int, Field(ge=0, le=MAX_LIMIT), ChartValue("gateway.oidc.maxConcurrency")] = 0
    """Sequences at once of each subject of a token; 0: no limit."""
    access_log: Annotated[bool, ChartValue("gateway.accessLog")] = True
    """Write a line of JSON to stdout for each request, without API keys and contents."""
    cors_origins: Annotated[Origins, ChartValue("gateway.corsOrigins")] = ()
    """Origins whose web pages may call the gateway from a browser, such as https://app.example.com; `*`: all; empty:
    none."""
    tracing_endpoint: Annotated[
        str,
        SettingPattern(
            r"(https?://[A-Za-z0-9.:_\[\]-]+(/[A-Za-z0-9._/-]*)?)?", "an http:// or https:// URL, without a query"
        ),
        ChartValue("gateway.tracing.endpoint"),
    ] = ""
    """URL of an OpenTelemetry collector's OTLP receiver over HTTP, without /v1/traces; empty: no traces."""
    tracing_sampling_ratio: Annotated[
        float, Field(ge=0, le=1, allow_inf_nan=False), ChartValue("gateway.tracing.samplingRatio")
    ] = 0.1
    """Share of the requests whose trace is recorded."""
    tracing_follow_clients: Annotated[bool, ChartValue("gateway.tracing.followClients")] = False
    """Also record each request whose client's header `traceparent` asks for it; otherwise such requests are recorded
    at --tracing-sampling-ratio as well."""
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

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.oidc_issuer and not (self.oidc_audience and self.oidc_namespace_claim):
            raise ValueError(
                "tokens of an issuer need --oidc-audience and --oidc-namespace-claim (chart values"
                " gateway.oidc.audience and gateway.oidc.namespaceClaim): set both, or remove --oidc-issuer"
            )
        return self

    def oidc(self) -> OidcSettings | None:
        """Return what a token must have; None: no issuer is configured."""
        if not self.oidc_issuer:
            return None
        return OidcSettings(
            self.oidc_issuer,
            self.oidc_audience,
            self.oidc_namespace_claim,
            self.oidc_requests_per_minute or None,
            self.oidc_tokens_per_day or None,
            self.oidc_max_concurrency or None,
        )
