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
        "a repository of the Hugging Face Hub is organisation/name, of letters, digits and '_' with single '-' or "
        "'.' between them",
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
            "an entry of output.exports needs exactly one of uri and hub: keep one, remove the other",
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
        description="Model repository of the Hugging Face Hub, organisation/name; made, and private, where there is "
        "none. One commit holds the whole copy.",
    )
    secret_ref: SecretReference | None = Field(
        default=None,
        description="Credentials that may write there: those of a store, or HF_TOKEN of the Hub; absent: those of the "
        "store.",
    )

    @property
    def place(self) -> str:
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
            "!has(self.exports) || self.exports.all(one, self.exports.filter(other, has(one.uri) ? has(other.uri) && "
            "other.uri == one.uri : has(one.hub) && has(other.hub) && other.hub == one.hub).size() < 2)",
            "two entries of output.exports name the same place: remove one",
            lambda self: len({export.place for export in self.exports or []}) == len(self.exports or []),
        ),
    )

    merge: Merge = Field(
        default=Merge.NONE,
        description="Full weights, in the folder merged beside the artifact, with their measured distance from what "
        "was trained: Original merges into the base as published, Dequantized (of a base in 4 bits) into that base "
        "turned back, which is what was trained on. Never merged in 4 bits.",
    )
    exports: list[Export] | None = Field(
        default=None,
        min_length=1,
        max_length=8,
        description="Places that get a copy of the artifact once it is published, with the merged model as its folder "
        "merged. What is served is always the artifact in the store. A copy that fails does not fail the job; "
        "nothing is copied where a gate failed.",
    )
    reporting: list[Tracker] | None = Field(
        default=None,
        max_length=3,
        json_schema_extra={"x-kubernetes-list-type": "set"},
        description="Trackers that get the metrics of each step: TensorBoard writes event files into the folder "
        "tensorboard beside the artifact; MLflow and WandB (Weights & Biases) take address and key from the Secret "
        f"{REPORTING_SECRET} of the namespace, in a local run from the environment. One that cannot be reached never "
        "stops the job. Absent: none.",
    )

    @property
    def needs_reporting_secret(self) -> bool:
        """True if a tracker needs a server."""
        return bool({Tracker.MLFLOW, Tracker.WANDB} & set(self.reporting or []))
