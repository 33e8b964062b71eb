"""Writes generated files, or checks that they are current; used by the generators."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def write_or_check(contents: Mapping[Path, str], source: str) -> int:
    """Write the files that differ; with `--check` on the command line only name them.

    Args:
        contents: wanted text by file.
        source: source of the files, for the message about a file that differs.

    Returns:
        The exit code: 1 if a file differs and `--check` was given, otherwise 0.
    """
    stale = [path for path, text in contents.items() if not path.is_file() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path} differs from {source}: run `make generate`")
        return 1 if stale else 0
    for path in stale:
        path.write_text(contents[path])
    return 0
