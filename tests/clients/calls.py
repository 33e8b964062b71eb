"""Calls of one client library to a gateway: `python calls.py LIBRARY URL KEY MODEL`.

Chat, stream, tools, responses and errors; an exception is a failure. The model is an adapter's global id.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

QUESTION = "What is the capital of France?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris"]}}, "required": ["city"]}
FUNCTION = {"name": "weather", "description": "The weather of a city", "parameters": SCHEMA}
TOOL: dict[str, Any] = {"type": "function", "function": FUNCTION}
CHOICE: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}
SHORT = 24
"""Tokens of an answer; enough for the arguments of the tool."""


def refused(kind: type[Exception], request: Callable[[], object]) -> Any:
    """The error with which a request fails."""
    try:
        request()
    except kind as error:
        return error
    raise AssertionError(kind)


def call_openai(url: str, key: str, model: str) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    chat = client.chat.completions
    answer = chat.create(model=model, messages=MESSAGES, max_tokens=SHORT, logprobs=True, top_logprobs=2)
    assert answer.model.startswith(f"{model}@")
    assert answer.choices[0].message.content
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    pieces = [
        chunk.choices[0].delta.content
        for chunk in chat.create(model=model, messages=MESSAGES, max_tokens=SHORT, stream=True)
        if chunk.choices
    ]
    assert sum(map(bool, pieces)) > 1
    called = chat.create(model=model, messages=MESSAGES, tools=[TOOL], tool_choice=CHOICE, max_tokens=SHORT)
    assert called.choices[0].message.tool_calls[0].function.arguments.replace(" ", "") == '{"city":"Paris"}'
    format_ = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    structured = chat.create(model=model, messages=MESSAGES, response_format=format_, max_tokens=SHORT)
    assert structured.choices[0].message.content.replace(" ", "") == '{"city":"Paris"}'
    response = client.responses.create(model=model, input=QUESTION, max_output_tokens=SHORT, store=False)
    assert response.model.startswith(f"{model}@")
    assert response.output_text
    with client.responses.stream(model=model, input=QUESTION, max_output_tokens=SHORT) as stream:
        kinds = [event.type for event in stream]
    assert kinds.count("response.output_text.delta") > 1
    assert kinds[-1] in {"response.completed", "response.incomplete"}
    tool = {"type": "function", "strict": True, **FUNCTION, "parameters": {**SCHEMA, "additionalProperties": False}}
    called = client.responses.create(
        model=model, input=QUESTION, tools=[tool], tool_choice={"type": "function", "name": "weather"}, store=False
    )
    assert next(item for item in called.output if item.type == "function_call").name == "weather"
    for stored in ({"store": True}, {"previous_response_id": "resp_1"}):
        error = refused(openai.BadRequestError, lambda: client.responses.create(model=model, input=QUESTION, **stored))  # noqa: B023 - called at once
        assert "responses are not stored" in error.message
    error = refused(openai.NotFoundError, lambda: client.embeddings.create(model=model, input=QUESTION))
    assert error.code == "api_not_served"
    assert model in [entry.id for entry in client.models.list()]


def call_anthropic(url: str, key: str, model: str) -> None:
    import anthropic

    client = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)
    answer = client.messages.create(model=model, messages=MESSAGES, max_tokens=SHORT, system="Be brief.")
    assert answer.model.startswith(f"{model}@")
    assert answer.content[0].text
    assert answer.usage.output_tokens > 0
    with client.messages.stream(model=model, messages=MESSAGES, max_tokens=SHORT) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 1
    assert final.usage.output_tokens > 0
    tool = {"name": "weather", "description": "The weather of a city", "input_schema": SCHEMA}
    called = client.messages.create(
        model=model,
        messages=MESSAGES,
        max_tokens=SHORT,
        tools=[tool],
        tool_choice={"type": "tool", "name": "weather"},
    )
    assert next(block for block in called.content if block.type == "tool_use").input == {"city": "Paris"}
    assert client.messages.count_tokens(model=model, messages=MESSAGES).input_tokens > 5
    for other, expected in (
        (client.with_options(api_key="sk-ts-wrong"), anthropic.AuthenticationError),
        (client, anthropic.NotFoundError),
    ):
        request = {"model": "nothing", "messages": MESSAGES, "max_tokens": SHORT}
        assert refused(expected, lambda: other.messages.create(**request)).body["type"] == "error"  # noqa: B023 - the same


def call_langchain(url: str, key: str, model: str) -> None:
    from langchain_openai import ChatOpenAI

    options: dict[str, Any] = {"model": model, "base_url": f"{url}/v1", "api_key": key, "max_tokens": SHORT}
    chat = ChatOpenAI(**options)
    assert chat.invoke(QUESTION).content
    assert sum(bool(piece.content) for piece in chat.stream(QUESTION)) > 1
    called = chat.bind_tools([TOOL], tool_choice="weather").invoke(QUESTION)
    assert called.tool_calls[0]["args"] == {"city": "Paris"}
    assert ChatOpenAI(**options, use_responses_api=True).invoke(QUESTION).text


def call_llama_index(url: str, key: str, model: str) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    chat = OpenAILike(
        model=model,
        api_base=f"{url}/v1",
        api_key=key,
        is_chat_model=True,
        is_function_calling_model=True,
        max_tokens=SHORT,
    )
    messages = [ChatMessage(role="user", content=QUESTION)]
    assert chat.chat(messages).message.content
    assert sum(bool(piece.delta) for piece in chat.stream_chat(messages)) > 1
    called = chat.chat(messages, tools=[TOOL], tool_choice=CHOICE)
    assert chat.get_tool_calls_from_response(called)[0].tool_kwargs == {"city": "Paris"}


def call_litellm(url: str, key: str, model: str) -> None:
    import litellm

    options: dict[str, Any] = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": key}
    options |= {"messages": MESSAGES, "max_tokens": SHORT}
    assert litellm.completion(**options).choices[0].message.content
    pieces = [chunk.choices[0].delta.content for chunk in litellm.completion(**options, stream=True)]
    assert sum(map(bool, pieces)) > 1
    called = litellm.completion(**options, tools=[TOOL], tool_choice=CHOICE)
    assert called.choices[0].message.tool_calls[0].function.name == "weather"
    options |= {"model": f"anthropic/{model}", "api_base": url}
    assert litellm.completion(**options).choices[0].message.content


CALLS = {
    "openai": call_openai,
    "anthropic": call_anthropic,
    "langchain": call_langchain,
    "llama-index": call_llama_index,
    "litellm": call_litellm,
}


if __name__ == "__main__":
    library, url, key, model = sys.argv[1:]
    CALLS[library](url, key, model)
