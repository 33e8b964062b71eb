"""`tunesmith`: the command line for people who train and call adapters."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from tunesmith.cli import artifact, data, importing, keys, rollout
from tunesmith.cli.cancel import cancel
from tunesmith.cli.chat import chat
from tunesmith.cli.compare import compare
from tunesmith.cli.deploy import deploy
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.estimate import estimate
from tunesmith.cli.gc import gc
from tunesmith.cli.get import get
from tunesmith.cli.list import list_
from tunesmith.cli.logs import logs
from tunesmith.cli.models import models
from tunesmith.cli.output import note, print_line, single_line
from tunesmith.cli.run import run
from tunesmith.cli.simulate import simulate_
from tunesmith.cli.status import status
from tunesmith.cli.submit import submit
from tunesmith.cli.wait import wait
from tunesmith.cluster.client import allow_deep_objects
from tunesmith.cluster.errors import ClusterError, ConfigurationError, ForbiddenError, NotFoundError, UnauthorizedError
from tunesmith.storage.credentials import Scrubber, secret_values

TRACEBACK_VARIABLE = "TUNESMITH_TRACEBACK"
_UNKNOWN_KIND = ("could not find the requested resource", "page not found")
"""Parts of the API server's message about a kind or an API group that it does not serve."""

app = typer.Typer(
    name="tunesmith",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train adapters, deploy them and chat with them. The cluster is that of $KUBECONFIG (context: $KUBECONTEXT).",
)
app.command()(submit)
app.command()(wait)
app.command()(status)
app.command("list")(list_)
app.command()(get)
app.command()(logs)
app.command()(cancel)
app.command()(compare)
app.command()(deploy)
app.command()(models)
app.command()(chat)
app.command()(run)
app.command()(estimate)
app.command("simulate")(simulate_)
app.command()(gc)
app.add_typer(data.app, name="data")
app.add_typer(artifact.app, name="artifact")
app.add_typer(keys.app, name="keys")
app.add_typer(rollout.app, name="rollout")
app.add_typer(importing.app, name="import")


def _show_version(requested: bool) -> None:  # noqa: FBT001 - typer's convention
    if requested:
        print_line(version("tunesmith"))
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[  # noqa: FBT002 - typer's convention
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of all commands."""


def program() -> NoReturn:
    """Run a command as a process of its own, and end the process."""
    try:
        main()
    except SystemExit as exit_:
        if "obstore" not in sys.modules:
            raise
        # A thread of obstore's runtime that ends a request while the interpreter shuts down aborts the process.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError, OSError):
                stream.flush()
        code = exit_.code
        os._exit(code if isinstance(code, int) else int(code is not None))


def main() -> NoReturn:
    """Run a command. A failure is a sentence on standard error; see `Exit` for the exit codes."""
    # The environment may have the keys of a store, and libraries include their arguments in errors.
    allow_deep_objects()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # characters that the user's locale lacks
    scrubber = Scrubber(secret_values(os.environ))
    try:
        app()
    except CliError as error:
        note(f"error: {scrubber.clean(str(error))}")
        sys.exit(error.code)
    except ClusterError as error:
        note(f"error: {scrubber.clean(single_line(_sentence(error)))}")
        sys.exit(Exit.USAGE if isinstance(error, ConfigurationError) else Exit.FAILED)
    except BrokenPipeError:
        # The reader of standard output has closed it.
        sys.stderr.close()
        sys.exit(Exit.FAILED)
    except OSError as error:
        # Of the user's machine: a full disk, a folder without permission.
        note(f"error: {scrubber.clean(_of_machine(error))}")
        sys.exit(Exit.FAILED)
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        note(f"error: {scrubber.clean(what)} (a bug in tunesmith: set {TRACEBACK_VARIABLE}=1 for the traceback)")
        sys.exit(Exit.FAILED)
    sys.exit()


def _of_machine(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename is not None else ""
    return f"{place}{error.strerror or error or type(error).__name__}"


def _sentence(error: ClusterError) -> str:
    if isinstance(error, NotFoundError) and any(sign in str(error) for sign in _UNKNOWN_KIND):
        return "this cluster lacks Tunesmith's resources: install the chart charts/tunesmith, or check $KUBECONFIG"
    if isinstance(error, UnauthorizedError):
        return f"the cluster does not accept the credentials of the kubeconfig: {error}"
    if isinstance(error, ForbiddenError):
        return f"the cluster denied the request: {error}"
    return str(error)
