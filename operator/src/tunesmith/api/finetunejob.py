"""FineTuneJob: a base model, data and a method become a trained adapter."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field

from tunesmith.api.checkpoint import Checkpoint
from tunesmith.api.dataset import Dataset
from tunesmith.api.evaluation import Evaluation
from tunesmith.api.finetunejob_status import FineTuneJobStatus
from tunesmith.api.hyperparameters import Hyperparameters
from tunesmith.api.method import Method
from tunesmith.api.model import API_VERSION, MAX_NAME, ApiModel, ObjectMeta, Rule, SecretReference, Uri, uri_rules
from tunesmith.api.output import Merge, Output
from tunesmith.api.placement import Resources, TrainingScheduling


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


class FineTuneJobSpec(ApiModel):
    """What to train, on what, and how."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.resources.gpus) || self.resources.gpus <= 1",
            "resources.gpus: this release trains on one GPU per job, or on the CPU with 0",
            lambda self: self.resources.gpus <= 1,
        ),
        Rule(
            "!has(self.output) || !has(self.output.merge) || self.output.merge != 'Dequantized' || "
            "has(self.method.qlora)",
            "output.merge: Dequantized belongs to method.qlora, other bases are not in 4 bits: use Original",
            lambda self: (
                self.output is None or self.output.merge is not Merge.DEQUANTIZED or self.method.qlora is not None
            ),
        ),
    )

    base_model: BaseModelSource = Field(description="The model to adapt.")
    dataset: Dataset = Field(description="The rows to learn from.")
    method: Method = Field(description="Exactly one method.")
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters, description="How the optimizer runs.")
    evaluation: Evaluation | None = Field(
        default=None, description="What base and adapter are scored on; absent: the held-out loss, without a limit."
    )
    output: Output | None = Field(default=None, description="What is written beside the adapter; absent: nothing.")
    resources: Resources = Field(default_factory=Resources, description="What the training pod asks for.")
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


_MUTABLE = frozenset({"suspend", "active_deadline_seconds"})


def _kept(name: str) -> str:
    """CEL: the field is as it was, absent or not."""
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
