from __future__ import annotations

import json

import pytest

from tests.controlplane.manifests import LOCAL_ONLY, REFUSED_JOBS, job
from tunesmith.api.manifest import ManifestError, parse_manifest

MINIMAL = """\
apiVersion: tunesmith.dev/v1alpha1
kind: FineTuneJob
metadata: {name: tone}
spec:
  baseModel: {uri: s3://models/base}
  dataset: {train: [{uri: s3://data/train.jsonl}]}
  method: {lora: {}}
"""


def problems(text: str, *, allow_file: bool = True) -> tuple[str, ...]:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(text, allow_file=allow_file)
    return caught.value.problems


@pytest.mark.parametrize("case", REFUSED_JOBS)
def test_manifests_that_the_api_server_refuses_are_refused(case: str) -> None:
    changes, _, sentence = REFUSED_JOBS[case]
    (problem,) = problems(json.dumps(job("team", **changes)), allow_file=False)
    assert sentence in problem


def test_all_mistakes_are_reported_at_once() -> None:
    text = MINIMAL.replace("method: {lora: {}}", "method: {lora: {rank: 0, alpha: 0}}\n  maxAttempts: 99")
    assert problems(text) == (
        "spec.method.lora.rank is 0: it must be at least 1",
        "spec.method.lora.alpha is 0: it must be at least 1",
        "spec.maxAttempts is 99: it must be at most 10",
    )


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("kind: FineTuneJob", "kind: Job", 'kind is "Job": it must be FineTuneJob'),
        ("kind: FineTuneJob\n", "", "kind is missing: write kind: FineTuneJob"),
        ("v1alpha1", "v2", 'apiVersion is "tunesmith.dev/v2": it must be tunesmith.dev/v1alpha1'),
        ("metadata: {name: tone}\n", "", "metadata.name is missing: give the job a name"),
        ("spec:", "spce:", "spce is not a known field; did you mean spec?"),
        (
            "uri: s3://models/base",
            "url: s3://models/base",
            "spec.baseModel.url is not a known field; did you mean uri?",
        ),
        ("  baseModel:", "  base_model:", "spec.base_model is not a known field; did you mean baseModel?"),
        (
            "method: {lora: {}}",
            "method: {lora: {}}\n  hyperparameters: {scheduler: cosine}",
            'spec.hyperparameters.scheduler is "cosine": it must be Cosine or Linear or Constant; did you mean Cosine?',
        ),
        (
            "{lora: {}}",
            "{lora: }",
            "spec.method.lora has no value: give it one (an object with all defaults is {}) or remove the line",
        ),
        ("{lora: {}}", "lora", 'spec.method is "lora": it must be an object with fields'),
        ("[{uri: s3://data/train.jsonl}]", "s3://data/train.jsonl", "it must be a list"),
        ("name: tone", f"name: {'n' * 41}", "metadata.name must have at most 40 characters"),
        ("{lora: {}}", "{lora: {}, lora: {rank: 8}}", "line 7: the manifest is not valid YAML: lora appears twice"),
        ("{lora: {}}", "{lora: {}", "line 8: the manifest is not valid YAML"),
        ("kind: FineTuneJob", "kind: FineTuneJob\n---\nkind: FineTuneJob", "the manifest has 2 documents"),
    ],
)
def test_mistakes_are_reported_with_their_fix(old: str, new: str, sentence: str) -> None:
    assert old in MINIMAL
    assert sentence in "\n".join(problems(MINIMAL.replace(old, new)))


@pytest.mark.parametrize("text", ["", "---\n", "# nothing\n"])
def test_empty_manifest(text: str) -> None:
    assert problems(text) == ("the manifest is empty: write a FineTuneJob into it",)


@pytest.mark.parametrize(
    "text", ["just text", "[1, 2]", "\x00", "a: &a [*a]", "? [1]\n: 2", "{1: 2}", "a: !!python/none"]
)
def test_invalid_manifests_are_refused(text: str) -> None:
    assert problems(text)


def test_numbers_are_parsed_as_by_kubernetes() -> None:
    text = MINIMAL + "  hyperparameters: {learningRate: 2e-4}\n  resources: {cpu: 2}\n"
    spec = parse_manifest(text).spec
    assert spec.hyperparameters.learning_rate == 0.0002
    assert spec.resources.cpu == "2"


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_numbers_that_are_not_finite_are_refused(value: str) -> None:
    assert "learningRate" in problems(MINIMAL + f"  hyperparameters: {{learningRate: {value}}}\n")[0]


def test_dates_in_metadata_are_strings() -> None:
    text = MINIMAL.replace("{name: tone}", "{name: tone, annotations: {made: 2026-01-02}}")
    assert parse_manifest(text).metadata.annotations == {"made": "2026-01-02"}


def test_file_uris_are_for_local_runs() -> None:
    text = MINIMAL.replace("s3://models/base", "file:///models/base")
    assert parse_manifest(text).spec.base_model.uri == "file:///models/base"
    assert LOCAL_ONLY in problems(text, allow_file=False)[0]


def test_manifest_round_trip() -> None:
    parsed = parse_manifest(MINIMAL)
    assert parse_manifest(json.dumps(parsed.manifest())) == parsed
