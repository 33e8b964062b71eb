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
from tunesmith.api.finetunejob_status import EvaluationStatus, Stage, SuiteFailure
from tunesmith.api.placement import DataParallelism
from tunesmith_trainer.base_model import model, sharding
from tunesmith_trainer.base_model.logits import last_logits
from tunesmith_trainer.base_model.precision import dtype_of
from tunesmith_trainer.base_model.prompts import prompt_tokens
from tunesmith_trainer.errors import (
    InterruptedRunError,
    InvalidSpecError,
    LossDivergedError,
    OutOfMemoryError,
    TrainerError,
)
from tunesmith_trainer.evaluation import gates, generation, harness
from tunesmith_trainer.methods import hooks
from tunesmith_trainer.methods.wrap import wrap
from tunesmith_trainer.reporting.curve import CurvePoint
from tunesmith_trainer.training.arguments import arguments
from tunesmith_trainer.training.batches import Collator, Plan, row_lengths
from tunesmith_trainer.training.compilation import compile_layers
from tunesmith_trainer.training.determinism import repeatable
from tunesmith_trainer.training.device import choose_device
from tunesmith_trainer.training.held_out import held_out_loss
from tunesmith_trainer.training.layout import choose_way
from tunesmith_trainer.training.lora import fuse
from tunesmith_trainer.training.loss import add_target_loss
from tunesmith_trainer.training.neftune import EmbeddingNoise
from tunesmith_trainer.training.objectives import step_objective
from tunesmith_trainer.training.saving import Saver
from tunesmith_trainer.training.scoring import Scoring
from tunesmith_trainer.training.trainer import StepTrainer
from tunesmith_trainer.training.watch import Watch
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
    from tunesmith_trainer.training.checkpoint import Checkpoints, Saved
    from tunesmith_trainer.training.layout import Way

log = logging.getLogger(__name__)

_LONGEST_MESSAGE = 1024
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
        return _decided(self.prepared.resolved.batch_size)

    @property
    def micro_batch_size(self) -> int:
        """Rows per forward pass."""
        return _decided(self.prepared.resolved.micro_batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return _decided(self.prepared.resolved.total_steps)


def _decided(value: int | None) -> int:
    assert value is not None  # noqa: S101 - prepare() fills everything
    return value


@dataclass
class Trained:
    """A trained adapter with its scores and curves."""

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
        InterruptedRunError: the process was asked to stop, and has saved its state.
        OutOfMemoryError: memory does not suffice; states what to change.
        LossDivergedError: the loss or its gradient is not finite; states the step.
        SelfCheckError: the model is not what was requested.
    """
    device = run.device
    try:
        return repeatable(device, lambda: _train(run), run.progress.say)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(run.job, run.prepared, device) from error
    except RuntimeError as error:
        if "allocate memory" in str(error) or "not enough memory" in str(error):
            raise _out_of_memory(run.job, run.prepared, device) from error
        raise


def _train(run: Run) -> Trained | None:
    run.progress.update(stage=Stage.LOADING)
    set_seed(run.job.spec.hyperparameters.seed)
    base, peft_model = _loaded(run)
    way, compiled = _computed(run, base, peft_model)
    session = _session(run, base, peft_model, way, compiled=compiled)
    with way.attending(base), session.watchdog:
        losses = _scored(run, session)
    # If weights are sharded, each rank takes part in every forward pass of the first rank.
    if not run.ranks.first and not run.sharded:
        return None
    return _result(run, base, session, losses)


def _loaded(run: Run) -> tuple[PreTrainedModel, PeftModel]:
    """Load the base and wrap it with the adapter; each rank has all of the base, or a shard if it is sharded."""
    prepared, device = run.prepared, run.device
    method, resolved = run.job.spec.method, prepared.resolved
    dtype, full = dtype_of(resolved.precision), method.full is not None
    if run.sharded:
        base = model.load_to_share_out(prepared.base, method.quantization, dtype, as_stored=full)
    else:
        base = model.load_model(prepared.base, device, method.quantization, dtype, as_stored=full)
    add_target_loss(base)

    def share_out() -> None:
        kept = sharding.shard(base, device, run.ranks, full=full)
        run.progress.say(
            f"  FSDP2: each of {run.ranks.size} processes keeps {kept / 2**20:,.1f} MiB of the base's weights"
        )

    steps = resolved.total_steps or 0
    return base, wrap(base, prepared.planned, prepared.train, method, steps, share_out if run.sharded else None)


def _computed(run: Run, base: PreTrainedModel, peft_model: PeftModel) -> tuple[Way, bool]:
    """Choose how the model is computed: fused LoRA, attention, recomputed activations, compiled layers.

    Returns:
        Layout and attention, and True if layers are compiled.
    """
    resolved = run.prepared.resolved
    fuse(peft_model)
    way = choose_way(peft_model, base)
    if resolved.gradient_checkpointing:
        _checkpoint_activations(base)
    compiled = bool(resolved.torch_compile) and compile_layers(
        peft_model,
        base,
        way,
        run.work / "compiled",
        run.progress.say,
        run.ranks,
        asked=bool(run.job.spec.hyperparameters.torch_compile),
    )
    return way, compiled


def _checkpoint_activations(base: PreTrainedModel) -> None:
    if not base.supports_gradient_checkpointing:
        raise InvalidSpecError(
            f"a {type(base).__name__} cannot compute its activations again: set hyperparameters.gradientCheckpointing "
            "to false"
        )
    base.activation_checkpointing_enable({"use_reentrant": False})


@dataclass(frozen=True)
class _Session:
    """A model in its trainer, with the callbacks that monitor, save and stop it."""

    model: PeftModel
    trainer: StepTrainer
    collate: Collator
    watch: Watch
    saver: Saver
    watchdog: Watchdog
    curve: list[CurvePoint]


def _session(run: Run, base: PreTrainedModel, peft_model: PeftModel, way: Way, *, compiled: bool) -> _Session:
    """Build the trainer with its callbacks, which are called in the order in which they are attached."""
    spec, prepared, ranks = run.job.spec, run.prepared, run.ranks
    args = arguments(run.job, prepared, run.work, run.device)
    objective = step_objective(spec.objective)
    collate = Collator(
        size=run.micro_batch_size,
        pad=prepared.pad,
        layout=way.layout,
        objective=objective,
        rank=ranks.rank,
        ranks=ranks.size,
    )
    curve: list[CurvePoint] = []
    watch = Watch(run.progress, run.reporter, curve, run.device)
    alpha = spec.hyperparameters.neftune_noise_alpha
    trainer = StepTrainer(
        model=peft_model,
        args=args,
        rows=prepared.train,
        plan=Plan(row_lengths(prepared.train), run.batch_size, spec.hyperparameters.seed, run.steps),
        collate=collate,
        objective=objective,
        ranks=ranks,
        callbacks=[watch],
        compiled=compiled,
        noise=None if alpha is None else EmbeddingNoise(base.get_input_embeddings(), alpha),
    )
    hooks.attach(trainer, peft_model, spec.method)
    watchdog = Watchdog(run.hung)
    saver = Saver(run.checkpoints, spec.checkpoint, run.interruption, curve, ranks, watchdog.paused)
    saver.attach(trainer)
    trainer.add_callback(watchdog)
    session = _Session(peft_model, trainer, collate, watch, saver, watchdog, curve)
    every = prepared.resolved.evaluation_every_steps
    if every is not None:

        def score() -> float:
            with watchdog.paused():
                return _held_out_loss(run, session, adapter=True)

        trainer.add_callback(Scoring(every, score, watch))
    return session


def _held_out_loss(run: Run, session: _Session, *, adapter: bool) -> float:
    rows, size = run.prepared.validation, run.micro_batch_size
    return held_out_loss(session.model, rows, session.collate, size, adapter=adapter, ranks=run.ranks)


def _scored(run: Run, session: _Session) -> EvaluationStatus:
    """Train, and return the held-out losses before and after.

    Raises:
        LossDivergedError: one of them is not finite.
    """
    progress, curve = run.progress, session.curve
    progress.update(stage=Stage.EVALUATING, step=0, total_steps=run.steps, epoch=0.0)
    before = _held_out_loss(run, session, adapter=False)
    if not math.isfinite(before):
        raise LossDivergedError(
            f"the base model's held-out loss is {before} before the first step: the base model's weights are damaged "
            "or do not fit this precision"
        )
    curve.append(CurvePoint(step=0, epoch=0.0, evaluation_loss=before))
    run.reporter.add(curve[-1])
    progress.update(stage=Stage.TRAINING)
    _take_steps(run, session)

    progress.update(stage=Stage.EVALUATING, eta_seconds=0)
    after = _held_out_loss(run, session, adapter=True)
    if not math.isfinite(after):
        raise LossDivergedError(
            f"the held-out loss is {after} after step {run.steps}: lower hyperparameters.learningRate"
        )
    session.watch.scored(after)
    return EvaluationStatus(base_loss=before, loss=after, loss_reduction_percent=100 * (before - after) / before)


def _take_steps(run: Run, session: _Session) -> None:
    """Take all remaining optimizer steps, from the newest usable checkpoint.

    Raises:
        InterruptedRunError: the process was asked to stop.
        LossDivergedError: the loss or its gradient is not finite.
    """
    trainer, saver = session.trainer, session.saver
    saved = _newest(run.checkpoints, run.ranks)
    if saved is not None:
        saver.restore(saved)
        run.reporter.replay(session.curve)
        run.progress.say(f"  resumed from the checkpoint of step {saved.step}")
        run.progress.update(step=saved.step)
    try:
        # A Trainer that resumes after its last step would take another one.
        if saved is None or saved.step < trainer.args.max_steps:
            trainer.train(resume_from_checkpoint=None if saved is None else str(saved.path))
    except LossDivergedError as error:
        raise LossDivergedError(f"{error}; {saver.last_good()}") from error
    finally:
        run.interruption.armed = False
    if saver.interrupted_at is not None:
        raise InterruptedRunError(saver.interrupted_at, trainer.args.max_steps)


def _newest(checkpoints: Checkpoints, ranks: Ranks) -> Saved | None:
    """Return the newest checkpoint that the first rank can use; the others use the same one."""
    saved = checkpoints.newest() if ranks.first else None
    step = ranks.of_first(-1 if saved is None else saved.step)
    return saved if ranks.first or step < 0 else checkpoints.at(step)


def _result(run: Run, base: PreTrainedModel, session: _Session, losses: EvaluationStatus) -> Trained | None:
    """Score the suites and record the logits; return None on the other ranks, which only take part in it."""
    measured, failures = _measured(run, session.model)
    prompts = prompt_tokens(model.load_tokenizer_of(run.prepared.base, run.job.spec))
    logits = last_logits(session.model, prompts)
    if run.sharded:
        sharding.gather(base, keep=run.ranks.first)
    if not run.ranks.first:
        return None
    evaluation = gates.judge(run.job.spec.evaluation, losses, measured, failures)
    return Trained(session.model, evaluation, prompts, logits, session.curve)


def _measured(run: Run, peft_model: PeftModel) -> tuple[dict[str, dict[str, tuple[float, float]]], list[SuiteFailure]]:
    """Return the scores of base and adapter by suite and metric, and the suites that lack some or all of them.

    Tasks, and the code of those supplied with a job, may fail on a model's output: that must not lose the adapter.
    """
    suites, say = run.job.spec.suites, run.progress.say
    found: dict[str, dict[str, tuple[float, float]]] = {}
    failures = []
    for suite in suites:
        if suite.held_out_loss is not None:
            continue
        scores = _suite_scores(run, suite, peft_model)
        if isinstance(scores, SuiteFailure):
            say(f"  not scored: {scores.message}")
            failures.append(scores)
            continue
        base, adapter = scores
        taken = sum(map(len, found.values())) + sum(other.held_out_loss is not None for other in suites)
        found[suite.name], lost = gates.compared(suite.name, base, adapter, taken=taken)
        if lost is not None:
            say(f"  {lost.message}")
            failures.append(lost)
    return found, failures


def _suite_scores(
    run: Run, suite: Suite, peft_model: PeftModel
) -> tuple[dict[str, float], dict[str, float]] | SuiteFailure:
    """Return a suite's scores of base and adapter by metric, or why there are none on this or another rank."""
    scores = []
    for adapted in (False, True):
        run.progress.say(f"  evaluation suite {suite.name}: the {'adapter' if adapted else 'base model'}")
        failure = None
        try:
            scores.append(_scores(suite, run.job, run.prepared, peft_model, adapter=adapted))
        except TrainerError as error:
            failure = SuiteFailure(suite=suite.name, reason=error.reason, message=str(error)[:_LONGEST_MESSAGE])
        # Ranks score together only where weights are sharded.
        if run.sharded and run.ranks.any(failure is not None)[0] and failure is None:
            told = f"evaluation suite {suite.name} failed at another rank, whose pod says why"
            failure = SuiteFailure(suite=suite.name, reason=FailureReason.INVALID_SPEC, message=told)
        if failure is not None:
            return failure
    base, adapter = scores
    return base, adapter


def _scores(
    suite: Suite, job: FineTuneJob, prepared: Prepared, peft_model: PeftModel, *, adapter: bool
) -> dict[str, float]:
    tokenizer = model.load_tokenizer(prepared.base, job.spec.base_model.uri)
    batch_size = prepared.resolved.micro_batch_size or 1
    asked = suite.generation
    if asked is None:
        own = prepared.task_folders.get(suite.name)
        return harness.scores(suite, peft_model, tokenizer, batch_size, adapter=adapter, own=own)
    examples = prepared.examples[suite.name]
    given = generation.answers(
        peft_model,
        tokenizer,
        examples,
        adapter=adapter,
        max_new_tokens=asked.max_new_tokens,
        ends=prepared.ends,
        pad=prepared.pad,
        batch_size=batch_size,
    )
    return {asked.metric.value: generation.score(asked.metric, given, [example.answer for example in examples])}


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
