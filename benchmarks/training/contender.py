"""Train once with one contender, in a separate process, and print the results as one line of JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rows as texts
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from recipe import ALPHA, BATCH, MICRO, RANK, RATE, SEED, Clock, Rows, figures, held_out_loss, peak_memory
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

if TYPE_CHECKING:
    from collections.abc import Callable

PACK_LENGTH = 1024
"""TRL's default."""


class Ticks(TrainerCallback):
    """Records the times of the Trainer's steps."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the start of training."""
        self._clock.tick()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the end of a step."""
        self._clock.tick()


def common(folder: Path, steps: int) -> dict[str, Any]:
    """Return the arguments that all contenders share."""
    return {
        "output_dir": str(folder / "out"),
        "max_steps": steps,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "seed": SEED,
        "use_cpu": True,
        "bf16": False,  # on a CPU it is slower
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def model_of(base: Path, method: str) -> Any:
    """Return the base with a LoRA adapter on all linear layers, built as in PEFT's documentation."""
    set_seed(SEED)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,  # bfloat16 is many times slower on a CPU
    )
    extra = {"quantization_config": quantization, "device_map": {"": "cpu"}} if method == "qlora" else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **extra)
    if method == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for module in model.modules():  # otherwise no gradient passes 4-bit layers after the first evaluation
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def notebook(base: Path, method: str, rows: Rows, folder: Path, clock: Clock) -> Any:
    """Train with the Trainer of transformers on rows padded to one length, as most notebooks do."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = Trainer(
        model=model_of(base, method),
        args=TrainingArguments(
            **common(folder, math.ceil(len(rows) / BATCH)),
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=BATCH // MICRO,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding="max_length", max_length=texts.LONGEST),
        callbacks=[Ticks(clock)],
    )
    trainer.train()
    return trainer.model


def trl(base: Path, method: str, rows: Rows, folder: Path, clock: Clock, variant: str) -> Any:
    """Train with TRL's SFTTrainer: `default`, or `packed` or `grouped` without recomputation, which is faster."""
    from datasets import Dataset  # noqa: PLC0415
    from trl import SFTConfig, SFTTrainer  # noqa: PLC0415

    steps, micro, batch, settings = math.ceil(len(rows) / BATCH), MICRO, BATCH, {}
    if variant == "packed":
        # Enough bins per step for about as many tokens as in the rows of a step.
        mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
        micro, batch = 1, max(1, round(BATCH * mean / PACK_LENGTH))
        settings = {"packing": True, "max_length": PACK_LENGTH, "gradient_checkpointing": False, "num_train_epochs": 1}
        steps = -1
    elif variant == "grouped":
        settings = {"train_sampling_strategy": "group_by_length", "gradient_checkpointing": False}
    trainer = SFTTrainer(
        model=model_of(base, method),
        args=SFTConfig(
            **common(folder, steps),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=batch // micro,
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=[Ticks(clock)],
    )
    trainer.train()
    return trainer.model


@dataclass(frozen=True)
class Optimizations:
    """Optimizations of Tunesmith that a run uses.

    Attributes:
        flat: True if rows are concatenated without padding.
        chunked: True if logits are computed at target positions only, in chunks.
        compiled: True if norms and feed-forward layers are compiled.
    """

    flat: bool = True
    chunked: bool = True
    compiled: bool = False


def tunesmith(base: Path, method: str, folder: Path, clock: Clock, optimizations: Optimizations) -> float:
    """Run a manifest with Tunesmith, from the raw rows on, and return the held-out loss.

    Args:
        base: folder of the base model.
        method: lora or qlora.
        folder: folder with train.jsonl and validation.jsonl.
        clock: records the times.
        optimizations: optimizations to use.
    """
    from tunesmith.api.finetunejob import FineTuneJob  # noqa: PLC0415
    from tunesmith.api.finetunejob_status import Stage  # noqa: PLC0415
    from tunesmith_trainer.errors import StorageUnavailableError  # noqa: PLC0415
    from tunesmith_trainer.preflight.prepare import prepare  # noqa: PLC0415
    from tunesmith_trainer.process.interruption import Interruption  # noqa: PLC0415
    from tunesmith_trainer.process.progress import Progress  # noqa: PLC0415
    from tunesmith_trainer.process.ranks import Ranks  # noqa: PLC0415
    from tunesmith_trainer.reporting.reporter import Reporter  # noqa: PLC0415
    from tunesmith_trainer.store import Stores  # noqa: PLC0415
    from tunesmith_trainer.training import layout, loop  # noqa: PLC0415
    from tunesmith_trainer.training.checkpoint import Checkpoints  # noqa: PLC0415

    if not optimizations.flat:
        layout.loss_implementations = lambda *_: [
            layout.LossImplementation(layout.Layout.PADDED, whole_logits=not optimizations.chunked)
        ]

    class Timed(Progress):
        def update(self, **changes: Any) -> None:
            super().update(**changes)
            if changes.get("stage") is Stage.TRAINING or changes.get("step"):
                clock.tick()

    fields = {"rank": RANK, "alpha": ALPHA}
    quantized = {**fields, "quantization": {"computeType": "float32"}}
    rows = sum(1 for _ in (folder / "train.jsonl").open(encoding="utf-8"))
    hyper = {"maxSteps": math.ceil(rows / BATCH), "batchSize": BATCH, "microBatchSize": MICRO, "learningRate": RATE}
    spec = {
        "baseModel": {"uri": f"file://{base}"},
        "dataset": {
            "train": [{"uri": f"file://{folder}/train.jsonl"}],
            "validation": [{"uri": f"file://{folder}/validation.jsonl"}],
            "maxLength": texts.LONGEST,
        },
        "method": {method: quantized if method == "qlora" else fields},
        "hyperparameters": {
            **hyper,
            "scheduler": "Constant",
            "warmupRatio": 0.0,
            "seed": SEED,
            "torchCompile": optimizations.compiled,
        },
        "resources": {"gpus": 0},
    }
    job = FineTuneJob.model_validate(
        {"apiVersion": "tunesmith.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "benchmark"}, "spec": spec}
    )
    stores = Stores(secrets=folder, allow_file=True)
    work = folder / f"work-{time.time_ns()}"
    work.mkdir()
    prepared = prepare(job, stores, work, weights=True)
    place = stores.folder(f"file://{work}/checkpoints", what="checkpoints", missing=StorageUnavailableError)
    checkpoints = Checkpoints(place, work / "scratch", binding="0" * 64, keep=1, write_line=lambda _: None)
    with (work / "log").open("w", encoding="utf-8") as log:
        run = loop.Run(
            job=job,
            prepared=prepared,
            work=work,
            ranks=Ranks(),
            progress=Timed("text", out=log),
            reporter=Reporter(),
            checkpoints=checkpoints,
            interruption=Interruption(),
            hung=lambda step, seconds: sys.exit(f"no progress for {seconds} s after step {step}"),
        )
        trained = loop.train(run)
    assert trained.evaluation.loss is not None  # noqa: S101 - a finished run has one
    return trained.evaluation.loss


OTHERS: dict[str, Callable[..., Any]] = {
    "notebook": notebook,
    "trl-default": lambda *arguments: trl(*arguments, variant="default"),
    "trl-packed": lambda *arguments: trl(*arguments, variant="packed"),
    "trl-grouped": lambda *arguments: trl(*arguments, variant="grouped"),
}
TUNESMITH = {
    "tunesmith-padded-logits": Optimizations(flat=False, chunked=False),
    "tunesmith-padded": Optimizations(flat=False),
    "tunesmith": Optimizations(),
    "tunesmith-compiled": Optimizations(compiled=True),
}


def main() -> None:
    """Run the contender that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=(*OTHERS, *TUNESMITH))
    parser.add_argument("method", choices=("lora", "qlora"))
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--data", type=Path, required=True, help="folder with the rows, raw and tokenised")
    parser.add_argument(
        "--began", type=float, required=True, help="time at which the process was started, in seconds since the epoch"
    )
    arguments = parser.parse_args()
    rows = json.loads((arguments.data / "tokens.json").read_text(encoding="utf-8"))
    clock = Clock()
    if arguments.name in TUNESMITH:
        loss = tunesmith(arguments.base, arguments.method, arguments.data, clock, TUNESMITH[arguments.name])
        peak = peak_memory()
    else:
        model = OTHERS[arguments.name](arguments.base, arguments.method, rows["train"], arguments.data, clock)
        peak = peak_memory()
        model.eval()
        loss = held_out_loss(lambda ids: model(input_ids=ids).logits, rows["validation"])
    print(figures(clock, rows["train"], began=arguments.began, peak=peak, loss=loss))


if __name__ == "__main__":
    main()
