"""Hardware and scheduling fields that FineTuneJob and ServingPool share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from tunesmith.api.model import INT_OR_STRING, VALIDATIONS, ApiModel, Matches, Rule


def _text(value: object) -> object:
    """A whole number, as YAML reads `cpu: 2`, becomes text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


_QUANTITY = Matches(
    r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$",
    "a quantity is a number with an optional unit, such as 2, 500m, 8Gi or 1.5Gi",
)
Quantity = Annotated[
    str,
    Field(min_length=1, max_length=32),
    _QUANTITY,
    BeforeValidator(_text),
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            INT_OR_STRING: True,
            "maxLength": 32,
            "pattern": _QUANTITY.pattern,
            VALIDATIONS: [Rule(f"string(self).matches(r'{_QUANTITY.pattern}')", _QUANTITY.message).schema()],
        }
    ),
]


class Resources(ApiModel):
    """What one pod asks the node for. Requests equal limits for memory and GPUs; CPU has a request only."""

    gpus: int = Field(default=1, ge=0, le=16, description="GPUs per pod. 0 runs on the CPU.")
    gpu_resource: str = Field(
        default="nvidia.com/gpu", min_length=1, max_length=128, description="Extended resource that stands for one GPU."
    )
    cpu: Quantity = Field(default="1", description="CPU request, as a Kubernetes quantity.")
    memory: Quantity = Field(default="8Gi", description="Memory request and limit, as a Kubernetes quantity.")


class Toleration(ApiModel):
    """A taint that the pod tolerates (core/v1 Toleration)."""

    key: str | None = Field(default=None, max_length=317, description="Taint key; absent matches every key.")
    operator: Literal["Exists", "Equal"] = Field(default="Equal", description="Exists or Equal.")
    value: str | None = Field(default=None, max_length=63, description="Taint value, for Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Taint effect; absent matches every effect."
    )


class Scheduling(ApiModel):
    """Where pods may run."""

    node_selector: dict[Annotated[str, Field(max_length=317)], Annotated[str, Field(max_length=63)]] | None = Field(
        default=None, max_length=32, description="Labels a node must have."
    )
    tolerations: list[Toleration] | None = Field(default=None, max_length=32, description="Taints that are tolerated.")
    priority_class_name: str | None = Field(default=None, max_length=253, description="PriorityClass of the pods.")
    runtime_class_name: str | None = Field(default=None, max_length=253, description="RuntimeClass of the pods.")
