"""Full fine-tuning."""

from __future__ import annotations

from tunesmith.api.methods.declaration import ALWAYS, MethodFields, MethodTraits


class FullFields(MethodFields):
    """Full fine-tuning of all weights; the artifact is a model, not an adapter."""

    declared = MethodTraits(None, learning_rate=1e-5)
    sharding = ALWAYS
