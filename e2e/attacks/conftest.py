"""Fixtures of the attacks: the stage, the measurement of the victim, and the table of results."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from e2e.attacks.stage import SINGLE, Stage, pool_manifest
from e2e.attacks.trial import GRAIN_SECONDS, TOLERANCE, Outcome, Trial, table
from e2e.attacks.victim import Victim
from e2e.installation import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from e2e.installation import Object

TABLE = REPOSITORY / "out/attacks.md"
KEEP = "TUNESMITH_ATTACKS_KEEP"
"""Environment variable: if set, pool, tenants and keys are kept for the next run."""
_OUTCOMES = pytest.StashKey[dict[str, Outcome]]()
_BEGAN = pytest.StashKey[float]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_OUTCOMES] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.e2e)
            mark = item.get_closest_marker("attack")
            if mark is None:
                raise pytest.UsageError(f"{item.nodeid} has no mark attack(row, title)")
            config.stash[_OUTCOMES][item.nodeid] = Outcome(*mark.args)


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Print nothing: pytest_runtest_logreport prints the line of each attack."""
    return (report.outcome if report.when == "call" or report.failed else "", "", "")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Print the attack before it starts and its verdict after it, since some take a minute."""
    outcomes = item.config.stash[_OUTCOMES]
    number = list(outcomes).index(item.nodeid) + 1
    _print(item.config, f"  {number:3}/{len(outcomes)} {item.name}: {outcomes[item.nodeid].attack}")
    item.config.stash[_BEGAN] = time.monotonic()
    try:
        return (yield)
    finally:
        took = time.monotonic() - item.config.stash[_BEGAN]
        _print(item.config, f"          {took:4.0f} s  {outcomes[item.nodeid].verdict}")
        _write(item.config)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    report = cast("pytest.TestReport", (yield))
    outcome = item.config.stash[_OUTCOMES][item.nodeid]
    if report.failed and call.excinfo is not None:
        first = next(iter(str(call.excinfo.value).splitlines()), "")
        outcome.verdict = f"**FAILED** {first or call.excinfo.typename}"[:400]
    elif report.when == "call" and report.passed:
        outcome.verdict = _held(outcome)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table."""
    if text := _write(config):
        terminalreporter.write_line(text)
        terminalreporter.write_line(f"The table is in {TABLE.relative_to(REPOSITORY)}.")


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Stage]:
    """Create pool, tenants and keys; remove them at the end."""
    built = Stage(tmp_path_factory.mktemp("artifacts"))
    _print(pytestconfig, "      the shared pool, its tenants and their keys are set up")
    began = time.monotonic()
    try:
        built.setup()
        _print(pytestconfig, f"          {time.monotonic() - began:4.0f} s")
        yield built
    finally:
        if not os.environ.get(KEEP):
            built.teardown()


@pytest.fixture(scope="session")
def victim(stage: Stage) -> Iterator[Victim]:
    """Start the victim's stream of requests, to its adapter and to the base."""
    with Victim(stage.gateway, stage.victims_key, [stage.victims_model, stage.base_model]) as stream:
        stream.learn()
        yield stream


@pytest.fixture(scope="session")
def single(stage: Stage) -> Iterator[Object]:
    """Create a second pool of one pod, which sends SSE comments to silent streams; yield its manifest."""
    manifest = pool_manifest(SINGLE, replicas=1)
    manifest["spec"]["engine"] |= {"args": ["--sse-keep-alive-interval=1"], "maxLoras": 1, "maxAdapters": 1}
    manifest["spec"]["resources"]["memory"] = "3Gi"  # while it is updated, two of its pods must fit beside the others
    with stage.pool(manifest):
        yield manifest


@pytest.fixture
def outcome(request: pytest.FixtureRequest) -> Outcome:
    """Return the row of this attack."""
    return request.config.stash[_OUTCOMES][request.node.nodeid]


@pytest.fixture
def trial(outcome: Outcome, victim: Victim, stage: Stage, pytestconfig: pytest.Config) -> Iterator[Trial]:
    """Return the trial that measures this attack. Preparations before the attack are not measured.

    A pool that an earlier attack left broken is replaced, so that attacks do not affect each other.
    """
    victim.disturbed()
    if not victim.well():
        _print(pytestconfig, "          the victim is not answered any more: the pool's pods are replaced")
        stage.replace_pods()
        victim.disturbed()
    yield Trial(outcome, victim)
    victim.disturbed()


def _write(config: pytest.Config) -> str:
    """Write the table after each attack, so that an interrupted run leaves it too."""
    outcomes = [outcome for outcome in config.stash[_OUTCOMES].values() if outcome.verdict != "not run"]
    text = table(outcomes) if outcomes else ""
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(text)
    return text


def _held(outcome: Outcome) -> str:
    before, during = outcome.before, outcome.during
    if before and during and (during.refused or during.p95 > TOLERANCE * before.p95):
        return f"held; {outcome.reason or f'p95 grew by less than {GRAIN_SECONDS} s, the grain of two shared cores'}"
    return "held"


def _print(config: pytest.Config, line: str) -> None:
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(line)
