"""The processes that train together: this process's rank, how the ranks connect, and what they agree on.

Each process is a rank: one per GPU, or one per pod on the CPU. They connect as torchrun's ranks do, with RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, so such a launcher can start them too.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import socket
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from tunesmith.contracts.connections import between_ranks
from tunesmith_trainer.errors import TrainerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from tunesmith.api.placement import TrainingResources

T = TypeVar("T")
POD_INDEX = "JOB_COMPLETION_INDEX"
"""Environment variable set by the Job controller in each pod of an Indexed Job."""
CONNECT_TIMEOUT_SECONDS = 1800.0
"""Seconds for all pods to be scheduled, to pull their image and to start."""
_STEP_TIMEOUT = timedelta(minutes=30)
"""Time limit for the other ranks to reach the same point of a step."""
_AGREEMENT_TIMEOUT = timedelta(days=2)
"""Time limit for the first rank to publish or wait for a store. The death of a rank is noticed at once."""
_POLL_SECONDS = 0.5


class PeersMissingError(TrainerError):
    """The other ranks did not connect in time."""

    retryable = True


class PeerLostError(TrainerError):
    """Another rank exited while this one still needed it."""

    retryable = True


@dataclass
class Ranks:
    """Position of this process among those that train together.

    Args:
        rank: rank of this process; rank 0 reports, saves and publishes.
        size: number of ranks.
        local_rank: rank within this pod; the index of its GPU.
        address: host of rank 0.
        port: port of rank 0.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = "localhost"
    port: int = 29500
    _agreement_group: Any = field(default=None, init=False, repr=False, compare=False)
    """Process group for agreements, separate from the gradients' group: on the CPU, with a long timeout."""

    @property
    def first(self) -> bool:
        """True if this is rank 0, which reports for all."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """True if there are no other ranks."""
        return self.size == 1

    def environment(self) -> dict[str, str]:
        """Environment variables that torch, transformers and accelerate read."""
        if self.alone:
            return {}
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }

    def connect(self, backend: str, seconds: float = CONNECT_TIMEOUT_SECONDS) -> None:
        """Wait for all ranks and join their process group.

        It waits in Python, because torch's own wait would delay signal handlers until it returns.

        Args:
            backend: backend of torch.distributed: gloo, or cpu:gloo,cuda:nccl.
            seconds: time limit for the others to connect.

        Raises:
            PeersMissingError: some ranks did not connect; names them.
        """
        if self.alone:
            return
        import torch.distributed as dist  # noqa: PLC0415 - takes seconds

        deadline = time.monotonic() + seconds
        if not self.first:
            self._await_first(deadline, seconds)
        store = dist.TCPStore(
            # This pod's own name may not be in the DNS yet.
            "localhost" if self.first else self.address,
            self.port,
            self.size,
            is_master=self.first,
            timeout=timedelta(seconds=60),
            wait_for_workers=False,
        )
        store.set(_presence_key(self.rank), b"1")
        while missing := [rank for rank in range(self.size) if not store.check([_presence_key(rank)])]:
            if time.monotonic() > deadline:
                names = ", ".join(map(str, missing))
                raise PeersMissingError(
                    f"rank {names} of {self.size} did not connect within {seconds:.0f} s: check the pods that are not"
                    " running; with scheduling.queue the pods of a job are admitted together or not at all"
                )
            time.sleep(_POLL_SECONDS)
        with self._translated_errors():
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=_STEP_TIMEOUT)
            self._agreement_group = dist.new_group(backend="gloo", timeout=_AGREEMENT_TIMEOUT)

    def _await_first(self, deadline: float, seconds: float) -> None:
        while True:
            try:
                with between_ranks():
                    socket.create_connection((self.address, self.port), timeout=5).close()
            except OSError as error:
                if time.monotonic() > deadline:
                    raise PeersMissingError(
                        f"rank {self.rank} of {self.size} did not reach rank 0 at {self.address}:{self.port} within"
                        f" {seconds:.0f} s ({error}): check its pod, and that no NetworkPolicy blocks traffic between"
                        " the pods of a job"
                    ) from None
                time.sleep(_POLL_SECONDS)
            else:
                return

    def disconnect(self) -> None:
        """Wait until all ranks are done, and leave their process group.

        Raises:
            PeerLostError: one of them exited before that.
        """
        if self.alone:
            return
        import torch.distributed as dist  # noqa: PLC0415

        self.wait()
        dist.destroy_process_group()

    def wait(self) -> None:
        """Wait until all ranks have reached this point."""
        self.any()

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, return True if it is set on any rank."""
        if self.alone:
            return list(flags)
        return [value > 0 for value in self._all_reduce([float(flag) for flag in flags] or [0.0], "max")][: len(flags)]

    def sum(self, *values: float) -> list[float]:
        """Return the sums over all ranks."""
        return list(values) if self.alone else self._all_reduce(list(values), "sum")

    def of_first(self, value: int) -> int:
        """Return the first rank's value."""
        return value if self.alone else int(self._all_reduce([float(value) if self.first else 0.0], "sum")[0])

    def agree(self, text: str) -> bool:
        """Return True if all ranks have the same text."""
        if self.alone:
            return True
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])  # exact as a float
        return not self.any(number != self.of_first(number))[0]

    def once_per_pod(self, file: Path, make: Callable[[], T]) -> T:
        """Return what the first rank of a pod makes; the others read what it wrote to `file`."""
        if self.alone:
            return make()
        made: list[T] = []
        if self.local_rank == 0:
            made.append(make())
            file.write_bytes(pickle.dumps(made))
        self.wait()
        made = made or pickle.loads(file.read_bytes())  # noqa: S301 - written a moment ago by this run
        return made[0]

    def _all_reduce(self, values: Sequence[float], operation: str) -> list[float]:
        import torch  # noqa: PLC0415
        import torch.distributed as dist  # noqa: PLC0415

        tensor = torch.tensor(values, dtype=torch.float64)
        with self._translated_errors():
            dist.all_reduce(
                tensor, dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM, self._agreement_group
            )
        values_of_all: list[float] = tensor.tolist()
        return values_of_all

    @contextlib.contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            lost = lost_peer(error, self)
            if lost is None:
                raise
            raise lost from error


def _presence_key(rank: int) -> str:
    return f"tunesmith/present/{rank}"


def lost_peer(error: Exception, ranks: Ranks) -> PeerLostError | None:
    """Translate the error if it shows that another rank was lost; otherwise return None."""
    if ranks.alone or not isinstance(error, RuntimeError):
        return None
    import torch.distributed as dist  # noqa: PLC0415

    # gloo has no specific exception.
    if not isinstance(error, dist.DistError) and "gloo" not in str(error):
        return None
    return PeerLostError(
        f"rank {ranks.rank} of {ranks.size} lost another rank: see the log of its pod; the next attempt resumes from"
        " the last checkpoint"
    )


def of_pod(resources: TrainingResources, environment: Mapping[str, str]) -> tuple[Ranks, int]:
    """Return the first rank of this pod, or the rank that a launcher assigned, and the number of ranks that it runs.

    Outside a cluster there is one pod, whatever the manifest states: the result does not depend on it.

    Args:
        resources: resources of the manifest.
        environment: environment of the process.
    """
    address, port = environment.get("MASTER_ADDR", "localhost"), int(environment.get("MASTER_PORT", "0"))
    if "RANK" in environment:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return Ranks(rank, size, int(environment["LOCAL_RANK"]), address, port), 1
    local = max(resources.gpus, 1)
    nodes = resources.nodes if POD_INDEX in environment else 1
    index = int(environment.get(POD_INDEX, "0"))
    return Ranks(index * local, nodes * local, address=address, port=port), local
