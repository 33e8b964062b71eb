"""Start of the engine."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.server_rig import has_ipv6
from tunesmith_server import middleware

if TYPE_CHECKING:
    from types import ModuleType

MODULE = Path(middleware.__path__[0]) / "tunesmith_launch.py"


@pytest.fixture
def launch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tunesmith_launch", MODULE)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_it_listens_on_both_address_families(launch: ModuleType) -> None:
    assert launch.host() == ("::" if has_ipv6() else "0.0.0.0")  # noqa: S104


def test_a_machine_without_ipv6_is_served_on_ipv4(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_arguments: Any) -> Any:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(launch.socket, "socket", without)
    assert launch.host() == "0.0.0.0"  # noqa: S104


def test_an_address_that_accepts_ipv6_only_is_not_used(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.socket.socket, "getsockopt", lambda *_arguments: 1, raising=False)
    assert launch.host() == "0.0.0.0"  # noqa: S104


def test_it_replaces_itself_with_the_engine(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text('#!/bin/sh\necho "$@"\nexit 7\n')
    program.chmod(0o755)
    command = [sys.executable, str(MODULE), "/models/base", "--port", "8000"]
    done = subprocess.run(
        command, env={"PATH": f"{tmp_path}:/bin"}, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.startswith("serve /models/base --port 8000 --host ")
    assert done.returncode == 7


def test_an_image_without_an_engine_is_reported(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(MODULE)],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "vllm cannot be started (No such file or directory)" in done.stderr
    assert "Traceback" not in done.stderr
