"""The hyperparameters as the Trainer's arguments."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from trl import SFTConfig

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith_trainer.prepare import Prepared

_SCHEDULERS = {"Cosine": "cosine", "Linear": "linear", "Constant": "constant_with_warmup"}


def arguments(
    job: FineTuneJob, prepared: Prepared, work: Path, device: torch.device, *, checkpointing: bool
) -> SFTConfig:
    """The arguments of a run: one optimizer step is one log line; nothing is saved or reported by itself."""
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
