"""Hyperparameters of a FineTuneJob."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from tunesmith.api.model import ApiModel, Rule

DEFAULT_EPOCHS = 3.0
DEFAULT_BATCH_SIZE = 8
DEFAULT_MICRO_BATCH_SIZE = 8
"""Upper bound of the default; batchSize if that is lower."""
DEFAULT_WARMUP_RATIO = 0.03
COMPILED_STEPS = 200
"""Fewest optimizer steps for which compiling, which takes about a minute, saves time."""


class Optimizer(StrEnum):
    """Optimizer that updates the weights."""

    ADAMW = "AdamW"
    ADAMW_8BIT = "AdamW8bit"
    ADAFACTOR = "Adafactor"
    LION = "Lion"
    SGD = "SGD"


class Scheduler(StrEnum):
    """Shape of the learning rate after warm-up."""

    COSINE = "Cosine"
    LINEAR = "Linear"
    CONSTANT = "Constant"


class Precision(StrEnum):
    """Data type of the frozen weights and of matrix products. Trained weights are float32 in any case."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Hyperparameters(ApiModel):
    """Hyperparameters of the training run. Absent fields get values, which status.resolved lists."""

    rules = (
        Rule(
            "!(has(self.epochs) && has(self.maxSteps))",
            "hyperparameters.epochs and hyperparameters.maxSteps are mutually exclusive: remove one of them",
            lambda self: self.epochs is None or self.max_steps is None,
        ),
        Rule(
            # The guard against 0 avoids a second, arithmetic error beside the one of `minimum`.
            "!has(self.microBatchSize) || self.microBatchSize < 1 || "
            f"(has(self.batchSize) ? self.batchSize : {DEFAULT_BATCH_SIZE}) % self.microBatchSize == 0",
            "hyperparameters.microBatchSize must divide hyperparameters.batchSize "
            f"({DEFAULT_BATCH_SIZE} if absent): change one of them",
            lambda self: (
                not self.micro_batch_size or (self.batch_size or DEFAULT_BATCH_SIZE) % self.micro_batch_size == 0
            ),
        ),
        Rule(
            "!(has(self.warmupRatio) && has(self.warmupSteps))",
            "hyperparameters.warmupRatio and hyperparameters.warmupSteps are mutually exclusive: remove one of them",
            lambda self: self.warmup_ratio is None or self.warmup_steps is None,
        ),
        Rule(
            "!has(self.warmupSteps) || !has(self.maxSteps) || self.warmupSteps <= self.maxSteps",
            "hyperparameters.warmupSteps must not exceed hyperparameters.maxSteps, or the run would never reach its "
            "learning rate: lower warmupSteps",
            lambda self: self.warmup_steps is None or self.max_steps is None or self.warmup_steps <= self.max_steps,
        ),
        Rule(
            "!has(self.minLearningRateRatio) || !has(self.scheduler) || self.scheduler != 'Constant'",
            "hyperparameters.minLearningRateRatio is only for the schedulers Cosine and Linear, because the learning "
            "rate of Constant does not fall: remove it, or use another scheduler",
            lambda self: self.min_learning_rate_ratio is None or self.scheduler is not Scheduler.CONSTANT,
        ),
    )

    epochs: float | None = Field(
        default=None,
        ge=0.01,
        le=1000,
        description="Number of passes over the training rows. Absent without maxSteps: 3.",
    )
    max_steps: int | None = Field(default=None, ge=1, le=10_000_000, description="Number of optimizer steps.")
    learning_rate: float | None = Field(
        default=None,
        ge=1e-8,
        le=1.0,
        description="Peak learning rate. Absent: the method's default, such as 2e-4 for lora and qlora; a tenth of "
        "it if the objective is dpo, orpo or kto.",
    )
    batch_size: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="Number of sequences per optimizer step, over all GPUs and nodes. Absent: 8.",
    )
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Number of sequences per forward pass; must divide batchSize. Absent: batchSize, at most 8.",
    )
    scheduler: Scheduler = Field(
        default=Scheduler.COSINE,
        description="Shape of the learning rate after warm-up. Cosine and Linear fall towards minLearningRateRatio.",
    )
    min_learning_rate_ratio: float | None = Field(
        default=None,
        ge=0.0,
        lt=1.0,
        description="Learning rate towards which Cosine and Linear fall, as a share of learningRate. Absent: 0.",
    )
    warmup_ratio: float | None = Field(
        default=None,
        ge=0.0,
        le=0.5,
        description="Share of the steps in which the learning rate rises to learningRate; see warmupSteps. Absent "
        f"without warmupSteps: {DEFAULT_WARMUP_RATIO}.",
    )
    warmup_steps: int | None = Field(
        default=None,
        ge=0,
        le=10_000_000,
        description="Number of steps in which the learning rate rises to learningRate: with n of them, step k is taken "
        "at k/n of it. 0: no warm-up. Absent: warmupRatio of the steps, rounded up.",
    )
    optimizer: Optimizer = Field(
        default=Optimizer.ADAMW,
        description="Optimizer. AdamW8bit keeps AdamW's state in 8 bits, a quarter of the memory; Adafactor keeps "
        "sums per row and column; Lion keeps one value per parameter, and needs a third to a tenth of AdamW's learning "
        "rate; SGD keeps none.",
    )
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0, description="Weight decay of the optimizer.")
    max_grad_norm: float = Field(
        default=1.0,
        ge=0.0,
        le=1000.0,
        description="Maximum norm of the gradients, to which they are clipped. 0: no clipping.",
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        description="Recompute activations in the backward pass: less memory, about a third more time. "
        "Absent: only if the GPU's memory requires it; never on a CPU.",
    )
    torch_compile: bool | None = Field(
        default=None,
        description="Compile norms and feed-forward layers (torch.compile): faster steps, after up to a minute of"
        " compilation. Absent: only on a GPU, in runs of at least "
        f"{COMPILED_STEPS} steps, and if the layers compile and give equal results.",
    )
    precision: Precision | None = Field(
        default=None,
        description="Data type of the frozen weights and of matrix products. Trained weights are float32 in any case. "
        "float16 is for GPUs that do not compute in bfloat16, such as T4 and V100: the loss is scaled so that small "
        "gradients are kept, and a step whose gradients overflow is computed again with half the scale. Absent: "
        "bfloat16 on a GPU, float32 on a CPU.",
    )
    neftune_noise_alpha: float | None = Field(
        default=None,
        ge=0.1,
        le=100.0,
        description="Scale of uniform noise on the embeddings during training (NEFTune, arXiv:2310.05914), such as 5. "
        "Absent: none.",
    )
    seed: int = Field(default=42, ge=0, le=2_147_483_647, description="Seed of initialisation, order and dropout.")
