"""FineTuneJob: a base model, data and a method become a trained adapter."""

from __future__ import annotations

import math
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field

from tunesmith.api.conditions import Condition, FailureReason
from tunesmith.api.model import (
    API_VERSION,
    MAX_NAME,
    ApiModel,
    ObjectMeta,
    Rule,
    SecretReference,
    StatusModel,
    Uri,
    uri_rules,
)
from tunesmith.api.placement import Resources, Scheduling

ModuleName = Annotated[str, Field(min_length=1, max_length=128)]


DEFAULT_EPOCHS = 3.0
DEFAULT_LEARNING_RATE = 2e-4
DEFAULT_BATCH_SIZE = 8
DEFAULT_MICRO_BATCH_SIZE = 8
"""Highest; batchSize where that is lower."""
DEFAULT_VALIDATION_FRACTION = 0.1


def _rounded(value: float | None) -> float | None:
    """Four decimals are enough for people; what is not finite has no JSON form and is left out."""
    return round(value, 4) if value is not None and math.isfinite(value) else None


Figure = Annotated[float | None, AfterValidator(_rounded)]


class BaseModelSource(ApiModel):
    """Where the base model's folder is (config, tokenizer, safetensors)."""

    rules = (
        *uri_rules,
        Rule(
            "!has(self.revision) || self.uri.startsWith('hf://')",
            "baseModel.revision belongs to an hf:// uri: remove it, or name a copy of that revision in the uri",
            lambda self: self.revision is None or self.uri.startswith("hf://"),
        ),
    )

    uri: Uri = Field(
        description="hf://org/name, s3://bucket/folder, gs://…, az://…, pvc://claim/path; file:// in a local run only.",
    )
    revision: str | None = Field(
        default=None, max_length=128, description="Commit, tag or branch of an hf:// model; absent: main."
    )
    secret_ref: SecretReference | None = Field(
        default=None, description="Credentials for the uri; absent: those of the store."
    )


class DatasetSource(ApiModel):
    """One JSONL file of training rows."""

    rules = uri_rules

    uri: Uri = Field(description="A .jsonl file; file:// in a local run only.")
    secret_ref: SecretReference | None = Field(
        default=None, description="Credentials for the uri; absent: those of the store."
    )


class Dataset(ApiModel):
    """Rows to train on and rows held out."""

    rules = (
        Rule(
            "!(has(self.validation) && has(self.validationFraction))",
            "dataset.validation and dataset.validationFraction exclude each other: keep one of them",
            lambda self: self.validation is None or self.validation_fraction is None,
        ),
    )

    train: list[DatasetSource] = Field(
        min_length=1, max_length=64, description="Sources of the training rows, concatenated in this order."
    )
    validation: list[DatasetSource] | None = Field(
        default=None, min_length=1, max_length=64, description="Sources of the held-out rows."
    )
    validation_fraction: float | None = Field(
        default=None,
        ge=0.001,
        le=0.5,
        description="Share of the training rows that is held out, chosen by the seed. Absent with no validation: 0.1.",
    )
    max_length: int = Field(
        default=2048, ge=16, le=131072, description="Longest row, in tokens; longer rows are dropped and counted."
    )


class LoraFields(ApiModel):
    """Low-rank adaptation (LoRA, arXiv:2106.09685)."""

    rules = (
        Rule(
            "!('all-linear' in self.targetModules) || size(self.targetModules) == 1",
            "targetModules: all-linear stands for all of them; remove it or the other names",
            lambda self: "all-linear" not in self.target_modules or len(self.target_modules) == 1,
        ),
    )

    rank: int = Field(default=16, ge=1, le=512, description="Rank of the update matrices.")
    alpha: int = Field(
        default=32, ge=1, le=4096, description="Scale numerator: the update is multiplied by alpha / rank."
    )
    dropout: float = Field(default=0.0, ge=0.0, le=0.9, description="Dropout on the adapter's input.")
    target_modules: list[ModuleName] = Field(
        default=["all-linear"],
        min_length=1,
        max_length=64,
        description="Linear modules that get an adapter, by name; all-linear for all but the head.",
    )


class Quantization(ApiModel):
    """How the frozen base is held in memory (QLoRA, arXiv:2305.14314)."""

    type: Literal["nf4"] = Field(default="nf4", description="4-bit NormalFloat.")
    double_quantization: bool = Field(default=True, description="Quantise the quantisation constants too.")
    compute_type: Literal["bfloat16", "float32"] | None = Field(
        default=None, description="Type of the matrix products. Absent: bfloat16 on a GPU, float32 on a CPU."
    )


class QloraFields(LoraFields):
    """LoRA over a 4-bit base."""

    quantization: Quantization = Field(default_factory=Quantization, description="How the base is quantised.")


class Method(ApiModel):
    """Exactly one fine-tuning method."""

    rules = (
        Rule(
            "has(self.lora) != has(self.qlora)",
            "method needs exactly one of lora and qlora: keep one and remove the other",
            lambda self: (self.lora is None) != (self.qlora is None),
        ),
    )

    lora: LoraFields | None = Field(default=None, description="LoRA over the base in its own precision.")
    qlora: QloraFields | None = Field(default=None, description="LoRA over a base in 4 bits: less memory, slower.")

    @property
    def fields(self) -> LoraFields:
        """The chosen method's fields."""
        chosen = self.lora or self.qlora
        assert chosen is not None  # noqa: S101 - the validator above holds
        return chosen


class Hyperparameters(ApiModel):
    """How the optimizer runs. An absent field is decided for the user and told in status.resolved."""

    rules = (
        Rule(
            "!(has(self.epochs) && has(self.maxSteps))",
            "hyperparameters.epochs and hyperparameters.maxSteps exclude each other: keep one of them",
            lambda self: self.epochs is None or self.max_steps is None,
        ),
        Rule(
            # the guard against 0 keeps a second, arithmetic error away from the one that `minimum` gives
            "!has(self.microBatchSize) || self.microBatchSize < 1 || "
            f"(has(self.batchSize) ? self.batchSize : {DEFAULT_BATCH_SIZE}) % self.microBatchSize == 0",
            "hyperparameters.microBatchSize must divide hyperparameters.batchSize "
            f"({DEFAULT_BATCH_SIZE} when absent): change one of them",
            lambda self: (
                not self.micro_batch_size or (self.batch_size or DEFAULT_BATCH_SIZE) % self.micro_batch_size == 0
            ),
        ),
    )

    epochs: float | None = Field(
        default=None, ge=0.01, le=1000, description="Passes over the training rows. Absent with no maxSteps: 3."
    )
    max_steps: int | None = Field(default=None, ge=1, le=10_000_000, description="Optimizer steps.")
    learning_rate: float | None = Field(default=None, ge=1e-8, le=1.0, description="Peak learning rate. Absent: 2e-4.")
    batch_size: int | None = Field(default=None, ge=1, le=65536, description="Sequences per optimizer step. Absent: 8.")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Sequences per forward pass; must divide batchSize. Absent: batchSize, at most 8.",
    )
    scheduler: Literal["Cosine", "Linear", "Constant"] = Field(
        default="Cosine", description="Shape of the learning rate after warm-up."
    )
    warmup_ratio: float = Field(
        default=0.03, ge=0.0, le=0.5, description="Share of the steps that raise the learning rate from 0."
    )
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0, description="AdamW weight decay.")
    max_grad_norm: float = Field(
        default=1.0, ge=0.0, le=1000.0, description="Gradients are clipped to this norm; 0 does not clip."
    )
    seed: int = Field(default=42, ge=0, le=2_147_483_647, description="Seed of initialisation, order and dropout.")


class FineTuneJobSpec(ApiModel):
    """What to train, on what, and how."""

    rules = (
        Rule(
            "self == oldSelf",
            "spec is immutable: a FineTuneJob describes one training run; create another FineTuneJob under a new name",
        ),
        Rule(
            "!has(self.resources.gpus) || self.resources.gpus <= 1",
            "resources.gpus: this release trains on one GPU per job, or on the CPU with 0",
            lambda self: self.resources.gpus <= 1,
        ),
    )

    base_model: BaseModelSource = Field(description="The model to adapt.")
    dataset: Dataset = Field(description="The rows to learn from.")
    method: Method = Field(description="Exactly one method.")
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters, description="How the optimizer runs.")
    resources: Resources = Field(default_factory=Resources, description="What the training pod asks for.")
    scheduling: Scheduling = Field(default_factory=Scheduling, description="Where the pods may run.")
    max_attempts: int = Field(
        default=3,
        ge=1,
        le=10,
        description="Attempts after failures that are worth a retry. Pre-emptions are not counted.",
    )


class Stage(StrEnum):
    """What the trainer is doing."""

    PREPARING = "Preparing"
    VALIDATING = "Validating"
    LOADING = "Loading"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    PACKAGING = "Packaging"
    PUBLISHING = "Publishing"


class Phase(StrEnum):
    """Derived from the conditions, for people."""

    PENDING = "Pending"
    VALIDATING = "Validating"
    RUNNING = "Running"
    COMPLETE = "Complete"
    FAILED = "Failed"


class Resolved(StatusModel):
    """What was decided for the user and what the inputs turned out to be. Frozen by the first attempt."""

    base_model_fingerprint: str | None = Field(
        default=None, max_length=128, description="Content fingerprint of the base model."
    )
    dataset_digest: str | None = Field(
        default=None, max_length=128, description="SHA-256 over the training and held-out rows."
    )
    learning_rate: float | None = Field(default=None, description="Peak learning rate.")
    batch_size: int | None = Field(default=None, description="Sequences per optimizer step.")
    micro_batch_size: int | None = Field(default=None, description="Sequences per forward pass.")
    total_steps: int | None = Field(default=None, description="Optimizer steps.")
    target_modules: list[ModuleName] | None = Field(
        default=None, max_length=64, description="Modules that get an adapter."
    )


class Preflight(StatusModel):
    """What the CPU stage counted."""

    rows: int | None = Field(default=None, description="Training rows that are used.")
    validation_rows: int | None = Field(default=None, description="Held-out rows.")
    dropped_rows: int | None = Field(default=None, description="Rows longer than maxLength.")
    tokens: int | None = Field(default=None, description="Tokens in the training rows.")
    trainable_parameters: int | None = Field(default=None, description="Parameters of the adapter.")


class ProgressStatus(StatusModel):
    """How far the running attempt is."""

    stage: Stage | None = Field(default=None, description="What the trainer is doing.")
    step: int | None = Field(default=None, ge=0, description="Optimizer steps done.")
    total_steps: int | None = Field(default=None, ge=0, description="Optimizer steps in all.")
    epoch: Figure = Field(default=None, description="Passes over the training rows.")
    loss: Figure = Field(default=None, description="Training loss of the last logged step, nats per target token.")
    evaluation_loss: Figure = Field(default=None, description="Held-out loss, nats per target token.")
    learning_rate: float | None = Field(default=None, description="Learning rate of the last step.")
    tokens_per_second: Figure = Field(default=None, description="Tokens trained per second.")
    memory_bytes: int | None = Field(default=None, description="Peak memory: of the GPU, or resident memory on a CPU.")
    eta_seconds: int | None = Field(default=None, ge=0, description="Seconds until the last step.")
    update_time: datetime | None = Field(default=None, description="When the trainer wrote this.")


class AttemptOutcome(StrEnum):
    """How an attempt ended."""

    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    PREEMPTED = "Preempted"


class Attempt(StatusModel):
    """One Job of the training stage."""

    name: str = Field(max_length=63, description="Name of the Job.")
    start_time: datetime | None = Field(default=None, description="When its pod started.")
    end_time: datetime | None = Field(default=None, description="When it ended.")
    outcome: AttemptOutcome = Field(default=AttemptOutcome.RUNNING, description="How it ended.")
    reason: FailureReason | None = Field(default=None, description="Why it failed.")
    message: str | None = Field(default=None, max_length=2048, description="Why it failed, as a sentence.")
    node: str | None = Field(default=None, max_length=253, description="Node that ran it.")


class ServableStatus(StatusModel):
    """Whether an engine can load the result."""

    vllm: bool = Field(description="Whether vLLM can serve the adapter.")
    reason: str | None = Field(default=None, max_length=1024, description="Why not.")


class ArtifactStatus(StatusModel):
    """The published adapter."""

    uri: str = Field(max_length=1024, description="Folder in the store.")
    digest: str = Field(max_length=71, pattern=r"^sha256:[0-9a-f]{64}$", description="SHA-256 of tunesmith.json.")
    size_bytes: int = Field(ge=0, description="Size of the folder.")
    servable: ServableStatus = Field(description="Whether an engine can load it.")


class EvaluationStatus(StatusModel):
    """Scores of base and adapter on the held-out rows."""

    base_loss: Figure = Field(default=None, description="Held-out loss of the base, nats per target token.")
    loss: Figure = Field(default=None, description="Held-out loss of the adapter, nats per target token.")
    loss_reduction_percent: Figure = Field(default=None, description="How far the held-out loss fell.")


class FineTuneJobStatus(StatusModel):
    """What was observed."""

    phase: Phase | None = Field(default=None, description="Derived from the conditions.")
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="Validated, Started, Published, and the terminal Complete or Failed.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    observed_generation: int | None = Field(default=None, description="The metadata.generation that was acted on.")
    start_time: datetime | None = Field(default=None, description="When the first attempt started.")
    completion_time: datetime | None = Field(default=None, description="When the job became terminal.")
    resolved: Resolved | None = Field(default=None, description="Decided for the user, and the inputs' digests.")
    preflight: Preflight | None = Field(default=None, description="What the CPU stage counted.")
    progress: ProgressStatus | None = Field(default=None, description="How far the running attempt is.")
    attempts: list[Attempt] = Field(
        default_factory=list,
        max_length=100,
        description="Attempts, oldest first.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    evaluation: EvaluationStatus | None = Field(default=None, description="Held-out loss before and after.")
    artifact: ArtifactStatus | None = Field(default=None, description="The published adapter.")


class FineTuneJob(ApiModel):
    """A base model, data and a method become a trained adapter."""

    model_config = ConfigDict(extra="ignore")
    rules = (
        Rule(
            "size(self.metadata.name) <= 40",
            "metadata.name must have at most 40 characters: names of Jobs and pods are made from it",
            lambda self: len(self.metadata.name) <= MAX_NAME,
        ),
    )

    api_version: Literal["tunesmith.dev/v1alpha1"] = API_VERSION
    kind: Literal["FineTuneJob"] = "FineTuneJob"
    metadata: ObjectMeta
    spec: FineTuneJobSpec
    status: FineTuneJobStatus = Field(default_factory=FineTuneJobStatus)
