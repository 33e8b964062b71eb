"""FineTuneJob: trains an adapter from a base model, data and a method."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field

from tunesmith.api.checkpoint import Checkpoint
from tunesmith.api.credentials import SecretReference
from tunesmith.api.dataset import DataFormat, Dataset
from tunesmith.api.evaluation import Evaluation, Suite
from tunesmith.api.finetunejob_status import FineTuneJobStatus
from tunesmith.api.hyperparameters import DEFAULT_BATCH_SIZE, Hyperparameters, Optimizer
from tunesmith.api.method import QUANTIZED_CEL, SHARDABLE, SHARDABLE_CEL, Method
from tunesmith.api.model import API_VERSION, MAX_NAME, ApiModel, ObjectMeta, Rule, quoted
from tunesmith.api.objective import Objective, ObjectiveName
from tunesmith.api.output import Export, Merge, Output, Servable
from tunesmith.api.placement import DataParallelism, TrainingResources, TrainingScheduling
from tunesmith.api.uri import BaseModelUri, secret_rule, uri_rules
from tunesmith.storage.schemes import Use, examples


class BaseModelSource(ApiModel):
    """Location of the base model's folder (config, tokenizer, safetensors)."""

    rules = (
        *uri_rules,
        secret_rule,
        Rule(
            "!has(self.revision) || self.uri.startsWith('hf://')",
            "baseModel.revision belongs to an hf:// uri: remove it, or name a copy of that revision in the uri",
            lambda self: self.revision is None or self.uri.startswith("hf://"),
        ),
    )

    uri: BaseModelUri = Field(
        description=f"Folder in the layout of the Hugging Face Hub: {examples(Use.BASE_MODEL)}; file:// in a local "
        "run only.",
    )
    revision: str | None = Field(
        default=None, max_length=128, description="Commit, tag or branch of an hf:// model; absent: main."
    )
    secret_ref: SecretReference | None = Field(
        default=None, description="Credentials for the uri; absent: those of the store."
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
            f"hyperparameters.batchSize ({DEFAULT_BATCH_SIZE} when absent) leaves nothing to do for some of "
            "resources.nodes × resources.gpus: it must be at least their number times microBatchSize (1 when absent)",
            lambda self: (
                (self.hyperparameters.batch_size or DEFAULT_BATCH_SIZE)
                >= (self.hyperparameters.micro_batch_size or 1) * self.resources.ranks
            ),
        ),
        Rule(
            "!has(self.objective) || has(self.objective.sft) || !has(self.dataset.packing) || !self.dataset.packing",
            "dataset.packing belongs to objective.sft: preference rows are not packed, set it to false",
            lambda self: not (self.dataset.packing and self.learns_preferences),
        ),
        Rule(
            "!has(self.objective) || !has(self.objective.kto) || !has(self.hyperparameters.batchSize) || "
            "self.hyperparameters.batchSize > 1",
            "objective.kto compares the rows of a step with each other: set hyperparameters.batchSize to 2 or more",
            lambda self: self.objective_name is not ObjectiveName.KTO or self.hyperparameters.batch_size != 1,
        ),
        Rule(
            "!has(self.objective) || has(self.objective.sft) || !has(self.dataset.lossOn)",
            "dataset.lossOn belongs to objective.sft: dpo, orpo and kto compare whole answers, remove it",
            lambda self: not (self.dataset.loss_on and self.learns_preferences),
        ),
        Rule(
            "!has(self.dataset.format) || self.dataset.format == 'Auto' || (self.dataset.format == 'Preference' ? "
            "has(self.objective) && !has(self.objective.sft) : "
            "self.dataset.format == 'UnpairedPreference' ? has(self.objective) && has(self.objective.kto) : "
            "!has(self.objective) || has(self.objective.sft))",
            "dataset.format does not go with the objective: dpo, orpo and kto learn from Preference, kto from "
            "UnpairedPreference too, sft from the others; change one of them",
            lambda self: self.dataset.format is DataFormat.AUTO or self.dataset.format in FORMATS[self.objective_name],
        ),
        Rule(
            "!has(self.method.full) || !has(self.objective) || has(self.objective.sft) || has(self.objective.orpo)",
            "method.full goes with objective sft and orpo: dpo and kto compare with the base at each step, which full "
            "fine-tuning changes; use another method or objective",
            lambda self: self.method.full is None or self.objective_name not in {ObjectiveName.DPO, ObjectiveName.KTO},
        ),
        Rule(
            f"!has(self.output) || !has(self.output.merge) || self.output.merge != 'Dequantized' || {QUANTIZED_CEL}",
            "output.merge: Dequantized belongs to method.qlora and to quantization, this base is not in 4 bits: use "
            "Original",
            lambda self: (
                self.output is None
                or self.output.merge is not Merge.DEQUANTIZED
                or self.method.quantization is not None
            ),
        ),
        Rule(
            f"!({_SHARDED_CEL}) || {SHARDABLE_CEL}",
            f"resources.dataParallelism: FSDP2 goes with {', '.join(SHARDABLE[:-1])} and {SHARDABLE[-1]}, without dora"
            " of qlora and the initializations that look at rows (EVA, CorDA, LoRAGA) or compute the base's weights"
            " again (LoftQ): use another method or initialization, or DDP",
            lambda self: self.resources.data_parallelism is not DataParallelism.FSDP2 or self.method.shardable,
        ),
        Rule(
            f"!({_SHARDED_CEL} && has(self.method.full)) || !has(self.hyperparameters.optimizer) || "
            f"self.hyperparameters.optimizer in {quoted(SHARDED_OPTIMIZERS)}",
            f"hyperparameters.optimizer: with FSDP2, method.full is trained with {' or '.join(SHARDED_OPTIMIZERS)}; the"
            " others need each weight whole",
            lambda self: (
                self.resources.data_parallelism is not DataParallelism.FSDP2
                or self.method.full is None
                or self.hyperparameters.optimizer in SHARDED_OPTIMIZERS
            ),
        ),
    )

    base_model: BaseModelSource = Field(description="The model to adapt.")
    dataset: Dataset = Field(description="The rows to learn from.")
    objective: Objective | None = Field(
        default=None, description="What is learned from the rows, exactly one; absent: sft."
    )
    method: Method = Field(description="Exactly one method.")
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters, description="How the optimizer runs.")
    evaluation: Evaluation | None = Field(
        default=None, description="What base and adapter are scored on; absent: the held-out loss, without a limit."
    )
    output: Output | None = Field(default=None, description="What is written beside the adapter; absent: nothing.")
    servable: Servable = Field(
        default=Servable.IGNORED,
        description="Must vLLM be able to load the result as it is? Required fails the job with NotServable before it "
        "trains where it cannot; Ignored trains anyway. status.preflight.servable tells either way.",
    )
    resources: TrainingResources = Field(
        default_factory=TrainingResources, description="What the training pods ask for, and how many there are."
    )
    scheduling: TrainingScheduling = Field(
        default_factory=TrainingScheduling, description="Where the pods may run, and which queue admits them."
    )
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="How often the training state is saved.")
    max_attempts: int = Field(
        default=3,
        ge=1,
        le=10,
        description="Attempts after failures that are worth a retry. Pre-emptions and suspensions are not counted.",
    )
    active_deadline_seconds: int | None = Field(
        default=None,
        ge=1,
        le=2**31 - 1,
        description="Seconds after status.startTime at which the job fails, not counting the time that it is suspended"
        " or waits in a queue; absent: no limit. May be changed while the job runs.",
    )
    suspend: bool = Field(
        default=False,
        description="True stops the running attempt with a checkpoint and starts no other; false goes on from there."
        " May be changed at any time.",
    )

    @property
    def objective_name(self) -> ObjectiveName:
        """Name of the objective; sft if none is set."""
        return ObjectiveName.SFT if self.objective is None else self.objective.name

    @property
    def shardable(self) -> bool:
        """True if the base's weights can be sharded over ranks."""
        whole = self.method.full is not None and self.hyperparameters.optimizer not in SHARDED_OPTIMIZERS
        return self.method.shardable and not whole

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


_MUTABLE = frozenset({"suspend", "active_deadline_seconds"})


def _kept(name: str) -> str:
    """Return the CEL expression that is true if the field did not change, absent or not."""
    return f"(has(self.{name}) ? has(oldSelf.{name}) && self.{name} == oldSelf.{name} : !has(oldSelf.{name}))"


FineTuneJobSpec.rules = (
    Rule(
        " && ".join(
            _kept(str(field.alias)) for name, field in FineTuneJobSpec.model_fields.items() if name not in _MUTABLE
        ),
        "spec is immutable but for suspend and activeDeadlineSeconds: a FineTuneJob describes one training run; "
        "create another FineTuneJob under a new name",
    ),
    *FineTuneJobSpec.rules,
)


class FineTuneJob(ApiModel):
    """A run that trains an adapter from a base model, data and a method."""

    model_config = ConfigDict(extra="ignore")
    rules = (
        Rule(
            "size(self.metadata.name) <= 40",
            "metadata.name must have at most 40 characters: names of Jobs and pods are made from it",
            lambda self: len(self.metadata.name) <= MAX_NAME,
        ),
        Rule(
            "!has(self.spec.resources.nodes) || self.spec.resources.nodes <= 1 || !self.metadata.name.contains('.')",
            "metadata.name must have no '.' where resources.nodes is more than 1: names of hosts are made from it",
            lambda self: self.spec.resources.nodes <= 1 or "." not in self.metadata.name,
        ),
    )

    api_version: Literal["tunesmith.dev/v1alpha1"] = API_VERSION
    kind: Literal["FineTuneJob"] = "FineTuneJob"
    metadata: ObjectMeta
    spec: FineTuneJobSpec
    status: FineTuneJobStatus = Field(default_factory=FineTuneJobStatus)
