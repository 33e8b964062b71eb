"""Runs in vLLM's environment: loads adapters and compares their answers with their parity.json.

Reads `{"base": folder, "artifacts": {key: folder}}` and writes `{key: {"difference"} or {"error"}}` beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def difference(engine: Any, parity: dict[str, Any], adapter: LoRARequest) -> float:
    """Return the largest difference of log-probabilities over all answers' tokens."""
    found = 0.0
    for probe in parity["probes"]:
        prompt, answer = probe["promptTokenIds"], probe["answerTokenIds"]
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        (output,) = engine.generate(
            [{"prompt_token_ids": [*prompt, *answer]}], sampling, lora_request=adapter, use_tqdm=False
        )
        places = output.prompt_logprobs[len(prompt) :]
        for token, place, position in zip(answer, places, probe["adapter"], strict=True):
            found = max(found, abs(place[token].logprob - position["chosen"]))
    return found


def main(listed: Path) -> None:
    """Compare all adapters listed in the file; see the module's docstring."""
    request = json.loads(listed.read_text())
    engine = LLM(
        model=request["base"],
        dtype="float32",
        enable_lora=True,
        max_loras=2,
        max_lora_rank=64,
        max_model_len=256,
        kv_cache_memory_bytes=64 * 2**20,
        enforce_eager=True,
    )
    answers: dict[str, dict[str, Any]] = {}
    for number, (key, folder) in enumerate(request["artifacts"].items(), 1):
        parity = json.loads((Path(folder) / "parity.json").read_text())
        try:
            answers[key] = {"difference": difference(engine, parity, LoRARequest(f"a{number}", number, folder))}
        except ValueError as error:
            answers[key] = {"error": str(error)[:300]}
    listed.with_suffix(".answers").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
