"""Options of the gateway: what follows from the container's memory, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gateway_rig import GATEWAY_KEYS
from tunesmith.contracts.agent import keys_file
from tunesmith.gateway import limits as gateway_limits
from tunesmith.gateway import main
from tunesmith.gateway.limits import MIB, memory_limit

if TYPE_CHECKING:
    from pathlib import Path

    from tunesmith.gateway.server import Settings


def settings(tmp_path: Path, *options: str) -> Settings:
    key = tmp_path / "key"
    key.write_bytes(keys_file(GATEWAY_KEYS))
    arguments = main.parser().parse_args(["--namespace=tunesmith-system", f"--gateway-key-file={key}", *options])
    return main.settings_of(arguments)


@pytest.mark.parametrize(
    ("content", "expected"), [("536870912\n", 512 * MIB), ("max\n", None), ("9223372036854771712\n", None)]
)
def test_the_memory_limit_is_the_containers(tmp_path: Path, content: str, expected: int | None) -> None:
    (tmp_path / "memory.max").write_text(content)
    machine = memory_limit(())
    assert memory_limit((tmp_path / "absent", tmp_path / "memory.max")) == (expected or machine)


def test_budget_and_connections_follow_from_the_memory_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "memory_limit", lambda: 512 * MIB)
    limits = settings(tmp_path).limits
    assert limits.in_flight_bytes == pytest.approx(0.4 * 512 * MIB, abs=1)
    assert limits.in_flight_bytes_per_key == limits.in_flight_bytes // 2
    assert (limits.connections, limits.connections_per_address) == (2048, 1024)
    assert gateway_limits.connections(MIB) == 64


def test_options_set_every_limit(tmp_path: Path) -> None:
    made = settings(
        tmp_path,
        "--hold-seconds=1",
        "--max-held-requests=2",
        "--max-body-bytes=3000",
        "--max-sequences=4",
        "--max-in-flight-bytes=500000",
        "--max-in-flight-bytes-per-key=60000",
        "--max-connections=7",
        "--max-connections-per-address=8",
        "--header-seconds=9",
        "--body-seconds=10",
        "--write-seconds=11",
        "--idle-seconds=12",
        "--answer-seconds=13",
        "--silence-seconds=14",
        "--comment-seconds=15",
        "--drain-seconds=16",
        "--linger-seconds=17",
    )
    assert made.limits == gateway_limits.Limits(
        hold_seconds=1,
        held_requests=2,
        body_bytes=3000,
        sequences=4,
        in_flight_bytes=500_000,
        in_flight_bytes_per_key=60_000,
        connections=7,
        connections_per_address=8,
        header_seconds=9,
        body_seconds=10,
        write_seconds=11,
        idle_seconds=12,
        answer_seconds=13,
        silence_seconds=14,
        comment_seconds=15,
    )
    assert (made.drain_seconds, made.linger_seconds) == (16, 17)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--hold-seconds=-1", "--hold-seconds is -1.0, and must be 0 or more"),
        ("--drain-seconds=nan", "--drain-seconds is nan"),
        ("--header-seconds=0", "--header-seconds is 0.0, and must be 1 or more"),
        ("--silence-seconds=inf", "--silence-seconds is inf"),
        ("--max-body-bytes=0", "--max-body-bytes is 0"),
        ("--max-sequences=0", "--max-sequences is 0"),
        ("--max-in-flight-bytes=1000", "too small for one request"),
        ("--max-in-flight-bytes-per-key=1000", "too small for one request"),
        ("--max-connections=-1", "--max-connections is -1"),
    ],
)
def test_values_that_cannot_be_used_are_refused(tmp_path: Path, option: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        settings(tmp_path, option)
