from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer_rig import Workbench


def test_validation_estimates_the_peak_of_a_gpu(bench: Workbench) -> None:
    def peak(method: str, micro: int) -> int:
        hyper = {"maxSteps": 3, "batchSize": 4, "microBatchSize": micro}
        job = bench.job(method={method: {}}, hyperparameters=hyper, resources={"gpus": 1})
        ran = bench.run("validate", job)
        assert ran.code == 0
        assert ran.result.preflight is not None
        assert ran.result.preflight.estimated_peak_bytes is not None
        return ran.result.preflight.estimated_peak_bytes

    assert 800_000_000 < peak("qlora", 1) < peak("lora", 1) < peak("lora", 4) < 850_000_000


def test_a_job_on_the_cpu_has_no_estimate_of_a_gpu(bench: Workbench) -> None:
    ran = bench.run("validate", bench.job())
    assert ran.result.preflight is not None
    assert ran.result.preflight.estimated_peak_bytes is None
