"""The rows of a FineTuneJob: where they are and how they are read."""

from __future__ import annotations

from pydantic import Field

from tunesmith.api.model import ApiModel, Rule, SecretReference, Uri, uri_rules

DEFAULT_VALIDATION_FRACTION = 0.1


class DatasetSource(ApiModel):
    """One JSONL file of training rows."""

    rules = uri_rules

    uri: Uri = Field(description="A .jsonl file; file:// in a local run only.")
    secret_ref: SecretReference | None = Field(
        default=None, description="Credentials for the uri; absent: those of the store."
    )


class Dataset(ApiModel):
    """Rows to train on and rows held out."""

    rules = (
        Rule(
            "!(has(self.validation) && has(self.validationFraction))",
            "dataset.validation and dataset.validationFraction exclude each other: keep one of them",
            lambda self: self.validation is None or self.validation_fraction is None,
        ),
    )

    train: list[DatasetSource] = Field(
        min_length=1, max_length=64, description="Sources of the training rows, concatenated in this order."
    )
    validation: list[DatasetSource] | None = Field(
        default=None, min_length=1, max_length=64, description="Sources of the held-out rows."
    )
    validation_fraction: float | None = Field(
        default=None,
        ge=0.001,
        le=0.5,
        description="Share of the training rows that is held out, chosen by the seed. Absent with no validation: 0.1.",
    )
    max_length: int = Field(
        default=2048, ge=16, le=131072, description="Longest row, in tokens; longer rows are dropped and counted."
    )
