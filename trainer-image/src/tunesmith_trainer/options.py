"""Options of one run of `tunesmith-trainer`: parsed once, and the same for every step of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith_trainer.process.progress import Form


class Command(StrEnum):
    """Stage of a job that this process runs."""

    VALIDATE = "validate"
    TRAIN = "train"


@dataclass(frozen=True)
class RunOptions:
    """What the command line asks for.

    Attributes:
        command: stage to run.
        job: file of the FineTuneJob manifest.
        secrets: folder of the mounted Secrets.
        format: of the progress on standard output.
        progress_port: port of `/progress` and `/metrics`; 0: none.
        allow_file: True where no cluster runs the job: `file://` and folders of this machine are allowed.
        allow_task_code: True if evaluation tasks that the job brings may be run.
        output: uri of the artifact's folder, or a folder of this machine; empty for `validate`.
        checkpoints: uri of the checkpoints' folder; None: beside the artifact.
        tokens: uri of the folder that keeps tokenised rows; None: beside the artifact of a local run, otherwise none.
        job_folder: uri of the job's folder in the store, which gets the owner file; None: no such file.
        cluster: identity of the cluster, for the owner file.
        work: folder for downloads and temporary files; None: `$TUNESMITH_WORK`, or a temporary folder.
        termination_message: file for the result; None: Kubernetes' own, if it exists.
        gpu_memory_bytes: of the GPU that the job will get; None: unknown. `validate` only.
        deadline_seconds: for all checks together; None: no limit. `validate` only.
    """

    command: Command
    job: Path
    secrets: Path
    format: Form
    progress_port: int
    allow_file: bool = False
    allow_task_code: bool = False
    output: str = ""
    checkpoints: str | None = None
    tokens: str | None = None
    job_folder: str | None = None
    cluster: str | None = None
    work: Path | None = None
    termination_message: Path | None = None
    gpu_memory_bytes: int | None = None
    deadline_seconds: float | None = None

    @property
    def output_folder(self) -> Path | None:
        """Folder of this machine that gets the artifact, checkpoints and curves; None if the output is a uri."""
        return Path(self.output).resolve() if self.output and "://" not in self.output else None
