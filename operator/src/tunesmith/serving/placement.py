"""Placement of revisions on the pods of a pool.

Stable: a revision stays where it is unless its pod leaves, its number of copies decreases, `spread` asks for even pods,
or its pod has more busy revisions than slots while another has room. Nothing is removed from a pod before its
replacement is resident (make before break), as far as there is room. Ties are broken by rendezvous hashing, so two runs
with the same input agree.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


@dataclass(frozen=True)
class DesiredRevision:
    """A revision and the number of pods that should hold it.

    `best_effort`: True if it could not be loaded. It is retried if there is room, which it never takes from another
    revision. `busy`: True if it is active much of the time.
    """

    revision: str
    copies: int
    best_effort: bool = False
    busy: bool = False


@dataclass(frozen=True)
class PlacementPod:
    """A pod of the pool that is not stopping.

    `ready`: its engine answers, as far as is known. `reachable`: its Ready condition is True, so that gateways send it
    requests. `present`: revisions that it holds or is loading. `resident`: revisions that its engine holds.
    `age_rank`: 0 for the oldest. `victim`: it is to be removed and keeps only revisions that are not yet resident
    elsewhere. `outdated`: its template is not the current one.
    """

    name: str
    ready: bool
    age_rank: int = 0
    present: frozenset[str] = frozenset()
    resident: frozenset[str] = frozenset()
    reachable: bool = True
    victim: bool = False
    outdated: bool = False


@dataclass(frozen=True)
class Unplaced:
    """Copies of a revision for which there is no room, with the reason as a sentence."""

    revision: str
    copies: int
    reason: str


@dataclass(frozen=True)
class Placement:
    """The complete assignment of revisions to pods.

    `pods`: sorted revisions by pod; every pod has an entry. `targets`: the final pods of each revision; its other
    holders in `pods` keep it until it is resident on these. `unplaced`: copies without room.
    `best_effort`: revisions that only get room that is otherwise free.
    """

    pods: Mapping[str, tuple[str, ...]]
    targets: Mapping[str, frozenset[str]]
    unplaced: tuple[Unplaced, ...] = ()
    best_effort: frozenset[str] = frozenset()

    def unplaced_reason(self, revision: str) -> str | None:
        """Return the reason why there is no room for copies of the revision; None if there is."""
        return next((entry.reason for entry in self.unplaced if entry.revision == revision), None)


@dataclass
class _Assignment:
    capacity: int
    pods: list[PlacementPod]
    busy: frozenset[str] = frozenset()
    targets: dict[str, set[str]] = field(default_factory=dict)
    load: dict[str, int] = field(default_factory=dict)
    reserved: dict[str, int] = field(default_factory=dict)
    """Desired copies that are already on the pod and are not assigned yet."""

    def assign(self, revision: str, pod: PlacementPod) -> None:
        self.targets[revision].add(pod.name)
        self.load[pod.name] += 1
        if revision in pod.present:
            self.reserved[pod.name] -= 1

    def pods_with_room_for(self, revision: str) -> list[PlacementPod]:
        return [
            pod for pod in self.pods if pod.name not in self.targets[revision] and self.load[pod.name] < self.capacity
        ]

    def busy_on(self, pod: PlacementPod) -> int:
        return sum(1 for revision in self.busy if pod.name in self.targets[revision])

    def move(self, revision: str, high: PlacementPod, low: PlacementPod) -> None:
        self.targets[revision].remove(high.name)
        self.targets[revision].add(low.name)
        self.load[high.name] -= 1
        self.load[low.name] += 1


def place(
    desired: Sequence[DesiredRevision],
    pods: Iterable[PlacementPod],
    capacity: int,
    *,
    slots: int | None = None,
    spread: bool = False,
) -> Placement:
    """Assign revisions to pods.

    Args:
        desired: revisions in order of precedence: if room is scarce, every revision gets its first copy before any
            gets a second, and among equals the earlier one wins.
        pods: the pool's pods, without those that are stopping.
        capacity: number of revisions that one pod can hold.
        slots: number of revisions that compute on one pod at the same time; None: as many as it holds.
        spread: True if revisions may move from full pods to pods that hold at least two fewer.

    Returns:
        An assignment in which no pod has more than `capacity` revisions or the same revision twice, and no pod has more
        than `slots` busy revisions while another one has room for one of them.
    """
    all_pods = sorted(pods, key=lambda pod: (pod.age_rank, pod.name))
    best_effort = [item for item in desired if item.best_effort]
    desired = [item for item in desired if not item.best_effort]
    staying = [pod for pod in all_pods if not pod.victim]
    names = {item.revision for item in desired}
    assignment = _Assignment(
        capacity=capacity,
        pods=staying,
        busy=frozenset(item.revision for item in desired if item.busy),
        targets={item.revision: set() for item in desired},
        load={pod.name: 0 for pod in staying},
        reserved={pod.name: len(pod.present & names) for pod in staying},
    )
    for copy in range(max((item.copies for item in desired), default=0)):
        requesting = [item.revision for item in desired if item.copies > copy]
        # First keep existing copies, then assign the missing ones, so that no copy loses its place to a new one.
        missing = [revision for revision in requesting if not _keep_copy(assignment, revision)]
        for revision in missing:
            _assign_new_copy(assignment, revision)
    if spread:
        _even_out(assignment)
    if slots is not None:
        _spread_busy(assignment, slots)
    assigned = {
        pod.name: {revision for revision, names in assignment.targets.items() if pod.name in names} for pod in all_pods
    }
    _keep_answering(desired, all_pods, assignment, assigned)
    _cover_unready(desired, all_pods, capacity, assigned)
    _place_best_effort(best_effort, staying, capacity, assigned)
    return Placement(
        pods={name: tuple(sorted(revisions)) for name, revisions in assigned.items()},
        targets={revision: frozenset(names) for revision, names in assignment.targets.items()},
        unplaced=tuple(_unplaced(desired, staying, assignment)),
        best_effort=frozenset(item.revision for item in best_effort),
    )


def victims(pods: Iterable[PlacementPod], desired_pods: int, copies: Mapping[str, int]) -> frozenset[str]:
    """Return the pods to remove when the pool shrinks, or when a surge pod exists.

    Outdated pods come first, then those that are not ready, then those with the fewest copies, then the newest.

    Args:
        pods: pods that are not stopping.
        desired_pods: number of pods that stay.
        copies: number of revisions that each pod is to hold now, by pod name.
    """
    ranked = sorted(
        pods, key=lambda pod: (not pod.outdated, pod.ready, copies.get(pod.name, 0), -pod.age_rank, pod.name)
    )
    return frozenset(pod.name for pod in ranked[: max(0, len(ranked) - desired_pods)])


def is_evacuated(placement: Placement, pods: Iterable[PlacementPod]) -> bool:
    """Return True if no victim holds a revision that is not yet resident on its target pods."""
    return not any(placement.pods.get(pod.name) for pod in pods if pod.victim)


def _keep_copy(assignment: _Assignment, revision: str) -> bool:
    """Assign the revision to a pod that already has it; return False if there is none."""
    current = [pod for pod in assignment.pods_with_room_for(revision) if revision in pod.present]
    if not current:
        return False
    assignment.assign(
        revision,
        min(
            current,
            key=lambda pod: (not (pod.ready and revision in pod.resident), not pod.ready, pod.age_rank, pod.name),
        ),
    )
    return True


def _assign_new_copy(assignment: _Assignment, revision: str) -> None:
    candidates = assignment.pods_with_room_for(revision)
    if not candidates:
        return

    def preference(pod: PlacementPod) -> tuple[bool, bool, int, int, str]:
        displaces = assignment.load[pod.name] + assignment.reserved[pod.name] >= assignment.capacity
        return (
            displaces,
            not pod.ready,
            assignment.busy_on(pod) if revision in assignment.busy else 0,
            assignment.load[pod.name] + assignment.reserved[pod.name],
            _rendezvous(revision, pod.name),
        )

    assignment.assign(revision, min(candidates, key=preference))


def _even_out(assignment: _Assignment) -> None:
    ready = [pod for pod in assignment.pods if pod.ready]
    while ready:
        low = min(ready, key=lambda pod: (assignment.load[pod.name], pod.age_rank))
        high = max(ready, key=lambda pod: (assignment.load[pod.name], -pod.age_rank))
        movable = [
            revision for revision, names in assignment.targets.items() if high.name in names and low.name not in names
        ]
        if assignment.load[high.name] - assignment.load[low.name] < 2 or not movable:  # noqa: PLR2004 - a difference of one cannot be evened out
            return
        # A revision that is already being loaded goes first, so that the same input always continues the same move.
        # Busy ones go last: _spread_busy places them.
        revision = min(
            movable, key=lambda name: (name not in low.present, name in assignment.busy, _rendezvous(name, low.name))
        )
        assignment.move(revision, high, low)


def _spread_busy(assignment: _Assignment, slots: int) -> None:
    """Move busy revisions from pods with more of them than slots to pods with room for one more."""
    counts = {pod.name: assignment.busy_on(pod) for pod in assignment.pods}
    ready = [pod for pod in assignment.pods if pod.ready]
    for high in sorted(ready, key=lambda pod: (-counts[pod.name], pod.age_rank)):
        while counts[high.name] > slots:
            moves = [
                (revision, low)
                for low in ready
                if counts[low.name] < slots and assignment.load[low.name] < assignment.capacity
                for revision in assignment.busy
                if high.name in assignment.targets[revision] and low.name not in assignment.targets[revision]
            ]
            if not moves:
                break
            # As in _even_out, a move that has begun goes first.
            revision, low = min(
                moves,
                key=lambda move: (
                    move[0] not in move[1].present,
                    counts[move[1].name],
                    move[1].age_rank,
                    _rendezvous(move[0], move[1].name),
                ),
            )
            assignment.move(revision, high, low)
            counts[high.name] -= 1
            counts[low.name] += 1


def _keep_answering(
    desired: Sequence[DesiredRevision],
    pods: Sequence[PlacementPod],
    assignment: _Assignment,
    assigned: dict[str, set[str]],
) -> None:
    """Keep copies that answer now while their targets do not."""
    for item in desired:
        targets = assignment.targets[item.revision]
        answering = sum(
            1 for pod in pods if pod.name in targets and pod.ready and pod.reachable and item.revision in pod.resident
        )
        other_holders = [
            pod
            for pod in pods
            if pod.name not in targets
            and item.revision in pod.resident
            and len(assigned[pod.name]) < assignment.capacity
        ]
        other_holders.sort(key=lambda pod: (not pod.ready, pod.victim, pod.age_rank, pod.name))
        for pod in other_holders[: max(0, len(targets) - answering)]:
            assigned[pod.name].add(item.revision)


def _cover_unready(
    desired: Sequence[DesiredRevision], pods: Sequence[PlacementPod], capacity: int, assigned: dict[str, set[str]]
) -> None:
    """Assign a ready pod to each revision whose pods are all unready (an engine restarts, a node is lost)."""
    # If no remaining pod is ready, for example in a failing replacement, use a pod that is to be removed.
    ready = [pod for pod in pods if pod.ready and not pod.victim] or [pod for pod in pods if pod.ready]
    for item in desired:
        if any(item.revision in assigned[pod.name] for pod in ready):
            continue
        free = [pod for pod in ready if len(assigned[pod.name]) < capacity]
        if item.copies > 0 and free:
            pod = min(free, key=lambda pod: (len(assigned[pod.name]), _rendezvous(item.revision, pod.name)))
            assigned[pod.name].add(item.revision)


def _place_best_effort(
    best_effort: Sequence[DesiredRevision], pods: Sequence[PlacementPod], capacity: int, assigned: dict[str, set[str]]
) -> None:
    """Assign free places to revisions that could not be loaded, preferably on the pods where they are."""
    for item in best_effort:
        free = [pod for pod in pods if len(assigned[pod.name]) < capacity]
        if free:
            pod = min(
                free,
                key=lambda pod: (
                    item.revision not in pod.present,
                    not pod.ready,
                    len(assigned[pod.name]),
                    _rendezvous(item.revision, pod.name),
                ),
            )
            assigned[pod.name].add(item.revision)


def _unplaced(
    desired: Sequence[DesiredRevision], staying: Sequence[PlacementPod], assignment: _Assignment
) -> list[Unplaced]:
    found = []
    for item in desired:
        missing = item.copies - len(assignment.targets[item.revision])
        if missing <= 0:
            continue
        if not staying:
            reason = "the pool has no pod yet"
        elif len(assignment.targets[item.revision]) == len(staying):
            reason = (
                f"the pool has {len(staying)} pod{'s' * (len(staying) != 1)} and two copies never "
                "share one: raise its replicas or lower the copies"
            )
        else:
            reason = (
                f"the pool's {_count(len(staying), 'pod')} {'has' if len(staying) == 1 else 'have'} room for "
                f"{_count(len(staying) * assignment.capacity, 'adapter')}, and none is left: "
                "raise its replicas or engine.maxAdapters"
            )
        found.append(Unplaced(item.revision, missing, reason))
    return found


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


@lru_cache(maxsize=2**17)
def _rendezvous(revision: str, pod: str) -> str:
    return hashlib.sha256(f"{revision}\0{pod}".encode()).hexdigest()
