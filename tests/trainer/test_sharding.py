"""FSDP2: training with sharded weights gives the same result as with whole ones."""

from __future__ import annotations

import re
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from tests.trainer import pods as processes
from tests.trainer import quantized_bases
from tests.trainer.pods import Pods, assert_equal, pods
from tests.trainer.trainer_rig import chat_rows, write_rows
from tunesmith.api.conditions import FailureReason
from tunesmith.api.finetunejob_status import ContinuedFrom
from tunesmith_trainer.base_model.sharding import use_full_optimizer_states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FEW = {"maxSteps": 3, "batchSize": 6, "microBatchSize": 2, "learningRate": 0.01}
MARKED = [
    {
        "prompt": f"Door {number}?",
        "completion": f"It is {'blue' if number % 3 else 'green'}.",
        "label": number % 2 == 0,
    }
    for number in range(20)
]
JOBS: dict[str, dict[str, Any]] = {
    "lora with dropout": {"hyperparameters": FEW},
    "qlora with recomputed activations": {
        "method": {"qlora": {"rank": 4, "alpha": 8}},
        "hyperparameters": FEW | {"gradientCheckpointing": True},
    },
    "qlora in bfloat16": {
        "method": {"qlora": {"rank": 4, "alpha": 8}},
        "hyperparameters": FEW | {"precision": "bfloat16"},
    },
    "full": {"method": {"full": {}}, "hyperparameters": FEW | {"learningRate": 0.001}},
    "dora, lora+ and a module that is trained whole": {
        "method": {"lora": {"rank": 4, "alpha": 8, "dora": True, "loraPlusRatio": 4, "modulesToSave": ["lm_head"]}},
        "hyperparameters": FEW | {"optimizer": "Lion", "learningRate": 0.001},
    },
}
LONG_JOBS: dict[str, dict[str, Any]] = {
    "lora in float16": {"hyperparameters": FEW | {"precision": "float16"}},
    "pissa, answers marked as good or bad": {
        "method": {"lora": {"rank": 4, "alpha": 8, "initialization": "PiSSA"}},
        "objective": {"kto": {}},
        "hyperparameters": FEW,
        "rows": MARKED,
    },
    "lora with compiled layers": {"hyperparameters": FEW | {"torchCompile": True}},
    "full with compiled layers": {
        "method": {"full": {}},
        "hyperparameters": FEW | {"learningRate": 0.001, "torchCompile": True},
    },
    "full in bfloat16": {
        "method": {"full": {}},
        "hyperparameters": FEW | {"learningRate": 0.001, "precision": "bfloat16", "gradientCheckpointing": True},
    },
    "full with sgd and recomputed activations": {
        "method": {"full": {}},
        "hyperparameters": FEW | {"optimizer": "SGD", "gradientCheckpointing": True},
    },
    "ia3 in 4 bits, noise on the embeddings": {
        "method": {"ia3": {"quantization": {}}},
        "hyperparameters": FEW | {"neftuneNoiseAlpha": 5},
    },
}


def sharded(folder: Path, base_model: Path, **spec: Any) -> Pods:
    return pods(folder, base_model, 2, resources={"gpus": 0, "nodes": 2, "dataParallelism": "FSDP2"}, **spec)


@pytest.mark.parametrize("name", [*JOBS, *(pytest.param(name, marks=pytest.mark.long) for name in LONG_JOBS)])
def test_two_ranks_with_sharded_weights_train_the_same_as_one(tmp_path: Path, base_model: Path, name: str) -> None:
    job = (JOBS | LONG_JOBS)[name]
    one = pods(tmp_path / "one", base_model, 1, **job)
    two = sharded(tmp_path / "two", base_model, **job)
    for run in (one, two):
        run.finish()
    assert_equal(two, one)
    kept = re.search(r"FSDP2: each of 2 processes keeps ([0-9.]+) MiB", two.log(0))
    assert kept is not None, two.log(0)
    stored = (base_model / "model.safetensors").stat().st_size / 2**20
    # Less in 4 bits; rows that cannot be halved, and full training's, are not sharded.
    assert float(kept[1]) < 0.6 * stored
    assert "FSDP2" not in one.log(0)


@pytest.mark.parametrize(
    ("publish", "method"),
    [
        (quantized_bases.in_4_bits, {"qlora": {"rank": 4, "alpha": 8}}),
        pytest.param(quantized_bases.in_fp8, {"lora": {"rank": 4, "alpha": 8}}, marks=pytest.mark.long),
        pytest.param(quantized_bases.in_fp8, {"qlora": {"rank": 4, "alpha": 8}}, marks=pytest.mark.long),
    ],
    ids=["4 bits", "fp8", "fp8, then 4 bits"],
)
def test_a_base_that_is_published_quantised(
    tmp_path: Path, base_model: Path, publish: Callable[[Path, Path], Path], method: dict[str, Any]
) -> None:
    base = publish(base_model, tmp_path / "base")
    one = pods(tmp_path / "one", base, 1, method=method, hyperparameters=FEW)
    two = sharded(tmp_path / "two", base, method=method, hyperparameters=FEW)
    for run in (one, two):
        run.finish()
    assert_equal(two, one)


@pytest.fixture
def tied_model(tmp_path: Path, base_model: Path) -> Path:
    """Create a base whose embedding is also its output layer."""
    folder = tmp_path / "tied"
    shutil.copytree(base_model, folder)
    config = AutoConfig.from_pretrained(base_model, tie_word_embeddings=True)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", [{"full": {}}, {"lora": {"rank": 4, "alpha": 8}}], ids=["full", "lora"])
def test_a_base_with_tied_weights_is_scored_and_packaged(
    tmp_path: Path, tied_model: Path, method: dict[str, Any]
) -> None:
    """Answers are generated by all ranks that have a shard of the weights; base and result are compared."""
    questions = write_rows(tmp_path / "questions.jsonl", chat_rows(2))
    suites = [
        {"name": "rows", "heldOutLoss": {}},
        {"name": "doors", "generation": {"dataset": {"uri": f"file://{questions}"}, "maxNewTokens": 3}},
    ]
    job: dict[str, Any] = {"method": method, "hyperparameters": FEW, "evaluation": {"suites": suites}}
    if "lora" in method:
        job["output"] = {"merge": "Original"}
    one, two = pods(tmp_path / "one", tied_model, 1, **job), sharded(tmp_path / "two", tied_model, **job)
    for run in (one, two):
        run.finish()
    assert_equal(two, one)
    scores, expected = (run.result(0).evaluation for run in (two, one))
    assert scores is not None
    assert expected is not None
    assert [(score.suite, score.metric, score.base, score.adapter) for score in scores.scores or []] == [
        (score.suite, score.metric, pytest.approx(score.base, rel=1e-4), pytest.approx(score.adapter, rel=1e-4))
        for score in expected.scores or []
    ]


@pytest.mark.parametrize("name", [pytest.param("lora with dropout", marks=pytest.mark.long), "full"])
def test_a_stopped_run_resumes_to_the_identical_result(tmp_path: Path, base_model: Path, name: str) -> None:
    job = JOBS[name] | {
        "hyperparameters": FEW | {"maxSteps": 6, "learningRate": 0.001},
        "checkpoint": {"everySteps": 1},
    }
    through, stopped = (sharded(tmp_path / kind, base_model, **job) for kind in ("through", "stopped"))
    through.finish()
    stopped.start()
    stopped.interrupt((1,), signal.SIGTERM, step=2)
    assert stopped.wait() == [143, 143], [stopped.log(0), stopped.log(1)]
    stopped.finish()
    assert stopped.result(0).resumed_from_step
    assert_identical(stopped, through)


def assert_identical(run: Pods, expected: Pods) -> None:
    assert run.curve() == expected.curve()
    weights = expected.weights()
    assert {name: torch.equal(tensor, weights[name]) for name, tensor in run.weights().items()} == dict.fromkeys(
        weights, True
    )


def test_ranks_with_sharded_weights_continue_from_an_adapter(tmp_path: Path, base_model: Path) -> None:
    """The parity check of the start, dropout, the best step and a kill of one rank, with one process as reference."""
    first = pods(tmp_path / "first", base_model, 1, hyperparameters=FEW)
    first.finish()
    job = {
        "continueFrom": {"artifact": {"uri": f"file://{first.output}/artifact"}},
        "hyperparameters": FEW | {"maxSteps": 8},
        "checkpoint": {"everySteps": 1},
        "evaluation": {"everySteps": 1, "publish": "Best", "earlyStopping": {"patience": 6}},
        "rows": chat_rows(60)[40:],
    }
    one = pods(tmp_path / "one", base_model, 1, **job)
    through, killed = (sharded(tmp_path / kind, base_model, **job) for kind in ("through", "killed"))
    one.finish()
    through.finish()
    killed.start()
    killed.interrupt((1,), signal.SIGKILL, step=3, seconds=0.1)
    assert killed.wait() == [3, -signal.SIGKILL], [killed.log(0), killed.log(1)]
    killed.finish()
    assert killed.result(0).resumed_from_step
    assert killed.result(0).evaluation == through.result(0).evaluation
    assert_identical(killed, through)
    assert_equal(through, one)
    lineage = [run.result(0).resolved for run in (one, through)]
    assert [resolved.continued_from for resolved in lineage if resolved is not None] == 2 * [
        ContinuedFrom(uri=f"file://{first.output}/artifact", digest=first.result(0).artifact.digest)
    ]


def without_a_compiler_at_the_second(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """Run a pod's container, in which the second rank cannot compile."""
    if environment["JOB_COMPLETION_INDEX"] == "1":
        torch._inductor.config.cpp.cxx = ("/no/compiler",)
    processes._command(arguments, environment, log)


@pytest.mark.long
def test_a_rank_that_cannot_compile_stops_all_with_its_reason(
    tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank waits for it within a layer."""
    monkeypatch.setattr(processes, "_command", without_a_compiler_at_the_second)
    two = sharded(tmp_path, base_model, **LONG_JOBS["full with compiled layers"])
    two.start()
    assert two.wait() == [3, 2], [two.log(0), two.log(1)]
    assert two.result(0).lost_peer
    assert two.result(1).reason is FailureReason.INVALID_SPEC
    assert "hyperparameters.torchCompile" in two.result(1).message


@pytest.fixture
def _second_of_two() -> Iterator[None]:
    """Make collectives do nothing, as if the other rank had answered at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_second_of_two")
@pytest.mark.parametrize("keep", [True, False])
def test_all_ranks_gather_the_optimizers_states_and_only_the_first_keeps_them(*, keep: bool) -> None:
    mesh = init_device_mesh("cpu", (2,))
    shared_out = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)], src_data_rank=None)
    parameters = [torch.nn.Parameter(shared_out), torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    use_full_optimizer_states(optimizer, keep=keep)
    with CommDebugMode() as seen:
        states = optimizer.state_dict()["state"]
    assert seen.get_total_counts() == 2  # both averages of the sharded weight
    shapes = {number: [tuple(value.shape) for value in state.values()] for number, state in states.items()}
    assert shapes == ({0: [(), (4, 3), (4, 3)], 1: [(), (3,), (3,)]} if keep else {})
