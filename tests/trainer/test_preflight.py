from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.trainer.sparse_weights import enlarge
from tests.trainer.trainer_rig import chat_row, chat_rows
from tunesmith.api.conditions import FailureReason
from tunesmith.api.finetunejob_status import Preflight, Verdict
from tunesmith.api.placement import DataParallelism
from tunesmith_trainer.manifest import load_job
from tunesmith_trainer.preflight.prepare import prepare
from tunesmith_trainer.preflight.sizing import refusal
from tunesmith_trainer.store import Stores

if TYPE_CHECKING:
    from tests.trainer.trainer_rig import Workbench
    from tunesmith_trainer.preflight.prepare import Prepared

ESTIMATE = Path(__file__).resolve().parents[2] / ".venv" / "bin" / "tunesmith"
GPU: dict[str, Any] = {"resources": {"gpus": 1}}
COMMANDS = {"validate": DataParallelism.FSDP2, "train": None}
"""Data parallelism of a job for two nodes: `validate` decides for a cluster, `train` for this machine."""


def validated(bench: Workbench, *arguments: str, **spec: Any) -> Preflight:
    ran = bench.run("validate", bench.job(**(GPU | spec)), *arguments)
    assert ran.code == 0, ran.result.message
    assert ran.result.preflight is not None
    return ran.result.preflight


def test_validation_estimates_the_peak_of_a_gpu(bench: Workbench) -> None:
    def peak(method: str, micro: int) -> int:
        found = validated(
            bench, method={method: {}}, hyperparameters={"maxSteps": 3, "batchSize": 4, "microBatchSize": micro}
        )
        assert found.estimated_peak_bytes is not None
        assert found.peak_parts is not None
        assert found.estimated_peak_bytes == sum(found.peak_parts.manifest().values())
        return found.estimated_peak_bytes

    assert 800_000_000 < peak("qlora", 1) < peak("lora", 1) < peak("lora", 4) < 850_000_000


def test_a_job_on_the_cpu_has_no_gpu_estimate(bench: Workbench) -> None:
    found = validated(bench, "--gpu-memory-bytes", "1000", resources={"gpus": 0})
    assert (found.estimated_peak_bytes, found.verdict) == (None, None)


def test_without_the_gpus_memory_the_verdict_is_unknown(bench: Workbench) -> None:
    found = validated(bench)
    assert (found.verdict, found.gpu_memory_bytes, found.suggestion) == (Verdict.UNKNOWN, None, None)


def test_settings_are_decided_for_a_job_that_fits(bench: Workbench) -> None:
    ran = bench.run("validate", bench.job(**GPU), "--gpu-memory-bytes", str(10**10))
    assert ran.result.preflight is not None
    assert ran.result.resolved is not None
    assert (ran.result.preflight.verdict, ran.result.preflight.gpu_memory_bytes) == (Verdict.FITS, 10**10)
    # there is memory for all activations
    assert (ran.result.resolved.micro_batch_size, ran.result.resolved.gradient_checkpointing) == (4, False)


def test_decided_settings_are_kept_on_another_gpu(bench: Workbench) -> None:
    job = bench.job(**GPU)
    job["status"] = {"resolved": {"microBatchSize": 2, "gradientCheckpointing": True, "totalSteps": 2}}
    again = bench.run("validate", job, "--gpu-memory-bytes", str(10**10)).result.resolved
    assert again is not None
    assert (again.micro_batch_size, again.gradient_checkpointing, again.total_steps) == (2, True, 2)


def test_in_a_cluster_the_refusal_suggests_larger_gpus() -> None:
    counted = Preflight(
        estimated_peak_bytes=30 * 2**30,
        gpu_memory_bytes=15 * 2**30,
        verdict=Verdict.WILL_NOT_FIT,
        suggestion="it fits with rank: 8",
    )
    assert refusal(counted, cluster=True) == (
        "the run needs about 30.0 GiB of GPU memory and the smallest GPU that it may be scheduled on has 15.0 GiB: "
        "it fits with rank: 8; if the cluster has larger GPUs, select them with scheduling.nodeSelector"
    )


@pytest.fixture
def wide(bench: Workbench, tmp_path: Path) -> Workbench:
    """Return a workbench with a base whose configuration declares seven billion parameters, never loaded on the CPU."""
    folder = shutil.copytree(bench.base, tmp_path / "wide")
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "head_dim": 128}
    enlarge(folder, **sizes, num_attention_heads=32, num_key_value_heads=32)
    bench.base = folder
    return bench


@pytest.mark.parametrize(
    ("gibibytes", "rank", "suggestion"),
    [
        (8, 16, "it fits with method.qlora instead of lora (about 4.5 GiB)"),
        (20, 512, "it fits with method.lora.rank: 128 (about 17.6 GiB)"),
        (
            4,
            16,
            (
                "it fits with resources.gpus: 2, resources.dataParallelism: FSDP2 and method.qlora instead of lora "
                "(about 3.2 GiB on each GPU)"
            ),
        ),
        (2, 16, "no change of this job makes it fit: it needs a GPU with about 4.2 GiB, or a smaller base model"),
    ],
)
def test_a_job_that_cannot_fit_is_refused_with_the_change_that_fits(
    wide: Workbench, gibibytes: int, rank: int, suggestion: str
) -> None:
    ran = wide.run(
        "validate", wide.job(**GPU, method={"lora": {"rank": rank}}), "--gpu-memory-bytes", str(gibibytes * 2**30)
    )
    assert (ran.code, ran.result.reason) == (2, FailureReason.WILL_NOT_FIT)
    assert f"GiB of GPU memory and the GPU has {gibibytes}.0 GiB: {suggestion}" in ran.result.message
    assert ran.result.preflight is not None
    assert (ran.result.preflight.verdict, ran.result.preflight.suggestion) == (Verdict.WILL_NOT_FIT, suggestion)


ALL: dict[str, Any] = {"method": {"full": {}}, "hyperparameters": {"maxSteps": 3, "batchSize": 8}}


@pytest.mark.parametrize(
    ("gibibytes", "resources", "spec", "expected"),
    [
        (80, {"gpus": 2}, {}, ("DDP", Verdict.FITS)),
        # 13 GiB of weights do not fit, half of them and the gathered part of the other half do
        (11, {"gpus": 2}, {}, ("FSDP2", Verdict.FITS)),
        (80, {"gpus": 4, "nodes": 2}, ALL, ("FSDP2", Verdict.FITS)),
        (80, {"gpus": 4, "nodes": 2, "dataParallelism": "FSDP2"}, {}, ("FSDP2", Verdict.FITS)),
        (80, {"gpus": 1}, {}, (None, Verdict.FITS)),
    ],
)
def test_weights_are_sharded_if_they_do_not_fit_whole(
    wide: Workbench, gibibytes: int, resources: dict[str, Any], spec: dict[str, Any], expected: tuple[Any, Verdict]
) -> None:
    plain: dict[str, Any] = {"hyperparameters": {"maxSteps": 3, "batchSize": 8}}
    job = wide.job(**(plain | spec), resources=resources)
    ran = wide.run("validate", job, "--gpu-memory-bytes", str(gibibytes * 2**30))
    assert ran.result.preflight is not None
    assert ran.result.resolved is not None
    assert (ran.result.resolved.data_parallelism, ran.result.preflight.verdict) == expected


@pytest.mark.parametrize(
    ("resources", "spec", "suggestion"),
    [
        ({"gpus": 2, "dataParallelism": "DDP"}, {}, "it fits with resources.dataParallelism: FSDP2 (about"),
        # its initialisation reads rows
        ({"gpus": 2}, {"method": {"lora": {"initialization": "EVA"}}}, "it fits with method.qlora instead of lora"),
        # its optimizer needs unsharded weights
        (
            {"gpus": 8},
            {"method": {"full": {}}, "hyperparameters": {"maxSteps": 3, "optimizer": "Lion"}},
            "it fits with method.qlora instead of full",
        ),
    ],
)
def test_sharding_is_proposed_if_it_is_possible(
    wide: Workbench, resources: dict[str, Any], spec: dict[str, Any], suggestion: str
) -> None:
    plain: dict[str, Any] = {"hyperparameters": {"maxSteps": 3, "batchSize": 8}}
    ran = wide.run("validate", wide.job(**(plain | spec), resources=resources), "--gpu-memory-bytes", str(11 * 2**30))
    assert ran.result.preflight is not None
    assert str(ran.result.preflight.suggestion).startswith(suggestion)


def test_sharding_is_not_proposed_for_a_base_that_cannot_be_sharded(wide: Workbench) -> None:
    enlarge(wide.base, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    ran = wide.run("validate", wide.job(**GPU, method={"lora": {}}), "--gpu-memory-bytes", str(4 * 2**30))
    assert ran.result.preflight is not None
    assert str(ran.result.preflight.suggestion).startswith("no change of this job makes it fit")


PLACES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing is requested": ({"gpus": 1, "nodes": 2}, {}),
    "FSDP2 is requested": ({"gpus": 1, "nodes": 2, "dataParallelism": "FSDP2"}, {}),
    "all weights": ({"gpus": 1, "nodes": 16}, {"method": {"full": {}}}),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_machine_that_trains_alone_does_not_shard(wide: Workbench, name: str) -> None:
    """The manifest requests several nodes, which only a cluster has."""
    resources, spec = PLACES[name]
    manifest = wide.folder / "job.yaml"
    hyper = {"maxSteps": 3, "batchSize": 32, "microBatchSize": 1}
    manifest.write_text(yaml.safe_dump(wide.job(**({"hyperparameters": hyper} | spec), resources=resources)))
    job, stores = load_job(manifest), Stores(secrets=wide.folder, allow_file=True)

    def prepared(ranks: int | None, gibibytes: int) -> Prepared:
        work = wide.folder / f"work-{ranks}"
        return prepare(job, stores, work, weights=False, ranks=ranks, gpu_memory=gibibytes * 2**30)

    enough = 24 if "method" in spec else 11
    together, alone = prepared(None, enough), prepared(1, enough)
    assert together.resolved.data_parallelism is DataParallelism.FSDP2
    assert together.preflight.verdict is Verdict.FITS
    assert alone.resolved.data_parallelism is None
    assert alone.preflight.verdict is Verdict.WILL_NOT_FIT
    assert "FSDP2" not in str(alone.preflight.suggestion)
    parts = prepared(1, 640).preflight.peak_parts
    assert parts is not None
    weights = parts.trainable_bytes / 16 if "method" in spec else parts.weights_bytes / 2
    assert weights == pytest.approx(6.5e9, rel=0.03)  # not sharded, and no gradients to send


def test_a_local_run_trains_on_one_machine(bench: Workbench) -> None:
    shared = {"gpus": 0, "nodes": 2, "dataParallelism": "FSDP2"}
    resolved = {command: bench.run(command, bench.job(resources=shared)).result.resolved for command in COMMANDS}
    assert {command: found.data_parallelism if found else None for command, found in resolved.items()} == COMMANDS


def test_several_ranks_without_sharding_keep_a_copy_of_the_gradients(wide: Workbench) -> None:
    hyper = {"maxSteps": 3, "batchSize": 8, "microBatchSize": 1}
    trained = [
        parts.trainable_bytes
        for gpus in (1, 2)
        if (parts := validated(wide, hyperparameters=hyper, resources={"gpus": gpus}).peak_parts) is not None
    ]
    assert trained[1] * 16 == trained[0] * 20


@pytest.mark.parametrize(
    ("method", "embeddings"),
    [({"qlora": {}}, 2), ({"qlora": {"quantization": {"computeType": "float32"}}}, 4)],
    ids=str,
)
def test_weights_outside_4_bits_count_in_their_type(wide: Workbench, method: dict[str, Any], embeddings: int) -> None:
    parts = validated(wide, method=method).peak_parts
    config = json.loads((wide.base / "config.json").read_text())
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    others = 2 * config["vocab_size"] * 4096 + 65 * 4096
    assert parts is not None
    assert parts.weights_bytes == pytest.approx(0.516 * linear + embeddings * others, rel=1e-6)


def test_impossible_recomputation_is_not_proposed_and_is_refused(wide: Workbench) -> None:
    prefix: dict[str, Any] = GPU | {"method": {"prefixTuning": {}}}
    ran = wide.run("validate", wide.job(**prefix), "--gpu-memory-bytes", str(8 * 2**30))
    assert ran.result.reason is FailureReason.WILL_NOT_FIT
    assert "GiB: it fits with method.prefixTuning.quantization: {} (about" in ran.result.message
    again = prefix | {"hyperparameters": {"maxSteps": 3, "gradientCheckpointing": True}}
    ran = wide.run("validate", wide.job(**again))
    assert (ran.code, ran.result.reason) == (2, FailureReason.INVALID_SPEC)
    assert "method.prefixTuning cannot be trained with recomputed activations" in ran.result.message


@pytest.mark.parametrize(
    ("gibibytes", "suggestion"),
    [
        (40, "it fits with method.lora instead of full (about 13.4 GiB)"),
        (8, "it fits with method.qlora instead of full (about"),
    ],
)
def test_an_adapter_is_proposed_if_all_weights_do_not_fit(wide: Workbench, gibibytes: int, suggestion: str) -> None:
    job = wide.job(**GPU, method={"full": {}}, hyperparameters={"maxSteps": 3, "batchSize": 4})
    ran = wide.run("validate", job, "--gpu-memory-bytes", str(gibibytes * 2**30))
    assert ran.result.reason is FailureReason.WILL_NOT_FIT
    assert ran.result.preflight is not None
    # 4 bytes for each weight, its gradient and AdamW's two, and copies in bfloat16
    assert (ran.result.preflight.estimated_peak_bytes or 0) > 18 * 6_400_000_000
    assert str(ran.result.preflight.suggestion).startswith(suggestion)


@pytest.mark.parametrize(
    ("how", "suggestion"),
    [
        ({}, "it fits with dataset.maxLength: 256 (drops 1 of 22 rows) (about"),
        ({"overlong": "Truncate"}, "it fits with dataset.maxLength: 256 (about"),
        ({"packing": True}, "it fits with dataset.maxLength: 256 (about"),
        ({"overlong": "Error"}, "it fits with resources.gpus: 2 and resources.dataParallelism: FSDP2 (about"),
    ],
)
def test_a_shorter_length_is_proposed_last(wide: Workbench, how: dict[str, Any], suggestion: str) -> None:
    rows = [*chat_rows(23), chat_row("Why?", "blue " * 480)]
    small = {"microBatchSize": 1, "gradientCheckpointing": True, "batchSize": 4, "maxSteps": 3}
    job = wide.job(rows, **GPU, method={"qlora": {"rank": 8}}, hyperparameters=small)
    job["spec"]["dataset"] |= {"maxLength": 512, "validationFraction": 0.1} | how
    ran = wide.run("validate", job, "--gpu-memory-bytes", "4650000000")
    assert ran.result.preflight is not None
    assert str(ran.result.preflight.suggestion).startswith(suggestion)


def test_the_estimate_command_shows_the_verdict(wide: Workbench) -> None:
    manifest = wide.folder / "job.yaml"
    manifest.write_text(yaml.safe_dump(wide.job(**GPU)))
    trainer = Path(sysconfig.get_path("scripts"), "tunesmith-trainer")
    done = subprocess.run(
        [ESTIMATE, "estimate", "-f", manifest, "--gpu-memory", "24GiB"],
        env=os.environ | {"TUNESMITH_TRAINER": str(trainer)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^peak          1[34]\.\d GiB of GPU memory", done.stdout, re.MULTILINE)
    assert "verdict       Fits\n" in done.stdout
