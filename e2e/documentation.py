"""Shell blocks of the documentation, as tests and scenarios run them."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md")))
_BLOCK = re.compile(r"^( *)```(sh|console)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_PROMPT = "$ "
_HEREDOC = re.compile(r"<<'?(\w+)'?")


def name_of(page: Path) -> str:
    """Return a page's path in the repository, such as `docs/serve.md`."""
    return page.relative_to(REPOSITORY).as_posix()


def blocks(page: Path) -> list[str]:
    """Return the commands of each block of a page: all of `sh`, and the lines of `console` that begin with a prompt."""
    found = []
    for indentation, language, block in _BLOCK.findall(page.read_text()):
        lines = [line.removeprefix(indentation) for line in block.splitlines()]
        if language == "console":
            lines = [line.removeprefix(_PROMPT) for line in lines if line.startswith(_PROMPT)]
        found.append("\n".join(lines))
    return found


def commands(block: str) -> list[str]:
    """Return the commands of a block, each with its continuation lines, the body of its loop and its here-document."""
    found: list[str] = []
    pending: list[str] = []
    end, depth = "", 0
    for line in block.splitlines():
        pending.append(line)
        if end:
            if line == end:
                end = ""
            else:
                continue
        elif opened := _HEREDOC.search(line):
            end = opened[1]
            continue
        else:
            depth += line.rstrip().endswith("; do") - (line.split()[:1] == ["done"])
        if depth or line.endswith("\\"):
            continue
        command = "\n".join(pending).strip()
        pending = []
        if command and not command.startswith("#"):
            found.append(command)
    if pending:
        raise ValueError(f"a command of a block does not end: {pending[0]}")
    return found
