#!/usr/bin/env python3
"""Copies charts/tunesmith/values.yaml to where its templates can read it: they complete the values of older releases.

With `--check` nothing is written: the exit code is 1 if the copy would change.
"""

from __future__ import annotations

import sys
from pathlib import Path

from generated import write_or_check

SOURCE = Path(__file__).parent / "tunesmith/values.yaml"
TARGET = Path(__file__).parent / "tunesmith/files/values.yaml"


def main() -> int:
    """Command line: see the module's docstring."""
    return write_or_check({TARGET: SOURCE.read_text()}, SOURCE.name)


if __name__ == "__main__":
    sys.exit(main())
