"""Decisions that make a run fit, and proposals if it does not, for the shape of Llama 3.1 8B."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from tunesmith_trainer.preflight.fitting import RunSettings, changes, decide, options
from tunesmith_trainer.preflight.memory import TOLERANCE, RunShape, Shape, estimate

GIB = 2**30
LLAMA_8B = Shape(4096, 32, 14336, 128256, 6_979_321_856, 2 * 128256 * 4096)
INPUTS, WIDTHS = 6 * 4096 + 14336, 2 * 4096 + 2 * (4096 + 1024) + 2 * 4096 + 3 * (4096 + 14336)
SIZES = [1, 2, 4, 8]
ROWS = 2048
"""Length of the longest row, in tokens."""


def tokens(settings: RunSettings, longest: int = ROWS) -> int:
    return settings.micro_batch_size * min(longest, settings.max_length)


def peak(settings: RunSettings, longest: int = ROWS) -> int:
    run = RunShape(
        adapter_parameters=(settings.rank or 0) * 32 * WIDTHS,
        adapted_inputs=INPUTS,
        tokens=tokens(settings, longest),
        quantized=settings.quantized,
        checkpointing=settings.checkpointing,
    )
    return estimate(LLAMA_8B, run).peak


START = RunSettings(micro_batch_size=8, checkpointing=True, quantized=False, rank=16, max_length=2048)


class Decided(NamedTuple):
    gibibytes: int
    longest: int
    micro_batch_size: int
    checkpointing: str


DECIDED = [
    Decided(640, ROWS, 8, "off"),
    Decided(80, ROWS, 2, "off"),
    Decided(48, ROWS, 1, "off"),
    Decided(32, ROWS, 2, "on"),
    Decided(25, ROWS, 1, "on"),
    Decided(80, 128, 8, "off"),
    # several short rows together use the GPU better than one: 1,024 tokens keep it busy
    Decided(28, 192, 8, "on"),
    # nothing fits: the smallest settings
    Decided(8, ROWS, 1, "on"),
]


@pytest.mark.parametrize("case", DECIDED, ids=str)
def test_micro_batch_and_checkpointing_follow_from_the_memory(case: Decided) -> None:
    def sized(settings: RunSettings) -> int:
        return peak(settings, case.longest)

    def wide(settings: RunSettings) -> int:
        return tokens(settings, case.longest)

    memory = case.gibibytes * GIB
    found = decide(START, SIZES, (False, True), peak=sized, tokens=wide, gpu_memory=memory)
    assert (found.micro_batch_size, found.checkpointing) == (case.micro_batch_size, case.checkpointing == "on")
    assert sized(found) * (1 + TOLERANCE) <= memory or case.gibibytes == 8


@pytest.mark.parametrize(
    ("gibibytes", "start", "expected"),
    [
        (40, {}, {"micro_batch_size": 4}),
        (24, {}, {"micro_batch_size": 1}),
        (32, {"micro_batch_size": 1, "checkpointing": False}, {"checkpointing": True}),
        (32, {"checkpointing": False}, {"micro_batch_size": 2, "checkpointing": True}),
        # with 4 bits the micro-batch need not be 1
        (17, {}, {"micro_batch_size": 2, "quantized": True}),
        (12, {"micro_batch_size": 1}, {"quantized": True}),
        # 16 bytes for each of 700 million parameters: the rank is reduced no further than necessary
        (16, {"micro_batch_size": 1, "rank": 512}, {"quantized": True, "rank": 128}),
        # if a rank that fits makes 4 bits unnecessary, they are not proposed
        (24, {"micro_batch_size": 1, "rank": 512}, {"rank": 64}),
        # a lower rank gains too little here
        (10, {"micro_batch_size": 1}, {"quantized": True, "max_length": 1024}),
        (4, {}, None),
    ],
)
def test_the_change_that_costs_least(gibibytes: int, start: dict[str, Any], expected: dict[str, Any] | None) -> None:
    settings = replace(START, **start)

    def fits(trial: RunSettings) -> bool:
        return peak(trial) <= gibibytes * GIB

    possible = options(settings, SIZES, checkpointing=True, sharding=False, quantization=True)
    found = changes(settings, possible, fits)
    assert found == expected
    assert not fits(settings)
    assert found is None or fits(replace(settings, **found))


def test_a_change_that_the_method_cannot_make_is_not_proposed() -> None:
    possible = options(START, SIZES, checkpointing=False, sharding=False, quantization=False)
    assert not possible["checkpointing"]
    assert not possible["sharded"]
    assert not possible["quantized"]
