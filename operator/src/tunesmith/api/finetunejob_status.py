"""Observed state of a FineTuneJob."""

from __future__ import annotations

import math
from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, Field

from tunesmith.api.conditions import Condition, FailureReason
from tunesmith.api.evaluation import MAX_METRIC, MAX_SCORES, Publish
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


LOSS_UNIT = "nats per target token; for objectives other than sft, the objective's own loss"
RoundedFloat = Annotated[float | None, AfterValidator(_rounded)]
FiniteFloat = Annotated[float | None, AfterValidator(_finite)]
Count = Annotated[int, Field(ge=0, le=2**53)]
"""Number of items. Not every JSON reader represents larger integers exactly."""
Percent = Annotated[int, Field(ge=0, le=100)]


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

    suite: str = Field(max_length=32, description="Name of the suite with the folder.")
    digest: str = Field(max_length=71, description="SHA-256 of the names and contents of its files.")


class ContinuedFrom(StatusModel):
    """Adapter that training starts from."""

    uri: str = Field(max_length=1024, description="Folder of the artifact.")
    digest: str = Field(max_length=71, description="SHA-256 of its tunesmith.json.")


class Resolved(StatusModel):
    """Values that were chosen for the user, and facts about the inputs. Fixed by the first attempt."""

    base_model_fingerprint: str | None = Field(
        default=None, max_length=128, description="Content fingerprint of the base model."
    )
    dataset_digest: str | None = Field(
        default=None, max_length=128, description="SHA-256 over the training and held-out rows."
    )
    continued_from: ContinuedFrom | None = Field(
        default=None, description="Adapter that training starts from (spec.continueFrom). Absent: a new one."
    )
    method: str | None = Field(
        default=None, max_length=64, description="With continueFrom: the method, given or taken from the adapter."
    )
    rank: Count | None = Field(
        default=None, description="With continueFrom: the rank of the adapter. Absent: its method has none."
    )
    task_folders: list[TaskFolderStatus] | None = Field(
        default=None, max_length=8, description="Task folders of the suites (lmEval.taskFolder). Absent: none."
    )
    learning_rate: FiniteFloat = Field(default=None, description="Peak learning rate.")
    batch_size: Count | None = Field(default=None, description="Sequences per optimizer step.")
    micro_batch_size: Count | None = Field(default=None, description="Sequences per forward pass.")
    gradient_checkpointing: bool | None = Field(
        default=None, description="True if activations are recomputed in the backward pass, which saves memory."
    )
    torch_compile: bool | None = Field(
        default=None, description="True if norms and feed-forward layers are compiled where possible."
    )
    precision: Precision | None = Field(
        default=None, description="Type of the frozen weights and of the matrix products."
    )
    quantization: str | None = Field(
        default=None,
        max_length=16,
        description="Quantisation in which the base model's weights are held: nf4 or fp4 (4 bits), or int8 (8 bits). A "
        "base model that is published in one of them keeps it. Absent: they are not quantised.",
    )
    data_parallelism: DataParallelism | None = Field(
        default=None, description="Distribution of the base model over GPUs. Absent with one process."
    )
    total_steps: Count | None = Field(default=None, description="Total number of optimizer steps.")
    warmup_steps: Count | None = Field(
        default=None, description="Number of optimizer steps in which the learning rate rises."
    )
    evaluation_every_steps: Count | None = Field(
        default=None,
        description="Number of optimizer steps between two measurements of the held-out loss during training.",
    )
    publish: Publish | None = Field(default=None, description="Step whose weights are published.")
    target_modules: list[ModuleName] | None = Field(default=None, max_length=64, description="Modules with an adapter.")


class Verdict(StrEnum):
    """Result of the comparison of the estimated memory with the GPU's."""

    FITS = "Fits"
    WILL_NOT_FIT = "WillNotFit"
    UNKNOWN = "Unknown"


class PeakParts(StatusModel):
    """Parts of a GPU's estimated peak memory."""

    weights_bytes: Count = Field(description="Weights of the base model, bytes.")
    trainable_bytes: Count = Field(description="Trained parameters, their gradients and the optimizer's state, bytes.")
    activations_bytes: Count = Field(description="Activations that a micro-batch keeps for the backward pass, bytes.")
    logits_bytes: Count = Field(description="Logits over the vocabulary, and the loss, bytes.")
    overhead_bytes: Count = Field(description="Context, workspaces and fragmentation, bytes.")


class DropReason(StrEnum):
    """Reason for dropping a row."""

    UNDECODABLE = "Undecodable"
    NULL = "Null"
    EMPTY = "Empty"
    INCOMPLETE = "Incomplete"
    DUPLICATE = "Duplicate"
    OVERLONG = "Overlong"
    NO_TARGET = "NoTarget"
    NOT_RENDERED = "NotRendered"


class DroppedRows(StatusModel):
    """Rows that were dropped for one reason."""

    reason: DropReason = Field(
        description="Reason for dropping the rows. Undecodable: not JSON, not UTF-8, half of a surrogate pair, or a "
        "wrong number of cells. Null, Empty: required text is null or empty. Incomplete: a chat that does not end with "
        "an answer or begins with one, or a pair without a common prompt. Duplicate: repeats an earlier row. Overlong: "
        "more than maxLength tokens. NoTarget: no token contributes to the loss. NotRendered: the chat template "
        "rejects the row, or does not render a part of it (reasoning of a learned answer, a tool call, tools, a name, "
        "system text), or the row has an image, audio or a video."
    )
    rows: Count = Field(description="Number of dropped rows.")
    examples: list[Annotated[str, Field(max_length=256)]] | None = Field(
        default=None, max_length=3, description="First dropped rows, each with file, line and problem."
    )


class AlsoTrained(StatusModel):
    """Rows that are both scored and trained on."""

    suite: str | None = Field(
        default=None, max_length=32, description="Suite of evaluation.suites with the rows. Absent: the held-out rows."
    )
    rows: int = Field(ge=1, description="Number of rows that are both scored and trained on.")
    scored_rows: int = Field(ge=1, description="Number of scored rows.")
    examples: list[Annotated[str, Field(max_length=256)]] | None = Field(
        default=None, max_length=3, description="First of these rows, each with file and line."
    )

    @property
    def sentence(self) -> str:
        """Effect of the overlap, and how to remove it."""
        are = "is" if self.rows == 1 else "are"
        if self.suite is None:
            which, scores, source = "held-out rows", "evaluation.loss overrates", "dataset.validation"
        else:
            which, scores, source = f"rows of suite {self.suite}", "its scores overrate", "the suite's data set"
        return (
            f"{self.rows} of {self.scored_rows} {which} {are} also trained on, so {scores} the adapter: remove them "
            f"from {source} or from dataset.train"
        )


class IgnoredKey(StatusModel):
    """A key of messages that is not used."""

    key: str = Field(max_length=64, description="Name of the key.")
    messages: int = Field(ge=1, description="Number of messages with a value for it.")


class ReadSource(StatusModel):
    """Files of a source of dataset.train or dataset.validation."""

    uri: str = Field(max_length=256, description="uri of the source, shortened in the middle if it is longer.")
    files: Count = Field(description="Number of files that were read.")
    names: list[Annotated[str, Field(max_length=256)]] | None = Field(
        default=None, max_length=3, description="First of these files."
    )
    rows: Count = Field(description="Number of their rows that are used, each counted once.")
    split: str | None = Field(
        default=None, max_length=128, description="Split that was read. Absent: the source has no splits."
    )
    skipped_splits: list[Annotated[str, Field(max_length=128)]] | None = Field(
        default=None, max_length=8, description="First other splits of the source, which were not read. Absent: none."
    )


class ServableStatus(StatusModel):
    """Result of the check that an engine can load the adapter."""

    vllm: bool = Field(description="True if vLLM can serve the adapter.")
    reason: str | None = Field(default=None, max_length=1024, description="Reason why vLLM cannot serve the adapter.")


class Preflight(StatusModel):
    """Results of the CPU stage: counts and the memory estimate."""

    rows: Count | None = Field(
        default=None,
        description="Number of training rows per epoch, including the sources' weights. For objective.kto a pair "
        "counts as two.",
    )
    validation_rows: Count | None = Field(default=None, description="Number of held-out rows.")
    dropped_rows: Count | None = Field(
        default=None, description="Number of training and held-out rows that were dropped; see dropped."
    )
    dropped: list[DroppedRows] | None = Field(
        default=None, max_length=8, description="Dropped rows by reason. Absent: none."
    )
    also_trained: list[AlsoTrained] | None = Field(
        default=None,
        max_length=9,
        description="Rows that are both scored and trained on, which makes the scores too good. Absent: none.",
    )
    truncated_rows: Count | None = Field(
        default=None, description="Number of rows truncated to maxLength. Absent: overlong is not Truncate."
    )
    split_chats: Count | None = Field(
        default=None,
        description="Number of chats that became several rows, because the chat template renders earlier answers "
        "differently once later messages follow. Absent: none.",
    )
    split_rows: Count | None = Field(
        default=None,
        description="Number of rows that these chats became, each with the prompt that an engine receives. Absent: no "
        "chat.",
    )
    chunked_rows: Count | None = Field(
        default=None,
        description="Number of texts with more than maxLength tokens that were split; their parts are counted in rows. "
        "Absent: overlong is not Chunk.",
    )
    ignored_keys: list[IgnoredKey] | None = Field(
        default=None, max_length=8, description="Keys of messages that are not used, the most frequent first."
    )
    files: Count | None = Field(default=None, description="Number of data files that were read.")
    skipped_files: Count | None = Field(
        default=None, description="Number of data files of other splits, which were not read. Absent: none."
    )
    sources: list[ReadSource] | None = Field(
        default=None,
        max_length=8,
        description="First sources of dataset.train, followed by those of dataset.validation, with the files and the "
        "split that were read.",
    )
    packed_sequences: Count | None = Field(
        default=None, description="Number of sequences into which the training rows are packed. Absent without packing."
    )
    tokens: Count | None = Field(default=None, description="Number of tokens in the training rows.")
    shared_tokens: Count | None = Field(
        default=None,
        description="Number of these tokens that rows of one chat have in common with another row of their packed "
        "sequence, so that they are computed once. Absent: none.",
    )
    target_tokens: Count | None = Field(
        default=None, description="Number of tokens in the training rows that contribute to the loss."
    )
    trainable_parameters: Count | None = Field(default=None, description="Number of trained parameters.")
    adapted_percent: Percent | None = Field(
        default=None,
        description="Share of the weights in the base's layers that have an adapter, %. Experts count if "
        "targetParameters names them. Absent: no weights have one.",
    )
    quantized_percent: Percent | None = Field(
        default=None,
        description="Share of the weights in the base's layers that are held in 4 bits, %. Absent: no quantization.",
    )
    servable: ServableStatus | None = Field(default=None, description="Prediction of whether vLLM can load the result.")
    estimated_peak_bytes: Count | None = Field(
        default=None, description="Estimated peak memory of a GPU, bytes, within about 15 %. Absent without a GPU."
    )
    peak_parts: PeakParts | None = Field(default=None, description="Parts of estimatedPeakBytes.")
    gpu_memory_bytes: Count | None = Field(
        default=None, description="Memory of the smallest GPU on which the job may run, bytes. Absent: unknown."
    )
    verdict: Verdict | None = Field(
        default=None,
        description="Result of the memory check: Fits, WillNotFit, or Unknown if the GPU's memory is unknown or the"
        " difference is within the error of the estimate.",
    )
    suggestion: str | None = Field(
        default=None, max_length=1024, description="Least costly change with which the run fits."
    )


class ProgressStatus(StatusModel):
    """Progress of the running attempt."""

    stage: Stage | None = Field(default=None, description="Current stage of the trainer.")
    outage: str | None = Field(
        default=None, max_length=2048, description="Store that does not respond, and the time of the next try."
    )
    step: Count | None = Field(default=None, description="Completed optimizer steps.")
    total_steps: Count | None = Field(default=None, description="Total number of optimizer steps.")
    stopped_early: bool | None = Field(
        default=None, description="True if evaluation.earlyStopping stopped training at this step. Absent: it did not."
    )
    epoch: RoundedFloat = Field(default=None, description="Completed passes over the training rows.")
    loss: RoundedFloat = Field(default=None, description=f"Training loss of the last step, {LOSS_UNIT}.")
    evaluation_loss: RoundedFloat = Field(
        default=None, description=f"Latest held-out loss of the adapter, {LOSS_UNIT}."
    )
    learning_rate: FiniteFloat = Field(default=None, description="Learning rate of the last step.")
    tokens_per_second: RoundedFloat = Field(default=None, description="Training throughput, tokens per second.")
    memory_bytes: Count | None = Field(
        default=None, description="Peak memory of the GPU, or peak resident memory on a CPU, bytes."
    )
    eta_seconds: Count | None = Field(default=None, description="Estimated seconds until the last step.")
    update_time: AwareDatetime | None = Field(
        default=None,
        description="Time at which the trainer reported the progress, at most the time at which the operator read it.",
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
    start_time: datetime | None = Field(default=None, description="Time of the last start of its pod.")
    end_time: datetime | None = Field(default=None, description="Time at which the attempt finished.")
    outcome: AttemptOutcome = Field(
        default=AttemptOutcome.RUNNING, description="Outcome of the attempt; Running until it finishes."
    )
    reason: FailureReason | None = Field(default=None, description="Reason for the failure.")
    message: str | None = Field(default=None, max_length=2048, description="Human-readable message about the failure.")
    resumed_from_step: Count | None = Field(
        default=None, description="Step of the checkpoint from which the attempt resumed. Absent: it began at step 0."
    )
    last_step: Count | None = Field(
        default=None, description="Last observed optimizer step. Absent: none was observed, or the attempt is running."
    )
    node: str | None = Field(
        default=None,
        max_length=280,
        description="Node of the attempt's pod. With several pods: that of the first one, and the number of the "
        "others.",
    )


class ExportStatus(StatusModel):
    """Outcome of an entry of output.exports."""

    uri: str | None = Field(default=None, max_length=1024, description="Folder of the copy.")
    hub: str | None = Field(default=None, max_length=193, description="Repository of the Hugging Face Hub.")
    exported: bool = Field(description="True if the copy is complete.")
    reason: FailureReason | None = Field(default=None, description="Reason why the copy is incomplete.")
    message: str | None = Field(
        default=None, max_length=1024, description="Human-readable message about the failure of the copy."
    )


class ArtifactStatus(StatusModel):
    """The published adapter."""

    uri: str = Field(max_length=1024, description="Folder of the artifact in the store.")
    digest: str = Field(max_length=71, pattern=r"^sha256:[0-9a-f]{64}$", description="SHA-256 of tunesmith.json.")
    size_bytes: Count = Field(description="Size of the folder, bytes.")
    servable: ServableStatus = Field(description="Result of the check that an engine can load the artifact.")
    exports: list[ExportStatus] | None = Field(
        default=None, max_length=8, description="Outcomes of spec.output.exports, in the same order."
    )


class Score(StatusModel):
    """Score of one metric of one suite."""

    suite: str = Field(max_length=32, description="Name of the suite.")
    metric: str = Field(max_length=MAX_METRIC, description="Name of the metric.")
    base: RoundedFloat = Field(default=None, description="Score of the base model.")
    adapter: RoundedFloat = Field(default=None, description="Score of the adapter.")


class GateStatus(StatusModel):
    """Outcome of a gate."""

    suite: str = Field(max_length=32, description="Name of the suite.")
    metric: str = Field(max_length=MAX_METRIC, description="Name of the metric.")
    value: RoundedFloat = Field(default=None, description="Score of the adapter.")
    min: FiniteFloat = Field(default=None, description="Minimum value that passes.")
    max: FiniteFloat = Field(default=None, description="Maximum value that passes.")
    passed: bool = Field(description="True if the value is within the limits.")


class SuiteFailure(StatusModel):
    """A suite that could not be scored. The artifact is published nevertheless."""

    suite: str = Field(max_length=32, description="Name of the suite.")
    reason: FailureReason = Field(description="Reason for the missing scores.")
    message: str = Field(max_length=1024, description="Human-readable message about the missing scores.")


class EvaluationStatus(StatusModel):
    """Scores of base and adapter from the same run."""

    base_loss: RoundedFloat = Field(default=None, description=f"Held-out loss of the base, {LOSS_UNIT}.")
    loss: RoundedFloat = Field(default=None, description=f"Held-out loss of the adapter, {LOSS_UNIT}.")
    loss_reduction_percent: RoundedFloat = Field(default=None, description="Reduction of the held-out loss, percent.")
    published_step: Count | None = Field(
        default=None, description="Optimizer step of the published weights, to which all scores of the adapter refer."
    )
    stopped_early_at: Count | None = Field(
        default=None,
        description="Optimizer step after which evaluation.earlyStopping stopped training. Absent: all steps were "
        "taken.",
    )
    scores: list[Score] | None = Field(default=None, max_length=MAX_SCORES, description="Scores of evaluation.suites.")
    gates: list[GateStatus] | None = Field(default=None, max_length=16, description="Outcomes of evaluation.gates.")
    failures: list[SuiteFailure] | None = Field(
        default=None,
        max_length=8,
        description="Suites that could not be scored completely, because their tasks failed on the models' answers."
        " Gates on missing scores do not pass. Absent: none.",
    )

    @property
    def missed_gates(self) -> int | None:
        """Number of gates that were not passed; None without gates."""
        return None if self.gates is None else sum(1 for gate in self.gates if not gate.passed)

    @property
    def loss_change(self) -> str:
        """Change of the held-out loss, such as `-71.4 %`; three decimals below 1 %. Empty if it is unknown."""
        if self.loss_reduction_percent is None:
            return ""
        change = -self.loss_reduction_percent
        return f"{change:+z.1f} %" if abs(change) >= 1 else f"{change:+z.3f} %"

    @property
    def unscored(self) -> str:
        """Messages of the suites without scores, as one sentence; empty if all were scored."""
        return "; ".join(failure.message for failure in self.failures or [])


class FineTuneJobStatus(StatusModel):
    """Observed state of a FineTuneJob."""

    phase: Phase | None = Field(
        default=None,
        description="Summary of the conditions. Pending: waiting for a pod. Validating: the CPU stage is running. "
        "Queued: waiting for the queue. Running: an attempt is running. Suspended: spec.suspend is true. Complete, "
        "Failed: terminal.",
    )
    reason: str | None = Field(
        default=None, max_length=64, description="Reason of the condition that the phase is derived from."
    )
    conditions: list[Condition] = Field(
        default_factory=list,
        max_length=16,
        description="Conditions: Validated, Admitted (with a queue), Started, Suspended, Published, Exported (with "
        "exports), and Complete or Failed.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    observed_generation: Count | None = Field(default=None, description="Observed metadata.generation.")
    start_time: datetime | None = Field(default=None, description="Start time of the first attempt.")
    completion_time: datetime | None = Field(
        default=None, description="Time at which the job became Complete or Failed."
    )
    paused_seconds: Count | None = Field(
        default=None, description="Seconds since startTime during which the job was suspended or in a queue."
    )
    gpu_seconds: RoundedFloat = Field(
        default=None,
        description="GPUs times the seconds for which they were in use, summed over all attempts. Absent without a "
        "GPU.",
    )
    resolved: Resolved | None = Field(
        default=None, description="Values that were chosen for absent fields, and digests of the inputs."
    )
    preflight: Preflight | None = Field(default=None, description="Results of the CPU stage.")
    progress: ProgressStatus | None = Field(default=None, description="Progress of the running attempt.")
    attempts: list[Attempt] = Field(
        default_factory=list,
        max_length=100,
        description="Attempts, oldest first.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    evaluation: EvaluationStatus | None = Field(default=None, description="Scores of base model and adapter.")
    artifact: ArtifactStatus | None = Field(default=None, description="The published adapter.")
