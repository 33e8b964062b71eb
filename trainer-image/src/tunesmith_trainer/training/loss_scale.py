"""Factor of the loss while products are in float16, whose small gradients would otherwise become 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tunesmith_trainer.base_model.sharding import local_shard

if TYPE_CHECKING:
    from collections.abc import Iterable

_HIGHEST = 2.0**16
_GROWTH_STEPS = 2000
"""Steps without an overflow before the factor is doubled, as torch's GradScaler does it."""


@dataclass
class LossScale:
    """Factor of the loss, a power of two: multiplying by it and dividing by it does not round.

    An overflow does not cost a step: the step is computed again with half the factor.

    Args:
        factor: the factor.
        steps: steps since it was changed.
    """

    factor: float = _HIGHEST
    steps: int = 0

    @property
    def lowest(self) -> bool:
        """True if the factor cannot be halved: the gradients themselves are too large."""
        return self.factor <= 1.0

    def halve(self) -> None:
        """Halve the factor after an overflow."""
        self.factor, self.steps = self.factor / 2, 0

    def count_step(self) -> None:
        """Count a step without an overflow."""
        self.steps += 1
        if self.steps >= _GROWTH_STEPS and self.factor < _HIGHEST:
            self.factor, self.steps = self.factor * 2, 0


def divide(parameters: Iterable[torch.nn.Parameter], factor: float) -> bool:
    """Divide the gradients, or this rank's shards of them, by a factor; return True if all are finite."""
    gradients = [local_shard(parameter.grad) for parameter in parameters if parameter.grad is not None]
    finite = [gradient.div_(factor).isfinite().all() for gradient in gradients]
    return not finite or bool(torch.stack(finite).all())
