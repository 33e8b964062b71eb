"""Parameters that a request to a shared engine may set: all of vLLM's chat and completion API, with type and bounds.

This module runs inside vLLM's interpreter, so it uses the standard library only. `refusal` is the entry point: it
checks a parsed request body and returns the first violation, as a sentence for the client.

Tenants share an engine, so a parameter that is not in the table is refused: the engine might honour it. A parameter of
OpenAI's API that vLLM ignores is accepted if ignoring it changes no answer.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

MAX_DEPTH = 64
"""Highest nesting depth of arrays and objects in a request: vLLM's own limit for schemas."""
MAX_VALUES = 1_000_000
"""Highest number of JSON values in a request: each takes some 100 bytes once parsed."""
MAX_LOGPROBS = 20
"""Highest number of alternatives per token: vLLM's default for --max-logprobs."""
MAX_STOPS = 4
"""Highest number of stop strings, vLLM's default for VLLM_MAX_STOP_STRINGS: each is searched for after every token."""
MAX_TOKEN_IDS = 1024
"""Highest number of token ids in a list or a logit_bias: they become a row of the sampler's tensors in every step."""
MAX_LOGPROB_TOKEN_IDS = 128
MAX_BAD_WORDS = 64
MAX_TOOLS = 128
MAX_SCHEMA_BYTES = 32 * 1024
"""Largest JSON of a schema, of a structural tag or of all tools from which a grammar is compiled. Compiling it takes
the engine's API server at most 0.2 s."""
MAX_TOOLS_BYTES = 256 * 1024
"""Largest JSON of all tools from which no grammar is compiled: they are part of the prompt."""
MAX_REGEX_CHARACTERS = 512
MAX_CHOICES_BYTES = 8 * 1024
"""Largest total size of the strings in structured_outputs.choice: 120 KiB blocked the API server for 4.7 s."""
MAX_MULTIPLE = 1000
"""Highest multipleOf: its automaton has that many states; compiling 10^7 took more than four minutes."""
MAX_ALL_OF = 8
"""Highest number of entries in one allOf: they are intersected."""
_INT64 = 2**63 - 1
_MAX_MESSAGES = 4096
_MAX_TEXT = 512


class Refusal(NamedTuple):
    """Reason for refusing a request with 400: OpenAI's `param`, and a sentence."""

    parameter: str
    message: str
    code: str = "invalid_parameter"


@dataclass(frozen=True)
class Policy:
    """The pool's `spec.requests`, and the engine's version and device.

    Attributes:
        allow_prompt_logprobs: accept `prompt_logprobs`, and `echo` with `logprobs`.
        allow_media_urls: let the engine fetch media from http:// and https:// URLs.
        allow_chat_template: accept the client's chat templates, and any arguments for the model's template.
        max_tokens: highest number of tokens of one choice; None: the model's length.
        max_choices: highest number of sequences of one request: choices or beams, times prompts.
        engine_version: vLLM's version, such as "0.32.0+cpu".
    """

    allow_prompt_logprobs: bool = False
    allow_media_urls: bool = False
    allow_chat_template: bool = False
    max_tokens: int | None = None
    max_choices: int = 16
    engine_version: str = ""

    @classmethod
    def parse(cls, text: str, engine_version: str) -> Policy:
        """Return the policy in a JSON object with the fields of `spec.requests`.

        Raises:
            ValueError: the text is not such an object.
        """
        document = json.loads(text)
        if not isinstance(document, dict):
            raise ValueError("it is not a JSON object")  # noqa: TRY004 - one kind of error for the caller
        names = {_camel(field.name): field.name for field in fields(cls) if field.name != "engine_version"}
        unknown = sorted(set(document) - set(names))
        if unknown:
            raise ValueError(f"it has the unknown fields {', '.join(unknown)}")
        values = {names[key]: value for key, value in document.items() if value is not None}
        for name, value in values.items():
            number = name.startswith("max_")
            if (type(value) is not int or value < 1) if number else type(value) is not bool:
                raise ValueError(f"{_camel(name)} must be {'a positive number' if number else 'true or false'}")
        return cls(**values, engine_version=engine_version)

    @property
    def on_cpu(self) -> bool:
        """True if this is vLLM's CPU build."""
        return "cpu" in self.engine_version


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.title() for word in rest)


Check = "Callable[[object, Policy], str | None]"


@dataclass(frozen=True)
class Parameter:
    """Row of the table: the routes that accept the parameter, and a check that returns None or "must be …"."""

    routes: frozenset[str]
    check: Callable[[object, Policy], str | None]


# --- checks of one value ---


def _boolean(value: object, _policy: Policy) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _whole(low: int, high: int) -> Callable[[object, Policy], str | None]:
    def check(value: object, _policy: Policy) -> str | None:
        if type(value) is int and low <= value <= high:
            return None
        return f"must be a whole number from {low} to {high}"

    return check


def _number(low: float, high: float, *, above: bool = False) -> Callable[[object, Policy], str | None]:
    def check(value: object, _policy: Policy) -> str | None:
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            return f"must be above {low:g}" if above and value == low else None
        return f"must be a number {'above' if above else 'from'} {low:g} {'up ' if above else ''}to {high:g}"

    return check


def _text(longest: int = _MAX_TEXT, shortest: int = 0) -> Callable[[object, Policy], str | None]:
    def check(value: object, _policy: Policy) -> str | None:
        if isinstance(value, str) and shortest <= len(value) <= longest:
            return None
        return f"must be a string of at most {longest} characters"

    return check


def _one_of(*values: str) -> Callable[[object, Policy], str | None]:
    def check(value: object, _policy: Policy) -> str | None:
        return None if isinstance(value, str) and value in values else f"must be one of {', '.join(values)}"

    return check


def _token_ids(most: int) -> Callable[[object, Policy], str | None]:
    def check(value: object, _policy: Policy) -> str | None:
        if isinstance(value, list) and len(value) <= most and all(type(i) is int and 0 <= i < 2**31 for i in value):
            return None
        return f"must be a list of at most {most} token ids"

    return check


def _texts(most: int, longest: int) -> Callable[[object, Policy], str | None]:
    def check(value: object, _policy: Policy) -> str | None:
        if (
            isinstance(value, list)
            and len(value) <= most
            and all(isinstance(t, str) and len(t) <= longest for t in value)
        ):
            return None
        return f"must be a list of at most {most} strings of at most {longest} characters"

    return check


def _refused(reason: str, *harmless: object) -> Callable[[object, Policy], str | None]:
    """Return the check of a parameter that a shared engine accepts only with a harmless value."""

    def check(value: object, _policy: Policy) -> str | None:
        if any(value == other and type(value) is type(other) for other in harmless):
            return None
        return f"is not served by a shared engine: {reason}; remove it"

    return check


def _accepted(_value: object, _policy: Policy) -> str | None:
    return None


def _max_tokens(value: object, policy: Policy) -> str | None:
    most = _INT64 if policy.max_tokens is None else policy.max_tokens
    if type(value) is int and 0 <= value <= most:
        return None
    if type(value) is int and value > most:
        return f"must be at most {most}, the limit of this pool (requests.maxTokens)"
    return "must be a whole number from 0"


def _choices(value: object, policy: Policy) -> str | None:
    if type(value) is int and 1 <= value <= policy.max_choices:
        return None
    return f"must be a whole number from 1 to {policy.max_choices}, the limit of this pool (requests.maxChoices)"


def _stop(value: object, policy: Policy) -> str | None:
    if isinstance(value, str) and len(value) <= _MAX_TEXT:
        return None
    return _texts(MAX_STOPS, _MAX_TEXT)(value, policy) and (
        f"must be a string, or a list of at most {MAX_STOPS} strings, of at most {_MAX_TEXT} characters"
    )


def _logit_bias(value: object, policy: Policy) -> str | None:
    bias = _number(-100, 100)
    if (
        isinstance(value, dict)
        and len(value) <= MAX_TOKEN_IDS
        and all(re.fullmatch("[0-9]{1,10}", key) and bias(number, policy) is None for key, number in value.items())
    ):
        return None
    return f"must map at most {MAX_TOKEN_IDS} token ids to numbers from -100 to 100"


def _stream_options(value: object, _policy: Policy) -> str | None:
    known = {"include_usage", "continuous_usage_stats", "include_obfuscation"}
    if (
        isinstance(value, dict)
        and set(value) <= known
        and all(v is None or isinstance(v, bool) for v in value.values())
    ):
        return None
    return "must be an object with include_usage and continuous_usage_stats, each true or false"


def _repetition_detection(value: object, _policy: Policy) -> str | None:
    known = {"max_pattern_size", "min_pattern_size", "min_count"}
    if (
        isinstance(value, dict)
        and set(value) <= known
        and all(type(v) is int and 0 <= v <= MAX_TOKEN_IDS for v in value.values())
    ):
        return None
    return f"must be an object with {', '.join(sorted(known))}, whole numbers from 0 to {MAX_TOKEN_IDS}"


def _documents(value: object, _policy: Policy) -> str | None:
    if isinstance(value, list) and all(
        isinstance(entry, dict) and all(isinstance(v, str) for v in entry.values()) for entry in value
    ):
        return None
    return "must be a list of objects with strings"


def _chat_template(_value: object, policy: Policy) -> str | None:
    if policy.allow_chat_template:
        return None
    return (
        "is refused: a template is a program that the engine would run for all its clients. Use the model's own "
        "template, or a pool with requests.allowChatTemplate"
    )


def _chat_template_kwargs(value: object, policy: Policy) -> str | None:
    if not isinstance(value, dict):
        return "must be an object"
    if policy.allow_chat_template:
        return None
    plain = all(
        isinstance(v, bool | int | float) or v is None or (isinstance(v, str) and len(v) <= _MAX_TEXT)
        for v in value.values()
    )
    own = {"chat_template", "tokenize", "conversation", "messages", "tools", "documents", "tokenizer", "padding"}
    if plain and len(value) <= 16 and not own & set(value):  # noqa: PLR2004 - switches such as enable_thinking
        return None
    return (
        "must be an object of at most 16 switches (true, false, a number or a short string) of the model's template; "
        "others need a pool with requests.allowChatTemplate"
    )


_MEDIA = frozenset({"image_url", "audio_url", "video_url", "input_image"})
_UNSAFE_PARTS = {
    **dict.fromkeys(
        ("image_embeds", "audio_embeds", "video_embeds", "prompt_embeds", "image_pil"),
        "holds tensors of the client, which the engine would unpack unchecked",
    ),
    "uuid": "names an entry of the engine's cache, which may be another client's",
}


def _messages(value: object, policy: Policy) -> str | None:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return "must be a list of messages, which are objects"
    if not value:
        return "must have at least one message"
    if len(value) > _MAX_MESSAGES:
        return f"must have at most {_MAX_MESSAGES} messages"
    for place, message in enumerate(value):
        content = message.get("content")
        parts = content if isinstance(content, list) else [content]
        for part in parts:
            wrong = _part(part, policy) if isinstance(part, dict) else None
            if wrong is None and not (part is None or isinstance(part, str | dict)):
                wrong = "must be a string or a list of parts, which are strings or objects"
            if wrong is not None:
                return f"[{place}].content {wrong}"
    return None


def _part(part: dict[str, Any], policy: Policy) -> str | None:
    for name, reason in _UNSAFE_PARTS.items():
        if name in part or part.get("type") == name:
            return f"must not have '{name}': it {reason}"
    for name in _MEDIA & set(part):
        media = part[name]
        url = media.get("url") if isinstance(media, dict) else media
        if url is None:
            continue
        scheme = url[:8].lower() if isinstance(url, str) else ""
        if scheme.startswith("data:") or (policy.allow_media_urls and scheme.startswith(("http://", "https://"))):
            continue
        return (
            f"has '{name}' with a URL that is not a data: URL: this engine fetches nothing for clients. Send the "
            "content as data:<type>;base64,…, or use a pool with requests.allowMediaUrls"
            if not policy.allow_media_urls
            else f"has '{name}' with a URL that is neither a data: nor an http(s):// URL"
        )
    return None


def _prompt(value: object, policy: Policy) -> str | None:
    if isinstance(value, str) or _ids(value):
        return None
    if isinstance(value, list) and value and (all(isinstance(p, str) for p in value) or all(_ids(p) for p in value)):
        if len(value) <= policy.max_choices:
            return None
        return f"must have at most {policy.max_choices} prompts, the limit of this pool (requests.maxChoices)"
    return "must be a string, a list of token ids, or a list of one of them"


def _ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int and 0 <= i < 2**31 for i in value)


def _tools(value: object, _policy: Policy) -> str | None:
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        return f"must be a list of at most {MAX_TOOLS} tools"
    for place, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            return f"[{place}] must be an object with a function"
    return _schema(value, MAX_TOOLS_BYTES)


def _tool_choice(value: object, _policy: Policy) -> str | None:
    if value in ("none", "auto", "required") or isinstance(value, dict):
        return None
    return "must be none, auto, required, or an object that names a function"


def _response_format(value: object, _policy: Policy) -> str | None:
    if not isinstance(value, dict) or value.get("type") not in ("text", "json_object", "json_schema", "structural_tag"):
        return "must be an object whose type is text, json_object, json_schema or structural_tag"
    return _schema(value)


_CONSTRAINTS = frozenset({"json", "regex", "choice", "json_object", "structural_tag"})
_SWITCHES = frozenset({"disable_any_whitespace", "disable_additional_properties", "json_object"})


def _structured_outputs(value: object, _policy: Policy) -> str | None:
    if not isinstance(value, dict):
        return "must be an object"
    if value.get("grammar") is not None:
        return (
            "must not have a 'grammar': one of 10 KiB keeps the engine from all its clients for minutes; use json, "
            "regex or choice"
        )
    unknown = sorted(set(value) - _CONSTRAINTS - _SWITCHES - {"grammar", "whitespace_pattern"})
    if unknown:
        return f"must not have {', '.join(unknown)[:100]!r}: known are {', '.join(sorted(_CONSTRAINTS))}"
    if any(value.get(name) is not None and not isinstance(value[name], bool) for name in _SWITCHES):
        return f"must have true or false for {', '.join(sorted(_SWITCHES))}"
    for name in ("regex", "whitespace_pattern"):
        if value.get(name) is not None and (wrong := _regex(value[name])):
            return f"has a {name} that {wrong}"
    return _choice(value.get("choice")) or _embedded("json", value) or _embedded("structural_tag", value)


def _choice(choice: object) -> str | None:
    if choice is None:
        return None
    if not isinstance(choice, list) or not choice or not all(isinstance(text, str) for text in choice):
        return "must have a list of strings as its choice"
    if sum(map(len, choice)) + len(choice) > MAX_CHOICES_BYTES:
        return f"must have at most {MAX_CHOICES_BYTES} characters in all strings of its choice"
    return None


def _embedded(name: str, value: Mapping[str, object]) -> str | None:
    """Check a schema that is an object or the JSON of one."""
    document = value.get(name)
    if isinstance(document, str):
        try:
            document = json.loads(document)
        except (ValueError, RecursionError):
            return f"has a {name} that is not JSON"
    if document is not None and not isinstance(document, dict):
        return f"has a {name} that is not an object"
    return None if document is None else _schema(document)


def _regex(pattern: object) -> str | None:
    if not isinstance(pattern, str) or len(pattern) > MAX_REGEX_CHARACTERS:
        return f"must be a string of at most {MAX_REGEX_CHARACTERS} characters"
    return None


def _schema(document: object, most: int = MAX_SCHEMA_BYTES) -> str | None:
    """Bound the input of the grammar compiler: size, depth, patterns, and keywords that make automata large."""
    if too_deep(document):
        return f"must not nest deeper than {MAX_DEPTH} levels"
    if len(json.dumps(document)) > most:
        return f"must have at most {most} bytes"
    return next(filter(None, map(_subschema, _objects(document))), None)


def _subschema(entry: Mapping[str, object]) -> str | None:
    if "grammar" in entry and entry.get("type") == "grammar":
        return "must not have a grammar: use a JSON schema"
    for name in ("pattern", "regex"):
        if isinstance(entry.get(name), str) and (wrong := _regex(entry[name])):
            return f"has a {name} that {wrong}"
    multiple = entry.get("multipleOf")
    if isinstance(multiple, int | float) and not 0 < multiple <= MAX_MULTIPLE:
        return f"has a multipleOf that is not above 0 and at most {MAX_MULTIPLE}"
    all_of = entry.get("allOf")
    if isinstance(all_of, list):
        if len(all_of) > MAX_ALL_OF:
            return f"has an allOf of more than {MAX_ALL_OF} entries"
        if sum("pattern" in part for part in _objects(all_of)) > 1:
            return "has an allOf that combines patterns: write one pattern"
    properties = entry.get("patternProperties")
    if isinstance(properties, dict) and (len(properties) > MAX_ALL_OF or any(map(_regex, properties))):
        return f"has patternProperties of more than {MAX_ALL_OF} short patterns"
    return None


def _objects(document: object) -> Iterator[dict[str, Any]]:
    pending = [document]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            yield value
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


def too_deep(document: object, limit: int = MAX_DEPTH) -> bool:
    """Return True if arrays and objects nest deeper than the limit."""
    level = [document]
    for _ in range(limit + 1):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


# --- the table ---

_BOTH = frozenset({CHAT, COMPLETIONS})
_CHAT = frozenset({CHAT})
_COMPLETIONS = frozenset({COMPLETIONS})
_TENSORS = "it hands the engine data that it would unpack unchecked"
_INTERNAL = "it is for engines that exchange their caches"
_PREPROCESSING = "it changes how much work the engine does for an image"
_RENDER = "it has a meaning on other routes only"


def _rows(routes: frozenset[str], **checks: Callable[[object, Policy], str | None]) -> dict[str, Parameter]:
    return {name: Parameter(routes, check) for name, check in checks.items()}


PARAMETERS: Mapping[str, tuple[Parameter, ...]]
"""The rows by name; a name with different meanings on the two routes has two."""


def _table(*groups: dict[str, Parameter]) -> dict[str, tuple[Parameter, ...]]:
    table: dict[str, tuple[Parameter, ...]] = {}
    for group in groups:
        for name, row in group.items():
            table[name] = (*table.get(name, ()), row)
    return table


PARAMETERS = _table(
    _rows(
        _BOTH,
        model=_text(_MAX_TEXT, 1),
        frequency_penalty=_number(-2, 2),
        presence_penalty=_number(-2, 2),
        repetition_penalty=_number(0, 10, above=True),
        length_penalty=_number(-10, 10),
        temperature=_number(0, 10),
        top_p=_number(0, 1, above=True),
        min_p=_number(0, 1),
        top_k=_whole(-1, 2**31 - 1),
        seed=_whole(-_INT64 - 1, _INT64),
        n=_choices,
        max_tokens=_max_tokens,
        min_tokens=_max_tokens,
        stop=_stop,
        stop_token_ids=_token_ids(MAX_TOKEN_IDS),
        allowed_token_ids=_token_ids(MAX_TOKEN_IDS),
        logprob_token_ids=_token_ids(MAX_LOGPROB_TOKEN_IDS),
        logit_bias=_logit_bias,
        bad_words=_texts(MAX_BAD_WORDS, 128),
        prompt_logprobs=_whole(0, MAX_LOGPROBS),
        stream=_boolean,
        stream_options=_stream_options,
        stream_interval=_whole(1, 1000),
        user=_text(),
        use_beam_search=_boolean,
        include_stop_str_in_output=_boolean,
        ignore_eos=_boolean,
        skip_special_tokens=_boolean,
        spaces_between_special_tokens=_boolean,
        truncate_prompt_tokens=_whole(-1, _INT64),
        truncation_side=_one_of("left", "right"),
        echo=_boolean,
        add_special_tokens=_boolean,
        response_format=_response_format,
        structured_outputs=_structured_outputs,
        thinking_token_budget=_whole(-1, 2**31 - 1),
        return_tokens_as_token_ids=_boolean,
        return_token_ids=_boolean,
        return_token_offsets=_boolean,
        watermarking=_boolean,
        repetition_detection=_repetition_detection,
        cache_salt=_text(128, 1),
        priority=_refused("it puts one client before the others", 0),
        request_id=_refused("two clients may send the same one"),
        session_id=_refused("two clients may send the same one"),
        kv_transfer_params=_refused(_INTERNAL),
        ec_transfer_params=_refused(_INTERNAL),
        vllm_xargs=_refused("it is for the engine's own extensions"),
        routed_experts_prompt_start=_refused(_RENDER, 0),
        mm_payload=_refused(_RENDER, "tensors"),
        return_mm_kwargs=_refused(_RENDER),
        # OpenAI's parameters that vLLM ignores without changing an answer.
        metadata=_accepted,
        safety_identifier=_text(),
        service_tier=_text(),
        store=_boolean,
        prompt_cache_key=_text(),
        prompt_cache_retention=_text(),
        # OpenAI's parameters that vLLM does not know and that would change the answer.
        best_of=_refused("vLLM has no best_of", 1),
    ),
    _rows(
        _CHAT,
        messages=_messages,
        logprobs=_boolean,
        top_logprobs=_whole(0, MAX_LOGPROBS),
        max_completion_tokens=_max_tokens,
        tools=_tools,
        tool_choice=_tool_choice,
        parallel_tool_calls=_boolean,
        reasoning_effort=_one_of("none", "minimal", "low", "medium", "high", "xhigh", "max"),
        include_reasoning=_boolean,
        add_generation_prompt=_boolean,
        continue_final_message=_boolean,
        documents=_documents,
        chat_template=_chat_template,
        chat_template_kwargs=_chat_template_kwargs,
        return_prompt_text=_boolean,
        media_io_kwargs=_refused(_PREPROCESSING),
        mm_processor_kwargs=_refused(_PREPROCESSING),
        verbosity=_one_of("low", "medium", "high"),
        modalities=_refused("it answers with text only", ["text"]),
        audio=_refused("it answers with text only"),
        prediction=_refused("vLLM has no predicted outputs"),
        web_search_options=_refused("it reaches no network"),
        functions=_refused("vLLM has 'tools' instead"),
        function_call=_refused("vLLM has 'tool_choice' instead"),
    ),
    _rows(
        _COMPLETIONS,
        prompt=_prompt,
        logprobs=_whole(0, MAX_LOGPROBS),
        suffix=_text(),
        prompt_embeds=_refused(_TENSORS),
    ),
)
_NEEDED = {CHAT: "messages", COMPLETIONS: "prompt"}


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
    """Return the parameter of a request that asks for log-probabilities of its prompt."""
    return "prompt_logprobs" if body.get("prompt_logprobs") is not None else "echo"


def _asks_prompt_logprobs(body: Mapping[str, Any]) -> bool:
    if body.get("prompt_logprobs") is not None:
        return True
    # vLLM takes a chat's top_logprobs, 0 unless it is set, for those of an echoed prompt.
    return bool(body.get("echo")) and ("messages" in body or body.get("logprobs") is not None)


ENGINE_FAULTS = (
    # vLLM 0.32 on a CPU: the LoRA kernels index out of bounds when a batch's prompts need all their logits.
    EngineFault(
        _prompt_logprobs_parameter,
        lambda body, policy: policy.on_cpu and _asks_prompt_logprobs(body),
        "This pool runs on CPUs, where vLLM fails when it computes log-probabilities of prompts beside adapters. "
        "Remove 'prompt_logprobs', or 'echo' of a chat or with 'logprobs'.",
    ),
)
"""Faults of engine versions and devices. A row is removed when no supported version has its fault."""


def refusal(route: str, body: Mapping[str, Any], policy: Policy) -> Refusal | None:
    """Return the reason for refusing a request, or None.

    Args:
        route: CHAT or COMPLETIONS.
        body: parsed JSON object.
        policy: policy of the pool.
    """
    for name, value in body.items():
        row = next((row for row in PARAMETERS.get(name, ()) if route in row.routes), None)
        if row is None:
            return Refusal(name[:100], f"'{name[:100]}' is not a parameter of {route}: remove it.", "unknown_parameter")
        if value is None:
            continue  # the same as an absent parameter, for OpenAI's clients and for vLLM
        wrong = row.check(value, policy)
        if wrong is not None:
            separator = "" if wrong.startswith("[") else " "
            return Refusal(name, f"{name}{separator}{wrong}.")
    if body.get(_NEEDED[route]) is None:
        return Refusal(_NEEDED[route], f"{_NEEDED[route]} is missing.")
    return _together(body, policy)


def _together(body: Mapping[str, Any], policy: Policy) -> Refusal | None:
    """Check the parameters in combination."""
    count = sequences(body)
    if count > policy.max_choices:
        return Refusal(
            "n",
            f"The request asks for {count} sequences (n × prompts), and this pool answers at most "
            f"{policy.max_choices} a request (requests.maxChoices).",
        )
    tools = body.get("tools") or []
    strict = any(tool["function"].get("strict") for tool in tools)
    compiled = strict or body.get("tool_choice") not in (None, "none", "auto")
    if compiled and (wrong := _schema(tools)):
        return Refusal("tools", f"tools {wrong} where tool_choice or strict makes a grammar of them.")
    for fault in ENGINE_FAULTS:
        if fault.applies(body, policy):
            return Refusal(fault.parameter(body), fault.message, "unsupported_by_engine")
    if not policy.allow_prompt_logprobs and _asks_prompt_logprobs(body):
        return Refusal(
            _prompt_logprobs_parameter(body),
            "Log-probabilities of prompts take the engine's memory from its other clients: remove 'prompt_logprobs', "
            "or 'echo' of a chat or with 'logprobs', or use a pool with requests.allowPromptLogprobs.",
        )
    return None


def sequences(body: Mapping[str, Any]) -> int:
    """Return the number of sequences that the engine runs at once for a request: choices or beams, times prompts."""
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else 1
    return (body.get("n") or 1) * prompts
