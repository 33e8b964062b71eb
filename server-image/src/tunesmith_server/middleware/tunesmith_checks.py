"""Checks of the values of request parameters, for the table in tunesmith_parameters.

This module runs inside vLLM's interpreter, so it uses the standard library only. A check returns None, or the rest of a
sentence that begins with the parameter's name: "must be …".
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Check = Callable[[object, "Policy"], str | None]

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
"""Highest number of entries in an allOf: the grammar compiler intersects them."""
INT64 = 2**63 - 1
MAX_MESSAGES = 4096
MAX_TEXT = 512


_OF_ENGINE = frozenset({"engine_version", "can_constrain"})


@dataclass(frozen=True)
class Policy:
    """The pool's `spec.requests`, and what the engine is and can do.

    Attributes:
        allow_prompt_logprobs: accept `prompt_logprobs`, and `echo` with `logprobs`.
        allow_media_urls: let the engine fetch media from http:// and https:// URLs.
        allow_chat_template: accept the client's chat templates, and any arguments for the model's template.
        max_tokens: highest number of tokens of one choice; None: the model's length.
        max_choices: highest number of sequences of one request: choices or beams, times prompts.
        engine_version: vLLM's version, such as "0.32.0+cpu".
        can_constrain: True if the engine can constrain answers to a grammar with the base model's tokenizer.
    """

    allow_prompt_logprobs: bool = False
    allow_media_urls: bool = False
    allow_chat_template: bool = False
    max_tokens: int | None = None
    max_choices: int = 16
    engine_version: str = ""
    can_constrain: bool = True

    @classmethod
    def parse(cls, text: str, engine_version: str) -> Policy:
        """Return the policy in a JSON object with the fields of `spec.requests`.

        Raises:
            ValueError: the text is not such an object.
        """
        document = json.loads(text)
        if not isinstance(document, dict):
            raise ValueError("it is not a JSON object")  # noqa: TRY004 - one kind of error for the caller
        names = {_camel(field.name): field.name for field in fields(cls) if field.name not in _OF_ENGINE}
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


def boolean(value: object, _policy: Policy) -> str | None:
    """Check a boolean."""
    return None if isinstance(value, bool) else "must be true or false"


def whole_number(low: int, high: int) -> Check:
    """Return a check for whole numbers from `low` to `high`."""

    def check(value: object, _policy: Policy) -> str | None:
        if type(value) is int and low <= value <= high:
            return None
        return f"must be a whole number from {low} to {high}"

    return check


def number(low: float, high: float, *, above: bool = False) -> Check:
    """Return a check for numbers from `low`, or above it, to `high`."""

    def check(value: object, _policy: Policy) -> str | None:
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            return f"must be above {low:g}" if above and value == low else None
        return f"must be a number {'above' if above else 'from'} {low:g} {'up ' if above else ''}to {high:g}"

    return check


def text(max_length: int = MAX_TEXT, min_length: int = 0) -> Check:
    """Return a check for strings of `min_length` to `max_length` characters."""

    def check(value: object, _policy: Policy) -> str | None:
        if isinstance(value, str) and min_length <= len(value) <= max_length:
            return None
        return f"must be a string of at most {max_length} characters"

    return check


def one_of(*values: str) -> Check:
    """Return a check for strings of a list."""

    def check(value: object, _policy: Policy) -> str | None:
        return None if isinstance(value, str) and value in values else f"must be one of {', '.join(values)}"

    return check


def token_ids(maximum: int) -> Check:
    """Return a check for lists of at most `maximum` token ids."""

    def check(value: object, _policy: Policy) -> str | None:
        if isinstance(value, list) and len(value) <= maximum and all(type(i) is int and 0 <= i < 2**31 for i in value):
            return None
        return f"must be a list of at most {maximum} token ids"

    return check


def texts(maximum: int, max_length: int) -> Check:
    """Return a check for lists of at most `maximum` strings."""

    def check(value: object, _policy: Policy) -> str | None:
        if (
            isinstance(value, list)
            and len(value) <= maximum
            and all(isinstance(t, str) and len(t) <= max_length for t in value)
        ):
            return None
        return f"must be a list of at most {maximum} strings of at most {max_length} characters"

    return check


def refused(reason: str, *harmless: object) -> Check:
    """Return the check of a parameter that a shared engine accepts only with a harmless value."""

    def check(value: object, _policy: Policy) -> str | None:
        if any(value == other and type(value) is type(other) for other in harmless):
            return None
        return f"is not served by a shared engine: {reason}; remove it"

    return check


def off(reason: str) -> Check:
    """Return the check of a switch that a shared engine does not have."""

    def check(value: object, _policy: Policy) -> str | None:
        return None if value is False else f"must be false: {reason}"

    return check


def accepted(_value: object, _policy: Policy) -> str | None:
    """Accept any value."""
    return None


def max_tokens(value: object, policy: Policy) -> str | None:
    """Check a number of tokens against the pool's limit."""
    maximum = INT64 if policy.max_tokens is None else policy.max_tokens
    if type(value) is int and 0 <= value <= maximum:
        return None
    if type(value) is int and value > maximum:
        return f"must be at most {maximum}, the limit of this pool (requests.maxTokens)"
    return "must be a whole number from 0"


def choices(value: object, policy: Policy) -> str | None:
    """Check a number of choices against the pool's limit."""
    if type(value) is int and 1 <= value <= policy.max_choices:
        return None
    return f"must be a whole number from 1 to {policy.max_choices}, the limit of this pool (requests.maxChoices)"


def stop(value: object, policy: Policy) -> str | None:
    """Check stop strings."""
    if isinstance(value, str) and len(value) <= MAX_TEXT:
        return None
    return texts(MAX_STOPS, MAX_TEXT)(value, policy) and (
        f"must be a string, or a list of at most {MAX_STOPS} strings, of at most {MAX_TEXT} characters"
    )


def logit_bias(value: object, policy: Policy) -> str | None:
    """Check biases by token id."""
    bias = number(-100, 100)
    if (
        isinstance(value, dict)
        and len(value) <= MAX_TOKEN_IDS
        and all(re.fullmatch("[0-9]{1,10}", key) and bias(number, policy) is None for key, number in value.items())
    ):
        return None
    return f"must map at most {MAX_TOKEN_IDS} token ids to numbers from -100 to 100"


def stream_options(value: object, _policy: Policy) -> str | None:
    """Check `stream_options`."""
    known = {"include_usage", "continuous_usage_stats", "include_obfuscation"}
    if (
        isinstance(value, dict)
        and set(value) <= known
        and all(v is None or isinstance(v, bool) for v in value.values())
    ):
        return None
    return "must be an object with include_usage and continuous_usage_stats, each true or false"


def repetition_detection(value: object, _policy: Policy) -> str | None:
    """Check `repetition_detection`."""
    known = {"max_pattern_size", "min_pattern_size", "min_count"}
    if (
        isinstance(value, dict)
        and set(value) <= known
        and all(type(v) is int and 0 <= v <= MAX_TOKEN_IDS for v in value.values())
    ):
        return None
    return f"must be an object with {', '.join(sorted(known))}, whole numbers from 0 to {MAX_TOKEN_IDS}"


def documents(value: object, _policy: Policy) -> str | None:
    """Check documents for retrieval-augmented generation."""
    if isinstance(value, list) and all(
        isinstance(entry, dict) and all(isinstance(v, str) for v in entry.values()) for entry in value
    ):
        return None
    return "must be a list of objects with strings"


def chat_template(_value: object, policy: Policy) -> str | None:
    """Check that the pool accepts chat templates of clients."""
    if policy.allow_chat_template:
        return None
    return (
        "is refused: a template is a program, which would run in an engine that other clients use too. Use the "
        "model's own template, or a pool with requests.allowChatTemplate"
    )


def chat_template_kwargs(value: object, policy: Policy) -> str | None:
    """Check arguments of the model's chat template."""
    if not isinstance(value, dict):
        return "must be an object"
    if policy.allow_chat_template:
        return None
    plain = all(
        isinstance(v, bool | int | float) or v is None or (isinstance(v, str) and len(v) <= MAX_TEXT)
        for v in value.values()
    )
    reserved = {"chat_template", "tokenize", "conversation", "messages", "tools", "documents", "tokenizer", "padding"}
    if plain and len(value) <= 16 and not reserved & set(value):  # noqa: PLR2004 - switches such as enable_thinking
        return None
    return (
        "must be an object of at most 16 switches (true, false, a number or a short string) of the model's template; "
        "others need a pool with requests.allowChatTemplate"
    )


_MEDIA = frozenset({"image_url", "audio_url", "video_url", "input_image"})
_UNSAFE_PARTS = {
    **dict.fromkeys(
        ("image_embeds", "audio_embeds", "video_embeds", "prompt_embeds", "image_pil"),
        "contains tensors, which the engine would unpack unchecked",
    ),
    "uuid": "names an entry of the engine's cache, which may be another client's",
}


def messages(value: object, policy: Policy) -> str | None:
    """Check the messages of a chat: their number and their parts."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return "must be a list of messages, which are objects"
    if not value:
        return "must have at least one message"
    if len(value) > MAX_MESSAGES:
        return f"must have at most {MAX_MESSAGES} messages"
    for index, message in enumerate(value):
        problem = parts(message.get("content"), policy)
        if problem is not None:
            return f"[{index}].content {problem}"
    return None


def parts(content: object, policy: Policy) -> str | None:
    """Check the content of a message: a text, or a list of parts."""
    for part in content if isinstance(content, list) else [content]:
        problem = _part(part, policy) if isinstance(part, dict) else None
        if problem is None and not (part is None or isinstance(part, str | dict)):
            problem = "must be a string or a list of parts, which are strings or objects"
        if problem is not None:
            return problem
    return None


def _part(part: dict[str, Any], policy: Policy) -> str | None:
    for name, reason in _UNSAFE_PARTS.items():
        if name in part or part.get("type") == name:
            return f"must not have '{name}': it {reason}"
    # Anthropic's images have a `source`, of which only the type `url` is fetched.
    source = part.get("source")
    media_by_name = {name: part[name] for name in _MEDIA & set(part)}
    if isinstance(source, dict) and source.get("type") == "url":
        media_by_name["source"] = source
    for name, media in media_by_name.items():
        url = media.get("url") if isinstance(media, dict) else media
        if url is None:
            continue
        scheme = url[:8].lower() if isinstance(url, str) else ""
        if scheme.startswith("data:") or (policy.allow_media_urls and scheme.startswith(("http://", "https://"))):
            continue
        return (
            f"has '{name}' with a URL that is not a data: URL: this engine does not fetch URLs for clients. Send the "
            "content as data:<type>;base64,…, or use a pool with requests.allowMediaUrls"
            if not policy.allow_media_urls
            else f"has '{name}' with a URL that is neither a data: nor an http(s):// URL"
        )
    return None


def prompt(value: object, policy: Policy) -> str | None:
    """Check the prompts of a completion: strings or token ids."""
    if isinstance(value, str) or ids(value):
        return None
    if isinstance(value, list) and value and (all(isinstance(p, str) for p in value) or all(ids(p) for p in value)):
        if len(value) <= policy.max_choices:
            return None
        return f"must have at most {policy.max_choices} prompts, the limit of this pool (requests.maxChoices)"
    return "must be a string, a list of token ids, or a list of either"


def ids(value: object) -> bool:
    """Return True for a list of token ids that is not empty."""
    return isinstance(value, list) and bool(value) and all(type(i) is int and 0 <= i < 2**31 for i in value)


def tools(value: object, _policy: Policy) -> str | None:
    """Check the tools of a chat."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        return f"must be a list of at most {MAX_TOOLS} tools"
    for index, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            return f"[{index}] must be an object with a function"
    return schema(value, MAX_TOOLS_BYTES)


def tool_choice(value: object, _policy: Policy) -> str | None:
    """Check `tool_choice`."""
    if value in ("none", "auto", "required") or isinstance(value, dict):
        return None
    return "must be none, auto, required, or an object that names a function"


def response_format(value: object, _policy: Policy) -> str | None:
    """Check `response_format`."""
    if not isinstance(value, dict) or value.get("type") not in ("text", "json_object", "json_schema", "structural_tag"):
        return "must be an object whose type is text, json_object, json_schema or structural_tag"
    return schema(value)


CONSTRAINTS = frozenset({"json", "regex", "choice", "json_object", "structural_tag"})
"""Members of structured_outputs from which a grammar is compiled."""
_SWITCHES = frozenset({"disable_any_whitespace", "disable_additional_properties", "json_object"})


def structured_outputs(value: object, _policy: Policy) -> str | None:
    """Check the constraints from which vLLM compiles a grammar."""
    if not isinstance(value, dict):
        return "must be an object"
    if value.get("grammar") is not None:
        return (
            "must not have a 'grammar': compiling one of 10 KiB blocks the engine for minutes; use json, regex or "
            "choice"
        )
    unknown = sorted(set(value) - CONSTRAINTS - _SWITCHES - {"grammar", "whitespace_pattern"})
    if unknown:
        return f"must not have {', '.join(unknown)[:100]!r}: known are {', '.join(sorted(CONSTRAINTS))}"
    if any(value.get(name) is not None and not isinstance(value[name], bool) for name in _SWITCHES):
        return f"must have true or false for {', '.join(sorted(_SWITCHES))}"
    for name in ("regex", "whitespace_pattern"):
        if value.get(name) is not None and (problem := _regex(value[name])):
            return f"has a {name} that {problem}"
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
    return None if document is None else schema(document)


def _regex(pattern: object) -> str | None:
    if not isinstance(pattern, str) or len(pattern) > MAX_REGEX_CHARACTERS:
        return f"must be a string of at most {MAX_REGEX_CHARACTERS} characters"
    return None


def schema(document: object, maximum: int = MAX_SCHEMA_BYTES) -> str | None:
    """Bound the input of the grammar compiler: size, depth, patterns, and keywords that make automata large."""
    if too_deep(document):
        return f"must not nest deeper than {MAX_DEPTH} levels"
    if len(json.dumps(document)) > maximum:
        return f"must have at most {maximum} bytes"
    return next(filter(None, map(_subschema, _objects(document))), None)


def _subschema(entry: Mapping[str, object]) -> str | None:
    if "grammar" in entry and entry.get("type") == "grammar":
        return "must not have a grammar: use a JSON schema"
    for name in ("pattern", "regex"):
        if isinstance(entry.get(name), str) and (problem := _regex(entry[name])):
            return f"has a {name} that {problem}"
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
