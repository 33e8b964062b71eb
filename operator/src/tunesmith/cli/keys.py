"""`tunesmith keys`: API keys of the gateway."""

from __future__ import annotations

import asyncio
import re
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.connection import NAMESPACE_VARIABLE, connect
from tunesmith.cli.duration import parse_duration
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.output import Format, FormatOption, NamespaceOption, note, print_json, print_line, print_table
from tunesmith.cluster.errors import AlreadyExistsError, ConflictError, ForbiddenError
from tunesmith.contracts.apikey import (
    KEY_KIND,
    KEY_LABEL,
    KEY_PREFIX,
    MAX_LIMIT,
    ApiKey,
    Priority,
    key_record,
    new_key,
    parse_key_record,
    rotated,
    time_text,
)
from tunesmith.contracts.installation import DEFAULT_NAMESPACE as GATEWAY_NAMESPACE
from tunesmith.contracts.keyuse import KEY_USE_NAME, parse_key_use

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tunesmith.cluster.client import Cluster

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_MAX_NAME = 200
_DENIED_BY_ROLES = " cannot "
"""Part of the API server's message if no role allows a request; quotas and admission rules have others."""
_MAX_NAMESPACE = 63

app = typer.Typer(no_args_is_help=True, help="API keys of the gateway. Only their hashes are kept.")
GatewayNamespaceOption = Annotated[
    str,
    typer.Option(
        "--gateway-namespace",
        envvar=NAMESPACE_VARIABLE,
        help="Namespace of the gateway, which holds the keys.",
    ),
]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Name of the key, for lists and logs.")],
    namespace: NamespaceOption = None,
    allow_namespace: Annotated[
        list[str] | None,
        typer.Option("--allow-namespace", help="Another namespace whose models it may call. Can be repeated."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="A model it may call: NAMESPACE/NAME, or NAME in its own namespace. Can be repeated; absent: all.",
        ),
    ] = None,
    requests_per_minute: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_LIMIT, help="Requests that it may send in a minute; absent: no limit."),
    ] = None,
    tokens_per_minute: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_LIMIT, help="Tokens of prompts and answers in a minute; absent: no limit."),
    ] = None,
    tokens_per_day: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_LIMIT, help="Tokens of prompts and answers in a day; absent: no limit."),
    ] = None,
    max_concurrency: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_LIMIT, help="Sequences (choices × prompts) running at once; absent: no limit."),
    ] = None,
    priority: Annotated[
        Priority, typer.Option(help="Its part of a busy pod: High twice that of Normal, Low half of it.")
    ] = Priority.NORMAL,
    expires_in: Annotated[
        str | None, typer.Option(help="Time after which it is refused, such as 12h or 90d; absent: never.")
    ] = None,
    gateway_namespace: GatewayNamespaceOption = GATEWAY_NAMESPACE,
    output_format: FormatOption = Format.TEXT,
) -> None:
    """Create a key and print it, once: it cannot be shown again.

    Models that are named without a namespace are looked up in the key's namespace.

    Example: export OPENAI_API_KEY=$(tunesmith keys create alice --namespace team-a --requests-per-minute 60)
    """
    _check("the name of a key", name, _NAME, _MAX_NAME)
    for other in [*([namespace] if namespace else []), *(allow_namespace or [])]:
        _check("a namespace", other, _NAMESPACE, _MAX_NAMESPACE)
    with _explained_denial(gateway_namespace):
        asyncio.run(
            _create(
                name,
                namespace,
                allow_namespace or [],
                model or [],
                gateway_namespace,
                limits={
                    "requests_per_minute": requests_per_minute,
                    "tokens_per_minute": tokens_per_minute,
                    "tokens_per_day": tokens_per_day,
                    "max_concurrency": max_concurrency,
                },
                priority=priority,
                expires=_after(expires_in, "--expires-in") if expires_in else None,
                output_format=output_format,
            )
        )


@app.command()
def rotate(
    name: Annotated[str, typer.Argument(help="Name of the key.")],
    overlap: Annotated[
        str, typer.Option(help="Time for which the present key remains valid, such as 30m or 7d; 0s: it ends now.")
    ] = "24h",
    gateway_namespace: GatewayNamespaceOption = GATEWAY_NAMESPACE,
    output_format: FormatOption = Format.TEXT,
) -> None:
    """Replace a key by a new one with the same rights and limits, and print it, once.

    Both are valid until the overlap ends. A key that was replaced before is refused from now on.

    Example: tunesmith keys rotate alice --overlap 7d
    """
    until = _after(overlap, "--overlap")
    with _explained_denial(gateway_namespace):
        asyncio.run(_rotate(name, until, gateway_namespace, output_format))


@app.command("list")
def list_(
    gateway_namespace: GatewayNamespaceOption = GATEWAY_NAMESPACE, output_format: FormatOption = Format.TEXT
) -> None:
    """List the keys, what they may call and their last use, to about two minutes; the keys themselves are not stored.

    Example: tunesmith keys list
    """
    with _explained_denial(gateway_namespace):
        asyncio.run(_list(gateway_namespace, output_format))


@app.command()
def delete(
    name: Annotated[str, typer.Argument(help="Name of the key.")],
    gateway_namespace: GatewayNamespaceOption = GATEWAY_NAMESPACE,
) -> None:
    """Delete a key: the gateways refuse it from then on.

    Example: tunesmith keys delete alice
    """
    with _explained_denial(gateway_namespace):
        asyncio.run(_delete(name, gateway_namespace))


def _after(duration: str, option: str) -> datetime:
    return datetime.now(UTC) + parse_duration(duration, option)


@contextmanager
def _explained_denial(gateway_namespace: str) -> Iterator[None]:
    try:
        yield
    except ForbiddenError as error:
        if _DENIED_BY_ROLES not in str(error):
            raise
        raise CliError(
            f"your role does not allow you to manage API keys, which are ConfigMaps in the namespace"
            f" {gateway_namespace}: ask your platform team for a key"
        ) from error


def _check(what: str, value: str, pattern: re.Pattern[str], longest: int) -> None:
    if not pattern.fullmatch(value) or len(value) > longest:
        raise CliError(
            f"{value!r} cannot be {what}: use at most {longest} lower-case letters, digits and hyphens", Exit.USAGE
        )


async def _create(
    name: str,
    namespace: str | None,
    others: list[str],
    models: list[str],
    gateway_namespace: str,
    *,
    limits: dict[str, int | None],
    priority: Priority,
    expires: datetime | None,
    output_format: Format,
) -> None:
    async with await connect() as cluster:
        home = namespace or cluster.namespace
        namespaces = list(dict.fromkeys([home, *others]))
        allowed = [model if "/" in model else f"{home}/{model}" for model in models] or ["*"]
        foreign = next((m for m in allowed if m != "*" and m.partition("/")[0] not in namespaces), None)
        if foreign is not None:
            raise CliError(
                f"the key may not call models of {foreign.partition('/')[0]}, so --model {foreign} "
                f"would have no effect: add --allow-namespace {foreign.partition('/')[0]}",
                Exit.USAGE,
            )
        key = new_key()
        record = key_record(
            name,
            gateway_namespace,
            key,
            home=home,
            namespaces=namespaces,
            models=allowed,
            priority=priority,
            expires=expires,
            **limits,
        )
        try:
            await cluster.create(record)
        except AlreadyExistsError:
            raise CliError(
                f"the key {name} already exists: choose another name, or delete it with `tunesmith keys delete {name}`"
            ) from None
    made = parse_key_record(record)
    if output_format is Format.JSON:
        print_json({"key": key, **_fields(made)})
        return
    print_line(key)
    what = "all models" if allowed == ["*"] else ", ".join(allowed)
    bounds = _limits_text(made, " and ")
    note(
        f"Key {name} may call {what} of {', '.join(namespaces)}{f', {bounds}' if bounds else ''}. Keep it: it is not"
        " stored and not shown again."
    )
    note("Next: export TUNESMITH_API_KEY=… (that key), then tunesmith models")


async def _list(gateway_namespace: str, output_format: Format) -> None:
    async with await connect() as cluster:
        records = await cluster.list(KEY_KIND, gateway_namespace, labels=f"{KEY_LABEL}=true")
        used = parse_key_use(await cluster.find(KEY_KIND, KEY_USE_NAME, gateway_namespace))
    rows = []
    lines = []
    for record in records:
        created = record["metadata"].get("creationTimestamp", "")
        try:
            key = parse_key_record(record)
        except ValueError as error:
            note(f"the ConfigMap {record['metadata']['name']} is not a key: {error}")
            continue
        fields = _fields(key)
        last_used = _last_use(used.get(key.name), created)
        rows.append({**fields, "created": created, "lastUsed": last_used})
        calls, models = (",".join(fields[name]) for name in ("namespaces", "models"))
        limits, expires = _limits_text(key, ",") or "-", fields["expires"] or "-"
        lines.append((key.name, key.home, calls, models, limits, expires, created, last_used or "never"))
    if output_format is Format.JSON:
        print_json(rows)
        return
    print_table(
        ("NAME", "NAMESPACE", "MAY CALL", "MODELS", "LIMITS", "EXPIRES", "CREATED", "LAST USED"),
        lines,
        empty=f"no keys in {gateway_namespace}: create one with `tunesmith keys create NAME`",
    )


def _last_use(at: int | None, created: str) -> str | None:
    """Return the time of the last use; None if it is that of an earlier key of the same name, or if there is none."""
    if at is None:
        return None
    last_used = time_text(datetime.fromtimestamp(at, UTC))
    return last_used if last_used >= created else None


def _fields(key: ApiKey) -> dict[str, Any]:
    """Return what programs read about a key."""
    return {
        "name": key.name,
        "namespace": key.home,
        "namespaces": sorted(key.namespaces),
        "models": ["*"] if key.models is None else sorted(key.models),
        "requestsPerMinute": key.requests_per_minute,
        "tokensPerMinute": key.tokens_per_minute,
        "tokensPerDay": key.tokens_per_day,
        "maxConcurrency": key.max_concurrency,
        "priority": key.priority.value,
        "expires": None if key.expires is None else time_text(datetime.fromtimestamp(key.expires, UTC)),
    }


def _limits_text(key: ApiKey, separator: str) -> str:
    texts = [
        f"{limit}{unit}"
        for limit, unit in (
            (key.requests_per_minute, "/min"),
            (key.tokens_per_minute, " tokens/min"),
            (key.tokens_per_day, " tokens/day"),
            (key.max_concurrency, " at once"),
        )
        if limit is not None
    ]
    if key.priority is not Priority.NORMAL:
        texts.append(f"{key.priority} priority")
    return separator.join(texts)


async def _rotate(name: str, until: datetime, gateway_namespace: str, output_format: Format) -> None:
    async with await connect() as cluster:
        record = await _find(cluster, name, gateway_namespace)
        try:
            present = parse_key_record(record)
        except ValueError as error:
            raise CliError(f"the ConfigMap {KEY_PREFIX}{name} is not a key: {error}") from None
        if present.expires is not None and present.expires <= datetime.now(UTC).timestamp():
            raise CliError(
                f"the key {name} has expired: `tunesmith keys delete {name}`, and create another one with `tunesmith"
                " keys create`"
            )
        key = new_key()
        try:
            await cluster.replace(record | {"data": rotated(record, key, until)})
        except ConflictError:
            raise CliError(f"the key {name} was changed meanwhile: run the command again") from None
    ends = time_text(until)
    if output_format is Format.JSON:
        print_json({"key": key, "previousExpires": ends, **_fields(present)})
        return
    print_line(key)
    note(f"Key {name} is replaced; the previous one is valid until {ends}. Keep the new one: it is not shown again.")


async def _delete(name: str, gateway_namespace: str) -> None:
    async with await connect() as cluster:
        record = await _find(cluster, name, gateway_namespace)
        await cluster.delete(KEY_KIND, KEY_PREFIX + name, gateway_namespace, uid=record["metadata"]["uid"])
    note(f"Key {name} is deleted.")


async def _find(cluster: Cluster, name: str, gateway_namespace: str) -> dict[str, Any]:
    """Return the ConfigMap of a key.

    Raises:
        CliError: there is no such key.
    """
    record = await cluster.find(KEY_KIND, KEY_PREFIX + name, gateway_namespace)
    labels = (record or {}).get("metadata", {}).get("labels") or {}
    if record is None or labels.get(KEY_LABEL) != "true":
        raise CliError(
            f"the key {name} does not exist in {gateway_namespace}: list the keys with `tunesmith keys list "
            f"--gateway-namespace {gateway_namespace}`"
        )
    return record
