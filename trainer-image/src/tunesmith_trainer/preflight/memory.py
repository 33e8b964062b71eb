"""Peak GPU memory of a run, estimated from shapes alone. In bytes; pure, without torch.

peak = weights + (8 + state) · A + activations + logits + overhead, with A trainable parameters in float32 (4 bytes each
for the parameter and its gradient) and the optimizer's state, 8 bytes with AdamW. If several ranks train together, DDP
keeps a copy of the gradients, and FSDP2 gathers weights. Fitted to published measurements, which are in
tests/trainer/test_memory.py; all of them are of LoRA with AdamW over bases in bfloat16 or nf4 on one GPU. The
activations of the others are the tensors that autograd saves in a real model's layers, as measured by
tests/trainer/test_activations.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.api.finetunejob_status import Verdict

TOLERANCE = 0.15
"""Maximum relative deviation of the estimate from the published measurements."""
_FLOAT32 = 4
_TRAINABLE = 2 * _FLOAT32
_BUCKETS = _FLOAT32
"""DDP keeps them throughout: gradients are not views of its buckets, because they are freed after each step."""
_NF4 = 0.516  # with double quantisation: 4 bits, and 8 bits per 64 weights with their own constants
_NF4_CONSTANTS = 0.016
"""Part of _NF4 that FSDP2 does not shard: bitsandbytes keeps the constants outside of the weights."""
_OVERHEAD = 800_000_000  # CUDA context, kernels' workspaces, fragmentation
_LOGITS = 16  # bf16 logits, their float32 copy, the softmax and its gradient
_FUSED_LOGITS = 0.5
_HIDDEN = 5.5
_HIDDEN_FULL = {2: 34, 4: 40}
"""By the bytes of the matrix products' type: with weights in float32 the residual stream is in float32 too."""
_ADAPTER_INPUT = 2.25
_DROPOUT_INPUT = 4.4
_DORA_INPUT = 4.85
_GATHERED_LAYERS = 2


@dataclass(frozen=True)
class Shape:
    """Shape of a decoder.

    Args:
        hidden: width of the residual stream.
        layers: decoder layers.
        intermediate: width of the MLP.
        vocabulary: rows of the output layer.
        linear_parameters: weights of all linear layers except the output layer.
        embedding_parameters: weights of the embedding and the output layer; tied ones count once.
    """

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    linear_parameters: int
    embedding_parameters: int


@dataclass(frozen=True)
class RunShape:
    """Memory-related settings of a run.

    Args:
        adapter_parameters: trainable parameters.
        adapted_inputs: in-features of the adapted modules of one layer, summed.
        tokens: tokens per micro-batch: rows × the longest row, padding included.
        quantized: True if the linear layers are held in nf4.
        stored_bytes: mean bytes per weight of the linear layers if they are published quantised; None: they are not.
        checkpointing: True if activations are recomputed in the backward pass.
        fused_loss: True if the logits are never whole in memory.
        logit_positions: positions whose logits exist at the same time; None: all tokens.
        optimizer_bytes: optimizer state per trainable parameter, in bytes.
        full_precision: True if base and matrix products are in float32.
        full: True if all weights are trained; in bfloat16 the matrix products use copies of them.
        dropout: True if the adapter has dropout.
        dora: True if the adapter is DoRA.
        ddp: True if several ranks that each hold the whole base average their gradients.
        shards: ranks over which FSDP2 shards the base; 1: not sharded.
    """

    adapter_parameters: int
    adapted_inputs: int
    tokens: int
    quantized: bool = False
    stored_bytes: float | None = None
    checkpointing: bool = True
    fused_loss: bool = False
    logit_positions: int | None = None
    optimizer_bytes: float = 8
    full_precision: bool = False
    full: bool = False
    dropout: bool = False
    dora: bool = False
    ddp: bool = False
    shards: int = 1


@dataclass(frozen=True)
class Estimate:
    """Parts of the peak, in bytes."""

    weights: int
    adapter: int
    activations: int
    logits: int
    overhead: int = _OVERHEAD

    @property
    def peak(self) -> int:
        """Sum of the parts."""
        return self.weights + self.adapter + self.activations + self.logits + self.overhead


def estimate(shape: Shape, run: RunShape) -> Estimate:
    """Estimate the peak of a run, within TOLERANCE of measurements of similar runs."""
    width = 4 if run.full_precision else 2
    linear = run.stored_bytes or (_NF4 if run.quantized else width)
    per_input = _ADAPTER_INPUT + _DROPOUT_INPUT * run.dropout + _DORA_INPUT * run.dora * width / 2
    hidden = _HIDDEN_FULL[width] if run.full else _HIDDEN * width / 2
    layer = 4 * width * shape.intermediate + hidden * shape.hidden + per_input * run.adapted_inputs
    # With checkpointing: each layer's input, and the activations of one layer at a time.
    stream = 4 if run.full else width
    token = stream * shape.hidden * shape.layers + layer if run.checkpointing else shape.layers * layer
    positions = run.tokens if run.logit_positions is None else min(run.tokens, run.logit_positions)
    weights = linear * shape.linear_parameters + width * shape.embedding_parameters
    trained = (_TRAINABLE + run.optimizer_bytes + _BUCKETS * run.ddp) * run.adapter_parameters
    per_layer = shape.linear_parameters / shape.layers
    if run.shards == 1:
        kept = 0.0 if run.full and run.full_precision else weights
    elif run.full:
        gathered, gradients = _gathered_at_peak(shape)
        # If a layer is recomputed, the products' copies of its weights are freed with it.
        copies = 0.0 if run.full_precision else width * per_layer if run.checkpointing else weights
        kept = _FLOAT32 * gathered + copies
        trained = trained / run.shards + _FLOAT32 * gradients
    else:
        # A layer is gathered while another one is computed; embedding and output layer stay gathered throughout.
        gathered = _GATHERED_LAYERS * linear * per_layer + width * shape.embedding_parameters
        constants = _NF4_CONSTANTS * shape.linear_parameters if run.quantized else 0.0
        kept = gathered + constants + (weights - constants) / run.shards
    return Estimate(
        weights=round(kept),
        adapter=round(trained),
        activations=round(token * run.tokens),
        logits=round((_FUSED_LOGITS if run.fused_loss else _LOGITS) * shape.vocabulary * positions),
    )


def _gathered_at_peak(shape: Shape) -> tuple[float, float]:
    """Return the gathered parameters, and the gradients before they are sharded, if FSDP2 trains all weights.

    At the larger of two moments of the backward pass. At its end these are embedding and output layer, and their
    gradients with a copy that is sent. Before that, two layers are gathered in addition, and there are the output
    layer's gradient and one layer's with its copy.
    """
    per_layer = shape.linear_parameters / shape.layers
    embeddings, output = shape.embedding_parameters, shape.vocabulary * shape.hidden
    end = (float(embeddings), 2.0 * embeddings)
    before = (embeddings + _GATHERED_LAYERS * per_layer, output + 2 * per_layer)
    return max(end, before, key=sum)


def verdict(peak: int, gpu_memory: int | None) -> Verdict:
    """Return the verdict: Unknown if the memory is unknown or exceeded by no more than the estimate's own error."""
    if gpu_memory is None:
        return Verdict.UNKNOWN
    if peak <= gpu_memory:
        return Verdict.FITS
    return Verdict.WILL_NOT_FIT if peak * (1 - TOLERANCE) > gpu_memory else Verdict.UNKNOWN
