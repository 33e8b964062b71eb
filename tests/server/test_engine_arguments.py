"""Every argument of the installed `vllm serve` is classified: reserved, or open to the platform."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.server.server_rig import vllm_program
from tunesmith.api.engine_arguments import RESERVED_ARGUMENTS, reserved_argument

REVIEWED = Path(__file__).with_name("reviewed_arguments.txt")
"""File with harmless arguments that tune the engine, one per line."""
LIST = """
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
for action in make_arg_parser(FlexibleArgumentParser())._actions:
    print(*[name for name in action.option_strings if name.startswith("--")], sep="\\n")
"""


def reviewed() -> set[str]:
    return set(REVIEWED.read_text().split())


def test_reviewed_arguments_are_allowed() -> None:
    assert {name for name in reviewed() if reserved_argument(name)} == set()


@pytest.mark.long
def test_every_argument_of_vllm_is_classified() -> None:
    done = subprocess.run(
        [vllm_program().with_name("python"), "-c", LIST],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    names = {line for line in done.stdout.splitlines() if line.startswith("--")}
    names -= {f"--no-{name[2:]}" for name in names if name.startswith("--")} - set(RESERVED_ARGUMENTS)
    assert len(names) > 250
    assert names - set(RESERVED_ARGUMENTS) - reviewed() == set(), "reserve them, or add them to reviewed_arguments.txt"
    assert set(RESERVED_ARGUMENTS) - names == set(), "vLLM no longer has them"
