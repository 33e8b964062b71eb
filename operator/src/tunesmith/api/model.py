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
"""Longest metadata.name of a resource whose name is part of pod names (63 characters at most)."""
INT_OR_STRING = "x-kubernetes-int-or-string"
VALIDATIONS = "x-kubernetes-validations"


def quoted(values: Iterable[str]) -> str:
    """Return the strings as a CEL list."""
    return "[" + ", ".join(f"'{value}'" for value in values) + "]"


@dataclass(frozen=True)
class Rule:
    """A rule that the CRD states in CEL and pydantic in Python, with one message for the user.

    `holds` is None if only the API server can check it: transitions, and restrictions that apply in a cluster alone.
    `old` marks a rule that also runs at creation, with `oldSelf` as an optional. `message_cel` computes a message
    that names the offending value; `message` is the general one, for the reference.
    """

    cel: str
    message: str
    holds: Callable[[Any], bool] | None = None
    old: bool = False
    message_cel: str | None = None

    def schema(self) -> dict[str, Any]:
        """Return the entry of `x-kubernetes-validations`."""
        entry: dict[str, Any] = {"rule": self.cel, "message": self.message}
        if self.message_cel is not None:
            entry["messageExpression"] = self.message_cel
        return entry | {"optionalOldSelf": True} if self.old else entry


@dataclass(frozen=True)
class StringPattern:
    """Constraint on a string: the whole of it matches `pattern` (RE2); otherwise `message` is the error."""

    pattern: str
    message: str

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Return the string's schema followed by the check."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Return the JSON schema with the pattern, and with the same check as a CEL rule for the CRD."""
        rule = Rule(f"self.matches(r'{self.pattern}')", self.message)
        return handler(schema) | {"pattern": self.pattern, VALIDATIONS: [rule.schema()]}

    def _check(self, value: str) -> str:
        if re.fullmatch(self.pattern, value) is None:
            raise ValueError(self.message)
        return value


ResourceName = Annotated[
    str,
    Field(min_length=1, max_length=253),
    StringPattern(
        r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
        "a name has lower-case letters, digits, '-' and '.', and begins and ends with a letter or digit",
    ),
]


class ApiModel(BaseModel):
    """Part of a resource: camelCase in JSON; unknown fields are refused."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )

    rules: ClassVar[tuple[Rule, ...]] = ()
    """Rules between the fields, checked here and, as CEL, by the API server."""

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        broken = [rule.message for rule in self.rules if rule.holds is not None and not rule.holds(self)]
        if broken:
            raise ValueError("; ".join(broken))
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Return the JSON schema with the rules as `x-kubernetes-validations`."""
        result = handler.resolve_ref_schema(handler(schema))
        if cls.rules:
            result[VALIDATIONS] = [rule.schema() for rule in cls.rules]
        return result

    def manifest(self) -> dict[str, Any]:
        """Return the JSON form without absent fields, as Kubernetes stores it."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class StatusModel(ApiModel):
    """Part of a status; an unknown field, written by a newer release, is ignored."""

    model_config = ConfigDict(extra="ignore")


class ObjectMeta(StatusModel):
    """Fields of Kubernetes' ObjectMeta that Tunesmith reads."""

    name: str
    namespace: str = "default"
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
