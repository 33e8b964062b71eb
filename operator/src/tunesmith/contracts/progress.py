"""What the trainer serves at `GET /progress`: the ProgressStatus of the API, at most 64 KiB of JSON."""

from __future__ import annotations

from tunesmith.api.finetunejob_status import ProgressStatus

PROGRESS_PORT = 8080
"""Port of the training pod that serves `/progress` and `/metrics`."""
PROGRESS_MAX_BYTES = 65536


def parse_progress(body: bytes) -> ProgressStatus:
    """The progress in a response body.

    Raises:
        ValueError: the body is too large or not of the schema.
    """
    if len(body) > PROGRESS_MAX_BYTES:
        raise ValueError(f"progress has {len(body)} bytes, more than {PROGRESS_MAX_BYTES}")
    return ProgressStatus.model_validate_json(body)
