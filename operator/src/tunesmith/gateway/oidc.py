"""API keys from tokens of an OpenID Connect issuer: signed JWTs with an issuer, an audience and a claim of namespaces.

The issuer's public keys are read from its discovery document, with bounds, and read again every ten minutes or when a
token names an unknown one, at most once in half a minute. A token's checks are remembered until it expires or the keys
change.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import jwt
import orjson

from tunesmith.contracts.apikey import ApiKey
from tunesmith.gateway import errors
from tunesmith.gateway.broadcast import Broadcast, wait_for_event

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tunesmith.gateway.issuer import OidcSettings

LOG = logging.getLogger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Signatures with a key pair. A secret of client and issuer, or no signature, is never accepted."""
LEEWAY_SECONDS = 30
"""Difference of clocks that is accepted."""
REFRESH_SECONDS = 600.0
MIN_REFRESH_SECONDS = 30.0
_FETCH_SECONDS = 5.0
_MAX_DOCUMENT_BYTES = 256 * 1024
_MAX_KEYS = 64
_MAX_TOKEN = 8192
_MAX_TOKENS = 10_000
_MAX_NAMESPACES = 64
_MAX_SUBJECT = 200
_KEY_TYPES = frozenset({"RSA", "EC", "OKP"})
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBJECT = re.compile(r"[A-Za-z0-9._@:|/+=-]+")
_DISCOVERY = "/.well-known/openid-configuration"


class _PublicKey(NamedTuple):
    """A key of the issuer; `algorithm` is None if any that fits its type may be used."""

    algorithm: str | None
    key: Any
    document: bytes


class _IssuerError(Exception):
    """The issuer's keys cannot be read; the text is the reason."""


class TokenVerifier:
    """The keys of an issuer, and the tokens that were checked with them.

    Args:
        settings: what a token must have.
        session: makes the requests to the issuer.
        clock: monotonic seconds.
        wall_clock: Unix time in seconds.
    """

    def __init__(
        self,
        settings: OidcSettings,
        session: aiohttp.ClientSession,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._session = session
        self._clock = clock
        self._wall_clock = wall_clock
        self._keys: dict[str, _PublicKey] = {}
        self._tokens: OrderedDict[bytes, tuple[float, ApiKey]] = OrderedDict()
        self._fetched_at = float("-inf")
        self._wanted = asyncio.Event()
        self._attempted = Broadcast()

    @staticmethod
    def accepts(presented: str) -> bool:
        """Return True if what a client presents has the form of a signed JWT."""
        return presented.count(".") == 2 and len(presented) <= _MAX_TOKEN  # noqa: PLR2004 - header.claims.signature

    async def find(self, token: str) -> ApiKey:
        """Return the key that a token stands for.

        Raises:
            ApiError: 401, the token is not valid, with the reason; 503, the issuer's keys have never been read.
        """
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        known = self._tokens.get(digest)
        if known is not None:
            if known[0] > self._wall_clock() - LEEWAY_SECONDS:
                return known[1]
            del self._tokens[digest]
        claims = self._claims(token, *await self._key_of(token))
        key = self._api_key(claims)
        self._tokens[digest] = (float(claims["exp"]), key)
        if len(self._tokens) > _MAX_TOKENS:
            self._tokens.popitem(last=False)
        return key

    async def run(self) -> None:
        """Read the issuer's keys until cancelled."""
        was_readable: bool | None = None
        while True:
            self._wanted.clear()
            try:
                keys = await self._fetch()
            except (_IssuerError, aiohttp.ClientError, OSError, ValueError) as error:
                if was_readable is not False:
                    LOG.warning("the keys of the issuer %s cannot be read: %s", self._settings.issuer, error)
                was_readable = False
            else:
                if not was_readable:
                    LOG.info("read %d keys of the issuer %s", len(keys), self._settings.issuer)
                was_readable = True
                if [(name, key.document) for name, key in keys.items()] != [
                    (name, key.document) for name, key in self._keys.items()
                ]:
                    self._tokens.clear()
                self._keys = keys
            self._fetched_at = self._clock()
            self._attempted.notify()
            await asyncio.sleep(MIN_REFRESH_SECONDS if was_readable else 1.0)
            await wait_for_event(self._wanted, REFRESH_SECONDS - MIN_REFRESH_SECONDS)

    async def _key_of(self, token: str) -> tuple[str, _PublicKey]:
        """Return a token's algorithm and the issuer's key that it names.

        Raises:
            ApiError: the token names no key of the issuer, or its keys have never been read.
        """
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError:
            raise errors.invalid_token("it is not a signed JWT") from None
        if header.get("alg") not in ALGORITHMS:
            raise errors.invalid_token(f"its algorithm is not one of {', '.join(ALGORITHMS)}")
        name = str(header.get("kid", ""))
        if name not in self._keys and self._clock() - self._fetched_at >= MIN_REFRESH_SECONDS:
            attempted = self._attempted.next()
            self._wanted.set()
            await wait_for_event(attempted, 2 * _FETCH_SECONDS)
        if not self._keys:
            raise errors.issuer_unreachable()
        key = self._keys.get(name)
        if key is None or key.algorithm not in {None, header["alg"]}:
            raise errors.invalid_token("it is not signed with a key of the issuer")
        return header["alg"], key

    def _claims(self, token: str, algorithm: str, key: _PublicKey) -> dict[str, Any]:
        try:
            return dict(
                jwt.decode(
                    token,
                    key.key,
                    algorithms=[algorithm],
                    audience=self._settings.audience,
                    issuer=self._settings.issuer,
                    leeway=LEEWAY_SECONDS,
                    options={"require": ["exp", "iss", "aud", "sub"]},
                )
            )
        except jwt.ExpiredSignatureError:
            raise errors.invalid_token("it has expired") from None
        except jwt.InvalidAudienceError:
            raise errors.invalid_token("it is for another audience") from None
        except jwt.InvalidIssuerError:
            raise errors.invalid_token("it is from another issuer") from None
        except jwt.ImmatureSignatureError:
            raise errors.invalid_token("it is not valid yet") from None
        except jwt.MissingRequiredClaimError as error:
            raise errors.invalid_token(f"it has no claim `{error.claim}`") from None
        except jwt.PyJWTError:
            raise errors.invalid_token("its signature or a claim is not valid") from None

    def _api_key(self, claims: Mapping[str, Any]) -> ApiKey:
        settings = self._settings
        found = claims.get(settings.namespace_claim)
        namespaces = [found] if isinstance(found, str) else found
        if (
            not isinstance(namespaces, list)
            or not 0 < len(namespaces) <= _MAX_NAMESPACES
            or not all(isinstance(name, str) and _NAMESPACE.fullmatch(name) for name in namespaces)
        ):
            raise errors.invalid_token(f"its claim `{settings.namespace_claim}` is no namespace or list of namespaces")
        subject = str(claims["sub"])
        if len(subject) > _MAX_SUBJECT or not _SUBJECT.fullmatch(subject):
            subject = hashlib.sha256(subject.encode("utf-8", "surrogateescape")).hexdigest()
        return ApiKey(
            name=f"oidc:{subject}",
            digest=b"",
            home=namespaces[0],
            namespaces=frozenset(namespaces),
            models=None,
            requests_per_minute=settings.requests_per_minute,
            tokens_per_day=settings.tokens_per_day,
            max_concurrency=settings.max_concurrency,
        )

    async def _fetch(self) -> dict[str, _PublicKey]:
        issuer = self._settings.issuer
        discovery = await self._get(issuer.rstrip("/") + _DISCOVERY)
        if discovery.get("issuer") != issuer:
            raise _IssuerError(f"its discovery document is that of another issuer than {issuer}")
        uri = discovery.get("jwks_uri")
        if not isinstance(uri, str) or not uri.startswith(issuer.partition(":")[0] + "://"):
            raise _IssuerError("its discovery document has no jwks_uri with the issuer's scheme")
        listed = (await self._get(uri)).get("keys")
        if not isinstance(listed, list):
            raise _IssuerError("its key document has no list `keys`")
        keys = {}
        for document in listed[:_MAX_KEYS]:
            if not isinstance(document, dict) or document.get("kty") not in _KEY_TYPES:
                continue
            name = document.get("kid")
            if document.get("use", "sig") != "sig" or not isinstance(name, str):
                continue
            try:
                key = jwt.PyJWK.from_dict(document).key
                keys[name] = _PublicKey(document.get("alg"), key, orjson.dumps(document))
            except jwt.PyJWTError:
                continue  # of an algorithm that is not supported
        if not keys:
            raise _IssuerError("it has no usable public key with a `kid`")
        return keys

    async def _get(self, url: str) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=_FETCH_SECONDS)
        async with self._session.get(url, timeout=timeout, allow_redirects=False) as response:
            if response.status != 200:  # noqa: PLR2004 - OK
                raise _IssuerError(f"{url} answered {response.status}")
            content = bytearray()
            async for chunk in response.content.iter_any():
                content += chunk
                if len(content) > _MAX_DOCUMENT_BYTES:
                    raise _IssuerError(f"{url} has more than {_MAX_DOCUMENT_BYTES} bytes")
        document = orjson.loads(content)
        if not isinstance(document, dict):
            raise _IssuerError(f"{url} is no JSON object")
        return document
