"""API keys from tokens of an issuer: a real issuer with a discovery document and keys, and a real gateway."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from pydantic import ValidationError

from tests.gateway.gateway_rig import OWN_NAMESPACE, adapter_manifest, eventually, free_ports
from tunesmith.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.gateway.gateway_rig import Rig

    Start = Callable[..., Awaitable[Rig]]

PIRATE = "team/pirate@aaaaaaaaaaaa"
CLAIM = "tunesmith.dev/namespaces"
AUDIENCE = "tunesmith"


class Issuer:
    """An issuer on this machine."""

    def __init__(self) -> None:
        (port,) = free_ports(1)
        self._port = port
        self.url = f"http://127.0.0.1:{port}/realms/main"
        self.names: dict[str, str] = {}
        self.pairs: dict[str, Any] = {}
        self.documents: list[dict[str, Any]] = []
        self.fetched = 0
        self.discovery: dict[str, Any] = {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
        self.add("first", rsa.generate_private_key(65537, 2048), "RS256")

    def add(self, name: str, pair: Any, algorithm: str) -> None:
        implementation = jwt.get_algorithm_by_name(algorithm)
        document = implementation.to_jwk(pair.public_key(), as_dict=True)
        self.pairs[name], self.names[name] = pair, algorithm
        self.documents.append({**document, "kid": name, "use": "sig"})

    async def start(self) -> web.AppRunner:
        application = web.Application()
        application.router.add_get("/realms/main/.well-known/openid-configuration", self._discover)
        application.router.add_get("/realms/main/keys", self._list)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self._port).start()
        return runner

    async def _discover(self, _: web.Request) -> web.Response:
        return web.json_response(self.discovery)

    async def _list(self, _: web.Request) -> web.Response:
        self.fetched += 1
        return web.json_response({"keys": self.documents})

    def token(self, kid: str = "first", *, header: dict[str, Any] | None = None, **changes: Any) -> str:
        now = int(time.time())
        claims = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": "alice@example.com",
            "exp": now + 3600,
            "iat": now,
            CLAIM: "team",
        } | changes
        claims = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(claims, self.pairs[kid], self.names[kid], headers={"kid": kid, **(header or {})})


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    issuer = Issuer()
    runner = await issuer.start()
    yield issuer
    await runner.cleanup()


async def gateway(start: Start, issuer: Issuer, **settings: Any) -> Rig:
    rig = await start(
        oidc_issuer=issuer.url, oidc_audience=AUDIENCE, oidc_namespace_claim=CLAIM, hold_seconds=0.5, **settings
    )
    for namespace in ("team", "other"):
        rig.watches.put(adapter_manifest("pirate", namespace))
    await rig.add_pod(PIRATE, "other/pirate@aaaaaaaaaaaa")
    await eventually(lambda: rig.gateway._tokens is not None and rig.gateway._tokens._keys, "the keys are read")
    return rig


async def test_a_token_may_call_the_models_of_its_namespaces(start: Start, issuer: Issuer) -> None:
    rig = await gateway(start, issuer)
    one, two = issuer.token(), issuer.token(**{CLAIM: ["other", "team"]})
    assert (await rig.chat("pirate", key=one))[1]["model"] == PIRATE
    assert (await rig.chat("other/pirate", key=one))[0] == 404
    assert (await rig.chat("pirate", key=two))[1]["model"] == "other/pirate@aaaaaaaaaaaa"
    assert (await rig.chat("team/pirate", key=two))[0] == 200
    assert (await rig.chat("pirate"))[0] == 200, "API keys are valid beside tokens"
    assert issuer.fetched == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"exp": 1_700_000_000}, "it has expired"),
        ({"exp": None}, "it has no claim `exp`"),
        ({"nbf": 4_000_000_000}, "it is not valid yet"),
        ({"aud": "another"}, "it is for another audience"),
        ({"aud": None}, "it has no claim `aud`"),
        ({"iss": "https://evil.example.com"}, "it is from another issuer"),
        ({"sub": None}, "it has no claim `sub`"),
        ({CLAIM: None}, "its claim `tunesmith.dev/namespaces` is no namespace"),
        ({CLAIM: []}, "is no namespace"),
        ({CLAIM: ["team", 1]}, "is no namespace"),
        ({CLAIM: "Team/../other"}, "is no namespace"),
        ({CLAIM: ["team"] * 100}, "is no namespace"),
    ],
)
async def test_a_token_with_wrong_claims_is_refused(
    start: Start, issuer: Issuer, changes: dict[str, Any], reason: str
) -> None:
    rig = await gateway(start, issuer)
    status, answer = await rig.chat("pirate", key=issuer.token(**changes))
    assert (status, answer["error"]["code"]) == (401, "invalid_token")
    assert reason in answer["error"]["message"]
    assert rig.pods[0].seen == []


async def test_a_forged_token_is_refused(start: Start, issuer: Issuer) -> None:
    rig = await gateway(start, issuer)
    valid = issuer.token()
    header, claims, signature = valid.split(".")
    claims_of_valid = jwt.decode(valid, options={"verify_signature": False})
    other = rsa.generate_private_key(65537, 2048)
    public = rig.gateway._tokens._keys["first"].document  # type: ignore[union-attr]
    forged = {
        "another key": jwt.encode(claims_of_valid, other, "RS256", headers={"kid": "first"}),
        "no signature": jwt.encode(claims_of_valid, None, "none", headers={"kid": "first"}),
        "the public key as a secret": jwt.encode(claims_of_valid, public * 2, "HS256", headers={"kid": "first"}),
        "unknown key": jwt.encode(claims_of_valid, other, "RS256", headers={"kid": "second"}),
        "no key": jwt.encode(claims_of_valid, other, "RS256"),
        "key in the token": jwt.encode(
            claims_of_valid, other, "RS256", headers={"jku": "http://127.0.0.1:1/keys", "kid": "x"}
        ),
        "cut signature": f"{header}.{claims}.{signature[:-4]}",
        "no claims": f"{header}..{signature}",
        "not base64": "a.b.c",
        "empty": "..",
    }
    for what, token in forged.items():
        status, answer = await rig.chat("pirate", key=token)
        assert (status, answer["error"]["code"]) == (401, "invalid_token"), what
    assert rig.pods[0].seen == []
    assert issuer.fetched == 1, "unknown keys do not make the gateway ask the issuer more than once in half a minute"


@pytest.mark.parametrize(
    ("algorithm", "make"),
    [
        ("RS512", lambda: rsa.generate_private_key(65537, 2048)),
        ("PS256", lambda: rsa.generate_private_key(65537, 2048)),
        ("ES256", lambda: ec.generate_private_key(ec.SECP256R1())),
        ("EdDSA", ed25519.Ed25519PrivateKey.generate),
    ],
)
async def test_signatures_of_several_algorithms(
    start: Start, issuer: Issuer, algorithm: str, make: Callable[[], Any]
) -> None:
    issuer.add("another", make(), algorithm)
    rig = await gateway(start, issuer)
    assert (await rig.chat("pirate", key=issuer.token("another")))[0] == 200


async def test_new_keys_of_the_issuer_replace_the_old_ones(
    start: Start, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.gateway.oidc.MIN_REFRESH_SECONDS", 0.1)
    rig = await gateway(start, issuer)
    old = issuer.token()
    assert (await rig.chat("pirate", key=old))[0] == 200
    issuer.documents.clear()
    issuer.add("second", rsa.generate_private_key(65537, 2048), "RS256")
    new = issuer.token("second")
    async with asyncio.timeout(120):
        while (await rig.chat("pirate", key=new))[0] != 200:  # noqa: ASYNC110 - polls a gateway
            await asyncio.sleep(0.05)
    assert (await rig.chat("pirate", key=old))[0] == 401, "also a token that was checked before"


async def test_an_issuer_that_does_not_answer_disables_tokens_only(start: Start) -> None:
    issuer = Issuer()
    rig = await start(oidc_issuer=issuer.url, oidc_audience=AUDIENCE, oidc_namespace_claim=CLAIM, hold_seconds=0.5)
    rig.watches.put(adapter_manifest("pirate"))
    await rig.add_pod(PIRATE)
    status, answer = await rig.chat("pirate", key=issuer.token())
    assert (status, answer["error"]["code"]) == (503, "issuer_unreachable")
    assert (await rig.chat("pirate"))[0] == 200
    runner = await issuer.start()
    async with asyncio.timeout(120):
        while (await rig.chat("pirate", key=issuer.token()))[0] != 200:  # noqa: ASYNC110 - polls a gateway
            await asyncio.sleep(0.05)
    await runner.cleanup()
    assert (await rig.chat("pirate", key=issuer.token()))[0] == 200, "known keys stay valid"


@pytest.mark.parametrize(
    "discovery",
    [
        {"issuer": "https://evil.example.com"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": None},
        {"padding": "x" * 300_000},
    ],
)
async def test_a_wrong_discovery_document_is_not_used(start: Start, issuer: Issuer, discovery: dict[str, Any]) -> None:
    issuer.discovery |= discovery
    rig = await start(oidc_issuer=issuer.url, oidc_audience=AUDIENCE, oidc_namespace_claim=CLAIM)
    assert (await rig.chat("pirate", key=issuer.token()))[0] == 503
    assert issuer.fetched == 0


async def test_limits_of_a_subject(start: Start, issuer: Issuer) -> None:
    rig = await gateway(start, issuer, oidc_requests_per_minute=2, oidc_tokens_per_day=1000, oidc_max_concurrency=3)
    alice, again, bob = issuer.token(), issuer.token(jti="2"), issuer.token(sub="bob")
    assert [(await rig.chat("pirate", key=key))[0] for key in (alice, again, alice, bob)] == [200, 200, 429, 200]
    assert (await rig.chat("pirate", key=bob, n=4))[1]["error"]["code"] == "too_many_sequences"
    carol = issuer.token(sub="carol " * 100)
    assert (await rig.chat("pirate", key=carol, max_tokens=2000))[1]["error"]["code"] == "too_many_tokens"


def test_an_issuer_needs_an_audience_and_a_claim() -> None:
    with pytest.raises(ValidationError, match="set both, or remove --oidc-issuer"):
        GatewaySettings(namespace=OWN_NAMESPACE, oidc_issuer="https://login.example.com", oidc_audience="a")
