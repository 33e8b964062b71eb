"""A real engine that an adapter damages, that hangs, or that dies: the agent detects it, and the pod recovers."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.server.server_rig import (
    BASE_NAME,
    MissingPartError,
    Pod,
    S3Server,
    agent_container,
    listens,
    make_adapter,
    wait_until,
    write_safetensors,
)
from tests.server.test_serving_pod import ServingPod
from tunesmith.contracts.agent import ResidencyState
from tunesmith.contracts.safetensors import read_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def pod(
    tmp_path_factory: pytest.TempPathFactory, base: Path, fingerprint: str, store: S3Server
) -> Iterator[ServingPod]:
    folder = tmp_path_factory.mktemp("guarded-pod")
    entries = {
        name: make_adapter(folder / name, base, fingerprint, seed=seed).publish(store, model=name)
        for seed, name in enumerate(("pirate", "poet"), 1)
    }
    huge = make_adapter(folder / "huge", base, fingerprint, seed=3)
    weights = huge.folder / "adapter_model.safetensors"
    tensors = {name: np.full(tensor.shape, 1e30, np.float32) for name, tensor in read_tensors(weights).items()}
    write_safetensors(weights, tensors)
    entries["huge"] = huge.publish(store, model="huge")
    try:
        running = ServingPod(Pod(folder / "pod", base, store), entries)
    except MissingPartError as error:
        pytest.fail(str(error), pytrace=False)
    running.agent = agent_container(running.pod, canary_seconds=10, hang_seconds=15)
    running.start()
    yield running
    running.stop()


def base_answer(pod: ServingPod) -> str:
    return pod.complete(BASE_NAME)


def starts(pod: ServingPod) -> int:
    """Number of engines that the supervisor has seen ready."""
    return pod.engine.log.read_text().count("vLLM answers")


def wait_restarted(pod: ServingPod, before: int) -> None:
    wait_until(lambda: starts(pod) > before, f"the engine is started again; see {pod.engine.log}")
    assert pod.engine.running()


def test_an_adapter_that_damages_the_engine_is_detected_and_refused(pod: ServingPod) -> None:
    pod.want("pirate")
    pod.wait_resident("pirate")
    before = base_answer(pod), pod.complete(pod.entries["pirate"]["engineName"])
    started = starts(pod)
    name = pod.entries["huge"]["engineName"]
    # As if its file had passed the checks: it lies where the agent keeps what did.
    pod.agent.kill()
    shutil.copytree(pod.pod.folder.parent / "huge", pod.pod.adapters / pod.entries["huge"]["digest"][7:])
    pod.agent.start()
    wait_until(lambda: listens(pod.pod.agent_port), "the agent listens again")
    pod.want("pirate", "huge")
    problem = wait_until(lambda: pod.state().problem, f"the pod reports the adapter; see {pod.agent.log}")
    assert f"The base model's answers changed after the adapter {name} was loaded" in problem
    wait_restarted(pod, started)
    pod.wait_resident("pirate")
    state = pod.state()
    assert not state.problem
    assert state.engine_crashes == 0  # no request was the cause
    assert state.engine_ready
    failure = pod.residency("huge")
    assert failure is not None
    assert (failure.state, failure.permanent) == (ResidencyState.FAILED, True)
    assert "changes the answers of the base model" in failure.message
    assert (base_answer(pod), pod.complete(pod.entries["pirate"]["engineName"])) == before
    assert f"restarts the engine: {problem}" in pod.engine.log.read_text()


def test_a_restarted_agent_still_refuses_it(pod: ServingPod) -> None:
    pod.agent.kill()
    pod.agent.start()
    wait_until(lambda: listens(pod.pod.agent_port), "the agent listens again")
    pod.wait_resident("pirate")
    wait_until(lambda: (entry := pod.residency("huge")) and entry.permanent, "it is refused", 30)
    pod.want("pirate")


def core(pod: ServingPod) -> int:
    """The process that computes."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) == pod.engine.group and b"EngineCor" in (process / "comm").read_bytes():
                return int(process.name)
        except OSError:
            continue
    pytest.fail("the engine has no process of its own that computes")


def test_an_engine_that_hangs_is_restarted(pod: ServingPod) -> None:
    pod.want("pirate")
    pod.wait_resident("pirate")
    started = starts(pod)
    os.kill(core(pod), signal.SIGSTOP)
    problem = wait_until(lambda: pod.state().problem, f"the pod reports it; see {pod.agent.log}")
    assert "it hangs" in problem
    wait_restarted(pod, started)
    pod.wait_resident("pirate")
    state = pod.state()
    assert not state.problem
    assert state.engine_crashes == 1
    assert "it hangs" in state.crashes[0].reason


def test_an_engine_that_dies_is_restarted(pod: ServingPod) -> None:
    before, started = base_answer(pod), starts(pod)
    os.kill(core(pod), signal.SIGKILL)
    wait_restarted(pod, started)
    pod.wait_resident("pirate")
    assert base_answer(pod) == before
    state = pod.state()
    assert state.engine_crashes == 2
    assert state.crashes[1].was_ready
    assert state.engine_start_seconds is not None
    assert state.engine_start_seconds > 1
