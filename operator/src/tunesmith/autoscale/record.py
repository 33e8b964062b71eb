"""Records of decisions: lines of the operator's log from which a decision can be taken again. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from tunesmith.autoscale.decide import Decision, Inputs, decide

_MARK = '{"decision": '
_INPUTS = TypeAdapter(Inputs)


@dataclass(frozen=True)
class Record:
    """A decision that was taken.

    Attributes:
        resource: kind, namespace and name.
        replicas: the size.
        reason: the reason as a sentence.
        inputs: everything that it depended on.
    """

    resource: str
    replicas: int
    reason: str
    inputs: Inputs

    def again(self) -> Decision:
        """Take the decision again."""
        return decide(self.inputs)


def written(resource: str, decision: Decision) -> str | None:
    """Return the record of a decision as one line; None for a size that is set instead of decided.

    Args:
        resource: kind, namespace and name.
        decision: the decision.
    """
    if decision.inputs is None:
        return None
    line = {
        "decision": resource,
        "replicas": decision.replicas,
        "reason": decision.reason,
        "inputs": _INPUTS.dump_python(decision.inputs, mode="json"),
    }
    return json.dumps(line, ensure_ascii=False)


def read(line: str) -> Record | None:
    """Return the record in a line of a log, whatever precedes it; None if there is none.

    Raises:
        ValueError: the record is damaged, or was written by a release with other inputs.
    """
    start = line.find(_MARK)
    if start < 0:
        return None
    try:
        found = json.loads(line[start:])
        inputs = _INPUTS.validate_python(found["inputs"])
        return Record(str(found["decision"]), int(found["replicas"]), str(found["reason"]), inputs)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"the record has no {error}") from None
