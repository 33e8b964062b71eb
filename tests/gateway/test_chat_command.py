"""`tunesmith chat` against a gateway."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gateway.gateway_rig import adapter_manifest

if TYPE_CHECKING:
    from tests.gateway.gateway_rig import Rig

PROGRAM = Path(sys.executable).with_name("tunesmith")
PIRATE = "team/pirate@aaaaaaaaaaaa"


async def chat(rig: Rig, *arguments: str, questions: str = "", key: str | None = None) -> tuple[int, str, str]:
    environment = os.environ | {"TUNESMITH_URL": rig.url, "TUNESMITH_API_KEY": key or rig.key}
    process = await asyncio.create_subprocess_exec(
        PROGRAM,
        "chat",
        *arguments,
        env=environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, problems = await process.communicate(questions.encode())
    assert process.returncode is not None
    return process.returncode, output.decode(), problems.decode()


@pytest.fixture
async def pirates(rig: Rig) -> Rig:
    rig.watches.put(adapter_manifest("pirate"))
    await rig.add_pod(PIRATE)
    return rig


async def test_one_question_is_answered(pirates: Rig) -> None:
    assert await chat(pirates, "pirate", "-m", "Hello") == (0, "Ahoy there from pod-1\n", "")


async def test_options_reach_the_engine_and_json_names_the_revision(pirates: Rig) -> None:
    options = ("--max-tokens", "5", "--temperature", "0", "--system", "Be brief", "-o", "json")
    code, output, _ = await chat(pirates, "pirate", "-m", "Hello", *options)
    assert (code, json.loads(output)["model"], json.loads(output)["content"]) == (0, PIRATE, "Ahoy there from pod-1")
    body = pirates.pods[0].seen[0]
    assert (body["max_tokens"], body["temperature"]) == (5, 0.0)
    assert [message["role"] for message in body["messages"]] == ["system", "user"]


async def test_a_conversation_keeps_earlier_messages(pirates: Rig) -> None:
    code, output, _ = await chat(pirates, "pirate", questions="Hello\nAnd then?\n")
    assert (code, output) == (0, "Ahoy there from pod-1\n" * 2)
    assert [message["content"] for message in pirates.pods[0].seen[1]["messages"]] == [
        "Hello",
        "Ahoy there from pod-1",
        "And then?",
    ]


async def test_an_adapter_is_compared_with_its_base(pirates: Rig) -> None:
    questions = "Hello\nAnd then?\n"
    code, output, _ = await chat(pirates, "pirate", "--compare", "serving/base", questions=questions)
    both = "[pirate]\nAhoy there from pod-1\n[serving/base]\nAhoy there from pod-1\n"
    assert (code, output) == (0, both * 2)
    seen = pirates.pods[0].seen
    assert [body["model"] for body in seen] == [PIRATE, "serving/base"] * 2
    assert [len(body["messages"]) for body in seen] == [1, 1, 3, 3]
    code, output, _ = await chat(pirates, "pirate", "--compare", "serving/base", "-m", "Hello", "-o", "json")
    assert [json.loads(line)["model"] for line in output.splitlines()] == [PIRATE, "serving/base"]


async def test_the_gateways_error_message_is_shown(pirates: Rig) -> None:
    code, output, problems = await chat(pirates, "parrot", "-m", "Hello")
    assert (code, output) == (1, "")
    assert problems.startswith("error: The model `parrot` does not exist or you do not have access to it.")
    code, _, problems = await chat(pirates, "pirate", "-m", "Hello", key="sk-ts-wrong")
    assert (code, problems.count("\n")) == (1, 1)
    assert "Incorrect API key provided. Ask your platform team for a key" in problems
