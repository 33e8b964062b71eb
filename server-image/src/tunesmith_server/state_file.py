"""State of the agent that outlives its process, in files of the state folder."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

State = TypeVar("State", bound=BaseModel)


def read_state(path: Path, empty: State) -> State:
    """Return the state in a file, or `empty` if the file is missing or damaged."""
    try:
        return type(empty).model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return empty
    except (OSError, ValidationError) as error:
        log.warning("%s cannot be read and is replaced: %s", path, type(error).__name__)
        return empty


def write_state(path: Path, state: BaseModel) -> None:
    """Replace the file with a state. A failure is logged: the state is lost with the process then."""
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_text(state.model_dump_json())
        temporary.replace(path)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error.strerror)
