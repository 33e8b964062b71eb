"""Evaluation suites of a FineTuneJob, and the gates that its adapter must pass."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from tunesmith.api.checkpoint import MIN_EVERY_RATIO
from tunesmith.api.credentials import SecretReference
from tunesmith.api.dataset import DatasetSource
from tunesmith.api.model import ApiModel, Rule, StringPattern
from tunesmith.api.uri import TasksUri, secret_rule, uri_rules
from tunesmith.storage.schemes import Use, prefixes

SuiteName = Annotated[str, Field(min_length=1, max_length=32, pattern=r"^[a-zA-Z0-9]([-a-zA-Z0-9]*[a-zA-Z0-9])?$")]
TaskName = Annotated[
    str,
    Field(min_length=1, max_length=100),
    StringPattern(
        r"^[a-zA-Z0-9][-a-zA-Z0-9_.:()]*$",
        "a task of lmEval is a task name of lm-evaluation-harness, such as arc_easy, not a path or a uri",
    ),
]
LOSS = "Loss"
LOSS_REDUCTION = "LossReductionPercent"
GAIN = "Gain"
"""Suffix of a metric: `<metric>Gain` is the adapter's score minus the base's."""
MAX_METRIC = 160
MAX_SCORES = 128
"""Highest number of scores of all suites together."""


class GenerationMetric(StrEnum):
    """Metric that compares an answer with the data set's."""

    EXACT_MATCH = "ExactMatch"
    CONTAINS = "Contains"
    BLEU = "Bleu"
    CHRF = "ChrF"


class HeldOutLoss(ApiModel):
    """The loss on the held-out rows: metrics Loss (objective sft: nats per target token) and LossReductionPercent."""


class Generation(ApiModel):
    """Answers to the prompts of a data set, by greedy decoding, compared with the data set's answers."""

    dataset: DatasetSource = Field(
        description="Rows as in dataset.train, in any format except Text, Preference and UnpairedPreference. The "
        "last answer is the expected one."
    )
    metric: GenerationMetric = Field(
        default=GenerationMetric.EXACT_MATCH,
        description="ExactMatch and Contains: share of rows, 0 to 1, ignoring leading and trailing white space. Bleu "
        "and ChrF: corpus scores of sacrebleu, 0 to 100.",
    )
    max_new_tokens: int = Field(default=128, ge=1, le=4096, description="Maximum length of an answer, in tokens.")
    limit: int | None = Field(
        default=None, ge=1, le=100_000, description="Number of rows, from the first. Absent: all."
    )


class TaskFolder(ApiModel):
    """Tasks of lm-evaluation-harness that belong to a job."""

    rules = (
        *uri_rules,
        secret_rule,
        Rule(
            "!self.uri.startsWith('hf://') || self.uri.startsWith('hf://datasets/')",
            "a folder of tasks on the Hugging Face Hub is hf://datasets/organisation/name, followed by a folder",
            lambda self: not self.uri.startswith("hf://") or self.uri.startswith("hf://datasets/"),
        ),
    )

    uri: TasksUri = Field(
        description="Folder with YAML files of tasks and groups, and the Python files that they refer to. "
        f"{prefixes(Use.TASKS)} (hf://datasets/org/name[@revision]/…); in a local run also file://.",
    )
    secret_ref: SecretReference | None = Field(
        default=None, description="Credentials for the uri. Absent: those of the store."
    )


class LmEval(ApiModel):
    """Tasks of lm-evaluation-harness, with their own prompts and metrics."""

    tasks: list[TaskName] = Field(
        min_length=1,
        max_length=8,
        description="Names of tasks, such as arc_easy, or of groups with an aggregate score, such as mmlu. Their data "
        "comes from the Hugging Face Hub. Tasks that run code from the Hub or of the model are rejected.",
    )
    limit: int | None = Field(
        default=None, ge=1, le=100_000, description="Number of rows of each task, from the first. Absent: all."
    )
    num_fewshot: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="Number of solved examples before each question. Absent: the task's default.",
    )
    task_folder: TaskFolder | None = Field(
        default=None,
        description="Additional tasks of the job. They are code that runs in the trainer's pods, so they are rejected "
        "unless the platform allows them (trainer.allowTaskFolders of the chart).",
    )


class Suite(ApiModel):
    """Suite of scores of base and adapter."""

    rules = (
        Rule(
            "[has(self.heldOutLoss), has(self.generation), has(self.lmEval)].exists_one(given, given)",
            "a suite of evaluation.suites must have exactly one of heldOutLoss, generation and lmEval: keep one and "
            "remove the others",
            lambda self: [self.held_out_loss, self.generation, self.lm_eval].count(None) == 2,  # noqa: PLR2004
        ),
    )

    name: SuiteName = Field(description="Name of the suite, to which gates and scores refer.")
    held_out_loss: HeldOutLoss | None = Field(default=None, description="Loss on the held-out rows.")
    generation: Generation | None = Field(default=None, description="Answers compared with those of a data set.")
    lm_eval: LmEval | None = Field(default=None, description="Tasks of lm-evaluation-harness.")

    def has_metric(self, name: str) -> bool:
        """Return True if a gate can use the metric; for `lmEval` only the task's name is checked."""
        if self.lm_eval is not None:
            return any(name.startswith(f"{task}/") for task in self.lm_eval.tasks)
        if self.generation is None:
            return name in {LOSS, LOSS_REDUCTION}
        return name in {self.generation.metric.value, self.generation.metric.value + GAIN}


class Gate(ApiModel):
    """Threshold for a score of the adapter. The job fails with GateFailed if it is missed; the artifact is kept."""

    rules = (
        Rule(
            "has(self.min) || has(self.max)",
            "a gate of evaluation.gates must have min or max: without them it would always pass",
            lambda self: self.min is not None or self.max is not None,
        ),
        Rule(
            "!has(self.min) || !has(self.max) || self.min <= self.max",
            "a gate of evaluation.gates has a min above its max: swap them",
            lambda self: self.min is None or self.max is None or self.min <= self.max,
        ),
    )

    suite: SuiteName = Field(description="Name of the suite.")
    metric: str = Field(
        min_length=1,
        max_length=MAX_METRIC,
        description="Metric of the suite. heldOutLoss: Loss or LossReductionPercent. generation: its metric. lmEval: "
        "a task and one of its metrics, such as arc_easy/acc_norm or gsm8k/exact_match,strict-match. The suffix Gain "
        "on a metric of generation or lmEval: score of the adapter minus that of the base model.",
    )
    min: float | None = Field(default=None, description="Minimum value that passes.")
    max: float | None = Field(default=None, description="Maximum value that passes.")


class Publish(StrEnum):
    """Step whose weights are published."""

    BEST = "Best"
    LAST = "Last"


class EarlyStopping(ApiModel):
    """Condition under which training stops before its last step. What it has learned is published."""

    patience: int = Field(
        default=3,
        ge=1,
        le=10_000,
        description="Number of consecutive measurements of the held-out loss without an improvement after which "
        "training stops.",
    )
    min_delta: float = Field(
        default=0.0,
        ge=0.0,
        le=1000.0,
        description="An improvement is a held-out loss that is lower than that of the last improvement by more than "
        "this.",
    )


class Evaluation(ApiModel):
    """Suites that score base and adapter in the same run, and gates for the adapter's scores."""

    rules = (
        Rule(
            "!has(self.gates) || has(self.suites) && "
            "self.gates.all(gate, self.suites.exists(suite, suite.name == gate.suite))",
            "a gate of evaluation.gates refers to a suite that is not in evaluation.suites: correct its name",
            lambda self: {gate.suite for gate in self.gates or []} <= {suite.name for suite in self.suites or []},
        ),
        Rule(
            "!has(self.gates) || !has(self.suites) || "
            "self.gates.all(gate, self.suites.all(suite, suite.name != gate.suite || "
            "(has(suite.heldOutLoss) ? gate.metric in ['Loss', 'LossReductionPercent'] : has(suite.lmEval) ? "
            "suite.lmEval.tasks.exists(task, gate.metric.startsWith(task + '/')) : !has(suite.generation) || "
            "gate.metric == suite.generation.metric || gate.metric == suite.generation.metric + 'Gain')))",
            "a gate of evaluation.gates refers to a metric that its suite does not have: heldOutLoss has Loss and "
            "LossReductionPercent, generation has its metric, lmEval has <task>/<metric>; the latter two also with the "
            "suffix Gain",
            lambda self: all(
                suite.has_metric(gate.metric)
                for gate in self.gates or []
                for suite in self.suites or []
                if suite.name == gate.suite
            ),
        ),
        Rule(
            "!has(self.suites) || self.suites.all(suite, self.suites.exists_one(other, other.name == suite.name))",
            "two suites of evaluation.suites have the same name: rename one of them",
            lambda self: len({suite.name for suite in self.suites or []}) == len(self.suites or []),
        ),
        Rule(
            "!(has(self.everySteps) && has(self.everyRatio))",
            "evaluation.everySteps and evaluation.everyRatio are mutually exclusive: remove one of them",
            lambda self: self.every_steps is None or self.every_ratio is None,
        ),
    )

    every_steps: int | None = Field(
        default=None,
        ge=1,
        description="Number of optimizer steps between two measurements of the held-out loss during training. Absent "
        "without everyRatio: about ten measurements, fewer if they would take more than 5 % of the time and "
        "earlyStopping is absent. The loss is always measured before training and after the last step.",
    )
    every_ratio: float | None = Field(
        default=None,
        ge=MIN_EVERY_RATIO,
        le=1.0,
        description="Interval between two measurements of the held-out loss as a share of the run's optimizer steps, "
        "rounded up; see everySteps. status.resolved.evaluationEverySteps is its number of steps.",
    )
    publish: Publish | None = Field(
        default=None,
        description="Step whose weights are published, scored and merged. Best: the one with the lowest held-out loss "
        "among those at which it was measured, the earlier one of two equal ones. Absent: Best for the objective sft, "
        "Last for the others and for method.adaLora.",
    )
    early_stopping: EarlyStopping | None = Field(
        default=None,
        description="Stop once the held-out loss has stopped falling: the job is then Complete with the reason "
        "StoppedEarly. Absent: all steps are taken.",
    )
    suites: list[Suite] | None = Field(
        default=None, min_length=1, max_length=8, description="Suites of scores, computed after training."
    )
    gates: list[Gate] | None = Field(
        default=None,
        min_length=1,
        max_length=16,
        description="Thresholds for the scores. If one is missed, the job fails with GateFailed.",
    )
