"""Rules for adapters that vLLM can load safely: `adapter_config.json` and the names of the weights.

Validation applies them to the adapter that a job will save, the trainer to the saved one, the agent before loading.
The engine uses the keys of `rank_pattern` and `alpha_pattern` as regular expressions, so only literal module names are
accepted.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tunesmith.api.method import SERVED_TYPES
from tunesmith.api.methods.lora import INITIALIZATIONS, Initialization
from tunesmith.contracts.strict_json import parse_object
from tunesmith.contracts.vllm_architectures import LATENT_ATTENTION, VLLM
from tunesmith.contracts.vllm_modules import UNADAPTED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

T = TypeVar("T")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TENSOR_PREFIX = "base_model.model."
"""Prefix of every tensor's name, before the module's name."""
TENSOR_SUFFIXES: dict[str, Literal["A", "B"]] = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
}
"""Suffixes of tensors' names, after the module's name, with the matrix that each denotes."""
MERGED = "merge the adapter (output.merge) and serve the result as a model of its own"
"""What to do with an adapter that vLLM cannot serve."""
ABSORBED = "kv_b_proj"
"""Module of latent attention whose weights vLLM multiplies into others when it loads the base, past an adapter."""
_PACKED_AFTER = {"in_proj_z": "in_proj_qkv"}
"""Modules that vLLM packs into one matrix with an earlier one, and whose adapters it refuses without that one's."""
MAX_RANK = 512
"""Highest rank that vLLM supports (--max-lora-rank)."""
MAX_CONFIG_BYTES = 256 * 1024
MAX_PATTERNS = 256
"""Highest number of keys in each pattern: the engine compiles them and matches them against every module."""
MAX_ALPHA = 65_536
_MAX_VALUES = 65_536
_MAX_NAMES = 4096
_MAX_NAME = 256
_MAX_TEXT = 1024
_LITERAL = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
_INITIALIZATIONS = frozenset(
    traits.peft
    for name, traits in INITIALIZATIONS.items()
    if isinstance(traits.peft, str) and not traits.changes_base and name is not Initialization.LOFTQ
)
"""Initializations that leave the base unchanged."""


class UnservableError(Exception):
    """An adapter that the engine must not load.

    Args:
        message: a sentence about the adapter.
        keys: keys of adapter_config.json that enable features that vLLM lacks.
    """

    def __init__(self, message: str, keys: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.keys = keys


@dataclass(frozen=True)
class LoraConfig:
    """Values of a checked adapter_config.json that determine shapes and scales."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilized: bool = False
    fan_in_fan_out: bool = False

    @property
    def highest_rank(self) -> int:
        """Highest rank of any module."""
        return max(self.rank, *self.rank_pattern.values(), 0)

    def rank_of(self, module: str) -> int:
        """Return the rank of a module, as PEFT and vLLM choose it."""
        return _first_match(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """Return the factor of B·A for a module, as PEFT and vLLM compute it."""
        rank = self.rank_of(module)
        divisor = math.sqrt(rank) if self.rank_stabilized else rank
        return _first_match(self.alpha_pattern, module, self.alpha) / divisor


def _first_match(pattern: Mapping[str, T], module: str, default: T) -> T:
    """Return the value of the first key, in the pattern's order, that is the module's name or its last components."""
    if not pattern:
        return default
    parts = module.split(".")
    suffixes = {".".join(parts[start:]) for start in range(len(parts))}
    found = suffixes & pattern.keys()
    if len(found) <= 1:
        return pattern[found.pop()] if found else default
    return next(value for key, value in pattern.items() if key in found)


def parse_adapter_config(document: bytes) -> LoraConfig:
    """Check an `adapter_config.json`.

    Raises:
        UnservableError: it is malformed, has unknown keys or values, is not LoRA, or uses a feature that vLLM lacks.
    """
    try:
        config = parse_object(document, max_bytes=MAX_CONFIG_BYTES, max_values=_MAX_VALUES)
    except ValueError as error:
        raise UnservableError(f"{ADAPTER_CONFIG} is malformed: {error}") from None
    return check_adapter_config(config)


def check_adapter_config(config: Mapping[str, Any]) -> LoraConfig:
    """Check the content of an `adapter_config.json`.

    Raises:
        UnservableError: it has unknown keys or values, is not LoRA, or uses a feature that vLLM lacks.
    """
    if config.get("peft_type") not in SERVED_TYPES:
        raise UnservableError(
            f"vLLM loads {', '.join(SERVED_TYPES)} adapters only, not {_shown(config.get('peft_type'))}",
            ("peft_type",),
        )
    if config.get("task_type") is not None and config["task_type"] != "CAUSAL_LM":
        raise UnservableError(f"the adapter's task is {_shown(config['task_type'])}; it must be CAUSAL_LM")
    if used := _unsupported(config):
        raise UnservableError(f"the adapter uses {', '.join(used.values())}; vLLM does not support that", tuple(used))
    for key, value in config.items():
        if key not in _ALLOWED:
            raise UnservableError(
                f"{ADAPTER_CONFIG} has the key {_shown(key)}, which is not one of PEFT's LoRA: remove it"
            )
        fits, expected = _ALLOWED[key]
        if not fits(value):
            raise UnservableError(f"{key} of {ADAPTER_CONFIG} must be {expected}, not {_shown(value)}")
    missing = [key for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]
    if missing:
        raise UnservableError(f"{ADAPTER_CONFIG} has no {', no '.join(missing)}")
    return LoraConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        rank_stabilized=bool(config.get("use_rslora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
    )


def check_rank(config: LoraConfig, max_rank: int, limit: str) -> None:
    """Check the highest rank of any module.

    Args:
        config: configuration of the adapter.
        max_rank: highest rank that is accepted.
        limit: the limit's name in the message, such as "the pool's engine.maxLoraRank".

    Raises:
        UnservableError: the highest rank exceeds `max_rank`.
    """
    if config.highest_rank > max_rank:
        raise UnservableError(f"the adapter's rank is {config.highest_rank}; {limit} is {max_rank}", ("r",))


def split_tensor_name(name: str) -> tuple[str, Literal["A", "B"]]:
    """Return the module of the base model, and the matrix, that a tensor of an adapter belongs to.

    Raises:
        UnservableError: the name is not that of a tensor of a LoRA adapter.
    """
    suffix = next((suffix for suffix in TENSOR_SUFFIXES if name.endswith(suffix)), None)
    if suffix is None or not name.startswith(TENSOR_PREFIX):
        raise UnservableError(
            f"the tensor {name} is not one of a LoRA adapter: names are {TENSOR_PREFIX}<module>.lora_A.weight or "
            "lora_B.weight"
        )
    return name.removeprefix(TENSOR_PREFIX).removesuffix(suffix), TENSOR_SUFFIXES[suffix]


def check_modules(architecture: str, adapted: Iterable[str], linear: Iterable[str] | None = None) -> None:
    """Check that vLLM applies the adapter to each module as PEFT does.

    Args:
        architecture: first of `architectures` of the base model's config.json.
        adapted: full names of the modules with an adapter.
        linear: full names of all modules that could have one, for the message; None: unknown.

    Raises:
        UnservableError: vLLM would not apply the adapter to a module.
    """
    adapted = set(adapted)
    for name in sorted(adapted):
        layer, _, last = name.rpartition(".")
        first = _PACKED_AFTER.get(last)
        if first is not None and f"{layer}.{first}" not in adapted:
            raise UnservableError(
                f"vLLM {VLLM} refuses an adapter of {name} without one of {first} in the same layer: train it too, or "
                f"{MERGED}",
                ("target_modules",),
            )
    without = sorted({_last_part(name) for name in adapted if is_unadapted(architecture, name)})
    if not without:
        return
    others = {_last_part(name) for name in linear or () if not is_unadapted(architecture, name)} - set(without)
    named = f" (targetModules: [{', '.join(sorted(others))}])" if others else ""
    fewer = f"train without {'it' if len(without) == 1 else 'them'}{named}, or "
    raise UnservableError(
        f"vLLM {VLLM} does not apply adapters to {', '.join(without)} of a {architecture}: "
        f"{fewer if others or linear is None else ''}{MERGED}",
        ("target_modules",),
    )


def is_unadapted(architecture: str, module: str) -> bool:
    """Return True if vLLM does not apply the adapter of a module, or not as PEFT does.

    Args:
        architecture: first of `architectures` of the base model's config.json.
        module: full name of the module.
    """
    if _last_part(module) == ABSORBED and architecture in LATENT_ATTENTION:
        return True
    return of_any_layer(module) in UNADAPTED.get(architecture, frozenset())


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def of_any_layer(name: str) -> str:
    """Return a module's full name without the numbers of its layer and expert."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def check_pairs(names: Iterable[str]) -> dict[str, dict[Literal["A", "B"], str]]:
    """Check the names of an adapter's tensors; return the names of each module's two matrices.

    Raises:
        UnservableError: there are no tensors, one is not a LoRA adapter's, or a module lacks a matrix or has two.
    """
    modules: dict[str, dict[Literal["A", "B"], str]] = {}
    for name in names:
        module, matrix = split_tensor_name(name)
        matrices = modules.setdefault(module, {})
        if matrix in matrices:
            raise UnservableError(f"{name} appears twice, as a weight of a layer and of an embedding")
        matrices[matrix] = name
    if not modules:
        raise UnservableError(f"{ADAPTER_WEIGHTS} contains no tensors")
    for module, matrices in modules.items():
        if len(matrices) != len(set(TENSOR_SUFFIXES.values())):
            raise UnservableError(f"{module} has only one of lora_A and lora_B")
    return modules


def _unsupported(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the enabled features that vLLM lacks, by the key that enables each."""
    used = {key: name for key, name in _UNSUPPORTED.items() if config.get(key)}
    if config.get("bias", "none") != "none":
        used["bias"] = f"bias={_shown(config['bias'])}"
    initialization = config.get("init_lora_weights")
    if isinstance(initialization, str) and initialization.lower() not in _INITIALIZATIONS:
        used["init_lora_weights"] = f"the initialization {_shown(initialization)}, which changes the base or is unknown"
    return used


# PEFT's LoRA features that vLLM lacks, by the key of adapter_config.json that enables each.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "biases of LoRA layers",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "layer_replication": "layer replication",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "parameters as targets",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow",
    "auto_map": "custom code (auto_map)",
}


def is_literal(name: object) -> bool:
    """Return True if `name` is a module's name, or its last components, without regular-expression metacharacters.

    The dot is allowed: as an expression it also matches itself, and no base model has names that differ only there.
    """
    return isinstance(name, str) and len(name) <= _MAX_NAME and _LITERAL.fullmatch(name) is not None


def _is_flag(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _is_number(value: object) -> bool:
    return type(value) in {int, float} and math.isfinite(value)  # type: ignore[arg-type]


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value <= MAX_ALPHA


def _is_alpha(value: object) -> bool:
    return _is_number(value) and 0 < value <= MAX_ALPHA  # type: ignore[operator]


def _is_text(value: object) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= _MAX_TEXT)


def _is_settings(value: object) -> bool:
    return value is None or isinstance(value, dict)


def _are_names(value: object) -> bool:
    names = value if isinstance(value, list) else [value]
    return value is None or (len(names) <= _MAX_NAMES and all(map(is_literal, names)))


def _are_layers(value: object) -> bool:
    layers = value if isinstance(value, list) else [value]
    return value is None or (len(layers) <= _MAX_NAMES and all(type(layer) is int for layer in layers))


def _is_pattern(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        return value is None or (
            isinstance(value, dict)
            and len(value) <= MAX_PATTERNS
            and all(map(is_literal, value))
            and all(map(fits, value.values()))
        )

    return check


_FLAG = (_is_flag, "true or false")
_TEXT = (_is_text, f"a string of at most {_MAX_TEXT} characters")
_SETTINGS = (_is_settings, "an object or null")
_NAMES = (
    _are_names,
    f"module names, at most {_MAX_NAMES}, of letters, digits, '_', '-' and '.': regular expressions are not accepted",
)
_PATTERN_NAMES = (
    f"an object of at most {MAX_PATTERNS} module names of letters, digits, '_', '-' and '.' (regular expressions are "
    "not accepted)"
)
_OFF = (lambda value: not value, "absent")

_ALLOWED: dict[str, tuple[Callable[[object], bool], str]] = {
    "peft_type": _TEXT,
    "task_type": _TEXT,
    "peft_version": _TEXT,
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "bias": _TEXT,
    "megatron_core": _TEXT,
    "inference_mode": _FLAG,
    "fan_in_fan_out": _FLAG,
    "use_rslora": _FLAG,
    "ensure_weight_tying": _FLAG,
    "init_lora_weights": (lambda value: isinstance(value, bool | str) or value is None, "true, false or a name"),
    "r": (_is_rank, "a natural number"),
    "lora_alpha": (_is_alpha, f"a number above 0, at most {MAX_ALPHA}"),
    "lora_dropout": (lambda value: value is None or _is_number(value), "a number"),
    "qalora_group_size": (lambda value: value is None or _is_number(value), "a number"),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_pattern": _NAMES,
    "layers_to_transform": (_are_layers, "numbers of layers"),
    "rank_pattern": (_is_pattern(_is_rank), f"{_PATTERN_NAMES} with ranks that are natural numbers"),
    "alpha_pattern": (_is_pattern(_is_alpha), f"{_PATTERN_NAMES} with numbers above 0, at most {MAX_ALPHA}"),
    "eva_config": _SETTINGS,
    "corda_config": _SETTINGS,
    "lora_ga_config": _SETTINGS,
    "loftq_config": _SETTINGS,
    "megatron_config": _SETTINGS,
    "runtime_config": _SETTINGS,
    "auto_mapping": _SETTINGS,
    **dict.fromkeys(_UNSUPPORTED, _OFF),
}
"""Keys of PEFT's LoraConfig: a check of the value, and its description."""


def _shown(value: object) -> str:
    """Return a value of the file for a message: short and printable."""
    text = value if isinstance(value, str) and value.isascii() and value.isprintable() else ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}…"  # noqa: PLR2004
