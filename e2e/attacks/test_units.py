"""Faults that are tested without a cluster: runs their tests together and lists the outcome by row."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET  # the file is pytest's own
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest

from e2e.installation import REPOSITORY

if TYPE_CHECKING:
    from e2e.attacks.trial import Outcome

PYTHON = {
    "operator": sys.executable,
    "agent": REPOSITORY / "server-image/.venv/bin/python",
    "trainer": REPOSITORY / "trainer-image/.venv/bin/python",
}
Results = dict[tuple[str, str], str]
"""Failure by module and test; empty if it passed."""


def unit(row: str, fault: str, project: str, *tests: str) -> Any:  # noqa: ANN401 - a pytest.param
    """Return a case: the tests (`path` or `path::name`) that show that the fault does no harm."""
    name = tests[0].rpartition("::")[2].removeprefix("tests/").removeprefix("test_")
    return pytest.param(project, tests, id=name, marks=pytest.mark.attack(row, fault))


UNITS = [
    unit(
        "A1, A4", "adapters that change the base's answers, engines that hang, and what only looks so", "agent",
        "tests/server/test_guard.py",
    ),
    unit(
        "A2, A3", "a check that needs too much time or memory, or killed the agent", "agent",
        "tests/server/test_fetching.py",
    ),
    unit("A", "mutations of adapter files", "agent", "tests/server/test_fuzz_adapters.py"),
    unit("B1", "every parameter of vLLM, by version and platform", "agent", "tests/server/test_parameters.py"),
    unit("B3, B5", "the gateway's memory limit, mutated requests", "operator", "tests/gateway/test_process.py"),
    unit(
        "B6, B9", "streams: tokens counted as they pass, silence, held requests, ends", "operator",
        "tests/gateway/test_streams.py", "tests/gateway/test_event_streams.py",
    ),
    unit("C", "mutations of manifests", "operator", "tests/controlplane/test_manifest_fuzz.py"),
    unit("C4", "10,000 models: a change touches no other", "operator", "tests/gateway/test_catalog.py"),
    unit(
        "C5, C10, C11, C12", "forged Jobs, pre-emption storms, containers that do not start, and what pods report",
        "operator", "tests/controlplane/test_hostile_jobs.py",
    ),
    unit("C6", "gateways that send no reports", "operator", "tests/autoscale/test_demand.py"),
    unit("C7", "identities of the operator and the gateway", "operator", "tests/controlplane/test_rights.py"),
    unit(
        "C8", "keys and tokens by purpose and pod, implausible epochs, rotation", "operator",
        "tests/api/test_contracts.py", "tests/serving/test_agent_link.py", "tests/gateway/test_rotation.py",
    ),
    unit("C13", "chat templates without end", "trainer", "tests/trainer/test_watched.py"),
    unit("C14", "every spelling of a place in the store of others", "operator", "tests/api/test_location.py"),
    unit("C16", "addresses that a pool's agent connects to", "agent", "tests/server/test_connections.py"),
    unit("D1", "a watch whose stream is cut or closes", "operator", "tests/gateway/test_feed.py"),
    unit("D2, D4", "engines that end with 0, agents that cannot be reached", "operator", "tests/serving/test_pod.py"),
    unit("D5, D7, D8", "budgets, reserved arguments and families of pools", "operator", "tests/serving/test_render.py"),
    unit("D9", "values files of older charts, and adoption", "operator", "tests/charts/test_upgrade.py"),
]  # fmt: skip


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Return the outcomes of all tests of the selected cases, from one run for each project."""
    wanted: defaultdict[str, list[str]] = defaultdict(list)
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.path.name == "test_units.py":
            wanted[item.callspec.params["project"]].extend(item.callspec.params["tests"])
    found: Results = {}
    for project, tests in wanted.items():
        report = tmp_path_factory.mktemp("units") / f"{project}.xml"
        command = [PYTHON[project], "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        done = subprocess.run(
            command, check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, start_new_session=True
        )
        if not report.is_file() or done.returncode > 1:
            pytest.fail(f"{' '.join(map(str, command))}: {done.stdout[-1000:]}{done.stderr[-1000:]}")
        found |= outcomes(report.read_text())
    return found


def outcomes(junit: str) -> Results:
    """Return the outcome of each test in a JUnit file."""
    found: Results = {}
    for case in ET.fromstring(junit).iter("testcase"):  # noqa: S314 - pytest's own file
        failure = next((part for part in case if part.tag in {"failure", "error", "skipped"}), None)
        text = "" if failure is None else f"{failure.tag}: {failure.get('message', '')}"
        found[case.get("classname", ""), case.get("name", "")] = text
    return found


@pytest.mark.parametrize(("project", "tests"), UNITS)
def test_unit(project: str, tests: tuple[str, ...], results: Results, outcome: Outcome) -> None:
    outcome.proof = " ".join(tests)
    count = 0
    for test in tests:
        path, _, name = test.partition("::")
        module = path.removesuffix(".py").replace("/", ".")
        mine = {
            case: failure
            for (where, case), failure in results.items()
            if where == module and (not name or name in {case, case.partition("[")[0]})
        }
        assert mine, f"{test} of the environment {project} does not exist"
        failed = {case: failure for case, failure in mine.items() if failure}
        assert not failed, f"{test}: {failed}"
        count += len(mine)
    outcome.seen.append(f"{count} tests passed")
