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
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.trainer.architecture_checks import SERVED, Checked, Run, measure, sources_digest
from tests.trainer.architectures import FAMILIES, LEFT_OUT, Family
from tests.trainer.verify_methods import (
    PARITY_LIMIT,
    engines,
    figure,
    fill_in_answers,
    parser_of,
    prepare_processes,
    report,
    write_line,
)
from tunesmith.contracts import vllm_modules
from tunesmith.contracts.servability import ABSORBED, is_unadapted
from tunesmith.contracts.vllm_architectures import LATENT_ATTENTION, VLLM
from tunesmith.contracts.vllm_modules import UNADAPTED

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet

    from tests.trainer.verify_methods import Tried

UNADAPTED_MODULE = Path(vllm_modules.__file__)
REPOSITORY = Path(__file__).parents[2]
DOCUMENT = REPOSITORY / "docs/architectures.md"
_BFLOAT16_LIMIT = 0.05
_LATENT_LIMIT = 2e-3
"""vLLM computes latent attention otherwise on CPUs: so much it differs without an adapter."""
_XIELU_LIMIT = 5e-4
"""vLLM's activation function of Apertus on CPUs is less exact."""
_APPLIED = 0.1
"""Greatest difference between engine and PEFT, as a share of the adapter's effect, with which it is applied.

Even bfloat16 is more exact; an adapter that is ignored or misapplied in one layer is not.
"""


def document(checked: dict[str, Checked], families: list[Family]) -> str:
    """Return the table in Markdown.

    Args:
        checked: results by the family's name.
        families: the rows.
    """
    tried = {key: one for each in checked.values() for key, one in each.tried.items()}
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
        lora, quantized = tried[f"{family.name}/lora"], tried.get(f"{family.name}/qlora")
        counted = lora.result.preflight
        adapted = f"{counted.adapted_percent} %" if counted is not None else "–"
        if counted is not None and checked[family.name].left_out:
            adapted += f" {note(family, '; '.join(checked[family.name].left_out))}"
        in_4_bits = quantized.result.preflight if quantized is not None else None
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
        cells += [_served(family, tried, note), _parity(family, tried, note)]
        lines.append("| " + " | ".join(cells) + " |")
    numbered = [f"{i}. {text}" for i, text in enumerate(notes, 1)]
    left_out = [f"- `{model_type}`: {why}." for model_type, why in LEFT_OUT.items()]
    return "\n".join([*_HEAD, *lines, "", "## Notes", "", *numbered, "", *_LEFT_OUT_HEAD, *left_out, ""])


def _served(family: Family, tried: dict[str, Tried], note: Callable[[Family, str | None], str]) -> str:
    artifacts = [one.result.artifact for column in SERVED if (one := tried.get(f"{family.name}/{column}"))]
    lora, named = artifacts[0], artifacts[-1]
    if lora is None:
        return "–"
    if lora.servable.vllm:
        return "yes"
    kind = "named" if named is not None and named.servable.vllm else "no"
    return f"{kind} {note(family, lora.servable.reason)}"


def _parity(family: Family, tried: dict[str, Tried], note: Callable[[Family, str | None], str]) -> str:
    one = [tried[key] for column in SERVED if (key := f"{family.name}/{column}") in tried]
    if not any(each.result.artifact is not None and each.result.artifact.servable.vllm for each in one):
        return "–"
    found = [each.engine for each in one if each.engine is not None]
    if not found:
        why = family.unmeasured or next((each.no_engine for each in one if each.no_engine), None)
        return f"not measured {note(family, why)}" if why else "not measured"
    kind = family.engine.get("dtype")
    return figure(max(found)) if kind is None else f"{figure(max(found))} in {kind}"


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
    "  changes. `all-linear` does not include experts that are stacked in one parameter (name them with",
    "  `targetParameters`), nor linear modules that cannot get an adapter: the note says what happens to their names.",
    "- **merge**: distance of the merged weights from what was trained (norm of the difference of logits over their",
    "  norm).",
    "- **qlora** and **in 4 bits**: `qlora: {}`, and the share of the weights that 4 bits hold.",
    "- **named**: `lora` with modules given by name; **experts**: `lora` with `targetParameters`.",
    "- **vLLM**: whether the engine applies the adapter of `lora: {}`, or that of **named** modules only; **parity**:",
    "  greatest difference of log-probabilities between a real vLLM on a CPU (in float32, where no other type is",
    "  given) and the `parity.json` of the artifacts of **lora** and **named**. Experts, which have no adapter there,",
    "  are computed as without `--enable-lora`: with it, vLLM has kernels for GPUs only. Besides, vLLM loaded a strong",
    "  random adapter for the modules of each name alone: modules whose adapters it refuses, ignores or applies",
    "  otherwise than PEFT are named in the note. Of Qwen3.5, it loaded one of `in_proj_z` with one of `in_proj_qkv`,",
    "  without which it refuses it, and those of `in_proj_a` and `in_proj_b`, whose effect is small, with one of",
    "  `out_proj`. On a CPU, vLLM computes latent attention (DeepSeek, GLM-4.7-Flash) otherwise than transformers:",
    "  with strong adapters of DeepSeek-V3's `q_a_proj`, `q_b_proj`, `kv_a_proj_with_mqa` and `o_proj` it differs as",
    "  much as with the same weights merged into the base, to 1e-6, so it does apply them.",
    "",
    f"| {' | '.join(_COLUMNS)} |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
]


_LEFT_OUT_HEAD = [
    "## Without a row",
    "",
    "Every other causal model that these releases of transformers and vLLM share is in the table, except:",
    "",
]


def main() -> int:
    """Write the table; return 1 if a cell does not hold its verdict."""
    parser = parser_of(__doc__, "families")
    parser.add_argument("--columns", nargs="*", help="columns to measure, with --only: lora, qlora, ia3, full, …")
    arguments = parser.parse_args()
    prepare_processes()
    families = [family for family in FAMILIES if not arguments.only or family.name in arguments.only]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        work = (arguments.work or Path(name)).resolve()
        sources = sources_digest()
        runs = [Run(family, work, sources, tuple(arguments.columns or ())) for family in families]
        checked = {}
        asked = engines(arguments.engine, arguments.processes) if arguments.engine else nullcontext(lambda _: None)
        with asked as ask, ThreadPoolExecutor(arguments.processes) as threads:
            for run, (seconds, each) in zip(runs, threads.map(measure, runs), strict=True):
                checked[run.family.name] = each
                problems = [problem for one in each.tried.values() for problem in one.problems]
                write_line(f"{run.family.name}: {'; '.join(problems) or 'as PEFT'}; {seconds:.0f} CPU seconds")
                if each.request:
                    ask(each.request)
            write_line(f"checked after {time.monotonic() - started:.0f} seconds")
        tried = {key: one for each in checked.values() for key, one in each.tried.items()}
        if arguments.engine:
            found: dict[str, frozenset[str]] = {}
            for family, each in zip(families, checked.values(), strict=True):
                answers = fill_in_answers(tried, each.request, limit_of(family)) if each.request else {}
                own = each.unknown | unapplied(each.class_name, answers)
                check_known(each, each.unknown | answers.keys(), own)
                if answers or own:
                    found[each.class_name] = found.get(each.class_name, frozenset()) | own
            write_unadapted(found)
        write_line(f"{len(families)} families took {time.monotonic() - started:.0f} seconds")
    return report(document(checked, families), DOCUMENT, tried, only=bool(arguments.only))


def unapplied(class_name: str, answers: dict[str, Any]) -> frozenset[str]:
    """Return the modules, without the numbers of layers, of which vLLM refuses, ignores or misapplies adapters.

    Latent attention is computed otherwise on CPUs, with merged weights just as with an adapter, so only its
    `kv_b_proj`, which is known from vLLM's sources, and refused adapters count.

    Args:
        class_name: architecture, as vLLM knows it.
        answers: those of an engine about modules.
    """
    if class_name in LATENT_ATTENTION:
        return frozenset(name for name in answers if "error" in answers[name] or name.endswith(f".{ABSORBED}"))
    return frozenset(
        name
        for name, answer in answers.items()
        if "error" in answer or not answer["difference"] <= _APPLIED * answer["effect"]
    )


def check_known(checked: Checked, asked: AbstractSet[str], found: frozenset[str]) -> None:
    """Note that validation does not know yet to which modules vLLM applies adapters."""
    known = {name for name in asked if is_unadapted(checked.class_name, name)}
    if found != known:
        wrong = ", ".join(sorted(found ^ known))
        first = next(iter(checked.tried.values()))
        first.problems.append(f"{UNADAPTED_MODULE.name} was wrong about {wrong}: run the command again, to apply it")


def limit_of(family: Family) -> float:
    """Return the greatest difference of log-probabilities of a family's engine that is not a problem."""
    if family.engine.get("dtype") == "bfloat16":
        return _BFLOAT16_LIMIT
    if "kv_lora_rank" in family.settings:
        return _LATENT_LIMIT
    return _XIELU_LIMIT if family.model_type == "apertus" else PARITY_LIMIT


def write_unadapted(found: dict[str, frozenset[str]]) -> None:
    """Write the modules that vLLM does not adapt, by architecture; those of engines that did not run are kept."""
    entries = {name: UNADAPTED[name] for name in UNADAPTED if name not in found} | found
    lines = ["UNADAPTED: dict[str, frozenset[str]] = {"]
    for name, modules in sorted(entries.items()):
        modules -= {module for module in modules if name in LATENT_ATTENTION and module.endswith(f".{ABSORBED}")}
        if modules:
            lines += [f'    "{name}": frozenset(', "        {"]
            lines += [f'            "{module}",' for module in sorted(modules)]
            lines += ["        }", "    ),"]
    head, rest = UNADAPTED_MODULE.read_text().split("UNADAPTED:", 1)
    head = re.sub(r'ASKED = ".*"', f'ASKED = "{VLLM}"', head)
    UNADAPTED_MODULE.write_text("\n".join([head + lines[0], *lines[1:], rest[rest.index('}\n"""') :]]))


if __name__ == "__main__":
    sys.exit(main())
