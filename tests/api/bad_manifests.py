"""Texts that are not the manifest of a FineTuneJob, and the sentence with which every reader refuses them."""

from __future__ import annotations

MINIMAL = """\
apiVersion: tunesmith.dev/v1alpha1
kind: FineTuneJob
metadata: {name: tone}
spec:
  baseModel: {uri: s3://models/base}
  dataset: {train: [{uri: s3://data/train.jsonl}]}
  method: {lora: {}}
"""
_JSON = """\
{"apiVersion": "tunesmith.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "tone"},
 "spec": {"baseModel": {"uri": "s3://models/base"}, "dataset": {"train": [{"uri": "s3://data/train.jsonl"}]},
          "method": {"lora": {"rank": 4, "rank": 8}}}}
"""


def _with(old: str, new: str) -> str:
    assert old in MINIMAL
    return MINIMAL.replace(old, new)


def _hyperparameters(fields: str) -> str:
    return f"{MINIMAL}  hyperparameters: {{{fields}}}\n"


EMPTY = "the manifest is empty: write a FineTuneJob into it"
SCHEDULER = 'spec.hyperparameters.scheduler is "cosine": it must be Cosine or Linear or Constant; did you mean Cosine?'
NO_VALUE = "spec.method.lora has no value: give it one (an object with all defaults is {}) or remove the line"
NOT_YAML = "the manifest is not valid YAML"
_TOO_MANY = "it has more than 200000 values, counting those of each alias (*)"
_TEN_TIMES = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 10)]
"""Each line stands for ten times as many values as the one before it."""
_MERGED = [f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 10)}]}}" for level in range(1, 10)]

BAD_MANIFESTS: dict[str, tuple[str, str]] = {
    "empty": ("", EMPTY),
    "an empty document": ("---\n", EMPTY),
    "a comment": ("# nothing\n", EMPTY),
    "two documents": (f"{MINIMAL}---\n{MINIMAL}", "the manifest has 2 documents: keep one FineTuneJob"),
    "a text": ("just text", "the manifest is not a mapping: it begins with apiVersion and kind"),
    "not YAML": ("a: [", f"line 1: {NOT_YAML}"),
    "an unclosed bracket": (_with("{lora: {}}", "{lora: {}"), f"line 8: {NOT_YAML}"),
    "another kind": (_with("kind: FineTuneJob", "kind: Job"), 'kind is "Job": it must be FineTuneJob'),
    "no kind": (_with("kind: FineTuneJob\n", ""), "kind is missing: write kind: FineTuneJob"),
    "another version": (
        _with("v1alpha1", "v2"),
        'apiVersion is "tunesmith.dev/v2": it must be tunesmith.dev/v1alpha1',
    ),
    "no version": (
        _with("apiVersion: tunesmith.dev/v1alpha1\n", ""),
        "apiVersion is missing: write apiVersion: tunesmith.dev/v1alpha1",
    ),
    "no name": (_with("metadata: {name: tone}\n", ""), "metadata.name is missing: give the job a name"),
    "a long name": (_with("name: tone", f"name: {'n' * 41}"), "metadata.name must have at most 40 characters"),
    "no spec": (_with("spec:", "spce:"), "spec is missing: it must contain baseModel, dataset and method"),
    "a misspelt top-level field": (_with("spec:", "spce:"), "spce is not a known field; did you mean spec?"),
    "a misspelt field": (_with("uri: s3://models", "url: s3://models"), "spec.baseModel.url is not a known field; did"),
    "a field in snake case": (
        _with("  baseModel:", "  base_model:"),
        "spec.base_model is not a known field; did you mean baseModel?",
    ),
    "a hyperparameter in snake case": (
        _hyperparameters("batch_size: 4"),
        "spec.hyperparameters.batch_size is not a known field; did you mean batchSize?",
    ),
    "PEFT's r": (_with("{lora: {}}", "{lora: {r: 4}}"), "spec.method.lora.r is not a known field; did you mean rank?"),
    "PEFT's lora_alpha": (
        _with("{lora: {}}", "{lora: {lora_alpha: 4}}"),
        "spec.method.lora.lora_alpha is not a known field; did you mean alpha?",
    ),
    "PEFT's init_lora_weights": (
        _with("{lora: {}}", "{lora: {init_lora_weights: gaussian}}"),
        "spec.method.lora.init_lora_weights is not a known field; did you mean initialization?",
    ),
    "PEFT's num_virtual_tokens": (
        _with("{lora: {}}", "{promptTuning: {num_virtual_tokens: 8}}"),
        "spec.method.promptTuning.num_virtual_tokens is not a known field; did you mean virtualTokens?",
    ),
    "a value in lower case": (_hyperparameters("scheduler: cosine"), SCHEDULER),
    "a number in quotes": (
        _hyperparameters('learningRate: "2e-4"'),
        'spec.hyperparameters.learningRate is "2e-4": it must be a number',
    ),
    "a whole number in quotes": (
        _hyperparameters('batchSize: "4"'),
        'spec.hyperparameters.batchSize is "4": it must be a whole number',
    ),
    "a fraction": (
        _hyperparameters("batchSize: 4.5"),
        "spec.hyperparameters.batchSize is 4.5: it must be a whole number",
    ),
    "a boolean in quotes": (
        _with("{lora: {}}", '{lora: {dora: "yes"}}'),
        'spec.method.lora.dora is "yes": it must be true or false',
    ),
    "a number for a text": (
        _with("uri: s3://models/base", "uri: 5"),
        "spec.baseModel.uri is 5: it must be text; put it in quotes",
    ),
    "no value": (_with("{lora: {}}", "{lora: }"), NO_VALUE),
    "a text for an object": (_with("{lora: {}}", "lora"), 'spec.method is "lora": it must be an object with fields'),
    "a text for a list": (_with("[{uri: s3://data/train.jsonl}]", "s3://data/train.jsonl"), "it must be a list"),
    "a doubled key": (_with("{lora: {}}", "{lora: {}, lora: {rank: 8}}"), f"line 7: {NOT_YAML}: lora appears twice"),
    "aliases for a billion values": (
        "\n".join(["a0: &a0 [x]", *_TEN_TIMES]),
        "it has more than 200000 values, counting",
    ),
    "merged a billion times": ("\n".join(["a0: &a0 {x: y}", *_MERGED]), _TOO_MANY),
    "an alias of itself": ("a: &a [*a]", f"{NOT_YAML}: an alias (*) refers to a part that contains it"),
    "a doubled key of JSON": (_JSON, f"{NOT_YAML}: rank appears twice"),
}
"""Text and a part of the message by what is wrong."""
