"""Base models of other architectures than the demo's: a served tool call on Qwen3, and a refusal on GPT-2."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from e2e.custom_resources import API_VERSION, adapter_manifest, finished_job, job_manifest, ready_adapter
from e2e.demo import JOB, VALUES
from e2e.installation import DEMO, apply, condition, delete, in_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openai import OpenAI

    from e2e.installation import Object

Message = dict[str, Any]
NAME = "weather"
TOOL: Object = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Return the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
JOURNEYS = {"Oslo": "Rome", "Lima": "Cairo", "Paris": "Tokyo"}
"""City of the second question by city of the first."""
QUESTIONS = ("What is the weather in {}?", "The weather in {}, please.", "Tell me how it is in {}.")
HELD_OUT = "Which weather does {} have?"


def call(city: str, identifier: str) -> Message:
    function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
    calls = [{"id": identifier, "type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def conversation(first: str, second: str, question: str = QUESTIONS[0]) -> list[Message]:
    """Return a chat with two questions; the second prompt renders the first answers differently."""
    return [
        {"role": "user", "content": question.format(first)},
        call(first, "call_one1"),
        {"role": "tool", "tool_call_id": "call_one1", "content": "sunny"},
        {"role": "assistant", "content": f"It is sunny in {first}."},
        {"role": "user", "content": f"And in {second}?"},
        call(second, "call_two2"),
        {"role": "tool", "tool_call_id": "call_two2", "content": "rain"},
        {"role": "assistant", "content": f"It rains in {second}."},
    ]


@pytest.fixture(scope="module")
def rows(tiny_models: None, tmp_path_factory: pytest.TempPathFactory) -> None:  # noqa: ARG001 - they must be in the store
    """Chats with tools, in the store beside the models."""
    folder = tmp_path_factory.mktemp("rows")
    for name, questions in (("weather", QUESTIONS), ("weather-held-out", (HELD_OUT,))):
        file = folder / f"{name}.jsonl"
        chats = [
            {"messages": conversation(*cities, question), "tools": [TOOL]}
            for question in questions
            for cities in JOURNEYS.items()
        ]
        file.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
        in_store("put", str(file), f"s3://tunesmith/data/{file.name}")


def spec_of(base: str, **more: object) -> Object:
    spec: Object = yaml.safe_load(JOB.read_text())["spec"]
    spec |= {
        "baseModel": {"uri": f"s3://tunesmith/models/{base}"},
        "dataset": {
            "train": [{"uri": "s3://tunesmith/data/weather.jsonl"}],
            "validation": [{"uri": "s3://tunesmith/data/weather-held-out.jsonl"}],
            "maxLength": 512,
        },
        "method": {"lora": {"rank": 32, "alpha": 32}},
        "hyperparameters": {"maxSteps": 150, "learningRate": 5e-3, "batchSize": 12, "seed": 1},
        "evaluation": {"everySteps": 75, "publish": "Last"},
    }
    return spec | more


@pytest.fixture(scope="module")
def weather_model(rows: None) -> Iterator[str]:  # noqa: ARG001 - they must be in the store
    """Global id of an adapter that was trained on chats with tools, on a pool whose base has Qwen3's architecture."""
    pool: Object = next(iter(yaml.safe_load(VALUES.read_text())["pools"].values())) | {
        "modelName": "tiny-qwen3",
        "baseModel": {"uri": "s3://tunesmith/models/tiny-qwen3"},
    }
    pool["engine"] |= {"maxLoras": 2, "args": ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]}
    pool["autoscaling"] |= {"maxReplicas": 1}
    delete("finetunejob", NAME, DEMO)
    metadata = {"name": "tiny-qwen3", "namespace": DEMO}
    apply(
        job_manifest(NAME, spec_of("tiny-qwen3")),
        {"apiVersion": API_VERSION, "kind": "ServingPool", "metadata": metadata, "spec": pool},
        adapter_manifest(NAME, NAME, "tiny-qwen3"),
    )
    job = finished_job(NAME)
    assert condition(job, "Complete")["status"] == "True", job["status"]
    ready_adapter(NAME, seconds=600)
    yield f"{DEMO}/{NAME}"
    delete("adapterdeployment", NAME, DEMO)
    delete("servingpool", "tiny-qwen3", DEMO)


@pytest.mark.parametrize(("first", "second"), JOURNEYS.items())
def test_the_served_adapter_makes_the_tool_call_it_was_taught(
    client: OpenAI, weather_model: str, first: str, second: str
) -> None:
    """In the first turn and, after the tool's answer, in the second, where the prompt is rendered differently."""
    chat: Any = conversation(first, second)
    for turns, city in ((1, first), (5, second)):
        reply = client.chat.completions.create(
            model=weather_model, messages=chat[:turns], tools=[TOOL], temperature=0, max_tokens=64
        )
        message = reply.choices[0].message
        assert message.tool_calls, message
        [made] = message.tool_calls
        assert (made.function.name, json.loads(made.function.arguments)) == ("get_weather", {"city": city})
        assert reply.choices[0].finish_reason == "tool_calls"


def test_the_served_adapter_answers_after_the_tool(client: OpenAI, weather_model: str) -> None:
    chat: Any = conversation("Oslo", "Rome")[:3]
    reply = client.chat.completions.create(
        model=weather_model, messages=chat, tools=[TOOL], temperature=0, max_tokens=64
    )
    assert "It is sunny in Oslo." in (reply.choices[0].message.content or "")


@pytest.mark.usefixtures("rows")
def test_an_adapter_that_vllm_cannot_load_is_refused_before_training() -> None:
    """vLLM has no adapters for GPT-2; without `servable: Required` the job trains."""
    name = "gpt2"
    spec = spec_of("tiny-gpt2", servable="Required")
    delete("finetunejob", name, DEMO)
    apply(job_manifest(name, spec))
    job = finished_job(name)
    failed = condition(job, "Failed")
    assert (failed["status"], failed["reason"]) == ("True", "NotServable")
    assert "GPT2" in failed["message"]
    assert not job["status"].get("attempts")
    delete("finetunejob", name, DEMO)
