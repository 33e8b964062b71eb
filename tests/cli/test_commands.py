"""The program itself, without a cluster: arguments, exit codes, sentences."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import typer

from tests.api.bad_manifests import BAD_MANIFESTS
from tunesmith.cli.main import app, main

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAM = Path(sys.executable).with_name("tunesmith")
VARIABLES = ("TUNESMITH_URL", "TUNESMITH_API_KEY", "OPENAI_BASE_URL", "OPENAI_API_KEY", "KUBECONFIG")
JOB = """
apiVersion: tunesmith.dev/v1alpha1
kind: FineTuneJob
metadata: {name: sail}
spec:
  baseModel: {uri: s3://models/base}
  dataset: {train: [{uri: s3://data/train.jsonl}]}
  method: {lora: {}}
"""


class Exited(NamedTuple):
    """Exit code and output of a command."""

    code: object
    stdout: str
    stderr: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Exited]:
    """Run the program's entry point in this process, which saves seconds per case."""

    def run(*arguments: str | Path, **environment: str) -> Exited:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["tunesmith", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            main()
        return Exited(exited.value.code or 0, *capsys.readouterr())

    return run


def test_no_credential_of_the_environment_is_in_an_error(command: Callable[..., Exited]) -> None:
    secret = "aSecretThatNobodyMaySee"
    exited = command("models", KUBECONFIG=f"/nowhere/{secret}", AWS_SECRET_ACCESS_KEY=secret)
    assert "there is no kubeconfig at /nowhere/***" in exited.stderr
    assert secret not in exited.stderr + exited.stdout


def tunesmith(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [PROGRAM, *arguments],
        env=inherited | {"COLUMNS": "200"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def trainer(tmp_path: Path) -> Path:
    """A program that shows how it was called."""
    path = tmp_path / "tunesmith-trainer"
    path.write_text('#!/bin/sh\nfor argument; do echo "$argument"; done\nexit "${EXIT_WITH:-0}"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def verbs(group: Any = None, path: tuple[str, ...] = ()) -> list[str]:
    """Every command, those of groups too."""
    commands = (typer.main.get_command(app) if group is None else group).commands
    return [
        verb
        for name, found in commands.items()
        for verb in (verbs(found, (*path, name)) if hasattr(found, "commands") else [" ".join((*path, name))])
    ]


@pytest.mark.parametrize("name", verbs())
def test_every_command_has_help_with_an_example(command: Callable[..., Exited], name: str) -> None:
    done = command(*name.split(), "--help")
    assert done.code == 0
    assert "Example:" in done.stdout
    assert f"tunesmith {name}" in done.stdout


@pytest.mark.parametrize("code", ["0", "2", "3", "143"])
def test_run_executes_the_trainer_and_returns_its_exit_code(trainer: Path, manifest: Path, code: str) -> None:
    done = tunesmith(
        "run", "-f", manifest, "--output", "out", "-o", "json", TUNESMITH_TRAINER=str(trainer), EXIT_WITH=code
    )
    assert done.returncode == int(code)
    assert done.stdout.split() == [
        *("train", "--job", str(manifest), "--output", "out", "--allow-file", "--progress-port", "0", "-o", "json")
    ]


def test_run_passes_allow_task_code_to_the_trainer(trainer: Path, manifest: Path) -> None:
    asked = ("run", "-f", manifest, "--output", "out")
    for given in ((), ("--allow-task-code",)):
        done = tunesmith(*asked, *given, TUNESMITH_TRAINER=str(trainer))
        assert [word for word in done.stdout.split() if word.startswith("--allow-task")] == list(given)


def test_run_finds_the_trainer_on_the_path(trainer: Path, manifest: Path) -> None:
    done = tunesmith("run", "-f", manifest, "--output", "out", PATH=f"{trainer.parent}:{os.environ['PATH']}")
    assert done.returncode == 0
    assert "train" in done.stdout.split()


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "sentence"),
    [
        (("run", "-f", "absent.yaml", "--output", "out"), {}, 2, "the file absent.yaml does not exist"),
        (
            ("run", "-f", "JOB", "--output", "out"),
            {"TUNESMITH_TRAINER": "/nowhere"},
            1,
            "$TUNESMITH_TRAINER is /nowhere, which is not an executable",
        ),
        (
            ("run", "-f", "PATH", "--output", "out"),
            {},
            2,
            "a file of this machine is file:///path, with its whole path",
        ),
        (("submit", "-f", "PATH"), {}, 2, "or https://host/path/rows.jsonl\n"),
        (("submit", "-f", "absent.yaml"), {}, 2, "the file absent.yaml does not exist"),
        (("submit", "-f", "BAD"), {}, 2, "method must have exactly one of lora, qlora, adaLora"),
        (("submit", "-f", "LOCAL"), {}, 2, "file:// uris work only in a local run"),
        (("submit", "-f", "JOB"), {"KUBECONFIG": "/nowhere"}, 2, "there is no kubeconfig at /nowhere"),
        (("submit", "-f", "BROKEN"), {}, 2, "not valid YAML"),
        (("keys", "create", "No Name"), {}, 2, "cannot be the name of a key"),
        (("keys", "create", "a", "-n", "Team"), {}, 2, "cannot be a namespace"),
        (("keys", "list"), {"KUBECONFIG": "/nowhere"}, 2, "there is no kubeconfig at /nowhere"),
        (("compare", "one"), {}, 2, "name two or more jobs"),
        (("deploy", "a", "--pool", "a/b/c"), {}, 2, "--pool a/b/c is not a pool: write NAMESPACE/NAME, or NAME"),
        (("get", "thing", "a"), {}, 2, "'thing' is not a kind of resource: use job, adapter or pool"),
        (("wait", "job", "a", "--timeout", "soon"), {}, 2, "--timeout soon is not a duration: write seconds, minutes"),
        (("chat", "pirate", "-m", "hi"), {}, 2, "set --url"),
        (("chat", "pirate", "-m", "hi", "--url", "ftp://x"), {}, 2, "is not an address"),
        (("chat", "pirate", "-m", "hi", "--url", "http://127.0.0.1:1"), {}, 2, "ask your platform team for one"),
        (
            ("chat", "pirate", "-m", "hi", "--url", "http://127.0.0.1:1"),
            {"OPENAI_API_KEY": "k"},
            1,
            "the gateway at http://127.0.0.1:1/v1/chat/completions cannot be reached",
        ),
    ],
)
def test_each_user_error_is_one_line(
    command: Callable[..., Exited],
    tmp_path: Path,
    manifest: Path,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    code: int,
    sentence: str,
) -> None:
    files = {
        "JOB": manifest,
        "BAD": tmp_path / "bad.yaml",
        "LOCAL": tmp_path / "local.yaml",
        "BROKEN": tmp_path / "broken.yaml",
        "PATH": tmp_path / "path.yaml",
    }
    files["BAD"].write_text(JOB.replace("{lora: {}}", "{}"))
    files["LOCAL"].write_text(JOB.replace("s3://data", "file:///data"))
    files["BROKEN"].write_text("a: [")
    files["PATH"].write_text(JOB.replace("s3://data", "data"))
    done = command(*(files.get(argument, argument) for argument in arguments), **environment)
    assert done.code == code, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [("submit",), ("run", "--output", "out"), ("estimate",)])
@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_every_command_reads_a_manifest_in_the_same_way(
    command: Callable[..., Exited], tmp_path: Path, case: str, arguments: tuple[str, ...]
) -> None:
    text, sentence = BAD_MANIFESTS[case]
    manifest = tmp_path / "job.yaml"
    manifest.write_text(text)
    done = command(*arguments, "-f", manifest, TUNESMITH_TRAINER="/nowhere")
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {manifest}: ")
    assert sentence in done.stderr


def test_an_unexpected_error_is_one_line_or_a_traceback_on_request(
    command: Callable[..., Exited], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def break_down(*_: object, **__: object) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr("tunesmith.cli.submit.read_manifest", break_down)
    exited = command("submit", "-f", tmp_path / "job.yaml")
    assert exited.code == 1
    assert exited.stderr == (
        "error: RuntimeError: the disk is full (a bug in tunesmith: set TUNESMITH_TRACEBACK=1 for the traceback)\n"
    )
    monkeypatch.setattr(sys, "argv", ["tunesmith", "submit", "-f", "job.yaml"])
    monkeypatch.setenv("TUNESMITH_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="the disk is full"):
        main()


@pytest.mark.parametrize(
    ("words", "offered"),
    [("tunesmith ca", {"cancel"}), ("tunesmith get ", {"job", "adapter", "pool"})],
    ids=["a command", "a kind"],
)
def test_a_shell_can_complete(words: str, offered: set[str]) -> None:
    done = tunesmith(
        _TUNESMITH_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.rstrip().split(" ")) - 1 + words.endswith(" ")),
    )
    assert set(done.stdout.split()) == offered


def test_the_version_is_the_packages() -> None:
    assert tunesmith("--version").stdout.strip() == version("tunesmith")
