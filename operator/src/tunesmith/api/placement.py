"""Hardware and scheduling fields that FineTuneJob and ServingPool share."""

from __future__ import annotations

from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from tunesmith.api.model import INT_OR_STRING, VALIDATIONS, ApiModel, ResourceName, Rule, StringPattern

MIN_MEMORY = "64Mi"
_UNITS = {
    "m": Decimal("0.001"),
    **{unit: Decimal(1000) ** power for power, unit in enumerate(("k", "M", "G", "T"), 1)},
    **{unit: Decimal(1024) ** power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti"), 1)},
}


def _text(value: object) -> object:
    """Return a whole number, as YAML reads `cpu: 2`, as text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


_QUANTITY = StringPattern(
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


ExtendedResource = Annotated[
    str,
    Field(max_length=128),
    StringPattern(
        r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[a-zA-Z0-9]([-a-zA-Z0-9._]*[a-zA-Z0-9])?$",
        "an extended resource is a domain and a name, such as nvidia.com/gpu",
    ),
]
LabelValue = Annotated[
    str,
    Field(max_length=63),
    StringPattern(
        r"^([a-zA-Z0-9]([-a-zA-Z0-9._]*[a-zA-Z0-9])?)?$",
        "a label's value has letters, digits, '-', '.' and '_', and begins and ends with a letter or digit",
    ),
]


def quantity_value(quantity: str) -> Decimal:
    """Return the value of a Quantity: bytes of memory, or cores."""
    digits = quantity.rstrip("mkMGTi")
    return Decimal(digits) * _UNITS.get(quantity.removeprefix(digits), Decimal(1))


class Resources(ApiModel):
    """Resources that one pod requests. Requests equal limits for memory and GPUs; CPU has a request only."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            # `has`: the API server checks the default {} of resources before it fills in the defaults inside.
            "!has(self.memory) || !isQuantity(string(self.memory)) || "
            f"quantity(string(self.memory)).compareTo(quantity('{MIN_MEMORY}')) >= 0",
            f"resources.memory is less than {MIN_MEMORY}: add its unit, as in 8Gi",
            lambda self: quantity_value(self.memory) >= quantity_value(MIN_MEMORY),
        ),
    )

    gpus: int = Field(default=1, ge=0, le=16, description="Number of GPUs per pod. 0: the pod runs on the CPU.")
    gpu_resource: ExtendedResource = Field(default="nvidia.com/gpu", description="Extended resource of one GPU.")
    cpu: Quantity = Field(default="1", description="CPU request, as a Kubernetes quantity.")
    memory: Quantity = Field(default="8Gi", description="Memory request and limit, as a Kubernetes quantity.")


class DataParallelism(StrEnum):
    """Distribution of the base model over several ranks that train together."""

    DDP = "DDP"
    FSDP2 = "FSDP2"


class TrainingResources(Resources):
    """Resources that the training pods request. Results do not depend on the number of pods."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *Resources.rules,
        Rule(
            "!has(self.dataParallelism) || (has(self.gpus) ? self.gpus : 1) > 1 || (has(self.nodes) && self.nodes > 1)",
            "resources.dataParallelism needs several processes: remove it, or set gpus or nodes to 2 or more",
            lambda self: self.data_parallelism is None or self.ranks > 1,
        ),
    )

    nodes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Number of pods that train together, on separate nodes if possible. gpus, cpu and memory are per "
        "pod.",
    )

    data_parallelism: DataParallelism | None = Field(
        default=None,
        description="Distribution of the base model over several GPUs. DDP: each GPU has a full copy. FSDP2: each GPU "
        "has a shard of every layer, which is gathered when the layer is computed; slower, for base models that do not "
        "fit on one GPU. Absent: FSDP2 if the job fits only with it, otherwise DDP.",
    )

    @property
    def ranks(self) -> int:
        """Ranks that train together: one per GPU, or one per pod on the CPU."""
        return self.nodes * max(self.gpus, 1)


class Toleration(ApiModel):
    """Toleration of a taint (core/v1 Toleration)."""

    rules = (
        Rule(
            "self.operator != 'Exists' || !has(self.value)",
            "a toleration with the operator Exists must not have a value: remove the value, or use Equal",
            lambda self: self.operator != "Exists" or self.value is None,
        ),
        Rule(
            "has(self.key) || self.operator == 'Exists'",
            "a toleration without a key must have the operator Exists: set the operator, or the key",
            lambda self: self.key is not None or self.operator == "Exists",
        ),
    )

    key: str | None = Field(default=None, min_length=1, max_length=317, description="Taint key. Absent: every key.")
    operator: Literal["Exists", "Equal"] = Field(
        default="Equal", description="Operator. Exists: any value. Equal: the given value."
    )
    value: str | None = Field(default=None, max_length=63, description="Taint value, for Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Taint effect. Absent: every effect."
    )


class Scheduling(ApiModel):
    """Constraints on the nodes of pods."""

    node_selector: dict[Annotated[str, Field(max_length=317)], LabelValue] | None = Field(
        default=None, max_length=32, description="Labels that a node must have."
    )
    tolerations: list[Toleration] | None = Field(default=None, max_length=32, description="Tolerations of the pods.")
    priority_class_name: ResourceName | None = Field(default=None, description="PriorityClass of the pods.")
    runtime_class_name: ResourceName | None = Field(default=None, description="RuntimeClass of the pods.")

    def pod_fields(self) -> dict[str, Any]:
        """Return the fields of a pod's spec; empty ones are omitted."""
        return {name: value for name, value in self.manifest().items() if value}


class TrainingScheduling(Scheduling):
    """Constraints on the nodes of training pods, and their queue."""

    queue: LabelValue | None = Field(
        default=None,
        min_length=1,
        description="Kueue LocalQueue of the namespace that admits the attempts. Absent: attempts start immediately.",
    )

    def pod_fields(self) -> dict[str, Any]:
        """Return the fields of a pod's spec; the queue is a field of the Job instead."""
        fields = super().pod_fields()
        fields.pop("queue", None)
        return fields
