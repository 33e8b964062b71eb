"""Sends mutated requests to a gateway process and checks each answer, the log and the memory.

`make verify-fuzz-gateway` sends 20,000: `python -m tests.gateway.http_fuzzer --requests 20000 --seed 1`.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h11
import uvloop

from tests.gateway.process_rig import MEMORY_LIMIT, MIB, ProcessRig

if TYPE_CHECKING:
    from collections.abc import Callable

_CONNECTIONS = 48
_QUIET_SECONDS = 1.0
"""After this long without a byte, an answer does not come: the request was not complete."""
_OPTIONS = (
    "--hold-seconds=0.1",
    "--header-seconds=1",
    "--body-seconds=1",
    "--log-level=DEBUG",
    "--cors-origins=https://app.example.com",
)
_LARGE_SHARE = 0.01

_WORDS: tuple[bytes, ...] = (
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b'"', b"\\", b"{", b"}", b"[", b"]", b"\xff", b"\xc3\x28",
    b"\xed\xa0\x80", b"1e999", b"-1", b"NaN", b"null", b"\\ud800", b"\\u0000", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0",
    b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"Transfer-Encoding: \x0bchunked\r\n",
    b"Content-Encoding: gzip\r\n", b"Content-Encoding: br\r\n", b"Expect: 100-continue\r\n", b"Expect: nothing\r\n",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n",
    b"Connection: close\r\n", b"Host: a\r\nHost: b\r\n", b"X-Request-Id: %s\r\n", b"X: %s\r\n y: folded\r\n",
    b"Authorization: Bearer %s\r\n", b"%s", b'"model":"%s",', b'"stream":true,', b'"n":1000,', b'"model":7,',
    b"Origin: https://app.example.com\r\n", b"Access-Control-Request-Method: POST\r\n", b"x-api-key: %s\r\n",
)  # fmt: skip
_METHODS = (b"POST",) * 8 + (
    b"GET",
    b"HEAD",
    b"OPTIONS",
    b"PUT",
    b"DELETE",
    b"PATCH",
    b"TRACE",
    b"CONNECT",
    b"po st",
    b"%s",
)
_PATHS = (b"/v1/chat/completions",) * 6 + (
    b"/v1/responses", b"/v1/responses/x/cancel", b"/v1/messages", b"/v1/messages/count_tokens", b"/v1/embeddings",
    b"/v1/score", b"/v1/rerank", b"/tokenize", b"/detokenize", b"/v2/rerank",
    b"/v1/completions", b"/v1/models", b"/v1/models/pirate", b"/v1/models/team%%2Fpirate", b"/v1/models/%%00%%ff",
    b"/", b"/health", b"//v1/chat/completions", b"/v1/chat/completions/", b"/v1/chat%%2fcompletions",
    b"/v1/../v1/completions", b"/v1/completions?key=%s", b"/%s", b"http://x/v1/completions", b"*", b"x:443", b"/\xff",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 1000, 10**30, 0.5, "", "yes", "x\0y", "é☠", [], {}, [[]], [{}], ["a", "b"],
    [1, 2, 3], [[1], [2]], {"a": {"b": []}}, "\ud83d\ude00", "x" * 300,
)  # fmt: skip
_FIELDS = (
    "stream", "n", "best_of", "prompt", "prompt_embeds", "use_beam_search", "messages", "temperature", "cache_salt",
    "stream_options", "tools", "max_tokens", "logprobs", "user", "",
    "input", "documents", "text_1", "text_2", "query", "tokens", "max_output_tokens", "store", "system",
)  # fmt: skip
_MODELS = ("pirate", "team/pirate", "base", "serving/base", "nobody", "", "pi\0rate", "team/pirate@x", "../x", "é" * 80)


@dataclass
class Findings:
    """Answers of the gateway, and faults in them."""

    statuses: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def request(source: random.Random, key: str) -> bytes:
    """Return the bytes of one request, valid or not."""
    body = _body(source, key)
    method = source.choice(_METHODS) if source.random() < 0.3 else b"POST"
    path = source.choice(_PATHS) if source.random() < 0.3 else b"/v1/chat/completions"
    path = path.replace(b"%%", b"\1").replace(b"%s", key.encode()).replace(b"\1", b"%")
    version = source.choice((b"1.0", b"1.1", b"2.0", b"9.9", b"")) if source.random() < 0.05 else b"1.1"
    lines = [
        method.replace(b"%s", key.encode()) + b" " + path + b" HTTP/" + version,
        b"Host: gateway",
        b"Authorization: Bearer " + key.encode(),
        b"Content-Type: application/json",
    ]
    kind = source.random()
    if kind < 0.06:
        body, line = gzip.compress(body), b"Content-Encoding: gzip"
        lines += [line, b"Content-Length: %d" % len(body)]
    elif kind < 0.16:
        lines.append(b"Transfer-Encoding: chunked")
        body = _chunked(source, body)
    else:
        lines.append(b"Content-Length: %d" % len(body))
    if source.random() < 0.03:
        lines += [
            b"X-%d: %s" % (number, b"y" * source.choice((1, 100, 9000))) for number in range(source.choice((1, 200)))
        ]
    data = b"\r\n".join(lines) + b"\r\n\r\n" + body
    if source.random() < 0.5:
        data = _mutated(source, data, key)
    if source.random() < 0.03:
        data *= source.randrange(2, 40)
    return data


def _body(source: random.Random, key: str) -> bytes:
    document: dict[str, Any] = {"model": source.choice(_MODELS) if source.random() < 0.4 else "pirate"}
    for _ in range(source.randrange(5)):
        document[source.choice(_FIELDS)] = source.choice(_VALUES)
    kind = source.random()
    if kind < 0.04:
        depth = source.choice((10, 63, 64, 65, 300, 100_000))
        return b'{"model":"pirate","messages":' + b"[" * depth + b"]" * depth + b"}"
    if kind < 0.04 + _LARGE_SHARE:
        unit = source.choice((b",[]", b',""', b",1", b",{}", b',"\\n"', b',"a,b[c{"'))
        return b'{"model":"pirate","messages":[0' + unit * (4 * MIB // len(unit) - 20) + b"]}"
    if kind < 0.08:
        return source.choice(
            (b"", b"[]", b"null", b'"x"', b"{", key.encode(), b"\xef\xbb\xbf{}", source.randbytes(200))
        )
    if kind < 0.12:
        name = source.choice((b'"model"', b'"mod\\u0065l"', b'"n"', b'"stream"'))
        return (
            json.dumps(document).encode()[:-1] + b"," + name + b":" + source.choice((b'"base"', b"1", b"true")) + b"}"
        )
    return json.dumps(document).encode()


def _chunked(source: random.Random, body: bytes) -> bytes:
    chunks = bytearray()
    extension = source.choice((b"", b"", b";a=b", b";" + b"e" * 20_000))
    size = source.choice((1, 7, 100_000)) if len(body) < 10_000 else 100_000
    for start in range(0, len(body), size):
        chunk = body[start : start + size]
        chunks += b"%x%s\r\n%s\r\n" % (len(chunk), extension if start < 10 else b"", chunk)
    return bytes(chunks + source.choice((b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"0\r\n", b"0\n\n", b"-1\r\n\r\n")))


def _mutated(source: random.Random, data: bytes, key: str) -> bytes:
    mutated = bytearray(data)
    reach = min(len(data), 1000)
    for _ in range(source.randrange(1, 5)):
        place = source.randrange(reach + 1)
        kind = source.randrange(6)
        if kind == 0:
            del mutated[place : place + source.randrange(1, 20)]
        elif kind == 1:
            mutated[place:place] = source.choice(_WORDS).replace(b"%s", key.encode())
        elif kind == 2 and place < len(mutated):
            mutated[place] = source.randrange(256)
        elif kind == 3:
            mutated[place:place] = mutated[source.randrange(reach) :][: source.randrange(200)]
        elif kind == 4:
            mutated = mutated.replace(b"\r\n", b"\n", source.randrange(1, 6))
        else:
            del mutated[len(mutated) - source.randrange(1, 100) :]
    return bytes(mutated)


async def send(rig: ProcessRig, data: bytes, findings: Findings) -> None:
    """Send the bytes of a request and check what comes back."""
    reader, writer = await rig.open()
    answer = bytearray()
    try:
        writer.write(data)
        wanted = data[:5] == b"HEAD "
        async with asyncio.timeout(120):
            while not _complete(answer, head=wanted):
                async with asyncio.timeout(_QUIET_SECONDS if len(data) < MIB else 5):
                    chunk = await reader.read(65536)
                if not chunk:
                    break
                answer += chunk
    except TimeoutError:
        findings.statuses["no answer"] += 1
    except ConnectionError:
        findings.statuses["closed"] += 1
    finally:
        writer.transport.abort()
    fault = _fault(bytes(answer), findings)
    if fault:
        findings.faults.append(f"{fault}\nrequest: {data[:600]!r}\nanswer: {bytes(answer[:600])!r}")


def _parsed(answer: bytes, *, head: bool) -> list[tuple[h11.Response, bytes, bool]]:
    """Return the answers in these bytes: head, body, True if it is complete."""
    answers = []
    while answer:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        connection.send(h11.Request(method="HEAD" if head else "GET", target="/", headers=[("Host", "x")]))
        connection.send(h11.EndOfMessage())
        connection.receive_data(answer)
        response, body, complete = None, bytearray(), False
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Response):
                response = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                complete = True
                break
            elif not isinstance(event, h11.InformationalResponse):
                break
        if response is not None:
            answers.append((response, bytes(body), complete))
        if not complete:
            break
        answer = connection.trailing_data[0]
    return answers


def _complete(answer: bytearray, *, head: bool) -> bool:
    try:
        answers = _parsed(bytes(answer), head=head)
    except h11.RemoteProtocolError:
        return True
    return bool(answers) and answers[-1][2]


def _fault(answer: bytes, findings: Findings) -> str | None:
    """Return what is wrong with an answer, or None."""
    problems = []
    for head in (False, True):  # the method may be one that the mutation made
        try:
            answers = _parsed(answer, head=head)
        except h11.RemoteProtocolError as error:
            problems.append(f"not HTTP: {error}")
            continue
        problem = next((found for found in (_answer_fault(*parts, head=head) for parts in answers) if found), None)
        if problem is None:
            findings.statuses.update(str(response.status_code) for response, _, _ in answers)
            return None
        problems.append(problem)
    return problems[0]


def _answer_fault(response: h11.Response, body: bytes, complete: bool, *, head: bool) -> str | None:  # noqa: FBT001
    status = response.status_code
    if status == 500:
        return "an internal error"
    if status < 400 or head or not complete:
        return None
    try:
        document = json.loads(body)
        error = document["error"]
    except (ValueError, KeyError, TypeError):
        return f"{status} without an error in OpenAI's schema"
    of_anthropic = document.get("type") == "error" and set(document) == {"type", "error", "request_id"}
    fields = {"message", "type"} if of_anthropic else {"message", "type", "param", "code"}
    return None if set(error) == fields else "an error with other fields"


async def fuzz(rig: ProcessRig, count: int, seed: int, report: Callable[[str], None]) -> Findings:
    """Send `count` requests and return what came back."""
    source, findings, sent = random.Random(seed), Findings(), 0  # noqa: S311 - repeatable
    started = time.monotonic()

    async def worker() -> None:
        nonlocal sent
        while sent < count and rig.alive and len(findings.faults) < 20:
            sent += 1
            if sent % 2000 == 0:
                report(f"{sent} requests, {time.monotonic() - started:.0f} s, {rig.memory('VmHWM') / MIB:.0f} MiB")
            await send(rig, request(source, rig.key), findings)

    await asyncio.gather(*(worker() for _ in range(_CONNECTIONS)))
    return findings


async def check(folder: Path, count: int, seed: int, report: Callable[[str], None]) -> None:
    """Fuzz a gateway of its own.

    Raises:
        AssertionError: an answer is not right, the log has a key or a traceback, or the memory is above its limit.
    """
    async with ProcessRig(folder, *_OPTIONS) as rig:
        findings = await fuzz(rig, count, seed, report)
        assert not findings.faults, "\n\n".join(findings.faults[:5])
        assert rig.alive, rig.log.read_text()[-2000:]
        await rig.answering()
        rig.check_log()
        peak = rig.memory("VmHWM")
        report(f"passed: {count} requests, peak {peak / MIB:.0f} MiB, {dict(findings.statuses.most_common())}")
        assert peak < MEMORY_LIMIT
        assert findings.statuses["200"] > count / 50


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Send mutated requests to a gateway process.")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # of the pods

    def report(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    with tempfile.TemporaryDirectory() as folder:
        uvloop.run(check(Path(folder), arguments.requests, arguments.seed, report))


if __name__ == "__main__":
    main()
