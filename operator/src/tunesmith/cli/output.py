"""Output of commands: text for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence


FIELD_MANAGER = "tunesmith-cli"


class Format(StrEnum):
    """Output format of a command."""

    TEXT = "text"
    JSON = "json"


FormatOption = Annotated[Format, typer.Option("--output-format", "-o", help="text for people, json for programs.")]
NamespaceOption = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace; absent: that of the kubeconfig's context.")
]
AllNamespacesOption = Annotated[bool, typer.Option("--all-namespaces", "-A", help="Those of every namespace.")]


def print_json(document: object) -> None:
    """Print one line of JSON on standard output."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_line(text: str) -> None:
    """Print one line of text on standard output, unformatted."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Print a remark for people on standard error, so that standard output can be piped."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """Print aligned columns, or `empty` as a remark if there are no rows."""
    if not rows:
        note(empty)
        return
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        # Without a terminal, lines are neither wrapped nor truncated.
        widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]
        for row in (columns, *rows):
            print_line("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
