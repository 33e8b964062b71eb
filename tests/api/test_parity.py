"""Comparison of an engine's answers with the expected ones, and the limits of untrusted parity files."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tunesmith.api.parity import ParityMode, ParityVerdict
from tunesmith.contracts.agent import DesiredAdapter, list_digest
from tunesmith.contracts.parity import (
    MAX_ANSWER_TOKENS,
    MAX_PARITY_BYTES,
    MAX_PROBES,
    MAX_PROMPT_CHARACTERS,
    MAX_PROMPT_TOKENS,
    Measured,
    ParityPosition,
    ServedPosition,
    TokenLogProbability,
    difference,
    judge,
    matching,
    nats,
    parse_parity,
    served_positions,
    tolerance,
)


def expected(chosen: float, **others: float) -> ParityPosition:
    top = [TokenLogProbability(token_id=int(token[1:]), log_probability=value) for token, value in others.items()]
    return ParityPosition(chosen=chosen, top=[TokenLogProbability(token_id=1, log_probability=chosen), *top])


@pytest.mark.parametrize(
    ("position", "served", "distance"),
    [
        pytest.param(expected(-0.5), ServedPosition(1, {1: -0.75}), 0.25, id="same token"),
        pytest.param(expected(-0.7, t2=-0.71), ServedPosition(2, {2: -0.7, 1: -0.71}), 0.01, id="as likely"),
        pytest.param(
            expected(-0.5, t3=-4.0), ServedPosition(2, {2: -0.1, 5: -3.0}), 3.9, id="likely token was unlikely"
        ),
        pytest.param(expected(-0.5), ServedPosition(2, {2: -0.1, 5: -3.0}), 2.5, id="expected token is unlikely"),
        pytest.param(expected(-0.5), ServedPosition(2, {2: math.nan}), math.inf, id="not a number"),
        pytest.param(expected(-0.5), ServedPosition(2, {}), math.inf, id="nothing"),
    ],
)
def test_the_distance_is_never_more_than_what_differs(
    position: ParityPosition, served: ServedPosition, distance: float
) -> None:
    assert difference(1, position, served) == pytest.approx(distance)


def test_positions_are_comparable_up_to_the_first_other_token() -> None:
    served = [ServedPosition(token, {token: 0.0}) for token in (1, 2, 9, 4)]
    assert matching([1, 2, 3, 4], served) == 3
    assert matching([1, 2], served) == 2
    assert matching([1, 2, 9, 4, 5], served) == 4
    assert matching([1], []) == 0


SOUND = Measured(adapter=0.001, adapter_from_base=2.0, base=0.001, template=True)


@pytest.mark.parametrize(
    ("changes", "gap", "verdict"),
    [
        ({}, 2.0, ParityVerdict.PASSED),
        ({"base": None, "template": None}, 2.0, ParityVerdict.PASSED),
        ({"adapter": 0.02}, 2.0, ParityVerdict.FAILED),
        ({"base": 0.02}, 2.0, ParityVerdict.FAILED),
        ({"template": False}, 2.0, ParityVerdict.FAILED),
        ({"refusal": "unknown token"}, 2.0, ParityVerdict.FAILED),
        ({}, 0.03, ParityVerdict.UNDECIDED),
        ({"adapter": 0.02}, 0.03, ParityVerdict.FAILED),
        ({"adapter": None}, 2.0, ParityVerdict.UNFINISHED),
        ({"adapter": math.inf}, 2.0, ParityVerdict.FAILED),
    ],
)
def test_the_verdict_follows_from_the_distances(changes: dict[str, Any], gap: float, verdict: ParityVerdict) -> None:
    measured = Measured(**{**vars(SOUND), **changes})
    assert judge(measured, gap, 0.01).verdict is verdict


def test_the_tolerance_is_that_of_the_coarser_data_type() -> None:
    exact, coarse = tolerance("float32", "float32"), tolerance("float32", "bfloat16")
    assert exact < tolerance("float16", "float32") < coarse == tolerance("bfloat16", "bfloat16")
    assert tolerance("bfloat16", "fp8") == tolerance("float32", "") > coarse


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0.000"), (0.0000123, "1e-05"), (0.0042, "0.004"), (2.13, "2.1"), (math.inf, "inf")]
)
def test_distances_are_short(value: float, shown: str) -> None:
    assert nats(value) == shown


def test_an_answer_of_vllm_is_read() -> None:
    found = served_positions(
        {"tokens": ["token_id:5"], "token_logprobs": [-0.5], "top_logprobs": [{"token_id:5": -0.5, "token_id:6": -2}]}
    )
    assert found == [ServedPosition(5, {5: -0.5, 6: -2.0})]
    for malformed in ({}, {"tokens": ["x"], "token_logprobs": [0.0], "top_logprobs": [{}]}):
        with pytest.raises(ValueError, match=r"."):
            served_positions(malformed)


def probe(**changes: Any) -> dict[str, Any]:
    position = {"chosen": -0.1, "top": [{"tokenId": 7, "logProbability": -0.1}]}
    found = {
        "promptTokenIds": [1, 2],
        "answerTokenIds": [7],
        "base": [position],
        "adapter": [position],
        "baseAnswer": {"tokenIds": [7], "positions": [position]},
    }
    return {**found, **changes}


def document(*probes: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps({"schemaVersion": 1, "dataType": "float32", "probes": probes, **changes}).encode()


LONG = [{"chosen": -0.1, "top": []}] * (MAX_ANSWER_TOKENS + 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (document(*[probe()] * (MAX_PROBES + 1)), "more than 8"),
        (document(probe(promptTokenIds=[1] * (MAX_PROMPT_TOKENS + 1))), "the prompt of probe 0"),
        (document(probe(answerTokenIds=[1] * len(LONG), base=LONG, adapter=LONG)), "an answer of probe 0"),
        (document(probe(answerTokenIds=[1, 2])), "2 tokens and 1 positions"),
        (document(probe(prompt="x" * (MAX_PROMPT_CHARACTERS + 1))), "prompt"),
        (document(probe(promptTokenIds=[-1])), "token id"),
        (document(probe(promptTokenIds=[2**31])), "token id"),
        (document(probe(promptTokenIds=[])), "promptTokenIds"),
        (document(probe(base=[{"chosen": -0.1, "top": [{"tokenId": 1, "logProbability": "x"}]}])), "logProbability"),
        (document(probe()).replace(b"-0.1", b"NaN"), "NaN is not a JSON number"),
        (document(probe()).replace(b"-0.1", b"1e999"), "too large"),
        (document(dataType="x" * 100), "dataType"),
        (document(schemaVersion=2), "schemaVersion"),
        (b"[]", "not a JSON object"),
        (b" " * (MAX_PARITY_BYTES + 1), "more than"),
        (b"{" + b'"a":[' * 70_000, "values"),
    ],
)
def test_a_file_beyond_the_limits_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        parse_parity(content, "parity.json")
    assert str(refused.value).startswith("parity.json is malformed: ")


def test_files_of_earlier_releases_are_read() -> None:
    old = probe(prompt="Hello")
    del old["baseAnswer"]
    found = parse_parity(document(old), "parity.json")
    assert found.probes[0].base_answer is None
    assert found.gap == 0.0


def test_agents_of_earlier_releases_agree_on_the_digest_of_a_list() -> None:
    """They ignore the field."""
    reported, off = (
        DesiredAdapter(engine_name="team/a@a", digest=f"sha256:{'a' * 64}", uri="s3://s/a", parity=mode)
        for mode in (ParityMode.REPORT, ParityMode.OFF)
    )
    plain = DesiredAdapter(engine_name="team/a@a", digest=f"sha256:{'a' * 64}", uri="s3://s/a")
    assert list_digest([reported]) == list_digest([plain]) != list_digest([off])
