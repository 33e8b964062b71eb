"""Requests to the servers of a pod, whose refusals are answers too."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.server.server_rig import SERVING_TOKEN

if TYPE_CHECKING:
    from http.client import HTTPResponse


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def call(
    url: str, method: str = "GET", body: Any = None, token: str | None = SERVING_TOKEN, timeout: float = 120
) -> Answer:
    try:
        with open_stream(url, method, body, token, timeout) as response:
            return Answer(response.status, dict(response.headers), response.read().decode())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, dict(error.headers), error.read().decode())


def open_stream(
    url: str, method: str, body: Any, token: str | None, timeout: float | None = 120, **more_headers: str
) -> HTTPResponse:
    """A reply that is read as it arrives. `timeout`: seconds of silence; None: any time."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    headers |= {name.replace("_", "-"): value for name, value in more_headers.items()}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310 - of this machine
    response: HTTPResponse = urllib.request.urlopen(request, timeout=timeout)  # noqa: S310
    return response
