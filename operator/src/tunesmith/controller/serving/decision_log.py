"""Log of the decisions that changed a size, from which `tunesmith simulate --replay` takes them again."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tunesmith.autoscale.record import written

if TYPE_CHECKING:
    from tunesmith.autoscale.decide import Decision

_log = logging.getLogger(__name__)


def log_size(resource: str, before: int | None, decision: Decision) -> None:
    """Log the record of a decision if it changed the size.

    Args:
        resource: kind, namespace and name.
        before: size in the previous status; None: none.
        decision: the decision whose size the status has now.
    """
    if decision.replicas != before and (record := written(resource, decision)) is not None:
        _log.info("%s", record)
