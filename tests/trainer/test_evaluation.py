from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.trainer_rig import Workbench, chat_rows, write_rows
from tunesmith.api.conditions import FailureReason
from tunesmith.api.dataset import Dataset, LossOn
from tunesmith.api.evaluation import Evaluation, GenerationMetric, Suite
from tunesmith.api.finetunejob_status import EvaluationStatus, SuiteFailure
from tunesmith_trainer.base_model import model as base_models
from tunesmith_trainer.data import Encoder
from tunesmith_trainer.evaluation import gates
from tunesmith_trainer.evaluation.generation import load, score
from tunesmith_trainer.store import Stores

if TYPE_CHECKING:
    from pathlib import Path

SCORES = {
    "exact": (GenerationMetric.EXACT_MATCH, [" blue\n", "green", "Blue"], ["blue", "grey", "blue"], 1 / 3),
    "contains": (GenerationMetric.CONTAINS, ["It is blue.", "none"], ["blue", "green"], 0.5),
    "equal texts by BLEU": (GenerationMetric.BLEU, ["the door is very blue"], ["the door is very blue"], 100),
    "other texts by chrF": (GenerationMetric.CHRF, ["abcdef"], ["uvwxyz"], 0),
}
LOSSES = EvaluationStatus(base_loss=2.0, loss=1.5, loss_reduction_percent=25.0)
# limits of a gate → its message; None if it passes
GATES: dict[str, tuple[dict[str, Any], str | None]] = {
    "below the max": ({"suite": "rows", "metric": "Loss", "max": 1.6}, None),
    "at the max": ({"suite": "rows", "metric": "Loss", "max": 1.5}, None),
    "above the max": ({"suite": "rows", "metric": "Loss", "max": 1.4}, "gate rows/Loss: 1.5 is above its max 1.4"),
    "a fall that is large enough": ({"suite": "rows", "metric": "LossReductionPercent", "min": 20}, None),
    "a score below the min": (
        {"suite": "doors", "metric": "ExactMatch", "min": 0.9},
        "gate doors/ExactMatch: 0.75 is below its min 0.9",
    ),
    "a gain over the base": ({"suite": "doors", "metric": "ExactMatchGain", "min": 0.5}, None),
    "no gain over the base": (
        {"suite": "doors", "metric": "ExactMatchGain", "min": 0.6},
        "gate doors/ExactMatchGain: 0.5 is below its min 0.6",
    ),
}


@pytest.mark.parametrize("case", SCORES)
def test_answers_are_scored(case: str) -> None:
    metric, given, expected, value = SCORES[case]
    assert score(metric, given, expected) == pytest.approx(value)


@pytest.mark.parametrize("case", GATES)
def test_a_gate_passes_within_its_limits(case: str) -> None:
    gate, message = GATES[case]
    judged = _judge(gate, LOSSES)
    failure = gates.describe_failures(judged)
    if message is None:
        assert failure is None
    else:
        assert failure is not None
        assert failure.startswith(message)
        assert "The artifact is kept" in failure


def test_a_loss_that_is_not_a_number_passes_no_gate() -> None:
    judged = _judge({"suite": "rows", "metric": "Loss", "max": 100}, EvaluationStatus(base_loss=2.0, loss=float("nan")))
    assert judged.gates is not None
    assert [gate.passed for gate in judged.gates] == [False]


def test_a_suite_without_scores_passes_no_gate_and_does_not_affect_others() -> None:
    suites = [
        {"name": "doors", "generation": {"dataset": {"uri": "s3://data/doors.jsonl"}}},
        {"name": "mine", "lmEval": {"tasks": ["painted"]}},
    ]
    limits = [
        {"suite": "doors", "metric": "ExactMatch", "min": 0.9},
        {"suite": "mine", "metric": "painted/acc", "max": 1},
    ]
    failure = SuiteFailure(suite="mine", reason=FailureReason.INVALID_SPEC, message="suite mine: line 3: KeyError")
    asked = Evaluation.model_validate({"suites": suites, "gates": limits})
    judged = gates.judge(asked, LOSSES, {"doors": {"ExactMatch": (0.25, 0.75)}}, [failure])
    assert judged.failures == [failure]
    assert [(score.suite, score.adapter) for score in judged.scores or []] == [("doors", 0.75)]
    assert [(gate.suite, gate.passed) for gate in judged.gates or []] == [("doors", False), ("mine", False)]
    assert gates.describe_failures(judged) == (
        "gate doors/ExactMatch: 0.75 is below its min 0.9; gate mine/painted/acc: its suite has no scores:"
        " suite mine: line 3: KeyError. The artifact is kept, and no AdapterDeployment serves it: fix the tasks and"
        " create a new FineTuneJob, or train again with more or better data, another learning rate or more steps, or"
        " change the gate"
    )


COMPARED: dict[str, tuple[dict[str, float], dict[str, float], int, list[str], str | None]] = {
    "the same metrics": ({"t/acc": 0.5, "t/f1": 0.1}, {"t/acc": 0.6, "t/f1": 0.2}, 126, ["t/acc", "t/f1"], None),
    "one that the adapter lacks": (
        {"t/acc": 0.5, "t/f1": 0.1},
        {"t/acc": 0.6},
        0,
        ["t/acc"],
        "the adapter's answers have no t/f1",
    ),
    "some that either lacks": (
        {"t/acc": 0.5, "t/f1": 0.1},
        {"t/acc": 0.6, "t/em": 0.2},
        0,
        ["t/acc"],
        "the adapter's answers have no t/f1; the base model's answers have no t/em",
    ),
    "more than there is room for": (
        {"t/acc": 0.5, "t/f1": 0.1},
        {"t/acc": 0.6, "t/f1": 0.2},
        127,
        ["t/acc"],
        "at most 128 scores are kept, with names of at most 160 characters, which excludes t/f1",
    ),
    "a name that is too long": (
        {"t/acc": 0.5, "t/" + "x" * 5000: 0.1},
        {"t/acc": 0.6, "t/" + "x" * 5000: 0.1},
        0,
        ["t/acc"],
        "at most 128 scores are kept, with names of at most 160 characters, which excludes t/xxx",
    ),
}


@pytest.mark.parametrize("case", COMPARED)
def test_metrics_of_both_are_paired(case: str) -> None:
    base, adapter, other_scores, kept, message = COMPARED[case]
    found, omitted = gates.pair_scores("mine", base, adapter, other_scores=other_scores)
    assert found == {metric: (base[metric], adapter[metric]) for metric in kept}
    if message is None:
        assert omitted is None
    else:
        assert omitted is not None
        begin = "evaluation suite mine: metrics are omitted, make its tasks return the same ones for every answer: "
        assert omitted.message.startswith(begin + message)


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (0.8999999, {"min": 0.9}, "0.9 is below its min 0.9"),
        (0.8999999, {"min": 0.9, "max": 1}, "0.9 is below its min 0.9"),
        (0.5000001, {"min": 0.1, "max": 0.5}, "0.5 is above its max 0.5"),
        (float("inf"), {"max": 3}, "its score is not a finite number"),
    ],
)
def test_a_failed_gate_describes_the_value(value: float, limits: dict[str, float], message: str) -> None:
    suites = [{"name": "mine", "lmEval": {"tasks": ["painted"]}}]
    asked = {"suites": suites, "gates": [{"suite": "mine", "metric": "painted/acc"} | limits]}
    judged = gates.judge(Evaluation.model_validate(asked), LOSSES, {"mine": {"painted/acc": (0.25, value)}})
    assert (gates.describe_failures(judged) or "").startswith(f"gate mine/painted/acc: {message}. The artifact is kept")


def _judge(gate: dict[str, Any], losses: EvaluationStatus) -> EvaluationStatus:
    suites = [
        {"name": "rows", "heldOutLoss": {}},
        {"name": "doors", "generation": {"dataset": {"uri": "s3://data/doors.jsonl"}}},
    ]
    return gates.judge(
        Evaluation.model_validate({"suites": suites, "gates": [gate]}), losses, {"doors": {"ExactMatch": (0.25, 0.75)}}
    )


def test_base_and_adapter_answer_like_plain_transformers_and_peft(bench: Workbench, base_model: Path) -> None:
    rows = chat_rows(5)
    job = _job(bench, rows, metric="ChrF", max_new_tokens=12)
    ran = bench.run("train", job)
    assert ran.code == 0, ran.result.message
    folder = bench.output / "artifact"
    scores = json.loads((folder / "evaluation.json").read_text())["scores"]
    assert [(score["suite"], score["metric"]) for score in scores] == [("rows", "Loss"), ("doors", "ChrF")]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    for who, model in (
        ("base", base),
        ("adapter", PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), folder)),
    ):
        given = []
        for row in rows:
            prompt = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
            ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
            out = model.eval().generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
            )
            given.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        expected = score(GenerationMetric.CHRF, given, [row["messages"][1]["content"] for row in rows])
        assert scores[1][who] == pytest.approx(expected, abs=1e-3), who
    assert ran.result.metrics["doors/ChrF"] == scores[1]["adapter"]


def test_a_failed_gate_keeps_the_artifact_and_is_reported_again(bench: Workbench) -> None:
    job = _job(bench, chat_rows(2), gates=[{"suite": "rows", "metric": "Loss", "max": 0.001}])
    for _ in range(2):  # the second attempt finds what the first one published
        ran = bench.run("train", job)
        assert (ran.code, ran.result.reason, ran.result.retryable) == (2, FailureReason.GATE_FAILED, False)
        assert ran.result.message.startswith("gate rows/Loss: ")
        assert ran.result.artifact is not None
        assert ran.result.evaluation is not None
        assert ran.result.evaluation.gates is not None
        assert not ran.result.evaluation.gates[0].passed
        assert (bench.output / "artifact/tunesmith.json").is_file()
    card = (bench.output / "artifact/README.md").read_text()
    assert "| doors: ExactMatch | 0.0 | 0.0 |" in card
    assert "max 0.001: FAILED" in card


def test_bad_evaluation_data_is_rejected_before_training(bench: Workbench) -> None:
    job = _job(bench, [{"messages": [{"role": "user", "content": "why"}]}])
    ran = bench.run("validate", job)
    assert (ran.code, ran.result.reason) == (2, FailureReason.DATASET_INVALID)
    assert ran.result.message.startswith("doors.jsonl line 1: the last message has the role user")


def test_the_last_answer_is_compared_whatever_its_weight(bench: Workbench, base_model: Path, tmp_path: Path) -> None:
    rows = chat_rows(2)
    rows[1]["messages"][-1]["weight"] = 0
    file = write_rows(tmp_path / "doors.jsonl", rows)
    suite = Suite.model_validate({"name": "doors", "generation": {"dataset": {"uri": f"file://{file}"}}})
    tokenizer = base_models.load_tokenizer(base_model, "the tiny model")
    encoder = Encoder(tokenizer, [tokenizer.eos_token_id], loss_on=LossOn.COMPLETION)
    dataset = Dataset.model_validate({"train": [{"uri": f"file://{file}"}]})
    stores = Stores(secrets=tmp_path, allow_file=True)
    examples = load(suite, dataset, stores, tmp_path, encoder, tokenizer, None)
    assert [example.answer.strip() for example in examples] == [row["messages"][-1]["content"] for row in rows]
    ran = bench.run("validate", _job(bench, rows))
    assert ran.code == 0, ran.result.message


def test_a_job_with_preferences_is_scored_on_answers(bench: Workbench, tmp_path: Path) -> None:
    """The suite's rows have their own format and columns."""
    file = write_rows(tmp_path / "doors.jsonl", chat_rows(2))
    pairs = [{"prompt": f"Door {number}?", "better": " green", "rejected": " blue"} for number in range(20)]
    job = bench.job(pairs, objective={"dpo": {}})
    job["spec"]["dataset"] |= {"format": "Preference", "columns": {"chosen": "better"}}
    suite = {"name": "doors", "generation": {"dataset": {"uri": f"file://{file}"}}}
    job["spec"]["evaluation"] = {"suites": [suite]}
    ran = bench.run("validate", job)
    assert ran.code == 0, ran.result.message


def test_answers_beyond_the_context_are_refused(bench: Workbench) -> None:
    ran = bench.run("validate", _job(bench, chat_rows(1), max_new_tokens=512))
    assert (ran.code, ran.result.reason) == (2, FailureReason.INVALID_SPEC)
    assert "lower maxNewTokens" in ran.result.message


def _job(
    bench: Workbench,
    rows: list[Any],
    *,
    metric: str = "ExactMatch",
    max_new_tokens: int = 4,
    gates: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    file = write_rows(bench.folder / "doors.jsonl", rows)
    generation = {"dataset": {"uri": f"file://{file}"}, "metric": metric, "maxNewTokens": max_new_tokens}
    suites = [{"name": "rows", "heldOutLoss": {}}, {"name": "doors", "generation": generation}]
    return bench.job(evaluation={"suites": suites} | ({"gates": gates} if gates else {}))
