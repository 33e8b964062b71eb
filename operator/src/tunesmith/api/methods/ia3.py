"""IA3."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.api.methods.declaration import ALWAYS, MethodFields, MethodTraits, PeftName
from tunesmith.api.methods.fields import ModuleName, ModulesToSave, OptionalQuantization
from tunesmith.api.model import Rule


class Ia3Fields(MethodFields):
    """Learned scales of keys, values and the inner activations of the feed-forward layers (IA3, arXiv:2205.05638)."""

    declared = MethodTraits("IA3", learning_rate=5e-3)
    sharding = ALWAYS
    rules = (
        Rule(
            "!has(self.feedforwardModules) || (has(self.targetModules) && "
            "self.feedforwardModules.all(name, name in self.targetModules))",
            "ia3.feedforwardModules must be a subset of ia3.targetModules: add them to ia3.targetModules",
            lambda self: set(self.feedforward_modules or []) <= set(self.target_modules or []),
        ),
    )

    target_modules: Annotated[list[ModuleName] | None, PeftName("target_modules", modules=True)] = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Linear modules with trained scales. Absent: PEFT's defaults for the model's architecture.",
    )
    feedforward_modules: Annotated[list[ModuleName] | None, PeftName("feedforward_modules", modules=True)] = Field(
        default=None,
        max_length=64,
        description="Modules of targetModules whose input is scaled instead of their output. Absent: PEFT's defaults.",
    )
    modules_to_save: ModulesToSave = None
    quantization: OptionalQuantization = None
