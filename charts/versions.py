#!/usr/bin/env python3
"""Records the content of each chart's version in charts/versions.txt: a chart that changes gets another version.

A line is the chart, its version, and the SHA-256 of all its files. A version that is recorded keeps its content: raise
`version` in Chart.yaml, describe the change in CHANGELOG.md and run `make generate`. While a version is not released,
`--again` records its content again. The Python packages have the version of the chart `tunesmith`. With `--check`
nothing is written: the exit code is 1 if something is missing.
"""

from __future__ import annotations

import hashlib
import sys
import tomllib
from pathlib import Path

import yaml

CHARTS = Path(__file__).parent
RECORD = CHARTS / "versions.txt"
CHANGES = CHARTS.parent / "CHANGELOG.md"
NAMES = ("adapters", "tunesmith")
PACKAGES = ("operator", "trainer-image", "server-image")


def content_digest(chart: Path) -> str:
    """Return the SHA-256 of the names and contents of a chart's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in chart.rglob("*") if path.is_file()):
        for part in (str(path.relative_to(chart)).encode(), path.read_bytes()):
            digest.update(len(part).to_bytes(8) + part)
    return digest.hexdigest()


def problem(chart: Path, recorded: dict[tuple[str, str], str], changes: str) -> str | None:
    """Return what is wrong with a chart's version, as a sentence; None if it is recorded with this content."""
    version = yaml.safe_load((chart / "Chart.yaml").read_text())["version"]
    digest = recorded.get((chart.name, version))
    if f"\n## {version}\n" not in changes:
        return (
            f"charts/{chart.name} has the version {version}, which CHANGELOG.md does not describe: add `## {version}`"
        )
    if digest is None:
        return f"charts/{chart.name} {version} is not recorded in charts/versions.txt: run `make generate`"
    if digest != content_digest(chart):
        return (
            f"charts/{chart.name} differs from what is recorded as {version}: raise `version` in its Chart.yaml, "
            f"describe the change in CHANGELOG.md and run `make generate`; if {version} is not released yet, run "
            "`python charts/versions.py --again`"
        )
    return None


def package_problem(folder: Path) -> str | None:
    """Return a sentence if a Python package has another version than the chart that installs it; None if it has not."""
    app = yaml.safe_load((CHARTS / "tunesmith/Chart.yaml").read_text())["appVersion"]
    version = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["version"]
    if version == app:
        return None
    return (
        f"{folder.name}/pyproject.toml has the version {version} and charts/tunesmith/Chart.yaml the appVersion {app}: "
        "make them equal and run `uv lock`"
    )


def main() -> int:
    """Command line: see the module's docstring."""
    lines = RECORD.read_text().splitlines() if RECORD.is_file() else []
    recorded = {(name, version): digest for name, version, digest in (line.split() for line in lines)}
    if "--check" not in sys.argv[1:]:
        for name in NAMES:
            chart = CHARTS / name
            place = (name, yaml.safe_load((chart / "Chart.yaml").read_text())["version"])
            if place not in recorded or "--again" in sys.argv[1:]:
                recorded[place] = content_digest(chart)
        RECORD.write_text(
            "".join(f"{name} {version} {digest}\n" for (name, version), digest in sorted(recorded.items()))
        )
    problems = [found for name in NAMES if (found := problem(CHARTS / name, recorded, CHANGES.read_text()))]
    problems += [found for name in PACKAGES if (found := package_problem(CHARTS.parent / name))]
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
