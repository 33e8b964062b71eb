"""Training: TRL's SFTTrainer over our own tokens, watched at every step."""

from __future__ import annotations

import logging
import math
import resource
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tunesmith.api.finetunejob_status import EvaluationStatus, Stage
from tunesmith_trainer import evaluate, model
from tunesmith_trainer.errors import InvalidSpecError, LossDivergedError, OutOfMemoryError, SelfCheckError

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset
    from peft import PeftModel
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith_trainer.prepare import Prepared
    from tunesmith_trainer.progress import Progress

log = logging.getLogger(__name__)

_SCHEDULERS = {"Cosine": "cosine", "Linear": "linear", "Constant": "constant_with_warmup"}
_RECENT_STEPS = 10
_LOSS_TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}


@dataclass(frozen=True)
class CurvePoint:
    """One line of the curves: losses in nats per target token."""

    step: int
    epoch: float
    loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    tokens: int | None = None
    evaluation_loss: float | None = None


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


def train(job: FineTuneJob, prepared: Prepared, progress: Progress, work: Path) -> Trained:
    """Trains the adapter and scores base and adapter on the held-out rows.

    Raises:
        OutOfMemoryError: with what to change.
        LossDivergedError: the loss or its gradient is not finite, with the step.
        SelfCheckError: what was built is not what was asked for.
    """
    device = choose_device(job.spec.resources.gpus)
    try:
        return _train(job, prepared, progress, work, device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(job, prepared, device) from error
    except RuntimeError as error:
        if "allocate memory" in str(error) or "not enough memory" in str(error):
            raise _out_of_memory(job, prepared, device) from error
        raise


def _train(job: FineTuneJob, prepared: Prepared, progress: Progress, work: Path, device: torch.device) -> Trained:
    method = job.spec.method
    resolved = prepared.resolved
    assert resolved.micro_batch_size is not None  # noqa: S101 - prepare() fills everything
    seed = job.spec.hyperparameters.seed
    checkpointing = device.type == "cuda"

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
        args=_arguments(job, prepared, work, device, checkpointing=checkpointing),
        train_dataset=prepared.train,
        processing_class=model.load_tokenizer(prepared.base, job.spec.base_model.uri),
        data_collator=collate,
        callbacks=[_Watch(progress, curve, device)],
    )
    trainer.remove_callback(PrinterCallback)
    model.full_precision_adapter(peft_model)

    def score(rows: Dataset, *, adapter: bool) -> float:
        return evaluate.held_out_loss(peft_model, rows, collate, resolved.micro_batch_size or 1, adapter=adapter)

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
    trainer.train()

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
    return Trained(peft_model, evaluation, curve)


def _arguments(
    job: FineTuneJob, prepared: Prepared, work: Path, device: torch.device, *, checkpointing: bool
) -> SFTConfig:
    hyper = job.spec.hyperparameters
    resolved = prepared.resolved
    assert resolved.batch_size is not None  # noqa: S101 - prepare() fills everything
    assert resolved.micro_batch_size is not None  # noqa: S101
    assert resolved.total_steps is not None  # noqa: S101
    assert resolved.learning_rate is not None  # noqa: S101
    return SFTConfig(
        output_dir=str(work / "checkpoints"),
        max_steps=resolved.total_steps,
        per_device_train_batch_size=resolved.micro_batch_size,
        gradient_accumulation_steps=resolved.batch_size // resolved.micro_batch_size,
        learning_rate=resolved.learning_rate,
        lr_scheduler_type=_SCHEDULERS[hyper.scheduler],
        warmup_steps=math.ceil(hyper.warmup_ratio * resolved.total_steps),
        weight_decay=hyper.weight_decay,
        max_grad_norm=hyper.max_grad_norm,
        optim="adamw_torch",
        seed=hyper.seed,
        data_seed=hyper.seed,
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        gradient_checkpointing=checkpointing,
        # Rows are tokenised, cut to length and labelled before they get here.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
        dataloader_num_workers=0,
        dataloader_pin_memory=device.type == "cuda",
    )


def _check_identity(base_loss: float, adapter_loss: float, device: torch.device) -> None:
    """A new LoRA adapter adds nothing (its B is zero), so both losses are one."""
    if abs(base_loss - adapter_loss) > _LOSS_TOLERANCE[device.type] * max(1.0, base_loss):
        raise SelfCheckError(
            f"the untrained adapter changes the held-out loss from {base_loss:.6f} to {adapter_loss:.6f}, it must "
            "not change it"
        )


class _Watch(TrainerCallback):
    """Tells progress, keeps the curves, and stops a run that went wrong."""

    def __init__(self, progress: Progress, curve: list[CurvePoint], device: torch.device) -> None:
        self._progress = progress
        self._curve = curve
        self._device = device
        self._times: list[float] = []
        self._tokens: list[int] = [0]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The clock of the first step starts here."""
        self._times.append(time.monotonic())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """At the first step a gradient must have reached the adapter."""
        if state.global_step == 0:
            gradients = [parameter.grad for parameter in kwargs["model"].parameters() if parameter.requires_grad]
            if not any(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients):
                finite = all(gradient is None or bool(torch.isfinite(gradient).all()) for gradient in gradients)
                if finite:
                    raise SelfCheckError("no gradient reaches the adapter at step 1: nothing would be learned")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One optimizer step is done."""
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:
            return
        step, loss, norm = state.global_step, float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm}"
            raise LossDivergedError(
                f"the {what} at step {step} of {state.max_steps}: lower hyperparameters.learningRate (it is "
                f"{args.learning_rate:g}) and look for odd rows"
            )
        self._times.append(time.monotonic())
        self._tokens.append(int(logs.get("num_tokens", 0)))
        del self._times[: -_RECENT_STEPS - 1], self._tokens[: -_RECENT_STEPS - 1]
        seconds = self._times[-1] - self._times[0]
        epoch = round(float(state.epoch or 0.0), 4)
        rate = float(logs["learning_rate"])
        self._curve.append(CurvePoint(step, epoch, loss, rate, norm, self._tokens[-1]))
        self._progress.update(
            step=step,
            epoch=epoch,
            loss=loss,
            learning_rate=rate,
            tokens_per_second=round((self._tokens[-1] - self._tokens[0]) / seconds, 1) if seconds > 0 else None,
            memory_bytes=_peak_memory(self._device),
            eta_seconds=round(seconds / (len(self._times) - 1) * (state.max_steps - step)),
        )


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
