"""What children of the sandbox do in the tests; few imports, because each child makes them."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith_server.sandbox import Channel


def never_ends(_: Channel) -> None:
    while True:
        pass


def allocates(channel: Channel) -> None:
    try:
        bytearray(512 * 2**20)
    except MemoryError:
        channel.send("refused", "no memory")


def dies(_: Channel) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leaves(_: Channel) -> None:
    os._exit(7)


def was_killed(_: Channel) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
