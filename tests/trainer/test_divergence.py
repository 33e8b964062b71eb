"""When a run is given up because its loss has run away."""

from __future__ import annotations

import pytest

from tunesmith_trainer.training.divergence import SUSTAINED_STEPS, diverged

FALLING = [3.0 - 0.02 * step for step in range(60)]


@pytest.mark.parametrize(
    "losses",
    [
        [],
        FALLING,
        [*FALLING, 40.0],
        [*FALLING, *[40.0] * (SUSTAINED_STEPS - 1)],
        [*FALLING, *[40.0] * (SUSTAINED_STEPS - 1), 2.0],
        [0.01, 0.01, 0.01, 0.01, 0.01, *[0.5] * 40],
        [3.0] * 5 + [4.9] * 40,
    ],
    ids=["nothing", "falling", "one odd batch", "not yet", "came back", "small", "less than two nats more"],
)
def test_a_run_that_may_still_learn_goes_on(losses: list[float]) -> None:
    assert not diverged(losses)


@pytest.mark.parametrize("first", [0.01, 1.0, 3.0])
def test_a_loss_that_stays_far_above_the_first_ends_the_run(first: float) -> None:
    assert diverged([first] * 5 + [first * 2 + 2.1] * SUSTAINED_STEPS)
