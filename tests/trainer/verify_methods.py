"""Train an adapter of every method that PEFT has, on a base in float32 and in 4 bits, and write docs/methods.md.

Each goes through the trainer's own command on a tiny model, is loaded again by plain PEFT in another process, merged,
and, with --engine, loaded by a real vLLM that must reproduce its parity.json.

Example: uv run --project trainer-image python -m tests.trainer.verify_methods --engine server-image/engine-cpu/.venv
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import yaml
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

from tests.trainer.methods_cases import CASES, LOFTQ, PEFT_TYPES, Case
from tests.trainer.tiny_model import make
from tests.trainer.trainer_rig import chat_rows, job_manifest, write_rows
from tunesmith.api.methods.fields import Quantization
from tunesmith.contracts.result import Outcome, TrainerResult
from tunesmith.contracts.servability import ADAPTER_CONFIG
from tunesmith_trainer import stages  # noqa: F401 - which the trainer's command imports late: once for all processes
from tunesmith_trainer.base_model import model as base_model
from tunesmith_trainer.base_model.logits import last_logits
from tunesmith_trainer.main import run
from tunesmith_trainer.methods import conversion, full

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

PROMPTS = [[5, 9, 33, 12], [40, 41, 7, 19, 88, 3]]
RELOAD_LIMIT, PARITY_LIMIT = 2e-5, 1e-4
"""Limits of the largest difference of logits, and of log-probabilities returned by vLLM."""
_REPOSITORY = Path(__file__).parents[2]
DOCUMENT = _REPOSITORY / "docs/methods.md"
_PROBE = Path(__file__).with_name("engine_probe.py")
_ENGINE_LOCK = _REPOSITORY / "server-image/engine-cpu/uv.lock"
_IMPORTED_LATE = ("transformers.trainer", "tunesmith_trainer.training.loop", "bitsandbytes", "PIL.PngImagePlugin")
T, R = TypeVar("T"), TypeVar("R")


@dataclass
class Tried:
    """Result of a method on one kind of base."""

    base: Path
    quantized: bool
    result: TrainerResult
    artifact: Path
    trained: list[torch.Tensor] | None = None
    reload: float | None = None
    merge: float | None = None
    no_merge: str | None = None
    engine: float | None = None
    no_engine: str | None = None
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Trial:
    """A method to try on a base.

    Args:
        key: name in the report.
        method: `method` of the job.
        merge: `output.merge` of the job.
        base: folder of the base.
        folder: folder of the run, which is not repeated.
        rate: learning rate; None: the method's.
    """

    key: str
    method: dict[str, Any]
    merge: str
    base: Path
    folder: Path
    rate: float | None = None

    def run(self) -> Tried:
        """Train with the trainer's command; also merge if possible."""
        rows = write_rows(self.folder / "train.jsonl", chat_rows(24))
        job = job_manifest(
            f"file://{self.base}",
            f"file://{rows}",
            method=self.method,
            hyperparameters={"maxSteps": 4, "batchSize": 4}
            | ({} if self.rate is None else {"learningRate": self.rate}),
            output={"merge": self.merge},
        )
        tried = _train(self.folder / "merged", job, self.base)
        if tried.result.reason is None and self.merge == "None":
            return tried
        if tried.result.reason is None:
            merged = json.loads((self.folder / "merged/merged/merged.json").read_text())
            tried.merge = merged["relativeLogitError"]
        elif tried.result.message.startswith("output.merge"):
            why = tried.result.message
            del job["spec"]["output"]
            tried = _train(self.folder / "out", job, self.base)
            tried.no_merge = why
        return tried


def apart(function: Callable[[T], R], item: T) -> R:
    """Return a function's result from a process of its own.

    It is a fork, which need not import anything again.

    Raises:
        ChildProcessError: the process failed; its output has the reason.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send_bytes(pickle.dumps(function(item))))
    process.start()
    sender.close()
    try:
        return pickle.loads(receiver.recv_bytes())  # noqa: S301 - own process
    except EOFError:
        process.join()
        raise ChildProcessError(f"{item}: the process exited with status {process.exitcode}") from None
    finally:
        process.join()


def in_processes(function: Callable[[T], R], items: list[T], at_once: int) -> Iterator[R]:
    """Yield a function's result for each item, each from a process of its own, `at_once` of which run at a time."""
    with ThreadPoolExecutor(at_once) as threads:
        yield from threads.map(partial(apart, function), items)


def prepare_processes() -> None:
    """Prepare this process for forks: import what training imports late."""
    torch.set_num_threads(1)
    for name in _IMPORTED_LATE:
        import_module(name)
    # Otherwise each process copies every object of these modules, which its garbage collector visits.
    gc.freeze()


def reload_trial(trial: Trial) -> Tried:
    """Return what was trained, after loading it again; call it in a process that did not train it."""
    tried = trial.run()
    if tried.result.reason and tried.result.reason != "InvalidSpec":
        tried.problems.append(f"it fails: {tried.result.message}")
    compare_reloaded(tried, published=LOFTQ in trial.key)
    return tried


def _train(output: Path, job: dict[str, Any], base: Path) -> Tried:
    kept = output / "trained.json"
    if kept.exists():
        logits = json.loads(kept.read_text())
    else:
        shutil.rmtree(output, ignore_errors=True)  # of a run that was interrupted
        output.mkdir(parents=True)
        logits = _run(output, job)
    result = TrainerResult.model_validate_json((output / "message").read_text())
    if result.outcome is Outcome.PREEMPTED:
        sys.exit(result.exit_code)
    # Another failure may be that of an interrupted run.
    if not kept.exists() and result.reason in {None, "InvalidSpec", "NotServable"}:
        keep(kept, json.dumps(logits).encode())
    (fields,) = job["spec"]["method"].values()
    quantized = "qlora" in job["spec"]["method"] or "quantization" in fields
    trained = None if logits is None else [torch.tensor(one) for one in logits]
    return Tried(base, quantized, result, output / "artifact", trained)


def keep(file: Path, content: bytes) -> None:
    """Write a file that is there as a whole or not at all, even if this process is killed."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(content)
    partial.rename(file)


def _run(output: Path, job: dict[str, Any]) -> list[list[float]] | None:
    """Run the trainer; return the trained model's logits for the prompts before it is saved."""
    (output / "job.yaml").write_text(yaml.safe_dump(job))
    trained: list[list[list[float]]] = []
    modules: list[Any] = [conversion, full]
    saving = [module.save for module in modules]

    def watched(save: Callable[..., None], model: Any, *rest: Any) -> None:
        trained.append([one.tolist() for one in last_logits(model, PROMPTS)])
        save(model, *rest)

    arguments = ["train", "--job", str(output / "job.yaml"), "--output", str(output), "--allow-file"]
    arguments += ["--progress-port", "0", "--termination-message", str(output / "message")]
    for module, save in zip(modules, saving, strict=True):
        module.save = partial(watched, save)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            run(arguments)
    finally:
        for module, save in zip(modules, saving, strict=True):
            module.save = save
    return trained[0] if trained else None


def reloaded(tried: Tried, *, published: bool) -> list[torch.Tensor]:
    """Return the logits of an artifact, loaded by plain PEFT; call it in a process that did not train it.

    Args:
        tried: what was trained.
        published: load it on the published base, even if it was trained on a quantised one.
    """
    base: Any
    if tried.quantized and not published:
        base = base_model.load_model(tried.base, torch.device("cpu"), Quantization(), torch.float32)
    else:
        base = AutoModelForCausalLM.from_pretrained(tried.base, dtype=torch.float32)
    if (tried.artifact / ADAPTER_CONFIG).exists():
        base = PeftModel.from_pretrained(base, tried.artifact)
    else:
        base = AutoModelForCausalLM.from_pretrained(tried.artifact, dtype=torch.float32)
    return last_logits(base, PROMPTS)


def compare_reloaded(tried: Tried, *, published: bool = False) -> None:
    """Fill in the distance of the reloaded artifact from the trained one, which is a problem above the limit.

    LoftQ's adapters belong to the published base, from which the trained one differs slightly.
    """
    if tried.result.reason is not None:
        return
    assert tried.trained is not None
    again = reloaded(tried, published=published)
    tried.reload = max(float((left - right).abs().max()) for left, right in zip(again, tried.trained, strict=True))
    if not published and not tried.reload <= RELOAD_LIMIT:
        tried.problems.append(f"reloaded, its logits differ by {tried.reload:.1e}")


def engine_request(
    tried: dict[str, Tried], base: Path, folder: Path, modules: Mapping[str, Path] | None = None, **arguments: Any
) -> dict[str, Any]:
    """Return the request for `engines` about the adapters that are reported as servable.

    Answers are kept in a file that is named by everything that they depend on.

    Args:
        tried: what was trained on one base.
        base: folder of the base.
        folder: folder for the answers.
        modules: folders of adapters of the modules of one name, by name.
        arguments: further arguments of vLLM's `LLM`.
    """
    served = {
        key: one.artifact
        for key, one in tried.items()
        if one.result.artifact is not None and one.result.artifact.servable.vllm
    }
    modules = modules or {}
    digest = hashlib.sha256(repr(arguments).encode())
    for file in (_PROBE, _ENGINE_LOCK):
        digest.update(file.read_bytes())
    for name, read in [("", base), *served.items(), *modules.items()]:
        for file in sorted(file for file in read.rglob("*") if file.is_file()):
            digest.update(f"{name} {file.relative_to(read)} {file.stat().st_size}\n".encode())
            digest.update(file.read_bytes())
    return {
        "base": str(base),
        "artifacts": {key: str(artifact) for key, artifact in served.items()},
        "modules": {name: str(adapter) for name, adapter in modules.items()},
        "answers": str(folder / f"answers-{digest.hexdigest()[:16]}.json"),
        "arguments": arguments,
    }


@contextlib.contextmanager
def engines(engine: Path, at_once: int = 1) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Have real vLLMs answer requests as they come; the block's end waits for the answers.

    Args:
        engine: environment with vLLM.
        at_once: number of engines that run at the same time.

    Yields:
        A function of a request, which is ignored if it asks for nothing or has its answers already.
    """
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        # Compiling a few functions would take much longer than everything that an engine computes here.
        "TORCH_COMPILE_DISABLE": "1",
    }
    command = [engine / "bin/python", _PROBE, str(at_once)]
    with contextlib.ExitStack() as until_answered:
        process: subprocess.Popen[str] | None = None

        def ask(request: dict[str, Any]) -> None:
            nonlocal process
            if not _asks(request) or _answered(request):
                return
            if process is None:
                started = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=environment)
                process = until_answered.enter_context(started)
            assert process.stdin is not None
            process.stdin.write(f"{json.dumps(request)}\n")
            process.stdin.flush()

        yield ask
    if process is not None and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def _answered(request: dict[str, Any]) -> bool:
    answers = Path(request["answers"])
    return answers.exists() and json.loads(answers.read_text())["failure"] is None


def _asks(request: dict[str, Any]) -> bool:
    return bool(request["artifacts"] or request["modules"])


def fill_in_answers(tried: dict[str, Tried], request: dict[str, Any], limit: float = PARITY_LIMIT) -> dict[str, Any]:
    """Fill in the results of `engines`; return those about modules.

    Args:
        tried: what was trained.
        request: an answered request.
        limit: greatest difference of log-probabilities that is not a problem.
    """
    if not _asks(request):
        return {}
    answers = json.loads(Path(request["answers"]).read_text())
    if answers["failure"]:
        for key in request["artifacts"]:
            tried[key].no_engine = answers["failure"]
            tried[key].problems.append(f"vLLM does not run: {answers['failure']}")
    for key, answer in answers["adapters"].items():
        one = tried[key]
        if "difference" not in answer:
            one.problems.append(f"vLLM does not load it: {answer}")
            continue
        one.engine = answer["difference"]
        for what, found in (("", answer["difference"]), (" without the adapter", answer["base"])):
            if not found <= limit:
                one.problems.append(f"vLLM's log-probabilities{what} differ by {found:.1e}")
    modules: dict[str, Any] = answers["modules"]
    return modules


def figure(value: float | None) -> str:
    """Format a number with one digit; merges are measured to six decimals."""
    assert value is not None
    return f"{value:.0e}" if value else "< 1e-6"


def document(tried: dict[str, Tried]) -> str:
    """Return the table in Markdown."""
    notes: list[str] = []

    def note(text: str) -> str:
        text = text.split(" is not valid: ", 1)[-1].removeprefix("spec.method.qlora: ")
        # One note for all methods that it applies to.
        text = re.sub(r" only, not [A-Z0-9_]+:", " only:", text)
        text = re.sub(r"^method\.peft(\.type)?: [A-Z0-9_]+ ", "method.peft: it ", text)
        text = re.sub(r"^output\.merge: an adapter of \w+ ", "output.merge: an adapter of this method ", text)
        if text not in notes:
            notes.append(text)
        return f"[{notes.index(text) + 1}](#notes)"

    lines = []
    for case in CASES:
        if not any(key.startswith(f"{case.name}/") for key in tried):
            continue
        cells = [case.name, f"`{case.manifest}`"]
        for kind in ("float32", "4-bit"):
            one = tried.get(f"{case.name}/{kind}")
            if one is None:
                cells += ["–", "–", "–"]
            elif one.result.reason is not None:
                cells += [f"refused {note(one.result.message)}", "–", "–"]
            else:
                assert one.reload is not None
                merge = f"no {note(one.no_merge)}" if one.no_merge else figure(one.merge)
                cells += ["yes", "identical" if one.reload == 0 else figure(one.reload), merge]
        cells += _served(case, tried, note)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*_HEAD, *lines, "", "## Notes", "", *(f"{i}. {text}." for i, text in enumerate(notes, 1)), ""])


def _served(case: Case, tried: dict[str, Tried], note: Any) -> list[str]:
    trained = [
        one for kind in ("float32", "4-bit") if (one := tried.get(f"{case.name}/{kind}")) and one.result.artifact
    ]
    if not trained:
        return ["–", "–"]
    artifact = trained[0].result.artifact
    assert artifact is not None
    if not artifact.servable.vllm:
        return [f"no {note(str(artifact.servable.reason))}", "–"]
    measured = [figure(one.engine) for one in trained if one.engine is not None]
    return ["yes", ", ".join(dict.fromkeys(measured)) or "not asked"]


_HEAD = [
    "<!-- Generated by `make verify-methods`: change the methods, not this file. -->",
    "# Methods",
    "",
    *textwrap.wrap(
        "Every method of PEFT 0.21 and every variant of its LoRA, trained with Tunesmith on a tiny random Llama, the"
        " base held in float32 and in 4 bits (nf4). Every field of `method` is in the [reference](reference/api.md).",
        118,
    ),
    "",
    "- **trains**: the job completes; or the CPU stage refuses it, with the reason that the note gives.",
    "- **reload**: greatest difference of logits between the trained adapter and the artifact, loaded by plain PEFT in",
    "  another process; on the base that was trained on, but for LoftQ, whose adapters belong to the published base.",
    "- **merge**: distance of the merged weights (`output.merge: Original`, in 4 bits `Dequantized`) from what was",
    "  trained: norm of the difference of logits over their norm.",
    "- **vLLM**: whether vLLM 0.32 loads the artifact as it is, as `status.preflight.servable` says before training.",
    "- **parity**: greatest difference of log-probabilities between a real vLLM and `parity.json`.",
    "",
    "| Method | `method` | trains | reload | merge | 4-bit: trains | reload | merge | vLLM | parity |",
    "|---|---|---|---|---|---|---|---|---|---|",
]


def write_line(text: str) -> None:
    """Print one line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def parser_of(description: str | None, what: str) -> argparse.ArgumentParser:
    """Return the arguments of a program that writes a table of methods or families."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, help="environment with vLLM")
    parser.add_argument("--only", nargs="*", help=f"names of {what}; the document is printed, not written")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="processes at once (default: cores)")
    parser.add_argument("--work", type=Path, help="folder that is kept: what was trained there is not trained again")
    return parser


def report(text: str, target: Path, tried: dict[str, Tried], *, only: bool) -> int:
    """Write the table, or print that of some rows only, and the problems; return 1 if there are any."""
    if only:
        write_line(text)
    else:
        target.write_text(text)
    problems = [f"{key}: {problem}" for key, one in tried.items() for problem in one.problems]
    write_line("\n".join(problems) or f"{len(tried)} passed, as their verdicts say")
    return 1 if problems else 0


def main() -> int:
    """Write the table; return 1 if a method does not match its verdict."""
    parser = parser_of(__doc__, "methods")
    arguments = parser.parse_args()
    prepare_processes()
    missing = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - PEFT_TYPES
    assert not missing, f"PEFT has methods without a case: {missing}"
    with tempfile.TemporaryDirectory() as name:
        work = (arguments.work or Path(name)).resolve()
        base = work / "base"
        if not base.exists():
            make(base, hidden=128)
        trials = [
            Trial(f"{case.name}/{kind}", method, merge, base, work / f"{case.name}/{kind}".replace(" ", "_"))
            for case in CASES
            for kind, method, merge in (
                ("float32", case.method, "Original"),
                ("4-bit", case.quantized, "Dequantized"),
            )
            if method is not None and (not arguments.only or case.name in arguments.only)
        ]
        for trial, _ in zip(trials, in_processes(Trial.run, trials, arguments.processes), strict=True):
            write_line(f"{trial.key}: trained or refused")
        tried = {
            one.key: found
            for one, found in zip(trials, in_processes(reload_trial, trials, arguments.processes), strict=True)
        }
        if arguments.engine:
            request = engine_request(tried, base, work)
            with engines(arguments.engine) as ask:
                ask(request)
            fill_in_answers(tried, request)
    return report(document(tried), DOCUMENT, tried, only=bool(arguments.only))


if __name__ == "__main__":
    sys.exit(main())
