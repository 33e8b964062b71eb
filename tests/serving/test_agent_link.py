from __future__ import annotations

import pytest

from tunesmith.contracts.agent import SILENCE_SECONDS, DesiredAdapter, PodState, Residency, ResidencyState
from tunesmith.controller.serving_streams import AgentLink, Target

LIST = (DesiredAdapter(engine_name="team/a@1", digest="sha256:1", uri="s3://x"),)


@pytest.fixture
def link() -> AgentLink:
    return AgentLink(Target("pod team/p", "10.0.0.1", ("secret-token",), ("secret-token",)))


def test_nothing_is_told_before_it_was_decided(link: AgentLink) -> None:
    link.take(PodState(), 0.0)
    assert not link.behind


def test_a_list_is_told_until_it_was_taken(link: AgentLink) -> None:
    link.tell(LIST)
    assert link.behind
    assert link.wake.is_set()
    link.told(LIST, (1, 5), 10.0)
    assert not link.behind
    link.tell(())
    assert link.behind


def test_an_agent_that_forgot_is_told_again(link: AgentLink) -> None:
    link.tell(LIST)
    link.told(LIST, (1, 5), 10.0)
    link.take(PodState(epoch=1, sequence=4), 10.1)
    assert not link.behind, "a line that was under way"
    link.take(PodState(epoch=1, sequence=4), 10.1 + SILENCE_SECONDS)
    assert link.behind
    link.take(PodState(epoch=1, sequence=5), 10.2 + SILENCE_SECONDS)
    assert not link.behind


def test_silence_makes_it_unknown(link: AgentLink) -> None:
    assert not link.heard(0.0)
    link.take(PodState(), 1.0)
    assert link.heard(1.0 + SILENCE_SECONDS)
    assert not link.heard(1.1 + SILENCE_SECONDS)


def test_load_is_no_news_and_residency_is(link: AgentLink) -> None:
    assert link.take(PodState(in_flight={"m": 1}), 0.0)
    assert not link.take(PodState(in_flight={"m": 2}, epoch=3, sequence=9), 0.5)
    resident = Residency(engine_name="team/a@1", digest="sha256:1", state=ResidencyState.RESIDENT)
    assert link.take(PodState(adapters=[resident]), 1.0)
    assert link.take(PodState(adapters=[resident]), 1.1 + SILENCE_SECONDS), "it was unknown meanwhile"


def test_a_line_clears_the_error(link: AgentLink) -> None:
    link.error = "connection timed out"
    link.take(PodState(), 1.0)
    assert link.error == ""


def test_the_token_is_not_printed() -> None:
    target = Target("pod team/p", "10.0.0.1", ("secret-token",), ("secret-token",))
    assert "secret-token" not in repr(target)
    assert "secret-token" not in str(target)


def test_addresses_of_both_families() -> None:
    assert Target("p", "10.0.0.1", "t").url(9000, "/v1/events") == "http://10.0.0.1:9000/v1/events"
    assert Target("p", "fd00::1", "t").url(9000, "/v1/events") == "http://[fd00::1]:9000/v1/events"
