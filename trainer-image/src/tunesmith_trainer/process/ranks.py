"""The processes that train together: which one this is, how they meet, and what they agree on.

Each process is a rank: one per GPU, or one per pod on the CPU. They meet as torchrun's do, by RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT, so a launcher of that kind can start them too.
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
"""Set by the Job controller in each pod of an Indexed Job."""
MEETING_SECONDS = 1800.0
"""For all pods to be scheduled, to pull their image and to start."""
_STEP = timedelta(minutes=30)
"""For the others to reach the same place of a step."""
_LONGEST = timedelta(days=2)
"""While the first rank publishes, or waits for a store, the others wait for it. A rank that dies is noticed at once."""
_POLL_SECONDS = 0.5


class PeersMissingError(TrainerError):
    """The other ranks did not come."""

    retryable = True


class PeerLostError(TrainerError):
    """Another rank ended before this one was done with it."""

    retryable = True


@dataclass
class Ranks:
    """The place of this process among those that train together.

    Args:
        rank: 0 reports, saves and publishes.
        size: number of processes.
        local_rank: among those of this pod; the number of its GPU.
        address: host of rank 0.
        port: of rank 0.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = "localhost"
    port: int = 29500
    _agreeing: Any = field(default=None, init=False, repr=False, compare=False)
    """The process group of what is agreed upon, beside that of the gradients: on the CPU, and patient."""

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.size == 1

    def environment(self) -> dict[str, str]:
        """What torch, transformers and accelerate read."""
        if self.alone:
            return {}
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }

    def meet(self, backend: str, seconds: float = MEETING_SECONDS) -> None:
        """Waits for all ranks and joins their process group.

        The waiting is done here, and not in torch's library, where a signal would be looked at only after it.

        Args:
            backend: gloo, or cpu:gloo,cuda:nccl.
            seconds: how long the others may take to come.

        Raises:
            PeersMissingError: with who is missing.
        """
        if self.alone:
            return
        import torch.distributed as dist  # noqa: PLC0415 - takes seconds

        deadline = time.monotonic() + seconds
        if not self.first:
            self._await_first(deadline, seconds)
        store = dist.TCPStore(
            # Its own name may not be in the DNS yet.
            "localhost" if self.first else self.address,
            self.port,
            self.size,
            is_master=self.first,
            timeout=timedelta(seconds=60),
            wait_for_workers=False,
        )
        store.set(_present(self.rank), b"1")
        while missing := [rank for rank in range(self.size) if not store.check([_present(rank)])]:
            if time.monotonic() > deadline:
                names = ", ".join(map(str, missing))
                raise PeersMissingError(
                    f"rank {names} of {self.size} did not come within {seconds:.0f} s: look at the pods that do not"
                    " run; with scheduling.queue the pods of a job are admitted together or not at all"
                )
            time.sleep(_POLL_SECONDS)
        with self._peers():
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=_STEP)
            self._agreeing = dist.new_group(backend="gloo", timeout=_LONGEST)

    def _await_first(self, deadline: float, seconds: float) -> None:
        while True:
            try:
                with between_ranks():
                    socket.create_connection((self.address, self.port), timeout=5).close()
            except OSError as error:
                if time.monotonic() > deadline:
                    raise PeersMissingError(
                        f"rank {self.rank} of {self.size} did not reach rank 0 at {self.address}:{self.port} within"
                        f" {seconds:.0f} s ({error}): look at its pod, and whether a NetworkPolicy keeps pods of one"
                        " job apart"
                    ) from None
                time.sleep(_POLL_SECONDS)
            else:
                return

    def part(self) -> None:
        """Waits until all ranks are done, and leaves their group.

        Raises:
            PeerLostError: one of them ended otherwise.
        """
        if self.alone:
            return
        import torch.distributed as dist  # noqa: PLC0415

        self.wait()
        dist.destroy_process_group()

    def wait(self) -> None:
        """Waits until all ranks are here."""
        self.any()

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is set at any rank."""
        if self.alone:
            return list(flags)
        return [value > 0 for value in self._reduced([float(flag) for flag in flags] or [0.0], "max")][: len(flags)]

    def sum(self, *values: float) -> list[float]:
        """The sums over all ranks."""
        return list(values) if self.alone else self._reduced(list(values), "sum")

    def of_first(self, value: int) -> int:
        """The first rank's value."""
        return value if self.alone else int(self._reduced([float(value) if self.first else 0.0], "sum")[0])

    def agree(self, text: str) -> bool:
        """Whether all ranks have the same text."""
        if self.alone:
            return True
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])  # exact as a float
        return not self.any(number != self.of_first(number))[0]

    def once_per_pod(self, file: Path, make: Callable[[], T]) -> T:
        """What the first rank of a pod makes; the others read what that one wrote into `file`."""
        if self.alone:
            return make()
        made: list[T] = []
        if self.local_rank == 0:
            made.append(make())
            file.write_bytes(pickle.dumps(made))
        self.wait()
        made = made or pickle.loads(file.read_bytes())  # noqa: S301 - written a moment ago by this run
        return made[0]

    def _reduced(self, values: Sequence[float], how: str) -> list[float]:
        import torch  # noqa: PLC0415
        import torch.distributed as dist  # noqa: PLC0415

        tensor = torch.tensor(values, dtype=torch.float64)
        with self._peers():
            dist.all_reduce(tensor, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM, self._agreeing)
        found: list[float] = tensor.tolist()
        return found

    @contextlib.contextmanager
    def _peers(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            lost = lost_peer(error, self)
            if lost is None:
                raise
            raise lost from error


def _present(rank: int) -> str:
    return f"tunesmith/present/{rank}"


def lost_peer(error: Exception, ranks: Ranks) -> PeerLostError | None:
    """The error in other words, where it says that another rank is gone."""
    if ranks.alone or not isinstance(error, RuntimeError):
        return None
    import torch.distributed as dist  # noqa: PLC0415

    # gloo has no exception of its own.
    if not isinstance(error, dist.DistError) and "gloo" not in str(error):
        return None
    return PeerLostError(
        f"rank {ranks.rank} of {ranks.size} lost another rank, whose pod says why; the next attempt goes on from the"
        " last checkpoint"
    )


def of_pod(resources: TrainingResources, environment: Mapping[str, str]) -> tuple[Ranks, int]:
    """The first rank of this pod, or what a launcher made of this process, and how many ranks are to run here.

    Outside a cluster there is one pod, whatever the manifest says: the result does not depend on it.

    Args:
        resources: of the manifest.
        environment: of the process.
    """
    address, port = environment.get("MASTER_ADDR", "localhost"), int(environment.get("MASTER_PORT", "0"))
    if "RANK" in environment:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return Ranks(rank, size, int(environment["LOCAL_RANK"]), address, port), 1
    local = max(resources.gpus, 1)
    nodes = resources.nodes if POD_INDEX in environment else 1
    index = int(environment.get(POD_INDEX, "0"))
    return Ranks(index * local, nodes * local, address=address, port=port), local
