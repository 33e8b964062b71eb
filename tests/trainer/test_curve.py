"""Training gives the same results as a plain script with PEFT and TRL, step by step."""

from __future__ import annotations

import csv
import itertools
import math
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from tests.trainer.architectures import FAMILIES, make
from tests.trainer.chat_styles import STYLES
from tests.trainer.trainer_rig import Workbench, write_rows
from tunesmith_trainer.manifest import load_job
from tunesmith_trainer.preflight.prepare import prepare
from tunesmith_trainer.store import Stores
from tunesmith_trainer.training.batches import StepPlan

if TYPE_CHECKING:
    from pathlib import Path

BATCH, MICRO, STEPS, SEED, RATE = 6, 2, 9, 11, 0.01


def share_of_rate(taken: int) -> float:
    """Return the share of the learning rate after so many steps: a warm-up of 2 steps, then half a cosine."""
    if taken < 2:
        return (taken + 1) / 2
    return 0.5 * (1 + math.cos(math.pi * (taken - 2) / (STEPS - 2)))


def trl_script(
    base: Path, targets: list[str], rows: list[dict[str, Any]], folder: Path
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return losses and adapter of TRL's SFTTrainer over tokenised rows in this order."""
    set_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.config.router_aux_loss_coef = 0.0  # of experts, which TRL adds to the loss and PEFT alone does not
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=get_peft_model(model, config),
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=BATCH // MICRO,
            learning_rate=RATE,
            weight_decay=0.1,
            max_grad_norm=0.5,
            seed=SEED,
            train_sampling_strategy="sequential",
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.create_optimizer()
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, share_of_rate)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    curve = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    return curve, load_file(folder / "adapter/adapter_model.safetensors")


def varied_rows(count: int) -> list[dict[str, Any]]:
    """Return rows of very different lengths, so that padding, order and normalisation matter."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is the colour of door {number}?" * (1 + number % 3)},
                {"role": "assistant", "content": "It is green, as in Brinewick. " * (1 + 5 * (number % 4))},
            ]
        }
        for number in range(count)
    ]


def train(bench: Workbench, rows: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> list[float]:
    """Train on all rows and return the losses of the steps."""
    job = bench.job(
        rows,
        hyperparameters={
            "maxSteps": STEPS,
            "batchSize": BATCH,
            "microBatchSize": MICRO,
            "learningRate": RATE,
            "warmupRatio": 0.2,
            "weightDecay": 0.1,
            "maxGradNorm": 0.5,
            "seed": SEED,
        },
    )
    validation = write_rows(bench.folder / "validation.jsonl", held_out)
    job["spec"]["dataset"]["validation"] = [{"uri": f"file://{validation}"}]
    ran = bench.run("train", job)
    assert ran.code == 0, ran.result.message
    with (bench.output / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def assert_same(bench: Workbench, ours: list[float], targets: list[str], rows: list[dict[str, Any]]) -> None:
    """Assert that losses and adapter are those of TRL's SFTTrainer over these rows, in the order of our steps."""
    plan = StepPlan([len(row["input_ids"]) for row in rows], BATCH, SEED, STEPS)
    ordered = [rows[number] for step in plan for number in step]
    theirs, adapter = trl_script(bench.base, targets, ordered, bench.folder / "trl")
    assert len(ours) == len(theirs) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-4)
    mine = load_file(bench.output / "artifact/adapter_model.safetensors")
    assert set(mine) == set(adapter)
    for name, tensor in mine.items():
        assert float((tensor - adapter[name]).norm()) <= 1e-3 * float(adapter[name].norm()), name


LLAMA = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("Llama 3", LLAMA),
        ("GPT-2", ["c_attn", "c_fc", "c_proj"]),
        ("Mixtral", ["k_proj", "o_proj", "q_proj", "v_proj"]),
    ],
)
def test_the_loss_curve_is_that_of_peft_and_trl(bench: Workbench, family: str, targets: list[str]) -> None:
    bench.base = make(next(known for known in FAMILIES if known.name == family), bench.folder / "bases" / "tiny")
    ours = train(bench, varied_rows(24), varied_rows(4))
    prepared = prepare(
        load_job(bench.folder / "job.yaml"),
        Stores(secrets=bench.folder, allow_file=True),
        bench.folder / "work",
        weights=True,
    )
    assert_same(bench, ours, targets, [dict(row) for row in prepared.train])


def reasoning_chat(number: int) -> dict[str, Any]:
    """Return a chat of three questions, of which the second is answered after a call."""
    call = {"type": "function", "function": {"name": "door", "arguments": {"number": number}}}
    think = "It may be green. " * (1 + number % 4)
    return {
        "messages": [
            {"role": "user", "content": f"Who lives behind door {number}?"},
            {"role": "assistant", "reasoning_content": think, "content": f"Marta, in house {number}."},
            {"role": "user", "content": "And its colour?" * (1 + number % 3)},
            {"role": "assistant", "reasoning_content": "I look.", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "green" if number % 2 else "blue"},
            {"role": "assistant", "reasoning_content": think, "content": "It is as in Brinewick."},
            {"role": "user", "content": "Thanks."},
            {"role": "assistant", "content": "You are welcome. " * (1 + number % 2)},
        ]
    }


def plain_rows(tokenizer: Any, chat: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row per question: the answers to it are learned, after the prompt that a server receives."""
    messages, rows = chat["messages"], []
    questions = [number for number, message in enumerate(messages) if message["role"] == "user"]
    for question, following in itertools.pairwise([*questions, len(messages)]):
        prompt = tokenizer.apply_chat_template(messages[: question + 1], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(messages[:following], tokenize=False)
        assert text.startswith(prompt)
        answers = [
            match.span(1)
            for match in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.DOTALL)
            if match.start(1) >= len(prompt)
        ]
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        labels = [
            token if any(begin <= left and right <= end for begin, end in answers) else -100
            for token, (left, right) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]
        rows.append({"input_ids": encoded["input_ids"], "labels": labels})
    return rows


def test_the_loss_curve_of_split_chats_is_that_of_peft_and_trl(bench: Workbench) -> None:
    """The template omits the reasoning of earlier answers, so a chat becomes a row per question."""
    bench.base = make(next(known for known in FAMILIES if known.name == "Llama 3"), bench.folder / "bases" / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(bench.base)
    tokenizer.chat_template = STYLES["qwen3"].template
    tokenizer.save_pretrained(bench.base)
    chats = [reasoning_chat(number) for number in range(10)]
    ours = train(bench, chats, [reasoning_chat(20)])
    assert_same(bench, ours, LLAMA, [row for chat in chats for row in plain_rows(tokenizer, chat)])
