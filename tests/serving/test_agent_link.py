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


def held(epoch: int, sequence: int, adapters: tuple[DesiredAdapter, ...] = LIST) -> PodState:
    return PodState(epoch=epoch, sequence=sequence, list_digest=list_digest(adapters))


def test_nothing_is_sent_before_it_was_decided(link: AgentLink) -> None:
    link.take(PodState(), 0.0)
    assert not link.behind


def test_a_list_is_sent_until_it_is_accepted(link: AgentLink) -> None:
    link.tell(LIST)
    assert link.behind
    assert link.wake.is_set()
    link.sent(LIST, (1, 5), 10.0)
    assert not link.behind
    link.tell(())
    assert link.behind


def test_an_agent_that_forgot_its_list_gets_it_again(link: AgentLink) -> None:
    link.tell(LIST)
    link.sent(LIST, (1, 5), 10.0)
    link.take(PodState(epoch=1, sequence=4), 10.1)
    assert not link.behind, "a line that was under way"
    link.take(PodState(epoch=1, sequence=4), 10.1 + STALE_AFTER_SECONDS)
    assert link.behind
    link.take(held(1, 5), 10.2 + STALE_AFTER_SECONDS)
    assert not link.behind


@pytest.mark.parametrize(
    "state",
    [held(1, 4), held(1, 6), held(9, 5), held(1, 5, ()), PodState(epoch=1, sequence=5)],
    ids=["older", "newer", "a later epoch", "another list of this number", "no list"],
)
def test_once_it_was_reported_any_other_list_is_noticed_at_once(link: AgentLink, state: PodState) -> None:
    link.tell(LIST)
    link.sent(LIST, (1, 5), 10.0)
    link.take(held(1, 5), 10.1)
    assert not link.behind
    link.wake.clear()
    link.take(state, 10.2)
    assert link.behind
    assert link.wake.is_set()


def test_a_leader_outbids_what_an_agent_reports(link: AgentLink) -> None:
    assert link.number(7, 1) == (7, 1), "nothing is known yet"
    link.take(held(3, 900), 0.0)
    assert link.number(7, 1) == (7, 1)
    link.take(held(7, 900), 0.0)
    assert link.number(7, 899) == (8, 899)
    assert link.number(7, 900) == (8, 900), "another list may have this number"
    assert link.number(7, 901) == (7, 901)
    link.take(held(500, 2**53), 0.0)
    assert link.number(7, 901) == (501, 901)


def test_one_agent_that_is_outbid_leaves_the_others_alone(link: AgentLink) -> None:
    other = AgentLink(Target("pod team/q", "10.0.0.2", tokens(), tokens()))
    link.take(held(2**53 - 1, 1), 0.0)
    assert other.number(7, 1) == (7, 1)


def test_silence_makes_it_unknown(link: AgentLink) -> None:
    assert not link.heard(0.0)
    link.take(PodState(), 1.0)
    assert link.heard(1.0 + STALE_AFTER_SECONDS)
    assert not link.heard(1.1 + STALE_AFTER_SECONDS)


def test_a_heartbeat_is_no_news_and_residency_is(link: AgentLink) -> None:
    assert link.take(PodState(), 0.0)
    assert not link.take(PodState(epoch=3, sequence=9), 0.5)
    resident = Residency(engine_name="team/a@1", digest=DIGEST, state=ResidencyState.RESIDENT)
    assert link.take(PodState(adapters=[resident]), 1.0)
    assert link.take(PodState(adapters=[resident], problem="the canary failed"), 1.1)
    assert link.take(PodState(adapters=[resident]), 1.2 + STALE_AFTER_SECONDS), "it was unknown meanwhile"


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
    assert both.refused("new"), "there is another one"
    assert both.current == "old"
    assert both.refused("new"), "another request has found that out already"
    assert both.current == "old"
    assert not both.refused("old"), "none is left"
    keys[0] = (b"newest", b"new")
    assert both.current == "newest"
    assert not tokens("only").refused("only")


def test_gateways_of_another_chart_or_release_are_not_ours() -> None:
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
