"""Compile norms and feed-forward layers with torch.compile: fewer passes over the activations.

Attention is excluded: its matrix products and its softmax are kernels already, and the arguments that separate
sequences would require compiling again for every batch.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import torch

from tunesmith_trainer.base_model.precision import training_precision
from tunesmith_trainer.base_model.sharding import local_shard
from tunesmith_trainer.data import IGNORED
from tunesmith_trainer.errors import InvalidSpecError
from tunesmith_trainer.process.ranks import lost_peer
from tunesmith_trainer.training.batches import Collator, on_device
from tunesmith_trainer.training.layout import tolerance

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from tunesmith_trainer.process.ranks import Ranks
    from tunesmith_trainer.training.layout import LossImplementation

log = logging.getLogger(__name__)

_NAMES = ("RMSNorm", "MLP")
"""Suffixes of these layers' class names in transformers. Other norms, such as LayerNorm, are already one kernel."""
_ROW_TOKENS = 19


def run_compiled() -> AbstractContextManager[None]:
    """Run the compiled form of compiled layers within the block; outside of it they run as written.

    Generation and evaluation have different shapes, for which compiling again takes longer than it saves.
    """
    stance: AbstractContextManager[None] = torch.compiler.set_stance("default")
    return stance


def compile_layers(
    model: PeftModel,
    base: PreTrainedModel,
    implementation: LossImplementation,
    cache: Path,
    write_line: Callable[[str], None],
    ranks: Ranks,
    *,
    required: bool,
) -> bool:
    """Compile a model's norms and feed-forward layers and try them on two short rows; True if they stay compiled.

    They stay compiled on all ranks or on none.

    The rows are the same in every attempt of a job, so that the compiled code, and with it the result, is as well.

    Args:
        model: base with adapter.
        base: the model inside it.
        implementation: layout and attention.
        cache: folder for compiled code.
        write_line: reports to a person.
        ranks: ranks that train together.
        required: True if the user requests it, so that it must work; otherwise layers that cannot be compiled stay as
            they are.

    Raises:
        InvalidSpecError: it was requested and is not possible.
    """
    layers = [module for name, module in base.named_modules() if _benefits(name, module)]
    if not layers:
        return _not_compiled(
            f"a {type(base).__name__} has no layers that are known to benefit", write_line, required=required
        )
    # A pod's user has no name, which the compiler needs to name a folder; the few kernels need no process pool.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.compiler.set_stance("force_eager")
    expected = _trial_results(model, base, implementation)
    for layer in layers:
        # Dropout draws the same random numbers as without compilation.
        layer.compile(dynamic=True, options={"fallback_random": True})
    reason = None
    try:
        distance = float((_trial_results(model, base, implementation) - expected).norm() / expected.norm())
        if not distance <= tolerance(base):
            reason = f"the results differ by {distance:.1e}"
    except Exception as error:
        peer_error = lost_peer(error, ranks)
        if peer_error is not None:
            raise peer_error from error
        # A compiler can fail in any way, and training continues without it.
        reason = " ".join(str(error).split())[:300]
    # If it was requested, do not wait for the others before raising: they may be in a layer that all ranks have to
    # gather.
    if (reason is None or not required) and not ranks.any(reason is not None)[0]:
        write_line(f"  compiled {len(layers)} norms and feed-forward layers")
        return True
    if reason is not None and not ranks.first:
        log.warning("layers are not compiled: %s", reason)  # only the first rank can use `write_line`
    for layer in layers:
        layer._compiled_call_impl = None  # noqa: SLF001 - `compile` cannot be undone otherwise
    return _not_compiled(reason or "another rank could not compile them, see its log", write_line, required=required)


def _benefits(name: str, module: nn.Module) -> bool:
    # The number of tokens of an expert differs from batch to batch and may be 0.
    return type(module).__name__.endswith(_NAMES) and "experts" not in name.split(".")


def _not_compiled(reason: str, write_line: Callable[[str], None], *, required: bool) -> bool:
    if required:
        raise InvalidSpecError(
            f"hyperparameters.torchCompile: the model cannot be compiled on this machine ({reason}): set it to false"
        )
    write_line(f"  layers are not compiled: {reason}")
    return False


def _trial_results(model: PeftModel, base: PreTrainedModel, implementation: LossImplementation) -> torch.Tensor:
    """Return the loss and the norms of all gradients, or of this rank's shards, in float64, for two fixed rows."""
    vocabulary = base.config.get_text_config().vocab_size
    ids = [[(3 + 7 * position) % vocabulary for position in range(size)] for size in (_ROW_TOKENS, _ROW_TOKENS - 7)]
    rows = [{"input_ids": row, "labels": [IGNORED, *row[1:]]} for row in ids]
    batch = on_device(Collator(size=2, pad=0, layout=implementation.layout).join(rows), model.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    model.train()
    model.zero_grad()
    try:
        gpus = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(gpus), implementation.use_attention(base), training_precision(model), run_compiled():
            torch.manual_seed(0)
            summed = model(**batch, target_loss=True).summed
            summed.backward()  # not `grad`: the graph of sharded weights includes other weights
        norms = [local_shard(parameter.grad).double().norm() for parameter in parameters if parameter.grad is not None]
    finally:
        model.train(was_training)
        model.zero_grad()
    return torch.stack([summed.detach().double(), *norms])
