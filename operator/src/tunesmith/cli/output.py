"""Output of commands: text for people, JSON for programs."""

from __future__ import annotations

import json
import re
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence


FIELD_MANAGER = "tunesmith-cli"
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and line feed, characters that change the direction of text, and surrogates."""


class Format(StrEnum):
    """Output format of a command."""

    TEXT = "text"
    JSON = "json"


FormatOption = Annotated[Format, typer.Option("--output-format", "-o", help="text for people, json for programs.")]
NamespaceOption = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace; absent: that of the kubeconfig's context.")
]
AllNamespacesOption = Annotated[bool, typer.Option("--all-namespaces", "-A", help="Resources of every namespace.")]


def print_json(document: object) -> None:
    """Print one line of JSON on standard output."""
    # ASCII is valid in every encoding of standard output and never controls a terminal.
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def print_line(text: str) -> None:
    """Print text and a line feed on standard output, unformatted."""
    print_part(text + "\n")


def print_part(text: str) -> None:
    """Print text on standard output, unformatted."""
    sys.stdout.write(visible(text))
    sys.stdout.flush()


def note(text: str) -> None:
    """Print a remark for people on standard error, so that standard output can be piped."""
    sys.stderr.write(visible(text) + "\n")
    sys.stderr.flush()


def visible(text: str) -> str:
    r"""Return the text with control characters as escapes such as `\x1b`.

    Names, messages and logs come from other users and programs, and must not control the terminal of the reader.
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


def single_line(text: str) -> str:
    """Return the text as one line, with single spaces for white space."""
    return " ".join(text.split())


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """Print aligned columns, or `empty` as a remark if there are no rows."""
    if not rows:
        note(empty)
        return
    lines = [[visible(single_line(cell)) for cell in row] for row in (columns, *rows)]
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        # Without a terminal, lines are neither wrapped nor truncated.
        widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
        for line in lines:
            print_line("   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for line in lines[1:]:
        table.add_row(*map(Text, line))  # a string would be parsed as markup
    console.print(table)
