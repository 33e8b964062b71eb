"""A gateway in a process of its own, with the options, the log and the event loop of `tunesmith-gateway`.

Objects of the cluster come from standard input, one per line. Run by `ProcessRig`.
"""

from __future__ import annotations

import asyncio
import json
import sys

import uvloop

from tests.gateway.gateway_rig import Watches
from tunesmith.gateway import main
from tunesmith.gateway.settings import GatewaySettings
from tunesmith.settings import read


async def run(engine_port: int, agent_port: int, arguments: list[str]) -> None:
    pods = ("--host=127.0.0.1", f"--engine-port={engine_port}", f"--agent-port={agent_port}")
    settings = main.apply_memory_limit(read(GatewaySettings, [*arguments, *pods]))
    main.configure_log(settings.log_level)
    watches = Watches(keep=False)
    reader = asyncio.StreamReader(limit=2**24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    async def follow() -> None:
        while line := await reader.readline():
            watches.put(json.loads(line))

    following = asyncio.create_task(follow())
    await main.serve(settings, main.gateway_keys(settings.gateway_key_file), watches)
    following.cancel()


if __name__ == "__main__":
    uvloop.run(run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
