from __future__ import annotations

import json
import struct
from pathlib import Path  # noqa: TC003 - pytest reads the annotations of fixtures
from typing import Any

import pytest
from pydantic_core import to_json

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
from tunesmith.contracts.result import (
    RESERVED_MESSAGE_BYTES,
    TERMINATION_MESSAGE_MAX_BYTES,
    Culpability,
    ExitCode,
    ExportResult,
    Outcome,
    TrainerResult,
    culpability,
)
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
    def test_names_and_paths_do_not_count(self, model: Path) -> None:
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

    def test_missing_files_are_named(self, model: Path) -> None:
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
            tensors({"a": bytes(300)})
            .replace(b"[300], ", b"[9999999999999999], ")
            .replace(b"0, 300", b"0, 9999999999999999"),
            tensors({f"t{number}": b"" for number in range(300_000)}),
        ],
        ids=["empty", "invalid size", "not an object", "no offsets", "cut header", "cut data", "large", "many tensors"],
    )
    def test_damaged_weights_are_an_error_that_names_the_file(self, model: Path, content: bytes) -> None:
        (model / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"^model\.safetensors of the base model"):
            fingerprint(model)

    @pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[]", "is not a JSON object")])
    def test_damaged_config_is_an_error(self, model: Path, content: str, message: str) -> None:
        (model / "config.json").write_text(content)
        with pytest.raises(ValueError, match=rf"config\.json of the base model {message}"):
            fingerprint(model)


class TestLocation:
    def test_an_artifact_is_in_its_namespaces_folder(self) -> None:
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
    def test_uris_outside_the_store_have_no_namespace(self, uri: str) -> None:
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
    def test_spellings_of_a_uri_are_normalised(self, uri: str) -> None:
        assert normalised(uri) == "s3://tunesmith/store/team"

    def test_engine_name_contains_the_digest(self) -> None:
        assert engine_name("team", "tone", DIGEST) == "team/tone@abababababab"

    @pytest.mark.parametrize("digest", ["", "ab" * 32, DIGEST.upper(), DIGEST + "\n", DIGEST[:-1]])
    def test_engine_name_of_an_invalid_digest_is_an_error(self, digest: str) -> None:
        with pytest.raises(ValueError, match="is not a digest of the form"):
            engine_name("team", "tone", digest)

    def test_owned_names_differ_by_uid_and_leave_room_for_pods(self) -> None:
        assert owned_name("tone", "a", "1") != owned_name("tone", "b", "1")
        assert len(owned_name("n" * MAX_NAME, "uid", "validate") + "-12345") <= 63
        assert len(owned_name("n" * MAX_NAME, "uid", "pool") + "-1234567890") <= 63  # the ReplicaSet's hash


WRITING = {
    "ascii": "x",
    "accents": "é",
    "chinese": "模型的数据",
    "emoji": "🙂🚪",
    "escaped": '"\\\n\t',
    "control": "\x01",
}
REASON = FailureReason.DATASET_INVALID


def words(writing: str, length: int) -> str:
    characters = WRITING[writing]
    return (characters * (length // len(characters) + 1))[:length]


def crowded(
    writing: str = "ascii", message: int = 300, exports: int = 0, suites: int = 0, scores: int = 0, examples: int = 0
) -> TrainerResult:
    """A result with all fields; `message` is the length of its messages, and the other numbers are counts."""
    text = words(writing, message)
    names = [f"a-task-of-some-length-{number}/acc" for number in range(scores)]
    rows = [words(writing, 256)] * examples or None
    return TrainerResult(
        outcome=Outcome.FAILED,
        reason=REASON,
        message=text,
        retryable=True,
        preflight=Preflight(
            rows=1,
            dropped=[DroppedRows(reason=reason, rows=9, examples=rows) for reason in DropReason],
            also_trained=[AlsoTrained(suite=f"s{number}", rows=1, scored_rows=2, examples=rows) for number in range(9)],
            servable=ServableStatus(vllm=False, reason=text[:1024]),
            suggestion=text[:1024],
        ),
        resolved=Resolved(learning_rate=1e-4, target_modules=["down_proj"] * 64),
        artifact=ArtifactStatus(
            uri=f"s3://tunesmith/{'f' * 1000}",
            digest=DIGEST,
            size_bytes=9,
            servable=ServableStatus(vllm=False, reason=text[:1024]),
        ),
        evaluation=EvaluationStatus(
            loss=1.5,
            scores=[Score(suite="tasks", metric=name, base=0.5, adapter=0.5) for name in names] or None,
            gates=[GateStatus(suite="tasks", metric=name, min=0.6, passed=False) for name in names[:16]] or None,
            failures=[SuiteFailure(suite=f"s{number}", reason=REASON, message=text[:1024]) for number in range(suites)]
            or None,
        ),
        metrics={"evaluationLoss": 1.5} | {f"tasks/{name}": 0.5 for name in names},
        exports=[ExportResult(reason=REASON, message=text) for _ in range(exports)] or None,
        resumed_from_step=7,
        lost_peer=True,
    )


def read(result: TrainerResult) -> TrainerResult:
    """The result as the operator reads it from the termination message."""
    text = result.termination_message()
    assert len(text.encode()) <= TERMINATION_MESSAGE_MAX_BYTES
    return TrainerResult.model_validate_json(text)


def levels(result: TrainerResult) -> dict[str, bool]:
    """Fields that a result has, from the highest priority to the lowest."""
    preflight, evaluation = result.preflight, result.evaluation
    rows = [*(preflight.dropped or []), *(preflight.also_trained or [])] if preflight is not None else []
    return {
        "artifact": result.artifact is not None,
        "exports": result.exports is not None,
        "preflight": preflight is not None,
        "resolved": result.resolved is not None,
        "evaluation": evaluation is not None,
        "gates": evaluation is not None and evaluation.gates is not None,
        "failures": evaluation is not None and evaluation.failures is not None,
        "metrics": "evaluationLoss" in result.metrics,
        "scores": evaluation is not None and evaluation.scores is not None,
        "metrics of suites": any("/" in name for name in result.metrics),
        "examples": any(row.examples for row in rows),
    }


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

    @pytest.mark.parametrize("writing", WRITING)
    @pytest.mark.parametrize("message", [0, 90, 1024, 20_000])
    @pytest.mark.parametrize(
        ("exports", "suites", "scores", "examples"),
        [(0, 0, 0, 0), (8, 0, 0, 0), (0, 8, 0, 0), (0, 0, 128, 0), (0, 0, 0, 3), (1, 1, 4, 1), (8, 8, 128, 3)],
    )
    def test_termination_message_fits_and_omits_the_lowest_fields(
        self, writing: str, message: int, exports: int, suites: int, scores: int, examples: int
    ) -> None:
        result = crowded(writing, message, exports, suites, scores, examples)
        kept = read(result)
        always = ("outcome", "reason", "retryable", "lost_peer", "resumed_from_step")
        assert [getattr(kept, name) for name in always] == [getattr(result, name) for name in always]
        assert kept.artifact is not None
        assert (kept.artifact.uri, kept.artifact.digest) == (result.artifact.uri, DIGEST)  # type: ignore[union-attr]
        whole = kept.message == result.message
        assert whole or (kept.message.endswith("…") and result.message.startswith(kept.message[:-1]))
        assert whole or len(to_json(kept.message)) > RESERVED_MESSAGE_BYTES - 10
        present = levels(kept)
        expected = [present[name] for name, filled in levels(result).items() if filled]
        assert expected == sorted(expected, reverse=True)

    def test_a_short_result_is_complete(self) -> None:
        result = TrainerResult(
            outcome=Outcome.SUCCEEDED,
            message="done",
            preflight=Preflight(rows=10, dropped=[DroppedRows(reason=DropReason.EMPTY, rows=1, examples=["a:1"])]),
            resolved=Resolved(target_modules=["down_proj"]),
            evaluation=EvaluationStatus(
                loss=1.5,
                scores=[Score(suite="tasks", metric="acc", base=0.5, adapter=0.6)],
                gates=[GateStatus(suite="tasks", metric="acc", value=0.6, min=0.5, passed=True)],
                failures=[SuiteFailure(suite="other", reason=REASON, message="no rows")],
            ),
            metrics={"evaluationLoss": 1.5, "tasks/acc": 0.6},
            exports=[ExportResult(), ExportResult(reason=FailureReason.ACCESS_DENIED, message="no right to write")],
            artifact=ArtifactStatus(uri="s3://a/b", digest=DIGEST, size_bytes=9, servable=ServableStatus(vllm=True)),
        )
        assert read(result) == result

    def test_examples_are_omitted_before_the_counts_of_rows(self) -> None:
        dropped = [DroppedRows(reason=reason, rows=9, examples=["é" * 160] * 3) for reason in DropReason]
        trained = [AlsoTrained(rows=3, scored_rows=9, examples=["é" * 160] * 3)]
        resolved = Resolved(target_modules=["down_proj"] * 20)
        preflight = Preflight(rows=10, dropped=dropped, also_trained=trained)
        result = TrainerResult(outcome=Outcome.SUCCEEDED, message="done", preflight=preflight, resolved=resolved)
        kept = read(result)
        assert (kept.message, kept.resolved) == ("done", resolved)
        assert kept.preflight == Preflight(
            rows=10,
            dropped=[DroppedRows(reason=reason, rows=9) for reason in DropReason],
            also_trained=[AlsoTrained(rows=3, scored_rows=9)],
        )

    def test_scores_are_omitted_before_gates_and_the_message(self) -> None:
        names = [f"a-task-of-some-length-{number}/acc" for number in range(60)]
        gates = [GateStatus(suite="tasks", metric=names[0], value=0.5, min=0.6, passed=False)]
        scores = [Score(suite="tasks", metric=name, base=0.5, adapter=0.5) for name in names]
        result = TrainerResult(
            outcome=Outcome.FAILED,
            message="m" * 3000,
            metrics={"evaluationLoss": 1.5} | {f"tasks/{name}": 0.5 for name in names},
            evaluation=EvaluationStatus(loss=1.5, scores=scores, gates=gates),
        )
        kept = read(result)
        assert (kept.message, kept.metrics) == (result.message, {"evaluationLoss": 1.5})
        assert kept.evaluation == EvaluationStatus(loss=1.5, gates=gates)

    def test_long_messages_of_exports_and_suites_are_cut(self) -> None:
        failures = [SuiteFailure(suite=f"s{number}", reason=REASON, message="é" * 900) for number in range(8)]
        exports = [ExportResult(reason=REASON, message="é" * 900)] * 8
        result = TrainerResult(
            outcome=Outcome.FAILED, message="short", evaluation=EvaluationStatus(failures=failures), exports=exports
        )
        kept = read(result)
        cut = "é" * 48 + "…"
        assert kept.exports == [ExportResult(reason=REASON, message=cut)] * 8
        assert kept.evaluation is not None
        assert kept.evaluation.failures == [failure.model_copy(update={"message": cut}) for failure in failures]

    def test_a_base_model_with_many_modules_keeps_the_other_resolved_values(self) -> None:
        resolved = Resolved(learning_rate=1e-4, target_modules=["m" * 128] * 64)
        kept = read(TrainerResult(outcome=Outcome.FAILED, message="too little memory", resolved=resolved))
        assert kept.resolved == Resolved(learning_rate=1e-4)

    def test_a_cut_message_uses_all_the_space(self) -> None:
        text = TrainerResult(outcome=Outcome.FAILED, message="é" * 5000).termination_message()
        assert TERMINATION_MESSAGE_MAX_BYTES - 1 <= len(text.encode()) <= TERMINATION_MESSAGE_MAX_BYTES

    @pytest.mark.parametrize(
        ("result", "expected"),
        [
            (TrainerResult(outcome=Outcome.FAILED), Culpability.ROOT_CAUSE),
            (TrainerResult(outcome=Outcome.FAILED, retryable=True), Culpability.RETRYABLE),
            (TrainerResult(outcome=Outcome.PREEMPTED, retryable=True), Culpability.SILENT),
            (None, Culpability.SILENT),
            (TrainerResult(outcome=Outcome.FAILED, lost_peer=True), Culpability.PEER_LOST),
        ],
    )
    def test_culpability(self, result: TrainerResult | None, expected: Culpability) -> None:
        assert culpability(result) is expected


class TestProgress:
    def test_progress_is_parsed(self) -> None:
        assert parse_progress(b'{"stage": "Training", "step": 3, "loss": 1.23456}').loss == 1.2346

    @pytest.mark.parametrize(
        "body", [b"", b"<html>", b"[]", b'{"step": -1}', b'{"stage": "Sleeping"}', b" " * (PROGRESS_MAX_BYTES + 1)]
    )
    def test_invalid_progress_is_an_error(self, body: bytes) -> None:
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


def test_control_keys_cannot_be_derived_from_gateway_keys() -> None:
    installation = (b"an installation key",)
    gateway = gateway_keys(installation)
    assert control_keys(gateway, "team", "uid") != control_keys(installation, "team", "uid")


def test_during_a_rotation_tokens_are_derived_from_both_keys() -> None:
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
