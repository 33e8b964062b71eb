"""One run: load, wrap, score the base, train, score the adapter."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers import set_seed

from tunesmith.api.conditions import FailureReason
from tunesmith.api.finetunejob_status import EvaluationStatus, Stage, SuiteFailure
from tunesmith.api.placement import DataParallelism
from tunesmith_trainer.artifact.parity import prompt_tokens
from tunesmith_trainer.base_model import model, sharding
from tunesmith_trainer.base_model.logits import last_logits
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
from tunesmith_trainer.training.arguments import arguments, precision_of
from tunesmith_trainer.training.batches import Collator, Plan, row_lengths
from tunesmith_trainer.training.compilation import compile_layers
from tunesmith_trainer.training.determinism import repeatable
from tunesmith_trainer.training.held_out import held_out_loss
from tunesmith_trainer.training.layout import choose_way
from tunesmith_trainer.training.lora import fuse
from tunesmith_trainer.training.loss import add_target_loss
from tunesmith_trainer.training.neftune import EmbeddingNoise
from tunesmith_trainer.training.objectives import step_objective
from tunesmith_trainer.training.saving import Saver
from tunesmith_trainer.training.scoring import Scoring
from tunesmith_trainer.training.trainer import StepTrainer
from tunesmith_trainer.training.watch import CurvePoint, Watch
from tunesmith_trainer.training.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedModel, Trainer

    from tunesmith.api.evaluation import Suite
    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith_trainer.preflight.prepare import Prepared
    from tunesmith_trainer.process.interruption import Faults
    from tunesmith_trainer.process.progress import Progress
    from tunesmith_trainer.process.ranks import Ranks
    from tunesmith_trainer.reporting.reporter import Reporter
    from tunesmith_trainer.training.checkpoint import Checkpoints, Saved

log = logging.getLogger(__name__)

_LONGEST_MESSAGE = 1024
"""Characters that the status has room for."""


@dataclass
class Trained:
    """A trained adapter, its scores and its curves."""

    model: PeftModel
    evaluation: EvaluationStatus
    prompts: list[list[int]]
    """Tokens of the parity prompts."""
    logits: list[torch.Tensor]
    """What the model says to each of them, in the type in which it was trained."""
    curve: list[CurvePoint] = field(default_factory=list)


def choose_device(gpus: int, number: int = 0) -> torch.device:
    """The device that the manifest asks for.

    Args:
        gpus: of the manifest.
        number: which of them.

    Raises:
        InvalidSpecError: it asks for more GPUs than there are.
    """
    if gpus == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InvalidSpecError(
            f"resources.gpus is {gpus} and no GPU is visible here: set it to 0 to train on the CPU, or check the "
            "node's driver"
        )
    if torch.cuda.device_count() < gpus:
        raise InvalidSpecError(
            f"resources.gpus is {gpus} and {torch.cuda.device_count()} can be seen here: lower it, or use a machine "
            "with more"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory of a GPU; None for the CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def train(
    job: FineTuneJob,
    prepared: Prepared,
    progress: Progress,
    reporter: Reporter,
    work: Path,
    faults: Faults,
    ranks: Ranks,
) -> Trained | None:
    """Trains the adapter and scores base and adapter on the held-out rows, from the newest checkpoint that verifies.

    The first rank has the result, the others None.

    Raises:
        InterruptedRunError: the process was asked to stop, and its state is saved.
        OutOfMemoryError: with what to change.
        LossDivergedError: the loss or its gradient is not finite, with the step.
        SelfCheckError: what was built is not what was asked for.
    """
    device = choose_device(job.spec.resources.gpus, ranks.local_rank)
    try:
        return repeatable(
            device, lambda: _train(job, prepared, progress, reporter, work, device, faults, ranks), progress.say
        )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(job, prepared, device) from error
    except RuntimeError as error:
        if "allocate memory" in str(error) or "not enough memory" in str(error):
            raise _out_of_memory(job, prepared, device) from error
        raise


def _train(
    job: FineTuneJob,
    prepared: Prepared,
    progress: Progress,
    reporter: Reporter,
    work: Path,
    device: torch.device,
    faults: Faults,
    ranks: Ranks,
) -> Trained | None:
    method = job.spec.method
    resolved = prepared.resolved
    assert resolved.micro_batch_size is not None  # noqa: S101 - prepare() fills everything
    assert resolved.batch_size is not None  # noqa: S101
    assert resolved.total_steps is not None  # noqa: S101
    seed = job.spec.hyperparameters.seed
    checkpointing = bool(resolved.gradient_checkpointing)

    progress.update(stage=Stage.LOADING)
    set_seed(seed)
    sharded = resolved.data_parallelism is DataParallelism.FSDP2 and not ranks.alone
    base, peft_model = _loaded(job, prepared, device, ranks, progress.say, sharded=sharded)
    fuse(peft_model)
    way = choose_way(peft_model, base)
    if checkpointing:
        _checkpoint_activations(base)
    compiled = bool(resolved.torch_compile) and compile_layers(
        peft_model,
        base,
        way,
        work / "compiled",
        progress.say,
        ranks,
        asked=bool(job.spec.hyperparameters.torch_compile),
    )
    args = arguments(job, prepared, work, device)
    objective = step_objective(job.spec.objective)
    collate = Collator(
        size=resolved.micro_batch_size,
        pad=prepared.pad,
        layout=way.layout,
        objective=objective,
        rank=ranks.rank,
        ranks=ranks.size,
    )
    curve: list[CurvePoint] = []
    watch = Watch(progress, reporter, curve, device)
    alpha = job.spec.hyperparameters.neftune_noise_alpha
    trainer = StepTrainer(
        model=peft_model,
        args=args,
        rows=prepared.train,
        plan=Plan(row_lengths(prepared.train), resolved.batch_size, seed, resolved.total_steps),
        collate=collate,
        objective=objective,
        ranks=ranks,
        callbacks=[watch],
        compiled=compiled,
        noise=None if alpha is None else EmbeddingNoise(base.get_input_embeddings(), alpha),
    )
    hooks.attach(trainer, peft_model, method)
    watchdog = Watchdog(faults.hung)
    saver = Saver(faults.checkpoints, job.spec.checkpoint, faults.interruption, curve, ranks, watchdog.paused)
    saver.attach(trainer)
    trainer.add_callback(watchdog)

    def score(*, adapter: bool) -> float:
        rows, size = prepared.validation, resolved.micro_batch_size or 1
        return held_out_loss(peft_model, rows, collate, size, adapter=adapter, ranks=ranks)

    def look() -> float:
        with watchdog.paused():
            return score(adapter=True)

    if resolved.evaluation_every_steps is not None:
        trainer.add_callback(Scoring(resolved.evaluation_every_steps, look, watch))

    with way.attending(base), watchdog:

        def run() -> None:
            _run(trainer, saver, faults, progress, ranks, lambda: reporter.replay(curve))

        losses = _scored(prepared, progress, reporter, score, curve, watch, run)
    # Where weights are shared out, each rank takes part in what the first one asks the model.
    if not ranks.first and not sharded:
        return None
    measured, failures = _measured(job, prepared, peft_model, progress, ranks if sharded else None)
    prompts = prompt_tokens(model.load_tokenizer_of(prepared.base, job.spec))
    logits = last_logits(peft_model, prompts)
    if sharded:
        sharding.gather(base, keep=ranks.first)
    if not ranks.first:
        return None
    return Trained(peft_model, gates.judge(job.spec.evaluation, losses, measured, failures), prompts, logits, curve)


def _loaded(
    job: FineTuneJob,
    prepared: Prepared,
    device: torch.device,
    ranks: Ranks,
    say: Callable[[str], None],
    *,
    sharded: bool,
) -> tuple[PreTrainedModel, PeftModel]:
    """The base, and the same with the adapter; each rank has all of the base, or a part where it is shared out."""
    method, resolved = job.spec.method, prepared.resolved
    dtype, full = precision_of(resolved.precision), method.full is not None
    if sharded:
        base = model.load_to_share_out(prepared.base, method.quantization, dtype, as_stored=full)
    else:
        base = model.load_model(prepared.base, device, method.quantization, dtype, as_stored=full)
    add_target_loss(base)

    def share_out() -> None:
        kept = sharding.shard(base, device, ranks, full=full)
        say(f"  FSDP2: each of {ranks.size} processes keeps {kept / 2**20:,.1f} MiB of the base's weights")

    steps = resolved.total_steps or 0
    return base, wrap(base, prepared.planned, prepared.train, method, steps, share_out if sharded else None)


def _checkpoint_activations(base: PreTrainedModel) -> None:
    if not base.supports_gradient_checkpointing:
        raise InvalidSpecError(
            f"a {type(base).__name__} cannot compute its activations again: set hyperparameters.gradientCheckpointing "
            "to false"
        )
    base.activation_checkpointing_enable({"use_reentrant": False})


def _scored(
    prepared: Prepared,
    progress: Progress,
    reporter: Reporter,
    score: Callable[..., float],
    curve: list[CurvePoint],
    watch: Watch,
    run: Callable[[], None],
) -> EvaluationStatus:
    """Trains with `run`; the held-out losses before and after."""
    resolved = prepared.resolved
    progress.update(stage=Stage.EVALUATING, step=0, total_steps=resolved.total_steps, epoch=0.0)
    before = score(adapter=False)
    if not math.isfinite(before):
        raise LossDivergedError(
            f"the base model's held-out loss is {before} before the first step: the base model's weights are damaged "
            "or do not fit this precision"
        )
    curve.append(CurvePoint(step=0, epoch=0.0, evaluation_loss=before))
    reporter.add(curve[-1])
    progress.update(stage=Stage.TRAINING)
    run()

    progress.update(stage=Stage.EVALUATING, eta_seconds=0)
    after = score(adapter=True)
    if not math.isfinite(after):
        raise LossDivergedError(
            f"the held-out loss is {after} after step {resolved.total_steps}: lower hyperparameters.learningRate"
        )
    watch.scored(after)
    return EvaluationStatus(base_loss=before, loss=after, loss_reduction_percent=100 * (before - after) / before)


def _measured(
    job: FineTuneJob, prepared: Prepared, peft_model: PeftModel, progress: Progress, ranks: Ranks | None
) -> tuple[dict[str, dict[str, tuple[float, float]]], list[SuiteFailure]]:
    """By suite of answers or tasks and by metric, the scores of base and adapter; and the suites that lack some or all.

    Tasks, and the code of those that a job brings, may fail on what a model says: what was trained is not lost by that.

    Args:
        job: the FineTuneJob.
        prepared: its inputs.
        peft_model: base with adapter.
        progress: tells what is scored.
        ranks: that score together; None where this process scores alone.
    """
    found: dict[str, dict[str, tuple[float, float]]] = {}
    failures = []
    for suite in job.spec.suites:
        if suite.held_out_loss is not None:
            continue
        scores = []
        for adapted in (False, True):
            progress.say(f"  evaluation suite {suite.name}: the {'adapter' if adapted else 'base model'}")
            failure = None
            try:
                scores.append(_scores(suite, job, prepared, peft_model, adapter=adapted))
            except TrainerError as error:
                failure = SuiteFailure(suite=suite.name, reason=error.reason, message=str(error)[:_LONGEST_MESSAGE])
            if ranks is not None and ranks.any(failure is not None)[0] and failure is None:
                told = f"evaluation suite {suite.name} failed at another rank, whose pod says why"
                failure = SuiteFailure(suite=suite.name, reason=FailureReason.INVALID_SPEC, message=told)
            if failure is not None:
                progress.say(f"  not scored: {failure.message}")
                failures.append(failure)
                break
        else:
            base, adapter = scores
            taken = sum(map(len, found.values())) + sum(one.held_out_loss is not None for one in job.spec.suites)
            found[suite.name], lost = gates.compared(suite.name, base, adapter, taken=taken)
            if lost is not None:
                progress.say(f"  {lost.message}")
                failures.append(lost)
    return found, failures


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


def _run(
    trainer: Trainer,
    saver: Saver,
    faults: Faults,
    progress: Progress,
    ranks: Ranks,
    restored: Callable[[], None],
) -> None:
    """Trains to the last step, from the newest checkpoint where there is one; `restored` is called with its curve."""
    saved = _newest(faults.checkpoints, ranks)
    if saved is not None:
        saver.restore(saved)
        restored()
        progress.say(f"  resumed from the checkpoint of step {saved.step}")
        progress.update(step=saved.step)
    try:
        # A Trainer that resumes after its last step would take another one.
        if saved is None or saved.step < trainer.args.max_steps:
            trainer.train(resume_from_checkpoint=None if saved is None else str(saved.path))
    except LossDivergedError as error:
        raise LossDivergedError(f"{error}; {saver.last_good()}") from error
    finally:
        faults.interruption.armed = False
    if saver.interrupted_at is not None:
        raise InterruptedRunError(saver.interrupted_at, trainer.args.max_steps)


def _newest(checkpoints: Checkpoints, ranks: Ranks) -> Saved | None:
    """The newest checkpoint that the first rank can use; the others take that one."""
    saved = checkpoints.newest() if ranks.first else None
    step = ranks.of_first(-1 if saved is None else saved.step)
    return saved if ranks.first or step < 0 else checkpoints.at(step)


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
