"""Tokenised rows: the parts that are learned, the template used, and the lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.trainer.trainer_rig import Workbench, chat_row, chat_rows
from tunesmith.api.conditions import FailureReason
from tunesmith.api.dataset import Dataset, LossOn
from tunesmith_trainer.base_model import model
from tunesmith_trainer.data import IGNORED, Encoder, Row, RowForm
from tunesmith_trainer.data.packing import best_fit_decreasing
from tunesmith_trainer.data.selection import held_out, weighted
from tunesmith_trainer.data.template import RowRejectedError
from tunesmith_trainer.errors import DatasetInvalidError, InvalidSpecError

if TYPE_CHECKING:
    from pathlib import Path

TURNS = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Uno."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Due ✓."},
    ]
}
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(base_model: Path) -> Any:
    return model.load_tokenizer(base_model, "the tiny model")


def with_template(base_model: Path, template: str | None) -> Any:
    changed = model.load_tokenizer(base_model, "the tiny model")
    changed.chat_template = template
    return changed


def targets(tokenizer: Any, row: Row, **settings: Any) -> tuple[str, str]:
    """Return the whole text and the text of the targets."""
    (tokens,) = Encoder(tokenizer, [tokenizer.eos_token_id], **settings).encode(row)
    assert len(tokens.input_ids) == len(tokens.labels)
    assert all(label in (IGNORED, token) for token, label in zip(tokens.input_ids, tokens.labels, strict=True))
    return tokenizer.decode(tokens.input_ids), tokenizer.decode([label for label in tokens.labels if label != IGNORED])


def chat(value: dict[str, Any]) -> Row:
    return Row(RowForm.MESSAGES, value, "line 1")


def test_the_loss_is_on_the_answer_and_its_end_only(tokenizer: Any) -> None:
    text, learned = targets(tokenizer, chat(chat_row("Who keeps it?", "Old Marta.")))
    assert text == "<|im_start|>user\nWho keeps it?<|im_end|>\n<|im_start|>assistant\nOld Marta.<|im_end|>\n"
    assert learned == "Old Marta.<|im_end|>"


@pytest.mark.parametrize("template", [None, MARKED], ids=["found", "marked"])
@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        (None, "Uno.<|im_end|>Due ✓.<|im_end|>"),
        (LossOn.ASSISTANT_TURNS, "Uno.<|im_end|>Due ✓.<|im_end|>"),
        (LossOn.COMPLETION, "Due ✓.<|im_end|>"),
    ],
)
def test_answers_of_a_chat(tokenizer: Any, template: str | None, loss_on: LossOn | None, expected: str) -> None:
    text, learned = targets(tokenizer, chat(TURNS), chat_template=template, loss_on=loss_on)
    assert learned == expected
    assert text == targets(tokenizer, chat(TURNS))[0]


def test_all_tokens_can_be_learned(tokenizer: Any) -> None:
    text, learned = targets(tokenizer, chat(TURNS), loss_on=LossOn.ALL_TOKENS)
    assert "<|im_start|>" + learned + "\n" == text
    pair = Row(RowForm.PROMPT_COMPLETION, {"prompt": "Colour: ", "completion": "green"}, "line 1")
    assert targets(tokenizer, pair, loss_on=LossOn.ALL_TOKENS)[1] == "olour: green<|im_end|>"


def test_an_answer_of_weight_0_is_not_learned(tokenizer: Any) -> None:
    first = {"messages": [{**turn, "weight": 0} if turn["content"] == "Uno." else turn for turn in TURNS["messages"]]}
    assert targets(tokenizer, chat(first))[1] == "Due ✓.<|im_end|>"
    last = {"messages": [*TURNS["messages"][:-1], {**TURNS["messages"][-1], "weight": 0}]}
    assert targets(tokenizer, chat(last))[1] == "Uno.<|im_end|>"
    assert targets(tokenizer, chat(last), loss_on=LossOn.COMPLETION)[1] == ""


def test_a_completion_gets_an_end_token(tokenizer: Any) -> None:
    row = Row(RowForm.PROMPT_COMPLETION, {"prompt": "Colour: ", "completion": "green"}, "line 1")
    assert targets(tokenizer, row) == ("Colour: green<|im_end|>", "green<|im_end|>")


def test_messages_as_prompt_and_completion(tokenizer: Any) -> None:
    value = {"prompt": TURNS["messages"][:4], "completion": TURNS["messages"][4:]}
    text, learned = targets(tokenizer, Row(RowForm.PROMPT_COMPLETION, value, "line 1"))
    assert (text, learned) == (targets(tokenizer, chat(TURNS))[0], "Due ✓.<|im_end|>")


def test_a_text_is_learned_to_its_end(tokenizer: Any) -> None:
    text, learned = targets(tokenizer, Row(RowForm.TEXT, {"text": "The lighthouse<|im_end|> of Brinewick"}, "line 1"))
    assert text == "The lighthouse<|im_end|> of Brinewick<|im_end|>"
    assert text.endswith(learned)
    assert len(learned) > len(text) - 5


def test_rows_encoded_together_equal_rows_encoded_alone(tokenizer: Any) -> None:
    rows = [
        chat(TURNS),
        Row(RowForm.TEXT, {"text": "The lighthouse"}, "line 2"),
        chat(chat_row("Who?", "Marta.")),
        Row(RowForm.PROMPT_COMPLETION, {"prompt": "Colour", "completion": " green"}, "line 3"),
    ]
    encoder = Encoder(tokenizer, [2])
    assert [encoded.rows for encoded in encoder.encode_all(rows)] == [encoder.encode(row) for row in rows]


def test_preferences_share_their_prompt(tokenizer: Any) -> None:
    value = {
        "prompt": TURNS["messages"][:2],
        "chosen": TURNS["messages"][2:3],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    encoder = Encoder(tokenizer, [2])
    (found,) = encoder.encode(Row(RowForm.PREFERENCE, value, "line 1"))
    assert found.seq_lengths is not None
    first = found.seq_lengths[0]
    assert len(found.input_ids) == len(found.labels) == sum(found.seq_lengths)
    prompts = []
    for ids, labels, answer in (
        (found.input_ids[:first], found.labels[:first], "Uno.<|im_end|>"),
        (found.input_ids[first:], found.labels[first:], "No.<|im_end|>"),
    ):
        begin = labels.count(-100)
        assert labels[begin:] == ids[begin:]
        assert tokenizer.decode(ids[begin:]) == answer
        prompts.append(ids[:begin])
    assert prompts[0] == prompts[1]
    assert tokenizer.decode(prompts[0]).endswith("One?<|im_end|>\n<|im_start|>assistant\n")
    cut = found.cut(first - 1)
    assert cut.seq_lengths == [first - 1, min(first - 1, found.seq_lengths[1])]
    assert (cut.input_ids[: first - 1], cut.without_target) == (found.input_ids[: first - 1], False)
    assert found.cut(3).without_target
    texts = {"prompt": "Colour: ", "chosen": "green", "rejected": "blue"}
    (plain,) = encoder.encode(Row(RowForm.PREFERENCE, texts, "line 1"))
    assert plain.seq_lengths is not None
    green = plain.input_ids[: plain.seq_lengths[0]]
    assert tokenizer.decode(green) == "Colour: green<|im_end|>"
    (labelled,) = encoder.encode(
        Row(RowForm.UNPAIRED_PREFERENCE, {"prompt": "Colour: ", "completion": "green", "label": False}, "line 1")
    )
    assert (labelled.input_ids, labelled.desirable) == (green, False)


def test_a_template_without_an_end_token_gets_one(base_model: Path) -> None:
    bare = with_template(
        base_model,
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}",
    )
    assert targets(bare, chat(chat_row("Who?", "Marta.")))[1] == "Marta.\n<|im_end|>"


def test_a_template_that_rewrites_the_question_is_refused(base_model: Path) -> None:
    rewriting = with_template(
        base_model, "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(InvalidSpecError, match=r"line 1: .* renders the question differently when an answer follows"):
        Encoder(rewriting, [2]).encode(chat(chat_row("Who?", "Marta.")))
    assert targets(rewriting, chat(chat_row("Who?", "Marta.")), loss_on=LossOn.ALL_TOKENS)[1] == (
        "Who?<|im_end|>Marta.<|im_end|>"
    )


def test_marks_that_miss_answers_are_refused(tokenizer: Any) -> None:
    first = MARKED.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and not loop.last %}")
    with pytest.raises(InvalidSpecError, match=r"dataset.chatTemplate marks 1 passages with \{% generation %\} for 2 "):
        Encoder(tokenizer, [2], chat_template=first).encode(chat(TURNS))


def test_a_base_without_a_template_is_refused(base_model: Path) -> None:
    bare = with_template(base_model, None)
    with pytest.raises(InvalidSpecError, match="has no chat template: use a chat model"):
        Encoder(bare, [2]).encode(chat(chat_row("Who?", "Marta.")))
    assert targets(bare, chat(TURNS), chat_template=MARKED)[1] == "Uno.<|im_end|>Due ✓.<|im_end|>"


def test_an_invalid_template_is_refused_with_its_line(tokenizer: Any) -> None:
    with pytest.raises(InvalidSpecError, match=r"dataset.chatTemplate is not a valid Jinja template: line 2: "):
        Encoder(tokenizer, [2], chat_template="a\n{% for %}")


def test_a_row_that_the_template_rejects_is_reported(tokenizer: Any) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}" + MARKED
    with pytest.raises(DatasetInvalidError, match=r"line 1: dataset.chatTemplate rejects the row: no system, please"):
        Encoder(tokenizer, [2], chat_template=strict).encode(chat(TURNS))


@pytest.mark.parametrize(
    "fault", ["range(10**9)", "1 // 0", "messages[0].content.nothing()", "'%d' % 'a'", "[][1].x", "(9.0**9)**999"]
)
def test_a_fault_in_the_template_is_reported_as_its_own(tokenizer: Any, fault: str) -> None:
    with pytest.raises(DatasetInvalidError, match=r"line 1: dataset.chatTemplate rejects the row: "):
        Encoder(tokenizer, [2], chat_template=f"{{{{ {fault} }}}}" + MARKED).encode(chat(TURNS))


def test_tools_need_a_template_that_supports_them(tokenizer: Any) -> None:
    tool = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}
    row = chat({**TURNS, "tools": [tool]})
    with pytest.raises(RowRejectedError, match="line 1: 'tools' is not rendered by the base model's chat template"):
        Encoder(tokenizer, [2]).encode(row)
    knowing = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + tokenizer.chat_template
    text, learned = targets(tokenizer, row, chat_template=knowing)
    assert text.startswith('{"type": "function", "function": {"name": "lookup"')
    assert learned == "Uno.<|im_end|>Due ✓.<|im_end|>"
    calling = {"messages": [TURNS["messages"][1], {"role": "assistant", "content": "", "tool_calls": [tool]}]}
    with pytest.raises(RowRejectedError, match=r"line 1: message 2 \(assistant\): 'tool_calls' is not rendered"):
        Encoder(tokenizer, [2]).encode(chat(calling))


def test_the_date_in_a_template_does_not_change(tokenizer: Any) -> None:
    dated = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    assert targets(tokenizer, chat(TURNS), chat_template=dated)[0].startswith("26 Jul 2024<|im_start|>")


def test_padding_is_never_the_end_token(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert model.pad_token(tokenizer, [tokenizer.eos_token_id]) != tokenizer.eos_token_id
    assert model.pad_token(tokenizer, [0, 1, 2]) not in (0, 1, 2)


@pytest.mark.parametrize(
    ("count", "fraction", "out"), [(2, None, 1), (10, None, 1), (24, None, 2), (100, 0.25, 25), (3, 0.001, 1)]
)
def test_the_share_that_is_held_out(count: int, fraction: float | None, out: int) -> None:
    dataset = Dataset.model_validate({"train": [{"uri": "s3://a/b"}], "validationFraction": fraction})
    train, validation = (places.tolist() for places in held_out(np.arange(count), dataset, seed=7))
    assert len(validation) == out
    assert sorted(train + validation) == list(range(count))
    assert held_out(np.arange(count), dataset, seed=7)[1].tolist() == validation
    assert count < 10 or held_out(np.arange(count), dataset, seed=8)[1].tolist() != validation


@pytest.mark.parametrize(
    ("sizes", "fraction", "out"),
    [
        ([1] * 90 + [10], 0.1, 10),
        ([2] * 50, 0.1, 10),
        ([50, 50], 0.1, 50),
        ([7, 30, 8], 0.05, 7),
        ([99, 1], 0.1, 1),
    ],
    ids=["one row often", "pairs", "two rows", "none that fits", "one that fits"],
)
@pytest.mark.parametrize("seed", range(4))
def test_the_same_row_is_never_on_both_sides(sizes: list[int], fraction: float, out: int, seed: int) -> None:
    dataset = Dataset.model_validate({"train": [{"uri": "s3://a/b"}], "validationFraction": fraction})
    keys = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)
    np.random.default_rng(1).shuffle(keys)
    train, validation = held_out(keys, dataset, seed)
    assert not set(keys[train]) & set(keys[validation])
    assert sorted([*train, *validation]) == list(range(len(keys)))
    assert len(validation) == out


def test_copies_of_one_row_cannot_be_divided() -> None:
    dataset = Dataset.model_validate({"train": [{"uri": "s3://a/b"}]})
    with pytest.raises(DatasetInvalidError, match="the 3 training rows are copies of one row or come from one chat"):
        held_out(np.zeros(3, np.uint64), dataset, seed=7)


def test_nothing_is_held_out_beside_a_validation_set() -> None:
    dataset = Dataset.model_validate({"train": [{"uri": "s3://a/b"}], "validation": [{"uri": "s3://a/c"}]})
    train, validation = held_out(np.zeros(3, np.uint64), dataset, seed=7)
    assert (train.tolist(), validation.tolist()) == ([0, 1, 2], [])


def test_weights_repeat_the_rows_of_a_source() -> None:
    places = [place for place in range(30) if place % 3]
    taken = weighted(places, [9, 12, 9], [2.5, 0.25, 1.0], seed=7)
    assert taken.tolist() == sorted(taken.tolist())
    assert set(taken.tolist()) <= set(places)
    counts = [int(((taken >= begin) & (taken < end)).sum()) for begin, end in ((0, 9), (9, 21), (21, 30))]
    assert counts == [15, 2, 6]
    times = np.bincount(taken, minlength=30)
    assert sorted(times[[1, 2, 4, 5, 7, 8]].tolist()) == [2, 2, 2, 3, 3, 3]
    assert taken.tolist() == weighted(places, [9, 12, 9], [2.5, 0.25, 1.0], seed=7).tolist()
    assert taken.tolist() != weighted(places, [9, 12, 9], [2.5, 0.25, 1.0], seed=8).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_packing_takes_every_row_once_and_wastes_little(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.minimum(rng.integers(1, 400, size=2000), 256)
    groups = best_fit_decreasing(lengths, 256)
    assert sorted(place for group in groups for place in group) == list(range(2000))
    sizes = [int(lengths[group].sum()) for group in groups]
    assert max(sizes) <= 256
    # Best fit needs at most 11/9 of the minimum number of bins, and usually hardly more than the minimum.
    assert len(groups) <= max(-(-int(lengths.sum()) // 256), int((lengths > 128).sum())) * 1.02
    assert groups == best_fit_decreasing(lengths, 256)


def test_a_row_is_packed_where_it_leaves_the_least_room() -> None:
    assert best_fit_decreasing([3, 8, 6, 2, 4], 10) == [[1, 3], [2, 4], [0]]
    assert best_fit_decreasing([10, 10], 10) == [[0], [1]]


def test_rows_that_are_too_long_are_truncated(bench: Workbench) -> None:
    job = bench.job([*chat_rows(12), chat_row("Who?", "blue " * 200), chat_row("Why? " * 200, "blue")])
    job["spec"]["dataset"] |= {"maxLength": 128, "overlong": "Truncate"}
    counted = bench.run("validate", job).result.preflight
    assert counted is not None
    assert (counted.rows, counted.validation_rows, counted.truncated_rows, counted.dropped_rows) == (12, 1, 1, 1)
    assert counted.dropped is not None
    assert counted.dropped[0].examples == [
        "train.jsonl line 14: none of its tokens is learned, its question alone fills maxLength 128"
    ]


def test_rows_that_are_too_long_can_be_an_error(bench: Workbench) -> None:
    job = bench.job([*chat_rows(12), chat_row("Who?", "blue " * 200)])
    job["spec"]["dataset"] |= {"maxLength": 128, "overlong": "Error"}
    ran = bench.run("validate", job)
    assert (ran.code, ran.result.reason) == (2, FailureReason.DATASET_INVALID)
    assert "1 of 13 rows have more than maxLength 128 tokens, the first is train.jsonl line 13: " in ran.result.message
    assert "set dataset.overlong to Drop or Truncate" in ran.result.message


def test_the_jobs_template_is_saved_with_the_adapter(bench: Workbench) -> None:
    """If it only adds marks, it equals the base's, which pools use; no pool uses any other."""
    job = bench.job(hyperparameters={"maxSteps": 1, "batchSize": 2, "learningRate": 0.01})
    job["spec"]["dataset"]["chatTemplate"] = MARKED
    ran = bench.run("train", job)
    assert ran.result.artifact is not None, ran.result.message
    assert ran.result.artifact.servable.vllm
    artifact = bench.output / "artifact"
    assert (artifact / "chat_template.jinja").read_text() == MARKED
    saved = model.load_tokenizer(artifact, "the artifact")
    assert saved.chat_template == MARKED
    job["spec"]["dataset"]["chatTemplate"] = MARKED.replace("<|im_start|>", "# ")
    ran = bench.run("validate", job)
    assert ran.result.preflight is not None, ran.result.message
    assert ran.result.preflight.servable is not None
    assert not ran.result.preflight.servable.vllm
    job["spec"]["servable"] = "Required"
    ran = bench.run("validate", job)
    assert (ran.code, ran.result.reason) == (2, FailureReason.NOT_SERVABLE)
    assert "dataset.chatTemplate renders questions differently from the base model's" in ran.result.message
