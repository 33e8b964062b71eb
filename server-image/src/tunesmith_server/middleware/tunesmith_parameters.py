"""Parameters that a request to a shared engine may set: all of vLLM's APIs for clients, with type and bounds.

This module runs inside vLLM's interpreter, so it uses the standard library only. `request_refusal` is the entry point:
it checks a parsed request body and returns the first violation, as a sentence for the client.

Tenants share an engine, so a parameter that is not in the table is refused: the engine might honour it. A parameter of
OpenAI's API that vLLM ignores is accepted if ignoring it changes no answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tunesmith_server.middleware import tunesmith_apis as apis
    from tunesmith_server.middleware import tunesmith_checks as checks
    from tunesmith_server.middleware.tunesmith_checks import Policy
else:
    import tunesmith_apis as apis
    import tunesmith_checks as checks  # beside this file, which the agent puts on the engine's PYTHONPATH

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


class RequestRefusal(NamedTuple):
    """Reason for refusing a request with 400: OpenAI's `param`, and a sentence."""

    parameter: str
    message: str
    code: str = "invalid_parameter"


@dataclass(frozen=True)
class Parameter:
    """Row of the table: the routes that accept the parameter, and a check that returns None or "must be …"."""

    routes: frozenset[str]
    check: checks.Check


_BOTH = frozenset({CHAT, COMPLETIONS})
_CHAT = frozenset({CHAT})
_COMPLETIONS = frozenset({COMPLETIONS})
_TENSORS = "it contains tensors, which the engine would unpack unchecked"
_INTERNAL = "it is for engines that exchange their caches"
_PREPROCESSING = "it changes how much work the engine does for an image"
_RENDER = "it has a meaning on other routes only"


def _rows(routes: frozenset[str], **by_name: checks.Check) -> dict[str, Parameter]:
    return {name: Parameter(routes, check) for name, check in by_name.items()}


PARAMETERS: Mapping[str, tuple[Parameter, ...]]
"""Rows by name; a name with different meanings on two routes has two."""


def _table(*groups: dict[str, Parameter]) -> dict[str, tuple[Parameter, ...]]:
    table: dict[str, tuple[Parameter, ...]] = {}
    for group in groups:
        for name, row in group.items():
            table[name] = (*table.get(name, ()), row)
    return table


PARAMETERS = _table(
    _rows(
        _BOTH,
        model=checks.text(checks.MAX_TEXT, 1),
        frequency_penalty=checks.number(-2, 2),
        presence_penalty=checks.number(-2, 2),
        repetition_penalty=checks.number(0, 10, above=True),
        length_penalty=checks.number(-10, 10),
        temperature=checks.number(0, 10),
        top_p=checks.number(0, 1, above=True),
        min_p=checks.number(0, 1),
        top_k=checks.whole_number(-1, 2**31 - 1),
        seed=checks.whole_number(-checks.INT64 - 1, checks.INT64),
        n=checks.choices,
        max_tokens=checks.max_tokens,
        min_tokens=checks.max_tokens,
        stop=checks.stop,
        stop_token_ids=checks.token_ids(checks.MAX_TOKEN_IDS),
        allowed_token_ids=checks.token_ids(checks.MAX_TOKEN_IDS),
        logprob_token_ids=checks.token_ids(checks.MAX_LOGPROB_TOKEN_IDS),
        logit_bias=checks.logit_bias,
        bad_words=checks.texts(checks.MAX_BAD_WORDS, 128),
        prompt_logprobs=checks.whole_number(0, checks.MAX_LOGPROBS),
        stream=checks.boolean,
        stream_options=checks.stream_options,
        stream_interval=checks.whole_number(1, 1000),
        user=checks.text(),
        use_beam_search=checks.boolean,
        include_stop_str_in_output=checks.boolean,
        ignore_eos=checks.boolean,
        skip_special_tokens=checks.boolean,
        spaces_between_special_tokens=checks.boolean,
        truncate_prompt_tokens=checks.whole_number(-1, checks.INT64),
        truncation_side=checks.one_of("left", "right"),
        echo=checks.boolean,
        add_special_tokens=checks.boolean,
        response_format=checks.response_format,
        structured_outputs=checks.structured_outputs,
        thinking_token_budget=checks.whole_number(-1, 2**31 - 1),
        return_tokens_as_token_ids=checks.boolean,
        return_token_ids=checks.boolean,
        return_token_offsets=checks.boolean,
        watermarking=checks.boolean,
        repetition_detection=checks.repetition_detection,
        cache_salt=checks.text(128, 1),
        priority=checks.refused("it would give one client precedence over the others", 0),
        request_id=checks.refused("two clients may send the same value"),
        session_id=checks.refused("two clients may send the same value"),
        kv_transfer_params=checks.refused(_INTERNAL),
        ec_transfer_params=checks.refused(_INTERNAL),
        vllm_xargs=checks.refused("it is for the engine's own extensions"),
        routed_experts_prompt_start=checks.refused(_RENDER, 0),
        mm_payload=checks.refused(_RENDER, "tensors"),
        return_mm_kwargs=checks.refused(_RENDER),
        # OpenAI's parameters that vLLM ignores without changing an answer.
        metadata=checks.accepted,
        safety_identifier=checks.text(),
        service_tier=checks.text(),
        store=checks.boolean,
        prompt_cache_key=checks.text(),
        prompt_cache_retention=checks.text(),
        # OpenAI's parameters that vLLM does not know and that would change the answer.
        best_of=checks.refused("vLLM has no best_of", 1),
    ),
    _rows(
        _CHAT,
        messages=checks.messages,
        logprobs=checks.boolean,
        top_logprobs=checks.whole_number(0, checks.MAX_LOGPROBS),
        max_completion_tokens=checks.max_tokens,
        tools=checks.tools,
        tool_choice=checks.tool_choice,
        parallel_tool_calls=checks.boolean,
        reasoning_effort=checks.one_of("none", "minimal", "low", "medium", "high", "xhigh", "max"),
        include_reasoning=checks.boolean,
        add_generation_prompt=checks.boolean,
        continue_final_message=checks.boolean,
        documents=checks.documents,
        chat_template=checks.chat_template,
        chat_template_kwargs=checks.chat_template_kwargs,
        return_prompt_text=checks.boolean,
        media_io_kwargs=checks.refused(_PREPROCESSING),
        mm_processor_kwargs=checks.refused(_PREPROCESSING),
        verbosity=checks.one_of("low", "medium", "high"),
        modalities=checks.refused("it answers with text only", ["text"]),
        audio=checks.refused("it answers with text only"),
        prediction=checks.refused("vLLM has no predicted outputs"),
        web_search_options=checks.refused("it has no access to a network"),
        functions=checks.refused("vLLM has 'tools' instead"),
        function_call=checks.refused("vLLM has 'tool_choice' instead"),
    ),
    _rows(
        _COMPLETIONS,
        prompt=checks.prompt,
        logprobs=checks.whole_number(0, checks.MAX_LOGPROBS),
        suffix=checks.text(),
        prompt_embeds=checks.refused(_TENSORS),
    ),
    *(_rows(frozenset({route}), **rows) for route, rows in apis.PARAMETERS.items()),
)
_REQUIRED = {CHAT: ("messages",), COMPLETIONS: ("prompt",), **apis.REQUIRED}
ROUTES = frozenset(_REQUIRED)
"""Routes to which clients may POST."""


@dataclass(frozen=True)
class EngineFault:
    """Fault of an engine version that lets one request crash the engine for all its clients.

    Attributes:
        parameter: return OpenAI's `param` of the refusal.
        applies: return True if the policy's engine has the fault and the request triggers it.
        message: sentence of the refusal.
    """

    parameter: Callable[[Mapping[str, Any]], str]
    applies: Callable[[Mapping[str, Any], Policy], bool]
    message: str


def _prompt_logprobs_parameter(body: Mapping[str, Any]) -> str:
    """Return the parameter with which a request asks for log-probabilities of its prompt."""
    return "prompt_logprobs" if body.get("prompt_logprobs") is not None else "echo"


def _requests_prompt_logprobs(body: Mapping[str, Any]) -> bool:
    if body.get("prompt_logprobs") is not None:
        return True
    # For an echoed prompt, vLLM uses a chat's top_logprobs, which is 0 unless it is set.
    return bool(body.get("echo")) and ("messages" in body or body.get("logprobs") is not None)


ENGINE_FAULTS = (
    # vLLM 0.32 on a CPU: the LoRA kernels index out of bounds when a batch's prompts need all their logits.
    EngineFault(
        _prompt_logprobs_parameter,
        lambda body, policy: policy.on_cpu and _requests_prompt_logprobs(body),
        "This pool runs on CPUs, where vLLM crashes if it computes log-probabilities of prompts while it serves "
        "adapters. Remove 'prompt_logprobs', or 'echo' of a chat or with 'logprobs'.",
    ),
)
"""Faults of engine versions and devices. A row is removed when no supported version has its fault."""


def request_refusal(route: str, body: Mapping[str, Any], policy: Policy) -> RequestRefusal | None:
    """Return the reason for refusing a request, or None.

    Args:
        route: one of ROUTES.
        body: parsed JSON object.
        policy: policy of the pool.
    """
    if not body.get("model") or not isinstance(body["model"], str):
        message = "The request names no model. Set 'model' to a name that GET /v1/models lists."
        return RequestRefusal("model", message, "missing_model")
    for name, value in body.items():
        row = next((row for row in PARAMETERS.get(name, ()) if route in row.routes), None)
        if row is None:
            message = f"'{name[:100]}' is not a parameter of {route}: remove it."
            return RequestRefusal(name[:100], message, "unknown_parameter")
        if value is None:
            continue  # the same as an absent parameter, for OpenAI's clients and for vLLM
        problem = row.check(value, policy)
        if problem is not None:
            separator = "" if problem.startswith("[") else " "
            return RequestRefusal(name, f"{name}{separator}{problem}.")
    required = _REQUIRED[route]
    if all(body.get(name) is None for name in required):
        return RequestRefusal(required[0], f"{' or '.join(required)} is missing.")
    return _combination_refusal(body, policy)


def _combination_refusal(body: Mapping[str, Any], policy: Policy) -> RequestRefusal | None:
    """Return the reason for refusing a combination of parameters that are each valid, or None."""
    count = sequences(body)
    if count > policy.max_choices:
        return RequestRefusal(
            "n",
            f"The request asks for {count} sequences (n × prompts), and this pool allows at most "
            f"{policy.max_choices} per request (requests.maxChoices).",
        )
    tools = body.get("tools") or []
    strict = any(tool.get("function", tool).get("strict") for tool in tools)
    choice = body.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") in ("none", "auto"):  # of Anthropic's API
        choice = None
    compiled = strict or choice not in (None, "none", "auto")
    if compiled and (problem := checks.schema(tools)):
        return RequestRefusal("tools", f"tools {problem} if tool_choice or strict has them compiled to a grammar.")
    if not policy.can_constrain and (constraint := _constraint(body, compiles_tools=compiled)):
        return RequestRefusal(
            constraint,
            f"This pool's engine cannot constrain answers, because the tokenizer of its base model has no decoder that "
            f"maps tokens to bytes. Remove '{constraint}', or use a pool with another base model.",
            "unsupported_by_engine",
        )
    for fault in ENGINE_FAULTS:
        if fault.applies(body, policy):
            return RequestRefusal(fault.parameter(body), fault.message, "unsupported_by_engine")
    if not policy.allow_prompt_logprobs and _requests_prompt_logprobs(body):
        return RequestRefusal(
            _prompt_logprobs_parameter(body),
            "Log-probabilities of prompts need engine memory that other clients' requests would lack. Remove "
            "'prompt_logprobs', or 'echo' of a chat or with 'logprobs', or use a pool with "
            "requests.allowPromptLogprobs.",
        )
    return None


def _constraint(body: Mapping[str, Any], *, compiles_tools: bool) -> str | None:
    """Return the parameter from which a grammar is compiled, or None."""
    formats = {
        "response_format": body.get("response_format"),
        **{name: (body.get(name) or {}).get("format") for name in ("text", "output_config")},
    }
    for name, format_ in formats.items():
        if (format_ or {}).get("type", "text") != "text":
            return name
    constraints = body.get("structured_outputs") or {}
    if any(constraints.get(name) not in (None, False) for name in checks.CONSTRAINTS):
        return "structured_outputs"
    return "tools" if compiles_tools else None


def sequences(body: Mapping[str, Any]) -> int:
    """Return the number of sequences that the engine runs at once for a request: choices or beams, times prompts."""
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else 1
    return (body.get("n") or 1) * prompts
