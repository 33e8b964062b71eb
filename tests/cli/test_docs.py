"""The commands that the documentation shows are ones that there are, with the options that they have."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

import pytest
import typer
from typer.core import TyperGroup

from e2e.documentation import PAGES, blocks, commands, name_of
from tunesmith.cli.main import app

if TYPE_CHECKING:
    from pathlib import Path


LINE = re.compile(r"(?:^|\$\(|&& )(?:\S*/|uv run )?tunesmith (.+?)(?:\)|\s+[>|#].*)?$", re.MULTILINE)
SHOWN = [
    pytest.param(command, id=f"{name_of(page)}: {command}")
    for page in PAGES
    for block in blocks(page)
    for command in LINE.findall(block)
]
PROGRAMS = {
    *("aws", "cat", "cp", "curl", "export", "for", "helm", "install", "jq"),
    *("kubectl", "make", "mkdir", "sed", "tensorboard", "uv"),
    *("tunesmith", "tunesmith-agent", "tunesmith-gateway", "tunesmith-operator", "tunesmith-trainer"),
}


@pytest.mark.parametrize("command", SHOWN)
def test_commands_in_the_documentation_are_valid(command: str) -> None:
    found = typer.main.get_command(app)
    context = typer.Context(found, info_name="tunesmith")
    arguments = shlex.split(command, comments=True)
    if arguments[0].startswith("-"):
        assert {arguments[0]} <= {option for parameter in found.params for option in parameter.opts}
        return
    while isinstance(found, TyperGroup):
        inner = found.get_command(context, arguments[0])
        assert inner is not None, arguments[0]
        context = typer.Context(inner, parent=context)
        found, arguments = inner, arguments[1:]
    found.make_context(str(found.name), arguments)  # raises where an option or an argument is not one of its own


def test_an_unknown_command_is_detected() -> None:
    with pytest.raises(Exception, match="No such option: --no-such-option"):
        test_commands_in_the_documentation_are_valid("submit -f job.yaml --no-such-option")
    with pytest.raises(AssertionError, match="no-such-verb"):
        test_commands_in_the_documentation_are_valid("no-such-verb")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_shell_blocks_contain_commands_and_no_output(page: Path) -> None:
    """Output beside commands is in `console` blocks, whose commands have a prompt: what is in `sh` can be pasted."""
    first = [command.split()[0] for block in blocks(page) for command in commands(block)]
    others = [word for word in first if "=" not in word and word.rpartition("/")[2] not in PROGRAMS]
    assert others == []
