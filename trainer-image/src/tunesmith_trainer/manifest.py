"""Read the FineTuneJob manifest, compute its digests, and compare inputs with those that were validated."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from tunesmith.api.manifest import ManifestError, parse_manifest
from tunesmith.api.output import Output
from tunesmith_trainer.errors import InvalidSpecError

if TYPE_CHECKING:
    from pathlib import Path

    from tunesmith.api.finetunejob import FineTuneJob
    from tunesmith.api.finetunejob_status import Resolved

_WITHOUT_EFFECT = {
    "resources",
    "scheduling",
    "max_attempts",
    "checkpoint",
    "suspend",
    "active_deadline_seconds",
    "ttl_seconds_after_finished",
    "servable",
}
"""Fields of the spec that do not affect the result."""


def load_job(path: Path) -> FineTuneJob:
    """Load the FineTuneJob from a YAML or JSON file.

    Raises:
        InvalidSpecError: the file cannot be read, or the API server would refuse the manifest.
    """
    try:
        return parse_manifest(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSpecError(f"cannot read the manifest {path}: {error}") from None
    except ManifestError as error:
        raise InvalidSpecError("\n".join(f"{path}: {problem}" for problem in error.problems)) from None


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
    start = [] if resolved.continued_from is None else [resolved.continued_from.digest]
    return hashlib.sha256(json.dumps([spec_digest(job), inputs, *start], sort_keys=True).encode()).hexdigest()


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
