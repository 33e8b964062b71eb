"""FineTuneJob: trains an adapter from a base model, data and a method."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field

from tunesmith.api.checkpoint import Checkpoint
from tunesmith.api.continue_from import ContinueFrom
from tunesmith.api.credentials import SecretReference
from tunesmith.api.dataset import DataFormat, Dataset
from tunesmith.api.evaluation import EarlyStopping, Evaluation, Publish, Suite
from tunesmith.api.finetunejob_status import FineTuneJobStatus
from tunesmith.api.hyperparameters import DEFAULT_BATCH_SIZE, Hyperparameters, Optimizer
from tunesmith.api.method import METHODS, QUANTIZED_CEL, SHARDABLE, SHARDABLE_CEL, Method
from tunesmith.api.methods.lora import Initialization, LoraFields
from tunesmith.api.model import API_VERSION, MAX_NAME, ApiModel, ObjectMeta, Rule, quoted
from tunesmith.api.objective import Objective, ObjectiveName
from tunesmith.api.output import Export, Merge, Output, Servable
from tunesmith.api.placement import DataParallelism, TrainingResources, TrainingScheduling
from tunesmith.api.uri import BaseModelUri, secret_rule, uri_rules
from tunesmith.storage.schemes import Use, examples


class BaseModelSource(ApiModel):
    """Location of the base model's folder (config, tokenizer, safetensors)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *uri_rules,
        secret_rule,
        Rule(
            "!has(self.revision) || self.uri.startsWith('hf://')",
            "baseModel.revision is only for hf:// uris: remove it, or set the uri to a copy of that revision",
            lambda self: self.revision is None or self.uri.startswith("hf://"),
        ),
    )

    uri: BaseModelUri = Field(
        description=f"Folder in the layout of a Hugging Face model repository: {examples(Use.BASE_MODEL)}; file:// "
        "in a local run only.",
    )
    revision: str | None = Field(
        default=None, max_length=128, description="Commit, tag or branch of an hf:// model. Absent: main."
    )
    secret_ref: SecretReference | None = Field(
        default=None, description="Credentials for the uri. Absent: those of the store."
    )


FORMATS = {
    ObjectiveName.SFT: frozenset(
        {DataFormat.MESSAGES, DataFormat.PROMPT_COMPLETION, DataFormat.INSTRUCTION, DataFormat.TEXT}
    ),
    ObjectiveName.DPO: frozenset({DataFormat.PREFERENCE}),
    ObjectiveName.ORPO: frozenset({DataFormat.PREFERENCE}),
    ObjectiveName.KTO: frozenset({DataFormat.UNPAIRED_PREFERENCE, DataFormat.PREFERENCE}),
}
"""Data formats that each objective can learn from."""


SHARDED_OPTIMIZERS = (Optimizer.ADAMW, Optimizer.SGD)
"""Optimizers that can train sharded weights."""
_DEFAULT_INITIALIZATION_CEL = " && ".join(
    f"(!has(self.method.{name}) || !has(self.method.{name}.initialization) || "
    f"self.method.{name}.initialization == '{Initialization.DEFAULT}')"
    for name, fields in METHODS.items()
    if "initialization" in fields.model_fields
)
_SHARDED_CEL = "has(self.resources.dataParallelism) && self.resources.dataParallelism == 'FSDP2'"


class FineTuneJobSpec(ApiModel):
    """Base model, data, method and settings of a training run."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            # `has`: the API server checks the default {} of an object before it fills in the defaults inside.
            f"(has(self.hyperparameters.batchSize) ? self.hyperparameters.batchSize : {DEFAULT_BATCH_SIZE}) >= "
            "(has(self.hyperparameters.microBatchSize) ? self.hyperparameters.microBatchSize : 1) * "
            "(has(self.resources.nodes) ? self.resources.nodes : 1) * "
            "(has(self.resources.gpus) && self.resources.gpus > 1 ? self.resources.gpus : 1)",
            f"hyperparameters.batchSize ({DEFAULT_BATCH_SIZE} if absent) must be at least "
            "resources.nodes × resources.gpus × microBatchSize (1 if absent): raise it or lower the others",
            lambda self: (
                (self.hyperparameters.batch_size or DEFAULT_BATCH_SIZE)
                >= (self.hyperparameters.micro_batch_size or 1) * self.resources.ranks
            ),
        ),
        Rule(
            "!has(self.objective) || has(self.objective.sft) || !has(self.dataset.packing) || !self.dataset.packing",
            "dataset.packing is only for objective.sft, because preference rows are not packed: set it to false",
            lambda self: not (self.dataset.packing and self.learns_preferences),
        ),
        Rule(
            "!has(self.objective) || !has(self.objective.kto) || !has(self.hyperparameters.batchSize) || "
            "self.hyperparameters.batchSize > 1",
            "objective.kto compares the rows of a step: set hyperparameters.batchSize to 2 or more",
            lambda self: self.objective_name is not ObjectiveName.KTO or self.hyperparameters.batch_size != 1,
        ),
        Rule(
            "!has(self.objective) || has(self.objective.sft) || !has(self.dataset.lossOn)",
            "dataset.lossOn is only for objective.sft, because dpo, orpo and kto compare whole answers: remove it",
            lambda self: not (self.dataset.loss_on and self.learns_preferences),
        ),
        Rule(
            "!has(self.dataset.format) || self.dataset.format == 'Auto' || (self.dataset.format == 'Preference' ? "
            "has(self.objective) && !has(self.objective.sft) : "
            "self.dataset.format == 'UnpairedPreference' ? has(self.objective) && has(self.objective.kto) : "
            "!has(self.objective) || has(self.objective.sft))",
            "dataset.format does not match the objective: dpo, orpo and kto train on Preference, kto also on "
            "UnpairedPreference, sft on the other formats; change one of them",
            lambda self: self.dataset.format is DataFormat.AUTO or self.dataset.format in FORMATS[self.objective_name],
        ),
        Rule(
            "!has(self.method) || !has(self.method.full) || !has(self.objective) || has(self.objective.sft) || "
            "has(self.objective.orpo)",
            "method.full supports the objectives sft and orpo only: dpo and kto need the unchanged base model at each "
            "step; use another method or objective",
            lambda self: self.method.full is None or self.objective_name not in {ObjectiveName.DPO, ObjectiveName.KTO},
        ),
        Rule(
            f"!has(self.output) || !has(self.output.merge) || self.output.merge != 'Dequantized' || "
            f"(has(self.method) && {QUANTIZED_CEL})",
            "output.merge: Dequantized needs a base model in 4 bits (method.qlora or a method's quantization): use "
            "Original",
            lambda self: (
                self.output is None
                or self.output.merge is not Merge.DEQUANTIZED
                or self.method.quantization is not None
            ),
        ),
        Rule(
            f"!({_SHARDED_CEL}) || !has(self.method) || {SHARDABLE_CEL}",
            f"resources.dataParallelism: FSDP2 supports {', '.join(SHARDABLE[:-1])} and {SHARDABLE[-1]}, except dora of"
            " qlora and the initializations EVA, CorDA, LoRAGA and LoftQ: use another method or initialization, or DDP",
            lambda self: self.resources.data_parallelism is not DataParallelism.FSDP2 or self.method.shardable,
        ),
        Rule(
            f"!({_SHARDED_CEL} && has(self.method) && has(self.method.full)) || "
            "!has(self.hyperparameters.optimizer) || "
            f"self.hyperparameters.optimizer in {quoted(SHARDED_OPTIMIZERS)}",
            f"hyperparameters.optimizer: with FSDP2, method.full supports {' and '.join(SHARDED_OPTIMIZERS)} only: use"
            " one of them, or DDP",
            lambda self: (
                self.resources.data_parallelism is not DataParallelism.FSDP2
                or self.method.full is None
                or self.hyperparameters.optimizer in SHARDED_OPTIMIZERS
            ),
        ),
        Rule(
            "!has(self.method) || !has(self.method.adaLora) || !has(self.evaluation) || "
            "!has(self.evaluation.earlyStopping) && "
            "(!has(self.evaluation.publish) || self.evaluation.publish == 'Last')",
            "evaluation.publish: Best and evaluation.earlyStopping do not support method.adaLora, whose ranks are "
            "final only after the last step: remove them, or use another method",
            lambda self: self.method.ada_lora is None or (self.publish is Publish.LAST and self.early_stopping is None),
        ),
        Rule(
            "has(self.method) || has(self.continueFrom)",
            "method is missing: set it, such as method: {lora: {}}; only a job with continueFrom may leave it out",
            lambda self: self.requested_method is not None or self.continue_from is not None,
        ),
        Rule(
            "!has(self.continueFrom) || !has(self.method) || !has(self.method.full)",
            "continueFrom starts from an adapter, and method.full trains none: remove continueFrom, or use the merged "
            "model as baseModel",
            lambda self: self.continue_from is None or self.method.full is None,
        ),
        Rule(
            f"!has(self.continueFrom) || !has(self.method) || {_DEFAULT_INITIALIZATION_CEL}",
            "continueFrom starts from the adapter's weights, so they are not initialized: remove "
            "initialization from the method",
            lambda self: (
                self.continue_from is None
                or getattr(self.method.fields, "initialization", Initialization.DEFAULT) is Initialization.DEFAULT
            ),
        ),
    )

    base_model: BaseModelSource = Field(description="Base model to adapt.")
    dataset: Dataset = Field(description="Rows to train on.")
    objective: Objective | None = Field(default=None, description="Training objective; exactly one field. Absent: sft.")
    requested_method: Method | None = Field(
        default=None,
        alias="method",
        description="Fine-tuning method; exactly one field. Required, except with continueFrom. Absent: that of the "
        "adapter in continueFrom.",
    )
    continue_from: ContinueFrom | None = Field(
        default=None,
        description="Adapter whose weights training starts from, on the same base model; exactly one field. The "
        "method must be the adapter's, with the same rank, alpha and modules, or absent. The optimizer starts fresh. "
        "Absent: training starts from a new adapter.",
    )
    hyperparameters: Hyperparameters = Field(
        default_factory=Hyperparameters, description="Hyperparameters of the training run."
    )
    evaluation: Evaluation | None = Field(
        default=None, description="Evaluation of base model and adapter. Absent: the held-out loss, without gates."
    )
    output: Output | None = Field(default=None, description="Outputs besides the adapter. Absent: none.")
    servable: Servable = Field(
        default=Servable.IGNORED,
        description="Requirement that vLLM can load the result. Required: the job fails with NotServable before "
        "training if it cannot. Ignored: the job trains in any case. See status.preflight.servable.",
    )
    resources: TrainingResources = Field(
        default_factory=TrainingResources, description="Resources and number of the training pods."
    )
    scheduling: TrainingScheduling = Field(
        default_factory=TrainingScheduling, description="Scheduling constraints and queue of the training pods."
    )
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="Interval and retention of checkpoints.")
    max_attempts: int = Field(
        default=3,
        ge=1,
        le=10,
        description="Maximum number of attempts that fail for retryable reasons. Pre-emptions and suspensions do not "
        "count.",
    )
    active_deadline_seconds: int | None = Field(
        default=None,
        ge=1,
        le=2**31 - 1,
        description="Seconds after status.startTime at which the job fails, excluding time suspended or in a queue."
        " Absent: no limit. Mutable.",
    )
    ttl_seconds_after_finished: int | None = Field(
        default=None,
        ge=0,
        le=2**31 - 1,
        description="Seconds after status.completionTime at which the FineTuneJob is deleted, but not while an "
        "AdapterDeployment or an unfinished FineTuneJob names it. Its artifact stays in the store. Absent: it is kept. "
        "Mutable.",
    )
    suspend: bool = Field(
        default=False,
        description="True: save a checkpoint, stop the running attempt and start no other. False: resume from the last"
        " checkpoint. Mutable.",
    )

    @property
    def method(self) -> Method:
        """Fine-tuning method; if continueFrom determines it, plain LoRA until the trainer has read that adapter."""
        return self.requested_method or Method(lora=LoraFields())

    @property
    def objective_name(self) -> ObjectiveName:
        """Name of the objective; sft if none is set."""
        return ObjectiveName.SFT if self.objective is None else self.objective.name

    @property
    def publishes_whole_model(self) -> bool:
        """True if the result includes a model with all weights: merged, or fully trained."""
        merged = self.output is not None and self.output.merge is not Merge.NONE
        return merged or self.method.full is not None

    @property
    def shardable(self) -> bool:
        """True if the base's weights can be sharded over ranks."""
        whole = self.method.full is not None and self.hyperparameters.optimizer not in SHARDED_OPTIMIZERS
        return self.method.shardable and not whole

    @property
    def publish(self) -> Publish:
        """Step whose weights are published."""
        if self.evaluation is not None and self.evaluation.publish is not None:
            return self.evaluation.publish
        return Publish.LAST if self.learns_preferences or self.method.ada_lora is not None else Publish.BEST

    @property
    def early_stopping(self) -> EarlyStopping | None:
        """Condition under which training stops early; None if all steps are taken."""
        return self.evaluation.early_stopping if self.evaluation is not None else None

    @property
    def suites(self) -> list[Suite]:
        """Evaluation suites besides the held-out loss."""
        return (self.evaluation.suites or []) if self.evaluation is not None else []

    @property
    def exports(self) -> list[Export]:
        """Copies of the artifact to write."""
        return (self.output.exports if self.output else None) or []

    @property
    def learns_preferences(self) -> bool:
        """True if the objective compares answers instead of learning them."""
        return self.objective_name is not ObjectiveName.SFT

    @property
    def learning_rate(self) -> float:
        """Peak learning rate. Preference objectives diverge at rates that suit supervised fine-tuning."""
        own = self.method.learning_rate
        return self.hyperparameters.learning_rate or (own / 10 if self.learns_preferences else own)


_MUTABLE = frozenset({"suspend", "active_deadline_seconds", "ttl_seconds_after_finished"})


def _kept(name: str) -> str:
    """Return the CEL expression that is true if the field did not change, absent or not."""
    return f"(has(self.{name}) ? has(oldSelf.{name}) && self.{name} == oldSelf.{name} : !has(oldSelf.{name}))"


FineTuneJobSpec.rules = (
    Rule(
        " && ".join(
            _kept(str(field.alias)) for name, field in FineTuneJobSpec.model_fields.items() if name not in _MUTABLE
        ),
        "spec is immutable except for suspend, activeDeadlineSeconds and ttlSecondsAfterFinished: create another "
        "FineTuneJob under a new name",
    ),
    *FineTuneJobSpec.rules,
)


class FineTuneJob(ApiModel):
    """A run that trains an adapter from a base model, data and a method."""

    model_config = ConfigDict(extra="ignore")
    rules = (
        Rule(
            "size(self.metadata.name) <= 40",
            "metadata.name must have at most 40 characters, because it is part of the names of Jobs and pods",
            lambda self: len(self.metadata.name) <= MAX_NAME,
        ),
        Rule(
            "!has(self.spec.resources.nodes) || self.spec.resources.nodes <= 1 || !self.metadata.name.contains('.')",
            "metadata.name must not contain '.' if resources.nodes is above 1, because it is part of host names",
            lambda self: self.spec.resources.nodes <= 1 or "." not in self.metadata.name,
        ),
        Rule(
            "!has(self.spec.continueFrom) || !has(self.spec.continueFrom.fineTuneJob) || "
            "self.spec.continueFrom.fineTuneJob.name != self.metadata.name",
            "spec.continueFrom.fineTuneJob must name another FineTuneJob than this one",
            lambda self: (
                self.spec.continue_from is None
                or self.spec.continue_from.fine_tune_job is None
                or self.spec.continue_from.fine_tune_job.name != self.metadata.name
            ),
        ),
    )

    api_version: Literal["tunesmith.dev/v1alpha1"] = API_VERSION
    kind: Literal["FineTuneJob"] = "FineTuneJob"
    metadata: ObjectMeta
    spec: FineTuneJobSpec
    status: FineTuneJobStatus = Field(default_factory=FineTuneJobStatus)
