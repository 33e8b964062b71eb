"""`tunesmith-gateway`: the OpenAI-compatible endpoint in front of the pools."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import uvloop

from tunesmith.cluster.client import Cluster
from tunesmith.cluster.errors import ClusterError
from tunesmith.contracts.agent import GATEWAY_INTERNAL_PORT, GATEWAY_PORT
from tunesmith.contracts.claims import parse_namespaces
from tunesmith.contracts.keyfile import KeyFile
from tunesmith.gateway.faults import described
from tunesmith.gateway.limits import MIB, Limits, connections, in_flight_bytes, memory_limit
from tunesmith.gateway.reply import ANSWER_BYTES
from tunesmith.gateway.server import Gateway, Settings, TaskEndedError

if TYPE_CHECKING:
    from tunesmith.gateway.feed import Watcher

GATEWAY_KEY_FILE = "/etc/tunesmith/gateway/key"

LOG = logging.getLogger("tunesmith.gateway")

Number = TypeVar("Number", int, float)


def main() -> None:
    """Run the gateway until SIGTERM. Exit code 0 after a drained end, 1 for a fault, 2 for wrong settings."""
    arguments = parser().parse_args()
    configure_log(arguments.log_level)
    try:
        settings = settings_of(arguments)
    except ValueError as error:
        sys.exit(_fail(str(error)))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(settings))
    except ClusterError as error:
        sys.exit(_fail(str(error)))
    except TaskEndedError as error:
        sys.exit(_fail(str(error), 1))
    except OSError as error:
        sys.exit(_fail(f"cannot listen: {error}"))


def configure_log(level: str) -> None:
    """Write the log to stderr."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)


def _fail(message: str, code: int = 2) -> int:
    sys.stderr.write(f"tunesmith-gateway: {message}\n")
    return code


async def _run(settings: Settings) -> None:
    async with await Cluster.connect() as cluster:
        await serve(settings, cluster)


async def serve(settings: Settings, watcher: Watcher) -> None:
    """Serve until SIGTERM or SIGINT, then drain."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_fault)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    async with Gateway(settings, watcher) as gateway:
        LOG.info("serving on port %d, internal port %d", gateway.port, gateway.internal_port)
        await gateway.run_until(ended)
        LOG.info("ending: no new requests after %g s", settings.linger_seconds)
        await gateway.linger()


def _log_fault(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """Log a fault that nobody handled, without texts and objects that may hold what a client sent."""
    LOG.error("%s: %s", context.get("message"), described(context.get("exception")))


def parser() -> argparse.ArgumentParser:
    """Return the options of `tunesmith-gateway`."""
    options = argparse.ArgumentParser(
        prog="tunesmith-gateway",
        description="OpenAI-compatible endpoint in front of the ServingPools of a cluster (that of KUBECONFIG, or the"
        " pod's own). Every option has an environment variable: TUNESMITH_ and its name in capitals.",
        epilog="Example: tunesmith-gateway --namespace tunesmith-system --gateway-key-file ./key --port 8000",
    )

    def option(name: str, default: object, help_: str, type_: type = str) -> None:
        variable = f"TUNESMITH_{name.upper().replace('-', '_')}"
        options.add_argument(
            f"--{name}", default=os.environ.get(variable, default), type=type_, help=f"{help_} (default: %(default)s)"
        )

    option("namespace", None, "namespace of the gateway, which holds the API keys")
    option("watch-namespaces", "", "namespaces whose models are served, such as team-a,team-b; empty: all")
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
    option("max-body-bytes", 4 * MIB, "largest body of a request", int)
    option("max-sequences", 128, "most sequences (choices × prompts) of one request", int)
    option("max-in-flight-bytes", 0, "bytes of bodies and answers in memory at once; 0: 2/5 of the memory limit", int)
    option("max-in-flight-bytes-per-key", 0, "the same for one API key; 0: half of it", int)
    option("max-connections", 0, "open connections of clients; 0: one for each 256 KiB of the memory limit", int)
    option("max-connections-per-address", 0, "the same for one client address; 0: half of it", int)
    option("header-seconds", 15.0, "how long a client may take to send the header of a request", float)
    option("body-seconds", 120.0, "how long a client may take to send the body of a request", float)
    option("write-seconds", 60.0, "how long a client may read nothing of its answer", float)
    option("idle-seconds", 75.0, "how long a connection is kept between two requests", float)
    option("answer-seconds", 1800.0, "how long an engine may take to begin an answer that is not a stream", float)
    option("silence-seconds", 300.0, "how long an engine may send nothing in a stream or within an answer", float)
    option("comment-seconds", 15.0, "interval of the comments that keep a silent stream open", float)
    option("linger-seconds", 3.0, "how long new connections are accepted after SIGTERM", float)
    option("drain-seconds", 600.0, "how long running requests may take after that", float)
    options.add_argument("--open-metrics", action="store_true", help="serve /metrics without a token")
    option("log-level", "INFO", "DEBUG, INFO, WARNING or ERROR", str.upper)  # type: ignore[arg-type]
    return options


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return the settings.

    Raises:
        ValueError: one is missing or cannot be used; the message says which.
    """
    if not arguments.namespace:
        raise ValueError("set --namespace (or TUNESMITH_NAMESPACE) to the namespace of the gateway")
    limits = _limits(arguments)
    for name in ("linger_seconds", "drain_seconds"):
        _check(name, getattr(arguments, name), least=0)
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
        watched=parse_namespaces(arguments.watch_namespaces),
        gateway_keys=gateway_keys,
        shared_pool_namespaces=shared_pool_namespaces,
        open_metrics=arguments.open_metrics,
        limits=limits,
        port=arguments.port,
        internal_port=arguments.internal_port,
        linger_seconds=arguments.linger_seconds,
        drain_seconds=arguments.drain_seconds,
    )


def _limits(arguments: argparse.Namespace) -> Limits:
    """Return the limits; those that are not set follow from the memory limit of the container.

    Raises:
        ValueError: one cannot be used; the message says which.
    """
    memory = memory_limit()
    in_flight = arguments.max_in_flight_bytes or in_flight_bytes(memory)
    open_connections = arguments.max_connections or connections(memory)
    limits = Limits(
        hold_seconds=_check("hold_seconds", arguments.hold_seconds, least=0),
        held_requests=_check("max_held_requests", arguments.max_held_requests, least=0),
        body_bytes=_check("max_body_bytes", arguments.max_body_bytes, least=1),
        sequences=_check("max_sequences", arguments.max_sequences, least=1),
        in_flight_bytes=_check("max_in_flight_bytes", in_flight, least=1),
        in_flight_bytes_per_key=_check(
            "max_in_flight_bytes_per_key", arguments.max_in_flight_bytes_per_key or in_flight // 2, least=1
        ),
        connections=_check("max_connections", open_connections, least=1),
        connections_per_address=_check(
            "max_connections_per_address", arguments.max_connections_per_address or -(-open_connections // 2), least=1
        ),
        header_seconds=_check("header_seconds", arguments.header_seconds, least=1),
        body_seconds=_check("body_seconds", arguments.body_seconds, least=1),
        write_seconds=_check("write_seconds", arguments.write_seconds, least=1),
        idle_seconds=_check("idle_seconds", arguments.idle_seconds, least=1),
        answer_seconds=_check("answer_seconds", arguments.answer_seconds, least=1),
        silence_seconds=_check("silence_seconds", arguments.silence_seconds, least=1),
        comment_seconds=_check("comment_seconds", arguments.comment_seconds, least=1),
    )
    smallest = limits.body_bytes + ANSWER_BYTES
    for name in ("in_flight_bytes", "in_flight_bytes_per_key"):
        if getattr(limits, name) < smallest:
            raise ValueError(
                f"--max-{name.replace('_', '-')} is {getattr(limits, name)}, too small for one request: set it to"
                f" {smallest} or more, raise the memory limit of the container, or lower --max-body-bytes"
            )
    return limits


def _check(name: str, value: Number, *, least: Number) -> Number:
    if not math.isfinite(value) or value < least:
        raise ValueError(f"--{name.replace('_', '-')} is {value}, and must be {least:g} or more")
    return value
