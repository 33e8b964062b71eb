"""Translation of another tool's configuration into the spec of a FineTuneJob: state shared by the importers. Pure."""

from __future__ import annotations

import json
import math
import posixpath
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from tunesmith.storage.schemes import canonical

if TYPE_CHECKING:
    from collections.abc import Mapping

Document = dict[str, Any]
MIN_HELD_OUT, MAX_HELD_OUT = 0.001, 0.5
EMPTY: tuple[object, ...] = (None, "", [], {})
_CHOSEN_BY_SEED = "raise it for a more precise held-out loss"


@dataclass
class Translation:
    """Result of translating a configuration.

    Args:
        spec: spec of the FineTuneJob.
        omitted: keys without a counterpart, with a hint or "".
        ignored: keys that need no counterpart.
        changed: keys whose counterpart behaves differently, with a description of the difference, and absent keys
            whose default was written.
        name: name of the job; None if the configuration has none.
    """

    spec: Document = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    name: str | None = None


class NamedValues(BaseModel):
    """A key whose values are names.

    Attributes:
        field: path of the field in the spec.
        values: the field's value by the other tool's value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    field: str
    values: dict[str, str]


class UntranslatableError(ValueError):
    """The configuration cannot be expressed as a FineTuneJob."""


class Draft:
    """Spec that is being translated, and the keys that were read, omitted and changed.

    Args:
        tool: name of the other tool.
        given: keys that have a value.
        hints: alternatives for keys without a counterpart.
    """

    def __init__(self, tool: str, given: Document, hints: Mapping[str, str]) -> None:
        self.given = given
        self.changed: dict[str, str] = {}
        self.omitted: dict[str, str] = {}
        self.translated: set[str] = set()
        self.spec: dict[str, Document] = {}
        self._tool = tool
        self._hints = hints

    def read(self, key: str, default: Any = None) -> Any:  # noqa: ANN401 - any YAML value
        """Return the key's value and mark the key as translated."""
        self.translated.add(key)
        return self.given.get(key, default)

    def number(self, key: str, default: float) -> float:
        """Return the value of a key that must be a number."""
        value = self.read(key, default)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise UntranslatableError(f"{key} is {json.dumps(value)}: write a number") from None

    def put(self, path: str, value: object) -> None:
        """Set a field of the spec."""
        part, name = path.split(".")
        self.spec.setdefault(part, {})[name] = value

    def default(self, key: str, path: str, value: object) -> None:
        """Set a field, and report it if the key is absent and the value is therefore the other tool's default."""
        self.put(path, value)
        if key not in self.given:
            self.changed[key] = f"absent, so {path} is {value}, as in {self._tool}"

    def omit(self, key: str, hint: str = "") -> None:
        """Record that a key, or a part of one, has no counterpart."""
        self.translated.add(key)
        self.omitted[key] = hint or self._hints.get(key.rsplit(".", 1)[-1], "")

    def tables(self, fields: Mapping[str, str], values: Mapping[str, NamedValues]) -> None:
        """Translate the keys of two tables.

        Args:
            fields: paths of fields by keys whose values are copied.
            values: keys whose values are names.
        """
        for key, path in fields.items():
            if key in self.given:
                self.put(path, self.read(key))
        for key, named in values.items():
            value = named.values.get(str(self.given.get(key)))
            if value is not None:
                self.put(named.field, value)
                self.read(key)

    def hub_export(self) -> bool:
        """Translate the Hugging Face Hub repository to which the adapter is pushed; return True if there is one."""
        if "/" not in str(self.given.get("hub_model_id")):
            return False
        self.put("output.exports", [{"hub": self.read("hub_model_id")}])
        return True

    def interval(self, key: str, path: str) -> None:
        """Translate an interval: a number of steps, or a share of the run's steps if it is below 1."""
        if key not in self.given:
            return
        interval = self.number(key, 0)
        if interval >= 1:
            self.put(path, int(interval))
        elif "max_steps" in self.given:
            self.put(path, max(1, math.ceil(interval * self.number("max_steps", 1))))
            self.changed[key] = f"{interval} of max_steps is a number of steps in {path}"
        else:
            self.omit(
                key,
                f"it is a share of the steps: set {path} to {interval} of the steps that `tunesmith estimate` shows",
            )

    def published_step(self, patience: str) -> None:
        """Translate the step whose weights are published, and early stopping.

        Args:
            patience: key with the number of measurements without an improvement after which training stops.
        """
        best = self.read("load_best_model_at_end", default=False)
        self.default("load_best_model_at_end", "evaluation.publish", "Best" if best else "Last")
        if patience in self.given:
            self.put("evaluation.earlyStopping", {"patience": int(self.number(patience, 1))})

    def held_out_share(self, key: str) -> None:
        """Translate the share of the training rows that is held out."""
        share = self.number(key, 0)
        if share < MIN_HELD_OUT:
            self.put("dataset.validationFraction", MIN_HELD_OUT)
            self.changed[key] = (
                f"some rows are always held out, so dataset.validationFraction is {MIN_HELD_OUT}, the minimum; "
                f"{_CHOSEN_BY_SEED}"
            )
        elif share <= MAX_HELD_OUT:
            self.put("dataset.validationFraction", share)
        else:
            self.omit(key)


def model_uri(name: str, folder: str) -> str:
    """Return the uri of a base model: of a store, of the Hugging Face Hub, or of a path in a folder."""
    stored = canonical(name)
    if stored is not None:
        return stored.rstrip("/")
    return file_uri(name, folder) if name.startswith(("/", "./", "../")) else f"hf://{name}"


def remote_uri(name: str) -> str | None:
    """Return the uri of remote rows; None if the name is not one."""
    if name.startswith("https://"):
        return name
    stored = canonical(name)
    return None if stored is None else stored.rstrip("/")


def file_uri(path: str, folder: str) -> str:
    """Return the uri of a path, which may be relative to a folder."""
    return f"file://{posixpath.normpath(posixpath.join(folder, path))}"
