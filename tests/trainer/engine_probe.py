"""Runs in vLLM's environment: loads adapters and compares their answers with those of the trainer or of PEFT.

Reads lines `{"base": folder, "artifacts": {key: folder}, "modules": {name: folder}, "answers": file, "arguments": of
LLM}` and starts an engine for each as it comes. Each artifact has a parity.json; each adapter of the modules of a name
has a file module.json: `{"tokens", "base", "adapter"}`, a prompt and the log-probabilities of its tokens after the
first.

Writes to each file `adapters`, by key: `{"difference", "base"}` of adapter and base, or `{"error"}` of an adapter that
is refused; `modules`, by name: `{"difference", "effect"}`, or `{"error"}`; and `failure`: why the engine does not run,
or null.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.models import registry

PREPARED = ("vllm.v1.engine.llm_engine", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "vllm.lora.punica_wrapper")
"""Modules that every engine imports."""
SECONDS = 900
"""Time limit of an engine, on a machine that other processes use too."""


def refusal_of(engine: Any, adapter: LoRARequest) -> str | None:
    """Load an adapter; return why vLLM refuses it, or None.

    A request whose adapter is refused would stay in the engine, which then waits for it without end.
    """
    try:
        engine.llm_engine.add_lora(adapter)
    except ValueError as error:
        engine.llm_engine.remove_lora(adapter.lora_int_id)
        return str(error)[:300]
    return None


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


def of_modules(engine: Any, folder: str, number: int) -> dict[str, Any]:
    """Return the answer about an adapter of the modules of one name."""
    probe = json.loads((Path(folder) / "module.json").read_text())
    adapter = LoRARequest(f"m{number}", number, folder)
    if refusal := refusal_of(engine, adapter):
        return {"error": refusal}
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    (output,) = engine.generate([{"prompt_token_ids": probe["tokens"]}], sampling, lora_request=adapter, use_tqdm=False)
    found = [place[token].logprob for token, place in zip(probe["tokens"][1:], output.prompt_logprobs[1:], strict=True)]
    return {"difference": _farthest(found, probe["adapter"]), "effect": _farthest(probe["base"], probe["adapter"])}


def _farthest(left: list[float], right: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(left, right, strict=True))


def answers_of(request: dict[str, Any]) -> dict[str, Any]:
    """Return the content of the file of answers."""
    arguments = {"dtype": "float32", **request["arguments"]}
    engine = LLM(
        model=request["base"],
        enable_lora=True,
        max_loras=2,
        max_lora_rank=64,
        max_model_len=256,
        max_num_batched_tokens=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=64 * 2**20,
        enforce_eager=True,
        **arguments,
    )
    answers: dict[str, dict[str, Any]] = {}
    for number, (key, folder) in enumerate(request["artifacts"].items(), 1):
        parity = json.loads((Path(folder) / "parity.json").read_text())
        adapter = LoRARequest(f"a{number}", number, folder)
        if refusal := refusal_of(engine, adapter):
            answers[key] = {"error": refusal}
        else:
            found = difference(engine, parity, adapter)
            answers[key] = {"difference": found, "base": difference(engine, parity, None)}
    modules = {
        name: of_modules(engine, folder, number)
        for number, (name, folder) in enumerate(request["modules"].items(), len(request["artifacts"]) + 1)
    }
    return {"adapters": answers, "modules": modules, "failure": None}


def failed(text: str) -> dict[str, Any]:
    """Return the answers of an engine that does not run."""
    return {"adapters": {}, "modules": {}, "failure": text}


def keep(target: Path, answers: dict[str, Any]) -> None:
    """Write a file of answers, which is there as a whole or not at all, even if this process is killed."""
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(answers))
    partial.rename(target)


def probe(request: dict[str, Any]) -> None:
    """Write the answers of one engine, in a process of its own, which has vLLM's modules already."""
    target = Path(request["answers"])
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if not target.exists():
            text = f"the engine exited with status {os.waitstatus_to_exitcode(status)}"
            keep(target, failed(text))
        return
    with target.with_suffix(".log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    # vLLM would start another process for it, which imports everything again.
    registry._run_in_subprocess = lambda inspect: inspect()
    # With adapters, even of other modules, vLLM computes experts by a kernel that only GPUs have.
    FusedMoEConfig.is_lora_enabled = property(lambda _: False, lambda *_: None)
    try:
        answers = answers_of(request)
    except Exception as error:  # noqa: BLE001 - an engine that fails is an answer
        traceback.print_exc()
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        answers = failed(text)
    keep(target, answers)
    os._exit(0)


def main(at_once: int) -> None:
    """Start an engine for each request; see the module's docstring."""
    for name in PREPARED:
        import_module(name)
    # Otherwise each engine's process copies every object of these modules, which its garbage collector visits.
    gc.freeze()
    with ThreadPoolExecutor(at_once) as engines:
        for line in sys.stdin:
            engines.submit(_answer, json.loads(line))


def _answer(request: dict[str, Any]) -> None:
    probe(request)
    sys.stdout.write(f"{request['base']}: vLLM answered\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
