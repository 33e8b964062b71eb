"""Preparation of a client's request: authenticate, parse, resolve."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestPayloadError

from tunesmith.gateway import errors
from tunesmith.gateway.affinity import conversation
from tunesmith.gateway.body import parse
from tunesmith.gateway.keys import ExpiredKeyError
from tunesmith.gateway.reply import ANSWER_BYTES, EventReply
from tunesmith.gateway.split import MAX_SESSION_BYTES
from tunesmith.gateway.usage import AnswerUsage, estimated_prompt_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.contracts.agent import Keys
    from tunesmith.contracts.apikey import ApiKey
    from tunesmith.gateway.apis import Api
    from tunesmith.gateway.backends import Backend
    from tunesmith.gateway.body import Body
    from tunesmith.gateway.budget import Share
    from tunesmith.gateway.catalog import Catalog, Model
    from tunesmith.gateway.fairness import Tenant
    from tunesmith.gateway.keys import KeyTable
    from tunesmith.gateway.limits import Limits
    from tunesmith.gateway.mirror import Mirror
    from tunesmith.gateway.oidc import TokenVerifier
    from tunesmith.gateway.tracing import RequestTrace

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,64}")
_SECRET_KEY_PREFIX = "sk-"  # noqa: S105 - not a key
_SESSION_HEADER = "X-Session-ID"
_ENCODINGS = frozenset({"", "identity", "gzip", "deflate"})


@dataclass(slots=True)
class Call:
    """A request to a model.

    Attributes:
        api: the API that the client calls.
        body: the parsed body; its bytes are released once a pod's answer has begun.
        share: its bytes in the budget.
        events: the stream to the client, if it requested one.
        started: True while a pod may process it.
        answered: True once a part of a pod's answer was sent to the client.
        engine_name: revision to which it was sent last; empty: none yet.
        pod: `<namespace>/<name>` of the pod to which it was sent last; empty: none yet.
        first_byte_seconds: time from its arrival to the first byte of a pod's answer; None: none yet.
        usage: counts the answer's tokens.
        mirror: gets the answer if the request is mirrored to a shadow afterwards.
        first_token_seconds: the same to the first event of a stream that depends on a token; None: none yet.
        point: chooses its revision during a rollout; None: not needed yet.
        place: pod on which it has a place, its key and the number of places.
        conversation: identity of the conversation, by which its turns reach the same pod.
        trace: its trace; None: traces are off.
        lost_on: UID of the pod whose engine died while it processed the request; it is sent to another pod once.
    """

    request: web.BaseRequest
    request_id: str
    key: ApiKey
    model: Model
    api: Api
    body: Body
    share: Share
    cache_salt: str
    events: EventReply | None
    arrived: float
    usage: AnswerUsage
    started: bool = False
    answered: bool = False
    lost_on: str = ""
    first_token_seconds: float | None = None
    point: float | None = None
    engine_name: str = ""
    pod: str = ""
    first_byte_seconds: float | None = None
    mirror: Mirror | None = None
    place: tuple[Backend, Tenant, int] | None = None
    conversation: bytes = b""
    trace: RequestTrace | None = None

    def session(self) -> bytes:
        """Return the name of its session: its header X-Session-ID, or the string `user` in its body; empty: none."""
        header = self.request.headers.get(_SESSION_HEADER, "")
        if header:
            return header.encode("utf-8", "surrogateescape")
        user = bytes(memoryview(self.body.members.get("user", b""))[:MAX_SESSION_BYTES])
        return user if user.startswith(b'"') and user != b'""' else b""

    def read_body(self, piece: bytes | bytearray) -> None:
        """Read the next piece of an answer that is not a stream."""
        self.usage.read_body(piece)
        if self.mirror is not None:
            self.mirror.read(piece)

    def begin_answer(self) -> None:
        """Record that the client gets a pod's answer from now on, and release the bytes of the body."""
        self.answered = True
        self.body = self.body.without_members()
        self.share.set_to(ANSWER_BYTES)


class RequestReader:
    """Reader of clients' requests.

    Args:
        gateway_keys: returns the gateway's keys, from which the salts of the prefix cache are derived.
        keys: the valid API keys.
        tokens: checks tokens of an OpenID Connect issuer; None: there is none.
        catalog: the models.
        limits: bounds of a body.
        clock: monotonic seconds.
        synced: returns True if keys and catalog have been read completely.
        closing: returns True once the process shuts down.
    """

    def __init__(
        self,
        gateway_keys: Callable[[], Keys],
        keys: KeyTable,
        tokens: TokenVerifier | None,
        catalog: Catalog,
        limits: Limits,
        *,
        clock: Callable[[], float],
        synced: Callable[[], bool],
        closing: Callable[[], bool],
    ) -> None:
        self._gateway_keys = gateway_keys
        self._keys = keys
        self._tokens = tokens
        self._catalog = catalog
        self._limits = limits
        self._clock = clock
        self._synced = synced
        self._closing = closing

    async def authenticate(self, request: web.BaseRequest) -> ApiKey:
        """Return the API key of a request, or that for which its token stands.

        Raises:
            ApiError: the request has no valid key or an expired one, or the gateway has not read all keys yet.
        """
        presented = presented_key(request)
        if self._tokens is not None and self._tokens.accepts(presented):
            return await self._tokens.find(presented)
        try:
            key = self._keys.find(presented)
        except ExpiredKeyError:
            raise errors.expired_key() from None
        if key is None:
            raise errors.invalid_key() if self._synced() else errors.starting()
        return key

    async def read(
        self, request: web.BaseRequest, request_id: str, api: Api, key: ApiKey, share: Share, arrived: float
    ) -> Call:
        """Read and resolve a request.

        Raises:
            ApiError: the body cannot be read or is not valid, or the key may not call the model.
            ConnectionError: the client closed its connection.
        """
        share.reserve(ANSWER_BYTES)
        body = parse(await read_body(request, share, self._limits), self._limits.max_sequences, api)
        model = self._resolve(body, key)
        events = None
        if body.stream:
            events = EventReply(request, request_id, share, self._limits, clock=self._clock, closing=self._closing)
        salt = cache_salt(self._gateway_keys()[0], key.home)
        chat = conversation(model.id, body.members, salt)
        body, hide = body.with_usage() if api.usage_option else (body, False)
        usage = AnswerUsage(estimated_prompt_tokens(body), hide=hide)
        return Call(request, request_id, key, model, api, body, share, salt, events, arrived, usage, conversation=chat)

    def _resolve(self, body: Body, key: ApiKey) -> Model:
        try:
            return self._catalog.resolve(body.model, key)
        except errors.ApiError:
            if self._synced():
                raise
            raise errors.starting() from None


def request_id(request: web.BaseRequest) -> str:
    """Return the client's id of the request if it is valid in a log line and a header, otherwise a new id."""
    requested = request.headers.get("X-Request-Id", "")
    if _REQUEST_ID.fullmatch(requested) and _SECRET_KEY_PREFIX not in requested:
        return requested
    return secrets.token_hex(8)


def presented_key(request: web.BaseRequest) -> str:
    """Return the API key or token that a request presents. Anthropic's clients send it as `x-api-key`.

    Raises:
        ApiError: the request has no key.
    """
    scheme, _, presented = request.headers.get("Authorization", "").partition(" ")
    presented = presented.strip() if scheme.lower() == "bearer" else ""
    presented = presented or request.headers.get("x-api-key", "").strip()
    if not presented:
        raise errors.missing_key()
    return presented


def require(request: web.BaseRequest, *methods: str) -> None:
    """Raise unless the request has one of the methods.

    Raises:
        ApiError: 405.
    """
    if request.method not in methods:
        raise errors.method_not_allowed(request.method, request.rel_url.path, ", ".join(methods))


async def read_body(request: web.BaseRequest, share: Share, limits: Limits) -> bytearray:
    """Return the decompressed body of a request. Its bytes count in the budget as they arrive.

    Raises:
        ApiError: the body is too large, too slow, or not valid.
        ConnectionError: the client closed its connection.
    """
    if request.headers.get("Content-Encoding", "").strip().lower() not in _ENCODINGS:
        raise errors.unsupported_encoding()
    if (request.content_length or 0) > limits.max_body_bytes:
        raise errors.body_too_large(limits.max_body_bytes)
    expectation = request.headers.get("Expect", "").lower()
    if expectation == "100-continue":
        await _send_continue(request)
    elif expectation:
        raise errors.unknown_expectation()
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            while chunk := await request.content.readany():
                if len(body) + len(chunk) > limits.max_body_bytes:
                    raise errors.body_too_large(limits.max_body_bytes)
                share.reserve(len(chunk))
                body += chunk
    except TimeoutError:
        raise errors.body_too_slow(limits.body_seconds) from None
    except (HttpProcessingError, RequestPayloadError, web.HTTPException):
        raise errors.body_unreadable() from None
    return body


async def _send_continue(request: web.BaseRequest) -> None:
    """Send 100 Continue: some clients, such as curl above 1 MiB, wait for it before they send the body."""
    await request.writer.write(b"HTTP/1.1 %d Continue\r\n\r\n" % HTTPStatus.CONTINUE)
    # The interim response does not count as the first bytes of the answer.
    request.writer.output_size = 0


@lru_cache(maxsize=1024)
def cache_salt(gateway_key: bytes, namespace: str) -> str:
    """Return the salt of a namespace's part of the prefix cache, which other namespaces cannot guess."""
    return hmac.new(gateway_key, f"cache-salt/{namespace}".encode(), hashlib.sha256).hexdigest()
