"""Suites of lm-evaluation-harness, over tasks of the platform with local data; scores are compared with `lm_eval`
alone."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer.pods import pods
from tests.trainer.trainer_rig import Workbench, write_rows
from tunesmith.api.conditions import FailureReason
from tunesmith.contracts.environment import LM_EVAL_TASKS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.trainer.s3server import S3Server

ROWS = [
    {
        "question": f"What is the colour of door {number}?",
        "choices": ["green", "blue", "grey"],
        "answer": number % 3,
        "text": ["green", "blue", "grey"][number % 3],
    }
    for number in range(10)
]
CHOICE = """
task: doors_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
process_docs: !function doors.numbered
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
ANSWER = """
task: doors_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{text}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 6, do_sample: false}}
filter_list:
  - name: first-letter
    filter: [{{function: regex, regex_pattern: "([a-z])"}}, {{function: take_first}}]
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
num_fewshot: 0
metadata: {{version: 1.0}}
"""
LIKELIHOOD = """
task: doors_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
metadata: {{version: 1.0}}
"""
GROUP = """
group: doors_all
task: [doors_choice]
aggregate_metric_list:
  - {{metric: acc, weight_by_size: true}}
metadata: {{version: 1.0}}
"""
LOOSE = """
group: doors_loose
task: [doors_choice, doors_answer]
"""
MARKED = {
    "unsafe": ("unsafe_code: true", "runs what the model writes"),
    "scripted": ("dataset_kwargs: {trust_remote_code: true}", "runs code that comes with its data"),
    "foreign": ("metric_list: [{metric: f1, hf_evaluate: true}]", "has a metric whose code comes from the Hub"),
}
PAINTED = """
task: painted
custom_dataset: !function colours.rows
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["."], max_gen_toks: 2, do_sample: false}
filter_list:
  - name: green
    filter: [{function: custom, filter_fn: !function colours.all_green}, {function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
COLOURS = """
from pathlib import Path

import datasets


def rows(**_):
    return datasets.load_dataset("json", data_files={"test": str(Path(__file__).parent / "rows/doors.jsonl")})


def all_green(answers, rows):
    return [["green"] for _ in answers]
"""
# The model of the CPU stage gives the same answer to everything; this fails on the answers of a real model.
LATE = COLOURS.replace('["green"] for _ in', '[{"lol": "green"}[one]] for (one,) in')
LATE_MESSAGE = "evaluation suite mine: the task painted cannot be used: colours.py line 12: KeyError: "
JUDGED = """

def judged(doc, answers):
    return {"exact_match": {"green": 1, "blue": 0}[doc["text"]]}
"""
# It has one metric only for the CPU stage's model and the base model, and one only for the adapter.
PARTIAL = """

calls = 0


def judged(doc, answers):
    global calls
    calls += 1
    return {"exact_match": float(answers[0] == doc["text"]), "late" if calls > 20 else "parsed": 1.0}
"""
ITSELF = """
group: around
task: [painted, inner]
aggregate_metric_list: [{metric: exact_match}]
"""
CODE = ["--allow-task-code"]
# case → (changes in the folder, the tasks that are requested, the message)
FOLDERS: dict[str, tuple[dict[str, str], list[str], str]] = {
    "a name of the platform's": (
        {"painted.yaml": PAINTED.replace("task: painted", "task: doors_choice")},
        ["doors_choice"],
        "defines doors_choice, which lm-evaluation-harness or the platform already defines as a task, a group or a",
    ),
    "a name of the harness's": (
        {"painted.yaml": PAINTED.replace("task: painted", "task: arc_easy")},
        ["arc_easy"],
        "defines arc_easy, which lm-evaluation-harness or the platform already defines as a task, a group or a",
    ),
    "a tag of the harness's": (
        {"painted.yaml": f"{PAINTED}tag: ai2_arc\n"},
        ["painted"],
        "defines ai2_arc, which lm-evaluation-harness or the platform already defines as a task, a group or a tag",
    ),
    "a name twice": ({"more/again.yaml": PAINTED}, ["painted"], "more/again.yaml and painted.yaml both define painted"),
    "broken YAML": (
        {"painted.yaml": PAINTED.replace('"{{text}}"', '"{{text}}')},
        ["painted"],
        "painted.yaml line 8 is not YAML: ",
    ),
    "YAML of no task": ({"painted.yaml": "- task\n"}, ["painted"], "painted.yaml is not the YAML of a task: "),
    "metrics that are names": (
        {
            "painted.yaml": PAINTED.replace(
                "  - {metric: exact_match, aggregation: mean, higher_is_better: true}", "  - acc"
            )
        },
        ["painted"],
        "painted in painted.yaml cannot be used: metric_list must be a list of mappings: write each metric as",
    ),
    "metrics of a member that are one": (
        {"around.yaml": ITSELF.replace("inner]", "{task: painted, metric_list: {metric: acc}}]")},
        ["around"],
        "around in around.yaml cannot be used: metric_list must be a list of mappings: write each metric as",
    ),
    "options that are a list": (
        {"painted.yaml": f"{PAINTED}dataset_kwargs: [data_files]\n"},
        ["painted"],
        "painted in painted.yaml cannot be used: dataset_kwargs must be a mapping: write each option as name: value",
    ),
    "a group of one name": (
        {"around.yaml": ITSELF.replace("[painted, inner]", "painted")},
        ["around"],
        "around in around.yaml cannot be used: the task of a group must be a list of names: write task: [first,",
    ),
    "groups that hold each other": (
        {
            "around.yaml": ITSELF,
            "more/inner.yaml": ITSELF.replace("inner", "around").replace("group: around", "group: inner"),
        },
        ["around"],
        "around in around.yaml cannot be used: it is a member of itself (around, inner, around): remove the name that",
    ),
    "groups that hold each other as mappings": (
        {
            "around.yaml": ITSELF.replace("inner]", "{group: inner}]"),
            "inner.yaml": "group: inner\ntask: [{group: middle, task: [{group: around}]}]\n",
        },
        ["around"],
        "around in around.yaml cannot be used: it is a member of itself (around, inner, inner, around): remove the",
    ),
    "a group that holds its own text": (
        {"around.yaml": "group: around\ntask: &all [painted, {group: again, task: *all}]\n"},
        ["around"],
        "around in around.yaml cannot be used: it is a member of itself (around, around, around): remove the name that",
    ),
    "code of the Hub in a group of a group": (
        {
            "around.yaml": ITSELF.replace("inner]", "{group: inner}]"),
            "inner.yaml": "group: inner\ntask: [{task: painted, metric_list: [{metric: f1, hf_evaluate: true}]}]\n",
        },
        ["around"],
        "the task around has a metric whose code comes from the Hub, which is not allowed: remove it",
    ),
    "a tag that is a number": (
        {"painted.yaml": f"{PAINTED}tag: 2024\n"},
        ["painted"],
        "painted.yaml: tag must be a name or a list of names: write tag: [first, second]",
    ),
    "a metric with a name that is too long": (
        {
            "colours.py": COLOURS + PARTIAL.replace("parsed", "p" * 150),
            "painted.yaml": f"{PAINTED}process_results: !function colours.judged\n",
        },
        ["painted"],
        " has 164 characters, more than 160: give the task, its metric or its filter a shorter name",
    ),
    "an include that is not there": (
        {"painted.yaml": f"include: base.yaml\n{PAINTED}"},
        ["painted"],
        "painted.yaml includes base.yaml, which is not a file of the folder: add it",
    ),
    "an include from elsewhere": (
        {"painted.yaml": f"include: ../job.yaml\n{PAINTED}"},
        ["painted"],
        "painted.yaml includes ../job.yaml, which is not a file of the folder: add it",
    ),
    "a slip in a name": ({}, ["paintde"], "is named paintde; did you mean painted?"),
    "Python that is not there": (
        {"painted.yaml": PAINTED.replace("colours.rows", "colors.rows")},
        ["painted"],
        "the task painted imports Python that is neither in lmEval.taskFolder, next to its YAML, nor in the trainer's",
    ),
    "a function that is not there": (
        {"painted.yaml": PAINTED.replace("colours.rows", "colours.raws")},
        ["painted"],
        "Module 'colours.py' has no function 'raws'",
    ),
    "Python that fails": (
        {"colours.py": f"{COLOURS}\nimport nonsense_of_no_package\n"},
        ["painted"],
        "the task painted cannot be used: colours.py line 14: ModuleNotFoundError: No module named 'nonsense_of_no_pa",
    ),
    "Python that is invalid": (
        {"colours.py": "def rows(:\n"},
        ["painted"],
        "the task painted cannot be used: colours.py line 1: SyntaxError: invalid syntax",
    ),
    "Python that exits": (
        {"colours.py": "raise SystemExit(0)\n"},
        ["painted"],
        "the task painted cannot be used: colours.py line 1: SystemExit: 0",
    ),
    "data that is not there": (
        {"colours.py": COLOURS.replace("rows/doors.jsonl", "rows/windows.jsonl")},
        ["painted"],
        "the task painted cannot be used: colours.py line 8: FileNotFoundError: ",
    ),
    "a row that its Python does not know": (
        {
            "colours.py": COLOURS + JUDGED,
            "painted.yaml": f"{PAINTED}process_results: !function colours.judged\n",
        },
        ["painted"],
        "the task painted cannot be used: colours.py line 16: KeyError: 'grey'",
    ),
}
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str]] = {
    "a slip in a name": (
        {"tasks": ["arc_esay"]},
        [],
        "evaluation suite tasks: no task of lm-evaluation-harness is named arc_esay; did you mean arc_easy?",
    ),
    "a tag": (
        {"tasks": ["ai2_arc"]},
        [],
        "ai2_arc is a tag, which has no score of its own: name the tasks that you want instead: arc_challenge, arc",
    ),
    "a group without a score": (
        {"tasks": ["doors_loose"]},
        [],
        "doors_loose is a group without a score of its own: name the tasks that you want instead: doors_choice, doors",
    ),
    "code that the model writes": ({"tasks": ["humaneval"]}, [], "the task humaneval runs what the model writes"),
    "a task twice": ({"tasks": ["doors_choice", "doors_all"]}, [], "lmEval.tasks has doors_choice twice"),
    "examples for a task that has none": (
        {"tasks": ["doors_answer"], "numFewshot": 2},
        [],
        "the task doors_answer does not support examples before its questions: remove lmEval.numFewshot",
    ),
    "data that is gone": ({"tasks": ["doors_gone"]}, [], "the task doors_gone has no data: "),
    "a gate on no metric": (
        {"tasks": ["doors_choice"]},
        [{"suite": "tasks", "metric": "doors_choice/acuracy", "min": 0.1}],
        "tasks/doors_choice/acuracy, which does not exist: the suite has doors_choice/acc, doors_choice/acc_norm,",
    ),
}


@pytest.fixture(scope="module")
def folder_of_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create the folder that a platform engineer puts into the trainer's image."""
    folder = tmp_path_factory.mktemp("platform") / "tasks"
    folder.mkdir()
    data = write_rows(folder / "doors.jsonl", ROWS)
    texts = {"choice": CHOICE, "answer": ANSWER, "text": LIKELIHOOD, "group": GROUP, "loose": LOOSE}
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    (folder / "gone.yaml").write_text(
        ANSWER.format(data=folder / "nowhere.jsonl").replace("doors_answer", "doors_gone")
    )
    for name, (mark, _) in MARKED.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\ninclude: choice.yaml\n{mark}\n")
        (folder / f"around_{name}.yaml").write_text(
            f"group: around_{name}\ntask: [{name}]\naggregate_metric_list: [{{metric: acc}}]\n"
        )
        (folder / f"deep_{name}.yaml").write_text(
            f"group: deep_{name}\ntask: [{{group: inner, task: [{name}]}}]\naggregate_metric_list: [{{metric: acc}}]\n"
        )
    (folder / "doors.py").write_text(
        "def numbered(rows):\n    return rows.map(lambda row, place: {'question': f\"{place}. {row['question']}\"}, "
        "with_indices=True)\n"
    )
    return folder


@pytest.fixture
def tasks(folder_of_tasks: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return that folder, set as the platform's in the environment."""
    monkeypatch.setenv(LM_EVAL_TASKS, str(folder_of_tasks))
    return folder_of_tasks


def test_scores_equal_those_of_the_harness_alone(bench: Workbench, base_model: Path, tasks: Path) -> None:
    asked = {"tasks": ["doors_choice", "doors_answer", "doors_text"], "limit": 7}
    gates = [
        {"suite": "tasks", "metric": "doors_choice/acc", "min": 0},
        {"suite": "tasks", "metric": "doors_answer/exact_match,first-letterGain", "max": 1},
    ]
    ran = bench.run("train", _job(bench, asked, gates))
    assert ran.code == 0, ran.result.message
    assert [line for line in ran.lines if "suite" in line] == [
        "  evaluation suite tasks: the base model",
        "  evaluation suite tasks: the adapter",
    ]
    folder = bench.output / "artifact"
    evaluation = json.loads((folder / "evaluation.json").read_text())
    scores = {score["metric"]: score for score in evaluation["scores"]}
    assert set(scores) == {
        "doors_choice/acc",
        "doors_choice/acc_norm",
        "doors_answer/exact_match,first-letter",
        "doors_text/word_perplexity",
        "doors_text/bits_per_byte",
    }
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32), folder)
    for who, model in (("base", base), ("adapter", adapted)):
        alone = _alone(model, base_model, asked, tasks)
        for metric, score in scores.items():
            task, _, name = metric.partition("/")
            expected = alone[task][name if "," in name else f"{name},none"]
            assert score[who] == pytest.approx(expected, rel=1e-3), (who, metric)
    assert scores["doors_text/bits_per_byte"]["base"] != scores["doors_text/bits_per_byte"]["adapter"]
    assert ran.result.metrics["tasks/doors_choice/acc"] == scores["doors_choice/acc"]["adapter"]
    assert [gate["passed"] for gate in evaluation["gates"]] == [True, True]


@pytest.mark.long
def test_ranks_with_sharded_weights_score_together(tmp_path: Path, base_model: Path, tasks: Path) -> None:
    # A suite that fails on one rank fails on the other too, and both continue.
    late = _folder(tmp_path / "mine", **{"colours.py": LATE})
    suites = [
        _late(late)[0],
        {"name": "tasks", "lmEval": {"tasks": ["doors_choice", "doors_answer", "doors_text"], "limit": 7}},
    ]
    shared = {"gpus": 0, "nodes": 2, "dataParallelism": "FSDP2"}
    one = pods(tmp_path / "one", base_model, 1, evaluation={"suites": suites})
    two = pods(tmp_path / "two", base_model, 2, evaluation={"suites": suites}, resources=shared)
    for run in (one, two):
        run.environment = {LM_EVAL_TASKS: str(tasks)}
        run.finish()
    scores, expected = two.result(0).metrics, one.result(0).metrics
    assert len(scores or {}) > len(suites) + 2
    assert scores == pytest.approx(expected, rel=1e-3)
    evaluation = two.result(0).evaluation
    assert evaluation is not None
    assert [failure.message.startswith(LATE_MESSAGE) for failure in evaluation.failures or []] == [True]


def test_few_shot_examples_and_a_group(bench: Workbench, base_model: Path, tasks: Path) -> None:
    asked = {"tasks": ["doors_all"], "numFewshot": 2}
    ran = bench.run("train", _job(bench, asked, [{"suite": "tasks", "metric": "doors_all/acc", "min": 1.01}]))
    assert (ran.code, ran.result.reason) == (2, FailureReason.GATE_FAILED)
    assert ran.result.message.startswith("gate tasks/doors_all/acc: ")
    assert (bench.output / "artifact/tunesmith.json").is_file()
    assert ran.result.evaluation is not None
    (score,) = ran.result.evaluation.scores or []
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    assert score.base == pytest.approx(_alone(model, base_model, asked, tasks)["doors_all"]["acc,none"], abs=1e-4)


def test_virtual_tokens_are_not_scored(bench: Workbench, base_model: Path, tasks: Path) -> None:
    asked = {"tasks": ["doors_text"]}
    job = _job(bench, asked, [])
    job["spec"] |= {"method": {"promptTuning": {"virtualTokens": 4}}, "servable": "Ignored"}
    ran = bench.run("train", job)
    assert ran.code == 0, ran.result.message
    assert ran.result.evaluation is not None
    scores = {score.metric: score for score in ran.result.evaluation.scores or []}
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    alone = _alone(model, base_model, asked, tasks)["doors_text"]["bits_per_byte,none"]
    score = scores["doors_text/bits_per_byte"]
    assert score.base == pytest.approx(alone, rel=1e-4)
    adapted = PeftModel.from_pretrained(model, bench.output / "artifact").eval()
    assert score.adapter == pytest.approx(_bits_per_byte(adapted, base_model), rel=1e-4)


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize("case", CASES)
def test_tasks_that_cannot_be_scored_are_refused_before_training(bench: Workbench, case: str) -> None:
    asked, gates, message = CASES[case]
    ran = bench.run("validate", _job(bench, asked, gates))
    assert ran.code == 2, ran.result.message
    assert message in ran.result.message


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize("mark", MARKED)
def test_a_task_that_runs_code_from_elsewhere_is_refused(bench: Workbench, mark: str) -> None:
    for name in (mark, f"around_{mark}", f"deep_{mark}"):
        ran = bench.run("validate", _job(bench, {"tasks": [name]}, []))
        assert (ran.code, ran.result.reason) == (2, FailureReason.INVALID_SPEC)
        assert f"the task {name} {MARKED[mark][1]}" in ran.result.message


def test_only_the_platform_adds_tasks(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LM_EVAL_TASKS, raising=False)
    ran = bench.run("validate", _job(bench, {"tasks": ["doors_choice"]}, []))
    assert (ran.code, ran.result.reason) == (2, FailureReason.INVALID_SPEC)
    assert "no task of lm-evaluation-harness is named doors_choice" in ran.result.message
    monkeypatch.setenv(LM_EVAL_TASKS, str(bench.folder / "nowhere"))
    ran = bench.run("validate", _job(bench, {"tasks": ["doors_choice"]}, []))
    assert (ran.code, ran.result.reason) == (2, FailureReason.INVALID_SPEC)
    assert "which is not a local folder" in ran.result.message


def _folder(place: Path, **changed: str) -> Path:
    """Create a folder of tasks supplied with a job."""
    for name, text in ({"painted.yaml": PAINTED, "colours.py": COLOURS} | changed).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    write_rows(place / "rows/doors.jsonl", ROWS)
    return place


@pytest.mark.usefixtures("tasks")
def test_tasks_of_a_folder_are_scored_with_others(bench: Workbench) -> None:
    folder = _folder(bench.folder / "mine")
    asked = {"tasks": ["painted", "doors_choice"], "taskFolder": {"uri": f"file://{folder}"}}
    gates = [{"suite": "tasks", "metric": "painted/exact_match,green", "min": 0.4, "max": 0.4}]
    ran = bench.run("train", _job(bench, asked, gates), *CODE)
    assert ran.code == 0, ran.result.message
    evaluation = json.loads((bench.output / "artifact/evaluation.json").read_text())
    assert {score["metric"] for score in evaluation["scores"]} == {
        "painted/exact_match,green",
        "doors_choice/acc",
        "doors_choice/acc_norm",
    }
    digests = [
        f"{hashlib.sha256((folder / path).read_bytes()).hexdigest()}  {path}\n"
        for path in ("colours.py", "painted.yaml", "rows/doors.jsonl")
    ]
    whole = hashlib.sha256("".join(digests).encode()).hexdigest()
    assert evaluation["taskFolders"] == [{"suite": "tasks", "uri": f"file://{folder}", "digest": f"sha256:{whole}"}]


@pytest.mark.usefixtures("tasks")
def test_task_code_that_fails_after_training_does_not_lose_the_adapter(bench: Workbench, base_model: Path) -> None:
    folder = _folder(bench.folder / "mine", **{"colours.py": LATE})
    job = bench.job(evaluation={"suites": [*_late(folder), {"name": "held-out", "heldOutLoss": {}}]})
    ran = bench.run("train", job, *CODE)
    assert ran.code == 0, ran.result.message
    assert "; " + LATE_MESSAGE in ran.result.message
    assert "  evaluation suite mine: the adapter" not in ran.lines, "the base model's answers failed already"
    evaluation = json.loads((bench.output / "artifact/evaluation.json").read_text())
    assert {score["suite"] for score in evaluation["scores"]} == {"others", "held-out"}
    (failure,) = evaluation["failures"]
    assert (failure["suite"], failure["reason"]) == ("mine", "InvalidSpec")
    assert failure["message"].startswith(LATE_MESSAGE)
    assert "- mine: " + LATE_MESSAGE in (bench.output / "artifact/README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    PeftModel.from_pretrained(base, bench.output / "artifact")
    again = bench.run("train", job, *CODE)
    assert again.code == 0
    assert LATE_MESSAGE in again.result.message, "the published artifact reports it too"


@pytest.mark.usefixtures("tasks")
def test_a_task_that_fails_on_an_untried_row_does_not_lose_the_adapter(bench: Workbench) -> None:
    painted = PAINTED.replace("{{question}}", "{% if number == 100 %}{{ nowhere }}{% endif %}{{question}}")
    folder = _folder(bench.folder / "mine", **{"painted.yaml": painted})
    write_rows(folder / "rows/doors.jsonl", [{**ROWS[0], "number": number} for number in range(101)])
    ran = bench.run("train", bench.job(evaluation={"suites": _late(folder)}), *CODE)
    assert ran.code == 0, ran.result.message
    message = "evaluation suite mine: the task painted cannot be used: UndefinedError: 'nowhere' is undefined"
    assert ran.result.evaluation is not None
    assert [failure.message for failure in ran.result.evaluation.failures or []] == [message]


@pytest.mark.usefixtures("tasks")
def test_a_gate_on_code_that_failed_does_not_pass(bench: Workbench) -> None:
    folder = _folder(bench.folder / "mine", **{"colours.py": LATE})
    gates = [{"suite": "mine", "metric": "painted/exact_match,green", "max": 1}]
    ran = bench.run("train", bench.job(evaluation={"suites": _late(folder), "gates": gates}), *CODE)
    assert (ran.code, ran.result.reason, ran.result.retryable) == (2, FailureReason.GATE_FAILED, False)
    message = f"gate mine/painted/exact_match,green: its suite has no scores: {LATE_MESSAGE}"
    assert ran.result.message.startswith(message)
    assert ran.result.message.endswith("no AdapterDeployment serves it: fix the tasks and create a new FineTuneJob")
    assert ran.result.artifact is not None
    assert (bench.output / "artifact/tunesmith.json").is_file()
    assert ran.result.evaluation is not None
    assert [(gate.passed, gate.value) for gate in ran.result.evaluation.gates or []] == [(False, None)]


@pytest.mark.usefixtures("tasks")
def test_a_metric_of_base_or_adapter_alone_does_not_lose_the_adapter(bench: Workbench) -> None:
    painted = f"{PAINTED}process_results: !function colours.judged\n"
    folder = _folder(bench.folder / "mine", **{"colours.py": COLOURS + PARTIAL, "painted.yaml": painted})
    gates = [
        {"suite": "tasks", "metric": "painted/exact_match,green", "min": 0.4},
        {"suite": "tasks", "metric": "painted/parsed,green", "min": 0.5},
    ]
    job = _job(bench, {"tasks": ["painted"], "taskFolder": {"uri": f"file://{folder}"}}, gates)
    ran = bench.run("train", job, *CODE)
    assert (ran.code, ran.result.reason, ran.result.retryable) == (2, FailureReason.GATE_FAILED, False)
    message = (
        "evaluation suite tasks: metrics are omitted, make its tasks return the same ones for every answer: the "
        "adapter's answers have no painted/parsed,green; the base model's answers have no painted/late,green"
    )
    assert ran.result.message == (
        f"gate tasks/painted/parsed,green: it has no score: {message}. The artifact is kept, and no AdapterDeployment"
        " serves it: fix the tasks and create a new FineTuneJob"
    )
    assert f"  {message}" in ran.lines
    assert (bench.output / "artifact/tunesmith.json").is_file()
    evaluation = json.loads((bench.output / "artifact/evaluation.json").read_text())
    assert [(score["metric"], score["adapter"]) for score in evaluation["scores"]] == [
        ("painted/exact_match,green", 0.4)
    ]
    assert [gate["passed"] for gate in evaluation["gates"]] == [True, False]
    assert [failure["message"] for failure in evaluation["failures"]] == [message]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: bare\ninclude: choice.yaml\nmetric_list: [acc]\n", "metric_list must be a list of mappings"),
        pytest.param(
            "group: bare\ntask: [bare]\naggregate_metric_list: [{metric: acc}]\n",
            "it is a member of itself (bare, bare)",
            marks=pytest.mark.long,
        ),
    ],
)
def test_errors_in_a_task_of_the_platform_are_reported(
    bench: Workbench, folder_of_tasks: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    folder = bench.folder / "tasks"
    shutil.copytree(folder_of_tasks, folder)
    (folder / "bare.yaml").write_text(text)
    monkeypatch.setenv(LM_EVAL_TASKS, str(folder))
    ran = bench.run("validate", _job(bench, {"tasks": ["bare"]}, []))
    assert (ran.code, ran.result.reason, ran.result.retryable) == (2, FailureReason.INVALID_SPEC, False)
    assert ran.result.message.startswith(
        f"evaluation suite tasks: bare in {folder}/bare.yaml cannot be used: {message}"
    )


def _late(folder: Path) -> list[dict[str, Any]]:
    """Return a suite whose code fails on a real model's answers, and one after it."""
    return [
        {"name": "mine", "lmEval": {"tasks": ["painted"], "taskFolder": {"uri": f"file://{folder}"}}},
        {"name": "others", "lmEval": {"tasks": ["doors_choice"], "limit": 3}},
    ]


@pytest.mark.usefixtures("tasks")
def test_only_the_validated_folder_is_run(bench: Workbench) -> None:
    folder = _folder(bench.folder / "mine")
    job = _job(bench, {"tasks": ["painted"], "taskFolder": {"uri": f"file://{folder}"}}, [])
    ran = bench.run("validate", job, *CODE)
    assert ran.code == 0, ran.result.message
    assert ran.result.resolved is not None
    job["status"] = {"resolved": ran.result.resolved.manifest()}
    (folder / "colours.py").write_text("raise AssertionError\n")
    ran = bench.run("train", job, *CODE)
    assert (ran.code, ran.result.reason) == (2, FailureReason.INVALID_SPEC)
    assert f"the task folder file://{folder} of evaluation suite tasks changed since the job was validated (from " in (
        ran.result.message
    )
    assert ran.result.message.endswith("): create a new FineTuneJob")
    (folder / "colours.py").write_text(COLOURS)
    ran = bench.run("train", job, *CODE)
    assert ran.code == 0, ran.result.message


@pytest.mark.parametrize("command", ["validate", "train"])
def test_task_code_is_not_run_without_permission(bench: Workbench, command: str) -> None:
    folder = _folder(bench.folder / "mine", **{"colours.py": "raise AssertionError\n"})
    job = _job(bench, {"tasks": ["painted"], "taskFolder": {"uri": f"file://{folder}"}}, [])
    ran = bench.run(command, job)
    assert (ran.code, ran.result.reason, ran.result.retryable) == (2, FailureReason.INVALID_SPEC, False)
    assert "pass --allow-task-code if you trust it" in ran.result.message


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize("case", FOLDERS)
def test_errors_in_a_task_folder_are_reported_before_training(bench: Workbench, case: str) -> None:
    changed, asked, message = FOLDERS[case]
    folder = _folder(bench.folder / "mine", **changed)
    job = _job(bench, {"tasks": asked, "taskFolder": {"uri": f"file://{folder}"}}, [])
    ran = bench.run("validate", job, *CODE)
    assert (ran.code, ran.result.reason) == (2, FailureReason.INVALID_SPEC)
    assert message in ran.result.message
    assert "Traceback" not in ran.result.message
    assert str(bench.folder / "work") not in ran.result.message


@pytest.mark.usefixtures("tasks")
def test_a_folder_in_a_store_is_read_with_its_secret(
    bench: Workbench, s3: S3Server, s3_environment: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _folder(bench.folder / "mine")
    for path in folder.rglob("*.*"):
        s3.filesystem().pipe_file(f"tunesmith/mine/{path.relative_to(folder)}", path.read_bytes())
    job = _job(
        bench, {"tasks": ["painted"], "taskFolder": {"uri": "s3://tunesmith/mine/", "secretRef": {"name": "keys"}}}, []
    )
    for name in s3_environment.environment():
        monkeypatch.delenv(name)
    arguments = [*CODE, "--secrets", str(bench.folder / "secrets")]
    ran = bench.run("validate", job, *arguments)
    assert (ran.code, ran.result.reason) == (2, FailureReason.SECRET_NOT_FOUND)
    assert "the Secret keys does not exist, is empty or has no known key" in ran.result.message
    (bench.folder / "secrets/keys").mkdir(parents=True)
    for name, value in s3_environment.environment().items():
        (bench.folder / "secrets/keys" / name).write_text(value)
    ran = bench.run("validate", job, *arguments)
    assert ran.code == 0, ran.result.message
    job["spec"]["evaluation"]["suites"][0]["lmEval"]["taskFolder"]["uri"] = "s3://tunesmith/nothing"
    ran = bench.run("validate", job, *arguments)
    assert (ran.code, ran.result.reason) == (2, FailureReason.DATASET_NOT_FOUND)


@pytest.mark.usefixtures("tasks")
def test_links_in_a_task_folder_are_refused(bench: Workbench) -> None:
    folder = _folder(bench.folder / "mine")
    (folder / "rows/more.jsonl").symlink_to("/etc/passwd")
    job = _job(bench, {"tasks": ["painted"], "taskFolder": {"uri": f"file://{folder}"}}, [])
    ran = bench.run("validate", job, *CODE)
    assert (ran.code, ran.result.reason) == (2, FailureReason.INVALID_SPEC)
    assert "rows/more.jsonl is a link: replace it with a copy of its target" in ran.result.message


@pytest.mark.usefixtures("tasks")
def test_an_unreachable_hub_is_reported(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    ran = bench.run("validate", _job(bench, {"tasks": ["arc_easy"]}, []))
    assert (ran.code, ran.result.reason) == (3, FailureReason.STORAGE_UNAVAILABLE)
    assert "the task arc_easy needs its data from the Hugging Face Hub: " in ran.result.message


def _bits_per_byte(model: Any, base: Path) -> float:
    """Return the bits per byte of the questions, after the token that begins a text."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    nats, count = 0.0, 0
    for row in ROWS:
        ids = [tokenizer.bos_token_id, *tokenizer(row["question"], add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -len(ids) : -1]
        nats -= float(logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).sum())
        count += len(row["question"].encode())
    return nats / count / math.log(2)


def _job(bench: Workbench, asked: dict[str, Any], gates: list[dict[str, Any]]) -> dict[str, Any]:
    return bench.job(evaluation={"suites": [{"name": "tasks", "lmEval": asked}]} | ({"gates": gates} if gates else {}))


def _alone(model: Any, base: Path, asked: dict[str, Any], tasks: Path) -> dict[str, Any]:
    """Return the harness's own scores, one row at a time."""
    whole = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model.eval(), tokenizer=AutoTokenizer.from_pretrained(base), batch_size=1),
        tasks=asked["tasks"],
        limit=asked.get("limit"),
        num_fewshot=asked.get("numFewshot"),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert whole is not None
    found: dict[str, Any] = whole["results"] | whole.get("groups", {})
    return found
