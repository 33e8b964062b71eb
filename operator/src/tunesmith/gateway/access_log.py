"""The access log: a line of JSON on stdout for each request, without API keys and without contents."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import UTC, datetime

import orjson


@dataclass(frozen=True, slots=True)
class AccessRecord:
    """A finished request.

    Attributes:
        time: when it ended.
        request_id: the id in the header X-Request-Id of its answer.
        key: name of the API key; empty: none or an invalid one.
        method: HTTP method.
        path: one of the gateway's paths; empty: another one.
        model: global id of the model; empty: the request names no known model.
        engine_name: revision that answered, as the client sees it; empty: none.
        pod: `<namespace>/<name>` of the last pod that got the request; empty: none.
        status: HTTP status of the answer, or 499 if the client closed the connection.
        stream: True if the client requested a stream.
        sequences: number of sequences, choices × prompts.
        seconds: from the request's arrival to the end of its answer.
        first_byte_seconds: from the request's arrival to the first byte of a pod's answer; None: there was none.
        tokens: tokens of prompts and answer, if a pod answered; of an answer that was cut off, an estimate.
    """

    time: datetime
    request_id: str
    key: str
    method: str
    path: str
    model: str
    engine_name: str
    pod: str
    status: int
    stream: bool
    sequences: int
    seconds: float
    first_byte_seconds: float | None
    tokens: int | None

    def line(self) -> bytes:
        """Return the record as a line of JSON; what is empty or not known is left out."""
        fields = {
            "time": self.time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "requestId": self.request_id,
            "key": self.key,
            "method": self.method,
            "path": self.path,
            "model": self.model,
            "revision": self.engine_name,
            "pod": self.pod,
            "status": self.status,
            "stream": self.stream,
            "sequences": self.sequences or None,
            "seconds": round(self.seconds, 4),
            "firstByteSeconds": None if self.first_byte_seconds is None else round(self.first_byte_seconds, 4),
            "tokens": self.tokens,
        }
        return orjson.dumps({name: value for name, value in fields.items() if value not in {None, ""}}) + b"\n"


def write_record(record: AccessRecord) -> None:
    """Write a record to stdout."""
    sys.stdout.buffer.write(record.line())
    sys.stdout.buffer.flush()
