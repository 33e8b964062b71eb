"""`tunesmith run`: trains on this machine, by the trainer that a training pod runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from tunesmith.cli.errors import CliError
from tunesmith.cli.manifest import read_manifest
from tunesmith.cli.output import Format, FormatOption, note

TRAINER = "tunesmith-trainer"
TRAINER_VARIABLE = "TUNESMITH_TRAINER"
TaskCodeOption = Annotated[
    bool,
    typer.Option(
        "--allow-task-code",
        help="Run the evaluation tasks that the job brings (lmEval.taskFolder) on this machine: they are code.",
    ),
]


def run(
    filename: Annotated[Path, typer.Option("--filename", "-f", help="The FineTuneJob manifest (YAML or JSON).")],
    output: Annotated[
        Path, typer.Option("--output", help="Folder for artifact/ and metrics.csv; it is created if missing.")
    ],
    *,
    allow_task_code: TaskCodeOption = False,
    output_format: FormatOption = Format.TEXT,
) -> None:
    """Train on this machine, without a cluster, from the same manifest that a cluster accepts.

    resources.gpus starts one process per GPU; resources.nodes has no effect, the result is the same.

    With -o json each line is a JSON object and the last one is the result. Exit codes: 0 done, 2 the job must be
    changed, 3 worth retrying, 143 stopped by a signal.

    Example: tunesmith run -f job.yaml --output out
    """
    if output_format is Format.TEXT:  # otherwise the trainer, which reads in the same way, prints the result
        read_manifest(filename, allow_file=True)
    command = [
        *trainer_command(),
        *("train", "--job", str(filename), "--output", str(output), "--allow-file", "--progress-port", "0"),
        *task_code(allowed=allow_task_code),
        *("-o", output_format.value),
    ]
    _execute(command)


def _execute(command: list[str]) -> NoReturn:
    # The trainer replaces this process, so that it receives the signals and sets the exit code.
    try:
        os.execvp(command[0], command)  # noqa: S606 - no shell on purpose
    except OSError as error:
        raise CliError(f"the trainer {command[0]} cannot be started: {error.strerror}") from error


def task_code(*, allowed: bool) -> list[str]:
    """Return the trainer's arguments that allow the code of evaluation tasks."""
    return ["--allow-task-code"] if allowed else []


def trainer_command() -> list[str]:
    """Return the command of this machine's trainer: $TUNESMITH_TRAINER, one on the PATH, or that of a checkout.

    Raises:
        CliError: no trainer was found.
    """
    named = os.environ.get(TRAINER_VARIABLE)
    if named:
        found = shutil.which(named)
        if found is None:
            raise CliError(
                f"${TRAINER_VARIABLE} is {named}, which is not an executable: set it to the trainer's program"
            )
        return [found]
    found = shutil.which(TRAINER)
    if found is not None:
        return [found]
    project = _checkout()
    if project is None:
        raise CliError(
            f"no trainer on this machine: install the package {TRAINER}, set"
            f" ${TRAINER_VARIABLE} to its program, or run the command from a checkout of Tunesmith"
        )
    program = project / ".venv" / "bin" / TRAINER
    if not program.is_file():
        _create_environment(project)
    return [str(program)]


def _checkout() -> Path | None:
    """Return the trainer's project in the checkout of the working directory or of this file, or None."""
    for start in (Path.cwd(), Path(__file__).resolve()):
        for folder in (start, *start.parents):
            if (folder / "trainer-image" / "uv.lock").is_file():
                return folder / "trainer-image"
    return None


def _create_environment(project: Path) -> None:
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        raise CliError(
            f"the trainer's environment {project / '.venv'} does not exist and uv, which creates it, is not on the"
            " PATH: run `make environment-trainer` once"
        )
    note(f"creating the trainer's environment in {project / '.venv'} (once; it holds PyTorch)")
    process = subprocess.run([uv, "sync", "--frozen", "--project", str(project)], check=False)  # noqa: S603 - our own arguments
    if process.returncode != 0:
        raise CliError(f"uv could not create the trainer's environment {project / '.venv'}: see its message above")
