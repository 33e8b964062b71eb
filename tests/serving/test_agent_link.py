from __future__ import annotations

import time

import pytest

from tunesmith.contracts.agent import (
    MAX_EPOCH_LEAD,
    STALE_AFTER_SECONDS,
    DesiredAdapter,
    PodState,
    Residency,
    ResidencyState,
    list_digest,
)
from tunesmith.contracts.network import component_labels
from tunesmith.controller.election import EPOCH, next_epoch
from tunesmith.controller.serving.agents import AgentLink, Target
from tunesmith.streams import Tokens

DIGEST = "sha256:" + "1" * 64
LIST = (DesiredAdapter(engine_name="team/a@111111111111", digest=DIGEST, uri="s3://x"),)
NOW = 1_800_000_000


def tokens(*values: str) -> Tokens:
    return Tokens(lambda: (b"key",), lambda _: values or ("secret-token",))


@pytest.fixture
def link() -> AgentLink:
    return AgentLink(Target("pod team/p", "10.0.0.1", tokens(), tokens()))


def reported(epoch: int, sequence: int, adapters: tuple[DesiredAdapter, ...] = LIST) -> PodState:
    return PodState(epoch=epoch, sequence=sequence, list_digest=list_digest(adapters))


def test_nothing_is_sent_before_the_list_is_known(link: AgentLink) -> None:
    link.record_state(PodState(), 0.0)
    assert not link.needs_push


def test_a_list_is_sent_until_it_is_accepted(link: AgentLink) -> None:
    link.set_desired(LIST)
    assert link.needs_push
    assert link.wake.is_set()
    link.record_sent(LIST, (1, 5), 10.0)
    assert not link.needs_push
    link.set_desired(())
    assert link.needs_push


def test_an_agent_that_lost_its_list_gets_it_again(link: AgentLink) -> None:
    link.set_desired(LIST)
    link.record_sent(LIST, (1, 5), 10.0)
    link.record_state(PodState(epoch=1, sequence=4), 10.1)
    assert not link.needs_push, "a line that was in flight"
    link.record_state(PodState(epoch=1, sequence=4), 10.1 + STALE_AFTER_SECONDS)
    assert link.needs_push
    link.record_state(reported(1, 5), 10.2 + STALE_AFTER_SECONDS)
    assert not link.needs_push


@pytest.mark.parametrize(
    "state",
    [reported(1, 4), reported(1, 6), reported(9, 5), reported(1, 5, ()), PodState(epoch=1, sequence=5)],
    ids=["older", "newer", "a later epoch", "another list of this number", "no list"],
)
def test_after_the_list_was_reported_any_other_list_triggers_a_push(link: AgentLink, state: PodState) -> None:
    link.set_desired(LIST)
    link.record_sent(LIST, (1, 5), 10.0)
    link.record_state(reported(1, 5), 10.1)
    assert not link.needs_push
    link.wake.clear()
    link.record_state(state, 10.2)
    assert link.needs_push
    assert link.wake.is_set()


def test_a_leader_outbids_what_an_agent_reports(link: AgentLink) -> None:
    assert link.number(7, 1) == (7, 1), "nothing is known yet"
    link.record_state(reported(3, 900), 0.0)
    assert link.number(7, 1) == (7, 1)
    link.record_state(reported(7, 900), 0.0)
    assert link.number(7, 899) == (8, 899)
    assert link.number(7, 900) == (8, 900), "another list may have this number"
    assert link.number(7, 901) == (7, 901)
    link.record_state(reported(500, 2**53), 0.0)
    assert link.number(7, 901) == (501, 901)


def test_outbidding_an_agent_does_not_affect_others(link: AgentLink) -> None:
    other = AgentLink(Target("pod team/q", "10.0.0.2", tokens(), tokens()))
    link.record_state(reported(2**53 - 1, 1), 0.0)
    assert other.number(7, 1) == (7, 1)


def test_a_silent_agent_is_not_reporting(link: AgentLink) -> None:
    assert not link.is_reporting(0.0)
    link.record_state(PodState(), 1.0)
    assert link.is_reporting(1.0 + STALE_AFTER_SECONDS)
    assert not link.is_reporting(1.1 + STALE_AFTER_SECONDS)


def test_residency_affects_placement_and_heartbeats_do_not(link: AgentLink) -> None:
    assert link.record_state(PodState(), 0.0)
    assert not link.record_state(PodState(epoch=3, sequence=9), 0.5)
    resident = Residency(engine_name="team/a@1", digest=DIGEST, state=ResidencyState.RESIDENT)
    assert link.record_state(PodState(adapters=[resident]), 1.0)
    assert link.record_state(PodState(adapters=[resident], problem="the canary failed"), 1.1)
    assert link.record_state(PodState(adapters=[resident]), 1.2 + STALE_AFTER_SECONDS), "it was unknown meanwhile"


def test_the_token_is_not_printed() -> None:
    target = Target("pod team/p", "10.0.0.1", tokens(), tokens())
    for text in (repr(target), str(target), repr(target.stream(9000, "/v1/events"))):
        assert "secret-token" not in text


def test_addresses_of_both_families() -> None:
    assert Target("p", "10.0.0.1", tokens()).url(9000, "/v1/events") == "http://10.0.0.1:9000/v1/events"
    assert Target("p", "fd00::1", tokens()).url(9000, "/v1/events") == "http://[fd00::1]:9000/v1/events"


def test_the_other_token_is_tried_once_per_refusal() -> None:
    keys = [(b"new", b"old")]
    both = Tokens(lambda: keys[0], lambda given: tuple(key.decode() for key in given))
    assert both.current == "new"
    assert both.refused("new"), "there is another token"
    assert both.current == "old"
    assert both.refused("new"), "another request was refused before"
    assert both.current == "old"
    assert not both.refused("old"), "no other token exists"
    keys[0] = (b"newest", b"new")
    assert both.current == "newest"
    assert not tokens("only").refused("only")


def test_gateways_of_another_chart_or_release_are_not_followed() -> None:
    ours = component_labels("tunesmith", "gateway")
    assert ours != component_labels("another-release", "gateway")
    for foreign in ("loki", "kong"):
        assert not ours.items() <= {**ours, "app.kubernetes.io/name": foreign}.items()


@pytest.mark.parametrize(
    ("annotations", "epoch"),
    [
        ({}, NOW),
        ({EPOCH: "7"}, NOW),
        ({EPOCH: str(NOW)}, NOW + 1),
        ({EPOCH: str(NOW + 50)}, NOW + 51),
        ({EPOCH: str(2**62)}, NOW),
        ({EPOCH: "9" * 5000}, NOW),
        ({EPOCH: "-1"}, NOW),
        ({EPOCH: "x"}, NOW),
    ],
)
def test_an_epoch_follows_the_lease_and_the_clock(annotations: dict[str, str], epoch: int) -> None:
    assert next_epoch(annotations, NOW + 0.9) == epoch


def test_a_deleted_lease_is_followed_by_a_higher_epoch_that_agents_accept() -> None:
    before = next_epoch({EPOCH: str(int(time.time()) - 5)}, time.time() - 2)
    after = next_epoch({}, time.time())
    assert before < after <= time.time() + MAX_EPOCH_LEAD
