"""Manifests as a careless or a hostile user writes them, and what must hold of each.

`python -m tests.finetune.manifest_fuzzer --count 10000 --seed 1` runs it alone; a seed gives the same manifests again.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tunesmith.api.adapterdeployment import AdapterDeployment
from tunesmith.api.finetunejob import FineTuneJob
from tunesmith.api.servingpool import ServingPool
from tunesmith.autoscale.decide import Decision
from tunesmith.contracts.location import owned_name, reads_foreign_store
from tunesmith.contracts.network import NetworkPolicySettings
from tunesmith.contracts.progress import parse_progress
from tunesmith.contracts.scheduling import DEFAULT_SCHEDULING, scheduling_violation
from tunesmith.contracts.transitions import new_events, unreadable_status
from tunesmith.finetune import render
from tunesmith.finetune.observe import observe
from tunesmith.finetune.plan import plan
from tunesmith.finetune.status import status_events
from tunesmith.jobs.settings import JobSettings
from tunesmith.serving import adapter as adapters
from tunesmith.serving import pool as pools
from tunesmith.serving import render as pool_render
from tunesmith.serving.imports import ImportBase, import_job, plan_import
from tunesmith.serving.resolve import candidates, choose_pool, resolve_artifact
from tunesmith.serving.settings import PoolSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Object = dict[str, Any]
API = "tunesmith.dev/v1alpha1"
STORE = "s3://tunesmith/store"
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
UID = "0f0e0d0c-0000-4000-8000-000000000001"
INSTALLATION = render.JobInstallation(JobSettings(store=STORE, trainer_image="localhost/trainer:1"), cluster="cluster")
POOL_SETTINGS = PoolSettings(store=STORE, agent_image="localhost/agent:1", engine_image="localhost/engine:1")
NETWORK = NetworkPolicySettings("tunesmith-system", "tunesmith")

SEEDS: tuple[Object, ...] = (
    {
        "apiVersion": API,
        "kind": "FineTuneJob",
        "metadata": {"name": "tone", "namespace": "team", "labels": {"a": "b"}, "annotations": {"c": "d"}},
        "spec": {
            "baseModel": {"uri": "hf://org/base", "revision": "main", "secretRef": {"name": "hub"}},
            "dataset": {
                "train": [{"uri": "s3://data/*.jsonl", "weight": 2.5}, {"uri": "pvc://claim/rows.csv"}],
                "validation": [{"uri": "gs://data/held.jsonl"}],
                "columns": {"messages": "chat"},
                "chatTemplate": "{{ messages[0].content }}",
                "maxLength": 1024,
            },
            "objective": {"sft": {}},
            "method": {"lora": {"rank": 8, "alpha": 16, "targetModules": ["q_proj"]}},
            "hyperparameters": {"learningRate": 1e-4, "batchSize": 8, "maxSteps": 10},
            "evaluation": {
                "suites": [{"name": "rows", "heldOutLoss": {}}],
                "gates": [{"suite": "rows", "metric": "Loss", "max": 2.0}],
            },
            "output": {"merge": "Original", "exports": [{"uri": "s3://copies/tone"}], "reporting": ["MLflow"]},
            "resources": {"gpus": 1, "cpu": "2", "memory": "8Gi", "nodes": 2},
            "scheduling": {
                "nodeSelector": {"nvidia.com/gpu.product": "H200"},
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
                "queue": "team",
            },
            "checkpoint": {"everySteps": 5},
            "maxAttempts": 3,
            "activeDeadlineSeconds": 3600,
            "suspend": False,
        },
    },
    {
        "apiVersion": API,
        "kind": "FineTuneJob",
        "metadata": {"name": "plain", "namespace": "team"},
        "spec": {
            "baseModel": {"uri": "s3://models/base"},
            "dataset": {"train": [{"uri": "s3://data/train.jsonl"}]},
            "method": {"peft": {"type": "LOHA", "config": {"r": 4, "target_modules": ["a"]}}},
        },
    },
    {
        "apiVersion": API,
        "kind": "ServingPool",
        "metadata": {"name": "small", "namespace": "team"},
        "spec": {
            "modelName": "base",
            "baseModel": {"uri": "s3://models/base", "secretRef": {"name": "models"}},
            "engine": {"maxLoras": 4, "args": ["--max-num-seqs", "8"], "env": [{"name": "A", "value": "b"}]},
            "resources": {"gpus": 1, "memory": "8Gi"},
            "scheduling": {"priorityClassName": "serving"},
            "replicas": 2,
            "drainSeconds": 30,
            "allowedNamespaces": {"from": "All"},
        },
    },
    {
        "apiVersion": API,
        "kind": "AdapterDeployment",
        "metadata": {"name": "tone", "namespace": "team"},
        "spec": {
            "adapterFrom": {"fineTuneJob": {"name": "tone"}},
            "pool": {"name": "small", "namespace": "team"},
            "modelName": "tone",
            "autoscaling": {"minReplicas": 1, "maxReplicas": 4},
        },
    },
)
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 10**30, 1e25, 1e-300, float("nan"), float("inf"), 0.5, "", " ",
    "a", "A" * 300, "é" * 70, "\x00", "\x1b[2J", "a\nb", "\u202e", "../..", "a/../../b", "%2e%2e/", "*", "**", "[",
    "^(a+)+$",     "s3://tunesmith/store/other/x/artifact", "S3://Tunesmith//store/x", "s3://arn:aws:s3:::x/y", "pvc://claim/../x",
    "hf://datasets/a/b@c/*", "file:///etc/passwd", "http://169.254.169.254/", "system-node-critical", "{{ 9 ** 9 }}",
    "{% for a in b %}", "nvidia.com/gpu", "1e999Gi", "0.0000001", "9" * 30 + "Ti", "1m", "²", "2026-01-01T00:00:00",
    [], {}, [[]], [None], {"": ""}, {"a": {}}, ["a"] * 200, {f"k{number}": "v" for number in range(200)},
)  # fmt: skip
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
POD_WORDS: tuple[Any, ...] = (
    "", "{", "[" * 5000, "null", "[]",
    '{"outcome": "Succeeded"}', '{"outcome": "Failed", "message": "\\u0000\\u001b[2J"}',
    '{"outcome": "Preempted"}', '{"outcome": "Succeeded", "metrics": {"a": NaN, "b": null}, "resumedFromStep": 1e25}',
    '{"outcome": "Succeeded", "resolved": {"totalSteps": 99999999999999999999, "learningRate": Infinity}}',
    '{"outcome": "Succeeded", "preflight": {"rows": -1}}', '{"outcome": "Failed", "reason": "Nonsense"}',
    '{"outcome": "Failed", "reason": "InternalError", "retryable": true, "message": "' + "x" * 4000 + '"}',
    '{"outcome": "Succeeded", "artifact": {"uri": "s3://x", "digest": "sha256:0", "sizeBytes": -1, "servable": {}}}',
)  # fmt: skip
SAMPLES = (
    b"", b"{}", b'{"step": 1e25}', b'{"updateTime": "2030-01-01T00:00:00"}', b'{"loss": NaN, "epoch": 1e308}',
    b'{"updateTime": 1e300}', b'{"updateTime": "0001-01-01T00:00:00+14:00", "step": 3}',
    b'{"updateTime": "9999-12-31T23:59:59Z"}',
    b'{"stage": "Training", "step": 9007199254740992}', b"[" * 60000, b"\xff\xfe", b'{"stage": "\\ud800"}',
)  # fmt: skip


def mutants(seed: int, count: int) -> Iterator[Object]:
    """Yield manifests with one to five changes each."""
    chance = random.Random(seed)  # noqa: S311 - not for secrets
    for _ in range(count):
        manifest = copy.deepcopy(chance.choice(SEEDS))
        for _ in range(chance.choice((1, 1, 1, 2, 3, 5))):
            _mutate(manifest, chance)
        yield manifest


def _mutate(manifest: Object, chance: random.Random) -> None:
    places = [place for place in _places(manifest) if place[1] not in {"apiVersion", "kind", "namespace"}]
    if not places:
        return
    parent, key = chance.choice(places)
    donor, other = chance.choice(places)
    match chance.randrange(7):
        case 0 if isinstance(parent, dict):
            parent.pop(key, None)
        case 1 if isinstance(parent, dict):
            parent[chance.choice(("", "x" * 300, "uri", "name", "secretRef", "full", "qlora"))] = copy.deepcopy(
                chance.choice(HOSTILE)
            )
        case 2 if isinstance(parent, list):
            parent.extend(copy.deepcopy(parent) * chance.choice((1, 3, 100)))
        case 3:
            parent[key] = copy.deepcopy(donor[other])
        case 4 if isinstance(parent[key], str):
            value, word = parent[key], chance.choice([entry for entry in HOSTILE if isinstance(entry, str)])
            cut = chance.randrange(len(value) + 1)
            parent[key] = value[:cut] + word + value[cut:]
        case 5:
            nested: Any = copy.deepcopy(chance.choice(HOSTILE))
            for _ in range(chance.choice((1, 5, 60))):
                nested = chance.choice(([nested], {"a": nested}))
            parent[key] = nested
        case _:
            parent[key] = copy.deepcopy(chance.choice(HOSTILE))


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(entries):
        yield node, key
        yield from _places(value)


def examine(manifest: Object, chance: random.Random) -> str:
    """Check what must hold of a manifest; return `refused` or `planned`.

    Raises:
        Exception: the manifest led to anything but a ValidationError or a plan with conditions.
    """
    try:
        json.dumps(manifest, allow_nan=False).encode()
    except ValueError:
        return "no JSON"
    metadata = manifest.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or not isinstance(name, str) or _NAME.fullmatch(name) is None:
        return "no object"
    stored = {**manifest, "metadata": {**metadata, "uid": UID, "generation": 1, "namespace": "team"}}
    return _EXAMINERS[manifest["kind"]](stored, chance)


def _finetunejob(manifest: Object, chance: random.Random) -> str:
    try:
        job = FineTuneJob.model_validate(manifest)
    except ValidationError:
        found = unreadable_status(manifest, "spec does not fit", NOW)
        assert found["conditions"], "an unreadable job has no condition"
        return "refused"
    for rendered in (
        render.configuration(job, render.VALIDATE),
        render.validation(job, INSTALLATION),
        render.configuration(job, render.TRAIN),
        *render.rank_network(job),
        render.attempt(job, 1, INSTALLATION),
    ):
        _writable(rendered)
    status: Object = {}
    for minute in range(6):
        now = NOW + timedelta(minutes=minute)
        jobs, pods = _played(manifest, chance, now)
        try:
            sample = parse_progress(chance.choice(SAMPLES))
        except ValueError:
            sample = None
        observation = observe(FineTuneJob.model_validate({**manifest, "status": status}), jobs, pods, sample, now)
        decided = plan(observation, STORE)
        assert decided.status.conditions, "a plan without a condition"
        assert decided.status.phase is not None, "a plan without a phase"
        new_events("FineTuneJob", observation.job.status.conditions, decided.status.conditions)
        status_events(observation.job.status, decided.status)
        status = decided.status.manifest()
        _writable(status)
    return "planned"


def _played(manifest: Object, chance: random.Random, now: datetime) -> tuple[list[Object], list[Object]]:
    """Jobs and pods of the FineTuneJob in any state, and strangers with its labels."""
    name, time_ = manifest["metadata"]["name"], (now - timedelta(minutes=3)).strftime("%Y-%m-%dT%H:%M:%SZ")
    jobs, pods = [], []
    for suffix in ("validate", "1", "2", "²"):
        if chance.random() < 0.3:
            continue
        owner = {"kind": "FineTuneJob", "name": name, "uid": chance.choice((UID, "x")), "controller": True}
        ended = chance.choice((None, "Complete", "Failed"))
        conditions = [{"type": ended, "status": "True", "message": chance.choice(POD_WORDS)}] if ended else []
        labels = {} if suffix == "validate" else {"tunesmith.dev/attempt": suffix}
        meta = {
            "name": owned_name(name, UID, suffix),
            "namespace": chance.choice(("team", "team", "team", "foreign")),
            "uid": suffix,
            "creationTimestamp": time_,
            "labels": labels,
            "ownerReferences": [owner],
        }
        jobs.append({"metadata": meta, "spec": {}, "status": {"conditions": conditions}})
        state = chance.choice(
            (
                {"running": {"startedAt": time_}},
                {"waiting": {"reason": chance.choice(("ImagePullBackOff", "RunContainerError", "X")), "message": "m"}},
                {
                    "terminated": {
                        "exitCode": chance.choice((0, 1, 2, 3, 137, 143)),
                        "reason": chance.choice(("OOMKilled", "Error")),
                        "message": chance.choice(POD_WORDS),
                        "startedAt": time_,
                        "finishedAt": time_,
                    }
                },
            )
        )
        pods.append(
            {
                "metadata": {
                    "name": f"pod-{suffix}",
                    "namespace": "team",
                    "uid": f"pod-{suffix}",
                    "creationTimestamp": time_,
                    "labels": {**labels, "batch.kubernetes.io/job-completion-index": chance.choice(("0", "²", "x"))},
                    "ownerReferences": [{"kind": "Job", "name": meta["name"], "uid": suffix, "controller": True}],
                },
                "spec": {},
                "status": {
                    "reason": chance.choice(("", "Evicted", "DeadlineExceeded")),
                    "message": chance.choice(POD_WORDS),
                    "containerStatuses": [{"name": "trainer", "state": state}],
                },
            }
        )
    return jobs, pods


def _servingpool(manifest: Object, _: random.Random) -> str:
    try:
        pool = ServingPool.model_validate(manifest)
    except ValidationError:
        return "refused"
    invalid = pool_render.reserved(pool) or scheduling_violation(
        pool.spec.scheduling, pool.spec.resources, DEFAULT_SCHEDULING
    )
    reads_foreign_store(STORE, "team", pool.spec.base_model.uri or "")
    for rendered in (
        pool_render.deployment(pool, POOL_SETTINGS, pool.spec.replicas),
        pool_render.disruption_budget(pool),
        pool_render.isolation(pool, NETWORK),
    ):
        _writable(rendered)
    observation = pools.PoolObservation(None, (), (), Decision(pool.spec.replicas, "as desired"), invalid=invalid)
    status = pools.plan(pool, observation, NOW).status
    assert status.conditions, "a pool without a condition"
    _writable(status.manifest())
    return "planned"


def _adapterdeployment(manifest: Object, _: random.Random) -> str:
    try:
        adapter = AdapterDeployment.model_validate(manifest)
    except ValidationError:
        return "refused"
    pool = ServingPool.model_validate({**SEEDS[2], "status": {"baseModelFingerprint": "sha256:f"}})
    job = FineTuneJob.model_validate(SEEDS[1])
    source, found = adapter.spec.adapter_from, candidates(adapter, "sha256:f", [pool], ())
    for of in (None, job):
        if source.artifact is not None:
            artifact = plan_import(adapter, source.artifact, found, {}, NOW, STORE).artifact
            _writable(import_job(adapter, source.artifact, ImportBase("s3://models/base"), INSTALLATION.settings))
        else:
            assert source.fine_tune_job is not None
            artifact = resolve_artifact(adapter, source.fine_tune_job.name, of, STORE)
        observation = adapters.AdapterObservation(
            artifact=artifact,
            pool=choose_pool(adapter, "sha256:f", found),
            lost_to=None,
            pods=(),
            unplaced={},
            decision=Decision(adapter.spec.replicas, "as desired"),
            url="",
        )
        status = adapters.plan(adapter, observation, NOW)
        assert status.conditions, "an adapter without a condition"
        _writable(status.manifest())
    return "planned"


def _writable(document: Any) -> None:
    """Check that the API server can read the document: JSON, whole numbers of 64 bits, no halves of characters."""
    json.dumps(document, allow_nan=False, ensure_ascii=False).encode()
    for parent, key in _places(document):
        value = parent[key]
        assert not isinstance(value, int) or -(2**63) <= value < 2**63, f"{key} has more than 64 bits: {value}"


_EXAMINERS: dict[str, Callable[[Object, random.Random], str]] = {
    "FineTuneJob": _finetunejob,
    "ServingPool": _servingpool,
    "AdapterDeployment": _adapterdeployment,
}


def run(seed: int, count: int) -> Counter[tuple[str, str]]:
    """Examine so many manifests; return how many of each kind were refused and planned.

    Raises:
        AssertionError: something did not hold; the message has the manifest.
    """
    chance = random.Random(seed)  # noqa: S311 - not for secrets
    found: Counter[tuple[str, str]] = Counter()
    for number, manifest in enumerate(mutants(seed, count)):
        try:
            found[manifest["kind"], examine(manifest, chance)] += 1
        except Exception as error:
            shown = json.dumps(manifest)[:4000]
            raise AssertionError(f"seed {seed}, manifest {number}: {type(error).__name__}: {error}\n{shown}") from error
    return found


def main() -> None:
    """Run as a command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started = time.monotonic()
    found = run(options.seed, options.count)
    for (kind, outcome), count in sorted(found.items()):
        print(f"{kind} {outcome}: {count}")  # noqa: T201 - a command
    print(f"passed: {options.count} manifests in {time.monotonic() - started:.0f} s, every plan with a condition")  # noqa: T201


if __name__ == "__main__":
    main()
