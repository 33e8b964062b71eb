"""An engine that does not answer as the trained model is detected, and one that does is not suspected.

The engine is a real vLLM. A damage is played by an artifact whose expected answers belong to other weights, another
base, another data type or another template than the engine's: the engine then answers as one with that fault would.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.server.http_client import call
from tests.server.server_rig import (
    BASE_NAME,
    REPOSITORY,
    Artifact,
    MissingPartError,
    Pod,
    S3Server,
    find,
    wait_until,
    write_safetensors,
)
from tests.server.test_serving_pod import ServingPod
from tunesmith.api.parity import ParityMode, ParityVerdict
from tunesmith.contracts.agent import AdapterParity, Residency, ResidencyState
from tunesmith.contracts.fingerprint import LocalModelFolder, base_fingerprint
from tunesmith.contracts.safetensors import read_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Tensors = dict[str, np.ndarray[Any, Any]]
RANK = 8
TARGETS = ("q_proj", "v_proj", "down_proj")
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}<|im_start|>"
LOADS, ADAPTERS_AT_ONCE = 100, 3
VOCABULARY = 300
MORE = ("", "lm_head", "embed_tokens")


def tensors(base: Path, seed: int, *, scale: float = 0.08, more: str = "") -> Tensors:
    """The weights of a random adapter that changes most answers."""
    random = np.random.default_rng(seed)
    found: Tensors = {}
    for name, tensor in sorted(read_tensors(base / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        outputs, inputs = tensor.shape if len(tensor.shape) == 2 else (0, 0)
        if more == "embed_tokens" and module.endswith(more):
            place = f"base_model.model.{module}"
            found[f"{place}.lora_embedding_A"] = random.normal(0, scale, (RANK, outputs)).astype(np.float32)
            found[f"{place}.lora_embedding_B"] = random.normal(0, scale, (inputs, RANK)).astype(np.float32)
        elif module.endswith(TARGETS) or (more == "lm_head" and module == more):
            place = f"base_model.model.{module}"
            found[f"{place}.lora_A.weight"] = random.normal(0, scale, (RANK, inputs)).astype(np.float32)
            found[f"{place}.lora_B.weight"] = random.normal(0, scale, (outputs, RANK)).astype(np.float32)
    return found


def write(folder: Path, weights: Tensors, *, rank: int = RANK, alpha: int = 2 * RANK) -> Path:
    folder.mkdir(parents=True)
    write_safetensors(folder / "adapter_model.safetensors", weights)
    targets = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in weights})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets, "lora_dropout": 0.0}))
    return folder


class Trainer:
    """record_parity.py in the trainer's environment."""

    def __init__(self, log: Path) -> None:
        python = find(
            "the trainer's environment",
            "TUNESMITH_TRAINER_PYTHON",
            [REPOSITORY / "trainer-image/.venv/bin/python"],
            "run `make environment-trainer`",
        )
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(python), "-m", "tests.server.record_parity"],
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def do(self, **request: Any) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line == "done\n":
                return
        pytest.fail(self._log.read_text()[-3000:], pytrace=False)

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


def zeroed(weights: Tensors, where: Callable[[str], bool]) -> Tensors:
    """The adapter as an engine computes it that applies only a part of it."""
    return {
        name: np.zeros_like(value) if name.endswith("lora_B.weight") and where(name) else value
        for name, value in weights.items()
    }


def with_flipped_bit(weights: Tensors, *, harmless: bool = False) -> Tensors:
    """Multiply the greatest value by a power of 2, or change its last bit."""
    name = next(name for name in sorted(weights) if name.endswith("down_proj.lora_B.weight"))
    changed = weights[name].copy()
    place, bits = int(np.abs(changed).argmax()), changed.view(np.uint32).reshape(-1)
    exponent_bit = next(bit for bit in (25, 24, 23) if not int(bits[place]) >> bit & 1)
    bits[place] ^= np.uint32(1 << (0 if harmless else exponent_bit))
    return {**weights, name: changed}


def of_next_layer(weights: Tensors) -> Tensors:
    def renamed(name: str) -> str:
        return (
            name.replace("layers.0.", "layers.X.").replace("layers.1.", "layers.0.").replace("layers.X.", "layers.1.")
        )

    return {name: weights[renamed(name)] for name in weights}


ADAPTER, OTHER = 1, 2
WEIGHTS: dict[str, Callable[[Tensors, Tensors], Tensors]] = {
    "not-applied": lambda own, _: zeroed(own, lambda _: True),
    "half-applied": lambda own, _: zeroed(own, lambda name: "layers.1." in name),
    "modules-missing": lambda own, _: zeroed(own, lambda name: "down_proj" in name),
    "other-rank": lambda own, _: {
        name: value[: RANK // 2] if "lora_A" in name else value[:, : RANK // 2] for name, value in own.items()
    },
    "flipped-bit": lambda own, _: with_flipped_bit(own),
    "swapped-halves": lambda own, other: {name: own[name] if "lora_A" in name else other[name] for name in own},
    "other-adapter": lambda _, other: other,
    "other-layer": lambda own, _: of_next_layer(own),
    "scaled": lambda own, _: own,
    "negated": lambda own, _: {name: -value if "lora_A" in name else value for name, value in own.items()},
}
"""The weights of the engine where the expected answers are those of `own`."""
MISSING = {"head-missing": "lm_head", "embedding-missing": "embed_tokens"}
"""Modules that the trained adapter had besides those of the served one."""
OTHER_BASES = {"other-base": "noise", "other-quantisation": "coarse"}
RECORDED = (*OTHER_BASES, "other-template", *MISSING)
"""Damages by other expected answers."""
DAMAGES = (*WEIGHTS, *RECORDED)
REPRESENTATIVE = ("not-applied", "swapped-halves", "other-template")


class ParityPod(ServingPod):
    """A pod with artifacts by name."""

    artifacts: Artifacts

    def check(self, *names: str, mode: ParityMode = ParityMode.REPORT) -> dict[str, Residency]:
        """Have the adapters loaded and checked."""
        for name in names:
            entry = self.entries.get(name) or self.artifacts.publish(name)
            self.entries[name] = {**entry, "parity": mode.value}
        self.want(*names)

        def checked() -> dict[str, Residency] | None:
            assert self.engine.running(), self.engine.tail()
            assert self.agent.running(), self.agent.tail()
            found = {name: self.residency(name) for name in names}
            known = {name: entry for name, entry in found.items() if entry is not None and _is_checked(entry)}
            return known if len(known) == len(names) else None

        return wait_until(checked, f"{names} are checked; see {self.agent.log} and {self.engine.log}")

    def clear(self) -> None:
        self.want()
        wait_until(lambda: not self.state().adapters, f"no adapter is loaded; see {self.agent.log}")


def _is_checked(entry: Residency) -> bool:
    return (
        entry.parity is not None
        and entry.parity.verdict is not ParityVerdict.UNFINISHED
        and entry.state in {ResidencyState.RESIDENT, ResidencyState.FAILED}
    )


def result(entry: Residency) -> AdapterParity:
    assert entry.parity is not None
    return entry.parity


class Artifacts:
    """A base model and artifacts for it, which are made and published when they are needed."""

    def __init__(self, folder: Path, trainer: Trainer, store: S3Server) -> None:
        self.base = folder / "base"
        self._folder, self._trainer, self._store = folder, trainer, store
        trainer.do(make=str(self.base), change="none")
        self._fingerprint = base_fingerprint(LocalModelFolder(self.base))
        self._own = tensors(self.base, ADAPTER)
        random = np.random.default_rng(3)
        self._rows = [
            [random.integers(5, VOCABULARY, 12).tolist(), random.integers(5, VOCABULARY, 4).tolist()] for _ in range(5)
        ]

    def publish(self, name: str) -> dict[str, str]:
        """Return the entry of the desired list of a case of this module."""
        folder, rank, alpha = self._folder / "published" / name, RANK, 2 * RANK
        weights, expected = self._own, "own"
        if name in WEIGHTS:
            rank = RANK // 2 if name == "other-rank" else RANK
            alpha = {"other-rank": RANK, "scaled": 3 * RANK}.get(name, alpha)
            weights = WEIGHTS[name](self._own, tensors(self.base, OTHER))
        elif name == "harmless-bit":
            weights = with_flipped_bit(self._own, harmless=True)
        elif name.startswith("sound-"):
            seed = int(name.removeprefix("sound-"))
            weights = tensors(self.base, seed, scale=0.03 + 0.01 * seed, more=MORE[seed % 3])
            expected = name
        elif name in RECORDED:
            expected = name
        write(folder, weights, rank=rank, alpha=alpha)
        if name != "unrecorded":
            for file in self._answers(expected, weights).iterdir():
                shutil.copy(file, folder)
        return Artifact(folder, self._fingerprint, rank).publish(self._store, model=name)

    def _answers(self, name: str, weights: Tensors) -> Path:
        """Return the folder with expected answers."""
        into = self._folder / "expected" / name
        if into.exists():
            return into
        request: dict[str, Any] = {"base": str(self.base), "into": str(into), "rows": self._rows}
        recorded = weights if name.startswith("sound-") else self._own
        if name in MISSING:
            recorded = tensors(self.base, ADAPTER, more=MISSING[name])
        elif name in OTHER_BASES:
            request["base"] = str(self._folder / name)
            self._trainer.do(make=request["base"], change=OTHER_BASES[name])
        elif name == "other-template":
            request["template"] = TEMPLATE
        self._trainer.do(artifact=str(write(self._folder / "recorded" / name, recorded)), **request)
        return into


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, store: S3Server) -> Iterator[Artifacts]:
    folder = tmp_path_factory.mktemp("parity")
    try:
        trainer = Trainer(folder / "trainer.log")
    except MissingPartError as error:
        pytest.fail(str(error), pytrace=False)
    try:
        yield Artifacts(folder, trainer, store)
    finally:
        trainer.stop()


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory, artifacts: Artifacts, store: S3Server) -> Iterator[ParityPod]:
    try:
        running = ParityPod(Pod(tmp_path_factory.mktemp("pod"), artifacts.base, store), {})
    except MissingPartError as error:
        pytest.fail(str(error), pytrace=False)
    running.artifacts = artifacts
    try:
        running.start()
        yield running
    finally:
        running.stop()


def test_a_sound_adapter_passes_and_is_served_with_parity_required(pod: ParityPod) -> None:
    entry = pod.check("own", mode=ParityMode.REQUIRED)["own"]
    found = result(entry)
    assert (found.verdict, entry.state) == (ParityVerdict.PASSED, ResidencyState.RESIDENT), found
    assert found.distance is not None
    assert found.gap is not None
    assert found.base_distance is not None
    assert max(found.distance, found.base_distance) < 1e-3
    assert found.gap > 0.1
    assert found.tolerance == 0.01
    assert pod.complete(pod.entries["own"]["engineName"])


@pytest.mark.parametrize(
    "damage", [pytest.param(name, marks=() if name in REPRESENTATIVE else pytest.mark.long) for name in DAMAGES]
)
def test_a_damage_is_detected(pod: ParityPod, damage: str, record_property: Callable[[str, object], None]) -> None:
    entry = pod.check(damage)[damage]
    found = result(entry)
    record_property("parity", f"{damage}: {found.message}")
    assert found.verdict is ParityVerdict.FAILED, found
    # Report: it is served nevertheless.
    assert entry.state is ResidencyState.RESIDENT
    if damage == "not-applied":
        assert "it does not apply the adapter" in found.message
    refused = pod.check(damage, mode=ParityMode.REQUIRED)[damage]
    assert (refused.state, refused.permanent) == (ResidencyState.FAILED, True)
    assert refused.message.startswith("parity is required, and ")
    assert pod.complete(BASE_NAME)


def test_a_damage_that_changes_no_answer_is_no_alarm(pod: ParityPod) -> None:
    assert result(pod.check("harmless-bit")["harmless-bit"]).verdict is ParityVerdict.PASSED


def test_an_artifact_without_expected_answers_is_served_unless_parity_is_required(pod: ParityPod) -> None:
    entry = pod.check("unrecorded")["unrecorded"]
    assert (result(entry).verdict, entry.state) == (ParityVerdict.NOT_RECORDED, ResidencyState.RESIDENT)
    entry = pod.check("unrecorded", mode=ParityMode.REQUIRED)["unrecorded"]
    assert (entry.state, entry.permanent) == (ResidencyState.FAILED, True)


@pytest.mark.long
def test_sound_loads_are_no_alarm(pod: ParityPod, record_property: Callable[[str, object], None]) -> None:
    """Other requests are in the same batches."""
    stop, names = threading.Event(), [f"sound-{seed}" for seed in range(10)]

    def load() -> None:
        while not stop.is_set():
            body = {"model": BASE_NAME, "prompt": "Who keeps the lighthouse?", "max_tokens": 24, "ignore_eos": True}
            call(f"{pod.pod.engine_url}/v1/completions", "POST", body)

    clients = [threading.Thread(target=load) for _ in range(2)]
    for client in clients:
        client.start()
    results: list[AdapterParity] = []
    try:
        while len(results) < LOADS:
            start = len(results) % len(names)
            results += map(result, pod.check(*(names * 2)[start : start + ADAPTERS_AT_ONCE]).values())
            pod.clear()
    finally:
        stop.set()
        for client in clients:
            client.join()
    record_property("loads", len(results))
    record_property("greatest distance", max(entry.distance or 0.0 for entry in results))
    record_property("smallest gap", min(entry.gap or 0.0 for entry in results))
    assert {entry.verdict for entry in results} == {ParityVerdict.PASSED}
