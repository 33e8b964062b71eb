"""The rules for adapter files, one by one, on a tiny base model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.server.local_artifacts import (
    HEIGHT,
    MODULES,
    RANK,
    WIDTH,
    LocalArtifact,
    LocalSource,
    adapter_tensors,
    limits_of,
    make_base,
    safetensors_bytes,
)
from tests.server.server_rig import write_safetensors
from tunesmith_server.artifact import PodLimits, fetch_artifact, remove_revision, stored_sizes
from tunesmith_server.base_weights import MEASURED_WHOLE, read_base_weights
from tunesmith_server.lora import UnfitAdapterError, weight_bounds
from tunesmith_server.retention import GRACE_SECONDS, Retention

if TYPE_CHECKING:
    from pathlib import Path

Q = f"base_model.model.{MODULES[0]}"


@pytest.fixture(scope="module")
def limits(tmp_path_factory: pytest.TempPathFactory) -> PodLimits:
    return limits_of(make_base(tmp_path_factory.mktemp("base") / "model"))


def check(artifact: LocalArtifact, limits: PodLimits, folder: Path, manifest: bytes | None = None) -> Path:
    adapters = folder / "adapters"
    adapters.mkdir(exist_ok=True)
    wanted = artifact.place(folder / "artifact", manifest)
    return fetch_artifact(wanted, limits, adapters, lambda _: LocalSource(folder / "artifact"))


def refusal(artifact: LocalArtifact, limits: PodLimits, folder: Path, manifest: bytes | None = None) -> str:
    with pytest.raises(UnfitAdapterError) as refused:
        check(artifact, limits, folder, manifest)
    assert list((folder / "adapters").iterdir()) == []
    return str(refused.value)


def test_a_valid_adapter_is_accepted(limits: PodLimits, tmp_path: Path) -> None:
    assert check(LocalArtifact.make(tmp_path / "made"), limits, tmp_path).is_dir()


def test_an_adapter_published_as_unservable_is_refused(limits: PodLimits, tmp_path: Path) -> None:
    artifact = LocalArtifact.make(tmp_path / "made")
    artifact.manifest["servable"] = {"vllm": False, "reason": "it has a chat template of its own"}
    assert refusal(artifact, limits, tmp_path) == (
        "it was published as an adapter that vLLM cannot serve: it has a chat template of its own"
    )


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"lora_alpha": 1e30},
            "lora_alpha of adapter_config.json must be a number above 0, at most 65536, not 1e+30",
        ),
        ({"lora_alpha": 0}, "lora_alpha of adapter_config.json must be a number above 0"),
        ({"lora_alpha": True}, "lora_alpha of adapter_config.json must be a number above 0"),
        ({"alpha_pattern": {"q_proj": 1e300}}, "alpha_pattern of adapter_config.json must be an object"),
        ({"alpha_pattern": {"(.*)*x": 4}}, "regular expressions are not accepted"),
        ({"rank_pattern": {"(a+)+$": 4}}, "regular expressions are not accepted"),
        ({"rank_pattern": {f"m{number}": 4 for number in range(257)}}, "at most 256 module names"),
        ({"rank_pattern": {"m" * 257: 4}}, "rank_pattern of adapter_config.json must be an object"),
        ({"rank_pattern": {"q_proj": 2**63}}, "rank_pattern of adapter_config.json must be an object"),
        ({"target_modules": ".*_proj"}, "target_modules of adapter_config.json must be module names"),
        ({"target_modules": ["q_proj", "(a+)+$"]}, "target_modules of adapter_config.json must be module names"),
        ({"target_modules": None}, "adapter_config.json has no target_modules"),
        ({"exclude_modules": "(a|a)*"}, "exclude_modules of adapter_config.json must be module names"),
        ({"layers_pattern": "(a|a)*"}, "layers_pattern of adapter_config.json must be module names"),
        ({"vllm_lora_scaling_factor": 1e30}, "has the key vllm_lora_scaling_factor, which is not one of PEFT's LoRA"),
        ({"é\u202e": 1}, "has the key '\\xe9\\u202e', which is not one of PEFT's LoRA"),
        ({"task_type": {}}, "the adapter's task is {}"),
        ({"init_lora_weights": "lora_ga"}, "the initialization lora_ga, which changes the base or is unknown"),
        ({"use_rslora": "yes"}, "use_rslora of adapter_config.json must be true or false, not yes"),
        ({"kasa_config": {"beta": 1}}, "the adapter uses KaSA"),
    ],
)
def test_the_configuration_has_known_keys_with_values_in_bounds(
    limits: PodLimits, tmp_path: Path, config: dict[str, Any], sentence: str
) -> None:
    assert sentence in refusal(LocalArtifact.make(tmp_path / "made", **config), limits, tmp_path)


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        (b'{"r": 4, "r": 8}', "the key 'r' appears twice"),
        (b'{"lora_alpha": NaN}', "NaN is not a JSON number"),
        (b'{"lora_alpha": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"lora_alpha": 1e999}', "the number 1e999 is too large"),
        (b'{"r": ' + b"9" * 100_000 + b"}", "a number has 100000 digits"),
        (b'{"r": ' + b"[" * 50_000, "it is nested too deeply"),
        (b'{"r": [' + b"{}," * 80_000 + b"{}]}", "it has more than 65536 values"),
        (b'{"r": "\xff"}', "it is not UTF-8"),
        (b"[]", "it is not a JSON object"),
        (b'{"r": "' + b"x" * 300_000 + b'"}', "has 300009 bytes; an adapter of this base model"),
    ],
)
def test_the_configuration_is_json_with_one_meaning(
    limits: PodLimits, tmp_path: Path, document: bytes, sentence: str
) -> None:
    weights = LocalArtifact.make(tmp_path / "made").files["adapter_model.safetensors"]
    assert sentence in refusal(LocalArtifact.of(document, weights), limits, tmp_path)


def of_module(name: str) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors of an adapter for one module."""
    return {
        f"base_model.model.{name}.lora_{part}.weight": adapter_tensors()[f"{Q}.lora_{part}.weight"] for part in "AB"
    }


def base_with(folder: Path, module: str, architecture: str) -> PodLimits:
    """Limits for a base model of one linear module."""
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", {f"{module}.weight": np.ones((HEIGHT, WIDTH), np.float32)})
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    return limits_of(folder)


def test_an_adapter_of_a_module_that_vllm_does_not_adapt_is_refused(tmp_path: Path) -> None:
    module = "model.layers.3.mlp.gate_up_proj"
    artifact = LocalArtifact.make(tmp_path / "made", of_module(module), alpha_pattern={})
    assert check(artifact, base_with(tmp_path / "other", module, "Phi3ForCausalLM"), tmp_path).is_dir()
    (tmp_path / "again").mkdir()
    assert refusal(artifact, base_with(tmp_path / "base", module, "Glm4ForCausalLM"), tmp_path / "again") == (
        "vLLM 0.32 does not apply adapters to gate_up_proj of a Glm4ForCausalLM: train without it, or merge the "
        "adapter (output.merge) and serve the result as a model of its own"
    )


@pytest.mark.parametrize(
    ("module", "stored"), [("model.language_model", "language_model.model"), ("model", "backbone")]
)
def test_weights_may_be_stored_with_former_names(tmp_path: Path, module: str, stored: str) -> None:
    rest = "layers.0.mixer.q_proj"
    limits = base_with(tmp_path / "base", f"{stored}.{rest}", "NemotronHForCausalLM")
    artifact = LocalArtifact.make(tmp_path / "made", of_module(f"{module}.{rest}"), alpha_pattern={})
    assert check(artifact, limits, tmp_path).is_dir()
    (tmp_path / "again").mkdir()
    other = LocalArtifact.make(tmp_path / "made", of_module(rest), alpha_pattern={})
    assert f"the base model has no {rest}.weight" in refusal(other, limits, tmp_path / "again")


def scaled(parts: str, factor: float) -> dict[str, np.ndarray[Any, Any]]:
    tensors = adapter_tensors()
    return {name: values * np.float32(factor if name[-8] in parts else 1) for name, values in tensors.items()}


def cancelling() -> dict[str, np.ndarray[Any, Any]]:
    """Two ranks whose products are large and cancel each other out: their sum is small in exact arithmetic only."""
    tensors = adapter_tensors()
    first, second = tensors[f"{Q}.lora_A.weight"], tensors[f"{Q}.lora_B.weight"]
    first[0] *= 3000
    first[1], second[:, 1] = first[0], -second[:, 0]
    return tensors


@pytest.mark.parametrize(
    ("tensors", "config", "sentence"),
    [
        (scaled("AB", 1e30), {}, "more than the largest 16-bit float (65504)"),
        (scaled("A", 1e30), {}, "more than the largest 16-bit float (65504)"),
        (scaled("AB", 30), {}, f"changes {MODULES[0]} by"),
        (scaled("AB", 1), {"lora_alpha": 65536}, "more than the platform's limit of 4"),
        (scaled("AB", 1), {"alpha_pattern": {MODULES[3]: 60_000}}, f"changes {MODULES[3]} by"),
        (scaled("A", 1e5), {}, "a row of norm"),
        (cancelling(), {}, f"changes {MODULES[0]} by"),
    ],
)
def test_finite_values_that_are_too_large_are_refused(
    limits: PodLimits, tmp_path: Path, tensors: dict[str, Any], config: dict[str, Any], sentence: str
) -> None:
    assert sentence in refusal(LocalArtifact.make(tmp_path / "made", tensors, **config), limits, tmp_path)


def test_the_ratio_is_that_of_the_product_and_the_platform_sets_its_limit(limits: PodLimits, tmp_path: Path) -> None:
    artifact = LocalArtifact.make(tmp_path / "made", scaled("AB", 4))
    tensors = scaled("AB", 4)
    base = read_base_weights(limits.base.folder)
    ratios = []
    for module in MODULES:
        first, second = (tensors[f"base_model.model.{module}.lora_{part}.weight"].astype(float) for part in "AB")
        alpha = 6.0 if "v_proj" in module else 2.0 * RANK
        ratios.append(np.linalg.norm(second @ first) * alpha / RANK / base.norm(f"{module}.weight"))
    highest = max(ratios)
    assert check(artifact, limits_of(base.folder, highest * 1.001), tmp_path).is_dir()
    (tmp_path / "again").mkdir()
    assert f"more than the platform's limit of {highest * 0.999:g}" in refusal(
        artifact, limits_of(base.folder, highest * 0.999), tmp_path / "again"
    )


def test_norms_of_large_and_of_quantised_tensors(tmp_path: Path) -> None:
    side = 2048
    values = np.random.default_rng(0).normal(0, 0.03, (side, side)).astype(np.float32)
    assert values.size > MEASURED_WHOLE
    write_safetensors(tmp_path / "model.safetensors", {"a.weight": values, "zero.weight": np.zeros((8, 8), np.float32)})
    write_safetensors(tmp_path / "more.safetensors", {"fp8.weight": np.ones((64, 64), np.uint8)}, "F8_E4M3")
    base = read_base_weights(tmp_path)
    assert base.norm("a.weight") == pytest.approx(np.linalg.norm(values), rel=0.01)
    assert base.norm("zero.weight") == pytest.approx(0.02 * 8)
    assert base.norm("fp8.weight") == pytest.approx(0.02 * 64)


@pytest.mark.parametrize(
    ("part", "shape", "settings"),
    [
        ("qweight", (WIDTH // 8, HEIGHT), {"quant_method": "gptq", "bits": 4}),
        ("qweight", (WIDTH * 3 // 32, HEIGHT), {"quant_method": "gptq", "bits": 3}),
        ("qweight", (WIDTH, HEIGHT // 8), {"quant_method": "awq", "w_bit": 4}),
        (
            "weight_packed",
            (HEIGHT, WIDTH // 8),
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
        ),
    ],
)
def test_adapters_fit_a_base_with_packed_weights(
    tmp_path: Path, part: str, shape: tuple[int, int], settings: Any
) -> None:
    tensors = {f"{module}.{part}": np.zeros(shape, np.int32) for module in MODULES}
    base = tmp_path / "base"
    base.mkdir()
    write_safetensors(base / "model.safetensors", tensors, "I32")
    (base / "config.json").write_text(json.dumps({"quantization_config": settings}))
    assert check(LocalArtifact.make(tmp_path / "made"), limits_of(base), tmp_path).is_dir()
    assert read_base_weights(base).norm(f"{MODULES[0]}.weight") == pytest.approx(0.02 * (WIDTH * HEIGHT) ** 0.5)


@pytest.mark.parametrize("settings", [{"quant_method": "other"}, {"quant_method": "gptq"}, [], {"quant_method": []}])
def test_unknown_packing_is_no_matrix(tmp_path: Path, settings: object) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a.qweight": np.zeros((4, 4), np.int32)}, "I32")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    assert read_base_weights(tmp_path).matrix_of("a") is None


def _entry(shape: list[int], place: int, size: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [place, place + size]}


_A, _B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
_SIZE_A, _SIZE_B = 4 * RANK * WIDTH, 4 * HEIGHT * RANK
_PAIR = {_A: _entry([RANK, WIDTH], 0, _SIZE_A), _B: _entry([HEIGHT, RANK], _SIZE_A, _SIZE_B)}


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        (json.dumps(_PAIR)[:-1] + f', "{_A}": {json.dumps(_PAIR[_A])}}}', "appears twice"),
        (json.dumps(_PAIR | {"__metadata__": {"a": 1}}), "__metadata__ must be an object with string values"),
        (json.dumps(_PAIR | {"__metadata__": {"a": "x" * 12_000}}), "has a header of"),
        (json.dumps(_PAIR | {"../../x": _entry([0], 0, 0)}), "the tensor ../../x is not one of a LoRA adapter"),
        (json.dumps(_PAIR | {f"{_A}x": _entry([0], _SIZE_A + _SIZE_B, 0)}), "is not one of a LoRA adapter"),
        (json.dumps(_PAIR | {_B: _entry([HEIGHT, 0], _SIZE_A, 0)}), "is damaged: it has"),
        (json.dumps(_PAIR | {_B: _entry([HEIGHT, 2**62], _SIZE_A, 2**64)}), "do not fit its shape"),
        (json.dumps(_PAIR | {_B: _entry([-HEIGHT, -RANK], _SIZE_A, _SIZE_B)}), "must be natural numbers"),
        (json.dumps(_PAIR | {_B: {"dtype": "F32", "shape": [HEIGHT, RANK]}}), "has a damaged safetensors header"),
        (json.dumps(_PAIR | {_B: _PAIR[_B] | {"dtype": "I32"}}), "is of type I32; LoRA weights are F16, BF16 or F32"),
        (" " + json.dumps(_PAIR), "it is not a JSON object"),
        (json.dumps({f"t{number}": _entry([0], 0, 0) for number in range(40)}), "it has 40 tensors, more than"),
    ],
)
def test_the_header_describes_what_the_base_can_have(
    limits: PodLimits, tmp_path: Path, header: str, sentence: str
) -> None:
    config = LocalArtifact.make(tmp_path / "made").files["adapter_config.json"]
    data = np.full((_SIZE_A + _SIZE_B) // 4, 0.01, np.float32).tobytes()
    artifact = LocalArtifact.of(config, safetensors_bytes(header.encode(), data))
    assert sentence in refusal(artifact, limits, tmp_path)


class CountingSource(LocalSource):
    """Counts the bytes that are read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read_bytes = 0

    def read(self, name: str, start: int, end: int) -> bytes:
        data = super().read(name, start, end)
        self.read_bytes += len(data)
        return data


def test_a_header_with_too_many_tensors_is_not_read(limits: PodLimits, tmp_path: Path) -> None:
    """A header of 86 MB once killed the agent; in this test, only the declared length is that large."""
    bounds = weight_bounds(limits.base, limits.max_rank)
    config = LocalArtifact.make(tmp_path / "made").files["adapter_config.json"]
    header = b"{" + b" " * (bounds.header + 1) + b"}"
    wanted = LocalArtifact.of(config, safetensors_bytes(header, b"")).place(tmp_path / "artifact")
    source = CountingSource(tmp_path / "artifact")
    (tmp_path / "adapters").mkdir()
    with pytest.raises(UnfitAdapterError, match=f"has a header of {len(header)} bytes, more than {bounds.header}"):
        fetch_artifact(wanted, limits, tmp_path / "adapters", lambda _: source)
    assert source.read_bytes < 10_000


def test_weights_larger_than_the_base_allows_are_not_downloaded(limits: PodLimits, tmp_path: Path) -> None:
    artifact = LocalArtifact.make(tmp_path / "made")
    for name, size, sentence in (
        ("adapter_model.safetensors", 2**40, "has 1099511627776 bytes; an adapter of this base model"),
        ("adapter_config.json", 2**30, "adapter_config.json has 1073741824 bytes"),
        ("adapter_model.safetensors", 2**70, "has 1180591620717411303424 bytes"),
        ("adapter_model.safetensors", -1, "is malformed"),
    ):
        manifest = json.loads(json.dumps(artifact.manifest))
        manifest["files"][name]["sizeBytes"] = size
        assert sentence in refusal(artifact, limits, tmp_path, json.dumps(manifest).encode())


def test_files_are_removed_when_they_are_no_longer_used(tmp_path: Path) -> None:
    digest, other = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"
    folders = {digest: "/adapters/a", other: "/adapters/b"}
    retention = Retention()

    def unused(now: float, **seen: Any) -> list[str]:
        state = {"wanted": {other}, "registered": set(), "running": set()} | seen
        return retention.unused(folders=folders, now=now, **state)

    assert unused(0) == []
    assert unused(GRACE_SECONDS - 1) == []
    assert unused(GRACE_SECONDS) == [digest]
    for seen in (
        {"wanted": {digest, other}},
        {"registered": {"/adapters/a"}},
        {"running": {f"team/pirate@{'a' * 12}"}},
    ):
        assert unused(200, **seen) == []
        assert unused(201) == []
        assert unused(201 + GRACE_SECONDS) == [digest]
    (tmp_path / ("a" * 64)).mkdir()
    remove_revision(tmp_path, digest)
    remove_revision(tmp_path, digest)
    assert set(stored_sizes(tmp_path)) == set()
    assert list(tmp_path.iterdir()) == []
