"""Declarations of settings: the chart's value that sets each one, and the types that several programs use.

A setting is a field of a pydantic model. Its annotation names the chart's value (`ChartValue`) or the reason for having
none (`Internal`); the chart's flags, its values schema and docs/reference/settings.md are generated from the models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping  # noqa: TC003 - read by pydantic
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import core_schema

from tunesmith.contracts.addresses import parse_networks
from tunesmith.storage.schemes import parse_store, store_pattern

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler

DEFAULT_MAX_ADAPTER_RATIO = 4.0
"""Highest norm of an adapter's change of a module, relative to that of the base's weights."""
MAX_ENTRIES = 256
"""Longest list of a setting."""


@dataclass(frozen=True, slots=True)
class ChartValue:
    """Annotation of a field that a value of charts/tunesmith sets.

    Attributes:
        path: keys in values.yaml, such as `serving.adapterStorage`, or a built-in object of Helm.
        expression: Go template of the flag's value; empty: the value itself.
        narrower: JSON Schema keywords by which the chart accepts less than the program.
    """

    path: str
    expression: str = ""
    narrower: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Internal:
    """Annotation of a field that no value of the chart sets.

    Attributes:
        reason: its source, or why it never needs to be set.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class SettingPattern:
    """Annotation of a text that must match a pattern.

    Attributes:
        pattern: regular expression of the whole text.
        expected: noun phrase for the error "'x' is not …".
    """

    pattern: str
    expected: str

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Return the type's schema followed by the check of the text."""
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Return the JSON Schema; its regular expressions have no named groups."""
        unnamed = re.sub(r"\(\?P<\w+>", "(", self.pattern)
        return {**handler(schema), "pattern": f"^({unnamed})$"}

    def _checked(self, text: str) -> str:
        if re.fullmatch(self.pattern, text) is None:
            raise ValueError(f"{text!r} is not {self.expected}")
        return text


def _entries(value: object) -> object:
    if isinstance(value, str):
        return tuple(entry for part in value.split(",") if (entry := part.strip()))
    return value


COMMA_SEPARATED = BeforeValidator(_entries)
"""Annotation of a tuple whose flag is `a,b`."""

Namespaces = Annotated[
    tuple[Annotated[str, SettingPattern("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", "a valid name of a namespace")], ...],
    Field(max_length=MAX_ENTRIES),
    COMMA_SEPARATED,
]
StorageSize = Annotated[str, SettingPattern("[1-9][0-9]*(Mi|Gi)", "a size such as 20Gi or 512Mi")]


def _network(text: str) -> str:
    parse_networks(text)
    return text


NetworkAddress = Annotated[
    str, AfterValidator(_network), Field(json_schema_extra={"pattern": "^[0-9A-Fa-f.:]+/[0-9]{1,3}$"})
]


class WorkloadSettings(BaseModel):
    """Settings of the pods of both FineTuneJobs and ServingPools."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    store: Annotated[
        str,
        AfterValidator(parse_store),
        # The chart has its own message for an empty value.
        Field(json_schema_extra={"pattern": f"^$|{store_pattern()}"}),
        ChartValue("store"),
    ]
    """Bucket and folder of the store in which artifacts are published, such as s3://tunesmith/store."""
    image_pull_policy: Annotated[Literal["Always", "IfNotPresent", "Never"], ChartValue("images.pullPolicy")] = (
        "IfNotPresent"
    )
    """Pull policy of all pods."""
    allowed_addresses: Annotated[
        tuple[NetworkAddress, ...],
        Field(max_length=MAX_ENTRIES),
        COMMA_SEPARATED,
        ChartValue("trainer.allowedAddresses"),
    ] = ()
    """Networks besides public addresses to which pods of jobs and pools may connect, such as 10.0.0.7/32,fd00::/8."""
