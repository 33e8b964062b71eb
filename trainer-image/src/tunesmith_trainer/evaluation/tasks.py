"""Tasks of lm-evaluation-harness, of the platform, and of the job if it may supply any.

Code from elsewhere is never run: no metrics from the Hub, no tasks marked as unsafe, no tasks given by path.
"""

from __future__ import annotations

import difflib
import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.api.evaluation import Suite
from tunesmith.contracts.environment import LM_EVAL_TASKS
from tunesmith_trainer.connections import denied
from tunesmith_trainer.errors import DatasetNotFoundError, InvalidSpecError, StorageUnavailableError, TrainerError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import UnionType

    from lm_eval.tasks import TaskManager

    from tunesmith_trainer.evaluation.folders import SuppliedTasks

_NAMED = 8
"""Maximum number of names that a message lists."""
_OF_FILES = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
"""Errors of local files, which another attempt does not fix."""


def tasks_of(suite: Suite, own: SuppliedTasks | None = None) -> Mapping[str, Any]:
    """Load the tasks of a suite with their data, in the form that the harness's `evaluate` takes.

    The process that checked a suite does not need the Hub again to score it.

    Args:
        suite: suite with `lmEval`.
        own: folder of tasks supplied with it.

    Raises:
        InvalidSpecError: a task does not exist or cannot be used.
        DatasetNotFoundError: a task's data does not exist.
        StorageUnavailableError: the Hub cannot be reached.
    """
    return _built(suite.model_dump_json(), os.environ.get(LM_EVAL_TASKS, ""), own)


@functools.cache
def _built(document: str, folder: str, own: SuppliedTasks | None) -> Mapping[str, Any]:
    suite = Suite.model_validate_json(document)
    asked = suite.lm_eval
    assert asked is not None  # noqa: S101 - the caller has looked
    built = []
    name = ", ".join(asked.tasks)
    try:
        known = _known(folder) if own is None else _with(own, _known(folder), suite)
        for name in asked.tasks:
            _refuse(known, suite, name, own)
            one = known.load([name])
            _answer_first(suite, one["tasks"])
            built.append(one)
    except TrainerError:
        raise
    except (Exception, SystemExit) as error:
        raise unusable(suite, name, error, own) from error
    whole: dict[str, Any] = {part: {} for part in ("tasks", "groups", "group_map")}
    for one in built:
        if whole["tasks"].keys() & one["tasks"].keys():
            twice = ", ".join(sorted(whole["tasks"].keys() & one["tasks"].keys())[:_NAMED])
            raise InvalidSpecError(
                f"evaluation suite {suite.name}: lmEval.tasks has {twice} twice, by itself or in a group: keep one"
            )
        for part, named in one.items():
            whole[part] |= named
    return whole


def _answer_first(suite: Suite, tasks: Mapping[str, Any]) -> None:
    """Set the number of few-shot examples of each task."""
    asked = suite.lm_eval
    assert asked is not None  # noqa: S101 - the caller has looked
    for name, task in tasks.items():
        usual = task.get_config("num_fewshot")
        if usual == 0 and asked.num_fewshot:
            raise InvalidSpecError(
                f"evaluation suite {suite.name}: the task {name} is made for no examples before its questions: remove "
                "lmEval.numFewshot, or give the task a suite of its own"
            )
        task.set_config(key="num_fewshot", value=(usual or 0) if asked.num_fewshot is None else asked.num_fewshot)


@functools.cache
def _known(folder: str) -> TaskManager:
    """Index the tasks of the harness and the platform, of which the latter take precedence; takes seconds."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    if folder and not Path(folder).is_dir():
        raise InvalidSpecError(
            f"{LM_EVAL_TASKS} is {folder}, which is no folder here: the trainer's image must have it, or unset it"
        )
    return TaskManager(include_path=folder or None)


def _with(own: SuppliedTasks, known: TaskManager, suite: Suite) -> TaskManager:
    """Add the tasks supplied with a job to all others; raise if a name is already taken."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    whole = TaskManager(include_path=str(own.path), include_defaults=False)
    twice = sorted(whole.task_index.keys() & known.task_index.keys())
    if twice:
        raise InvalidSpecError(
            f"evaluation suite {suite.name}: lmEval.taskFolder {own.uri} defines {few(twice)}, which"
            " lm-evaluation-harness or the platform has under the same name (of a task, a group or a tag): rename it in"
            " the folder"
        )
    whole.task_index.update(known.task_index)
    return whole


def _refuse(known: TaskManager, suite: Suite, name: str, own: SuppliedTasks | None) -> None:
    """Raise if the task is unknown, is malformed, has no score, or would run code from elsewhere."""
    from lm_eval.tasks._index import Kind  # noqa: PLC0415

    index = known.task_index
    where = f"evaluation suite {suite.name}"
    entry = index.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, map(str, index), n=1)
        raise InvalidSpecError(
            f"{where}: no task of lm-evaluation-harness is named {name}"
            + (f"; did you mean {near[0]}?" if near else ": `lm_eval ls tasks` lists them")
        )
    if entry.kind is Kind.TAG:
        raise InvalidSpecError(
            f"{where}: {name} is a tag, which has no score of its own: name of its tasks those that you want: "
            f"{few(sorted(entry.tags))}"
        )
    refused = None
    for part in _configs(known, name):
        wrong = part.wrong
        if wrong is not None:
            file = str(part.file)
            raise InvalidSpecError(
                f"{where}: {part.name} in {file if own is None else own.within(file)} cannot be used: {wrong}"
            )
        refused = refused or part.refused
    if entry.kind is Kind.GROUP and not (entry.cfg or {}).get("aggregate_metric_list"):
        members = [one if isinstance(one, str) else str(one.get("task")) for one in (entry.cfg or {}).get("task", [])]
        raise InvalidSpecError(
            f"{where}: {name} is a group without a score of its own: name of its tasks those that you want: "
            f"{few(members)}"
        )
    if refused is not None:
        raise InvalidSpecError(f"{where}: the task {name} {refused}, which is not done here: leave it out")


@dataclass(frozen=True)
class _Part:
    """Configuration of a task, a group, or a member of a group.

    Args:
        name: name of the task or group in whose file it appears.
        file: path of that file.
        config: content of the configuration.
        around: groups that contain it, the outermost first.
    """

    name: str
    file: Path | None
    config: Mapping[str, Any]
    around: tuple[_Part, ...] = ()

    @property
    def wrong(self) -> str | None:
        """Description of what the harness would reject, with the fix; None if it is valid."""
        metrics, options, members = (self.config.get(key) for key in ("metric_list", "dataset_kwargs", "task"))
        if any(one.config is self.config for one in self.around):
            chain = few([one.name for one in (*self.around, self)])
            return f"it is a member of itself ({chain}): take the name that leads back to it out of the list task"
        if metrics is not None and not _are(metrics, dict):
            return "metric_list must be a list of mappings: write each metric as - {metric: acc}"
        if options is not None and not isinstance(options, dict):
            return "dataset_kwargs must be a mapping: write each option as name: value"
        grouped = "group" in self.config and "class" not in self.config and members is not None
        if grouped and not _are(members, str | dict):
            return "the task of a group must be a list of names: write task: [one, other]"
        return None

    @property
    def refused(self) -> str | None:
        """Description of the part that runs code from elsewhere; None if there is none."""
        if self.config.get("unsafe_code"):
            return "runs what the model writes"
        if (self.config.get("dataset_kwargs") or {}).get("trust_remote_code"):
            return "runs code that comes with its data"
        if any(metric.get("hf_evaluate") for metric in self.config.get("metric_list") or []):
            return "has a metric whose code comes from the Hub"
        return None


def _are(values: object, kind: type | UnionType) -> bool:
    return isinstance(values, list) and all(isinstance(one, kind) for one in values)


def _configs(known: TaskManager, name: str, around: tuple[_Part, ...] = ()) -> Iterator[_Part]:
    """Yield the configurations of a task, or of a group or tag and its members, but no members of an invalid one."""
    entry = known.task_index.get(name)
    if entry is None:
        return
    if entry.cfg is not None:
        yield from _within(known, _Part(name, entry.yaml_path, entry.cfg, around))
        return
    for one in sorted(entry.tags):
        yield from _configs(known, one, around)


def _within(known: TaskManager, part: _Part) -> Iterator[_Part]:
    """Yield a part and its members, which are either named or defined inline."""
    yield part
    inner = part.config.get("task")
    if part.wrong is not None or not isinstance(inner, list):
        return
    around = (*part.around, part)
    for one in inner:
        names = [one]
        if isinstance(one, dict):
            yield from _within(known, replace(part, config=one, around=around))
            names = [one.get("group"), one.get("task")]  # an inline definition overrides the task of that name
        for name in names:
            if isinstance(name, str):
                yield from _configs(known, name, around)


def unusable(suite: Suite, name: str, error: BaseException, own: SuppliedTasks | None = None) -> TrainerError:
    """Translate the error; for an error in a job's own Python, include its file and line."""
    where = f"evaluation suite {suite.name}: the task {name}"
    refused = denied(error, where)
    if refused is not None:
        return refused
    told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    blamed = None
    if own is not None:
        blamed, told = own.blamed(error), own.within(told)
    if blamed is not None:
        if isinstance(error, OSError) and not isinstance(error, _OF_FILES):
            return StorageUnavailableError(f"{where} needs a server that cannot be reached: {blamed}")
        return InvalidSpecError(f"{where} cannot be used: {blamed}")
    if isinstance(error, FileNotFoundError):
        return DatasetNotFoundError(
            f"{where} has no data: {told}; a data set on the Hub that asks for a sign-in cannot be used"
        )
    if isinstance(error, OSError):
        return StorageUnavailableError(
            f"{where} needs its data from the Hugging Face Hub: {told}; let the pod reach it, or leave the task out"
        )
    if isinstance(error, ImportError) and own is not None:
        return InvalidSpecError(
            f"{where} names Python that is neither in lmEval.taskFolder, beside its YAML, nor in the trainer's image:"
            f" {told}"
        )
    if isinstance(error, ImportError):
        return InvalidSpecError(f"{where} needs a package that the trainer's image does not have: {told}")
    return InvalidSpecError(f"{where} cannot be used here: {type(error).__name__}: {told}")


def few(names: list[str]) -> str:
    """List the names, or the first of them and the number of the others."""
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
