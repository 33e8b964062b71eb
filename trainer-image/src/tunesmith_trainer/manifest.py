"""Read the FineTuneJob manifest, compute its digests, and compare inputs with those that were validated."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import yaml
from pydantic import ValidationError

from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.api.output import Output
from tunesmith_trainer.errors import InvalidSpecError

if TYPE_CHECKING:
    from pathlib import Path

    from tunesmith.api.finetunejob_status import Resolved

_SHOWN_PROBLEMS = 5
_WITHOUT_EFFECT = {
    "resources",
    "scheduling",
    "max_attempts",
    "checkpoint",
    "suspend",
    "active_deadline_seconds",
    "servable",
}
"""Fields of the spec that do not affect the result."""


def load_job(path: Path) -> FineTuneJob:
    """Load the FineTuneJob from a YAML or JSON file.

    Raises:
        InvalidSpecError: the file is missing, is not YAML or is not a valid FineTuneJob.
    """
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InvalidSpecError(f"cannot read the manifest {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidSpecError(f"the manifest {path} is not valid YAML: {error}") from None
    documents = [document for document in documents if document is not None]
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise InvalidSpecError(
            f"the manifest {path} must contain exactly one FineTuneJob, it contains {len(documents)}"
        )
    kind = documents[0].get("kind")
    if kind != "FineTuneJob":
        raise InvalidSpecError(f"the manifest {path} has the kind {kind!r} instead of FineTuneJob")
    try:
        return FineTuneJob.model_validate(documents[0])
    except ValidationError as error:
        raise InvalidSpecError(f"the manifest {path} is not valid: {_problems(error)}") from None


def _problems(error: ValidationError) -> str:
    """Return the problems, such as `spec.method.lora.rank: Input should be greater than or equal to 1 (it is 0)`."""
    lines = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"]) or "manifest"
        text = problem["msg"].removeprefix("Value error, ")
        value = problem.get("input")
        shown = f" (it is {value!r})" if isinstance(value, str | int | float) else ""
        lines.append(f"{where}: {text}{shown}")
    rest = len(lines) - _SHOWN_PROBLEMS
    return "; ".join(lines[:_SHOWN_PROBLEMS]) + (f"; and {rest} more" if rest > 0 else "")


def spec_digest(job: FineTuneJob) -> str:
    """Return `sha256:<64 hex>` of what determines the result: the spec without fields that only affect how it runs."""
    spec = job.spec
    if spec.output is not None:
        # Copies and reports do not affect the result: a job with them and one without produce the same.
        output = spec.output.model_copy(update={"exports": None, "reporting": None})
        spec = spec.model_copy(update={"output": None if output == Output() else output})
    document = spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=_WITHOUT_EFFECT)
    return f"sha256:{hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()}"


def run_digest(job: FineTuneJob, resolved: Resolved) -> str:
    """Return 64 hex digits of what determines a run: the spec, the inputs' content and the length of the run."""
    inputs = resolved.model_dump(
        mode="json", include={"base_model_fingerprint", "dataset_digest", "batch_size", "learning_rate", "total_steps"}
    )
    return hashlib.sha256(json.dumps([spec_digest(job), inputs], sort_keys=True).encode()).hexdigest()


def require_unchanged(what: str, before: str | None, now: str | None) -> None:
    """Raise an error if an input is not the one that was validated.

    Args:
        what: description of the input for the message.
        before: digest of the input in an earlier stage; None if there was no such stage.
        now: digest of the input in this stage.

    Raises:
        InvalidSpecError: the input has changed since.
    """
    if before is not None and before != now:
        raise InvalidSpecError(
            f"the {what} changed since the job was validated (from {before[:19]}… to {str(now)[:19]}…): "
            "create a new FineTuneJob"
        )
