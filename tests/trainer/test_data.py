from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from trainer_rig import chat_row

from tunesmith.api.dataset import Dataset
from tunesmith_trainer import model
from tunesmith_trainer.data import IGNORED, Encoder, Row, RowForm
from tunesmith_trainer.data.selection import held_out
from tunesmith_trainer.errors import InvalidSpecError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def tokenizer(base_model: Path) -> Any:
    return model.load_tokenizer(base_model, "the tiny model")


def targets(tokenizer: Any, row: Row) -> tuple[str, str]:
    """The whole text, and the text of the targets."""
    tokens = Encoder(tokenizer, [tokenizer.eos_token_id]).encode(row)
    assert len(tokens.input_ids) == len(tokens.labels)
    assert all(label in (IGNORED, token) for token, label in zip(tokens.input_ids, tokens.labels, strict=True))
    return tokenizer.decode(tokens.input_ids), tokenizer.decode([label for label in tokens.labels if label != IGNORED])


def test_the_loss_is_on_the_answer_and_its_end_only(tokenizer: Any) -> None:
    text, learned = targets(tokenizer, Row(RowForm.MESSAGES, chat_row("Who keeps it?", "Old Marta."), "line 1"))
    assert text == "<|im_start|>user\nWho keeps it?<|im_end|>\n<|im_start|>assistant\nOld Marta.<|im_end|>\n"
    assert learned == "Old Marta.<|im_end|>"


def test_every_assistant_turn_is_learned(tokenizer: Any) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Uno."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Due ✓."},
    ]
    _, learned = targets(tokenizer, Row(RowForm.MESSAGES, {"messages": turns}, "line 1"))
    assert learned == "Uno.<|im_end|>Due ✓.<|im_end|>"


def test_a_completion_gets_an_end_token(tokenizer: Any) -> None:
    text, learned = targets(
        tokenizer, Row(RowForm.PROMPT_COMPLETION, {"prompt": "Colour: ", "completion": "green"}, "line 1")
    )
    assert text == "Colour: green<|im_end|>"
    assert learned == "green<|im_end|>"


def test_a_template_without_an_end_token_gets_one(tokenizer: Any, base_model: Path) -> None:
    bare = model.load_tokenizer(base_model, "the tiny model")
    bare.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    _, learned = targets(bare, Row(RowForm.MESSAGES, chat_row("Who?", "Marta."), "line 1"))
    assert learned == "Marta.\n<|im_end|>"
    assert tokenizer.chat_template != bare.chat_template


def test_a_template_that_rewrites_earlier_turns_is_refused(base_model: Path) -> None:
    rewriting = model.load_tokenizer(base_model, "the tiny model")
    rewriting.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(InvalidSpecError, match="writes the question otherwise once it is answered"):
        Encoder(rewriting, [2]).encode(Row(RowForm.MESSAGES, chat_row("Who?", "Marta."), "line 1"))


def test_a_base_without_a_template_is_told(base_model: Path) -> None:
    bare = model.load_tokenizer(base_model, "the tiny model")
    bare.chat_template = None
    with pytest.raises(InvalidSpecError, match="has no chat template"):
        Encoder(bare, [2]).encode(Row(RowForm.MESSAGES, chat_row("Who?", "Marta."), "line 1"))


def test_padding_is_never_the_end_token(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert model.pad_token(tokenizer, [tokenizer.eos_token_id]) != tokenizer.eos_token_id
    assert model.pad_token(tokenizer, [0, 1, 2]) not in (0, 1, 2)


@pytest.mark.parametrize(
    ("count", "fraction", "out"), [(2, None, 1), (10, None, 1), (24, None, 2), (100, 0.25, 25), (3, 0.001, 1)]
)
def test_the_share_that_is_held_out(count: int, fraction: float | None, out: int) -> None:
    dataset = Dataset.model_validate({"train": [{"uri": "s3://a/b"}], "validationFraction": fraction})
    train, validation = held_out(count, dataset, seed=7)
    assert len(validation) == out
    assert sorted(train + validation) == list(range(count))
    assert held_out(count, dataset, seed=7) == (train, validation)


def test_nothing_is_held_out_beside_a_validation_set() -> None:
    dataset = Dataset.model_validate({"train": [{"uri": "s3://a/b"}], "validation": [{"uri": "s3://a/c"}]})
    assert held_out(3, dataset, seed=7) == ([0, 1, 2], [])
