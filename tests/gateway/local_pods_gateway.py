"""`tunesmith-gateway` with pods that share this machine, each with ports of its own.

Run as `python -m tests.gateway.local_pods_gateway PORTS …`, where PORTS is the JSON of [engine port, agent port] by
UID of the pod. Objects of the cluster come from standard input, one per line.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import uvloop

from tests.gateway import gateway_process
from tunesmith.gateway import backends

PORTS: dict[str, tuple[int, int]] = json.loads(sys.argv[1])


class Backend(backends.Backend):
    """A pod with its own ports."""

    def __init__(self, pod: Any, keys: Any, _engine_port: int, _agent_port: int) -> None:
        super().__init__(pod, keys, *PORTS[pod.uid])


if __name__ == "__main__":
    backends.Backend = Backend  # type: ignore[misc]
    uvloop.run(gateway_process.run(0, 0, sys.argv[2:]))
