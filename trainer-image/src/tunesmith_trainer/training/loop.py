"""One run: load, wrap, score the base, train, score the adapter."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers import PrinterCallback, set_seed
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tunesmith.api.finetunejob_status import EvaluationStatus, Stage
from tunesmith_trainer import model
from tunesmith_trainer.errors import (
    InterruptedRunError,
    InvalidSpecError,
    LossDivergedError,
    OutOfMemoryError,
    SelfCheckError,
)
from tunesmith_trainer.evaluation import gates, generation
from tunesmith_trainer.evaluation.loss import held_out_loss
from tunesmith_trainer.training.arguments import arguments
from tunesmith_trainer.training.saving import Saver
from tunesmith_trainer.training.watch import CurvePoint, Watch
from tunesmith_trainer.training.watchdog import Watchdog

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset
    from peft import PeftModel
    from transformers import Trainer

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith_trainer.interruption import Faults
    from tunesmith_trainer.prepare import Prepared
    from tunesmith_trainer.progress import Progress

log = logging.getLogger(__name__)

_LOSS_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}


@dataclass
class Trained:
    """A trained adapter, its scores and its curves."""

    model: PeftModel
    evaluation: EvaluationStatus
    curve: list[CurvePoint] = field(default_factory=list)


def choose_device(gpus: int) -> torch.device:
    """The device that the manifest asks for.

    Raises:
        InvalidSpecError: it asks for a GPU and there is none.
    """
    if gpus == 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InvalidSpecError(
            f"resources.gpus is {gpus} and no GPU is visible here: set it to 0 to train on the CPU, or check the "
            "node's driver"
        )
    return torch.device("cuda", 0)


def device_memory(device: torch.device) -> int | None:
    """Bytes of memory of a GPU; None for the CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def train(job: FineTuneJob, prepared: Prepared, progress: Progress, work: Path, faults: Faults) -> Trained:
    """Trains the adapter and scores base and adapter on the held-out rows, from the newest checkpoint that verifies.

    Raises:
        InterruptedRunError: the process was asked to stop, and its state is saved.
        OutOfMemoryError: with what to change.
        LossDivergedError: the loss or its gradient is not finite, with the step.
        SelfCheckError: what was built is not what was asked for.
    """
    device = choose_device(job.spec.resources.gpus)
    try:
        return _train(job, prepared, progress, work, device, faults)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(job, prepared, device) from error
    except RuntimeError as error:
        if "allocate memory" in str(error) or "not enough memory" in str(error):
            raise _out_of_memory(job, prepared, device) from error
        raise


def _train(
    job: FineTuneJob, prepared: Prepared, progress: Progress, work: Path, device: torch.device, faults: Faults
) -> Trained:
    method = job.spec.method
    resolved = prepared.resolved
    assert resolved.micro_batch_size is not None  # noqa: S101 - prepare() fills everything
    seed = job.spec.hyperparameters.seed
    checkpointing = bool(resolved.gradient_checkpointing)

    progress.update(stage=Stage.LOADING)
    set_seed(seed)
    base = model.load_model(prepared.base, device, method.qlora.quantization if method.qlora else None)
    peft_model = model.with_adapter(
        base,
        method.fields,
        resolved.target_modules or [],
        quantized=method.qlora is not None,
        checkpointing=checkpointing,
    )
    model.check_adapter(peft_model, prepared.preflight.trainable_parameters or 0)
    collate = DataCollatorForLanguageModeling(pad_token_id=prepared.pad)
    curve: list[CurvePoint] = []
    trainer = SFTTrainer(
        model=peft_model,
        args=arguments(job, prepared, work, device, checkpointing=checkpointing),
        train_dataset=prepared.train,
        processing_class=model.load_tokenizer(prepared.base, job.spec.base_model.uri),
        data_collator=collate,
        callbacks=[Watch(progress, curve, device)],
    )
    trainer.remove_callback(PrinterCallback)
    saver = Saver(faults.checkpoints, job.spec.checkpoint, faults.interruption, curve)
    saver.attach(trainer)
    trainer.add_callback(Watchdog(faults.hung))
    model.full_precision_adapter(peft_model)

    def score(rows: Dataset, *, adapter: bool) -> float:
        return held_out_loss(peft_model, rows, collate, resolved.micro_batch_size or 1, adapter=adapter)

    progress.update(stage=Stage.EVALUATING, step=0, total_steps=resolved.total_steps, epoch=0.0)
    before = score(prepared.validation, adapter=False)
    if not math.isfinite(before):
        raise LossDivergedError(
            f"the base model's held-out loss is {before} before the first step: the base model's weights are damaged "
            "or do not fit this precision"
        )
    few = prepared.validation.select(range(min(len(prepared.validation), resolved.micro_batch_size)))
    _check_identity(score(few, adapter=False), score(few, adapter=True), device)
    curve.append(CurvePoint(step=0, epoch=0.0, evaluation_loss=before))
    progress.update(stage=Stage.TRAINING, evaluation_loss=before)
    _run(trainer, saver, faults, progress)

    progress.update(stage=Stage.EVALUATING, eta_seconds=0)
    after = score(prepared.validation, adapter=True)
    if not math.isfinite(after):
        raise LossDivergedError(
            f"the held-out loss is {after} after step {resolved.total_steps}: lower hyperparameters.learningRate"
        )
    last = curve[-1]
    curve.append(CurvePoint(step=last.step, epoch=last.epoch, evaluation_loss=after))
    progress.update(evaluation_loss=after)
    evaluation = EvaluationStatus(base_loss=before, loss=after, loss_reduction_percent=100 * (before - after) / before)
    answered = _generated(job, prepared, peft_model)
    return Trained(peft_model, gates.judge(job.spec.evaluation, evaluation, answered), curve)


def _generated(job: FineTuneJob, prepared: Prepared, peft_model: PeftModel) -> dict[str, tuple[float, float]]:
    """By generation suite, the metric of base and adapter."""
    tokenizer = model.load_tokenizer(prepared.base, job.spec.base_model.uri)
    scores = {}
    for suite in job.spec.evaluation.suites if job.spec.evaluation else []:
        asked = suite.generation
        if asked is None:
            continue
        examples = prepared.examples[suite.name]
        expected = [example.answer for example in examples]
        base, adapter = (
            generation.score(
                asked.metric,
                generation.answers(
                    peft_model,
                    tokenizer,
                    examples,
                    adapter=adapted,
                    max_new_tokens=asked.max_new_tokens,
                    ends=prepared.ends,
                    pad=prepared.pad,
                    batch_size=prepared.resolved.micro_batch_size or 1,
                ),
                expected,
            )
            for adapted in (False, True)
        )
        scores[suite.name] = (base, adapter)
    return scores


def _run(trainer: Trainer, saver: Saver, faults: Faults, progress: Progress) -> None:
    """Trains to the last step, from the newest checkpoint where there is one."""
    saved = faults.checkpoints.newest()
    if saved is not None:
        saver.restore(saved)
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


def _check_identity(base_loss: float, adapter_loss: float, device: torch.device) -> None:
    """A new LoRA adapter adds nothing (its B is zero), so both losses are one."""
    if abs(base_loss - adapter_loss) > _LOSS_TOLERANCE[device.type] * max(1.0, base_loss):
        raise SelfCheckError(
            f"the untrained adapter changes the held-out loss from {base_loss:.6f} to {adapter_loss:.6f}, it must "
            "not change it"
        )


def _out_of_memory(job: FineTuneJob, prepared: Prepared, device: torch.device) -> OutOfMemoryError:
    micro = prepared.resolved.micro_batch_size or 1
    longest = max(len(ids) for ids in prepared.train["input_ids"])
    changes = []
    if micro > 1:
        batch = prepared.resolved.batch_size or micro
        smaller = max(size for size in range(1, micro) if batch % size == 0)
        changes.append(f"hyperparameters.microBatchSize {smaller} (it is {micro})")
    if longest > 512:  # noqa: PLR2004 - shorter rows are rarely the cause
        changes.append(f"dataset.maxLength below {longest}, the longest row")
    if job.spec.method.qlora is None:
        changes.append("method.qlora instead of lora")
    changes.append("a GPU with more memory" if device.type == "cuda" else "more resources.memory")
    return OutOfMemoryError(
        f"memory ran out while training on the {'GPU' if device.type == 'cuda' else 'CPU'}: use {', or '.join(changes)}"
    )
