"""Train adapters on a tiny model of every architecture that people fine-tune, and write docs/architectures.md.

Each method goes through the trainer's own command, is loaded again by plain PEFT in another process, merged, and, with
--engine, loaded by a real vLLM that must reproduce its parity.json.

Example: python -m tests.trainer.verify_architectures --engine server-image/engine-cpu/.venv
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.trainer import agent_package  # noqa: F401 - before the agent's modules
from tests.trainer.architectures import FAMILIES, LEFT_OUT, VOCABULARY, Family, make
from tests.trainer.verify_methods import (
    PARITY_LIMIT,
    Trial,
    apart,
    compare_reloaded,
    engine_request,
    engines,
    figure,
    fill_in_answers,
    keep,
    parser_of,
    prepare_processes,
    report,
    write_line,
)
from tunesmith.api.methods.lora import LORA
from tunesmith.contracts import vllm_modules
from tunesmith.contracts.safetensors import LENGTH_BYTES
from tunesmith.contracts.servability import (
    ABSORBED,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MAX_RANK,
    is_unadapted,
    of_any_layer,
)
from tunesmith.contracts.vllm_architectures import LATENT_ATTENTION, VLLM, WITH_ADAPTERS
from tunesmith.contracts.vllm_modules import UNADAPTED
from tunesmith_server.base_weights import read_base_weights
from tunesmith_server.lora import UnfitAdapterError, check_config, check_header, check_length, weight_bounds
from tunesmith_trainer.methods.targets import BYPASSED, adaptable, modules_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from collections.abc import Set as AbstractSet

    from tests.trainer.verify_methods import Tried

UNADAPTED_MODULE = Path(vllm_modules.__file__)
REPOSITORY = Path(__file__).parents[2]
DOCUMENT = REPOSITORY / "docs/architectures.md"
_DEPENDS = (
    "operator/src/tunesmith/contracts/*.py",
    "operator/src/tunesmith/api/**/*.py",
    "trainer-image/src/**/*.py",
    "trainer-image/uv.lock",
    "server-image/engine-cpu/uv.lock",
    *(f"tests/trainer/{name}.py" for name in ("verify_methods", "engine_probe", "tiny_model", "trainer_rig")),
)
"""Files that determine the results, besides those of a family."""
_LORA = {"rank": 4, "alpha": 8}
_RATE = 0.02
"""Learning rate with which each adapted module has an effect that an engine's answers reveal."""
_BFLOAT16_LIMIT = 0.05
_LATENT_LIMIT = 2e-3
"""vLLM's kernel for latent attention on CPUs is less exact: so much it differs without an adapter."""
_XIELU_LIMIT = 5e-4
"""vLLM's activation function of Apertus on CPUs is less exact."""
_PROBE_TOKENS = 24
_SCALES = (0.1, 0.5, 2.0, 8.0)
"""Standard deviations of the values of the second matrix of a module's adapter, of which the least is used that has:"""
_EFFECT = 0.5
"""Change of a log-probability by the adapter of one module."""
_APPLIED = 0.1
"""Greatest difference between engine and PEFT, as a share of that change, with which an adapter is applied.

Even bfloat16 is more exact; an adapter that is ignored or misapplied in one layer is not.
"""


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
    """Return the number of parameters that PEFT's own all-linear trains; 0 if PEFT refuses it.

    Without those that training bypasses.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(family.config)
    try:
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    except ValueError:
        return 0
    bypassed = f".{BYPASSED.get(family.model_type)}.lora_"
    return sum(
        parameter.numel()
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad and bypassed not in name
    )


def write_modules(base: Path, names: Iterable[str], folder: Path) -> dict[str, Path]:
    """Write an adapter for the modules of each name alone, random and strong, with what PEFT computes with it.

    Args:
        base: folder of the base.
        names: full names of modules.
        folder: folder to write to.

    Returns:
        The folder of each adapter, by the modules' name without the numbers of layers.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(of_any_layer(name), []).append(name)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # The first ones are special.
    tokens = torch.randint(10, VOCABULARY, (_PROBE_TOKENS,), generator=torch.Generator().manual_seed(1))
    without = _log_probabilities(model, tokens)
    folders = {}
    for group, members in sorted(groups.items()):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=members, task_type="CAUSAL_LM")
        adapted: Any = get_peft_model(model, config)
        second = [value for name, value in adapted.named_parameters() if ".lora_B." in name]
        directions = [torch.randn(value.shape, generator=torch.Generator().manual_seed(2)) for value in second]
        for scale in _SCALES:
            for value, direction in zip(second, directions, strict=True):
                value.data.copy_(scale * direction)
            found = _log_probabilities(adapted, tokens)
            if float((found - without).abs().max()) >= _EFFECT:
                break
        folders[group] = folder / group
        adapted.save_pretrained(folders[group])
        answer = {"tokens": tokens.tolist(), "base": without.tolist(), "adapter": found.tolist()}
        (folders[group] / "module.json").write_text(json.dumps(answer))
        model = adapted.unload()
    return folders


def _log_probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each token after the first."""
    with torch.no_grad():
        logits = model(input_ids=tokens[None]).logits[0, :-1]
    return torch.log_softmax(logits.float(), dim=-1).gather(1, tokens[1:, None])[:, 0]


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
    numbered = [f"{i}. {text}" for i, text in enumerate(notes, 1)]
    left_out = [f"- `{model_type}`: {why}." for model_type, why in LEFT_OUT.items()]
    return "\n".join([*_HEAD, *lines, "", "## Notes", "", *numbered, "", *_LEFT_OUT_HEAD, *left_out, ""])


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
        why = family.unmeasured or next((each.no_engine for each in one if each.no_engine), None)
        return f"not measured {note(family, why)}" if why else "not measured"
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
    "  are computed as without `--enable-lora`: with it, vLLM has kernels for GPUs only. Besides, vLLM loaded a strong",
    "  random adapter for the modules of each name alone: modules whose adapters it refuses, ignores or applies",
    "  otherwise than PEFT are named in the note.",
    "",
    f"| {' | '.join(_COLUMNS)} |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
]


@dataclass
class Checked:
    """Results of the methods on one family, and the request for an engine.

    Args:
        tried: results, by `<family>/<column>`.
        request: request for `engines`; None: the engine's answers cannot be compared.
        class_name: architecture, as vLLM knows it.
        unknown: modules, without the numbers of layers, that agents do not find among the published weights.
    """

    tried: dict[str, Tried]
    request: dict[str, Any] | None
    class_name: str
    unknown: frozenset[str]


@dataclass(frozen=True)
class Run:
    """Everything that is done with one family.

    Args:
        family: the family.
        work: folder of all families.
        sources: digest of the programs that determine the results.
        checks: digest of this program, which compares them.
        columns: columns to measure; empty: all.
    """

    family: Family
    work: Path
    sources: str
    checks: str
    columns: tuple[str, ...] = ()

    @cached_property
    def folder(self) -> Path:
        """Folder of the family's results, which are kept until something that they depend on changes."""
        class_name = self.family.whole or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.family.model_type]
        unadapted = sorted(UNADAPTED.get(class_name, ()))
        family = replace(self.family, unmeasured="")
        depends = repr((family, methods_of(self.family), _RATE, unadapted, self.sources))
        return self.work / self.family.model_type / hashlib.sha256(depends.encode()).hexdigest()[:16]

    def trials(self) -> dict[str, Trial]:
        """Return the trial of each column."""
        base = make(self.family, self.folder / "base")
        return {
            column: Trial(
                f"{self.family.name}/{column}",
                method,
                merge,
                base,
                self.folder / column,
                _RATE if column in _SERVED else None,
            )
            for column, (method, merge) in methods_of(self.family).items()
            if not self.columns or column in self.columns
        }

    def train(self) -> float:
        """Train every column that is not trained yet; return the seconds of computing."""
        started = time.process_time()
        for trial in self.trials().values():
            trial.run()
        return time.process_time() - started

    def check(self) -> tuple[float, Checked]:
        """Compare what was trained with PEFT, in a process that did not train it, if that was not done yet.

        Returns:
            The seconds of computing, and the results.
        """
        started = time.process_time()
        depends = f"{self.checks} {self.columns}".encode()
        kept = self.folder / f"checked-{hashlib.sha256(depends).hexdigest()[:16]}.pickle"
        if not kept.exists():
            keep(kept, pickle.dumps(self._compare()))
        checked = cast("Checked", pickle.loads(kept.read_bytes()))  # noqa: S301 - own file
        return time.process_time() - started, checked

    def _compare(self) -> Checked:
        modules = modules_of(self.family.config)
        trials = self.trials()
        tried = {column: trial.run() for column, trial in trials.items()}
        for one in tried.values():
            check_reason(one)
            compare_reloaded(one)
            check_trained(one)
            one.trained = None
        check_count(tried["lora"], self.family)
        served = {trials[column].key: tried[column] for column in _SERVED if column in tried}
        for one in served.values():
            check_agent(one, tried["lora"].base)
        request, names, unknown = None, dict[str, tuple[int, int]](), frozenset[str]()
        if modules.class_name in WITH_ADAPTERS and not modules.alone:
            weights = read_base_weights(tried["lora"].base)
            names = adaptable(modules, str(LORA.peft_type))
            unknown = frozenset(of_any_layer(name) for name in names if weights.matrix_of(name) is None)
        if not self.family.unmeasured and names:
            engine = dict(self.family.engine)
            if self.family.experts:
                # vLLM's kernels for CPUs have no adapters of experts, which it would prepare for.
                applied = [name for name in names if not is_unadapted(modules.class_name, name)]
                engine["lora_target_modules"] = sorted({name.rpartition(".")[2] for name in applied})
            adapters = write_modules(tried["lora"].base, names, self.folder / "modules")
            request = engine_request(served, tried["lora"].base, self.folder, adapters, **engine)
        by_key = {trials[column].key: one for column, one in tried.items()}
        return Checked(by_key, request, modules.class_name, unknown)


def measure(run: Run) -> tuple[float, Checked]:
    """Train and check a family, each in a process of its own; return the seconds of computing and the results."""
    training = apart(Run.train, run)
    checking, checked = apart(Run.check, run)
    return training + checking, checked


def _sources() -> str:
    """Return a digest of the programs that determine the results."""
    digest = hashlib.sha256()
    for pattern in _DEPENDS:
        for file in sorted(REPOSITORY.glob(pattern)):
            if file != UNADAPTED_MODULE:
                digest.update(file.read_bytes())
    return digest.hexdigest()


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
        checks = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        runs = [Run(family, work, _sources(), checks, tuple(arguments.columns or ())) for family in families]
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
                own = each.unknown | unapplied(answers)
                check_known(each, each.unknown | answers.keys(), own)
                if answers or own:
                    found[each.class_name] = found.get(each.class_name, frozenset()) | own
            write_unadapted(found)
        write_line(f"{len(families)} families took {time.monotonic() - started:.0f} seconds")
    return report(document(tried, families), DOCUMENT, tried, only=bool(arguments.only))


def unapplied(answers: dict[str, Any]) -> frozenset[str]:
    """Return the modules, without the numbers of layers, of which vLLM refuses, ignores or misapplies adapters."""
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


def check_trained(tried: Tried) -> None:
    """Note modules whose adapter training did not change."""
    weights = tried.artifact / ADAPTER_WEIGHTS
    if tried.result.reason is not None or not weights.exists():
        return
    with safe_open(weights, framework="pt") as tensors:
        same = sorted(
            {of_any_layer(name) for name in tensors.keys() if ".lora_B." in name and not tensors.get_tensor(name).any()}  # noqa: SIM118 - not a mapping
        )
    if same:
        tried.problems.append(f"training did not change {', '.join(same)}")


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
