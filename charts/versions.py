#!/usr/bin/env python3
"""Checks that a chart which differs from its last release has a new version.

charts/versions.txt has a line for each released version of a chart: the chart, the version, and the SHA-256 of all its
files. A released version keeps its content: raise `version` in Chart.yaml and describe the change in CHANGELOG.md. The
Python packages have the version of the chart `tunesmith`. The exit code is 1 if one of these rules is violated.

With `--release` the current versions are first recorded as released.
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


def version_of(chart: Path) -> str:
    """Return the version in a chart's Chart.yaml."""
    return str(yaml.safe_load((chart / "Chart.yaml").read_text())["version"])


def chart_problem(chart: Path, released: dict[tuple[str, str], str], changes: str) -> str | None:
    """Return a sentence if a chart's version is not in the changelog or was released with other content, else None."""
    version = version_of(chart)
    if f"\n## {version}\n" not in changes:
        return (
            f"charts/{chart.name} has the version {version}, which CHANGELOG.md does not describe: add `## {version}`"
        )
    if released.get((chart.name, version)) not in {None, content_digest(chart)}:
        return (
            f"charts/{chart.name} differs from its release {version}: raise `version` in its Chart.yaml and describe "
            "the change in CHANGELOG.md"
        )
    return None


def package_problem(folder: Path) -> str | None:
    """Return a sentence if a Python package and the chart that installs it have different versions, else None."""
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
    released = {(name, version): digest for name, version, digest in (line.split() for line in lines)}
    if "--release" in sys.argv[1:]:
        for name in NAMES:
            released.setdefault((name, version_of(CHARTS / name)), content_digest(CHARTS / name))
        RECORD.write_text(
            "".join(f"{name} {version} {digest}\n" for (name, version), digest in sorted(released.items()))
        )
    problems = [found for name in NAMES if (found := chart_problem(CHARTS / name, released, CHANGES.read_text()))]
    problems += [found for name in PACKAGES if (found := package_problem(CHARTS.parent / name))]
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
