"""The command as a plug-in of kubectl."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tests.controlplane.apiserver import program


def kubectl(*arguments: str) -> subprocess.CompletedProcess[str]:
    # kubectl finds plug-ins by their names in PATH.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(
        [program("kubectl"), *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_kubectl_finds_the_plug_in_and_passes_arguments() -> None:
    shown = kubectl("tunesmith", "--version")
    assert (shown.returncode, shown.stdout) == (0, version("tunesmith") + "\n")
    assert "kubectl-tunesmith" in kubectl("plugin", "list").stdout
    refused = kubectl("tunesmith", "get", "parrot", "x")
    assert refused.returncode == 2
    assert "'parrot' is not a kind of resource" in refused.stderr
