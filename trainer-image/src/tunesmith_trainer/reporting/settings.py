"""Addresses and keys of trackers, from the Secret `tunesmith-reporting` or from the environment of a local run."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tunesmith.api.credentials import REPORTING_SECRET
from tunesmith.api.output import Tracker
from tunesmith_trainer.errors import InvalidSpecError, SecretNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

PREFIXES = {Tracker.MLFLOW: "MLFLOW_", Tracker.WANDB: "WANDB_"}
_REQUIRED = {Tracker.MLFLOW: "MLFLOW_TRACKING_URI", Tracker.WANDB: "WANDB_API_KEY"}
_ADDRESSES = {Tracker.MLFLOW: "MLFLOW_TRACKING_URI", Tracker.WANDB: "WANDB_BASE_URL"}


def tracker_settings(
    trackers: Iterable[Tracker], secrets: Path, environ: Mapping[str, str], *, local: bool
) -> dict[Tracker, dict[str, str]]:
    """Return the environment variables of each tracker.

    Args:
        trackers: trackers that the job reports to.
        secrets: folder with one sub-folder per mounted Secret, one file per key.
        environ: environment of this process; a local run takes the variables from it.
        local: True for a local run.

    Raises:
        SecretNotFoundError: the Secret or one of its keys is missing.
        InvalidSpecError: a variable is missing in a local run, or is not an address.
    """
    found: dict[Tracker, dict[str, str]] = {}
    for tracker in trackers:
        if tracker not in PREFIXES:
            found[tracker] = {}
            continue
        variables = environ if local else _mounted(secrets, tracker)
        values = {name: value for name, value in variables.items() if name.startswith(PREFIXES[tracker]) and value}
        _check(tracker, values, local=local)
        found[tracker] = values
    return found


def _mounted(secrets: Path, tracker: Tracker) -> dict[str, str]:
    folder = secrets / REPORTING_SECRET
    files = [entry for entry in folder.iterdir() if entry.is_file()] if folder.is_dir() else []
    if not files:
        raise SecretNotFoundError(
            f"output.reporting has {tracker}, but the Secret {REPORTING_SECRET} does not exist in this namespace or is"
            f" empty: create it with the key {_REQUIRED[tracker]}, or remove {tracker} from output.reporting"
        )
    return {file.name: file.read_text(encoding="utf-8").strip() for file in files}


def _check(tracker: Tracker, values: Mapping[str, str], *, local: bool) -> None:
    required = _REQUIRED[tracker]
    # In a local run the key may also be where `wandb login` stores it, and the run may be offline.
    if required not in values and not (local and tracker is Tracker.WANDB):
        if local:
            raise InvalidSpecError(
                f"output.reporting has {tracker}, but {required} is not in the environment: set it, or remove {tracker}"
            )
        raise SecretNotFoundError(
            f"output.reporting has {tracker}, but the Secret {REPORTING_SECRET} has no key {required}: add it, or"
            f" remove {tracker} from output.reporting"
        )
    address = values.get(_ADDRESSES[tracker])
    if address is not None and (urlsplit(address).scheme not in {"http", "https"} or not urlsplit(address).hostname):
        source = "the environment" if local else f"the Secret {REPORTING_SECRET}"
        raise InvalidSpecError(
            f"{_ADDRESSES[tracker]} in {source} is not an http:// or https:// address: set it to the"
            f" address of the {tracker} server"
        )
