"""Learned tokens are those that an engine generates after the prompt that it receives, for every style of template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl

from tests.trainer.chat_styles import STYLES, Style
from tests.trainer.trainer_rig import Workbench, chat_rows
from tunesmith.api.conditions import FailureReason
from tunesmith.api.dataset import LossOn
from tunesmith.api.finetunejob_status import DropReason
from tunesmith_trainer.base_model import model
from tunesmith_trainer.data import IGNORED, Encoder, Row, RowForm
from tunesmith_trainer.data.served import ServedForm
from tunesmith_trainer.data.template import RowRejectedError
from tunesmith_trainer.errors import InvalidSpecError, TrainerError

SYSTEM = {"role": "system", "content": "Be brief."}
DEVELOPER = {"role": "developer", "content": "Be brief."}
ONE, TWO = ({"role": "user", "content": text} for text in ("One?", "Two?"))
UNO, DUE = ({"role": "assistant", "content": text} for text in ("Uno.", "Due."))
FUNCTION = {"name": "weather", "description": "Look.", "parameters": {"type": "object", "properties": {"city": {}}}}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RAIN = {"role": "tool", "content": "rain", "tool_call_id": "abcdefghi"}
TOOLS = [{"type": "function", "function": FUNCTION}]


def thought(message: dict[str, Any], reasoning: str) -> dict[str, Any]:
    return message | {"reasoning_content": reasoning}


CASES: dict[str, dict[str, Any]] = {
    "single": {"messages": [ONE, UNO]},
    "multi": {"messages": [ONE, UNO, TWO, DUE]},
    "system": {"messages": [SYSTEM, ONE, UNO, TWO, DUE]},
    "developer": {"messages": [DEVELOPER, ONE, UNO]},
    "reasoning": {"messages": [ONE, thought(UNO, "Because one."), TWO, thought(DUE, "Because two.")]},
    "tools": {"messages": [ONE, CALLS, RAIN, UNO], "tools": TOOLS},
    "thought tools": {"messages": [ONE, thought(CALLS, "Look up."), RAIN, thought(UNO, "It rains.")], "tools": TOOLS},
    "tools twice": {"messages": [ONE, CALLS, RAIN, UNO, TWO, CALLS, RAIN, DUE], "tools": TOOLS},
}
WITHOUT_REASONING = {"reasoning": "'reasoning_content' is not rendered", "thought tools": "not rendered"}
WITHOUT_TOOLS = dict.fromkeys(("tools", "thought tools", "tools twice"), "is not rendered")
REFUSED: dict[str, dict[str, str]] = {
    "chatml": WITHOUT_REASONING | WITHOUT_TOOLS,
    "llama3": WITHOUT_REASONING,
    "qwen2.5": WITHOUT_REASONING,
    "gemma": WITHOUT_REASONING
    | dict.fromkeys(("tools", "thought tools", "tools twice"), "roles must alternate")
    | dict.fromkeys(("system", "developer"), "no system role"),
    "phi3": WITHOUT_REASONING | WITHOUT_TOOLS,
    "phi4": WITHOUT_REASONING | WITHOUT_TOOLS,
    "mistral": WITHOUT_REASONING,
    "deepseek-r1": WITHOUT_TOOLS,
    "granite": WITHOUT_REASONING,
    "cohere": WITHOUT_REASONING | WITHOUT_TOOLS,
}
SPLIT = {
    "qwen3": {"multi", "system", "reasoning", "tools", "tools twice"},
    "qwen3.5": {"multi", "system", "reasoning", "tools twice"},
    "mistral": {"system", "tools twice"},
    "harmony": {"multi", "system", "reasoning", "tools twice"},
    "glm4.5": {"reasoning"},
    "deepseek-r1": {"multi", "system", "reasoning"},
}


def tokenizer_of(base_model: Path, style: Style) -> tuple[Any, list[int]]:
    """Return a tokenizer with the style's template and special tokens, and the tokens that end its answers."""
    tokenizer = model.load_tokenizer(base_model, "the tiny model")
    tokenizer.add_special_tokens({"extra_special_tokens": [*style.ends, *style.others]})
    tokenizer.chat_template = style.template
    return tokenizer, [tokenizer.convert_tokens_to_ids(end) for end in style.ends]


def learned_runs(labels: list[int]) -> list[tuple[int, int]]:
    """Return begin and end of each run of learned tokens."""
    edges = [index for index in range(1, len(labels)) if (labels[index] == IGNORED) != (labels[index - 1] == IGNORED)]
    if labels[-1] != IGNORED:
        edges.append(len(labels))
    return list(zip(edges[::2], edges[1::2], strict=True))


def assert_as_served(tokenizer: Any, ends: list[int], chat: dict[str, Any], rows: list[Any]) -> None:
    """Assert that each answer is learned once, after the tokens of its prompt, up to its only end token."""
    prompts, form = {}, ServedForm.of(tokenizer.chat_template)
    for number, message in enumerate(chat["messages"]):
        if message["role"] == "assistant":
            earlier = form.roles(form.chat(chat)["messages"][:number])
            text = tokenizer.apply_chat_template(
                earlier, tools=chat.get("tools"), add_generation_prompt=True, tokenize=False
            )
            prompts[number] = tokenizer(text, add_special_tokens=False)["input_ids"]
    runs = [(row, begin, end) for row in rows for begin, end in learned_runs(row.labels)]
    assert len(runs) == len(prompts)
    for number, prompt in prompts.items():
        ((row, begin, end),) = [run for run in runs if run[0].input_ids[: run[1]] == prompt]
        answer = row.input_ids[begin:end]
        assert [token in ends for token in answer] == [False] * (len(answer) - 1) + [True]
        message, text = chat["messages"][number], tokenizer.decode(answer)
        parts = [message["content"], message.get("reasoning_content", "")]
        assert all(part in text for part in parts)
        assert ("Oslo" in text) == ("tool_calls" in message)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", STYLES)
def test_what_is_learned_is_what_is_served(base_model: Path, name: str, case: str) -> None:
    tokenizer, ends = tokenizer_of(base_model, STYLES[name])
    encoder, row = Encoder(tokenizer, ends), Row(RowForm.MESSAGES, CASES[case], "line 1")
    refusal = REFUSED.get(name, {}).get(case)
    if refusal is not None:
        with pytest.raises(TrainerError, match=f"^line 1: .*{refusal}"):
            encoder.encode(row)
        return
    rows = encoder.encode(row)
    assert_as_served(tokenizer, ends, CASES[case], rows)
    assert (len(rows) > 1) == (case in SPLIT.get(name, ()))


@pytest.mark.parametrize("name", STYLES)
def test_the_developer_is_the_system_for_templates_that_do_not_know_it(base_model: Path, name: str) -> None:
    if "developer" in REFUSED.get(name, {}):
        return
    tokenizer, ends = tokenizer_of(base_model, STYLES[name])
    chats = [CASES["developer"], {"messages": [SYSTEM, ONE, UNO]}]
    rows = [Encoder(tokenizer, ends).encode(Row(RowForm.MESSAGES, chat, "line 1")) for chat in chats]
    assert rows[0] == rows[1]


def test_a_template_that_knows_the_developer_gets_it(base_model: Path) -> None:
    knowing = "{% if m.role == 'developer' %}{% endif %}"
    template = STYLES["chatml"].template.replace("<|im_start|>", f"{knowing}<|im_start|>", 1)
    tokenizer, ends = tokenizer_of(base_model, Style(template))
    chat = {"messages": [SYSTEM, DEVELOPER, ONE, UNO]}
    (tokens,) = Encoder(tokenizer, ends).encode(Row(RowForm.MESSAGES, chat, "line 1"))
    assert "<|im_start|>developer\nBe brief.<|im_end|>" in tokenizer.decode(tokens.input_ids)
    tokenizer, ends = tokenizer_of(base_model, STYLES["chatml"])
    (tokens,) = Encoder(tokenizer, ends).encode(Row(RowForm.MESSAGES, chat, "line 1"))
    assert "<|im_start|>system\nBe brief.\n\nBe brief.<|im_end|>" in tokenizer.decode(tokens.input_ids)


@pytest.mark.parametrize(
    ("name", "case", "expected"),
    [
        ("llama3", "tools", [['{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>', "Uno.<|eot_id|>"]]),
        ("phi3", "multi", [["Uno.<|end|>", "Due.<|end|>"]]),
        ("qwen3", "multi", [["<think>\n\n</think>\n\nUno.<|im_end|>"], ["<think>\n\n</think>\n\nDue.<|im_end|>"]]),
        ("qwen3.5", "multi", [["\n</think>\n\nUno.<|im_end|>"], ["\n</think>\n\nDue.<|im_end|>"]]),
        (
            "harmony",
            "thought tools",
            [
                [
                    (
                        "<|channel|>analysis<|message|>Look up.<|end|><|start|>assistant to=functions.weather"
                        '<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
                    ),
                    (
                        "<|channel|>analysis<|message|>It rains.<|end|><|start|>assistant"
                        "<|channel|>final<|message|>Uno.<|return|>"
                    ),
                ]
            ],
        ),
        (
            "glm4.5",
            "tools",
            [
                [
                    (
                        "\n<think></think>\n<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo</arg_value></tool_call>"
                        "<|observation|>"
                    ),
                    "\n<think></think>\nUno.<|user|>",
                ]
            ],
        ),
        (
            "glm4.5",
            "reasoning",
            [["\n<think>Because one.</think>\nUno.<|user|>"], ["\n<think>Because two.</think>\nDue.<|user|>"]],
        ),
        ("deepseek-r1", "multi", [["\n</think>\n\nUno.<|eos|>"], ["\n</think>\n\nDue.<|eos|>"]]),
        (
            "deepseek-r1",
            "reasoning",
            [["Because one.\n</think>\n\nUno.<|eos|>"], ["Because two.\n</think>\n\nDue.<|eos|>"]],
        ),
    ],
)
def test_learned_texts(base_model: Path, name: str, case: str, expected: list[list[str]]) -> None:
    tokenizer, ends = tokenizer_of(base_model, STYLES[name])
    rows = Encoder(tokenizer, ends).encode(Row(RowForm.MESSAGES, CASES[case], "line 1"))
    assert [[tokenizer.decode(row.labels[begin:end]) for begin, end in learned_runs(row.labels)] for row in rows] == (
        expected
    )


@pytest.mark.parametrize("name", ["qwen3", "qwen3.5", "harmony", "glm4.5", "llama3", "mistral"])
def test_a_completion_may_be_a_tool_call(base_model: Path, name: str) -> None:
    tokenizer, ends = tokenizer_of(base_model, STYLES[name])
    row = Row(RowForm.MESSAGES, {"messages": [ONE, UNO, TWO, CALLS], "tools": TOOLS}, "line 1")
    (tokens,) = Encoder(tokenizer, ends, loss_on=LossOn.COMPLETION).encode(row)
    ((begin, end),) = learned_runs(tokens.labels)
    assert "Oslo" in tokenizer.decode(tokens.input_ids[begin:end])
    assert "Uno" not in tokenizer.decode(tokens.input_ids[begin:end])


def test_an_answer_of_weight_0_gets_no_row_of_its_own(base_model: Path) -> None:
    tokenizer, ends = tokenizer_of(base_model, STYLES["qwen3"])
    chat = {"messages": [ONE, UNO | {"weight": 0}, TWO, thought(DUE, "Because two.")]}
    (tokens,) = Encoder(tokenizer, ends).encode(Row(RowForm.MESSAGES, chat, "line 1"))
    ((begin, end),) = learned_runs(tokens.labels)
    assert tokenizer.decode(tokens.input_ids[begin:end]) == "<think>\nBecause two.\n</think>\n\nDue.<|im_end|>"


@pytest.mark.parametrize(
    ("name", "chat", "omitted"),
    [
        ("llama3", [ONE, CALLS | {"content": "I look it up."}, RAIN, UNO], "message 2 (assistant): 'content'"),
        ("llama3", [ONE | {"name": "Ann"}, UNO], "message 1 (user): 'name'"),
        ("phi4", [ONE, UNO, RAIN, DUE], "message 3 (tool): 'content'"),
        ("deepseek-r1", CASES["tools"]["messages"], "message 2 (assistant): 'tool_calls'"),
    ],
)
def test_parts_that_are_not_rendered(base_model: Path, name: str, chat: list[dict[str, Any]], omitted: str) -> None:
    tokenizer, ends = tokenizer_of(base_model, STYLES[name])
    with pytest.raises((RowRejectedError, InvalidSpecError)) as raised:
        Encoder(tokenizer, ends).encode(Row(RowForm.MESSAGES, {"messages": chat}, "line 1"))
    assert omitted in str(raised.value)


def test_the_name_of_a_called_function_is_rendered_with_its_call(base_model: Path) -> None:
    tokenizer, ends = tokenizer_of(base_model, STYLES["llama3"])
    chat = {"messages": [ONE, CALLS, RAIN | {"name": "weather"}, UNO]}
    assert len(Encoder(tokenizer, ends).encode(Row(RowForm.MESSAGES, chat, "line 1"))) == 1


@pytest.mark.parametrize(
    ("name", "content", "learned"),
    [
        ("chatml", "<think>\nHm.\n</think>\n\nUno.", "<think>\nHm.\n</think>\n\nUno.<|im_end|>"),
        ("deepseek-r1", "<think>\nHm.\n</think>\n\nUno.", "Hm.\n</think>\n\nUno.<|eos|>"),
        ("deepseek-r1", "Hm.\n</think>\n\nUno.", "Hm.\n</think>\n\nUno.<|eos|>"),
    ],
)
def test_reasoning_that_a_template_removes_from_the_content_is_learned(
    base_model: Path, name: str, content: str, learned: str
) -> None:
    """The model generates it; the template removes it from the messages that a client sends back."""
    dropping = STYLES[name].template.replace("m.content }}", "m.content.split('</think>')[-1] | trim }}")
    tokenizer, ends = tokenizer_of(base_model, Style(dropping, STYLES[name].ends, STYLES[name].others))
    chat = {"messages": [ONE, UNO | {"content": content}, TWO, DUE]}
    first, *_ = Encoder(tokenizer, ends).encode(Row(RowForm.MESSAGES, chat, "line 1"))
    (begin, end), *_ = learned_runs(first.labels)
    assert tokenizer.decode(first.input_ids[begin:end]) == learned


def test_text_inside_the_content_does_not_disappear(base_model: Path) -> None:
    """The shape of the chat does not show it."""
    dropping = STYLES["chatml"].template.replace("m.content", "m.content.split('|')[-1]")
    tokenizer, ends = tokenizer_of(base_model, Style(dropping))
    encoder = Encoder(tokenizer, ends)
    encoder.encode(Row(RowForm.MESSAGES, CASES["single"], "line 1"))
    with pytest.raises(RowRejectedError, match=r"line 2: message 2 \(assistant\): 'content' is not rendered"):
        encoder.encode(Row(RowForm.MESSAGES, {"messages": [ONE, UNO | {"content": "Hm.|Uno."}]}, "line 2"))


def test_a_prompt_is_tokenised_without_the_answer(base_model: Path) -> None:
    """A token across the start of an answer is not in the prompt, but is in the prompt of the next answer."""
    tokenizer, ends = tokenizer_of(base_model, STYLES["qwen3.5"])
    tokenizer.add_tokens(["\n\n"])
    rows = Encoder(tokenizer, ends).encode(Row(RowForm.MESSAGES, CASES["tools"], "line 1"))
    assert len(rows) == 2
    assert_as_served(tokenizer, ends, CASES["tools"], rows)


INSTALLED = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    if not path.stem.endswith("_training") and "endgeneration" not in path.read_text(encoding="utf-8")
}
ENDS = {
    "cohere": ("<|END_OF_TURN_TOKEN|>",),
    "gemma": ("<end_of_turn>",),
    "glm": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|call|>"),
    "llama": ("<|eot_id|>",),
    "phi": ("<|endoftext|>", "<|end|>"),
}
"""End tokens by the start of a template's name; of the others it is ChatML's."""


@pytest.mark.parametrize("name", INSTALLED)
def test_templates_of_installed_packages(base_model: Path, name: str) -> None:
    ends = next((ends for start, ends in ENDS.items() if name.startswith(start)), ("<|im_end|>",))
    tokenizer, end_tokens = tokenizer_of(base_model, Style(INSTALLED[name], ends))
    encoder, learned = Encoder(tokenizer, end_tokens), set()
    for case, chat in CASES.items():
        try:
            rows = encoder.encode(Row(RowForm.MESSAGES, chat, "line 1"))
        except (RowRejectedError, InvalidSpecError):
            continue
        assert_as_served(tokenizer, end_tokens, chat, rows)
        learned.add(case)
    assert "single" in learned


def test_a_split_chat_is_counted_and_stays_together(bench: Workbench) -> None:
    rows = [{"messages": [ONE | {"content": f"One {number}?"}, UNO, TWO, DUE]} for number in range(10)]
    job = bench.job(rows)
    job["spec"]["dataset"]["chatTemplate"] = STYLES["qwen3"].template
    ran = bench.run("validate", job)
    counted = ran.result.preflight
    assert counted is not None, ran.result.message
    assert (counted.rows, counted.validation_rows, counted.split_chats, counted.split_rows) == (18, 2, 10, 20)
    assert any("10 chats became 20 rows" in line for line in ran.lines)


def test_rows_that_are_not_rendered_are_counted_or_refused(bench: Workbench) -> None:
    odd = {"messages": [ONE, thought(UNO, "Because.")]}
    counted = bench.run("validate", bench.job([*chat_rows(12), odd])).result.preflight
    assert counted is not None
    assert counted.dropped is not None
    assert [(dropped.reason, dropped.rows) for dropped in counted.dropped] == [(DropReason.NOT_RENDERED, 1)]
    assert counted.dropped[0].examples == [
        (
            "train.jsonl line 13: message 2 (assistant): 'reasoning_content' is not rendered by the base model's chat"
            " template"
        )
    ]
    other = {"messages": [TWO, thought(DUE, "Because.")]}
    ran = bench.run("validate", bench.job([*chat_rows(2), odd, other]))
    assert (ran.code, ran.result.reason) == (2, FailureReason.DATASET_INVALID)
    assert "line 3: message 2 (assistant): 'reasoning_content' is not rendered" in ran.result.message
    assert "use a base model whose template renders it" in ran.result.message
