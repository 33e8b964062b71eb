"""Mutates adapter files and lets the agent's check, in its child process, decide on each.

Every mutation must end with the adapter placed or a sentence, within the limits of the child. A mutation that is placed
must be one that the engine can take: its tensors are read again and their ratios are within the limit.

Example: uv run --project server-image python -m tests.server.fuzz_adapters --mutations 10000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.server.local_artifacts import (
    HEIGHT,
    MODULES,
    RANK,
    WIDTH,
    LocalArtifact,
    LocalSource,
    adapter_config,
    adapter_tensors,
    limits_of,
    make_base,
    safetensors_bytes,
)
from tunesmith.contracts.agent import DesiredAdapter
from tunesmith_server.artifact import PodLimits, fetch_artifact
from tunesmith_server.lora import UnfitAdapterError
from tunesmith_server.sandbox import ChildExitedError, ChildLimits, Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith_server.sandbox import Channel

LIMITS = ChildLimits(memory=160 * 2**20, cpu_seconds=20)
SECONDS = 30.0
_HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**200, 1e30, 1e308, -1e-308, 0.5, "", "8", "(a+)+$", "\u202e\u0000x",
    "é" * 300, "x" * 5000, [], [[]], {}, {"a": {"b": {"c": {}}}}, ["(a+)+$"], [1] * 5000, {"(a|a)*$": 4},
    {"q_proj": "x"}, {"q_proj": -1}, {"q_proj": 1e300},
)  # fmt: skip
_HOSTILE_TEXTS = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 10_000, b"[" * 50_000, b'{"a":' * 20_000, b"\xff\xfe",
    b"\xef\xbb\xbf", b'"\\ud800"', b"null", b"{}", b"/**/", b" " * 100_000, b'{"r":1,"r":2}',
)  # fmt: skip
_HOSTILE_NAMES = (
    "../../etc/passwd", "a/b", "\u0000", "é\u202e", "x" * 4000, "__metadata__", "base_model.model.lm_head.lora_A.weight"
)  # fmt: skip


def mutate_config(chance: random.Random, base: LocalArtifact) -> LocalArtifact:
    """Change keys, values or bytes of adapter_config.json."""
    config = adapter_config()
    for _ in range(chance.randint(1, 3)):
        key = chance.choice([*config, "use_dora", "layers_to_transform", "eva_config", "auto_map", "x", "é\u202e"])
        config[key] = chance.choice(_HOSTILE_VALUES)
    data = json.dumps(config).encode()
    if chance.random() < 0.3:
        data = mutate_bytes(chance, data)
    return LocalArtifact.of(data, base.files["adapter_model.safetensors"])


def mutate_bytes(chance: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    content = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(content) + 1)
        kind = chance.randrange(4)
        if kind == 0 and place < len(content):
            content[place] = chance.randrange(256)
        elif kind == 1:
            del content[place : place + chance.choice([1, 2, 8, 1000])]
        elif kind == 2:
            content[place:place] = content[place : place + chance.choice([1, 10, 500])]
        else:
            content[place:place] = chance.choice(_HOSTILE_TEXTS)
    return bytes(content)


def mutate_header(chance: random.Random, base: LocalArtifact) -> LocalArtifact:
    """Change names, shapes, types, offsets, the number of tensors or the length of the weights' header."""
    weights = base.files["adapter_model.safetensors"]
    length = int.from_bytes(weights[:8], "little")
    header, data = json.loads(weights[8 : 8 + length]), weights[8 + length :]
    kind = chance.randrange(9)
    name = chance.choice(list(header))
    entry = header[name]
    if kind == 0:
        entry[chance.choice(["dtype", "shape", "data_offsets", "more"])] = chance.choice(_HOSTILE_VALUES)
    elif kind == 1:
        entry["shape"] = [chance.choice([0, 1, RANK, WIDTH, HEIGHT, 2**40, 2**64]) for _ in range(chance.randint(0, 5))]
    elif kind == 2:
        entry["data_offsets"] = [chance.choice([0, 1, 512, len(data), 2**63, 2**64, -1]) for _ in range(2)]
    elif kind == 3:
        header[chance.choice(_HOSTILE_NAMES)] = header.pop(name)
    elif kind == 4:
        count = chance.choice([1, 100, 20_000])
        header |= {f"t{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(count)}
    elif kind == 5:
        header["__metadata__"] = chance.choice(
            [{"a": "x" * 100_000}, {"a": 1}, [], {"a": {"b": "c"}}, {"format": "pt"}]
        )
    elif kind == 6:
        del header[name]
    text = json.dumps(header).encode()
    if kind == 7:
        text = mutate_bytes(chance, text)
    content = safetensors_bytes(text, data)
    if kind == 8:
        claimed = chance.choice([0, 1, 2, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
        content = claimed.to_bytes(8, "little") + content[8:]
    return LocalArtifact.of(base.files["adapter_config.json"], content)


def mutate_values(chance: random.Random, _: LocalArtifact) -> LocalArtifact:
    """Change the values of tensors: not finite, huge, tiny, or cancelling each other out; or the scaling."""
    tensors = adapter_tensors()
    name = chance.choice(list(tensors))
    tensor = tensors[name]
    kind = chance.randrange(6)
    if kind == 0:
        tensor.flat[chance.randrange(tensor.size)] = chance.choice([np.nan, np.inf, -np.inf, 1e30, 3e38, 65504, -65505])
    elif kind == 1:
        tensor *= np.float32(10.0 ** chance.randint(-40, 37))
    elif kind == 2:
        power = np.float32(10.0 ** chance.randint(0, 30))
        for part in tensors:
            tensors[part] = tensors[part] * (power if "lora_A" in part else np.float32(1) / power)
    elif kind == 3:
        module = chance.choice(MODULES)
        first, second = (f"base_model.model.{module}.lora_{part}.weight" for part in "AB")
        power = np.float32(10.0 ** chance.randint(0, 18))
        tensors[first][1] = tensors[first][0] = tensors[first][0] * power
        tensors[second][:, 1] = -tensors[second][:, 0]
    elif kind == 4:
        tensor[...] = 0
    config = adapter_config()
    if kind == 5:
        config["lora_alpha"] = chance.choice([1e-300, 1, 64, 65536, 1e5, 1e30])
        config["use_rslora"] = chance.choice([True, False])
    header: dict[str, Any] = {}
    place = 0
    for part, values in tensors.items():
        header[part] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [place, place + values.nbytes]}
        place += values.nbytes
    data = b"".join(values.astype(np.float32).tobytes() for values in tensors.values())
    if chance.random() < 0.2:
        data = mutate_bytes(chance, data)
    return LocalArtifact.of(json.dumps(config).encode(), safetensors_bytes(json.dumps(header).encode(), data))


def mutate_manifest(chance: random.Random, base: LocalArtifact) -> tuple[LocalArtifact, bytes]:
    """Change keys, values, files or bytes of tunesmith.json."""
    artifact = LocalArtifact(dict(base.files), json.loads(json.dumps(base.manifest)))
    manifest = artifact.manifest
    kind = chance.randrange(5)
    if kind == 0:
        manifest[chance.choice([*manifest, "x"])] = chance.choice(_HOSTILE_VALUES)
    elif kind == 1:
        entry = chance.choice(list(manifest["files"].values()))
        entry[chance.choice(list(entry))] = chance.choice(_HOSTILE_VALUES)
    elif kind == 2:
        size = chance.choice([0, 1, 2**20, 2**40, 2**63, 2**70])
        chance.choice(list(manifest["files"].values()))["sizeBytes"] = size
    elif kind == 3:
        count = chance.choice([1, 63, 5000])
        more = [chance.choice(_HOSTILE_NAMES) + str(number) + ".json" for number in range(count)]
        manifest["files"] |= {name: {"sha256": "0" * 64, "sizeBytes": 1} for name in more}
    document = json.dumps(manifest).encode()
    return artifact, mutate_bytes(chance, document) if kind == 4 else document


def mutation(seed: int, base: LocalArtifact) -> tuple[str, LocalArtifact, bytes | None]:
    """The kind of a mutation, its artifact, and its manifest where that is mutated itself."""
    chance = random.Random(seed)  # noqa: S311 - not for secrets
    kind = ("config", "header", "values", "manifest")[seed % 4]
    if kind == "manifest":
        artifact, document = mutate_manifest(chance, base)
        return kind, artifact, document
    mutate: dict[str, Callable[[random.Random, LocalArtifact], LocalArtifact]] = {
        "config": mutate_config, "header": mutate_header, "values": mutate_values,
    }  # fmt: skip
    return kind, mutate[kind](chance, base), None


def check_in_child(channel: Channel, document: str, limits: PodLimits, folder: str, adapters: str) -> None:
    """The agent's check of one artifact; sends the outcome and the child's highest memory."""
    adapter = DesiredAdapter.model_validate_json(document)
    try:
        fetch_artifact(adapter, limits, Path(adapters), lambda _: LocalSource(Path(folder)))
        outcome, message = "placed", ""
    except UnfitAdapterError as error:
        outcome, message = "refused", str(error)
    except MemoryError:
        outcome, message = "refused", "the check needed too much memory"
    channel.send(outcome, [message, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss])


@dataclass
class FuzzReport:
    """Figures of a run, and the mutations whose outcome is wrong."""

    outcomes: Counter[str] = field(default_factory=Counter)
    sentences: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: int = 0
    longest: float = 0.0

    def line(self, seconds: float) -> str:
        """One line for people."""
        total = sum(self.outcomes.values())
        return (
            f"{'failed' if self.wrong else 'passed'}: {total} mutations in {seconds:.0f} s: "
            f"{self.outcomes['refused']} refused with {len(self.sentences)} different sentences, "
            f"{self.outcomes['placed']} placed, {self.outcomes['ended']} ended by a limit, {len(self.wrong)} wrong; "
            f"longest {self.longest:.2f} s, highest memory of a child {self.memory // 1024} MiB"
        )


def fuzz(seeds: range, work: Path) -> FuzzReport:
    """Check the mutations of these seeds."""
    base = make_base(work / "base")
    limits = limits_of(base)
    sound = LocalArtifact.make(work / "sound")
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])  # for the process that forks the children
    sandbox = Sandbox(["tests.server.fuzz_adapters"])
    report = FuzzReport()
    adapters = work / "adapters"
    for seed in seeds:
        kind, artifact, document = mutation(seed, sound)
        shutil.rmtree(adapters, ignore_errors=True)
        adapters.mkdir()
        wanted = artifact.place(work / "artifact", document)
        start = time.monotonic()
        arguments = (wanted.model_dump_json(by_alias=True), limits, str(work / "artifact"), str(adapters))
        child = sandbox.start(check_in_child, arguments, LIMITS)
        try:
            outcome, (message, memory) = child.receive(SECONDS)
        except ChildExitedError as error:
            outcome, message, memory = "ended", str(error), 0
        child.close()
        report.longest = max(report.longest, time.monotonic() - start)
        report.memory = max(report.memory, memory)
        report.outcomes[outcome] += 1
        left = [path.name for path in adapters.iterdir()]
        if outcome == "refused":
            report.sentences["".join(letter for letter in message if not letter.isdigit())[:40]] += 1
            fine = 10 < len(message) < 700 and message.isprintable() and left == []
        else:
            fine = outcome == "placed" and len(left) == 1
        if not fine:
            report.wrong.append(f"{kind} {seed}: {outcome}: {message[:200]!r}, left {left}")
    return report


def main() -> int:
    """Run the fuzzer; 1 if an outcome is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        report = fuzz(range(options.first, options.first + options.mutations), Path(work))
    for line in report.wrong[:20]:
        sys.stdout.write(f"{line}\n")
    sys.stdout.write(f"{report.line(time.monotonic() - start)}\n")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
