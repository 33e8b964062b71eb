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
SplitName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[-a-zA-Z0-9_.]+$")]


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
    CHUNK = "Chunk"
    ERROR = "Error"


class UnusableRows(StrEnum):
    """Handling of rows that cannot be learned as they are."""

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
            "a data set on the Hugging Face Hub is hf://datasets/organisation/name, followed by a folder, a file or a "
            "glob if it has files other than training rows",
            lambda self: not self.uri.startswith("hf://") or self.uri.startswith("hf://datasets/"),
        ),
    )

    uri: DataUri = Field(
        description="File, folder (all data files in and below it, sorted by path) or glob (*, ?, [a-z], **). "
        "Supported extensions: .jsonl, .json (a list, or one row per line), .csv, .tsv, .parquet, .arrow; .gz "
        f"after those of text formats. A data set of the Hub is hf://datasets/org/name[@revision]/…; "
        f"{prefixes(Use.DATA)}, in a local run also file://. https:// names one file.",
    )
    split: SplitName | None = Field(
        default=None,
        description="Split to read, if the names of the files or folders distinguish several, such as train and test. "
        "Absent: for dataset.train the training split; otherwise the validation split, or the test split if that is "
        "missing. status.preflight.sources lists the splits that were not read.",
    )
    secret_ref: SecretReference | None = Field(
        default=None, description="Credentials for the uri. Absent: those of the store."
    )


class TrainingSource(DatasetSource):
    """Files with rows, and their weight in an epoch."""

    weight: float = Field(
        default=1.0,
        ge=0.001,
        le=1000,
        description="Number of times each row is used per epoch. A fraction selects a share of the rows by the seed: "
        "0.25 uses a quarter of the rows; 2.5 uses all rows twice and half of them a third time.",
    )


class Columns(ApiModel):
    """Column names in the files. An absent one is the name of its field."""

    messages: ColumnName | None = Field(default=None, description="List of messages.")
    system: ColumnName | None = Field(
        default=None,
        description="System prompt of the chat; optional. Prompts and answers that are texts become chats.",
    )
    history: ColumnName | None = Field(
        default=None,
        description="Earlier turns of the chat, as messages or as pairs of question and answer; optional. Prompts and "
        "answers that are texts become chats.",
    )
    tools: ColumnName | None = Field(default=None, description="Tools that a chat may call, as JSON schemas.")
    prompt: ColumnName | None = Field(
        default=None, description="Prompt: text or messages. Of pairs optional: the common beginning of both answers."
    )
    completion: ColumnName | None = Field(default=None, description="Answer: text or messages.")
    instruction: ColumnName | None = Field(default=None, description="Instruction.")
    input: ColumnName | None = Field(default=None, description="Input of the instruction; optional.")
    output: ColumnName | None = Field(default=None, description="Answer to the instruction.")
    text: ColumnName | None = Field(default=None, description="Text.")
    chosen: ColumnName | None = Field(default=None, description="Preferred answer: text or messages.")
    rejected: ColumnName | None = Field(default=None, description="Rejected answer: text or messages.")
    label: ColumnName | None = Field(default=None, description="True or 1 if the completion is desirable.")


class Dataset(ApiModel):
    """Rows to train on and rows held out."""

    rules = (
        Rule(
            "!(has(self.validation) && has(self.validationFraction))",
            "dataset.validation and dataset.validationFraction are mutually exclusive: remove one of them",
            lambda self: self.validation is None or self.validation_fraction is None,
        ),
        Rule(
            "self.format != 'Text' || ((!has(self.lossOn) || self.lossOn == 'AllTokens') && !has(self.chatTemplate))",
            "dataset.format Text trains on every token of the unchanged text: remove dataset.lossOn and "
            "dataset.chatTemplate",
            lambda self: (
                self.format is not DataFormat.TEXT
                or (self.loss_on in {None, LossOn.ALL_TOKENS} and self.chat_template is None)
            ),
        ),
        Rule(
            "self.overlong != 'Chunk' || self.format in ['Auto', 'Text']",
            "dataset.overlong Chunk splits texts into several rows and needs dataset.format Text: use Drop or Truncate "
            "for rows with an answer",
            lambda self: self.overlong is not Overlong.CHUNK or self.format in {DataFormat.AUTO, DataFormat.TEXT},
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
        description="Share of the training rows that is held out, selected by the seed. Absent without validation: "
        "0.1.",
    )
    format: DataFormat = Field(
        default=DataFormat.AUTO,
        description="Format of the rows, by their fields. Messages: messages (and tools). PromptCompletion: prompt, "
        "completion. Instruction: instruction, input, output, rendered as a chat. Text: text. Preference: prompt, "
        "chosen, rejected. UnpairedPreference: prompt, completion, label. All except Text: also system and history. "
        "Auto: detected from the first row of each source.",
    )
    columns: Columns | None = Field(
        default=None, description="Names of the columns, if they differ from the fields' names."
    )
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        max_length=32768,
        description="Chat template (Jinja) that replaces the base model's. It must also be used for serving. Absent: "
        "the base model's.",
    )
    loss_on: LossOn | None = Field(
        default=None,
        description="Tokens that contribute to the loss. Completion: the last answer. AssistantTurns: every answer of "
        "a chat, found by the template's {% generation %} marks, or by rendering the chat up to each answer. "
        "AllTokens: all tokens, including prompts. Absent: AssistantTurns for Messages, AllTokens for Text, "
        "otherwise Completion.",
    )
    max_length: int = Field(default=2048, ge=16, le=131072, description="Maximum length of a row, in tokens.")
    overlong: Overlong = Field(
        default=Overlong.DROP,
        description="Handling of rows with more than maxLength tokens. Drop: drop the row. Truncate: remove the end, "
        "and drop the row if no trained token is left. Chunk: split a text (format Text) into rows of about equal "
        "length. Error: fail the job. Counted in status.preflight.",
    )
    unusable: UnusableRows = Field(
        default=UnusableRows.DROP,
        description="Handling of rows that cannot be decoded, lack required text, are incomplete chats, or have a part "
        "that the chat template does not render. Drop: drop the row and count it, with examples, in status.preflight; "
        "the job fails if they are at least half of a data set. Error: fail the job.",
    )
    duplicates: DuplicateRows = Field(
        default=DuplicateRows.DROP,
        description="Handling of repeated rows. Drop: drop and count them. Keep: train on them.",
    )
    packing: bool = Field(
        default=False,
        description="Pack several rows into sequences of maxLength tokens. Attention does not cross rows; a step of "
        "batchSize sequences trains on more rows.",
    )
