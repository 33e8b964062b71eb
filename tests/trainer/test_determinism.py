"""The requirement for deterministic algorithms, as far as it can be tested without a GPU: the rule itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tunesmith_trainer.training.determinism import run_deterministically

if TYPE_CHECKING:
    from collections.abc import Iterator

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    benchmark, fill = torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(mode=False)
    torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory = benchmark, fill


def needs_what_has_none() -> torch.Tensor:
    """Run an operation of PyTorch that has no deterministic implementation, not even on a CPU."""
    return torch.zeros(3).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]), accumulate=False)


def test_deterministic_algorithms_are_not_required_on_a_cpu() -> None:
    assert run_deterministically(torch.device("cpu"), torch.are_deterministic_algorithms_enabled, print) is False


def test_deterministic_algorithms_are_required_on_a_gpu() -> None:
    assert run_deterministically(GPU, torch.are_deterministic_algorithms_enabled, print) is True
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_an_operation_without_one_is_reported_and_the_run_continues() -> None:
    reports: list[str] = []
    with pytest.warns(UserWarning, match="put_ does not have a deterministic implementation"):
        assert run_deterministically(GPU, needs_what_has_none, reports.append).shape == (3,)
    assert reports == ["  put_ has no deterministic implementation: this run cannot be repeated bit for bit"]


def test_other_errors_are_raised() -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_deterministically(GPU, fail, print)
