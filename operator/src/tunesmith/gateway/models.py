"""`/v1/models`: the models that a key may call, in OpenAI's schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from tunesmith.contracts.apikey import ApiKey
    from tunesmith.gateway.catalog import Catalog, Model

MODELS_PATH = "/v1/models"


def names_models(path: str) -> bool:
    """Return True if the path is the list of models or one model."""
    return path == MODELS_PATH or path.startswith(MODELS_PATH + "/")


def models_body(path: str, catalog: Catalog, key: ApiKey) -> bytes:
    """Return the list of the models that a key may call, or the one that the path names, as JSON.

    Raises:
        ApiError: the named model is unknown, or the key may not call it.
    """
    # Clients send the slash of a global id as %2F or unescaped.
    name = path.removeprefix(MODELS_PATH)[1:].replace("%2F", "/").replace("%2f", "/")
    if name:
        return orjson.dumps(_description(catalog.resolve(name, key), catalog))
    return orjson.dumps({"object": "list", "data": [_description(model, catalog) for model in catalog.visible(key)]})


def _description(model: Model, catalog: Catalog) -> dict[str, Any]:
    """Return a model in OpenAI's schema, with vLLM's members about its revision, base model and length."""
    pool = catalog.pool(model.pool)
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": model.namespace,
        "root": model.engine_names[0] if model.engine_names else model.id,
        "parent": None if model.is_base or model.is_whole or pool is None else pool.base,
        "max_model_len": None if pool is None else pool.max_length,
    }
