"""Command-line arguments of `tunesmith-trainer`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.contracts.environment import WORK_FOLDER
from tunesmith.contracts.owner import OWNER_FILE
from tunesmith.contracts.progress import PROGRESS_PORT
from tunesmith.contracts.result import TERMINATION_MESSAGE_PATH
from tunesmith_trainer.options import Command, ImportOptions, RunOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

_EXAMPLES = """examples:
  tunesmith-trainer validate --job job.yaml --allow-file
      checks the manifest, the data and the base model on the CPU, without loading weights
  tunesmith-trainer train --job job.yaml --output out --allow-file
      trains on this machine; the adapter is in out/artifact, the curves in out/metrics.csv
  tunesmith-trainer train --job /etc/tunesmith/job/job.yaml --output s3://tunesmith/store/default/demo-1/artifact
      what a training pod runs
  tunesmith-trainer import --adapter file:///adapters/doors --base file:///models/tiny --output out --allow-file
      checks an adapter of another trainer and converts it; the artifact is in out/artifact

exit codes: 0 succeeded, 2 the job must be changed, 3 another attempt may succeed, 143 stopped by a signal
"""


def parse(argv: Sequence[str]) -> RunOptions | ImportOptions:
    """Return the options in a command line; exit the process with code 2 if they are wrong."""
    arguments = vars(_parser().parse_args(argv))
    command = Command(arguments.pop("command"))
    if command is Command.IMPORT:
        return ImportOptions(command=command, progress_port=0, **arguments)
    return RunOptions(command=command, **arguments)


def _parser() -> argparse.ArgumentParser:
    """Return a parser for the commands and their options; each option is stored under its name in the options."""
    parser = argparse.ArgumentParser(
        prog="tunesmith-trainer",
        description="Trains a LoRA adapter from a FineTuneJob manifest.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        (Command.VALIDATE, "check the job on the CPU, without weights"),
        (Command.TRAIN, "train, evaluate, package and publish"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=text.capitalize() + ".",
            epilog=_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "--job", type=Path, required=True, metavar="FILE", help="the FineTuneJob manifest, YAML or JSON"
        )
        if name is Command.VALIDATE:
            command.add_argument(
                "--gpu-memory-bytes",
                type=int,
                metavar="N",
                help="memory of the GPU that the job will get, to decide if it fits (default: unknown)",
            )
            command.add_argument(
                "--deadline",
                dest="deadline_seconds",
                type=float,
                metavar="SECONDS",
                help="run the checks in a separate process that is stopped after this time, or when a chat template or "
                "a pattern does not terminate (default: no limit)",
            )
        if name is Command.TRAIN:
            command.add_argument(
                "--output",
                required=True,
                metavar="LOCATION",
                help="URI of the artifact's folder, or a local folder for artifact/, checkpoints/ and metrics.csv",
            )
            command.add_argument(
                "--checkpoints",
                metavar="URI",
                help="folder of the checkpoints (default: checkpoints/ beside the artifact)",
            )
        command.add_argument(
            "--tokens",
            metavar="URI",
            help="folder that keeps the tokenised rows for the next attempt (default: tokens/ beside the artifact if"
            " `train` writes to a local folder; otherwise they are not kept)",
        )
        command.add_argument(
            "--progress-port",
            type=int,
            default=PROGRESS_PORT,
            metavar="PORT",
            help="port of /progress and /metrics; 0: they are not served (default: %(default)s)",
        )
        command.add_argument(
            "--allow-task-code",
            action="store_true",
            help="run the evaluation tasks supplied with the job (lmEval.taskFolder), which are code",
        )
        _add_process_options(command)
    _add_import(
        commands.add_parser(
            Command.IMPORT,
            help="publish an adapter of another trainer",
            description="Check an adapter of another trainer, convert it where that is exact, and publish it.",
            epilog=_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    return parser


def _add_import(command: argparse.ArgumentParser) -> None:
    command.add_argument("--adapter", required=True, metavar="URI", help="folder of the adapter, or of an artifact")
    command.add_argument(
        "--digest", metavar="DIGEST", help="digest of the artifact's tunesmith.json (default: any; not for an adapter)"
    )
    command.add_argument("--secret", metavar="NAME", help="mounted Secret for the adapter (default: the store's)")
    command.add_argument("--base", required=True, metavar="URI", help="base model to which the adapter belongs")
    command.add_argument("--base-revision", metavar="REVISION", help="its revision (default: the newest)")
    command.add_argument("--base-secret", metavar="NAME", help="mounted Secret for it (default: the store's)")
    command.add_argument(
        "--output", required=True, metavar="LOCATION", help="URI of the artifact's folder, or a folder for artifact/"
    )
    command.add_argument("--owner", metavar="NAMESPACE/NAME/UID", help=f"the adapter, for {OWNER_FILE}")
    _add_process_options(command)


def _add_process_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--job-folder",
        metavar="URI",
        help=f"folder of the job, or of the adapter, in the store, where {OWNER_FILE} is written (default: none)",
    )
    command.add_argument("--cluster", metavar="ID", help=f"the cluster's identity, for {OWNER_FILE}")
    command.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help=f"folder for downloads and temporary files (default: ${WORK_FOLDER}, or a temporary folder)",
    )
    command.add_argument(
        "--secrets",
        type=Path,
        default=Path("/etc/tunesmith/secrets"),
        metavar="DIR",
        help="mounted Secrets (default: %(default)s)",
    )
    command.add_argument(
        "--termination-message",
        type=Path,
        metavar="FILE",
        help=f"file that the result is written to as JSON (default: {TERMINATION_MESSAGE_PATH} if it exists)",
    )
    command.add_argument(
        "--allow-file",
        action="store_true",
        help="allow file:// and local folders: for runs outside a cluster",
    )
    command.add_argument(
        "-o",
        dest="format",
        choices=("text", "json"),
        default="text",
        help="progress as text or one JSON object per line (default: text)",
    )
