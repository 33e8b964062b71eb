"""Checks that would never finish are stopped, with a message that names them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from tunesmith_trainer.process import activity
from tunesmith_trainer.process.watched import watched

if TYPE_CHECKING:
    from pathlib import Path

    from tests.trainer.trainer_rig import Workbench

ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ 9 ** (9 ** 9) }}",
}


def program(*lines: str) -> list[str]:
    """Return a program that replaces the trainer; it gets the trainer's options."""
    head = ("import sys, time", "from tunesmith_trainer.process.activity import limited")
    return [sys.executable, "-c", "\n".join((*head, *lines))]


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS.keys())
def test_an_endless_template_is_stopped(tmp_path: Path, template: str) -> None:
    """Neither Python nor a signal can interrupt the second one: C code holds the interpreter lock."""
    lines = (
        "from types import SimpleNamespace",
        "from tunesmith_trainer.data import template",
        "limited = template.limited",
        "template.limited = lambda what: limited(what, 1.0)",
        "tokenizer = SimpleNamespace(special_tokens_map={}, chat_template=None)",
        f"chat = template.ChatTemplate(tokenizer, {template!r})",
        "chat.texts({'messages': [{'role': 'user', 'content': 'a'}]}, None, 'a.jsonl line 1')",
    )
    result = watched(program(*lines), tmp_path, 300.0)
    assert result.reason == "InvalidSpec"
    assert not result.retryable
    assert "dataset.chatTemplate did not finish in time and was stopped" in result.message


def test_the_whole_command_has_a_deadline(tmp_path: Path) -> None:
    result = watched(program("time.sleep(600)"), tmp_path, 0.5)
    assert (result.reason, result.retryable) == ("DeadlineExceeded", False)
    assert "the checks took longer than" in result.message


def test_nested_work_has_its_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slot = activity.create(tmp_path / "activity")
    monkeypatch.setenv(activity.ACTIVITY, str(tmp_path / "activity"))
    with activity.limited("outer", -1.0):
        assert activity.overdue(slot) == "outer"
        with activity.limited("a longer inner text", 100.0):
            assert activity.overdue(slot) is None
        assert activity.overdue(slot) == "outer"
    assert activity.overdue(slot) is None


def test_a_result_is_returned_and_a_crash_is_reported(bench: Workbench) -> None:
    ran = bench.run("validate", bench.job(), "--deadline", "600")
    assert ran.code == 0
    assert ran.result.preflight is not None
    crashed = watched(program("import os, signal", "os.kill(os.getpid(), signal.SIGSEGV)"), bench.folder, 60.0)
    assert (crashed.retryable, "the checks crashed (SIGSEGV)" in crashed.message) == (False, True)


def test_checks_that_the_kernel_kills_are_out_of_memory(tmp_path: Path) -> None:
    work = "with limited('rows.parquet', float('inf')): os.kill(os.getpid(), signal.SIGKILL)"
    killed = watched(program("import os, signal", work), tmp_path, 60.0)
    assert (killed.reason, killed.retryable) == ("OutOfMemory", False)
    assert "the checks were killed at rows.parquet, most likely" in killed.message
