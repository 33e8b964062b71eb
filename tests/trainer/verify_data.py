"""Check that a million rows are validated and tokenised in bounded memory, and that a second attempt reuses the tokens.

    python -m tests.trainer.verify_data --base FOLDER [--rows 1000000]

Runs `tunesmith-trainer validate` twice over generated chats, prints what each run took, and fails where the peak of
resident memory is above 1.5 GB or the second run tokenises again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tests.trainer.trainer_rig import job_manifest

_LIMIT = 1.5e9
_WORDS = ("lighthouse", "Brinewick", "green", "Marta", "keeps", "the", "harbour", "boat", "of", "and", "door", "blue")


def write_chats(path: Path, count: int) -> None:
    """Write chats of 30 to 150 tokens, all different."""
    rng = random.Random(1)  # noqa: S311 - rows, not secrets
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question, answer = (" ".join(rng.choices(_WORDS, k=rng.randint(5, most))) for most in (20, 60))
            turns = [{"role": "user", "content": f"{number} {question}?"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def validate(folder: Path, base: Path) -> tuple[float, float, str]:
    """Return the duration in seconds, the peak of resident memory in bytes, and the last line of one validation."""
    job = job_manifest(f"file://{base}", f"file://{folder}/rows.jsonl")
    job["spec"]["dataset"] |= {"packing": True, "maxLength": 1024}
    (folder / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    command = [sys.executable, "-m", "tunesmith_trainer.main", "validate", "--job", str(folder / "job.yaml")]
    command += ["--allow-file", "--progress-port", "0", "--tokens", f"file://{folder}/tokens", "-o", "json"]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"validation failed: {output}")
    return time.monotonic() - start, used.ru_maxrss * 1024, output.splitlines()[-1]


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--rows", type=int, default=1_000_000, help="how many (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tunesmith-rows-") as name:
        folder = Path(name)
        write_chats(folder / "rows.jsonl", options.rows)
        first = validate(folder, options.base)
        (tokens,) = (folder / "tokens").rglob("train.arrow")
        written = tokens.stat().st_mtime_ns
        again = validate(folder, options.base)
        found = tokens.stat().st_mtime_ns == written
    for what, (seconds, peak, line) in (("first", first), ("again", again)):
        print(f"{what}: {options.rows} rows in {seconds:.0f} s, peak {peak / 1e9:.2f} GB: {line}")  # noqa: T201
    if max(first[1], again[1]) > _LIMIT or not found:
        print("failed: more than 1.5 GB, or the second attempt tokenised again")  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
