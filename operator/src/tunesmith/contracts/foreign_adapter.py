"""Adapters that other trainers wrote: their files, and the translation of their keys and tensor names. Pure.

Trainers that use PEFT (Axolotl, LLaMA-Factory, Unsloth, NeMo AutoModel, TRL) write its files; their versions differ in
keys, and their wrappers leave parts in the names of tensors. MLX LM has names, shapes and scales of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from tunesmith.api.methods.lora import INITIALIZATIONS, Initialization, initialization_of
from tunesmith.contracts.servability import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

PICKLED_WEIGHTS = "adapter_model.bin"
MLX_WEIGHTS = "adapters.safetensors"
_MLX_RENAMED = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
"""Names of MLX LM's tensors after the module's name, and those of PEFT."""
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
"""Parts of names that wrappers of modules leave: those of FSDP, of recomputed activations and of torch.compile."""
_OF_COPIES = frozenset({"base_layer", "modules_to_save"})
"""Parts of the names of weights of the base that PEFT saves beside an adapter."""
_PREFIXES = ("base_model.model.", "module.")
"""Prefixes before the module's name: PEFT's, also repeated, and that of data parallelism."""
_MATRICES = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?P<end>\.weight|\.bias)?"
)
_EMPTY: tuple[Any, ...] = (None, False, [], {}, "")
_PEFT_ONCE = frozenset({"merge_weights", "enable_lora", "conv_lora", "auto_mapping"})
"""Keys that PEFT no longer has, or that only name the classes of the base."""
_INITIAL_FOLDERS = {
    Initialization.PISSA: "pissa_init",
    Initialization.FAST_PISSA: "pissa_init",
    Initialization.OLORA: "olora_init",
}
"""Sub-folder with the untrained adapter, by initialization: the names in PEFT's and LLaMA-Factory's examples."""
_CONVERTED = "pissa_converted"
"""Sub-folder in which LLaMA-Factory saves the adapter for the original base."""
_UNPICKLE = (
    "python -c \"import torch; from safetensors.torch import save_file; tensors = torch.load('adapter_model.bin', "
    "map_location='cpu', weights_only=True); save_file({name: tensor.contiguous() for name, tensor in tensors.items()},"
    " 'adapter_model.safetensors')\""
)


class ForeignAdapterError(ValueError):
    """An adapter that cannot be imported: states what it is, and how to make it one that can."""


class Layout(StrEnum):
    """Layouts of adapters that can be imported."""

    PEFT = "PEFT"
    MLX = "MLX LM"

    @property
    def weights(self) -> str:
        """Name of the file with the weights."""
        return MLX_WEIGHTS if self is Layout.MLX else ADAPTER_WEIGHTS


@dataclass(frozen=True)
class TensorName:
    """Name of a tensor, in parts.

    Attributes:
        module: name of the base model's module, without prefixes and wrappers; it may differ from this base's names.
        part: rest of the name in PEFT's files today, such as `lora_A.weight`; None: not a matrix of LoRA.
        adapter: name of the adapter, if the tensor's name contains it.
    """

    module: str
    part: str | None
    adapter: str | None = None


def find_layout(files: Collection[str], folders: Iterable[str]) -> Layout:
    """Return the layout of an adapter.

    Args:
        files: names of the files in its folder.
        folders: names of the sub-folders.

    Raises:
        ForeignAdapterError: it has no weights that can be imported.
    """
    if ADAPTER_WEIGHTS in files and ADAPTER_CONFIG in files:
        return Layout.PEFT
    if MLX_WEIGHTS in files and ADAPTER_CONFIG in files:
        return Layout.MLX
    if ADAPTER_WEIGHTS in files or MLX_WEIGHTS in files:
        raise ForeignAdapterError(f"it has weights but no {ADAPTER_CONFIG}: add that file of the same adapter")
    if PICKLED_WEIGHTS in files:
        raise ForeignAdapterError(
            f"its weights are in {PICKLED_WEIGHTS}, a pickle file, which can execute code and is never loaded: convert "
            f"it where you trust it, with `{_UNPICKLE}`, and name that folder"
        )
    if "adapters.npz" in files:
        raise ForeignAdapterError(
            'its weights are in adapters.npz, of an MLX LM before 0.12: convert them, with `python -c "import mlx.core'
            " as mx; mx.save_safetensors('adapters.safetensors', mx.load('adapters.npz'))\"`, and name that folder"
        )
    if any(name.endswith((".nemo", ".distcp")) for name in files) or "weights" in folders:
        raise ForeignAdapterError(
            "it is a checkpoint of NeMo: export it with nemo.collections.llm, "
            '`export_ckpt(path=CHECKPOINT, target="hf-peft", output_path=FOLDER)`, and name that folder'
        )
    if any(name.startswith(("model", "pytorch_model")) for name in files):
        raise ForeignAdapterError(
            "it has the weights of a whole model, not an adapter: serve it as the baseModel of a ServingPool"
        )
    checkpoints = sorted((name for name in folders if name.startswith("checkpoint-")), key=_step)
    if checkpoints:
        raise ForeignAdapterError(f"it has checkpoints but no adapter: name one of them, such as {checkpoints[-1]}")
    raise ForeignAdapterError(
        f"there is no adapter: it needs {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, and contains "
        f"{', '.join(sorted(files)[:10]) or 'no files'}"
    )


def _step(name: str) -> tuple[int, str]:
    number = name.rpartition("-")[2]
    return (int(number) if number.isdecimal() and len(number) < 10 else -1), name  # noqa: PLR2004 - of steps


def layout_of(config: Mapping[str, Any]) -> Layout:
    """Return the layout to which the content of an adapter_config.json belongs."""
    return Layout.MLX if "fine_tune_type" in config or "lora_parameters" in config else Layout.PEFT


def translate_config(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Return the keys in PEFT's names of today, without those that have no effect.

    Args:
        config: content of adapter_config.json.
        layout: layout of the adapter.

    Raises:
        ForeignAdapterError: it is not LoRA, or malformed.
    """
    if layout is Layout.MLX:
        return _translate_mlx(config)
    if layout_of(config) is Layout.MLX:
        raise ForeignAdapterError(
            f"{ADAPTER_CONFIG} is of MLX LM, and {ADAPTER_WEIGHTS} of PEFT: it mixes two adapters"
        )
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ForeignAdapterError(
            f"it is of type {str(kind)[:40]!a}; only LoRA adapters are imported: merge it into its base and serve the "
            "result as the baseModel of a ServingPool"
        )
    if config.get("enable_lora"):
        raise ForeignAdapterError(
            "it has enable_lora, of a PEFT before 0.3, which splits a matrix: train it again with a newer PEFT"
        )
    if config.get("layer_replication"):
        raise ForeignAdapterError(
            "it replicates layers of the base (layer_replication), which vLLM does not support: train it without"
        )
    return {key: value for key, value in config.items() if key not in _PEFT_ONCE and not _is_empty(key, value)}


def _is_empty(key: str, value: object) -> bool:
    """Return True if PEFT behaves as without the key. `init_lora_weights: false` starts with random weights."""
    return any(value is empty or (value == empty and type(value) is type(empty)) for empty in _EMPTY) and not (
        key == "init_lora_weights" and value is False
    )


def _translate_mlx(config: Mapping[str, Any]) -> dict[str, Any]:
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        raise ForeignAdapterError(
            "MLX LM trained the whole model (fine_tune_type full): fuse it with `mlx_lm.fuse`, and serve the result as "
            "the baseModel of a ServingPool"
        )
    if kind == "dora":
        raise ForeignAdapterError("MLX LM trained it with DoRA, which vLLM does not load: train it with LoRA")
    parameters = config.get("lora_parameters")
    if kind != "lora" or not isinstance(parameters, dict):
        raise ForeignAdapterError(f"{ADAPTER_CONFIG} of MLX LM has no lora_parameters, or an unknown fine_tune_type")
    rank, scale, alpha = parameters.get("rank"), parameters.get("scale"), parameters.get("alpha")
    if not isinstance(rank, int) or not isinstance(scale, int | float):
        raise ForeignAdapterError(f"lora_parameters of {ADAPTER_CONFIG} need a rank and a scale that are numbers")
    if alpha not in (None, rank):
        # Its first releases multiplied the scale by alpha / rank; later ones ignore alpha.
        raise ForeignAdapterError(
            f"lora_parameters of {ADAPTER_CONFIG} have a scale and an alpha, which releases of MLX LM read "
            "differently: remove alpha; if a release before 0.13 trained it, multiply scale by alpha / rank first"
        )
    product = scale * rank
    translated = {"r": rank, "lora_alpha": int(product) if float(product).is_integer() else product}
    # Absent keys are those that MLX LM chooses for the model.
    known = {"target_modules": parameters.get("keys"), "lora_dropout": parameters.get("dropout")}
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", **translated} | {
        key: value for key, value in known.items() if value
    }


def changes_base(config: Mapping[str, Any]) -> Initialization | None:
    """Return the initialization of an adapter that fits a changed base, which only its trainer had; otherwise None."""
    found = initialization_of(config.get("init_lora_weights"))
    is_changed = found is not None and (INITIALIZATIONS[found].changes_base or found is Initialization.LOFTQ)
    return found if is_changed else None


def initial_folder(initialization: Initialization, folders: Collection[str]) -> str | None:
    """Return the name of the sub-folder with the untrained adapter; None if it is missing."""
    name = _INITIAL_FOLDERS.get(initialization)
    return name if name in folders else None


def follows_from_base(initialization: Initialization) -> bool:
    """Return True if the product of the untrained matrices follows from the base's weights alone."""
    return initialization in {Initialization.PISSA, Initialization.OLORA}


def other_base(initialization: Initialization, folders: Collection[str], why: str) -> ForeignAdapterError:
    """Return the error for an adapter whose untrained matrices are unknown. `why`: ends its first part."""
    if _CONVERTED in folders and initialization in {Initialization.PISSA, Initialization.FAST_PISSA}:
        return ForeignAdapterError(
            f"it fits the base that {initialization} changed: name its sub-folder {_CONVERTED}, which has the adapter "
            "for the original base"
        )
    name = _INITIAL_FOLDERS.get(initialization)
    untrained = f"put the untrained adapter into the sub-folder {name}, or " if name is not None else ""
    return ForeignAdapterError(
        f"it was initialized with {initialization}, which changes the base, so it does not fit the original one{why}: "
        f"{untrained}save it with PEFT's path_initial_model_for_weight_conversion"
    )


def split_name(name: str, layout: Layout) -> TensorName:
    """Return the parts of a tensor's name."""
    name = _without_prefix(".".join(part for part in name.split(".") if part not in _WRAPPERS))
    if layout is Layout.MLX:
        module, _, end = name.rpartition(".")
        return TensorName(module, _MLX_RENAMED[end]) if module and end in _MLX_RENAMED else TensorName(name, None)
    found = _MATRICES.fullmatch(name)
    if found is None:
        return TensorName(".".join(part for part in name.split(".") if part not in _OF_COPIES), None)
    part, end = found["part"], found["end"] or ""
    # PEFT saves these without `.weight`.
    bare = part.startswith("lora_embedding") or part == "lora_magnitude_vector"
    return TensorName(found["module"], part if bare and end != ".bias" else f"{part}{end}", found["adapter"])


def _without_prefix(name: str) -> str:
    while True:
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return name
        name = name.removeprefix(prefix)


def module_in(known: Collection[str], module: str) -> str | None:
    """Return the base model's name of a module; None if it has no such module.

    Models with images and sound keep the language model in a part of its own, which another release of transformers, or
    a trainer that loads that part alone, names differently.
    """
    bare = module
    for part in ("language_model.", "text_model."):
        bare = bare.replace(f"model.{part}model.", "model.").replace(f"model.{part}", "model.").replace(part, "")
    candidates = (module, f"model.{module}", module.removeprefix("model."), bare, f"model.{bare}")
    return next((name for name in candidates if name in known), None)


def short_targets(modules: Collection[str], known: Collection[str]) -> list[str]:
    """Return names that select exactly these modules: their last parts if no other module has them.

    Args:
        modules: full names of the modules with an adapter.
        known: full names of all modules of the base model.
    """
    last = {name.rpartition(".")[2] for name in modules}
    selected = {name for name in known if name.rpartition(".")[2] in last}
    return sorted(last if selected == set(modules) else modules)
