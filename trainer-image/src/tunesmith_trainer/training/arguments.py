"""Convert the hyperparameters to the Trainer's arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import TrainingArguments

from tunesmith.api.hyperparameters import Optimizer, Precision

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith_trainer.preflight.prepare import Prepared

_OPTIMIZERS = {
    Optimizer.ADAMW: "adamw_torch",
    Optimizer.ADAMW_8BIT: "adamw_bnb_8bit",
    Optimizer.ADAFACTOR: "adafactor",
    Optimizer.LION: "lion_32bit",
    Optimizer.SGD: "sgd",
}


def arguments(job: FineTuneJob, prepared: Prepared, work: Path, device: torch.device) -> TrainingArguments:
    """Return the arguments of a run: one log line per optimizer step; the Trainer itself saves and reports nothing."""
    hyper = job.spec.hyperparameters
    resolved = prepared.resolved
    assert resolved.micro_batch_size is not None  # noqa: S101 - prepare() fills everything
    assert resolved.total_steps is not None  # noqa: S101
    assert resolved.learning_rate is not None  # noqa: S101
    return TrainingArguments(
        output_dir=str(work / "checkpoints"),
        max_steps=resolved.total_steps,
        # The micro-batches of a step are inside one element of the data loader.
        per_device_train_batch_size=resolved.micro_batch_size,
        gradient_accumulation_steps=1,
        learning_rate=resolved.learning_rate,
        weight_decay=hyper.weight_decay,
        max_grad_norm=hyper.max_grad_norm,
        optim=_OPTIMIZERS[hyper.optimizer],
        seed=hyper.seed,
        data_seed=hyper.seed,
        bf16=resolved.precision is Precision.BFLOAT16,
        use_cpu=device.type == "cpu",
        # The collator needs columns that the Trainer would remove.
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
    )
