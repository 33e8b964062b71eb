"""`tunesmith simulate` as a user starts it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.api.autoscaling import AdapterAutoscaling
from tunesmith.autoscale.decide import decide_copies
from tunesmith.autoscale.record import written
from tunesmith.autoscale.schedule import Minimum
from tunesmith.autoscale.window import Sample, Window

PROGRAM = Path(sys.executable).with_name("tunesmith")
POOL = """
apiVersion: tunesmith.dev/v1alpha1
kind: ServingPool
metadata: {name: base, namespace: team-a}
spec:
  modelName: base
  baseModel: {uri: "s3://models/base"}
  resources: {cpu: "4", memory: 16Gi}
  autoscaling: {minReplicas: 1, maxReplicas: 6, targetConcurrency: 4}
"""


def simulate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, "simulate", *arguments], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pool.yaml").write_text(POOL)
    rows = [f"{second},team-a/{'abc'[second % 3]},{4 if 600 < second < 900 else 0.5}\n" for second in range(1800)]
    (tmp_path / "trace.csv").write_text("time,model,seconds\n" + "".join(rows))
    return tmp_path


def test_a_table_compares_the_operator_with_an_hpa_and_a_fixed_pool(folder: Path) -> None:
    done = simulate(folder, "--trace", "trace.csv", "-f", "pool.yaml")
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.split("  ")[0] == "POLICY"
    assert [line.split()[0] for line in lines] == ["tunesmith", "hpa", "fixed", "dynamo-like"]
    assert "1800 requests for 3 models" in done.stderr


def test_programs_get_json_from_an_access_log(folder: Path) -> None:
    records = [
        {"time": f"2026-11-30T10:{minute:02}:00Z", "status": status, "model": "team-a/a", "seconds": 2.5}
        for minute in range(30)
        for status in (200, 429)
    ]
    (folder / "access.log").write_text("".join(json.dumps(record) + "\n" for record in records))
    done = simulate(folder, "--trace", "access.log", "-f", "pool.yaml", "-o", "json")
    assert done.returncode == 0, done.stderr
    [first, *_] = json.loads(done.stdout)
    assert first["policy"] == "tunesmith"
    assert first["unserved"] == 0
    assert "30 requests for 1 models" in done.stderr


def test_the_measured_start_of_the_pools_engines_is_used(folder: Path) -> None:
    (folder / "pool.yaml").write_text(POOL + "status: {engineStartSeconds: 600}\n")
    waits = [
        json.loads(simulate(folder, "--trace", "trace.csv", "-f", "pool.yaml", "-o", "json", *start).stdout)[1]
        for start in ((), ("--start-seconds", "5"))
    ]
    assert waits[0]["waitSeconds"]["p99"] > 500
    assert waits[1]["waitSeconds"]["p99"] < 50


def test_the_png_shows_every_policy(folder: Path) -> None:
    done = simulate(folder, "--trace", "trace.csv", "-f", "pool.yaml", "--plot", "sizes.png")
    if importlib.util.find_spec("matplotlib") is None:
        assert (done.returncode, done.stdout) == (2, "")
        assert "--plot needs matplotlib: pip install 'tunesmith[plot]'" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert (folder / "sizes.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_decisions_of_a_log_are_taken_again(folder: Path) -> None:
    window = Window()
    window.add(Sample(0.0, 20), 120)
    rule = AdapterAutoscaling(max_replicas=4)
    line = written("AdapterDeployment team-a/a", decide_copies(window, 1, rule, Minimum(1)))
    assert line is not None
    (folder / "operator.log").write_text(f"2026-11-30 12:00:00 INFO tunesmith: leading\n2026-11-30 INFO: {line}\n")
    done = simulate(folder, "--replay", "operator.log")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[:5] == ["AdapterDeployment", "team-a/a", "1", "3", "3"]
    (folder / "operator.log").write_text(line.replace('"replicas": 3', '"replicas": 4'))
    done = simulate(folder, "--replay", "operator.log", "-o", "json")
    assert done.returncode == 1
    assert [(entry["recorded"], entry["again"]) for entry in json.loads(done.stdout)] == [(4, 3)]
    assert "1 of 1 decisions differ" in done.stderr
    (folder / "operator.log").write_text(line[:-9])
    done = simulate(folder, "--replay", "operator.log")
    assert (done.returncode, "operator.log, line 1: " in done.stderr) == (2, True)
    assert simulate(folder).returncode == 2


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("trace.csv", "when,model,seconds\n", "the first line does not have the columns time, model, seconds"),
        ("trace.csv", "time,model,seconds\nnoon,a,1\n", "trace.csv, line 2: Invalid isoformat string: 'noon'"),
        ("trace.csv", "time,model,seconds\n1,a,-1\n", "trace.csv, line 2: -1.0 s is not a duration of a request"),
        ("trace.csv", "time,model,seconds\n", "trace.csv has no requests"),
        ("trace.csv", "time,model,seconds\n0,a,1\n1e9,a,1\n", "trace.csv spans more than 7 days"),
        ("trace.csv", '{"status": 200, "model": "a"}\n', "line 1 is not a record of the access log"),
        ("pool.yaml", POOL.replace("  autoscaling", "  # autoscaling"), "the pool has no spec.autoscaling"),
        (
            "pool.yaml",
            POOL.replace("maxReplicas", "maxPods"),
            "pool.yaml: spec.autoscaling.maxReplicas: Field required",
        ),
        ("pool.yaml", POOL.replace("ServingPool", "FineTuneJob"), "pool.yaml is a FineTuneJob, not a ServingPool"),
    ],
)
def test_a_mistake_is_a_sentence(folder: Path, name: str, content: str, sentence: str) -> None:
    (folder / name).write_text(content)
    done = simulate(folder, "--trace", "trace.csv", "-f", "pool.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
