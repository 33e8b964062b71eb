"""Parser for reports of training pods, which are untrusted: any code that a job runs in its pod can change them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic_core import from_json

if TYPE_CHECKING:
    from tunesmith.api.model import StatusModel

    Report = TypeVar("Report", bound=StatusModel)

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and line feed, characters that reverse the direction of text, and lone surrogates."""


def parse_report(model: type[Report], document: str | bytes) -> Report:
    """Return the report in a JSON document. Control characters in its texts are replaced, so terminals can show them.

    Raises:
        ValueError: the document is not JSON, or does not have the model's fields.
    """
    try:
        parsed = from_json(document, allow_inf_nan=True)
    except ValueError as error:
        raise ValueError(f"the report is not JSON: {error}") from None
    return model.model_validate(_cleaned(parsed))


def printable(text: str) -> str:
    """Return the text with control characters replaced by spaces."""
    return _CONTROLS.sub(" ", text)


def _cleaned(value: Any) -> Any:  # noqa: ANN401 - any JSON document; the parser bounds how deep it is
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {key: _cleaned(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_cleaned(entry) for entry in value]
    return value
