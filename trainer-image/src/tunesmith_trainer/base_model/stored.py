"""Base models whose weights are stored quantised: what they are held in while an adapter is trained.

Weights of bitsandbytes stay as they are. Those of MXFP4 and FP8, which no method can be trained over, become bfloat16
or float32 when they are loaded. Other formats need libraries that the image does not have.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.nn import Linear4bit
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    GenerationConfig,
    Mxfp4Config,
)
from transformers.integrations.bitsandbytes import dequantize_and_replace

from tunesmith.contracts.safetensors import read_tensors
from tunesmith_trainer.base_model import eight_bits  # noqa: F401 - it replaces an operator
from tunesmith_trainer.errors import InvalidSpecError
from tunesmith_trainer.libraries import line_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

GENERATION_CONFIG = "generation_config.json"
_DEQUANTIZED_BY = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
"""Classes of transformers that dequantise weights when they are loaded, by `quant_method`."""
_BYTES = {"nf4": 0.5625, "fp4": 0.5625, "int8": 1.0}
"""Bytes per weight: 4 bits with a float32 constant per 64 weights; the constants of 8 bits, one per row, are few."""
_DOUBLY_QUANTIZED = 0.516
_IN_4_BITS = ("nf4", "fp4")
_FP8_TYPES = frozenset({"F8_E4M3", "F8_E5M2"})
_FP8_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
"""Ends of the names of scales, in place of the end `weight` of the name of their FP8 weights."""
_NESTED_MAP, _NESTED_SCALES = ".nested_quant_map", ".nested_absmax"
"""Ends of the names of the parts of a scale that bitsandbytes has itself quantised."""
_SCALES_IN_4_BITS, _SCALES = ".absmax", ".SCB"
"""Ends of the names of bitsandbytes' scales, in 4 and in 8 bits."""
_CONVERSION_FAILED = "automatic conversion of the weights"
"""Text of the error of transformers for quantised weights that it cannot read."""


@dataclass(frozen=True)
class StoredQuantization:
    """Quantisation in which the weights of a base model are stored.

    Args:
        type: nf4, fp4 or int8, which are kept while training, or mxfp4 or fp8, which are dequantised.
        settings: `quantization_config` of its config.json.
    """

    type: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> bool:
        """True if the weights stay quantised while an adapter is trained."""
        return self.type in _BYTES

    @property
    def in_4_bits(self) -> bool:
        """True if the weights stay in 4 bits."""
        return self.type in _IN_4_BITS

    @property
    def name(self) -> str:
        """The quantisation, for messages."""
        bits = "4 bits" if self.in_4_bits else "8 bits"
        return f"{bits} (bitsandbytes {self.type})" if self.kept else self.type.upper()

    @property
    def bytes_per_weight(self) -> float:
        """Memory of a quantised weight with its constants, in bytes."""
        return _DOUBLY_QUANTIZED if self.settings.get("bnb_4bit_use_double_quant") else _BYTES[self.type]

    @property
    def skipped(self) -> list[str] | None:
        """Names of the modules that are not quantised; None: those that bitsandbytes leaves out."""
        names = self.settings.get("llm_int8_skip_modules")
        return None if not isinstance(names, list) else [str(name) for name in names]


def of_settings(settings: Mapping[str, Any]) -> StoredQuantization | None:
    """Return the quantisation that a `quantization_config` describes; None if such a base cannot be trained."""
    # Older releases of transformers did not write the method of bitsandbytes.
    method = str(settings.get("quant_method", "bitsandbytes"))
    if method in _DEQUANTIZED_BY:
        return StoredQuantization(method, settings)
    if method != "bitsandbytes":
        return None
    if settings.get("load_in_4bit"):
        kind = str(settings.get("bnb_4bit_quant_type", "fp4"))
        return StoredQuantization(kind, settings) if kind in _IN_4_BITS else None
    return StoredQuantization("int8", settings) if settings.get("load_in_8bit") else None


def stored_quantization(folder: Path) -> StoredQuantization | None:
    """Return the quantisation of the weights in a folder whose config.json was checked; None: they have none."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    return None if settings is None else of_settings(settings)


def load_published(
    folder: Path,
    dtype: torch.dtype | str,
    compute: torch.dtype | None = None,
    **arguments: Any,  # noqa: ANN401 - transformers' own
) -> PreTrainedModel:
    """Load a causal language model from its files.

    Args:
        folder: folder with configuration and weights.
        dtype: type of the weights that are not quantised; auto: as in the files.
        compute: type of the products of weights in 4 bits; None: `dtype`.
        arguments: further arguments of `from_pretrained`.

    Raises:
        InvalidSpecError: the files lack weights, which transformers would fill with random numbers, or differ from the
            configuration.
    """
    stored = stored_quantization(folder)
    arguments |= {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    if stored is None:
        return _loaded(folder, dtype=dtype, **arguments)
    check_scales(
        {name: tensor.dtype for file in folder.glob("*.safetensors") for name, tensor in read_tensors(file).items()},
        stored,
    )
    config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not stored.kept:
        loader = _DEQUANTIZED_BY[stored.type](dequantize=True)
        model = _loaded(folder, dtype=dtype, quantization_config=loader, **arguments)
        _forget_quantization(model)
        _convert_others(model, dtype)
        return model
    model = _loaded(folder, config=config, dtype=dtype, **arguments)
    products = compute or (dtype if isinstance(dtype, torch.dtype) else model.dtype)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = products
            module.compute_type_is_set = True
    _convert_others(model, dtype)
    return model


def check_scales(types: Mapping[str, str], stored: StoredQuantization | None) -> None:
    """Check that quantised weights have their scales: transformers would read some without as if scaled by 1.

    Args:
        types: data types of the tensors in the files (safetensors' names), by the tensors' names.
        stored: quantisation of the weights; None: they are not quantised.

    Raises:
        InvalidSpecError: scales are missing, or no weight is quantised.
    """
    if stored is None:
        return
    if stored.kept and not any(name.endswith(_SCALES_IN_4_BITS if stored.in_4_bits else _SCALES) for name in types):
        raise InvalidSpecError(
            f"according to its config.json the base model is published in {stored.name}, but none of its weights is:"
            " remove quantization_config from config.json, or copy the whole base model again"
        )
    for name, dtype in sorted(types.items()):
        scales = []
        if dtype in _FP8_TYPES:
            module = name.removesuffix("weight")
            scales = [
                f"{name}_scale_inv",
                f"{name}.scale",
                *(f"{module}{end}" for end in _FP8_SCALES if module != name),
            ]
        if name.endswith(_NESTED_MAP):
            scales = [name.removesuffix(_NESTED_MAP) + _NESTED_SCALES]
        if scales and types.keys().isdisjoint(scales):
            raise InvalidSpecError(_incomplete([scales[0]]))


def _incomplete(missing: Sequence[str]) -> str:
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return (
        f"the files of the base model lack weights: {missing[0]}{more}: copy the whole base model again, or correct its"
        " config.json"
    )


def load_headers(
    architecture: type[PreTrainedModel],
    config: PretrainedConfig,
    weights: Mapping[str, torch.Tensor],
    stored: StoredQuantization | None,
) -> tuple[PreTrainedModel, set[str], set[tuple[str, Sequence[int], Sequence[int]]]]:
    """Load weights without values, as `load_published` loads those in files.

    Args:
        architecture: class of the model.
        config: configuration, without `quantization_config`.
        weights: tensors on the meta device, by their names in the files.
        stored: quantisation of the weights; none that is kept.

    Returns:
        The model on the meta device, the names of tensors that it does not use, and the names of weights of another
        shape with the shapes in the files and in the model.

    Raises:
        InvalidSpecError: weights are missing or cannot be converted.
    """
    arguments: dict[str, Any] = {}
    if stored is not None:
        arguments["quantization_config"] = _DEQUANTIZED_BY[stored.type](dequantize=True)
        config = copy.deepcopy(config)
        config.quantization_config = dict(stored.settings)
    model, report = _with_report(
        architecture,
        None,
        config=config,
        state_dict=dict(weights),
        device_map={"": "meta"},
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        **arguments,
    )
    return model, set(report["unexpected_keys"]), set(report["mismatched_keys"])


def _loaded(folder: Path, **arguments: Any) -> PreTrainedModel:  # noqa: ANN401 - transformers' own
    return _with_report(AutoModelForCausalLM, folder, generation_config=_special_tokens(folder), **arguments)[0]


def _special_tokens(folder: Path) -> GenerationConfig:
    """Return the special tokens of a model's generation_config.json, or of its config.json without one.

    The file's other settings are for the engine: answers that are compared are decoded greedily.
    """
    path = folder / GENERATION_CONFIG
    settings = json.loads((path if path.is_file() else folder / "config.json").read_text(encoding="utf-8"))
    found = {name: settings.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(**{name: token for name, token in found.items() if _are_tokens(token)})


def _are_tokens(value: object) -> bool:
    given = value if isinstance(value, list) else [value]
    return bool(given) and all(type(token) is int and token >= 0 for token in given)


def copy_generation_settings(base: Path, folder: Path) -> None:
    """Give a saved model the generation_config.json of its base model, unchanged; none if that has none."""
    (folder / GENERATION_CONFIG).unlink(missing_ok=True)
    if (base / GENERATION_CONFIG).is_file():
        (folder / GENERATION_CONFIG).write_bytes((base / GENERATION_CONFIG).read_bytes())


def _with_report(
    loader: Any,  # noqa: ANN401 - a class of transformers
    folder: Path | None,
    **arguments: Any,  # noqa: ANN401 - transformers' own
) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        loaded: tuple[PreTrainedModel, dict[str, Any]] = loader.from_pretrained(
            folder, output_loading_info=True, **arguments
        )
    except (SafetensorError, KeyError, ValueError) as error:
        raise InvalidSpecError(f"the weights of the base model cannot be loaded: {line_of(error)}") from error
    except RuntimeError as error:
        if _CONVERSION_FAILED in str(error):
            raise InvalidSpecError(
                "the quantised weights of the base model are incomplete or damaged; the log names them: copy the whole"
                " base model again"
            ) from error
        if "size mismatch" not in str(error) and "ignore_mismatched_sizes" not in str(error):
            raise
        raise InvalidSpecError(f"the weights of the base model do not fit its config.json: {line_of(error)}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise InvalidSpecError(_incomplete(missing))
    return model, report


def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Convert the weights that a model holds in 4 bits to those with which it computes; return the model."""
    dequantize_and_replace(model, BitsAndBytesConfig(load_in_4bit=True), dtype)
    model.is_loaded_in_4bit = False  # PEFT's IA3 checks it
    _forget_quantization(model)
    return model


def _forget_quantization(model: PreTrainedModel) -> None:
    """Make a model whose weights are no longer quantised one like any other, which is saved in the usual format."""
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    model._weight_conversions = None  # noqa: SLF001 - they would quantise again when it is saved


def _convert_others(model: PreTrainedModel, dtype: torch.dtype | str) -> None:
    """Convert the weights that are not quantised: transformers leaves some of them in the type of their files."""
    if not isinstance(dtype, torch.dtype):
        return
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
