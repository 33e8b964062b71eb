"""Retention of a revision's files: they are never removed while the engine may still read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

GRACE_SECONDS = 30.0
"""Grace period after the last use: a request whose client disconnected runs in the engine a little longer."""


class Retention:
    """Record of the revisions in use.

    The engine reads the files of a registered adapter again after it has evicted the adapter from its cache, and a
    running request keeps its adapter even after the adapter is unloaded. Files are therefore removed when their
    revision has not been wanted, known to the engine or used by a request for `GRACE_SECONDS`.
    """

    def __init__(self) -> None:
        self._unused_since: dict[str, float] = {}

    def unused(
        self,
        *,
        folders: Mapping[str, str],
        wanted: Collection[str],
        registered: Collection[str],
        running: Collection[str],
        now: float,
    ) -> list[str]:
        """Return the digests whose files may be removed now.

        Args:
            folders: folders of the files on this pod, by digest.
            wanted: digests that are wanted or being downloaded.
            registered: folders of the adapters that the engine knows, also of unloaded ones that it has not removed.
            running: engine names with requests in the engine.
            now: monotonic seconds.
        """
        running_revisions = {name.rpartition("@")[2] for name in running}
        idle = {
            digest
            for digest, folder in folders.items()
            if digest not in wanted
            and folder not in registered
            and digest.removeprefix("sha256:")[:12] not in running_revisions
        }
        self._unused_since = {digest: self._unused_since.get(digest, now) for digest in idle}
        return sorted(digest for digest, since in self._unused_since.items() if now - since >= GRACE_SECONDS)
