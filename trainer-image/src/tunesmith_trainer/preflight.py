"""What a job will cost, known before any weight is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.contracts.memory import Run, Shape, estimate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig

    from tunesmith.api.finetunejob import FineTuneJobSpec
    from tunesmith_trainer.model import Modules


def preflight_peak(
    spec: FineTuneJobSpec,
    config: PretrainedConfig,
    modules: Modules,
    adapted: Mapping[str, tuple[int, int]],
    *,
    trainable: int,
    tokens: int,
) -> int | None:
    """Estimated peak of the GPU in bytes; None for a base whose configuration does not tell its widths.

    Args:
        spec: the job's spec.
        config: the base model's configuration.
        modules: its linear modules.
        adapted: those that get an adapter, with their (in, out) features.
        trainable: parameters of the adapter.
        tokens: of a micro-batch of the longest rows.
    """
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    widths = [width for name in names if isinstance(width := getattr(config, name, None), int)]
    if len(widths) != len(names):
        return None
    hidden, layers, intermediate, vocabulary = widths
    tables = 1 if getattr(config, "tie_word_embeddings", False) else 2
    shape = Shape(
        hidden=hidden,
        layers=layers,
        intermediate=intermediate,
        vocabulary=vocabulary,
        linear_parameters=sum(wide * high for wide, high in modules.linear.values()),
        embedding_parameters=tables * vocabulary * hidden,
    )
    fields = spec.method.fields
    run = Run(
        adapter_parameters=trainable,
        adapted_inputs=sum(wide for wide, _ in adapted.values()) // layers,
        tokens=tokens,
        quantized=spec.method.qlora is not None,
        dropout=fields.dropout > 0,
    )
    return estimate(shape, run).peak
