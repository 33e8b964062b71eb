"""Rows of a FineTuneJob: their sources, their format, and the tokens that are learned."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar

from pydantic import Field

from tunesmith.api.credentials import SecretReference
from tunesmith.api.model import ApiModel, Rule
from tunesmith.api.uri import DataUri, secret_rule, uri_rules
from tunesmith.storage.schemes import Use, prefixes

DEFAULT_VALIDATION_FRACTION = 0.1
ColumnName = Annotated[str, Field(min_length=1, max_length=128)]


class DataFormat(StrEnum):
    """Format of a row."""

    AUTO = "Auto"
    MESSAGES = "Messages"
    PROMPT_COMPLETION = "PromptCompletion"
    INSTRUCTION = "Instruction"
    TEXT = "Text"
    PREFERENCE = "Preference"
    UNPAIRED_PREFERENCE = "UnpairedPreference"


class LossOn(StrEnum):
    """Tokens of a row that contribute to the loss."""

    COMPLETION = "Completion"
    ASSISTANT_TURNS = "AssistantTurns"
    ALL_TOKENS = "AllTokens"


class Overlong(StrEnum):
    """Handling of a row with more than maxLength tokens."""

    DROP = "Drop"
    TRUNCATE = "Truncate"
    ERROR = "Error"


class UnusableRows(StrEnum):
    """Handling of rows without anything to learn."""

    DROP = "Drop"
    ERROR = "Error"


class DuplicateRows(StrEnum):
    """Handling of a row that appears more than once in the training rows, or in the held-out rows."""

    DROP = "Drop"
    KEEP = "Keep"


class DatasetSource(ApiModel):
    """Files with rows."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *uri_rules,
        secret_rule,
        Rule(
            "!self.uri.startsWith('hf://') || self.uri.startsWith('hf://datasets/')",
            "a data set on the Hugging Face Hub is hf://datasets/organisation/name, with a folder, a file or a glob "
            "behind it where not all its files are rows to train on",
            lambda self: not self.uri.startswith("hf://") or self.uri.startswith("hf://datasets/"),
        ),
    )

    uri: DataUri = Field(
        description="A file, a folder (all data files in and below it, sorted by path) or a glob (*, ?, [a-z], **). "
        "The name says the format: .jsonl, .json (a list, or a row per line), .csv, .tsv, .parquet, .arrow; .gz "
        f"behind the text ones. A data set of the Hub is hf://datasets/org/name[@revision]/…; {prefixes(Use.DATA)}, "
        "locally file://. https:// names one file.",
    )
    secret_ref: SecretReference | None = Field(
        default=None, description="Credentials for the uri; absent: those of the store."
    )


class TrainingSource(DatasetSource):
    """Files with rows, and their weight in an epoch."""

    weight: float = Field(
        default=1.0,
        ge=0.001,
        le=1000,
        description="How often each row is taken per epoch. A fraction is a share of the rows, chosen by the seed: "
        "0.25 takes a quarter of them, 2.5 takes all twice and half of them a third time.",
    )


class Columns(ApiModel):
    """Column names in the files. An absent one is the name of its field."""

    messages: ColumnName | None = Field(default=None, description="A list of messages.")
    tools: ColumnName | None = Field(default=None, description="Tools that a chat may call, as JSON schemas.")
    prompt: ColumnName | None = Field(default=None, description="What is asked: a text or messages.")
    completion: ColumnName | None = Field(default=None, description="The answer: a text or messages.")
    instruction: ColumnName | None = Field(default=None, description="What is to be done.")
    input: ColumnName | None = Field(default=None, description="What the instruction is about; may be missing.")
    output: ColumnName | None = Field(default=None, description="The answer to an instruction.")
    text: ColumnName | None = Field(default=None, description="A text.")
    chosen: ColumnName | None = Field(default=None, description="The better answer: a text or messages.")
    rejected: ColumnName | None = Field(default=None, description="The worse answer: a text or messages.")
    label: ColumnName | None = Field(default=None, description="Whether the completion is a good one.")


class Dataset(ApiModel):
    """Rows to train on and rows held out."""

    rules = (
        Rule(
            "!(has(self.validation) && has(self.validationFraction))",
            "dataset.validation and dataset.validationFraction exclude each other: keep one of them",
            lambda self: self.validation is None or self.validation_fraction is None,
        ),
        Rule(
            "self.format != 'Text' || ((!has(self.lossOn) || self.lossOn == 'AllTokens') && !has(self.chatTemplate))",
            "dataset.format Text learns every token as it stands: remove dataset.lossOn and dataset.chatTemplate",
            lambda self: (
                self.format is not DataFormat.TEXT
                or (self.loss_on in {None, LossOn.ALL_TOKENS} and self.chat_template is None)
            ),
        ),
    )

    train: list[TrainingSource] = Field(
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
    format: DataFormat = Field(
        default=DataFormat.AUTO,
        description="What the rows hold. Messages: messages (and tools). PromptCompletion: prompt, completion. "
        "Instruction: instruction, input, output, rendered as a chat. Text: text. Preference: prompt, chosen, "
        "rejected. UnpairedPreference: prompt, completion, label. Auto: for each source, what its first row holds.",
    )
    columns: Columns | None = Field(default=None, description="Names of the columns, where the files have others.")
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        max_length=32768,
        description="Chat template (Jinja) in the place of the base model's; it must be served with the adapter. "
        "Absent: the base model's.",
    )
    loss_on: LossOn | None = Field(
        default=None,
        description="What is learned. Completion: the last answer. AssistantTurns: every answer of a chat, found by "
        "the template's {% generation %} marks, or by rendering the chat up to each. AllTokens: questions too. Absent: "
        "AssistantTurns of messages, AllTokens of Text, Completion of the others.",
    )
    max_length: int = Field(default=2048, ge=16, le=131072, description="Longest row, in tokens.")
    overlong: Overlong = Field(
        default=Overlong.DROP,
        description="Rows with more than maxLength tokens: Drop; Truncate (the end is lost, and a row of which nothing "
        "to learn is left is dropped); or Error. Counted in status.preflight.",
    )
    unusable: UnusableRows = Field(
        default=UnusableRows.DROP,
        description="Rows that cannot be decoded, or have nothing where text must be: Drop, counted with examples in "
        "status.preflight, and an error where they are half of a data set or more; or Error.",
    )
    duplicates: DuplicateRows = Field(
        default=DuplicateRows.DROP, description="Rows that were there before: Drop (counted) or Keep."
    )
    packing: bool = Field(
        default=False,
        description="Fill sequences of maxLength tokens with several rows each. Rows do not see each other; a step of "
        "batchSize sequences learns from more rows.",
    )
