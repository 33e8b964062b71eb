"""Weights of a foreign adapter under PEFT's names of today: names, orientation, and the original base. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from peft import LoraConfig

from tunesmith.contracts.foreign_adapter import (
    ForeignAdapterError,
    Layout,
    module_in,
    short_targets,
    split_name,
)
from tunesmith.contracts.servability import ADAPTER_CONFIG, MAX_ALPHA, TENSOR_PREFIX, is_literal
from tunesmith_trainer.methods.conversion import published_config

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import torch

_ANCHOR = "^"
"""Begins a key of a pattern that is the whole name of a module."""
_KNOWN = {field.name for field in fields(LoraConfig)}
_DECIDED = frozenset(
    {
        *("r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "inference_mode", "peft_version", "base_model_name_or_path", "revision"),
    }
)
"""Keys that follow from the tensors, the base and this release."""


def renamed(
    tensors: Mapping[str, torch.Tensor], layout: Layout, known: Collection[str], embeddings: Collection[str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the matrices under PEFT's names, and the other tensors by the base's names of their parameters.

    Args:
        tensors: tensors of the file.
        layout: layout of the adapter.
        known: full names of the base model's modules.
        embeddings: those that are embeddings.

    Raises:
        ForeignAdapterError: a tensor belongs to no module of the base, or two have the same name.
    """
    matrices: dict[str, torch.Tensor] = {}
    others: dict[str, torch.Tensor] = {}
    adapters = set()
    for name, tensor in tensors.items():
        split = split_name(name, layout)
        if split.part is None:
            others[split.module] = tensor
            continue
        module = module_in(known, split.module)
        if module is None:
            raise ForeignAdapterError(_unknown(name, split.module))
        part, value = split.part, tensor
        if layout is Layout.MLX:
            if tensor.ndim != 2:  # noqa: PLR2004 - a matrix
                raise ForeignAdapterError(f"{name} is not a matrix: adapters of experts are not imported from MLX LM")
            value = tensor.T
            if module in embeddings:
                part = part.replace("lora_", "lora_embedding_").removesuffix(".weight")
        adapters.add(split.adapter)
        target = f"{TENSOR_PREFIX}{module}.{part}"
        if target in matrices:
            raise ForeignAdapterError(f"{name} is a second {part} of {module}: it has more than one adapter")
        matrices[target] = value.contiguous()
    if len(adapters) > 1:
        names = ", ".join(sorted(str(name) for name in adapters))
        raise ForeignAdapterError(f"its file has the tensors of several adapters ({names[:200]}): save each on its own")
    if not matrices:
        raise ForeignAdapterError("its file has no matrices of LoRA")
    return matrices, others


def _unknown(name: str, module: str) -> str:
    if ".experts." in f".{module}.":
        return (
            f"{name} belongs to one expert, and this base model holds its experts in one parameter; such an adapter is "
            "not converted: train it without the experts' modules"
        )
    return f"the base model has no module {module}, to which {name[:200]} belongs: the adapter is of another base model"


def adapter_config(
    config: Mapping[str, Any], matrices: Mapping[str, torch.Tensor], known: Collection[str]
) -> dict[str, Any]:
    """Return the content of adapter_config.json as this release of PEFT writes it, with literal names only.

    Args:
        config: result of `translate_config`.
        matrices: the adapter's matrices under PEFT's names.
        known: full names of the base model's modules.

    Raises:
        ForeignAdapterError: a key is unknown, or does not fit the tensors.
    """
    unknown = sorted(set(config) - _KNOWN)
    if unknown:
        raise ForeignAdapterError(
            f"{ADAPTER_CONFIG} has {', '.join(unknown)[:200]}, which this release of PEFT does not know: remove it if "
            "it has no effect"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 0 < rank <= MAX_ALPHA or type(alpha) not in {int, float}:
        raise ForeignAdapterError(f"{ADAPTER_CONFIG} needs a rank r and lora_alpha that are numbers")
    ranks = _ranks(matrices)
    _check_ranks(ranks, rank, _pattern(config, "rank_pattern"))
    default = rank if rank in ranks.values() else Counter(ranks.values()).most_common(1)[0][0]
    alphas = _literal_pattern(config, "alpha_pattern")
    scales = {module: _of_pattern(alphas, module, alpha) for module in ranks}
    kept = {key: value for key, value in config.items() if key not in _DECIDED}
    try:
        built = LoraConfig(
            **kept,
            r=default,
            lora_alpha=alpha,
            target_modules=short_targets(ranks, known),
            rank_pattern={module: own for module, own in sorted(ranks.items()) if own != default},
            alpha_pattern={module: own for module, own in sorted(scales.items()) if own != alpha},
            inference_mode=True,
        ).to_dict()
    except (TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
        text = " ".join(str(error).split())[:300]
        raise ForeignAdapterError(f"PEFT does not accept its {ADAPTER_CONFIG}: {text}") from None
    return published_config(built, sorted(ranks), doubled=False)


def _ranks(matrices: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return the rank of each module: the rows of its first matrix."""
    first, second = {}, set()
    for name, tensor in matrices.items():
        module, _, part = name.removeprefix(TENSOR_PREFIX).partition(".lora_")
        matrix = part.removeprefix("embedding_")
        if matrix in {"A.weight", "A"}:
            if tensor.ndim == 0:
                raise ForeignAdapterError(f"{name} is not a matrix")
            first[module] = int(tensor.shape[0])
        elif matrix in {"B.weight", "B"}:
            second.add(module)
    halves = sorted(first.keys() ^ second)
    if halves or not first:
        raise ForeignAdapterError(f"{halves[0] if halves else 'it'} has only one of lora_A and lora_B")
    return first


def _check_ranks(ranks: Mapping[str, int], rank: int, pattern: Mapping[str, Any]) -> None:
    """Raise unless the tensors have the ranks that the configuration states; a pattern's expressions are not run."""
    has_expressions = not all(map(_is_name, pattern))
    for module, own in ranks.items():
        expected = _of_pattern(pattern, module, rank)
        if own != expected and not (has_expressions and own in pattern.values()):
            raise ForeignAdapterError(
                f"lora_A of {module} has rank {own}, and {ADAPTER_CONFIG} states {expected}: the files are not of the "
                "same adapter"
            )


def _pattern(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    pattern = config.get(key, {})
    if not isinstance(pattern, dict) or not all(type(value) in {int, float} for value in pattern.values()):
        raise ForeignAdapterError(f"{key} of {ADAPTER_CONFIG} must be an object with numbers")
    return pattern


def _literal_pattern(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a pattern by the names of modules.

    Raises:
        ForeignAdapterError: a key is an expression, which could run forever.
    """
    pattern = _pattern(config, key)
    wrong = sorted(name for name in pattern if not _is_name(name))
    if wrong:
        raise ForeignAdapterError(
            f"{key} of {ADAPTER_CONFIG} has the regular expression {wrong[0][:80]!a}: write the modules' names instead"
        )
    return dict(pattern)


def _is_name(key: str) -> bool:
    return is_literal(key.removeprefix(_ANCHOR))


def _of_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:  # noqa: ANN401 - rank or alpha
    """Return the value of the first key that is the module's name or its last parts, as PEFT chooses it."""
    return next(
        (
            value
            for key, value in pattern.items()
            if f".{module}".endswith(f".{key}") or key.removeprefix(_ANCHOR) == module
        ),
        default,
    )


def without_copies(others: Mapping[str, torch.Tensor], copies: Mapping[str, torch.Tensor | None]) -> Sequence[str]:
    """Return the names of the tensors that are copies of the base's, which PEFT saves beside an adapter.

    Args:
        others: tensors that are not matrices of LoRA, by the name of a parameter of the base.
        copies: the base's tensors of these names; None: it has none.

    Raises:
        ForeignAdapterError: one differs from the base's.
    """
    for name, tensor in others.items():
        of_base = copies.get(name)
        if of_base is None:
            raise ForeignAdapterError(f"{name[:200]} is neither a matrix of LoRA nor a weight of the base model")
        if of_base.shape != tensor.shape:
            raise ForeignAdapterError(
                f"{name} has the shape {list(tensor.shape)}, and the base's {list(of_base.shape)}: tokens were added "
                "to its vocabulary, which a shared base cannot have: train without them, or serve the merged model"
            )
        if not bool((of_base.to(tensor.dtype) == tensor).all()):
            raise ForeignAdapterError(
                f"{name} was trained as well, which vLLM does not load as part of an adapter: train without it, or "
                "serve the merged model as the baseModel of a ServingPool"
            )
    return sorted(others)
