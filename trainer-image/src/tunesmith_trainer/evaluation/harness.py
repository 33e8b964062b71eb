"""Score base and adapter on tasks of lm-evaluation-harness.

This runs the harness's own loop (`lm_eval.evaluator.evaluate`) with the default seeds of its command line, so a score
equals the one that `lm_eval` reports for the same model.
"""

from __future__ import annotations

import logging
import random
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tunesmith.api.evaluation import GAIN, MAX_METRIC, MAX_SCORES
from tunesmith_trainer.base_model.precision import training_precision
from tunesmith_trainer.data.report import shortened
from tunesmith_trainer.errors import InvalidSpecError, TrainerError
from tunesmith_trainer.evaluation.tasks import list_names, tasks_of, translate_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lm_eval.api.model import LM
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast

    from tunesmith.api.evaluation import Evaluation, Suite
    from tunesmith_trainer.evaluation.folders import SuppliedTasks

log = logging.getLogger(__name__)

_TRIAL_ROWS = 2
_TRIAL_ROWS_OF_SUPPLIED_TASKS = 100
"""Rows to try of tasks whose Python has not been tried yet."""
_RUN_ERRORS = (RuntimeError, MemoryError, OSError, TrainerError)
"""Errors of the GPU, memory, other ranks and stores: not a fault of tasks unless raised in their own Python."""
_PYTHON_SEED, _SEED = 0, 1234
"""Default seeds of the harness's command line."""


def check(evaluation: Evaluation, own: Mapping[str, SuppliedTasks]) -> None:
    """Fetch the data of all tasks and score random answers: what fails here would otherwise fail after training.

    Args:
        evaluation: all suites and gates.
        own: folders of tasks supplied with the job, by suite.

    Raises:
        InvalidSpecError: a task cannot be used, the name of a metric is too long, or a gate names a metric that
            its task does not have.
        DatasetNotFoundError: a task's data does not exist, or requires a login.
        StorageUnavailableError: the Hub cannot be reached.
    """
    from lm_eval.models.dummy import DummyLM  # noqa: PLC0415

    count = 0
    for suite in evaluation.suites or []:
        if suite.lm_eval is None:
            count += 1
            continue
        tasks = tasks_of(suite, own.get(suite.name))
        try:
            max_rows = _TRIAL_ROWS_OF_SUPPLIED_TASKS if suite.name in own else _TRIAL_ROWS
            metrics = _evaluate(DummyLM(), suite, tasks, max_rows=max_rows)
        except (Exception, SystemExit) as error:
            raise translate_error(suite, ", ".join(suite.lm_eval.tasks), error, own.get(suite.name)) from error
        _check_names(suite, metrics)
        _check_gates(evaluation, suite, metrics)
        count += len(metrics)
    if count > MAX_SCORES:
        raise InvalidSpecError(
            f"evaluation.suites have {count} metrics, more than the {MAX_SCORES} that a job can have: remove tasks"
        )


def scores(
    suite: Suite,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    *,
    adapter: bool,
    own: SuppliedTasks | None = None,
) -> dict[str, float]:
    """Return the scores of the adapter, or of the base alone, by `<task>/<metric>`.

    If memory does not suffice for the batch size, the size is halved.

    Args:
        suite: suite with `lmEval`, checked.
        model: base with adapter.
        tokenizer: the base model's; consumed by the call.
        batch_size: rows per forward pass.
        adapter: True to score with the adapter, False to score the base alone.
        own: folder of tasks supplied with the suite.

    Raises:
        TrainerError: the tasks, or the Python in that folder, failed on a row.
    """
    tasks = tasks_of(suite, own)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), nullcontext() if adapter else model.disable_adapter(), training_precision(model):
            while True:
                try:
                    return _evaluate(_language_model(model, tokenizer, batch_size), suite, tasks)
                except torch.OutOfMemoryError:
                    if batch_size == 1:
                        raise
                    batch_size //= 2
                torch.cuda.empty_cache()
    except (Exception, SystemExit) as error:
        if suite.lm_eval is None or (
            isinstance(error, _RUN_ERRORS) and (own is None or own.locate_error(error) is None)
        ):
            raise
        log.warning("evaluation suite %s failed", suite.name, exc_info=error)
        raise translate_error(suite, ", ".join(suite.lm_eval.tasks), error, own) from error
    finally:
        model.train(was_training)


class _ModelProxy:
    """The part of a model that the harness uses. Given a whole model, it would tie the weights again."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model
        self.config = model.config
        self.device = model.device

    def __call__(self, ids: torch.Tensor) -> Any:  # noqa: ANN401 - the model's own kind of output
        found = self._model(input_ids=ids)
        found.logits = found.logits[:, -ids.shape[1] :]  # without the virtual tokens, which come first
        return found

    def generate(self, **arguments: Any) -> Any:  # noqa: ANN401 - as the model's
        return self._model.generate(**arguments)


def _language_model(model: PeftModel, tokenizer: PreTrainedTokenizerFast, batch_size: int) -> LM:
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    proxy: Any = _ModelProxy(model)
    return HFLM(pretrained=proxy, tokenizer=tokenizer, batch_size=batch_size, backend="causal")


def _evaluate(lm: LM, suite: Suite, tasks: Mapping[str, Any], max_rows: int | None = None) -> dict[str, float]:
    """Return the scores of the named tasks and groups by `<task>/<metric>`; `max_rows` limits the rows of each task."""
    from lm_eval.evaluator import evaluate  # noqa: PLC0415

    settings = suite.lm_eval
    assert settings is not None  # noqa: S101 - the caller checks it
    random.seed(_PYTHON_SEED)
    np.random.seed(_SEED)  # noqa: NPY002 - the harness draws from this generator
    torch.manual_seed(_SEED)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=_SEED)
    limits = [limit for limit in (settings.limit, max_rows) if limit is not None]
    results = evaluate(lm=lm, task_dict=tasks, limit=min(limits, default=None), bootstrap_iters=0, log_samples=False)
    assert results is not None  # noqa: S101 - only other ranks get None
    found = {**results["results"], **results.get("groups", {})}
    return {
        f"{name}/{metric}": value for name in settings.tasks for metric, value in sorted(_metrics(found.get(name, {})))
    }


def _metrics(found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the metrics: `acc,none` becomes acc, `exact_match,strict-match` is kept; standard errors are omitted."""
    for key, value in found.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            yield (metric if kind == "none" else key), float(value)


def _check_names(suite: Suite, metrics: Mapping[str, float]) -> None:
    for name in metrics:
        if len(name) > MAX_METRIC:
            raise InvalidSpecError(
                f"evaluation suite {suite.name}: the name of the score {shortened(name)} has {len(name)} characters,"
                f" more than {MAX_METRIC}: give the task, its metric or its filter a shorter name"
            )


def _check_gates(evaluation: Evaluation, suite: Suite, metrics: Mapping[str, float]) -> None:
    for gate in evaluation.gates or []:
        if gate.suite == suite.name and gate.metric.removesuffix(GAIN) not in metrics:
            raise InvalidSpecError(
                f"a gate of evaluation.gates names {suite.name}/{gate.metric}, which does not exist: the suite has "
                f"{list_names(list(metrics))}, and each of them followed by {GAIN}"
            )
