"""Durations on the command line."""

from __future__ import annotations

import re
from datetime import timedelta

from tunesmith.cli.errors import CliError, Exit

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_duration(text: str, option: str) -> timedelta:
    """Return the duration of a text such as `90s`, `30m`, `24h` or `7d`.

    Raises:
        CliError: the text is not a duration; the message names the option.
    """
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if match is None:
        raise CliError(
            f"{option} {text} is not a duration: write seconds, minutes, hours or days as in 90s, 30m, 24h or 7d",
            Exit.USAGE,
        )
    return timedelta(**{_UNITS[match[2]]: int(match[1])})
