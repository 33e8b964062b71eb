"""Errors in OpenAI's schema: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from http import HTTPStatus

import orjson

_SHOWN_NAME = 128


class ApiError(Exception):
    """An answer that ends a request.

    Args:
        status: HTTP status.
        message: the sentence that the client reads.
        code: OpenAI's word for programs, or None.
        type_: OpenAI's class of errors.
        param: the field of the request that is at fault.
        headers: more headers of the answer.
    """

    def __init__(
        self,
        status: HTTPStatus,
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
        """The answer's body."""
        return orjson.dumps(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        )


def missing_key() -> ApiError:
    """401: no bearer key in the request."""
    return ApiError(
        HTTPStatus.UNAUTHORIZED,
        "You didn't provide an API key. Send it in the header `Authorization: Bearer <key>`;"
        " `tunesmith keys create` makes one.",
        code="missing_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def invalid_key() -> ApiError:
    """401: the key is not one of ours. The key is not repeated."""
    return ApiError(
        HTTPStatus.UNAUTHORIZED,
        "Incorrect API key provided. `tunesmith keys list` shows the keys there are.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def model_not_found(model: str) -> ApiError:
    """404: there is no such model, or its namespace is closed to the key: the answer does not tell which."""
    return ApiError(
        HTTPStatus.NOT_FOUND,
        f"The model `{model[:_SHOWN_NAME]}` does not exist or you do not have access to it."
        " GET /v1/models lists those you may call.",
        code="model_not_found",
        param="model",
    )


def model_ambiguous(model: str, ids: list[str]) -> ApiError:
    """400: several pools offer the bare name."""
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        f"The model `{model[:_SHOWN_NAME]}` is offered by several pools: use one of {', '.join(ids)}.",
        code="model_ambiguous",
        param="model",
    )


def model_forbidden(model: str) -> ApiError:
    """403: the key may call the namespace but not this model."""
    return ApiError(
        HTTPStatus.FORBIDDEN,
        f"Your API key may not call the model `{model}`."
        f" `tunesmith keys create NAME --model {model}` makes one that may.",
        code="model_forbidden",
        param="model",
    )


def missing_model() -> ApiError:
    """400: the request names no model."""
    return ApiError(HTTPStatus.BAD_REQUEST, "you must provide a model parameter", param="model", code="missing_model")


def model_not_a_string() -> ApiError:
    """400: `model` has another type."""
    return ApiError(HTTPStatus.BAD_REQUEST, "`model` must be a string", param="model", code="invalid_type")


def body_not_json(reason: str) -> ApiError:
    """400: the body cannot be parsed."""
    return ApiError(
        HTTPStatus.BAD_REQUEST,
        f"We could not parse the JSON body of your request: {reason}. The body must be a JSON object in UTF-8.",
        code="invalid_json",
    )


def body_not_an_object() -> ApiError:
    """400: the body is JSON but no object."""
    return ApiError(HTTPStatus.BAD_REQUEST, "The body of the request must be a JSON object.", code="invalid_json")


def body_too_large(limit: int) -> ApiError:
    """413: the body is above the limit, in bytes."""
    return ApiError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"The body of the request is larger than {limit} bytes.",
        code="request_too_large",
    )


def unknown_url(method: str, path: str) -> ApiError:
    """404: a path that is not served."""
    return ApiError(
        HTTPStatus.NOT_FOUND,
        f"Invalid URL ({method} {path[:_SHOWN_NAME]}): there are /v1/chat/completions, /v1/completions and /v1/models.",
        code="unknown_url",
    )


def method_not_allowed(method: str, path: str, allowed: str) -> ApiError:
    """405: the path wants another method."""
    return ApiError(
        HTTPStatus.METHOD_NOT_ALLOWED,
        f"Not allowed to {method} on {path[:_SHOWN_NAME]}: use {allowed}.",
        code="method_not_allowed",
        headers={"Allow": allowed},
    )


def _unavailable(message: str, code: str, retry_after: int) -> ApiError:
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        message,
        code=code,
        type_="service_unavailable_error",
        headers={"Retry-After": str(retry_after)},
    )


def no_pod_ready(model: str, seconds: float) -> ApiError:
    """503: no pod held the model while the request was kept."""
    return _unavailable(
        f"No pod that holds `{model}` became ready within {seconds:g} s. Try again later;"
        " `tunesmith models` shows what it waits for.",
        "no_pod_ready",
        5,
    )


def model_not_ready(model: str, reason: str) -> ApiError:
    """503: the model is known but there is nothing to load yet, or loading failed for good."""
    return _unavailable(f"The model `{model}` is not ready: {reason}", "model_not_ready", 10)


def too_many_waiting(model: str) -> ApiError:
    """503: the model is on its way, but the gateway keeps as many requests as it may."""
    return _unavailable(
        f"No pod holds `{model}` yet, and too many requests already wait at this gateway. Try again later.",
        "too_many_waiting",
        5,
    )


def starting() -> ApiError:
    """503: the gateway has not read the cluster's state yet."""
    return _unavailable("The gateway is starting. Try again in a second.", "gateway_starting", 1)


def engine_failed(model: str) -> ApiError:
    """502: the engine took the request and ended before it answered."""
    return ApiError(
        HTTPStatus.BAD_GATEWAY,
        f"The pod that answered for `{model}` ended before its answer was complete. The request is not repeated by the"
        " gateway, since it had started; send it again.",
        code="engine_failed",
        type_="server_error",
    )


def wrong_model(model: str) -> ApiError:
    """502: the engine's reply names another model; it is not passed on."""
    return ApiError(
        HTTPStatus.BAD_GATEWAY,
        f"The engine answered with another model than `{model}`. The answer was discarded.",
        code="wrong_model",
        type_="server_error",
    )


def internal() -> ApiError:
    """500: a fault of the gateway."""
    return ApiError(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        "The gateway failed to handle the request. Its log has the request id of this answer.",
        code="internal_error",
        type_="server_error",
    )
