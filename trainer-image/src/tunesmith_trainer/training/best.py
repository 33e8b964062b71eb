"""Keep the weights of the step with the lowest held-out loss so far: one copy, in a file on the first rank's disk."""

from __future__ import annotations

import math
import shutil
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from tunesmith_trainer.errors import OutOfDiskError
from tunesmith_trainer.training import weights
from tunesmith_trainer.training.checkpoint import describe_disk_problem

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from tunesmith_trainer.process.ranks import Ranks

BEST = "best.safetensors"


class BestWeights:
    """The weights with the lowest held-out loss so far.

    Args:
        model: base with adapter.
        work: folder for the file.
        ranks: ranks that train together; every rank calls each method.
        sharded: True if weights are sharded over the ranks.

    Attributes:
        step: their optimizer step; None before the first evaluation.
        loss: their held-out loss.
    """

    def __init__(self, model: torch.nn.Module, work: Path, ranks: Ranks, *, sharded: bool) -> None:
        self._model = model
        self._file = work / BEST
        self._ranks = ranks
        self._sharded = sharded
        self.step: int | None = None
        self.loss = math.inf

    def offer(self, step: int, loss: float) -> None:
        """Keep the current weights if their held-out loss is lower than that of the kept ones.

        Raises:
            OutOfDiskError: the disk has no room for them.
        """
        # Decided by the first rank: sharded weights need all of them.
        if not self._ranks.of_first(int(loss < self.loss)):
            return
        whole = weights.gather(self._model, keep=self._ranks.first)
        if self._ranks.first:
            self._write(lambda file: save_file(whole, file))
        self.step, self.loss = step, loss

    def load(self) -> None:
        """Load the kept weights into the model: on the ranks that compute something with it from now on."""
        if self._sharded:
            weights.load_from_first(self._model, self._file, self._ranks)
        elif self._ranks.first:
            weights.load(self._model, self._file)

    def save(self, folder: Path, step: int) -> dict[str, float] | None:
        """Add the kept weights to the checkpoint of a step, whose own weights they may be.

        Returns:
            Their step and loss, for `restore`; None before the first evaluation.
        """
        if self.step is None:
            return None
        if self.step != step:
            shutil.copyfile(self._file, folder / BEST)
        return {"step": self.step, "loss": self.loss}

    def restore(self, folder: Path, step: int, saved: dict[str, float] | None, own: str) -> None:
        """Restore what `save` added to the checkpoint of a step.

        Args:
            folder: folder of the checkpoint.
            step: its step.
            saved: step and loss that `save` returned.
            own: name of the file with the checkpoint's own weights.
        """
        if saved is None:
            return
        self.step, self.loss = int(saved["step"]), saved["loss"]
        if self._ranks.first:
            kept = folder / (own if self.step == step else BEST)
            self._write(lambda file: shutil.copyfile(kept, file))

    def _write(self, fill: Callable[[Path], object]) -> None:
        try:
            fill(self._file)
        except Exception as error:
            problem = describe_disk_problem(error, self._file.parent)
            if problem is None:
                raise
            raise OutOfDiskError(
                f"the best weights so far cannot be kept for evaluation.publish: Best: {problem}; use nodes with "
                "larger disks, or evaluation.publish: Last"
            ) from error
