"""Bounds on the requests that one gateway accepts and on its waits for engines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field

from tunesmith.contracts.settings import ChartValue
from tunesmith.gateway.reply import ANSWER_BYTES

MIB = 1024 * 1024

_CGROUP_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_IN_FLIGHT_SHARE = 0.4
"""Fraction of the memory limit for bytes in flight; interpreter, tables and socket buffers need the rest."""
_BYTES_PER_CONNECTION = 256 * 1024
"""Memory that one connection may pin in buffers outside the budget of bytes in flight."""

_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Limits(BaseModel):
    """Settings that protect the gateway and its clients from each other."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    hold_seconds: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False),
        ChartValue("gateway.holdSeconds", narrower={"type": "integer", "maximum": 3600}),
    ] = 10
    """Seconds that a request waits for a pod that holds its model, if its pool has no pods, or neither
    spec.holdSeconds nor a measured start time."""
    max_held_requests: Annotated[int, Field(ge=0), ChartValue("gateway.limits.maxHeldRequests")] = 1024
    """Number of requests that may wait for a pod at once."""
    max_running_per_pod: Annotated[int, Field(ge=1), ChartValue("gateway.limits.maxRunningPerPod")] = 256
    """Number of sequences that a pod gets at once from all gateways, if its pool's engine.args do not set
    --max-num-seqs. Further requests wait in the gateway, where API keys take turns."""
    queue_seconds: Annotated[_Seconds, ChartValue("gateway.limits.queueSeconds")] = 300
    """Seconds that a request waits for its turn while the pods that hold its model are busy."""
    max_body_bytes: Annotated[
        int, Field(ge=1), ChartValue("gateway.maxBodyBytes", narrower={"minimum": 1024, "maximum": 2**30})
    ] = 4 * MIB
    """Largest body of a request, in bytes."""
    max_sequences: Annotated[int, Field(ge=1), ChartValue("gateway.limits.maxSequences")] = 128
    """Largest number of sequences (choices × prompts) of one request."""
    max_in_flight_bytes: Annotated[int, Field(ge=0), ChartValue("gateway.limits.maxInFlightBytes")] = 0
    """Bytes of bodies and answers in memory at once, of all API keys; 0: 2/5 of the container's memory limit."""
    max_in_flight_bytes_per_key: Annotated[int, Field(ge=0), ChartValue("gateway.limits.maxInFlightBytesPerKey")] = 0
    """Bytes of bodies and answers in memory at once, of one API key; 0: half of --max-in-flight-bytes. A key never gets
    more than half of what the other keys leave of --max-in-flight-bytes."""
    max_connections: Annotated[int, Field(ge=0), ChartValue("gateway.limits.maxConnections")] = 0
    """Number of open connections of clients; 0: one for each 256 KiB of the container's memory limit."""
    max_connections_per_address: Annotated[int, Field(ge=0), ChartValue("gateway.limits.maxConnectionsPerAddress")] = 0
    """Number of open connections of one client address; 0: half of --max-connections."""
    header_seconds: Annotated[_Seconds, ChartValue("gateway.limits.headerSeconds")] = 15
    """Seconds in which the header of a request must arrive, from the start of the connection or the header's first
    byte."""
    body_seconds: Annotated[_Seconds, ChartValue("gateway.limits.bodySeconds")] = 120
    """Seconds for the body of a request."""
    write_seconds: Annotated[_Seconds, ChartValue("gateway.limits.writeSeconds")] = 60
    """Longest time, in seconds, for which a client may read nothing of its answer."""
    idle_seconds: Annotated[_Seconds, ChartValue("gateway.limits.idleSeconds")] = 75
    """Seconds for which a connection is kept between two requests."""
    answer_seconds: Annotated[_Seconds, ChartValue("gateway.limits.answerSeconds")] = 1800
    """Seconds after which an engine must have begun an answer that is not a stream."""
    silence_seconds: Annotated[_Seconds, ChartValue("gateway.limits.silenceSeconds")] = 300
    """Longest time, in seconds, for which an engine may send nothing within an answer or a stream."""
    comment_seconds: Annotated[_Seconds, ChartValue("gateway.limits.commentSeconds")] = 15
    """Seconds between the comments that keep a silent stream open."""

    def for_memory(self, memory: int) -> Self:
        """Return the limits, with each 0 replaced by a value derived from the container's memory limit in bytes."""
        in_flight = self.max_in_flight_bytes or int(memory * _IN_FLIGHT_SHARE)
        connections = self.max_connections or max(64, min(65_536, memory // _BYTES_PER_CONNECTION))
        return self.model_copy(
            update={
                "max_in_flight_bytes": in_flight,
                "max_in_flight_bytes_per_key": self.max_in_flight_bytes_per_key or in_flight // 2,
                "max_connections": connections,
                "max_connections_per_address": self.max_connections_per_address or -(-connections // 2),
            }
        )

    def problem(self) -> str | None:
        """Return an error message if a budget is too small for one request, otherwise None."""
        request = self.max_body_bytes + ANSWER_BYTES
        for flag, budget, smallest in (
            ("--max-in-flight-bytes", self.max_in_flight_bytes, 2 * request),
            ("--max-in-flight-bytes-per-key", self.max_in_flight_bytes_per_key, request),
        ):
            if budget < smallest:
                return (
                    f"{flag} is {budget}, too small for one request: set it to {smallest} or more, raise the memory "
                    "limit of the container (chart value gateway.resources), or lower --max-body-bytes"
                )
        return None


def memory_limit(files: tuple[Path, ...] = _CGROUP_FILES) -> int:
    """Return the memory limit of this container in bytes, or the machine's memory if there is no limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in files:
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(int(text), machine)
    return machine
