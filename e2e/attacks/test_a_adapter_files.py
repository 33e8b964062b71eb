"""A. Hostile adapter files: artifacts with valid hashes and harmful content, and an engine that hangs."""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from e2e.attacks.artifacts import CONFIG, WEIGHTS, Template, build, header_of_many_tensors
from e2e.attacks.stage import ADAPTER, HOSTILE, PLATFORM, POOL, VICTIM
from e2e.attacks.wire import CHAT, Client
from e2e.containers import container_status, processes_of
from e2e.demo import MODEL
from e2e.installation import condition, get

if TYPE_CHECKING:
    from collections.abc import Callable

    from e2e.attacks.stage import Stage
    from e2e.attacks.trial import Trial

    Craft = Callable[[Path, Template], str]

HIGHEST_RATIO = 4.0
"""The installation's default limit: norm of an adapter's change to a module, relative to the base's weights."""
MODULE = "model.layers.0.self_attn.q_proj"
CATASTROPHIC = "(.*)*(.*)*(.*)*(.*)*(.*)*x"
"""Pattern that backtracks endlessly on a long module name."""


def attack(row: str, title: str, name: str, craft: Craft, sentence: str) -> Any:  # noqa: ANN401 - a pytest.param
    """Return a case: an artifact, and a part of the message that refuses it."""
    return pytest.param(craft, sentence, id=name, marks=pytest.mark.attack(row, title))


def _wrong_shapes(folder: Path, template: Template) -> str:
    tensors = template.tensors()
    name = next(name for name in tensors.shapes if "lora_A" in name)
    rows, columns = tensors.shapes[name]
    tensors.shapes[name] = (columns, rows)
    return build(folder, template, weights=tensors)


def _one(value: float) -> Craft:
    def craft(folder: Path, template: Template) -> str:
        tensors = template.tensors()
        name = sorted(name for name in tensors.values if "lora_B" in name)[7]
        tensors.values[name][11] = value
        return build(folder, template, weights=tensors)

    return craft


def _renamed(new: str) -> Craft:
    def craft(folder: Path, template: Template) -> str:
        def rename(manifest: dict[str, Any]) -> None:
            manifest["files"][new] = manifest["files"].pop(WEIGHTS)

        return build(folder, template, manifest=rename)

    return craft


def _listed(name: str) -> Craft:
    def craft(folder: Path, template: Template) -> str:
        def add(manifest: dict[str, Any]) -> None:
            manifest["files"][name] = {"sha256": "0" * 64, "sizeBytes": 4096}

        return build(folder, template, manifest=add)

    return craft


def _config(**changes: Any) -> Craft:  # noqa: ANN401 - any value of adapter_config.json
    return lambda folder, template: build(folder, template, config=changes)


def _big_sparse(folder: Path, template: Template) -> str:
    def claim(manifest: dict[str, Any]) -> None:
        manifest["files"][WEIGHTS]["sizeBytes"] = 2**44

    return build(folder, template, manifest=claim)


def _deep(folder: Path, template: Template) -> str:
    depth = 5000  # written as text: json.dumps does not nest this deep
    text = json.dumps(template.config)[:-1] + ', "revision": ' + "[" * depth + "]" * depth + "}"
    return build(folder, template, files={CONFIG: text.encode()})


REFUSED = [
    attack(
        "A1", "finite weights of 1e30 in every tensor", "huge-weights",
        lambda folder, template: build(folder, template, weights=template.filled(1e30)), "values of up|norm of",
    ),
    attack(
        "A1", "one module's lora_B of 1e30", "huge-module",
        lambda folder, template: build(folder, template, weights=template.filled(1e30, only=f"{MODULE}.lora_B")),
        "q_proj",
    ),
    attack("A1", "lora_alpha of 1e300", "huge-alpha", _config(lora_alpha=1e300), "lora_alpha|alpha|norm"),
    attack("A1", "NaN in one weight", "not-a-number", _one(float("nan")), "not a number|finite"),
    attack("A1", "an infinity in one weight", "infinite", _one(float("-inf")), "infinite|finite"),
    attack(
        "A2", "a regular expression in rank_pattern that never ends", "rank-pattern",
        _config(rank_pattern={CATASTROPHIC: 16}), "rank_pattern|literal",
    ),
    attack(
        "A2", "a regular expression in alpha_pattern that never ends", "alpha-pattern",
        _config(alpha_pattern={CATASTROPHIC: 16}), "alpha_pattern|literal",
    ),
    attack(
        "A2", "a regular expression in target_modules", "target-modules",
        _config(target_modules=CATASTROPHIC), "target_modules",
    ),
    attack(
        "A2", "a key of adapter_config.json that nobody knows", "unknown-key",
        _config(custom_loader={"module": "os"}), "custom_loader",
    ),
    attack("A2", "adapter_config.json nested 5,000 deep", "deep-config", _deep, "adapter_config|nest|JSON"),
    attack(
        "A3", "an 86 MB header of 1.5 million tensors", "million-tensors",
        lambda folder, template: build(folder, template, weights=header_of_many_tensors(1_500_000)), "header|tensors",
    ),
    attack("A3", "a manifest that claims 16 TiB", "claimed-size", _big_sparse, "size|bytes|GiB|TiB"),
    attack("A", "weights transposed", "wrong-shapes", _wrong_shapes, "shape"),
    attack("A", "weights as a pickle", "pickle", _renamed("adapter_model.bin"), "pickle|safetensors"),
    attack("A", "a file name that leaves the folder", "path", _listed("../../etc/passwd"), "file name"),
]  # fmt: skip


@pytest.mark.parametrize(("craft", "sentence"), REFUSED)
def test_adapter(
    stage: Stage, trial: Trial, tmp_path: Path, craft: Craft, sentence: str, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id
    craft(tmp_path / "artifact", stage.template)
    stage.publish(name, tmp_path / "artifact")
    restarts = stage.restarts("agent"), stage.restarts("engine")

    def refused() -> Any:  # noqa: ANN401 - the condition
        ready = condition(get("adapterdeployment", name, HOSTILE), "Ready")
        return ready if ready["status"] == "False" and re.search(sentence, ready["message"]) else None

    try:
        with trial.attack():
            stage.deploy(name)
            ready = trial.status("the AdapterDeployment reports the problem", refused)
            trial.observe(f"{ready['reason']}: {ready['message']}")
        assert (stage.restarts("agent"), stage.restarts("engine")) == restarts
        assert condition(get("adapterdeployment", ADAPTER, VICTIM), "Ready")["status"] == "True"
    finally:
        stage.remove(name)


@pytest.mark.attack("A1", "random weights just under the bound on their norm: served or refused, harmless to others")
def test_weights_under_the_bound(stage: Stage, trial: Trial, tmp_path: Path) -> None:
    name = "under-the-bound"
    weights = stage.template.changing(0.95 * HIGHEST_RATIO, MODEL / "model.safetensors", seed=95)
    build(tmp_path / "artifact", stage.template, weights=weights)
    stage.publish(name, tmp_path / "artifact")
    client = Client(stage.gateway, stage.hostile_key)

    def decided() -> Any:  # noqa: ANN401 - the condition
        ready = condition(get("adapterdeployment", name, HOSTILE), "Ready")
        return ready if ready["status"] == "True" or ready["reason"] == "RevisionFailed" else None

    try:
        # If only the canary detects it, the pod's engine is restarted; the other pod keeps serving.
        with trial.attack():
            stage.deploy(name)
            # Its 20 MB are downloaded, measured, loaded and checked by the canary on a busy core.
            ready = trial.status("the AdapterDeployment is decided", decided, within=45)
            trial.observe(f"{ready['reason']}: {ready['message']}")
            for _ in range(8):  # an adapter may return garbage to its own clients
                client.post_once(
                    CHAT,
                    {"model": f"{HOSTILE}/{name}", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8},
                )
    finally:
        stage.remove(name)


@pytest.mark.attack("A4", "the engine of one pod stops computing (SIGSTOP) while its server still answers /health")
def test_hung_engine(stage: Stage, trial: Trial) -> None:
    pod = stage.pods()[0]
    name = pod["metadata"]["name"]
    core = _engine_core(str(container_status(pod, "engine")["containerID"]))
    with trial.attack(outage_seconds=180, reason="requests in the hung engine failed when it was restarted"):
        os.kill(core, signal.SIGSTOP)
        try:

            def unready() -> Any:  # noqa: ANN401 - the sentence
                degraded = condition(get("servingpool", POOL, PLATFORM), "Degraded")
                return degraded["message"] if degraded["status"] == "True" and name in degraded["message"] else None

            # A busy engine on CPUs may process no token for 60 s before requests avoid its pod, and for 120 s before it
            # is restarted.
            trial.observe(
                trial.status("the pool reports that the engine processes no tokens", unready, within=75, timeout=90)
            )
            trial.recovered("both pods serve the victim again", lambda: stage.wait_until_served(240) or True, 240)
        finally:
            with suppress(ProcessLookupError):
                os.kill(core, signal.SIGCONT)
    trial.victim_recovers(within=180)


def _engine_core(container_id: str) -> int:
    """Return the engine process, which is the API server's child with the highest memory usage."""
    processes = processes_of(container_id)
    named = [pid for pid in processes if b"EngineCore" in (Path("/proc") / str(pid) / "cmdline").read_bytes()]
    return (named or processes)[0]
