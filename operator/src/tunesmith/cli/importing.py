"""`tunesmith import`: manifests from the configurations of other tools."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from tunesmith.api.manifest import ManifestError, load_document, parse_manifest
from tunesmith.api.model import API_VERSION, MAX_NAME
from tunesmith.cli.axolotl import translate as translate_axolotl
from tunesmith.cli.errors import CliError, Exit
from tunesmith.cli.llamafactory import translate as translate_llamafactory
from tunesmith.cli.openai_job import translate as translate_openai
from tunesmith.cli.output import note, print_line
from tunesmith.cli.translation import Translation, UntranslatableError, model_uri, rows_uri
from tunesmith.contracts.adapterconfig import UnsupportedAdapterError, adapter_of
from tunesmith.contracts.foreign_adapter import ForeignAdapterError, Layout, layout_of, translate_config

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer(no_args_is_help=True, help="Write a FineTuneJob from another tool's configuration.")

StrictOption = Annotated[bool, typer.Option("--strict", help="Fail if a key has no counterpart.")]


@app.callback()
def options() -> None:
    """Options of all importers."""


@app.command()
def peft(
    config: Annotated[Path, typer.Argument(help="An adapter_config.json of PEFT or MLX LM.")],
    data: Annotated[
        str, typer.Option("--data", help="Uri or path of the training rows, which the file does not name.")
    ],
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base model: a uri, a path or a name of the Hub. Absent: the one of the file."),
    ] = None,
    strict: StrictOption = False,  # noqa: FBT002 - typer's convention
) -> None:
    """Print the FineTuneJob that trains an adapter like this one; keys without a counterpart go to standard error.

    Example: tunesmith import peft adapter_config.json --data s3://bucket/train.jsonl > job.yaml
    """
    document = _read(config, "an adapter_config.json")
    layout = layout_of(document)
    if layout is Layout.PEFT and not isinstance(document.get("peft_type"), str):
        raise CliError(f"{config}: peft_type is missing: use an adapter_config.json written by PEFT", Exit.USAGE)
    with _translating(config):
        if layout is Layout.MLX or document["peft_type"] == "LORA":
            document = translate_config(document, layout)
        named = document.get("base_model_name_or_path")
        if base is None and (not isinstance(named, str) or not named):
            hint = "add --base with the model that MLX LM converted" if layout is Layout.MLX else "add it, or --base"
            raise CliError(f"{config}: base_model_name_or_path is missing: {hint}", Exit.USAGE)
        found = adapter_of(document if base is None else {**document, "base_model_name_or_path": "its/base"})
    folder = str(Path.cwd())
    source = found.base if base is None else {"uri": model_uri(base, folder)}
    for key, what in found.changed.items():
        note(f"{key}: {what}")
    for key, hint in found.omitted.items():
        note(f"{key}: {json.dumps(document[key])} has no counterpart and is omitted" + (f": {hint}" if hint else ""))
    train = [{"uri": rows_uri(data, folder)}]
    _print(config, {"baseModel": source, "dataset": {"train": train}, "method": found.method})
    if strict and found.omitted:
        raise CliError(f"{len(found.omitted)} keys have no counterpart: {', '.join(found.omitted)}")


@app.command()
def axolotl(
    config: Annotated[Path, typer.Argument(help="A configuration of Axolotl (YAML).")],
    strict: StrictOption = False,  # noqa: FBT002 - typer's convention
) -> None:
    """Print the FineTuneJob that is equivalent to this file; keys without a counterpart go to standard error.

    Example: tunesmith import axolotl config.yaml > job.yaml
    """
    with _translating(config):
        found = translate_axolotl(load_document(_text(config)), str(Path.cwd()))
    _report(config, found, strict=strict)


@app.command()
def llamafactory(
    config: Annotated[Path, typer.Argument(help="A training configuration of LLaMA-Factory (YAML or JSON).")],
    dataset_info: Annotated[
        Path | None,
        typer.Option("--dataset-info", help="The dataset_info.json. Absent: that of the configuration's dataset_dir."),
    ] = None,
    strict: StrictOption = False,  # noqa: FBT002 - typer's convention
) -> None:
    """Print the FineTuneJob that is equivalent to this file; keys without a counterpart go to standard error.

    Example: tunesmith import llamafactory qwen3_lora_sft.yaml --dataset-info data/dataset_info.json > job.yaml
    """
    with _translating(config):
        document = load_document(_text(config))
        info = dataset_info or Path(str(document.get("dataset_dir") or "data"), "dataset_info.json")
        data_folder = str(Path.cwd() / info.parent)
        found = translate_llamafactory(document, _read(info, "a dataset_info.json"), str(Path.cwd()), data_folder)
    _report(config, found, strict=strict)


@app.command()
def openai(
    job: Annotated[Path, typer.Argument(help="A fine-tuning job: the JSON of GET /v1/fine_tuning/jobs/ID.")],
    base: Annotated[
        str,
        typer.Option(
            "--base", help="Base model, since OpenAI's cannot be downloaded: a uri, a path or a name of the Hub."
        ),
    ],
    data: Annotated[str, typer.Option("--data", help="Uri or path of the JSONL of training_file.")],
    validation: Annotated[
        str | None,
        typer.Option(
            "--validation", help="Uri or path of the JSONL of validation_file. Absent: a share of the training rows."
        ),
    ] = None,
    strict: StrictOption = False,  # noqa: FBT002 - typer's convention
) -> None:
    """Print the FineTuneJob for OpenAI's; keys without a counterpart go to standard error.

    Example: tunesmith import openai job.json --base hf://org/model --data s3://bucket/train.jsonl > job.yaml
    """
    folder = str(Path.cwd())
    held_out = rows_uri(validation, folder) if validation is not None else None
    with _translating(job):
        found = translate_openai(
            _read(job, "a fine-tuning job of OpenAI's API"), model_uri(base, folder), rows_uri(data, folder), held_out
        )
    _report(job, found, strict=strict)


@contextmanager
def _translating(config: Path) -> Iterator[None]:
    """Raise CliError for a configuration that cannot be translated.

    Each of its keys may have a value of any kind, such as a list where the other tool has a number.
    """
    try:
        yield
    except (ManifestError, UntranslatableError, UnsupportedAdapterError, ForeignAdapterError) as error:
        raise CliError(f"{config}: {error}", Exit.USAGE) from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise CliError(
            f"{config} has a value of a kind that its tool does not accept there ({type(error).__name__}: {error})",
            Exit.USAGE,
        ) from error


def _report(config: Path, found: Translation, *, strict: bool) -> None:
    """Print the manifest, and report the keys that were not copied."""
    for key, what in found.changed.items():
        note(f"{key}: {what}")
    for key, hint in found.omitted.items():
        note(f"{key} has no counterpart and is omitted" + (f": {hint}" if hint else ""))
    if found.ignored:
        note(f"not needed: {', '.join(found.ignored)}")
    _print(config, found.spec, found.name)
    if strict and found.omitted:
        raise CliError(f"{len(found.omitted)} keys have no counterpart: {', '.join(found.omitted)}")


def _print(config: Path, spec: dict[str, Any], chosen: str | None = None) -> None:
    """Print the manifest after checking that the API server would accept it."""
    name = re.sub(r"[^a-z0-9]+", "-", (chosen or config.stem).lower()).strip("-")[:MAX_NAME].strip("-") or "imported"
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


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        document = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise CliError(f"{path} is not JSON: {error}", Exit.USAGE) from None
    if not isinstance(document, dict):
        raise CliError(f"{path} is not a JSON object: use {what}", Exit.USAGE)
    return document
