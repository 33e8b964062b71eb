"""Training that starts from an adapter (spec.continueFrom)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file

from tests.trainer.trainer_rig import Ran, Workbench, chat_row, write_rows
from tunesmith.api.conditions import FailureReason
from tunesmith.contracts.artifact import parse_manifest

MORE = [chat_row(f"Who lives behind door {number}?", f"Number {number} is Wren's.") for number in range(16)]


@pytest.fixture
def first(bench: Workbench) -> Path:
    """Train an adapter, and return its folder."""
    ran = bench.run("train", bench.job(), output=str(bench.folder / "first"))
    assert ran.code == 0, ran.result.message
    return bench.folder / "first" / "artifact"


def continued(bench: Workbench, artifact: Path, method: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    job = bench.job(MORE, continueFrom={"artifact": {"uri": f"file://{artifact}"}}, **spec)
    if method is None:
        del job["spec"]["method"]
    else:
        job["spec"]["method"] = method
    return job


def test_training_starts_from_the_adapter(bench: Workbench, first: Path) -> None:
    start = json.loads((first / "evaluation.json").read_text())["heldOutLoss"]["loss"]
    same = bench.job(continueFrom={"artifact": {"uri": f"file://{first}"}})
    del same["spec"]["method"]
    same["spec"]["hyperparameters"] |= {"learningRate": 1e-7}
    ran = bench.run("train", same)
    assert ran.code == 0, ran.result.message
    assert ran.result.evaluation is not None
    assert ran.result.evaluation.loss == pytest.approx(start, abs=1e-3)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, bench.output / "artifact"))
    assert all((after[name] - before[name]).abs().max() < 1e-5 for name in before)


def test_lineage_is_recorded_and_a_third_generation_lists_both(bench: Workbench, first: Path) -> None:
    second = bench.folder / "second"
    ran = bench.run("train", continued(bench, first), output=str(second))
    assert ran.code == 0, ran.result.message
    digest = "sha256:" + hashlib.sha256((first / "tunesmith.json").read_bytes()).hexdigest()
    assert ran.result.resolved is not None
    assert ran.result.resolved.continued_from is not None
    assert ran.result.resolved.continued_from.manifest() == {
        "uri": f"file://{first}", "digest": digest, "method": "lora", "rank": 4
    }
    assert f"`file://{first}`, {digest}" in (second / "artifact/README.md").read_text()
    ran = bench.run("train", continued(bench, second / "artifact", {"lora": {"rank": 4, "alpha": 8}}))
    assert ran.code == 0, ran.result.message
    lineage = parse_manifest((bench.output / "artifact/tunesmith.json").read_bytes()).continued_from
    assert lineage is not None
    assert [ancestor.uri for ancestor in lineage] == [f"file://{second}/artifact", f"file://{first}"]
    assert lineage[1].digest == digest
