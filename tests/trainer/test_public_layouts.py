"""Rows in the layouts of public data sets, generated here: the learned tokens are exactly the answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from tests.trainer.trainer_rig import write_rows
from tunesmith.api.dataset import Dataset
from tunesmith.api.objective import ObjectiveName
from tunesmith_trainer.data.encoding import IGNORED, Encoder
from tunesmith_trainer.data.formats import DataFile
from tunesmith_trainer.data.forms import FORMS
from tunesmith_trainer.data.report import RowReport
from tunesmith_trainer.data.rows import read
from tunesmith_trainer.data.sources import Part, Source, fetch
from tunesmith_trainer.errors import DatasetInvalidError
from tunesmith_trainer.store import Stores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tunesmith_trainer.data.encoding import Tokens

COUNT = 200
PAGE = Path(__file__).resolve().parents[2] / "docs/data.md"
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = "<|im_end|>"
PIRATE = "Answer like a pirate."


@dataclass(frozen=True)
class Expected:
    """Text of a row and its learned passages, each with its end token."""

    text: str
    learned: list[str]


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}{END}\n"


def chat(*turns: tuple[str, str], tools: Sequence[Any] = ()) -> Expected:
    """Return a chat, of which each of the assistant's messages is learned."""
    before = turn("tools", _json(list(tools))) if tools else ""
    text = before + "".join(turn(role, content) for role, content in turns)
    return Expected(text, [content + END for role, content in turns if role == "assistant"])


def called(name: str, arguments: dict[str, Any]) -> str:
    return f"<call>{_json({'name': name, 'arguments': arguments})}</call>"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def last_only(expected: Expected) -> Expected:
    return Expected(expected.text, expected.learned[-1:])


def answered(prompt: Expected, answer: str) -> Expected:
    """Return a prompt with an answer, as rows of preferences are encoded: up to the end token."""
    return Expected(f"{prompt.text}<|im_start|>assistant\n{answer}{END}", [answer + END])


@dataclass(frozen=True)
class Layout:
    """A layout: a row, the sequences that it becomes, and the settings that it needs."""

    row: Callable[[int], dict[str, Any]]
    expected: Callable[[int], list[Expected]]
    objective: ObjectiveName = ObjectiveName.SFT
    settings: dict[str, Any] = field(default_factory=dict)
    desirable: Callable[[int], bool] | None = None


def alpaca(number: int) -> dict[str, Any]:
    given = f"{number} and 1" if number % 2 else ""
    return {"instruction": f"Add {number}.", "input": given, "output": f"The sum is {number + 1}."}


def alpaca_chat(number: int) -> list[Expected]:
    given = f"\n\n{number} and 1" if number % 2 else ""
    return [chat(("user", f"Add {number}.{given}"), ("assistant", f"The sum is {number + 1}."))]


def alpaca_history(number: int) -> dict[str, Any]:
    return alpaca(number) | {"system": PIRATE, "history": [[f"Hello {number}", "Ahoy."], ["How?", "Well."]]}


def alpaca_history_chat(number: int) -> list[Expected]:
    earlier = [("user", f"Hello {number}"), ("assistant", "Ahoy."), ("user", "How?"), ("assistant", "Well.")]
    given = f"\n\n{number} and 1" if number % 2 else ""
    last = [("user", f"Add {number}.{given}"), ("assistant", f"The sum is {number + 1}.")]
    return [last_only(chat(("system", PIRATE), *earlier, *last))]


def sharegpt(number: int) -> dict[str, Any]:
    turns = [("human", f"Who is {number}?"), ("gpt", "Marta."), ("human", "Where?"), ("gpt", f"In house {number}.")]
    return {
        "id": f"chat_{number}",
        "conversations": [{"from": speaker, "value": text} for speaker, text in turns],
        "system": PIRATE,
    }


def sharegpt_chat(number: int) -> list[Expected]:
    turns = [("user", f"Who is {number}?"), ("assistant", "Marta."), ("user", "Where?")]
    return [chat(("system", PIRATE), *turns, ("assistant", f"In house {number}."))]


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "default": None}}},
    },
}


def openai(number: int) -> dict[str, Any]:
    function = {"name": "weather", "arguments": json.dumps({"city": f"Town {number}"})}
    return {
        "messages": [
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": f"Weather in town {number}?"},
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "annotations": [],
                "tool_calls": [{"id": f"call_{number}", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": f"call_{number}", "content": "rain"},
            {"role": "assistant", "content": f"It rains in town {number}.", "weight": number % 2},
        ],
        "tools": [WEATHER],
        "parallel_tool_calls": False,
    }


def openai_chat(number: int) -> list[Expected]:
    whole = chat(
        ("system", "Use tools."),
        ("user", f"Weather in town {number}?"),
        ("assistant", called("weather", {"city": f"Town {number}"})),
        ("tool", "rain"),
        ("assistant", f"It rains in town {number}."),
        tools=[WEATHER],
    )
    return [whole if number % 2 else Expected(whole.text, whole.learned[:1])]


def ultrachat(number: int) -> dict[str, Any]:
    turns = [("user", f"Describe {number}."), ("assistant", "A number."), ("user", "More."), ("assistant", "Round.")]
    return {
        "prompt": f"Describe {number}.",
        "prompt_id": f"{number:064x}",
        "messages": [{"content": text, "role": role} for role, text in turns],
    }


def ultrachat_chat(number: int) -> list[Expected]:
    turns = [("user", f"Describe {number}."), ("assistant", "A number."), ("user", "More."), ("assistant", "Round.")]
    return [chat(*turns)]


def openassistant(number: int) -> dict[str, Any]:
    return {
        "message_tree_id": str(number),
        "thread": [
            {"text": f"Why {number}?", "role": "prompter", "lang": "en", "message_id": "a", "rank": None},
            {"text": f"Because of {number}.", "role": "assistant", "lang": "en", "message_id": "b", "rank": 0},
        ],
    }


def openassistant_chat(number: int) -> list[Expected]:
    return [chat(("user", f"Why {number}?"), ("assistant", f"Because of {number}."))]


def dolly(number: int) -> dict[str, Any]:
    return {
        "instruction": f"Who owns boat {number}?",
        "context": f"Marta owns boat {number}." if number % 3 else "",
        "response": "Marta.",
        "category": "closed_qa",
    }


def dolly_chat(number: int) -> list[Expected]:
    context = f"\n\nMarta owns boat {number}." if number % 3 else ""
    return [chat(("user", f"Who owns boat {number}?{context}"), ("assistant", "Marta."))]


def no_robots(number: int) -> dict[str, Any]:
    turns = [
        ("system", "Marta is factual."),
        ("user", f"Is {number} odd?"),
        ("assistant", "Yes." if number % 2 else "No."),
    ]
    return {
        "prompt": f"Is {number} odd?",
        "prompt_id": f"{number:064x}",
        "messages": [{"content": text, "role": role} for role, text in turns],
        "category": "Chat",
    }


def no_robots_chat(number: int) -> list[Expected]:
    return [
        chat(
            ("system", "Marta is factual."),
            ("user", f"Is {number} odd?"),
            ("assistant", "Yes." if number % 2 else "No."),
        )
    ]


def ultrafeedback(number: int) -> dict[str, Any]:
    question = {"role": "user", "content": f"Rate {number}."}
    chosen, rejected = ([question, {"role": "assistant", "content": text}] for text in ("Good.", f"Bad {number}."))
    return {
        "prompt": f"Rate {number}.",
        "prompt_id": f"{number:064x}",
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": 8.0,
        "score_rejected": 3.5,
    }


def ultrafeedback_pair(number: int) -> list[Expected]:
    prompt = chat(("user", f"Rate {number}."))
    return [answered(prompt, "Good."), answered(prompt, f"Bad {number}.")]


def hh_rlhf(number: int) -> dict[str, Any]:
    dialogue = f"\n\nHuman: Hello {number}\n\nAssistant: Hello.\n\nHuman: Help?\n\nAssistant:"
    return {"chosen": f"{dialogue} I can help.", "rejected": f"{dialogue} I cannot."}


def hh_rlhf_pair(number: int) -> list[Expected]:
    dialogue = f"\n\nHuman: Hello {number}\n\nAssistant: Hello.\n\nHuman: Help?\n\nAssistant:"
    return [Expected(f"{dialogue}{text}{END}", [text + END]) for text in (" I can help.", " I cannot.")]


def kto(number: int) -> dict[str, Any]:
    return {"prompt": f"Count {number}:", "completion": f" {number + 1}", "label": number % 2}


def kto_answer(number: int) -> list[Expected]:
    return [Expected(f"Count {number}: {number + 1}{END}", [f" {number + 1}{END}"])]


def glaive(number: int) -> dict[str, Any]:
    turns = [
        ("human", f"Price of {number}?"),
        ("function_call", json.dumps({"name": "price", "arguments": {"item": number, "currency": None}})),
        ("observation", '{"price": 3}'),
        ("gpt", f"Item {number} costs 3."),
    ]
    return {
        "conversations": [{"from": speaker, "value": text} for speaker, text in turns],
        "tools": json.dumps([PRICE]),
    }


PRICE = {"name": "price", "description": "Price of an item", "parameters": {"type": "object", "properties": {}}}


def glaive_chat(number: int) -> list[Expected]:
    return [
        chat(
            ("user", f"Price of {number}?"),
            ("assistant", called("price", {"item": number, "currency": None})),
            ("tool", '{"price": 3}'),
            ("assistant", f"Item {number} costs 3."),
            tools=[{"type": "function", "function": PRICE}],
        )
    ]


def squad(number: int) -> dict[str, Any]:
    return {
        "id": f"{number:024x}",
        "title": "Brinewick",
        "context": f"Brinewick has {number} doors.",
        "question": f"How many doors has Brinewick, {number} times?",
        "answers": {"text": [f"{number} doors", str(number)], "answer_start": [14, 14]},
    }


def squad_chat(number: int) -> list[Expected]:
    question = f"How many doors has Brinewick, {number} times?\n\nBrinewick has {number} doors."
    return [chat(("user", question), ("assistant", f"{number} doors"))]


CONVERSATIONS = {"columns": {"messages": "conversations"}}
LAYOUTS = {
    "Alpaca": Layout(alpaca, alpaca_chat),
    "Alpaca with system and history": Layout(alpaca_history, alpaca_history_chat),
    "ShareGPT with system": Layout(sharegpt, sharegpt_chat, settings=CONVERSATIONS),
    "OpenAI with tools": Layout(openai, openai_chat),
    "UltraChat": Layout(ultrachat, ultrachat_chat),
    "OpenAssistant": Layout(openassistant, openassistant_chat, settings={"columns": {"messages": "thread"}}),
    "Dolly": Layout(dolly, dolly_chat, settings={"columns": {"output": "response", "input": "context"}}),
    "no_robots": Layout(no_robots, no_robots_chat),
    "UltraFeedback": Layout(ultrafeedback, ultrafeedback_pair, objective=ObjectiveName.DPO),
    "HH-RLHF": Layout(hh_rlhf, hh_rlhf_pair, objective=ObjectiveName.DPO),
    "KTO": Layout(kto, kto_answer, objective=ObjectiveName.KTO, desirable=lambda number: number % 2 == 1),
    "glaive in the layout of LLaMA-Factory": Layout(glaive, glaive_chat, settings=CONVERSATIONS),
    "SQuAD": Layout(
        squad, squad_chat, settings={"columns": {"instruction": "question", "input": "context", "output": "answers"}}
    ),
}


@pytest.fixture(scope="module")
def tokenizer(base_model: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(base_model)


def encoded(
    sources: Sequence[Source], layout: Layout, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[Tokens], RowReport]:
    dataset = Dataset.model_validate({"train": [{"uri": "s3://bucket/rows"}], **layout.settings})
    report = RowReport()
    end: Any = tokenizer.convert_tokens_to_ids(END)
    encoder = Encoder(tokenizer, [end], chat_template=TEMPLATE)
    rows = list(read(sources, dataset, report, forms=FORMS[layout.objective]))
    return [tokens for row in encoder.encode_all(rows) for tokens in row.rows], report


def sequences(tokens: Tokens, tokenizer: PreTrainedTokenizerFast) -> Iterator[Expected]:
    """Yield each sequence of a row: its text, and the text of each learned passage."""
    start = 0
    for size in tokens.seq_lengths or [len(tokens.input_ids)]:
        ids, labels = (part[start : start + size] for part in (tokens.input_ids, tokens.labels))
        start += size
        passages: list[list[int]] = []
        for index, label in enumerate(labels):
            if label == IGNORED:
                continue
            assert label == ids[index]
            if index == 0 or labels[index - 1] == IGNORED:
                passages.append([])
            passages[-1].append(label)
        yield Expected(str(tokenizer.decode(ids)), [str(tokenizer.decode(passage)) for passage in passages])


def check(rows: Sequence[Tokens], layout: Layout, tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(rows) == COUNT
    for number, tokens in enumerate(rows):
        for found, expected in zip(sequences(tokens, tokenizer), layout.expected(number), strict=True):
            assert found.text.removesuffix("\n") == expected.text.removesuffix("\n")
            assert found.learned == expected.learned
        if layout.desirable is not None:
            assert tokens.desirable is layout.desirable(number)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_answers_of_a_public_layout_are_learned(
    tmp_path: Path, name: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    layout = LAYOUTS[name]
    path = write_rows(tmp_path / "rows.jsonl", [layout.row(number) for number in range(COUNT)])
    rows, report = encoded([Source("s3://bucket/rows", [DataFile(path.name, path)])], layout, tokenizer)
    check(rows, layout, tokenizer)
    assert (report.dropped, report.read) == (0, COUNT)


def glaive_texts(number: int) -> dict[str, Any]:
    """Return a row of glaive-function-calling: a chat as one text, and its tools in the text of the system."""
    call = f"""{{"name": "price", "arguments": '{{"item": {number}}}'}}"""
    return {
        "system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
        + json.dumps(PRICE, indent=4)
        + "\n",
        "chat": f"USER: Price of {number}?\n\n\nASSISTANT: <functioncall> {call} <|endoftext|>\n\n\n"
        'FUNCTION RESPONSE: {"price": 3}\n\n\n'
        f"ASSISTANT: Item {number} costs 3.\nIs that fine? <|endoftext|>\n\n\n\n\n",
    }


def glaive_texts_chat(number: int) -> list[Expected]:
    return [
        chat(
            ("system", "You are a helpful assistant with access to the following functions. Use them if required -"),
            ("user", f"Price of {number}?"),
            ("assistant", called("price", {"item": number})),
            ("tool", '{"price": 3}'),
            ("assistant", f"Item {number} costs 3.\nIs that fine?"),
            tools=[{"type": "function", "function": PRICE}],
        )
    ]


def test_chats_that_are_one_text_are_refused_and_converted_as_documented(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [glaive_texts(number) for number in range(COUNT)]
    source = Source("s3://bucket/rows", [DataFile("rows.jsonl", write_rows(tmp_path / "rows.jsonl", rows))])
    for settings in ({}, {"columns": {"messages": "chat"}}):
        with pytest.raises(DatasetInvalidError, match=r"'chat' is one text with a whole chat .*docs/data.md"):
            encoded([source], Layout(glaive_texts, glaive_texts_chat, settings=settings), tokenizer)
    (script,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "convert.py").write_text(script)
    command = [sys.executable, "convert.py", "rows.jsonl", "messages.jsonl"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    source = Source("s3://bucket/rows", [DataFile("messages.jsonl", tmp_path / "messages.jsonl")])
    layout = Layout(glaive_texts, glaive_texts_chat)
    check(encoded([source], layout, tokenizer)[0], layout, tokenizer)


@pytest.mark.parametrize("name", ["ShareGPT with system", "OpenAI with tools", "UltraFeedback", "KTO"])
def test_only_the_training_split_of_a_repository_is_learned(
    tmp_path: Path, name: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Parquet files as the Hub names them: nulls that fill up their structs do not change the rows."""
    layout = LAYOUTS[name]
    rows = [layout.row(number) for number in range(COUNT)]
    for row in rows:
        if "tools" in row:
            row["tools"] = json.dumps(row["tools"])  # a null that is meant is kept only in JSON
    folder = tmp_path / "set/data"
    folder.mkdir(parents=True)
    for number in range(2):
        part = pa.Table.from_pylist(rows[number * COUNT // 2 : (number + 1) * COUNT // 2])
        pq.write_table(part, folder / f"train-0000{number}-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist([layout.row(COUNT + 1)]), folder / "test-00000-of-00001.parquet")
    dataset = Dataset.model_validate({"train": [{"uri": f"file://{tmp_path}/set"}]})
    sources = fetch(dataset.train, Stores(secrets=tmp_path, allow_file=True), tmp_path / "work", Part.TRAIN)
    assert [(source.split, dict(source.skipped)) for source in sources] == [("train", {"test": 1})]
    check(encoded(sources, layout, tokenizer)[0], layout, tokenizer)
