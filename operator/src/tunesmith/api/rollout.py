"""Rollout of a new revision of an AdapterDeployment: strategy, steps, analysis, and their observed state."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, Field

from tunesmith.api.finetunejob_status import Count
from tunesmith.api.model import ApiModel, Rule, StatusModel

ROLLOUT_ANNOTATION = "tunesmith.dev/rollout"
"""Annotation of an AdapterDeployment with a command for its rollout, see `parse_command`."""
MAX_COMMAND = 128
MAX_STEPS = 16
MAX_CHECKS = 8
MAX_QUERY = 1024
MAX_REJECTED = 16
MAX_MEASURED_PODS = 64
_MAX_PAUSE = 7 * 24 * 3600
_BUCKETS = 65


def _rounded(value: float | None) -> float | None:
    """Return the value with four significant digits."""
    return None if value is None else float(f"{value:.4g}")


MeasuredValue = Annotated[float | None, AfterValidator(_rounded)]


class RolloutStrategy(StrEnum):
    """Way in which a new revision takes over."""

    CANARY = "Canary"
    SHADOW = "Shadow"
    IMMEDIATE = "Immediate"


class Measure(StrEnum):
    """Property of a new revision that decides about its rollout."""

    ERROR_RATE = "ErrorRate"
    TIME_TO_FIRST_TOKEN = "TimeToFirstTokenP95Seconds"  # noqa: S105 - tokens of text
    TIME_PER_OUTPUT_TOKEN = "TimePerOutputTokenP95Seconds"  # noqa: S105
    SERVED_PARITY = "ServedParity"
    EVALUATION_GATE = "EvaluationGate"
    QUERY = "Query"


STATIC_MEASURES = frozenset({Measure.SERVED_PARITY, Measure.EVALUATION_GATE})
"""Measures that need no requests: they are checked before the first step."""


class RolloutStep(ApiModel):
    """A share of the requests, and the time for which it is kept."""

    weight: int = Field(
        ge=1,
        le=100,
        description="Share of the requests, in percent: with Canary that the new revision answers, with Shadow that "
        "are also sent to it.",
    )
    pause_seconds: int = Field(
        default=300, ge=0, le=_MAX_PAUSE, description="Seconds after which the next step begins at the earliest."
    )


class AnalysisCheck(ApiModel):
    """Highest value of a measure with which a rollout continues. A higher one rolls it back."""

    rules = (
        Rule(
            "has(self.max) || self.measure in ['ServedParity', 'EvaluationGate']",
            "a measure of rollout.analysis has no max: only ServedParity and EvaluationGate have a default",
            lambda self: self.max is not None or self.measure in STATIC_MEASURES,
        ),
        Rule(
            "self.measure != 'ErrorRate' || !has(self.max) || self.max >= 0.0 && self.max <= 1.0",
            "the max of ErrorRate is a share from 0 to 1: write 0.05 for 5 %",
            lambda self: self.measure is not Measure.ERROR_RATE or self.max is None or 0 <= self.max <= 1,
        ),
        Rule(
            "has(self.query) == (self.measure == 'Query')",
            "query is required for the measure Query, and only for it",
            lambda self: (self.query is not None) == (self.measure is Measure.QUERY),
        ),
    )

    measure: Measure = Field(
        description="ErrorRate: share of the revision's requests that the engine did not answer or whose answer broke "
        "off, from 0 to 1. TimeToFirstTokenP95Seconds, TimePerOutputTokenP95Seconds: 95th percentile of the revision's "
        "streamed answers. ServedParity: distance of the engine's answers from the trained model's, in nats "
        "(spec.parity). EvaluationGate: number of gates of evaluation.gates that the artifact missed. Query: result of "
        "a PromQL expression, if the installation names a Prometheus (chart value prometheus.url)."
    )
    max: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Highest value that passes. Absent: for ServedParity the tolerance of the parity check, for "
        "EvaluationGate 0; required for the others.",
    )
    query: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_QUERY,
        description="PromQL expression whose result is one number. {{revision}}, {{model}} and {{namespace}} stand for "
        "the new revision's engine name, the model's global ID and the namespace.",
    )


class AdapterRollout(ApiModel):
    """Transition from the serving revision to a new one: an edited source, or the result of another job."""

    rules = (
        Rule(
            "self.strategy != 'Immediate' || !has(self.steps) && !has(self.analysis) && !has(self.minRequests)",
            "rollout.strategy Immediate has no steps, no analysis and no minRequests: remove them, or use Canary",
            lambda self: (
                self.strategy is not RolloutStrategy.IMMEDIATE
                or (self.steps is None and self.analysis is None and self.min_requests is None)
            ),
        ),
        Rule(
            "!has(self.steps) || self.steps.map(step, step.weight).isSorted()",
            "rollout.steps has a weight that is lower than the preceding one: order the steps by weight",
            lambda self: [step.weight for step in self.steps or ()] == sorted(step.weight for step in self.steps or ()),
        ),
    )

    strategy: RolloutStrategy = Field(
        description="Canary: the new revision answers a share of the requests, which grows by steps. Shadow: the old "
        "revision answers all requests, and a share of them is also sent to the new one, whose answers are discarded. "
        "Immediate: the new revision answers all requests once it is resident."
    )
    steps: list[RolloutStep] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_STEPS,
        description="Steps, after which the new revision gets all requests. Absent: for Canary 5, 25 and 50 percent of "
        "300 seconds each; for Shadow 10 percent of 600 seconds.",
    )
    analysis: list[AnalysisCheck] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_CHECKS,
        description="Checks of the new revision. A step passes once its time is over and all of them pass; if one "
        "fails, the rollout is rolled back. Missing data never passes: the rollout waits. Absent: time alone decides.",
    )
    min_requests: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Number of requests, or of streamed answers, in a step from which on measures of requests count. "
        "Absent: 50.",
    )


_DEFAULT_STEPS = {
    RolloutStrategy.CANARY: tuple(RolloutStep(weight=weight) for weight in (5, 25, 50)),
    RolloutStrategy.SHADOW: (RolloutStep(weight=10, pause_seconds=600),),
    RolloutStrategy.IMMEDIATE: (),
}
DEFAULT_MIN_REQUESTS = 50


def steps_of(rollout: AdapterRollout) -> tuple[RolloutStep, ...]:
    """Return the steps, or the strategy's default."""
    return _DEFAULT_STEPS[rollout.strategy] if rollout.steps is None else tuple(rollout.steps)


class RolloutCommand(StrEnum):
    """Command of a person for a rollout."""

    PAUSE = "pause"
    RESUME = "resume"
    PROMOTE = "promote"
    ABORT = "abort"
    UNDO = "undo"


def parse_command(text: str) -> RolloutCommand | None:
    """Return the command in the annotation's value; None if there is none.

    The command may be followed by a space and any text, which makes a repeated command differ from the previous one.
    """
    word = text[:MAX_COMMAND].partition(" ")[0]
    return RolloutCommand(word) if word in set(RolloutCommand) else None


class HandledCommand(StatusModel):
    """Latest command that was handled."""

    value: str = Field(max_length=MAX_COMMAND, description=f"Value of the annotation {ROLLOUT_ANNOTATION}.")
    message: str = Field(max_length=1024, description="Effect of the command, or the reason why it has none.")


class RolloutPhase(StrEnum):
    """Progress of a rollout."""

    PREPARING = "Preparing"
    PROGRESSING = "Progressing"
    PROMOTING = "Promoting"
    COMPLETE = "Complete"
    ROLLED_BACK = "RolledBack"
    ABORTED = "Aborted"
    UNDONE = "Undone"


RUNNING_PHASES = frozenset({RolloutPhase.PREPARING, RolloutPhase.PROGRESSING, RolloutPhase.PROMOTING})


class RevisionReference(StatusModel):
    """A revision that can be loaded again."""

    digest: str = Field(max_length=71, pattern=r"^sha256:[0-9a-f]{64}$", description="Digest of the artifact.")
    uri: str | None = Field(default=None, max_length=1024, description="Folder of the artifact in the store.")


class MeasureStatus(StatusModel):
    """Result of a check."""

    measure: Measure = Field(description="The measure.")
    query: str | None = Field(default=None, max_length=MAX_QUERY, description="The PromQL expression.")
    value: MeasuredValue = Field(default=None, description="Measured value. Absent: not known yet; see message.")
    max: float | None = Field(default=None, description="Highest value that passes.")
    passed: bool | None = Field(
        default=None, description="True if the value passes, false if it does not. Absent: it is not known yet."
    )
    message: str | None = Field(default=None, max_length=512, description="Reason for an unknown or a failed result.")


Histogram = dict[Annotated[str, Field(max_length=2)], Count]


class MeasuredTraffic(StatusModel):
    """Counts of requests, and histograms of latencies by number of the bucket."""

    requests: Count = Field(default=0, description="Number of requests.")
    errors: Count = Field(default=0, description="Number of failed requests.")
    first_token: Histogram = Field(
        default_factory=dict, max_length=_BUCKETS, description="Times to the first token: answers by bucket."
    )
    per_output_token: Histogram = Field(
        default_factory=dict, max_length=_BUCKETS, description="Times per output token: answers by bucket."
    )


class PodTraffic(MeasuredTraffic):
    """Counters of a pod when they were read last."""

    uid: str = Field(max_length=64, description="UID of the pod.")
    start: str = Field(max_length=32, description="Identity of the process that counts.")


class ShadowComparison(StatusModel):
    """Answers of a shadow beside those that clients got to the same requests, as running gateways report them."""

    answers: Count = Field(default=0, description="Number of requests that both revisions answered.")
    failures: Count = Field(default=0, description="Number of requests to which the shadow answered with an error.")
    dropped: Count = Field(
        default=0, description="Number of requests that were not mirrored, or cancelled, for example because of load."
    )
    shadow_tokens: MeasuredValue = Field(default=None, description="Tokens per answer of the shadow.")
    served_tokens: MeasuredValue = Field(default=None, description="Tokens per answer that clients got.")
    shadow_refusals: MeasuredValue = Field(
        default=None, description="Share of the shadow's answers that are refusals or empty, 0 to 1."
    )
    served_refusals: MeasuredValue = Field(
        default=None, description="Share of the answers that clients got that are refusals or empty, 0 to 1."
    )
    shadow_logprob: MeasuredValue = Field(
        default=None,
        description="Mean log-probability of the tokens of the shadow's answers, in nats. Absent: no request asked for "
        "log-probabilities.",
    )
    served_logprob: MeasuredValue = Field(default=None, description="The same of the answers that clients got.")


class RolloutStatus(StatusModel):
    """Observed state of the latest rollout."""

    phase: RolloutPhase = Field(
        description="Preparing: the new revision is being loaded and checked. Progressing: a step is running. "
        "Promoting: the new revision is being loaded on all of its pods. Complete: it answers all requests. "
        "RolledBack: a check failed, and the previous revision answers all requests. Aborted: the rollout was "
        "stopped by a command, or the source returned to the previous revision. Undone: the previous revision was "
        "brought back by a command."
    )
    digest: str = Field(max_length=71, description="Digest of the new revision.")
    stable: RevisionReference | None = Field(default=None, description="The previous revision.")
    step: Count = Field(default=0, description="Number of the current step, from 1; 0 before the first one.")
    steps: Count = Field(default=0, description="Number of steps.")
    step_passed: bool = Field(
        default=False, description="True once the step has passed: pods are being prepared for the next one."
    )
    weight: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Share of the requests, in percent, that the new revision answers, or with Shadow also gets.",
    )
    paused: bool = Field(default=False, description="True after the command pause: no step begins.")
    promoted: bool = Field(default=False, description="True after the command promote: steps and checks are skipped.")
    started_at: datetime = Field(description="Start of the rollout.")
    step_started_at: datetime | None = Field(
        default=None, description="Start of the current step. Absent: no step has begun."
    )
    finished_at: datetime | None = Field(default=None, description="End of the rollout.")
    message: str = Field(default="", max_length=1024, description="What the rollout waits for, or how it ended.")
    measures: list[MeasureStatus] = Field(
        default_factory=list, max_length=MAX_CHECKS, description="Results of the checks in the current or last step."
    )
    traffic: MeasuredTraffic = Field(
        default_factory=MeasuredTraffic, description="Traffic of the new revision since the start of the step."
    )
    comparison: ShadowComparison | None = Field(
        default=None,
        description="With Shadow: comparison with the answers that clients get. Absent: none has been reported.",
    )
    pods: list[PodTraffic] = Field(
        default_factory=list,
        max_length=MAX_MEASURED_PODS,
        description="Counters of the pods, from which the traffic since then is computed.",
    )

    @property
    def is_running(self) -> bool:
        """True until the rollout has ended."""
        return self.phase in RUNNING_PHASES
