"""Parameters of the APIs besides chat and completions, with the checks of their values.

This module runs inside vLLM's interpreter, so it uses the standard library only. Each table names all of vLLM's
parameters of an API; see tunesmith_parameters, which looks them up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tunesmith_server.middleware import tunesmith_checks as checks
    from tunesmith_server.middleware.tunesmith_checks import Check, Policy
else:
    import tunesmith_checks as checks  # beside this file, which the agent puts on the engine's PYTHONPATH

RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
COUNT_TOKENS = "/v1/messages/count_tokens"
EMBEDDINGS = "/v1/embeddings"
SCORE = "/v1/score"
RERANK = "/v1/rerank"
TOKENIZE = "/tokenize"
DETOKENIZE = "/detokenize"

MAX_INPUTS = 128
"""Highest number of inputs of an embedding, score or rerank request: each is computed in one step, unlike a choice."""
_MAX_INCLUDED = 16
_NOT_STORED = "any pod of the pool may answer the next request, so responses are not stored"
_ANY_TEXT = checks.text(2**25)
_REFUSED: Mapping[str, Check] = {
    "priority": checks.refused("it would give one client precedence over the others", 0),
    "request_id": checks.refused("two clients may send the same value"),
    "mm_processor_kwargs": checks.refused("it changes how much work the engine does for an image"),
    "media_io_kwargs": checks.refused("it changes how much work the engine does for an image"),
}
_REFUSED_IN_GENERATION: Mapping[str, Check] = {
    **{
        name: checks.refused("it is for engines that exchange their caches")
        for name in ("kv_transfer_params", "ec_transfer_params")
    },
    "vllm_xargs": checks.refused("it is for the engine's own extensions"),
    "mm_payload": checks.refused("it has a meaning on other routes only", "tensors"),
    "return_mm_kwargs": checks.refused("it has a meaning on other routes only"),
}


def _input(value: object, policy: Policy) -> str | None:
    """Check the input of the Responses API: a text, or a list of items."""
    if isinstance(value, str):
        return None
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return "must be a string or a list of items, which are objects"
    if len(value) > checks.MAX_MESSAGES:
        return f"must have at most {checks.MAX_MESSAGES} items"
    for index, item in enumerate(value):
        if item.get("type") == "item_reference":
            return f"[{index}] must not be an item_reference: {_NOT_STORED}. Send the item itself"
        for name in ("content", "output"):
            problem = checks.parts(item.get(name), policy)
            if problem is not None:
                return f"[{index}].{name} {problem}"
    return None


def _messages(value: object, policy: Policy) -> str | None:
    """Check the messages of the Messages API, with the results of tools in their parts."""
    problem = checks.messages(value, policy)
    if problem is not None or not isinstance(value, list):
        return problem
    for index, message in enumerate(value):
        for part in message.get("content") if isinstance(message.get("content"), list) else ():
            problem = checks.parts(part.get("content"), policy) if isinstance(part, dict) else None
            if problem is not None:
                return f"[{index}].content {problem}"
    return None


def _system(value: object, policy: Policy) -> str | None:
    if isinstance(value, str | list):
        return checks.parts(value, policy)
    return "must be a string or a list of parts"


def _function_tools(value: object, _policy: Policy) -> str | None:
    """Check the tools of the Responses API: functions, which the client calls."""
    if not isinstance(value, list) or len(value) > checks.MAX_TOOLS:
        return f"must be a list of at most {checks.MAX_TOOLS} tools"
    for index, tool in enumerate(value):
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("name"), str):
            return f"[{index}] must be an object of type function with a name: the engine calls no tools itself"
    return checks.schema(value, checks.MAX_TOOLS_BYTES)


def _input_schema_tools(value: object, _policy: Policy) -> str | None:
    """Check the tools of the Messages API."""
    if not isinstance(value, list) or len(value) > checks.MAX_TOOLS:
        return f"must be a list of at most {checks.MAX_TOOLS} tools"
    for index, tool in enumerate(value):
        if not isinstance(tool, dict) or not isinstance(tool.get("input_schema"), dict):
            return f"[{index}] must be an object with a name and an input_schema: the engine calls no tools itself"
    return checks.schema(value, checks.MAX_TOOLS_BYTES)


def _anthropic_choice(value: object, _policy: Policy) -> str | None:
    if isinstance(value, dict) and value.get("type") in ("auto", "any", "tool", "none"):
        return None
    return "must be an object whose type is auto, any, tool or none"


def _with_schema(name: str) -> Check:
    """Return a check for an object whose member `name` may contain a JSON schema."""

    def check(value: object, _policy: Policy) -> str | None:
        if not isinstance(value, dict) or not isinstance(value.get(name) or {}, dict):
            return f"must be an object, and its {name} too"
        return checks.schema(value)

    return check


def _small(value: object, _policy: Policy) -> str | None:
    """Check an object of a few plain values."""
    if (
        isinstance(value, dict)
        and len(value) <= _MAX_INCLUDED
        and all(v is None or isinstance(v, bool | int | float | str) for v in value.values())
    ):
        return None
    return f"must be an object of at most {_MAX_INCLUDED} plain values"


def _included(value: object, policy: Policy) -> str | None:
    """Check the parts that an answer of the Responses API may include; the engine knows their names."""
    return checks.texts(_MAX_INCLUDED, 64)(value, policy)


def _inputs(value: object, policy: Policy) -> str | None:
    """Check the inputs of embeddings: texts or token ids."""
    if isinstance(value, str) or checks.ids(value):
        return None
    if isinstance(value, list) and value and (all(isinstance(p, str) for p in value) or all(map(checks.ids, value))):
        return _bounded(value)
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        return checks.messages(value, policy)
    return "must be a string, a list of token ids, a list of either, or a list of messages"


def _texts(value: object, _policy: Policy) -> str | None:
    """Check the texts of a score or of a ranking."""
    if isinstance(value, str):
        return None
    if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
        return _bounded(value)
    return "must be a string or a list of strings"


def _bounded(value: list[Any]) -> str | None:
    if len(value) <= MAX_INPUTS:
        return None
    return f"must have at most {MAX_INPUTS} elements: send the others in another request"


_SAMPLING: dict[str, Check] = {
    "temperature": checks.number(0, 10),
    "top_p": checks.number(0, 1, above=True),
    "top_k": checks.whole_number(-1, 2**31 - 1),
    "stream": checks.boolean,
    "watermarking": checks.boolean,
    "cache_salt": checks.text(128, 1),
    "chat_template_kwargs": checks.chat_template_kwargs,
    "service_tier": checks.text(),
}
_MODEL = {"model": checks.text(checks.MAX_TEXT, 1)}
_COUNTED = {
    **_MODEL,
    "messages": _messages,
    "system": _system,
    "tools": _input_schema_tools,
    "tool_choice": _anthropic_choice,
    "thinking": _small,
    "output_config": _with_schema("format"),
    "chat_template_kwargs": checks.chat_template_kwargs,
}
_POOLING: dict[str, Check] = {
    **_MODEL,
    **_REFUSED,
    "user": checks.text(),
    "truncate_prompt_tokens": checks.whole_number(-1, checks.INT64),
    "truncation_side": checks.one_of("left", "right"),
    "padding": checks.refused("a padded prompt computes tokens that nobody needs", "do_not_pad"),
    "cache_salt": checks.text(128, 1),
    "use_activation": checks.boolean,
}
_SCORING: dict[str, Check] = {
    **_POOLING,
    "max_tokens_per_query": checks.whole_number(0, checks.INT64),
    "max_tokens_per_doc": checks.whole_number(0, checks.INT64),
    "instruction": checks.text(),
    "chat_template_kwargs": checks.chat_template_kwargs,
}
_TEMPLATE: dict[str, Check] = {
    "add_generation_prompt": checks.boolean,
    "continue_final_message": checks.boolean,
    "add_special_tokens": checks.boolean,
    "chat_template": checks.chat_template,
    "chat_template_kwargs": checks.chat_template_kwargs,
    "mm_processor_kwargs": _REFUSED["mm_processor_kwargs"],
    "media_io_kwargs": _REFUSED["media_io_kwargs"],
}

PARAMETERS: Mapping[str, Mapping[str, Check]] = {
    RESPONSES: {
        **_MODEL,
        **_SAMPLING,
        **_REFUSED,
        **_REFUSED_IN_GENERATION,
        "session_id": checks.refused("two clients may send the same value"),
        "input": _input,
        "instructions": _ANY_TEXT,
        "max_output_tokens": checks.max_tokens,
        "max_tool_calls": checks.whole_number(0, 2**31 - 1),
        "metadata": checks.accepted,
        "include": _included,
        "logit_bias": checks.logit_bias,
        "parallel_tool_calls": checks.boolean,
        "reasoning": _small,
        "include_reasoning": checks.boolean,
        "text": _with_schema("format"),
        "structured_outputs": checks.structured_outputs,
        "tools": _function_tools,
        "tool_choice": checks.tool_choice,
        "top_logprobs": checks.whole_number(0, checks.MAX_LOGPROBS),
        "min_p": checks.number(0, 1),
        "truncation": checks.one_of("auto", "disabled"),
        "user": checks.text(),
        "skip_special_tokens": checks.boolean,
        "include_stop_str_in_output": checks.boolean,
        "presence_penalty": checks.number(-2, 2),
        "frequency_penalty": checks.number(-2, 2),
        "repetition_penalty": checks.number(0, 10, above=True),
        "seed": checks.whole_number(-checks.INT64 - 1, checks.INT64),
        "stop": checks.stop,
        "stop_token_ids": checks.token_ids(checks.MAX_TOKEN_IDS),
        "ignore_eos": checks.boolean,
        "enable_response_messages": checks.boolean,
        "previous_input_messages": checks.refused("send the whole conversation as 'input'"),
        # What needs a store.
        "store": checks.off(_NOT_STORED),
        "background": checks.off(_NOT_STORED),
        "previous_response_id": checks.refused(f"{_NOT_STORED}. Send the whole conversation as 'input'"),
        "conversation": checks.refused(f"{_NOT_STORED}. Send the whole conversation as 'input'"),
        "prompt": checks.refused("vLLM has no stored prompts"),
        # OpenAI's parameters that vLLM ignores without changing an answer.
        "stream_options": checks.stream_options,
        "safety_identifier": checks.text(),
        "prompt_cache_key": checks.text(),
        "prompt_cache_retention": checks.text(),
    },
    MESSAGES: {
        **_COUNTED,
        **_SAMPLING,
        **_REFUSED_IN_GENERATION,
        "max_tokens": checks.max_tokens,
        "metadata": checks.accepted,
        "stop_sequences": checks.texts(checks.MAX_STOPS, checks.MAX_TEXT),
        "mcp_servers": checks.refused("the engine calls no tools itself"),
        "container": checks.refused("the engine calls no tools itself"),
    },
    COUNT_TOKENS: {**_COUNTED, "cache_salt": checks.text(128, 1)},
    EMBEDDINGS: {
        **_POOLING,
        **_TEMPLATE,
        "input": _inputs,
        "messages": checks.messages,
        "encoding_format": checks.one_of("float", "base64"),
        "embed_dtype": checks.one_of("float32", "float16", "bfloat16"),
        "endianness": checks.one_of("native", "big", "little"),
        "dimensions": checks.whole_number(1, 2**16),
    },
    SCORE: {
        **_SCORING,
        **dict.fromkeys(("text_1", "text_2", "queries", "documents", "items", "data_1", "data_2"), _texts),
    },
    RERANK: {
        **_SCORING,
        "query": _ANY_TEXT,
        "documents": _texts,
        "top_n": checks.whole_number(0, 2**31 - 1),
    },
    TOKENIZE: {
        **_MODEL,
        **_TEMPLATE,
        "prompt": _ANY_TEXT,
        "messages": checks.messages,
        "tools": checks.tools,
        "return_token_strs": checks.boolean,
        "cache_salt": checks.text(128, 1),
    },
    DETOKENIZE: {
        **_MODEL,
        "tokens": checks.token_ids(checks.MAX_VALUES),
        "cache_salt": checks.text(128, 1),
    },
}
"""Checks by parameter, by route."""

REQUIRED: Mapping[str, tuple[str, ...]] = {
    RESPONSES: ("input",),
    MESSAGES: ("messages",),
    COUNT_TOKENS: ("messages",),
    EMBEDDINGS: ("input", "messages"),
    SCORE: ("text_1", "queries", "data_1"),
    RERANK: ("documents",),
    TOKENIZE: ("prompt", "messages"),
    DETOKENIZE: ("tokens",),
}
"""Parameters by route, of which a request needs one."""

ENVELOPES: Mapping[str, str] = {RESPONSES: "response", MESSAGES: "message"}
"""Member of a stream's event that contains the answer with its model and usage, by route."""
NOT_COMPUTED = frozenset({COUNT_TOKENS, TOKENIZE, DETOKENIZE})
"""Routes on which the engine computes no tokens, so that an adapter needs no slot."""
