"""Cache of tokenised rows for later attempts: on this machine's disk and in the job's folder of the store."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.storage.folder import Retry
from tunesmith_trainer.data.report import RowReport
from tunesmith_trainer.data.tokens import Counted
from tunesmith_trainer.errors import TrainerError
from tunesmith_trainer.store import file_sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from tunesmith.storage.folder import Folder

log = logging.getLogger(__name__)

_MANIFEST = "rows.json"
_SCHEMA_VERSION = 1
_RETRY = Retry(attempts=3)
"""Few retries: rows can be tokenised again, so an outage is not waited out."""


@dataclass(frozen=True)
class Cached:
    """Tokenised rows: `<name>.arrow` in `folder` for each name in `counted`."""

    folder: Path
    counted: dict[str, Counted]

    def path(self, name: str) -> Path:
        """Return the path of the Arrow file of that name."""
        return self.folder / f"{name}.arrow"


class TokenCache:
    """Cache of tokenised rows, keyed by the digest of everything that determines them.

    The manifest with the hashes of the files is written last, so an incomplete entry is never used.

    Args:
        scratch: local folder.
        store: folder of the job in the store that outlives the pod, or None.
    """

    def __init__(self, scratch: Path, store: Folder | None) -> None:
        local = store.local if store is not None else None
        self._scratch = local or scratch
        self._store = store.child(retry=_RETRY) if store is not None and local is None else None

    def get(self, key: str, make: Callable[[Path], Mapping[str, Counted]]) -> Cached:
        """Return the rows for a key; if none are cached, `make` writes `<name>.arrow` for each name it returns."""
        folder = self._scratch / key
        found = self._local(folder) or self._downloaded(key, folder)
        if found is not None:
            return found
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        counted = dict(make(folder))
        (folder / _MANIFEST).write_text(_document(folder, counted), encoding="utf-8")
        self._upload(key, folder, list(counted))
        return Cached(folder, counted)

    def _local(self, folder: Path) -> Cached | None:
        try:
            document = json.loads((folder / _MANIFEST).read_bytes())
            intact = all(file_sha256(folder / name) == sha256 for name, sha256 in document["files"].items())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None
        return Cached(folder, _counted(document)) if intact and document.get("version") == _SCHEMA_VERSION else None

    def _downloaded(self, key: str, folder: Path) -> Cached | None:
        if self._store is None:
            return None
        try:
            stored = self._store.child(key)
            if not stored.exists(_MANIFEST):
                return None
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            document = json.loads(stored.read(_MANIFEST))
            for name in document["files"]:
                stored.download(name, folder / name)
            stored.download(_MANIFEST, folder / _MANIFEST)
        except (TrainerError, ValueError, KeyError, TypeError) as error:
            log.warning(
                "the tokenised rows in %s cannot be used, so the rows are tokenised again: %s", self._store.uri, error
            )
            return None
        return self._local(folder)

    def _upload(self, key: str, folder: Path, names: list[str]) -> None:
        if self._store is None:
            return
        stored = self._store.child(key)
        try:
            for name in names:
                stored.upload(f"{name}.arrow", folder / f"{name}.arrow")
            stored.upload(_MANIFEST, folder / _MANIFEST)
        except TrainerError as error:
            log.warning("the tokenised rows could not be stored in %s for the next attempt: %s", self._store.uri, error)


def key_of(document: Mapping[str, Any]) -> str:
    """Return 32 hex digits of what determines the tokens."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:32]


def _document(folder: Path, counted: Mapping[str, Counted]) -> str:
    return json.dumps(
        {
            "version": _SCHEMA_VERSION,
            "files": {f"{name}.arrow": file_sha256(folder / f"{name}.arrow") for name in counted},
            "counted": {
                name: {"report": counts.report.document(), "perSource": counts.per_source}
                for name, counts in counted.items()
            },
        }
    )


def _counted(document: Mapping[str, Any]) -> dict[str, Counted]:
    return {
        name: Counted(RowReport.of(counts["report"]), list(counts["perSource"]))
        for name, counts in document["counted"].items()
    }
