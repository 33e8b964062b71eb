"""`tunesmith keys`: API keys of the gateway."""

from __future__ import annotations

import asyncio
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.connection import NAMESPACE_VARIABLE, connect
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.output import Format, FormatOption, NamespaceOption, note, print_json, print_line, print_table
from tunesmith.cluster.errors import AlreadyExistsError, ForbiddenError
from tunesmith.contracts.apikey import KEY_KIND, KEY_LABEL, KEY_PREFIX, ApiKey, key_record, new_key, parse_key_record
from tunesmith.contracts.installation import DEFAULT_NAMESPACE as GATEWAY_NAMESPACE

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    gateway_namespace: GatewayNamespaceOption = GATEWAY_NAMESPACE,
    output_format: FormatOption = Format.TEXT,
) -> None:
    """Create a key and print it, once: it cannot be shown again.

    Models that are named without a namespace are looked up in the key's namespace.

    Example: export OPENAI_API_KEY=$(tunesmith keys create alice --namespace team-a)
    """
    _check("the name of a key", name, _NAME, _MAX_NAME)
    for other in [*([namespace] if namespace else []), *(allow_namespace or [])]:
        _check("a namespace", other, _NAMESPACE, _MAX_NAMESPACE)
    with _explained_denial(gateway_namespace):
        asyncio.run(
            _create(name, namespace, allow_namespace or [], model or [], gateway_namespace, output_format=output_format)
        )


@app.command("list")
def list_(
    gateway_namespace: GatewayNamespaceOption = GATEWAY_NAMESPACE, output_format: FormatOption = Format.TEXT
) -> None:
    """List the keys and what they may call; the keys themselves are not stored.

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
        try:
            await cluster.create(
                key_record(name, gateway_namespace, key, home=home, namespaces=namespaces, models=allowed)
            )
        except AlreadyExistsError:
            raise CliError(
                f"the key {name} already exists: choose another name, or delete it with `tunesmith keys delete {name}`"
            ) from None
    if output_format is Format.JSON:
        print_json({"name": name, "key": key, "namespace": home, "namespaces": namespaces, "models": allowed})
        return
    print_line(key)
    what = "all models" if allowed == ["*"] else ", ".join(allowed)
    note(f"Key {name} may call {what} of {', '.join(namespaces)}. Keep it: it is not stored and not shown again.")
    note("Next: export TUNESMITH_API_KEY=… (that key), then tunesmith models")


async def _list(gateway_namespace: str, output_format: Format) -> None:
    async with await connect() as cluster:
        records = await cluster.list(KEY_KIND, gateway_namespace, labels=f"{KEY_LABEL}=true")
    rows = []
    for record in records:
        name = record["metadata"]["name"].removeprefix(KEY_PREFIX)
        created = record["metadata"].get("creationTimestamp", "")
        try:
            key: ApiKey | None = parse_key_record(record)
        except ValueError as error:
            note(f"the ConfigMap {record['metadata']['name']} is not a key: {error}")
            key = None
        if key is not None:
            models = sorted(key.models) if key.models is not None else ["*"]
            rows.append((name, key.home, sorted(key.namespaces), models, created))
    if output_format is Format.JSON:
        fields = ("name", "namespace", "namespaces", "models", "created")
        print_json([dict(zip(fields, row, strict=True)) for row in rows])
        return
    print_table(
        ("NAME", "NAMESPACE", "MAY CALL", "MODELS", "CREATED"),
        [(name, home, ",".join(calls), ",".join(models), created) for name, home, calls, models, created in rows],
        empty=f"no keys in {gateway_namespace}: create one with `tunesmith keys create NAME`",
    )


async def _delete(name: str, gateway_namespace: str) -> None:
    async with await connect() as cluster:
        record = await cluster.find(KEY_KIND, KEY_PREFIX + name, gateway_namespace)
        labels = (record or {}).get("metadata", {}).get("labels") or {}
        if record is None or labels.get(KEY_LABEL) != "true":
            raise CliError(
                f"the key {name} does not exist in {gateway_namespace}: list the keys with `tunesmith keys list "
                f"--gateway-namespace {gateway_namespace}`"
            )
        await cluster.delete(KEY_KIND, KEY_PREFIX + name, gateway_namespace, uid=record["metadata"]["uid"])
    note(f"Key {name} is deleted.")
