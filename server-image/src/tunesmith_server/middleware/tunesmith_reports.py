"""Reports of an engine's exits to the agent: `POST /v1/engine-exits`. Standard library only."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

AGENT_URL = "TUNESMITH_AGENT_URL"
ADMIN_TOKEN_FILE = "TUNESMITH_ADMIN_TOKEN_FILE"  # noqa: S105 - a variable's name
PATH = "/v1/engine-exits"
_MAX_WAITING = 16
_RETRY_SECONDS = 1.0
_ANSWER_SECONDS = 5.0


class Reports:
    """Reports that are sent in the background, in order, until the agent accepts them; the oldest are dropped."""

    def __init__(self) -> None:
        self._url = urlsplit(os.environ.get(AGENT_URL, ""))
        self._waiting: deque[dict[str, Any]] = deque(maxlen=_MAX_WAITING)
        self._added = threading.Event()
        if self._url.hostname:
            threading.Thread(target=self._run, daemon=True).start()

    def send(self, report: dict[str, Any]) -> None:
        """Send a report soon."""
        self._waiting.append(report)
        self._added.set()

    def _run(self) -> None:
        while True:
            self._added.wait()
            self._added.clear()
            while self._waiting:
                report = self._waiting[0]
                if not self._post(report):
                    time.sleep(_RETRY_SECONDS)
                elif self._waiting and self._waiting[0] is report:
                    self._waiting.popleft()

    def _post(self, report: dict[str, Any]) -> bool:
        """Return False if the agent cannot accept the report now."""
        connection = HTTPConnection(self._url.hostname or "", self._url.port, timeout=_ANSWER_SECONDS)
        try:
            token = Path(os.environ[ADMIN_TOKEN_FILE]).read_text().strip()
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            connection.request("POST", PATH, json.dumps(report), headers)
            return connection.getresponse().status < 500  # noqa: PLR2004 - a refused report is not sent again
        except (OSError, HTTPException, KeyError):
            return False
        finally:
            connection.close()
