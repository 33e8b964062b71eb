"""Base classes of every resource model: naming, strictness and metadata."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Self

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import core_schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

GROUP = "tunesmith.dev"
VERSION = "v1alpha1"
API_VERSION: Final = "tunesmith.dev/v1alpha1"
MAX_NAME = 40
"""Longest metadata.name of a resource from which names of pods are made (63 characters at most)."""
INT_OR_STRING = "x-kubernetes-int-or-string"
VALIDATIONS = "x-kubernetes-validations"


def quoted(values: Iterable[str]) -> str:
    """A list of strings in CEL."""
    return "[" + ", ".join(f"'{value}'" for value in values) + "]"


@dataclass(frozen=True)
class Rule:
    """A rule that the CRD states in CEL and pydantic in Python, with the one sentence that the user reads.

    `holds` is None where only the API server can judge: transitions, and what is refused in a cluster alone.
    `old` marks a rule that also runs at creation, where `oldSelf` is an optional. `message_cel` computes a sentence
    that names what is wrong; `message` is the general one, for the reference.
    """

    cel: str
    message: str
    holds: Callable[[Any], bool] | None = None
    old: bool = False
    message_cel: str | None = None

    def schema(self) -> dict[str, Any]:
        """The entry of `x-kubernetes-validations`."""
        entry: dict[str, Any] = {"rule": self.cel, "message": self.message}
        if self.message_cel is not None:
            entry["messageExpression"] = self.message_cel
        return entry | {"optionalOldSelf": True} if self.old else entry


@dataclass(frozen=True)
class Matches:
    """Metadata of a string: the whole of it matches `pattern` (RE2), or the user reads `message`."""

    pattern: str
    message: str

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """The string's schema with the check behind it."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The pattern for JSON schema, the same as a CEL rule with its sentence for the CRD."""
        rule = Rule(f"self.matches(r'{self.pattern}')", self.message)
        return handler(schema) | {"pattern": self.pattern, VALIDATIONS: [rule.schema()]}

    def _check(self, value: str) -> str:
        if re.fullmatch(self.pattern, value) is None:
            raise ValueError(self.message)
        return value


ResourceName = Annotated[
    str,
    Field(min_length=1, max_length=253),
    Matches(
        r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
        "a name has lower-case letters, digits, '-' and '.', and begins and ends with a letter or digit",
    ),
]


class ApiModel(BaseModel):
    """A part of a resource: camelCase on the wire, unknown fields are refused."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )

    rules: ClassVar[tuple[Rule, ...]] = ()
    """What must hold between the fields, checked here and, as CEL, by the API server."""

    @model_validator(mode="after")
    def _obey_rules(self) -> Self:
        broken = [rule.message for rule in self.rules if rule.holds is not None and not rule.holds(self)]
        if broken:
            raise ValueError("; ".join(broken))
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The JSON schema with the rules as `x-kubernetes-validations`."""
        result = handler.resolve_ref_schema(handler(schema))
        if cls.rules:
            result[VALIDATIONS] = [rule.schema() for rule in cls.rules]
        return result

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
