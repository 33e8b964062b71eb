"""Trains adapters on a tiny model of a family, and checks what was trained; `verify_architectures` has the table."""

from __future__ import annotations

import hashlib
import json
import pickle
import time
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
from tests.trainer.architectures import VOCABULARY, Family, make
from tests.trainer.verify_methods import Trial, apart, compare_reloaded, engine_request, keep
from tunesmith.api.methods.lora import LORA
from tunesmith.contracts import vllm_modules
from tunesmith.contracts.safetensors import LENGTH_BYTES
from tunesmith.contracts.servability import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MAX_RANK,
    is_unadapted,
    of_any_layer,
)
from tunesmith.contracts.vllm_architectures import WITH_ADAPTERS
from tunesmith.contracts.vllm_modules import UNADAPTED
from tunesmith_server.base_weights import read_base_weights
from tunesmith_server.lora import UnfitAdapterError, check_config, check_header, check_length, weight_bounds
from tunesmith_trainer.errors import InvalidSpecError
from tunesmith_trainer.methods.targets import BYPASSED, adaptable, modules_of, resolve_targets

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.trainer.verify_methods import Tried
    from tunesmith_trainer.methods.targets import Modules

SERVED = ("lora", "named")
"""Columns whose adapters are loaded by vLLM."""
_UNADAPTED_MODULE = Path(vllm_modules.__file__)
_REPOSITORY = Path(__file__).parents[2]
_CHECKS = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
"""Digest of this program, which determines what is checked."""
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
_PROBE_TOKENS = 24
_SCALES = (0.1, 0.5, 2.0, 8.0)
"""Standard deviations of the values of the second matrix of a module's adapter, of which the least is used that has:"""
_EFFECT = 0.5
"""Change of a log-probability by the adapter of one module."""
_BESIDE = {
    # vLLM refuses its adapter alone.
    "linear_attn.in_proj_z": "linear_attn.in_proj_qkv",
    # Their effect on a tiny model is less than bfloat16's error, unless more of the layer's output is used.
    "linear_attn.in_proj_a": "linear_attn.out_proj",
    "linear_attn.in_proj_b": "linear_attn.out_proj",
}
"""Modules whose adapter is tried with one of another module, and the effect is that of both over the other's."""


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


def write_modules(published: Path, names: Iterable[str], folder: Path) -> dict[str, Path]:
    """Write an adapter for the modules of each name alone, random and strong, with what PEFT computes with it.

    Those of `_BESIDE` have another's adapter too.

    Args:
        published: folder of the base.
        names: full names of modules.
        folder: folder to write to.

    Returns:
        The folder of each adapter, by the modules' name without the numbers of layers.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(of_any_layer(name), []).append(name)
    model: Any = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    # The first ones are special.
    tokens = torch.randint(10, VOCABULARY, (_PROBE_TOKENS,), generator=torch.Generator().manual_seed(1))
    without = _log_probabilities(model, tokens)
    folders = {}
    torch.manual_seed(0)
    for group, members in sorted(groups.items()):
        layer, _, name = group.rpartition(".layers.")
        beside = groups.get(f"{layer}.layers.{_BESIDE[name]}", []) if name in _BESIDE else []
        config = LoraConfig(r=4, lora_alpha=8, target_modules=[*beside, *members], task_type="CAUSAL_LM")
        adapted: Any = get_peft_model(model, config)
        base = _strengthen(adapted, beside, tokens, without) if beside else without
        found = _strengthen(adapted, members, tokens, base)
        folders[group] = folder / group
        adapted.save_pretrained(folders[group])
        # PEFT writes a set; the same content has the same answers.
        saved = folders[group] / ADAPTER_CONFIG
        content = json.loads(saved.read_text())
        saved.write_text(json.dumps(content | {"target_modules": sorted(content["target_modules"])}))
        answer = {"tokens": tokens.tolist(), "base": base.tolist(), "adapter": found.tolist()}
        (folders[group] / "module.json").write_text(json.dumps(answer))
        model = adapted.unload()
    return folders


def _strengthen(adapted: Any, members: list[str], tokens: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
    """Make the adapters of modules strong, so that they have an effect; return the log-probabilities with them."""
    prefixes = tuple(f"base_model.model.{name}.lora_B." for name in members)
    second = [value for name, value in adapted.named_parameters() if name.startswith(prefixes)]
    directions = [torch.randn(value.shape, generator=torch.Generator().manual_seed(2)) for value in second]
    found = without
    for scale in _SCALES:
        for value, direction in zip(second, directions, strict=True):
            value.data.copy_(scale * direction)
        found = _log_probabilities(adapted, tokens)
        if float((found - without).abs().max()) >= _EFFECT:
            break
    return found


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


def left_out(modules: Modules) -> list[str]:
    """Return the reasons why `all-linear` does not include linear modules, as they are given for their names."""
    usable = {full.rpartition(".")[2] for full in adaptable(modules, str(LORA.peft_type))}
    reasons = []
    for name in sorted({full.rpartition(".")[2] for full in modules.linear} - usable):
        try:
            resolve_targets([name], modules, str(LORA.peft_type))
        except InvalidSpecError as error:
            reasons.append(str(error))
    return reasons


@dataclass
class Checked:
    """Results of the methods on one family, and the request for an engine.

    Args:
        tried: results, by `<family>/<column>`.
        request: request for `engines`; None: the engine's answers cannot be compared.
        class_name: architecture, as vLLM knows it.
        unknown: modules, without the numbers of layers, that agents do not find among the published weights.
        left_out: why `all-linear` does not include some linear modules.
    """

    tried: dict[str, Tried]
    request: dict[str, Any] | None
    class_name: str
    unknown: frozenset[str]
    left_out: list[str]


@dataclass(frozen=True)
class Run:
    """Everything that is done with one family.

    Args:
        family: the family.
        work: folder of all families.
        sources: digest of the programs that determine the results.
        columns: columns to measure; empty: all.
    """

    family: Family
    work: Path
    sources: str
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
                _RATE if column in SERVED else None,
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
        depends = f"{_CHECKS} {self.columns}".encode()
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
        served = {trials[column].key: tried[column] for column in SERVED if column in tried}
        for one in served.values():
            check_agent(one, tried["lora"].base)
        request, names, unknown = None, dict[str, tuple[int, int]](), frozenset[str]()
        if modules.class_name in WITH_ADAPTERS and not modules.alone:
            weights = read_base_weights(tried["lora"].base)
            names = adaptable(modules, str(LORA.peft_type))
            unknown = frozenset(of_any_layer(name) for name in names if weights.matrix_of(name) is None)
        if not self.family.unmeasured and names:
            engine = dict(self.family.engine)
            if "kv_lora_rank" in self.family.settings:
                # That of processors with AMX computes in bfloat16 only.
                engine["attention_config"] = {"backend": "CPU_MLA"}
            if self.family.experts:
                # vLLM's kernels for CPUs have no adapters of experts, which it would prepare for.
                applied = [name for name in names if not is_unadapted(modules.class_name, name)]
                engine["lora_target_modules"] = sorted({name.rpartition(".")[2] for name in applied})
            adapters = write_modules(tried["lora"].base, names, self.folder / "modules")
            request = engine_request(served, tried["lora"].base, self.folder, adapters, **engine)
        by_key = {trials[column].key: one for column, one in tried.items()}
        return Checked(by_key, request, modules.class_name, unknown, left_out(modules))


def measure(run: Run) -> tuple[float, Checked]:
    """Train and check a family, each in a process of its own; return the seconds of computing and the results."""
    training = apart(Run.train, run)
    checking, checked = apart(Run.check, run)
    return training + checking, checked


def sources_digest() -> str:
    """Return a digest of the programs that determine the results."""
    digest = hashlib.sha256()
    for pattern in _DEPENDS:
        for file in sorted(_REPOSITORY.glob(pattern)):
            if file != _UNADAPTED_MODULE:
                digest.update(file.read_bytes())
    return digest.hexdigest()


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
