"""B. Hostile requests, from holders of a key and from anyone who can connect to the gateway."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from openai import APIStatusError, OpenAI

from e2e.attacks.stage import (
    HOSTILE,
    PLATFORM,
    Stage,
    gateway_log,
    gateway_processes,
    gateway_restarts,
)
from e2e.attacks.wire import CHAT, COMPLETIONS, Client, Reply, status_of
from e2e.containers import PeakMemory
from e2e.installation import condition, get, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from e2e.attacks.trial import Trial
    from e2e.installation import Object

MEMORY_LIMIT = 512 * 2**20
"""Memory limit of the gateway's container, as installed by the demo."""
PLAIN = "plain"
"""Valid adapter of the hostile tenant."""
HI = [{"role": "user", "content": "Say hi."}]


@pytest.fixture
def client(stage: Stage) -> Client:
    return Client(stage.gateway, stage.hostile_key)


@pytest.fixture(scope="module")
def plain(stage: Stage) -> Iterator[str]:
    """Return the global id of a valid adapter that the hostile tenant serves from the shared pool."""
    stage.publish(PLAIN, stage.template.folder)
    stage.deploy(PLAIN, replicas=2)
    until(
        f"{PLAIN} is ready",
        lambda: condition(get("adapterdeployment", PLAIN, HOSTILE), "Ready")["status"] == "True",
        120,
    )
    yield f"{HOSTILE}/{PLAIN}"
    stage.remove(PLAIN)


def chat(model: str, **more: Any) -> Object:  # noqa: ANN401 - any parameter of the API
    return {"model": model, "messages": HI, "max_tokens": 4, "temperature": 0, **more}


def completion(model: str, **more: Any) -> Object:  # noqa: ANN401 - any parameter of the API
    return {"model": model, "prompt": "Say hi.", "max_tokens": 4, "temperature": 0, **more}


def codes(replies: list[Reply]) -> str:
    """Return the number of replies with each status."""
    found: dict[int, int] = {}
    for reply in replies:
        found[reply.status] = found.get(reply.status, 0) + 1
    return ", ".join(f"{count} × {status}" for status, count in sorted(found.items()))


@contextmanager
def gateway_memory(trial: Trial) -> Iterator[None]:
    """Compare the gateway's peak memory while the block runs with its limit."""
    restarts = gateway_restarts()
    with PeakMemory(gateway_processes) as peak:
        yield
    trial.observe(f"gateway {peak}")
    assert peak.bytes < MEMORY_LIMIT * 0.9, f"the gateway's memory rose: {peak}"
    assert gateway_restarts() == restarts


PARAMETERS: list[tuple[str, str, Object]] = [
    ("logprobs", CHAT, {"logprobs": True, "top_logprobs": 2}),
    ("logprobs", COMPLETIONS, {"logprobs": 2}),
    ("prompt_logprobs", CHAT, {"prompt_logprobs": 2}),
    ("prompt_logprobs", COMPLETIONS, {"prompt_logprobs": 2}),
    ("echo with logprobs", COMPLETIONS, {"echo": True, "logprobs": 1}),
    ("echo", COMPLETIONS, {"echo": True}),
    ("beam search", CHAT, {"use_beam_search": True, "n": 2}),
    ("beam search", COMPLETIONS, {"use_beam_search": True, "n": 2}),
    ("n", CHAT, {"n": 2, "temperature": 1}),
    ("penalties", CHAT, {"presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.1}),
    ("top_p, top_k, min_p, seed", CHAT, {"temperature": 1, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "seed": 1}),
    ("logit_bias", CHAT, {"logit_bias": {"5": 10}}),
    ("bad_words, stop", CHAT, {"bad_words": ["hi"], "stop": ["x"], "include_stop_str_in_output": True}),
    ("min_tokens", CHAT, {"min_tokens": 2, "ignore_eos": True}),
    ("allowed_token_ids", CHAT, {"allowed_token_ids": [5, 6, 7]}),
    ("response_format", CHAT, {"response_format": {"type": "json_object"}}),
    ("structured_outputs", CHAT, {"structured_outputs": {"choice": ["yes", "no"]}}),
    ("truncate_prompt_tokens", CHAT, {"truncate_prompt_tokens": 4}),
    ("return_token_ids", CHAT, {"return_token_ids": True}),
    ("suffix", COMPLETIONS, {"suffix": "end"}),
    ("prompts of token ids", COMPLETIONS, {"prompt": [1, 2, 3]}),
    ("several prompts", COMPLETIONS, {"prompt": ["a", "b"]}),
    ("prompt_embeds", COMPLETIONS, {"prompt_embeds": "AAAA"}),
    ("a chat template", CHAT, {"chat_template": "{% for a in range(10**9) %}{% endfor %}"}),
    ("image by URL", CHAT, {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}}]}]}),
]  # fmt: skip


@pytest.mark.attack("B1", "each documented parameter of vLLM's API, base and adapter, alone and four at once")
def test_parameters(stage: Stage, trial: Trial, client: Client, plain: str) -> None:
    restarts = stage.restarts()
    outcomes: dict[str, set[int]] = {}
    with trial.attack(tolerance=8, reason="four beam searches at once shared two cores with the victim"):
        for name, path, more in PARAMETERS:
            for model in (stage.base_model, plain):
                make = chat if path == CHAT else completion
                for count in (1, 4):
                    replies = client.post(path, make(model, **more), count=count)
                    bad = [reply for reply in replies if reply.status not in {200, 400}]
                    assert not bad, f"{name} of {path} on {model}: {bad[0].status} {bad[0].error}"
                    outcomes.setdefault(name, set()).update(reply.status for reply in replies)
        assert stage.restarts() == restarts, "an engine was restarted"
    refused = sorted(name for name, found in outcomes.items() if found == {400})
    trial.observe(f"{len(outcomes)} parameters, no engine died; refused with 400: {', '.join(refused) or 'none'}")


@pytest.mark.attack("B1", "one call of the openai client with its default retries, of what used to end an engine")
def test_openai_retries(stage: Stage, trial: Trial, plain: str) -> None:
    restarts = stage.restarts()
    with trial.attack(), OpenAI(base_url=f"{stage.gateway}/v1", api_key=stage.hostile_key, timeout=60) as openai:
        for more in ({"logprobs": True, "top_logprobs": 2}, {"extra_body": {"prompt_logprobs": 1}}):
            status = 200
            try:
                openai.chat.completions.create(model=plain, messages=HI, max_tokens=2, **more)  # type: ignore[call-overload]
            except APIStatusError as error:
                status = error.status_code
                trial.observe(f"{status} {error.message}"[:120])
            assert status in {200, 400}
        assert stage.restarts() == restarts


@pytest.mark.attack("B2", "n of 1,000, best_of, and a thousand prompts in one request")
def test_thousand_choices(stage: Stage, trial: Trial, client: Client) -> None:
    bodies = [
        (CHAT, chat(stage.base_model, n=1000, temperature=1, max_tokens=64)),
        (COMPLETIONS, completion(stage.base_model, prompt=["a"] * 1000, max_tokens=64)),
        (COMPLETIONS, completion(stage.base_model, n=100, prompt=["a"] * 100, max_tokens=64, temperature=1)),
    ]
    with trial.attack():
        for path, body in bodies:
            reply = client.post_once(path, body)
            trial.observe(f"{reply.status} {reply.error}")
            assert reply.status in {400, 429}, f"{reply.status} after {reply.seconds:.1f} s"


@pytest.mark.attack("B3", "15 bodies of 4 MiB of nested empty lists at once")
def test_nested_lists(stage: Stage, trial: Trial, client: Client) -> None:
    body = b'{"model":"' + stage.base_model.encode() + b'","messages":[' + b"[]," * (2**20 + 2**18) + b"[]]}"
    with trial.attack(), gateway_memory(trial):
        replies = client.post(CHAT, body, count=15)
        trial.observe(codes(replies))
        assert all(reply.status in {400, 413, 429, 503} for reply in replies), codes(replies)


@pytest.mark.attack("B3", "100 bodies of 4 MiB that never end")
def test_unfinished_bodies(trial: Trial, client: Client) -> None:
    part = client.head(4 * 2**20) + b'{"model":"x","messages":"' + b"a" * (4 * 2**20 - 100)

    async def send() -> list[bytes]:
        return await asyncio.gather(*(client.raw(part, 12) for _ in range(100)))

    with trial.attack(), gateway_memory(trial):
        answers = asyncio.run(send())
    refused = [status_of(answer) for answer in answers if answer]
    trial.observe(f"{len(refused)} of 100 refused at once ({sorted(set(refused))}), the rest waited for")


@pytest.mark.attack("B3", "120 plain bodies of 4 MiB in flight")
def test_plain_bodies(stage: Stage, trial: Trial, client: Client) -> None:
    body = json.dumps(chat(stage.base_model, messages=[{"role": "user", "content": "word " * (800 * 1024)}])).encode()
    with trial.attack(), gateway_memory(trial):
        replies = client.post(CHAT, body, count=120, timeout=60)
        trial.observe(codes(replies))
        assert not [reply for reply in replies if reply.status in {500, 502}], codes(replies)


IDLE = """
import socket, sys, time
address = socket.gethostbyname(sys.argv[1])
held, refused = [], 0
for _ in range(2000):
    made = socket.socket(); made.settimeout(2)
    try:
        made.connect((address, int(sys.argv[2]))); held.append(made)
    except OSError:
        refused += 1; made.close()
time.sleep(3)
closed = 0
for made in held:
    made.setblocking(False)
    try:
        closed += made.recv(1) == b""
    except BlockingIOError:
        pass
    except OSError:
        closed += 1
print(f"{refused} not accepted, {closed} closed at once, {len(held) - closed} left open")
begin = time.monotonic()
while time.monotonic() - begin < 35 and len(held) > 0:
    for made in held[:]:
        try:
            if made.recv(1) == b"": held.remove(made)
        except BlockingIOError:
            pass
        except OSError:
            held.remove(made)
    time.sleep(0.5)
print(f"{len(held)} open after {time.monotonic() - begin + 3:.0f} s")
"""


@pytest.mark.attack("B3", "2,000 connections from one pod that never send a header")
def test_idle_connections(stage: Stage, trial: Trial) -> None:
    with stage.attacker_pod() as execute, trial.attack(), gateway_memory(trial):
        printed = execute(IDLE, "tunesmith-gateway.tunesmith-system.svc", "80")
        trial.observe(" then ".join(printed.split("\n")))
    assert "\n0 open after" in f"\n{printed}", printed


@pytest.mark.attack("B4", "JSON nested 300 and 100,000 deep")
def test_deep_json(stage: Stage, trial: Trial, client: Client) -> None:
    began = time.monotonic()
    with trial.attack():
        for depth in (300, 100_000):
            deep = b"[" * depth + b"]" * depth
            reply = client.post_once(CHAT, b'{"model":"' + stage.base_model.encode() + b'","messages":' + deep + b"}")
            trial.observe(f"{depth}: {reply.status} {reply.error}")
            assert reply.status == 400
    assert "Traceback" not in gateway_log(int(time.monotonic() - began) + 2)


MALFORMED = (
    b"POST /v1/chat/completions HTTP/1.1\nHost: x\nAuthorization: Bearer %KEY%\nContent-Length: 2\n\n{}",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %KEY%\nContent-Length: 2\r\n\r\n{}",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization : Bearer %KEY%\r\n\r\n",
    b"GET /v1/models\r\nAuthorization: Bearer %KEY%\r\n\r\n",
    b"GET /v1/models HTTP/9.9\r\nAuthorization: Bearer %KEY%\r\n\r\n",
    b"Bearer %KEY%\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %KEY%\r\nContent-Length: x\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nAuthorization: Bearer %KEY%\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /v1/models?key=%KEY% HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20000 + b"\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03%KEY%\r\n\r\n",
)


@pytest.mark.attack("B5", "malformed requests that hold a whole API key: bare line feeds, bad lengths, TLS bytes")
def test_malformed_requests(trial: Trial, client: Client) -> None:
    began = time.monotonic()

    async def send() -> list[bytes]:
        key = client.key.encode()
        return [await client.raw(data.replace(b"%KEY%", key), 2) for data in MALFORMED for _ in range(3)]

    with trial.attack():
        answers = asyncio.run(send())
        trial.observe(f"statuses {sorted({status_of(answer) for answer in answers})}")
    log = gateway_log(int(time.monotonic() - began) + 2)
    assert client.key not in log, "the API key is in the gateway's log"
    assert client.key.removeprefix("sk-ts-")[:16] not in log, "a part of the API key is in the gateway's log"
    assert "Traceback" not in log, log[log.index("Traceback") :][:300]
    assert not any(client.key.encode() in answer for answer in answers), "an answer echoes the API key"


@pytest.mark.attack("B6", "types that vLLM takes for true and the token count does not: stream of 1, yes and others")
def test_stream_types(stage: Stage, trial: Trial, client: Client) -> None:
    with trial.attack():
        for value in (1, "yes", "true", 1.0, [True]):
            reply = client.post_once(CHAT, chat(stage.base_model, stream=value))
            assert reply.status == 400, f"stream of {value!r}: {reply.status}"
            trial.observe(reply.error)


@pytest.mark.attack("B6", "30 streams whose clients disconnect after half a second")
def test_clients_that_leave(stage: Stage, trial: Trial, client: Client) -> None:
    body = chat(stage.base_model, stream=True, max_tokens=900, ignore_eos=True)

    async def send() -> list[bytes]:
        return await asyncio.gather(*(client.leave(body, 0.5) for _ in range(30)))

    with trial.attack(tolerance=6, reason="until they disconnected, 30 streams shared two cores with the victim"):
        answers = asyncio.run(send())
        trial.observe(f"statuses {sorted({status_of(answer) for answer in answers})}")
    with trial.attack():  # after they have disconnected, none of their requests may still run
        time.sleep(1)


@pytest.mark.attack("B7", "a tenant repeats another tenant's prompt, to find out whether it is in the cache")
def test_cache_timing(stage: Stage, trial: Trial, client: Client) -> None:
    victim = Client(stage.gateway, stage.victims_key)

    def response_seconds(sender: Client, text: str) -> float:
        reply = sender.post_once(
            COMPLETIONS, {"model": stage.base_model, "prompt": text, "max_tokens": 1, "temperature": 0}
        )
        assert reply.status == HTTPStatus.OK, reply.error
        return reply.seconds

    def prompt(number: int) -> str:
        return " ".join(f"record {number} of line {line}" for line in range(40))

    with trial.attack(tolerance=8, reason="28 prompts of 300 tokens shared two cores with the victim"):
        fresh = [response_seconds(client, prompt(number)) for number in range(4)]
        own = [min(response_seconds(client, prompt(number)) for _ in range(3)) for number in range(4)]
        probed = []
        for number in range(100, 104):
            for _ in range(3):
                response_seconds(victim, prompt(number))
            probed.append(response_seconds(client, prompt(number)))
    middle = sorted(fresh)[len(fresh) // 2]
    trial.observe(f"fresh {middle:.2f} s, own prompt again {min(own):.2f} s, another tenant's {min(probed):.2f} s")
    assert min(probed) > 0.6 * min(fresh), "the response time reveals another tenant's prompt"


@pytest.mark.attack("B9", "the time until a stream's headers, and whether proxies may buffer it")
def test_stream_head(stage: Stage, trial: Trial, client: Client) -> None:
    text = " ".join(f"item {number}" for number in range(120))
    body = json.dumps(
        chat(stage.base_model, stream=True, messages=[{"role": "user", "content": text}], max_tokens=2)
    ).encode()

    async def times() -> tuple[float, float, bytes]:
        address = urlsplit(stage.gateway)
        begin = time.monotonic()
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            writer.write(client.head(len(body)) + body)
            head = await reader.readuntil(b"\r\n\r\n")
            assert status_of(head) == HTTPStatus.OK, head
            at_head = time.monotonic() - begin
            while b"data:" not in (line := await reader.readline()):
                assert line, "the stream closed without an event"
            return at_head, time.monotonic() - begin, head
        finally:
            writer.close()

    with trial.attack(tolerance=3, reason="a prompt of 400 tokens shared a core with the victim"):
        at_head, at_token, head = asyncio.run(times())
        trial.observe(f"head after {at_head:.2f} s, first event after {at_token:.2f} s")
    lines = head.lower()
    assert b"x-accel-buffering: no" in lines
    assert b"cache-control: no-cache" in lines
    assert at_head < 0.7 * at_token or at_head < 0.2


@pytest.mark.attack("B8", "a pool that sends SSE comments (--sse-keep-alive-interval) before the first event")
def test_sse_comments(single: Object, trial: Trial, client: Client) -> None:
    model = f"{PLATFORM}/{single['spec']['modelName']}"
    with trial.attack(tolerance=4, reason="six long prompts shared two cores with the victim"):
        text = " ".join(f"item {number}" for number in range(120))
        body = {"model": model, "stream": True, "max_tokens": 30, "messages": [{"role": "user", "content": text}]}
        replies = client.post(CHAT, body, count=6)
        trial.observe(f"{codes(replies)}, {sum(b': ' in reply.body for reply in replies)} with comments")
        assert all(reply.status == 200 and b"[DONE]" in reply.body for reply in replies), replies[0].error


@pytest.mark.attack("B10", "/health and / on the clients' port, without a key")
def test_health(stage: Stage, trial: Trial) -> None:
    def status(path: str) -> int:
        connection = http.client.HTTPConnection(stage.gateway.removeprefix("http://"), timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        finally:
            connection.close()

    with trial.attack():
        found = {path: status(path) for path in ("/health", "/v1/models")}
        trial.observe(found)
        assert found == {"/health": 200, "/v1/models": 401}
