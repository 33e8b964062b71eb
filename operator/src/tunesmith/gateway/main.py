"""`tunesmith-gateway`: the OpenAI-compatible endpoint in front of the pools."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from typing import TYPE_CHECKING

import uvloop

from tunesmith.cluster.client import Cluster
from tunesmith.cluster.errors import ClusterError
from tunesmith.contracts.keyfile import KeyFile
from tunesmith.gateway.faults import describe_error
from tunesmith.gateway.limits import memory_limit
from tunesmith.gateway.server import Gateway, TaskStoppedError
from tunesmith.gateway.settings import GatewaySettings
from tunesmith.settings import read

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tunesmith.contracts.agent import Keys
    from tunesmith.gateway.feed import Watcher

LOG = logging.getLogger("tunesmith.gateway")


def main() -> None:
    """Run the gateway until SIGTERM. Exit code 0 after draining, 1 for a fault, 2 for invalid settings."""
    settings = read(GatewaySettings)
    configure_log(settings.log_level)
    exempt_modules_from_collection()
    try:
        limited, keys = apply_memory_limit(settings), gateway_keys(settings.gateway_key_file)
    except ValueError as error:
        sys.exit(_fail(str(error)))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(limited, keys))
    except ClusterError as error:
        sys.exit(_fail(str(error)))
    except TaskStoppedError as error:
        sys.exit(_fail(str(error), 1))
    except OSError as error:
        sys.exit(_fail(f"cannot listen: {error}"))


def configure_log(level: str) -> None:
    """Write the log to stderr."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)


def _fail(message: str, code: int = 2) -> int:
    sys.stderr.write(f"tunesmith-gateway: {message}\n")
    return code


def exempt_modules_from_collection() -> None:
    """Exclude all existing objects from garbage collection.

    Modules live as long as the process. Otherwise every full collection would scan them, which takes 0.1 s during which
    no request is served.
    """
    gc.collect()
    gc.freeze()


def apply_memory_limit(settings: GatewaySettings) -> GatewaySettings:
    """Return the settings with the limits that depend on the memory of this container.

    Raises:
        ValueError: a limit is too small for one request.
    """
    limited = settings.for_memory(memory_limit())
    if problem := limited.problem():
        raise ValueError(problem)
    return limited


def gateway_keys(path: Path) -> KeyFile:
    """Return the gateway's keys, reloaded when their file changes.

    Raises:
        ValueError: the file cannot be used; the message gives the reason and the fix.
    """
    try:
        return KeyFile(path)
    except OSError as error:
        raise ValueError(
            f"the gateway's key file {path} cannot be read ({error.strerror}): mount the Secret"
            " tunesmith-gateway-key, or name its file with --gateway-key-file"
        ) from None
    except ValueError as error:
        raise ValueError(f"the gateway's key file {path} cannot be used: {error}") from None


async def _run(settings: GatewaySettings, keys: Callable[[], Keys]) -> None:
    async with await Cluster.connect() as cluster:
        await serve(settings, keys, cluster)


async def serve(settings: GatewaySettings, keys: Callable[[], Keys], watcher: Watcher) -> None:
    """Serve until SIGTERM or SIGINT, then drain."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_fault)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with Gateway(settings, keys, watcher) as gateway:
        LOG.info("serving on port %d, internal port %d", gateway.port, gateway.internal_port)
        await gateway.run_until(stop)
        LOG.info("shutting down: no new connections after %g s", settings.linger_seconds)
        await gateway.linger()


def _log_fault(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """Log an unhandled exception without texts and objects that may contain a client's data."""
    LOG.error("%s: %s", context.get("message"), describe_error(context.get("exception")))
