"""Translation of another tool's configuration into the spec of a FineTuneJob: state shared by the importers. Pure."""

from __future__ import annotations

import json
import posixpath
import re
import tomllib
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict

from tunesmith.storage.schemes import canonical

if TYPE_CHECKING:
    from collections.abc import Mapping

Document = dict[str, Any]
MIN_HELD_OUT, MAX_HELD_OUT = 0.001, 0.5
_HELD_OUT_LOSS = ("loss", "eval_loss")
EMPTY: tuple[object, ...] = (None, "", [], {})
_SPLIT = re.compile(r"[-a-zA-Z0-9_.]{1,128}")
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


_Table = TypeVar("_Table", bound=BaseModel)


def read_table(name: str, kind: type[_Table]) -> _Table:
    """Return the table of another tool's keys in a TOML file of this package."""
    text = files("tunesmith.cli").joinpath(name).read_text(encoding="utf-8")
    return kind.model_validate(tomllib.loads(text))


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

    def interval(self, key: str, part: str) -> None:
        """Translate an interval: a number of steps, or a share of the run's steps if it is below 1.

        Args:
            key: key of the interval.
            part: part of the spec, which has everySteps and everyRatio.
        """
        interval = self.number(key, 0)
        if interval >= 1:
            self.put(f"{part}.everySteps", int(interval))
        elif interval > 0:
            self.put(f"{part}.everyRatio", interval)

    def measurements(self, epochs: float, per_epoch: float = 0.0) -> None:
        """Translate the interval between measurements of the held-out loss.

        Args:
            epochs: epochs of the run, if it has no max_steps.
            per_epoch: measurements per epoch; 0: eval_strategy and eval_steps determine them.
        """
        for key in ("eval_strategy", "evaluation_strategy"):
            if self.given.get(key) == "steps":
                self.read(key)
            elif self.given.get(key) == "epoch" and "max_steps" not in self.given:
                self.read(key)
                per_epoch = per_epoch or 1.0
        if per_epoch > 0:
            self.put("evaluation.everyRatio", min(1.0, float(f"{1 / (per_epoch * epochs):.6g}")))
            self.read("eval_steps")
        else:
            self.interval("eval_steps", "evaluation")

    def published_step(self, patience: str) -> None:
        """Translate the step whose weights are published, and early stopping.

        Args:
            patience: key with the number of measurements without an improvement after which training stops.
        """
        best = self.read("load_best_model_at_end", default=False)
        self.default("load_best_model_at_end", "evaluation.publish", "Best" if best else "Last")
        if self.given.get("metric_for_best_model") in _HELD_OUT_LOSS:
            self.read("metric_for_best_model")
        if patience in self.given:
            self.put("evaluation.earlyStopping", {"patience": int(self.number(patience, 1))})

    def warmup(self) -> None:
        """Translate the warm-up: a number of steps, or a share of the run's steps if it is below 1."""
        steps = self.number("warmup_steps", 0)
        if steps >= 1:
            self.put("hyperparameters.warmupSteps", int(steps))
        elif steps > 0:
            self.put("hyperparameters.warmupRatio", steps)

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
    if "://" in name:
        return name
    return file_uri(name, folder) if name.startswith(("/", "./", "../")) else f"hf://{name}"


def remote_uri(name: str) -> str | None:
    """Return the uri of remote rows; None if the name is not one."""
    if name.startswith("https://"):
        return name
    stored = canonical(name)
    return None if stored is None else stored.rstrip("/")


def rows_uri(name: str, folder: str) -> str:
    """Return the uri of rows: as it is, or that of a path in a folder."""
    return remote_uri(name) or (name if "://" in name else file_uri(name, folder))


def different_columns(columns: Mapping[str, Mapping[str, str]]) -> str:
    """Return what to do about sources whose columns have different names.

    Args:
        columns: names of columns that differ from their fields' names, by the source's name.
    """
    found = "; ".join(f"{name} {json.dumps(names)}" for name, names in columns.items() if names)
    return f"dataset.columns applies to all sources, and they differ ({found}): rename the columns of the rows"


def is_split(name: object) -> bool:
    """Return True if it is the name of a split, without a range of its rows such as [:1%]."""
    return isinstance(name, str) and _SPLIT.fullmatch(name) is not None


def file_uri(path: str, folder: str) -> str:
    """Return the uri of a path, which may be relative to a folder."""
    return f"file://{posixpath.normpath(posixpath.join(folder, path))}"
