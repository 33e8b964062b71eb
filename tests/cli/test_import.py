from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tunesmith.api.manifest import parse_manifest
from tunesmith.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/base",
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "target_modules": ["v_proj", "q_proj"],
    "bias": "none",
    "init_lora_weights": True,
    "inference_mode": True,
}


@pytest.mark.parametrize(
    ("change", "arguments", "code", "said"),
    [
        ({}, (), 0, ""),
        ({"layers_to_transform": [1, 2]}, (), 0, "layers_to_transform: [1, 2] has no counterpart"),
        ({"layers_to_transform": [1, 2]}, ("--strict",), 1, "1 keys have no counterpart: layers_to_transform"),
        ({"target_modules": ".*proj"}, (), 0, 'target_modules: ".*proj" has no counterpart'),
        ({"peft_type": "VERA"}, (), 2, "this release imports LORA"),
        ({"r": 4096}, (), 1, "spec.method.lora.rank is 4096: it must be at most 512"),
    ],
)
def test_import_peft(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    arguments: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(CONFIG | change))
    monkeypatch.setattr(sys, "argv", ["tunesmith", "import", "peft", str(file), "--data", "s3://b/t.jsonl", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert (ended.value.code or 0) == code
    assert said in printed.err
    if code == 0:
        job = parse_manifest(printed.out)
        assert job.spec.base_model.uri == "hf://org/base"
        assert job.spec.method.lora is not None
        assert (job.spec.method.lora.rank, job.spec.method.lora.alpha, job.spec.method.lora.dropout) == (8, 16, 0.1)
