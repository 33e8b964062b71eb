from __future__ import annotations

import hashlib
import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.trainer.methods_cases import CASES
from tests.trainer.methods_rig import distance, try_method
from tests.trainer.tiny_model import make
from tests.trainer.trainer_rig import chat_row, write_rows
from tunesmith.api.method import Method
from tunesmith.api.objective import ObjectiveName
from tunesmith.contracts.artifact import ArtifactManifest
from tunesmith.contracts.parity import PARITY_FILE, PARITY_ROWS_FILE, Parity, parse_parity
from tunesmith_trainer.artifact.card import distinction, tags
from tunesmith_trainer.artifact.curves import loss_label
from tunesmith_trainer.artifact.main_memory import available_memory
from tunesmith_trainer.artifact.parity import STREAMED, record

if TYPE_CHECKING:
    from pathlib import Path

    from tests.trainer.s3server import S3Server
    from tests.trainer.trainer_rig import Workbench

QLORA = {"qlora": {"rank": 4, "alpha": 8}}
LORA = {"lora": {"rank": 4, "alpha": 8}}
# method, merge → maximum relative error of the logits of the merged model
MERGES = {
    "lora into the original": (LORA, "Original", 1e-4),
    "qlora into the dequantized": (QLORA, "Dequantized", 1e-3),
    "qlora into the original": (QLORA, "Original", None),
}

LOSSES = {None: "Held-out loss, nats per target token", "dpo": "Held-out loss of DPO"}
TAGS: list[tuple[dict[str, Any], list[str]]] = [
    (LORA, ["lora"]),
    (QLORA, ["qlora", "lora"]),
    ({"adaLora": {}}, ["adaLora"]),
    ({"full": {}}, ["full"]),
    ({"peft": {"type": "VERA"}}, ["vera"]),
]

# cases of methods_cases → PEFT's name of the method
ON_DISK = {"LoRA": "LORA", "LoRA, DoRA": "LORA", "IA3": "IA3", "LoHa": "LOHA", "Prefix tuning": "PREFIX_TUNING"}
ON_DISK_LONG = {
    **dict.fromkeys(("LoRA, rsLoRA", "LoRA, patterns", "LoRA, PiSSA", "LoRA, OLoRA", "LoRA, bias"), "LORA"),
    "BEFT": "BEFT",
    "BOFT": "BOFT",
    "C3A": "C3A",
    "DEFT": "DEFT",
    "FourierFT": "FOURIERFT",
    "GraLoRA": "GRALORA",
    "HiRA": "HIRA",
    "HRA": "HRA",
    "Lily": "LILY",
    "LoKr": "LOKR",
    "MiSS": "MISS",
    "Peanut": "PEANUT",
    "RoAd": "ROAD",
    "WaveFT": "WAVEFT",
    "P-tuning": "P_TUNING",
    "Prompt tuning": "PROMPT_TUNING",
}


def test_parity_equals_plain_transformers_and_peft(bench: Workbench, base_model: Path) -> None:
    assert bench.run("train", bench.job()).code == 0
    folder = bench.output / "artifact"
    parity = Parity.model_validate_json((folder / "parity.json").read_text())
    assert parity.data_type == "float32"
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), folder).eval()
    different = 0
    for probe in parity.probes:
        ids = torch.tensor([[*probe.prompt_token_ids, *probe.answer_token_ids]])
        start = len(probe.prompt_token_ids)
        for model, positions in ((base, probe.base), (adapter, probe.adapter)):
            with torch.no_grad():
                scores = torch.log_softmax(model(input_ids=ids).logits[0, start - 1 : -1], dim=-1)
            for row, token, position in zip(scores, probe.answer_token_ids, positions, strict=True):
                assert position.chosen == pytest.approx(float(row[token]), abs=1e-4)
                assert position.top[0].log_probability == pytest.approx(float(row.max()), abs=1e-4)
                assert len(position.top) == 5
        assert all(position.chosen == position.top[0].log_probability for position in probe.adapter), "greedy"
        different += probe.base != probe.adapter
    assert different == len(parity.probes)


def test_prompts_of_held_out_rows_are_recorded_in_a_file_of_their_own(bench: Workbench, base_model: Path) -> None:
    held_out = [chat_row(f"Which boat has the number {number}?", "The blue one.") for number in range(5)]
    validation = write_rows(bench.folder / "held-out.jsonl", held_out)
    job = bench.job()
    job["spec"]["dataset"]["validation"] = [{"uri": f"file://{validation}"}]
    assert bench.run("train", job).code == 0
    folder = bench.output / "artifact"
    files = [parse_parity((folder / name).read_bytes(), name) for name in (PARITY_FILE, PARITY_ROWS_FILE)]
    fixed, rows = files
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    texts = [tokenizer.decode(probe.prompt_token_ids) for probe in rows.probes]
    assert len(set(texts)) == 3
    assert all("Which boat has the number" in text for text in texts)
    assert {probe.prompt for probe in rows.probes} == {None}
    assert "boat" not in (folder / PARITY_FILE).read_text()
    assert all(probe.chat and probe.prompt for probe in fixed.probes)
    manifest = ArtifactManifest.model_validate_json((folder / "tunesmith.json").read_bytes())
    assert manifest.adapter.parity_gap == pytest.approx(max(file.gap for file in files), abs=1e-4)
    assert PARITY_ROWS_FILE in manifest.files
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()
    for probe in (*fixed.probes, *rows.probes):
        assert probe.base_answer is not None
        ids = torch.tensor([[*probe.prompt_token_ids, *probe.base_answer.token_ids]])
        with torch.no_grad():
            scores = torch.log_softmax(base(input_ids=ids).logits[0, len(probe.prompt_token_ids) - 1 : -1], dim=-1)
        assert scores.argmax(-1).tolist() == probe.base_answer.token_ids
        chosen = [position.chosen for position in probe.base_answer.positions]
        assert chosen == pytest.approx(scores.max(-1).values.tolist(), abs=1e-4)
    assert distinction(manifest.adapter.parity_gap or 0.0) in _card(bench)


@pytest.mark.parametrize(
    ("gap", "text"),
    [
        (0.001, ": too little to check in float32 or bfloat16 that an engine applies it."),
        (0.1, ": too little to check in bfloat16 that an engine applies it."),
        (9.0, ", enough to check that an engine applies it."),
    ],
)
def test_the_card_says_whether_an_engine_can_be_checked(gap: float, text: str) -> None:
    assert distinction(gap).endswith(text)


@pytest.mark.parametrize("case", MERGES)
def test_merged_weights_equal_the_trained_model(bench: Workbench, case: str) -> None:
    method, how, limit = MERGES[case]
    ran = bench.run("train", bench.job(method=method, output={"merge": how}))
    assert ran.code == 0, ran.result.message
    folder = bench.output / "merged"
    document: dict[str, Any] = json.loads((folder / "merged.json").read_text())
    assert document["merge"] == how
    distance = f"differ from the trained model by {document['relativeLogitError']:.2g} (relative distance of logits)"
    assert re.fullmatch(rf"held-out loss .* %; merged weights {re.escape(distance)}", ran.result.message)
    place = "the base as published" if how == "Original" else "the dequantised 4-bit base"
    assert f"| Merged | into {place}; the weights {distance} |" in _card(bench)
    assert f"| Precision | float32{', the base in nf4' if 'qlora' in method else ''} |" in _card(bench)
    if limit is None:
        assert document["relativeLogitError"] > 1e-3, "another base than the one that was trained on"
    else:
        assert document["relativeLogitError"] < limit
    assert {file.name for file in folder.iterdir()} == {*document["files"], "merged.json"}
    for name, digest in document["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    # The artifact does not contain them, because engines download all of it.
    manifest = ArtifactManifest.model_validate_json((bench.output / "artifact/tunesmith.json").read_bytes())
    assert "model.safetensors" not in manifest.files
    assert manifest.merged_sha256 == hashlib.sha256((folder / "merged.json").read_bytes()).hexdigest()
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    if limit is not None and how == "Original":
        probe = Parity.model_validate_json((bench.output / "artifact/parity.json").read_text()).probes[0]
        with torch.no_grad():
            logits = merged(input_ids=torch.tensor([probe.prompt_token_ids])).logits[0, -1]
        assert int(logits.argmax()) == probe.answer_token_ids[0]


def test_a_merge_without_a_quantized_base_is_refused(bench: Workbench) -> None:
    ran = bench.run("validate", bench.job(output={"merge": "Dequantized"}))
    assert ran.code == 2
    assert "needs a base model in 4 bits (method.qlora" in ran.result.message


def _card(bench: Workbench) -> str:
    return (bench.output / "artifact/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("objective", "loss"), LOSSES.items())
def test_the_card_describes_the_data_and_the_loss(
    bench: Workbench, base_model: Path, objective: str | None, loss: str
) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"What is the colour of door {number}?", "chosen": " It is green.", "rejected": " No."}
        for number in range(12)
    ]
    rows += [rows[0], rows[1], {**rows[2], "prompt": "why " * 200}]
    spec: dict[str, Any] = {"objective": {objective: {"beta": 0.2}}}
    if objective is None:
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        spec = {}
    job = bench.job(rows, **spec)
    job["spec"]["dataset"] |= {"maxLength": 128, "validationFraction": 0.25}
    job["spec"]["dataset"]["train"][0]["weight"] = 2
    ran = bench.run("train", job)
    assert ran.code == 0, ran.result.message
    manifest = ArtifactManifest.model_validate_json((bench.output / "artifact/tunesmith.json").read_bytes())
    train = job["spec"]["dataset"]["train"][0]["uri"]
    lines = _card(bench).splitlines()
    assert "tags: [lora, tunesmith]" in lines
    assert any(line.startswith(f"| {loss} | ") for line in lines)
    for row in (
        f"| Objective | {f'{objective}: beta 0.2' if objective else 'sft'} |",
        "| Method | lora: rank 4, alpha 8, initialization Default |",
        "| Precision | float32 |",
        f"| Data | `{train}` (weight 2); {manifest.dataset_digest} |",
        "| Held out | 0.25 of the rows |",
        "| Rows not used | 2 Duplicate, 1 Overlong |",
        f"| Base | `file://{base_model}`; {manifest.base.fingerprint} |",
    ):
        assert row in lines
    versions = next(line for line in lines if line.startswith("| Versions | "))
    assert all(f" {name} {manifest.versions[name]}," in versions for name in ("torch", "transformers", "peft"))
    assert "| Merged |" not in _card(bench)
    assert ran.result.message.endswith(" %")


@pytest.mark.parametrize(("method", "names"), TAGS)
def test_the_tags_name_the_method(method: dict[str, Any], names: list[str]) -> None:
    assert tags(Method.model_validate(method)) == [*names, "tunesmith"]


@pytest.mark.parametrize("objective", ObjectiveName)
def test_only_the_loss_of_sft_is_per_token(objective: ObjectiveName) -> None:
    expected = "loss, nats per target token" if objective is ObjectiveName.SFT else f"loss of {objective.upper()}"
    assert loss_label("loss", objective) == expected


def test_peft_finds_the_base_by_the_name_in_the_artifact(bench: Workbench) -> None:
    assert bench.run("train", bench.job()).code == 0
    assert 'AutoPeftModelForCausalLM.from_pretrained("path/of/this/folder")' in _card(bench)
    model = AutoPeftModelForCausalLM.from_pretrained(bench.output / "artifact")
    assert model.peft_config["default"].base_model_name_or_path == str(bench.base)


def test_the_card_loads_a_base_that_has_no_name_for_transformers(bench: Workbench, s3_environment: S3Server) -> None:
    s3_base = "s3://tunesmith/models/without-a-name"
    for file in bench.base.iterdir():
        s3_environment.filesystem().put_file(str(file), f"{s3_base.removeprefix('s3://')}/{file.name}")
    job = bench.job(baseModel={"uri": s3_base})
    assert bench.run("train", job).code == 0
    lines = _card(bench).splitlines()
    assert f'base = AutoModelForCausalLM.from_pretrained("path/of/the/base")  # a copy of {s3_base}' in lines
    assert 'model = PeftModel.from_pretrained(base, "path/of/this/folder")' in lines


def test_the_curves_are_plotted(bench: Workbench) -> None:
    assert bench.run("train", bench.job()).code == 0
    png = (bench.output / "artifact/curves.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert (int.from_bytes(png[16:20]), int.from_bytes(png[20:24])) == (960, 540)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a base in bfloat16, which reveals different rounding."""
    folder = make(tmp_path_factory.mktemp("published") / "tiny", hidden=128)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [*ON_DISK, *(pytest.param(name, marks=pytest.mark.long) for name in ON_DISK_LONG)])
def test_an_adapter_gives_the_same_logits_with_layers_on_disk(published: Path, tmp_path: Path, name: str) -> None:
    """Each weight is read when its layer is computed, whatever the method does with it."""
    method = next(case.method for case in CASES if case.name == name)
    try_method(method, published, tmp_path / "artifact")
    kind = json.loads((tmp_path / "artifact/adapter_config.json").read_text())["peft_type"]
    assert kind == (ON_DISK | ON_DISK_LONG)[name]
    config, tokenizer = AutoConfig.from_pretrained(published), AutoTokenizer.from_pretrained(published)
    size = (published / "model.safetensors").stat().st_size
    (whole, expected, _), *others = (
        record(published, tmp_path / "artifact", config, tokenizer, ends=[2], pad=2, memory=int(share * size))
        for share in (10, 0.7, 0)
    )
    for parity, logits, _ in others:
        assert distance(logits, expected) == 0
        assert parity == whole


def test_every_method_with_layers_on_disk_is_compared() -> None:
    assert {*ON_DISK.values(), *ON_DISK_LONG.values()} == STREAMED


@pytest.mark.parametrize("share", [0.0, 0.7], ids=["all of it", "a part of it"])
@pytest.mark.parametrize("method", [LORA, {"full": {}}], ids=["lora", "full"])
def test_parity_of_a_base_larger_than_memory_is_the_same(
    bench: Workbench, base_model: Path, tmp_path: Path, method: dict[str, Any], share: float
) -> None:
    assert bench.run("train", bench.job(method=method)).code == 0
    folder = bench.output / "artifact"
    size = (base_model / "model.safetensors").stat().st_size
    copy = shutil.copytree(folder, tmp_path / "copy/artifact")
    config, tokenizer = AutoConfig.from_pretrained(base_model), AutoTokenizer.from_pretrained(base_model)
    recorded, *_ = record(base_model, copy, config, tokenizer, ends=[2], pad=2, memory=int(share * size))
    assert recorded == Parity.model_validate_json((folder / "parity.json").read_text())


def test_available_memory_is_the_containers_if_it_has_a_limit(tmp_path: Path) -> None:
    machine = tmp_path / "meminfo"
    machine.write_text("MemTotal:  9000 kB\nMemAvailable:  4000 kB\nHugePages_Total:  0\n")
    group = tmp_path / "cgroup"
    assert available_memory(group, machine) == 4000 * 1024, "no control groups"
    group.mkdir()
    (group / "memory.current").write_text("3000\n")
    (group / "memory.stat").write_text("anon 1800\nfile 1200\nkernel 0\n")
    for limit, expected in (("max", 4000 * 1024), ("10000", 10000 - 1800), ("1000", 0), ("900000000", 4000 * 1024)):
        (group / "memory.max").write_text(f"{limit}\n")
        assert available_memory(group, machine) == expected
