"""Train adapters on a tiny model of every architecture that people fine-tune, and write docs/architectures.md.

Each method goes through the trainer's own command, is loaded again by plain PEFT in another process, merged, and, with
--engine, loaded by a real vLLM that must reproduce its parity.json.

Example: python -m tests.trainer.verify_architectures --engine server-image/engine-cpu/.venv
"""

from __future__ import annotations

import re
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.trainer.architectures import FAMILIES, Family, make
from tests.trainer.verify_methods import ask_engine, compare_reloaded, figure, parser_of, report, try_case, write_line

if TYPE_CHECKING:
    from tests.trainer.verify_methods import Tried

DOCUMENT = Path(__file__).parents[2] / "docs/architectures.md"
_LORA = {"rank": 4, "alpha": 8}


def methods_of(family: Family) -> dict[str, tuple[dict[str, Any], str]]:
    """Return the method and the kind of merge of each column."""
    methods = {
        "lora": ({"lora": _LORA}, "Original"),
        "qlora": ({"qlora": _LORA}, "Dequantized"),
        "ia3": ({"ia3": {}}, "Original"),
        "full": ({"full": {}}, "None"),
        "named": ({"lora": {**_LORA, "targetModules": list(family.explicit)}}, "Original"),
    }
    if family.experts:
        methods["experts"] = ({"lora": {**_LORA, "targetParameters": list(family.experts)}}, "Original")
    return methods


def of_peft(family: Family) -> int:
    """Return the number of parameters that PEFT's own all-linear trains; 0 if PEFT refuses it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(family.config)
    try:
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    except ValueError:
        return 0
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def check_reason(tried: Tried) -> None:
    """Note a failure that is not a refusal before training."""
    if tried.result.reason and tried.result.reason not in {"InvalidSpec", "NotServable"}:
        tried.problems.append(f"it fails: {tried.result.message}")
    if tried.result.reason and tried.result.retryable:
        tried.problems.append("a refusal is called retryable")


def document(tried: dict[str, Tried], families: list[Family]) -> str:
    """Return the table in Markdown."""
    notes: list[str] = []

    def note(family: Family, text: str | None) -> str:
        # One note for all families that it applies to.
        names = "|".join({family.model_type, family.config.get_text_config().model_type})
        text = re.sub(rf"\ba ({names})\b", "this architecture", str(text).replace("`", ""))
        text = re.sub(r"\b(a|the architecture) [A-Z]\w+(ForCausalLM|LMHeadModel)\b", "this architecture", text)
        text = re.sub(r"\b\d+% of the weights", "less than half of the weights", text)
        if text not in notes:
            notes.append(text)
        return f"[{notes.index(text) + 1}](#notes)"

    def cell(family: Family, column: str) -> str:
        one = tried.get(f"{family.name}/{column}")
        if one is None:
            return "–"
        if one.result.reason is not None:
            return f"no {note(family, one.result.message)}"
        if one.reload is None or one.reload > 0:
            return f"yes, {figure(one.reload)}" if one.reload else "yes"
        return "yes"

    lines = []
    for family in families:
        lora, quantized = tried[f"{family.name}/lora"], tried[f"{family.name}/qlora"]
        counted = lora.result.preflight
        adapted = f"{counted.adapted_percent} %" if counted is not None else "–"
        in_4_bits = quantized.result.preflight
        merged = (
            figure(lora.merge)
            if lora.merge is not None
            else f"no {note(family, lora.no_merge)}"
            if lora.no_merge
            else "–"
        )
        cells = [family.name, f"`{family.model_type}`", cell(family, "lora"), adapted, merged]
        cells += [cell(family, "qlora"), f"{in_4_bits.quantized_percent} %" if in_4_bits is not None else "–"]
        cells += [cell(family, column) for column in ("ia3", "full", "named", "experts")]
        artifact = lora.result.artifact
        if artifact is None:
            cells += ["–", "–"]
        elif not artifact.servable.vllm:
            cells += [f"no {note(family, artifact.servable.reason)}", "–"]
        else:
            cells += ["yes", lora.engine or "not measured"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*_HEAD, *lines, "", "## Notes", "", *(f"{i}. {text}" for i, text in enumerate(notes, 1)), ""])


_COLUMNS = [
    *("Family", "`model_type`", "lora", "adapted", "merge", "qlora", "in 4 bits", "ia3", "full", "named", "experts"),
    *("vLLM", "parity"),
]
_HEAD = [
    "<!-- Generated by `make verify-architectures`: change the trainer, not this file. -->",
    "# Models that can be fine-tuned",
    "",
    *textwrap.wrap(
        "Every architecture below was trained with Tunesmith as a tiny random model made from its configuration class,"
        " with the version of transformers, PEFT and vLLM in the images. Whatever is not possible is refused by the CPU"
        " stage, before a GPU is used, with the sentence in the note.",
        118,
    ),
    "",
    "- **lora**: `lora: {}` completes; a figure is the greatest difference of logits between the trained adapter and",
    "  the artifact loaded again by plain PEFT (none: identical).",
    "- **adapted**: share of the weights in the base's layers (without embedding and output layer) that the adapter",
    "  changes. `all-linear` does not include experts that are stacked in one parameter: name them with",
    "  `targetParameters`.",
    "- **merge**: distance of the merged weights from what was trained (norm of the difference of logits over their",
    "  norm).",
    "- **qlora** and **in 4 bits**: `qlora: {}`, and the share of the weights that 4 bits hold.",
    "- **named**: `lora` with modules given by name; **experts**: `lora` with `targetParameters`.",
    "- **vLLM**: whether the engine loads the adapter as it is; **parity**: greatest difference of log-probabilities",
    "  between a real vLLM and the artifact's `parity.json`.",
    "",
    f"| {' | '.join(_COLUMNS)} |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
]


def main() -> int:
    """Write the table; return 1 if a cell does not hold its verdict."""
    parser = parser_of(__doc__, "families")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    families = [family for family in FAMILIES if not arguments.only or family.name in arguments.only]
    tried: dict[str, Tried] = {}
    with tempfile.TemporaryDirectory() as name:
        work = arguments.work or Path(name)
        for family in families:
            base = make(family, work / "bases" / family.model_type)
            own: dict[str, Tried] = {}
            for column, (method, merge) in methods_of(family).items():
                key = f"{family.name}/{column}"
                own[key] = try_case(method, base, work / "runs" / family.model_type / column, merge)
                check_reason(own[key])
                write_line(f"{key}: {own[key].result.message if own[key].result.reason else 'trained'}")
            check_count(own[f"{family.name}/lora"], family)
            if arguments.engine:
                lora = {key: one for key, one in own.items() if key.endswith(("/lora", "/named"))}
                ask_engine(lora, base, arguments.engine, work / "runs" / family.model_type)
            tried |= own
        compare_reloaded(tried, work)
    return report(document(tried, families), DOCUMENT, tried, only=bool(arguments.only))


def check_count(tried: Tried, family: Family) -> None:
    """Compare the trained parameters with those of PEFT's all-linear, where PEFT adapts the same modules."""
    if tried.result.preflight is None or family.experts or "text_config" in family.settings:
        return  # PEFT also adapts experts, but not what has the names that they once had, and vision towers
    expected = of_peft(family)
    if expected and tried.result.preflight.trainable_parameters != expected:
        found = tried.result.preflight.trainable_parameters
        tried.problems.append(f"it trains {found} parameters where PEFT's all-linear has {expected}")


if __name__ == "__main__":
    sys.exit(main())
