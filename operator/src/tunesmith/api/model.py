"""Base classes of every resource model: naming, strictness and metadata."""

from __future__ import annotations

from datetime import datetime  # noqa: TC003 - pydantic resolves annotations at run time
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

GROUP = "tunesmith.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

Uri = Annotated[
    str,
    Field(min_length=1, max_length=1024),
]
ResourceName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]


def cel(rule: str, message: str) -> dict[str, str]:
    """One entry of `x-kubernetes-validations`: a CEL rule and the sentence that the user reads when it fails."""
    return {"rule": rule, "message": message}


def validations(*rules: dict[str, Any]) -> dict[str, Any]:
    """The `json_schema_extra` that carries CEL rules into the CRD."""
    return {"x-kubernetes-validations": list(rules)}


class ApiModel(BaseModel):
    """A part of a resource: camelCase on the wire, unknown fields are refused."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )

    def manifest(self) -> dict[str, Any]:
        """The JSON form, without absent fields, as Kubernetes stores it."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class StatusModel(ApiModel):
    """A part of a status: an unknown field (written by a newer release) is ignored."""

    model_config = ConfigDict(extra="ignore")


class ObjectMeta(StatusModel):
    """The fields of Kubernetes' ObjectMeta that Tunesmith reads."""

    name: str
    namespace: str = "default"
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class SecretReference(ApiModel):
    """A Secret in the namespace of the resource that names it."""

    name: ResourceName = Field(description="Name of the Secret. Its keys are the store's own variables, such as AWS_ACCESS_KEY_ID.")
