"""Bounds of what one gateway accepts from clients and how long it waits for engines."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MIB = 1024 * 1024

_CGROUP_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_IN_FLIGHT_SHARE = 0.4
"""Part of the memory limit for bytes in flight; interpreter, tables and socket buffers need the rest."""
_BYTES_PER_CONNECTION = 256 * 1024
"""Memory that one connection may pin in buffers outside the budget of bytes in flight."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that protect the gateway and its clients from each other.

    Attributes:
        hold_seconds: how long a request waits for a pod that holds its model.
        held_requests: how many requests wait at once.
        body_bytes: largest body of a request.
        sequences: most sequences (choices × prompts) that one request may ask for.
        in_flight_bytes: bytes of bodies and answers in memory at once, of all keys.
        in_flight_bytes_per_key: the same for one key.
        connections: open connections of clients.
        connections_per_address: the same for one client address.
        header_seconds: time for the header of a request, from the connection or the header's first byte on.
        body_seconds: time for the body of a request.
        write_seconds: how long a client may read nothing of its answer.
        idle_seconds: how long a connection is kept between requests.
        answer_seconds: how long an engine may take to begin an answer that is not a stream.
        silence_seconds: how long an engine may send nothing within an answer or a stream.
        comment_seconds: interval of the comments in a silent stream.
    """

    hold_seconds: float = 10.0
    held_requests: int = 1024
    body_bytes: int = 4 * MIB
    sequences: int = 128
    in_flight_bytes: int = 200 * MIB
    in_flight_bytes_per_key: int = 100 * MIB
    connections: int = 2048
    connections_per_address: int = 1024
    header_seconds: float = 15.0
    body_seconds: float = 120.0
    write_seconds: float = 60.0
    idle_seconds: float = 75.0
    answer_seconds: float = 1800.0
    silence_seconds: float = 300.0
    comment_seconds: float = 15.0


def memory_limit(files: tuple[Path, ...] = _CGROUP_FILES) -> int:
    """Return the memory limit of this container in bytes, or the machine's memory where there is no limit."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in files:
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(int(text), machine)
    return machine


def in_flight_bytes(memory: int) -> int:
    """Return the default budget of bytes in flight for a memory limit, both in bytes."""
    return int(memory * _IN_FLIGHT_SHARE)


def connections(memory: int) -> int:
    """Return the default number of connections for a memory limit in bytes."""
    return max(64, min(65_536, memory // _BYTES_PER_CONNECTION))
