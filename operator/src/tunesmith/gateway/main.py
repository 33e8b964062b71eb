"""`tunesmith-gateway`: the OpenAI-compatible endpoint in front of the pools."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

import uvloop

from tunesmith.cluster.client import Cluster
from tunesmith.cluster.errors import ClusterError
from tunesmith.contracts.agent import GATEWAY_INTERNAL_PORT, GATEWAY_PORT
from tunesmith.contracts.claims import parse_namespaces
from tunesmith.contracts.keyfile import KeyFile
from tunesmith.gateway.proxy import Limits
from tunesmith.gateway.server import Gateway, Settings

GATEWAY_KEY_FILE = "/etc/tunesmith/gateway/key"
_MIB = 1024 * 1024

LOG = logging.getLogger("tunesmith.gateway")


def main() -> None:
    """Run the gateway until SIGTERM. Exit code 0 after a drained end, 2 for wrong settings."""
    arguments = _parser().parse_args()
    logging.basicConfig(
        level=arguments.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        settings = _settings(arguments)
    except ValueError as error:
        sys.exit(_fail(str(error)))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings))
    except ClusterError as error:
        sys.exit(_fail(str(error)))
    except OSError as error:
        sys.exit(_fail(f"cannot listen: {error}"))


def _fail(message: str) -> int:
    sys.stderr.write(f"tunesmith-gateway: {message}\n")
    return 2


async def _serve(settings: Settings) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    async with await Cluster.connect() as cluster, Gateway(settings, cluster) as gateway:
        LOG.info("serving on port %d, internal port %d", gateway.port, gateway.internal_port)
        await ended.wait()
        LOG.info("ending: no new requests after %g s", settings.linger_seconds)
        await gateway.linger()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tunesmith-gateway",
        description="OpenAI-compatible endpoint in front of the ServingPools of a cluster (that of KUBECONFIG, or the"
        " pod's own). Every option has an environment variable: TUNESMITH_ and its name in capitals.",
        epilog="Example: tunesmith-gateway --namespace tunesmith-system --gateway-key-file ./key --port 8000",
    )

    def option(name: str, default: object, help_: str, type_: type = str) -> None:
        variable = f"TUNESMITH_{name.upper().replace('-', '_')}"
        parser.add_argument(
            f"--{name}", default=os.environ.get(variable, default), type=type_, help=f"{help_} (default: %(default)s)"
        )

    option("namespace", None, "namespace of the gateway, which holds the API keys")
    option("gateway-key-file", GATEWAY_KEY_FILE, "file with the gateway's key and, during a rotation, the previous one")
    option(
        "shared-pool-namespaces",
        "",
        "namespaces, separated by commas, whose pools' base models may be called by their bare name; empty: its own",
    )
    option("port", GATEWAY_PORT, "port for clients", int)
    option("internal-port", GATEWAY_INTERNAL_PORT, "port for demand, metrics and probes", int)
    option("hold-seconds", 10.0, "how long a request waits for a pod that holds its model", float)
    option("max-held-requests", 1024, "how many requests may wait at once", int)
    option("max-held-bytes", 64 * _MIB, "how many bytes of bodies may wait at once", int)
    option("max-body-bytes", 4 * _MIB, "largest body of a request", int)
    option("linger-seconds", 3.0, "how long new connections are accepted after SIGTERM", float)
    option("drain-seconds", 60.0, "how long running requests may take after that", float)
    option("log-level", "INFO", "DEBUG, INFO, WARNING or ERROR", str.upper)  # type: ignore[arg-type]
    return parser


def _settings(arguments: argparse.Namespace) -> Settings:
    """The settings.

    Raises:
        ValueError: one is missing or cannot be used; the message says which.
    """
    if not arguments.namespace:
        raise ValueError("set --namespace (or TUNESMITH_NAMESPACE) to the namespace of the gateway")
    for name in ("hold_seconds", "max_held_requests", "max_held_bytes", "linger_seconds", "drain_seconds"):
        if getattr(arguments, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative")
    if arguments.max_body_bytes <= 0:
        raise ValueError("--max-body-bytes must be above 0")
    try:
        shared_pool_namespaces = parse_namespaces(arguments.shared_pool_namespaces)
    except ValueError as error:
        raise ValueError(f"--shared-pool-namespaces: {error}") from None
    path = Path(arguments.gateway_key_file)
    try:
        gateway_keys = KeyFile(path)
    except OSError as error:
        raise ValueError(
            f"the gateway's key {path} cannot be read ({error.strerror}): mount the Secret"
            " tunesmith-gateway-key, or name its file with --gateway-key-file"
        ) from None
    except ValueError as error:
        raise ValueError(f"the gateway's key {path} cannot be used: {error}") from None
    return Settings(
        namespace=arguments.namespace,
        gateway_keys=gateway_keys,
        shared_pool_namespaces=shared_pool_namespaces,
        limits=Limits(
            hold_seconds=arguments.hold_seconds,
            held_requests=arguments.max_held_requests,
            held_bytes=arguments.max_held_bytes,
            body_bytes=arguments.max_body_bytes,
        ),
        port=arguments.port,
        internal_port=arguments.internal_port,
        linger_seconds=arguments.linger_seconds,
        drain_seconds=arguments.drain_seconds,
    )
