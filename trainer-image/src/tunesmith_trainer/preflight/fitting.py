"""Choose settings with which a run fits into a GPU, and the change that costs the user least. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tunesmith_trainer.preflight.memory import TOLERANCE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Peak = Callable[["RunSettings"], int]
    Options = Mapping[str, Sequence[Any]]

BUSY_TOKENS = 1024
"""Tokens per micro-batch that keep a GPU busy: beyond this, recomputing activations costs more than it gains."""
_MIN_RANK = 8
_MIN_LENGTH = 256


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run that determine its memory and that a user can change.

    Args:
        micro_batch_size: rows per forward pass.
        checkpointing: True if activations are recomputed in the backward pass.
        quantized: True if the base is in 4 bits.
        rank: rank of the adapter; None if it has none.
        max_length: length of the longest row, in tokens.
        full: True if all weights are trained, instead of an adapter.
        sharded: True if FSDP2 shards the base's weights over the ranks.
    """

    micro_batch_size: int
    checkpointing: bool
    quantized: bool
    rank: int | None
    max_length: int
    full: bool = False
    sharded: bool = False


def decide(
    fixed: RunSettings,
    micro_batch_sizes: Sequence[int],
    checkpointing: Sequence[bool],
    *,
    peak: Peak,
    tokens: Callable[[RunSettings], int],
    gpu_memory: int,
) -> RunSettings:
    """Return the fastest settings that fit with a margin for the estimate's error; the smallest ones if none do.

    Args:
        fixed: settings that are not decided here.
        micro_batch_sizes: micro-batch sizes to choose from.
        checkpointing: values of `checkpointing` to choose from.
        peak: estimates the peak memory, in bytes.
        tokens: returns the tokens of a micro-batch.
        gpu_memory: memory of the GPU, in bytes.
    """
    candidates = [
        replace(fixed, micro_batch_size=size, checkpointing=recompute)
        for recompute in sorted(checkpointing)
        for size in sorted(micro_batch_sizes, reverse=True)
    ]
    for room in (1 + TOLERANCE, 1.0):
        fitting = [candidate for candidate in candidates if peak(candidate) * room <= gpu_memory]
        if not fitting:
            continue
        largest = max(tokens(candidate) for candidate in fitting)
        return next(candidate for candidate in fitting if tokens(candidate) >= min(BUSY_TOKENS, largest))
    return replace(fixed, micro_batch_size=min(micro_batch_sizes), checkpointing=max(checkpointing))


def options(
    start: RunSettings,
    micro_batch_sizes: Sequence[int],
    *,
    checkpointing: bool,
    sharding: bool,
    quantization: bool,
) -> dict[str, list[Any]]:
    """Return the possible changes by increasing cost to the user, each with its values, the smallest change first.

    The first three leave the result as it is and cost time; an adapter instead of all weights, 4 bits and a lower rank
    change it; a shorter maximum length drops rows.

    Args:
        start: settings that do not fit.
        micro_batch_sizes: possible micro-batch sizes.
        checkpointing: True if the method can recompute activations.
        sharding: True if there are several ranks to shard the base's weights over, and the method supports it.
        quantization: True if the method can be trained over a base in 4 bits.
    """
    smaller = [size for size in sorted(micro_batch_sizes, reverse=True) if size < start.micro_batch_size]
    return {
        "micro_batch_size": smaller,
        "checkpointing": [True] if checkpointing and not start.checkpointing else [],
        "sharded": [True] if sharding and not start.sharded else [],
        "full": [False] if start.full else [],
        "quantized": [True] if quantization and not start.quantized else [],
        "rank": _halves(start.rank or 0, _MIN_RANK),
        "max_length": _halves(start.max_length, _MIN_LENGTH),
    }


def changes(start: RunSettings, options: Options, fits: Callable[[RunSettings], bool]) -> dict[str, Any] | None:
    """Return the fields to change, with their values, so that a run fits; None if no combination of `options` does.

    Cheaper changes are exhausted before a more expensive one is tried. Then unnecessary changes are undone, the most
    expensive first, and the others are made as small as possible.
    """
    strongest: dict[str, Any] = {}
    for name, values in options.items():
        if values:
            strongest[name] = values[-1]
        if values and fits(replace(start, **strongest)):
            break
    else:
        return None
    for name in reversed(list(strongest)):
        without = {other: value for other, value in strongest.items() if other != name}
        if without and fits(replace(start, **without)):
            strongest = without
    for name in strongest:
        strongest[name] = next(value for value in options[name] if fits(replace(start, **(strongest | {name: value}))))
    return strongest


def _halves(value: int, minimum: int) -> list[int]:
    found = []
    while value // 2 >= minimum:
        value //= 2
        found.append(value)
    return found
