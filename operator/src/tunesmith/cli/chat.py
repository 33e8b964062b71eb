"""`tunesmith chat`: send questions to a model through the gateway."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import aiohttp
import typer

from tunesmith.cli.connection import connect, read_installation
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.output import Format, FormatOption, note, print_json, print_line, print_part
from tunesmith.cluster.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

KEY_VARIABLES = ("TUNESMITH_API_KEY", "OPENAI_API_KEY")
_OK = 200
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10)


def chat(
    model: Annotated[str, typer.Argument(metavar="NAME", help="The model: NAMESPACE/NAME, or NAME in the key's own.")],
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="One question. Absent: questions are read line by line.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0.0, help="0 is greedy.")] = None,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            envvar=["TUNESMITH_URL", "OPENAI_BASE_URL"],
            help="Address of the gateway; absent: the one that the cluster's installation publishes.",
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option("--compare", metavar="NAME", help="Also ask this model, such as the adapter's base."),
    ] = None,
    output_format: FormatOption = Format.TEXT,
) -> None:
    """Talk to an adapter or a base; the answer appears as it is generated. The key comes from $TUNESMITH_API_KEY.

    With --compare, both models get each question with their own earlier answers, and answer one after the other.

    Example: tunesmith chat team-a/support --message "Who are you?" --compare platform/base
    """
    address = endpoint(url)
    # Not an option, since any user of the machine can read a process's arguments.
    key = next(filter(None, map(os.environ.get, KEY_VARIABLES)), None)
    if key is None:
        raise CliError(
            "set TUNESMITH_API_KEY (or OPENAI_API_KEY) to an API key: ask your platform team for one, or create it with"
            " `tunesmith keys create NAME` if you may",
            Exit.USAGE,
        )
    options = {"max_tokens": max_tokens, "temperature": temperature}
    request = {name: value for name, value in options.items() if value is not None}
    models = [model] if compare is None else [model, compare]

    def ask(name: str, conversation: list[dict[str, str]]) -> str:
        if compare is not None and output_format is Format.TEXT:
            print_line(f"[{name}]")
        body = request | {"model": name, "messages": conversation}
        return asyncio.run(_ask(address, key, body, output_format))

    _converse(ask, models, [{"role": "system", "content": system}] if system else [], message)


def endpoint(url: str | None) -> str:
    """Return the URL of the chat endpoint for the gateway's URL, which may or may not end in /v1.

    Raises:
        CliError: the gateway's URL is missing or is not an http URL.
    """
    url = url or asyncio.run(_published_url())
    if not url:
        raise CliError(
            "set --url (or TUNESMITH_URL) to the gateway's address, such as https://llm.example.com: the cluster of the"
            " kubeconfig does not publish it (the chart's value gateway.externalUrl)",
            Exit.USAGE,
        )
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise CliError(f"{url!r} is not an address: it must begin with http:// or https://", Exit.USAGE)
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}/v1/chat/completions"


async def _published_url() -> str:
    """Return the gateway's address that the installation publishes; empty if it is unavailable."""
    try:
        async with await connect() as cluster:
            return (await read_installation(cluster)).url
    except ClusterError:
        return ""


def _converse(
    ask: Callable[[str, list[dict[str, str]]], str],
    models: list[str],
    start: list[dict[str, str]],
    message: str | None,
) -> None:
    """Ask each model one question, or those on standard input, each with the model's preceding conversation."""
    conversations = {model: list(start) for model in models}
    if message is None and sys.stdin.isatty():
        note(f"Talking to {' and '.join(conversations)}. An empty line or Ctrl-D exits.")
    for question in _questions() if message is None else (message,):
        for model, messages in conversations.items():
            messages.append(_user(question))
            messages.append({"role": "assistant", "content": ask(model, messages)})


def _questions() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        question = sys.stdin.readline().strip()
        if not question:
            return
        yield question


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


async def _ask(address: str, key: str, request: dict[str, Any], output_format: Format) -> str:
    """Print the answer as it arrives, and return it."""
    answer, model, finish = "", request["model"], None
    headers = {"Authorization": f"Bearer {key}"}
    try:
        async with (
            aiohttp.ClientSession(timeout=_TIMEOUT, headers=headers) as session,
            session.post(address, json=request | {"stream": True}) as response,
        ):
            if response.status != _OK:
                raise CliError(_reason(response.status, await response.text()))
            async for event in _events(response):
                if "error" in event:
                    raise CliError(_reason(_OK, json.dumps(event)))
                model = event.get("model", model)
                choice = (event.get("choices") or [{}])[0]
                finish = choice.get("finish_reason") or finish
                piece = choice.get("delta", {}).get("content") or ""
                answer += piece
                if output_format is Format.TEXT:
                    print_part(piece)
    except BrokenPipeError:
        raise  # of standard output; the client has its own class
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise CliError(
            f"{address} does not answer like a gateway ({type(error).__name__}): check --url or TUNESMITH_URL"
        ) from error
    except (aiohttp.ClientError, OSError) as error:
        inside = (
            " (this address works only inside the cluster: set --url to the external one)"
            if urlsplit(address).hostname is not None and str(urlsplit(address).hostname).endswith(".svc")
            else ""
        )
        raise CliError(
            f"the gateway at {address} cannot be reached: {str(error) or type(error).__name__}{inside}"
        ) from error
    finally:
        if output_format is Format.TEXT and answer:
            print_line("")
    if output_format is Format.JSON:
        print_json({"model": model, "content": answer, "finishReason": finish})
    return answer


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON of each server-sent event.

    Raises:
        CliError: the stream ended before the answer did.
    """
    rest = b""
    async for chunk in response.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            if line.startswith(b"data:"):
                yield json.loads(data)
    raise CliError("the answer is incomplete, because the gateway closed the stream: send the question again")


def _reason(status: int, body: str) -> str:
    """Return the message of an error in OpenAI's schema."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the gateway answered {status}: {body[:200].strip() or 'an empty body'}"
