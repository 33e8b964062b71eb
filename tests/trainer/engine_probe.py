"""Runs in vLLM's environment: loads adapters and compares their answers with their parity.json.

Reads `{"base": folder, "artifacts": {key: folder}}` and writes beside it, by key, `{"difference", "base"}` of adapter
and base, `{"error"}` of an adapter that is refused, or `{"failure"}` of an engine that does not run.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def difference(engine: Any, parity: dict[str, Any], adapter: LoRARequest | None) -> float:
    """Return the largest difference of log-probabilities over all answers' tokens; of the base without an adapter."""
    found = 0.0
    for probe in parity["probes"]:
        prompt, answer = probe["promptTokenIds"], probe["answerTokenIds"]
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        (output,) = engine.generate(
            [{"prompt_token_ids": [*prompt, *answer]}], sampling, lora_request=adapter, use_tqdm=False
        )
        places = output.prompt_logprobs[len(prompt) :]
        expected = probe["base" if adapter is None else "adapter"]
        for token, place, position in zip(answer, places, expected, strict=True):
            found = max(found, abs(place[token].logprob - position["chosen"]))
    return found


def answer(request: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the answer of each artifact."""
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
            found = difference(engine, parity, LoRARequest(f"a{number}", number, folder))
        except ValueError as error:
            answers[key] = {"error": str(error)[:300]}
        else:
            answers[key] = {"difference": found, "base": difference(engine, parity, None)}
    return answers


def main(listed: Path) -> None:
    """Compare all adapters listed in the file; see the module's docstring."""
    request = json.loads(listed.read_text())
    try:
        answers = answer(request)
    except Exception as error:  # noqa: BLE001 - an engine that fails is an answer
        traceback.print_exc()
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        answers = {key: {"failure": text} for key in request["artifacts"]}
    listed.with_suffix(".answers").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
