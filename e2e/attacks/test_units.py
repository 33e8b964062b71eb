"""Faults that a unit shows better than a cluster: the tests that do, run together, and their outcome by row."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET  # the file is pytest's own
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest
from installation import REPOSITORY

if TYPE_CHECKING:
    from trial import Outcome

PYTHON = {
    "operator": sys.executable,
    "agent": REPOSITORY / "server-image/.venv/bin/python",
    "trainer": REPOSITORY / "trainer-image/.venv/bin/python",
}
Results = dict[tuple[str, str], str]
"""Failure by module and test; empty where it passed."""


def unit(row: str, fault: str, project: str, *tests: str) -> Any:  # noqa: ANN401 - a pytest.param
    """A case: the tests, `path` or `path::name` from the repository's root, that show that the fault does no harm."""
    name = tests[0].rpartition("::")[2].removeprefix("tests/").removeprefix("test_")
    return pytest.param(project, tests, id=name, marks=pytest.mark.attack(row, fault))


UNITS = [
    unit("C1", "what an installation allows of scheduling, and refusals", "operator", "tests/api/test_scheduling.py"),
    unit("C3", "pools and bare names of other namespaces", "operator", "tests/serving/test_source.py"),
    unit("C4", "10,000 models: a change touches no other", "operator", "tests/gateway/test_catalog.py"),
    unit(
        "C5, C10, C11, C12", "forged Jobs, pre-emption storms, containers that do not start, and what pods report",
        "operator", "tests/controlplane/test_hostile_jobs.py",
    ),
    unit("C5", "Jobs and pods that only look like an attempt's", "operator", "tests/finetune/test_observe.py"),
    unit("C6", "gateways that are not heard", "operator", "tests/autoscale/test_demand.py"),
    unit(
        "C8", "keys and tokens by purpose and pod; epochs that are implausible", "operator",
        "tests/api/test_contracts.py", "tests/serving/test_agent_link.py",
    ),
    unit(
        "C10, C11", "pre-emption storms, results that are lost, containers and images that do not start", "operator",
        "tests/finetune/test_plan.py",
    ),
    unit("C14", "every spelling of a place in the store of others", "operator", "tests/api/test_location.py"),
    unit("C15", "metrics and demand without a token", "operator", "tests/gateway/test_internal.py"),
    unit("D1", "a watch whose stream is cut, or that ends", "operator", "tests/gateway/test_feed.py"),
    unit("D2, D4", "engines that end with 0, agents that cannot be reached", "operator", "tests/serving/test_pod.py"),
    unit("D5, D7", "budgets of pools, abbreviated engine arguments", "operator", "tests/serving/test_render.py"),
    unit("D9", "values files of older charts, and adoption", "operator", "tests/charts/test_tunesmith.py"),
]  # fmt: skip


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The outcomes of all tests that the chosen cases name, from one run for each project."""
    wanted: defaultdict[str, list[str]] = defaultdict(list)
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.path.name == "test_units.py":
            wanted[item.callspec.params["project"]].extend(item.callspec.params["tests"])
    found: Results = {}
    for project, tests in wanted.items():
        report = tmp_path_factory.mktemp("units") / f"{project}.xml"
        command = [PYTHON[project], "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        done = subprocess.run(command, check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
        if not report.is_file() or done.returncode > 1:
            pytest.fail(f"{' '.join(map(str, command))}: {done.stdout[-1000:]}{done.stderr[-1000:]}")
        found |= outcomes(report.read_text())
    return found


def outcomes(junit: str) -> Results:
    """What a JUnit file reports of each test."""
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
