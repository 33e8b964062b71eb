"""`tunesmith get`: state and result of one resource."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tunesmith.cli.connection import connect
from tunesmith.cli.describe import lines, next_step
from tunesmith.cli.kinds import KindArgument, NameArgument, fetch, parse
from tunesmith.cli.output import Format, FormatOption, NamespaceOption, note, print_json, print_line, single_line

if TYPE_CHECKING:
    from tunesmith.cli.kinds import Kind
    from tunesmith.cluster.resources import Object


def get(
    kind: KindArgument,
    name: NameArgument,
    namespace: NamespaceOption = None,
    output_format: FormatOption = Format.TEXT,
) -> None:
    """Show a job, an adapter or a pool: state, reason, figures, and the command that comes next.

    With -o json it is the whole resource.

    Example: tunesmith get job support -n team-a
    """
    document = asyncio.run(_read(kind, namespace, name))
    if output_format is Format.JSON:
        print_json(document)
        return
    resource = parse(kind, document)
    described = lines(resource)
    width = max(len(head) for head, _ in described) + 2
    for head, text in described:
        print_line(f"{head:<{width}}{single_line(text)}".rstrip())
    step = next_step(resource)
    if step:
        note(f"Next: {step}")


async def _read(kind: Kind, namespace: str | None, name: str) -> Object:
    async with await connect() as cluster:
        return await fetch(cluster, kind, namespace or cluster.namespace, name)
