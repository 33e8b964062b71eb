"""One run: load, wrap, score the base, train, score the adapter."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from transformers import set_seed

from tunesmith.api.conditions import FailureReason
from tunesmith.api.evaluation import Publish
from tunesmith.api.finetunejob_status import EvaluationStatus, Stage, SuiteFailure
from tunesmith.api.hyperparameters import Precision
from tunesmith.api.placement import DataParallelism
from tunesmith_trainer.base_model import model, sharding
from tunesmith_trainer.base_model.logits import last_logits
from tunesmith_trainer.base_model.precision import dtype_of
from tunesmith_trainer.base_model.prompts import prompt_tokens
from tunesmith_trainer.errors import (
    InterruptedRunError,
    InvalidSpecError,
    LossDivergedError,
    NothingLearnedError,
    OutOfMemoryError,
    TrainerError,
)
from tunesmith_trainer.evaluation import gates, generation, harness
from tunesmith_trainer.methods import hooks
from tunesmith_trainer.methods.wrap import INITIALIZATION_ROWS, wrap
from tunesmith_trainer.reporting.curve import CurvePoint
from tunesmith_trainer.training.arguments import arguments
from tunesmith_trainer.training.batches import Collator, StepPlan, first_whole_rows, row_lengths
from tunesmith_trainer.training.best import BestWeights
from tunesmith_trainer.training.compilation import compile_layers
from tunesmith_trainer.training.determinism import run_deterministically
from tunesmith_trainer.training.device import choose_device, emulates_bfloat16
from tunesmith_trainer.training.held_out import held_out_loss
from tunesmith_trainer.training.layout import choose_loss_implementation, shares_prefixes
from tunesmith_trainer.training.lora import fuse
from tunesmith_trainer.training.loss import add_target_loss
from tunesmith_trainer.training.loss_scale import LossScale
from tunesmith_trainer.training.neftune import EmbeddingNoise
from tunesmith_trainer.training.objectives import step_objective
from tunesmith_trainer.training.progress_callback import ProgressCallback
from tunesmith_trainer.training.saving import Saver
from tunesmith_trainer.training.schedule import Schedule
from tunesmith_trainer.training.scoring import Scoring
from tunesmith_trainer.training.start import StartingWeights
from tunesmith_trainer.training.stopping import stops_early
from tunesmith_trainer.training.trainer import StepTrainer
from tunesmith_trainer.training.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel

    from tunesmith.api.evaluation import Suite
    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith_trainer.preflight.prepare import Prepared
    from tunesmith_trainer.process.interruption import Interruption
    from tunesmith_trainer.process.progress import Progress
    from tunesmith_trainer.process.ranks import Ranks
    from tunesmith_trainer.reporting.reporter import Reporter
    from tunesmith_trainer.training.checkpoint import Checkpoints, LocalCheckpoint
    from tunesmith_trainer.training.layout import LossImplementation

log = logging.getLogger(__name__)

_MAX_MESSAGE_LENGTH = 1024
"""Maximum number of characters of a message in the status."""


@dataclass(frozen=True)
class Run:
    """A run: its job and inputs, its folders, its reports and its checkpoints.

    Attributes:
        job: the manifest.
        prepared: its inputs, checked and tokenised.
        work: folder for temporary files.
        ranks: this process among those that train together.
        progress: is updated with each step.
        reporter: gets the curves.
        checkpoints: checkpoints of the job.
        interruption: a signal to stop.
        hung: called from another thread with the steps done and the seconds without progress.
    """

    job: FineTuneJob
    prepared: Prepared
    work: Path
    ranks: Ranks
    progress: Progress
    reporter: Reporter
    checkpoints: Checkpoints
    interruption: Interruption
    hung: Callable[[int, float], None]

    @cached_property
    def device(self) -> torch.device:
        """The device of this rank."""
        return choose_device(self.job.spec.resources.gpus, self.ranks.local_rank)

    @property
    def sharded(self) -> bool:
        """True if FSDP2 shards the base's weights over the ranks."""
        return self.prepared.resolved.data_parallelism is DataParallelism.FSDP2 and not self.ranks.alone

    @property
    def batch_size(self) -> int:
        """Rows per optimizer step."""
        return _resolved(self.prepared.resolved.batch_size)

    @property
    def micro_batch_size(self) -> int:
        """Rows per forward pass."""
        return _resolved(self.prepared.resolved.micro_batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return _resolved(self.prepared.resolved.total_steps)

    @property
    def schedule(self) -> Schedule:
        """Learning rate over the steps."""
        hyper = self.job.spec.hyperparameters
        warmup, minimum = _resolved(self.prepared.resolved.warmup_steps), hyper.min_learning_rate_ratio or 0.0
        return Schedule(hyper.scheduler, self.steps, warmup, minimum)


def _resolved(value: int | None) -> int:
    assert value is not None  # noqa: S101 - prepare() fills everything
    return value


@dataclass
class Trained:
    """A trained adapter, that of the published step, with its scores and curves."""

    model: PeftModel
    evaluation: EvaluationStatus
    prompts: list[list[int]]
    """Token ids of the parity prompts."""
    logits: list[torch.Tensor]
    """The model's logits after each prompt, computed in the type in which it was trained."""
    curve: list[CurvePoint] = field(default_factory=list)


def train(run: Run) -> Trained | None:
    """Train the adapter and score base and adapter on the held-out rows, from the newest checkpoint that verifies.

    Return the result on the first rank, None on the others.

    Raises:
        InterruptedRunError: a signal requested to stop, and the state is saved.
        OutOfMemoryError: memory does not suffice; states what to change.
        LossDivergedError: the loss or its gradient is not finite; states the step.
        NothingLearnedError: training changed no weight; states what to raise.
        SelfCheckError: the model is not what was requested.
    """
    device = run.device
    try:
        return run_deterministically(device, lambda: _train(run), run.progress.write_line)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(run.job, run.prepared, device) from error
    except RuntimeError as error:
        if "allocate memory" in str(error) or "not enough memory" in str(error):
            raise _out_of_memory(run.job, run.prepared, device) from error
        raise


def _train(run: Run) -> Trained | None:
    run.progress.update(stage=Stage.LOADING)
    if run.prepared.resolved.precision is Precision.BFLOAT16 and emulates_bfloat16(run.device):
        run.progress.write_line("  this GPU computes bfloat16 slowly: hyperparameters.precision float16 is for it")
    set_seed(run.job.spec.hyperparameters.seed)
    base, peft_model = _load(run)
    implementation, compiled = _configure_computation(run, base, peft_model)
    session = _build_session(run, base, peft_model, implementation, compiled=compiled)
    with implementation.use_attention(base), session.watchdog:
        losses = _train_and_score(run, session)
    # If weights are sharded, each rank takes part in every forward pass of the first rank.
    if not run.ranks.first and not run.sharded:
        return None
    return _result(run, base, session, losses)


def _load(run: Run) -> tuple[PreTrainedModel, PeftModel]:
    """Load the base and wrap it with the adapter; each rank has all of the base, or a shard if it is sharded."""
    prepared, device = run.prepared, run.device
    method, resolved = run.job.spec.method, prepared.resolved
    dtype, full = dtype_of(resolved.precision), method.full is not None
    if run.sharded:
        base = model.load_for_sharding(prepared.base, method.quantization, dtype, as_stored=full)
    else:
        base = model.load_model(prepared.base, device, method.quantization, dtype, as_stored=full)
    add_target_loss(base)

    def shard() -> None:
        kept = sharding.shard(base, device, run.ranks, full=full)
        run.progress.write_line(
            f"  FSDP2: each of {run.ranks.size} processes keeps {kept / 2**20:,.1f} MiB of the base's weights"
        )

    steps = resolved.total_steps or 0
    rows = first_whole_rows(prepared.train, INITIALIZATION_ROWS)
    return base, wrap(base, prepared.planned, rows, method, steps, shard if run.sharded else None)


def _configure_computation(run: Run, base: PreTrainedModel, peft_model: PeftModel) -> tuple[LossImplementation, bool]:
    """Choose how the model is computed: fused LoRA, attention, recomputed activations, compiled layers.

    Returns:
        Layout and attention, and True if layers are compiled.
    """
    resolved = run.prepared.resolved
    fuse(peft_model)
    implementation = choose_loss_implementation(peft_model, base)
    if resolved.gradient_checkpointing:
        _checkpoint_activations(base)
    compiled = bool(resolved.torch_compile) and compile_layers(
        peft_model,
        base,
        implementation,
        run.work / "compiled",
        run.progress.write_line,
        run.ranks,
        required=bool(run.job.spec.hyperparameters.torch_compile),
    )
    return implementation, compiled


def _checkpoint_activations(base: PreTrainedModel) -> None:
    if not base.supports_gradient_checkpointing:
        raise InvalidSpecError(
            f"a {type(base).__name__} cannot recompute its activations: set hyperparameters.gradientCheckpointing "
            "to false"
        )
    base.activation_checkpointing_enable({"use_reentrant": False})


@dataclass(frozen=True)
class _Session:
    """A model in its trainer, with the callbacks that monitor, save and stop it."""

    model: PeftModel
    trainer: StepTrainer
    collate: Collator
    progress_callback: ProgressCallback
    saver: Saver
    watchdog: Watchdog
    start: StartingWeights
    best: BestWeights | None
    curve: list[CurvePoint]


def _build_session(
    run: Run, base: PreTrainedModel, peft_model: PeftModel, implementation: LossImplementation, *, compiled: bool
) -> _Session:
    """Build the trainer with its callbacks, which are called in the order in which they are attached."""
    spec, prepared, ranks = run.job.spec, run.prepared, run.ranks
    args = arguments(run.job, prepared, run.work, run.device)
    objective = step_objective(spec.objective)
    collate = Collator(
        size=run.micro_batch_size,
        pad=prepared.pad,
        layout=implementation.layout,
        objective=objective,
        rank=ranks.rank,
        ranks=ranks.size,
        shares_prefixes=_shares_prefixes(run, base, peft_model, implementation),
    )
    curve: list[CurvePoint] = []
    progress_callback = ProgressCallback(run.progress, run.reporter, curve, run.device)
    alpha = spec.hyperparameters.neftune_noise_alpha
    trainer = StepTrainer(
        model=peft_model,
        args=args,
        rows=prepared.train,
        plan=StepPlan(row_lengths(prepared.train), run.batch_size, spec.hyperparameters.seed, run.steps),
        collate=collate,
        objective=objective,
        ranks=ranks,
        callbacks=[progress_callback],
        schedule=run.schedule,
        compiled=compiled,
        noise=None if alpha is None else EmbeddingNoise(base.get_input_embeddings(), alpha),
        loss_scale=LossScale() if prepared.resolved.precision is Precision.FLOAT16 else None,
    )
    hooks.attach(trainer, peft_model, spec.method)
    watchdog = Watchdog(run.hung)
    best = None
    if prepared.resolved.publish is Publish.BEST:
        best = BestWeights(peft_model, run.work, ranks, sharded=run.sharded)

    def stop() -> bool:
        # All ranks after the same step.
        return ranks.any(ranks.first and stops_early(spec.early_stopping, curve))[0]

    saver = Saver(
        run.checkpoints, spec.checkpoint, run.interruption, curve, ranks, watchdog.paused, best=best, stopped=stop
    )
    saver.attach(trainer)
    trainer.add_callback(watchdog)
    start = StartingWeights(peft_model, ranks)
    session = _Session(peft_model, trainer, collate, progress_callback, saver, watchdog, start, best, curve)
    every = prepared.resolved.evaluation_every_steps
    if every is not None:

        def score() -> float:
            with watchdog.paused():
                return _held_out_loss(run, session, adapter=True)

        def keep(step: int, loss: float) -> None:
            if best is not None:
                with watchdog.paused():
                    best.offer(step, loss)

        trainer.add_callback(Scoring(every, score, progress_callback, keep, stop))
    return session


def _shares_prefixes(
    run: Run, base: PreTrainedModel, peft_model: PeftModel, implementation: LossImplementation
) -> bool:
    """Return True if all ranks compute prefixes that packed rows share once; report if they cannot."""
    if not run.prepared.preflight.shared_tokens:
        return False
    cannot = not shares_prefixes(peft_model, base, implementation)
    if not run.ranks.any(cannot)[0]:
        return True
    run.progress.write_line(
        f"  the attention of a {type(base).__name__} cannot share prefixes: they are computed for each row"
    )
    return False


def _held_out_loss(run: Run, session: _Session, *, adapter: bool) -> float:
    rows, size = run.prepared.validation, run.micro_batch_size
    return held_out_loss(session.model, rows, session.collate, size, adapter=adapter, ranks=run.ranks)


def _train_and_score(run: Run, session: _Session) -> EvaluationStatus:
    """Train, choose the weights to publish, and return the held-out losses of the base and of these weights.

    Raises:
        LossDivergedError: one of them is not finite.
        NothingLearnedError: training changed no weight.
    """
    progress, curve = run.progress, session.curve
    progress.update(stage=Stage.EVALUATING, step=0, total_steps=run.steps, epoch=0.0)
    before = _held_out_loss(run, session, adapter=False)
    if not math.isfinite(before):
        raise LossDivergedError(
            f"the base model's held-out loss is {before} before the first step: the base model's weights are damaged "
            f"or do not fit {run.prepared.resolved.precision}: use another hyperparameters.precision"
        )
    curve.append(CurvePoint(step=0, epoch=0.0, evaluation_loss=before))
    run.reporter.add(curve[-1])
    progress.update(stage=Stage.TRAINING)
    last = _take_steps(run, session)
    stopped = last < run.steps
    if stopped:
        progress.write_line(f"  stopped early after step {last} of {run.steps}: the held-out loss has stopped falling")
    progress.update(stage=Stage.EVALUATING, eta_seconds=0, stopped_early=stopped or None)
    published, loss = _load_published(run, session, last, _last_loss(run, session, last))
    if session.start.unchanged():
        raise _nothing_learned(run, session.model, published)
    return EvaluationStatus(
        base_loss=before,
        loss=loss,
        loss_reduction_percent=100 * (before - loss) / before,
        published_step=published,
        stopped_early_at=last if stopped else None,
    )


def _last_loss(run: Run, session: _Session, last: int) -> float:
    """Return the held-out loss after the last step, which was measured already if training stopped early.

    Raises:
        LossDivergedError: it is not finite.
    """
    point = session.curve[-1]
    if point.step == last and point.evaluation_loss is not None:
        return point.evaluation_loss
    loss = _held_out_loss(run, session, adapter=True)
    if not math.isfinite(loss):
        raise LossDivergedError(f"the held-out loss is {loss} after step {last}: lower hyperparameters.learningRate")
    session.progress_callback.record_score(loss)
    return loss


def _load_published(run: Run, session: _Session, last: int, loss: float) -> tuple[int, float]:
    """Load the weights to publish into the model.

    Args:
        run: the run.
        session: its model, with the weights of the last step.
        last: the last step.
        loss: its held-out loss.

    Returns:
        Their step and their held-out loss.
    """
    best = session.best
    if best is None or best.step is None or best.step == last or loss < best.loss:
        return last, loss
    best.load()
    run.progress.write_line(
        f"  the weights of step {best.step} are published: their held-out loss is {best.loss:.4f}, that of the last"
        f" step, {last}, is {loss:.4f}"
    )
    return best.step, best.loss


def _nothing_learned(run: Run, peft_model: PeftModel, steps: int) -> NothingLearnedError:
    trained = [name for name, parameter in peft_model.named_parameters() if parameter.requires_grad]
    if all("trainable_tokens_" in name for name in trained):
        change = "use rows that contain the trained tokens"
    else:
        rate = run.prepared.resolved.learning_rate
        change = f"raise hyperparameters.learningRate (it is {rate:g}), or hyperparameters.maxSteps or epochs"
    which = "the only step" if steps == 1 else f"the {steps} steps"
    return NothingLearnedError(
        f"{which} changed none of the trained weights, so the result is the base model: {change}"
    )


def _take_steps(run: Run, session: _Session) -> int:
    """Take all remaining optimizer steps, from the newest usable checkpoint, and return the last one's number.

    Raises:
        InterruptedRunError: a signal requested to stop.
        LossDivergedError: the loss or its gradient is not finite.
    """
    trainer, saver = session.trainer, session.saver
    saved = _newest_checkpoint(run.checkpoints, run.ranks)
    remaining = True
    if saved is not None:
        remaining = saver.restore(saved)
        run.reporter.replay(session.curve)
        run.progress.write_line(f"  resumed from the checkpoint of step {saved.step}")
        run.progress.update(step=saved.step)
    try:
        # A Trainer that resumes after its last step would take another one.
        if remaining:
            trainer.train(resume_from_checkpoint=None if saved is None else str(saved.path))
    except LossDivergedError as error:
        raise LossDivergedError(f"{error}; {saver.describe_last_checkpoint()}") from error
    finally:
        run.interruption.armed = False
    if saver.interrupted_at is not None:
        raise InterruptedRunError(saver.interrupted_at, trainer.args.max_steps)
    return trainer.state.global_step if saved is None or remaining else saved.step


def _newest_checkpoint(checkpoints: Checkpoints, ranks: Ranks) -> LocalCheckpoint | None:
    """Return the newest checkpoint that the first rank can use; the others use the same one."""
    saved = checkpoints.newest() if ranks.first else None
    step = ranks.of_first(-1 if saved is None else saved.step)
    return saved if ranks.first or step < 0 else checkpoints.at(step)


def _result(run: Run, base: PreTrainedModel, session: _Session, losses: EvaluationStatus) -> Trained | None:
    """Score the suites and record the logits; return None on the other ranks, which only take part in it."""
    measured, failures = _score_suites(run, session.model)
    prompts = prompt_tokens(model.load_tokenizer_of(run.prepared.base, run.job.spec))
    logits = last_logits(session.model, prompts)
    if run.sharded:
        sharding.gather(base, keep=run.ranks.first)
    if not run.ranks.first:
        return None
    evaluation = gates.judge(run.job.spec.evaluation, losses, measured, failures)
    return Trained(session.model, evaluation, prompts, logits, session.curve)


def _score_suites(
    run: Run, peft_model: PeftModel
) -> tuple[dict[str, dict[str, tuple[float, float]]], list[SuiteFailure]]:
    """Return the scores of base and adapter by suite and metric, and the suites that lack some or all of them.

    Tasks, and the code of those supplied with a job, may fail on a model's output, which must not lose the adapter.
    """
    suites, write_line = run.job.spec.suites, run.progress.write_line
    scores_by_suite: dict[str, dict[str, tuple[float, float]]] = {}
    failures = []
    for suite in suites:
        if suite.held_out_loss is not None:
            continue
        scores = _suite_scores(run, suite, peft_model)
        if isinstance(scores, SuiteFailure):
            write_line(f"  not scored: {scores.message}")
            failures.append(scores)
            continue
        base, adapter = scores
        other_scores = sum(map(len, scores_by_suite.values())) + sum(
            other.held_out_loss is not None for other in suites
        )
        scores_by_suite[suite.name], omitted = gates.pair_scores(suite.name, base, adapter, other_scores=other_scores)
        if omitted is not None:
            write_line(f"  {omitted.message}")
            failures.append(omitted)
    return scores_by_suite, failures


def _suite_scores(
    run: Run, suite: Suite, peft_model: PeftModel
) -> tuple[dict[str, float], dict[str, float]] | SuiteFailure:
    """Return a suite's scores of base and adapter by metric, or why there are none on this or another rank."""
    scores = []
    for adapted in (False, True):
        run.progress.write_line(f"  evaluation suite {suite.name}: the {'adapter' if adapted else 'base model'}")
        failure = None
        try:
            scores.append(_scores(suite, run.job, run.prepared, peft_model, adapter=adapted))
        except TrainerError as error:
            failure = SuiteFailure(suite=suite.name, reason=error.reason, message=str(error)[:_MAX_MESSAGE_LENGTH])
        # Ranks score together only where weights are sharded.
        if run.sharded and run.ranks.any(failure is not None)[0] and failure is None:
            message = f"evaluation suite {suite.name} failed on another rank: see the log of its pod"
            failure = SuiteFailure(suite=suite.name, reason=FailureReason.INVALID_SPEC, message=message)
        if failure is not None:
            return failure
    base, adapter = scores
    return base, adapter


def _scores(
    suite: Suite, job: FineTuneJob, prepared: Prepared, peft_model: PeftModel, *, adapter: bool
) -> dict[str, float]:
    tokenizer = model.load_tokenizer(prepared.base, job.spec.base_model.uri)
    batch_size = prepared.resolved.micro_batch_size or 1
    settings = suite.generation
    if settings is None:
        own = prepared.task_folders.get(suite.name)
        return harness.scores(suite, peft_model, tokenizer, batch_size, adapter=adapter, own=own)
    examples = prepared.examples[suite.name]
    answers = generation.answers(
        peft_model,
        tokenizer,
        examples,
        adapter=adapter,
        max_new_tokens=settings.max_new_tokens,
        ends=prepared.ends,
        pad=prepared.pad,
        batch_size=batch_size,
    )
    return {settings.metric.value: generation.score(settings.metric, answers, [example.answer for example in examples])}


def _out_of_memory(job: FineTuneJob, prepared: Prepared, device: torch.device) -> OutOfMemoryError:
    micro = prepared.resolved.micro_batch_size or 1
    longest = int(row_lengths(prepared.train).max())
    changes = []
    if micro > 1:
        batch = prepared.resolved.batch_size or micro
        smaller = max(size for size in range(1, micro) if batch % size == 0)
        changes.append(f"hyperparameters.microBatchSize {smaller} (it is {micro})")
    if longest > 512:  # noqa: PLR2004 - shorter rows are rarely the cause
        changes.append(f"dataset.maxLength below {longest}, the longest row")
    parallelism = prepared.resolved.data_parallelism
    if parallelism is DataParallelism.DDP and device.type == "cuda" and job.spec.shardable:
        changes.append("resources.dataParallelism FSDP2")
    if job.spec.method.lora is not None:
        changes.append("method.qlora instead of lora")
    if device.type == "cuda" and not prepared.resolved.gradient_checkpointing:
        changes.append("hyperparameters.gradientCheckpointing true")
    changes.append("a GPU with more memory" if device.type == "cuda" else "more resources.memory")
    return OutOfMemoryError(
        f"memory ran out while training on the {'GPU' if device.type == 'cuda' else 'CPU'}: use {', or '.join(changes)}"
    )
