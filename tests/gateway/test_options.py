"""Settings of the gateway: what follows from the container's memory, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gateway.gateway_rig import GATEWAY_KEYS
from tunesmith.contracts.agent import keys_file
from tunesmith.gateway import main
from tunesmith.gateway.limits import MIB, Limits, memory_limit
from tunesmith.gateway.settings import GatewaySettings
from tunesmith.settings import read

if TYPE_CHECKING:
    from pathlib import Path


def settings(*flags: str) -> GatewaySettings:
    return read(GatewaySettings, ["--namespace=tunesmith-system", *flags])


@pytest.mark.parametrize(
    ("content", "expected"), [("536870912\n", 512 * MIB), ("max\n", None), ("9223372036854771712\n", None)]
)
def test_the_memory_limit_is_the_containers(tmp_path: Path, content: str, expected: int | None) -> None:
    (tmp_path / "memory.max").write_text(content)
    machine = memory_limit(())
    assert memory_limit((tmp_path / "absent", tmp_path / "memory.max")) == (expected or machine)


def test_budget_and_connections_follow_from_the_memory_limit() -> None:
    limits = settings().for_memory(512 * MIB)
    assert limits.max_in_flight_bytes == pytest.approx(0.4 * 512 * MIB, abs=1)
    assert limits.max_in_flight_bytes_per_key == limits.max_in_flight_bytes // 2
    assert (limits.max_connections, limits.max_connections_per_address) == (2048, 1024)
    assert settings().for_memory(MIB).max_connections == 64
    assert settings("--max-connections=7").for_memory(512 * MIB).max_connections_per_address == 4


def test_flags_set_every_limit() -> None:
    given = {
        "hold_seconds": 1,
        "max_held_requests": 2,
        "max_body_bytes": 3000,
        "max_sequences": 4,
        "max_in_flight_bytes": 500_000,
        "max_in_flight_bytes_per_key": 60_000,
        "max_connections": 7,
        "max_connections_per_address": 8,
        "header_seconds": 9,
        "body_seconds": 10,
        "write_seconds": 11,
        "idle_seconds": 12,
        "answer_seconds": 13,
        "silence_seconds": 14,
        "comment_seconds": 15,
        "queue_seconds": 16,
        "max_running_per_pod": 17,
    }
    assert set(given) == set(Limits.model_fields)
    made = settings(*(f"--{name.replace('_', '-')}={value}" for name, value in given.items()))
    assert made.for_memory(512 * MIB).model_dump(include=set(given)) == given
    assert made.problem() is None


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        (
            "--hold-seconds=-1",
            "--hold-seconds (chart value gateway.holdSeconds): '-1' must be greater than or equal",
        ),
        ("--drain-seconds=nan", "--drain-seconds (chart value gateway.drainSeconds): 'nan' must be a finite number"),
        ("--header-seconds=0", "(chart value gateway.limits.headerSeconds): '0' must be greater than 0"),
        ("--silence-seconds=inf", "(chart value gateway.limits.silenceSeconds): 'inf' must be a finite number"),
        ("--max-body-bytes=0", "--max-body-bytes (chart value gateway.maxBodyBytes): '0' must be greater"),
        ("--max-sequences=many", "(chart value gateway.limits.maxSequences): 'many' must be a valid integer"),
        ("--max-connections=-1", "(chart value gateway.limits.maxConnections): '-1' must be greater"),
        ("--shared-pool-namespaces=A", "(chart value serving.sharedPoolNamespaces): 'A' is not a valid name"),
        ("--port=70000", "--port: '70000' must be less than or equal to 65535"),
    ],
)
def test_invalid_values_are_refused(capsys: pytest.CaptureFixture[str], flag: str, sentence: str) -> None:
    with pytest.raises(SystemExit) as exited:
        settings(flag)
    assert exited.value.code == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("flag", ["--max-in-flight-bytes=1000", "--max-in-flight-bytes-per-key=1000"])
def test_a_budget_below_one_request_is_refused(flag: str) -> None:
    with pytest.raises(ValueError, match=f"{flag.partition('=')[0]} is 1000, too small for one request: set it to "):
        main.apply_memory_limit(settings(flag))


def test_a_missing_gateway_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read .*mount the Secret tunesmith-gateway-key"):
        main.gateway_keys(tmp_path / "key")
    (tmp_path / "key").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be used"):
        main.gateway_keys(tmp_path / "key")
    (tmp_path / "key").write_bytes(keys_file(GATEWAY_KEYS))
    assert main.gateway_keys(tmp_path / "key")() == GATEWAY_KEYS
