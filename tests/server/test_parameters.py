"""Parameters that a request to a shared engine may set; test_serving_pod.py sends them to real vLLM."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.server_rig import vllm_program
from tunesmith.contracts import addresses
from tunesmith_server import middleware

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

FOLDER = Path(middleware.__path__[0])
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
MANY_TOOLS = [{"type": "function", "function": {"name": "f", "description": "x" * 4096}}] * 30
CPU, GPU = "0.32.0+cpu", "0.32.0"


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("tunesmith_parameters")
    sys.path.remove(str(FOLDER))


def checked(module: ModuleType, route: str = CHAT, version: str = GPU, policy: Any = None, **parameters: Any) -> Any:
    checks = importlib.import_module("tunesmith_checks")
    body = {"model": "m", **({"messages": MESSAGES} if route == CHAT else {"prompt": "hello"}), **parameters}
    return module.request_refusal(route, body, checks.Policy.parse(json.dumps(policy or {}), version))


def test_the_middleware_imports_the_standard_library_only() -> None:
    # tunesmith_server is imported for annotations only; test_serving_pod.py runs the modules without it.
    names = {path.stem for path in FOLDER.glob("tunesmith_*.py")} | {"__future__", "tunesmith_server"}
    for path in (*FOLDER.glob("tunesmith_*.py"), Path(str(addresses.__file__))):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in modules} <= names | sys.stdlib_module_names, path


@pytest.mark.parametrize(
    ("route", "file", "name"),
    [
        (CHAT, "chat_completion/protocol.py", "ChatCompletionRequest"),
        (COMPLETIONS, "completion/protocol.py", "CompletionRequest"),
        ("/v1/responses", "responses/protocol.py", "ResponsesRequest"),
    ],
)
def test_every_parameter_of_vllm_is_in_the_table(module: ModuleType, route: str, file: str, name: str) -> None:
    folder = next(vllm_program().parents[1].glob("lib/python*/site-packages/vllm/entrypoints/openai"))
    tree = ast.parse((folder / file).read_text())
    model = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    fields = {
        node.target.id
        for node in model.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and not node.target.id.startswith("_")
        and not (isinstance(node.annotation, ast.Subscript) and ast.unparse(node.annotation.value) == "ClassVar")
    }
    assert len(fields) > 40
    known = {parameter for parameter, rows in module.PARAMETERS.items() if any(route in row.routes for row in rows)}
    assert fields - known - {"_DEFAULT_SAMPLING_PARAMS"} == set(), "add them to the table in tunesmith_parameters.py"


APIS = [
    ("/v1/messages", "anthropic/protocol.py", ["AnthropicMessagesRequest"]),
    ("/v1/messages/count_tokens", "anthropic/protocol.py", ["AnthropicCountTokensRequest"]),
    ("/tokenize", "serve/tokenize/protocol.py", ["TokenizeCompletionRequest", "TokenizeChatRequest"]),
    ("/detokenize", "serve/tokenize/protocol.py", ["DetokenizeRequest"]),
    ("/v1/score", "pooling/scoring/protocol.py", ["ScoringRequestMixin", "ScoreQueriesItemsRequest"]),
    ("/v1/rerank", "pooling/scoring/protocol.py", ["ScoringRequestMixin", "RerankRequest"]),
    (
        "/v1/embeddings",
        "pooling/base/protocol.py",
        [
            *("PoolingBasicRequestMixin", "CompletionRequestMixin", "ChatRequestOptionsMixin", "ChatRequestMixin"),
            *("EncodingRequestMixin", "EmbedRequestMixin"),
        ],
    ),
]


@pytest.mark.parametrize(("route", "file", "names"), APIS)
def test_every_parameter_of_the_other_apis_is_in_the_table(
    module: ModuleType, route: str, file: str, names: list[str]
) -> None:
    folder = next(vllm_program().parents[1].glob("lib/python*/site-packages/vllm/entrypoints"))
    fields = {
        node.target.id
        for model in ast.parse((folder / file).read_text()).body
        if isinstance(model, ast.ClassDef) and model.name in names
        for node in model.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    known = {parameter for parameter, rows in module.PARAMETERS.items() if any(route in row.routes for row in rows)}
    assert fields
    assert fields - known == set(), "add them to the table in tunesmith_apis.py"


TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}}
PICTURE = {"type": "image", "source": {"type": "url", "url": "http://10.0.0.1/x"}}
BASES: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 5},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/v1/embeddings": {"input": "hello"},
    "/v1/score": {"text_1": "a", "text_2": ["b"]},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [1, 2]},
}
SERVED_BY_OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/responses", {"store": False, "background": False, "include": ["reasoning.encrypted_content"]}),
    ("/v1/responses", {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": True}),
    ("/v1/responses", {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}}}),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}]}),
    ("/v1/responses", {"input": [{"type": "function_call_output", "call_id": "c", "output": "5"}]}),
    ("/v1/responses", {"instructions": "x" * 100_000, "reasoning": {"effort": "low"}, "stream": True}),
    ("/v1/messages", {"system": [{"type": "text", "text": "x"}], "stop_sequences": ["a"], "stream": True}),
    ("/v1/messages", {"tools": [{"name": "f", "input_schema": {"type": "object"}}], "tool_choice": {"type": "auto"}}),
    ("/v1/messages", {"thinking": {"type": "enabled", "budget_tokens": 1024}, "metadata": {"user_id": "u"}}),
    ("/v1/embeddings", {"input": ["a"] * 128, "encoding_format": "base64", "dimensions": 64}),
    ("/v1/embeddings", {"input": [[1], [2]]}),
    ("/v1/score", {"text_1": ["a"], "text_2": ["b"]}),
    ("/v1/rerank", {"top_n": 1}),
    ("/tokenize", {"prompt": None, "messages": MESSAGES, "return_token_strs": True}),
]
REFUSED_BY_OTHERS: list[tuple[str, dict[str, Any], str, str]] = [
    ("/v1/responses", {"store": True}, "store", "must be false: any pod of the pool may answer"),
    ("/v1/responses", {"background": True}, "background", "must be false"),
    ("/v1/responses", {"previous_response_id": "resp_1"}, "previous_response_id", "whole conversation as 'input'"),
    ("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}]}, "input", "item_reference"),
    ("/v1/responses", {"input": []}, "input", "list of items"),
    ("/v1/responses", {"input": None}, "input", "input is missing"),
    ("/v1/responses", {"tools": [{"type": "mcp", "server_url": "http://x"}]}, "tools", "of type function"),
    ("/v1/responses", {"tools": [{"type": "web_search"}]}, "tools", "of type function"),
    ("/v1/responses", {"request_id": "x"}, "request_id", "same value"),
    ("/v1/responses", {"n": 2}, "n", "not a parameter of /v1/responses"),
    ("/v1/responses", {"max_output_tokens": -1}, "max_output_tokens", "whole number"),
    ("/v1/responses", {"text": {"format": {"schema": {"multipleOf": 10**7}}}}, "text", "multipleOf"),
    (
        "/v1/responses",
        {"input": [{"content": [{"type": "input_image", "image_url": "http://10.0.0.1/x"}]}]},
        "input",
        "allowMediaUrls",
    ),
    (
        "/v1/responses",
        {"input": [{"type": "function_call_output", "output": [{"type": "input_image", "image_url": "http://x"}]}]},
        "input",
        "input[0].output has 'image_url'",
    ),
    ("/v1/messages", {"messages": [{"role": "user", "content": [PICTURE]}]}, "messages", "allowMediaUrls"),
    (
        "/v1/messages",
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [PICTURE]}]}]},
        "messages",
        "allowMediaUrls",
    ),
    ("/v1/messages/count_tokens", {"system": [PICTURE]}, "system", "allowMediaUrls"),
    ("/v1/messages", {"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools", "calls no tools itself"),
    ("/v1/messages", {"stop_sequences": ["a"] * 5}, "stop_sequences", "at most 4"),
    ("/v1/messages", {"vllm_xargs": {"a": 1}}, "vllm_xargs", "own extensions"),
    (
        "/v1/messages",
        {
            "tools": [{"name": "f", "input_schema": {"type": "object", "description": "x" * 40_000}}],
            "tool_choice": {"type": "any"},
        },
        "tools",
        "compiled to a grammar",
    ),
    ("/v1/embeddings", {"input": ["a"] * 129}, "input", "at most 128 elements"),
    ("/v1/embeddings", {"input": ["a", 1]}, "input", "list of either"),
    ("/v1/embeddings", {"encoding_format": "bytes"}, "encoding_format", "float, base64"),
    ("/v1/embeddings", {"priority": -1}, "priority", "precedence"),
    ("/v1/embeddings", {"padding": "max_length"}, "padding", "nobody needs"),
    ("/v1/rerank", {"documents": ["a"] * 129}, "documents", "at most 128 elements"),
    ("/v1/rerank", {"documents": [{"text": "x"}]}, "documents", "list of strings"),
    ("/v1/score", {"text_1": None}, "text_1", "text_1 or queries or data_1 is missing"),
    ("/tokenize", {"chat_template": "{{ x }}"}, "chat_template", "a template is a program"),
    ("/detokenize", {"tokens": [-1]}, "tokens", "token ids"),
    ("/detokenize", {"tokens": [2**63]}, "tokens", "token ids"),
    ("/tokenize", {"model": None}, "model", "names no model"),
]


def checked_by_others(module: ModuleType, route: str, parameters: dict[str, Any], **policy: Any) -> Any:
    checks = importlib.import_module("tunesmith_checks")
    body = {"model": "m", **BASES[route], **parameters}
    return module.request_refusal(route, body, checks.Policy.parse(json.dumps(policy), CPU))


@pytest.mark.parametrize(("route", "parameters"), SERVED_BY_OTHERS)
def test_requests_to_the_other_apis_are_served(module: ModuleType, route: str, parameters: dict[str, Any]) -> None:
    assert checked_by_others(module, route, parameters) is None


@pytest.mark.parametrize(("route", "parameters", "parameter", "sentence"), REFUSED_BY_OTHERS)
def test_requests_to_the_other_apis_that_a_shared_engine_cannot_serve_are_refused(
    module: ModuleType, route: str, parameters: dict[str, Any], parameter: str, sentence: str
) -> None:
    refusal = checked_by_others(module, route, parameters)
    assert refusal is not None
    assert refusal.parameter == parameter
    assert sentence in refusal.message


def test_pictures_of_the_other_apis_are_fetched_only_where_the_pool_allows_it(module: ModuleType) -> None:
    messages = {"messages": [{"role": "user", "content": [PICTURE]}]}
    assert checked_by_others(module, "/v1/messages", messages, allowMediaUrls=True) is None
    picture = {"type": "image", "source": {"type": "url", "url": "file:///etc/passwd"}}
    messages = {"messages": [{"role": "user", "content": [picture]}]}
    assert "neither" in checked_by_others(module, "/v1/messages", messages, allowMediaUrls=True).message


SERVED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"temperature": 0, "top_p": 1, "n": 16, "seed": -1, "stop": ["a"], "logprobs": True, "top_logprobs": 20}),
    (CHAT, {"stream": True, "stream_options": {"include_usage": True}}),
    (CHAT, {"max_tokens": None, "stop": None, "tools": None, "logit_bias": None, "response_format": None}),
    (CHAT, {"store": False, "metadata": {"a": "b"}, "service_tier": "auto", "user": "u", "parallel_tool_calls": False}),
    (CHAT, {"chat_template_kwargs": {"enable_thinking": False}}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, "y"]}]}),
    (CHAT, {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}),
    (CHAT, {"messages": [{"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}]}),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}}),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]}),
    (CHAT, {"priority": 0, "modalities": ["text"]}),
    (CHAT, {"tools": MANY_TOOLS}),
    (COMPLETIONS, {"prompt": ["a"] * 16}),
    (COMPLETIONS, {"prompt": [1, 2, 3]}),
    (COMPLETIONS, {"prompt": [[1], [2]], "n": 8}),
    (COMPLETIONS, {"logprobs": 5, "echo": False, "best_of": 1}),
    (COMPLETIONS, {"echo": True, "max_tokens": 0}),
    (COMPLETIONS, {"structured_outputs": {"regex": "[a-z]{1,20}"}}),
    (COMPLETIONS, {"structured_outputs": {"json": json.dumps({"type": "integer", "multipleOf": 5})}}),
]
REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"stream": 1}, "stream", "must be true or false"),
    (CHAT, {"stream": "yes"}, "stream", "must be true or false"),
    (CHAT, {"n": 1000}, "n", "from 1 to 16, the limit of this pool"),
    (CHAT, {"n": 0}, "n", "from 1"),
    (CHAT, {"n": True}, "n", "from 1"),
    (CHAT, {"n": 1.0}, "n", "from 1"),
    (CHAT, {"n": 17, "use_beam_search": True}, "n", "from 1 to 16"),
    (COMPLETIONS, {"prompt": ["a"] * 8, "n": 3}, "n", "24 sequences"),
    (COMPLETIONS, {"prompt": ["a"] * 17}, "prompt", "at most 16 prompts"),
    (COMPLETIONS, {"prompt": [1, -1]}, "prompt", "token ids"),
    (COMPLETIONS, {"prompt": [1, "a"]}, "prompt", "token ids"),
    (COMPLETIONS, {"prompt": [2**31]}, "prompt", "token ids"),
    (COMPLETIONS, {"prompt": []}, "prompt", "token ids"),
    (COMPLETIONS, {"prompt": {}}, "prompt", "token ids"),
    (COMPLETIONS, {"prompt": None}, "prompt", "prompt is missing"),
    (CHAT, {"messages": None}, "messages", "messages is missing"),
    (CHAT, {"messages": "hi"}, "messages", "list of messages"),
    (CHAT, {"messages": "hi"}, "messages", "list of messages"),
    (CHAT, {"messages": [[]]}, "messages", "list of messages"),
    (CHAT, {"messages": [{"content": 5}]}, "messages", "messages[0].content must be a string"),
    (CHAT, {"max_tokens": -1}, "max_tokens", "must be a whole number from 0"),
    (CHAT, {"messages": []}, "messages", "must have at least one message"),
    (CHAT, {"temperature": float("inf")}, "temperature", "from 0 to 10"),
    (CHAT, {"temperature": -0.1}, "temperature", "from 0 to 10"),
    (CHAT, {"temperature": 10**400}, "temperature", "from 0 to 10"),
    (CHAT, {"temperature": "1"}, "temperature", "from 0 to 10"),
    (CHAT, {"top_p": 0}, "top_p", "above 0"),
    (CHAT, {"seed": 2**63}, "seed", "whole number"),
    (CHAT, {"stop": ["a"] * 5}, "stop", "at most 4"),
    (CHAT, {"stop": ["a" * 513]}, "stop", "512 characters"),
    (CHAT, {"stop_token_ids": [-1]}, "stop_token_ids", "token ids"),
    (CHAT, {"allowed_token_ids": list(range(1025))}, "allowed_token_ids", "at most 1024"),
    (CHAT, {"bad_words": ["a"] * 65}, "bad_words", "at most 64"),
    (CHAT, {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
    (CHAT, {"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
    (CHAT, {"logit_bias": {"1": 101}}, "logit_bias", "-100 to 100"),
    (CHAT, {"logprobs": 5}, "logprobs", "true or false"),
    (CHAT, {"top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
    (COMPLETIONS, {"logprobs": True}, "logprobs", "from 0 to 20"),
    (COMPLETIONS, {"logprobs": -1}, "logprobs", "from 0 to 20"),
    (CHAT, {"priority": -5}, "priority", "precedence over the others"),
    (CHAT, {"request_id": "x"}, "request_id", "same value"),
    (CHAT, {"session_id": "x"}, "session_id", "same value"),
    (CHAT, {"kv_transfer_params": {}}, "kv_transfer_params", "exchange their caches"),
    (CHAT, {"ec_transfer_params": {}}, "ec_transfer_params", "exchange their caches"),
    (CHAT, {"vllm_xargs": {"a": 1}}, "vllm_xargs", "extensions"),
    (CHAT, {"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs", "image"),
    (COMPLETIONS, {"prompt_embeds": "AA"}, "prompt_embeds", "unchecked"),
    (COMPLETIONS, {"best_of": 5}, "best_of", "no best_of"),
    (CHAT, {"lora_request": {}}, "lora_request", "not a parameter"),
    (CHAT, {"lora_path": "/"}, "lora_path", "not a parameter"),
    (CHAT, {"guided_grammar": "x"}, "guided_grammar", "not a parameter"),
    (CHAT, {"prompt": "x"}, "prompt", "not a parameter of /v1/chat/completions"),
    (CHAT, {"audio": {}}, "audio", "text only"),
    (CHAT, {"stream_options": True}, "stream_options", "object"),
    (CHAT, {"stream_options": {"include_usage": 1}}, "stream_options", "true or false"),
    (CHAT, {"chat_template": "{{ x }}"}, "chat_template", "requests.allowChatTemplate"),
    (CHAT, {"chat_template_kwargs": {"chat_template": "{{ x }}"}}, "chat_template_kwargs", "switches"),
    (CHAT, {"chat_template_kwargs": {"a": [1] * 10**6}}, "chat_template_kwargs", "switches"),
    (CHAT, {"structured_outputs": {"grammar": "root ::= root root"}}, "structured_outputs", "grammar"),
    (CHAT, {"structured_outputs": {"regex": "a" * 513}}, "structured_outputs", "512"),
    (CHAT, {"structured_outputs": {"choice": ["x" * i for i in range(500)]}}, "structured_outputs", "8192"),
    (CHAT, {"structured_outputs": {"backend": "outlines"}}, "structured_outputs", "backend"),
    (CHAT, {"structured_outputs": {"json": {"multipleOf": 9999991}}}, "structured_outputs", "multipleOf"),
    (CHAT, {"structured_outputs": {"json": "{" * 5}}, "structured_outputs", "not JSON"),
    (CHAT, {"structured_outputs": {"json": {"a": "x" * 2**16}}}, "structured_outputs", "32768 bytes"),
    (CHAT, {"response_format": {"type": "grammar"}}, "response_format", "type is"),
    (
        CHAT,
        {"response_format": {"type": "structural_tag", "format": {"type": "grammar", "grammar": "x"}}},
        "response_format",
        "must not have a grammar",
    ),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"allOf": [{"pattern": "a"}] * 8}}}},
        "response_format",
        "combines patterns",
    ),
    (CHAT, {"tools": [{"function": {"parameters": {"allOf": [{}] * 9}}}]}, "tools", "allOf of more than 8"),
    (CHAT, {"tools": [{"function": {}}] * 129}, "tools", "at most 128"),
    (CHAT, {"tools": MANY_TOOLS, "tool_choice": "required"}, "tools", "32768 bytes if tool_choice"),
    (CHAT, {"tools": MANY_TOOLS, "tool_choice": {"function": {"name": "f"}}}, "tools", "32768 bytes"),
    (CHAT, {"tools": [{"function": {"strict": True}}, *MANY_TOOLS]}, "tools", "32768 bytes"),
    (CHAT, {"tools": MANY_TOOLS * 4}, "tools", "262144 bytes"),
    (CHAT, {"repetition_detection": {"max_pattern_size": 10**9}}, "repetition_detection", "1024"),
    (CHAT, {"cache_salt": "x" * 129}, "cache_salt", "128"),
]  # fmt: skip


@pytest.mark.parametrize(("route", "parameters"), SERVED)
def test_common_requests_are_accepted(module: ModuleType, route: str, parameters: dict[str, Any]) -> None:
    assert checked(module, route, **parameters) is None


@pytest.mark.parametrize(("route", "parameters", "parameter", "sentence"), REFUSED)
def test_requests_that_a_shared_engine_cannot_serve_are_refused(
    module: ModuleType, route: str, parameters: dict[str, Any], parameter: str, sentence: str
) -> None:
    refusal = checked(module, route, **parameters)
    assert refusal.parameter == parameter
    assert sentence in refusal.message
    assert refusal.message.endswith(".")


@pytest.mark.parametrize(
    "content",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"image_url": "HTTPS://internal/x"},
        {"type": "video_url", "video_url": {"url": "http://x"}},
        {"type": "audio_url", "audio_url": {"url": " http://x"}},
        {"type": "input_image", "image_url": "http://x"},
        {"type": "image_embeds", "image_embeds": "AA"},
        {"type": "image_url", "image_url": None, "uuid": "another-client's"},
    ],
)
def test_the_engine_fetches_no_urls_for_clients(module: ModuleType, content: dict[str, Any]) -> None:
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": [content]}]
    assert checked(module, messages=messages).message.startswith("messages[1].content ")


def test_a_pool_may_allow_more(module: ModuleType) -> None:
    url = [{"content": [{"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}]}]
    file = [{"content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]
    assert checked(module, policy={"allowMediaUrls": True}, messages=url) is None
    assert "neither a data: nor an http(s)" in checked(module, policy={"allowMediaUrls": True}, messages=file).message
    assert checked(module, policy={"allowChatTemplate": True}, chat_template="{{ x }}") is None
    assert checked(module, policy={"maxChoices": 100}, n=100) is None
    assert "at most 64, the limit" in checked(module, policy={"maxTokens": 64}, max_completion_tokens=65).message
    assert "at most 64, the limit" in checked(module, policy={"maxTokens": 64}, min_tokens=65).message


@pytest.mark.parametrize("parameters", [{"echo": True}, {"echo": True, "logprobs": True}, {"prompt_logprobs": 0}])
def test_an_echoed_chat_requests_prompt_log_probabilities(module: ModuleType, parameters: dict[str, Any]) -> None:
    assert checked(module, CHAT, CPU, {"allowPromptLogprobs": True}, **parameters).code == "unsupported_by_engine"
    refusal = checked(module, CHAT, GPU, **parameters)
    assert "requests.allowPromptLogprobs" in refusal.message
    assert refusal.parameter in parameters


@pytest.mark.parametrize("parameters", [{"prompt_logprobs": 1}, {"echo": True, "logprobs": 1}, {"prompt_logprobs": 0}])
def test_log_probabilities_of_prompts_depend_on_pool_and_engine(module: ModuleType, parameters: dict[str, Any]) -> None:
    allowed = {"allowPromptLogprobs": True}
    assert "requests.allowPromptLogprobs" in checked(module, COMPLETIONS, GPU, **parameters).message
    assert checked(module, COMPLETIONS, GPU, allowed, **parameters) is None
    refusal = checked(module, COMPLETIONS, CPU, allowed, **parameters)
    assert refusal.code == "unsupported_by_engine"
    assert "runs on CPUs" in refusal.message


class Decoder:
    """A decoder of the `tokenizers` library, whose state is its JSON."""

    def __init__(self, state: bytes) -> None:
        self._state = state

    def __getstate__(self) -> bytes:
        return self._state


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("decoder", "constrains"),
    [
        (None, False),
        ({"type": "WordPiece", "prefix": "##"}, False),
        ({"type": "ByteLevel", "use_regex": True}, True),
        ({"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}]}, True),
    ],
)
def test_answers_are_constrained_only_with_a_tokenizer_that_maps_tokens_to_bytes(
    decoder: dict[str, Any] | None,
    constrains: bool,  # noqa: FBT001 - a parameter of a table
) -> None:
    """These are the decoders that llguidance accepts."""
    can_constrain = importlib.import_module("tunesmith_tokenizer").can_constrain
    state = None if decoder is None else Decoder(json.dumps(decoder).encode())
    tokenizer = SimpleNamespace(backend_tokenizer=SimpleNamespace(decoder=state))
    assert can_constrain(SimpleNamespace(get_tokenizer=lambda: tokenizer)) is constrains


@pytest.mark.usefixtures("module")
def test_an_unknown_kind_of_tokenizer_is_left_to_the_engine() -> None:
    assert importlib.import_module("tunesmith_tokenizer").can_constrain(SimpleNamespace(get_tokenizer=SimpleNamespace))


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "text"}}, None),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"disable_any_whitespace": True}}, None),
        ({"tools": TOOLS, "tool_choice": "required"}, "tools"),
        ({"tools": TOOLS, "tool_choice": "auto"}, None),
        ({}, None),
    ],
)
def test_constraints_are_refused_where_the_engine_has_no_grammars(
    module: ModuleType, parameters: dict[str, Any], name: str | None
) -> None:
    checks = importlib.import_module("tunesmith_checks")
    body = {"model": "m", "messages": MESSAGES, **parameters}
    assert module.request_refusal(CHAT, body, checks.Policy()) is None
    found = module.request_refusal(CHAT, body, checks.Policy(can_constrain=False))
    assert (found and (found.parameter, found.code)) == (name and (name, "unsupported_by_engine"))


@pytest.mark.parametrize(
    ("route", "parameters", "parameter"),
    [
        ("/v1/responses", {"text": {"format": {"type": "json_object"}}}, "text"),
        ("/v1/messages", {"output_config": {"format": {"type": "json_schema", "schema": {}}}}, "output_config"),
        ("/v1/messages", {"output_config": {"effort": "low"}, "tool_choice": {"type": "any"}}, "tools"),
    ],
)
def test_constraints_of_the_other_apis_need_an_engine_that_can_constrain(
    module: ModuleType, route: str, parameters: dict[str, Any], parameter: str
) -> None:
    checks = importlib.import_module("tunesmith_checks")
    refusal = module.request_refusal(
        route, {"model": "m", **BASES[route], **parameters}, checks.Policy(can_constrain=False)
    )
    assert refusal.parameter == parameter
