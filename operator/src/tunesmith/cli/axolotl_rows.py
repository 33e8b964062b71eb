"""Rows of an Axolotl configuration: an entry of `datasets`. Pure."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from tunesmith.cli.translation import EMPTY, Document, UntranslatableError, file_uri, remote_uri
from tunesmith.storage.schemes import Use, prefixes

_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of messages that the trainer reads as reasoning."""
_LEARNED = ("train", "loss", "weight")
"""Keys of messages with which the trainer selects the answers that are learned."""
_SPLIT = re.compile(r"(?P<name>[-a-zA-Z0-9_.]{1,128})(\[:(?P<percent>\d+)%\])?")
_LOCAL = re.compile(r"^(/|\./|\.\./)|\.(jsonl|json|csv|tsv|parquet|arrow)(\.gz)?$")


@dataclass
class Rows:
    """One entry of `datasets`."""

    uris: list[str]
    weight: float | None = None
    split: str | None = None
    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)

    @property
    def places(self) -> list[Document]:
        """URIs and splits of the rows."""
        return [{"uri": uri} | ({"split": self.split} if self.split is not None else {}) for uri in self.uris]

    @classmethod
    def of(cls, entry: Document, where: str, folder: str, preference: str | None) -> Rows:
        """Return the rows of an entry, preference rows if their format is given."""
        remaining = {key: value for key, value in entry.items() if value not in EMPTY}
        rows = cls(_data_uris(remaining, where, folder))
        kind = remaining.pop("type", None)
        if preference is None:
            rows._kind(kind, remaining)
        else:
            rows.format = preference
            for name, key in (("prompt", "field_messages"), ("chosen", "field_chosen"), ("rejected", "field_rejected")):
                rows._column(name, remaining.pop(key, None))
            rows._property_names(remaining)
            rows.changed[f"{where}.type"] = f"the rows must have dataset.format {preference}"
        for key in ("ds_type", "roles", "roles_to_train", "train_on_eos", "chat_template", "train_on_split"):
            known = {"roles_to_train": ["assistant"], "train_on_eos": "turn", "chat_template": "tokenizer_default"}
            if key in {"ds_type", "roles"} or remaining.get(key) == known.get(key, object()):
                remaining.pop(key, None)
        if remaining.get("message_field_training") in _LEARNED:
            del remaining["message_field_training"]
        rows._split(where, remaining)
        for key, value in remaining.items():
            rows.omitted[f"{where}.{key}"] = (
                "name the files of that part in the uri" if key in {"split", "name"} else f"it is {json.dumps(value)}"
            )
        if preference is None and rows.format == "Instruction":
            rows.changed[f"{where}.type"] = (
                "the rows are rendered by the base model's chat template, not by this prompt"
            )
        if rows.format is None and kind is not None:
            rows.omitted[f"{where}.type"] = f"{json.dumps(kind)} is not a supported row format"
        return rows

    def _kind(self, kind: object, remaining: Document) -> None:
        if isinstance(kind, dict):
            self.format = "Instruction"
            names = ("system", "instruction", "input", "output")
            for name in names:
                self._column(name, kind.get(f"field_{name}"))
            known = {f"field_{name}" for name in names}
            remaining |= {
                f"type.{key}": value for key, value in kind.items() if key not in known and value not in EMPTY
            }
        elif kind == "alpaca":
            self.format = "Instruction"
        elif kind in {"completion", "pretrain"}:
            self.format = "Text"
            self._column("text", remaining.pop("field", remaining.pop("text_column", None)))
        elif kind == "sharegpt":
            self.format = "Messages"
            self._column("messages", remaining.pop("conversation_field", "conversations"))
        elif kind == "chat_template":
            self.format = "Messages"
            self._column("messages", remaining.pop("field_messages", None))
            self._column("tools", remaining.pop("field_tools", None))
            if remaining.get("field_thinking") in _REASONING:
                del remaining["field_thinking"]
                remaining.pop("template_thinking_key", None)
            self._property_names(remaining)

    def _split(self, where: str, remaining: Document) -> None:
        """Translate the split, and the share of it that is used for training."""
        found = _SPLIT.fullmatch(str(remaining.get("split", "train")))
        if found is None or (found["percent"] is not None and not where.startswith("datasets")):
            return
        remaining.pop("split", None)
        if found["name"] != "train":
            self.split = found["name"]
        if found["percent"] is not None:
            self.weight = int(found["percent"]) / 100
            self.changed[f"{where}.split"] = (
                f"{found['percent']} % of the rows are chosen by the seed, not the first ones"
            )

    def _property_names(self, remaining: Document) -> None:
        """Remove the property names that the trainer knows: role and content, or from and value."""
        names = remaining.get("message_property_mappings") or {
            "role": remaining.get("message_field_role", "role"),
            "content": remaining.get("message_field_content", "content"),
        }
        if (names.get("role", "role"), names.get("content", "content")) in {("role", "content"), ("from", "value")}:
            for key in ("message_property_mappings", "message_field_role", "message_field_content"):
                remaining.pop(key, None)

    def _column(self, name: str, given: object) -> None:
        if isinstance(given, str) and given != name:
            self.columns[name] = given


def entries(value: object) -> list[Document]:
    """Return the entries of `datasets`, each of which may be a path only."""
    if not isinstance(value, list):
        value = [value]
    return [entry if isinstance(entry, dict) else {"path": str(entry)} for entry in value]


def _data_uris(entry: Document, where: str, folder: str) -> list[str]:
    """Remove path, data_files and revision from the entry and return their uris."""
    path, files = entry.pop("path", None), entry.pop("data_files", [])
    files = [files] if isinstance(files, str) else files
    if not isinstance(path, str):
        raise UntranslatableError(f"{where}.path is missing: name the rows")
    if path.startswith("http://"):
        raise UntranslatableError(f"{where}.path is {path}: copy the rows to {prefixes(Use.DATA)}")
    if (uri := remote_uri(path)) is not None:
        return [uri]
    if path in {"json", "csv", "parquet", "arrow", "text"} and files:
        return [remote_uri(name) or file_uri(name, folder) for name in files]
    if _LOCAL.search(path):
        root = file_uri(path, folder)
    else:
        revision = entry.pop("revision", None)
        root = f"hf://datasets/{path}" + (f"@{revision}" if revision else "")
    return [f"{root}/{name}" for name in files] or [root]
