"""Translation of an Axolotl configuration into the fields of a FineTuneJob. Pure.

Every key that has a value is either translated, or needs no counterpart (Tunesmith decides it, or it only affects how
Axolotl runs), or is reported as omitted, with an alternative if there is one. If Axolotl's default of an absent key
differs from Tunesmith's, Axolotl's is written to the spec and reported.
"""

from __future__ import annotations

import re

from tunesmith.api.credentials import REPORTING_SECRET
from tunesmith.api.methods.lora import Initialization, LoraFields
from tunesmith.cli.axolotl_keys import axolotl_keys
from tunesmith.cli.axolotl_rows import Rows, entries
from tunesmith.cli.translation import (
    EMPTY,
    Document,
    Draft,
    Translation,
    UntranslatableError,
    different_columns,
    model_uri,
)
from tunesmith.contracts.adapterconfig import names_of_pattern, read_initialization

_EPOCHS, _LENGTH, _MICRO_BATCH, _ACCUMULATION = 1.0, 512, 1, 1
"""Axolotl's defaults that differ from Tunesmith's (src/axolotl/utils/schemas/)."""


def translate(config: Document, folder: str) -> Translation:
    """Return the FineTuneJob spec that is equivalent to an Axolotl configuration.

    Args:
        config: the configuration.
        folder: absolute path of the folder to which its relative paths refer.

    Raises:
        UntranslatableError: the configuration has no equivalent; the message names the key and the alternatives.
    """
    given = {key: value for key, value in config.items() if value not in EMPTY}
    reader = _Reader(given, folder)
    reader.base_model()
    reader.method()
    reader.objective()
    reader.dataset()
    reader.hyperparameters()
    reader.hub_export()
    reader.reporting()
    reader.evaluation()
    reader.fields()
    return reader.finish()


class _Reader(Draft):
    def __init__(self, given: Document, folder: str) -> None:
        self._keys = axolotl_keys()
        super().__init__("Axolotl", given, self._keys.hints)
        self._folder = folder
        self._method = "lora"
        self._pattern: str | None = None

    def fields(self) -> None:
        """Translate keys whose value is copied or mapped by a table of names."""
        method = self._keys.methods.get("lora" if self._method == "qlora" else self._method, {})
        fields = self._keys.fields | {key: f"method.{name}" for key, name in method.items()}
        self.tables(fields, self._keys.values)

    def finish(self) -> Translation:
        """Return the translation, with the remaining keys sorted into ignored and omitted."""
        ignored = []
        for key, value in self.given.items():
            if key in self.translated:
                continue
            if value is False:
                if key in self._keys.on_by_default:
                    self.omit(key, self._keys.on_by_default[key])
            elif key in self._keys.ignored or key == "num_epochs":  # max_steps overrides it
                ignored.append(key)
            else:
                self.omit(key)
        method = {self._method: self.spec.pop("method", {})}
        if self._pattern is not None:
            method = {"peft": self._peft_method(method[self._method], self._pattern)}
        spec: Document = {"baseModel": self.spec.pop("baseModel"), "dataset": self.spec.pop("dataset")}
        return Translation(spec | {"method": method} | self.spec, self.omitted, sorted(ignored), self.changed)

    def _peft_method(self, fields: Document, pattern: str) -> Document:
        """Return method.peft, which keeps a regular expression of modules, for the fields of lora or qlora."""
        names = {
            str(LoraFields.model_fields[attribute].alias): name for attribute, name in LoraFields.peft_names.items()
        }
        config = {names[name].key: names[name].peft_value(value) for name, value in fields.items() if name in names}
        for key, name in self._keys.methods["lora"].items():
            if name in fields and name not in names:
                self.omit(
                    key, "method.peft, which keeps the regular expression of lora_target_modules, does not have it"
                )
        self.changed["lora_target_modules"] = "it is a regular expression, which method.peft keeps"
        quantization: Document = {"quantization": {}} if self._method == "qlora" else {}
        return {"type": "LORA", "config": config | {"target_modules": pattern}} | quantization

    def base_model(self) -> None:
        name = self.read("base_model")
        if not isinstance(name, str):
            raise UntranslatableError("base_model is missing: name the base model")
        self.put("baseModel.uri", model_uri(name, self._folder))
        if "revision_of_model" in self.given:
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
            for key in [key for key in self.given if key.startswith(("lora_", "peft_"))]:
                self.omit(key, "it has no effect without an adapter")
                del self.given[key]
            return
        if adapter not in ("lora", "qlora"):  # YAML values may be unhashable
            raise UntranslatableError(f"adapter is {adapter}: use lora, qlora or ia3, or omit it to train all weights")
        in_4_bits = bool(self.read("load_in_4bit", default=False))
        self._method = "qlora" if adapter == "qlora" or in_4_bits else "lora"
        self._targets()
        self._initialization()

    def _initialization(self) -> None:
        key = "peft_init_lora_weights"
        value = self.given.get(key)
        found, what = read_initialization(value)
        if found is not None:
            self.put("method.initialization", found.value)
            if found is Initialization.LOFTQ:
                self._method = "qlora"
            if what:
                self.changed[key] = what
        if found is not None or value is True:
            self.read(key)

    def _targets(self) -> None:
        names = self.given.get("lora_target_modules")
        if self.given.get("lora_target_linear"):
            self.translated |= {"lora_target_linear", "lora_target_modules"}
            self.put("method.targetModules", ["all-linear"])
        elif isinstance(names, list):
            self.put("method.targetModules", self.read("lora_target_modules"))
        elif names == "all-linear":
            self.put("method.targetModules", [self.read("lora_target_modules")])
        elif isinstance(names, str):
            self.read("lora_target_modules")
            equivalent = names_of_pattern(names)
            if equivalent is not None:
                self.put("method.targetModules", equivalent)
            else:
                self._pattern = names

    def objective(self) -> None:
        for key in ("reward_model", "process_reward_model"):
            if self.given.get(key):
                raise UntranslatableError(f"{key} trains a model that scores answers: Tunesmith trains language models")
        if "rl" not in self.given:
            return
        name = str(self.read("rl"))
        if name not in self._keys.objectives:
            raise UntranslatableError(f"rl is {name}: {', '.join(self._keys.objectives)} can be imported")
        keys = self._keys.objectives[name].fields
        fields = {ours: self.read(theirs) for theirs, ours in keys.items() if theirs in self.given}
        self.put(f"objective.{name}", fields)

    def dataset(self) -> None:
        sources = self.read("datasets") or self.given.get("pretraining_dataset")
        if self.given.get("pretraining_dataset"):
            self.translated.add("pretraining_dataset")
            sources = [{"type": "completion"} | entry for entry in entries(sources)]
        if not sources:
            raise UntranslatableError("datasets is missing: name the rows to train on")
        objective = self._keys.objectives.get(str(self.given.get("rl")))
        form = objective.format if objective is not None else None
        rows = [
            Rows.of(entry, f"datasets[{number}]", self._folder, form) for number, entry in enumerate(entries(sources))
        ]
        held_out = [
            Rows.of(entry, f"test_datasets[{number}]", self._folder, form)
            for number, entry in enumerate(entries(self.read("test_datasets", default=[])))
        ]
        for source in (*rows, *held_out):
            self.omitted |= source.omitted
            self.changed |= source.changed
        self.put(
            "dataset.train",
            [
                place | ({"weight": source.weight} if source.weight is not None else {})
                for source in rows
                for place in source.places
            ],
        )
        formats = {source.format for source in (*rows, *held_out)}
        if len(formats) == 1 and (form := formats.pop()) is not None:
            self.put("dataset.format", form)
            if form == "Text" and "excess_length_strategy" not in self.given:
                self.put("dataset.overlong", "Chunk")  # as Axolotl splits rows of the types completion and pretrain
        columns = [source.columns for source in (*rows, *held_out)]
        if any(columns[0] != other for other in columns[1:]):
            places = [f"datasets[{number}]" for number in range(len(rows))]
            places += [f"test_datasets[{number}]" for number in range(len(held_out))]
            self.omit("datasets[].field_*", different_columns(dict(zip(places, columns, strict=True))))
        elif columns[0]:
            self.put("dataset.columns", columns[0])
        if held_out:
            self.read("val_set_size")
            self.put("dataset.validation", [place for source in held_out for place in source.places])
        else:
            self.held_out_share("val_set_size")
        self.default("sequence_len", "dataset.maxLength", self.read("sequence_len", _LENGTH))
        self._rows()

    def _rows(self) -> None:
        """Translate the options for reading rows."""
        plugins = self.given.get("plugins")
        if isinstance(plugins, list) and all(
            re.search("liger|cut_cross_entropy|lm_eval", str(name)) for name in plugins
        ):
            self.read("plugins")  # fused kernels, which Tunesmith chooses automatically, and evaluation
        if self.read("train_on_inputs", default=False):
            self.put("dataset.lossOn", "AllTokens")
        if self.given.get("roles_to_train") == ["assistant"]:
            self.read("roles_to_train")
        if self.given.get("chat_template") == "tokenizer_default":
            self.read("chat_template")
        template = self.given.get("chat_template_jinja")
        if isinstance(template, str) and "{%" in template:
            self.put("dataset.chatTemplate", self.read("chat_template_jinja"))
            if self.given.get("chat_template") == "jinja":
                self.read("chat_template")
        if not self.read("dataset_exact_deduplication", default=False):
            self.put("dataset.duplicates", "Keep")

    def reporting(self) -> None:
        """Translate trackers; their addresses and keys are in a Secret, and the run has the job's name."""
        trackers = []
        for tracker, keys in self._keys.trackers.items():
            enabled = self.read(keys.switch)
            given = [key for key in keys.keys if key in self.given]
            for key in given if enabled is not False else ():
                variable = keys.variables.get(key)
                self.changed[key] = (
                    f"put it into the Secret {REPORTING_SECRET} as {variable}"
                    if variable is not None
                    else "the run has the namespace and the name of the job, in all attempts"
                )
            self.translated.update(given)
            if enabled or (enabled is None and set(keys.implied_by) & set(given)):
                trackers.append(tracker.value)
        if trackers:
            self.put("output.reporting", trackers)

    def evaluation(self) -> None:
        """Translate Axolotl's plugin for lm-evaluation-harness."""
        tasks = self.given.get("lm_eval_tasks")
        if self.given.get("lm_eval_post_train") is False:
            return
        if isinstance(tasks, list) and tasks:
            self.put("evaluation.suites", [{"name": "lm-eval", "lmEval": {"tasks": self.read("lm_eval_tasks")}}])

    def hyperparameters(self) -> None:
        micro = int(self.number("micro_batch_size", _MICRO_BATCH))
        total = int(self.number("batch_size", 0))
        if total >= micro and "gradient_accumulation_steps" not in self.given:
            self.put("hyperparameters.batchSize", total // micro * micro)
        else:
            batch = micro * int(self.number("gradient_accumulation_steps", _ACCUMULATION))
            self.default("gradient_accumulation_steps", "hyperparameters.batchSize", batch)
        self.default("micro_batch_size", "hyperparameters.microBatchSize", micro)
        if "max_steps" not in self.given:
            self.default("num_epochs", "hyperparameters.epochs", self.read("num_epochs", _EPOCHS))
        self.published_step("early_stopping_patience")
        per_epoch = 0.0 if "eval_steps" in self.given else self.number("evals_per_epoch", 0)
        self.measurements(float(self.given.get("num_epochs", _EPOCHS)), per_epoch)
        self.interval("save_steps", "checkpoint")
        self.warmup()
        if "cosine_min_lr_ratio" in self.given and self.given.get("lr_scheduler", "cosine") == "cosine":
            ratio = self.number("cosine_min_lr_ratio", 0)
            if ratio < 1:
                self.put("hyperparameters.minLearningRateRatio", ratio)
            else:
                self.given.pop("lr_scheduler", None)
                self.put("hyperparameters.scheduler", "Constant")
                self.changed["cosine_min_lr_ratio"] = (
                    f"the rate never falls if it is {ratio:g}, so scheduler is Constant"
                )
        again = self.given.get("gradient_checkpointing")
        if isinstance(again, bool):
            self.put("hyperparameters.gradientCheckpointing", self.read("gradient_checkpointing"))
        if isinstance(self.given.get("torch_compile"), bool):
            self.put("hyperparameters.torchCompile", self.read("torch_compile"))
        bfloat16 = self.read("bf16", default=self.given.get("bfloat16", "auto"))
        half = self.read("fp16", default=self.given.get("float16", False))
        if not bfloat16:
            self.put("hyperparameters.precision", "float16" if half else "float32")
