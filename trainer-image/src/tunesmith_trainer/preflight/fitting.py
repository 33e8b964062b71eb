"""Which settings make a run fit into a GPU: those chosen for the user, and the change that costs least. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tunesmith_trainer.preflight.memory import TOLERANCE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Peak = Callable[["Settings"], int]
    Options = Mapping[str, Sequence[Any]]

BUSY_TOKENS = 1024
"""Tokens of a micro-batch that keep a GPU busy: from there on, computing activations twice costs more than it gains."""
_LEAST_RANK = 8
_LEAST_LENGTH = 256


@dataclass(frozen=True)
class Settings:
    """What the memory of a run follows from, as far as a user can change it.

    Args:
        micro_batch_size: rows per forward pass.
        checkpointing: activations are computed again in the backward pass.
        quantized: the base is in 4 bits.
        rank: of the adapter; None where it has none.
        max_length: longest row, in tokens.
        full: all weights are trained, and not an adapter.
        sharded: FSDP2 shares the base's weights out among the ranks.
    """

    micro_batch_size: int
    checkpointing: bool
    quantized: bool
    rank: int | None
    max_length: int
    full: bool = False
    sharded: bool = False


def decide(
    asked: Settings,
    micro_batch_sizes: Sequence[int],
    checkpointing: Sequence[bool],
    *,
    peak: Peak,
    tokens: Callable[[Settings], int],
    gpu_memory: int,
) -> Settings:
    """The fastest settings that fit with the estimate's own error to spare; the smallest ones where none do.

    Args:
        asked: the settings that are not decided here.
        micro_batch_sizes: those to choose from.
        checkpointing: as above.
        peak: estimated bytes.
        tokens: tokens of a micro-batch.
        gpu_memory: bytes.
    """
    candidates = [
        replace(asked, micro_batch_size=size, checkpointing=again)
        for again in sorted(checkpointing)
        for size in sorted(micro_batch_sizes, reverse=True)
    ]
    for room in (1 + TOLERANCE, 1.0):
        fitting = [candidate for candidate in candidates if peak(candidate) * room <= gpu_memory]
        if not fitting:
            continue
        largest = max(tokens(candidate) for candidate in fitting)
        return next(candidate for candidate in fitting if tokens(candidate) >= min(BUSY_TOKENS, largest))
    return replace(asked, micro_batch_size=min(micro_batch_sizes), checkpointing=max(checkpointing))


def options(
    start: Settings,
    micro_batch_sizes: Sequence[int],
    *,
    checkpointing: bool,
    sharding: bool,
    quantization: bool,
) -> dict[str, list[Any]]:
    """What can be changed, in the order of what it costs the user, each with its values, the mildest first.

    The first three leave the result as it is and cost time; an adapter in the place of all weights, 4 bits and a lower
    rank change it; a shorter length drops rows.

    Args:
        start: the settings that do not fit.
        micro_batch_sizes: those that are possible.
        checkpointing: whether the method can compute activations again.
        sharding: whether there are ranks to share the base's weights out among, and the method goes with that.
        quantization: whether the method can be trained over a base in 4 bits.
    """
    smaller = [size for size in sorted(micro_batch_sizes, reverse=True) if size < start.micro_batch_size]
    return {
        "micro_batch_size": smaller,
        "checkpointing": [True] if checkpointing and not start.checkpointing else [],
        "sharded": [True] if sharding and not start.sharded else [],
        "full": [False] if start.full else [],
        "quantized": [True] if quantization and not start.quantized else [],
        "rank": _halves(start.rank or 0, _LEAST_RANK),
        "max_length": _halves(start.max_length, _LEAST_LENGTH),
    }


def changes(start: Settings, options: Options, fits: Callable[[Settings], bool]) -> dict[str, Any] | None:
    """The fields to change with their values, so that a run fits; None where nothing of `options` does it.

    Cheaper changes are exhausted before a dearer one is tried; then those that turned out not to be needed are taken
    back, the dearest first, and the others are made as mild as they can be.
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


def _halves(value: int, least: int) -> list[int]:
    found = []
    while value // 2 >= least:
        value //= 2
        found.append(value)
    return found
