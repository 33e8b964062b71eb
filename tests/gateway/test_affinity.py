"""Conversations: the turns of a chat have one identity, and reach one pod."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.gateway_rig import adapter_manifest, eventually
from tunesmith.contracts.agent import PodUse
from tunesmith.gateway.affinity import MAX_MESSAGE_BYTES, PREFIX_BYTES, conversation
from tunesmith.gateway.apis import CHAT
from tunesmith.gateway.body import parse
from tunesmith.gateway.routing import LOAD_FACTOR, PodLoad, choose

if TYPE_CHECKING:
    from tests.gateway.gateway_rig import Rig

PIRATE = "team/pirate@aaaaaaaaaaaa"
TEXT = st.text(max_size=40)
CONTENT = TEXT | st.lists(st.builds(lambda text: {"type": "text", "text": text}, TEXT), max_size=3)
MESSAGE = st.builds(lambda content, name: {"content": content, "name": name}, CONTENT, TEXT)
LATER = st.builds(
    lambda role, message: {"role": role, **message}, st.sampled_from(["assistant", "user", "tool"]), MESSAGE
)


def identity(body: dict[str, Any], salt: str = "salt", model: str = "team/pirate") -> bytes:
    return conversation(model, parse(json.dumps({"model": "m", **body}).encode(), 8, CHAT).members, salt)


@given(
    system=st.lists(st.builds(lambda message: {"role": "system", **message}, MESSAGE), max_size=2),
    first=MESSAGE,
    later=st.lists(LATER, max_size=5),
)
def test_all_turns_of_a_chat_have_one_identity(
    system: list[dict[str, Any]], first: dict[str, Any], later: list[dict[str, Any]]
) -> None:
    begin = [*system, {**first, "role": "user"}]
    turns = {identity({"messages": begin + later[:count]}) for count in range(len(later) + 1)}
    assert len(turns) == 1
    other = [*system, {**first, "role": "user", "name": "another"}]
    assert (identity({"messages": other}) in turns) is (other == begin)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param({"messages": [{"role": "user", "content": 'say "role": "user" }'}]}, id="brackets in a string"),
        pytest.param({"messages": [{"content": {"a": [{"b": 1}]}, "role": "user"}]}, id="nested"),
        pytest.param({"system": "be brief", "messages": [{"role": "user", "content": "a"}]}, id="Anthropic's system"),
        pytest.param({"instructions": "be brief", "input": [{"role": "user", "content": "a"}]}, id="Responses"),
    ],
)
def test_a_later_turn_has_the_identity_of_the_first(body: dict[str, Any]) -> None:
    name = "messages" if "messages" in body else "input"
    later = body | {name: [*body[name], {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]}
    assert identity(body) == identity(later)


def test_white_space_between_values_does_not_count() -> None:
    messages = {"messages": [{"role": "user", "content": "a b"}]}
    dense = json.dumps({"model": "m", **messages}, separators=(",", ":")).encode()
    assert conversation("team/pirate", parse(dense, 8, CHAT).members, "salt") == identity(messages)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "user", "content": "b"}]}),
        ({"system": "x", "messages": []}, {"system": "y", "messages": []}),
        ({"prompt": "a"}, {"prompt": "b"}),
        ({"prompt": [1, 2]}, {"prompt": [1, 3]}),
        ({"input": "a"}, {"input": "b"}),
    ],
)
def test_other_prompts_have_other_identities(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert identity(one) != identity(other)


def test_a_model_and_a_salt_have_their_own_conversations() -> None:
    body = {"messages": [{"role": "user", "content": "a"}]}
    assert len({identity(body), identity(body, salt="other"), identity(body, model="team/poet")}) == 3


def test_a_text_counts_by_its_beginning() -> None:
    assert identity({"prompt": "a" * PREFIX_BYTES}) == identity({"prompt": "a" * PREFIX_BYTES + " and more"})


@pytest.mark.parametrize("content", ["\\" * MAX_MESSAGE_BYTES, '"' * MAX_MESSAGE_BYTES, "[" * MAX_MESSAGE_BYTES])
def test_a_long_first_message_counts_by_its_beginning(content: str) -> None:
    """Quotes that are cut off cost time in proportion to the message, not to its square."""
    first = {"role": "user", "content": content}
    assert identity({"messages": [first]}) == identity({"messages": [first, first]})


def test_a_message_of_many_parts_counts_by_its_beginning() -> None:
    first = {"role": "user", "content": [{"type": "text", "text": str(number)} for number in range(500)]}
    assert identity({"messages": [first]}) == identity({"messages": [first, first]})


UIDS = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=8, unique=True)


@given(uids=UIDS, chat=st.binary(min_size=16, max_size=16), data=st.data())
def test_a_chat_keeps_its_pod_while_other_pods_come_and_go(uids: list[str], chat: bytes, data: st.DataObject) -> None:
    def home(pods: list[str]) -> str:
        return pods[choose([PodLoad(0, uid=uid) for uid in pods], conversation=chat)]

    before = home(uids)
    assert home(data.draw(st.permutations(uids))) == before
    kept = [uid for uid in uids if uid == before or data.draw(st.booleans())]
    assert home(kept) == before


@given(
    running=st.lists(st.integers(0, 50), min_size=1, max_size=8),
    weight=st.integers(1, 16),
    chat=st.binary(min_size=16, max_size=16),
)
def test_no_pod_gets_a_request_above_the_bound_while_another_has_room(
    running: list[int], weight: int, chat: bytes
) -> None:
    pods = [PodLoad(load, uid=str(number)) for number, load in enumerate(running)]
    chosen = pods[choose(pods, weight, chat)]
    mean = (sum(running) + weight) / len(pods)
    assert chosen.running + weight < LOAD_FACTOR * mean + 1 or chosen.running == min(running)


LOADS = st.lists(st.tuples(st.integers(0, 9), st.integers(-4, 4), st.booleans()), min_size=1, max_size=6)


@given(loads=LOADS, chat=st.binary(min_size=16, max_size=16))
def test_a_conversation_decides_only_between_pods_where_its_adapter_takes_no_scarce_slot(
    loads: list[tuple[int, int, bool]], chat: bytes
) -> None:
    pods = [
        PodLoad(running, excess, active, roomy=excess <= -2, uid=str(number))
        for number, (running, excess, active) in enumerate(loads)
    ]
    with_chat, without = pods[choose(pods, 1, chat)], pods[choose(pods, 1)]
    assert with_chat == without or with_chat.active or with_chat.roomy


def test_chats_spread_over_the_pods() -> None:
    pods = [PodLoad(0, uid=f"pod-{number}") for number in range(4)]
    chats = (identity({"messages": [{"role": "user", "content": str(number)}]}) for number in range(2000))
    counts = Counter(choose(pods, conversation=chat) for chat in chats)
    assert max(counts.values()) < 1.3 * min(counts.values())


async def test_the_turns_of_a_chat_reach_one_pod(rig: Rig) -> None:
    rig.watches.put(adapter_manifest("pirate"))
    pods = [await rig.add_pod(PIRATE) for _ in range(2)]
    for pod in pods:
        pod.use = PodUse(slots=4)
        await pod.notify()
    await eventually(lambda: all(found._slots == 4 for found in rig.gateway.backends._by_uid.values()), "slots")
    homes = []
    for chat in range(12):
        messages = [{"role": "system", "content": "Talk like a pirate."}, {"role": "user", "content": f"chat {chat}"}]
        answers = set()
        for turn in range(3):
            status, answer = await rig.chat("pirate", messages=messages)
            assert status == 200
            answers.add(answer["choices"][0]["message"]["content"])
            messages += [{"role": "assistant", "content": "Ahoy"}, {"role": "user", "content": f"turn {turn}"}]
        homes.append(answers)
    assert all(len(home) == 1 for home in homes)
    assert len(set.union(*homes)) == 2


def test_the_members_of_a_body_are_not_decoded() -> None:
    body = parse(b'{"model":"m","messages":[{"role":"user","content":"a"}]}', 8, CHAT)
    assert all(isinstance(raw, msgspec.Raw) for raw in body.members.values())
