#!/usr/bin/env python3
"""Writes charts/adapters/values.schema.json from the API's models: Helm checks a pool or adapter before it sends it.

With `--check` nothing is written: the exit code is 1 if the file would change.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic.json_schema import models_json_schema

from tunesmith.api.adapterdeployment import AdapterDeploymentSpec
from tunesmith.api.servingpool import ServingPoolSpec

TARGET = Path(__file__).parent / "adapters/values.schema.json"


def trimmed(node: Any) -> Any:  # noqa: ANN401 - any JSON
    """The schema without what Helm cannot use: generated titles and the rules that the API server evaluates."""
    if isinstance(node, list):
        return [trimmed(item) for item in node]
    if not isinstance(node, dict):
        return node
    unused = {
        key
        for key, value in node.items()
        if key.startswith("x-kubernetes-") or (key == "title" and isinstance(value, str))
    }
    return {key: trimmed(value) for key, value in node.items() if key not in unused}


def schema() -> dict[str, Any]:
    """The JSON schema of the chart's values: two maps from a resource's name to its spec."""
    references, definitions = models_json_schema(
        [(ServingPoolSpec, "validation"), (AdapterDeploymentSpec, "validation")], by_alias=True
    )
    names = {"pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 40}

    def by_name(model: type, description: str) -> dict[str, Any]:
        return {
            "type": "object",
            "description": description,
            "propertyNames": names,
            "additionalProperties": references[model, "validation"],
        }

    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart adapters",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "global": {"type": "object"},
            "pools": by_name(ServingPoolSpec, "ServingPools: name to spec."),
            "adapters": by_name(AdapterDeploymentSpec, "AdapterDeployments: name to spec."),
        },
        "$defs": trimmed(definitions["$defs"]),
    }


def main() -> int:
    """Command line: see the module's docstring."""
    text = json.dumps(schema(), indent=2) + "\n"
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(text)
    elif not TARGET.is_file() or TARGET.read_text() != text:
        print(f"{TARGET} is not what the models say: run `make generate`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
