"""Launcher of `vllm serve` that listens on every address family of the pod: `python3 -m tunesmith_launch MODEL …`.

vLLM listens on IPv4 only unless `--host` is an IPv6 address, and exits if the machine has no IPv6. This module runs in
the engine's image, so it uses the standard library only.
"""

from __future__ import annotations

import os
import socket
import sys


def host() -> str:
    """Return the address to listen on: `::`, which accepts IPv4 too, or `0.0.0.0` if the machine has no IPv6."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            if probe.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
                return "0.0.0.0"  # noqa: S104 - the pod's own network; every route requires a token
            probe.bind(("::", 0))
    except OSError:
        return "0.0.0.0"  # noqa: S104 - the same
    return "::"


def main(arguments: list[str]) -> None:
    """Replace this process with vLLM's."""
    command = ["vllm", "serve", *arguments, "--host", host()]
    try:
        os.execvp(command[0], command)  # noqa: S606 - the engine's own program
    except OSError as error:
        raise SystemExit(f"vllm cannot be started ({error.strerror}): the engine's image must contain it.") from None


if __name__ == "__main__":
    main(sys.argv[1:])
