"""Texts of other users and programs: they neither control the reader's terminal nor break a command."""

from __future__ import annotations

import io
import json
import os
import pty
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from aiohttp import ClientTimeout

from tunesmith.cli.errors import CliError
from tunesmith.cli.main import app
from tunesmith.cli.output import print_json, print_table, visible
from tunesmith.cluster.errors import InvalidError, UnavailableError
from tunesmith.cluster.resources import resource_of

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = Path(sys.executable).with_name("tunesmith")
NOW = "2026-01-01T00:00:00Z"
HOSTILE = "\x1b]0;title\x07\x1b[2J \x9b31m \u202edetrever [/red] [bold]no\nNext: rm -rf ümlaut 漢"
JOBS = "/apis/tunesmith.dev/v1alpha1/namespaces/team/finetunejobs"


def job(name: str, **changes: Any) -> dict[str, Any]:
    failed = {"type": "Failed", "status": "True", "reason": "UserError", "message": HOSTILE, "lastTransitionTime": NOW}
    return {
        "apiVersion": "tunesmith.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": "team", "uid": "u", "generation": 1, "creationTimestamp": NOW},
        "spec": {
            "baseModel": {"uri": "hf://a/b"},
            "dataset": {"train": [{"uri": "s3://b/rows.jsonl"}]},
            "method": {"lora": {"rank": 8}},
        },
        "status": {"phase": "Failed", "conditions": [failed]},
        **changes,
    }


class Api(BaseHTTPRequestHandler):
    """Answer as an API server does whose objects have hostile texts."""

    def do_GET(self) -> None:
        path, query = urlsplit(self.path).path, urlsplit(self.path).query
        if path == JOBS and "watch=" in query:
            self._answer(200, {"type": "ADDED", "object": job("new", spec={"later": "field"})})
        elif path == JOBS:
            items = [job("new", spec={})] if "metadata.name" in query else [job("sail")]
            self._answer(200, {"metadata": {"resourceVersion": "1"}, "items": items})
        elif path == f"{JOBS}/sail":
            self._answer(200, job("sail"))
        elif path == f"{JOBS}/denied":
            self._answer(403, {"reason": "Forbidden", "message": HOSTILE})
        else:
            self._answer(404, {"reason": "NotFound", "message": "not found"})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        kind = self.path.split("/")[1]
        event = {
            "cut": json.dumps({"choices": [{"delta": {"content": "half"}}]}),
            "garbage": "{nope",
            "list": "[1]",
            "null": "null",
            "numbers": '{"choices": [5]}',
        }[kind]
        self._send(200, f"data: {event}\n\n".encode())

    def _answer(self, status: int, document: object) -> None:
        self._send(status, json.dumps(document).encode())

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Do not log requests: pytest's output is for failures."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    Thread(target=server.serve_forever, daemon=True).start()
    named = {"clusters": "cluster", "contexts": "context", "users": "user"}
    config: dict[str, Any] = {plural: [{"name": "a", singular: {}}] for plural, singular in named.items()}
    config["clusters"][0]["cluster"] = {"server": f"http://127.0.0.1:{server.server_port}"}
    config["contexts"][0]["context"] = {"cluster": "a", "user": "a", "namespace": "team"}
    path = tmp_path_factory.mktemp("home") / "kubeconfig"
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "a", **config}))
    yield {**os.environ, "KUBECONFIG": str(path)}
    server.shutdown()
    server.server_close()


def tunesmith(environment: dict[str, str], *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, *arguments],
        env=environment | variables,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=120,
        check=False,
    )


def test_control_characters_are_shown_as_escapes() -> None:
    shown = visible(HOSTILE)
    assert shown.startswith(r"\x1b]0;title\x07\x1b[2J \x9b31m \u202edetrever")
    assert shown.endswith("\nNext: rm -rf ümlaut 漢")
    assert visible("a\tb\r\nc\rd\ud83d") == "a\tb\nc\\rd\\ud83d"


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("list", "jobs"), 0, r"\x1b]0;title"),
        (("get", "job", "sail"), 0, r"\x1b]0;title"),
        (("get", "job", "denied"), 1, r"\x1b]0;title"),
        (("wait", "job", "sail-2"), 1, "does not fit this release of tunesmith"),
    ],
    ids=["list", "get", "a denied request", "a job of another release"],
)
def test_no_text_of_the_cluster_controls_the_terminal_or_forges_a_line(
    environment: dict[str, str], arguments: tuple[str, ...], code: int, expected: str
) -> None:
    done = tunesmith(environment, *arguments)
    assert done.returncode == code
    assert expected in done.stdout + done.stderr
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(done.stdout + done.stderr)
    assert "\nNext: rm" not in done.stdout + done.stderr
    assert "a bug in tunesmith" not in done.stderr


def test_a_table_on_a_terminal_shows_brackets_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = pty.openpty()
    with open(writer, "w", encoding="utf-8", closefd=True) as terminal, open(reader, "rb", closefd=True) as shown:  # noqa: PTH123 - descriptors
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setenv("COLUMNS", "200")
        print_table(("NAME", "MESSAGE"), [("a", HOSTILE)], empty="")
        terminal.flush()
        text = os.read(shown.fileno(), 65536).decode()
    assert "[/red] [bold]no Next: rm" in text
    assert "\x1b[2J" not in text


def test_characters_that_the_locale_lacks_are_shown_as_escapes(environment: dict[str, str]) -> None:
    ascii_locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = tunesmith(environment, "get", "job", "sail", **ascii_locale)
    assert (done.returncode, r"\u6f22" in done.stdout) == (0, True), done.stderr
    done = tunesmith(environment, "get", "job", "sail", "-o", "json", **ascii_locale)
    assert json.loads(done.stdout)["status"]["conditions"][0]["message"] == HOSTILE


def test_json_is_valid_in_every_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding="ascii"))
    print_json({"a": "é😀\ud83d"})
    assert json.loads(stream.getvalue()) == {"a": "é😀\ud83d"}


def test_a_full_disk_is_not_reported_as_a_bug(environment: dict[str, str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [PROGRAM, "get", "job", "sail"],
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


@pytest.mark.parametrize("kind", ["cut", "garbage", "list", "null", "numbers"])
def test_an_answer_that_is_not_whole_or_not_a_gateways_is_an_error(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("TUNESMITH_API_KEY", "sk-key")
    server = json.loads(Path(environment["KUBECONFIG"]).read_text())["clusters"][0]["cluster"]["server"]
    expected = "the answer is incomplete" if kind == "cut" else "does not answer like a gateway"
    with pytest.raises(CliError, match=expected):
        app(["chat", "m", "-m", "q", "--url", f"{server}/{kind}"], standalone_mode=False)


@pytest.mark.parametrize("name", ["", ".", "..", "../pods/x", "sail/status", "sail%2Fstatus"])
def test_a_name_is_never_the_path_of_something_else(name: str) -> None:
    with pytest.raises(InvalidError, match="cannot be the name of a FineTuneJob"):
        resource_of("FineTuneJob").path("team", name)
    with pytest.raises(InvalidError, match="cannot be the name of a Namespace"):
        resource_of("FineTuneJob").path(name, "sail")


def test_a_name_is_never_a_query() -> None:
    path = resource_of("FineTuneJob").path("team", "sail?dryRun=All#x")
    assert path == f"{JOBS}/sail%3FdryRun%3DAll%23x"


def test_a_silent_api_server_is_named_with_the_timeout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "a",
            "clusters": [{"name": "a", "cluster": {"server": f"http://127.0.0.1:{silent.getsockname()[1]}"}}],
            "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
            "users": [{"name": "a", "user": {}}],
        }
        (tmp_path / "kubeconfig").write_text(json.dumps(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        monkeypatch.setattr("tunesmith.cluster.client._REQUEST_TIMEOUT", ClientTimeout(total=0.1))
        with pytest.raises(UnavailableError, match="cannot be reached: TimeoutError"):
            app(["list", "jobs"], standalone_mode=False)
