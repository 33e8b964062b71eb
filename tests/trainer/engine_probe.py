"""Runs in vLLM's environment: loads adapters and compares their answers with their parity.json.

Reads `[{"base": folder, "artifacts": {key: folder}, "modules": names, "answers": file, "arguments": of LLM}]`. Writes
to each file `adapters`, by key: `{"difference", "base"}` of adapter and base, `{"error"}` of an adapter that is
refused, or `{"failure"}` of an engine that does not run; and `unadapted`, those of the modules to which vLLM would not
apply an adapter; null if the engine does not run.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.models import registry

_LAYER = "base_layer"
"""Attribute of a layer with adapters."""
SECONDS = 1800
"""Time limit of an engine."""


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


def unadapted(model: Any, modules: list[str]) -> list[str]:
    """Return the modules whose adapters vLLM refuses (`WorkerLoRAManager._load_adapter`) or ignores.

    It refuses names with an unknown last part, and applies the matrices whose names are those of its own layers, if
    the model computes with them under these names.
    """
    manager = model.lora_manager
    packed = manager.packed_modules_mapping
    expected = {part for name in manager.supported_lora_modules for part in packed.get(name, [name])}
    reached = set(manager.modules) | {name for names in manager.packed_modules.values() for name in names}
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    renames = None if mapper is None else mapper.get_rename_mapper()
    # A layer that is also an attribute of another module is adapted under one of its names only.
    bypassed = {id(layer) for name, layer in model.named_modules(remove_duplicate=False) if _LAYER not in name}
    found = []
    for name in modules:
        own, _ = parse_fine_tuned_lora_name(f"base_model.model.{name}.lora_A.weight", renames)
        layer = getattr(manager.modules.get(own), _LAYER, None)
        if own.rpartition(".")[2] not in expected or own not in reached or id(layer) in bypassed:
            found.append(name)
    return found


def answers_of(request: dict[str, Any]) -> dict[str, Any]:
    """Return the content of the file of answers."""
    arguments = {"dtype": "float32", **request["arguments"]}
    engine = LLM(
        model=request["base"],
        enable_lora=True,
        max_loras=2,
        max_lora_rank=64,
        max_model_len=256,
        kv_cache_memory_bytes=64 * 2**20,
        enforce_eager=True,
        **arguments,
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
    (without,) = engine.apply_model(partial(unadapted, modules=request["modules"]))
    return {"adapters": answers, "unadapted": without}


def failed(request: dict[str, Any], text: str) -> dict[str, Any]:
    """Return the answers of an engine that does not run."""
    return {"adapters": {key: {"failure": text} for key in request["artifacts"]}, "unadapted": None}


def probe(request: dict[str, Any]) -> None:
    """Write the answers of one engine, in a process of its own, which has vLLM's modules already."""
    target = Path(request["answers"])
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if not target.exists():
            text = f"the engine exited with status {os.waitstatus_to_exitcode(status)}"
            target.write_text(json.dumps(failed(request, text)))
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
        answers = failed(request, text)
    target.write_text(json.dumps(answers))
    os._exit(0)


def main(listed: Path) -> None:
    """Start an engine for each request; see the module's docstring."""
    for request in json.loads(listed.read_text()):
        probe(request)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
