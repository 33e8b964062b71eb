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

_MAX_NAMES = 8
"""Maximum number of names that a message lists."""
_LOCAL_FILE_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
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
    return _load_tasks(suite.model_dump_json(), os.environ.get(LM_EVAL_TASKS, ""), own)


@functools.cache
def _load_tasks(document: str, folder: str, own: SuppliedTasks | None) -> Mapping[str, Any]:
    suite = Suite.model_validate_json(document)
    settings = suite.lm_eval
    assert settings is not None  # noqa: S101 - the caller checks it
    loaded = []
    name = ", ".join(settings.tasks)
    try:
        known = _task_manager(folder) if own is None else _add_supplied_tasks(own, _task_manager(folder), suite)
        for name in settings.tasks:
            _check_task(known, suite, name, own)
            named = known.load([name])
            _set_few_shot_examples(suite, named["tasks"])
            loaded.append(named)
    except TrainerError:
        raise
    except (Exception, SystemExit) as error:
        raise translate_error(suite, name, error, own) from error
    whole: dict[str, Any] = {part: {} for part in ("tasks", "groups", "group_map")}
    for named in loaded:
        if whole["tasks"].keys() & named["tasks"].keys():
            duplicates = ", ".join(sorted(whole["tasks"].keys() & named["tasks"].keys())[:_MAX_NAMES])
            raise InvalidSpecError(
                f"evaluation suite {suite.name}: lmEval.tasks has {duplicates} twice, directly or in a group: keep one"
            )
        for part, entries in named.items():
            whole[part] |= entries
    return whole


def _set_few_shot_examples(suite: Suite, tasks: Mapping[str, Any]) -> None:
    """Set the number of few-shot examples of each task."""
    settings = suite.lm_eval
    assert settings is not None  # noqa: S101 - the caller checks it
    for name, task in tasks.items():
        default = task.get_config("num_fewshot")
        if default == 0 and settings.num_fewshot:
            raise InvalidSpecError(
                f"evaluation suite {suite.name}: the task {name} does not support examples before its questions: "
                "remove lmEval.numFewshot, or move the task to a suite of its own"
            )
        task.set_config(
            key="num_fewshot", value=(default or 0) if settings.num_fewshot is None else settings.num_fewshot
        )


@functools.cache
def _task_manager(folder: str) -> TaskManager:
    """Index the tasks of the harness and the platform, of which the latter take precedence; takes seconds."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    if folder and not Path(folder).is_dir():
        raise InvalidSpecError(
            f"{LM_EVAL_TASKS} is {folder}, which is not a local folder: add it to the trainer's image, or unset the "
            "variable"
        )
    return TaskManager(include_path=folder or None)


def _add_supplied_tasks(own: SuppliedTasks, known: TaskManager, suite: Suite) -> TaskManager:
    """Add the tasks supplied with a job to all others; raise if a name is already taken."""
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    whole = TaskManager(include_path=str(own.path), include_defaults=False)
    duplicates = sorted(whole.task_index.keys() & known.task_index.keys())
    if duplicates:
        raise InvalidSpecError(
            f"evaluation suite {suite.name}: lmEval.taskFolder {own.uri} defines {list_names(duplicates)}, which"
            " lm-evaluation-harness or the platform already defines as a task, a group or a tag: rename it in"
            " the folder"
        )
    whole.task_index.update(known.task_index)
    return whole


def _check_task(known: TaskManager, suite: Suite, name: str, own: SuppliedTasks | None) -> None:
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
            f"{where}: {name} is a tag, which has no score of its own: name the tasks that you want "
            f"instead: {list_names(sorted(entry.tags))}"
        )
    refused = None
    for part in _configs(known, name):
        wrong = part.wrong
        if wrong is not None:
            file = str(part.file)
            raise InvalidSpecError(
                f"{where}: {part.name} in {file if own is None else own.strip_folder(file)} cannot be used: {wrong}"
            )
        refused = refused or part.refused
    if entry.kind is Kind.GROUP and not (entry.cfg or {}).get("aggregate_metric_list"):
        members = [
            member if isinstance(member, str) else str(member.get("task"))
            for member in (entry.cfg or {}).get("task", [])
        ]
        raise InvalidSpecError(
            f"{where}: {name} is a group without a score of its own: name the tasks that you want "
            f"instead: {list_names(members)}"
        )
    if refused is not None:
        raise InvalidSpecError(f"{where}: the task {name} {refused}, which is not allowed: remove it")


@dataclass(frozen=True)
class _TaskPart:
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
    around: tuple[_TaskPart, ...] = ()

    @property
    def wrong(self) -> str | None:
        """Description of what the harness would reject, with the fix; None if it is valid."""
        metrics, options, members = (self.config.get(key) for key in ("metric_list", "dataset_kwargs", "task"))
        if any(part.config is self.config for part in self.around):
            chain = list_names([part.name for part in (*self.around, self)])
            return f"it is a member of itself ({chain}): remove the name that refers back to it from the list task"
        if metrics is not None and not _is_list_of(metrics, dict):
            return "metric_list must be a list of mappings: write each metric as - {metric: acc}"
        if options is not None and not isinstance(options, dict):
            return "dataset_kwargs must be a mapping: write each option as name: value"
        grouped = "group" in self.config and "class" not in self.config and members is not None
        if grouped and not _is_list_of(members, str | dict):
            return "the task of a group must be a list of names: write task: [first, second]"
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


def _is_list_of(values: object, kind: type | UnionType) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _configs(known: TaskManager, name: str, around: tuple[_TaskPart, ...] = ()) -> Iterator[_TaskPart]:
    """Yield the configurations of a task, or of a group or tag and its members, but no members of an invalid one."""
    entry = known.task_index.get(name)
    if entry is None:
        return
    if entry.cfg is not None:
        yield from _with_members(known, _TaskPart(name, entry.yaml_path, entry.cfg, around))
        return
    for member in sorted(entry.tags):
        yield from _configs(known, member, around)


def _with_members(known: TaskManager, part: _TaskPart) -> Iterator[_TaskPart]:
    """Yield a part and its members, which are either named or defined inline."""
    yield part
    inner = part.config.get("task")
    if part.wrong is not None or not isinstance(inner, list):
        return
    around = (*part.around, part)
    for member in inner:
        names = [member]
        if isinstance(member, dict):
            yield from _with_members(known, replace(part, config=member, around=around))
            names = [member.get("group"), member.get("task")]  # an inline definition overrides the task of that name
        for name in names:
            if isinstance(name, str):
                yield from _configs(known, name, around)


def translate_error(suite: Suite, name: str, error: BaseException, own: SuppliedTasks | None = None) -> TrainerError:
    """Translate the error; for an error in a job's own Python, include its file and line."""
    where = f"evaluation suite {suite.name}: the task {name}"
    refused = denied(error, where)
    if refused is not None:
        return refused
    message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    location = None
    if own is not None:
        location, message = own.locate_error(error), own.strip_folder(message)
    if location is not None:
        if isinstance(error, OSError) and not isinstance(error, _LOCAL_FILE_ERRORS):
            return StorageUnavailableError(f"{where} needs a server that cannot be reached: {location}")
        return InvalidSpecError(f"{where} cannot be used: {location}")
    if isinstance(error, FileNotFoundError):
        return DatasetNotFoundError(
            f"{where} has no data: {message}; a data set on the Hub that requires a login cannot be used"
        )
    if isinstance(error, OSError):
        return StorageUnavailableError(
            f"{where} needs its data from the Hugging Face Hub: {message}; let the pod connect to it, or remove "
            "the task"
        )
    if isinstance(error, ImportError) and own is not None:
        return InvalidSpecError(
            f"{where} imports Python that is neither in lmEval.taskFolder, next to its YAML, nor in the trainer's "
            f"image: {message}"
        )
    if isinstance(error, ImportError):
        return InvalidSpecError(f"{where} needs a package that the trainer's image does not have: {message}")
    return InvalidSpecError(f"{where} cannot be used: {type(error).__name__}: {message}")


def list_names(names: list[str]) -> str:
    """List the names, or the first of them and the number of the others."""
    rest = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")
