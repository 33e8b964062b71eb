"""Conversion of a model's JSON schema, from pydantic, into a CRD's structural schema and into a strict JSON schema."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.api.model import API_VERSION, INT_OR_STRING, VALIDATIONS

if TYPE_CHECKING:
    from tunesmith.api.model import ApiModel

Schema = dict[str, Any]

_KEPT = (
    "type",
    "description",
    "format",
    "enum",
    "default",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "pattern",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "required",
    "anyOf",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-preserve-unknown-fields",
    INT_OR_STRING,
    VALIDATIONS,
)


class UnboundedError(ValueError):
    """A field lacks a maximum, without which CEL rules around it exceed the API server's cost budget."""


def structural_schema(model: type[ApiModel]) -> Schema:
    """Return the structural schema of a model.

    References are inlined, an optional field is a property that is not required, and an object whose fields all have
    defaults gets the default {}.

    Raises:
        UnboundedError: a string, list or map has no maximum.
    """
    return _converted(resolved_schema(model), model.__name__)


def resolved_schema(model: type[ApiModel]) -> Schema:
    """Return pydantic's JSON schema of a model's spec and status, with every reference inlined."""
    root = model.model_json_schema(by_alias=True)
    # The model has only those fields of metadata that Tunesmith reads; the schema is the API server's.
    del root["properties"]["metadata"]
    schema = _resolved(root, root.get("$defs", {}))
    del schema["properties"]["status"]["default"]
    return schema


def json_schema(model: type[ApiModel]) -> Schema:
    """Return a strict JSON schema of a model's manifests, for checks without a cluster: unknown fields are errors."""
    schema = _strict(resolved_schema(model))
    schema["properties"] = {
        "apiVersion": {"type": "string", "enum": [API_VERSION]},
        "kind": {"type": "string", "enum": [model.__name__]},
        "metadata": {"type": "object"},
        "spec": schema["properties"]["spec"],
        "status": schema["properties"]["status"],
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **schema,
        "required": ["apiVersion", "kind", "metadata", "spec"],
    }


def _resolved(node: Schema, definitions: dict[str, Schema]) -> Schema:
    """Return the node with references inlined and `anyOf: [X, null]` as X; keys beside a reference take precedence."""
    while "$ref" in node or "anyOf" in node:
        if "$ref" in node:
            target = definitions[node["$ref"].removeprefix("#/$defs/")]
        else:
            options = [option for option in node["anyOf"] if option.get("type") != "null"]
            if len(options) != 1:
                break
            target = options[0]
        node = {**target, **{key: value for key, value in node.items() if key not in {"$ref", "anyOf"}}}
    result = {key: value for key, value in node.items() if key not in {"title", "$defs"}}
    if "const" in result:
        result["enum"] = [result.pop("const")]
    if result.get("default", ...) is None:
        del result["default"]
    if "properties" in result:
        required = result.get("required", [])
        result["properties"] = {
            name: _property(child, definitions, optional=name not in required)
            for name, child in result["properties"].items()
        }
    for key in ("items", "additionalProperties"):
        if isinstance(result.get(key), dict):
            result[key] = _resolved(result[key], definitions)
    return result


def _property(node: Schema, definitions: dict[str, Schema], *, optional: bool) -> Schema:
    result = _resolved(node, definitions)
    if optional and "default" not in node and "properties" in result:
        # Has a default_factory: without {} the API server would not fill in the defaults inside.
        result["default"] = {}
    return result


def _strict(node: Schema) -> Schema:
    result = {key: value for key, value in node.items() if not key.startswith("x-kubernetes-")}
    if "properties" in result:
        result["properties"] = {name: _strict(child) for name, child in result["properties"].items()}
        result["additionalProperties"] = False
    elif isinstance(result.get("additionalProperties"), dict):
        result["additionalProperties"] = _strict(result["additionalProperties"])
    if "items" in result:
        result["items"] = _strict(result["items"])
    return result


def _converted(node: Schema, path: str) -> Schema:
    result = {key: node[key] for key in _KEPT if key in node}
    if VALIDATIONS in result:
        # The rule checks the pattern, and has a message.
        result.pop("pattern", None)
    if "properties" in node:
        result["properties"] = {name: _converted(child, f"{path}.{name}") for name, child in node["properties"].items()}
    elif isinstance(node.get("additionalProperties"), dict):
        result["additionalProperties"] = _converted(node["additionalProperties"], f"{path}.*")
    if "items" in node:
        result["items"] = _converted(node["items"], f"{path}[]")
        result.setdefault("x-kubernetes-list-type", "atomic")
    if 0 < result.get("minimum", 0) < 1:
        # The API server truncates the minimum when it compares a whole number, and would accept 0.
        refused = {"rule": "self != 0.0", "message": f"0 is too small: it must be at least {result['minimum']:g}"}
        result[VALIDATIONS] = [*result.get(VALIDATIONS, ()), refused]
    _require_maximum(result, path)
    return result


def _require_maximum(node: Schema, path: str) -> None:
    bounded = {
        "string": ("maxLength", "enum", "format"),
        "array": ("maxItems",),
        "object": ("maxProperties", "properties"),
    }
    keys = bounded.get(node.get("type", ""), ())
    if keys and not any(key in node for key in keys):
        raise UnboundedError(f"{path} needs a maximum: one of {', '.join(keys)}")
