"""Decide whether a job fits into its GPU before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.api.dataset import Overlong
from tunesmith.api.finetunejob_status import PeakParts, Verdict
from tunesmith.api.hyperparameters import DEFAULT_BATCH_SIZE, Optimizer, Precision
from tunesmith.api.methods.lora import INITIALIZATIONS, LoraFields
from tunesmith.api.placement import DataParallelism
from tunesmith_trainer.preflight.fitting import RunSettings, changes, decide, options
from tunesmith_trainer.preflight.memory import Estimate, RunShape, Shape, estimate, verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt
    from transformers import PretrainedConfig

    from tunesmith.api.finetunejob import FineTuneJobSpec
    from tunesmith.api.finetunejob_status import Preflight
    from tunesmith_trainer.methods.targets import Modules

_GIB = 2**30
LOSS_POSITIONS = 512
"""Number of target positions whose logits exist at the same time."""
_OPTIMIZER_BYTES = {
    Optimizer.ADAMW: 8.0,
    Optimizer.ADAMW_8BIT: 2.0,
    Optimizer.ADAFACTOR: 0.0,
    Optimizer.LION: 4.0,
    Optimizer.SGD: 0.0,
}
"""Bytes of optimizer state per trained parameter; Adafactor's sums of rows and columns are negligible."""
_WIDTHS = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_GPUS_OF_A_NODE = (2, 4, 8)
_KEPT_SHARE = 0.5
"""Minimum share of rows to keep: a shorter maxLength that keeps fewer is not worth proposing."""


@dataclass(frozen=True)
class Sizing:
    """Quantities that determine the peak memory of a run.

    Args:
        shape: shape of the base model.
        trainable: number of trained parameters, by the adapter's rank.
        adapted_inputs: in-features of the adapted modules of one layer, summed.
        dropout: True if the adapter has dropout.
        dora: True if the adapter is DoRA.
        optimizer_bytes: optimizer state per trained parameter, in bytes.
        full_precision: True if weights that are not in 4 bits, and matrix products, are in float32.
        shortened: True if longer rows are shortened to maxLength (packed or truncated), False if they are dropped.
        lengths: tokens per row, ascending.
        ranks: number of ranks that train together.
        stored_bytes: mean bytes per weight of the linear layers if they are published quantised; None: they are not.
    """

    shape: Shape
    trainable: Callable[[int | None], int]
    adapted_inputs: int
    dropout: bool
    dora: bool
    optimizer_bytes: float
    full_precision: bool
    shortened: bool
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    ranks: int = 1
    stored_bytes: float | None = None

    def kept(self, settings: RunSettings) -> int:
        """Return the number of rows that are not longer than the settings allow."""
        return int(np.searchsorted(self.lengths, settings.max_length, side="right"))

    def tokens(self, settings: RunSettings) -> int:
        """Return the tokens of a micro-batch of the longest rows."""
        if self.shortened:
            return settings.micro_batch_size * min(int(self.lengths[-1]), settings.max_length)
        kept = self.kept(settings)
        return settings.micro_batch_size * int(self.lengths[kept - 1]) if kept else 0

    def estimate(self, settings: RunSettings) -> Estimate:
        """Estimate the peak and its parts."""
        whole = self.shape.linear_parameters + self.shape.embedding_parameters
        run = RunShape(
            adapter_parameters=whole if settings.full else self.trainable(settings.rank),
            adapted_inputs=0 if settings.full else self.adapted_inputs,
            tokens=self.tokens(settings),
            quantized=settings.quantized,
            stored_bytes=self.stored_bytes,
            checkpointing=settings.checkpointing,
            dropout=self.dropout,
            dora=self.dora,
            full=settings.full,
            logit_positions=LOSS_POSITIONS,
            optimizer_bytes=self.optimizer_bytes,
            full_precision=self.full_precision,
            ddp=self.ranks > 1 and not settings.sharded,
            shards=self.ranks if settings.sharded else 1,
        )
        return estimate(self.shape, run)

    def peak(self, settings: RunSettings) -> int:
        """Estimate the peak, in bytes."""
        return self.estimate(settings).peak


def sizing(
    spec: FineTuneJobSpec,
    config: PretrainedConfig,
    modules: Modules,
    adapted: Mapping[str, tuple[int, int]],
    trainable: Callable[[int | None], int],
    lengths: npt.ArrayLike,
) -> Sizing | None:
    """Return the quantities that determine the peak; None if it cannot be estimated.

    It cannot be without a GPU, for a mixture-of-experts base, or for one whose configuration does not state its widths.

    Args:
        spec: the job's spec.
        config: the base model's configuration.
        modules: linear modules of the base model.
        adapted: adapted modules with their (in, out) features.
        trainable: number of trained parameters, by the adapter's rank.
        lengths: tokens per training row.
    """
    text = config.get_text_config()
    widths = [width for name in _WIDTHS if isinstance(width := getattr(text, name, None), int)]
    if not spec.resources.gpus or len(widths) != len(_WIDTHS) or any(getattr(text, name, None) for name in _EXPERTS):
        return None
    hidden, layers, intermediate, vocabulary = widths
    if spec.method.full is not None:
        # Also count what LoRA with its defaults would train: it is proposed if all weights do not fit.
        adapted = modules.linear
        trainable = _default_lora_parameters(modules.linear)
    quantization = spec.method.quantization
    linear = sum(in_features * out_features for in_features, out_features in modules.linear.values())
    shape = Shape(hidden, layers, intermediate, vocabulary, linear, modules.parameters - linear)
    full_precision = spec.hyperparameters.precision is Precision.FLOAT32 or (
        quantization is not None and quantization.compute_type == "float32"
    )
    return Sizing(
        shape=shape,
        trainable=trainable,
        adapted_inputs=sum(in_features for in_features, _ in adapted.values()) // layers,
        dropout=spec.method.dropout > 0,
        dora=isinstance(spec.method.fields, LoraFields) and spec.method.fields.dora,
        optimizer_bytes=_OPTIMIZER_BYTES[spec.hyperparameters.optimizer],
        full_precision=full_precision,
        shortened=spec.dataset.packing or spec.dataset.overlong is Overlong.TRUNCATE,
        lengths=np.sort(np.asarray(lengths, dtype=np.int64)),
        ranks=spec.resources.ranks,
        stored_bytes=_stored_bytes(modules, linear, 4 if full_precision else 2),
    )


def _stored_bytes(modules: Modules, linear: int, width: int) -> float | None:
    """Return the mean bytes per weight of linear layers that are published quantised; None: they are not.

    Args:
        modules: modules of the base model.
        linear: weights of the linear layers.
        width: bytes of those that are not quantised.
    """
    if modules.stored is None or not modules.stored.kept:
        return None
    quantized = modules.quantizable_weights
    return (modules.stored.bytes_per_weight * quantized + width * (linear - quantized)) / max(1, linear)


def _default_lora_parameters(linear: Mapping[str, tuple[int, int]]) -> Callable[[int | None], int]:
    parameters = LoraFields().rank * sum(in_features + out_features for in_features, out_features in linear.values())
    return lambda _: parameters


def settings_of(spec: FineTuneJobSpec, *, micro_batch_size: int, checkpointing: bool) -> RunSettings:
    """Return the settings of a job that determine its memory."""
    return RunSettings(
        micro_batch_size=micro_batch_size,
        checkpointing=checkpointing,
        quantized=spec.method.quantization is not None,
        rank=spec.method.rank,
        max_length=spec.dataset.max_length,
        full=spec.method.full is not None,
        sharded=spec.resources.data_parallelism is DataParallelism.FSDP2 and spec.resources.ranks > 1,
    )


def decide_settings(
    sized: Sizing,
    fixed: RunSettings,
    sizes: Sequence[int],
    checkpointing: Sequence[bool],
    gpu_memory: int,
    *,
    sharding: bool,
) -> RunSettings:
    """Return the settings that the estimate chooses for a GPU's memory.

    Args:
        sized: quantities that determine the peak.
        fixed: settings that are not decided here.
        sizes: micro-batch sizes to choose from.
        checkpointing: values of checkpointing to choose from.
        gpu_memory: memory of the GPU, in bytes.
        sharding: True if FSDP2 may be chosen, which is slower: only if nothing else fits.
    """
    chosen = decide(fixed, sizes, checkpointing, peak=sized.peak, tokens=sized.tokens, gpu_memory=gpu_memory)
    if not sharding or sized.peak(chosen) <= gpu_memory:
        return chosen
    sharded = replace(fixed, sharded=True)
    other = decide(sharded, sizes, checkpointing, peak=sized.peak, tokens=sized.tokens, gpu_memory=gpu_memory)
    return other if sized.peak(other) <= gpu_memory else chosen


def judge(
    counted: Preflight,
    sized: Sizing | None,
    spec: FineTuneJobSpec,
    run: RunSettings,
    sizes: Sequence[int],
    gpu_memory: int | None,
    *,
    shardable: bool,
) -> Preflight:
    """Add the peak, its parts, the verdict and, if it may not fit, the cheapest change to the counts.

    Without a GPU nothing is added; if the peak cannot be estimated, the verdict is Unknown.
    """
    if not spec.resources.gpus:
        return counted
    if sized is None:
        return counted.model_copy(update={"gpu_memory_bytes": gpu_memory, "verdict": Verdict.UNKNOWN})
    parts = sized.estimate(run)
    outcome = verdict(parts.peak, gpu_memory)
    suggestion = None
    if gpu_memory is not None and outcome is not Verdict.FITS:
        suggestion = suggest(sized, spec, run, sizes, gpu_memory, shardable=shardable)
    return counted.model_copy(
        update={
            "estimated_peak_bytes": parts.peak,
            "peak_parts": PeakParts(
                weights_bytes=parts.weights,
                trainable_bytes=parts.adapter,
                activations_bytes=parts.activations,
                logits_bytes=parts.logits,
                overhead_bytes=parts.overhead,
            ),
            "gpu_memory_bytes": gpu_memory,
            "verdict": outcome,
            "suggestion": suggestion,
        }
    )


def suggest(
    sized: Sizing,
    spec: FineTuneJobSpec,
    run: RunSettings,
    sizes: Sequence[int],
    gpu_memory: int,
    *,
    shardable: bool,
) -> str:
    """Describe the cheapest change that fits according to the same estimate, in one sentence."""
    quantization = _can_quantize(spec) and sized.stored_bytes is None
    possible = options(
        run,
        sizes,
        checkpointing=can_recompute(spec),
        sharding=spec.resources.ranks > 1 and shardable,
        quantization=quantization,
    )
    if spec.dataset.overlong is Overlong.ERROR:
        possible["max_length"] = []
    batch = spec.hyperparameters.batch_size or DEFAULT_BATCH_SIZE
    found = changes(run, possible, partial(_fits, sized, run, batch, gpu_memory))
    if found is not None:
        return f"it fits with {_listed(sized, spec, run, found)} (about {gibibytes(sized.peak(replace(run, **found)))})"
    for gpus in _GPUS_OF_A_NODE if spec.shardable else ():
        wider = replace(sized, ranks=gpus * spec.resources.nodes)
        if not sized.ranks < wider.ranks <= batch:
            continue
        others = options(
            run, [1, *sizes], checkpointing=can_recompute(spec), sharding=shardable, quantization=quantization
        )
        found = changes(run, others | {"rank": [], "max_length": []}, partial(_fits, wider, run, batch, gpu_memory))
        if found is not None:
            changed = _listed(wider, spec, run, found, f"resources.gpus: {gpus}")
            return f"it fits with {changed} (about {gibibytes(wider.peak(replace(run, **found)))} on each GPU)"
    strongest = replace(run, **{name: values[-1] for name, values in possible.items() if values})
    smallest = min(sized.peak(strongest), sized.peak(replace(strongest, max_length=run.max_length)))
    return (
        f"no change of this job makes it fit: it needs a GPU with about {gibibytes(smallest)}, or a smaller base model"
    )


def _fits(sized: Sizing, run: RunSettings, batch: int, gpu_memory: int, trial: RunSettings) -> bool:
    """Return True if a run with other settings fits, keeps enough rows, and has a micro-batch for each rank."""
    if trial.micro_batch_size * sized.ranks > batch:
        return False
    if trial.full and trial.quantized:
        return False  # weights in 4 bits cannot be trained
    enough = sized.shortened or sized.kept(trial) >= max(2, _KEPT_SHARE * len(sized.lengths))
    return (enough or trial.max_length == run.max_length) and sized.peak(trial) <= gpu_memory


def _listed(sized: Sizing, spec: FineTuneJobSpec, run: RunSettings, found: Mapping[str, Any], *first: str) -> str:
    """List the changed fields with their values, after others."""
    dropped = 0 if sized.shortened else len(sized.lengths) - sized.kept(replace(run, **found))
    descriptions = [
        *first,
        *(
            _describe(name, value, spec.method.name, dropped, len(sized.lengths))
            for name, value in found.items()
            if name != "full" or "quantized" not in found  # implied by method.qlora
        ),
    ]
    return " and ".join([", ".join(descriptions[:-1]), descriptions[-1]] if len(descriptions) > 1 else descriptions)


def _describe(name: str, value: int, method: str, dropped: int, rows: int) -> str:
    match name:
        case "micro_batch_size":
            return f"hyperparameters.microBatchSize: {value}"
        case "checkpointing":
            return "hyperparameters.gradientCheckpointing: true"
        case "sharded":
            return "resources.dataParallelism: FSDP2"
        case "full":
            return "method.lora instead of full"
        case "quantized" if method in {"lora", "full"}:
            return f"method.qlora instead of {method}"
        case "quantized":
            return f"method.{method}.quantization: {{}}"
        case "rank":
            return f"method.{method}.rank: {value}"
        case _:
            return f"dataset.maxLength: {value}" + (f" (drops {dropped} of {rows} rows)" if dropped else "")


def can_recompute(spec: FineTuneJobSpec) -> bool:
    """Return True if activations can be recomputed: not if an adapter is in the keys and values of the layers."""
    return spec.method.fields.traits.recomputable


def _can_quantize(spec: FineTuneJobSpec) -> bool:
    fields = spec.method.fields
    if isinstance(fields, LoraFields):
        return INITIALIZATIONS[fields.initialization].in_4_bits
    return fields.traits.not_quantized is None


def gibibytes(size: int) -> str:
    """Format a size, such as `15.9 GiB`."""
    return f"{size / _GIB:.1f} GiB"


def refusal(counted: Preflight, *, cluster: bool) -> str | None:
    """Explain why training would be pointless, with a change that fits; None if it may fit.

    Args:
        counted: counts with the verdict.
        cluster: True if a scheduler chooses among nodes.
    """
    if counted.verdict is not Verdict.WILL_NOT_FIT:
        return None
    peak, memory = counted.estimated_peak_bytes or 0, counted.gpu_memory_bytes or 0
    gpu, alternative = "the GPU has", ""
    if cluster:
        gpu = "the smallest GPU that it may be scheduled on has"
        alternative = "; if the cluster has larger GPUs, select them with scheduling.nodeSelector"
    return (
        f"the run needs about {gibibytes(peak)} of GPU memory and {gpu} {gibibytes(memory)}: "
        f"{counted.suggestion}{alternative}"
    )
