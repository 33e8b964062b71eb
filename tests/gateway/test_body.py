from __future__ import annotations

import json
from typing import Any

import pytest

from tunesmith.gateway import body as bodies
from tunesmith.gateway.apis import COMPLETIONS
from tunesmith.gateway.body import MAX_CONTAINERS, MAX_DEPTH, MAX_STRINGS, MAX_VALUES, parse, socket_pieces
from tunesmith.gateway.errors import ApiError


def forwarded(data: bytes, model: str = "team/pirate@1", salt: str = "salt") -> bytes:
    return b"".join(bytes(piece) for piece in socket_pieces(parse(data, 128, COMPLETIONS).pieces(model, salt)))


def refused(data: bytes) -> tuple[str | None, str]:
    with pytest.raises(ApiError) as caught:
        parse(data, 128, COMPLETIONS)
    assert caught.value.status == 400
    return caught.value.code, caught.value.message


def test_model_and_salt_are_replaced_and_other_members_keep_their_bytes() -> None:
    data = b' { "a" : [1, 2.50 ,"\\u00e9"], "model":"pirate","cache_salt": "mine", "messages":  {"x" :1e3}}\n'
    assert forwarded(data) == (
        b'{"model":"team/pirate@1","cache_salt":"salt","a":[1, 2.50 ,"\\u00e9"],"messages":{"x" :1e3}}'
    )


@pytest.mark.parametrize(
    "data",
    [
        b'{"model":"one","model":"two"}',
        b'{"model":"one","mod\\u0065l":"two"}',
        b'{"cache_salt":"a","cache\\u005fsalt":"b","model":"one","\\u006dodel":"two"}',
    ],
)
def test_a_duplicate_member_is_sent_once_as_the_gateway_read_it(data: bytes) -> None:
    assert parse(data, 128, COMPLETIONS).model == "two"
    assert forwarded(data) == b'{"model":"team/pirate@1","cache_salt":"salt"}'


def test_a_large_body_is_sent_in_pieces_without_a_copy_of_it() -> None:
    text = b'"' + b"x" * 1_000_000 + b'"'
    data = bytearray(b'{"model":"pirate","messages":' + text + b',"n":1}')
    pieces = list(socket_pieces(parse(data, 128, COMPLETIONS).pieces("m", "s")))
    assert b"".join(bytes(piece) for piece in pieces) == (
        b'{"model":"m","cache_salt":"s","messages":' + text + b',"n":1}'
    )
    assert max(len(piece) for piece in pieces) <= 64 * 1024
    assert sum(len(piece) for piece in pieces if isinstance(piece, memoryview)) == len(text)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"{",
        b"pirate",
        b'{"model":"a",}',
        b'{"model":"a"} x',
        b'{"model":"\xff"}',
        b'{"model":"a","x":"\xff"}',
        b'{"model":"a","x":"\xed\xa0\x80"}',
        b'{"model":"\\ud800"}',
        b'{"model":"a","x":"\\ud800"}',
        b'{"model":"a","x":NaN}',
        b'{"model":"a","x":"\x01"}',
        b"\xef\xbb\xbf{}",
        b'["pirate"]',
        b'"pirate"',
        b"null",
    ],
)
def test_a_body_that_is_not_a_json_object_is_refused(data: bytes) -> None:
    assert refused(data)[0] == "invalid_json"


def test_depth_is_bounded() -> None:
    deepest = b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1)
    assert parse(b'{"model":"a","x":' + deepest + b"}", 128, COMPLETIONS).model == "a"
    for depth in (MAX_DEPTH, 300, 200_000):
        code, message = refused(b'{"model":"a","x":' + b"[" * depth + b"]" * depth + b"}")
        assert code == "body_too_complex"
        assert "nested" in message or "arrays" in message


@pytest.mark.parametrize("unit", [b"[],", b"{},", b'{"a":1},'])
def test_arrays_and_objects_are_bounded(unit: bytes) -> None:
    assert parse(b'{"model":"a","x":[' + unit * (MAX_CONTAINERS - 2) + b"0]}", 128, COMPLETIONS)
    assert refused(b'{"model":"a","x":[' + unit * MAX_CONTAINERS + b"0]}")[0] == "body_too_complex"


@pytest.mark.parametrize(
    ("unit", "limit"), [(b"1,", MAX_VALUES), (b'"",', MAX_STRINGS), (b'"[",', MAX_STRINGS), (b'"\\"",', MAX_STRINGS)]
)
def test_values_are_bounded(unit: bytes, limit: int) -> None:
    assert parse(b'{"model":"a","x":[' + unit * (limit - 3) + b"0]}", 128, COMPLETIONS)
    assert refused(b'{"model":"a","x":[' + unit * (limit + 2) + b"0]}")[0] == "body_too_complex"


def test_top_level_members_are_bounded() -> None:
    document = {"model": "a"} | {f"x{number}": number for number in range(bodies.MAX_MEMBERS)}
    assert refused(json.dumps(document).encode())[0] == "body_too_complex"


@pytest.mark.parametrize("text", ["[[[{{{,,,", '\\"[', "\\", '\\\\"[', "a\\\\", '"', "☠[,"])
def test_brackets_and_commas_in_strings_do_not_count(text: str) -> None:
    document = {"model": "a", "messages": [{"role": "user", "content": text * 20_000}] * 2, "tail": ["\\", '"']}
    data = json.dumps(document).encode()
    assert json.loads(forwarded(data)) == document | {"model": "team/pirate@1", "cache_salt": "salt"}


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("stream", 1),
        ("stream", "yes"),
        ("stream", "true"),
        ("stream", []),
        ("n", "3"),
        ("n", 3.0),
        ("n", True),
        ("n", [3]),
        ("best_of", "3"),
        ("use_beam_search", 1),
        ("model", 7),
        ("model", ["pirate"]),
        ("model", {}),
    ],
)
def test_members_that_the_gateway_reads_have_one_type(member: str, value: Any) -> None:
    code, message = refused(json.dumps({"model": "a"} | {member: value}).encode())
    assert code == "invalid_type"
    assert member in message


@pytest.mark.parametrize(
    ("fields", "sequences"),
    [
        ({}, 1),
        ({"n": None, "stream": None}, 1),
        ({"n": 0}, 1),
        ({"n": -5}, 1),
        ({"n": 4}, 4),
        ({"n": 2, "best_of": 6}, 6),
        ({"n": 4, "use_beam_search": True}, 4),
        ({"prompt": "one"}, 1),
        ({"prompt": ["one"]}, 1),
        ({"prompt": ["one", "two"]}, 2),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [-1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]], "n": 3}, 6),
        ({"prompt": []}, 1),
        ({"prompt_embeds": ["a", "b"], "prompt": ["c"]}, 3),
        ({"n": 16, "prompt": ["x"] * 8}, 128),
    ],
)
def test_sequences_are_choices_times_prompts(fields: dict[str, Any], sequences: int) -> None:
    assert parse(json.dumps({"model": "a"} | fields).encode(), 128, COMPLETIONS).sequences == sequences


@pytest.mark.parametrize(
    "fields", [{"n": 1000}, {"n": 10**30}, {"prompt": ["x"] * 129}, {"n": 2, "prompt": ["x"] * 65}]
)
def test_more_sequences_than_allowed_are_refused(fields: dict[str, Any]) -> None:
    assert refused(json.dumps({"model": "a"} | fields).encode())[0] in {"too_many_sequences", "invalid_type"}
