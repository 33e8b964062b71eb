"""The command `tunesmith-operator`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from typing import TYPE_CHECKING

import uvloop

from tunesmith.cluster.client import Cluster, allow_deep_objects
from tunesmith.cluster.errors import ClusterError
from tunesmith.cluster.events import EventRecorder
from tunesmith.contracts.agent import accepts, gateway_keys, metrics_tokens
from tunesmith.controller.context import Context
from tunesmith.controller.controller import Controller
from tunesmith.controller.election import Election, next_epoch
from tunesmith.controller.finetunejob import FineTuneJobReconciler
from tunesmith.controller.metrics import Metrics
from tunesmith.controller.probes import serving
from tunesmith.controller.serving.adapter import AdapterDeploymentReconciler
from tunesmith.controller.serving.pool import ServingPoolReconciler
from tunesmith.controller.serving.state import ServingState
from tunesmith.controller.settings import OperatorSettings
from tunesmith.settings import read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith.controller.reconciler import Reconciler

_log = logging.getLogger("tunesmith")


def reconcilers(context: Context) -> Sequence[Reconciler]:
    """Return the reconcilers, one for each kind."""
    serving_state = ServingState(context)
    context.metrics.silent_gateways.set_function(lambda: serving_state.demand.silent(time.monotonic()))
    return [
        FineTuneJobReconciler(context),
        ServingPoolReconciler(serving_state),
        AdapterDeploymentReconciler(serving_state),
    ]


async def operate(settings: OperatorSettings, stop: asyncio.Event) -> None:
    """Run until `stop` is set, then release the Lease.

    Raises:
        ClusterError: there are no usable credentials.
        OSError: a port is taken.
    """
    metrics = Metrics()
    async with await Cluster.connect(observer=metrics.api_request) as cluster:
        context = Context(cluster=cluster, settings=settings, recorder=EventRecorder(cluster), metrics=metrics)
        controller = Controller(context, reconcilers(context))
        election = Election(cluster, settings.namespace, settings.identity, settings.lease_seconds)
        if settings.leader_election:
            context.may_write = election.leads
            leading = election.run(controller.lead)
        else:
            leading = controller.lead(next_epoch({}, time.time()))
        async with serving(
            probe_port=settings.probe_port,
            metrics_port=settings.metrics_port,
            unhealthy=controller.unhealthy,
            unready=controller.unready,
            registry=metrics.registry,
            may_read=lambda header: not settings.require_metrics_token or accepts(header, _metrics_tokens(context)),
        ):
            await _until(stop, controller.keep_caches(), controller.keep_namespaces(), controller.keep_keys(), leading)
            if settings.leader_election:
                await election.release()
            await controller.stop()


def _metrics_tokens(context: Context) -> tuple[str, ...]:
    return metrics_tokens(gateway_keys(context.installation_keys))


async def _until(stop: asyncio.Event, *endless: object) -> None:
    """Run coroutines until `stop` is set.

    Raises:
        Exception: a coroutine raised it.
        RuntimeError: a coroutine returned.
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in (*endless, stop.wait())]  # type: ignore[call-overload]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        if not stop.is_set():
            raise RuntimeError("a permanent task of the operator returned")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _main(settings: OperatorSettings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await operate(settings, stop)


def main() -> None:
    """Run the operator with the settings of the command line."""
    settings = read(OperatorSettings)
    allow_deep_objects()
    logging.basicConfig(
        level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("kopf").setLevel(logging.WARNING)
    # It warns that it cannot handle signals in its thread, which is intended.
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)
    try:
        with contextlib.suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_main(settings))
    except (ClusterError, OSError) as error:
        sys.exit(f"tunesmith-operator: {error}")
