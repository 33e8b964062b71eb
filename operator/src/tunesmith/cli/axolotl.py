"""Translation of an Axolotl configuration into the fields of a FineTuneJob. Pure.

Every key that has a value is either translated, or needs no counterpart (Tunesmith decides it, or it only affects how
Axolotl runs), or is reported as omitted, with an alternative if there is one. If Axolotl's default of an absent key
differs from Tunesmith's, Axolotl's is written to the spec and reported.
"""

from __future__ import annotations

import json
import posixpath
import re
from dataclasses import dataclass, field
from typing import Any

from tunesmith.api.credentials import REPORTING_SECRET
from tunesmith.api.methods.lora import Initialization
from tunesmith.cli.adapterconfig import read_initialization
from tunesmith.cli.axolotl_keys import axolotl_keys
from tunesmith.storage.schemes import Use, canonical, prefixes

_EMPTY: tuple[object, ...] = (None, "", [], {})
_MIN_HELD_OUT, _MAX_HELD_OUT = 0.001, 0.5
_EPOCHS, _LENGTH, _MICRO_BATCH, _ACCUMULATION = 1.0, 512, 1, 1
"""Axolotl's defaults that differ from Tunesmith's (src/axolotl/utils/schemas/)."""
_LOCAL = re.compile(r"^(/|\./|\.\./)|\.(jsonl|json|csv|tsv|parquet|arrow)(\.gz)?$")
Document = dict[str, Any]


@dataclass
class Translation:
    """Result of translating a configuration.

    Args:
        spec: spec of the FineTuneJob.
        omitted: keys without a counterpart, with a hint or "".
        ignored: keys that need no counterpart.
        changed: keys whose counterpart behaves differently, with a description of the difference, and absent keys
            whose default was written.
    """

    spec: Document = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)


class UntranslatableError(ValueError):
    """The configuration cannot be expressed as a FineTuneJob."""


def translate(config: Document, folder: str) -> Translation:
    """Return the FineTuneJob spec that is equivalent to an Axolotl configuration.

    Args:
        config: the configuration.
        folder: absolute path of the folder to which its relative paths refer.

    Raises:
        UntranslatableError: the configuration has no equivalent; the message names the key and the alternatives.
    """
    given = {key: value for key, value in config.items() if value not in _EMPTY}
    reader = _Reader(given, folder)
    reader.base_model()
    reader.method()
    reader.objective()
    reader.dataset()
    reader.hyperparameters()
    reader.exports()
    reader.reporting()
    reader.evaluation()
    reader.fields()
    return reader.finish()


class _Reader:
    def __init__(self, given: Document, folder: str) -> None:
        self._given = given
        self._folder = folder
        self._keys = axolotl_keys()
        self._changed: dict[str, str] = {}
        self._translated: set[str] = set()
        self._spec: dict[str, Document] = {}
        self._method = "lora"
        self._omitted: dict[str, str] = {}

    def read(self, key: str, default: Any = None) -> Any:  # noqa: ANN401 - any YAML value
        """Return the key's value and mark the key as translated."""
        self._translated.add(key)
        return self._given.get(key, default)

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
        self._spec.setdefault(part, {})[name] = value

    def default(self, key: str, path: str, value: object) -> None:
        """Set a field, and report it if the key is absent and the value is therefore Axolotl's default."""
        self.put(path, value)
        if key not in self._given:
            self._changed[key] = f"absent, so {path} is {value}, as in Axolotl"

    def omit(self, key: str, hint: str = "") -> None:
        """Record that a key, or a part of one, has no counterpart."""
        self._omitted[key] = hint or self._keys.hints.get(key.rsplit(".", 1)[-1], "")

    def fields(self) -> None:
        """Translate keys whose value is copied or mapped by a table of names."""
        method = self._keys.methods.get("lora" if self._method == "qlora" else self._method, {})
        for key, path in {**self._keys.fields, **{key: f"method.{name}" for key, name in method.items()}}.items():
            if key in self._given:
                self.put(path, self.read(key))
        for key, named in self._keys.values.items():
            value = named.values.get(str(self._given.get(key)))
            if value is not None:
                self.put(named.field, value)
                self.read(key)

    def exports(self) -> None:
        """Translate the Hugging Face Hub repository to which the adapter is pushed."""
        if "/" in str(self._given.get("hub_model_id")):
            self.put("output.exports", [{"hub": self.read("hub_model_id")}])

    def finish(self) -> Translation:
        """Return the translation, with the remaining keys sorted into ignored and omitted."""
        ignored = []
        for key, value in self._given.items():
            if key in self._translated:
                continue
            if value is False:
                if key in self._keys.on_by_default:
                    self.omit(key, self._keys.on_by_default[key])
            elif key in self._keys.ignored or key == "num_epochs":  # max_steps overrides it
                ignored.append(key)
            else:
                self.omit(key)
        method = self._spec.pop("method", {})
        spec: Document = {"baseModel": self._spec.pop("baseModel"), "dataset": self._spec.pop("dataset")}
        return Translation(
            spec | {"method": {self._method: method}} | self._spec, self._omitted, sorted(ignored), self._changed
        )

    def base_model(self) -> None:
        name = self.read("base_model")
        if not isinstance(name, str):
            raise UntranslatableError("base_model is missing: name the base model")
        self.put("baseModel.uri", _model_uri(name, self._folder))
        if "revision_of_model" in self._given:
            self.put("baseModel.revision", str(self.read("revision_of_model")))

    def method(self) -> None:
        adapter = self.read("adapter")
        if adapter == "ia3":
            self._method = "ia3"
            if self.read("load_in_4bit", default=False):
                self.put("method.quantization", {})
            return
        if adapter is None:
            self._method = "full"
            for key in [key for key in self._given if key.startswith(("lora_", "peft_"))]:
                self.omit(key, "it has no effect without an adapter")
                del self._given[key]
            return
        if adapter not in ("lora", "qlora"):  # YAML values may be unhashable
            raise UntranslatableError(f"adapter is {adapter}: use lora, qlora or ia3, or omit it to train all weights")
        in_4_bits = bool(self.read("load_in_4bit", default=False))
        self._method = "qlora" if adapter == "qlora" or in_4_bits else "lora"
        self._targets()
        self._initialization()

    def _initialization(self) -> None:
        key = "peft_init_lora_weights"
        value = self._given.get(key)
        found, what = read_initialization(value)
        if found is not None:
            self.put("method.initialization", found.value)
            if found is Initialization.LOFTQ:
                self._method = "qlora"
            if what:
                self._changed[key] = what
        if found is not None or value is True:
            self.read(key)

    def _targets(self) -> None:
        names = self._given.get("lora_target_modules")
        if self._given.get("lora_target_linear"):
            self._translated |= {"lora_target_linear", "lora_target_modules"}
            self.put("method.targetModules", ["all-linear"])
        elif isinstance(names, list):
            self.put("method.targetModules", self.read("lora_target_modules"))
        elif names == "all-linear":
            self.put("method.targetModules", [self.read("lora_target_modules")])
        elif names is not None:
            self.omit("lora_target_modules", "it is a pattern; targetModules accepts names of modules")
            self._translated.add("lora_target_modules")

    def objective(self) -> None:
        if "rl" not in self._given:
            return
        name = str(self.read("rl"))
        if name not in self._keys.objectives:
            raise UntranslatableError(f"rl is {name}: {', '.join(self._keys.objectives)} can be imported")
        keys = self._keys.objectives[name].fields
        fields = {ours: self.read(theirs) for theirs, ours in keys.items() if theirs in self._given}
        self.put(f"objective.{name}", fields)

    def dataset(self) -> None:
        sources = self.read("datasets") or self._given.get("pretraining_dataset")
        if self._given.get("pretraining_dataset"):
            self._translated.add("pretraining_dataset")
            sources = [{"type": "completion"} | entry for entry in _entries(sources)]
        if not sources:
            raise UntranslatableError("datasets is missing: name the rows to train on")
        objective = self._keys.objectives.get(str(self._given.get("rl")))
        form = objective.format if objective is not None else None
        rows = [
            _Rows.of(entry, f"datasets[{number}]", self._folder, form) for number, entry in enumerate(_entries(sources))
        ]
        held_out = [
            _Rows.of(entry, f"test_datasets[{number}]", self._folder, form)
            for number, entry in enumerate(_entries(self.read("test_datasets", default=[])))
        ]
        for source in (*rows, *held_out):
            self._omitted |= source.omitted
            self._changed |= source.changed
        self.put(
            "dataset.train",
            [
                {"uri": uri} | ({"weight": source.weight} if source.weight is not None else {})
                for source in rows
                for uri in source.uris
            ],
        )
        formats = {source.format for source in (*rows, *held_out)}
        if len(formats) == 1 and (form := formats.pop()) is not None:
            self.put("dataset.format", form)
        columns = [source.columns for source in (*rows, *held_out)]
        if any(columns[0] != other for other in columns[1:]):
            self.omit("datasets[].field_*", "dataset.columns applies to all sources: rename the columns")
        elif columns[0]:
            self.put("dataset.columns", columns[0])
        share = self.number("val_set_size", 0)
        if held_out:
            self.put("dataset.validation", [{"uri": uri} for source in held_out for uri in source.uris])
        elif share < _MIN_HELD_OUT:
            self.put("dataset.validationFraction", _MIN_HELD_OUT)
            self._changed["val_set_size"] = (
                f"some rows are always held out, so dataset.validationFraction is {_MIN_HELD_OUT}, the minimum; "
                "raise it for a more precise held-out loss"
            )
        elif share <= _MAX_HELD_OUT:
            self.put("dataset.validationFraction", share)
        else:
            self.omit("val_set_size")
        self.default("sequence_len", "dataset.maxLength", self.read("sequence_len", _LENGTH))
        self._rows()

    def _rows(self) -> None:
        """Translate the options for reading rows."""
        plugins = self._given.get("plugins")
        if isinstance(plugins, list) and all(
            re.search("liger|cut_cross_entropy|lm_eval", str(name)) for name in plugins
        ):
            self.read("plugins")  # fused kernels, which Tunesmith chooses automatically, and evaluation
        if self.read("train_on_inputs", default=False):
            self.put("dataset.lossOn", "AllTokens")
        if self._given.get("chat_template") == "tokenizer_default":
            self.read("chat_template")
        template = self._given.get("chat_template_jinja")
        if isinstance(template, str) and "{%" in template:
            self.put("dataset.chatTemplate", self.read("chat_template_jinja"))
            if self._given.get("chat_template") == "jinja":
                self.read("chat_template")
        if not self.read("dataset_exact_deduplication", default=False):
            self.put("dataset.duplicates", "Keep")

    def reporting(self) -> None:
        """Translate trackers; their addresses and keys are in a Secret, and the run has the job's name."""
        trackers = []
        for tracker, keys in self._keys.trackers.items():
            enabled = self.read(keys.switch)
            given = [key for key in keys.keys if key in self._given]
            for key in given if enabled is not False else ():
                variable = keys.variables.get(key)
                self._changed[key] = (
                    f"put it into the Secret {REPORTING_SECRET} as {variable}"
                    if variable is not None
                    else "the run has the namespace and the name of the job, in all attempts"
                )
            self._translated.update(given)
            if enabled or (enabled is None and set(keys.implied_by) & set(given)):
                trackers.append(tracker.value)
        if trackers:
            self.put("output.reporting", trackers)

    def evaluation(self) -> None:
        """Translate Axolotl's plugin for lm-evaluation-harness."""
        tasks = self._given.get("lm_eval_tasks")
        if self._given.get("lm_eval_post_train") is False:
            return
        if isinstance(tasks, list) and tasks:
            self.put("evaluation.suites", [{"name": "lm-eval", "lmEval": {"tasks": self.read("lm_eval_tasks")}}])

    def hyperparameters(self) -> None:
        micro = int(self.number("micro_batch_size", _MICRO_BATCH))
        batch = micro * int(self.number("gradient_accumulation_steps", _ACCUMULATION))
        self.default("gradient_accumulation_steps", "hyperparameters.batchSize", batch)
        self.default("micro_batch_size", "hyperparameters.microBatchSize", micro)
        if "max_steps" not in self._given:
            self.default("num_epochs", "hyperparameters.epochs", self.read("num_epochs", _EPOCHS))
        if self._given.get("lr_scheduler", "cosine") == "cosine" and "cosine_min_lr_ratio" in self._given:
            self.put("hyperparameters.minLearningRateRatio", self.read("cosine_min_lr_ratio"))
        every = self._given.get("eval_steps")
        if isinstance(every, int) and every >= 1:
            self.put("evaluation.everySteps", self.read("eval_steps"))
        again = self._given.get("gradient_checkpointing")
        if isinstance(again, bool):
            self.put("hyperparameters.gradientCheckpointing", self.read("gradient_checkpointing"))
        if isinstance(self._given.get("torch_compile"), bool):
            self.put("hyperparameters.torchCompile", self.read("torch_compile"))
        bfloat16, half = self.read("bf16", default=self._given.get("bfloat16", "auto")), self._given.get("fp16")
        if not bfloat16 and not half:
            self.put("hyperparameters.precision", "float32")


@dataclass
class _Rows:
    """One entry of `datasets`."""

    uris: list[str]
    weight: float | None = None
    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    omitted: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, entry: Document, where: str, folder: str, preference: str | None) -> _Rows:
        """Return the rows of an entry, preference rows if their format is given."""
        remaining = {key: value for key, value in entry.items() if value not in _EMPTY}
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
        share = re.fullmatch(r"train(?:\[:(\d+)%\])?", str(remaining.get("split")))
        if share is not None and share[1] is None:
            del remaining["split"]
        elif share is not None and where.startswith("datasets"):
            rows.weight = int(share[1]) / 100
            rows.changed[f"{where}.split"] = f"{share[1]} % of the rows are chosen by the seed, not the first ones"
            del remaining["split"]
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
            for name in ("instruction", "input", "output"):
                self._column(name, kind.get(f"field_{name}"))
            known = {"field_instruction", "field_input", "field_output"}
            remaining |= {
                f"type.{key}": value for key, value in kind.items() if key not in known and value not in _EMPTY
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
            self._property_names(remaining)

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


def _entries(value: object) -> list[Document]:
    if not isinstance(value, list):
        value = [value]
    return [entry if isinstance(entry, dict) else {"path": str(entry)} for entry in value]


def _model_uri(name: str, folder: str) -> str:
    stored = canonical(name)
    if stored is not None:
        return stored.rstrip("/")
    return _file_uri(name, folder) if name.startswith(("/", "./", "../")) else f"hf://{name}"


def _data_uris(entry: Document, where: str, folder: str) -> list[str]:
    """Remove path, data_files and revision from the entry and return their uris."""
    path, files = entry.pop("path", None), entry.pop("data_files", [])
    files = [files] if isinstance(files, str) else files
    if not isinstance(path, str):
        raise UntranslatableError(f"{where}.path is missing: name the rows")
    if path.startswith("http://"):
        raise UntranslatableError(f"{where}.path is {path}: copy the rows to {prefixes(Use.DATA)}")
    if (uri := _remote(path)) is not None:
        return [uri]
    if path in {"json", "csv", "parquet", "arrow", "text"} and files:
        return [_remote(name) or _file_uri(name, folder) for name in files]
    if _LOCAL.search(path):
        root = _file_uri(path, folder)
    else:
        revision = entry.pop("revision", None)
        root = f"hf://datasets/{path}" + (f"@{revision}" if revision else "")
    return [f"{root}/{name}" for name in files] or [root]


def _remote(name: str) -> str | None:
    """Return the uri of remote rows; None if the name is not one."""
    if name.startswith("https://"):
        return name
    stored = canonical(name)
    return None if stored is None else stored.rstrip("/")


def _file_uri(path: str, folder: str) -> str:
    return f"file://{posixpath.normpath(posixpath.join(folder, path))}"
