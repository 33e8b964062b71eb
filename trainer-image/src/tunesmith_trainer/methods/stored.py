"""Methods on a base model whose weights are stored quantised: which train it, and what each means there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.api.methods.lora import INITIALIZATIONS, Initialization, LoraFields
from tunesmith.api.output import Merge
from tunesmith.api.placement import DataParallelism
from tunesmith_trainer.errors import InvalidSpecError

if TYPE_CHECKING:
    from tunesmith.api.finetunejob import FineTuneJobSpec
    from tunesmith_trainer.base_model.stored import StoredQuantization

_ORIGINAL = "or use the model that it was quantised from"
IN_8_BITS = ("lora", "ia3", "prefixTuning", "promptTuning", "pTuning")
"""Methods that were measured on a base in 8 bits."""


def check_stored(spec: FineTuneJobSpec, stored: StoredQuantization | None) -> None:
    """Check that the spec's method can be trained on a base model with this quantisation.

    Raises:
        InvalidSpecError: it cannot; states what to use.
    """
    if stored is None:
        return
    where = f"the base model is published in {stored.name}"
    fields, name, quantized = spec.method.fields, spec.method.name, spec.method.quantization is not None
    if isinstance(fields, LoraFields):
        _check_initialization(fields, name, where, stored)
    if not stored.kept:
        return
    if spec.method.full is not None:
        nearest = "method.qlora" if stored.in_4_bits else "method.lora"
        raise InvalidSpecError(f"method.full: {where}, which cannot be trained: use {nearest}, {_ORIGINAL}")
    if stored.in_4_bits and not quantized:
        remedy = f"set method.{name}.quantization: {{}}" if _can_be_quantized(spec) else "use method.qlora"
        remedy = "use method.qlora" if name == "lora" else remedy
        raise InvalidSpecError(
            f"method.{name}: {where}, so the adapter would be trained over these: {remedy}, {_ORIGINAL}"
        )
    if not stored.in_4_bits and (quantized or name not in IN_8_BITS):
        why = "and is not quantised again" if quantized else f"on which {name} is not supported"
        raise InvalidSpecError(
            f"method.{name}: {where}, {why}: use method.lora, which trains over these 8 bits, {_ORIGINAL}"
        )
    if isinstance(fields, LoraFields) and fields.dora and not stored.in_4_bits:
        raise InvalidSpecError(f"method.{name}.dora: {where}, on which PEFT has no DoRA: remove dora, {_ORIGINAL}")
    _check_output(spec, where, in_4_bits=stored.in_4_bits)


def _can_be_quantized(spec: FineTuneJobSpec) -> bool:
    return "quantization" in type(spec.method.fields).model_fields


def _check_initialization(fields: LoraFields, name: str, where: str, stored: StoredQuantization) -> None:
    initialization = fields.initialization
    needs_weights = initialization is Initialization.LOFTQ or (
        stored.kept and not INITIALIZATIONS[initialization].in_4_bits
    )
    if needs_weights:
        raise InvalidSpecError(
            f"method.{name}.initialization: {where}, and {initialization} needs the weights before they were "
            f"quantised: remove it, or use the model that they come from"
        )


def _check_output(spec: FineTuneJobSpec, where: str, *, in_4_bits: bool) -> None:
    if spec.output is not None and spec.output.merge is Merge.ORIGINAL:
        remedy = "use Dequantized" if in_4_bits else "remove output.merge"
        raise InvalidSpecError(f"output.merge: {where}, into which an adapter cannot be merged: {remedy}, {_ORIGINAL}")
    if not in_4_bits and spec.resources.data_parallelism is DataParallelism.FSDP2:
        raise InvalidSpecError(f"resources.dataParallelism: {where}, which FSDP2 cannot shard: use DDP, {_ORIGINAL}")
