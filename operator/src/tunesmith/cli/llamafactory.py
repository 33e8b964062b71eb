"""Translation of a LLaMA-Factory configuration and its dataset_info.json into the fields of a FineTuneJob. Pure.

Every key that has a value is translated, needs no counterpart, or is reported as omitted. If LLaMA-Factory's default of
an absent key differs from Tunesmith's, LLaMA-Factory's is written to the spec and reported.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict

from tunesmith.cli.translation import (
    EMPTY,
    Document,
    Draft,
    NamedValues,
    Translation,
    UntranslatableError,
    different_columns,
    file_uri,
    is_split,
    model_uri,
    read_table,
    remote_uri,
)

_BATCH, _EPOCHS, _RATE, _RANK, _LENGTH = 8, 3.0, 5e-5, 8, 2048
"""Defaults of LLaMA-Factory and of transformers' TrainingArguments."""
_FAST_PISSA_ITERATIONS = 16
_STAGES = {"pt": "Text", "sft": None, "dpo": "Preference", "kto": "UnpairedPreference"}
"""Format of the rows by stage; None: it depends on the data set."""
_PROPERTIES = ({"role_tag": "from", "content_tag": "value"}, {"role_tag": "role", "content_tag": "content"})
_ROLES = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function"),
    "system_tag": ("system",),
}
"""Names of roles that the trainer knows, by the tag of dataset_info.json."""
_TRACKERS = {"tensorboard": "TensorBoard", "mlflow": "MLflow", "wandb": "WandB"}


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    ignored: frozenset[str]
    fields: dict[str, str]
    lora: dict[str, str]
    values: dict[str, NamedValues]
    columns: dict[str, dict[str, str]]
    assumed: dict[str, dict[str, str]]
    hints: dict[str, str]


@cache
def llamafactory_keys() -> _Keys:
    """Return the table of keys."""
    return read_table("llamafactory.toml", _Keys)


def translate(config: Document, data_sets: Document, folder: str, data_folder: str) -> Translation:
    """Return the FineTuneJob spec that is equivalent to a LLaMA-Factory configuration.

    Args:
        config: the configuration.
        data_sets: content of dataset_info.json.
        folder: absolute path of the folder to which its relative paths refer.
        data_folder: absolute path of the folder of dataset_info.json, to which its file names refer.

    Raises:
        UntranslatableError: the configuration has no equivalent; the message names the key and the alternatives.
    """
    given = {key: value for key, value in config.items() if value not in EMPTY}
    reader = _Reader(given, data_sets, folder, data_folder)
    reader.base_model()
    reader.method()
    reader.objective()
    reader.data()
    reader.hyperparameters()
    reader.output()
    return reader.finish()


class _Reader(Draft):
    def __init__(self, given: Document, data_sets: Document, folder: str, data_folder: str) -> None:
        self._keys = llamafactory_keys()
        super().__init__("LLaMA-Factory", given, self._keys.hints)
        self._data_sets = data_sets
        self._folder = folder
        self._data_folder = data_folder
        self._method = "lora"
        self._stage = str(given.get("stage", "sft"))

    def base_model(self) -> None:
        name = self.read("model_name_or_path")
        if not isinstance(name, str):
            raise UntranslatableError("model_name_or_path is missing: name the base model")
        self.put("baseModel.uri", model_uri(name, self._folder))
        if self.given.get("model_revision") == "main":
            self.read("model_revision")
            del self.given["model_revision"]

    def method(self) -> None:
        kind = self.read("finetuning_type", "lora")
        if kind not in ("lora", "full"):
            raise UntranslatableError(f"finetuning_type is {kind}: lora and full can be imported")
        if kind == "full":
            self._method = "full"
            for key in [key for key in self.given if key.startswith(("lora_", "use_dora", "use_rslora", "pissa_"))]:
                self.omit(key, "it has no effect without an adapter")
            return
        if self.given.get("quantization_bit") == 4:  # noqa: PLR2004 - bits
            self.read("quantization_bit")
            self._method = "qlora"
        rank = self.read("lora_rank", _RANK)
        self.default("lora_rank", "method.rank", rank)
        self.default("lora_alpha", "method.alpha", self.read("lora_alpha", 2 * int(self.number("lora_rank", _RANK))))
        self.put("method.targetModules", _names(self.read("lora_target", "all"), {"all": "all-linear"}))
        if "additional_target" in self.given:
            self.put("method.modulesToSave", _names(self.read("additional_target"), {}))
        if self.read("pissa_init", default=False):
            iterations = self.read("pissa_iter", _FAST_PISSA_ITERATIONS)
            self.put("method.initialization", "PiSSA" if iterations == -1 else "FastPiSSA")
            if iterations not in (-1, _FAST_PISSA_ITERATIONS):
                self.changed["pissa_iter"] = "initialization FastPiSSA uses Tunesmith's number of iterations"
            self.read("pissa_convert")  # the adapter is always saved as plain LoRA
        for key, name in self._keys.lora.items():
            if key in self.given:
                self.put(f"method.{name}", self.read(key))

    def objective(self) -> None:
        self.read("stage")
        if self._stage not in _STAGES:
            raise UntranslatableError(f"stage is {self._stage}: {', '.join(_STAGES)} can be imported")
        if self._stage == "dpo":
            loss = self.read("pref_loss", "sigmoid")
            if loss not in ("sigmoid", "orpo"):
                raise UntranslatableError(f"pref_loss is {loss}: sigmoid (DPO) and orpo can be imported")
            name, strength = ("dpo", "beta") if loss == "sigmoid" else ("orpo", "weight")
            fields = {"pref_beta": strength} | ({"dpo_label_smoothing": "labelSmoothing"} if name == "dpo" else {})
        elif self._stage == "kto":
            name = "kto"
            fields = {
                "pref_beta": "beta",
                "kto_chosen_weight": "desirableWeight",
                "kto_rejected_weight": "undesirableWeight",
            }
        else:
            return
        self.put(
            f"objective.{name}", {ours: self.read(theirs) for theirs, ours in fields.items() if theirs in self.given}
        )

    def data(self) -> None:
        names = _names(self.read("dataset"), {})
        if not names:
            raise UntranslatableError("dataset is missing: name the rows to train on")
        self.read("dataset_dir")
        held_out = _names(self.read("eval_dataset"), {})
        rows = [self._source(name) for name in (*names, *held_out)]
        self.put("dataset.train", [source for source, _, _ in rows[: len(names)]])
        formats = {form for _, form, _ in rows}
        if len(formats) == 1:
            self.put("dataset.format", formats.pop())
        columns = {name: found for name, (_, _, found) in zip((*names, *held_out), rows, strict=True)}
        common = self._common([(form, found) for _, form, found in rows])
        if common is None:
            self.omit("dataset_info.columns", different_columns(columns))
        elif common:
            self.put("dataset.columns", common)
        if held_out:
            self.put("dataset.validation", [source for source, _, _ in rows[len(names) :]])
        elif self.number("val_size", 0) >= 1:
            self.omit("val_size")
        else:
            self.held_out_share("val_size")
        self._rows()

    def _common(self, rows: list[tuple[str, dict[str, str]]]) -> dict[str, str] | None:
        """Return names of columns that are right for all data sets; None if two of them name a field differently.

        Args:
            rows: format of each data set, and the names that differ from its fields' names.
        """
        common = {field: column for _, columns in rows for field, column in columns.items()}
        for form, columns in rows:
            for field in self._keys.columns[form].values():
                if common.get(field, field) != columns.get(field, field):
                    return None
        return common

    def _rows(self) -> None:
        """Translate the options for reading rows."""
        self.default("cutoff_len", "dataset.maxLength", self.read("cutoff_len", _LENGTH))
        whole_texts = self._stage == "pt" and self.read("packing", default=True)
        if whole_texts:
            self.default("packing", "dataset.packing", value=True)
        self.put("dataset.overlong", "Chunk" if whole_texts else "Truncate")
        self.put("dataset.duplicates", "Keep")
        if self.given.get("mix_strategy") == "concat":
            self.read("mix_strategy")
        if self._stage != "pt" and self.read("train_on_prompt", default=False):
            self.put("dataset.lossOn", "AllTokens")
        elif self._stage == "sft" and self.read("mask_history", default=False):
            self.put("dataset.lossOn", "Completion")
        if "template" in self.given:
            self.read("template")
            self.changed["template"] = (
                "the base model's own chat template is used; dataset.chatTemplate accepts the text of another"
            )

    def _source(self, name: str) -> tuple[Document, str, dict[str, str]]:
        """Return source, format and columns of a data set of dataset_info.json."""
        entry = self._data_sets.get(name)
        if not isinstance(entry, dict):
            raise UntranslatableError(
                f"dataset names {name}, which dataset_info.json does not define: add it, or name the file with"
                " --dataset-info"
            )
        remaining = {key: value for key, value in entry.items() if value not in EMPTY and value is not False}
        source: Document = {"uri": self._uri(name, remaining)}
        form = _STAGES[self._stage]
        shared = remaining.pop("formatting", "alpaca") in {"sharegpt", "openai"}
        if form is None:
            form = "Messages" if shared else "Instruction"
        remaining.pop("ranking", None)
        if shared and form == "UnpairedPreference":
            self._whole_chats(name, remaining)
            shared = False
        columns = self._columns(name, form, remaining, shared=shared)
        tags = remaining.pop("tags", {})
        properties = {key: tags.pop(key, default) for key, default in _PROPERTIES[0].items()}
        if properties not in _PROPERTIES:
            self.omit(f"{name}.tags", "messages need the properties role and content, or from and value")
        for key, value in tags.items():
            if value not in _ROLES.get(key, ()):
                self.omit(f"{name}.tags.{key}", f"it is {json.dumps(value)}: rename the role in the rows")
        split = remaining.pop("split", "train")
        if is_split(split) and split != "train":
            source["split"] = split
        elif split != "train":
            remaining["split"] = split
        for key in remaining:
            self.omit(f"{name}.{key}")
        return source, form, columns

    def _whole_chats(self, name: str, remaining: Document) -> None:
        """Report how rated chats become rows with a prompt and a completion, and name the columns of such rows."""
        named: Document = remaining.get("columns", {})
        chat, label = named.get("messages", "conversations"), named.get("kto_tag", "label")
        others = {key: column for key, column in named.items() if key not in {"messages", "kto_tag"}}
        remaining["columns"] = {"prompt": "prompt", "response": "completion"} | others
        kept = "".join(f", {column}" for column in others.values())
        self.changed[f"{name}.columns"] = (
            "each row needs the rated answer in a column of its own: convert them with jq -c '.[] | {prompt:"
            f" .{chat}[:-1], completion: .{chat}[-1:], label: .{label}{kept}}}', and name the result in dataset.train"
        )

    def _uri(self, name: str, remaining: Document) -> str:
        """Remove the keys that locate the rows and return their uri."""
        hub, stored = remaining.pop("hf_hub_url", None), remaining.pop("cloud_file_name", None)
        path = remaining.pop("file_name", None)
        mirrors = [remaining.pop(key, None) for key in ("ms_hub_url", "om_hub_url", "script_url")]
        if hub is not None:
            return f"hf://datasets/{hub}"
        if path is not None:
            return file_uri(str(path), self._data_folder)
        uri = remote_uri(str(stored)) if stored is not None else None
        if uri is None:
            found = next((value for value in (stored, *mirrors) if value is not None), None)
            raise UntranslatableError(
                f"the rows of {name} are in {json.dumps(found)}: copy them to a file and set file_name, or hf_hub_url"
            )
        return uri

    def _columns(self, name: str, form: str, remaining: Document, *, shared: bool) -> dict[str, str]:
        """Remove the names of columns and return those that differ from their fields' names."""
        ours, assumed = self._keys.columns[form], self._keys.assumed[form]
        if shared and form != "Messages":
            assumed = {"messages": "conversations"}
        columns = {}
        for key, column in (assumed | remaining.pop("columns", {})).items():
            if key not in ours:
                self.omit(f"{name}.columns.{key}")
            elif column != ours[key]:
                columns[ours[key]] = column
        return columns

    def hyperparameters(self) -> None:
        micro = int(self.number("per_device_train_batch_size", _BATCH))
        accumulated = int(self.number("gradient_accumulation_steps", 1))
        self.put("hyperparameters.batchSize", micro * accumulated)
        self.default("per_device_train_batch_size", "hyperparameters.microBatchSize", micro)
        epochs = self.read("num_train_epochs", _EPOCHS)
        if self.number("max_steps", -1) > 0:
            self.put("hyperparameters.maxSteps", self.given["max_steps"])
        else:
            self.given.pop("max_steps", None)
            self.default("num_train_epochs", "hyperparameters.epochs", epochs)
        self.default("learning_rate", "hyperparameters.learningRate", self.read("learning_rate", _RATE))
        if "lr_scheduler_type" not in self.given:
            self.default("lr_scheduler_type", "hyperparameters.scheduler", "Linear")
        if self.number("warmup_steps", 0) > 0:
            self.warmup()
            if self.number("warmup_ratio", 0) > 0:
                self.changed["warmup_ratio"] = "warmup_steps overrides it, as in LLaMA-Factory"
        else:
            self.default("warmup_ratio", "hyperparameters.warmupRatio", self.read("warmup_ratio", 0.0))
        self.published_step("early_stopping_steps")
        self.interval("save_steps", "checkpoint")
        self.measurements(float(self.given.get("num_train_epochs", _EPOCHS)))
        if self.read("disable_gradient_checkpointing", default=False):
            self.put("hyperparameters.gradientCheckpointing", value=False)
        if self.read("fp16", default=False):
            self.put("hyperparameters.precision", "float16")
        self.tables(self._keys.fields, self._keys.values)

    def output(self) -> None:
        """Translate trackers, and the Hugging Face Hub repository to which the adapter is pushed."""
        found = self.given.get("report_to", [])
        named = [found] if isinstance(found, str) else found
        trackers = [_TRACKERS[name] for name in named if name in _TRACKERS]
        if trackers:
            self.put("output.reporting", trackers)
        if all(name in {*_TRACKERS, "none"} for name in named):
            self.read("report_to")
        if "run_name" in self.given:
            self.read("run_name")
            self.changed["run_name"] = "the run has the namespace and the name of the job, in all attempts"
        if self.hub_export():
            self.read("push_to_hub")

    def finish(self) -> Translation:
        """Return the translation, with the remaining keys sorted into ignored and omitted."""
        ignored = []
        for key, value in self.given.items():
            if key in self.translated or value is False:
                continue
            if key in self._keys.ignored:
                ignored.append(key)
            else:
                self.omit(key)
        spec = {part: self.spec.pop(part) for part in ("baseModel", "dataset")}
        method = {self._method: self.spec.pop("method", {})}
        return Translation(spec | {"method": method} | self.spec, self.omitted, sorted(ignored), self.changed)


def _names(value: Any, synonyms: dict[str, str]) -> list[str]:  # noqa: ANN401 - any YAML value
    """Return the names in a list, or in a text with commas."""
    names = value if isinstance(value, list) else str(value or "").split(",")
    return [synonyms.get(name.strip(), name.strip()) for name in map(str, names) if name.strip()]
