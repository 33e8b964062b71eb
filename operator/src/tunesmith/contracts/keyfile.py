"""A mounted file of keys that is reread while the process runs, so a rotation needs no restart."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from tunesmith.contracts.agent import parse_keys

if TYPE_CHECKING:
    from pathlib import Path

    from tunesmith.contracts.agent import Keys

_REREAD_SECONDS = 2.0
_log = logging.getLogger(__name__)


class KeyFile:
    """Keys of a file, at most two seconds old. If the file disappears or is damaged, the last keys stay valid.

    Args:
        path: file with one key per line, newest first.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no usable key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = path.read_bytes()
        self._keys = parse_keys(self._content)
        self._read_at = time.monotonic()

    def __call__(self) -> Keys:
        """Return the current keys."""
        now = time.monotonic()
        if now - self._read_at >= _REREAD_SECONDS:
            self._read_at = now
            try:
                content = self._path.read_bytes()
                if content != self._content:
                    self._keys, self._content = parse_keys(content), content
                    _log.info("read new keys from %s", self._path)
            except (OSError, ValueError) as error:
                _log.warning("keeping the last keys of %s: %s", self._path, error)
        return self._keys
