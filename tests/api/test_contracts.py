from __future__ import annotations

import json
import random
import struct
from pathlib import Path  # noqa: TC003 - pytest reads the annotations of fixtures
from typing import Any

import pytest

from tunesmith.api.conditions import FailureReason
from tunesmith.api.finetunejob_status import (
    AlsoTrained,
    ArtifactStatus,
    DroppedRows,
    DropReason,
    EvaluationStatus,
    GateStatus,
    Preflight,
    Resolved,
    Score,
    ServableStatus,
    SuiteFailure,
)
from tunesmith.api.model import MAX_NAME
from tunesmith.contracts.agent import (
    accepts,
    control_keys,
    demand_tokens,
    events_keys,
    gateway_keys,
    keys_file,
    parse_keys,
    pod_tokens,
    serving_keys,
)
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint
from tunesmith.contracts.keyfile import KeyFile
from tunesmith.contracts.location import artifact_uri, engine_name, namespace_of_artifact, owned_name
from tunesmith.contracts.progress import PROGRESS_MAX_BYTES, parse_progress
from tunesmith.contracts.result import TERMINATION_MESSAGE_MAX_BYTES, ExitCode, ExportResult, Outcome, TrainerResult
from tunesmith.storage.schemes import normalised

STORE = "s3://tunesmith/store"
DIGEST = "sha256:" + "ab" * 32


def tensors(values: dict[str, bytes]) -> bytes:
    """A safetensors file with one-byte tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in values.items():
        header[name] = {"dtype": "I8", "shape": [len(value)], "data_offsets": [len(data), len(data) + len(value)]}
        data += value
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 4, "_name_or_path": "org/name"}))
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (folder / "model.safetensors").write_bytes(tensors({"a": bytes(300), "b": b"weights"}))
    return folder


def fingerprint(folder: Path) -> str:
    return base_fingerprint(LocalModelFolder(folder))


class TestBaseFingerprint:
    def test_names_and_places_do_not_count(self, model: Path) -> None:
        before = fingerprint(model)
        (model / "config.json").write_text(json.dumps({"_name_or_path": "/mirror", "dtype": "x", "hidden_size": 4}))
        (model / "README.md").write_text("another mirror")
        assert fingerprint(model) == before

    def test_sharding_does_not_count(self, model: Path) -> None:
        before = fingerprint(model)
        (model / "model.safetensors").unlink()
        (model / "model-00001-of-00002.safetensors").write_bytes(tensors({"b": b"weights"}))
        (model / "model-00002-of-00002.safetensors").write_bytes(tensors({"a": bytes(300)}))
        assert fingerprint(model) == before

    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("config.json", b'{"hidden_size": 8}'),
            ("tokenizer.json", b'{"model": {"vocab": {}}}'),
            ("tokenizer_config.json", b'{"chat_template": "{{ other }}"}'),
            ("model.safetensors", tensors({"a": bytes(300), "b": b"Weights"})),
            ("model.safetensors", tensors({"a": bytes(299), "b": b"weights"})),
            ("model.safetensors", tensors({"c": bytes(300), "b": b"weights"})),
        ],
    )
    def test_content_counts(self, model: Path, file: str, content: bytes) -> None:
        before = fingerprint(model)
        (model / file).write_bytes(content)
        assert fingerprint(model) != before

    def test_what_is_missing_is_named(self, model: Path) -> None:
        (model / "tokenizer.json").unlink()
        (model / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"has no tokenizer\.json, no \*\.safetensors"):
            fingerprint(model)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\xff" * 16,
            struct.pack("<Q", 4) + b"[1] ",
            struct.pack("<Q", 8) + b'{"a":{}}',
            struct.pack("<Q", 50) + b"{}",
            tensors({"a": bytes(300)})[:-200],
        ],
        ids=["empty", "no size", "no object", "no offsets", "cut header", "cut data"],
    )
    def test_damaged_weights_are_an_error_that_names_the_file(self, model: Path, content: bytes) -> None:
        (model / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"^model\.safetensors of the base model"):
            fingerprint(model)

    @pytest.mark.parametrize(("content", "said"), [("{", "is not JSON"), ("[]", "is not a JSON object")])
    def test_damaged_config_is_an_error(self, model: Path, content: str, said: str) -> None:
        (model / "config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"config\.json of the base model {said}"):
            fingerprint(model)


class TestLocation:
    def test_artifact_lies_under_the_namespace(self) -> None:
        uri = artifact_uri(STORE + "/", "team", "tone", "uid")
        assert uri == "s3://tunesmith/store/team/tone-uid/artifact"
        assert namespace_of_artifact(STORE, uri) == "team"

    @pytest.mark.parametrize(
        "uri",
        [
            "s3://tunesmith/storehouse/team/x",
            "s3://other/team/x",
            "s3://tunesmith/store/team/../other/x",
            "s3://tunesmith/store//x",
            "s3://tunesmith/store/team",
        ],
    )
    def test_what_lies_elsewhere_has_no_namespace(self, uri: str) -> None:
        assert namespace_of_artifact(STORE, uri) is None

    @pytest.mark.parametrize(
        "uri",
        [
            "s3://tunesmith/store/team",
            "S3://tunesmith/store/team/",
            "s3://tunesmith//store/./team//",
            "s3:///tunesmith/store///team",
        ],
    )
    def test_a_place_in_a_bucket_has_one_spelling_to_compare_with(self, uri: str) -> None:
        assert normalised(uri) == "s3://tunesmith/store/team"

    def test_engine_name_carries_the_digest(self) -> None:
        assert engine_name("team", "tone", DIGEST) == "team/tone@abababababab"

    @pytest.mark.parametrize("digest", ["", "ab" * 32, DIGEST.upper(), DIGEST + "\n", DIGEST[:-1]])
    def test_engine_name_of_no_digest_is_an_error(self, digest: str) -> None:
        with pytest.raises(ValueError, match="is not a digest of the form"):
            engine_name("team", "tone", digest)

    def test_owned_names_tell_two_uids_apart_and_leave_room_for_pods(self) -> None:
        assert owned_name("tone", "a", "1") != owned_name("tone", "b", "1")
        assert len(owned_name("n" * MAX_NAME, "uid", "validate") + "-12345") <= 63
        assert len(owned_name("n" * MAX_NAME, "uid", "pool") + "-1234567890") <= 63  # the ReplicaSet's hash


def crowded(chance: random.Random) -> TrainerResult:
    """Results with more than fits: long texts of several scripts, and characters that JSON writes as several."""

    def text(most: int) -> str:
        characters = chance.choice(["x", "é", "模型的数据", "🙂🚪", '"\\', "\n\t", "\x01", 'aé模🙂"\n'])
        return "".join(chance.choices(characters, k=chance.choice([0, 3, most // 3, most])))

    reason = FailureReason.DATASET_INVALID
    suites = [SuiteFailure(suite=f"s{number}", reason=reason, message=text(1024)) for number in range(8)]
    dropped = [DroppedRows(reason=one, rows=9, examples=[text(256)] * 3) for one in DropReason]
    names = [f"a-task-of-some-length-{number}/acc" for number in range(60)]
    evaluation = EvaluationStatus(
        loss=1.5,
        scores=[Score(suite="tasks", metric=name, base=0.5, adapter=0.5) for name in names],
        gates=[GateStatus(suite="tasks", metric=name, min=0.6, passed=False) for name in names[:16]],
        failures=chance.choice([None, suites]),
    )
    artifact = ArtifactStatus(
        uri=f"s3://tunesmith/{'f' * 900}", digest=DIGEST, size_bytes=9, servable=ServableStatus(vllm=False, reason="no")
    )
    return TrainerResult(
        outcome=chance.choice(list(Outcome)),
        reason=chance.choice([None, reason]),
        message=text(chance.choice([900, 4000, 20_000])),
        preflight=chance.choice([None, Preflight(rows=1, dropped=dropped, suggestion=text(1024))]),
        resolved=chance.choice([None, Resolved(target_modules=["m" * 128] * 64), Resolved(target_modules=["m"] * 9)]),
        artifact=chance.choice([None, artifact]),
        evaluation=chance.choice([None, evaluation]),
        metrics=dict.fromkeys(names, 0.5) if chance.random() < 0.5 else {},
        exports=chance.choice([None, [ExportResult(reason=reason, message=text(1024)) for _ in range(8)]]),
        resumed_from_step=chance.choice([None, 7]),
        lost_peer=chance.random() < 0.5,
    )


class TestResult:
    @pytest.mark.parametrize(
        ("result", "code"),
        [
            (TrainerResult(outcome=Outcome.SUCCEEDED), ExitCode.DONE),
            (TrainerResult(outcome=Outcome.FAILED, reason=FailureReason.DATASET_INVALID), ExitCode.USER_FAULT),
            (TrainerResult(outcome=Outcome.FAILED, retryable=True), ExitCode.RETRYABLE),
            (TrainerResult(outcome=Outcome.PREEMPTED, retryable=True), ExitCode.PREEMPTED),
        ],
    )
    def test_exit_codes(self, result: TrainerResult, code: ExitCode) -> None:
        assert result.exit_code == code

    @pytest.mark.parametrize("message", ["x" * 10_000, "é\n" * 5_000, "🙂" * 3_000, "short"])
    def test_termination_message_fits_and_keeps_the_facts(self, message: str) -> None:
        result = TrainerResult(
            outcome=Outcome.FAILED,
            reason=FailureReason.OUT_OF_MEMORY,
            message=message,
            retryable=True,
            preflight=Preflight(rows=10, tokens=1000),
            metrics={"evaluationLoss": 1.5},
        )
        text = result.termination_message()
        assert len(text.encode()) <= TERMINATION_MESSAGE_MAX_BYTES
        read = TrainerResult.model_validate_json(text)
        assert (read.reason, read.retryable, read.preflight) == (result.reason, True, result.preflight)
        assert message.startswith(read.message.rstrip("…"))

    def test_termination_message_keeps_what_was_resolved_rather_than_examples(self) -> None:
        dropped = [DroppedRows(reason=reason, rows=9, examples=["é" * 160] * 3) for reason in DropReason]
        trained = [AlsoTrained(rows=3, scored_rows=9, examples=["é" * 160] * 3)]
        resolved = Resolved(target_modules=["down_proj"] * 20)
        result = TrainerResult(
            outcome=Outcome.SUCCEEDED,
            message="done",
            preflight=Preflight(rows=10, dropped=dropped, also_trained=trained),
            resolved=resolved,
        )
        text = result.termination_message()
        assert len(text.encode()) <= TERMINATION_MESSAGE_MAX_BYTES
        read = TrainerResult.model_validate_json(text)
        assert (read.message, read.resolved) == ("done", resolved)
        assert read.preflight is not None
        assert [one.rows for one in read.preflight.dropped or []] == [9] * len(DropReason)
        assert read.preflight.also_trained == [AlsoTrained(rows=3, scored_rows=9)]

    def test_termination_message_keeps_what_became_of_each_export(self) -> None:
        exports = [ExportResult(reason=FailureReason.ACCESS_DENIED, message="é" * 900), *[ExportResult()] * 7]
        result = TrainerResult(outcome=Outcome.SUCCEEDED, message="m" * 4000, exports=exports)
        text = result.termination_message()
        assert len(text.encode()) <= TERMINATION_MESSAGE_MAX_BYTES
        read = TrainerResult.model_validate_json(text).exports
        assert read is not None
        assert [one.reason for one in read] == [one.reason for one in exports]
        assert read[0].message == "é" * 100

    def test_termination_message_keeps_the_gates_rather_than_the_scores(self) -> None:
        names = [f"a-task-of-some-length-{number}/acc" for number in range(60)]
        gates = [GateStatus(suite="tasks", metric=names[0], value=0.5, min=0.6, passed=False)]
        result = TrainerResult(
            outcome=Outcome.FAILED,
            message="gate tasks: below",
            metrics={"evaluationLoss": 1.5} | {f"tasks/{name}": 0.5 for name in names},
            evaluation=EvaluationStatus(
                loss=1.5,
                scores=[Score(suite="tasks", metric=name, base=0.5, adapter=0.5) for name in names],
                gates=gates,
            ),
        )
        read = TrainerResult.model_validate_json(result.termination_message())
        assert (read.message, read.metrics) == (result.message, {"evaluationLoss": 1.5})
        assert read.evaluation is not None
        assert (read.evaluation.gates, read.evaluation.scores) == (gates, None)

    def test_termination_message_keeps_which_suites_have_no_scores_and_the_gates(self) -> None:
        reason = FailureReason.INVALID_SPEC
        failures = [SuiteFailure(suite=f"s{number}", reason=reason, message="é" * 900) for number in range(8)]
        gates = [GateStatus(suite="s0", metric="a-task/acc", min=0.6, passed=False)]
        evaluation = EvaluationStatus(loss=1.5, gates=gates, failures=failures)
        result = TrainerResult(outcome=Outcome.FAILED, message="gate s0: no scores", evaluation=evaluation)
        text = result.termination_message()
        assert len(text.encode()) <= TERMINATION_MESSAGE_MAX_BYTES
        read = TrainerResult.model_validate_json(text)
        assert read.evaluation is not None
        assert (read.message, read.evaluation.gates) == (result.message, gates)
        assert [one.message for one in read.evaluation.failures or []] == ["é" * 100] * 8

    def test_termination_message_fits_whatever_was_resolved(self) -> None:
        resolved = Resolved(target_modules=["m" * 128] * 64)
        result = TrainerResult(outcome=Outcome.FAILED, message="too little memory", resolved=resolved)
        assert len(result.termination_message().encode()) <= TERMINATION_MESSAGE_MAX_BYTES

    @pytest.mark.parametrize("seed", range(60))
    def test_termination_message_fits_whatever_is_in_it(self, seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311 - a case
        result = crowded(chance)
        text = result.termination_message()
        assert len(text.encode()) <= TERMINATION_MESSAGE_MAX_BYTES
        read = TrainerResult.model_validate_json(text)
        facts = ("outcome", "reason", "retryable", "lost_peer", "resumed_from_step", "artifact")
        assert [getattr(read, name) for name in facts] == [getattr(result, name) for name in facts]
        whole = read.message == result.message
        assert whole or (read.message.endswith("…") and result.message.startswith(read.message[:-1]))
        assert whole or len(json.dumps(read.message, ensure_ascii=False).encode()) > 1000
        if read.evaluation is not None and result.evaluation is not None:
            assert len(read.evaluation.failures or []) == len(result.evaluation.failures or [])
        if read.exports is not None:
            assert [one.reason for one in read.exports] == [one.reason for one in result.exports or []]

    def test_a_message_is_worth_more_than_those_of_suites_and_exports_and_what_was_resolved(self) -> None:
        reason = FailureReason.ACCESS_DENIED
        told = "模型" * 150  # 900 bytes
        result = TrainerResult(
            outcome=Outcome.SUCCEEDED,
            message=told,
            preflight=Preflight(rows=10),
            resolved=Resolved(target_modules=[f"module_{number}" for number in range(64)]),
            evaluation=EvaluationStatus(
                failures=[SuiteFailure(suite=f"s{number}", reason=reason, message="評" * 1024) for number in range(8)]
            ),
            exports=[ExportResult(reason=reason, message="複" * 1024)] * 8,
        )
        read = TrainerResult.model_validate_json(result.termination_message())
        assert (read.message, read.preflight, read.resolved) == (told, result.preflight, result.resolved)
        assert read.evaluation is not None
        assert [one.message for one in (*(read.evaluation.failures or []), *(read.exports or []))] == [""] * 16

    def test_a_cut_message_uses_all_the_space(self) -> None:
        text = TrainerResult(outcome=Outcome.FAILED, message="é" * 5000).termination_message()
        assert TERMINATION_MESSAGE_MAX_BYTES - 1 <= len(text.encode()) <= TERMINATION_MESSAGE_MAX_BYTES


class TestProgress:
    def test_progress_is_read(self) -> None:
        assert parse_progress(b'{"stage": "Training", "step": 3, "loss": 1.23456}').loss == 1.2346

    @pytest.mark.parametrize(
        "body", [b"", b"<html>", b"[]", b'{"step": -1}', b'{"stage": "Sleeping"}', b" " * (PROGRESS_MAX_BYTES + 1)]
    )
    def test_what_is_no_progress_is_an_error(self, body: bytes) -> None:
        with pytest.raises(ValueError, match=r"progress|validation error|is not JSON"):
            parse_progress(body)


def test_keys_differ_by_installation_pool_namespace_purpose_and_pod() -> None:
    first, second = (b"first installation key",), (b"second installation key",)
    pools = [("team", "uid"), ("team", "uid2"), ("other", "uid")]
    keys = [gateway_keys(first), gateway_keys(second)]
    for installation in (first, second):
        keys += [control_keys(installation, *pool) for pool in pools]
        keys += [derive(gateway_keys(installation), *pool) for pool in pools for derive in (serving_keys, events_keys)]
    tokens = [pod_tokens(pool, pod) for pool in keys for pod in ("pod-1", "pod-2")]
    tokens += [demand_tokens(gateway_keys(first)), demand_tokens(gateway_keys(second))]
    assert len({*keys, *tokens}) == len(keys) + len(tokens)
    assert control_keys(first, "team", "uid") == control_keys(first, "team", "uid")


def test_control_keys_cannot_be_derived_from_what_a_gateway_holds() -> None:
    installation = (b"an installation key",)
    gateway = gateway_keys(installation)
    assert control_keys(gateway, "team", "uid") != control_keys(installation, "team", "uid")


def test_during_a_rotation_all_is_derived_from_both_keys() -> None:
    old, new = b"the previous installation key", b"the current installation key"
    both = pod_tokens(serving_keys(gateway_keys((new, old)), "team", "uid"), "pod")
    assert both == tuple(pod_tokens(serving_keys(gateway_keys((key,)), "team", "uid"), "pod")[0] for key in (new, old))
    for token in both:
        assert accepts(f"Bearer {token}", both)
        assert not accepts(f"Basic {token}", both)
        assert not accepts(token, both)
    assert not accepts("Bearer ", both)
    assert not accepts("Bearer \udcff", both)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"short", b"\n".join([b"a key that is long enough"] * 3)])
def test_a_file_without_usable_keys_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="key"):
        parse_keys(content)


def test_a_key_file_follows_its_content_and_survives_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("tunesmith.contracts.keyfile.time.monotonic", lambda: clock[0])
    old, new = b"the previous key of a file", b"the current key of a file"
    path = tmp_path / "key"
    path.write_bytes(keys_file((old,)))
    keys = KeyFile(path)
    assert keys() == (old,)
    path.write_bytes(keys_file((new, old)))
    clock[0] += 2
    assert keys() == (new, old)
    for damage in (lambda: path.write_bytes(b"x"), path.unlink):
        damage()
        clock[0] += 2
        assert keys() == (new, old)
    path.write_bytes(keys_file((new,)))
    clock[0] += 2
    assert keys() == (new,)
