"""Outputs of a FineTuneJob besides its adapter."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from tunesmith.api.credentials import REPORTING_SECRET, SecretReference
from tunesmith.api.model import ApiModel, Rule, StringPattern
from tunesmith.api.uri import ExportUri, optional_uri_rules
from tunesmith.storage.schemes import Use, prefixes

Repository = Annotated[
    str,
    Field(max_length=193),
    StringPattern(
        r"^[A-Za-z0-9_]+([-.][A-Za-z0-9_]+)*/[A-Za-z0-9_]+([-.][A-Za-z0-9_]+)*$",
        "a repository of the Hugging Face Hub is organisation/name, with letters, digits, '_', and single '-' or '.' "
        "between them",
    ),
]


class Merge(StrEnum):
    """Base model that the adapter is merged into."""

    NONE = "None"
    ORIGINAL = "Original"
    DEQUANTIZED = "Dequantized"


class Servable(StrEnum):
    """Requirement that an engine can load the result."""

    REQUIRED = "Required"
    IGNORED = "Ignored"


class Export(ApiModel):
    """Destination of a copy of the published artifact."""

    rules = (
        Rule(
            "has(self.uri) != has(self.hub)",
            "an entry of output.exports must have exactly one of uri and hub: remove the other",
            lambda self: (self.uri is None) != (self.hub is None),
        ),
        *optional_uri_rules,
    )

    uri: ExportUri | None = Field(
        default=None,
        description=f"Folder of another store: {prefixes(Use.EXPORT)}; file:// in a local run only.",
    )
    hub: Repository | None = Field(
        default=None,
        description="Model repository of the Hugging Face Hub, organisation/name. It is created as private if it does "
        "not exist. The copy is one commit.",
    )
    secret_ref: SecretReference | None = Field(
        default=None,
        description="Credentials with write access to the destination: those of a store, or HF_TOKEN of the Hub. "
        "Absent: those of the store.",
    )

    @property
    def destination(self) -> str:
        """Uri of the destination."""
        return self.uri or f"hf://{self.hub}"


class Tracker(StrEnum):
    """Tracking server or format for the run's metrics."""

    TENSORBOARD = "TensorBoard"
    MLFLOW = "MLflow"
    WANDB = "WandB"


class Output(ApiModel):
    """Outputs besides the adapter."""

    rules = (
        Rule(
            "!has(self.exports) || self.exports.all(copy, self.exports.filter(other, has(copy.uri) ? has(other.uri) && "
            "other.uri == copy.uri : has(copy.hub) && has(other.hub) && other.hub == copy.hub).size() < 2)",
            "two entries of output.exports have the same destination: remove one of them",
            lambda self: len({export.destination for export in self.exports or []}) == len(self.exports or []),
        ),
    )

    merge: Merge = Field(
        default=Merge.NONE,
        description="Merged model, written to the folder merged next to the artifact, with its measured distance from "
        "the trained model. None: not written. Original: the adapter is merged into the original base model. "
        "Dequantized: it is merged into the dequantised 4-bit base model on which it was trained.",
    )
    exports: list[Export] | None = Field(
        default=None,
        min_length=1,
        max_length=8,
        description="Destinations of copies of the published artifact, including the merged model as its folder "
        "merged. Pools always serve the artifact in the store. A failed copy does not fail the job. "
        "Nothing is copied if a gate failed.",
    )
    reporting: list[Tracker] | None = Field(
        default=None,
        max_length=3,
        json_schema_extra={"x-kubernetes-list-type": "set"},
        description="Trackers to which the metrics of each step are reported. TensorBoard: event files in the folder "
        "tensorboard next to the artifact. MLflow, WandB (Weights & Biases): address and key are read from the Secret "
        f"{REPORTING_SECRET} of the namespace, or from the environment in a local run. An unreachable tracker does "
        "not fail the job. Absent: none.",
    )

    @property
    def needs_reporting_secret(self) -> bool:
        """True if a tracker needs a server."""
        return bool({Tracker.MLFLOW, Tracker.WANDB} & set(self.reporting or []))
