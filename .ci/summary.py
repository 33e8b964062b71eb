#!/usr/bin/env python3
"""Sums the results of the test parts: `summary.py FOLDER PART...` reads FOLDER/PART.xml (JUnit) of each part.

A part without a readable result counts as one failure. The last line is `N passed, N failed`; the exit code is 1 if any
failed.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def count(result: Path) -> tuple[int, int, int]:
    """Tests of one part that passed, failed and were skipped."""
    try:
        suites = ET.parse(result).getroot().iter("testsuite")  # noqa: S314 - pytest of this checkout wrote it
    except (OSError, ET.ParseError):
        return 0, 1, 0
    passed = failed = skipped = 0
    for suite in suites:
        bad = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        left_out = int(suite.get("skipped", 0))
        passed += int(suite.get("tests", 0)) - bad - left_out
        failed += bad
        skipped += left_out
    return passed, failed, skipped


def main() -> int:
    """Command line: see the module's docstring."""
    folder, parts = Path(sys.argv[1]), sys.argv[2:]
    totals = [0, 0]
    for part in parts:
        passed, failed, skipped = count(folder / f"{part}.xml")
        if passed + failed + skipped == 0:
            failed = 1
        note = "" if (folder / f"{part}.xml").is_file() else "  (did not run to its end: see out/logs/)"
        print(f"{part:14} {passed:4} passed {failed:4} failed {skipped:4} skipped{note}")
        totals[0] += passed
        totals[1] += failed
    print(f"{totals[0]} passed, {totals[1]} failed")
    return 1 if totals[1] else 0


if __name__ == "__main__":
    sys.exit(main())
