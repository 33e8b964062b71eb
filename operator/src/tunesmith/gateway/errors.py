"""Errors in OpenAI's schema: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from http import HTTPStatus

import orjson

from tunesmith.contracts.crash import SHOWN_DIGITS

_MAX_SHOWN_NAME = 128
_MAX_SHOWN_METHOD = 16
_MAX_STATUS = 599


class ApiError(Exception):
    """Error response to a request.

    Args:
        status: HTTP status.
        message: the sentence that the client reads.
        code: OpenAI's machine-readable code, or None.
        type_: OpenAI's error type.
        param: the field of the request that is at fault.
        headers: additional response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        type_: str = "invalid_request_error",
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.type = type_
        self.param = param
        self.headers = headers or {}

    def body(self) -> bytes:
        """Return the response body."""
        return orjson.dumps(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        )


class RelayedError(ApiError):
    """An error of the engine, relayed unchanged.

    Args:
        status: HTTP status.
        body: JSON in OpenAI's schema.
        headers: additional response headers.
    """

    def __init__(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        super().__init__(status, "the engine's own error", headers=headers)
        self._body = body

    def body(self) -> bytes:
        """Return the engine's body."""
        return self._body


def missing_key() -> ApiError:
    """401: the request has no bearer key."""
    return ApiError(
        HTTPStatus.UNAUTHORIZED,
        "You didn't provide an API key. Send it in the header `Authorization: Bearer <key>`;"
        " ask your platform team for one (they create it with `tunesmith keys create`).",
        code="missing_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def invalid_key() -> ApiError:
    """401: the key is unknown. The message does not repeat it."""
    return ApiError(
        HTTPStatus.UNAUTHORIZED,
        "Incorrect API key provided. Ask your platform team for a key (they list the existing ones with"
        " `tunesmith keys list`).",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def invalid_token(reason: str) -> ApiError:
    """401: the token of an OpenID Connect issuer is not valid; the reason names no value of it."""
    return ApiError(
        HTTPStatus.UNAUTHORIZED,
        f"The token is not valid: {reason}. Get a new one from your issuer, or use an API key.",
        code="invalid_token",
    )


def issuer_unreachable() -> ApiError:
    """503: the keys of the OpenID Connect issuer have never been read."""
    return _unavailable(
        "The keys of the issuer of tokens cannot be read, so tokens cannot be checked. Try again later.",
        "issuer_unreachable",
        5,
    )


def expired_key() -> ApiError:
    """401: the key was valid until some time ago, or was replaced by another one."""
    return ApiError(
        HTTPStatus.UNAUTHORIZED,
        "Your API key has expired or was replaced. Ask your platform team for a new one (they create it with"
        " `tunesmith keys rotate NAME`).",
        code="expired_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


_KEY = "Your API key"


def too_many_requests(limit: int, seconds: int, headers: dict[str, str], whose: str = _KEY) -> ApiError:
    """429: the requests of the last minute of a key or an adapter."""
    message = f"{whose} may {'send' if whose == _KEY else 'get'} {limit} requests per minute. Try again in {seconds} s."
    return _too_many(message, "rate_limit_exceeded", seconds, headers=headers)


def too_many_tokens(limit: int, unit: str, seconds: int, whose: str = _KEY) -> ApiError:
    """429: the tokens of this minute or day of a key or an adapter."""
    return _too_many(
        f"{whose} may use {limit} tokens per {unit}, and the rest of them is less than this request needs (its"
        f" prompt and max_tokens). Try again in {seconds} s, or lower max_tokens.",
        "rate_limit_exceeded",
        seconds,
        type_="tokens",
    )


def too_many_tokens_for_limit(tokens: int, limit: int, whose: str) -> ApiError:
    """400: the request alone needs more tokens than its key or adapter may use."""
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        f"The request needs about {tokens} tokens (its prompt and max_tokens). {whose} may use {limit} in a"
        " gateway. Lower max_tokens or shorten the prompt.",
        code="too_many_tokens",
    )


def too_many_running(limit: int, whose: str = _KEY) -> ApiError:
    """429: the sequences at once of a key or an adapter."""
    return _too_many(
        f"{whose} may have {limit} sequences (choices × prompts) running at once. Wait for some of its requests to"
        " finish.",
        "concurrency_limit_exceeded",
        1,
    )


def too_many_sequences_for_limit(sequences: int, limit: int, whose: str) -> ApiError:
    """400: the request alone has more sequences than its key or adapter may have at once."""
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        f"The request asks for {sequences} sequences (choices × prompts). {whose} may have {limit} running at"
        " once in a gateway. Lower `n` or send fewer prompts.",
        code="too_many_sequences",
    )


def model_not_found(model: str) -> ApiError:
    """404: the model does not exist, or its namespace is closed to the key; the response does not reveal which."""
    return ApiError(
        HTTPStatus.NOT_FOUND,
        f"The model `{model[:_MAX_SHOWN_NAME]}` does not exist or you do not have access to it."
        " GET /v1/models lists those you may call.",
        code="model_not_found",
        param="model",
    )


def model_ambiguous(model: str, ids: list[str]) -> ApiError:
    """400: several pools offer the bare name."""
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        f"The model `{model[:_MAX_SHOWN_NAME]}` is offered by several pools: use one of {', '.join(ids)}.",
        code="model_ambiguous",
        param="model",
    )


def model_forbidden(model: str) -> ApiError:
    """403: the key may call other models of the namespace but not this one."""
    return ApiError(
        HTTPStatus.FORBIDDEN,
        f"Your API key may not call the model `{model}`."
        f" Ask your platform team for one that may (`tunesmith keys create NAME --model {model}`).",
        code="model_forbidden",
        param="model",
    )


def missing_model() -> ApiError:
    """400: the request names no model."""
    return ApiError(HTTPStatus.BAD_REQUEST, "you must provide a model parameter", param="model", code="missing_model")


def wrong_type(name: str, type_: type) -> ApiError:
    """400: a member that the gateway reads has the wrong type."""
    expected = {bool: "true or false", int: "an integer", str: "a string"}[type_]
    return ApiError(HTTPStatus.BAD_REQUEST, f"`{name}` must be {expected}.", param=name, code="invalid_type")


def too_many_sequences(count: int) -> ApiError:
    """400: the request asks for more sequences than the gateway accepts."""
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        f"The request asks for {count} sequences (choices × prompts), more than the gateway accepts in one request."
        " Lower `n` to what the pool allows (16 by default), or send the prompts in several requests.",
        param="n",
        code="too_many_sequences",
    )


def body_not_json(reason: str) -> ApiError:
    """400: the body cannot be parsed."""
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        f"We could not parse the JSON body of your request: {reason}. The body must be a JSON object in UTF-8.",
        code="invalid_json",
    )


def body_not_an_object() -> ApiError:
    """400: the body is JSON but not an object."""
    return ApiError(HTTPStatus.BAD_REQUEST, "The body of the request must be a JSON object.", code="invalid_json")


def body_too_complex(reason: str) -> ApiError:
    """400: the body is JSON, but its tree is too deep or has too many parts."""
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        f"The body of the request is too complex: {reason}. Send a flatter or smaller document.",
        code="body_too_complex",
    )


def body_unreadable() -> ApiError:
    """400: the body's framing or compression is broken."""
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        "The body of the request could not be read: its length, its chunks or its compression are not valid.",
        code="invalid_body",
    )


def unsupported_encoding() -> ApiError:
    """415: the body has a compression that the gateway does not support."""
    return ApiError(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        "This Content-Encoding is not supported: send the body uncompressed, or with gzip or deflate.",
        code="unsupported_encoding",
    )


def unknown_expectation() -> ApiError:
    """417: the Expect header is not 100-continue."""
    return ApiError(HTTPStatus.EXPECTATION_FAILED, "`Expect` may only be `100-continue`.", code="unknown_expectation")


def body_too_slow(seconds: float) -> ApiError:
    """408: the body did not arrive in time."""
    return ApiError(
        HTTPStatus.REQUEST_TIMEOUT,
        f"The body of the request did not arrive within {seconds:g} s.",
        code="request_timeout",
        headers={"Connection": "close"},
    )


def malformed_request() -> ApiError:
    """400: the request is not HTTP. The message repeats nothing of it, since it may contain a key."""
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        "The request is not valid HTTP/1.1. Check its request line, its header lines and how its length is given.",
        code="malformed_request",
    )


def header_too_large() -> ApiError:
    """431: a header line is too long, or there are too many header lines."""
    return ApiError(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        "The header of the request is too large: a line may have 8190 bytes, and there may be 128 lines.",
        code="header_too_large",
    )


def body_too_large(limit: int) -> ApiError:
    """413: the body is larger than `limit`, in bytes."""
    return ApiError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"The body of the request is larger than {limit} bytes.",
        code="request_too_large",
    )


def unknown_url(method: str, path: str) -> ApiError:
    """404: the path is not served."""
    return ApiError(
        HTTPStatus.NOT_FOUND,
        f"Invalid URL ({method[:_MAX_SHOWN_METHOD]} {path[:_MAX_SHOWN_NAME]}): the gateway serves /v1/chat/completions,"
        " /v1/completions, /v1/responses, /v1/messages, /v1/embeddings, /v1/score, /v1/rerank, /tokenize, /detokenize,"
        " /v1/models and /health.",
        code="unknown_url",
    )


def api_not_served(path: str, model: str, pool: tuple[str, str] | None) -> ApiError:
    """404: the engine of the model's pool does not have the API, whatever the model."""
    where = f" of the pool `{'/'.join(pool)}`" if pool is not None else ""
    return ApiError(
        HTTPStatus.NOT_FOUND,
        f"The engine{where}, which serves `{model}`, has no {path}: its base model cannot answer this API. Models for"
        " text answer chats and completions, embedding models /v1/embeddings, and rerankers /v1/score and /v1/rerank.",
        code="api_not_served",
    )


def responses_not_stored() -> ApiError:
    """404: a stored response was requested, and no response is stored."""
    return ApiError(
        HTTPStatus.NOT_FOUND,
        "Responses are not stored: any pod of a pool may answer the next request. Send the whole conversation as"
        " `input`, with `store` set to false.",
        code="responses_not_stored",
    )


def method_not_allowed(method: str, path: str, allowed: str) -> ApiError:
    """405: the path does not support the method."""
    return ApiError(
        HTTPStatus.METHOD_NOT_ALLOWED,
        f"Not allowed to {method[:_MAX_SHOWN_METHOD]} on {path[:_MAX_SHOWN_NAME]}: use {allowed}.",
        code="method_not_allowed",
        headers={"Allow": allowed},
    )


def _too_many(
    message: str, code: str, retry_after: int, *, type_: str = "rate_limit_error", headers: dict[str, str] | None = None
) -> ApiError:
    return ApiError(
        HTTPStatus.TOO_MANY_REQUESTS,
        message,
        code=code,
        type_=type_,
        headers={**(headers or {}), "Retry-After": str(retry_after)},
    )


def _unavailable(message: str, code: str, retry_after: int) -> ApiError:
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        message,
        code=code,
        type_="service_unavailable_error",
        headers={"Retry-After": str(retry_after)},
    )


def crashes_engines(model: str, digest: str, crashes: int, seconds: float) -> ApiError:
    """400: the request was in flight at several crashes of engines, so it is not sent to another."""
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        f"This request to `{model}` was being processed at {crashes} crashes of an engine, so it is refused for"
        f" {max(1, round(seconds / 60))} min. Change the request, or report {digest[:SHOWN_DIGITS]} to your platform"
        " team.",
        code="request_crashes_engine",
        headers=_NO_RETRY,
    )


def no_pod_ready(model: str, seconds: float, retry_after: int) -> ApiError:
    """503: no pod held the model while the request waited."""
    return _unavailable(
        f"No pod that holds `{model}` became ready within {seconds:g} s. Try again later;"
        " `tunesmith models` shows the reason.",
        "no_pod_ready",
        retry_after,
    )


def model_not_ready(model: str, reason: str) -> ApiError:
    """503: the model is known, but there is nothing to load yet or loading failed permanently."""
    return _unavailable(f"The model `{model}` is not ready: {reason}", "model_not_ready", 10)


def too_many_waiting(model: str) -> ApiError:
    """503: no pod holds the model yet, and the gateway holds the maximum number of waiting requests."""
    return _unavailable(
        f"No pod holds `{model}` yet, and too many requests already wait at this gateway. Try again later.",
        "too_many_waiting",
        5,
    )


def key_waits_too_often(limit: int) -> ApiError:
    """429: the key's waiting requests use up its part of those that the gateway holds."""
    return _too_many(
        f"Your API key has {limit} requests that wait for a pod, the most it may have. Wait for some of its requests to"
        " finish.",
        "too_many_waiting",
        2,
    )


def no_turn(model: str, seconds: float) -> ApiError:
    """503: the pods that hold the model were busy while the request waited."""
    return _unavailable(f"All pods that hold `{model}` were busy for {seconds:g} s. Try again later.", "pods_busy", 5)


def not_ready(reason: str) -> ApiError:
    """503: the gateway is not ready for requests."""
    return _unavailable(f"The gateway is not ready: {reason}.", "gateway_not_ready", 2)


def over_budget() -> ApiError:
    """503: the gateway has as many bytes in flight as its memory allows."""
    return _unavailable(
        "The gateway has as many bytes in flight as its memory allows. Try again later.", "gateway_overloaded", 2
    )


def key_over_budget(limit: int) -> ApiError:
    """429: the key's requests in flight use up its part of the gateway's memory."""
    return _too_many(
        f"Your API key has reached its limit of {limit} bytes in flight. Wait for some of its requests to finish.",
        "too_many_bytes_in_flight",
        2,
    )


def too_many_connections() -> ApiError:
    """503: the gateway or the client address has the maximum number of connections."""
    return _unavailable("There are too many connections. Try again later.", "too_many_connections", 5)


def shutting_down() -> ApiError:
    """503: the gateway shuts down before a pod has started the request."""
    return _unavailable("The gateway is shutting down. Send the request again.", "gateway_shutting_down", 1)


def cut_off() -> ApiError:
    """502: the gateway shuts down before the response is complete."""
    return ApiError(
        HTTPStatus.BAD_GATEWAY,
        "The gateway shut down before the answer was complete. Send the request again.",
        code="gateway_shut_down",
        type_="server_error",
    )


def starting() -> ApiError:
    """503: the gateway has not read the cluster's state yet."""
    return _unavailable("The gateway is starting. Try again in a second.", "gateway_starting", 1)


_NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients retry after a 5xx, and a request that crashed its engine would crash the next one too."""


def engine_failed(model: str) -> ApiError:
    """502: the engine accepted the request and failed before its response was complete."""
    return ApiError(
        HTTPStatus.BAD_GATEWAY,
        f"The pod that answered for `{model}` failed before its answer was complete, and the gateway does not send"
        " the request to another one. Send it again if it is safe to repeat.",
        code="engine_failed",
        type_="server_error",
        headers=_NO_RETRY,
    )


def engine_silent(model: str, seconds: float) -> ApiError:
    """504: the engine accepted the request and sent nothing for too long."""
    return ApiError(
        HTTPStatus.GATEWAY_TIMEOUT,
        f"The pod that answers for `{model}` sent nothing for {seconds:g} s. The gateway cancelled the request.",
        code="engine_silent",
        type_="server_error",
        headers=_NO_RETRY,
    )


def engine_error(model: str, status: int) -> ApiError:
    """4xx, 5xx: the engine answered with this status, and with a body that is not an error in OpenAI's schema."""
    return ApiError(
        status if HTTPStatus.BAD_REQUEST <= status <= _MAX_STATUS else HTTPStatus.BAD_GATEWAY,
        f"The engine of `{model}` answered with status {status} and no error message.",
        code="engine_error",
        type_="server_error",
        headers=_NO_RETRY,
    )


def wrong_model(model: str) -> ApiError:
    """502: the engine's response names another model; it is discarded."""
    return ApiError(
        HTTPStatus.BAD_GATEWAY,
        f"The engine answered with a model other than `{model}`. The gateway discarded the answer.",
        code="wrong_model",
        type_="server_error",
        headers=_NO_RETRY,
    )


def internal() -> ApiError:
    """500: an internal error of the gateway."""
    return ApiError(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "The gateway failed to handle the request. Its log describes the error under this answer's request id.",
        code="internal_error",
        type_="server_error",
    )
