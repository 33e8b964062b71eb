"""Train once with litgpt's LoRA fine-tuning on the same rows, and print the results as one line of JSON.

This calls litgpt's own command as a function, with its own padding, loss and optimizer. Only the rows are already
tokenised, and the learning rate is constant like that of the others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data.base import DataModule, get_sft_collate_fn
from litgpt.finetune import lora
from litgpt.prompts import Default
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from recipe import ALPHA, BATCH, MICRO, RANK, RATE, SEED, Clock, Rows, figures, held_out_loss, peak_memory

WEIGHTS = "lit_model.pth"


class Tokens(Dataset[dict[str, Any]]):
    """Rows in the format of litgpt's collation."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {name: torch.tensor(values) for name, values in self._rows[index].items()}
        length = len(row["input_ids"])
        return {**row, "token_counts": {"raw": length, "raw_plus_prompt_template": length}}


class Rowwise(DataModule):  # type: ignore[misc] # without annotations
    """The tokenised rows, in litgpt's batches."""

    def __init__(self, rows: dict[str, Rows], clock: Clock) -> None:
        super().__init__()
        self.prompt_style = Default()
        self._rows = rows
        self._clock = clock

    def connect(self, *given: Any, **named: Any) -> None:
        """Do nothing: the rows are already tokenised."""

    def train_dataloader(self) -> DataLoader[Any]:
        """Return a loader in shuffled order; training starts when the first batch is requested."""
        clock = self._clock

        class Timed(DataLoader[Any]):
            def __iter__(self) -> Any:
                if not clock.times:
                    clock.tick()
                return super().__iter__()

        generator = torch.Generator().manual_seed(SEED)
        rows = Tokens(self._rows["train"])
        return Timed(rows, batch_size=MICRO, shuffle=True, generator=generator, collate_fn=get_sft_collate_fn())

    def val_dataloader(self) -> DataLoader[Any]:
        """Return a loader of single rows; litgpt evaluates two of them before training."""
        return DataLoader(Tokens(self._rows["validation"]), batch_size=1, collate_fn=get_sft_collate_fn())


def main() -> None:
    """Train once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model, a name that litgpt knows")
    parser.add_argument("--data", type=Path, required=True, help="folder with tokens.json")
    parser.add_argument(
        "--began", type=float, required=True, help="time at which the process was started, in seconds since the epoch"
    )
    given = parser.parse_args()
    rows: dict[str, Rows] = json.loads((given.data / "tokens.json").read_text(encoding="utf-8"))
    base = given.data / "litgpt" / given.base.name
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(dir=given.data) as folder:
        if not (base / WEIGHTS).exists():
            base.mkdir(parents=True)
            for file in given.base.iterdir():
                (base / file.name).symlink_to(file)
            convert_hf_checkpoint(base, dtype="float32")
        clock = Clock()
        peaks: list[int] = []

        def stepped(*_: object) -> None:
            clock.tick()
            peaks.append(peak_memory())

        register_optimizer_step_post_hook(stepped)
        models: list[Any] = []

        def fit(**arguments: Any) -> Any:
            models.append(arguments["model"])
            return litgpts_fit(**arguments)

        litgpts_fit, lora.fit = lora.fit, fit
        lora.save_hyperparameters = lora.merge_lora = lambda *_, **__: None  # run after training, for its command line
        lora.get_lr_scheduler = lambda optimizer, **_: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        lora.setup(
            base,
            Path(folder),
            precision="32-true",
            lora_r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=0.0,
            lora_key=True,
            lora_projection=True,
            lora_mlp=True,
            data=Rowwise(rows, clock),
            train=TrainArgs(
                save_interval=None,
                log_interval=1,
                global_batch_size=BATCH,
                micro_batch_size=MICRO,
                lr_warmup_steps=0,
                epochs=1000,
                max_steps=math.ceil(len(rows["train"]) / BATCH),
            ),
            eval=EvalArgs(interval=10**9, max_new_tokens=1, max_iters=1, final_validation=False),
            optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": RATE, "weight_decay": 0.0}},
            seed=SEED,
        )
        [model] = models
        model.eval()
        loss = held_out_loss(model, rows["validation"])
    print(figures(clock, rows["train"], began=given.began, peak=peaks[-1], loss=loss))


if __name__ == "__main__":
    main()
