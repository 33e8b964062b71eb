"""The supervisor of an engine, with a small program as the engine; test_serving_crash.py has a real one."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.server.server_rig import free_port, has_ipv6, wait_until
from tunesmith.contracts.crash import EngineExit
from tunesmith_server import middleware

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

FOLDER = Path(middleware.__path__[0])
TOKEN = "token-of-the-tests"
DIGESTS = ["a" * 8 + f"{number:040x}" for number in range(600)] + ["b" * 8 + "0" * 40]
ENGINE = """
import os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
sys.path.insert(0, {folder!r})
import tunesmith_journal
print("starting", sys.argv[1:], flush=True)
state = os.environ["STATE"]
open(state + "/times", "a").write(os.environ[tunesmith_journal.STARTED_AT] + "\\n")
open(state + "/starts", "a").write(str(os.getpid()) + "\\n")
child = subprocess.Popen([sys.executable, "-c", "import os, time; os.setsid(); time.sleep(1000)"])
open(state + "/children", "a").write(str(child.pid) + "\\n")
if os.path.exists(state + "/fail"):
    sys.stderr.write(open(state + "/fail").read())
    sys.stderr.flush()
    os._exit(3)
journal = tunesmith_journal.Journal()
for digest in {digests!r}:
    journal.begin(digest, "team/pirate@1")
journal.end(journal.begin("c" * 48, "team/poet@1"))
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        status = 503 if os.path.exists(state + "/dead") else 200
        self.send_response(status)
        self.end_headers()
    def log_message(self, *arguments):
        pass
def stop(*_):
    print("stopping", flush=True)
    os._exit(0)
if not os.path.exists(state + "/deaf"):
    signal.signal(signal.SIGTERM, stop)
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1000)
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("tunesmith_supervisor")


class Supervised:
    """A supervisor with its engine, and an agent that collects reports."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder, self.port, self.log = folder, free_port(), folder / "log"
        self.reports: list[EngineExit] = []
        program = folder / "vllm"
        program.write_text(f"#!{sys.executable}\n{ENGINE.format(folder=str(FOLDER), digests=DIGESTS)}")
        program.chmod(0o755)
        (folder / "token").write_text(TOKEN)
        supervised = self

        class Agent(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/engine-exits"
                assert self.headers["Authorization"] == f"Bearer {TOKEN}"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                supervised.reports.append(EngineExit.model_validate_json(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._agent = HTTPServer(("127.0.0.1", 0), Agent)
        threading.Thread(target=self._agent.serve_forever, daemon=True).start()
        self.environment = {
            "PATH": f"{folder}:/bin",
            "STATE": str(folder),
            "TUNESMITH_AGENT_URL": f"http://127.0.0.1:{self._agent.server_port}",
            "TUNESMITH_ADMIN_TOKEN_FILE": str(folder / "token"),
            **variables,
        }
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        command = [sys.executable, "-m", "tunesmith_supervisor", "/models/base", "--port", str(self.port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, cwd=FOLDER, stdout=log, stderr=log, start_new_session=True
            )

    def pids(self, what: str = "starts") -> list[int]:
        path = self.folder / what
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def wait_ready(self, starts: int) -> int:
        """Wait until the engine is ready for the given time, as the supervisor knows it; its process."""
        wait_until(lambda: self.log.read_text().count("vLLM answers") >= starts, f"it is ready; see {self.log}", 30)
        return self.pids()[starts - 1]

    def exit_code(self) -> int:
        wait_until(lambda: self.process.poll() is not None, f"the supervisor exits; see {self.log}", 60)
        return self.process.wait()

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pid in self.pids("children"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._agent.shutdown()
        self._agent.server_close()


@pytest.fixture
def supervised(tmp_path: Path, module: ModuleType) -> Iterator[Supervised]:
    assert module
    rig = Supervised(tmp_path)
    yield rig
    rig.stop()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_engine_is_started_again_at_once_and_reported(supervised: Supervised) -> None:
    supervised.start()
    for kills in range(1, 6):
        pid = supervised.wait_ready(kills)
        os.kill(pid, signal.SIGKILL)
        report = wait_until(lambda kills=kills: supervised.reports[kills - 1 : kills], "it is reported", 30)[0]
        assert (report.reason, report.is_crash) == ("killed by SIGKILL", True)
        supervised.wait_ready(kills + 1)
        # Nothing of the killed engine is left, not even a process in a session of its own.
        assert not is_alive(supervised.pids("children")[kills - 1])
    assert supervised.process.poll() is None
    assert len({report.id for report in supervised.reports}) == 5
    # The agent recognises by the time which engine exited.
    times = [float(line) for line in (supervised.folder / "times").read_text().splitlines()]
    assert [report.started_at for report in supervised.reports] == times[:5]


def test_the_requests_in_the_engine_are_reported_with_a_share_for_each_tenant(supervised: Supervised) -> None:
    supervised.start()
    os.kill(supervised.wait_ready(1), signal.SIGKILL)
    report = wait_until(lambda: supervised.reports[:1], "it is reported", 30)[0]
    digests = [request.digest for request in report.requests]
    assert len(digests) == 256
    assert set(digests[:2]) == {DIGESTS[599], DIGESTS[600]}  # the newest of each tenant
    assert digests[2:] == DIGESTS[598:344:-1]
    assert "c" * 48 not in digests  # it had finished
    assert {request.model for request in report.requests} == {"team/pirate@1"}


def test_an_engine_whose_health_check_fails_is_killed(supervised: Supervised) -> None:
    supervised.start()
    pid = supervised.wait_ready(1)
    (supervised.folder / "dead").touch()
    wait_until(lambda: not is_alive(pid), f"it is killed; see {supervised.log}", 30)
    (supervised.folder / "dead").unlink()
    supervised.wait_ready(2)


def test_an_engine_that_never_starts_ends_the_container_with_its_error(supervised: Supervised) -> None:
    (supervised.folder / "fail").write_text(
        "(EngineCore pid=7) ERROR 11-30 04:05:06 [core.py:9] \x1b[1mTraceback\n"
        "(EngineCore pid=7) ERROR 11-30 04:05:06 [core.py:9] ValueError: No memory; token=abcdefgh, hf_abcdefghijkl\n"
        "(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.\n"
        "bye\n"
    )
    supervised.start()
    assert supervised.exit_code() == 3
    assert len(supervised.pids()) == 3
    last = supervised.log.read_text().splitlines()[-1]
    assert last == "tunesmith: vLLM did not start in 3 attempts (exit code 3): ValueError: No memory; token…, …"
    assert {report.was_ready for report in supervised.reports} == {False}
    assert not any(is_alive(pid) for pid in supervised.pids("children"))


def test_a_failed_start_is_repeated(supervised: Supervised) -> None:
    (supervised.folder / "fail").write_text("ValueError: the GPU is busy\n")
    supervised.start()
    wait_until(lambda: len(supervised.reports) == 1, "a start failed", 30)
    (supervised.folder / "fail").unlink()
    supervised.wait_ready(1)
    os.kill(supervised.pids()[1], signal.SIGKILL)
    supervised.wait_ready(2)
    assert [report.reason for report in supervised.reports] == [
        "exit code 3: ValueError: the GPU is busy",
        "killed by SIGKILL",
    ]


def test_sigterm_reaches_the_engine_and_ends_the_container(supervised: Supervised) -> None:
    supervised.start()
    supervised.wait_ready(1)
    supervised.process.terminate()
    assert supervised.exit_code() == 0
    assert "stopping" in supervised.log.read_text()
    assert not any(is_alive(pid) for pid in supervised.pids() + supervised.pids("children"))
    assert supervised.reports == []


def test_an_engine_that_ignores_sigterm_while_it_starts_is_killed(supervised: Supervised) -> None:
    (supervised.folder / "deaf").touch()
    supervised.start()
    wait_until(lambda: supervised.pids("children"), "it starts", 30)
    supervised.process.terminate()
    assert supervised.exit_code() == 0
    assert not any(is_alive(pid) for pid in supervised.pids())


def test_an_image_without_an_engine_is_reported(supervised: Supervised) -> None:
    (supervised.folder / "vllm").unlink()
    supervised.start()
    assert supervised.exit_code() == 1
    text = supervised.log.read_text()
    assert "vllm cannot be started (No such file or directory)" in text
    assert "Traceback" not in text


def test_it_listens_on_both_address_families(module: ModuleType) -> None:
    assert module.host() == ("::" if has_ipv6() else "0.0.0.0")  # noqa: S104


def test_a_machine_without_ipv6_is_served_on_ipv4(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_arguments: Any) -> Any:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(module.socket, "socket", without)
    assert module.host() == "0.0.0.0"  # noqa: S104


def test_an_address_that_accepts_ipv6_only_is_not_used(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.socket.socket, "getsockopt", lambda *_arguments: 1, raising=False)
    assert module.host() == "0.0.0.0"  # noqa: S104


@pytest.mark.parametrize(
    ("arguments", "port"), [(["--port", "81"], 81), (["--port=82"], 82), (["base"], 8000), (["--port"], 8000)]
)
def test_the_port_of_the_health_check_is_that_of_the_engine(
    module: ModuleType, arguments: list[str], port: int
) -> None:
    assert module.port(arguments) == port


@pytest.mark.parametrize(
    ("line", "reported"),
    [
        ("vllm serve: error: unrecognized arguments: --x", "vllm serve: error: unrecognized arguments: --x"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "torch.OutOfMemoryError: CUDA out of memory."),
        ("INFO 11-30 04:05:06 [loggers.py:1] all is well", ""),
        (f"ValueError: {'x' * 30} " * 40, f"ValueError: {'x' * 30} " * 11),
        ("OSError: https://user:password@host/ and " + "k" * 64, "OSError: https://…@host/ and …"),
        (json.dumps({"a": "Authorization: Bearer abc"}), ""),
    ],
)
def test_the_reported_line_is_an_error_without_secrets(
    module: ModuleType, line: str, reported: str, tmp_path: Path
) -> None:
    output = module.tunesmith_output.Output()
    reader, writer = os.pipe()
    os.write(writer, line.encode() + b"\nlast\n")
    os.close(writer)
    with (tmp_path / "log").open("wb") as log:
        output.copy(reader, log.fileno())
        output.finish(10)
    found = output.error(0.0)
    assert found.startswith(reported)
    assert len(found) <= 500
    assert bool(found) == bool(reported)
    assert output.last_line() == "last"
    assert (tmp_path / "log").read_text() == f"{line}\nlast\n"
