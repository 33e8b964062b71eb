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
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.trainer import agent_package  # noqa: F401 - before the agent's modules
from tests.trainer.architectures import FAMILIES, Family, make
from tests.trainer.verify_methods import (
    PARITY_LIMIT,
    ask_engines,
    compare_reloaded,
    engine_request,
    figure,
    fill_in_answers,
    parser_of,
    report,
    try_case,
    write_line,
)
from tunesmith.contracts import vllm_modules
from tunesmith.contracts.parity import PARITY_FILE, Parity
from tunesmith.contracts.safetensors import LENGTH_BYTES
from tunesmith.contracts.servability import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MAX_RANK, of_any_layer
from tunesmith.contracts.vllm_architectures import VLLM, WITH_ADAPTERS
from tunesmith.contracts.vllm_modules import UNADAPTED
from tunesmith_server.base_weights import read_base_weights
from tunesmith_server.lora import UnfitAdapterError, check_config, check_header, check_length, weight_bounds
from tunesmith_trainer.methods.targets import modules_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.trainer.verify_methods import Tried

UNADAPTED_MODULE = Path(vllm_modules.__file__)
DOCUMENT = Path(__file__).parents[2] / "docs/architectures.md"
_LORA = {"rank": 4, "alpha": 8}
_RATE = 0.02
"""Learning rate with which each adapted module has an effect that an engine's answers reveal."""
_BFLOAT16_LIMIT = 0.05
_LATENT_LIMIT = 2e-3
"""vLLM's kernel for latent attention on CPUs is less exact: so much it differs without an adapter."""
_LEAST_EFFECT = 10
"""Least effect of each adapted module, as a multiple of the difference between engine and trainer."""


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


def least_effect(base: Path, artifact: Path) -> tuple[float, str]:
    """Return the least change of a recorded log-probability without the modules of a name, and that name.

    An engine whose answers are nearer than that applies the adapter to all modules.
    """
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), artifact)
    parity = Parity.model_validate_json((artifact / PARITY_FILE).read_bytes())
    expected = _chosen(model, parity)
    by_name: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            by_name.setdefault(name.split(".lora_B.")[0].rpartition(".")[2], []).append(parameter.data)
    found = []
    for name, tensors in by_name.items():
        kept = [tensor.clone() for tensor in tensors]
        for tensor in tensors:
            tensor.zero_()
        found.append((float((_chosen(model, parity) - expected).abs().max()), name))
        for tensor, before in zip(tensors, kept, strict=True):
            tensor.copy_(before)
    return min(found)


def _chosen(model: Any, parity: Parity) -> torch.Tensor:
    """Return the log-probabilities of the recorded answers' tokens."""
    scores = []
    for probe in parity.probes:
        answer = torch.tensor(probe.answer_token_ids)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*probe.prompt_token_ids, *probe.answer_token_ids]])).logits
        rows = torch.log_softmax(logits[0, -len(answer) - 1 : -1], dim=-1)
        scores.append(rows.gather(1, answer[:, None])[:, 0])
    return torch.cat(scores)


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
        lora, quantized = tried[f"{family.name}/lora"], tried.get(f"{family.name}/qlora")
        counted = lora.result.preflight
        adapted = f"{counted.adapted_percent} %" if counted is not None else "–"
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
    return "\n".join([*_HEAD, *lines, "", "## Notes", "", *(f"{i}. {text}" for i, text in enumerate(notes, 1)), ""])


def _served(family: Family, tried: dict[str, Tried], note: Callable[[Family, str | None], str]) -> str:
    artifacts = [one.result.artifact for column in _SERVED if (one := tried.get(f"{family.name}/{column}"))]
    lora, named = artifacts[0], artifacts[-1]
    if lora is None:
        return "–"
    if lora.servable.vllm:
        return "yes"
    kind = "named" if named is not None and named.servable.vllm else "no"
    return f"{kind} {note(family, lora.servable.reason)}"


def _parity(family: Family, tried: dict[str, Tried], note: Callable[[Family, str | None], str]) -> str:
    one = [tried[key] for column in _SERVED if (key := f"{family.name}/{column}") in tried]
    if not any(each.result.artifact is not None and each.result.artifact.servable.vllm for each in one):
        return "–"
    found = [each.engine for each in one if each.engine is not None]
    if not found:
        return f"not measured {note(family, family.unmeasured)}" if family.unmeasured else "not measured"
    kind = family.engine.get("dtype")
    return figure(max(found)) if kind is None else f"{figure(max(found))} in {kind}"


_SERVED = ("lora", "named")
"""Columns whose adapters are loaded by vLLM."""
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
    "- **vLLM**: whether the engine applies the adapter of `lora: {}`, or that of **named** modules only; **parity**:",
    "  greatest difference of log-probabilities between a real vLLM on a CPU (in float32, where no other type is",
    "  given) and the `parity.json` of the artifacts of **lora** and **named**. Experts, which have no adapter there,",
    "  are computed as without `--enable-lora`: with it, vLLM has kernels for GPUs only.",
    "",
    f"| {' | '.join(_COLUMNS)} |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
]


def main() -> int:
    """Write the table; return 1 if a cell does not hold its verdict."""
    parser = parser_of(__doc__, "families")
    parser.add_argument("--columns", nargs="*", help="columns to measure, with --only: lora, qlora, ia3, full, …")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    families = [family for family in FAMILIES if not arguments.only or family.name in arguments.only]
    tried: dict[str, Tried] = {}
    requests = []
    with tempfile.TemporaryDirectory() as name:
        work = arguments.work or Path(name)
        for family in families:
            base = make(family, work / "bases" / family.model_type)
            own: dict[str, Tried] = {}
            for column, (method, merge) in methods_of(family).items():
                if arguments.columns and column not in arguments.columns:
                    continue
                key = f"{family.name}/{column}"
                rate = _RATE if column in {"lora", "named"} else None
                own[key] = try_case(method, base, work / "runs" / family.model_type / column, merge, rate)
                check_reason(own[key])
                write_line(f"{key}: {own[key].result.message if own[key].result.reason else 'trained'}")
            check_count(own[f"{family.name}/lora"], family)
            lora = {key: one for key, one in own.items() if key.endswith(("/lora", "/named"))}
            modules = modules_of(family.config)
            names = modules.linear if modules.class_name in WITH_ADAPTERS else ()
            engine = dict(family.engine)
            if family.experts:
                # vLLM's kernels for CPUs have no adapters of experts, which it would prepare for.
                engine["lora_target_modules"] = sorted({name.rpartition(".")[2] for name in names})
            if not family.unmeasured:
                request = engine_request(lora, base, work / "runs" / family.model_type, names, **engine)
                requests.append((family, request))
            for one in lora.values():
                check_agent(one, base)
            tried |= own
        compare_reloaded(tried, work)
        if arguments.engine:
            ask_engines([request for _, request in requests], arguments.engine, work)
            found = {
                modules_of(family.config).class_name: fill_in_answers(tried, request, limit_of(family))
                for family, request in requests
            }
            for one in tried.values():
                check_effect(one)
            if not arguments.only:
                write_unadapted(found)
    return report(document(tried, families), DOCUMENT, tried, only=bool(arguments.only))


def limit_of(family: Family) -> float:
    """Return the greatest difference of log-probabilities of a family's engine that is not a problem."""
    if family.engine.get("dtype") == "bfloat16":
        return _BFLOAT16_LIMIT
    return _LATENT_LIMIT if "kv_lora_rank" in family.settings else PARITY_LIMIT


def write_unadapted(found: dict[str, list[str] | None]) -> None:
    """Write the modules that vLLM cannot adapt, by architecture; those of engines that did not run stay as they were.

    Args:
        found: full names of such modules, by architecture; None: the engine did not run.
    """
    entries = {name: frozenset(map(of_any_layer, modules)) for name, modules in found.items() if modules is not None}
    entries = {name: UNADAPTED[name] for name in UNADAPTED if name not in entries} | entries
    lines = ["UNADAPTED: dict[str, frozenset[str]] = {"]
    for name, modules in sorted(entries.items()):
        if modules:
            lines += [f'    "{name}": frozenset(', "        {"]
            lines += [f'            "{module}",' for module in sorted(modules)]
            lines += ["        }", "    ),"]
    head, rest = UNADAPTED_MODULE.read_text().split("UNADAPTED:", 1)
    head = re.sub(r'ASKED = ".*"', f'ASKED = "{VLLM}"', head)
    UNADAPTED_MODULE.write_text("\n".join([head + lines[0], *lines[1:], rest[rest.index('}\n"""') :]]))


def check_effect(tried: Tried) -> None:
    """Note an adapter of which the engine's answers do not reveal whether it is applied to all modules.

    In bfloat16 they cannot; then the engine's list of modules tells.
    """
    if tried.engine is None or tried.engine > PARITY_LIMIT:
        return
    effect, name = least_effect(tried.base, tried.artifact)
    if effect < _LEAST_EFFECT * tried.engine:
        tried.problems.append(f"the answers do not reveal whether {name} has its adapter: they change by {effect:.1e}")


def check_agent(tried: Tried, base: Path) -> None:
    """Note an adapter that is reported as servable and that the agent of a pool would refuse."""
    if tried.result.artifact is None or not tried.result.artifact.servable.vllm:
        return
    weights = read_base_weights(base)
    size = (tried.artifact / ADAPTER_WEIGHTS).stat().st_size
    bounds = weight_bounds(weights, MAX_RANK)
    try:
        config = check_config((tried.artifact / ADAPTER_CONFIG).read_bytes(), max_rank=MAX_RANK)
        with (tried.artifact / ADAPTER_WEIGHTS).open("rb") as file:
            length = check_length(file.read(LENGTH_BYTES), size, bounds)
            check_header(file.read(length), size, config, weights, bounds)
    except UnfitAdapterError as error:
        tried.problems.append(f"the agent refuses it: {error}")


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
