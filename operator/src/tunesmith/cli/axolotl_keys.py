"""The keys of an Axolotl configuration, from `axolotl.toml`."""

from __future__ import annotations

from functools import cache

from pydantic import BaseModel, ConfigDict

from tunesmith.api.output import Tracker
from tunesmith.cli.translation import NamedValues, read_table


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ObjectiveKeys(_Table):
    """An objective.

    Attributes:
        format: format of its rows, a value of dataset.format.
        fields: the objective's fields by Axolotl's keys.
    """

    format: str
    fields: dict[str, str]


class TrackerKeys(_Table):
    """A tracker.

    Attributes:
        switch: key that enables it.
        implied_by: keys that also enable it, unless `switch` is false.
        variables: variables of the reporting Secret by Axolotl's keys.
        names: keys that name the run.
    """

    switch: str
    implied_by: list[str] = []
    variables: dict[str, str] = {}
    names: list[str] = []

    @property
    def keys(self) -> list[str]:
        """All keys except the switch."""
        return [*self.variables, *self.names]


class AxolotlKeys(_Table):
    """Counterparts of Axolotl's keys.

    Attributes:
        ignored: keys that need no counterpart.
        fields: paths in the spec by key; the value is copied.
        methods: fields by key, for each method.
        values: keys whose values are names.
        objectives: objectives by the value of `rl`.
        trackers: keys by tracker.
        on_by_default: keys that matter if they are false, with the behaviour of Tunesmith.
        hints: alternatives for keys without a counterpart.
    """

    ignored: frozenset[str]
    fields: dict[str, str]
    methods: dict[str, dict[str, str]]
    values: dict[str, NamedValues]
    objectives: dict[str, ObjectiveKeys]
    trackers: dict[Tracker, TrackerKeys]
    on_by_default: dict[str, str]
    hints: dict[str, str]


@cache
def axolotl_keys() -> AxolotlKeys:
    """Return the table."""
    return read_table("axolotl.toml", AxolotlKeys)
