"""Tokenizer of the base model: whether the engine can constrain answers to a grammar with it.

This module runs inside vLLM's API server, so it uses the standard library only.
"""

from __future__ import annotations

import json
from typing import Any

_BYTE_DECODERS = frozenset({"ByteLevel", "ByteFallback"})
"""Decoders with which llguidance, vLLM's compiler of grammars, can map tokens to bytes. It has no others."""


def can_constrain(engine: Any) -> bool:  # noqa: ANN401 - vLLM's engine client
    """Return True if an engine can constrain answers: its tokenizer's decoder maps tokens to bytes.

    A tokenizer that does not belong to the `tokenizers` library has no such decoder, and vLLM decides.
    """
    try:
        decoder = engine.get_tokenizer().backend_tokenizer.decoder
        document = {} if decoder is None else json.loads(decoder.__getstate__())
    except (AttributeError, TypeError, ValueError):
        return True
    parts = [document, *document.get("decoders", ())]
    return any(part.get("type") in _BYTE_DECODERS for part in parts)
