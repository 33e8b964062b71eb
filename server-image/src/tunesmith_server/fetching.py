"""Supervisor of downloads: each is fetched and checked in a child process, and is recorded if it kills the agent."""

from __future__ import annotations

import json
import logging
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.contracts.agent import DesiredAdapter
from tunesmith.contracts.connections import guarded
from tunesmith.contracts.environment import ALLOWED_ADDRESSES
from tunesmith.storage.schemes import BY_NAME, split
from tunesmith_server.artifact import (
    PodLimits,
    Steps,
    fetch_artifact,
    incoming_folder,
    remove_folder,
    stored_sizes,
)
from tunesmith_server.lora import UnfitAdapterError, weight_bounds
from tunesmith_server.sandbox import Channel, Child, ChildExitedError, ChildLimits, Sandbox
from tunesmith_server.store import StoreError, StoreFolder, read_credentials, set_proxies

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

JOURNAL = "checking.json"
SILENCE_SECONDS = 120.0
"""Longest time without data from the store."""
PROCESSOR_SECONDS = 30
"""Processor time allowed for a download with its checks, plus one second for each `_CHECKED_BYTES_PER_SECOND` bytes."""
_WALL_CLOCK_FACTOR = 5
"""Wall-clock limit of a check, as a multiple of its processor time: the node may be busy. The limit of processor time
stops an endless check."""
_CHECKED_BYTES_PER_SECOND = 20_000_000
_MEMORY = 160 * 2**20
"""Memory of a child, in bytes; `_MEMORY_PER_HEADER_BYTE` is added for each byte of the header."""
_MEMORY_PER_HEADER_BYTE = 12
_MAIN = "tunesmith_server.main"
"""Every child imports the program's main module, so the fork server loads it once."""
_S3_SESSION = "tunesmith_server.s3_session"

log = logging.getLogger(__name__)


class Journal:
    """Digests whose check killed the agent, on the pod's disk.

    A digest is recorded before its check and removed after it. A digest found at the start was being checked when the
    agent died, and is not checked again on this pod.

    Args:
        folder: folder of the agent's state.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL
        self._lock = threading.Lock()
        try:
            found = json.loads(self._path.read_bytes())
            self._fatal = {str(digest) for digest in [*found["fatal"], *found["checking"]]}
        except FileNotFoundError:
            self._fatal = set()
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read and is replaced: %s", self._path, error)
            self._fatal = set()
        self._checking: set[str] = set()
        self._write()

    def refuse(self, digest: str) -> None:
        """Raise UnfitAdapterError if the agent died while it checked this digest."""
        if digest in self._fatal:
            raise UnfitAdapterError(
                "the agent exited while it checked the adapter's files, so they are not checked again on this pod: "
                "publish the adapter again, or delete the pod if its node or memory was the cause"
            )

    @contextmanager
    def checking(self, digest: str) -> Iterator[None]:
        """Keep the digest recorded while the block runs."""
        self._change(self._checking.add, digest)
        try:
            yield
        finally:
            self._change(self._checking.discard, digest)

    def _change(self, change: Callable[[str], None], digest: str) -> None:
        with self._lock:
            change(digest)
            self._write()

    def _write(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"checking": sorted(self._checking), "fatal": sorted(self._fatal)}))
        temporary.replace(self._path)


@dataclass(frozen=True)
class FetchSettings:
    """Settings of downloads.

    Attributes:
        adapters: folder of adapters.
        state: folder of the agent's state.
        secret: folder of the mounted Secret with the store's credentials.
        storage: highest number of bytes of all adapters of the pod.
        allowed_addresses: networks that may be reached besides public addresses, in the format of the platform's list.
    """

    adapters: Path
    state: Path
    secret: Path
    storage: int
    allowed_addresses: str


class ArtifactFetcher:
    """Fetcher of artifacts: downloads run concurrently, checks one at a time.

    Args:
        settings: settings of downloads.
        limits: limits for an adapter.
        downloaded: called with the size of every piece, in bytes.
    """

    def __init__(self, settings: FetchSettings, limits: PodLimits, downloaded: Callable[[int], None]) -> None:
        self._settings = settings
        self._limits = limits
        self._downloaded = downloaded
        self._journal = Journal(settings.state)
        self._sandbox = Sandbox([_MAIN, *_library(limits.store)])
        bounds = weight_bounds(limits.base, limits.max_rank)
        processor = PROCESSOR_SECONDS + bounds.size // _CHECKED_BYTES_PER_SECOND
        self._check_seconds = _WALL_CLOCK_FACTOR * processor
        memory = _MEMORY + _MEMORY_PER_HEADER_BYTE * bounds.header
        self._child_limits = ChildLimits(memory, cpu_seconds=processor)
        self._check_lock = threading.Lock()
        self._volume_lock = threading.Lock()
        self._reserved: dict[str, int] = {}
        self._stored: dict[str, int] = {}
        self._children: set[Child] = set()
        self._closed = False

    def fetch(self, adapter: DesiredAdapter) -> None:
        """Download and check the artifact of a revision and move it to its folder. Blocks; thread-safe.

        Raises:
            UnfitAdapterError: the artifact is damaged, unsafe, or does not fit this pod.
            StoreError: the store does not provide the artifact, or the volume is full.
            OSError: the artifact cannot be written.
        """
        self._journal.refuse(adapter.digest)
        child = self._sandbox.start(
            _fetch_in_child,
            (adapter.model_dump_json(by_alias=True), self._limits, self._settings),
            self._child_limits,
        )
        self._children.add(child)
        try:
            if self._closed:
                raise StoreError("the agent is stopping", permanent=False)
            self._supervise(child, adapter.digest)
        finally:
            self._children.discard(child)
            child.close()
            self._reserved.pop(adapter.digest, None)
            remove_folder(incoming_folder(self._settings.adapters, adapter.digest))

    def close(self) -> None:
        """Stop all children; the threads in `fetch` return soon afterwards."""
        self._closed = True
        for child in self._children.copy():
            child.kill()

    def _supervise(self, child: Child, digest: str) -> None:
        while True:
            try:
                kind, value = child.receive(SILENCE_SECONDS)
            except ChildExitedError as error:
                raise StoreError(f"the download {error}", permanent=False) from None
            if kind == "check":
                self._supervise_check(child, digest)
            elif kind == "progress":
                self._downloaded(value)
            elif kind == "reserve":
                child.answer(self._reserve(digest, value))
            else:
                self._finish(kind, value)
                return

    def _supervise_check(self, child: Child, digest: str) -> None:
        """Let the child check, one child at a time; it sends `checked` when it is done, or the check's failure."""
        with self._check_lock, self._journal.checking(digest):
            child.answer()
            try:
                kind, value = child.receive(self._check_seconds)
            except ChildExitedError as error:
                if self._closed:
                    raise StoreError("the agent is stopping", permanent=False) from None
                raise UnfitAdapterError(f"the check of the adapter's files {error}") from None
        if kind != "checked":
            self._finish(kind, value)

    def _reserve(self, digest: str, size: int) -> str:
        """Reserve space on the volume; return an error message if it is full, else an empty string."""
        with self._volume_lock:
            self._stored = stored_sizes(self._settings.adapters, self._stored)
            taken = sum(self._stored.values()) + sum(self._reserved.values())
            if taken + size > self._settings.storage:
                return (
                    f"the pod's volume for adapters has {self._settings.storage} bytes, {taken} are in use, and the "
                    f"adapter needs {size}: detach adapters, or ask the platform's administrators to raise "
                    "serving.adapterStorage"
                )
            self._reserved[digest] = size
            return ""

    def _finish(self, kind: str, value: Any) -> None:  # noqa: ANN401 - JSON
        if kind == "done":
            self._limits.base.norms.update(value)
        elif kind == "unfit":
            raise UnfitAdapterError(value)
        elif kind == "store":
            raise StoreError(value[0], permanent=value[1])
        else:
            raise OSError(value)


class _SupervisedSteps(Steps):
    """Steps of a child, each permitted by its parent."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @contextmanager
    def checking(self) -> Iterator[None]:
        self._channel.request("check")
        try:
            yield
        except (UnfitAdapterError, OSError):
            raise
        except MemoryError:
            raise UnfitAdapterError("the check of the adapter's files needed too much memory") from None
        except Exception as error:
            log.exception("check of an adapter")
            raise UnfitAdapterError(
                f"the check of the adapter's files failed ({type(error).__name__}: {error})"
            ) from None
        self._channel.send("checked")

    def reserve(self, size: int) -> None:
        full = self._channel.request("reserve", size)
        if full:
            raise StoreError(full, permanent=False)

    def progress(self, size: int) -> None:
        self._channel.send("progress", size)


def _library(store: str) -> list[str]:
    """Return the modules with a store's file system: importing them in every child would cost time and memory."""
    scheme = BY_NAME.get(split(store)[0])
    if scheme is None:
        return []
    return [scheme.module, _S3_SESSION] if scheme.name == "s3" else [scheme.module]


def _s3_session() -> Any:  # noqa: ANN401 - aiobotocore has no types
    """Return the session that the server process has loaded; None for other stores."""
    loaded = sys.modules.get(_S3_SESSION)
    return None if loaded is None else loaded.SESSION


def _fetch_in_child(channel: Channel, document: str, limits: PodLimits, settings: FetchSettings) -> None:
    """Fetch an artifact and send the result."""
    adapter = DesiredAdapter.model_validate_json(document)
    try:
        with guarded({ALLOWED_ADDRESSES: settings.allowed_addresses}):
            credentials = read_credentials(settings.secret)
            set_proxies(credentials)
            fetch_artifact(
                adapter,
                limits,
                settings.adapters,
                lambda uri: StoreFolder(uri, credentials, s3_session=_s3_session()),
                _SupervisedSteps(channel),
            )
    except UnfitAdapterError as error:
        channel.send("unfit", str(error))
    except StoreError as error:
        channel.send("store", [str(error), error.permanent])
    except OSError as error:
        channel.send("disk", error.strerror or str(error))
    except MemoryError:
        channel.send("store", ["the download needed too much memory", False])
    except ValueError as error:
        channel.send("store", [str(error), False])
    else:
        channel.send("done", limits.base.norms)
