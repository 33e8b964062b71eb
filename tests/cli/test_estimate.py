"""`tunesmith estimate` with a fake trainer; tests/trainer/test_preflight.py has the real one."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Self

import pytest

from tests.api.bad_manifests import MINIMAL
from tests.controlplane.manifests import job
from tunesmith.cli.main import main
from tunesmith.cluster.errors import ForbiddenError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    Estimate = Callable[..., tuple[int, str, str, list[str]]]

PREFLIGHT: dict[str, Any] = {
    "rows": 90,
    "validationRows": 10,
    "droppedRows": 2,
    "dropped": [{"reason": "Overlong", "rows": 2, "examples": ["train.jsonl line 3: has 900 tokens"]}],
    "tokens": 4000,
    "targetTokens": 1500,
    "packedSequences": 12,
    "sharedTokens": 900,
    "servable": {"vllm": False, "reason": "DoRA is served merged only"},
    "trainableParameters": 1000,
    "estimatedPeakBytes": 6 * 2**30,
    "peakParts": {f"{part}Bytes": 2**30 for part in ("weights", "trainable", "activations", "logits", "overhead")},
    "gpuMemoryBytes": 4 * 2**30,
    "verdict": "WillNotFit",
    "suggestion": "it fits with method.qlora instead of lora (about 3.0 GiB)",
}
RESOLVED = {"totalSteps": 30, "batchSize": 8, "microBatchSize": 2, "gradientCheckpointing": True}
SUCCEEDED = {"outcome": "Succeeded", "preflight": PREFLIGHT | {"verdict": "Fits"}, "resolved": RESOLVED}
REFUSED = {"outcome": "Failed", "reason": "WillNotFit", "message": "too large", "preflight": PREFLIGHT}
MALFORMED = {"outcome": "Failed", "reason": "DatasetInvalid", "message": "line 3 is not JSON"}


@pytest.fixture
def estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Estimate:
    """Run the command with a trainer that records its arguments and writes the given report."""
    trainer, recorded, manifest = tmp_path / "trainer", tmp_path / "arguments", tmp_path / "job.yaml"
    trainer.write_text(f"""#!/bin/sh
printf '%s\\n' "$@" > {recorded}
while [ "$1" != --termination-message ]; do shift; done
[ -z "$REPORT" ] || printf '%s' "$REPORT" > "$2"
""")
    trainer.chmod(0o755)
    manifest.write_text(MINIMAL)
    monkeypatch.setenv("TUNESMITH_TRAINER", str(trainer))
    monkeypatch.setenv("KUBECONFIG", "/nowhere")

    def run(report: object, *arguments: str) -> tuple[int, str, str, list[str]]:
        monkeypatch.setenv("REPORT", json.dumps(report) if report is not None else "")
        monkeypatch.setattr(sys, "argv", ["tunesmith", "estimate", "-f", str(manifest), *arguments])
        with pytest.raises(SystemExit) as exited:
            main()
        printed = capsys.readouterr()
        code = exited.value.code
        return int(code or 0), printed.out, printed.err, recorded.read_text().split("\n") if recorded.exists() else []

    return run


def test_the_estimate_as_text(estimate: Estimate) -> None:
    code, out, err, arguments = estimate(SUCCEEDED, "--gpu-memory", "80GiB")
    assert (code, err) == (0, "")
    assert arguments[arguments.index("--gpu-memory-bytes") + 1] == str(80 * 2**30)
    assert arguments[0] == "validate"
    for line in (
        "rows          90 to train on, 10 held out, 2 dropped",
        "  Overlong    2, such as train.jsonl line 3: has 900 tokens",
        "tokens        4000, 1500 of them learned, 900 computed with another row, in 12 packed sequences",
        "servable      no: DoRA is served merged only",
        "steps         30 of 8 sequences",
        "micro-batch   2 sequences, gradient checkpointing on",
        "peak          6.0 GiB of GPU memory, within about 15 %",
        "  logits      1.0 GiB",
        "verdict       Fits",
        "GPU time      unknown: the jobs of the cluster cannot be read: there is no kubeconfig at /nowhere",
    ):
        assert line in out


def test_the_estimate_as_json(estimate: Estimate) -> None:
    code, out, _, arguments = estimate(SUCCEEDED, "-o", "json")
    assert code == 0
    assert json.loads(out)["preflight"] == PREFLIGHT | {"verdict": "Fits"}
    assert json.loads(out)["gpuTime"]["gpuSeconds"] is None
    assert "--gpu-memory-bytes" not in arguments


class Jobs:
    """A cluster with one finished job, whose node may not be read."""

    namespace = "team"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def pages(self, kind: str, namespace: str) -> AsyncIterator[tuple[list[dict[str, Any]], str]]:
        assert (kind, namespace) == ("FineTuneJob", "team")
        status = {
            "phase": "Complete",
            "completionTime": "2026-01-01T00:00:00Z",
            "gpuSeconds": 100,
            "preflight": {"rows": 10, "tokens": 2000},
            "resolved": {"totalSteps": 2, "batchSize": 5},
            "attempts": [{"name": "before-1", "node": "a"}],
        }
        yield [job("team", "before") | {"status": status}, job("team", "new"), {**job("team", "odd"), "spec": {}}], ""

    async def find(self, kind: str, name: str) -> None:
        raise ForbiddenError(f"{kind} {name} may not be read")


def test_the_gpu_time_and_its_cost(estimate: Estimate, monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect() -> Jobs:
        return Jobs()

    monkeypatch.setattr("tunesmith.cli.estimate.connect", connect)
    counted = PREFLIGHT | {"verdict": "Fits", "packedSequences": None, "sharedTokens": None}
    report = SUCCEEDED | {"preflight": counted}
    tokens = 4000 * 30 * 8 / 90
    _, out, _, _ = estimate(report, "--price-per-hour", "3.6")
    assert f"about {tokens / 20:.0f} GPU-seconds on a GPU of unknown kind, at 20 tokens/s per GPU as in before" in out
    assert "cost          about 0.53, at 3.6 per GPU and hour" in out
    _, out, _, _ = estimate(report, "--price-per-hour", "3.6", "-o", "json")
    assert json.loads(out)["gpuTime"] == {
        "gpuSeconds": 533,
        "tokensPerGpuSecond": 20,
        "gpu": "a GPU of unknown kind",
        "jobs": ["before"],
        "cost": 0.53,
    }


def test_a_job_that_will_not_fit(estimate: Estimate) -> None:
    code, out, err, _ = estimate(REFUSED, "--gpu-memory", "4GiB")
    assert code == 2
    assert "suggestion    it fits with method.qlora instead of lora (about 3.0 GiB)\n" in out
    assert err == "error: WillNotFit: too large\n"


@pytest.mark.parametrize(
    ("report", "arguments", "code", "message"),
    [
        (MALFORMED, (), 2, "DatasetInvalid: line 3 is not JSON"),
        (MALFORMED | {"retryable": True}, (), 3, "DatasetInvalid: line 3 is not JSON"),
        (None, (), 1, "exited with code 0 and without a result"),
        (SUCCEEDED, ("--gpu-memory", "lots"), 2, "--gpu-memory lots is not a size: write it as 80GiB or 24GB"),
        (SUCCEEDED, ("--gpu-memory", "80"), 2, "--gpu-memory 80 is 80 bytes: write the unit, as in 80GiB"),
        (SUCCEEDED, ("-f", "absent.yaml"), 2, "the file absent.yaml does not exist"),
    ],
)
def test_failures_are_reported(
    estimate: Estimate,
    report: object,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    exit_code, out, err, _ = estimate(report, *arguments)
    assert (exit_code, out) == (code, "")
    assert message in err
