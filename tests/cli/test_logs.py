"""`tunesmith logs` against an API server of two pods, one of which has not started."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest

from tunesmith.cli.main import app

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PODS = "/api/v1/namespaces/team/pods"


def pod(name: str, minute: int) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "team", "creationTimestamp": f"2026-01-01T00:0{minute}:00Z"}}


class Api(BaseHTTPRequestHandler):
    """Answer as an API server does."""

    asked: ClassVar[list[dict[str, list[str]]]]
    pods: ClassVar[list[dict[str, Any]]]

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if parts.path == PODS:
            assert parse_qs(parts.query)["labelSelector"] == ["tunesmith.dev/finetunejob=sail"]
            self._answer(200, json.dumps({"metadata": {}, "items": self.pods}))
        elif parts.path.endswith("/log"):
            self.asked.append(parse_qs(parts.query))
            if parts.path == f"{PODS}/sail-1/log":
                self._answer(400, json.dumps({"reason": "BadRequest", "message": "container is waiting to start"}))
            else:
                self._answer(200, "412 rows\nno \xff end")
        elif parts.path.endswith("/finetunejobs/sail"):
            self._answer(200, json.dumps({"metadata": {"name": "sail", "namespace": "team"}, "spec": {}}))
        else:
            self._answer(404, json.dumps({"reason": "NotFound", "message": "not found"}))

    def _answer(self, status: int, body: str) -> None:
        data = body.encode("latin-1")
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Do not log requests: pytest's output is for failures."""


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Api]]:
    class Ours(Api):
        asked: ClassVar[list[dict[str, list[str]]]] = []
        pods: ClassVar[list[dict[str, Any]]] = [pod("sail-1", 2), pod("sail-validate", 1)]

    server = ThreadingHTTPServer(("127.0.0.1", 0), Ours)
    Thread(target=server.serve_forever, daemon=True).start()
    named = {"clusters": "cluster", "contexts": "context", "users": "user"}
    config: dict[str, Any] = {plural: [{"name": "a", singular: {}}] for plural, singular in named.items()}
    config["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{server.server_port}"}
    config["contexts"][0]["context"] = {"cluster": "a", "user": "a", "namespace": "team"}
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "a", **config}))
    monkeypatch.setenv("KUBECONFIG", str(path))
    yield Ours
    server.shutdown()
    server.server_close()


def test_logs_of_all_pods_are_shown_oldest_first_and_missing_ones_reported(
    api: type[Api], capsys: pytest.CaptureFixture[str]
) -> None:
    app(["logs", "sail", "--follow", "--tail", "5"], standalone_mode=False)
    output, problems = capsys.readouterr()
    assert output == "412 rows\nno \N{REPLACEMENT CHARACTER} end\n"
    assert problems == ("--- pod sail-validate\n--- pod sail-1\npod sail-1 has no log: container is waiting to start\n")
    common = {"container": ["trainer"], "tailLines": ["5"]}
    assert api.asked == [{**common, "follow": ["false"]}, {**common, "follow": ["true"]}]


def test_json_names_the_pod_of_each_line(api: type[Api], capsys: pytest.CaptureFixture[str]) -> None:
    api.pods = [pod("sail-validate", 1)]
    app(["logs", "sail", "-o", "json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out.splitlines()[0]) == {"pod": "sail-validate", "line": "412 rows"}


def test_a_job_without_pods_is_an_error_with_the_next_command(api: type[Api]) -> None:
    api.pods = []
    with pytest.raises(
        Exception, match="is Pending and has no pods in the cluster: `tunesmith get job sail -n team` shows its status"
    ):
        app(["logs", "sail"], standalone_mode=False)
