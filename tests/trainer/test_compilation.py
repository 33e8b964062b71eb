"""Norms and feed-forward layers compiled by torch.compile: equal results, wherever they are used."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch._inductor.config
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from tests.trainer.tiny_model import SMALL
from tunesmith.api.conditions import FailureReason
from tunesmith.api.finetunejob import FineTuneJobSpec
from tunesmith.api.hyperparameters import COMPILED_STEPS
from tunesmith.api.methods.fields import Quantization
from tunesmith_trainer.base_model.model import load_model
from tunesmith_trainer.base_model.precision import training_precision
from tunesmith_trainer.base_model.sharding import shard
from tunesmith_trainer.errors import InvalidSpecError
from tunesmith_trainer.preflight.plan import compiles
from tunesmith_trainer.process.ranks import Ranks
from tunesmith_trainer.training.batches import Collator
from tunesmith_trainer.training.compilation import compile_layers, run_compiled
from tunesmith_trainer.training.layout import LossImplementation, choose_loss_implementation
from tunesmith_trainer.training.lora import fuse
from tunesmith_trainer.training.loss import add_target_loss

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PretrainedConfig

    from tests.trainer.trainer_rig import Workbench

NO_COMPILER = torch._inductor.config.patch({"cpp.cxx": ("/no/compiler",)})
BATCHES = [(30, 7, 18), (5, 9), (40,), (100, 3, 50, 2), (2,)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder for compiled code."""
    return tmp_path_factory.mktemp("compiled")


def batch(implementation: LossImplementation, sizes: tuple[int, ...]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 300, (size,), generator=generator).tolist() for size in sizes]
    return Collator(8, 0, implementation.layout).join([{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids])


def adapted(base: Any, **settings: Any) -> tuple[PeftModel, LossImplementation]:
    add_target_loss(base)
    names = ["q_proj", "gate_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=names, init_lora_weights=False, **settings))
    fuse(model)
    return model.train(), choose_loss_implementation(model, base)


def results(
    model: PeftModel, base: Any, implementation: LossImplementation, sizes: tuple[int, ...]
) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    with implementation.use_attention(base), training_precision(model):
        summed = model(**batch(implementation, sizes), target_loss=True).summed
        summed.backward()
    return summed.item(), torch.cat([part.grad.flatten() for part in model.parameters() if part.grad is not None])


def assert_equal_results(
    model: PeftModel, base: Any, implementation: LossImplementation, folder: Path, near: float = 1e-4
) -> None:
    expected = [results(model, base, implementation, sizes) for sizes in BATCHES]
    reports: list[str] = []
    assert compile_layers(model, base, implementation, folder, reports.append, Ranks(), required=True)
    assert "norms and feed-forward layers" in reports[0]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for sizes, (loss, gradient) in zip(BATCHES, expected, strict=True):
        with run_compiled():
            found, slope = results(model, base, implementation, sizes)
        assert found == pytest.approx(loss, rel=near / 10)
        assert float((slope - gradient).norm()) <= near * float(gradient.norm())
    written = results(model, base, implementation, BATCHES[0])
    assert written[0] == expected[0][0]
    assert torch.equal(written[1], expected[0][1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "compiled again for other lengths"


@pytest.mark.parametrize(
    ("config", "settings", "recomputed"),
    [
        (LlamaConfig(**SMALL), {}, False),
        (Qwen3Config(**SMALL), {"lora_dropout": 0.1}, True),
    ],
    ids=["llama", "qwen3 with dropout, activations computed again"],
)
def test_results_are_equal_for_sequences_of_all_lengths(
    config: PretrainedConfig, settings: dict[str, Any], compiled: Path, *, recomputed: bool
) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    model, implementation = adapted(base, **settings)
    if recomputed:
        base.activation_checkpointing_enable({"use_reentrant": False})
    assert_equal_results(model, base, implementation, compiled)


def test_results_are_equal_up_to_rounding_in_16_bits(compiled: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), dtype=torch.bfloat16)
    model, implementation = adapted(base)
    assert_equal_results(model, base, implementation, compiled, near=2e-2)


def test_results_are_equal_over_a_base_in_4_bits(base_model: Path, compiled: Path) -> None:
    torch.manual_seed(0)
    # Loaded as in jobs: on some CPUs its products would otherwise have another type after an evaluation.
    base = load_model(base_model, torch.device("cpu"), Quantization(), torch.float32)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model, implementation = adapted(base)
    assert_equal_results(model, base, implementation, compiled)


def test_without_a_compiler_training_continues_unless_compilation_is_required(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**(SMALL | {"hidden_size": 48})))
    model, implementation = adapted(base)
    expected = results(model, base, implementation, BATCHES[0])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    reports: list[str] = []
    with NO_COMPILER:
        assert not compile_layers(model, base, implementation, tmp_path, reports.append, Ranks(), required=False)
        assert "layers are not compiled: " in reports[0]
        assert results(model, base, implementation, BATCHES[0])[0] == expected[0]
        with pytest.raises(
            InvalidSpecError, match=r"torchCompile: the model cannot be compiled on this machine .*: set it to false"
        ):
            compile_layers(model, base, implementation, tmp_path, reports.append, Ranks(), required=True)


class OddMLP(torch.nn.Linear):
    """A layer whose kernel returns correct values and wrong gradients."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        found = super().forward(values)
        return found + 0.5 * (found - found.detach()) if torch.compiler.is_compiling() else found


@pytest.fixture
def _group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group_of_one")
@pytest.mark.parametrize("shared_out", [False, True], ids=["whole", "shared out"])
def test_a_kernel_with_wrong_gradients_is_not_used(compiled: Path, *, shared_out: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    for layer in base.model.layers:
        layer.mlp = OddMLP(64, 64)
    add_target_loss(base)
    if shared_out:
        shard(base, torch.device("cpu"), Ranks(), full=True)
    reports: list[str] = []
    assert not compile_layers(
        base, base, choose_loss_implementation(base, base), compiled, reports.append, Ranks(), required=False
    )
    assert "layers are not compiled: the results differ by" in reports[0]
    assert all(parameter.grad is None for parameter in base.parameters())


def test_layers_that_one_rank_cannot_compile_are_compiled_on_none(
    monkeypatch: pytest.MonkeyPatch, compiled: Path
) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    model, implementation = adapted(base)
    monkeypatch.setattr(Ranks, "any", lambda *_: [True])
    reports: list[str] = []
    assert not compile_layers(model, base, implementation, compiled, reports.append, Ranks(), required=False)
    assert reports == ["  layers are not compiled: another rank could not compile them, see its log"]
    assert not any(module._compiled_call_impl for module in base.modules())


def test_an_architecture_without_such_layers_is_not_compiled(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, activation_function="relu")
    )
    for layer in base.transformer.h:
        layer.mlp = torch.nn.Identity()
    add_target_loss(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"]))
    reports: list[str] = []
    assert not compile_layers(
        model, base, choose_loss_implementation(model, base), tmp_path, reports.append, Ranks(), required=False
    )
    assert "GPT2LMHeadModel" in reports[0]


def test_layers_are_compiled_on_gpus_in_long_runs() -> None:
    def spec(**resources: Any) -> FineTuneJobSpec:
        return FineTuneJobSpec.model_validate(
            {
                "baseModel": {"uri": "hf://org/base"},
                "dataset": {"train": [{"uri": "hf://datasets/org/rows"}]},
                "method": {"lora": {}},
                "resources": resources,
            }
        )

    assert compiles(spec(gpus=1), COMPILED_STEPS, sharded=False)
    assert not compiles(spec(gpus=1), COMPILED_STEPS - 1, sharded=False)
    assert not compiles(spec(gpus=2), COMPILED_STEPS, sharded=True)
    assert not compiles(spec(gpus=0), COMPILED_STEPS, sharded=False)


def test_a_job_with_compiled_layers_has_the_curve_and_the_adapter_of_one_without(bench: Workbench) -> None:
    curves, adapters = [], []
    for compiled in (False, True):
        output = bench.folder / f"out-{compiled}"
        settings = {"maxSteps": 4, "batchSize": 8, "microBatchSize": 4, "learningRate": 0.01, "torchCompile": compiled}
        ran = bench.run("train", bench.job(hyperparameters=settings), output=str(output))
        assert ran.code == 0, ran.result.message
        assert ran.result.resolved is not None
        assert ran.result.resolved.torch_compile is compiled
        assert any("compiled" in line and "layers" in line for line in ran.lines) is compiled
        with (output / "metrics.csv").open() as file:
            curves.append([float(row["loss"]) for row in csv.DictReader(file) if row["loss"]])
        adapters.append(load_file(output / "artifact/adapter_model.safetensors"))
    assert len(curves[0]) == len(curves[1]) == 4
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    for name, tensor in adapters[0].items():
        # AdamW turns a rounding error of a gradient near zero into a step of the learning rate.
        assert float((adapters[1][name] - tensor).norm()) <= 1e-3 * float(tensor.norm()), name


def test_a_job_that_requires_compilation_fails_where_it_is_not_possible(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(bench.folder))
    torch._dynamo.reset()  # discard what the other tests compiled
    job = bench.job(hyperparameters={"maxSteps": 2, "batchSize": 4, "learningRate": 0.01, "torchCompile": True})
    with NO_COMPILER:
        ran = bench.run("train", job)
    assert ran.code != 0
    assert ran.result.reason is FailureReason.INVALID_SPEC
    assert "hyperparameters.torchCompile" in ran.result.message
