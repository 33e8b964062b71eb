"""fetch-base with a chosen number of parallel reads, and its peak memory."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tunesmith_server import base_download
from tunesmith_server.main import run


def main(arguments: list[str]) -> int:
    """Run fetch-base: `--reads N -- FLAGS`."""
    own, flags = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stdout)
    if own:
        base_download.PARALLEL_READS = int(own[1])
    code = run(["fetch-base", *flags])
    print(f"memory {_peak_kib() / 1024:.0f} MiB")
    return code


def _peak_kib() -> int:
    """Return the peak memory of this process; ru_maxrss would include that of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
