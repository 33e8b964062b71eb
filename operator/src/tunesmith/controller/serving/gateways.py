"""Demand that the gateways report, while this process leads. Demand of a silent gateway is unknown."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import aiohttp

from tunesmith.cluster.keep import kept
from tunesmith.contracts.addresses import url_host
from tunesmith.contracts.agent import GATEWAY_INTERNAL_PORT, GatewayDemand, demand_tokens, gateway_keys
from tunesmith.contracts.network import component_labels
from tunesmith.streams import Stream, Tokens, follow

if TYPE_CHECKING:
    from tunesmith.autoscale.demand import DemandTracker
    from tunesmith.cluster.resources import Object
    from tunesmith.controller.context import Context
    from tunesmith.controller.serving.keyuse import KeyUseWriter


class GatewayLinks:
    """The gateways' demand streams, which update the tracker and the last use of keys."""

    def __init__(self, context: Context, tracker: DemandTracker, key_use: KeyUseWriter) -> None:
        self._context = context
        self._tracker = tracker
        self._key_use = key_use

    async def run(self) -> None:
        """Follow every gateway pod of this release. Runs until cancelled.

        Raises:
            ClusterError: the pods cannot be listed.
        """
        settings = self._context.settings
        # Anyone who may create a pod with these labels in the operator's namespace may also mount the installation key,
        # so no further checks are needed.
        labels = ",".join(f"{name}={value}" for name, value in component_labels(settings.instance, "gateway").items())
        tasks: dict[str, asyncio.Task[None]] = {}
        streams: dict[str, Stream] = {}
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:
            try:
                async for event in self._context.cluster.watch("Pod", settings.namespace, labels=labels, keep=kept):
                    if event.type != "SYNCED":
                        uid = event.object["metadata"]["uid"]
                        stream = None if event.type == "DELETED" else self._stream(event.object)
                        if stream == streams.get(uid):
                            continue
                        if uid in tasks:
                            tasks.pop(uid).cancel()
                        streams.pop(uid, None)
                        if stream is not None:
                            streams[uid] = stream
                            tasks[uid] = asyncio.create_task(self._listen(session, uid, stream))
                    self._tracker.expect({uid: stream.name for uid, stream in streams.items()}, time.monotonic())
            finally:
                for task in tasks.values():
                    task.cancel()
                await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _listen(self, session: aiohttp.ClientSession, uid: str, stream: Stream) -> None:
        def read(line: bytes) -> None:
            demand = GatewayDemand.model_validate_json(line)
            self._tracker.record(uid, demand, time.monotonic())
            self._key_use.record(demand.used_keys)

        def failed(error: str) -> None:
            self._tracker.record_error(uid, error)

        await follow(session, stream, lambda: read, failed)

    def _stream(self, pod: Object) -> Stream | None:
        """Return the stream of a running gateway, or None. A stopping one counts too, since it still has requests."""
        status = pod.get("status") or {}
        address = status.get("podIP")
        if status.get("phase") != "Running" or not address:
            return None
        tokens = Tokens(lambda: self._context.installation_keys, lambda keys: demand_tokens(gateway_keys(keys)))
        url = f"http://{url_host(address)}:{GATEWAY_INTERNAL_PORT}/v1/demand"
        return Stream(f"gateway {pod['metadata']['name']}", url, tokens)
