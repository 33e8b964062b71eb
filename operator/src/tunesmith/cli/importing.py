"""`tunesmith import`: manifests from the configurations of other tools."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from tunesmith.api.manifest import ManifestError, load_document, parse_manifest
from tunesmith.api.model import API_VERSION, MAX_NAME
from tunesmith.cli.adapterconfig import adapter_of
from tunesmith.cli.axolotl import UntranslatableError, translate
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.output import note, print_line

app = typer.Typer(no_args_is_help=True, help="Write a FineTuneJob from another tool's configuration.")


@app.callback()
def options() -> None:
    """Options of all importers."""


@app.command()
def peft(
    config: Annotated[Path, typer.Argument(help="An adapter_config.json of PEFT.")],
    data: Annotated[str, typer.Option("--data", help="Uri of the training rows, which the file does not name.")],
    strict: Annotated[  # noqa: FBT002 - typer's convention
        bool, typer.Option("--strict", help="Fail if a key has no counterpart.")
    ] = False,
) -> None:
    """Print the FineTuneJob that trains an adapter like this one; keys without a counterpart go to standard error.

    Example: tunesmith import peft adapter_config.json --data s3://bucket/train.jsonl > job.yaml
    """
    document = _read(config)
    if not isinstance(document.get("peft_type"), str):
        raise CliError(f"{config}: peft_type is missing: use an adapter_config.json written by PEFT", Exit.USAGE)
    base = document.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CliError(f"{config}: base_model_name_or_path is missing: add the name of the base model", Exit.USAGE)
    found = adapter_of(document)
    for key, what in found.changed.items():
        note(f"{key}: {what}")
    for key, hint in found.omitted.items():
        note(f"{key}: {json.dumps(document[key])} has no counterpart and is omitted" + (f": {hint}" if hint else ""))
    _print(config, {"baseModel": found.base, "dataset": {"train": [{"uri": data}]}, "method": found.method})
    if strict and found.omitted:
        raise CliError(f"{len(found.omitted)} keys have no counterpart: {', '.join(found.omitted)}")


@app.command()
def axolotl(
    config: Annotated[Path, typer.Argument(help="A configuration of Axolotl (YAML).")],
    strict: Annotated[  # noqa: FBT002 - typer's convention
        bool, typer.Option("--strict", help="Fail if a key has no counterpart.")
    ] = False,
) -> None:
    """Print the FineTuneJob that is equivalent to this file; keys without a counterpart go to standard error.

    Example: tunesmith import axolotl config.yaml > job.yaml
    """
    try:
        found = translate(load_document(_text(config)), str(Path.cwd()))
    except (ManifestError, UntranslatableError) as error:
        raise CliError(f"{config}: {error}", Exit.USAGE) from None
    for key, what in found.changed.items():
        note(f"{key}: {what}")
    for key, hint in found.omitted.items():
        note(f"{key} has no counterpart and is omitted" + (f": {hint}" if hint else ""))
    if found.ignored:
        note(f"not needed: {', '.join(found.ignored)}")
    _print(config, found.spec)
    if strict and found.omitted:
        raise CliError(f"{len(found.omitted)} keys have no counterpart: {', '.join(found.omitted)}")


def _print(config: Path, spec: dict[str, Any]) -> None:
    """Print the manifest after checking that the API server would accept it."""
    name = re.sub(r"[^a-z0-9]+", "-", config.stem.lower()).strip("-")[:MAX_NAME].strip("-") or "imported"
    manifest = {"apiVersion": API_VERSION, "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}
    text = yaml.safe_dump(manifest, sort_keys=False)
    try:
        parse_manifest(text)
    except ManifestError as error:
        raise CliError(f"{config} has a value that a FineTuneJob does not accept: {error}") from None
    print_line(text.rstrip())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CliError(f"cannot read {path}: {error.strerror}", Exit.USAGE) from None
    except UnicodeDecodeError:
        raise CliError(f"{path} is not UTF-8", Exit.USAGE) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_text(path))
    except ValueError as error:
        raise CliError(f"{path} is not JSON: {error}", Exit.USAGE) from None
    if not isinstance(document, dict):
        raise CliError(f"{path} is not a JSON object: use an adapter_config.json", Exit.USAGE)
    return document
