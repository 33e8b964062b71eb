"""The APIs that models answer: their paths, and how each names a model, counts sequences and reports an error. Pure.

vLLM serves all of them. Which ones an engine has depends on its model: an embedding model has no chat.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

import orjson

if TYPE_CHECKING:
    from tunesmith.gateway.errors import ApiError


@dataclass(frozen=True, slots=True)
class Api:
    """An API of a model.

    Attributes:
        path: path in the engine; clients may use aliases of it.
        lists: members of a body whose elements are sequences.
        own_sequences: number of sequences beside those of the lists.
        envelope: member of an event that contains the answer with the name of its model; empty: the event itself.
        names_model: an answer names its model.
        usage_option: a stream reports its tokens if `stream_options` asks for them; otherwise it always does.
        computes: the engine computes tokens, which count towards the limits of an API key.
        is_anthropic: errors have Anthropic's schema instead of OpenAI's.
    """

    path: str
    lists: tuple[str, ...] = ()
    own_sequences: int = 0
    envelope: str = ""
    names_model: bool = True
    usage_option: bool = False
    computes: bool = True
    is_anthropic: bool = False


CHAT = Api("/v1/chat/completions", usage_option=True)
COMPLETIONS = Api("/v1/completions", lists=("prompt", "prompt_embeds"), usage_option=True)
RESPONSES = Api("/v1/responses", envelope="response")
MESSAGES = Api("/v1/messages", envelope="message", is_anthropic=True)
COUNT_TOKENS = Api("/v1/messages/count_tokens", names_model=False, computes=False, is_anthropic=True)
EMBEDDINGS = Api("/v1/embeddings", lists=("input",))
SCORE = Api("/v1/score", lists=("text_1", "text_2", "queries", "documents", "items", "data_1", "data_2"))
RERANK = Api("/v1/rerank", lists=("documents",), own_sequences=1)
TOKENIZE = Api("/tokenize", names_model=False, computes=False)
DETOKENIZE = Api("/detokenize", names_model=False, computes=False)

APIS = (CHAT, COMPLETIONS, RESPONSES, MESSAGES, COUNT_TOKENS, EMBEDDINGS, SCORE, RERANK, TOKENIZE, DETOKENIZE)
API_BY_PATH: dict[str, Api] = {api.path: api for api in APIS} | {
    "/score": SCORE,
    "/rerank": RERANK,
    "/v2/rerank": RERANK,
}
"""APIs by the paths that clients may use."""
_STORED_RESPONSES = RESPONSES.path + "/"

_ANTHROPIC_TYPES = {
    HTTPStatus.BAD_REQUEST: "invalid_request_error",
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
    HTTPStatus.GATEWAY_TIMEOUT: "timeout_error",
}


def names_stored_response(path: str) -> bool:
    """Return True if the path is a response that OpenAI's service would have stored."""
    return path.startswith(_STORED_RESPONSES)


def error_body(error: ApiError, path: str, request_id: str) -> bytes:
    """Return the body of an error in the schema of the API that the path belongs to."""
    api = API_BY_PATH.get(path)
    return _anthropic_body(error, request_id) if api is not None and api.is_anthropic else error.body()


def error_event(error: ApiError, path: str, request_id: str) -> bytes:
    """Return the event that reports an error in a stream of the API that the path belongs to, without its end.

    OpenAI's clients raise an exception for an event with an `error`, also for those of the Responses API.
    """
    api = API_BY_PATH.get(path)
    if api is None or not api.envelope:
        return b"data: " + error.body()
    if api.is_anthropic:
        return b"event: error\ndata: " + _anthropic_body(error, request_id)
    document = {"type": "error", **orjson.loads(error.body())}
    return b"event: error\ndata: " + orjson.dumps(document)


def _anthropic_body(error: ApiError, request_id: str) -> bytes:
    status = HTTPStatus(error.status) if error.status in set(HTTPStatus) else HTTPStatus.BAD_GATEWAY
    default = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "api_error"
    document = {"type": _ANTHROPIC_TYPES.get(status, default), "message": _message(error)}
    return orjson.dumps({"type": "error", "error": document, "request_id": request_id})


def _message(error: ApiError) -> str:
    """Return the sentence of an error, which may be the engine's own."""
    document = orjson.loads(error.body()).get("error")
    message = document.get("message") if isinstance(document, dict) else document
    return message if isinstance(message, str) else error.message
