"""Settings of the operator."""

from __future__ import annotations

import socket
import uuid
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field
from pydantic_settings import SettingsConfigDict

from tunesmith.contracts.network import Manifest, NetworkPolicySettings, parse_peers
from tunesmith.contracts.scheduling import AllowedScheduling
from tunesmith.contracts.settings import ChartValue, Internal, SettingPattern
from tunesmith.jobs.settings import JobSettings
from tunesmith.serving.settings import PoolSettings
from tunesmith.settings import ClusterSettings

_POD = Internal("the Deployment's ports and probes name it")


class OperatorSettings(JobSettings, PoolSettings, AllowedScheduling, ClusterSettings):
    """Settings of the operator and of the pods that it creates."""

    model_config = SettingsConfigDict()

    program: ClassVar[str] = "tunesmith-operator"
    description: ClassVar[str] = "Train FineTuneJobs, and serve AdapterDeployments on ServingPools."
    example: ClassVar[str] = (
        "--store s3://bucket/store --namespace tunesmith-system --trainer-image registry.example/trainer:1"
        " --agent-image registry.example/agent:1 --engine-image vllm/vllm-openai:v0.32.0"
    )

    instance: Annotated[str, ChartValue(".Release.Name", ".Release.Name")] = "tunesmith"
    """Name of the release: the label app.kubernetes.io/instance of the gateways' pods."""
    network_policies: Annotated[bool, ChartValue("networkPolicy.enabled")] = True
    """Create a NetworkPolicy beside each pool and job. Jobs on several nodes have one in any case."""
    metrics_from: Annotated[
        tuple[Manifest, ...],
        BeforeValidator(lambda value: parse_peers(value) if isinstance(value, str) else value),
        ChartValue("networkPolicy.metricsFrom", "toJson .Values.networkPolicy.metricsFrom"),
    ] = ()
    """NetworkPolicy peers that may read metrics of pools and jobs, as a JSON list."""
    gateway_url: Annotated[str, ChartValue("gateway.externalUrl", 'include "tunesmith.clientUrl" .')] = ""
    """URL of the gateway for clients, which the status of AdapterDeployments shows."""
    prometheus_url: Annotated[
        str,
        SettingPattern(r"(https?://[^\s?#]+)?", "a URL such as http://prometheus.monitoring:9090"),
        ChartValue("prometheus.url"),
    ] = ""
    """URL of the Prometheus that evaluates the expressions of spec.rollout.analysis; empty: none is evaluated. Whoever
    may create AdapterDeployments can read any of its metrics."""
    lease_seconds: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False),
        ChartValue("operator.leaseSeconds", narrower={"type": "integer", "minimum": 2, "maximum": 300}),
    ] = 5
    """Seconds after which another replica takes over from a silent one."""
    leader_election: Annotated[bool, Internal("only a single replica that is started by hand can do without")] = True
    """Reconcile only while this replica holds the Lease."""
    identity: Annotated[str, Internal("the chart's Deployment sets it to the pod's UID"), Field(min_length=1)] = Field(
        default_factory=lambda: f"{socket.gethostname()}-{uuid.uuid4()}"
    )
    """Unique name of this replica in the Lease."""
    workers: Annotated[int, Field(ge=1), Internal("the default suits thousands of resources")] = 8
    """Reconciles that run at once."""
    relist_seconds: Annotated[
        float, Field(gt=0, allow_inf_nan=False), Internal("changes arrive by watches, so it need not be shorter")
    ] = 60
    """Seconds between complete lists, which repair whatever a watch missed."""
    probe_port: Annotated[int, Field(ge=0, le=65535), _POD] = 8080
    """Port of /healthz and /readyz; 0: any free one."""
    metrics_port: Annotated[int, Field(ge=0, le=65535), _POD] = 9090
    """Port of /metrics; 0: any free one."""

    @property
    def network(self) -> NetworkPolicySettings:
        """Parts of the installation that NetworkPolicies refer to."""
        return NetworkPolicySettings(self.namespace, self.instance, self.network_policies, self.metrics_from)
