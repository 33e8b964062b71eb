from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tunesmith.serving.placement import DesiredRevision, Placement, PlacementPod, is_evacuated, place, victims


def pods(*contents: str, ready: bool = True) -> list[PlacementPod]:
    """One pod per string, oldest first; each letter is a revision that is resident there, `(a)` one that is loading."""
    built = []
    for rank, content in enumerate(contents):
        resident = frozenset(content.replace("(", " ").replace(")", " ").split(" ")[0])
        present = frozenset(letter for letter in content if letter.isalpha())
        built.append(PlacementPod(f"p{rank}", ready=ready, age_rank=rank, present=present, resident=resident))
    return built


def wanted(text: str) -> list[DesiredRevision]:
    """`a2 b1`: two copies of a, one of b, in this order of precedence."""
    return [DesiredRevision(word[0], int(word[1:])) for word in text.split()]


def shown(placement: Placement) -> str:
    return " ".join("".join(keys) or "-" for _, keys in sorted(placement.pods.items()))


@pytest.mark.parametrize(
    ("want", "there", "slots", "expected"),
    [
        pytest.param("a1", ["", ""], 4, "- a", id="one copy of an empty pool: the hash decides where"),
        pytest.param("a2", ["", ""], 4, "a a", id="two copies never share a pod"),
        pytest.param("a3", ["", ""], 4, "a a", id="copies beyond the pods have no place"),
        pytest.param("a1 b1", ["a", "b"], 4, "a b", id="what is there stays"),
        pytest.param("a1 b1", ["ab", ""], 4, "ab -", id="a new pod alone moves nothing"),
        pytest.param("a1", ["", "a"], 4, "- a", id="it stays on the younger pod"),
        pytest.param("a1", ["a", "a"], 4, "a -", id="a copy too many leaves the younger pod"),
        pytest.param("a1 b1 c1", ["ab", ""], 2, "ab c", id="a full pod takes no third"),
        pytest.param("a2 b1", ["a", "a"], 1, "a b", id="every revision's first copy before any second"),
        pytest.param(
            "a2 b1", ["a", "a", ""], 1, "a a b", id="a newcomer takes the free pod, not somebody's second copy"
        ),
        pytest.param("a1", ["", "(a)"], 4, "- a", id="a load that has begun is not begun elsewhere"),
        pytest.param("a1", ["a", "(a)"], 4, "a -", id="resident is preferred to loading"),
        pytest.param("", ["ab"], 4, "-", id="what nobody wants goes"),
        pytest.param("a1", [], 4, "", id="no pod"),
    ],
)
def test_place(want: str, there: list[str], slots: int, expected: str) -> None:
    assert shown(place(wanted(want), pods(*there), slots)) == expected


@pytest.mark.parametrize(
    ("want", "there", "slots", "reason"),
    [
        (
            "a3",
            ["", ""],
            4,
            "the pool has 2 pods and two copies never share one: raise its replicas or lower the copies",
        ),
        (
            "a1 b1",
            ["a"],
            1,
            "the pool's 1 pod has room for 1 adapter, and none is left: raise its replicas or engine.maxAdapters",
        ),
        ("a1", [], 1, "the pool has no pod yet"),
    ],
)
def test_unplaced_copies_have_a_reason(want: str, there: list[str], slots: int, reason: str) -> None:
    result = place(wanted(want), pods(*there), slots)
    assert [entry.reason for entry in result.unplaced] == [reason]
    assert result.unplaced_reason(result.unplaced[0].revision) == reason
    assert result.unplaced_reason("z") is None


@pytest.mark.parametrize(
    ("want", "there", "slots", "expected"),
    [
        pytest.param("a1", ["x"], 1, "a", id="it gives its slot to one that can be loaded"),
        pytest.param("a1", ["ax", ""], 2, "ax -", id="it stays where it is while there is room"),
        pytest.param("a1", ["ax", ""], 1, "a x", id="it moves to a slot that is left over"),
        pytest.param("a2", ["x", "x"], 1, "a a", id="second copies come before it"),
        pytest.param("a1", ["a"], 1, "a", id="without room it has no slot"),
    ],
)
def test_a_failed_revision_gets_only_free_slots(want: str, there: list[str], slots: int, expected: str) -> None:
    result = place([DesiredRevision("x", 1, best_effort=True), *wanted(want)], pods(*there), slots)
    assert shown(result) == expected
    assert result.unplaced == ()
    assert result.best_effort == {"x"}


def test_ready_pods_come_first() -> None:
    starting, ready = PlacementPod("p0", ready=False, age_rank=0), PlacementPod("p1", ready=True, age_rank=1)
    assert shown(place(wanted("a1"), [starting, ready], 4)) == "- a"


def test_a_revision_whose_pod_is_not_ready_gets_a_slot_on_a_ready_pod() -> None:
    down, up = replace(pods("(a)")[0], ready=False), pods("", "b")[1]
    first = place(wanted("a1 b1"), [down, up], 2)
    assert first.pods == {"p0": ("a",), "p1": ("a", "b")}
    loaded = replace(up, present=frozenset("ab"), resident=frozenset("ab"))
    assert place(wanted("a1 b1"), [down, loaded], 2).pods == {"p0": (), "p1": ("a", "b")}
    assert place(wanted("a1 b1"), [down, up], 1).pods == {"p0": ("a",), "p1": ("b",)}, "not without a free slot"


def test_spread_moves_to_an_empty_pod_and_removes_only_after_loading() -> None:
    first = place(wanted("a1 b1"), pods("ab", ""), 4, spread=True)
    moved = next(iter(first.pods["p1"]))
    assert first.pods["p0"] == ("a", "b"), "the old copy stays until the new one is resident"
    assert first.targets[moved] == {"p1"}
    loading = place(wanted("a1 b1"), pods("ab", f"({moved})"), 4, spread=True)
    assert loading.pods == first.pods, "the same move continues"
    done = place(wanted("a1 b1"), pods("ab", moved), 4, spread=True)
    assert sorted(shown(done).split()) == ["a", "b"]


def test_a_victim_keeps_revisions_that_are_not_resident_elsewhere() -> None:
    leaving = [pods("a")[0], replace(pods("", "b")[1], victim=True)]
    moving = place(wanted("a1 b1"), leaving, 4)
    assert moving.pods == {"p0": ("a", "b"), "p1": ("b",)}
    assert not is_evacuated(moving, leaving)
    arrived = [pods("ab")[0], leaving[1]]
    done = place(wanted("a1 b1"), arrived, 4)
    assert done.pods == {"p0": ("a", "b"), "p1": ()}
    assert is_evacuated(done, arrived)


def test_a_victim_without_room_elsewhere_does_not_wait() -> None:
    leaving = [pods("a")[0], replace(pods("", "b")[1], victim=True)]
    result = place(wanted("a1 b1"), leaving, 1)
    assert is_evacuated(result, leaving)
    assert result.unplaced[0].revision == "b"


def test_victims_are_not_ready_then_emptiest_then_youngest() -> None:
    three = pods("", "", "")
    assert victims(three, 2, {"p0": 1, "p1": 1, "p2": 1}) == {"p2"}
    assert victims(three, 2, {"p0": 1, "p1": 0, "p2": 1}) == {"p1"}
    assert victims([replace(three[0], ready=False), *three[1:]], 2, {}) == {"p0"}
    assert victims(three, 3, {}) == frozenset()
    assert victims(three, 0, {}) == {"p0", "p1", "p2"}


def _settle(
    want: list[DesiredRevision], crew: list[PlacementPod], capacity: int, *, spread: bool, slots: int | None = None
) -> tuple[Placement, list[PlacementPod]]:
    """Let the agents load what they are told to, until nothing changes."""
    for _ in range(12):
        result = place(want, crew, capacity, slots=slots, spread=spread)
        for item in want:
            holders = [name for name, keys in result.pods.items() if item.revision in keys]
            assert len(result.targets[item.revision]) <= min(item.copies, len(crew))
            assert len(holders) == len(set(holders))
            before = [pod.name for pod in crew if item.revision in pod.resident and pod.ready]
            still = [name for name in before if item.revision in result.pods[name]]
            if before and result.unplaced_reason(item.revision) is None:
                assert still, "a revision that answered does not vanish while it has a place"
        assert all(len(keys) <= capacity for keys in result.pods.values())
        after = [
            replace(pod, present=frozenset(result.pods[pod.name]), resident=frozenset(result.pods[pod.name]))
            for pod in crew
        ]
        if after == crew:
            return result, crew
        crew = after
    raise AssertionError("it does not settle")


@pytest.mark.parametrize("seed", range(200))
def test_invariants_hold_for_random_events(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - a test's own randomness
    slots, spread = chance.randint(1, 4), chance.random() < 0.5
    crew = [PlacementPod(f"p{rank}", ready=True, age_rank=rank) for rank in range(chance.randint(1, 6))]
    want = [DesiredRevision(letter, chance.randint(1, 4)) for letter in "abcdefgh"[: chance.randint(1, 8)]]
    for step in range(6):
        result, crew = _settle(want, crew, slots, spread=spread)
        missing = sum(entry.copies for entry in result.unplaced)
        placed = sum(len(keys) for keys in result.targets.values())
        assert placed + missing == sum(item.copies for item in want)
        if all(item.copies <= len(crew) for item in want) and sum(item.copies for item in want) <= slots:
            assert missing == 0
        change = chance.choice(["pod added", "pod lost", "copies", "nothing"])
        before = {pod.name: pod.resident for pod in crew}
        if change == "pod added":
            crew = [*crew, PlacementPod(f"q{step}", ready=True, age_rank=len(crew))]
        elif change == "pod lost" and len(crew) > 1:
            gone = chance.choice(crew)
            crew = [pod for pod in crew if pod is not gone]
        elif change == "copies":
            index = chance.randrange(len(want))
            want = [replace(item, copies=chance.randint(1, 4)) if at == index else item for at, item in enumerate(want)]
        if change in {"pod added", "nothing"} and missing == 0 and not spread:
            result, crew = _settle(want, crew, slots, spread=False)
            assert all(pod.resident == before.get(pod.name, frozenset()) for pod in crew), "nothing moved without need"


def test_a_copy_is_kept_until_gateways_reach_its_replacement() -> None:
    def lists(*, reachable: bool) -> dict[str, tuple[str, ...]]:
        old = PlacementPod("old", ready=True, present=frozenset("a"), resident=frozenset("a"), victim=True)
        new = PlacementPod("new", ready=True, present=frozenset("a"), resident=frozenset("a"), reachable=reachable)
        return dict(place([DesiredRevision("a", 1)], [old, new], 2).pods)

    assert lists(reachable=False) == {"old": ("a",), "new": ("a",)}
    assert lists(reachable=True) == {"old": (), "new": ("a",)}


def test_a_leaving_pod_gets_new_revisions_while_no_other_pod_is_ready() -> None:
    old, new = PlacementPod("old", ready=True, victim=True), PlacementPod("new", ready=False)
    assert place([DesiredRevision("a", 1)], [old, new], 2).pods["old"] == ("a",)


def busy(text: str, *names: str) -> list[DesiredRevision]:
    return [replace(item, busy=item.revision in names) for item in wanted(text)]


@pytest.mark.parametrize(
    ("names", "there", "expected"),
    [
        pytest.param("ab", ["abc", "def"], "abc def", id="as many as slots stay"),
        pytest.param("abd", ["abc", "def"], "abc def", id="another pod's are its own"),
        pytest.param("abcde", ["abc", "def"], "abc def", id="no move to a pod without a free slot"),
    ],
)
def test_busy_revisions_stay(names: str, there: list[str], expected: str) -> None:
    assert shown(place(busy("a1 b1 c1 d1 e1 f1", *names), pods(*there), 8, slots=2)) == expected


def test_a_busy_revision_moves_to_a_pod_with_a_free_slot_once_it_is_loaded_there() -> None:
    want = busy("a1 b1 c1 d1", *"abc")
    first = place(want, pods("abc", "d"), 8, slots=2)
    (moved,) = [name for name, targets in first.targets.items() if name != "d" and targets == {"p1"}]
    assert first.pods["p0"] == ("a", "b", "c"), "it stays until it is loaded"
    assert set(first.pods["p1"]) == {moved, "d"}
    begun = pods("abc", f"d({moved})")
    assert place(want, begun, 8, slots=2).pods == first.pods, "the same move continues"
    settled, crew = _settle(want, pods("abc", "d"), 8, spread=False, slots=2)
    assert "".join(settled.pods["p0"]) == "abc".replace(moved, "")
    assert place(wanted("a1 b1 c1 d1"), crew, 8, slots=2).pods == settled.pods, "nothing moves back"


@pytest.mark.parametrize("seed", range(200))
def test_no_pod_has_more_busy_revisions_than_slots_while_another_has_room(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - a test's own randomness
    count, capacity, slots, spread = (chance.randint(2, 4), chance.randint(4, 8), chance.randint(1, 3), seed % 2 == 0)
    crew = [PlacementPod(f"p{rank}", ready=True, age_rank=rank) for rank in range(count)]
    letters = "abcdefghijklmnop"[: chance.randint(1, count * capacity)]
    for _ in range(4):
        names = {letter for letter in letters if chance.random() < 0.5}
        want = busy(" ".join(f"{letter}1" for letter in letters), *names)
        result, crew = _settle(want, crew, capacity, spread=spread, slots=slots)
        active = {pod: len(names & set(keys)) for pod, keys in result.pods.items()}
        room = [pod for pod, keys in result.pods.items() if active[pod] < slots and len(keys) < capacity]
        assert not room or max(active.values()) <= slots
        again, _ = _settle(want, crew, capacity, spread=spread, slots=slots)
        assert again.pods == result.pods
