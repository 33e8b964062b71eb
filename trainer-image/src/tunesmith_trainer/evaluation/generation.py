"""Compare the answers of base and adapter to the prompts of a data set, by greedy decoding, with its answers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from transformers import GenerationConfig

from tunesmith.api.dataset import DataFormat, DuplicateRows, UnusableRows
from tunesmith.api.evaluation import GenerationMetric
from tunesmith.api.finetunejob_status import AlsoTrained
from tunesmith_trainer import data
from tunesmith_trainer.base_model.precision import training_precision
from tunesmith_trainer.data.forms import SFT_FORMS, RowForm
from tunesmith_trainer.data.report import EXAMPLES, RowReport, shortened
from tunesmith_trainer.data.rows import read
from tunesmith_trainer.data.selection import trained_too
from tunesmith_trainer.data.sources import Part, fetch
from tunesmith_trainer.errors import DatasetInvalidError, InvalidSpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast

    from tunesmith.api.dataset import Dataset
    from tunesmith.api.evaluation import Suite
    from tunesmith_trainer.store import Stores

    IntArray = np.ndarray[Any, np.dtype[np.integer[Any]]]


_WITHOUT_ANSWERS = (DataFormat.TEXT, DataFormat.PREFERENCE, DataFormat.UNPAIRED_PREFERENCE)
"""Formats whose rows do not have exactly one answer to compare."""


@dataclass(frozen=True)
class Example:
    """A prompt as tokens, the expected answer, and the row that they come from.

    Args:
        prompt: token ids.
        answer: the data set's answer.
        key: `Row.key` of the row.
        where: file and line of the row.
    """

    prompt: list[int]
    answer: str
    key: int
    where: str


def load(
    suite: Suite,
    dataset: Dataset,
    stores: Stores,
    folder: Path,
    encoder: data.Encoder,
    tokenizer: PreTrainedTokenizerFast,
    context: int | None,
) -> list[Example]:
    """Load the examples of a generation suite: each row up to its last answer, and that answer, whatever its weight.

    Rows are read like those of the job's data set, or in the detected format if that one has preferences or texts. Each
    row must be usable.

    Raises:
        DatasetNotFoundError: the file does not exist.
        DatasetInvalidError: a row is unusable.
        InvalidSpecError: a prompt and its answer do not fit the model's context.
    """
    settings = suite.generation
    assert settings is not None  # noqa: S101 - the caller checks it
    examples: list[Example] = []
    whole = dataset.model_copy(update={"unusable": UnusableRows.ERROR, "duplicates": DuplicateRows.KEEP})
    if dataset.format in _WITHOUT_ANSWERS:
        whole = whole.model_copy(update={"format": DataFormat.AUTO, "columns": None})
    sources = fetch([settings.dataset], stores, folder / suite.name, Part.VALIDATION)
    for row in read(sources, whole, RowReport(), forms=SFT_FORMS - {RowForm.TEXT}):
        if settings.limit is not None and len(examples) == settings.limit:
            continue  # the rest is read only to report its errors
        example = _example(row, encoder.encode(_with_last_answer_as_target(row))[-1], tokenizer)
        if not example.answer.strip():
            raise DatasetInvalidError(f"{row.where}: the row has no answer to compare with: add one or remove the row")
        if context is not None and len(example.prompt) + settings.max_new_tokens > context:
            raise InvalidSpecError(
                f"evaluation suite {suite.name}: the prompt of {row.where} has {len(example.prompt)} tokens and "
                f"maxNewTokens is {settings.max_new_tokens}, together more than the base model's context of {context}: "
                "lower maxNewTokens or shorten the prompt"
            )
        examples.append(example)
    return examples


def also_trained(suite: str, examples: Sequence[Example], trained: IntArray) -> AlsoTrained | None:
    """Return the number of a suite's rows that are trained on too, with examples; None if there are none.

    Args:
        suite: name of the suite.
        examples: examples of the suite.
        trained: keys of the rows that are trained on.
    """
    indices = trained_too(np.asarray([example.key for example in examples], np.uint64), trained)
    if not len(indices):
        return None
    shown = [shortened(examples[index].where) for index in indices[:EXAMPLES]]
    return AlsoTrained(suite=suite, rows=len(indices), scored_rows=len(examples), examples=shown)


def _with_last_answer_as_target(row: data.Row) -> data.Row:
    """Return the row with its last answer as a target: a weight applies to training, not to the comparison."""
    messages = row.value.get("messages")
    if not messages or "weight" not in messages[-1]:
        return row
    last = {key: value for key, value in messages[-1].items() if key != "weight"}
    return replace(row, value=row.value | {"messages": [*messages[:-1], last]})


def _example(row: data.Row, tokens: data.Tokens, tokenizer: PreTrainedTokenizerFast) -> Example:
    labels = tokens.labels
    end = max((index for index, label in enumerate(labels) if label != data.IGNORED), default=-1) + 1
    start = end
    while start > 0 and labels[start - 1] != data.IGNORED:
        start -= 1
    answer = tokenizer.decode(tokens.input_ids[start:end], skip_special_tokens=True)
    return Example(tokens.input_ids[:start], str(answer), row.key, row.where)


def answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    *,
    adapter: bool,
    max_new_tokens: int,
    ends: Sequence[int],
    pad: int,
    batch_size: int,
) -> list[str]:
    """Generate the answers of the adapter, or of the base alone, in the order of the examples."""
    device = model.device
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(ends), pad_token_id=pad, use_cache=True
    )
    order = sorted(range(len(examples)), key=lambda index: (-len(examples[index].prompt), index))
    texts: dict[int, str] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), nullcontext() if adapter else model.disable_adapter(), training_precision(model):
            for begin in range(0, len(order), batch_size):
                indices = order[begin : begin + batch_size]
                prompts = [examples[index].prompt for index in indices]
                width = max(map(len, prompts))
                ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
                mask = torch.tensor(
                    [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
                )
                generated: Any = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
                for index, row in zip(indices, generated[:, width:].tolist(), strict=True):
                    texts[index] = str(tokenizer.decode(row, skip_special_tokens=True))
    finally:
        model.train(was_training)
    return [texts[index] for index in range(len(examples))]


def score(metric: GenerationMetric, given: Sequence[str], expected: Sequence[str]) -> float:
    """Return the metric over all answers: ExactMatch, Contains 0 to 1; Bleu, ChrF 0 to 100 (sacrebleu, corpus)."""
    if metric is GenerationMetric.EXACT_MATCH:
        return _fraction(answer.strip() == target.strip() for answer, target in zip(given, expected, strict=True))
    if metric is GenerationMetric.CONTAINS:
        return _fraction(target.strip() in answer for answer, target in zip(given, expected, strict=True))
    scorer = BLEU() if metric is GenerationMetric.BLEU else CHRF()
    return float(scorer.corpus_score(list(given), [list(expected)]).score)


def _fraction(hits: Iterable[bool]) -> float:
    values = list(hits)
    return sum(values) / len(values)
