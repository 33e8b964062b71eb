"""Observed state of a FineTuneJob."""

from __future__ import annotations

import math
from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, Field

from tunesmith.api.conditions import Condition, FailureReason
from tunesmith.api.evaluation import MAX_METRIC, MAX_SCORES
from tunesmith.api.hyperparameters import Precision
from tunesmith.api.methods.fields import ModuleName
from tunesmith.api.model import StatusModel
from tunesmith.api.placement import DataParallelism


def _rounded(value: float | None) -> float | None:
    """Return the value with four decimals, which are enough for people; None for a value that is not finite."""
    return round(value, 4) if value is not None and math.isfinite(value) else None


def _finite(value: float | None) -> float | None:
    """Return the value; None if it is not finite and so has no JSON form."""
    return value if value is not None and math.isfinite(value) else None


LOSS_UNIT = "nats per target token; with another objective than sft its own loss"
RoundedFloat = Annotated[float | None, AfterValidator(_rounded)]
FiniteFloat = Annotated[float | None, AfterValidator(_finite)]
Count = Annotated[int, Field(ge=0, le=2**53)]
"""Number of items. Not every JSON reader represents larger integers exactly."""


class Stage(StrEnum):
    """Current activity of the trainer."""

    PREPARING = "Preparing"
    VALIDATING = "Validating"
    LOADING = "Loading"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    PACKAGING = "Packaging"
    PUBLISHING = "Publishing"
    EXPORTING = "Exporting"


class Phase(StrEnum):
    """Summary of the conditions, for people."""

    PENDING = "Pending"
    VALIDATING = "Validating"
    QUEUED = "Queued"
    RUNNING = "Running"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"


class TaskFolderStatus(StatusModel):
    """Folder with the job's own evaluation tasks."""

    suite: str = Field(max_length=32, description="Name of the suite that brings it.")
    digest: str = Field(max_length=71, description="SHA-256 of the names and the content of its files.")


class Resolved(StatusModel):
    """Values that were chosen for the user, and facts about the inputs. Fixed by the first attempt."""

    base_model_fingerprint: str | None = Field(
        default=None, max_length=128, description="Content fingerprint of the base model."
    )
    dataset_digest: str | None = Field(
        default=None, max_length=128, description="SHA-256 over the training and held-out rows."
    )
    task_folders: list[TaskFolderStatus] | None = Field(
        default=None, max_length=8, description="What lmEval.taskFolder of each suite holds; absent: no suite has one."
    )
    learning_rate: FiniteFloat = Field(default=None, description="Peak learning rate.")
    batch_size: Count | None = Field(default=None, description="Sequences per optimizer step.")
    micro_batch_size: Count | None = Field(default=None, description="Sequences per forward pass.")
    gradient_checkpointing: bool | None = Field(
        default=None, description="Whether activations are computed again in the backward pass, which saves memory."
    )
    torch_compile: bool | None = Field(
        default=None, description="Whether norms and feed-forward layers are compiled, where that is possible."
    )
    precision: Precision | None = Field(
        default=None, description="Type of the frozen weights and of the matrix products."
    )
    data_parallelism: DataParallelism | None = Field(
        default=None, description="What each of several GPUs holds of the base model; absent with one process."
    )
    total_steps: Count | None = Field(default=None, description="Optimizer steps.")
    evaluation_every_steps: Count | None = Field(
        default=None, description="Optimizer steps between two looks at the held-out loss while training."
    )
    target_modules: list[ModuleName] | None = Field(
        default=None, max_length=64, description="Modules that get an adapter."
    )


class Verdict(StrEnum):
    """Verdict on whether a run fits into a GPU's memory."""

    FITS = "Fits"
    WILL_NOT_FIT = "WillNotFit"
    UNKNOWN = "Unknown"


class PeakParts(StatusModel):
    """Parts of a GPU's estimated peak memory."""

    weights_bytes: Count = Field(description="The base model.")
    trainable_bytes: Count = Field(description="Trained parameters, their gradients and the optimizer's state.")
    activations_bytes: Count = Field(description="What the backward pass needs of the forward pass of a micro-batch.")
    logits_bytes: Count = Field(description="Scores over the vocabulary, and the loss.")
    overhead_bytes: Count = Field(description="Context, workspaces and fragmentation.")


class DropReason(StrEnum):
    """Reason for dropping a row."""

    UNDECODABLE = "Undecodable"
    NULL = "Null"
    EMPTY = "Empty"
    DUPLICATE = "Duplicate"
    OVERLONG = "Overlong"
    NO_TARGET = "NoTarget"


class DroppedRows(StatusModel):
    """Rows that were dropped for one reason."""

    reason: DropReason = Field(
        description="Undecodable: no JSON, no UTF-8, or too many or few cells. Null, Empty: nothing where text must "
        "be. Duplicate: was there before. Overlong: more than maxLength tokens. NoTarget: no token of it is learned."
    )
    rows: Count = Field(description="How many.")
    examples: list[Annotated[str, Field(max_length=256)]] | None = Field(
        default=None, max_length=3, description="The first of them: file, line and what is wrong."
    )


class AlsoTrained(StatusModel):
    """Rows that are both scored and trained on."""

    suite: str | None = Field(
        default=None, max_length=32, description="Suite of evaluation.suites that has them; absent: the held-out rows."
    )
    rows: int = Field(ge=1, description="How many.")
    scored_rows: int = Field(ge=1, description="Of how many.")
    examples: list[Annotated[str, Field(max_length=256)]] | None = Field(
        default=None, max_length=3, description="The first of them: file and line."
    )

    @property
    def sentence(self) -> str:
        """Effect of the overlap, and how to remove it."""
        are = "is" if self.rows == 1 else "are"
        if self.suite is None:
            which, scores, place = "held-out rows", "evaluation.loss flatters", "dataset.validation"
        else:
            which, scores, place = f"rows of suite {self.suite}", "its scores flatter", "the suite's data set"
        return (
            f"{self.rows} of {self.scored_rows} {which} {are} also trained on: {scores} the adapter, take them out of"
            f" {place} or of dataset.train"
        )


class ServableStatus(StatusModel):
    """Result of the check that an engine can load the adapter."""

    vllm: bool = Field(description="Whether vLLM can serve the adapter.")
    reason: str | None = Field(default=None, max_length=1024, description="Why not.")


class Preflight(StatusModel):
    """Counts of the CPU stage, and whether the run fits into the GPU."""

    rows: Count | None = Field(
        default=None,
        description="Training rows of an epoch, with the sources' weights; for objective.kto a pair of answers is two.",
    )
    validation_rows: Count | None = Field(default=None, description="Held-out rows.")
    dropped_rows: Count | None = Field(
        default=None, description="Rows that are not used, of the training and held-out rows; why stands in dropped."
    )
    dropped: list[DroppedRows] | None = Field(
        default=None, max_length=8, description="By reason, the rows that are not used; absent: all are."
    )
    also_trained: list[AlsoTrained] | None = Field(
        default=None,
        max_length=9,
        description="Rows that are scored and trained on too, which flatters the scores; absent: there are none.",
    )
    truncated_rows: Count | None = Field(
        default=None, description="Rows that lost their end to maxLength; absent: overlong is not Truncate."
    )
    packed_sequences: Count | None = Field(
        default=None, description="Sequences that the training rows are packed into; absent without packing."
    )
    tokens: Count | None = Field(default=None, description="Tokens in the training rows.")
    target_tokens: Count | None = Field(default=None, description="Tokens of those that are learned.")
    trainable_parameters: Count | None = Field(default=None, description="Parameters that are trained.")
    servable: ServableStatus | None = Field(
        default=None, description="Whether vLLM will be able to load the result as it is."
    )
    estimated_peak_bytes: Count | None = Field(
        default=None, description="Estimated peak memory of the GPU, bytes, within about 15 %; absent without a GPU."
    )
    peak_parts: PeakParts | None = Field(default=None, description="What the estimated peak is made of.")
    gpu_memory_bytes: Count | None = Field(
        default=None, description="Memory of the smallest GPU that the job may get, bytes; absent: not known."
    )
    verdict: Verdict | None = Field(
        default=None,
        description="Whether it fits; Unknown where the GPU's memory is not known, or where the estimate's own error"
        " could decide it.",
    )
    suggestion: str | None = Field(
        default=None, max_length=1024, description="The change that makes it fit and costs least."
    )


class ProgressStatus(StatusModel):
    """Progress of the running attempt."""

    stage: Stage | None = Field(default=None, description="What the trainer is doing.")
    outage: str | None = Field(
        default=None, max_length=2048, description="A store that does not answer, and when it is tried again."
    )
    step: Count | None = Field(default=None, description="Optimizer steps done.")
    total_steps: Count | None = Field(default=None, description="Optimizer steps in all.")
    epoch: RoundedFloat = Field(default=None, description="Passes over the training rows.")
    loss: RoundedFloat = Field(default=None, description=f"Training loss of the last step, {LOSS_UNIT}.")
    evaluation_loss: RoundedFloat = Field(
        default=None, description=f"Held-out loss of the adapter when it was last looked at, {LOSS_UNIT}."
    )
    learning_rate: FiniteFloat = Field(default=None, description="Learning rate of the last step.")
    tokens_per_second: RoundedFloat = Field(default=None, description="Tokens trained per second.")
    memory_bytes: Count | None = Field(
        default=None, description="Peak memory: of the GPU, or resident memory on a CPU."
    )
    eta_seconds: Count | None = Field(default=None, description="Seconds until the last step.")
    update_time: AwareDatetime | None = Field(
        default=None, description="When the trainer wrote this, never later than the operator read it."
    )


class AttemptOutcome(StrEnum):
    """Outcome of an attempt."""

    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    PREEMPTED = "Preempted"
    SUSPENDED = "Suspended"


class Attempt(StatusModel):
    """One Job of the training stage."""

    name: str = Field(max_length=63, description="Name of the Job.")
    start_time: datetime | None = Field(default=None, description="When its pod started, the last time.")
    end_time: datetime | None = Field(default=None, description="When it ended.")
    outcome: AttemptOutcome = Field(default=AttemptOutcome.RUNNING, description="How it ended.")
    reason: FailureReason | None = Field(default=None, description="Why it failed.")
    message: str | None = Field(default=None, max_length=2048, description="Why it failed, as a sentence.")
    resumed_from_step: Count | None = Field(
        default=None, description="Step of the checkpoint that it went on from. Absent: it began at step 0."
    )
    last_step: Count | None = Field(
        default=None, description="Last optimizer step that was seen of it. Absent: none, or it is running."
    )
    node: str | None = Field(
        default=None,
        max_length=280,
        description="Node that ran it; of several, that of the first pod, and how many more there are.",
    )


class ExportStatus(StatusModel):
    """Outcome of an entry of output.exports."""

    uri: str | None = Field(default=None, max_length=1024, description="Folder of the copy.")
    hub: str | None = Field(default=None, max_length=193, description="Repository of the Hugging Face Hub.")
    exported: bool = Field(description="Whether the whole copy is there.")
    reason: FailureReason | None = Field(default=None, description="Why it is not.")
    message: str | None = Field(default=None, max_length=1024, description="Why it is not, as a sentence.")


class ArtifactStatus(StatusModel):
    """The published adapter."""

    uri: str = Field(max_length=1024, description="Folder in the store.")
    digest: str = Field(max_length=71, pattern=r"^sha256:[0-9a-f]{64}$", description="SHA-256 of tunesmith.json.")
    size_bytes: Count = Field(description="Size of the folder.")
    servable: ServableStatus = Field(description="Whether an engine can load it.")
    exports: list[ExportStatus] | None = Field(
        default=None, max_length=8, description="What became of spec.output.exports, in their order."
    )


class Score(StatusModel):
    """Score of one metric of one suite."""

    suite: str = Field(max_length=32, description="Name of the suite.")
    metric: str = Field(max_length=MAX_METRIC, description="Name of the metric.")
    base: RoundedFloat = Field(default=None, description="The base's score.")
    adapter: RoundedFloat = Field(default=None, description="The adapter's score.")


class GateStatus(StatusModel):
    """Outcome of a gate."""

    suite: str = Field(max_length=32, description="Name of the suite.")
    metric: str = Field(max_length=MAX_METRIC, description="Name of the metric.")
    value: RoundedFloat = Field(default=None, description="What was reached.")
    min: FiniteFloat = Field(default=None, description="Least value that passes.")
    max: FiniteFloat = Field(default=None, description="Greatest value that passes.")
    passed: bool = Field(description="Whether the value keeps the limits.")


class SuiteFailure(StatusModel):
    """A suite that could not be scored. The artifact is published nevertheless."""

    suite: str = Field(max_length=32, description="Name of the suite.")
    reason: FailureReason = Field(description="Why it has no scores.")
    message: str = Field(max_length=1024, description="Why it has no scores, as a sentence.")


class EvaluationStatus(StatusModel):
    """Scores of base and adapter from the same run."""

    base_loss: RoundedFloat = Field(default=None, description=f"Held-out loss of the base, {LOSS_UNIT}.")
    loss: RoundedFloat = Field(default=None, description=f"Held-out loss of the adapter, {LOSS_UNIT}.")
    loss_reduction_percent: RoundedFloat = Field(default=None, description="How far the held-out loss fell.")
    scores: list[Score] | None = Field(default=None, max_length=MAX_SCORES, description="Scores of evaluation.suites.")
    gates: list[GateStatus] | None = Field(default=None, max_length=16, description="What became of the gates.")
    failures: list[SuiteFailure] | None = Field(
        default=None,
        max_length=8,
        description="Suites whose tasks failed on what the models say; they have no scores, or not all, and gates on"
        " those that are missing do not pass. Absent: all were scored.",
    )

    @property
    def unscored(self) -> str:
        """Messages of the suites without scores, as one sentence; empty if all were scored."""
        return "; ".join(one.message for one in self.failures or [])


class FineTuneJobStatus(StatusModel):
    """Observed state of a FineTuneJob."""

    phase: Phase | None = Field(default=None, description="Derived from the conditions.")
    reason: str | None = Field(
        default=None, max_length=64, description="Reason of the condition that the phase is derived from."
    )
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="Validated, Admitted (with a queue), Started, Suspended, Published, Exported (with exports), and "
        "Complete or Failed.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    observed_generation: Count | None = Field(default=None, description="The metadata.generation that was acted on.")
    start_time: datetime | None = Field(default=None, description="When the first attempt started.")
    completion_time: datetime | None = Field(default=None, description="When the job became terminal.")
    paused_seconds: Count | None = Field(
        default=None, description="Seconds since startTime that the job was suspended or waited in a queue."
    )
    gpu_seconds: RoundedFloat = Field(
        default=None,
        description="GPUs times the seconds that attempts held them, all attempts together; absent without a GPU.",
    )
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
