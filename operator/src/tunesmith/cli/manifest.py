"""The manifest that a command gets with -f."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.api.manifest import ManifestError, load_document, parse_manifest
from tunesmith.cli.errors import CliError, Exit

if TYPE_CHECKING:
    from pathlib import Path


_OF_URI = "uri: a uri is "
_LOCAL = "; a file of this machine is file:///path, with its whole path"


def read_manifest(filename: Path, *, allow_file: bool) -> dict[str, Any]:
    """Return the FineTuneJob in a file, checked as far as possible without a cluster.

    Args:
        filename: the file.
        allow_file: True if file:// uris are allowed: the job runs on this machine.

    Raises:
        CliError: the file is missing, or the API server would refuse the manifest; the message lists all mistakes.
    """
    try:
        text = filename.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CliError(f"the file {filename} does not exist: pass the manifest's path with -f", Exit.USAGE) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"{filename} cannot be read: {error}", Exit.USAGE) from None
    try:
        parse_manifest(text, allow_file=allow_file)
        return load_document(text)
    except ManifestError as error:
        problems = [f"{problem}{_LOCAL if allow_file and _OF_URI in problem else ''}" for problem in error.problems]
        raise CliError("\n".join(f"{filename}: {problem}" for problem in problems), Exit.USAGE) from None
