"""Prompts are those that vLLM's server renders, for every template that the tests and the installed packages have."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.chat_styles import STYLES
from tests.trainer.test_chat_templates import CALL, CASES, DUE, INSTALLED, ONE, RAIN, SYSTEM, TOOLS, TWO, UNO
from tunesmith_trainer.base_model import model
from tunesmith_trainer.data.messages import Origin, messages_of, tools_of
from tunesmith_trainer.data.served import ServedForm
from tunesmith_trainer.data.template import ChatTemplate, RowRejectedError

ENGINE = Path(__file__).resolve().parents[2] / "server-image/engine-cpu/.venv/bin/python"
DEVELOPER = {"role": "developer", "content": "Be kind."}
PARTS = [{"type": "text", "text": "One"}, {"type": "text", "text": "more?"}]
BARE = {"type": "function", "function": {"parameters": {"type": "object", "properties": {}}, "name": "clock"}}
CHATS: dict[str, dict[str, Any]] = {
    **CASES,
    "parts": {"messages": [ONE | {"content": PARTS}, UNO]},
    "parts of an answer": {"messages": [ONE, UNO | {"content": PARTS}, TWO, DUE]},
    "parts of a result": {"messages": [ONE, UNO | {"tool_calls": [CALL]}, RAIN | {"content": PARTS}, DUE]},
    "developer later": {"messages": [SYSTEM, ONE, UNO, DEVELOPER, TWO, DUE]},
    "developer in parts": {"messages": [DEVELOPER | {"content": PARTS}, ONE, UNO]},
    "developer and system": {"messages": [DEVELOPER, SYSTEM, ONE, UNO]},
    "tools without description": {"messages": [ONE, UNO], "tools": [*TOOLS, BARE]},
    "reasoning in the content": {"messages": [ONE, UNO | {"content": "<think>\nHm.\n</think>\n\nUno."}, TWO, DUE]},
    "names": {"messages": [ONE | {"name": "ann"}, UNO]},
    "name of a result": {"messages": [ONE, UNO | {"content": "", "tool_calls": [CALL]}, RAIN | {"name": "x"}, DUE]},
}
RENDERED_WITHOUT_TEMPLATE = {"harmony", "gptoss"}
"""Templates of gpt-oss, which vLLM replaces by code that renders reasoning; the template gets none from vLLM."""
TEMPLATES = {name: style.template for name, style in STYLES.items()} | INSTALLED


def bodies(chat: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the requests whose replies are the answers of a chat."""
    messages = []
    for message in chat["messages"]:
        given = dict(message)
        if "tool_calls" in given:
            given["tool_calls"] = [
                call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
                for call in given["tool_calls"]
            ]
            given["content"] = given["content"] or None
        messages.append(given)
    tools = {"tools": chat["tools"]} if "tools" in chat else {}
    return [
        {"model": "base", "messages": messages[:number], **tools}
        for number, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> dict[str, Any]:
    """Return what vLLM's own code makes of all templates and chats."""
    if not ENGINE.exists():
        pytest.skip("the environment of vLLM is not installed: run `make environment-server`")
    listed = tmp_path_factory.mktemp("served") / "request.json"
    request = {
        "model": str(base_model),
        "templates": TEMPLATES,
        "requests": {name: bodies(chat) for name, chat in CHATS.items()},
    }
    listed.write_text(json.dumps(request))
    probe = Path(__file__).with_name("template_probe.py")
    command = [str(ENGINE), str(probe), str(listed)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    answers: dict[str, Any] = json.loads(listed.with_suffix(".answers").read_text())
    return answers


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_vllm(base_model: Path, served: dict[str, Any], name: str) -> None:
    form = ServedForm.of(TEMPLATES[name])
    assert (form.parts, form.developer) == (served[name]["parts"], served[name]["developer"])
    template = ChatTemplate(model.load_tokenizer(base_model, "the tiny model"), TEMPLATES[name])
    for case, chat in CHATS.items():
        if name in RENDERED_WITHOUT_TEMPLATE and "thought" in case:
            continue
        origin = Origin()
        messages = messages_of(chat["messages"], "'messages'", origin)
        tools = tools_of(chat.get("tools"), origin)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        for number, expected in zip(answers, served[name]["prompts"][case], strict=True):
            try:
                prompt = template.prompt({"messages": messages[:number], "tools": tools}, "")
            except RowRejectedError:
                prompt = None
            assert prompt == expected, (case, number)
