from __future__ import annotations

import json

import pytest

from tests.api.bad_manifests import BAD_MANIFESTS, MINIMAL
from tests.controlplane.manifests import LOCAL_ONLY, REFUSED_JOBS, job
from tunesmith.api.manifest import ManifestError, parse_manifest


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


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_mistakes_are_reported_with_their_fix(case: str) -> None:
    text, sentence = BAD_MANIFESTS[case]
    assert sentence in "\n".join(problems(text))


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


def test_json_is_not_read_as_yaml() -> None:
    # In YAML a pair of surrogates is two invalid characters, and a tab is not white space.
    document = parse_manifest(MINIMAL).manifest()
    document["spec"]["dataset"]["columns"] = {"prompt": "😀"}
    assert parse_manifest(json.dumps(document, indent="\t")).spec.dataset.columns.prompt == "😀"


def test_values_are_read_as_the_api_server_reads_them() -> None:
    fields = "{batchSize: 8.0, learningRate: .5e-3, epochs: 0x2}"
    config = "{type: VERA, config: {projection_prng_key: 7.0, at: 1:30, on: 2026-01-02, none: }}"
    spec = parse_manifest(MINIMAL.replace("{lora: {}}", f"{{peft: {config}}}") + f"  hyperparameters: {fields}\n").spec
    assert (spec.hyperparameters.batch_size, spec.hyperparameters.learning_rate) == (8, 0.0005)
    assert spec.hyperparameters.epochs == 2
    assert json.dumps(spec.method.peft.config) == (
        '{"projection_prng_key": 7, "at": "1:30", "true": "2026-01-02", "none": null}'
    )
