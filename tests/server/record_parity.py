"""Runs in the trainer's environment: makes tiny base models, and records the expected answers of adapters.

Reads requests as lines of JSON, and answers each with a line `done`:
`{"make": folder, "change": "none" | "noise" | "coarse"}` makes a base model, and `{"base", "artifact", "into", "rows",
"template", "data_type"}` records an adapter's answers in the folder `into`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.trainer.tiny_model import make
from tunesmith.contracts.parity import PARITY_FILE, PARITY_ROWS_FILE
from tunesmith_trainer.artifact.parity import RowPrompt, record


def make_base(folder: Path, change: str) -> None:
    """Make a model with likelier and less likely tokens, as trained ones have."""
    make(folder, hidden=128)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "lm_head.weight":
                parameter.mul_(8)
            elif "layers" in name and parameter.dim() > 1:
                parameter.mul_(3)
            if change == "noise":
                parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * 0.3)
            elif change == "coarse" and parameter.dim() > 1:
                step = parameter.abs().max() / 7  # 4 bits
                parameter.copy_((parameter / step).round() * step)
    model.save_pretrained(folder)


def record_adapter(request: dict[str, Any]) -> None:
    """Record the answers of an adapter as the trainer does."""
    base, artifact, into = Path(request["base"]), Path(request["artifact"]), Path(request["into"])
    config, tokenizer = AutoConfig.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    config.dtype = getattr(torch, request.get("data_type", "float32"))
    if "template" in request:
        tokenizer.chat_template = request["template"]
    ends = [tokenizer.eos_token_id]
    rows = [RowPrompt(prompt, answer) for prompt, answer in request.get("rows", [])]
    into.mkdir(parents=True, exist_ok=True)
    try:
        recorded = record(base, artifact, config, tokenizer, ends=ends, pad=ends[0], rows=rows)
    finally:
        shutil.rmtree(artifact.parent / "offload", ignore_errors=True)
    (into / PARITY_FILE).write_text(json.dumps(recorded.parity.manifest()))
    if recorded.rows is not None:
        (into / PARITY_ROWS_FILE).write_text(json.dumps(recorded.rows.manifest()))


def main() -> None:
    """Process the requests in order."""
    for line in sys.stdin:
        request = json.loads(line)
        if "make" in request:
            make_base(Path(request["make"]), request["change"])
        else:
            record_adapter(request)
        sys.stdout.write("done\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
