"""Fetch, hash and check folders with evaluation tasks supplied with a job. They contain code, which is run."""

from __future__ import annotations

import hashlib
import shutil
import traceback
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tunesmith_trainer.errors import DatasetNotFoundError, InvalidSpecError
from tunesmith_trainer.manifest import require_unchanged
from tunesmith_trainer.store import file_sha256

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tunesmith.api.evaluation import Evaluation, Suite
    from tunesmith.storage.folder import Folder
    from tunesmith_trainer.store import Stores

_MAX_FILES = 5000
_NOT_TASKS = frozenset({"__pycache__"})
"""Folders that are skipped, in addition to those whose names begin with a dot."""


class TaskCode(StrEnum):
    """Permission to run tasks supplied with a job."""

    ALLOWED = "Allowed"
    REFUSED = "Refused"
    REFUSED_LOCALLY = "RefusedLocally"
    """Refused in a local run, whose user can allow it."""


@dataclass(frozen=True)
class SuppliedTasks:
    """A local copy of a folder of tasks.

    Args:
        path: path of the copy, with symbolic links resolved.
        uri: URI of the original folder.
        digest: `sha256:<64 hex>` of the names and the content of its files.
    """

    path: Path
    uri: str
    digest: str

    def locate_error(self, error: BaseException) -> str | None:
        """Return file, line and message of an error raised in the folder's Python; None for any other error."""
        for cause in _causes(error):
            kind = type(cause).__name__
            if isinstance(cause, SyntaxError) and cause.filename and Path(cause.filename).is_relative_to(self.path):
                return f"{self.strip_folder(cause.filename)} line {cause.lineno}: {kind}: {cause.msg}"
            frames = traceback.extract_tb(cause.__traceback__)
            inside = [frame for frame in frames if Path(frame.filename).is_relative_to(self.path)]
            if inside:
                message = self.strip_folder(" ".join(str(cause).split())[:300])
                what = f"{kind}: {message}" if message else kind
                return f"{self.strip_folder(inside[-1].filename)} line {inside[-1].lineno}: {what}"
        return None

    def strip_folder(self, text: str) -> str:
        """Replace the paths of the folder's files in a text by their paths within the folder."""
        return text.replace(f"{self.path}/", "").replace(str(self.path), "the folder")


def check_permission(evaluation: Evaluation | None, code: TaskCode) -> None:
    """Raise unless the job may run the tasks supplied with it; called before any of them are fetched.

    Raises:
        InvalidSpecError: the job supplies tasks, and may not run them.
    """
    for suite, uri in _task_folders(evaluation):
        what = f"evaluation suite {suite.name}: lmEval.taskFolder {uri} contains code that would be run"
        if code is TaskCode.REFUSED_LOCALLY:
            raise InvalidSpecError(
                f"{what} on this machine: read it and pass --allow-task-code if you trust it, or remove taskFolder"
            )
        if code is TaskCode.REFUSED:
            raise InvalidSpecError(
                f"{what} in the trainer's pods, which this installation does not allow: ask whoever installed"
                " Tunesmith to set the chart's value trainer.allowTaskFolders, or remove taskFolder"
            )


def fetch(evaluation: Evaluation, stores: Stores, work: Path, validated: Mapping[str, str]) -> dict[str, SuppliedTasks]:
    """Fetch the tasks supplied with each suite and read their YAML; return them by suite.

    Args:
        evaluation: all suites.
        stores: opens the folders.
        work: local folder for the copies.
        validated: digests of the folders that an earlier stage has checked, by suite; no other content is run.

    Raises:
        InvalidSpecError: a file is not what lm-evaluation-harness expects, or a folder changed since it was validated.
        DatasetNotFoundError: the folder does not exist, or has no YAML file.
        TrainerError: the store cannot be read.
    """
    found = {}
    for suite, uri in _task_folders(evaluation):
        where = f"evaluation suite {suite.name}: lmEval.taskFolder {uri}"
        assert suite.lm_eval is not None  # noqa: S101 - only those are wanted
        assert suite.lm_eval.task_folder is not None  # noqa: S101 - only those are wanted
        reference = suite.lm_eval.task_folder.secret_ref
        what = f"the task folder of evaluation suite {suite.name}"
        secret = reference.name if reference is not None else None
        folder = stores.folder(uri.rstrip("/"), what=what, missing=DatasetNotFoundError, secret=secret)
        target = (work / suite.name).resolve()
        shutil.rmtree(target, ignore_errors=True)  # left by an earlier container of this pod
        own = SuppliedTasks(target, uri, _copy(folder, target, where))
        require_unchanged(f"task folder {uri} of evaluation suite {suite.name}", validated.get(suite.name), own.digest)
        _check(own, where)
        found[suite.name] = own
    return found


def _task_folders(evaluation: Evaluation | None) -> Iterator[tuple[Suite, str]]:
    for suite in (evaluation.suites or []) if evaluation is not None else []:
        if suite.lm_eval is not None and suite.lm_eval.task_folder is not None:
            yield suite, suite.lm_eval.task_folder.uri


def _copy(folder: Folder, target: Path, where: str) -> str:
    """Copy all files and return the digest of the copies."""
    if folder.local is not None:
        links = [path.relative_to(folder.local) for path in folder.local.rglob("*") if path.is_symlink()]
        included = [str(path) for path in links if _is_included(path.as_posix())]
        if included:
            raise InvalidSpecError(f"{where}: {min(included)} is a link: replace it with a copy of its target")
    paths = [path for path in folder.below() if _is_included(path)]
    if not any(path.endswith(".yaml") for path in paths):
        raise DatasetNotFoundError(
            f"{where} has no task: neither it nor a folder below it has a file that ends with .yaml; check the uri"
        )
    if len(paths) > _MAX_FILES:
        raise InvalidSpecError(
            f"{where} has {len(paths)} files, more than {_MAX_FILES}: name a folder that contains only the tasks"
        )
    digest = hashlib.sha256()
    for path in paths:
        *parents, name = path.split("/")
        source = folder
        for parent in parents:
            source = source.child(parent)
        copy = target.joinpath(*parents, name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        source.download(name, copy)
        digest.update(f"{file_sha256(copy)}  {path}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _is_included(path: str) -> bool:
    return not any(part.startswith(".") or part in _NOT_TASKS for part in path.split("/"))


def _check(own: SuppliedTasks, where: str) -> None:
    """Read all YAML files: for one that it cannot read, the harness only reports that there is no such task."""
    names: dict[str, Path] = {}
    for path in sorted(own.path.rglob("*.yaml")):
        config = _read(own, path, where, ())
        name = config.get("task") if "class" in config else config.get("group", config.get("task"))
        if name is None:
            continue  # a file that others include
        if not isinstance(name, str):
            raise InvalidSpecError(
                f"{where}: {own.strip_folder(str(path))}: a task or a group needs a name: write task: name, or"
                " group: name next to the list task"
            )
        tags = config.get("tag", [])
        if not all(isinstance(tag, str) for tag in (tags if isinstance(tags, list) else [tags])):
            raise InvalidSpecError(
                f"{where}: {own.strip_folder(str(path))}: tag must be a name or a list of names: "
                "write tag: [first, second]"
            )
        if name in names:
            raise InvalidSpecError(
                f"{where}: {own.strip_folder(str(names[name]))} and {own.strip_folder(str(path))} both define {name}: "
                "rename one"
            )
        names[name] = path


def _read(own: SuppliedTasks, path: Path, where: str, around: tuple[Path, ...]) -> dict[str, Any]:
    """Return a YAML file merged with those that it includes, its functions not loaded."""
    from lm_eval.tasks._yaml_loader import load_yaml  # noqa: PLC0415

    name = own.strip_folder(str(path))
    try:
        config: dict[str, Any] = load_yaml(path, resolve_func=False, recursive=False)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise InvalidSpecError(f"{where}: {name}{line} is not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        message = own.strip_folder(" ".join(str(error).split())[:300])
        raise InvalidSpecError(f"{where}: {name} is not the YAML of a task: {message}") from None
    included: dict[str, Any] = {}
    includes = config.get("include", [])
    for include in includes if isinstance(includes, list) else [includes]:
        inner = (path.parent / str(include)).resolve()
        if not inner.is_relative_to(own.path) or not inner.is_file():
            raise InvalidSpecError(f"{where}: {name} includes {include}, which is not a file of the folder: add it")
        if inner in (*around, path):
            raise InvalidSpecError(f"{where}: {name} includes {include}, which includes {name}: remove one of the two")
        included |= _read(own, inner, where, (*around, path))
    return included | config


def _causes(error: BaseException) -> list[BaseException]:
    """Return the error and the chain of its causes."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return chain
