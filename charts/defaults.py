#!/usr/bin/env python3
"""Copies charts/tunesmith/values.yaml to where its templates can read it: they complete the values of older releases.

With `--check` nothing is written: the exit code is 1 if the copy would change.
"""

from __future__ import annotations

import sys
from pathlib import Path

SOURCE = Path(__file__).parent / "tunesmith/values.yaml"
TARGET = Path(__file__).parent / "tunesmith/files/values.yaml"


def main() -> int:
    """Command line: see the module's docstring."""
    text = SOURCE.read_text()
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text)
    elif not TARGET.is_file() or TARGET.read_text() != text:
        print(f"{TARGET} is not a copy of {SOURCE.name}: run `make generate`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
