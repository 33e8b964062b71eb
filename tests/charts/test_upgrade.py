"""Upgrades of the chart from an older version: `--reuse-values`, kept CRDs, and the rule for versions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.controlplane.apiserver import ApiServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Helm = Callable[..., subprocess.CompletedProcess[str]]

CHART = Path(__file__).resolve().parents[2] / "charts/tunesmith"
OLDER = Path(__file__).parent / "values"
SYSTEM = "tunesmith-system"
GIVEN: dict[str, Any] = {
    "store": "s3://bucket/store",
    "images": {"registry": "registry.example"},
    "gateway": {"replicas": 3, "resources": {"requests": {"cpu": "1"}}},
    "networkPolicy": {"enabled": False},
}


@pytest.fixture
def older_chart(tmp_path: Path) -> Callable[[Path], Path]:
    """The chart with the default values of an older version, as `--reuse-values` leaves them to its templates."""

    def make(values: Path) -> Path:
        chart = tmp_path / "tunesmith"
        shutil.copytree(CHART, chart)
        shutil.copy(values, chart / "values.yaml")
        return chart

    return make


def documents(done: subprocess.CompletedProcess[str]) -> dict[tuple[str, str], dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    found = [item for item in yaml.safe_load_all(done.stdout) if item]
    return {(item["kind"], f"{item['metadata'].get('namespace')}/{item['metadata']['name']}"): item for item in found}


def template(helm: Helm, chart: Path, values: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    arguments = ("--namespace", SYSTEM, "--kube-version", "1.34.0", "--values", "-")
    return documents(helm("template", "tunesmith", str(chart), *arguments, stdin=yaml.safe_dump(values)))


@pytest.mark.parametrize("values", sorted(OLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_values_of_an_older_version_are_completed(
    helm: Helm, older_chart: Callable[[Path], Path], values: Path
) -> None:
    """Values of both versions keep the older value; values that only this version has get their default."""
    before = template(helm, older_chart(values), GIVEN)
    now = template(
        helm, CHART, {**GIVEN, "images": {**yaml.safe_load(values.read_text())["images"], **GIVEN["images"]}}
    )
    assert before.keys() == now.keys()
    for name in ("operator", "gateway"):
        place = ("Deployment", f"{SYSTEM}/tunesmith-{name}")
        old, new = (found[place]["spec"]["template"]["spec"] for found in (before, now))
        # An older release keeps all of its resources, which count as the user's.
        old["containers"][0].pop("resources")
        new["containers"][0].pop("resources")
        assert old == new
    differing = [place for place in before if place[0] != "Deployment" and before[place] != now[place]]
    assert differing == []


def test_every_released_version_has_its_values_here() -> None:
    versions = {path.stem.partition("-")[0] for path in OLDER.glob("*.yaml")}
    released = {
        line.split()[1] for line in (CHART.parent / "versions.txt").read_text().splitlines() if "tunesmith" in line
    }
    assert released - versions <= {yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]}


@pytest.mark.parametrize("script", ["defaults.py", "rights.py"])
def test_generated_files_match_the_chart(script: str) -> None:
    done = subprocess.run(
        [sys.executable, CHART.parent / script, "--check"], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_a_chart_that_changes_after_its_release_needs_a_new_version(tmp_path: Path) -> None:
    charts = tmp_path / "charts"
    shutil.copytree(CHART.parent, charts)
    shutil.copy(CHART.parents[1] / "CHANGELOG.md", tmp_path)
    for package in ("operator", "trainer-image", "server-image"):
        (tmp_path / package).mkdir()
        shutil.copy(CHART.parents[1] / package / "pyproject.toml", tmp_path / package)

    def check(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, charts / "versions.py", *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        return done.returncode, done.stdout

    notes = charts / "tunesmith/templates/NOTES.txt"
    notes.write_text(notes.read_text() + "Welcome.\n")
    assert check() == (0, ""), "before its release, a version may change"
    assert check("--release") == (0, "")
    notes.write_text(notes.read_text() + "Good luck.\n")
    for arguments in ((), ("--release",)):
        code, output = check(*arguments)
        assert code == 1
        assert "raise `version` in its Chart.yaml" in output
    chart = charts / "tunesmith/Chart.yaml"
    chart.write_text(re.sub(r"(?m)^version: .*$", "version: 9.0.0", chart.read_text()))
    assert "CHANGELOG.md does not describe" in check()[1]
    changes = tmp_path / "CHANGELOG.md"
    changes.write_text(changes.read_text() + "\n## 9.0.0\n")
    assert check() == (0, "")


@pytest.fixture(scope="module")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with ApiServer(tmp_path_factory.mktemp("apiserver")) as server:
        server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM}})
        yield server


@pytest.mark.controlplane
def test_upgrade_reuse_uninstall_and_adoption_under_another_name(
    kubernetes: ApiServer, helm: Helm, older_chart: Callable[[Path], Path]
) -> None:
    where = ("--kubeconfig", str(kubernetes.kubeconfig), "--namespace", SYSTEM)

    def run(*arguments: str, values: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
        given = ("--values", "-") if values is not None else ()
        return helm(*arguments, *where, *given, stdin=yaml.safe_dump(values) if values is not None else None)

    def uids() -> set[str]:
        items = kubernetes.get("crd", "-l", "app.kubernetes.io/part-of=tunesmith")["items"]
        items = items or [item for item in kubernetes.get("crd")["items"] if item["spec"]["group"] == "tunesmith.dev"]
        return {item["metadata"]["uid"] for item in items}

    done = run("install", "tunesmith", str(older_chart(OLDER / "0.1.0-first.yaml")), values=GIVEN)
    assert done.returncode == 0, done.stderr
    before = uids()
    done = run("upgrade", "tunesmith", str(CHART), "--reuse-values")
    assert done.returncode == 0, done.stderr
    assert kubernetes.get("deployment", "tunesmith-gateway", "-n", SYSTEM)["spec"]["replicas"] == 3
    assert kubernetes.get("validatingadmissionpolicy", "tunesmith-scheduling")["spec"]["failurePolicy"] == "Fail"

    assert run("uninstall", "tunesmith").returncode == 0
    refused = run("install", "other", str(CHART), values=GIVEN)
    assert "cannot be imported into the current release: invalid ownership metadata" in refused.stderr
    done = run("install", "other", str(CHART), "--take-ownership", values=GIVEN)
    assert done.returncode == 0, done.stderr
    assert uids() == before

    # The same by hand, for versions of Helm without the option.
    assert run("uninstall", "other").returncode == 0
    for name in ("finetunejobs", "servingpools", "adapterdeployments"):
        for verb, settings in (
            ("annotate", ("meta.helm.sh/release-name=third", f"meta.helm.sh/release-namespace={SYSTEM}")),
            ("label", ("app.kubernetes.io/managed-by=Helm",)),
        ):
            done = kubernetes.kubectl(verb, "--overwrite", "crd", f"{name}.tunesmith.dev", *settings)
            assert done.returncode == 0, done.stderr
    done = run("install", "third", str(CHART), values=GIVEN)
    assert done.returncode == 0, done.stderr
    assert uids() == before
