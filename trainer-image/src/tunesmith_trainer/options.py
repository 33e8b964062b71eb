"""Options of one run of `tunesmith-trainer`: parsed once, and the same for each of its stages."""

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
    IMPORT = "import"


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """Options of every command.

    Attributes:
        command: what to run.
        secrets: folder of the mounted Secrets.
        format: format of the progress on standard output.
        progress_port: port of `/progress` and `/metrics`; 0: they are not served.
        allow_file: True outside a cluster: `file://` and local folders are allowed.
        job_folder: URI of the owner's folder in the store, for the owner file; None: no such file.
        cluster: identity of the cluster, for the owner file.
        work: folder for downloads and temporary files; None: `$TUNESMITH_WORK`, or a temporary folder.
        termination_message: file for the result; None: Kubernetes' default, if it exists.
        output: URI of the artifact's folder, or a local folder; empty for `validate`.
    """

    command: Command
    secrets: Path
    format: Form
    progress_port: int
    allow_file: bool = False
    job_folder: str | None = None
    cluster: str | None = None
    work: Path | None = None
    termination_message: Path | None = None
    output: str = ""

    @property
    def output_folder(self) -> Path | None:
        """Local folder for the artifact, checkpoints and curves; None if the output is a URI."""
        return Path(self.output).resolve() if self.output and "://" not in self.output else None


@dataclass(frozen=True, kw_only=True)
class ImportOptions(ProcessOptions):
    """Options of `import`.

    Attributes:
        adapter: URI of the adapter's folder.
        digest: digest that the tunesmith.json of the adapter must have; None: any.
        secret: name of the Secret for that URI; None: the store's credentials.
        base: URI of the base model.
        base_revision: its revision, on the Hugging Face Hub.
        base_secret: name of the Secret for the base model's URI.
        owner: `<namespace>/<name>/<uid>` of the AdapterDeployment, for the owner file.
    """

    adapter: str
    base: str
    digest: str | None = None
    secret: str | None = None
    base_revision: str | None = None
    base_secret: str | None = None
    owner: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunOptions(ProcessOptions):
    """Options of a job's stages.

    Attributes:
        job: file of the FineTuneJob manifest.
        allow_task_code: True if evaluation tasks supplied with the job may be run.
        checkpoints: URI of the checkpoints' folder; None: beside the artifact.
        tokens: URI of the folder that keeps tokenised rows; None: beside the artifact in a local run, otherwise not
            kept.
        gpu_memory_bytes: memory of the GPU that the job will get; None: unknown. `validate` only.
        deadline_seconds: time limit for all checks together; None: no limit. `validate` only.
    """

    job: Path
    allow_task_code: bool = False
    checkpoints: str | None = None
    tokens: str | None = None
    gpu_memory_bytes: int | None = None
    deadline_seconds: float | None = None
