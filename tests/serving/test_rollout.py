"""Rollouts of new revisions: tables of single passes, whole rollouts, and random runs that must keep the promises."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from tests.serving.conftest import DIGESTS, START
from tunesmith.api.adapterdeployment import AdapterDeployment, AdapterDeploymentStatus
from tunesmith.api.conditions import AdapterDeploymentReason as Reason
from tunesmith.api.conditions import find
from tunesmith.api.rollout import AdapterRollout, MeasureStatus, RolloutPhase, ShadowComparison
from tunesmith.autoscale.decide import Decision
from tunesmith.contracts.agent import AdapterParity, PodState, Residency, ResidencyState
from tunesmith.contracts.traffic import Comparison, Traffic, TrafficCounts, bucket_of
from tunesmith.serving.adapter import AdapterObservation, copies_of, copies_of_rollouts, desired_copies, plan
from tunesmith.serving.analysis import QueryResult, compare
from tunesmith.serving.pod import PoolPod
from tunesmith.serving.resolve import Artifact, Unresolved
from tunesmith.serving.rollout_status import expressions, rollout_events, without_measures

Build = Callable[..., Any]
CANARY = {
    "strategy": "Canary",
    "steps": [{"weight": 10, "pauseSeconds": 60}, {"weight": 50, "pauseSeconds": 60}],
    "analysis": [{"measure": "ErrorRate", "max": 0.05}],
    "minRequests": 20,
}


def artifact(letter: str, **more: Any) -> Artifact:
    return Artifact(DIGESTS[letter], f"s3://store/team/job-{letter}/artifact", "sha256:f", "FineTuneJob job", **more)


def name_of(letter: str) -> str:
    return f"team/pirate@{letter * 12}"


def letters(status: AdapterDeploymentStatus) -> str:
    return " ".join(
        f"{item.engine_name[-1]}{'' if item.weight is None else f':{item.weight}'}"
        f"{'' if item.shadow_percent is None else f'+{item.shadow_percent}'}"
        for item in status.revisions
    )


def condition(status: AdapterDeploymentStatus, type_: str) -> str:
    found = find(status.conditions, type_)
    return "" if found is None else f"{found.status} {found.reason}"


@dataclass
class Counters:
    """What an engine has counted for a revision."""

    served: TrafficCounts = field(default_factory=TrafficCounts)
    shadow: TrafficCounts = field(default_factory=TrafficCounts)

    def add(self, requests: int, errors: int = 0, seconds: float = 0.1, *, shadow: bool = False) -> None:
        old = self.shadow if shadow else self.served
        bucket, answers = bucket_of(seconds), requests - errors
        new = TrafficCounts(
            requests=old.requests + requests,
            errors=old.errors + errors,
            first_token={**old.first_token, bucket: old.first_token.get(bucket, 0) + answers},
            per_output_token={**old.per_output_token, bucket: old.per_output_token.get(bucket, 0) + answers},
        )
        if shadow:
            self.shadow = new
        else:
            self.served = new


@dataclass
class Engine:
    """A pod: it loads what the status wants, unless that is damaged or it is full."""

    name: str
    start: str = "aa"
    reports: bool = True
    is_known: bool = True
    loads: bool = True
    held: dict[str, Counters] = field(default_factory=dict)
    counted: dict[str, Counters] = field(default_factory=dict)

    def restart(self) -> None:
        self.start = f"{int(self.start, 16) + 1:02x}"
        self.counted = {}

    def counters(self, letter: str) -> Counters:
        return self.counted.setdefault(name_of(letter), Counters())


class Cluster:
    """An AdapterDeployment and the pods of its pool; every pass is computed from the written status alone."""

    def __init__(self, build: Build, pool: Build, *, pods: int = 1, copies: int = 1, **spec: Any) -> None:
        self.build, self.pool = build, pool
        self.spec: dict[str, Any] = {"rollout": CANARY, **spec}
        self.now: datetime = START
        self.copies = copies
        self.engines = [Engine(f"pod-{number}") for number in range(pods)]
        self.source: Artifact | Unresolved = artifact("a")
        self.status = AdapterDeploymentStatus()
        self.comparisons: list[Comparison] = []
        self.annotation: str | None = None
        self.damaged: set[str] = set()
        self.parity: dict[str, AdapterParity] = {}
        self.queries: dict[str, QueryResult] = {}

    def adapter(self) -> AdapterDeployment:
        adapter: AdapterDeployment = self.build(status=self.status.manifest(), **self.spec)
        notes = {} if self.annotation is None else {"tunesmith.dev/rollout": self.annotation}
        return adapter.model_copy(update={"metadata": adapter.metadata.model_copy(update={"annotations": notes})})

    def pods(self) -> list[PoolPod]:
        found = []
        for engine in self.engines:
            adapters = [
                Residency(
                    engine_name=name,
                    digest="",
                    state=ResidencyState.FAILED if name in self.damaged else ResidencyState.RESIDENT,
                    message="damaged" if name in self.damaged else "",
                    permanent=name in self.damaged,
                    parity=self.parity.get(name),
                )
                for name in engine.held
            ]
            traffic = {
                name: Traffic(start=engine.start, served=counters.served, shadow=counters.shadow)
                for name, counters in engine.counted.items()
            }
            found.append(
                PoolPod(
                    namespace="team",
                    name=engine.name,
                    uid=f"uid-{engine.name}",
                    address="127.0.0.1",
                    created=START,
                    ready=True,
                    gate=True,
                    deletion_cost=None,
                    stopping=False,
                    state=PodState(engine_ready=True, adapters=adapters, traffic=traffic) if engine.is_known else None,
                    is_reporting=engine.reports,
                )
            )
        return found

    def observe(self) -> AdapterObservation:
        return AdapterObservation(
            artifact=self.source,
            pool=self.pool(),
            lost_to=None,
            pods=self.pods(),
            unplaced={},
            decision=Decision(self.copies, "spec.replicas"),
            url="",
            queries=self.queries,
            no_queries="",
            comparisons={name_of("b"): self.comparisons},
        )

    def reconcile(self) -> AdapterDeploymentStatus:
        self.status = plan(self.adapter(), self.observe(), self.now)
        self._load()
        return self.status

    def _load(self) -> None:
        """The pool's plan: each revision on as many pods as it should have."""
        wanted = desired_copies(self.status.revisions, copies_of(self.adapter()))
        names = {revision.engine_name for revision, copies in wanted if copies}
        for engine in self.engines:
            engine.held = {name: counters for name, counters in engine.held.items() if name in names}
        for revision, copies in wanted:
            holders = [engine for engine in self.engines if revision.engine_name in engine.held]
            free = [engine for engine in self.engines if engine not in holders and engine.loads]
            for engine in free[: max(0, copies - len(holders))]:
                engine.held[revision.engine_name] = Counters()
            for engine in holders[max(copies, 1) :]:
                del engine.held[revision.engine_name]

    def settle(self, passes: int = 4) -> AdapterDeploymentStatus:
        for _ in range(passes):
            self.reconcile()
        return self.status

    def wait(self, seconds: float = 61) -> AdapterDeploymentStatus:
        self.now += timedelta(seconds=seconds)
        return self.settle()

    def serve(self, letter: str, requests: int, errors: int = 0, seconds: float = 0.1, *, shadow: bool = False) -> None:
        holder = next(engine for engine in self.engines if name_of(letter) in engine.held)
        holder.counters(letter).add(requests, errors, seconds, shadow=shadow)

    @property
    def phase(self) -> str:
        return "" if self.status.rollout is None else str(self.status.rollout.phase)

    @property
    def message(self) -> str:
        assert self.status.rollout is not None
        return self.status.rollout.message

    @property
    def measures(self) -> list[MeasureStatus]:
        assert self.status.rollout is not None
        return self.status.rollout.measures


@pytest.fixture
def cluster(adapter: Build, pool: Build) -> Callable[..., Cluster]:
    def build(source: str = "b", **more: Any) -> Cluster:
        """A served revision `a`, and another source."""
        made = Cluster(adapter, pool, **more)
        made.settle()
        assert letters(made.status) == "a"
        made.source = artifact(source)
        return made

    return build


def test_a_first_revision_needs_no_rollout(cluster: Build) -> None:
    status = cluster("a").settle()
    assert letters(status) == "a"
    assert status.rollout is None


def test_a_good_revision_is_promoted_by_steps(cluster: Build) -> None:
    made = cluster(pods=4, copies=4)
    assert letters(made.reconcile()) == "b:0 a:100"
    assert made.phase == "Preparing"
    assert [item.desired_replicas for item in made.status.revisions] == [1, 4]
    assert letters(made.settle()) == "b:10 a:90"
    assert condition(made.status, "Ready") == "True RollingOut"
    assert condition(made.status, "Progressing") == "True RollingOut"
    assert condition(made.status, "Reconciling") == "True RollingOut"
    made.serve("b", 30)
    assert letters(made.settle()) == "b:10 a:90", "the time of the step is not over"
    assert letters(made.wait()) == "b:50 a:50"
    assert [item.desired_replicas for item in made.status.revisions] == [2, 2]
    made.serve("b", 30, errors=1)
    made.wait()
    assert letters(made.status) == "b"
    assert made.phase == "Complete"
    assert made.status.revisions[0].ready_replicas == 4
    assert made.status.previous_revision is not None
    assert made.status.previous_revision.digest == DIGESTS["a"]
    assert condition(made.status, "Progressing") == "False Settled"
    assert condition(made.status, "Stalled") == condition(made.status, "Reconciling") == ""


def test_the_next_share_waits_for_its_pods(cluster: Build) -> None:
    made = cluster(pods=2, copies=2)
    made.settle()
    made.serve("b", 20)
    made.spec["rollout"] = CANARY
    for engine in made.engines:
        engine.loads = name_of("b") in engine.held
    made.wait()
    made.serve("b", 20)
    made.wait()
    assert letters(made.status) == "b:50 a:50"
    assert made.phase == "Promoting"
    assert made.message == "revision bbbbbbbbbbbb is resident on 1 of 2 pods"
    for engine in made.engines:
        engine.loads = True
    assert letters(made.settle()) == "b"


def test_errors_roll_back_at_once(cluster: Build) -> None:
    made = cluster()
    made.settle()
    made.serve("b", 40, errors=4)
    status = made.reconcile()
    assert letters(status) == "a"
    assert made.phase == "RolledBack"
    assert status.rejected_digests == [DIGESTS["b"]]
    (found,) = made.measures
    assert (found.measure, found.value, found.max, found.passed) == ("ErrorRate", 0.1, 0.05, False)
    assert made.message == "revision bbbbbbbbbbbb was given up: ErrorRate: 0.1 is above the max, 0.05"
    made.settle()
    assert condition(made.status, "Ready") == "True Resident"
    assert condition(made.status, "Progressing") == "False RolledBack"
    assert condition(made.status, "Stalled") == "True RolledBack"


def test_a_rejected_digest_is_not_tried_again_until_the_spec_changes(cluster: Build) -> None:
    made = cluster()
    made.settle()
    made.serve("b", 40, errors=40)
    made.settle()
    assert letters(made.wait(9999)) == "a"
    made.copies = 3
    made.spec["replicas"] = 3
    assert letters(made.settle()) == "a", "autoscalers set replicas"
    made.source = artifact("c")
    assert letters(made.settle()) == "c:10 a:90"
    made.source = artifact("b")
    assert letters(made.settle()) == "a"
    assert made.phase == "Aborted"
    made.spec["rollout"] = {**CANARY, "analysis": [{"measure": "ErrorRate", "max": 0.9}]}
    assert letters(made.settle()) == "b:10 a:90"
    assert made.status.rejected_digests == []


@pytest.mark.parametrize(
    ("check", "requests", "errors", "seconds", "passes"),
    [
        ({"measure": "ErrorRate", "max": 0.0}, 20, 0, 0.1, True),
        ({"measure": "ErrorRate", "max": 0.0}, 20, 1, 0.1, False),
        ({"measure": "ErrorRate", "max": 0.0}, 19, 19, 0.1, None),
        ({"measure": "TimeToFirstTokenP95Seconds", "max": 0.2}, 40, 0, 0.1, True),
        ({"measure": "TimeToFirstTokenP95Seconds", "max": 0.2}, 40, 0, 0.4, False),
        ({"measure": "TimeToFirstTokenP95Seconds", "max": 0.2}, 40, 25, 0.1, None),
        ({"measure": "TimePerOutputTokenP95Seconds", "max": 0.2}, 40, 0, 0.4, False),
    ],
)
def test_measures_of_requests(
    check: dict[str, Any],
    requests: int,
    errors: int,
    seconds: float,
    passes: bool | None,  # noqa: FBT001 - a column of the table
    cluster: Build,
) -> None:
    made = cluster(rollout={**CANARY, "analysis": [check]})
    made.settle()
    made.serve("b", requests, errors, seconds)
    made.wait()
    expected = {True: "b:50 a:50", False: "a", None: "b:10 a:90"}
    assert letters(made.status) == expected[passes]


def test_what_was_counted_before_the_step_does_not_count(cluster: Build) -> None:
    made = cluster()
    made.settle()
    made.serve("b", 100)
    made.wait()
    assert letters(made.status) == "b:50 a:50"
    made.wait()
    assert letters(made.status) == "b:50 a:50"
    assert made.message == "waits for ErrorRate: 0 of at least 20 requests in this step"


def test_a_restart_of_the_engine_adds_what_it_counts_since(cluster: Build) -> None:
    made = cluster()
    made.settle()
    made.serve("b", 15)
    made.settle()
    made.engines[0].restart()
    made.settle()
    assert made.status.rollout.traffic.requests == 15
    made.serve("b", 10, errors=10)
    made.reconcile()
    assert made.phase == "RolledBack"
    assert made.measures[0].value == 0.4


def test_a_pod_that_does_not_report_is_no_success(cluster: Build) -> None:
    made = cluster(pods=2, copies=2, rollout={**CANARY, "steps": [{"weight": 100, "pauseSeconds": 0}]})
    made.settle()
    made.engines[0].counters("b").add(50)
    made.engines[1].reports = False
    made.wait()
    assert letters(made.status) == "b:100 a:0"
    assert made.measures[0].passed is None
    assert made.measures[0].message == "pod pod-1 does not report its requests"
    made.engines[0].counters("b").add(50, errors=50)
    made.settle()
    assert made.phase == "RolledBack", "the requests that are known suffice"


def test_a_pod_that_is_silent_after_a_restart_of_the_operator_is_no_success(cluster: Build) -> None:
    made = cluster(pods=2, copies=2, rollout={**CANARY, "steps": [{"weight": 100, "pauseSeconds": 0}]})
    made.settle()
    made.engines[0].counters("b").add(50)
    made.engines[1].reports = made.engines[1].is_known = False
    made.wait()
    assert letters(made.status) == "b:100 a:0"
    assert made.measures[0].message == "pod pod-1 does not report its requests"


def test_a_revision_that_cannot_be_loaded_is_rolled_back(cluster: Build) -> None:
    made = cluster()
    made.damaged = {name_of("b")}
    made.settle()
    assert letters(made.status) == "a"
    assert made.message == "revision bbbbbbbbbbbb was given up: it cannot be loaded: damaged (pod pod-0)"


@pytest.mark.parametrize(
    ("parity", "limit", "expected"),
    [
        (None, None, "b:0 a:100"),
        ({"verdict": "Passed", "distance": 0.01, "tolerance": 0.1}, None, "b:10 a:90"),
        ({"verdict": "Passed", "distance": 0.05, "tolerance": 0.1}, 0.02, "a"),
        ({"verdict": "Failed", "distance": 0.5, "tolerance": 0.1}, None, "a"),
        ({"verdict": "Failed", "message": "its answers are not finite"}, None, "a"),
        ({"verdict": "Undecided", "distance": 0.01, "tolerance": 0.1}, None, "b:0 a:100"),
        ({"verdict": "Undecided", "distance": 0.01, "tolerance": 0.1}, 0.02, "b:10 a:90"),
        ({"verdict": "NotRecorded"}, 1.0, "b:0 a:100"),
    ],
)
def test_parity_comes_before_the_first_request(
    parity: dict[str, Any] | None, limit: float | None, expected: str, cluster: Build
) -> None:
    check = {"measure": "ServedParity"} | ({} if limit is None else {"max": limit})
    made = cluster(rollout={**CANARY, "analysis": [check]})
    if parity is not None:
        made.parity = {name_of("b"): AdapterParity.model_validate_json(json.dumps(parity))}
    assert letters(made.settle()) == expected


@pytest.mark.parametrize(("missed", "expected"), [(None, "b:0 a:100"), (0, "b:10 a:90"), (1, "a")])
def test_gates_come_before_the_first_request(missed: int | None, expected: str, cluster: Build) -> None:
    made = cluster(rollout={**CANARY, "analysis": [{"measure": "EvaluationGate"}]})
    made.source = artifact("b", missed_gates=missed)
    assert letters(made.settle()) == expected


def test_an_expression_decides_once_it_has_a_result_of_this_step(cluster: Build) -> None:
    query = 'sum(rate(cost{revision="{{revision}}"}[1m]))'
    check = {"measure": "Query", "query": query, "max": 2}
    made = cluster(rollout={**CANARY, "analysis": [check]})
    assert expressions(made.adapter(), made.reconcile()) == {}
    made.queries = {query: QueryResult(made.now - timedelta(seconds=1), 1.0)}
    made.settle()
    wanted = expressions(made.adapter(), made.status)
    assert wanted == {query: 'sum(rate(cost{revision="team/pirate@bbbbbbbbbbbb"}[1m]))'}
    made.serve("b", 20)
    made.wait()
    assert made.measures[0].message == "the expression has not been evaluated in this step"
    made.queries = {query: QueryResult(made.now, problem="Prometheus: bad_data: parse error")}
    made.wait()
    assert made.message == f"waits for {query}: Prometheus: bad_data: parse error"
    made.queries = {query: QueryResult(made.now, 1.5)}
    assert letters(made.settle()) == "b:50 a:50"
    made.serve("b", 20)
    made.queries = {query: QueryResult(made.now, 2.5)}
    assert letters(made.settle()) == "a"
    assert made.measures[0].value == 2.5


def test_a_shadow_gets_no_answers_to_clients_and_is_promoted(cluster: Build) -> None:
    steps = [{"weight": 20, "pauseSeconds": 60}]
    made = cluster(pods=2, copies=2, rollout={**CANARY, "strategy": "Shadow", "steps": steps})
    assert letters(made.settle()) == "b:0+20 a:100"
    made.serve("b", 100)
    made.wait()
    assert letters(made.status) == "b:0+20 a:100", "answers to clients are not those of the shadow"
    assert made.status.rollout.comparison is None
    made.comparisons = [
        Comparison(start="aa", answers=10, served_tokens=400, shadow_tokens=300, shadow_refusals=1, dropped=2),
        Comparison(
            start="bb",
            answers=10,
            served_tokens=200,
            shadow_tokens=200,
            failures=1,
            logprob_answers=4,
            served_logprob=-2.0,
            shadow_logprob=-1.0,
        ),
    ]
    made.serve("b", 10, shadow=True)
    found = made.settle().rollout.comparison
    assert (found.answers, found.failures, found.dropped) == (20, 1, 2)
    assert (found.shadow_tokens, found.served_tokens) == (25, 30)
    assert (found.shadow_refusals, found.served_refusals) == (0.05, 0)
    assert (found.shadow_logprob, found.served_logprob) == (-0.25, -0.5)
    made.comparisons[0] = Comparison(start="aa", answers=11)
    before = made.status
    assert without_measures(made.reconcile()) == without_measures(before), "a new figure alone is not urgent"
    made.serve("b", 30, shadow=True)
    assert letters(made.settle()) == "b"
    assert made.status.rollout.comparison.answers == 21


def test_a_comparison_before_the_first_answer_has_no_means() -> None:
    found = compare([Comparison(start="aa", dropped=3)])
    assert found == ShadowComparison(dropped=3)
    assert compare([]) is None


def test_a_rollout_needs_room_for_both_revisions(cluster: Build) -> None:
    made = cluster(pods=4, copies=4)
    assert copies_of_rollouts([made.adapter()]) == {}
    made.settle()
    assert copies_of_rollouts([made.adapter()]) == {name_of("b"): 1}


def test_without_requests_a_rollout_waits_idle_for_the_next_one(cluster: Build) -> None:
    made = cluster()
    made.settle()
    made.copies = 0
    made.wait()
    made.wait()
    assert letters(made.status) == "b:10 a:90"
    assert condition(made.status, "Ready") == "True ScaledToZero"
    assert made.engines[0].held == {}
    assert copies_of_rollouts([made.adapter()]) == {}
    made.copies = 1
    made.settle()
    made.serve("b", 20)
    assert letters(made.wait()) == "b:50 a:50"


def test_a_newer_digest_replaces_the_canary(cluster: Build) -> None:
    made = cluster()
    made.settle()
    made.source = artifact("c")
    assert letters(made.reconcile()) == "c:0 a:100"
    assert letters(made.settle()) == "c:10 a:90"
    assert made.status.rejected_digests == []


def test_a_source_that_disappears_changes_nothing(cluster: Build) -> None:
    made = cluster()
    made.settle()
    made.source = Unresolved(Reason.FINE_TUNE_JOB_NOT_FOUND, "waits")
    made.serve("b", 20)
    assert letters(made.wait()) == "b:50 a:50"
    made.serve("b", 20)
    assert letters(made.wait()) == "b"
    assert letters(made.wait()) == "b"


def test_a_changed_spec_begins_the_rollout_again(cluster: Build) -> None:
    made = cluster()
    made.settle()
    made.serve("b", 20)
    assert letters(made.wait()) == "b:50 a:50"
    made.spec["rollout"] = {**CANARY, "minRequests": 30}
    assert letters(made.reconcile()) == "b:10 a:90"
    made.spec["rollout"] = {"strategy": "Immediate"}
    assert letters(made.settle()) == "b"
    assert made.phase == "Complete"


def test_a_stable_revision_that_is_lost_does_not_hold_up_the_new_one(cluster: Build) -> None:
    made = cluster()
    made.settle()
    made.damaged = {name_of("a")}
    assert letters(made.settle()) == "b"
    assert made.phase == "Complete"


def test_pause_and_resume(cluster: Build) -> None:
    made = cluster()
    made.settle()
    made.annotation = "pause"
    made.serve("b", 20)
    assert letters(made.wait()) == "b:10 a:90"
    assert condition(made.status, "Progressing") == "True RolloutPaused"
    assert made.status.rollout_command.message == "the rollout is paused; a failed check still rolls it back"
    made.annotation = "resume"
    assert letters(made.settle()) == "b:50 a:50"


def test_promote_skips_steps_and_checks_but_not_the_pods(cluster: Build) -> None:
    made = cluster(pods=3, copies=3)
    made.settle()
    made.serve("b", 100, errors=100)
    made.annotation = "promote"
    assert letters(made.reconcile()) == "b:10 a:90"
    assert made.phase == "Promoting"
    assert letters(made.settle()) == "b"
    assert made.status.revisions[0].ready_replicas == 3
    made.source = artifact("c")
    assert letters(made.settle()) == "c:10 a:90".replace("a", "b"), "the annotation was handled"
    made.annotation = "promote again"
    assert letters(made.settle()) == "c"


def test_abort(cluster: Build) -> None:
    made = cluster()
    made.settle()
    made.annotation = "abort"
    assert letters(made.settle()) == "a"
    assert (made.phase, made.status.rejected_digests) == ("Aborted", [DIGESTS["b"]])
    assert condition(made.status, "Progressing") == "False RolloutAborted"
    made.annotation = "abort 2"
    assert letters(made.settle()) == "a"
    assert made.status.rollout_command.message == "abort has no effect: there is no previous revision"


@pytest.mark.parametrize("rollout", [CANARY, None])
def test_undo_brings_the_previous_revision_back_and_forth(rollout: dict[str, Any] | None, cluster: Build) -> None:
    made = cluster(rollout=rollout)
    made.settle()
    if rollout is not None:
        made.annotation = "promote"
    assert letters(made.settle()) == "b"
    made.annotation = "undo"
    assert letters(made.reconcile()) == "a b", "the newer one serves until the older one is resident"
    assert letters(made.settle()) == "a"
    assert (made.phase, made.status.rejected_digests) == ("Undone", [DIGESTS["b"]])
    assert condition(made.status, "Stalled") == "True RolloutAborted"
    made.annotation = "undo once more"
    made.settle()
    assert letters(made.status) == "b"
    assert made.status.rejected_digests == [DIGESTS["a"]]
    assert condition(made.status, "Stalled") == ""


def test_an_unknown_command_is_reported(cluster: Build) -> None:
    made = cluster()
    made.settle()
    before = made.status
    made.annotation = "roll-back\n"
    made.reconcile()
    assert made.status.rollout_command.message.endswith("is not a command: use pause, resume, promote, abort, undo")
    (event,) = rollout_events(before, made.status)
    assert event.reason == "RolloutCommand"


def test_a_removed_annotation_can_be_set_again(cluster: Build) -> None:
    made = cluster()
    made.settle()
    for source in "bcd":
        made.source = artifact(source)
        made.annotation = None
        assert letters(made.settle()).startswith(f"{source}:10")
        made.annotation = "promote"
        assert letters(made.settle()) == source


def test_every_step_is_an_event(cluster: Build) -> None:
    made, messages = cluster(), []
    for _ in range(12):
        before = made.status
        messages += [event.message for event in rollout_events(before, made.reconcile())]
        if made.status.rollout.step:
            made.serve("b", 10)
        made.now += timedelta(seconds=31)
        if letters(made.status) == "b":
            break
    assert messages == [
        "rollout of revision bbbbbbbbbbbb began: revision bbbbbbbbbbbb is resident on 0 of 1 pods",
        "step 1 of 2: revision bbbbbbbbbbbb answers 10 % of the requests",
        "step 2 of 2: revision bbbbbbbbbbbb answers 50 % of the requests",
        "revision bbbbbbbbbbbb answers all requests",
    ]


def test_figures_alone_are_no_other_status(cluster: Build) -> None:
    made = cluster()
    before = made.settle()
    made.serve("b", 3)
    after = made.reconcile()
    assert before != after
    assert without_measures(before) == without_measures(after)
    made.serve("b", 30)
    made.wait()
    assert without_measures(after) != without_measures(made.status)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"strategy": "Immediate"}, "has no steps, no analysis and no minRequests"),
        ({"steps": [{"weight": 50}, {"weight": 10}]}, "order the steps by weight"),
        ({"analysis": [{"measure": "ErrorRate"}]}, "has no max"),
        ({"analysis": [{"measure": "ErrorRate", "max": 5}]}, "write 0.05 for 5 %"),
        ({"analysis": [{"measure": "Query", "max": 5}]}, "query is required"),
        ({"analysis": [{"measure": "ErrorRate", "max": 0, "query": "up"}]}, "query is required"),
    ],
)
def test_impossible_rules_are_refused(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(ValidationError, match=error):
        AdapterRollout.model_validate({**CANARY, **changes})


RULES: list[dict[str, Any] | None] = [
    CANARY,
    {**CANARY, "strategy": "Shadow"},
    {**CANARY, "analysis": None, "steps": [{"weight": 1, "pauseSeconds": 5}, {"weight": 100, "pauseSeconds": 5}]},
    {"strategy": "Immediate"},
    None,
]


def _disturb(made: Cluster, chance: random.Random, number: int) -> None:
    """Let something happen: mostly requests, a few of which fail."""
    event = chance.random()
    if event < 0.05:
        made.source = chance.choice([artifact(chance.choice("bcdef")), made.source])
    elif event < 0.10:
        engine = chance.choice(made.engines)
        engine.reports = not engine.reports
    elif event < 0.15:
        chance.choice(made.engines).restart()
    elif event < 0.19:
        made.annotation = f"{chance.choice(['pause', 'resume', 'abort', 'resume'])} {number}"
    elif event < 0.7:
        _serve_all(made, lambda: 5 if chance.random() < 0.05 else 0)


def _serve_all(made: Cluster, errors: Callable[[], int] = lambda: 0) -> None:
    for revision in made.status.revisions:
        for engine in made.engines:
            if revision.engine_name in engine.held:
                for shadow in (False, True):
                    engine.counters(revision.engine_name[-1]).add(10, errors=errors(), shadow=shadow)


@pytest.mark.parametrize("seed", range(60))
def test_promises_hold_in_random_runs(seed: int, adapter: Build, pool: Build) -> None:
    """Weights add up to 100, nothing is promoted twice or on missing data, and a rejected digest stays rejected."""
    chance = random.Random(seed)  # noqa: S311
    rule = RULES[seed % 3]
    made = Cluster(adapter, pool, pods=chance.randint(1, 3), copies=chance.randint(1, 3), rollout=rule)
    made.settle()
    promoted: list[str] = []
    rejected: set[str] = set()
    for number in range(150):
        made.now += timedelta(seconds=chance.choice([0, 1, 30, 61]))
        _disturb(made, chance, number)
        before, old = made.status, letters(made.status)
        status = made.reconcile()
        weights = [item.weight for item in status.revisions]
        assert weights in ([None], [None, None]) or sum(weights) == 100, (old, letters(status))
        rollout = status.rollout
        if rollout is not None and rollout.phase is RolloutPhase.COMPLETE and before.rollout != rollout:
            assert before.rollout is not None
            assert before.rollout.digest == rollout.digest
            assert before.rollout.is_running, "it was promoted twice"
            checked = [(found.passed, found.value) for found in rollout.measures]
            assert all(passed and value is not None for passed, value in checked), checked
            assert not rule or not rule["analysis"] or rollout.traffic.requests >= 20
            promoted.append(rollout.digest)
        assert not rejected & {status.revisions[0].digest}, "a rejected digest is tried again"
        rejected = set(status.rejected_digests)
        assert status.revisions, "something always serves"
    # From wherever it is, it comes to an end.
    made.annotation = "resume at the end"
    for engine in made.engines:
        engine.reports = True
    for _ in range(60):
        made.now += timedelta(seconds=61)
        _serve_all(made)
        _serve_all(made)
        made.reconcile()
    assert len(made.status.revisions) == 1
    assert made.status.rollout is None or not made.status.rollout.is_running
    wanted = made.source.digest if isinstance(made.source, Artifact) else ""
    assert made.status.revisions[0].digest == wanted or wanted in made.status.rejected_digests


def test_a_status_never_grows_without_bound(cluster: Build) -> None:
    made = cluster(pods=100, copies=100)
    made.settle()
    for engine in made.engines:
        engine.counters("b").add(1)
    made.settle()
    assert len(made.status.rollout.pods) == 64
    letters_of = "bcdef"
    for number in range(40):
        made.source = replace(artifact(letters_of[number % 5]), digest=f"sha256:{number:064x}")
        made.settle()
        made.annotation = f"abort {number}"
        made.settle()
    assert len(made.status.rejected_digests) == 16
