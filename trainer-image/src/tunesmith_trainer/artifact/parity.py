"""Record the answers of base and adapter to fixed prompts, at the precision that they are served with."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import get_max_memory
from peft import PeftModel
from transformers import GenerationConfig

from tunesmith.contracts.parity import BaseAnswer, Parity, ParityPosition, ParityProbe, TokenLogProbability
from tunesmith.contracts.servability import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tunesmith_trainer.artifact.main_memory import available_memory
from tunesmith_trainer.artifact.offloaded import hold_adapter, is_offloaded, read_by_layer
from tunesmith_trainer.base_model.logits import batch_of_one, last_logits, mixed_precision
from tunesmith_trainer.base_model.prompts import PROMPTS, prompt_tokens
from tunesmith_trainer.base_model.stored import load_published, stored_quantization
from tunesmith_trainer.data import IGNORED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

_ANSWER_TOKENS = 16
_BASE_ANSWER_TOKENS = 8
_ROWS, _CANDIDATES = 3, 12
"""Number of rows whose prompts are recorded, and of rows among which those are chosen."""
_ROW_PROMPT_TOKENS = 256
_TOP = 5
_DECIMALS = 5
_WEIGHT_SHARE = 0.8
"""Share of the remaining main memory that weights may use: activations and file readers need some too."""
STREAMED = frozenset(
    {
        *("LORA", "IA3", "BEFT", "BOFT", "C3A", "DEFT", "FOURIERFT", "GRALORA", "HIRA", "HRA", "LILY", "LOHA", "LOKR"),
        *("MISS", "PEANUT", "ROAD", "WAVEFT", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"),
    }
)
"""Methods of PEFT whose output is bit-identical with the base's layers on disk. For the others, PEFT computes something
from the base's weights, or draws random numbers, when it loads them."""
_OF_EMBEDDINGS = ("modules_to_save", "trainable_token_indices")
"""Fields of an adapter that copies modules outside of the layers."""


class RowPrompt(NamedTuple):
    """Prompt of a row, and the beginning of its answer, as token ids."""

    prompt: list[int]
    answer: list[int]


class Recorded(NamedTuple):
    """Expected answers to the fixed prompts, the adapter's logits after each of them, and expected answers to rows."""

    parity: Parity
    logits: list[torch.Tensor]
    rows: Parity | None


def row_prompts(held_out: Dataset, training: Dataset) -> list[RowPrompt]:
    """Return prompts among which those to record are chosen: of held-out rows, and of training rows if there are few.

    Args:
        held_out: tokenised rows: `input_ids` and `labels`.
        training: tokenised rows, which may be packed; the first text of a pack counts.
    """
    found = _row_prompts(held_out)
    return found if len(found) >= _ROWS else (found + _row_prompts(training))[:_CANDIDATES]


def _row_prompts(rows: Dataset) -> list[RowPrompt]:
    found = []
    for row in rows.select(range(min(len(rows), _CANDIDATES))):
        ids, labels = ([int(value) for value in row[name]] for name in ("input_ids", "labels"))
        start = next((place for place, label in enumerate(labels) if label != IGNORED), 0)
        if start <= 1:  # a text without prompt: its first half asks for the rest
            start = min(_ROW_PROMPT_TOKENS, len(ids) // 2)
        end = next((place for place in range(start, len(ids)) if labels[place] == IGNORED), len(ids))
        answer = ids[start:end][:_ANSWER_TOKENS]
        if answer and 0 < start <= _ROW_PROMPT_TOKENS:
            found.append(RowPrompt(ids[:start], answer))
    return found


def serving_type(config: PretrainedConfig) -> torch.dtype:
    """Return the default type in which an engine serves the base model: that of its configuration."""
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def record(
    base: Path,
    artifact: Path,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    ends: Sequence[int],
    pad: int,
    memory: int | None = None,
    rows: Sequence[RowPrompt] = (),
) -> Recorded:
    """Reload base and saved adapter as an engine does, and record the answers of both.

    Layers that fit neither on the GPUs nor in main memory are read from disk whenever they are computed. A few methods
    compute something from the base's weights when they are loaded; for them, all of it must fit.

    Args:
        base: folder of the base model with its weights.
        artifact: folder of the saved adapter, or of the saved model.
        config: configuration of the base model.
        tokenizer: tokenizer of the base model.
        ends: tokens that end an answer.
        pad: token for padding.
        memory: main memory for weights, in bytes; None: most of what is available to this process.
        rows: prompts of rows; those that tell adapter and base apart best are recorded too. Weights that are read from
            disk are not read once more for them.

    Returns:
        The answers of both, and the adapter's logits after each prompt.
    """
    dtype = serving_type(config)
    offload = artifact.parent / "offload"
    adapter = (artifact / ADAPTER_CONFIG).exists()
    stored = stored_quantization(base)
    # Weights that are stored quantised cannot be read layer by layer.
    room, streams = get_max_memory(), stored is None and (not adapter or _streams(artifact))
    if streams:
        room["cpu"] = int(_WEIGHT_SHARE * available_memory()) if memory is None else memory
    model: Any = _loaded(base if adapter else artifact, dtype, room, offload)
    if adapter:
        model = _adapted(model, artifact, streams=streams)
    fixed = prompt_tokens(tokenizer)
    prompts = [*fixed, *_telling_apart(model, artifact, rows if adapter and not is_offloaded(model) else ())]
    with torch.inference_mode(), _products(model, artifact):
        answers = [_answer(model, ids, _ANSWER_TOKENS, ends, pad) for ids in prompts]
        trained = [_positions(model, ids, answer) for ids, answer in zip(prompts, answers, strict=True)]
    logits = last_logits(model, fixed)
    if not adapter:
        model = _loaded(base, dtype, room, offload)
    # Inference mode first: weights that are read from disk were created in it, and the adapter can only be removed in
    # it.
    with torch.inference_mode(), model.disable_adapter() if adapter else nullcontext(), _products(model, artifact):
        original = [_positions(model, ids, answer) for ids, answer in zip(prompts, answers, strict=True)]
        own = [_answer(model, ids, _BASE_ANSWER_TOKENS, ends, pad) for ids in prompts]
        own_positions = [_positions(model, ids, answer) for ids, answer in zip(prompts, own, strict=True)]
    probes = [
        ParityProbe(
            prompt_token_ids=ids,
            answer_token_ids=answer,
            base=of_base,
            adapter=of_adapter,
            base_answer=BaseAnswer(token_ids=own_answer, positions=of_own),
        )
        for ids, answer, of_base, of_adapter, own_answer, of_own in zip(
            prompts, answers, original, trained, own, own_positions, strict=True
        )
    ]
    # Chats are rendered again by the engine, which needs the same result on another day.
    chat = "strftime_now" not in str(tokenizer.chat_template) if tokenizer.chat_template else False
    named = [
        probe.model_copy(update={"prompt": prompt, "chat": chat})
        for prompt, probe in zip(PROMPTS, probes, strict=False)
    ]
    data_type, of_rows = str(dtype).removeprefix("torch."), probes[len(PROMPTS) :]
    return Recorded(
        Parity(data_type=data_type, probes=named),
        logits,
        Parity(data_type=data_type, probes=of_rows) if of_rows else None,
    )


def _answer(model: Any, prompt: list[int], tokens: int, ends: Sequence[int], pad: int) -> list[int]:  # noqa: ANN401 - with or without adapter
    """Return the answer that is decoded greedily."""
    greedy = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=list(ends), pad_token_id=pad)
    inputs = batch_of_one(model, prompt)
    whole: Any = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=greedy)
    return [int(token) for token in whole[0, len(prompt) :]]


def _telling_apart(model: Any, artifact: Path, rows: Iterable[RowPrompt]) -> list[list[int]]:  # noqa: ANN401 - with adapter
    """Return the prompts of the rows whose answers have the most different probabilities with and without adapter."""
    gaps = []
    for prompt, answer in rows:
        with torch.inference_mode(), _products(model, artifact):
            adapter = _positions(model, prompt, answer)
            with model.disable_adapter():
                base = _positions(model, prompt, answer)
        gap = max(abs(one.chosen - other.chosen) for one, other in zip(adapter, base, strict=True))
        gaps.append((gap, prompt))
    return [prompt for _, prompt in sorted(gaps, reverse=True)[:_ROWS]]


def _products(model: Any, artifact: Path) -> AbstractContextManager[None]:  # noqa: ANN401 - with or without adapter
    """Compute as an engine computes LoRA, with the adapter in its own type; any other method as in training."""
    return nullcontext() if _is_plain_lora(artifact) else mixed_precision(model)


def _adapted(base: PreTrainedModel, artifact: Path, *, streams: bool) -> PeftModel:
    """Return the base with the saved adapter."""
    engines = _is_plain_lora(artifact) and not _config(artifact).get("use_dora")
    if streams:
        # With a device map PEFT would write the base's files again, including the adapter. The hooks that read layers
        # from disk stay in place, and the adapter itself fits into memory.
        vars(base).pop("hf_device_map", None)
    if not (streams and is_offloaded(base)):
        # With low memory usage, PEFT rounds an adapter to the base's type, as engines do.
        return PeftModel.from_pretrained(base, str(artifact), low_cpu_mem_usage=engines).eval()
    model = PeftModel.from_pretrained(base, str(artifact), low_cpu_mem_usage=True).eval()
    hold_adapter(model, artifact / ADAPTER_WEIGHTS, rounded=base.dtype if engines else None)
    read_by_layer(model)
    return model


def _streams(artifact: Path) -> bool:
    """Return True if the base's layers may be on disk: the adapter is all in its file and needs one layer at a time."""
    config = _config(artifact)
    return config.get("peft_type") in STREAMED and not any(config.get(name) for name in _OF_EMBEDDINGS)


def _is_plain_lora(artifact: Path) -> bool:
    config = _config(artifact)
    return config.get("peft_type") == "LORA" and not any(config.get(name) for name in _OF_EMBEDDINGS)


def _config(artifact: Path) -> dict[str, Any]:
    """Return PEFT's configuration of the adapter; empty if all weights were trained."""
    path = artifact / ADAPTER_CONFIG
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _loaded(folder: Path, dtype: torch.dtype, room: Mapping[int | str, int], offload: Path) -> PreTrainedModel:
    model = load_published(folder, dtype, device_map="auto", max_memory=room, offload_folder=str(offload))
    return model.eval()


def _positions(model: Any, prompt: list[int], answer: list[int]) -> list[ParityPosition]:  # noqa: ANN401 - with or without adapter
    with torch.inference_mode():
        logits = model(input_ids=batch_of_one(model, prompt + answer)).logits
    # A method that prepends tokens to the prompt has more logits.
    scores = torch.log_softmax(logits[0, -len(answer) - 1 : -1].float(), dim=-1).cpu()
    positions = []
    for token, row in zip(answer, scores, strict=True):
        values, tokens = row.topk(_TOP)
        positions.append(
            ParityPosition(
                chosen=round(float(row[token]), _DECIMALS),
                top=[
                    TokenLogProbability(token_id=int(other), log_probability=round(float(value), _DECIMALS))
                    for value, other in zip(values, tokens, strict=True)
                ],
            )
        )
    return positions
