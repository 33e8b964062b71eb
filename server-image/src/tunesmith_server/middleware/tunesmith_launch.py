"""Starts `vllm serve` so that it listens on every address family of the pod: `python3 -m tunesmith_launch MODEL …`.

vLLM listens on IPv4 unless `--host` is an IPv6 address, and on a machine without IPv6 such an address ends it. Runs in
the engine's image, so it uses the standard library only.
"""

from __future__ import annotations

import os
import socket
import sys


def host() -> str:
    """Return the address to listen on: `::`, which takes IPv4 too, or `0.0.0.0` where there is no IPv6."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            if probe.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
                return "0.0.0.0"  # noqa: S104 - the pod's own network; every route asks for a token
            probe.bind(("::", 0))
    except OSError:
        return "0.0.0.0"  # noqa: S104 - the same
    return "::"


def main(arguments: list[str]) -> None:
    """Replace this process by vLLM's."""
    command = ["vllm", "serve", *arguments, "--host", host()]
    try:
        os.execvp(command[0], command)  # noqa: S606 - the engine's own program
    except OSError as error:
        raise SystemExit(f"vllm cannot be started ({error.strerror}): the engine's image must bring it.") from None


if __name__ == "__main__":
    main(sys.argv[1:])
