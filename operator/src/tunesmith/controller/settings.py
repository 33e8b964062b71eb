"""Options of the operator: flags, each with an environment variable as its fallback."""

from __future__ import annotations

import argparse
import math
import os
import re
import socket
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tunesmith.contracts.addresses import parse_networks
from tunesmith.contracts.claims import parse_namespaces
from tunesmith.contracts.network import Network, parse_peers
from tunesmith.contracts.scheduling import DEFAULT_SCHEDULING, AllowedScheduling, parse_names, parse_tolerations
from tunesmith.storage.schemes import parse_store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How the operator runs."""

    store: str
    """Where artifacts are published, such as s3://tunesmith/store."""
    namespace: str
    """The operator's own: its Lease, its installation key and the gateways are there."""
    instance: str
    """Name of the release: the label app.kubernetes.io/instance of the gateways' pods."""
    shared_pool_namespaces: tuple[str, ...]
    """Namespaces whose pools serve adapters of other namespaces that name no pool."""
    watch_namespaces: tuple[str, ...]
    """Namespaces whose resources it serves; empty: all."""
    network: Network
    """Who may connect to the pods of pools and jobs."""
    trainer_image: str
    lm_eval_tasks: str
    """Folder in the trainer's image with the platform's own evaluation tasks; empty: none."""
    allow_task_folders: bool
    """Whether jobs may bring evaluation tasks, which are code that is run in their pods."""
    allowed_addresses: str
    """Networks that jobs may reach beside public addresses, such as `10.0.0.7/32,fd00::/8`; empty: none."""
    allowed_scheduling: AllowedScheduling
    """Where pods of jobs and pools may run."""
    agent_image: str
    engine_image: str
    """The engine's image of pools that name none."""
    gateway_url: str
    """What AdapterDeployments tell as their url."""
    image_pull_policy: str
    job_storage: str
    """Disk that a pod of a job may take, such as 500Gi."""
    adapter_storage: str
    """Disk that the adapters of a pool pod may take, such as 20Gi."""
    base_model_storage: str
    """Disk that the base model of a pool pod may take, such as 500Gi."""
    max_adapter_ratio: float
    """Highest norm of an adapter's change of a module, relative to the base's weights."""
    lease_seconds: float
    leader_election: bool
    identity: str
    workers: int
    relist_seconds: float
    probe_port: int
    metrics_port: int
    open_metrics: bool
    """True if /metrics needs no token."""
    log_level: str


_OPTIONS: tuple[tuple[str, str | None, str], ...] = (
    ("store", None, "where artifacts are published, such as s3://tunesmith/store"),
    ("namespace", None, "the operator's own namespace"),
    ("instance", "tunesmith", "name of the release, as in the label app.kubernetes.io/instance of the gateways' pods"),
    (
        "shared-pool-namespaces",
        "",
        "namespaces, separated by commas, whose pools serve adapters of others that name no pool; default: its own",
    ),
    ("watch-namespaces", "", "namespaces whose resources are served, such as team-a,team-b; empty: all"),
    ("metrics-from", "[]", "NetworkPolicy peers that may read metrics of pools and jobs, as a JSON list"),
    ("trainer-image", None, "image of validation and training pods"),
    (
        "lm-eval-tasks",
        "",
        "folder in the trainer's image with tasks of your own for lm-evaluation-harness; their functions are run",
    ),
    (
        "allowed-addresses",
        "",
        "networks that jobs may reach beside public addresses, such as the store's: 10.0.0.7/32,fd00::/8",
    ),
    (
        "allowed-priority-classes",
        ",".join(DEFAULT_SCHEDULING.priority_classes),
        "PriorityClasses that jobs and pools may name; a name that ends in * admits all that begin so",
    ),
    (
        "allowed-tolerations",
        ",".join(DEFAULT_SCHEDULING.tolerations),
        "taints that jobs and pools may tolerate, each key[=value][:effect]",
    ),
    (
        "allowed-runtime-classes",
        ",".join(DEFAULT_SCHEDULING.runtime_classes),
        "RuntimeClasses that jobs and pools may name",
    ),
    (
        "allowed-node-selectors",
        ",".join(DEFAULT_SCHEDULING.node_selectors),
        "keys of node labels by which jobs and pools may choose their nodes",
    ),
    (
        "allowed-gpu-resources",
        ",".join(DEFAULT_SCHEDULING.gpu_resources),
        "extended resources that jobs and pools may ask for as GPUs",
    ),
    ("agent-image", None, "image of the agent in pool pods"),
    ("engine-image", None, "vLLM image of pools that name none"),
    ("gateway-url", "", "URL that clients use, told in the status of AdapterDeployments"),
    ("image-pull-policy", "IfNotPresent", "pull policy of all pods: Always, IfNotPresent or Never"),
    ("job-storage", "500Gi", "disk that a pod of a job may take, in Mi or Gi"),
    ("adapter-storage", "20Gi", "disk that the adapters of a pool pod may take, in Mi or Gi"),
    ("base-model-storage", "500Gi", "disk that the downloaded base model of a pool pod may take, in Mi or Gi"),
    (
        "max-adapter-ratio",
        "4",
        "highest norm of an adapter's change of a module, relative to the base's weights; adapters above are refused",
    ),
    ("lease-seconds", "5", "seconds after which another replica takes over from one that went silent"),
    ("identity", "", "name of this replica in the Lease, unique; default: a random one"),
    ("workers", "8", "reconciles that run at once"),
    ("relist-seconds", "60", "seconds between complete lists, which repair whatever a watch missed"),
    ("probe-port", "8080", "port of /healthz and /readyz; 0: any free one"),
    ("metrics-port", "9090", "port of /metrics; 0: any free one"),
    ("log-level", "INFO", "DEBUG, INFO, WARNING or ERROR"),
)


def parse(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the command line; an absent flag is taken from `TUNESMITH_<FLAG>`.

    Raises:
        SystemExit: a flag is unknown, missing or malformed; told on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="tunesmith-operator",
        description="Tunesmith's operator: trains FineTuneJobs and serves AdapterDeployments on ServingPools.",
        epilog="Each flag can be given as an environment variable: --trainer-image is TUNESMITH_TRAINER_IMAGE.",
    )
    for name, default, text in _OPTIONS:
        value = environment.get("TUNESMITH_" + name.upper().replace("-", "_"), default)
        shown = f" (default {default})" if default else ""
        parser.add_argument(f"--{name}", default=value, required=value is None, help=text + shown)
    parser.add_argument(
        "--no-leader-election", action="store_true", help="reconcile without a Lease: for one replica only"
    )
    parser.add_argument(
        "--no-network-policies", action="store_true", help="create no NetworkPolicies beside pools and jobs of one node"
    )
    parser.add_argument(
        "--allow-task-folders",
        action="store_true",
        help="let jobs bring evaluation tasks (lmEval.taskFolder): code that is run in their pods",
    )
    parser.add_argument(
        "--open-metrics", action="store_true", help="serve /metrics without a token: every pod may read it"
    )
    options = parser.parse_args(arguments)
    try:
        return Settings(
            store=_store(parser, options.store),
            namespace=options.namespace,
            instance=options.instance,
            shared_pool_namespaces=_listed(parser, options, "shared-pool-namespaces", parse_namespaces)
            or (options.namespace,),
            watch_namespaces=_listed(parser, options, "watch-namespaces", parse_namespaces),
            network=Network(
                namespace=options.namespace,
                instance=options.instance,
                policies=not options.no_network_policies,
                metrics_from=_listed(parser, options, "metrics-from", parse_peers),
            ),
            trainer_image=options.trainer_image,
            lm_eval_tasks=options.lm_eval_tasks,
            allow_task_folders=options.allow_task_folders,
            allowed_addresses=_networks(parser, options.allowed_addresses),
            allowed_scheduling=AllowedScheduling(
                priority_classes=_listed(parser, options, "allowed-priority-classes", parse_names),
                tolerations=_listed(parser, options, "allowed-tolerations", parse_tolerations),
                runtime_classes=_listed(parser, options, "allowed-runtime-classes", parse_names),
                node_selectors=_listed(parser, options, "allowed-node-selectors", parse_names),
                gpu_resources=_listed(parser, options, "allowed-gpu-resources", parse_names),
            ),
            agent_image=options.agent_image,
            engine_image=options.engine_image,
            gateway_url=options.gateway_url,
            image_pull_policy=options.image_pull_policy,
            job_storage=_size(parser, "job-storage", options.job_storage),
            adapter_storage=_size(parser, "adapter-storage", options.adapter_storage),
            base_model_storage=_size(parser, "base-model-storage", options.base_model_storage),
            max_adapter_ratio=_ratio(options.max_adapter_ratio),
            lease_seconds=float(options.lease_seconds),
            leader_election=not options.no_leader_election,
            identity=options.identity or f"{socket.gethostname()}-{uuid.uuid4()}",
            workers=int(options.workers),
            relist_seconds=float(options.relist_seconds),
            probe_port=int(options.probe_port),
            metrics_port=int(options.metrics_port),
            open_metrics=options.open_metrics,
            log_level=options.log_level.upper(),
        )
    except ValueError as error:
        parser.error(f"a number is expected: {error}")


def _listed(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    flag: str,
    parse_entries: Callable[[str], tuple[T, ...]],
) -> tuple[T, ...]:
    try:
        return parse_entries(getattr(options, flag.replace("-", "_")))
    except ValueError as error:
        parser.error(f"--{flag}: {error}")


def _store(parser: argparse.ArgumentParser, uri: str) -> str:
    try:
        return parse_store(uri)
    except ValueError as error:
        parser.error(f"--store: {error}")


def _size(parser: argparse.ArgumentParser, name: str, text: str) -> str:
    if re.fullmatch(r"[1-9][0-9]*(Mi|Gi)", text) is None:
        parser.error(f"--{name}: {text!r} is not a size such as 20Gi or 512Mi")
    return text


def _ratio(text: str) -> float:
    ratio = float(text)
    if not 0 < ratio < math.inf:
        raise ValueError(f"--max-adapter-ratio must be above 0, not {text}")
    return ratio


def _networks(parser: argparse.ArgumentParser, text: str) -> str:
    try:
        parse_networks(text)
    except ValueError as error:
        parser.error(f"--allowed-addresses: {error}")
    return text
